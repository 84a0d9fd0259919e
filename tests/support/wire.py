"""Hand-made HTTP: what a client library would smooth over has to be seen as it came."""

import base64
import socket
import threading
import time
from typing import Any, Callable, Dict, List, NamedTuple, Tuple
from urllib.parse import urlencode, urlsplit

BASIC = 'Basic ' + base64.b64encode(b'root:password').decode('ascii')
TIME_LIMIT_S = 120


class Answer(NamedTuple):
    """What came until the other side closed the connection; nothing at all is an answer too."""
    status_line: str
    headers: Tuple[str, ...]
    body: bytes

    @property
    def status(self) -> int:
        return int(self.status_line.split()[1]) if self.status_line else 0

    def header(self, name: str) -> str:
        """The value; empty if there is no such header."""
        for line in self.headers:
            if line.lower().startswith(name.lower() + ':'):
                return line.split(':', 1)[1].strip()
        return ''


def ask(url: str, method: str, path: str, query: Dict[str, Any], headers: Dict[str, str], body: bytes = b'') -> Answer:
    """One request over a connection of its own."""
    place = urlsplit(url)
    lines = ['%s %s%s%s HTTP/1.0' % (method, path, '?' if query else '', urlencode(query))]
    lines += ['%s: %s' % item for item in headers.items()]
    request = '\r\n'.join(lines + ['', '']).encode('utf-8') + body
    return answer_of(exchange((place.hostname, place.port), request))


def exchange(address: Any, request: bytes) -> bytes:
    """All that is answered until the other side closes. `address`: the path of a unix socket, or (host, port)."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(TIME_LIMIT_S)
        connection.connect(address)
        try:
            connection.sendall(request)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has answered before it had read all
        pieces = []
        while True:
            try:
                piece = connection.recv(1 << 20)
            except ConnectionResetError:
                break
            if not piece:
                break
            pieces.append(piece)
        return b''.join(pieces)


def answer_of(content: bytes) -> Answer:
    if not content:
        return Answer('', (), b'')
    head, _, body = content.partition(b'\r\n\r\n')
    lines = head.decode('utf-8').split('\r\n')
    return Answer(lines[0], tuple(lines[1:]), body)


class Background:
    """A call that goes on in a thread of its own; `result()` waits for it."""

    def __init__(self, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        self.outcome: List[Any] = []
        self.error: List[BaseException] = []

        def work() -> None:
            try:
                self.outcome.append(call(*arguments, **keywords))
            except Exception as error:  # handed to the thread that asks for the result
                self.error.append(error)

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()

    def is_over(self) -> bool:
        return not self.thread.is_alive()

    def result(self, time_limit_s: float = TIME_LIMIT_S) -> Any:
        self.thread.join(time_limit_s)
        assert self.is_over(), 'still going on after %d s' % time_limit_s
        if self.error:
            raise self.error[0]
        return self.outcome[0]


def eventually(condition: Callable[[], Any], time_limit_s: float = 60) -> Any:
    """The condition's value once it is true; the last one if that takes too long, also on a machine that is busy."""
    end = time.monotonic() + time_limit_s
    while True:
        value = condition()
        if value or time.monotonic() > end:
            return value
        time.sleep(0.05)
