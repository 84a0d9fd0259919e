"""The drill: a copy is imported for a while, compared, and nothing of it stays, whatever happens."""

import os
import signal
import sys
from typing import Any

import pytest

from support.deeds import backup, beginning, in_trouble
from support.language import MEBIBYTE, at, disk, vm
from support.mail import ADMINS, MailServer
from support.process import run as run_command
from support.recovery import drill, objects, serving, killed_at
from support.shelf import of_old_program

ROOT = disk(size=10 * MEBIBYTE, used=[[0, 3], [8, 1]], seed=11)
DATA = disk(size=6 * MEBIBYTE, used=[[1, 2]], seed=12)
VIF = {'device': '0'}
ZSTD = pytest.param(('vm-export=*', 'compress=zstd'), marks=pytest.mark.needs_zstd)


def backed_up(pool: Any, shelf: Any, *lines: str) -> None:
    run = backup(pool, shelf, *(lines or ('vm-export=*',)))
    assert run.exit_status == 0, run


def listed(pool: Any, shelf: Any) -> str:
    return backup(pool, shelf, 'vm-export=*', words=['list']).output


def is_as_before(pool: Any, before: Any) -> bool:
    after = objects(pool)
    return all(after[kind] == before[kind] for kind in ('VM', 'VDI', 'VBD', 'VIF', 'network', 'task', 'session'))


@pytest.mark.parametrize('lines', [('vm-export=*',), ('vm-export=*', 'compress=gzip'), ZSTD, ('vdi-export=*',),
                                   ('vdi-export=*', 'vdi_export_format=vhd', 'compress=gzip')])
def test_a_good_copy_comes_back_and_goes_again(a_backup: Any, lines: Any) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT, DATA], vifs=[VIF], power_state='Running', tags=['x']), lines=lines)
    before = objects(pool)
    run = drill(pool, shelf, 'web', lines=lines)
    assert run.exit_status == 0 and run.says('restored and compared'), run
    assert is_as_before(pool, before) and shelf.journals() == []
    assert 'restored and compared on 20' in listed(pool, shelf)
    assert [line.split(',', 1)[1].split(',')[0] for line in shelf.status_lines()[-4:]] == [
        'vmbackup.py', 'drill', 'drill', 'vmbackup.py']


def test_no_interface_is_ever_made(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web', vifs=[VIF]))
    assert drill(pool, shelf, 'web').exit_status == 0
    assert pool.never_saw('api:VIF.create') and not [record for record in pool.dump()['VM'].values() if 'drill' in
                                                     record['name_label']]


def test_newest_of_each_takes_every_vm_once_and_sample_those_longest_not_drilled(a_backup: Any) -> None:
    pool, shelf = a_backup(*[vm(name, disks=[disk(seed=number)]) for number, name in enumerate(['a', 'b', 'c'])], nights=2)
    run = drill(pool, shelf, 'newest-of-each')
    assert run.exit_status == 0 and run.says('3 of 3 copies came back') and len(pool.calls('xe:vm-import')) == 3
    for name in ('a', 'b', 'c', 'a'):
        backed_up(pool, shelf)             # what counts is when a VM was drilled, not its newest copy
        run = drill(pool, shelf, 'sample=1')
        assert run.exit_status == 0 and run.says('%s/%s: restored and compared' % (name, shelf.newest(name))), run


def test_a_newest_copy_that_is_not_good_is_passed_over_and_said(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web'), nights=2)
    os.unlink(shelf.at('web', shelf.newest('web'), 'success'))
    run = drill(pool, shelf, 'newest-of-each')
    assert run.exit_status == 3 and run.says('passed over: ') and run.says('web/%s: restored' % shelf.newest('web')), run


@pytest.mark.parametrize('words', [[], ['sample=0'], ['sample=x'], ['web', 'sample=1'], ['nobody'], ['web', 'boot=perhaps'],
                                   ['web', 'sr=none']])
def test_a_drill_that_is_not_asked_for_properly_starts_nothing(a_backup: Any, words: Any) -> None:
    pool, shelf = a_backup(vm('web'))
    run = drill(pool, shelf, *words)
    assert run.exit_status in (1, 2) and pool.never_saw('xe:vm-import'), run


def test_a_vm_that_has_no_good_copy_fails_the_drill(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web'), vm('db'))
    os.truncate(shelf.at('web', shelf.newest('web'), 'web.xva'), MEBIBYTE)
    run = drill(pool, shelf, 'newest-of-each')
    assert run.exit_status == 1 and run.says('there is no good one of this VM') and run.says('1 of 2 copies came back'), run
    run = drill(pool, shelf, 'web')
    assert run.exit_status == 1 and run.says('`restore` with from=STAMP force=yes takes one all the same'), 'a drill takes neither'


def test_an_old_copy_can_be_drilled(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('db'), srs=[{'name_label': 'here'}]), a_shelf(of_old_program())
    before = objects(pool)
    assert drill(pool, shelf, 'PROD-web', 'sr=here').exit_status == 0
    assert is_as_before(pool, before)


def test_a_damaged_copy_fails_the_drill_and_says_so_everywhere(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT]), vm('db'))
    path = shelf.at('web', shelf.newest('web'), 'web.xva')
    with open(path, 'r+b') as file:
        file.seek(os.path.getsize(path) // 2)
        file.write(b'\xff')
    before = objects(pool)
    run = drill(pool, shelf, 'newest-of-each')
    assert run.exit_status == 1 and run.says('1 of 2 copies came back'), run
    assert run.says('`list` shows the other copies. The next backup of its VM, if it still is backed up, makes a new one.'), run
    assert is_as_before(pool, before)
    assert 'NOT RESTORABLE on 20' in listed(pool, shelf) and 'DRILL-FAIL web' in ''.join(shelf.status_lines())


def test_an_sr_that_gives_back_other_bytes_is_found_out(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT]), faults=[at('http:/export_raw_vdi', flips=-5 * MEBIBYTE)])
    run = drill(pool, shelf, 'web')
    assert run.exit_status == 1 and run.says('came back different'), run


def test_it_boots_where_that_is_asked_for(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT], power_state='Running', os_version='CentOS 7'))
    before = objects(pool)
    run = drill(pool, shelf, 'web', 'boot=0.05')
    assert run.exit_status == 0 and run.says('booted'), run
    assert is_as_before(pool, before)


def test_a_vm_that_does_not_start_fails_the_drill(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT]), faults=[at('api:VM.start', fails=['NO_HOSTS_AVAILABLE'])])
    before = objects(pool)
    run = drill(pool, shelf, 'web', 'boot=yes')
    assert run.exit_status == 1 and run.says('NO_HOSTS_AVAILABLE') and is_as_before(pool, before), run


FAULTS = [at('http:/import', breaks_off_after=MEBIBYTE), at('http:/import', drop=True), at('xe:vm-import', kill='xe'),
          at('http:/export_raw_vdi', breaks_off_after=MEBIBYTE), at('xe:vdi-export', kill='xe'),
          at('xe:vdi-export', exit=1, stderr='x'), at('api:VDI.get_record', drop=True, nth=1),
          at('api:VDI.destroy', drop=True, when='after', nth=1), at('api:VM.destroy', drop=True, when='after', nth=1)]


@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: '%s %s' % (fault['on'], sorted(fault['do'])[0] + fault.get('when', '')))
def test_nothing_stays_after_any_fault(a_backup: Any, fault: Any) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT, DATA]), faults=[fault])
    before = objects(pool)
    run = drill(pool, shelf, 'web')
    assert run.exit_status in (0, 1, 3), run
    assert is_as_before(pool, before) and shelf.journals() == [], run


@pytest.mark.parametrize('occasion,when', [('http:/import', ''), ('xe:vm-import', 'after'), ('http:/export_raw_vdi', ''),
                                           ('api:VM.start', 'after'), ('api:VDI.destroy', ''), ('api:VM.destroy', 'after')])
def test_what_a_killed_drill_left_is_gone_after_the_next_run(a_backup: Any, occasion: str, when: str) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT, DATA]))
    before = objects(pool)
    killed_at(pool, shelf, occasion, when, 'drill', 'web', 'boot=yes')
    run = drill(pool, shelf, 'web')
    assert run.exit_status == 0, run
    after = objects(pool)
    assert all(set(after[kind]) == set(before[kind]) for kind in ('VM', 'VDI', 'VBD', 'VIF', 'network', 'task')), run
    assert shelf.journals() == []


def test_a_signal_ends_a_drill_cleanly(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web', disks=[ROOT]), faults=[at('http:/import', sleeps=60, until='enough')])
    before = objects(pool)
    with beginning(pool, shelf, 'vm-export=*', words=['drill', 'web']) as process:
        assert process.says(': drill of'), process.output
        process.signal(signal.SIGTERM)
        assert process.says('SIGTERM came'), process.output
        pool.release()
        run = process.ending()
    assert run.exit_status == 128 + signal.SIGTERM and is_as_before(pool, before) and shelf.journals() == [], run


# --- a store that hangs ------------------------------------------------------------------------------------------------

def steps_of(pool: Any, shelf: Any, config: str, *words: str) -> Any:
    """The steps of the storage that these words make, a line each."""
    trace = os.path.join(pool.home, 'trace')
    program = in_trouble(pool, store=shelf.path, trace=trace)
    assert run_command([sys.executable] + program + ['-', config] + list(words), pool.environment()).exit_status == 0
    with open(trace) as file:
        return file.read().splitlines()


def test_a_drill_whose_store_hangs_clears_the_pool_tells_it_by_mail_and_ends(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf, server = a_pool(vm('db', disks=[DATA]), vm('web', disks=[ROOT])), a_shelf(), MailServer()
    try:
        backed_up(pool, shelf)
        before, config = objects(pool), shelf.config('vm-export=*', 'stall_timeout=12', *server.lines())
        notes = [number for number, step in enumerate(steps_of(pool, shelf, config, 'drill', 'newest-of-each'), 1)
                 if step.startswith('write .vmbackup/runs/')]
        server.forget()
        program = in_trouble(pool, hurried=True, store=shelf.path, step=notes[2], do='hang', stays=True)
        run = run_command([sys.executable] + program + ['-', config, 'drill', 'newest-of-each'], pool.environment())
        assert run.exit_status == 1 and run.says('hangs') and run.says('was not tried') and run.never_says('Traceback'), run
        assert is_as_before(pool, before), run
        assert 'db' in server.mail().text and 'web' in server.mail().text and ADMINS in server.mail().recipients
    finally:
        server.stop()


@pytest.mark.parametrize('note', [2, -1])
def test_a_restore_whose_store_hangs_ends_and_says_what_became_of_it(a_pool: Any, a_shelf: Any, note: int) -> None:
    pool, shelf = a_pool(vm('web', disks=[ROOT])), a_shelf()
    backed_up(pool, shelf)
    config = shelf.config('vm-export=*', 'stall_timeout=12')
    notes = [number for number, step in enumerate(steps_of(pool, shelf, config, 'restore', 'web', 'to=first'), 1)
             if step.startswith('write .vmbackup/runs/')]
    program = in_trouble(pool, hurried=True, store=shelf.path, step=notes[note], do='hang', stays=True)
    run = run_command([sys.executable] + program + ['-', config, 'restore', 'web', 'to=second'], pool.environment())
    assert run.exit_status == (1 if note == 2 else 0) and run.never_says('Traceback'), run
    assert not [record for kind in ('VM', 'task') for record in pool.dump()[kind].values() if 'vmbackup-' in record['name_label']], run
