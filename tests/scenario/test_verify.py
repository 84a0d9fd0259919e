"""What `verify` prints, decides, records and refuses: on any machine that sees the store, without a pool."""

import json
import os
import re
import shutil
import signal
import time
from typing import Any, Dict, List

import pytest

from support.deeds import Process, in_trouble, without_pool
from support.process import CRON_PATH, Run
from support.shelf import copied, of_old_program, old
from support.wire import eventually


@pytest.fixture
def a_copied_shelf(a_store: str, a_shelf: Any) -> Any:
    """Two copies of web and one of db, as a run wrote them."""
    return a_shelf(copied(a_store))


def verify(shelf: Any, *words: str, **how: Any) -> Run:
    return without_pool(shelf, 'verify', *words, **how)


def judged(run: Run) -> Dict[str, str]:
    """State by copy."""
    return {match.group(2): match.group(1) for match in re.finditer(r'(?m)^(\S[A-Za-z ]*?) +(\S+/backup-[^:]+(?::\d\d:\d\d\))?):', run.stdout)}


def checks(shelf: Any) -> Dict[str, Any]:
    """What is on record, by copy: (verdict, whether it counts as good)."""
    told = json.loads(without_pool(shelf, 'list', 'format=json').stdout)
    return {'%s/%s' % (row['folder'], copy['name']): (copy['verdict'], copy['good'])
            for row in told['vms'] for copy in row['copies']}


def flip(path: str) -> None:
    """The byte in the middle of the file is another."""
    with open(path, 'r+b') as file:
        middle = os.path.getsize(path) // 2
        file.seek(middle)
        byte = file.read(1)
        file.seek(middle)
        file.write(bytes([byte[0] ^ 1]))


# --- what it prints, decides and records -------------------------------------------------------------------------------------

def test_sound_copies_are_called_good_with_what_was_checked_and_nothing_but_the_record_changes(a_copied_shelf: Any) -> None:
    shelf = a_copied_shelf
    (db,), (first, last) = shelf.copies('db'), shelf.copies('web')
    run = verify(shelf)
    assert run.exit_status == 0 and run.stderr == '' and run.stdout.splitlines() == [
        'good           db/%s: digest, structure and 4 blocks' % db, 'good           web/%s: digest, structure and 2 blocks' % first,
        'good           web/%s: digest, structure and 2 blocks' % last, '3 copies verified: 3 good.'], run
    assert shelf.still_holds('web', 'db') and shelf.names() == ['db', 'web']
    assert set(checks(shelf).values()) == {('good', True)}


@pytest.mark.parametrize('name, reason', [
    ('web.xva', 'SHA-256'), ('vm.cfg', 'vm.cfg is not what was written'), ('blocks', 'blocks'), ('SHA256SUMS', 'SHA256SUMS is not what'),
    ('backup.json', 'backup.json'), ('vm-metadata.xml', 'vm-metadata.xml is not what was written')])
def test_a_copy_of_which_one_byte_is_another_is_damaged_and_the_others_are_read_all_the_same(a_copied_shelf: Any, name: str,
                                                                                           reason: str) -> None:
    shelf = a_copied_shelf
    first, last = ['web/' + copy for copy in shelf.copies('web')]
    flip(shelf.at(first, name))
    run = verify(shelf)
    assert run.exit_status == 1 and run.says('3 copies verified: 2 good, 1 DAMAGED.'), run
    assert run.stdout.splitlines()[-2].startswith('A DAMAGED copy stays as it is. Restore another (`list` shows them all)'), run
    line, = [line for line in run.stdout.splitlines() if line.startswith('DAMAGED ')]
    assert first in line and (reason in line or name in ('web.xva', 'blocks')), line
    assert judged(run)[last] == 'good' and checks(shelf)[last] == ('good', True)
    assert not checks(shelf)[first][1]


@pytest.mark.parametrize('name', ['web.xva', 'vm.cfg', 'blocks', 'SHA256SUMS', 'backup.json', 'success'])
def test_a_copy_of_which_a_file_is_missing_is_damaged(a_copied_shelf: Any, name: str) -> None:
    shelf = a_copied_shelf
    first = 'web/' + shelf.copies('web')[0]
    os.remove(shelf.at(first, name))
    run = verify(shelf, 'web')
    assert run.exit_status == 1 and judged(run)[first] == 'DAMAGED' and name in run.stdout, run


def test_one_vm_and_one_copy_are_read_alone_where_they_are_named(a_copied_shelf: Any) -> None:
    shelf = a_copied_shelf
    (db,), (first, last) = [['%s/%s' % (name, copy) for copy in shelf.copies(name)] for name in ('db', 'web')]
    for words, expected in ((['web'], {first, last}), (['web', 'from=latest'], {last}), (['from=latest'], {db, last}),
                            (['web', 'from=' + first[len('web/backup-'):]], {first}), (['web', 'from=' + first[len('web/'):]], {first})):
        run = verify(shelf, *words)
        assert run.exit_status == 0 and set(judged(run)) == expected, (words, run)


@pytest.mark.parametrize('words, told', [
    (['shop'], 'holds no backup of shop'), (['web', 'from=2016-04-14-001000'], 'there is no copy 2016-04-14-001000 of web'),
    (['from=2016-04-14-001000'], 'there is no copy 2016-04-14-001000 of any VM'), (['max_time=0'], 'max_time: "0" is not allowed'),
    (['max_time=an hour'], 'max_time: "an hour" is not allowed'), (['format=json'], 'format')])
def test_what_makes_no_sense_is_refused_and_nothing_is_read(a_copied_shelf: Any, words: List[str], told: str) -> None:
    run = verify(a_copied_shelf, *words)
    assert run.exit_status == 2 and run.stdout == '' and told in run.stderr, run
    assert a_copied_shelf.is_unchanged()


def test_a_store_that_holds_nothing_is_not_verified_well(a_shelf: Any) -> None:
    shelf = a_shelf()
    run = verify(shelf)
    assert run.exit_status == 1 and run.says('holds no copy') and run.says('is the share mounted?'), run
    run = verify(shelf, 'from=2016-04-14-001000')
    assert run.exit_status == 2 and run.says('there is no copy 2016-04-14-001000 of any VM'), run


def test_the_copies_of_the_older_program_are_judged_by_their_structure(a_shelf: Any) -> None:
    shelf = a_shelf(of_old_program(), old('shop', image=b'not an archive'))
    run = verify(shelf)
    states = judged(run)
    assert run.exit_status == 1 and len(states) == 5, run
    assert {name.split('/')[0]: state for name, state in states.items()} == {'PROD-web': 'structure good', 'shop': 'DAMAGED'}
    assert [good for _, good in checks(shelf).values()].count(False) == 1


def test_a_symlink_is_never_read(a_copied_shelf: Any) -> None:
    shelf = a_copied_shelf
    first, last = shelf.copies('web')
    away = os.path.join(shelf.home, 'elsewhere')
    shutil.move(shelf.at('web', first), away)
    os.symlink(away, shelf.at('web', first))
    os.symlink('db', shelf.at('link'))
    run = verify(shelf)
    assert run.exit_status == 0 and sorted(judged(run)) == ['db/' + shelf.newest('db'), 'web/' + last], run


# --- when time is short ---------------------------------------------------------------------------------------------------------

def test_when_the_time_is_up_the_copy_that_was_begun_is_read_to_its_end_and_the_next_run_goes_on(a_copied_shelf: Any) -> None:
    """A minute lasts half a second, and each image a second to open."""
    shelf, seen = a_copied_shelf, []
    for _ in range(4):
        run = verify(shelf, 'max_time=1', at=['web.xva', 'db.raw'], do='sleep', hurried=True)
        assert run.exit_status == 0 and run.says('1 copy verified: 1 good; 2 copies left for the next run.'), run
        seen += judged(run)
        time.sleep(1)           # records are of whole seconds
    assert sorted(seen[:3]) == ['db/' + shelf.newest('db')] + ['web/' + name for name in shelf.copies('web')]
    assert seen[3] == seen[0], 'what was longest not verified comes first'


def test_what_is_left_for_the_next_run_is_no_failure_and_a_damaged_copy_is_one_all_the_same(a_copied_shelf: Any) -> None:
    shelf = a_copied_shelf
    flip(shelf.at('db', shelf.newest('db'), 'db.raw'))
    run = verify(shelf, 'max_time=1', at=['web.xva', 'db.raw'], do='sleep', hurried=True)
    assert run.exit_status == 1 and run.says('1 copy verified: 1 DAMAGED; 2 copies left for the next run.'), run


def test_with_time_enough_everything_is_read(a_copied_shelf: Any) -> None:
    run = verify(a_copied_shelf, 'max_time=60')
    assert run.exit_status == 0 and run.says('3 copies verified: 3 good.'), run


# --- a store that does not stand still --------------------------------------------------------------------------------------------

def test_a_copy_that_another_run_removes_while_it_is_read_is_gone_and_no_damage(a_copied_shelf: Any) -> None:
    shelf = a_copied_shelf
    first, last = ['web/' + copy for copy in shelf.copies('web')]
    removed = os.path.join(shelf.home, 'removed')
    process = Process(['-', shelf.config('vm-export=*'), 'verify'], {'PATH': CRON_PATH},
                      in_trouble(shelf, at=['db.raw'], do='wait', until=removed))
    # the list is made, the first copy is being read
    assert eventually(lambda: os.path.exists(removed + '.met')), process.output
    shutil.rmtree(shelf.at(first))
    open(removed, 'w').close()
    run = process.ending()
    assert run.exit_status == 0 and run.says('2 good, 1 gone meanwhile'), run
    assert judged(run) == {'db/' + shelf.newest('db'): 'good', first: 'gone meanwhile', last: 'good'}, run


@pytest.mark.parametrize('number', ['EIO', 'ESTALE', 'ENOTCONN'])
def test_a_copy_that_the_store_does_not_give_is_no_verdict(a_copied_shelf: Any, number: str) -> None:
    shelf = a_copied_shelf
    first, last = ['web/' + copy for copy in shelf.copies('web')]
    assert verify(shelf).exit_status == 0
    run = verify(shelf, at=[os.path.basename(first)], do=number)
    assert run.exit_status == 1 and run.says('3 copies verified: 2 good, 1 COULD NOT BE READ.'), run
    assert judged(run)[first] == 'COULD NOT BE READ' and checks(shelf)[first] == ('good', True)
    assert run.stdout.splitlines()[-2].endswith('is not judged: put the share or disk right, and verify again.'), run
    run = verify(shelf, at=['web'], do=number)
    assert run.exit_status == 1 and run.says('1 copy verified: 1 good.') and run.says('It is left out'), run


def test_where_nothing_can_be_written_copies_are_judged_and_it_is_said_once_that_it_is_not_on_record(a_copied_shelf: Any) -> None:
    shelf = a_copied_shelf
    flip(shelf.at('db', shelf.newest('db'), 'db.raw'))
    run = verify(shelf, store=shelf.path, step=1, do='EROFS', stays=True)
    assert run.exit_status == 1 and run.says('3 copies verified: 2 good, 1 DAMAGED.'), run
    assert run.output.count('verdicts are not recorded') == 1
    assert set(checks(shelf).values()) == {(None, True)}


def test_a_signal_ends_it_between_two_copies_and_what_was_judged_is_on_record(a_copied_shelf: Any) -> None:
    shelf = a_copied_shelf
    signalled = os.path.join(shelf.home, 'signalled')
    process = Process(['-', shelf.config('vm-export=*'), 'verify'], {'PATH': CRON_PATH},
                      in_trouble(shelf, at=['web.xva'], do='wait', until=signalled))
    assert process.says('db/'), process.output
    process.signal(signal.SIGTERM)
    open(signalled, 'w').close()
    run = process.ending()
    assert run.exit_status == 128 + signal.SIGTERM and run.never_says('3 copies verified'), run
    assert checks(shelf)['db/' + shelf.newest('db')] == ('good', True)
    assert ('web/' + shelf.newest('web')) not in judged(run)
