"""What is kept, what goes, and what is nobody's business: retention per VM and kind."""

import gzip
import json
import os
import shutil
import time
from typing import Any

import pytest

from support.deeds import backup, preview
from support.language import MEBIBYTE, at, uuid_of, vm
from support.process import Pool
from support.shelf import OUR_NAME, complete, damaged, foreign, old, unfinished


def test_the_newest_copies_of_each_vm_stay_and_each_removal_is_told_with_its_reason(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(*[complete('web', days_ago=day) for day in range(1, 5)], complete('db', days_ago=1))
    given = shelf.copies('web')
    run = backup(a_pool(vm('web'), vm('db')), shelf, 'vm-export=*', 'max_backups=3')
    assert run.exit_status == 0
    assert shelf.copies('web')[:2] == given[2:] and shelf.has('web', complete=3) and shelf.has('db', complete=2)
    removals = [line for line in run.stdout.splitlines() if 'removed web/' in line]
    assert [line.split('removed web/')[1].split()[0] for line in removals] == given[:2]
    assert all('3 are kept' in line for line in removals)


def test_each_kind_is_counted_for_itself(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(*[complete('web', days_ago=day, kind=kind) for day, kind in
                      ((5, 'vdi-export'), (4, 'vm-export'), (3, 'vdi-export'), (2, 'vm-export'))])
    pool = a_pool(vm('web'))
    assert backup(pool, shelf, 'vm-export=web:1').exit_status == 0
    assert shelf.has('web', vm_exports=1, vdi_exports=2)
    assert backup(pool, shelf, 'vdi-export=web:2').exit_status == 0
    assert shelf.has('web', vm_exports=1, vdi_exports=2)


def test_the_number_behind_a_selector_wins_over_max_backups(a_pool: Any, a_shelf: Any) -> None:
    days = range(1, 6)
    shelf = a_shelf(*[complete(name, days_ago=day) for name in ('web', 'my web', 'db') for day in days])
    run = backup(a_pool(vm('web'), vm('my web'), vm('db')), shelf, 'max_backups=3', 'vm-export=*', 'vm-export=w*:2',
                 'vm-export="my web":4')
    assert run.exit_status == 0
    assert shelf.has('web', complete=2) and shelf.has('my web', complete=4) and shelf.has('db', complete=3)


def test_a_failed_run_costs_no_copy(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(*[complete('web', days_ago=day) for day in (1, 2, 3)])
    pool = a_pool(vm('web'), faults=[at('http:/export', breaks_off_after=MEBIBYTE)])
    assert backup(pool, shelf, 'vm-export=web:1').exit_status == 1
    assert shelf.still_holds('web') and shelf.has('web', complete=3)


def test_damaged_copies_and_those_of_other_vms_are_left_and_told_and_not_counted(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(complete('web', days_ago=5), damaged('web', days_ago=4), complete('web', days_ago=3, uuid=uuid_of('x')),
                    complete('web', days_ago=2))
    oldest, broken, other, newest = shelf.names('web')
    pool = a_pool(vm('web'))
    run = backup(pool, shelf, 'vm-export=web:2')
    assert run.exit_status == 0, run
    assert oldest not in shelf.names('web')
    assert shelf.still_holds('web/' + broken, 'web/' + other, 'web/' + newest)
    assert run.says('web/%s is not a good copy and is left' % broken)


def test_what_only_looks_like_ours_survives_pruning(a_pool: Any, a_shelf: Any) -> None:
    strangers = ['web/notes.txt', 'web/backup-2016-04-14/x', 'web/backup-2016-04-14-001000.old/x', 'web/backup-x/y',
                 'web/Backup-2016-04-14-001000/x', 'web/backup-2016-13-45-001000/x', 'web/.hidden', 'notes.txt', 'other/file']
    shelf = a_shelf(complete('web', days_ago=2), complete('web', days_ago=1), *[foreign(path) for path in strangers])
    os.symlink('/etc', shelf.at('web', 'backup-2015-01-01-000000'))
    pool = a_pool(vm('web'))
    run = backup(pool, shelf, 'vm-export=web:1')
    assert run.exit_status == 0
    assert shelf.has('web', complete=1)
    assert shelf.still_holds(*strangers)
    assert os.path.islink(shelf.at('web', 'backup-2015-01-01-000000')) and os.path.isdir('/etc')
    assert run.says('web/notes.txt is not ours and is left')


def test_a_linked_directory_of_a_vm_is_not_followed(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(complete('elsewhere', days_ago=2), complete('elsewhere', days_ago=1))
    os.symlink('elsewhere', shelf.at('web'))
    run = backup(a_pool(vm('web'), vm('db')), shelf, 'vm-export=*', 'max_backups=1')
    assert shelf.still_holds('elsewhere'), run
    assert shelf.has('db', complete=1)


def test_pre_clean_makes_room_first_but_keeps_the_last_good_copy(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(*[complete('web', days_ago=day) for day in (1, 2, 3)])
    newest = shelf.newest('web')
    pool = a_pool(vm('web'), faults=[at('http:/export', nth=1, breaks_off_after=MEBIBYTE)])
    run = backup(pool, shelf, 'vm-export=web:2', 'pre_clean=yes')
    assert run.exit_status == 1 and shelf.copies('web') == [newest]
    assert run.stdout.count('to make room') == 2
    assert backup(pool, shelf, 'vm-export=web:2', 'pre_clean=yes').exit_status == 0
    assert shelf.has('web', complete=2) and shelf.still_holds('web/' + newest)


def test_a_clock_that_went_back_is_told_and_nothing_is_pruned_that_night(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(complete('web', days_ago=2), complete('web', days_ago=-1))
    pool = a_pool(vm('web'))
    run = backup(pool, shelf, 'vm-export=web:1')
    assert run.exit_status == 3 and 'clock went back' in run.stderr
    assert shelf.has('web', complete=3) and shelf.still_holds('web/' + shelf.copies('web')[0])


def test_copies_are_ordered_by_their_number_and_not_by_their_stamp(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(complete('web', days_ago=3), complete('web', days_ago=2))
    first, second = shelf.copies('web')
    set_sequences(shelf, {first: 9, second: 4})
    run = backup(a_pool(vm('web')), shelf, 'vm-export=web:2')
    assert run.exit_status == 0
    assert first in shelf.names('web') and second not in shelf.names('web')
    assert shelf.manifest('web', shelf.newest('web'))['sequence'] == 10


def set_sequences(shelf: Any, numbers: Any) -> None:
    for name, number in numbers.items():
        set_manifest(shelf, name, sequence=number)


def set_manifest(shelf: Any, name: str, **told: Any) -> None:
    manifest = dict(shelf.manifest('web', name), **told)
    with open(shelf.at('web', name, 'backup.json'), 'w') as file:
        json.dump(manifest, file)


def test_an_older_programs_copy_stands_before_the_first_of_ours_with_a_later_stamp(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(old('web', days_ago=4), complete('web', days_ago=3), old('web', days_ago=2))
    first, second, third = shelf.copies('web')
    run = backup(a_pool(vm('web')), shelf, 'vm-export=web:3')
    assert run.exit_status == 0
    assert shelf.copies('web')[:2] == [second, third]


def test_a_copy_that_the_storage_host_compressed_later_still_counts(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(complete('web', days_ago=3), complete('web', days_ago=2), complete('web', days_ago=1))
    one, two, three = shelf.copies('web')
    for name, content in ((one, gzip.compress(b'image')), (two, b'this is not gzip')):
        os.remove(shelf.at('web', name, 'web.xva'))
        with open(shelf.at('web', name, 'web.xva.gz'), 'wb') as file:
            file.write(content)
    run = backup(a_pool(vm('web')), shelf, 'vm-export=web:2')
    assert run.exit_status == 0
    assert one not in shelf.names('web'), 'it was good, so it was counted, and the oldest'
    assert two in shelf.names('web') and three in shelf.names('web')


def test_the_copy_just_made_stays_whatever_later_stamps_copies_of_the_older_program_bear(a_pool: Any, a_shelf: Any) -> None:
    shelf, pool = a_shelf(old('web', days_ago=-1), old('web', days_ago=3)), a_pool(vm('web'))
    later, earlier = shelf.copies('web')[1], shelf.copies('web')[0]
    shown = preview(pool, shelf, 'vm-export=web:1')
    assert shown.exit_status == 3 and shown.says('removes ' + earlier) and not shown.says('removes ' + later)
    first = backup(pool, shelf, 'vm-export=web:1')
    assert first.exit_status == 3 and 'are clock and time zone right' in first.stderr
    new = shelf.copies('web')[0]
    assert shelf.copies('web') == [new, later] and OUR_NAME.fullmatch(new)

    pruned = prune(pool, shelf, 'vm-export=web:1')
    assert pruned.exit_status == 3 and shelf.copies('web') == [new, later]
    assert backup(pool, shelf, 'vm-export=web:1', 'pre_clean=yes').exit_status == 3
    assert new not in shelf.copies('web') and shelf.has('web', complete=2), 'only the newest of ours stays beside it'


def prune(pool: Any, shelf: Any, *lines: str, words: Any = ()) -> Any:
    return backup(pool, shelf, *lines, words=['prune'] + list(words))


# --- what was moved aside by hand ------------------------------------------------------------------------------------

@pytest.mark.parametrize('kept_in', ['KEEP-before-migration', 'db'])
def test_what_was_moved_aside_by_hand_is_kept_listed_and_never_counted(a_pool: Any, a_shelf: Any, kept_in: str) -> None:
    shelf, pool = a_shelf(), a_pool(vm('web'), vm('db'))
    for _ in range(2):
        assert backup(pool, shelf, 'vm-export=*', 'max_backups=2').exit_status == 0
    os.makedirs(shelf.at(kept_in), exist_ok=True)
    kept = [kept_in + '/backup-2001-01-0%d-000000' % day for day in (1, 2)]    # no name that is taken there
    for name, path in zip(shelf.copies('web'), kept):
        os.rename(shelf.at('web', name), shelf.at(path))
    os.rmdir(shelf.at('web'))
    shelf.first_tree = shelf.tree()
    for _ in range(3):
        assert backup(pool, shelf, 'vm-export=*', 'max_backups=2').exit_status == 0
    assert prune(pool, shelf, 'vm-export=*', words=['web', 'max_backups=1']).exit_status == 0
    assert shelf.still_holds(*kept)
    assert shelf.has('web', complete=1) and shelf.has('db', complete=4 if kept_in == 'db' else 2)
    listed = backup(pool, shelf, 'vm-export=*', words=['list', 'web'])
    assert all(listed.says(path.split('/')[1]) for path in kept) and listed.says('moved here by hand from web/')


def test_a_copy_that_an_earlier_version_made_stays_where_its_directory_bears_no_name_of_its_vm(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(*[given(name, days_ago=day) for given, name in ((complete, 'web'), (old, 'db')) for day in (4, 3, 2)])
    for name in ('web', 'db'):
        os.rename(shelf.at(name), shelf.at('KEEP ' + name))
    shelf.first_tree = shelf.tree()
    assert backup(a_pool(vm('web'), vm('db')), shelf, 'vm-export=*', 'max_backups=1').exit_status == 0
    assert shelf.still_holds('KEEP web', 'KEEP db') and shelf.has('web', complete=1) and shelf.has('db', complete=1)


def test_a_vm_that_was_renamed_goes_on_where_its_copies_were_made(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(old('web', days_ago=9, uuid=uuid_of('shop')))
    for _ in range(3):
        assert backup(a_pool(vm('shop')), shelf, 'vm-export=shop:2').exit_status == 0
    assert shelf.names() == ['web'] and shelf.has('web', complete=2)
    assert shelf.manifest('web', shelf.newest('web'))['folder'] == 'web'


# --- a later version's copies ------------------------------------------------------------------------------------------

def test_a_copy_of_a_newer_version_stops_all_pruning_in_its_directory_and_is_told(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(*[complete('web', days_ago=day) for day in (4, 3, 1)], complete('web', days_ago=2, format=3, image_map=[]),
                    *[complete('db', days_ago=day) for day in (4, 3)])
    newer, pool = shelf.copies('web')[2], a_pool(vm('web'), vm('db'))
    told = 'web/%s/backup.json is of a format that only a newer VmBackup knows' % newer
    lines = ['vm-export=*', 'max_backups=1', 'pre_clean=yes']
    shown = preview(pool, shelf, *lines)
    assert shown.exit_status == 3 and shown.says(told) and shown.stdout.count('removes') == 2
    run = backup(pool, shelf, *lines)
    assert run.exit_status == 3 and run.stderr.count(told) == 1
    assert shelf.still_holds('web') and shelf.has('web', complete=5) and shelf.has('db', complete=1)
    assert shelf.manifest('web', shelf.newest('web'))['sequence'] == 5
    pruned = prune(pool, shelf, *lines, words=['web', 'max_backups=1'])
    assert pruned.exit_status == 3 and told in pruned.stderr and shelf.has('web', complete=5)
    listed = backup(pool, shelf, *lines, words=['list'])
    assert not any('web/' in line and 'goes with the next pruning' in line for line in listed.stdout.splitlines())


@pytest.mark.parametrize('words', [['restore', 'web', 'from=STAMP', 'force=yes'], ['extract', 'web', 'from=STAMP', 'to=/tmp/none'],
                                   ['restore', 'from=COPY', 'force=yes'], ['restore', 'from=COPY/web.xva', 'force=yes'],
                                   ['verify', 'web'], ['drill', 'newest-of-each']])
def test_a_copy_of_a_newer_version_is_not_read_as_if_it_were_ours(a_pool: Any, a_shelf: Any, words: Any) -> None:
    shelf, pool = a_shelf(complete('web', days_ago=1, format=3)), a_pool(vm('db'))
    name = shelf.newest('web')
    run = backup(pool, shelf, 'vm-export=*', words=[
        word.replace('STAMP', name[len('backup-'):]).replace('COPY', shelf.at('web', name)) for word in words])
    assert run.exit_status == 1 and run.says('a format that only a newer VmBackup knows'), run
    assert not run.says('DAMAGED') and not run.says('NOT RESTORABLE')


def test_a_manifest_that_cannot_be_read_does_not_keep_others_from_being_pruned(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(*[complete('web', days_ago=day) for day in (4, 3, 2)])
    first, broken, last = shelf.copies('web')
    with open(shelf.at('web', broken, 'backup.json'), 'w') as file:
        file.write('{')
    assert backup(a_pool(vm('web')), shelf, 'vm-export=web:2').exit_status == 0
    assert first not in shelf.names('web') and broken in shelf.names('web') and last in shelf.names('web')


# --- one uuid in two pools -----------------------------------------------------------------------------------------------

def test_two_pools_in_which_a_vm_has_one_uuid_never_prune_each_others_copies(a_shelf: Any) -> None:
    shelf = a_shelf()
    pools = [Pool({'vms': [vm('web')], 'hosts': [{'name_label': name}]}).start() for name in ('here', 'there')]
    try:
        for _ in range(2):
            for pool in pools:
                time.sleep(1.1)                        # no two copies of one second: they come together below
                assert backup(pool, shelf, 'vm-export=web:1').exit_status == 0
        beside = 'web--' + uuid_of('web')[:8]
        assert shelf.names() == ['web', beside]
        assert shelf.has('web', complete=1) and shelf.has(beside, complete=1)
        listed = backup(pools[0], shelf, 'vm-export=web:1', words=['list'])
        assert not listed.says('NO LONGER IN THE POOL')
        for pool in pools:
            assert listed.says('  of pool ' + [row['uuid'] for row in pool.dump()['pool'].values()][0])
        shutil.move(shelf.at(beside, shelf.newest(beside)), shelf.at('web'))       # as an earlier version would have made it
        set_manifest(shelf, shelf.newest('web'), folder='web')
        ours, theirs = shelf.copies('web')
        assert prune(pools[0], shelf, 'vm-export=web:1').exit_status == 0
        assert backup(pools[0], shelf, 'vm-export=web:1').exit_status == 0
        assert ours not in shelf.copies('web') and theirs in shelf.copies('web') and shelf.has('web', complete=2)
    finally:
        for pool in pools:
            pool.remove()


def test_two_pools_whose_hosts_have_one_name_never_prune_each_others_dumps(a_shelf: Any) -> None:
    shelf = a_shelf()
    pools = [Pool({'vms': [], 'hosts': [{'name_label': 'xen', 'master': True}, {'name_label': name}]}).start() for name in ('a', 'b')]
    lines = ['pool_db_backup=1', 'max_backups=1']
    try:
        folders = []
        for pool in pools:
            told = preview(pool, shelf, *lines)
            assert backup(pool, shelf, *lines).exit_status == 0
            again = backup(pool, shelf, *lines)
            assert again.exit_status == 0 and again.says('1 dump is kept')
            folders.append([name for name in shelf.names() if name not in folders][-1])
            assert told.says('is dumped into %s.' % folders[-1]) and len(shelf.names(folders[-1])) == 1
        assert folders[0] == 'METADATA_xen' and folders[1].startswith('METADATA_xen--') and shelf.names() == folders

        (theirs,) = shelf.names(folders[1])
        os.rename(shelf.at(folders[1], theirs), shelf.at(folders[0], 'pool_db_20010101-000000.dump'))  # as earlier versions did
        assert backup(pools[0], shelf, *lines).exit_status == 0
        assert len(shelf.names(folders[0])) == 2 and 'pool_db_20010101-000000.dump' in shelf.names(folders[0])
    finally:
        for pool in pools:
            pool.remove()


def test_a_renamed_vm_goes_on_in_its_directory(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(complete('web', days_ago=2, uuid=uuid_of('shop')), complete('web', days_ago=1, uuid=uuid_of('shop')))
    run = backup(a_pool(vm('shop')), shelf, 'vm-export=shop:2')
    assert run.exit_status == 0 and shelf.names() == ['web'] and shelf.has('web', complete=2)
    assert shelf.manifest('web', shelf.newest('web'))['vm']['name'] == 'shop'


def test_a_newcomer_of_an_old_name_gets_a_directory_of_its_own(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(complete('web', days_ago=2, uuid=uuid_of('the web of last year')))
    for _ in range(2):
        assert backup(a_pool(vm('web')), shelf, 'vm-export=web:1').exit_status == 0
    assert shelf.names() == ['web', 'web--' + uuid_of('web')[:8]]
    assert shelf.still_holds('web') and shelf.has('web--' + uuid_of('web')[:8], complete=1)


def test_a_directory_without_a_copy_belongs_to_whoever_comes_first(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf(foreign('web/'), unfinished('db'))
    assert backup(a_pool(vm('web'), vm('db')), shelf, 'vm-export=*').exit_status == 0
    assert shelf.names() == ['db', 'web'] and shelf.unfinished() == []


def test_two_copies_of_one_second_get_two_names(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf()
    pool = a_pool(vm('web', disks=0))
    for _ in range(3):
        assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    names = shelf.copies('web')
    assert len(set(names)) == 3 and all(OUR_NAME.fullmatch(name) for name in names)
    assert [shelf.manifest('web', name)['sequence'] for name in names] == [1, 2, 3]


def test_a_sealed_copy_is_never_written_again(a_pool: Any, a_shelf: Any) -> None:
    shelf, pool = a_shelf(), a_pool(vm('web'))
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    shelf.first_tree = shelf.tree()
    first = shelf.newest('web')
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    assert backup(pool, shelf, 'vdi-export=web').exit_status == 0
    assert shelf.still_holds('web/' + first)


@pytest.mark.parametrize('keep', [1, 2])
def test_preview_tells_what_retention_would_remove_and_the_run_removes_just_that(a_pool: Any, a_shelf: Any,
                                                                               keep: int) -> None:
    shelf = a_shelf(*[complete('web', days_ago=day) for day in (1, 2, 3)])
    pool, given = a_pool(vm('web')), shelf.copies('web')
    shown = preview(pool, shelf, 'vm-export=web:%d' % keep).stdout
    told = [name for name in given if 'removes ' + name in shown]
    assert shelf.is_unchanged() and backup(pool, shelf, 'vm-export=web:%d' % keep).exit_status == 0
    assert told == [name for name in given if name not in shelf.names('web')] == given[:4 - keep]


def test_a_new_copy_that_does_not_count_as_good_is_no_success(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf(complete('web', days_ago=2))
    older, = shelf.copies('web')
    path = shelf.at('web', older, 'backup.json')
    with open(path) as file:
        manifest = json.load(file)
    with open(path, 'w') as file:
        json.dump(dict(manifest, sequence=10 ** 9 - 1), file)
    run = backup(pool, shelf, 'vm-export=web', 'max_backups=1')
    assert run.exit_status == 1 and 'does not read back as a good copy' in run.stderr and '1 not: web' in run.stdout, run
    assert older in shelf.copies('web')
