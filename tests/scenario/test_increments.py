"""Increments: only what changed is stored, and every copy comes back as its night was.

What each copy should hold is what the pool's disks held before its backup. It is looked for in four ways: the files are read
by a reader of the tests' own, by `blocks` and laid over each other; `restore`; `extract`; and RESTORE.txt, by xe alone.
"""

import random
import re
from typing import Any

import pytest

from support.deeds import backup
from support.language import GIBIBYTE, MEBIBYTE, at, disk, vm
from support.layers import DATA, ROOT, by_blocks, held_disks, increments, is_increment, read_vhd, rows, stored

ZSTD = pytest.mark.needs_zstd
KINDS = [('vm-export=web',), ('vdi-export=web', 'vdi_export_format=raw'), ('vdi-export=web', 'vdi_export_format=vhd')]


# --- What each night stores, and that it comes back ------------------------------------------------------------------------

@pytest.mark.parametrize('lines, compress', [
    (KINDS[0], 'compress=none'), pytest.param(KINDS[0], 'compress=zstd', marks=ZSTD), (KINDS[1], 'compress=gzip'),
    (KINDS[2], 'compress=none'), pytest.param(KINDS[2], 'compress=zstd', marks=ZSTD)],
    ids=['vm', 'vm-zstd', 'raw-gzip', 'vhd', 'vhd-zstd'])
def test_every_night_comes_back_as_it_was(some_nights: Any, lines: Any, compress: str) -> None:
    nights = some_nights(*(lines + (compress,)))
    nights.night()
    nights.write(2)
    nights.night()
    nights.write(1, zero=True)
    nights.write(7, count=2)
    nights.night()
    nights.write(9)
    nights.write(0, count=2)
    if nights.kind == 'vm-export':
        nights.write(4, device='xvdb')
    nights.night()

    assert increments(nights.shelf, 'web') == [False, True, True, True]
    assert nights.all_are_good() and nights.all_come_back(is_each=compress == 'compress=none')


def test_fourteen_nights_of_random_writes_and_trims_come_back(some_nights: Any) -> None:
    chance = random.Random(14)
    nights = some_nights('vm-export=web', 'full_every=6', 'max_backups=14', disks=[
        disk(size=21 * MEBIBYTE + 1536, used=[[0, 12]], seed=7), disk(size=12 * MEBIBYTE, used=[[3, 4]], seed=8)])
    for night in range(14):
        nights.night()
        for _ in range(chance.randrange(5)):
            device, mebibytes = chance.choice([('xvda', 22), ('xvdb', 12)])
            first = chance.randrange(mebibytes)
            nights.write(first, min(chance.choice([1, 1, 2, 5]), mebibytes - first), device, zero=chance.random() < 0.4)

    assert increments(nights.shelf, 'web').count(False) >= 3
    assert nights.all_are_good()
    for copy in nights.copies()[1::3]:
        assert nights.restored_problem(copy) == ''
        assert not is_increment(nights.shelf, 'web', copy) or nights.by_hand_problem(copy) == '', copy


def test_a_full_of_a_slow_disk_whose_archive_has_empty_blocks_is_built_on(some_nights: Any) -> None:
    nights = some_nights()
    nights.pool.stop()
    nights.pool.set_faults([at('http:/export', keepalive=True)])
    nights.pool.start()
    full = nights.night()
    assert b'ef46db3751d8e999' in nights.shelf.read('web', full, 'web.xva').lower()      # XXH64 of nothing
    nights.write(3)
    nights.night()
    assert nights.all_are_good() and nights.all_come_back()


def test_an_increment_stores_the_two_mebibytes_around_what_changed_and_no_more(some_nights: Any) -> None:
    nights = some_nights()
    nights.night()
    nights.write(3)
    copy = nights.night()
    xvda, xvdb = (read_vhd(stored(nights.shelf, 'web', copy, key)[0]) for key in ('xvda', 'xvdb'))
    assert list(xvda.blocks) == [1] and xvda.kind == 4 and xvda.size == ROOT['size']
    assert list(xvdb.blocks) == [] and xvdb.kind == 4
    assert nights.shelf.size('web', copy, 'xvda.vhd') <= 2 * MEBIBYTE + 4096
    assert nights.shelf.size('web', copy, 'xvdb.vhd') <= 4096


def test_a_night_without_a_change_stores_no_block(some_nights: Any) -> None:
    nights = some_nights()
    full, copy = nights.night(), nights.night()
    for key in ('xvda', 'xvdb'):
        assert not read_vhd(stored(nights.shelf, 'web', copy, key)[0]).blocks
        assert [row.holder for row in rows(nights.shelf, 'web', copy)[key]] == [full] * (5 if key == 'xvda' else 3)
    assert nights.all_are_good() and nights.all_come_back()


def test_a_vm_that_was_running_comes_back_too(some_nights: Any) -> None:
    nights = some_nights(power_state='Running')
    nights.night()
    nights.write(3)
    nights.night()
    assert increments(nights.shelf, 'web') == [False, True]
    assert nights.all_are_good() and nights.all_come_back()


def test_without_the_setting_nothing_of_it_is_there(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', disks=[ROOT])), a_shelf()
    for _ in range(2):
        assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    for copy in shelf.copies('web'):
        assert shelf.manifest('web', copy)['format'] == 1 and 'layer' not in shelf.manifest('web', copy)
        assert 'zero' not in shelf.text('web', copy, 'blocks').split() and shelf.image('web', copy) == 'web.xva'


# --- Blocks that became zero -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('lines', KINDS, ids=['vm', 'raw', 'vhd'])
def test_a_block_that_became_zero_is_stored_as_zeros_and_named(some_nights: Any, lines: Any) -> None:
    nights = some_nights(*lines)
    nights.night()
    nights.write(2, count=2, zero=True)
    copy = nights.night()
    found = {row.number: row for row in rows(nights.shelf, 'web', copy)['xvda']}
    assert [found[number][1:] for number in (2, 3)] == [('zero', '')] * 2
    assert read_vhd(stored(nights.shelf, 'web', copy, 'xvda')[0]).blocks[1] == bytes(2 * MEBIBYTE)
    assert nights.all_are_good() and nights.all_come_back()


@pytest.mark.parametrize('lines, keep', [(KINDS[0], 9), (KINDS[0], 1), (KINDS[1], 1), (KINDS[2], 1)],
                         ids=['vm-9', 'vm-1', 'raw-1', 'vhd-1'])
def test_zeros_stay_zeros_when_all_else_of_their_copy_has_changed_again(some_nights: Any, lines: Any, keep: int) -> None:
    """The zeros of the second night are in no file of the third. Were their copy let go, RESTORE.txt would bring back what the
    full has there."""
    nights = some_nights(*lines)
    nights.night()
    nights.write(2, zero=True)
    nights.write(6, count=2)
    second = nights.night()
    nights.write(6, count=2)
    third = nights.night('max_backups=%d' % keep)
    nights.write(0)
    fourth = nights.night('max_backups=%d' % keep)

    for copy in (third, fourth):
        row, = [row for row in rows(nights.shelf, 'web', copy)['xvda'] if row.number == 2]
        assert row[1:] == ('zero', second)
    assert second in nights.copies() and len(nights.copies()) == 4
    assert nights.all_are_good() and nights.all_come_back()


@pytest.mark.parametrize('lines', KINDS, ids=['vm', 'raw', 'vhd'])
def test_a_copy_of_which_nothing_is_needed_any_more_may_go_and_the_zeros_stay(some_nights: Any, lines: Any) -> None:
    nights = some_nights(*lines)
    full = nights.night()
    nights.write(2, count=2, zero=True)
    second = nights.night()
    nights.write(2, count=2)                        # something else, over all that the second holds
    third = nights.night()
    nights.write(2, count=2, zero=True)
    fourth = nights.night('max_backups=1')
    assert nights.copies() == [full, fourth], nights.run
    assert nights.all_are_good() and nights.all_come_back()
    assert {second, third}.isdisjoint(nights.shelf.text('web', fourth, 'RESTORE.txt').split('/'))


def test_zero_and_then_something_else_and_zero_again(some_nights: Any) -> None:
    nights = some_nights()
    nights.night()
    for is_zero in (True, False, True, True, False):
        nights.write(3, zero=is_zero)
        nights.night('max_backups=9')
    assert nights.all_are_good() and nights.all_come_back()


def test_zeros_where_there_never_was_anything_are_no_rows(some_nights: Any) -> None:
    nights = some_nights()
    nights.night()
    nights.write(8, zero=True)
    copy = nights.night()
    assert [row.number for row in rows(nights.shelf, 'web', copy)['xvda']] == [0, 1, 2, 3, 4]
    assert not read_vhd(stored(nights.shelf, 'web', copy, 'xvda')[0]).blocks
    assert nights.all_are_good()


def test_a_disk_that_became_all_zeros_and_one_that_never_held_anything(some_nights: Any) -> None:
    nights = some_nights(disks=[ROOT, disk(size=5 * MEBIBYTE, used=[])])
    nights.night()
    nights.write(0, count=10, zero=True)
    copy = nights.night()
    assert {row.digest for row in rows(nights.shelf, 'web', copy)['xvda']} == {'zero'}
    assert rows(nights.shelf, 'web', copy)['xvdb'] == []
    assert nights.all_are_good() and nights.all_come_back()


# --- Disks of every size -------------------------------------------------------------------------------------------------

ODD = [512, MEBIBYTE, 3 * MEBIBYTE, 2 * MEBIBYTE + 512, 4 * MEBIBYTE - 512]


@pytest.mark.parametrize('lines, sizes', [(KINDS[0], ODD)] + [(lines, [size]) for lines in KINDS[1:] for size in (512, *ODD[3:])],
                         ids=['vm'] + [kind + size for kind in ('raw-', 'vhd-') for size in ('smallest', 'a-bit-more', 'a-bit-less')])
def test_disks_that_are_no_multiples_of_two_mebibytes(some_nights: Any, lines: Any, sizes: Any) -> None:
    disks = {'xvd' + 'abcde'[number]: size for number, size in enumerate(sizes)}
    nights = some_nights(*lines, disks=[disk(size=size, used=-(-size // MEBIBYTE), seed=size) for size in sizes])
    nights.night()
    for is_zero in (False, True):
        for device, size in disks.items():
            nights.write(-(-size // MEBIBYTE) - 1, device=device, zero=is_zero)
        nights.night()
    assert increments(nights.shelf, 'web') == [False, True, True]
    assert nights.all_are_good() and nights.all_come_back()


def test_a_vm_with_a_disk_above_2040_gib_is_a_full_each_night_and_why_is_said(some_nights: Any) -> None:
    nights = some_nights(disks=[ROOT, disk(size=2041 * GIBIBYTE, used=[[0, 1]], seed=6)])
    nights.disks = dict                             # what they hold is not looked at: it is too much
    nights.night()
    copy = nights.night()
    assert increments(nights.shelf, 'web') == [False, False]
    assert re.search(r'a full, as .*xvdb.* is larger than a VHD', nights.run.stdout), nights.run
    assert 'larger' in nights.shelf.manifest('web', copy)['layer']['why']
    assert nights.verify().exit_status == 0


def test_a_disk_of_just_2040_gib_is_an_increment(some_nights: Any) -> None:
    last = 2040 * 1024 - 1
    nights = some_nights(disks=[disk(size=2040 * GIBIBYTE, used=[[0, 1]], seed=6)])
    nights.disks = dict
    nights.night()
    nights.write(last)
    copy = nights.night()
    assert increments(nights.shelf, 'web') == [False, True]
    assert list(read_vhd(stored(nights.shelf, 'web', copy, 'xvda')[0]).blocks) == [last // 2]
    assert nights.verify().exit_status == 0


# --- Disks that change -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('lines', KINDS, ids=['vm', 'raw', 'vhd'])
def test_a_disk_that_was_grown(some_nights: Any, lines: Any) -> None:
    nights = some_nights(*lines)
    nights.night()
    nights.grow(16 * MEBIBYTE)
    nights.write(8)                                 # behind what was cut short before
    nights.night()
    nights.write(15)
    nights.night()
    assert increments(nights.shelf, 'web') == [False, True, True]
    assert held_disks(nights.shelf, 'web', nights.copies()[-1])['xvda']['virtual_size'] == 16 * MEBIBYTE
    assert nights.all_are_good() and nights.all_come_back()


@pytest.mark.parametrize('written', [[9], [], [10]])
def test_the_last_block_of_a_disk_that_was_grown_was_cut_short_before(some_nights: Any, written: Any) -> None:
    """Its 512 bytes are the beginning of a whole MiB now, in a file that has the old size."""
    nights = some_nights(disks=[dict(ROOT, used=[[0, 5], [9, 1]])])
    nights.night()
    nights.grow(16 * MEBIBYTE)
    for number in written:
        nights.write(number)
    nights.night()
    assert nights.all_are_good() and nights.all_come_back()


def test_a_disk_that_became_smaller_and_grew_again_shows_nothing_of_before(some_nights: Any) -> None:
    nights = some_nights()
    nights.night()
    nights.detach('xvda')
    nights.add('xvda', 4 * MEBIBYTE)
    nights.write(0)
    nights.night()
    nights.grow(9 * MEBIBYTE + 512)
    nights.night()
    assert nights.all_are_good() and nights.all_come_back()


def test_a_disk_that_was_added_is_a_file_of_its_own_and_one_that_was_removed_comes_back_no_more(some_nights: Any) -> None:
    nights = some_nights()
    nights.night()
    nights.add('xvdc', 4 * MEBIBYTE)
    nights.write(1, device='xvdc')
    second = nights.night()
    assert read_vhd(stored(nights.shelf, 'web', second, 'xvdc')[0]).kind == 3
    nights.detach('xvdb')
    nights.write(3, device='xvdc')
    third = nights.night()
    assert set(held_disks(nights.shelf, 'web', third)) == {'xvda', 'xvdc'}
    nights.add('xvdb', 6 * MEBIBYTE)                # empty, of the size that the one before it had
    nights.night()
    assert increments(nights.shelf, 'web') == [False, True, True, True]
    assert nights.all_are_good() and nights.all_come_back()


@pytest.mark.parametrize('lines', KINDS, ids=['vm', 'raw', 'vhd'])
def test_a_disk_that_was_replaced_by_one_of_the_same_size(some_nights: Any, lines: Any) -> None:
    nights = some_nights(*lines)
    nights.night()
    nights.detach('xvda')
    nights.add('xvda', 9 * MEBIBYTE + 512)
    nights.write(1)
    nights.write(7)
    nights.night()
    nights.write(2)
    nights.night()
    assert nights.all_are_good() and nights.all_come_back()


def test_disks_that_were_reordered(some_nights: Any) -> None:
    nights = some_nights(disks=[dict(DATA, seed=1), dict(DATA, seed=2), dict(ROOT, userdevice='4')])
    nights.night()
    first, second = nights.detach('xvda'), nights.detach('xvdb')
    nights.attach('xvda', second)
    nights.attach('xvdb', first)
    nights.attach('xvdc', nights.detach('xvde'))
    nights.night()
    nights.write(1)
    nights.write(2, zero=True, device='xvdc')
    nights.night()
    assert nights.all_are_good() and nights.all_come_back()
    assert set(by_blocks(nights.shelf, 'web', nights.copies()[-1])) == {'xvda', 'xvdb', 'xvdc'}
