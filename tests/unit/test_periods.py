"""Which copies stay by days, weeks, months and years: a table of the calendar's corners, a second judge that was written from
the contract alone, and what holds whatever the rules are."""

import random as random_module
import re
from datetime import date, datetime, timedelta
from typing import Any, List, Sequence, Set

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.second_judge import staying
from support.values import NIGHT, US_UUID, a_copy, problems_of, uuid_of
from VmBackup import Copy, Method, Rules, in_order, judge

OTHERS = uuid_of(2)
OWN, SECOND, THIRD = '/cfg/nightly.cfg', '/cfg/weekend.cfg', '/cfg/yearly.cfg'


def at(text: str) -> datetime:
    """`2020-12-31`, at ten past midnight, or with a time of its own."""
    return datetime.strptime(text if ' ' in text else text + ' 00:10:00', '%Y-%m-%d %H:%M:%S')


def named(text: str, sequence: int) -> Copy:
    """The copy of that stamp; one of the older program where it ends in `old`."""
    is_old = text.endswith(' old')
    return a_copy(sequence, taken_at=at(text[:-4] if is_old else text), is_old=is_old)


def rules(newest: int = 1, daily: int = 0, weekly: int = 0, monthly: int = 0, yearly: int = 0, config: str = OWN) -> Rules:
    return Rules(newest, daily, weekly, monthly, yearly, config)


def judged(copies: Sequence[Copy], *chosen: Rules, **more: Any) -> Any:
    """The verdicts, by the copy's name, long after the last of them."""
    verdicts = judge(copies, US_UUID, Method.VM, chosen or (rules(),), more.pop('now', datetime(2100, 1, 1)), **more)
    return {verdict.copy.name: verdict for verdict in verdicts}


def going(copies: Sequence[Copy], *chosen: Rules, **more: Any) -> Set[str]:
    return {name for name, verdict in judged(copies, *chosen, **more).items() if not verdict.keep}


def is_counted(copy: Copy) -> bool:
    return copy.is_good and not copy.aside and not copy.pin and copy.uuid == US_UUID and copy.method is Method.VM


# --- the calendar ----------------------------------------------------------------------------------------------------

#: What is told of the copies (stamps, oldest first) that stay beside the newest, or as the newest, by that one rule.
CALENDAR = [
    ('week 53 of 2020 has the first days of 2021', dict(weekly=2),
     ['2020-12-27', '2020-12-28', '2020-12-31', '2021-01-01', '2021-01-03', '2021-01-04'],
     {'2021-01-03': 'week 2020-W53', '2021-01-04': 'newest 1; week 2021-W01'}),
    ('a week that goes over New Year is one week', dict(weekly=9),
     ['2020-12-27 23:59:59', '2020-12-31', '2021-01-01'],
     {'2020-12-27 23:59:59': 'week 2020-W52', '2021-01-01': 'newest 1; week 2020-W53'}),
    ('week 53 of 2026 is no week 53 of 2027', dict(weekly=3),
     ['2026-12-21', '2026-12-27', '2026-12-28', '2027-01-02', '2027-01-03', '2027-01-04'],
     {'2026-12-27': 'week 2026-W52', '2027-01-03': 'week 2026-W53', '2027-01-04': 'newest 1; week 2027-W01'}),
    ('the last days of 2024 are of week 1 of 2025', dict(weekly=2),
     ['2024-12-28', '2024-12-29', '2024-12-30', '2024-12-31', '2025-01-01'],
     {'2024-12-29': 'week 2024-W52', '2025-01-01': 'newest 1; week 2025-W01'}),
    ('the first days of 2016 are of week 53 of 2015', dict(weekly=2),
     ['2015-12-31', '2016-01-01', '2016-01-03', '2016-01-04', '2016-01-10'],
     {'2016-01-03': 'week 2015-W53', '2016-01-10': 'newest 1; week 2016-W01'}),
    ('2020-12-31 and 2021-01-01 are two days', dict(daily=2), ['2020-12-30', '2020-12-31', '2021-01-01'],
     {'2020-12-31': 'day 2020-12-31', '2021-01-01': 'newest 1; day 2021-01-01'}),
    ('a second apart, a day, a month and a year apart', dict(daily=2, monthly=2, yearly=2),
     ['2019-12-31 23:59:58', '2019-12-31 23:59:59', '2020-01-01 00:00:00'],
     {'2019-12-31 23:59:59': 'day 2019-12-31; month 2019-12; year 2019',
      '2020-01-01 00:00:00': 'newest 1; day 2020-01-01; month 2020-01; year 2020'}),
    ('midnight belongs to the day that begins', dict(daily=9),
     ['2026-05-01 23:59:59', '2026-05-02 00:00:00', '2026-05-02 23:59:59'],
     {'2026-05-01 23:59:59': 'day 2026-05-01', '2026-05-02 23:59:59': 'newest 1; day 2026-05-02'}),
    ('a year ends with its last copy, whatever week that is in', dict(yearly=3),
     ['2024-06-01', '2024-12-31', '2025-01-01', '2025-12-29', '2026-01-01'],
     {'2024-12-31': 'year 2024', '2025-12-29': 'year 2025', '2026-01-01': 'newest 1; year 2026'}),
    ('29 February is a day of February', dict(monthly=2), ['2024-02-28', '2024-02-29', '2024-03-01'],
     {'2024-02-29': 'month 2024-02', '2024-03-01': 'newest 1; month 2024-03'}),
    ('periods without a copy do not count, however many', dict(monthly=2), ['1999-01-05', '2004-03-09', '2026-11-26'],
     {'2004-03-09': 'month 2004-03', '2026-11-26': 'newest 1; month 2026-11'}),
    ('the months of two years are not one', dict(monthly=3), ['2024-11-01', '2025-11-01', '2025-12-01', '2026-11-01'],
     {'2025-11-01': 'month 2025-11', '2025-12-01': 'month 2025-12', '2026-11-01': 'newest 1; month 2026-11'}),
    ('of a night whose hour comes twice the copy made last stays', dict(daily=2),
     ['2026-10-24', '2026-10-25 02:50:00', '2026-10-25 02:10:00', '2026-10-26'],
     {'2026-10-25 02:10:00': 'day 2026-10-25', '2026-10-26': 'newest 1; day 2026-10-26'}),
    ('a night without the hour from two to three is a day as any', dict(daily=2),
     ['2026-03-28', '2026-03-29 01:59:59', '2026-03-29 03:00:00', '2026-03-30'],
     {'2026-03-29 03:00:00': 'day 2026-03-29', '2026-03-30': 'newest 1; day 2026-03-30'}),
    ('after the clock went back the newest is the last made, and the last day the latest', dict(daily=1),
     ['2026-05-10', '2026-05-11', '2026-05-09'], {'2026-05-11': 'day 2026-05-11', '2026-05-09': 'newest 1'}),
    ('of a day that came twice the copy made last stays', dict(daily=2),
     ['2026-05-10 12:00:00', '2026-05-11', '2026-05-10 06:00:00', '2026-05-11 00:00:01'],
     {'2026-05-10 06:00:00': 'day 2026-05-10', '2026-05-11 00:00:01': 'newest 1; day 2026-05-11'}),
    ('a copy of the older program is the last of its day if none of ours has a later stamp that day', dict(daily=3),
     ['2026-05-10 22:00:00 old', '2026-05-10 23:00:00', '2026-05-11 01:00:00', '2026-05-11 23:00:00 old', '2026-05-12'],
     {'2026-05-10 23:00:00': 'day 2026-05-10', '2026-05-11 23:00:00 old': 'day 2026-05-11',
      '2026-05-12': 'newest 1; day 2026-05-12'}),
    ('copies of the older program alone have periods too', dict(daily=1, monthly=2),
     ['2013-01-31 old', '2013-02-01 old', '2013-02-02 old'],
     {'2013-01-31 old': 'month 2013-01', '2013-02-02 old': 'newest 1; day 2013-02-02; month 2013-02'}),
    ('of two copies of one second the one of the older program is the later', dict(daily=2),
     ['2026-05-10 00:10:00', '2026-05-10 00:10:00 old', '2026-05-11'],
     {'2026-05-10 00:10:00 old': 'day 2026-05-10', '2026-05-11': 'newest 1; day 2026-05-11'}),
    ('of two of ours within a second the one moved to the next is the later, though that be the next day', dict(daily=3),
     ['2026-05-10 23:59:58', '2026-05-10 23:59:59', '2026-05-11 00:00:00'],
     {'2026-05-10 23:59:59': 'day 2026-05-10', '2026-05-11 00:00:00': 'newest 1; day 2026-05-11'}),
    ('the first and the last day of the calendar are days', dict(daily=2, weekly=2, yearly=2), ['0001-01-01', '9999-12-31'],
     {'0001-01-01': 'day 0001-01-01; week 0001-W01; year 0001',
      '9999-12-31': 'newest 1; day 9999-12-31; week 9999-W52; year 9999'}),
]


@pytest.mark.parametrize('claim, rule, stamps, staying', CALENDAR, ids=[case[0].replace(' ', '_') for case in CALENDAR])
def test_the_last_copy_of_each_of_the_last_periods_stays(claim: str, rule: Any, stamps: List[str], staying: Any) -> None:
    copies = [named(text, sequence) for sequence, text in enumerate(stamps, 1)]
    verdicts = judged(copies, rules(**rule))
    told = {text: verdicts[copy.name].reason for text, copy in zip(stamps, copies) if verdicts[copy.name].keep}
    assert told == staying, claim


@pytest.mark.parametrize('now', ['2026-11-26 00:10:00', '2026-11-01 00:00:00', '2001-01-01', '9999-12-31 23:59:59', '0001-01-01'])
def test_what_stays_does_not_depend_on_the_time_of_day_or_the_year_it_is(now: str) -> None:
    copies = [named(day, number) for number, day in enumerate(['2026-09-30', '2026-11-24', '2026-11-25', '2026-11-26'], 1)]
    verdicts = judged(copies, rules(daily=2, monthly=2), now=at(now))
    assert [verdict.keep for verdict in verdicts.values()] == [True, False, True, True]
    assert [verdict.reason for verdict in verdicts.values() if verdict.keep] == [
        'month 2026-09', 'day 2026-11-25', 'newest 1; day 2026-11-26; month 2026-11']


@pytest.mark.parametrize('key', ['keep_daily', 'keep_weekly', 'keep_monthly', 'keep_yearly'])
def test_a_number_of_periods_is_a_whole_number_from_none_on(key: str) -> None:
    assert problems_of('vm-export=web\n', key + '=0') == problems_of('vm-export=web\n', key + '=400') == ()
    for value in ('-1', 'x', '1.5', ''):
        assert len(problems_of('vm-export=web\n', '%s=%s' % (key, value))) == 1, value


def test_numbers_larger_than_all_time_keep_all_and_tell_no_day() -> None:
    copies = [named('2026-11-%02d' % day, day) for day in (1, 2, 3)]
    many = 10 ** 30
    verdicts = judged(copies, rules(daily=many), rules(many, many, many, many, many, SECOND), now=at('2026-11-04'))
    assert all(verdict.keep and 'not before' not in verdict.until for verdict in verdicts.values())


def test_rules_of_other_configs_are_told_with_their_path() -> None:
    copies = [named('2026-11-%02d' % day, day) for day in (1, 2, 3)]
    verdicts = judged(copies, rules(), rules(2, config=SECOND), rules(3, monthly=1, config=THIRD))
    assert [verdict.reason for verdict in verdicts.values()] == [
        'newest 3 of ' + THIRD, 'newest 2 of %s; newest 3 of %s' % (SECOND, THIRD),
        'newest 1; newest 2 of %s; newest 3 of %s; month 2026-11 of %s' % (SECOND, THIRD, THIRD)]


# --- a second judge, from the contract alone ------------------------------------------------------------------------------------

CONDEMNED = {'verdict': 'DAMAGED', 'verified_at': '2016-05-01T00:00:00Z', 'reason': 'a block differs'}
STEPS = [timedelta(seconds=1), timedelta(minutes=20), timedelta(hours=5), timedelta(days=1), timedelta(days=1), timedelta(days=6),
         timedelta(days=30), timedelta(days=300)]
BLANK = a_copy(1)


def name_of(at: datetime, is_old: bool) -> str:
    return 'backup-%s-(%s)' % (at.date(), at.time()) if is_old else 'backup-%s-%s' % (at.date(), str(at.time()).replace(':', ''))


def history(random: random_module.Random) -> List[Copy]:
    """The copies of a directory over days to decades, as clocks, programs, people and storage may have left them."""
    now = datetime(random.randrange(1998, 2040), random.choice([1, 12, 12, random.randrange(1, 13)]), random.randrange(1, 29),
                   random.choice([0, 0, 23, random.randrange(24)]), random.choice([0, 10, 59]), random.choice([0, 59]))
    step, is_calm = random.choice(STEPS), random.random() < .4
    copies, names = [], set()  # type: List[Copy], Set[str]
    for sequence in range(1, random.choice([3, 3, 6, 6, 9, 12, 60]) * random.randrange(1, 4) // 3 + 1):
        now += step if is_calm else step * random.choice([0, 1, 1, 1, 2, 9]) + timedelta(seconds=random.randrange(90))
        if not is_calm and random.random() < .05:
            now -= step * random.randrange(12)                                    # the clock went back
        is_old = random.random() < (.02 if is_calm else .2)
        while name_of(now, is_old) in names:
            now += timedelta(seconds=1)
        names.add(name_of(now, is_old))
        facts = dict(name=name_of(now, is_old), taken_at=now, is_old=is_old, sequence=0 if is_old else sequence)
        if random.random() < (.05 if is_calm else .4):
            facts.update(random.choice([
                dict(problem='the image is not there'), dict(checks=CONDEMNED), dict(uuid=OTHERS), dict(uuid=''),
                dict(method=Method.VDI), dict(method=None), dict(aside='moved by hand'), dict(pin='pinned: before the move')]))
        copies.append(BLANK._replace(**facts))
    if random.random() < .04:
        position = random.randrange(len(copies))
        copies[position] = copies[position]._replace(**{random.choice(['is_newer', 'is_unreadable']): True, 'problem': '?'})
    random.shuffle(copies)
    return copies


def some_rules(random: random_module.Random) -> List[Rules]:
    def number() -> int:
        return random.choice([0, 0, 0, 1, 2, 3, 7, 12, 40])
    return [Rules(random.choice([1, 1, 2, 4, 7, 0, -1]), number(), number(), number(), number(), config)
            for config in (OWN, SECOND, THIRD)[:random.choice([1, 1, 2, 3])]]


@pytest.mark.parametrize('seed', range(10))
def test_a_thousand_histories_are_judged_as_the_contract_says(seed: int) -> None:
    random = random_module.Random(seed)
    for number in range(1000):
        copies, chosen = history(random), some_rules(random)
        sealed = random.choice(['', '', random.choice(copies).name])
        now = max(copy.taken_at for copy in copies) + timedelta(days=random.choice([0, 1, 9, 400]))
        verdicts = judge(copies, US_UUID, Method.VM, chosen, now, sealed)
        told = staying(copies, chosen, sealed)
        case = (seed, number, chosen, sealed, in_order(copies))
        assert {verdict.copy.name for verdict in verdicts if not verdict.keep} == told.gone, case
        for verdict in verdicts:
            if told.held.get(verdict.copy.name):
                words = verdict.reason.split('; ')
                assert set(words) == told.held[verdict.copy.name] and len(set(words)) == len(words), (verdict, case)
            assert verdict.reason, case


def test_the_second_judge_tells_cases_apart() -> None:
    """It would say so if all its histories were of one kind."""
    random, fates = random_module.Random(7), set()
    for _ in range(400):
        copies, chosen = history(random), some_rules(random)
        told = staying(copies, chosen, '')
        fates.update(re.sub('[0-9].*', '', word) for words in told.held.values() for word in words)
        fates.add(len(told.gone) > 3)
        fates.add(bool(told.held) and not told.gone)
    assert fates >= {True, False, 'newest ', 'day ', 'week ', 'month ', 'year '}


# --- whatever the rules are -----------------------------------------------------------------------------------------------------

NUMBERS = st.sampled_from([0, 0, 1, 2, 3, 8])


@st.composite
def shelves(draw: Any) -> List[Copy]:
    return history(random_module.Random(draw(st.integers(0, 10 ** 6))))


def rules_of(config: str) -> Any:
    return st.builds(Rules, st.integers(-1, 6), NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.just(config))


def rule_sets() -> Any:
    return st.tuples(rules_of(OWN), rules_of(SECOND), rules_of(THIRD)).flatmap(
        lambda three: st.integers(1, 3).map(lambda number: three[:number]))


@given(shelves(), rule_sets())
def test_the_newest_good_copy_never_goes_nor_the_last_that_we_made(copies: Any, chosen: Any) -> None:
    counted = [copy for copy in in_order(copies) if is_counted(copy)]
    ours = [copy for copy in counted if not copy.is_old]
    assert not going(copies, *chosen) & {copy.name for copy in counted[-1:] + ours[-1:]}


@given(shelves(), rule_sets(), rules_of('/cfg/another.cfg'))
def test_one_config_more_never_lets_anything_more_go(copies: Any, chosen: Any, another: Any) -> None:
    assert going(copies, *chosen, another) <= going(copies, *chosen)


@given(shelves(), rule_sets(), st.data())
def test_a_larger_number_never_lets_anything_more_go(copies: Any, chosen: Any, data: Any) -> None:
    which, field = data.draw(st.integers(0, len(chosen) - 1)), data.draw(st.sampled_from(Rules._fields[:-1]))
    raised = chosen[which]._replace(**{field: getattr(chosen[which], field) + data.draw(st.integers(1, 30))})
    assert going(copies, *chosen[:which], raised, *chosen[which + 1:]) <= going(copies, *chosen)


@given(shelves(), rule_sets())
def test_what_goes_is_good_and_of_this_vm_and_kind_at_home_and_not_pinned(copies: Any, chosen: Any) -> None:
    gone = going(copies, *chosen)
    assert all(is_counted(copy) for copy in copies if copy.name in gone)


@given(shelves(), rule_sets(), st.data())
def test_a_pinned_copy_stays_and_is_to_the_others_as_if_it_were_not_of_their_vm(copies: Any, chosen: Any, data: Any) -> None:
    position = data.draw(st.integers(0, len(copies) - 1))

    def with_one(**facts: Any) -> List[Copy]:
        return copies[:position] + [copies[position]._replace(**facts)] + copies[position + 1:]

    name = copies[position].name
    pinned, strange = judged(with_one(pin='pinned: why'), *chosen), judged(with_one(uuid=OTHERS), *chosen)
    assert pinned.pop(name).keep and strange.pop(name).keep
    assert pinned == strange


@given(shelves(), rule_sets())
def test_a_copy_that_goes_is_held_by_no_rule_and_each_rule_is_told_why(copies: Any, chosen: Any) -> None:
    for verdict in judged(copies, *chosen).values():
        if not verdict.keep:
            assert re.match(r'\d+ good cop(y is|ies are) newer, and \d+ (is|are) kept', verdict.reason)
            assert all(one.config in verdict.reason for one in chosen[1:]) and not verdict.until


@given(shelves(), rule_sets())
def test_judging_what_is_left_lets_nothing_more_go(copies: Any, chosen: Any) -> None:
    gone = going(copies, *chosen)
    assert going([copy for copy in copies if copy.name not in gone], *chosen) - gone == set()


@given(shelves(), rule_sets(), st.integers(0, 60 * 24 * 40))
def test_to_make_room_only_that_goes_which_would_go_after_the_new_copy_and_never_all(copies: Any, chosen: Any,
                                                                                     minutes: int) -> None:
    gone = going(copies, chosen[0]._replace(newest=chosen[0].newest - 1), *chosen[1:])
    counted = {copy.name for copy in copies if is_counted(copy)}
    assert not counted or counted - gone, 'a good one stays'
    now = max(copy.taken_at for copy in copies) + timedelta(minutes=minutes, seconds=1)
    new = a_copy(max(copy.sequence for copy in copies) + 1, taken_at=now)
    assert gone <= going(copies + [new], *chosen), 'what is wanted beside the new copy is not given up for it'


@given(shelves(), rule_sets(), st.integers(0, 1000))
def test_the_order_of_listing_does_not_matter(copies: Any, chosen: Any, seed: int) -> None:
    shuffled = random_module.Random(seed).sample(copies, len(copies))
    assert judged(shuffled, *chosen) == judged(copies, *chosen)


# --- until when ----------------------------------------------------------------------------------------------------

UNTIL = re.compile(r'at least until (\d+) more good (?:copy is|copies are) there(?:, not before (\d{4}-\d\d-\d\d))?')


def promise(text: str) -> Any:
    """How many more copies, and which day, must have come before the copy may go."""
    match = UNTIL.fullmatch(text)
    assert match, text
    return int(match.group(1)), date(*map(int, match.group(2).split('-'))) if match.group(2) else date.min


ONE, MORE, DAY = 'at least until 1 more good copy is there', 'at least until %d more good copies are there', ', not before 2026-11-%d'


@pytest.mark.parametrize('rule, untils', [
    (dict(newest=4), [ONE, MORE % 2, MORE % 3, MORE % 4]),
    (dict(newest=9), [MORE % 6, MORE % 7, MORE % 8, MORE % 9]),
    (dict(daily=4), [ONE + DAY % 26, MORE % 2 + DAY % 27, MORE % 3 + DAY % 28, ONE]),
    (dict(newest=2, weekly=2), [ONE + DAY % 30, '', ONE, MORE % 2]),
    (dict(daily=4, weekly=2), [ONE + DAY % 30, MORE % 2 + DAY % 27, MORE % 3 + DAY % 28, ONE]),
    (dict(newest=3, daily=2), ['', ONE, MORE % 2 + DAY % 26, MORE % 3]),
    (dict(monthly=12), ['', '', '', ONE])])
def test_until_when_a_copy_is_held_is_told(rule: Any, untils: List[str]) -> None:
    copies = [named('2026-11-%d' % day, day) for day in (22, 23, 24, 25)]        # 22 November 2026 is a Sunday
    assert [verdict.until for verdict in judged(copies, rules(**rule), now=at('2026-11-25 12:00:00')).values()] == untils


def test_a_period_that_has_no_copy_yet_is_the_first_that_can_have_one() -> None:
    copies = [named('2026-11-%d' % day, day) for day in (22, 23, 24, 25)]
    verdicts = judged(copies, rules(daily=2), now=at('2026-11-26 00:00:00'))
    assert [verdict.until for verdict in verdicts.values()] == ['', '', ONE + DAY % 26, MORE % 2 + DAY % 27]


@pytest.mark.parametrize('unit, now, day', [
    ('weekly', '2026-11-26', '2026-12-14'), ('weekly', '2026-11-23', '2026-12-14'),
    ('weekly', '2026-11-29 23:59:59', '2026-12-14'), ('weekly', '2026-12-28', '2027-01-18'),
    ('weekly', '2020-12-31', '2021-01-18'),
    ('monthly', '2026-11-30', '2027-02-01'), ('monthly', '2026-01-31', '2026-04-01'), ('monthly', '2026-10-01', '2027-01-01'),
    ('yearly', '2024-02-29', '2027-01-01'), ('daily', '2024-02-27', '2024-03-01'),
    ('daily', '2026-12-29 23:59:59', '2027-01-01')])
def test_a_copy_is_held_until_so_many_later_periods_can_have_one(unit: str, now: str, day: str) -> None:
    copies = [named('2019-05-05', 1), a_copy(2, taken_at=at(now))]
    first = list(judged(copies, rules(**{unit: 4}), now=at(now)).values())[0]
    assert first.until == 'at least until 3 more good copies are there, not before ' + day


def test_a_pinned_copy_is_held_until_it_is_unpinned() -> None:
    verdict = judged([a_copy(1, pin='pinned: the last with the old kernel'), a_copy(2)])[a_copy(1).name]
    assert (verdict.keep, verdict.reason, verdict.until) == (True, 'pinned: the last with the old kernel', 'until it is unpinned')


@pytest.mark.parametrize('nights', ['one a day', 'whenever'])
@pytest.mark.parametrize('seed', range(4))
def test_no_copy_goes_before_so_many_more_are_there_and_that_day_has_come(seed: int, nights: str) -> None:
    random = random_module.Random(seed)
    for _ in range(8):
        copies = [copy for copy in history(random) if not (copy.is_newer or copy.is_unreadable)][-20:]
        if not any(is_counted(copy) for copy in copies):
            continue
        chosen = [one._replace(daily=min(one.daily, 7), weekly=min(one.weekly, 3), monthly=min(one.monthly, 2), yearly=0)
                  for one in some_rules(random)]
        now = max(copy.taken_at for copy in copies) + timedelta(minutes=random.randrange(1, 5000))
        promises = {verdict.copy.name: promise(verdict.until) for verdict in judged(copies, *chosen, now=now).values()
                    if is_counted(verdict.copy) and verdict.until}
        for added in range(1, 50):
            now += timedelta(days=1) if nights == 'one a day' else timedelta(minutes=random.choice([1, 300, 1440, 9000, 40000]))
            copies.append(a_copy(max(copy.sequence for copy in copies) + 1, taken_at=now))
            gone = going(copies, *chosen, now=now)
            for name in gone & set(promises):
                more, day = promises[name]
                assert added >= more and now.date() >= day, (name, promises[name], added, now, chosen)
            copies = [copy for copy in copies if copy.name not in gone]


@pytest.mark.parametrize('unit, number, days', [
    ('daily', 3, 1), ('daily', 1, 1), ('weekly', 2, 7), ('weekly', 4, 7), ('newest', 3, 1), ('newest', 1, 7)])
def test_with_one_rule_and_one_copy_a_period_a_copy_goes_on_the_very_day_that_was_told(unit: str, number: int, days: int) -> None:
    copies = [a_copy(night, taken_at=NIGHT + timedelta(days=days * night)) for night in range(2, number + 2)]
    now = copies[-1].taken_at + timedelta(days=days, minutes=-20)              # the night's run has not begun yet
    told = {name: verdict.until for name, verdict in judged(copies, rules(**{unit: number}), now=now).items() if verdict.keep}
    for added in range(1, number + 1):
        now = NIGHT + timedelta(days=days * (number + 1 + added))
        copies.append(a_copy(number + 1 + added, taken_at=now))
        (gone,) = going(copies, rules(**{unit: number}), now=now)
        more, day = promise(told.pop(gone))
        if added < number:                         # the newest could have gone for another copy of its own period
            begin = now.date() - timedelta(days=now.weekday() * (unit == 'weekly'))
            # a day that was past when it was told is left out
            assert added == more and (unit == 'newest' or day in (begin, date.min) and (unit == 'weekly' or day == begin))
        copies = [copy for copy in copies if copy.name != gone]
    assert told == {}
