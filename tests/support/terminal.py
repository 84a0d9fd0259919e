"""A program in a terminal of its own, and what is to be seen there.

    with Terminal(columns=80, lines=24) as terminal:
        terminal.start([PROGRAM, '-', config], environment)
        assert terminal.shows('43 %')
        terminal.interrupts()
        assert terminal.ending() == 130

pyte plays the terminal: it wraps, scrolls and moves its cursor as xterm does.
"""

import codecs
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import unicodedata
from typing import Any, Dict, List, Optional, Sequence

import pyte

from support.wire import eventually

TIME_LIMIT_S = 200
#: What gives the program its terminal: it leads the session, and is its foreground, as what a shell starts is.
START = ('import fcntl, os, sys, termios; fcntl.ioctl(int(sys.argv[1]), termios.TIOCSCTTY, 0); '
         'os.execv(sys.argv[2], sys.argv[2:])')
PAINTING = '\r\x1b[J'             # how what replaces something begins


class Screen(pyte.HistoryScreen):
    """What pyte lacks of xterm: a screen that becomes lower keeps the cursor's line."""

    def resize(self, lines: Optional[int] = None, columns: Optional[int] = None) -> None:
        lines = lines or self.lines
        while self.cursor.y >= lines:
            self.cursor.y -= 1
            self.index_of_top()
        super().resize(lines, columns)

    def index_of_top(self) -> None:
        """The first line leaves the screen."""
        self.history.top.append(self.buffer[0])
        for y in range(self.lines - 1):
            self.buffer[y] = self.buffer[y + 1]
        self.buffer.pop(self.lines - 1, None)


class Terminal:
    """A terminal of that size."""

    def __init__(self, columns: int = 80, lines: int = 24) -> None:
        self._screen = Screen(columns, lines, history=5000)
        self._stream = pyte.Stream(self._screen)
        self.lock = threading.Lock()
        self.received = ''
        self.frames: List[List[str]] = []       # the screen, each time before something on it is replaced, and now
        self._ours, self.side = pty.openpty()
        self._set_size(columns, lines)
        self._process: Any = None
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> 'Terminal':
        return self

    def __exit__(self, *_: Any) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self.side >= 0:
            os.close(self.side)
        if self._reader.ident is not None:
            self._reader.join(10)
        os.close(self._ours)

    def start(self, words: Sequence[str], environment: Dict[str, str], stdin: Any = None, stdout: Any = None,
              stderr: Any = None, python: Sequence[str] = (sys.executable, '-W', 'error')) -> None:
        """The program runs there; what is given of its descriptors leads elsewhere."""
        streams = [self.side if one is None else one for one in (stdin, stdout, stderr)]
        number = next((str(number) for number, one in enumerate(streams) if one == self.side), '0')
        self._process = subprocess.Popen([sys.executable, '-c', START, number] + list(python) + list(words), cwd='/',
                                         env=environment, stdin=streams[0], stdout=streams[1], stderr=streams[2],
                                         start_new_session=True)
        os.close(self.side)
        self.side = -1
        self._reader.start()

    def _read(self) -> None:
        decode = codecs.getincrementaldecoder('utf-8')('replace').decode
        while True:
            try:
                data = os.read(self._ours, 65536)
            except OSError:                     # EIO: nobody has it open any more
                data = b''
            self._feed(decode(data))
            if not data:
                return

    def _feed(self, text: str) -> None:
        # pyte draws nothing of a text behind a character without a width that is no accent
        with self.lock:
            self.received += text
            for piece in text.replace(PAINTING, '\0' + PAINTING).split('\0'):
                if piece.startswith(PAINTING):
                    self.frames.append(self._display())
                self._stream.feed(''.join(char for char in piece if unicodedata.category(char) not in ('Cf', 'Me', 'Mn')
                                          or unicodedata.combining(char)))

    def _display(self) -> List[str]:
        return [line.rstrip() for line in self._screen.display]

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack('HHHH', lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        with self.lock:
            self._screen.resize(lines, columns)
            self._set_size(columns, lines)

    def types(self, text: str) -> None:
        os.write(self._ours, text.encode('utf-8'))

    def interrupts(self) -> None:
        """Ctrl-C is typed while the program paints nothing: the kernel throws away what a terminal has not taken yet of what
        was written to it, and half a painting leaves whatever it leaves."""
        os.kill(self.pid, signal.SIGSTOP)
        assert eventually(lambda: not select.select([self._ours], [], [], 0.2)[0])
        self.types('\x03')
        os.kill(self.pid, signal.SIGCONT)

    @property
    def rows(self) -> List[str]:
        """The rows of the screen, without blanks at their ends, down to the last that has something."""
        with self.lock:
            rows = self._display()
        while rows and not rows[-1]:
            rows.pop()
        return rows

    @property
    def scrolled(self) -> List[str]:
        """All that was ever there, the screen last: lines that were longer than it is wide in so many pieces."""
        with self.lock:
            return [''.join(line[x].data for x in range(self._screen.columns)).rstrip()
                    for line in self._screen.history.top] + [row for row in self._display()]

    @property
    def columns(self) -> int:
        return int(self._screen.columns)

    def places(self, text: str) -> List[List[int]]:
        """The columns where each row that has the text has it. Hold `lock`."""
        found = []
        for y in range(self._screen.lines):
            cells = [self._screen.buffer[y][x].data for x in range(self._screen.columns)]
            at = [x for x in range(len(cells)) if ''.join(cells[x:x + len(text)]) == text]
            found += [at] if at else []
        return found

    @property
    def cursor(self) -> Any:
        return self._screen.cursor.y, self._screen.cursor.x

    @property
    def pid(self) -> int:
        return self._process.pid

    def shows(self, *texts: str) -> bool:
        """All these are on the screen at once, now or soon."""
        return bool(eventually(lambda: all(text in '\n'.join(self.rows) for text in texts) or self.is_over())) \
            and all(text in '\n'.join(self.rows) for text in texts)

    def is_over(self) -> bool:
        return self._process.poll() is not None

    def ending(self) -> int:
        """The program's exit status, once all that it has said is on the screen."""
        status = self._process.wait(TIME_LIMIT_S)
        self._reader.join(10)
        return status
