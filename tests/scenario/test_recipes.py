"""Every recipe of README's recovery pages, taken from README itself and followed in a pool; then what must not be done."""

import ast
import os
import re
import shutil
from typing import Any, Callable, Dict, List, Sequence, Set

import pytest

from support.deeds import backup
from support.language import MEBIBYTE, disk, uuid_of, vm
from support.process import CRON_PATH, PROGRAM, ROOT, Run, run
from support.recipes import Person, recipes
from support.recovery import destroy, disks_of, has_machine, holds, interfaces_of, machine
from support.shelf import disk_content
from support.wire import eventually

ROOT_DISK = disk(size=10 * MEBIBYTE, used=[[0, 3], [8, 1]], seed=11, bootable=True, name_label='root')
DATA_DISK = disk(size=6 * MEBIBYTE, used=[[0, 2]], seed=12, name_label='data')
MAC = 'aa:bb:cc:00:11:22'
POOL = {'hosts': [{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'}],
        'srs': [{'name_label': 'nfs-store', 'type': 'nfs', 'size': 1 << 40},
                {'name_label': 'SSD store', 'type': 'nfs', 'size': 1 << 40}],
        'networks': [{'name_label': 'LAN', 'bridge': 'xenbr0'}, {'name_label': 'DMZ', 'bridge': 'xenbr1'}],
        'templates': [{'name_label': 'Other install media', 'default': True}]}

FOLLOWED: Set[str] = set()


def recipe(*titles: str) -> Any:
    """The test follows these recipes. One that README does not have fails here, one that no test follows below."""
    FOLLOWED.update(titles)
    return lambda test: test


def test_every_recipe_of_readme_is_followed_by_a_test() -> None:
    assert set(recipes()) == FOLLOWED


def test_a_recipe_that_is_new_or_reworded_is_noticed() -> None:
    assert all(command.text for block in recipes().values() for command in block)
    assert len(recipes()) > 20 and any('vdi-import' in command.text for block in recipes().values() for command in block)


# --- the commands in the program's messages ---------------------------------------------------------------------------------

def messages() -> List[str]:
    """The texts of VmBackup.py that are no docstrings; of an f-string, a word in the place of each value."""
    with open(PROGRAM, encoding='utf-8') as file:
        tree = ast.parse(file.read())
    parts = {id(child) for node in ast.walk(tree) if isinstance(node, (ast.Expr, ast.JoinedStr)) for child in ast.iter_child_nodes(node)}
    texts = [''.join(text_of_node(part, '%s') for part in node.values) if isinstance(node, ast.JoinedStr) else text_of_node(node, '')
             for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) or id(node) not in parts]
    return [text for text in texts if text]


def text_of_node(node: Any, otherwise: str) -> str:
    """The text that stands there; Python 3.6 keeps it elsewhere than 3.13."""
    text = getattr(node, 'value' if type(node).__name__ == 'Constant' else 's', None) \
        if type(node).__name__ in ('Constant', 'Str') else None
    return text if isinstance(text, str) else otherwise


def test_every_command_that_a_message_tells_is_whole(a_pool: Any) -> None:
    told = [match.groups() for text in messages() for match in re.finditer(r'\bxe ([a-z]+-[a-z0-9-]+)(?![-\w%])([^`;]*)', text)]
    assert len(told) > 10
    helped = a_pool().xe('help', *sorted({name for name, _ in told})).stdout
    assert 'Unknown command' not in helped
    needs = dict(re.findall(r'command name +: (\S+)\n +reqd params +: (.*)\n', helped))
    for name, rest in told:
        left_out = [word for word in needs[name].split(', ') if word and word + '=' not in rest]
        assert not left_out, (name, left_out, rest)


# --- given --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def a_person(a_pool: Any, a_shelf: Any, tmp_path: Any) -> Callable[..., Person]:
    """A person in a pool whose VM `web` was backed up to /snapshots/BACKUPS by weekend.cfg with these lines."""
    def build(line: str = 'vm-export=web', settings: Sequence[str] = (), hosts: Sequence[Any] = POOL['hosts'],
              **facts: Any) -> Person:
        pool = a_pool(vm('web', disks=[ROOT_DISK, DATA_DISK], vifs=[{'device': '0', 'network': 'LAN', 'MAC': MAC}], vcpus=2,
                         memory=3 << 30, **facts), vm('db'), **dict(POOL, hosts=hosts))
        folder = str(tmp_path)
        for name in ('snapshots/BACKUPS', 'snapshots/NAUbackup', 'root', 'mnt/usb'):
            os.makedirs(os.path.join(folder, name))
        shelf = a_shelf(path=os.path.join(folder, 'snapshots', 'BACKUPS'))
        shutil.copy(os.path.join(ROOT, 'VmBackup.py'), os.path.join(folder, 'snapshots', 'NAUbackup'))
        lines = [line, 'pool_db_backup=1', 'require_mount=no'] + list(settings)
        done = backup(pool, shelf, *lines) if line else None
        assert done is None or done.exit_status == 0, done
        shutil.copy(shelf.config(*lines), os.path.join(folder, 'snapshots', 'NAUbackup', 'weekend.cfg'))
        person = Person(pool, folder).goes_to(os.path.join(folder, 'snapshots', 'NAUbackup'))
        person.shelf = shelf
        return person
    return build


def copies_of(person: Person) -> List[str]:
    folder = os.path.join(person.folder, 'snapshots', 'BACKUPS', 'web')
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))]


def cfg(person: Person, *path: str) -> Dict[str, str]:
    with open(os.path.join(person.place, *path), encoding='utf-8') as file:
        return dict(line.split('=', 1) for line in file.read().splitlines())


# --- Restoring ------------------------------------------------------------------------------------------------------------

@recipe('Restoring: python3 VmBackup.py - weekend.cfg list')
def test_a_vm_is_restored_as_the_first_page_says(a_person: Any) -> None:
    person = a_person()
    stamp = os.path.basename(copies_of(person)[0])[len('backup-'):]
    person.known['2016-04-14-001000'] = stamp
    listed, shown, first, second = person.follows('Restoring: python3 VmBackup.py - weekend.cfg list')
    assert listed.says('web') and shown.says('disk xvda') and first.says('To start it: xe vm-start uuid=')
    assert holds(person.pool, 'web (restored %s)' % stamp[:10], ROOT_DISK, DATA_DISK)
    assert holds(person.pool, 'web test', ROOT_DISK, DATA_DISK) and holds(person.pool, 'web', ROOT_DISK, DATA_DISK)
    assert {found['SR_name'] for found in disks_of(person.pool, 'web test').values()} == {'SSD store'}
    assert interfaces_of(person.pool, 'web test')[0][1] == 'LAN' and interfaces_of(person.pool, 'web test')[0][2] != MAC


@recipe('Restoring: python3 VmBackup.py - weekend.cfg restore vm=uuid:UUID preview')
def test_a_vm_is_chosen_by_its_uuid(a_person: Any) -> None:
    person = a_person().told(UUID=uuid_of('web'))
    shown, = person.follows('Restoring: python3 VmBackup.py - weekend.cfg restore vm=uuid:UUID preview')
    assert shown.says('becomes VM web (restored ') and not has_machine(person.pool, 'web test')


@recipe('Restoring: python3 VmBackup.py - weekend.cfg extract web disk=xvda to=/snapshots/xvda.raw')
def test_single_files_come_back_by_a_loop_device_that_is_free(a_person: Any) -> None:
    person = a_person()
    person.follows('Restoring: python3 VmBackup.py - weekend.cfg extract web disk=xvda to=/snapshots/xvda.raw')
    with open(os.path.join(person.folder, 'snapshots', 'xvda.raw'), 'rb') as file:
        assert file.read() == disk_content(ROOT_DISK)
    assert [call for call in person.called() if not call.startswith('python3')] == [
        'losetup -P --find --show /snapshots/xvda.raw', 'mount -o ro /dev/loop7p1 /mnt', 'umount /mnt', 'losetup -d /dev/loop7']


DRILL = ('Restoring: 20 3 1 * * /usr/bin/python3 /snapshots/NAUbackup/VmBackup.py - /snapshots/NAUbackup/weekend.cfg drill '
         'sample=3 >> /snapshots/NAUbackup/drill.log 2>&1')


@recipe(DRILL)
def test_the_cron_line_of_a_drill_proves_and_leaves_nothing(a_person: Any) -> None:
    person = a_person()
    before = sorted(person.pool.dump()['VDI'])
    line, = recipes()[DRILL]
    command = person.filled(line.text.split(None, 5)[5]).replace('/usr/bin/python3', 'python3')
    assert person.runs(command).exit_status == 0
    with open(os.path.join(person.folder, 'snapshots', 'NAUbackup', 'drill.log')) as file:
        assert 'restored and compared' in file.read()
    assert sorted(person.pool.dump()['VDI']) == before
    # The words beside it, and bare drill, which says what it needs.
    assert person.runs('python3 VmBackup.py - weekend.cfg drill newest-of-each').exit_status == 0
    bare = person.runs('python3 VmBackup.py - weekend.cfg drill')
    assert bare.exit_status == 2 and bare.says('newest-of-each')


# --- Restoring with xe alone ----------------------------------------------------------------------------------------------

SUMS = 'Restoring with xe alone: sha256sum -c SHA256SUMS'
LOOK = 'Restoring with xe alone: xe sr-list params=uuid,name-label,type'
FULL = 'A full backup: .xva, .xva.gz, .xva.zst: xe vm-import filename=web.xva sr-uuid=SR-UUID'


def unplug(person: Person, name: str) -> None:
    """That SR is not plugged on any host."""
    api = person.pool.session().xenapi
    for pbd in api.SR.get_PBDs(api.SR.get_by_name_label(name)[0]):
        api.PBD.unplug(pbd)


@recipe(SUMS, LOOK, FULL)
@pytest.mark.parametrize('line', ['compress=none', 'compress=gzip', pytest.param('compress=zstd', marks=pytest.mark.needs_zstd)])
def test_a_full_backup_comes_back_with_xe_alone(a_person: Any, line: str) -> None:
    person = a_person('vm-export=web', settings=[line])
    destroy(person.pool, 'web')
    unplug(person, 'SSD store')
    api = person.pool.session().xenapi
    api.network.set_name_label(api.network.get_by_name_label('LAN')[0], 'LAN of another pool')
    person.goes_to(copies_of(person)[0])
    person.follows(SUMS)
    for _ in POOL['hosts']:
        person.follows(LOOK, chooses={'SR-UUID': 'SSD store', 'PBD-UUID': 'SSD store'})
    image = next(name for name in os.listdir(person.place) if name.startswith('web.xva'))
    person.reads(**{'web.xva': image}).follows(FULL, chooses={'NETWORK-UUID': 'DMZ'})
    assert holds(person.pool, 'web', ROOT_DISK, DATA_DISK)
    assert {found['SR_name'] for found in disks_of(person.pool, 'web').values()} == {'SSD store'}
    assert machine(person.pool, 'web')['power_state'] == 'Running'
    (_, network, mac), = interfaces_of(person.pool, 'web')
    assert network == 'DMZ' and mac != MAC


def held_by(pool: Any, name: str) -> List[bytes]:
    """The contents of that VM's disks."""
    return [pool.read(vdi['uuid']) for _, vdi in sorted(disks_of(pool, name).items())]


LAYERS = 'An increment: RESTORE.txt, xvda.vhd: sh RESTORE.txt'


@recipe(LAYERS)
@pytest.mark.parametrize('line', ['compress=none', 'compress=gzip', pytest.param('compress=zstd', marks=pytest.mark.needs_zstd)])
def test_an_increment_comes_back_by_its_own_directions(a_person: Any, line: str) -> None:
    lines = [line, 'incremental=yes', 'status_log=/dev/null']
    person = a_person('vm-export=web', settings=lines)
    person.pool.command('write', '--dir', person.pool.dir, '--vm', 'web', '--device', 'xvda', '--block', '1', '--count', '2')
    person.pool.command('write', '--dir', person.pool.dir, '--vm', 'web', '--device', 'xvdb', '--block', '0', '--zero')
    assert person.runs('python3 VmBackup.py - weekend.cfg force=yes').exit_status == 0
    held = held_by(person.pool, 'web')
    destroy(person.pool, 'web')
    person.goes_to(copies_of(person)[-1])
    assert os.path.exists(os.path.join(person.place, 'RESTORE.txt'))
    person.runs('sed -i "s|/var/tmp/|%s/|" RESTORE.txt' % person.folder)
    person.follows(LAYERS)
    assert held_by(person.pool, 'web') == held and len(held) == 2


OS = 'An OS disk: .raw, .vhd: '
SEE = OS + 'cat vm.cfg DISK-xvda/vdi.cfg VIFs/vif-0.cfg'
MAKE = OS + 'xe vm-install template="Other install media" new-name-label=web sr-uuid=SR-UUID'
AS_PV = OS + 'xe vm-param-set uuid=VM-UUID HVM-boot-policy="" PV-bootloader="BOOTLOADER" PV-args="ARGUMENTS"'
UNPACK = OS + 'gzip -dc web.raw.gz > /snapshots/web.raw'
FILL = [OS + 'xe vdi-create sr-uuid=SR-UUID name-label="web root" type=user virtual-size=BYTES',
        OS + 'xe vdi-create sr-uuid=SR-UUID name-label="web root" type=user virtual-size=BYTES (2)']
HANG = OS + 'xe vbd-list vdi-uuid=DATA-VDI-UUID params=uuid,vm-name-label'


def lose_the_vm(person: Person) -> None:
    """The VM and its OS disk are gone, its data disk is still in the pool."""
    api = person.pool.session().xenapi
    ref = api.VM.get_by_name_label('web')[0]
    disks = {api.VBD.get_userdevice(vbd): api.VBD.get_VDI(vbd) for vbd in api.VM.get_VBDs(ref)}
    api.VM.destroy(ref)
    api.VDI.destroy(disks['0'])


def knows_the_copy(person: Person) -> Person:
    """What README says where to read it."""
    machine, root, vif = cfg(person, 'vm.cfg'), cfg(person, 'DISK-xvda', 'vdi.cfg'), cfg(person, 'VIFs', 'vif-0.cfg')
    return person.told(MEMORY=machine['memory_dynamic_max'], N=machine['VCPUs_max'], BYTES=root['virtual_size'], MAC=vif['MAC'],
                       DATA_VDI_UUID=cfg(person, 'DISK-xvdb', 'vdi.cfg')['orig_uuid'], KEY='nx', VALUE='true',
                       OLD_KEY='acpi', **{'NETWORK NAME': vif['network_name_label']})


@recipe(SUMS, SEE, MAKE, UNPACK, HANG, *FILL)
@pytest.mark.parametrize('kind, line', [('raw', 'compress=none'), ('raw', 'compress=gzip'), ('vhd', 'compress=none')])
def test_an_os_disk_becomes_the_vm_again_with_xe_alone(a_person: Any, kind: str, line: str) -> None:
    person = a_person('vdi-export=web', settings=['vdi_export_format=' + kind, line])
    lose_the_vm(person)
    api = person.pool.session().xenapi
    template = api.VM.get_by_name_label('Other install media')[0]
    api.VM.set_platform(template, {'acpi': '1', 'nx': 'false'})
    knows_the_copy(person.goes_to(copies_of(person)[0]))
    person.follows(SUMS)
    person.follows(LOOK, without=['pbd-plug'], chooses={'SR-UUID': 'SSD store'})
    assert person.follows(SEE)[1].says('HVM_boot_policy')
    person.follows(MAKE)
    if line == 'compress=gzip':
        person.follows(UNPACK)
        person.reads(**{'web.raw': os.path.join(person.folder, 'snapshots', 'web.raw')})
    person.follows(FILL[kind == 'vhd'])
    person.follows(HANG)
    back = machine(person.pool, 'web')
    assert holds(person.pool, 'web', ROOT_DISK, DATA_DISK)
    assert disks_of(person.pool, 'web')['0']['VBD']['bootable'] and back['power_state'] == 'Running'
    assert interfaces_of(person.pool, 'web') == [('0', 'LAN', MAC)]
    assert {back['memory_%s' % limit] for limit in 'static_min static_max dynamic_min dynamic_max'.split()} == {str(3 << 30)}
    assert (back['VCPUs_max'], back['VCPUs_at_startup'], back['platform']) == ('2', '2', {'nx': 'true'})
    assert back['HVM_boot_params'] == {'order': 'cdn', 'firmware': 'uefi'} and back['has_vendor_device'] is True


@recipe(AS_PV)
def test_a_pv_guest_boots_by_its_bootloader_again(a_person: Any) -> None:
    person = a_person('vdi-export=web')
    lose_the_vm(person)
    knows_the_copy(person.goes_to(copies_of(person)[0])).told(BOOTLOADER='pygrub', ARGUMENTS='console=hvc0 ro')
    person.follows(LOOK, without=['pbd-plug'], chooses={'SR-UUID': 'SSD store'})
    person.follows(SEE)
    person.follows(MAKE, without=['HVM-boot', 'platform', 'has-vendor-device'])
    person.follows(AS_PV)
    made = machine(person.pool, 'web')
    assert (made['HVM_boot_policy'], made['PV_bootloader'], made['PV_args']) == ('', 'pygrub', 'console=hvc0 ro')


REPLACE = 'Only the disk is lost, the VM is there: xe vm-list name-label=web params=uuid,power-state'


@recipe(REPLACE)
def test_a_new_disk_takes_the_place_of_the_old_one(a_person: Any) -> None:
    person = a_person('vdi-export=web', power_state='Running')
    old = disks_of(person.pool, 'web')
    knows_the_copy(person.goes_to(copies_of(person)[0]))
    person.follows(LOOK, without=['pbd-plug'], chooses={'SR-UUID': 'nfs-store'})
    person.follows(FILL[0], without=['vbd-create'])
    person.follows(REPLACE)
    now = disks_of(person.pool, 'web')
    assert holds(person.pool, 'web', ROOT_DISK, DATA_DISK) and machine(person.pool, 'web')['power_state'] == 'Running'
    assert now['0']['uuid'] != old['0']['uuid'] and now['1']['uuid'] == old['1']['uuid']
    assert any(record['uuid'] == old['0']['uuid'] and not record['VBDs'] for record in person.pool.dump()['VDI'].values())


# --- One host died, the pool lives -----------------------------------------------------------------------------------------

DEAD = 'One host died, the pool lives: xe host-list params=uuid,name-label,host-metrics-live'
DEAD_HOST = [POOL['hosts'][0], dict(POOL['hosts'][1], live=False)]
FORGET = 'One host died, the pool lives: xe host-forget uuid=HOST-UUID'


@recipe(DEAD, FORGET)
def test_the_vms_of_a_host_that_died_start_elsewhere(a_person: Any) -> None:
    person = a_person(line='', power_state='Running', resident_on='xcp2', hosts=DEAD_HOST)
    refused = person.pool.xe('vm-start', 'vm=web')
    assert refused.says('expected: halted') and refused.says('actual: running')
    listed = person.pool.xe('host-list', 'name-label=xcp2', '--minimal')
    forgotten = person.pool.xe('host-forget', 'uuid=' + listed.stdout.strip(), stdin=b'yes\n')
    assert forgotten.exit_status == 1 and forgotten.says('user VMs still running')
    person.follows(DEAD, chooses={'HOST-UUID': 'xcp2', 'VM-UUID': 'web'})
    assert machine(person.pool, 'web')['power_state'] == 'Running'
    person.follows(FORGET, stdin=b'yes\n')
    assert [record['name_label'] for record in person.pool.dump()['host'].values()] == ['xcp1']


def test_a_vm_of_a_host_that_lives_keeps_its_state(a_person: Any) -> None:
    person = a_person(line='', power_state='Running', resident_on='xcp2')
    refused = person.pool.xe('vm-reset-powerstate', 'vm=web', '--force')
    assert refused.exit_status == 1 and refused.says('the server is still live')
    assert machine(person.pool, 'web')['power_state'] == 'Running'


# --- The pool is gone ------------------------------------------------------------------------------------------------------

DATABASE = 'The pool is gone: ls /snapshots/BACKUPS/METADATA_*/pool_db_*.dump'
START = 'The pool is gone: xe pbd-list currently-attached=false params=uuid,sr-name-label'
DEFAULT_SR = 'The pool is gone: xe sr-list params=uuid,name-label,type'
ONE_BY_ONE = "The pool is gone: python3 VmBackup.py - vm-export='*' backup_dir=/snapshots/BACKUPS list"
SINGLE = 'The pool is gone: mkdir /root/restore'


def forget_all_vms(person: Person) -> None:
    """The database knows no VM any more; their disks are still on the storage."""
    api = person.pool.session().xenapi
    for ref, record in api.VM.get_all_records().items():
        if not record['is_control_domain'] and not record['is_a_template']:
            if record['power_state'] != 'Halted':
                api.VM.hard_shutdown(ref)
            api.VM.destroy(ref)
    for disk in api.VDI.get_all():
        api.VDI.forget(disk)


@recipe(DATABASE, START)
def test_the_pool_comes_back_with_its_database_where_the_storage_survived(a_person: Any) -> None:
    person = a_person(power_state='Running', resident_on='xcp2')
    uuid, disks = machine(person.pool, 'web')['uuid'], disks_of(person.pool, 'web')
    forget_all_vms(person)
    person.known['pool_db_....dump'] = person.shelf.dumps()[-1]
    _, tried, done = person.follows(DATABASE)
    assert tried.stdout == 'Dry-run backup restore successful\n'
    assert done.says('Host will reboot with restored database in 30.000 seconds...')
    assert eventually(lambda: has_machine(person.pool, 'web'))
    assert machine(person.pool, 'web')['power_state'] == 'Halted'
    assert [record['name_label'] for record in person.pool.dump()['host'].values()] == ['xcp1']
    person.follows(START, chooses={'VM-UUID': 'web'})
    assert machine(person.pool, 'web')['power_state'] == 'Running' and machine(person.pool, 'web')['uuid'] == uuid
    assert {key: one['uuid'] for key, one in disks_of(person.pool, 'web').items()} == {
        key: one['uuid'] for key, one in disks.items()}
    assert holds(person.pool, 'web', ROOT_DISK, DATA_DISK)


def test_a_dump_that_is_bad_is_refused_by_the_dry_run(a_person: Any) -> None:
    person = a_person()
    dump = person.shelf.at('METADATA_xcp1', person.shelf.dumps()[-1])
    with open(dump, 'r+b') as file:
        file.truncate(os.path.getsize(dump) // 2)
    result = person.pool.xe('pool-restore-database', 'file-name=' + dump, 'dry-run=true')
    assert result.exit_status == 1 and result.says('Xmlm.Error(')


@recipe(DEFAULT_SR, ONE_BY_ONE)
def test_vm_by_vm_comes_back_into_a_new_pool(a_person: Any) -> None:
    person = a_person()
    uuid = machine(person.pool, 'web')['uuid']
    destroy(person.pool, 'web')
    person.follows(DEFAULT_SR, chooses={'SR-UUID': 'SSD store'})
    api = person.pool.session().xenapi
    assert api.SR.get_name_label(api.pool.get_default_SR(api.pool.get_all()[0])) == 'SSD store'
    person.follows(ONE_BY_ONE)
    assert holds(person.pool, 'web', ROOT_DISK, DATA_DISK) and machine(person.pool, 'web')['uuid'] == uuid
    assert interfaces_of(person.pool, 'web') == [('0', 'LAN', MAC)]


@recipe(SINGLE)
def test_a_single_archive_is_enough(a_person: Any) -> None:
    person = a_person()
    destroy(person.pool, 'web')
    shutil.copy(os.path.join(copies_of(person)[0], 'web.xva'), os.path.join(person.folder, 'mnt', 'usb'))
    person.follows(SINGLE)
    assert holds(person.pool, 'web', ROOT_DISK, DATA_DISK)


# --- What README warns of: the pool is as merciless as a real one, so that a recipe without the warning fails ---------------

def a_new_disk(person: Person) -> str:
    """The uuid of an empty disk of the size of the OS disk."""
    sr = person.pool.xe('sr-list', 'name-label=SSD store', '--minimal').stdout.strip()
    made = person.pool.xe('vdi-create', 'sr-uuid=' + sr, 'name-label=new', 'type=user', 'virtual-size=%d' % ROOT_DISK['size'])
    return made.stdout.strip()


def test_a_vhd_without_its_format_gives_a_wrong_disk_without_a_word(a_person: Any) -> None:
    person = a_person('vdi-export=web', settings=['vdi_export_format=vhd'])
    image, new = os.path.join(copies_of(person)[0], 'web.vhd'), a_new_disk(person)
    assert person.pool.xe('vdi-import', 'uuid=' + new, 'filename=' + image) == Run(0, '', '')
    assert person.pool.read(new) != disk_content(ROOT_DISK)
    assert person.pool.xe('vdi-destroy', 'uuid=' + new) == Run(0, '', ''), 'begin with a new one'


def test_a_vhd_into_a_used_disk_leaves_what_lay_in_its_gaps(a_person: Any) -> None:
    person = a_person('vdi-export=web', settings=['vdi_export_format=vhd'])
    image, new = os.path.join(copies_of(person)[0], 'web.vhd'), a_new_disk(person)
    used = os.path.join(person.folder, 'used.raw')
    with open(used, 'wb') as file:
        file.write(b'x' * ROOT_DISK['size'])
    assert person.pool.xe('vdi-import', 'uuid=' + new, 'filename=' + used, 'format=raw') == Run(0, '', '')
    assert person.pool.xe('vdi-import', 'uuid=' + new, 'filename=' + image, 'format=vhd') == Run(0, '', '')
    left = person.pool.read(new)
    assert left != disk_content(ROOT_DISK) and left[:3 * MEBIBYTE] == disk_content(ROOT_DISK)[:3 * MEBIBYTE]
    assert left[5 * MEBIBYTE:5 * MEBIBYTE + 4] == b'xxxx'


def test_an_import_into_an_sr_that_is_not_plugged_hangs_without_a_word(a_person: Any) -> None:
    person = a_person()
    unplug(person, 'SSD store')
    sr = person.pool.xe('sr-list', 'name-label=SSD store', '--minimal').stdout.strip()
    command = ['timeout', '5', os.path.join(person.pool.dir, 'bin', 'xe'), 'vm-import', 'sr-uuid=' + sr,
               'filename=' + os.path.join(copies_of(person)[0], 'web.xva')]
    assert run(command, {'PATH': CRON_PATH}) == Run(124, '', '')


def test_two_vms_get_one_mac_address_without_a_word(a_person: Any) -> None:
    person = a_person(line='')
    vm_uuid = person.pool.xe('vm-list', 'name-label=db', '--minimal').stdout.strip()
    network = person.pool.xe('network-list', 'name-label=LAN', '--minimal').stdout.strip()
    made = person.pool.xe('vif-create', 'vm-uuid=' + vm_uuid, 'network-uuid=' + network, 'device=0', 'mac=' + MAC)
    assert made.exit_status == 0 and made.stderr == ''
    assert [mac for _, _, mac in interfaces_of(person.pool, 'db') + interfaces_of(person.pool, 'web')] == [MAC, MAC]


def test_an_import_by_hand_with_preserve_keeps_the_macs_and_not_the_uuid(a_person: Any) -> None:
    person = a_person()
    image = os.path.join(copies_of(person)[0], 'web.xva')
    assert person.pool.xe('vm-import', 'filename=' + image, 'preserve=true').exit_status == 1, 'while the original exists'
    uuid = destroy(person.pool, 'web')['uuid']
    made = person.pool.xe('vm-import', 'filename=' + image, 'preserve=true')
    assert made.exit_status == 0 and made.stdout.strip() != uuid
    name = next(record['name_label'] for record in person.pool.dump()['VM'].values() if record['uuid'] == made.stdout.strip())
    assert [mac for _, _, mac in interfaces_of(person.pool, name)] == [MAC]


def test_an_import_finds_a_network_by_name_then_by_bridge_then_makes_one(a_person: Any) -> None:
    person = a_person(line='')
    api = person.pool.session().xenapi
    network = api.network.create({'name_label': 'private', 'name_description': '', 'other_config': {}})
    vif = api.VIF.get_uuid(api.VM.get_VIFs(api.VM.get_by_name_label('web')[0])[0])
    assert person.pool.xe('vif-move', 'uuid=' + vif, 'network-uuid=' + api.network.get_uuid(network)) == Run(0, '', '')
    image = os.path.join(person.folder, 'web.xva')
    assert person.pool.xe('vm-export', 'vm=web', 'filename=' + image).exit_status == 0
    destroy(person.pool, 'web')
    found = []
    for change in (lambda: None, lambda: api.network.set_name_label(network, 'other'), lambda: api.network.destroy(network)):
        change()
        ref = api.VM.get_by_uuid(person.pool.xe('vm-import', 'filename=' + image).stdout.strip())
        found.append(api.network.get_name_label(api.VIF.get_network(api.VM.get_VIFs(ref)[0])))
        api.VM.destroy(ref)
    assert found == ['private', 'other', 'private']
