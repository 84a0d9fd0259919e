"""A run becomes words: numbers, exit status, summary, status lines, preview."""

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.values import (GIBIBYTE, NIGHT, US_UUID, a_copy, a_disk, a_report, a_vm, an_inventory, an_outcome, configured, planned,
                            vms)
from VmBackup import (UNTRIED, CatalogError, ExitStatus, Finding, Method, Outcome, PoolError, Rules, Services, Severity, StatusLog,
                      first_disk, future_verdicts, preview_text, judge, next_sequence, summary_text)
from unit.test_retention import shelves

WARNING = Finding(Severity.WARNING, 'web', 'something worth a look.')
INFO = Finding(Severity.INFO, 'web', 'nothing to worry about.')


def status_of(report):
    return report.exit_status


def numbers_of(report):
    untried = sum(1 for outcome in report.outcomes if outcome.status_word == UNTRIED)
    return report.successes, report.warnings, report.errors, untried


def plan_of(number=2):
    return planned('vm-export=*\n', *vms(*['web', 'db', 'mail'][:number]))


def all_good(plan):
    return [an_outcome(job) for job in plan.jobs]


# --- exit status -----------------------------------------------------------------------------------------------------

def test_all_done_is_0():
    plan = plan_of()
    assert status_of(a_report(plan, *all_good(plan), findings=(INFO,))) == ExitStatus.OK
    assert numbers_of(a_report(plan, *all_good(plan))) == (2, 0, 0, 0)


def test_a_vm_that_failed_is_1_whatever_else_went_well():
    plan = plan_of()
    run = a_report(plan, an_outcome(plan.jobs[0], 'no space left'), an_outcome(plan.jobs[1]), findings=(WARNING,))
    assert status_of(run) == ExitStatus.FAILED
    assert numbers_of(run) == (1, 1, 1, 0)


def test_a_vm_that_the_run_did_not_come_to_is_an_error():
    plan = plan_of(3)
    run = a_report(plan, an_outcome(plan.jobs[0]), ended_by=PoolError('the pool went away'))
    assert numbers_of(run) == (1, 0, 2, 2)
    assert status_of(run) == ExitStatus.FAILED


def test_a_selected_vm_that_is_not_in_the_pool_is_an_error():
    plan = planned('vm-export=web\nvm-export=gone\n', *vms('web'))
    run = a_report(plan, *all_good(plan), findings=plan.findings)
    assert status_of(run) == ExitStatus.FAILED
    assert 'gone' in summary_text(run)


def test_a_pool_database_that_was_not_dumped_is_an_error():
    plan = plan_of()
    run = a_report(plan, *all_good(plan), dump_error='no space left')
    assert status_of(run) == ExitStatus.FAILED
    assert 'pool database' in summary_text(run)


def test_a_run_that_ended_early_is_never_0():
    for plan in (plan_of(), planned('pool_db_backup=1\n')):
        assert status_of(a_report(plan, *all_good(plan), ended_by=CatalogError('the share went away'))) == ExitStatus.FAILED


def test_all_done_with_a_warning_is_3():
    plan = plan_of()
    assert status_of(a_report(plan, *all_good(plan), findings=(WARNING, INFO))) == ExitStatus.WARNING


def test_a_bug_is_70_even_if_all_is_done():
    plan = plan_of()
    assert status_of(a_report(plan, *all_good(plan), ended_by=KeyError())) == ExitStatus.BUG


@given(st.lists(st.sampled_from(['good', 'bad', 'untried'])), st.lists(st.sampled_from([WARNING, INFO])), st.booleans())
def test_the_exit_status_is_0_exactly_if_every_job_succeeded_without_a_warning(ends, findings, has_dump_error):
    plan = planned('vm-export=*\n', *[a_vm('vm%d' % number, number) for number in range(1, len(ends) + 1)])
    outcomes = [an_outcome(job, None if end == 'good' else 'it broke') for job, end in zip(plan.jobs, ends) if end != 'untried']
    run = a_report(plan, *outcomes, findings=tuple(findings), dump_error='no space' if has_dump_error else None)
    is_clean = set(ends) <= {'good'} and WARNING not in findings and not has_dump_error
    assert (status_of(run) == ExitStatus.OK) is is_clean
    assert run.successes + run.errors == len(ends) + has_dump_error
    assert run.word == {0: 'SUCCESS', 1: 'ERROR', 3: 'WARNING'}[status_of(run)]


def test_the_exit_statuses_are_those_that_the_help_promises():
    assert {status.name: int(status) for status in ExitStatus} == {
        'OK': 0, 'FAILED': 1, 'USAGE': 2, 'WARNING': 3, 'POOL': 4, 'LOCKED': 5, 'BUG': 70}


# --- summary ---------------------------------------------------------------------------------------------------------

def test_the_summary_is_one_line_that_names_what_is_missing_and_the_exit_status():
    plan = plan_of(3)
    run = a_report(plan, an_outcome(plan.jobs[0]), an_outcome(plan.jobs[1], 'no space left\non the share'), findings=(WARNING,))
    text = summary_text(run)
    assert text.startswith('ERROR: 1 VM backed up (1.0 GiB in 1 h 0 min); 2 not: db, mail; 1 warning')
    assert text.endswith('exit status 1.') and '\n' not in text


def test_the_summary_of_a_good_run_says_success():
    plan = plan_of()
    run = a_report(plan, *all_good(plan))
    assert summary_text(run) == 'SUCCESS: 2 VMs backed up (2.0 GiB in 1 h 0 min); exit status 0.'


# --- the status log --------------------------------------------------------------------------------------------------

def ended(what, name, error=None, word='SUCCESS', seconds=1.0, size_bytes=1):
    return Outcome(what, US_UUID, name, name, error, word, seconds=seconds, size_bytes=size_bytes)


class Clock:
    def local(self):
        return datetime(2016, 1, 29, 10, 33, 49)


class Log:
    def __init__(self):
        self.lines = []

    def info(self, sentence):
        self.lines.append(sentence)


def a_status_log(path, log=None):
    status_log = StatusLog(Services(configured('status_log=%s' % path), Clock(), log or Log(), None))
    status_log.host = 'xcp1'
    return status_log


def written(path, deed):
    status_log = a_status_log(path)
    deed(status_log)
    return path.read_text(encoding='utf-8')


def test_the_status_lines_are_those_of_the_older_program(tmp_path):
    def deed(status_log):
        status_log.begin('vmbackup.py')
        status_log.begin('vm-export', 'web')
        status_log.end(ended('vm-export', 'web', seconds=754.2, size_bytes=5 * GIBIBYTE + 1))
        status_log.begin('vdi-export', 'File server 1')
        status_log.end(ended('vdi-export', 'File server 1', 'no space', 'SNAPSHOT-FAIL'))
        plan = plan_of(2)
        status_log.end_run(a_report(plan, an_outcome(plan.jobs[0]), an_outcome(plan.jobs[1], 'no space')))
    assert written(tmp_path / 'status.log', deed).splitlines() == [
        '2016/01/29 10:33:49,vmbackup.py,xcp1,begin',
        '2016/01/29 10:33:49,vm-export,xcp1,begin,web',
        '2016/01/29 10:33:49,vm-export,xcp1,end,SUCCESS web,elapse:12 size:5G',
        '2016/01/29 10:33:49,vdi-export,xcp1,begin,File server 1',
        '2016/01/29 10:33:49,vdi-export,xcp1,end,SNAPSHOT-FAIL File server 1',
        '2016/01/29 10:33:49,vmbackup.py,xcp1,end,ERROR,S:1 W:0 E:1']


def test_status_lines_are_appended(tmp_path):
    path = tmp_path / 'status.log'
    path.write_text('earlier\n')
    assert written(path, lambda status_log: status_log.begin('vmbackup.py')).startswith('earlier\n2016/')


@given(st.text(st.characters(blacklist_categories=('Cs',))))
def test_a_name_never_breaks_a_status_line(name):
    lines = []
    status_log = a_status_log('/nowhere')
    status_log._line = lambda what, rest, host='': lines.append('%s,%s' % (what, rest))
    status_log.begin('vm-export', name)
    status_log.end(ended('vm-export', name))
    status_log.end(ended('vm-export', name, 'it broke', 'VM-EXPORT-FAIL'))
    assert all(line.isprintable() for line in lines)


def test_a_status_log_without_a_directory_is_said_once_and_stops_nothing(tmp_path):
    log = Log()
    status_log = a_status_log(tmp_path / 'missing' / 'status.log', log)
    status_log.begin('vmbackup.py')
    status_log.end_run(a_report(plan_of(0)))
    assert len(log.lines) == 1 and 'status.log' in log.lines[0]


# --- preview -----------------------------------------------------------------------------------------------------------

class Store:
    """What a preview asks of a catalog."""

    @staticmethod
    def free_bytes():
        return 7 * GIBIBYTE


def test_a_preview_shows_every_vm_with_what_is_done_to_it_and_why():
    text = 'vm-export=web\nvdi-export=d*:2\nexclude=*-test\nvm-export=gone\n'
    machines = vms('web', 'db', 'x-test', 'lonely')
    plan = planned(text, *machines)
    futures = {}
    for job in plan.jobs:
        copies = [a_copy(night, uuid=job.machine.uuid, method=job.method) for night in range(1, 6)]
        futures[job.machine.uuid] = (job.machine.name, future_verdicts(job, copies, datetime(2016, 5, 1), False), None)
    shown = preview_text(configured(text), an_inventory(*machines), plan, futures, Store())
    for words in ('web (00000001): vm-export, 4 copies kept', 'chosen by vm-export=web (weekend.cfg:1)', '8.0 GiB', '7.0 GiB free',
                  'db (00000002): vdi-export, 2 copies kept', 'chosen by vdi-export=d*:2 (weekend.cfg:2)',
                  'x-test (00000003) by exclude=*-test (weekend.cfg:3)', 'lonely (00000004)', 'gone'):
        assert words in shown
    removed = [line.strip() for line in shown.splitlines() if line.strip().startswith('then removes')]
    # Of 5 copies and the new one, 4 and 2 stay.
    assert [line.split(' ')[2][:-1] for line in removed] == ['backup-2016-04-%d-001000' % day for day in (15, 16, 15, 16, 17, 18)]


@given(st.integers(0, 8), st.integers(1, 8))
def test_a_preview_lets_go_what_retention_will_let_go_after_the_copy(number, keep):
    plan = planned('vm-export=web:%d\n' % keep, a_vm('web', 1))
    copies = [a_copy(night) for night in range(1, number + 1)]
    verdicts = future_verdicts(plan.jobs[0], copies, datetime(2016, 5, 1), False)
    assert [verdict.copy for verdict in verdicts] == copies
    assert [verdict.copy for verdict in verdicts if not verdict.keep] == copies[:max(0, number + 1 - keep)]


def test_a_preview_lets_nothing_go_when_the_clock_went_back():
    plan = planned('vm-export=web:1\n', a_vm('web', 1))
    copies = [a_copy(night) for night in range(1, 4)]
    assert all(verdict.keep for verdict in future_verdicts(plan.jobs[0], copies, datetime(2016, 4, 1), True))


@given(shelves(), st.integers(1, 6), st.booleans(), st.integers(0, 60))
def test_a_preview_lets_go_just_what_the_run_will(copies, keep, pre_clean, second):
    plan = planned('vm-export=web:%d\n' % keep, a_vm('web', 1))
    new = a_copy(0, taken_at=NIGHT + timedelta(seconds=second, microseconds=1), sequence=next_sequence(copies))._replace(name='new')
    left = [verdict.copy for verdict in judge(copies, US_UUID, Method.VM, [Rules(keep - 1)], NIGHT) if verdict.keep] if pre_clean else copies
    left = [verdict.copy for verdict in judge(left + [new], US_UUID, Method.VM, [Rules(keep)], NIGHT, 'new') if verdict.keep]
    verdicts = future_verdicts(plan.jobs[0], copies, new.taken_at, False, pre_clean)
    assert sorted(verdict.copy.name for verdict in verdicts) == sorted(copy.name for copy in copies)
    assert {verdict.copy.name for verdict in verdicts if verdict.keep} == {copy.name for copy in left} - {'new'}


def test_a_preview_counts_what_goes_to_make_room():
    plan = planned('vm-export=web:2\n', a_vm('web', 1))
    copies = [a_copy(1), a_copy(8, is_old=True), a_copy(9, is_old=True)]
    now = datetime(2016, 4, 20)

    def going(pre_clean):
        return [verdict.copy for verdict in future_verdicts(plan.jobs[0], copies, now, False, pre_clean) if not verdict.keep]

    assert going(False) == copies[:1] and going(True) == [copies[1], copies[0]]


def test_a_vdi_export_without_disk_0_shows_in_the_preview():
    machine = a_vm('web', 1, disks=(a_disk('1'),))
    plan = planned('vdi-export=web\n', machine)
    assert plan.jobs[0].method is Method.VDI
    shown = preview_text(configured('vdi-export=web\n'), an_inventory(machine), plan, {machine.uuid: ('web', [])}, Store())
    assert 'no Disk 0' in shown


@pytest.mark.parametrize('disks, chosen', [(('1', '0'), '0'), (('xvdb', 'xvda'), 'xvda'), (('hda', '1'), 'hda'), (('hda', 'xvda'), 'xvda'),
                                           (('xvda', '0'), '0')])
def test_disk_0_is_the_one_at_userdevice_0_or_xvda_or_hda(disks, chosen):
    assert first_disk(a_vm('web', 1, disks=tuple(a_disk(userdevice) for userdevice in disks))).userdevice == chosen
