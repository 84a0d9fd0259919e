"""Fixtures that all tests share."""

import shutil
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import pytest

from support import warm
from support.deeds import backup
from support.language import described, disk, vm
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


@pytest.fixture(scope='session')
def a_store() -> Iterator[str]:
    """A directory with what real backups wrote, for `copied`: two copies of web, by vm-export, one of db, by vdi-export."""
    pool, shelf = Pool(described([vm('web', disks=[disk(size=2 << 20, used=2)]), vm('db')], {})), Shelf()
    try:
        pool.start()
        for line in ('vdi-export=db', 'vm-export=web', 'vm-export=web'):
            assert backup(pool, shelf, line).exit_status == 0
            time.sleep(1.1)                 # no two copies bear one name
        yield shelf.path
    finally:
        pool.remove()
        shelf.remove()


warm.hear_signals()
LONGEST_ID = 200
#: Programs that some tests need, and what is said where one is missed. tests/run says so too.
MISSED = {'zstd': 'zstd was not found (apt-get install zstd)',
          'qemu-img': 'qemu-img was not found (apt-get install qemu-utils); it reads again what others have read already'}


def pytest_configure(config: Any) -> None:
    for program in MISSED:
        config.addinivalue_line('markers', 'needs_%s: left out where there is no such program' % program.replace('-', '_'))


def pytest_make_parametrize_id(val: Any, argname: str) -> Optional[str]:
    """A text that nobody would type is called by its length: some are megabytes, and every worker tells every name."""
    return '%s-of-%d' % (argname, len(val)) if isinstance(val, (str, bytes)) and len(val) > LONGEST_ID else None


def pytest_collection_modifyitems(config: Any, items: List[Any]) -> None:
    for program, reason in MISSED.items():
        if shutil.which(program) is None:
            for item in items:
                if item.get_closest_marker('needs_' + program.replace('-', '_')):
                    item.add_marker(pytest.mark.skip(reason=reason))
