"""Rows that are damaged or in the way, as people's pools have them, said in POOL.json: what the server then refuses.

Sources: the files named are those of xapi v24.19.2.
"""

import json
import os
import sys
from typing import Any

import pytest

from support.language import MEBIBYTE, disk, vm
from support.process import CRON_PATH, SIMPOOL, run
from test_calls import TWO_HOSTS
from test_traps import NULL, STORE, disks_of, export, get, import_of, imported, ova_of, ref_of, refused, uuid_of, vm_fields


def described_wrongly(tmp_path: Any, **pool: Any) -> str:
    """What simpool says to that POOL.json, which it does not take."""
    path = tmp_path / 'POOL.json'
    path.write_text(json.dumps(pool))
    result = run([sys.executable, SIMPOOL, 'serve', '--pool', str(path), '--dir', str(tmp_path / 'd')], {'PATH': CRON_PATH})
    assert result.exit_status == 2, result
    return result.stderr


def test_the_example_shows_every_key_and_is_a_sound_pool(tmp_path: Any) -> None:
    text = run([sys.executable, SIMPOOL, 'example'], {'PATH': CRON_PATH}).stdout
    for key in ('blocked_operations snapshot_of_itself vusbs vgpus pci vtpm on_boot sharable cbt_enabled missing snapshot_of '
                'vdi live resident_on').split():
        assert '"%s":' % key in text, key
    (tmp_path / 'POOL.json').write_text(text)
    command = ['run', '--pool', str(tmp_path / 'POOL.json'), '--dir', str(tmp_path / 'd'), '--', 'xe']
    for words in (['vm-snapshot', 'vm=PROD-web', 'new-name-label=of the example'], ['vm-list', '--minimal']):
        assert run([sys.executable, SIMPOOL] + command + words, {'PATH': CRON_PATH}).exit_status == 0


@pytest.mark.parametrize('section, said', [
    ({'vms': [{'name_label': 'web', 'blocked_operations': {'launch': 'no'}}]}, "there is no operation 'launch'"),
    ({'vms': [{'name_label': 'web', 'blocked_operations': {'start': 1}}]}, 'must be an object of strings'),
    ({'vms': [{'name_label': 'web', 'vusbs': -1}]}, 'must not be negative'),
    ({'vms': [{'name_label': 'web', 'vtpms': 1}]}, "unknown key 'vtpms'"),
    ({'vms': [{'name_label': 'web', 'disks': [{'snapshot_of': 'web'}]}]}, 'snapshot_of can only be "self"'),
    ({'vms': [{'name_label': 'web', 'disks': [{'sr': 'nowhere'}]}]}, "there is no SR 'nowhere'"),
    ({'vms': [{'name_label': 'web', 'disks': [{'on_boot': 'sometimes'}]}]}, "on_boot 'sometimes'"),
    ({'vms': [{'name_label': 'web', 'cds': [{'vdi': 'an.iso'}]}]}, 'vdi can only be "?"'),
    ({'vms': [{'name_label': 'web', 'cds': [{'vdi': '?', 'empty': True}]}]}, 'that is not empty'),
    ({'vms': [{'name_label': 'web', 'vifs': [{'network': 'nowhere'}]}]}, "there is no network 'nowhere'"),
    ({'vms': [{'name_label': 'web', 'disks': [{'sr': None}], 'snapshots': [{'name_label': 'of what'}]}]}, "can't have snapshots"),
])
def test_what_pool_json_cannot_say_is_an_error(tmp_path: Any, section: Any, said: str) -> None:
    assert said in described_wrongly(tmp_path, **section)


def test_a_blocked_operation_is_refused_with_its_reason_and_not_copied(a_pool: Any) -> None:
    # xapi_vm_lifecycle.ml check_operation_error, its first check; xapi_vm_clone.ml copy_vm_record
    pool = a_pool(vm('web', blocked_operations={'start': 'not now', 'destroy': 'never'}))
    session = pool.session()
    api = session.xenapi
    web = ref_of(session, 'web')
    assert api.VM.get_blocked_operations(web) == {'start': 'not now', 'destroy': 'never'}
    assert 'start' not in api.VM.get_allowed_operations(web)
    assert refused(api.VM.start, web, False, False) == ['OPERATION_BLOCKED', web, 'not now']
    assert refused(api.VM.destroy, web) == ['OPERATION_BLOCKED', web, 'never']
    assert api.VM.get_blocked_operations(api.VM.snapshot(web, 'a snapshot')) == {}
    back = imported(pool, session, export(pool, session, web)[0].body)
    assert refused(api.VM.start, back, False, False) == ['OPERATION_BLOCKED', back, 'not now'], 'an import keeps the block'


def test_devices_that_are_passed_through_stand_in_the_way_of_what_saves_memory(a_pool: Any) -> None:
    # xapi_vm_lifecycle.ml check_operation_error
    pool = a_pool(vm('usb', vusbs=1, power_state='Running'), vm('gpu', vgpus=2, power_state='Running'),
                  vm('pci', pci=2, power_state='Running'), vm('tpm', vtpm=1), srs=[STORE])
    session = pool.session()
    api = session.xenapi
    usb, gpu, pci, tpm = (ref_of(session, name) for name in ('usb', 'gpu', 'pci', 'tpm'))
    assert [len(api.VM.get_VUSBs(usb)), len(api.VM.get_VGPUs(gpu)), len(api.VM.get_VTPMs(tpm))] == [1, 2, 1]
    for call in (api.VM.snapshot, api.VM.checkpoint):
        assert refused(call, usb, 'a snapshot') == ['VM_HAS_VUSBS', usb]
    assert refused(api.VM.suspend, usb) == ['VM_HAS_VUSBS', usb]
    for ref, code in ((gpu, 'VM_HAS_VGPU'), (pci, 'VM_HAS_PCI_ATTACHED')):
        assert refused(api.VM.checkpoint, ref, 'a checkpoint') == [code, ref]
        assert refused(api.VM.suspend, ref) == [code, ref]
        api.VM.destroy(api.VM.snapshot(ref, 'a snapshot'))
    assert refused(api.VM.assert_operation_valid, tpm, 'create_vtpm') == ['VTPM_MAX_AMOUNT_REACHED', '1']
    assert len(api.VM.get_attached_PCIs(pci)) == 2 and api.VM.get_other_config(pci)['pci']
    api.VM.hard_shutdown(pci)
    assert api.VM.get_attached_PCIs(pci) == [], 'they are attached while it runs'


def test_a_disk_that_is_reset_on_boot_or_shared_has_no_snapshot(a_pool: Any) -> None:
    pool = a_pool(vm('kiosk', disks=[disk(on_boot='reset')]), vm('cluster', disks=[disk(sharable=True)]),
                  vm('tracked', disks=[disk(cbt_enabled=True)]))
    session = pool.session()
    api = session.xenapi
    kiosk, cluster, tracked = (ref_of(session, name) for name in ('kiosk', 'cluster', 'tracked'))
    for call, ref in ((api.VM.snapshot, kiosk), (api.VDI.snapshot, disks_of(session, kiosk)[0])):
        assert refused(call, ref, *(['a snapshot'] if ref == kiosk else [{}])) == ['VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION']
    shared, = disks_of(session, cluster)
    assert refused(api.VM.snapshot, cluster, 'a snapshot') == ['VDI_IS_SHARABLE', shared]
    # xapi_vdi.ml set_on_boot: the field and the storage manager's note
    api.VDI.set_on_boot(disks_of(session, kiosk)[0], 'persist')
    api.VM.snapshot(kiosk, 'now')
    assert api.VDI.get_cbt_enabled(disks_of(session, tracked)[0]) is True
    assert refused(api.VDI.set_on_boot, disks_of(session, tracked)[0], 'reset') == [
        'VDI_CBT_ENABLED', disks_of(session, tracked)[0]]


def test_a_disk_that_the_storage_lost_or_that_has_no_sr_stops_its_vm_only(a_pool: Any) -> None:
    pool = a_pool(vm('lost', disks=[disk(missing=True)]), vm('null', disks=[disk(sr=None)]), vm('gone', disks=[disk(sr='?')]),
                  vm('sound'), srs=[STORE])
    session = pool.session()
    api = session.xenapi
    lost, null, gone = (disks_of(session, ref_of(session, name))[0] for name in ('lost', 'null', 'gone'))
    assert (api.VDI.get_missing(lost), api.VDI.get_SR(null)) == (True, NULL)
    assert refused(api.SR.get_record, api.VDI.get_SR(gone))[0] == 'HANDLE_INVALID'
    assert refused(api.VM.snapshot, ref_of(session, 'lost'), 'x')[:2] == ['SR_BACKEND_FAILURE_46', '']
    for name in ('null', 'gone'):
        assert refused(api.VM.snapshot, ref_of(session, name), 'x') == ['NO_HOSTS_AVAILABLE']
        answer, task = export(pool, session, ref_of(session, name))
        assert task['error_info'] == ['NO_HOSTS_AVAILABLE']
    assert refused(api.VDI.snapshot, null, {}) == ['HANDLE_INVALID', 'SR', NULL]
    assert refused(api.VDI.destroy, gone)[:2] == ['HANDLE_INVALID', 'SR']
    answer, task = export(pool, session, ref_of(session, 'lost'))
    assert task['error_info'] == ['VDI_MISSING', api.VDI.get_SR(lost), lost]
    assert len(api.VDI.get_all_records()) == 4, 'all are listed'
    api.VM.snapshot(ref_of(session, 'sound'), 'x')
    # and VM.destroy asks no storage
    for name in ('lost', 'null', 'gone'):
        api.VM.destroy(ref_of(session, name))


def test_references_to_nothing_in_drives_and_interfaces(a_pool: Any) -> None:
    # xapi_vm_helpers.ml assert_can_see_SRs: Db.VDI.get_SR fails for every host
    pool = a_pool(vm('cd', cds=[{'vdi': '?'}]), vm('vif', vifs=[{'network': '?'}], power_state='Running'), srs=[STORE])
    session = pool.session()
    api = session.xenapi
    cd, vif = ref_of(session, 'cd'), ref_of(session, 'vif')
    drive, = [record for record in map(api.VBD.get_record, api.VM.get_VBDs(cd)) if record['type'] == 'CD']
    assert not drive['empty'] and refused(api.VDI.get_record, drive['VDI'])[0] == 'HANDLE_INVALID'
    assert refused(api.VM.snapshot, cd, 'x') == ['NO_HOSTS_AVAILABLE']
    assert refused(api.network.get_record, api.VIF.get_network(api.VM.get_VIFs(vif)[0]))[0] == 'HANDLE_INVALID'
    snapshot = api.VM.snapshot(vif, 'x')
    archive = export(pool, session, snapshot)[0].body
    # import.ml VIF: the network that the interface names is not in the file
    _answer, task = import_of(pool, session, archive)
    assert task['error_info'][0] == 'IMPORT_ERROR_FAILED_TO_FIND_OBJECT'


def test_no_snapshot_of_itself_keeps_the_server_busy_for_ever(a_pool: Any) -> None:
    pool = a_pool(vm('web', snapshot_of_itself=True, snapshots=1, disks=[disk(snapshot_of='self')]), vm('sound'), srs=[STORE])
    session = pool.session()
    api = session.xenapi
    web = ref_of(session, 'web')
    disk_ref, = disks_of(session, web)
    assert (api.VM.get_snapshot_of(web), api.VM.get_is_a_snapshot(web)) == (web, False)
    assert web in api.VM.get_snapshots(web)
    assert (api.VDI.get_snapshot_of(disk_ref), api.VDI.get_is_a_snapshot(disk_ref)) == (disk_ref, False)
    # two that are each other's
    one, other = api.VM.snapshot(web, 'one'), api.VM.snapshot(web, 'other')
    assert pool.xe('vm-list', 'uuid=' + uuid_of(session, 'VM', web)).exit_status == 0
    for query in ({}, {'export_snapshots': 'true'}):
        assert 'web' in vm_fields(ova_of(get(pool, '/export_metadata', ref=web, **query).body), 'name_label')
    assert get(pool, '/export', ref=web).status == 200
    assert get(pool, '/export_raw_vdi', vdi=disk_ref).body == pool.read(uuid_of(session, 'VDI', disk_ref))
    api.VM.revert(one)
    assert refused(api.VM.revert, web) == ['REVERT_ONLY_ALLOWED_ON_SNAPSHOT']
    copy = api.VM.clone(web, 'a clone')
    for ref in (copy, other, web):
        api.VM.destroy(ref)
    assert api.VM.get_snapshot_of(one) == web, 'a reference to nothing now'
    assert not os.path.exists(os.path.join(pool.dir, 'bugs.txt'))


def test_an_sr_that_no_live_host_sees_takes_no_snapshot_and_destroys_nothing(a_pool: Any) -> None:
    # message_forwarding.ml choose_pbds_for_sr, do_op_on: storage work is forwarded to a host that has the SR plugged
    pool = a_pool(vm('here'), vm('there', disks=[disk(sr='local xcp2')], snapshots=1), hosts=TWO_HOSTS,
                  srs=[STORE, {'name_label': 'local xcp2', 'type': 'ext', 'host': 'xcp1'}])
    session = pool.session()
    api = session.xenapi
    there, here = ref_of(session, 'there'), ref_of(session, 'here')
    sr = api.SR.get_by_name_label('local xcp2')[0]
    snapshot = disks_of(session, api.VM.get_snapshots(there)[0])[0]
    api.PBD.unplug(api.SR.get_PBDs(sr)[0])
    fields = {'SR': sr, 'virtual_size': str(MEBIBYTE), 'type': 'user', 'sharable': False, 'read_only': False, 'other_config': {}}
    calls = [(api.VDI.snapshot, disks_of(session, there)[0], {}), (api.VDI.clone, snapshot, {}), (api.VDI.destroy, snapshot),
             (api.VDI.set_name_label, snapshot, 'x'), (api.VDI.create, fields), (api.SR.scan, sr)]
    for call, *arguments in calls:
        assert refused(call, *arguments) == ['SR_HAS_NO_PBDS', sr]
    assert refused(api.VM.snapshot, there, 'x') == ['NO_HOSTS_AVAILABLE']
    # of a shared SR the master is asked, whoever else has it plugged
    shared = api.SR.get_by_name_label('store')[0]
    master = [pbd for pbd in api.SR.get_PBDs(shared) if api.host.get_name_label(api.PBD.get_host(pbd)) == 'xcp1'][0]
    api.PBD.unplug(master)
    assert refused(api.VDI.snapshot, disks_of(session, here)[0], {}) == ['SR_HAS_NO_PBDS', shared]


def test_the_local_sr_of_a_dead_host_is_offline(a_pool: Any) -> None:
    pool = a_pool(vm('there', disks=[disk(sr='local xcp2')], power_state='Running', resident_on='xcp2'), hosts=TWO_HOSTS,
                  srs=[STORE, {'name_label': 'local xcp2', 'type': 'ext', 'host': 'xcp2'}])
    session = pool.session()
    api = session.xenapi
    dead = api.host.get_by_name_label('xcp2')[0]
    vdi, = disks_of(session, ref_of(session, 'there'))
    assert refused(api.VDI.snapshot, vdi, {}) == ['HOST_OFFLINE', dead]
    assert refused(api.VM.snapshot, ref_of(session, 'there'), 'x') == ['NO_HOSTS_AVAILABLE']
    api.VM.power_state_reset(ref_of(session, 'there'))
    assert refused(api.VDI.destroy, vdi) == ['HOST_OFFLINE', dead]
