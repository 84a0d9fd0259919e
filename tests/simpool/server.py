"""The server: sockets of every host, HTTP, and which request goes where.

Host n listens on 127.0.0.n, plain on PORT and with TLS on PORT+1 (80 and 443 on real hosts), and on a unix socket of its
own. One thread per connection.
"""

import errno
import json
import marshal
import os
import shutil
import socket
import ssl
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
from typing import Any, Dict, List, Optional, Set, Tuple

import cli
import state
import transfer
import wire
from api import Api
from faults import Drop, Faults
from journal import Journal
from model import Pool
from schema import Failure

CERTIFICATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "test-certificate.pem")

#: The longest path of a unix socket (sun_path, with its final NUL).
LONGEST_SOCKET_PATH = 107
LONGEST_LINE = 64 * 1024
#: How long transfers have to notice that their clients are gone.
LET_GO_S = 2.0
KNOWN_METHODS = ("GET", "PUT", "POST", "OPTIONS", "CONNECT", "TRACE")


#: How long after `pool-restore-database` the host reboots: 30 s on the real one.
RESTORE_FUSE_S = 1.0


class BadRequest(Exception):
    """What came is not HTTP."""


class Request:
    """One HTTP request, its body still unread."""

    def __init__(self, method: str, target: str, version: str, headers: Dict[str, str], host_ref: str, is_unix: bool,
                 is_tls: bool, sock: Any, rfile: Any) -> None:
        self.method = method
        self.version = version
        #: lower-case names
        self.headers = headers
        self.host_ref = host_ref
        self.is_unix = is_unix
        self.is_tls = is_tls
        self.sock = sock
        self.rfile = rfile
        path, _, query = target.partition("?")
        self.path = urllib.parse.unquote(path)
        self.query = _pairs(query, "&")
        self.cookies = _pairs(headers.get("cookie", ""), ";")

    def content_length(self) -> Optional[int]:
        text = self.headers.get("content-length", "")
        return int(text) if text.isdigit() else None

    def body(self) -> bytes:
        """The whole body, which must have a length."""
        length = self.content_length()
        if length is None:
            raise Failure("INTERNAL_ERROR", "Failure(\"We require a content-length HTTP header\")")
        data = self.rfile.read(length)
        if len(data) != length:
            raise Drop()
        return data

    def keeps_alive(self) -> bool:
        wish = self.headers.get("connection", "").lower()
        return wish != "close" and (self.version == "1.1" or wish == "keep-alive")


def _pairs(text: str, separator: str) -> Dict[str, str]:
    pairs = {}
    for part in text.split(separator):
        name, equals, value = part.strip().partition("=")
        if name:
            pairs[urllib.parse.unquote(name)] = urllib.parse.unquote(value)
    return pairs


def read_request(rfile: Any, sock: Any, host_ref: str, is_unix: bool, is_tls: bool) -> Optional[Request]:
    """The next request of a connection, or None at its end."""
    line = rfile.readline(LONGEST_LINE)
    if not line:
        return None
    words = line.decode("latin-1").split()
    if len(words) != 3 or not words[2].startswith("HTTP/"):
        raise BadRequest()
    headers = {}
    while True:
        line = rfile.readline(LONGEST_LINE)
        if not line.endswith(b"\n"):
            raise BadRequest()
        text = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
        if not text:
            break
        name, _, value = text.partition(":")
        headers[name.strip().lower()] = value.strip()
    return Request(words[0], words[1], words[2][len("HTTP/"):], headers, host_ref, is_unix, is_tls, sock, rfile)


def xml_answer(request: Request, body: bytes, content_type: str = "text/xml") -> bytes:
    """An answer to an API call, headers in the server's order (recorded from xapi 24.19.2)."""
    connection = "keep-alive" if request.keeps_alive() else "close"
    head = ("HTTP/%s 200 OK\r\ncontent-length: %d\r\nconnection: %s\r\ncache-control: no-cache, no-store\r\n"
            "content-type: %s\r\nAccess-Control-Allow-Origin: *\r\nAccess-Control-Allow-Headers: X-Requested-With\r\n\r\n")
    return (head % (request.version, len(body), connection, content_type)).encode("ascii") + body


def not_implemented(method: str) -> bytes:
    name = method if method in KNOWN_METHODS else "Unknown " + method
    return transfer.page("501 Method not implemented",
                         "<h1>HTTP 501 Method Not Implemented</h1><p>%s not supported.<br /></p>" % name)


class Server:
    """A pool being served."""

    def __init__(self, folder: str, pool: Pool, faults: Faults, port: Optional[int] = None) -> None:
        self.folder = folder
        self.pool = pool
        self.faults = faults
        faults.control = self
        self.journal = Journal(os.path.join(folder, "journal.jsonl"))
        pool.on_touch.append(self._name_session)
        self.api = Api(pool, self)
        self._listeners = []  # type: List[socket.socket]
        self._connections = set()  # type: Set[Any]
        self._connections_lock = threading.Lock()
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(CERTIFICATE)
        self._short_folder = None  # type: Optional[str]
        self._sockets = {}  # type: Dict[str, str]
        self.port = 0
        hosts = [ref for ref in pool.tables["host"] if pool.is_live(ref)]
        self._listen_tcp(hosts, port)
        self._listen_unix(hosts)

    # --- addresses

    def url_of(self, host: str) -> str:
        """Where the host answers plain HTTP."""
        return "http://%s:%d" % (self.pool.record("host", host)["address"], self.port)

    def socket_of(self, host: str) -> str:
        """The host's unix socket, by a path that is short enough to connect to."""
        return self._sockets[host]

    # --- listening

    def _listen_tcp(self, hosts: List[str], port: Optional[int]) -> None:
        addresses = [self.pool.record("host", host)["address"] for host in hosts]
        for attempt in range(100):
            first = port or _free_port(addresses[0])
            bound = []  # type: List[Tuple[socket.socket, str, bool]]
            try:
                for host, address in zip(hosts, addresses):
                    for offset in (0, 1):
                        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
                        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        bound.append((listener, host, bool(offset)))
                        listener.bind((address, first + offset))
                        listener.listen(128)
            except (OSError, OverflowError) as error:
                for listener, _, _ in bound:
                    listener.close()
                if port or attempt == 99 or getattr(error, "errno", errno.EADDRINUSE) not in (errno.EADDRINUSE, errno.EACCES):
                    raise
                continue
            self.port = first
            for listener, host, is_tls in bound:
                self._accept_from(listener, host, is_unix=False, is_tls=is_tls)
            return

    def _listen_unix(self, hosts: List[str]) -> None:
        folder = os.path.join(os.path.abspath(self.folder), "sockets")
        os.makedirs(folder, exist_ok=True)
        visible = folder
        longest = "xapi-%d" % len(self.pool.tables["host"])
        if len(os.fsencode(os.path.join(folder, longest))) > LONGEST_SOCKET_PATH:
            self._short_folder = self._new_short_folder()
            visible = os.path.join(self._short_folder, "s")
            os.symlink(folder, visible)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for number, host in enumerate(self.pool.tables["host"]):
                name = "xapi-%d" % (number + 1)
                if os.path.lexists(os.path.join(folder, name)):
                    os.unlink(os.path.join(folder, name))
                if host in hosts:
                    self._accept_from(_bind_unix(descriptor, name), host, is_unix=True)
                self._sockets[host] = os.path.join(visible, name)
            if os.path.lexists(os.path.join(folder, "control")):
                os.unlink(os.path.join(folder, "control"))
            self._accept_from(_bind_unix(descriptor, "control"), "", is_unix=True)
        finally:
            os.close(descriptor)

    def _new_short_folder(self) -> str:
        """A folder with a short path for a link to the sockets. A server that was killed left its own: that goes first."""
        note = state.private(self.folder, "short-folder")
        try:
            with open(note, encoding="utf-8", errors="surrogateescape") as stream:
                shutil.rmtree(stream.read(), ignore_errors=True)
        except FileNotFoundError:
            pass
        folder = _short_temporary_folder()
        with open(note, "w", encoding="utf-8", errors="surrogateescape") as stream:
            stream.write(folder)
        return folder

    def _accept_from(self, listener: socket.socket, host: str, is_unix: bool, is_tls: bool = False) -> None:
        self._listeners.append(listener)

        def accept() -> None:
            while not self.pool.stopping:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                thread = threading.Thread(target=self._serve, args=(connection, host, is_unix, is_tls))
                thread.daemon = True
                thread.start()

        thread = threading.Thread(target=accept)
        thread.daemon = True
        thread.start()

    # --- one connection

    def _serve(self, connection: Any, host: str, is_unix: bool, is_tls: bool) -> None:
        rfile = None
        try:
            if not is_unix:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if is_tls:
                connection = self._tls.wrap_socket(connection, server_side=True)
            with self._connections_lock:
                self._connections.add(connection)
            rfile = connection.makefile("rb", 64 * 1024)
            while not self.pool.stopping:
                request = read_request(rfile, connection, host, is_unix, is_tls)
                if request is None:
                    break
                try:
                    goes_on = self._control(request) if not host else self._route(request)
                except Failure as error:
                    connection.sendall(transfer.internal_error(error.params[0] if error.params else error.code))
                    goes_on = False
                if not goes_on:
                    break
        except BadRequest:
            _try_to_send(connection, transfer.bad_request())
        except (Drop, OSError, ValueError):
            pass
        except Exception:
            self.report_bug("connection")
        finally:
            with self._connections_lock:
                self._connections.discard(connection)
            if rfile is not None:
                rfile.close()
            _close(connection)

    def _route(self, request: Request) -> bool:
        """Answer one request; whether the connection goes on."""
        handler = None
        longest = ""
        for (method, prefix), candidate in transfer.HANDLERS.items():
            # the path is matched by its longest known prefix (http_svr.ml, radix tree)
            if method == request.method and request.path.startswith(prefix) and len(prefix) > len(longest):
                handler, longest = candidate, prefix
        if handler is not None:
            handler(self, request)
            return False
        if request.method == "POST":
            return self._post(request)
        if request.method == "GET" and request.path.startswith("/rrd_updates"):
            return self._empty_not_found(request)
        if request.method in ("GET", "PUT"):
            request.sock.sendall(transfer.forbidden())
            return False
        request.sock.sendall(not_implemented(request.method))
        return False

    def _post(self, request: Request) -> bool:
        if request.path.startswith("/cli"):
            cli.serve(self, request, marshal.loads(request.body()))
            return False
        body = request.body()
        try:
            if request.path.startswith("/jsonrpc"):
                answer, content_type = self._json(request, body), "application/json"
            else:
                # any path that nothing else serves: prefix "/"
                method, given = api_call(body)
                answer, content_type = self.api.handle(request.host_ref, request.is_unix, method, given), "text/xml"
        except BadRequest as error:
            request.sock.sendall(transfer.internal_error(str(error)))
            return False
        request.sock.sendall(xml_answer(request, answer, content_type))
        return request.keeps_alive()

    def _json(self, request: Request, body: bytes) -> bytes:
        try:
            call = json.loads(body.decode("utf-8"))
            if not isinstance(call, dict):
                raise ValueError("not a call")
            value = self.api.handle_json(request.host_ref, request.is_unix, call)
        except ValueError as error:
            raise BadRequest(str(error))
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")

    def _empty_not_found(self, request: Request) -> bool:
        """What a host without statistics says (recorded)."""
        answered = transfer.Transfer(self, request, "/rrd_updates", "get_rrd_updates")
        try:
            answered.authenticate()
        except transfer.Unauthorised:
            request.sock.sendall(transfer.unauthorised("get_rrd_updates"))
            return False
        request.sock.sendall(transfer.head("%s 404 Not Found" % request.version))
        return False

    def call_api(self, request: Request, session: str, method: str, given: List[Any]) -> Any:
        """An API call inside an `xe` command."""
        return self.api.call_within(request.host_ref, session, method, given)

    # --- the private socket: `write`, `dump` and `read` of another process

    def _control(self, request: Request) -> bool:
        """POST /write with JSON {vm, device, block, count, zeros}: a guest of the running pool writes."""
        wish = json.loads(request.body().decode("utf-8"))
        try:
            guest_write(self.pool, wish["vm"], wish["device"], wish["block"], wish["count"], wish["zeros"])
            answer = {"ok": True}  # type: Dict[str, Any]
        except KeyError as error:
            answer = {"ok": False, "error": error.args[0]}
        except Failure as error:
            answer = {"ok": False, "error": str(error)}
        request.sock.sendall(xml_answer(request, json.dumps(answer).encode("ascii"), "application/json"))
        return False

    # --- what faults do to the whole server

    def logout_everyone(self) -> None:
        with self.pool.lock:
            self.pool.forget_sessions()

    def move_master(self, name: str) -> None:
        with self.pool.lock:
            host = self.pool.host_of(name)
            if host is None:
                raise Failure("INTERNAL_ERROR", "FAULTS.json: there is no host %s" % name)
            self.pool.move_master(host)

    def lose(self, seconds: float) -> None:
        """The server restarts without its last seconds; every other connection breaks."""
        state.lose(self.folder, self.pool, seconds)
        self._break_connections()

    def reboot_soon(self, tables: Dict[str, Dict[str, Dict[str, Any]]]) -> None:
        """The master reboots in a moment, and comes up with that database; every connection breaks."""
        def reboot() -> None:
            state.replace(self.folder, self.pool, tables)
            self._break_connections()
        fuse = threading.Timer(RESTORE_FUSE_S, reboot)
        fuse.daemon = True
        fuse.start()

    def _break_connections(self) -> None:
        with self._connections_lock:
            connections = list(self._connections)
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    # --- the rest

    def _name_session(self, cls: str, ref: str) -> None:
        if cls == "session" and ref in self.pool.tables["session"]:
            self.journal.name_session(ref)

    def report_bug(self, where: str) -> None:
        """A failure of the simulator itself: for the person who runs it, and in the folder."""
        text = "simulated pool: bug in %s\n%s" % (where, traceback.format_exc())
        sys.stderr.write(text)
        sys.stderr.flush()
        with open(os.path.join(self.folder, "bugs.txt"), "a", encoding="utf-8") as stream:
            stream.write(text)

    def let_go(self) -> None:
        """Who was served is gone, so all connections break; what was being moved for them ends in good order, if it can."""
        self._break_connections()
        deadline = time.time() + LET_GO_S
        while self.pool.open_devices and time.time() < deadline:
            time.sleep(0.02)

    def stop(self) -> None:
        """Close everything. Calls that are still going on are cut off, as by a kill: what they hold, they go on holding."""
        with self.pool.lock:
            self.pool.stopping = True
            self.pool.die()
            # within the lock, so that nobody is told of anything that was not written
            self._break_connections()
            self.pool.changed.notify_all()
        self.faults.stop()
        for listener in self._listeners:
            try:
                listener.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits in accept
            except OSError:
                pass
            listener.close()
        self._break_connections()
        self.journal.close()
        if self._short_folder is not None:
            shutil.rmtree(self._short_folder, ignore_errors=True)


def api_call(body: bytes) -> Tuple[str, List[Any]]:
    """(method, parameters); BadRequest if the body is not an XML-RPC call, as a control character makes it."""
    try:
        return wire.read_call(body)
    except ValueError as error:
        raise BadRequest("Xmlm.Error(%s)" % error)


def guest_write(pool: Pool, vm_name: str, device: str, block: int, count: int, zeros: bool) -> None:
    """A guest, named by its name or uuid, writes blocks. KeyError with a reason if there is no such thing."""
    with pool.lock:
        found = [vm for vm in pool.find_vms(vm_name)
                 if not pool.record("VM", vm)["is_a_snapshot"] and not pool.record("VM", vm)["is_control_domain"]]
        if len(found) != 1:
            raise KeyError("there are %d VMs named %s" % (len(found), vm_name))
        pool.guest_write(found[0], device, block, count, zeros)


def _free_port(address: str) -> int:
    probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        probe.bind((address, 0))
        return probe.getsockname()[1]
    finally:
        probe.close()


def _bind_unix(folder_descriptor: int, name: str) -> socket.socket:
    """A listening unix socket in an open folder: by way of /proc, so that the folder's own path may have any length."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("/proc/self/fd/%d/%s" % (folder_descriptor, name))
    listener.listen(128)
    return listener


def _short_temporary_folder() -> str:
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > 60:
        folder = "/tmp"
    return tempfile.mkdtemp(prefix="simpool-", dir=folder)


def _try_to_send(connection: Any, data: bytes) -> None:
    try:
        connection.sendall(data)
    except (OSError, ValueError):
        pass


def _close(connection: Any) -> None:
    """Close so that the last bytes arrive: TLS says goodbye, and what the client still sends is read for a moment.

    Closing with unread data in the socket would reset the connection, and the client would lose the answer.
    """
    try:
        connection.settimeout(0.2)
        if isinstance(connection, ssl.SSLSocket):
            connection = connection.unwrap()
        connection.shutdown(socket.SHUT_WR)
        for _ in range(16):
            if not connection.recv(64 * 1024):
                break
    except (OSError, ValueError):
        pass
    try:
        connection.close()
    except OSError:
        pass
