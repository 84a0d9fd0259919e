"""Chains of VMs of every kind: renamed, with odd names, without disks or with some left out, on old servers and odd SRs."""

import os
import re
import shutil
from typing import Any, Dict

import pytest

from support.deeds import backup
from support.language import GIBIBYTE, MEBIBYTE, disk, uuid_of, vm
from support.layers import DATA, ROOT, Nights, difference, held_disks, increments, is_increment, read_vhd, stored
from support.process import run_program
from support.recovery import disks_of, machine, machine_in
from test_increment_traps import ONE, a_chain, good, listed

NAME = """web  'one' "two" $HOME `id` \\ ; & #é"""
ADDED = "it's $new `disk`"


def test_a_vm_that_was_renamed_goes_on_with_its_chain_and_comes_back_under_its_new_name(some_nights: Any) -> None:
    nights = some_nights()
    a_chain(nights, 2)
    assert nights.pool.xe('vm-param-set', 'uuid=' + uuid_of('web'), 'name-label=shop').exit_status == 0
    nights.name, nights.called, nights.lines = 'shop', 'shop', ('vm-export=shop', 'incremental=yes')
    nights.write(5)
    third = nights.night('max_backups=20')
    assert increments(nights.shelf, 'web') == [False, True, True] and 'shop' not in nights.shelf.names()
    assert nights.all_are_good() and nights.restored_problem(third) == '' and nights.extracted_problem(third) == ''
    before = set(nights.pool.dump()['VM'])
    assert nights.by_hand_problem(third) == ''
    made, = [one for ref, one in nights.pool.dump()['VM'].items() if ref not in before]
    assert made['name_label'] == 'shop'


@pytest.mark.parametrize('kind', ['vm-export', 'vdi-export'])
def test_names_with_all_that_a_shell_would_take_for_its_own(a_pool: Any, a_shelf: Any, kind: str) -> None:
    named = dict(ROOT, name_label="it's $(touch /tmp/no) \"it\"\\"), dict(DATA, name_label='a  b')
    pool, shelf = a_pool(vm(NAME, uuid=uuid_of('web'), disks=named)), a_shelf()
    nights = Nights(pool, shelf, kind + '=uuid:' + uuid_of('web'), name=NAME)
    assert backup(pool, shelf, *nights.lines).exit_status == 0
    nights.folder, = [name for name in shelf.names() if name.startswith('web')]
    nights.called = 'vm=uuid:' + uuid_of('web')
    nights.held[nights.copies()[0]] = nights.disks()
    nights.write(3)
    if kind == 'vm-export':
        nights.detach('xvdb')
        new = nights.add('xvdc', 4 * MEBIBYTE)
        api = pool.session().xenapi
        api.VDI.set_name_label(api.VDI.get_by_uuid(new), ADDED)
    copy = nights.night()
    assert is_increment(shelf, nights.folder, copy)
    assert nights.all_are_good() and nights.restored_problem(copy) == ''
    before = {kind: set(pool.dump()[kind]) for kind in ('VM', 'VDI')}
    assert nights.by_hand_problem(copy) == '', shelf.text(nights.folder, copy, 'RESTORE.txt')
    made = {kind: [one['name_label'] for ref, one in pool.dump()[kind].items() if ref not in before[kind]] for kind in before}
    if kind == 'vm-export':
        assert made['VM'] == [NAME]
        assert ADDED in made['VDI']
    assert named[0]['name_label'] in made['VDI'] and not os.path.exists('/tmp/no')


def test_a_disk_that_is_left_out_from_one_night_on_and_comes_back(some_nights: Any) -> None:
    nights = some_nights()
    everything = nights.disks
    out = ('exclude-disk=web/xvdb',)
    nights.night()
    for number, lines in enumerate([out, out, (), ()]):
        nights.write(number)
        nights.write(number, device='xvdb')
        if lines:
            nights.disks = lambda: {'xvda': everything()['xvda']}       # type: ignore
        else:
            nights.disks = everything           # type: ignore
        nights.night('max_backups=20', *lines, exit_status=3 if number == 0 else 0)
    copies = nights.copies()
    assert increments(nights.shelf, 'web') == [False, True, True, True, True]
    assert [sorted(held_disks(nights.shelf, 'web', copy)) for copy in copies] == [
        ['xvda', 'xvdb'], ['xvda'], ['xvda'], ['xvda', 'xvdb'], ['xvda', 'xvdb']]
    kinds = [read_vhd(stored(nights.shelf, 'web', copy, 'xvdb')[0]).kind for copy in copies[3:]]
    assert kinds == [3, 4]
    assert nights.all_are_good() and nights.all_come_back()


@pytest.mark.parametrize('version', ['1.249.3', '1.110.1'])
@pytest.mark.parametrize('lines', [('vm-export=web',), ('vdi-export=web', 'vdi_export_format=vhd')], ids=['vm', 'vhd'])
def test_old_servers(a_pool: Any, a_shelf: Any, version: str, lines: Any) -> None:
    pool = a_pool(vm('web', disks=[ROOT, DATA]), xapi_version=version)
    nights = Nights(pool, a_shelf(), *lines)
    nights.night('compress=gzip')
    nights.write(3)
    nights.write(1, zero=True)
    nights.night('compress=gzip')
    nights.grow(12 * MEBIBYTE)
    nights.write(11)
    nights.night()
    assert increments(nights.shelf, 'web') == [False, True, True]
    assert nights.all_are_good() and nights.all_come_back()


def test_a_vm_with_two_drives_on_one_disk(some_nights: Any) -> None:
    nights = some_nights()
    shared = nights.disk('xvdb')['uuid']
    nights._xe('vbd-create', 'vm-uuid=' + uuid_of('web'), 'vdi-uuid=' + shared, 'device=4', 'type=Disk', 'mode=RO')
    everything = nights.disks
    nights.night('max_backups=20')
    nights.write(3)
    nights.write(2, device='xvdb')
    copy = nights.night('max_backups=20')
    nights.write(4, device='xvdb')
    last = nights.night('max_backups=20')
    assert increments(nights.shelf, 'web') == [False, True, True]
    assert nights.verify().exit_status == 0
    for one in (copy, last):
        assert nights.restored_problem(one) == '' and nights.by_hand_problem(one) == ''


def test_a_vm_without_disks_is_a_full_each_night(some_nights: Any) -> None:
    nights = some_nights(disks=[])
    nights.night()
    copy = nights.night()
    assert increments(nights.shelf, 'web') == [False, False]
    assert 'it has no disk' in nights.run.stdout and nights.verify().exit_status == 0
    assert nights.restored_problem(copy) == ''
    nights.add('xvda', 4 * MEBIBYTE)
    nights.write(1)
    third = nights.night()
    nights.write(2)
    fourth = nights.night()
    assert is_increment(nights.shelf, 'web', fourth) and nights.restored_problem(fourth) == '' and nights.by_hand_problem(fourth) == ''
    assert nights.all_are_good() and nights.restored_problem(third) == ''


def test_where_an_sr_must_be_zeroed_a_restore_by_hand_refuses_and_the_text_has_said_so(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', disks=[ROOT]), srs=[{'name_label': 'raw', 'type': 'lvmoiscsi', 'must_zero': True},
                                                {'name_label': 'nfs', 'type': 'nfs'}])
    nights = Nights(pool, a_shelf(), 'vm-export=web')
    nights.night()
    nights.write(3)
    copy = nights.night()
    text = nights.shelf.text('web', copy, 'RESTORE.txt')
    assert re.search(r'# .*SRs whose disks must be zeroed .* refuse VHD', text)
    run = nights.by_hand(copy)
    assert run.exit_status == 1 and run.says('VDI_IO_ERROR'), run
    assert nights.restored_problem(copy) == '', 'VmBackup itself needs no VHD for it'
    other = [one['uuid'] for one in pool.dump()['SR'].values() if one['name_label'] == 'nfs'][0]
    path = nights.shelf.at('web', copy, 'RESTORE.txt')
    with open(path, 'w') as file:
        file.write(re.sub(r'(?m)^SR=\S+', 'SR=' + other, text))
    assert nights.by_hand_problem(copy) == ''


def test_two_vms_of_one_name_have_a_chain_each(a_pool: Any, a_shelf: Any) -> None:
    first, second = uuid_of('web'), uuid_of('web of others')
    pool, shelf = a_pool(vm('web', uuid=first, disks=ONE), vm('web', uuid=second, disks=[dict(ONE[0], seed=9)])), a_shelf()
    lines = ('vm-export=uuid:' + first, 'vm-export=uuid:' + second, 'incremental=yes')

    def contents(uuid: str) -> bytes:
        dump = pool.dump()
        record, = [one for one in dump['VM'].values() if one['uuid'] == uuid]
        vdi, = [dump['VBD'][ref]['VDI'] for ref in record['VBDs']]
        return pool.read(dump['VDI'][vdi]['uuid'])

    for number in range(3):
        run = backup(pool, shelf, *lines)
        assert run.exit_status == 3 and run.says('is backed up in a directory of its own'), run
    folders = [name for name in shelf.names() if name.startswith('web')]
    assert len(folders) == 2 and 'web' in folders
    for folder in folders:
        assert increments(shelf, folder) == [False, True, True]
    for number, uuid in enumerate((first, second)):
        run = run_program('-', shelf.config(*lines), 'restore', 'vm=uuid:' + uuid, 'to=back%d' % number,
                          environment=pool.environment())
        assert run.exit_status == 0, run
        back, = disks_of(pool, 'back%d' % number).values()
        assert pool.read(back['uuid']) == contents(uuid)
    run = run_program('-', shelf.config(*lines), 'verify')
    assert run.exit_status == 0 and run.says('6 good'), run


def test_a_disk_above_2040_gib_that_is_added_makes_fulls_and_once_it_is_gone_the_chain_goes_on(some_nights: Any) -> None:
    nights = some_nights(disks=ONE)
    small = nights.disks
    nights.disks = lambda: {}                   # type: ignore
    nights.night()
    nights.night('max_backups=20')
    nights.add('xvdc', 2041 * GIBIBYTE)
    nights.night('max_backups=20')
    assert 'larger than a VHD can be' in nights.run.stdout
    nights.night('max_backups=20')
    nights.detach('xvdc')
    nights.disks = small                        # type: ignore
    nights.write(3)
    last = nights.night('max_backups=20')
    assert increments(nights.shelf, 'web') == [False, True, False, False, True]
    assert nights.problem(last) == '' and nights.restored_problem(last) == '' and nights.verify().exit_status == 0
