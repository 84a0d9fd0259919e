"""The way back, as a real server answered it call by call, done again in the simulated pool."""

import os
from typing import Any, Iterator

import pytest

import recordings
from replay import Replay, demand_no_stale_rows, replayed


# One worker does the whole replay.
pytestmark = pytest.mark.xdist_group('restore')


@pytest.fixture(scope='module')
def restore(tmp_path_factory: Any) -> Iterator[Replay]:
    replay = Replay('restore', 'pool.json', str(tmp_path_factory.mktemp('restore')))
    with open(os.path.join(replay.work_dir, 'backups', 'PROD-web.vhd'), 'wb') as file:
        file.write(recordings.unpacked('PROD-web.vhd.gz'))
    try:
        yield replay.play(recordings.names('restore'))
    finally:
        replay.remove()


@pytest.mark.needs_zstd
@pytest.mark.parametrize('name', replayed('restore'))
def test_the_simulated_pool_answers_as_recorded(restore: Replay, name: str) -> None:
    restore.demand(name)


@pytest.mark.needs_zstd
def test_every_listed_difference_is_still_there(restore: Replay) -> None:
    demand_no_stale_rows(restore)
