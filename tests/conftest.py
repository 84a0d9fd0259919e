"""Fixtures that all tests share."""

import json
import shutil
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import pytest

from support import warm
from support.deeds import backup
from support.language import described, disk, vm
from support.layers import DATA, ROOT, Nights
from support.mail import MailServer
from support.process import Pool
from support.shelf import STATE, Given, Shelf, Tree, copied


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


@pytest.fixture(scope='module')
def one_mail_server() -> Iterator[MailServer]:
    """A mail server for all tests of a file: one process, as its start costs more than a mail."""
    server = MailServer()
    yield server
    server.stop()


@pytest.fixture
def some_nights(a_pool: Callable[..., Pool], a_shelf: Callable[..., Shelf]) -> Callable[..., Nights]:
    """some_nights('vm-export=web', disks=[…]): a pool with web, an empty shelf, and backups with incremental=yes to come."""
    def build(*lines: str, disks: Sequence[Dict[str, Any]] = (ROOT, DATA), beside: Sequence[Dict[str, Any]] = (),
              faults: Sequence[Dict[str, Any]] = (), path: str = '', **facts: Any) -> Nights:
        pool = a_pool(vm('web', disks=disks, **facts), *beside, faults=faults)
        return Nights(pool, a_shelf(path=path), *(lines or ('vm-export=web',)))
    return build


@pytest.fixture(scope='session')
def a_store() -> Iterator[str]:
    """A directory with what real backups wrote, for `copied`: two copies of web, by vm-export, one of db, by vdi-export."""
    pool, shelf = Pool(described([vm('web', disks=[disk(size=2 << 20, used=2)]), vm('db')], {})), Shelf()
    try:
        pool.start()
        for lines in (('vdi-export=db', 'exclude=web'),) + (('vm-export=web', 'exclude=db'),) * 2:
            assert backup(pool, shelf, *lines).exit_status == 0
            time.sleep(1.1)                 # no two copies bear one name
        yield shelf.path
    finally:
        pool.remove()
        shelf.remove()


class Made(NamedTuple):
    """A pool that has ended after its backups, and their shelf."""
    pool: Pool
    shelf: Shelf
    tree: Tree


@pytest.fixture(scope='module')
def made_backups() -> Iterator[Dict[str, Made]]:
    """What `a_backup` has made for the tests of one file, by what was asked for."""
    made: Dict[str, Made] = {}
    yield made
    for one in made.values():
        one.pool.remove()
        one.shelf.remove()


@pytest.fixture
def a_backup(made_backups: Dict[str, Made]) -> Iterator[Callable[..., Tuple[Pool, Shelf]]]:
    """pool, shelf = a_backup(vm('web'), lines=['vm-export=*'], nights=1, faults=[…], …): a pool that serves until the test
    ends, and a shelf with the copies of so many good runs of these lines. It is for tests that only need them to be there: the
    runs were real ones, once for all tests of a file that ask for the same, and pool and shelf are copies of what they left.
    The pool's journal is new, and the program's own state on the shelf is gone, as after a move to another disk."""
    given: List[Any] = []

    def build(*vms: Dict[str, Any], lines: Sequence[str] = ('vm-export=*',), nights: int = 1,
              faults: Sequence[Dict[str, Any]] = (), **sections: Any) -> Tuple[Pool, Shelf]:
        description = described(vms, sections)
        wish = json.dumps([description, list(lines), nights], sort_keys=True)
        if wish not in made_backups:
            made_backups[wish] = after_backups(description, lines, nights)
        made = made_backups[wish]
        given.append(Pool(description, faults).like(made.pool))
        given.append(Shelf([copied(made.shelf.path)], tree=made.tree))
        return given[-2].start(), given[-1]

    yield build
    for one in given:
        one.remove()


def after_backups(description: Dict[str, Any], lines: Sequence[str], nights: int) -> Made:
    """A pool of that description was backed up so often, and has ended."""
    pool, shelf = Pool(description), Shelf()
    try:
        pool.start()
        for night in range(nights):
            time.sleep(1.1 if night else 0)         # no two copies bear one name
            run = backup(pool, shelf, *lines)
            assert run.exit_status == 0, run
        pool.stop()
    except BaseException:               # raised on: nothing of it may stay, whatever ended it
        pool.remove()
        shelf.remove()
        raise
    shutil.rmtree(shelf.at(STATE))
    return Made(pool, shelf, shelf.tree())


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
