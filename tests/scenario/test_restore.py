"""The way back: backup, the VM is gone, restore, and every block and field is as it was. Then everything that can go wrong."""

import json
import os
import shutil
import signal
from typing import Any, Sequence

import pytest

from support.deeds import backup, beginning
from support.language import GIBIBYTE, MEBIBYTE, at, disk, uuid_of, vm
from support.process import Run
from support.recovery import (destroy, differences, disks_of, drill, has_machine, holds, interfaces_of, machine, objects,
                              restore, serving, killed_at)
from support.shelf import of_old_program

NETWORK = 'Pool-wide network associated with eth0'
ROOT = disk(size=10 * MEBIBYTE, used=[[0, 3], [8, 1]], seed=11, bootable=True, name_label='root')
DATA = disk(size=6 * MEBIBYTE + 512, used=[[0, 2], [6, 1]], seed=12, name_label='data')
VIF = {'device': '0', 'network': NETWORK, 'MAC': 'aa:bb:cc:00:11:22', 'MTU': 1400}
ZSTD = pytest.param('compress=zstd', marks=pytest.mark.needs_zstd)
PROVISIONAL = 'being restored'


def web(**facts: Any) -> Any:
    """A VM with something in every field that can be described."""
    values = dict(name_description='the <shop> & "more"\nsecond line', tags=['gold', 'web'], memory=3 << 30, vcpus=3,
                  other_config={'owner of': 'Zoe\u00eb', 'vmbackup:stray': 'of another store'}, vifs=[VIF], power_state='Running',
                  cds=[{'userdevice': '3', 'empty': True}], disks=[ROOT, DATA], snapshots=1)
    return vm('web', **dict(values, **facts))


def newest(shelf: Any, name: str = 'web') -> str:
    return shelf.at(name, shelf.newest(name))


def image_of(shelf: Any, name: str = 'web') -> str:
    return os.path.join(newest(shelf, name), shelf.manifest(name, shelf.newest(name))['image']['name'])


def backed_up(pool: Any, shelf: Any, *lines: str) -> Run:
    run = backup(pool, shelf, *(lines or ('vm-export=*',)))
    assert run.exit_status == 0, run
    return run


def has_nothing_provisional(pool: Any) -> bool:
    """No VM, disk or task of a restore or drill is left in the pool."""
    dump = pool.dump()
    return not [record['name_label'] for kind in ('VM', 'task') for record in dump[kind].values()
                if 'vmbackup-' in record['name_label']] and not [
        record for record in dump['VDI'].values() if not record['VBDs'] and not record['is_a_snapshot']]


# --- All comes back -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('line', ['compress=none', 'compress=gzip', ZSTD])
def test_a_vm_that_is_gone_comes_back_with_every_block_and_field(a_backup: Any, line: str) -> None:
    pool, shelf = a_backup(web(), vm('db'), lines=['vm-export=web', line])
    gone = destroy(pool, 'web')
    run = restore(pool, shelf, 'web')
    assert run.exit_status == 0, run
    back = machine(pool, 'web')
    assert holds(pool, 'web', ROOT, DATA)
    gone['other_config'].pop('vmbackup:stray')
    assert differences(gone, back) == {}
    assert back['power_state'] == 'Halted' and back['uuid'] != gone['uuid']
    assert has_nothing_provisional(pool) and shelf.journals() == []
    assert run.says(back['uuid']) and run.says('xe vm-start')


@pytest.mark.parametrize('line', ['compress=none', 'compress=gzip', ZSTD])
@pytest.mark.parametrize('kind', ['raw', 'vhd'])
def test_an_os_disk_comes_back_as_a_vm(a_backup: Any, kind: str, line: str) -> None:
    pool, shelf = a_backup(web(), lines=['vdi-export=web', 'vdi_export_format=' + kind, line])
    gone = destroy(pool, 'web')
    run = restore(pool, shelf, 'web')
    assert run.exit_status == 0, run
    assert holds(pool, 'web', ROOT)
    gone['other_config'].pop('vmbackup:stray')
    assert differences(gone, machine(pool, 'web')) == {}
    assert run.says('disk xvdb data') and run.says('no longer in the pool')
    assert [row[:2] for row in interfaces_of(pool, 'web')] == [('0', NETWORK)]


def test_the_drives_are_as_they_were(a_backup: Any) -> None:
    pool, shelf = a_backup(web(disks=[dict(ROOT, mode='RO', bootable=False, userdevice='2'), dict(DATA, userdevice='5')]))
    before = disks_of(pool, 'web')
    destroy(pool, 'web')
    assert restore(pool, shelf, 'web').exit_status == 0
    after = disks_of(pool, 'web')
    assert sorted(after) == ['2', '5']
    for device in after:
        for field in ('mode', 'bootable', 'type', 'unpluggable'):
            assert after[device]['VBD'][field] == before[device]['VBD'][field], field
        for field in ('name_label', 'name_description', 'type', 'sharable', 'tags', 'SR'):
            assert after[device][field] == before[device][field], field
    cds = [vbd for vbd in pool.dump()['VBD'].values() if vbd['type'] == 'CD' and vbd['VM'] and vbd['userdevice'] == '3']
    assert len(cds) == 1 and cds[0]['empty']


@pytest.mark.parametrize('name', ['', '\u00dcmlaut & <b> "q" \'x\'', 'two  spaces', 'a/b:c=d,e', 'line\nbreak', '-dash', '.hidden',
                                  'x (being restored) vmbackup-0123456789'])
def test_odd_names_come_back(a_pool: Any, a_shelf: Any, name: str) -> None:
    pool, shelf = a_pool(vm(name, tags=['gold'])), a_shelf()
    backed_up(pool, shelf)
    destroy(pool, name)
    run = restore(pool, shelf, 'uuid:' + uuid_of(name))
    assert run.exit_status == 0, run
    assert holds(pool, name, disk(seed=0)) and machine(pool, name)['tags'] == ['gold']


def test_a_vm_without_disks_comes_back(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web', disks=0, vifs=[VIF]))
    destroy(pool, 'web')
    assert restore(pool, shelf, 'web').exit_status == 0
    assert disks_of(pool, 'web') == {} and len(interfaces_of(pool, 'web')) == 1


@pytest.mark.parametrize('line', ['vm-export=web', 'vdi-export=web'])
def test_a_large_disk_of_which_little_is_used_comes_back_small(a_backup: Any, line: str) -> None:
    large = disk(size=(100 if line.startswith('vdi') else 2000) * GIBIBYTE // (100 if line.startswith('vdi') else 1),
                 used=[[0, 1], [700, 2]], seed=5)
    pool, shelf = a_backup(vm('web', disks=[large]), lines=[line, 'vdi_export_format=vhd'])
    destroy(pool, 'web')
    run = restore(pool, shelf, 'web')
    assert run.exit_status == 0, run
    vdi = disks_of(pool, 'web')['0']
    assert int(vdi['virtual_size']) == large['size'] and int(vdi['physical_utilisation']) < 20 * MEBIBYTE
    assert drill(pool, shelf, 'web').exit_status == 0


def test_disks_of_several_srs_go_back_each_to_its_own(a_backup: Any) -> None:
    srs = [{'name_label': 'fast'}, {'name_label': 'slow', 'type': 'lvmoiscsi'}]
    disks = [disk(size=(4 + number) * MEBIBYTE, seed=number, sr='fast' if number % 3 else 'slow') for number in range(6)]
    pool, shelf = a_backup(vm('web', disks=disks, vifs=[VIF]), srs=srs, lines=['vm-export=*', 'compress=gzip'])
    destroy(pool, 'web')
    run = restore(pool, shelf, 'web')
    assert run.exit_status == 0, run
    assert holds(pool, 'web', *disks)
    assert {device: vdi['SR_name'] for device, vdi in disks_of(pool, 'web').items()} == {
        str(number): disks[number]['sr'] for number in range(6)}
    assert has_nothing_provisional(pool)


def test_all_disks_go_to_the_sr_that_is_named(a_backup: Any) -> None:
    srs = [{'name_label': 'fast'}, {'name_label': 'slow'}, {'name_label': 'spare room'}]
    pool, shelf = a_backup(vm('web', disks=[disk(sr='fast', seed=1), disk(sr='slow', seed=2)]), srs=srs)
    assert restore(pool, shelf, 'web', 'sr=spare room', 'to=web 2').exit_status == 0
    assert {vdi['SR_name'] for vdi in disks_of(pool, 'web 2').values()} == {'spare room'}


# --- Beside the VM that is there --------------------------------------------------------------------------------------------

def test_the_vm_that_is_there_is_left_as_it_is(a_backup: Any) -> None:
    pool, shelf = a_backup(web())
    before = objects(pool)
    run = restore(pool, shelf, 'web')
    assert run.exit_status == 0, run
    after = objects(pool)
    for kind in ('VM', 'VDI', 'VBD', 'VIF'):
        assert {ref: after[kind].get(ref) for ref in before[kind]} == before[kind], kind
    assert set(after['network']) == set(before['network']) and after['task'] == {}
    day = shelf.newest('web')[len('backup-'):][:10]
    restored = machine(pool, 'web (restored %s)' % day)
    (_, network, mac), = interfaces_of(pool, restored['name_label'])
    assert network == NETWORK and mac != VIF['MAC']
    assert restored['other_config']['mac_seed'] != machine(pool, 'web')['other_config']['mac_seed']
    assert restore(pool, shelf, 'web').exit_status == 0 and has_machine(pool, 'web (restored %s) 2' % day)


def test_a_name_can_be_given_and_one_that_is_taken_is_refused(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web'), vm('db'), lines=['vm-export=web'])
    assert restore(pool, shelf, 'web', 'to=web two').exit_status == 0 and holds(pool, 'web two', disk(seed=0))
    before = objects(pool)
    run = restore(pool, shelf, 'web', 'to=db')
    assert run.exit_status == 1 and run.says('a VM named db is there already')
    assert objects(pool) == before


def test_preserve_keeps_uuid_and_mac_once_the_vm_is_gone(a_backup: Any) -> None:
    pool, shelf = a_backup(web())
    before = objects(pool)
    run = restore(pool, shelf, 'web', 'preserve=yes')
    assert run.exit_status == 1 and run.says('the VM with this uuid') and objects(pool) == before
    gone = destroy(pool, 'web')
    run = restore(pool, shelf, 'web', 'preserve=yes')
    assert run.exit_status == 0, run
    back = machine(pool, 'web')
    assert back['uuid'] == gone['uuid'] and interfaces_of(pool, 'web') == [('0', NETWORK, VIF['MAC'])]
    assert back['other_config']['mac_seed'] == gone['other_config']['mac_seed']
    assert holds(pool, 'web', ROOT, DATA)


def test_preserve_refuses_a_mac_address_that_another_vm_has(a_backup: Any) -> None:
    pool, shelf = a_backup(web(), vm('squatter', vifs=[VIF]), lines=['vm-export=web'])
    destroy(pool, 'web')
    run = restore(pool, shelf, 'web', 'preserve=yes')
    assert run.exit_status == 1 and run.says('squatter has the MAC address') and not has_machine(pool, 'web')


def test_it_is_started_only_when_that_is_asked_for(a_backup: Any) -> None:
    pool, shelf = a_backup(web())
    destroy(pool, 'web')
    run = restore(pool, shelf, 'web', 'start=yes')
    assert run.exit_status == 0 and machine(pool, 'web')['power_state'] == 'Running'


def test_preview_shows_the_plan_and_changes_nothing(a_backup: Any) -> None:
    pool, shelf = a_backup(web())
    before, tree = objects(pool), shelf.tree()
    run = restore(pool, shelf, 'web', 'preview')
    assert run.exit_status == 0 and run.says('disk xvda root') and run.says('where it came from')
    assert objects(pool) == before and shelf.tree() == tree


# --- Refused before anything is made --------------------------------------------------------------------------------------

def elsewhere(a_pool: Any, shelf: Any, **sections: Any) -> Any:
    """Another pool, after a backup of web in a first one."""
    backed_up(a_pool(web(disks=[dict(ROOT, sr='fast')], vifs=[dict(VIF, network='LAN')]), srs=[{'name_label': 'fast'}],
                     networks=[{'name_label': 'LAN', 'bridge': 'xenbr0'}]), shelf)
    return a_pool(vm('db'), **sections)


def refused(pool: Any, shelf: Any, *words: str, status: int = 1) -> Run:
    before = objects(pool)
    run = restore(pool, shelf, 'web', *words)
    assert run.exit_status == status, run
    assert objects(pool) == before and pool.never_saw('xe:vm-import') and pool.never_saw('api:task.create')
    return run


def test_another_pool_takes_it_with_sr_and_network_named(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf()
    pool = elsewhere(a_pool, shelf, srs=[{'name_label': 'new store'}], networks=[{'name_label': 'other', 'bridge': 'xenbr1'}])
    run = refused(pool, shelf)
    assert run.says('which is not in this pool: name one with sr=') and run.says('new store')
    assert run.says('was on network LAN') and run.says('name one with network=')
    networks = pool.dump()['network']
    run = restore(pool, shelf, 'web', 'sr=new store', 'network=other', 'preserve=yes')
    assert run.exit_status == 0, run
    assert interfaces_of(pool, 'web') == [('0', 'other', VIF['MAC'])] and machine(pool, 'web')['uuid'] == uuid_of('web')
    assert set(pool.dump()['network']) == set(networks)


def test_an_sr_and_a_network_of_the_same_names_are_taken_in_a_new_pool(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf()
    pool = elsewhere(a_pool, shelf, srs=[{'name_label': 'new'}, {'name_label': 'fast', 'type': 'ext', 'size': 1 << 40}],
                     networks=[{'name_label': 'LAN', 'bridge': 'xenbr7'}])
    assert restore(pool, shelf, 'web').exit_status == 0
    assert disks_of(pool, 'web')['0']['SR_name'] == 'fast' and interfaces_of(pool, 'web')[0][1] == 'LAN'


@pytest.mark.parametrize('word', ['sr=no such', 'network=no such', 'to', 'sr=isos', 'disk=xvda', 'preserve=perhaps'])
def test_words_that_mean_nothing_are_refused(a_pool: Any, a_shelf: Any, word: str) -> None:
    shelf = a_shelf()
    pool = a_pool(web(disks=[dict(ROOT, sr='slow')]), srs=[{'name_label': 'slow'}, {'name_label': 'isos', 'type': 'iso'}])
    backed_up(pool, shelf)
    refused(pool, shelf, word, status=2)


def test_too_little_space_is_told_before_anything_starts(a_backup: Any) -> None:
    srs = [{'name_label': 'fast'}, {'name_label': 'tiny', 'size': 2 * MEBIBYTE}, {'name_label': 'thick', 'type': 'lvm',
                                                                                'size': 20 * MEBIBYTE}]
    large = disk(size=64 * MEBIBYTE, used=4, sr='fast')
    pool, shelf = a_backup(vm('web', disks=[large]), srs=srs)
    assert refused(pool, shelf, 'sr=tiny').says('SR tiny')
    assert refused(pool, shelf, 'sr=thick').says('needs at least 64 MiB')


def test_a_name_that_stands_for_several_vms_of_the_store_is_refused(a_pool: Any, a_shelf: Any) -> None:
    one, two = '00000000-0000-4000-8000-000000000001', '00000000-0000-4000-8000-000000000002'
    pool = a_pool(vm('web', uuid=one, disks=[disk(seed=1)]), vm('web', uuid=two, disks=[disk(seed=2)]))
    shelf = a_shelf()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 3
    run = refused(pool, shelf, status=2)
    assert run.says('vm=uuid:' + one) and run.says('vm=uuid:' + two)
    assert restore(pool, shelf, 'vm=uuid:' + two, 'to=second').exit_status == 0
    assert holds(pool, 'second', disk(seed=2))


def test_latest_is_the_newest_good_copy(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web'))
    backed_up(pool, shelf)
    os.unlink(os.path.join(newest(shelf), 'success'))
    first = shelf.copies('web')[0]
    run = restore(pool, shelf, 'web', 'to=w')
    assert run.exit_status == 0 and run.says(first) and run.says('is passed over')
    bad = sorted(name for name in shelf.names('web') if name != first)[0]
    assert refused_copy(pool, shelf, 'from=' + bad[len('backup-'):]).says('is not a good copy')
    assert restore(pool, shelf, 'web', 'from=' + bad, 'force=yes', 'to=w2').exit_status == 0 and holds(pool, 'w2', disk(seed=0))


def refused_copy(pool: Any, shelf: Any, *words: str) -> Run:
    before = objects(pool)
    run = restore(pool, shelf, 'web', *words)
    assert run.exit_status in (1, 2) and objects(pool) == before, run
    return run


# --- A file alone -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('line', ['compress=none', 'compress=gzip'])
def test_a_single_archive_is_enough(a_backup: Any, tmp_path: Any, line: str) -> None:
    pool, shelf = a_backup(web(), lines=['vm-export=*', line])
    path = str(tmp_path / os.path.basename(image_of(shelf)))
    shutil.copy(image_of(shelf), path)
    destroy(pool, 'web')
    run = backup(pool, shelf, 'vm-export=*', 'backup_dir=/nonexistent', words=['restore', 'from=' + path])
    assert run.exit_status == 0, run
    assert holds(pool, 'web', ROOT, DATA)
    assert os.listdir(str(tmp_path / '.vmbackup' / 'runs')) == []


@pytest.mark.parametrize('part', ['', 'image'])
def test_a_copys_directory_that_lies_anywhere_is_enough(a_backup: Any, tmp_path: Any, part: str) -> None:
    pool, shelf = a_backup(web(), lines=['vdi-export=*', 'vdi_export_format=vhd', 'compress=gzip'])
    place = str(tmp_path / 'rescued')
    shutil.copytree(newest(shelf), place)
    destroy(pool, 'web')
    shutil.rmtree(shelf.path)
    path = os.path.join(place, os.path.basename('web.vhd.gz')) if part else place
    run = backup(pool, shelf, 'vm-export=*', 'backup_dir=/nonexistent', words=['restore', 'from=' + path])
    assert run.exit_status == 0, run
    assert holds(pool, 'web', ROOT)


def test_a_path_that_is_no_image_is_refused(a_pool: Any, a_shelf: Any, tmp_path: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    (tmp_path / 'x.xva').write_bytes(b'no archive at all' * 1000)
    (tmp_path / 'y.raw').write_bytes(bytes(4 * MEBIBYTE))
    (tmp_path / 'notes.txt').write_bytes(b'x')
    for name, word in (('x.xva', 'archive'), ('y.raw', 'without its VM'), ('notes.txt', 'no image'), ('gone.xva', 'not there')):
        before = objects(pool)
        run = restore(pool, shelf, 'from=%s' % (tmp_path / name))
        assert run.exit_status in (1, 2) and run.says(word) and objects(pool) == before, run


# --- What the older program left ------------------------------------------------------------------------------------------------

RECORDED_NAME = 'PROD-web'
RECORDED = [disk(size=10 * MEBIBYTE, used=[[0, 3], [8, 1]], seed=11), disk(size=6 * MEBIBYTE, used=[[0, 2]], seed=12)]


@pytest.mark.parametrize('number', range(4))
def test_copies_of_the_older_program_come_back(a_pool: Any, a_shelf: Any, number: int) -> None:
    shelf = a_shelf(of_old_program())
    pool = a_pool(vm('db'), srs=[{'name_label': 'here'}], networks=[{'name_label': NETWORK, 'bridge': 'xenbr0'}])
    name = sorted(name for name in os.listdir(shelf.at(RECORDED_NAME)) if name.startswith('backup-'))[number]
    run = restore(pool, shelf, RECORDED_NAME, 'from=' + name, 'sr=here')
    assert run.exit_status == 0, run
    back = machine(pool, RECORDED_NAME)
    assert holds(pool, RECORDED_NAME, *(RECORDED if number < 2 else RECORDED[:1]))
    assert back['tags'] == ['gold'] and 'second = line' in back['name_description'] and not back['is_a_template']


@pytest.mark.parametrize('number', [2, 3])
def test_an_old_copy_without_vm_metadata_is_rebuilt_from_its_cfg_files(a_pool: Any, a_shelf: Any, number: int) -> None:
    shelf = a_shelf(of_old_program())
    pool = a_pool(vm('db'), srs=[{'name_label': 'here'}], networks=[{'name_label': NETWORK, 'bridge': 'xenbr0'}])
    name = sorted(name for name in os.listdir(shelf.at(RECORDED_NAME)) if name.startswith('backup-'))[number]
    os.unlink(shelf.at(RECORDED_NAME, name, 'vm-metadata.xml'))
    with open(shelf.at(RECORDED_NAME, name, 'vm.cfg'), 'w', encoding='utf-8') as file:
        file.write('name_label=PROD-web\nname_description=first line\nsecond = line\nmemory_dynamic_max=268435456\n'
                   'VCPUs_max=2\nVCPUs_at_startup=1\nos_version=\norig_uuid=09383cc3-9408-98b4-bdf4-8a0d84e4be8e\n')
    run = restore(pool, shelf, RECORDED_NAME, 'from=' + name, 'sr=here')
    assert run.exit_status == 0, run
    back = machine(pool, RECORDED_NAME)
    assert holds(pool, RECORDED_NAME, RECORDED[0]) and run.says('disk xvdb') and run.says('how the VM boots is not on record')
    assert (back['VCPUs_max'], back['memory_dynamic_max']) == ('2', '268435456')
    assert not [key for key in back['other_config'] if key.startswith('vmbackup')] and has_nothing_provisional(pool)
    assert drill(pool, shelf, RECORDED_NAME, 'sr=here').exit_status == 0


# --- Disks that the copy lacks ------------------------------------------------------------------------------------------------------

def test_existing_disks_are_attached_only_when_asked_and_when_nobody_has_them(a_backup: Any) -> None:
    pool, shelf = a_backup(web(snapshots=0), lines=['vdi-export=web'])
    run = restore(pool, shelf, 'web', 'attach_existing_disks=yes', 'to=first')
    assert run.exit_status == 0 and run.says('it hangs on web') and list(disks_of(pool, 'first')) == ['0']
    data = disks_of(pool, 'web')['1']
    session = pool.session()
    session.xenapi.VM.hard_shutdown(session.xenapi.VM.get_by_uuid(machine(pool, 'web')['uuid']))
    session.xenapi.VM.destroy(session.xenapi.VM.get_by_uuid(machine(pool, 'web')['uuid']))
    session.logout()
    run = restore(pool, shelf, 'web')
    assert run.exit_status == 0 and run.says('attach_existing_disks=yes attaches it') and list(disks_of(pool, 'web')) == ['0']
    run = restore(pool, shelf, 'web', 'attach_existing_disks=yes', 'to=second')
    assert run.exit_status == 0, run
    attached = disks_of(pool, 'second')['1']
    assert attached['uuid'] == data['uuid'] and 'owner' not in attached['VBD']['other_config']
    assert 'owner' in disks_of(pool, 'second')['0']['VBD']['other_config']


def test_a_restore_that_fails_leaves_an_attached_disk_where_it_was(a_backup: Any) -> None:
    pool, shelf = a_backup(web(snapshots=0), lines=['vdi-export=web'])
    session = pool.session()
    ref = session.xenapi.VM.get_by_uuid(machine(pool, 'web')['uuid'])
    session.xenapi.VM.hard_shutdown(ref)
    session.xenapi.VM.destroy(ref)
    session.logout()
    serving(pool, at('api:VBD.create', when='after', fails=['INTERNAL_ERROR', 'x']))
    before = set(pool.dump()['VDI'])
    run = restore(pool, shelf, 'web', 'attach_existing_disks=yes')
    assert run.exit_status == 1, run
    assert set(pool.dump()['VDI']) == before and not has_machine(pool, 'web')


# --- Damage -----------------------------------------------------------------------------------------------------------------------

def damage(path: str, place: float) -> None:
    with open(path, 'r+b') as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(int(size * place))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize('lines', [('vm-export=*',), ('vm-export=*', 'compress=gzip'), ('vdi-export=*',),
                                   ('vdi-export=*', 'vdi_export_format=vhd', 'compress=gzip'),
                                   pytest.param(('vm-export=*', 'compress=zstd'), marks=pytest.mark.needs_zstd)])
@pytest.mark.parametrize('place', [0.3, 0.6, 0.97])
def test_damage_anywhere_leaves_nothing_in_the_pool(a_backup: Any, lines: Sequence[str], place: float) -> None:
    pool, shelf = a_backup(web(disks=[ROOT]), lines=lines)
    damage(image_of(shelf), place)
    before = objects(pool)
    run = restore(pool, shelf, 'web')
    assert run.exit_status == 1 and run.says('error: '), run
    assert objects(pool) == before and shelf.journals() == []


def test_a_block_that_was_cut_out_of_the_middle_is_seen(a_backup: Any) -> None:
    pool, shelf = a_backup(web(disks=[ROOT]))
    path = image_of(shelf)
    with open(path, 'rb') as file:
        content = file.read()
    begin = content.index(b'/00000001\0') // 512 * 512
    end = content.index(b'/00000002\0') // 512 * 512
    with open(path, 'wb') as file:
        file.write(content[:begin] + content[end:])
    refused_copy(pool, shelf)
    stored = json.loads(shelf.read('web', shelf.newest('web') if shelf.copies('web') else shelf.names('web')[0],
                                   'backup.json').decode('utf-8'))
    assert stored['image']['size'] != os.path.getsize(path)
    run = restore(pool, shelf, 'web', 'from=' + os.path.basename(os.path.dirname(path)), 'force=yes')
    assert run.exit_status == 3 and run.says('IT IS DAMAGED'), run


def test_verify_first_finds_damage_before_anything_is_made(a_backup: Any) -> None:
    pool, shelf = a_backup(web(disks=[ROOT]))
    damage(image_of(shelf), 0.6)
    before = objects(pool)
    run = restore(pool, shelf, 'web', 'verify_first=yes')
    assert run.exit_status == 1 and run.says('is damaged') and pool.never_saw('xe:vm-import') and objects(pool) == before


def test_force_keeps_what_a_damaged_copy_gave(a_backup: Any) -> None:
    pool, shelf = a_backup(web(disks=[ROOT]))
    damage(image_of(shelf), 0.6)
    destroy(pool, 'web')
    run = restore(pool, shelf, 'web', 'force=yes', 'start=yes')
    assert run.exit_status == 3 and run.says('IT IS DAMAGED'), run
    assert machine(pool, 'web (DAMAGED)')['power_state'] == 'Halted' and not has_machine(pool, 'web')
    assert has_nothing_provisional(pool) and shelf.journals() == []


# --- Interrupted, and everything that the pool can do --------------------------------------------------------------------------------

FAULTS = [
    at('api:task.create', fails=['INTERNAL_ERROR', 'x']),
    at('api:task.create', drop=True, when='after', nth=1),
    at('http:/import', fails=['SR_BACKEND_FAILURE_44', '', 'There is insufficient space', '']),
    at('http:/import', drop=True),
    at('http:/import', drop=True, when='after'),
    at('xe:vm-import', exit=1, stderr='Lost connection to the server.'),
    at('xe:vm-import', kill='xe'),
    at('api:VM.get_by_name_label', fails=['INTERNAL_ERROR', 'x'], nth=1),
    at('api:VBD.get_all_records_where', fails=['INTERNAL_ERROR', 'x'], nth=1),
    at('api:VIF.create', fails=['MAC_INVALID', 'x']),
    at('api:VIF.create', drop=True, when='after'),
    at('api:VBD.create', fails=['DEVICE_ALREADY_EXISTS', '0']),
    at('api:VBD.create', drop=True, when='after', nth=1),
    at('api:VM.destroy', fails=['INTERNAL_ERROR', 'x'], nth=1),
]
TWO_SRS = [{'name_label': 'fast'}, {'name_label': 'slow'}]
TWO_DISKS = [dict(ROOT, sr='fast'), dict(DATA, sr='slow')]


@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: '%s %s' % (fault['on'], sorted(fault['do'])[0] + fault.get('when', '')))
def test_after_any_fault_the_vm_is_there_whole_or_nothing_is(a_backup: Any, fault: Any) -> None:
    pool, shelf = a_backup(web(disks=TWO_DISKS), srs=TWO_SRS, faults=[fault])
    before = objects(pool)
    run = restore(pool, shelf, 'web', 'to=back')
    if run.exit_status == 0:
        assert holds(pool, 'back', *TWO_DISKS) and has_nothing_provisional(pool), run
    else:
        serving(pool)
        if shelf.journals():               # what could not be removed at once is the next run's
            assert backup(pool, shelf, 'vm-export=nobody*').exit_status == 3
        after = objects(pool)
        assert {kind: set(after[kind]) for kind in ('VM', 'VDI', 'VBD', 'VIF')} == {
            kind: set(before[kind]) for kind in ('VM', 'VDI', 'VBD', 'VIF')}, run
        assert shelf.journals() == []


POINTS = {
    'before the task': ('api:task.create', ''),
    'when the task is made': ('api:task.create', 'after'),
    'in the import': ('http:/import', ''),
    'when the import has ended': ('xe:vm-import', 'after'),
    'before the parts are joined': ('api:VBD.create', ''),
    'when a part is joined': ('api:VBD.create', 'after'),
    'before a part is given up': ('api:VM.destroy', ''),
    'when a part is given up': ('api:VM.destroy', 'after'),
    'before the interface': ('api:VIF.create', ''),
    'when the interface is made': ('api:VIF.create', 'after'),
}


@pytest.mark.parametrize('point', sorted(POINTS))
def test_what_a_killed_restore_left_is_gone_after_the_next_run(a_backup: Any, point: str) -> None:
    pool, shelf = a_backup(web(disks=TWO_DISKS), srs=TWO_SRS)
    before = objects(pool)
    occasion, when = POINTS[point]
    killed_at(pool, shelf, occasion, when, 'restore', 'web', 'to=back')
    run = backup(pool, shelf, 'vm-export=nobody*')
    assert run.exit_status == 3, run
    after = objects(pool)
    for kind in ('VM', 'VDI', 'VBD', 'VIF', 'network'):
        assert set(after[kind]) == set(before[kind]), (kind, run)
    assert shelf.journals() == []


def test_a_restore_killed_before_its_last_steps_left_a_whole_vm(a_backup: Any) -> None:
    pool, shelf = a_backup(web())
    destroy(pool, 'web')
    killed_at(pool, shelf, 'api:VM.set_name_label', '', 'restore', 'web')
    run = backup(pool, shelf, 'vm-export=nobody*')
    name, = [record['name_label'] for record in pool.dump()['VM'].values() if PROVISIONAL in record['name_label']]
    assert run.exit_status == 3 and run.says('is whole, but is still named ' + name), run
    assert holds(pool, name, ROOT, DATA) and shelf.journals() == [] and not pool.dump()['task']


def test_a_name_that_the_pool_refuses_leaves_a_whole_vm_and_says_how_to_name_it(a_backup: Any) -> None:
    pool, shelf = a_backup(web(), faults=[at('api:VM.set_name_label', fails=['INTERNAL_ERROR', 'x'])])
    run = restore(pool, shelf, 'web', 'to=back')
    name, = [record['name_label'] for record in pool.dump()['VM'].values() if PROVISIONAL in record['name_label']]
    assert run.exit_status == 1 and run.says('xe vm-param-set uuid=%s name-label=' % machine(pool, name)['uuid']), run
    assert run.output.count('is whole, but is still named') == 1, run
    assert holds(pool, name, ROOT, DATA) and shelf.journals() == [] and not pool.dump()['task']


def test_a_task_that_can_not_be_removed_never_makes_it_advise_against_the_restored_vm(a_backup: Any) -> None:
    pool, shelf = a_backup(web(), faults=[at('api:task.destroy', fails=['INTERNAL_ERROR', 'x'])])
    run = restore(pool, shelf, 'web', 'to=back')
    assert run.exit_status == 3 and run.says('is whole; only the record') and run.never_says('vm-uninstall'), run
    assert holds(pool, 'back', ROOT, DATA)


@pytest.mark.parametrize('fault', [at('api:VIF.create', drop=True, when='after'), at('api:VIF.create', drop=True, nth=1)],
                         ids=['made', 'not made'])
def test_a_lost_answer_behind_the_import_does_not_cost_the_import(a_backup: Any, fault: Any) -> None:
    pool, shelf = a_backup(web(), faults=[fault])
    run = restore(pool, shelf, 'web', 'to=back')
    assert run.exit_status == 0 and holds(pool, 'back', ROOT, DATA) and len(interfaces_of(pool, 'back')) == 1, run


def test_metadata_that_were_changed_are_refused(a_backup: Any) -> None:
    pool, shelf = a_backup(web(), lines=['vdi-export=*'])
    path = os.path.join(newest(shelf), 'vm-metadata.xml')
    with open(path, 'rb') as file:
        text = file.read()
    with open(path, 'wb') as file:
        file.write(text.replace(b'gold', b'lead'))
    run = restore(pool, shelf, 'web', 'to=back')
    assert run.exit_status == 1 and run.says('vm-metadata.xml is not what was written') and not has_machine(pool, 'back'), run


def test_a_copy_of_another_vm_than_the_one_named_is_refused(a_backup: Any) -> None:
    pool, shelf = a_backup(web(), vm('db'))
    run = restore(pool, shelf, 'db', 'to=back', 'from=' + image_of(shelf))
    assert run.exit_status == 2 and run.says('is a copy of web, not of db') and not has_machine(pool, 'back'), run


def test_an_archive_beside_the_metadata_of_another_vm_is_known_by_its_own(a_backup: Any, tmp_path: Any) -> None:
    pool, shelf = a_backup(web(), vm('db'))
    shutil.copy(image_of(shelf), str(tmp_path / 'web.xva'))
    shutil.copy(os.path.join(newest(shelf, 'db'), 'vm-metadata.xml'), str(tmp_path))
    destroy(pool, 'web')
    run = restore(pool, shelf, 'web', 'from=' + str(tmp_path / 'web.xva'))
    assert run.exit_status == 0 and holds(pool, 'web', ROOT, DATA), run


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_import_leaves_nothing(a_backup: Any, number: int) -> None:
    big = disk(size=64 * MEBIBYTE, used=60, seed=3)
    pool, shelf = a_backup(vm('web', disks=[big]), faults=[at('http:/import', sleeps=60, until='enough')])
    before = objects(pool)
    with beginning(pool, shelf, 'vm-export=*', words=['restore', 'web', 'to=back']) as process:
        assert process.says(': importing '), process.output
        process.signal(number)
        assert process.says(signal.Signals(number).name + ' came'), process.output
        pool.release()
        run = process.ending()
    assert run.exit_status == 128 + number, run
    after = objects(pool)
    assert {kind: set(after[kind]) for kind in ('VM', 'VDI', 'VBD', 'VIF', 'task')} == {
        kind: set(before[kind]) for kind in ('VM', 'VDI', 'VBD', 'VIF', 'task')}
    assert shelf.journals() == []


def test_a_vm_that_somebody_took_over_is_left_to_them(a_backup: Any) -> None:
    pool, shelf = a_backup(web())
    killed_at(pool, shelf, 'api:VIF.create', '', 'restore', 'web', 'to=back')
    session = pool.session()
    ref, = [ref for ref, record in session.xenapi.VM.get_all_records().items() if PROVISIONAL in record['name_label']]
    session.xenapi.VM.set_name_label(ref, 'rescued by hand')
    session.logout()
    run = backup(pool, shelf, 'vm-export=nobody*')
    assert run.says('was taken over by somebody') and holds(pool, 'rescued by hand', ROOT, DATA)
