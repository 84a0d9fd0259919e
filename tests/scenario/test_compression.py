"""What is proven is what is stored: what the compressor wrote is decompressed again before the copy counts."""

import os
import shutil
from typing import Any, Sequence

import pytest

from support.deeds import backup
from support.language import MEBIBYTE, disk, vm
from support.process import run_program
from support.recovery import holds, restore

ROOT = disk(size=8 * MEBIBYTE, used=[[0, 3], [6, 1]], seed=5)
KINDS = {'gzip': ('gzip', 'pigz'), 'zstd': ('zstd',)}
WRITES_NOTHING, WRITES_HALF, WRITES_PLAIN, FLIPS, ADDS, ENDS_EARLY, FAILS_LATE = (
    'cat >/dev/null', 'exec 3>&1; {real} "$@" | head -c 2000 >&3; cat >/dev/null', 'cat', "{real} \"$@\" | sed 's/A/B/'",
    '{real} "$@"; echo more', 'head -c 100000 | {real} "$@"', '{real} "$@"; exit 7')


def wrapped(folder: str, names: Sequence[str], script: str) -> str:
    """A PATH whose compressors do that."""
    os.makedirs(folder)
    for name in names:
        path = os.path.join(folder, name)
        with open(path, 'w') as file:
            file.write('#!/bin/sh\n' + script.replace('{real}', shutil.which('zstd' if name == 'zstd' else 'gzip')) + '\n')
        os.chmod(path, 0o755)
    return folder + ':/usr/bin:/bin'


@pytest.mark.needs_zstd
@pytest.mark.parametrize('compress', sorted(KINDS))
@pytest.mark.parametrize('script', [WRITES_NOTHING, WRITES_HALF, WRITES_PLAIN, FLIPS, ADDS, ENDS_EARLY, FAILS_LATE])
def test_a_compressor_that_says_it_did_well_and_did_not_costs_no_good_copy(a_pool: Any, a_shelf: Any, tmp_path: Any, compress: str,
                                                                          script: str) -> None:
    pool, shelf = a_pool(vm('web', disks=[ROOT])), a_shelf()
    words = ['vm-export=web', 'max_backups=1', 'compress=' + compress]
    assert backup(pool, shelf, *words).exit_status == 0
    copies = shelf.copies('web')
    environment = dict(pool.environment())
    environment['PATH'] = environment['PATH'].split(':')[0] + ':' + wrapped(str(tmp_path / 'bin'), KINDS[compress], script)
    run = backup(pool, shelf, *words, environment=environment)
    assert run.exit_status == 1 and 'compress' in run.stderr and 'web' in run.stderr and 'Traceback' not in run.stderr, run
    assert shelf.copies('web') == copies and shelf.has('web', complete=1) and pool.has_no_snapshots_of_ours()
    assert shelf.unfinished() == []


@pytest.mark.needs_zstd
@pytest.mark.parametrize('compress', sorted(KINDS))
@pytest.mark.parametrize('line', ['vm-export=web', 'vdi-export=web'])
def test_a_compressed_copy_is_verified_and_restored(a_pool: Any, a_shelf: Any, compress: str, line: str) -> None:
    pool, shelf = a_pool(vm('web', disks=[ROOT])), a_shelf()
    assert backup(pool, shelf, line, 'compress=' + compress, 'verify_after=yes').exit_status == 0
    verified = run_program('-', shelf.config(line), 'verify')
    assert verified.exit_status == 0 and 'good' in verified.stdout, verified
    run = restore(pool, shelf, 'web', 'to=back', lines=[line])
    assert run.exit_status == 0 and holds(pool, 'back', ROOT), run
