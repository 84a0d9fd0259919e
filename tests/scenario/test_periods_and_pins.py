"""Retention by days, weeks, months and years, as a person sees it; two configs on one VM; pins; VMs that dropped out of all."""

import glob
import json
import os
import re
from datetime import datetime, timedelta
from typing import Any, Dict, List, Sequence

import pytest

from support import warm
from support.deeds import backup, in_trouble, preview, without_pool
from support.language import MEBIBYTE, at, uuid_of, vm
from support.process import Run, ended, run_program
from support.recovery import stopped_at
from support.shelf import STATE, complete, copied, damaged, old
from VmBackup import Catalog, CatalogError, free_copy_name

UNITS = (('keep_daily', 'day %Y-%m-%d'), ('keep_weekly', 'week %G-W%V'), ('keep_monthly', 'month %Y-%m'),
         ('keep_yearly', 'year %Y'))
#: How long ago the copies of `a_long_shelf` were made, in days.
DAYS = (800, 790, 430, 380, 200, 95, 63, 40, 33, 26, 20, 13, 12, 9, 5, 4, 3, 2, 1)
RULES = ('max_backups=2', 'keep_daily=3', 'keep_weekly=4', 'keep_monthly=5', 'keep_yearly=2')
PLANS = STATE + '/plans'


def taken_at(name: str) -> datetime:
    return datetime.strptime(re.sub('[^0-9]', '', name), '%Y%m%d%H%M%S')


def held(names: Sequence[str], *lines: str) -> Dict[str, str]:
    """The rules that hold each of these copies, which stand in order, by those lines of a config."""
    number = {line.split('=')[0]: int(line.split('=')[1]) for line in lines}
    words = {name: ['newest %d' % number['max_backups']] for name in names[-number['max_backups']:]}
    for key, form in UNITS:
        last = {taken_at(name).strftime(form): name for name in names}       # a later one takes the place of an earlier one
        for period in sorted(last)[-number[key]:] if number.get(key) else []:
            words.setdefault(last[period], []).append(period)
    return {name: '; '.join(told) for name, told in words.items()}


def fates(run: Run) -> Dict[str, Any]:
    """What `list format=json` tells of each copy of the store, by its name."""
    return {copy['name']: copy for row in json.loads(run.stdout)['vms'] for copy in row['copies']}


def rules(newest: int = 1, daily: int = 0, weekly: int = 0, monthly: int = 0, yearly: int = 0) -> Dict[str, int]:
    return dict(newest=newest, daily=daily, weekly=weekly, monthly=monthly, yearly=yearly)


def removed(run: Run) -> List[str]:
    """The copies that it says it has removed, or would remove."""
    return re.findall(r'(?:removed|would remove):? (?:web/)?(backup-[0-9-]+)', run.stdout)


def another_config(shelf: Any, name: str, *lines: str) -> str:
    """The path of a config beside weekend.cfg, with the same backup_dir."""
    path = os.path.join(os.path.realpath(shelf.home), name)
    with open(path, 'w', encoding='utf-8') as file:
        file.write('\n'.join(('backup_dir=' + shelf.path, 'status_log=' + shelf.status_log) + lines) + '\n')
    return path


def run_of(pool: Any, path: str, *words: str) -> Run:
    return run_program('-', path, *words, environment=pool.environment())


def made_by(shelf: Any, numbers: Dict[str, int], config: str = 'weekend.cfg', **more: Any) -> Any:
    """The shelf, all its copies of web as that config made them while it had these rules."""
    for name in shelf.copies('web'):
        path = os.path.join(os.path.realpath(shelf.home), config)
        manifest = dict(shelf.manifest('web', name), rules=numbers, config=path, **more)
        with open(shelf.at('web', name, 'backup.json'), 'w', encoding='utf-8') as file:
            json.dump(manifest, file)
    shelf.first_tree = shelf.tree()
    return shelf


@pytest.fixture
def a_long_shelf(a_shelf: Any) -> Any:
    return made_by(a_shelf(*[complete('web', days_ago=day) for day in DAYS]), rules(1))


# --- days, weeks, months and years ------------------------------------------------------------------------------------

@pytest.mark.parametrize('is_in_file', [True, False])
def test_one_good_copy_of_each_of_the_last_days_weeks_months_and_years_stays(a_pool: Any, a_long_shelf: Any,
                                                                             is_in_file: bool) -> None:
    shelf, given = a_long_shelf, a_long_shelf.copies('web')
    run = backup(a_pool(vm('web')), shelf, 'vm-export=web', *(RULES if is_in_file else ['max_backups=9']),
                 words=() if is_in_file else RULES)
    new = shelf.newest('web')
    staying = sorted(held(given + [new], *RULES))
    assert run.exit_status == 0 and shelf.copies('web') == staying and 8 < len(staying) < 16, run
    gone = [name for name in given if name not in staying]
    assert removed(run) == gone
    for number, name in enumerate(gone):
        newer = len(given) - given.index(name)
        assert run.says('removed web/%s (retention): %d good copies are newer, and 2 are kept, and one of each of the last 3 days, 4 weeks, '
                        '5 months, 2 years.' % (name, newer)), (name, run)


@pytest.mark.parametrize('line', ['keep_daily=-1', 'keep_weekly=often', 'keep_monthly=1.5', 'keep_yearly='])
def test_a_number_of_periods_that_is_none_is_refused(a_long_shelf: Any, line: str) -> None:
    run = without_pool(a_long_shelf, 'prune', lines=('vm-export=web:1', line))
    assert run.exit_status == 2 and line.split('=')[0] in run.stderr and a_long_shelf.is_unchanged(), run


def test_preview_tells_for_every_copy_what_holds_it_or_why_it_goes_and_the_run_does_just_that(a_pool: Any,
                                                                                              a_long_shelf: Any) -> None:
    pool, shelf, given = a_pool(vm('web')), a_long_shelf, a_long_shelf.copies('web')
    shown = preview(pool, shelf, 'vm-export=web', *RULES)
    assert shown.exit_status == 0 and shelf.is_unchanged(), shown
    assert shown.says('2 copies kept, and one of each of the last 3 days, 4 weeks, 5 months, 2 years'), shown
    assert backup(pool, shelf, 'vm-export=web', *RULES).exit_status == 0
    told = held(given + [shelf.newest('web')], *RULES)
    for name in given:
        if name in told:
            assert shown.says('keeps %s: %s (at least until ' % (name, told[name])), (name, shown)
        else:
            assert shown.says('then removes %s: ' % name), (name, shown)
        assert (name in shelf.copies('web')) == (name in told)


def test_prune_preview_tells_the_same_of_what_is_there_and_prune_does_it(a_long_shelf: Any) -> None:
    shelf, given = a_long_shelf, a_long_shelf.copies('web')
    lines, told = ('vm-export=web',) + RULES, held(given, *RULES)
    shown = without_pool(shelf, 'prune', 'preview', lines=lines)
    assert shown.exit_status == 0 and shelf.is_unchanged(), shown
    for name in given:
        words = 'would keep: web/%s: %s (at least until ' % (name, told[name]) if name in told else 'would remove: web/%s: ' % name
        assert shown.says(words), (words, shown)
    run = without_pool(shelf, 'prune', lines=lines)
    assert run.exit_status == 0 and shelf.copies('web') == sorted(told) and removed(run) == removed(shown), run
    assert without_pool(shelf, 'prune', lines=lines).says('0 copies removed.')


def test_list_tells_the_rules_that_hold_each_copy_and_until_when_in_text_and_json(a_shelf: Any) -> None:
    shelf = made_by(a_shelf(*[complete('web', days_ago=day) for day in (3, 2, 1)],
                            complete('web', days_ago=1.5, kind='vdi-export')), rules(1))
    first, second, other, last = shelf.names('web')
    lines = ('vm-export=web:1', 'keep_daily=2')
    second_day, last_day = [taken_at(name).strftime('%Y-%m-%d') for name in (second, last)]
    today = taken_at(last) + timedelta(days=1)          # by the copies, as midnight may have passed meanwhile
    told = {first: 'goes with the next pruning: 2 good copies are newer, and 1 is kept, and one of each of the last 2 days',
            second: 'kept: day %s (at least until 1 more good copy is there, not before %s)' % (second_day, today.strftime('%Y-%m-%d')),
            last: 'kept: newest 1; day %s (at least until 2 more good copies are there, not before %s)' % (
                last_day, (today + timedelta(days=1)).strftime('%Y-%m-%d'))}
    run = without_pool(shelf, 'list', lines=lines)
    assert run.exit_status == 0, run
    for name, words in told.items():
        assert any(name in line and line.endswith('  ' + words) for line in run.stdout.splitlines()), (words, run)
    shown = without_pool(shelf, 'list', 'format=json', lines=lines)
    copies = fates(shown)
    assert {name: copies[name]['fate'] for name in told} == told
    assert [copies[name]['kept'] for name in (first, second, last)] == [False, True, True]
    assert not any(copy['pinned'] for copy in copies.values())
    assert (copies[second]['reason'], copies[second]['until']) == tuple(told[second][len('kept: '):-1].split(' ('))
    assert copies[first]['until'] == '' and copies[other]['reason'].startswith('newest 1; day ')
    for row in json.loads(shown.stdout)['vms']:
        assert row['rules'] == [dict(rules(1, daily=2), config=os.path.realpath(shelf.config_path))] and row['keep'] == 1


def test_the_number_that_a_copy_of_an_earlier_version_tells_counts_without_a_pool_where_it_is_larger(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(*[complete('web', days_ago=day, copies_to_keep=2) for day in (3, 2, 1)])
    first, second, last = shelf.copies('web')
    run = without_pool(shelf, 'list', lines=('vm-export=web:1',))
    assert run.says('2 good copies are newer, and 2 are kept') and run.says('kept: newest 2 (at least until'), run
    (row,) = json.loads(without_pool(shelf, 'list', 'format=json', lines=('vm-export=web:1',)).stdout)['vms']
    assert [(one['newest'], one['config']) for one in row['rules']] == [(2, os.path.realpath(shelf.config_path))]
    assert without_pool(shelf, 'prune', lines=('vm-export=web:1',)).exit_status == 0 and shelf.copies('web') == [second, last]
    assert backup(a_pool(vm('web')), shelf, 'vm-export=web:1').exit_status == 0 and len(shelf.copies('web')) == 1, 'a run lowers it'


def test_the_number_behind_a_selector_takes_the_place_of_max_backups_alone(a_pool: Any, a_long_shelf: Any) -> None:
    shelf, given = a_long_shelf, a_long_shelf.copies('web')
    run = backup(a_pool(vm('web')), shelf, 'max_backups=9', 'vm-export=web:1', 'keep_weekly=3')
    staying = held(given + [shelf.newest('web')], 'max_backups=1', 'keep_weekly=3')
    assert run.exit_status == 0 and shelf.copies('web') == sorted(staying), run


def test_the_manifest_tells_the_rules_and_the_config_and_the_number_that_earlier_versions_read(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    assert backup(pool, shelf, 'vm-export=web:3', *RULES[1:]).exit_status == 0
    manifest = shelf.manifest('web', shelf.newest('web'))
    assert manifest['rules'] == rules(3, 3, 4, 5, 2) and manifest['copies_to_keep'] == 3
    assert manifest['config'] == os.path.realpath(shelf.config_path)
    os.symlink(shelf.config_path, os.path.join(shelf.home, 'link.cfg'))
    assert run_of(pool, os.path.join(shelf.home, 'link.cfg'), 'keep_daily=0').exit_status == 0
    manifest = shelf.manifest('web', shelf.newest('web'))
    assert manifest['rules'] == rules(3, 0, 4, 5, 2) and manifest['config'] == os.path.realpath(shelf.config_path)


def test_each_kind_has_its_own_periods(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(*[complete('web', days_ago=day, kind=kind, copies_to_keep=1)
                      for day, kind in ((5, 'vm-export'), (4, 'vdi-export'), (3, 'vdi-export'), (2, 'vm-export'))])
    given = shelf.names('web')
    run = backup(a_pool(vm('web')), shelf, 'vm-export=web:1', 'keep_daily=2')
    assert run.exit_status == 0 and shelf.copies('web')[:-1] == given[1:], run


def test_copies_of_the_older_program_have_periods_as_ours(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(*[old('web', days_ago=day) for day in (70, 69, 5, 4)], complete('web', days_ago=2, copies_to_keep=1))
    given = shelf.copies('web')
    run = backup(a_pool(vm('web')), shelf, 'max_backups=1', 'vm-export=web', 'keep_daily=3', 'keep_monthly=3')
    staying = held(given + [shelf.newest('web')], 'max_backups=1', 'keep_daily=3', 'keep_monthly=3')
    assert run.exit_status == 0 and set(shelf.copies('web')) == set(staying), run


def test_pre_clean_makes_room_by_the_newest_alone_and_gives_up_no_period(a_pool: Any, a_long_shelf: Any) -> None:
    shelf, given = a_long_shelf, a_long_shelf.copies('web')
    pool = a_pool(vm('web'), faults=[at('http:/export', nth=1, breaks_off_after=MEBIBYTE)])
    lines = ('max_backups=3', 'vm-export=web', 'keep_monthly=4', 'pre_clean=yes')
    assert backup(pool, shelf, *lines).exit_status == 1
    assert shelf.copies('web') == sorted(held(given, 'max_backups=2', 'keep_monthly=4'))
    before = shelf.copies('web')
    assert backup(pool, shelf, *lines).exit_status == 0
    assert shelf.copies('web') == sorted(held(before + [shelf.newest('web')], 'max_backups=3', 'keep_monthly=4'))


def test_preview_tells_what_goes_to_make_room_too(a_pool: Any, a_long_shelf: Any) -> None:
    pool, shelf, given = a_pool(vm('web')), a_long_shelf, a_long_shelf.copies('web')
    lines = ('max_backups=3', 'vm-export=web', 'keep_monthly=4', 'pre_clean=yes')
    shown = preview(pool, shelf, *lines)
    assert shelf.is_unchanged() and backup(pool, shelf, *lines).exit_status == 0
    gone = [name for name in given if name not in shelf.copies('web')]
    assert gone and [name for name in given if shown.says('removes ' + name)] == gone, shown


# --- two configs on one VM ------------------------------------------------------------------------------------------------

def test_two_configs_on_one_vm_never_prune_what_the_other_wants(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf(*[complete('web', days_ago=day, copies_to_keep=1) for day in (70, 65, 40, 35, 3, 2)])
    given = shelf.copies('web')
    monthly = another_config(shelf, 'monthly.cfg', 'vm-export=web:1', 'keep_monthly=12')
    nightly = another_config(shelf, 'nightly.cfg', 'vm-export=web:2')
    for path in (monthly, nightly, monthly):
        assert run_of(pool, path).exit_status == 0
    names = shelf.copies('web')
    months = held(given + names[-2:], 'max_backups=1', 'keep_monthly=12')
    assert set(names) == set(months) | set(names[-2:]) and len(names) >= 4
    for path in (monthly, nightly):
        run = run_program('-', path, 'list', 'format=json')
        copies = fates(run)
        for name in names[:-2]:
            of = '' if path == monthly else ' of ' + monthly
            assert copies[name]['reason'] == months[name] + of, run
        (row,) = json.loads(run.stdout)['vms']
        assert [one['config'] for one in row['rules']] == [path, nightly if path == monthly else monthly]
        assert row['rules'][0] == dict(rules(1, monthly=12) if path == monthly else rules(2), config=path)


def test_what_a_config_wants_stays_though_none_of_the_copies_that_it_made_is_left(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf(*[complete('web', days_ago=day, copies_to_keep=1) for day in (70, 40)])
    given = shelf.copies('web')
    monthly = another_config(shelf, 'monthly.cfg', 'vm-export=web:1', 'keep_monthly=12')
    nightly = another_config(shelf, 'nightly.cfg', 'vm-export=web:2')
    for path in (monthly, nightly, nightly, nightly):
        assert run_of(pool, path).exit_status == 0
    assert shelf.copies('web')[:2] == given, 'the last of the month is one of the nightly copies, and so monthly.cfg has none'


def test_rules_that_were_raised_count_though_the_copy_that_told_them_is_gone(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), made_by(a_shelf(*[complete('web', days_ago=day) for day in (130, 100, 70, 40)]),
                                             rules(1, monthly=2), 'monthly.cfg')
    given = shelf.copies('web')
    monthly = another_config(shelf, 'monthly.cfg', 'vm-export=web:1', 'keep_monthly=12')
    nightly = another_config(shelf, 'nightly.cfg', 'vm-export=web:2')
    for path in (monthly, nightly, nightly, nightly):
        assert run_of(pool, path).exit_status == 0
    assert shelf.copies('web')[:4] == given


def test_prune_without_a_pool_honours_the_rules_of_both_configs(a_shelf: Any) -> None:
    other = '/snapshots/NAUbackup/monthly.cfg'
    shelf = a_shelf(*[complete('web', days_ago=day, config=other, rules=rules(1, monthly=12)) for day in (100, 70, 40)],
                    *[complete('web', days_ago=day, copies_to_keep=1) for day in (3, 2, 1)])
    given = shelf.copies('web')
    months = held(given, 'max_backups=1', 'keep_monthly=12')
    run = without_pool(shelf, 'prune', 'preview', lines=('vm-export=web:1',))
    assert run.says('would keep: web/%s: %s of %s (at least until ' % (given[0], months[given[0]], other)), run
    assert run.says('1 is kept; newest 1, and one of each of the last 12 months of ' + other), run
    run = without_pool(shelf, 'prune', lines=('vm-export=web:1',))
    assert run.exit_status == 0 and set(shelf.copies('web')) == set(months), run


def test_the_newest_manifest_of_a_config_tells_its_rules_so_that_they_can_be_lowered(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    greedy, modest = [another_config(shelf, *words) for words in (
        ('greedy.cfg', 'vm-export=web:3'), ('modest.cfg', 'vm-export=web:1'))]
    for _ in range(4):
        assert run_of(pool, greedy).exit_status == 0
    for _ in range(2):
        assert run_of(pool, modest).exit_status == 0
    assert len(shelf.copies('web')) == 3
    another_config(shelf, 'greedy.cfg', 'vm-export=web:1')                   # lowered, but no run has said so yet
    assert run_of(pool, modest).exit_status == 0 and len(shelf.copies('web')) >= 3
    for path in (greedy, modest):
        assert run_of(pool, path).exit_status == 0 and len(shelf.copies('web')) <= 2, 'each has its newest'
    another_config(shelf, 'greedy.cfg', 'vm-export=web:3')                   # and raised again
    for path in (greedy, modest, modest):
        assert run_of(pool, path).exit_status == 0
    assert len(shelf.copies('web')) >= 3


@pytest.mark.parametrize('before, now', [(9, 2), (1, 4)])
def test_of_another_config_the_rules_in_its_newest_manifest_count(a_shelf: Any, before: int, now: int) -> None:
    shelf = a_shelf(*[complete('web', days_ago=day, config='/other.cfg', rules=rules(before if day > 2 else now))
                      for day in range(1, 7)])
    given = shelf.copies('web')
    run = without_pool(shelf, 'prune', lines=('vm-export=web:1',))
    assert run.exit_status == 0 and shelf.copies('web') == given[-now:], run


def test_lowered_rules_of_this_config_act_once_a_run_has_told_them(a_pool: Any, a_shelf: Any) -> None:
    shelf = made_by(a_shelf(*[complete('web', days_ago=day) for day in (5, 4, 3, 2, 1)]), rules(9, 9))
    run = without_pool(shelf, 'prune', lines=('vm-export=web:2',))
    assert run.exit_status == 0 and shelf.has('web', complete=5), run
    assert without_pool(shelf, 'prune', 'max_backups=1', lines=('vm-export=*',)).exit_status == 0 and shelf.has('web', complete=5)
    run = backup(a_pool(vm('web')), shelf, 'vm-export=web:2')
    assert run.exit_status == 0 and shelf.has('web', complete=2) and run.says('and 2 are kept.'), run


@pytest.mark.parametrize('lines', [('vm-export=*:2', 'vm-export=tag:gold:30'), ('vm-export=*:9', 'vdi-export=web:1')])
def test_prune_without_a_pool_removes_nothing_for_a_line_of_which_only_the_pool_knows_whether_it_decides(
        a_shelf: Any, lines: Any) -> None:
    shelf = made_by(a_shelf(*[complete('web', days_ago=day) for day in range(9, 0, -1)]), rules(9))
    run = without_pool(shelf, 'prune', lines=lines)
    assert run.exit_status == 0 and shelf.has('web', complete=9), run


def test_prune_without_a_pool_goes_by_what_this_config_told_last_though_only_the_copy_of_another_carries_it(a_shelf: Any) -> None:
    shelf = made_by(a_shelf(*[complete('web', days_ago=day) for day in range(9, 0, -1)]), rules(1), 'other.cfg')
    told = {'config': os.path.realpath(shelf.config_path), 'at': shelf.manifest('web', shelf.copies('web')[0])['taken_at'],
            'rules': rules(8)}
    made_by(shelf, rules(1), 'other.cfg', **{'other-rules': [told]})
    run = without_pool(shelf, 'prune', lines=('vm-export=web:2', 'vm-export=tag:gold:8'))
    assert run.exit_status == 0 and shelf.has('web', complete=8), run


def test_rules_of_other_files_are_carried_on_for_400_days_and_those_of_what_was_chosen_by_hand_not(a_pool: Any, a_shelf: Any) -> None:
    given = [('/dead.cfg', 401), ('/yearly.cfg', 399), ('vm-export=web', 2), ('/monthly.cfg', 1)]
    shelf = a_shelf(*[complete('web', days_ago=day, config=config, rules=rules(1)) for config, day in given])
    assert backup(a_pool(vm('web')), shelf, 'vm-export=web:1').exit_status == 0
    carried = shelf.manifest('web', shelf.newest('web'))['other-rules']
    assert sorted(row['config'] for row in carried) == ['/monthly.cfg', '/yearly.cfg'] and carried[0]['rules'] == rules(1)


def test_prune_tells_of_each_copy_once_though_there_are_two_kinds(a_shelf: Any) -> None:
    shelf = a_shelf(*nights(3), *[complete('web', days_ago=day + .5, kind='vdi-export', copies_to_keep=1) for day in (2, 1)])
    run = without_pool(shelf, 'prune', 'preview', lines=('vm-export=web:1',))
    told = [line.split('web/')[1].split(':')[0] for line in run.stdout.splitlines() if 'web/' in line]
    assert run.exit_status == 0 and sorted(told) == shelf.copies('web'), run


def test_what_older_manifests_told_of_other_configs_counts_no_more_once_a_newer_one_is_silent(a_shelf: Any) -> None:
    other = {'config': '/gone.cfg', 'at': '2016-01-01T00:00:00Z', 'rules': rules(9)}
    shelf = a_shelf(*[complete('web', days_ago=day, config='/weekend.cfg', rules=rules(1), **{'other-rules': [other] * (day > 2)})
                      for day in (4, 3, 2, 1)])
    run = without_pool(shelf, 'prune', lines=('vm-export=web:1',))
    assert run.exit_status == 0 and shelf.has('web', complete=1), run


def test_by_hand_it_is_told_what_still_holds_the_copies_that_stay(a_shelf: Any) -> None:
    shelf = made_by(a_shelf(*[complete('web', days_ago=day) for day in (3, 2, 1)]), rules(3))
    first, second, last = shelf.copies('web')
    run = without_pool(shelf, 'prune', 'web', 'max_backups=1', lines=('vm-export=web', 'keep_daily=2'))
    assert run.exit_status == 0 and shelf.copies('web') == [second, last], run
    assert run.says('kept: web/%s: day ' % second) and run.says('kept: web/%s: newest 1; day ' % last), run


def test_of_one_vm_what_is_said_by_hand_counts_alone_whatever_other_configs_want(a_shelf: Any) -> None:
    shelf = a_shelf(*[complete('web', days_ago=day, config='/other.cfg', rules=rules(4, 9, 9)) for day in (5, 4, 3, 2, 1)])
    run = without_pool(shelf, 'prune', 'web', 'max_backups=1')
    assert run.exit_status == 0 and shelf.has('web', complete=1), run


@pytest.mark.parametrize('told', [dict(rules=[4]), dict(rules={'newest': '4'}), dict(rules=4), dict(config=7)])
def test_a_manifest_whose_rules_are_none_is_damaged_and_costs_nothing(a_shelf: Any, told: Any) -> None:
    shelf = a_shelf(complete('web', days_ago=3, copies_to_keep=1), complete('web', days_ago=2, **told),
                    complete('web', copies_to_keep=1))
    first, bad, last = shelf.names('web')
    run = without_pool(shelf, 'prune', lines=('vm-export=web:1',))
    assert run.exit_status == 0 and shelf.names('web') == [bad, last] and run.never_says('Traceback'), run


@pytest.mark.parametrize('numbers', [rules(10 ** 17, 10 ** 17), rules(-1, -5), rules(0, 0)])
def test_odd_numbers_in_a_manifest_are_read_as_what_they_say(a_shelf: Any, numbers: Any) -> None:
    shelf = a_shelf(*[complete('web', days_ago=day, config='/other.cfg', rules=numbers) for day in (4, 3, 2, 1)])
    run = without_pool(shelf, 'prune', lines=('vm-export=web:1',))
    assert run.exit_status == 0 and shelf.has('web', complete=4 if numbers['newest'] > 1 else 1), run


# --- pins -----------------------------------------------------------------------------------------------------------------

def pin(shelf: Any, name: str, *words: str, action: str = 'pin', **how: Any) -> Run:
    """pin or unpin that copy of web, on a machine that sees the store and no pool."""
    return without_pool(shelf, action, 'web', name[len('backup-'):], *words, **how)


def pins(shelf: Any) -> List[str]:
    return [name for name in shelf.names('web') if name.endswith('.pin')]


def nights(number: int, **told: Any) -> List[Any]:
    return [complete('web', days_ago=day, copies_to_keep=1, **told) for day in range(number, 0, -1)]


def test_a_pinned_copy_outlives_every_pruning_and_is_not_counted(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), faults=[at('http:/export', nth=2, breaks_off_after=MEBIBYTE)]), a_shelf(*nights(5))
    first, second = shelf.copies('web')[:2]
    run = pin(shelf, second, 'the last before the move')
    assert run.exit_status == 0 and run.says('web/%s is pinned' % second) and pins(shelf) == [second + '.pin'], run
    assert backup(pool, shelf, 'vm-export=web:2').exit_status == 0
    assert shelf.has('web', complete=3) and second in shelf.copies('web') and first not in shelf.copies('web')
    assert backup(pool, shelf, 'vm-export=web:2', 'pre_clean=yes').exit_status == 1
    assert shelf.has('web', complete=2), 'one good copy stays beside the pinned one'
    assert backup(pool, shelf, 'vm-export=web:1', 'pre_clean=yes').exit_status == 0 and shelf.has('web', complete=2)
    assert without_pool(shelf, 'prune', lines=('vm-export=web:1',)).exit_status == 0
    assert without_pool(shelf, 'prune', 'web', 'max_backups=1').exit_status == 0
    assert shelf.has('web', complete=2) and shelf.still_holds('web/' + second) and pins(shelf) == [second + '.pin']


def test_where_all_but_one_are_pinned_that_one_stays_and_so_does_the_newest_pinned_one(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(*nights(3))
    for name in shelf.copies('web')[1:]:
        assert pin(shelf, name).exit_status == 0
    assert without_pool(shelf, 'prune', 'web', 'max_backups=1').exit_status == 0 and shelf.still_holds('web')
    run = backup(a_pool(vm('web')), shelf, 'vm-export=web:1', 'pre_clean=yes')
    assert run.exit_status == 0 and shelf.has('web', complete=3), run


def test_a_pin_is_told_with_its_reason_by_list_preview_and_prune(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf(*nights(3))
    first, second, _ = shelf.copies('web')
    why = 'before the move, and 1 + 1 = 2'
    assert pin(shelf, first, why).exit_status == 0 and pin(shelf, second).exit_status == 0
    shelf.first_tree = shelf.tree()
    lines = ('vm-export=web:1',)
    listed = without_pool(shelf, 'list', lines=lines)
    for words in ('pinned: ' + why, 'pinned'):
        assert listed.says('kept: %s (until it is unpinned)' % words) and listed.never_says('not ours'), listed
    copies = fates(without_pool(shelf, 'list', 'format=json', lines=lines))
    assert [copies[name]['pinned'] for name in shelf.copies('web')] == ['pinned: ' + why, 'pinned', '']
    assert copies[first]['kept'] and copies[first]['until'] == 'until it is unpinned'
    for lines in (('vm-export=web:1',), ('vm-export=db',), ('vm-export=*', 'exclude=web')):
        assert without_pool(shelf, 'list', lines=lines).says('kept: pinned: ' + why), 'whatever this config selects'
    shown = preview(pool, shelf, 'vm-export=web:1')
    assert shown.says('%s: pinned: %s' % (first, why)) and not shown.says('removes ' + first), shown
    shown = without_pool(shelf, 'prune', 'preview', lines=('vm-export=web:1',))
    assert shown.says('web/%s: pinned: %s' % (first, why)) and removed(shown) == [], shown
    assert shelf.is_unchanged()


def test_unpinned_it_is_judged_by_the_rules_again(a_shelf: Any) -> None:
    shelf = a_shelf(*nights(3))
    first, _, last = shelf.copies('web')
    assert pin(shelf, first, 'x').exit_status == 0
    assert without_pool(shelf, 'prune', lines=('vm-export=web:1',)).exit_status == 0 and shelf.copies('web') == [first, last]
    run = pin(shelf, first, action='unpin')
    assert run.exit_status == 0 and run.says('web/%s is no longer pinned' % first) and pins(shelf) == [], run
    assert without_pool(shelf, 'prune', lines=('vm-export=web:1',)).exit_status == 0 and shelf.copies('web') == [last]


def test_a_copy_of_the_older_program_and_one_of_the_other_kind_can_be_pinned(a_shelf: Any) -> None:
    shelf = a_shelf(old('web', days_ago=6), *nights(2), *[complete('web', days_ago=day + .5, kind='vdi-export', copies_to_keep=1)
                                                          for day in (4, 3)])
    given = shelf.copies('web')
    for name in given[:2]:
        assert pin(shelf, name).exit_status == 0
    run = without_pool(shelf, 'prune', lines=('vm-export=web:1',))
    assert run.exit_status == 0 and shelf.copies('web') == given[:3] + given[4:], run


def test_what_is_pinned_goes_with_the_directory(a_shelf: Any) -> None:
    shelf = a_shelf(*nights(3))
    first, _, last = shelf.copies('web')
    assert pin(shelf, first, 'for good').exit_status == 0
    other = a_shelf(copied(shelf.path))
    assert without_pool(other, 'list').says('pinned: for good')
    assert without_pool(other, 'prune', lines=('vm-export=web:1',)).exit_status == 0 and other.copies('web') == [first, last]
    os.rename(shelf.at('web'), shelf.at('KEEP'))
    listed = without_pool(shelf, 'list')
    assert listed.exit_status == 0 and first in listed.stdout and listed.never_says('not ours'), listed
    assert without_pool(shelf, 'prune', lines=('vm-export=*:1',)).exit_status == 0 and first in shelf.names('KEEP')


@pytest.mark.parametrize('kind', ['touched', 'directory', 'link to nowhere', 'link to a file', 'fifo', 'not text', 'blank',
                                  'long'])
def test_a_pin_made_by_hand_pins_by_its_name_whatever_it_is(a_pool: Any, a_shelf: Any, kind: str) -> None:
    shelf = a_shelf(*nights(3))
    first = shelf.copies('web')[0]
    path = shelf.at('web', first + '.pin')
    content = {'touched': b'', 'not text': b'\xff\xfe\x1b[2J\0', 'blank': b'\n\nlater\n', 'long': b'x' * 3000000}
    if kind == 'directory':
        os.mkdir(path)
    elif kind == 'fifo':
        os.mkfifo(path)
    elif kind.startswith('link'):
        os.symlink('/nowhere' if kind.endswith('nowhere') else '/etc/passwd', path)
    else:
        with open(path, 'wb') as file:
            file.write(content[kind])
    listed = without_pool(shelf, 'list', lines=('vm-export=web:1',))
    assert listed.says('kept: pinned') and listed.never_says('not ours'), listed
    assert listed.never_says('root:') and listed.never_says('\x1b') and len(listed.stdout) < 5000, listed
    assert without_pool(shelf, 'prune', lines=('vm-export=web:1',)).exit_status == 0
    run = backup(a_pool(vm('web')), shelf, 'vm-export=web:1', 'pre_clean=yes')
    assert run.exit_status == 0 and shelf.has('web', complete=2) and first in shelf.copies('web'), run
    assert run.never_says(first + '.pin is not ours')
    assert os.path.lexists(path)
    run = pin(shelf, first, action='unpin')
    assert run.never_says('Traceback') and (run.exit_status == 0) == (not os.path.lexists(path)), run
    assert (run.exit_status == 0) == (kind != 'directory'), run


def test_the_pin_of_no_copy_is_told_as_not_ours_and_left_and_pins_nothing(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(*nights(3))
    first = shelf.copies('web')[0]
    strangers = ['backup-2001-01-01-000000.pin', first + '.pin.bak', first + '.PIN', 'notes.pin', '.pin']
    for name in strangers:
        with open(shelf.at('web', name), 'w'):
            pass
    listed = without_pool(shelf, 'list', lines=('vm-export=web:1',))
    assert all(listed.says('not ours, left alone: web/' + name) for name in strangers), listed
    assert listed.never_says('kept: pinned'), listed
    run = backup(a_pool(vm('web')), shelf, 'vm-export=web:1')
    assert run.exit_status == 0 and shelf.has('web', complete=1), run
    assert run.says('web/%s is not ours and is left' % strangers[0]), run
    assert set(strangers) <= set(shelf.names('web'))


def test_no_new_copy_takes_the_name_that_the_pin_of_a_copy_long_gone_pins() -> None:
    assert free_copy_name(datetime(2026, 5, 1, 0, 10), ['backup-2026-05-01-001000.pin']) == 'backup-2026-05-01-001001'


def test_pinned_twice_it_stays_as_it_was_and_unpinning_what_is_not_pinned_does_nothing(a_shelf: Any) -> None:
    shelf = a_shelf(*nights(2))
    first, last = shelf.copies('web')
    assert pin(shelf, first, 'the first reason').exit_status == 0
    before = shelf.tree()
    run = pin(shelf, first, 'another')
    assert run.exit_status == 0 and run.says('is pinned: the first reason already') and shelf.tree() == before, run
    run = pin(shelf, last, action='unpin')
    assert run.exit_status == 0 and run.says('web/%s was not pinned' % last) and shelf.tree() == before, run


def test_a_pin_tells_people_why_who_and_when(a_shelf: Any) -> None:
    shelf = a_shelf(*nights(2), damaged('web', days_ago=.5))
    good = shelf.copies('web')[1]
    run = without_pool(shelf, 'pin', 'vm=uuid:' + uuid_of('web'), 'stamp=' + good[len('backup-'):], 'why=a = b')
    assert run.exit_status == 0 and pins(shelf) == [good + '.pin'], run
    text = shelf.text('web', good + '.pin').splitlines()
    assert text[0] == 'a = b' and re.fullmatch(r'pinned \d{4}-\d\d-\d\d \d\d:\d\d:\d\d by \S+ on \S+', text[1]), text


def test_a_copy_that_is_not_good_can_be_pinned_and_that_is_said(a_shelf: Any) -> None:
    shelf = a_shelf(complete('web', days_ago=2), damaged('web', days_ago=1))
    bad = shelf.names('web')[-1]
    run = pin(shelf, bad, 'to be looked at')
    assert run.exit_status == 0 and pins(shelf) == [bad + '.pin'] and 'is no good copy' in run.stderr, run


@pytest.mark.parametrize('action', ['pin', 'unpin'])
@pytest.mark.parametrize('words', [
    [], ['web'], ['web', '2001-01-01-000000'], ['shop', 'latest'], ['web', ''], ['web', '../x'], ['web', 'latest', 'why', 'more'],
    ['web', 'latest', 'keep=1'], ['web', 'from=latest'], ['preview', 'web']])
def test_what_can_be_no_copy_is_refused_and_nothing_is_changed(a_shelf: Any, action: str, words: List[str]) -> None:
    shelf = a_shelf(*nights(2))
    run = without_pool(shelf, action, *words)
    assert run.exit_status == 2 and run.stderr and pins(shelf) == [], run


def test_a_name_of_two_vms_is_refused(a_shelf: Any) -> None:
    shelf = a_shelf(*nights(1), complete('web', days_ago=1, uuid=uuid_of('other'), folder='web--' + uuid_of('other')[:8]))
    run = pin(shelf, shelf.copies('web')[0])
    assert run.exit_status == 2 and run.says('web stands for 2 VMs') and pins(shelf) == [], run


@pytest.mark.parametrize('password', ['not the password', '/nowhere/password', 'FILE'])
def test_pin_and_unpin_need_neither_a_pool_nor_a_password_that_works(a_shelf: Any, password: str) -> None:
    shelf = a_shelf(*nights(2))
    first = shelf.copies('web')[0]
    if password == 'FILE':
        password = os.path.join(shelf.home, 'password')
        with open(password, 'w') as file:
            file.write('%%% not base64 %%%')
    config = shelf.config('vm-export=web', 'pool=192.0.2.7')
    for action, number in (('pin', 1), ('unpin', 0)):
        run = run_program(password, config, action, 'web', first[len('backup-'):])
        assert run.exit_status == 0 and len(pins(shelf)) == number, run


# --- pins while the store does not stand still ------------------------------------------------------------------------------

def test_a_copy_that_was_pinned_since_it_was_listed_is_not_removed(a_shelf: Any) -> None:
    shelf = a_shelf(*nights(2))
    catalog = Catalog(shelf.path)
    first, last = catalog.folder('web').copies
    assert pin(shelf, first.name).exit_status == 0
    assert catalog.remove_copy(first) == 'was pinned just now' and shelf.still_holds('web/' + first.name)
    os.symlink('/nowhere', shelf.at('web', last.name + '.pin'))
    assert catalog.remove_copy(last) == 'was pinned just now' and shelf.still_holds('web/' + last.name)


def test_a_copy_that_is_gone_or_being_removed_can_not_be_pinned(a_shelf: Any) -> None:
    shelf = a_shelf(*nights(2))
    catalog = Catalog(shelf.path)
    first, last = catalog.folder('web').copies
    assert catalog.remove_copy(first) == ''
    with pytest.raises(CatalogError):
        catalog.pin(first, 'too late')
    assert pins(shelf) == []


def test_a_copy_that_is_being_read_can_be_pinned_and_one_on_its_way_out_can_not(a_shelf: Any) -> None:
    shelf = a_shelf(*nights(2))
    catalog = Catalog(shelf.path)
    first = catalog.folder('web').copies[0]
    with catalog.copy_lock(first.folder, first.name, shared=False):
        run = pin(shelf, first.name)
        assert run.exit_status == 1 and run.says('web/%s is being removed just now' % first.name) and pins(shelf) == [], run
    with catalog.copy_lock(first.folder, first.name, shared=True):
        assert pin(shelf, first.name).exit_status == 0 and pins(shelf) == [first.name + '.pin']


def test_a_copy_can_be_pinned_while_a_run_is_at_work_in_its_directory(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf(*nights(3))
    first = shelf.copies('web')[0]
    with stopped_at(pool, shelf, at('http:/export', hangs=True), 'vm-export=web'):
        run = pin(shelf, first)
        assert run.exit_status == 0 and pins(shelf) == [first + '.pin'], run


@pytest.mark.parametrize('number', ['EROFS', 'ENOSPC', 'EIO', 'ESTALE', 'EACCES'])
@pytest.mark.parametrize('action', ['pin', 'unpin'])
def test_where_the_store_takes_no_pin_that_is_said_and_what_is_said_is_so(a_shelf: Any, number: str, action: str) -> None:
    shelf = a_shelf(*nights(2))
    first = shelf.copies('web')[0]
    trace, other = os.path.join(shelf.home, 'trace'), a_shelf(copied(shelf.path))
    assert action == 'pin' or pin(other, first).exit_status == 0
    assert pin(other, first, action=action, store=other.path, trace=trace).exit_status == 0
    with open(trace) as file:
        steps = len(file.readlines())
    assert steps
    for step in range(1, steps + 1):
        shelf = a_shelf(copied(shelf.path))
        if action == 'unpin':
            assert pin(shelf, first).exit_status == 0
        run = pin(shelf, first, action=action, store=shelf.path, step=step, do=number, stays=True)
        is_said = run.exit_status == 0
        assert run.never_says('Traceback') and run.exit_status in (0, 1), (step, run)
        assert is_said or run.stderr, (step, run)
        if is_said:
            assert bool(pins(shelf)) == (action == 'pin'), (step, run)
        assert shelf.has('web', complete=2)


def test_a_pin_whose_content_can_not_be_read_pins(a_shelf: Any) -> None:
    shelf = a_shelf(*nights(3))
    first = shelf.copies('web')[0]
    assert pin(shelf, first, 'why').exit_status == 0
    run = without_pool(shelf, 'prune', lines=('vm-export=web:1',), at=[first + '.pin'], do='EIO')
    assert run.never_says('Traceback') and first in shelf.copies('web'), run


@pytest.mark.parametrize('number', ['EIO', 'ESTALE', 'EACCES'])
def test_where_pins_can_not_be_listed_nothing_is_pruned(a_pool: Any, a_shelf: Any, number: str) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf(*nights(3))
    first = shelf.copies('web')[0]
    assert pin(shelf, first).exit_status == 0
    shelf.first_tree = shelf.tree()
    config = shelf.config('vm-export=*:1', 'pre_clean=yes')
    for words, statuses in ((['prune'], (0, 1)), (['prune', 'web', 'max_backups=1'], (2,)), ([], (1,))):
        run = ended(warm.start(in_trouble(shelf, at=['web'], do=number) + ['-', config] + words, pool.environment()))
        assert run.exit_status in statuses and run.never_says('Traceback') and shelf.still_holds('web'), (words, run)
        assert run.says('/web: '), run


# --- VMs that dropped out of every config -----------------------------------------------------------------------------------

TOLD = 'no config selects or excludes it'


def a_night_later(shelf: Any, nights_later: float = 1) -> None:
    """What is on record of plans is older by so much."""
    for path in glob.glob(shelf.at(PLANS, '*')):
        with open(path, encoding='utf-8') as file:
            text = file.read()
        text = re.sub(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ', lambda match: (datetime.strptime(
            match.group(), '%Y-%m-%dT%H:%M:%SZ') - timedelta(days=nights_later)).strftime('%Y-%m-%dT%H:%M:%SZ'), text)
        with open(path, 'w', encoding='utf-8') as file:
            file.write(text)


def test_a_vm_that_dropped_out_of_every_config_is_a_warning_for_seven_nights(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    for night in range(1, 8):
        a_night_later(shelf)
        shown = preview(pool, shelf, 'vm-export=db')
        assert shown.exit_status == 3 and shown.says(TOLD), (night, shown)
        run = backup(pool, shelf, 'vm-export=db')
        assert run.exit_status == 3 and [line for line in run.stderr.splitlines() if TOLD in line and 'web' in line], (night, run)
    for night in (8, 9):
        a_night_later(shelf)
        run = backup(pool, shelf, 'vm-export=db')
        assert run.exit_status == 0 and run.never_says(TOLD), (night, run)


def test_a_vm_that_is_excluded_or_selected_again_is_no_warning(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    assert backup(pool, shelf, 'vm-export=*', 'exclude=web').exit_status == 0
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    assert backup(pool, shelf, 'vm-export=db').exit_status == 3
    a_night_later(shelf)
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    a_night_later(shelf, 9)
    assert backup(pool, shelf, 'vm-export=db').exit_status == 3, 'and the nights are counted anew'


def test_a_vm_that_another_config_backs_up_or_excludes_is_no_warning(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db'), vm('shop')), a_shelf()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    nightly = another_config(shelf, 'nightly.cfg', 'vm-export=web', 'exclude=shop')
    assert run_of(pool, nightly).exit_status == 0
    assert backup(pool, shelf, 'vm-export=db').exit_status == 0
    a_night_later(shelf, 40)
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    assert backup(pool, shelf, 'vm-export=db').exit_status == 3, 'a config that did not run for so long counts no more'


def test_a_vm_that_is_gone_from_the_pool_is_no_warning(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', power_state='Halted'), vm('db')), a_shelf()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    session = pool.session()
    session.xenapi.VM.destroy(session.xenapi.VM.get_by_uuid(uuid_of('web')))
    assert backup(pool, shelf, 'vm-export=db').exit_status == 0


def test_a_vm_that_never_was_in_a_config_is_no_warning(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf()
    for _ in range(2):
        assert backup(pool, shelf, 'vm-export=db').exit_status == 0


def test_a_run_of_some_vms_on_the_command_line_makes_nobody_drop_out(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    run = backup(pool, shelf, 'vm-export=*', words=['vm-export=db'])
    assert run.exit_status == 0 and run.never_says(TOLD), run
    run = backup(pool, shelf, 'vm-export=db')
    assert run.exit_status == 3 and run.says(TOLD), 'what was on record still is'


@pytest.mark.parametrize('content', ['', '{', '[]', '{"pool": 1}', '\0', 'null'])
def test_plans_on_record_that_are_none_are_as_if_they_were_not_there(a_pool: Any, a_shelf: Any, content: str) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    (path,) = glob.glob(shelf.at(PLANS, '*'))
    with open(path, 'w', encoding='utf-8') as file:
        file.write(content)
    run = backup(pool, shelf, 'vm-export=db')
    assert run.exit_status == 0 and run.never_says('Traceback'), run
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0 and backup(pool, shelf, 'vm-export=db').exit_status == 3
