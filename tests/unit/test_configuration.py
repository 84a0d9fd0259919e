"""From the text of a config to checked values: what is taken, what is refused, and how both are said."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.values import configured, problems_of
from VmBackup import (OPTION_NAMES, OPTIONS, Configuration, ConfigurationError, Setting, example_text, option_help,
                      parse_configuration, read_settings)

SCALARS = [option for option in OPTIONS if option.kind not in ('selector', 'disk')]

# Per kind: texts that are taken, each with the value that it means, and texts that are refused.
GOOD = {
    'bool': [('True', True), ('true', True), ('YES', True), ('1', True), ('False', False), ('No', False), ('0', False)],
    'path': [('/a/b', '/a/b'), ('/a b/c=d', '/a b/c=d'), ('/B\xfcro', '/B\xfcro')],
    'text': [('a', 'a'), ('mail.example.org', 'mail.example.org')],
    'address': [('a@example.org', 'a@example.org')],
    'addresses': [('a@example.org', ('a@example.org',)), ('a@x.org, b@y.org', ('a@x.org', 'b@y.org'))],
    'command': [('/a/b', ('/a/b',)), ('/a/b "c d" e\\ f', ('/a/b', 'c d', 'e f')), ("ssh nas 'zfs list'", ('ssh', 'nas', 'zfs list'))],
    'url': [('https://hc.example.org/ping/0f3c', 'https://hc.example.org/ping/0f3c'), ('http://127.0.0.1:8000/', 'http://127.0.0.1:8000')],
    'fingerprint': [(':'.join(['AB'] * 32), 'ab' * 32), ('cd' * 32, 'cd' * 32)],
    'time': [('06:30', '06:30'), ('6:30', '06:30'), ('23:59', '23:59'), ('00:00', '00:00')],
    'pool': [('xcp1', ('https', 'xcp1', 443)), ('xcp1.example.org:8443', ('https', 'xcp1.example.org', 8443)),
             ('http://192.0.2.7', ('http', '192.0.2.7', 80)), ('https://x:1/', ('https', 'x', 1)),
             ('[2001:db8::1]:444', ('https', '2001:db8::1', 444))],
}
BAD = {
    'bool': ['', 'maybe', '2', 'Truee', 'on off', '-1', 'Tru\xe9'],
    'path': [''], 'text': [''], 'address': ['', 'a', 'a b'], 'addresses': ['', ',', 'a'],
    'command': ['', '"a', "it's"], 'url': ['', 'x', 'file:///etc/passwd', 'ftp://x/y', 'http://', 'http://a b/', 'http:///x'],
    'fingerprint': ['', 'AB', 'xy' * 32, 'ab' * 31, 'ab' * 33],
    'time': ['', '24:00', '6', '06:60', '6:3', '06.30', '-1:00', '06:30:00', 'noon'],
    'pool': ['', 'ftp://x', 'x:0', 'x:65536', 'x:port', 'x y', 'x/y', 'root@x', 'http://', '2001:db8::1'],
}
NUMBERS = ('int', 'percent')


def value_of(option, text):
    needed = 'incremental=yes\n' if option.name == 'keep_reference' else ''
    return getattr(configured('vm-export="web"\n%s%s=%s\n' % (needed, option.name, text)), option.field)


@pytest.mark.parametrize('option', [option for option in SCALARS if option.kind in GOOD], ids=lambda option: option.name)
def test_a_good_value_means_what_it_says(option):
    for text, value in GOOD[option.kind]:
        assert value_of(option, text) == value


@pytest.mark.parametrize('option', [option for option in SCALARS if option.kind in BAD], ids=lambda option: option.name)
def test_a_bad_value_is_refused_with_its_place_and_key(option):
    for text in BAD[option.kind]:
        problems = problems_of('vm-export="web"\n%s=%s\n' % (option.name, text))
        assert len(problems) == 1, text
        assert problems[0].startswith('weekend.cfg:2: %s: ' % option.name)


@pytest.mark.parametrize('option', [option for option in SCALARS if option.kind in NUMBERS], ids=lambda option: option.name)
def test_a_number_is_taken_within_its_range_only(option):
    for number in (option.minimum, option.minimum + 1, option.maximum):
        assert value_of(option, str(number)) == number
    for text in ('', 'x', '-1', '1.5', '1e3', str(option.minimum - 1), str(option.maximum + 1), '9' * 5000, '0x10', '\u0663', '1 0'):
        problems = problems_of('vm-export="web"\n%s=%s\n' % (option.name, text))
        assert len(problems) == 1, text
        assert '%d to %d' % (option.minimum, option.maximum) in problems[0]


@pytest.mark.parametrize('option', [option for option in SCALARS if option.kind == 'choice'], ids=lambda option: option.name)
def test_a_choice_is_taken_in_any_case_and_the_choices_are_named_otherwise(option):
    for choice in option.choices:
        assert value_of(option, choice) == value_of(option, choice.upper()) == choice
    for text in ('', 'nonsense', ','.join(option.choices)):
        (problem,) = problems_of('vm-export="web"\n%s=%s\n' % (option.name, text))
        assert ', '.join(option.choices) in problem


def test_every_kind_of_option_is_tried_here():
    assert {option.kind for option in SCALARS} == set(GOOD) | set(NUMBERS) | {'choice'} == set(BAD) | set(NUMBERS) | {'choice'}


@pytest.mark.parametrize('word, compression', [('True', 'gzip'), ('yes', 'gzip'), ('1', 'gzip'), ('False', 'none'),
                                               ('no', 'none'), ('0', 'none'), ('zstd', 'zstd'), ('GZIP', 'gzip')])
def test_the_older_words_for_compress_keep_their_meaning(word, compression):
    assert configured('vm-export=*\ncompress=%s\n' % word).compress == compression


@pytest.mark.parametrize('key, value', [
    ('pool_db_backup', False), ('max_backups', 4), ('backup_dir', '/snapshots/BACKUPS'),
    ('status_log', '/snapshots/NAUbackup/status.log'), ('vdi_export_format', 'raw'), ('compress', 'none'),
    ('pre_clean', False), ('wildcards', 'shell'), ('require_mount', 'auto'), ('lock_wait', 10), ('stall_timeout', 15),
    ('ignore_extra_keys', False), ('pool', None)])
def test_what_is_not_set_has_the_documented_default(key, value):
    assert getattr(configured('vm-export=*\n'), key) == value


# --- lines -----------------------------------------------------------------------------------------------------------

def test_the_value_is_everything_after_the_first_equals_sign():
    assert configured('vm-export=a=b=c\n').vm_export[0].pattern == 'a=b=c'


def test_spaces_around_key_and_value_are_dropped():
    assert configured('  max_backups \t=  7  \n vm-export = web \n').max_backups == 7


def test_comments_and_blank_lines_are_skipped_and_a_hash_elsewhere_is_text():
    configuration = configured('# max_backups=9\n\n   \t\nvm-export=web # 1\n')
    assert (configuration.max_backups, configuration.vm_export[0].pattern) == (4, 'web # 1')


def test_a_comment_begins_in_the_first_column():
    assert problems_of('vm-export=web\n # a comment\n')


@pytest.mark.parametrize('raw', [b'\xef\xbb\xbfmax_backups=7\r\nvm-export=B\xc3\xbcro\r\n', b'max_backups=7\nvm-export=B\xc3\xbcro',
                                 b'\xef\xbb\xbf# first\nmax_backups=7\nvm-export=B\xc3\xbcro\n'])
def test_bom_and_crlf_and_a_missing_last_newline_make_no_difference(raw):
    configuration = parse_configuration(*(read_settings(raw, 'x.cfg')[0], [], 'x.cfg'))
    assert (configuration.max_backups, configuration.vm_export[0].pattern) == (7, 'B\xfcro')


@pytest.mark.parametrize('raw, place', [(b'vm-export=web\nmax_backups=\xff\xfe\n', 'x.cfg:2: '), (b'\x7fELF\0\1\n', 'x.cfg:1: '),
                                        (b'a=1\nb=2\n\0\n', 'x.cfg:3: ')])
def test_a_file_that_is_no_text_is_refused_at_the_line_where_it_shows(raw, place):
    settings, problems = read_settings(raw, 'x.cfg')
    assert settings == [] and len(problems) == 1 and problems[0].startswith(place)


def test_a_line_without_an_equals_sign_is_refused():
    (problem,) = problems_of('vm-export=web\nmax_backups 3\n')
    assert problem.startswith('weekend.cfg:2: "max_backups 3"')


def test_an_unknown_key_is_refused_and_the_nearest_known_one_is_named():
    (problem,) = problems_of('vm-export=*\nmax_backup=3\n')
    assert problem.startswith('weekend.cfg:2: "max_backup"') and 'did you mean max_backups?' in problem


def test_ignore_extra_keys_makes_an_unknown_key_a_warning():
    for configuration in (configured('vm-export=*\nowner=me\nignore_extra_keys=True\n'),
                          configured('vm-export=*\nowner=me\n', 'ignore_extra_keys=yes')):
        (warning,) = configuration.warnings
        assert warning.startswith('weekend.cfg:2: "owner"')
    assert problems_of('vm-export=*\nowner=me\nignore_extra_keys=True\n', 'ignore_extra_keys=no')


def test_a_scalar_key_may_stand_once_only_and_both_places_are_named():
    (problem,) = problems_of('max_backups=3\nvm-export=*\nmax_backups=3\n')
    assert problem.startswith('weekend.cfg:3: max_backups') and 'weekend.cfg:1' in problem


def test_a_selector_key_may_stand_as_often_as_wanted():
    assert len(configured('vm-export=a\nvm-export=b\nvm-export=a\nexclude=c\nexclude=d\n').vm_export) == 3


def test_all_problems_are_told_at_once_each_with_its_line():
    text = 'max_backups=0\nvm-export=\nnonsense\ncolour=red\nvm-export="web\ncompress=rar\nexclude=/(/\nvdi-export=a:x\npre_clean=si\n'
    places = sorted(problem.split(' ')[0] for problem in problems_of(text))
    assert places == ['weekend.cfg:%d:' % number for number in range(1, 10)]


# --- the command line --------------------------------------------------------------------------------------------------

def test_the_command_line_wins_over_the_file():
    configuration = configured('max_backups=3\nvm-export=a\nvdi-export=b\n', 'max_backups=9', 'vm-export=c', 'vm-export=d')
    assert configuration.max_backups == 9
    assert [selector.pattern for selector in configuration.vm_export] == ['c', 'd']
    assert [selector.pattern for selector in configuration.vdi_export] == ['b']


def test_wildcards_of_the_command_line_rule_the_files_selectors_too():
    assert configured('vm-export=web.*\n', 'wildcards=regex').vm_export[0].form == 'prefix-regex'


@pytest.mark.parametrize('word', ['regex', 'Regex', 'REGEX'])
def test_wildcards_mean_the_same_in_any_case_and_at_any_line(word):
    assert configured('vm-export=web.*\nwildcards=%s\n' % word).vm_export[0].form == 'prefix-regex'


def test_a_problem_of_the_command_line_names_it_as_its_place():
    (problem,) = problems_of('vm-export=*\n', 'max_backups=0')
    assert problem.startswith('command line: max_backups: ')


def test_each_setting_remembers_where_it_was_made():
    configuration = configured('max_backups=3\nvm-export=*\n', 'compress=zstd')
    assert configuration.places == {'max_backups': 'weekend.cfg:1', 'vm-export': 'weekend.cfg:2', 'compress': 'command line'}


# --- anything at all -----------------------------------------------------------------------------------------------------

PIECES = st.sampled_from([option.name for option in OPTIONS] + [
    '=', '=', '=', '\n', '\n', '\r\n', '"', '\\', '/', ':', ':0', ':2', ':-1', 'uuid:', 'tag:', '*', '[', ']', '(', '(?i)', '+', '{',
    '|', '\xef\xbb\xbf', '\0', '#', ' ', 'web', 'True', 'regex', '7', '%', ',', '@', '[[', '[z-a]', '[a--b]', '(?P<'])


@given(st.one_of(st.binary(), st.lists(PIECES).map(lambda pieces: ''.join(pieces).encode('latin-1')),
                 st.lists(st.tuples(st.sampled_from(OPTION_NAMES), st.text())).map(
                     lambda pairs: ''.join('%s=%s\n' % pair for pair in pairs).encode('utf-8', 'ignore'))))
def test_any_bytes_are_a_configuration_or_a_list_of_problems_each_with_its_line(raw):
    settings, problems = read_settings(raw, 'x.cfg')
    try:
        assert isinstance(parse_configuration(settings, [], 'x.cfg', problems), Configuration)
    except ConfigurationError as error:
        assert error.problems
        for problem in error.problems:
            assert re.match(r'x\.cfg:[0-9]+: \S', problem) and problem.isprintable()


@given(st.text().filter(lambda text: '\0' not in text and text == text.strip() and not re.search('[\r\n]', text)))
def test_any_text_is_a_vm_name_in_quotes(name):
    quoted = '"%s"' % name.replace('\\', '\\\\').replace('"', '\\"')
    if name:
        (selector,) = configured('vm-export=%s:3\n' % quoted).vm_export
        assert (selector.form, selector.pattern, selector.keep) == ('name', name, 3)


# --- the table speaks ------------------------------------------------------------------------------------------------------

def test_the_example_has_no_problems_and_names_every_key():
    text = example_text()
    settings, problems = read_settings(text.encode('utf-8'), 'example.cfg')
    assert problems == []
    assert parse_configuration(settings, [], 'example.cfg').warnings == ()
    assert set(re.findall(r'^#?([a-z][a-z_-]*)=', text, re.MULTILINE)) == set(OPTION_NAMES)


@pytest.mark.parametrize('option', OPTIONS, ids=lambda option: option.name)
def test_the_examples_line_of_a_key_is_good_when_it_is_switched_on(option):
    (line,) = [line for line in example_text().splitlines() if re.match('#?%s=' % re.escape(option.name), line)]
    value = line.partition('=')[2]
    if value:
        assert problems_of('%s=%s\n' % (option.name, value)) == ()


@pytest.mark.parametrize('option', SCALARS, ids=lambda option: option.name)
def test_a_default_written_down_means_the_default(option):
    if option.default not in (None, '', ()):
        written = str(option.default)
        assert value_of(option, written) == option.default


def test_the_help_names_every_key_with_its_meaning_and_default():
    text = option_help()
    for option in OPTIONS:
        assert re.search(r'^  %s=' % re.escape(option.name), text, re.MULTILINE)
        assert option.help in ' '.join(text.split())
        if option.default and option.kind not in ('bool', 'selector'):
            assert '[%s]' % option.default in text


# --- what decides which copies arise and stay -----------------------------------------------------------------------------

SAME = 'vm-export="web":2\nvm-export=db*\nexclude=db-test\nmax_backups=4\n'


@pytest.mark.parametrize('text', [
    '# a comment\n\n' + SAME, SAME.replace('"web":2', '"web" : 2'), SAME.replace('max_backups=4\n', ''), SAME + 'compress=False\n',
    SAME + 'mail_to=a@example.org\n', SAME + 'lock_wait=3\n', SAME + 'status_log=/tmp/x\n', SAME + 'stall_timeout=3\n',
    'pool_db_backup=no\n' + SAME.replace('\n', '\r\n')])
def test_comments_and_settings_that_make_no_other_copies_leave_a_config_what_it_is(text):
    assert configured(text).decisions == configured(SAME).decisions


@pytest.mark.parametrize('text', [
    SAME.replace('web', 'Web'), SAME.replace('vm-export=db', 'vdi-export=db'), SAME.replace(':2', ':3'), SAME.replace('exclude=db-test\n', ''),
    SAME.replace('"web":2', '"web"'), SAME.replace('db*', '"db*"'), SAME.replace('=4', '=5'), SAME + 'wildcards=regex\n'] + [
    SAME + line + '\n' for line in ('pool_db_backup=1', 'compress=gzip', 'vdi_export_format=vhd', 'pre_clean=yes', 'backup_dir=/other',
                                   'vm-export=tag:x', 'exclude=uuid:1')])
def test_whatever_makes_or_keeps_other_copies_is_another_config(text):
    assert configured(text).decisions != configured(SAME).decisions


def test_what_the_command_line_decides_is_part_of_the_config():
    assert configured(SAME, 'max_backups=7').decisions != configured(SAME).decisions
    assert configured(SAME, 'vm-export=web').decisions != configured(SAME).decisions
    assert configured(SAME, 'mail_when=never').decisions == configured(SAME).decisions


def test_no_two_keys_share_a_name_or_a_field():
    assert len({option.name for option in OPTIONS}) == len({option.field for option in OPTIONS}) == len(OPTIONS)


def test_a_setting_has_one_place():
    settings, _ = read_settings(b'# x\n\nmax_backups = 3\n', 'x.cfg')
    assert settings == [Setting('max_backups', '3', 'x.cfg:3')]
