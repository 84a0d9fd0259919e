"""Rounds in trouble, generated: hosts with several workers, some of which are killed, frozen for a while, or told to stop, at any
moment of the round, or all those of one host at a step of what they do to the storage; now and then the master role moves.
Afterwards a run of one worker is the next night.

What must hold, whatever befell them: no process stays; each VM has its copy or a report that says it has none; none was begun
more than twice nor reported twice as done; and after the next night no snapshot or unfinished copy of ours is left, nor a journal
but for calls that were never answered, and each VM has a good copy.
"""

import collections
import contextlib
import json
import os
import random
import re
import signal
import time
from typing import Any, Dict, Iterator, List, NamedTuple

from support.deeds import Process, backup, children_of, hurried, in_trouble
from support.language import MEBIBYTE, at, disk, vm
from support.process import Pool
from support.shelf import Shelf
from support.wire import eventually

#: What befalls a process: a signal, and for how long it is frozen.
DEEDS = ('SIGKILL', 'SIGKILL', 'SIGTERM', 'SIGSTOP')
LONGEST_S = 4.0             # of a round without trouble
MOST_STEPS = 120            # of a process, in a round without trouble
STAY_LIMIT_S = 90
#: Of the sweep: hosts, workers of each, the host in trouble, and how many steps it has in a round of two VMs.
SWEPT = ((2, 1, 1, 200), (2, 1, 2, 100), (1, 2, 1, 230))
FROZEN_FOR_GOOD_S = 40.0    # longer than a round waits for a sign of life


class Case(NamedTuple):
    """One round: how many hosts and workers, VMs, and what befalls whom and when: seconds after the start, or at the step of that
    number, then without a number of a process."""
    seed: int
    hosts: int
    workers: int
    vms: int
    troubles: List[Any]
    moves_master: bool
    is_at_a_step: bool

    @property
    def name(self) -> str:
        told = ', '.join('%s to %s of host %d %s%s' % (
            deed, 'each process' if self.is_at_a_step else 'process %d' % number, host,
            'before step %d' % when if self.is_at_a_step else 'after %.2f s' % when,
            ' for %.1f s' % frozen_s if deed == 'SIGSTOP' else '') for when, host, number, deed, frozen_s in self.troubles)
        return 'round %d: %d hosts, %d workers each, %d VMs; %s%s' % (
            self.seed, self.hosts, self.workers, self.vms, told, '; the master role moves' if self.moves_master else '')


def case(seed: int) -> Case:
    """The case of that number, always the same."""
    chosen = random.Random(seed)
    hosts, workers = chosen.choice([(1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (3, 1), (3, 2), (8, 1)])
    if chosen.random() < 0.5:
        trouble = (chosen.randint(1, MOST_STEPS), chosen.randint(1, hosts), 0, chosen.choice(DEEDS), chosen.uniform(0.5, 12))
        return Case(seed, hosts, workers, chosen.randint(2, 6), [trouble], False, True)
    troubles = [(chosen.uniform(0.1, LONGEST_S), chosen.randint(1, hosts), chosen.randint(0, workers - 1), chosen.choice(DEEDS),
                 chosen.uniform(0.5, 12)) for _ in range(chosen.randint(1, 3))]
    return Case(seed, hosts, workers, chosen.randint(2, 6), sorted(troubles), chosen.random() < 0.15, False)


def sweep() -> List[Case]:
    """Each step, swept: of a leader, of a host that has joined, of a leader and its worker at once; each killed there, or frozen
    for a second or until the round has given it up."""
    return [Case(step, hosts, workers, 2, [(step, host, 0, deed, frozen_s)], False, True)
            for hosts, workers, host, steps in SWEPT for step in range(1, steps + 1)
            for deed, frozen_s in (('SIGKILL', 0.0), ('SIGSTOP', 1.0 if step % 2 else FROZEN_FOR_GOOD_S))]


def described(case: Case) -> Dict[str, Any]:
    """The pool of that case, as a_pool takes it: some VMs lie on SRs that one host alone sees."""
    hosts = [{'name_label': 'xcp%d' % number, 'master': number == 1} for number in range(1, max(3, case.hosts) + 1)]
    srs = [{'name_label': 'nfs', 'type': 'nfs', 'shared': True, 'size': 1 << 42}]  # type: List[Dict[str, Any]]
    srs += [{'name_label': 'local ' + host['name_label'], 'type': 'ext', 'host': host['name_label'], 'size': 1 << 40}
            for host in hosts]
    faults = [at('http:/export', runs_at=3 * MEBIBYTE)]
    if case.moves_master:
        faults.append({'on': 'api:VM.snapshot', 'nth': 2, 'when': 'after', 'do': {'master': 'xcp2'}})
    vms = [vm('vm%d' % number, disks=[disk(size=4 * MEBIBYTE, used=3, seed=number,
                                           sr='nfs' if number % 3 else 'local xcp%d' % (1 + number % 2))])
           for number in range(case.vms)]
    return {'vms': vms, 'hosts': hosts, 'srs': srs, 'faults': faults}


def workers_of(process: Process) -> List[int]:
    """The processes of that run: itself, and the other workers that it has started."""
    found = [process.pid]
    for pid in sorted(children_of(process.pid)):
        with contextlib.suppress(OSError), open('/proc/%d/cmdline' % pid, 'rb') as file:
            if b'--worker' in file.read():
                found.append(pid)
    return found


def is_alive(pid: int) -> bool:
    """Is it there, and no zombie?"""
    with contextlib.suppress(OSError), open('/proc/%d/stat' % pid) as file:
        return file.read().rpartition(')')[2].split()[0] not in 'ZX'
    return False


def befall(case: Case, processes: List[Process]) -> Iterator[int]:
    """All that befalls the processes, in time; the pids that were met."""
    began_s, frozen = time.monotonic(), []
    if case.is_at_a_step:
        (_, host, _, deed, frozen_s), = case.troubles
        while not processes[host - 1].is_over() and time.monotonic() - began_s < STAY_LIMIT_S:
            yield from workers_of(processes[host - 1])
            time.sleep(frozen_s if deed == 'SIGSTOP' else 0.1)
            for pid in workers_of(processes[host - 1]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        return
    for after_s, host, number, deed, frozen_s in case.troubles:
        time.sleep(max(0.0, began_s + after_s - time.monotonic()))
        there = workers_of(processes[host - 1])
        pid = there[min(number, len(there) - 1)]
        with contextlib.suppress(ProcessLookupError):
            if deed == 'SIGKILL':
                for child in children_of(pid) if pid != processes[host - 1].pid else []:
                    os.kill(child, signal.SIGKILL)
            os.kill(pid, getattr(signal, deed))
            yield pid
        if deed == 'SIGSTOP':
            frozen.append((time.monotonic() + frozen_s, pid))
    for until_s, pid in sorted(frozen):
        time.sleep(max(0.0, until_s - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def is_rightly_left(shelf: Shelf, journal: str) -> bool:
    """Is all that is open in it calls that were never answered? They stay for a day, by design: a snapshot may come."""
    entries = collections.defaultdict(dict)  # type: Dict[int, Dict[str, Any]]
    for line in shelf.text(journal).splitlines():
        with contextlib.suppress(ValueError):                            # torn by the kill
            facts = json.loads(line)
            entries[facts.get('entry', 0)].update(facts)
    still_open = [facts for number, facts in entries.items() if number and not facts.get('closed')]
    return bool(still_open) and not any('uuid' in facts for facts in still_open)


def problems_of(case: Case, pool: Pool, shelf: Shelf) -> List[str]:
    """What does not hold in that case; the pool serves already, the shelf is empty."""
    lines = ('vm-export=*', 'workers=%d' % case.workers, 'hosts=%s' % ('all' if case.hosts > 1 else 'first'), 'lock_wait=60')
    config = shelf.config(*lines)
    programs = [hurried(pool)] * case.hosts
    if case.is_at_a_step:
        (step, host, _, deed, _), = case.troubles
        programs[host - 1] = in_trouble(shelf, hurried=True, store=shelf.path, step=step, do=deed)
    processes = [Process(['-', config], pool.environment(host), program) for host, program in enumerate(programs, 1)]
    problems, pids = [], set()          # type: List[str], set
    try:
        for pid in befall(case, processes):
            pids.add(pid)
        runs = [process.ending(STAY_LIMIT_S) for process in processes if eventually(process.is_over, STAY_LIMIT_S)]
        if len(runs) < len(processes):
            problems.append('a run was still there after %d s' % STAY_LIMIT_S)
    finally:
        for process in processes:
            for pid in workers_of(process):
                pids.add(pid)
            if not process.is_over():
                process.kill()
    if not eventually(lambda: not any(is_alive(pid) for pid in pids), STAY_LIMIT_S):
        problems.append('a worker was still there %d s after the runs' % STAY_LIMIT_S)
    names = ['vm%d' % number for number in range(case.vms)]
    begun = collections.Counter(re.sub(r' \(backup .*', '', call['args'][2]) for call in pool.calls('api:VM.snapshot')
                                if call['result'] == 'ok')
    problems += ['%s was snapshotted %d times' % (name, begun[name]) for name in names if begun[name] > 2]
    done = collections.Counter(line.split('SUCCESS ')[1].split(',')[0] for line in shelf.status_lines() if 'SUCCESS vm' in line)
    problems += ['%s was reported done %d times' % (name, done[name]) for name in names if done[name] > 1]
    problems += ['%s was reported done and has no copy' % name for name in names if done[name] and not shelf.copies(name)]
    if any('Traceback' in run.output for run in runs):
        problems.append('a traceback: ' + next(run.output for run in runs if 'Traceback' in run.output))
    if any(run.exit_status in (0, 3) and ' backed up (' in run.stdout for run in runs):
        problems += ['%s has no copy, and the round was called good' % name for name in names if not shelf.copies(name)]
    again = backup(pool, shelf, 'vm-export=*', 'lock_wait=60', words=['force=yes'], host=2 if case.moves_master else 1)
    if again.exit_status not in (0, 3):
        problems.append('the next night ended with %d: %s' % (again.exit_status, again.output))
    problems += ['%s has no copy after the next night' % name for name in names if not shelf.copies(name)]
    if shelf.unfinished():
        problems.append('unfinished: %s' % shelf.unfinished())
    if not pool.has_no_snapshots_of_ours():
        problems.append('snapshots of ours are left')
    problems += ['%s is left' % name for name in shelf.journals() if not is_rightly_left(shelf, name)]
    if problems:
        problems += ['--- host %d\n%s' % (number, process.output) for number, process in enumerate(processes, 1)]
    return problems
