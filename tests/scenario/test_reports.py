"""What people and their monitors read: log lines, status lines, the last line, and the exit status."""

import re
from typing import Any

from support.deeds import backup, preview
from support.language import MEBIBYTE, at, disk, vm
from support.process import run_program
from support.shelf import complete

LOG_LINE = re.compile(r'\d{4}-\d\d-\d\d-\(\d\d:\d\d:\d\d\) - \S.*')
STATUS_LINE = re.compile(r'\d{4}/\d\d/\d\d \d\d:\d\d:\d\d,(vmbackup\.py|vm-export|vdi-export),xcp1,(begin|end).*')
FULL = ['SR_BACKEND_FAILURE_44', '', 'There is insufficient space', '']


def test_the_status_log_has_the_older_programs_lines(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('db'), vm('web'), vm('zeta'), faults=[at('api:VM.snapshot', object='web', fails=FULL),
                                                          at('http:/export', object='zeta', breaks_off_after=MEBIBYTE)])
    shelf = a_shelf()
    assert backup(pool, shelf, 'vm-export=*', 'vdi-export=db').exit_status == 1
    lines = shelf.status_lines()
    assert all(STATUS_LINE.fullmatch(line) for line in lines)
    assert [line.split(',', 1)[1] for line in lines if 'zeta' not in line] == [
        'vmbackup.py,xcp1,begin', 'vdi-export,xcp1,begin,db', 'vdi-export,xcp1,end,SUCCESS db,elapse:0 size:0G',
        'vm-export,xcp1,begin,web', 'vm-export,xcp1,end,SNAPSHOT-FAIL web', 'vmbackup.py,xcp1,end,ERROR,S:1 W:0 E:2']
    assert re.search(r'vm-export,xcp1,end,VM-EXPORT-FAIL zeta', '\n'.join(lines))


def test_the_status_log_is_appended_to(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    with open(shelf.status_log, 'w') as file:
        file.write('2016/04/14 00:10:00,vmbackup.py,xcp9,begin\n')
    for _ in range(2):
        assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    lines = shelf.status_lines()
    assert lines[0] == '2016/04/14 00:10:00,vmbackup.py,xcp9,begin' and len(lines) == 9
    assert lines[-1].endswith(',vmbackup.py,xcp1,end,SUCCESS,S:1 W:0 E:0')


def test_warnings_are_counted_and_end_with_3(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', 'vm-export=nothing*', 'exclude=nobody')
    assert run.exit_status == 3 and run.stderr.count(' - warning: ') == 2
    assert shelf.status_lines()[-1].endswith('vmbackup.py,xcp1,end,WARNING,S:1 W:2 E:0')
    assert run.stdout.splitlines()[-1].endswith('2 warnings; exit status 3.')


def test_a_good_run_says_nothing_on_stderr_and_every_line_has_a_time_stamp(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf(complete('web'))
    run = backup(pool, shelf, 'vm-export=web', 'vdi-export=db', 'pool_db_backup=1')
    assert run.exit_status == 0 and run.stderr == ''
    assert all(LOG_LINE.fullmatch(line) for line in run.stdout.splitlines())
    assert '\r' not in run.stdout, 'no progress lines in cron'
    assert re.search(r' - SUCCESS: 2 VMs backed up \(.*\); exit status 0\.$', run.stdout.splitlines()[-1])


def test_errors_and_warnings_go_to_stderr_and_the_rest_to_stdout(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web'), vm('db'), faults=[at('api:VM.snapshot', object='web', fails=FULL)])
    run = backup(pool, a_shelf(), 'vm-export=*', 'exclude=nobody')
    assert run.exit_status == 1
    assert all(LOG_LINE.fullmatch(line) and re.search(r' - (warning|error): ', line) for line in run.stderr.splitlines())
    assert not re.search(r' - (warning|error): ', run.stdout)
    assert 'web' in run.stderr and 'SR_BACKEND_FAILURE_44' in run.stderr and 'SR is full' in run.stderr


def test_the_last_line_names_what_is_missing(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web "1"'), vm('db'), faults=[at('api:VM.snapshot', object='web*', fails=FULL),
                                                  at('xe:pool-dump-database', exit=1, stderr='no')])
    run = backup(pool, a_shelf(), 'vm-export=*', 'vm-export=nobody', 'pool_db_backup=1')
    last = run.stdout.splitlines()[-1]
    assert run.exit_status == 1 and 'ERROR: 1 VM backed up' in last and 'exit status 1.' in last
    assert '2 not: ' in last and 'nobody' in last and 'web' in last and 'pool database' in last


def test_a_failed_pool_dump_is_exit_1_and_the_vms_are_backed_up(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), faults=[at('xe:pool-dump-database', exit=1, stderr='no')]), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', 'pool_db_backup=1')
    assert run.exit_status == 1 and 'pool database' in run.stderr
    assert shelf.has('web', complete=1) and shelf.dumps() == [] and shelf.names('METADATA_xcp1') == []


def test_a_preview_writes_plain_text_and_no_status_line(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', disks=[disk(size=3 << 30)])), a_shelf()
    run = preview(pool, shelf, 'vm-export=web')
    shown = [line for line in run.stdout.splitlines() if not LOG_LINE.fullmatch(line)]
    assert shown[0].startswith('Preview of ') and any('3.0 GiB' in line for line in shown)
    assert shelf.status_lines() == [] and run.stderr == ''


def test_the_host_in_the_status_log_is_the_short_host_name(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web'), hosts=[{'name_label': 'the first', 'hostname': 'alpha.example.org'}])
    shelf = a_shelf()
    assert backup(pool, shelf, 'vm-export=web', 'pool_db_backup=1').exit_status == 0
    assert shelf.status_lines()[0].endswith(',vmbackup.py,alpha,begin') and 'METADATA_alpha' in shelf.names()


def test_help_is_for_asking_and_needs_no_pool() -> None:
    for words in (['help'], ['-h'], ['--help']):
        run = run_program(*words)
        assert run.exit_status == 0 and run.stderr == '' and 'usage: VmBackup.py PASSWORD TARGET' in run.stdout
    assert 'visible to ps' in run_program('help').stdout
    for status in (0, 1, 2, 3, 4, 5, 70):
        assert re.search(r'^ +%d  ' % status, run_program('help').stdout, re.MULTILINE)
    assert re.fullmatch(r'VmBackup \d+\.\d+\.\d+\n', run_program('--version').stdout)
    assert 'max_backups' in run_program('help', 'config').stdout == run_program('config').stdout
    assert 'vm-export=' in run_program('help', 'example').stdout == run_program('example').stdout
    assert 'preview' in run_program('help', 'preview').stdout
    assert run_program('help', 'nothing').exit_status == 2
