"""Files of others: whatever the layout, what is whole is read, what is not supported says so, and only damage is damage."""

import contextlib
import copy
import functools
import gzip
import hashlib
import io
import itertools
import os
import tarfile
import tempfile
import xmlrpc.client
from collections import Counter
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import VmBackup
from support import others
from support.others import MIB, Date, Ids, Vhd
from support.values import services
from VmBackup import BackupError, Directory, UnknownFormat, VerificationError

SLOW = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def opened(path):
    """The image that stands alone at that path, and its directory."""
    with Directory.open_path(os.path.dirname(str(path))) as inside:
        yield VmBackup.copy_at_path(str(path))[1], inside


def extracted(folder, name, content, disk='xvda', force=False):
    """The contents of a disk of that file, by the functions that `extract` has."""
    path, target = folder / name, folder / 'disk.raw'
    path.write_bytes(content)
    with contextlib.suppress(FileNotFoundError):
        target.unlink()
    with opened(path) as (image, inside):
        source = VmBackup.read_source(inside, image, force, without_vm=True)
        VmBackup.extract_disk(services(), source, VmBackup.wanted_disk(source, disk), str(target))
    return target.read_bytes()


def refused(folder, name, content):
    """The error that reading that file ends in."""
    with pytest.raises(VerificationError) as caught:
        extracted(folder, name, content)
    assert os.listdir(str(folder)) == [name] and '\n' not in str(caught.value)
    return caught.value


def xva_check(*sinks, strict=False):
    return VmBackup.Check(VmBackup.check_xva, None, sinks, strict=strict)


def digesting():
    """A sink that notes the digest of each MiB, and what it has noted."""
    seen = {}
    return VmBackup.MebibyteSink(functools.partial(VmBackup.note_digest, seen)), seen


def reader_of(*pieces):
    return VmBackup.Reader(memoryview(bytearray(piece)) for piece in pieces)


# --- XVA -------------------------------------------------------------------------------------------------------------

#: What makes each of them: they are large, and every worker imports this file.
ARCHIVES = {
    'of XenServer 5': lambda: others.xva(),
    'of a Node program': lambda: others.xva('ustar'),
    'of Xen Orchestra': lambda: others.orchestra(),
    'ids in another order': lambda: others.xva(ids=Ids(disks=['Ref:004', 'Ref:002'])),
    'ids of three digits': lambda: others.xva(ids=Ids(disks=['Ref:99', 'Ref:101']), order=(1, 0)),
    'ids with words': lambda: others.xva(ids=Ids(disks=['Ref:VDI-1-root', 'Ref:VDI-2-data'])),
    'numbers of 20 digits': lambda: others.xva(digits=20),
    'padded': lambda: others.xva(tail=10240),
    'padded with mebibytes': lambda: others.xva(tail=3 * MIB + 512),
    'one zero block': lambda: others.xva(tail=512),
    'no zero blocks': lambda: others.xva(tail=0),
    'packed by GNU tar': lambda: others.packed_again(tarfile.GNU_FORMAT),
    'packed by a POSIX tar': lambda: others.packed_again(tarfile.USTAR_FORMAT),
    'packed with pax headers': lambda: others.packed_again(tarfile.PAX_FORMAT),
    'packed from a directory': lambda: others.packed_again(tarfile.GNU_FORMAT, './', ['./', './Ref:2/']),
    'packed with files beside it': lambda: others.packed_again(tarfile.PAX_FORMAT, files=['notes.txt', 'Ref:2/._00000000']),
    'packed with long names': lambda: others.packed_again(tarfile.GNU_FORMAT, './' * 50),
    'long names in pax headers': lambda: others.packed_again(tarfile.PAX_FORMAT, './' * 50),
    'long names by prefix': lambda: others.packed_again(tarfile.USTAR_FORMAT, './' * 50)}


@pytest.mark.parametrize('what', sorted(ARCHIVES))
def test_an_archive_of_another_program_gives_its_disks(tmp_path, what):
    for number, device in enumerate(('xvda', 'xvdb')):
        assert extracted(tmp_path, 'web.xva', ARCHIVES[what](), device) == others.contents(number)


@pytest.mark.parametrize('what', sorted(set(ARCHIVES) - {'of XenServer 5', 'ids with words', 'ids of three digits',
                                                         'of a Node program', 'of Xen Orchestra'}))
def test_what_an_export_of_ours_never_looks_like_is_refused_of_ours(what):
    check = xva_check(strict=True)
    with pytest.raises(VerificationError):
        check.read(reader_of(ARCHIVES[what]()))


SMALL = others.xva(tail=10240)
HEADERS = [0] + [SMALL.index(name) for name in (b'Ref:2/00000000\0', b'Ref:2/00000000.', b'Ref:2/00000004\0', b'Ref:4/00000002.')]


@SLOW
@given(st.one_of(st.integers(0, len(SMALL) - 1), st.sampled_from(HEADERS).flatmap(lambda at: st.integers(at, at + 511))),
       st.integers(0, 7))
def test_leniency_finds_every_flipped_bit_behind_ova_xml(at, bit):
    damaged = bytearray(SMALL)
    damaged[at] ^= 1 << bit
    sink, seen = digesting()
    try:
        xva_check(sink).read(reader_of(damaged))
    except VerificationError:
        return
    # What passes has all its blocks all the same: a letter in ova.xml, or the NUL that ends a number become a blank.
    assert [len(digests) for digests in seen.values()] == [5, 3]


@SLOW
@given(st.integers(0, len(others.xva(tail=0)) - 1))
def test_leniency_finds_every_cut_before_the_end_of_the_last_block(length):
    check = xva_check()
    with pytest.raises(VerificationError):
        check.read(reader_of(others.xva(tail=0)[:length]))


@pytest.mark.parametrize('more', [b'HTTP/1.0 500 Internal Error\r\n', bytes(5000) + b'x', others.xva()[:4096]], ids=['http', 'x', 'twice'])
def test_leniency_lets_nothing_but_zeros_stand_behind_the_end(tmp_path, more):
    for end in (0, -len(more) % 512):
        error = refused(tmp_path, 'web.xva', others.xva() + more + bytes(end))
        assert not isinstance(error, UnknownFormat)


def in_glob_order():
    made = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(others.xva())) as source, tarfile.open(fileobj=made, mode='w') as target:
        for item in sorted(source, key=lambda item: item.name):
            target.addfile(item, source.extractfile(item))
    return made.getvalue()


def sparse():
    return others.member('ova.xml', others.ova(others.objects(Ids()))) + others.member('Ref:2/00000000', b'x' * 512)[:156] + \
        b'S' + bytes(2000)


UNSUPPORTED = {
    ('web.xva', 'version 1'): lambda: others.geneva(),
    ('web.xva', 'metadata export'): lambda: others.metadata_only(),
    ('web.xva', 'xz'): lambda: b'\xfd7zXZ\0' + bytes(3000),
    ('web.xva.gz', 'bzip2'): lambda: b'BZh91AY' + bytes(3000),
    ('web.raw', 'qcow2'): lambda: b'QFI\xfb' + bytes(3000),
    ('web.vhd', 'VHDX'): lambda: b'vhdxfile' + bytes(3000),
    ('web.xva', 'pack it again'): lambda: in_glob_order(),
    ('web.vhd', 'differencing'): lambda: Vhd(2 * MIB, {}, ['header', 'table'], kind=4).file,
    ('web.vhd.gz', 'decompress it first'): lambda: gzip.compress(Vhd(6 * MIB, {0: bytes(2 * MIB), 2: bytes(2 * MIB)},
                                                             ['header', 'table', 2, 0]).file, 1),
    ('fixed.vhd.gz', 'decompress it first'): lambda: gzip.compress(others.fixed_vhd(b'x' * MIB), 1)}


@pytest.mark.parametrize('name,words', sorted(UNSUPPORTED))
def test_what_is_not_supported_says_so_and_is_not_called_damaged(tmp_path, name, words):
    error = refused(tmp_path, name, UNSUPPORTED[name, words]())
    assert isinstance(error, UnknownFormat) and words in str(error) and 'damaged' not in str(error)


class FilesForXe:
    """Stands for xe: what goes into a command goes into the file of that name in the directory; `fed` are the descriptors."""

    def __init__(self, place):
        self.place, self.fed = place, []

    def start(self, name, stdin):
        program = mock.MagicMock(stdin_fd=os.open(str(self.place / name), os.O_WRONLY | os.O_CREAT))
        program.__enter__.return_value = program
        program.close_stdin.side_effect = lambda: os.close(program.stdin_fd)
        self.fed.append(program.stdin_fd)
        return program


def test_a_part_that_was_ended_takes_nothing_more_nor_does_what_has_its_descriptor_now(tmp_path):
    xe = FilesForXe(tmp_path)
    imports = VmBackup.Imports(xe, [['first'], ['second']])
    feed = VmBackup.Consumer('import', VmBackup.feed_archive, imports, ovas=[b'<a/>', b'<b/>'], parts=[['Ref:2'], ['Ref:4']],
                             strict=False)
    before = b''

    def views():
        nonlocal before
        yield memoryview(others.member('ova.xml', b'<value/>') + others.member('Ref:2/00000000', b'x'))
        yield memoryview(others.member('Ref:4/00000000', b'y'))
        assert xe.fed[0] == xe.fed[1]              # the kernel gives the lowest number that is free
        before = (tmp_path / 'second').read_bytes()
        yield memoryview(others.member('Ref:2/00000001', b'z'))

    with pytest.raises(UnknownFormat) as caught:
        feed.read(VmBackup.Reader(views()))
    assert before and 'extract' in str(caught.value) and (tmp_path / 'second').read_bytes() in (before, before + bytes(1024))
    assert b'z' not in (tmp_path / 'second').read_bytes() and len(xe.fed) == 2
    feed.close()
    for part in (0, 1):
        with pytest.raises(UnknownFormat):
            imports.write(part, b'more')


# --- compression -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name,made', [
    ('web.xva', lambda: gzip.compress(others.xva(), 1)), ('web.xva.gz', others.xva),
    ('web.xva.zst', lambda: gzip.compress(others.xva(), 1)),
    ('web.xva.gz', lambda: gzip.compress(others.xva()[:99999], 1) + gzip.compress(others.xva()[99999:], 1) + bytes(10240)),
    ('web.raw', lambda: others.contents(0)), ('web.raw.gz', lambda: others.contents(0)),
    ('web.raw', lambda: gzip.compress(others.contents(0), 1)), ('web.raw.zst', lambda: gzip.compress(others.contents(0), 1)),
    ('web.vhd', lambda: gzip.compress(Vhd(5 * MIB, {0: others.contents(0)[:2 * MIB], 2: others.contents(0)[4 * MIB:] + bytes(MIB)},
                                          ['header', 'gap', 'table', 0, 2]).file)),
    ('web.vhd.gz', lambda: others.fixed_vhd(others.contents(0)))], ids=map(str, range(10)))
def test_compression_is_what_the_first_bytes_say(tmp_path, name, made):
    assert extracted(tmp_path, name, made()) == others.contents(0)


@pytest.mark.parametrize('magic', [b'\x1f\x8b\x08\0', b'\x28\xb5\x2f\xfd', b'BZh9', b'\xfd7zXZ\0'], ids=map(str, range(4)))
def test_a_disk_that_begins_like_a_compressed_file_is_a_disk(tmp_path, magic):
    raw = magic + others.contents(0)[len(magic):]
    assert extracted(tmp_path, 'web.raw', raw) == raw
    assert extracted(tmp_path, 'web.vhd', others.fixed_vhd(raw)) == raw


def test_what_is_called_compressed_and_begins_so_is_whatever_padded_it(tmp_path):
    packed = gzip.compress(others.contents(0), 1)
    for name in ('web.raw.gz', 'web.raw.zst'):
        assert extracted(tmp_path, name, packed.ljust(-(-len(packed) // MIB) * MIB, b'\0')) == others.contents(0)


def test_of_ours_the_manifest_says_what_it_is(tmp_path):
    (tmp_path / 'web.raw').write_bytes(gzip.compress(b'x'))
    with Directory.open_path(str(tmp_path)) as inside:
        for word in ('none', 'zstd', 'gzip'):
            facts = {'name': 'web.raw', 'compression': word}
            assert VmBackup.image_compression(inside, 'web.raw', facts) == word
        assert VmBackup.image_compression(inside, 'web.raw', {}) == 'gzip'


# --- VHD -------------------------------------------------------------------------------------------------------------

def noise(seed, size):
    return hashlib.sha256(b'%d' % seed).digest() * (size // 32)


@st.composite
def vhds(draw):
    """A VHD of any layout, and is it one that can be read in one pass?"""
    block_bytes = draw(st.sampled_from([4096, 64 * 1024, 512 * 1024, MIB, 2 * MIB]))
    blocks = draw(st.integers(1, 6))
    size = blocks * block_bytes - 512 * draw(st.integers(0, min(7, block_bytes // 512 - 1)))
    numbers = draw(st.lists(st.integers(0, blocks - 1), unique=True))
    layout = draw(st.permutations(['header', 'table'] + numbers + draw(st.lists(st.just('gap'), max_size=1))))
    creator = draw(st.sampled_from([b'tap\0', b'qemu', b'vpc ']))
    whole = draw(st.lists(st.sampled_from(numbers), unique=True)) if numbers else []
    if creator == b'tap\0':
        layout.insert(layout.index('table') + 1, 'batmap')
    some = st.lists(st.integers(0, block_bytes // 512 - 1), max_size=20)
    sectors = {number: draw(some) for number in numbers if draw(st.booleans())}
    return Vhd(size, {number: noise(number, block_bytes) for number in numbers}, layout, block_bytes, draw(st.integers(0, 600)),
               sectors, whole, creator, draw(st.booleans()))


@SLOW
@given(vhds())
def test_a_vhd_of_any_layout_gives_its_disk(tmp_path_factory, made):
    assert extracted(tmp_path_factory.mktemp('vhd'), 'web.vhd', made.file) == made.disk()


@SLOW
@given(vhds())
def test_a_compressed_vhd_gives_its_disk_or_says_what_to_do(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp('vhd')
    try:
        found = extracted(folder, 'web.vhd.gz', gzip.compress(made.file, 1))
    except UnknownFormat as error:
        assert 'decompress it first' in str(error)
    else:
        assert found == made.disk()


IN_ORDER = {
    'of a server': lambda: Vhd(6 * MIB, {0: noise(0, 2 * MIB), 2: noise(2, 2 * MIB)}, ['header', 'table', 0, 2]),
    'with a gap': lambda: Vhd(6 * MIB, {0: noise(0, 2 * MIB), 2: noise(2, 2 * MIB)}, ['gap', 'header', 'gap', 'table', 0, 2][1:]),
    'with a batmap': lambda: Vhd(6 * MIB, {1: noise(0, 2 * MIB)}, ['header', 'table', 'batmap', 1], creator=b'tap\0', whole=[1],
                         sectors={1: [7]}, short=True)}


@pytest.mark.parametrize('what', sorted(IN_ORDER))
def test_a_compressed_vhd_whose_blocks_lie_in_order_is_read_in_one_pass(tmp_path, what):
    made = IN_ORDER[what]()
    assert extracted(tmp_path, 'web.vhd.gz', gzip.compress(made.file, 1)) == made.disk()
    for cut in (1, 512, 3 * MIB):
        assert not isinstance(refused(tmp_path, 'web.vhd.gz', gzip.compress(made.file[:-cut - made.file.endswith(b'\0')], 1)),
                              UnknownFormat)


WHOLE = Vhd(5 * MIB, {2: noise(2, 2 * MIB), 0: noise(0, 2 * MIB)}, ['header', 'gap', 'table', 2, 0])


@SLOW
@given(st.one_of(st.integers(0, 1535), st.integers(1536 + 4096, 1536 + 4096 + 11), st.integers(len(WHOLE.file) - 512,
                                                                                             len(WHOLE.file) - 1)), st.integers(0, 7))
def test_a_flipped_bit_in_the_structure_of_a_foreign_vhd_is_found(tmp_path_factory, at, bit):
    damaged = bytearray(WHOLE.file)
    damaged[at] ^= 1 << bit
    with pytest.raises(VerificationError):
        extracted(tmp_path_factory.mktemp('vhd'), 'web.vhd', bytes(damaged))


def tight_vhd(*order):
    """Its blocks leave no room, so that none can lie elsewhere unseen."""
    return Vhd(13 * 4096, {number: noise(number, 4096) for number in order}, ['header', 'table', 'batmap'] + list(order), 4096,
               creator=b'tap\0', whole=[0, 5], sectors={12: [1, 6]})


def disk_in(content, image=None):
    """The disk that a VHD of others holds, in this thread: a test of every bit has no time for more. `image`: a file of it."""
    disk = bytearray()
    source = reader_of(content) if image is None else image.fileno()
    for _, offset, piece in VmBackup.check_vhd(VmBackup.Check(VmBackup.check_vhd), source, strict=False):
        disk += bytes(offset - len(disk)) + piece
    size = int.from_bytes(content[48:56], 'big')
    return bytes(disk).ljust(size, b'\0')[:size]


@pytest.mark.parametrize('is_file,made', [(True, tight_vhd(5, 0, 12)), (False, tight_vhd(0, 5, 12))], ids=['file', 'stream'])
def test_any_flipped_bit_outside_the_blocks_of_a_foreign_vhd_gives_damage_or_the_disk(is_file, made):
    whole, disk, refused_in = made.file, made.disk(), Counter()
    with tempfile.TemporaryFile(buffering=0) as file:
        image = file if is_file else None
        file.write(whole)
        assert whole.index(b'tdbatmap') == 2048 and disk_in(whole, image) == disk
        for place in itertools.chain(range(8 * 3072), range(8 * (len(whole) - 512), 8 * len(whole))):
            at, damaged = place // 8, bytearray(whole)
            damaged[at] ^= 1 << place % 8
            os.pwrite(file.fileno(), damaged[at:at + 1], at)
            try:
                assert disk_in(bytes(damaged), image) == disk, place
            except VerificationError:
                refused_in[at // 512] += 1
            os.pwrite(file.fileno(), whole[at:at + 1], at)
    if is_file:                        # the bitmaps do without the batmap, whatever its header says
        assert not refused_in[4] and not refused_in[5]


def wild_vhd(at, number, structure=0):
    """A VHD that has that number there, and sums that fit it."""
    made = bytearray(WHOLE.file)
    made[at:at + len(number)] = number
    begin, length, field = {0: (0, 512, 64), 1: (512, 1024, 36)}[structure]
    made[begin:begin + length] = others.summed(bytes(made[begin:begin + length]), field)
    return bytes(made) if structure else bytes(made[:-512] + made[:512])


@pytest.mark.parametrize('number', [2 ** 64 - 1, 2 ** 63, 2 ** 63 - 1, 2 ** 63 - 512, 2 ** 40, len(WHOLE.file) - 100])
@pytest.mark.parametrize('at,structure', [(16, 0), (48, 0), (528, 1)], ids=['header', 'size', 'table'])
@pytest.mark.parametrize('name', ['web.vhd', 'web.vhd.gz'])
def test_a_wild_number_with_a_sum_that_fits_is_damage(tmp_path, name, at, structure, number):
    content = wild_vhd(at, number.to_bytes(8, 'big'), structure)
    refused(tmp_path, name, gzip.compress(content, 1) if name.endswith('gz') else content)
    with opened(tmp_path / name) as (image, inside), contextlib.suppress(VerificationError):
        source = VmBackup.read_source(inside, image, True, without_vm=True)
        VmBackup.stream_image(source, lambda progress: None, problems=[])


def test_a_fixed_vhd_of_a_wild_size_is_damage_for_force_too(tmp_path):
    (tmp_path / 'web.vhd').write_bytes(others.contents(0) + others.vhd_footer(2 ** 62, 2, header_at=2 ** 64 - 1))
    with opened(tmp_path / 'web.vhd') as (image, inside), pytest.raises(VerificationError):
        VmBackup.read_source(inside, image, True, without_vm=True)


@pytest.mark.parametrize('bend', [
    lambda whole: whole[:-1000], lambda whole: whole[:-2 * MIB], lambda whole: whole + b'HTTP/1.0 500 Internal Error\r\n' * 30,
    lambda whole: b'', lambda whole: b'x' * 100, lambda whole: others.fixed_vhd(b'x' * MIB)[512:], lambda whole: noise(1, 4 * MIB),
    lambda whole: whole[:-512 - MIB] + whole[-512:]], ids=map(str, range(8)))
def test_a_foreign_vhd_that_is_cut_or_longer_is_damaged(tmp_path, bend):
    assert not isinstance(refused(tmp_path, 'web.vhd', bend(WHOLE.file)), UnknownFormat)


def test_of_a_damaged_foreign_vhd_force_gives_what_is_there(tmp_path):
    (sink, seen), problems = digesting(), []
    (tmp_path / 'web.vhd').write_bytes(WHOLE.file[:-MIB])
    with opened(tmp_path / 'web.vhd') as (image, inside):
        source = VmBackup.read_source(inside, image, True, without_vm=True)
        VmBackup.stream_image(source, lambda progress: None, [sink], problems=problems)
    assert problems and list(seen['image'])[:1] == [int.from_bytes(hashlib.sha1(WHOLE.disk()[:MIB]).digest()[:8], 'big')]


# --- ova.xml with fewer fields, or other kinds of them -----------------------------------------------------------------

VIEW = VmBackup.PoolView(
    'master', (VmBackup.TargetSr('OpaqueRef:sr', 'sr-uuid', 'Local storage', 'nfs', True, 1 << 50, ()),), 'OpaqueRef:sr',
    {'OpaqueRef:net': {'uuid': 'net', 'name_label': 'LAN'}}, {}, {}, {}, {})
NO_WISHES = {'to': '', 'sr': '', 'network': '', 'preserve': False, 'start': False, 'attach_existing_disks': False,
             'force': False}
WRONG = ['text', {'a': []}, [[]], True, 1.5, Date('20260101T00:00:00Z')]


def every_change():
    """(class, field, value) for each field of each class; None: it is not there."""
    for one in {one['class']: one for one in others.objects(Ids())}.values():
        for field in sorted(one['snapshot']):
            for value in [None] + WRONG:
                yield one['class'], field, value


def restored_in_process(text, wishes=NO_WISHES):
    """All that a preview and a restore do with an ova.xml before the server gets it."""
    ova = VmBackup.parse_ova(text)
    VmBackup.exported_disks(ova)
    vm_id, _ = VmBackup.own_vm(ova)
    image = VmBackup.Copy('web', 'web', VmBackup.datetime(2026, 11, 26), True, VmBackup.Method.VM, '', 'web', 0, None, None,
                          'web.xva', 5 * MIB, '')
    with Directory.open_path('/') as inside:
        source = VmBackup.Source(inside, image, {}, ova, vm_id, {}, tuple(VmBackup.disks_of_ova(ova, vm_id)))
        plan = VmBackup.plan_restore(source, VIEW, wishes)
        assert VmBackup.plan_text(plan)
    if plan.problems:
        return plan
    for part, (_, ids) in enumerate(plan.parts):
        made = VmBackup.parse_ova(VmBackup.ova_of_part(plan, part, 'new name'))
        assert set(VmBackup.exported_disks(made)) == set(ids)
    for interface in plan.interfaces:
        assert interface.fields['device']
        xmlrpc.client.dumps((interface.fields,))
    return plan


@pytest.mark.parametrize('class_name', ['VM', 'VBD', 'VDI', 'SR', 'VIF', 'network'])
def test_every_field_of_ova_xml_may_be_missing_or_of_another_kind(class_name):
    wishes = dict(NO_WISHES, preserve=True)
    for name, field, value in every_change():
        if name != class_name:
            continue
        found = others.objects(Ids())
        for one in found:
            if one['class'] == name and value is None:
                del one['snapshot'][field]
            elif one['class'] == name:
                one['snapshot'][field] = copy.copy(value)
        try:
            restored_in_process(others.ova(found), wishes)
        except BackupError as error:
            assert '\n' not in str(error) and 'is damaged' not in str(error), (name, field, value)


@pytest.mark.parametrize('gone', ['VM', 'VBD', 'VDI', 'SR', 'VIF', 'network'])
def test_a_class_of_objects_may_be_missing(gone):
    with contextlib.suppress(BackupError):
        restored_in_process(others.ova([one for one in others.objects(Ids()) if one['class'] != gone]))


@SLOW
@given(st.lists(st.recursive(st.sampled_from(['VM', 'VBD', 'VDI', 'Ref:0', 'Ref:2', 'x']) | st.booleans(), lambda inner: st.lists(
    inner, max_size=2) | st.dictionaries(st.sampled_from(['class', 'id', 'snapshot', 'VDI', 'VM']), inner), max_leaves=8), max_size=4))
def test_objects_of_any_shape_are_refused_in_a_sentence(junk):
    for found in (junk, others.objects(Ids()) + junk):
        with contextlib.suppress(BackupError):
            restored_in_process(others.ova(found))


def test_numbers_with_a_tag_and_nothing_at_all_are_text():
    text = others.ova(others.objects(Ids())).replace(b'<value>1073741824</value>', b'<value><int>1073741824</int></value>')
    text = text.replace(b'<name>PV_args</name><value></value>', b'<name>PV_args</name><value><nil/></value>')
    assert text.count(b'<int>') == 4 and text.count(b'<nil/>') == 1
    assert restored_in_process(text).problems == ()


def test_what_the_server_needs_and_is_missing_is_one_sentence():
    found = others.objects(Ids())
    del found[0]['snapshot']['VCPUs_max'], found[2]['snapshot']['SR']
    problem, = restored_in_process(others.ova(found), dict(NO_WISHES, sr='sr-uuid')).problems
    assert problem == ("its ova.xml lacks what the server needs: VCPUs_max of the VM, the SR of disk xvda disk 0 (5.0 MiB). "
                       "`list` shows the other copies.")


def test_a_nest_without_end_is_refused():
    with pytest.raises(VerificationError, match='nested too deeply'):
        VmBackup.parse_ova(b'<value><struct><member><name>objects</name>' + b'<value><array><data>' * 5000)


# --- cfg files of the older program ----------------------------------------------------------------------------------------

def put(path, what):
    """One of the things that can stand in the place of a cfg file."""
    if what == 'a directory':
        path.mkdir()
    elif what == 'a link':
        path.symlink_to('/dev/zero')
    elif what == 'a pipe':
        os.mkfifo(str(path))
    elif what != 'nothing':
        path.write_bytes({'empty': b'', 'garbage': b'\0\xff=\xfe\nuserdevice=\xf0\nvirtual_size=-5\norig_uuid\n', 'zeros': bytes(4096),
                          'words': b'virtual_size=much\nuserdevice=\nname_label=\nmemory_dynamic_max=all\n'}[what])


@pytest.mark.parametrize('what', ['nothing', 'a directory', 'a link', 'a pipe', 'empty', 'garbage', 'zeros', 'words'])
@pytest.mark.parametrize('name', ['vm.cfg', 'DISK-xvda/vbd.cfg', 'DISK-xvda/vdi.cfg', 'VIFs/vif-0.cfg', 'vm-metadata.xml'])
@pytest.mark.parametrize('image', ['web.xva', 'web.raw', 'web.raw.gz'])
def test_nothing_of_cfg_files_is_needed_for_an_archive_and_what_a_disk_needs_is_one_sentence(tmp_path, image, name, what):
    for folder in ('DISK-xvda', 'VIFs'):
        (tmp_path / folder).mkdir()
    whole = {'vm.cfg': 'name_label=web\nmemory_dynamic_max=1073741824\nVCPUs_max=1\nVCPUs_at_startup=1\norig_uuid=u\n',
             'DISK-xvda/vbd.cfg': 'userdevice=0\nbootable=True\nmode=RW\ntype=Disk\n', 'VIFs/vif-0.cfg': 'device=0\nMAC=aa:bb\n',
             'DISK-xvda/vdi.cfg': 'name_label=root\nvirtual_size=%d\norig_uuid=d\norig_sr_uuid=sr-uuid\n' % (5 * MIB)}
    for other, text in whole.items():
        if other != name:
            (tmp_path / other).write_text(text)
    put(tmp_path / name, what)
    content = others.xva() if image == 'web.xva' else others.contents(0)
    (tmp_path / image).write_bytes(gzip.compress(content, 1) if image.endswith('gz') else content)
    with opened(tmp_path / image) as (found, inside):
        VmBackup.image_check(inside, found, {})
        try:
            source = VmBackup.read_source(inside, found)
            assert source.disks[0].virtual_size == 5 * MIB
            plan = VmBackup.plan_restore(source, VIEW, dict(NO_WISHES, network='LAN', sr='sr-uuid'))
            assert not (plan.problems and image == 'web.xva')
        except VerificationError as error:
            assert image != 'web.xva' and isinstance(error, UnknownFormat), error


# --- what xe says --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('said', [
    'Exporting error-log', 'VM "unknown (failed)": 42 %', 'exporting VM: Error: the band', 'denied-requests is exported',
    'Warning: the name "cannot connect" is used twice'])
def test_a_name_that_xe_quotes_is_no_failure(said):
    assert VmBackup.xe_problem(0, said) is None


@pytest.mark.parametrize('said', [
    'Export failed, unknown error.', 'Export failed, unknown error', 'Export cancelled', 'Error: Broken pipe (calling single_write )',
    'Lost connection to the server.', 'Unhandled exception', 'Error code: VDI_IO_ERROR\nError parameters: Device I/O errors',
    'Operation failed. Error: Sys_error("/x: File exists")', 'The server failed to handle your request, due to an internal error.',
    'This operation cannot be performed because this VDI is in use by some other operation', 'The uuid you supplied was invalid.',
    'You attempted an operation on a VM that was not in an appropriate power state at the time',
    'Another operation involving the object is currently in progress', 'Server internal error.', 'Authentication failed',
    'The SR is full. Requested new size exceeds the maximum size', 'Exporting web\nExport failed, unknown error.',
    'Failed to contact a running management agent.', 'You gave an invalid object reference.',
    'File not permitted: Blocked upload/download of the file /x', 'Unable to contact server. Please check server and port settings.'])
def test_what_xe_says_of_a_failure_is_one_whatever_its_status(said):
    assert said.split('\n')[-1] in VmBackup.xe_problem(0, said)


@pytest.mark.parametrize('was_proven, advice, said', [
    (False, 'Take an older one.', 'restoring web: the copy is damaged: Block 3 checksum failed. Take an older one.'),
    (False, '', 'restoring web: the copy is damaged: Block 3 checksum failed.'),       # it is kept, or was a drill
    (True, 'Take an older one.', 'restoring web failed: Block 3 checksum failed. ' + VmBackup.MASTER_LOG)])
def test_an_import_that_failed_for_a_checksum_blames_a_copy_that_was_not_proven(was_proven, advice, said):
    error = VmBackup.import_failure('restoring web', 'Block 3 checksum failed.', advice, was_proven)
    assert (str(error), isinstance(error, VerificationError)) == (said, not was_proven)
