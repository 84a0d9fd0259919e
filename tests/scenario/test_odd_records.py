"""Records of the pool that are odd or broken cost at most the VM that they are about, and are told before the hours."""

from typing import Any

from support.deeds import backup, preview
from support.language import MEBIBYTE, at, disk, vm
from support.recovery import extract, holds, restore

REORDERED = [disk(device='xvda', userdevice='1', seed=1, size=8 * MEBIBYTE, name_label='was the first disk at the last boot'),
             disk(device='', userdevice='0', seed=2, name_label='new root, never attached')]


def test_two_disks_that_are_one_device_are_backed_up_with_folders_of_their_own(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('db1', disks=REORDERED)), a_shelf()
    before = preview(pool, shelf, 'vm-export=db1')
    assert before.exit_status == 0 and before.says('two of its disks are xvda') and before.says('DISK-xvda-1'), before
    run = backup(pool, shelf, 'vm-export=db1')
    assert run.exit_status == 0, run
    folders = sorted({path.split('/')[2] for path in shelf.tree() if '/DISK-' in path})
    assert folders == ['DISK-xvda', 'DISK-xvda-1']
    restored = restore(pool, shelf, 'db1', 'to=db2')
    assert restored.exit_status == 0 and holds(pool, 'db2', *REORDERED), restored


def test_one_of_two_disks_of_one_device_is_extracted_by_its_number(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('db1', disks=REORDERED)), a_shelf()
    assert backup(pool, shelf, 'vm-export=db1').exit_status == 0
    assert extract(shelf, 'db1', 'disk=xvda', 'to=' + shelf.at('x.raw')).exit_status == 2
    assert extract(shelf, 'db1', 'disk=1', 'to=' + shelf.at('1.raw')).exit_status == 0
    assert extract(shelf, 'db1', 'disk=0', 'to=' + shelf.at('0.raw')).exit_status == 0
    with open(shelf.at('1.raw'), 'rb') as file:
        assert len(file.read()) == 8 * MEBIBYTE


def test_metadata_are_read_and_written_before_the_snapshot(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', vifs=[{'device': '0'}]), faults=[
        at('api:VIF.get_all_records_where', nth=1, fails=['INTERNAL_ERROR', 'x']),
        at('api:VIF.get_all_records_where', nth=2, fails=['INTERNAL_ERROR', 'x'])])
    shelf = a_shelf()
    run = backup(pool, shelf, 'vm-export=web')
    assert run.exit_status == 1 and pool.never_saw('api:VM.snapshot') and pool.never_saw('http:/export'), run
