"""What `prune` removes, leaves and refuses: retention without a backup, on any machine that sees the store."""

import os
import shutil
import signal
from typing import Any, List

import pytest

from support import warm
from support.deeds import in_trouble, without_pool
from support.language import at, uuid_of, vm
from support.process import CRON_PATH, Run, ended
from support.recovery import stopped_at
from support.shelf import complete, copied, damaged, foreign, of_old_program, old, unfinished

WEB = ('vm-export=web:2',)


def prune(shelf: Any, *words: str, **how: Any) -> Run:
    return without_pool(shelf, 'prune', *words, **how)


def nights(name: str, number: int, keep: int = 1, **told: Any) -> List[Any]:
    """So many good copies of that VM, whose manifests say that `keep` are to stay."""
    return [complete(name, days_ago=day, copies_to_keep=keep, **told) for day in range(number, 0, -1)]


def removed(run: Run) -> List[str]:
    """The copies that it says it has removed, or would remove."""
    return [line.split(': ')[1] for line in run.stdout.splitlines() if line.startswith(('removed: ', 'would remove: '))]


# --- what goes, and what it says ----------------------------------------------------------------------------------------------

def test_the_oldest_go_until_so_many_are_left_as_are_to_be_kept_each_with_its_reason(a_shelf: Any) -> None:
    shelf = a_shelf(*nights('web', 4))
    given = shelf.copies('web')
    run = prune(shelf, lines=WEB)
    assert run.exit_status == 0 and run.stderr == '' and shelf.names('web') == given[2:], run
    assert run.stdout.splitlines()[1:] == [
        'removed: web/%s: 3 good copies are newer, and 2 are kept' % given[0],
        'removed: web/%s: 2 good copies are newer, and 2 are kept' % given[1], '2 copies removed.'], run
    assert shelf.still_holds('web/' + given[2], 'web/' + given[3])
    assert prune(shelf, lines=WEB).says('0 copies removed.')


def test_a_preview_tells_what_a_run_then_removes_and_changes_nothing(a_shelf: Any) -> None:
    shelf = a_shelf(*nights('web', 3), *nights('db', 3))
    lines = ('vm-export=web:1', 'vm-export=db:2')
    shown = prune(shelf, 'preview', lines=lines)
    assert shown.exit_status == 0 and shown.says('3 copies would be removed.') and shelf.is_unchanged(), shown
    run = prune(shelf, lines=lines)
    assert run.exit_status == 0 and removed(run) == removed(shown) and len(removed(run)) == 3, run
    assert shelf.has('web', complete=1) and shelf.has('db', complete=2)


@pytest.mark.parametrize('told, line, left', [(3, 'vm-export=web:1', 3), (1, 'vm-export=web:3', 3), (1, 'vm-export=web', 4)])
def test_the_larger_number_of_the_newest_manifest_and_the_config_stays(a_shelf: Any, told: int, line: str, left: int) -> None:
    shelf = a_shelf(*nights('web', 6, keep=told))
    assert prune(shelf, lines=(line,)).exit_status == 0 and shelf.has('web', complete=left)


def test_what_is_said_by_hand_of_one_vm_wins_over_config_and_manifest(a_shelf: Any) -> None:
    shelf = a_shelf(*nights('web', 5, keep=4), *nights('db', 5, keep=4))
    run = prune(shelf, 'web', 'max_backups=1')
    assert run.exit_status == 0 and shelf.has('web', complete=1) and shelf.has('db', complete=5), run
    assert prune(shelf, 'max_backups=1').exit_status == 0 and shelf.has('db', complete=4), 'no VM is named'


def test_copies_of_the_other_kind_and_of_another_vm_are_neither_counted_nor_removed(a_shelf: Any) -> None:
    others = complete('web', days_ago=9, uuid=uuid_of('another'), folder='web')
    shelf = a_shelf(*nights('web', 3), *[complete('web', days_ago=day + .5, kind='vdi-export', copies_to_keep=1) for day in (2, 1)],
                    others)
    run = prune(shelf, lines=('vm-export=web:1',))
    assert run.exit_status == 0 and len(removed(run)) == 3, run
    assert shelf.has('web', complete=3, vdi_exports=1), 'the other VM keeps its own, each kind one'


def test_of_the_copies_that_are_not_good_none_is_counted_or_removed_and_each_is_told(a_shelf: Any) -> None:
    shelf = a_shelf(complete('web', days_ago=5, copies_to_keep=1), damaged('web', days_ago=4),
                    complete('web', days_ago=3, copies_to_keep=1), damaged('web', days_ago=2), complete('web', copies_to_keep=1))
    first, bad, second, worse, last = shelf.names('web')
    run = prune(shelf, lines=('vm-export=web:1',))
    assert run.exit_status == 0 and removed(run) == ['web/' + first, 'web/' + second], run
    assert shelf.names('web') == [bad, worse, last]
    assert [line.split(':')[1].strip() for line in run.stdout.splitlines() if line.startswith('left')] == ['web/' + bad, 'web/' + worse]


def test_a_copy_that_verify_found_damaged_costs_the_sound_one_nothing(a_store: str, a_shelf: Any) -> None:
    shelf = a_shelf(copied(a_store))
    sound, bad = shelf.copies('web')
    with open(shelf.at('web', bad, 'vm.cfg'), 'ab') as file:
        file.write(b'#')
    assert without_pool(shelf, 'verify').exit_status == 1
    run = prune(shelf, 'web', 'max_backups=1')
    assert run.exit_status == 0 and removed(run) == [] and shelf.copies('web') == [sound, bad], run


# --- what is left ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('given, lines, reason', [
    (nights('db', 3), WEB, 'no selector of this config names this VM, as far as its copies tell'),
    (nights('db', 3), ('vm-export=*:1', 'exclude=db'), 'the config excludes this VM'),
    ([old('db', days_ago=day) for day in (3, 2, 1)], ('vm-export=*:1',), 'no manifest says how many copies to keep')])
def test_a_vm_of_which_nobody_says_how_many_are_to_stay_is_left_and_told(a_shelf: Any, given: Any, lines: Any, reason: str) -> None:
    shelf = a_shelf(*given)
    run = prune(shelf, lines=lines)
    assert run.exit_status == 0 and shelf.still_holds('db') and removed(run) == [], run
    assert run.says('left: db (%s), vm-export: 3 copies in db/: %s; `prune vm=... max_backups=N` removes by hand.' % (
        uuid_of('db')[:8], reason)), run


def test_the_older_programs_copies_go_with_ours_and_by_hand(a_shelf: Any) -> None:
    shelf = a_shelf(old('web', days_ago=9), old('web', days_ago=8), *nights('web', 2))
    given = shelf.copies('web')
    assert removed(prune(shelf, lines=WEB)) == ['web/' + name for name in given[:2]] and shelf.copies('web') == given[2:]
    shelf = a_shelf(of_old_program())
    run = prune(shelf, 'PROD-web', 'max_backups=1')
    assert run.exit_status == 0 and shelf.has('PROD-web', vm_exports=1, vdi_exports=1) and len(removed(run)) == 2, run


def test_prune_leaves_old_copies_that_tell_no_uuid_as_it_can_not_know_whose_they_are(a_shelf: Any) -> None:
    shelf = a_shelf(old('web', days_ago=9, uuid='-'), complete('web', days_ago=3), complete('web', days_ago=2))
    run = prune(shelf, 'web', 'max_backups=1')
    older, = [name for name in shelf.names('web') if '(' in name]
    assert run.exit_status == 0 and older in shelf.names('web') and len(shelf.names('web')) == 2, run
    assert 'uuid unknown' in without_pool(shelf, 'list', 'max_backups=1').stdout


def test_nothing_that_is_not_ours_is_touched_and_no_symlink_followed(a_shelf: Any) -> None:
    shelf = a_shelf(*nights('web', 3), *nights('db', 3), foreign('web/backup-2001-01-01-000000/file'), foreign('web/notes.txt'),
                    foreign('web/backup-2001-01-01-000000.tar'), unfinished('web', days_ago=7))
    first, last = shelf.copies('web')[0], shelf.copies('web')[-1]
    away = os.path.join(shelf.home, 'elsewhere')
    shutil.move(shelf.at('web', first), away)
    os.symlink(away, shelf.at('web', first))
    os.symlink('db', shelf.at('link'))
    run = prune(shelf, lines=('vm-export=web:1',))
    assert run.exit_status == 0 and len(removed(run)) == 1, run
    assert os.path.islink(shelf.at('web', first)) and sorted(os.listdir(away)) == ['SHA256SUMS', 'backup.json', 'success', 'vm.cfg', 'web.xva']
    assert shelf.still_holds('web/backup-2001-01-01-000000', 'web/notes.txt', 'web/backup-2001-01-01-000000.tar', 'db',
                             'web/' + last, shelf.unfinished()[0])


def test_a_copy_that_a_restore_is_reading_is_left_and_told(a_pool: Any, a_store: str, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('shop'), srs=[{'name_label': 'here'}]), a_shelf(copied(a_store))
    first, last = shelf.copies('web')
    with stopped_at(pool, shelf, at('http:/import', hangs=True), 'restore', 'web', 'from=' + first[len('backup-'):], 'sr=here'):
        run = prune(shelf, 'web', 'max_backups=1')
    assert run.exit_status == 0 and run.says('left: web/%s is being read by a restore or drill' % first), run
    assert run.says('0 copies removed.') and shelf.copies('web') == [first, last]


# --- what is refused -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('words, told', [
    (['shop', 'max_backups=1'], 'holds no backup of shop'), (['web', 'max_backups=0'], 'max_backups'), (['format=json'], 'format'),
    (['web', 'from=latest'], 'from'), (['max_time=5'], 'max_time')])
def test_what_makes_no_sense_is_refused_and_nothing_is_removed(a_shelf: Any, words: List[str], told: str) -> None:
    shelf = a_shelf(*nights('web', 3))
    run = prune(shelf, *words, lines=('vm-export=web:1',))
    assert run.exit_status == 2 and told in run.stderr and run.says('removed') is False, run
    assert shelf.has('web', complete=3) and shelf.still_holds('web')


def test_a_name_of_two_vms_is_refused_by_hand_and_one_of_them_can_be_named(a_shelf: Any) -> None:
    other = uuid_of('the web of last year')
    beside = 'web--' + other[:8]
    shelf = a_shelf(*nights('web', 2), *nights('web', 2, uuid=other, folder=beside))
    run = prune(shelf, 'web', 'max_backups=1')
    assert run.exit_status == 2 and run.says('web stands for 2 VMs in the store') and shelf.has('web', complete=2), run
    assert uuid_of('web') in run.stderr and other in run.stderr
    run = prune(shelf, 'vm=uuid:' + other, 'max_backups=1')
    assert run.exit_status == 0 and shelf.has('web', complete=2) and shelf.has(beside, complete=1), run


def test_prune_removes_nothing_of_any_vm_once_the_clock_of_one_went_back(a_shelf: Any) -> None:
    shelf = a_shelf(*nights('db', 2), complete('web', days_ago=-2))
    run = prune(shelf, lines=('vm-export=*', 'max_backups=1'))
    assert run.exit_status == 1 and 'clock went back' in run.stderr, run
    assert len(shelf.copies('db')) == 2 and len(shelf.copies('web')) == 1


def test_a_directory_in_which_a_run_is_at_work_is_left_and_the_others_are_pruned(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf(*nights('web', 3), *nights('db', 3))
    with stopped_at(pool, shelf, at('http:/export', hangs=True), 'vm-export=web'):
        run = prune(shelf, lines=('vm-export=*:1',))
    assert run.exit_status == 1 and run.says('its directory web is in use by another run') and run.says('nothing was removed'), run
    assert shelf.has('web', complete=3) and shelf.has('db', complete=1)


# --- a store that does not stand still ---------------------------------------------------------------------------------------------------

def test_a_copy_that_vanishes_while_it_is_looked_at_counts_no_more(a_shelf: Any) -> None:
    shelf = a_shelf(*nights('web', 3))
    first, second, last = shelf.copies('web')
    run = prune(shelf, lines=WEB, at=[last], do='vanish')
    assert run.exit_status == 0 and run.never_says('Traceback') and shelf.copies('web') == [first, second], run


@pytest.mark.parametrize('number', ['EIO', 'ESTALE', 'ENOTCONN'])
def test_where_a_directory_gives_no_answer_nothing_is_removed_of_any_vm(a_shelf: Any, number: str) -> None:
    shelf = a_shelf(*nights('web', 3), *nights('db', 3))
    run = prune(shelf, lines=('vm-export=*:1',), at=['db'], do=number)
    assert run.exit_status == 1 and run.says('nothing is removed while the storage misbehaves') and removed(run) == [], run
    assert shelf.still_holds('web', 'db')


@pytest.mark.parametrize('number', ['EIO', 'ESTALE', 'ENOTCONN'])
def test_where_one_copy_gives_no_answer_nothing_is_removed_in_its_directory(a_shelf: Any, number: str) -> None:
    shelf = a_shelf(*nights('web', 3), *nights('db', 3))
    run = prune(shelf, lines=('vm-export=*:1',), at=['web.xva'], do=number)
    assert run.exit_status != 70 and run.never_says('Traceback') and shelf.still_holds('web'), run
    shelf = a_shelf(*nights('web', 3), *[complete('db', days_ago=day + .5, copies_to_keep=1) for day in (3, 2, 1)])
    second = shelf.copies('web')[1]
    run = prune(shelf, lines=('vm-export=*:1',), at=[second], do=number)
    assert run.exit_status == 3 and run.says('nothing is pruned in web/ until it can be read again') and shelf.still_holds('web'), run
    assert shelf.has('db', complete=1)


@pytest.mark.parametrize('number, stays', [('EIO', True), ('EIO', False), ('ESTALE', True), ('EROFS', True)])
def test_a_store_that_goes_away_in_the_middle_ends_the_pruning_and_what_was_begun_counts_no_more(a_shelf: Any, number: str,
                                                                                                 stays: bool) -> None:
    lines = ('vm-export=*:1',)
    for kind in ('rename', 'unlink', 'rmdir'):
        shelf = a_shelf(*nights('web', 3), *nights('db', 3))
        trace = os.path.join(shelf.home, 'trace')
        other = a_shelf(copied(shelf.path))
        assert prune(other, lines=lines, store=other.path, trace=trace).exit_status == 0
        with open(trace) as file:
            steps = [line.split()[0] for line in file]
        run = prune(shelf, lines=lines, store=shelf.path, step=steps.index(kind) + 1, do=number, stays=stays)
        assert run.exit_status == 1 and run.never_says('Traceback') and run.says('0 copies removed.'), (kind, run)
        assert shelf.still_holds('web', *['db/' + name for name in shelf.copies('db')[-2:]]), (kind, run)
        assert prune(shelf, lines=lines).exit_status == 0 and shelf.has('web', complete=1) and shelf.has('db', complete=1)


def test_what_a_killed_prune_had_begun_to_remove_is_no_copy_any_more(a_shelf: Any) -> None:
    shelf = a_shelf(*nights('web', 3))
    first, second, last = shelf.copies('web')
    trace, other = os.path.join(shelf.home, 'trace'), a_shelf(copied(shelf.path))
    assert prune(other, lines=('vm-export=web:1',), store=other.path, trace=trace).exit_status == 0
    with open(trace) as file:
        step = [line.split()[0] for line in file].index('unlink') + 2
    killed = ended(warm.start(in_trouble(shelf, store=shelf.path, step=step, do='SIGKILL')
                              + ['-', shelf.config('vm-export=web:1'), 'prune'], {'PATH': CRON_PATH}))
    assert killed.exit_status == -signal.SIGKILL
    assert shelf.copies('web') == [second, last] and shelf.unfinished() == ['web/%s.deleting' % first]
    listed = without_pool(shelf, 'list')
    assert listed.says('2 copies of 1 VM, 2 good') and listed.says('web/%s.deleting (unfinished)' % first), listed
    assert prune(shelf, lines=('vm-export=web:1',)).exit_status == 0 and shelf.copies('web') == [last]
