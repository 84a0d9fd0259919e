"""What a run and its watch make of a pool or a store that gives no answer where nothing hangs on it."""

import errno
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from unittest import mock

import pytest

from support.values import a_round_plan, an_inventory, services
from support.wire import eventually
import VmBackup
from VmBackup import (AnswerLost, ApiFailure, Clock, ImportWatch, Leader, Log, PoolError, Progress, Run, Severity,
                      StorageMisbehaved, StreamStalled, Watch, parse_arguments)


LOG = Log(Clock())


class RefusingPool:
    """A pool each call to which fails so."""

    def __init__(self, error):
        self.error, self.calls = error, []

    def call(self, doing, method, *arguments, **options):
        self.calls.append(method)
        raise self.error


@pytest.mark.parametrize('code, step', [
    ('SR_BACKEND_FAILURE_44', 'free space on it'), ('SR_BACKEND_FAILURE_79', '/var/log/SMlog'),
    ('INTERNAL_ERROR', '/var/log/xensource.log'),
])
def test_every_refusal_of_the_pool_names_a_next_step(code, step):
    assert step in str(ApiFailure(code, ['what it says'], 'the snapshot of web'))


@pytest.mark.parametrize('error', [PoolError('the pool refused the login'), AnswerLost('gone'), ApiFailure('INTERNAL_ERROR', [], 'x')],
                         ids=['login', 'lost', 'failure'])
def test_a_pool_that_refuses_to_tell_of_a_task_ends_no_healthy_export_and_a_stalled_one_as_stalled(error):
    pool = RefusingPool(error)
    watch = Watch(services('stall_timeout=1', pool=pool), 'the export of web',
                  find_tasks=lambda: pool.call('looking', 'VM.get_current_operations'))
    watch._task_asked_at -= 3600
    watch(Progress(0, 30.0, 'xe'))
    assert pool.calls == ['VM.get_current_operations']
    watch._alive_at = time.monotonic() - 3600
    watch._task_asked_at = time.monotonic()
    with pytest.raises(StreamStalled):
        watch(Progress(0, 30.0, 'xe'))
    assert len(pool.calls) == 2


def test_two_imports_that_stand_still_at_different_points_are_no_sign_of_life():
    pool = SimpleNamespace(call=lambda doing, method, task: {'first': 1.0, 'second': 0.3}[task])
    watch = ImportWatch(services('stall_timeout=1', pool=pool), 'the import of web', find_tasks=lambda: ['first', 'second'])
    for _ in range(2):
        watch._alive_at, watch._task_asked_at = time.monotonic() - 50, time.monotonic() - 3600
        before = watch._alive_at
        watch(Progress(0, 30.0, 'server'))
    assert watch._alive_at == before
    watch._alive_at -= 3600
    with pytest.raises(StreamStalled):
        watch(Progress(0, 30.0, 'server'))


def a_backup(**catalog):
    """A backup of no VM over a store that answers so."""
    log = Log(Clock())
    log.lines = []
    log.info = log.lines.append
    with mock.patch('VmBackup.begin_run', lambda catalog, name, header, now_s: SimpleNamespace(name=name, header=header)):
        doors = services('backup_dir=/store\nmax_backups=1', log, catalog=SimpleNamespace(lock_file=mock.Mock(), **catalog),
                         arguments=parse_arguments(['-', 'weekend.cfg']))
        run = Run(doors, mock.Mock())
        run.begin(doors, an_inventory())
    return Leader(run, SimpleNamespace(plan=a_round_plan(), has=lambda name: False), None), log


def test_space_that_cannot_be_asked_for_ends_no_run():
    def free_bytes():
        raise StorageMisbehaved('/store can\'t be asked for its free space: Input/output error.')
    backup, _ = a_backup(free_bytes=free_bytes)
    assert [(one.severity, 'free space' in one.sentence) for one in backup._low_space()] == [(Severity.WARNING, True)]
    assert backup.run.store_problem and 'misbehaved' in backup.why_not_pruned


@pytest.mark.parametrize('dumps,words', [
    ([('new', '')], 'just made, can\'t be read back'), ([('old', 'POOL'), ('new', '')], 'just made, can\'t be read back'),
    ([('new', 'POOL'), ('old', 'POOL')], 'the clock went back')])
def test_why_dumps_are_not_pruned_is_told_as_it_is(dumps, words):
    pool = an_inventory().pool_uuid
    backup, log = a_backup(pool_dumps=lambda folder, problems: [(name, pool if uuid else '') for name, uuid in dumps])
    assert list(backup._prune_pool_dumps('METADATA_host', 'new')) == []
    assert len(log.lines) == 1 and words in log.lines[0]


# --- the way out ---------------------------------------------------------------------------------------------------------

def test_a_store_that_hangs_on_the_way_out_is_waited_for_once(monkeypatch):
    backup, log = a_backup()
    run, done = backup.run, []

    def broken_door():
        raise StorageMisbehaved('EIO.')

    run.tidy('this', broken_door)
    run.tidy('that', lambda: done.append('that'))
    assert done == ['that'] and log.lines == ['this: left to the next run: EIO.'] and not run.storage_hangs
    monkeypatch.setattr(VmBackup, 'WAY_OUT_S', 0.05)
    run.services.signals.noted = VmBackup.Interrupted(15)                        # told to stop, it waits less
    run.tidy('hung', lambda: time.sleep(60))
    run.tidy('more', lambda: done.append('more'))
    assert run.storage_hangs and done == ['that'] and len([line for line in log.lines if line.startswith('hung')]) == 1
    assert not [line for line in log.lines if line.startswith('more')]


def test_as_many_files_can_be_open_as_the_system_lets_us():
    """A lock file is never closed, and each VM has two: the usual 1,024 are too few for a large pool."""
    code = ('import resource; hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]; '
            'resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)); import VmBackup; VmBackup.raise_descriptor_limit(); '
            'print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] == (65536 if hard < 0 else min(hard, 65536)))')
    shown = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, check=True,
                           cwd=os.path.dirname(os.path.abspath(VmBackup.__file__)))
    assert shown.stdout == b'True\n'


def test_a_full_disk_elsewhere_is_not_called_the_backup_storage():
    for number, is_elsewhere, said in ((errno.ENOSPC, False, 'pre_clean'), (errno.EIO, False, 'the backup storage misbehaved')):
        for elsewhere in (is_elsewhere, True):
            with pytest.raises(VmBackup.CatalogError) as caught, VmBackup.storage_errors('writing x', elsewhere):
                raise OSError(number, os.strerror(number))
            assert (said in str(caught.value)) is not elsewhere and os.strerror(number) in str(caught.value)


@pytest.mark.parametrize('hangs', [False, True])
def test_the_lock_of_a_directory_stays_ours_while_a_thread_may_go_on_in_a_store_that_hung(tmp_path, hangs):
    """What seals or removes there was left to itself, and does its work when the store answers again."""
    (tmp_path / 'web').mkdir()
    own = services('backup_dir=%s\nvm-export=web\n' % tmp_path, LOG, catalog=VmBackup.Catalog(str(tmp_path)))
    run = Run(own, None)
    run.inventory = an_inventory()
    placement = SimpleNamespace(folder_name=lambda machine: 'web', look_again=own.catalog.folder)
    job = VmBackup.BackupJob(SimpleNamespace(run=run, placement=placement),
                             SimpleNamespace(job=SimpleNamespace(machine=None), disks=''))
    with pytest.raises(StorageMisbehaved), job._own_folder():
        run.storage_hangs = hangs
        raise StorageMisbehaved('what sealed the copy was left to itself')
    probe = 'import fcntl, sys; fcntl.lockf(open(sys.argv[1], "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)'
    path = own.catalog.folder_lock('web').shown
    other = subprocess.run([sys.executable, '-c', probe, path], stderr=subprocess.DEVNULL)
    assert (other.returncode != 0) is hangs
    own.catalog.folder_lock('web').release()


def test_a_signal_is_raised_anew_each_time():
    """One object that is raised while it unwinds becomes its own context, and Python 3.6 never ends with that."""
    signals = VmBackup.Signals(LOG)
    signals._note(15, None)
    raised = []
    for _ in range(2):
        with pytest.raises(VmBackup.Interrupted) as caught:
            signals.check()
        raised.append(caught.value)
    signals.come_too_late()
    assert raised[0] is not raised[1] and {one.number for one in raised} == {15}


def test_a_terminal_that_takes_nothing_costs_no_line_of_a_worker_that_has_ended(monkeypatch):
    goes_on, told = threading.Event(), []

    def relay(_worker, line):
        goes_on.wait()
        told.append(line)
    monkeypatch.setattr(VmBackup, 'worker_start', lambda: (['/bin/sh', '-c', 'cat > /dev/null; seq 5000'], b''))
    crew = VmBackup.Crew(SimpleNamespace(log=SimpleNamespace(relay=relay), settings=SimpleNamespace(workers=2),
                                         arguments=SimpleNamespace(password='', words=())),
                         SimpleNamespace(plan=SimpleNamespace(id='')))
    crew.end()                              # after some seconds in which nobody took a line
    goes_on.set()
    assert eventually(lambda: told[-1:] == ['']) and told[:-1] == ['%d\n' % number for number in range(1, 5001)]
