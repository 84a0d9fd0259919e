"""Fixtures that all tests share."""

import shutil
from typing import Any, Callable, Dict, Iterator, List, Sequence

import pytest

from support.language import described
from support.process import Pool
from support.shelf import Given, Shelf


@pytest.fixture
def a_pool() -> Iterator[Callable[..., Pool]]:
    """a_pool(vm('web'), vm('db'), faults=[…], hosts=[…], …): a pool that serves until the test ends."""
    pools: List[Pool] = []

    def build(*vms: Dict[str, Any], faults: Sequence[Dict[str, Any]] = (), **sections: Any) -> Pool:
        pools.append(Pool(described(vms, sections), faults))
        return pools[-1].start()

    yield build
    for pool in pools:
        pool.remove()


@pytest.fixture
def a_shelf() -> Iterator[Callable[..., Shelf]]:
    """a_shelf(complete('web'), foreign('web/notes.txt')): a backup directory that is there until the test ends."""
    shelves: List[Shelf] = []

    def build(*given: Given, path: str = '') -> Shelf:
        shelves.append(Shelf(given, path))
        return shelves[-1]

    yield build
    for shelf in shelves:
        shelf.remove()


def pytest_configure(config: Any) -> None:
    config.addinivalue_line('markers', 'needs_zstd: left out where there is no zstd program')


def pytest_collection_modifyitems(items: List[Any]) -> None:
    if shutil.which('zstd') is None:
        for item in items:
            if item.get_closest_marker('needs_zstd'):
                item.add_marker(pytest.mark.skip(reason='zstd was not found'))
