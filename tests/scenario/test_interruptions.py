"""Runs that are cut off: by a signal, by SIGKILL at several points, by a server that gives out. Nothing of ours stays."""

import os
import re
import signal
import time
from typing import Any, List

import pytest

from support import warm
from support.deeds import Process, backup, beginning, hurried_backup, in_trouble, is_exporting, objects
from support.language import MEBIBYTE, at, disk, slowly, vm
from support.process import CRON_PATH, Pool, ended
from support.shelf import complete, unfinished
from support.wire import eventually

BIG = [disk(size=8 * MEBIBYTE, used=8)]

# Where a run is killed: the call that holds it there by never answering, before it has done its work or after.
POINTS = {
    'before the snapshot': ('api:VM.snapshot', ''),
    'after the snapshot, before its answer': ('api:VM.snapshot', 'after'),
    'before the snapshot has lost its token': ('api:VM.set_name_label', ''),
    'in the export': ('http:/export', ''),
    'when the first disk of the snapshot is destroyed': ('api:VDI.destroy', 'after'),
    'when the snapshot is destroyed': ('api:VM.destroy', 'after'),
    'before its interfaces are read': ('api:VIF.get_all_records_where', ''),
    'before the copy is sealed': ('api:message.get', ''),
}
DISK_POINTS = {
    'when the disk is marked': ('api:VDI.add_to_other_config', 'after'),
    'after the disk snapshot, before its answer': ('api:VDI.snapshot', 'after'),
    'when the mark of the snapshot is removed': ('api:VDI.remove_from_other_config', 'after'),
    'in the export': ('http:/export_raw_vdi', ''),
    'when the disk snapshot is destroyed': ('api:VDI.destroy', 'after'),
}


def killed_at(occasion: str, when: str, a_pool: Any, shelf: Any, *lines: str) -> Any:
    """The pool, in which a run was killed there; it serves again, without the fault."""
    pool = a_pool(vm('web', disks=2, snapshots=1), vm('db'), faults=[at(occasion, nth=1, when=when, hangs=True)])
    with beginning(pool, shelf, *lines) as process:
        assert eventually(lambda: has_come_to(pool, occasion)) or process.is_over(), process.output
        process.kill()
    pool.stop()
    pool.set_faults([])
    return pool.start()


def has_come_to(pool: Any, occasion: str) -> bool:
    """A call that hangs stands in the journal, with no answer."""
    return bool(pool.calls(occasion))


def events(pool: Any) -> Any:
    """The texts of the event list."""
    return [record['body'] for record in pool.dump()['message'].values()]


def keys_of_ours(pool: Any) -> Any:
    return [key for record in pool.dump()['VDI'].values() for key in record['other_config'] if 'vmbackup' in key]


@pytest.mark.parametrize('point', sorted(POINTS))
def test_what_a_killed_vm_export_left_is_gone_after_the_next_run(a_pool: Any, a_shelf: Any, point: str) -> None:
    shelf = a_shelf(complete('web', days_ago=2))
    pool = killed_at(POINTS[point][0], POINTS[point][1], a_pool, shelf, 'vm-export=web:4')
    good = shelf.copies('web')
    assert len(good) == 1, 'no half copy counts as good'

    run = backup(pool, shelf, 'vm-export=web:4')

    assert run.exit_status == 0, run
    assert pool.has_no_snapshots_of_ours(), run
    assert shelf.copies('web')[:-1] == good and shelf.unfinished() == []
    assert [text for text in events(pool) if 'backup' in text] == []


@pytest.mark.parametrize('point', sorted(DISK_POINTS))
def test_what_a_killed_vdi_export_left_is_gone_after_the_next_run(a_pool: Any, a_shelf: Any, point: str) -> None:
    shelf = a_shelf(complete('db', days_ago=2, kind='vdi-export'))
    pool = killed_at(DISK_POINTS[point][0], DISK_POINTS[point][1], a_pool, shelf, 'vdi-export=db:4')

    run = backup(pool, shelf, 'vdi-export=db:4')

    assert run.exit_status == 0, run
    assert pool.has_no_snapshots_of_ours() and keys_of_ours(pool) == [], run
    assert shelf.has('db', vdi_exports=2) and shelf.unfinished() == []


def test_the_next_run_of_another_config_removes_the_leftovers_too(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf()
    pool = killed_at('http:/export', '', a_pool, shelf, 'vm-export=web')
    assert not pool.has_no_snapshots_of_ours()
    run = backup(pool, shelf, words=['vm-export=db'])
    assert run.exit_status == 0 and run.says('web') and run.stderr == '', run
    assert pool.has_no_snapshots_of_ours() and shelf.unfinished() == [] and shelf.names() == ['db']
    assert shelf.journals() == []


def test_a_preview_removes_nothing_that_a_dead_run_left(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf()
    pool = killed_at('http:/export', '', a_pool, shelf, 'vm-export=web')
    before, tree = objects(pool), shelf.tree()
    assert backup(pool, shelf, 'vm-export=web', words=['preview']).exit_status == 0
    assert objects(pool) == before and shelf.tree() == tree


def test_what_a_dead_run_left_in_another_pool_is_left_to_a_run_there(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf()
    pool = killed_at('http:/export', '', a_pool, shelf, 'vm-export=web')
    other = a_pool(vm('web', uuid='00000000-0000-4000-8000-000000000009'), hosts=[{'name_label': 'elsewhere'}])
    assert backup(other, shelf, 'vm-export=web').exit_status == 0
    assert not pool.has_no_snapshots_of_ours() and len(shelf.journals()) == 1
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    assert pool.has_no_snapshots_of_ours() and shelf.journals() == []


def test_a_snapshot_that_a_user_has_made_use_of_is_reported_and_not_destroyed(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf()
    pool = killed_at('http:/export', '', a_pool, shelf, 'vm-export=web')
    session = pool.session()
    ours = [ref for ref, record in session.xenapi.VM.get_all_records().items()
            if record['is_a_snapshot'] and record['name_label'].startswith('web (backup')][0]
    drives = [session.xenapi.VBD.get_record(ref) for ref in session.xenapi.VM.get_VBDs(ours)]
    taken = [drive['VDI'] for drive in drives if drive['type'] == 'Disk'][0]
    db = session.xenapi.VM.get_by_name_label('db')[0]
    session.xenapi.VBD.create({'VM': db, 'VDI': taken, 'userdevice': '5', 'bootable': False, 'mode': 'RO', 'type': 'Disk',
                               'empty': False, 'other_config': {}, 'qos_algorithm_type': '', 'qos_algorithm_params': {}})

    run = backup(pool, shelf, words=['vm-export=db'])

    assert run.exit_status == 3 and 'db' in run.stderr and 'xe ' in run.stderr, run
    assert taken in pool.dump()['VDI']


# --- Signals ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, number', [('vm-export', signal.SIGTERM), ('vdi-export', signal.SIGTERM),
                                          ('vm-export', signal.SIGINT), ('vdi-export', signal.SIGHUP)])
def test_a_signal_in_mid_export_ends_the_run_with_128_and_its_number_and_leaves_nothing(a_pool: Any, a_shelf: Any,
                                                                                       kind: str, number: int) -> None:
    request = 'http:/export' if kind == 'vm-export' else 'http:/export_raw_vdi'
    pool = a_pool(vm('web', disks=BIG), vm('zeta'), faults=[slowly(request)])
    shelf = a_shelf(complete('web', days_ago=2), complete('zeta', kind=kind))        # the newer comes later
    before = objects(pool)
    with beginning(pool, shelf, kind + '=*') as process:
        assert eventually(lambda: 'set_is_a_template' in str(pool.calls('api:*')) or pool.calls('api:VDI.snapshot'))
        assert eventually(lambda: [path for path, value in shelf.tree().items()
                                   if '.partial/web.' in path and path.endswith(('.xva', '.raw'))])
        process.signal(number)
        run = process.ending()
    assert run.exit_status == 128 + number, run
    assert objects(pool) == before
    assert shelf.still_holds('web') and shelf.has('web', complete=1) and shelf.unfinished() == []
    assert shelf.still_holds('zeta') and shelf.names() == ['web', 'zeta'] and shelf.journals() == []
    assert signal.Signals(number).name in run.stderr and 'exit status %d.' % (128 + number) in run.stdout.splitlines()[-1]
    assert shelf.status_lines()[-1].endswith(',vmbackup.py,xcp1,end,ERROR,S:0 W:0 E:2')


def test_that_a_signal_came_is_in_the_log_before_anything_is_cleaned_up(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', disks=BIG), faults=[slowly()]), a_shelf()
    with beginning(pool, shelf, 'vm-export=web') as process:
        assert eventually(is_exporting(shelf)), process.output
        pool.process.send_signal(signal.SIGSTOP)       # so that nothing can be cleaned up
        process.signal(signal.SIGTERM)
        assert process.says('SIGTERM came: what is under way is ended'), process.output
        assert not process.is_over() and 'was stopped' not in process.output
        pool.process.send_signal(signal.SIGCONT)
        run = process.ending()
    assert run.exit_status == 143 and run.output.count('SIGTERM came') == 1, run


def test_that_a_signal_came_is_in_the_log_while_an_answer_is_waited_for(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), faults=[at('api:VM.snapshot', nth=1, hangs=True)]), a_shelf()
    with beginning(pool, shelf, 'vm-export=web') as process:           # which waits a minute for it, and is killed before
        assert eventually(lambda: pool.calls('api:VM.snapshot')), process.output
        process.signal(signal.SIGTERM)
        assert process.says('SIGTERM came: what is under way is ended'), process.output


def test_a_second_signal_does_not_stop_the_clean_up(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', disks=BIG), faults=[slowly(), at('api:VDI.destroy', sleeps=60, until='heard')])
    shelf = a_shelf()
    with beginning(pool, shelf, 'vm-export=web') as process:
        assert eventually(lambda: pool.calls('api:VM.set_is_a_template'))
        process.signal(signal.SIGTERM)
        assert eventually(lambda: pool.calls('api:VDI.get_by_uuid'))
        process.signal(signal.SIGTERM)
        process.signal(signal.SIGINT)
        pool.release('heard')                   # what came while an answer is waited for is told when that is there
        run = process.ending()
    assert run.exit_status == 143 and run.says('came during clean-up, which is finished first.'), run
    assert pool.has_no_snapshots_of_ours() and shelf.names() == []


@pytest.mark.parametrize('away', [signal.SIGKILL, signal.SIGSTOP])
def test_after_a_signal_a_pool_that_is_away_is_waited_for_a_minute_and_the_rest_left_to_the_next_run(
        a_pool: Any, a_shelf: Any, away: int) -> None:
    pool = a_pool(vm('web', disks=BIG), faults=[slowly()])
    shelf = a_shelf(complete('web', days_ago=2))
    with beginning(pool, shelf, 'vm-export=web', 'stall_timeout=1440', is_hurried=True) as process:
        assert eventually(is_exporting(shelf)), process.output
        pool.process.send_signal(signal.SIGSTOP)  # first of all, that no failed export is told before the signal
        process.signal(signal.SIGTERM)
        pool.process.send_signal(away)
        run = process.ending()
    assert run.exit_status == 143 and 'The next run tries again' in run.stderr, run
    assert len(shelf.journals()) == 1 and shelf.unfinished() == []
    if away == signal.SIGSTOP:
        pool.process.send_signal(signal.SIGCONT)
    pool.stop()
    pool.set_faults([])
    pool.start()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    assert pool.has_no_snapshots_of_ours() and shelf.journals() == []


def test_a_signal_ends_the_wait_for_an_answer_that_does_not_come_and_the_clean_up_goes_on(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', disks=2), vm('zeta', disks=BIG), faults=[at('api:VDI.destroy', nth=1, when='after', hangs=True),
                                                                    slowly(object='zeta')])
    shelf = a_shelf()
    with beginning(pool, shelf, 'vm-export=*', 'stall_timeout=1440', is_hurried=True) as process:
        assert eventually(lambda: pool.calls('api:VDI.destroy')), process.output
        process.signal(signal.SIGTERM)
        run = process.ending()
    assert run.exit_status == 143, run
    assert pool.has_no_snapshots_of_ours() and shelf.journals() == []


@pytest.mark.parametrize('action', ['list', 'preview'])
def test_ctrl_c_ends_what_changes_nothing_at_once_while_the_pool_is_silent(a_pool: Any, a_shelf: Any, action: str) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf(complete('web'))
    pool.process.send_signal(signal.SIGSTOP)
    try:
        with beginning(pool, shelf, 'vm-export=web', words=[action]) as process:
            assert action != 'list' or process.says('backup-'), process.output
            assert process.has_begun(), process.output
            time.sleep(1)
            process.signal(signal.SIGINT)
            assert process.ending(15).exit_status == 130                # before the logout is given up, after 20 s
    finally:
        pool.process.send_signal(signal.SIGCONT)


def test_a_run_under_nohup_is_not_ended_by_a_hangup(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', disks=BIG), faults=[slowly()])
    shelf = a_shelf()
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with beginning(pool, shelf, 'vm-export=web') as process:
            assert eventually(shelf.unfinished)
            process.signal(signal.SIGHUP)
            pool.release()
            assert process.ending().exit_status == 0
    finally:
        signal.signal(signal.SIGHUP, earlier)
    assert shelf.has('web', complete=1)


# --- Servers, xe and streams that give out ----------------------------------------------------------------------------

BREAKDOWNS = {
    'the export breaks off': at('http:/export', nth=1, breaks_off_after=MEBIBYTE + 512),
    'the export ends early and says success': at('http:/export', nth=1, breaks_off_after=MEBIBYTE + 512, silent=True),
    'the last byte is another one': at('http:/export', nth=1, flips=-1),
    'xe says a failure and exits 0': at('xe:vm-export', nth=2, exit=0, stderr='Error: Lost connection to the server\n'),
    'xe exits 1 after a whole stream': at('xe:vm-export', nth=2, exit=1, stderr='The server failed to export'),
    'xe is killed halfway': at('xe:vm-export', nth=2, kill='xe'),
    'the metadata export fails': at('xe:vm-export', nth=1, exit=1, stderr='no metadata'),
    'the snapshot is refused': at('api:VM.snapshot', nth=1, fails=['SR_BACKEND_FAILURE_44', '', 'There is no space', '']),
    'the answer of the snapshot is a bug of the server': at('api:VM.snapshot', nth=1, fails=['INTERNAL_ERROR', 'x']),
    'the snapshot can not be prepared': at('api:VM.set_is_a_template', nth=1, fails=['INTERNAL_ERROR', 'x']),
}


@pytest.mark.parametrize('what', sorted(BREAKDOWNS))
def test_one_vms_breakdown_stays_that_vms_and_costs_no_earlier_copy(a_pool: Any, a_shelf: Any, what: str) -> None:
    pool = a_pool(vm('web'), vm('zeta'), faults=[BREAKDOWNS[what]])
    shelf = a_shelf(complete('web', days_ago=3), complete('web', days_ago=2), complete('zeta', days_ago=1))
    run = backup(pool, shelf, 'vm-export=*', 'max_backups=2')
    assert pool.has_no_snapshots_of_ours() and shelf.unfinished() == []
    assert shelf.has('zeta', complete=2)
    if run.exit_status == 3:
        assert 'second try' in run.stderr and shelf.has('web', complete=2)
    else:
        assert run.exit_status == 1 and 'error: web' in run.stderr, run
        assert shelf.still_holds('web') and shelf.has('web', complete=2)
        assert 'not: web' in run.stdout.splitlines()[-1]


@pytest.mark.parametrize('code', ['OTHER_OPERATION_IN_PROGRESS', 'SR_BACKEND_FAILURE_46', 'SR_BACKEND_FAILURE_47',
                                  'SR_BACKEND_FAILURE_82', 'SR_BACKEND_FAILURE_1200'])
def test_a_reason_that_passes_is_tried_once_more_at_the_end_of_the_queue(a_pool: Any, a_shelf: Any, code: str) -> None:
    pool = a_pool(vm('web'), vm('zeta'), faults=[at('api:VM.snapshot', nth=1, fails=[code, '', 'busy', ''])])
    shelf = a_shelf()
    run = backup(pool, shelf, 'vm-export=*')
    assert run.exit_status == 3 and 'second try' in run.stderr
    assert shelf.has('web', complete=1) and shelf.has('zeta', complete=1)
    assert [line.split(',', 1)[1] for line in shelf.status_lines()][1:] == [
        'vm-export,xcp1,begin,web', 'vm-export,xcp1,end,RETRY web', 'vm-export,xcp1,begin,zeta',
        'vm-export,xcp1,end,SUCCESS zeta,elapse:0 size:0G', 'vm-export,xcp1,begin,web',
        'vm-export,xcp1,end,SUCCESS web,elapse:0 size:0G', 'vmbackup.py,xcp1,end,WARNING,S:2 W:1 E:0']


@pytest.mark.parametrize('said', ['Unix.Unix_error(Unix.ECONNRESET, "read", "")', 'The SR backend failed: SR_BACKEND_FAILURE_1200 [  ]'])
def test_what_xe_says_of_a_reason_that_passes_gives_a_second_try(a_pool: Any, a_shelf: Any, said: str) -> None:
    pool, shelf = a_pool(vm('web'), faults=[at('xe:vm-export', nth=2, exit=1, stderr=said)]), a_shelf()
    run = backup(pool, shelf, 'vm-export=web')
    assert run.exit_status == 3 and 'second try' in run.stderr and shelf.has('web', complete=1), run


@pytest.mark.parametrize('answer', [{'drops': True}, {'fails': ['INTERNAL_ERROR', 'x']}])
def test_a_poll_of_an_sr_without_an_answer_does_not_cost_a_healthy_export(a_pool: Any, a_shelf: Any, answer: Any) -> None:
    polls = [at('api:SR.get_record', nth=number, **answer) for number in range(2, 6)]
    pool = a_pool(vm('web', disks=BIG), faults=[at('http:/export', runs_at=3 * MEBIBYTE)] + polls)
    shelf = a_shelf()
    run = hurried_backup(pool, shelf, 'vm-export=web', 'min_sr_free=1')
    assert run.exit_status == 0 and shelf.has('web', complete=1), run
    assert len(pool.calls('api:SR.get_record')) > 1, 'it was asked in the export'


def test_a_reason_that_does_not_pass_fails_the_second_time_too(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web'), faults=[at('api:VM.snapshot', fails=['OTHER_OPERATION_IN_PROGRESS', 'VM', 'x'])])
    shelf = a_shelf()
    run = backup(pool, shelf, 'vm-export=web')
    assert run.exit_status == 1 and len(pool.calls('api:VM.snapshot')) == 2
    assert shelf.names() == []


@pytest.mark.parametrize('call', ['VM.snapshot', 'VDI.snapshot'])
def test_a_snapshot_whose_answer_was_lost_is_found_and_used_and_no_second_one_is_made(a_pool: Any, a_shelf: Any,
                                                                                     call: str) -> None:
    pool = a_pool(vm('web', disks=2), faults=[at('api:' + call, nth=1, when='after', drops=True)])
    shelf = a_shelf()
    run = backup(pool, shelf, ('vm-export' if call == 'VM.snapshot' else 'vdi-export') + '=web')
    assert run.exit_status == 0, run
    assert len(pool.calls('api:' + call)) == 1
    assert shelf.has('web', complete=1) and pool.has_no_snapshots_of_ours() and keys_of_ours(pool) == []


def test_a_snapshot_that_can_not_be_removed_is_told_with_its_uuid_and_removed_by_the_next_run(a_pool: Any,
                                                                                             a_shelf: Any) -> None:
    pool = a_pool(vm('web'), faults=[at('api:VM.destroy', fails=['INTERNAL_ERROR', 'not now'])])
    shelf = a_shelf()
    run = backup(pool, shelf, 'vm-export=web')
    left = [record['uuid'] for record in pool.dump()['VM'].values() if record['is_a_snapshot']]
    assert run.exit_status == 3 and shelf.has('web', complete=1), run
    assert len(left) == 1 and 'uuid=' + left[0] in run.stderr and 'xe ' in run.stderr
    pool.stop()
    pool.set_faults([])
    pool.start()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    assert pool.has_no_snapshots_of_ours() and shelf.journals() == []


def test_a_journal_that_was_torn_by_a_power_failure_is_read_as_far_as_it_goes(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf()
    pool = killed_at('http:/export', '', a_pool, shelf, 'vm-export=web')
    path = shelf.at(shelf.journals()[0])
    with open(path, 'ab') as file:
        file.write(b'{"entry": 1, "closed": "rem')
    run = backup(pool, shelf, words=['vm-export=db'])
    assert run.exit_status == 0 and pool.has_no_snapshots_of_ours(), run


def test_leftovers_on_the_shelf_alone_are_removed_and_said_and_the_exit_status_stays_0(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(complete('web', days_ago=3), unfinished('web', days_ago=2), unfinished('web', days_ago=1, ending='.deleting'))
    pool = a_pool(vm('web'))
    run = backup(pool, shelf, 'vm-export=web')
    assert run.exit_status == 0 and run.stdout.count('left by a run that died') == 2 and run.stderr == ''
    assert shelf.unfinished() == [] and shelf.has('web', complete=2)


# --- a store that hangs while somebody wants the run to end ------------------------------------------------------------

ROUNDS = '.vmbackup/rounds'     # where the steps differ from night to night, as older rounds are removed


def steps_before(pool: Pool, shelf: Any, wanted: str, *lines: str) -> int:
    """How many steps of the storage the second backup does before the first that reads so: the first makes more."""
    assert backup(pool, shelf, *lines).exit_status == 0
    trace = os.path.join(pool.home, 'trace')
    assert ended(warm.start(in_trouble(pool, store=shelf.path, trace=trace, apart=ROUNDS) + ['-', shelf.config(*lines)],
                            pool.environment())).exit_status == 0
    with open(trace) as file:
        return [bool(re.match(wanted, line)) for line in file].index(True)


@pytest.mark.parametrize('line', ['vm-export=web', 'vdi-export=web'])
@pytest.mark.parametrize('where', [r'write web/.*web\.(xva|raw)$', r'write web/.*vdi\.cfg$'])
def test_a_signal_while_the_store_hangs_still_clears_the_pool_and_ends_the_run(a_pool: Any, a_shelf: Any, line: str,
                                                                              where: str) -> None:
    pool, shelf = a_pool(vm('web', disks=[disk(size=8 * MEBIBYTE, used=8)])), a_shelf()
    step = steps_before(pool, shelf, where, line, 'stall_timeout=1440') + 1
    began = len(pool.calls('api:V*.snapshot'))
    trace = os.path.join(pool.home, 'trace of the run that hangs')
    process = Process(['-', shelf.config(line, 'stall_timeout=1440')], pool.environment(),
                      in_trouble(pool, store=shelf.path, trace=trace, apart=ROUNDS, step=step, do='hang', stays=True,
                                 hurried=True))
    assert eventually(lambda: os.path.exists(trace) and len(lines_of(trace)) >= step), process.output
    assert len(pool.calls('api:V*.snapshot')) > began, process.output
    process.signal(signal.SIGTERM)
    assert eventually(lambda: pool.has_no_snapshots_of_ours()), process.output
    run = process.ending()
    assert run.exit_status == 128 + signal.SIGTERM and run.never_says('Traceback'), run


@pytest.mark.parametrize('where', [r'rename web/backup-[-0-9]*$', r'unlink web/.*\.deleting/'])
def test_a_signal_while_the_store_hangs_in_pruning_ends_the_run_and_the_new_copy_stands(a_pool: Any, a_shelf: Any,
                                                                                       where: str) -> None:
    pool, shelf, lines = a_pool(vm('web')), a_shelf(), ('vm-export=web', 'max_backups=1', 'stall_timeout=1440')
    step = steps_before(pool, shelf, where, *lines) + 1
    trace = os.path.join(pool.home, 'trace of the run that hangs')
    process = Process(['-', shelf.config(*lines)], pool.environment(),
                      in_trouble(pool, store=shelf.path, trace=trace, apart=ROUNDS, step=step, do='hang', stays=True,
                                 hurried=True))
    assert eventually(lambda: os.path.exists(trace) and len(lines_of(trace)) >= step), process.output
    process.signal(signal.SIGTERM)
    run = process.ending()
    assert run.exit_status == 128 + signal.SIGTERM and 'older copies were not pruned' in run.stderr, run
    assert '1 VM backed up' in run.stdout and pool.has_no_snapshots_of_ours(), run


def lines_of(path: str) -> List[str]:
    with open(path) as file:
        return file.readlines()


@pytest.mark.parametrize('action, where', [('', 'BACKUPS'), ('preview', 'BACKUPS')] + [
    (action, where) for action in ('list', 'verify', 'prune', 'prune preview', 'list format=json') for where in ('BACKUPS', 'backup.json')])
def test_a_signal_ends_what_opens_or_reads_a_store_that_hangs(a_shelf: Any, action: str, where: str) -> None:
    """The store hangs when it is opened, or when the first copy is looked at."""
    shelf = a_shelf(complete('web', days_ago=2), complete('web', days_ago=1))
    process = Process(['-', shelf.config('vm-export=web:1')] + action.split(), {'PATH': CRON_PATH},
                      in_trouble(shelf, at=[where], do='hang', hurried=True))
    assert process.has_begun(), process.output
    process.signal(signal.SIGTERM)
    run = process.ending()
    assert run.exit_status == 128 + signal.SIGTERM and run.says('stopped by SIGTERM') and run.never_says('removed'), run
    assert shelf.has('web', complete=2)
