"""References: what keep_reference leaves in a pool from one run to the next, and what the ledgers of stores tell of it.

    nights = Kept(pool, shelf, 'vm-export=web')
    copy = nights.night()
    assert nights.read(copy) == 'xvda difference, xvdb difference'
    assert leftovers(pool, [shelf]) == []                what is in the pool is what the ledgers name, and nothing else

The ledgers are read here as design has them: a file of JSON for each VM and kind, below the uuid of its pool.
"""

import json
import os
from typing import Any, Dict, Iterable, List, Sequence

from support.deeds import backup
from support.layers import Disks, Nights, copy_problem
from support.process import Pool, Run
from support.shelf import STATE, Shelf, Store

LINES = ('keep_reference=yes', 'max_backups=50', 'full_every=50')
FOLDER = os.path.join(STATE, 'references')


class Kept(Nights):
    """Nights of a config that keeps the newest snapshot in the pool."""

    def __init__(self, pool: Pool, shelf: Shelf, *lines: str, config: str = 'weekend.cfg', **how: Any) -> None:
        """`config`: what the config is called, beside the store."""
        super().__init__(pool, shelf, *(lines + LINES), **how)
        self.config_path = os.path.join(shelf.home, config)

    def night(self, *lines: str, exit_status: int = 0, **how: Any) -> str:
        self.shelf.config_path = self.config_path
        return super().night(*lines, exit_status=exit_status, **how)

    # --- what a copy tells of how it was read ---

    def read(self, copy: str) -> str:
        """How each disk of that copy was read: `xvda difference, xvdb all`."""
        return ', '.join('%s %s' % (disk['key'], disk['how']) for disk in self.shelf.manifest(self.folder, copy)['disks'])

    def is_by_difference(self, copy: str) -> bool:
        return {disk['how'] for disk in self.shelf.manifest(self.folder, copy)['disks']} == {'difference'}

    def whole_because(self, copy: str) -> str:
        """Why all disks of that copy were read whole, as its manifest tells and the run that made it told; "" if they were
        not."""
        whys = {(disk['how'], disk['why']) for disk in self.shelf.manifest(self.folder, copy)['disks']}
        (how, why), = whys
        assert how == 'difference' or 'read whole, as %s' % why in self.run.stdout, self.run
        return why

    # --- what its ledger tells ---

    @property
    def ledger(self) -> Dict[str, Any]:
        """The ledger of web and this kind; {} if there is none."""
        found = [ledger for ledger in ledgers(self.shelf) if (ledger['vm_name'], ledger['kind']) == (self.name, self.kind)]
        assert len(found) < 2, found
        return found[0] if found else {}

    @property
    def reference(self) -> Dict[str, Any]:
        """The snapshot that is the reference now; {} if there is none."""
        return self.ledger.get('current') or {}

    @property
    def ledger_path(self) -> str:
        path, = [path for path in ledger_paths(self.shelf) if path.endswith('-%s.json' % self.kind)]
        return path

    def edit_ledger(self, **facts: Any) -> None:
        """Somebody writes these facts into the ledger; those of its reference by `current`."""
        ledger = self.ledger
        ledger['current'].update(facts.pop('current', {}))
        write_ledger(self.ledger_path, dict(ledger, **facts))

    # --- what is done ---

    def run_of(self, *lines: str, exit_status: int = 0, **how: Any) -> Run:
        """A run of exactly these lines has ended; it need not make a copy."""
        self.shelf.config_path = self.config_path
        self.run = backup(self.pool, self.shelf, *lines, **how)
        assert self.run.exit_status == exit_status, self.run
        return self.run

    def files_are_right(self) -> bool:
        """The files of every copy whose disks are known give what they held."""
        disks = Disks(self.shelf, self.folder)
        for copy, held in self.held.items():
            problem = copy_problem(self.shelf, self.folder, copy, held, disks)
            assert problem == '', (copy, problem)
        return True

    def is_right(self) -> bool:
        """So they do, and the newest comes back by a restore."""
        assert self.files_are_right()
        problem = self.restored_problem(self.newest)
        assert problem == '', (self.newest, problem)
        return True

    @property
    def newest(self) -> str:
        return max(self.held)


# --- ledgers ------------------------------------------------------------------------------------------------------------

def ledger_paths(shelf: Store) -> List[str]:
    """The files of all ledgers in that store."""
    return sorted(os.path.join(folder, name) for folder, _, names in os.walk(shelf.at(FOLDER)) for name in names
                  if name.endswith('.json'))


def ledgers(shelf: Store) -> List[Dict[str, Any]]:
    """What they tell, those left out that are not JSON."""
    found = []
    for path in ledger_paths(shelf):
        with open(path, encoding='utf-8') as file:
            try:
                found.append(json.load(file))
            except ValueError:
                continue  # one that a test has damaged
    return found


def write_ledger(path: str, ledger: Dict[str, Any]) -> None:
    with open(path, 'w', encoding='utf-8') as file:
        json.dump(ledger, file)


def is_now_that_of(shelf: Store, config_path: str) -> None:
    """The store, which is a copy of another, is from now on as the one that it was copied from: its identity has its own inode
    number, and its ledgers name that config."""
    path = shelf.at(STATE, 'store')
    with open(path, encoding='utf-8') as file:
        identity = json.load(file)
    identity['inode'] = os.stat(path).st_ino
    with open(path, 'w', encoding='utf-8') as file:
        json.dump(identity, file)
    for path in ledger_paths(shelf):
        with open(path, encoding='utf-8') as file:
            ledger = json.load(file)
        write_ledger(path, dict(ledger, inode=identity['inode'], config=config_path))


# --- the pool against the ledgers ---------------------------------------------------------------------------------------

def leftovers(pool: Pool, shelves: Sequence[Store], besides: Iterable[str] = (), also_leaving: bool = False) -> List[str]:
    """What is amiss between the snapshots in the pool and the ledgers of these stores, in sentences; [] if nothing is.

    Each snapshot, of a VM or of a disk, has to be in POOL.json, be named by a ledger or have its uuid in `besides`; each that a
    ledger names has to be there, with just the disks that it tells. What is leaving has to be gone, unless `also_leaving`. No
    mark of ours, in a name or other_config, and no event of ours may be left."""
    objects, first = pool.dump(), pool.dump(pool.first_dir)
    found = {record['uuid']: record for kind in ('VM', 'VDI') for record in objects[kind].values()}
    given = {record['uuid'] for kind in ('VM', 'VDI') for record in first[kind].values()}
    problems, named = [], set(besides)
    for ledger in (ledger for shelf in shelves for ledger in ledgers(shelf)):
        title = '%s of %s' % (ledger['kind'], ledger['vm_name'])
        for reference in ledger['leaving']:
            if not also_leaving:
                problems.append('%s: %s is still leaving' % (title, reference['uuid']))
            named |= {reference['uuid']} | {disk['uuid'] for disk in reference['disks'].values()}
        if ledger['current']:
            current = ledger['current']
            disks = {disk['uuid'] for disk in current['disks'].values()}
            named |= {current['uuid']} | disks
            problems += ['%s: %s, which its ledger names, is no snapshot in the pool' % (title, uuid)
                         for uuid in sorted({current['uuid']} | disks) if not found.get(uuid, {}).get('is_a_snapshot')]
            if ledger['kind'] == 'vm-export' and disks_of_snapshot(objects, current['uuid']) != disks:
                problems.append('%s: its reference has other disks than its ledger tells' % title)
    problems += ['the snapshot %s %s is in no ledger' % (uuid, record['name_label']) for uuid, record in sorted(found.items())
                 if record['is_a_snapshot'] and uuid not in named | given]
    problems += ['%s bears a mark of ours' % record['uuid'] for record in found.values()
                 if any('vmbackup' in key for key in record['other_config']) or 'vmbackup-' in record['name_label']]
    problems += ['an event of ours is left: %s' % record['body'] for record in objects.get('message', {}).values()
                 if 'vmbackup-' in record['body']]
    return problems


def disks_of_snapshot(objects: Dict[str, Any], uuid: str) -> Any:
    """The uuids of the disks of that VM snapshot."""
    refs = [ref for record in objects['VM'].values() if record['uuid'] == uuid for ref in record['VBDs']]
    return {objects['VDI'][objects['VBD'][ref]['VDI']]['uuid'] for ref in refs if objects['VBD'][ref]['type'] == 'Disk'}
