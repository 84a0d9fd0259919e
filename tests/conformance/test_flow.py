"""One backup of a VM, as a real server answered it call by call, done again in the simulated pool."""

from typing import Any, Iterator

import pytest

import recordings
from replay import Replay, demand_no_stale_rows, replayed


# One worker does the whole replay.
pytestmark = pytest.mark.xdist_group('flow')


@pytest.fixture(scope='module')
def flow(tmp_path_factory: Any) -> Iterator[Replay]:
    replay = Replay('flow', 'pool.json', str(tmp_path_factory.mktemp('flow')))
    try:
        yield replay.play(recordings.names('flow'))
    finally:
        replay.remove()


@pytest.mark.needs_zstd
@pytest.mark.parametrize('name', replayed('flow'))
def test_the_simulated_pool_answers_as_recorded(flow: Replay, name: str) -> None:
    flow.demand(name)


@pytest.mark.needs_zstd
def test_every_listed_difference_is_still_there(flow: Replay) -> None:
    demand_no_stale_rows(flow)
