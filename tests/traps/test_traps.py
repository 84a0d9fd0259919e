"""The traps: where a lenient simulated pool would hide a bug of a backup program, ours has to be strict.

Each test is one of them, seen from outside: through the XenAPI module, through `xe`, or by hand-made HTTP. Where the
real server's behaviour is from its source, the file of xapi is named; the rest was tried on a real xapi 24.19.2.
"""

import concurrent.futures
import hashlib
import os
import re
import socket
import stat
import subprocess
import time
import zlib
from typing import Any, Dict, List, Tuple

import pytest
import XenAPI

from support.archive import read_tar
from support.language import MEBIBYTE, at, disk, slowly, vm
from support.process import CRON_PATH, Pool, Run, run
from support.wire import BASIC, Answer, Background, ask, eventually, exchange

NULL = 'OpaqueRef:NULL'
NO_UUID = '00000000-0000-0000-0000-000000000000'
EPOCH = '19700101T00:00:00Z'
STORE = {'name_label': 'store', 'type': 'nfs', 'shared': True, 'size': 1 << 40}
IMAGES = {'name_label': 'images', 'type': 'iso', 'shared': True}
NO_MATCH = 'Error: No matching VMs found\n'


# --- Short ways -----------------------------------------------------------------------------------------------------

def refused(call: Any, *arguments: Any) -> List[str]:
    """The failure that the call ends with: code and parameters."""
    with pytest.raises(XenAPI.Failure) as caught:
        call(*arguments)
    return caught.value.details


def ref_of(session: Any, name: str) -> str:
    """The VM of that name, the only one."""
    refs = session.xenapi.VM.get_by_name_label(name)
    assert len(refs) == 1
    return refs[0]


def disks_of(session: Any, vm_ref: str) -> List[str]:
    """The VDIs of a VM's disks in the order of their places; CD drives left out."""
    records = [session.xenapi.VBD.get_record(vbd) for vbd in session.xenapi.VM.get_VBDs(vm_ref)]
    return [record['VDI'] for record in sorted(records, key=lambda record: record['userdevice'])
            if record['type'] == 'Disk']


def uuid_of(session: Any, kind: str, ref: str) -> str:
    return getattr(session.xenapi, kind).get_uuid(ref)


def get(pool: Pool, path: str, host: int = 1, **query: Any) -> Answer:
    """As root, with a password."""
    return ask(pool.url_of(host), 'GET', path, query, {'Authorization': BASIC})


def export(pool: Pool, session: Any, vm_ref: str, **query: Any) -> Tuple[Answer, Dict[str, Any]]:
    """An export with a task of its own: the answer, and the task when it is over."""
    task = session.xenapi.task.create('export', 'of a test')
    answer = ask(pool.url_of(), 'GET', '/export', dict(query, session_id=session.handle, task_id=task, ref=vm_ref), {})
    return answer, when_over(session, task)


def when_over(session: Any, task: str) -> Dict[str, Any]:
    def look() -> Any:
        record = session.xenapi.task.get_record(task)
        return None if record['status'] in ('pending', 'cancelling') else record
    return eventually(look)


def ova_of(archive: bytes) -> str:
    return read_tar(archive)[0][0].content.decode('utf-8')


def vm_fields(ova: str, field: str) -> List[str]:
    """The field as it stands in each VM's record of an ova.xml."""
    return [re.search('<name>%s</name><value>(.*?)</value>' % field, part).group(1)
            for part in ova.split('<name>class</name>')[1:] if part.startswith('<value>VM</value>')]


def is_exporting(session: Any, vm_ref: str) -> bool:
    return 'export' in session.xenapi.VM.get_current_operations(vm_ref).values()


# --- The traps ------------------------------------------------------------------------------------------------------

def test_trap_01_a_snapshot_is_a_template_until_that_is_cleared(a_pool: Any) -> None:
    pool = a_pool(vm('web'), templates=[{'name_label': 'CentOS 7', 'default': True}])
    session = pool.session()
    snapshot = session.xenapi.VM.snapshot(ref_of(session, 'web'), 'web before')
    uuid = uuid_of(session, 'VM', snapshot)

    assert session.xenapi.VM.get_is_a_template(snapshot) is True
    assert session.xenapi.VM.get_is_a_snapshot(snapshot) is True
    assert pool.xe('vm-export', 'uuid=' + uuid, 'filename=') == Run(1, '', NO_MATCH)
    assert pool.xe('vm-uninstall', 'uuid=' + uuid, 'force=true') == Run(1, '', NO_MATCH)
    assert uuid not in pool.xe('vm-list', '--minimal').stdout
    # VM.get_all has all kinds in one table: VMs, snapshots, templates, control domains.
    records = [session.xenapi.VM.get_record(ref) for ref in session.xenapi.VM.get_all()]
    assert sorted(record['name_label'].split(' on ')[0] for record in records) == [
        'CentOS 7', 'Control domain', 'web', 'web before']

    session.xenapi.VM.set_is_a_template(snapshot, False)
    assert uuid in pool.xe('vm-list', '--minimal').stdout
    assert session.xenapi.VM.get_is_a_snapshot(snapshot) is True
    assert pool.xe('vm-export', 'uuid=' + uuid, 'filename=').exit_status == 0
    assert pool.xe('vm-uninstall', 'uuid=' + uuid, 'force=true').exit_status == 0


def test_trap_02_an_uncleared_snapshot_is_exported_as_a_template(a_pool: Any) -> None:
    pool = a_pool(vm('web'))
    session = pool.session()
    snapshot = session.xenapi.VM.snapshot(ref_of(session, 'web'), 'web before')

    for is_template in (True, False):
        if not is_template:
            session.xenapi.VM.set_is_a_template(snapshot, False)
        ova = ova_of(get(pool, '/export', ref=snapshot).body)
        assert vm_fields(ova, 'is_a_template') == ['<boolean>%d</boolean>' % is_template]
        assert vm_fields(ova, 'is_a_snapshot') == ['<boolean>0</boolean>']
        assert vm_fields(ova, 'snapshot_of') == [NULL]


def test_trap_03_vm_destroy_leaves_the_disks_and_uninstall_deletes_only_owned_ones(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=2, cds=[{'userdevice': '3', 'empty': False, 'sr': 'images', 'name_label': 'a.iso'}]),
                  srs=[STORE, IMAGES])
    session = pool.session()
    web = ref_of(session, 'web')
    before = set(session.xenapi.VDI.get_all())

    snapshot = session.xenapi.VM.snapshot(web, 'first')
    made = set(session.xenapi.VDI.get_all()) - before
    assert len(made) == 2
    iso = [session.xenapi.VBD.get_VDI(vbd) for vbd in session.xenapi.VM.get_VBDs(snapshot)
           if session.xenapi.VBD.get_type(vbd) == 'CD']
    assert len(iso) == 1 and iso[0] in before, 'the copy of a CD drive has the very ISO of the original'

    session.xenapi.VM.destroy(snapshot)
    assert set(session.xenapi.VDI.get_all()) == before | made, 'VM.destroy never deletes a disk'
    for orphan in made:
        assert session.xenapi.VDI.get_VBDs(orphan) == []
        session.xenapi.VDI.destroy(orphan)

    second = session.xenapi.VM.snapshot(web, 'second')
    for vbd in session.xenapi.VM.get_VBDs(second):
        if session.xenapi.VBD.get_type(vbd) == 'Disk':
            assert 'owner' in session.xenapi.VBD.get_other_config(vbd)
            if session.xenapi.VBD.get_userdevice(vbd) == '1':
                session.xenapi.VBD.remove_from_other_config(vbd, 'owner')
                kept = session.xenapi.VBD.get_VDI(vbd)
    assert pool.xe('snapshot-uninstall', 'uuid=' + uuid_of(session, 'VM', second), 'force=true').exit_status == 0
    assert set(session.xenapi.VDI.get_all()) == before | {kept}, 'neither the disk without owner nor the ISO is deleted'


def test_trap_04_the_file_of_an_export(a_pool: Any, tmp_path: Any) -> None:
    pool = a_pool(vm('web'), vm('db'), faults=[at('http:/export', object='db', breaks_off_after=MEBIBYTE)])
    session = pool.session()
    uuid = uuid_of(session, 'VM', ref_of(session, 'web'))
    new, existing, nowhere = (str(tmp_path / name) for name in ('new.xva', 'existing.xva', 'no/such/folder.xva'))
    with open(existing, 'w') as file:
        file.write('the copy of last week')

    assert pool.xe('vm-export', 'uuid=' + uuid, 'filename=' + new) == Run(0, 'Export succeeded\n', '')
    assert stat.S_IMODE(os.stat(new).st_mode) == 0o600
    assert pool.xe('vm-export', 'uuid=' + uuid, 'filename=' + existing) == Run(
        1, '', 'Operation failed. Error: Sys_error("%s: File exists")\n' % existing)
    with open(existing) as file:
        assert file.read() == 'the copy of last week'
    assert pool.xe('vm-export', 'uuid=' + uuid, 'filename=' + nowhere) == Run(
        1, '', 'Operation failed. Error: Sys_error("%s: No such file or directory")\n' % nowhere)

    to_stdout = pool.xe('vm-export', 'uuid=' + uuid, 'filename=')
    assert to_stdout.exit_status == 0 and to_stdout.stderr == ''
    assert to_stdout.stdout.startswith('ova.xml\0') and to_stdout.stdout.endswith('\0' * 1024)

    partial = str(tmp_path / 'partial.xva')
    assert pool.xe('vm-export', 'vm=db', 'filename=' + partial).exit_status == 1
    assert os.path.getsize(partial) >= MEBIBYTE, 'what had arrived before the failure stays'


def test_trap_05_an_existing_file_is_refused_when_the_export_already_runs(a_pool: Any, tmp_path: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=64 * MEBIBYTE, used=64)]))
    session = pool.session()
    web = ref_of(session, 'web')
    existing = tmp_path / 'existing.xva'
    existing.write_text('the copy of last week')

    assert pool.xe('vm-export', 'vm=web', 'filename=%s' % existing).exit_status == 1
    # The server had begun, holds the VM, and hears of it only when its next write meets a closed connection.
    assert eventually(lambda: [call['result'] for call in pool.calls('http:/export')])[0][0] == 'CLIENT_ERROR'
    assert eventually(lambda: not is_exporting(session, web))

    pool.stop()
    pool.set_faults([slowly()])
    pool.start()
    session = pool.session()
    web = ref_of(session, 'web')
    running = subprocess.Popen([os.path.join(pool.dir, 'bin', 'xe'), 'vm-export', 'vm=web', 'filename=%s' % (tmp_path / 'new.xva')],
                               env={'PATH': CRON_PATH})
    assert eventually(lambda: is_exporting(session, web))
    running.kill()
    running.wait()
    assert eventually(lambda: not is_exporting(session, web)), 'a killed client is noticed'


def test_trap_06_only_the_task_tells_whether_an_export_is_whole(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=8 * MEBIBYTE, used=8)]), vm('db'), vm('quiet'), faults=[
        at('http:/export', object='web', breaks_off_after=3 * MEBIBYTE),
        at('http:/export', object='quiet', breaks_off_after=MEBIBYTE, silent=True)])
    session = pool.session()

    whole, task = export(pool, session, ref_of(session, 'db'))
    assert whole.status == 200 and whole.header('Content-Length') == '' and whole.header('Transfer-Encoding') == ''
    assert (task['status'], task['progress'], task['result'], task['error_info']) == ('success', 1.0, '', [])
    assert read_tar(whole.body)[1] == bytes(1024)

    broken, task = export(pool, session, ref_of(session, 'web'))
    assert broken.status == 200, 'the headers had gone out before'
    assert task['status'] == 'failure' and task['error_info']
    sent, text = broken.body[:3 * MEBIBYTE], broken.body[3 * MEBIBYTE:]
    assert sent.startswith(b'ova.xml')
    assert text.startswith(b'HTTP/1.0 500 Internal Error\r\n') and text.endswith(b'</html>')

    packed, task = export(pool, session, ref_of(session, 'web'), use_compression='gzip')
    assert task['status'] == 'failure'
    unpacker = zlib.decompressobj(31)
    unpacker.decompress(packed.body)
    assert unpacker.eof, 'the compressor ends in good order: the stream is a valid one'
    assert unpacker.unused_data.startswith(b'HTTP/1.0 500 Internal Error\r\n')

    silent, task = export(pool, session, ref_of(session, 'quiet'))
    assert task['status'] == 'success' and len(silent.body) == MEBIBYTE, 'the one thing worse: nobody says a word'


def test_trap_07_exit_status_0_does_not_mean_that_there_is_an_export(a_pool: Any, tmp_path: Any) -> None:
    pool = a_pool(vm('web'), vm('busy', power_state='Running'), vm('also busy', power_state='Running'),
                  faults=[at('http:/export', object='web', drops=True)])
    # The command goes over the unix socket; the port for the data is one that nobody listens at. So no handler takes
    # the task, and it has no error that xe could raise (download_file in cli_operations.ml).
    nobody = dict(pool.environment(), VMBACKUP_POOL='http://127.0.0.1:1 ' + pool.socket_of())
    path = tmp_path / 'web.xva'
    result = run([os.path.join(pool.dir, 'bin', 'xe'), 'vm-export', 'vm=web', 'filename=%s' % path], nobody)
    assert (result.exit_status, result.stderr.splitlines()[-1]) == (0, 'Export failed, unknown error')
    assert not path.exists()
    # A connection that breaks when the handler has taken over is an error of the task.
    result = pool.xe('vm-export', 'vm=web', 'filename=%s' % path)
    assert result.exit_status == 1 and result.stderr.startswith('Error code: CLIENT_ERROR\n') and not path.exists()

    # Failures with --multiple are told on stdout.
    result = pool.xe('vm-export', 'power-state=running', 'filename=%s' % (tmp_path / 'all.xva'), '--multiple')
    assert result.exit_status == 1
    assert all('operation failed on %s: ' % named(pool, name) in result.stdout for name in ('busy', 'also busy'))


def test_trap_08_the_archive_format(a_pool: Any) -> None:
    sparse = disk(size=6 * MEBIBYTE + 512 * 1024, used=[[2, 1]], seed=5)
    pool = a_pool(vm('web', disks=[sparse]), vm('many', disks=[disk(size=MEBIBYTE, used=1, seed=n) for n in range(12)]))
    answer = get(pool, '/export', uuid=named(pool, 'web'))
    members, ending = read_tar(answer.body)

    assert ending == bytes(1024), 'exactly two zero blocks, and nothing behind them'
    assert {(member.kind, member.magic) for member in members} == {(b'\0', bytes(8))}, 'headers of level V7'
    assert members[0].name == 'ova.xml'
    data = members[1::2]
    assert [member.name.split('/')[1] for member in data] == ['00000000', '00000002', '00000006'], (
        'zero blocks are left out, but never the first and the last one')
    assert [member.size for member in data] == [MEBIBYTE, MEBIBYTE, 512 * 1024], 'the last block is as short as it is'
    assert data[1].content == hashlib.sha256(b'5:2:0').digest() * 32768
    digests = members[2::2]
    assert [member.name for member in digests] == [member.name + '.xxhash' for member in data]
    assert digests[1].content == xxh64(data[1].content), '16 upper-case digits and no newline'

    members, _ = read_tar(get(pool, '/export', uuid=named(pool, 'many')).body)
    ids = [member.name.split('/')[0] for member in members[1::2]]
    assert len(set(ids)) == 12 and ids == sorted(ids), 'Ref:10 comes before Ref:2'
    assert 'Ref:0' not in ids

    pool.stop()
    pool.set_faults([at('http:/export', keepalive=True)])
    pool.start()
    members, _ = read_tar(get(pool, '/export', uuid=named(pool, 'web')).body)
    empty = [member for member in members[1::2] if member.size == 0]
    assert empty and all(member.content == b'' for member in empty)
    assert [member.size for member in members[1::2] if member.size] == [MEBIBYTE, MEBIBYTE, 512 * 1024]
    numbers = [int(member.name.split('/')[1]) for member in members[1::2]]
    assert numbers == sorted(set(numbers)) and numbers[-1] > 6, 'an empty block uses up a number: the rest moves on'
    offset = 0
    for before, member in zip([-1] + numbers, members[1::2]):
        offset += MEBIBYTE * (int(member.name.split('/')[1]) - before - 1) + member.size
    assert offset == sparse['size']

    old = a_pool(vm('web', disks=[sparse]), xapi_version='1.160.0')
    members, _ = read_tar(get(old, '/export', uuid=named(old, 'web')).body)
    assert [member.name.split('.')[-1] for member in members[2::2]] == ['checksum'] * 3
    assert [member.content.decode('ascii') for member in members[2::2]] == [
        hashlib.sha1(member.content).hexdigest() for member in members[1::2]]


def named(pool: Pool, name: str) -> str:
    """The uuid of the VM of that name."""
    session = pool.session()
    return uuid_of(session, 'VM', ref_of(session, name))


def xxh64(content: bytes) -> bytes:
    import xxhash
    return xxhash.xxh64(content).hexdigest().upper().encode('ascii')


def test_trap_09_types_on_the_wire(a_pool: Any) -> None:
    pool = a_pool(vm('web'))
    session = pool.session()
    web = session.xenapi.VM.get_record(ref_of(session, 'web'))

    assert web['memory_static_max'] == str(1 << 30) and web['VCPUs_max'] == '1', 'ints are strings'
    assert web['snapshot_time'].__class__.__name__ == 'DateTime' and web['snapshot_time'].value == EPOCH
    assert web['is_a_template'] is False and web['HVM_shadow_multiplier'] == 1.0
    assert web['snapshot_of'] == NULL and web['guest_metrics'] == NULL, 'a null ref is a word, and true'
    assert web['other_config']['mac_seed'] and web['snapshots'] == [] and web['current_operations'] == {}
    assert session.xenapi.VM.set_name_description(ref_of(session, 'web'), 'new') == '', 'nothing is an empty string'
    assert session.xenapi.VM.get_by_name_label('no such VM') == []
    assert session.xenapi.VDI.get_virtual_size(disks_of(session, ref_of(session, 'web'))[0]) == str(4 * MEBIBYTE)


def test_trap_10_refs_die(a_pool: Any) -> None:
    pool = a_pool(vm('web', cds=[{'userdevice': '3', 'empty': True}]))
    session = pool.session()
    snapshot = session.xenapi.VM.snapshot(ref_of(session, 'web'), 'short-lived')
    disks = disks_of(session, snapshot)
    vbds = session.xenapi.VM.get_VBDs(snapshot)
    uuid = uuid_of(session, 'VM', snapshot)

    empty = [vbd for vbd in vbds if session.xenapi.VBD.get_empty(vbd)]
    assert [session.xenapi.VBD.get_VDI(vbd) for vbd in empty] == [NULL]
    assert refused(session.xenapi.VDI.get_record, NULL) == ['HANDLE_INVALID', 'VDI', NULL]
    session.xenapi.VM.destroy(snapshot)
    assert refused(session.xenapi.VM.get_record, snapshot) == ['HANDLE_INVALID', 'VM', snapshot]
    assert refused(session.xenapi.VM.destroy, snapshot) == ['HANDLE_INVALID', 'VM', snapshot]
    assert refused(session.xenapi.VM.get_by_uuid, uuid) == ['UUID_INVALID', 'VM', uuid]
    assert refused(session.xenapi.VBD.get_record, vbds[0]) == ['HANDLE_INVALID', 'VBD', vbds[0]]
    session.xenapi.VDI.destroy(disks[0])
    assert refused(session.xenapi.VDI.destroy, disks[0]) == ['HANDLE_INVALID', 'VDI', disks[0]]


def test_trap_11_names_are_anything_and_not_unique(a_pool: Any) -> None:
    names = ['web', 'web', 'two words', 'a "quoted" one', "it's", 'a,b', 'a\\b', 'a=b', 'line\nbreak', 'a/b', '$(reboot)',
             'Bücher ☃', '-rf', '']
    pool = a_pool(*[vm(name, uuid='00000000-0000-4000-8000-%012d' % number) for number, name in enumerate(names)])
    session = pool.session()

    records = session.xenapi.VM.get_all_records().values()
    assert sorted(record['name_label'] for record in records if not record['is_control_domain']) == sorted(names)
    assert len({record['uuid'] for record in records}) == len(names) + 1
    assert len(session.xenapi.VM.get_by_name_label('web')) == 2
    assert pool.xe('vm-export', 'vm=web', 'filename=') == Run(
        1, '', 'Error: Multiple matches VMs found. --multiple required to complete the operation\n')
    listed = pool.xe('vm-list', 'is-control-domain=false', 'params=name-label', '--minimal').stdout
    assert 'a\\,b' in listed and 'a\\\\b' in listed and 'Bücher ☃' in listed
    assert pool.xe('vm-list', 'name-label=a,b', '--minimal').stdout.strip() == named(pool, 'a,b')
    assert pool.xe('vm-list', 'name-label=nope', '--minimal') == Run(0, '\n', '')
    assert pool.xe('vm-list', 'power-state=halted\nbreak', '--minimal') == Run(
        1, '', "Error: Unknown field 'break'\n"), 'a newline splits the argument'


def test_trap_12_who_answers_a_login(a_pool: Any) -> None:
    pool = a_pool(vm('web'), hosts=[{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'}])
    session = pool.session()
    master = [record for record in session.xenapi.host.get_all_records().values() if record['hostname'] == 'xcp1'][0]

    with pytest.raises(XenAPI.Failure) as caught:
        pool.session(host=2)
    assert caught.value.details == ['HOST_IS_SLAVE', master['address']]
    on_member = unix_session(pool, host=2)
    assert on_member.xenapi.VM.get_by_name_label('web') == session.xenapi.VM.get_by_name_label('web')
    assert on_member.xenapi.host.get_hostname(on_member.xenapi.session.get_this_host(on_member.handle)) == 'xcp2'

    with pytest.raises(XenAPI.Failure) as caught:
        pool.session(password='wrong')
    assert caught.value.details[:2] == ['SESSION_AUTHENTICATION_FAILED', 'root']

    first = session.handle
    exchange_call(pool, 'session.logout', first)
    assert session.xenapi.VM.get_by_name_label('web'), 'the module logs in again without a word'
    assert session.handle != first
    stale = ask(pool.url_of(), 'GET', '/export', {'session_id': first, 'uuid': named(pool, 'web')}, {})
    assert stale.status == 401 and stale.header('WWW-Authenticate') == 'Basic realm="get_export"'


def unix_session(pool: Pool, host: int = 1) -> Any:
    """A session over a host's unix socket, where any password is good."""
    class Transport(XenAPI.UDSTransport):
        def make_connection(self, _host: Any) -> Any:
            connection = super().make_connection('x')
            connection.connect = lambda: setattr(connection, 'sock', connected(pool.socket_of(host)))
            return connection
    session = pool.closed_at_the_end(XenAPI.Session('http://x/', transport=Transport()))
    session.login_with_password('root', 'any', '1.0', 'tests')
    return session


def connected(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    return connection


def exchange_call(pool: Pool, method: str, *arguments: str) -> bytes:
    """One XML-RPC call without the module's kindness."""
    import xmlrpc.client
    content = xmlrpc.client.dumps(arguments, method).encode('utf-8')
    request = b'POST / HTTP/1.0\r\nContent-Length: %d\r\n\r\n' % len(content) + content
    return exchange(pool.socket_of(), request)


def test_trap_13_a_running_vm_is_refused_in_http_and_an_export_holds_the_vm(a_pool: Any) -> None:
    pool = a_pool(vm('busy', power_state='Running'), vm('web', disks=[disk(size=8 * MEBIBYTE, used=8)]),
                  faults=[slowly()])
    session = pool.session()
    busy, web = ref_of(session, 'busy'), ref_of(session, 'web')

    answer, task = export(pool, session, busy)
    assert answer.status_line == 'HTTP/1.0 500 Internal Error'
    assert ('VM_BAD_POWER_STATE: [ %s; halted, suspended; running ]' % busy).encode('ascii') in answer.body
    assert task['error_info'] == ['VM_BAD_POWER_STATE', busy, 'halted, suspended', 'running']

    exporting = Background(get, pool, '/export', ref=web)
    assert eventually(lambda: is_exporting(session, web))
    destroying = Background(pool.session().xenapi.VM.destroy, web)
    starting = Background(pool.session().xenapi.VM.start, web, False, False)
    time.sleep(1)
    assert is_exporting(session, web), 'the test is too slow to see anything'
    assert not destroying.is_over() and not starting.is_over(), 'both wait for the export to end'
    pool.release()
    assert exporting.result().status == 200
    # The server tries again every few seconds, either of the two first (helpers.ml, Policy.standard).
    assert eventually(lambda: destroying.is_over() or starting.is_over(), 60)


def test_trap_14_an_export_is_served_by_a_host_that_sees_all_disks(a_pool: Any) -> None:
    inserted = {'userdevice': '3', 'empty': False, 'sr': 'images of xcp3', 'name_label': 'a.iso'}
    pool = a_pool(vm('here', disks=[disk(sr='on xcp1')]), vm('there', disks=[disk(sr='on xcp2')]),
                  vm('apart', disks=[disk(sr='on xcp1'), disk(sr='on xcp2')]), vm('off', disks=[disk(sr='on xcp3')]),
                  vm('with ISO', disks=[disk(sr='on xcp1')], cds=[inserted]),
                  hosts=[{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'},
                         {'name_label': 'xcp3', 'live': False}],
                  srs=[{'name_label': 'on ' + host, 'type': 'ext', 'host': host} for host in ('xcp1', 'xcp2', 'xcp3')]
                  + [{'name_label': 'images of xcp3', 'type': 'iso', 'host': 'xcp3'}])
    session = pool.session()
    there = ref_of(session, 'there')
    member = [record for record in session.xenapi.host.get_all_records().values() if record['hostname'] == 'xcp2'][0]

    answer = ask(pool.url_of(), 'GET', '/export', {'ref': there, 'session_id': session.handle}, {})
    assert answer.status_line.endswith('302 Found') and answer.body == b''
    location = answer.header('Location')
    assert location.startswith('https://' + member['address']) and session.handle in location and there in location
    assert ask(pool.url_of(2), 'GET', '/export', {'ref': there, 'session_id': session.handle}, {}).status == 200
    assert get(pool, '/export', ref=ref_of(session, 'here')).status == 200
    assert pool.xe('vm-export', 'vm=there', 'filename=').exit_status == 0, 'xe follows, over TLS'
    disk_there = disks_of(session, there)[0]
    assert get(pool, '/export_raw_vdi', vdi=disk_there).status == 302

    for name in ('apart', 'off', 'with ISO'):
        task = session.xenapi.task.create('export', 'of a test')
        request = 'GET /export?session_id=%s&task_id=%s&ref=%s HTTP/1.0\r\n\r\n' % (
            session.handle, task, ref_of(session, name))
        nothing = exchange(('127.0.0.1', int(pool.url_of().rsplit(':', 1)[1])), request.encode('ascii'))
        assert nothing == b'', 'not even a status line'
        assert when_over(session, task)['error_info'] == ['NO_HOSTS_AVAILABLE']


def test_trap_15_small_refusals_and_silences(a_pool: Any) -> None:
    pool = a_pool(vm('web'))
    session = pool.session()
    web = ref_of(session, 'web')

    session.xenapi.VM.add_to_other_config(web, 'key', 'one')
    assert refused(session.xenapi.VM.add_to_other_config, web, 'key', 'two') == [
        'MAP_DUPLICATE_KEY', 'VM', 'other_config', web, 'key']
    assert session.xenapi.VM.get_other_config(web)['key'] == 'one'
    assert session.xenapi.VM.remove_from_other_config(web, 'no such key') == ''
    assert pool.xe('vm-export', 'vm=web', 'filename=', 'task-uuid=' + NO_UUID) == Run(
        1, '', "Error: Unknown field 'task-uuid'\n"), 'an unknown key is a filter on a field'
    for compress in ('yes', 'True', '1', 'lz4'):
        result = pool.xe('vm-export', 'vm=web', 'filename=', 'compress=' + compress)
        assert result.exit_status == 0 and result.stdout.startswith('ova.xml'), 'silently not compressed'
    assert pool.xe('vm-export', 'vm=web', 'filename=', 'compress=gzip').stdout.encode(
        'utf-8', 'surrogateescape')[:2] == b'\x1f\x8b'

    old = a_pool(vm('web'), xapi_version='1.160.0')
    result = old.xe('vm-export', 'vm=web', 'filename=', 'compress=zstd')
    assert result.exit_status == 1 and result.stdout == ''
    assert result.stderr.startswith("Error: Failed to parse parameter 'compress'")


def test_trap_16_no_two_commands_are_alike(a_pool: Any, tmp_path: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=2 * MEBIBYTE, used=1, seed=3)]))
    session = pool.session()
    vdi = uuid_of(session, 'VDI', disks_of(session, ref_of(session, 'web'))[0])

    assert pool.xe('vdi-export', 'uuid=' + vdi, 'filename=%s' % (tmp_path / 'a.raw')) == Run(0, '', '')
    assert (tmp_path / 'a.raw').read_bytes() == hashlib.sha256(b'3:0:0').digest() * 32768 + bytes(MEBIBYTE)
    assert pool.xe('vdi-export', 'uuid=' + vdi, 'file-name=%s' % (tmp_path / 'b.raw')) == Run(
        1, '', "Required parameter not found: filename\nFor usage run: 'xe help'\n")
    assert pool.xe('pool-dump-database', 'filename=%s' % (tmp_path / 'c.xml')) == Run(
        1, '', "Required parameter not found: file-name\nFor usage run: 'xe help'\n")
    assert pool.xe('vm-export', 'uuid=' + NO_UUID, 'filename=') == Run(1, '', NO_MATCH)
    assert pool.xe('vdi-export', 'uuid=' + NO_UUID, 'filename=') == Run(
        1, '', 'The uuid you supplied was invalid.\ntype: VDI\nuuid: %s\n' % NO_UUID)
    assert pool.xe('vm-nonsense') == Run(1, '', "Unknown command: vm-nonsense\nFor usage run: 'xe help'\n")


def test_trap_17_a_failed_snapshot_cleans_up_and_a_dead_caller_does_not(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(sr='store'), disk(sr='images')]), vm('db'), srs=[STORE, IMAGES],
                  faults=[at('api:VM.snapshot', object='db', sleeps=60, until='enough')])
    session = pool.session()
    before = set(session.xenapi.VDI.get_all()), set(session.xenapi.VM.get_all())

    assert refused(session.xenapi.VM.snapshot, ref_of(session, 'web'), 'half')[0] == 'SR_OPERATION_NOT_SUPPORTED'
    assert (set(session.xenapi.VDI.get_all()), set(session.xenapi.VM.get_all())) == before

    import xmlrpc.client
    content = xmlrpc.client.dumps((session.handle, ref_of(session, 'db'), 'of a dead caller'), 'VM.snapshot')
    connection = connected(pool.socket_of())
    connection.sendall(('POST / HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s' % (len(content), content)).encode('ascii'))
    time.sleep(0.2)
    connection.close()
    assert session.xenapi.VM.get_by_name_label('of a dead caller') == []
    pool.release()
    assert eventually(lambda: session.xenapi.VM.get_by_name_label('of a dead caller')), 'the server goes on'
    assert len(session.xenapi.VDI.get_all()) == len(before[0]) + 1


def test_trap_18_parameters_of_failures_differ_by_version_and_cause(a_pool: Any) -> None:
    for version, expected in (('24.19.2', 2), ('25.33.2', 4)):
        pool = a_pool(vm('web', disks=[disk(size=16 * MEBIBYTE, used=16)]), xapi_version=version, faults=[slowly()])
        session = pool.session()
        web = ref_of(session, 'web')
        exporting = Background(get, pool, '/export', ref=web)
        assert eventually(lambda: is_exporting(session, web))
        # Refused at once, where VM.destroy would wait.
        details = refused(session.xenapi.VM.assert_operation_valid, web, 'destroy')
        assert details[0] == 'OTHER_OPERATION_IN_PROGRESS' and len(details) == 1 + expected
        assert details[1:3] == (['VM.export', web] if expected == 2 else ['VM', web])
        vdi = disks_of(session, web)[0]
        assert eventually(lambda: len(session.xenapi.VDI.get_VBDs(vdi)) == 2), 'the control domain has the disk too'
        assert refused(session.xenapi.VDI.destroy, vdi) == ['VDI_IN_USE', vdi, 'destroy']
        pool.release()
        exporting.result()

    running = a_pool(vm('busy', power_state='Running'), vm('other'))
    session = running.session()
    api, other = session.xenapi, ref_of(session, 'other')
    busy_disk = disks_of(session, ref_of(session, 'busy'))[0]
    vbd = api.VBD.create({'VM': other, 'VDI': busy_disk, 'userdevice': '5', 'bootable': False, 'mode': 'RW', 'type': 'Disk',
                          'empty': False, 'other_config': {}, 'qos_algorithm_type': '', 'qos_algorithm_params': {}})
    assert refused(api.VM.start, other, False, False) == ['VDI_IN_USE', busy_disk], 'one parameter only'
    assert refused(api.VBD.assert_attachable, vbd) == ['VDI_IN_USE', busy_disk]
    # xapi_vbd_helpers.ml valid_operations: a control domain is exempt, so an export reads a running VM's own disk ...
    answer = get(running, '/export_raw_vdi', vdi=busy_disk)
    assert (answer.status, answer.body) == (200, running.read(uuid_of(session, 'VDI', busy_disk)))
    # ... and one that would write, an import, is not.
    answer = put(running, '/import_raw_vdi', bytes(MEBIBYTE), vdi=busy_disk, format='raw')
    assert ('VDI_IN_USE: [ %s ]' % busy_disk).encode('ascii') in answer.body


def test_trap_19_a_full_sr_has_a_code_of_its_own(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=8 * MEBIBYTE, used=8)]),
                  srs=[{'name_label': 'small', 'type': 'lvm', 'shared': True, 'size': 12 * MEBIBYTE}])
    session = pool.session()
    failure = None
    for number in range(5):
        try:
            session.xenapi.VM.snapshot(ref_of(session, 'web'), 'number %d' % number)
            for block in range(8):
                pool.command('write', '--dir', pool.dir, '--vm', 'web', '--device', 'xvda', '--block', str(block))
        except XenAPI.Failure as caught:
            failure = caught.details
            break
    assert failure is not None, 'the store never filled up'
    assert failure[:2] == ['SR_BACKEND_FAILURE_44', ''] and 'There is insufficient space' in failure[2]
    result = pool.xe('vm-snapshot', 'vm=web', 'new-name-label=one more')
    assert result.stderr.startswith('Error code: SR_BACKEND_FAILURE_44\nError parameters: , There is insufficient space')


def test_trap_20_a_task_is_more_than_success_or_failure(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=64 * MEBIBYTE, used=64)]), faults=[at('http:/export', runs_at=2 * MEBIBYTE)])
    session = pool.session()
    web = ref_of(session, 'web')
    task = session.xenapi.task.create('export', 'of a test')
    created = session.xenapi.task.get_record(task)
    assert (created['status'], created['progress'], created['error_info']) == ('pending', 0.0, [])
    assert created['finished'].value == EPOCH

    session.xenapi.task.destroy(task)
    marked = session.xenapi.task.get_record(task)
    assert marked['status'] == 'pending' and 'destroy' in marked['current_operations'].values(), 'only marked'

    task = session.xenapi.task.create('export', 'of a test')
    exporting = Background(ask, pool.url_of(), 'GET', '/export',
                           {'session_id': session.handle, 'task_id': task, 'ref': web}, {})
    assert eventually(lambda: 'cancel' in session.xenapi.task.get_allowed_operations(task))
    session.xenapi.task.cancel(task)
    assert when_over(session, task)['status'] == 'cancelled'
    exporting.result()
    session.xenapi.task.destroy(task)
    assert refused(session.xenapi.task.get_record, task) == ['HANDLE_INVALID', 'task', task]

    # The task that xe makes for its export is named so; cancelled, the command fails.
    running = Background(pool.xe, 'vm-export', 'vm=web', 'filename=')
    assert eventually(lambda: is_exporting(session, web))
    own = [ref for ref, operation in session.xenapi.VM.get_current_operations(web).items() if operation == 'export'][0]
    assert session.xenapi.task.get_name_label(own) == 'Export of VM'
    assert session.xenapi.task.get_name_description(own) == uuid_of(session, 'VM', web)
    assert eventually(lambda: 'cancel' in session.xenapi.task.get_allowed_operations(own))
    session.xenapi.task.cancel(own)
    result = running.result()
    assert result.exit_status == 1 and result.stderr == 'Export cancelled\n'


def test_trap_21_imports_forgive_and_rename(a_pool: Any) -> None:
    networks = [{'name_label': 'Pool-wide network associated with eth0', 'bridge': 'xenbr0'},
                {'name_label': 'lab', 'bridge': 'xenbr1'}]
    pool = a_pool(vm('web', disks=[disk(size=4 * MEBIBYTE, used=4, seed=1)], vifs=[{'device': '0', 'network': 'lab'}]),
                  vm('old', disks=[disk(size=4 * MEBIBYTE, used=4, seed=2)]),
                  vm('new', disks=[disk(size=4 * MEBIBYTE, used=[[1, 1]], seed=3)]), networks=networks)
    session = pool.session()
    web, old = ref_of(session, 'web'), disks_of(session, ref_of(session, 'old'))[0]
    old_uuid = uuid_of(session, 'VDI', old)
    before = pool.read(old_uuid)

    # import_raw_vdi.ml: as many bytes as Content-Length says are written, the rest of the disk stays.
    short = put(pool, '/import_raw_vdi', b'\xaa' * MEBIBYTE, vdi=old, format='raw')
    assert short.status == 200 and b'500' not in short.body
    assert pool.read(old_uuid) == b'\xaa' * MEBIBYTE + before[MEBIBYTE:]
    # A VHD is laid over the disk: what it does not have is left as it was.
    sparse = get(pool, '/export_raw_vdi', vdi=disks_of(session, ref_of(session, 'new'))[0], format='vhd').body
    assert len(sparse) == 2048 + 512 + 512 + 2 * MEBIBYTE + 512
    put(pool, '/import_raw_vdi', sparse, vdi=old, format='vhd')
    block = hashlib.sha256(b'3:1:0').digest() * 32768
    assert pool.read(old_uuid) == bytes(MEBIBYTE) + block + before[2 * MEBIBYTE:]

    archive = get(pool, '/export', ref=web).body
    original = session.xenapi.VM.get_record(web)
    copy = session.xenapi.VM.get_record(imported(pool, session, archive))
    assert copy['uuid'] != original['uuid'] and copy['name_label'] == 'web' and not copy['is_a_snapshot']
    assert copy['other_config']['mac_seed'] != original['other_config']['mac_seed']
    left, right = (session.xenapi.VIF.get_record(record['VIFs'][0]) for record in (original, copy))
    assert left['MAC'] != right['MAC'] and left['network'] == right['network'], 'the network is found by its name'

    _answer, task = import_of(pool, session, archive, restore='true')
    assert task['error_info'] == ['VM_TO_IMPORT_IS_NOT_NEWER_VERSION', web, '0', '0']
    snapshot = session.xenapi.VM.snapshot(web, 'of web')
    _answer, task = import_of(pool, session, get(pool, '/export', ref=snapshot).body, restore='true')
    assert task['error_info'] == ['DUPLICATE_MAC_SEED', original['other_config']['mac_seed']]
    for ref in (snapshot, web):
        session.xenapi.VM.destroy(ref)
    back = session.xenapi.VM.get_record(imported(pool, session, archive, restore='true'))
    assert back['uuid'] == original['uuid'] and back['other_config']['mac_seed'] == original['other_config']['mac_seed']
    assert session.xenapi.VIF.get_MAC(back['VIFs'][0]) == left['MAC']

    elsewhere = a_pool(networks=networks[:1])
    session = elsewhere.session()
    lost = session.xenapi.VM.get_record(imported(elsewhere, session, archive))
    made = session.xenapi.network.get_record(session.xenapi.VIF.get_network(lost['VIFs'][0]))
    assert made['name_label'] == 'lab' and made['PIFs'] == [], 'a network that leads nowhere is made'


def put(pool: Pool, path: str, body: bytes, **query: Any) -> Answer:
    return ask(pool.url_of(), 'PUT', path, query, {'Authorization': BASIC, 'Content-Length': str(len(body))}, body)


def import_of(pool: Pool, session: Any, archive: bytes, **query: Any) -> Tuple[Answer, Dict[str, Any]]:
    """An import with a task of its own: the answer, and the task when it is over."""
    task = session.xenapi.task.create('import', 'of a test')
    sr = [ref for ref, record in session.xenapi.SR.get_all_records().items() if record['content_type'] != 'iso'][0]
    query = dict(query, session_id=session.handle, task_id=task, sr_id=sr)
    answer = ask(pool.url_of(), 'PUT', '/import', query, {'Content-Length': str(len(archive))}, archive)
    return answer, when_over(session, task)


def imported(pool: Pool, session: Any, archive: bytes, **query: Any) -> str:
    """The ref of the VM that the import made."""
    _answer, task = import_of(pool, session, archive, **query)
    assert task['status'] == 'success', task['error_info']
    return re.search(NULL.replace('NULL', '[0-9a-f-]{36}'), task['result']).group()


def test_trap_22_a_database_dump_is_the_masters_and_has_an_end(a_pool: Any, tmp_path: Any) -> None:
    pool = a_pool(vm('web'), hosts=[{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'}],
                  faults=[at('http:/pool/xmldbdump', nth=3, breaks_off_after=500, silent=True)])
    path = tmp_path / 'pool.xml'
    assert pool.xe('pool-dump-database', 'file-name=%s' % path) == Run(0, '', '')
    content = path.read_text(encoding='utf-8')
    assert content.startswith('<?xml version="1.0" encoding="UTF-8"?>\n<database><manifest><pair key="schema_major_vsn"')
    assert content.endswith('</database>') and 'name__label="web"' in content
    assert pool.xe('pool-dump-database', 'file-name=%s' % path) == Run(
        1, '', 'Operation failed. Error: Sys_error("%s: File exists")\n' % path)

    cut = pool.xe('pool-dump-database', 'file-name=%s' % (tmp_path / 'cut.xml'))
    assert cut.exit_status == 0 and '</database>' not in (tmp_path / 'cut.xml').read_text(encoding='utf-8')
    assert b'</database>' not in get(pool, '/pool/xmldbdump', host=2).body, 'a member has no database in memory'


def test_trap_23_messages_pile_up_and_marks_are_copied(a_pool: Any) -> None:
    pool = a_pool(vm('web', tags=['gold'], other_config={'schedule': 'weekly'}))
    session = pool.session()
    web = ref_of(session, 'web')
    uuid = uuid_of(session, 'VM', web)
    session.xenapi.VDI.add_to_other_config(disks_of(session, web)[0], 'mark', 'of a disk')

    for name in ('first', 'second'):
        snapshot = session.xenapi.VM.snapshot(web, name)
    assert session.xenapi.VM.get_tags(snapshot) == ['gold']
    assert session.xenapi.VM.get_other_config(snapshot)['schedule'] == 'weekly'
    assert session.xenapi.VDI.get_other_config(disks_of(session, snapshot)[0])['mark'] == 'of a disk'
    messages = session.xenapi.message.get('VM', uuid, session.xenapi.VM.get_snapshot_time(web))
    assert [message['name'] for message in messages.values()] == ['VM_SNAPSHOTTED'] * 2
    assert {message['body'] for message in messages.values()} == {
        "VM 'web' (uuid: %s) snapshotted, snapshot name: %s" % (uuid, name) for name in ('first', 'second')}
    for message in messages:
        session.xenapi.message.destroy(message)
    assert session.xenapi.message.get('VM', uuid, session.xenapi.VM.get_snapshot_time(web)) == {}


def test_trap_24_the_memory_of_a_suspended_vm_travels_only_where_it_is_asked_for(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(seed=1)], memory=8 * MEBIBYTE, power_state='Suspended', vifs=[{'device': '0'}]))
    session = pool.session()
    api = session.xenapi
    web = ref_of(session, 'web')
    (root,), image = disks_of(session, web), api.VM.get_suspend_VDI(web)
    memory = pool.read(uuid_of(session, 'VDI', image))
    assert len(memory) == 8 * MEBIBYTE and memory.strip(b'\0')

    # xapi_vm_lifecycle.ml: only a halted VM's drives and interfaces are detached; xapi_vdi.ml: so its disks stay.
    assert all(api.VBD.get_currently_attached(vbd) for vbd in api.VM.get_VBDs(web))
    assert all(api.VIF.get_currently_attached(vif) for vif in api.VM.get_VIFs(web))
    assert refused(api.VDI.destroy, root) == ['VDI_IN_USE', root, 'destroy']
    # xapi_vm_clone.ml: a snapshot is halted and has no memory, a checkpoint has a copy of it.
    snapshot, checkpoint = api.VM.snapshot(web, 'a snapshot'), api.VM.checkpoint(web, 'a checkpoint')
    assert [api.VM.get_power_state(snapshot), api.VM.get_suspend_VDI(snapshot)] == ['Halted', NULL]
    assert not any(api.VBD.get_currently_attached(vbd) for vbd in api.VM.get_VBDs(snapshot))
    assert pool.read(uuid_of(session, 'VDI', api.VM.get_suspend_VDI(checkpoint))) == memory

    # xapi_vbd_helpers.ml: its disks count as offline when they are to be attached elsewhere, so it can be exported.
    plain = get(pool, '/export', ref=web).body
    assert len(suspended_parts(plain)) == 0 and vm_fields(ova_of(plain), 'power_state') == ['Halted']
    halted = api.VM.get_record(imported(pool, session, plain))
    assert [halted['power_state'], halted['suspend_VDI']] == ['Halted', NULL]
    api.VM.set_is_a_template(checkpoint, False)
    for ref in (web, checkpoint):
        archive = get(pool, '/export', ref=ref, preserve_power_state='true').body
        assert len(suspended_parts(archive)) == 1
        back = imported(pool, session, archive)
        assert api.VM.get_power_state(back) == 'Suspended'
        copy = api.VM.get_suspend_VDI(back)
        assert pool.read(uuid_of(session, 'VDI', copy)) == memory and 'import_task' in api.VDI.get_sm_config(copy)
        # A resume gives the guest only the drives that are attached (xapi_xenops.ml create_metadata): import.ml keeps that.
        assert all(api.VBD.get_currently_attached(vbd) for vbd in api.VM.get_VBDs(back))
        assert all(api.VIF.get_currently_attached(vif) for vif in api.VM.get_VIFs(back))
        api.VM.hard_shutdown(back)
        assert refused(api.VDI.get_record, copy)[0] == 'HANDLE_INVALID', 'a shutdown drops the memory'
        api.VDI.destroy(disks_of(session, back)[0])

    # import.ml: every VDI of type `suspend` is made and filled, also if the VM in the file is halted.
    unhung = with_ova(archive, '<name>power_state</name><value>Suspended<', '<name>power_state</name><value>Halted<')
    _answer, task = import_of(pool, session, unhung)
    assert task['error_info'][0] == 'VDI_IN_USE', 'a drive that is attached, of a VM that is not suspended'
    attached = '<name>currently_attached</name><value><boolean>%d</boolean>'
    made = imported(pool, session, with_ova(unhung, attached % 1, attached % 0))
    assert [api.VM.get_power_state(made), api.VM.get_suspend_VDI(made)] == ['Halted', NULL]
    orphans = [record for record in api.VDI.get_all_records().values() if record['type'] == 'suspend'
               and record['sm_config'].get('import_task') == api.VM.get_other_config(made)['import_task']]
    assert len(orphans) == 1 and pool.read(orphans[0]['uuid']) == memory
    before = set(api.VDI.get_all()), set(api.VM.get_all())
    ident, = suspended_parts(archive)
    field = '<name>suspend_VDI</name><value>%s</value>'
    _answer, task = import_of(pool, session, with_ova(archive, field % ident, field % 'Ref'))
    assert task['error_info'] == ['IMPORT_ERROR_FAILED_TO_FIND_OBJECT', 'Ref']
    assert (set(api.VDI.get_all()), set(api.VM.get_all())) == before, 'what was made is gone'


def suspended_parts(archive: bytes) -> List[str]:
    """The ids of the memory images whose blocks are in the archive."""
    ova = ova_of(archive)
    idents = re.findall('<name>suspend_VDI</name><value>(Ref:[0-9]+)</value>', ova)
    return [ident for ident in idents if any(member.name == ident + '/00000000' for member in read_tar(archive)[0])]


def with_ova(archive: bytes, old: str, new: str) -> bytes:
    """The archive with that in its ova.xml; what gets shorter is filled up with spaces behind the text."""
    text = ova_of(archive)
    assert old in text
    changed = text.replace(old, new).ljust(len(text)).encode('utf-8')
    assert len(changed) == len(text.encode('utf-8'))
    return archive[:512] + changed + archive[512 + len(changed):]


def test_looks_at_one_pool_that_go_on_at_the_same_time_show_the_same_uuids(a_pool: Any) -> None:
    pool = a_pool(vm('web', snapshots=[{'name_label': 'before upgrade'}]))
    with concurrent.futures.ThreadPoolExecutor(4) as looks:
        seen = [{record['uuid'] for record in tables['VBD'].values()}
                for tables in looks.map(lambda _: pool.dump(), range(40))]
    assert seen == seen[:1] * 40
