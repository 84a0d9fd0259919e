"""The generated fault suite of the way back: every fault at every call, command and request of a restore and of a drill, and
signals and storage that fails at every moment of them.

The pool's VM `web` has disks on two SRs, so that its archive comes in by two imports whose disks are then joined; the copy
of `db` is a raw image. Each case repeats the recorded restore or drill with one trouble, and then runs the same once more
without. Whatever happens, there is a whole VM or nothing, and what was there before is as it was.
"""

import os
import shutil
import signal
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Set

from support import contents, recovery
from support.faultsuite import COPIES, Base, Case, Judge, Place, Result, cases_of, objects_of, result_of
from support.language import MEBIBYTE, described, disk, vm
from support.process import Pool

WEB = [disk(seed=21, size=4 * MEBIBYTE, used=[[0, 1], [3, 1]], sr='fast', bootable=True),
       disk(seed=22, size=2 * MEBIBYTE + 512, used=[[1, 1]], sr='slow')]
DB = [disk(seed=23, size=3 * MEBIBYTE, used=[[0, 1], [2, 1]], sr='fast'), disk(seed=24, size=MEBIBYTE, used=1, sr='slow')]
DESCRIPTION = described(
    [vm('web', WEB, vifs=[{'device': '0'}], other_config={'owner': 'someone'}, tags=['gold']), vm('db', DB),
     vm('bystander', 1, snapshots=[{'name_label': 'web (being restored) vmbackup-0123456789abcdef'}])],
    {'hosts': [{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'}],
     'srs': [{'name_label': 'fast'}, {'name_label': 'slow'}]})
PROVISIONAL = 'being restored'


class Way(NamedTuple):
    """An action of the way back: its words, and those of the clean run that follows."""
    name: str
    words: Sequence[str]
    again: Sequence[str]


WAYS = {way.name: way for way in (Way('restore', ('restore', 'web', 'to=back'), ('restore', 'web', 'to=again')),
                                  Way('drill', ('drill', 'newest-of-each'), ('drill', 'newest-of-each')))}


class RecoveryBase(Base):
    """A pool and a store with a copy of each VM, and the record of a restore and of a drill."""

    description = DESCRIPTION

    def record(self) -> None:
        first = Place(self, None, COPIES)
        try:
            first.serve()
            run = first.back_up()
            assert run.exit_status == 0, run.output
            self.objects = objects_of(first.pool)
            first.pool.stop()
            shutil.copytree(first.pool.dir, self.pool_dir, ignore=shutil.ignore_patterns('sockets', 'journal.jsonl'))
            shutil.copytree(first.store, os.path.join(self.home, 'store'), symlinks=True)
            self.files = contents.digests(first.store)
        finally:
            first.remove()
        self.cases = self.all_cases()

    def all_cases(self) -> List[Case]:
        return [case for way in WAYS.values() for case in self.recorded_cases(way)]

    def recorded_cases(self, way: Way) -> Iterator[Case]:
        """Every trouble at every place of one run that way."""
        for case in cases_of(self.recorded(way.words)):
            yield case._replace(name='%s-%s' % (way.name, case.name))

    def judge(self, case: Case) -> Result:
        way = WAYS[case.kind.split('-')[0]]
        place = Place(self, self, case.copies, case.faults)
        try:
            place.serve()
            run = place.do(way.words, case.trouble, case.signal_at)
            after = RecoveryAftermath(self, case, place, run, False, way.words, set())
            held, problems = after.judge()
            place.serve_without_faults()
            clean = place.do(way.again)
            later = RecoveryAftermath(self, case, place, clean, True, way.again, after.whole)
            more_held, more_problems = later.judge()
            return result_of(case, held + more_held, problems, more_problems, run, clean)
        finally:
            place.remove()


class RecoveryAftermath(Judge):
    """What is there after a restore or a drill."""

    def __init__(self, base: RecoveryBase, case: Case, place: Place, run: Any, is_clean: bool, words: Sequence[str],
                 whole_before: Set[str]) -> None:
        super().__init__(base, case, place, run, is_clean)
        self.words = words
        self.whole_before = whole_before
        self.objects = objects_of(place.pool)
        self.tables = place.pool.dump()
        #: The names of the VMs that a restore made and that are all that they should be.
        self.whole = {record['name_label'] for record in self.tables['VM'].values()
                      if 'VM ' + record['uuid'] not in base.objects and self.is_whole(record)}

    def is_whole(self, record: Dict[str, Any]) -> bool:
        """Has that VM all disks with all their bytes, and its interface?"""
        name = record['name_label']
        try:
            return (len(record['VIFs']) == 1 and record['power_state'] == 'Halted' and record['tags'] == ['gold']
                    and recovery.holds(self.place.pool, name, *WEB)
                    and (PROVISIONAL in name or record['other_config'].get('owner') == 'someone'))
        except AssertionError:                  # another number of disks, or of VMs of that name
            return False

    def parts_of_whole(self) -> Set[str]:
        """The objects that whole VMs consist of."""
        found = set()
        for record in self.tables['VM'].values():
            if record['name_label'] in self.whole:
                found.add('VM ' + record['uuid'])
                found |= {'VIF ' + self.tables['VIF'][ref]['uuid'] for ref in record['VIFs']}
                vbds = [self.tables['VBD'][ref] for ref in record['VBDs']]
                found |= {'VBD ' + vbd['uuid'] for vbd in vbds}
                found |= {'VDI ' + self.tables['VDI'][vbd['VDI']]['uuid'] for vbd in vbds if vbd['VDI'] in self.tables['VDI']}
        return found

    def was_lost(self) -> bool:
        return any(set(fault['do']) & {'lose', 'master'} for fault in self.case.faults)

    def was_lost_behind_the_end(self) -> bool:
        """Did the server forget its last seconds when the program had asked its last question? Nobody can tell then."""
        return any(fault['on'] == 'api:session.logout' and 'lose' in fault['do'] for fault in self.case.faults)

    # --- the pool ---

    def holds_what_was_there_is_as_it_was(self) -> List[str]:
        """No VM, disk, drive or interface that was there before is gone or changed."""
        return ['%s is %s, was %s' % (key, self.objects.get(key), record) for key, record in self.base.objects.items()
                if self.objects.get(key) != record]

    def holds_what_is_new_is_whole_or_known(self) -> List[str]:
        """What came into the pool belongs to whole VMs. Only after a run that was cut short may there be more, and then an
        open journal tells of it."""
        left = sorted(set(self.objects) - set(self.base.objects) - self.parts_of_whole())
        left += ['task ' + record['name_label'] for record in self.tables['task'].values()
                 if 'vmbackup-' in record['name_label']]
        is_known = self.open_journals() and (not self.is_clean or 'lose' in self.case.deeds and self.run.exit_status == 3)
        had_a_chance = self.case.signal_at is not None and not self.was_killed
        return [] if is_known and not had_a_chance else ['%s is left: %s' % (key, self.objects.get(key)) for key in left]

    def holds_a_drill_leaves_nothing(self) -> List[str]:
        """Not even a whole VM."""
        return [] if self.words[0] == 'restore' else ['the VM %s is left' % name for name in sorted(self.whole)]

    def holds_a_vm_that_was_whole_stays(self) -> List[str]:
        """What the first run gave the person, the second leaves to them."""
        return ['%s is gone' % name for name in sorted(self.whole_before - self.whole)]

    def holds_a_vm_of_the_final_name_is_whole(self) -> List[str]:
        """No half of a VM ever has the name that was asked for."""
        wanted = self.words[-1].rpartition('to=')[2]
        return ['%s is there, but not whole' % wanted for record in self.tables['VM'].values()
                if record['name_label'] == wanted and wanted not in self.whole]

    # --- the store ---

    def holds_the_copies_are_untouched(self) -> List[str]:
        """Every file of every copy is what it was, and nothing was added."""
        now = contents.digests(self.place.store)
        return ['%s is not what it was' % path for path in sorted(set(now) | set(self.base.files))
                if now.get(path) != self.base.files.get(path)]

    # --- what it said ---

    def holds_the_exit_status_is_true(self) -> List[str]:
        """0 and 3 mean that the VM is back, or that the drill proved both copies."""
        status = self.run.exit_status
        allowed = [0, 3] if 'lose' in self.case.deeds or not self.is_clean or self.whole_before else [0]
        if self.is_clean and (self.was_interrupted() or self.was_lost()):
            allowed += [3]                                  # the clean run removes what was left, and says so
        if not self.is_clean:
            allowed += [1, 4]
        if not self.is_clean and self.case.signal_at:
            allowed += [128 + self.case.signal_at[0], -self.case.signal_at[0]]
        if not self.is_clean and self.case.trouble:
            word = str(self.case.trouble.get('do'))
            allowed += [2] + [-signal.SIGKILL] * self.was_killed
            allowed += [128 + getattr(signal, word)] if word.startswith('SIG') else []
        problems = [] if status in allowed else ['exit status %d' % status]
        if status in (0, 3) and self.words[0] == 'restore' and self.words[-1].rpartition('to=')[2] not in self.whole \
                and not self.was_lost_behind_the_end():
            problems.append('exit status %d, but there is no whole VM; whole are %s' % (status, sorted(self.whole)))
        if status in (0, 3) and self.words[0] == 'drill' and '2 of 2 copies came back' not in self.run.stdout:
            problems.append('exit status %d, but not both copies came back' % status)
        return problems

    def was_interrupted(self) -> bool:
        return self.case.kills or self.case.signal_at is not None or self.case.trouble is not None or any(
            set(fault['do']) & {'drop', 'hang', 'logout', 'fail', 'kill'} for fault in self.case.faults)

    def holds_a_failure_has_a_sentence(self) -> List[str]:
        """Whoever gets another exit status is told why."""
        status = self.run.exit_status
        return ['exit status %d and no word' % status] if status in (1, 2, 3, 4) and not self.run.stderr.strip() else []
