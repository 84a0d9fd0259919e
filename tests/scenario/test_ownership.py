"""What is ours in the pool goes, also where run and server died together; what only looks like ours stays."""

import json
import os
import signal
from typing import Any, Callable, Dict, List

import pytest

from support.deeds import backup, beginning, hurried_backup, preview
from support.language import MEBIBYTE, at, disk, slowly, vm
from support.recovery import killed_at, serving
from support.shelf import complete, of_old_program
from support.wire import eventually

BIG = [disk(size=8 * MEBIBYTE, used=8)]
MARKED = at('api:VDI.add_to_other_config', nth=1, when='after', sleeps=60, until='enough')


def keys_of_ours(pool: Any) -> List[str]:
    return [key for record in pool.dump()['VDI'].values() for key in record['other_config'] if 'vmbackup' in key]


def another_tools_snapshot(pool: Any) -> str:
    """The ref of a disk snapshot that somebody else has just made of web's disk; what waits for that goes on."""
    api = pool.session().xenapi
    disks = [ref for ref, record in api.VDI.get_all_records().items() if not record['is_a_snapshot']]
    assert len(disks) == 1
    snapshot = api.VDI.snapshot(disks[0], {})
    api.VDI.set_name_label(snapshot, 'base of the next delta')
    pool.release()
    return snapshot


def is_untouched(pool: Any, snapshot: str) -> bool:
    """It is there, alone, and bears nothing of ours; nor does the disk."""
    disks = pool.dump()['VDI']
    return snapshot in disks and keys_of_ours(pool) == [] \
        and [ref for ref, record in disks.items() if record['is_a_snapshot']] == [snapshot]


def killed_when(pool: Any, shelf: Any, has_come: Callable[[], Any]) -> None:
    """A vdi-export of web was killed at that moment."""
    with beginning(pool, shelf, 'vdi-export=web') as process:
        assert eventually(has_come), process.output
        process.kill()


# --- how much of a pool is asked for ---------------------------------------------------------------------------------------

def test_the_snapshot_of_a_disk_costs_no_look_at_the_other_disks_of_its_sr(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db', disks=[disk(userdevice=str(number)) for number in range(8)])), a_shelf()
    run = backup(pool, shelf, 'vdi-export=*')
    assert run.exit_status == 0 and keys_of_ours(pool) == [] and pool.has_no_snapshots_of_ours(), run
    queries = [entry['args'][-1] for entry in pool.calls('api:VDI.get_all_records_where')]
    assert len(queries) == 2 * 2 and all('"snapshot_of"' in query for query in queries), queries
    assert len(pool.calls('api:VDI.get_all_records')) == 1       # that of the inventory


def test_a_preview_reads_a_pool_of_any_size_in_nine_calls(a_pool: Any, a_shelf: Any) -> None:
    for size in (1, 150):
        pool = a_pool(*(vm('vm%d' % number, disks=2) for number in range(size)))
        run = preview(pool, a_shelf(), 'vm-export=*')
        assert run.exit_status == 0 and run.says('%d VM' % size), run
        calls = [entry['call'] for entry in pool.calls('api:*') if entry['call'].split('.')[1].startswith('get')]
        assert calls == ['session.get_this_host'] + [name + '.get_all_records' for name in (
            'pool', 'host', 'VM', 'VBD', 'VDI', 'SR', 'VIF', 'network')], calls


# --- disk snapshots of others that copied our key -------------------------------------------------------------------------

def test_a_snapshot_made_while_a_dead_runs_mark_stood_is_not_ours(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), faults=[at('api:VDI.add_to_other_config', nth=1, when='after', hangs=True)]), a_shelf()
    killed_when(pool, shelf, lambda: keys_of_ours(pool))
    serving(pool)
    theirs = another_tools_snapshot(pool)
    run = backup(pool, shelf, 'vdi-export=web')
    assert run.exit_status == 0 and shelf.has('web', complete=1), run
    assert is_untouched(pool, theirs) and shelf.journals() == []


@pytest.mark.parametrize('code', ['OTHER_OPERATION_IN_PROGRESS', 'SR_BACKEND_FAILURE_44', 'INTERNAL_ERROR'])
def test_a_snapshot_of_others_survives_a_call_of_ours_that_was_refused(a_pool: Any, a_shelf: Any, code: str) -> None:
    pool = a_pool(vm('web'), faults=[MARKED, at('api:VDI.snapshot', nth=2, fails=[code, '', 'no', '']),
                                     at('api:VDI.snapshot', nth=3, fails=[code, '', 'no', ''])])
    shelf = a_shelf()
    with beginning(pool, shelf, 'vdi-export=web') as process:
        assert eventually(lambda: keys_of_ours(pool)), process.output
        theirs = another_tools_snapshot(pool)
        run = process.ending()
    assert run.exit_status == 1, run
    assert is_untouched(pool, theirs) and shelf.journals() == []


def test_a_snapshot_of_others_loses_the_mark_when_ours_is_known(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), faults=[MARKED]), a_shelf()
    with beginning(pool, shelf, 'vdi-export=web') as process:
        assert eventually(lambda: keys_of_ours(pool)), process.output
        theirs = another_tools_snapshot(pool)
        run = process.ending()
    assert run.exit_status == 0 and shelf.has('web', complete=1), run
    assert is_untouched(pool, theirs)


def test_a_snapshot_of_others_is_not_taken_for_that_of_a_call_that_never_arrived(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web'), faults=[at('api:VDI.snapshot', nth=1, drops=True)])
    shelf = a_shelf()
    with beginning(pool, shelf, 'vdi-export=web') as process:
        assert eventually(lambda: pool.calls('api:VDI.get_current_operations')), process.output
        assert eventually(lambda: 'seen_idle' in journal_of(shelf)), process.output
        theirs = another_tools_snapshot(pool)
        run = process.ending()
    assert run.exit_status == 3 and shelf.has('web', complete=1), run          # its second try
    assert is_untouched(pool, theirs) and 'xe vdi-destroy uuid=' in run.stderr


def test_of_two_that_may_be_ours_none_is_destroyed_and_both_are_told(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), faults=[at('api:VDI.snapshot', nth=1, when='after', hangs=True)]), a_shelf()
    killed_when(pool, shelf, lambda: snapshots_of(pool))
    serving(pool)
    another_tools_snapshot(pool)
    both = snapshots_of(pool)
    run = backup(pool, shelf, 'vdi-export=web')
    assert run.exit_status == 3 and shelf.has('web', complete=1), run
    assert len(both) == 2 and set(both) == set(snapshots_of(pool)) and keys_of_ours(pool) == []
    assert all('xe vdi-destroy uuid=' + uuid in run.stderr for uuid in both.values())


def test_a_snapshot_made_long_after_the_call_is_not_ours(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), faults=[at('api:VDI.snapshot', nth=1, when='after', hangs=True)]), a_shelf()
    killed_when(pool, shelf, lambda: snapshots_of(pool))
    serving(pool)
    path = shelf.at(shelf.journals()[0])
    with open(path) as file:
        lines = [json.loads(line) for line in file]
    with open(path, 'w') as file:
        for line in lines:
            if 'calling_at' in line:
                line['calling_at'] = '2016-04-14T00:10:00Z'
            file.write(json.dumps(line) + '\n')
    left = snapshots_of(pool)
    run = backup(pool, shelf, 'vdi-export=web')
    assert run.exit_status == 3 and snapshots_of(pool) == left and keys_of_ours(pool) == [], run
    assert all('xe vdi-destroy uuid=' + uuid in run.stderr for uuid in left.values())


def test_when_ours_is_gone_already_another_with_the_mark_is_left(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web'), faults=[MARKED, at('api:VDI.destroy', nth=1, when='after', hangs=True)])
    shelf = a_shelf()
    with beginning(pool, shelf, 'vdi-export=web') as process:
        assert eventually(lambda: keys_of_ours(pool)), process.output
        theirs = another_tools_snapshot(pool)
        assert eventually(lambda: pool.calls('api:VDI.destroy')), process.output
        process.kill()
    serving(pool)
    assert backup(pool, shelf, words=['vdi-export=web']).exit_status == 0
    assert is_untouched(pool, theirs) and shelf.journals() == []


def snapshots_of(pool: Any) -> Dict[str, str]:
    """All disk snapshots: ref -> uuid."""
    return {ref: record['uuid'] for ref, record in pool.dump()['VDI'].items() if record['is_a_snapshot']}


def journal_of(shelf: Any) -> str:
    """What the journals of all runs say now."""
    text = ''
    for name in shelf.journals():
        with open(shelf.at(name)) as file:
            text += file.read()
    return text


# --- a server that died in the middle leaves a drive on its control domain ---------------------------------------------------

def died_together(a_pool: Any, shelf: Any, kind: str) -> Any:
    """The pool, which serves again after it and a run were killed in the middle of an export."""
    request = {'vm-export': 'http:/export', 'vdi-export': 'http:/export_raw_vdi'}[kind]
    pool = a_pool(vm('web', disks=BIG), faults=[slowly(request, nth=1)])
    with beginning(pool, shelf, kind + '=web') as process:
        assert eventually(lambda: [path for path in shelf.tree() if '.partial/web.' in path]), process.output
        assert eventually(lambda: drives_of_hosts(pool)), process.output
        # held first, so that it does not notice that its client is gone
        pool.process.send_signal(signal.SIGSTOP)
        process.kill()
        pool.process.kill()
    serving(pool)
    assert len(drives_of_hosts(pool)) == 1, 'the server does not clear it up'
    return pool


def drives_of_hosts(pool: Any) -> Dict[str, Dict[str, Any]]:
    """The VBDs of control domains: ref -> record."""
    objects = pool.dump()
    return {ref: record for ref, record in objects['VBD'].items() if objects['VM'][record['VM']]['is_control_domain']}


@pytest.mark.parametrize('kind', ['vm-export', 'vdi-export'])
def test_what_a_server_that_died_in_the_export_left_attached_is_detached_and_destroyed(a_pool: Any, a_shelf: Any,
                                                                                      kind: str) -> None:
    shelf = a_shelf(complete('web', days_ago=2))
    pool = died_together(a_pool, shelf, kind)
    run = backup(pool, shelf, kind + '=web', time_limit_s=150)            # a drive of which nothing is known takes 180 s
    assert run.exit_status == 0, run
    assert drives_of_hosts(pool) == {} and pool.has_no_snapshots_of_ours() and keys_of_ours(pool) == []
    assert shelf.journals() == [] and shelf.still_holds('web')


def test_a_drive_of_which_no_task_is_known_is_detached_after_waiting(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf()
    pool = died_together(a_pool, shelf, 'vm-export')
    pool.session().xenapi.VBD.remove_from_other_config(list(drives_of_hosts(pool))[0], 'task_id')
    run = hurried_backup(pool, shelf, 'vm-export=web')
    assert run.exit_status == 0, run
    assert drives_of_hosts(pool) == {} and pool.has_no_snapshots_of_ours()
    assert len(pool.calls('api:VDI.destroy')) > 3, 'it waited first'


@pytest.mark.parametrize('kind, call', [('vm-export', 'api:VM.destroy'), ('vdi-export', 'api:VDI.destroy')])
def test_a_pool_that_takes_its_time_is_waited_for_as_long_as_stall_timeout_says(a_pool: Any, a_shelf: Any, kind: str,
                                                                                call: str) -> None:
    pool, shelf = a_pool(vm('web', disks=BIG), faults=[at(call, sleeps=14)]), a_shelf()
    run = hurried_backup(pool, shelf, kind + '=web', 'stall_timeout=60')
    assert run.exit_status == 0 and pool.has_no_snapshots_of_ours() and shelf.journals() == [], run
    assert shelf.has('web', complete=1) and len(pool.calls(call)) == 1


@pytest.mark.parametrize('kind', ['vm-export', 'vdi-export'])
def test_a_drive_that_the_server_will_not_let_go_is_told_with_commands_that_work(a_pool: Any, a_shelf: Any, kind: str) -> None:
    shelf = a_shelf()
    pool = died_together(a_pool, shelf, kind)
    serving(pool, at('api:VBD.unplug', fails=['DEVICE_DETACH_REJECTED', 'VBD', 'OpaqueRef:x', 'busy']))
    run = hurried_backup(pool, shelf, kind + '=web')
    assert run.exit_status == 3 and shelf.has('web', complete=1) and len(shelf.journals()) == 1, run
    assert len(drives_of_hosts(pool)) == 1
    serving(pool)
    line = [line for line in run.stderr.splitlines() if 'by hand: ' in line][0]
    commands = line.split('by hand: ')[1].rstrip('.').split('; then ')
    assert [command.split()[1] for command in commands[:3]] == ['vbd-unplug', 'vbd-destroy', 'vdi-destroy'], commands
    for command in commands:
        done = pool.xe(*command.split()[1:])
        assert done.exit_status == 0, (command, done)
    assert drives_of_hosts(pool) == {} and pool.has_no_snapshots_of_ours()
    assert backup(pool, shelf, kind + '=web').exit_status == 0 and shelf.journals() == []


def test_a_drive_of_a_task_that_is_at_work_is_left(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf()
    pool = died_together(a_pool, shelf, 'vdi-export')
    api = pool.session().xenapi
    drive = list(drives_of_hosts(pool))[0]
    api.VBD.remove_from_other_config(drive, 'task_id')
    api.VBD.add_to_other_config(drive, 'task_id', api.task.create('somebody reads it', ''))
    run = hurried_backup(pool, shelf, 'vdi-export=web')
    assert run.exit_status == 3 and list(drives_of_hosts(pool)) == [drive], run
    assert pool.never_saw('api:VBD.unplug')


# --- what restores make ---------------------------------------------------------------------------------------------------------

def test_a_clone_of_a_disk_that_a_dead_restore_made_is_not_ours(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(of_old_program())
    pool = a_pool(vm('db'), srs=[{'name_label': 'here'}])
    name = sorted(name for name in os.listdir(shelf.at('PROD-web')) if name.startswith('backup-'))[2]
    os.unlink(shelf.at('PROD-web', name, 'vm-metadata.xml'))           # then it is rebuilt by API calls, disk and all
    with open(shelf.at('PROD-web', name, 'vm.cfg'), 'w') as file:
        file.write('name_label=PROD-web\nname_description=\nmemory_dynamic_max=268435456\nVCPUs_max=2\n'
                   'VCPUs_at_startup=1\nos_version=\norig_uuid=09383cc3-9408-98b4-bdf4-8a0d84e4be8e\n')
    killed_at(pool, shelf, 'api:VBD.create', '', 'restore', 'PROD-web', 'from=' + name, 'sr=here')
    made = [ref for ref, record in pool.dump()['VDI'].items() if any('vmbackup' in key for key in record['other_config'])]
    assert len(made) == 1
    theirs = pool.session().xenapi.VDI.clone(made[0], {})
    run = backup(pool, shelf, 'vm-export=db')
    disks = pool.dump()['VDI']
    assert run.exit_status == 0 and made[0] not in disks, run
    assert theirs in disks and keys_of_ours(pool) == [] and shelf.journals() == []


def test_what_a_server_that_died_in_an_import_left_attached_is_detached_and_destroyed(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', disks=BIG)), a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    before = set(pool.dump()['VDI'])
    serving(pool, at('http:/import', nth=1, rate=MEBIBYTE // 8))
    with beginning(pool, shelf, 'vm-export=web', words=['restore', 'web', 'to=back']) as process:
        assert eventually(lambda: drives_of_hosts(pool)), process.output
        pool.process.send_signal(signal.SIGSTOP)        # as above
        process.kill()
        pool.process.kill()
    serving(pool)
    assert drives_of_hosts(pool)
    run = backup(pool, shelf, 'vm-export=web', time_limit_s=150)
    assert run.exit_status == 0, run
    assert drives_of_hosts(pool) == {} and set(pool.dump()['VDI']) == before and shelf.journals() == []
