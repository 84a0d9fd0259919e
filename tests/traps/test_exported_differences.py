"""Exports of differences (base=): what is in them, what they are refused for, and how faults spoil them.

Sources: the files named are those of xapi v24.19.2, those of sm say so. What a real server of that version wrote is compared
in conformance/test_differences.py.
"""

import importlib
import os
import random
import sys
from typing import Any, Dict, Iterable, List, Optional, Tuple

import pytest

from support.language import MEBIBYTE, at, disk, slowly, vm
from support.process import CRON_PATH, SIMPOOL, TIME_LIMIT_S, Pool, Run, run, state_of_pools, write_json
from support.wire import Background, ask, eventually
from test_calls import attached_to_dom0
from test_traps import STORE, disks_of, get, ref_of, refused, when_over

BLOCK = 2 * MEBIBYTE
NO_BLOCKS = 3072
FULL, DIFFERENCE = 3, 4


# --- Any history -------------------------------------------------------------------------------------------------------

class History:
    """A pool without a server, whose guests write and whose administrator does what comes to his mind."""

    def __init__(self, folder: str, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.state = state_of_pools()
        described = {'vms': [vm(name, disks=[disk(size=11 * MEBIBYTE, used=[[0, 5], [8, 1]], seed=number)])
                             for number, name in enumerate(('one', 'two'))]}
        self.state.begin(folder, self.state.pool_file.check(described))
        self.pool = self.state.open_for_serving(folder)

    def vms(self, is_a_snapshot: bool) -> List[str]:
        return [ref for ref, record in self.pool.tables['VM'].items() if not record['is_control_domain']
                and record['is_a_snapshot'] == is_a_snapshot]

    def disks(self) -> List[str]:
        return list(self.pool.tables['VDI'])

    def one_of(self, things: Iterable[str]) -> str:
        return self.random.choice(sorted(things))

    def step(self) -> None:
        deeds = [self.write, self.write, self.write, self.write, self.import_some, self.snapshot, self.snapshot, self.clone,
                 self.grow, self.go_on]
        if self.vms(True):
            deeds += [self.revert, self.destroy, self.clone_of_snapshot]
        self.random.choice(deeds)()

    def write(self) -> None:
        vm_ref = self.one_of(self.vms(False))
        vdi = self.pool.tables['VBD'][self.pool.record('VM', vm_ref)['VBDs'][0]]['VDI']
        blocks = self.pool.disk(vdi).blocks()
        first = self.random.randrange(blocks)
        self.pool.guest_write(vm_ref, 'xvda', first, self.random.randint(1, min(3, blocks - first)), self.random.random() < 0.3)

    def import_some(self) -> None:
        vm_ref = self.one_of(self.vms(False))
        contents = self.pool.disk(self.pool.tables['VBD'][self.pool.record('VM', vm_ref)['VBDs'][0]]['VDI'])
        data = self.random.choice([b'\xaa', b'\0']) * self.random.randint(1, 2 * MEBIBYTE)
        contents.write(self.random.randrange(contents.size - len(data)), data)

    def snapshot(self) -> None:
        self.pool.vm_snapshot(self.one_of(self.vms(False)), 'of it')

    def clone(self) -> None:
        if len(self.vms(False)) < 5:
            self.pool.vm_clone(self.one_of(self.vms(False)), 'clone')

    def clone_of_snapshot(self) -> None:
        if len(self.vms(False)) < 5:
            self.pool.vm_set_is_a_template(self.pool.vm_clone(self.one_of(self.vms(True)), 'clone of a snapshot'), False)

    def grow(self) -> None:
        vm_ref = self.one_of(self.vms(False))
        vdi = self.pool.tables['VBD'][self.pool.record('VM', vm_ref)['VBDs'][0]]['VDI']
        size = self.pool.disk(vdi).size
        if size < 20 * MEBIBYTE:
            self.pool.vdi_resize(vdi, size + MEBIBYTE)

    def revert(self) -> None:
        self.pool.vm_revert(self.one_of(self.vms(True)))

    def destroy(self) -> None:
        snapshot = self.one_of(self.vms(True))
        vdis = [self.pool.tables['VBD'][vbd]['VDI'] for vbd in self.pool.record('VM', snapshot)['VBDs']]
        self.pool.vm_destroy(snapshot)
        for vdi in vdis:
            self.pool.vdi_destroy(vdi)

    def go_on(self) -> None:
        """The server ends and comes back; at times it folds what it knows."""
        if self.random.random() < 0.5:
            self.state._fold(self.folder, self.pool)
        self.pool.close_log()
        self.pool = self.state.open_for_serving(self.folder)

    def bytes_of(self, vdi: str) -> bytes:
        contents = self.pool.disk(vdi)
        return b''.join(contents.block(number) for number in range(contents.blocks()))

    def difference(self, vdi: str, base: str) -> bytes:
        contents = self.pool.disk(vdi)
        return b''.join(formats().vhd(contents, lambda count: None, contents.changed_blocks(self.pool.disk(base)),
                                      formats().Parent(bytes(16), 1 << 30, '/base.vhd')))


def formats() -> Any:
    sys.path.append(SIMPOOL)
    try:
        return importlib.import_module('formats')
    finally:
        sys.path.remove(SIMPOOL)


def laid_over(content: bytes, below: bytes) -> bytes:
    """What a disk holds that held `below`, and has the size that the difference says, when the difference is laid over it."""
    size, blocks = blocks_of(content)
    whole = bytearray(below[:size] + bytes(max(0, size - len(below))))
    for number, body in blocks.items():
        whole[number * BLOCK:number * BLOCK + BLOCK] = body[:max(0, size - number * BLOCK)]
    return bytes(whole)


def blocks_of(content: bytes, kind: int = DIFFERENCE) -> Tuple[int, Dict[int, bytes]]:
    """The size and the blocks of an exported VHD. All bits are set, also of sectors behind the end of the disk."""
    assert content[:512] == content[-512:] and content[60:64] == bytes([0, 0, 0, kind])
    size = int.from_bytes(content[48:56], 'big')
    entries = int.from_bytes(content[512 + 28:512 + 32], 'big')
    assert entries == -(-size // BLOCK)
    at_sector, blocks = (2048 + -(-4 * entries // 512) * 512) // 512, {}
    for number in range(entries):
        place = int.from_bytes(content[2048 + 4 * number:2052 + 4 * number], 'big')
        if place != 0xFFFFFFFF:
            assert place == at_sector
            assert content[place * 512:place * 512 + 512] == b'\xff' * 512
            blocks[number] = content[place * 512 + 512:place * 512 + 512 + BLOCK]
            at_sector += 1 + BLOCK // 512
    assert at_sector * 512 + 512 == len(content)
    return size, blocks


@pytest.mark.parametrize('seed', range(8))
def test_whatever_happened_a_difference_laid_over_its_base_is_the_disk(tmp_path: Any, seed: int) -> None:
    history = History(str(tmp_path), seed)
    for _ in range(12):
        for _ in range(5):
            history.step()
        for _ in range(2):
            vdi, base = history.one_of(history.disks()), history.one_of(history.disks())
            assert laid_over(history.difference(vdi, base), history.bytes_of(base)) == history.bytes_of(vdi), (vdi, base)


# --- What is in one ----------------------------------------------------------------------------------------------------

class Nights:
    """A served pool with VM web, whose disk is snapshotted now and then."""

    def __init__(self, pool: Pool, name: str = 'web') -> None:
        self.pool, self.name = pool, name
        self.session = pool.session()
        self.api = self.session.xenapi
        self.vm = ref_of(self.session, name)
        self.vdi = disks_of(self.session, self.vm)[0]

    def write(self, block: int, *more: str, name: str = '') -> None:
        self.pool.command('write', '--dir', self.pool.dir, '--vm', name or self.name, '--device', 'xvda', '--block=%d' % block,
                          *more)

    def snapshot(self) -> str:
        return self.api.VDI.snapshot(self.vdi)

    def uuid(self, vdi: str) -> str:
        return self.api.VDI.get_uuid(vdi)

    def read(self, vdi: str) -> bytes:
        return self.pool.read(self.uuid(vdi))

    def export(self, vdi: str, base: str, **query: str) -> bytes:
        answer = get(self.pool, '/export_raw_vdi', **dict({'vdi': vdi, 'base': base, 'format': 'vhd'}, **query))
        assert answer.status == 200
        return answer.body

    def blocks(self, vdi: str, base: str) -> List[int]:
        """The blocks of a difference, which laid over the base is the disk."""
        content = self.export(vdi, base)
        assert laid_over(content, self.read(base)) == self.read(vdi)
        return sorted(blocks_of(content)[1])

    def failed(self, vdi: str, base: str, **query: str) -> Tuple[List[str], bytes]:
        """The failure of the task of an export, and what came behind the 200."""
        task = self.api.task.create('export', 'of a test')
        answer = ask(self.pool.url, 'GET', '/export_raw_vdi', dict({'vdi': vdi, 'base': base, 'format': 'vhd', 'task_id': task,
                                                                   'session_id': self.session.handle}, **query), {})
        record = when_over(self.session, task)
        assert record['status'] == 'failure' and answer.status == 200
        return record['error_info'], answer.body


def nights(a_pool: Any, size: int = 16 * MEBIBYTE, used: int = 8, **sections: Any) -> Nights:
    return Nights(a_pool(vm('web', disks=[disk(size=size, used=used, seed=7)]), vm('db', disks=[disk(size=8 * MEBIBYTE, used=3)]),
                         **sections))


def test_a_difference_has_what_was_written_since_its_base_and_nothing_more(a_pool: Any) -> None:
    web = nights(a_pool)
    first = web.snapshot()
    web.write(1, '--count', '2')
    web.write(15)
    second = web.snapshot()
    assert web.blocks(second, first) == [0, 1, 7]
    assert web.blocks(first, second) == [0, 1, 7], 'the other way round what was written is as it was'
    web.write(6, '--zero')
    assert web.blocks(second, first) == [0, 1, 7], 'a snapshot is what it was'
    assert web.blocks(web.vdi, second) == [3], 'the live disk against its snapshot'
    third = web.snapshot()
    assert web.blocks(third, second) == [3] and web.blocks(third, first) == [0, 1, 3, 7]
    web.api.VDI.destroy(second)
    assert web.blocks(third, first) == [0, 1, 3, 7], 'what lay between is coalesced, and is still what has changed'
    web.pool.stop()
    web.pool.start()
    web = Nights(web.pool)
    assert web.blocks(third, first) == [0, 1, 3, 7]
    assert len(web.export(third, third)) == NO_BLOCKS
    by_uuids = web.export(web.uuid(third), web.uuid(first))
    assert by_uuids[84:-512] == web.export(third, first)[84:-512], 'all but the footer, which is another each time'


def test_a_block_that_was_written_as_it_was_counts_as_changed(a_pool: Any) -> None:
    # Which file has a block is all that is looked at (vhd_format/f.ml include_block).
    web = nights(a_pool)
    web.write(12, '--zero')
    first = web.snapshot()
    for block in (13, 12):
        web.write(block, '--zero')
    second = web.snapshot()
    assert web.read(first) == web.read(second) and web.blocks(second, first) == [6]


def test_a_revert_makes_a_difference_larger_and_never_too_small(a_pool: Any) -> None:
    web = nights(a_pool)
    old = web.api.VM.snapshot(web.vm, 'old')
    first, = disks_of(web.session, old)
    web.write(2)
    base = web.snapshot()
    web.api.VM.revert(old)
    now, = disks_of(web.session, web.vm)
    assert web.blocks(now, base) == [1] and web.blocks(now, first) == []
    web.write(2)
    assert web.read(now) == web.read(base), 'the same again'
    assert web.blocks(now, base) == [1]


def test_a_base_that_somebody_wrote_into_is_taken_for_what_it_is_now(a_pool: Any) -> None:
    web = nights(a_pool)
    snapshot = web.api.VM.snapshot(web.vm, 'of web')
    first, = disks_of(web.session, snapshot)
    web.api.VM.set_is_a_template(snapshot, False)
    base, = disks_of(web.session, web.api.VM.clone(snapshot, 'tried out'))
    web.write(4, name='tried out')
    web.write(0)
    assert web.blocks(web.vdi, first) == [0]
    assert web.blocks(web.vdi, base) == [0, 2]


def test_nothing_has_to_be_in_common_with_the_base(a_pool: Any) -> None:
    # Tried on a real server: exit 0 and a file, whatever the base is.
    web = nights(a_pool)
    smaller, = disks_of(web.session, ref_of(web.session, 'db'))
    assert web.blocks(web.vdi, smaller) == [0, 1, 2, 3]
    assert web.blocks(smaller, web.vdi) == [0, 1, 2, 3], 'all that either has, up to the end of the disk'
    copied = web.api.VDI.copy(web.vdi, 'OpaqueRef:NULL')
    assert web.read(copied) == web.read(web.vdi) and web.blocks(web.vdi, copied) == [0, 1, 2, 3]


def test_a_disk_that_has_grown_has_its_new_part_where_something_was_written_to_it(a_pool: Any) -> None:
    web = nights(a_pool)
    first = web.snapshot()
    web.api.VDI.resize(web.vdi, str(32 * MEBIBYTE))
    assert web.blocks(web.vdi, first) == []
    web.write(29)
    assert web.blocks(web.vdi, first) == [14]
    assert web.blocks(first, web.vdi) == [], 'of the smaller one, what has no place in it is not sent'


def test_what_an_import_wrote_is_a_change_zeros_included(a_pool: Any) -> None:
    web = nights(a_pool, size=8 * MEBIBYTE, used=4)
    first = web.snapshot()
    data = web.read(web.vdi)[:2 * MEBIBYTE] + bytes(5 * MEBIBYTE) + b'\xaa' * MEBIBYTE
    assert web.pool.xe('vdi-import', 'uuid=' + web.uuid(web.vdi), 'filename=/dev/stdin', stdin=data) == Run(0, '', '')
    second = web.snapshot()
    assert web.read(second) == data
    assert {1, 3} <= set(web.blocks(second, first))


def test_a_tar_is_the_whole_disk_whatever_base_is_named(a_pool: Any) -> None:
    # export_raw_vdi.ml: with format=tar base is not even looked for.
    web = nights(a_pool, size=4 * MEBIBYTE, used=2)
    for base in (web.snapshot(), 'OpaqueRef:nowhere'):
        assert web.export(web.vdi, base, format='tar') == get(web.pool, '/export_raw_vdi', vdi=web.vdi, format='tar').body


@pytest.mark.parametrize('kind, path', [('nfs', '/run/sr-mount/%s/%s.vhd'), ('lvm', '/dev/VG_XenStorage-%s/VHD-%s')])
def test_a_difference_names_the_file_of_its_base(a_pool: Any, kind: str, path: str) -> None:
    web = nights(a_pool, srs=[dict(STORE, type=kind)])
    base = web.snapshot()
    content = web.export(web.vdi, base)
    name = content[576:1088].decode('utf-16-be').rstrip('\0')
    assert name == path % (web.api.SR.get_uuid(web.api.VDI.get_SR(base)), web.uuid(base))
    assert content[552:568] not in (bytes(16), bytes.fromhex(web.uuid(base).replace('-', '')))


# --- What is refused, and when ------------------------------------------------------------------------------------------

NO_VHD = {'name_label': 'no vhd', 'type': 'nfs', 'shared': True, 'size': 1 << 40, 'vhd': False}
NOT_A_VHD = 'Failure("base VDI is not a vhd; cannot compute differences")'
NO_DIFFERENCES = 'Failure("Cannot compute differences on non-VHD images")'


@pytest.mark.parametrize('version, told', [('1.9.83', None), ('1.249.29', None), ('24.12.0', None), ('24.13.0', NO_DIFFERENCES),
                                           ('24.19.2', NO_DIFFERENCES), ('26.17.0', NO_DIFFERENCES)])
def test_what_is_no_vhd_has_no_difference_and_older_servers_do_not_say_so(a_pool: Any, version: str, told: Optional[str]) -> None:
    # vhd_tool_wrapper.ml send, v1.249.29 and v24.19.2; the check came with CA-384483, v24.13.0
    kinds = [disk(size=8 * MEBIBYTE, used=[[2, 1]], sr=sr) for sr in ('store', 'no vhd')]
    web = Nights(a_pool(vm('web', disks=kinds), srs=[STORE, NO_VHD], xapi_version=version))
    vhd, other = disks_of(web.session, web.vm)
    snapshot = web.api.VDI.snapshot(other)
    for form in ('vhd', 'raw'):
        for new, base, text in ((vhd, other, NOT_A_VHD), (other, vhd, told), (other, snapshot, told or NOT_A_VHD)):
            if text is None:
                content = web.export(new, base, format=form)
                if form == 'raw':
                    assert content == web.read(new)
                else:
                    assert content[63] == FULL and content[512:1536] == get(
                        web.pool, '/export_raw_vdi', vdi=new, format='vhd').body[512:1536]
            else:
                failure, body = web.failed(new, base, format=form)
                assert failure == ['INTERNAL_ERROR', text]
                assert body.startswith(b'HTTP/1.0 500 Internal Error\r\n') and text.replace('"', '&quot;').encode() in body


def test_xe_says_why_there_is_no_difference_and_leaves_the_page(a_pool: Any, tmp_path: Any) -> None:
    web = Nights(a_pool(vm('web', disks=[disk(sr='no vhd')]), srs=[STORE, NO_VHD]))
    path = str(tmp_path / 'x.vhd')
    result = web.pool.xe('vdi-export', 'uuid=' + web.uuid(web.vdi), 'base=' + web.uuid(web.snapshot()), 'format=vhd',
                         'filename=' + path)
    assert (result.exit_status, result.stdout) == (1, '')
    assert NO_DIFFERENCES in result.stderr
    with open(path, 'rb') as file:
        assert file.read().startswith(b'HTTP/1.0 500 Internal Error\r\n')


def test_what_is_no_vhd_is_exported_whole_as_one_in_whole_blocks(a_pool: Any) -> None:
    # vhd_format/f.ml vhd_from_raw: blocks of zeros are left out since v25.35.0
    for version, places in (('24.19.2', [0, 1, 2, 3, 4]), ('25.35.0', [1, 4])):
        pool = a_pool(vm('web', disks=[disk(size=9 * MEBIBYTE + 512, used=[[2, 1], [9, 1]], seed=3)]), srs=[NO_VHD],
                      xapi_version=version)
        web = Nights(pool)
        web.write(5, '--zero')
        content = get(pool, '/export_raw_vdi', vdi=web.vdi, format='vhd').body
        size, blocks = blocks_of(content, FULL)
        assert (size, sorted(blocks)) == (10 * MEBIBYTE, places)
        whole = web.read(web.vdi)
        assert b''.join(blocks.get(number, bytes(BLOCK)) for number in range(5)) == whole + bytes(size - len(whole))


def test_a_base_that_is_not_there_is_told_by_its_uuid(a_pool: Any) -> None:
    # What xe prints and leaves was recorded: conformance/test_differences.py.
    web = nights(a_pool)
    for name in ('OpaqueRef:nowhere', '12345678-1234-4234-8234-123456789abc', ''):
        failure, body = web.failed(web.vdi, name)
        assert failure == ['UUID_INVALID', 'VDI', name]
        assert b'Db_exn.Read_missing_uuid(&quot;VDI&quot;, &quot;&quot;, &quot;%s&quot;)' % name.encode() in body
        assert attached_to_dom0(web.session) == []


def test_a_base_has_to_lie_where_the_host_of_the_disk_sees_it(a_pool: Any) -> None:
    # Only the disk's own SR decides which host exports it.
    pool = a_pool(vm('web', disks=[disk(sr='store'), disk(sr='of xcp2')]), hosts=[{'name_label': 'xcp1'}, {'name_label': 'xcp2'}],
                  srs=[STORE, {'name_label': 'of xcp2', 'type': 'ext', 'host': 'xcp2'}])
    web = Nights(pool)
    base = disks_of(web.session, web.vm)[1]
    assert web.failed(web.vdi, base)[0] == ['SR_NOT_ATTACHED', web.api.VDI.get_SR(base)]
    assert attached_to_dom0(web.session) == []


SLOW = [slowly('http:/export_raw_vdi')]


def test_disk_and_base_are_both_in_use_while_a_difference_is_made(a_pool: Any) -> None:
    # export_raw_vdi.ml localhost_handler: both are attached for as long as it takes
    web = nights(a_pool, used=16, faults=SLOW)
    base = web.snapshot()
    web.write(0, '--count', '16')
    new = web.snapshot()
    other = web.snapshot()
    running = Background(web.export, new, base)
    eventually(lambda: len(attached_to_dom0(web.session)) == 2)
    records = [web.api.VBD.get_record(vbd) for vbd in attached_to_dom0(web.session)]
    assert sorted(record['VDI'] for record in records) == sorted([new, base])
    assert {(record['mode'], record['currently_attached']) for record in records} == {('RO', True)}
    task, = {record['other_config']['task_id'] for record in records}
    assert web.api.task.get_status(task) == 'pending'
    for vdi in (new, base):
        assert refused(web.api.VDI.destroy, vdi) == ['VDI_IN_USE', vdi, 'destroy']
    for vbd in attached_to_dom0(web.session):
        assert refused(web.api.VBD.unplug, vbd)[0] == 'DEVICE_DETACH_REJECTED'
    web.api.VDI.destroy(other)
    web.pool.release()
    running.result()
    assert attached_to_dom0(web.session) == []
    for vdi in (new, base):
        web.api.VDI.destroy(vdi)


def test_both_drives_outlive_the_server(a_pool: Any) -> None:
    web = nights(a_pool, used=16, faults=SLOW)
    base = web.snapshot()
    web.write(0, '--count', '16')
    running = Background(web.export, web.vdi, base)
    eventually(lambda: len(attached_to_dom0(web.session)) == 2)
    web.pool.process.kill()
    web.pool.process.wait(TIME_LIMIT_S)
    web.pool.stop()
    with pytest.raises(Exception):
        running.result()
        raise ConnectionError('half an answer')
    web.pool.start()
    web = Nights(web.pool)
    drives = attached_to_dom0(web.session)
    assert len(drives) == 2 and refused(web.api.VDI.destroy, base) == ['VDI_IN_USE', base, 'destroy']
    for vbd in drives:
        web.api.VBD.unplug(vbd)
        web.api.VBD.destroy(vbd)
    web.api.VDI.destroy(base)


# --- Faults ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('occasion', ['xe:vdi-export', 'http:/export_raw_vdi'])
def test_a_tracker_lies_about_one_block_of_the_second_difference(a_pool: Any, occasion: str) -> None:
    web = nights(a_pool, faults=[at(occasion, nth=2, omit=2)])
    base = web.snapshot()
    for block in (1, 5, 14):
        web.write(block)
    found = []
    # Exports of other kinds are not counted.
    for words in ([], ['format=raw'], ['format=vhd'], ['format=tar', 'base=' + base], ['format=vhd', 'base=' + base],
                  ['format=vhd', 'base=' + base], ['format=vhd', 'base=' + base]):
        content = exported(web, web.vdi, *words)
        if words[1:] and words[0] == 'format=vhd':
            found.append(sorted(blocks_of(content)[1]))
    assert found == [[0, 2, 7], [0, 7], [0, 2, 7]]
    noted = [entry for entry in web.pool.journal() if {'omit': 2} in entry.get('fault', [])]
    assert len(noted) == 1


def exported(web: Nights, vdi: str, *words: str) -> bytes:
    path = os.path.join(web.pool.home, 'exported')
    assert web.pool.xe('vdi-export', 'uuid=' + web.uuid(vdi), 'filename=' + path, *words) == Run(0, '', '')
    with open(path, 'rb') as file:
        content = file.read()
    os.unlink(path)
    return content


def test_several_blocks_may_be_left_out_and_raw_has_zeros_there(a_pool: Any) -> None:
    web = nights(a_pool, faults=[at('http:/export_raw_vdi', omit=1), at('xe:vdi-export', omit=3), at('xe:*', omit=9)])
    base = web.snapshot()
    for block in (1, 5, 14):
        web.write(block)
    content = exported(web, web.vdi, 'format=vhd', 'base=' + base)
    assert sorted(blocks_of(content)[1]) == [2], 'counted as they would be without a fault'
    raw = exported(web, web.vdi, 'format=raw', 'base=' + base)
    assert raw == bytes(2 * BLOCK) + web.read(web.vdi)[2 * BLOCK:3 * BLOCK] + bytes(5 * BLOCK)


@pytest.mark.parametrize('occasion', ['xe:vdi-export', 'http:/export_raw_vdi'])
def test_a_full_comes_where_a_difference_was_asked_for(a_pool: Any, occasion: str) -> None:
    web = nights(a_pool, faults=[at(occasion, full=True)])
    base = web.snapshot()
    web.write(12)
    full, difference = exported(web, web.vdi, 'format=vhd'), exported(web, web.vdi, 'format=vhd', 'base=' + base)
    assert difference[63] == FULL and difference[512:-512] == full[512:-512]
    assert exported(web, web.vdi, 'format=raw', 'base=' + base) == web.read(web.vdi)


def test_the_difference_of_another_disk_comes(a_pool: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=16 * MEBIBYTE, used=8, seed=1), disk(size=16 * MEBIBYTE, used=8, seed=2)]),
                  faults=[at('xe:vdi-export', object='root', other='web:xvdb'),
                          at('xe:vdi-export', object='data', other='web:7')])
    web = Nights(pool)
    first, second = disks_of(web.session, web.vm)
    web.api.VDI.set_name_label(first, 'root')
    old, new = [], []
    for made in (old, new):
        made.extend(disks_of(web.session, web.api.VM.snapshot(web.vm, 'of web')))
        pool.command('write', '--dir', pool.dir, '--vm', 'web', '--device', 'xvda', '--block=2')
        pool.command('write', '--dir', pool.dir, '--vm', 'web', '--device', 'xvdb', '--block=13')
    wrong = exported(web, new[0], 'format=vhd', 'base=' + web.uuid(old[0]))
    assert wrong[512:-512] == exported(web, new[1], 'format=vhd', 'base=' + web.uuid(old[1]))[512:-512]
    assert sorted(blocks_of(wrong)[1]) == [6]
    web.api.VDI.destroy(old[1])
    wrong = exported(web, new[0], 'format=vhd', 'base=' + web.uuid(old[0]))
    assert sorted(blocks_of(wrong)[1]) == [0, 1, 2, 3, 6], 'of the disk from a base that is none of its own'
    web.api.VDI.set_name_label(new[0], 'data')
    result = pool.xe('vdi-export', 'uuid=' + web.uuid(new[0]), 'base=' + web.uuid(old[0]), 'format=vhd', 'filename=')
    assert result.exit_status == 1 and 'FAULTS.json: other: web:7 means 0 disks' in result.stderr


def test_another_disk_may_be_named_by_its_uuid(a_pool: Any) -> None:
    other = '11111111-2222-4333-8444-555555555509'
    web = Nights(a_pool(vm('web', disks=[disk(size=8 * MEBIBYTE, used=1)]),
                        vm('db', disks=[disk(size=8 * MEBIBYTE, used=[[6, 1]], uuid=other)]),
                        faults=[at('http:/export_raw_vdi', other=other)]))
    content = web.export(web.vdi, web.snapshot())
    assert laid_over(content, bytes(8 * MEBIBYTE)) == web.pool.read(other)


def test_what_spoils_streams_spoils_differences(a_pool: Any) -> None:
    web = nights(a_pool, faults=[at('http:/export_raw_vdi', nth=1, truncate=BLOCK, silent=True),
                                 at('http:/export_raw_vdi', nth=2, truncate=BLOCK), at('http:/export_raw_vdi', nth=3, flip=4096),
                                 at('http:/export_raw_vdi', nth=4, flip=-600)])
    base = web.snapshot()
    web.write(3)
    contents = [web.export(web.vdi, base) for _ in range(5)]
    whole = contents[-1]
    assert contents[0][84:] == whole[84:BLOCK]
    assert contents[1][84:BLOCK] == whole[84:BLOCK] and contents[1][BLOCK:].startswith(b'HTTP/1.0 500 Internal Error\r\n')
    for content, place in ((contents[2], 4096), (contents[3], len(whole) - 600)):
        assert [number for number in range(84, len(whole) - 512) if content[number] != whole[number]] == [place]


@pytest.mark.parametrize('blocks', [[1, 5], [1], []])
def test_an_xe_that_dies_halfway_has_not_all_of_a_difference(a_pool: Any, blocks: List[int]) -> None:
    # Halfway is half of what it has to send, wherever in the disk that lies.
    web = nights(a_pool, size=64 * MEBIBYTE, faults=[at('xe:vdi-export', kill='xe')])
    base, path = web.snapshot(), os.path.join(web.pool.home, 'exported')
    for block in blocks:
        web.write(block)
    whole = web.export(web.vdi, base)
    result = web.pool.xe('vdi-export', 'uuid=' + web.uuid(web.vdi), 'base=' + web.uuid(base), 'format=vhd', 'filename=' + path)
    assert result.exit_status == -9
    with open(path, 'rb') as file:
        content = file.read()
    assert 0 < len(content) < len(whole) and content[84:] == whole[84:len(content)]
    eventually(lambda: attached_to_dom0(web.session) == [])


@pytest.mark.parametrize('through', ['http', 'xe'])
def test_nothing_may_come_for_a_while_and_the_disks_are_attached_meanwhile(a_pool: Any, through: str) -> None:
    # An exporter makes the table before it says the first byte.
    web = nights(a_pool, faults=[at('http:/export_raw_vdi', sleeps=60, until='enough')])
    base, path = web.snapshot(), os.path.join(web.pool.home, 'exported')
    web.write(1)
    words = ('vdi-export', 'uuid=' + web.uuid(web.vdi), 'base=' + web.uuid(base), 'format=vhd', 'filename=' + path)
    running = Background(web.export, web.vdi, base) if through == 'http' else Background(web.pool.xe, *words)
    eventually(lambda: len(attached_to_dom0(web.session)) == 2)
    if through == 'xe':
        assert os.path.getsize(path) == 0
    assert web.api.task.get_status(web.api.VBD.get_other_config(attached_to_dom0(web.session)[0])['task_id']) == 'pending'
    web.pool.release()
    running.result()
    if through == 'xe':
        with open(path, 'rb') as file:
            assert sorted(blocks_of(file.read())[1]) == [0]


@pytest.mark.parametrize('fault, told', [
    (at('xe:vdi-export', omit=0), 'omit must be 1 or more'), (at('xe:vdi-export', omit=True), 'omit has a wrong value'),
    (at('xe:vm-export', omit=1), 'omit is for xe:vdi-export and http:/export_raw_vdi'),
    (at('api:*', full=True), 'full is for xe:vdi-export'), (at('http:/export', other='web:xvda'), 'other is for xe:vdi-export'),
    (at('http:*', other=7), 'other has a wrong value'), (at('http:*', full=True), '')])
def test_a_fault_of_differences_that_can_not_be_one_is_refused(tmp_path: Any, fault: Dict[str, Any], told: str) -> None:
    write_json(str(tmp_path / 'POOL.json'), {})
    write_json(str(tmp_path / 'FAULTS.json'), [fault])
    result = run([sys.executable, SIMPOOL, 'run', '--pool', str(tmp_path / 'POOL.json'), '--dir', str(tmp_path / 'd'), '--faults',
                  str(tmp_path / 'FAULTS.json'), '--', 'true'], {'PATH': CRON_PATH})
    assert (result.exit_status, told in result.stderr) == (2 if told else 0, True)
