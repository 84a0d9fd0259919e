"""What disks hold after what guests write to them, and the space that it takes.

Sources: the files named are those of xapi v24.19.2; contents are as support/contents.py computes them.
"""

import sys
from typing import Any, Dict, List, Sequence

import pytest

from support.contents import block_of
from support.language import MEBIBYTE, at, disk, vm
from support.process import CRON_PATH, SIMPOOL, Pool, Run, run
from test_traps import STORE, disks_of, get, ref_of, uuid_of

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
