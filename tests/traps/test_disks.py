"""What disks hold after what guests write to them, how they grow, and the space that all that takes.

Sources: the files named are those of xapi v24.19.2, those of sm say so; contents are as support/contents.py computes them.
"""

import sys
from typing import Any, Dict, List, Sequence

import pytest

from support.contents import block_of
from support.language import GIBIBYTE, MEBIBYTE, at, disk, vm
from support.process import CRON_PATH, SIMPOOL, Pool, Run, run
from test_traps import STORE, disks_of, get, ref_of, refused, uuid_of

SHRINKING = ['SR_BACKEND_FAILURE_79', '', 'VDI Invalid size [opterr=shrinking not allowed]', '']
NO_SPACE = ['SR_BACKEND_FAILURE_44', '', 'There is insufficient space', '']
ZEROS = -1


def write(pool: Pool, block: int, *more: str, vm_name: str = 'web') -> Run:
    return run([sys.executable, SIMPOOL, 'write', '--dir', pool.dir, '--vm', vm_name, '--device', 'xvda', '--block=%d' % block]
               + list(more), {'PATH': CRON_PATH})


def content(described: Dict[str, Any], generations: Sequence[int]) -> bytes:
    """What a disk of POOL.json holds whose blocks are of these generations."""
    return b''.join(block_of(described, number, max(0, generation)) if generation != ZEROS else
                    bytes(min(MEBIBYTE, described['size'] - number * MEBIBYTE)) for number, generation in enumerate(generations))


def first_disk(pool: Pool, session: Any, vm_ref: str) -> bytes:
    return pool.read(uuid_of(session, 'VDI', disks_of(session, vm_ref)[0]))


def used_in_store(session: Any) -> int:
    return int(session.xenapi.SR.get_physical_utilisation(session.xenapi.SR.get_by_name_label('store')[0]))


# --- What guests write -----------------------------------------------------------------------------------------------

#: The last block is cut short, the third was never written to.
CUT_SHORT = disk(size=3 * MEBIBYTE + 512, used=[[0, 2], [3, 1]], seed=5)


def test_a_guest_writes_as_many_blocks_as_it_is_told_or_zeros(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[CUT_SHORT]), vm('other'), faults=[at('api:VM.get_record', object='other', lose=0)])
    session = pool.session()
    web = ref_of(session, 'web')
    expected: List[Sequence[int]] = []

    def snapshot(*generations: int) -> None:
        """Made now, it goes on holding this, as does the disk until the next write."""
        session.xenapi.VM.snapshot(web, str(len(expected)))
        expected.append(generations)

    def assert_all_hold_what_they_froze() -> None:
        for number, generations in enumerate(expected):
            of, = session.xenapi.VM.get_by_name_label(str(number))
            assert first_disk(pool, session, of) == content(CUT_SHORT, generations), number
        assert first_disk(pool, session, web) == content(CUT_SHORT, expected[-1])

    snapshot(0, 0, 0, 0)
    assert write(pool, 1, '--count', '3') == Run(0, '', '')
    snapshot(0, 1, 1, 1)
    assert write(pool, 0, '--count', '2', '--zero').exit_status == 0
    snapshot(ZEROS, ZEROS, 1, 1)
    pool.stop()                                                     # without a server it is the same
    assert write(pool, 3, '--zero').exit_status == write(pool, 1, '--zero').exit_status == 0
    pool.start()
    session = pool.session()
    snapshot(ZEROS, ZEROS, 1, ZEROS)
    # What comes after zeros is none of what the block held before them.
    assert write(pool, 0, '--count', '4').exit_status == 0
    snapshot(1, 2, 2, 2)
    assert write(pool, 0).exit_status == 0
    snapshot(2, 2, 2, 2)
    assert_all_hold_what_they_froze()

    # The state was replayed; now it is written out as a whole, and read again.
    for generations in ((ZEROS, 2, 2, 2), (3, 2, 2, 2)):
        assert write(pool, 0, *(['--zero'] if generations[0] == ZEROS else [])).exit_status == 0
        snapshot(*generations)
        with pytest.raises(Exception):
            session.xenapi.VM.get_record(ref_of(session, 'other'))
        session = pool.session()
    pool.stop()
    pool.start()
    session = pool.session()
    assert_all_hold_what_they_froze()


def test_what_a_guest_writes_over_an_import_is_none_of_what_it_wrote_before(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=4 * MEBIBYTE, used=2)]))
    session = pool.session()
    web = ref_of(session, 'web')
    described = dict(disk(size=4 * MEBIBYTE, used=2))
    assert write(pool, 1).exit_status == 0
    uuid = uuid_of(session, 'VDI', disks_of(session, web)[0])
    assert pool.xe('vdi-import', 'uuid=' + uuid, 'filename=/dev/stdin', stdin=b'\xaa' * (4 * MEBIBYTE)).exit_status == 0
    assert write(pool, 1, '--count', '2').exit_status == 0
    assert pool.read(uuid) == b'\xaa' * MEBIBYTE + content(described, [0, 2, 1])[MEBIBYTE:] + b'\xaa' * MEBIBYTE


@pytest.mark.parametrize('serves', [True, False])
def test_a_write_that_is_not_all_on_the_disk_does_nothing(a_pool: Any, serves: bool) -> None:
    pool = a_pool(vm('web', disks=[CUT_SHORT]))
    session = pool.session()
    uuid = uuid_of(session, 'VDI', disks_of(session, ref_of(session, 'web'))[0])
    before = pool.read(uuid)
    if not serves:
        pool.stop()
    for block, more, told in ((4, [], 'the disk has no block 4'), (-1, ['--zero'], 'the disk has no block -1'),
                              (2, ['--count', '3'], 'the disk has no block 4'),
                              (0, ['--count', '0'], 'the number of blocks must be 1 or more, not 0'),
                              (1, ['--count', '-1'], 'the number of blocks must be 1 or more, not -1')):
        assert write(pool, block, *more) == Run(2, '', 'simpool: %s\n' % told)
    assert pool.read(uuid) == before


def test_zeros_of_a_guest_take_space_until_nothing_shows_them(a_pool: Any) -> None:
    # tapdisk allocates whatever is written; a snapshot keeps the version that it froze.
    pool = a_pool(vm('web', disks=[disk(size=8 * MEBIBYTE, used=2)]), srs=[STORE])
    session = pool.session()
    api = session.xenapi
    web = ref_of(session, 'web')
    vdi, = disks_of(session, web)
    empty = used_in_store(session) - 2 * MEBIBYTE
    snapshots = []
    for _ in range(3):
        snapshots.append(api.VM.snapshot(web, 'of web'))
        assert write(pool, 1, '--count', '3', '--zero').exit_status == 0
    assert int(api.VDI.get_physical_utilisation(vdi)) == 4 * MEBIBYTE
    overheads = used_in_store(session) - (2 + 3 * 3) * MEBIBYTE
    assert write(pool, 2).exit_status == write(pool, 2, '--zero').exit_status == 0
    assert used_in_store(session) == overheads + (2 + 3 * 3) * MEBIBYTE, 'a version that nothing has frozen is written over'
    for snapshot in snapshots:
        disks = disks_of(session, snapshot)
        api.VM.destroy(snapshot)
        api.VDI.destroy(disks[0])
    assert used_in_store(session) == empty + 4 * MEBIBYTE


def test_a_full_vhd_has_the_blocks_that_a_guest_wrote_zeros_to(a_pool: Any) -> None:
    # f.ml: every block that is allocated in the chain; raw and XVA know zeros only.
    pool = a_pool(vm('web', disks=[disk(size=8 * MEBIBYTE, used=1)]))
    session = pool.session()
    assert write(pool, 5, '--zero').exit_status == 0
    vdi, = disks_of(session, ref_of(session, 'web'))
    whole = get(pool, '/export_raw_vdi', vdi=vdi, format='vhd').body
    assert [whole[2048 + 4 * block:2052 + 4 * block] != b'\xff' * 4 for block in range(4)] == [True, False, True, False]
    assert len(whole) == 2048 + 512 + 2 * (512 + 2 * MEBIBYTE) + 512
    assert whole[-512 - 2 * MEBIBYTE:-512] == bytes(2 * MEBIBYTE)


def test_a_guest_writes_up_to_the_block_that_does_not_fit(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=8 * MEBIBYTE, used=0)]), srs=[dict(STORE, size=3 * MEBIBYTE + 65536)])
    session = pool.session()
    uuid = uuid_of(session, 'VDI', disks_of(session, ref_of(session, 'web'))[0])
    for more in (['--zero'], []):
        result = write(pool, 0, '--count', '5', *more)
        assert (result.exit_status, result.stdout) == (2, '') and 'SR_BACKEND_FAILURE_44' in result.stderr
    assert session.xenapi.VDI.get_physical_utilisation(session.xenapi.VDI.get_by_uuid(uuid)) == str(3 * MEBIBYTE)
    assert [bool(pool.read(uuid)[number * MEBIBYTE:][:MEBIBYTE].strip(b'\0')) for number in range(5)] == [True] * 3 + [False] * 2


# --- Disks that grow -------------------------------------------------------------------------------------------------

def test_a_disk_grows_by_whole_blocks_of_zeros_and_is_never_made_smaller(a_pool: Any) -> None:
    # xapi_vdi.ml resize; sm, FileSR.py resize_online and vhdutil.py validate_and_round_vhd_size
    pool = a_pool(vm('web', disks=[CUT_SHORT]), srs=[STORE])
    session = pool.session()
    api = session.xenapi
    web = ref_of(session, 'web')
    vdi, = disks_of(session, web)
    uuid, sr = uuid_of(session, 'VDI', vdi), api.VDI.get_SR(vdi)
    assert write(pool, 3).exit_status == 0
    frozen, = disks_of(session, api.VM.snapshot(web, 'before'))
    before = pool.read(uuid)
    for smaller in (0, MEBIBYTE, 3 * MEBIBYTE):
        assert refused(api.VDI.resize, vdi, str(smaller)) == SHRINKING
    assert refused(api.VDI.resize, vdi, str(2040 * GIBIBYTE + 1))[:3] == [
        'SR_BACKEND_FAILURE_79', '', 'VDI Invalid size [opterr=VDI size must be between 1 MB and 2088960 MB]']
    api.VDI.resize(vdi, str(len(before)))
    assert api.VDI.get_virtual_size(vdi) == str(len(before)), 'its own size is left as it is'

    api.VDI.resize(vdi, str(6 * MEBIBYTE + 1))
    assert api.VDI.get_virtual_size(vdi) == str(8 * MEBIBYTE)
    assert api.SR.get_virtual_allocation(sr) == str(8 * MEBIBYTE + len(before))
    assert refused(api.VDI.resize, vdi, str(6 * MEBIBYTE + 1)) == SHRINKING
    grown = before + bytes(8 * MEBIBYTE - len(before))
    for _ in ('while it serves', 'after a restart'):
        assert pool.read(uuid) == grown
        assert pool.read(uuid_of(session, 'VDI', frozen)) == before
        pool.stop()
        pool.start()
        session = pool.session()
    assert write(pool, 3, '--count', '5').exit_status == 0
    after = dict(CUT_SHORT, size=8 * MEBIBYTE)
    assert pool.read(uuid) == content(after, [0, 0, 0, 2, 1, 1, 1, 1])
    exported = get(pool, '/export_raw_vdi', vdi=vdi, format='raw').body
    assert exported == pool.read(uuid)


def test_a_disk_that_anything_holds_does_not_grow(a_pool: Any) -> None:
    # xapi_vdi.ml check_operation_error: no live operation, unlike a snapshot
    pool = a_pool(vm('up', power_state='Running'), vm('asleep', power_state='Suspended', memory=8 * MEBIBYTE),
                  vm('iso', cds=[{'userdevice': '3', 'empty': False, 'sr': 'images', 'name_label': 'a.iso'}]),
                  srs=[STORE, {'name_label': 'images', 'type': 'iso', 'shared': True}])
    session = pool.session()
    api = session.xenapi
    larger = str(16 * MEBIBYTE)
    for name in ('up', 'asleep'):
        vdi, = disks_of(session, ref_of(session, name))
        assert refused(api.VDI.resize, vdi, larger) == ['VDI_IN_USE', vdi, 'resize']
        result = pool.xe('vdi-resize', 'uuid=' + uuid_of(session, 'VDI', vdi), 'disk-size=16MiB')
        assert result.exit_status == 1 and result.stderr.endswith('\noperation: resize\n')
    iso, = [ref for ref in api.VDI.get_all() if api.SR.get_name_label(api.VDI.get_SR(ref)) == 'images']
    assert refused(api.VDI.resize, iso, str(GIBIBYTE)) == ['SR_OPERATION_NOT_SUPPORTED', api.VDI.get_SR(iso)]
    api.VM.hard_shutdown(ref_of(session, 'up'))
    vdi, = disks_of(session, ref_of(session, 'up'))
    pbd, = api.SR.get_PBDs(api.VDI.get_SR(vdi))
    api.PBD.unplug(pbd)
    assert refused(api.VDI.resize, vdi, larger) == ['SR_HAS_NO_PBDS', api.VDI.get_SR(vdi)]
    api.PBD.plug(pbd)
    assert api.VDI.get_virtual_size(vdi) == str(4 * MEBIBYTE)
    api.VDI.resize(vdi, larger)
    assert api.VDI.get_virtual_size(vdi) == larger


@pytest.mark.parametrize('kind', ['lvm', 'nfs'])
def test_growing_takes_space_where_disks_are_allocated_whole(a_pool: Any, kind: str) -> None:
    pool = a_pool(vm('web', disks=[disk(size=4 * MEBIBYTE, used=1)]), srs=[dict(STORE, type=kind, size=16 * MEBIBYTE)])
    session = pool.session()
    api = session.xenapi
    vdi, = disks_of(session, ref_of(session, 'web'))
    before = used_in_store(session)
    if kind == 'lvm':
        assert refused(api.VDI.resize, vdi, str(32 * MEBIBYTE)) == NO_SPACE
        assert (used_in_store(session), api.VDI.get_virtual_size(vdi)) == (before, str(4 * MEBIBYTE))
    size = (12 if kind == 'lvm' else 512) * MEBIBYTE
    api.VDI.resize(vdi, str(size))
    pool.stop()
    pool.start()
    session = pool.session()
    assert used_in_store(session) == before + (size - 4 * MEBIBYTE if kind == 'lvm' else 0)
    assert session.xenapi.VDI.get_virtual_size(vdi) == str(size)
    session.xenapi.VDI.destroy(vdi)
    assert used_in_store(session) == 0


def test_a_disk_that_grew_before_the_server_lost_its_memory_has_the_size_that_the_storage_has(a_pool: Any) -> None:
    # xapi_sr.ml scan: virtual_size is what the storage manager says
    pool = a_pool(vm('web'), vm('other'), faults=[at('api:VM.get_record', object='other', lose=3600)])
    session = pool.session()
    vdi, = disks_of(session, ref_of(session, 'web'))
    session.xenapi.VDI.resize(vdi, str(8 * MEBIBYTE))
    with pytest.raises(Exception):
        session.xenapi.VM.get_record(ref_of(session, 'other'))
    api = pool.session().xenapi
    assert api.VDI.get_virtual_size(vdi) == str(4 * MEBIBYTE)
    api.SR.scan(api.VDI.get_SR(vdi))
    assert api.VDI.get_virtual_size(vdi) == str(8 * MEBIBYTE)


def test_xe_grows_a_disk_by_the_words_that_it_knows(a_pool: Any) -> None:
    # cli_operations.ml vdi_resize, record_util.ml bytes_of_string
    pool = a_pool(vm('web'), vm('up', power_state='Running'))
    session = pool.session()
    vdi, = disks_of(session, ref_of(session, 'web'))
    uuid = 'uuid=' + uuid_of(session, 'VDI', vdi)
    for word, mebibytes in (('4194304', 4), ('5MiB', 6), ('8192KiB', 8), ('1GiB', 1024), ('1073741825bytes', 1026), ('2TiB', 0)):
        result = pool.xe('vdi-resize', uuid, 'disk-size=' + word)
        if mebibytes:
            assert result == Run(0, '', '')
            assert session.xenapi.VDI.get_virtual_size(vdi) == str(mebibytes * MEBIBYTE)
    assert result == Run(1, '', 'Error code: SR_BACKEND_FAILURE_79\nError parameters: , VDI Invalid size '
                                '[opterr=VDI size must be between 1 MB and 2088960 MB], \n')
    assert pool.xe('vdi-resize', uuid, 'disk-size=1GiB') == Run(
        1, '', 'Error code: SR_BACKEND_FAILURE_79\nError parameters: , VDI Invalid size [opterr=shrinking not allowed], \n')
    for word, told in (('2GB', "Unknown suffix: 'GB' (try KiB, MiB, GiB or TiB)"),
                       ('GiB', 'expecting an integer (possibly with suffix)'),
                       ('', 'expecting an integer (possibly with suffix)')):
        assert pool.xe('vdi-resize', uuid, 'disk-size=' + word) == Run(
            1, '', "Error: Failed to parse field 'disk-size': %s\n" % told)
    assert pool.xe('vdi-resize', uuid) == Run(1, '', "Required parameter not found: disk-size\nFor usage run: 'xe help'\n")
    nowhere = pool.xe('vdi-resize', 'uuid=12345678-1234-4234-8234-123456789abc', 'disk-size=GB')
    assert nowhere.stderr.startswith('The uuid you supplied was invalid.\ntype: VDI\n')
    # Nothing but `true` is online, which no server has had since 7.3.
    assert pool.xe('vdi-resize', uuid, 'disk-size=2GiB', 'online=yes') == Run(0, '', '')
    assert pool.xe('vdi-resize', uuid, 'disk-size=3GiB', '--online') == Run(1, '', 'This function is no longer available.\n')
    assert session.xenapi.VDI.get_virtual_size(vdi) == str(2 * GIBIBYTE)
    assert 'reqd params     : uuid, disk-size\n' in pool.xe('help', 'vdi-resize').stdout


def test_no_storage_grows_a_disk_online(a_pool: Any) -> None:
    # datamodel.ml VDI.resize_online: removed with 7.3; before, it took a feature that no storage manager has
    for version, code in (('1.14.41', 'SR_OPERATION_NOT_SUPPORTED'), ('1.60.7', 'MESSAGE_REMOVED'), ('24.19.2', 'MESSAGE_REMOVED')):
        pool = a_pool(vm('web'), xapi_version=version)
        session = pool.session()
        vdi, = disks_of(session, ref_of(session, 'web'))
        assert refused(session.xenapi.VDI.resize_online, vdi, str(GIBIBYTE))[0] == code
        assert session.xenapi.VDI.get_virtual_size(vdi) == str(4 * MEBIBYTE)


# --- Disks that move -------------------------------------------------------------------------------------------------

ELSEWHERE = {'name_label': 'elsewhere', 'type': 'nfs', 'shared': True, 'size': 1 << 40}


def sr_of(session: Any, name: str) -> str:
    return session.xenapi.SR.get_by_name_label(name)[0]


def used_in(session: Any, name: str) -> int:
    return int(session.xenapi.SR.get_physical_utilisation(sr_of(session, name)))


def test_a_disk_that_moves_is_another_and_the_disks_of_the_vms_snapshots_go_with_it(a_pool: Any) -> None:
    # xapi_vm_migrate.ml vdi_pool_migrate, migrate_send', vdi_copy_fun, update_snapshot_info, intra_pool_vdi_remap
    root = disk(size=8 * MEBIBYTE, used=5, seed=3, name_label='root', other_config={'ours': '1'})
    pool = a_pool(vm('web', power_state='Running', disks=[root, disk(seed=4)]), srs=[STORE, ELSEWHERE])
    session = pool.session()
    api = session.xenapi
    web = ref_of(session, 'web')
    first, second = disks_of(session, web)
    assert write(pool, 1).exit_status == 0
    snapshot = api.VM.snapshot(web, 'of web')
    frozen, other = disks_of(session, snapshot)
    alone = api.VDI.snapshot(first)
    assert write(pool, 0, '--count', '2').exit_status == 0
    assert write(pool, 6).exit_status == write(pool, 6, '--zero').exit_status == 0
    held = {vdi: pool.read(uuid_of(session, 'VDI', vdi)) for vdi in (first, frozen, alone)}
    at_that_time = api.VDI.get_snapshot_time(frozen)
    old = uuid_of(session, 'VDI', first)
    moved = pool.xe('vdi-pool-migrate', 'uuid=' + old, 'sr-uuid=' + uuid_of(session, 'SR', sr_of(session, 'elsewhere')))
    assert (moved.exit_status, moved.stderr) == (0, '')
    uuid = moved.stdout.strip()
    assert uuid != old and refused(api.VDI.get_by_uuid, old)[0] == 'UUID_INVALID'
    new, there = disks_of(session, web)
    assert api.VDI.get_uuid(new) == uuid and there == second, 'the VM has it in the place of the old one'
    record = api.VDI.get_record(new)
    assert (record['name_label'], record['other_config'], record['SR']) == ('root', {}, sr_of(session, 'elsewhere'))
    assert api.VBD.get_currently_attached(record['VBDs'][0]) and not record['is_a_snapshot']
    went, stayed = disks_of(session, snapshot)
    assert went != frozen and stayed == other
    assert (api.VDI.get_SR(went), api.VDI.get_is_a_snapshot(went), api.VDI.get_snapshot_of(went),
            api.VDI.get_snapshot_time(went)) == (sr_of(session, 'elsewhere'), True, new, at_that_time)
    for gone in (first, frozen):
        assert refused(api.VDI.get_record, gone)[0] == 'HANDLE_INVALID'
    # A snapshot of the disk alone is of nothing now.
    assert (api.VDI.get_SR(alone), api.VDI.get_snapshot_of(alone)) == (sr_of(session, 'store'), first)
    assert pool.read(uuid) == held[first] == content(root, [1, 2, 0, 0, 0, 0, ZEROS, 0])
    assert write(pool, 6, '--count', '2').exit_status == 0
    expected = content(root, [1, 2, 0, 0, 0, 0, 2, 1])
    for _ in ('while it serves', 'after a restart'):
        for vdi, bytes_then in ((new, expected), (went, held[frozen]), (alone, held[alone])):
            assert pool.read(uuid_of(session, 'VDI', vdi)) == bytes_then
        pool.stop()
        pool.start()
        session = pool.session()


def test_what_was_imported_moves_too_and_is_in_use_nowhere_else_afterwards(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=4 * MEBIBYTE, used=0)]), srs=[STORE, ELSEWHERE])
    session = pool.session()
    api = session.xenapi
    vdi, = disks_of(session, ref_of(session, 'web'))
    data = b'\xaa' * (3 * MEBIBYTE) + bytes(MEBIBYTE)
    assert pool.xe('vdi-import', 'uuid=' + uuid_of(session, 'VDI', vdi), 'filename=/dev/stdin', stdin=data).exit_status == 0
    used = used_in(session, 'store')
    new = api.VDI.pool_migrate(vdi, sr_of(session, 'elsewhere'), {})
    assert (used_in(session, 'store'), used_in(session, 'elsewhere')) == (0, used)
    assert write(pool, 1).exit_status == 0
    pool.stop()
    pool.start()
    assert pool.read(uuid_of(pool.session(), 'VDI', new)) == data[:MEBIBYTE] + block_of(disk(), 1, 1) + data[2 * MEBIBYTE:]


def test_a_disk_does_not_move_where_or_when_it_can_not(a_pool: Any) -> None:
    pool = a_pool(vm('web', power_state='Running', resident_on='xcp1', disks=[disk(name_label='root')]),
                  vm('tracked', disks=[disk(cbt_enabled=True)]), vm('reset', disks=[disk(), disk(on_boot='reset')]),
                  vm('large', disks=[disk(size=16 * MEBIBYTE, used=8)], snapshots=1), vm('halted'),
                  hosts=[{'name_label': 'xcp1'}, {'name_label': 'xcp2'}],
                  srs=[STORE, ELSEWHERE, {'name_label': 'images', 'type': 'iso', 'shared': True},
                       {'name_label': 'small', 'type': 'nfs', 'shared': True, 'size': 12 * MEBIBYTE},
                       {'name_label': 'of xcp2', 'type': 'ext', 'host': 'xcp2'}])
    session = pool.session()
    api = session.xenapi
    places = {name: sr_of(session, name) for name in ('store', 'elsewhere', 'images', 'small', 'of xcp2')}
    disks = {name: disks_of(session, ref_of(session, name)) for name in ('web', 'tracked', 'reset', 'large', 'halted')}

    def moving(vdi: str, sr: str) -> List[str]:
        return refused(api.VDI.pool_migrate, vdi, places[sr], {})

    before = pool.dump()['VDI']
    alone = api.VDI.snapshot(disks['web'][0])
    assert moving(alone, 'elsewhere') == ['VDI_NEEDS_VM_FOR_MIGRATE', alone]
    api.VDI.destroy(alone)
    snapshot, = api.VM.get_snapshots(ref_of(session, 'large'))
    assert moving(disks_of(session, snapshot)[0], 'elsewhere')[0] == 'VM_IS_SNAPSHOT'
    assert moving(disks['tracked'][0], 'elsewhere') == ['VDI_CBT_ENABLED', disks['tracked'][0]]
    assert moving(disks['reset'][0], 'elsewhere')[0] == 'VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION'
    assert moving(disks['web'][0], 'images') == ['SR_DOES_NOT_SUPPORT_MIGRATION', places['images']]
    assert moving(disks['web'][0], 'of xcp2') == ['NO_HOSTS_AVAILABLE']
    assert moving(disks['large'][0], 'small') == NO_SPACE, 'there is room for one of the two'
    assert used_in(session, 'small') == 0
    assert api.VDI.pool_migrate(disks['web'][0], places['store'], {}) == disks['web'][0], 'it is there already'
    after = pool.dump()['VDI']
    assert set(after) == set(before)
    assert all(after[ref]['SR'] == before[ref]['SR'] and after[ref]['current_operations'] == {} for ref in before)
    # A halted VM's goes wherever a host sees all of it.
    assert api.VDI.get_SR(api.VDI.pool_migrate(disks['halted'][0], places['of xcp2'], {})) == places['of xcp2']


# --- Disks without data ----------------------------------------------------------------------------------------------

def test_a_snapshot_whose_data_are_destroyed_is_neither_base_nor_disk(a_pool: Any, tmp_path: Any) -> None:
    # xapi_vdi.ml _data_destroy; its name for failures is record_util.ml's
    pool = a_pool(vm('web', disks=[disk(size=8 * MEBIBYTE, used=4, cbt_enabled=True), disk()]), srs=[STORE])
    session = pool.session()
    api = session.xenapi
    first, second = disks_of(session, ref_of(session, 'web'))
    used = used_in_store(session)
    base, untracked = api.VDI.snapshot(first), api.VDI.snapshot(second)
    assert refused(api.VDI.data_destroy, first) == ['OPERATION_NOT_ALLOWED', 'VDI is not a snapshot: ' + first]
    assert refused(api.VDI.data_destroy, untracked) == ['VDI_NO_CBT_METADATA', untracked]
    api.VDI.destroy(untracked)
    for _ in ('data', 'nothing left to do'):
        assert pool.xe('vdi-data-destroy', 'uuid=' + uuid_of(session, 'VDI', base)) == Run(0, '', '')
    assert used_in_store(session) == used and api.VDI.get_type(base) == 'cbt_metadata'
    path = str(tmp_path / 'x.vhd')
    for words in (['uuid=' + uuid_of(session, 'VDI', first), 'base=' + uuid_of(session, 'VDI', base)],
                  ['uuid=' + uuid_of(session, 'VDI', base)]):
        result = pool.xe('vdi-export', 'format=vhd', 'filename=' + path, *words)
        assert (result.exit_status, result.stderr.splitlines()[-2:]) == (
            1, ['vdi: %s (%s)' % (uuid_of(session, 'VDI', base), api.VDI.get_name_label(base)), 'type: CBT metadata'])
        with open(path, 'rb') as file:
            assert file.read().startswith(b'HTTP/1.0 500 Internal Error\r\n')
        (tmp_path / 'x.vhd').unlink()
    incompatible = ['VDI_INCOMPATIBLE_TYPE', base, 'CBT metadata']
    for call, more in ((api.VDI.snapshot, ()), (api.VDI.clone, ()), (api.VDI.resize, (str(GIBIBYTE),))):
        assert refused(call, base, *more) == incompatible
    pool.stop()
    pool.start()
    api = pool.session().xenapi
    assert api.VDI.get_type(base) == 'cbt_metadata'
    api.VDI.destroy(base)
    assert refused(api.VDI.get_record, base)[0] == 'HANDLE_INVALID'


def test_the_data_of_a_vm_snapshots_disk_are_not_destroyed_below_it(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(cbt_enabled=True)]))
    session = pool.session()
    vdi, = disks_of(session, session.xenapi.VM.snapshot(ref_of(session, 'web'), 'of web'))
    assert refused(session.xenapi.VDI.data_destroy, vdi) == ['VDI_IN_USE', vdi, 'data_destroy']
    assert session.xenapi.VDI.get_type(vdi) == 'system' and len(pool.read(uuid_of(session, 'VDI', vdi))) == 4 * MEBIBYTE


# --- SRs as POOL.json has them ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('keys, whole', [({'type': 'lvm'}, True), ({'type': 'nfs'}, False),
                                         ({'type': 'nfs', 'thick': True}, True), ({'type': 'lvmoiscsi', 'thick': False}, False)])
def test_a_snapshot_takes_what_is_written_where_disks_are_allocated_whole(a_pool: Any, keys: Dict[str, Any], whole: bool) -> None:
    # sm, LVHDSR.py: the live disk keeps its whole size, a snapshot has what was written to it
    pool = a_pool(vm('web', disks=[disk(size=32 * MEBIBYTE, used=8)]), srs=[dict(STORE, size=50 * MEBIBYTE, **keys)])
    session = pool.session()
    api = session.xenapi
    web = ref_of(session, 'web')
    vdi, = disks_of(session, web)
    empty = used_in_store(session)
    assert empty // MEBIBYTE == (32 if whole else 8)
    first = api.VDI.snapshot(vdi)
    assert (used_in_store(session) - empty) // MEBIBYTE == (8 if whole else 0)
    assert write(pool, 8, '--count', '4').exit_status == 0
    if whole:
        assert refused(api.VDI.snapshot, vdi) == refused(api.VM.snapshot, web, 'of web') == NO_SPACE
        assert pool.xe('vdi-snapshot', 'uuid=' + uuid_of(session, 'VDI', vdi)) == Run(
            1, '', 'Error code: SR_BACKEND_FAILURE_44\nError parameters: , There is insufficient space, \n')
    pool.stop()
    pool.start()
    session = pool.session()
    api = session.xenapi
    before = used_in_store(session)
    api.VDI.destroy(first)
    assert (before - used_in_store(session)) // MEBIBYTE == (8 if whole else 0)
    api.VDI.snapshot(vdi)


def test_snapshots_are_made_where_disks_are_no_vhds(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(seed=1)]), srs=[dict(STORE, vhd=False)])
    session = pool.session()
    snapshot, = disks_of(session, session.xenapi.VM.snapshot(ref_of(session, 'web'), 'of web'))
    before = pool.read(uuid_of(session, 'VDI', snapshot))
    assert write(pool, 0).exit_status == 0
    assert pool.read(uuid_of(session, 'VDI', snapshot)) == before == content(disk(seed=1), [0, 0, 0, 0])
