"""What setup proposes for the space there is, which share it takes, and how it says so."""

import os
import subprocess
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.values import NIGHT, US_UUID, a_copy, settings, vms
from VmBackup import (CHANGE_PERCENT, GIBIBYTE, MOST_NIGHTS, ROOM_PERCENT, Layer, Method, Mount, Proposal, Rules, Seen, Share,
                      Setting, best_share, config_text, find_mount, judge, next_steps, one_line, parse_configuration,
                      parse_selector, proposed_retention, proposed_settings, read_mounts, read_settings, selector_for, used_bytes)

SIZES = st.integers(min_value=0, max_value=1 << 60)


# --- how many copies ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('fulls_free, copies, full_every', [
    # (copies + 1) fulls within 90 % of what is free, from 7 copies to 3
    (1000, 7, 0), (8.9, 7, 0), (8.8, 6, 0), (7.8, 6, 0), (6.7, 5, 0), (5.6, 4, 0), (4.45, 3, 0),
    # else two chains of so many nights: 2 fulls, and 5 % for each night that is no full
    (4.4, 14, 14), (3.67, 14, 14), (3.66, 13, 13), (2.9, 7, 7), (2.34, 2, 2),
    # else one copy, which has its worst moment when the second comes
    (2.3, 1, 0), (1.5, 1, 0), (1, 1, 0), (0.99, 0, 0), (0, 0, 0)])
def test_what_is_kept_follows_from_what_is_free(fulls_free, copies, full_every):
    full = 1000 * GIBIBYTE
    found = proposed_retention(full, int(fulls_free * full))
    assert (found[:2] if found else (0, 0)) == (copies, full_every)


def test_a_pool_without_data_keeps_what_a_large_share_would():
    assert proposed_retention(0, 0) == Proposal(7, 0, 0)


@given(SIZES, SIZES)
def test_what_is_proposed_fits_or_is_one_copy(full, free):
    found = proposed_retention(full, free)
    if found is None:
        assert full > free
    elif found.copies > 1:
        assert found.needed_bytes <= free * ROOM_PERCENT // 100
    else:
        assert (found.full_every, found.needed_bytes) == (0, 2 * full) and full <= free


@given(SIZES, SIZES, SIZES)
def test_more_space_never_means_fewer_copies_of_a_kind_nor_increments_where_fulls_fit(full, free, more):
    def rank(found):
        if found is None:
            return (-1, 0)
        return (0 if found.copies == 1 else 2 - bool(found.full_every), found.copies)
    assert rank(proposed_retention(full, free)) <= rank(proposed_retention(full, free + more))


@given(SIZES, SIZES, st.integers(0, 40))
def test_never_fewer_copies_than_are_there_are_proposed_whatever_fits(full, free, present):
    found = proposed_retention(full, free, present)
    assert (found is None) == (not present and full > free)
    assert found is None or found.copies >= present and (found.copies == max(1, present) or found.needed_bytes <= free * ROOM_PERCENT // 100)


def most_held(nights, full_every, keep):
    """The most that stands in the store at any moment of so many nights, as fulls and increments, by the judge of a run."""
    copies, worst = [], (0, 0)
    for night in range(nights):
        new = a_copy(night, read_back=True)
        if not full_every:
            new = new._replace(layer=None)
        elif night % full_every == 0:
            new = new._replace(layer=Layer(1, new.name, '', 'due'), mark='mark of ' + new.name)
        else:
            base = copies[-1]
            new = new._replace(mark='mark of ' + new.name, layer=Layer(
                base.layer.depth + 1, base.layer.full, base.name, 'the next', base.layer.holders + ((base.name, base.mark),)))
        copies.append(new)
        fulls = sum(copy.layer is None or copy.layer.depth == 1 for copy in copies)
        worst = max(worst, (fulls, len(copies) - fulls))
        verdicts = judge(copies, US_UUID, Method.VM, [Rules(keep)], NIGHT + timedelta(days=night), sealed=new.name)
        copies = [verdict.copy for verdict in verdicts if verdict.keep]
    assert len(copies) >= keep
    return worst


@pytest.mark.parametrize('fulls_free', [100, 7, 4.4, 3.3, 2.5, 2.34, 1.5])
def test_what_is_reckoned_for_the_worst_moment_is_what_retention_then_holds(fulls_free):
    full = 1000 * GIBIBYTE
    found = proposed_retention(full, int(fulls_free * full))
    fulls, increments = most_held(3 * MOST_NIGHTS + 3, found.full_every, found.copies)
    assert fulls * full + increments * full * CHANGE_PERCENT // 100 == found.needed_bytes


# --- mounts and shares ---------------------------------------------------------------------------------------------------

ROW = '%d 20 0:%d / %s rw,relatime shared:1 - %s %s %s'


def test_what_the_kernel_escapes_in_a_list_of_mounts_is_read_as_it_is():
    text = ROW % (30, 51, r'/my\040share\011\012\134', 'nfs4', r'nas:/a\040b', 'rw,vers=4.2') + '\n' \
        + ROW % (31, 52, '/ro', 'cifs', '//nas/x', 'ro,vers=3.0') + '\n'
    first, second = read_mounts(text)
    assert (first.point, first.source, first.device, first.is_read_only) == ('/my share\t\n\\', 'nas:/a b', '0:51', False)
    assert (second.point, second.kind, second.is_read_only) == ('/ro', 'cifs', True)
    assert find_mount(text, os.makedev(0, 52)) == second


@given(st.text())
def test_no_text_of_mounts_is_too_odd_to_be_read(text):
    assert isinstance(read_mounts(text), list)


def a_mount(point='/snapshots', kind='nfs4', source='nas:/x', local=False):
    return Mount(point, kind, local, False, source, '0:51', False)


@pytest.mark.parametrize('source, disk', [
    ('/dev/sda1', 'sda'), ('/dev/sda', 'sda'), ('/dev/sdab12', 'sdab'), ('/dev/xvda2', 'xvda'), ('/dev/nvme0n1p5', 'nvme0n1'),
    ('/dev/nvme0n1', 'nvme0n1'), ('/dev/mmcblk0p1', 'mmcblk0'), ('/dev/md127p3', 'md127'), ('/dev/cciss/c0d0p5', 'cciss/c0d0'),
    ('/dev/mapper/vg-root', ''), ('/dev/root', ''), ('nas:/dev/sda1', ''), ('tmpfs', ''), ('/dev/sr0', '')])
def test_a_disk_is_known_by_the_name_of_its_partition(source, disk):
    assert a_mount(source=source).disk == disk


@pytest.mark.parametrize('kind, is_network, reach', [('nfs', True, True), ('smb3', True, True), ('fuse.sshfs', True, False),
                                                     ('9p', True, False), ('ext4', False, False), ('fuseblk', False, False)])
def test_which_file_systems_other_hosts_can_see_and_lock_on(kind, is_network, reach):
    assert (a_mount(kind=kind).is_network, a_mount(kind=kind).locks_reach_hosts) == (is_network, reach)


def a_share(point='/mnt/a', kind='nfs4', is_store=False, free=GIBIBYTE):
    return Share(a_mount(point, kind), point, False, is_store, free, free)


def test_shares_are_tried_in_this_order():
    order = [a_share(is_store=True, free=1), a_share('/snapshots', free=2), a_share('/snapshots/nas', free=1), a_share(free=9),
             a_share('/snapshots2', free=8), a_share(free=None), a_share('/snapshots', 'ext4', is_store=True, free=99)]
    assert best_share(order) == best_share(order[::-1]) == order


# --- how much is in use --------------------------------------------------------------------------------------------------

def vdi(uuid, used, parent='', size=100):
    return {'uuid': uuid, 'virtual_size': str(size), 'physical_utilisation': str(used),
            'sm_config': {'vhd-parent': parent} if parent else {}}


@pytest.mark.parametrize('records, used', [
    ([vdi('a', 30)], 30), ([vdi('a', 30, 'b'), vdi('b', 40)], 70), ([vdi('a', 30, 'b'), vdi('b', 40, 'c'), vdi('c', 50)], 100),
    ([vdi('a', -1)], 100), ([vdi('a', 0)], 100), ([vdi('a', 30, 'gone')], 100), ([vdi('a', 30, 'b'), vdi('b', -1)], 100),
    ([vdi('a', 300)], 100), ([vdi('a', 3, 'b'), vdi('b', 4, 'a')], 100), ([vdi('a', 3, 'a')], 100), ([{'uuid': 'a'}], 0)])
def test_a_disk_uses_what_it_and_its_base_copies_take_or_all_of_it_if_that_is_not_known(records, used):
    assert used_bytes(records[0], {record['uuid']: record for record in records}) == used


# --- what is written and shown -------------------------------------------------------------------------------------------

WORDS = ('/usr/bin/python3', '/snapshots/NAU backup/VmBackup.py', '-', '/snapshots/NAU backup/50 %.cfg')


def seen(**facts):
    values = dict(words=WORDS, backup_dir='/snapshots/BACKUPS', mount=a_mount(), free_bytes=16 * GIBIBYTE, whole_bytes=None,
                  vms=3, size_bytes=4 * GIBIBYTE, used_bytes=GIBIBYTE, hosts=1)
    return Seen(**dict(values, **facts))


VALUES = st.text(st.characters(blacklist_categories=('Cs', 'Cc')), min_size=1).map(str.strip).filter(bool)


@given(st.text(st.characters(blacklist_categories=('Cs',))), st.lists(VALUES, max_size=3), VALUES)
def test_whatever_stands_in_header_reasons_and_values_the_config_says_what_was_given(header, patterns, folder):
    given_ones = settings(*('exclude=' + one for one in patterns), 'backup_dir=' + folder)
    own, header = ['exclude', 'backup_dir'], one_line(header)
    proposed = proposed_settings(seen(mount=a_mount(source=header), others=(header,)), own, Proposal(14, 14, 9))
    found, problems = read_settings(config_text('pool ' + header, proposed, given_ones).encode('utf-8'), 'x.cfg')
    assert problems == [] and [one[:2] for one in found if one.name in own] == [one[:2] for one in given_ones]
    assert {one.name: one.value for one in found if one.name in proposed} == {key: row[0] for key, row in proposed.items()}
    assert parse_configuration([one for one in found if one.name != 'exclude'], (), 'x.cfg').max_backups == 14


def steps(selector='web', *words, **facts):
    configuration = parse_configuration((), settings('vm-export=*', *words), 'x.cfg')
    return next_steps(seen(**facts), configuration, 'web' if selector else '', selector)


def test_lines_for_the_crontab_survive_cron_and_the_shell():
    """cron takes % for the end of the command, and gives \\% on as %."""
    (line,) = [line for line in steps().splitlines() if line.startswith('10 0 * * * ')]
    assert '%' not in line.replace('\\%', '')
    command = line[len('10 0 * * * '):].replace('\\%', '%').replace(' >> ', ' ; : ')
    told = subprocess.check_output(['/bin/sh', '-c', 'set -- ' + command.split(' ; ')[0] + '; printf "%s\\n" "$@"'])
    assert tuple(told.decode().splitlines()) == WORDS


@pytest.mark.parametrize('facts, words, told', [
    ({'used_bytes': 60 * 10 ** 6 * 3600}, [], '18 min 0 s to 1 h 0 min'), ({'used_bytes': GIBIBYTE}, [], 'takes about a minute, or less'),
    ({'used_bytes': 60 * 10 ** 6 * 3600}, ['workers=2'], '9 min 0 s to 30 min 0 s'),
    ({'used_bytes': 60 * 10 ** 6 * 3600}, ['verify_after=yes'], '36 min 0 s to 2 h 0 min'),
    ({'used_bytes': 60 * 10 ** 6 * 3600, 'hosts': 3}, ['hosts=all', 'workers=4'], '2 min 15 s to 7 min 30 s')])
def test_how_long_the_first_night_takes_follows_from_what_is_in_use_and_how_many_export(facts, words, told):
    assert told in ' '.join(steps('web', *words, **facts).split())


def test_without_a_vm_there_is_nothing_to_try():
    assert steps('') and 'To try it now' not in steps('') and 'To try it now' in steps()


NAMES = st.one_of(st.text(), st.sampled_from(['web', '"web"', 'a:2', '*', '/x/', 'tag:x', 'uuid:1', ' ', 'a\\"b']))


@given(st.lists(NAMES, min_size=1, max_size=4), st.sampled_from(['shell', 'regex']))
def test_the_selector_of_a_vm_selects_it_and_no_other(names, wildcards):
    machines = vms(*names)
    selector = parse_selector(Setting('vm-export', selector_for(machines[0], machines), 'here'), wildcards)
    assert [machine for machine in machines if selector.matches(machine)] == machines[:1] and selector.is_literal
