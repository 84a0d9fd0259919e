"""Images that neither we nor the server wrote: what is sound comes back, what is not supported is told before anything is made."""

import gzip
import os
import tarfile
from typing import Any

import pytest

from support import others
from support.deeds import backup
from support.language import MEBIBYTE, vm
from support.others import MIB, Ids, Vhd
from support.recovery import disks_of, drill, extract, has_machine, objects, restore
from support.shelf import of_old_program, old

PLACES = dict(srs=[{'name_label': 'here'}], networks=[{'name_label': 'LAN', 'bridge': 'xenbr0'}])


def alone(folder: Any, name: str, content: bytes) -> str:
    """The path of that file, in a directory of its own."""
    (folder / 'usb').mkdir()
    (folder / 'usb' / name).write_bytes(content)
    return str(folder / 'usb' / name)


# What makes each of them: they are large, and every worker imports this file.
@pytest.mark.parametrize('name,made', [
    ('web.xva', others.orchestra), ('web.xva', lambda: others.packed_again(tarfile.PAX_FORMAT, './', ['./'])),
    ('web.xva.gz', lambda: others.xva(digits=20, tail=10240)), ('web.xva', lambda: gzip.compress(others.xva(tail=0), 1)),
    ('web.xva', lambda: others.xva(ids=Ids(disks=['Ref:004', 'Ref:002'])))], ids=['orchestra', 'tar', 'digits', 'gzip', 'order'])
def test_a_sound_archive_of_another_program_is_restored(a_pool: Any, a_shelf: Any, tmp_path: Any, name: str, made: Any) -> None:
    pool, shelf = a_pool(**PLACES), a_shelf()
    run = restore(pool, shelf, 'from=' + alone(tmp_path, name, made()), 'sr=here', 'network=LAN')
    assert run.exit_status == 0 and run.says('is back as VM') and run.never_says('older program'), run
    found = disks_of(pool, others.NAME)
    assert len(found) == 2
    for number, disk in enumerate(sorted(found)):
        assert pool.read(found[disk]['uuid'])[:others.SIZES[number]] == others.contents(number)


def dynamic() -> Any:
    made = Vhd(9 * MIB + 512, {4: others.mebibyte(0, 0) * 2, 0: others.mebibyte(0, 4) * 2},
               ['header', 4, 'table', 'batmap', 0], sectors={0: range(0, 4096, 2), 4: []}, whole=[4], creator=b'tap\0', spare=600)
    return made.file, made.disk()


@pytest.mark.parametrize('name,made', [
    ('PROD-web.vhd', dynamic), ('PROD-web.vhd', lambda: (others.fixed_vhd(others.contents(0)), others.contents(0))),
    ('PROD-web.vhd', lambda: (gzip.compress(others.fixed_vhd(others.contents(0))[:-512] + others.vhd_footer(5 * MIB, 2), 1),
                              None))], ids=['dynamic', 'fixed', 'compressed'])
def test_a_vhd_of_another_program_is_extracted_restored_drilled_and_verified(
        a_pool: Any, a_shelf: Any, tmp_path: Any, name: str, made: Any) -> None:
    (content, expected), pool, shelf = made(), a_pool(vm('db'), **PLACES), a_shelf(of_old_program())
    copy = sorted(one for one in shelf.names('PROD-web') if any(
        file.endswith(('.raw', '.vhd')) for file in shelf.names('PROD-web', one)))[-1]
    for file in shelf.names('PROD-web', copy):
        if file.endswith(('.raw', '.vhd')):
            os.unlink(shelf.at('PROD-web', copy, file))
    with open(shelf.at('PROD-web', copy, name), 'wb') as image:
        image.write(content)
    before, target = objects(pool), tmp_path / 'disk.raw'
    taken = extract(shelf, 'PROD-web', 'from=' + copy, 'disk=0', 'to=%s' % target)
    back = restore(pool, shelf, 'PROD-web', 'from=' + copy, 'sr=here', 'network=LAN')
    if expected is None:
        for run in (taken, back):
            assert run.exit_status == 1 and run.says('decompress it first') and run.never_says('damaged'), run
        assert objects(pool) == before and not target.exists()
        return
    assert taken.exit_status == back.exit_status == 0, (taken, back)
    assert target.read_bytes() == expected
    content = pool.read(disks_of(pool, 'PROD-web')['0']['uuid'])
    assert content[:len(expected)] == expected and not content[len(expected):].strip(b'\0')
    run = backup(pool, shelf, 'vm-export=*', words=['verify', 'PROD-web'])
    assert run.says('structure good') and run.exit_status == 0, run
    machines = sorted(pool.dump()['VM'])
    run = drill(pool, shelf, 'PROD-web', 'sr=here')
    assert run.says(copy + ': restored') and run.exit_status == 0 and run.says('1 of 1 copy came back'), run
    assert sorted(pool.dump()['VM']) == machines


def test_an_archive_of_another_program_is_drilled(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(**PLACES), a_shelf(old('web', image=others.packed_again(tarfile.PAX_FORMAT)))
    before, run = objects(pool), drill(pool, shelf, 'web', 'sr=here')
    assert run.exit_status == 0 and run.says('restored and compared') and run.says('1 of 1 copy came back'), run
    assert objects(pool) == before


@pytest.mark.parametrize('content,words', [
    (others.geneva(), 'XVA of version 1'), (others.metadata_only(), 'metadata export'), (b'\xfd7zXZ\0' + bytes(4000), 'file of xz'),
    (b'BZh91AY' + bytes(4000), 'file of bzip2')], ids=['geneva', 'metadata', 'xz', 'bz2'])
def test_what_is_not_supported_is_told_before_anything_is_made(a_pool: Any, a_shelf: Any, tmp_path: Any, content: bytes,
                                                              words: str) -> None:
    pool, shelf = a_pool(**PLACES), a_shelf(old('web', image=content))
    path = alone(tmp_path, 'web.xva', content)
    before = objects(pool)
    for run in (restore(pool, shelf, 'from=' + path, 'sr=here'), extract(shelf, 'from=' + path, 'disk=0', 'to=%s' % (tmp_path / 'x')),
                drill(pool, shelf, 'web', 'sr=here'), backup(pool, shelf, 'vm-export=*', words=['verify'])):
        assert run.exit_status == 1 and run.says(words) and run.says('not supported') and run.never_says('damaged'), run
        assert run.never_says('DAMAGED') and run.never_says('Traceback'), run
    assert objects(pool) == before


@pytest.mark.parametrize('class_name,field,value', [
    ('VBD', 'userdevice', None), ('VDI', 'virtual_size', []), ('VM', 'other_config', 'x'), ('VDI', 'SR', None), ('VM', 'VCPUs_max', None)])
def test_a_field_of_ova_xml_that_is_missing_or_wrong_is_one_sentence(a_pool: Any, a_shelf: Any, tmp_path: Any, class_name: str,
                                                                    field: str, value: Any) -> None:
    found = others.objects(Ids())
    for one in found:
        if one['class'] == class_name:
            one['snapshot'][field] = value
            if value is None:
                del one['snapshot'][field]
    content = others.xva(found=found)
    pool, shelf = a_pool(**PLACES), a_shelf(old('web', image=content))
    path, before = alone(tmp_path, 'web.xva', content), objects(pool)
    runs = [restore(pool, shelf, 'from=' + path, 'sr=here', 'network=LAN', *more) for more in ((), ('preview',))]
    runs += [drill(pool, shelf, 'web', 'sr=here'), backup(pool, shelf, 'vm-export=*', words=['verify']),
             extract(shelf, 'from=' + path, 'disk=xvda', 'to=%s' % (tmp_path / 'x'))]
    for run in runs:
        assert run.exit_status in (0, 1) and run.never_says('Traceback') and run.never_says('damaged'), run
    assert all(run.exit_status == 1 and run.says(field) or field == 'SR' for run in runs[:3]), runs
    assert objects(pool) == before and not has_machine(pool, others.NAME)


def test_an_empty_cfg_file_of_the_older_program_costs_an_archive_nothing(a_pool: Any, a_shelf: Any, tmp_path: Any) -> None:
    pool, shelf = a_pool(vm('db'), **PLACES), a_shelf(of_old_program())
    copy = [one for one in shelf.names('PROD-web') if 'PROD-web.xva' in shelf.names('PROD-web', one)][0]
    os.unlink(shelf.at('PROD-web', copy, 'vm-metadata.xml'))
    for name in ('DISK-xvda/vbd.cfg', 'DISK-xvdb/vdi.cfg'):
        os.truncate(shelf.at('PROD-web', copy, name), 0)
    os.unlink(shelf.at('PROD-web', copy, 'DISK-xvdb/vbd.cfg'))
    os.mkdir(shelf.at('PROD-web', copy, 'DISK-xvdb/vbd.cfg'))
    for run in (extract(shelf, 'PROD-web', 'from=' + copy, 'disk=xvda', 'to=%s' % (tmp_path / 'x')),
                restore(pool, shelf, 'PROD-web', 'from=' + copy, 'sr=here', 'network=LAN')):
        assert run.exit_status == 0 and run.never_says('Traceback'), run
    assert os.path.getsize(str(tmp_path / 'x')) == 10 * MEBIBYTE
