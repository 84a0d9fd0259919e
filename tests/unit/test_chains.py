"""Which copies stay where increments rest on others: ten thousand directories, pruned and interrupted, and a second judge."""

import random as random_module
import re
from collections import Counter
from datetime import datetime, timedelta
from typing import Any, Dict, FrozenSet, List, NamedTuple, Sequence, Set, Tuple

import pytest

from support.second_judge import is_ours, is_sound, newest_first, staying
from support.values import NIGHT, US_UUID, a_copy, a_disk, a_vm, uuid_of
from VmBackup import (GIBIBYTE, Copy, Layer, Method, Rules, Verdict, holder_problem, idle_warnings, in_removal_order, judge,
                      next_layer, resting, retention_warnings)

OWN, SECOND = '/cfg/nightly.cfg', '/cfg/weekend.cfg'
OTHERS = uuid_of(2)


def rules(newest: int = 1, daily: int = 0, weekly: int = 0, monthly: int = 0, yearly: int = 0, config: str = OWN) -> Rules:
    return Rules(newest, daily, weekly, monthly, yearly, config)


def mark_of(name: str) -> str:
    return 'mark of ' + name


def full(night: int, **facts: Any) -> Copy:
    """A full that increments can build on."""
    copy = a_copy(night, **facts)
    return copy._replace(layer=Layer(1, copy.name, '', 'it is the first copy'), mark=mark_of(copy.name))


def increment(night: int, base: Copy, *others: Copy, **facts: Any) -> Copy:
    """An increment on that copy: the full of the chain and these others hold blocks of it, the base only if it is among them."""
    copy = a_copy(night, **facts)
    holders = [base.layer.full] + [other.name for other in others if other.name != base.layer.full]
    return copy._replace(mark=mark_of(copy.name), layer=Layer(
        base.layer.depth + 1, base.layer.full, base.name, 'the next', tuple((name, mark_of(name)) for name in holders)))


def chain(*nights: int) -> List[Copy]:
    """A full and increments, each of which rests on all before it."""
    copies = []  # type: List[Copy]
    for night in nights:
        copies.append(increment(night, copies[-1], *copies) if copies else full(night))
    return copies


def damaged(copy: Copy, *spans: List[int]) -> Copy:
    """With a verdict that tells these MiB as the bad ones of its own, or none."""
    checks = dict(verdict='DAMAGED', verified_at='2016-05-01T00:00:00Z', reason='a block differs', layer='DAMAGED')  # type: Any
    return copy._replace(checks=dict(checks, bad={'xvda': list(spans)} if spans else None))


def proven(copy: Copy) -> Copy:
    return copy._replace(checks=dict(verdict='good', verified_at='2016-05-01T00:00:00Z', layer='good'))


def seen(copies: Sequence[Copy], needs_bad: FrozenSet[Tuple[str, str]] = frozenset()) -> List[Copy]:
    """The copies as a listing gives them: what fails those that rest on others is told. `needs_bad`: pairs of a copy and a holder
    whose bad blocks it needs, where these are known."""
    by_name = {copy.name: copy for copy in copies}
    return [resting(copy, by_name.get, lambda one, holder: not holder.checks.get('bad') or (one.name, holder.name) in needs_bad)
            for copy in copies]


def judged(copies: Sequence[Copy], *chosen: Rules, **more: Any) -> Dict[str, Verdict]:
    verdicts = judge(copies, US_UUID, Method.VM, chosen or (rules(),), more.pop('now', datetime(2100, 1, 1)), **more)
    return {verdict.copy.name: verdict for verdict in verdicts}


def going(copies: Sequence[Copy], *chosen: Rules, **more: Any) -> Set[str]:
    return {name for name, verdict in judged(seen(copies), *chosen, **more).items() if not verdict.keep}


def names(*copies: Copy) -> Set[str]:
    return {copy.name for copy in copies}


BLANK = a_copy(1)
CONDEMNED, SPANNED, PROVEN = damaged(BLANK).checks, damaged(BLANK, [0, 1]).checks, proven(BLANK).checks
DRILLED = dict(drilled_at='2016-05-01T00:00:00Z', drill='good')


# --- what is held, one case each -------------------------------------------------------------------------------------

def test_a_copy_is_held_for_those_that_need_it_and_not_counted() -> None:
    first = full(1)
    copies = [first, *(increment(night, first) for night in (2, 3, 4, 5))]
    verdicts = judged(seen(copies), rules(3))
    assert [name for name, verdict in verdicts.items() if not verdict.keep] == [copies[1].name]
    assert verdicts[first.name].reason == 'held for 3 later copies'


def test_a_copy_that_nobody_needs_goes_whatever_stands_before_and_after_it() -> None:
    first = full(1)
    second = increment(2, first)
    third = increment(3, second)                  # all that the second had stored has changed again
    assert going([first, second, third]) == names(second)


def test_a_chain_goes_as_a_whole_once_no_rule_wants_any_of_it() -> None:
    old, new = chain(1, 2, 3), chain(4, 5)
    assert going([*old, proven(new[0]), new[1]]) == names(*old)


def test_what_stays_only_as_others_need_it_is_not_robbed_itself() -> None:
    """One that is held stays a copy: whoever lists or restores it finds it whole."""
    first = full(1)
    second = increment(2, first)
    third = increment(3, second, second)
    fourth = increment(4, third, third)           # needs the third; the second only through that
    assert going([first, second, third, fourth]) == set()


def test_a_pinned_copy_holds_what_it_needs_and_is_not_counted() -> None:
    old, new = chain(1, 2, 3), [full(4), proven(full(5))]
    pinned = old[1]._replace(pin='pinned: before the move')
    assert going([old[0], pinned, old[2], *new]) == names(old[2], new[0])


def test_a_pinned_copy_that_is_not_good_holds_what_it_needs() -> None:
    old, new = chain(1, 2), proven(full(4))
    assert going([old[0], damaged(old[1])._replace(pin='pinned: by hand'), new]) == set()


@pytest.mark.parametrize('newest', [1, 2, 3, 4])
@pytest.mark.parametrize('what', [dict(problem='the image xvda.vhd is not there'), dict(checks=damaged(full(1)).checks)])
def test_one_that_is_not_good_holds_what_it_needs_as_long_as_the_rules_would_keep_it(newest: int, what: Any) -> None:
    first, second = chain(1, 2)
    copies = [first, second._replace(**what), full(3), proven(full(4))]
    stay_with_it = newest >= 3
    assert (first.name in going(copies, rules(newest))) == (not stay_with_it)


def idle(copies: Sequence[Copy], chosen: Sequence[Rules], now: datetime = NIGHT) -> List[str]:
    """What is said of copies that are not good, once they are judged."""
    return idle_warnings(judge(copies, US_UUID, Method.VM, chosen, now), US_UUID, Method.VM, chosen, now)


def test_a_copy_that_is_not_good_is_told_once_it_holds_nothing_any_more_and_not_before() -> None:
    first, second = chain(1, 2)
    copies = seen([first, damaged(second, [0, 1]), full(3), proven(full(4))])
    assert idle(copies, [rules(3)]) == []
    pinned = [copy._replace(pin='' if copy.is_good else 'pinned: by hand') for copy in copies]
    assert idle(pinned, [rules(2)]) == []
    (sentence,) = idle(copies, [rules(2)])
    assert 'rm -r web/' + second.name in sentence


def test_nobody_is_told_to_remove_what_others_need() -> None:
    """It is damaged in one block that changed again since: what it holds besides is needed all the same."""
    first = full(1)
    second = increment(2, first)
    third = increment(3, second, second)
    fourth = increment(4, third, second)
    copies = seen([first, damaged(second, [0, 1]), third, fourth])
    assert [copy.is_good for copy in copies] == [True, False, True, True]
    assert idle(copies, [rules(1)]) == []


def test_nobody_is_told_to_remove_the_holder_of_a_pinned_copy() -> None:
    first, second, third = chain(1, 2, 3)
    copies = seen([first, damaged(second, [0, 1]), third._replace(pin='pinned: by hand'), proven(full(4))])
    assert idle(copies, [rules(1)]) == []


@pytest.mark.parametrize('read_back', [
    dict(read_back=True), dict(checks=PROVEN), dict(checks=DRILLED)])
def test_the_last_of_the_chain_before_stays_until_the_full_of_the_present_one_was_read_back(read_back: Any) -> None:
    old, new = chain(1, 2, 3), chain(4, 5, 6)
    assert going([*old, *new]) == set(), 'the last one, and what it needs'
    assert 'until ' + new[0].name in judged(seen([*old, *new]))[old[-1].name].reason
    assert going([*old, new[0]._replace(**read_back), *new[1:]]) == names(*old)


def test_the_last_of_the_chain_before_is_the_last_good_one() -> None:
    old, new = chain(1, 2, 3), chain(4, 5)
    assert going([*old[:2], damaged(old[2], [0, 1]), *new]) == set()
    assert judged(seen([*old[:2], damaged(old[2], [0, 1]), *new]))[old[1].name].reason.startswith('the last of the chain before')


def test_a_rotten_full_keeps_the_chain_before() -> None:
    old, new = chain(1, 2), chain(4, 5)
    rotten = damaged(new[0]._replace(read_back=True), [0, 1])
    assert seen([*old, rotten, new[1]])[-1].is_good and going([*old, rotten, new[1]]) == set()
    assert going([*old, damaged(proven(new[0])), new[1]], rules(1)) == set(), 'the last copy is not good either'


def test_a_copy_of_the_older_program_or_without_a_list_of_blocks_is_the_chain_before_too() -> None:
    for plain in (a_copy(1), a_copy(1, is_old=True)):
        first, second = chain(2, 3)
        assert going([plain, first, second]) == set()
        assert going([plain, proven(first), second]) == names(plain)


def test_while_a_copy_is_not_finished_all_stay_that_it_can_rest_on() -> None:
    copies = [*chain(1, 2), proven(full(3)), a_copy(4), a_copy(5)]
    assert going(copies) == names(*copies[:4])
    assert going(copies, has_unfinished=True) == names(copies[3])


@pytest.mark.parametrize('unknown', [
    dict(is_newer=True), dict(is_unreadable=True), dict()], ids=['newer', 'unreadable', 'garbled'])
def test_nothing_goes_beside_a_copy_of_which_it_is_not_known_what_it_needs(unknown: Any) -> None:
    copies = [*chain(1, 2), full(3), proven(full(4))]
    lost = a_copy(5, method=None, sequence=0, problem='backup.json is damaged: not JSON', **unknown)
    assert going([*copies, lost]) == set()
    (sentence,) = retention_warnings([*copies, lost], datetime(2100, 1, 1).replace(tzinfo=NIGHT.astimezone().tzinfo), NIGHT)
    assert 'web/' + lost.name in sentence


def test_an_increment_that_was_moved_is_told() -> None:
    moved = increment(2, full(1), home='web')._replace(folder='KEEP', broken='what holds its blocks is not there')
    (sentence,) = retention_warnings([moved], datetime(2100, 1, 1).replace(tzinfo=NIGHT.astimezone().tzinfo), NIGHT)
    assert 'pin' in sentence and moved.name in sentence


# --- of weeks, months and years the newest full stays ----------------------------------------------------------------

@pytest.mark.parametrize('unit', ['weekly', 'monthly', 'yearly'])
def test_of_a_period_the_newest_full_stays_as_it_needs_no_other(unit: str) -> None:
    monday = datetime(2026, 6, 1, 0, 10)
    days = [monday + timedelta(days=day) for day in range(6)]
    first, second = full(1, taken_at=days[0]), full(2, taken_at=days[1])
    third = increment(3, second, taken_at=days[2])
    later = proven(full(9, taken_at=datetime(2028, 1, 5)))
    assert going([first, second, third, later], rules(**{unit: 2})) == names(first, third)


def test_of_a_day_the_newest_stays_whatever_it_is() -> None:
    first = full(1, taken_at=datetime(2026, 6, 1, 0, 10))
    second = increment(2, first, taken_at=datetime(2026, 6, 1, 12, 10))
    later = proven(full(9, taken_at=datetime(2026, 6, 5)))
    assert judged(seen([first, second, later]), rules(daily=2))[second.name].reason == 'day 2026-06-01'
    assert judged(seen([first, second, later]), rules(daily=2))[first.name].reason == 'held for 1 later copy'


def test_a_period_without_a_full_keeps_its_newest_increment() -> None:
    first = full(1, taken_at=datetime(2026, 5, 30))
    week = [increment(number, first, taken_at=datetime(2026, 6, number)) for number in (2, 3, 4)]
    later = proven(full(9, taken_at=datetime(2026, 6, 10)))
    assert going([first, *week, later], rules(weekly=2)) == names(*week[:2])


def test_a_full_without_a_list_of_blocks_is_a_full() -> None:
    plain = a_copy(2, taken_at=datetime(2026, 6, 2))
    other = full(1, taken_at=datetime(2026, 6, 1))
    last = increment(3, other, taken_at=datetime(2026, 6, 3))
    later = proven(full(9, taken_at=datetime(2026, 6, 10)))
    assert going([other, plain, last, later], rules(weekly=2)) == names(other, last)


def test_a_full_that_is_not_good_or_pinned_is_not_the_one_of_its_period() -> None:
    first = full(1, taken_at=datetime(2026, 6, 1))
    middle = full(2, taken_at=datetime(2026, 6, 2))
    last = increment(3, first, taken_at=datetime(2026, 6, 3))
    later = proven(full(9, taken_at=datetime(2026, 6, 10)))
    for lost in (damaged(middle), middle._replace(pin='pinned: by hand'), middle._replace(aside='moved here by hand')):
        assert going([first, lost, last, later], rules(weekly=2)) == names(last)


# --- what the next copy will be --------------------------------------------------------------------------------------

LARGEST = 2040 * GIBIBYTE


def following(copies: Sequence[Copy], full_every: int = 14, free: Any = None, disks: Any = (a_disk(),),
              uuid: str = US_UUID) -> Any:
    mine = [copy._replace(uuid=uuid) if copy.uuid == US_UUID else copy for copy in seen(copies)]
    return next_layer(mine, a_vm('web')._replace(uuid=uuid), Method.VM, disks, full_every, free)


def later(copies: Sequence[Copy]) -> List[Copy]:
    """They as those of a chain that is not the VM's first."""
    return [a_copy(0), *(copy._replace(layer=copy.layer._replace(is_first=False)) for copy in copies)]


@pytest.mark.parametrize('copies, word', [
    ([], 'first copy'),
    ([a_copy(1, uuid=OTHERS)], 'first copy'),
    ([full(1, method=Method.VDI)], 'first copy'),
    ([full(1)._replace(aside='moved here by hand')], 'first copy'),
    ([full(1, problem='the image is not there')], 'no good copy'),
    ([damaged(full(1))], 'no good copy'),
    ([a_copy(1)], a_copy(1).name),
    ([a_copy(1, is_old=True)], a_copy(1, is_old=True).name),
    ([full(1), a_copy(2)], a_copy(2).name),
    ([full(1), a_copy(2, is_old=True)], a_copy(2, is_old=True).name)])
def test_the_next_copy_is_a_full_where_nothing_can_be_built_on_and_why_is_told(copies: List[Copy], word: str) -> None:
    layer = following(copies)
    assert layer.base is None and word in layer.why and not layer.warning


@pytest.mark.parametrize('size, is_increment', [(LARGEST, True), (LARGEST + 1, False), (3 * LARGEST, False)])
def test_a_disk_that_no_vhd_can_hold_makes_a_full_of_every_copy(size: int, is_increment: bool) -> None:
    disks = (a_disk(), a_disk('3', virtual_size=size))
    layer = following([full(1)], disks=disks)
    assert (layer.base is not None) == is_increment
    assert is_increment or 'xvdd' in layer.why


def test_a_copy_rests_on_the_newest_good_one_also_a_pinned_one() -> None:
    first, second, third = chain(1, 2, 3)
    assert following([first, second, third]).base.name == third.name
    assert following([first, second, third._replace(pin='pinned: by hand')]).base.name == third.name
    assert following([first, second, damaged(third, [0, 1])]).base.name == second.name
    assert following([first, second, third._replace(problem='the marker `success` is not there')]).base.name == second.name


@pytest.mark.parametrize('lose', [
    lambda copy: [], lambda copy: [copy._replace(mark='of another')], lambda copy: [damaged(copy, [0, 1])],
    lambda copy: [copy._replace(problem='web.xva has 3 bytes instead of 4')]])
def test_a_copy_does_not_rest_on_one_that_lost_a_holder_or_whose_holder_was_found_bad(lose: Any) -> None:
    """Also where the bad blocks of the holder are known, and not needed."""
    first, second, third = chain(1, 2, 3)
    assert holder_problem(third, [first, second, third], third.layer.holders) == ''
    for whole, lost in ((second, [first, *lose(second), third]), (first, [*lose(first), second, third])):
        assert whole.name in holder_problem(third, lost, third.layer.holders)
        layer = following(lost)
        rests_on = ((layer.base.name, layer.base.mark), *layer.base.layer.holders) if layer.base else ()
        assert (whole.name, mark_of(whole.name)) not in rests_on


@pytest.mark.parametrize('change', [
    dict(mark='of another'), dict(problem='the marker `success` is not there'), dict(broken='x fails it'),
    dict(checks=CONDEMNED)])
def test_a_base_that_is_no_longer_what_it_was_is_rested_on_no_more(change: Any) -> None:
    first, second = chain(1, 2)
    assert second.name in holder_problem(second, [first, second._replace(**change)], second.layer.holders)
    assert second.name in holder_problem(second, [first], second.layer.holders)


def test_what_holds_blocks_may_lack_others_itself() -> None:
    """What was taken from the second's own file is whole, whatever the second rests on."""
    first, second, third = chain(1, 2, 3)
    assert holder_problem(third, [first, second._replace(broken='x fails it'), third], third.layer.holders) == ''


@pytest.mark.parametrize('full_every', [1, 2, 3, 14, 100])
def test_a_chain_is_as_long_as_full_every_says(full_every: int) -> None:
    copies = later(chain(1))
    for depth in range(2, full_every + 1):
        layer = following(copies, full_every)
        assert layer.base == copies[-1] and layer.left == full_every - depth + 1 and not layer.warning
        copies.append(increment(depth, copies[-1])._replace(layer=copies[-1].layer._replace(
            depth=depth, base=copies[-1].name, holders=((copies[1].name, mark_of(copies[1].name)),))))
    layer = following(copies, full_every)
    assert layer.base is None and 'full_every=%d' % full_every in layer.why and not layer.is_first and layer.left == full_every


@pytest.mark.parametrize('full_every', [1, 2, 3, 7, 14, 100])
def test_the_first_chains_of_many_vms_end_on_different_nights_up_to_half_of_full_every_early(full_every: int) -> None:
    ends = Counter()  # type: Counter
    for number in range(300):
        uuid = uuid_of(number * 7919)
        first = following([], full_every, uuid=uuid)
        assert first.is_first
        begun = full(1, uuid=uuid)._replace(layer=full(1).layer._replace(is_first=True))
        depth = 1
        while following([begun._replace(layer=begun.layer._replace(depth=depth))], full_every, uuid=uuid).base:
            depth += 1
        assert first.left == depth, 'as preview has told'
        ends[depth] += 1
    assert min(ends) >= full_every - full_every // 2 and max(ends) <= full_every
    assert len(ends) == full_every // 2 + 1 and (full_every < 4 or max(ends.values()) < 300)


def test_a_full_of_the_first_chain_says_so_and_one_behind_it_does_not() -> None:
    assert following([]).is_first and following([a_copy(1)]).is_first
    assert not following([full(1, problem='the image is not there')]).is_first
    assert not following([full(1), a_copy(2)]).is_first


@pytest.mark.parametrize('free, is_full', [(None, True), (10 * GIBIBYTE, True), (10 * GIBIBYTE - 1, False), (0, False)])
def test_a_full_that_is_due_and_does_not_fit_is_an_increment_with_a_warning(free: Any, is_full: bool) -> None:
    copies = later([full(1, size_bytes=10 * GIBIBYTE)])
    copies.append(increment(2, copies[1]))
    copies[2] = copies[2]._replace(layer=copies[2].layer._replace(depth=4))
    layer = following(copies, 4, free)
    assert (layer.base is None, bool(layer.warning)) == (is_full, not is_full)
    assert following(copies, 5, free).base and not following(copies, 5, free).warning, 'it is not due yet'


@pytest.mark.parametrize('depth, is_full', [(4, False), (7, False), (8, True), (9, True), (40, True)])
def test_a_chain_that_waits_for_space_is_at_most_twice_as_long(depth: int, is_full: bool) -> None:
    copies = later([full(1)])
    copies.append(increment(2, copies[1]))
    copies[2] = copies[2]._replace(layer=copies[2].layer._replace(depth=depth))
    assert (following(copies, 4, 0).base is None) == is_full


def test_only_a_full_that_is_due_for_the_count_waits_for_space() -> None:
    for copies in ([], [a_copy(1)], [damaged(full(1))]):
        assert following(copies, 4, 0).base is None


# --- ten thousand directories ----------------------------------------------------------------------------------------

class Directory(NamedTuple):
    """What lies in a VM's directory, and which copies need a bad block of which others."""
    copies: List[Copy]
    needs_bad: FrozenSet[Tuple[str, str]]
    chosen: List[Rules]
    sealed: str
    has_unfinished: bool
    now: datetime


GAPS = [timedelta(minutes=20), timedelta(hours=9), timedelta(days=1), timedelta(days=1), timedelta(days=3), timedelta(days=20)]
OWNERS = [(US_UUID, Method.VM, ''), (US_UUID, Method.VDI, ''), (OTHERS, Method.VM, ''),
          (US_UUID, Method.VM, 'of another pool (unknown which), so it is kept and not counted')]  # type: List[Any]


def troubles(random: random_module.Random) -> Dict[str, Any]:
    """What may have become of a copy."""
    return random.choice([
        dict(checks=CONDEMNED), dict(checks=SPANNED), dict(checks=SPANNED), dict(problem='the image is not there'),
        dict(pin='pinned: before the move'), dict(pin='pinned: by hand', checks=SPANNED), dict(checks=PROVEN),
        dict(checks=PROVEN), dict(read_back=True), dict(checks=DRILLED)])


def a_layer(random: random_module.Random, copy: Copy, mine: List[Copy], is_full: bool) -> Layer:
    """The copy's place in its chain: mostly behind the last, of which and of those before it any may hold blocks."""
    base = mine[-1] if mine and random.random() < .8 else random.choice(mine) if mine else None
    if is_full or base is None:
        return Layer(1, copy.name, '', 'a full is due')
    named = [holder for holder in base.layer.holders if random.random() < .6 and holder[0] != base.layer.full]
    if random.random() < .7 and base.name != base.layer.full:
        named.append((base.name, base.mark))
    return Layer(base.layer.depth + 1, base.layer.full, base.name, 'the next',
                 ((base.layer.full, mark_of(base.layer.full)), *named))


def a_directory(random: random_module.Random) -> Directory:
    """As nights, programs, configs, people and storage may have left it."""
    now = datetime(random.randrange(2010, 2030), random.randrange(1, 13), random.randrange(1, 29), 0, 10)
    gap, is_calm, full_share = random.choice(GAPS), random.random() < .3, random.choice([.1, .2, .4])
    copies, mine = [], {owner: [] for owner in range(len(OWNERS))}  # type: List[Copy], Dict[int, List[Copy]]
    needs_bad, taken = set(), set()  # type: Set[Tuple[str, str]], Set[datetime]
    for sequence in range(1, random.choice([4, 8, 8, 14, 24]) * random.randrange(1, 5) // 4 + 2):
        now += gap if is_calm else gap * random.choice([1, 1, 1, 1, 2, 9])
        if not is_calm and random.random() < .03:
            now -= gap * random.randrange(1, 9)                          # the clock went back
        while now in taken:
            now += timedelta(seconds=1)
        taken.add(now)
        owner = 0 if is_calm or random.random() < .85 else random.randrange(len(OWNERS))
        uuid, method, aside = OWNERS[owner]
        name = now.strftime('backup-%Y-%m-%d-%H%M%S')
        copy = BLANK._replace(name=name, taken_at=now, sequence=sequence, uuid=uuid, method=method, aside=aside,
                              mark=mark_of(name))
        kind = random.random()
        if kind < .06:
            copy = copy._replace(is_old=True, sequence=0, mark='', written_at=None,
                                 name=now.strftime('backup-%Y-%m-%d-(%H:%M:%S)'))
        elif kind > .12:                       # else it tells no state of every block: made with incremental=no
            copy = copy._replace(layer=a_layer(random, copy, mine[owner], random.random() < full_share))
            mine[owner].append(copy)
        if random.random() < (.1 if is_calm else .3):
            copy = copy._replace(**troubles(random))
        copy = copy._replace(read_back=copy.read_back or random.random() < .2)
        copies.append(copy)
        needs_bad.update((name, holder) for holder, _ in (copy.layer.holders if copy.layer else ()) if random.random() < .3)
    oddity = random.random()
    if oddity < .04:                           # a manifest of a later version, one that can't be read, one that is none
        position = random.randrange(len(copies))
        copies[position] = copies[position]._replace(**random.choice([
            dict(is_newer=True, problem='newer', method=None, layer=None),
            dict(is_unreadable=True, problem='it can not be read now', method=None, layer=None),
            dict(problem='backup.json is damaged', method=None, layer=None, sequence=0, is_old=False)]))
    elif oddity < .08:                         # somebody removed one by hand
        del copies[random.randrange(len(copies))]
    random.shuffle(copies)
    sealed = max(copies, key=lambda copy: copy.sequence).name if random.random() < .3 else ''
    return Directory(copies, frozenset(needs_bad), some_rules(random), sealed, random.random() < .05, now + gap)


def some_rules(random: random_module.Random) -> List[Rules]:
    def number() -> int:
        return random.choice([0, 0, 0, 0, 1, 2, 4, 12])
    return [Rules(random.choice([1, 1, 2, 2, 4, 7]), number(), number(), number(), number(), config)
            for config in (OWN, SECOND)[:random.choice([1, 1, 1, 2])]]


def verdicts_on(place: Directory, there: Sequence[Copy]) -> List[Verdict]:
    return judge(seen(there, place.needs_bad), US_UUID, Method.VM, place.chosen, place.now, place.sealed, place.has_unfinished)


def pruned(place: Directory, random: random_module.Random) -> Tuple[Set[str], List[Copy]]:
    """What was to go at first; and what is left when pruning was interrupted after some removals, again and again, till nothing
    went. After each removal every copy that was good, or is pinned, has all that hold its blocks, also if it is to go itself."""
    there, first = list(place.copies), None  # type: List[Copy], Any
    before = {copy.name: copy for copy in seen(there, place.needs_bad)}
    dependants = {}  # type: Dict[str, Set[str]]
    for copy in before.values():
        for name in copy.layer.held_by if copy.layer and (copy.is_good or copy.pin) else ():
            dependants.setdefault(name, set()).add(copy.name)
    while True:
        going_now = [verdict.copy.name for verdict in in_removal_order(verdicts_on(place, there))]
        first = set(going_now) if first is None else first
        if not going_now:
            return first, there
        for name in going_now[:random.choice([1, 3, 99, 99])]:
            assert before[name].is_good and not before[name].pin and is_ours(before[name]), name
            there = [copy for copy in there if copy.name != name]
            robbed = dependants.get(name, set()) & {copy.name for copy in there}
            assert not robbed, '%s went, which holds blocks for %s' % (name, robbed)


@pytest.mark.parametrize('seed', range(10))
def test_a_thousand_directories_are_pruned_as_the_contract_says(seed: int) -> None:
    random = random_module.Random(seed)
    for number in range(1000):
        place, case = a_directory(random), (seed, number)
        view = seen(place.copies, place.needs_bad)
        told = staying(view, place.chosen, place.sealed, place.has_unfinished)
        gone, left = pruned(place, random)
        assert gone == told.gone, case
        removed = {copy.name for copy in view} - {copy.name for copy in left}
        # where the clock went back, one of the older program may get a later place when one of ours is gone, and stay
        assert removed == gone or removed < gone and all('(' in name for name in gone - removed), case
        good = [copy for copy in newest_first(view) if is_ours(copy) and is_sound(copy)]
        assert not good or good[0].name in {copy.name for copy in left}, case
        was_good = {copy.name for copy in view if copy.is_good}
        assert {copy.name for copy in seen(left, place.needs_bad) if copy.is_good} == was_good - removed, case


def test_nobody_is_ever_told_to_remove_what_a_copy_needs_that_stays() -> None:
    random, told = random_module.Random(3), 0
    for number in range(1500):
        place = a_directory(random)
        verdicts = verdicts_on(place, place.copies)
        sentences = idle_warnings(verdicts, US_UUID, Method.VM, place.chosen, place.now)
        told += len(sentences)
        stay = [verdict.copy for verdict in verdicts if verdict.keep]
        needed = {name for copy in stay if copy.layer and (copy.is_good or copy.pin) for name in copy.layer.held_by}
        assert not [name for name in needed if any('rm -r web/%s`' % name in sentence for sentence in sentences)], number
    assert told > 30


def test_the_directories_are_of_all_kinds() -> None:
    random, fates = random_module.Random(4), Counter()  # type: random_module.Random, Counter
    for _ in range(400):
        place = a_directory(random)
        verdicts = verdicts_on(place, place.copies)
        fates.update(kind for kind in FATES for verdict in verdicts if re.search(kind, verdict.reason))
        fates['two go'] += sum(not verdict.keep for verdict in verdicts) > 1
    assert not [kind for kind in [*FATES, 'two go'] if fates[kind] < 5], fates


FATES = ['^held for 1 ', '^held for ([2-9]|..) ', 'the last of the chain before', 'may need it', '^pinned', '^not a good copy',
         'fails it', 'newest', 'day', 'week', 'month', 'year', 'belongs to another VM', 'of the other kind', 'of another pool',
         'nothing here is removed', 'is not there', 'are newer']
