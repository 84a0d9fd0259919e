"""Why a VM is selected by a config, or not: the line that decides, those that come near, and the line to add."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.values import a_host, a_vm, an_inventory, configured, jobs_of, planned, uuid_of, vms
from VmBackup import (NEAR_MOST, TEXT_COLUMNS, ConfigurationError, characters_between, line_for, lines_about,
                      near_miss, near_names, nearest_lines, wrapped)

NEAR = [
    # (selector, other words of the config, name, tags, what is said; '' if it is far)
    ('Web', '', 'web', (), 'differs in upper and lower case'),
    ('WEB*', '', 'web-1', (), 'differs in upper and lower case'),
    ('/WEB.*/', '', 'web-1', (), 'differs in upper and lower case'),
    (r'/\S+x/', '', 'WEBX', (), 'differs in upper and lower case'),
    ('my vm', '', 'my  vm', (), 'differs in blanks'),
    ('"web "', '', 'web', (), 'differs in blanks'),
    ('web', '', 'we\u00a0b', (), 'differs in blanks'),
    ('/my vm/', '', 'my\tvm', (), 'differs in blanks'),
    ('My VM', '', 'my  vm', (), 'differs in case and blanks'),
    ('web_1', '', 'web-1', (), 'marks such as - and _'),
    ('B\u00fcro', '', 'Bu\u0308ro', (), 'characters that look alike'),
    ('tag:Gold', '', 'web', ('gold',), 'its tag gold differs in upper and lower case'),
    ('tag:gold', '', 'web', (), 'it has no tag'),
    ('tag:gold', '', 'web', ('a', 'b c'), 'it has only the tags a, b c'),
    ('tag:gold', '', 'web', ('a',), 'it has only the tag a'),
    ('web:2', '', 'web:2', (), 'write the name in quotes'),
    ('PROD.*', '', 'PROD-web', (), 'did you mean PROD*, or wildcards=regex'),
    ('web.[0-9]+', '', 'web-12', (), 'As a regex it would match'),
    ('db*', '', 'dev', (), ''),                               # as a regex it matches its beginning: that is no hint
    ('/web/', '', 'web-1', (), '/web.*/'),
    ('/web*/', '', 'web-1', (), 'matches only the beginning'),
    ('/PROD?db/', '', 'PROD-db', (), 'a regex is no wildcard'),
    ('"web*"', '', 'web-1', (), 'no wildcard'),
    ('web-?', '', 'my-web-1', (), 'must match the whole name'),
    ('web', '', 'web-01', (), 'only a part of this one'),
    ('web-01', '', 'web-02', (), 'differs in 1 character'),
    ('wep', '', 'web', (), 'differs in 1 character'),
    ('webserver-prod', '', 'webserver-porod', (), 'differs in 1 character'),
    ('uuid:' + uuid_of(2), '', 'web', (), 'its uuid differs in 1 character'),
    ('uuid:ffffffff-1111-2222-3333-444444444444', '', 'web', (), ''),
    ('db', '', 'web', (), ''), ('a', '', 'b', (), ''), ('*-db', '', 'web', (), ''), ('-', '', '_', (), ''),
    ('db?', '', '...', (), ''),
    ('web', 'wildcards=regex', 'WEB', (), 'differs in upper and lower case'),
    ('WEB.*', 'wildcards=regex', 'web-1', (), 'differs in upper and lower case')]


@pytest.mark.parametrize('text, word, name, tags, said', NEAR)
def test_what_a_line_lacks_to_select_a_vm_is_said_if_it_comes_near(text, word, name, tags, said):
    config = configured('vm-export=%s\n%s\n' % (text, word))
    machine = a_vm(name, tags=tags)
    assert jobs_of(planned('vm-export=%s\n%s\n' % (text, word), machine)) == {}
    _, why = near_miss(config.vm_export[0], machine)
    assert (said in why) if said else why == '', why
    assert bool(nearest_lines(machine, config)) is bool(said)


def test_the_nearest_lines_come_first_and_are_few():
    lines = ['vm-export=' + text for text in ['tag:gold', 'web', 'webserver-2', 'webserver 1', 'WebServer-1', 'db']]
    lines += ['vm-export=tag:t%d' % number for number in range(20)]
    found = nearest_lines(a_vm('webserver-1'), configured('\n'.join(lines) + '\n'))
    assert [line.split(' (')[0].split('=')[1] for line in found][:4] == ['WebServer-1', 'webserver 1', 'webserver-2', 'web']
    assert len(found) == NEAR_MOST


@given(st.text(max_size=12), st.text(min_size=1, max_size=12), st.sampled_from(['%s', '"%s"', '/%s/', 'tag:%s', '*%s?', '[%s]']),
       st.sampled_from(['shell', 'regex']))
def test_no_name_and_no_line_stops_it(name, text, form, wildcards):
    try:
        config = configured('wildcards=%s\nvm-export=%s\n' % (wildcards, form % text))
    except ConfigurationError:
        return
    machine = a_vm(name, tags=(name,))
    selected = bool(jobs_of(planned('wildcards=%s\nvm-export=%s\n' % (wildcards, form % text), machine)))
    assert (nearest_lines(machine, config) == []) or not selected
    assert bool(lines_about(machine, config, an_inventory(machine))) is selected or ':' in text


# --- which line decides ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('lines, decides, beaten', [
    (['vm-export=web'], 'vm-export=web', {}),
    (['vm-export=web', 'vdi-export=w*'], 'vm-export=web', {'vdi-export=w*': 'a name is more precise than a wildcard'}),
    (['vm-export=web', 'vdi-export=uuid:' + uuid_of(1)], 'vdi-export=uuid:' + uuid_of(1),
     {'vm-export=web': 'a uuid is more precise than a name'}),
    (['vdi-export=w*', 'vm-export=/web/'], 'vdi-export=w*', {'vm-export=/web/': 'vdi-export beats vm-export'}),
    (['vm-export=w*:2', 'vm-export=tag:gold:3'], 'vm-export=tag:gold:3', {'vm-export=w*:2': 'the later one decides'})])
def test_the_line_that_decides_is_the_plans_and_others_are_told_why_they_do_not(lines, decides, beaten):
    text, machine = '\n'.join(lines) + '\n', a_vm('web', tags=('gold',))
    about = lines_about(machine, configured(text), an_inventory(machine))
    (job,) = planned(text, machine).jobs
    assert about[0].startswith(job.chosen_by + ' decides') and job.chosen_by.startswith(decides + ' (')
    assert ('no other line' in about[0]) is (not beaten)
    assert len(about) == 1 + len(beaten)
    for line, why in beaten.items():
        assert any(one.startswith(line + ' (') and why in one for one in about), about


def test_an_exclude_is_told_first_with_the_line_that_would_decide():
    machine = a_vm('web')
    about = lines_about(machine, configured('vm-export=w*\nexclude=web\nexclude=db\n'), an_inventory(machine))
    assert [one.split(' (')[0] for one in about] == ['exclude=web', 'vm-export=w*']
    assert 'leaves it out' in about[0] and 'would decide, were it not left out' in about[1]


def test_a_line_that_the_pool_cannot_serve_is_told_with_the_reason():
    machine = a_vm('web')
    old = an_inventory(machine, host=a_host(product_version=(6, 2, 0)))
    (about,) = lines_about(machine, configured('vdi-export=web\n'), old)
    assert 'selects nothing as it stands: vdi-export needs XenServer 6.5' in about


@pytest.mark.parametrize('line, said', [
    ('exclude=Web', True), ('vdi-export=WEB', True), ('vdi-export=we b', True), ('exclude=wep', False), ('exclude=/we/', False),
    ('vdi-export=tag:gold', False), ('exclude=web2', False)])
def test_beside_a_line_that_selects_it_only_what_people_would_take_for_its_name_is_near(line, said):
    config, machine = configured('vm-export=w*\n%s\n' % line), a_vm('web')
    assert [one.split(' (')[0] for one in nearest_lines(machine, config, is_selected=True)] == [line] * said


# --- the line to add -------------------------------------------------------------------------------------------------

@given(st.text(max_size=20), st.sampled_from(['shell', 'regex']))
def test_the_line_to_add_selects_that_vm_and_no_other(name, wildcards):
    other = 'vm-export=nobody\nwildcards=%s\n' % wildcards
    machine, second = a_vm(name), a_vm(name + 'x', 2)
    line = line_for(machine, configured(other))
    if line:
        assert line.isprintable()
        assert set(jobs_of(planned(other + line + '\n', machine, second))) == {name}
    else:
        assert name == '' or not name.isprintable() or '\n' in name


@pytest.mark.parametrize('name, line', [
    ('web', 'vm-export=web'), ('my vm', 'vm-export=my vm'), ('a*b', 'vm-export="a*b"'), ('web:2', 'vm-export="web:2"'),
    (' web', 'vm-export=" web"'), ('q"r\\', 'vm-export=q"r\\'), ('"q\\', 'vm-export="\\"q\\\\"'), ('/x/', 'vm-export="/x/"'),
    ('tag:x', 'vm-export="tag:x"'), ('x\ny', ''), ('', ''), ('a\u202eb', '')])
def test_the_line_to_add_is_quoted_where_it_must_be(name, line):
    assert line_for(a_vm(name), configured('vm-export=nobody\n')) == line


# --- names, and lines for people -------------------------------------------------------------------------------------

@pytest.mark.parametrize('word, near', [
    ('Web', ['web']), ('wep', ['web']), ('my vm', ['My  VM']), ('file_server', ['File-Server']), ('zzz', []),
    ('', ['']), ('---', []), ('\u202e', [])])
def test_the_nearest_names_of_a_pool(word, near):
    assert near_names(word, ['web', 'My  VM', 'File-Server', 'db', '"', '']) == near


@pytest.mark.parametrize('one, other, number', [
    ('web', 'web', 0), ('web', 'wep', 1), ('web', 'we', 1), ('', 'abc', 3), ('ab', 'ba', 1)])
def test_characters_are_counted_as_people_would(one, other, number):
    assert characters_between(one, other) == number


@given(st.text(alphabet=st.sampled_from('ab"\\ \n\x9b\u202e'), max_size=300))
def test_no_line_for_people_parts_what_is_quoted_or_holds_what_can_break_it(text):
    found = wrapped('  ' + text)
    assert all(line.isprintable() for line in found.split('\n'))
    name = '"%s"' % re.sub('[^ab ]', '', text)
    assert name in wrapped('  words before it, ' * 3 + name + ' and behind it')


def test_lines_end_at_column_80_where_blanks_let_them():
    lines = wrapped('  ' + 'some words, ' * 40).split('\n')
    assert len(lines) > 5 and all(len(line) <= TEXT_COLUMNS for line in lines)
    assert lines[0].startswith('  some') and all(line.startswith('      ') for line in lines[1:])


def test_a_config_line_is_never_parted():
    line = '      vm-export=' + 'a b ' * 60 + 'c'
    assert wrapped(line) == line


def test_all_vms_of_one_name_are_near():
    assert near_names('WEB', [machine.name for machine in vms('web', 'Web')]) == ['Web', 'web']
