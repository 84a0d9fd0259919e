"""A sample of the generated fault suites: whatever goes wrong in a backup, no good copy is lost, none is falsely good, and the
pool is left as it was; whatever goes wrong in a restore or a drill, there is a whole VM or nothing. tests/soak runs all."""

import fcntl
import os
import pickle
import shutil
from typing import Any, Dict

import pytest

from support import faultsuite
from support.faultsuite import Base
from support.process import PROGRAM
from support.recoveryfaults import RecoveryBase

#: How many troubles of each kind are tried; the name of a kind says where it strikes and what it does.
SAMPLE = {'api-fail': 2, 'api-drop': 2, 'api-hang': 1, 'api-logout': 1, 'api-lose': 1, 'api-master': 2, 'http-truncate': 2,
          'http-flip': 2, 'http-drop': 1, 'http-keepalive': 1, 'xe-exit': 2, 'xe-kill': 1, 'SIGKILL': 2, 'SIGTERM': 1,
          'storage-ENOSPC': 2, 'storage-EIO': 2, 'storage-ESTALE': 1, 'storage-SIGKILL': 2, 'storage-SIGTERM': 1,
          'storage-short': 1}
RECOVERY_SAMPLE = {'restore-api-drop': 1, 'restore-api-fail': 2, 'restore-api-lose': 1, 'restore-http-flip': 1,
                   'restore-http-truncate': 1, 'restore-xe-kill': 1, 'restore-storage-SIGKILL': 1, 'restore-SIGKILL': 1,
                   'drill-api-fail': 1, 'drill-api-hang': 1, 'drill-api-master': 1, 'drill-http-drop': 1, 'drill-xe-exit': 1,
                   'drill-storage-ENOSPC': 1, 'drill-SIGKILL': 1, 'drill-SIGTERM': 1}


def choices(sample: Dict[str, int]) -> Any:
    found = [(kind, number) for kind in sorted(sample) for number in range(sample[kind])]
    return pytest.mark.parametrize('kind, number', found, ids=['%s-%d' % choice for choice in found])


@pytest.fixture(scope='session')
def base(tmp_path_factory: Any) -> Base:
    return recorded_once(tmp_path_factory, Base)


@pytest.fixture(scope='session')
def recovery_base(tmp_path_factory: Any) -> RecoveryBase:
    return recorded_once(tmp_path_factory, RecoveryBase)


def recorded_once(tmp_path_factory: Any, kind: Any) -> Any:
    """The recording, made by the worker that asks for it first; the others wait for it. pytest removes its folder some day."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder
    path = str(folder / kind.__name__)
    with open(path + '.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(path + '.pickle'):
            shutil.rmtree(path, ignore_errors=True)
            os.mkdir(path)
            recorded = pickle.dumps(kind(path, PROGRAM))
            with open(path + '.new', 'wb') as file:
                file.write(recorded)
            os.rename(path + '.new', path + '.pickle')
        with open(path + '.pickle', 'rb') as file:
            return pickle.load(file)


def is_survived(base: Base, kind: str, number: int, of: int) -> None:
    """The number-th of so many troubles of that kind, spread over all places of the recorded run."""
    cases = [case for case in base.cases if case.kind == kind]
    result = faultsuite.run_case(base, faultsuite.spread(cases, of)[number])
    assert not result.problems, '%s\n%s\n%s\n%s' % (result.case.name, result.case.reproduction,
                                                    '\n'.join(result.problems), result.printed)


@choices(SAMPLE)
def test_no_trouble_costs_a_copy_or_leaves_anything_behind(base: Base, kind: str, number: int) -> None:
    is_survived(base, kind, number, SAMPLE[kind])


@choices(RECOVERY_SAMPLE)
def test_no_trouble_leaves_half_a_vm(recovery_base: RecoveryBase, kind: str, number: int) -> None:
    is_survived(recovery_base, kind, number, RECOVERY_SAMPLE[kind])


def test_a_copy_is_on_disk_before_it_is_visible_and_older_ones_go_after_that(base: Base) -> None:
    """What a power loss could take must never be what a name already promises (steps of the storage, in order)."""
    unsynced, visible = set(), set()
    for line in base.steps:
        kind, place = line.split(' ', 1)
        folder = os.path.dirname(place) or '.'
        if kind in ('write', 'truncate'):
            unsynced.add(place)
        elif kind in ('create', 'mkdir'):
            unsynced.add(folder)
        elif kind == 'fsync':
            unsynced.discard(place)
            visible.discard(place)
        elif kind == 'rename' and place.endswith('.partial'):
            assert not [other for other in unsynced if (other + '/').startswith(place + '/')], line
            visible.add(folder)
        elif kind == 'rename' or kind == 'unlink' and place.endswith('.dump'):
            assert folder not in visible, '%s: the new one is not on disk yet' % line
    assert not visible
