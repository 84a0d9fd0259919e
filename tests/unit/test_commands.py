"""The command line, the files it names, and the rule between hosts that share one crontab line."""

import base64
import os
import shutil
import stat
import subprocess
import sys
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.process import ROOT
from support.shelf import write_copy
from support.values import POOL_UUID, a_host, an_inventory, configured
from VmBackup import (ACTIONS, OPTIONS, BackupError, Catalog, Clock, ConfigurationError, ExitStatus, Log,
                      Run, Services, UsageError, asked_help, chosen_vms, config_path, create_password_file, format_utc, is_config_path,
                      load_configuration, neighbour_text, parse_arguments, prune_one, read_password)


def parsed(line, *words):
    """The arguments of that line, cut at blanks, and further words."""
    return parse_arguments(line.split() + list(words))


def configuration_of(tmp_path, text, *words):
    path = tmp_path / 'weekend.cfg'
    path.write_text(text.replace('STORE', str(tmp_path)), encoding='utf-8')
    return load_configuration(parse_arguments(['-', str(path)] + list(words)))


# --- words -----------------------------------------------------------------------------------------------------------

def test_without_an_action_it_is_a_backup():
    arguments = parsed('secret weekend.cfg')
    assert (arguments.password, arguments.target, arguments.action.name) == ('secret', 'weekend.cfg', 'backup')
    assert arguments.settings == () and arguments.parameters == {'force': False}


@pytest.mark.parametrize('line', ['- x.cfg preview', '- x.cfg backup preview', '- x.cfg preview compress=True',
                                  '- x.cfg compress=True preview', '- x.cfg max_backups=1 backup preview'])
def test_the_word_preview_never_leads_to_a_backup(line):
    assert parsed(line).action.name == 'preview'


@pytest.mark.parametrize('action', [action for action in ACTIONS if not action.has_preview], ids=lambda action: action.name)
def test_the_word_preview_behind_an_action_that_has_none_is_no_preview(action):
    if action.takes_vm:
        assert parsed('- x.cfg %s preview' % action.name).vm == 'preview'
    else:
        with pytest.raises(UsageError):
            parsed('- x.cfg %s preview' % action.name)


@pytest.mark.parametrize('action', ACTIONS, ids=lambda action: action.name)
def test_every_config_key_can_be_given_as_an_argument_of_every_action(action):
    for option in OPTIONS:
        words = '- setup' if action.name == 'setup' else '- x.cfg ' + action.name
        (setting,) = parsed('%s %s=a=b' % (words, option.name)).settings
        assert (setting.name, setting.value, setting.place) == (option.name, 'a=b', 'command line')


@pytest.mark.parametrize('line', ['- x.cfg compress=True', '- x.cfg compress=False ignore_extra_keys=True pre_clean=True',
                                  '- x.cfg preview ignore_extra_keys=True'])
def test_the_older_words_stay(line):
    assert len(parsed(line).settings) >= 1


@pytest.mark.parametrize('line, hint', [
    ('-', 'TARGET is missing'), ('- x.cfg privew', 'the actions are backup, preview'), ('- x.cfg backup db', 'one word too many'),
    ('- x.cfg colour=red', 'colour'), ('- x.cfg max_backup=3', 'did you mean max_backups'), ('- x.cfg preview force=yes', 'force'),
    ('- x.cfg force=yes force=no', 'twice'), ('- x.cfg backup backup', 'one word too many'), ('- max_backups=3', 'TARGET is missing'),
    ('- exclude=web', 'TARGET is missing'), ('- x.cfg --help', 'not an action'), ('- x.cfg =x', 'neither'),
    ('- x.cfg setup', 'in the place of TARGET'), ('- setup setup', 'one word too many'), ('- setup x.cfg', 'one word too many'),
    ('- setup vm=web', 'neither'), ('- setup config=', 'empty')])
def test_a_wrong_command_line_is_refused_with_a_sentence_that_helps(line, hint):
    with pytest.raises(UsageError) as caught:
        parsed(line)
    assert hint in str(caught.value) and caught.value.exit_status == ExitStatus.USAGE


def test_a_parameter_of_another_action_is_refused():
    for action in ACTIONS:
        for other in ACTIONS:
            for parameter in other.parameters:
                if parameter.name in {own.name for own in action.parameters}:
                    continue
                with pytest.raises(UsageError):
                    parsed('- x.cfg %s %s=1' % (action.name, parameter.name))


@pytest.mark.parametrize('line, name, value', [
    ('verify', 'max_time', 0), ('verify max_time=90', 'max_time', 90), ('list', 'format', 'text'), ('list format=JSON', 'format', 'json'),
    ('restore', 'from', 'latest'), ('restore start=YES', 'start', True), ('restore start=no', 'start', False),
    ('extract web metadata', 'metadata', True), ('extract metadata=no', 'metadata', False), ('drill boot=yes', 'boot', 5.0),
    ('drill boot=0.5', 'boot', 0.5), ('drill boot=no', 'boot', 0.0), ('drill sample=3', 'sample', 3)])
def test_a_parameter_of_an_action_means_what_its_kind_says(line, name, value):
    assert parsed('- x.cfg ' + line).parameters[name] == value


@pytest.mark.parametrize('line', ['verify max_time=0', 'verify max_time=x', 'list format=xml', 'restore start=maybe', 'restore to=',
                                  'drill boot=often', 'drill sample=0', 'drill sample=1.5'])
def test_a_parameter_that_means_nothing_is_refused_by_its_name(line):
    with pytest.raises(UsageError) as caught:
        parsed('- x.cfg ' + line)
    assert str(caught.value).startswith(line.split()[1].partition('=')[0] + ': ')


@given(st.lists(st.one_of(st.text(), st.sampled_from(['-', 'x.cfg', 'web', 'preview', 'backup', 'list', 'vm=a', 'force=yes', 'max_backups=3',
                                                      'vm-export=*', '=', 'compress=True', 'from=latest']))))
def test_any_words_are_arguments_or_a_usage_error(words):
    try:
        assert parse_arguments(words).action in ACTIONS
    except UsageError as error:
        assert str(error)


# --- TARGET ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('target', ['/a/weekend.cfg', 'weekend.cfg', 'weekend.conf', './weekend', 'dir/', 'a/b'])
def test_a_target_that_looks_like_a_file_is_a_config(target):
    assert is_config_path(target)


@pytest.mark.parametrize('target', ['web', 'PROD*', '*', 'web:2', 'vm-export=/web.*/', 'vdi-export=a/b', 'vm-export=x.cfg', 'uuid:1', 'tag:gold'])
def test_any_other_target_is_a_selector(target):
    assert not is_config_path(target)


def test_a_file_that_is_there_is_a_config_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    tmp_path.joinpath('weekend').write_text('')
    assert is_config_path('weekend')


@pytest.mark.parametrize('target, key, text', [('web', 'vm_export', 'web'), ('PROD*:2', 'vm_export', 'PROD*:2'),
                                               ('vm-export=/web.*/', 'vm_export', '/web.*/'), ('vdi-export="a=b"', 'vdi_export', '"a=b"'),
                                               ('a=b', 'vm_export', 'a=b')])
def test_a_selector_as_target_is_all_the_config_there_is(tmp_path, target, key, text):
    configuration = load_configuration(parse_arguments(['-', target, 'backup_dir=' + str(tmp_path), 'max_backups=2']))
    (selector,) = getattr(configuration, key)
    assert (selector.text, configuration.max_backups, configuration.status_log) == (text, 2, '/snapshots/NAUbackup/status.log')


@pytest.mark.parametrize('target', ['missing.cfg', 'folder.cfg', 'no/such/file'])
def test_a_config_that_cannot_be_read_is_a_usage_error(tmp_path, target):
    tmp_path.joinpath('folder.cfg').mkdir()
    with pytest.raises(UsageError) as caught:
        load_configuration(parse_arguments(['-', str(tmp_path / target)]))
    assert target in str(caught.value)


def test_a_config_that_is_far_too_large_is_refused_rather_than_cut(tmp_path):
    with pytest.raises(UsageError):
        configuration_of(tmp_path, 'backup_dir=STORE\n' + 'vm-export=web\n' * 100000)


def test_a_config_that_asks_for_nothing_is_refused_together_with_its_other_problems(tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        configuration_of(tmp_path, 'backup_dir=STORE/missing\nmax_backups=0\n')
    text = str(caught.value)
    assert 'nothing to do' in text and 'weekend.cfg:2' in text and 'weekend.cfg:1' in text
    assert configuration_of(tmp_path, 'backup_dir=STORE\npool_db_backup=1\n').pool_db_backup


@pytest.mark.parametrize('action', [action for action in ACTIONS if not action.needs_work], ids=lambda action: action.name)
def test_what_only_reads_the_store_needs_no_selector(tmp_path, action):
    assert configuration_of(tmp_path, 'backup_dir=STORE\n', action.name).vm_export == ()


def test_one_selection_has_one_place_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    assert config_path(parsed('- web')) == config_path(parsed('- vm-export=web')) != config_path(parsed('- vdi-export=web'))
    tmp_path.joinpath('weekend.cfg').write_text('')
    tmp_path.joinpath('link.cfg').symlink_to('weekend.cfg')
    assert len({config_path(parsed('- ' + path)) for path in ('weekend.cfg', './weekend.cfg', str(tmp_path / 'link.cfg'))}) == 1


# --- passwords ---------------------------------------------------------------------------------------------------------

@given(st.text(st.characters(blacklist_categories=('Cs',), blacklist_characters='\0'), min_size=1))
def test_a_password_comes_back_from_its_file(tmp_path_factory, password):
    path = str(tmp_path_factory.mktemp('password') / 'file')
    said = create_password_file(password, path)
    assert read_password(path) == password
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert len(password) < 4 or password not in said


def test_an_existing_file_is_not_overwritten_by_a_password(tmp_path):
    path = tmp_path / 'file'
    path.write_text('precious')
    with pytest.raises(UsageError):
        create_password_file('secret', str(path))
    assert path.read_text() == 'precious'


def test_what_is_no_file_is_the_password_itself_and_a_dash_is_none(tmp_path):
    assert read_password('secret') == 'secret'
    assert read_password(str(tmp_path)) == str(tmp_path)
    assert read_password('-') is None


@pytest.mark.parametrize('content', [b'', b'\n', b'not base64!\n', b'abc', b'\xff\xfe'])
def test_a_file_that_holds_no_password_is_a_usage_error(tmp_path, content):
    path = tmp_path / 'file'
    path.write_bytes(content)
    with pytest.raises(UsageError):
        read_password(str(path))


def test_a_password_file_of_the_older_program_can_be_read(tmp_path):
    # It wrote base64 without a newline (NAUbackup 3.25, save_password).
    path = tmp_path / 'file'
    path.write_bytes(base64.b64encode(b'secret'))
    assert read_password(str(path)) == 'secret'


# --- help ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('line', ['help', '-h', '--help', 'help config', 'help example', 'config', 'example', '--version']
                         + ['help ' + action.name for action in ACTIONS])
def test_help_is_there(line):
    assert asked_help(line.split())


@pytest.mark.parametrize('line', ['secret', 'secret weekend.cfg', 'config weekend.cfg', 'secret help config'])
def test_what_asks_for_no_help_gets_none(line):
    assert asked_help(line.split()) is None


def words_of(text):
    return ' '.join(text.split())


def test_help_on_something_unknown_is_a_usage_error():
    with pytest.raises(UsageError):
        asked_help(['help', 'me'])


def test_the_help_tells_every_action_and_exit_status():
    text = words_of(asked_help(['help']))
    for action in ACTIONS:
        assert ' %s %s' % (action.name, action.help) in text
    for status in ExitStatus:
        assert ' %d %s' % (status, status.meaning) in text


def test_the_help_of_an_action_tells_its_parameters():
    for action in ACTIONS:
        text = words_of(asked_help(['help', action.name]))
        assert all(parameter.name + ('' if parameter.kind == 'word' else '=') in text and parameter.help in text for parameter in action.parameters)


@pytest.mark.parametrize('line', ['help', 'help config'] + ['help ' + action.name for action in ACTIONS])
def test_help_fits_on_a_terminal(line):
    assert all(len(row) < 80 or row.startswith('  10 0 * * 6 ') for row in asked_help(line.split()).splitlines())


# --- another host's run of this config -------------------------------------------------------------------------------------

NOW = datetime(2016, 4, 14, 0, 40, tzinfo=timezone.utc)


def neighbour(may_be_running=True, minutes_ago=10, **facts):
    text = dict(host='xcp2', pid=7, pool=POOL_UUID, since=format_utc(NOW - timedelta(minutes=minutes_ago)), state='running')
    return neighbour_text(dict(text, **facts), an_inventory(host=a_host('xcp1')), NOW, may_be_running)


@pytest.mark.parametrize('facts', [dict(state='running')] + [dict(state='finished', exit=status) for status in (0, 1, 3)])
def test_a_run_that_another_host_of_the_pool_has_begun_is_left_to_it(facts):
    sentence = neighbour(**facts)
    assert 'xcp2' in sentence and '2016-04-14T00:30:00Z' in sentence and 'force=yes' in sentence


@pytest.mark.parametrize('facts', [
    dict(host='xcp1'), dict(pool='another'), dict(minutes_ago=60), dict(minutes_ago=600), dict(state='finished', exit=2),
    dict(state='finished', exit=4), dict(state='finished', exit=70), dict(state='finished', exit=143), dict(state='finished'),
    dict(state='odd'), dict(host=None), dict(host=''), dict(since='yesterday'), dict(since=None), dict(since=7), dict(exit='0', state='finished')])
def test_any_other_run_is_no_reason_to_do_nothing(facts):
    assert neighbour(**facts) == ''


def test_a_run_that_died_is_no_reason_to_do_nothing():
    # The lock was free, so whoever wrote that it runs does so no more.
    assert neighbour(may_be_running=False) == ''
    assert neighbour(may_be_running=False, state='finished', exit=0)


def test_nothing_is_left_to_a_lock_without_a_text():
    assert neighbour_text({}, an_inventory(), NOW, True) == ''


@given(st.dictionaries(st.sampled_from(['host', 'pool', 'since', 'state', 'exit']),
                       st.one_of(st.none(), st.integers(), st.text(), st.lists(st.integers()), st.just(POOL_UUID), st.just('finished'))))
def test_any_text_in_a_lock_is_survived(text):
    assert isinstance(neighbour_text(text, an_inventory(), NOW, True), str)


# --- prune ------------------------------------------------------------------------------------------------------------------

class Unstopped:
    @staticmethod
    def check():
        pass


def pruned(store, meanwhile):
    """How many copies of web `prune` removed, and those that are left; `meanwhile`: what another run does before the lock is ours."""
    (store / 'web').mkdir()
    for number in range(1, 5):
        write_copy(str(store / 'web' / ('backup-2016-04-1%d-001000' % number)), 'web', POOL_UUID, 'vm-export', number, 10 - number, b'x',
                   {'copies_to_keep': 2})
    text = 'backup_dir=%s\nvm-export=web:2\n' % store
    (store / 'weekend.cfg').write_text(text)
    clock = Clock()
    context = Services(configured(text), clock, Log(clock), Unstopped(), parsed('- %s/weekend.cfg prune' % store),
                       catalog=Catalog(str(store)))
    (chosen,) = chosen_vms(context.catalog, '', context.log).vms
    meanwhile(store / 'web', lambda number: 'backup-2016-04-1%d-001000' % number)
    number = prune_one(Run(context, None), context, chosen)
    return number, sorted(int(path.name[16]) for path in (store / 'web').iterdir())


def test_prune_removes_what_is_beyond_the_number_to_keep(tmp_path):
    shelf = tmp_path / 'store'
    shelf.mkdir()
    assert pruned(shelf, lambda web, name: None) == (2, [3, 4])


@pytest.mark.parametrize('damaged', [[3], [4], [3, 4]])
def test_prune_decides_on_what_is_there_under_the_lock(tmp_path, damaged):
    def lose_images(web, name):
        for number in damaged:
            (web / name(number) / 'web.xva').unlink()

    number, left = pruned(tmp_path, lose_images)
    good = [one for one in left if one not in damaged]
    assert number == 2 - len(damaged) and good == [one for one in (1, 2, 3, 4) if one not in damaged][-2:]


def test_prune_removes_nothing_of_a_vm_whose_copies_are_gone_when_the_lock_is_ours(tmp_path):
    def remove(web, name):
        for number in (1, 2, 3):
            shutil.rmtree(str(web / name(number)))

    assert pruned(tmp_path, remove) == (0, [4])


def test_errors_of_command_line_and_config_mean_exit_status_2():
    assert issubclass(UsageError, BackupError) and issubclass(ConfigurationError, BackupError)
    assert UsageError('x').exit_status == ConfigurationError(['x']).exit_status == ExitStatus.USAGE == 2


@pytest.mark.parametrize('python, told', [(sys.executable, b'given begins anew'), ('/no/such/python', b'goes on'),
                                          ('/bin/true', b'goes on'), ('', b'goes on')])
def test_a_process_begins_anew_with_what_it_is_given_or_where_that_can_t_be_goes_on(python, told):
    words = ('import os, sys; sys.path.insert(0, %r); from VmBackup import become; '
             'become([%r, "-c", "print(input(), \'begins anew\')"], b"given"); print("goes on")' % (ROOT, python))
    done = subprocess.run([sys.executable, '-B', '-c', words], stdout=subprocess.PIPE, check=True, timeout=60)
    assert done.stdout.strip() == told
