"""The backup directory and what happens to it: not there, not writable, gone in the middle, full."""

import ctypes
import glob
import mmap
import os
import resource
import shutil
import subprocess
import sys
from typing import Any, Iterator, List

import pytest

from support import warm
from support.deeds import backup, beginning, in_trouble, objects, without_pool
from support.language import MEBIBYTE, disk, slowly, vm
from support.process import PROGRAM, TIME_LIMIT_S, Run, ended, run, text_of
from support.shelf import complete, foreign, unfinished
from support.wire import eventually

BIG = [disk(size=8 * MEBIBYTE, used=8)]


def mount(*arguments: str) -> None:
    """Mounted; the test is skipped where we may not, as a file system that is really full or read-only can't be had else."""
    if os.geteuid() != 0 or shutil.which('mount') is None:
        pytest.skip('only root can mount')
    done = subprocess.run(['mount'] + list(arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        pytest.skip('mount is not possible here: %s' % text_of(done.stderr).strip())


def mounted(path: str, options: str) -> Iterator[str]:
    """A file system of its own, for as long as a test needs it."""
    mount('-t', 'tmpfs', '-o', options, 'tmpfs', path)
    yield path
    subprocess.run(['umount', '-l', path], check=True)


@pytest.fixture
def small_disk(tmp_path: Any) -> Iterator[str]:
    """A file system with room for 12 MiB."""
    yield from mounted(str(tmp_path), 'size=12m')


@pytest.fixture
def own_disk(tmp_path: Any) -> Iterator[str]:
    """A file system of its own that is not in memory."""
    image, path = str(tmp_path / 'image'), str(tmp_path / 'disk')
    os.mkdir(path)
    with open(image, 'wb') as file:
        file.truncate(32 * MEBIBYTE)
    if shutil.which('mkfs.ext4') is None or subprocess.run(['mkfs.ext4', '-q', '-F', image]).returncode:
        # Whatever else is at hand is the root disk or lies in memory, and both are refused: there is nothing to try it on.
        pytest.skip('no ext4 file system can be made here')
    mount('-o', 'loop', image, path)
    yield path
    subprocess.run(['umount', '-l', path], check=True)


@pytest.fixture
def read_only_disk(tmp_path: Any) -> Iterator[str]:
    yield from mounted(str(tmp_path), 'size=1m,ro')


def test_a_read_only_backup_dir_is_refused_before_anything_starts(a_pool: Any, a_shelf: Any, read_only_disk: str) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf(path=read_only_disk)
    run = backup(pool, shelf, 'vm-export=web')
    assert run.exit_status == 2 and 'backup_dir' in run.stderr and 'not writable' in run.stderr
    assert read_only_disk in run.stderr and pool.journal() == []


def test_a_backup_dir_that_can_only_be_read_is_enough_to_explain(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web'))
    mount('--bind', shelf.path, shelf.path)
    try:
        mount('-o', 'remount,ro,bind', shelf.path)
        run = backup(pool, shelf, 'vm-export=web', words=['explain', 'web'])
    finally:
        subprocess.run(['umount', '-l', shelf.path], check=True)
    told = ' '.join(run.stdout.split())
    assert run.exit_status == 0 and told.startswith('web (') and 'Copies: 1, 1 good' in told, run
    assert 'it ends before its first VM: ' in told and 'is not writable: is the share' in told


def test_a_backup_dir_on_a_mount_of_its_own_is_used_where_a_mount_is_required(a_pool: Any, a_shelf: Any,
                                                                             own_disk: str) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf(path=own_disk)
    run = backup(pool, shelf, 'vm-export=web', 'require_mount=yes')
    assert run.exit_status in (0, 3) and shelf.has('web', complete=1)


@pytest.mark.parametrize('require_mount, status', [('yes', 2), ('auto', 3), ('no', 3)])
def test_a_backup_dir_in_memory_is_refused_as_one_on_the_root_disk_is(a_pool: Any, a_shelf: Any, small_disk: str, require_mount: str,
                                                                      status: int) -> None:
    pool, shelf = a_pool(vm('web', disks=[disk(size=8 * MEBIBYTE, used=8)])), a_shelf(path=small_disk)
    run = backup(pool, shelf, 'vm-export=web', 'require_mount=' + require_mount)
    assert run.exit_status == status and run.says('in memory (tmpfs)') is (require_mount != 'no')
    assert shelf.is_unchanged() is (status == 2)
    assert shelf.has('web', complete=0 if status == 2 else 1)


def test_a_full_disk_is_that_vms_failure_and_the_next_vm_is_tried(a_pool: Any, a_shelf: Any, small_disk: str) -> None:
    pool = a_pool(vm('db'), vm('web', disks=[disk(size=24 * MEBIBYTE, used=24)]), vm('zeta'))
    shelf = a_shelf(complete('web'), path=small_disk)
    run = backup(pool, shelf, 'vm-export=*')
    assert run.exit_status == 1
    assert 'no space left on the backup storage' in run.stderr and 'error: web' in run.stderr, run
    assert shelf.has('db', complete=1) and shelf.has('zeta', complete=1)
    assert shelf.still_holds('web') and shelf.has('web', complete=1)
    assert shelf.unfinished() == [] and pool.has_no_snapshots_of_ours()


def test_a_limit_of_the_file_size_is_a_failure_like_a_full_disk(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('db'), vm('web', disks=BIG)), a_shelf(complete('web'))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * MEBIBYTE, 5 * MEBIBYTE))
    done = subprocess.run([sys.executable, '-W', 'error', PROGRAM, '-', shelf.config('vm-export=*')], preexec_fn=limit,
                          env=pool.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=TIME_LIMIT_S)
    run = Run(done.returncode, text_of(done.stdout), text_of(done.stderr))
    assert run.exit_status == 1 and 'error: web' in run.stderr, run
    assert shelf.has('db', complete=1) and shelf.still_holds('web') and shelf.unfinished() == []
    assert pool.has_no_snapshots_of_ours()


@pytest.mark.parametrize('then', ['gone', 'another directory in its place'])
def test_a_backup_dir_that_goes_away_in_the_middle_is_not_filled_under(a_pool: Any, a_shelf: Any, then: str) -> None:
    pool = a_pool(vm('web', disks=BIG), vm('zeta'), faults=[slowly(object='web')])
    shelf = a_shelf(complete('web', days_ago=2), complete('web', days_ago=1))
    before = objects(pool)
    with beginning(pool, shelf, 'vm-export=*', 'max_backups=1') as process:
        assert eventually(shelf.unfinished)
        os.rename(shelf.path, shelf.path + '.away')
        if then != 'gone':
            os.mkdir(shelf.path)
        pool.release()
        run = process.ending()
    assert run.exit_status == 1 and shelf.path in run.stderr, run
    assert not os.path.exists(shelf.path) or os.listdir(shelf.path) == []
    assert objects(pool) == before
    if then != 'gone':
        os.rmdir(shelf.path)
    os.rename(shelf.path + '.away', shelf.path)
    assert shelf.has('web', complete=2) and shelf.still_holds(*['web/' + name for name in shelf.copies('web')])


def test_a_status_log_without_a_directory_is_said_and_costs_no_backup(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', 'status_log=/no/such/place/status.log')
    assert run.exit_status == 0 and run.says('/no/such/place/status.log') and run.stderr == ''


def test_space_that_runs_low_is_a_warning(a_pool: Any, a_shelf: Any, small_disk: str) -> None:
    pool, shelf = a_pool(vm('web', disks=BIG)), a_shelf(path=small_disk)
    run = backup(pool, shelf, 'vm-export=web')
    assert run.exit_status == 3 and 'are free' in run.stderr, run
    assert shelf.has('web', complete=1)


def test_an_sr_that_is_nearly_full_gets_no_snapshot(a_pool: Any, a_shelf: Any) -> None:
    small = {'name_label': 'small', 'type': 'nfs', 'shared': True, 'size': 20 * MEBIBYTE}
    big = {'name_label': 'big', 'type': 'nfs', 'shared': True}
    pool = a_pool(vm('web', disks=[disk(size=32 * MEBIBYTE, used=19, sr='small')]), vm('db', disks=[disk(sr='big')]),
                  srs=[big, small])
    shelf = a_shelf()
    run = backup(pool, shelf, 'vm-export=*', 'min_sr_free=20%')
    assert run.exit_status == 1 and 'small' in run.stderr and 'min_sr_free' in run.stderr, run
    assert len(pool.calls('api:VM.snapshot')) == 1 and shelf.has('db', complete=1)


def test_an_image_is_read_back_and_compared_where_that_is_asked_for(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', 'verify_after=yes')
    assert run.exit_status == 0 and run.says('back from storage')
    assert shelf.manifest('web', shelf.newest('web'))['verified']['read_back'] is True


def mebibytes_cached(path: str) -> float:
    """How much of the file the page cache holds."""
    with open(path, 'r+b') as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE) as pages:
        size = len(pages)
        held = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        begin = ctypes.c_char.from_buffer(pages)
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(begin)), ctypes.c_size_t(size), held)
        del begin
    assert not failed
    return sum(flags & 1 for flags in held) * mmap.PAGESIZE / MEBIBYTE


@pytest.fixture
def a_forgetful_disk(tmp_path: Any) -> None:
    """Skipped where the stores of tests lie in memory, or on a file system that keeps its pages whatever it is advised."""
    path = str(tmp_path / 'probe')
    with open(path, 'wb') as file:
        file.write(bytes(MEBIBYTE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if mebibytes_cached(path):
        pytest.skip('the file system of the temporary directory keeps its pages, whatever it is advised')


@pytest.mark.parametrize('lines', [['vm-export=web'], ['vdi-export=web', 'incremental=yes'],
                                   ['vm-export=web', 'verify_after=yes']])
def test_neither_a_backup_nor_a_verify_leaves_images_in_the_memory_of_the_host(a_pool: Any, a_shelf: Any, a_forgetful_disk: None,
                                                                               lines: List[str]) -> None:
    pool, shelf = a_pool(vm('web', disks=[disk(size=40 * MEBIBYTE, used=40)])), a_shelf()
    for night in range(2):
        assert backup(pool, shelf, *lines, words=['force=yes']).exit_status == 0
    images = [path for path in glob.glob(shelf.at('web', 'backup-*', '*')) if os.path.getsize(path) > MEBIBYTE]
    assert images and [path for path in images if mebibytes_cached(path) > 1] == []
    assert without_pool(shelf, 'verify', lines=lines).exit_status == 0
    assert [path for path in images if mebibytes_cached(path) > 1] == []


def test_storage_that_hangs_when_an_image_is_read_back_keeps_no_snapshot(a_pool: Any, a_shelf: Any) -> None:
    """The snapshot that is to become the reference is there until the copy is sealed."""
    def night(**trouble: Any) -> Run:
        shelf = a_shelf()
        lines = ('vm-export=web', 'incremental=yes', 'keep_reference=yes', 'verify_after=yes', 'stall_timeout=15')
        program = in_trouble(pool, store=shelf.path, reads=True, **trouble)
        return ended(warm.start(program + ['-', shelf.config(*lines)], pool.environment()))

    pool, trace = a_pool(vm('web')), os.path.join(a_shelf().home, 'trace')
    assert night(trace=trace).exit_status == 0
    with open(trace) as file:
        step = next(number for number, line in enumerate(file, 1) if line.endswith('web.xva\n'))
    before = objects(pool)
    run = night(step=step, do='hang', hurried=True)
    assert run.exit_status == 1 and run.says('web.xva back from storage') and run.says('Is the share still reachable?'), run
    assert objects(pool) == before


# --- what can't be read costs only itself --------------------------------------------------------------------------------

@pytest.mark.parametrize('number', ['EIO', 'ENOTCONN', 'EUCLEAN'])
def test_what_can_not_be_looked_at_costs_no_vm_its_backup_and_stops_the_pruning(a_pool: Any, a_shelf: Any, number: str) -> None:
    dump = 'pool_db_20160414-001000.dump'
    shelf = a_shelf(complete('web', days_ago=3), complete('web', days_ago=2), unfinished('web', days_ago=1), complete('db', days_ago=2),
                    foreign('dead/file'), foreign('METADATA_xcp1/' + dump), foreign('.vmbackup/runs/x.run', b'{"pool": "p"}\n'))
    pool = a_pool(vm('web'), vm('db'))
    unreadable = ['dead', dump, 'x.run', os.path.basename(shelf.unfinished()[0])]
    program = [sys.executable, '-W', 'error'] + in_trouble(pool, at=unreadable, do=number)
    config = shelf.config('vm-export=web:1', 'vm-export=db:1', 'pool_db_backup=1')

    night = run(program + ['-', config], pool.environment())

    assert night.exit_status == 3 and night.never_says('Traceback'), night
    assert len(shelf.copies('web')) == 3 and len(shelf.copies('db')) == 2 and len(shelf.names('METADATA_xcp1')) == 2
    assert [sum(name in line for line in night.stderr.splitlines()) for name in unreadable] == [1, 1, 1, 1], night
    for words in (['list'], ['restore', 'web', 'preview'], ['verify', 'db', 'from=latest']):
        asked = run(program + ['-', config] + words, pool.environment())
        assert asked.never_says('Traceback') and asked.exit_status == (1 if words[0] == 'verify' else 0), asked
    assert asked.says('1 good'), asked
