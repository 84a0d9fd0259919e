"""Damaged copies: the reason that is told is the copy's, and force=yes brings back all that can still be read."""

import os
import shutil
import subprocess
from typing import Any, Dict, List, Sequence, Tuple

import pytest

from support.language import MEBIBYTE, disk, vm
from support.process import Pool, run_program
from support.recovery import destroy, disks_of, extract, has_machine, machine, objects, restore
from support.shelf import Shelf, disk_content, of_old_program

ROOT = disk(size=40 * MEBIBYTE, used=[[0, 30], [35, 1]], seed=11, bootable=True, name_label='root', sr='fast')
DATA = disk(size=6 * MEBIBYTE, used=[[0, 2]], seed=12, name_label='data', sr='slow')
SRS = [{'name_label': 'fast'}, {'name_label': 'slow'}]
FORMATS = {'xva': ('vm-export=*',), 'raw': ('vdi-export=*',), 'vhd': ('vdi-export=*', 'vdi_export_format=vhd')}
EVERY = sorted(FORMATS)
COMPRESSIONS = ['none', 'gzip', pytest.param('zstd', marks=pytest.mark.needs_zstd)]
NAME = 'web (DAMAGED)'


def stored(a_backup: Any, disks: Sequence[Dict[str, Any]], *lines: str) -> Tuple[Pool, Shelf, str]:
    """A pool from which web with these disks is gone, the shelf with its copy, and the path of the image."""
    pool, shelf = a_backup(vm('web', disks=disks), srs=SRS, lines=lines)
    destroy(pool, 'web')
    copy = shelf.newest('web')
    return pool, shelf, shelf.at('web', copy, shelf.image('web', copy))


def flip(path: str, offset: int) -> None:
    """One bit of the byte there, from the end if negative, is another."""
    with open(path, 'r+b') as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def block_at(path: str, number: int) -> int:
    """Where that MiB of ROOT stands in a plain image."""
    with open(path, 'rb') as file:
        return file.read().index(disk_content(ROOT)[number * MEBIBYTE:number * MEBIBYTE + 64])


def differing(pool: Pool, one: Dict[str, Any], userdevice: str = '0') -> List[int]:
    """The MiBs of what came back that are not those of that disk."""
    found, expected = pool.read(disks_of(pool, NAME)[userdevice]['uuid']), disk_content(one)
    assert len(found) >= len(expected)
    return [number for number in range(-(-len(expected) // MEBIBYTE)) if
            found[number * MEBIBYTE:(number + 1) * MEBIBYTE].rstrip(b'\0') !=
            expected[number * MEBIBYTE:(number + 1) * MEBIBYTE].rstrip(b'\0')]


def forced(pool: Pool, shelf: Shelf, *words: str) -> Any:
    """The run of a restore that keeps what a damaged copy gives, which is told and never started."""
    run = restore(pool, shelf, 'web', 'force=yes', 'start=yes', *words)
    assert run.exit_status == 3 and run.says('IT IS DAMAGED: ') and run.says('the copy is damaged: '), run
    assert run.never_says('Nothing of it stays') and shelf.journals() == [], run
    assert machine(pool, NAME)['power_state'] == 'Halted' and not has_machine(pool, 'web')
    assert pool.dump()['task'] == {} and not [one for one in pool.dump()['VDI'].values() if not one['VBDs']], run
    return run


# --- What can still be read ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', EVERY)
def test_one_bad_block_costs_that_block_alone(a_backup: Any, kind: str) -> None:
    pool, shelf, path = stored(a_backup, [ROOT], *FORMATS[kind])
    flip(path, block_at(path, 7) + 5)
    run = forced(pool, shelf)
    assert differing(pool, ROOT) == [7] and run.says('its SHA-256 differs'), run


@pytest.mark.parametrize('kind', EVERY)
@pytest.mark.parametrize('compress', ['gzip', COMPRESSIONS[2]])
def test_a_bad_checksum_at_the_end_of_a_compressed_copy_costs_no_more_than_the_last_block(a_backup: Any, kind: str, compress: str) -> None:
    pool, shelf, path = stored(a_backup, [ROOT], *FORMATS[kind], 'compress=' + compress)
    flip(path, -8 if compress == 'gzip' else -1)
    run = forced(pool, shelf)
    assert set(differing(pool, ROOT)) <= {35} and run.says('the %s file is damaged' % compress), run


@pytest.mark.parametrize('kind', EVERY)
@pytest.mark.parametrize('compress', COMPRESSIONS)
def test_a_copy_that_was_cut_off_gives_its_beginning(a_backup: Any, kind: str, compress: str) -> None:
    pool, shelf, path = stored(a_backup, [ROOT], *FORMATS[kind], 'compress=' + compress)
    os.truncate(path, os.path.getsize(path) * 3 // 4 + 77)
    copy = os.path.basename(os.path.dirname(path))
    refused = restore(pool, shelf, 'web', 'from=' + copy)
    assert refused.exit_status == 1 and refused.says('force=yes takes it all the same'), refused
    forced(pool, shelf, 'from=' + copy)
    lost = differing(pool, ROOT)
    assert lost and lost[0] >= 15 and lost == [number for number in list(range(30)) + [35] if number >= lost[0]]


def test_of_a_copy_for_several_srs_the_disks_behind_the_damage_are_named_as_lost(a_backup: Any) -> None:
    pool, shelf, path = stored(a_backup, [ROOT, DATA], 'vm-export=*')
    with open(path, 'rb') as file:
        content = file.read()
    first, second = sorted((content.index(disk_content(one)[:64]), one['name_label']) for one in (ROOT, DATA))
    os.truncate(path, first[0] + MEBIBYTE // 2)
    run = forced(pool, shelf, 'from=' + os.path.basename(os.path.dirname(path)))
    assert run.says('Of its disks nothing is there of: ') and run.says(second[1]), run
    assert [one['name_label'] for one in disks_of(pool, NAME).values()] == [first[1]]


@pytest.mark.parametrize('kind', ['raw', 'vhd'])
def test_of_a_copy_of_which_nothing_can_be_read_nothing_is_made(a_backup: Any, kind: str) -> None:
    pool, shelf, path = stored(a_backup, [ROOT], *FORMATS[kind], 'compress=gzip')
    flip(path, 0)
    before = objects(pool)
    run = restore(pool, shelf, 'web', 'force=yes')
    assert run.exit_status == 1 and run.says('nothing of it can be brought back') and run.says('the gzip file is damaged'), run
    assert objects(pool) == before and shelf.journals() == []


# --- What the older program left, without digests --------------------------------------------------------------------------

def of_old(a_pool: Any, a_shelf: Any, number: int) -> Any:
    """Pool, shelf and the path of one of its four images: an archive plain and gzipped, a raw image, a VHD."""
    shelf = a_shelf(of_old_program())
    pool = a_pool(vm('db'), srs=[{'name_label': 'here'}],
                  networks=[{'name_label': 'Pool-wide network associated with eth0', 'bridge': 'xenbr0'}])
    copy = sorted(name for name in os.listdir(shelf.at('PROD-web')) if name.startswith('backup-'))[number]
    return pool, shelf, shelf.at('PROD-web', copy, shelf.image('PROD-web', copy))


def test_damage_of_an_archive_without_digests_is_told_too(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf, path = of_old(a_pool, a_shelf, 0)
    with open(path, 'rb') as file:
        flip(path, file.read().index(b'/00000001\0') // 512 * 512 + 512 + 1000)
    run = restore(pool, shelf, 'PROD-web', 'from=' + os.path.basename(os.path.dirname(path)), 'sr=here', 'force=yes')
    assert run.exit_status == 3 and run.says('IT IS DAMAGED: ') and has_machine(pool, 'PROD-web (DAMAGED)'), run


@pytest.mark.parametrize('words, offset, status', [((), -8, 1), (('force=yes',), -8, 3), (('force=yes',), 0, 1)],
                         ids=['refused', 'forced', 'nothing to read'])
def test_a_damaged_disk_of_a_vm_known_by_its_cfg_files(a_pool: Any, a_shelf: Any, words: Sequence[str], offset: int, status: int
                                                       ) -> None:
    pool, shelf, path = of_old(a_pool, a_shelf, 2)
    os.unlink(os.path.join(os.path.dirname(path), 'vm-metadata.xml'))
    os.truncate(path, 5 * MEBIBYTE + 100)
    with open(os.path.join(os.path.dirname(path), 'vm.cfg'), 'w', encoding='utf-8') as file:
        file.write('name_label=PROD-web\nname_description=\nmemory_dynamic_max=268435456\nVCPUs_max=2\nVCPUs_at_startup=1\n'
                   'os_version=\norig_uuid=09383cc3-9408-98b4-bdf4-8a0d84e4be8e\n')
    subprocess.run(['gzip', path], check=True)
    flip(path + '.gz', offset)
    before = objects(pool)
    run = restore(pool, shelf, 'PROD-web', 'from=' + os.path.basename(os.path.dirname(path)), 'sr=here', *words)
    assert run.exit_status == status and run.says('the gzip file is damaged'), run
    assert shelf.journals() == [] and run.never_says('VDI_IO_ERROR')
    if status == 1:
        assert objects(pool) == before
    else:
        made, = [one for one in disks_of(pool, 'PROD-web (DAMAGED)').values()]
        expected = disk_content(disk(size=10 * MEBIBYTE, used=[[0, 3], [8, 1]], seed=11))[:5 * MEBIBYTE + 100]
        assert pool.read(made['uuid']).rstrip(b'\0') == expected.rstrip(b'\0')
        assert not [key for one in pool.dump()['VDI'].values() for key in one['other_config'] if key.startswith('vmbackup')]


# --- The reason that is told ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', EVERY)
@pytest.mark.parametrize('compress', COMPRESSIONS)
def test_the_copy_is_blamed_and_not_what_xe_says_of_a_stream_that_ends(a_backup: Any, kind: str, compress: str) -> None:
    pool, shelf, path = stored(a_backup, [ROOT], *FORMATS[kind], 'compress=' + compress)
    if compress == 'none':
        flip(path, block_at(path, 20))
    else:
        flip(path, -8 if compress == 'gzip' else -1)
    before = objects(pool)
    run = restore(pool, shelf, 'web')
    assert run.exit_status == 1 and run.says('the copy is damaged: ') and run.says('Nothing of it stays in the pool'), run
    assert run.never_says('prematurely') and objects(pool) == before and shelf.journals() == []


@pytest.mark.needs_zstd
def test_a_zstd_file_that_is_damaged_in_its_middle_is_called_that(a_shelf: Any, tmp_path: Any) -> None:
    plain = str(tmp_path / 'web.raw')
    with open(plain, 'wb') as file:
        file.write(os.urandom(24 * MEBIBYTE))
    subprocess.run([shutil.which('zstd') or 'zstd', '-q', '-1', plain], check=True)
    with open(plain + '.zst', 'r+b') as file:
        file.seek(2 * MEBIBYTE)
        file.write(b'\xff' * 300000)
    shelf = a_shelf()
    copy = shelf.at('web', 'backup-2026-11-20-(01:02:03)')
    os.makedirs(os.path.join(copy, 'DISK-xvda'))
    for name, text in (('success', ''), ('vm.cfg', 'name_label=web\nmemory_dynamic_max=1\n'),
                       ('DISK-xvda/vbd.cfg', 'userdevice=0\n'), ('DISK-xvda/vdi.cfg', 'virtual_size=%d\n' % (24 * MEBIBYTE))):
        with open(os.path.join(copy, name), 'w', encoding='utf-8') as file:
            file.write(text)
    shutil.move(plain + '.zst', os.path.join(copy, 'web.raw.zst'))
    run = extract(shelf, 'web', 'to=%s' % (tmp_path / 'disk'))
    assert run.exit_status == 1 and run.says('the zstd file is damaged') and run.never_says('Broken pipe'), run
    run = run_program('-', shelf.config('vm-export=*'), 'verify', 'web')
    assert run.exit_status == 1 and run.says('the zstd file is damaged') and run.never_says('Broken pipe'), run
