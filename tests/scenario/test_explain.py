"""`explain`: why a VM is, or is not, backed up by this config, as preview, list, history and the next run have it."""

import json
import os
import re
from typing import Any, Dict, Iterator, List

import pytest

from support import warm
from support.deeds import backup, beginning, in_trouble, is_exporting, objects, preview, without_pool
from support.language import MEBIBYTE, at, described, disk, slowly, uuid_of, vm
from support.process import Pool, Run, ended, run_program
from support.shelf import Shelf, complete, damaged, old, path_of
from support.wire import eventually

FULL = ['SR_BACKEND_FAILURE_44', '', 'There is insufficient space', '']
HOSTILE = {'newline': 'first\nweb is backed up', 'escape': '\x9b2Jweb', 'quotes': 'B\u00fcro "1" \\', 'arrow': 'a\u202eb',
           'colon': 'a:b', 'line separator': 'a\u2028b', 'percent': '%s%(name)s{0}', 'long': 'x' * 255, 'blanks': ' two  blanks ',
           'regex': '/web/', 'star': 'a*b', 'tag': 'tag:web', 'emoji': '\U0001f4bb 1', 'equals': 'a=b'}
STAMPED = re.compile(r'^\d{4}-\d\d-\d\d-\(\d\d:\d\d:\d\d\) - ')


def explain(pool: Pool, shelf: Shelf, *lines: str, vm: str = 'web', **how: Any) -> Run:
    return backup(pool, shelf, *lines, words=['explain', 'vm=' + vm], **how)


def shown(run: Run) -> List[str]:
    """The lines of the explanation itself."""
    return [line for line in run.stdout.split('\n') if line and not STAMPED.match(line)]


def told(run: Run) -> str:
    """The explanation, wherever its lines end, with the config as weekend.cfg."""
    text = ' '.join(' '.join(shown(run)).split())
    return re.sub(r'[^\s(]*/weekend\.cfg', 'weekend.cfg', text)


def verdict(run: Run) -> str:
    """Its first sentence."""
    return told(run).split(' Why: ')[0]


def next_run(run: Run) -> str:
    """What it says of the next run."""
    return told(run).split(' The next run: ')[1].split(' Last: ')[0]


# --- which line selects, and why others do not ---------------------------------------------------------------------------

NAMES = ('PROD-web', 'PROD-db', 'prod-web', 'web 1', 'web:2', 'web.1', 'a*b', 'q"uote')


@pytest.fixture(scope='module')
def many() -> Iterator[Pool]:
    vms = [vm(name, disks=1, tags=['gold'] if name.startswith('PROD-') else []) for name in NAMES]
    pool = Pool(described(vms, {})).start()
    yield pool
    pool.remove()


SELECTED = [
    ('a name', ['vm-export=PROD-web'], 'PROD-web', 'vm-export, chosen by vm-export=PROD-web (weekend.cfg:4), 4 copies kept'),
    ('a quoted name', ['vm-export="web 1":2'], 'web 1',
     'vm-export, chosen by vm-export="web 1":2 (weekend.cfg:4), 2 copies kept'),
    ('a wildcard', ['vdi-export=PROD*'], 'PROD-db', 'vdi-export, chosen by vdi-export=PROD* (weekend.cfg:4), 4 copies kept'),
    ('a regex', ['vm-export=/web.1/:3'], 'web.1', 'vm-export, chosen by vm-export=/web.1/:3 (weekend.cfg:4), 3 copies kept'),
    ('an old regex', ['wildcards=regex', 'vm-export=PROD.*'], 'PROD-web', 'chosen by vm-export=PROD.* (weekend.cfg:5)'),
    ('a uuid', ['vm-export=uuid:' + uuid_of('PROD-db')], 'PROD-db', 'chosen by vm-export=uuid:' + uuid_of('PROD-db')),
    ('a tag', ['vm-export=tag:gold', 'keep_weekly=2'], 'PROD-web', '4 copies kept, and one of each of the last 2 weeks')]


@pytest.mark.parametrize('lines, name, said', [row[1:] for row in SELECTED], ids=[row[0] for row in SELECTED])
def test_the_first_sentence_tells_kind_line_and_copies(many: Pool, a_shelf: Any, lines: List[str], name: str, said: str) -> None:
    run = explain(many, a_shelf(), *lines, vm=name)
    assert run.exit_status == 0, run
    assert verdict(run).startswith('%s (%s) is backed up by this config: ' % (name, uuid_of(name)))
    assert said in verdict(run)


NOT_SELECTED = [
    ('an exclude', ['vm-export=PROD*', 'exclude=*-db'], 'PROD-db', 'exclude=*-db (weekend.cfg:5) leaves it out.',
     'vm-export=PROD* (weekend.cfg:4) would decide, were it not left out.'),
    ('another case', ['vm-export=web 1', 'vm-export=Prod-WEB'], 'prod-web', 'no line of weekend.cfg selects it.',
     'vm-export=Prod-WEB (weekend.cfg:5) does not select it: the VM\'s name differs in upper and lower case.'),
    ('blanks', ['vm-export=web1'], 'web 1', 'no line of weekend.cfg selects it.', 'differs in blanks'),
    ('a character', ['vm-export=PROD-wep'], 'PROD-web', 'no line of weekend.cfg selects it.', 'differs in 1 character'),
    ('a tag', ['vm-export=tag:silver'], 'PROD-web', 'no line of weekend.cfg selects it.', 'it has only the tag gold.'),
    ('a regex', ['vm-export=PROD.*'], 'PROD-web', 'no line of weekend.cfg selects it.', 'did you mean PROD*, or wildcards=regex'),
    ('a number', ['vm-export=web:2'], 'web:2', 'no line of weekend.cfg selects it.', 'write the name in quotes'),
    ('nothing near', ['vm-export="a*b"'], 'PROD-db', 'no line of weekend.cfg selects it.', 'No line comes near it.'),
    ('only the database', ['pool_db_backup=1'], 'PROD-db', 'no line of weekend.cfg selects it.', 'No line comes near it.')]


@pytest.mark.parametrize('lines, name, said, why', [row[1:] for row in NOT_SELECTED], ids=[row[0] for row in NOT_SELECTED])
def test_of_a_vm_that_is_not_selected_it_tells_why_and_what_comes_near(many: Pool, a_shelf: Any, lines: List[str], name: str,
                                                                       said: str, why: str) -> None:
    run = explain(many, a_shelf(), *lines, vm=name)
    assert run.exit_status == 0, run
    assert verdict(run).replace('"web:2"', 'web:2') == '%s (%s) is not backed up by this config: %s' % (name, uuid_of(name), said)
    assert why in told(run)
    assert ('To back it up' in told(run)) is ('exclude' not in said)


def test_a_line_that_selects_it_too_is_told_with_what_beats_it(many: Pool, a_shelf: Any) -> None:
    run = explain(many, a_shelf(), 'vm-export=PROD*', 'vm-export=PROD-web:7', 'vdi-export=tag:gold', vm='PROD-web')
    assert '7 copies kept' in verdict(run)
    assert 'vm-export=PROD-web:7 (weekend.cfg:5) decides. ' in told(run)
    assert 'vm-export=PROD* (weekend.cfg:4) selects it, too, but a name is more precise than a wildcard.' in told(run)
    assert 'vdi-export=tag:gold (weekend.cfg:6) selects it, too, but a name is more precise than a tag.' in told(run)


def test_a_line_that_was_meant_for_it_and_misses_it_is_told_beside_the_one_that_selects_it(many: Pool, a_shelf: Any) -> None:
    run = explain(many, a_shelf(), 'vm-export=PROD*', 'exclude=Prod-Web', 'vdi-export=PROD web', vm='PROD-web')
    assert 'vm-export, chosen by vm-export=PROD* (weekend.cfg:4)' in verdict(run)
    assert 'exclude=Prod-Web (weekend.cfg:5) does not select it: the VM\'s name differs in upper and lower case.' in told(run)
    assert 'vdi-export=PROD web (weekend.cfg:6) does not select it: the VM\'s name differs in characters that' in told(run)


def test_a_selector_in_the_place_of_a_config_is_explained_as_well(many: Pool, a_shelf: Any) -> None:
    shelf = a_shelf()
    words = ['explain', 'PROD-web', 'backup_dir=' + shelf.path]
    run = run_program('-', 'PROD*', *words, environment=many.environment())
    assert run.exit_status == 0 and 'chosen by vm-export=PROD* (command line)' in told(run)
    run = run_program('-', 'prod*', *words, environment=many.environment())
    assert run.exit_status == 0 and verdict(run).endswith('is not backed up by this command: nothing on the command line selects it.')
    text = told(run)
    assert 'To back it up, give as TARGET one of these lines: its name; or its uuid' in text and 'add to' not in text
    assert 'No round of vm-export=prod* that is on record had it.' in text
    line = [line.strip() for line in shown(run) if line.startswith('      vm-export=')][0]
    run = run_program('-', line, *words, environment=many.environment())
    assert run.exit_status == 0 and 'chosen by vm-export=PROD-web (command line)' in told(run)


def test_what_it_says_to_write_on_a_command_line_is_one_word_of_a_shell(many: Pool, a_shelf: Any) -> None:
    run = run_program('-', 'PROD*', 'explain', 'web 1', 'backup_dir=' + a_shelf().path, environment=many.environment())
    assert "      'vm-export=web 1'\n" in run.stdout


def test_a_vm_that_is_still_being_made_is_not_said_to_be_selected(a_pool: Any, a_shelf: Any) -> None:
    name = 'web (being restored) vmbackup-0123456789abcdef'
    run = explain(a_pool(vm(name), vm('web')), a_shelf(), 'vm-export=*', vm=name)
    assert run.exit_status == 0 and verdict(run).endswith('is not backed up by this config: it is still being made.')
    assert 'If none is, give it another name.' in told(run) and 'To back it up' not in told(run)


@pytest.mark.parametrize('name', HOSTILE.values(), ids=list(HOSTILE))
def test_the_line_that_it_says_to_add_is_enough_and_names_of_any_kind_stay_on_a_line(a_pool: Any, a_shelf: Any,
                                                                                     name: str) -> None:
    pool, shelf = a_pool(vm(name), vm('db')), a_shelf()
    run = explain(pool, shelf, 'vm-export=db', vm='uuid:' + uuid_of(name))
    assert run.exit_status == 0 and verdict(run).endswith('no line of weekend.cfg selects it.'), run
    lines = [line.strip() for line in shown(run) if line.startswith('      vm-export=')]
    assert lines[-1] == 'vm-export=uuid:' + uuid_of(name)
    assert all(line.isprintable() for line in run.output.split('\n'))
    for line in lines:
        again = explain(pool, shelf, 'vm-export=db', line, vm=name)
        assert again.exit_status == 0 and ' is backed up by this config' in verdict(again), again
        assert all(one.isprintable() for one in again.output.split('\n'))


# --- which VM is meant -----------------------------------------------------------------------------------------------

def test_a_vm_is_a_word_a_name_or_a_uuid_in_any_case(many: Pool, a_shelf: Any) -> None:
    shelf = a_shelf()
    runs = [backup(many, shelf, 'vm-export=*', words=['explain'] + words) for words in (
        ['PROD-web'], ['vm=PROD-web'], ['vm=uuid:' + uuid_of('PROD-web')], ['uuid:' + uuid_of('PROD-web').upper()])]
    assert len({told(run) for run in runs}) == 1 and runs[0].exit_status == 0
    run = backup(many, shelf, 'vm-export=*', words=['explain'])
    assert run.exit_status == 2 and run.says('explain which VM?')


def test_of_a_vm_that_nobody_knows_the_nearest_names_are_told(many: Pool, a_shelf: Any) -> None:
    run = explain(many, a_shelf(complete('Web-old')), 'vm-export=*', vm='web_old')
    assert run.exit_status == 2 and run.stdout.count('\n') <= 1
    assert run.says('knows a VM web_old. Did you mean Web-old or ') and run.says('? Upper and lower case count.')
    run = explain(many, a_shelf(), 'vm-export=*', vm='zzzzzz')
    assert run.exit_status == 2 and run.says('`preview` shows the VMs of the pool, `list` those in the store.')


def test_each_vm_of_the_name_is_explained(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('dup', uuid=uuid_of('one')), vm('dup', uuid=uuid_of('two')))
    run = explain(pool, a_shelf(), 'vm-export=uuid:' + uuid_of('two'), vm='dup')
    assert run.exit_status == 0
    assert 'dup (%s) is not backed up by this config' % uuid_of('one') in told(run)
    assert 'its name (so it selects 2 VMs of that name)' in told(run)
    assert 'dup (%s) is backed up by this config' % uuid_of('two') in told(run)
    run = explain(pool, a_shelf(), 'vm-export=dup', vm='dup')
    assert told(run).count('2 VMs bear this name') == 2


def test_a_snapshot_or_a_template_of_that_name_is_said_to_be_one(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', snapshots=[{'name_label': 'golden'}]))
    run = explain(pool, a_shelf(), 'vm-export=*', vm='golden')
    assert run.exit_status == 0 and 'is a snapshot of the pool: such is never backed up.' in told(run)


def test_a_vm_that_is_gone_from_the_pool_is_told_with_its_copies(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf(complete('lost', days_ago=4), complete('lost', days_ago=3))
    for word in ('lost', 'uuid:' + uuid_of('lost')):
        run = explain(pool, shelf, 'vm-export=lost', 'vm-export=web', vm=word)
        assert run.exit_status == 0, run
        assert verdict(run).startswith('lost (%s) is not backed up from here: it is not in the pool xcp1' % uuid_of('lost'))
        assert 'vm-export=lost (weekend.cfg:4) still names it' in told(run)
        assert '`restore vm=uuid:%s`' % uuid_of('lost') in told(run)
        assert 'Copies: 2, 2 good' in told(run) and shelf.newest('lost') in told(run)


def test_the_same_uuid_in_another_pool_is_told_apart_with_its_own_rounds_and_reference(a_pool: Any, a_shelf: Any) -> None:
    here, there = (a_pool(vm('web'), hosts=[{'name_label': name}]) for name in ('here', 'there'))
    shelf, lines = a_shelf(), ('vm-export=web', 'incremental=yes', 'keep_reference=yes')
    assert backup(there, shelf, *lines).exit_status == 0
    (pool_uuid,) = [row['uuid'] for row in there.dump()['pool'].values()]
    first, second = told(explain(here, shelf, *lines)).split(' web (%s) is not backed up' % uuid_of('web'))
    assert 'There is no good copy of it' in first and 'Copies' not in first and 'No round of weekend.cfg' in first
    assert 'is a VM of another pool (%s).' % pool_uuid in second and 'Copies: 1, 1 good' in second and '`restore' not in second
    assert 'No round of weekend.cfg' not in second and 'reference in the pool' in second
    assert 'no longer there' not in second and 'next run removes it' not in second


def test_a_vm_that_took_the_name_of_a_lost_one_is_told_apart_from_it(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', uuid=uuid_of('new'))), a_shelf(complete('web', days_ago=4))
    run = explain(pool, shelf, 'vm-export=web')
    first, second = '\n'.join(shown(run)).split('\nweb (%s)' % uuid_of('web'))
    assert 'web (%s) is backed up' % uuid_of('new') in first and 'no good copy of it' in ' '.join(first.split())
    assert 'into web--%s/' % uuid_of('new')[:8] in first
    assert 'any more' in second and 'Copies: 1, 1 good' in second


def test_a_vm_is_found_by_the_name_that_its_copies_know(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('new name', uuid=uuid_of('web'))), a_shelf(complete('web', days_ago=4))
    run = explain(pool, shelf, 'vm-export=web')
    assert run.exit_status == 0
    assert verdict(run).startswith('new name (%s) is not backed up by this config: no line' % uuid_of('web'))
    assert 'Copies: 1, 1 good' in told(run)


# --- disks -----------------------------------------------------------------------------------------------------------

def test_disks_that_are_left_out_are_told_with_the_line(a_pool: Any, a_shelf: Any) -> None:
    disks = [disk(name_label=name) for name in ('root', 'data', 'swap [NOBAK]')]
    pool, shelf = a_pool(vm('web', disks=disks)), a_shelf()
    text = told(explain(pool, shelf, 'vm-export=web', 'exclude-disk=w*/xvdb'))
    assert 'disk xvda root (4.0 MiB) goes into the copy' in text
    assert 'disk xvdb data (4.0 MiB) is left out by exclude-disk=w*/xvdb (weekend.cfg:5)' in text
    assert 'xvdb data (4.0 MiB) goes' not in text and 'its mark is heeded with exclude-disk=[NOBAK]' in text
    text = told(explain(pool, shelf, 'vdi-export=web'))
    assert 'disk xvdb data (4.0 MiB) does not: vdi-export holds Disk 0 alone' in text


@pytest.mark.parametrize('facts, lines, why', [
    ({'disks': 1}, ['vm-export=web', 'exclude-disk=web/*'], 'all its disks left out'),
    ({'disks': [disk(userdevice='1')]}, ['vdi-export=web'], 'no Disk 0')])
def test_what_will_fail_is_no_backup_and_the_run_fails_so(a_pool: Any, a_shelf: Any, facts: Dict[str, Any], lines: List[str],
                                                         why: str) -> None:
    pool, shelf = a_pool(vm('web', **facts)), a_shelf()
    run = explain(pool, shelf, *lines)
    assert ' is selected by this config, but will not be backed up: ' in verdict(run) and why in verdict(run)
    assert run.exit_status == 0 and '..' not in verdict(run)
    assert backup(pool, shelf, *lines).exit_status == 1


@pytest.mark.parametrize('words', [['incremental=no'], ['incremental=yes'], ['incremental=yes', 'keep_reference=yes']])
def test_of_a_vm_without_disks_it_says_that_its_settings_are_all_and_nothing_of_reading(some_nights: Any, words: List[str]) -> None:
    nights = some_nights('vm-export=web', disks=[])
    lines = ['vm-export=web'] + words
    for night in range(2):
        run = explain(nights.pool, nights.shelf, *lines)
        assert 'Disks: It has no disk: the copy holds its settings alone.' in told(run)
        for said in (next_run(run), preview(nights.pool, nights.shelf, *lines).output):
            assert 'will be read' not in said and 'the next full' not in said, said
        assert 'it will be a full, as ' in next_run(run)
        assert backup(nights.pool, nights.shelf, *lines).exit_status == 0
    assert 'Disks: It has no disk. The next run: it fails for that' in told(explain(nights.pool, nights.shelf, 'vdi-export=web'))


# --- what the next run does ------------------------------------------------------------------------------------------

def test_what_it_says_of_the_next_run_is_what_that_run_does(some_nights: Any) -> None:
    nights = some_nights('vm-export=web:2', 'keep_reference=yes', 'full_every=3')
    seen = set()
    for night in range(9):
        if night == 7:
            rotten(nights.shelf, nights.shelf.newest('web'))
        nights.write(night)
        said = next_run(explain(nights.pool, nights.shelf, *nights.lines))
        (words,) = re.findall(r'it will be (an increment on \S+: copy \d+ of \d+ of its chain|a full, as [^;:]*)', said)
        goes = re.findall(r'then it removes (backup-\S+):', said)
        before = set(nights.shelf.copies('web'))
        run = backup(nights.pool, nights.shelf, *nights.lines)
        assert words in run.output, (night, said, run.output)
        by_difference = 'what differs from the reference' in said and 'and then all' not in said
        assert by_difference is ('): read by difference' in run.output), (night, said, run.output)
        assert before - set(nights.shelf.copies('web')) == set(goes), (night, said, run.output)
        assert ('removes no copy of it' in said) is (not goes)
        seen |= {words.split(' ')[1], bool(goes)}
    assert seen == {'increment', 'full,', True, False}


def rotten(shelf: Shelf, copy: str) -> None:
    """The copy's list of blocks is not what was written, of which only who reads it knows."""
    path = path_of(shelf.at('web', copy, 'blocks'))
    with open(path, 'r+b') as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))


def test_without_increments_it_is_a_full(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf(complete('web', days_ago=2))
    assert backup(pool, shelf, 'vm-export=web:2').exit_status == 0
    said = next_run(explain(pool, shelf, 'vm-export=web:2'))
    assert 'it will be a full, as each copy is with incremental=no' in said and 'all of its disks will be read, 4.0 MiB' in said
    first, second = sorted(shelf.copies('web'))
    assert 'then it removes %s: 2 good copies are newer' % first in said and 'then it removes %s' % second not in said
    assert backup(pool, shelf, 'vm-export=web:2').exit_status == 0
    assert first not in shelf.copies('web') and second in shelf.copies('web')


def test_what_ends_a_run_before_its_first_vm_is_told(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web'), nights=2)
    run = explain(pool, shelf, 'vm-export=web', 'xe_path=/nobody/xe')
    assert run.exit_status == 0
    assert 'it ends before its first VM: ' in next_run(run) and '/nobody/xe is not a program' in next_run(run)


def test_when_a_full_does_not_fit_or_the_clock_went_back_it_says_so(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf(complete('web', days_ago=-2), complete('web', days_ago=3))
    text = told(explain(pool, shelf, 'vm-export=web:1'))
    assert 'Warning: the clock shows' in text and 'then it removes no copy of it' in text


# --- copies, rounds, other configs, references -------------------------------------------------------------------------

def test_what_holds_each_copy_is_what_list_says(a_pool: Any, a_shelf: Any) -> None:
    copies = [complete('web', days_ago=days) for days in range(2, 40, 5)]
    pool, shelf = a_pool(vm('web')), a_shelf(*copies, damaged('web', days_ago=1), old('web', days_ago=50))
    lines = ['vm-export=web:2', 'keep_monthly=2']
    assert backup(pool, shelf, 'vm-export=web:2', 'keep_monthly=2').exit_status == 0
    assert without_pool(shelf, 'pin', 'web', shelf.newest('web')[len('backup-'):], 'why', lines=lines).exit_status == 0
    (row,) = json.loads(without_pool(shelf, 'list', 'web', 'format=json', lines=lines).stdout)['vms']
    assert len(row['copies']) >= 4 and len({copy['reason'] for copy in row['copies']}) >= 4
    text = told(explain(pool, shelf, *lines))
    for copy in row['copies']:
        line = re.search(r'%s (.*?)(?= backup-\d{4}|$)' % re.escape(copy['name']), text.split('Copies: ')[1]).group(1)
        assert ' '.join(copy['fate'].split()) in line and ('NOT GOOD' in line) is (not copy['good']), (copy, line)


def test_the_rules_for_a_vm_that_a_tag_selects_are_known_here(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', tags=['gold'])), a_shelf(complete('web', days_ago=2))
    assert 'kept: newest 4' in told(explain(pool, shelf, 'vm-export=tag:gold'))


def test_the_last_failure_is_told_and_since_when_it_fails(a_pool: Any, a_shelf: Any) -> None:
    faults = [at('api:VM.snapshot', object='web', nth=number, fails=FULL) for number in range(2, 6)]
    pool, shelf = a_pool(vm('web'), vm('db'), faults=faults), a_shelf()
    for night in range(3):
        backup(pool, shelf, 'vm-export=*')
    text = told(explain(pool, shelf, 'vm-export=*'))
    assert 'The newest good copy is web/%s' % shelf.newest('web') in text
    assert 'NOT BACKED UP: the snapshot of web' in text and 'SR_BACKEND_FAILURE_44' in text
    assert re.search(r'It fails since \d{4}-\d\d-\d\d \d\d:\d\d: 2 rounds in a row\.', text)
    assert 'fails since' not in told(explain(pool, shelf, 'vm-export=*', vm='db'))
    text = told(explain(pool, shelf, 'vm-export=web', vm='db'))
    assert 'Warning: was backed up by this config, and now no config selects or excludes it' in text


def test_copies_and_plans_of_other_configs_are_told(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf(old('web', days_ago=9))
    other = shelf.config('vm-export=web').replace('weekend', 'daily')
    os.rename(shelf.config_path, other)
    assert run_program('-', other, environment=pool.environment()).exit_status == 0
    text = told(explain(pool, shelf, 'vm-export=db'))
    assert 'is not backed up by this config' in text and 'No round of weekend.cfg that is on record had it.' in text
    assert '%s backs it up, by its last plan, of ' % other in text
    assert '1 copy was made by %s.' % other in text and '1 copy was made by the older program.' in text


def test_the_reference_in_the_pool_is_told_and_what_becomes_of_it(some_nights: Any) -> None:
    nights = some_nights('vm-export=web', 'keep_reference=yes')
    copy = nights.night()
    (uuid,) = [record['uuid'] for record in nights.pool.dump()['VM'].values() if 'VmBackup reference' in record['name_label']]
    text = told(explain(nights.pool, nights.shelf, *nights.lines))
    assert 'References: reference in the pool: snapshot %s, the state of %s' % (uuid, copy) in text
    assert 'on a thick one up to 15 MiB' in text
    assert 'no longer there' not in text and 'the next run removes it' not in text
    lines = [line.replace('keep_reference=yes', 'keep_reference=no') for line in nights.lines]
    assert 'the next run removes it, as weekend.cfg keeps no reference' in told(explain(nights.pool, nights.shelf, *lines))
    assert 'removed, as' in backup(nights.pool, nights.shelf, *lines).output
    assert 'References:' not in told(explain(nights.pool, nights.shelf, *lines))


def reference_of(nights: Any) -> Dict[str, Any]:
    """What the ledger of its VM tells to be in the pool."""
    (row,) = json.loads(without_pool(nights.shelf, 'list', 'web', 'format=json', lines=nights.lines).stdout)['vms']
    (reference,) = row['references']
    return reference


@pytest.mark.parametrize('kind', ['vm-export', 'vdi-export'])
def test_of_a_reference_that_is_gone_neither_explain_nor_preview_promises_a_difference(some_nights: Any, kind: str) -> None:
    nights = some_nights(kind + '=web', 'keep_reference=yes')
    for night in range(2):
        nights.night()
    for disk in reference_of(nights)['disks'].values():
        assert nights.pool.xe('vdi-destroy', 'uuid=' + disk['uuid']).exit_status == 0
    why = "as the reference's disk xvda is gone"
    assert 'all of it will be read, %s then' % why in next_run(explain(nights.pool, nights.shelf, *nights.lines))
    text = preview(nights.pool, nights.shelf, *nights.lines).stdout
    assert 'all of it will be read, %s\n' % why in text and 'what differs' not in text
    nights.night()
    assert 'read whole, %s' % why in nights.run.output


@pytest.mark.parametrize('kind, label', [('vm-export', 'VM'), ('vdi-export', 'VDI')])
def test_a_reference_that_was_renamed_is_still_there(some_nights: Any, kind: str, label: str) -> None:
    nights = some_nights(kind + '=web', 'keep_reference=yes')
    nights.night()
    session, uuid = nights.pool.session().xenapi, reference_of(nights)['uuid']
    door = getattr(session, label)
    door.set_name_label(door.get_by_uuid(uuid), 'mine')
    text = told(explain(nights.pool, nights.shelf, *nights.lines))
    assert 'what differs from the reference of' in text and 'no longer there' not in text
    nights.night()
    assert 'read by difference' in nights.run.output


def test_a_disk_that_came_after_the_reference_is_foreseen_to_be_read_whole(some_nights: Any) -> None:
    nights = some_nights('vm-export=web', 'keep_reference=yes')
    nights.night()
    nights.add('xvdc', 4 * MEBIBYTE)
    why = 'as disk xvdc is not in the reference'
    assert 'all of it will be read, ' + why in next_run(explain(nights.pool, nights.shelf, *nights.lines))
    nights.night()
    assert 'read whole, ' + why in nights.run.output


def test_of_a_vm_and_a_reference_that_are_gone_it_says_that_the_next_run_forgets_it(some_nights: Any) -> None:
    nights = some_nights('vm-export=*', 'keep_reference=yes', beside=[vm('db')])
    nights.run = backup(nights.pool, nights.shelf, *nights.lines)
    uuid = reference_of(nights)['uuid']
    session = nights.pool.session().xenapi
    session.VM.destroy(session.VM.get_by_uuid(uuid_of('web')))
    text = told(explain(nights.pool, nights.shelf, *nights.lines))
    assert 'no longer there' not in text and 'the next run removes it, as weekend.cfg keeps no reference' in text
    assert nights.pool.xe('snapshot-uninstall', 'uuid=' + uuid, 'force=true').exit_status == 0
    text = told(explain(nights.pool, nights.shelf, *nights.lines))
    assert 'but it is no longer there' in text and 'removes it' not in text
    assert 'the next run forgets it, as weekend.cfg keeps no reference' in text
    backup(nights.pool, nights.shelf, *nights.lines)
    assert 'References:' not in told(explain(nights.pool, nights.shelf, *nights.lines))


# --- what it leaves alone --------------------------------------------------------------------------------------------

def test_nothing_is_changed_in_pool_or_store(some_nights: Any) -> None:
    nights = some_nights('vm-export=web', 'keep_reference=yes', beside=[vm('db')])
    nights.night()
    pool, shelf = nights.pool, nights.shelf
    before, tree = objects(pool), shelf.tree()
    for name in ('web', 'db', 'nobody'):
        explain(pool, shelf, *nights.lines, vm=name)
    assert shelf.tree() == tree and objects(pool) == before
    assert os.listdir(shelf.home).count('status.log') == 1


def test_it_works_while_a_round_is_running(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', disks=[disk(size=8 * MEBIBYTE, used=8)]), faults=[slowly()]), a_shelf()
    with beginning(pool, shelf, 'vm-export=web') as process:
        assert eventually(is_exporting(shelf))
        run = explain(pool, shelf, 'vm-export=web')
        assert run.exit_status == 0 and ' is backed up by this config' in verdict(run), run
        assert re.match(r'a run that xcp1 began at [\d-]+ [\d:]+ is going on: it is at this VM, and does what ', next_run(run)), run
        assert not process.is_over()
        pool.release()
        assert process.ending().exit_status == 0
    assert 'is going on' not in told(explain(pool, shelf, 'vm-export=web'))


def test_what_a_running_round_has_done_or_has_not_is_for_the_next_run(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*[vm(name, disks=[disk(size=8 * MEBIBYTE, used=8)]) for name in ('db', 'web', 'www')], vm('zoo'),
                  faults=[slowly(object='web'), at('api:VM.snapshot', object='db', fails=['VM_HAS_VUSBS'])])
    shelf, lines = a_shelf(), ['vm-export=w*', 'vm-export=db']
    with beginning(pool, shelf, *lines) as process:
        assert eventually(is_exporting(shelf))
        seen = {name: next_run(explain(pool, shelf, *lines, vm=name)).split('going on: ')[-1]
                for name in ('db', 'web', 'www')}
        seen['zoo'] = told(explain(pool, shelf, 'vm-export=*', vm='zoo'))
        process.kill()
    assert seen['db'].startswith('it could not back this VM up, and what follows is for the next run '), seen
    assert seen['web'].startswith('it is at this VM, and does what follows '), seen
    assert seen['www'].startswith('it has this VM still to come, and then does what follows '), seen
    assert 'is going on: it does not have this VM' in seen['zoo'], seen


def test_a_round_that_nobody_leads_any_more_is_not_said_to_go_on(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', disks=[disk(size=8 * MEBIBYTE, used=8)]), faults=[slowly()]), a_shelf()
    with beginning(pool, shelf, 'vm-export=web') as process:
        assert eventually(is_exporting(shelf))
        process.kill()
    assert 'is going on' not in told(explain(pool, shelf, 'vm-export=web'))


@pytest.mark.parametrize('hanging', ['the store', 'the copies'])
def test_of_a_store_that_hangs_it_tells_what_needs_no_store(a_pool: Any, a_shelf: Any, hanging: str) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    place = os.path.basename(shelf.path) if hanging == 'the store' else 'web'
    start = in_trouble(shelf, at=[place], do='hang', hurried=True)
    run = ended(warm.start(start + ['-', shelf.config('vm-export=web', 'stall_timeout=4'), 'explain', 'web'], pool.environment()))
    assert run.exit_status == 1 and ' is backed up by this config: vm-export, chosen by vm-export=web' in verdict(run), run
    assert 'The next run: what it does depends on the store' in told(run) and run.says('gave no answer for 4.0 min'), run


@pytest.mark.parametrize('name, said', [('web', 'is backed up by this config: vm-export, chosen by vm-export=web (weekend.cfg:4)'),
                                        ('db', 'is not backed up by this config: no line of weekend.cfg selects it.')])
def test_with_the_store_away_it_tells_what_needs_no_store_and_what_is_wrong_there(a_pool: Any, a_shelf: Any, name: str,
                                                                                 said: str) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf()
    os.rename(shelf.path, shelf.path + '.away')
    try:
        run, other = explain(pool, shelf, 'vm-export=web', vm=name), explain(pool, shelf, 'vm-export=web', vm='nobody')
    finally:
        os.rename(shelf.path + '.away', shelf.path)
    assert run.exit_status == other.exit_status == 2 and said in verdict(run) and 'Why: ' in told(run), run
    assert 'Last:' not in told(run) and 'good cop' not in told(run) and 'fails for that' not in told(run)
    assert ('The next run: what it does depends on the store' in told(run)) is (name == 'web')
    assert run.output.count('Is the share mounted?') == other.output.count('Is the share mounted?') == 1
    assert not shown(other)


def test_its_lines_end_at_column_80_where_names_let_them(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web'), nights=2)
    shelf.config('vm-export=web')
    run = run_program('-', shelf.config_path, 'explain', 'web', environment=pool.environment())
    assert run.exit_status == 0 and all(len(line) <= 80 for line in shown(run))


def test_warnings_of_the_config_count_as_in_a_preview(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web'))
    lines = ('vm-export=web', 'ignore_extra_keys=True', 'nonsense=1')
    assert explain(pool, shelf, *lines).exit_status == preview(pool, shelf, *lines).exit_status == 3
    assert explain(pool, shelf, 'vm-export=web', 'nonsense=1').exit_status == 2
