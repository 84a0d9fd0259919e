"""ova.xml and the pool: which records an export takes along, and which objects an import makes of them.

Source of the facts: xapi v24.19.2, ocaml/xapi/export.ml (update_table, make_*) and import.ml
(handle_all), and the recorded archives.
"""

import itertools
from typing import Any, Callable, Dict, List, Optional, Tuple

import formats
from database import new_uuid
from machines import mac_of
from schema import CLASSES, EPOCH, NULL, Failure

# The real counter lives as long as the process, so ids need not begin at 0 (export.ml make_id).
_next_id = itertools.count()

# Class by class, in the order in which make_all lists them.
EXPORTED_CLASSES = ('host', 'VM', 'VM_guest_metrics', 'VBD', 'VIF', 'network', 'VDI', 'SR')

# What an exported host leaves behind (export.ml make_host).
HOST_WITHOUT = {
    'PIFs': [], 'PBDs': [], 'PGPUs': [], 'PCIs': [], 'host_CPUs': [], 'license_params': {}, 'blobs': {},
    'external_auth_type': '', 'external_auth_service_name': '', 'external_auth_configuration': {}, 'metrics': NULL,
    'patches': [], 'crashdumps': [], 'logging': {}, 'supported_bootloaders': [], 'cpu_configuration': {},
    'other_config': {}, 'capabilities': [], 'software_version': {}, 'sched_policy': '', 'ha_statefiles': [],
    'ha_network_peers': [], 'tags': []}    # type: Dict[str, Any]


# --- Export -------------------------------------------------------------------------------------

class Export:
    """One ova.xml in the making: the objects found, and the id that each has in the file.

    Built with the pool's lock held.
    """

    def __init__(self, pool: Any, vms: List[str], with_snapshots: bool, keep_power_state: bool) -> None:
        self.pool = pool
        self.with_snapshots = with_snapshots
        self.keep_power_state = keep_power_state
        self.ids = {}       # type: Dict[str, str]
        for vm in vms:
            self._take_vm(vm, with_snapshots)

    def _take(self, ref: str) -> None:
        # The null reference gets an id, too, and then every null reference in the file is
        # written as that id (recorded: affinity "Ref:69").
        if ref not in self.ids:
            self.ids[ref] = 'Ref:%d' % next(_next_id)

    def _take_vdi(self, ref: str) -> None:
        self._take(ref)
        self._take(self.pool.record('VDI', ref)['SR'])

    def _take_vm(self, ref: str, with_snapshots: bool) -> None:
        tables = self.pool.tables
        if ref not in tables['VM'] or ref in self.ids:
            return
        vm = tables['VM'][ref]
        self._take(ref)
        for vif in vm['VIFs']:
            self._take(vif)
            self._take(tables['VIF'][vif]['network'])
        for vbd in vm['VBDs']:
            self._take(vbd)
            if not tables['VBD'][vbd]['empty']:
                self._take_vdi(tables['VBD'][vbd]['VDI'])
        if with_snapshots:
            for snapshot in vm['snapshots']:
                self._take_vm(snapshot, False)
        if self.keep_power_state and vm['power_state'] == 'Suspended' and vm['suspend_VDI'] in tables['VDI']:
            self._take_vdi(vm['suspend_VDI'])
        for other in (vm['guest_metrics'], vm['resident_on'], vm['affinity']):
            self._take(other)
        if with_snapshots and vm['parent'] in tables['VM']:
            self._take_vm(vm['parent'], False)

    def _id(self, ref: str) -> str:
        return self.ids.get(ref, NULL)

    def _ids(self, refs: List[str]) -> List[str]:
        return [self.ids[ref] for ref in refs if ref in self.ids]

    def document(self) -> bytes:
        """The text of ova.xml."""
        objects = []
        for cls in EXPORTED_CLASSES:
            for ref in sorted(self.pool.tables[cls], reverse=True):
                if ref in self.ids:
                    record = dict(self.pool.tables[cls][ref])
                    getattr(self, '_leave_out_of_' + cls.lower())(record)
                    objects.append((cls, self.ids[ref], dated(cls, record)))
        return formats.ova_document(version_of(self.pool), objects)

    def _leave_out_of_host(self, host: Dict[str, Any]) -> None:
        host.update(HOST_WITHOUT, crash_dump_sr=self._id(host['crash_dump_sr']),
                    suspend_image_sr=self._id(host['suspend_image_sr']), resident_VMs=self._ids(host['resident_VMs']))

    def _leave_out_of_vm(self, vm: Dict[str, Any]) -> None:
        if not self.keep_power_state:
            vm.update(power_state='Halted', suspend_VDI=NULL)
        else:
            vm['suspend_VDI'] = self._id(vm['suspend_VDI'])
        if self.with_snapshots:
            vm.update(snapshot_of=self._id(vm['snapshot_of']), parent=self._id(vm['parent']))
        else:
            vm.update(is_a_snapshot=False, snapshot_of=NULL, snapshots=[], snapshot_time=EPOCH,
                      transportable_snapshot_id='', parent=NULL)
        vm.update(current_operations={}, allowed_operations=[], VIFs=self._ids(vm['VIFs']), VBDs=self._ids(vm['VBDs']),
                  VGPUs=[], crash_dumps=[], VTPMs=[], resident_on=self._id(vm['resident_on']),
                  affinity=self._id(vm['affinity']), consoles=[], metrics=NULL,
                  guest_metrics=self._id(vm['guest_metrics']), protection_policy=NULL, blobs={})

    def _leave_out_of_vm_guest_metrics(self, metrics: Dict[str, Any]) -> None:
        """They go as they are."""

    def _leave_out_of_vbd(self, vbd: Dict[str, Any]) -> None:
        vbd.update(currently_attached=self.keep_power_state and vbd['currently_attached'], VDI=self._id(vbd['VDI']),
                   VM=self._id(vbd['VM']), metrics=NULL, current_operations={}, allowed_operations=[])

    def _leave_out_of_vif(self, vif: Dict[str, Any]) -> None:
        vif.update(currently_attached=self.keep_power_state and vif['currently_attached'],
                   network=self._id(vif['network']), VM=self._id(vif['VM']), metrics=NULL, current_operations={},
                   allowed_operations=[])

    def _leave_out_of_network(self, network: Dict[str, Any]) -> None:
        network.update(VIFs=self._ids(network['VIFs']), PIFs=[], current_operations={}, allowed_operations=[])

    def _leave_out_of_vdi(self, vdi: Dict[str, Any]) -> None:
        vdi.update(VBDs=self._ids(vdi['VBDs']), crash_dumps=[], SR=self._id(vdi['SR']), current_operations={},
                   allowed_operations=[])

    def _leave_out_of_sr(self, sr: Dict[str, Any]) -> None:
        sr.update(VDIs=self._ids(sr['VDIs']), PBDs=[], current_operations={}, allowed_operations=[])

    def disks(self, vm: str) -> List[Tuple[str, str]]:
        """(id, VDI) of every disk that is streamed with this VM: no CDs, nothing on an ISO SR."""
        tables = self.pool.tables
        record = tables['VM'][vm]
        vdis = [tables['VBD'][vbd]['VDI'] for vbd in record['VBDs'] if tables['VBD'][vbd]['type'] != 'CD']
        if record['power_state'] == 'Suspended' and self.keep_power_state:
            vdis.insert(0, record['suspend_VDI'])
        return [(self.ids[vdi], vdi) for vdi in vdis
                if vdi in tables['VDI'] and tables['SR'][tables['VDI'][vdi]['SR']]['content_type'] != 'iso']


def dated(cls: str, record: Dict[str, Any]) -> Dict[str, Any]:
    """The record with its dates marked as such: on the wire they have a type, other strings have none."""
    fields = CLASSES[cls].fields
    return {name: formats.Date(value) if fields[name].kind == 'datetime' else value for name, value in record.items()}


def version_of(pool: Any) -> Dict[str, str]:
    """The version struct: the product's words, and xapi's version, which importers compare."""
    words = pool.record('host', pool.master())['software_version']
    major, minor = pool.version[:2] if pool.version >= (2,) else (1, 20)
    return {'hostname': 'localhost', 'date': words.get('date', EPOCH),
            'product_version': words.get('product_version', ''), 'product_brand': words.get('product_brand', ''),
            'build_number': words.get('build_number', ''), 'xapi_major': str(major), 'xapi_minor': str(minor),
            'export_vsn': '2'}


# --- Import -------------------------------------------------------------------------------------

Objects = List[Tuple[str, str, Dict[str, Any]]]


def missing(ident: str) -> Failure:
    """The refusal of a file that names an object which it does not hold."""
    return Failure('IMPORT_ERROR_FAILED_TO_FIND_OBJECT', ident)


def assert_compatible(pool: Any, version: Dict[str, str]) -> None:
    """IMPORT_INCOMPATIBLE_VERSION for an archive of a newer product (importexport.ml assert_compatible)."""
    try:
        theirs = int(version['xapi_major']), int(version['xapi_minor'])
    except (KeyError, ValueError, TypeError):
        raise Failure('IMPORT_INCOMPATIBLE_VERSION')
    ours = tuple(pool.version[:2]) if pool.version >= (2,) else (1, 20)
    if theirs > ours or (ours[0] == 1 and theirs[0] != 1):
        raise Failure('IMPORT_INCOMPATIBLE_VERSION')


class Import:
    """The objects of one ova.xml, put into the pool step by step, and taken out again if it fails.

    `sr`: where all disks go (None: the disks exist, only records are made). `restore`: uuids and
    MAC addresses are kept. `force`: most refusals are passed over, and a failure leaves debris.
    """

    def __init__(self, pool: Any, objects: Objects, task: str, sr: Optional[str], restore: bool, force: bool,
                 vdi_map: Optional[Dict[str, str]] = None) -> None:
        self.pool = pool
        self.task = task
        self.sr = sr
        self.restore = restore
        self.force = force
        self.vdi_map = vdi_map or {}
        self.by_class = {}      # type: Dict[str, List[Tuple[str, Dict[str, Any]]]]
        for cls, ident, record in objects:
            self.by_class.setdefault(cls, []).append((ident, record))
        self.records = {ident: record for _, ident, record in objects}
        self.life = pool.lives
        self.made = {}          # type: Dict[str, str]
        self.undo = []          # type: List[Callable[[], None]]
        self.vms = []           # type: List[str]
        #: (id in the file, size by the file, new VDI) of every disk to be received
        self.disks = []         # type: List[Tuple[str, int, str]]

    def check(self) -> None:
        """The refusals that come before anything is made."""
        for ident, record in self.by_class.get('VM', []):
            if self.restore:
                self._assert_seed_is_free(record)
                self._existing_vm(record)
        if self.sr is None:
            for ident, record in self._vdi_objects():
                self._existing_vdi(ident, record)

    def create(self) -> None:
        """Makes all objects; `disks` says what is still to be streamed."""
        self.check()
        for ident, record in self._vdi_objects():
            if self.sr is None:
                self.made[ident] = self._existing_vdi(ident, record)
            else:
                self._create_vdi(ident, record)
        for ident, record in self.by_class.get('VM', []):
            self._create_vm(ident, record)
        for ident, record in self.by_class.get('network', []):
            self._find_network(ident, record)
        for ident, record in reversed(self.by_class.get('VBD', [])):
            self._create_vbd(record)
        for ident, record in reversed(self.by_class.get('VIF', [])):
            self._create_vif(record)
        for vm in self.vms:
            self.pool.update_allowed_operations('VM', vm)
        self.pool.set_key('task', self.task, 'other_config', 'object_creation', 'complete')
        if self.sr is not None:
            self.disks = [(ident, int(self.records[ident]['virtual_size']), self.made[ident]) for ident in self._streamed()]

    def roll_back(self) -> None:
        """Takes away everything that was made, unless force was asked for (import.ml cleanup) or the server died of it."""
        if self.force or self.life != self.pool.lives:
            return
        for step in reversed(self.undo):
            try:
                step()
            except Failure:
                pass        # as the real cleanup: what cannot be removed stays

    def result(self) -> List[str]:
        """The VMs made that are no snapshots, if there are any such."""
        real = [vm for vm in self.vms if not self.pool.record('VM', vm)['is_a_snapshot']]
        return real or self.vms

    # --- VMs

    def _assert_seed_is_free(self, record: Dict[str, Any]) -> None:
        seed = record['other_config'].get('mac_seed')
        for ref, other in self.pool.tables['VM'].items():
            if seed is None or other['other_config'].get('mac_seed') != seed:
                continue
            original = self.pool.tables['VM'].get(other['snapshot_of'], {})
            mine = {other['uuid'], original.get('uuid')} - {None}
            if record['uuid'] in mine or self.records.get(record['snapshot_of'], {}).get('uuid') in mine:
                continue
            if self.pool.checks_mac_seed():
                raise Failure('DUPLICATE_MAC_SEED', seed)
            raise Failure('DUPLICATE_VM', record['uuid'])

    def _existing_vm(self, record: Dict[str, Any]) -> Optional[str]:
        """The VM that this one replaces, if a VM of the pool has its uuid; refuses where it may not."""
        try:
            ref = self.pool.ref_of('VM', record['uuid'])
        except Failure:
            return None
        existing = self.pool.record('VM', ref)
        if existing['power_state'] != 'Halted' and not self.force:
            # capitalised here, and here only (import.ml, v24.19.2)
            raise Failure('VM_BAD_POWER_STATE', ref, 'Halted', existing['power_state'])
        if int(existing['version']) >= int(record['version']) and not self.force:
            raise Failure('VM_TO_IMPORT_IS_NOT_NEWER_VERSION', ref, existing['version'], record['version'])
        return ref

    def _create_vm(self, ident: str, record: Dict[str, Any]) -> None:
        pool = self.pool
        if self.restore:
            existing = self._existing_vm(record)
            if existing is not None and pool.record('VM', existing)['power_state'] != 'Halted':
                return      # with force it is passed over, and its drives then find no VM (import.ml Skip)
            if existing is not None:
                pool.drop_vm_row(existing)      # its disks stay, with no VM
        fields = {name: value for name, value in record.items() if name in CLASSES['VM'].fields}
        other_config = dict(record['other_config'])
        if not self.force:
            other_config.pop('default_template', None)
        if not self.restore:
            other_config.pop('mac_seed', None)
            other_config = dict({'mac_seed': new_uuid()}, **other_config)
        other_config.pop('import_task', None)
        other_config = dict({'import_task': self.task}, **other_config)
        affinity = self.records.get(record['affinity'], {}).get('uuid', '')
        suspended = record['power_state'] == 'Suspended'
        if suspended and record['suspend_VDI'] not in self.made:
            if not self.force:
                raise missing(record['suspend_VDI'])
            suspended = False
        fields.update(
            uuid=record['uuid'] if self.restore else new_uuid(), other_config=other_config,
            power_state='Suspended' if suspended else 'Halted', allowed_operations=[],
            current_operations={self.task: 'import'} if self.sr and not self.force else {},
            suspend_VDI=self.made[record['suspend_VDI']] if suspended else NULL, resident_on=NULL, scheduled_to_be_resident_on=NULL,
            affinity=pool.ref_of('host', affinity) if affinity in {h['uuid'] for h in pool.tables['host'].values()}
            else NULL,
            version=str(int(record['version']) + 1) if self.restore else '0', snapshot_metadata='',
            snapshot_of=self.made.get(record['snapshot_of'], NULL), snapshots=[], parent=NULL, children=[],
            VBDs=[], VIFs=[], VUSBs=[], VGPUs=[], VTPMs=[], consoles=[], crash_dumps=[], attached_PCIs=[], domid='-1',
            appliance=NULL, protection_policy=NULL, snapshot_schedule=NULL, suspend_SR=NULL, groups=[], blobs={},
            is_default_template=False, metrics=pool.create('VM_metrics', {}),
            guest_metrics=self._create_guest_metrics(record['guest_metrics']))
        vm = pool.create('VM', fields)
        self.made[ident] = vm
        self.vms.append(vm)
        self.undo.append(lambda: pool.drop_vm_row(vm))

    def _create_guest_metrics(self, ident: str) -> str:
        known = CLASSES['VM_guest_metrics'].fields
        record = self.records.get(ident)
        if record is None:
            return NULL
        return self.pool.create('VM_guest_metrics', {name: value for name, value in record.items()
                                                     if name in known and name != 'uuid'})

    # --- Disks

    def _content_type_of(self, ident: str) -> str:
        """That of the SR that the VDI lay on; whatever is named has to be in the file (import.ml find_in_export)."""
        for needed in (ident, self.records.get(ident, {}).get('SR', '')):
            if needed not in self.records:
                raise missing(needed)
        return self.records[self.records[ident]['SR']]['content_type']

    def _vdi_objects(self) -> List[Tuple[str, Dict[str, Any]]]:
        """Every VDI that lay on no ISO SR, in the order of the file: a disk is made of it, also if no drive has it."""
        return [(ident, record) for ident, record in self.by_class.get('VDI', [])
                if self._content_type_of(ident) != 'iso']

    def _streamed(self) -> List[str]:
        """The VDIs whose contents follow: those of drives that are no CD drives, and every one of type `suspend`,
        whatever the VM's power state (import.ml non_cdrom_vdis)."""
        on_disks = {vbd['VDI'] for _, vbd in self.by_class.get('VBD', []) if vbd['type'] != 'CD'}
        on_disks = {ident for ident in sorted(on_disks) if self._content_type_of(ident) != 'iso'}
        return [ident for ident, record in self._vdi_objects() if ident in on_disks or record['type'] == 'suspend']

    def _create_vdi(self, ident: str, record: Dict[str, Any]) -> None:
        other_config = {key: value for key, value in record['other_config'].items() if key != 'content_id'}
        vdi = self.pool.vdi_create({
            'SR': self.sr, 'virtual_size': record['virtual_size'], 'type': record['type'], 'sharable': record['sharable'],
            'read_only': False, 'other_config': other_config, 'name_label': record['name_label'],
            'name_description': record['name_description'], 'xenstore_data': record['xenstore_data'],
            'sm_config': {'import_task': self.task}, 'tags': record['tags']})
        self.made[ident] = vdi
        self.undo.append(lambda: self.pool.vdi_destroy(vdi))

    def _existing_vdi(self, ident: str, record: Dict[str, Any]) -> str:
        """The disk of the pool that a metadata import means: named by vdi:<id>, or by SR and location."""
        if ident in self.vdi_map:
            return self.pool.find('VDI', self.vdi_map[ident])
        sr_uuid = self.records.get(record['SR'], {}).get('uuid')
        for sr, sr_record in self.pool.tables['SR'].items():
            if sr_record['uuid'] == sr_uuid:
                for vdi in sr_record['VDIs']:
                    if self.pool.record('VDI', vdi)['location'] == record['location']:
                        return vdi
                raise Failure('VDI_LOCATION_MISSING', sr, record['location'])
        raise Failure('VDI_CONTENT_ID_MISSING')

    def _find_iso(self, ident: str) -> Optional[str]:
        """The CD of the pool with the same location, in any ISO SR that is no drive of a host."""
        location = self.records.get(ident, {}).get('location')
        for ref, vdi in self.pool.tables['VDI'].items():
            sr = self.pool.tables['SR'].get(vdi['SR'], {})
            if vdi['location'] == location and sr.get('content_type') == 'iso' and sr.get('type') != 'udev':
                return ref
        return None

    def _create_vbd(self, record: Dict[str, Any]) -> None:
        pool = self.pool
        vdi = self.made.get(record['VDI'])
        if record['type'] == 'CD':
            vdi = self._find_iso(record['VDI'])
        if record['VM'] not in self.made:
            raise missing(record['VM'])
        if vdi is None and record['currently_attached'] and not (
                record['type'] == 'CD' and self.records[record['VM']]['HVM_boot_policy']):
            raise Failure('IMPORT_ERROR_ATTACHED_DISKS_NOT_FOUND')
        if vdi is None and record['type'] != 'CD':
            return      # an ISO attached as a disk: dropped with no more than a line in the log
        uuid = record['uuid'] if self.restore else new_uuid()
        if self.restore and self._already_there('VBD', uuid):
            return
        vbd = pool.create('VBD', {
            'uuid': uuid, 'VM': self.made[record['VM']], 'VDI': vdi or NULL, 'empty': vdi is None, 'device': '',
            'userdevice': record['userdevice'], 'bootable': record['bootable'], 'mode': record['mode'],
            'type': record['type'], 'unpluggable': record['unpluggable'], 'other_config': record['other_config'],
            'qos_algorithm_type': record['qos_algorithm_type'], 'qos_algorithm_params': record['qos_algorithm_params'],
            'currently_attached': record['currently_attached'], 'metrics': 'OpaqueRef:' + new_uuid()})
        pool.update_allowed_operations('VBD', vbd)
        if vdi is not None:
            pool.update_allowed_operations('VDI', vdi)

    def _already_there(self, cls: str, uuid: str) -> bool:
        """Whether an object of the pool has this uuid: then it is used instead of a new one."""
        try:
            self.pool.ref_of(cls, uuid)
        except Failure:
            return False
        return True

    # --- Networks

    def _find_network(self, ident: str, record: Dict[str, Any]) -> None:
        """By name, else by bridge, else a new one of that name and bridge that leads nowhere (import.ml module Net).

        In another pool the network on the same bridge may be a wrong one.
        """
        pool = self.pool
        for field in ('name_label', 'bridge'):
            for ref, network in pool.tables['network'].items():
                if network[field] == record[field]:
                    self.made[ident] = ref
                    return
        network = pool.create('network', {
            'name_label': record['name_label'], 'name_description': record['name_description'], 'MTU': record['MTU'],
            'other_config': dict(record['other_config'], import_task=self.task), 'bridge': record['bridge'],
            'tags': record['tags'], 'managed': record.get('managed', True)})
        self.made[ident] = network
        self.undo.append(lambda: pool.destroy_row('network', network))

    def _create_vif(self, record: Dict[str, Any]) -> None:
        pool = self.pool
        uuid = record['uuid'] if self.restore else new_uuid()
        if self.restore and self._already_there('VIF', uuid):
            return
        for needed in (record['VM'], record['network']):
            if needed not in self.made:
                raise missing(needed)
        vm = self.made[record['VM']]
        keeps_mac = self.restore
        # What is static about its addresses is lost: VIF.create sets none (xapi_vif.ml create).
        fields = {name: record[name] for name in ('device', 'MTU', 'other_config', 'qos_algorithm_type',
                                                  'qos_algorithm_params', 'locking_mode', 'ipv4_allowed', 'ipv6_allowed')
                  if name in record}
        seed = pool.record('VM', vm)['other_config'].get('mac_seed', '')
        fields.update(uuid=uuid, VM=vm, network=self.made[record['network']],
                      MAC=record['MAC'] if keeps_mac else mac_of(seed, record['device']),
                      MAC_autogenerated=record['MAC_autogenerated'] if keeps_mac else True,
                      currently_attached=pool.record('VM', vm)['power_state'] != 'Halted' and record['currently_attached'],
                      metrics='OpaqueRef:' + new_uuid())
        pool.update_allowed_operations('VIF', pool.create('VIF', fields))
