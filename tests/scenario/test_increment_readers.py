"""Increments that are damaged, and who reads them: what can be had comes back, what was found is not forgotten, and what is
read stays."""

import gzip
import os
import resource
import shutil
import subprocess
import sys
from typing import Any, Dict, List

import pytest

import VmBackup

from support import warm
from support.deeds import beginning, in_trouble
from support.language import MEBIBYTE, at, disk, vm
from support.layers import DATA, ROOT, Nights, difference, increments, is_increment
from support.process import PROGRAM, TIME_LIMIT_S, ended, run_program, text_of
from support.recovery import disks_of, drill, extract, has_machine, restore, serving
from support.values import services
from test_increment_traps import ONE, a_chain, block, flip, good, listed

DAMAGED = 'back (DAMAGED)'


def stamp(copy: str) -> str:
    return copy[len('backup-'):]


def lost(nights: Nights, copy: str, name: str = DAMAGED) -> Dict[str, List[int]]:
    """The MiBs of the VM that came back which are not those of the copy, by device."""
    found = {}
    for number, one in disks_of(nights.pool, name).items():
        device = 'xvd' + 'abcdef'[int(number)]
        content, wanted = nights.pool.read(one['uuid']), nights.held[copy][device]
        numbers = range(-(-len(wanted) // MEBIBYTE))
        found[device] = [number for number in numbers if content[number * MEBIBYTE:][:MEBIBYTE].rstrip(b'\0')
                         != wanted[number * MEBIBYTE:][:MEBIBYTE].rstrip(b'\0')]
    return found


def forced(nights: Nights, copy: str, **how: Any) -> Any:
    run = restore(nights.pool, nights.shelf, 'web', 'from=' + stamp(copy), 'to=back', 'force=yes', lines=nights.lines, **how)
    assert run.exit_status == 3 and run.says('IT IS DAMAGED: '), run
    return run


# --- What can still be read ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('lines', [('vm-export=web',), ('vdi-export=web',), ('vdi-export=web', 'vdi_export_format=vhd')],
                         ids=['vm', 'raw', 'vhd'])
@pytest.mark.parametrize('which', [0, 1])
def test_one_bad_block_costs_an_increment_that_block_alone(some_nights: Any, lines: Any, which: int) -> None:
    nights = some_nights(*lines, disks=ONE)
    copies = a_chain(nights, 3)
    flip(nights, copies[which], block(nights, copies[2], [4, 1][which]))
    run = restore(nights.pool, nights.shelf, 'web', 'from=' + stamp(copies[2]), 'verify_first=yes', 'to=back')
    assert run.exit_status == 1 and run.says(copies[which]) and not has_machine(nights.pool, 'back'), run
    run = forced(nights, copies[2])
    assert lost(nights, copies[2]) == {'xvda': [[4], [1]][which]} and run.says('MiB %d of disk xvda' % [4, 1][which]), run


def test_an_increment_of_which_a_holder_is_gone_gives_what_the_others_hold(some_nights: Any) -> None:
    nights = some_nights()
    full, second, third = a_chain(nights)
    shutil.rmtree(nights.shelf.at('web', second))
    run = restore(nights.pool, nights.shelf, 'web', 'from=' + stamp(third), 'to=back')
    assert run.exit_status == 1 and run.says(second), run
    run = forced(nights, third)
    assert run.says(second) and lost(nights, third) == {'xvda': [0, 1], 'xvdb': []}, run


def test_a_file_of_an_increment_that_cant_be_read_at_all_is_not_opened_for_each_of_its_blocks(some_nights: Any) -> None:
    nights = some_nights(disks=[disk(size=70 * MEBIBYTE, used=[[0, 4]], seed=3), DATA])
    nights.night()
    nights.write(4, count=64)
    second = nights.night()
    with open(nights.shelf.at('web', second, 'xvda.vhd'), 'r+b') as file:
        file.write(b'\xff' * 512)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    done = subprocess.run([sys.executable, '-W', 'error', PROGRAM, '-', nights.shelf.config(*nights.lines), 'restore', 'web',
                           'from=' + stamp(second), 'to=back', 'force=yes'], preexec_fn=limit, env=nights.pool.environment(),
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIME_LIMIT_S)
    assert done.returncode == 3, text_of(done.stdout + done.stderr)
    found = lost(nights, second)
    assert found['xvdb'] == [] and set(found['xvda']) <= set(range(4, 68)), found


def test_zeros_that_a_storage_gives_at_the_end_of_a_disk_cost_nothing_of_the_next_one(some_nights: Any) -> None:
    nights = some_nights(disks=[dict(ROOT, used=[[0, 3]]), DATA])
    full = nights.night()
    nights.write(6)
    second = nights.night()
    path = nights.shelf.at('web', full, 'web.xva')
    content = nights.shelf.read('web', full, 'web.xva')
    places = {device: content.index(block(nights, full, 2, device)) for device in ('xvda', 'xvdb')}
    first = min(places, key=lambda device: places[device])
    with open(path, 'r+b') as file:
        file.seek(places[first])
        file.write(bytes(MEBIBYTE))
    forced(nights, second)
    assert lost(nights, second) == dict({'xvda': [], 'xvdb': []}, **{first: [2]})


def test_a_damaged_increment_is_not_extracted_and_nothing_is_left_of_the_try(some_nights: Any, tmp_path: Any) -> None:
    nights = some_nights(disks=ONE)
    full, second, third = a_chain(nights)
    flip(nights, full, block(nights, third, 4))
    path = str(tmp_path / 'disk')
    run = extract(nights.shelf, 'web', 'to=' + path)
    assert run.exit_status == 1 and run.says(full) and not os.path.exists(path), run


# --- What was found is not forgotten ---------------------------------------------------------------------------------------

def test_what_a_drill_finds_after_a_good_verify_counts_for_the_copies_that_need_it(some_nights: Any) -> None:
    nights = some_nights(disks=ONE)
    full, second, third = a_chain(nights)
    assert nights.verify().exit_status == 0 and len(good(nights)) == 3
    flip(nights, full, block(nights, full, 6))
    for copy in (second, third):                # aside for the drill, which takes the newest
        os.rename(nights.shelf.at('web', copy), nights.shelf.at(copy))
    run = drill(nights.pool, nights.shelf, 'web', lines=nights.lines)
    assert run.exit_status == 1, run
    for copy in (second, third):
        os.rename(nights.shelf.at(copy), nights.shelf.at('web', copy))
    assert good(nights) == [], 'all need the block that is damaged'
    nights.write(1)
    assert not is_increment(nights.shelf, 'web', nights.night('max_backups=20'))


def test_a_copy_whose_other_files_are_found_changed_is_not_known_to_hold_good_blocks(some_nights: Any) -> None:
    nights = some_nights(disks=ONE)
    full, second, third = a_chain(nights)
    assert nights.verify().exit_status == 0
    flip(nights, full, block(nights, full, 6))
    with open(nights.shelf.at('web', full, 'vm.cfg'), 'a') as file:
        file.write('changed=yes\n')
    run = nights.verify('web', 'from=' + stamp(full))
    assert run.exit_status == 1, run
    assert good(nights) == [], run


def test_a_rotten_file_of_one_disk_condemns_nobody_who_needs_only_the_other_disks(some_nights: Any) -> None:
    nights = some_nights()
    nights.night()
    nights.write(3)
    nights.write(2, device='xvdb')
    second = nights.night()
    nights.write(3)
    third = nights.night()                      # has MiB 3 of xvda anew, and needs xvdb of the second
    flip(nights, second, block(nights, second, 3))
    for _ in range(2):
        run = nights.verify()
        assert run.exit_status == 1 and '2 good, 1 DAMAGED' in run.stdout, run
        assert second not in good(nights) and third in good(nights)
    assert nights.restored_problem(third) == ''


def test_an_image_that_the_storage_host_compresses_while_others_are_verified_is_not_damaged(some_nights: Any) -> None:
    nights = some_nights(disks=ONE)
    copies = a_chain(nights, 2)
    catalog = VmBackup.Catalog(nights.shelf.path)
    listed_before = catalog.folder('web').copies
    for copy, name in zip(copies, ('web.xva', 'xvda.vhd')):
        path = nights.shelf.at('web', copy, name)
        with open(path, 'rb') as plain, gzip.open(path + '.gz', 'wb') as packed:
            shutil.copyfileobj(plain, packed)
        os.unlink(path)
    layers: Dict[str, Any] = {}
    for copy in listed_before:
        assert VmBackup.verify_copy(services(catalog=catalog), copy, layers).state is VmBackup.CopyState.GOOD


def test_images_that_were_compressed_twice_are_no_damage(some_nights: Any) -> None:
    nights = some_nights('vm-export=web', 'compress=gzip', disks=ONE)
    copies = a_chain(nights, 2)
    for copy, name in zip(copies, ('web.xva.gz', 'xvda.vhd.gz')):
        path = nights.shelf.at('web', copy, name)
        with open(path, 'rb') as plain, gzip.open(path + '.gz', 'wb') as packed:
            shutil.copyfileobj(plain, packed)
        os.unlink(path)
    assert nights.verify().exit_status == 0 and good(nights) == copies
