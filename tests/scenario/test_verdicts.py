"""A verdict on record is heeded everywhere: what verify or drill found bad is not good for anybody until a check says otherwise."""

import gzip
import json
import os
import shutil
import time
from typing import Any

import pytest

import VmBackup

from support.deeds import backup, preview
from support.language import MEBIBYTE, at, disk, vm
from support.process import run_program
from support.recovery import drill, holds, restore, serving
from support.shelf import old
from support.values import verified

ROOT = disk(size=4 * MEBIBYTE, used=[[0, 2]], seed=7)


def verify(shelf: Any, *words: str) -> Any:
    return run_program('-', shelf.config('vm-export=web'), 'verify', *words)


def rows(shelf: Any) -> Any:
    run = run_program('-', shelf.config('vm-export=web', 'max_backups=2'), 'list', 'format=json')
    return {copy['name']: copy for vm_row in json.loads(run.stdout)['vms'] for copy in vm_row['copies']}


@pytest.fixture
def one_damaged(a_backup: Any) -> Any:
    """A sound copy, and a newer one that verify has found damaged."""
    pool, shelf = a_backup(vm('web', disks=[ROOT]), lines=['vm-export=web', 'max_backups=2'], nights=2)
    sound, damaged = shelf.copies('web')
    shelf.flip('web', damaged)
    assert verify(shelf).exit_status == 1
    return pool, shelf, sound, damaged


def test_retention_keeps_the_sound_copy_and_counts_the_damaged_one_no_more(one_damaged: Any) -> None:
    pool, shelf, sound, damaged = one_damaged
    shown = preview(pool, shelf, 'vm-export=web', 'max_backups=2')
    assert sound not in '\n'.join(line for line in shown.stdout.splitlines() if 'removes' in line), shown
    run = backup(pool, shelf, 'vm-export=web', 'max_backups=2', words=['force=yes'])
    assert run.exit_status == 0 and sound in shelf.copies('web') and damaged in shelf.copies('web'), run
    assert 'verify of' in run.stdout and 'found it DAMAGED' in run.stdout, run


def test_pre_clean_never_leaves_only_a_damaged_copy(one_damaged: Any) -> None:
    pool, shelf, sound, _damaged = one_damaged
    serving(pool, at('xe:vm-export', exit=1, stderr='Error'))
    run = backup(pool, shelf, 'vm-export=web', 'max_backups=2', 'pre_clean=yes', words=['force=yes'])
    assert run.exit_status == 1 and sound in shelf.copies('web'), run


def test_prune_by_hand_removes_the_damaged_copy_never_for_the_sound_one(one_damaged: Any) -> None:
    _pool, shelf, sound, damaged = one_damaged
    run = run_program('-', shelf.config('vm-export=web'), 'prune', 'web', 'max_backups=1')
    assert run.exit_status == 0 and shelf.copies('web') == [sound, damaged], run


@pytest.mark.parametrize('instead', ['link', 'file'])
def test_where_the_verdicts_cant_be_read_nothing_is_pruned(one_damaged: Any, instead: str) -> None:
    _pool, shelf, sound, damaged = one_damaged
    verdicts, elsewhere = shelf.at('.vmbackup', 'verdicts'), shelf.at('.vmbackup', 'elsewhere')
    os.rename(verdicts, elsewhere)
    if instead == 'link':
        os.symlink(elsewhere, verdicts)
    else:
        open(verdicts, 'w').close()
    run = run_program('-', shelf.config('vm-export=web'), 'prune', 'web', 'max_backups=1')
    assert shelf.copies('web') == [sound, damaged] and "can't be read now" in run.stdout + run.stderr, run


def test_list_says_why_it_is_not_good_and_does_not_count_it(one_damaged: Any) -> None:
    _pool, shelf, sound, damaged = one_damaged
    run = run_program('-', shelf.config('vm-export=web'), 'list')
    line, = [line for line in run.stdout.splitlines() if damaged in line]
    assert 'NOT GOOD (verify of' in line and '2 copies of 1 VM, 1 good' in run.stdout, run
    found = rows(shelf)
    assert found[sound]['good'] and not found[damaged]['good'] and 'found it DAMAGED' in found[damaged]['problem']


def test_restore_takes_the_newest_copy_that_is_not_known_to_be_damaged(one_damaged: Any) -> None:
    pool, shelf, sound, damaged = one_damaged
    run = restore(pool, shelf, 'web', 'to=back')
    assert run.exit_status == 0 and holds(pool, 'back', ROOT), run
    assert '%s is passed over' % damaged in run.stderr and sound in run.stdout, run
    assert restore(pool, shelf, 'web', 'from=' + damaged[len('backup-'):]).exit_status == 1


def test_the_verdict_goes_with_the_copy_to_a_new_store_whatever_its_times_are(one_damaged: Any, a_shelf: Any) -> None:
    pool, shelf, sound, damaged = one_damaged
    other = a_shelf()
    shutil.rmtree(other.path)
    shutil.copytree(shelf.path, other.path)                    # times are those of today
    assert not rows(other)[damaged]['good'] and rows(other)[sound]['good']


def test_a_name_that_is_used_again_inherits_no_verdict(one_damaged: Any) -> None:
    _pool, shelf, sound, damaged = one_damaged
    shutil.rmtree(shelf.at('web', damaged))
    shutil.move(shelf.at('web', sound), shelf.at('web', damaged))
    assert rows(shelf)[damaged]['good']


def test_a_later_verify_that_finds_it_whole_lifts_the_verdict(one_damaged: Any) -> None:
    _pool, shelf, _sound, damaged = one_damaged
    time.sleep(1.1)
    shelf.flip('web', damaged)
    assert not rows(shelf)[damaged]['good']
    assert verify(shelf).exit_status == 0 and rows(shelf)[damaged]['good']


def test_a_good_verdict_holds_only_while_the_files_are_those_that_were_read(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT]))
    copy, = shelf.copies('web')
    assert verify(shelf).exit_status == 0 and rows(shelf)[copy]['verdict'] == 'good'
    os.utime(shelf.at('web', copy, shelf.image('web', copy)))
    assert 'CHANGED' in rows(shelf)[copy]['verdict'] and rows(shelf)[copy]['good']


def test_a_copy_that_a_drill_found_not_restorable_is_not_good_until_a_check_says_otherwise(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT]), nights=2)
    sound, damaged = shelf.copies('web')
    shelf.flip('web', damaged)
    assert drill(pool, shelf, 'web').exit_status == 1
    assert 'found it NOT RESTORABLE' in rows(shelf)[damaged]['problem'] and rows(shelf)[sound]['good']
    assert sound in drill(pool, shelf, 'web').stdout
    time.sleep(1.1)
    shelf.flip('web', damaged)
    assert verify(shelf).exit_status == 0 and rows(shelf)[damaged]['good']


def test_what_the_pool_is_to_blame_for_in_a_drill_is_nothing_against_the_copy(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT]))
    copy, = shelf.copies('web')
    serving(pool, at('api:task.create', fail=['INTERNAL_ERROR', 'no']))
    run = drill(pool, shelf, 'web')
    assert run.exit_status == 1 and rows(shelf)[copy]['good'] and rows(shelf)[copy]['drill'] is None, run


@pytest.mark.parametrize('content', [b'', b'5', b'{"verified_at": 5, "verdict": ["x"], "drilled_at": {}}', b'\xff', b'[' * 100000])
def test_a_verdict_that_this_version_does_not_write_costs_nothing(a_backup: Any, content: bytes) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT]))
    copy, = shelf.copies('web')
    assert verify(shelf).exit_status == 0
    folder = shelf.at('.vmbackup', 'verdicts')
    name, = os.listdir(folder)
    with open(os.path.join(folder, name), 'wb') as file:
        file.write(content)
    assert rows(shelf)[copy]['good'] and drill(pool, shelf, 'sample=1').exit_status == 0
    assert verify(shelf, 'max_time=5').exit_status == 0 and rows(shelf)[copy]['verdict'] == 'good'


def test_a_damaged_copy_of_the_older_program_is_known_too(a_shelf: Any) -> None:
    shelf = a_shelf(old('web', days_ago=2, image=b'not an archive'))
    assert verify(shelf).exit_status == 1
    copy, = rows(shelf).values()
    assert not copy['good'] and 'found it DAMAGED' in copy['problem']


@pytest.mark.parametrize('fault', [
    at('http:/import', fail=['SR_BACKEND_FAILURE_44', '', 'There is insufficient space', '']), at('http:/import', drop=True),
    at('http:/export_raw_vdi', flip=-700000),
    at('http:/export_raw_vdi', truncate=1000)])
def test_an_sr_that_fails_in_a_drill_condemns_no_copy(a_backup: Any, fault: Any) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT]))
    copy, = shelf.copies('web')
    serving(pool, fault)
    run = drill(pool, shelf, 'web')
    assert run.exit_status == 1 and rows(shelf)[copy]['good'] and rows(shelf)[copy]['drill'] is None, run


def test_a_damaged_copy_of_the_older_program_stays_so_when_its_image_is_compressed(a_shelf: Any) -> None:
    shelf = a_shelf(old('web', days_ago=2, image=b'not an archive'))
    assert verify(shelf).exit_status == 1
    name, = rows(shelf)
    path = shelf.at('web', name, 'web.xva')
    with open(path, 'rb') as file:
        content = file.read()
    with open(path + '.gz', 'wb') as file:
        file.write(gzip.compress(content))
    os.remove(path)
    assert not rows(shelf)[name]['good']


def test_an_image_that_the_storage_host_compresses_while_others_are_verified_is_not_damaged(a_backup: Any,
                                                                                           monkeypatch: Any) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT]))
    name, = shelf.copies('web')
    catalog = VmBackup.Catalog(shelf.path)
    copy, = catalog.folder('web').copies                       # verify lists everything first
    path = shelf.at('web', name, 'web.xva')
    with open(path, 'rb') as file, gzip.open(path + '.gz', 'wb') as packed:
        packed.write(file.read())
    os.remove(path)
    verdict = verified(catalog, copy)
    assert verdict.state is VmBackup.CopyState.GOOD and verdict.copy.image == 'web.xva.gz', verdict


def test_an_image_that_was_compressed_twice_is_good_and_no_drill_ends_with_it(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', disks=[ROOT]), vm('zdb', disks=[ROOT])), a_shelf()
    assert backup(pool, shelf, 'vm-export=*', 'compress=gzip').exit_status == 0
    copy, = shelf.copies('web')
    path = shelf.at('web', copy, shelf.image('web', copy))
    with open(path, 'rb') as plain, gzip.open(path + '.gz', 'wb') as packed:
        shutil.copyfileobj(plain, packed)
    os.remove(path)

    run = drill(pool, shelf, 'newest-of-each')

    assert run.exit_status == 1 and '1 of 2 copies came back' in run.stdout and 'decompress it once' in run.stderr, run
    for words in (['restore', 'web', 'to=back'], ['extract', 'web', 'to=' + shelf.at('disk.raw')]):
        run = run_program('-', shelf.config('vm-export=web'), *words, environment=pool.environment())
        assert run.exit_status == 1 and 'decompress it once' in run.stderr, run
    assert verify(shelf, 'web').exit_status == 0 and all(row['good'] for row in rows(shelf).values())
