"""What `list` prints and leaves alone: every copy in the store, whatever the pool and the store do meanwhile."""

import json
import os
import re
import shutil
import signal
from typing import Any, Dict, List

import pytest

from support.deeds import backup, without_pool
from support.language import uuid_of, vm
from support.process import Run
from support.shelf import complete, copied, damaged, foreign, of_old_program, old, unfinished


def list_store(shelf: Any, *words: str, **how: Any) -> Run:
    """`list` on a machine that sees the store and no pool."""
    return without_pool(shelf, 'list', *words, **how)


def rows(run: Run) -> Dict[str, Any]:
    """What `format=json` told, by VM and kind."""
    return {'%s %s' % (row['name'], row['kind']): row for row in json.loads(run.stdout)['vms']}


def lines(run: Run) -> List[str]:
    """What was shown, without the time and space of today."""
    return re.sub(r'[\d.]+ \w+ free', 'N free', run.stdout).splitlines()


# --- what it prints ----------------------------------------------------------------------------------------------------

def test_every_copy_stands_there_with_age_size_state_check_and_fate(a_shelf: Any) -> None:
    shelf = a_shelf(complete('web', days_ago=4, copies_to_keep=1), damaged('web', days_ago=3),
                    complete('web', days_ago=2, copies_to_keep=1), complete('db', days_ago=1.5, kind='vdi-export'))
    first, bad, last = [name for name in shelf.names('web')]
    run = list_store(shelf, lines=('vm-export=web:1',))
    assert run.exit_status == 0 and run.stderr == '' and lines(run) == [
        'db  %s  vdi-export  in db/' % uuid_of('db'),
        '  %s  1 d 12 h old  1.4 KiB  good  never verified  kept: no selector of this config names this VM, as far as its copies tell' % shelf.newest('db'),
        'web  %s  vm-export  in web/' % uuid_of('web'),
        '  %s  4 d 0 h old  1.4 KiB  good  never verified  goes with the next pruning: '
        '1 good copy is newer, and 1 is kept' % first,
        '  %s  3 d 0 h old  1.4 KiB  NOT GOOD (web.xva has 704 bytes instead of 1408)  never verified  '
        'kept: not a good copy, so neither counted nor removed: web.xva has 704 bytes instead of 1408' % bad,
        '  %s  2 d 0 h old  1.4 KiB  good  never verified  kept: newest 1 (at least until 1 more good copy is there)' % last,
        'No run removes what is not good. `verify` tells more; restore another copy, if there is one.',
        '4 copies of 2 VMs, 3 good, N free.'], run


def test_json_tells_the_same_facts_in_bytes_and_seconds(a_shelf: Any) -> None:
    shelf = a_shelf(complete('web', days_ago=4, copies_to_keep=1), damaged('web', days_ago=3),
                    complete('web', days_ago=2, copies_to_keep=1), foreign('notes.txt'))
    told = json.loads(list_store(shelf, 'format=json', lines=('vm-export=web:1',)).stdout)
    assert told['backup_dir'] == shelf.path and told['strangers'] == ['notes.txt']
    (row,) = told['vms']
    assert (row['name'], row['uuid'], row['kind'], row['folder'], row['keep'], row['in_pool']) == (
        'web', uuid_of('web'), 'vm-export', 'web', 1, None)
    assert [(copy['name'], copy['good'], copy['size'], copy['fate'].split(':')[0], copy['verdict']) for copy in row['copies']] == [
        (name, name != shelf.names('web')[1], 1408, fate, None)
        for name, fate in zip(shelf.names('web'), ('goes with the next pruning', 'kept', 'kept'))]
    assert [round(copy['age_s'] / 86400) for copy in row['copies']] == [4, 3, 2]


def test_a_form_that_there_is_not_is_refused(a_shelf: Any) -> None:
    run = list_store(a_shelf(complete('web')), 'format=xml')
    assert run.exit_status == 2 and run.stdout == '' and run.says('"xml" is not allowed; allowed: text, json'), run


def test_a_check_is_told_with_its_day_and_ends_when_a_file_has_changed_since(a_store: str, a_shelf: Any) -> None:
    shelf = a_shelf(copied(a_store))
    assert without_pool(shelf, 'verify').exit_status == 0
    first, last = shelf.copies('web')
    assert len(re.findall(r'  good  good, verified \d{4}-\d\d-\d\d  ', list_store(shelf).stdout)) == 3
    os.utime(shelf.at('web', first, 'web.xva'))
    changed, = [line for line in lines(list_store(shelf)) if 'CHANGED SINCE IT WAS good' in line]
    assert changed.startswith('  %s  ' % first) and '  good  CHANGED' in changed
    verdicts = {copy['name']: copy['verdict'] for copy in rows(list_store(shelf, 'format=json'))['web vm-export']['copies']}
    assert verdicts == {first: 'CHANGED SINCE IT WAS good', last: 'good'}


def test_one_vm_is_shown_alone_and_one_that_is_not_there_is_refused(a_shelf: Any) -> None:
    shelf = a_shelf(complete('web'), complete('db'), foreign('notes.txt'))
    for words in (['web'], ['vm=web'], ['vm=uuid:' + uuid_of('web')]):
        run = list_store(shelf, *words)
        assert run.exit_status == 0 and run.says('in web/') and run.never_says('in db/') and run.never_says('notes'), run
    run = list_store(shelf, 'shop')
    assert run.exit_status == 2 and run.stdout == '' and run.says('holds no backup of shop'), run


def test_copies_of_the_older_program_are_shown_as_they_are(a_shelf: Any) -> None:
    shelf = a_shelf(of_old_program(), old('shop', days_ago=2, uuid='-'), old('shop', days_ago=1, uuid='-', suffix='.gz'))
    run = list_store(shelf)
    assert run.exit_status == 0 and run.says('6 copies of 2 VMs'), run
    assert 'shop  uuid unknown  vm-export  in shop/' in lines(run)
    told = rows(list_store(shelf, 'format=json'))
    assert all(copy['of_older_program'] and copy['good'] for row in told.values() for copy in row['copies']), told
    assert sorted(told) == ['PROD-web vdi-export', 'PROD-web vm-export', 'shop vm-export']
    assert [copy['image'] for copy in told['shop vm-export']['copies']] == ['shop.xva', 'shop.xva.gz']


# --- what the pool adds --------------------------------------------------------------------------------------------------

def test_a_vm_that_the_pool_no_longer_has_is_told_only_where_the_pool_was_asked(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('db')), a_shelf(complete('web'), complete('db'))
    run = backup(pool, shelf, 'vm-export=*', words=['list'])
    assert run.exit_status == 0, run
    assert [line for line in lines(run) if 'NO LONGER' in line] == [
        'NO LONGER IN THE POOL: web  %s  in web/' % uuid_of('web')]
    told = rows(backup(pool, shelf, 'vm-export=*', words=['list', 'format=json']))
    assert (told['web vm-export']['in_pool'], told['db vm-export']['in_pool']) == (False, True)
    assert list_store(shelf).never_says('NO LONGER')
    assert rows(list_store(shelf, 'format=json'))['web vm-export']['in_pool'] is None


def test_a_vm_whose_uuid_is_not_known_is_not_missed_in_the_pool(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf(old('db', days_ago=2, uuid='-'))
    run = backup(pool, shelf, 'vm-export=web', words=['list'])
    assert run.exit_status == 0 and 'uuid unknown' in run.stdout and 'NO LONGER' not in run.stdout, run


def test_json_stays_json_when_the_pool_does_not_answer(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf(complete('web', days_ago=2))
    pool.process.send_signal(signal.SIGKILL)
    run = backup(pool, shelf, 'vm-export=web', words=['list', 'format=json'])
    assert run.exit_status == 0 and [row['in_pool'] for row in json.loads(run.stdout)['vms']] == [None], run
    assert 'the pool was not asked' in run.stderr, run


def test_a_copy_from_another_pool_is_not_missed_in_this_one(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(complete('web', pool={'uuid': '00000000-0000-4000-8000-000000000001', 'name': 'elsewhere'}))
    pool = a_pool(vm('db'))
    assert backup(pool, shelf, 'vm-export=*', words=['list']).never_says('NO LONGER')
    assert rows(backup(pool, shelf, 'vm-export=*', words=['list', 'format=json']))['web vm-export']['in_pool'] is None


@pytest.mark.parametrize('away', [signal.SIGKILL, signal.SIGSTOP])
def test_list_shows_the_store_whatever_the_pool_does(a_pool: Any, a_shelf: Any, away: int) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf(complete('web'))
    pool.process.send_signal(away)
    run = backup(pool, shelf, 'vm-export=web', words=['list'], time_limit_s=100)
    assert run.exit_status == 0 and 'web' in run.stdout.splitlines()[0] and '1 copy of 1 VM' in run.stdout.splitlines()[-1], run
    pool.process.send_signal(signal.SIGCONT)


# --- what is not ours ------------------------------------------------------------------------------------------------------

def test_what_is_not_ours_is_named_and_never_counted(a_shelf: Any) -> None:
    shelf = a_shelf(complete('web'), unfinished('web', days_ago=2), foreign('web/notes.txt'), foreign('stuff/file'), foreign('file'))
    run = list_store(shelf)
    assert [line for line in lines(run) if line.startswith('not ours')] == ['not ours, left alone: ' + name for name in (
        'file', 'stuff/file', 'web/notes.txt', shelf.unfinished()[0] + ' (unfinished)')], run
    assert run.says('1 copy of 1 VM, 1 good')


def test_a_symlink_is_not_followed_neither_to_a_vm_nor_to_a_copy(a_shelf: Any) -> None:
    shelf = a_shelf(complete('web'), complete('db'))
    away = os.path.join(shelf.home, 'elsewhere')
    shutil.move(shelf.at('web', shelf.newest('web')), away)
    os.symlink(away, shelf.at('web', 'backup-2026-01-02-030405'))
    os.symlink('db', shelf.at('link'))
    run = list_store(shelf)
    assert run.exit_status == 0 and run.says('1 copy of 1 VM, 1 good'), run
    assert [line for line in lines(run) if line.startswith('not ours')] == [
        'not ours, left alone: link', 'not ours, left alone: web/backup-2026-01-02-030405']


@pytest.mark.parametrize('given', [[], [complete('web'), damaged('web', days_ago=2), foreign('notes.txt')]])
def test_nothing_is_changed_or_made(a_shelf: Any, given: Any) -> None:
    shelf = a_shelf(*given)
    for words in ([], ['format=json']):
        assert list_store(shelf, *words).exit_status == 0
    assert shelf.is_unchanged() and sorted(os.listdir(shelf.home)) == ['BACKUPS', 'weekend.cfg'] and not os.path.exists(
        shelf.at('.vmbackup'))


# --- a store that does not stand still ---------------------------------------------------------------------------------------

def test_a_copy_that_vanishes_while_it_is_looked_at_costs_only_itself(a_shelf: Any) -> None:
    shelf = a_shelf(complete('web', days_ago=2), complete('web', days_ago=1), complete('db'))
    first, last = shelf.copies('web')
    run = list_store(shelf, at=[first], do='vanish')
    assert shelf.copies('web') == [last], 'it has been looked at'
    assert run.exit_status == 0 and run.stderr == '' and run.says('2 copies of 2 VMs, 2 good'), run
    assert '  %s  ' % last in run.stdout and '  %s  ' % first not in run.stdout


@pytest.mark.parametrize('number', ['EIO', 'ESTALE', 'ENOTCONN', 'EACCES'])
def test_what_the_store_does_not_give_is_told_and_the_rest_shown(a_shelf: Any, number: str) -> None:
    shelf = a_shelf(complete('web', days_ago=2), complete('web', days_ago=1), complete('db'))
    first, last = shelf.copies('web')
    run = list_store(shelf, at=[first], do=number)
    assert run.exit_status == 0 and run.never_says('Traceback') and run.says('3 copies of 2 VMs, 2 good'), run
    told, = [line for line in lines(run) if first in line]
    assert "NOT GOOD (it can't be read now: " in told
    run = list_store(shelf, at=['web'], do=number)
    assert run.exit_status == 0 and run.says('/web: ') and run.says('It is left out') and run.says('1 copy of 1 VM, 1 good'), run
