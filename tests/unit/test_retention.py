"""Which copies stay and which go: never the newest good one, never anybody else's."""

import random as random_module
import re
from datetime import timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.values import NIGHT, a_copy, uuid_of
from VmBackup import (Method, Owner, Rules, as_seen_by, clock_is_behind, clock_went_back, in_order, judge, next_sequence,
                      retention_warnings)

US, OTHERS = uuid_of(1), uuid_of(2)


def going(copies, keep, uuid=US, method=Method.VM, sealed=''):
    return [verdict.copy.name for verdict in judge(copies, uuid, method, [Rules(keep)], NIGHT, sealed) if not verdict.keep]


def names(copies):
    return [copy.name for copy in copies]


@st.composite
def shelves(draw):
    """The copies of one directory, in any order: ours and old ones, good and damaged, of two VMs and kinds, under any clock."""
    copies = []
    seconds = draw(st.lists(st.integers(0, 40), unique=True, max_size=12))
    sequences = draw(st.permutations(range(1, len(seconds) + 1)))
    for second, sequence in zip(seconds, sequences):
        is_old = draw(st.booleans())
        copies.append(a_copy(
            0, taken_at=NIGHT + timedelta(seconds=second), is_old=is_old, sequence=0 if is_old else sequence,
            uuid=draw(st.sampled_from([US, US, OTHERS, ''])), method=draw(st.sampled_from([Method.VM, Method.VM, Method.VDI, None])),
            problem=draw(st.sampled_from(['', '', 'the marker `success` is not there'])),
            aside=draw(st.sampled_from(['', '', '', 'moved here by hand']))))
    return copies


def last_made(copies):
    """The last copy that this program made of those that are counted, None if there is none."""
    return max((copy for copy in copies if is_counted(copy) and not copy.is_old), key=lambda copy: copy.sequence, default=None)


def is_counted(copy, method=Method.VM):
    return copy.is_good and not copy.aside and copy.uuid == US and copy.method is method


@given(shelves(), st.integers(-1, 8))
def test_the_newest_good_copy_is_never_judged_away(copies, keep):
    good = [copy.name for copy in in_order(copies) if is_counted(copy)]
    assert not good or good[-1] not in going(copies, keep)


@given(shelves(), st.integers(1, 8))
def test_as_many_good_copies_stay_as_are_to_be_kept(copies, keep):
    good = [copy for copy in in_order(copies) if is_counted(copy)]
    newest = good[-keep:]
    if last_made(copies) not in newest + [None]:
        newest.append(last_made(copies))
    assert sorted(going(copies, keep)) == sorted(copy.name for copy in good if copy not in newest)


@given(shelves(), st.integers(-1, 8), st.data())
def test_what_this_run_has_sealed_stays_whatever_the_order_says(copies, keep, data):
    for sealed in [copy.name for copy in copies if is_counted(copy)]:
        assert sealed not in going(copies, keep, sealed=sealed)
    assert last_made(copies) is None or last_made(copies).name not in going(copies, keep)


def test_copies_of_the_older_program_with_later_stamps_do_not_cost_the_copy_just_made():
    old, new = [a_copy(night, is_old=True) for night in (8, 9)], a_copy(3)
    assert going(old + [new], 1) == [old[0].name] and going(old + [new], 2) == []
    assert going(old + [new, a_copy(4)], 2) == [new.name], 'but the one that was made before it goes'


@given(shelves(), st.integers(1, 8))
def test_a_copy_of_a_newer_version_stops_all_pruning_in_its_directory(copies, keep):
    newer = a_copy(50, method=None, problem='a newer VmBackup made it', is_newer=True)
    assert going(copies + [newer], keep) == []
    assert going(copies + [newer._replace(is_newer=False)], keep) == going(copies, keep), 'a damaged one does not'


@pytest.mark.parametrize('keep', [1, 0, -1])
def test_where_fewer_than_one_is_to_be_kept_one_is_kept(keep):
    copies = [a_copy(night) for night in range(1, 4)]
    assert going(copies, keep) == names(copies[:2])


@given(shelves(), st.integers(1, 8))
def test_the_oldest_go_first(copies, keep):
    good = [copy.name for copy in in_order(copies) if is_counted(copy)]
    gone = going(copies, keep)
    kept = [name for name in good if last_made(copies) is None or name != last_made(copies).name]
    assert gone == kept[:len(gone)]


@given(shelves(), st.integers(1, 8))
def test_only_good_copies_of_this_vm_and_kind_go(copies, keep):
    by_name = {copy.name: copy for copy in copies}
    assert all(is_counted(by_name[name]) for name in going(copies, keep))
    assert all(is_counted(by_name[name], Method.VDI) for name in going(copies, keep, method=Method.VDI))


@given(shelves(), st.integers(1, 8))
def test_every_copy_gets_one_verdict_with_a_reason(copies, keep):
    verdicts = judge(copies, US, Method.VM, [Rules(keep)], NIGHT)
    assert sorted(verdict.copy.name for verdict in verdicts) == sorted(names(copies))
    assert all(verdict.reason for verdict in verdicts)


@given(shelves(), st.integers(1, 8), st.integers(0, 1000))
def test_the_order_of_listing_does_not_matter(copies, keep, seed):
    shuffled = random_module.Random(seed).sample(copies, len(copies))
    assert judge(shuffled, US, Method.VM, [Rules(keep)], NIGHT) == judge(copies, US, Method.VM, [Rules(keep)], NIGHT)


@given(shelves(), st.integers(1, 8))
def test_judging_what_is_left_lets_nothing_go(copies, keep):
    gone = going(copies, keep)
    assert going([copy for copy in copies if copy.name not in gone], keep) == []


@given(shelves(), st.integers(1, 8))
def test_failed_copies_around_them_change_nothing_for_good_ones(copies, keep):
    assert going([copy for copy in copies if copy.is_good], keep) == going(copies, keep)


def test_the_copies_beyond_the_number_to_keep_go_and_the_reason_says_why():
    verdicts = judge([a_copy(night) for night in range(1, 6)], US, Method.VM, [Rules(3)], NIGHT)
    assert [verdict.keep for verdict in verdicts] == [False, False, True, True, True]
    assert re.match('4 good copies .*are newer, and 3 are kept', verdicts[0].reason)
    assert re.match('3 good copies .*are newer, and 3 are kept', verdicts[1].reason)


def test_one_newer_copy_is_said_in_the_singular():
    verdict = judge([a_copy(1), a_copy(2)], US, Method.VM, [Rules(1)], NIGHT)[0]
    assert re.match('1 good copy .*is newer, and 1 is kept', verdict.reason)


# --- order -----------------------------------------------------------------------------------------------------------

def test_our_copies_stand_by_their_sequence_number_whatever_the_clock_said():
    copies = [a_copy(9, sequence=1), a_copy(2, sequence=2), a_copy(5, sequence=3)]
    assert in_order(reversed(copies)) == copies


def test_a_copy_without_a_number_as_its_manifest_can_not_be_read_moves_no_copy_of_the_older_program():
    first, old, last = a_copy(1), a_copy(3, is_old=True), a_copy(5, sequence=2)
    damaged = a_copy(6, sequence=0, problem='backup.json is damaged')
    assert [copy for copy in in_order([damaged, last, old, first]) if copy != damaged] == [first, old, last]


def test_a_copy_of_the_older_program_stands_before_our_first_with_a_later_stamp():
    old, ours = [a_copy(night, is_old=True) for night in (1, 3, 9)], [a_copy(2), a_copy(4), a_copy(5)]
    assert in_order(old + ours) == [old[0], ours[0], old[1], ours[1], ours[2], old[2]]


def test_an_old_copy_with_the_stamp_of_ours_is_the_newer_one():
    old, ours = a_copy(2, is_old=True), a_copy(2)
    assert in_order([old, ours, a_copy(3)]) == [ours, old, a_copy(3)]


def test_after_a_clock_that_went_back_an_old_copy_stands_before_the_first_of_ours_in_sequence():
    ours = [a_copy(8, sequence=1), a_copy(2, sequence=2), a_copy(3, sequence=3)]
    assert in_order([a_copy(5, is_old=True)] + ours)[0] == a_copy(5, is_old=True)


@given(shelves())
def test_no_copy_is_lost_or_doubled_by_ordering(copies):
    assert sorted(names(in_order(copies))) == sorted(names(copies))


@given(shelves())
def test_old_copies_stand_among_ours_as_the_contract_says(copies):
    ordered = in_order(copies)
    ours = [copy for copy in ordered if not copy.is_old]
    for position, copy in enumerate(ordered):
        if copy.is_old:
            later = [one for one in ours if one.taken_at > copy.taken_at]
            behind = [one for one in ordered[position:] if not one.is_old]
            assert behind[:1] == later[:1]


@given(shelves())
def test_the_next_copy_is_the_last_in_order_among_ours(copies):
    new = a_copy(0, taken_at=NIGHT - timedelta(days=1), sequence=next_sequence(copies))
    assert [copy for copy in in_order(copies + [new]) if not copy.is_old][-1] == new


# --- the clock -------------------------------------------------------------------------------------------------------

def utc(night, **more):
    return (NIGHT + timedelta(days=night, **more)).replace(tzinfo=timezone.utc)


@pytest.mark.parametrize('now, went_back', [(utc(3, seconds=1), False), (utc(3), True), (utc(2), True), (utc(30), False)])
def test_a_clock_that_is_not_later_than_the_newest_copy_went_back(now, went_back):
    assert bool(clock_went_back([a_copy(1), a_copy(3), a_copy(2)], now)) is went_back


def test_the_copy_with_the_highest_sequence_number_is_the_newest_whatever_its_time():
    copies = [a_copy(9, sequence=1), a_copy(2, sequence=2)]
    assert clock_went_back(copies, utc(5)) is None
    assert clock_went_back(copies, utc(1))


def test_copies_of_the_older_program_and_damaged_ones_tell_nothing_about_the_clock():
    assert clock_went_back([a_copy(9, is_old=True), a_copy(8, written_at=None)], utc(5)) is None
    assert clock_went_back([], utc(5)) is None


def test_a_clock_behind_the_newest_copy_of_the_older_program_is_told():
    old = a_copy(9, is_old=True)
    assert clock_is_behind([old, a_copy(20)], NIGHT + timedelta(days=9, seconds=-1)).count(old.name) == 1
    assert clock_is_behind([old], NIGHT + timedelta(days=9)) is None
    assert clock_is_behind([old._replace(problem='x'), old._replace(aside='x'), a_copy(20)], NIGHT) is None


def test_all_that_is_in_the_way_of_pruning_is_told_each_by_itself():
    copies = [a_copy(1), a_copy(3, is_old=True), a_copy(2, is_newer=True, problem='a newer VmBackup made it')]
    assert len(retention_warnings(copies, utc(0), NIGHT)) == 3
    assert retention_warnings([a_copy(1), a_copy(2, is_old=True)], utc(5), NIGHT + timedelta(days=5)) == []


def test_what_was_moved_aside_tells_nothing_about_the_clock():
    assert clock_went_back([a_copy(9, aside='moved here by hand')], utc(5)) is None


# --- what was moved aside by hand ---------------------------------------------------------------------------------------

def asides(copies, folder, name=None):
    """Which of them are put aside for our VM, which bears that name in the pool, or is only known from the store."""
    seen = {copy.name: bool(copy.aside) for copy in as_seen_by(Owner(US, '', name), folder, copies)}
    return [seen[copy.name] for copy in copies]


def test_a_copy_that_names_another_directory_was_moved():
    assert asides([a_copy(1, home='web'), a_copy(2, home='KEEP')], 'KEEP') == [True, False]
    assert asides([a_copy(1, home='Web')], 'web') == [False], 'on a CIFS share that is one directory'
    assert asides([a_copy(1, home='web')], 'shop', 'shop') == [True], 'whatever its VM is named today'


def test_a_copy_that_names_none_is_at_home_only_where_its_vm_is():
    untold = a_copy(1)
    assert asides([untold], 'KEEP') == [True]
    assert asides([untold], 'shop', 'shop') == [False], 'the VM bears that name today'
    assert asides([untold, a_copy(2, home='shop')], 'shop') == [False, False], 'later ones tell that it is'
    assert asides([untold, a_copy(2, home='shop', uuid=OTHERS)], 'shop') == [True, False]


@given(shelves(), st.integers(1, 8))
def test_what_was_moved_aside_is_neither_removed_nor_counted(copies, keep):
    assert going([copy for copy in copies if not copy.aside], keep) == going(copies, keep)


# --- one uuid in two pools -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('pools, are_aside', [
    (['here'], [False]), (['there'], [True]), (['here', 'there'], [False, True]), (['', 'here'], [False, False]),
    (['', 'there'], [True, True]), (['', ''], [False, False])])
def test_copies_of_another_pool_and_those_that_may_be_are_put_aside(pools, are_aside):
    copies = [a_copy(night, pool=pool, home='web') for night, pool in enumerate(pools)]
    assert [bool(copy.aside) for copy in as_seen_by(Owner(US, 'here'), 'web', copies)] == are_aside
    assert as_seen_by(Owner(OTHERS, 'here'), 'web', copies) == copies


def test_what_may_be_of_any_of_two_pools_is_nobodys_to_count():
    copies = [a_copy(night, pool=pool, home='web') for night, pool in enumerate(['here', 'there', ''])]
    assert [bool(copy.aside) for copy in as_seen_by(Owner(US, ''), 'web', copies)] == [True, True, True]


# --- whose an old copy is ----------------------------------------------------------------------------------------------

OLD = a_copy(1, is_old=True, uuid='')


@pytest.mark.parametrize('others, is_unique, is_plain, inherits', [
    ([], True, True, True), ([a_copy(2)], True, True, True), ([a_copy(2, uuid=OTHERS)], True, True, False),
    ([a_copy(2, is_old=True, uuid=OTHERS)], True, True, False), ([a_copy(2, uuid=OTHERS, problem='x')], True, True, False),
    ([], False, True, False), ([], True, False, False)])
def test_an_old_copy_without_a_uuid_is_the_vms_only_if_it_can_be_nobody_elses(others, is_unique, is_plain, inherits):
    others = [copy._replace(home='web') for copy in others]
    copies = as_seen_by(Owner(US, '', 'web', is_unique), 'web' if is_plain else 'web--00000001', [OLD] + others)
    assert [copy.uuid for copy in copies] == [US if inherits else ''] + [copy.uuid for copy in others]
    assert [bool(copy.aside) for copy in copies if copy.uuid == US and is_plain] == [False] * sum(
        copy.uuid == US for copy in copies)


def test_a_copy_of_ours_without_a_readable_uuid_is_never_given_to_a_vm():
    damaged = a_copy(1, uuid='', problem='backup.json is damaged', home='web')
    assert as_seen_by(Owner(US, '', 'web', True), 'web', [damaged]) == [damaged]


def test_where_no_pool_is_asked_a_copy_without_a_uuid_is_shown_with_the_only_vm_there_and_not_counted():
    (shown, own) = as_seen_by(Owner(US, ''), 'web', [OLD, a_copy(2, home='web')])
    assert (shown.uuid, bool(shown.aside), own.aside) == (US, True, '')
    (shown, _, _) = as_seen_by(Owner(US, ''), 'web', [OLD, a_copy(2), a_copy(3, uuid=OTHERS)])
    assert shown.uuid == ''
