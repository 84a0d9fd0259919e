"""Calls that recovery needs, as strict as xapi is: what they refuse, and what is so when they are done.

Sources: the files named are those of xapi v24.19.2; what was recorded or tried on a real server of that version says so.
"""

import json
from typing import Any, List

import pytest

from support.language import MEBIBYTE, disk, slowly, vm
from support.wire import Background, eventually
from test_traps import NULL, STORE, disks_of, get, ref_of, refused, uuid_of

TWO_HOSTS = [{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2', 'live': False}]


def vbd_of(session: Any, vm_ref: str, userdevice: str = '0') -> str:
    return [vbd for vbd in session.xenapi.VM.get_VBDs(vm_ref)
            if session.xenapi.VBD.get_userdevice(vbd) == userdevice][0]


def attached_to_dom0(session: Any) -> List[str]:
    """The VBDs of control domains."""
    api = session.xenapi
    return [ref for ref, record in api.VBD.get_all_records().items() if api.VM.get_is_control_domain(record['VM'])]


# --- VBD, VIF --------------------------------------------------------------------------------------------------------

def test_a_drive_is_unplugged_only_from_a_running_vm_and_destroyed_only_when_unplugged(a_pool: Any) -> None:
    # xapi_vbd_helpers.ml valid_operations and destroy.
    pool = a_pool(vm('web', disks=2, power_state='Running', cds=[{'userdevice': '3'}]), vm('halted'),
                  vm('paused', power_state='Paused'))
    session = pool.session()
    api = session.xenapi
    web = ref_of(session, 'web')
    vbd = vbd_of(session, web, '1')
    vdi = api.VBD.get_VDI(vbd)
    for name, state in (('halted', 'halted'), ('paused', 'paused')):
        other = ref_of(session, name)
        assert refused(api.VBD.unplug, vbd_of(session, other)) == ['VM_BAD_POWER_STATE', other, 'running', state]
    assert refused(api.VBD.unplug, vbd_of(session, web, '3')) == [
        'OPERATION_NOT_ALLOWED', 'HVM CDROMs cannot be hotplugged/unplugged, only inserted or ejected']
    assert refused(api.VBD.destroy, vbd) == [
        'OPERATION_NOT_ALLOWED', "VBD '%s' still attached to '%s'" % (uuid_of(session, 'VBD', vbd), uuid_of(session, 'VM', web))]
    api.VBD.set_unpluggable(vbd, False)
    assert refused(api.VBD.unplug, vbd) == ['VBD_NOT_UNPLUGGABLE', vbd]
    api.VBD.set_unpluggable(vbd, True)
    assert refused(api.VDI.destroy, vdi) == ['VDI_IN_USE', vdi, 'destroy']

    api.VBD.unplug(vbd)
    assert refused(api.VBD.unplug, vbd) == ['DEVICE_ALREADY_DETACHED', vbd]
    api.VBD.plug(vbd)
    assert refused(api.VBD.plug, vbd) == ['DEVICE_ALREADY_ATTACHED', vbd]
    api.VBD.unplug(vbd)
    api.VBD.destroy(vbd)
    api.VDI.destroy(vdi)


def test_a_control_domains_drive_is_not_unplugged_while_something_reads(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=16 * MEBIBYTE, used=16)]), faults=[slowly()])
    session = pool.session()
    exporting = Background(get, pool, '/export', ref=ref_of(session, 'web'))
    vbd, = eventually(lambda: attached_to_dom0(session))
    assert refused(session.xenapi.VBD.unplug, vbd)[:3] == ['DEVICE_DETACH_REJECTED', 'VBD', vbd]
    assert refused(session.xenapi.VBD.destroy, vbd)[0] == 'OPERATION_NOT_ALLOWED'
    pool.release()
    assert exporting.result().status == 200
    assert attached_to_dom0(session) == []


def test_a_disk_that_is_being_exported_cannot_be_opened_for_writing(a_pool: Any) -> None:
    # xapi_vbd_helpers.ml lets it pass, vdi_automaton.ml does not: there is no way from open for reading to open for writing.
    pool = a_pool(vm('web', disks=[disk(size=16 * MEBIBYTE, used=16)]),
                  faults=[slowly('http:/export_raw_vdi')])
    session = pool.session()
    web = ref_of(session, 'web')
    exporting = Background(get, pool, '/export_raw_vdi', vdi=disks_of(session, web)[0])
    eventually(lambda: attached_to_dom0(session))
    details = refused(session.xenapi.VM.start, web, False, False)
    assert details[0] == 'INTERNAL_ERROR' and 'Illegal_transition' in details[1]
    pool.release()
    exporting.result()
    session.xenapi.VM.start(web, False, False)


def test_an_interface_moves_to_another_network_in_any_power_state(a_pool: Any) -> None:
    # xapi_vif.ml move
    pool = a_pool(vm('up', power_state='Running', vifs=[{}]), vm('down', vifs=[{}]),
                  networks=[{'name_label': 'first'}, {'name_label': 'second'}])
    session = pool.session()
    api = session.xenapi
    second = api.network.get_by_name_label('second')[0]
    for name in ('up', 'down'):
        vif, = api.VM.get_VIFs(ref_of(session, name))
        before = api.VIF.get_record(vif)
        api.VIF.move(vif, second)
        after = api.VIF.get_record(vif)
        assert after == dict(before, network=second)
    assert sorted(api.network.get_VIFs(second)) == sorted(
        vif for name in ('up', 'down') for vif in api.VM.get_VIFs(ref_of(session, name)))
    assert refused(api.VIF.move, vif, NULL) == ['HANDLE_INVALID', 'network', NULL]
    assert refused(api.VIF.unplug, vif) == ['VM_BAD_POWER_STATE', ref_of(session, 'down'), 'running', 'halted']


# --- PBD -------------------------------------------------------------------------------------------------------------

def test_an_sr_is_plugged_host_by_host(a_pool: Any) -> None:
    # xapi_pbd.ml plug, unplug
    pool = a_pool(vm('web', power_state='Running'), srs=[STORE], hosts=TWO_HOSTS)
    session = pool.session()
    api = session.xenapi
    sr = api.SR.get_by_name_label('store')[0]
    by_host = {api.host.get_name_label(api.PBD.get_host(pbd)): pbd for pbd in api.SR.get_PBDs(sr)}
    vdi, = disks_of(session, ref_of(session, 'web'))
    assert refused(api.PBD.unplug, by_host['xcp1']) == ['VDI_IN_USE', vdi]
    dead = api.host.get_by_name_label('xcp2')[0]
    assert refused(api.PBD.unplug, by_host['xcp2']) == ['HOST_OFFLINE', dead]
    assert refused(api.PBD.plug, by_host['xcp2']) == ['HOST_OFFLINE', dead]

    api.PBD.plug(by_host['xcp1'])     # plugged already: nothing to do
    api.VM.hard_shutdown(ref_of(session, 'web'))
    api.PBD.unplug(by_host['xcp1'])
    api.PBD.unplug(by_host['xcp1'])
    assert not api.PBD.get_currently_attached(by_host['xcp1'])
    assert refused(api.VM.start, ref_of(session, 'web'), False, False) == ['NO_HOSTS_AVAILABLE']
    api.PBD.plug(by_host['xcp1'])
    api.VM.start(ref_of(session, 'web'), False, False)


# --- a host that died ------------------------------------------------------------------------------------------------

def test_a_host_is_forgotten_when_it_is_dead_and_its_vms_are_reset(a_pool: Any) -> None:
    # xapi_host.ml destroy, xapi_vm.ml power_state_reset; the order of steps was walked on a real server.
    pool = a_pool(vm('stranded', power_state='Running', resident_on='xcp2', vifs=[{}]), vm('here', power_state='Running'),
                  srs=[STORE], hosts=TWO_HOSTS)
    session = pool.session()
    api = session.xenapi
    master, dead = (api.host.get_by_name_label(name)[0] for name in ('xcp1', 'xcp2'))
    stranded, here = ref_of(session, 'stranded'), ref_of(session, 'here')
    domain = api.host.get_control_domain(dead)
    assert refused(api.VM.start, stranded, False, False) == ['VM_BAD_POWER_STATE', stranded, 'halted', 'running']
    assert refused(api.host.destroy, dead) == ['HOST_HAS_RESIDENT_VMS', dead]
    assert refused(api.host.destroy, master) == ['HOST_IS_LIVE', master]
    assert refused(api.VM.power_state_reset, domain) == ['CANNOT_RESET_CONTROL_DOMAIN', domain]
    assert refused(api.VM.power_state_reset, here) == ['DOMAIN_EXISTS', here]
    # message_forwarding.ml forward_vm_op: what is done to a running VM is done by its host
    for call, *arguments in ((api.VM.hard_shutdown, stranded), (api.VM.suspend, stranded), (api.VM.checkpoint, stranded, 'x'),
                             (api.VM.pause, stranded), (api.VM.hard_reboot, stranded), (api.VBD.unplug, vbd_of(session, stranded))):
        assert refused(call, *arguments) == ['HOST_OFFLINE', dead]
    assert api.VM.get_power_state(api.VM.snapshot(stranded, 'on shared storage')) == 'Halted'

    api.VM.power_state_reset(stranded)
    record = api.VM.get_record(stranded)
    assert (record['power_state'], record['resident_on'], record['domid']) == ('Halted', NULL, '-1')
    assert not any(api.VBD.get_currently_attached(vbd) for vbd in record['VBDs'])
    assert not any(api.VIF.get_currently_attached(vif) for vif in record['VIFs'])
    api.host.destroy(dead)
    assert api.host.get_by_name_label('xcp2') == []
    assert refused(api.VM.get_record, domain)[0] == 'HANDLE_INVALID'
    assert all(api.PBD.get_host(pbd) == master for pbd in api.PBD.get_all())
    api.VM.start(stranded, False, False)


def test_a_vm_of_another_live_host_is_not_reset(a_pool: Any) -> None:
    pool = a_pool(vm('web', power_state='Running', resident_on='xcp2'), srs=[STORE],
                  hosts=[{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'}])
    session = pool.session()
    api = session.xenapi
    host = api.host.get_by_name_label('xcp2')[0]
    assert refused(api.VM.power_state_reset, ref_of(session, 'web')) == ['HOST_IS_LIVE', host]
    assert refused(api.host.destroy, host) == ['HOST_IS_LIVE', host]


# --- memory ----------------------------------------------------------------------------------------------------------

def test_the_four_memory_values_are_one(a_pool: Any) -> None:
    # recorded: static-min=256MiB dynamic-min=128MiB was refused so, dynamic memory control being disabled
    pool = a_pool(vm('web'), vm('up', power_state='Running'))
    session = pool.session()
    api = session.xenapi
    web, up = ref_of(session, 'web'), ref_of(session, 'up')
    small, large = str(128 * MEBIBYTE), str(256 * MEBIBYTE)
    assert refused(api.VM.set_memory_limits, web, large, large, small, large) == [
        'MEMORY_CONSTRAINT_VIOLATION_MAXPIN', 'DMC disabled']
    assert refused(api.VM.set_memory_limits, up, large, large, large, large) == ['VM_BAD_POWER_STATE', up, 'halted', 'running']
    api.VM.set_memory_limits(web, small, large, large, large)
    record = api.VM.get_record(web)
    assert [record['memory_' + name] for name in ('static_min', 'dynamic_min', 'dynamic_max', 'static_max')] == [
        small, large, large, large]
    assert refused(api.VM.set_memory_static_max, web, small)[0] == 'MEMORY_CONSTRAINT_VIOLATION_MAXPIN'
    api.VM.set_memory(web, small)
    assert api.VM.get_memory_static_max(web) == small


# --- looking at a pool from outside -------------------------------------------------------------------------------------

def test_what_its_commands_print_of_a_pool_is_what_tests_see_of_it(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=3 * MEBIBYTE + 512, used=[[1, 1]], seed=5)], tags=['Zo\u00eb'], snapshots=1))
    session = pool.session()
    session.xenapi.VM.snapshot(ref_of(session, 'web'), 'another')
    pool.command('write', '--dir', pool.dir, '--vm', 'web', '--device', 'xvda', '--block', '0')
    vdi = uuid_of(session, 'VDI', disks_of(session, ref_of(session, 'web'))[0])
    for _ in ('while it serves', 'afterwards'):
        assert json.loads(pool.command('dump', '--dir', pool.dir).decode('utf-8')) == pool.dump()
        content = pool.command('read', '--dir', pool.dir, '--vdi', vdi)
        assert content == pool.read(vdi) and len(content) == 3 * MEBIBYTE + 512 and content[:MEBIBYTE].strip(b'\0')
        pool.stop()


# --- snapshots and copies --------------------------------------------------------------------------------------------

def test_a_revert_brings_back_settings_and_disks_of_the_snapshot(a_pool: Any) -> None:
    # xapi_vm_snapshot.ml revert_vm_fields and update_vifs_vbds_vgpus_and_vusbs
    pool = a_pool(vm('web', disks=[disk(seed=5)], power_state='Running', vifs=[{}], tags=['old'],
                     other_config={'key': "a 'quoted' \\ value"}))
    session = pool.session()
    api = session.xenapi
    web = ref_of(session, 'web')
    before = pool.read(uuid_of(session, 'VDI', disks_of(session, web)[0]))
    snapshot, other = api.VM.snapshot(web, 'before'), api.VM.snapshot(web, 'another')
    pool.command('write', '--dir', pool.dir, '--vm', 'web', '--device', 'xvda', '--block', '1')
    api.VM.set_name_label(web, 'renamed')
    api.VM.set_other_config(web, {})
    api.VM.set_tags(web, ['new'])
    later = api.VDI.create({'SR': api.VDI.get_SR(disks_of(session, web)[0]), 'virtual_size': str(MEBIBYTE), 'type': 'user',
                            'sharable': False, 'read_only': False, 'other_config': {}, 'name_label': 'came later'})
    api.VBD.create({'VM': web, 'VDI': later, 'userdevice': '1', 'bootable': False, 'mode': 'RW', 'type': 'Disk', 'empty': False,
                    'other_config': {}, 'qos_algorithm_type': '', 'qos_algorithm_params': {}})
    gone, _ = disks_of(session, web)

    assert refused(api.VM.revert, web) == ['VM_REVERT_FAILED', web, NULL]
    api.VM.revert(snapshot)
    record = api.VM.get_record(web)
    assert (record['name_label'], record['tags'], record['power_state']) == ('web', ['new'], 'Halted')
    assert record['other_config']['key'] == "a 'quoted' \\ value"
    assert (record['is_a_template'], record['is_a_snapshot'], record['parent']) == (False, False, snapshot)
    made, = disks_of(session, web)
    assert made != gone and pool.read(uuid_of(session, 'VDI', made)) == before
    assert refused(api.VDI.get_record, gone)[0] == 'HANDLE_INVALID'
    assert api.VDI.get_VBDs(later) == [], 'a disk that the snapshot has none of stays, with no VM'
    assert {api.VDI.get_snapshot_of(disks_of(session, ref)[0]) for ref in (snapshot, other)} == {made}
    assert sorted(api.VM.get_snapshots(web)) == sorted([snapshot, other])
    messages = [message['name'] for message in api.message.get_all_records().values() if message['obj_uuid'] == record['uuid']]
    assert messages.count('VM_SNAPSHOT_REVERTED') == 1


def test_a_snapshot_that_outlived_its_vm_brings_it_back_under_its_uuid(a_pool: Any) -> None:
    # xapi_vm_snapshot.ml create_vm_from_snapshot
    pool = a_pool(vm('web', disks=[disk(seed=5)], vifs=[{}]))
    session = pool.session()
    api = session.xenapi
    web = ref_of(session, 'web')
    uuid, disk_ref = uuid_of(session, 'VM', web), disks_of(session, web)[0]
    content, mac = pool.read(uuid_of(session, 'VDI', disk_ref)), api.VIF.get_MAC(api.VM.get_VIFs(web)[0])
    snapshot, other = api.VM.snapshot(web, 'before'), api.VM.snapshot(web, 'another')
    api.VM.destroy(web)
    api.VDI.destroy(disk_ref)
    api.VM.revert(snapshot)
    back = api.VM.get_by_uuid(uuid)
    assert api.VM.get_name_label(back) == 'web' and not api.VM.get_is_a_template(back)
    assert pool.read(uuid_of(session, 'VDI', disks_of(session, back)[0])) == content
    assert api.VIF.get_MAC(api.VM.get_VIFs(back)[0]) == mac
    assert sorted(api.VM.get_snapshots(back)) == sorted([snapshot, other])


def test_a_checkpoint_is_reverted_to_as_a_suspended_vm(a_pool: Any) -> None:
    pool = a_pool(vm('web', power_state='Running', memory=8 * MEBIBYTE))
    session = pool.session()
    api = session.xenapi
    web = ref_of(session, 'web')
    checkpoint = api.VM.checkpoint(web, 'with memory')
    memory = pool.read(uuid_of(session, 'VDI', api.VM.get_suspend_VDI(checkpoint)))
    api.VM.revert(checkpoint)
    image = api.VM.get_suspend_VDI(web)
    assert api.VM.get_power_state(web) == 'Suspended' and image != api.VM.get_suspend_VDI(checkpoint)
    assert pool.read(uuid_of(session, 'VDI', image)) == memory
    api.VM.resume(web, False, False)


def test_a_copy_is_whole_and_lies_where_it_is_told(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(seed=5)], vifs=[{}]), srs=[STORE, {'name_label': 'second', 'type': 'ext', 'shared': True}])
    session = pool.session()
    api = session.xenapi
    web = ref_of(session, 'web')
    second = api.SR.get_by_name_label('second')[0]
    for sr, expected in ((NULL, 'store'), (second, 'second')):
        copy = api.VM.copy(web, 'copy', sr)
        made, = disks_of(session, copy)
        assert api.SR.get_name_label(api.VDI.get_SR(made)) == expected
        assert pool.read(uuid_of(session, 'VDI', made)) == pool.read(uuid_of(session, 'VDI', disks_of(session, web)[0]))
        assert api.VIF.get_MAC(api.VM.get_VIFs(copy)[0]) != api.VIF.get_MAC(api.VM.get_VIFs(web)[0])
        assert not api.VM.get_is_a_snapshot(copy)


# --- VM.snapshot that leaves disks out ------------------------------------------------------------------------------

@pytest.mark.parametrize('version', ['1.249.3', '21.3.0'])
def test_an_older_server_counts_the_disks_to_ignore_as_one_parameter_too_many(a_pool: Any, version: str) -> None:
    # ocaml/idl/datamodel_vm.ml: ignore_vdis came with 21.4.0.
    pool = a_pool(vm('web', disks=2), xapi_version=version)
    session = pool.session()
    api = session.xenapi
    web = ref_of(session, 'web')
    for ignored in ([], disks_of(session, web)[1:]):
        assert refused(api.VM.snapshot, web, 'short', ignored) == ['MESSAGE_PARAMETER_COUNT_MISMATCH', 'VM.snapshot', '2', '3']
        assert refused(api.Async.VM.snapshot, web, 'short', ignored)[0] == 'MESSAGE_PARAMETER_COUNT_MISMATCH'
    uuid = uuid_of(session, 'VDI', disks_of(session, web)[1])
    done = pool.xe('vm-snapshot', 'vm=web', 'new-name-label=short', 'ignore-vdi-uuids=' + uuid)
    assert done.exit_status == 1 and done.stdout == '', done
    assert api.VM.get_snapshots(web) == [] and pool.has_no_snapshots_of_ours()
    assert len(disks_of(session, api.VM.snapshot(web, 'whole'))) == 2


def test_a_snapshot_has_neither_disk_nor_drive_of_what_is_to_be_ignored_and_keeps_the_places_of_the_rest(a_pool: Any) -> None:
    # xapi_vm_clone.ml clone: the VM's drives are filtered by their VDI, before any disk is copied.
    pool = a_pool(vm('web', disks=[disk(seed=number) for number in range(3)], power_state='Running'), xapi_version='21.4.0')
    session = pool.session()
    api = session.xenapi
    web = ref_of(session, 'web')
    first, second, third = disks_of(session, web)
    short = api.VM.snapshot(web, 'short', [second])
    assert [api.VDI.get_snapshot_of(made) for made in disks_of(session, short)] == [first, third]
    assert sorted(api.VBD.get_userdevice(vbd) for vbd in api.VM.get_VBDs(short)) == ['0', '2']
    assert api.VDI.get_snapshots(second) == [] and len(api.VM.get_VBDs(web)) == 3
    assert len(disks_of(session, api.VM.snapshot(web, 'whole', []))) == 3
    assert disks_of(session, api.VM.snapshot(web, 'nothing', [first, second, third])) == []


def test_what_the_vm_does_not_have_is_ignored_in_silence_and_what_is_no_set_of_refs_is_refused(a_pool: Any) -> None:
    # xapi_vm_clone.ml clone: List.mem alone looks at the refs, so nothing says that one is unknown; a CD drive goes by its
    # ISO, an empty one by the null reference.
    pool = a_pool(vm('web', disks=2, cds=[{'userdevice': '3', 'empty': True}, {'userdevice': '4', 'sr': 'images',
                                                                               'name_label': 'a.iso', 'empty': False}]),
                  vm('db'), srs=[STORE, {'name_label': 'images', 'type': 'iso', 'shared': True}])
    session = pool.session()
    api = session.xenapi
    web = ref_of(session, 'web')
    foreign = disks_of(session, ref_of(session, 'db')) + ['OpaqueRef:nothing', 'nonsense', web]
    whole = api.VM.snapshot(web, 'whole', foreign)
    assert len(disks_of(session, whole)) == 2 and len(api.VM.get_VBDs(whole)) == 4
    assert sorted(api.VBD.get_userdevice(vbd) for vbd in api.VM.get_VBDs(api.VM.snapshot(web, 'x', [NULL]))) == ['0', '1', '4']
    iso = [api.VBD.get_VDI(vbd) for vbd in api.VM.get_VBDs(web) if api.VBD.get_userdevice(vbd) == '4']
    assert sorted(api.VBD.get_userdevice(vbd) for vbd in api.VM.get_VBDs(api.VM.snapshot(web, 'x', iso))) == ['0', '1', '3']
    before = len(api.VM.get_snapshots(web))
    for wrong in (disks_of(session, web)[0], {}, [1], True):
        assert refused(api.VM.snapshot, web, 'wrong', wrong)[0] == 'INTERNAL_ERROR'
    assert refused(api.VM.snapshot, web, 'more', [], [])[0] == 'MESSAGE_PARAMETER_COUNT_MISMATCH'
    assert len(api.VM.get_snapshots(web)) == before


def test_a_disk_to_be_ignored_may_lie_where_no_snapshot_can_be_made_but_not_where_no_host_sees_it_nor_reset_at_boot(
        a_pool: Any) -> None:
    # The storage is only asked for the disks that are copied. The host is chosen by all SRs of the VM (message_forwarding.ml),
    # and what is allowed by all its disks (xapi_vm_lifecycle.ml), whatever is to be ignored.
    srs = [STORE, {'name_label': 'images', 'type': 'iso', 'shared': True}, {'name_label': 'far', 'type': 'ext', 'host': 'xcp2'}]
    pool = a_pool(vm('web', disks=[disk(), disk(sr='images')]), vm('far', disks=[disk(), disk(sr='far')]),
                  vm('reset', disks=[disk(), disk(on_boot='reset')]), hosts=[dict(TWO_HOSTS[0]), dict(TWO_HOSTS[1])], srs=srs)
    session = pool.session()
    api = session.xenapi
    for name, code in (('web', 'SR_OPERATION_NOT_SUPPORTED'), ('far', 'NO_HOSTS_AVAILABLE'),
                       ('reset', 'VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION')):
        ref = ref_of(session, name)
        assert refused(api.VM.snapshot, ref, 'whole')[0] == code
        ignored = disks_of(session, ref)[1:]
        if name == 'web':
            assert len(disks_of(session, api.VM.snapshot(ref, 'short', ignored))) == 1
        else:
            assert refused(api.VM.snapshot, ref, 'short', ignored)[0] == code


def test_xe_takes_the_uuids_of_the_disks_to_ignore_between_commas(a_pool: Any) -> None:
    # cli_operations.ml vm_snapshot: each uuid is looked up before the call.
    pool = a_pool(vm('web', disks=3))
    session = pool.session()
    web = ref_of(session, 'web')
    uuids = [uuid_of(session, 'VDI', ref) for ref in disks_of(session, web)]
    for ignored, left in ((uuids[1:], 1), (uuids[:1], 2), ([], 3)):
        done = pool.xe('vm-snapshot', 'vm=web', 'new-name-label=short', 'ignore-vdi-uuids=' + ','.join(ignored))
        assert done.exit_status == 0, done
        assert len(disks_of(session, session.xenapi.VM.get_by_uuid(done.stdout.strip()))) == left
    before = session.xenapi.VM.get_snapshots(web)
    done = pool.xe('vm-snapshot', 'vm=web', 'new-name-label=short', 'ignore-vdi-uuids=%s,nonsense' % uuids[1])
    assert done.exit_status == 1 and 'The uuid you supplied was invalid' in done.stderr, done
    assert session.xenapi.VM.get_snapshots(web) == before
