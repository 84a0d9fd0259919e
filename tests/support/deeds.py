"""The words that tests are written in: what is done.

    run = backup(pool, shelf, 'vm-export=web:2')        the lines of weekend.cfg, run as cron runs it on the master
    run = preview(pool, shelf, 'vm-export=web:2')
    with beginning(pool, shelf, 'vm-export=web') as process: process.signal(signal.SIGTERM); run = process.ending()
"""

import contextlib
import glob
import os
import signal
import threading
import zlib
from typing import Any, Callable, Dict, Iterator, List, Sequence, Union

from support import warm
from support.process import CRON_PATH, PROGRAM, TIME_LIMIT_S, TROUBLED, Pool, Run, ended, run_program, text_of, write_json
from support.shelf import Shelf
from support.wire import eventually


def backup(pool: Pool, shelf: Shelf, *lines: str, password: str = '-', host: int = 1, words: Sequence[str] = (),
           **how: Any) -> Run:
    """A run of weekend.cfg with these lines, on that host. `words`: what the crontab line has behind the config."""
    how.setdefault('environment', pool.environment(host))
    return run_program(password, shelf.config(*lines), *words, **how)


def preview(pool: Pool, shelf: Shelf, *lines: str, **how: Any) -> Run:
    return backup(pool, shelf, *lines, words=['preview'], **how)


def in_trouble(place: Union[Pool, Shelf], **trouble: Any) -> List[str]:
    """How the program is started on a machine in that trouble, as troubled.py knows it. `place`: where its file may lie,
    one for each trouble: the workers of a program that was started before read theirs when they begin."""
    path = os.path.join(place.home, 'TROUBLE-%08x.json' % zlib.crc32(repr(sorted(trouble.items())).encode()))
    write_json(path, trouble)
    return [TROUBLED, path, PROGRAM]


def without_pool(shelf: Shelf, *words: str, lines: Sequence[str] = ('vm-export=*',), **trouble: Any) -> Run:
    """The program of these words has ended on a machine that sees the store and no pool, and may be in trouble."""
    start = in_trouble(shelf, **trouble) if trouble else [PROGRAM]
    return ended(warm.start(start + ['-', shelf.config(*lines)] + list(words), {'PATH': CRON_PATH}))


def hurried(pool: Pool) -> List[str]:
    """How the program is started so that its minutes last half a second: for what it does only after long waiting."""
    return in_trouble(pool, hurried=True)


def hurried_backup(pool: Pool, shelf: Shelf, *lines: str, words: Sequence[str] = ()) -> Run:
    """A run whose minutes last half a second."""
    return ended(warm.start(hurried(pool) + ['-', shelf.config(*lines)] + list(words), pool.environment()))


class Process:
    """VmBackup.py while it runs."""

    def __init__(self, arguments: Sequence[str], environment: Dict[str, str], program: Sequence[str] = ()) -> None:
        self._process = warm.start(list(program or [PROGRAM]) + list(arguments), environment)
        self._told: List[List[bytes]] = [[], []]
        self._readers = [threading.Thread(target=self._read, args=(pipe, told), daemon=True)
                         for pipe, told in zip((self._process.stdout, self._process.stderr), self._told)]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(pipe: Any, told: List[bytes]) -> None:
        with pipe:
            for line in pipe:
                told.append(line)

    @property
    def output(self) -> str:
        """What it has said so far."""
        return text_of(b''.join(self._told[0] + self._told[1]))

    def says(self, text: str) -> bool:
        """It says so, now or soon."""
        return bool(eventually(lambda: text in self.output or self.is_over())) and text in self.output

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_over(self) -> bool:
        return self._process.poll() is not None

    def has_begun(self) -> bool:
        """It has handlers for signals, now or soon. (SIGINT has one from the start in each Python.)"""
        def hears_sigterm() -> bool:
            with contextlib.suppress(OSError), open('/proc/%d/status' % self.pid) as file:
                caught = [int(line.split()[1], 16) for line in file if line.startswith('SigCgt')]
                return bool(caught[0] >> (signal.SIGTERM - 1) & 1)
            return True                         # it is over
        return bool(eventually(hears_sigterm))

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """Killed as a power failure kills, with all that it had started."""
        for pid in [self._process.pid] + children_of(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def ending(self, time_limit_s: float = TIME_LIMIT_S) -> Run:
        """What it left to see, once it has ended by itself."""
        status = self._process.wait(time_limit_s)
        for reader in self._readers:
            reader.join(10)
        return Run(status, text_of(b''.join(self._told[0])), text_of(b''.join(self._told[1])))


@contextlib.contextmanager
def beginning(pool: Pool, shelf: Shelf, *lines: str, password: str = '-', host: int = 1, words: Sequence[str] = (),
              config: str = '', is_hurried: bool = False) -> Iterator[Process]:
    """The run has been started; it does not outlive the block. `config`: a config other than weekend.cfg."""
    process = Process([password, config or shelf.config(*lines)] + list(words), pool.environment(host),
                      hurried(pool) if is_hurried else ())
    try:
        yield process
    finally:
        if not process.is_over():
            process.kill()


def children_of(pid: int) -> List[int]:
    """All processes that the process has started, and those that they have."""
    found = []
    for path in glob.glob('/proc/[0-9]*/stat'):
        with contextlib.suppress(OSError), open(path, encoding='utf-8', errors='replace') as file:
            text = file.read()
            if int(text.rpartition(')')[2].split()[1]) == pid:
                child = int(text.split()[0])
                found += [child] + children_of(child)
    return found


def is_exporting(shelf: Shelf) -> Callable[[], bool]:
    """Have bytes of an image come? (The pool logs an export when it has ended.)"""
    def has_come(path: str) -> bool:
        with contextlib.suppress(FileNotFoundError):           # finished, or gone, since it was seen
            return os.path.getsize(path) > 0
        return False

    return lambda: any('.partial/' in name and name.endswith(('.xva', '.raw')) and has_come(shelf.at(name))
                       for name in shelf.tree())


def objects(pool: Pool) -> Dict[str, Dict[str, Any]]:
    """All that a backup could change or leave in the pool: VMs, disks, drives, interfaces, tasks, messages, sessions."""
    dump = pool.dump()
    return {kind: dump.get(kind, {}) for kind in ('VM', 'VDI', 'VBD', 'VIF', 'message', 'session')}
