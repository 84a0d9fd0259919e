"""What history, page and monitors make of rounds that are over: pure values."""

import datetime
import json

import pytest

import VmBackup as program
from support import pages

GIB = 1 << 30


def test_a_round_comes_back_from_its_file_as_it_was_told():
    for number, is_hostile in ((0, False), (14, False), (14, True)):
        past = pages.past(pages.names_of(number, is_hostile), 29, 30)
        text = json.dumps(program.past_facts(past), indent=1, sort_keys=True)
        back = program.past_of(program.parse_object(text.encode('ascii')))
        assert program.past_facts(back) == program.past_facts(past)
        assert back.report.word == past.report.word and back.report.exit_status == past.report.exit_status


def wrong(facts, *path):
    """The facts, with a value of another kind in that place."""
    changed = json.loads(json.dumps(facts))
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = {'x': 1}
    return changed


def test_a_file_that_tells_no_round_is_refused_in_words():
    facts = json.loads(json.dumps(program.past_facts(pages.past(pages.names_of(5, False), 29, 30))))
    derived = {'word', 'exit'}                           # told for people, and read by nobody
    paths = [(key,) for key in facts if key not in derived]
    paths += [('outcomes', 0, key) for key in facts['outcomes'][0]] + [('held', 0, key) for key in facts['held'][0]]
    for path in paths:
        with pytest.raises(ValueError):
            program.past_of(wrong(facts, *path))
    for began_at in ('', 'yesterday', '0001-01-01T00:00:00Z', '9999-12-31T23:59:59Z'):
        with pytest.raises(ValueError):
            program.past_of(dict(facts, began_at=began_at))
    with pytest.raises(ValueError):
        program.past_of(dict(facts, outcomes=[dict(facts['outcomes'][0], seconds=1e300)]))
    with pytest.raises(ValueError):
        program.past_of({})


def rounds_with(used, days=1.0):
    """Rounds that ended so many days after each other with that much used of 1,000 GiB."""
    base = pages.past(['web'], 29, 30)
    return [base._replace(free_bytes=(1000 - gib) * GIB, size_bytes=1000 * GIB, report=base.report._replace(
        ended_at=pages.AT + datetime.timedelta(days=number * days))) for number, gib in enumerate(used)]


@pytest.mark.parametrize('used, days_left', [
    ([100, 110, 120, 130, 140], 86), ([100, 100, 100, 100, 100], None), ([140, 130, 120, 110, 100], None),
    ([100, 110], None), ([100], None), ([], None), ([999, 999.25, 999.5, 999.75, 1000], 0),
    ([0, 0.001, 0.002, 0.003, 0.004], None)])
def test_the_day_on_which_the_store_is_full_comes_from_its_growth(used, days_left):
    rounds = rounds_with(used)
    day = program.day_of_full_store(rounds)
    assert (day is None) == (days_left is None)
    if day is not None:
        assert abs((day - rounds[-1].report.ended_at).total_seconds() / 86400 - days_left) < 0.01


def test_growth_says_nothing_before_three_days_or_where_the_size_is_not_known():
    assert program.day_of_full_store(rounds_with([100, 110, 120, 130], days=0.9)) is None
    unknown = [one._replace(free_bytes=None) for one in rounds_with([100, 110, 120, 130, 140])]
    assert program.day_of_full_store(unknown) is None


def test_the_last_outcome_of_a_day_is_what_its_cell_tells():
    good, bad = pages.outcome('web', 1, 1), pages.outcome('web', 1, 1, 'it broke')
    late = pages.outcome('web', 1, 1, 'until', word=program.UNTRIED)
    odd = pages.outcome('web', 1, 1, findings=[program.Finding(program.Severity.WARNING, 'web', 'odd')])
    cells = [program.night_cell(outcomes)[1] for outcomes in ([], [good], [bad, good], [good, bad], [late], [odd])]
    assert cells == ['', 'G', 'G', 'F', 'N', 'W']


def test_a_vm_is_watched_for_seven_days_after_its_last_round_and_keeps_its_last_good_figures():
    nights = [pages.past(['web', 'db'] if night < 22 else ['web'], night, 30) for night in range(30)]
    for last, names in ((22, ['db', 'web']), (28, ['db', 'web']), (29, ['web'])):
        assert [one.last.name for one in program.watched(nights[:last + 1])] == names
    failed = nights[-1]._replace(report=nights[-1].report._replace(outcomes=(pages.outcome('web', 0, 29, 'it broke'),)))
    one, = program.watched(nights[:-1] + [failed])
    assert one.last.error == 'it broke' and one.last_good == nights[-2].report.outcomes[0]


def test_a_page_says_what_of_the_store_is_used_and_free():
    text = program.page_text(pages.page(3))
    assert '/mnt/nas/BACKUPS: 1.3 TiB used, 742 GiB free of 2.0 TiB.' in text
    unknown = pages.page(3)._replace(store=pages.page(3).store._replace(free_bytes=None))
    assert 'its free space is not known' in program.page_text(unknown)


def test_a_page_says_when_no_round_has_come_for_long():
    page = pages.page(3, nights=30)
    assert not any('No round has come since' in one for one in program.page_needs(page)[0])
    late = page._replace(at=page.at + datetime.timedelta(days=4))
    assert any('No round has come since 2026-03-14' in one for one in program.page_needs(late)[0])
