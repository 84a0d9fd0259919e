"""What a run and its watch make of a pool or a store that gives no answer where nothing hangs on it."""

import time
from types import SimpleNamespace

import pytest

from support.values import an_inventory, planned, services
from VmBackup import (AnswerLost, ApiFailure, BackupRun, Clock, Log, PoolError, Progress, Severity, StorageMisbehaved,
                      StreamStalled, Watch)


LOG = Log(Clock())


class RefusingPool:
    """A pool each call to which fails so."""

    def __init__(self, error):
        self.error, self.calls = error, []

    def call(self, doing, method, *arguments, **options):
        self.calls.append(method)
        raise self.error


@pytest.mark.parametrize('error', [PoolError('the pool refused the login'), AnswerLost('gone'), ApiFailure('INTERNAL_ERROR', [], 'x')],
                         ids=['login', 'lost', 'failure'])
def test_a_pool_that_refuses_to_tell_of_a_task_ends_no_healthy_export_and_a_stalled_one_as_stalled(error):
    pool = RefusingPool(error)
    watch = Watch(services('stall_timeout=1', pool=pool), 'the export of web', 'OpaqueRef:snapshot', (), 0)
    watch._task_asked_at -= 3600
    watch(Progress(0, 30.0, 'xe'))
    assert pool.calls == ['VM.get_current_operations']
    watch._alive_at = time.monotonic() - 3600
    watch._task_asked_at = time.monotonic()
    with pytest.raises(StreamStalled):
        watch(Progress(0, 30.0, 'xe'))
    assert len(pool.calls) == 2


def a_run(**catalog):
    """A run of no VM over a store that answers so."""
    log = Log(Clock())
    log.lines = []
    log.info = log.lines.append
    run = BackupRun(services('backup_dir=/store\nmax_backups=1', log, catalog=SimpleNamespace(**catalog),
                             journal=SimpleNamespace(limit_s=0)), an_inventory(), planned('vm-export=*'), None, None)
    return run, log


def test_space_that_cannot_be_asked_for_ends_no_run():
    def free_bytes():
        raise StorageMisbehaved('/store can\'t be asked for its free space: Input/output error.')
    run, _ = a_run(free_bytes=free_bytes)
    run._note_low_space()
    assert [(one.severity, 'free space' in one.sentence) for one in run._findings[-1:]] == [(Severity.WARNING, True)]
    assert run._storage_problem


@pytest.mark.parametrize('dumps,words', [
    ([('new', '')], 'just made, can\'t be read back'), ([('old', 'POOL'), ('new', '')], 'just made, can\'t be read back'),
    ([('new', 'POOL'), ('old', 'POOL')], 'the clock went back')])
def test_why_dumps_are_not_pruned_is_told_as_it_is(dumps, words):
    pool = an_inventory().pool_uuid
    run, log = a_run(pool_dumps=lambda folder, problems: [(name, pool if uuid else '') for name, uuid in dumps])
    run._prune_pool_dumps('METADATA_host', 'new')
    assert len(log.lines) == 1 and words in log.lines[0]
