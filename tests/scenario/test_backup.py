"""What a backup is: of VMs in every power state and with every kind of disk, the image, the metadata, and the way back."""

import json
import os
import subprocess
from typing import Any, Dict, List

import pytest

from support.archive import read_tar
from support.deeds import backup, beginning, objects, preview
from support.language import MEBIBYTE, at, disk, uuid_of, vm
from support.process import Pool
from support.shelf import Shelf, disk_content, unpacked
from support.wire import eventually

STORE = {'name_label': 'store', 'type': 'nfs', 'shared': True}
IMAGES = {'name_label': 'images', 'type': 'iso', 'shared': True}
LOCAL_2 = {'name_label': 'local xcp2', 'type': 'ext', 'host': 'xcp2'}
TWO_HOSTS = [{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'}]
STATES = ('Running', 'Halted', 'Suspended', 'Paused')


def imported_disks(pool: Pool, path: str) -> List[bytes]:
    """The disks of the VM that `xe vm-import` makes of that archive, by their place."""
    done = pool.xe('vm-import', 'filename=' + path)
    assert done.exit_status == 0, done
    return disks_of(pool, done.stdout.strip())


def disks_of(pool: Pool, vm_uuid: str) -> List[bytes]:
    dump = pool.dump()
    machine = [record for record in dump['VM'].values() if record['uuid'] == vm_uuid][0]
    drives = sorted((dump['VBD'][ref] for ref in machine['VBDs']), key=lambda drive: int(drive['userdevice']))
    return [pool.read(dump['VDI'][drive['VDI']]['uuid']) for drive in drives if drive['type'] == 'Disk']


def plain_image(shelf: Shelf, folder: str) -> bytes:
    copy = shelf.newest(folder)
    name = shelf.image(folder, copy)
    return unpacked(shelf.read(folder, copy, name), name)


# --- Power states ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('state', STATES)
def test_a_vm_in_any_power_state_is_backed_up_whole_and_stays_as_it_was(a_pool: Any, a_shelf: Any, state: str) -> None:
    pool = a_pool(vm('web', disks=[disk(seed=1), disk(seed=2, used=[[3, 1]])], power_state=state),
                  vm('db', disks=[disk(seed=3), disk(seed=4)], power_state=state))
    shelf, before = a_shelf(), objects(pool)

    run = backup(pool, shelf, 'vm-export=web', 'vdi-export=db')

    assert run.exit_status == 0, run
    assert objects(pool) == before, 'nothing in the pool has changed, not even a message'
    assert plain_image(shelf, 'db') == disk_content(disk(seed=3))
    web = shelf.newest('web')
    assert shelf.proves_itself('web', web) and shelf.proves_itself('db', shelf.newest('db'))
    assert imported_disks(pool, shelf.at('web', web, 'web.xva')) == [
        disk_content(disk(seed=1)), disk_content(disk(seed=2, used=[[3, 1]]))]


def test_what_a_guest_writes_after_the_snapshot_is_not_in_the_image(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', power_state='Running'), faults=[at('http:/export_raw_vdi', sleeps=60, until='enough')])
    shelf = a_shelf()
    with beginning(pool, shelf, 'vdi-export=web') as process:
        assert eventually(lambda: [call for call in pool.calls('api:VDI.snapshot') if call['result'] == 'ok'])
        pool.command('write', '--dir', pool.dir, '--vm', 'web', '--device', 'xvda', '--block', '1')
        pool.release()
        assert process.ending().exit_status == 0
    assert plain_image(shelf, 'web') == disk_content(disk())


# --- Kinds of disks --------------------------------------------------------------------------------------------------

def test_a_vm_without_a_disk_has_its_metadata_backed_up_by_vm_export(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', disks=0), vm('db')), a_shelf()
    run = backup(pool, shelf, 'vm-export=*')
    assert run.exit_status == 0, run
    assert shelf.names('web', shelf.newest('web')) == ['SHA256SUMS', 'backup.json', 'blocks', 'success', 'vm-metadata.xml',
                                                       'vm.cfg', 'web.xva']
    assert imported_disks(pool, shelf.at('web', shelf.newest('web'), 'web.xva')) == []


@pytest.mark.parametrize('cds', [[], [{'userdevice': '3', 'empty': True}],
                                 [{'userdevice': '0', 'empty': False, 'sr': 'images', 'name_label': 'a.iso'}]],
                         ids=['no drive', 'an empty CD drive', 'only a CD as drive 0'])
def test_vdi_export_of_a_vm_without_a_disk_0_is_an_error_that_says_so_and_guesses_nothing(a_pool: Any, a_shelf: Any,
                                                                                        cds: Any) -> None:
    data = [disk(userdevice='1', name_label='data of web')] if cds else []
    pool, shelf = a_pool(vm('web', disks=data, cds=cds), vm('db'), srs=[STORE, IMAGES]), a_shelf()
    run = backup(pool, shelf, 'vdi-export=*')
    assert run.exit_status == 1
    assert 'web' in run.stderr and 'Disk 0' in run.stderr
    assert 'data of web' in run.stderr if data else 'no disk' in run.stderr
    assert shelf.has('db', vdi_exports=1) and shelf.names() == ['db']
    assert pool.has_no_snapshots_of_ours()
    assert preview(pool, shelf, 'vdi-export=*').says('no Disk 0')


def test_an_inserted_iso_is_neither_exported_nor_removed(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', power_state='Running',
                     cds=[{'userdevice': '3', 'empty': False, 'sr': 'images', 'name_label': 'tools.iso'}]),
                  srs=[STORE, IMAGES])
    shelf, before = a_shelf(), objects(pool)
    run = backup(pool, shelf, 'vm-export=web')
    assert run.exit_status == 0, run
    assert objects(pool) == before
    assert shelf.names('web', shelf.newest('web')) == ['DISK-xvda', 'SHA256SUMS', 'backup.json', 'blocks', 'success',
                                                       'vm-metadata.xml', 'vm.cfg', 'web.xva']


@pytest.mark.parametrize('kind', ['vm-export', 'vdi-export'])
@pytest.mark.parametrize('host', [1, 2])
def test_a_disk_on_a_local_sr_of_another_host_is_exported(a_pool: Any, a_shelf: Any, kind: str, host: int) -> None:
    pool = a_pool(vm('web', disks=[disk(sr='local xcp2', seed=5)]), hosts=TWO_HOSTS, srs=[STORE, LOCAL_2])
    shelf = a_shelf()
    run = backup(pool, shelf, kind + '=web', host=host)
    assert run.exit_status == 0, run
    assert pool.has_no_snapshots_of_ours()
    if kind == 'vdi-export':
        assert plain_image(shelf, 'web') == disk_content(disk(seed=5))
    else:
        assert imported_disks(pool, shelf.at('web', shelf.newest('web'), 'web.xva')) == [disk_content(disk(seed=5))]


@pytest.mark.parametrize('kind', ['vm-export', 'vdi-export'])
def test_a_read_only_disk_is_backed_up(a_pool: Any, a_shelf: Any, kind: str) -> None:
    pool, shelf = a_pool(vm('web', disks=[disk(mode='RO', seed=3)], power_state='Running')), a_shelf()
    run = backup(pool, shelf, kind + '=web')
    assert run.exit_status == 0, run
    assert 'mode=RO\n' in shelf.text('web', shelf.newest('web'), 'DISK-xvda', 'vbd.cfg')


def test_the_disks_of_a_vm_that_never_started_are_named_by_their_place(a_pool: Any, a_shelf: Any) -> None:
    places = ('0', '1', '26')
    pool = a_pool(vm('web', disks=[disk(userdevice=place, device='', seed=place) for place in places]))
    shelf = a_shelf()
    run = backup(pool, shelf, 'vm-export=web')
    assert run.exit_status == 0, run
    assert [name for name in shelf.names('web', shelf.newest('web')) if name.startswith('DISK')] == [
        'DISK-xvda', 'DISK-xvdaa', 'DISK-xvdb']


def test_disk_0_is_found_under_its_older_names_too(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('old', disks=[disk(userdevice='hdb', device='hdb', seed=1), disk(userdevice='hda', device='hda', seed=2)]),
                  vm('older', disks=[disk(userdevice='1', seed=3), disk(userdevice='xvda', device='xvda', seed=4)]))
    shelf = a_shelf()
    run = backup(pool, shelf, 'vdi-export=*')
    assert run.exit_status == 0, run
    assert plain_image(shelf, 'old') == disk_content(disk(seed=2))
    assert plain_image(shelf, 'older') == disk_content(disk(seed=4))


def test_a_disk_that_resets_at_boot_is_refused_in_a_sentence_with_what_to_do(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf()
    vdi = [record['uuid'] for record in pool.dump()['VDI'].values()
           if pool.dump()['VM'][pool.dump()['VBD'][record['VBDs'][0]]['VM']]['name_label'] == 'web'][0]
    assert pool.xe('vdi-param-set', 'uuid=' + vdi, 'on-boot=reset').exit_status == 0
    run = backup(pool, shelf, 'vm-export=*')
    assert run.exit_status == 1
    assert 'web' in run.stderr and 'on_boot=reset' in run.stderr and 'persist' in run.stderr
    assert shelf.has('db', complete=1) and pool.has_no_snapshots_of_ours() and shelf.journals() == []


@pytest.mark.parametrize('kind', ['vm-export', 'vdi-export'])
def test_a_disk_on_an_sr_that_makes_no_snapshots_is_refused_in_a_sentence_with_what_to_do(a_pool: Any, a_shelf: Any,
                                                                                         kind: str) -> None:
    pool = a_pool(vm('web', disks=[disk(sr='images')]), vm('db'), srs=[STORE, IMAGES])
    shelf = a_shelf()
    run = backup(pool, shelf, kind + '=*')
    assert run.exit_status == 1
    assert 'web' in run.stderr and 'SR_OPERATION_NOT_SUPPORTED' in run.stderr and "can't make snapshots" in run.stderr
    assert shelf.has('db', complete=1) and shelf.journals() == []
    assert not [key for record in pool.dump()['VDI'].values() for key in record['other_config'] if 'vmbackup' in key]


def test_a_huge_data_disk_costs_a_vdi_export_nothing(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(), disk(size=2 << 40, used=[[1000000, 1]])]))
    shelf = a_shelf()
    run = backup(pool, shelf, 'vdi-export=web')
    assert run.exit_status == 0 and plain_image(shelf, 'web') == disk_content(disk())
    assert len([call for call in pool.calls('api:VDI.snapshot')]) == 1 and pool.never_saw('api:VM.snapshot')
    assert 'virtual_size=%d\n' % (2 << 40) in shelf.text('web', shelf.newest('web'), 'DISK-xvdb', 'vdi.cfg')


# --- Formats and compression -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('word, suffix', [
    ('False', ''), ('gzip', '.gz'),
    pytest.param('zstd', '.zst', marks=pytest.mark.needs_zstd)])
def test_both_kinds_are_compressed_as_asked_and_vm_import_takes_the_archive(a_pool: Any, a_shelf: Any, word: str,
                                                                           suffix: str) -> None:
    pool, shelf = a_pool(vm('web', disks=[disk(seed=1)]), vm('db', disks=[disk(seed=2)])), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', 'vdi-export=db', 'compress=' + word)
    assert run.exit_status == 0, run
    web, db = shelf.newest('web'), shelf.newest('db')
    assert shelf.image('web', web) == 'web.xva' + suffix and shelf.image('db', db) == 'db.raw' + suffix
    assert plain_image(shelf, 'db') == disk_content(disk(seed=2))
    assert shelf.proves_itself('web', web) and shelf.proves_itself('db', db)
    assert imported_disks(pool, shelf.at('web', web, 'web.xva' + suffix)) == [disk_content(disk(seed=1))]


@pytest.mark.parametrize('compress', ['none', 'gzip'])
def test_a_vhd_image_goes_back_into_a_disk_by_vdi_import(a_pool: Any, a_shelf: Any, compress: str) -> None:
    pool, shelf = a_pool(vm('web', disks=[disk(size=6 * MEBIBYTE, used=[[1, 2], [5, 1]], seed=9)])), a_shelf()
    run = backup(pool, shelf, 'vdi-export=web', 'vdi_export_format=vhd', 'compress=' + compress)
    assert run.exit_status == 0, run
    path = os.path.join(shelf.home, 'disk.vhd')
    with open(path, 'wb') as file:
        file.write(plain_image(shelf, 'web'))
    session = pool.session()
    sr = session.xenapi.SR.get_all()[0]
    record = session.xenapi.VDI.get_all_records()
    old = list(record.values())[0]
    new = session.xenapi.VDI.create({'name_label': 'new', 'SR': sr, 'virtual_size': old['virtual_size'], 'type': 'user',
                                     'sharable': False, 'read_only': False, 'other_config': {}})
    uuid = session.xenapi.VDI.get_uuid(new)
    assert pool.xe('vdi-import', 'uuid=' + uuid, 'filename=' + path, 'format=vhd').exit_status == 0
    assert pool.read(uuid) == disk_content(disk(size=6 * MEBIBYTE, used=[[1, 2], [5, 1]], seed=9))


def test_zstd_is_refused_in_a_sentence_where_the_server_could_not_import_it(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), xapi_version='1.110.1'), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', 'compress=zstd')
    assert run.exit_status == 2, run
    assert 'zstd' in run.stderr and 'gzip' in run.stderr and 'compress' in run.stderr
    assert pool.never_saw('api:VM.snapshot') and shelf.names() == []


@pytest.mark.parametrize('xapi_version', ['1.110.1', '22.31.0'])
def test_an_older_server_is_backed_up_with_its_own_block_digests(a_pool: Any, a_shelf: Any, xapi_version: str) -> None:
    pool, shelf = a_pool(vm('web'), vm('db'), xapi_version=xapi_version), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', 'vdi-export=db', 'compress=gzip', 'pool_db_backup=1')
    assert run.exit_status == 0, run
    assert run.says('proven block by block')
    assert imported_disks(pool, shelf.at('web', shelf.newest('web'), 'web.xva.gz')) == [disk_content(disk())]


@pytest.mark.parametrize('compress', ['none', 'gzip'])
def test_a_flipped_bit_on_the_way_is_not_called_a_backup(a_pool: Any, a_shelf: Any, compress: str) -> None:
    pool = a_pool(vm('web'), faults=[at('http:/export', flips=MEBIBYTE // 2 + 100000)])
    shelf = a_shelf()
    run = backup(pool, shelf, 'vm-export=web', 'compress=' + compress)
    assert run.exit_status == 1 and shelf.names() == [] and 'web' in run.stderr
    assert pool.has_no_snapshots_of_ours()


# --- What else lies in a copy ----------------------------------------------------------------------------------------

ODD = 'a=b "quoted" \'single\' back\\slash new\nline tab\tcr\rend ümläut 日本 #5'
ESCAPED = 'a=b "quoted" \'single\' back\\\\slash new\\nline tab\tcr\\rend ümläut 日本 #5'


def test_the_metadata_files_hold_odd_values_exactly(a_pool: Any, a_shelf: Any) -> None:
    mac = 'aa:bb:cc:00:11:22'
    pool = a_pool(
        vm('web', name_description=ODD.replace('\r', ''), memory=4 << 30, vcpus=3, os_version='Büro Linux "9.1" = x',
           power_state='Running', vifs=[{'device': '0', 'MAC': mac, 'MTU': 9000, 'network': 'net = "a"'}],
           disks=[disk(name_label='root = \\ "x"', name_description='two\nlines', bootable=True, type='system')]),
        networks=[{'name_label': 'net = "a"', 'bridge': 'xenbr0'}])
    shelf = a_shelf()
    dump = pool.dump()
    drive = list(dump['VBD'].values())[0]
    vdi = dump['VDI'][drive['VDI']]
    vif = list(dump['VIF'].values())[0]

    assert backup(pool, shelf, 'vm-export=web').exit_status == 0

    copy = shelf.newest('web')
    assert shelf.text('web', copy, 'vm.cfg') == (
        'name_label=web\nname_description=%s\nmemory_dynamic_max=4294967296\nVCPUs_max=3\nVCPUs_at_startup=3\n'
        'os_version=Büro Linux "9.1" = x\norig_uuid=%s\n' % (ESCAPED.replace('\\r', ''), uuid_of('web')))
    assert shelf.text('web', copy, 'DISK-xvda', 'vbd.cfg') == (
        'userdevice=0\nbootable=True\nmode=RW\ntype=Disk\nunpluggable=%s\nempty=False\norig_uuid=%s\n'
        % (drive['unpluggable'], drive['uuid']))
    assert shelf.text('web', copy, 'DISK-xvda', 'vdi.cfg') == (
        'name_label=root = \\\\ "x"\nname_description=two\\nlines\nvirtual_size=4194304\ntype=system\nsharable=False\n'
        'read_only=False\norig_uuid=%s\norig_sr_uuid=%s\n' % (vdi['uuid'], dump['SR'][vdi['SR']]['uuid']))
    assert shelf.text('web', copy, 'VIFs', 'vif-0.cfg') == (
        'device=0\nnetwork_name_label=net = "a"\nMTU=9000\nMAC=%s\nother_config={}\norig_uuid=%s\n' % (mac, vif['uuid']))


def test_os_version_is_empty_where_no_guest_tools_ever_reported(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db', power_state='Running')), a_shelf()
    assert backup(pool, shelf, 'vm-export=web', 'vdi-export=db').exit_status == 0
    for name in ('web', 'db'):
        assert 'os_version=\n' in shelf.text(name, shelf.newest(name), 'vm.cfg')


def test_the_metadata_is_of_the_vm_itself_without_its_snapshots_or_our_marks(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', snapshots=2), vm('db', snapshots=1)), a_shelf()
    assert backup(pool, shelf, 'vm-export=web', 'vdi-export=db').exit_status == 0
    for name in ('web', 'db'):
        text = shelf.text(name, shelf.newest(name), 'vm-metadata.xml')
        assert uuid_of(name) in text and 'vmbackup' not in text and 'snapshot 0' not in text


def test_the_archive_imports_as_a_vm_under_a_name_without_the_token(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    copy = shelf.newest('web')
    ova = read_tar(shelf.read('web', copy, 'web.xva'))[0][0].content.decode('utf-8')
    assert 'vmbackup-' not in ova and 'vmbackup:' not in ova
    done = pool.xe('vm-import', 'filename=' + shelf.at('web', copy, 'web.xva'))
    new = [record for record in pool.dump()['VM'].values() if record['uuid'] == done.stdout.strip()][0]
    assert not new['is_a_template'] and not new['is_a_snapshot'] and new['name_label'].startswith('web (backup 20')


def test_sha256sum_proves_a_copy_years_later(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('we\nb')), a_shelf()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    folder = shelf.names()[0]
    where = shelf.at(folder, shelf.newest(folder))
    subprocess.run(['sha256sum', '-c', '--strict', '--quiet', 'SHA256SUMS'], cwd=where, check=True)
    image = shelf.image(folder, shelf.newest(folder))
    with open(os.path.join(where, image), 'r+b') as file:
        file.seek(1000)
        file.write(b'x')
    assert subprocess.run(['sha256sum', '-c', '--quiet', 'SHA256SUMS'], cwd=where, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE).returncode == 1


def test_the_manifest_tells_what_when_from_where_and_how(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    assert backup(pool, shelf, 'vm-export=web:3').exit_status == 0
    manifest: Dict[str, Any] = shelf.manifest('web', shelf.newest('web'))
    assert manifest['kind'] == 'vm-export' and manifest['copies_to_keep'] == 3 and manifest['sequence'] == 1
    assert manifest['vm']['uuid'] == uuid_of('web') and manifest['vm']['name'] == 'web' and manifest['host'] == 'xcp1'
    assert manifest['image']['size'] == len(shelf.read('web', shelf.newest('web'), 'web.xva'))
    assert json.dumps(manifest) and manifest['taken_at'].endswith('Z')


def test_only_root_can_read_what_is_stored(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    assert backup(pool, shelf, 'vm-export=web', 'pool_db_backup=yes').exit_status == 0
    assert [path for path, value in shelf.tree().items() if value[0] & 0o077] == []


def test_the_dump_of_the_pool_database_is_whole_and_rotates(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), hosts=TWO_HOSTS), a_shelf()
    for _ in range(3):
        assert backup(pool, shelf, 'pool_db_backup=1', 'max_backups=2', host=2).exit_status == 0
    assert shelf.names() == ['METADATA_xcp2'] and len(shelf.dumps('xcp2')) == 2
    assert shelf.names('METADATA_xcp2') == shelf.dumps('xcp2')


def test_a_pool_dump_that_is_cut_off_costs_no_earlier_one(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    assert backup(pool, shelf, 'pool_db_backup=1', 'max_backups=1').exit_status == 0
    first = shelf.names('METADATA_xcp1')
    pool.stop()
    pool.set_faults([at('http:/pool/xmldbdump', breaks_off_after=5000, silent=True)])
    pool.start()
    run = backup(pool, shelf, 'pool_db_backup=1', 'max_backups=1', 'vm-export=web')
    assert run.exit_status == 1 and 'pool database' in run.stderr
    assert shelf.names('METADATA_xcp1') == first and shelf.has('web', complete=1)
