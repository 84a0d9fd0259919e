"""What is kept, what goes, and what is nobody's business: retention per VM and kind."""

import gzip
import json
import os
from typing import Any

import pytest

from support.deeds import backup, preview
from support.language import MEBIBYTE, at, uuid_of, vm
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
        manifest = shelf.manifest('web', name)
        with open(shelf.at('web', name, 'backup.json'), 'w') as file:
            json.dump(dict(manifest, sequence=number), file)


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
