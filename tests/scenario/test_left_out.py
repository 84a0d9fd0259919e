"""Disks that a config leaves out of a backup: neither their blocks nor their space cost anything, all the rest is backed up,
and whoever looks at the copy is told what is not in it and by which line."""

import contextlib
import json
import os
import re
import signal
from typing import Any, Dict, Iterator, List

import pytest

from support.archive import read_tar
from support.deeds import Process, backup, beginning, hurried_backup, objects, preview, without_pool
from support.language import MEBIBYTE, at, disk, uuid_of, vm
from support.process import CRON_PATH, Pool, Run, run as run_command
from support.recovery import destroy, disks_of, drill, extract, holds, machine, restore, serving
from support.shelf import Shelf, complete, disk_content, unpacked
from support.wire import eventually

NEW, OLD = '21.4.0', '21.3.0'              # the first server that is told which disks to ignore, and the last that is not
ROOT = disk(seed=11, name_label='root')
DATA = disk(seed=12, name_label='data', used=[[1, 2]])
SWAP = disk(seed=13, name_label='swap', used=[[2, 2]])
LINE = 'exclude-disk=web/xvdb'
LINES = ('vm-export=*', LINE)
STORE = {'name_label': 'store', 'type': 'nfs', 'shared': True}
IMAGES = {'name_label': 'images', 'type': 'iso', 'shared': True}


def by(shelf: Shelf, line: str = LINE, number: int = 5) -> str:
    """That config line with its place, as people are told of it."""
    return '%s (%s:%d)' % (line, shelf.config_path, number)


def told_of(shelf: Shelf, where: str = 'this copy') -> str:
    """What is told of web's data disk wherever the copy is used."""
    by_line = shelf.manifest('web', shelf.newest('web'))['left-out'][0]['by']
    assert by_line.startswith(LINE + ' (/') and by_line.endswith('/weekend.cfg:5)')
    return 'disk xvdb data (4.0 MiB) is not in %s, as it was left out by %s' % (where, by_line)


def web(**facts: Any) -> Dict[str, Any]:
    """A VM with a disk that stays, one that is left out, and one behind it that stays."""
    return vm('web', **dict(dict(disks=[ROOT, DATA, SWAP], power_state='Running'), **facts))


def held(shelf: Shelf, name: str = 'web') -> List[str]:
    """The devices of the disks in the newest copy, by its manifest."""
    return [row['device'] for row in shelf.manifest(name, shelf.newest(name))['disks']]


def missing(shelf: Shelf, name: str = 'web') -> List[str]:
    """The devices of the disks that its manifest tells to be left out, and only they have the file that says so."""
    copy = shelf.newest(name)
    told = [row['device'] for row in shelf.manifest(name, copy)['left-out']]
    marked = [folder[len('DISK-'):] for folder in shelf.names(name, copy)
              if folder.startswith('DISK-') and 'left-out' in shelf.names(name, copy, folder)]
    assert sorted(told) == sorted(marked), (told, marked)
    return sorted(told)


def image(shelf: Shelf, name: str = 'web') -> bytes:
    copy = shelf.newest(name)
    return unpacked(shelf.read(name, copy, shelf.image(name, copy)), shelf.image(name, copy))


def imported(pool: Pool, shelf: Shelf, name: str = 'web') -> Dict[str, bytes]:
    """The disks, by userdevice, of the VM that `xe vm-import` makes of the newest archive: nothing of ours takes part."""
    done = pool.xe('vm-import', 'filename=' + shelf.at(name, shelf.newest(name), shelf.image(name, shelf.newest(name))))
    assert done.exit_status == 0, done
    dump = pool.dump()
    record, = [record for record in dump['VM'].values() if record['uuid'] == done.stdout.strip()]
    drives = [dump['VBD'][ref] for ref in record['VBDs']]
    return {drive['userdevice']: pool.read(dump['VDI'][drive['VDI']]['uuid']) for drive in drives if drive['type'] == 'Disk'}


def snapshots_of(pool: Pool, name: str) -> List[str]:
    """The uuids of all snapshots of the disk of that name."""
    dump = pool.dump()['VDI']
    return [record['uuid'] for record in dump.values() if record['is_a_snapshot'] and record['name_label'] == name]


def is_as_before(pool: Pool, before: Dict[str, Any]) -> bool:
    now = objects(pool)
    return all(now[kind] == before[kind] for kind in ('VM', 'VDI', 'VBD', 'VIF', 'message'))


def never_sent_too_much(pool: Pool) -> bool:
    return 'MESSAGE_PARAMETER_COUNT_MISMATCH' not in json.dumps(pool.journal())


@contextlib.contextmanager
def calling(pool: Pool, shelf: Shelf, call: str) -> Iterator[Process]:
    """A run of LINES that has made such a call and is held there by a fault."""
    with beginning(pool, shelf, *LINES) as process:
        assert eventually(lambda: pool.calls(call) or process.is_over()), process.output
        assert not process.is_over(), process.output
        yield process


def journal_of(shelf: Shelf) -> Iterator[Dict[str, Any]]:
    """The lines of the journals of all runs that are open."""
    for name in shelf.journals():
        for line in shelf.text(name).splitlines():
            yield json.loads(line)


def destroy_all(pool: Pool) -> None:
    """Every VM and its disks are gone."""
    session = pool.session()
    api = session.xenapi
    for ref, record in api.VM.get_all_records().items():
        if not record['is_control_domain'] and not record['is_a_template']:
            if record['power_state'] != 'Halted':
                api.VM.hard_shutdown(ref)
            disks = [api.VBD.get_VDI(vbd) for vbd in record['VBDs'] if api.VBD.get_type(vbd) == 'Disk']
            api.VM.destroy(ref)
            for one in disks:
                api.VDI.destroy(one)
    session.logout()


def warnings_of(run: Run) -> List[str]:
    return [line for line in run.stderr.splitlines() if ' - warning: ' in line]


# --- what a line means ----------------------------------------------------------------------------------------------------

FOUR = [disk(seed=number, size=MEBIBYTE, used=1) for number in range(4)]
DB = vm('db1', disks=FOUR)
MARKED = vm('db1', disks=[disk(seed=0), disk(seed=1, name_label='page file [NOBAK]'), disk(seed=2, name_label='NOBAK'),
                          disk(seed=3, name_label='B')])
MEANT = [('plain', 'plain/xvdb', ['xvdb']), ('class1', 'class1/xvd[c-z]', ['xvdc', 'xvdd']),
         ('both1', 'both*/xvd[c-z]', ['xvdc', 'xvdd']), ('mark1', 'mark?/*[bd]', ['xvdb', 'xvdd']),
         ('whole', '"whole/xvdb"', ['xvdb']), ('name', '"name"/xvdb', ['xvdb']), ('regex12', '/reg.x[0-9]+//xvdd', ['xvdd']),
         ('lower', 'uuid:%s/xvdb' % uuid_of('lower'), ['xvdb']), ('upper', 'uuid:%s/xvdc' % uuid_of('upper').upper(), ['xvdc']),
         ('tagged', 'tag:gold/xvdc', ['xvdc']), ('slash', 'tag:a/b/xvdd', ['xvdd']), ('place', 'place/2', ['xvdc']),
         ('places', 'places/[12]', ['xvdb', 'xvdc']), ('spaces', ' spaces / xvdb ', ['xvdb']),
         ('first', 'first/xvda', ['xvda'])]


def test_a_line_leaves_out_the_disks_that_it_means_and_no_other(a_pool: Any, a_shelf: Any) -> None:
    tags = {'tagged': ['silver', 'gold'], 'slash': ['a/b']}
    pool = a_pool(vm('none', disks=FOUR, tags=['b']), *[vm(name, disks=FOUR, tags=tags.get(name, [])) for name, _, _ in MEANT])
    shelf = a_shelf()
    run = preview(pool, shelf, 'vm-export=*', *['exclude-disk=' + line for _, line, _ in MEANT])
    assert run.exit_status == 0 and not run.says('Warning'), run
    told, name = {'none': {}}, ''
    for line in run.stdout.splitlines():
        vm_line = re.match(r'  (\S+) \([0-9a-f]{8}\): vm-export.* (\d) disks? of', line)
        disk_line = re.match(r'      disk (xvd.) .* is left out by (.*)', line)
        if vm_line:
            name = vm_line.group(1)
            told[name] = {'count': vm_line.group(2)}
        elif disk_line:
            told[name][disk_line.group(1)] = disk_line.group(2)
    assert told.pop('none') == {'count': '4'}
    for number, (name, line, devices) in enumerate(MEANT, 5):
        shown = {device: by(shelf, 'exclude-disk=' + line.strip(), number) for device in devices}
        assert told[name] == dict(shown, count=str(4 - len(devices))), line


NAMED = [('File server 1', '"File server 1/xvdb"'), ('a/b', '"a/b/xvdb"'), ('c/d', 'c/d/xvdb'),
         ('say "hi"', r'"say \"hi\"/xvdb"'), (r'back\slash', r'"back\\slash/xvdb"'), ('star*', '"star*/xvdb"'),
         ('web:2', '"web:2/xvdb"'), ('B\u00fcro', 'B\u00fc*/xvdb'), ('[x]', '"[x]/xvdb"')]


def test_names_with_spaces_slashes_and_quotes_are_meant_in_quotes_around_the_whole(a_pool: Any, a_shelf: Any) -> None:
    small = [disk(seed=number, size=MEBIBYTE, used=1) for number in range(2)]
    names = [name for name, _ in NAMED] + ['star1', 'x', 'DB', 'low']
    lines = [line for _, line in NAMED] + ['db/xvdb', 'low/XVDB']
    pool, shelf = a_pool(*[vm(name, disks=small) for name in names]), a_shelf()
    run = backup(pool, shelf, 'vm-export=*', *['exclude-disk=' + line for line in lines])
    assert run.exit_status == 3 and len(warnings_of(run)) == 2, run
    assert 'exclude-disk=db/xvdb (' in run.stderr and 'exclude-disk=low/XVDB (' in run.stderr, 'capital letters count'
    told = {}
    for folder in shelf.names():
        manifest = shelf.manifest(folder, shelf.newest(folder))
        if missing(shelf, folder):
            told[manifest['vm']['name']] = shelf.text(folder, shelf.newest(folder), 'DISK-xvdb', 'left-out')
    assert told == {name: 'left out by %s\n' % by(shelf, 'exclude-disk=' + line, number)
                    for number, (name, line) in enumerate(NAMED, 5)}


def test_a_line_of_a_regex_config_reads_the_name_as_a_regex_and_the_device_as_a_wildcard(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(DB, vm('web', disks=4)), a_shelf()
    run = backup(pool, shelf, 'vm-export=.*', 'exclude-disk=db.*/xvd[c-z]', 'wildcards=regex')
    assert run.exit_status == 0 and missing(shelf, 'db1') == ['xvdc', 'xvdd'] and missing(shelf) == [], run


def test_the_mark_in_a_disks_name_is_heeded_where_the_config_says_so(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(MARKED), a_shelf()
    run = backup(pool, shelf, 'vm-export=*', 'exclude-disk=[NOBAK]')
    assert run.exit_status == 0 and missing(shelf, 'db1') == ['xvdb'], run
    assert sorted(imported(pool, shelf, 'db1')) == ['0', '2', '3'], 'the word is no wildcard: a disk named B stays'
    assert shelf.manifest('db1', shelf.newest('db1'))['left-out'][0]['by'] == by(shelf, 'exclude-disk=[NOBAK]')


def test_without_that_word_the_mark_leaves_nothing_out_and_preview_points_to_it(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(MARKED), a_shelf()
    shown = preview(pool, shelf, 'vm-export=*')
    assert shown.exit_status == 0 and shown.stdout.count('is not left out: its mark is heeded with exclude-disk=[NOBAK]') == 1
    assert 'xvdb page file [NOBAK]' in shown.stdout.replace('"', ''), shown
    run = backup(pool, shelf, 'vm-export=*')
    assert run.exit_status == 0 and missing(shelf, 'db1') == [] and len(held(shelf, 'db1')) == 4, run
    assert backup(pool, shelf, 'vm-export=*', 'exclude-disk=db1/xvdd').exit_status == 3
    assert missing(shelf, 'db1') == ['xvdd'], 'nor does another line heed it'


def test_the_word_for_the_mark_is_no_warning_where_no_disk_bears_it(a_pool: Any, a_shelf: Any) -> None:
    run = backup(a_pool(web()), a_shelf(), 'vm-export=*', 'exclude-disk=[NOBAK]')
    assert run.exit_status == 0 and run.stderr == '', run


def test_lines_add_up_and_those_on_the_command_line_replace_the_files(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(DB), a_shelf()
    lines = ['vm-export=*', 'exclude-disk=db1/xvdb', 'exclude-disk=db*/xvd[bd]']
    assert backup(pool, shelf, *lines).exit_status == 0
    assert missing(shelf, 'db1') == ['xvdb', 'xvdd']
    assert [row['by'] for row in shelf.manifest('db1', shelf.newest('db1'))['left-out']] == [
        by(shelf, 'exclude-disk=db1/xvdb', 5), by(shelf, 'exclude-disk=db*/xvd[bd]', 6)]
    run = backup(pool, shelf, *lines, words=['exclude-disk=db1/xvdc', 'exclude-disk=db1/xvdd'])
    assert run.exit_status == 3 and missing(shelf, 'db1') == ['xvdc', 'xvdd'], run
    assert len(warnings_of(run)) == 1 and 'disk xvdc' in run.stderr and 'exclude-disk=db1/xvdc (command line)' in run.stderr


BAD = [
    ('web', ['"web"', 'SELECTOR/DEVICE']), ('', ['SELECTOR/DEVICE']), ('/', ['SELECTOR/DEVICE']), ('web/', ['SELECTOR/DEVICE']),
    ('/xvdb', ['SELECTOR/DEVICE']), ('web/ ', ['SELECTOR/DEVICE']), ('"/xvdb"', ['SELECTOR/DEVICE']),
    ('"web/"', ['SELECTOR/DEVICE']), ('[NOBAK]x', ['[NOBAK]x', 'SELECTOR/DEVICE']), ('[nobak]', ['SELECTOR/DEVICE']),
    ('x[NOBAK]', ['SELECTOR/DEVICE']), ('"[NOBAK]"', ['SELECTOR/DEVICE']), ('"web/xvdb', ['quote is not closed']),
    ('web:2/xvdb', [':2', 'quotes']), ('"web":2/xvdb', [':2']), ('web:x/xvdb', ['quotes']), ('web:0/xvdb', ['quotes']),
    ('"web/xvdb":2', ['quote']), ('/web(//xvdb', ['web(', 'unterminated']), ('/web/xvdb', ['/REGEX/']), ('uuid:/xvdb', ['empty']),
    ('tag:/xvdb', ['empty']), ('web/xvdb:2', ['xvdb:2', 'no number']), ('web/xvdb"', ['quotes']), ('web/"xvdb"', ['quotes'])]


def test_lines_that_mean_nothing_are_errors_with_their_places_all_at_once_and_start_nothing(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(web()), a_shelf()
    run = backup(pool, shelf, 'vm-export=*', *['exclude-disk=' + value for value, _ in BAD] + ['exclude-disk=[NOBAK]', LINE])
    assert run.exit_status == 2 and run.never_says('Traceback'), run
    problems = [line for line in run.stderr.splitlines() if 'weekend.cfg:' in line]
    assert len(problems) == len(BAD), 'and no other line is one'
    for number, ((value, words), problem) in enumerate(zip(BAD, problems), 5):
        assert 'weekend.cfg:%d: exclude-disk: ' % number in problem and all(word in problem for word in words), (value, problem)
    assert pool.journal() == [] and shelf.is_unchanged()


def test_a_line_that_leaves_out_no_disk_of_a_vm_that_is_backed_up_is_a_warning(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(web(), vm('db', disks=2)), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', 'exclude-disk=web/xvdb', 'exclude-disk=web/xvdq', 'exclude-disk=db/xvdb',
                 'exclude-disk=nobody/xvdb')
    assert run.exit_status == 3 and shelf.has('web', complete=1), run
    assert len(warnings_of(run)) == 3
    for number, line in ((6, 'web/xvdq'), (7, 'db/xvdb'), (8, 'nobody/xvdb')):
        assert by(shelf, 'exclude-disk=' + line, number) + ': leaves out no disk of any VM that is backed up' in run.stderr, run


# --- what is in the copy, and what is told of it -------------------------------------------------------------------------

@pytest.mark.parametrize('version, state, compress', [(OLD, 'Running', 'none'), (OLD, 'Suspended', 'gzip'),
                                                      (NEW, 'Halted', 'gzip'), (NEW, 'Running', 'none')])
def test_the_archive_holds_the_other_disks_and_neither_block_nor_drive_of_the_one_that_is_left_out(
        a_pool: Any, a_shelf: Any, version: str, state: str, compress: str) -> None:
    pool, shelf = a_pool(web(power_state=state, snapshots=1), xapi_version=version), a_shelf()
    before = objects(pool)
    run = backup(pool, shelf, *LINES, 'compress=' + compress)
    assert run.exit_status == 0 and run.stderr == '', run
    assert is_as_before(pool, before) and shelf.journals() == [] and never_sent_too_much(pool)
    members, _ = read_tar(image(shelf))
    ova = members[0].content.decode('utf-8')
    assert len({member.name.split('/')[0] for member in members[1:]}) == 2
    assert 'xvda' in ova and 'xvdc' in ova and 'xvdb' not in ova
    assert imported(pool, shelf) == {'0': disk_content(ROOT), '2': disk_content(SWAP)}


def test_cfg_files_manifest_and_digests_tell_of_the_disk_that_is_left_out(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(web()), a_shelf()
    data = disks_of(pool, 'web')['1']
    assert backup(pool, shelf, *LINES).exit_status == 0
    copy = shelf.newest('web')
    assert shelf.names('web', copy, 'DISK-xvdb') == ['left-out', 'vbd.cfg', 'vdi.cfg']
    assert shelf.names('web', copy, 'DISK-xvda') == shelf.names('web', copy, 'DISK-xvdc') == ['vbd.cfg', 'vdi.cfg']
    assert shelf.text('web', copy, 'DISK-xvdb', 'left-out') == 'left out by %s\n' % by(shelf)
    assert 'name_label=data\n' in shelf.text('web', copy, 'DISK-xvdb', 'vdi.cfg')
    assert 'virtual_size=%d\n' % DATA['size'] in shelf.text('web', copy, 'DISK-xvdb', 'vdi.cfg')
    assert shelf.manifest('web', copy)['left-out'] == [{
        'device': 'xvdb', 'userdevice': '1', 'name': 'data', 'uuid': data['uuid'], 'virtual_size': DATA['size'], 'by': by(shelf)}]
    assert shelf.proves_itself('web', copy) and 'DISK-xvdb/left-out' in shelf.text('web', copy, 'SHA256SUMS')
    done = run_command(['sha256sum', '-c', '--strict', 'SHA256SUMS'], {'PATH': CRON_PATH}, cwd=shelf.at('web', copy))
    assert done.exit_status == 0 and 'DISK-xvdb/left-out: OK' in done.stdout, done


def test_a_copy_that_holds_all_has_nothing_left_out(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(web(), vm('db', disks=0)), a_shelf()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    assert missing(shelf) == missing(shelf, 'db') == [] and 'without' not in without_pool(shelf, 'list').stdout


def test_verify_is_content_and_list_says_what_is_not_there(a_backup: Any) -> None:
    pool, shelf = a_backup(web(), vm('db'), lines=LINES)
    run = without_pool(shelf, 'verify')
    assert run.exit_status == 0 and run.says('2 copies verified: 2 good.'), run
    shown = without_pool(shelf, 'list')
    assert shown.exit_status == 0
    line, = [line for line in shown.stdout.splitlines() if shelf.newest('web') in line and 'xvdc' in line]
    assert '(xvda 4.0 MiB, xvdc 4.0 MiB) without xvdb 4.0 MiB  good' in line, line
    rows = {row['name']: row['copies'][0] for row in json.loads(without_pool(shelf, 'list', 'format=json').stdout)['vms']}
    assert rows['web']['left_out'] == ['xvdb 4.0 MiB'] and rows['web']['disks'] == ['xvda 4.0 MiB', 'xvdc 4.0 MiB']
    assert rows['db']['left_out'] == []


def test_preview_says_it_with_the_line_and_counts_what_is_exported(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(web()), a_shelf()
    before = objects(pool)
    run = preview(pool, shelf, *LINES)
    assert run.exit_status == 0 and run.says('disk xvdb data (4.0 MiB) is left out by ' + by(shelf)), run
    assert run.says('2 disks of 8.0 MiB') and run.says('In all: disks of 8.0 MiB')
    assert objects(pool) == before and shelf.is_unchanged()


@pytest.mark.parametrize('compress', ['none', 'gzip'])
def test_restore_brings_the_vm_back_without_it_and_says_so(a_backup: Any, compress: str) -> None:
    pool, shelf = a_backup(web(), lines=LINES + ('compress=' + compress,))
    destroy(pool, 'web')
    shown = restore(pool, shelf, 'web', 'preview')
    assert shown.exit_status == 0 and shown.says(told_of(shelf))
    run = restore(pool, shelf, 'web')
    assert run.exit_status == 0 and run.stderr == '', run
    assert run.says(told_of(shelf)), run
    assert holds(pool, 'web', ROOT, dict(SWAP, userdevice='2')) and sorted(disks_of(pool, 'web')) == ['0', '2']
    assert shelf.journals() == []


def test_disks_of_several_srs_go_back_each_to_its_own_without_it(a_backup: Any) -> None:
    srs = [{'name_label': name} for name in ('a', 'b', 'c')]
    disks = [dict(one, sr=sr['name_label']) for one, sr in zip((ROOT, DATA, SWAP), srs)]
    pool, shelf = a_backup(web(disks=disks, vifs=[{'device': '0'}]), srs=srs, lines=LINES, xapi_version=OLD)
    gone = destroy(pool, 'web')
    run = restore(pool, shelf, 'web', 'preserve=yes')
    assert run.exit_status == 0 and machine(pool, 'web')['uuid'] == gone['uuid'], run
    assert holds(pool, 'web', ROOT, dict(SWAP, userdevice='2'))
    assert [one['SR_name'] for _, one in sorted(disks_of(pool, 'web').items())] == ['a', 'c']


def test_a_restored_os_disk_tells_which_data_disk_was_left_out_and_which_no_vdi_export_has(a_backup: Any) -> None:
    pool, shelf = a_backup(web(), lines=['vdi-export=*', LINE])
    destroy(pool, 'web')
    run = restore(pool, shelf, 'web')
    assert run.exit_status == 0 and holds(pool, 'web', ROOT) and run.says(told_of(shelf)), run
    assert run.says('disk xvdc swap (4.0 MiB) is not in this copy: it is no longer in the pool')


def test_a_restored_vm_gets_the_disk_that_was_left_out_and_is_still_there_where_that_is_asked_for(a_backup: Any) -> None:
    pool, shelf = a_backup(web(), lines=LINES)
    data = disks_of(pool, 'web')['1']
    run = restore(pool, shelf, 'web', 'to=beside', 'attach_existing_disks=yes')
    assert run.exit_status == 0 and run.says('it hangs on web') and sorted(disks_of(pool, 'beside')) == ['0', '2'], run
    session = pool.session()
    ref = session.xenapi.VM.get_by_uuid(machine(pool, 'web')['uuid'])
    session.xenapi.VM.hard_shutdown(ref)
    session.xenapi.VM.destroy(ref)
    session.logout()
    run = restore(pool, shelf, 'web', 'attach_existing_disks=yes')
    assert run.exit_status == 0, run
    assert holds(pool, 'web', ROOT, DATA, SWAP) and disks_of(pool, 'web')['1']['uuid'] == data['uuid']
    assert 'owner' not in disks_of(pool, 'web')['1']['VBD']['other_config'], 'uninstalling the restored VM spares it'


@pytest.mark.parametrize('lines', [LINES, ('vdi-export=*', LINE), ('vdi-export=*', LINE, 'vdi_export_format=vhd')])
def test_a_drill_does_not_miss_it(a_backup: Any, lines: Any) -> None:
    pool, shelf = a_backup(web(), lines=lines)
    before = objects(pool)
    assert drill(pool, shelf, 'web', 'preview', lines=lines).says(told_of(shelf, 'it'))
    run = drill(pool, shelf, 'web', lines=lines)
    assert run.exit_status == 0 and run.stderr == '' and run.says(told_of(shelf, 'it')) and run.says('restored and compared'), run
    assert is_as_before(pool, before) and shelf.journals() == []


def test_extract_of_it_says_that_it_was_left_out(a_backup: Any, tmp_path: Any) -> None:
    pool, shelf = a_backup(web(), lines=LINES)
    uuid = disks_of(pool, 'web')['1']['uuid']
    pool.stop()
    for word in ('xvdb', '1', 'data', uuid):
        run = extract(shelf, 'web', 'disk=' + word, 'to=%s' % (tmp_path / 'disk'))
        assert run.exit_status == 2 and run.says(told_of(shelf, 'it')), run
    assert os.listdir(str(tmp_path)) == []
    assert extract(shelf, 'web', 'disk=xvdc', 'to=%s' % (tmp_path / 'swap')).exit_status == 0
    with open(str(tmp_path / 'swap'), 'rb') as file:
        assert file.read() == disk_content(SWAP)


def test_a_single_disk_that_is_left_need_not_be_named(a_backup: Any, tmp_path: Any) -> None:
    pool, shelf = a_backup(web(disks=[ROOT, DATA]), lines=LINES)
    assert extract(shelf, 'web', 'to=%s' % (tmp_path / 'root')).exit_status == 0
    with open(str(tmp_path / 'root'), 'rb') as file:
        assert file.read() == disk_content(ROOT)


def test_the_first_disk_of_a_vm_export_can_be_left_out_too(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(web(vifs=[{'device': '0'}]), xapi_version=OLD), a_shelf()
    lines = ('vm-export=*', 'exclude-disk=web/xvda')
    assert backup(pool, shelf, *lines).exit_status == 0
    assert missing(shelf) == ['xvda'] and imported(pool, shelf) == {'1': disk_content(DATA), '2': disk_content(SWAP)}
    destroy_all(pool)
    run = restore(pool, shelf, 'web', lines=lines)
    assert run.exit_status == 0 and sorted(disks_of(pool, 'web')) == ['1', '2'], run
    assert without_pool(shelf, 'verify').exit_status == 0


# --- the other kind, and VMs of which nothing would be left --------------------------------------------------------------

@pytest.mark.parametrize('version', [OLD, NEW])
def test_a_vdi_export_is_not_harmed_by_data_disks_that_are_left_out(a_pool: Any, a_shelf: Any, version: str) -> None:
    pool, shelf = a_pool(web(), xapi_version=version), a_shelf()
    before = objects(pool)
    run = backup(pool, shelf, 'vdi-export=web', 'exclude-disk=web/xvd[b-z]')
    assert run.exit_status == 0 and run.stderr == '' and is_as_before(pool, before), run
    assert image(shelf) == disk_content(ROOT) and missing(shelf) == ['xvdb', 'xvdc'] and held(shelf) == ['xvda']
    assert len(pool.calls('api:VDI.snapshot')) == 1 and pool.never_saw('api:VM.snapshot')
    assert len(pool.calls('api:VDI.destroy')) == 1
    assert shelf.proves_itself('web', shelf.newest('web'))


@pytest.mark.parametrize('device', ['xvda', '0', '*'])
def test_a_vdi_export_of_a_disk_0_that_is_left_out_is_an_error_that_says_so(a_pool: Any, a_shelf: Any, device: str) -> None:
    pool, shelf = a_pool(web(), vm('db')), a_shelf(complete('web', kind='vdi-export'))
    run = backup(pool, shelf, 'vdi-export=*', 'exclude-disk=web/' + device)
    assert run.exit_status == 1 and shelf.has('db', vdi_exports=1), run
    error, = [line for line in run.stderr.splitlines() if ' - error: web' in line]
    assert 'Disk 0, xvda root (4.0 MiB), left out by %s' % by(shelf, 'exclude-disk=web/' + device) in error, error
    assert len(pool.calls('api:VDI.snapshot')) == 1 and shelf.still_holds('web') and shelf.unfinished() == []
    assert preview(pool, shelf, 'vdi-export=*', 'exclude-disk=web/' + device).says('vdi-export will fail: it has its Disk 0')


@pytest.mark.parametrize('version', [OLD, NEW])
def test_a_vm_of_which_every_disk_is_left_out_is_an_error_and_the_others_go_on(a_pool: Any, a_shelf: Any, version: str) -> None:
    pool, shelf = a_pool(web(), vm('db'), xapi_version=version), a_shelf(complete('web', days_ago=2))
    lines = ('vm-export=*', 'exclude-disk=web/xvd[ab]', 'exclude-disk=web/2')
    run = backup(pool, shelf, *lines)
    assert run.exit_status == 1 and shelf.has('db', complete=1), run
    error, = [line for line in run.stderr.splitlines() if ' - error: web' in line]
    assert 'all its disks left out' in error and by(shelf, lines[1], 5) in error and by(shelf, lines[2], 6) in error
    assert len(pool.calls('api:VM.snapshot')) == 1 and pool.has_no_snapshots_of_ours()
    assert shelf.still_holds('web') and shelf.has('web', complete=1) and shelf.unfinished() == []
    assert 'not: web' in run.stdout.splitlines()[-1]
    assert preview(pool, shelf, *lines).says('vm-export will fail: it has all its disks left out')


def test_a_vm_without_any_disk_is_still_backed_up(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('bare', disks=0), web()), a_shelf()
    run = backup(pool, shelf, 'vm-export=*', 'exclude-disk=*/xvd[b-z]')
    assert run.exit_status == 0 and shelf.has('bare', complete=1) and missing(shelf, 'bare') == [], run


# --- who counted on it is warned -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('version', [OLD, NEW])
def test_the_night_a_disk_of_the_newest_good_copy_is_left_out_is_a_warning_and_the_next_is_none(
        a_pool: Any, a_shelf: Any, version: str) -> None:
    pool, shelf = a_pool(web(), vm('db', disks=2), xapi_version=version), a_shelf()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    first, told = shelf.newest('web'), 'web (%s): disk xvdb data (4.0 MiB), which its newest good copy, ' % uuid_of('web')[:8]
    assert preview(pool, shelf, *LINES).says(told + first)
    run = backup(pool, shelf, *LINES)
    assert run.exit_status == 3 and len(warnings_of(run)) == 1 and run.says(told + first) and by(shelf) in run.stderr, run
    assert missing(shelf) == ['xvdb'] and missing(shelf, 'db') == []
    assert not preview(pool, shelf, *LINES).says(told)
    run = backup(pool, shelf, *LINES)
    assert run.exit_status == 0 and run.stderr == '', run


def test_a_copy_of_the_other_kind_or_one_that_is_not_good_warns_of_nothing(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(web()), a_shelf()
    assert backup(pool, shelf, 'vdi-export=*').exit_status == 0
    assert backup(pool, shelf, *LINES).exit_status == 0
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    os.unlink(shelf.at('web', shelf.newest('web'), 'success'))
    assert backup(pool, shelf, *LINES).exit_status == 0


def test_other_lines_make_another_config_and_the_same_ones_in_other_words_do_not(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(web(), faults=[at('http:/export', nth=1, hangs=True)])
    shelf = a_shelf()
    with beginning(pool, shelf, *LINES) as process:
        assert eventually(lambda: pool.calls('http:/export')), process.output
        run = backup(pool, shelf, *LINES, words=['exclude-disk=  web / xvdb'])
        assert run.exit_status == 5 and run.says('another run of '), run
        with beginning(pool, shelf, *LINES, words=['exclude-disk=web/xvdc']) as other:
            assert other.says('is in use by another run'), other.output


# --- what is asked of the pool ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('version', [NEW, '24.19.2'])
def test_a_server_that_can_leave_disks_out_of_a_snapshot_is_told_to_and_makes_none_of_them(a_pool: Any, a_shelf: Any,
                                                                                          version: str) -> None:
    pool = a_pool(web(), vm('db'), xapi_version=version, faults=[at('http:/export', object='web', nth=1, hangs=True)])
    shelf = a_shelf()
    data = [ref for ref, record in pool.dump()['VDI'].items() if record['name_label'] == 'data']
    with beginning(pool, shelf, 'vm-export=web', LINE) as process:
        assert eventually(lambda: pool.calls('http:/export')), process.output
        assert snapshots_of(pool, 'data') == [] and len(snapshots_of(pool, 'root')) == len(snapshots_of(pool, 'swap')) == 1
        assert pool.calls('api:VM.snapshot')[0]['args'][3:] == [data] and pool.never_saw('api:VDI.destroy')
    serving(pool)
    assert backup(pool, shelf, *LINES).exit_status == 0
    assert [len(call['args']) for call in pool.calls('api:VM.snapshot')] == [4, 4, 3], 'a VM that keeps all is asked for as ever'
    assert never_sent_too_much(pool) and pool.has_no_snapshots_of_ours() and shelf.journals() == []


@pytest.mark.parametrize('version', ['1.14.36', '1.249.3', OLD])
def test_on_an_older_server_the_snapshot_of_the_disk_is_gone_before_the_export_begins(a_pool: Any, a_shelf: Any,
                                                                                     version: str) -> None:
    pool = a_pool(web(), vm('db'), xapi_version=version, faults=[at('http:/export', nth=1, hangs=True)])
    shelf = a_shelf()
    data = disks_of(pool, 'web')['1']
    with beginning(pool, shelf, 'vm-export=web', LINE) as process:
        assert eventually(lambda: pool.calls('http:/export')), process.output
        assert snapshots_of(pool, 'data') == [] and len(snapshots_of(pool, 'root')) == len(snapshots_of(pool, 'swap')) == 1
        assert disks_of(pool, 'web')['1'] == data, 'the disk itself is as it was'
        order = [entry['call'] for entry in pool.journal() if (entry['via'], entry['call']) in (
            ('api', 'VM.snapshot'), ('api', 'VDI.destroy'), ('http', '/export'))]
        assert order == ['VM.snapshot', 'VDI.destroy', '/export'], order
    serving(pool)
    run = backup(pool, shelf, *LINES)
    assert run.exit_status == 0 and never_sent_too_much(pool), run
    assert {len(call['args']) for call in pool.calls('api:VM.snapshot')} == {3}
    assert pool.has_no_snapshots_of_ours() and shelf.journals() == [] and missing(shelf) == ['xvdb']


def test_the_journal_has_the_disks_snapshot_before_it_is_destroyed(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(web(), xapi_version=OLD), a_shelf()
    serving(pool, at('api:VDI.destroy', nth=1, hangs=True))
    with calling(pool, shelf, 'api:VDI.destroy'):
        left, = snapshots_of(pool, 'data')
        noted = [line for line in journal_of(shelf) if 'left_out' in line]
        assert [line['left_out'] for line in noted] == [[left]] and left in noted[0]['disks'], noted
        assert pool.never_saw('http:/export')


def test_a_disk_that_can_have_no_snapshot_is_no_obstacle_once_it_is_left_out(a_pool: Any, a_shelf: Any) -> None:
    disks = [ROOT, dict(DATA, sr='images')]
    for version, status in ((NEW, 0), (OLD, 1)):
        pool, shelf = a_pool(web(disks=disks), srs=[STORE, IMAGES], xapi_version=version), a_shelf()
        assert backup(pool, shelf, 'vm-export=*').exit_status == 1
        before = objects(pool)
        run = backup(pool, shelf, *LINES)
        assert run.exit_status == status and is_as_before(pool, before) and shelf.journals() == [], run
        assert shelf.has('web', complete=int(version == NEW)) and ("can't make snapshots" in run.stderr) == (version == OLD), run


def test_an_sr_that_is_nearly_full_counts_only_where_a_snapshot_is_made_on_it(a_pool: Any, a_shelf: Any) -> None:
    small = {'name_label': 'small', 'type': 'nfs', 'shared': True, 'size': 20 * MEBIBYTE}
    disks = [dict(ROOT, sr='store'), disk(size=32 * MEBIBYTE, used=19, sr='small')]
    for version, status in ((NEW, 0), (OLD, 1)):
        pool, shelf = a_pool(web(disks=disks), srs=[STORE, small], xapi_version=version), a_shelf()
        run = backup(pool, shelf, 'min_sr_free=20%', *LINES)
        assert run.exit_status == status, run
        if version == NEW:
            assert shelf.has('web', complete=1)
        else:
            assert pool.never_saw('api:VM.snapshot') and 'small' in run.stderr, run
        run = backup(pool, shelf, 'min_sr_free=20%', 'vm-export=*', 'exclude-disk=web/xvda')
        assert run.exit_status == 1 and 'small' in run.stderr, run


# --- trouble on an older server ---------------------------------------------------------------------------------------------

POINTS = {
    'before the snapshot': ('api:VM.snapshot', '', 0),
    'after the snapshot, before its answer': ('api:VM.snapshot', 'after', 1),
    'between the snapshot and the removal of the disk': ('api:VDI.destroy', '', 1),
    'after the removal of the disk, before its answer': ('api:VDI.destroy', 'after', 0),
    'after the removal, before the snapshot has lost its token': ('api:VM.set_name_label', '', 0),
    'in the export': ('http:/export', '', 0),
}


@pytest.mark.parametrize('point', sorted(POINTS))
def test_what_a_run_left_that_was_killed_there_is_gone_after_the_next(a_pool: Any, a_shelf: Any, point: str) -> None:
    occasion, when, left = POINTS[point]
    pool, shelf = a_pool(web(snapshots=1), xapi_version=OLD), a_shelf(complete('web', days_ago=2))
    before, good = objects(pool), shelf.copies('web')
    already = len(snapshots_of(pool, 'data'))
    serving(pool, at(occasion, nth=1, when=when, hangs=True))
    with calling(pool, shelf, occasion) as process:
        assert eventually(lambda: len(snapshots_of(pool, 'data')) == already + left), process.output
        process.kill()
    serving(pool)
    run = backup(pool, shelf, *LINES)
    assert run.exit_status == 0 and is_as_before(pool, before), run
    assert len(shelf.journals()) == (point == 'before the snapshot'), 'that call could still be under way'
    assert shelf.copies('web')[:-1] == good and missing(shelf) == ['xvdb'] and shelf.unfinished() == []


@pytest.mark.parametrize('when', ['', 'after'])
def test_a_removal_whose_answer_was_lost_is_asked_for_and_repeated_only_if_it_was_not_done(a_pool: Any, a_shelf: Any,
                                                                                         when: str) -> None:
    pool, shelf = a_pool(web(), xapi_version=OLD, faults=[at('api:VDI.destroy', nth=1, when=when, drops=True)]), a_shelf()
    before = objects(pool)
    run = backup(pool, shelf, *LINES)
    assert run.exit_status == 0 and is_as_before(pool, before) and shelf.journals() == [], run
    assert len(pool.calls('api:VDI.destroy')) == (3 if when else 4)
    assert imported(pool, shelf) == {'0': disk_content(ROOT), '2': disk_content(SWAP)}


def test_a_snapshot_whose_answer_was_lost_is_found_and_loses_the_disk(a_pool: Any, a_shelf: Any) -> None:
    for version in (OLD, NEW):
        pool = a_pool(web(), xapi_version=version, faults=[at('api:VM.snapshot', nth=1, when='after', drops=True)])
        shelf, before = a_shelf(), objects(pool)
        run = backup(pool, shelf, *LINES)
        assert run.exit_status == 0 and is_as_before(pool, before) and shelf.journals() == [], run
        assert len(pool.calls('api:VM.snapshot')) == 1 and len(pool.calls('api:VDI.destroy')) == (3 if version == OLD else 2)
        assert imported(pool, shelf) == {'0': disk_content(ROOT), '2': disk_content(SWAP)}


def test_a_disk_that_is_in_use_for_a_while_is_waited_for(a_pool: Any, a_shelf: Any) -> None:
    busy = [at('api:VDI.destroy', nth=number, fails=['VDI_IN_USE', 'OpaqueRef:x', 'destroy']) for number in (1, 2)]
    pool, shelf = a_pool(web(), xapi_version=OLD, faults=busy), a_shelf()
    before = objects(pool)
    run = hurried_backup(pool, shelf, *LINES)
    assert run.exit_status == 0 and run.stderr == '' and is_as_before(pool, before) and shelf.journals() == [], run
    assert imported(pool, shelf) == {'0': disk_content(ROOT), '2': disk_content(SWAP)}


@pytest.mark.parametrize('refusal', [['VDI_IN_USE', 'OpaqueRef:x', 'destroy'],
                                     ['SR_BACKEND_FAILURE_46', '', 'The VDI is not available', ''], ['INTERNAL_ERROR', 'x']])
def test_a_disk_that_can_not_be_removed_fails_the_vm_and_nothing_is_exported_with_it(a_pool: Any, a_shelf: Any,
                                                                                   refusal: List[str]) -> None:
    pool = a_pool(web(), vm('zeta'), xapi_version=OLD, faults=[at('api:VDI.destroy', object='data', fails=refusal)])
    shelf, before = a_shelf(complete('web', days_ago=2)), objects(pool)
    run = hurried_backup(pool, shelf, *LINES)
    assert run.exit_status == 1 and shelf.has('zeta', complete=1) and shelf.still_holds('web'), run
    assert len(pool.calls('http:/export')) == 1 and shelf.has('web', complete=1) and shelf.unfinished() == []
    error = [line for line in run.stderr.splitlines() if ' - error: web' in line][-1]
    assert refusal[0] in run.stderr and 'of a disk that is left out could not be removed, so nothing was exported' in error, run
    assert run.stderr.count('by hand: ') == len(pool.calls('api:VM.snapshot')) - 1, 'once for each try'
    assert 'xe ' in run.stderr and 'uuid=' in run.stderr and len(shelf.journals()) == 1, 'what is left is told'
    serving(pool)
    run = backup(pool, shelf, *LINES)
    assert run.exit_status == 0 and is_as_before(pool, before) and shelf.journals() == [], run


@pytest.mark.parametrize('refusal', [['SR_BACKEND_FAILURE_46', '', 'The VDI is not available', ''], ['INTERNAL_ERROR', 'x']])
def test_a_removal_that_is_refused_once_leaves_nothing(a_pool: Any, a_shelf: Any, refusal: List[str]) -> None:
    pool = a_pool(web(), vm('zeta'), xapi_version=OLD, faults=[at('api:VDI.destroy', object='data', nth=1, fails=refusal)])
    shelf, before = a_shelf(), objects(pool)
    run = backup(pool, shelf, *LINES)
    assert is_as_before(pool, before) and shelf.journals() == [] and shelf.has('zeta', complete=1), run
    if shelf.has('web', complete=1):
        assert run.exit_status == 3 and 'second try' in run.stderr and missing(shelf) == ['xvdb'], run
    else:
        assert run.exit_status == 1 and 'error: web' in run.stderr and shelf.names() == ['zeta'], run


def test_a_disks_snapshot_that_somebody_has_taken_is_neither_exported_nor_destroyed(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(web(), vm('db'), xapi_version=OLD, faults=[at('api:VM.snapshot', nth=1, when='after', sleeps=60, until='enough')])
    shelf = a_shelf()
    with beginning(pool, shelf, 'vm-export=web', LINE) as process:
        assert eventually(lambda: snapshots_of(pool, 'data') and snapshots_of(pool, 'swap')), process.output
        taken, = snapshots_of(pool, 'data')
        api = pool.session().xenapi
        api.VBD.create({'VM': api.VM.get_by_name_label('db')[0], 'VDI': api.VDI.get_by_uuid(taken), 'userdevice': '5',
                        'bootable': False, 'mode': 'RO', 'type': 'Disk', 'empty': False, 'other_config': {},
                        'qos_algorithm_type': '', 'qos_algorithm_params': {}})
        pool.release()
        run = process.ending()
    assert run.exit_status == 3 and 'hangs on another VM, db' in run.stderr and 'second try' in run.stderr, run
    assert snapshots_of(pool, 'data') == [taken] and missing(shelf) == ['xvdb']
    assert imported(pool, shelf) == {'0': disk_content(ROOT), '2': disk_content(SWAP)}


@pytest.mark.parametrize('when', ['', 'after'])
def test_a_signal_while_the_disk_is_removed_ends_the_run_and_leaves_nothing(a_pool: Any, a_shelf: Any, when: str) -> None:
    pool, shelf = a_pool(web(), vm('zeta'), xapi_version=OLD), a_shelf()
    before = objects(pool)
    serving(pool, at('api:VDI.destroy', nth=1, when=when, hangs=True))
    with beginning(pool, shelf, *LINES, is_hurried=True) as process:
        assert eventually(lambda: pool.calls('api:VDI.destroy')), process.output
        process.signal(signal.SIGTERM)
        run = process.ending()
    assert run.exit_status == 143 and is_as_before(pool, before) and shelf.journals() == [], run
    assert shelf.names() == [] and pool.never_saw('http:/export')


def test_a_master_that_moves_before_the_removal_costs_nothing(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(web(), xapi_version=OLD, hosts=[{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'}],
                  faults=[at('api:VDI.destroy', nth=1, master='xcp2')])
    shelf, before = a_shelf(), objects(pool)
    run = hurried_backup(pool, shelf, *LINES)
    assert is_as_before(pool, before) and shelf.journals() == [], run
    if shelf.has('web', complete=1):
        assert run.exit_status in (0, 3) and missing(shelf) == ['xvdb'], run
    else:
        assert run.exit_status == 1, run


def test_what_is_gone_when_the_run_ends_is_not_told_as_left(a_pool: Any, a_shelf: Any) -> None:
    # the second get_by_name_label is the first thing that the clean-up asks; the first is ours
    pool = a_pool(web(), vm('db'), xapi_version=OLD, faults=[at('api:VM.snapshot', nth=1, when='after', sleeps=60, until='taken'),
                                                             at('api:VM.get_by_name_label', nth=2, sleeps=60, until='given back')])
    shelf, before = a_shelf(), objects(pool)
    with beginning(pool, shelf, 'vm-export=web', LINE) as process:
        assert eventually(lambda: snapshots_of(pool, 'data') and snapshots_of(pool, 'swap')), process.output
        taken, = snapshots_of(pool, 'data')
        api = pool.session().xenapi
        drive = api.VBD.create({'VM': api.VM.get_by_name_label('db')[0], 'VDI': api.VDI.get_by_uuid(taken), 'userdevice': '5',
                                'bootable': False, 'mode': 'RO', 'type': 'Disk', 'empty': False, 'other_config': {},
                                'qos_algorithm_type': '', 'qos_algorithm_params': {}})
        pool.release('taken')
        assert eventually(lambda: pool.calls('api:VM.get_name_label')), 'whose it hangs on is asked'
        api.VBD.destroy(drive)
        pool.release('given back')
        run = process.ending()
    assert run.exit_status == 3 and 'second try' in run.stderr and missing(shelf) == ['xvdb'], run
    assert is_as_before(pool, before) and shelf.journals() == []
    assert 'The next run tries again' not in run.stderr and 'xe ' not in run.stderr, run


@pytest.mark.parametrize('line', ['vm-export=web', LINE])
def test_a_disk_that_is_exchanged_while_the_snapshot_is_made_costs_a_second_try_and_no_copy_tells_what_is_not_so(
        a_pool: Any, a_shelf: Any, line: str) -> None:
    pool = a_pool(web(power_state='Halted'), vm('db'), xapi_version=NEW,
                  faults=[at('api:VM.snapshot', nth=1, when='before', sleeps=60, until='enough')])
    shelf, name = a_shelf(), 'data' if line == LINE else 'swap'
    with beginning(pool, shelf, 'vm-export=web', line) as process:
        assert process.says('vm-export into'), process.output
        api = pool.session().xenapi
        (vdi,), (other,) = api.VDI.get_by_name_label(name), api.VDI.get_by_name_label('root')
        drive = api.VBD.get_record(api.VDI.get_VBDs(vdi)[0])
        api.VBD.destroy(api.VDI.get_VBDs(vdi)[0])
        if line == LINE:               # another disk hangs in its place
            api.VBD.create({'VM': drive['VM'], 'VDI': other, 'userdevice': drive['userdevice'], 'bootable': False, 'mode': 'RO',
                            'type': 'Disk', 'empty': False, 'other_config': {}, 'qos_algorithm_type': '',
                            'qos_algorithm_params': {}})
        pool.release()
        run = process.ending()
    assert 'so nothing was exported' in run.stderr and run.exit_status == 3 and shelf.has('web', complete=1), run
    assert missing(shelf) == [] and ('xvdc' in held(shelf)) == (line == LINE) and shelf.journals() == [], run
