"""The decisions of a round, without a process: how it stands, who takes what next, and what its files hold."""

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

import VmBackup
from support.values import a_round_plan, a_vm, uuid_of
from VmBackup import (AGAIN, CLAIM, DONE, GIVEN_UP, Finding, Job, Method, Outcome, RoundJob, Rules, Severity, encode_plan,
                      in_turn, next_time, outcome_facts, outcome_of, parse_plan, standing)

XCP1, XCP2 = uuid_of(0xa1), uuid_of(0xa2)


def a_job(number, name='', **facts):
    job = Job(a_vm(name or 'vm%d' % number, number)._replace(disks=()), Method.VM, Rules(4, config='/weekend.cfg'), 'vm-export=*')
    return RoundJob(job, 'vm%d' % number, **facts)


def order(jobs, states=None, host=XCP1, others=(), is_time_up=False):
    return [one.folder for one in in_turn(jobs, states or {}, host, others, is_time_up)]


# --- how it stands ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('names, state', [
    (['a.1.claim'], (1, CLAIM)), (['a.1.claim', 'a.1.done'], (1, DONE)), (['a.1.again', 'a.1.claim'], (1, AGAIN)),
    (['a.1.again', 'a.1.claim', 'a.2.claim'], (2, CLAIM)), (['a.1.claim', 'a.2.claim', 'a.2.failed'], (2, GIVEN_UP)),
    (['a.1.failed'], (1, GIVEN_UP))])
def test_the_last_try_of_a_vm_and_what_came_of_it_count(names, state):
    for told in (names, names[::-1], names + ['plan.json', 'x.sign', 'a.1.done.7-9.new', 'a.3.claim', 'told']):
        assert standing(told) == {'a': state}


@given(st.lists(st.tuples(st.sampled_from('abc'), st.integers(1, 2), st.sampled_from([CLAIM, AGAIN, DONE, GIVEN_UP]))))
def test_how_it_stands_does_not_hang_on_the_order_and_a_copy_that_came_late_counts(rows):
    names = ['%s.%d.%s' % row for row in rows]
    assert standing(names) == standing(sorted(names)) == standing(names[::-1])
    for key, (number, word) in standing(names).items():
        assert number == max(row[1] for row in rows if row[0] == key)
        words = {row[2] for row in rows if row[:2] == (key, number)}
        assert word == next(one for one in (DONE, GIVEN_UP, AGAIN, CLAIM) if one in words)


# --- who takes what --------------------------------------------------------------------------------------------------

def test_what_the_last_round_left_comes_first_then_what_is_near_then_what_is_oldest():
    jobs = [a_job(1, newest='2026-11-20'), a_job(2, newest='2026-11-10'), a_job(3, newest='2026-11-10', has_failed=True),
            a_job(4, runs_on=XCP1, newest='2026-11-25'), a_job(5, local_to=XCP1, newest='2026-11-25'), a_job(6),
            a_job(7, is_overdue=True, newest='2026-11-25'), a_job(8, is_overdue=True, newest='2026-11-24'),
            a_job(9, local_to=XCP2)]
    assert order(jobs) == ['vm8', 'vm7', 'vm5', 'vm4', 'vm6', 'vm2', 'vm1', 'vm3', 'vm9']
    assert order(jobs, host=XCP2)[:3] == ['vm8', 'vm7', 'vm9']


def test_what_only_another_host_sees_that_takes_part_is_left_to_it():
    jobs = [a_job(1, local_to=XCP2, is_overdue=True), a_job(2, local_to=XCP1)]
    assert order(jobs, others={XCP2}) == ['vm2'] and order(jobs, others=()) == ['vm1', 'vm2']


def test_second_tries_come_behind_all_first_ones_and_claims_of_others_last():
    jobs = [a_job(number) for number in range(1, 7)]
    states = {jobs[0].key: (1, AGAIN), jobs[1].key: (1, CLAIM), jobs[2].key: (1, DONE), jobs[3].key: (2, GIVEN_UP),
              jobs[4].key: (2, CLAIM)}
    assert order(jobs, states) == ['vm6', 'vm1', 'vm2', 'vm5']
    assert order(jobs, states, is_time_up=True) == []


# --- what the files hold ---------------------------------------------------------------------------------------------

@given(st.text(max_size=20), st.lists(st.text(max_size=9), max_size=3))
def test_a_plan_is_read_as_it_was_written(name, problems):
    name = name.encode('utf-8', 'ignore').decode()
    problems = [text.encode('utf-8', 'ignore').decode() for text in problems]
    one = a_job(1, name or 'x', disks='xvda', is_only=False, local_to=XCP1, newest='2026-11-20 00:10:00', has_failed=True)
    one = one._replace(job=one.job._replace(machine=one.job.machine._replace(
        description='', tags=(), memory_dynamic_max='', vcpus_max='', vcpus_at_startup='', guest_metrics_ref=VmBackup.NULL_REF,
        problems=tuple(problems))))
    plan = a_round_plan(one, until='2026-11-27T06:30:00Z', missing=('gone',))
    assert parse_plan(encode_plan(plan)) == plan


@pytest.mark.parametrize('content', [b'', b'{}', b'{"jobs": [[1, 2, 3]], "missing": []}', b'[]', b'{"jobs": 7, "missing": []}'])
def test_what_is_no_plan_of_this_version_is_refused(content):
    with pytest.raises(ValueError):
        parse_plan(content)


def test_an_outcome_is_read_as_it_was_written_with_what_others_have_to_act_upon():
    outcome = Outcome('vm-export', uuid_of(1), 'w\xfcb', 'w\xfcb (00000001)', None, 'SUCCESS', 'a full', 1 << 40, 12.3456, 3, None,
                      (Finding(Severity.WARNING, 'w\xfcb', 'it needed a second try.'),))
    assert outcome_of(outcome_facts(outcome)) == outcome._replace(seconds=12.346)
    for error, kind in ((VmBackup.StorageFull('x'), VmBackup.BackupError), (VmBackup.StorageStalled('x'), VmBackup.StorageMisbehaved),
                        (KeyError('x'), RuntimeError)):
        again = outcome_of(outcome_facts(outcome._replace(error='x', cause=error)))
        assert type(again.cause) is kind and again.error == 'x' and VmBackup.is_bug(again.cause) == VmBackup.is_bug(error)
    for facts in ({}, {'error': 'x', 'cause': 'other'}, dict(outcome_facts(outcome), findings=7)):
        with pytest.raises(ValueError):
            outcome_of(facts)


# --- until -----------------------------------------------------------------------------------------------------------

@given(st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1)), st.integers(0, 23), st.integers(0, 59))
def test_until_is_the_next_time_the_clock_shows_that(now, hour, minute):
    text = next_time('%02d:%02d' % (hour, minute), now)
    at = datetime.strptime(text, '%Y-%m-%dT%H:%M:%SZ').replace(tzinfo=timezone.utc)
    shown = datetime.fromtimestamp(at.timestamp())
    assert (shown.hour, shown.minute, shown.second) == (hour, minute, 0)
    assert timedelta(0) < shown - now <= timedelta(days=1)
    plan = a_round_plan(until=text)
    assert plan.is_time_up(at) and not plan.is_time_up(at - timedelta(seconds=1))
    assert not a_round_plan(until=next_time('', now)).is_time_up(at)
