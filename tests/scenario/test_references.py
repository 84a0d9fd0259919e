"""References: with keep_reference=yes a snapshot stays in the pool, only what differs from it is read, and what was read so is
audited when all is read again. What a copy should hold is what the pool's disks held before it was made."""

import glob
import hashlib
import json
import os
import random
import re
import shutil
import xml.etree.ElementTree as ElementTree
from typing import Any, Dict, List, Tuple

import pytest

import VmBackup

from support.archive import read_tar
from support.contents import value_of
from support.deeds import Process, backup, hurried_backup, in_trouble, preview
from support.language import MEBIBYTE, at, disk, uuid_of, vm
from support.layers import Nights, increments, is_increment, read_vhd, rows, stored
from support.mail import MailServer
from support.process import Pool, run_program, write_json
from support.recovery import differences, drill, machine, machine_in, restore, serving
from support.shelf import Shelf
from support.wire import eventually
from test_increment_traps import ONE, good, listed
from test_increments_told import told

KEEP = 'keep_reference=yes'
VM, RAW, VHD = ('vm-export=web',), ('vdi-export=web', 'vdi_export_format=raw'), ('vdi-export=web', 'vdi_export_format=vhd')
NAME = re.compile(r'(.*) \(VmBackup reference (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d), store ([0-9a-f]{8})\)')
FULL_AGAIN = 'full_every=1'
FIRST = 'there is no reference in the pool'


@pytest.fixture
def mail_server(one_mail_server: MailServer) -> MailServer:
    one_mail_server.forget()
    return one_mail_server


# --- what is there -----------------------------------------------------------------------------------------------------------

def ledgers(shelf: Shelf) -> Dict[str, Dict[str, Any]]:
    """By the path of its file, relative to the folder of the pool."""
    found = {}
    for path in glob.glob(shelf.at('.vmbackup', 'references', '*', '*')):
        with open(path) as file:
            found[os.path.basename(path)] = json.load(file)
    return found


def snapshots(pool: Pool) -> Dict[str, Dict[str, Any]]:
    """The snapshots, by uuid, of VMs and of disks, that were not there when the pool began."""
    before = {record['uuid'] for kind in ('VM', 'VDI') for record in pool.dump(pool.first_dir)[kind].values()}
    return {record['uuid']: record for kind in ('VM', 'VDI') for record in pool.dump()[kind].values()
            if record['is_a_snapshot'] and record['uuid'] not in before}


def is_the_reference(nights: Nights, copy: str) -> bool:
    """The pool has one reference and nothing else of ours: the state of that copy, named as the contract says, and the ledger
    tells of all that it is."""
    ledger, = ledgers(nights.shelf).values()
    current, found, dump = ledger['current'], snapshots(nights.pool), nights.pool.dump()
    disks = {key: facts['uuid'] for key, facts in current['disks'].items()}
    assert set(found) == {current['uuid']} | set(disks.values())
    title = 'web' if nights.kind == 'vm-export' else 'web xvda'
    what, moment, store = NAME.fullmatch(found[current['uuid']]['name_label']).groups()  # type: ignore
    assert (what, re.sub('[: ]', '', moment)) == (title, re.sub('^backup-|-(?=[0-9]{6}$)', '', copy)), (what, moment, copy)
    assert ledger['store'].startswith(store) and found[current['uuid']]['name_label'] == current['name']
    for key, content in nights.held[copy].items():
        record = found[disks[key]]
        assert nights.pool.read(disks[key]) == content, 'disk %s of the reference is not what it was' % key
        assert dump['VDI'][record['snapshot_of']]['uuid'] == nights.disk(key)['uuid']
        assert (int(record['virtual_size']), dump['SR'][record['SR']]['uuid']) == (
            current['disks'][key]['size'], current['disks'][key]['sr'])
    assert set(disks) == set(nights.held[copy])
    assert not [key for record in list(found.values()) + list(dump['VDI'].values()) for key in record['other_config']
                if key.startswith('vmbackup')]
    blocks = hashlib.sha256(nights.shelf.read('web', copy, 'blocks')).hexdigest()
    assert (current['copy'], current['blocks'], ledger['leaving'], ledger['distrust']) == (copy, blocks, [], '')
    assert (ledger['kind'], ledger['vm'], ledger['vm_name'], ledger['folder'], ledger['config']) == (
        nights.kind, machine(nights.pool, 'web')['uuid'], 'web', 'web', os.path.realpath(nights.shelf.config_path))
    assert list(ledgers(nights.shelf)) == ['%s-%s.json' % (ledger['vm'], ledger['kind'])]
    assert not nights.shelf.journals()
    return True


def exports(pool: Pool, seen: int) -> List[List[str]]:
    """The words of each export of disks by xe, but for filename=, since the journal had so many entries."""
    found = [entry for entry in pool.journal()[seen:] if entry['via'] == 'xe' and entry['call'] in ('vm-export', 'vdi-export')]
    return [[entry['call']] + [word for word in entry['args'] if word != 'filename='] for entry in found
            if 'metadata=true' not in entry['args']]


def reading(nights: Nights, copy: str) -> Dict[str, Tuple[str, str]]:
    """How each disk of the copy was read, and why so."""
    return {one['key']: (one['how'], one['why']) for one in nights.shelf.manifest('web', copy)['disks']}


def how(nights: Nights, copy: str) -> List[str]:
    return [word for word, _ in reading(nights, copy).values()]


def why(nights: Nights, copy: str) -> str:
    """The reason that all disks have."""
    reason, = {reason for _, reason in reading(nights, copy).values()}
    return reason


# --- Nights with a reference ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('lines', [VM + ('compress=gzip',), RAW, VHD + ('compress=gzip',)], ids=['vm-gzip', 'raw', 'vhd-gzip'])
def test_each_night_reads_what_changed_keeps_one_reference_and_comes_back(some_nights: Any, lines: Any) -> None:
    nights = some_nights(*lines, KEEP)
    first = nights.night()
    assert set(how(nights, first)) == {'full'} and why(nights, first) == FIRST and is_the_reference(nights, first)
    for number, units in ((1, 1), (2, 3), (3, 0)):
        if number == 1:
            nights.write(2)
        elif number == 2:
            nights.write(2, zero=True)
            nights.write(0)
            nights.write(9)                         # the last 512 bytes
            if nights.kind == 'vm-export':
                nights.write(5, device='xvdb')
                units += 1
        old, seen = set(snapshots(nights.pool)), len(nights.pool.journal())
        copy = nights.night()
        assert set(how(nights, copy)) == {'difference'} and is_the_reference(nights, copy)
        assert old.isdisjoint(snapshots(nights.pool))
        asked = exports(nights.pool, seen)
        assert len(asked) == len(nights.held[copy]) and {words[0] for words in asked} == {'vdi-export'}, asked
        assert {words[2][len('base='):] for words in asked} <= old and {words[3] for words in asked} == {'format=vhd'}, asked
        came = sum(entry['bytes'] for entry in nights.pool.journal()[seen:] if entry['call'] == '/export_raw_vdi')
        assert came <= units * (2 * MEBIBYTE + 512) + 5000 * len(asked), 'only what changed is read'
        assert not [entry for entry in nights.pool.journal()[seen:] if entry['call'] == 'VM.set_is_a_template']
        assert 'read by difference' in nights.run.stdout, nights.run
    assert increments(nights.shelf, 'web') == [False, True, True, True]
    assert [len(words) < 4 or 'format=vhd' in words for words in exports(nights.pool, 0)] == [True] * len(exports(nights.pool, 0))
    assert nights.all_are_good()
    assert nights.restored_problem(copy) == '' and nights.extracted_problem(copy) == '' and nights.by_hand_problem(copy) == ''


def test_a_block_of_the_difference_that_did_not_change_is_not_stored(some_nights: Any) -> None:
    """A difference is often a superset: of zeros over zeros, of a VM that was reverted, of disks that were coalesced."""
    nights = some_nights(*VM, KEEP, disks=ONE, snapshots=[{'name_label': 'before the update'}])
    nights.night()
    nights.write(6, zero=True)                      # where there never was anything
    zeros = nights.night()
    assert not read_vhd(stored(nights.shelf, 'web', zeros, 'xvda')[0]).blocks and 6 not in [
        row.number for row in rows(nights.shelf, 'web', zeros)['xvda']]
    nights.write(3)
    nights.night()
    run = nights.pool.xe('snapshot-revert', 'snapshot-uuid=' + next(
        record['uuid'] for record in nights.pool.dump()['VM'].values() if record['name_label'] == 'before the update'))
    assert run.exit_status == 0, run
    nights.write(0)
    seen = len(nights.pool.journal())
    last = nights.night()
    came = sum(entry['bytes'] for entry in nights.pool.journal()[seen:] if entry['call'] == '/export_raw_vdi')
    assert came > 3 * 2 * MEBIBYTE, 'units 1 and 3 went back to what they were before they were written, unit 0 changed'
    assert list(read_vhd(stored(nights.shelf, 'web', last, 'xvda')[0]).blocks) == [0, 1]
    assert [how(nights, copy) for copy in nights.copies()] == [['full']] + [['difference']] * 3
    assert nights.all_are_good() and nights.restored_problem(last) == ''


# Fields of the archive of a full that the server alone sets, when it makes a snapshot or exports one, and no import looks for.
OF_A_SNAPSHOT = {'children', 'domid', 'snapshot_info', 'snapshot_metadata', 'snapshot_time', 'snapshot_of', 'snapshots',
                 'transportable_snapshot_id', 'location', 'resident_on', 'affinity', 'uuid', 'other_config', 'VDIs'}
KINDS_TOLD = ('VBD', 'VIF', 'VDI', 'SR', 'network')


def told_of(ova: bytes) -> Dict[Any, Any]:
    """The objects of an ova.xml by class and name, and what they tell; the names of other objects in the place of their ids."""
    found = {}
    objects = value_of(ElementTree.fromstring(ova))['objects']
    drives = {one['snapshot']['VDI']: one['snapshot']['userdevice'] for one in objects if one['class'] == 'VBD'}
    names = {one['id']: (one['class'], drives.get(one['id']) or str(one['snapshot'].get('userdevice') or one['snapshot'].get(
        'device') or one['snapshot']['name_label'])) for one in objects if one['class'] in KINDS_TOLD}
    names.update({one['id']: 'VM' for one in objects if one['class'] == 'VM'})

    def name_of(value: Any) -> Any:
        return names.get(value, 'what is not there' if re.match('Ref:|OpaqueRef:', value) else value)

    for one in objects:
        if one['class'] in ('VM',) + KINDS_TOLD:
            assert names[one['id']] not in found
            found[names[one['id']]] = {
                field: sorted(map(name_of, value)) if isinstance(value, list) else
                name_of(value) if isinstance(value, str) else value
                for field, value in one['snapshot'].items() if field not in OF_A_SNAPSHOT}
    return found


@pytest.mark.parametrize('state', ['Running', 'Suspended'])
def test_the_metadata_of_what_was_read_by_difference_are_those_that_a_full_of_it_has(some_nights: Any, state: str) -> None:
    nights = some_nights(*VM, KEEP, 'exclude-disk=web/xvdc', disks=[*ONE, disk(seed=8), disk(seed=9)], power_state=state,
                         memory=8 * MEBIBYTE, vifs=[{'device': '0'}, {'device': '2'}], cds=[{'userdevice': '3', 'empty': True}],
                         snapshots=1, tags=['web'], other_config={'folder': '/a'})
    everything = nights.disks
    nights.disks = lambda: {device: content for device, content in everything().items() if device != 'xvdc'}
    first, second = nights.night(), nights.night()
    assert set(how(nights, second)) == {'difference'}
    full, ours = (told_of(read_tar(nights.shelf.read('web', first, 'web.xva'))[0][0].content),
                  told_of(nights.shelf.read('web', second, 'ova.xml')))
    for told in (full, ours):
        told['VM']['name_label'] = re.sub('[0-9]', '#', told['VM']['name_label'])
    assert full['VM']['name_label'] == 'web (backup ####-##-## ##:##:##)'
    assert set(full) == set(ours) and ('VDI', '2') not in ours
    for name, facts in full.items():
        assert {field: value for field, value in facts.items() if ours[name].get(field, '?') != value} == {}, name
    assert nights.restored_problem(first) == nights.restored_problem(second) == ''
    one, other = [machine_in(nights.pool.dump(), record['name_label']) for record in nights.pool.dump()['VM'].values()
                  if record['name_label'].startswith('back')]
    assert set(differences(one, other)) == {'name_label'}


def test_a_vm_with_two_drives_on_one_disk_and_one_without_disks(some_nights: Any) -> None:
    nights = some_nights(*VM, KEEP, disks=ONE)
    nights.attach('xvde', nights.disk('xvda')['uuid'])
    nights.night()
    nights.write(3)
    copy = nights.night()
    assert how(nights, copy) == ['difference'] * 2 and nights.problem(copy) == '' and nights.restored_problem(copy) == ''
    nights.detach('xvde')
    nights.detach('xvda')
    for _ in range(2):
        copy = nights.night()
        assert not is_increment(nights.shelf, 'web', copy) and 'foretold' not in nights.shelf.names('web', copy)
        assert 'web (%s): .' % uuid_of('web')[:8] not in nights.run.stdout, nights.run


# --- What is told ---------------------------------------------------------------------------------------------------------

def test_log_list_preview_and_mail_tell_how_the_disks_were_read_and_why_not_by_difference(
        some_nights: Any, mail_server: MailServer) -> None:
    nights = some_nights(*VM, KEEP, *mail_server.lines('mail_when=always'), disks=ONE)

    def foreseen(words: str) -> bool:
        before = nights.shelf.tree()
        text = preview(nights.pool, nights.shelf, *nights.lines).stdout
        assert nights.shelf.tree() == before and '      %s\n' % words in text, text
        return True

    def was_told(copy: str, words: str) -> bool:
        assert '; %s\n' % words in mail_server.mails()[-1].text, mail_server.mails()[-1].text
        assert 'web (%s): %s.\n' % (uuid_of('web')[:8], words) in nights.run.stdout, nights.run
        assert words.split(';')[0] in told(nights, copy), told(nights, copy)
        return True

    assert foreseen('all of it will be read, as ' + FIRST)
    first = nights.night()
    assert was_told(first, 'read whole, as ' + FIRST)
    assert foreseen('what differs from the reference of %s will be read' % first)
    second = nights.night()
    assert was_told(second, 'read by difference')
    nights.add('xvdc', 4 * MEBIBYTE)
    third = nights.night()
    assert was_told(third, 'read whole, as disk xvdc is not in the reference; not audited: 1 copy read by difference')
    nights.grow(9 * MEBIBYTE)
    fourth = nights.night()
    assert was_told(fourth, "read whole, as the reference's disk xvda has another size")
    nights.detach('xvdc')
    fifth = nights.night()
    assert was_told(fifth, 'read by difference') and is_the_reference(nights, fifth)

    about = listed(nights)
    assert [about[copy]['reading'][0] for copy in nights.copies()] == [
        {'disk': 'xvda', 'how': 'full', 'why': FIRST}, {'disk': 'xvda', 'how': 'difference', 'why': ''},
        {'disk': 'xvda', 'how': 'all', 'why': 'disk xvdc is not in the reference'},
        {'disk': 'xvda', 'how': 'all', 'why': "the reference's disk xvda has another size"},
        {'disk': 'xvda', 'how': 'difference', 'why': ''}]
    assert [about[copy]['audit'] for copy in nights.copies()] == ['', 'not audited', '', '', 'not audited yet']
    assert ', read by difference, not audited  good' in told(nights, second)
    run = run_program('-', nights.shelf.config(*nights.lines), 'list', 'format=json')
    row, = json.loads(run.stdout)['vms']
    ledger, = ledgers(nights.shelf).values()
    assert row['references'] == [dict(ledger['current'], config=ledger['config'], leaving=False)]
    assert '  reference in the pool: snapshot %s, the state of %s, kept by %s\n' % (
        ledger['current']['uuid'], fifth, ledger['config']) in run_program('-', nights.shelf.config(*nights.lines), 'list').stdout
    assert foreseen('what differs from the reference of %s will be read' % fifth)
    assert 'will be read, and then all of it, to audit that\n' in preview(
        nights.pool, nights.shelf, *nights.lines, FULL_AGAIN).stdout


def test_without_the_setting_nothing_of_it_is_told_or_left(some_nights: Any) -> None:
    nights = some_nights(disks=ONE)
    for _ in range(2):
        copy = nights.night()
        assert not re.search('reference|read (whole|by)|audit', nights.run.output), nights.run
    assert nights.pool.has_no_snapshots_of_ours() and not ledgers(nights.shelf)
    assert not re.search('reference|read whole|audit', told(nights, copy))
    assert 'reference' not in preview(nights.pool, nights.shelf, *nights.lines).stdout


# --- A server that gives no difference, or a wrong one ---------------------------------------------------------------------

NO_DIFFERENCE = 'the server gave no difference of disk xvda'
ALL_SENT = 'the server sent all of it in the place of a difference'


@pytest.mark.parametrize('version, number_of_nights', [('1.249.29', 1), ('24.19.2', 3)])
def test_what_is_no_vhd_is_read_whole_in_the_same_run_and_the_third_night_of_one_reason_warns(
        a_pool: Any, a_shelf: Any, version: str, number_of_nights: int) -> None:
    pool = a_pool(vm('web', disks=ONE), xapi_version=version, srs=[{'name_label': 'zfs', 'type': 'zfs-vol', 'shared': True}])
    nights = Nights(pool, a_shelf(), *VM, KEEP)
    nights.night()
    for number in range(number_of_nights):
        nights.write(number)
        seen = len(pool.journal())
        copy = nights.night(exit_status=0 if number < 2 else 3)
        assert reading(nights, copy) == {'xvda': ('all', NO_DIFFERENCE)} and is_the_reference(nights, copy)
        assert len(pool.calls('api:VM.snapshot')) == number + 2, 'from the same snapshot'
        assert [words[0] for words in exports(pool, seen)] == ['vdi-export', 'vm-export'], nights.run
        assert re.search('no difference can be used: .*on-VHD|is not a vhd', nights.run.stdout), nights.run
    warning = 'disk xvda was read whole 3 nights in a row, as %s.' % NO_DIFFERENCE
    assert (warning in nights.run.stderr) == (number_of_nights == 3), nights.run
    assert nights.problem(copy) == '' and nights.restored_problem(copy) == ''


def test_an_answer_that_is_no_whole_difference_is_not_believed_and_all_is_read_in_the_same_run(some_nights: Any) -> None:
    """A full in its place is taken as one: that costs no second export of a disk by itself."""
    nights = some_nights(*RAW, KEEP, disks=ONE)
    nights.night()
    for fault, words in (
            ({'exit': 1, 'stderr': 'The server said no\n'}, NO_DIFFERENCE),
            ({'truncate': 3 * MEBIBYTE, 'silent': True}, NO_DIFFERENCE), ({'full': True}, ALL_SENT),
            ({'flips': 70}, NO_DIFFERENCE), ({'kill': 'xe'}, NO_DIFFERENCE)):
        is_of_stream = set(fault) & {'truncate', 'flips'}
        serving(nights.pool, at('http:/export_raw_vdi' if is_of_stream else 'xe:vdi-export', nth=1, **fault))
        nights.write(2)
        nights.write(6)
        seen = len(nights.pool.journal())
        copy = nights.night('max_backups=20')
        assert reading(nights, copy) == {'xvda': ('all', words)} and is_the_reference(nights, copy), (fault, nights.run)
        assert len(nights.pool.calls('api:VDI.snapshot')) == len(nights.copies()), 'from the same snapshot'
        asked = [['base=' in ' '.join(one), 'format=vhd' in one] for one in exports(nights.pool, seen)]
        assert asked == [[True, True]] + [[False, False]] * (words == NO_DIFFERENCE), (fault, nights.run)
        assert list(read_vhd(stored(nights.shelf, 'web', copy, 'xvda')[0]).blocks) == [1, 3]
    assert increments(nights.shelf, 'web') == [False] + [True] * 5
    assert nights.all_are_good() and nights.restored_problem(copy) == ''


def test_where_a_difference_hangs_before_its_first_byte_the_second_try_reads_everything(some_nights: Any) -> None:
    nights = some_nights(*VM, KEEP, disks=ONE)
    nights.night()
    nights.write(2)
    serving(nights.pool, at('http:/export_raw_vdi', hangs=True))
    held = nights.disks()
    run = hurried_backup(nights.pool, nights.shelf, *nights.lines, 'stall_timeout=8')
    assert run.exit_status == 3 and run.says('no sign of life') and run.says('it needed a second try'), run
    last = nights.copies()[-1]
    nights.held[last] = held
    assert how(nights, last) == ['all'] and why(nights, last) == 'the first try to read against it failed'
    assert is_the_reference(nights, last) and nights.all_are_good()


# --- The audit ------------------------------------------------------------------------------------------------------------

def lying(nights: Nights, *numbers: int) -> None:
    """The server leaves the first block out of the differences of these numbers, counted from now on."""
    serving(nights.pool, *(at('xe:vdi-export', nth=number, omit=1) for number in numbers))


def test_a_difference_that_left_a_block_out_is_found_by_the_next_full_and_nothing_read_so_is_trusted(
        some_nights: Any, mail_server: MailServer) -> None:
    nights = some_nights(*VM, KEEP, *mail_server.lines(), 'max_backups=20', disks=ONE)
    first = nights.night()
    nights.write(6)
    second = nights.night()
    lying(nights, 1)
    nights.write(2)
    nights.write(4)
    third = nights.night()                          # does not know of MiB 2
    nights.write(0)
    fourth = nights.night()
    assert nights.problem(second) == '' and 'MiB 2 is not what the disk held' in nights.problem(third)
    assert nights.verify().exit_status == 0 and good(nights) == [first, second, third, fourth], 'no check of files can know'

    seen = len(nights.pool.journal())
    fifth = nights.night(FULL_AGAIN, exit_status=1)
    lie = 'MiB 2 of disk xvda holds something else than the difference to the reference says'
    suspects = [second, third, fourth]
    assert [words[0] for words in exports(nights.pool, seen)] == ['vdi-export', 'vm-export']
    assert 'the audit of its differences failed: %s.' % lie in nights.run.stderr, nights.run
    for text in (nights.run.stderr, mail_server.mails()[-1].text):
        text = ' '.join(text.split())
        assert 'SUSPECT from now on: %s. Restore from other copies.' % ', '.join(suspects) in text, text
        assert '%s, which was read whole, is kept and good' % fifth in text and 'forget-references' in text, text
    ending = nights.shelf.status_lines()[-2:]
    assert 'end,SUCCESS web' in ending[0] and 'end,ERROR,S:1 W:0 E:1' in ending[1], 'the new copy is there, and all is not well'
    assert nights.run.says('ERROR: 1 VM backed up'), nights.run
    assert nights.pool.has_no_snapshots_of_ours(), 'the reference is not trusted either'
    assert nights.problem(fifth) == '' and nights.restored_problem(fifth) == ''

    about = listed(nights)
    assert good(nights) == [first, fifth] and [about[copy]['audit'] for copy in suspects] == ['SUSPECT'] * 3
    assert lie in about[third]['problem'] and 'NOT GOOD (SUSPECT, by the audit of ' in told(nights, third)
    run = nights.verify()
    assert run.exit_status == 1 and run.stdout.count('\nSUSPECT ') == 3 and good(nights) == [first, fifth], run
    os.rename(nights.shelf.at('.vmbackup', 'verdicts'), nights.shelf.at('.vmbackup', 'lost'))
    assert good(nights) == [first, fifth], 'the manifest of the copy that was audited tells it, too'
    os.rename(nights.shelf.at('.vmbackup', 'lost'), nights.shelf.at('.vmbackup', 'verdicts'))
    run = restore(nights.pool, nights.shelf, 'from=' + nights.shelf.at('web', third), 'to=by path', lines=nights.lines)
    assert run.exit_status == 0 and run.says('SUSPECT'), run

    # nor is it taken for a restore, a drill or retention, unless it is named
    shutil.move(nights.shelf.at('web', fifth), nights.shelf.home)
    run = restore(nights.pool, nights.shelf, 'web', 'to=latest', lines=nights.lines)
    assert run.exit_status == 0 and nights.machine_problem('latest', nights.held[first]) == '', run
    assert first in drill(nights.pool, nights.shelf, 'web', lines=nights.lines).stdout
    run = restore(nights.pool, nights.shelf, 'web', 'from=' + fourth[len('backup-'):], 'to=named', lines=nights.lines)
    assert run.exit_status == 0 and run.says('SUSPECT'), run
    assert 'MiB 2 is not' in nights.machine_problem('named', nights.held[fourth])
    shutil.move(os.path.join(nights.shelf.home, fifth), nights.shelf.at('web', fifth))
    run = run_program('-', nights.shelf.config(*nights.lines), 'prune', 'web', 'max_backups=2', 'preview')
    assert not re.search('would remove: web/(%s|%s)' % (first, fifth), run.stdout), run

    # all is read whole until somebody says otherwise
    for _ in range(3):
        copy = nights.night(exit_status=3)
        assert set(how(nights, copy)) == {'all'} and 'forget-references' in why(nights, copy), nights.run
        assert nights.pool.has_no_snapshots_of_ours()
    assert nights.shelf.manifest('web', copy)['layer']['full'] == fifth
    assert 'all of it will be read, as its audit found' in preview(nights.pool, nights.shelf, *nights.lines).stdout
    run = run_program('-', nights.shelf.config(*nights.lines), 'forget-references', environment=nights.pool.environment())
    assert run.exit_status == 0 and not ledgers(nights.shelf), run
    assert why(nights, nights.night()) == FIRST and how(nights, nights.night()) == ['difference']


@pytest.mark.parametrize('lines, device, write', [
    (VM, 'xvdb', dict(first=1)), (RAW, 'xvda', dict(first=2, zero=True)), (VHD, 'xvda', dict(first=7))],
    ids=['the-second-disk', 'became-zero', 'was-zero'])
def test_a_lie_is_found_in_every_disk_and_wherever_zeros_came_or_went(some_nights: Any, lines: Any, device: str,
                                                                      write: Any) -> None:
    nights = some_nights(*lines, KEEP)
    nights.night()
    nights.write(0)
    nights.write(0, device='xvdb')
    nights.night()
    nights.write(device=device, **write)
    lying(nights, 2 if device == 'xvdb' else 1)
    liar = nights.night()
    assert 'MiB %d is not what' % write['first'] in nights.problem(liar)
    last = nights.night(FULL_AGAIN, 'compress=gzip', exit_status=1)
    assert 'MiB %d of disk %s holds' % (write['first'], device) in nights.run.stderr, nights.run
    assert good(nights) == [nights.copies()[0], last] and nights.problem(last) == ''


def test_a_lie_that_was_written_over_since_is_not_found_and_not_claimed(some_nights: Any) -> None:
    nights = some_nights(*VM, KEEP, disks=ONE)
    nights.night()
    nights.write(2)
    lying(nights, 1)
    liar = nights.night()
    nights.write(2)
    third = nights.night()
    nights.write(6)
    last = nights.night(FULL_AGAIN)
    assert 'read whole, as a full is made; audited: 2 copies read by difference' in nights.run.stdout, nights.run
    day = '-'.join(last.split('-')[1:4])
    assert [listed(nights)[copy]['audit'] for copy in (liar, third, last)] == ['audited on ' + day] * 2 + ['']
    assert good(nights) == nights.copies() and 'read by difference, audited on ' + day in told(nights, third)
    assert nights.problem(liar) != '' and nights.problem(third) == nights.problem(last) == ''
    assert is_the_reference(nights, last) and how(nights, nights.night()) == ['difference']


def test_a_full_without_a_usable_reference_or_difference_leaves_what_was_read_so_not_audited(
        some_nights: Any, mail_server: MailServer) -> None:
    nights = some_nights(*VM, KEEP, *mail_server.lines('mail_when=always'), 'max_backups=20', disks=ONE)
    for reason in ('gone', 'full'):
        nights.night()
        nights.write(2)
        read = [nights.night(), nights.night()]
        if reason == 'gone':
            current, = ledgers(nights.shelf).values()
            assert nights.pool.xe('snapshot-uninstall', 'uuid=' + current['current']['uuid'], 'force=true').exit_status == 0
        else:
            serving(nights.pool, at('xe:vdi-export', nth=1, full=True))
        last = nights.night(FULL_AGAIN)
        assert "as the reference's disk xvda is gone" in nights.run.stdout or reason == 'full', nights.run
        # the night after the first full is the first of the second round
        count = len(read) if reason == 'gone' else 3
        for text in (nights.run.stdout, mail_server.mails()[-1].text):
            assert 'not audited: %d copies read by difference' % count in ' '.join(text.split()), text
        assert {listed(nights)[copy]['audit'] for copy in read} == {'not audited'}
        assert ', not audited  good' in told(nights, read[0])
        assert is_the_reference(nights, last) and nights.problem(last) == ''


@pytest.mark.parametrize('records', ['written', 'lost'])
def test_a_run_that_died_between_the_record_of_its_audit_and_its_seal_leaves_what_it_found_on_record(
        some_nights: Any, records: str) -> None:
    nights = some_nights(*VM, KEEP, disks=ONE)
    first, second = a_lie(nights)
    run = Process(['-', nights.shelf.config(*nights.lines, FULL_AGAIN)], nights.pool.environment(),
                  in_trouble(nights.pool, at=['SHA256SUMS'], do='hang'))
    assert eventually(lambda: any(ledger['distrust'] for ledger in ledgers(nights.shelf).values())
                      and second not in good(nights)), run.output
    run.kill()
    assert nights.copies() == [first, second] and good(nights) == [first]
    if records == 'lost':
        shutil.rmtree(nights.shelf.at('.vmbackup', 'verdicts'))
        assert good(nights) == [first, second], 'only the ledger tells it'
    nights.write(4)
    third = nights.night(exit_status=3)
    assert nights.run.says('its audit found that a difference left out what had changed'), nights.run
    assert nights.shelf.manifest('web', third)['layer']['base'] == ('' if records == 'lost' else first), 'the newest good copy'
    assert set(how(nights, third)) == {'full' if records == 'lost' else 'all'} and good(nights) == [first, third]
    assert nights.problem(third) == '' and nights.pool.has_no_snapshots_of_ours() and nights.shelf.unfinished() == []


def a_lie(nights: Nights) -> List[str]:
    """A full, and a difference that left a block out."""
    first = nights.night()
    nights.write(2)
    lying(nights, 1)
    return [first, nights.night()]


def night_in_trouble(nights: Nights, **trouble: Any) -> Any:
    """A night on which a full is due, on a machine in that trouble, has ended."""
    held, before = nights.disks(), nights.copies()
    run = Process(['-', nights.shelf.config(*nights.lines, FULL_AGAIN)], nights.pool.environment(),
                  in_trouble(nights.pool, **trouble)).ending()
    nights.held.update({copy: held for copy in nights.copies() if copy not in before})
    assert run.exit_status == 1 and re.search(r'SUSPECT from now on: [^.]*%s[^.]*\. Restore' % before[-1], run.stderr), run
    return run


def test_a_lie_is_told_where_the_new_copy_can_not_be_written_and_that_is_not_said_to_be_kept(some_nights: Any) -> None:
    nights = some_nights(*VM, KEEP, disks=ONE)
    first, second = a_lie(nights)
    run = night_in_trouble(nights, at=['SHA256SUMS'], do='ENOSPC')
    assert run.never_says('is kept and good') and nights.copies() == [first, second] and good(nights) == [first], run


@pytest.mark.parametrize('stays', [False, True])
@pytest.mark.parametrize('below', ['references', 'verdicts'])
def test_what_an_audit_found_is_not_lost_where_it_can_not_be_written(some_nights: Any, below: str, stays: bool) -> None:
    nights = some_nights(*VM, KEEP, disks=ONE)
    first, second = a_lie(nights)
    run = night_in_trouble(nights, store=nights.shelf.path, below='.vmbackup/' + below, step=1, do='ENOSPC', stays=stays)
    third = nights.copies()[-1]
    assert '%s, which was read whole, is kept and good' % third in run.stderr and nights.problem(third) == '', run
    assert good(nights) == [first, third] and listed(nights)[second]['audit'] == 'SUSPECT'
    assert ('what the audit found of %s is not on record: ' % second in run.stderr) == (below == 'verdicts'), run
    for _ in range(2):
        fourth = nights.night(exit_status=3)
        assert set(how(nights, fourth)) == {'all'} and 'forget-references' in why(nights, fourth), nights.run
        ledger, = ledgers(nights.shelf).values()
        assert nights.pool.has_no_snapshots_of_ours() and ledger['distrust'] and not ledger['current']
    shutil.move(nights.shelf.at('web', third), nights.shelf.home)
    assert second not in good(nights), 'it is on record by now'


def test_a_copy_that_alone_tells_what_its_audit_found_stays_until_that_is_on_record(some_nights: Any) -> None:
    nights = some_nights(*VM, KEEP, FULL_AGAIN, disks=ONE)
    nights.night()
    nights.lines = tuple(line for line in nights.lines if line != FULL_AGAIN)
    for number in range(3):
        nights.write(2 * number)
        if number == 0:
            lying(nights, 1)
        nights.night()
    first, *suspects = nights.copies()
    mark = hashlib.sha256(nights.shelf.read('web', suspects[-1], 'backup.json')).hexdigest()[:32]
    verdict = nights.shelf.at('.vmbackup', 'verdicts', mark + '.json')
    os.makedirs(os.path.join(verdict, 'in the way'))
    trace = os.path.join(nights.shelf.home, 'trace')
    run = night_in_trouble(nights, store=nights.shelf.path, below='.vmbackup/verdicts', trace=trace)
    fifth = nights.copies()[-1]
    assert 'what the audit found of %s is not on record' % suspects[-1] in run.stderr, run
    assert good(nights) == [first, fifth] and {listed(nights)[copy]['audit'] for copy in suspects} == {'SUSPECT'}
    with open(trace) as file:
        steps = file.read().split()
    order = []
    for copy in suspects[:2]:
        mark = hashlib.sha256(nights.shelf.read('web', copy, 'backup.json')).hexdigest()[:32]
        with open(nights.shelf.at('.vmbackup', 'verdicts', mark + '.json')) as file:
            assert json.load(file)['audit'] == 'SUSPECT'
        order.append(steps.index(next(step for step in steps if mark in step)))
    assert order[0] > order[1], 'the newest first'
    for _ in range(3):
        nights.night(FULL_AGAIN, 'max_backups=1', exit_status=3)
        assert fifth in nights.copies(), nights.run
    assert first not in nights.copies() and '%s is SUSPECT' % suspects[-1] in run_program(
        '-', nights.shelf.config(*nights.lines, 'max_backups=1'), 'list', 'web').stdout
    shutil.rmtree(verdict)
    for _ in range(2):
        nights.night(FULL_AGAIN, 'max_backups=1', exit_status=3)
    assert fifth not in nights.copies() and not set(suspects).intersection(good(nights)), nights.run


def test_retention_goes_on_in_the_night_that_finds_a_lie_and_counts_no_suspect_copy(some_nights: Any) -> None:
    nights = some_nights(*VM, KEEP, disks=ONE)
    nights.night(FULL_AGAIN)
    second = nights.night(FULL_AGAIN)
    lying(nights, 1)
    suspects = []
    for first in (2, 4):
        nights.write(first)
        suspects.append(nights.night())
    last = nights.night(FULL_AGAIN, 'max_backups=2', exit_status=1)
    assert nights.copies() == [second] + suspects + [last] and good(nights) == [second, last], nights.run


def test_nights_of_random_writes_are_audited_and_nothing_is_claimed(some_nights: Any) -> None:
    chance = random.Random(15)
    nights = some_nights(*VM, KEEP, 'full_every=3', 'max_backups=20', disks=[
        disk(size=11 * MEBIBYTE + 512, used=[[0, 5]], seed=7), disk(size=6 * MEBIBYTE, used=[[3, 2]], seed=8)])
    for night in range(8):
        nights.night()
        for _ in range(chance.randrange(5)):
            device, mebibytes = chance.choice([('xvda', 12), ('xvdb', 6)])
            first = chance.randrange(mebibytes)
            nights.write(first, min(chance.choice([1, 1, 3]), mebibytes - first), device, zero=chance.random() < 0.4)
    about = listed(nights)
    fulls = [number for number, is_one in enumerate(increments(nights.shelf, 'web')) if not is_one]
    assert len(fulls) >= 3 and not [path for path in nights.shelf.tree() if 'foretold' in path], fulls
    for number, copy in enumerate(nights.copies()):
        wanted = '' if number in fulls else 'audited' if number < fulls[-1] else 'not audited yet'
        assert about[copy]['audit'].split(' on ')[0] == wanted, (copy, about[copy])
    assert nights.all_are_good() and nights.restored_problem(nights.copies()[-1]) == ''


# --- forget-references ------------------------------------------------------------------------------------------------------

LINES = ('vm-export=web', 'vdi-export=db', 'incremental=yes', KEEP)


def forget(pool: Pool, shelf: Shelf, *words: str, **options: Any) -> Any:
    return backup(pool, shelf, *LINES, words=['forget-references'] + list(words), **options)


def test_references_are_forgotten_of_one_vm_by_name_or_uuid_or_of_all(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', disks=2), vm('db')), a_shelf()
    assert forget(pool, shelf).says('No reference is on record.')

    def kept() -> List[str]:
        assert backup(pool, shelf, *LINES).exit_status == 0
        assert sorted(record['name_label'].split(' (')[0] for record in snapshots(pool).values()) == [
            '', '', 'db xvda', 'web'] and len(ledgers(shelf)) == 2
        return [ledger['current']['uuid'] for ledger in ledgers(shelf).values()]

    kept()
    run = forget(pool, shelf, 'nobody')
    assert run.exit_status == 2 and 'no reference of nobody is on record' in run.stderr and len(snapshots(pool)) == 4, run
    run = forget(pool, shelf, 'web')
    assert run.exit_status == 0 and run.says('no reference of it is in the pool any more'), run
    assert [record['name_label'].split(' (')[0] for record in snapshots(pool).values()] == ['db xvda']
    assert [ledger['vm_name'] for ledger in ledgers(shelf).values()] == ['db']
    run = forget(pool, shelf, 'uuid:' + uuid_of('db').upper())
    assert run.exit_status == 0 and pool.has_no_snapshots_of_ours() and not ledgers(shelf), run
    assert forget(pool, shelf, 'db').exit_status == 2
    kept()
    run = forget(pool, shelf)
    assert run.exit_status == 0 and run.stdout.count('no reference of it is in the pool any more') == 2, run
    assert pool.has_no_snapshots_of_ours() and not ledgers(shelf) and not shelf.journals()


def test_references_of_a_busy_vm_of_an_unreadable_ledger_and_of_another_store_are_left(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web', disks=2), vm('db')), a_shelf()
    assert backup(pool, shelf, *LINES).exit_status == 0
    before = ledgers(shelf)
    with VmBackup.Catalog(shelf.path).folder_lock('web').held() as is_ours:
        run = forget(pool, shelf, 'lock_wait=0')
    assert is_ours and run.exit_status == 1 and run.says('another run is busy with it'), run
    assert [ledger['vm_name'] for ledger in ledgers(shelf).values()] == ['web'] and len(snapshots(pool)) == 3

    path, = glob.glob(shelf.at('.vmbackup', 'references', '*', '*'))
    with open(path, 'w') as file:
        file.write('{"current": ')
    for words in ([], ['web'], ['uuid:' + uuid_of('web')]):
        run = forget(pool, shelf, *words)
        assert run.exit_status == 1 and path in run.output and len(snapshots(pool)) == 3, run
        assert 'No reference is on record' not in run.output and 'no reference of web' not in run.output, run

    ledger, = [ledger for ledger in before.values() if ledger['vm_name'] == 'web']
    write_json(path, dict(ledger, store='0123456789abcdef'))
    run = forget(pool, shelf, 'web')
    assert run.exit_status == 3 and run.says('came here from another store, or this one was moved, so it is left alone') and len(snapshots(pool)) == 3, run
    write_json(path, ledger)
    assert forget(pool, shelf, 'web').exit_status == 0 and pool.has_no_snapshots_of_ours() and not ledgers(shelf)
