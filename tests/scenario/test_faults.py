"""A sample of the generated fault suite: whatever goes wrong in a backup, no good copy is lost, none is falsely good, and the
pool is left as it was. tests/soak runs all of it."""

from typing import Iterator

import pytest

from support import faultsuite
from support.faultsuite import Base

#: How many troubles of each kind are tried; the name of a kind says where it strikes and what it does.
SAMPLE = {'api-fail': 4, 'api-drop': 3, 'api-hang': 2, 'api-logout': 2, 'api-lose': 2, 'api-master': 2, 'http-truncate': 4,
          'http-flip': 2, 'http-drop': 2, 'http-keepalive': 1, 'xe-exit': 2, 'xe-kill': 2, 'SIGKILL': 4, 'SIGTERM': 3,
          'storage-ENOSPC': 4, 'storage-EIO': 3, 'storage-ESTALE': 2, 'storage-SIGKILL': 4, 'storage-SIGTERM': 2,
          'storage-short': 1, 'storage-hang': 1}
CHOICES = [(kind, number) for kind in sorted(SAMPLE) for number in range(SAMPLE[kind])]


@pytest.fixture(scope='module')
def base() -> Iterator[Base]:
    recorded = Base()
    yield recorded
    recorded.remove()


@pytest.mark.parametrize('kind, number', CHOICES, ids=['%s-%d' % choice for choice in CHOICES])
def test_no_trouble_costs_a_copy_or_leaves_anything_behind(base: Base, kind: str, number: int) -> None:
    """Each is one place of the recorded run; together they are spread over all of it."""
    cases = [case for case in faultsuite.all_cases(base) if case.kind == kind]
    result = faultsuite.run_case(base, faultsuite.spread(cases, SAMPLE[kind])[number])
    assert not result.problems, '%s\n%s\n%s\n%s' % (result.case.name, result.case.reproduction,
                                                    '\n'.join(result.problems), result.printed)
