"""Programs that tests start: VmBackup.py as cron starts it, and the simulated pool.

Nothing of the test's own environment reaches them but what is given here.
"""

import fnmatch
import functools
import importlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from support import warm

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOT = os.path.dirname(TESTS)
PROGRAM = os.path.join(ROOT, 'VmBackup.py')
SIMPOOL = os.path.join(TESTS, 'simpool')
TROUBLED = os.path.join(TESTS, 'support', 'troubled.py')

CRON_PATH = '/usr/bin:/bin'
PASSWORD = 'password'
TIME_LIMIT_S = 200            # a machine that is busy takes long; pytest's own limit is 600
START_LIMIT_S = 120
STOP_LIMIT_S = 40


class Run(NamedTuple):
    """What a program that has ended left to see."""
    exit_status: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    def says(self, text: str) -> bool:
        return text in self.output

    def never_says(self, text: str) -> bool:
        return text not in self.output


def run(command: Sequence[str], environment: Dict[str, str], time_limit_s: float = TIME_LIMIT_S,
        stdin: Optional[bytes] = None, cwd: str = '/') -> Run:
    """The command has ended by itself; one that has not after `time_limit_s` is killed and is an error of the test.

    Without `stdin` its standard input is empty, as under cron. Bytes that are not UTF-8 come as surrogates."""
    process = subprocess.Popen(list(command), env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE, start_new_session=True)
    return ended(process, time_limit_s, stdin)


def ended(process: Any, time_limit_s: float = TIME_LIMIT_S, stdin: Optional[bytes] = None) -> Run:
    """The process, which leads a session of its own, has ended by itself, as `run` demands it."""
    try:
        stdout, stderr = process.communicate(stdin, timeout=time_limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError('%s was still running after %d s\n--- stdout\n%s--- stderr\n%s' % (
            ' '.join(process.args), time_limit_s, text_of(stdout), text_of(stderr)))
    return Run(process.returncode, text_of(stdout), text_of(stderr))


def text_of(data: bytes) -> str:
    return data.decode('utf-8', 'surrogateescape')


def run_program(*arguments: str, environment: Optional[Dict[str, str]] = None, time_limit_s: float = TIME_LIMIT_S,
                interpreter: str = sys.executable) -> Run:
    """VmBackup.py with these arguments, its environment exactly as given (default: cron's, without a pool).

    The interpreter is that of the tests, which has XenAPI; a Python warning ends the program. It is started warm;
    test_surroundings.py and tests/demo start the file itself."""
    environment = {'PATH': CRON_PATH} if environment is None else environment
    if interpreter != sys.executable:
        return run([interpreter, '-W', 'error', PROGRAM] + list(arguments), environment, time_limit_s)
    return ended(warm.start([PROGRAM] + list(arguments), environment), time_limit_s)


class Pool:
    """A simulated pool that is served by a process of its own. `stop` ends it; `start` goes on where it stopped."""

    def __init__(self, description: Dict[str, Any], faults: Sequence[Dict[str, Any]] = ()) -> None:
        # Not pytest's tmp_path: the path of a unix socket has room for 107 bytes only.
        self.home = tempfile.mkdtemp(prefix='simpool-')
        self.dir = os.path.join(self.home, 'd')
        self.first_dir = os.path.join(self.home, 'first')      # what `dir` was when it had served nothing yet
        self.description = description
        self.process: Any = None
        self.url = ''
        self.sessions: List[Any] = []
        write_json(os.path.join(self.home, 'POOL.json'), description)
        self.set_faults(faults)

    # --- its process ---

    def set_faults(self, faults: Sequence[Dict[str, Any]]) -> None:
        """The faults from the next `start` on."""
        write_json(os.path.join(self.home, 'FAULTS.json'), list(faults))

    def release(self, name: str = 'enough') -> None:
        """What is slow in it until that name goes on at full speed."""
        with open(os.path.join(self.home, name), 'w'):
            pass

    def like(self, other: 'Pool') -> 'Pool':
        """It begins with what the other one, which has ended, had come to; its journal is new."""
        shutil.copytree(os.path.join(other.dir, 'private'), os.path.join(self.dir, 'private'))
        return self

    def start(self, port: int = 0) -> 'Pool':
        """The pool answers, on the port it is told, as one that restarts does."""
        command = [SIMPOOL, 'serve', '--dir', self.dir,
                   '--pool', os.path.join(self.home, 'POOL.json'), '--faults', os.path.join(self.home, 'FAULTS.json')]
        command += ['--port', str(port)] if port else []
        self.log = open(os.path.join(self.home, 'stderr'), 'ab')
        self.process = warm.start(command, {'PATH': CRON_PATH}, stderr=self.log)
        line = first_line(self.process, START_LIMIT_S)
        if not line.startswith('ready '):
            complaint = self.complaints()
            self.stop()
            raise AssertionError('simpool said %r instead of "ready URL"\n%s' % (line, complaint))
        self.url = line.split()[1]
        if not os.path.exists(self.first_dir):
            shutil.copytree(os.path.join(self.dir, 'private'), os.path.join(self.first_dir, 'private'))
        return self

    def stop(self) -> None:
        """The process has ended; what it served stays in `dir`."""
        for session in self.sessions:
            session('close')()
        self.sessions.clear()
        if self.process is None:
            return
        end(self.process)
        self.log.close()
        self.process = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.home, ignore_errors=True)

    def complaints(self) -> str:
        """What it wrote to stderr: nothing, unless simpool itself is wrong."""
        with open(os.path.join(self.home, 'stderr'), encoding='utf-8', errors='replace') as file:
            return file.read()

    # --- ways in ---

    def url_of(self, host: int = 1) -> str:
        """The plain HTTP address of host n of POOL.json, from 1."""
        return 'http://127.0.0.%d:%d' % (host, self.port)

    def tls_address_of(self, host: int = 1) -> str:
        """HOST:PORT of its TLS port."""
        return '127.0.0.%d:%d' % (host, self.port + 1)

    @property
    def port(self) -> int:
        """Of plain HTTP; TLS has the next one."""
        return int(self.url.rstrip('/').rsplit(':', 1)[1])

    def socket_of(self, host: int = 1) -> str:
        return os.path.join(self.dir, 'sockets', 'xapi-%d' % host)

    def environment(self, host: int = 1) -> Dict[str, str]:
        """That of a cron job on host n of the pool."""
        return {'PATH': os.path.join(self.dir, 'bin') + ':' + CRON_PATH,
                'VMBACKUP_POOL': '%s %s' % (self.url_of(host), self.socket_of(host))}

    def session(self, host: int = 1, user: str = 'root', password: str = PASSWORD) -> Any:
        """A XenAPI session, logged in over plain TCP."""
        import XenAPI
        session = self.closed_at_the_end(XenAPI.Session(self.url_of(host)))
        session.login_with_password(user, password, '1.0', 'tests')
        return session

    def closed_at_the_end(self, session: Any) -> Any:
        """The session; its connection, which the module leaves open, is closed when the pool stops."""
        self.sessions.append(session)
        return session

    def xe(self, *arguments: str, **how: Any) -> Run:
        """The stand-in `xe`, on a host of the pool, with an environment of nothing but PATH."""
        return run([os.path.join(self.dir, 'bin', 'xe')] + list(arguments), {'PATH': CRON_PATH}, **how)

    def command(self, *arguments: str) -> bytes:
        """What `simpool dump`, `read` or `write` prints."""
        process = warm.start([SIMPOOL] + list(arguments), {'PATH': CRON_PATH})
        stdout, stderr = process.communicate(timeout=TIME_LIMIT_S)
        assert process.returncode == 0, text_of(stderr)
        return stdout

    # --- what is in it ---

    def dump(self, of: str = '') -> Dict[str, Dict[str, Dict[str, Any]]]:
        """All objects: {"VM": {ref: record}}, as `simpool dump` prints them."""
        return state_of_pools().load(of or self.dir).tables

    def read(self, vdi_uuid: str) -> bytes:
        """The bytes of a VDI, as `simpool read` prints them."""
        pool = state_of_pools().load(self.dir)
        disk = pool.disk(pool.ref_of('VDI', vdi_uuid))
        return b''.join(disk.block(number) for number in range(disk.blocks()))

    def journal(self) -> List[Dict[str, Any]]:
        """Every call, command and request so far, oldest first. A line that is just being written is none yet."""
        path = os.path.join(self.dir, 'journal.jsonl')
        with open(path, encoding='utf-8', newline='\n') as file:
            return [json.loads(line) for line in file if line.endswith('\n')]

    def calls(self, pattern: str) -> List[Dict[str, Any]]:
        """The journal's entries that match `via:call`, with shell wildcards."""
        return [entry for entry in self.journal()
                if fnmatch.fnmatchcase('%s:%s' % (entry.get('via'), entry.get('call')), pattern)]

    def never_saw(self, pattern: str) -> bool:
        return not self.calls(pattern)

    def snapshots(self, of: str = '') -> List[str]:
        """The names of all VM snapshots, and of the disks of snapshots, whether or not their VM is still there."""
        objects = self.dump(of)
        return sorted('%s %s %s' % (kind, record['uuid'], record['name_label'])
                      for kind in ('VM', 'VDI') for record in objects[kind].values() if record['is_a_snapshot'])

    def has_no_snapshots_of_ours(self) -> bool:
        """All snapshots there are were in POOL.json."""
        return set(self.snapshots()) <= set(self.snapshots(self.first_dir))


@functools.lru_cache(maxsize=None)
def state_of_pools() -> Any:
    """The part of the simulated pool that reads what its folder holds. Tests look there so often that a process of its own
    for each look would cost them a twentieth of their time."""
    sys.path.append(SIMPOOL)
    try:
        return importlib.import_module('state')
    finally:
        sys.path.remove(SIMPOOL)


def end(process: Any) -> None:
    """The server has ended, as it is asked to or killed."""
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def first_line(process: subprocess.Popen, time_limit_s: float) -> str:
    """What the process prints first; empty if it ended, or was silent for so long."""
    lines: queue.Queue = queue.Queue()
    threading.Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True).start()
    try:
        return text_of(lines.get(timeout=time_limit_s)).rstrip('\n')
    except queue.Empty:
        return ''


def write_json(path: str, value: Any) -> None:
    """In one step: a process that reads it meanwhile finds the older content or this one."""
    with open(path + '.new', 'w', encoding='utf-8') as file:
        json.dump(value, file, indent=1)
    os.replace(path + '.new', path)
