"""The backup directory: what lies in it is told apart, and only what is ours is removed."""

import fcntl
import gzip
import json
import os
import socket
import subprocess
import sys
import time
import types
from datetime import datetime

import pytest

import VmBackup
from support.process import TESTS
from support.values import GIBIBYTE, NIGHT, US_UUID, a_copy, services
from VmBackup import Catalog, CatalogError, LockFile, Method, NameTaken, RunJournal, StorageFull, find_mount, free_text, parse_object

# Lines as Linux writes them (proc(5)): id, parent, major:minor, root, mount point, options, optional fields, "-", kind, source,
# options of the super block.
LINE = '%d 28 0:%d / %s rw,relatime shared:1 - %s %s %s\n'
EXT4 = '28 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro\n'
NFS3 = 'rw,vers=3,rsize=1048576,namlen=255,hard,%sproto=tcp,timeo=600,sec=sys,mountaddr=192.0.2.1,local_lock=%s,addr=192.0.2.1'
NFS4 = 'rw,vers=4.2,rsize=1048576,namlen=255,hard,proto=tcp,timeo=600,sec=sys,clientaddr=192.0.2.2,local_lock=none,addr=192.0.2.1'
CIFS = 'rw,vers=3.1.1,cache=strict,username=backup,uid=0,noforceuid,addr=192.0.2.1,%sfile_mode=0755,dir_mode=0755'


@pytest.mark.parametrize('kind, options, is_local', [
    ('nfs', NFS3 % ('', 'none'), False), ('nfs', NFS3 % ('nolock,', 'all'), True), ('nfs', NFS3 % ('nolock,', 'none'), True), ('nfs', NFS3 % ('', 'all'), True),
    ('nfs', NFS3 % ('', 'posix'), True), ('nfs4', NFS4, False), ('cifs', CIFS % '', False), ('cifs', CIFS % 'nobrl,', True),
    ('ext4', 'rw,errors=remount-ro', False), ('fuse.sshfs', 'rw,user_id=0,group_id=0', True)])
def test_mount_options_tell_whether_locks_reach_other_hosts(kind, options, is_local):
    text = EXT4 + LINE % (40, 50, '/other', 'nfs', 'host:/x', NFS3 % ('nolock,', 'all')) + LINE % (41, 51, '/snapshots', kind, 'host:/y', options)
    mount = find_mount(text, os.makedev(0, 51))
    assert (mount.point, mount.kind, mount.locks_are_local) == ('/snapshots', kind, is_local)


@pytest.mark.parametrize('text', ['', EXT4, 'nonsense\n', '41 28 0:51 / /snapshots rw shared:1\n', '41 28 0:511 / /x rw - nfs h:/x rw\n'])
def test_a_mount_that_is_not_in_the_list_is_unknown(text):
    assert find_mount(text, os.makedev(0, 51)) is None


OVERLAY = 'rw,lowerdir=/run/live/medium,upperdir=%s,workdir=/run/live/work'


@pytest.mark.parametrize('kind, options, is_in_memory', [
    ('tmpfs', 'rw,size=64m', True), ('ramfs', 'rw', True), ('ext4', 'rw', False), ('nfs4', NFS4, False),
    ('overlay', OVERLAY % '/run/live/rw', True), ('overlay', OVERLAY % '/var/rw', False), ('overlay', 'ro,lowerdir=/run/live/medium', False),
    ('overlay', OVERLAY % '/snapshots/rw', False), ('overlay', OVERLAY % '/runlive', False)])
def test_a_store_in_memory_is_known_as_one_also_under_an_overlay(kind, options, is_in_memory):
    text = EXT4 + LINE % (40, 50, '/run', 'tmpfs', 'tmpfs', 'rw') + LINE % (41, 51, '/snapshots', kind, 'none', options)
    assert find_mount(text, os.makedev(0, 51)).is_in_memory is is_in_memory


def test_this_machines_own_list_of_mounts_can_be_read(tmp_path):
    assert Catalog(str(tmp_path)).locks_are_local in (True, False)


# --- a VM's directory ------------------------------------------------------------------------------------------------

MANIFEST = {'kind': 'vm-export', 'taken_at': '2016-04-14T00:10:00Z', 'sequence': 3, 'copies_to_keep': 4, 'files': {}, 'disks': [],
            'vm': {'uuid': US_UUID, 'name': 'web'}, 'image': {'name': 'web.xva', 'size': 5, 'sha256': '0' * 64}}


def make(root, path, **files):
    """The directory with these files; a dot in a file's name is written as two underscores."""
    folder = root.joinpath(*path.split('/'))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        folder.joinpath(name.replace('__', '.')).write_bytes(content)
    return folder


def make_own(root, path='web/backup-2016-04-14-001000', manifest=MANIFEST, **files):
    kept = dict(dict(backup__json=json.dumps(manifest).encode(), web__xva=b'image', success=b''), **files)
    return make(root, path, **{name: content for name, content in kept.items() if content is not None})


def only_copy(root):
    (copy,) = Catalog(str(root)).folder('web').copies
    return copy


def test_a_copy_of_ours_is_read_from_its_manifest(tmp_path):
    make_own(tmp_path)
    copy = only_copy(tmp_path)
    assert copy.is_good and not copy.is_old
    assert (copy.uuid, copy.vm_name, copy.method, copy.sequence, copy.image, copy.size_bytes, copy.taken_at) == (
        US_UUID, 'web', Method.VM, 3, 'web.xva', 5, NIGHT)


@pytest.mark.parametrize('files', [
    dict(success=None), dict(web__xva=None), dict(web__xva=b''), dict(web__xva=b'imag'), dict(web__xva=b'images'),
    dict(web__xva=None, web__xva__gz=b''), dict(web__xva=None, web__xva__gz=b'image'), dict(web__xva=b'x', web__xva__gz=b'\x1f\x8bx'),
    dict(web__xva=None, web__xva__zst=b'\x1f\x8b'), dict(backup__json=None), dict(backup__json=b''), dict(backup__json=b'[]'),
    dict(backup__json=b'{'), dict(backup__json=b'\xff'), dict(backup__json=b'[' * 100000), dict(backup__json=b'{"kind":"x"}')])
def test_a_copy_that_is_not_whole_is_not_good_and_says_why(tmp_path, files):
    make_own(tmp_path, **files)
    assert only_copy(tmp_path).problem


@pytest.mark.parametrize('group, key, value', [
    (None, 'kind', 'other'), (None, 'kind', None), (None, 'taken_at', 'today'), (None, 'sequence', '3'), (None, 'disks', {}),
    ('vm', 'uuid', None), ('vm', 'name', 7), ('image', 'size', '5'), ('image', 'name', '../web.xva'), ('image', 'name', '/web.xva'),
    ('image', 'name', 'web.txt'), ('image', 'name', 'w\0.xva'), ('image', 'name', '\ud800.xva'), ('image', 'sha256', 1)])
def test_a_damaged_manifest_makes_a_copy_not_good_whatever_is_damaged_in_it(tmp_path, group, key, value):
    manifest = json.loads(json.dumps(MANIFEST))
    (manifest[group] if group else manifest)[key] = value
    make_own(tmp_path, manifest=manifest)
    assert only_copy(tmp_path).problem


@pytest.mark.parametrize('suffix, magic', [('gz', b'\x1f\x8b'), ('zst', b'\x28\xb5\x2f\xfd')])
def test_an_image_that_the_storage_host_compressed_later_still_counts(tmp_path, suffix, magic):
    make_own(tmp_path, **{'web__xva': None, 'web__xva__' + suffix: magic + b'...'})
    copy = only_copy(tmp_path)
    assert copy.is_good and copy.image == 'web.xva.' + suffix


@pytest.mark.parametrize('marker', ['success', 'success_restore', 'success_compress', 'success_compressing'])
@pytest.mark.parametrize('name, method', [('web.xva', Method.VM), ('web.xva.gz', Method.VM), ('web.raw', Method.VDI), ('web.vhd', Method.VDI)])
def test_a_copy_of_the_older_program_is_known_by_its_marker_and_image(tmp_path, marker, name, method):
    make(tmp_path, 'web/backup-2016-04-14-(00:10:00)', **{marker: b'', name.replace('.', '__'): b'x', 'vm__cfg': b'orig_uuid=%s\n' % US_UUID.encode()})
    copy = only_copy(tmp_path)
    assert copy.is_good and copy.is_old
    assert (copy.method, copy.image, copy.uuid, copy.vm_name) == (method, name, US_UUID, 'web')


@pytest.mark.parametrize('files', [dict(web__xva=b'x'), dict(success=b''), dict(success=b'', web__xva=b''), dict(success=b'', web__txt=b'x'), {}])
def test_a_copy_of_the_older_program_that_is_not_whole_is_not_good(tmp_path, files):
    make(tmp_path, 'web/backup-2016-04-14-(00:10:00)', **files)
    assert only_copy(tmp_path).problem


def test_an_old_directory_whose_only_image_is_a_directory_or_link_is_not_good(tmp_path):
    folder = make(tmp_path, 'web/backup-2016-04-14-(00:10:00)', success=b'')
    folder.joinpath('web.xva').mkdir()
    folder.joinpath('b.xva').symlink_to('/etc/hostname')
    assert only_copy(tmp_path).problem


def test_what_lies_in_a_vms_directory_is_told_apart(tmp_path):
    make_own(tmp_path)
    for name in ('backup-2016-04-15-001000.partial', 'backup-2016-04-13-001000.deleting', 'backup-2016-04-12-(00:10:00).deleting'):
        make(tmp_path, 'web/' + name)
    strangers = ['backup-2016', 'backup-2016-04-14-001000.old', 'backup-2016-04-15-001000.deleting.partial',
                 'backup-2016-04-15-001000.partial.deleting', 'backup-2016-04-15-(00:10:00).partial', 'mine', 'my.partial']
    for name in strangers:
        make(tmp_path, 'web/' + name)
    tmp_path.joinpath('web', 'backup-2016-04-16-001000').write_bytes(b'a file')
    tmp_path.joinpath('web', 'backup-2016-04-17-001000').symlink_to('backup-2016-04-14-001000')
    folder = Catalog(str(tmp_path)).folder('web')
    assert [copy.name for copy in folder.copies] == ['backup-2016-04-14-001000']
    assert list(folder.unfinished) == ['backup-2016-04-12-(00:10:00).deleting', 'backup-2016-04-13-001000.deleting',
                                       'backup-2016-04-15-001000.partial']
    assert sorted(folder.strangers) == sorted(strangers + ['backup-2016-04-16-001000', 'backup-2016-04-17-001000'])


def test_a_vm_without_a_directory_has_no_copies(tmp_path):
    assert Catalog(str(tmp_path)).folder('web') == ('web', (), (), ())


def test_our_own_state_and_metadata_and_files_and_links_are_no_vms_directories(tmp_path):
    for name in ('.vmbackup', '.hidden', 'METADATA_xcp1', 'metadata_xcp2', 'web'):
        make(tmp_path, name)
    tmp_path.joinpath('notes.txt').write_bytes(b'')
    tmp_path.joinpath('link').symlink_to('web')
    assert Catalog(str(tmp_path)).folder_names() == ['web']


# --- removing ----------------------------------------------------------------------------------------------------------

def snapshot_of(root):
    """Every name below with its kind and content, but for the locks that stay."""
    return sorted((os.path.relpath(os.path.join(folder, name), str(root)),
                   os.readlink(os.path.join(folder, name)) if os.path.islink(os.path.join(folder, name)) else None)
                  for folder, folders, files in os.walk(str(root)) for name in folders + files
                  if '.vmbackup' not in os.path.join(folder, name).split(os.sep))


def test_removing_a_copy_removes_it_and_nothing_else(tmp_path):
    for stamp in ('2016-04-14-001000', '2016-04-15-001000'):
        make_own(tmp_path, 'web/backup-' + stamp)
    make(tmp_path, 'web/backup-2016-04-14-001000/DISK-xvda', vbd__cfg=b'')
    make(tmp_path, 'web/mine', keep=b'')
    before = snapshot_of(tmp_path)
    catalog = Catalog(str(tmp_path))
    catalog.remove_copy(catalog.folder('web').copies[0])
    assert snapshot_of(tmp_path) == [row for row in before if not row[0].startswith('web/backup-2016-04-14')]


def test_a_link_in_a_copy_is_removed_and_not_followed(tmp_path):
    outside = make(tmp_path, 'outside', precious=b'x')
    folder = make_own(tmp_path, 'store/web/backup-2016-04-14-001000')
    folder.joinpath('link').symlink_to(str(outside))
    catalog = Catalog(str(tmp_path / 'store'))
    catalog.remove_copy(catalog.folder('web').copies[0])
    assert outside.joinpath('precious').exists() and not folder.exists()


@pytest.mark.parametrize('name', ['mine', 'backup-2016', '../web2/backup-2016-04-14-001000', 'backup-2016-04-17-001000', '.', '..'])
def test_what_is_not_a_copys_directory_is_not_removed(tmp_path, name):
    make_own(tmp_path)
    make_own(tmp_path, 'web2/backup-2016-04-14-001000')
    make(tmp_path, 'web/mine')
    tmp_path.joinpath('web', 'backup-2016-04-17-001000').symlink_to('backup-2016-04-14-001000')
    before = snapshot_of(tmp_path)
    with pytest.raises(CatalogError):
        Catalog(str(tmp_path)).remove_copy(a_copy(1)._replace(name=name))
    assert snapshot_of(tmp_path) == before


@pytest.mark.parametrize('name', ['mine', 'backup-2016-04-14-001000', '..', '.'])
def test_what_is_finished_is_not_removed_as_unfinished(tmp_path, name):
    make_own(tmp_path)
    make(tmp_path, 'web/mine')
    before = snapshot_of(tmp_path)
    with pytest.raises(CatalogError):
        Catalog(str(tmp_path)).remove_unfinished('web', name)
    assert snapshot_of(tmp_path) == before


def test_a_directory_that_is_not_empty_is_not_removed_as_empty(tmp_path):
    make(tmp_path, 'web/mine')
    make(tmp_path, 'empty')
    catalog = Catalog(str(tmp_path))
    for name in ('web', 'empty', 'never-was'):
        catalog.root.remove_if_empty(name)
    assert [row[0] for row in snapshot_of(tmp_path)] == ['web', 'web/mine']


def test_a_share_that_went_away_is_noticed(tmp_path):
    store = make(tmp_path, 'store')
    catalog = Catalog(str(store))
    catalog.check_in_place()
    store.rename(tmp_path / 'elsewhere')
    with pytest.raises(CatalogError):
        catalog.check_in_place()
    store.mkdir()
    with pytest.raises(CatalogError):
        catalog.check_in_place()


# --- a new copy ----------------------------------------------------------------------------------------------------------

def test_a_new_copy_shows_only_when_it_is_sealed_and_then_whole(tmp_path):
    catalog = Catalog(str(tmp_path))
    copy = catalog.new_copy('web', datetime(2016, 4, 14, 0, 10))
    copy.inside.write('web.xva', b'image')
    copy.sums['web.xva'] = (5, '0' * 64)
    copy.write('DISK-xvda/vbd.cfg', b'userdevice=0\n')
    copy.finish(dict(MANIFEST))
    assert catalog.folder('web').copies == () and len(catalog.folder('web').unfinished) == 1
    copy.seal()
    copy.close()
    assert only_copy(tmp_path).is_good
    assert catalog.folder('web').unfinished == ()


def test_the_checksums_name_every_file_but_themselves_and_the_marker(tmp_path):
    copy = Catalog(str(tmp_path)).new_copy('web', datetime(2016, 4, 14, 0, 10))
    copy.inside.write('web.xva', b'image')
    copy.sums['web.xva'] = (5, '0' * 64)
    copy.write('VIFs/vif-0.cfg', b'')
    copy.finish(dict(MANIFEST))
    copy.seal()
    copy.close()
    folder = tmp_path / 'web' / 'backup-2016-04-14-001000'
    listed = {line.split('  ', 1)[1] for line in folder.joinpath('SHA256SUMS').read_text().splitlines()}
    found = {os.path.relpath(os.path.join(place, name), str(folder)) for place, _, files in os.walk(str(folder)) for name in files}
    assert listed == found - {'SHA256SUMS', 'success'}


def test_a_discarded_copy_leaves_nothing(tmp_path):
    copy = Catalog(str(tmp_path)).new_copy('web', datetime(2016, 4, 14, 0, 10))
    copy.write('DISK-xvda/vbd.cfg', b'userdevice=0\n')
    copy.discard()
    copy.close()
    assert os.listdir(str(tmp_path / 'web')) == []


def test_two_copies_begun_in_one_second_have_two_names(tmp_path):
    catalog = Catalog(str(tmp_path))
    first, second = [catalog.new_copy('web', datetime(2016, 4, 14, 0, 10)) for _ in range(2)]
    assert (first.name, second.name) == ('backup-2016-04-14-001000', 'backup-2016-04-14-001001')
    first.close()
    second.close()


def test_sealing_never_replaces_what_is_there(tmp_path):
    copy = Catalog(str(tmp_path)).new_copy('web', datetime(2016, 4, 14, 0, 10))
    make(tmp_path, 'web/backup-2016-04-14-001000')
    with pytest.raises(NameTaken):
        copy.seal()
    copy.close()


def test_the_free_space_is_told_in_bytes(tmp_path):
    assert 0 < Catalog(str(tmp_path)).free_bytes() < (1 << 30) * GIBIBYTE


def test_a_file_system_that_tells_no_size_is_not_a_full_one():
    assert os.statvfs('/proc').f_blocks == 0
    assert Catalog('/proc').free_bytes() is None and free_text(None) == 'free space not known'


# --- dumps of the pool database ------------------------------------------------------------------------------------------

POOL_ROW = '<table name="pool"><row ref="OpaqueRef:1" __ctime="0" gui_config="%s" telemetry_uuid="OpaqueRef:2" uuid="%s" wlb=""/></table>'


@pytest.mark.parametrize('before, config, behind', [(0, 0, 0), (10, 10, 10), (3 << 20, 2 << 20, 100), (100, 100, 3 << 20),
                                                    (0, 0, (1 << 20) - 200)])
def test_a_dump_names_its_pool_however_large_it_is(tmp_path, before, config, behind):
    text = '<database>%s%s%s</database>' % ('v' * before, POOL_ROW % ('g' * config, US_UUID), '<table name="x"/>'.ljust(behind, ' '))
    make(tmp_path, 'METADATA_x', **{'pool_db_20160414-001000.dump': text.encode()})
    assert Catalog(str(tmp_path)).pool_dumps('METADATA_x') == [('pool_db_20160414-001000.dump', US_UUID)]


@pytest.mark.parametrize('cut', range(0, 80, 7))
def test_a_dump_names_its_pool_wherever_it_is_cut_into_pieces(tmp_path, cut):
    behind = '</database>'.rjust((1 << 20) - len(POOL_ROW % ('', US_UUID)) + cut)
    make(tmp_path, 'METADATA_x', **{'pool_db_20160414-001000.dump': (' ' * 99 + POOL_ROW % ('', US_UUID) + behind).encode()})
    assert Catalog(str(tmp_path)).pool_dumps('METADATA_x')[0][1] == US_UUID


@pytest.mark.parametrize('text', ['</database>', '<table name="pool"/></database>', '<table name="pool"><row x_uuid="1"/></table></database>'])
def test_a_dump_without_a_pool_tells_none(tmp_path, text):
    make(tmp_path, 'METADATA_x', **{'pool_db_20160414-001000.dump': text.encode(), 'pool_db_20160415-001000.dump': b'<database>'})
    assert Catalog(str(tmp_path)).pool_dumps('METADATA_x') == [('pool_db_20160414-001000.dump', '')]
    assert Catalog(str(tmp_path)).pool_dumps('METADATA_y') == []


def test_the_dump_of_a_real_server_names_its_pool(tmp_path):
    with gzip.open(os.path.join(TESTS, 'conformance', 'recorded', 'files', 'pool-dump.xml.gz')) as file:
        make(tmp_path, 'METADATA_x', **{'pool_db_20160414-001000.dump': file.read()})
    assert Catalog(str(tmp_path)).pool_dumps('METADATA_x')[0][1] == '876eb439-74eb-1b23-f37f-23e70f10701b'


# --- the storage door --------------------------------------------------------------------------------------------------

def test_a_lock_file_is_opened_once_per_process_whatever_leads_to_it(tmp_path):
    tmp_path.joinpath('link').symlink_to(str(tmp_path))
    first, second = Catalog(str(tmp_path)), Catalog(str(tmp_path / 'link'))
    assert first.folder_lock('web') is second.folder_lock('web') is first.folder_lock('WEB')
    assert first.folder_lock('web') is not first.folder_lock('db')


def test_readers_of_a_copy_go_side_by_side_and_only_its_removal_waits(tmp_path):
    make_own(tmp_path)
    make_own(tmp_path, 'web/backup-2016-04-15-001000')
    child = ('import sys; sys.path.insert(0, %r); from VmBackup import Catalog\n'
             'catalog = Catalog(%r); copies = catalog.folder("web").copies\n'
             'with catalog.copy_lock(copies[0].folder, copies[0].name, shared=True) as held:\n'
             '    print(held, catalog.folder_lock("web").take(), flush=True); sys.stdin.read()\n'
             % (os.path.dirname(os.path.abspath(VmBackup.__file__)), str(tmp_path)))
    with subprocess.Popen([sys.executable, '-c', child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdout.readline() == b'True True\n'
        catalog = Catalog(str(tmp_path))
        older, newer = catalog.folder('web').copies
        with catalog.copy_lock(older.folder, older.name, shared=True) as held:
            assert held
        assert catalog.remove_copy(older) == 'is being read by a restore or drill' and catalog.remove_copy(newer) == ''
        assert [copy.name for copy in catalog.folder('web').copies] == [older.name]
        reader.stdin.close()
        assert reader.wait(20) == 0
    assert catalog.remove_copy(older) == ''


@pytest.mark.parametrize('content', [
    b'', b'5', b'null', b'["a"]', b'{', b'\xff', b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": %s}' % (b'9' * 400),
    b'{"a": "\\ud800"}', b'{"\\udfff x": 1}'])
def test_what_none_of_our_files_can_hold_is_refused(content):
    with pytest.raises(ValueError):
        parse_object(content)


def test_what_our_files_hold_is_read():
    assert parse_object(b'{"a": 999999999999999999, "b": "\\ud83d\\ude00", "c": 1.5, "d": "\\udcff"}') == {
        'a': 999999999999999999, 'b': '\U0001f600', 'c': 1.5, 'd': '\udcff'}


def test_what_a_full_store_left_of_a_line_does_not_swallow_the_next(tmp_path, monkeypatch):
    folder = Catalog(str(tmp_path)).state('runs')
    journal = RunJournal.begin(folder, 'x.run', {'pool': 'p'})
    entry = journal.open_entry(kind='vm-snapshot', token='t')
    really = os.write
    with monkeypatch.context() as patch:
        def short(fd, content):
            """A third of it is written, then the store is full."""
            if len(content) > 60:
                return really(fd, bytes(content[:len(content) // 3]))
            raise OSError(28, 'No space left on device')
        patch.setattr(os, 'write', short)
        with pytest.raises(StorageFull):
            entry.note(uuid='lost' * 30)
    entry.note(disks=['kept'])
    journal.leave()
    again = RunJournal.of_dead_run(folder, 'x.run')
    assert [one.facts for one in again.entries] == [{'kind': 'vm-snapshot', 'token': 't', 'disks': ['kept']}]
    again.leave()


def test_every_write_is_finished_however_little_a_call_takes(tmp_path, monkeypatch):
    folder = Catalog(str(tmp_path)).state('mail')
    really = os.write
    monkeypatch.setattr(os, 'write', lambda fd, content: really(fd, bytes(content[:7])))
    folder.put('a', bytes(range(256)) * 3)
    lock = LockFile.of(folder, 'l')
    lock.write_text({'host': 'x' * 100})
    assert folder.read('a') == bytes(range(256)) * 3 and lock.text() == {'host': 'x' * 100}


# --- the journal -------------------------------------------------------------------------------------------------------

CALLED = dict(token='00', vm_uuid=US_UUID, vm_name='web', called_at='2016-04-14T00:10:00Z')
ENTRIES = [
    dict(CALLED, kind='vm-snapshot', name='web (backup) vmbackup-00', uuid=US_UUID, disks=[US_UUID], answer='lost', drives=[US_UUID]),
    dict(CALLED, kind='vdi-snapshot', disk=US_UUID, known=[US_UUID], calling_at='2016-04-14T00:10:00Z', answer='lost'),
    dict(CALLED, kind='reference', of='vdi-export', uuid=US_UUID, disks=[US_UUID]),
    dict(CALLED, kind='restore', names=['web 00'], tasks=['OpaqueRef:1'], uuids=[US_UUID], disks=[US_UUID], restored=True),
    dict(CALLED, kind='drill', names=['web 00'], tasks=['OpaqueRef:1'], uuids=[US_UUID], disks=[US_UUID])]


class ForgetfulPool:
    """A pool in which nothing of ours is left; or, if `is_away`, one that gives no answer."""

    def __init__(self, is_away):
        self.is_away = is_away

    def ask(self, doing, method, *arguments):
        if self.is_away:
            raise VmBackup.PoolError('the pool is away')
        if method.endswith('get_by_uuid') or method.endswith('get_status'):
            raise VmBackup.ApiFailure('UUID_INVALID', [method.split('.')[0], 'x'], doing)
        return {} if 'record' in method or method.startswith('message') else []

    ask_if_there = VmBackup.Pool.ask_if_there

    def records(self, doing, class_name):
        return self.ask(doing, class_name + '.get_all_records')


def swept(catalog, journal, is_away):
    """What a sweep of that journal says."""
    said = []
    log = VmBackup.Log(VmBackup.Clock())
    log.info = log.warning = said.append
    journal.limit_s = 1.0
    snapshots = VmBackup.Snapshots(services(log=log, pool=ForgetfulPool(is_away), journal=journal, catalog=catalog))
    snapshots.sweep([journal])
    return said + [finding.sentence for finding in snapshots.findings]


@pytest.mark.parametrize('is_away', [False, True])
@pytest.mark.parametrize('entry', ENTRIES, ids=[entry['kind'] for entry in ENTRIES])
def test_an_entry_of_a_journal_that_lacks_a_fact_is_left_or_removed_and_never_a_bug(tmp_path, entry, is_away):
    folder = Catalog(str(tmp_path)).state('runs')
    cases = [entry] + [{key: value for key, value in entry.items() if key != gone} for gone in entry]
    cases += [dict(entry, **{key: value}) for key in list(entry) + ['seen_idle', 'drives', 'names', 'closed']
              for value in (None, 5, '', 'x', [], {}, [5], [[]], ['x'], '0001-01-01T00:00:00Z', '9999-12-31T23:59:59Z')]
    journal = RunJournal.begin(folder, 'x.run', {'pool': 'p'})
    for number, facts in enumerate(cases, 1):
        journal.append(dict(facts, entry=number))
    journal.leave()
    journal = RunJournal.of_dead_run(folder, 'x.run')
    said = swept(Catalog(str(tmp_path)), journal, is_away)
    assert len(journal.entries) == len(cases) and len(said) >= len(journal.open_entries())
    assert not any('entry 1 is not one' in sentence for sentence in said)
    assert is_away or not journal.entries[0].is_open
    journal.leave()


# --- what can't be looked at or read costs only itself -------------------------------------------------------------------

def broken(monkeypatch, *names, calls=('stat', 'open'), number=5):
    """Files and directories of these names give that errno (5: EIO) to these calls."""
    for call in calls:
        def troubled(path, *arguments, really=getattr(os, call), **options):
            if isinstance(path, (str, bytes)) and os.path.basename(os.fsdecode(path)) in names:
                raise OSError(number, os.strerror(number))
            return really(path, *arguments, **options)
        monkeypatch.setattr(os, call, troubled)


@pytest.mark.parametrize('number', [5, 107, 116, 117])          # EIO, ENOTCONN (a dead FUSE), ESTALE, EUCLEAN
def test_an_entry_of_the_store_that_can_not_be_looked_at_costs_no_other(tmp_path, monkeypatch, number):
    make_own(tmp_path)
    make(tmp_path, 'dead')
    broken(monkeypatch, 'dead', number=number)
    catalog = Catalog(str(tmp_path))
    assert catalog.folder_names() == ['web']
    listing = VmBackup.list_store(catalog)
    assert [stored.folder for stored in listing.vms] == ['web']
    assert [type(problem) for problem in listing.problems] == [VmBackup.StorageMisbehaved] and '/dead' in str(listing.problems[0])
    assert listing.strangers == []


def test_a_copy_that_can_not_be_looked_at_costs_no_other_and_nothing_beside_it_is_removed(tmp_path, monkeypatch):
    for day in (14, 15, 16):
        make_own(tmp_path, 'web/backup-2016-04-%d-001000' % day, dict(MANIFEST, sequence=day))
    make(tmp_path, 'web/mine')
    make(tmp_path, 'web/backup-2016-04-13-001000.partial')
    broken(monkeypatch, 'backup-2016-04-15-001000', 'mine', 'backup-2016-04-13-001000.partial')
    folder = Catalog(str(tmp_path)).folder('web')
    assert [(copy.name[15:17], copy.is_good, copy.is_unreadable) for copy in folder.copies] == [
        ('14', True, False), ('15', False, True), ('16', True, False)]
    assert (folder.strangers, folder.unfinished) == (('mine',), ('backup-2016-04-13-001000.partial',))
    assert all(verdict.keep for verdict in VmBackup.judge(folder.copies, US_UUID, Method.VM, [VmBackup.Rules(1)], datetime(2016, 5, 1)))


def test_a_copy_whose_verdict_can_not_be_read_is_not_good_now_and_costs_no_other(tmp_path, monkeypatch):
    make_own(tmp_path)
    make_own(tmp_path, 'web/backup-2016-04-15-001000', dict(MANIFEST, sequence=4))
    catalog = Catalog(str(tmp_path))
    older, newer = catalog.folder('web').copies
    catalog.record(newer, verdict='DAMAGED', verified_at='2016-04-16T00:10:00Z', drilled_at='2016-04-16T00:10:00Z')
    with monkeypatch.context() as patch:
        broken(patch, newer.mark[:32] + '.json')
        found = Catalog(str(tmp_path)).folder('web').copies
        assert [(copy.is_good, copy.is_unreadable) for copy in found] == [(True, False), (False, True)]
        assert found[1].checks == {} and catalog.last_drills() == {}
        assert catalog.copy_again(newer).is_unreadable
        with pytest.raises(CatalogError):
            catalog.record(newer, verdict='good')
    assert catalog.folder('web').copies[1].verdict and catalog.last_drills() == {'web': '2016-04-16T00:10:00Z'}


def test_a_verdicts_folder_of_the_wrong_kind_does_not_make_the_vms_directory_one(tmp_path):
    make_own(tmp_path)
    make(tmp_path, '.vmbackup', verdicts=b'')
    copy = only_copy(tmp_path)
    assert copy.is_unreadable and 'whether a check has condemned it' in copy.problem


def test_a_journal_that_can_not_be_read_costs_no_other(tmp_path, monkeypatch):
    catalog = Catalog(str(tmp_path))
    for name in ('bad', 'dead'):
        VmBackup.begin_run(catalog, name, {'pool': 'p', 'host': 'xcp1'}, 2e9).leave()
    own = VmBackup.begin_run(catalog, 'own', {'pool': 'p', 'host': 'xcp1'}, 2e9)
    broken(monkeypatch, 'bad.run')
    journals, problems = VmBackup.dead_runs(catalog, own, 'p', 2e9)
    assert [journal.name for journal in journals] == ['dead.run.taken']
    assert [type(problem) for problem in problems] == [VmBackup.StorageMisbehaved]


def test_a_socket_in_the_place_of_a_journal_is_no_sign_of_bad_storage(tmp_path):
    catalog = Catalog(str(tmp_path))
    own = VmBackup.begin_run(catalog, 'own', {'pool': 'p', 'host': 'xcp1'}, 2e9)
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(str(tmp_path / '.vmbackup' / 'runs'), os.O_RDONLY)
        listener.bind('/proc/self/fd/%d/x.run' % here)
        os.close(here)
    assert [type(problem) for problem in VmBackup.dead_runs(catalog, own, 'p', 2e9)[1]] == [VmBackup.WrongKind]


@pytest.mark.parametrize('number', [5, 107, 116])
def test_a_dump_that_can_not_be_read_stops_only_the_pruning(tmp_path, monkeypatch, number):
    text = ('<database>%s</database>' % POOL_ROW % ('', US_UUID)).encode()
    make(tmp_path, 'METADATA_x', **{'pool_db_2016041%d-001000__dump' % day: text for day in (4, 5)})
    broken(monkeypatch, 'pool_db_20160414-001000.dump', number=number)
    problems = []
    assert Catalog(str(tmp_path)).pool_dumps('METADATA_x', problems) == [
        ('pool_db_20160414-001000.dump', ''), ('pool_db_20160415-001000.dump', US_UUID)]
    assert [type(problem) for problem in problems] == [VmBackup.StorageMisbehaved]


@pytest.mark.parametrize('what', ['a directory', 'a link', 'EIO'])
def test_a_store_whose_file_for_its_id_can_not_be_used_has_none_and_its_dead_runs_wait_a_day(tmp_path, monkeypatch, what):
    state = make(tmp_path, '.vmbackup')
    if what == 'a directory':
        state.joinpath('store').mkdir()
    elif what == 'a link':
        state.joinpath('store').symlink_to('/etc/hostname')
    else:
        state.joinpath('store').write_bytes(b'{"id": "x"}')
        broken(monkeypatch, 'store')
    catalog = Catalog(str(tmp_path))
    VmBackup.begin_run(catalog, 'dead', {'pool': 'p', 'host': 'xcp1'}, 2e9).leave()
    own = VmBackup.begin_run(catalog, 'own', {'pool': 'p', 'host': 'xcp1'}, 2e9)
    assert own.header['store'] == ''
    now_s = state.joinpath('runs', 'dead.run').stat().st_mtime
    assert VmBackup.dead_runs(catalog, own, 'p', now_s + 80000) == ([], [])
    assert len(VmBackup.dead_runs(catalog, own, 'p', now_s + 90000)[0]) == 1


# --- beginning -----------------------------------------------------------------------------------------------------------

def test_two_first_runs_at_once_give_the_store_one_id(tmp_path, monkeypatch):
    catalog = Catalog(str(tmp_path))
    really = LockFile.take

    def late(lock, *arguments, **options):
        """Another host's first run has written its id between our look and our lock."""
        if lock.shown.endswith('/store'):
            lock.write_text({'id': 'of the other', 'inode': os.fstat(lock.fd).st_ino})
        return really(lock, *arguments, **options)
    monkeypatch.setattr(LockFile, 'take', late)
    assert VmBackup.store_identity(catalog, 2e9)['store'] == 'of the other'


@pytest.mark.parametrize('then', ['holds it', 'renames it'])
def test_a_new_journal_that_a_sweep_took_for_a_dead_ones_is_begun_anew(tmp_path, monkeypatch, then):
    catalog = Catalog(str(tmp_path))
    runs = tmp_path / '.vmbackup' / 'runs'
    really, taken = LockFile.take, []

    def late(lock, *arguments, **options):
        """Another host's sweep comes between opening and locking, once."""
        if lock.shown == 'new.run' and not taken:
            taken.append(lock.shown)
            if then == 'holds it':
                return False
            runs.joinpath('new.run').rename(runs / 'new.run.taken')
        return really(lock, *arguments, **options)
    monkeypatch.setattr(LockFile, 'take', late)
    journal = VmBackup.begin_run(catalog, 'new', {'pool': 'p', 'host': 'xcp1'}, 2e9)
    assert taken and journal.is_still_ours() and journal.name != 'new.run'
    assert journal.header['pool'] == 'p'


def test_a_first_run_on_a_full_store_takes_the_reserve_for_its_id_too(tmp_path, monkeypatch):
    catalog = Catalog(str(tmp_path))
    VmBackup.keep_reserve(catalog)
    reserve, really = tmp_path / '.vmbackup' / 'runs' / 'reserve', os.write

    def full(fd, content):
        if reserve.exists():
            raise OSError(28, 'No space left on device')
        return really(fd, content)
    monkeypatch.setattr(os, 'write', full)
    assert VmBackup.begin_run(catalog, 'new', {'pool': 'p', 'host': 'xcp1'}, 2e9).is_still_ours()


def test_what_a_run_left_that_died_within_a_put_is_gone_a_day_later(tmp_path):
    catalog = Catalog(str(tmp_path))
    folder = catalog.state('verdicts')
    folder.put('a.json', b'{}')
    folder.write('a.json.1.new', b'{')
    now_s = (tmp_path / '.vmbackup' / 'verdicts' / 'a.json.1.new').stat().st_mtime
    catalog.clear_temporaries(now_s + 3600)
    assert folder.names() == ['a.json', 'a.json.1.new']
    catalog.clear_temporaries(now_s + 90000)
    assert folder.names() == ['a.json']


# --- the way out ---------------------------------------------------------------------------------------------------------

def said_by(log):
    said = []
    log.info = said.append
    return said


def broken_door(error):
    raise error


def test_a_lock_of_a_copy_that_hangs_or_fails_when_it_is_given_back_changes_nothing_that_was_done(tmp_path, monkeypatch):
    make_own(tmp_path)
    catalog, copy = Catalog(str(tmp_path)), only_copy(tmp_path)
    monkeypatch.setattr(VmBackup, 'WAY_OUT_S', 0.05)
    really, began = fcntl.lockf, time.monotonic()
    for unlocking in (lambda: time.sleep(60), lambda: broken_door(OSError(5, 'EIO'))):
        monkeypatch.setattr(fcntl, 'lockf', lambda fd, kind, *place: unlocking() if kind == fcntl.LOCK_UN else really(fd, kind, *place))
        with catalog.copy_lock(copy.folder, copy.name, shared=True) as is_ours:
            assert is_ours
        with pytest.raises(VmBackup.VerificationError):
            with catalog.copy_lock(copy.folder, copy.name, shared=True):
                raise VmBackup.VerificationError('what went wrong is told')
    assert time.monotonic() - began < 30


@pytest.mark.parametrize('number', [28, 37, 122, 5])             # ENOSPC, ENOLCK, EDQUOT, EIO
@pytest.mark.parametrize('call', ['open', 'lockf'])
def test_who_reads_a_copy_goes_on_without_a_lock_that_can_not_be_had(tmp_path, monkeypatch, call, number):
    make_own(tmp_path)
    catalog, copy, log = Catalog(str(tmp_path)), only_copy(tmp_path), VmBackup.Log(VmBackup.Clock())
    said, really = said_by(log), os.open
    if call == 'lockf':
        monkeypatch.setattr(fcntl, 'lockf', lambda *arguments: broken_door(OSError(number, os.strerror(number))))
    else:
        monkeypatch.setattr(os, 'open', lambda path, flags, *rest, **more: broken_door(OSError(number, os.strerror(number)))
                            if flags & os.O_CREAT else really(path, flags, *rest, **more))
    arguments = types.SimpleNamespace(preview=False)
    context = types.SimpleNamespace(arguments=arguments, log=log, signals=VmBackup.Signals(log))
    with VmBackup.held_copy(context, catalog, lambda: copy) as (_, inside):
        assert inside.read('web.xva') == b'image'
    assert len(said) == 1 and 'read all the same' in said[0]


def test_a_signal_is_seen_while_the_beginning_of_an_image_is_looked_at(tmp_path, monkeypatch):
    make_own(tmp_path, web__xva=bytes(512 * 20), manifest=dict(MANIFEST, image=dict(MANIFEST['image'], size=512 * 20)))
    catalog, copy = Catalog(str(tmp_path)), only_copy(tmp_path)
    monkeypatch.setattr(os, 'readv', lambda *arguments: time.sleep(10))
    context = types.SimpleNamespace(signals=types.SimpleNamespace(check=lambda: broken_door(VmBackup.Interrupted(2))),
                                    arguments=types.SimpleNamespace(parameters={}))
    with catalog.open_copy(copy) as inside, pytest.raises(VmBackup.Interrupted):
        VmBackup.opened_source(context, copy, inside)
