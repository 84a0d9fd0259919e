#!/usr/bin/env python3
"""Runs VmBackup.py on a machine in trouble: its storage fails at one step, or its minutes last half a second.

    troubled.py TROUBLE.json VmBackup.py ARGUMENT ...

The program is run in this process as `__main__`, its text unchanged. TROUBLE.json:

    {"store": DIR, "trace": FILE}                        every step of the storage below DIR is written to FILE, a line each
    {"store": DIR, "step": 17, "do": "ENOSPC"}           step 17 fails so; also any other errno by name
    {"store": DIR, "step": 17, "do": "ENOSPC", "stays": true}   from then on all that needs space fails (for other
                                                         errors: everything does)
    {"store": DIR, "step": 17, "do": "SIGKILL"}          the process gets that signal just before step 17
    {"store": DIR, "step": 17, "do": "hang"}             step 17 never ends, as on a dead share
    {"store": DIR, "step": 17, "do": "short"}            a write takes half of what it was given
    {"store": DIR, "step": 17, "do": "flip"}             a write stores a bit otherwise than it was given
    {"store": DIR, "step": 17, "do": "vanish", "what": PATH}    just before step 17 somebody removes what has that path there
    {"store": DIR, "step": 17, "do": "run", "command": [WORD, ...]}    just before step 17 somebody runs that command; a
                                                         server may refuse it, as a disk is in use
    {"store": DIR, "reads": true, ...}                   the steps are the openings of files for reading, and nothing else
    {"store": DIR, "below": PATH, ...}                   only what befalls that directory there is a step
    {"store": DIR, "apart": PATH, ...}                   what befalls that directory there is none: it differs from night to night
    {"at": [NAME, ...], "do": "EIO"}                     looking at or opening what bears one of these names fails so; or
                                                         it vanishes ("vanish"), takes a second ("sleep"), never ends ("hang"),
                                                         or its opening lasts until there is a file "until" ("wait");
                                                         meanwhile there is one of that name with ".met" behind it
    {"at": [NAME, ...], "do": "ENOSPC", "once": true}    only the first opening
    {"hurried": true}                                    the program's minutes last half a second, and it waits less
    {"hasty": true}                                      its patience with mail servers and pings is three seconds
    {"clock": SECONDS}                                   its clock is so much ahead of the real one; with "since", from
                                                         when on there is a file of that path
    {"broken": NAME}                                     the function or method of that name has a bug
    {"mounts": [{"point": DIR, "kind": "nfs4", ...}]}    these directories are mounts, as far as it can tell; "source",
                                                         "options", "free" and "size" in bytes can be said, too, the path
                                                         that is "shown", and which of them it is the "same_as"

A step is a call that changes what is below DIR: write, pwrite, ftruncate, fsync, create, mkdir, rename, link, unlink, rmdir.
"""

import builtins
import datetime
import errno
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Dict, Optional, Sequence

NEEDS_SPACE = ('write', 'create', 'mkdir')
REAL = {name: getattr(os, name) for name in ('write', 'pwrite', 'ftruncate', 'fsync', 'fdatasync', 'open', 'mkdir',
                                             'rename', 'replace', 'link', 'unlink', 'rmdir')}
REAL_OPEN = builtins.open
REAL_RUN = subprocess.run


class Storage:
    """The steps of the storage below one directory, counted, and the trouble at one of them."""

    def __init__(self, trouble: Dict[str, Any]) -> None:
        self.root = os.path.realpath(trouble['store'])
        self.step = trouble.get('step', 0)
        self.do = trouble.get('do', '')
        self.stays = trouble.get('stays', False)
        self.what = trouble.get('what', '')
        self.command = trouble.get('command', ())
        self.reads = trouble.get('reads', False)
        self.is_named = trouble.get('named', False)
        self.below = trouble.get('below', '')
        self.apart = trouble.get('apart', '')
        self.trace = REAL['open'](trouble['trace'], os.O_WRONLY | os.O_CREAT | os.O_APPEND) if 'trace' in trouble else -1
        self.count = 0
        self.lock = threading.Lock()

    def place(self, path: Any, dir_fd: Optional[int]) -> str:
        """Below the directory: where, relative to it. "" for all other places."""
        path = os.fsdecode(path)
        base = os.readlink('/proc/self/fd/%d' % dir_fd) if dir_fd is not None else os.getcwd()
        return self.relative(os.path.normpath(os.path.join(base, path)))

    def place_of_fd(self, fd: int) -> str:
        try:
            return self.relative(os.readlink('/proc/self/fd/%d' % fd))
        except OSError:
            return ''

    def relative(self, path: str) -> str:
        return path[len(self.root) + 1:] or '.' if (path + '/').startswith(self.root + '/') else ''

    def pass_step(self, kind: str, place: str) -> str:
        """One step more. Raises or never returns if that is the trouble; `short` if a write is to take only half, `flip` if it
        is to store a bit otherwise."""
        if not place or (kind == 'open') != self.reads or not (place + '/').startswith(self.below and self.below + '/'):
            return ''
        if self.apart and (place + '/').startswith(self.apart + '/'):
            return ''
        with self.lock:
            self.count += 1
            count = self.count
        if self.trace >= 0:
            REAL['write'](self.trace, ('%s %s\n' % (kind, place)).encode('utf-8', 'surrogateescape'))
        if not self.step or count < self.step or count > self.step and not self.stays:
            return ''
        if self.do == 'hang':
            while True:
                time.sleep(3600)
        if self.do in ('short', 'flip'):
            return self.do
        if self.do == 'vanish':
            REAL_RUN(['rm', '-rf', os.path.join(self.root, self.what)], check=True)
            return ''
        if self.do == 'run':
            done = REAL_RUN(self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            assert done.returncode == 0 or b'VDI is in use' in done.stderr, (self.command, done)
            return ''
        if self.do.startswith('SIG'):
            os.kill(os.getpid(), getattr(signal, self.do))
            return ''
        if self.do == 'ENOSPC' and kind not in NEEDS_SPACE and count > self.step:
            return ''
        number = getattr(errno, self.do)
        raise OSError(number, os.strerror(number))


def exists(path: Any, dir_fd: Optional[int]) -> bool:
    """What is there already is found without any step of the storage."""
    try:
        os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        return True
    except OSError:
        return False


def written(data: Any, deed: str) -> Any:
    """What a write stores of these data when that befalls it."""
    if deed == 'short' and len(data) > 1:
        return memoryview(data)[:len(data) // 2]
    if deed == 'flip' and len(data):
        data = bytearray(data)
        data[len(data) // 2] ^= 1
    return data


def install(storage: Storage) -> None:
    """From now on every step passes the Storage first."""

    def on_fd(kind: str, name: str) -> Callable[..., Any]:
        def call(fd: int, *arguments: Any) -> Any:
            deed = storage.pass_step(kind, storage.place_of_fd(fd))
            return REAL[name](fd, written(arguments[0], deed)) if name == 'write' else REAL[name](fd, *arguments)
        return call

    def on_path(kind: str, name: str) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            dir_fd = options.get('dir_fd', options.get('src_dir_fd'))
            if kind != 'mkdir' or not exists(path, dir_fd):
                storage.pass_step(kind, storage.place(arguments[0] if kind == 'link' else path, dir_fd))
            return REAL[name](path, *arguments, **options)
        return call

    def troubled_os_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: Optional[int] = None) -> int:
        is_nameless = flags & os.O_TMPFILE == os.O_TMPFILE
        if is_nameless and storage.is_named:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if is_nameless or flags & os.O_CREAT and not exists(path, dir_fd):
            storage.pass_step('create', storage.place(path, dir_fd))
        if not flags & (os.O_CREAT | os.O_DIRECTORY | os.O_WRONLY | os.O_RDWR):
            storage.pass_step('open', storage.place(path, dir_fd))
        return REAL['open'](path, flags, mode, dir_fd=dir_fd)

    class TroubledFile(io.FileIO):
        """What open() gives below the directory: its writes pass the Storage too."""

        def write(self, data: Any) -> Any:
            return super().write(written(data, storage.pass_step('write', storage.place_of_fd(self.fileno()))))

    def troubled_open(file: Any, mode: str = 'r', buffering: int = -1, *arguments: Any, **options: Any) -> Any:
        is_ours = isinstance(file, int) and mode == 'wb' and storage.place_of_fd(file)
        if not is_ours:
            return REAL_OPEN(file, mode, buffering, *arguments, **options)
        return io.BufferedWriter(TroubledFile(file, mode, **options), buffering if buffering > 1 else 8192)

    for kind, name in (('write', 'write'), ('write', 'pwrite'), ('truncate', 'ftruncate'), ('fsync', 'fsync'),
                       ('fsync', 'fdatasync')):
        setattr(os, name, on_fd(kind, name))
    for kind, name in (('mkdir', 'mkdir'), ('rename', 'rename'), ('rename', 'replace'), ('link', 'link'),
                       ('unlink', 'unlink'), ('rmdir', 'rmdir')):
        setattr(os, name, on_path(kind, name))
    os.open = troubled_os_open
    builtins.open = troubled_open


def befall(names: Sequence[str], deed: str, is_once: bool, until: str) -> None:
    """From now on this happens to whoever looks at or opens what bears one of these names: the error of that name; or
    `vanish` (it is gone, with all that is in it), `sleep` (a second passes at each opening), `hang` (it never ends), `wait` (an
    opening lasts until there is that file).
    Or it happens at the first opening only."""
    left = list(names)

    def on(call: Callable[..., Any], is_opening: bool) -> Callable[..., Any]:
        def troubled(path: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(path, (str, bytes)) and os.path.basename(os.fsdecode(path)) in left \
                    and (is_opening or not is_once):
                if is_once:
                    left.remove(os.path.basename(os.fsdecode(path)))
                if deed == 'vanish':
                    base = os.readlink('/proc/self/fd/%d' % options['dir_fd']) if options.get('dir_fd') is not None else ''
                    REAL_RUN(['rm', '-rf', os.path.join(base, os.fsdecode(path))], check=True)
                elif deed == 'sleep':
                    time.sleep(1 if is_opening else 0)
                elif deed == 'hang':
                    time.sleep(3600)
                elif deed == 'wait':
                    if is_opening:
                        REAL_OPEN(until + '.met', 'w').close()
                    while is_opening and os.path.isdir(os.path.dirname(until)) and not os.path.exists(until):
                        time.sleep(0.05)
                else:
                    raise OSError(getattr(errno, deed), os.strerror(getattr(errno, deed)))
            return call(path, *arguments, **options)
        return troubled

    os.stat, os.open = on(os.stat, False), on(os.open, True)


#: Constants of VmBackup.py, and what they are when it is in a hurry: shorter minutes and less patience; hours and days stay.
#: Seconds in which a machine with three times too much to do answers, though nothing is wrong, are no sign of trouble.
HURRY = {'MINUTE_S': 0.5, 'HOUR_S': 3600, 'READ_TIMEOUT_S': 5, 'LOGOUT_TIMEOUT_S': 4, 'BUSY_PATIENCE_S': 6,
         'LOST_ANSWER_PATIENCE_S': 2, 'PROGRAM_ENDING_S': 6, 'TASK_CANCEL_S': 3, 'TASK_POLL_S': 1, 'SR_POLL_S': 1,
         'SILENCE_BEFORE_POLL_S': 0.5, 'WAY_OUT_S': 6, 'CLEAN_UP_LIMIT_S': 6,
         'SIGNAL_PATIENCE_S': 3, 'CREW_ENDS_S': 10,
         'SIGN_PAUSE_S': 0.2, 'TEND_PAUSE_S': 0.1, 'IDLE_PAUSE_S': 0.1, 'MOST_IDLE_PAUSE_S': 0.2,
         'STATUS_LOG_LIMIT_S': 6, 'OUTBOX_LIMIT_S': 6, 'SHARE_LIMIT_S': 4}
#: When it has some seconds for mail servers and for those that wait for pings.
HASTE = {'PING_LIMIT_S': 3, 'MAIL_TRY_LIMIT_S': 3, 'MAIL_PAUSES_S': (0.1, 0.3), 'MAIL_GOODBYE_S': 0.2}


@functools.lru_cache(maxsize=None)
def loaded(program: str, changed_at: float, is_hurried: bool, is_hasty: bool) -> Any:
    """The program, read once for each pace."""
    import warm
    constants = dict(HURRY if is_hurried else {})
    constants.update(HASTE if is_hasty else {})
    return warm.load(program, constants)


def prepare(words: Sequence[str]) -> Any:
    """The program of these words and what is to befall it: (what warm.load gives, the content of TROUBLE.json)."""
    with REAL_OPEN(words[1], encoding='utf-8') as file:
        trouble = json.load(file)
    return loaded(words[2], os.stat(words[2]).st_mtime, bool(trouble.get('hurried')), bool(trouble.get('hasty'))), trouble


def break_down(module: Any, name: str) -> None:
    """The only function or method of that name fails from now on as a bug does, and quotes what nobody else may see."""
    def broken(*_arguments: Any, **_options: Any) -> Any:
        raise KeyError('quoted ' + repr(sys.argv))

    owners = [owner for owner in [module] + list(vars(module).values())
              if (owner is module or isinstance(owner, type)) and callable(vars(owner).get(name))]
    assert len(owners) == 1, '%s: %s' % (name, owners)
    setattr(owners[0], name, broken)


def set_clock(module: Any, seconds: float, since: str) -> None:
    """The program takes it for so much later than it is, once there is that file ("": from the first)."""
    for name in ('utc', 'local'):
        def later(told: Callable[[], Any] = getattr(module.Clock, name)) -> Any:
            return told() + datetime.timedelta(seconds=seconds if not since or os.path.exists(since) else 0)
        setattr(module.Clock, name, staticmethod(later))


def pretend_mounts(module: Any, mounts: Sequence[Dict[str, Any]]) -> None:
    """From now on these directories are mounts beside the root file system: in the list of mounts, in the device of all that
    lies in them, and in their free space."""
    real_stat, real_fstat, real_space = os.stat, os.fstat, os.fstatvfs
    root = real_stat('/').st_dev
    lines = ['20 1 %d:%d / / rw - ext4 /dev/sda1 rw' % (os.major(root), os.minor(root))]
    places = []
    for number, mount in enumerate(mounts, 100):
        shown = mount.get('shown', mount['point'])
        point = ''.join('\\%03o' % ord(char) if char in ' \t\n\\' else char for char in shown)
        device = 100 + mount['same_as'] if 'same_as' in mount else number
        lines.append('%d 20 0:%d / %s rw,relatime - %s %s %s' % (
            number, device, point, mount['kind'], mount.get('source', 'nas:/export%d' % number), mount.get('options', 'rw')))
        places.append((os.path.realpath(mount['point']), os.makedev(0, device), mount))
    read = module.read_text_file
    module.read_text_file = lambda path: '\n'.join(lines) + '\n' if path == '/proc/self/mountinfo' else read(path)

    def mount_of(path: str) -> Any:
        found = [place for place in places if (path + '/').startswith(place[0] + '/')]
        return max(found, key=lambda place: len(place[0]), default=None)

    def moved(status: os.stat_result, path: str) -> os.stat_result:
        place = mount_of(path)
        if place is None:
            return status
        more = {name: getattr(status, name) for name in dir(status) if re.match('st_(?!mode|ino|dev|nlink|[ug]id|size)', name)}
        return os.stat_result(list(status[:2]) + [place[1]] + list(status[3:10]), more)

    def stat(path: Any, *, dir_fd: Optional[int] = None, follow_symlinks: bool = True) -> os.stat_result:
        status = real_stat(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
        if isinstance(path, int):
            return moved(status, os.readlink('/proc/self/fd/%d' % path))
        base = os.readlink('/proc/self/fd/%d' % dir_fd) if dir_fd is not None else os.getcwd()
        return moved(status, os.path.realpath(os.path.join(base, os.fsdecode(path))))

    def space(fd: int) -> Any:
        found, place = real_space(fd), mount_of(os.readlink('/proc/self/fd/%d' % fd))
        if place is None or 'free' not in place[2]:
            return found
        blocks, free = place[2].get('size', place[2]['free']) // 4096, place[2]['free'] // 4096
        return os.statvfs_result([4096, 4096, blocks, free, free] + list(found[5:10]))

    os.stat, os.fstatvfs = stat, space
    os.fstat = lambda fd: moved(real_fstat(fd), os.readlink('/proc/self/fd/%d' % fd))


def main() -> None:
    program, trouble = prepare(sys.argv)
    worker = (sys.executable, os.path.abspath(__file__), sys.argv[1], sys.argv[2])
    program.module.worker_start = lambda: (worker, b'')
    if 'at' in trouble:
        befall(trouble['at'], trouble['do'], trouble.get('once', False), trouble.get('until', ''))
    if 'mounts' in trouble:
        pretend_mounts(program.module, trouble['mounts'])
    if 'clock' in trouble:
        set_clock(program.module, trouble['clock'], trouble.get('since', ''))
    if 'broken' in trouble:
        break_down(program.module, trouble['broken'])
    if 'store' in trouble:
        install(Storage(trouble))
    sys.argv[:] = sys.argv[2:]
    sys.modules['__main__'] = program.module
    exec(program.beginning, program.module.__dict__)


if __name__ == '__main__':
    main()
