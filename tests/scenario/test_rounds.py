"""A round: several workers on one host, several hosts, and what becomes of it when one of them is lost.

Processes stand for hosts: each is started with the environment of another host of one simulated pool.
"""

import contextlib
import fcntl
import glob
import json
import os
import re
import signal
import time
from typing import Any, Dict, Iterator, List, Sequence

import pytest

from support import roundfaults
from support.deeds import Process, backup, children_of, hurried, in_trouble, without_pool
from support.language import MEBIBYTE, at, disk, slowly, vm
from support.process import TIME_LIMIT_S, Pool, Run
from support.shelf import Shelf
from support.wire import eventually

HOSTS = [{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'}, {'name_label': 'xcp3'}]
SRS = [{'name_label': 'nfs', 'type': 'nfs', 'shared': True, 'size': 1 << 42}] + [
    {'name_label': 'local %s' % host['name_label'], 'type': 'ext', 'host': host['name_label'], 'size': 1 << 40} for host in HOSTS]
SLOWLY = {'runs_at': 2 * MEBIBYTE}
ALL = ('vm-export=*', 'hosts=all')


def machines(number: int, mebibytes: int = 2, **keys: Any) -> List[Dict[str, Any]]:
    return [vm('vm%d' % index, disks=[disk(size=mebibytes * MEBIBYTE, used=mebibytes, seed=index, **keys)])
            for index in range(number)]


@contextlib.contextmanager
def started(pool: Pool, shelf: Shelf, *lines: str, hosts: Sequence[int] = (1,), is_hurried: bool = False,
            words: Sequence[str] = ()) -> Iterator[List[Process]]:
    """The crontab line of that config on these hosts, all in the same second; none of them outlives the block."""
    config, program = shelf.config(*lines), hurried(pool) if is_hurried else ()
    found = [Process(['-', config] + list(words), pool.environment(host), program) for host in hosts]
    try:
        yield found
    finally:
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
            if not process.is_over():
                process.kill()


@contextlib.contextmanager
def led_and_helped(pool: Pool, shelf: Shelf, is_hurried: bool = False) -> Iterator[List[Process]]:
    """A round that xcp1 leads and xcp2 has joined, each with a VM in hand: (leader, helper)."""
    with started(pool, shelf, *ALL, is_hurried=is_hurried) as (leader,):
        assert leader.says('vm-export into')
        with started(pool, shelf, *ALL, hosts=(2,), is_hurried=is_hurried) as (helper,):
            assert helper.says('vm-export into')
            yield [leader, helper]


def endings(processes: Sequence[Process], time_limit_s: float = TIME_LIMIT_S) -> List[Run]:
    return [process.ending(time_limit_s) for process in processes]


def exported(pool: Pool) -> List[str]:
    """The names of the VMs whose snapshots were exported, in order."""
    calls = pool.calls('api:VM.snapshot')
    assert all(call['result'] == 'ok' for call in calls)
    return [re.sub(r' \(backup .*', '', call['args'][2]) for call in calls]


def is_exporting(shelf: Shelf, name: str) -> bool:
    return any(size for path, size in sizes(shelf, name))


def sizes(shelf: Shelf, name: str) -> List[Any]:
    found = []
    for path in glob.glob(os.path.join(shelf.path, name, '*.partial', '*.xva')):
        with contextlib.suppress(FileNotFoundError):        # finished, or swept, since it was seen
            found.append((path, os.path.getsize(path)))
    return found


def round_files(shelf: Shelf, pattern: str) -> List[str]:
    return sorted(glob.glob(os.path.join(shelf.path, '.vmbackup', 'rounds', '*', '*', pattern)))


def workers_of(process: Process) -> List[int]:
    """The processes of the other workers that this run has started."""
    found = []
    for pid in children_of(process.pid):
        with contextlib.suppress(OSError), open('/proc/%d/cmdline' % pid, 'rb') as file:
            if b'--worker' in file.read():
                found.append(pid)
    theirs = {child for pid in found for child in children_of(pid)}     # one that is just being forked bears its maker's words
    return [pid for pid in found if pid not in theirs]


def owner(shelf: Shelf, name: str, pool: Pool) -> int:
    """The process that has claimed the VM last; 0: none, or its claim is just being written."""
    uuid = next(record['uuid'] for record in pool.dump()['VM'].values() if record['name_label'] == name)
    paths = round_files(shelf, uuid + '.*.claim')
    if not paths:
        return 0
    with open(paths[-1]) as file:
        text = file.read()
    return int(json.loads(text)['pid']) if text.endswith('}\n') else 0


def each_once(pool: Pool, shelf: Shelf, number: int) -> bool:
    names = ['vm%d' % index for index in range(number)]
    return (sorted(exported(pool)) == sorted(names) and all(shelf.has(name, complete=1) for name in names)
            and shelf.unfinished() == [] and pool.has_no_snapshots_of_ours() and shelf.journals() == [])


# --- workers of one host ---------------------------------------------------------------------------------------------

def test_workers_of_one_host_export_side_by_side_and_each_vm_once(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(6, 8), faults=[slowly(), at('http:/export', runs_at=4 * MEBIBYTE),
                                           at('api:VM.snapshot', sleeps=0.3)])
    shelf = a_shelf()
    with started(pool, shelf, 'vm-export=*', 'workers=3') as (process,):
        assert eventually(lambda: sum(is_exporting(shelf, 'vm%d' % number) for number in range(6)) == 3)
        pool.release()
        run = process.ending()
    assert run.exit_status == 0, run.output
    assert each_once(pool, shelf, 6)
    begun = sorted(entry['t'] for entry in pool.calls('api:VM.snapshot'))
    assert all(later - earlier >= 0.3 for earlier, later in zip(begun, begun[1:]))        # never two at a time
    lines = shelf.status_lines()
    assert [len([line for line in lines if words in line]) for words in (',begin,vm', 'SUCCESS vm')] == [6, 6]
    starts = sorted(entry['t'] for entry in pool.calls('http:/export') if entry['bytes'] > MEBIBYTE)
    # each takes 2 s or more: never four at a time
    assert len(starts) == 6 and all(later - earlier > 1.9 for earlier, later in zip(starts, starts[3:]))


def test_each_line_of_several_workers_is_whole_and_names_its_vm(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(*machines(5)), a_shelf()
    run = backup(pool, shelf, 'vm-export=*', 'workers=4')
    assert run.exit_status == 0 and run.stderr == ''
    told = run.stdout.splitlines()
    assert all(re.match(r'\d{4}-\d\d-\d\d-\(\d\d:\d\d:\d\d\) - \S', line) for line in told)
    assert all('vm%d' % number in ' '.join(told) for number in range(5))
    of_vms = [line for line in told if 'backup-' in line]
    assert len(of_vms) == 10 and all(re.search(r'- vm\d', line) for line in of_vms)
    stamps = [line[:21] for line in told]
    assert stamps == sorted(stamps)


def test_no_more_than_at_once_are_exported_whatever_the_number_of_workers(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(*machines(4), faults=[at('http:/export', **SLOWLY)]), a_shelf()
    assert backup(pool, shelf, 'vm-export=*', 'workers=4', 'at_once=1').exit_status == 0
    assert each_once(pool, shelf, 4)
    words = [re.search(',(begin|end),', line).group(1) for line in shelf.status_lines() if ',vm-export,' in line]
    assert words == ['begin', 'end'] * 4


def test_no_password_is_in_the_words_of_a_worker(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(*machines(2, 8), faults=[slowly()]), a_shelf()
    process = Process(['password', shelf.config('vm-export=*', 'workers=2')], pool.environment())
    assert eventually(lambda: workers_of(process))
    for pid in workers_of(process):
        with open('/proc/%d/cmdline' % pid, 'rb') as words, open('/proc/%d/environ' % pid, 'rb') as variables:
            assert b'password' not in words.read() + variables.read()
    pool.release()
    assert process.ending().exit_status == 0
    assert each_once(pool, shelf, 2)


def test_none_of_the_workers_has_held_more_than_64_mb_since_it_began(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(*machines(2, 64), faults=[slowly(object='vm0'), slowly(object='vm1', until='seen')]), a_shelf()
    # a variable with which it is started as cron starts it: from its text, which Python compiles first
    process = Process(['-', shelf.config('vm-export=*', 'workers=2')], dict(pool.environment(), LANG='C'))
    assert eventually(lambda: is_exporting(shelf, 'vm0') and is_exporting(shelf, 'vm1')), process.output
    pids = [process.pid] + workers_of(process)
    pool.release()
    assert eventually(lambda: shelf.has('vm0', complete=1)), process.output
    peaks = [peak_kib(pid) for pid in pids]             # one still exports, so both are there
    pool.release('seen')
    assert process.ending().exit_status == 0
    assert len(peaks) == 2 and 10000 < min(peaks) and max(peaks) <= 64 << 10, peaks
    assert each_once(pool, shelf, 2)


def peak_kib(pid: int) -> int:
    """The most memory that the kernel has seen the program in that process hold."""
    with open('/proc/%d/status' % pid) as file:
        return next(int(line.split()[1]) for line in file if line.startswith('VmHWM'))


def test_a_worker_that_is_killed_costs_no_vm_its_backup(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(3, 16), faults=[slowly()])
    shelf = a_shelf()
    with started(pool, shelf, 'vm-export=*', 'workers=2', is_hurried=True) as (process,):
        assert eventually(lambda: workers_of(process))
        (worker,) = workers_of(process)
        assert eventually(lambda: any(owner(shelf, 'vm%d' % number, pool) == worker for number in range(3)))
        victim = next('vm%d' % number for number in range(3) if owner(shelf, 'vm%d' % number, pool) == worker)
        assert eventually(lambda: is_exporting(shelf, victim))
        for pid in [worker] + children_of(worker):
            os.kill(pid, signal.SIGKILL)
        pool.release()
        run = process.ending()
    assert run.exit_status == 3 and run.says('second try'), run.output
    assert all(shelf.has('vm%d' % number, complete=1) for number in range(3))
    assert shelf.unfinished() == [] and pool.has_no_snapshots_of_ours() and shelf.journals() == []
    assert len([line for line in shelf.status_lines() if 'SUCCESS vm' in line]) == 3


def test_a_vm_that_kills_each_worker_is_given_up_after_two_and_leaves_nothing(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(3, 32), faults=[slowly(object=name) for name in ('vm0', 'vm2')])
    shelf = a_shelf()
    with started(pool, shelf, 'vm-export=*', 'workers=4', is_hurried=True) as (process,):
        killed = set()          # type: set

        def is_killed_twice() -> bool:
            worker = owner(shelf, 'vm2', pool)
            assert worker != process.pid                                 # which has been busy with vm0 from the first
            if worker and worker not in killed and is_exporting(shelf, 'vm2'):
                killed.add(worker)
                for pid in [worker] + children_of(worker):
                    os.kill(pid, signal.SIGKILL)
            return len(killed) == 2

        assert eventually(is_killed_twice)
        pool.release()
        run = process.ending()
    assert run.exit_status == 1 and run.says('it was tried 2 times, and the worker died'), run.output
    assert shelf.has('vm0', complete=1) and shelf.has('vm1', complete=1) and not shelf.copies('vm2')
    assert shelf.unfinished() == [] and pool.has_no_snapshots_of_ours() and shelf.journals() == []


def test_a_signal_to_the_leader_ends_its_workers_and_what_they_had_open(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(4, 16), faults=[slowly()])
    shelf = a_shelf()
    with started(pool, shelf, 'vm-export=*', 'workers=3') as (process,):
        assert eventually(lambda: len([name for name in range(4) if is_exporting(shelf, 'vm%d' % name)]) == 3)
        pids = workers_of(process)
        process.signal(signal.SIGTERM)
        run = process.ending()
    assert run.exit_status == 128 + signal.SIGTERM, run.output
    assert not any(os.path.exists('/proc/%d' % pid) for pid in pids)
    assert not any(shelf.copies('vm%d' % number) for number in range(4))
    assert pool.has_no_snapshots_of_ours() and shelf.unfinished() == [] and shelf.journals() == []


def test_workers_of_a_leader_that_is_killed_end_with_it_cleaned_up(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(3, 16), faults=[slowly()])
    shelf = a_shelf()
    with started(pool, shelf, 'vm-export=*', 'workers=2') as (process,):
        assert eventually(lambda: len([name for name in range(3) if is_exporting(shelf, 'vm%d' % name)]) == 2)
        pids = workers_of(process)
        os.kill(process.pid, signal.SIGKILL)
        assert eventually(lambda: not any(os.path.exists('/proc/%d' % pid) for pid in pids))
    assert len(shelf.journals()) == 1                                   # the leader's own
    pool.stop()
    pool.set_faults([])
    pool.start()
    run = backup(pool, shelf, 'vm-export=*', 'workers=2')
    assert run.exit_status == 0 and run.says('did not come to its end: 0 of 3 VMs'), run.output
    assert all(shelf.has('vm%d' % number, complete=1) for number in range(3))
    assert pool.has_no_snapshots_of_ours() and shelf.unfinished() == [] and shelf.journals() == []


def test_a_store_that_is_full_for_one_worker_costs_only_its_vm(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(3, 4), faults=[at('http:/export', runs_at=4 * MEBIBYTE)])
    shelf = a_shelf()
    program = in_trouble(pool, hurried=True, store=shelf.path, below='vm1', step=12, do='ENOSPC', stays=True)
    process = Process(['-', shelf.config('vm-export=*', 'workers=2')], pool.environment(), program)
    run = process.ending()
    assert run.exit_status == 1 and run.says('no space left'), run.output
    assert shelf.has('vm0', complete=1) and shelf.has('vm2', complete=1) and not shelf.copies('vm1')
    assert pool.has_no_snapshots_of_ours() and shelf.unfinished() == []


# --- hosts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('workers', [1, 2])
def test_hosts_that_start_in_the_same_second_share_the_vms_of_one_plan(a_pool: Any, a_shelf: Any, workers: int) -> None:
    pool = a_pool(*machines(6, 16), faults=[slowly()], hosts=HOSTS)
    shelf = a_shelf()
    with started(pool, shelf, *ALL, 'workers=%d' % workers, hosts=(1, 2, 3)) as processes:
        assert eventually(lambda: all('vm-export into' in process.output for process in processes)), processes[0].output
        pool.release()
        runs = endings(processes)
    assert [run.exit_status for run in runs] == [0, 0, 0], runs
    assert each_once(pool, shelf, 6)
    (leader,) = [run for run in runs if run.says('6 VMs backed up')]
    helpers = [run for run in runs if run is not leader]
    assert all('of the round that' in run.stdout.splitlines()[-1] for run in helpers)
    taken = [int(re.search(r'(\d+) VMs? of the round', run.stdout).group(1)) for run in helpers]
    assert all('vm%d' % number in leader.stdout for number in range(6)) and leader.stdout.count('backed up by') == sum(taken) > 0
    hosts = {line.split(',')[2] for line in shelf.status_lines() if 'SUCCESS vm' in line}
    assert len(hosts) >= 2
    assert len([line for line in shelf.status_lines() if ',vmbackup.py,' in line]) == 2


@pytest.mark.timeout(900)
@pytest.mark.parametrize('hosts, workers, vms', [(1, 8, 20), (3, 8, 30), (64, 1, 72)])
def test_a_pool_of_any_size_exports_each_vm_once_and_local_ones_by_their_own_host(
        a_pool: Any, a_shelf: Any, hosts: int, workers: int, vms: int) -> None:
    names = ['xcp%d' % number for number in range(1, hosts + 1)]
    srs = [{'name_label': 'nfs', 'type': 'nfs', 'shared': True, 'size': 1 << 42}] + [
        {'name_label': 'local ' + name, 'type': 'ext', 'host': name, 'size': 1 << 40} for name in names]
    own = {'vm%d' % number: names[number // 2 % hosts] for number in range(0, vms, 2)}      # every second VM is a local one
    pool = a_pool(*[vm('vm%d' % number, disks=[disk(size=2 * MEBIBYTE, used=2, seed=number, sr='local ' + own['vm%d' % number]
                                                    if number % 2 == 0 else 'nfs')]) for number in range(vms)],
                  hosts=[{'name_label': name, 'master': name == 'xcp1'} for name in names], srs=srs,
                  faults=[at('http:/export', **SLOWLY), at('http:/export', sleeps=240, until='enough')])
    shelf = a_shelf()
    with started(pool, shelf, *ALL, 'workers=%d' % workers, hosts=range(1, hosts + 1)) as processes:
        # who comes late finds that others have done what only it was waited for with, for a minute
        assert eventually(lambda: sum('takes part in the round' in process.output for process in processes) == hosts - 1, 240)
        pool.release()
        runs = endings(processes, 2 * TIME_LIMIT_S)
    assert {run.exit_status for run in runs} == {0}, runs
    assert each_once(pool, shelf, vms)
    done = {line.split('SUCCESS ')[1].split(',')[0]: line.split(',')[2] for line in shelf.status_lines() if 'SUCCESS vm' in line}
    assert len(done) == vms and own.items() <= done.items() and len(shelf.status_lines()) == 2 * vms + 2
    assert len([run for run in runs if run.says('%d VMs backed up' % vms)]) == 1
    for name in names:                      # each export takes a second: never more than `workers` on a host
        begun = sorted(call['t'] for call in pool.calls('api:VM.snapshot') if done[call['args'][2].partition(' ')[0]] == name)
        assert all(later - earlier > 0.9 for earlier, later in zip(begun, begun[workers:]))


def test_a_vm_on_a_local_sr_is_exported_by_its_own_host(a_pool: Any, a_shelf: Any) -> None:
    vms = [vm('on ' + name, disks=[disk(size=2 * MEBIBYTE, used=2, sr='local ' + name)]) for name in ('xcp1', 'xcp2', 'xcp3')]
    pool = a_pool(*vms, hosts=HOSTS, srs=SRS, faults=[at('http:/export', **SLOWLY)])
    shelf = a_shelf()
    with started(pool, shelf, *ALL, hosts=(1, 2, 3)) as processes:
        assert [run.exit_status for run in endings(processes)] == [0, 0, 0]
    done = {line.split('SUCCESS ')[1].split(',')[0]: line.split(',')[2] for line in shelf.status_lines() if 'SUCCESS on' in line}
    assert done == {'on ' + host['name_label']: host['name_label'] for host in HOSTS}


def test_a_vm_on_the_local_sr_of_a_host_that_takes_no_part_is_exported_by_another(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('far', disks=[disk(sr='local xcp2')]), hosts=HOSTS, srs=SRS)
    shelf = a_shelf()
    with started(pool, shelf, *ALL, is_hurried=True) as (process,):
        assert process.ending().exit_status == 0
    assert shelf.has('far', complete=1)


def test_a_host_joins_a_round_whatever_its_age_and_finds_nothing_left_to_do(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(2, 16), hosts=HOSTS, faults=[slowly()])
    shelf = a_shelf()
    with started(pool, shelf, *ALL) as (leader,):
        assert eventually(lambda: is_exporting(shelf, 'vm0') or is_exporting(shelf, 'vm1'))
        with started(pool, shelf, *ALL, hosts=(2,)) as (helper,):
            assert helper.says('vm-export into')
            pool.release()
            late = helper.ending()
        assert late.exit_status == 0 and late.says('1 VM of the round that xcp1 leads was taken by xcp2.'), late.output
        assert leader.ending().exit_status == 0
    assert shelf.has('vm0', complete=1) and shelf.has('vm1', complete=1)


def test_a_second_run_on_a_host_that_takes_part_is_exit_5(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(2, 16), hosts=HOSTS, faults=[slowly()])
    shelf = a_shelf()
    with led_and_helped(pool, shelf) as (leader, helper):
        for host in (1, 2):
            again = backup(pool, shelf, *ALL, host=host)
            assert again.exit_status == 5 and 'Nothing was started' in again.stderr, again.output
        pool.release()
        assert [run.exit_status for run in endings([leader, helper])] == [0, 0]
    assert each_once(pool, shelf, 2)


def test_a_leader_that_is_killed_is_followed_by_a_host_that_has_joined(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(5, 16), hosts=HOSTS, faults=[slowly()])
    shelf = a_shelf()
    with led_and_helped(pool, shelf, is_hurried=True) as (leader, helper):
        leader.kill()
        pool.release()
        run = helper.ending()
    assert run.exit_status == 3 and run.says('xcp2 took over') and run.says('5 VMs backed up'), run.output
    assert all(shelf.has('vm%d' % number, complete=1) for number in range(5))
    assert shelf.unfinished() == [] and pool.has_no_snapshots_of_ours() and shelf.journals() == []
    lines = shelf.status_lines()
    assert len([line for line in lines if 'SUCCESS vm' in line]) == 5
    assert len([line for line in lines if ',vmbackup.py,' in line]) == 2


def test_a_signal_to_the_leader_lets_other_hosts_finish_the_vm_in_hand_and_ends_the_round(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(6, 16), hosts=HOSTS, faults=[slowly()])
    shelf = a_shelf()
    with led_and_helped(pool, shelf) as (leader, helper):
        leader.signal(signal.SIGTERM)
        assert leader.ending().exit_status == 128 + signal.SIGTERM
        pool.release()
        run = helper.ending()
    assert run.exit_status == 0 and run.never_says('took over') and run.says('1 VM of the round that xcp1 leads'), run.output
    assert len([name for name in range(6) if shelf.copies('vm%d' % name)]) == 1
    assert shelf.unfinished() == [] and pool.has_no_snapshots_of_ours() and shelf.journals() == []


def test_a_host_that_freezes_is_given_up_and_marks_nothing_of_the_next_round(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(2, 16), hosts=HOSTS, faults=[slowly()])
    shelf = a_shelf()
    with led_and_helped(pool, shelf, is_hurried=True) as (leader, helper):
        os.kill(helper.pid, signal.SIGSTOP)
        pool.release()
        run = leader.ending()
        assert run.exit_status == 1 and run.says('no sign of life from xcp2'), run.output
        frozen = next(name for name in ('vm0', 'vm1') if name + ' (' in helper.output)
        with started(pool, shelf, *ALL, 'lock_wait=60', words=['force=yes'], is_hurried=True) as (second,):
            assert second.says('waiting')
            os.kill(helper.pid, signal.SIGCONT)
            assert helper.ending().exit_status == 0
            again = second.ending()
        assert again.exit_status == 0 and again.says('2 VMs backed up'), again.output
    assert shelf.has(frozen, complete=2)        # that of the host that came back, and the second round's
    assert shelf.unfinished() == [] and pool.has_no_snapshots_of_ours() and shelf.journals() == []


def test_a_worker_that_freezes_while_it_looks_for_a_vm_does_not_hold_up_the_round(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(4, 4), faults=[at('xe:pool-dump-database', sleeps=60, until='enough')])
    shelf = a_shelf()
    with started(pool, shelf, 'vm-export=*', 'at_once=1', 'pool_db_backup=yes', is_hurried=True) as (leader,):
        assert eventually(lambda: round_files(shelf, 'plan.json')), leader.output      # the first VM comes after the dump
        with open(os.path.join(os.path.dirname(round_files(shelf, 'plan.json')[0]), 'slots.lock'), 'w') as slots:
            fcntl.lockf(slots, fcntl.LOCK_EX, 1, 1)     # as that of a host that looks for a VM and freezes there
            pool.release()
            run = leader.ending()
    assert run.exit_status == 0 and run.says('all of at_once=1 are taken') and run.says('one more is used'), run.output
    assert each_once(pool, shelf, 4)


def test_a_claim_that_could_not_be_noted_on_a_full_store_is_noted_once_there_is_room(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(2, 16), hosts=HOSTS, faults=[slowly()])
    shelf = a_shelf()
    lines = ALL + ('lock_wait=0',)
    with started(pool, shelf, *lines, is_hurried=True) as (leader,):
        assert leader.says('vm-export into')
        (claim,) = round_files(shelf, '*.claim')
        (other,) = [record['uuid'] for record in pool.dump()['VM'].values() if record['name_label'] in ('vm0', 'vm1')
                    and record['uuid'] not in claim and not record['is_a_snapshot']]
        program = in_trouble(pool, hurried=True, at=[other + '.1.claim'], do='ENOSPC', once=True)
        helper = Process(['-', shelf.config(*lines)], pool.environment(2), program)
        assert helper.says('could not note that it is begun')
        assert eventually(lambda: round_files(shelf, other + '.1.claim')), helper.output
        pool.release()
        runs = endings([leader, helper])
    assert [run.exit_status for run in runs] == [0, 0] and runs[0].says('2 VMs backed up'), runs
    assert each_once(pool, shelf, 2)


def test_a_vm_whose_worker_died_waits_for_its_own_host_however_long_that_is_busy(a_pool: Any, a_shelf: Any) -> None:
    local = [vm(name, disks=[disk(size=20 * MEBIBYTE, used=20, seed=seed, sr='local xcp2')]) for seed, name in enumerate('abc')]
    pool = a_pool(vm('here', disks=[disk(size=16 * MEBIBYTE, used=16, sr='local xcp1')]), *local, hosts=HOSTS, srs=SRS,
                  faults=[slowly(object='here')] + [slowly(object=name, until='rested') for name in ('a', 'b')])
    shelf = a_shelf()
    lines = ALL + ('workers=2', 'stall_timeout=8')
    with started(pool, shelf, *lines, is_hurried=True) as (leader,):
        assert leader.says('VMs of')
        with started(pool, shelf, *lines, hosts=(2,), is_hurried=True) as (helper,):
            assert eventually(lambda: is_exporting(shelf, 'a') and is_exporting(shelf, 'b'))
            (victim,) = {owner(shelf, 'a', pool), owner(shelf, 'b', pool)}.intersection(workers_of(helper))
            for pid in [victim] + children_of(victim):
                os.kill(pid, signal.SIGKILL)
            pool.release()
            assert eventually(lambda: shelf.has('here', complete=1)), leader.output
            time.sleep(11)                  # longer than anybody is waited for who gives no sign of life
            pool.release('rested')
            runs = endings([leader, helper])
    assert runs[0].exit_status == 3 and runs[0].says('needed a second try') and runs[0].never_says('no sign of life'), runs
    assert all(shelf.has(name, complete=1) for name in ('here', 'a', 'b', 'c')) and shelf.unfinished() == []
    assert pool.has_no_snapshots_of_ours() and shelf.journals() == []


def test_with_lock_wait_0_a_worker_of_the_round_is_not_taken_for_another_run(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('far', disks=[disk(size=4 * MEBIBYTE, used=4, sr='local xcp2')]), hosts=HOSTS, srs=SRS)
    shelf = a_shelf()
    lines = ALL + ('lock_wait=0',)
    with started(pool, shelf, *lines) as (leader,):
        assert eventually(lambda: round_files(shelf, 'plan.json'))
        (far,) = [record['uuid'] for record in pool.dump()['VM'].values() if record['name_label'] == 'far']
        time.sleep(2)
        slow = in_trouble(pool, at=[far + '.1.claim'], do='sleep')        # between its lock and its claim a second passes
        helper = Process(['-', shelf.config(*lines)], pool.environment(2), slow)
        runs = endings([leader, helper])
    assert not runs[0].exit_status or runs[0].says('Nothing was done for this VM'), runs
    assert shelf.has('far', complete=0 if runs[0].exit_status else 1) and len(exported(pool)) == (not runs[0].exit_status), runs


def test_a_host_that_freezes_for_a_while_and_comes_back_in_time_is_waited_for(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(2, 16), hosts=HOSTS, faults=[slowly(object='vm0'), slowly(object='vm1', until='rested')])
    shelf = a_shelf()
    with led_and_helped(pool, shelf, is_hurried=True) as (leader, helper):
        pool.release()
        assert leader.says('is complete')       # so it has nothing to do but to wait for the other, which has its VM in hand
        os.kill(helper.pid, signal.SIGSTOP)
        time.sleep(1)
        assert not leader.is_over(), leader.output
        pool.release('rested')
        os.kill(helper.pid, signal.SIGCONT)
        assert [run.exit_status for run in endings([leader, helper])] == [0, 0]
    assert each_once(pool, shelf, 2)


def test_a_host_that_was_frozen_before_it_could_join_begins_no_round_of_its_own(a_pool: Any, a_shelf: Any) -> None:
    """It has seen that a round goes on; when it wakes up, that is over."""
    pool = a_pool(*machines(1, 16), hosts=HOSTS, faults=[slowly()])
    shelf = a_shelf()
    with started(pool, shelf, *ALL) as (leader,):
        assert leader.says('vm-export into')
        with started(pool, shelf, *ALL, hosts=(2,)) as (late,):
            assert late.says('root file system')
            time.sleep(0.5)
            os.kill(late.pid, signal.SIGSTOP)
            pool.release()
            assert leader.ending().exit_status == 0
            os.kill(late.pid, signal.SIGCONT)
            assert late.ending().exit_status == 0
    assert shelf.has('vm0', complete=1) and len(pool.calls('api:VM.snapshot')) == 1


def test_a_leader_whose_own_storage_misbehaves_leaves_the_vms_to_other_hosts(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(3, 12), hosts=HOSTS, faults=[slowly()])
    shelf = a_shelf()
    config = shelf.config(*ALL)
    program = in_trouble(shelf, hurried=True, store=shelf.path, below='vm0', step=29, do='EIO', stays=True)   # late in the image
    leader = Process(['-', config], pool.environment(1), program)
    assert leader.says('vm0 (')
    helper = Process(['-', config], pool.environment(2), hurried(pool))
    assert helper.says('vm-export into')
    pool.release()
    runs = endings([leader, helper])
    assert [run.exit_status for run in runs] == [3, 0] and runs[0].says('misbehaved'), runs
    assert all(shelf.has('vm%d' % number, complete=1) for number in range(3)) and shelf.unfinished() == []
    done = [line.split(',')[2] for line in shelf.status_lines() if 'SUCCESS vm' in line]
    assert done == ['xcp2'] * 3 and pool.has_no_snapshots_of_ours()


def test_a_leader_whose_own_storage_misbehaves_still_does_what_only_it_sees(a_pool: Any, a_shelf: Any) -> None:
    local = [vm('own%d' % number, disks=[disk(size=12 * MEBIBYTE, used=12, seed=number, sr='local xcp1')]) for number in range(2)]
    pool = a_pool(*(machines(2, 12) + local), hosts=HOSTS, srs=SRS, faults=[slowly()])
    shelf = a_shelf()
    program = in_trouble(shelf, hurried=True, store=shelf.path, below='own0', step=29, do='EIO')         # once, late in the image
    config = shelf.config(*ALL)
    leader = Process(['-', config], pool.environment(1), program)
    assert leader.says('own0 (')
    helper = Process(['-', config], pool.environment(2), hurried(pool))
    assert helper.says('vm-export into')
    pool.release()
    runs = endings([leader, helper])
    assert [run.exit_status for run in runs] == [3, 0] and runs[0].says('misbehaved'), runs
    assert all(shelf.has(name, complete=1) for name in ('vm0', 'vm1', 'own0', 'own1')) and shelf.unfinished() == []
    done = {line.split('SUCCESS ')[1].split(',')[0]: line.split(',')[2] for line in shelf.status_lines() if 'SUCCESS ' in line
            and ',vm-export,' in line}
    assert done['own0'] == done['own1'] == 'xcp1' and 'xcp2' in done.values() and pool.has_no_snapshots_of_ours()


def test_a_vm_that_another_config_is_busy_with_is_given_up_only_when_nothing_else_is_to_be_done(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(3, 16), hosts=HOSTS, faults=[slowly(object='vm0')])
    shelf = a_shelf()
    with started(pool, shelf, 'vm-export=vm0', is_hurried=True) as (other,):
        assert other.says('vm-export into')
        other_config = os.path.join(shelf.home, 'other.cfg')
        with open(shelf.config('vm-export=*', 'hosts=all', 'lock_wait=1')) as file, open(other_config, 'w') as copy:
            copy.write(file.read())
        processes = [Process(['-', other_config], pool.environment(host), hurried(pool)) for host in (2, 3)]
        os.kill(other.pid, signal.SIGSTOP)
        runs = endings(processes)
        os.kill(other.pid, signal.SIGCONT)
        pool.release()
        assert other.ending().exit_status == 0
    assert sorted(run.exit_status for run in runs) == [0, 1], runs
    (leader,) = [run for run in runs if run.exit_status == 1]
    assert leader.says('in use by another run') and leader.says('2 VMs backed up') and leader.says('lock_wait=1'), leader.output
    assert shelf.has('vm1', complete=1) and shelf.has('vm2', complete=1) and shelf.has('vm0', complete=1)


def test_hosts_without_work_leave_a_round_whose_leader_gives_no_sign_of_life(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(1, 16), hosts=HOSTS, faults=[slowly()])
    shelf = a_shelf()
    with started(pool, shelf, *ALL, is_hurried=True) as (leader,):
        assert leader.says('vm-export into')
        os.kill(leader.pid, signal.SIGSTOP)
        with started(pool, shelf, *ALL, 'workers=2', hosts=(2, 3), is_hurried=True) as idle:
            for run in endings(idle):
                assert run.exit_status == 0 and 'this host leaves it' in run.stderr, run
        os.kill(leader.pid, signal.SIGCONT)
        pool.release()
        assert leader.ending().exit_status == 0
    assert each_once(pool, shelf, 1)


def test_another_version_takes_no_part_and_says_so(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(1, 16), hosts=HOSTS, faults=[slowly()])
    shelf = a_shelf()
    with started(pool, shelf, *ALL) as (leader,):
        assert leader.says('vm-export into')
        (lock,) = glob.glob(os.path.join(shelf.path, '.vmbackup', 'locks', 'config-*'))
        with open(lock) as file:
            text = file.read()
        with open(lock, 'w') as file:
            file.write(re.sub(r'"version": "[^"]*"', '"version": "9.9.9"', text))
        late = backup(pool, shelf, *ALL, host=2)
        assert late.exit_status == 3 and 'with VmBackup 9.9.9' in late.stderr, late.output
        pool.release()
        assert leader.ending().exit_status == 0


def test_a_host_whose_clock_is_wrong_takes_no_part_and_says_so(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(1, 16), hosts=HOSTS, faults=[slowly()])
    shelf = a_shelf()
    with started(pool, shelf, *ALL) as (leader,):
        assert leader.says('vm-export into')
        late = Process(['-', shelf.config(*ALL)], pool.environment(2), in_trouble(shelf, clock=90)).ending()
        assert late.exit_status == 3 and re.search(r'(89|9\d) s ahead of the store', late.stderr), late.output
        pool.release()
        assert leader.ending().exit_status == 0


def test_a_round_of_other_settings_under_one_path_is_told_with_both_hosts(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(2, 16), hosts=HOSTS, faults=[slowly(object='vm0')])
    shelf = a_shelf()
    with started(pool, shelf, 'vm-export=vm0', 'hosts=all') as (first,):
        assert first.says('vm-export into')
        other = backup(pool, shelf, 'vm-export=vm1', 'hosts=all', host=2)
        assert other.exit_status == 3 and 'xcp1 is running it with other settings, so xcp2' in other.stderr, other.output
        pool.release()
        assert first.ending().exit_status == 0


# --- until, status ---------------------------------------------------------------------------------------------------

def test_what_until_leaves_undone_is_told_and_comes_first_next_time(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(3, 16), faults=[slowly()])
    shelf = a_shelf()
    until = time.strftime('until=%H:%M', time.localtime(time.time() + 180))      # 2 minutes or more are left
    late = os.path.join(pool.home, 'late')
    process = Process(['-', shelf.config('vm-export=*', until)], pool.environment(),
                      in_trouble(pool, hurried=True, clock=200, since=late))
    assert process.says('vm-export into')
    pool.release('late')
    pool.release()
    run = process.ending()
    done = [name for name in ('vm0', 'vm1', 'vm2') if shelf.copies(name)]
    assert run.exit_status == 1 and run.says(until + ' came before its turn'), run.output
    assert len(done) == 1                                              # the one that was in hand then
    left = [name for name in ('vm0', 'vm1', 'vm2') if name not in done]
    before = len(exported(pool))
    assert backup(pool, shelf, 'vm-export=*').exit_status in (0, 3)    # 3: by the real clock, time went back
    assert exported(pool)[before:before + len(left)] == left


def test_status_shows_who_does_what_and_how_the_last_round_ended(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(3, 16), hosts=HOSTS, faults=[slowly()])
    shelf = a_shelf()
    assert without_pool(shelf, 'status', lines=ALL).says('No round of')
    with started(pool, shelf, *ALL, is_hurried=True) as (leader,):
        assert leader.says('vm-export into')
        text = ''

        def is_told() -> bool:
            nonlocal text
            text = without_pool(shelf, 'status', lines=ALL).stdout
            return '/16 MiB' in text

        assert eventually(is_told), text
        assert 'begun by xcp1' in text and 'is going on' in text and '3 VMs: 0 backed up, 0 not, 1 under way, 2 to come' in text
        assert re.search(r'vm0 \(\w+\): on xcp1 since .*export of vm0 .*: \d+ %, [\d,]+/16 MiB', text), text
        pool.release()
        assert leader.ending().exit_status == 0
    text = without_pool(shelf, 'status', lines=ALL).stdout
    assert 'ended at' in text and '3 VMs: 3 backed up, 0 not' in text


def test_a_worker_that_waits_does_no_work(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*machines(1, 32), faults=[slowly()])
    shelf = a_shelf()
    with started(pool, shelf, 'vm-export=*', 'workers=2') as (process,):
        assert eventually(lambda: is_exporting(shelf, 'vm0') and workers_of(process))
        (worker,) = workers_of(process)

        def ticks() -> int:
            with open('/proc/%d/stat' % worker) as file:
                return sum(map(int, file.read().rpartition(')')[2].split()[11:13]))

        def looks() -> int:
            with open('/proc/%d/status' % worker) as file:
                return int(re.search(r'^voluntary_ctxt_switches:\s*(\d+)', file.read(), re.MULTILINE).group(1))

        def is_idle() -> bool:
            before, looked = ticks(), looks()
            time.sleep(3)
            return ticks() - before <= 0.05 * 3 * os.sysconf('SC_CLK_TCK') and looks() > looked      # it did look meanwhile

        # the leader's, as such and as a worker, and its own: it has begun, which is work
        assert eventually(lambda: len(round_files(shelf, '*.sign')) == 3), round_files(shelf, '*')
        assert eventually(is_idle)
        pool.release()
        assert process.ending().exit_status == 0


# --- whatever befalls them: a sample of what tests/soak --rounds runs --------------------------------------------------

@pytest.mark.parametrize('seed', range(8))
def test_whatever_befalls_its_workers_a_round_loses_nothing_and_leaves_nothing(a_pool: Any, a_shelf: Any, seed: int) -> None:
    case = roundfaults.case(seed)
    pool = roundfaults.described(case)
    pool = a_pool(*pool.pop('vms'), **pool)
    assert not roundfaults.problems_of(case, pool, a_shelf()), case.name
