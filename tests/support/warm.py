"""Programs started from a process that has already loaded them: a start costs milliseconds, not a fifth of a second.

`start()` gives what subprocess.Popen gives. Each program is a process of its own, with arguments, environment, working
directory, session and descriptors as they were given, forked from a keeper: a Python under cron's environment that has
defined all that the program defines, and done nothing of what it does as `__main__`. A program whose environment changes what
Python does at its very start (LANG, PYTHON…), or that is to inherit an ignored signal, is started cold.

Run as a program this is the keeper:  warm.py SOCKET MODULE-FOLDER ...
"""

import array
import ast
import atexit
import contextlib
import functools
import gc
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from types import MappingProxyType
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

SUPPORT = os.path.dirname(os.path.abspath(__file__))
CRON_PATH = '/usr/bin:/bin'
DESCRIPTORS = 3
#: What a program imports that is worth having before it starts. XenAPI is not among them: which one is found is tested.
MODULES = ('abc array argparse base64 binascii collections contextlib copy ctypes datetime difflib email.charset email.header '
           'email.message email.policy email.utils encodings.idna enum errno fcntl fnmatch functools hashlib heapq http.client '
           'http.server io itertools json pathlib queue random re secrets select selectors shutil signal smtplib socket '
           'socketserver ssl stat string struct subprocess tempfile threading time traceback typing unicodedata urllib.parse '
           'uuid xml.etree.ElementTree xml.parsers.expat xml.sax.saxutils xmlrpc.client xmlrpc.server zlib')


# --- the side of the tests ----------------------------------------------------------------------------------------------

def can_be_warm(environment: Dict[str, str]) -> bool:
    """Does nothing in it change how a Python starts, and would it inherit no deafness to a signal?"""
    return not (any(name.startswith(('LANG', 'LC_', 'PYTHON', 'MALLOC', 'LD_')) for name in environment)
                or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN or signal.getsignal(signal.SIGINT) is signal.SIG_IGN)


def hear_signals() -> None:
    """What this process was told to ignore (nohup, a shell's background job) a handler passes over instead, so that the
    programs that it starts are not deaf to it: they would be started cold, and no signal could be tried on them."""
    for number in (signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def start(arguments: Sequence[str], environment: Dict[str, str], stdin: Any = subprocess.DEVNULL,
          stdout: Any = subprocess.PIPE, stderr: Any = subprocess.PIPE, cwd: str = '/') -> Any:
    """`arguments`: the program's file (or the folder that holds its __main__.py) and its words. A Python warning ends it."""
    if not can_be_warm(environment):
        return subprocess.Popen([sys.executable, '-W', 'error'] + list(arguments), env=environment, cwd=cwd, stdin=stdin,
                                stdout=stdout, stderr=stderr, start_new_session=True)
    return Process(list(arguments), environment, cwd, (stdin, stdout, stderr))


class Process:
    """What subprocess.Popen is to its caller, for a program that a keeper has forked."""

    def __init__(self, arguments: List[str], environment: Dict[str, str], cwd: str, streams: Tuple[Any, ...]) -> None:
        self.args = arguments
        self.returncode = None  # type: Optional[int]
        self._lock = threading.Lock()
        ours = [None] * DESCRIPTORS  # type: List[Any]
        theirs = []
        opened = []
        for number, stream in enumerate(streams):
            if stream == subprocess.PIPE:
                read_end, write_end = os.pipe()
                keep, give = (write_end, read_end) if number == 0 else (read_end, write_end)
                ours[number] = os.fdopen(keep, 'wb' if number == 0 else 'rb', -1 if number else 0)
                opened.append(give)
            elif stream == subprocess.DEVNULL:
                give = os.open(os.devnull, os.O_RDWR)
                opened.append(give)
            else:
                give = stream if isinstance(stream, int) else stream.fileno()
            theirs.append(give)
        self.stdin, self.stdout, self.stderr = ours
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connection.connect(keeper(arguments[0]))
            wish = packed(arguments, environment, cwd)
            self._connection.sendmsg([b'%10d' % len(wish)],
                                     [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', theirs))])
            self._connection.sendall(wish)
            self.pid = int(self._line(None) or b'0')
        finally:
            for descriptor in opened:
                os.close(descriptor)
        if not self.pid:
            raise AssertionError('the keeper of warm programs did not start %s' % arguments)

    def _line(self, timeout: Optional[float]) -> Optional[bytes]:
        """The keeper's next word; None if it does not come in time."""
        if not select.select([self._connection], [], [], timeout)[0]:
            return None
        return self._connection.recv(10).strip()

    def poll(self) -> Optional[int]:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: Optional[float] = None) -> int:
        with self._lock:
            if self.returncode is None:
                word = self._line(timeout)
                if word is None:
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
                self._connection.close()
                self.returncode = int(word or -signal.SIGKILL)      # without a word the keeper itself was killed
            return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, data: Optional[bytes] = None, timeout: Optional[float] = None) -> Tuple[bytes, bytes]:
        """All that it says, once it has ended. After a TimeoutExpired this can be called again, and nothing is lost."""
        if not hasattr(self, '_told'):
            self._told = [[], []]  # type: List[List[bytes]]
            self._helpers = [threading.Thread(target=_read_all, args=pair, daemon=True)
                             for pair in zip((self.stdout, self.stderr), self._told) if pair[0] is not None]
            if self.stdin is not None:
                self._helpers.append(threading.Thread(target=_write_all, args=(self.stdin, data or b''), daemon=True))
            for helper in self._helpers:
                helper.start()
        ends_at = None if timeout is None else time.monotonic() + timeout
        for helper in self._helpers:
            helper.join(None if ends_at is None else max(0, ends_at - time.monotonic()))
            if helper.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if ends_at is None else max(0, ends_at - time.monotonic()))
        return b''.join(self._told[0]), b''.join(self._told[1])


def _read_all(stream: Any, told: List[bytes]) -> None:
    with stream:
        told.append(stream.read())


def _write_all(stream: Any, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), stream:
        stream.write(data)


def packed(arguments: Sequence[str], environment: Dict[str, str], cwd: str) -> bytes:
    """A wish as the keeper reads it: all texts as the bytes that they are for the kernel."""
    def text(value: str) -> str:
        return os.fsencode(value).decode('latin-1')
    return json.dumps([[text(word) for word in arguments], {text(name): text(value) for name, value in environment.items()},
                       text(cwd)]).encode('ascii')


_starting = threading.Lock()


def keeper(program: str) -> str:
    """The socket of a keeper, which lives as long as this process: one for the simulated pool, one for all else."""
    with _starting:
        return _keeper(os.getpid(), os.path.isdir(program))


@functools.lru_cache(maxsize=None)
def _keeper(of: int, is_folder: bool) -> str:
    """That keeper of that process of tests."""
    home = tempfile.mkdtemp(prefix='warm-')
    path = os.path.join(home, 'socket')
    process = subprocess.Popen([sys.executable, '-W', 'error', os.path.abspath(__file__), path], env={'PATH': CRON_PATH},
                               cwd='/', stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)

    def end() -> None:
        if os.getpid() == of:
            process.stdin.close()
            process.wait()
            process.stdout.close()
            shutil.rmtree(home, ignore_errors=True)

    atexit.register(end)
    if process.stdout.readline() != b'ready\n':
        raise AssertionError('the keeper of warm programs did not begin')
    return path


# --- the keeper ---------------------------------------------------------------------------------------------------------

class Wish(NamedTuple):
    """A program that is to run."""
    arguments: List[str]
    environment: Dict[bytes, bytes]
    cwd: bytes


def keep(path: str) -> Optional[Wish]:
    """Forks a program for each wish, and tells its end. Returns in the child, with what it is to be; None when all is over."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(64)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.write(1, b'ready\n')
    running = {}  # type: Dict[int, socket.socket]
    while True:
        ready = select.select([0, woken, listener], [], [])[0]
        if 0 in ready:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            listener.close()
            return None
        if woken in ready:
            os.read(woken, 4096)
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            with contextlib.suppress(OSError), running.pop(pid) as connection:
                connection.sendall(b'%10d' % (os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)))
        if listener not in ready:
            continue
        connection = listener.accept()[0]
        descriptors, wish = receive(connection)
        loaded(wish.arguments)
        pid = os.fork()
        if pid == 0:
            for one in [listener, connection] + list(running.values()):
                one.detach()        # closed below; what is behind such a number later is not theirs
            become(wish, descriptors)
            return wish
        for descriptor in descriptors:
            os.close(descriptor)
        running[pid] = connection
        with contextlib.suppress(OSError):
            connection.sendall(b'%10d' % pid)


def receive(connection: socket.socket) -> Tuple[List[int], Wish]:
    """The descriptors and the wish of a client."""
    descriptors = array.array('i')
    size, ancillary, _, _ = connection.recvmsg(10, socket.CMSG_SPACE(DESCRIPTORS * descriptors.itemsize))
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    rest, wish = int(size), b''
    while len(wish) < rest:
        wish += connection.recv(rest - len(wish))
    words, environment, cwd = json.loads(wish.decode('ascii'))
    return list(descriptors), Wish([os.fsdecode(word.encode('latin-1')) for word in words],
                                   {name.encode('latin-1'): value.encode('latin-1') for name, value in environment.items()},
                                   cwd.encode('latin-1'))


def become(wish: Wish, descriptors: Sequence[int]) -> None:
    """This process is as the program would find itself."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.closerange(DESCRIPTORS, 1024)
    os.environb.clear()
    os.environb.update(wish.environment)
    os.chdir(wish.cwd)
    random = sys.modules.get('random')
    if random is not None:
        random.seed()           # type: ignore


class Loaded(NamedTuple):
    """A program up to the point where it would begin: all is defined, what it does as `__main__` is still to be run."""
    module: types.ModuleType
    beginning: types.CodeType


class Definitions(dict):
    """Where a module's statements write: all of it arrives in the module, but these constants have another value from the
    moment they are defined, so that what is reckoned from them follows."""

    def __init__(self, module: types.ModuleType, constants: Mapping[str, Any]) -> None:
        super().__init__()
        self._names = module.__dict__
        self._constants = dict(constants)

    def __setitem__(self, name: str, value: Any) -> None:
        self._names[name] = value = self._constants.pop(name, value)
        super().__setitem__(name, value)

    def unused(self) -> List[str]:
        """The constants that the module does not define."""
        return sorted(self._constants)


def load(path: str, constants: Mapping[str, Any] = MappingProxyType({})) -> Loaded:
    """The program in that file, with other values of these constants of it."""
    definitions, beginning = parts(path, os.stat(path).st_mtime)
    module = types.ModuleType('__main__')
    module.__dict__.update(__file__=path, __builtins__=__builtins__)
    place = Definitions(module, constants)
    exec(definitions, module.__dict__, place)
    if place.unused():
        raise AssertionError('%s has no constant %s' % (path, ', '.join(place.unused())))
    if hasattr(module, 'become'):
        module.become = lambda *_: None         # type: ignore          # it need not forget how it was compiled
    return Loaded(module, beginning)


@functools.lru_cache(maxsize=None)
def parts(path: str, changed_at: float) -> Tuple[types.CodeType, types.CodeType]:
    """What the program defines, and what it does as `__main__`."""
    with open(path, encoding='utf-8') as file:
        tree = ast.parse(file.read(), path)
    guarded = [statement for statement in tree.body if isinstance(statement, ast.If)
               and any(isinstance(node, ast.Name) and node.id == '__name__' for node in ast.walk(statement.test))]
    tree.body = [statement for statement in tree.body if statement not in guarded]
    definitions = compile(tree, path, 'exec')
    tree.body = list(guarded)
    return definitions, compile(tree, path, 'exec')


@functools.lru_cache(maxsize=None)
def _loaded(path: str, changed_at: float) -> Loaded:
    return load(path)


def loaded(arguments: Sequence[str]) -> Loaded:
    """The program of that command line, read once, unless its file changes. One that has a function `prepare` is shown its
    words beforehand, so that what it reads is read once, too."""
    path = arguments[0]
    if os.path.isdir(path):
        load_folder(path)
        path = os.path.join(path, '__main__.py')
    found = _loaded(path, os.stat(path).st_mtime)
    if hasattr(found.module, 'prepare'):
        found.module.prepare(arguments)         # type: ignore
    return found


@functools.lru_cache(maxsize=None)
def load_folder(path: str) -> None:
    """The modules of a program that is a folder of its own."""
    sys.path[0] = path
    for name in sorted(os.listdir(path)):
        if name.endswith('.py') and not name.startswith('_'):
            __import__(name[:-3])


def main() -> None:
    for name in MODULES.split():
        with contextlib.suppress(ImportError):      # ctypes, ssl: some builds of Python lack them
            __import__(name)
    if hasattr(gc, 'freeze'):
        gc.freeze()                 # what is here now is shared by all children, if their collector leaves it alone
    wish = keep(sys.argv[1])
    if wish is not None:
        program = loaded(wish.arguments)
        sys.argv[:] = wish.arguments
        sys.path[0] = os.path.dirname(program.module.__dict__['__file__'])
        sys.modules['__main__'] = program.module
        os._exit(status_of(program.beginning, program.module.__dict__))


def status_of(code: types.CodeType, names: Dict[str, Any]) -> int:
    """The program has run and what it said is written. A Python that ends properly also frees, object by object, all that it
    has in common with its keeper: that takes longer than most programs here run, so it is left out."""
    status = 0
    try:
        exec(code, names)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            sys.stderr.write(end.code + '\n')
    except BaseException:
        traceback.print_exc()
        status = 1
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return status & 0xff


if __name__ == '__main__':
    main()
