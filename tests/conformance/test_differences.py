"""Exports of differences, as a real server made them, made again in the simulated pool: what they print, and their bytes."""

import gzip
import os
import re
import struct
from typing import Any, Dict, List, NamedTuple

import pytest

import archives
import recordings
from comparison import UUID, Comparison, Names
from support.contents import block_of
from support.language import MEBIBYTE, disk, vm
from support.process import Pool, Run

DELTA = os.path.join(recordings.RECORDED, 'delta')
#: The recorded disk as it was born; what its guest wrote between the two snapshots is in `served`.
DISK = disk(size=16 * MEBIBYTE, used=[[0, 8]], seed=77)
HEADER = slice(512, 1536)


class Transcript(NamedTuple):
    """One command, UUID-NAME in the place of uuids, its exit status and stderr, and the end of the file that it left, if it
    failed."""
    words: List[str]
    exit_status: int
    stderr: str
    tail: str


def transcripts() -> List[Transcript]:
    with open(os.path.join(DELTA, 'transcript.txt'), encoding='utf-8') as file:
        pieces = re.split(r'^\$ xe ', file.read(), flags=re.MULTILINE)[1:]
    found = []
    for piece in pieces:
        command, rest = piece.split('\n', 1)
        stderr, status, tail = re.split(r'^exit (\d+)\n', rest, flags=re.MULTILINE)
        found.append(Transcript(command.split(), int(status), stderr, tail))
    return found


RECORDED = transcripts()


class Served(NamedTuple):
    """The pool after all commands, what each said, and the folder of its files."""
    pool: Pool
    uuids: Dict[str, str]
    said: List[Run]
    files: str


@pytest.fixture(scope='module')
def served(tmp_path_factory: Any) -> Any:
    pool, files = Pool({'vms': [vm('web', disks=[DISK]), vm('target', disks=[disk(size=16 * MEBIBYTE, used=0)])]}), ''
    try:
        pool.start()
        files = str(tmp_path_factory.mktemp('delta'))
        api = pool.session().xenapi
        web, target = [api.VBD.get_VDI(api.VM.get_VBDs(api.VM.get_by_name_label(name)[0])[0]) for name in ('web', 'target')]
        uuids = {'UUID-TARGET': api.VDI.get_uuid(target), 'UUID-S1': api.VDI.get_uuid(api.VDI.snapshot(web))}
        for words in (['1', '--count', '2'], ['5', '--zero'], ['9']):
            pool.command('write', '--dir', pool.dir, '--vm', 'web', '--device', 'xvda', '--block', *words)
        uuids['UUID-S2'] = api.VDI.get_uuid(api.VDI.snapshot(web))
        old = pool.read(uuids['UUID-S1'])
        assert pool.xe('vdi-import', 'uuid=' + uuids['UUID-TARGET'], 'filename=/dev/stdin', stdin=old) == Run(0, '', '')
        said = []
        for one in RECORDED:
            words = [re.sub(r'UUID-\w+', lambda match: uuids[match.group()], word).replace('/backups', files)
                     for word in one.words]
            said.append(pool.xe(*words))
        yield Served(pool, uuids, said, files)
    finally:
        pool.remove()


@pytest.mark.parametrize('number', range(len(RECORDED)), ids=['-'.join(one.words[:3]) for one in RECORDED])
def test_a_command_answers_as_recorded(served: Served, number: int) -> None:
    recorded = RECORDED[number]
    assert served.said[number] == Run(recorded.exit_status, '', recorded.stderr)
    if recorded.exit_status != 0:
        name, = [word[len('filename=/backups/'):] for word in recorded.words if word.startswith('filename=')]
        content = written(served, name)
        # the 500 page, and nothing of a disk before it
        assert content.startswith(b'HTTP/1.0 500 Internal Error\r\n')
        assert content.decode('ascii').endswith(recorded.tail.rstrip('\n'))


def written(served: Served, name: str) -> bytes:
    with open(os.path.join(served.files, name), 'rb') as file:
        return file.read()


@pytest.mark.parametrize('name', ['S1-full.vhd', 'S2-full.vhd', 'S2-base-S1.vhd', 'S2-base-S2.vhd'])
def test_an_export_has_the_recorded_bytes(served: Served, name: str) -> None:
    with gzip.open(os.path.join(DELTA, name + '.gz')) as file:
        recorded = file.read()
    # The recorded guest's first write to a block made generation 0, here it makes 1.
    recorded = recorded.replace(block_of(dict(DISK, used=16), 9, 0), block_of(DISK, 9, 1))
    simulated = written(served, name)
    comparison = Comparison(Names(), {}, lambda ref: None)
    headers = [content[HEADER] for content in (recorded, simulated)]
    for header in headers:
        checksum, = struct.unpack('>I', header[36:40])
        assert checksum == ~(sum(header) - sum(header[36:40])) & 0xFFFFFFFF
    parents = [header[64:576].decode('utf-16-be').rstrip('\0') for header in headers]
    if 'base' in name:
        for parent in parents:
            assert re.match('/run/sr-mount/%s/%s[.]vhd$' % (UUID, UUID), parent), parent
        base = served.uuids['UUID-' + name[len('S2-base-'):-len('.vhd')]]
        assert parents[1].endswith('/%s.vhd' % base)
        # not the disk's own uuid, but that of its VHD
        assert headers[1][40:56] != bytes(16) and headers[1][40:56].hex() != base.replace('-', '')
    else:
        assert parents == ['', ''] and headers[0] == headers[1]
    archives.compare_vhd(*[without_parent(content) for content in (recorded, simulated)], comparison=comparison)
    assert comparison.differences == []


def without_parent(content: bytes) -> bytes:
    """The VHD without its header's checksum, and the parent's uuid, time and name."""
    header = bytearray(content[HEADER])
    for begin, end in ((36, 60), (64, 576)):
        header[begin:end] = bytes(end - begin)
    return content[:512] + bytes(header) + content[1536:]


def test_two_exports_of_one_difference_are_not_equal_in_their_footers(served: Served, tmp_path: Any) -> None:
    again = str(tmp_path / 'again.vhd')
    assert served.pool.xe('vdi-export', 'uuid=' + served.uuids['UUID-S2'], 'base=' + served.uuids['UUID-S1'], 'format=vhd',
                          'filename=' + again) == Run(0, '', '')
    first = written(served, 'S2-base-S1.vhd')
    with open(again, 'rb') as file:
        second = file.read()
    assert first[64:84] != second[64:84]
    assert archives.without_uuid(first) == archives.without_uuid(second)


def test_a_difference_that_was_laid_over_its_base_is_the_disk(served: Served) -> None:
    # The recorded transcript's last line says so of the real one.
    assert RECORDED[-1].tail == 'the target is S2, byte for byte\n'
    assert served.pool.read(served.uuids['UUID-TARGET']) == served.pool.read(served.uuids['UUID-S2'])


def test_as_raw_a_difference_is_zeros_where_nothing_has_changed(served: Served) -> None:
    disk_bytes, content = served.pool.read(served.uuids['UUID-S2']), written(served, 'S2-base-S1.raw')
    block = 2 * MEBIBYTE
    assert content == b''.join(disk_bytes[at:at + block] if at // block in (0, 1, 2, 4) else bytes(block)
                               for at in range(0, len(disk_bytes), block))
