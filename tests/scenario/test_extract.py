"""Single disks without a pool: every format, proven while they are written, nothing left where they are not good."""

import json
import os
import shutil
from typing import Any

import pytest

from support import process
from support.deeds import backup
from support.language import GIBIBYTE, MEBIBYTE, disk, vm
from support.recovery import extract
from support.shelf import disk_content, of_old_program

ROOT = disk(size=9 * MEBIBYTE + 512, used=[[0, 3], [8, 2]], seed=11, name_label='root')
DATA = disk(size=6 * MEBIBYTE, used=[[1, 2]], seed=12, name_label='data')
KINDS = [('vm-export=*',), ('vm-export=*', 'compress=gzip'), pytest.param(('vm-export=*', 'compress=zstd'),
                                                                           marks=pytest.mark.needs_zstd),
         ('vdi-export=*',), ('vdi-export=*', 'vdi_export_format=vhd'), ('vdi-export=*', 'vdi_export_format=vhd', 'compress=gzip')]


def content(path: Any) -> bytes:
    with open(str(path), 'rb') as file:
        return file.read()


@pytest.mark.parametrize('lines', KINDS)
def test_a_disk_comes_out_of_every_format(a_backup: Any, tmp_path: Any, lines: Any) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT, DATA]), lines=lines)
    pool.stop()
    path = tmp_path / 'disk.raw'
    run = extract(shelf, 'web', 'disk=xvda', 'to=%s' % path)
    assert run.exit_status == 0 and run.says('its digests match'), run
    assert content(path)[:ROOT['size']] == disk_content(ROOT) and not content(path)[ROOT['size']:].strip(b'\0')
    assert os.listdir(str(tmp_path)) == ['disk.raw']
    if lines[0].startswith('vm'):
        assert extract(shelf, 'web', 'disk=data', 'to=%s' % (tmp_path / 'data')).exit_status == 0
        assert content(tmp_path / 'data') == disk_content(DATA)
    else:
        run = extract(shelf, 'web', 'disk=xvdb', 'to=%s' % (tmp_path / 'data'))
        assert run.exit_status == 2 and run.says('disk xvdb data (6.0 MiB) is not in it'), run


@pytest.mark.parametrize('lines', KINDS[3:] + [('vdi-export=*', 'compress=gzip')])
def test_an_image_that_stands_alone_is_enough(a_backup: Any, tmp_path: Any, lines: Any) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT, DATA]), lines=lines)
    pool.stop()
    name = shelf.manifest('web', shelf.newest('web'))['image']['name']
    os.mkdir(str(tmp_path / 'usb'))
    shutil.copy(shelf.at('web', shelf.newest('web'), name), str(tmp_path / 'usb'))
    run = extract(shelf, 'from=%s' % (tmp_path / 'usb' / name), 'to=%s' % (tmp_path / 'disk.raw'))
    assert run.exit_status == 0 and run.says('disk.raw: disk xvda ' + name), run
    found = content(tmp_path / 'disk.raw')
    assert found[:ROOT['size']] == disk_content(ROOT) and not found[ROOT['size']:].strip(b'\0')


def test_a_sparse_disk_stays_sparse(a_backup: Any, tmp_path: Any) -> None:
    large = disk(size=20 * GIBIBYTE, used=[[5, 1], [15000, 1]])
    pool, shelf = a_backup(vm('web', disks=[large]))
    path = tmp_path / 'disk.raw'
    assert extract(shelf, 'web', 'to=%s' % path).exit_status == 0
    status = os.stat(str(path))
    assert status.st_size == large['size'] and status.st_blocks * 512 < 4 * MEBIBYTE


def test_old_copies_give_their_disks(a_shelf: Any, tmp_path: Any) -> None:
    shelf = a_shelf(of_old_program())
    names = sorted(name for name in os.listdir(shelf.at('PROD-web')) if name.startswith('backup-'))
    expected = disk_content(disk(size=10 * MEBIBYTE, used=[[0, 3], [8, 1]], seed=11))
    for number, name in enumerate(names):
        path = tmp_path / str(number)
        run = extract(shelf, 'PROD-web', 'disk=0', 'from=' + name, 'to=%s' % path)
        assert run.exit_status == 0 and content(path) == expected and run.says('recorded no digests'), run


@pytest.mark.parametrize('lines', KINDS)
def test_damage_leaves_no_file(a_backup: Any, tmp_path: Any, lines: Any) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT]), lines=lines)
    image = shelf.manifest('web', shelf.newest('web'))['image']['name']
    path = shelf.at('web', shelf.newest('web'), image)
    with open(path, 'r+b') as file:
        file.seek(os.path.getsize(path) * 3 // 4)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
    run = extract(shelf, 'web', 'to=%s' % (tmp_path / 'disk.raw'))
    assert run.exit_status == 1 and run.says('is damaged'), run
    assert os.listdir(str(tmp_path)) == []


def test_a_file_that_is_there_is_never_replaced(a_backup: Any, tmp_path: Any) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT, DATA]))
    path = tmp_path / 'disk.raw'
    path.write_bytes(b'precious')
    assert extract(shelf, 'web', 'disk=xvda', 'to=%s' % path).exit_status == 2
    assert path.read_bytes() == b'precious'
    assert extract(shelf, 'web', 'to=%s' % (tmp_path / 'x')).says('say which disk with disk=')
    assert extract(shelf, 'web', 'disk=xvda').says('say with to=')
    assert extract(shelf, 'web', 'disk=xvdq', 'to=%s' % (tmp_path / 'x')).says('it holds no disk xvdq')
    assert extract(shelf, 'nobody', 'to=%s' % (tmp_path / 'x')).exit_status == 2
    run = extract(shelf, 'web', 'disk=xvda', 'to=%s' % (tmp_path / 'no' / 'x'))
    assert run.exit_status == 1 and run.says('No such file or directory')


def test_metadata_come_out_too(a_backup: Any, tmp_path: Any) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT]))
    run = extract(shelf, 'web', 'metadata')
    assert run.exit_status == 0 and run.stdout.startswith('<value>') and '<name>VCPUs_max</name>' in run.stdout
    assert extract(shelf, 'web', 'metadata', 'to=%s' % (tmp_path / 'm.xml')).exit_status == 0
    assert content(tmp_path / 'm.xml').decode('utf-8') == run.stdout.rstrip('\n')


# --- an independent reader ---------------------------------------------------------------------------------------------

def qemu_img(*words: str) -> str:
    """What `qemu-img` says; it was content."""
    run = process.run([shutil.which('qemu-img') or 'qemu-img'] + list(words), {'PATH': process.CRON_PATH})
    assert run.exit_status == 0, run
    return run.stdout


def image(path: Any, form: str) -> str:
    """An image as qemu-img is told of it. The size of a VHD is what its footer says: by cylinders, heads and sectors, as
    qemu-img reckons where it does not know the creator, most sizes can't be said."""
    return 'driver=%s,file.driver=file,file.filename=%s%s' % (form, path, ',force_size_calc=current_size' if form == 'vpc' else '')


def as_raw(path: Any, form: str, folder: Any) -> bytes:
    """The disk in that file, as qemu-img reads it."""
    qemu_img('convert', '--image-opts', '-O', 'raw', image(path, form), str(folder / 'as qemu-img reads it'))
    return content(folder / 'as qemu-img reads it')


@pytest.mark.needs_qemu_img
@pytest.mark.parametrize('lines, form', [(('vm-export=*',), 'xva'), (('vdi-export=*',), 'raw'),
                                         (('vdi-export=*', 'vdi_export_format=vhd'), 'vpc')])
def test_qemu_img_reads_what_is_extracted_and_what_is_stored_as_the_disk_that_it_was(a_backup: Any, tmp_path: Any,
                                                                                     lines: Any, form: str) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT]), lines=lines)
    assert extract(shelf, 'web', 'to=%s' % (tmp_path / 'disk.raw')).exit_status == 0
    told = json.loads(qemu_img('info', '--output=json', '-f', 'raw', str(tmp_path / 'disk.raw')))
    assert told['virtual-size'] >= ROOT['size']
    assert as_raw(tmp_path / 'disk.raw', 'raw', tmp_path)[:ROOT['size']] == disk_content(ROOT)
    if form != 'xva':           # which it can't read; there the extracted disk alone speaks
        stored = shelf.at('web', shelf.newest('web'), shelf.image('web', shelf.newest('web')))
        assert as_raw(stored, form, tmp_path)[:ROOT['size']] == disk_content(ROOT)
        qemu_img('compare', '--image-opts', image(stored, form), image(tmp_path / 'disk.raw', 'raw'))


@pytest.mark.needs_qemu_img
@pytest.mark.parametrize('subformat', ['dynamic', 'fixed'])
def test_a_vhd_of_qemu_img_is_extracted_as_qemu_img_reads_it(a_shelf: Any, tmp_path: Any, subformat: str) -> None:
    os.mkdir(str(tmp_path / 'usb'))
    with open(str(tmp_path / 'plain'), 'wb') as file:
        file.write(disk_content(ROOT))
    vhd = tmp_path / 'usb' / 'web.vhd'
    qemu_img('convert', '-f', 'raw', '-O', 'vpc', '-o', 'force_size=on,subformat=' + subformat, str(tmp_path / 'plain'), str(vhd))
    run = extract(a_shelf(), 'from=%s' % vhd, 'to=%s' % (tmp_path / 'disk.raw'))
    assert run.exit_status == 0, run
    assert content(tmp_path / 'disk.raw') == as_raw(vhd, 'vpc', tmp_path)
    assert content(tmp_path / 'disk.raw')[:ROOT['size']] == disk_content(ROOT)
