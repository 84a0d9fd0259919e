"""The generated fault suite of references: every trouble at every place of a backup that reads against what stays in the pool.

A run reads only what differs from the reference of each VM, or reads all and holds that against the difference (the audit); the
clean run after it does the other. Beside the troubles that incrementfaults.py knows, somebody removes a reference from the pool,
and the server gives a difference that is none, another disk's, or leaves out what changed.
"""

import hashlib
import json
import os
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Set, Tuple

from support import contents, layers
from support.faultsuite import Aftermath, Base, Case, Copy, Place, step_shown
from support.incrementfaults import UUIDS, ChainsBase, IncrementsBase
from support.language import at
from support.references import FOLDER, ledger_paths, ledgers
from support.shelf import Store

VHD_BLOCK_MIB = 2
#: So far from the end of a VHD stands data of its last block: behind that comes the footer.
BEFORE_END = layers.VHD_BLOCK + layers.SECTOR - 100
#: The fields of what a ledger says to be in the pool.
Reference = Dict[str, Any]


class Difference(NamedTuple):
    """One of a run, the nth: of that disk (VM, its name in `blocks`, number), and which of its blocks of 2 MiB changed."""
    nth: int
    name: str
    key: str
    device: str
    changed: List[int]


class ReferencesBase(ChainsBase):
    """A full, a difference, and a full that has agreed with one. The troubled run reads a difference; then the older chain goes.
    The clean run makes the next full, and its audit."""

    title = 'references-'
    lines = ('incremental=yes', 'keep_reference=yes', 'full_every=2', 'vdi_export_format=vhd')  # type: Sequence[str]
    is_found_later = True       # is it the clean run that finds what a difference of the troubled one left out?

    @property
    def found_in(self) -> int:
        """The night whose audit finds what a difference of the troubled run leaves out."""
        return len(self.nights) - (1 if self.is_found_later else 2)

    def record(self) -> None:
        super().record()
        assert self.stand.references == {name: self.stand.of(name, self.stand.good)[-1][1] for name in self.disks}

    def references(self, place: Place) -> Dict[str, str]:
        tables = place.pool.dump()
        return {ledger['vm_name']: ledger['current']['copy'] for ledger in ledgers(Store(place.store))
                if ledger['current'] and not reference_problem(tables, ledger['kind'], ledger['current'])}

    def aftermath(self, *facts: Any) -> Aftermath:
        return ReferencesAftermath(self, *facts)

    def all_cases(self) -> List[Case]:
        return super().all_cases() + list(self.removed_references()) + list(self.spoiled())

    def removed_references(self) -> Iterator[Case]:
        """Somebody removes the reference, or a disk of it, at any moment from the beginning of the run until the next one takes
        its place."""
        for ledger in ledgers(Store(os.path.join(self.home, 'store'))):
            name, current = ledger['vm_name'], ledger['current']
            commands = [['xe', 'vdi-destroy', 'uuid=' + disk['uuid']] for _, disk in sorted(current['disks'].items())]
            if ledger['kind'] == 'vm-export':
                commands.append(['xe', 'snapshot-uninstall', 'uuid=' + current['uuid'], 'force=true'])
            for number, (below, step, line) in enumerate(self.moments(name)):
                yield Case('reference-gone of %s at step %d of %s (%s)' % (name, step, below, step_shown(line)), trouble={
                    'step': step, 'do': 'run', 'below': below, 'command': commands[number % len(commands)]},
                    copies=1 + number // 2 % 2)

    def moments(self, name: str) -> Iterator[Tuple[str, int, str]]:
        """(directory, step there, what it is) of a run's first step, and all that it does about that VM until its ledger tells of
        another reference."""
        yield '.vmbackup', 1, self.steps_of('.vmbackup')[0]
        for step, line in enumerate(self.steps_of(name), 1):
            yield name, step, line
            if line.startswith('rename'):
                break
        for step, line in enumerate(self.steps_of(FOLDER), 1):
            if UUIDS[name] in line:
                yield FOLDER, step, line
                if line.startswith('rename'):
                    break

    def spoiled(self) -> Iterator[Case]:
        """The server gives a full or the difference of another disk in the place of what it was asked for; or one that leaves
        out what changed, which nobody can see in a difference alone."""
        differences = self.differences()
        for one in differences:
            of = 'of difference %d (%s of %s)' % (one.nth, one.key, one.name)
            other = next(other for other in differences if other.device != one.device)
            for word, value in (('full', True), ('other', '%s:%s' % (other.name, other.key))):
                yield Case('difference-%s instead %s' % (word, of), (at('xe:vdi-export', nth=one.nth, **{word: value}),),
                           copies=1 + one.nth % 2)
            for number, block in enumerate(one.changed, 1):
                if block not in self.overwritten(one):
                    yield Case('difference-omit of block %d %s' % (block, of), (at('xe:vdi-export', nth=one.nth, omit=number),),
                               copies=1 + number % 2, lied=one.name)

    def differences(self) -> List[Difference]:
        """Those of the recorded run, in order, by what it asked for and the ledgers tell."""
        disks = {disk['uuid']: (ledger['vm_name'], key) for ledger in ledgers(Store(os.path.join(self.home, 'store')))
                 for key, disk in ledger['current']['disks'].items()}
        bases = [word[len('base='):] for entry in self.recording.journal if (entry['via'], entry['call']) == ('xe', 'vdi-export')
                 for word in entry['args'] if word.startswith('base=')]
        found = []
        for nth, base in enumerate(bases, 1):
            name, key = disks[base]
            device, = [number for number in self.disks[name] if layers.device_of(number) == key]
            found.append(Difference(nth, name, key, device, blocks_written(self.nights[-2], name, device)))
        assert sorted(disks.values()) == sorted((one.name, one.key) for one in found)
        return found

    def overwritten(self, one: Difference) -> List[int]:
        """The blocks of that disk of which no later audit can tell what a difference left out."""
        return blocks_written(self.nights[-1], one.name, one.device) if self.is_found_later else []


class AuditsBase(ReferencesBase):
    """A full and a difference. The troubled run makes a full, and holds it against the next difference. The clean run reads one
    difference more."""

    title = 'audits-'
    lines = ('incremental=yes', 'keep_reference=yes', 'full_every=2', 'compress=gzip')
    proven = ('/foretold', '/blocks')
    nights = IncrementsBase.nights
    is_found_later = False

    def spoiled(self) -> Iterator[Case]:
        """Other bytes are found like those that are missing."""
        yield from super().spoiled()
        for one in self.differences():
            yield Case('difference-flip of difference %d (%s of %s)' % (one.nth, one.key, one.name), (
                at('http:/export_raw_vdi', nth=self.requests()[one.nth - 1], flips=-BEFORE_END),), lied=one.name)

    def requests(self) -> List[int]:
        """Which of the requests for disks are those for differences."""
        asked = [entry['args'][1] for entry in self.recording.journal if entry['call'] == '/export_raw_vdi']
        return [number for number, words in enumerate(asked, 1) if 'base' in words]


class ReferencesAftermath(Aftermath):
    """What is there after a backup that reads against references, these among it."""

    base: Any

    def __init__(self, base: Base, case: Case, place: Place, *facts: Any) -> None:
        self.tables = place.pool.dump()
        self.ledgers = {ledger['vm_name']: ledger for ledger in ledgers(Store(place.store))}
        super().__init__(base, case, place, *facts)
        self.stand = self.stand._replace(references=base.references(place))

    # --- lies ---

    def lied(self) -> Tuple[str, Set[Copy]]:
        """No audit can fail before the run that finds the lie. Suspect are the copies that were read as differences since the
        last full: those of the night before, the one that has it wrong among them."""
        if not self.case.lied or self.night < self.base.found_in:
            return '', set()
        return self.case.lied if self.night == self.base.found_in else '', self.of_night(self.base.found_in - 1)

    def of_night(self, night: int) -> Set[Copy]:
        """The copies of that night of the VM that was lied of."""
        return {copy for copy in self.copies if copy[0] == self.case.lied and self.night_of[copy] == night}

    def problem_of(self, name: str, copy: str) -> str:
        """A copy whose difference left something out is as good as any, by all that can be known of its files."""
        if self.base.is_found_later and (name, copy) in self.of_night(self.base.found_in - 1):
            return ''
        return super().problem_of(name, copy)

    # --- the pool and the ledgers ---

    def kept(self) -> Set[str]:
        """References that a ledger names, be they on their way out, with their drives and interfaces."""
        found = set()
        for ledger in self.ledgers.values():
            for one in references_of(ledger):
                found |= {'VDI ' + disk['uuid'] for disk in one['disks'].values()}
                machine = by_uuid(self.tables, 'VM', one['uuid'])
                for table, field in (('VBD', 'VBDs'), ('VIF', 'VIFs')):
                    found |= {'%s %s' % (table, self.tables[table][ref]['uuid']) for ref in machine.get(field, ())}
                found |= {'VM ' + one['uuid']} if ledger['kind'] == 'vm-export' else set()
        return found

    def holds_ledgers_are_of_this_store_and_config(self) -> List[str]:
        """Each ledger tells whose it is, of a VM that is backed up; and whether an audit of it has failed."""
        identity = json.loads(Store(self.place.store).text('.vmbackup', 'store'))
        problems = ['%s is no ledger' % path for path in ledger_paths(Store(self.place.store))[len(self.ledgers):]]
        for name, ledger in sorted(self.ledgers.items()):
            told = [ledger[field] for field in ('store', 'inode', 'config', 'folder', 'kind')]
            wanted = [identity['id'], identity['inode'], self.place.config, name, 'vm-export' if name == 'web' else 'vdi-export']
            problems += ['%s: %s instead of %s' % (name, told, wanted)] if told != wanted else []
            if bool(ledger['distrust']) != (name == self.case.lied and self.night >= self.base.found_in):
                problems.append('%s: its differences are %sdistrusted' % (name, '' if ledger['distrust'] else 'not '))
        return problems

    def holds_a_reference_is_what_its_copy_is(self) -> List[str]:
        """What a ledger says to be a VM's reference is there, is named as such and holds what the copy holds whose state it is;
        that copy was sealed."""
        problems = []
        for name, ledger in sorted(self.ledgers.items()):
            one = ledger['current']
            if not one:
                continue
            place = (name, one['copy'])
            if place not in self.copies | set(self.before.night_of):
                problems.append('%s: its reference is the state of %s, which is no copy' % place)
                continue
            problem = reference_problem(self.tables, ledger['kind'], one) or self.content_problem(
                name, one, self.night_of.get(place, self.before.night_of.get(place)))
            if problem and not self.may_be_gone(one):
                problems.append('%s: its reference %s: %s' % (name, one['uuid'], problem))
        return problems

    def content_problem(self, name: str, one: Reference, night: int) -> str:
        """Why the disks of that reference do not hold what those of the VM did before that night."""
        writes = self.base.written_by(night, name)
        keys = {layers.device_of(number): number for number in self.base.disks[name]}
        if set(keys) != set(one['disks']):
            return 'it has the disks %s' % sorted(one['disks'])
        for key, number in sorted(keys.items()):
            held = b''.join(contents.blocks_of(self.base.disks[name][number], writes.get(number, {})))
            if self.place.pool.read(one['disks'][key]['uuid']) != held:
                return 'disk %s holds something else' % key
        return ''

    def may_be_gone(self, one: Reference) -> bool:
        """Was that one removed by somebody, or forgotten by the server, or can storage not tell whether its ledger counts? A pool
        that says of an object that it is gone is believed. What the clean run keeps is there."""
        is_removed = self.was_removed() and one['copy'] in self.base.stand.references.values()
        return not self.is_clean and (is_removed or self.may_doubt() or 'lose' in self.case.deeds or self.is_said_to_be_gone())

    def was_removed(self) -> bool:
        """Did somebody remove a reference while this run went on?"""
        return not self.is_clean and 'command' in (self.case.trouble or {})

    def holds_one_reference_of_each_is_left(self) -> List[str]:
        """After the clean run just one reference of each VM is there, the state of the copy just made. None is where no
        difference is believed."""
        problems = []
        for name in sorted(self.base.disks if self.is_clean else ()):
            ledger = self.ledgers.get(name, {'current': None, 'leaving': []})
            newest = self.stand.of(name, self.good_copies)[-1]
            wanted = None if name == self.case.lied else newest[1]
            if (ledger['current'] or {}).get('copy') != wanted:
                problems.append('%s: its reference is %s, and %s its newest good copy' % (name, ledger['current'], newest[1]))
            if wanted and ledger['current'] and ledger['current']['blocks'] != hashlib.sha256(
                    contents.content_of(os.path.join(self.place.store, name, wanted, 'blocks'))).hexdigest():
                problems.append('%s: its reference has other blocks than %s' % (name, wanted))
            problems += ['%s: %s is still leaving' % (name, one['uuid']) for one in ledger['leaving']]
        return problems

    # --- what is read ---

    def holds_a_difference_is_read_where_it_can_be(self) -> List[str]:
        """Where the reference in the pool is the state of the newest good copy, an increment is the difference to that, and a
        full is held against it."""
        problems = []
        for name in sorted(self.new if self.is_clean or not self.case.faults and not self.may_doubt() else ()):
            base = self.stand.of(name, self.before.good)[-1:]
            if not base or self.before.references.get(name) != base[0][1] or self.case.taken or self.was_removed():
                continue
            made = self.stand.of(name, self.good_copies - self.before.good)[-1]
            manifest = Store(self.place.store).manifest(*made)
            hows, audit = {disk['how'] for disk in manifest['disks']}, manifest['layer'].get('audit', {}).get('found', '')
            if hows != {'difference'} and not (hows == {'full'} and audit and (audit == 'agreed') == (name != self.lie)):
                problems.append('%s/%s was read so: %s, audit: %r' % (made + (sorted(hows), audit)))
        return problems

    def holds_a_reference_is_never_needed(self) -> List[str]:
        """Whatever the server gives in the place of a difference, and whoever removes a reference, each VM has its copy."""
        kind = self.case.kind[len(self.base.title):]
        if not kind.startswith(('reference-', 'difference-')) or self.new == set(self.base.disks):
            return []
        return ['new copies are there only of %s' % sorted(self.new)]


# --- ledgers, and what is in the pool ---------------------------------------------------------------------------------------

def references_of(ledger: Dict[str, Any]) -> List[Reference]:
    return ledger['leaving'] + ([ledger['current']] if ledger['current'] else [])


def by_uuid(tables: Dict[str, Any], table: str, uuid: str) -> Dict[str, Any]:
    """That record; {} if there is none."""
    return next((record for record in tables[table].values() if record['uuid'] == uuid), {})


def reference_problem(tables: Dict[str, Any], kind: str, one: Reference) -> str:
    """What of the reference is not in the pool as the ledger tells; "" if all is."""
    snapshot = by_uuid(tables, 'VM' if kind == 'vm-export' else 'VDI', one['uuid'])
    if not snapshot.get('is_a_snapshot') or snapshot['name_label'] != one['name']:
        return 'the pool has %s, called %r instead of %r' % (
            'no such snapshot' if not snapshot.get('is_a_snapshot') else 'it', snapshot.get('name_label'), one['name'])
    for key, disk in sorted(one['disks'].items()):
        record = by_uuid(tables, 'VDI', disk['uuid'])
        if not record.get('is_a_snapshot') or record['virtual_size'] != str(disk['size']) \
                or tables['SR'][record['SR']]['uuid'] != disk['sr']:
            return 'its disk %s is not as the ledger tells: %s' % (key, record)
    if kind == 'vm-export':
        there = {tables['VDI'][vbd['VDI']]['uuid'] for vbd in (tables['VBD'][ref] for ref in snapshot['VBDs'])
                 if vbd['type'] == 'Disk' and vbd['VDI'] in tables['VDI']}
        if there != {disk['uuid'] for disk in one['disks'].values()}:
            return 'it has other disks than the ledger tells'
    return ''


def blocks_written(writes: Dict[str, Dict[str, Dict[int, str]]], name: str, device: str) -> List[int]:
    """The blocks of a VHD that these writes change."""
    return sorted({number // VHD_BLOCK_MIB for number in writes.get(name, {}).get(device, {})})
