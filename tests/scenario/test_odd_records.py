"""Records of the pool that are odd or broken cost at most the VM that they are about, and are told before the hours."""

from typing import Any

import pytest

from support.deeds import backup, preview
from support.language import MEBIBYTE, at, disk, vm
from support.recovery import drill, extract, holds, machine, restore

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


@pytest.mark.parametrize('odd', [{'sr': None}, {'sr': '?'}])
def test_a_disk_without_an_sr_costs_its_own_vm_only(a_pool: Any, a_shelf: Any, odd: Any) -> None:
    pool = a_pool(vm('broken', disks=[disk(name_label='data', **odd)]), vm('web'))
    shelf = a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    before = preview(pool, shelf, 'vm-export=*')
    assert before.exit_status == 3 and before.says('broken') and before.says('SR that is not in the pool'), before
    run = backup(pool, shelf, 'vm-export=*')
    assert run.exit_status == 1 and 'not: broken' in run.stdout.splitlines()[-1], run
    assert shelf.has('web', complete=2) and pool.has_no_snapshots_of_ours()


def test_an_interface_whose_network_is_gone_is_told_and_the_copy_is_made(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', vifs=[{'device': '0', 'network': '?'}])), a_shelf()
    before = preview(pool, shelf, 'vm-export=web')
    assert before.exit_status == 3 and before.says('network that is not in the pool'), before
    run = backup(pool, shelf, 'vm-export=web')
    assert run.exit_status == 3 and run.stderr.count('network that is not in the pool') == 1, run
    assert shelf.has('web', complete=1)
    path = [path for path in shelf.tree() if path.endswith('VIFs/vif-0.cfg')][0]
    with open(shelf.at(path)) as file:
        assert 'network_name_label=\n' in file.read()


def test_a_restored_vm_whose_start_is_blocked_is_told_with_a_command_that_works(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', blocked_operations={'start': 'export in progress'})), a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    run = restore(pool, shelf, 'web', 'to=web2')
    line = [line for line in run.stdout.splitlines() if 'To start it: ' in line][0]
    assert run.exit_status == 0 and 'export in progress' in line, run
    for command in line.split('To start it: ')[1].split('; then: '):
        assert pool.xe(*command.split()[1:]).exit_status == 0, command
    assert machine(pool, 'web2')['power_state'] == 'Running'


def test_a_drill_boots_a_vm_whose_start_is_blocked(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', blocked_operations={'start': 'export in progress'})), a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    run = drill(pool, shelf, 'web', 'boot=0.05')
    assert run.exit_status == 0 and run.says('booted'), run


def test_vdi_export_lists_disks_that_it_can_not_tell_apart_and_refuses(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', disks=[disk(userdevice='0', seed=1), disk(userdevice='1', seed=2)])), a_shelf()
    for ref, record in pool.dump()['VBD'].items():
        if record['userdevice'] == '1' and record['type'] == 'Disk':
            pool.session().xenapi.VBD.set_userdevice(ref, '0')
    run = backup(pool, shelf, 'vdi-export=web')
    assert run.exit_status == 1 and '2 disks with userdevice 0' in run.stderr and run.stderr.count('VDI ') >= 2, run
    assert backup(pool, shelf, words=['vm-export=web']).exit_status == 0
