"""One bad record of the pool, whatever is wrong with it, costs at most what it is about: nothing else, and no traceback."""

import copy
from typing import Any, Dict, Iterator, Tuple

import pytest

import VmBackup
from support import values

NULL = 'OpaqueRef:NULL'
REFERENCE = ' (VmBackup reference 2016-04-14 00:10:00, store 1f3a9c04)'
VM = dict(is_a_template=False, is_a_snapshot=False, is_control_domain=False, name_description='', power_state='Running',
          tags=['t'], memory_dynamic_max='1024', VCPUs_max='1', VCPUs_at_startup='1', guest_metrics=NULL)
TABLES = {
    'pool': {'p': dict(uuid='pool-uuid', name_label='pool', master='h1')},
    'host': {'h1': dict(uuid='h1-uuid', hostname='xcp1.example', address='10.0.0.1', API_version_major='2',
                        API_version_minor='21', software_version={'product_version': '8.3.0'}),
             'h2': dict(uuid='h2-uuid', hostname='xcp2', address='10.0.0.2', API_version_major='2',
                        API_version_minor='21', software_version={'product_version': '8.3.0'})},
    'VM': {'v1': dict(VM, uuid='v1-uuid', name_label='broken', VBDs=['b1'], VIFs=['i1']),
           'v2': dict(VM, uuid='v2-uuid', name_label='web', VBDs=['b2'], VIFs=['i2']),
           'k1': dict(VM, uuid='k1-uuid', name_label='broken' + REFERENCE, is_a_snapshot=True, VBDs=['b1'], VIFs=[]),
           'k2': dict(VM, uuid='k2-uuid', name_label='web' + REFERENCE, is_a_snapshot=True, VBDs=['b2'], VIFs=[])},
    'VBD': {'b%d' % n: dict(uuid='b%d-uuid' % n, VM='v%d' % n, VDI='d%d' % n, type='Disk', userdevice='0', device='xvda', bootable=True,
                            mode='RW', unpluggable=False) for n in (1, 2)},
    'VDI': {'d%d' % n: dict(uuid='d%d-uuid' % n, SR='s%d' % n, name_label='root', name_description='', virtual_size='1048576',
                            type='user', sharable=False, read_only=False, snapshot_of=NULL) for n in (1, 2)},
    'SR': {'s%d' % n: dict(uuid='s%d-uuid' % n, name_label='nfs', content_type='user', physical_size='9', physical_utilisation='1')
           for n in (1, 2)},
    'VIF': {'i%d' % n: dict(uuid='i%d-uuid' % n, device='0', network='n%d' % n, MTU='1500', MAC='00:00:00:00:00:01',
                            other_config={}) for n in (1, 2)},
    'network': {'n%d' % n: dict(uuid='n%d-uuid' % n, name_label='lan') for n in (1, 2)},
}  # type: Dict[str, Dict[str, Dict[str, Any]]]
VALUES = (None, 5, True, '', 'x', NULL, [], ['x', None], {}, {'x': None}, {'x': ['y']})


class FakePool(VmBackup.Pool):
    """Answers from tables."""

    def __init__(self, tables: Dict[str, Any]) -> None:
        super().__init__(values.services(), None)
        self._tables = tables

    def _session_host(self, doing: str) -> str:
        return 'h1'

    def ask(self, doing: str, method: str, *arguments: Any, **options: Any) -> Any:
        class_name, _, verb = method.partition('.')
        table = self._tables.get(class_name, {})
        if verb == 'get_all_records':
            return table
        if verb == 'get_all_records_where':
            wanted = arguments[0].split('"')[3]
            return {ref: record for ref, record in table.items() if isinstance(record, dict) and record.get('VM') == wanted}
        if arguments[0] not in table:
            raise VmBackup.ApiFailure('HANDLE_INVALID', (class_name, str(arguments[0])), doing)
        return table[arguments[0]] if verb == 'get_record' else table[arguments[0]].get(verb[len('get_'):])


def damages() -> Iterator[Tuple[str, str, Any]]:
    """(class, ref, change) of everything that can be wrong with one record."""
    for class_name, table in TABLES.items():
        for ref in [ref for ref in table if not ref.endswith('2')]:
            yield class_name, ref, lambda tables, c=class_name, r=ref: tables[c].pop(r)
            for field in table[ref]:
                yield class_name, ref, lambda tables, c=class_name, r=ref, f=field: tables[c][r].pop(f)
                for value in VALUES:
                    yield class_name, ref, lambda tables, c=class_name, r=ref, f=field, v=value: tables[c][r].update({f: v})


def test_no_single_bad_record_ends_the_reading_of_the_pool_or_touches_another_vm() -> None:
    count = 0
    sound = FakePool(copy.deepcopy(TABLES)).inventory()
    for class_name, ref, damage in damages():
        tables = copy.deepcopy(TABLES)
        damage(tables)
        pool = FakePool(tables)
        try:
            inventory = pool.inventory()
        except VmBackup.PoolError as error:
            assert class_name == 'pool', error
            continue
        assert sound.machines[1] in inventory.machines and sound.references[1] in inventory.references, (class_name, ref)
        assert all(isinstance(uuid, str) and uuid for one in inventory.references for uuid in one.disks), (class_name, ref)
        configuration = VmBackup.parse_configuration([], [VmBackup.Setting('vm-export', '*', 'command line')], '')
        plan = VmBackup.make_plan(configuration, inventory)
        assert 'web' in [job.machine.name for job in plan.jobs]
        for machine in inventory.machines:
            interfaces = pool.interfaces(machine)
            VmBackup.metadata_files(machine, machine.disks, interfaces, pool.os_version(machine))
            pool.storage_repositories(disk.sr_ref for disk in machine.disks if disk.sr_uuid)
            assert machine.name != 'web' or interfaces == FakePool(TABLES).interfaces(sound.machines[1])
        with_ref = [ref for ref in tables['VM']]
        for vm in with_ref:
            pool.machine(vm, 'reading')
        count += 1
    assert count > 500


@pytest.mark.parametrize('class_name, ref, field, value, words', [
    ('VDI', 'd1', 'SR', NULL, 'SR that is not in the pool'), ('VDI', 'd1', 'SR', 's9', 'SR that is not in the pool'),
    ('VBD', 'b1', 'VDI', 'd9', 'disk that is not in the pool'), ('VIF', 'i1', 'network', 'n9', 'network that is not in the pool'),
    ('VDI', 'd1', 'virtual_size', None, 'virtual_size'), ('VM', 'v1', 'tags', None, 'tags')])
def test_what_is_wrong_is_a_problem_of_the_vm_that_it_is_about(class_name: str, ref: str, field: str, value: Any,
                                                               words: str) -> None:
    tables = copy.deepcopy(TABLES)
    tables[class_name][ref][field] = value
    inventory = FakePool(tables).inventory()
    assert [machine.name for machine in inventory.machines if machine.problems] == ['broken']
    assert words in inventory.machines[0].problems[0]


def test_a_vm_that_does_not_say_whether_it_is_a_template_is_left_out_and_told() -> None:
    tables = copy.deepcopy(TABLES)
    del tables['VM']['v1']['is_a_template']
    inventory = FakePool(tables).inventory()
    assert [machine.name for machine in inventory.machines] == ['web']
    assert 'broken' in inventory.problems[0]


def test_disks_of_one_device_have_folders_of_their_own() -> None:
    disk = VmBackup.Disk('b', '0', 'xvda', True, 'RW', 'Disk', False, 'd', 'd', 'root', '', 1, 'user', False, False, 's', 's', NULL)
    disks = [disk, disk._replace(userdevice='1', device='XVDA'), disk._replace(vbd_uuid='c'), disk._replace(vbd_uuid='c')]
    folders = VmBackup.disk_folders(disks)
    assert folders[0] == 'DISK-xvda' and folders[1] == 'DISK-XVDA-1'
    assert len({VmBackup.folded(folder) for folder in folders}) == 4
