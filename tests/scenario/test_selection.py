"""Which VMs a config selects, by which method, and what preview says about it."""

from typing import Any, Iterator, List, Sequence

import pytest

from support.deeds import backup, objects, preview
from support.language import described, disk, uuid_of, vm
from support.process import Pool, run_program
from support.shelf import complete, foreign, unfinished

NAMES = ('PROD-web', 'PROD-db', 'PRODtest', 'prod-web', 'my-db-1', 'my-db-2', 'web 1', 'web:2', 'web.1', 'web-10', 'a*b', 'axb',
         'q"uote', 'x', '[x]')


def chosen(output: str, names: Sequence[str]) -> List[str]:
    """The VMs that a preview lists as to be backed up, in their order in `names`."""
    body = output.split(' to back up:\n', 1)[1].split('  In all:', 1)[0]
    lines = [line for line in body.splitlines() if line.startswith('  ') and not line.startswith('   ')]
    return [name for name in names if any(uuid_of(name)[:8] in line for line in lines)]


@pytest.fixture(scope='module')
def many() -> Iterator[Pool]:
    vms = [vm(name, disks=0, tags=['gold'] if name.startswith('PROD-') else []) for name in NAMES]
    pool = Pool(described(vms, {})).start()
    yield pool
    pool.remove()


SELECTIONS = [
    ('a name', ['vm-export=PROD-web'], ['PROD-web'], 0),
    ('a name with a space', ['vm-export=web 1'], ['web 1'], 0),
    ('a quoted name', ['vm-export="web 1":2'], ['web 1'], 0),
    ('a quote in a quoted name', ['vm-export="q\\"uote"'], ['q"uote'], 0),
    ('a star at the end', ['vm-export=PROD*'], ['PROD-web', 'PROD-db', 'PRODtest'], 0),
    ('stars around', ['vm-export=*-db-*'], ['my-db-1', 'my-db-2'], 0),
    ('a question mark', ['vm-export=my-db-?'], ['my-db-1', 'my-db-2'], 0),
    ('a set of letters', ['vm-export=[Pp][Rr][Oo][Dd]-web'], ['PROD-web', 'prod-web'], 0),
    ('a wildcard that is a name too', ['vm-export=a*b'], ['a*b', 'axb'], 0),
    ('a wildcard in quotes', ['vm-export="a*b"'], ['a*b'], 0),
    ('brackets that are a name too', ['vm-export=[x]'], ['x', '[x]'], 0),
    ('a regex', ['vm-export=/web.1/'], ['web 1', 'web.1'], 0),
    ('a regex with a number', ['vm-export=/(PROD|prod)-web/:2'], ['PROD-web', 'prod-web'], 0),
    ('a uuid', ['vm-export=uuid:' + uuid_of('x').upper() + ':1'], ['x'], 0),
    ('a tag', ['vm-export=tag:gold:2'], ['PROD-web', 'PROD-db'], 0),
    ('an old regex', ['wildcards=regex', 'vm-export=web.1'], ['web 1', 'web.1', 'web-10'], 0),
    ('a plain old name', ['wildcards=regex', 'vm-export=web 1'], ['web 1'], 0),
    ('an exclude before', ['exclude=PROD-db', 'vm-export=PROD*'], ['PROD-web', 'PRODtest'], 0),
    ('an exclude behind', ['vm-export=PROD*', 'exclude=PROD-db'], ['PROD-web', 'PRODtest'], 0),
    ('an exclude of a tag', ['vm-export=PROD*', 'exclude=tag:gold'], ['PRODtest'], 0),
    ('an exclude that is a wildcard against a name', ['vm-export=PROD-web', 'vm-export=x', 'exclude=PROD*'], ['x'], 0),
    ('two selectors for one VM', ['vm-export=x', 'vm-export=*x*'], ['axb', 'x', '[x]'], 0),
    ('a name that is not there', ['vm-export=x', 'vm-export=nobody'], ['x'], 1),
    ('a uuid that is not there', ['vm-export=x', 'vm-export=uuid:' + uuid_of('nobody')], ['x'], 1),
    ('a wildcard that matches nothing', ['vm-export=x', 'vm-export=nobody*'], ['x'], 3),
    ('a tag that nobody bears', ['vm-export=x', 'vm-export=tag:silver'], ['x'], 3),
    ('a name with a number that is a name as well', ['vm-export=x', 'vm-export=web:2'], ['x'], 1),
    ('a colon in quotes', ['vm-export="web:2"'], ['web:2'], 0),
    ('a name in another case', ['vm-export=x', 'vm-export=prod-WEB'], ['x'], 1),
]


@pytest.mark.parametrize('what, lines, expected, status', SELECTIONS, ids=[case[0] for case in SELECTIONS])
def test_selectors_choose(many: Any, a_shelf: Any, what: str, lines: Sequence[str], expected: Sequence[str],
                          status: int) -> None:
    run = preview(many, a_shelf(), *lines)
    assert run.exit_status == status, run
    assert chosen(run.stdout, NAMES) == list(expected)


@pytest.mark.parametrize('line', ['vm-export=/[[a-z]+.*/', 'wildcards=regex\nvm-export=[[a-z]+'])
def test_a_regex_that_python_has_doubts_about_is_taken_without_a_word_of_python(many: Any, a_shelf: Any, line: str) -> None:
    pool, shelf = many, a_shelf()
    run = preview(pool, shelf, *line.split('\n'))
    assert run.exit_status in (0, 3) and 'Warning: Possible' not in run.output and 'Traceback' not in run.output, run


def test_a_selector_that_would_match_as_a_regex_says_so(many: Any, a_shelf: Any) -> None:
    run = preview(many, a_shelf(), 'vm-export=PROD.*', 'lock_wait=9')
    assert run.exit_status == 3
    assert run.says('did you mean PROD*') and run.says('wildcards=regex')


def test_the_most_precise_line_decides_kind_and_number_and_preview_names_it(many: Any, a_shelf: Any) -> None:
    run = preview(many, a_shelf(), 'max_backups=9', 'vm-export=*:5', 'vdi-export=PROD*', 'vm-export=PROD-web:2',
                  'vdi-export=uuid:%s:1' % uuid_of('PRODtest'), 'vm-export="PRODtest":3')
    lines = {name: line for line in run.stdout.splitlines() for name in NAMES if uuid_of(name)[:8] in line}
    assert 'vm-export, 2 copies kept' in lines['PROD-web'] and 'weekend.cfg:7' in lines['PROD-web']
    assert 'vdi-export, 9 copies kept' in lines['PROD-db'] and 'weekend.cfg:6' in lines['PROD-db']
    assert 'vdi-export, 1 copy kept' in lines['PRODtest'] and 'weekend.cfg:8' in lines['PRODtest']
    assert 'vm-export, 5 copies kept' in lines['x'] and 'weekend.cfg:5' in lines['x']


def test_preview_names_the_excluded_the_forgotten_and_why(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=10 << 30)]), vm('db'), vm('test'), vm('zeta'))
    run = preview(pool, a_shelf(complete('web')), 'vm-export=[wdt]*', 'exclude=test')
    assert run.exit_status == 0
    excluded = run.stdout.split('left out by exclude', 1)[1]
    assert 'test' in excluded.splitlines()[1] and 'exclude=test' in excluded and 'weekend.cfg:5' in excluded
    assert 'zeta' in run.stdout.split('in no backup', 1)[1]
    assert '10 GiB' in run.stdout and '1 good copy' in run.stdout


def test_preview_changes_nothing_in_the_pool_or_on_disk(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', power_state='Running', snapshots=1), vm('db'))
    shelf = a_shelf(complete('web', days_ago=2), unfinished('web', days_ago=1), foreign('notes.txt'), foreign('empty/'))
    before = objects(pool)
    run = preview(pool, shelf, 'vm-export=*', 'pool_db_backup=1', 'pre_clean=yes', 'max_backups=1')
    assert run.exit_status == 0 and run.stderr == ''
    assert objects(pool) == before and shelf.is_unchanged() and shelf.status_lines() == []
    assert pool.never_saw('xe:*') and pool.never_saw('http:*')
    assert [entry['call'] for entry in pool.calls('api:*') if '.get' not in entry['call']] == [
        'session.login_with_password', 'session.logout']


def test_templates_snapshots_and_control_domains_are_never_selected(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', snapshots=2), vm('a template', is_a_template=True),
                  templates=[{'name_label': 'CentOS 7', 'default': True}])
    run = preview(pool, a_shelf(), 'vm-export=*')
    assert run.exit_status == 0 and run.says('1 VM to back up:') and run.never_says('Control domain')
    run = backup(pool, a_shelf(), 'vm-export=web snapshot 0')
    assert run.exit_status == 1 and pool.never_saw('api:VM.snapshot')


def test_an_entry_that_matches_nothing_is_exit_1_and_the_others_are_backed_up(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', 'vm-export=the VM that I count on')
    assert run.exit_status == 1 and 'the VM that I count on' in run.stderr and 'weekend.cfg:5' in run.stderr
    assert shelf.has('web', complete=1)
    assert 'the VM that I count on' in run.stdout.splitlines()[-1]


# --- Nothing to do ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('lines', [['vm-export=*', 'exclude=*'], ['vm-export=web', 'exclude=w*'], ['vdi-export=w*', 'exclude="web"']])
def test_where_exclude_leaves_out_all_that_is_selected_it_is_a_warning(a_pool: Any, a_shelf: Any, lines: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    for words in ([], ['preview']):
        run = backup(pool, shelf, *lines, words=words)
        assert run.exit_status == 3 and run.says('backs up no VM') and shelf.names() == []
    assert backup(pool, shelf, 'pool_db_backup=1', 'exclude=web').exit_status == 0, 'no VM was asked for'


def test_where_no_wildcard_selects_anything_it_is_a_warning(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    for words in ([], ['preview']):
        run = backup(pool, shelf, 'vm-export=d*', 'vdi-export=tag:gold', words=words)
        assert run.exit_status == 3 and run.says('matches no VM') and not run.says('backs up no VM')


# --- The command line as a config ------------------------------------------------------------------------------------

@pytest.mark.parametrize('target, kind', [('web', 'vm-export'), ('vm-export=web', 'vm-export'), ('w*', 'vm-export'),
                                          ('vdi-export=web:2', 'vdi-export'), ('vm-export=/w.b/', 'vm-export')])
def test_a_selector_in_the_place_of_a_config(a_pool: Any, a_shelf: Any, target: str, kind: str) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf()
    run = run_program('-', target, 'backup_dir=' + shelf.path, 'status_log=' + shelf.status_log,
                      environment=pool.environment())
    assert run.exit_status == 0 and shelf.names() == ['web'] and shelf.kind('web', shelf.newest('web')) == kind


def test_words_on_the_command_line_win_over_the_file(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web'), vm('db'))
    shelf = a_shelf(*[complete('db', days_ago=day) for day in (1, 2, 3)])
    run = backup(pool, shelf, 'vm-export=web', 'max_backups=9', 'compress=gzip',
                 words=['vm-export=db', 'max_backups=2', 'compress=none'])
    assert run.exit_status == 0 and shelf.names() == ['db'] and shelf.has('db', complete=2)
    assert shelf.image('db', shelf.newest('db')) == 'db.xva'


def test_a_config_may_have_windows_line_ends_a_mark_spaces_and_comments(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('Büro')), a_shelf()
    text = '\ufeff# comment\r\n\r\n  max_backups =  2 \r\nvm-export= Büro \r\nbackup_dir=%s\r\nstatus_log=%s\r\n' % (
        shelf.path, shelf.status_log)
    with open(shelf.config_path, 'wb') as file:
        file.write(text.encode('utf-8'))
    run = run_program('-', shelf.config_path, environment=pool.environment())
    assert run.exit_status == 0, run
    assert shelf.manifest(shelf.names()[0], shelf.newest(shelf.names()[0]))['copies_to_keep'] == 2
