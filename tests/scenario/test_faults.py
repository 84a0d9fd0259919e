"""A sample of the generated fault suites: whatever goes wrong in a backup, of fulls or of increments, no good copy is lost, none
is falsely good, and the pool is left as it was, but for what ledgers name; whatever goes wrong in a restore or a drill, there is
a whole VM or nothing. tests/soak runs all."""

import fcntl
import os
import pickle
import re
import shutil
from typing import Any, Dict

import pytest

from support import faultsuite
from support.faultsuite import Base, step_shown
from support.incrementfaults import ChainsBase, IncrementsBase
from support.process import PROGRAM
from support.recoveryfaults import RecoveryBase
from support.referencefaults import AuditsBase, ReferencesBase
from support.references import FOLDER

#: How many troubles of each kind are tried; the name of a kind says where it strikes and what it does.
SAMPLE = {'api-fail': 2, 'api-drop': 1, 'api-hang': 1, 'api-master': 1, 'http-truncate': 1, 'http-flip': 1,
          'http-keepalive': 1, 'xe-exit': 1, 'SIGKILL': 1, 'storage-ENOSPC': 1, 'storage-SIGKILL': 1}
LAYERS_SAMPLE = {'increments-api-lose': 1, 'increments-http-truncate': 1, 'increments-SIGTERM': 1, 'increments-storage-SIGKILL': 2,
                 'increments-storage-flip': 1, 'increments-reading-EIO': 1, 'increments-holder-gone': 1, 'chains-SIGKILL': 1,
                 'chains-storage-SIGKILL': 1, 'chains-storage-EIO': 1}
#: Behind `at`: a word of the names of those that are meant.
REFERENCES_SAMPLE = {'references-storage-SIGKILL at .vmbackup/references': 2, 'references-http-truncate at raw_vdi': 1,
                     'references-reference-gone': 1, 'references-difference-omit': 1, 'audits-difference-omit': 1,
                     'audits-storage-SIGKILL at .vmbackup/references': 1}
RECOVERY_SAMPLE = {'restore-api-drop': 1, 'restore-api-fail': 2, 'restore-api-lose': 1, 'restore-http-flip': 1,
                   'restore-http-truncate': 1, 'restore-xe-kill': 1, 'restore-storage-SIGKILL': 1, 'restore-SIGKILL': 1,
                   'drill-api-fail': 1, 'drill-api-hang': 1, 'drill-api-master': 1, 'drill-http-drop': 1, 'drill-xe-exit': 1,
                   'drill-storage-ENOSPC': 1, 'drill-SIGKILL': 1, 'drill-SIGTERM': 1}


def choices(sample: Dict[str, int]) -> Any:
    found = [(kind, number) for kind in sorted(sample) for number in range(sample[kind])]
    return pytest.mark.parametrize('kind, number', found, ids=['%s-%d' % choice for choice in found])


@pytest.fixture(scope='session')
def base(tmp_path_factory: Any) -> Base:
    return recorded_once(tmp_path_factory, Base)


@pytest.fixture(scope='session')
def layers_bases(tmp_path_factory: Any) -> Dict[str, Base]:
    return {kind.title: recorded_once(tmp_path_factory, kind) for kind in (IncrementsBase, ChainsBase)}


@pytest.fixture(scope='session')
def references_bases(tmp_path_factory: Any) -> Dict[str, ReferencesBase]:
    return {kind.title: recorded_once(tmp_path_factory, kind) for kind in (ReferencesBase, AuditsBase)}


@pytest.fixture(scope='session')
def recovery_base(tmp_path_factory: Any) -> RecoveryBase:
    return recorded_once(tmp_path_factory, RecoveryBase)


def recorded_once(tmp_path_factory: Any, kind: Any) -> Any:
    """The recording, made by the worker that asks for it first; the others wait for it. pytest removes its folder some day."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder
    path = str(folder / kind.__name__)
    with open(path + '.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(path + '.pickle'):
            shutil.rmtree(path, ignore_errors=True)
            os.mkdir(path)
            recorded = pickle.dumps(kind(path, PROGRAM))
            with open(path + '.new', 'wb') as file:
                file.write(recorded)
            os.rename(path + '.new', path + '.pickle')
        with open(path + '.pickle', 'rb') as file:
            return pickle.load(file)


def is_survived(base: Base, kind: str, number: int, of: int) -> None:
    """The number-th of so many troubles of that kind, spread over all places of the recorded run."""
    kind, _, word = kind.partition(' at ')
    cases = [case for case in base.cases if case.kind == kind and word in case.name]
    result = faultsuite.run_case(base, faultsuite.spread(cases, of)[number])
    assert not result.problems, '%s\n%s\n%s\n%s' % (result.case.name, result.case.reproduction,
                                                    '\n'.join(result.problems), result.printed)


@choices(SAMPLE)
def test_no_trouble_costs_a_copy_or_leaves_anything_behind(base: Base, kind: str, number: int) -> None:
    is_survived(base, kind, number, SAMPLE[kind])


@choices(LAYERS_SAMPLE)
def test_no_trouble_costs_an_increment_or_what_it_rests_on(layers_bases: Dict[str, Base], kind: str, number: int) -> None:
    is_survived(layers_bases[kind.split('-')[0] + '-'], kind, number, LAYERS_SAMPLE[kind])


@choices(REFERENCES_SAMPLE)
def test_no_trouble_costs_a_copy_or_leaves_what_no_ledger_names(references_bases: Dict[str, ReferencesBase], kind: str,
                                                               number: int) -> None:
    is_survived(references_bases[kind.split('-')[0] + '-'], kind, number, REFERENCES_SAMPLE[kind])


@choices(RECOVERY_SAMPLE)
def test_no_trouble_leaves_half_a_vm(recovery_base: RecoveryBase, kind: str, number: int) -> None:
    is_survived(recovery_base, kind, number, RECOVERY_SAMPLE[kind])


def test_the_run_in_trouble_makes_compressed_increments_and_lets_go_an_increment(layers_bases: Dict[str, Base]) -> None:
    """What is swept through is what it is meant to be (steps of the storage, in order)."""
    steps = seen(layers_bases['increments-'])
    for name, disks in (('web', ('xvda', 'xvdb')), ('db', ('xvda',))):
        for disk in disks:
            file = '%s/backup-\\*.partial/%s.vhd' % (name, disk)
            assert re.search('create %s;.*write %s;.*fsync %s;.*create %s.gz;.*unlink %s;' % ((file,) * 5), steps), steps
        assert re.search('create {0}/RESTORE.txt;.*create {0}/success;.*rename {0};'.format(name + '/backup-\\*.partial'), steps)
    assert 'create web/backup-*.partial/ova.xml;' in steps
    assert steps.index('rename db/backup-*.partial;') < steps.index('rename db/backup-*;')


def test_the_run_in_trouble_lets_go_a_whole_chain_what_rests_on_others_first(layers_bases: Dict[str, Base]) -> None:
    base = layers_bases['chains-']
    for name in ('web', 'db'):
        full, increment = base.stand.of(name, base.stand.good)[:2]
        gone = [line.split('/')[1] for line in base.recording.steps if line.startswith('rename %s/' % name)][1:]
        assert base.stand.layer_of[increment]['base'] == full[1] and gone == [increment[1], full[1]]
        assert re.search('create %s/[^/]*/xvda.vhd;' % name, seen(base))


def seen(base: Base) -> str:
    return ''.join(step_shown(line) + ';' for line in base.recording.steps)


def test_the_run_in_trouble_reads_differences_and_makes_the_new_snapshot_the_reference(
        references_bases: Dict[str, ReferencesBase]) -> None:
    """Once the copy is visible: the ledger, the end of the entry, the entry of the old one (which is destroyed then), its end,
    and the ledger again (steps of the storage, in order). A full is read whole, too, after its differences."""
    put = ''.join('%s %s/[^;]+;' % (deed, FOLDER) for deed in ('create', 'write', 'fsync', 'rename', 'fsync'))
    noted = '(write .vmbackup/runs/[^;]+;fsync .vmbackup/runs/[^;]+;)'
    for base, is_read_whole in ((references_bases['references-'], False), (references_bases['audits-'], True)):
        steps = re.sub('unlink .vmbackup[^;]+;', '', seen(base))
        for name in base.disks:
            order = 'rename {0}/backup-\\*.partial;fsync {0};{1}{2}{{3}}{1}'.format(name, put, noted)
            assert re.search(order, steps), steps
        calls = [entry for entry in base.recording.journal if entry['call'] in ('vdi-export', 'vm-export')]
        words = ''.join('d' if any(word.startswith('base=') for word in entry['args']) else
                        'm' if 'metadata=true' in entry['args'] else 'w' for entry in calls)
        assert words == ('mdwmddw' if is_read_whole else 'mdmdd')


@pytest.mark.parametrize('title', ['', IncrementsBase.title, ChainsBase.title, ReferencesBase.title, AuditsBase.title])
def test_a_copy_is_on_disk_before_it_is_visible_and_older_ones_go_after_that(
        base: Base, layers_bases: Dict[str, Base], references_bases: Dict[str, Base], title: str) -> None:
    """What a power loss could take must never be what a name already promises (steps of the storage, in order)."""
    unsynced, visible = set(), set()
    for line in dict(layers_bases, **references_bases, **{'': base})[title].recording.steps:
        kind, place = line.split(' ', 1)
        folder = os.path.dirname(place) or '.'
        if kind in ('write', 'truncate'):
            unsynced.add(place)
        elif kind in ('create', 'mkdir'):
            unsynced.add(folder)
        elif kind == 'fsync':
            unsynced.discard(place)
            visible.discard(place)
        elif kind == 'rename' and place.endswith('.partial'):
            assert not [other for other in unsynced if (other + '/').startswith(place + '/')], line
            visible.add(folder)
        elif kind == 'rename' or kind == 'unlink' and place.endswith('.dump'):
            assert folder not in visible, '%s: the new one is not on disk yet' % line
    assert not visible
