"""What the way back says of itself: commands that work as printed, a uuid only where it is the VM's, room before bytes."""

import os
import re
import shlex
import shutil
import subprocess
from typing import Any, Iterator, List

import pytest

from support.deeds import backup
from support.language import MEBIBYTE, disk, uuid_of, vm
from support.process import Pool, Run
from support.recovery import destroy, disks_of, extract, has_machine, holds, interfaces_of, machine, restore

ROOT = disk(size=10 * MEBIBYTE, used=[[0, 3], [8, 1]], seed=11, name_label='root')
MAC = 'aa:bb:cc:00:11:22'


def web(**facts: Any) -> Any:
    return vm('web', **dict({'disks': [ROOT], 'vifs': [{'device': '0', 'MAC': MAC}]}, **facts))


def backed_up(pool: Pool, shelf: Any, *lines: str) -> None:
    run = backup(pool, shelf, *(lines or ('vm-export=web',)))
    assert run.exit_status in (0, 3), run


def a_lone_archive(pool: Pool, shelf: Any, folder: Any) -> str:
    """The image of the newest copy, on its own."""
    backed_up(pool, shelf)
    return shutil.copy(shelf.at('web', shelf.newest('web'), 'web.xva'), str(folder))


def commands_in(run: Run, word: str) -> List[List[str]]:
    """The xe commands between backquotes, or behind a colon at the end of a line, that begin with that word."""
    found = re.findall(r'(?:`|: )xe (%s [^`\n]*)' % word, run.output)
    assert found, run
    return [shlex.split(command) for command in found]


# --- Whose uuid ------------------------------------------------------------------------------------------------------------

def test_a_lone_archive_keeps_the_vms_own_uuid_and_its_line_of_backups(a_pool: Any, a_shelf: Any, tmp_path: Any) -> None:
    pool, shelf = a_pool(web()), a_shelf()
    path = a_lone_archive(pool, shelf, tmp_path)
    gone = destroy(pool, 'web')
    run = restore(pool, shelf, 'from=' + path, 'preserve=yes')
    assert run.exit_status == 0 and run.says('uuid %s kept' % gone['uuid']), run
    assert machine(pool, 'web')['uuid'] == gone['uuid'] and interfaces_of(pool, 'web')[0][2] == MAC
    backed_up(pool, shelf)
    assert len(shelf.copies('web')) == 2 and sorted(shelf.names()) == ['web']


def test_an_archive_that_does_not_tell_the_vms_uuid_claims_none(a_pool: Any, a_shelf: Any, tmp_path: Any) -> None:
    pool, shelf = a_pool(web()), a_shelf()
    path = a_lone_archive(pool, shelf, tmp_path)
    gone = destroy(pool, 'web')
    with open(path, 'rb') as file:
        content = file.read()
    assert content.count(b"('uuid' '%s')" % gone['uuid'].encode('ascii')) == 1
    with open(path, 'wb') as file:
        file.write(content.replace(b"('uuid' '", b"('uuix' '"))     # a server that keeps no such text leaves it empty
    run = restore(pool, shelf, 'from=' + path, 'preserve=yes')
    assert run.exit_status == 0 and run.says('with a new uuid') and run.says('which uuid the VM had is not on record'), run
    assert run.never_says(' kept\n') and interfaces_of(pool, 'web')[0][2] == MAC and holds(pool, 'web', ROOT)


def test_an_archive_beside_another_vms_metadata_does_not_take_its_uuid(a_pool: Any, a_shelf: Any, tmp_path: Any) -> None:
    pool, shelf = a_pool(web(), vm('db')), a_shelf()
    path = a_lone_archive(pool, shelf, tmp_path)
    backed_up(pool, shelf, 'vm-export=db')
    shutil.copy(shelf.at('db', shelf.newest('db'), 'vm-metadata.xml'), str(tmp_path))
    destroy(pool, 'web')
    destroy(pool, 'db')
    run = restore(pool, shelf, 'from=' + path, 'preserve=yes')
    assert run.exit_status == 0 and machine(pool, 'web')['uuid'] == uuid_of('web'), run


def test_only_what_the_older_program_wrote_is_called_its_own(a_pool: Any, a_shelf: Any, tmp_path: Any) -> None:
    pool, shelf = a_pool(web()), a_shelf()
    path = a_lone_archive(pool, shelf, tmp_path)
    run = restore(pool, shelf, 'from=' + path, 'preview')
    assert run.says('a vm-export copy (no digests of it are on record)') and run.never_says('older program'), run
    out = extract(shelf, 'from=' + path, 'to=%s' % (tmp_path / 'disk.raw'))
    assert out.exit_status == 0 and out.says('no digests of it are on record') and out.never_says('older program'), out
    old = tmp_path / 'web' / 'backup-2016-04-14-(00:10:00)'
    old.mkdir(parents=True)
    shutil.copy(path, str(old))
    (old / 'success').write_bytes(b'')
    assert restore(pool, shelf, 'from=%s' % old, 'preview').says('the older program recorded no digests')


# --- Commands that work as printed ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('where', ['everywhere', 'on the master'])
def test_an_sr_that_is_not_plugged_is_told_with_the_command_that_plugs_it(a_pool: Any, a_shelf: Any, where: str) -> None:
    pool, shelf = a_pool(web(), srs=[{'name_label': 'store', 'type': 'nfs', 'size': 1 << 40}],
                         hosts=[{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'}]), a_shelf()
    backed_up(pool, shelf)
    destroy(pool, 'web')
    api = pool.session().xenapi
    for pbd, record in api.PBD.get_all_records().items():
        if where == 'everywhere' or api.host.get_name_label(record['host']) == 'xcp1':
            api.PBD.unplug(pbd)
    run = restore(pool, shelf, 'web')
    assert run.exit_status == 1 and run.says('store') and run.says('which is not plugged: plug it with'), run
    named = restore(pool, shelf, 'web', 'sr=store')
    assert named.exit_status == 2 and named.says('Nothing was started'), named
    assert commands_in(named, 'pbd-plug') == commands_in(run, 'pbd-plug') and not pool.calls('xe:vm-import')
    for words in commands_in(run, 'pbd-plug'):
        assert pool.xe(*words) == Run(0, '', '')
    assert restore(pool, shelf, 'web').exit_status == 0 and holds(pool, 'web', ROOT)


def test_an_sr_that_only_a_dead_host_has_plugged_is_not_imported_into(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(web(), hosts=[{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2', 'live': False}], srs=[
        {'name_label': 'store', 'type': 'nfs', 'size': 1 << 40},
        {'name_label': 'local xcp2', 'type': 'ext', 'host': 'xcp2', 'size': 1 << 40}]), a_shelf()
    backed_up(pool, shelf)
    api = pool.session().xenapi
    sr = api.SR.get_by_name_label('local xcp2')[0]
    run = restore(pool, shelf, 'web', 'to=back', 'sr=local xcp2')
    assert run.exit_status == 2 and run.says('bring a host back that has it') and not has_machine(pool, 'back'), run
    assert api.SR.get_PBDs(sr) and not pool.calls('xe:vm-import')


def test_a_vm_that_would_start_by_itself_is_told_with_the_command_that_stops_it(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(web(other_config={'auto_poweron': 'true'})), a_shelf()
    backed_up(pool, shelf)
    run = restore(pool, shelf, 'web', 'to=back')
    assert run.exit_status == 0, run
    words = commands_in(run, 'vm-param-remove')[-1]
    assert words[1] == 'uuid=' + machine(pool, 'back')['uuid'] and pool.xe(*words) == Run(0, '', '')
    assert 'auto_poweron' not in machine(pool, 'back')['other_config']


def test_a_disk_that_resets_on_boot_is_told_with_commands_that_find_and_change_it(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(web(), vm('db')), a_shelf()
    api = pool.session().xenapi
    api.VDI.set_on_boot(api.VDI.get_by_uuid(disks_of(pool, 'web')['0']['uuid']), 'reset')
    refused = backup(pool, shelf, 'vm-export=web')
    assert refused.exit_status == 1, refused
    found = pool.xe(*commands_in(refused, 'vdi-list')[0], '--minimal').stdout.strip()
    assert found == disks_of(pool, 'web')['0']['uuid']
    for words in commands_in(refused, 'vdi-param-set'):
        assert pool.xe(*[word.replace('VDI-UUID', found) for word in words]) == Run(0, '', '')
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0


def test_a_fixed_address_is_told_with_the_interface_that_it_belongs_to(a_pool: Any, a_shelf: Any) -> None:
    settings = {'ipv4_configuration_mode': 'Static', 'ipv4_addresses': ['10.0.0.5/24'], 'ipv4_gateway': '10.0.0.1'}
    pool, shelf = a_pool(web(vifs=[{'device': '0', 'MAC': MAC, 'settings': settings}])), a_shelf()
    backed_up(pool, shelf)
    run = restore(pool, shelf, 'web', 'to=back')
    vif = next(record for ref, record in pool.dump()['VIF'].items() if ref in machine(pool, 'back')['VIFs'])
    words = commands_in(run, 'vif-configure-ipv4')[-1]
    assert words[1:] == ['uuid=' + vif['uuid'], 'mode=static', 'address=10.0.0.5/24', 'gateway=10.0.0.1'], run
    # As xapi has it (xapi_vif.ml assert_has_feature_static_ip_setting): not before the guest's tools run.
    assert pool.xe(*words).says('lacks the feature')


def test_a_copy_of_the_os_disk_says_how_the_whole_vm_is_chosen(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(web(disks=2)), a_shelf()
    backed_up(pool, shelf)
    whole = shelf.newest('web')
    backed_up(pool, shelf, 'vdi-export=web')
    run = restore(pool, shelf, 'web', 'to=os')
    word = re.search(r'from=([0-9-]+)', run.stderr)
    assert run.exit_status == 0 and word and 'backup-' + word.group(1) == whole, run
    assert run.says('holds only the OS disk') and run.says('`list` shows all') and len(disks_of(pool, 'os')) == 1
    assert restore(pool, shelf, 'web', 'to=all', word.group()).exit_status == 0 and len(disks_of(pool, 'all')) == 2


def test_a_copy_without_vm_metadata_is_not_said_to_have_it(a_pool: Any, a_shelf: Any, tmp_path: Any) -> None:
    pool, shelf = a_pool(web()), a_shelf()
    backed_up(pool, shelf, 'vdi-export=web')
    place = str(tmp_path / 'rescued')
    shutil.copytree(shelf.at('web', shelf.newest('web')), place)
    for name in ('vm-metadata.xml', 'backup.json'):
        os.unlink(os.path.join(place, name))
    path = os.path.join(place, 'DISK-xvda', 'vbd.cfg')
    with open(path) as file:
        text = file.read()
    with open(path, 'w') as file:
        file.write(text.replace('userdevice=0', 'userdevice=3'))
    run = restore(pool, shelf, 'from=%s/web.raw' % place, 'to=back')
    assert run.exit_status == 1 and run.says('its metadata name no disk 0') and run.never_says('vm-metadata.xml names'), run


# --- Room before bytes -----------------------------------------------------------------------------------------------------

@pytest.fixture
def small_place(tmp_path: Any) -> Iterator[str]:
    """A directory with room for 6 MiB."""
    path = str(tmp_path / 'small')
    os.mkdir(path)
    if os.geteuid() or subprocess.call(['mount', '-t', 'tmpfs', '-o', 'size=6m', 'small', path]):
        pytest.skip('only root can mount')             # no other place is sure to be too small, whatever the machine
    yield path
    subprocess.check_call(['umount', '-l', path])


@pytest.mark.parametrize('line', ['compress=none', 'compress=gzip'])
def test_an_extract_that_can_not_fit_writes_nothing(a_pool: Any, a_shelf: Any, small_place: str, line: str) -> None:
    pool, shelf = a_pool(web(disks=[disk(size=16 * MEBIBYTE, used=12, seed=3)])), a_shelf()
    backed_up(pool, shelf, 'vm-export=web', line)
    run = extract(shelf, 'web', 'to=%s/disk.raw' % small_place)
    assert run.exit_status == 1 and run.says('take at least 11 MiB') and run.says('No file was left'), run
    assert os.listdir(small_place) == [] and run.never_says('no space left')


def test_an_extract_that_fits_without_its_zeros_is_written_with_a_warning(a_pool: Any, a_shelf: Any, small_place: str) -> None:
    pool, shelf = a_pool(web()), a_shelf()
    backed_up(pool, shelf)
    run = extract(shelf, 'web', 'to=%s/disk.raw' % small_place)
    assert run.exit_status == 0 and run.says("less than the disk's full size of 10 MiB"), run
    assert os.path.getsize(small_place + '/disk.raw') == ROOT['size']
