"""VMs of every shape come back: disks as large as they get, many of them, VMs with snapshots of all ages."""

import contextlib
import hashlib
import os
from typing import Any, Dict, Iterator, Sequence, Tuple

import pytest

from support.archive import SECTOR_BYTES
from support.contents import block_of
from support.deeds import backup
from support.language import GIBIBYTE, MEBIBYTE, disk, vm
from support.recovery import destroy, disks_of, drill, machine, objects, restore

TEBIBYTE = 1024 * GIBIBYTE
LARGEST_VHD = 2040 * GIBIBYTE
MANY = [disk(size=size, used=used, seed=seed) for seed, (size, used) in enumerate([
    (5 * MEBIBYTE + 512, [[5, 1]]), (512, [[0, 1]]), (MEBIBYTE, []), (3 * MEBIBYTE, [[0, 3]]), (700 * MEBIBYTE, [[350, 2]]),
    (2 * MEBIBYTE, [[1, 1]]), (40 * GIBIBYTE, [[0, 1], [12345, 1], [40959, 1]]), (4 * MEBIBYTE, [[1, 2]]),
    (6 * MEBIBYTE, [[5, 1]]), (7 * MEBIBYTE, [[0, 1], [6, 1]]), (2 * MEBIBYTE, []), (8 * MEBIBYTE, [[2, 3]])])]
LARGE = [disk(size=LARGEST_VHD, used=[[2088959, 1]], seed=102), disk(size=LARGEST_VHD, used=[], seed=103)]
BEYOND_VHD = disk(size=2 * TEBIBYTE, used=[[0, 1], [1048576, 2], [2097151, 1]], seed=101)

Blocks = Dict[int, str]


def expected(one: Dict[str, Any], generations: Dict[int, int]) -> Blocks:
    """The digests of the MiBs of that disk of POOL.json that are not zeros; `generations`: how often each was written."""
    numbers = {number for first, count in one['used'] for number in range(first, first + count)} | set(generations)
    return {number: digest(block_of(one, number, generations.get(number, 0))) for number in numbers}


def found(pool: Any, vdi: Dict[str, Any], folder: Any) -> Blocks:
    """The same of a disk in the pool, by a tar export of it, which leaves out what is empty."""
    path = str(folder / 'disk.tar')
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    run = pool.xe('vdi-export', 'uuid=' + vdi['uuid'], 'format=tar', 'filename=' + path)
    assert run.exit_status == 0, run
    with open(path, 'rb') as file:
        return {int(name[len('vdi/'):]): digest(content) for name, content in members(file)
                if name[len('vdi/'):].isdigit() and content.strip(b'\0')}


def digest(block: bytes) -> str:
    return hashlib.sha256(block.rstrip(b'\0')).hexdigest()


def members(file: Any) -> Iterator[Tuple[str, bytes]]:
    """Name and content of each member of a tar archive."""
    while True:
        header = file.read(SECTOR_BYTES)
        if not header.strip(b'\0'):
            return
        size = int(header[124:136].split(b'\0')[0], 8)
        yield header[:100].rstrip(b'\0').decode('utf-8'), file.read(size)
        file.read(-size % SECTOR_BYTES)


def has_them_all(pool: Any, name: str, folder: Any, disks: Sequence[Dict[str, Any]], generations: Dict[int, int]) -> None:
    """Fails unless that VM has these disks, MiB by MiB; `generations`: of the blocks of its first disk."""
    vdis = disks_of(pool, name)
    assert sorted(vdis, key=int) == [str(number) for number in range(len(disks))]
    for number, one in enumerate(disks):
        vdi = vdis[str(number)]
        assert 0 <= int(vdi['virtual_size']) - one['size'] < 2 * MEBIBYTE, number
        assert found(pool, vdi, folder) == expected(one, {} if number else generations), number


@pytest.mark.parametrize('line', ['compress=none', 'compress=gzip'])
def test_many_disks_of_all_sizes_come_back_each_to_its_place(a_pool: Any, a_shelf: Any, tmp_path: Any, line: str) -> None:
    pool, shelf = a_pool(vm('web', disks=MANY)), a_shelf()
    assert backup(pool, shelf, 'vm-export=*', line).exit_status == 0
    run = restore(pool, shelf, 'web', 'to=back')
    assert run.exit_status == 0, run
    has_them_all(pool, 'back', tmp_path, MANY, {})
    assert drill(pool, shelf, 'web').exit_status == 0


def test_disks_as_large_as_a_vhd_can_be_come_back_and_are_drilled(a_pool: Any, a_shelf: Any, tmp_path: Any) -> None:
    srs = [{'name_label': 'store', 'size': 64 * TEBIBYTE}]
    pool, shelf = a_pool(vm('web', disks=LARGE), srs=srs), a_shelf()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    run = restore(pool, shelf, 'web', 'to=back')
    assert run.exit_status == 0, run
    has_them_all(pool, 'back', tmp_path, LARGE, {})
    before = {kind: set(rows) for kind, rows in objects(pool).items()}
    assert drill(pool, shelf, 'web').exit_status == 0
    assert {kind: set(rows) for kind, rows in objects(pool).items()} == before


@pytest.mark.parametrize('line', ['compress=none', 'compress=gzip'])
def test_a_disk_of_two_tebibytes_among_others_comes_back(a_pool: Any, a_shelf: Any, tmp_path: Any, line: str) -> None:
    disks = [MANY[0], BEYOND_VHD, MANY[3]]
    pool, shelf = a_pool(vm('web', disks=disks), srs=[{'name_label': 'store', 'size': 64 * TEBIBYTE}]), a_shelf()
    assert backup(pool, shelf, 'vm-export=*', line).exit_status == 0
    destroy(pool, 'web')
    run = restore(pool, shelf, 'web', 'preserve=yes')
    assert run.exit_status == 0, run
    has_them_all(pool, 'web', tmp_path, disks, {})


# --- Snapshots --------------------------------------------------------------------------------------------------------------

ROOT = disk(size=8 * MEBIBYTE, used=[[0, 3]], seed=7)


def written(pool: Any, *blocks: int) -> None:
    """The guest writes to these blocks of its first disk."""
    for block in blocks:
        pool.command('write', '--dir', pool.dir, '--vm', 'web', '--device', 'xvda', '--block', str(block))


@pytest.mark.parametrize('kind', ['vm-export', 'vdi-export'])
def test_a_vm_with_snapshots_comes_back_as_it_was_at_the_backup_and_they_stay(a_pool: Any, a_shelf: Any, tmp_path: Any, kind: str
                                                                             ) -> None:
    pool, shelf = a_pool(vm('web', disks=[ROOT], snapshots=2, power_state='Running')), a_shelf()
    session = pool.session()
    web = session.xenapi.VM.get_by_name_label('web')[0]
    written(pool, 1, 5)
    session.xenapi.VM.snapshot(web, 'in between')
    session.xenapi.VM.checkpoint(web, 'with its memory')
    written(pool, 1, 6)
    snapshots = sorted(session.xenapi.VM.get_snapshots(web))
    assert len(snapshots) == 4
    assert backup(pool, shelf, kind + '=*').exit_status == 0
    written(pool, 0, 1, 2)
    run = restore(pool, shelf, 'web', 'to=back')
    assert run.exit_status == 0, run
    has_them_all(pool, 'back', tmp_path, [ROOT], {1: 2, 5: 1, 6: 1})
    back = machine(pool, 'back')
    assert (back['snapshots'], back['parent'], back['children'], back['is_a_snapshot']) == ([], 'OpaqueRef:NULL', [], False)
    assert not any(vdi['is_a_snapshot'] or vdi['snapshots'] for vdi in disks_of(pool, 'back').values())
    assert sorted(session.xenapi.VM.get_snapshots(web)) == snapshots
    session.xenapi.VM.start(session.xenapi.VM.get_by_uuid(back['uuid']), False, False)
    assert drill(pool, shelf, 'web').exit_status == 0


def test_an_exported_snapshot_comes_back_as_a_vm(a_pool: Any, a_shelf: Any, tmp_path: Any) -> None:
    pool, shelf = a_pool(vm('web', disks=[ROOT], power_state='Running')), a_shelf()
    session = pool.session()
    written(pool, 1)
    snapshot = session.xenapi.VM.snapshot(session.xenapi.VM.get_by_name_label('web')[0], 'before upgrade')
    path = str(tmp_path / 'before upgrade.xva')
    uuid = session.xenapi.VM.get_uuid(snapshot)
    assert pool.xe('snapshot-export-to-template', 'snapshot-uuid=' + uuid, 'filename=' + path).exit_status == 0
    run = restore(pool, shelf, 'from=' + path)
    assert run.exit_status == 0, run
    has_them_all(pool, 'before upgrade', tmp_path, [ROOT], {1: 1})
    session.xenapi.VM.start(session.xenapi.VM.get_by_uuid(machine(pool, 'before upgrade')['uuid']), False, False)
