"""The generated fault suite: every fault of FAULTS.json at every call, command and request of a backup; signals at every
moment of it; storage that fails at every step.

One backup is recorded. Each case then repeats it with one trouble, on a copy of the same pool and store, and after it runs
once more without. The invariants (`holds_…`) are checked after both. tests/soak does all cases, tests/scenario/test_faults.py a
sample. incrementfaults.py does the same where the copies are increments, referencefaults.py where they are read against
snapshots that stay in the pool, recoveryfaults.py with the way back.
"""

import abc
import hashlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import traceback
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from support import contents, layers, references, warm
from support.contents import DATA, ZEROS
from support.language import at, described, disk, vm
from support.process import CRON_PATH, PASSWORD, PROGRAM, TROUBLED, Pool, Run, ended, text_of, write_json
from support.shelf import Store

MEBIBYTE = 1 << 20
COPIES = 2
MANY = 99
RUN_LIMIT_S = 180
HANG_LIMIT_S = 90           # a hurried run that has not ended by then waits for storage that will never answer
STEP_MS = 20

WEB_DISKS = {'0': disk(userdevice='0', seed=11, size=4 * MEBIBYTE, used=[[0, 2]]),
             '1': disk(userdevice='1', seed=12, size=2 * MEBIBYTE + 512, used=[[1, 1]])}
#: What the config leaves out. The server is too old to: it makes a snapshot of it, which has to go before the export.
LEFT_OUT = disk(userdevice='2', name_label='page file [NOBAK]', seed=15, size=MEBIBYTE, used=1)
DB_DISKS = {'0': disk(userdevice='0', seed=13, size=3 * MEBIBYTE, used=[[0, 1], [2, 1]]),
            '1': disk(userdevice='1', seed=14, size=MEBIBYTE, used=1)}
DISKS = {'web': WEB_DISKS, 'db': {'0': DB_DISKS['0']}}
#: A copy: the name of its VM's directory, and its own.
Copy = Tuple[str, str]
#: What guests write to the blocks of their disks: by VM, userdevice and MiB, one after the other.
Writes = Dict[str, Dict[str, Dict[int, str]]]
#: What they write between the earlier copy and the run that is troubled, so that one can't pass for the other.
WRITES = {'web': {'0': {1: DATA}}, 'db': {'0': {2: DATA}}}  # type: Writes
POOL = described(
    [vm('web', list(WEB_DISKS.values()) + [LEFT_OUT], snapshots=[{'name_label': "web's own snapshot"}], power_state='Running',
        vifs=[{'device': '0'}], other_config={'owner': 'someone'}),
     vm('db', list(DB_DISKS.values()), power_state='Running'),
     vm('bystander', 1, snapshots=[{'name_label': 'web (backup 2016-04-14 00:10:00)'}])],
    {'hosts': [{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'}], 'xapi_version': '21.3.0'})

CONFIG = '''\
backup_dir={home}/store
status_log={home}/status.log
max_backups={copies}
pool_db_backup=1
require_mount=no
stall_timeout=15
vm-export=web
vdi-export=db
exclude-disk=[NOBAK]
'''


class Case(NamedTuple):
    """One trouble. `faults` are the pool's, `trouble` is troubled.py's, `signal_at`: (number, milliseconds). `lied`: the VM of
    which a difference leaves out what changed, and is held against the whole."""
    name: str
    faults: Tuple[Dict[str, Any], ...] = ()
    trouble: Optional[Dict[str, Any]] = None
    signal_at: Optional[Tuple[int, int]] = None
    copies: int = COPIES
    free_bytes: int = 0         # if not 0, the store is a file system of its own with so much space left
    lied: str = ''

    @property
    def kind(self) -> str:
        return self.name.split(' ')[0]

    @property
    def kills(self) -> bool:
        """Does the program die without a chance to clean up?"""
        return bool(self.signal_at and self.signal_at[0] == signal.SIGKILL
                    or self.trouble and self.trouble.get('do') == 'SIGKILL')

    @property
    def taken(self) -> Set[Copy]:
        """The copy that somebody else removes."""
        words = (self.trouble or {}).get('what', '').split('/')
        return {(words[0], words[1])} if len(words) == 2 else set()

    @property
    def deeds(self) -> Set[str]:
        return {key for fault in self.faults for key in fault['do']}

    @property
    def reproduction(self) -> str:
        return json.dumps({key: value for key, value in (('faults', self.faults), ('trouble', self.trouble),
                                                         ('signal_at', self.signal_at), ('max_backups', self.copies),
                                                         ('free_bytes', self.free_bytes))
                           if value})


class Result(NamedTuple):
    """What became of a case: how many invariants held, what is wrong, and what the runs printed."""
    case: Case
    held: int
    problems: List[str]
    printed: str


class Stand(NamedTuple):
    """What stands in a store: of each copy that is shown, in which night it was made, and what its manifest tells of its place
    in a chain; the good ones; the digests of the files of all; the dumps. And in the pool: of which copy each VM's reference
    there, whole, is the state."""
    night_of: Dict[Copy, int]
    layer_of: Dict[Copy, Dict[str, Any]]
    good: Set[Copy]
    files: Dict[Copy, Dict[str, str]]
    dumps: Set[Tuple[str, str]]
    references: Dict[str, str] = {}

    def named(self, copy: Copy) -> Set[Copy]:
        """The copies that hold blocks of that one, as its manifest tells."""
        return {(copy[0], holder['copy']) for holder in self.layer_of[copy].get('holders', ())}

    def with_holders(self, copies: Set[Copy]) -> Set[Copy]:
        """These, and all that they and their holders rest on."""
        found = set()  # type: Set[Copy]
        more = copies
        while more:
            found |= more
            more = {holder for copy in more if copy in self.layer_of for holder in self.named(copy)} - found
        return found

    def of(self, name: str, copies: Set[Copy]) -> List[Copy]:
        """Those of these copies that are of that VM, oldest first."""
        return sorted(copy for copy in copies if copy[0] == name)

    def last_beside(self, copies: Set[Copy], full: Copy) -> Set[Copy]:
        """The last of these copies of that VM that is not of the chain which begins with that full."""
        return set(self.of(full[0], {copy for copy in copies if self.layer_of[copy].get('full') != full[1]})[-1:])


class Recording(NamedTuple):
    """One run: what it asked the pool for, the steps of its storage, and how long it took."""
    journal: List[Dict[str, Any]]
    steps: List[str]
    run_ms: int


class Base:
    """A pool and a store in which good copies of each VM stand, one of each night, and the record of one more run."""

    title = ''                  # what the names of its cases begin with
    description = POOL
    disks = DISKS               # of each VM, those that a copy holds
    lines = ()                  # type: Sequence[str]   # of its config, beside CONFIG
    full_every = 0              # how long a chain becomes, if it makes increments
    #: What guests write before each night: those whose copies stand there, the one that is troubled, and that of the clean run.
    nights = ({}, WRITES, {})   # type: Sequence[Writes]

    def __init__(self, home: str = '', program: str = '') -> None:
        """`home`: a directory that is there for it. Without a `program`, VmBackup.py as it is now, whoever edits it meanwhile."""
        self.home = home or tempfile.mkdtemp(prefix='faults-')
        self.program = program or shutil.copy(PROGRAM, self.home)
        self.pool_dir = os.path.join(self.home, 'd')
        try:
            self.record()
        except BaseException:
            self.remove()
            raise

    def record(self) -> None:
        """What a run does is on record, and a pool and a store stand as it found them."""
        first = Place(self, None, MANY)
        night_of = {}  # type: Dict[Copy, int]
        try:
            first.serve()
            self.objects = objects_of(first.pool)
            for night in range(len(self.nights) - 2):
                first.guests_write(night)
                run = first.back_up()
                assert run.exit_status == 0, run.output
                night_of.update((copy, night) for copy in contents.shown_copies(first.store) - set(night_of))
            first.guests_write(len(self.nights) - 2)
            first.pool.stop()
            forget_config(first.store)
            run = first.verify()                # the fulls were read back: chains before theirs may go
            assert run.exit_status == 0, run.output
            shutil.copytree(first.pool.dir, self.pool_dir, ignore=shutil.ignore_patterns('sockets', 'journal.jsonl'))
            shutil.copytree(first.store, os.path.join(self.home, 'store'), symlinks=True)
            self.stand = Stand(night_of, {copy: layer_of(first.store, copy) for copy in night_of}, set(night_of),
                               contents.sealed_files(first.store, night_of), contents.shown_dumps(first.store),
                               self.references(first))
        finally:
            first.remove()
        self.recording = self.recorded()
        self.cases = [case._replace(name=self.title + case.name) for case in self.all_cases()]

    def recorded(self, words: Sequence[str] = (), **how: Any) -> Recording:
        """What a run of these words does. `how`: which steps of the storage are meant, as troubled.py has it."""
        place = Place(self, self, 1)            # that which keeps the least does the most
        try:
            place.serve()
            trace = os.path.join(place.home, 'trace')
            began_at = time.monotonic()
            run = place.do(words, dict(how, store=place.store, trace=trace))
            run_ms = int((time.monotonic() - began_at) * 1000)
            assert run.exit_status == 0, run.output
            steps = contents.content_of(trace).decode('utf-8', 'surrogateescape').splitlines()
            return Recording(place.pool.journal(), steps, run_ms)
        finally:
            place.remove()

    def all_cases(self) -> List[Case]:
        """Every trouble at every place of the recorded run."""
        cases = cases_of(self.recording)
        if can_mount():
            for free_kib in list(range(4, 96, 8)) + list(range(96, 13 * 1024, 512)):
                cases.append(Case('full with %d KiB free' % free_kib, copies=1 + free_kib // 512 % 2,
                                  free_bytes=free_kib * 1024))
        return cases

    def references(self, place: 'Place') -> Dict[str, str]:
        """What stands in the pool of that place, as Stand has it."""
        return {}

    def written_by(self, night: int, name: str) -> Dict[str, Dict[int, str]]:
        """What guests have written to that VM's disks before that night, by userdevice and MiB."""
        found = {}  # type: Dict[str, Dict[int, str]]
        for writes in self.nights[:night + 1]:
            for device, blocks in writes.get(name, {}).items():
                for block, word in blocks.items():
                    disk = found.setdefault(device, {})
                    disk[block] = disk.get(block, '') + word
        return found

    def judge(self, case: Case) -> Result:
        """The run with its trouble, then a clean one; the invariants after each."""
        place = Place(self, self, case.copies, case.faults, case.free_bytes)
        try:
            place.serve()
            run = place.back_up(case.trouble, case.signal_at)
            after = self.aftermath(case, place, run, self.stand, False)
            held, problems = after.judge()
            if case.free_bytes:
                place.resize(64 * MEBIBYTE)
            place.serve_without_faults()
            place.guests_write(len(self.nights) - 1)
            clean = place.back_up()
            later = self.aftermath(case, place, clean, after.stand, True)
            more_held, more_problems = later.judge()
            return result_of(case, held + more_held, problems, more_problems, run, clean)
        finally:
            place.remove()

    def aftermath(self, *facts: Any) -> 'Aftermath':
        """What is there after a run, as it is judged."""
        return Aftermath(self, *facts)

    def remove(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)


class Place:
    """A pool and a store of one case, copied from the base."""

    def __init__(self, base: Base, source: Optional[Base], copies: int, faults: Sequence[Dict[str, Any]] = (),
                 free_bytes: int = 0) -> None:
        self.base = base
        self.pool = Pool(base.description, faults)
        self.home = self.pool.home
        self.seen = 0
        self.store = os.path.join(self.home, 'store')
        self.config = os.path.join(self.home, 'weekend.cfg')
        self.password_file = os.path.join(self.home, 'pw')
        self.is_mounted = bool(free_bytes)
        os.mkdir(self.store)
        if free_bytes:
            mount('-t', 'tmpfs', '-o', 'size=64m', 'store', self.store)
        if source is not None:
            shutil.copytree(source.pool_dir, self.pool.dir, symlinks=True)
            copy_into(os.path.join(source.home, 'store'), self.store)
            references.is_now_that_of(Store(self.store), self.config)
        if free_bytes:
            status = os.statvfs(self.store)
            self.resize((status.f_blocks - status.f_bfree) * status.f_frsize + free_bytes)
        with open(self.config, 'w') as file:
            file.write(CONFIG.format(home=self.home, copies=copies) + ''.join(line + '\n' for line in base.lines))
        with open(self.password_file, 'w') as file:
            file.write('cGFzc3dvcmQ=\n')

    def serve(self) -> None:
        self.pool.start()

    def serve_without_faults(self) -> None:
        self.pool.stop()
        self.pool.set_faults([])
        self.serve()

    def guests_write(self, night: int) -> None:
        """Guests write what they do before that night."""
        for name, devices in self.base.nights[night].items():
            for device, blocks in devices.items():
                for block, word in blocks.items():
                    self.pool.command('write', '--dir', self.pool.dir, '--vm', name, '--device', layers.device_of(device),
                                      '--block', str(block), *['--zero'] * (word == ZEROS))

    def command(self, *action: str) -> List[str]:
        return [self.base.program, self.password_file, self.config] + list(action)

    def back_up(self, trouble: Optional[Dict[str, Any]] = None, signal_at: Optional[Tuple[int, int]] = None) -> Run:
        """A backup has ended."""
        return self.do((), trouble, signal_at)

    def do(self, words: Sequence[str], trouble: Optional[Dict[str, Any]] = None,
           signal_at: Optional[Tuple[int, int]] = None) -> Run:
        """The action of these words has ended, also by a signal so many milliseconds after its start."""
        command = self.command(*words)
        if trouble is not None:
            write_json(os.path.join(self.home, 'TROUBLE.json'), dict(trouble, store=self.store)
                       if 'step' in trouble else trouble)
            command[:0] = [TROUBLED, os.path.join(self.home, 'TROUBLE.json')]
        process = warm.start(command, self.pool.environment())
        if signal_at is not None:
            try:
                process.wait(signal_at[1] / 1000)
            except subprocess.TimeoutExpired:
                process.send_signal(signal_at[0])
        limit_s = HANG_LIMIT_S if trouble and trouble.get('do') == 'hang' else RUN_LIMIT_S
        try:
            stdout, stderr = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, stderr = process.communicate()
            stderr += b'\nSTILL RUNNING after %d s, killed\n' % limit_s
        return Run(process.returncode, text_of(stdout), text_of(stderr))

    def verify(self) -> Run:
        return ended(warm.start(self.command('verify'), {'PATH': CRON_PATH}), RUN_LIMIT_S)

    def new_journal(self) -> List[Dict[str, Any]]:
        """What the pool was asked since this was called last."""
        journal = self.pool.journal()
        new, self.seen = journal[self.seen:], len(journal)
        return new

    def resize(self, size: int) -> None:
        """The store's own file system has that size now."""
        mount('-o', 'remount,size=%d' % size, self.store)

    def remove(self) -> None:
        if self.is_mounted:
            subprocess.run(['umount', '-l', self.store], check=True, timeout=RUN_LIMIT_S)
        self.pool.remove()


def forget_config(store: str) -> None:
    """The copies of that store tell no more by which config they were made, as those of earlier versions: else the rules of the
    config that made them would count beside those of each case, which has a config of its own."""
    changed = {}                                # increments name the digests of the manifests of those that they rest on
    for name, copy in sorted(contents.shown_copies(store)):
        path, sums = (os.path.join(store, name, copy, file) for file in ('backup.json', 'SHA256SUMS'))
        before = contents.content_of(path)
        manifest = json.loads(before.decode('ascii'))
        del manifest['config']
        for holder in manifest.get('layer', {}).get('holders', ()):
            holder['manifest'] = changed[holder['manifest']]
        after = json.dumps(manifest).encode('ascii')
        with open(path, 'wb') as file:
            file.write(after)
        digest = hashlib.sha256(before).hexdigest()
        changed[digest] = hashlib.sha256(after).hexdigest()
        with open(sums) as file:
            text = file.read()
        assert digest in text
        with open(sums, 'w') as file:
            file.write(text.replace(digest, changed[digest]))


def layer_of(store: str, copy: Copy) -> Dict[str, Any]:
    """What the manifest of that copy tells of its place in a chain; nothing where it can't be read or tells of none."""
    try:
        return Store(store).manifest(*copy).get('layer', {})
    except (OSError, ValueError):
        return {}


def copy_into(source: str, target: str) -> None:
    """What is in the one directory is in the other, which is there already."""
    for name in os.listdir(source):
        shutil.copytree(os.path.join(source, name), os.path.join(target, name), symlinks=True)


def mount(*arguments: str) -> None:
    subprocess.run(['mount'] + list(arguments), check=True, timeout=RUN_LIMIT_S, stderr=subprocess.DEVNULL)


def can_mount() -> bool:
    """May we give a store a file system of its own? Root only, and not in every container."""
    folder = tempfile.mkdtemp(prefix='faults-')
    try:
        mount('-t', 'tmpfs', '-o', 'size=1m', 'store', folder)
        subprocess.run(['umount', folder], check=True, timeout=RUN_LIMIT_S)
        return True
    except (OSError, subprocess.SubprocessError):
        return False
    finally:
        os.rmdir(folder)


# --- the cases --------------------------------------------------------------------------------------------------------

MASTER_MOVES = {'master': 'xcp2'}
FAILURES = (('INTERNAL_ERROR', 'Unix.Unix_error(Unix.EIO, "read", "")'), ('HANDLE_INVALID', 'VM', 'OpaqueRef:gone'),
            ('OTHER_OPERATION_IN_PROGRESS', 'VM', 'OpaqueRef:busy'), ('SR_BACKEND_FAILURE_44', '', 'no space', ''),
            ('SR_BACKEND_FAILURE_46', '', 'The VDI is not available', ''), ('VDI_IN_USE', 'OpaqueRef:used', 'destroy'),
            ('HOST_STILL_BOOTING',), ('SESSION_INVALID', 'OpaqueRef:old'), ('TASK_CANCELLED', 'OpaqueRef:task'))
STREAM_PLACES = (0, 100, 512, 1000, 40000, MEBIBYTE + 600, 2 * MEBIBYTE + 100000, 3 * MEBIBYTE - 1)
TROUBLE_WORDS = ('ENOSPC', 'EIO', 'SIGKILL', 'SIGTERM', 'short', 'ESTALE', 'EDQUOT')


def occasions(journal: Sequence[Dict[str, Any]]) -> List[Tuple[str, int, int]]:
    """(`via:call`, which one of them, bytes) of everything that the run did, in order."""
    seen = {}  # type: Dict[str, int]
    found = []
    for entry in journal:
        on = '%s:%s' % (entry['via'], entry['call'])
        seen[on] = seen.get(on, 0) + 1
        found.append((on, seen[on], entry['bytes']))
    return found


def cases_of(recording: Recording) -> List[Case]:
    """Every trouble at every call and every step of the storage, and the signals at every moment."""
    cases, steps = [], recording.steps
    for on, nth, size in occasions(recording.journal):
        for when, do in deeds(on, size):
            fault = at(on, nth=nth, when=when, **do)
            word = ' '.join('%s=%s' % (key, value[0] if isinstance(value, tuple) else value)
                            for key, value in sorted(do.items()))
            name = '%s-%s %s #%d %s %s' % (on.split(':')[0], sorted(do)[-1] if 'stderr' not in do else 'exit', on, nth,
                                           when or 'before', word)
            trouble = {'hurried': True} if set(do) & {'hang', 'rate', 'master'} else None
            cases.append(Case(name, (fault,), trouble, None, 1 + (nth + size) % 2))
    for number in (signal.SIGKILL, signal.SIGTERM):
        for wait_ms in range(0, recording.run_ms * 3 // 2, STEP_MS):
            name = signal.Signals(number).name
            cases.append(Case('%s after %d ms' % (name, wait_ms), signal_at=(number, wait_ms),
                              copies=1 + wait_ms // STEP_MS % 2))
    for step, line in enumerate(steps, 1):
        line = step_shown(line)
        copies = 1 if '.deleting' in line else 1 + step % 2
        for word in TROUBLE_WORDS:
            if word == 'short' and not line.startswith('write'):
                continue
            for stays in (False, True) if word in ('ENOSPC', 'EIO') else (False,):
                cases.append(Case('storage-%s at step %d of %d (%s)%s' % (
                    word, step, len(steps), line, ' and from then on' if stays else ''),
                    trouble={'step': step, 'do': word, 'stays': stays}, copies=copies))
        if line.startswith(('write', 'fsync')):
            cases.append(Case('storage-hang at step %d of %d (%s)' % (step, len(steps), line),
                              trouble={'step': step, 'do': 'hang', 'hurried': True}, copies=copies))
    return cases


def step_shown(line: str) -> str:
    """A step of the storage as cases are named by it: without what is another in each run."""
    return re.sub(r'\d{4}-\d\d-\d\d-\d{6}|\d{8}-\d{6}|\d{8}T\S+(?=\.run)|(?<=-)[0-9a-f]{16}|(?<=\.json\.)\d+', '*', line)


def deeds(on: str, size: int) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """(when, deed) of all that can go wrong at such an occasion."""
    via = on.split(':')[0]
    for failure in FAILURES if via == 'api' else FAILURES[:3]:
        yield '', {'fail': failure}
    yield 'after', {'fail': FAILURES[0]}
    for when in ('', 'after'):
        yield when, {'drop': True}
        yield when, {'sleep': 1}
        yield when, {'logout': True}
        yield when, MASTER_MOVES
        yield when, {'hang': True}
    yield '', {'lose': 2}
    yield 'after', {'lose': 1}
    if via == 'xe':
        yield '', {'kill': 'xe'}
        yield '', {'exit': 1}
        yield '', {'exit': 1, 'stderr': 'Error: Connection lost'}
        yield '', {'exit': 0, 'stderr': 'The operation failed: lost connection'}
        yield '', {'exit': 0, 'stderr': 'a harmless remark'}
    if via == 'http':
        for place in STREAM_PLACES + (size - 1, size - 600, size - 1025):
            if 0 <= place < size:
                yield '', {'truncate': place}
                yield '', {'truncate': place, 'silent': True}
                if not on.endswith(('dbdump', 'raw_vdi')):
                    yield '', {'flip': place}
        yield '', {'rate': max(1000, size // 2)}
        if on == 'http:/export':
            yield '', {'keepalive': True}


def spread(cases: Sequence[Case], count: int) -> List[Case]:
    """So many of them, as far apart as can be, and from both ends."""
    count = min(count, len(cases))
    return [cases[(2 * index + 1) * len(cases) // (2 * count)] for index in range(count)]


# --- one case ---------------------------------------------------------------------------------------------------------

def run_case(base: Base, case: Case) -> Result:
    """What became of it. A suite that breaks is a problem too."""
    try:
        return base.judge(case)
    except Exception:
        return Result(case, 0, ['the suite broke: ' + traceback.format_exc()], '')


def result_of(case: Case, held: int, problems: Sequence[str], later_problems: Sequence[str], run: Run, clean: Run) -> Result:
    """What is to be told of a case."""
    return Result(case, held, ['after the run: ' + text for text in problems]
                  + ['after the clean run: ' + text for text in later_problems],
                  '--- the run (exit status %d)\n%s--- the clean run (exit status %d)\n%s' % (
                      run.exit_status, run.output, clean.exit_status, clean.output))


def objects_of(pool: Pool) -> Dict[str, Any]:
    """What of the pool a backup must leave as it was: uuid -> what people see of it."""
    tables = pool.dump()
    found = {}
    for name, fields in (('VM', ('name_label', 'name_description', 'is_a_snapshot', 'is_a_template', 'other_config',
                                 'power_state', 'tags')),
                         ('VDI', ('name_label', 'is_a_snapshot', 'other_config', 'virtual_size')),
                         ('VBD', ('userdevice', 'type')), ('VIF', ('device', 'MAC'))):
        for record in tables[name].values():
            found[name + ' ' + record['uuid']] = {field: record[field] for field in fields}
    for record in tables.get('message', {}).values():
        found['message ' + record['uuid']] = {'name': record['name'], 'body': record['body']}
    return found


LAST_LINE = re.compile(r'\S+ - (?P<word>SUCCESS|WARNING|ERROR): (?P<number>\d+) VMs? backed up \((?P<size>[^)]*)\)'
                       r'(?:; (?P<missing>\d+) not: (?P<names>[^;]*))?(?P<dump>; the pool database was not dumped)?'
                       r'(?:; (?P<warnings>\d+) warnings?)?(?P<rest>.*); exit status (?P<status>\d+)\.')


class Judge(abc.ABC):
    """What is there after a run of whatever action. Each method whose name begins with `holds_` gives the sentences of what
    is wrong; its docstring is the invariant."""

    def __init__(self, base: Base, case: Case, place: Place, run: Run, is_clean: bool) -> None:
        self.base = base
        self.case = case
        self.place = place
        self.run = run
        self.is_clean = is_clean
        #: On storage that hangs a run may wait for ever, but not with a snapshot in the pool.
        self.hung = bool(case.trouble and case.trouble.get('do') == 'hang' and not is_clean)
        self.was_killed = not is_clean and (case.kills or self.hung and run.exit_status == -signal.SIGKILL)
        self.journal = place.new_journal()

    def judge(self) -> Tuple[int, List[str]]:
        held, problems = 0, []
        for invariant in sorted(name for name in dir(self) if name.startswith('holds_')):
            found = getattr(self, invariant)()
            held += not found
            problems += ['%s: %s' % (invariant[len('holds_'):], sentence) for sentence in found]
        return held, problems

    def open_journals(self) -> List[str]:
        folder = os.path.join(self.place.store, '.vmbackup', 'runs')
        names = os.listdir(folder) if os.path.isdir(folder) else []
        return [name for name in names if name.endswith(('.run', '.run.taken'))]

    def session_was_taken(self) -> bool:
        """Did the trouble end the session, or hit the login or logout itself?"""
        return bool(self.case.deeds & {'logout', 'master', 'lose'}
                    or any('session.log' in fault['on'] or fault['do'].get('fail', [''])[0] == 'SESSION_INVALID'
                           for fault in self.case.faults))

    def may_doubt(self) -> bool:
        """Did storage say of something that it failed, or not say that it was done? A copy that was named, but whose name may not
        be on disk, need not be called good."""
        return not self.is_clean and bool(self.case.trouble and re.match('E|hang', str(self.case.trouble.get('do'))))

    def holds_no_journal_is_left_open(self) -> List[str]:
        """After the clean run no journal is left, but that of a snapshot call whose answer was lost."""
        lost_answer = self.was_lost() or self.case.kills or self.case.signal_at is not None or self.case.trouble is not None
        return ['the journals %s are left' % self.open_journals()] \
            if self.is_clean and self.open_journals() and not lost_answer else []

    def holds_sessions_are_closed(self) -> List[str]:
        """Every login of the program had its logout, unless it was killed or the trouble took the session."""
        if self.was_killed or not self.is_clean and self.session_was_taken():
            return []
        calls = [entry for entry in self.journal if entry['result'] == 'ok']
        logins = [entry for entry in calls if entry['call'] == 'session.login_with_password'
                  and entry['args'][-1] == 'VmBackup']
        logouts = [entry for entry in calls if entry['call'] == 'session.logout']
        return ['%d logins, %d logouts' % (len(logins), len(logouts))] if len(logins) != len(logouts) else []

    def holds_no_traceback(self) -> List[str]:
        """Trouble is never a bug of the program, nor one of the simulated pool."""
        problems = ['the program has a bug: %s' % self.run.output] if 'Traceback' in self.run.output else []
        complaints = self.place.pool.complaints()
        return problems + (['the simulated pool has a bug: %s' % complaints] if complaints else [])

    def holds_the_password_is_nowhere(self) -> List[str]:
        """Neither printed nor written."""
        problems = ['it is printed'] if PASSWORD in self.run.output else []
        for folder, _, files in os.walk(self.place.store):
            for name in files:
                if not name.endswith(('.dump', '.xva', '.raw', '.partial')) and name != 'vm-metadata.xml':
                    if PASSWORD.encode() in contents.content_of(os.path.join(folder, name)):
                        problems.append('it is in %s/%s' % (folder, name))
        return problems

    def holds_no_process_is_left(self) -> List[str]:
        """Everything that it started has ended."""
        give_up_at = time.monotonic() + (60 if self.was_killed else 20)
        while True:
            left = processes_with(self.place.pool.socket_of())
            if not left or time.monotonic() > give_up_at:
                return left
            time.sleep(0.1)

    @abc.abstractmethod
    def was_lost(self) -> bool:
        """May an answer have been lost that would have told what was made?"""


class Aftermath(Judge):
    """What is there after a backup, held against what was there before it."""

    def __init__(self, base: Base, case: Case, place: Place, run: Run, before: Stand, is_clean: bool) -> None:
        super().__init__(base, case, place, run, is_clean)
        self.before = before
        self.night = len(base.nights) - (1 if is_clean else 2)
        self.night_of = {copy: before.night_of.get(copy, self.night) for copy in contents.shown_copies(place.store)}
        self.copies = set(self.night_of)
        self.read = {name: layers.Disks(Store(place.store), name) for name, _ in self.copies}
        self.dumps = contents.shown_dumps(place.store)
        self.damaged = {copy: problem for copy in self.copies for problem in [self.problem_of(*copy)] if problem}
        self.good_copies = self.copies - set(self.damaged)
        self.stand = Stand(self.night_of, {copy: layer_of(place.store, copy) for copy in self.copies}, self.good_copies,
                           contents.sealed_files(place.store, self.copies), self.dumps)
        #: The VM whose audit has to fail in this run, and the copies that nobody trusts since then: they are not good any more.
        self.lie, self.suspect = self.lied()
        #: What a copy rests on that somebody else has removed is no one's fault here; a new one may not rest on it.
        self.ruined = {copy for copy in before.night_of if case.taken & ({copy} | before.named(copy))} | self.suspect
        self.good_before = before.good - self.ruined
        self.new = {name for name, _ in self.good_copies - before.good}
        self.has_new_dump = bool(self.dumps - before.dumps)
        self.last_line = LAST_LINE.fullmatch(run.stdout.rstrip('\n').rpartition('\n')[2])

    def lied(self) -> Tuple[str, Set[Copy]]:
        return '', set()

    def kept(self) -> Set[str]:
        """The objects in the pool that are ours and may stay there."""
        return set()

    def problem_of(self, name: str, copy: str) -> str:
        if name not in self.base.disks:
            return 'nobody asked for a copy of it'
        store, disks = self.place.store, self.base.disks[name]
        writes = self.base.written_by(self.night_of[name, copy], name)
        problem = contents.copy_problem(os.path.join(store, name, copy), disks, writes)
        if problem or not layer_of(store, (name, copy)):
            return problem
        try:
            return layers.copy_problem(Store(store), name, copy, {
                layers.device_of(number): b''.join(contents.blocks_of(disk, writes.get(number, {})))
                for number, disk in disks.items()}, self.read[name])
        except (OSError, ValueError, KeyError, EOFError, struct.error) as error:
            return '%s: %s' % (type(error).__name__, error)

    # --- the store ---

    def holds_no_good_copy_is_lost(self) -> List[str]:
        """A good copy that is gone has as many newer good ones as are to be kept."""
        problems = []
        for kind, before, now in (('copy', self.good_before, self.good_copies), ('dump', self.before.dumps, self.dumps)):
            for name, one in sorted(before - now):
                newer = [other for folder, other in now if folder == name and other > one]
                if len(newer) < self.case.copies:
                    problems.append('the %s %s/%s is gone, and only %d newer ones are there' % (kind, name, one, len(newer)))
        return problems

    def holds_what_looks_good_is_good(self) -> List[str]:
        """Every copy and dump that shows as complete holds what the disks held."""
        problems = ['%s/%s: %s' % (name, copy, problem) for (name, copy), problem in sorted(self.damaged.items())
                    if (name, copy) not in self.ruined]
        for name, dump in sorted(self.dumps):
            problem = contents.dump_problem(os.path.join(self.place.store, name, dump))
            problems += ['%s/%s %s' % (name, dump, problem)] if problem else []
        return problems

    def holds_verify_says_the_same(self) -> List[str]:
        """`verify` finds every copy good, but those SUSPECT that an audit found fault with, and as many as there are."""
        verdict = self.place.verify()
        found = {word: {tuple(line.split()[1].rstrip(':').split('/')) for line in verdict.stdout.splitlines()
                        if line.startswith(word + ' ')} for word in ('good', 'SUSPECT')}
        ruined = self.copies & self.ruined
        if verdict.exit_status != bool(ruined) or found != {'good': self.copies - ruined,
                                                           'SUSPECT': (self.copies & self.suspect) - set(self.damaged)}:
            return ['verify found %d of %d copies good, exit status %d: %s' % (
                len(found['good']), len(self.copies), verdict.exit_status, verdict.output)]
        return []

    def holds_sealed_files_never_change(self) -> List[str]:
        """The files of a copy are what they were, and none has come or gone."""
        return ['%s/%s: %s' % (name, copy, sorted(set(now) ^ set(was) or {file for file in was if now.get(file) != was[file]}))
                for (name, copy), was in sorted(self.before.files.items())
                for now in [self.stand.files.get((name, copy), was)] if now != was]

    def holds_holders_stay(self) -> List[str]:
        """No copy is gone that holds blocks of one that is there."""
        return ['%s/%s is gone, which holds blocks of %s' % (holder + (copy[1],))
                for copy in sorted(self.copies - self.ruined) for holder in sorted(self.stand.named(copy) - self.copies)]

    def holds_the_chain_before_stays(self) -> List[str]:
        """Where a chain begins with a full that nobody has read back yet, the last good copy of the one before is there."""
        return ['%s/%s is gone, the last of its chain, and the next is not proven yet' % copy
                for full in self.unproven_fulls() for copy in self.before.last_beside(self.good_before, full) - self.good_copies]

    def unproven_fulls(self) -> Set[Copy]:
        """The fulls with which the present chains begin and that have not been read back: those that this run has made, as all
        that stood there before it was verified."""
        newest = [self.stand.of(name, self.good_copies)[-1:] for name in sorted(self.base.disks)]
        fulls = {(one[0][0], self.stand.layer_of[one[0]].get('full', '')) for one in newest if one}
        return {(name, full) for name, full in fulls if full} - set(self.before.night_of)

    def holds_an_increment_is_made_where_it_can_be(self) -> List[str]:
        """The new copy is what comes next in the chain of the newest good one, unless that is gone or could not be read."""
        problems = []
        for name in sorted(self.new if self.base.full_every and not self.case.taken and not self.may_doubt() else ()):
            base, made = self.stand.of(name, self.before.good)[-1:], self.stand.of(name, self.good_copies - self.before.good)
            depth = self.before.layer_of[base[0]]['depth'] if base else 0
            wanted = depth + 1 if 0 < depth < self.base.full_every else 1
            if len(made) == 1 and self.stand.layer_of[made[0]]['depth'] != wanted:
                problems.append('%s/%s is copy %d of its chain instead of %d' % (
                    made[0] + (self.stand.layer_of[made[0]]['depth'], wanted)))
        return problems

    def holds_retention(self) -> List[str]:
        """After a run that did everything, no more copies are kept than asked for and what these rest on."""
        if self.run.exit_status not in (0, 3) or self.may_doubt():
            return []                           # nothing is pruned on storage that misbehaves
        problems = []
        for name in sorted(self.base.disks):
            kept = set(self.stand.of(name, self.good_copies)[-self.case.copies:])
            kept.update(*(self.stand.last_beside(self.good_copies, full) for full in self.unproven_fulls()))
            idle = self.stand.of(name, self.good_copies - self.stand.with_holders(kept | self.ruined))
            problems += ['%s/%s is there, %d are to be kept, and it holds none of their blocks' % (one + (self.case.copies,))
                         for one in idle]
        return problems + (['%d dumps are there' % len(self.dumps)] if len(self.dumps) > self.case.copies else [])

    def holds_nothing_unfinished(self) -> List[str]:
        """After a clean run nothing unfinished is left; after any other only if it was killed or its storage failed."""
        left = contents.unfinished(self.place.store)
        may_be_left = not self.is_clean and (self.was_killed or self.case.trouble is not None or self.case.free_bytes)
        return [] if may_be_left else ['%s is left' % name for name in left]

    # --- the pool ---

    def holds_the_pool_is_as_it_was(self) -> List[str]:
        """What is not ours is untouched. What is ours is gone, but for references that ledgers name, or (not after the clean run,
        nor after a signal that can be caught, nor where it is the storage that hangs) stands in an open journal."""
        problems = []
        now = objects_of(self.place.pool)
        for key in sorted(set(self.base.objects) - set(now)):
            problems.append('%s is gone: %s' % (key, self.base.objects[key]))
        for key in sorted(set(self.base.objects) & set(now)):
            if self.base.objects[key] != now[key] and not self.is_our_key_only(key, now[key]):
                problems.append('%s was changed: %s, before %s' % (key, now[key], self.base.objects[key]))
        left = [key for key in sorted(set(now) - set(self.base.objects) - self.kept())]
        left += [key for key in sorted(now) if 'vmbackup' in json.dumps(now[key])]
        had_no_chance = not self.hung and not (self.case.signal_at and not self.was_killed)
        is_known = not self.is_clean and had_no_chance and self.open_journals()
        # A pool that forgets a removal can hold a record whose disk is gone: no one can destroy it, every run reports it.
        is_known = is_known or 'lose' in self.case.deeds and self.run.exit_status == 3 and self.open_journals()
        is_known = is_known or self.is_said_to_be_gone()
        return problems + ([] if is_known else ['%s is left: %s' % (key, now[key]) for key in left])

    def is_said_to_be_gone(self) -> bool:
        """A pool that says of an object that it is gone is believed."""
        return any(fault['do'].get('fail', [''])[0] == 'HANDLE_INVALID' for fault in self.case.faults)

    def is_our_key_only(self, key: str, record: Dict[str, Any]) -> bool:
        """Is a key of ours, which is judged below, the only difference?"""
        config = {name: value for name, value in record.get('other_config', {}).items()
                  if not name.startswith('vmbackup:')}
        return dict(record, other_config=config) == self.base.objects[key]

    def was_lost(self) -> bool:
        return any('.snapshot' in fault['on'] and set(fault['do']) & {'drop', 'hang', 'fail', 'master'}
                   or 'lose' in fault['do'] for fault in self.case.faults)

    # --- what it said ---

    def holds_the_exit_status_is_true(self) -> List[str]:
        """0 and 3 mean that everything is there; 1 that something is missing, or that an audit failed; the clean run ends with 0
        (after `lose` with 3, if something can't be removed)."""
        status, is_all = self.run.exit_status, self.new == set(self.base.disks) and self.has_new_dump
        problems = []
        if status in (0, 3) and not is_all:
            problems.append('exit status %d, but new copies are there only of %s%s' % (
                status, sorted(self.new) or 'nothing', '' if self.has_new_dump else ', and no new dump'))
        allowed = [0, 3] if 'lose' in self.case.deeds or self.case.taken or self.suspect else [0]
        if not self.is_clean:
            allowed += [1, 3, 4]
        if self.lie:
            allowed = [1]
        if not self.is_clean and self.case.signal_at:
            allowed += [128 + self.case.signal_at[0], -self.case.signal_at[0]]
        if not self.is_clean and self.case.trouble and str(self.case.trouble.get('do')).startswith('SIG'):
            number = getattr(signal, self.case.trouble['do'])
            allowed += [128 + number, -number]
        if not self.is_clean and (self.case.free_bytes or self.case.trouble and 'step' in self.case.trouble):
            allowed += [2] + [-signal.SIGKILL] * self.was_killed
        if status not in allowed:
            problems.append('exit status %d' % status)
        if status == 1 and is_all and not self.may_doubt() and not self.lie:
            problems.append('exit status 1, but everything is there')
        return problems

    def holds_the_last_line_is_true(self) -> List[str]:
        """The last line has the exit status, and names exactly the VMs that have no new copy."""
        status = self.run.exit_status
        if status in (2, 4) or status < 0:
            return [] if status < 0 or self.run.stderr.strip() else ['nothing was said']
        if self.last_line is None:
            if not self.is_clean and not self.new and ' - error: ' in self.run.stderr:
                return []                       # it ended before it began, and said why
            if status > 128 and (status == 128 + signal.SIGTERM):
                return []
            return ['the last line is %r' % self.run.stdout.rstrip('\n').rpartition('\n')[2]]
        facts = self.last_line.groupdict()
        names = set((facts['names'] or '').replace('"', '').split(', ')) - {''}
        if self.may_doubt() and names >= set(self.base.disks) - self.new and int(facts['number']) <= len(self.new):
            return []
        problems = []
        if int(facts['status']) != status:
            problems.append('the last line says %s, the exit status is %d' % (facts['status'], status))
        if names != set(self.base.disks) - self.new:
            problems.append('the last line names %s, but %s have no new copy' % (
                sorted(names) or 'nothing', sorted(set(self.base.disks) - self.new) or 'none'))
        if int(facts['number']) != len(self.new):
            problems.append('the last line tells of %s VMs, %d have a new copy' % (facts['number'], len(self.new)))
        if status < 128 and bool(facts['dump']) == self.has_new_dump:
            problems.append('the last line tells wrongly of the pool database')
        return ['%s (%s)' % (problem, self.last_line.group()) for problem in problems]

    def holds_the_status_log_agrees(self) -> List[str]:
        """The status log ends with the same counts, and says SUCCESS of exactly the VMs that have a new copy."""
        if self.last_line is None or self.run.exit_status < 0:
            return []
        with open(os.path.join(self.place.home, 'status.log'), encoding='utf-8') as file:
            lines = file.read().split('begin\n')[-1].splitlines()
        successes = {match.group(1) for match in (re.search(r',end,SUCCESS (\w+),', line) for line in lines) if match}
        if self.may_doubt() and successes <= self.new:
            return []
        if successes != self.new:
            return ['it says SUCCESS of %s' % sorted(successes)]
        return [] if ',end,%s,S:%d ' % (self.last_line.group('word'), len(self.new)) in lines[-1] else [lines[-1]]

def processes_with(word: str) -> List[str]:
    """The command lines of all processes that have the word in their environment."""
    found = []
    for name in os.listdir('/proc'):
        if not name.isdigit():
            continue
        try:
            if os.fsencode(word) in contents.content_of('/proc/%s/environ' % name):
                found.append(contents.content_of('/proc/%s/cmdline' % name).replace(b'\0', b' ').decode('utf-8', 'replace'))
        except OSError:
            continue
    return found
