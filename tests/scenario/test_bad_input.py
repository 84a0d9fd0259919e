"""Bad input: each gets its exit status and a sentence that says what is wrong, and nothing is started."""

import copy
import json
import os
from typing import Any, Iterator, Sequence

import pytest

import VmBackup
from support.deeds import backup
from support.language import described, disk, vm
from support.process import Pool, Run, run_program
from support.shelf import Shelf, complete
from support.values import services, verified


def started_nothing(pool: Pool, shelf: Shelf) -> bool:
    """No call that changes something reached the pool, no `xe` ran, and the shelf is as it was."""
    changing = [entry for entry in pool.journal() if entry['via'] != 'api' or not (
        entry['call'].split('.')[1].startswith('get') or entry['call'].startswith('session.'))]
    return changing == [] and shelf.is_unchanged() and shelf.status_lines() == []


def never_asked_the_pool(pool: Pool) -> bool:
    return pool.journal() == []


def refuses(run: Run, *words: str) -> bool:
    """Exit status 2, all words on stderr, nothing on stdout but what is said about the place, no traceback."""
    return (run.exit_status == 2 and all(word in run.stderr for word in words) and run.never_says('Traceback'))


# --- The config file -------------------------------------------------------------------------------------------------

BAD_LINES = [
    ('an unknown key', ['vm-export=web', 'max_backup=3'], ['weekend.cfg:5', 'max_backup', 'did you mean max_backups?']),
    ('a key that is like none', ['vm-export=web', 'colour=red'], ['weekend.cfg:5', 'colour', 'help config']),
    ('a repeated key', ['vm-export=web', 'max_backups=3', 'max_backups=4'], ['weekend.cfg:6', 'max_backups',
                                                                            'weekend.cfg:5']),
    ('a word for a number', ['vm-export=web', 'max_backups=many'], ['weekend.cfg:5', 'max_backups', '"many"']),
    ('a fraction', ['vm-export=web', 'max_backups=1.5'], ['weekend.cfg:5', 'max_backups', '"1.5"']),
    ('no copies to keep', ['vm-export=web', 'max_backups=0'], ['weekend.cfg:5', 'max_backups', '"0"', 'from 1']),
    ('fewer than no copies', ['vm-export=web', 'max_backups=-1'], ['weekend.cfg:5', 'max_backups', '"-1"']),
    ('an empty selector', ['vm-export='], ['weekend.cfg:4', 'vm-export', 'empty', '*']),
    ('a bad regex', ['vm-export=/web(/'], ['weekend.cfg:4', 'web(', 'unterminated']),
    ('a bad old regex', ['wildcards=regex', 'vm-export=web('], ['weekend.cfg:5', 'web(', 'unterminated']),
    ('keep none', ['vm-export=web:0'], ['weekend.cfg:4', 'vm-export', 'whole number from 1', 'quotes']),
    ('keep fewer than none', ['vm-export=web:-1'], ['weekend.cfg:4', 'vm-export', 'quotes']),
    ('keep a letter', ['vm-export=web:x'], ['weekend.cfg:4', 'vm-export', 'quotes']),
    ('keep nothing', ['vm-export=web:'], ['weekend.cfg:4', 'vm-export', 'quotes']),
    ('keep a letter of a quoted name', ['vm-export="web":x'], ['weekend.cfg:4', 'vm-export', ':N']),
    ('an unclosed quote', ['vm-export="web'], ['weekend.cfg:4', 'vm-export', 'quote is not closed']),
    ('a bad selector to exclude', ['vm-export=web', 'exclude="db'], ['weekend.cfg:5', 'exclude', 'quote']),
    ('a line without =', ['vm-export=web', 'compress'], ['weekend.cfg:5', '"compress"', '"="']),
    ('a choice that there is not', ['vm-export=web', 'compress=lz4'], ['weekend.cfg:5', 'compress', 'gzip, zstd']),
    ('an export format that there is not', ['vm-export=web', 'vdi_export_format=qcow2'], ['weekend.cfg:5', 'raw, vhd']),
    ('neither yes nor no', ['vm-export=web', 'pre_clean=maybe'], ['weekend.cfg:5', 'pre_clean', '"maybe"']),
    ('a pool address that is none', ['vm-export=web', 'pool=ftp://x'], ['weekend.cfg:5', 'pool', 'ftp://x']),
    ('nothing to do', ['max_backups=3'], ['weekend.cfg', 'nothing to do']),
    ('only excludes', ['exclude=web'], ['weekend.cfg', 'nothing to do']),
]


@pytest.fixture(scope='module')
def one_pool() -> Iterator[Pool]:
    """One pool for all bad input: nothing ever reaches it."""
    pool = Pool(described([vm('web'), vm('db')], {})).start()
    yield pool
    pool.remove()


@pytest.mark.parametrize('what, lines, words', BAD_LINES, ids=[case[0] for case in BAD_LINES])
def test_a_bad_config_line_is_told_with_its_place_and_nothing_starts(one_pool: Pool, a_shelf: Any, what: str,
                                                                     lines: Sequence[str], words: Sequence[str]) -> None:
    shelf = a_shelf(complete('web'))
    for action in ([], ['preview']):
        run = backup(one_pool, shelf, *lines, words=action)
        assert refuses(run, *words), run
        assert shelf.is_unchanged() and shelf.status_lines() == []
        assert never_asked_the_pool(one_pool)


def test_all_bad_lines_are_told_at_once(one_pool: Pool, a_shelf: Any) -> None:
    shelf = a_shelf()
    run = backup(one_pool, shelf, 'vm-export=web:0', 'max_backups=none', 'compres=gzip', 'what is this')
    assert run.exit_status == 2
    assert [number for number in range(1, 9) if 'weekend.cfg:%d:' % number in run.stderr] == [4, 5, 6, 7]


@pytest.mark.parametrize('what', ['missing', 'a directory', 'binary', 'zeros', 'unreadable path'])
def test_a_config_that_is_no_config_is_refused(one_pool: Pool, a_shelf: Any, what: str) -> None:
    shelf = a_shelf()
    path = os.path.join(shelf.home, 'weekend.cfg')
    if what == 'a directory':
        os.mkdir(path)
    elif what == 'binary':
        with open(path, 'wb') as file:
            file.write(bytes(range(256)) * 100)
    elif what == 'zeros':
        with open(path, 'wb') as file:
            file.write(b'vm-export=web\n\0\0\0')
    elif what == 'unreadable path':
        path = os.path.join(shelf.home, 'no', 'such', 'weekend.cfg')

    run = run_program('-', path, environment=one_pool.environment())

    assert refuses(run, path), run
    if what in ('missing', 'unreadable path'):
        assert 'Is the share mounted?' in run.stderr
    assert never_asked_the_pool(one_pool)


def test_an_unknown_key_is_only_a_warning_where_extra_keys_are_ignored(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', 'allow_extra=yes', 'ignore_extra_keys=True')
    assert run.exit_status == 3
    assert 'weekend.cfg:5' in run.stderr and shelf.has('web', complete=1)


# --- The command line ------------------------------------------------------------------------------------------------

BAD_WORDS = [
    ('an unknown action', ['explode'], ['"explode"', 'is not an action']),
    ('an action with a slip', ['preveiw'], ['"preveiw"', 'is not an action']),
    ('an unknown key', ['max_backup=3'], ['max_backup', 'did you mean max_backups?']),
    ('a parameter of another action', ['preview', 'force=yes'], ['force']),
    ('a bad number', ['max_backups=0'], ['command line', 'max_backups', '"0"']),
    ('one word too many', ['backup', 'web'], ['"web"']),
]


@pytest.mark.parametrize('what, words, expected', BAD_WORDS, ids=[case[0] for case in BAD_WORDS])
def test_a_bad_word_on_the_command_line_is_named_and_nothing_starts(one_pool: Pool, a_shelf: Any, what: str,
                                                                    words: Sequence[str], expected: Sequence[str]) -> None:
    shelf = a_shelf(complete('web'))
    run = backup(one_pool, shelf, 'vm-export=web', words=words)
    assert refuses(run, *expected), run
    assert shelf.is_unchanged() and never_asked_the_pool(one_pool)


def test_no_arguments_at_all_show_the_usage() -> None:
    run = run_program()
    assert run.exit_status == 2
    assert 'usage: VmBackup.py PASSWORD TARGET' in run.stderr


def test_a_password_without_a_target_is_not_enough() -> None:
    run = run_program('password')
    assert refuses(run, 'TARGET', 'usage:')


def test_a_dash_can_not_log_in_to_another_pool(one_pool: Pool, a_shelf: Any) -> None:
    shelf = a_shelf()
    run = backup(one_pool, shelf, 'vm-export=web', 'pool=' + one_pool.url)
    assert refuses(run, 'pool=', 'password')
    assert shelf.is_unchanged() and never_asked_the_pool(one_pool)


def test_a_file_that_is_no_password_file_is_refused(one_pool: Pool, a_shelf: Any) -> None:
    shelf = a_shelf()
    path = os.path.join(shelf.home, 'password')
    with open(path, 'w') as file:
        file.write('this is not base64!\n')
    run = backup(one_pool, shelf, 'vm-export=web', password=path)
    assert refuses(run, path, 'password file', 'create-password-file')
    assert never_asked_the_pool(one_pool)


def test_a_password_file_is_made_for_its_owner_only_and_never_over_another(a_shelf: Any, a_pool: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    path = os.path.join(shelf.home, 'password')

    made = run_program('password', 'create-password-file=' + path)
    assert made.exit_status == 0 and os.stat(path).st_mode & 0o777 == 0o600
    with open(path) as file:
        first = file.read()
    assert 'password' not in first
    again = run_program('another', 'create-password-file=' + path)
    assert again.exit_status == 2 and 'exists' in again.stderr
    with open(path) as file:
        assert file.read() == first

    run = backup(pool, shelf, 'vm-export=web', password=path)
    assert run.exit_status == 0 and shelf.has('web', complete=1)
    assert [entry['args'][0] for entry in pool.calls('api:session.login_with_password')] != []


# --- The backup directory, and xe ------------------------------------------------------------------------------------

def test_a_missing_backup_dir_is_refused(one_pool: Pool, a_shelf: Any) -> None:
    shelf = a_shelf()
    run = backup(one_pool, shelf, 'vm-export=web', 'backup_dir=/no/such/share')
    assert refuses(run, 'weekend.cfg:4', 'backup_dir', '/no/such/share', 'Is the share mounted?')
    assert never_asked_the_pool(one_pool)


def test_a_file_in_the_place_of_the_backup_dir_is_refused(one_pool: Pool, a_shelf: Any) -> None:
    shelf = a_shelf()
    path = os.path.join(shelf.home, 'BACKUPS.txt')
    with open(path, 'w') as file:
        file.write('a file')
    run = backup(one_pool, shelf, 'vm-export=web', 'backup_dir=' + path)
    assert refuses(run, 'backup_dir', path)
    assert never_asked_the_pool(one_pool)


def test_xe_that_is_not_found_is_told_before_anything_starts(one_pool: Pool, a_shelf: Any) -> None:
    shelf = a_shelf()
    environment = dict(one_pool.environment(), PATH='/usr/bin:/bin')
    run = backup(one_pool, shelf, 'vm-export=web', environment=environment)
    assert refuses(run, 'xe', 'xe_path')
    assert shelf.is_unchanged() and started_nothing(one_pool, shelf)


def test_an_xe_path_that_is_no_program_is_told(one_pool: Pool, a_shelf: Any) -> None:
    shelf = a_shelf()
    run = backup(one_pool, shelf, 'vm-export=web', 'xe_path=/etc/passwd')
    assert refuses(run, 'weekend.cfg:5', 'xe_path', '/etc/passwd')
    assert started_nothing(one_pool, shelf)


# --- A manifest that is not what we write -----------------------------------------------------------------------------

def mutated(value: Any) -> Iterator[Any]:
    """The value with one of its fields, at any depth, missing or of another kind."""
    if isinstance(value, (dict, list)):
        for key in sorted(value) if isinstance(value, dict) else range(len(value)):
            others = [None, -1, 'x', [], {}, [5]] + list(mutated(value[key]))
            for other in others:
                changed = copy.deepcopy(value)
                changed[key] = other
                yield changed
            changed = copy.deepcopy(value)
            del changed[key]
            yield changed


def read_as_all_commands_do(store: VmBackup.Catalog, target: str) -> None:
    """What list, verify, restore and extract read of the only copy; what is wrong with it is an error of ours."""
    (stored,) = VmBackup.list_store(store).vms
    (found,) = stored.copies
    assert verified(store, found).state.name in ('GOOD', 'DAMAGED', 'UNCHECKED')
    with store.open_copy(found) as inside:
        for force in (False, True):
            try:
                source = VmBackup.read_source(inside, found, force)
                VmBackup.extract_disk(services(), source, VmBackup.wanted_disk(source, 'xvda'), target)
                os.unlink(target)
            except (VmBackup.BackupError, ValueError) as error:          # ValueError: opened_source tells it
                assert str(error)


@pytest.mark.parametrize('line', ['vm-export=web', 'vdi-export=web'])
def test_every_field_of_a_manifest_missing_or_of_another_kind_is_damage_and_never_a_bug(a_pool: Any, a_shelf: Any, line: str) -> None:
    pool, shelf = a_pool(vm('web', disks=[disk(size=64 * 1024, used=1)])), a_shelf()
    assert backup(pool, shelf, line, 'compress=none').exit_status == 0
    path = shelf.at('web', shelf.newest('web'), 'backup.json')
    real = shelf.manifest('web', shelf.newest('web'))
    store = VmBackup.Catalog(shelf.path)
    read_as_all_commands_do(store, shelf.at('disk.raw'))
    os.chmod(path, 0o600)
    for manifest in mutated(real):
        with open(path, 'w') as file:
            json.dump(manifest, file)
        try:
            read_as_all_commands_do(store, shelf.at('disk.raw'))
        except Exception:                   # raised on, with the manifest that it is about
            print([(key, manifest.get(key)) for key in set(real) | set(manifest) if manifest.get(key) != real.get(key)])
            raise
