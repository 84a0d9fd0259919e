"""Runs that meet: of one config, of two configs that share a VM, on two hosts that have the same crontab line."""

import json
import os
import shutil
import subprocess
import time
from typing import Any

import pytest

from support.deeds import Process, backup, beginning
from support.language import MEBIBYTE, at, disk, slowly, vm
from support.process import PASSWORD, Pool
from support.recovery import killed_at
from support.shelf import Shelf, complete
from support.wire import eventually

TWO_HOSTS = [{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'}]
BIG = [disk(size=8 * MEBIBYTE, used=8)]


def second_config(shelf: Shelf, *lines: str) -> str:
    """A config of another name for the same shelf."""
    path = os.path.join(shelf.home, 'second.cfg')
    with open(path, 'w') as file:
        file.write('\n'.join(('backup_dir=' + shelf.path, 'status_log=' + shelf.status_log) + lines) + '\n')
    return path


def test_a_second_run_of_one_config_is_exit_5_and_says_who_and_since_when(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', disks=BIG), faults=[slowly()])
    shelf = a_shelf()
    with beginning(pool, shelf, 'vm-export=web') as first:
        assert eventually(shelf.unfinished)
        second = backup(pool, shelf, 'vm-export=web')
        assert second.exit_status == 5
        assert 'xcp1' in second.stderr and 'since 20' in second.stderr and 'Nothing was started' in second.stderr
        pool.release()
        assert first.ending().exit_status == 0
    assert shelf.has('web', complete=1) and len(pool.calls('api:VM.snapshot')) == 1
    assert len([line for line in shelf.status_lines() if ',vmbackup.py,xcp1,begin' in line]) == 1


def test_a_run_of_another_config_waits_for_the_vm_that_is_busy(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', disks=BIG), faults=[slowly(nth=1)])
    shelf = a_shelf()
    with beginning(pool, shelf, 'vm-export=web') as first:
        assert eventually(shelf.unfinished)
        with beginning(pool, shelf, config=second_config(shelf, 'vm-export=web')) as second:
            assert second.says('waiting')
            pool.release()
            assert first.ending().exit_status == 0
            assert second.ending().exit_status == 0
    assert shelf.has('web', complete=2)
    assert [shelf.manifest('web', name)['sequence'] for name in shelf.copies('web')] == [1, 2]


def test_a_run_that_waited_lock_wait_in_vain_fails_for_that_vm_only(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', disks=BIG), vm('db'), faults=[slowly(object='web')])
    shelf = a_shelf()
    with beginning(pool, shelf, 'vm-export=web') as first:
        assert eventually(shelf.unfinished)
        with beginning(pool, shelf, config=second_config(shelf, 'vm-export=*', 'lock_wait=0')) as second:
            run = second.ending()
        assert run.exit_status == 1 and 'web' in run.stderr and 'in use by another run' in run.stderr
        pool.release()
        assert first.ending().exit_status == 0
    assert shelf.has('web', complete=1) and shelf.has('db', complete=1) and shelf.unfinished() == []


def test_a_preview_is_not_kept_waiting_by_a_run(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', disks=BIG), faults=[slowly()])
    shelf = a_shelf()
    with beginning(pool, shelf, 'vm-export=web') as first:
        assert eventually(shelf.unfinished)
        assert backup(pool, shelf, 'vm-export=web', words=['preview']).exit_status == 0
        assert not first.is_over()
        pool.release()
        assert first.ending().exit_status == 0


def test_a_config_is_the_same_under_another_path_to_it(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', disks=BIG), faults=[slowly()])
    shelf = a_shelf()
    link = os.path.join(shelf.home, 'link.cfg')
    os.symlink(shelf.config('vm-export=web'), link)
    with beginning(pool, shelf, 'vm-export=web') as first:
        assert eventually(shelf.unfinished)
        with beginning(pool, shelf, config=link) as second:
            assert second.ending().exit_status == 5
        pool.release()
        assert first.ending().exit_status == 0


# --- Two hosts -------------------------------------------------------------------------------------------------------

def test_of_two_hosts_that_start_in_the_same_second_one_backs_up_and_the_other_leaves_it_to_that_one(a_pool: Any,
                                                                                                    a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db'), hosts=TWO_HOSTS), a_shelf()
    config = shelf.config('vm-export=*', 'pool_db_backup=1')
    processes = [Process(['-', config], pool.environment(host)) for host in (1, 2)]
    runs = [process.ending() for process in processes]
    assert [run.exit_status for run in runs] == [0, 0], runs
    assert sum(run.says('left to it') for run in runs) == 1
    assert shelf.has('web', complete=1) and shelf.has('db', complete=1)
    assert len(pool.calls('api:VM.snapshot')) == 2
    assert len([line for line in shelf.status_lines() if ',vmbackup.py,' in line]) == 2


def test_a_host_leaves_a_run_to_the_one_that_has_just_done_it_unless_forced(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), hosts=TWO_HOSTS), a_shelf()
    assert backup(pool, shelf, 'vm-export=web', host=1).exit_status == 0
    lines = shelf.status_lines()

    second = backup(pool, shelf, 'vm-export=web', host=2)
    assert second.exit_status == 0 and second.says('xcp1') and second.stderr == ''
    assert shelf.has('web', complete=1) and shelf.status_lines() == lines

    assert backup(pool, shelf, 'vm-export=web', host=2, words=['force=yes']).exit_status == 0
    assert shelf.has('web', complete=2)


def test_the_same_host_may_run_again_at_once(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), hosts=TWO_HOSTS), a_shelf()
    for _ in range(2):
        assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    assert shelf.has('web', complete=2)


def test_a_run_that_one_host_finished_with_a_failed_vm_is_not_done_again_by_the_next(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web'), hosts=TWO_HOSTS,
                  faults=[at('api:VM.snapshot', nth=1, fails=['SR_BACKEND_FAILURE_44', '', 'full', ''])])
    shelf = a_shelf()
    assert backup(pool, shelf, 'vm-export=web', host=1).exit_status == 1
    second = backup(pool, shelf, 'vm-export=web', host=2)
    assert second.exit_status == 0 and second.says('ended with exit status 1') and second.says('left to it')
    assert shelf.has('web', complete=0)
    assert backup(pool, shelf, 'vm-export=web', host=2, words=['force=yes']).exit_status == 0
    assert shelf.has('web', complete=1)


def test_two_hosts_with_different_files_at_one_path_do_not_stand_for_each_other(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db'), hosts=TWO_HOSTS), a_shelf()
    assert backup(pool, shelf, 'vm-export=web', host=1).exit_status == 0
    assert backup(pool, shelf, 'vm-export=db', host=2).exit_status == 0
    assert shelf.has('web', complete=1) and shelf.has('db', complete=1)


@pytest.mark.parametrize('words, is_the_same', [(['vm-export=web'], False), (['max_backups=9'], False), (['compress=gzip'], False),
                                                (['mail_when=never', 'lock_wait=3'], True)])
def test_a_run_by_hand_with_other_settings_stands_for_the_other_hosts_run_only_if_its_copies_are_the_same(
        a_pool: Any, a_shelf: Any, words: Any, is_the_same: bool) -> None:
    pool, shelf = a_pool(vm('web'), vm('db'), hosts=TWO_HOSTS), a_shelf()
    assert backup(pool, shelf, 'vm-export=*', host=1, words=words).exit_status == 0
    run = backup(pool, shelf, 'vm-export=*', host=2)
    assert run.exit_status == 0 and run.says('left to it') is is_the_same
    assert shelf.copies('db')


def test_a_comment_in_one_hosts_file_makes_no_other_config(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), hosts=TWO_HOSTS), a_shelf()
    assert backup(pool, shelf, 'vm-export=web', host=1).exit_status == 0
    assert backup(pool, shelf, '# on the second host', 'vm-export="web"', 'lock_wait=5', host=2).says('left to it')
    assert shelf.has('web', complete=1)


def test_two_pools_back_up_at_once_with_one_path_to_their_config(a_shelf: Any) -> None:
    shelf = a_shelf()
    pools = [Pool({'vms': [vm(name, disks=BIG)], 'hosts': [{'name_label': 'host-' + name}]},
                  [slowly()]).start() for name in ('web', 'db')]
    try:
        with beginning(pools[0], shelf, 'vm-export=*') as first:
            assert eventually(shelf.unfinished)
            pools[1].release()
            assert backup(pools[1], shelf, 'vm-export=*').exit_status == 0
            pools[0].release()
            assert first.ending().exit_status == 0
    finally:
        for pool in pools:
            pool.remove()
    assert shelf.has('web', complete=1) and shelf.has('db', complete=1)


def test_a_run_of_more_than_an_hour_ago_does_not_stand_for_todays(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), hosts=TWO_HOSTS), a_shelf()
    assert backup(pool, shelf, 'vm-export=web', host=1).exit_status == 0
    for minutes, copies in ((59, 1), (61, 2)):
        set_since(shelf, minutes)
        assert backup(pool, shelf, 'vm-export=web', host=2).exit_status == 0
        assert shelf.has('web', complete=copies), minutes


def set_since(shelf: Shelf, minutes_ago: int) -> None:
    """The lock of the config tells of a run that began so long ago."""
    folder = shelf.at('.vmbackup', 'locks')
    path = os.path.join(folder, [name for name in os.listdir(folder) if name.startswith('config-')][0])
    with open(path) as file:
        text = json.load(file)
    text['since'] = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(time.time() - minutes_ago * 60))
    with open(path, 'w') as file:
        json.dump(text, file)


def test_a_dead_run_of_another_host_does_not_stand_for_ours(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', disks=BIG), hosts=TWO_HOSTS, faults=[slowly(nth=1)])
    shelf = a_shelf(complete('web'))
    with beginning(pool, shelf, 'vm-export=web', host=1) as first:
        assert eventually(shelf.unfinished)
        first.kill()
    run = backup(pool, shelf, 'vm-export=web', host=2)
    assert run.exit_status == 0, run
    assert shelf.has('web', complete=2) and shelf.unfinished() == [] and pool.has_no_snapshots_of_ours()


@pytest.mark.parametrize('scheme', ['socket', 'pool='])
def test_a_run_with_pool_is_never_left_to_another_host(a_pool: Any, a_shelf: Any, scheme: str) -> None:
    pool, shelf = a_pool(vm('web'), hosts=TWO_HOSTS), a_shelf()
    assert backup(pool, shelf, 'vm-export=web', host=2).exit_status == 0
    lines = ['pool=' + pool.url] if scheme == 'pool=' else []
    run = backup(pool, shelf, 'vm-export=web', *lines, password=PASSWORD)
    assert run.exit_status == 0
    assert shelf.has('web', complete=2 if lines else 1)


def test_two_pools_may_share_one_shelf(a_shelf: Any) -> None:
    shelf = a_shelf()
    pools = [Pool({'vms': [vm('web', uuid='%08d-0000-4000-8000-000000000000' % number)],
                   'hosts': [{'name_label': 'host%d' % number}]}).start() for number in (1, 2)]
    try:
        for pool in pools:
            assert backup(pool, shelf, 'vm-export=web').exit_status == 0
            assert pool.has_no_snapshots_of_ours()
    finally:
        for pool in pools:
            pool.remove()
    assert shelf.names() == ['web', 'web--00000002']


# --- a mirror of the store -----------------------------------------------------------------------------------------------

def mirrored(shelf: Shelf, other: Shelf) -> None:
    """The other store is what `cp -a` makes of this one."""
    shutil.rmtree(other.path)
    subprocess.run(['cp', '-a', shelf.path, other.path], check=True)


def test_a_run_on_a_mirror_of_the_store_does_not_take_the_originals_run_for_dead(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf, mirror = a_pool(vm('web', disks=BIG), vm('db')), a_shelf(), a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    pool.stop()
    pool.set_faults([slowly('http:/import', nth=1)])
    pool.start()
    with beginning(pool, shelf, 'vm-export=web', words=['restore', 'web', 'to=back']) as live:
        assert eventually(lambda: pool.calls('http:/import') or any(
            'being restored' in record['name_label'] for record in pool.dump()['VM'].values()))
        mirrored(shelf, mirror)
        assert len(mirror.journals()) == 1
        run = backup(pool, mirror, 'vm-export=db')
        assert run.exit_status == 0 and not live.is_over(), run
        pool.release()
        assert live.ending().exit_status == 0, live.output
    assert len(mirror.journals()) == 1, 'what is not known to be dead is left'


def test_what_a_dead_run_left_is_swept_from_a_store_that_was_moved_for_good_after_a_day(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf, moved = a_pool(vm('web'), vm('db')), a_shelf(), a_shelf()
    killed_at(pool, shelf, 'api:VM.set_name_label', 'after')
    assert not pool.has_no_snapshots_of_ours()
    mirrored(shelf, moved)
    assert backup(pool, moved, 'vm-export=db').exit_status == 0
    assert not pool.has_no_snapshots_of_ours()
    for name in moved.journals():
        path = moved.at(*name.split('/'))
        os.utime(path, (time.time() - 90000, time.time() - 90000))
    os.utime(moved.at('.vmbackup', 'runs', 'reserve'), (time.time() - 90000, time.time() - 90000))
    before = moved.text('.vmbackup', 'store')
    assert backup(pool, moved, 'vm-export=db').exit_status == 0
    assert pool.has_no_snapshots_of_ours() and moved.journals() == []
    assert moved.text('.vmbackup', 'store') != before, 'it has an id of its own now'


def test_hosts_with_different_files_at_one_path_miss_none_of_each_others_vms_night_after_night(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db'), hosts=TWO_HOSTS), a_shelf()
    # one of them may run more often than the other
    for host, line in [(1, 'vm-export=web'), (2, 'vm-export=db')] * 2 + [(1, 'vm-export=web')] * 2:
        assert backup(pool, shelf, line, host=host).exit_status == 0


def test_a_vm_that_dropped_out_is_missed_whichever_host_runs_the_config_from_then_on(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db'), hosts=TWO_HOSTS), a_shelf()
    assert backup(pool, shelf, 'vm-export=*', host=1).exit_status == 0
    time.sleep(1.1)
    assert backup(pool, shelf, 'vm-export=db', host=2).exit_status == 0, 'the first host may have another file there'
    for host in (1, 2, 2, 1):
        time.sleep(1.1)
        run = backup(pool, shelf, 'vm-export=db', host=host, words=['force=yes'])
        assert run.exit_status == 3 and run.says('now no config selects or excludes it'), 'hosts may take turns'


def test_what_another_host_planned_long_ago_is_an_earlier_state_of_the_config_and_what_it_missed_then_is_not_ours(
        a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db'), hosts=TWO_HOSTS), a_shelf()
    assert backup(pool, shelf, 'vm-export=*', host=2).exit_status == 0
    (name,) = shelf.names('.vmbackup', 'plans')
    plan = json.loads(shelf.text('.vmbackup', 'plans', name))
    long_ago = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(time.time() - 9 * 86400))
    with open(shelf.at('.vmbackup', 'plans', name), 'w') as file:
        json.dump(dict(plan, at=long_ago), file)
    run = backup(pool, shelf, 'vm-export=db', host=1)
    assert run.exit_status == 3 and run.says('now no config selects or excludes it'), run
    with open(shelf.at('.vmbackup', 'plans', name), 'w') as file:
        json.dump(dict(plan, at=long_ago, vms={uuid: long_ago for uuid in plan['vms']}), file)
    assert backup(pool, shelf, 'vm-export=*', host=1).exit_status == 0
    run = backup(pool, shelf, 'vm-export=db', host=1)
    assert run.exit_status == 3 and run.says('now no config selects or excludes it'), run
