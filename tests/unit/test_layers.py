"""What increments are made of: the rows that tell the state of every block, the VHDs of what changed, and what is laid together
from them again; held against a model that keeps whole disks, and read by a reader of VHDs of its own and by qemu-img."""

import contextlib
import hashlib
import io
import os
import shutil
import struct
import subprocess
import tempfile
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import VmBackup
from VmBackup import MEBIBYTE, ZERO, BlocksFile, DiskState, Row, StateSink, VerificationError, VhdFile, image_pieces, rows_of

SECTOR = 512
UNIT = 2 * MEBIBYTE
FULL, BASE = 'backup-2016-04-15-001000', 'backup-2016-04-16-001000'
HEAVY = settings(max_examples=40)


def is_same(one: Any, other: Any) -> bool:
    """Are they equal? Where they are not, nobody wants to wait for a list of the differences."""
    return bool(one == other)


# --- rows ------------------------------------------------------------------------------------------------------------

def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


ROWS = [Row(0, digest(b'0'), ''), Row(3, ZERO, FULL), Row(4, digest(b'4'), BASE), Row(10 ** 6, digest(b'x'), '')]


def text_of(rows: Sequence[Row], disk: str = 'xvda') -> bytes:
    return b''.join(row.line(disk) for row in rows)


def read_rows(text: bytes, begin: int = 0, end: Optional[int] = None, disk: str = 'xvda') -> List[Row]:
    return list(rows_of(io.BufferedReader(io.BytesIO(text)), disk, begin, len(text) if end is None else end))  # type: ignore


def test_rows_are_read_as_they_were_written() -> None:
    assert read_rows(text_of(ROWS)) == ROWS
    assert text_of(ROWS[1:3]) == b'xvda 3 zero %s\nxvda 4 %s %s\n' % (FULL.encode(), digest(b'4').encode(), BASE.encode())


def test_rows_of_one_disk_are_read_from_among_those_of_others() -> None:
    before, mine, behind = text_of(ROWS, 'sda%20x'), text_of(ROWS[:2]), text_of(ROWS, 'xvdb')
    begin = len(VmBackup.ROWS_HEADING + before)
    text = VmBackup.ROWS_HEADING + before + mine + behind
    assert read_rows(text, begin, begin + len(mine)) == ROWS[:2]
    assert read_rows(text, begin, begin) == []
    assert read_rows(text, begin + len(mine), len(text), 'xvdb') == ROWS


@pytest.mark.parametrize('bad', [
    b'xvdb 5 zero\n', b'xvda 4 zero\n', b'xvda 3 zero\n', b'xvda 05 zero\n', b'xvda -5 zero\n', b'xvda 5 Zero\n', b'xvda 5 \n',
    b'xvda 5 ' + b'a' * 31 + b'\n', b'xvda 5 ' + b'a' * 33 + b'\n', b'xvda 5 ' + b'A' * 32 + b'\n', b'xvda  5 zero\n',
    b'xvda 5 zero \n', b'xvda 5 zero\r\n', b'xvda 5 zero web\n', b'xvda 5 zero backup-2016-04-15-00100\n',
    b'xvda 5 zero backup-2016-04-15-(00:10:00)\n',
    b'xvda 5 zero ../backup-2016-04-15-001000\n', b'xvda 5 zero backup-2016-04-15-001000 x\n', b'\n', b'# a remark\n',
    b'\0' * 40 + b'\n', b'xvda 5 zero\0\n', b'\xff\xfe 5 zero\n', b'xvda ' + b'1' * 16 + b' zero\n', b'xvda 5 zero', b'xvda 5',
    b'x' * 100000, b'',    ' xvda \u0665 zero\n'.encode(), b'image 5 00000000\n'])
def test_a_line_that_is_no_row_of_the_disk_is_refused(bad: bytes) -> None:
    good = text_of(ROWS[:3])
    with pytest.raises(VerificationError) as caught:
        read_rows(good + bad, end=len(good) + max(1, len(bad)))
    assert 'xvda' in str(caught.value) and '\n' not in str(caught.value) and len(str(caught.value)) < 300


def test_rows_before_a_bad_line_were_given_by_then() -> None:
    text = text_of(ROWS[:2]) + b'garbage\n'
    rows = rows_of(io.BytesIO(text), 'xvda', 0, len(text))  # type: ignore
    assert [next(rows), next(rows)] == ROWS[:2]
    with pytest.raises(VerificationError):
        next(rows)


@given(st.integers(0, len(text_of(ROWS)) - 1))
def test_a_list_that_was_cut_off_is_refused_or_ends_with_a_row(length: int) -> None:
    text = text_of(ROWS)
    with pytest.raises(VerificationError):
        read_rows(text[:length], end=len(text))


@pytest.mark.parametrize('end', [1, 20, 46, 48, 63, 66, 100, 140, len(text_of(ROWS)) - 1])
def test_rows_that_do_not_end_where_the_manifest_says_are_refused(end: int) -> None:
    text = text_of(ROWS)
    assert text[end - 1:end] != b'\n'
    with pytest.raises(VerificationError):
        read_rows(text, end=end)


@given(st.integers(0, len(text_of(ROWS)) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_gives_another_row(at: int, change: int) -> None:
    text = bytearray(text_of(ROWS))
    text[at] ^= change
    with contextlib.suppress(VerificationError):
        assert read_rows(bytes(text)) != ROWS


def test_an_endless_line_takes_no_memory() -> None:
    class Endless(io.RawIOBase):
        given = 0

        def readable(self) -> bool:
            return True

        def seekable(self) -> bool:
            return True

        def seek(self, offset: int, whence: int = 0) -> int:
            return offset

        def readinto(self, buffer: Any) -> int:
            self.given += len(buffer)
            buffer[:] = b'x' * len(buffer)
            return len(buffer)

    endless = Endless()
    with pytest.raises(VerificationError):
        list(rows_of(io.BufferedReader(endless), 'xvda', 0, 1 << 50))
    assert endless.given < MEBIBYTE


def test_the_file_is_closed_whatever_was_in_it() -> None:
    for text in (text_of(ROWS), b'garbage'):
        file = io.BytesIO(text)
        with contextlib.suppress(VerificationError):
            list(rows_of(file, 'xvda', 0, len(text)))  # type: ignore
        assert file.closed


# --- a reader of VHDs of the test's own ------------------------------------------------------------------------------

class Layer(NamedTuple):
    """A VHD as it was read: type, size, and the bytes that it names, by where in the disk they stand."""
    kind: int
    size: int
    units: Dict[int, bytes]
    bitmaps: Dict[int, bytes]

    def over(self, disk: bytearray) -> None:
        """What an import onto a disk that has contents does: the sectors whose bit is set are written."""
        for unit, content in self.units.items():
            for sector in range(UNIT // SECTOR):
                if self.bitmaps[unit][sector // 8] << sector % 8 & 0x80:
                    at = unit * UNIT + sector * SECTOR
                    assert at < self.size
                    if at < len(disk):
                        disk[at:at + SECTOR] = content[sector * SECTOR:(sector + 1) * SECTOR][:len(disk) - at]


def checked_sum(structure: bytes, at: int) -> bool:
    rest = structure[:at] + structure[at + 4:]
    return struct.unpack('>I', structure[at:at + 4])[0] == (0xFFFFFFFF - sum(rest)) & 0xFFFFFFFF


def read_vhd(text: bytes) -> Layer:
    """By the specification (Virtual Hard Disk Image Format 1.0), each number looked at."""
    footer = text[-SECTOR:]
    assert text[:SECTOR] == footer and footer[:8] == b'conectix' and checked_sum(footer, 64)
    features, version, header_at = struct.unpack('>IIQ', footer[8:24])
    original, size, _, kind = struct.unpack('>QQII', footer[40:64])
    assert (features & 2, version, original) == (2, 0x10000, size) and size % SECTOR == 0 and not footer[84:].strip(b'\0')
    header = text[header_at:header_at + 1024]
    assert header[:8] == b'cxsparse' and checked_sum(header, 36)
    ahead, table_at, header_version, entries, block = struct.unpack('>QQIII', header[8:36])
    assert (ahead, header_version, block) == (2 ** 64 - 1, 0x10000, UNIT) and entries == -(-size // UNIT)
    assert not header[40:].strip(b'\0'), 'no parent and no locators'
    table = struct.unpack('>%dI' % entries, text[table_at:table_at + 4 * entries])
    units, bitmaps, ends = {}, {}, [table_at + -(-4 * entries // SECTOR) * SECTOR]
    for unit, sector in enumerate(table):
        if sector != 0xFFFFFFFF:
            at = sector * SECTOR
            assert at == ends[-1], 'the blocks stand in order behind the table, nothing between them'
            bitmaps[unit], units[unit] = text[at:at + SECTOR], text[at + SECTOR:at + SECTOR + UNIT]
            ends.append(at + SECTOR + UNIT)
    assert len(text) == ends[-1] + SECTOR
    return Layer(kind, size, units, bitmaps)


def written(folder: str, name: str, size: int, kind: int, blocks: Sequence[Tuple[int, Sequence[Any]]]) -> str:
    path = os.path.join(folder, name)
    file = VhdFile(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), size, kind)
    for number, mebibytes in blocks:
        file.add(number, mebibytes)
    file.complete()
    file.close()
    return path


def bytes_of(path: str) -> bytes:
    with open(path, 'rb') as file:
        return file.read()


def content_of(seed: int, length: int = MEBIBYTE) -> bytes:
    """Bytes that no other seed gives, most of them zeros: cheap to make."""
    if length < 40:
        return bytes([seed % 255 + 1]) * length
    return (b'%20d' % seed).ljust(length - 20, b'\0') + b'%20d' % -seed


SIZES = [SECTOR, MEBIBYTE - SECTOR, MEBIBYTE, MEBIBYTE + SECTOR, UNIT, UNIT + SECTOR, 3 * MEBIBYTE, 5 * MEBIBYTE - SECTOR,
         5 * MEBIBYTE + 3 * SECTOR, 6 * MEBIBYTE]


def present_in(size: int, number: int) -> int:
    """How many bytes that MiB has inside a disk of that size."""
    return max(0, min(MEBIBYTE, size - number * MEBIBYTE))


@pytest.mark.parametrize('kind', [3, 4])
@pytest.mark.parametrize('size', SIZES)
def test_a_vhd_holds_the_blocks_that_it_was_given_and_no_bit_behind_the_end(tmp_path: Any, size: int, kind: int) -> None:
    last = -(-size // UNIT) - 1
    for number, units in enumerate([[], [0], [last], sorted({0, last}), list(range(last + 1))]):
        blocks = []
        for unit in units:
            both = [content_of(unit + half, present_in(size, 2 * unit + half)) if present_in(size, 2 * unit + half) else None
                    for half in (0, 1)]
            blocks.append((unit, both))
        layer = read_vhd(bytes_of(written(str(tmp_path), str(number), size, kind, blocks)))
        assert (layer.kind, layer.size, sorted(layer.units)) == (kind, size, units)
        for unit, (first, second) in blocks:
            assert is_same(layer.units[unit], (first or b'').ljust(MEBIBYTE, b'\0') + (second or b'').ljust(MEBIBYTE, b'\0'))
            inside = min(UNIT, size - unit * UNIT) // SECTOR
            assert int.from_bytes(layer.bitmaps[unit], 'big') == int('1' * inside + '0' * (4096 - inside), 2)


def test_a_disk_that_is_no_multiple_of_a_sector_is_rounded_up(tmp_path: Any) -> None:
    size = MEBIBYTE + 700
    layer = read_vhd(bytes_of(written(str(tmp_path), 'x', size, 4, [(0, [b'a' * MEBIBYTE, b'b' * 700])])))
    assert layer.size == MEBIBYTE + 2 * SECTOR
    disk = bytearray(size)
    layer.over(disk)
    assert is_same(disk, b'a' * MEBIBYTE + b'b' * 700)


def test_a_file_whose_table_was_not_written_yet_is_no_vhd(tmp_path: Any) -> None:
    path = str(tmp_path / 'x')
    file = VhdFile(os.open(path, os.O_RDWR | os.O_CREAT), UNIT, 4)
    file.add(0, [b'a' * MEBIBYTE, None])
    with pytest.raises((AssertionError, VerificationError)):
        read_vhd(bytes_of(path))
    with pytest.raises(VerificationError):
        checked(path, UNIT)
    file.close()


def checked(path: str, size: int) -> Any:
    """What the program's own check says of it."""
    check = VmBackup.Check(VmBackup.check_vhd, None, [], virtual_size=size, strict=False, is_whole=True, is_layer=True)
    for _ in check.read_file(os.open(path, os.O_RDONLY)):
        pass
    return check.report


@pytest.mark.parametrize('size', [MEBIBYTE, 2040 * 1024 * MEBIBYTE, 100 * 1024 * MEBIBYTE + SECTOR])
def test_a_large_disk_has_a_table_for_all_of_it(tmp_path: Any, size: int) -> None:
    last = -(-size // UNIT) - 1
    path = written(str(tmp_path), 'x', size, 4, [(last, [b'z' * present_in(size, 2 * last), None])])
    layer = read_vhd(bytes_of(path))
    assert (layer.size, list(layer.units)) == (size, [last])
    assert checked(path, size).disks[0].blocks == 1
    assert os.path.getsize(path) < 10 * MEBIBYTE


def geometry(size: int) -> Tuple[int, int, int]:
    """The specification's appendix, word for word."""
    total = min(size // SECTOR, 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        per_track, heads = 255, 16
        return total // per_track // heads, heads, per_track
    per_track = 17
    times = total // per_track
    heads = max((times + 1023) // 1024, 4)
    if times >= heads * 1024 or heads > 16:
        per_track, heads = 31, 16
        times = total // per_track
    if times >= heads * 1024:
        per_track, heads = 63, 16
        times = total // per_track
    return times // heads, heads, per_track


@given(st.one_of(st.integers(0, 2040 << 21), st.integers(0, 1 << 24),
                 st.sampled_from([17 * 4 * 1024, 17 * 16 * 1024, 31 * 16 * 1024, 63 * 16 * 65535, 255 * 16 * 65535]).flatmap(
                     lambda edge: st.integers(edge - 70, edge + 70))))
def test_the_geometry_is_that_of_the_specification(sectors: int) -> None:
    assert VmBackup.vhd_geometry(sectors * SECTOR) == geometry(sectors * SECTOR)


QEMU_IMG = shutil.which('qemu-img')


@pytest.mark.skipif(QEMU_IMG is None, reason='qemu-img is not here')
@pytest.mark.parametrize('size', [MEBIBYTE, UNIT + SECTOR, 5 * MEBIBYTE + 3 * SECTOR, 64 * MEBIBYTE, 70 * MEBIBYTE - SECTOR])
def test_qemu_img_reads_a_whole_disk_as_it_was_to_its_last_byte(tmp_path: Any, size: int) -> None:
    units = sorted({0, (size - 1) // UNIT, (size - 1) // UNIT // 2})
    blocks = [(unit, [content_of(9 * unit + half, present_in(size, 2 * unit + half)) or None for half in (0, 1)])
              for unit in units]
    path = written(str(tmp_path), 'x.vhd', size, 3, blocks)
    subprocess.check_call([str(QEMU_IMG), 'convert', '-f', 'vpc', '-O', 'raw', path, str(tmp_path / 'raw')])
    disk = bytearray(size)
    read_vhd(bytes_of(path)).over(disk)
    made = bytes_of(str(tmp_path / 'raw'))
    assert len(made) == size and is_same(made, disk)


# --- the state of a disk against a model -----------------------------------------------------------------------------

class File:
    """Takes the place of a VhdFile: what it was given, by unit."""

    def __init__(self) -> None:
        self.units = {}  # type: Dict[int, List[Optional[bytes]]]
        self.is_complete = False

    def add(self, number: int, mebibytes: Sequence[Any]) -> None:
        assert not self.is_complete and len(mebibytes) == 2 and number > max(self.units, default=-1)
        self.units[number] = [None if content is None else bytes(content) for content in mebibytes]

    def complete(self) -> None:
        self.is_complete = True

    def close(self) -> None:
        """Nothing is open."""


@contextlib.contextmanager
def a_list_of_blocks() -> Iterator[Tuple[BlocksFile, Any]]:
    """The file to write, and what gives its text."""
    with tempfile.TemporaryFile() as file:
        blocks = BlocksFile(os.dup(file.fileno()))

        def text() -> bytes:
            file.seek(0)
            return file.read()
        try:
            yield blocks, text
        finally:
            blocks.close()


def taken(state: DiskState, new: Dict[int, bytes]) -> None:
    """The state was shown those MiB, each with what a sink has behind the disk's end."""
    for number in sorted(new):
        state.take(number, memoryview(new[number].ljust(MEBIBYTE, b'\0')))
    state.finish()


@st.composite
def disks(draw: Any) -> Any:
    """A size, the rows of the base, and the new content of each MiB that is not zeros."""
    count = draw(st.integers(1, 9))
    size = count * MEBIBYTE - draw(st.sampled_from([0, 0, SECTOR, MEBIBYTE - SECTOR]))
    old, new = [], {}
    for number in range(count):
        state = draw(st.sampled_from(['zero', 'zero', 'same', 'same', 'other', 'new', 'became zero', 'stayed zero', 'was zero']))
        holder = draw(st.sampled_from(['', FULL, 'backup-2016-04-15-120000']))
        content = content_of(number + 1, present_in(size, number))
        if state in ('same', 'other', 'became zero'):
            old.append(Row(number, digest(content), holder))
        elif state in ('stayed zero', 'was zero'):
            old.append(Row(number, ZERO, holder))
        if state in ('same', 'new', 'was zero'):
            new[number] = content
        elif state == 'other':
            new[number] = content_of(number + 100, present_in(size, number))
    return size, old, new


def model(size: int, old: Sequence[Row], new: Dict[int, bytes], base: str) -> Tuple[List[Row], Dict[int, List[Optional[bytes]]]]:
    """The rows and the units that the contract demands."""
    before = {row.number: row for row in old}
    state = {number: digest(new[number]) if number in new else ZERO for number in range(-(-size // MEBIBYTE))}
    changed = {number // 2 for number in state if state[number] != (before[number].digest if number in before else ZERO)}
    rows = [Row(number, state[number], '' if number // 2 in changed else before[number].holder or base)
            for number in state if number in new or number in before]
    return rows, {unit: [new.get(2 * unit), new.get(2 * unit + 1)] for unit in sorted(changed)}


@HEAVY
@given(disks())
def test_the_rows_and_the_stored_units_are_those_that_the_contract_demands(disk: Any) -> None:
    size, old, new = disk
    rows, units = model(size, old, new, BASE)
    with a_list_of_blocks() as (blocks, text):
        blocks.line(VmBackup.ROWS_HEADING)
        file = File()
        state = DiskState('xvda', size, blocks, iter(old), BASE, file)  # type: ignore
        taken(state, new)
        blocks.end()
        assert read_rows(text(), state.begin, state.end) == rows and state.end == len(text())
    assert is_same(file.units, units) and file.is_complete and state.stored == len(units)
    assert state.present == len(new) and state.holders - {''} == {row.holder for row in rows} - {''}


@HEAVY
@given(disks())
def test_a_full_has_a_row_for_each_mebibyte_that_is_not_zeros(disk: Any) -> None:
    size, _, new = disk
    with a_list_of_blocks() as (blocks, text):
        state = DiskState('xvda', size, blocks)
        taken(state, new)
        blocks.end()
        assert read_rows(text(), state.begin, state.end) == [Row(number, digest(new[number]), '') for number in sorted(new)]
    assert (state.stored, state.present, state.holders - {''}) == (0, len(new), set())


def test_data_behind_the_end_of_the_disk_are_refused() -> None:
    with a_list_of_blocks() as (blocks, _):
        state = DiskState('xvda', 2 * MEBIBYTE, blocks)
        with pytest.raises(VerificationError) as caught:
            state.take(2, memoryview(content_of(1)))
        assert 'xvda' in str(caught.value)


# --- chains: nights of a disk, each of which an independent reader lays together again -------------------------------

class Night(NamedTuple):
    name: str
    size: int
    rows: List[Row]
    file: bytes                       # of a full: nothing
    disk: bytes
    since: str                        # the copy from which the layers begin


@st.composite
def nights(draw: Any) -> Any:
    """The sizes of a disk that grows or is made anew smaller, and what is written each night: MiB and seed, 0 for zeros."""
    size = draw(st.sampled_from(SIZES[2:]))
    found = []
    for _ in range(draw(st.integers(2, 5))):
        size = draw(st.sampled_from([size, size, size, size + SECTOR, size + MEBIBYTE, MEBIBYTE]))
        writes = draw(st.lists(st.tuples(st.integers(0, size // MEBIBYTE), st.sampled_from([0, 0, 1, 2, 3])), max_size=4))
        found.append((size, writes))
    return found


def of_the_night(folder: str, name: str, size: int, disk: bytes, base: Optional[Night]) -> Night:
    """A copy of that disk, as a run makes it, through a sink that is shown pieces."""
    with a_list_of_blocks() as (blocks, text):
        path = os.path.join(folder, name)
        is_same = base is not None and base.size <= size

        def begin(_: str) -> DiskState:
            if base is None:
                return DiskState('xvda', size, blocks)
            file = VhdFile(os.open(path, os.O_RDWR | os.O_CREAT), size, 4 if is_same else 3)
            return DiskState('xvda', size, blocks, iter(base.rows if is_same else ()), base.name, file)

        sink = StateSink(blocks, begin, lambda: ['Ref:1'])
        for at in range(0, size, MEBIBYTE // 2 + SECTOR):
            piece = disk[at:at + MEBIBYTE // 2 + SECTOR]
            if piece.strip(b'\0'):
                sink.put('Ref:1', at, memoryview(piece))
        sink.end(True)
        state = sink.disks['Ref:1']
        rows = read_rows(text(), state.begin, state.end)
        assert text().startswith(VmBackup.ROWS_HEADING)
        sink.close()
        return Night(name, size, rows, bytes_of(path) if base is not None else b'', disk,
                     base.since if base is not None and is_same else name)


@HEAVY
@given(nights())
@example([(3 * MEBIBYTE, [(0, 1), (1, 2)]), (3 * MEBIBYTE, [(1, 0)]), (3 * MEBIBYTE, [(0, 2)]), (3 * MEBIBYTE, [(1, 3)])])
@example([(MEBIBYTE + SECTOR, [(1, 1)]), (MEBIBYTE, [(0, 1)]), (3 * MEBIBYTE, [(2, 1)]), (3 * MEBIBYTE, [(2, 0)])])
def test_the_layers_that_the_rows_name_laid_over_each_other_give_the_disk_of_the_night(history: Any) -> None:
    copies = []  # type: List[Night]
    with tempfile.TemporaryDirectory() as folder:
        disk = bytearray()
        for number, (size, writes) in enumerate(history):
            disk = disk[:size].ljust(size, b'\0')
            for mebibyte, seed in writes:
                length = present_in(size, mebibyte)
                disk[mebibyte * MEBIBYTE:mebibyte * MEBIBYTE + length] = content_of(seed, length) if seed else bytes(length)
            copies.append(of_the_night(folder, 'backup-2016-04-15-%06d' % number, size, bytes(disk),
                                       copies[-1] if copies else None))
    for position, copy in enumerate(copies):
        needed = {row.holder for row in copy.rows} | {'', copy.since}
        made = bytearray(copy.size)
        layers = [one for one in copies[:position] if one.name in needed] + [copy]
        assert layers[0].name == copy.since and needed <= {one.name for one in layers} | {''}
        for one in layers:
            if one.file:
                layer = read_vhd(one.file)
                assert layer.size == one.size and layer.kind == (3 if one.since == one.name else 4)
                layer.over(made)
            else:
                made[:len(one.disk)] = one.disk
        assert is_same(made, copy.disk)
        by_number = {row.number: row.digest for row in copy.rows}
        for number in range(-(-copy.size // MEBIBYTE)):
            piece = copy.disk[number * MEBIBYTE:(number + 1) * MEBIBYTE]
            assert by_number.get(number, ZERO) == (digest(piece) if piece.strip(b'\0') else ZERO)
        if copy.file and copy.since != copy.name:
            assert sorted(read_vhd(copy.file).units) == changed_units(copies[position - 1], copy)


def changed_units(before: Night, copy: Night) -> List[int]:
    """The units whose MiB have another digest than before, also where only the disk's end went further behind them."""
    found = set()  # type: Set[int]
    for number in range(-(-copy.size // MEBIBYTE)):
        old, new = (one.disk[number * MEBIBYTE:(number + 1) * MEBIBYTE] for one in (before, copy))
        if (old.strip(b'\0') or new.strip(b'\0')) and old != new:
            found.add(number // 2)
    return sorted(found)


def test_a_sink_notes_all_disks_in_the_order_of_the_image_and_those_of_zeros_behind_them() -> None:
    with a_list_of_blocks() as (blocks, text):
        sink = StateSink(blocks, lambda name: DiskState('of%' + name, 3 * MEBIBYTE, blocks), lambda: ['a', 'b', 'c'])
        sink.put('c', 0, memoryview(b'c' * MEBIBYTE))
        sink.put('a', MEBIBYTE, memoryview(b'a' * 10))
        sink.end(True)
        assert list(sink.disks) == ['c', 'a', 'b']
        found = {name: read_rows(text(), state.begin, state.end, 'of%' + name) for name, state in sink.disks.items()}
        sink.close()
    assert found == {'c': [Row(0, digest(b'c' * MEBIBYTE), '')], 'b': [],
                     'a': [Row(1, digest((b'a' * 10).ljust(MEBIBYTE, b'\0')), '')]}


# --- what is laid together, as an image ------------------------------------------------------------------------------

def ova_of(sizes: Dict[str, int]) -> bytes:
    """The ova.xml of a VM with these disks."""
    objects = [('VM', 'Ref:1', dict(power_state='Halted', suspend_VDI='OpaqueRef:NULL')),
               ('SR', 'Ref:9', dict(content_type='user'))]  # type: List[Any]
    for name, size in sizes.items():
        objects += [('VBD', name + '1', dict(VDI=name, type='Disk', empty=False)),
                    ('VDI', name, dict(uuid='uuid-' + name, virtual_size=str(size), SR='Ref:9'))]
    return VmBackup.ova_text({'version': {}, 'objects': [
        {'class': kind, 'id': key, 'snapshot': fields} for kind, key, fields in objects]})


def shown(contents: Dict[int, bytes]) -> List[Any]:
    """The MiBs of a disk as image_pieces takes them: number and content, in order."""
    return sorted(contents.items())


def checked_archive(sizes: Dict[str, int], contents: Dict[str, Dict[int, bytes]]) -> Tuple[Any, Dict[str, bytearray]]:
    """The report on an archive of these disks, as strictly as one of the server's is read, and the disks that it gives."""
    found = {name: bytearray(size) for name, size in sizes.items()}

    class Sink:
        def put(self, disk: str, offset: int, view: Any) -> None:
            found[disk][offset:offset + len(view)] = view

        def end(self, is_whole: bool) -> None:
            """All was put."""

        close = contextlib.suppress

    pieces = [VmBackup.tar_member('ova.xml', ova_of(sizes))]
    for name, size in sizes.items():
        pieces += image_pieces(name, size, shown(contents[name]))
    check = VmBackup.Check(VmBackup.check_xva, None, [Sink()], strict=True,
                           expected={'uuid-' + name: size for name, size in sizes.items()})
    check.read(VmBackup.Reader(memoryview(bytes(piece)) for piece in [*pieces, VmBackup.XVA_END]))
    return check.report, found


@st.composite
def disk_contents(draw: Any) -> Any:
    """A size and the MiB that are not zeros."""
    size = draw(st.one_of(st.sampled_from(SIZES), st.integers(1, 6 * MEBIBYTE)))
    numbers = draw(st.sets(st.integers(0, (size - 1) // MEBIBYTE)))
    return size, {number: content_of(number + 1, present_in(size, number)) for number in numbers}


def disk_of(size: int, contents: Dict[int, bytes]) -> bytearray:
    disk = bytearray(size)
    for number, content in contents.items():
        disk[number * MEBIBYTE:number * MEBIBYTE + len(content)] = content
    return disk


@HEAVY
@given(disk_contents(), disk_contents())
def test_an_archive_laid_together_is_one_as_of_a_server_without_zeros_but_the_first_and_last_mebibyte(one: Any, two: Any) -> None:
    sizes = {'Ref:10': one[0], 'Ref:2': two[0]}
    report, found = checked_archive(sizes, {'Ref:10': one[1], 'Ref:2': two[1]})
    assert is_same(found['Ref:10'], disk_of(*one)) and is_same(found['Ref:2'], disk_of(*two))
    assert report.digests_checked and report.digest_kind == 'sha1'
    for disk in report.disks:
        size, contents = one if disk.id == 'Ref:10' else two
        assert disk.blocks == len(set(contents) | {0, (size - 1) // MEBIBYTE})


@HEAVY
@given(disk_contents())
def test_a_raw_image_laid_together_is_the_disk(disk: Any) -> None:
    size, contents = disk
    pieces = [memoryview(bytes(piece)) for piece in image_pieces('', size, shown(contents))]
    assert is_same(b''.join(pieces), disk_of(size, contents))
    check = VmBackup.Check(VmBackup.check_raw, None, [], virtual_size=size)
    check.read(VmBackup.Reader(iter(pieces)))
    assert check.report.disks[0].virtual_size == size


@pytest.mark.parametrize('name', ['', 'Ref:1'])
def test_pieces_of_a_large_disk_of_zeros_take_no_memory(name: str) -> None:
    count = total = 0
    for piece in image_pieces(name, 3000 * MEBIBYTE + SECTOR, iter([])):
        count, total = count + 1, total + len(piece)
    assert total == (3000 * MEBIBYTE + SECTOR if not name else total) and (not name or total < 2 * MEBIBYTE)


def test_what_stands_behind_the_end_of_the_disk_is_seen_by_the_check() -> None:
    pieces = [memoryview(bytes(piece)) for piece in image_pieces('', UNIT, shown({0: content_of(1), 2: content_of(2)}))]
    check = VmBackup.Check(VmBackup.check_raw, None, [], virtual_size=UNIT)
    with pytest.raises(VerificationError):
        check.read(VmBackup.Reader(iter(pieces)))
