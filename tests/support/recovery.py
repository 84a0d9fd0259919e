"""The words that tests of the way back are written in: restore, extract, drill, and what there is to see afterwards."""

import contextlib
from typing import Any, Dict, Iterator, List, Sequence

from support.deeds import Process, backup, beginning
from support.language import at
from support.process import Pool, Run, run_program
from support.shelf import Shelf, disk_content
from support.wire import eventually

# What a restored VM has of its own, or what the pool alone keeps: everything else has to be as it was.
OWN_FIELDS = {'uuid', 'VBDs', 'VIFs', 'metrics', 'guest_metrics', 'snapshots', 'snapshot_of', 'children', 'parent',
              'resident_on', 'scheduled_to_be_resident_on', 'affinity', 'power_state', 'domid', 'allowed_operations',
              'current_operations', 'consoles', 'version', 'generation_id', 'memory_target', 'last_booted_record',
              'last_boot_CPU_flags', 'suspend_VDI', 'ha_always_run', 'snapshot_metadata', 'memory_overhead', 'reference_label',
              'start_time', 'other_config', 'hardware_platform_version', 'requires_reboot'}


def restore(pool: Pool, shelf: Shelf, *words: str, lines: Sequence[str] = ('vm-export=*',), **how: Any) -> Run:
    """`restore` with these words, on the pool's master."""
    return backup(pool, shelf, *lines, words=['restore'] + list(words), **how)


def drill(pool: Pool, shelf: Shelf, *words: str, lines: Sequence[str] = ('vm-export=*',), **how: Any) -> Run:
    return backup(pool, shelf, *lines, words=['drill'] + list(words), **how)


def serving(pool: Pool, *faults: Dict[str, Any]) -> Pool:
    """The pool serves from now on with these faults only."""
    pool.stop()
    pool.set_faults(faults)
    return pool.start()


@contextlib.contextmanager
def stopped_at(pool: Pool, shelf: Shelf, fault: Dict[str, Any], *words: str) -> Iterator[Process]:
    """A run of these words that has come to the fault, which holds it there."""
    serving(pool, fault)
    seen = len(pool.calls(fault['on']))
    with beginning(pool, shelf, 'vm-export=*', words=list(words)) as process:
        assert eventually(lambda: len(pool.calls(fault['on'])) > seen or process.is_over()), process.output
        assert not process.is_over(), process.output
        yield process


def killed_at(pool: Pool, shelf: Shelf, occasion: str, when: str, *words: str) -> None:
    """A run of these words was killed at the first such occasion; the pool serves again without faults."""
    with stopped_at(pool, shelf, at(occasion, when=when, nth=1, hangs=True), *words) as process:
        process.kill()
    serving(pool)


def extract(shelf: Shelf, *words: str) -> Run:
    """`extract` with these words on a machine that has neither a pool nor xe."""
    return run_program('-', shelf.config('vm-export=*'), 'extract', *words)


def machine(pool: Pool, name: str) -> Dict[str, Any]:
    """The record of the only real VM of that name."""
    return machine_in(pool.dump(), name)


def machine_in(objects: Dict[str, Any], name: str) -> Dict[str, Any]:
    """The same, of what is in a pool."""
    found = [record for record in objects['VM'].values() if record['name_label'] == name
             and not record['is_a_snapshot'] and not record['is_a_template']]
    assert len(found) == 1, [record['name_label'] for record in found]
    return found[0]


def has_machine(pool: Pool, name: str) -> bool:
    return any(record['name_label'] == name for record in pool.dump()['VM'].values())


def disks_of(pool: Pool, name: str) -> Dict[str, Dict[str, Any]]:
    """The VDIs of that VM by userdevice, each with its VBD and its SR's name."""
    objects = pool.dump()
    found = {}
    for ref in machine_in(objects, name)['VBDs']:
        vbd = objects['VBD'][ref]
        if vbd['type'] == 'Disk':
            vdi = objects['VDI'][vbd['VDI']]
            found[vbd['userdevice']] = dict(vdi, VBD=vbd, SR_name=objects['SR'][vdi['SR']]['name_label'])
    return found


def interfaces_of(pool: Pool, name: str) -> List[Any]:
    """(device, network, MAC) of that VM's interfaces."""
    objects = pool.dump()
    return sorted((objects['VIF'][ref]['device'], objects['network'][objects['VIF'][ref]['network']]['name_label'],
                   objects['VIF'][ref]['MAC']) for ref in machine_in(objects, name)['VIFs'])


def holds(pool: Pool, name: str, *disks: Dict[str, Any]) -> bool:
    """Has that VM just these disks of POOL.json, byte by byte?"""
    found = disks_of(pool, name)
    assert len(found) == len(disks), sorted(found)
    for number, disk in enumerate(disks):
        content = pool.read(found[disk.get('userdevice', str(number))]['uuid'])
        if content[:disk['size']] != disk_content(disk) or content[disk['size']:].strip(b'\0'):
            return False
    return True


def destroy(pool: Pool, name: str) -> Dict[str, Any]:
    """The VM, its snapshots and all their disks are gone from the pool; its record as it was."""
    record = machine(pool, name)
    session = pool.session()
    api = session.xenapi
    refs = [ref for ref, one in api.VM.get_all_records().items() if one['uuid'] == record['uuid'] or
            one['is_a_snapshot'] and one['snapshot_of'] == api.VM.get_by_uuid(record['uuid'])]
    for ref in refs:
        with contextlib.suppress(Exception):
            api.VM.hard_shutdown(ref)
        disks = [api.VBD.get_VDI(vbd) for vbd in api.VM.get_VBDs(ref) if api.VBD.get_type(vbd) == 'Disk']
        api.VM.destroy(ref)
        for disk in disks:
            api.VDI.destroy(disk)
    session.logout()
    return record


def objects(pool: Pool) -> Dict[str, Any]:
    """All that a restore or drill could leave in the pool or change there."""
    dump = pool.dump()
    tables = {kind: dict(dump.get(kind, {})) for kind in ('VM', 'VDI', 'VBD', 'VIF', 'network', 'task', 'session', 'VM_metrics',
                                                          'VM_guest_metrics')}
    for rows in tables.values():
        for ref, record in rows.items():
            rows[ref] = {field: value for field, value in record.items() if field not in ('allowed_operations',)}
    return tables


def differences(before: Dict[str, Any], after: Dict[str, Any]) -> Dict[str, Any]:
    """The fields that a VM should have kept and has not."""
    found = {field: (before[field], after[field]) for field in before
             if field not in OWN_FIELDS and before[field] != after[field]}
    ours = {key: value for key, value in after['other_config'].items() if key != 'mac_seed'}
    theirs = {key: value for key, value in before['other_config'].items() if key != 'mac_seed'}
    if ours != theirs:
        found['other_config'] = (theirs, ours)
    return found
