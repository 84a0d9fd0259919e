"""What monitors read: numbers for Prometheus, `check` for Nagios and its heirs, pings for healthchecks.io and the like."""

import contextlib
import glob
import json
import math
import os
import re
import shutil
import signal
import socket
import threading
import time
from datetime import datetime, timezone
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support import warm
from support.deeds import Process, backup, beginning, in_trouble, is_exporting, preview, without_pool
from support.language import MEBIBYTE, at, disk, slowly, uuid_of, vm
from support.process import Pool, Run, ended
from support.shelf import Shelf, path_of
from support.wire import eventually

FULL = ['SR_BACKEND_FAILURE_44', '', 'There is insufficient space', '']
HOUR_S, DAY_S = 3600, 86400
AGAIN = ('force=yes',)                      # where a round of the same hour is wanted once more
TWO_HOSTS = [{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'}]
SLOW = [slowly()]
BIG = [disk(size=9 * MEBIBYTE, used=9)]


def next_second() -> None:
    """What begins now bears a later time than all that has begun."""
    begun = int(time.time())
    eventually(lambda: int(time.time()) > begun)


def run_in_trouble(pool: Pool, shelf: Shelf, *lines: str, words: Sequence[str] = (), password: str = '-', **trouble: Any) -> Run:
    """A backup on a machine in that trouble."""
    return ended(warm.start(in_trouble(shelf, **trouble) + [password, shelf.config(*lines)] + list(words), pool.environment()))


def last_round(shelf: Shelf) -> Dict[str, Any]:
    """What the history holds of the last round."""
    path = max(glob.glob(shelf.at('.vmbackup', 'history', '*', '*.json')), key=os.path.basename)
    with open(path, 'rb') as file:
        return json.loads(file.read().decode('ascii'))


def seconds_of(text: str) -> float:
    return datetime.strptime(text, '%Y-%m-%dT%H:%M:%SZ').replace(tzinfo=timezone.utc).timestamp()


# --- numbers for Prometheus ----------------------------------------------------------------------------------------------

#: Types and derived units, which stand in no name.
NO_WORDS = {'gauge', 'counter', 'histogram', 'summary', 'total', 'count', 'sum', 'bucket', 'info', 'milliseconds', 'minutes', 'hours',
            'days', 'kib', 'mib', 'gib', 'megabytes', 'gigabytes', 'percent', 'age'}
Key = Tuple[str, Tuple[Tuple[str, str], ...]]


class Numbers:
    """The file of numbers: beside the shelf, in a directory of its own as node_exporter has it."""

    def __init__(self, shelf: Shelf) -> None:
        self.folder = os.path.join(shelf.home, 'node_exporter')
        os.mkdir(self.folder)
        self.path = os.path.join(self.folder, 'weekend.prom')
        self.line = 'metrics_file=' + self.path

    def text(self) -> str:
        with open(self.path, 'rb') as file:
            return file.read().decode('utf-8')

    def families(self) -> List[Any]:
        return list(text_string_to_metric_families(self.text()))

    def samples(self) -> Dict[Key, float]:
        """All values, by name and labels; none is there twice."""
        found: Dict[Key, float] = {}
        for family in self.families():
            for sample in family.samples:
                key = (sample[0], tuple(sorted(sample[1].items())))
                assert key not in found, key
                found[key] = sample[2]
        return found

    def value(self, name: str, vm_name: str = '') -> float:
        """The only one of that name, and of that VM."""
        (value,) = [value for (metric, labels), value in self.samples().items()
                    if metric == 'vmbackup_' + name and (not vm_name or ('vm', vm_name) in labels)]
        return value

    def vms(self) -> List[str]:
        return sorted({dict(labels)['vm'] for _, labels in self.samples() if 'vm' in dict(labels)})


@pytest.fixture
def given(a_shelf: Any) -> Tuple[Shelf, Numbers]:
    shelf = a_shelf()
    return shelf, Numbers(shelf)


def test_the_numbers_keep_the_rules_of_prometheus(a_pool: Any, given: Any) -> None:
    shelf, numbers = given
    pool = a_pool(vm('db'), vm('web'), faults=[at('api:VM.snapshot', object='web', fails=FULL)])
    assert backup(pool, shelf, 'vm-export=*', numbers.line).exit_status == 1
    families, text = numbers.families(), numbers.text()
    assert len(families) > 15 and text.endswith('\n') and '\n\n' not in text
    names = [family.name for family in families]
    assert len(set(names)) == len(names) == text.count('# HELP ') == text.count('# TYPE ')
    numbers.samples()
    for family in families:
        assert re.fullmatch(r'vmbackup(_[a-z]+)+', family.name), family.name
        assert family.documentation and family.type == 'gauge' and family.samples
        assert not NO_WORDS & set(family.name.split('_')), family.name
        for word, unit in (('timestamp', 'seconds'), ('duration', 'seconds'), ('size', 'bytes'), ('free', 'bytes'),
                           ('seconds', 'seconds'), ('bytes', 'bytes')):
            assert word not in family.name.split('_') or family.name.endswith('_' + unit), family.name
        labels = {'config', 'vm', 'uuid'} if family.name.startswith('vmbackup_vm_') else {'config'}
        assert all(set(sample[1]) == labels for sample in family.samples)
        assert len(family.samples) == (2 if 'vm' in labels else 1)


def test_the_numbers_are_those_of_the_round_and_its_copies(a_pool: Any, given: Any) -> None:
    shelf, numbers = given
    pool = a_pool(vm('db'), vm('web'), faults=[at('api:VM.snapshot', object='web', nth=2, fails=FULL)])
    assert backup(pool, shelf, 'vm-export=*', 'vm-export=none*', numbers.line).exit_status == 3
    assert (numbers.value('round_success'), numbers.value('round_warnings'), numbers.value('round_errors')) == (1, 1, 0)
    next_second()
    assert backup(pool, shelf, 'vm-export=*', 'vm-export=nobody', numbers.line, words=AGAIN).exit_status == 1
    facts = last_round(shelf)
    assert [numbers.value('round_' + name) for name in (
        'start_timestamp_seconds', 'end_timestamp_seconds', 'success', 'errors', 'vms', 'failed_vms')] == [
            seconds_of(facts['began_at']), seconds_of(facts['ended_at']), 0, 2, 3, 2]
    copy = shelf.manifest('db', shelf.newest('db'))
    assert numbers.value('vm_newest_good_copy_timestamp_seconds', 'db') == seconds_of(copy['taken_at'])
    assert numbers.value('vm_newest_good_copy_size_bytes', 'db') == numbers.value('round_size_bytes') == shelf.size(
        'db', shelf.newest('db'), 'db.xva')
    assert [numbers.value('vm_' + name, 'db') for name in ('good_copies', 'bad_copies', 'last_backup_success')] == [2, 0, 1]
    assert [numbers.value('vm_' + name, 'web') for name in ('good_copies', 'bad_copies', 'last_backup_success')] == [1, 0, 0]
    assert 0 < numbers.value('vm_last_good_backup_duration_seconds', 'web') < 100
    space = os.statvfs(shelf.path)
    assert numbers.value('store_size_bytes') == space.f_blocks * space.f_frsize and numbers.value('store_free_bytes') > 0


def test_times_stand_there_and_never_ages(a_pool: Any, given: Any) -> None:
    shelf, numbers = given
    pool = a_pool(vm('web'))
    assert backup(pool, shelf, 'vm-export=web', numbers.line).exit_status == 0
    facts, copy = last_round(shelf), shelf.manifest('web', shelf.newest('web'))
    times = {seconds_of(text) for text in (facts['began_at'], facts['ended_at'], copy['taken_at'])}
    for (name, _), value in numbers.samples().items():
        if 'timestamp' in name:
            assert value in times | {0}, name


def test_a_vm_that_fails_loses_no_number_and_the_time_of_its_newest_copy_stays(a_pool: Any, given: Any) -> None:
    shelf, numbers = given
    pool = a_pool(vm('db'), vm('web'), faults=[at('api:VM.snapshot', object='web', nth=2, fails=FULL)])
    assert backup(pool, shelf, 'vm-export=*', numbers.line).exit_status == 0
    before = numbers.samples()
    next_second()
    assert backup(pool, shelf, 'vm-export=*', numbers.line, words=AGAIN).exit_status == 1
    after = numbers.samples()
    assert set(after) == set(before)
    changed = {name for (name, labels), value in after.items() if ('vm', 'web') in labels and value != before[(name, labels)]}
    assert changed == {'vmbackup_vm_last_backup_success'}


def test_a_run_that_ended_before_its_first_vm_loses_no_number_of_a_vm(a_pool: Any, given: Any) -> None:
    shelf, numbers = given
    pool = a_pool(vm('db'), vm('web'))
    assert backup(pool, shelf, 'vm-export=*', numbers.line).exit_status == 0
    before = numbers.samples()
    next_second()
    assert backup(pool, shelf, 'vm-export=*', numbers.line, password='a wrong one').exit_status == 4
    assert numbers.samples() == before, 'it was no round'


def test_a_pool_that_is_away_for_weeks_loses_no_number_of_a_vm(a_pool: Any, given: Any) -> None:
    """Its alarms would fall silent."""
    shelf, numbers = given
    pool = a_pool(vm('db'), vm('web'))
    assert backup(pool, shelf, 'vm-export=*', numbers.line).exit_status == 0
    before = numbers.samples()
    for days in (5, 9, 14):
        run = run_in_trouble(pool, shelf, 'vm-export=*', numbers.line, password='a wrong one', clock=days * DAY_S)
        assert run.exit_status == 4 and set(numbers.samples()) == set(before), (days, numbers.vms())
    run = check(shelf, clock=14.5 * DAY_S)
    assert run.status == 2 and run.figures['vms'] == '2', run


def test_a_vm_that_is_in_no_round_leaves_after_seven_days(a_pool: Any, given: Any) -> None:
    shelf, numbers = given
    pool = a_pool(vm('db'), vm('web'))
    assert backup(pool, shelf, 'vm-export=*', numbers.line).exit_status == 0
    for days, names in ((6.9, ['db', 'web']), (7.1, ['web'])):
        run = run_in_trouble(pool, shelf, 'vm-export=*', 'exclude=db', numbers.line, clock=days * DAY_S)
        assert run.exit_status == 0 and numbers.vms() == names, (run, numbers.vms())
    assert check(shelf, clock=7.2 * DAY_S).figures['vms'] == '1'


def test_names_that_bite_are_labels_as_they_are(a_pool: Any, given: Any) -> None:
    shelf, numbers = given
    names = ['say "hi"', 'C:\\new', 'first\nsecond', '\\', '"', 'a{b="c"} 1', 'Büro 🦊', '', ' nan', '# HELP x', '%s',
             'x' * 255]
    pool = a_pool(*[vm(name, disks=[disk(size=MEBIBYTE, used=1)]) for name in names], faults=[at('api:VM.snapshot', fails=FULL)])
    assert backup(pool, shelf, 'vm-export=*', numbers.line).exit_status == 1
    assert numbers.vms() == sorted(names)
    assert math.isnan(numbers.value('vm_last_good_backup_duration_seconds', 'say "hi"'))
    assert {(dict(labels)['vm'], dict(labels)['uuid']) for _, labels in numbers.samples() if 'vm' in dict(labels)} == {
        (name, uuid_of(name)) for name in names}


def test_a_config_whose_name_is_not_utf8_costs_no_number(a_pool: Any, given: Any) -> None:
    shelf, numbers = given
    pool = a_pool(vm('web'))
    shelf.config_path = os.path.join(shelf.home, 'week\udcff"end\\.cfg')
    text = 'vm-export=web\nbackup_dir=%s\nstatus_log=%s\n%s\n' % (shelf.path, shelf.status_log, numbers.line)
    with open(os.fsencode(path_of(shelf.config_path)), 'wb') as file:
        file.write(text.encode('ascii'))
    run = ended(warm.start([in_trouble(shelf)[2], '-', shelf.config_path], pool.environment()))
    assert run.exit_status == 0, run
    assert {dict(labels)['config'] for _, labels in numbers.samples()} == {os.path.join(shelf.home, 'week?"end\\.cfg')}


def test_the_file_is_for_everybody_and_replaced_in_one_step(a_pool: Any, given: Any) -> None:
    shelf, numbers = given
    pool = a_pool(vm('web'))
    assert backup(pool, shelf, 'vm-export=web', numbers.line).exit_status == 0
    with open(numbers.path, 'rb') as reader:                       # who reads meanwhile has the old one, whole
        first, old = os.fstat(reader.fileno()), numbers.text()
        assert first.st_mode & 0o777 == 0o644
        next_second()
        assert backup(pool, shelf, 'vm-export=web', numbers.line, words=AGAIN).exit_status == 0
        assert reader.read().decode('utf-8') == old
    second = os.stat(numbers.path)
    assert second.st_ino != first.st_ino and second.st_mode & 0o777 == 0o644
    assert os.listdir(numbers.folder) == ['weekend.prom']


@pytest.mark.parametrize('step', [1, 2, 3, 4])
@pytest.mark.parametrize('deed', ['ENOSPC', 'EIO'])
def test_a_file_that_cant_be_written_stays_as_it_was_and_is_a_warning(a_pool: Any, given: Any, deed: str, step: int) -> None:
    shelf, numbers = given
    pool = a_pool(vm('web'))
    with open(numbers.path, 'w') as file:
        file.write('vmbackup_old 1\n')
    run = run_in_trouble(pool, shelf, 'vm-export=web', numbers.line, store=numbers.folder, step=step, do=deed)
    assert shelf.has('web', complete=1) and run.never_says('Traceback')
    assert os.listdir(numbers.folder) == ['weekend.prom'], 'no temporary stays'
    if run.exit_status == 0:
        assert deed == 'ENOSPC' and step > 2 or step > 4
    else:
        assert run.exit_status == 3 and 'warning: metrics_file: ' in run.stderr, run
        assert numbers.text() == 'vmbackup_old 1\n' or step > 3


@pytest.mark.parametrize('what', ['not there', 'a file', 'a directory of its name'])
def test_a_place_that_is_none_is_a_warning_and_all_copies_are_good(a_pool: Any, given: Any, what: str) -> None:
    shelf, numbers = given
    pool = a_pool(vm('web'), vm('db'))
    if what == 'a directory of its name':
        os.mkdir(numbers.path)
    else:
        os.rmdir(numbers.folder)
    if what == 'a file':
        open(numbers.folder, 'w').close()
    run = backup(pool, shelf, 'vm-export=*', numbers.line)
    assert run.exit_status == 3 and run.stderr.count('warning: metrics_file: ') == 1 and run.never_says('Traceback'), run
    assert shelf.has('web', complete=1) and shelf.has('db', complete=1) and last_round(shelf)['outcomes'][0]['error'] is None
    assert os.path.exists(numbers.folder) is (what != 'not there')
    assert {'BACKUPS', 'status.log', 'weekend.cfg', 'node_exporter'} >= set(os.listdir(shelf.home))
    assert what != 'a directory of its name' or os.listdir(numbers.folder) == ['weekend.prom'] and os.listdir(numbers.path) == []


# --- check, for Nagios and its heirs ------------------------------------------------------------------------------------------

class Checked(NamedTuple):
    """What a monitor makes of a check."""
    status: int
    text: str
    figures: Dict[str, str]
    run: Run


WORDS = {0: 'OK', 1: 'WARNING', 2: 'CRITICAL', 3: 'UNKNOWN'}
FIGURE = re.compile(r"([^\s='|;]+|'(?:[^']|'')+')=(-?[0-9]+(?:\.[0-9]+)?)(s|us|ms|%|B|KB|MB|GB|TB|c)?((?:;(?:-?[0-9.]+)?){0,4})")


def as_a_monitor_reads_it(run: Run) -> Checked:
    """One line of text and figures, as the guidelines for Nagios plugins have it, and nothing else."""
    lines = run.stdout.split('\n')
    assert len(lines) == 2 and lines[1] == '' and lines[0].isprintable(), run
    assert run.exit_status in WORDS, run
    text, bar, figures = lines[0].partition('|')
    assert text.startswith('VMBACKUP %s: ' % WORDS[run.exit_status]) and len(text) > 20, run
    assert '|' not in figures and (not bar or text.endswith(' ') and figures.startswith(' ') and figures.strip()), run
    found = {}
    for part in figures.split():
        match = FIGURE.fullmatch(part)
        assert match, part
        assert match.group(1) not in found, part
        found[match.group(1)] = part.partition('=')[2]
    return Checked(run.exit_status, text, found, run)


def check(shelf: Shelf, *words: str, **how: Any) -> Checked:
    return as_a_monitor_reads_it(without_pool(shelf, 'check', *words, **how))


def test_all_good_is_ok_with_figures(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    seen = check(shelf)
    assert seen.status == 0 and seen.run.stderr == '' and '2 VMs, the newest good copy of each at most' in seen.text
    assert set(seen.figures) == {'vms', 'oldest', 'without', 'bad', 'free'}
    assert (seen.figures['vms'], seen.figures['without'], seen.figures['bad']) == ('2', '0', '0')
    assert re.fullmatch(r'\d+s;108000;194400;0', seen.figures['oldest']) and re.fullmatch(r'\d+B', seen.figures['free'])


@pytest.mark.parametrize('hours, words, status', [
    (29, [], 0), (31, [], 1), (53, [], 1), (55, [], 2), (31, ['warn_age=32'], 0), (5, ['warn_age=4'], 1),
    (5, ['warn_age=4', 'crit_age=4'], 2), (5, ['crit_age=4'], 2), (90, ['warn_age=100', 'crit_age=200'], 0)])
def test_age_makes_a_warning_and_then_an_alarm(a_backup_of_two: Any, hours: int, words: List[str], status: int) -> None:
    shelf = a_backup_of_two
    seen = check(shelf, *words, clock=hours * HOUR_S)
    assert seen.status == status, seen
    age_s = int(seen.figures['oldest'].partition('s')[0])
    assert hours * HOUR_S <= age_s < hours * HOUR_S + 600
    assert status == 0 or 'web (' in seen.text and 'db (' in seen.text and ' 2 older than ' in seen.text


@pytest.fixture(scope='module')
def a_backup_of_two() -> Iterator[Shelf]:
    """A shelf with one good round of web and db; who takes it changes nothing on it."""
    pool, shelf = Pool({'vms': [vm('web'), vm('db')]}), Shelf()
    try:
        assert backup(pool.start(), shelf, 'vm-export=*').exit_status == 0
        yield shelf
    finally:
        pool.remove()
        shelf.remove()


def test_a_vm_without_a_good_copy_is_critical(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('db'), vm('web'), faults=[at('api:VM.snapshot', object='web', fails=FULL)])
    shelf = a_shelf()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 1
    seen = check(shelf)
    assert seen.status == 2 and '1 without a good copy: web (' in seen.text and 'db' not in seen.text.replace('VMBACKUP', '')
    assert (seen.figures['vms'], seen.figures['without']) == ('2', '1')


def test_a_vm_that_failed_with_a_copy_that_is_new_enough_is_no_alarm(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web'), faults=[at('api:VM.snapshot', object='web', nth=2, fails=FULL)])
    shelf = a_shelf()
    for status in (0, 1):
        assert backup(pool, shelf, 'vm-export=*', words=AGAIN).exit_status == status
        next_second()
    assert check(shelf).status == 0
    assert check(shelf, clock=60 * HOUR_S).status == 2


def nights(pool: Pool, shelf: Shelf, *hours: float) -> None:
    """A backup of web at each of these hours from now."""
    for hour in hours:
        run = run_in_trouble(pool, shelf, 'vm-export=*', clock=hour * HOUR_S)
        assert run.exit_status in (0, 3), run


@pytest.mark.parametrize('number', [0, 1], ids=['the older', 'the newest'])
@pytest.mark.parametrize('has_run_since', [True, False])
def test_a_copy_that_verify_found_damaged_is_a_warning_until_it_is_removed(a_pool: Any, a_shelf: Any, has_run_since: bool,
                                                                          number: int) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    nights(pool, shelf, 0, 2)
    copy = shelf.copies('web')[number]
    shelf.flip('web', copy)
    assert check(shelf, clock=3 * HOUR_S).status == 0
    assert without_pool(shelf, 'verify').exit_status == 1
    if has_run_since:
        nights(pool, shelf, 4)
    seen = check(shelf, clock=5 * HOUR_S)
    assert seen.status == 1 and seen.figures['bad'] == '1' and 'web/%s' % copy in seen.text, seen
    shutil.rmtree(shelf.at('web', copy))
    seen = check(shelf, clock=5 * HOUR_S)
    assert seen.status == 0 and seen.figures['bad'] == '0', seen


def test_a_newest_copy_that_is_found_damaged_counts_no_more(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    nights(pool, shelf, 0)
    shelf.flip('web', shelf.newest('web'))
    assert without_pool(shelf, 'verify').exit_status == 1
    seen = check(shelf)
    assert seen.status == 2 and seen.figures['without'] == '1', seen


@pytest.mark.parametrize('hour, status', [(3, 0), (31, 1), (55, 2)])
def test_a_newest_copy_that_was_removed_by_hand_leaves_the_age_of_the_one_before(a_pool: Any, a_shelf: Any, hour: int,
                                                                                status: int) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    nights(pool, shelf, 0, 2)
    shutil.rmtree(shelf.at('web', shelf.newest('web')))
    seen = check(shelf, clock=hour * HOUR_S)
    assert seen.status == status and int(seen.figures['oldest'].partition('s')[0]) >= hour * HOUR_S, seen


@pytest.mark.parametrize('what', ['the copy', 'the directory'])
def test_a_vm_all_of_whose_copies_were_removed_is_critical(a_pool: Any, a_shelf: Any, what: str) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf()
    nights(pool, shelf, 0)
    shutil.rmtree(shelf.at('web', shelf.newest('web')) if what == 'the copy' else shelf.at('web'))
    seen = check(shelf)
    assert seen.status == 2 and '1 without a good copy: web (' in seen.text and seen.figures['vms'] == '2', seen


def test_an_increment_whose_base_is_gone_counts_no_more(some_nights: Any) -> None:
    made = some_nights()
    first = made.night()
    made.write(2)
    made.night()
    assert as_a_monitor_reads_it(without_pool(made.shelf, 'check')).status == 0
    shutil.rmtree(made.shelf.at('web', first))
    seen = check(made.shelf)
    assert seen.status == 2 and seen.figures['without'] == '1', seen


def test_a_newer_copy_that_another_config_made_counts(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    nights(pool, shelf, 0)
    own, shelf.config_path = shelf.config_path, os.path.join(shelf.home, 'weekday.cfg')
    nights(pool, shelf, 50)
    shelf.config_path = own
    seen = check(shelf, clock=60 * HOUR_S)
    assert seen.status == 0 and 10 * HOUR_S <= int(seen.figures['oldest'].partition('s')[0]) < 11 * HOUR_S, seen
    assert check(shelf, clock=81 * HOUR_S).status == 1


def test_a_copy_of_another_kind_does_not_stand_for_one_of_this_configs(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    nights(pool, shelf, 0)
    own, shelf.config_path = shelf.config_path, os.path.join(shelf.home, 'disks.cfg')
    assert run_in_trouble(pool, shelf, 'vdi-export=web', clock=50 * HOUR_S).exit_status == 0
    shelf.config_path = own
    assert check(shelf, clock=60 * HOUR_S).status == 2


# --- what can't be known ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('what', ['no round yet', 'no store', 'an empty store', 'no config', 'a wrong config',
                                  'a config that is none', 'a wrong word', 'a word too many', 'a wrong number', 'a round of no VM'])
def test_what_cant_be_known_is_unknown_in_one_line(a_pool: Any, a_shelf: Any, what: str) -> None:
    pool, shelf, lines, words = a_pool(vm('web')), a_shelf(), ['vm-export=*'], ['check']
    if what in ('no store', 'an empty store'):
        nights(pool, shelf, 0)
        shutil.rmtree(shelf.path)
    if what == 'an empty store':
        os.mkdir(shelf.path)
    if what == 'a round of no VM':
        assert backup(pool, shelf, *lines, password='a wrong one').exit_status == 4
    lines += {'a wrong config': ['max_backups=many', 'colour=red']}.get(what, [])
    words += {'a wrong word': ['colour=red'], 'a word too many': ['web', 'db'], 'a wrong number': ['warn_age=soon']}.get(what, [])
    if what in ('no config', 'a config that is none'):
        shelf.config()
        os.unlink(shelf.config_path)
        if what != 'no config':
            os.mkdir(shelf.config_path)
        run = ended(warm.start([in_trouble(shelf)[2], '-', shelf.config_path] + words, {'PATH': '/usr/bin:/bin'}))
    else:
        run = without_pool(shelf, *words, lines=lines)
    seen = as_a_monitor_reads_it(run)
    assert seen.status == 3 and seen.run.never_says('Traceback'), seen
    assert what in ('an empty store', 'no store') or not os.path.exists(shelf.at('.vmbackup')) or what == 'a round of no VM'


@pytest.mark.parametrize('number', ['EIO', 'ESTALE', 'EACCES'])
def test_a_store_that_gives_nothing_is_unknown(a_backup_of_two: Any, number: str) -> None:
    for name in ('.vmbackup', 'web'):
        seen = check(a_backup_of_two, at=[name], do=number)
        assert seen.status == 3, seen


def test_a_bug_is_unknown_in_one_line_too(a_backup_of_two: Any) -> None:
    seen = check(a_backup_of_two, broken='check_line')
    assert seen.status == 3 and 'Traceback' in seen.run.stderr, seen


# --- what else a check must not do --------------------------------------------------------------------------------------------

def test_names_that_bite_stay_in_the_line_and_before_the_figures(a_pool: Any, a_shelf: Any) -> None:
    names = ['a|b=1s;;', 'first\nsecond', 'a\u2028b', 'say "hi"', "it's", '\u202e', 'x' * 255]
    pool = a_pool(*[vm(name, disks=[disk(size=MEBIBYTE, used=1)]) for name in names], faults=[at('api:VM.snapshot', fails=FULL)])
    shelf = a_shelf()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 1
    for count, name in enumerate(names):
        seen = check(shelf)
        assert seen.status == 2 and seen.figures['vms'] == seen.figures['without'] == str(len(names)), seen


def test_a_check_asks_no_pool_needs_no_password_and_changes_nothing(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    calls, tree = len(pool.journal()), shelf.tree()
    for password in ('-', '/no/such/password/file', 'a wrong one'):
        for hours in (0, 40, 60):
            start = in_trouble(shelf, clock=hours * HOUR_S)
            run = ended(warm.start(start + [password, shelf.config('vm-export=web'), 'check'], pool.environment()))
            assert as_a_monitor_reads_it(run).status == (hours > 30) + (hours > 54)
    assert len(pool.journal()) == calls and shelf.tree() == tree
    assert len(shelf.status_lines()) == 4


def test_a_check_is_not_held_up_by_a_run(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', disks=BIG)), a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    pool.stop()
    pool.set_faults(SLOW)
    pool.start()
    with beginning(pool, shelf, 'vm-export=web', words=AGAIN) as process:
        assert eventually(is_exporting(shelf))
        assert check(shelf).status == 0 and not process.is_over()
        pool.release()
        assert process.ending().exit_status == 0


# --- pings --------------------------------------------------------------------------------------------------------------------

SECRET = 'c0ffee-5ecret'


class Listener:
    """Somebody who waits for pings, and answers as `manner` has it: (connection, the words of the request) -> None."""

    def __init__(self, manner: Callable[[socket.socket, List[str]], None]) -> None:
        self.manner, self.asked, self.is_over = manner, [], threading.Event()      # type: Any, List[str], threading.Event
        self.socket = socket.socket()
        self.socket.bind(('127.0.0.1', 0))
        self.socket.listen(50)
        self.url = 'http://127.0.0.1:%d/%s' % (self.socket.getsockname()[1], SECRET)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = b''
            while b'\r\n\r\n' not in head:
                piece = connection.recv(4096)
                if not piece:
                    return
                head += piece
            words = head.decode('latin-1').split('\r\n')[0].split()
            self.asked.append(words[1])
            self.manner(connection, words)

    def close(self) -> None:
        self.is_over.set()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def ends(self) -> List[str]:
        """What was asked for, without the secret."""
        return [path.partition(SECRET)[2] for path in self.asked]


def answer(connection: socket.socket, status: str, *headers: str) -> None:
    lines = ['HTTP/1.1 ' + status, 'Content-Length: 2', 'Connection: close'] + list(headers)
    connection.sendall(('\r\n'.join(lines) + '\r\n\r\nOK').encode('latin-1'))


def well(connection: socket.socket, _words: List[str]) -> None:
    answer(connection, '200 OK')


@pytest.fixture
def a_listener() -> Iterator[Callable[..., Listener]]:
    made: List[Listener] = []

    def build(manner: Callable[[socket.socket, List[str]], None] = well) -> Listener:
        made.append(Listener(manner))
        return made[-1]

    yield build
    for one in made:
        one.close()


def pinging(listener: Listener) -> List[str]:
    """The word that gives the URL, so that it stands in no file of the test's."""
    return ['ping_url=' + listener.url, 'force=yes']


@pytest.mark.parametrize('what, status, ends', [
    ('good', 0, ['/start', '']), ('warning', 3, ['/start', '']), ('vm', 1, ['/start', '/fail']),
    ('missing', 1, ['/start', '/fail']), ('login', 4, ['/fail']), ('store', 2, ['/fail'])])
def test_a_run_tells_how_it_begins_and_how_it_ends(a_pool: Any, a_shelf: Any, a_listener: Any, what: str, status: int,
                                                  ends: List[str]) -> None:
    pool = a_pool(vm('web'), vm('db'), faults=[at('api:VM.snapshot', object='web', fails=FULL)] if what == 'vm' else [])
    shelf, listener = a_shelf(), a_listener()
    more = {'warning': ['exclude=nobody'], 'missing': ['vm-export=nobody'], 'store': ['require_mount=yes']}
    lines = ['vm-export=*'] + more.get(what, [])
    run = backup(pool, shelf, *lines, words=pinging(listener), password='a wrong one' if what == 'login' else '-')
    assert run.exit_status == status and listener.ends() == ends, (run, listener.asked)
    assert run.never_says(SECRET) and shelf.holds_no_trace_of(SECRET)


def test_the_first_ping_comes_before_the_first_vm_and_the_last_when_all_is_done(a_pool: Any, a_shelf: Any,
                                                                                a_listener: Any) -> None:
    shelf = a_shelf()
    seen: List[Any] = []

    def manner(connection: socket.socket, _words: List[str]) -> None:
        seen.append(shelf.copies('web'))
        answer(connection, '204 No Content')

    listener = a_listener(manner)
    assert backup(a_pool(vm('web')), shelf, 'vm-export=*', words=pinging(listener)).exit_status == 0
    assert listener.ends() == ['/start', ''] and [len(copies) for copies in seen] == [0, 1]


def test_a_run_that_a_signal_ends_has_failed(a_pool: Any, a_shelf: Any, a_listener: Any) -> None:
    pool, shelf, listener = a_pool(vm('web', disks=BIG), faults=SLOW), a_shelf(), a_listener()
    with beginning(pool, shelf, 'vm-export=*', words=pinging(listener)) as process:
        assert eventually(is_exporting(shelf))
        process.signal(signal.SIGTERM)
        assert process.ending().exit_status == 128 + signal.SIGTERM
    assert listener.ends() == ['/start', '/fail']


def test_who_only_looks_pings_nobody(a_pool: Any, a_shelf: Any, a_listener: Any) -> None:
    pool, shelf, listener = a_pool(vm('web'), hosts=TWO_HOSTS), a_shelf(), a_listener()
    assert preview(pool, shelf, 'vm-export=*', 'ping_url=' + listener.url).exit_status == 0
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    for words in (['list'], ['verify'], ['prune'], ['check'], ['history'], ['status']):
        assert without_pool(shelf, *words, lines=['vm-export=*', 'ping_url=' + listener.url]).exit_status == 0
    run = backup(pool, shelf, 'vm-export=*', 'ping_url=' + listener.url, host=2)
    assert run.exit_status == 0 and run.says('left to it')
    assert preview(pool, shelf, 'vm-export=*', 'ping_url=' + listener.url, password='a wrong one').exit_status == 4
    assert listener.asked == []


def test_a_run_that_met_another_one_pings_nobody(a_pool: Any, a_shelf: Any, a_listener: Any) -> None:
    pool, shelf, listener = a_pool(vm('web', disks=BIG), faults=SLOW), a_shelf(), a_listener()
    with beginning(pool, shelf, 'vm-export=*', 'ping_url=' + listener.url) as process:
        assert eventually(is_exporting(shelf))
        assert backup(pool, shelf, 'vm-export=*', 'ping_url=' + listener.url).exit_status == 5
        assert listener.ends() == ['/start']
        pool.release()
        assert process.ending().exit_status == 0
    assert listener.ends() == ['/start', '']


def test_of_a_round_of_two_hosts_only_one_pings(a_pool: Any, a_shelf: Any, a_listener: Any) -> None:
    pool = a_pool(*[vm('vm%d' % number, disks=BIG) for number in range(4)], hosts=TWO_HOSTS, faults=SLOW)
    shelf, listener = a_shelf(), a_listener()
    config = shelf.config('vm-export=*', 'hosts=all', 'workers=2', 'ping_url=' + listener.url)
    processes = [Process(['-', config], pool.environment(host)) for host in (1, 2)]
    assert eventually(lambda: all('vm-export into' in process.output for process in processes)), processes[0].output
    pool.release()
    runs = [process.ending() for process in processes]
    assert [run.exit_status for run in runs] == [0, 0] and listener.ends() == ['/start', ''], (runs, listener.asked)


def refuses(connection: socket.socket, words: List[str]) -> None:
    answer(connection, '500 Internal Server Error')


def repeats_what_it_was_asked(connection: socket.socket, words: List[str]) -> None:
    answer(connection, '500 no such thing: ' + words[1])


def hangs_up(connection: socket.socket, words: List[str]) -> None:
    return


def says_nonsense(connection: socket.socket, words: List[str]) -> None:
    connection.sendall(b'220 mail.example.org ESMTP ' + words[1].encode() + b'\r\n')


def hangs(connection: socket.socket, words: List[str]) -> None:
    connection.settimeout(60)
    connection.recv(1)


def drips(connection: socket.socket, words: List[str]) -> None:
    for byte in b'HTTP/1.1 200 OK\r\nX-Slow: ' + b'x' * 1000:
        connection.sendall(bytes([byte]))
        time.sleep(0.1)


def leads_in_a_circle(connection: socket.socket, words: List[str]) -> None:
    answer(connection, '302 Found', 'Location: ' + words[1])


def leads_to_ever_new_places(connection: socket.socket, words: List[str]) -> None:
    answer(connection, '302 Found', 'Location: %s0' % words[1])


def leads_out_of_the_web(connection: socket.socket, words: List[str]) -> None:
    answer(connection, '302 Found', 'Location: file:///etc' + words[1])


def floods(connection: socket.socket, words: List[str]) -> None:
    connection.sendall(b'HTTP/1.1 200 OK\r\n' + b'X-Much: x\r\n' * 5000 + b'\r\n')


TROUBLES = [refuses, repeats_what_it_was_asked, hangs_up, says_nonsense, hangs, drips, leads_in_a_circle,
            leads_to_ever_new_places, leads_out_of_the_web, floods]


@pytest.mark.parametrize('manner', TROUBLES, ids=[manner.__name__ for manner in TROUBLES])
def test_a_ping_that_fails_is_a_warning_and_nothing_else(a_pool: Any, a_shelf: Any, a_listener: Any, manner: Any) -> None:
    pool, shelf, listener = a_pool(vm('web'), vm('db')), a_shelf(), a_listener(manner)
    run = run_in_trouble(pool, shelf, 'vm-export=*', words=pinging(listener), hasty=True)
    assert run.exit_status == 3 and run.stderr.count('warning: ping_url: ') == 2 and run.never_says('Traceback'), run
    assert len(run.stderr.splitlines()) == 2 and '127.0.0.1' in run.stderr and max(map(len, run.stderr.splitlines())) < 500, run
    assert shelf.has('web', complete=1) and shelf.has('db', complete=1) and 'WARNING' in run.stdout.splitlines()[-1]
    assert [one['error'] for one in last_round(shelf)['outcomes']] == [None, None]
    assert {'/start', ''} <= set(listener.ends())
    assert run.never_says(SECRET) and shelf.holds_no_trace_of(SECRET), run


@pytest.mark.parametrize('url', ['http://127.0.0.1:9/\xfc' + SECRET, 'http://root:%s@127.0.0.1:9/x' % SECRET, 'ftp://x/' + SECRET,
                                 'https://push.example.org/%s?status=up' % SECRET, 'http://x/#' + SECRET])
def test_a_url_that_can_not_be_asked_for_is_refused_and_not_told_as_it_may_hold_a_secret(a_pool: Any, a_shelf: Any,
                                                                                         url: str) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    run = backup(pool, shelf, 'vm-export=*', words=['ping_url=' + url])
    assert run.exit_status == 2 and run.says('ping_url') and run.never_says(SECRET) and shelf.is_unchanged(), run


@pytest.mark.parametrize('where', ['a closed port', 'no such host', 'a path that is no URL'])
def test_a_ping_that_reaches_nobody_is_a_warning_and_nothing_else(a_pool: Any, a_shelf: Any, a_listener: Any, where: str) -> None:
    pool, shelf, listener = a_pool(vm('web')), a_shelf(), a_listener()
    listener.close()
    url = {'a closed port': listener.url, 'no such host': 'http://no-such-host.invalid/' + SECRET,
           'a path that is no URL': 'http://[/' + SECRET}[where]
    run = run_in_trouble(pool, shelf, 'vm-export=*', words=['ping_url=' + url], hasty=True)
    assert run.exit_status == 3 and run.stderr.count('warning: ping_url: ') == 2 and run.never_says('Traceback'), run
    assert shelf.has('web', complete=1) and run.never_says(SECRET) and shelf.holds_no_trace_of(SECRET), run


def test_a_ping_that_is_answered_at_the_second_try_is_none_to_speak_of(a_pool: Any, a_shelf: Any, a_listener: Any) -> None:
    met: Dict[str, int] = {}

    def manner(connection: socket.socket, words: List[str]) -> None:
        met[words[1]] = met.get(words[1], 0) + 1
        answer(connection, '200 OK' if met[words[1]] == 2 else '503 Busy')

    listener = a_listener(manner)
    run = backup(a_pool(vm('web')), a_shelf(), 'vm-export=*', words=pinging(listener))
    assert run.exit_status == 0 and run.stderr == '' and listener.ends() == ['/start', '/start', '', '']


def test_a_ping_that_is_led_elsewhere_goes_there(a_pool: Any, a_shelf: Any, a_listener: Any) -> None:
    def manner(connection: socket.socket, words: List[str]) -> None:
        if words[1].startswith('/there'):
            well(connection, words)
        else:
            answer(connection, '302 Found', 'Location: /there' + words[1])

    listener = a_listener(manner)
    run = backup(a_pool(vm('web')), a_shelf(), 'vm-export=*', words=pinging(listener))
    assert run.exit_status == 0 and listener.ends() == ['/start', '/start', '', '']


def test_a_ping_goes_through_the_proxy_of_the_environment(a_pool: Any, a_shelf: Any, a_listener: Any) -> None:
    pool, proxy = a_pool(vm('web')), a_listener()
    environment = dict(pool.environment(), http_proxy=proxy.url.rpartition('/')[0])
    run = backup(pool, a_shelf(), 'vm-export=*', words=['ping_url=http://monitor.invalid/' + SECRET], environment=environment)
    assert run.exit_status == 0, run
    assert proxy.asked == ['http://monitor.invalid/%s/start' % SECRET, 'http://monitor.invalid/' + SECRET]
