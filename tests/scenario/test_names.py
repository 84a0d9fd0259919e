"""Names that bite: what people call their VMs reaches neither a shell nor the wrong directory."""

import os
import unicodedata
from typing import Any, Iterator, Tuple

import pytest

from support.deeds import backup, objects, preview
from support.language import described, disk, uuid_of, vm
from support.process import Pool, Run
from support.shelf import Shelf, disk_content

NAMES = {
    'quotes and a shell': 'Büro "1" $(reboot)',
    'a way out': '../../etc',
    'an option': '-rf',
    'a slash': 'a/b',
    'a dot': '.',
    'two dots': '..',
    'metadata of a host': 'METADATA_xcp1',
    'our own state': '.vmbackup',
    '255 characters': 'x' * 255,
    'a newline': 'first\nsecond',
    'a star': '*',
    'a backslash': 'C:\\web',
    'a percent': '%00',
    'emoji': 'web 🦊',
    'a trailing space': 'web ',
    'a trailing dot': 'web.',
    'a reserved word': 'con',
    'a partial': 'web.partial',
    'a copy': 'backup-2016-04-14-001000',
    'a newcomer': 'web--0123abcd',
    'a comma and equals': 'a,b=c',
    'a tab': 'a\tb',
    'nothing': '',
}


@pytest.fixture(scope='module')
def odd_pool() -> Iterator[Pool]:
    vms = [vm(name, disks=[disk(size=1 << 20, used=1, seed=number)], power_state='Halted')
           for number, name in enumerate(NAMES.values())]
    pool = Pool(described(vms, {})).start()
    yield pool
    pool.remove()


@pytest.fixture(scope='module')
def odd_run(odd_pool: Pool) -> Iterator[Tuple[Run, Shelf, Any]]:
    """One vdi-export of them all: the run, its shelf, and the pool's objects before."""
    shelf, before = Shelf(), objects(odd_pool)
    yield backup(odd_pool, shelf, 'vdi-export=*'), shelf, before
    shelf.remove()


def folder_of(shelf: Any, uuid: str) -> str:
    """The directory whose newest copy is that VM's."""
    found = [folder for folder in shelf.names() if shelf.copies(folder)
             and shelf.manifest(folder, shelf.newest(folder))['vm']['uuid'] == uuid]
    assert len(found) == 1, found
    return found[0]


def test_vms_with_odd_names_are_all_backed_up_and_nothing_else_is_touched(odd_pool: Any, odd_run: Any) -> None:
    done, shelf, before = odd_run
    assert done.exit_status == 0, done
    assert len(shelf.names()) == len(NAMES) and shelf.unfinished() == []
    assert objects(odd_pool) == before
    assert sorted(os.listdir(shelf.home)) == ['BACKUPS', 'status.log', 'weekend.cfg']


@pytest.mark.parametrize('what', sorted(NAMES))
def test_an_odd_name_leads_to_its_own_safe_directory_and_back(odd_run: Any, what: str) -> None:
    _, shelf, _ = odd_run
    name = NAMES[what]
    folder = folder_of(shelf, uuid_of(name))
    copy = shelf.newest(folder)
    image = shelf.image(folder, copy)
    assert shelf.manifest(folder, copy)['vm']['name'] == name
    assert shelf.read(folder, copy, image) == disk_content(
        disk(size=1 << 20, used=[[0, 1]], seed=list(NAMES.values()).index(name)))
    assert shelf.proves_itself(folder, copy)
    first = shelf.text(folder, copy, 'vm.cfg').split('\n')[0]
    assert first == 'name_label=' + name.replace('\\', '\\\\').replace('\n', '\\n')
    for part in (folder, image):
        assert len(part.encode('utf-8')) <= 255 and not set(part) & set('/\\:*?"<>|\n\t\0')
        assert part[0] not in '.' and part[-1] not in '. ' and not part.upper().startswith('METADATA_')


def test_no_two_odd_names_share_a_directory_where_case_and_normal_form_do_not_count(odd_run: Any) -> None:
    _, shelf, _ = odd_run
    assert len({unicodedata.normalize('NFC', name).casefold() for name in shelf.names()}) == len(NAMES)


def test_the_log_and_the_status_log_stay_one_line_each_whatever_the_name(odd_run: Any) -> None:
    done, shelf, _ = odd_run
    assert all(line[:4].isdigit() for line in done.stdout.splitlines() + shelf.status_lines())
    assert len([line for line in shelf.status_lines() if ',end,SUCCESS ' in line]) == len(NAMES)


def test_the_next_run_finds_every_odd_directory_again(odd_pool: Any, odd_run: Any) -> None:
    _, shelf, _ = odd_run
    folders = shelf.names()
    shown = preview(odd_pool, shelf, 'vdi-export=*')
    assert shown.exit_status == 0 and shown.stdout.count('which holds 1 good copy') == len(NAMES)
    assert shelf.names() == folders


@pytest.mark.parametrize('what', ['quotes and a shell', 'an option', 'a newline', '255 characters', 'a star'])
def test_an_odd_name_can_be_written_in_a_config(odd_pool: Any, a_shelf: Any, what: str) -> None:
    name = NAMES[what]
    selector = '"%s"' % name.replace('\\', '\\\\').replace('"', '\\"') if '\n' not in name else 'first?second'
    run_of_it = preview(odd_pool, a_shelf(), 'vdi-export=' + selector)
    assert run_of_it.exit_status == 0 and run_of_it.says('1 VM to back up') and run_of_it.says(uuid_of(name)[:8])


def test_names_that_differ_in_case_or_normal_form_only_get_directories_that_differ(a_pool: Any, a_shelf: Any) -> None:
    names = ('Web', 'web', 'WEB', unicodedata.normalize('NFC', 'Büro'), unicodedata.normalize('NFD', 'Büro'))
    pool, shelf = a_pool(*[vm(name, disks=0) for name in names]), a_shelf()
    for _ in range(2):
        assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    folders = shelf.names()
    assert len({unicodedata.normalize('NFC', name).casefold() for name in folders}) == len(names) == len(folders)
    assert all(shelf.has(folder, complete=2) for folder in folders)


def test_a_name_of_255_wide_characters_is_cut_for_the_file_system_and_found_again(a_pool: Any, a_shelf: Any) -> None:
    names = ('日' * 255, '日' * 254 + '月')
    pool, shelf = a_pool(*[vm(name, disks=0) for name in names]), a_shelf()
    for _ in range(2):
        assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    assert len(shelf.names()) == 2 and all(shelf.has(folder, complete=2) for folder in shelf.names())


def test_odd_names_survive_a_vm_export_and_the_way_back(a_pool: Any, a_shelf: Any) -> None:
    names = ['Büro "1" $(reboot)', '-rf', 'first\nsecond', 'x' * 255]
    pool, shelf = a_pool(*[vm(name) for name in names]), a_shelf()
    assert backup(pool, shelf, 'vm-export=*', 'compress=gzip').exit_status == 0
    assert pool.has_no_snapshots_of_ours()
    for name in names:
        folder = folder_of(shelf, uuid_of(name))
        path = shelf.at(folder, shelf.newest(folder), shelf.image(folder, shelf.newest(folder)))
        done = pool.xe('vm-import', 'filename=' + path)
        assert done.exit_status == 0, done
        new = [record for record in pool.dump()['VM'].values() if record['uuid'] == done.stdout.strip()][0]
        assert new['name_label'].startswith(name + ' (backup ')
