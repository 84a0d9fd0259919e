"""Tests of the streaming section: made images, real samples, damage of every kind, and unlucky pipes."""

import contextlib
import gzip
import hashlib
import io
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import VmBackup as stream
from support.others import Vhd
from support.wire import eventually
from VmBackup import VerificationError

HERE = os.path.dirname(os.path.abspath(__file__))
REAL = os.path.join(os.path.dirname(HERE), "conformance", "recorded", "files")
MIB = 1 << 20
SLOW = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


# ---- makers ----------------------------------------------------------------------------------------------------------

def header(name, size, magic=b"", typeflag=b"\0", mode=0o400):
    block = bytearray(512)
    block[:len(name)] = name.encode()
    block[100:108] = b"%07o\0" % mode
    block[108:124] = b"0000000\0" * 2
    block[124:136] = b"%011o\0" % size
    block[136:148] = b"%011o\0" % 0
    block[156:157] = typeflag
    block[257:257 + len(magic)] = magic
    block[148:156] = b" " * 8
    block[148:156] = b"%07o\0" % sum(block)
    return bytes(block)


def member(name, body, **kind):
    return header(name, len(body), **kind) + body + bytes(-len(body) % 512)


def xml(value):
    if isinstance(value, dict):
        inside = "".join("<member><name>%s</name>%s</member>" % (k, xml(v)) for k, v in value.items())
        return "<value><struct>%s</struct></value>" % inside
    if isinstance(value, list):
        return "<value><array><data>%s</data></array></value>" % "".join(map(xml, value))
    if isinstance(value, bool):
        return "<value><boolean>%d</boolean></value>" % value
    return "<value>%s</value>" % str(value).replace("&", "&amp;").replace("<", "&lt;")


def ova(disks, cd=False, suspended=None):
    def entry(kind, key, record):
        return {"class": kind, "id": key, "snapshot": record}
    objects = [entry("VM", "Ref:1", {"power_state": "Suspended" if suspended else "Halted",
                                     "suspend_VDI": suspended or "OpaqueRef:NULL"})]
    for n, (key, size) in enumerate(disks.items()):
        if key != suspended:
            objects.append(entry("VBD", "Ref:7%d" % n, {"VDI": key, "type": "Disk", "empty": False}))
        objects.append(entry("VDI", key, {"uuid": "uuid-" + key, "virtual_size": size, "SR": "Ref:2"}))
    if cd:
        objects.append(entry("VBD", "Ref:800", {"VDI": "Ref:801", "type": "CD", "empty": False}))
        objects.append(entry("VDI", "Ref:801", {"uuid": "iso", "virtual_size": 5, "SR": "Ref:3"}))
        objects.append(entry("VBD", "Ref:802", {"VDI": "Ref:801", "type": "Disk", "empty": False}))
        objects.append(entry("SR", "Ref:3", {"content_type": "iso"}))
    objects.append(entry("SR", "Ref:2", {"content_type": "user"}))
    return xml({"version": {"export_vsn": 2}, "objects": objects}).encode()


def xxh(data):
    return hashed(stream.block_hasher(), data).upper()


def hashed(new, data):
    hasher = new()
    hasher.update(memoryview(data))
    return hasher.hexdigest()


def block(disk, number, data, kind="xxhash"):
    name = "%s/%08d" % (disk, number)
    digest = xxh(data) if kind == "xxhash" else hashlib.sha1(data).hexdigest()
    return member(name, data) + member(name + "." + kind, digest.encode())


def content(seed, size=MIB):
    return (hashlib.sha256(str(seed).encode()).digest() * (size // 32 + 1))[:size]


END = bytes(1024)


def small_xva(kind="xxhash"):
    """Two disks: one of 1 block of 700 bytes, one of 2.5 MiB and a bit with its middle left out and a keep-alive."""
    sizes = {"Ref:10": 700, "Ref:2": 3 * MIB + 512}
    parts = [member("ova.xml", ova(sizes, cd=True)), block("Ref:10", 0, content(1, 700), kind),
             block("Ref:2", 0, content(2), kind), block("Ref:2", 2, b"", kind), block("Ref:2", 3, content(3), kind),
             block("Ref:2", 4, content(4, 512), kind), END]
    return parts


def small_vhd(size=10 * MIB, present=(0, 2), block_bytes=2 * MIB):
    def summed(data, at):
        data[at:at + 4] = struct.pack(">I", ~sum(data) & 0xFFFFFFFF)
        return bytes(data)
    footer = bytearray(512)
    footer[:24] = b"conectix" + struct.pack(">IIQ", 2, 0x10000, 512)
    footer[40:56] = struct.pack(">QQ", size, size)
    footer[60:64] = struct.pack(">I", 3)
    footer = summed(footer, 64)
    entries = -(-size // block_bytes)
    head = bytearray(1024)
    head[:36] = b"cxsparse" + struct.pack(">QQIII", 2 ** 64 - 1, 2048, 0x10000, entries, block_bytes)
    head = summed(head, 36)
    first = 4 + -(-entries * 4 // 512)
    step = block_bytes // 512 + 1
    bat = [first + present.index(n) * step if n in present else 0xFFFFFFFF for n in range(entries)]
    bat = struct.pack(">%dI" % entries, *bat)
    body = b"".join(b"\xff" * 512 + content(n, block_bytes) for n in present)
    return footer + head + bytes(512) + bat + b"\xff" * (-len(bat) % 512) + body + footer


def xva_check(expected=None, blocks=None, holds_disks=True):
    return stream.Check(stream.check_xva, blocks, expected=expected, holds_disks=holds_disks)


def vhd_check(size=None, blocks=None):
    return stream.Check(stream.check_vhd, blocks, virtual_size=size)


def raw_check(size=None, blocks=None):
    return stream.Check(stream.check_raw, blocks, virtual_size=size)


def run(check, data, step=MIB):
    reader = reader_of(data, step)
    check.read(reader)
    check.close()
    assert reader.position == len(data)
    return check.report


def reader_of(data, step=MIB):
    view = memoryview(bytearray(data))
    return stream.Reader(view[at:at + step] for at in range(0, len(data), step))


def real(name):
    with open(os.path.join(REAL, name), "rb") as file:
        data = file.read()
    return gzip.decompress(data) if name.endswith(".gz") else data


def read_blocks(file):
    """The recorded blocks in the image's order, one at a time: there may be millions."""
    number = 0
    for line in iter(lambda: file.readline(stream.LONGEST_LINE_BYTES), b""):
        number += 1
        match = stream.BLOCK_LINE.fullmatch(line)
        if match:
            yield match.group("disk").decode(), int(match.group("number")), match.group("digest").decode()
        elif not line.startswith(b"#"):
            raise VerificationError("blocks:{}: not a block: {}".format(number, stream.excerpt(line)))


# ---- digests ---------------------------------------------------------------------------------------------------------

class Recorder:
    """The lines in a file of the test's."""

    def __init__(self, file):
        self.line, self.end, self.close = file.write, file.flush, lambda: None


HASHERS = [stream.CtypesXxh64.load, stream.module_xxh64]


@pytest.mark.parametrize("load", HASHERS)
def test_every_xxh64_knows_the_known_vectors(load):
    new = load()
    for message, digest in stream.XXH64_VECTORS:
        assert stream._digest_in_two(new, message) == digest
    assert hashed(new, b"") == "ef46db3751d8e999"
    assert hashed(new, b"abc") == "44bc2cf5ad770999"


@SLOW
@given(st.binary(max_size=40000), st.integers(0, 40000))
def test_all_xxh64_agree_in_pieces_too(message, cut):
    digests = set()
    for load in HASHERS:
        new = load()
        for data in (message, bytearray(message)):
            hasher = new()
            hasher.update(memoryview(data)[:cut])
            hasher.update(memoryview(data)[cut:])
            digests.add(hasher.hexdigest())
    assert len(digests) == 1


def test_a_wrong_library_is_not_used(monkeypatch):
    class Wrong(stream.CtypesXxh64):
        def hexdigest(self):
            return "0" * 16
    stream.block_hasher.cache_clear()
    monkeypatch.setattr(stream, "CtypesXxh64", Wrong)
    assert stream.block_hasher() is stream.module_xxh64()
    stream.block_hasher.cache_clear()
    monkeypatch.setitem(sys.modules, "xxhash", None)
    assert stream.block_hasher() is None
    monkeypatch.undo()
    stream.block_hasher.cache_clear()
    assert stream.block_hasher() is not None


# ---- XVA -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("step", [513, 70000, MIB, 5 * MIB])
def test_the_real_archive_passes(step):
    data = real("PROD-web.xva.gz")
    lines = io.BytesIO()
    expected = {"c65527d7-4866-4132-8055-de504b336629": 10485760, "36f00ab2-45d4-44cb-afd2-07e7db6c9cef": 6291456}
    check = xva_check(expected, Recorder(lines))
    report = run(check, data, step)
    assert [(d.id, d.blocks, d.stored_bytes) for d in report.disks] == [("Ref:64", 5, 5 * MIB), ("Ref:67", 3, 3 * MIB)]
    assert (report.digest_kind, report.digests_checked) == ("xxh64", True)
    assert sum(d.virtual_size for d in report.disks) == 16777216 and report.ova_xml.startswith(b"<value>") and len(report.ova_xml) == 30238
    assert check.ova["version"]["product_version"] == "8.3.0"
    lines.seek(0)
    assert [b[:2] for b in read_blocks(lines)][:5] == [("Ref:64", n) for n in (0, 1, 2, 8, 9)]


@pytest.mark.parametrize("member", ["store/PROD-web/backup-2026-11-23-(19:50:42)/PROD-web.xva"])
def test_the_older_programs_archive_passes(member):
    import tarfile
    with tarfile.open(os.path.join(REAL, "old-store.tar.gz")) as store:
        check = xva_check()
        data = store.extractfile(member).read()
        assert run(check, data).digests_checked
        metadata = store.extractfile("store/PROD-web/backup-2026-11-23-(19:50:42)/vm-metadata.xml").read()
        assert stream.ova_objects(stream.parse_ova(metadata), "VM")


def test_a_metadata_export_passes_as_one_only():
    data = real("PROD-web-metadata.xva")
    assert run(xva_check(holds_disks=False), data).disks == ()
    with pytest.raises(VerificationError, match="incomplete"):
        run(xva_check(), data)


@pytest.mark.parametrize("kind", ["xxhash", "checksum"])
@pytest.mark.parametrize("step", [7, 512, 4096, 100003, MIB])
def test_a_made_archive_passes_in_pieces_of_any_size(kind, step):
    report = run(xva_check({"uuid-Ref:10": 700}), b"".join(small_xva(kind)), step)
    assert [d.blocks for d in report.disks] == [1, 4]
    assert report.disks[1].stored_bytes == 2 * MIB + 512
    assert report.digests_checked is True
    assert report.digest_kind == {"xxhash": "xxh64", "checksum": "sha1"}[kind]


def test_without_any_xxh64_the_report_says_so(monkeypatch):
    data = b"".join(small_xva())
    monkeypatch.setattr(stream, "block_hasher", lambda: None)
    assert run(xva_check(), data).digests_checked is False
    assert run(xva_check(), b"".join(small_xva("checksum"))).digests_checked is True


def test_other_tar_dialects_and_a_suspended_vm_pass():
    ova_xml = ova({"Ref:5": MIB}, suspended="Ref:5")
    name = "Ref:5/00000000"
    kind = dict(magic=b"ustar\x0000", typeflag=b"0", mode=0)
    data = member("ova.xml", ova_xml, **kind) + member(name, content(1), **kind) + member(
        name + ".xxhash", xxh(content(1)).encode(), **kind) + END
    assert [d.blocks for d in run(xva_check({"uuid-Ref:5": MIB}), data).disks] == [1]
    with pytest.raises(VerificationError, match="uuid-Ref:5"):
        run(xva_check(), member("ova.xml", ova_xml) + END)


def test_a_zero_block_in_the_middle_and_a_disk_of_no_size_are_legal():
    data = member("ova.xml", ova({"Ref:1": 3 * MIB, "Ref:3": 0})) + b"".join(
        block("Ref:1", n, bytes(MIB)) for n in range(3)) + END
    assert [d.blocks for d in run(xva_check(), data).disks] == [3, 0]


A, B = content("a"), content("b")


def sized(size, *blocks):
    return member("ova.xml", ova({"Ref:1": size, "Ref:3": MIB})) + b"".join(blocks) + block("Ref:3", 0, B) + END


LAST = block("Ref:3", 0, B)
#: What makes each of them: they are large, and every worker imports this file.
WRONG_ARCHIVES = {
    "first block missing": lambda: sized(2 * MIB, block("Ref:1", 1, A)),
    "last block missing": lambda: sized(2 * MIB, block("Ref:1", 0, A)),
    "last block missing, keep-alive there": lambda: sized(2 * MIB, block("Ref:1", 0, A), block("Ref:1", 1, b"")),
    "keep-alive beyond the end": lambda: sized(2 * MIB, block("Ref:1", 0, A), block("Ref:1", 1, A), block("Ref:1", 2, b"")),
    "keep-alive first": lambda: sized(2 * MIB, block("Ref:1", 0, b""), block("Ref:1", 1, A), block("Ref:1", 2, A)),
    "a block too many": lambda: sized(MIB, block("Ref:1", 0, A), block("Ref:1", 1, A)),
    "a block twice": lambda: sized(2 * MIB, block("Ref:1", 0, A), block("Ref:1", 0, A)),
    "blocks swapped": lambda: sized(2 * MIB, block("Ref:1", 1, A), block("Ref:1", 0, A)),
    "short block in the middle": lambda: sized(3 * MIB, block("Ref:1", 0, A), block("Ref:1", 1, A[:512]), block("Ref:1", 2, A)),
    "big block": lambda: sized(2 * MIB, block("Ref:1", 0, A + A)),
    "a lost block that keep-alive hides": lambda: sized(4 * MIB, block("Ref:1", 0, A), block("Ref:1", 2, b""), block("Ref:1", 3, A)),
    "disk missing": lambda: member("ova.xml", ova({"Ref:1": MIB, "Ref:3": MIB})) + block("Ref:1", 0, A) + END,
    "disks out of order": lambda: member("ova.xml", ova({"Ref:1": MIB, "Ref:3": MIB})) + LAST + block("Ref:1", 0, A) + END,
    "disk comes back": lambda: sized(2 * MIB, block("Ref:1", 0, A), LAST, block("Ref:1", 1, A)),
    "foreign file": lambda: sized(MIB, block("Ref:1", 0, A), member("readme", b"hello")),
    "foreign disk": lambda: sized(MIB, block("Ref:1", 0, A), block("Ref:2", 0, A)),
    "no digest": lambda: sized(MIB, member("Ref:1/00000000", A)),
    "digest of another": lambda: sized(MIB, member("Ref:1/00000000", A), member("Ref:1/00000001.xxhash", xxh(A).encode())),
    "digest kind changes": lambda: sized(2 * MIB, block("Ref:1", 0, A), block("Ref:1", 1, A, "checksum")),
    "wrong digest": lambda: sized(MIB, member("Ref:1/00000000", A), member("Ref:1/00000000.xxhash", xxh(B).encode())),
    "lower-case digest": lambda: sized(MIB, member("Ref:1/00000000", A), member("Ref:1/00000000.xxhash", xxh(A).lower().encode())),
    "long digest": lambda: sized(MIB, member("Ref:1/00000000", A), member("Ref:1/00000000.xxhash", xxh(A).encode() + b"\n")),
    "directory": lambda: sized(MIB, member("Ref:1/00000000", A, typeflag=b"5")),
    "no ova": lambda: block("Ref:1", 0, A) + END,
    "empty": lambda: b"",
    "only the end": lambda: END,
    "one end block": lambda: sized(MIB, block("Ref:1", 0, A))[:-512],
    "three end blocks": lambda: sized(MIB, block("Ref:1", 0, A)) + bytes(512),
    "http text at the end": lambda: sized(MIB, block("Ref:1", 0, A)) + b"HTTP/1.0 500 Internal Error\r\n",
    "http text instead": lambda: b"HTTP/1.0 500 Internal Error\r\n" * 40,
    "two archives": lambda: sized(MIB, block("Ref:1", 0, A)) * 2,
    "huge ova": lambda: header("ova.xml", 8 ** 11 - 1) + bytes(512),
    "no disk id": lambda: member("ova.xml", ova({"Ref 1\n": MIB})) + END,
}


@pytest.mark.parametrize("what", sorted(WRONG_ARCHIVES))
def test_a_wrong_archive_is_refused_in_one_sentence(what):
    with pytest.raises(VerificationError) as caught:
        run(xva_check(), WRONG_ARCHIVES[what]())
    sentence = str(caught.value)
    print(sentence)
    assert "\n" not in sentence and 20 < len(sentence) < 300 and sentence.isascii() if hasattr(str, "isascii") else True


def test_the_pools_own_records_must_agree():
    data = b"".join(small_xva())
    for expected, text in (({"gone": 5}, "gone"), ({"uuid-Ref:2": 3 * MIB}, str(3 * MIB))):
        with pytest.raises(VerificationError, match=text):
            run(xva_check(expected), data)


PARTS = small_xva()
ARCHIVE = b"".join(PARTS)
OVA_END = 512 + len(ova({"Ref:10": 700, "Ref:2": 3 * MIB + 512}, cd=True))


@SLOW
@given(st.one_of(st.integers(0, len(ARCHIVE) - 1), st.integers(len(PARTS[0]), len(PARTS[0]) + 4096),
                 st.integers(len(ARCHIVE) - 6000, len(ARCHIVE) - 1)), st.integers(0, 7))
def test_any_flipped_bit_is_found(at, bit):
    if 512 <= at < OVA_END:
        return                                      # ova.xml has no digest of its own: see below
    damaged = bytearray(ARCHIVE)
    damaged[at] ^= 1 << bit
    try:
        run(xva_check(), bytes(damaged))
    except VerificationError:
        return
    # What may pass: the NUL that ends a number, become a blank.
    assert damaged[at] == 0x20 and ARCHIVE[at] == 0


@SLOW
@given(st.integers(512, OVA_END - 1), st.integers(0, 7))
def test_a_flipped_bit_in_ova_xml_gives_no_other_exception(at, bit):
    damaged = bytearray(ARCHIVE)
    damaged[at] ^= 1 << bit
    try:
        run(xva_check(), bytes(damaged))
    except VerificationError:
        pass


@SLOW
@given(st.one_of(st.integers(0, len(ARCHIVE) - 1), st.integers(len(ARCHIVE) - 5000, len(ARCHIVE) - 1)))
def test_any_truncation_is_found(length):
    with pytest.raises(VerificationError):
        run(xva_check(), ARCHIVE[:length])


@SLOW
@given(st.binary(min_size=1, max_size=3000))
def test_anything_appended_is_found(more):
    with pytest.raises(VerificationError, match="should end at byte"):
        run(xva_check(), ARCHIVE + more)


@pytest.mark.parametrize("first", range(1, 6))
@pytest.mark.parametrize("second", range(1, 6))
def test_any_two_blocks_swapped_are_found(first, second):
    if first < second:
        parts = list(PARTS)
        parts[first], parts[second] = parts[second], parts[first]
        with pytest.raises(VerificationError):
            run(xva_check(), b"".join(parts))


@SLOW
@given(st.binary(max_size=5000), st.sampled_from([b"", ARCHIVE[:512], ARCHIVE[:len(PARTS[0])], header("ova.xml", 600),
                                                 small_vhd()[:512], small_vhd()[:1536], small_vhd()[:2048]]))
def test_random_bytes_are_refused_without_a_traceback(junk, start):
    for check in (xva_check(), vhd_check(), raw_check(7000)):
        with pytest.raises(VerificationError):
            run(check, start + junk, 700)


VALUES = st.recursive(st.text(alphabet="<&]>x\u20ac 1", max_size=5) | st.booleans(),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                          st.sampled_from(["class", "id", "snapshot", "VDI", "type", "uuid", "virtual_size", "SR"]),
                          inner, max_size=4), max_leaves=12)


@SLOW
@given(VALUES)
def test_any_xml_rpc_value_reads_back(value):
    ova_xml = xml({"version": {}, "objects": [value], "x": value}).encode()
    assert stream.parse_ova(ova_xml)["x"] == value
    try:
        stream.exported_disks(stream.parse_ova(ova_xml))
    except VerificationError:
        pass


@SLOW
@given(st.sampled_from(["VM", "VBD", "VDI", "SR"]), st.dictionaries(
    st.sampled_from(["VDI", "type", "uuid", "virtual_size", "SR", "power_state", "suspend_VDI"]), VALUES))
def test_records_of_any_shape_give_no_other_exception(kind, record):
    objects = [{"class": kind, "id": "Ref:9", "snapshot": record},
               {"class": "VBD", "id": "Ref:8", "snapshot": {"VDI": "Ref:9", "type": "Disk"}}]
    try:
        stream.exported_disks(stream.parse_ova(xml({"version": {}, "objects": objects}).encode()))
    except VerificationError:
        pass


GOOD_OVA = ova({"Ref:1": MIB})


@pytest.mark.parametrize("text", [
    b"", b"<", b"<value>", b"hello", b"<value/>", b"<value></value>", b"<value><struct></struct></value>",
    b"<value><int>1</int></value>", GOOD_OVA + GOOD_OVA, GOOD_OVA[:-8], b"<!DOCTYPE x [<!ENTITY a 'b'>]>" + GOOD_OVA,
    b"<struct></struct>", b"<member></member>", b"<name>x</name>", b"<params></params>", b"<fault><value/></fault>",
    b"<value><array></array></value>", b"<value><boolean>7</boolean></value>", b"<value><base64>a</base64></value>",
    b"\xff\xfe" + GOOD_OVA, b"<?xml version='1.0' encoding='nonsense'?>" + GOOD_OVA[:-9], b"<value>\x00</value>",
    b"<value>" * 100000, b"<value><array><data>" * 50000, b"<value><struct><member><name>a</name>" * 1000,
    b"<value><double>x</double></value>", b"<value><nil/></value>", b"<methodCall></methodCall>"])
def test_what_is_no_ova_xml_is_refused(text):
    with pytest.raises(VerificationError):
        stream.parse_ova(text)


@SLOW
@given(st.lists(st.sampled_from(["<value>", "</value>", "<struct>", "</struct>", "<member>", "</member>", "<name>", "</name>",
                                 "<array>", "</array>", "<data>", "</data>", "<int>", "</int>", "1", "<params>", "</params>",
                                 "<fault>", "</fault>", "<dateTime.iso8601>", "</dateTime.iso8601>", "<methodName>",
                                 "</methodName>", "<nil/>", "<bigdecimal>", "</bigdecimal>"]), max_size=12))
def test_xml_in_any_disorder_is_refused_without_a_traceback(words):
    text = "<x>" + "".join(words) + "</x>"
    for text in (text, "".join(words)):
        try:
            stream.exported_disks(stream.parse_ova(text.encode()))
        except VerificationError:
            pass


# ---- VHD and raw -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("step", [100, 65536, MIB])
def test_the_real_vhd_passes(step):
    data = real("PROD-web.vhd.gz")
    report = run(vhd_check(10485760), data, step)
    assert (report.disks[0].blocks, report.disks[0].virtual_size) == (3, 10485760)


def test_vhds_of_other_sizes_pass():
    assert run(vhd_check(), small_vhd()).disks[0].stored_bytes == 4 * MIB
    assert run(vhd_check(0), small_vhd(0, ())).disks[0].blocks == 0
    assert run(vhd_check(9 * MIB + 512), small_vhd()).disks[0].virtual_size == 10 * MIB      # a raw source, rounded up
    assert run(vhd_check(), small_vhd(512 * 1024 * MIB, (0, 131072))).disks[0].blocks == 2
    with pytest.raises(VerificationError, match="the pool says"):
        run(vhd_check(8 * MIB), small_vhd())


VHD = small_vhd(3 * MIB, (1,))
VHD_BITMAP = 2048 + 512


@SLOW
@given(st.one_of(st.integers(0, VHD_BITMAP + 511), st.integers(len(VHD) - 512, len(VHD) - 1)), st.integers(0, 7))
def test_any_flipped_bit_of_a_vhds_structure_is_found(at, bit):
    damaged = bytearray(VHD)
    damaged[at] ^= 1 << bit
    with pytest.raises(VerificationError):
        run(vhd_check(3 * MIB), bytes(damaged))


@SLOW
@given(st.one_of(st.integers(0, len(VHD) - 1), st.integers(0, 4000)), st.binary(min_size=1, max_size=600))
def test_any_truncated_or_longer_vhd_is_found(length, more):
    for data in (VHD[:length], VHD + more, VHD[:length] + b"HTTP/1.0 500 Internal Error\r\n" + more):
        if data != VHD:
            with pytest.raises(VerificationError):
                run(vhd_check(3 * MIB), data)


def test_what_is_taken_in_one_piece_may_span_more_than_all_buffers():
    data = b"".join(struct.pack(">Q", number) * 128 for number in range(30 * 1024))
    found = []

    class Taker(stream.Consumer):
        name = "taker"

        def read(self, reader):
            found.append(reader.take(len(data) - 5, "all"))

    stream.pump([stream.Flow(pipe_with(data), [Taker()])], ignore)
    assert found == [data[:-5]]


def test_a_failed_export_is_told_by_the_servers_words():
    words = real("vdi-export-failed-partial.vhd")
    for start in (b"", VHD[:100000], VHD[:2048]):
        for step in (50, MIB):
            with pytest.raises(VerificationError, match="the server says: 'HTTP 500") as caught:
                run(vhd_check(), start + words, step)
    print(caught.value)
    with pytest.raises(VerificationError, match="goes on with 'HTTP/1.0 500 Internal Error"):
        run(vhd_check(), VHD + words)
    with pytest.raises(VerificationError, match="the server says: 'HTTP 500"):
        run(raw_check(MIB), bytes(1000) + words)


@SLOW
@given(st.integers(0, 3 * MIB), st.integers(0, 3 * MIB), st.sampled_from([1000, 4096, MIB, 2 * MIB]))
def test_raw_is_exactly_its_size(size, other, step):
    lines = io.BytesIO()
    assert run(raw_check(size, Recorder(lines)), bytes(size), step).disks[0].virtual_size == size
    assert lines.getvalue().count(b"\n") == 1 + -(-size // MIB)
    assert run(raw_check(None), bytes(size), step).disks[0].virtual_size == size
    if size != other:
        with pytest.raises(VerificationError):
            run(raw_check(size), bytes(other), step)


# ---- blocks ----------------------------------------------------------------------------------------------------------

def recorded(check_type, data, step=MIB):
    lines = io.BytesIO()
    run(check_type(blocks=Recorder(lines)), data, step)
    return lines.getvalue()


def compare(check_type, data, lines):
    run(check_type(blocks=stream.BlockComparer(io.BytesIO(lines))), data)


@pytest.mark.parametrize("check_type,data", [(xva_check, ARCHIVE), (vhd_check, small_vhd()),
                                             (raw_check, content(1, 2 * MIB + 5))])
def test_recorded_blocks_compare_equal_and_any_lost_line_is_found(check_type, data):
    lines = recorded(check_type, data)
    assert lines == recorded(check_type, data, 70000)
    compare(check_type, data, lines)
    rows = lines.splitlines(True)
    for n in range(len(rows)):
        for others in (rows[:n] + rows[n + 1:], rows[:n] + [rows[n]] + rows[n:], rows[:n] + [b"junk\n"] + rows[n + 1:]):
            with pytest.raises(VerificationError):
                compare(check_type, data, b"".join(others))


def test_a_block_lost_in_the_middle_is_found_by_its_record():
    lines = recorded(xva_check, b"".join(
        [member("ova.xml", ova({"Ref:1": 3 * MIB}))] + [block("Ref:1", n, content(n)) for n in range(3)] + [END]))
    lost = b"".join(
        [member("ova.xml", ova({"Ref:1": 3 * MIB}))] + [block("Ref:1", n, content(n)) for n in (0, 2)] + [END])
    run(xva_check(), lost)
    with pytest.raises(VerificationError, match="block 1 of disk Ref:1 was recorded at the export, the image has block 2"):
        compare(xva_check, lost, lines)


def test_the_record_is_read_as_a_stream():
    lines = recorded(raw_check, content(1, 2 * MIB + 5))
    found = list(read_blocks(io.BytesIO(lines)))
    assert found[0] == ("image", 0, "%08x" % zlib.crc32(content(1, 2 * MIB + 5)[:MIB])) and len(found) == 3
    for junk in (b"x\n", b"a 1\n", b"a 1 12345678", b"\n", b"x" * 10000, b"a -1 12345678\n", b"\xff 1 12345678\n"):
        with pytest.raises(VerificationError):
            list(read_blocks(io.BytesIO(lines + junk)))


# ---- gzip ------------------------------------------------------------------------------------------------------------

def read_back(data, check, compression="none", tmp="/tmp"):
    path = os.path.join(tmp, "stream-test-%d" % os.getpid())
    with open(path, "wb") as file:
        file.write(data)
    stored, plain = stream.Digest(), stream.Digest()
    fd = os.open(path, os.O_RDONLY)
    os.unlink(path)
    with contextlib.ExitStack() as stack:
        stream.pump(stream.reading_flows(stack, fd, compression, [stored], [plain, check]), lambda progress: None)
    assert stored.hexdigest() == hashlib.sha256(data).hexdigest()
    return plain.hexdigest(), check.report


def test_an_image_is_read_back_plain_gzip_and_zstd(monkeypatch):
    digest = hashlib.sha256(ARCHIVE).hexdigest()
    assert read_back(ARCHIVE, xva_check())[0] == digest
    assert read_back(gzip.compress(ARCHIVE), xva_check(), "gzip")[0] == digest
    two = gzip.compress(ARCHIVE[:5000]) + gzip.compress(ARCHIVE[5000:])
    assert read_back(two, xva_check(), "gzip")[0] == digest
    for name in ("PROD-web.xva.gz", "PROD-web.xva.zst"):
        with open(os.path.join(REAL, name), "rb") as file:
            data = file.read()
        monkeypatch.setattr(stream, "libzstd", lambda: None)            # by the program
        assert read_back(data, xva_check(), "zstd" if name.endswith("zst") else "gzip")[1].digests_checked


ZIPPED = gzip.compress(ARCHIVE)


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(st.integers(0, len(ZIPPED) - 1), st.binary(min_size=1, max_size=40))
def test_gzip_cut_short_or_longer_is_found(length, more):
    for data in (ZIPPED[:length], ZIPPED + more, ZIPPED + bytes(9) + more + b"x"):
        if data.rstrip(b"\0") != ZIPPED.rstrip(b"\0"):                      # as gzip, zeros behind it are passed over
            with pytest.raises(VerificationError, match="gzip"):
                read_back(data, xva_check(), "gzip")


def test_zeros_behind_gzip_are_passed_over():
    for zeros in (1, 511, 3 * MIB):
        assert read_back(ZIPPED + bytes(zeros), xva_check(), "gzip")[1].digests_checked


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(st.integers(10, len(ZIPPED) - 1), st.integers(0, 7))
def test_any_flipped_bit_in_gzip_is_found(at, bit):
    data = bytearray(ZIPPED)
    data[at] ^= 1 << bit
    with pytest.raises(VerificationError):
        read_back(bytes(data), xva_check(), "gzip")


def test_a_gzip_bomb_of_zeros_takes_little_memory():
    size = 300 * MIB
    squeezer = zlib.compressobj(9, zlib.DEFLATED, 31)
    data = b"".join([squeezer.compress(bytes(MIB)) for _ in range(300)] + [squeezer.flush()])
    assert read_back(data, raw_check(size), "gzip")[1].disks[0].virtual_size == size


# ---- zstd by the host's library --------------------------------------------------------------------------------------

needs_library = pytest.mark.skipif(not stream.libzstd(), reason="this machine has no libzstd.so.1, which is never required")


def squeezed(data, *options):
    return subprocess.run(["zstd", "-q", "-c"] + list(options), input=data, stdout=subprocess.PIPE, check=True).stdout


@needs_library
@pytest.mark.needs_zstd
def test_zstd_is_decompressed_whatever_its_frames():
    digest = hashlib.sha256(ARCHIVE).hexdigest()
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00junk"
    for data in (squeezed(ARCHIVE), squeezed(ARCHIVE, "-T0", "-19"), squeezed(ARCHIVE[:5000]) + squeezed(ARCHIVE[5000:]),
                 skippable + squeezed(ARCHIVE) + skippable):
        assert read_back(data, xva_check(), "zstd")[0] == digest
    for size in (0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB, 64 * MIB):
        assert read_back(squeezed(bytes(size)), raw_check(size), "zstd")[1].disks[0].virtual_size == size


@needs_library
@pytest.mark.needs_zstd
@pytest.mark.parametrize("bend", [lambda data: b"", lambda data: data[:-1], lambda data: data[:len(data) // 2], lambda data: data + b"x",
                                  lambda data: data + b"HTTP/1.0 500 Internal Error", lambda data: b"x" + data, lambda data: ARCHIVE,
                                  lambda data: data[:len(data) // 2] + b"\0" + data[len(data) // 2 + 1:]])
def test_zstd_that_is_not_whole_is_found(bend):
    with pytest.raises(stream.CompressionDamaged, match="zstd"):
        read_back(bend(squeezed(ARCHIVE)), raw_check(), "zstd")


# ---- the pump --------------------------------------------------------------------------------------------------------

def pipe_with(data, hold=None):
    """A pipe into which a thread writes `data`, and which stays open until `hold` is set."""
    read_fd, write_fd = os.pipe()

    def write():
        view = memoryview(data)
        try:
            while len(view):
                view = view[os.write(write_fd, view):]
            if hold is not None:
                hold.wait()
        except BrokenPipeError:
            pass
        os.close(write_fd)
    threading.Thread(target=write, daemon=True).start()
    return read_fd


class Collector(stream.Consumer):
    def __init__(self, delay=0.0, fail_after=None, stuck=None, fail_at_end=None):
        super().__init__("collector")
        self.parts, self.delay, self.fail_after, self.stuck, self.fail_at_end = [], delay, fail_after, stuck, fail_at_end
        self.finished = self.closed = False

    def read(self, reader):
        for view in reader:
            if self.fail_after is not None and len(self.parts) >= self.fail_after:
                raise OSError(28, "No space left on device")
            if self.stuck:
                self.stuck.wait()
            time.sleep(self.delay)
            self.parts.append(bytes(view))
        if self.fail_at_end:
            raise self.fail_at_end
        self.finished = True

    def close(self):
        self.closed = True


def ignore(progress):
    pass


def running(*command):
    """A program, what feeds it, and the descriptor of what it gives."""
    program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    feeder, output_fd = stream.Consumer("compressor", stream.write_pipe, os.dup(program.stdin.fileno())), os.dup(program.stdout.fileno())
    program.stdin.close()
    program.stdout.close()
    return program, feeder, output_fd


def open_fds():
    return len(os.listdir("/proc/self/fd"))


def test_every_consumer_sees_every_byte_in_order():
    data = os.urandom(40 * MIB + 12345)
    before, threads = open_fds(), set(threading.enumerate())
    collectors = [Collector(), Collector(delay=0.002), Collector()]
    assert stream.pump([stream.Flow(pipe_with(data), collectors)], ignore) == len(data)
    for collector in collectors:
        assert b"".join(collector.parts) == data and collector.finished and collector.closed
    assert eventually(lambda: open_fds() == before and set(threading.enumerate()) <= threads)


def test_a_source_without_consumers_is_read_to_its_end():
    assert stream.pump([stream.Flow(pipe_with(bytes(40 * MIB)), [])], ignore) == 40 * MIB


def test_an_empty_source_finishes_its_consumers():
    collector = Collector()
    assert stream.pump([stream.Flow(pipe_with(b""), [collector])], ignore) == 0
    assert collector.finished and collector.parts == []


def test_an_export_is_stored_compressed_and_digested(tmp_path):
    gz, feeder, output_fd = running("gzip", "-1c")
    plain, stored, check = stream.Digest(), stream.Digest(), xva_check()
    path = tmp_path / "x.xva.gz"
    writer = stream.Consumer("storage", stream.write_file, os.open(str(path), os.O_CREAT | os.O_WRONLY))
    flows = [stream.Flow(pipe_with(ARCHIVE), [plain, check, feeder]), stream.Flow(output_fd, [stored, writer], "gzip")]
    assert stream.pump(flows, ignore) == len(ARCHIVE)
    assert gz.wait() == 0
    assert gzip.decompress(path.read_bytes()) == ARCHIVE
    assert stored.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert plain.hexdigest() == hashlib.sha256(ARCHIVE).hexdigest() and check.report.digests_checked


def test_a_silent_source_is_told_and_can_be_left():
    hold = threading.Event()
    seen = []

    def on_tick(progress):
        seen.append(progress)
        if progress.quiet_s > 1.5 and progress.bytes_read == 1000:
            raise TimeoutError("stall")
    collector = Collector()
    started = time.time()
    with pytest.raises(TimeoutError):
        stream.pump([stream.Flow(pipe_with(b"x" * 1000, hold), [collector])], on_tick)
    assert 1.5 < time.time() - started < 60
    assert seen[-1].waiting_for == "source" and seen[-1].bytes_read == 1000
    assert b"".join(collector.parts) == b"x" * 1000         # what came was handed on meanwhile
    assert not collector.finished and collector.closed
    hold.set()


def test_storage_that_hangs_is_told_and_can_be_left():
    stuck = threading.Event()
    seen = []

    def on_tick(progress):
        seen.append(progress)
        if len(seen) > 2 and progress.bytes_read == 16 * MIB or len(seen) > 50:
            raise TimeoutError("stall")
    writer = Collector(stuck=stuck)
    writer.name = "storage"
    started = time.time()
    with pytest.raises(TimeoutError):
        stream.pump([stream.Flow(pipe_with(bytes(60 * MIB)), [stream.Digest(), writer])], on_tick)
    assert time.time() - started < 60
    assert seen[-1].waiting_for == "storage" and seen[-1].bytes_read == 16 * MIB
    stuck.set()
    assert eventually(lambda: writer.closed) and not writer.finished and len(writer.parts) <= 1


def test_storage_that_hangs_behind_a_compressor_is_told_too():
    stuck = threading.Event()
    names = []

    def on_tick(progress):
        names.append(progress.waiting_for)
        if len(names) > 3 and names[-1] == "storage" or len(names) > 50:
            raise TimeoutError("stall")
    cat, feeder, output_fd = running("cat")
    writer = Collector(stuck=stuck)
    writer.name = "storage"
    with pytest.raises(TimeoutError):
        stream.pump([stream.Flow(pipe_with(bytes(100 * MIB)), [stream.Digest(), feeder]), stream.Flow(output_fd, [writer])], on_tick)
    assert names[-1] == "storage"
    cat.kill()
    cat.wait()
    stuck.set()


@pytest.mark.parametrize("after", [0, 3])
def test_a_full_disk_arrives_at_once_and_names_what_was_being_done(after):
    hold = threading.Event()
    other = Collector()
    started = time.time()
    with pytest.raises(stream.StorageFull) as caught:
        stream.pump([stream.Flow(pipe_with(bytes(5 * MIB), hold), [other, Collector(fail_after=after)])], ignore, "the export of web")
    assert str(caught.value).startswith("the export of web: no space left") and time.time() - started < 60
    assert other.closed and not other.finished
    hold.set()


def test_a_real_full_disk():
    with pytest.raises(stream.StorageFull):
        stream.pump([stream.Flow(pipe_with(bytes(5 * MIB)),
                                 [stream.Consumer("storage", stream.write_file, os.open("/dev/full", os.O_WRONLY))])], ignore)


def test_what_fails_at_the_end_counts():
    for consumers in ([Collector(fail_at_end=OSError(5, "EIO"))], [Collector(), Collector(fail_at_end=OSError(5, "EIO"))]):
        with pytest.raises(stream.StorageMisbehaved):
            stream.pump([stream.Flow(pipe_with(b"abc"), consumers)], ignore)


def test_the_programs_failure_is_told_before_the_truncated_stream():
    def at_end():
        raise RuntimeError("xe exited 1")
    check = xva_check()
    with pytest.raises(RuntimeError, match="xe exited 1"):
        stream.pump([stream.Flow(pipe_with(ARCHIVE[:99999]), [check], at_end=at_end)], ignore)
    assert check.report is None


def test_a_compressor_that_dies_gets_no_more_and_its_exit_status_is_left_to_tell():
    dead, feeder, output_fd = running("sh", "-c", "head -c 100000 >/dev/null; exit 3")
    collector = Collector()
    stream.pump([stream.Flow(pipe_with(bytes(20 * MIB)), [feeder]), stream.Flow(output_fd, [collector])], ignore)
    assert feeder.result is False and collector.parts == [] and dead.wait() == 3


def test_a_wrong_archive_aborts_the_export_at_once():
    hold = threading.Event()
    with pytest.raises(VerificationError, match="foreign|no block"):
        stream.pump([stream.Flow(pipe_with(WRONG_ARCHIVES["foreign file"]() + bytes(MIB), hold), [xva_check(),
                                                                                           stream.Digest()])], ignore)
    hold.set()


class Reading(stream.Consumer):
    """A consumer that notes what is asked of it besides."""

    def __init__(self, function):
        super().__init__("reading", function)
        self.steps = []

    def salvage(self):
        self.steps.append("salvage")

    def close(self):
        self.steps.append("close")


@given(st.lists(st.integers(1, 50), max_size=30), st.lists(st.integers(0, 60), max_size=30))
def test_a_reader_gives_what_is_asked_for_however_it_comes(lengths, wanted):
    data = os.urandom(sum(lengths))
    views, at = [], 0
    for length in lengths:
        views.append(memoryview(data)[at:at + length])
        at += length
    reader, at = stream.Reader(iter(views), "the file"), 0
    for count in wanted:
        assert reader.position == at
        if at + count > len(data):
            with pytest.raises(VerificationError) as caught:
                reader.take(count, "the middle")
            assert str(caught.value) == "the file ends at byte %d, in the middle" % len(data)
            return
        assert reader.take(count, "the middle") == data[at:at + count]
        at += count
    assert b"".join(bytes(view) for view in reader) == data[at:]
    assert reader.tail == data[-stream.TAIL_BYTES:] and not len(reader.some(1))
    reader.end()


def test_a_consumer_that_has_enough_lets_the_rest_pass_by():
    beginning, collector = Reading(lambda reader: reader.take(1000, "the beginning")), Collector()
    data = os.urandom(40 * MIB)
    assert stream.pump([stream.Flow(pipe_with(data), [beginning, collector])], ignore) == len(data)
    assert beginning.result == data[:1000] and b"".join(collector.parts) == data and beginning.steps == ["close"]


def test_what_is_made_of_a_stream_is_a_stream_again():
    collector, plain = Collector(), Collector()

    def doubled(reader):
        for view in reader:
            yield bytes(view)
            yield b""
            yield bytes(view)
    data = os.urandom(3 * MIB + 5)
    stream.pump([stream.Flow(pipe_with(data), [plain, stream.Flow(doubled, [collector], "twice")])], ignore)
    assert b"".join(plain.parts) == data and sum(map(len, collector.parts)) == 2 * len(data) and collector.finished


def test_damage_of_a_further_flow_is_the_reason_and_not_the_end_that_follows_from_it():
    with pytest.raises(stream.CompressionDamaged):
        stream.pump([stream.Flow(pipe_with(ZIPPED[:5000]), [stream.Digest(), stream.Flow(stream.gunzip, [xva_check()])])],
                    ignore)


def test_damage_that_is_put_up_with_is_noted_and_ends_no_others_work():
    problems, whole, plain = [], Collector(), Collector()
    check = Reading(lambda reader: reader.take(len(ARCHIVE), "the archive"))
    stream.pump([stream.Flow(pipe_with(ZIPPED[:-5]), [whole, stream.Flow(stream.gunzip, [plain, check], "gunzip")])], ignore,
                "reading", problems)
    assert "cut short" in str(problems[0]) and plain.finished and whole.finished
    assert b"".join(whole.parts) == ZIPPED[:-5] and b"".join(plain.parts) == ARCHIVE and check.steps == ["close"]
    problems, check = [], Reading(lambda reader: reader.take(10 * MIB, "the archive"))
    stream.pump([stream.Flow(pipe_with(ARCHIVE), [whole, check])], ignore, "reading", problems)
    assert "in the archive" in str(problems[0]) and check.steps == ["salvage", "close"]
    check = stream.Check(stream.check_vhd, strict=False, is_whole=False)
    with tempfile.TemporaryFile() as image, pytest.raises(stream.UnknownFormat):        # what can't be read at all is no damage
        image.write(Vhd(2 * MIB, {}, ["header", "table"], kind=4).file)
        image.flush()
        stream.pump([stream.Flow(lambda: check.read_file(os.dup(image.fileno())), [])], ignore, "reading", [])


def test_memory_is_bounded():
    code = """
import resource, sys, os
sys.path[:0] = [{!r}, {!r}, {!r}]
import VmBackup as s
import test_stream as t
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
s.pump([s.Flow(t.pipe_with(bytes(1)), [s.Digest()])], t.ignore)
fd = os.open('/dev/zero', os.O_RDONLY)
class Slow(t.Collector):
    def read(self, reader): pass
import subprocess
p = subprocess.Popen(['head', '-c', '300000000', '/dev/zero'], stdout=subprocess.PIPE)
s.pump([s.Flow(os.dup(p.stdout.fileno()), [s.Digest(), Slow(), t.raw_check(300000000)])], t.ignore)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
""".format(HERE, os.path.dirname(HERE), os.path.dirname(os.path.dirname(HERE)))
    used = subprocess.check_output([sys.executable, "-c", code])
    assert int(used) < 40


def test_a_source_that_fails_when_it_is_closed_was_read_all_the_same(monkeypatch):
    source, really = pipe_with(b"x" * 1000), os.close

    def close(fd):
        really(fd)
        if fd == source:
            raise OSError(5, "EIO")
    monkeypatch.setattr(os, "close", close)
    began = time.monotonic()

    def on_tick(progress):
        assert time.monotonic() - began < 60, "the pump waits for a flow that has ended"
    assert stream.pump([stream.Flow(source, [Collector()])], on_tick) == 1000
