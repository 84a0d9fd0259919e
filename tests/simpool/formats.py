"""The file formats of exports, made and read: XVA, VHD, raw disks and tars of one disk.

Writers are generators of byte pieces, so that a 2 TiB disk never sits in memory and whoever
sends them decides about compression, speed and faults. Readers take a Source and check what the
real importer checks, and no more: what it lets pass, passes here too.

Disks are storage.Disk: `size`, `block(i)` (MiB i, the last one may be short), `next_used(i)`,
`zeroed_blocks()`, `read(offset, length)`, `write(offset, data)`.

Source of the facts: xapi v24.19.2 (the recorded archives), ocaml/xapi/export.ml, import.ml,
stream_vdi.ml, ocaml/libs/vhd/vhd_format/f.ml; ocaml-tar for the headers.
"""

import ctypes
import hashlib
import io
import itertools
import re
import struct
import subprocess
import threading
import time
import uuid
import xml.etree.ElementTree as ElementTree
import zlib
from typing import Any, BinaryIO, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple

MIB = 1024 * 1024
ZERO_MIB = bytes(MIB)
SECTOR = 512
END_OF_TAR = bytes(2 * SECTOR)

# Longer silence makes xapi send an empty member, against firewalls that drop idle connections
# (stream_vdi.ml send_one).
KEEPALIVE_AFTER_S = 5.0


# --- Digests ------------------------------------------------------------------------------------

def _xxh64_function() -> Callable[[bytes], int]:
    """XXH64 with seed 0 as a function of bytes: the module, the C library, or plain Python."""
    try:
        import xxhash
    except ImportError:
        pass
    else:
        return lambda content: xxhash.xxh64_intdigest(content)
    function = _library_function(('libxxhash.so.0', 'libxxhash.so', 'libxxhash.dylib'), 'XXH64')
    if function is None:
        return xxh64_in_python
    function.restype = ctypes.c_uint64
    function.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64)
    return lambda content: function(bytes(content), len(content), 0)


def _library_function(libraries: Iterable[str], name: str) -> Any:
    """A function of the first of these C libraries that is there and has it, or None."""
    for library in libraries:
        try:
            return getattr(ctypes.CDLL(library), name)
        except (OSError, AttributeError):
            continue
    return None


def xxh64_in_python(content: bytes) -> int:
    """XXH64 with seed 0, after the algorithm's published description; about 1 MiB/s."""
    mask = 0xFFFFFFFFFFFFFFFF
    p1, p2, p3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
    p4, p5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5

    def rotate(word: int, bits: int) -> int:
        return ((word << bits) | (word >> (64 - bits))) & mask

    def mix(lane: int, word: int) -> int:
        return rotate((lane + word * p2) & mask, 31) * p1 & mask

    length, at = len(content), 0
    if length >= 32:
        lanes = [(p1 + p2) & mask, p2, 0, (-p1) & mask]
        whole = length - length % 32
        for words in struct.iter_unpack('<4Q', content[:whole]):
            lanes = [mix(lane, word) for lane, word in zip(lanes, words)]
        at = whole
        digest = sum(rotate(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18))) & mask
        for lane in lanes:
            digest = ((digest ^ mix(0, lane)) * p1 + p4) & mask
    else:
        digest = p5
    digest = (digest + length) & mask
    while at + 8 <= length:
        word, = struct.unpack_from('<Q', content, at)
        digest = (rotate(digest ^ mix(0, word), 27) * p1 + p4) & mask
        at += 8
    if at + 4 <= length:
        word, = struct.unpack_from('<I', content, at)
        digest = (rotate(digest ^ (word * p1 & mask), 23) * p2 + p3) & mask
        at += 4
    for byte in content[at:]:
        digest = rotate(digest ^ (byte * p5 & mask), 11) * p1 & mask
    digest = ((digest ^ (digest >> 33)) * p2) & mask
    digest = ((digest ^ (digest >> 29)) * p3) & mask
    return digest ^ (digest >> 32)


_xxh64 = _xxh64_function()


def xxhash_text(content: bytes) -> str:
    """XXH64 as it stands in an archive: 16 upper-case digits (stream_vdi.ml, "%016LX")."""
    return '%016X' % _xxh64(content)


def _sha1_function() -> Callable[[bytes], str]:
    """SHA-1 as hexadecimal digits of bytes.

    A Python that was built without its OpenSSL module has a SHA-1 of its own at a fifth of the
    speed; then the library is asked directly.
    """
    function = None
    if 'openssl' not in repr(hashlib.sha1):
        function = _library_function(('libcrypto.so.3', 'libcrypto.so.1.1'), 'SHA1')
    if function is None:
        return lambda content: hashlib.sha1(content).hexdigest()
    function.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p)

    def sha1(content: bytes) -> str:
        digest = ctypes.create_string_buffer(20)
        function(bytes(content), len(content), digest)
        return digest.raw.hex()
    return sha1


sha1_text = _sha1_function()


# Member name's extension -> digest; xapi 1.170.0 went from the second to the first.
DIGESTS = {'xxhash': xxhash_text, 'checksum': sha1_text}


# --- Tar ----------------------------------------------------------------------------------------

def tar_header(name: str, size: int, modified: int = 0) -> bytes:
    """A header as ocaml-tar writes it at its default level: V7, no magic, type NUL, mode 0400."""
    head = bytearray(SECTOR)
    encoded = name.encode('utf-8')
    head[0:len(encoded)] = encoded
    head[100:148] = b'0000400\0' b'0000000\0' b'0000000\0' b'%011o\0%011o\0' % (size, modified)
    head[148:156] = b' ' * 8
    head[148:156] = b'%07o\0' % sum(head)
    return bytes(head)


def tar_padding(size: int) -> bytes:
    return bytes(-size % SECTOR)


def checksum_member(name: str, content: bytes, digest: str) -> bytes:
    """The member behind a data member: its name and kind of digest, no newline in it."""
    text = DIGESTS[digest](content).encode('ascii')
    return tar_header('%s.%s' % (name, digest), len(text)) + text + tar_padding(len(text))


def disk_members(prefix: str, disk: Any, digest: str, advance: Callable[[int], None],
                 keepalive: bool = False) -> Iterator[bytes]:
    """The chunk members of one disk, as stream_vdi.ml send_one makes them.

    Chunks of zeros are left out, except the first and the last. An empty member takes up a
    number without moving on in the disk: after 5 s of silence, or, with `keepalive`, in every
    run of zeros and before the second chunk. `advance` gets the bytes of the disk gone by, and
    may raise to break off.
    """
    last = (disk.size - 1) // MIB
    number = index = 0
    trailer = b''
    sent_at = time.monotonic()
    empty_due = False
    while disk.size:
        name = '%s/%08d' % (prefix, number)
        between = 0 < index < last
        if between and (empty_due or time.monotonic() - sent_at > KEEPALIVE_AFTER_S):
            sent_at, empty_due = time.monotonic(), False
            yield trailer + tar_header(name, 0) + checksum_member(name, b'', digest)
            trailer = b''
            number += 1
            continue
        if between and disk.is_zero(index):
            # Only the slow-disk fault stops here: long runs of zeros are skipped below.
            following = _next_chunk(disk, index, last)
        else:
            content = disk.block(index)
            sent_at = time.monotonic()
            yield trailer + tar_header(name, len(content))
            yield content
            trailer = tar_padding(len(content)) + checksum_member(name, content, digest)
            if index == last:
                advance(len(content))
                break
            following = index + 1 if keepalive else _next_chunk(disk, index, last)
            empty_due = keepalive and (index == 0 or disk.is_zero(following))
        advance((following - index) * MIB)
        number += following - index
        index = following
    if trailer:
        yield trailer


def _next_chunk(disk: Any, index: int, last: int) -> int:
    """The next chunk after `index` that is not all zeros, at most the last one."""
    following = disk.next_used(index + 1)
    return last if following is None else min(following, last)


def xva(ova_xml: bytes, disks: Iterable[Tuple[str, Callable[[], Any]]], digest: str,
        modified: int, advance: Callable[[int], None] = lambda n: None, keepalive: bool = False
        ) -> Iterator[bytes]:
    """A whole XVA: ova.xml, the disks in string order of their ids, 1024 zero bytes.

    Each disk comes as a function that gives a context manager: it is open only while it is sent.
    """
    yield tar_header('ova.xml', len(ova_xml), modified) + ova_xml + tar_padding(len(ova_xml))
    for prefix, open_disk in sorted(disks, key=lambda pair: pair[0]):
        with open_disk() as disk:
            for piece in disk_members(prefix, disk, digest, advance, keepalive):
                yield piece
    yield END_OF_TAR


def disk_tar(disk: Any, digest: str, advance: Callable[[int], None], keepalive: bool = False
             ) -> Iterator[bytes]:
    """The format `tar` of vdi-export: chunk members under vdi/ and no ova.xml."""
    for piece in disk_members('vdi', disk, digest, advance, keepalive):
        yield piece
    yield END_OF_TAR


def raw(disk: Any, advance: Callable[[int], None], blocks: Optional[Iterable[int]] = None) -> Iterator[bytes]:
    """Every byte of the disk, zeros too; with `blocks`, zeros in the place of all but these blocks of a VHD.

    So an export of a difference as raw is not the disk (vhd_format/f.ml raw_common, v24.19.2).
    """
    sent = None if blocks is None else set(blocks)
    for index in range((disk.size + MIB - 1) // MIB):
        length = min(MIB, disk.size - index * MIB)
        if disk.is_zero(index) or (sent is not None and index * MIB // VHD_BLOCK not in sent):
            yield ZERO_MIB if length == MIB else bytes(length)
        else:
            yield disk.block(index)
        advance(length)


# --- VHD ----------------------------------------------------------------------------------------

VHD_BLOCK = 2 * MIB
VHD_LARGEST = 2040 * 1024 * MIB       # xapi Constants.max_vhd_size
_ABSENT = 0xFFFFFFFF
_DYNAMIC, _DIFFERENCING = 3, 4
#: 2000-01-01, from which a VHD counts its seconds.
_VHD_EPOCH = 946684800


def vhd_uuid_of(vdi_uuid: str) -> bytes:
    """The uuid in the footer of a disk's VHD on its SR; not the VDI's own, as on a real SR."""
    return uuid.uuid5(uuid.UUID(vdi_uuid), 'vhd footer').bytes


def _vhd_geometry(size: int) -> Tuple[int, int, int]:
    """Cylinders, heads, sectors as the VHD specification computes them from the size."""
    total = min(size // SECTOR, 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        sectors, heads, tracks = 255, 16, total // 255
    else:
        sectors, tracks = 17, total // 17
        heads = max((tracks + 1023) // 1024, 4)
        if tracks >= heads * 1024 or heads > 16:
            sectors, heads, tracks = 31, 16, total // 31
        if tracks >= heads * 1024:
            sectors, heads, tracks = 63, 16, total // 63
    return tracks // heads, heads, sectors


def _vhd_checksum(block: bytes) -> int:
    return ~sum(block) & 0xFFFFFFFF


def vhd_footer(size: int, disk_type: int, identity: bytes) -> bytes:
    """The 512 bytes at both ends of a VHD, as vhd_format/f.ml fills them."""
    def fields(checksum: int) -> bytes:
        return struct.pack('>8sIIQI4sIIQQHBBII16sB427x', b'conectix', 2, 0x00010000, 512, 0,
                           b'caml', 1, 0, size, size,
                           *(_vhd_geometry(size) + (disk_type, checksum, identity, 0)))
    return fields(_vhd_checksum(fields(0)))


class Parent(NamedTuple):
    """What a differencing VHD says of the one below it: the uuid in that one's footer, when it was last written to, in seconds
    since the epoch, and its path on the host."""
    identity: bytes
    modified: int
    path: str


def vhd_header(entries: int, parent: Optional[Parent] = None) -> bytes:
    """The 1024 bytes of the dynamic disk header.

    A parent is named by uuid, time, name and one locator, whose place is the empty sector before the table: the path that
    should stand there is not written (vhd_format/f.ml vhd_common, v24.19.2; recorded).
    """
    identity, modified, name, locator = bytes(16), 0, b'', b''
    if parent is not None:
        identity, modified = parent.identity, parent.modified - _VHD_EPOCH
        name = parent.path.encode('utf-16-be')
        locator = struct.pack('>4sIIIQ', b'MacX', 1, len('file://' + parent.path), 0, 2048 - SECTOR)

    def fields(checksum: int) -> bytes:
        return struct.pack('>8sQQIIII16sII512s192s256x', b'cxsparse', 0xFFFFFFFFFFFFFFFF, 2048,
                           0x00010000, entries, VHD_BLOCK, checksum, identity, modified, 0, name, locator)
    return fields(_vhd_checksum(fields(0)))


def vhd(disk: Any, advance: Callable[[int], None], blocks: Iterable[int], parent: Optional[Parent] = None,
        size: Optional[int] = None) -> Iterator[bytes]:
    """A streamable VHD of these blocks, ascending, zeros like others, footer at both ends; differencing if there is a parent.

    `size` is what it says to be the disk's, if that is not so. `advance` gets each block's share of the disk's size.
    """
    size = disk.size if size is None else size
    entries = vhd_entries(size)
    bat_size = (4 * entries + SECTOR - 1) // SECTOR * SECTOR
    present = list(blocks)
    bat = bytearray(b'\xff' * bat_size)
    sector = (2048 + bat_size) // SECTOR
    for block in present:
        struct.pack_into('>I', bat, 4 * block, sector)
        sector += 1 + VHD_BLOCK // SECTOR
    footer = vhd_footer(size, _DYNAMIC if parent is None else _DIFFERENCING, uuid.uuid4().bytes)
    yield footer + vhd_header(entries, parent) + bytes(SECTOR) + bytes(bat)
    for number, block in enumerate(present):
        first = block * 2
        yield b'\xff' * SECTOR
        for index in (first, first + 1):
            content = disk.block(index) if index * MIB < disk.size else b''
            yield content if len(content) == MIB else bytes(content) + bytes(MIB - len(content))
        advance(disk.size * (number + 1) // len(present) - disk.size * number // len(present))
    if not present:
        advance(disk.size)
    yield footer


def vhd_entries(size: int) -> int:
    """How many blocks a disk of that size has, as a VHD counts them."""
    return (size + VHD_BLOCK - 1) // VHD_BLOCK


def vhd_blocks(disk: Any, with_zeros: bool = True) -> List[int]:
    """The blocks of a VHD that hold something, or only a guest's zeros."""
    present = {index // 2 for index in disk.zeroed_blocks()} if with_zeros else set()
    index = disk.next_used(0)
    while index is not None:
        present.add(index // 2)
        index = disk.next_used(index // 2 * 2 + 2)
    return sorted(present)


# --- XML-RPC values -----------------------------------------------------------------------------

# ocaml-rpc drops what XML 1.0 cannot hold.
_NOT_IN_XML = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f]')


class Date(str):
    """A date on the wire: goes out as dateTime.iso8601, all other text untyped."""


def escaped(text: str) -> str:
    text = _NOT_IN_XML.sub('', text)
    return (text.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
            .replace('"', '&quot;'))


def xml_value(value: Any) -> str:
    """A value as ocaml-rpc's xmlrpc.ml writes it: no spaces, strings without a type."""
    if isinstance(value, bool):
        return '<value><boolean>%d</boolean></value>' % value
    if isinstance(value, float):
        return '<value><double>%.16g</double></value>' % value
    if isinstance(value, Date):
        return '<value><dateTime.iso8601>%s</dateTime.iso8601></value>' % escaped(value)
    if isinstance(value, (list, tuple)):
        return ('<value><array><data>%s</data></array></value>'
                % ''.join(map(xml_value, value)))
    if isinstance(value, dict):
        members = ''.join('<member><name>%s</name>%s</member>' % (escaped(k), xml_value(v))
                          for k, v in value.items())
        return '<value><struct>%s</struct></value>' % members
    return '<value>%s</value>' % escaped(str(value))


class BadXml(Exception):
    """Text that is no XML-RPC value."""


def value_of_xml(text: bytes) -> Any:
    """What an XML-RPC value says, in the form records have here; raises BadXml."""
    try:
        return _value_of(ElementTree.fromstring(text))
    except (ElementTree.ParseError, AttributeError, IndexError, ValueError, TypeError) as error:
        raise BadXml(str(error))


def _value_of(element: Any) -> Any:
    if element.tag != 'value':
        raise BadXml('expected value, found %s' % element.tag)
    if not len(element):
        return element.text or ''
    inner = element[0]
    if inner.tag == 'struct':
        return {member.find('name').text or '': _value_of(member.find('value'))
                for member in inner}
    if inner.tag == 'array':
        return [_value_of(one) for one in inner.find('data')]
    text = inner.text or ''
    if inner.tag == 'boolean':
        return text == '1'
    if inner.tag == 'double':
        return float(text)
    if inner.tag == 'dateTime.iso8601':
        return Date(text)
    return text


# --- Reading ------------------------------------------------------------------------------------

class PrematureEnd(Exception):
    """The stream ended where more had to come."""


class BadArchive(Exception):
    """What came is no archive the importer takes; the text is the OCaml exception's."""


class UnexpectedFile(Exception):
    """The first member is not the expected one: (expected, found)."""


class Source:
    """A stream to read from: exactly as much as asked for, or PrematureEnd.

    `limit` is the number of bytes that there are (Content-Length), if it is known.
    """

    def __init__(self, stream: BinaryIO, limit: Optional[int] = None) -> None:
        self._stream = stream
        self._left = limit
        self.count = 0

    def some(self, size: int) -> bytes:
        """Between 1 and `size` bytes as they come, or none at the end."""
        if self._left is not None:
            size = min(size, self._left)
        if not size:
            return b''
        read = getattr(self._stream, 'read1', self._stream.read)
        content = read(size)
        self.count += len(content)
        if self._left is not None:
            self._left -= len(content)
        return content

    def exactly(self, size: int) -> bytes:
        content = self.some(size)
        if len(content) == size:
            return content
        pieces = [content]
        missing = size - len(content)
        while missing:
            if not pieces[-1]:
                raise PrematureEnd()
            pieces.append(self.some(missing))
            missing -= len(pieces[-1])
        return b''.join(pieces)

    def rest(self) -> Iterator[bytes]:
        piece = self.some(MIB)
        while piece:
            yield piece
            piece = self.some(MIB)

    def close(self) -> None:
        """Stops what feeds the stream; nothing to stop here."""


class _Gunzipped(io.RawIOBase):
    """The content of a gzip stream; ends early, without complaint, where that one does.

    The real importer reads from a gzip program: of its complaints nothing is seen but the end
    of the pipe.
    """

    def __init__(self, start: bytes, source: Source) -> None:
        super().__init__()
        self._pieces = itertools.chain((start,), source.rest())
        self._unzip = zlib.decompressobj(31)
        self._waiting = b''

    def read1(self, size: int = -1) -> bytes:
        while True:
            if not self._waiting:
                self._waiting = next(self._pieces, b'')
                if not self._waiting:
                    return b''
            try:
                content = self._unzip.decompress(self._waiting, size)
            except zlib.error:
                return b''
            self._waiting = self._unzip.unconsumed_tail
            if self._unzip.eof:
                self._waiting = self._unzip.unused_data
                self._unzip = zlib.decompressobj(31)
            if content:
                return content

    read = read1


class _Unzstd(Source):
    """The content of a zstd stream, by way of the zstd program, as xapi does it."""

    def __init__(self, start: bytes, source: Source) -> None:
        self._program = subprocess.Popen(['zstd', '-dcq'], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        super().__init__(self._program.stdout)
        # Not joined: it may stand in a read of a connection that ends only with the request.
        threading.Thread(target=self._feed, args=(start, source), daemon=True).start()

    def _feed(self, start: bytes, source: Source) -> None:
        try:
            self._program.stdin.write(start)
            for piece in source.rest():
                self._program.stdin.write(piece)
        except (OSError, ValueError):
            pass
        finally:
            try:
                self._program.stdin.close()
            except OSError:
                pass

    def close(self) -> None:
        self._program.kill()
        self._program.wait()
        self._program.stdout.close()


class TarReader:
    """The members of a tar, one after another, from a Source."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def next_header(self) -> Tuple[str, int]:
        """Name and size of the next member; PrematureEnd also at the end-of-archive blocks."""
        header = self.source.exactly(SECTOR)
        member = parse_tar_header(header)
        if member is None:
            # ocaml-tar raises End_of_stream, which import.ml takes for a premature end.
            raise PrematureEnd()
        return member

    def content(self, size: int) -> bytes:
        content = self.source.exactly(size)
        self.source.exactly(-size % SECTOR)
        return content


def parse_tar_header(header: bytes) -> Optional[Tuple[str, int]]:
    """Name and size; None for a block of zeros; BadArchive if the checksum is wrong."""
    if header == bytes(SECTOR):
        return None
    try:
        stated = int(header[148:156].strip(b'\0 ') or b'0', 8)
        size = int(header[124:136].strip(b'\0 ') or b'0', 8)
    except ValueError:
        raise BadArchive('Tar.Header.Checksum_mismatch')
    if stated != sum(header) - sum(header[148:156]) + 8 * 32:
        raise BadArchive('Tar.Header.Checksum_mismatch')
    return header[:100].split(b'\0', 1)[0].decode('utf-8', 'replace'), size


def open_archive(source: Source) -> Tuple[bytes, TarReader]:
    """ova.xml and what follows it, compressed or not (import.ml with_open_archive).

    Anything that does not begin like a plain archive goes through a decompressor: so what is no
    archive at all ends as a stream that is too short.
    """
    start = source.exactly(SECTOR)
    try:
        member = parse_tar_header(start)
    except BadArchive:
        member = None
    if member is not None and member[0] == 'ova.xml':
        tar = TarReader(source)
        return tar.content(member[1]), tar
    if start.startswith(b'\x28\xb5\x2f\xfd'):
        inner = _Unzstd(start, source)     # type: Source
    else:
        inner = Source(_Gunzipped(start, source))
    tar = TarReader(inner)
    try:
        name, size = tar.next_header()
        if name != 'ova.xml':
            raise UnexpectedFile('ova.xml', name)
        return tar.content(size), tar
    except BaseException:
        inner.close()
        raise


def receive_disk(tar: TarReader, prefix: str, size: int, disk: Any, force: bool,
                 advance: Callable[[int], None]) -> None:
    """Writes one disk's members to it, checked as stream_vdi.ml recv_all_vdi checks them.

    Reads up to the chunk that completes `size` (by ova.xml; the SR may have made the disk larger)
    and no further: what follows is not looked at.
    """
    offset = 0
    last_number = -1
    last_suffix = '-1'
    first_length = None     # type: Optional[int]
    while offset < size:
        name, length = tar.next_header()
        if first_length is None:
            first_length = length
        suffix = name[len(prefix) + 1:]
        if not name.startswith(prefix) or suffix <= last_suffix or not suffix.isdigit():
            raise BadArchive('Stream_vdi.Failure("Invalid XVA file")')
        skipped = (int(suffix) - last_number - 1) * first_length
        last_number, last_suffix = int(suffix), suffix
        content = tar.content(length)
        offset += skipped
        if offset + length > disk.size:
            raise BadArchive('Unix.Unix_error(Unix.ENOSPC, "write", "")')
        disk.write(offset, content)
        offset += length
        checksum_name, checksum_length = tar.next_header()
        digest = checksum_name.rpartition('.')[2]
        if digest not in DIGESTS:
            raise BadArchive('Stream_vdi.Failure("Found unsupported checksum file: %s")'
                             % checksum_name)
        stated = tar.content(checksum_length).decode('ascii', 'replace')
        found = DIGESTS[digest](content)
        if stated != found and not force:
            raise BadArchive('Stream_vdi.Invalid_checksum("Block %s checksum failed: '
                             'original = %s; recomputed = %s")' % (name, stated, found))
        advance(skipped + length)


class BadVhd(Exception):
    """No VHD, or one that ends too early, or data behind the end of the disk."""


def receive_vhd(source: Source, disk: Any, advance: Callable[[int], None], length: Optional[int] = None) -> None:
    """Writes the sectors whose bit is set in their block's bitmap; all others stay as they were, whatever lay there.

    As vhd_format/f.ml openstream reads it, v24.19.2: forward only, so footer, header and table
    stand before the data in this order; the blocks in the order of the file, whatever their order
    in the disk; of two table entries for one place the later counts; the last footer at the end
    of `length`. Type, size and parent are not looked at: a differencing VHD is laid over the
    disk's content as it is.
    """
    before = source.count

    def skip_to(place: int) -> None:
        gap = place - (source.count - before)
        if gap < 0:
            raise BadVhd('something stands before what it needs')
        while gap:
            gap -= len(source.exactly(min(gap, MIB)))

    try:
        footer = source.exactly(SECTOR)
        _assert_sound(footer, b'conectix', 64)
        skip_to(struct.unpack_from('>Q', footer, 16)[0])
        header = source.exactly(1024)
        _assert_sound(header, b'cxsparse', 36)
        entries, block_size = struct.unpack_from('>II', header, 28)
        if entries > VHD_LARGEST // SECTOR or block_size % SECTOR:
            raise BadVhd('no such table')
        skip_to(struct.unpack_from('>Q', header, 16)[0])
        bat = struct.unpack('>%dI' % entries, source.exactly(4 * entries))
        bitmap_size = (block_size // SECTOR // 8 + SECTOR - 1) // SECTOR * SECTOR
        for sector, block in sorted({s: b for b, s in enumerate(bat) if s != _ABSENT}.items()):
            skip_to(sector * SECTOR)
            bitmap = source.exactly(bitmap_size)
            content = source.exactly(block_size)
            _lay_over(disk, block * block_size, content, list(_set_bits(bitmap, block_size // SECTOR)))
            advance(block_size)
        if length is not None:
            skip_to((length - 1) // SECTOR * SECTOR)
        _assert_sound(source.exactly(SECTOR), b'conectix', 64)
    except PrematureEnd:
        raise BadVhd('the end came too early')


def _lay_over(disk: Any, start: int, content: bytes, runs: List[Tuple[int, int]]) -> None:
    """Writes these runs of sectors, (first, length), of the block that begins at `start` of the disk.

    A sector behind the end of the disk is no harm only if it is zero and the disk ends within the
    block: a real disk of VHDs has whole blocks. Else the write fails there, zeros too, when what
    fits is written (impl.ml serve_vhd_to_raw writes to a device of the disk's size).
    """
    inside = max(0, min(len(content), disk.size - start))
    is_whole = runs == [(0, len(content) // SECTOR)]
    whole = bytearray(content[:inside] if is_whole else disk.read(start, inside))
    changed = set()     # type: Set[int]
    past_the_end = False
    for first, count in runs:
        begin, end = first * SECTOR, (first + count) * SECTOR
        if begin < inside:
            whole[begin:min(end, inside)] = content[begin:min(end, inside)]
            changed.update(range(begin // MIB, (min(end, inside) + MIB - 1) // MIB))
        if end > inside and (not inside or content[max(begin, inside):end].strip(b'\0')):
            past_the_end = True
            break
    for number in sorted(changed):
        disk.write(start + number * MIB, bytes(whole[number * MIB:(number + 1) * MIB]))
    if past_the_end:
        raise BadVhd('data behind the end of the disk')


def _assert_sound(block: bytes, cookie: bytes, checksum_at: int) -> None:
    """A footer or a header begins with its cookie and bears its checksum."""
    stated, = struct.unpack_from('>I', block, checksum_at)
    if block[:8] != cookie or stated != _vhd_checksum(block[:checksum_at] + bytes(4) + block[checksum_at + 4:]):
        raise BadVhd('no VHD, or a damaged one')


def _set_bits(bitmap: bytes, count: int) -> Iterator[Tuple[int, int]]:
    """Runs of ones, as (first, length)."""
    if bitmap[:count // 8] == b'\xff' * (count // 8):
        yield 0, count
        return
    first = None        # type: Optional[int]
    for bit in range(count):
        if bitmap[bit // 8] & (0x80 >> bit % 8):
            if first is None:
                first = bit
        elif first is not None:
            yield first, bit - first
            first = None
    if first is not None:
        yield first, count - first


# --- ova.xml ------------------------------------------------------------------------------------

Exported = Dict[str, List[Tuple[str, Dict[str, Any]]]]


def ova_document(version: Dict[str, str], objects: Iterable[Tuple[str, str, Dict[str, Any]]]
                 ) -> bytes:
    """ova.xml of (class, id, record) triples; one line, no prolog."""
    return xml_value({
        'version': version,
        'objects': [{'class': cls, 'id': ident, 'snapshot': record}
                    for cls, ident, record in objects]}).encode('utf-8')


def read_ova(text: bytes) -> Tuple[Dict[str, str], List[Tuple[str, str, Dict[str, Any]]]]:
    """The version struct and the (class, id, record) triples of an ova.xml; raises BadXml."""
    document = value_of_xml(text)
    try:
        return document['version'], [(one['class'], one['id'], one['snapshot'])
                                     for one in document['objects']]
    except (KeyError, TypeError) as error:
        raise BadXml('missing %s' % error)
