"""Suspended VMs: their disks come back as they are, their memory is left out, and that is said."""

import os
from typing import Any, List

import pytest

from support.deeds import backup, preview
from support.language import MEBIBYTE, at, disk, vm
from support.recovery import disks_of, drill, extract, holds, interfaces_of, machine, objects, restore, serving, killed_at
from support.shelf import disk_content, old

ROOT = disk(size=10 * MEBIBYTE, used=[[0, 3], [8, 1]], seed=11, bootable=True, name_label='root', sr='fast')
DATA = disk(size=6 * MEBIBYTE + 512, used=[[0, 2], [6, 1]], seed=12, name_label='data', sr='slow')
SRS = [{'name_label': 'fast'}, {'name_label': 'slow'}]
MEMORY = 8 * MEBIBYTE
ZSTD = pytest.param('zstd', marks=pytest.mark.needs_zstd)
KINDS = ('VM', 'VDI', 'VBD', 'VIF', 'network', 'task')
LEFT_OUT = 'its memory (8.0 MiB) is left out: it comes back halted, and starts as after a power cut'
NEVER_HELD = 'a backup holds no memory: it comes back halted, and starts as after a power cut'


def a_suspended_vm(a_pool: Any, **facts: Any) -> Any:
    values = dict(disks=[ROOT, DATA], vifs=[{'device': '0', 'MAC': 'aa:bb:cc:00:11:22'}], memory=MEMORY)
    return a_pool(vm('web', power_state='Suspended', **dict(values, **facts)), srs=SRS)


def exported_by_hand(pool: Any, folder: Any, compress: str = 'none') -> str:
    """An archive with the memory, as people make one."""
    path = str(folder / 'web.xva')
    run = pool.xe('vm-export', 'vm=web', 'preserve-power-state=true', 'compress=' + compress, 'filename=' + path)
    assert run.exit_status == 0, run
    return path


def content(path: Any) -> bytes:
    with open(str(path), 'rb') as file:
        return file.read()


def memory_images(pool: Any) -> List[str]:
    return sorted(record['uuid'] for record in pool.dump()['VDI'].values() if record['type'] == 'suspend')


def of_each_kind(pool: Any) -> Any:
    found = objects(pool)
    return {kind: set(found[kind]) for kind in KINDS}


# --- What a backup holds ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['vm-export', 'vdi-export'])
def test_it_stays_suspended_while_it_is_backed_up_and_comes_back_halted_with_its_disks(a_pool: Any, a_shelf: Any, kind: str
                                                                                      ) -> None:
    pool, shelf = a_suspended_vm(a_pool), a_shelf()
    images = memory_images(pool)
    memory = pool.read(images[0])
    assert preview(pool, shelf, kind + '=*').says('it is suspended: the copy will hold its disks, but not its memory')
    run = backup(pool, shelf, kind + '=*')
    assert run.exit_status == 0 and run.says('is suspended: the copy holds its disks, but not its memory'), run
    assert machine(pool, 'web')['power_state'] == 'Suspended' and pool.has_no_snapshots_of_ours()
    run = restore(pool, shelf, 'web', 'to=back')
    assert run.exit_status == 0 and run.stdout.count(NEVER_HELD) == 2, run
    assert machine(pool, 'back')['power_state'] == 'Halted' and len(interfaces_of(pool, 'back')) == 1
    assert holds(pool, 'back', *([ROOT, DATA] if kind == 'vm-export' else [ROOT]))
    assert memory_images(pool) == images and pool.read(images[0]) == memory
    assert restore(pool, shelf, 'web', 'to=started', 'start=yes').exit_status == 0
    assert machine(pool, 'started')['power_state'] == 'Running'
    before = of_each_kind(pool)
    run = drill(pool, shelf, 'web')
    assert run.exit_status == 0 and of_each_kind(pool) == before, run


def test_its_memory_is_no_disk_that_a_copy_lacks(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_suspended_vm(a_pool), a_shelf()
    assert backup(pool, shelf, 'vdi-export=*').exit_status == 0
    data, images = disks_of(pool, 'web')['1']['uuid'], memory_images(pool)
    session = pool.session()
    session.xenapi.VM.destroy(session.xenapi.VM.get_by_uuid(machine(pool, 'web')['uuid']))
    session.logout()
    run = restore(pool, shelf, 'web', 'attach_existing_disks=yes')
    assert run.exit_status == 0, run
    assert sorted(disks_of(pool, 'web')) == ['0', '1'] and disks_of(pool, 'web')['1']['uuid'] == data
    assert memory_images(pool) == images and run.never_says('Suspend image')


# --- A hand-made archive that has the memory ----------------------------------------------------------------------------

@pytest.mark.parametrize('compress', ['none', 'gzip', ZSTD])
@pytest.mark.parametrize('words', [(), ('sr=fast',)], ids=['each to its SR', 'all to one SR'])
def test_an_archive_with_the_memory_comes_back_without_it(a_pool: Any, a_shelf: Any, tmp_path: Any, compress: str, words: Any
                                                          ) -> None:
    pool, shelf = a_suspended_vm(a_pool), a_shelf()
    path, images = exported_by_hand(pool, tmp_path, compress), memory_images(pool)
    if compress != 'none':
        path = shelf_name(path, compress)
    run = restore(pool, shelf, 'from=' + path, 'to=back', *words)
    assert run.exit_status == 0 and run.stdout.count(LEFT_OUT) == 2, run
    back = machine(pool, 'back')
    assert (back['power_state'], back['suspend_VDI']) == ('Halted', 'OpaqueRef:NULL') and holds(pool, 'back', ROOT, DATA)
    assert {vdi['SR_name'] for vdi in disks_of(pool, 'back').values()} == ({'fast'} if words else {'fast', 'slow'})
    assert not any(vdi['VBD']['currently_attached'] for vdi in disks_of(pool, 'back').values())
    assert memory_images(pool) == images
    session = pool.session()
    session.xenapi.VM.start(session.xenapi.VM.get_by_uuid(back['uuid']), False, False)
    session.logout()


def shelf_name(path: str, compress: str) -> str:
    """The archive under a name that tells how it is compressed, which xe's users have to give it."""
    named = path + {'gzip': '.gz', 'zstd': '.zst'}[compress]
    os.rename(path, named)
    return named


def test_an_archive_with_the_memory_can_be_drilled_and_verified(a_pool: Any, a_shelf: Any, tmp_path: Any) -> None:
    pool = a_suspended_vm(a_pool)
    shelf = a_shelf(old('web', image=content(exported_by_hand(pool, tmp_path))))
    before = of_each_kind(pool)
    run = drill(pool, shelf, 'web')
    assert run.exit_status == 0 and run.says('restored and compared') and of_each_kind(pool) == before, run
    assert backup(pool, shelf, 'vm-export=*', words=['verify', 'web']).exit_status == 0


POINTS = [('http:/import', ''), ('xe:vm-import', 'after'), ('api:VBD.create', ''), ('api:VIF.create', 'after')]


@pytest.mark.parametrize('occasion, when', POINTS, ids=['%s %s' % point for point in POINTS])
def test_a_killed_restore_leaves_neither_disks_nor_memory(a_pool: Any, a_shelf: Any, tmp_path: Any, occasion: str, when: str
                                                          ) -> None:
    pool = a_suspended_vm(a_pool)
    shelf = a_shelf(old('web', image=content(exported_by_hand(pool, tmp_path))))
    before = of_each_kind(pool)
    killed_at(pool, shelf, occasion, when, 'restore', 'web', 'to=back')
    run = backup(pool, shelf, 'vm-export=nobody*')
    assert run.exit_status == 3 and of_each_kind(pool) == before and shelf.journals() == [], run


def test_a_damaged_archive_leaves_neither_disks_nor_memory(a_pool: Any, a_shelf: Any, tmp_path: Any) -> None:
    pool = a_suspended_vm(a_pool)
    image = bytearray(content(exported_by_hand(pool, tmp_path)))
    image[image.rindex(disk_content(DATA)[:64]) + 100] ^= 1
    shelf = a_shelf(old('web', image=bytes(image)))
    before = of_each_kind(pool)
    run = restore(pool, shelf, 'web', 'to=back')
    assert run.exit_status == 1 and of_each_kind(pool) == before and shelf.journals() == [], run


def test_a_disk_is_extracted_without_asking_and_the_memory_by_its_name(a_pool: Any, a_shelf: Any, tmp_path: Any) -> None:
    pool = a_suspended_vm(a_pool, disks=[ROOT])
    memory = pool.read(memory_images(pool)[0])
    shelf = a_shelf(old('web', image=content(exported_by_hand(pool, tmp_path))))
    pool.stop()
    run = extract(shelf, 'web', 'to=%s' % (tmp_path / 'root'))
    assert run.exit_status == 0 and content(tmp_path / 'root') == disk_content(ROOT), run
    run = extract(shelf, 'web', 'disk=memory', 'to=%s' % (tmp_path / 'memory'))
    assert run.exit_status == 0 and content(tmp_path / 'memory') == memory and memory.strip(b'\0'), run
