"""Data on their way in and out: what an import writes, what becomes of a transfer whose server or client goes away.

Sources: the files named are those of xapi v24.19.2; what was recorded or tried on a real server of that version says so.
"""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from typing import Any, Dict, List, Tuple

import pytest

from support.language import MEBIBYTE, at, disk, slowly, vm
from support.process import CRON_PATH, SIMPOOL, TIME_LIMIT_S, Pool, Run, run, write_json
from support.wire import Background, ask, eventually
from test_calls import attached_to_dom0
from test_traps import STORE, disks_of, get, import_of, imported, put, ref_of, refused, uuid_of, when_over

SECTOR = 512
BLOCK = 2 * MEBIBYTE
OLD = b'\xaa'
#: Slow enough to be met halfway, wherever the data go.
SLOW = [at('http:/export', runs_at=MEBIBYTE), at('http:/export_raw_vdi', runs_at=MEBIBYTE), at('http:/import', runs_at=MEBIBYTE),
        at('http:/import_raw_vdi', runs_at=MEBIBYTE)]


# --- A server that ends in the middle --------------------------------------------------------------------------------

def attached_after_a_restart(pool: Pool, number: int, begin: Any) -> Tuple[Any, str, Dict[str, Any]]:
    """A transfer is begun, the server ends by this signal and comes back: (session, VBD, its record)."""
    session = pool.session()
    running = Background(begin)
    before, = eventually(lambda: attached_to_dom0(session))
    task = session.xenapi.VBD.get_other_config(before)['task_id']
    assert session.xenapi.task.get_status(task) == 'pending'
    pool.process.send_signal(number)
    pool.process.wait(TIME_LIMIT_S)
    pool.stop()
    try:
        running.result()
    except Exception:
        pass  # the client hears what a client hears of a server that is gone
    pool.start()
    session = pool.session()
    vbd, = attached_to_dom0(session)
    record = session.xenapi.VBD.get_record(vbd)
    assert vbd == before and record['currently_attached'] and record['other_config'] == {'task_id': task}
    assert refused(session.xenapi.task.get_record, task) == ['HANDLE_INVALID', 'task', task]
    return session, vbd, record


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_a_control_domains_drive_outlives_the_server(a_pool: Any, number: int) -> None:
    # tried on a real server: nothing looks for such drives at the start
    pool = a_pool(vm('web', disks=[disk(size=16 * MEBIBYTE, used=16)]), faults=SLOW)
    session = pool.session()
    snapshot = session.xenapi.VM.snapshot(ref_of(session, 'web'), 'of web')
    session, vbd, record = attached_after_a_restart(pool, number, lambda: get(pool, '/export', ref=snapshot))
    api = session.xenapi
    vdi, uuid = record['VDI'], uuid_of(session, 'VM', snapshot)
    assert api.VDI.get_snapshot_of(vdi) == disks_of(session, ref_of(session, 'web'))[0]
    assert refused(api.VDI.destroy, vdi) == ['VDI_IN_USE', vdi, 'destroy']
    # The command that would remove the snapshot fails, and has already destroyed the VM's record.
    removed = pool.xe('snapshot-uninstall', 'uuid=' + uuid, 'force=true')
    assert removed.exit_status == 1
    assert removed.stderr.startswith('This operation cannot be performed because this VDI is in use by some other operation\n')
    assert refused(api.VM.get_by_uuid, uuid)[0] == 'UUID_INVALID' and api.VDI.get_uuid(vdi)
    assert refused(api.VBD.destroy, vbd)[0] == 'OPERATION_NOT_ALLOWED'
    for call, ref in ((api.VBD.unplug, vbd), (api.VBD.destroy, vbd), (api.VDI.destroy, vdi)):
        call(ref)
    assert attached_to_dom0(session) == []
    assert api.VM.get_current_operations(ref_of(session, 'web')) == {}


def test_an_import_whose_server_ends_leaves_its_debris(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=16 * MEBIBYTE, used=16)]), faults=[SLOW[2]])
    session = pool.session()
    archive = get(pool, '/export', ref=ref_of(session, 'web')).body
    session, vbd, record = attached_after_a_restart(
        pool, signal.SIGTERM, lambda: put(pool, '/import', archive, sr_id=session.xenapi.SR.get_all()[0]))
    api = session.xenapi
    assert record['mode'] == 'RW'
    made, = [ref for ref in api.VM.get_by_name_label('web') if 'import_task' in api.VM.get_other_config(ref)]
    assert api.VM.get_current_operations(made) == {}, 'cleared at the start, as on any VM'
    assert refused(api.VM.start, made, False, False)[0] == 'VDI_IN_USE'


ENDS_IN_AN_EXPORT = '''
import sys
sys.path.insert(0, sys.argv[1])
import pool_file, server, state
from faults import Faults
folder = sys.argv[2]
state.begin(folder, pool_file.check({"vms": [{"name_label": "web", "disks": [{}]}]}))
running = server.Server(folder, state.open_for_serving(folder), Faults())
pool = running.pool
with pool.attach_to_dom0(next(iter(pool.tables["VDI"])), pool.master(), "RO", "OpaqueRef:task"):
    running.stop()
print([record["other_config"] for record in state.load(folder).tables["VBD"].values() if record["currently_attached"]])
'''


def test_what_threads_do_when_the_server_has_ended_is_not_written(tmp_path: Any) -> None:
    # a thread may live a moment longer than its server, and would tidy up: a race in the test above, none here
    result = run([sys.executable, '-c', ENDS_IN_AN_EXPORT, SIMPOOL, str(tmp_path)], {'PATH': CRON_PATH})
    assert result == Run(0, "[{'task_id': 'OpaqueRef:task'}]\n", '')


def test_newer_servers_write_no_task_into_the_drive(a_pool: Any) -> None:
    # attach_helpers.ml up to v26.15 and from v26.16.0 on
    for version, keys in (('1.9.83', ['task_id']), ('26.15.0', ['task_id']), ('26.16.0', [])):
        pool = a_pool(vm('web', disks=[disk(size=4 * MEBIBYTE, used=4)]), xapi_version=version,
                      faults=[slowly(first=MEBIBYTE)])
        session = pool.session()
        running = Background(get, pool, '/export', ref=ref_of(session, 'web'))
        vbd, = eventually(lambda: attached_to_dom0(session))
        assert list(session.xenapi.VBD.get_other_config(vbd)) == keys
        pool.release()
        running.result()


def test_a_server_that_loses_its_last_seconds_leaves_the_drive_too(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=16 * MEBIBYTE, used=16)]), vm('other'),
                  faults=[SLOW[0], at('api:VM.get_record', object='other', lose=0)])
    session = pool.session()
    running = Background(get, pool, '/export', ref=ref_of(session, 'web'))
    vbd, = eventually(lambda: attached_to_dom0(session))
    eventually(lambda: session.xenapi.VBD.get_currently_attached(vbd))
    other = ref_of(session, 'other')
    with pytest.raises(Exception):
        session.xenapi.VM.get_record(other)
    try:
        running.result()
    except Exception:
        pass
    session = pool.session()
    assert attached_to_dom0(session) == [vbd] and session.xenapi.VBD.get_currently_attached(vbd)
    session.xenapi.VBD.unplug(vbd)


def test_a_pool_that_is_run_for_one_command_does_not_die_of_its_end(a_pool: Any, tmp_path: Any) -> None:
    # `simpool run` ends with its command; that a killed command's export is over is noticed first, as a real server does.
    description = {'vms': [vm('web', disks=[disk(size=64 * MEBIBYTE, used=64)])]}
    write_json(str(tmp_path / 'POOL.json'), description)
    folder = str(tmp_path / 'd')
    script = 'xe vm-export vm=web filename=%s & while [ ! -s %s ]; do sleep 0.05; done; kill -9 $!' % ((str(tmp_path / 'x'),) * 2)
    result = run([sys.executable, SIMPOOL, 'run', '--pool', str(tmp_path / 'POOL.json'), '--dir', folder, '--', 'sh', '-c', script],
                 {'PATH': CRON_PATH})
    assert result.exit_status == 0, result
    dump = json.loads(subprocess.run([sys.executable, SIMPOOL, 'dump', '--dir', folder], stdout=subprocess.PIPE, check=True,
                                     env={'PATH': CRON_PATH}).stdout.decode('utf-8'))
    assert len(dump['VBD']) == 1 and dump['VM'], 'only the VM has a drive'


# --- What an import writes -------------------------------------------------------------------------------------------

def a_vhd(blocks: Dict[int, Tuple[bytes, bytes]], size: int, disk_type: int = 3, table_behind: bool = False) -> bytes:
    """A dynamic VHD of these blocks: {number: (bitmap, data)}."""
    entries = (size + BLOCK - 1) // BLOCK
    table_bytes = (4 * entries + SECTOR - 1) // SECTOR * SECTOR
    table_at = 1536 + (len(blocks) * (SECTOR + BLOCK) if table_behind else 0)
    at_sector = (1536 + (0 if table_behind else table_bytes)) // SECTOR
    table, data = bytearray(b'\xff' * table_bytes), b''
    for number, (bitmap, content) in blocks.items():
        struct.pack_into('>I', table, 4 * number, at_sector + len(data) // SECTOR)
        data += bitmap + content
    footer = summed(struct.pack('>8sIIQI4sIIQQIII16sB427x', b'conectix', 2, 0x10000, 512, 0, b'test', 1, 0, size, size, 0,
                                disk_type, 0, b'\x07' * 16, 0), 64)
    header = summed(struct.pack('>8sQQIIII16sII512s192s256x', b'cxsparse', 2 ** 64 - 1, table_at, 0x10000, entries, BLOCK, 0,
                                bytes(16), 0, 0, bytes(512), bytes(192)), 36)
    return footer + header + (data + bytes(table) if table_behind else bytes(table) + data) + footer


def summed(block: bytes, place: int) -> bytes:
    return block[:place] + struct.pack('>I', ~sum(block) & 0xffffffff) + block[place + 4:]


def a_disk_that_held_something(a_pool: Any, **sr: Any) -> Tuple[Pool, Any, str]:
    """(pool, session, disk of 8 MiB): every byte of it is OLD."""
    pool = a_pool(vm('old', disks=[disk(size=8 * MEBIBYTE, used=0)]), srs=[dict(STORE, **sr)])
    session = pool.session()
    vdi, = disks_of(session, ref_of(session, 'old'))
    assert put(pool, '/import_raw_vdi', OLD * (8 * MEBIBYTE), vdi=vdi, format='raw').status == 200
    return pool, session, vdi


def import_vhd(pool: Pool, session: Any, vdi: str, content: bytes, **query: Any) -> Dict[str, Any]:
    """The task of an import."""
    task = session.xenapi.task.create('import', 'of a test')
    query = dict({'vdi': vdi, 'format': 'vhd', 'session_id': session.handle, 'task_id': task}, **query)
    ask(pool.url_of(), 'PUT', '/import_raw_vdi', query, {'Content-Length': str(len(content))}, content)
    return when_over(session, task)


FULL = b'\xff' * SECTOR
#: The first and the third sector.
TWO_SECTORS = b'\xa0' + bytes(SECTOR - 1)


@pytest.mark.parametrize('disk_type', [3, 4])
def test_a_vhd_writes_only_the_sectors_whose_bit_is_set(a_pool: Any, disk_type: int) -> None:
    # f.ml openstream, impl.ml serve_vhd_to_raw; what lay in the empty blocks stays (tried on a real server)
    pool, session, vdi = a_disk_that_held_something(a_pool)
    content = a_vhd({3: (FULL, bytes(BLOCK)), 1: (TWO_SECTORS, b'\x01' * BLOCK)}, 8 * MEBIBYTE, disk_type)
    assert import_vhd(pool, session, vdi, content)['status'] == 'success'
    old = OLD * SECTOR
    expected = OLD * BLOCK + b'\x01' * SECTOR + old + b'\x01' * SECTOR + OLD * (BLOCK - 3 * SECTOR) + OLD * BLOCK + bytes(BLOCK)
    assert pool.read(uuid_of(session, 'VDI', vdi)) == expected


def test_what_a_vhd_needs_stands_before_what_needs_it(a_pool: Any) -> None:
    # impl.ml Channel_In.skip_to goes forward only
    pool, session, vdi = a_disk_that_held_something(a_pool)
    whole = a_vhd({1: (FULL, b'\x01' * BLOCK)}, 8 * MEBIBYTE)
    for broken in (a_vhd({1: (FULL, b'\x01' * BLOCK)}, 8 * MEBIBYTE, table_behind=True),
                   whole[:100] + b'\x01' + whole[101:],                 # a footer whose checksum is not its own
                   whole[:520] + b'\x01' + whole[521:],                 # such a header
                   whole[SECTOR:], b'raw' * 1000):
        task = import_vhd(pool, session, vdi, broken)
        assert (task['status'], task['error_info']) == ('failure', ['VDI_IO_ERROR', 'Device I/O errors'])
        assert pool.read(uuid_of(session, 'VDI', vdi)) == OLD * (8 * MEBIBYTE)
    task = import_vhd(pool, session, vdi, whole[:-SECTOR])              # no footer at the end: the blocks are written, and it fails
    assert task['error_info'] == ['VDI_IO_ERROR', 'Device I/O errors']
    assert pool.read(uuid_of(session, 'VDI', vdi))[BLOCK:2 * BLOCK] == b'\x01' * BLOCK


def test_a_vhd_that_is_given_as_raw_is_written_as_it_is(a_pool: Any, tmp_path: Any) -> None:
    # tried on a real server: exit 0, not a word, and the disk holds garbage
    pool, session, vdi = a_disk_that_held_something(a_pool)
    content = a_vhd({1: (FULL, b'\x01' * BLOCK)}, 8 * MEBIBYTE)
    path = tmp_path / 'disk.vhd'
    path.write_bytes(content)
    uuid = uuid_of(session, 'VDI', vdi)
    assert pool.xe('vdi-import', 'uuid=' + uuid, 'filename=%s' % path) == Run(0, '', '')
    assert pool.read(uuid) == content + OLD * (8 * MEBIBYTE - len(content))
    for name, bytes_of_it in (('disk.raw', OLD * MEBIBYTE), ('disk.vhd.zst', b'\x28\xb5\x2f\xfd' + bytes(2000))):
        (tmp_path / name).write_bytes(bytes_of_it)
        result = pool.xe('vdi-import', 'uuid=' + uuid, 'filename=%s' % (tmp_path / name), 'format=vhd')
        assert result == Run(1, '', 'Error code: VDI_IO_ERROR\nError parameters: Device I/O errors\n')


def bits(*sectors: int) -> bytes:
    """The bitmap with these bits."""
    bitmap = bytearray(SECTOR)
    for sector in sectors:
        bitmap[sector // 8] |= 0x80 >> sector % 8
    return bytes(bitmap)


def laid_over(content: bytes, blocks: Dict[int, Tuple[bytes, bytes]]) -> bytes:
    """What a disk holds when the sectors of these blocks are written, one after another."""
    result = bytearray(content)
    for number, (bitmap, data) in blocks.items():
        for sector in range(BLOCK // SECTOR):
            if bitmap[sector // 8] & (0x80 >> sector % 8):
                start = number * BLOCK + sector * SECTOR
                result[start:start + SECTOR] = data[sector * SECTOR:(sector + 1) * SECTOR]
    return bytes(result[:len(content)])


def guest_writes(pool: Pool, block: int, *more: str) -> None:
    pool.command('write', '--dir', pool.dir, '--vm', 'web', '--device', 'xvda', '--block', str(block), *more)


@pytest.mark.parametrize('disk_type', [3, 4])
def test_a_vhd_is_laid_over_what_was_never_imported_sector_by_sector(a_pool: Any, tmp_path: Any, disk_type: int) -> None:
    # Generated contents, what guests wrote, zeros of theirs and what was never written; what a snapshot froze stays.
    pool = a_pool(vm('web', disks=[disk(size=12 * MEBIBYTE, used=7, seed=5)]))
    session = pool.session()
    web = ref_of(session, 'web')
    vdi, = disks_of(session, web)
    uuid = uuid_of(session, 'VDI', vdi)
    guest_writes(pool, 3)
    guest_writes(pool, 4, '--zero')
    frozen = uuid_of(session, 'VDI', disks_of(session, session.xenapi.VM.snapshot(web, 'before'))[0])
    before = pool.read(uuid)
    new = b'\x01' * SECTOR + b'\x02' * SECTOR
    # ascending in the file, any order in the disk; across the MiB, first, last, every second one, all but one
    blocks = {1: (bits(*range(2047, 2050)), new * 2048), 0: (bits(0, 4095), new * 2048), 2: (bits(*range(0, 4096, 2)), new * 2048),
              5: (bits(7), new * 2048), 3: (bits(*(set(range(4096)) - {9})), new * 2048), 4: (bits(), new * 2048)}
    path = tmp_path / 'difference.vhd'
    path.write_bytes(a_vhd(blocks, 12 * MEBIBYTE, disk_type))
    expected = laid_over(before, blocks)
    assert expected != before
    assert pool.xe('vdi-import', 'uuid=' + uuid, 'format=vhd', 'filename=%s' % path) == Run(0, '', '')
    for _ in ('while it serves', 'after a restart'):
        assert pool.read(uuid) == expected and pool.read(frozen) == before
        pool.stop()
        pool.start()
    # A second time it is the same; a guest's write stands over it.
    assert import_vhd(pool, pool.session(), vdi, path.read_bytes())['status'] == 'success'
    assert pool.read(uuid) == expected
    guest_writes(pool, 0, '--zero')
    assert pool.read(uuid) == bytes(MEBIBYTE) + expected[MEBIBYTE:]


def test_a_vhd_that_is_larger_than_the_disk_fails_only_at_data_behind_its_end(a_pool: Any) -> None:
    # "VHD larger than VDI": what fits is written before it fails
    pool, session, vdi = a_disk_that_held_something(a_pool)
    uuid = uuid_of(session, 'VDI', vdi)
    held = OLD * (8 * MEBIBYTE)
    good = {0: (TWO_SECTORS, b'\x01' * BLOCK)}
    for behind, fails in (({}, False), ({4: (bits(), b'\x01' * BLOCK)}, False), ({4: (bits(4095), b'\x01' * BLOCK)}, True),
                          ({7: (bits(0), bytes(BLOCK))}, True), ({7: (FULL, b'\x01' * BLOCK)}, True)):
        assert import_vhd(pool, session, vdi, OLD * (8 * MEBIBYTE), format='raw')['status'] == 'success'
        task = import_vhd(pool, session, vdi, a_vhd({**good, **behind}, 16 * MEBIBYTE))
        assert task['status'] == ('failure' if fails else 'success'), behind
        assert task['error_info'] == (['VDI_IO_ERROR', 'Device I/O errors'] if fails else [])
        assert pool.read(uuid) == laid_over(held, good)
    # A smaller one than the disk is no matter.
    assert import_vhd(pool, session, vdi, a_vhd({0: (FULL, b'\x03' * BLOCK)}, BLOCK))['status'] == 'success'
    assert pool.read(uuid) == b'\x03' * BLOCK + held[BLOCK:]


def test_where_a_disk_ends_within_a_block_only_zeros_may_stand_behind_its_end(a_pool: Any) -> None:
    # No disk of VHDs ends so: what is exported of one that does is filled up with zeros, all bits set, and can come back.
    pool = a_pool(vm('web', disks=[disk(size=5 * MEBIBYTE + SECTOR, used=6, seed=5)]))
    session = pool.session()
    vdi, = disks_of(session, ref_of(session, 'web'))
    uuid = uuid_of(session, 'VDI', vdi)
    before = pool.read(uuid)
    inside = b'\x01' * (MEBIBYTE + SECTOR)
    assert import_vhd(pool, session, vdi, get(pool, '/export_raw_vdi', vdi=vdi, format='vhd').body)['status'] == 'success'
    assert pool.read(uuid) == before
    for data, status in ((inside + bytes(BLOCK - len(inside)), 'success'), (b'\x01' * BLOCK, 'failure')):
        assert import_vhd(pool, session, vdi, a_vhd({2: (FULL, data)}, 6 * MEBIBYTE))['status'] == status
        assert pool.read(uuid) == before[:2 * BLOCK] + inside


def test_xe_takes_a_vhd_from_a_file_and_never_from_a_pipe(a_pool: Any, tmp_path: Any) -> None:
    # Tried on a real server: from a pipe the blocks are written, and it ends with an error all the same.
    pool, session, vdi = a_disk_that_held_something(a_pool)
    uuid = uuid_of(session, 'VDI', vdi)
    path = tmp_path / 'difference.vhd'
    words = [os.path.join(pool.dir, 'bin', 'xe'), 'vdi-import', 'uuid=' + uuid, 'format=vhd', 'filename=/dev/stdin']
    for number, expected in enumerate((b'\x01', b'\x02')):
        path.write_bytes(a_vhd({1: (FULL, expected * BLOCK)}, 8 * MEBIBYTE, 4))
        if number == 0:
            assert run(words, {'PATH': CRON_PATH}, stdin=path.read_bytes()) == Run(
                1, '', 'Error code: VDI_IO_ERROR\nError parameters: Device I/O errors\n')
        else:
            with open(str(path), 'rb') as file:
                assert subprocess.run(words, env={'PATH': CRON_PATH}, stdin=file).returncode == 0
        assert pool.read(uuid) == OLD * BLOCK + expected * BLOCK + OLD * (2 * BLOCK)


def test_what_an_import_of_a_disk_does_not_take_leaves_no_disk(a_pool: Any) -> None:
    # import_raw_vdi.ml: 404 for an encoding (tried on a real server); only raw with a length makes a disk of its own
    pool, session, vdi = a_disk_that_held_something(a_pool)
    api = session.xenapi
    before = api.VDI.get_all()
    sr = api.VDI.get_SR(vdi)
    content = a_vhd({1: (FULL, b'\x01' * BLOCK)}, 8 * MEBIBYTE)
    for query, headers, status, told in (
            ({'vdi': vdi, 'format': 'vhd'}, {'Transfer-Encoding': 'chunked'}, 404, 'Cannot handle encoding: chunked'),
            ({'sr_id': sr, 'format': 'vhd'}, {'Content-Length': len(content)}, 400,
             'Importing a VHD directly into an SR not yet supported'),
            ({'sr_id': sr, 'format': 'raw'}, {}, 400, 'Not enough info supplied to import')):
        task = api.task.create('import', 'of a test')
        query = dict(query, session_id=session.handle, task_id=task)
        assert ask(pool.url_of(), 'PUT', '/import_raw_vdi', query, headers).status == status
        assert when_over(session, task)['error_info'] == ['INTERNAL_ERROR', told]
    assert api.VDI.get_all() == before and pool.read(uuid_of(session, 'VDI', vdi)) == OLD * (8 * MEBIBYTE)


def test_an_sr_that_must_be_zeroed_takes_no_vhd(a_pool: Any, tmp_path: Any) -> None:
    # impl.ml serve_vhd_to_raw: "unimplemented: prezeroed"
    pool, session, vdi = a_disk_that_held_something(a_pool, must_zero=True)
    path = tmp_path / 'difference.vhd'
    path.write_bytes(a_vhd({1: (FULL, b'\x01' * BLOCK)}, 8 * MEBIBYTE, 4))
    for restarted in (False, True):
        task = import_vhd(pool, session, vdi, a_vhd({}, 8 * MEBIBYTE))
        assert task['error_info'] == ['VDI_IO_ERROR', 'Device I/O errors']
        result = pool.xe('vdi-import', 'uuid=' + uuid_of(session, 'VDI', vdi), 'filename=%s' % path, 'format=vhd')
        assert result == Run(1, '', 'Error code: VDI_IO_ERROR\nError parameters: Device I/O errors\n')
        assert pool.read(uuid_of(session, 'VDI', vdi)) == OLD * (8 * MEBIBYTE)
        assert import_vhd(pool, session, vdi, OLD * MEBIBYTE, format='raw')['status'] == 'success'
        pool.stop()
        pool.start()
        session = pool.session()


def test_xe_alone_brings_a_vm_back_from_a_full_and_what_has_changed_since(a_pool: Any, tmp_path: Any) -> None:
    # What a person types who has only files and xe: one disk has grown, one is gone, one has come.
    source = a_pool(vm('web', disks=[disk(size=8 * MEBIBYTE, used=5, seed=1, owner=True), disk(seed=2),
                                      disk(seed=3, owner=True)]))
    session = source.session()
    api = session.xenapi
    web = ref_of(session, 'web')
    first, second, third = disks_of(session, web)
    full, difference, new = [str(tmp_path / name) for name in ('web.xva', 'xvda.vhd', 'xvdd.vhd')]
    assert source.xe('vm-export', 'vm=web', 'filename=' + full).exit_status == 0
    base = uuid_of(session, 'VDI', api.VDI.snapshot(first))
    api.VDI.resize(first, str(12 * MEBIBYTE))
    guest_writes(source, 3, '--count', '2')
    guest_writes(source, 1, '--zero')
    guest_writes(source, 11)
    for word, path in (('base=' + base, difference), ('format=vhd', new)):
        assert source.xe('vdi-export', 'uuid=' + uuid_of(session, 'VDI', third if path == new else first), word, 'format=vhd',
                         'filename=' + path) == Run(0, '', '')

    pool = a_pool(vm('other', disks=2), srs=[STORE, {'name_label': 'second', 'type': 'ext', 'shared': True}])

    def xe(*words: str) -> str:
        result = pool.xe(*words)
        assert (result.exit_status, result.stderr) == (0, ''), result
        return result.stdout.rstrip('\n')

    sr = xe('sr-list', 'name-label=second', '--minimal')
    back = xe('vm-import', 'filename=' + full, 'sr-uuid=' + sr)
    assert xe('vm-list', 'name-label=web', 'params=uuid', '--minimal') == back
    root = xe('vbd-list', 'vm-uuid=' + back, 'userdevice=0', 'params=vdi-uuid', '--minimal')
    assert xe('vdi-list', 'sr-uuid=' + sr, 'uuid=' + root, 'params=virtual-size', '--minimal') == str(8 * MEBIBYTE)
    assert xe('vdi-resize', 'uuid=' + root, 'disk-size=12MiB') == ''
    assert xe('vdi-import', 'uuid=' + root, 'format=vhd', 'filename=' + difference) == ''
    gone, drive = [xe('vbd-list', 'vm-uuid=' + back, 'userdevice=1', 'params=' + field, '--minimal')
                   for field in ('vdi-uuid', 'uuid')]
    assert xe('vbd-destroy', 'uuid=' + drive) == xe('vdi-destroy', 'uuid=' + gone) == ''
    made = xe('vdi-create', 'sr-uuid=' + sr, 'name-label=came later', 'virtual-size=3MiB', 'type=user')
    assert xe('vdi-import', 'uuid=' + made, 'format=vhd', 'filename=' + new) == ''
    drive = xe('vbd-create', 'vm-uuid=' + back, 'vdi-uuid=' + made, 'device=3', 'mode=RW', 'type=Disk', 'bootable=false')
    xe('vbd-param-set', 'uuid=' + drive, 'other-config:owner=true')
    assert sorted(xe('vbd-list', 'vm-uuid=' + back, 'params=userdevice', '--minimal').split(',')) == ['0', '2', '3']
    assert pool.read(root) == source.read(uuid_of(session, 'VDI', first))
    assert pool.read(made) == source.read(uuid_of(session, 'VDI', third)), 'its size was rounded up to whole blocks'
    assert xe('vm-list', 'uuid=' + back, 'params=VBDs', '--minimal').count(';') == 2
    # A disk has no VM's uuid: such a filter is refused, where there is a disk to look at.
    assert pool.xe('vdi-list', 'vm-uuid=' + back) == Run(1, '', "Error: Unknown field 'vm-uuid'\n")
    xe('vm-start', 'uuid=' + back)
    xe('vm-uninstall', 'uuid=' + back, 'force=true')
    assert xe('vdi-list', 'sr-uuid=' + sr, '--minimal') == ''


# --- Imports of VMs --------------------------------------------------------------------------------------------------

def test_an_import_into_an_sr_that_is_not_plugged_hangs_without_a_word(a_pool: Any, tmp_path: Any) -> None:
    # import.ml handler: NO_HOSTS_AVAILABLE comes before the task is taken over, so nobody ends it (seen for ten minutes)
    pool = a_pool(vm('web'), srs=[STORE, {'name_label': 'second', 'type': 'ext', 'shared': True}])
    session = pool.session()
    api = session.xenapi
    path = tmp_path / 'web.xva'
    path.write_bytes(get(pool, '/export', ref=ref_of(session, 'web')).body)
    sr = api.SR.get_by_name_label('second')[0]
    pbd, = api.SR.get_PBDs(sr)
    api.PBD.unplug(pbd)
    assert pool.xe('pbd-list', 'currently-attached=false', '--minimal').stdout.strip() == api.PBD.get_uuid(pbd)
    before = api.VM.get_all()

    task = api.task.create('import', 'of a test')
    answer = ask(pool.url_of(), 'PUT', '/import', {'sr_id': sr, 'session_id': session.handle, 'task_id': task},
                 {'Content-Length': '0'}, b'')
    assert answer.status == 500 and b'NO_HOSTS_AVAILABLE' in answer.body
    assert api.task.get_status(task) == 'pending'
    hanging = subprocess.Popen([os.path.join(pool.dir, 'bin', 'xe'), 'vm-import', 'sr-uuid=' + api.SR.get_uuid(sr),
                                'filename=%s' % path], env={'PATH': CRON_PATH}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    own, = eventually(lambda: [record for record in api.task.get_all_records().values() if record['name_label'] == 'VM import'])
    with pytest.raises(subprocess.TimeoutExpired):
        hanging.wait(3)
    own = api.task.get_record(api.task.get_by_uuid(own['uuid']))
    assert (own['status'], own['progress']) == ('pending', 0.0)
    hanging.kill()
    assert hanging.communicate() == (b'', b'') and api.VM.get_all() == before

    # An import of one disk says so: it fails the task itself (import_raw_vdi.ml fail_task_in_request).
    api.PBD.plug(pbd)
    vdi = api.VDI.create({'SR': sr, 'virtual_size': str(MEBIBYTE), 'type': 'user', 'sharable': False, 'read_only': False,
                          'other_config': {}})
    api.PBD.unplug(pbd)
    result = pool.xe('vdi-import', 'uuid=' + api.VDI.get_uuid(vdi), 'filename=%s' % path)
    assert result == Run(1, '', 'There were no servers available to complete the specified operation.\n')
    # An export of one disk does not (export_raw_vdi.ml); one of a VM does (test_trap_14).
    task = api.task.create('export', 'of a test')
    answer = ask(pool.url_of(), 'GET', '/export_raw_vdi', {'vdi': vdi, 'session_id': session.handle, 'task_id': task}, {})
    assert answer.status == 500 and b'NO_HOSTS_AVAILABLE' in answer.body and api.task.get_status(task) == 'pending'
    api.PBD.plug(pbd)
    assert pool.xe('vm-import', 'sr-uuid=' + api.SR.get_uuid(sr), 'filename=%s' % path).exit_status == 0


def test_networks_are_found_by_name_then_by_bridge_then_made(a_pool: Any) -> None:
    # import.ml module Net
    source = a_pool(vm('web', vifs=[{'device': '0', 'network': 'lab'}]), networks=[{'name_label': 'lab', 'bridge': 'xenbr7'}])
    session = source.session()
    archive = get(source, '/export', ref=ref_of(session, 'web')).body
    found = []
    for networks in ([{'name_label': 'other', 'bridge': 'xenbr7'}, {'name_label': 'lab', 'bridge': 'xenbr0'}],
                     [{'name_label': 'production', 'bridge': 'xenbr7'}], [{'name_label': 'production', 'bridge': 'xenbr0'}]):
        pool = a_pool(networks=networks)
        api = pool.session().xenapi
        before = api.network.get_all()
        back = imported(pool, pool.session(), archive)
        network = api.VIF.get_network(api.VM.get_VIFs(back)[0])
        record = api.network.get_record(network)
        found.append((record['name_label'], record['bridge'], network in before))
    assert found == [('lab', 'xenbr0', True), ('production', 'xenbr7', True), ('lab', 'xenbr7', False)]
    assert 'import_task' in record['other_config'] and record['PIFs'] == []


def test_a_running_vm_is_not_replaced_and_its_states_are_capitalised(a_pool: Any, tmp_path: Any) -> None:
    # import.ml: Record_util.power_state_to_string, where all others say it in lower case
    pool = a_pool(vm('web'))
    session = pool.session()
    api = session.xenapi
    web = ref_of(session, 'web')
    archive = get(pool, '/export', ref=web).body
    path = tmp_path / 'web.xva'
    path.write_bytes(archive)
    api.VM.start(web, False, False)
    _answer, task = import_of(pool, session, archive, restore='true')
    assert task['error_info'] == ['VM_BAD_POWER_STATE', web, 'Halted', 'Running']
    result = pool.xe('vm-import', 'filename=%s' % path, 'preserve=true')
    assert result.exit_status == 1 and result.stderr.endswith('\nexpected: Halted\nactual: Running\n')
    # by force it is passed over; then its drives find no VM
    before = set(api.VDI.get_all()), set(api.VM.get_all())
    _answer, task = import_of(pool, session, archive, restore='true', force='true')
    assert task['error_info'][0] == 'IMPORT_ERROR_FAILED_TO_FIND_OBJECT'
    assert api.VM.get_power_state(web) == 'Running' and set(api.VM.get_all()) == before[1]


# --- A client that goes away -----------------------------------------------------------------------------------------

def error_of(pool: Pool, leave: Any) -> List[str]:
    """The error of an export's task whose client reads a little, and then leaves so."""
    session = pool.session()
    task = session.xenapi.task.create('export', 'of a test')
    host, port = pool.url_of()[len('http://'):].split(':')
    connection = socket.create_connection((host, int(port)))
    connection.sendall(('GET /export?ref=%s&session_id=%s&task_id=%s HTTP/1.0\r\n\r\n' % (
        ref_of(session, 'web'), session.handle, task)).encode('ascii'))
    assert connection.recv(1000)
    leave(connection)
    return when_over(session, task)['error_info']


def test_what_the_server_says_of_a_client_that_left(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=64 * MEBIBYTE, used=64)]))
    said = 'INTERNAL_ERROR: [ Unix.Unix_error(Unix.%s, "write", "") ]'

    def with_data_unread(connection: Any) -> None:
        # a full disk: what has come is not read, so the connection is reset
        eventually(lambda: len(connection.recv(1 << 20, socket.MSG_PEEK)) > 50000)
        connection.close()

    def reset(connection: Any) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        connection.close()

    for leave in (with_data_unread, reset):
        assert error_of(pool, leave) == ['CLIENT_ERROR', said % 'ECONNRESET']
    # One that had said goodbye before it was gone is a broken pipe.
    pool.stop()
    pool.set_faults([at('http:/export', runs_at=0.1, until='gone', **{'from': MEBIBYTE})])      # nothing comes for ten seconds
    pool.start()

    def with_a_goodbye(connection: Any) -> None:
        connection.shutdown(socket.SHUT_WR)
        eventually(lambda: connection.recv(1 << 20))
        connection.settimeout(1)
        try:
            while connection.recv(1 << 20):
                pass
        except socket.timeout:
            connection.close()
        pool.release('gone')
    assert error_of(pool, with_a_goodbye) == ['CLIENT_ERROR', said % 'EPIPE']


def test_xe_tells_of_a_full_disk_as_the_server_heard_of_it(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=64 * MEBIBYTE, used=64)]))
    with open('/dev/full', 'wb') as full:
        result = subprocess.run([os.path.join(pool.dir, 'bin', 'xe'), 'vm-export', 'vm=web', 'filename='], stdout=full,
                                stderr=subprocess.PIPE, env={'PATH': CRON_PATH})
    assert result.returncode == 1
    assert result.stderr.decode('ascii') in ['Error code: CLIENT_ERROR\nError parameters: INTERNAL_ERROR: '
                                             '[ Unix.Unix_error(Unix.%s, "write", "") ]\n' % name
                                             for name in ('ECONNRESET', 'EPIPE')]
