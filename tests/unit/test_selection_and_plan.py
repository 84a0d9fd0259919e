"""Which VM is backed up, how, and how many copies are kept; and why the others are not."""

import itertools
import re
import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import VmBackup
from support.values import a_disk, a_host, a_vm, an_inventory, configured, jobs_of, planned, problems_of, uuid_of, vms
from VmBackup import Method, Severity, disks_to_export, left_out_disks, make_plan


def chosen(text, *names):
    """The names of the VMs that a vm-export of that text selects."""
    return sorted(jobs_of(planned('vm-export=%s\n' % text, *vms(*names))))


def sentences(plan, severity):
    return ['%s: %s' % (finding.subject, finding.sentence) for finding in plan.findings if finding.severity is severity]


# --- forms -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('text, names', [
    ('web', ['web']), ('"web 2"', ['web 2']), ('web 2', ['web 2']), ('web*', ['web', 'web 2', 'web-db-1']),
    ('*-db-*', ['PRD-db-1', 'web-db-1']), ('*', ['PRD-db-1', 'WEB', 'web', 'web 2', 'web-db-1', 'a/b', 'x:y', '[x]', 'q"r']),
    ('[Ww]*b', ['web']), ('we?', ['web']), ('"*"', []), ('/web/', ['web']), ('/web.*/', ['web', 'web 2', 'web-db-1']),
    ('/(?i)web/', ['WEB', 'web']), ('/a/b/', ['a/b']), ('a/b', ['a/b']), ('"x:y"', ['x:y']), ('"q\\"r"', ['q"r']),
    ('[x]', ['[x]']), ('"[x]"', ['[x]']), ('uuid:' + uuid_of(1), ['PRD-db-1']), ('uuid:' + uuid_of(1).upper(), ['PRD-db-1']),
    ('tag:gold', ['web']), ('tag:silver: 1', ['web 2'])])
def test_a_selector_selects_what_it_says_and_no_more(text, names):
    machines = vms('PRD-db-1', 'WEB', 'web', 'web 2', 'web-db-1', 'a/b', 'x:y', '[x]', 'q"r')
    machines[2] = machines[2]._replace(tags=('gold', 'old'))
    machines[3] = machines[3]._replace(tags=('silver: 1',))
    assert sorted(jobs_of(planned('vm-export=%s\n' % text, *machines))) == sorted(names)


def test_case_counts():
    assert chosen('Web', 'web', 'WEB') == []


@pytest.mark.parametrize('text', ['web[z-a]', 'web[', 'web[]', 'web[!]', '[[a]*', '[a--b]', 'a[\\', '[^a]', '*[&&x]'])
def test_a_wildcard_with_odd_brackets_selects_or_is_refused_and_never_stops_the_run(text):
    if not problems_of('vm-export=%s\n' % text):
        assert text in chosen(text, 'web', text, 'x')


@given(st.text(min_size=1).filter(lambda text: text == text.strip() and not re.search('[\0\r\n]', text)))
def test_a_wildcard_also_selects_the_vm_that_bears_exactly_that_text(name):
    text = 'vm-export=%s\n' % name
    if not problems_of(text) and not name.startswith(('"', '/', 'uuid:', 'tag:')) and ':' not in name:
        assert name in jobs_of(planned(text, *vms(name)))


@pytest.mark.parametrize('text, keep', [('web', 4), ('web:1', 1), ('"web":12', 12), ('web*:3', 3), ('/w.*/:2', 2),
                                        ('uuid:%s:5' % uuid_of(1), 5), ('tag:gold:6', 6)])
def test_the_number_behind_a_selector_is_the_copies_to_keep(text, keep):
    plan = planned('vm-export=%s\n' % text, a_vm('web', tags=('gold',)))
    assert jobs_of(plan) == {'web': ('vm-export', keep)}


@pytest.mark.parametrize('text', [
    'web:', 'web:0', 'web:-1', 'web:x', 'web:2.5', 'web:2x', ':2', ':', 'a:b:0', '"web', '"web\\"', '""', '"web":0', '"web":x',
    '"web"2', '"web" x', '/web', '/', '/web/x', '/web/:0', '/(/', '/*/', 'uuid:', 'tag:', 'uuid:%s:0' % uuid_of(1), 'tag:gold:0'])
def test_a_selector_that_says_nothing_clear_is_refused(text):
    for key in ('vm-export', 'vdi-export', 'exclude'):
        (problem,) = problems_of('pool_db_backup=1\n%s=%s\n' % (key, text))
        assert problem.startswith('weekend.cfg:2: %s: ' % key)


def test_an_empty_selector_says_to_write_an_asterisk():
    (problem,) = problems_of('vm-export=\n')
    assert 'write *' in problem


@pytest.mark.parametrize('text', ['web:x', 'a:b', 'web:0'])
def test_a_colon_that_belongs_to_the_name_is_told_to_be_quoted(text):
    (problem,) = problems_of('vm-export=%s\n' % text)
    assert '"%s"' % text in problem


@pytest.mark.parametrize('key', ['vm-export', 'vdi-export', 'exclude'])
def test_a_number_that_may_belong_to_the_name_of_a_vm_is_an_error_that_says_to_quote_it(key):
    plan = planned('vm-export=db\n%s=web:2\n' % key, *vms('web', 'web:2', 'db'))
    assert len(sentences(plan, Severity.ERROR)) == 1 and 'quotes' in sentences(plan, Severity.ERROR)[0]
    assert [machine.name for machine, _ in plan.excluded] == []
    assert 'web' not in jobs_of(plan)


# --- wildcards=regex, as versions 3.1 to 3.25 read selectors ---------------------------------------------------------

@pytest.mark.parametrize('text, names', [
    ('web', ['web']), ('web-1', ['web-1']), ('web_1 x', ['web_1 x']), ('web.*', ['web', 'web-1', 'web-10', 'web_1 x', 'webx1']),
    ('web.1', ['web-1', 'web-10', 'web_1 x', 'webx1']), ('"web.1"', []), ('.*x1', ['webx1']), ('/web.1/', ['web-1', 'webx1'])])
def test_an_old_config_selects_what_it_did(text, names):
    plan = planned('wildcards=regex\nvm-export=%s\n' % text, *vms('web', 'web-1', 'web-10', 'webx1', 'web_1 x', 'my web'))
    assert sorted(jobs_of(plan)) == sorted(names)


def test_a_selector_that_matches_nothing_but_would_as_a_regex_says_so():
    (warning,) = sentences(planned('vm-export=PROD.*\n', *vms('PROD-1', 'PROD-2')), Severity.WARNING)
    assert 'PROD*' in warning and 'wildcards=regex' in warning and '2 VMs' in warning
    (error,) = sentences(planned('vm-export=web.1\n', *vms('web-1')), Severity.ERROR)
    assert 'wildcards=regex' in error


# --- a config of the older program's as it stands --------------------------------------------------------------------

def otherwise(text, *names):
    """What preview says that NAUbackup did otherwise with that config and these VMs."""
    settings, inventory = configured(text), an_inventory(*vms(*names))
    return VmBackup.older_differences(settings, inventory, make_plan(settings, inventory))


LOST, TAKEN = 'VM (then vm-export with 4 copies, now not backed up): ', 'VM (then not backed up, now vm-export with 4 copies): '


@pytest.mark.parametrize('text, names, told', [
    ('vm-export=PROD.*', ['PROD-1', 'x'], [(1, '1 ' + LOST + 'PROD-1 (00000001).', 'write PROD* in this line')]),
    ('vm-export=PROD.*:2', ['PROD-1'], [(1, 'then vm-export with 2 copies, now not', 'write PROD*:2 in this line')]),
    ('vm-export=web.1', ['web.1', 'web-10'], [(1, 'here it is a name. 1 ' + LOST + 'web-10 (', 'write /web.1.*/ in this line')]),
    ('vm-export=PROD*', ['PROD-1', 'PRO'], [(1, 'here it is a shell wildcard. 1 ' + LOST + 'PRO (', 'write /PROD*.*/ in')]),
    ('vm-export=a.*|b', ['a', 'b1'], [(1, '2 VMs (then vm-export', 'write /(a.*|b).*/ in')]),
    ('vm-export=w*\nexclude=web.*', ['web', 'w'], [(2, '1 ' + TAKEN + 'web (', 'write web* in')]),
    ('vdi-export=db.*\nvm-export=d*', ['db1'], [(1, '(then vdi-export with 4 copies, now vm-export with 4 copies): db1', '')]),
    ('vm-export=db.+:2\nvm-export=db*:3', ['db1'], []),
    ('vm-export=db*:3\nvm-export=db.+:2', ['db1'], [(2, '(then vm-export with 2 copies, now vm-export with 3 copies): db1', '')]),
    ('vm-export=a.*\nvm-export=b.*\nvm-export=x', ['a1', 'b1', 'x'], [(1, 'a1', 'write a*'), (2, 'b1', 'write b*')]),
    ('vm-export=n.*', ['n%d' % number for number in range(1, 8)], [(1, '7 VMs (', 'n5 (00000005) and 2 more.')])])
def test_a_line_that_is_not_what_it_was_is_told_with_its_vms_and_the_way_to_keep_it(text, names, told):
    found = otherwise(text + '\n', *names)
    assert [finding.subject.rpartition('weekend.cfg:')[2] for finding in found] == ['%d)' % line for line, _, _ in told]
    for finding, (_, vms_told, way) in zip(found, told):
        assert vms_told in finding.sentence and way in finding.sentence
        assert 'wildcards=regex' in finding.sentence and 'wildcards=shell' in finding.sentence


@pytest.mark.parametrize('text, names', [
    ('vm-export=PROD*', ['PROD-1', 'x']), ('vm-export=web', ['web', 'web1']), ('vm-export="web.1"', ['web.1', 'web-1']),
    ('wildcards=shell\nvm-export=PROD.*', ['PROD-1']), ('wildcards=regex\nvm-export=PROD.*', ['PROD-1']),
    ('lock_wait=9\nvm-export=PROD.*', ['PROD-1']), ('compress=zstd\nvm-export=PROD.*', ['PROD-1']),
    ('vm-export=tag:x\nvm-export=PROD.*', ['PROD-1']), ('vm-export=PROD.*\nexclude=*-db', ['PROD-1']),
    ('vm-export=*', ['web']), ('vm-export=[[a]*', ['a1']), ('vm-export=w.*\nexclude=we.*\nexclude=w*', ['web']),
    ('pool_db_backup=1', ['web'])])
def test_nothing_is_told_where_nothing_differs_or_the_config_is_none_of_the_older_program(text, names):
    assert otherwise(text + '\n', *names) == []


@pytest.mark.parametrize('text', ['vm-export=[[a]*', 'vm-export=[[b]?', 'vm-export=[[x]?'])
def test_a_wildcard_that_python_would_doubt_as_a_regex_makes_it_print_nothing(text):
    re.purge()
    with warnings.catch_warnings(record=True) as printed:
        warnings.simplefilter('always')
        otherwise(text + '\n', 'a1')
        planned('vm-export=a1\nexclude=b\n%s\n' % text.replace('vm-export', 'exclude'), *vms('a1'))
    assert printed == []


def test_nothing_is_told_of_selectors_on_the_command_line():
    settings, inventory = configured('max_backups=2\n', 'vm-export=w.*'), an_inventory(*vms('web'))
    assert VmBackup.older_differences(settings, inventory, make_plan(settings, inventory)) == []


@pytest.mark.parametrize('text, severity', [
    ('vm-export=PROD*', 'INFO'), ('vm-export=PROD*\nvm-export=x.*', 'WARNING'), ('vm-export=PROD*\nvm-export=x.', 'WARNING'),
    ('vm-export=PROD*\nvm-export=x1.', 'INFO')])
def test_it_is_a_warning_only_where_the_config_is_surely_written_in_regexes(text, severity):
    found = otherwise(text + '\n', 'PROD-1', 'PRO', 'x1')
    assert {finding.severity for finding in found} - {Severity.ERROR} == {Severity[severity]} and 'PRO (' in found[0].sentence


@pytest.mark.parametrize('text, severity', [('P.+:3', 'ERROR'), ('[P]R.:3', 'WARNING')])
def test_of_a_line_that_matches_nothing_now_the_notice_is_as_grave_as_that_and_names_the_copies_to_keep(text, severity):
    (found,), (problem,) = otherwise('vm-export=%s\n' % text, 'PROD-1'), planned('vm-export=%s\n' % text, *vms('PROD-1')).findings
    assert found.severity is problem.severity is Severity[severity] and found.subject == problem.subject
    assert 'that selects no VM' in found.sentence
    rewritten = '/%s.*/:3' % text[:-2]
    assert 'did you mean %s, or' % rewritten in problem.sentence and 'write %s in this line' % rewritten in found.sentence


@pytest.mark.parametrize('text, names, told', [
    ('vm-export=.*\nexclude=db.*', ['web', 'db1'], {1: '1 ' + LOST + 'web (', 2: '1 VM (then matched, now not matched): db1 ('}),
    ('vm-export=b.:9\nvdi-export=b.*', ['b.'],
     {1: '1 VM (then matched, now matched by its name, which is more precise): b. (',
      2: '1 VM (then vdi-export with 4 copies, now vm-export with 9 copies): b. ('})])
def test_lines_that_must_be_rewritten_together_are_told_so_each_with_its_vms(text, names, told):
    found = {int(finding.subject[:-1].rpartition(':')[2]): finding.sentence for finding in otherwise(text + '\n', *names)}
    assert sorted(found) == sorted(told)
    assert all(told[line] in found[line] and 'together with the other line' in found[line] for line in told)


def rewritten(text, *names):
    """The config with each line that preview tells of as it says to write it, to keep it as it was."""
    lines = text.splitlines()
    for finding in otherwise(text, *names):
        number = int(finding.subject[:-1].rpartition(':')[2]) - 1
        way = finding.sentence.partition(', or write ')[2].rpartition(' in this line')[0]
        lines[number] = '%s=%s' % (lines[number].partition('=')[0], way)
    return '\n'.join(lines) + '\n'


@pytest.mark.parametrize('text', ['(?i)WEB|db', '(?i)WEB', '(?i)(?s)w|DB.*', '(?i).*', '(?i)', '(d)\\1|w', '(?P<n>d)(?P=n)|w',
                                  'w|d:2'])
def test_a_line_as_it_is_to_be_written_is_a_good_one_that_selects_what_the_regex_did(text):
    names, text = ('web', 'db', 'dd', 'x', 'wd'), 'vm-export=%s\n' % text
    assert otherwise(text, *names)
    assert jobs_of(planned(rewritten(text, *names), *vms(*names))) == jobs_of(planned('wildcards=regex\n' + text, *vms(*names)))


OLD_SELECTORS = st.text('ab.*?|[]()+-:2 ', min_size=1, max_size=5).filter(
    lambda text: not re.search(r'\[.*(\[|--|\|\|)', text))           # there Python warns, unless its cache has it
OLD_LINES = st.lists(st.tuples(st.sampled_from(['vm-export', 'vdi-export', 'exclude']), OLD_SELECTORS), min_size=1, max_size=4)
OLD_NAMES = [''.join(letters) for number in (1, 2, 3) for letters in itertools.product('ab.-', repeat=number)]


@given(OLD_LINES)
def test_it_is_told_exactly_where_the_older_reading_decides_otherwise_about_a_vm(lines):
    text = ''.join('%s=%s\n' % line for line in lines)
    if problems_of(text) or problems_of('wildcards=regex\n' + text):
        return
    differs = jobs_of(planned(text, *vms(*OLD_NAMES))) != jobs_of(planned('wildcards=regex\n' + text, *vms(*OLD_NAMES)))
    assert bool(otherwise(text, *OLD_NAMES)) == differs


@given(OLD_LINES, st.lists(st.sampled_from(OLD_NAMES), min_size=1, max_size=9, unique=True))
@example([('vm-export', '.*'), ('exclude', 'b.*')], ['a', 'b', 'ba'])
@example([('vm-export', 'a.:3'), ('vm-export', 'a.:2'), ('vdi-export', 'a*')], ['a.'])
def test_all_lines_as_they_are_told_to_be_written_make_the_plan_of_the_older_reading(lines, names):
    text = ''.join('%s=%s\n' % line for line in lines)
    if problems_of(text) or problems_of('wildcards=regex\n' + text) or not otherwise(text, *names):
        return
    now, was = planned(rewritten(text, *names), *vms(*names)), planned('wildcards=regex\n' + text, *vms(*names))
    assert jobs_of(now) == jobs_of(was)
    assert [machine for machine, _ in now.excluded] == [machine for machine, _ in was.excluded]


@given(OLD_SELECTORS)
def test_the_line_that_is_proposed_selects_what_the_regex_did(text):
    pattern = text.strip()
    if ':' in pattern or problems_of('wildcards=regex\nvm-export=%s\n' % text):
        return
    was = planned('wildcards=regex\nvm-export=%s\n' % pattern, *vms(*OLD_NAMES))
    if not VmBackup.PLAIN_OLD_NAME.fullmatch(pattern):
        (selector,) = configured('wildcards=regex\nvm-export=%s\n' % pattern).vm_export
        assert chosen(VmBackup._as_written_now(selector), *OLD_NAMES) == sorted(jobs_of(was))


def test_what_else_the_older_program_did_otherwise_is_a_note_where_it_matters():
    found = otherwise('compress=True\npre_clean=True\nvdi-export=db:1\nvm-export=web\n', 'db', 'web')
    assert [finding.subject for finding in found] == ['weekend.cfg:1', 'weekend.cfg:2']
    assert all('(1 VM)' in finding.sentence and finding.severity is Severity.INFO for finding in found)
    assert otherwise('compress=True\npre_clean=True\nvm-export=web\n', 'web') == []


@pytest.mark.parametrize('line', ['vm-export=nobody*', 'vm-export=nobody', 'exclude=nobody', 'exclude-disk=nobody/xvda'])
def test_a_line_that_does_nothing_is_told_with_what_to_do_about_it(line):
    plan = planned('vm-export=web\n%s\n' % line, *vms('web'))
    (finding,) = plan.findings
    assert finding.sentence.lower().rstrip('.').split('correct the line, or remove it')[-1] in ('', ' if the vm is gone for good')


@pytest.mark.parametrize('code', sorted(VmBackup.FAILURE_ADVICE))
def test_the_advice_on_each_failure_of_the_pool_names_the_next_step(code):
    assert re.search('run again|next run|exclude|look in|delete|eject|correct', VmBackup.FAILURE_ADVICE[code], re.IGNORECASE)


# --- which selector decides --------------------------------------------------------------------------------------------

LINES = {'uuid': 'uuid:' + uuid_of(1), 'name': 'web', 'quoted': '"web"', 'wildcard': 'w*', 'regex': '/w.*/', 'tag': 'tag:gold'}
PRECISION = {'uuid': 3, 'name': 2, 'quoted': 2, 'wildcard': 1, 'regex': 1, 'tag': 1}


@pytest.mark.parametrize('one, other', list(itertools.permutations(LINES, 2)))
@pytest.mark.parametrize('kinds', [('vm', 'vm'), ('vm', 'vdi'), ('vdi', 'vm'), ('vdi', 'vdi')])
def test_the_most_precise_wins_then_vdi_then_the_later_line(one, other, kinds):
    text = '%s-export=%s:1\n%s-export=%s:2\n' % (kinds[0], LINES[one], kinds[1], LINES[other])
    if PRECISION[one] != PRECISION[other]:
        winner = 0 if PRECISION[one] > PRECISION[other] else 1
    elif kinds[0] != kinds[1]:
        winner = kinds.index('vdi')
    else:
        winner = 1
    plan = planned(text, a_vm('web', tags=('gold',)))
    assert jobs_of(plan) == {'web': (kinds[winner] + '-export', winner + 1)}
    assert 'weekend.cfg:%d' % (winner + 1) in plan.jobs[0].chosen_by


@pytest.mark.parametrize('text', sorted(LINES.values()))
@pytest.mark.parametrize('place', [0, 1, 2])
def test_an_exclude_wins_wherever_it_stands(text, place):
    lines = ['vm-export=uuid:' + uuid_of(1), 'vdi-export="web"']
    lines.insert(place, 'exclude=' + text)
    plan = planned('\n'.join(lines), a_vm('web', tags=('gold',)))
    assert plan.jobs == ()
    ((machine, line),) = plan.excluded
    assert machine.name == 'web' and 'weekend.cfg:%d' % (place + 1) in line


# --- what is not there -------------------------------------------------------------------------------------------------

def test_a_literal_that_matches_nothing_is_an_error_and_the_others_still_run():
    plan = planned('vm-export=web\nvm-export=gone\nvdi-export=uuid:%s\n' % uuid_of(9), *vms('web'))
    assert jobs_of(plan) == {'web': ('vm-export', 4)}
    assert len(sentences(plan, Severity.ERROR)) == len(plan.missing) == 2
    assert [text for _, text in plan.missing] == ['gone', uuid_of(9)]


@pytest.mark.parametrize('text', ['x*', '/x/', 'tag:none'])
def test_what_stands_for_many_and_matches_none_is_a_warning(text):
    plan = planned('vm-export=%s\nvm-export=web\n' % text, *vms('web'))
    assert len(sentences(plan, Severity.WARNING)) == 1 and not sentences(plan, Severity.ERROR)


def test_vms_of_one_name_are_all_backed_up_with_a_warning():
    plan = planned('vm-export=web\n', a_vm('web', 1), a_vm('web', 2), a_vm('db', 3))
    assert [job.machine.uuid for job in plan.jobs] == [uuid_of(1), uuid_of(2)]
    (warning,) = sentences(plan, Severity.WARNING)
    assert uuid_of(1) in warning and uuid_of(2) in warning


def test_one_name_twice_is_no_matter_where_it_is_not_backed_up():
    assert planned('vm-export=db\n', a_vm('web', 1), a_vm('web', 2), a_vm('db', 3)).findings == ()


@pytest.mark.parametrize('version, is_error', [((6, 2, 0), True), ((6, 5, 0), False), ((8, 3, 0), False), ((10, 0), False)])
def test_vdi_export_on_a_server_that_has_none_is_an_error_of_that_entry(version, is_error):
    plan = planned('vdi-export=web\nvm-export=db\n', *vms('web', 'db'), host=a_host(product_version=version))
    assert bool(sentences(plan, Severity.ERROR)) is is_error
    assert ('web' in jobs_of(plan)) is not is_error and 'db' in jobs_of(plan)


# --- what a restore or drill is still making ------------------------------------------------------------------------------

TOKEN = '0123456789abcdef'
PROVISIONAL = [pattern % ('web', TOKEN) + part for pattern in (VmBackup.NEW_VM_NAME, VmBackup.DRILL_VM_NAME) for part in ('', ' part 2')]


@pytest.mark.parametrize('name', PROVISIONAL + ['web\nsite (being restored) vmbackup-' + TOKEN])
@pytest.mark.parametrize('text', ['*', '*web*', '/(?s).*/', 'tag:gold'])
def test_what_stands_for_many_leaves_out_a_vm_that_is_still_being_made(text, name):
    plan = planned('vm-export=%s\n' % text, a_vm('web', 1, tags=('gold',)), a_vm(name, 2, tags=('gold',)))
    assert list(jobs_of(plan)) == ['web'] and [machine.name for machine in plan.provisional] == [name]
    assert plan.findings == () and plan.unselected == ()


def test_a_uuid_that_a_restore_keeps_is_an_error_while_the_vm_is_being_made():
    plan = planned('vm-export=web\nvm-export=uuid:%s\n' % uuid_of(2), a_vm('web', 1), a_vm(PROVISIONAL[0], 2))
    (error,) = sentences(plan, Severity.ERROR)
    assert 'a restore or drill is still making' in error and list(jobs_of(plan)) == ['web'] and len(plan.missing) == 1


def test_a_wildcard_that_matches_nothing_else_says_why():
    (warning,) = sentences(planned('vm-export=w*\nvm-export=db\n', a_vm(PROVISIONAL[0], 1), a_vm('db', 2)), Severity.WARNING)
    assert 'a restore or drill is still making' in warning


def test_a_vm_that_is_named_in_full_is_meant():
    assert list(jobs_of(planned('vm-export="%s"\n' % PROVISIONAL[0], a_vm(PROVISIONAL[0])))) == [PROVISIONAL[0]]


def test_a_vm_that_no_line_selects_is_told_as_any_other():
    plan = planned('vm-export=db\n', a_vm('db', 1), a_vm(PROVISIONAL[0], 2))
    assert plan.provisional == () and [machine.name for machine in plan.unselected] == [PROVISIONAL[0]]


@pytest.mark.parametrize('name', ['web (being restored)', 'web (being restored) vmbackup-', 'web (being restored) vmbackup-' + TOKEN[1:],
                                  'web (being restored) vmbackup-%sx' % TOKEN, 'VmBackup drill of web', 'web vmbackup-' + TOKEN,
                                  'web (restored 2026-01-01)', 'web (DAMAGED)', 'web (being restored) vmbackup-' + TOKEN.upper()])
def test_a_name_that_merely_looks_alike_is_selected(name):
    assert chosen('*', name) == [name]


# --- for any pool and config -------------------------------------------------------------------------------------------

SELECTORS = st.one_of(
    st.sampled_from(['*', 'a*', '?', '[ab]*', '/a.*/', '/.*b/', 'tag:t', 'tag:u', 'none', 'z*']), st.sampled_from('ab c'.split()),
    st.sampled_from(['"a"', '"a b"', '"*"']), st.integers(1, 9).map(lambda number: 'uuid:' + uuid_of(number)))
LINE = st.tuples(st.sampled_from(['vm-export', 'vdi-export', 'exclude']), SELECTORS, st.sampled_from(['', ':1', ':2', ':7'])).map(
    lambda parts: '%s=%s%s' % (parts[0], parts[1], parts[2] if parts[0] != 'exclude' else ''))
POOLS = st.lists(st.tuples(st.sampled_from(['a', 'b', 'c', 'ab', 'a b', '*', 'ba', PROVISIONAL[0]]), st.sampled_from([(), ('t',), ('t', 'u')])),
                 max_size=9).map(lambda rows: tuple(a_vm(name, number, tags=tags) for number, (name, tags) in enumerate(rows, 1)))


def plan_of(lines, machines):
    return make_plan(configured('\n'.join(lines)), an_inventory(*machines))


@given(st.lists(LINE, max_size=6), POOLS)
def test_every_vm_is_in_exactly_one_of_jobs_excluded_provisional_and_unselected(lines, machines):
    plan = plan_of(lines, machines)
    named = ([job.machine.uuid for job in plan.jobs] + [machine.uuid for machine, _ in plan.excluded]
             + [machine.uuid for machine in plan.provisional + plan.unselected])
    assert sorted(named) == [machine.uuid for machine in machines]


@given(st.lists(LINE, max_size=6).flatmap(lambda lines: st.tuples(st.just(lines), st.permutations(lines))), POOLS)
def test_the_order_of_lines_changes_nothing_but_which_of_equals_decides(both, machines):
    # Two selectors of one kind and precision with one :N are one another's equal, so :N is left out of what is compared.
    before, after = plan_of(both[0], machines), plan_of(both[1], machines)
    assert [(job.machine.uuid, job.method) for job in before.jobs] == [(job.machine.uuid, job.method) for job in after.jobs]
    assert [machine for machine, _ in before.excluded] == [machine for machine, _ in after.excluded]
    assert before.unselected == after.unselected
    assert sorted(text for _, text in before.missing) == sorted(text for _, text in after.missing)


@given(st.lists(LINE, max_size=6), POOLS)
def test_every_decision_names_a_line_of_the_config_that_says_so(lines, machines):
    plan = plan_of(lines, machines)
    for text in [job.chosen_by for job in plan.jobs] + [line for _, line in plan.excluded]:
        number = int(re.search(r'weekend\.cfg:([0-9]+)', text).group(1))
        assert text.startswith(lines[number - 1])


@given(st.lists(LINE, max_size=6), POOLS)
def test_every_job_keeps_at_least_one_copy(lines, machines):
    assert all(job.rules.newest >= 1 for job in plan_of(lines, machines).jobs)


def test_a_disk_that_hangs_on_two_drives_of_a_vm_is_left_out_only_if_both_are_named():
    root, data = a_disk('0'), a_disk('1')._replace(vdi_ref='OpaqueRef:data')
    twice = data._replace(userdevice='5', device='xvdf', vbd_uuid='another')
    machine = a_vm('web', 1, disks=(root, data, twice))
    excludes = configured('vm-export=web\nexclude-disk=web/xvdf\n').exclude_disk
    assert left_out_disks(machine, excludes) == {} and disks_to_export(machine, Method.VM, excludes) == machine.disks
    (finding,) = planned('vm-export=web\nexclude-disk=web/xvdf\n', machine).findings
    assert finding.severity is Severity.WARNING and 'leaves out no disk' in finding.sentence
    excludes = configured('vm-export=web\nexclude-disk=web/xvd[bf]\n').exclude_disk
    assert set(left_out_disks(machine, excludes)) == {data, twice}
