"""Where a run finds itself: under cron, without a locale or stdin, watched by others, in a pool of thousands."""

import glob
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, Dict, List, Set

import pytest

from support.deeds import Process, backup, beginning, children_of, preview
from support.language import MEBIBYTE, at, disk, vm
from support.process import PROGRAM, TIME_LIMIT_S, Pool, run, run_program, text_of
from support.shelf import path_of
from support.wire import eventually

SECRET = 'password'          # the one of the simulated pool
BIG = [disk(size=8 * MEBIBYTE, used=8)]


def bare(pool: Pool) -> Dict[str, str]:
    """`env -i PATH=/usr/bin:/bin`, and the one door of tests; xe is named in the config."""
    return {'PATH': '/usr/bin:/bin', 'VMBACKUP_POOL': pool.environment()['VMBACKUP_POOL']}


def test_it_runs_in_an_empty_environment_with_stdin_closed(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('Büro 日本'), vm('db')), a_shelf()
    config = shelf.config('vm-export=Büro*', 'vdi-export=db', 'compress=gzip', 'pool_db_backup=1',
                          'xe_path=' + os.path.join(pool.dir, 'bin', 'xe'))
    done = subprocess.run(['/bin/sh', '-c', 'exec "$@" 0<&-', 'sh', sys.executable, '-W', 'error', PROGRAM, '-', config],
                          env=bare(pool), cwd='/', stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIME_LIMIT_S)
    assert (done.returncode, done.stderr) == (0, b'')
    assert 'Büro 日本' in text_of(done.stdout)
    assert len(shelf.copies('db')) == 1 and len(shelf.names()) == 3


def test_it_runs_with_all_three_standard_descriptors_closed(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf()
    config = shelf.config('vm-export=web', 'vdi-export=db', 'compress=gzip', 'pool_db_backup=1')
    done = subprocess.run(['/bin/sh', '-c', 'exec "$@" 0<&- 1>&- 2>&-', 'sh', sys.executable, PROGRAM, '-', config],
                          env=pool.environment(), cwd='/', timeout=TIME_LIMIT_S)
    assert done.returncode == 0
    assert shelf.has('web', complete=1) and shelf.has('db', complete=1)
    assert all(shelf.proves_itself(folder, shelf.newest(folder)) for folder in ('web', 'db'))


@pytest.mark.parametrize('locale', [{'LC_ALL': 'C'}, {'LC_ALL': 'C.UTF-8'}, {'LANG': 'no_SUCH.locale'},
                                    {'PYTHONIOENCODING': 'latin-1'}], ids=str)
def test_names_are_utf_8_whatever_the_locale(a_pool: Any, a_shelf: Any, locale: Dict[str, str]) -> None:
    pool, shelf = a_pool(vm('Büro 日本', disks=0)), a_shelf()
    run = backup(pool, shelf, 'vm-export="Büro 日本"', environment=dict(pool.environment(), **locale))
    assert run.exit_status == 0, run
    assert '%' in shelf.names()[0] and 'Büro 日本' in run.stdout
    assert shelf.status_lines()[1].endswith('begin,Büro 日本')


def test_config_and_backup_dir_may_have_any_name(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf()
    place = os.path.join(shelf.home, 'Büro 日本 $(reboot) "x"')
    os.mkdir(path_of(place))
    os.mkdir(path_of(os.path.join(place, 'BACKUPS = all')))
    config = os.path.join(place, 'wöchentlich.cfg')
    with open(path_of(config), 'wb') as file:
        file.write(('vm-export=web\nbackup_dir=%s/BACKUPS = all\nstatus_log=%s/status ö.log\n' % (place, place)).encode())
    pool = a_pool(vm('web'))
    run = run_program('-', path_of(config), environment=pool.environment())
    assert run.exit_status == 0, run
    assert sorted(os.listdir(path_of(place))) == sorted(path_of(name) for name in
                                                        ('BACKUPS = all', 'status ö.log', 'wöchentlich.cfg'))


def test_a_log_that_can_not_be_written_costs_no_backup(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    with open('/dev/full', 'wb') as full:
        done = subprocess.run([sys.executable, PROGRAM, '-', shelf.config('vm-export=web')], env=pool.environment(),
                              stdin=subprocess.DEVNULL, stdout=full, stderr=full, timeout=TIME_LIMIT_S)
    assert done.returncode == 0 and shelf.has('web', complete=1)


def test_a_reader_of_the_log_that_went_away_costs_no_backup(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run([sys.executable, PROGRAM, '-', shelf.config('vm-export=web')], env=pool.environment(),
                              stdin=subprocess.DEVNULL, stdout=write_end, stderr=write_end, timeout=TIME_LIMIT_S)
    finally:
        os.close(write_end)
    assert done.returncode == 0 and shelf.has('web', complete=1)


def test_it_leaves_no_process_behind(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', disks=BIG), faults=[at('http:/export', sleeps=60, until='enough')]), a_shelf()
    with beginning(pool, shelf, 'vm-export=web', 'compress=gzip') as process:
        assert eventually(lambda: running_under(pool.dir + '/bin/xe'))
        process.signal(signal.SIGTERM)
        assert process.ending().exit_status == 143
    assert running_under(pool.dir + '/bin/xe') == []


def running_under(word: str) -> List[str]:
    """The command lines of all processes that hold the word."""
    return [line for line in command_lines() if word in line and ' serve ' not in line and ' dump ' not in line]


def command_lines() -> Set[str]:
    found = set()
    for path in glob.glob('/proc/[0-9]*/cmdline'):
        try:
            with open(path, 'rb') as file:
                found.add(text_of(file.read()).replace('\0', ' '))
        except OSError:
            pass
    return found


# --- The password ----------------------------------------------------------------------------------------------------

def environments_with(secret: str, pids: List[int]) -> List[int]:
    found = []
    for pid in pids:
        try:
            with open('/proc/%d/environ' % pid, 'rb') as file:
                if secret.encode() in file.read():
                    found.append(pid)
        except OSError:
            pass
    return found


@pytest.mark.parametrize('scheme', ['https', 'http'])
def test_the_password_is_in_no_argv_no_output_no_file_and_no_environment(a_pool: Any, a_shelf: Any, scheme: str) -> None:
    pool = a_pool(vm('web', disks=BIG), faults=[at('http:/export', sleeps=60, until='enough')])
    shelf = a_shelf()
    file = os.path.join(shelf.home, 'pw')
    assert run_program(SECRET, 'create-password-file=' + file).exit_status == 0
    config = shelf.config('vm-export=web', 'pool=' + (pool.url if scheme == 'http' else 'https://' + pool.tls_address_of()), 'compress=gzip')
    process = Process([file, config], pool.environment())
    seen: Set[str] = set()
    leaks: List[int] = []
    while not process.is_over():
        children = children_of(process.pid)
        leaks += environments_with(SECRET, children)
        for pid in children:
            try:
                with open('/proc/%d/cmdline' % pid, 'rb') as cmdline:
                    seen.add(text_of(cmdline.read()).replace('\0', ' '))
            except OSError:
                pass
        if [line for line in seen if 'vm-export' in line and '-pwf /dev/fd/' in line]:
            pool.release()
        time.sleep(0.02)
    run = process.ending()
    assert run.exit_status == 0, run
    assert [line for line in seen if 'vm-export' in line and '-pwf /dev/fd/' in line], seen
    assert [line for line in seen if SECRET in line] == [] and leaks == []
    assert run.never_says(SECRET)
    os.remove(file)
    assert shelf.holds_no_trace_of(SECRET)
    assert SECRET not in str([entry['args'] for entry in pool.journal()])


def test_the_password_is_told_to_nobody_when_things_go_wrong(a_pool: Any, a_shelf: Any) -> None:
    secret = 'Tr0ub4dor&3 =x'
    pool, shelf = a_pool(vm('web')), a_shelf()
    runs = [backup(pool, shelf, 'vm-export=web', password=secret),
            backup(pool, shelf, 'vm-export=web', 'pool=127.0.0.1:9', password=secret),
            backup(pool, shelf, 'vm-export=', password=secret),
            backup(pool, shelf, 'vm-export=web', password=secret, words=['explode']),
            run_program(secret)]
    assert [run.exit_status for run in runs] == [4, 4, 2, 2, 2]
    assert all(run.never_says(secret) for run in runs)
    assert shelf.holds_no_trace_of(secret)


# --- Thousands -------------------------------------------------------------------------------------------------------

def test_a_preview_of_5000_vms_costs_at_most_12_calls(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web-%04d', count=5000, disks=[disk(size=1 << 30)], vifs=[{}]), vm('db'))
    run = preview(pool, a_shelf(), 'vm-export=web-00*', 'vdi-export=db', 'exclude=web-0000')
    assert run.exit_status == 0, run
    assert run.says('100 VMs to back up') and len(run.stdout.splitlines()) > 5000
    assert len(pool.calls('api:*')) <= 12


@pytest.mark.parametrize('name, content', [
    ('XenAPI.py', b'print "Python 2"\n'), ('XenAPI.py', b'raise ImportError("the wrong one")\n'), ('XenAPI.pyc', b'\x03\xf3\r\n\0\0\0\0c'),
    ('queue.py', b'raise ImportError("not the standard one")\n')])
def test_nothing_is_imported_from_the_directory_that_it_lies_in(a_pool: Any, a_shelf: Any, tmp_path: Any, name: str,
                                                                content: bytes) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    shutil.copy(PROGRAM, str(tmp_path))
    tmp_path.joinpath(name).write_bytes(content)
    done = run([sys.executable, str(tmp_path / 'VmBackup.py'), '-', shelf.config('vm-export=web')], pool.environment())
    assert done.exit_status == 0 and shelf.has('web', complete=1), done
