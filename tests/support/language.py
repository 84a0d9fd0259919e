"""The words that tests are written in: what is given.

    pool = a_pool(vm('web', disks=2), vm('db', snapshots=1), faults=[at('xe:vm-export', exit=1)])

`a_pool` is a fixture (conftest.py). What there is to see afterwards are methods of Pool and Run (process.py); backup
directories are built, and looked at, in shelf.py.
"""

import uuid
from typing import Any, Dict, Sequence, Union

MEBIBYTE = 1 << 20
GIBIBYTE = 1 << 30

# What a fault does, in words; the values stay as FAULTS.json has them.
DEEDS = {'fails': 'fail', 'sleeps': 'sleep', 'hangs': 'hang', 'drops': 'drop', 'breaks_off_after': 'truncate',
         'flips': 'flip', 'runs_at': 'rate'}


def uuid_of(name: str) -> str:
    """The uuid of the VM of that name, unless it was given one."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, name))


def disk(**keys: Any) -> Dict[str, Any]:
    """A disk of POOL.json; small, unless its size is given."""
    keys.setdefault('size', 4 * MEBIBYTE)
    keys.setdefault('used', [[0, 2]])
    return keys


def vm(name_label: str, disks: Union[int, Sequence[Dict[str, Any]]] = 1, snapshots: Union[int, Sequence[Any]] = 0,
       **keys: Any) -> Dict[str, Any]:
    """A VM of POOL.json; disks and snapshots as numbers or as lists. Two of one name need uuids of their own."""
    if keys.get('count', 1) == 1:
        keys.setdefault('uuid', uuid_of(name_label))
    if isinstance(disks, int):
        disks = [disk(seed=number) for number in range(disks)]
    if isinstance(snapshots, int):
        snapshots = [{'name_label': '%s snapshot %d' % (name_label, number)} for number in range(snapshots)]
    return dict(keys, name_label=name_label, disks=list(disks), snapshots=list(snapshots))


def at(occasion: str, object: str = '', nth: int = 0, when: str = '', **deed: Any) -> Dict[str, Any]:
    """A fault of FAULTS.json: at('api:VM.snapshot', object='web', nth=1, fails=['SR_BACKEND_FAILURE_44', '', '', '']).

    `deed` is one of DEEDS, with what belongs to it (silent=True), or the words of FAULTS.json themselves."""
    fault: Dict[str, Any] = {'on': occasion, 'do': {DEEDS.get(word, word): value for word, value in deed.items()}}
    fault.update({key: value for key, value in (('object', object), ('nth', nth), ('when', when)) if value})
    return fault


def slowly(occasion: str = 'http:/export', first: int = 2 * MEBIBYTE, until: str = 'enough',
           **which: Any) -> Dict[str, Any]:
    """A fault: what comes there after the `first` bytes comes so slowly that a test sees what it waits for in the middle, until
    `pool.release()`."""
    return at(occasion, runs_at=MEBIBYTE // 16, until=until, **which, **{'from': first})


def described(vms: Sequence[Dict[str, Any]], sections: Dict[str, Any]) -> Dict[str, Any]:
    """The POOL.json with these VMs and other sections."""
    return dict(sections, vms=list(vms))
