"""What VMs, copies and devices are called on disk."""

import hashlib
import os
import re
import sys
from datetime import datetime, timedelta
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.values import uuid_of
from VmBackup import (copy_name, counted, device_name, folded, free_copy_name, fs_path, fs_text, newcomer_name,
                      parse_copy_name, quote_name, safe_name, userdevice_number)

# What the server's XML can carry: no NUL, no lone surrogates.
NAMES = st.text(st.characters(blacklist_categories=('Cs',), blacklist_characters='\0'), max_size=300)
ODD_NAMES = ['B\xfcro "1" $(reboot)', '../../etc', '-rf', 'a/b', '.', '..', 'METADATA_xcp1', 'METADATA_', 'metadata_xcp2', 'x' * 255,
             '\xfc' * 255, 'a\nb', '*', '', ' ', ' web', 'web ', 'web.', 'con', 'CON.txt', 'con .txt', 'nul', 'Lpt1.x',
             'com0', '%', '%41', '.vmbackup', 'web--12345678', '--abcdef12', 'a%%b', '\U0001f4be', 'web.partial',
             'web--12345678\n', 'success', 'a\\b', 'a:b', 'x' * 254 + 'y']
# Names that normalisation or case folding, beyond that of ASCII, makes one.
ALIKE = ['\xe9', '%C3%A9', '%25', 'e\u0301', '\xdf', 'ss', 'K', '\u212a', 's', '\u017f', '\u0131', 'i', '\u0130', '\ufb01', 'fi']
# The names that Windows keeps for devices: learn.microsoft.com, "Naming Files, Paths, and Namespaces".
DEVICES = {'con', 'prn', 'aux', 'nul'} | {word + digit for word in ('com', 'lpt') for digit in '0123456789'}


def assert_safe(component: str) -> None:
    """It is one component that ext4, NFS and CIFS take, and that nothing of ours is mistaken for."""
    assert component and component not in ('.', '..')
    assert re.match(r'[A-Za-z0-9 ._()+@,%-]+\Z', component)
    assert not component.startswith((' ', '.')) and not component.endswith((' ', '.'))
    assert component.partition('.')[0].rstrip(' ').lower() not in DEVICES
    assert not component.upper().startswith('METADATA_')


@given(NAMES)
def test_any_vm_name_gives_one_component_that_every_file_system_takes(name):
    component = safe_name(name)
    assert_safe(component)
    assert len((component + '.xva.zst').encode('utf-8')) <= 255
    newcomer = newcomer_name(name, uuid_of(7))
    assert_safe(newcomer)
    assert len((newcomer + '.partial').encode('utf-8')) <= 255


@pytest.mark.parametrize('name', ODD_NAMES)
def test_an_odd_name_is_safe(name):
    assert_safe(safe_name(name))


@given(NAMES, NAMES)
def test_two_names_share_a_directory_of_a_windows_share_only_if_they_differ_in_ascii_case_alone(one, other):
    # Placement gives the second of two names that differ in case only a directory of its own.
    if one.lower() != other.lower():
        assert folded(safe_name(one)) != folded(safe_name(other))
    if one != other:
        assert safe_name(one) != safe_name(other)


def test_odd_names_do_not_meet_in_one_directory():
    taken = {}
    for name in ODD_NAMES + ALIKE:
        assert taken.setdefault(folded(safe_name(name)), name) == name


@given(st.one_of(NAMES, st.sampled_from(ODD_NAMES + ALIKE), st.text(st.sampled_from('%4125cC3A9-')).map(lambda text: text[:20])))
def test_a_short_name_can_be_read_back_from_its_directory(name):
    component = safe_name(name)
    if name and '%%' not in component:
        assert unquote_to_bytes(component).decode('utf-8') == name


@pytest.mark.parametrize('name', ['web', 'File server 1', 'db-01.example.org', 'a_b', 'x(1)', 'a+b@c,d', '-rf', 'WEB',
                                  'reconf', 'console', 'nullify', 'web--1234567', 'web-12345678', 'a' * 200])
def test_a_plain_name_stays_as_the_older_program_wrote_it(name):
    assert safe_name(name) == name


@given(NAMES, NAMES)
def test_no_name_can_produce_the_directory_of_a_newcomer(name, other):
    newcomer = newcomer_name(name, uuid_of(0xabcdef12))
    assert newcomer == safe_name(name) + '--abcdef12'
    assert folded(safe_name(newcomer)) != folded(newcomer)
    assert folded(safe_name(other)) != folded(newcomer)


@given(st.integers(200, 300), st.integers(200, 300), st.sampled_from(['a', 'b', '\xfc', '%', ' x']), st.sampled_from(['', 'A', '.']))
def test_names_that_are_cut_stay_apart(length, other_length, char, end):
    one, other = char * length + end, char * other_length + end
    assert (safe_name(one) == safe_name(other)) == (one == other)
    if len(safe_name(one)) < len(one):
        assert hashlib.sha256(one.encode('utf-8')).hexdigest()[:24] in safe_name(one)


# --- copies ----------------------------------------------------------------------------------------------------------

TIMES = st.datetimes(datetime(1970, 1, 1), datetime(2999, 12, 31)).map(lambda at: at.replace(microsecond=0))


@given(TIMES)
def test_the_name_of_a_copy_tells_its_time(at):
    assert parse_copy_name(copy_name(at)) == (at, False)
    assert ':' not in copy_name(at)


@given(TIMES)
def test_a_directory_of_the_older_program_is_recognised(at):
    assert parse_copy_name(at.strftime('backup-%Y-%m-%d-(%H:%M:%S)')) == (at, True)


@pytest.mark.parametrize('name', [
    'backup-2016-04-14', 'backup-2016-04-14-001000.partial', 'backup-2016-04-14-001000.deleting',
    'Backup-2016-04-14-001000', ' backup-2016-04-14-001000', 'backup-2016-04-14-001000 ', 'backup-2016-04-14-001000\n',
    'backup-2016-02-30-001000', 'backup-2016-04-14-006000', 'backup-0000-01-01-000000', 'backup-2016-04-14-00100\u0663',
    'backup-2016-04-14-(00:10:00)x', 'backup-2016-04-14-(001000)', 'my-backup-2016-04-14-001000', 'backup-2016-04-14-0010001'])
def test_a_directory_that_only_looks_like_a_copy_is_none(name):
    assert parse_copy_name(name) is None


@given(TIMES, st.sets(st.integers(0, 9)))
def test_a_new_copy_takes_the_first_second_that_no_copy_has(at, seconds):
    forms = (copy_name, lambda when: when.strftime('backup-%Y-%m-%d-(%H:%M:%S)'),
             lambda when: copy_name(when) + '.partial', lambda when: copy_name(when) + '.deleting')
    taken = [forms[second % len(forms)](at + timedelta(seconds=second)) for second in seconds]
    first_free = min(set(range(11)) - seconds)
    assert free_copy_name(at, taken + ['notes.txt', 'lost+found']) == copy_name(at + timedelta(seconds=first_free))


def test_fractions_of_a_second_do_not_hide_a_taken_name():
    at = datetime(2016, 4, 14, 0, 10, 0, 999999)
    assert free_copy_name(at, ['backup-2016-04-14-001000']) == 'backup-2016-04-14-001001'


# --- devices, words, and the file system -----------------------------------------------------------------------------

@pytest.mark.parametrize('userdevice, device', [('0', 'xvda'), ('1', 'xvdb'), ('25', 'xvdz'), ('26', 'xvdaa'),
                                                ('51', 'xvdaz'), ('701', 'xvdzz'), ('702', 'xvdaaa'), ('hdc', 'hdc')])
def test_the_device_of_a_disk_that_never_started_follows_from_its_userdevice(userdevice, device):
    assert device_name(userdevice) == device


@given(st.integers(0, 100000))
def test_device_and_userdevice_tell_the_same_position(number):
    assert userdevice_number(device_name(str(number))) == userdevice_number(str(number)) == number


def test_an_unknown_userdevice_sorts_last():
    assert sorted(['odd', 'hdb', '0', '10', 'xvdc'], key=userdevice_number) == ['0', 'hdb', 'xvdc', '10', 'odd']


@pytest.mark.parametrize('number, noun, text', [(0, 'copy', '0 copies'), (1, 'copy', '1 copy'), (2, 'copy', '2 copies'), (3, 'day', '3 days'),
                                                (1, 'VM', '1 VM'), (3, 'VM', '3 VMs')])
def test_a_number_agrees_with_its_noun(number, noun, text):
    assert counted(number, noun) == text


@pytest.mark.parametrize('number, noun, verb, text', [
    (1, 'dump', 'is', '1 dump is'), (2, 'dump', 'is', '2 dumps are'), (0, 'good copy', 'was', '0 good copies were'),
    (1, 'copy', 'has', '1 copy has'), (3, 'copy', 'has', '3 copies have'), (1, '', 'is', '1 is'), (4, '', 'is', '4 are')])
def test_the_verb_behind_a_number_agrees_with_it(number, noun, verb, text):
    assert counted(number, noun, verb) == text


@pytest.mark.parametrize('name, shown', [('web', 'web'), ('File server 1', 'File server 1'), ('B\xfcro', 'B\xfcro'),
                                         ('', '""'), ('a "b"', '"a \\"b\\""'), ('a\nb', '"a\\nb"'), ('\x1b[31m', '"\\x1b[31m"'),
                                         (' web', '" web"'), ('a, b', '"a, b"')])
def test_a_name_is_quoted_where_it_is_odd(name, shown):
    assert quote_name(name) == shown


@given(st.text())
def test_a_quoted_name_never_breaks_a_line(name):
    assert quote_name(name).isprintable()


@given(st.binary().filter(lambda raw: b'\0' not in raw))
def test_any_file_name_survives_the_way_in_and_out(raw):
    text = fs_text(os.fsdecode(raw))
    assert os.fsencode(fs_path(text)) == raw
    if sys.getfilesystemencoding() == 'utf-8':
        assert fs_path(text) == text
