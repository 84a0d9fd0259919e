"""References in trouble: what stays in the pool between nights is lost, changed, forgotten, copied or in the way, and runs die
with it in their hands. Every copy holds what the disks held, and nothing stays in the pool that no ledger names."""

import json
import os
import shutil
import signal
import subprocess
import time
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import pytest

from support import warm
from support.deeds import beginning, in_trouble, is_exporting
from support.language import MEBIBYTE, at, described, disk, slowly, uuid_of, vm
from support.process import Pool, ended, run_program
from support.recovery import restore, serving
from support.references import Kept, is_now_that_of, ledgers, leftovers
from support.shelf import STATE, Shelf
from support.wire import eventually

ONE = [disk(size=6 * MEBIBYTE + 512, used=[[0, 3]], seed=3, name_label='root', bootable=True)]
TWO = ONE + [disk(size=4 * MEBIBYTE, used=[[0, 2]], seed=4, name_label='data')]
LATE = 'the reference is not the state of the newest good copy'
GONE = "the reference's disk xvda is gone"
NONE = 'there is no reference in the pool'
VM, VDI = 'vm-export=web', 'vdi-export=web'
#: What else is in the pool: another VM, and a second SR.
BESIDE = [vm('www', disks=[disk(size=MEBIBYTE, used=1, seed=8)])]
SRS = [{'name_label': 'fast', 'type': 'nfs'}, {'name_label': 'slow', 'type': 'nfs'}]
BOTH = (VM, 'vm-export=www')
#: An SR of 100 MiB on which web and www need 6, and another VM takes the rest.
SMALL = dict(srs=[{'name_label': 'small', 'type': 'nfs', 'size': 100 * MEBIBYTE}],
             beside=[vm('www', disks=[disk(size=4 * MEBIBYTE, used=3, seed=7)]),
                     vm('theirs', disks=[disk(size=90 * MEBIBYTE, used=0)])])
BLOCK = 2 * MEBIBYTE + 65536               # the first of a difference, and what comes before it
OTHERS = ('vm-export=www', 'exclude=web')       # a config, or what has become of one, that does not select web


class Given(NamedTuple):
    """A pool and a store after two nights: a full, and what differed from its reference."""
    pool: Pool
    shelf: Shelf
    held: Dict[str, Dict[str, bytes]]


def after_two_nights(description: Dict[str, Any], lines: Sequence[str]) -> Given:
    pool, shelf = Pool(description), Shelf()
    try:
        pool.start()
        nights = Kept(pool, shelf, *lines)
        assert nights.whole_because(nights.night()) == NONE
        nights.write(1)
        assert nights.is_by_difference(nights.night())
        assert nights.files_are_right() and leftovers(pool, [shelf]) == []
        pool.stop()
    except BaseException:               # raised on: nothing of it may stay, whatever ended it
        pool.remove()
        shelf.remove()
        raise
    return Given(pool, shelf, nights.held)


@pytest.fixture(scope='module')
def stands() -> Iterator[Dict[str, Given]]:
    """What the tests of this file begin with, made once for all that ask for the same."""
    made: Dict[str, Given] = {}
    yield made
    for one in made.values():
        one.pool.remove()
        one.shelf.remove()


@pytest.fixture
def kept(stands: Dict[str, Given]) -> Iterator[Any]:
    """kept('vm-export=web'): two nights have been: a full and a difference. When the test has ended, the ledgers of
    `nights.shelves` name every snapshot that is in the pool but those of `nights.left`, and no other."""
    given: List[Any] = []

    def build(*lines: str, disks: Sequence[Dict[str, Any]] = ONE, beside: Sequence[Dict[str, Any]] = BESIDE,
              srs: Sequence[Dict[str, Any]] = SRS, faults: Sequence[Dict[str, Any]] = ()) -> Kept:
        lines = lines or (VM,)
        description = described([vm('web', disks=disks)] + list(beside), {'srs': srs})
        wish = repr((description, lines))
        if wish not in stands:
            stands[wish] = after_two_nights(description, lines)
        made = stands[wish]
        pool, shelf = Pool(description, faults).like(made.pool), Shelf()
        shutil.copytree(made.pool.first_dir, pool.first_dir)
        shutil.rmtree(shelf.path)
        shutil.copytree(made.shelf.path, shelf.path, symlinks=True)
        is_now_that_of(shelf, shelf.config_path)
        nights = Kept(pool.start(), shelf, *lines)
        shelf.config(*nights.lines)
        nights.held = dict(made.held)
        nights.shelves, nights.left = [shelf], []
        given.append(nights)
        return nights

    yield build
    try:
        for nights in given:
            assert leftovers(nights.pool, nights.shelves, nights.left) == []
    finally:
        for nights in given:
            for one in [nights.pool] + nights.shelves:
                one.remove()


def is_nothing_left(nights: Kept) -> bool:
    return leftovers(nights.pool, nights.shelves, nights.left) == []


def troubled(nights: Kept, **trouble: Any) -> Any:
    """A backup on a machine in that trouble."""
    return ended(warm.start(in_trouble(nights.pool, **trouble) + ['-', nights.shelf.config(*nights.lines)],
                            nights.pool.environment()))


# --- Only a sealed copy advances the reference -----------------------------------------------------------------------------

def test_a_run_that_fails_leaves_the_last_reference_and_the_next_reads_against_that(kept: Any) -> None:
    broken = {'exit': 1, 'stderr': 'Error: it broke\n'}
    nights = kept(faults=[at('xe:vdi-export', nth=1, **broken), at('xe:vm-export', nth=2, **broken),
                          at('xe:vm-export', nth=3, **broken)])
    before, copies = nights.ledger, nights.copies()
    for number, trouble in enumerate([{}, {}, {'at': ['success'], 'do': 'ENOSPC'}]):
        nights.write(number)
        run = troubled(nights, **trouble)
        assert run.exit_status == 1 and nights.copies() == copies, run
        assert nights.ledger == before and is_nothing_left(nights), run
    nights.write(4, zero=True)
    assert nights.is_by_difference(nights.night()) and nights.is_right()


# --- Runs that die ---------------------------------------------------------------------------------------------------------

#: Where in the order a run dies, by the call that hangs then; and why the next run reads all.
CALLS = {'before the rename': ('api:VM.set_name_label', 2, 'before', LATE),
         'between rename and ledger': ('api:VM.set_name_label', 2, 'after', LATE),
         'before the old one is destroyed': ('api:VDI.destroy', 1, 'before', ''),
         'when its disk is destroyed, which nobody has heard of': ('api:VDI.destroy', 1, 'after', ''),
         'when its disk is destroyed and the record of the VM is not': ('api:VM.destroy', 1, 'before', ''),
         'when all of the old one is destroyed': ('api:VM.destroy', 1, 'after', '')}  # type: Dict[str, Any]
DISK_CALLS = {'between rename and ledger': ('api:VDI.set_name_label', 1, 'after', LATE),
              'before the old one is destroyed': ('api:VDI.destroy', 1, 'before', ''),
              'when the old one is destroyed': ('api:VDI.destroy', 1, 'after', '')}  # type: Dict[str, Any]
#: The same by the step of the store before which it dies: the nth that begins so, once the copy is sealed.
STEPS = {'before the ledger is in its place': ('rename .vmbackup/references', 1, LATE),
         'between the ledger and the close of the entry': ('write .vmbackup/runs', 1, ''),
         'between the close and the destruction': ('write .vmbackup/runs', 2, ''),
         'before the entry of the destroyed one is closed': ('write .vmbackup/runs', 3, ''),
         'before the last ledger': ('rename .vmbackup/references', 2, '')}


def dies_in(nights: Kept, occasion: str, nth: int, when: str) -> None:
    """A backup was killed at that call, which the pool leaves without an answer."""
    serving(nights.pool, at(occasion, nth=nth, when=when, hangs=True))
    before, held = nights.copies(), nights.disks()
    seen = len(nights.pool.calls(occasion))
    with beginning(nights.pool, nights.shelf, *nights.lines) as process:
        assert eventually(lambda: len(nights.pool.calls(occasion)) == seen + nth or process.is_over()), process.output
        assert not process.is_over(), process.output
        process.kill()
    copy, = set(nights.copies()) - set(before)
    nights.held[copy] = held


ROUNDS = '.vmbackup/rounds'     # where the steps differ from night to night, as older rounds are removed


def dies_before(nights: Kept, begins: str, nth: int, steps: List[str]) -> None:
    """A backup was killed before the nth step of the store that begins so, of all its `steps` from the seal on."""
    before, held = nights.copies(), nights.disks()
    sealed = [number for number, step in enumerate(steps) if step.startswith('rename web/')][-1]
    step = [number for number, step in enumerate(steps) if step.startswith(begins) and number > sealed][nth - 1]
    run = troubled(nights, store=nights.shelf.path, apart=ROUNDS, step=step + 1, do='SIGKILL')
    assert run.exit_status == -signal.SIGKILL, run
    copy, = set(nights.copies()) - set(before)
    nights.held[copy] = held


def comes_right(nights: Kept, why: str, moment: str) -> None:
    """The night after a run that died with its copy sealed destroys neither what the ledger names nor leaves what it does not;
    then there is one reference. `why`: it reads all, as that."""
    nights.write(4)
    nights.write(0, zero=True)
    copy = nights.night()
    assert nights.whole_because(copy) == why, moment
    assert is_nothing_left(nights) and nights.shelf.journals() == [] and nights.reference['copy'] == copy, (moment, nights.run)


def test_a_run_may_die_at_every_call_of_the_order(kept: Any) -> None:
    nights = kept()
    for moment, (occasion, nth, when, why) in CALLS.items():
        nights.write(2)
        dies_in(nights, occasion, nth, when)
        comes_right(nights, why, moment)
    assert nights.is_right()


def test_a_run_that_snapshots_a_disk_alone_may_die_at_every_call_of_the_order(kept: Any) -> None:
    nights = kept(VDI)
    for moment, (occasion, nth, when, why) in DISK_CALLS.items():
        nights.write(2)
        dies_in(nights, occasion, nth, when)
        comes_right(nights, why, moment)
    assert nights.is_right()


@pytest.fixture(scope='module')
def steps_of_a_night(stands: Dict[str, Given]) -> Iterator[List[str]]:
    """The steps of the store in the third night."""
    made = stands['steps'] = after_two_nights(described([vm('web', disks=ONE)], {}), (VM,))
    nights = Kept(made.pool.start(), made.shelf, VM)
    nights.write(2)
    trace = os.path.join(nights.shelf.home, 'trace')
    run = troubled(nights, store=nights.shelf.path, apart=ROUNDS, trace=trace)
    assert run.exit_status == 0, run
    with open(trace, encoding='utf-8') as file:
        yield file.read().splitlines()


def test_a_run_may_die_between_all_steps_of_the_store_in_the_order(kept: Any, steps_of_a_night: List[str]) -> None:
    nights = kept()
    for moment, (begins, nth, why) in STEPS.items():
        nights.write(2)
        dies_before(nights, begins, nth, steps_of_a_night)
        comes_right(nights, why, moment)
    assert nights.is_right()


def test_what_is_leaving_goes_with_the_run_of_another_config_too(kept: Any, steps_of_a_night: List[str]) -> None:
    nights = kept()
    nights.write(2)
    dies_before(nights, *STEPS['between the close and the destruction'][:2], steps_of_a_night)
    current, (leaving,) = nights.reference, nights.ledger['leaving']
    assert set(uuids_of(leaving)) <= {record['uuid'] for kind in ('VM', 'VDI') for record in nights.pool.dump()[kind].values()}
    Kept(nights.pool, nights.shelf, config='other.cfg').run_of(*OTHERS)
    assert nights.reference == current and is_nothing_left(nights)


def test_a_restore_sweeps_after_a_run_that_died_as_a_backup_does(kept: Any, steps_of_a_night: List[str]) -> None:
    nights = kept()
    for moment in ('between rename and ledger', 'between the ledger and the close of the entry',
                   'when its disk is destroyed and the record of the VM is not'):
        nights.write(2)
        if moment in CALLS:
            dies_in(nights, *CALLS[moment][:3])
        else:
            dies_before(nights, *STEPS[moment][:2], steps_of_a_night)
        current = nights.reference
        assert nights.restored_problem(nights.newest) == '', moment
        assert leftovers(nights.pool, nights.shelves, also_leaving=True) == [] and nights.reference == current, moment
        comes_right(nights, (CALLS.get(moment) or STEPS[moment])[-1], moment)
    assert nights.is_right()


# --- Answers that are lost, and a server that forgets -----------------------------------------------------------------------

#: The calls that change something from the seal on.
CHANGES = [('api:VM.set_name_label', 2), ('api:message.destroy', 1), ('api:VDI.destroy', 1), ('api:VM.destroy', 1)]
DISK_CHANGES = [('api:VDI.set_name_label', 1), ('api:VDI.destroy', 1)]


def is_kept(nights: Kept, copy: str) -> bool:
    """The only reference in the pool is the state of that copy, and bears its name."""
    name, = names_of_snapshots(nights)
    time = '%s %s:%s:%s' % (copy[7:17], copy[18:20], copy[20:22], copy[22:24])
    return 'VmBackup reference ' + time in name and nights.reference['copy'] == copy and is_nothing_left(nights)


@pytest.mark.parametrize('line, changes', [(VM, CHANGES), (VDI, DISK_CHANGES)], ids=['vm', 'disk'])
def test_what_is_kept_stays_and_what_is_removed_is_gone_though_the_answers_are_lost(kept: Any, line: str, changes: Any) -> None:
    nights = kept(line)
    for occasion, nth in changes:
        # the first call gets lost itself, of the second only the answer
        serving(nights.pool, at(occasion, nth=nth, drops=True), at(occasion, nth=nth + 1, when='after', drops=True))
        nights.write(2)
        copy = nights.night()
        assert nights.is_by_difference(copy) and is_kept(nights, copy), (occasion, nights.run)
    assert nights.files_are_right()


@pytest.mark.parametrize('line, renamed', [(VM, CHANGES[0]), (VDI, DISK_CHANGES[0])], ids=['vm', 'disk'])
def test_a_server_that_forgets_the_name_of_the_reference_is_told_again(kept: Any, line: str, renamed: Any) -> None:
    # it forgets the moment before the old one goes, and not the snapshot that was made some time before
    nights = kept(line, faults=[at(renamed[0], nth=renamed[1], sleeps=1.5), at('api:VDI.destroy', nth=1, lose=1)])
    nights.write(2)
    copy = nights.night()
    assert nights.is_by_difference(copy) and is_kept(nights, copy) and nights.files_are_right(), nights.run


def test_a_server_that_forgets_that_it_destroyed_the_old_one_while_the_next_vm_is_backed_up_destroys_it_again(kept: Any) -> None:
    nights = kept(*BOTH, **SMALL, faults=[at('api:VM.destroy', nth=1, sleeps=1.5),
                                          at('api:VIF.get_all_records_where', nth=2, lose=1)])
    old = nights.reference
    nights.write(2)
    nights.night()
    assert is_nothing_left(nights) and nights.reference != old, nights.run


@pytest.mark.parametrize('line', [VM, VDI])
def test_a_server_that_forgets_which_disk_it_destroyed_is_asked_until_it_knows(kept: Any, line: str) -> None:
    nights = kept(line, faults=[at('api:VDI.destroy', nth=1, sleeps=1), at('api:VDI.destroy', nth=1, when='after', lose=0.5)])
    old = nights.reference
    nights.write(2)
    nights.night(exit_status=3)         # the SR has not what the database tells of
    assert old['uuid'] in nights.run.stderr and 'could not be removed now' in nights.run.stderr, nights.run
    api = nights.pool.session().xenapi
    api.VDI.forget(api.VDI.get_by_uuid(old['disks']['xvda']['uuid']))         # as the scan of a real SR does
    nights.write(3)
    copy = nights.night()
    assert nights.is_by_difference(copy) and is_kept(nights, copy), nights.run


def names_of_snapshots(nights: Kept) -> List[str]:
    """What the references in the pool are called."""
    objects = nights.pool.dump()
    return [record['name_label'] for kind in ('VM', 'VDI') for record in objects[kind].values()
            if 'VmBackup reference' in record['name_label']]


# --- What people do to it -------------------------------------------------------------------------------------------------

class Hands:
    """An administrator's, on the reference of web and on web."""

    def __init__(self, nights: Kept) -> None:
        self.nights = nights
        self.api = nights.pool.session().xenapi

    @property
    def snapshot(self) -> str:
        return self.api.VM.get_by_uuid(self.nights.reference['uuid'])

    @property
    def disk(self) -> str:
        """The snapshot of xvda."""
        return self.api.VDI.get_by_uuid(self.nights.reference['disks']['xvda']['uuid'])

    # what leaves its disks as they are

    def rename_it(self) -> None:
        self.api.VM.set_name_label(self.snapshot, 'before the upgrade')
        self.api.VDI.set_name_label(self.disk, 'root, before the upgrade')

    def destroy_its_record(self) -> None:
        self.api.VM.destroy(self.snapshot)

    def revert_to_it(self) -> None:
        self.api.VM.revert(self.snapshot)

    def clone_all(self) -> None:
        """web and the reference, with a mark as ours in other_config, and a name as a reference has it."""
        self.api.VM.add_to_other_config(self.snapshot, 'theirs', 'copied')
        self.api.VM.clone(self.snapshot, self.nights.reference['name'])
        web = self.api.VM.get_by_name_label('web')
        self.api.VM.clone([ref for ref in web if not self.api.VM.get_is_a_snapshot(ref)][0], 'web of the tests')
        self.api.VDI.clone(self.disk, {})

    def write_into_it(self) -> None:
        path = os.path.join(self.nights.shelf.home, 'image')
        with open(path, 'wb') as file:
            file.write(b'a mebibyte of somebody\n' * (MEBIBYTE // 23))
        run = self.nights.pool.xe('vdi-import', 'uuid=' + self.nights.reference['disks']['xvda']['uuid'], 'filename=' + path,
                                  'format=raw')
        assert run.exit_status == 0, run

    def exchange_the_disk(self) -> None:
        """The second one, for one of the same size that holds something else."""
        size = int(self.nights.disk('xvdb')['virtual_size'])
        self.nights.detach('xvdb')
        self.nights.add('xvdb', size)
        self.nights.write(2, device='xvdb')

    def take_the_second_disk(self) -> None:
        self.nights.detach('xvdb')

    # what does not

    def destroy_it(self) -> None:
        disks = [self.api.VDI.get_by_uuid(disk['uuid']) for disk in self.nights.reference['disks'].values()]
        self.api.VM.destroy(self.snapshot)
        for disk in disks:
            self.api.VDI.destroy(disk)

    def destroy_its_disks(self) -> None:
        for disk in self.nights.reference['disks'].values():
            self.api.VDI.destroy(self.api.VDI.get_by_uuid(disk['uuid']))

    def forget_its_disk(self) -> None:
        """The next scan of its SR finds it again, as a disk of another type."""
        sr = self.api.VDI.get_SR(self.disk)
        self.api.VDI.forget(self.disk)
        self.api.SR.scan(sr)

    def grow_the_disk(self) -> None:
        self.nights.grow(8 * MEBIBYTE)
        self.nights.write(7)

    def add_a_disk(self) -> None:
        self.nights.add('xvdb', 2 * MEBIBYTE)
        self.nights.write(1, device='xvdb')

    def move_the_disk(self) -> None:
        """With all snapshots of it, which are other disks there."""
        there, = self.api.SR.get_by_name_label('slow')
        self.api.VDI.pool_migrate(self.api.VDI.get_by_uuid(self.nights.disk('xvda')['uuid']), there, {})

    def put_a_copy_elsewhere(self) -> None:
        """In the place of the disk, on the other SR; its snapshots stay."""
        old = self.nights.disk('xvda')['uuid']
        there, = self.api.SR.get_by_name_label('fast')
        new = self.api.VDI.copy(self.api.VDI.get_by_uuid(old), there)
        self.nights.detach('xvda')
        self.nights.attach('xvda', self.api.VDI.get_uuid(new))



def test_what_leaves_the_disks_of_the_reference_as_they_are_costs_no_whole_reading(kept: Any) -> None:
    nights = kept(disks=TWO)
    hands = Hands(nights)
    for deed in (hands.rename_it, hands.destroy_its_record, hands.revert_to_it, hands.clone_all, hands.write_into_it,
                 hands.exchange_the_disk, hands.take_the_second_disk):
        deed()
        nights.write(2)
        assert nights.is_by_difference(nights.night()), (deed, nights.run.stdout.splitlines()[3:])
        assert is_nothing_left(nights), (deed, nights.run)
    assert nights.is_right()
    assert {'web of the tests', nights.reference['name']} < {one['name_label'] for one in nights.pool.dump()['VM'].values()}, \
        'what others made of it is theirs'


def test_what_does_not_has_all_read_and_why_is_told(kept: Any) -> None:
    nights = kept()
    hands = Hands(nights)
    for deed, why in ((hands.destroy_it, GONE), (hands.grow_the_disk, "the reference's disk xvda has another size"),
                      (hands.destroy_its_disks, GONE), (hands.add_a_disk, 'disk xvdb is not in the reference'),
                      (hands.forget_its_disk, "the reference's disk xvda is of another type"),
                      (hands.move_the_disk, GONE),
                      (hands.put_a_copy_elsewhere, "the reference's disk xvda lies on another SR")):
        deed()
        nights.write(2)
        assert nights.whole_because(nights.night()) == why, (deed, nights.run)
        assert is_nothing_left(nights), (deed, nights.run)
    nights.write(3)
    assert nights.is_by_difference(nights.night()) and nights.is_right()


def test_a_reference_whose_data_were_destroyed_and_only_its_record_kept_is_none(kept: Any) -> None:
    nights = kept(VDI, disks=[dict(ONE[0], cbt_enabled=True)])
    Hands(nights).api.VDI.data_destroy(Hands(nights).disk)
    nights.write(2)
    assert nights.whole_because(nights.night()) == "the reference's disk xvda is of another type" and is_nothing_left(nights)
    assert nights.files_are_right()


@pytest.mark.parametrize('line', [VM, VDI])
def test_a_reference_whose_disk_hangs_on_another_vm_is_read_against_and_stays_as_long_as_it_hangs_there(
        kept: Any, line: str) -> None:
    nights = kept(line)
    old = nights.reference
    nights._xe('vbd-create', 'vm-uuid=' + Hands(nights).api.VM.get_uuid(Hands(nights).api.VM.get_by_name_label('www')[0]),
               'vdi-uuid=' + old['disks']['xvda']['uuid'], 'device=5', 'type=Disk', 'mode=RO')
    for _ in range(2):
        nights.write(2)
        assert nights.is_by_difference(nights.night(exit_status=3))
        assert old['uuid'] in nights.run.stderr and 'hangs on another VM, www, so it was left' in nights.run.stderr, nights.run
        assert leftovers(nights.pool, nights.shelves, also_leaving=True) == [], nights.run
    vbd, = [record['uuid'] for record in nights.pool.dump()['VBD'].values() if record['userdevice'] == '5']
    nights._xe('vbd-destroy', 'uuid=' + vbd)
    assert nights.is_by_difference(nights.night()) and nights.is_right()


# --- Space ---------------------------------------------------------------------------------------------------------------

def guest_writes(nights: Kept, name: str, count: int, first: int = 0) -> None:
    nights.pool.command('write', '--dir', nights.pool.dir, '--vm', name, '--device', 'xvda', '--block', str(first),
                        '--count', str(count))


def is_given_up(nights: Kept, reference: Dict[str, Any]) -> bool:
    return 'its reference %s is removed, as its SR is short of space' % reference['uuid'] in nights.run.stdout


def test_references_go_first_where_an_sr_is_short_of_space_also_those_of_other_vms(kept: Any) -> None:
    nights = kept(*BOTH, **SMALL)
    www = Kept(nights.pool, nights.shelf, *BOTH, name='www')
    old = [nights.reference, www.reference]
    for name, count in (('web', 3), ('www', 3), ('theirs', 70)):
        guest_writes(nights, name, count)           # each of web and www now takes 3 MiB more, which its reference holds
    assert nights.whole_because(nights.night('min_sr_free=20')) == GONE
    assert is_given_up(nights, old[0]) and is_given_up(nights, old[1]) and is_nothing_left(nights), nights.run
    assert nights.reference and www.reference

    guest_writes(nights, 'theirs', 10, 70)
    nights.run_of(*nights.lines, 'min_sr_free=20', exit_status=1)
    assert nights.run.says('no snapshot of web') and nights.run.says('References there were given up'), nights.run
    assert not nights.reference and not www.reference and is_nothing_left(nights)
    assert nights.whole_because(nights.night()) == NONE and nights.files_are_right()


def test_an_sr_that_fills_up_while_a_difference_is_read_costs_the_references_that_nobody_reads(kept: Any) -> None:
    nights = kept(*BOTH, faults=[slowly('http:/export_raw_vdi', first=BLOCK, nth=1)], **SMALL)
    www = Kept(nights.pool, nights.shelf, *BOTH, name='www')
    old = [nights.reference, www.reference]
    copy = fills_up(nights, lambda: any(path.endswith('.partial/xvda.vhd') for path in nights.shelf.tree()))
    assert nights.is_by_difference(copy) and is_given_up(nights, old[1]) and not is_given_up(nights, old[0]), nights.run
    assert is_nothing_left(nights) and www.reference and nights.files_are_right()


def test_an_sr_that_fills_up_while_all_is_read_costs_the_vms_own_reference_and_not_the_lock_of_its_directory(kept: Any) -> None:
    nights = kept(*BOTH, faults=[slowly(first=BLOCK // 2, object='web')], **SMALL)
    old = nights.reference
    nights.lines = tuple(line for line in nights.lines if 'full_every' not in line) + ('full_every=2',)
    second = other_config(nights, VM, 'lock_wait=0')

    def meanwhile() -> None:
        run = run_program('-', second, environment=nights.pool.environment())
        assert run.exit_status == 1 and 'in use by another run' in run.stderr, run

    copy = fills_up(nights, is_exporting(nights.shelf), meanwhile)
    assert nights.read(copy) == 'xvda full' and is_given_up(nights, old), nights.run
    assert is_nothing_left(nights) and nights.reference['copy'] == copy and nights.files_are_right()


def fills_up(nights: Kept, is_time: Any, meanwhile: Any = lambda: None) -> str:
    """The copy that a run made in whose middle the SR filled up until references were given up."""
    for name in ('web', 'www'):
        guest_writes(nights, name, 3)
    before, held = nights.copies(), nights.disks()
    with beginning(nights.pool, nights.shelf, *nights.lines, 'min_sr_free=20', is_hurried=True) as process:
        assert eventually(is_time), process.output
        guest_writes(nights, 'theirs', 70)
        assert process.says('short of space'), process.output
        meanwhile()
        nights.pool.release()
        nights.run = process.ending()
    assert nights.run.exit_status == 0, nights.run
    copy, = set(nights.copies()) - set(before)
    nights.held[copy] = held
    return copy


def other_config(nights: Kept, *lines: str, name: str = 'other.cfg') -> str:
    """The path of a config beside weekend.cfg, with these lines for the same store."""
    path = os.path.join(nights.shelf.home, name)
    with open(path, 'w') as file:
        file.write('\n'.join(('backup_dir=' + nights.shelf.path, 'status_log=' + nights.shelf.status_log) + lines) + '\n')
    return path


@pytest.mark.parametrize('line, call', [(VM, 'api:VM.snapshot'), (VDI, 'api:VDI.snapshot')], ids=['vm', 'disk'])
def test_a_reference_is_given_up_where_the_sr_has_no_room_for_a_snapshot_and_the_vm_tried_again(
        kept: Any, line: str, call: str) -> None:
    full = at(call, nth=1, fails=['SR_BACKEND_FAILURE_44', '', 'There is insufficient space', ''])
    nights = kept(line, faults=[full])
    old = nights.reference
    nights.write(2)
    assert nights.whole_because(nights.night(exit_status=3)) == NONE
    assert is_given_up(nights, old) and nights.run.says('it needed a second try') and is_nothing_left(nights), nights.run
    nights.write(3)
    assert nights.is_by_difference(nights.night()) and nights.files_are_right()


def test_a_thick_sr_without_room_for_reference_and_snapshot_is_told_every_night_and_all_is_backed_up(kept: Any) -> None:
    nights = kept(srs=[{'name_label': 'thick', 'type': 'lvm', 'size': 14 * MEBIBYTE}])
    nights.write(0, count=6)            # the disk takes 6.5 MiB, and each snapshot of it 6
    for night in range(3):
        old = nights.reference
        nights.write(night)
        assert nights.whole_because(nights.night(exit_status=3)) == NONE
        assert is_given_up(nights, old) and nights.run.says('SR_BACKEND_FAILURE_44') and is_nothing_left(nights), nights.run
    assert nights.run.says('disk xvda was read whole 3 nights in a row'), nights.run
    assert nights.files_are_right()


# --- Who keeps it ----------------------------------------------------------------------------------------------------------

def goes(nights: Kept, why: str) -> bool:
    """The run removed the reference of web and told why, and there is no ledger any more."""
    return nights.reference == {} and is_nothing_left(nights) and 'is removed, as ' + why in nights.run.stdout


@pytest.mark.parametrize('lines', [OTHERS + ('incremental=yes', 'keep_reference=yes'), (VM, 'incremental=yes'), (VM,)],
                         ids=['vm', 'keep_reference', 'incremental'])
def test_what_the_config_does_not_keep_any_more_goes(kept: Any, lines: Any) -> None:
    nights = kept()
    nights.run_of(*lines)
    assert goes(nights, nights.config_path + ' keeps no reference of this VM any more'), nights.run


def test_what_the_command_line_alone_says_otherwise_leaves_it(kept: Any) -> None:
    nights = kept()
    before = nights.ledger
    nights.run_of(*nights.lines, words=OTHERS)
    assert nights.ledger == before and is_nothing_left(nights)
    run = run_program('-', 'vm-export=www', 'backup_dir=' + nights.shelf.path, 'status_log=' + nights.shelf.status_log,
                      environment=nights.pool.environment())
    assert run.exit_status == 0 and nights.ledger == before, run
    nights.write(2)
    assert nights.is_by_difference(nights.night())
    for words in (['keep_reference=no'], ['incremental=no']):
        before = nights.ledger
        nights.write(3)
        nights.night(words=words)
        assert nights.ledger == before and is_nothing_left(nights), nights.run
    nights.write(4)
    assert nights.whole_because(nights.night()) == LATE and is_nothing_left(nights)


def test_it_stays_with_a_config_that_is_edited_or_moved_and_goes_with_its_file(kept: Any) -> None:
    nights = kept()
    nights.write(2)
    assert nights.is_by_difference(nights.night('compress=gzip', 'vm-export=www'))
    folder = os.path.join(nights.shelf.home, 'etc')
    os.mkdir(folder)
    os.rename(nights.config_path, os.path.join(folder, 'weekend.cfg'))
    nights.config_path = os.path.join(folder, 'weekend.cfg')
    nights.write(3)
    assert nights.is_by_difference(nights.night()) and nights.ledger['config'] == nights.config_path

    others = Kept(nights.pool, nights.shelf, config='other.cfg')
    before = nights.ledger
    os.rename(folder, folder + ' away')
    others.run_of(*OTHERS)
    assert nights.ledger == before, 'its directory may be a share that is not there now'
    os.rename(folder + ' away', folder)
    others.run_of(*OTHERS)
    assert nights.ledger == before and is_nothing_left(nights)
    os.unlink(nights.config_path)
    nights.run = others.run_of(*OTHERS)
    assert goes(nights, 'the config %s, which kept it, is gone' % nights.config_path), nights.run


def test_one_that_is_older_than_35_days_goes_with_the_next_run_of_any_config(kept: Any) -> None:
    nights = kept()
    others = Kept(nights.pool, nights.shelf, config='other.cfg')
    for days, stays in ((34, True), (36, False)):
        at = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(time.time() - days * 86400))
        nights.edit_ledger(current={'at': at})
        nights.run = others.run_of(*OTHERS)
        assert bool(nights.reference) is stays, nights.run
    assert goes(nights, 'it is older than 35 days'), nights.run


def test_two_stores_on_one_pool_keep_one_each_and_leave_that_of_the_other(kept: Any) -> None:
    nights = kept()
    shelf = Shelf()
    nights.shelves.append(shelf)
    second = Kept(nights.pool, shelf, VM)
    assert second.whole_because(second.night()) == NONE
    for number, one in enumerate((nights, second)):
        one.write(number)
        assert one.is_by_difference(one.night()) and is_nothing_left(nights) and one.run.stderr == '', one.run
    assert nights.files_are_right() and second.files_are_right()
    stores = [one.ledger['store'][:8] for one in (nights, second)]
    assert sorted(name[-9:-1] for name in names_of_snapshots(nights)) == sorted(stores)
    api = nights.pool.session().xenapi             # made in the same second, as cron starts both runs at once
    name, = (ledger['current']['name'] for ledger in ledgers(nights.shelf))
    api.VM.set_name_label(api.VM.get_by_uuid(second.ledger['current']['uuid']), name.replace(*stores))
    assert nights.is_by_difference(nights.night()) and is_nothing_left(nights) and nights.run.stderr == '', nights.run


def test_two_configs_on_one_vm_hand_it_on_to_each_other(kept: Any) -> None:
    nights = kept()
    second = Kept(nights.pool, nights.shelf, VM, config='second.cfg')
    second.held = nights.held
    for number, one in enumerate((second, nights, second)):
        one.write(number)
        assert one.is_by_difference(one.night()) and is_nothing_left(nights), one.run
        assert nights.ledger['config'] == one.config_path
    before = nights.ledger
    second.lines = (VM, 'incremental=yes', 'max_backups=50')
    plain = Kept(nights.pool, nights.shelf, config='third.cfg')
    plain.lines, plain.held = second.lines, nights.held
    plain.write(3)
    plain.night()
    assert nights.ledger == before, 'a third, which keeps none, leaves it'
    assert nights.whole_because(nights.night()) == LATE and is_nothing_left(nights) and nights.files_are_right()


def test_vm_export_and_vdi_export_of_one_vm_keep_one_each(kept: Any) -> None:
    nights = kept()
    disks = Kept(nights.pool, nights.shelf, VDI, config='disks.cfg')
    assert disks.whole_because(disks.night()) == NONE
    for number, one in enumerate((nights, disks)):
        one.write(number)
        assert one.is_by_difference(one.night()) and is_nothing_left(nights), one.run
    assert len(ledgers(nights.shelf)) == 2 and nights.files_are_right() and disks.files_are_right()


# --- Ledgers that are lost, old, copied or damaged ----------------------------------------------------------------------------

def stays_and_is_told(nights: Kept, reference: Dict[str, Any]) -> bool:
    """The run has told how to remove that snapshot, which it has left."""
    word = 'snapshot-uninstall' if nights.kind == 'vm-export' else 'vdi-destroy'
    assert 'no record of this store names it' in nights.run.stderr, nights.run
    assert 'xe %s uuid=%s' % (word, reference['uuid']) in nights.run.stderr, nights.run
    nights.left += uuids_of(reference)
    return is_nothing_left(nights)


def uuids_of(reference: Dict[str, Any]) -> List[str]:
    return [reference['uuid']] + [disk['uuid'] for disk in reference['disks'].values()]


@pytest.mark.parametrize('line', [VM, VDI])
def test_one_whose_ledger_was_lost_with_the_state_folder_is_told_every_night_and_never_destroyed(kept: Any, line: str) -> None:
    nights = kept(line)
    lost = nights.reference
    shutil.rmtree(nights.shelf.at(STATE))
    nights.write(2)
    assert nights.whole_because(nights.night(exit_status=3)) == NONE and stays_and_is_told(nights, lost)
    nights.write(3)
    assert nights.is_by_difference(nights.night(exit_status=3)) and stays_and_is_told(nights, lost)
    assert nights.files_are_right()


@pytest.mark.parametrize('odd', ['record', 'folder'])
def test_one_that_nothing_is_told_of_or_whose_directory_can_not_be_read_does_not_hide_that_others_were_lost(
        kept: Any, odd: str) -> None:
    nights = kept(*BOTH)
    web, www = nights.reference, Kept(nights.pool, nights.shelf, *BOTH, name='www').reference
    shutil.rmtree(nights.shelf.at(STATE))
    nights.left = uuids_of(web) + uuids_of(www)
    if odd == 'record':
        serving(nights.pool, at('api:VM.get_by_uuid', nth=1, fails=['INTERNAL_ERROR', 'x']))
    nights.run = troubled(nights, **({'at': ['www'], 'do': 'EACCES'} if odd == 'folder' else {'hurried': True}))
    assert nights.run.exit_status == (1 if odd == 'folder' else 3) and nights.run.never_says('Traceback'), nights.run
    assert stays_and_is_told(nights, web) and (odd == 'folder' or stays_and_is_told(nights, www))


def test_a_reference_whose_record_is_damaged_costs_no_backup(kept: Any) -> None:
    nights = kept()
    kept_disk, = nights.reference['disks'].values()
    serving(nights.pool, at('api:VDI.get_record', object=kept_disk['uuid'], nth=1, fails=['INTERNAL_ERROR', 'x']))
    nights.write(2)
    assert nights.whole_because(nights.night()) == 'of the reference\'s disk xvda nothing is told', nights.run
    assert is_nothing_left(nights) and nights.is_by_difference(nights.night()) and nights.files_are_right()


def test_a_ledger_of_last_week_is_not_gone_by_and_the_reference_that_it_does_not_know_is_told(kept: Any) -> None:
    nights = kept()
    with open(nights.ledger_path) as file:
        last_week = file.read()
    nights.write(2)
    nights.night()
    newer = nights.reference
    with open(nights.ledger_path, 'w') as file:
        file.write(last_week)
    nights.write(3)
    assert nights.whole_because(nights.night(exit_status=3)) == LATE and stays_and_is_told(nights, newer)
    nights.write(4)
    assert nights.is_by_difference(nights.night(exit_status=3)) and stays_and_is_told(nights, newer) and nights.files_are_right()


def test_a_store_that_comes_back_from_last_weeks_copy_reads_all_until_it_knows_that_it_is_no_mirror(kept: Any) -> None:
    nights = kept()
    subprocess.run(['cp', '-a', nights.shelf.path, nights.shelf.path + ' of last week'], check=True)
    nights.write(2)
    later = nights.night()
    newer = nights.reference
    shutil.rmtree(nights.shelf.path)
    os.rename(nights.shelf.path + ' of last week', nights.shelf.path)
    del nights.held[later]
    nights.left = uuids_of(newer)
    nights.shelves = []                 # its ledger tells of what is no more
    assert eventually(lambda: time.strftime('backup-%Y-%m-%d-%H%M%S') > later), 'no copy gets the name of one that was lost'
    nights.write(3)
    assert nights.whole_because(nights.night(exit_status=3)) == "this store can't be told from one that it may be a copy of"
    assert stays_and_is_told(nights, newer)
    for folder, _, names in os.walk(nights.shelf.at(STATE, 'runs')):
        for name in names:
            os.utime(os.path.join(folder, name), (time.time() - 90000,) * 2)
    nights.write(4)
    assert nights.whole_because(nights.night()) == "the reference is another store's"
    nights.shelves = [nights.shelf]
    assert is_nothing_left(nights)
    nights.write(5)
    assert nights.is_by_difference(nights.night()) and nights.files_are_right()


def test_a_run_on_a_mirror_of_the_store_leaves_the_reference_to_the_store_that_keeps_it(kept: Any) -> None:
    nights = kept()
    shelf = Shelf()
    shutil.rmtree(shelf.path)
    subprocess.run(['cp', '-a', nights.shelf.path, shelf.path], check=True)
    mirror = Kept(nights.pool, shelf, VM)
    before = nights.ledger
    nights.write(2)
    assert mirror.whole_because(mirror.night(exit_status=3)) == "this store can't be told from one that it may be a copy of"
    assert mirror.run.says('came here from another store, or this one was moved'), mirror.run
    assert nights.ledger == before and is_nothing_left(nights) and mirror.files_are_right()
    shelf.remove()
    assert nights.is_by_difference(nights.night()) and nights.files_are_right()


def test_where_the_store_gets_another_inode_every_night_no_reference_is_kept_beside_one_that_stands(kept: Any) -> None:
    nights = kept()
    old = nights.reference
    for night in range(2):
        path = nights.shelf.at(STATE, 'store')
        shutil.copy(path, path + '.remounted')
        os.rename(path + '.remounted', path)
        for folder, _, names in os.walk(nights.shelf.at(STATE, 'runs')):
            for name in names:
                os.utime(os.path.join(folder, name), (time.time() - 90000,) * 2)
        nights.write(2 + night)
        assert nights.whole_because(nights.night(exit_status=3)) == "the reference is another store's"
        assert nights.run.says('no other is kept beside it') and old['uuid'] in nights.run.stderr, nights.run
        assert leftovers(nights.pool, [nights.shelf]) == [] and nights.reference == old
    assert nights.files_are_right()


def test_a_mirror_that_was_copied_while_the_snapshot_was_open_leaves_what_became_the_reference(kept: Any) -> None:
    nights = kept()
    reference, shelf = nights.reference, Shelf()
    shutil.rmtree(shelf.path)
    subprocess.run(['cp', '-a', nights.shelf.path, shelf.path], check=True)
    shutil.rmtree(shelf.at(STATE, 'references'))
    header = {key: nights.ledger[key] for key in ('pool', 'store', 'inode')}
    entry = {'entry': 1, 'kind': 'vm-snapshot', 'token': '0' * 16, 'vm_uuid': nights.ledger['vm'], 'vm_name': 'web',
             'called_at': '2026-01-01T00:10:00Z', 'name': 'web (backup 2026-01-01 00:10:00) vmbackup-' + '0' * 16,
             'uuid': reference['uuid'], 'disks': uuids_of(reference)[1:]}
    path = shelf.at(STATE, 'runs', 'of-then.run')
    with open(path, 'w') as file:
        file.write(''.join(json.dumps(facts) + '\n' for facts in (dict(header, host='xcp1'), entry)))
    os.utime(path, (time.time() - 90000,) * 2)
    mirror = Kept(nights.pool, shelf, VM)
    mirror.night(exit_status=3)
    assert is_nothing_left(nights), mirror.run
    shelf.remove()


def test_a_folder_of_ledgers_that_is_none_costs_no_backup(kept: Any) -> None:
    nights = kept()
    nights.left = uuids_of(nights.reference)
    nights.shelves = []
    os.rename(nights.shelf.at(STATE, 'references'), nights.shelf.home + '/aside')
    with open(nights.shelf.at(STATE, 'references'), 'w'):
        pass
    nights.write(2)
    nights.night(exit_status=3)
    assert is_nothing_left(nights) and nights.files_are_right()


def test_what_another_host_has_lately_kept_is_left_though_its_config_is_not_here(kept: Any) -> None:
    nights = kept()
    os.rename(nights.config_path, nights.config_path + '.moved')
    nights.config_path += '.other'
    nights.edit_ledger(host='xcp2')
    before = nights.ledger
    nights.run_of(*OTHERS)
    assert nights.ledger == before and is_nothing_left(nights)
    nights.edit_ledger(current={'at': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(time.time() - 9 * 86400))})
    nights.run_of(*OTHERS)
    assert goes(nights, 'the config ' + before['config'] + ', which kept it, is gone'), nights.run


def test_of_a_vm_whose_ledger_cannot_be_read_nothing_is_used_or_destroyed_and_the_file_is_named(kept: Any) -> None:
    nights = kept()
    dies_in(nights, *CALLS['before the old one is destroyed'][:3])         # the ledger names two, and one is open in a journal
    serving(nights.pool)
    path, two = nights.ledger_path, nights.ledger
    with open(path) as file:
        good = file.read()
    nights.left = uuids_of(two['current']) + uuids_of(two['leaving'][0])
    nights.shelves = []
    for bad, why in ((good[:100], 'Unterminated string'), (good.replace('"inode": ', '"node": '), 'inode is missing'),
                     (good.replace('"format": 1', '"format": 2'), 'only a newer VmBackup knows')):
        assert bad != good
        with open(path, 'w') as file:
            file.write(bad)
        nights.write(3)
        copy = nights.night(exit_status=3)
        assert nights.read(copy) == 'xvda all' and 'the record of its reference can\'t be used' in nights.run.stdout, nights.run
        assert os.path.basename(path) in nights.run.stderr and why in nights.run.stderr, nights.run
        assert nights.run.never_says('no record of this store names it'), 'this one may'
        found = {record['uuid'] for kind in ('VM', 'VDI') for record in nights.pool.dump()[kind].values()}
        assert is_nothing_left(nights) and set(nights.left) <= found, nights.run
        with open(path) as file:
            assert file.read() == bad
    with open(path, 'w') as file:
        file.write(good)
    nights.left, nights.shelves = [], [nights.shelf]
    nights.write(4)
    assert nights.whole_because(nights.night()) == LATE and is_nothing_left(nights) and nights.files_are_right()


def test_a_ledger_under_the_name_of_another_vms_is_neithers(kept: Any) -> None:
    nights = kept()
    path, old = nights.ledger_path, nights.reference
    strange = path.replace(uuid_of('web'), uuid_of('www'))
    os.rename(path, strange)
    nights.write(2)
    copy = nights.night('vm-export=www', exit_status=3)
    assert nights.whole_because(copy) == NONE and os.path.basename(strange) in nights.run.stderr, nights.run
    assert is_nothing_left(nights) and nights.run.never_says(old['uuid']), nights.run
    os.unlink(strange)
    assert nights.is_by_difference(nights.night(exit_status=3)) and stays_and_is_told(nights, old) and nights.files_are_right()


# --- Runs that meet ---------------------------------------------------------------------------------------------------------

def test_runs_that_meet_on_the_vm_take_turns_and_none_takes_it_from_the_other(kept: Any) -> None:
    nights = kept(faults=[slowly('http:/export_raw_vdi', first=BLOCK, nth=1)])
    second = other_config(nights, *nights.lines, name='second.cfg')
    nights.write(2)
    nights.write(4)                                 # the file begins when the first block is whole: then half is still to come
    before, held = nights.copies(), nights.disks()
    with beginning(nights.pool, nights.shelf, config=second) as first:
        assert eventually(lambda: any(path.endswith('.partial/xvda.vhd') for path in nights.shelf.tree())), first.output
        first.signal(signal.SIGSTOP)
        with beginning(nights.pool, nights.shelf, config=other_config(nights, *nights.lines, name='third.cfg')) as waiting:
            assert waiting.says('waiting'), waiting.output
            nights.run_of(*OTHERS)
            assert nights.run.never_says('is removed'), 'the config that kept it does so no more, but others are at it'
            first.signal(signal.SIGCONT)
            nights.pool.release()
            assert first.ending().exit_status == 0 and waiting.ending().exit_status == 0
    new = set(nights.copies()) - set(before)
    nights.held.update(dict.fromkeys(new, held))
    assert len(new) == 2 and all(nights.is_by_difference(copy) for copy in new)
    assert nights.reference['copy'] == max(new) and is_nothing_left(nights) and nights.files_are_right()
    nights.run_of(*OTHERS)
    assert nights.reference['copy'] == max(new), 'it is the others\' now'
