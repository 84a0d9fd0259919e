"""Increments: nights of a guest that writes, and a reader of their files that owes nothing to the program.

    nights = Nights(pool, shelf, 'vm-export=web')
    nights.night()                                       a backup of these lines; what the disks held is remembered
    nights.write(2, count=3)                             the guest of web writes to MiB 2, 3 and 4 of xvda
    copy = nights.night()
    assert nights.problem(copy) == ''                    read by `blocks`, and laid over each other: what the disks held

The files of an increment are read here as design and specification have them: `blocks` row by row, each VHD from its footer
(Microsoft's Virtual Hard Disk Image Format Specification 1.0) to its last sector.
"""

import hashlib
import json
import os
import re
import struct
import subprocess
import xml.etree.ElementTree as ElementTree
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from support.archive import read_tar
from support.contents import blocks_of_archive, value_of
from support.deeds import backup
from support.language import disk
from support.process import TIME_LIMIT_S, Pool, Run, run_program, text_of
from support.recovery import disks_of, extract, machine, restore
from support.shelf import Shelf, Store, path_of, unpacked

MIB = 1 << 20
SECTOR = 512
VHD_BLOCK = 2 * MIB
NOT_THERE = 0xFFFFFFFF
ROW = re.compile(r'([!-~]+) (\d+) ([0-9a-f]{32}|zero)(?: (backup-\d{4}-\d\d-\d\d-\d{6}))?')
ROOT = disk(size=9 * MIB + 512, used=[[0, 5]], seed=3, name_label='root', bootable=True)
DATA = disk(size=6 * MIB, used=[[0, 3]], seed=4, name_label='data')


# --- nights -----------------------------------------------------------------------------------------------------------

class Nights:
    """Backups of one VM, and what its disks held when each was made: `held` by copy and device."""

    def __init__(self, pool: Pool, shelf: Shelf, *lines: str, name: str = 'web', folder: str = '') -> None:
        self.pool, self.shelf, self.name, self.folder = pool, shelf, name, folder or name
        self.called = name                                      # in the words of restore and extract
        self.lines = lines + ('incremental=yes',)
        self.held: Dict[str, Dict[str, bytes]] = {}
        self.run: Run = Run(0, '', '')

    @property
    def kind(self) -> str:
        return 'vm-export' if self.lines[0].startswith('vm-export') else 'vdi-export'

    def disks(self) -> Dict[str, bytes]:
        """What the disks hold now, by device; of a vdi-export the first."""
        found = {device_of(number): self.pool.read(disk['uuid']) for number, disk in disks_of(self.pool, self.name).items()}
        return found if self.kind == 'vm-export' else {'xvda': found['xvda']}

    def night(self, *lines: str, exit_status: int = 0, **how: Any) -> str:
        """The name of the copy that a backup made with these lines besides; `how`: as deeds.backup has it."""
        before, held = self.copies(), self.disks()
        self.run = backup(self.pool, self.shelf, *(self.lines + lines), **how)
        assert self.run.exit_status == exit_status, self.run
        copy, = [name for name in self.copies() if name not in before]
        self.held[copy] = held
        return copy

    def write(self, first: int, count: int = 1, device: str = 'xvda', zero: bool = False) -> None:
        """The guest writes to these MiBs."""
        self.pool.command('write', '--dir', self.pool.dir, '--vm', self.name, '--device', device, '--block', str(first),
                          '--count', str(count), *(['--zero'] if zero else []))

    # --- the administrator changes disks ---

    def grow(self, size: int, device: str = 'xvda') -> None:
        self._xe('vdi-resize', 'uuid=' + self.disk(device)['uuid'], 'disk-size=%d' % size)

    def add(self, device: str, size: int) -> str:
        """The uuid of a new, empty disk, which is that device of the VM."""
        sr = next(iter(self.pool.dump()['SR'].values()))['uuid']
        sr = next((one['uuid'] for one in self.pool.dump()['SR'].values() if one['content_type'] == 'user'), sr)
        uuid = self._xe('vdi-create', 'sr-uuid=' + sr, 'name-label=added', 'virtual-size=%d' % size)
        self.attach(device, uuid)
        return uuid

    def attach(self, device: str, uuid: str) -> None:
        self._xe('vbd-create', 'vm-uuid=' + machine(self.pool, self.name)['uuid'], 'vdi-uuid=' + uuid,
                 'device=%d' % (ord(device[-1]) - ord('a')), 'type=Disk', 'mode=RW')

    def detach(self, device: str) -> str:
        """The uuid of the disk that was that device, and is still in the pool."""
        disk = self.disk(device)
        self._xe('vbd-destroy', 'uuid=' + disk['VBD']['uuid'])
        return disk['uuid']

    def disk(self, device: str) -> Dict[str, Any]:
        """The record of that disk."""
        return disks_of(self.pool, self.name)[str(ord(device[-1]) - ord('a'))]

    def _xe(self, *words: str) -> str:
        run = self.pool.xe(*words)
        assert run.exit_status == 0, run
        return run.stdout.strip()

    def copies(self) -> List[str]:
        return sealed(self.shelf, self.folder)

    def problem(self, copy: str) -> str:
        """Why the files of that copy do not give what the disks held, however they are read; "" if they do."""
        return copy_problem(self.shelf, self.folder, copy, self.held[copy])

    def restored_problem(self, copy: str) -> str:
        """Why `restore` of that copy does not give what the disks held; "" if it does."""
        names = {one['name_label'] for one in self.pool.dump()['VM'].values()}
        name = next(name for name in map('back%d'.__mod__, range(1, 100)) if name not in names)
        run = restore(self.pool, self.shelf, self.called, 'from=' + copy[len('backup-'):], 'to=' + name, lines=self.lines)
        if run.exit_status != 0:
            return 'restore ended with %d: %s' % (run.exit_status, run.output)
        return self.machine_problem(name, self.held[copy])

    def machine_problem(self, name: str, held: Dict[str, bytes]) -> str:
        """Why that VM has not these disks."""
        found = {device_of(number): disk['uuid'] for number, disk in disks_of(self.pool, name).items()}
        if self.kind == 'vm-export' and set(found) != set(held):
            return 'it came back with %s' % sorted(found)
        for device, content in held.items():
            problem = difference(self.pool.read(found[device]), content, True)
            if problem:
                return 'disk %s that came back: %s' % (device, problem)
        return ''

    def extracted_problem(self, copy: str) -> str:
        """Why `extract` does not give what the disks held."""
        for device, content in self.held[copy].items():
            path = os.path.join(self.shelf.home, 'extracted')
            run = extract(self.shelf, self.called, 'from=' + copy[len('backup-'):], 'disk=' + device, 'to=' + path)
            if run.exit_status != 0:
                return 'extract ended with %d: %s' % (run.exit_status, run.output)
            with open(path, 'rb') as file:
                problem = difference(file.read(), content, True)
            os.unlink(path)
            if problem:
                return 'disk %s that was extracted: %s' % (device, problem)
        return ''

    def by_hand_problem(self, copy: str) -> str:
        """Why RESTORE.txt, run as a script in the copy's directory on a host of the pool, does not give what they held."""
        before = set(self.pool.dump()['VDI'])
        machines = set(self.pool.dump()['VM'])
        run = self.by_hand(copy)
        if run.exit_status != 0:
            return 'RESTORE.txt ended with %d: %s' % (run.exit_status, run.output)
        dump = self.pool.dump()
        held = self.held[copy]
        if self.kind == 'vdi-export':
            made, = set(dump['VDI']) - before
            return difference(self.pool.read(dump['VDI'][made]['uuid']), held['xvda'], True)
        made, = [ref for ref in set(dump['VM']) - machines if not dump['VM'][ref]['is_a_snapshot']]
        found = {}
        for ref in dump['VM'][made]['VBDs']:
            if dump['VBD'][ref]['type'] == 'Disk':
                found[device_of(dump['VBD'][ref]['userdevice'])] = dump['VDI'][dump['VBD'][ref]['VDI']]['uuid']
        if set(found) != set(held):
            return 'by hand it came back with %s' % sorted(found)
        lost = set(dump['VDI']) - before - {ref for vbd in dump['VBD'].values() for ref in [vbd['VDI']]}
        if lost:
            return 'disks of no VM are left: %s' % sorted(dump['VDI'][ref]['name_label'] for ref in lost)
        for device, content in held.items():
            problem = difference(self.pool.read(found[device]), content, True)
            if problem:
                return 'disk %s by hand: %s' % (device, problem)
        return ''

    def by_hand(self, copy: str) -> Run:
        """RESTORE.txt of that copy is run as it stands, but for the file that it unpacks into: tests run side by side."""
        text = self.shelf.text(self.folder, copy, 'RESTORE.txt')
        text = text.replace('mktemp /var/tmp/', 'mktemp %s/' % self.shelf.home)
        done = subprocess.run(['sh', '-c', text], cwd=path_of(self.shelf.at(self.folder, copy)),
                              env=self.pool.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=TIME_LIMIT_S)
        return Run(done.returncode, text_of(done.stdout), text_of(done.stderr))

    # --- all of them ---

    def verify(self, *words: str) -> Run:
        return run_program('-', self.shelf.config(*self.lines), 'verify', *words)

    def all_are_good(self) -> bool:
        """Every copy's files give what the disks held, SHA256SUMS proves them with all that they need, and verify agrees."""
        for copy in self.copies():
            assert self.problem(copy) == '', copy
            assert sums_problem(self.shelf, self.folder, copy) == '', copy
        run = self.verify()
        assert run.exit_status == 0 and '%d good' % len(self.copies()) in run.stdout, run
        return True

    def all_come_back(self, is_each: bool = False) -> bool:
        """Each copy by restore; the newest by extract, and the newest increment (or each) by its RESTORE.txt, too."""
        copies = self.copies()
        assert self.extracted_problem(copies[-1]) == ''
        for copy in copies:
            assert self.restored_problem(copy) == '', copy
        made = [copy for copy in copies if is_increment(self.shelf, self.folder, copy)]
        for copy in made if is_each else made[-1:]:
            problem = self.by_hand_problem(copy)
            assert problem == '', (copy, problem, self.shelf.text(self.folder, copy, 'RESTORE.txt'))
        return True


def device_of(userdevice: str) -> str:
    return 'xvd' + chr(ord('a') + int(userdevice))


def sealed(shelf: Store, folder: str) -> List[str]:
    """The copies that bear the marker, oldest first."""
    return [name for name in shelf.names(folder) if re.fullmatch(r'backup-[-0-9]{17}', name)
            and 'success' in shelf.names(folder, name)]


def difference(found: bytes, wanted: bytes, is_imported: bool = False) -> str:
    """Where these contents of a disk differ first, in words. An import may make a disk larger, by zeros."""
    if is_imported and not found[len(wanted):].strip(b'\0'):
        found = found[:len(wanted)]
    for number in range(-(-max(len(found), len(wanted)) // MIB)):
        span = slice(number * MIB, number * MIB + MIB)
        if found[span] != wanted[span]:
            if len(found) != len(wanted) and found[span] == wanted[span][:len(found[span])]:
                break
            return 'MiB %d is not what the disk held%s' % (number, '' if found[span].strip(b'\0') else ': it is zeros')
    return '' if len(found) == len(wanted) else 'it has %d bytes instead of %d' % (len(found), len(wanted))


# --- their files ------------------------------------------------------------------------------------------------------

class Wrong(Exception):
    """A file of a copy is not what it should be."""


class Row(NamedTuple):
    number: int
    digest: str
    holder: str


def claim(is_true: Any, words: str, *values: Any) -> None:
    if not is_true:
        raise Wrong(words % values)


def is_increment(shelf: Store, folder: str, copy: str) -> bool:
    """By what lies in it: an increment has RESTORE.txt, a full has not."""
    return 'RESTORE.txt' in shelf.names(folder, copy)


def increments(shelf: Store, folder: str) -> List[bool]:
    """Of each copy, whether it is an increment."""
    return [is_increment(shelf, folder, name) for name in sealed(shelf, folder)]


def held_disks(shelf: Store, folder: str, copy: str) -> Dict[str, Dict[str, Any]]:
    """The disks of its manifest, by the name that they have in `blocks`."""
    return {disk['key']: disk for disk in shelf.manifest(folder, copy)['disks']}


def rows(shelf: Store, folder: str, copy: str) -> Dict[str, List[Row]]:
    """`blocks`, by disk; each group where the manifest says that it is, nothing outside of them."""
    content = shelf.read(folder, copy, 'blocks')
    found: Dict[str, List[Row]] = {}
    spans = [(0, content.index(b'\n') + 1)]
    for key, disk in held_disks(shelf, folder, copy).items():
        spans.append((disk['begin'], disk['end']))
        found[key] = []
        for line in content[disk['begin']:disk['end']].decode('ascii').splitlines():
            match = ROW.fullmatch(line)
            claim(match is not None and match.group(1) == key, '%s/blocks has %r among the rows of %s', copy, line, key)
            row = Row(int(match.group(2)), match.group(3), match.group(4) or '')
            claim(not found[key] or found[key][-1].number < row.number, '%s/blocks: %r is not in order', copy, line)
            claim(row.number * MIB < disk['virtual_size'], '%s/blocks: %r is behind the end of the disk', copy, line)
            found[key].append(row)
    ends = [0] + [end for _, end in sorted(spans)]
    claim([begin for begin, _ in sorted(spans)] + [len(content)] == ends, '%s/blocks has rows of no disk', copy)
    return found


def copy_problem(shelf: Store, folder: str, copy: str, held: Dict[str, bytes], disks: Optional['Disks'] = None) -> str:
    """Why the files of that copy do not give these disks, by device, however they are read; "" if they do. `disks`: what was
    read of others of that directory."""
    disks = disks or Disks(shelf, folder)
    try:
        for title, read in (('by blocks', by_blocks), ('laid over', laid_over)):
            for device, content in read(shelf, folder, copy, disks).items():
                if device not in held:
                    return '%s: there was no disk %s' % (title, device)
                found = difference(content, held[device])
                if found:
                    return '%s, disk %s: %s' % (title, device, found)
        return 'a disk is missing' if set(held_disks(shelf, folder, copy)) != set(held) else ''
    except Wrong as wrong:
        return str(wrong)


class VhdRead(NamedTuple):
    kind: int
    size: int
    blocks: Dict[int, bytes]


def read_vhd(content: bytes) -> VhdRead:
    """A dynamic or differencing VHD with blocks of 2 MiB in which all sectors of a block that is there are set."""
    footer = content[:SECTOR]
    claim(len(content) >= 2 * SECTOR and footer == content[-SECTOR:], 'the VHD does not end with its footer')
    cookie, features, version, header_at, _time, _creator, _, _os, original, size = struct.unpack('>8sIIQI4sI4sQQ', footer[:56])
    kind, total = struct.unpack('>II', footer[60:68])
    claim(cookie == b'conectix' and version == 0x10000 and features & 2, 'the footer is none')
    claim(total == ~sum(footer[:64] + footer[68:]) & NOT_THERE, 'the footer has a wrong checksum')
    claim(size % SECTOR == 0 and original == size, 'sizes of %d and %d', original, size)
    header = content[header_at:header_at + 1024]
    cookie, _, table_at, version, entries, block_bytes, total = struct.unpack('>8sQQIIII', header[:40])
    claim(cookie == b'cxsparse' and version == 0x10000 and block_bytes == VHD_BLOCK, 'the header is none')
    claim(total == ~sum(header[:36] + header[40:]) & NOT_THERE, 'the header has a wrong checksum')
    claim(entries >= -(-size // VHD_BLOCK), 'the table has %d entries for %d bytes', entries, size)
    table = struct.unpack('>%dI' % entries, content[table_at:table_at + 4 * entries])
    blocks, places = {}, []
    for number, place in enumerate(table):
        if place == NOT_THERE:
            continue
        at = place * SECTOR
        bitmap, body = content[at:at + SECTOR], content[at + SECTOR:at + SECTOR + VHD_BLOCK]
        claim(at >= max(table_at + 4 * entries, header_at + 1024) and at + SECTOR + VHD_BLOCK <= len(content) - SECTOR,
              'block %d lies outside', number)
        there = min(VHD_BLOCK, size - number * VHD_BLOCK)
        claim(there > 0, 'block %d is behind the end of the disk', number)
        bits = ''.join('{:08b}'.format(byte) for byte in bitmap)
        claim(bits == '1' * (there // SECTOR) + '0' * (4096 - there // SECTOR), 'block %d has other bits than sectors', number)
        claim(not body[there:].strip(b'\0'), 'block %d has data behind the end of the disk', number)
        blocks[number] = body[:there]
        places.append(place)
    places.sort()
    claim(all(other - one >= 4097 for one, other in zip(places, places[1:])), 'blocks overlap')
    claim(len(content) - SECTOR - sum(SECTOR + VHD_BLOCK for _ in places) <= table_at + -(-4 * entries // SECTOR) * SECTOR,
          'there is more in the VHD than its blocks')
    return VhdRead(kind, size, blocks)


def stored(shelf: Store, folder: str, copy: str, key: str) -> Tuple[bytes, str]:
    """The plain bytes of the image that has that disk, and its format."""
    manifest = shelf.manifest(folder, copy)
    names = shelf.names(folder, copy)
    for image in [manifest['image']] if 'image' in manifest else manifest['images']:
        if image.get('disk', key) == key:
            name, = [name for name in names if name in (image['name'], image['name'] + '.gz', image['name'] + '.zst')]
            return unpacked(shelf.read(folder, copy, name), name), image['format']
    raise Wrong('%s has no image of %s' % (copy, key))


class Disks:
    """What the images of copies hold, each read once."""

    def __init__(self, shelf: Store, folder: str) -> None:
        self.shelf, self.folder = shelf, folder
        self.found: Dict[Tuple[str, str], Tuple[int, int, Dict[int, bytes]]] = {}

    def of(self, copy: str, key: str) -> Tuple[int, int, Dict[int, bytes]]:
        """(type, size, contents by MiB) of that disk in that copy; 0 as type of a full."""
        if (copy, key) not in self.found:
            self.found[copy, key] = self.read(copy, key)
        return self.found[copy, key]

    def read(self, copy: str, key: str) -> Tuple[int, int, Dict[int, bytes]]:
        disk = held_disks(self.shelf, self.folder, copy)[key]
        content, form = stored(self.shelf, self.folder, copy, key)
        if form == 'xva':
            members, _ = read_tar(content)
            ours = archive_name(members[0].content, disk)
            return 0, disk['virtual_size'], {number: body for (name, number), body in blocks_of_archive(members[1:]).items()
                                             if name == ours}
        if form == 'raw':
            return 0, len(content), split(content)
        if is_increment(self.shelf, self.folder, copy):
            vhd = read_vhd(content)
        else:
            kind, size, blocks = read_full_vhd(content)
            return 0, size, blocks
        found = {}
        for number, body in vhd.blocks.items():
            for half, part in split(body).items():
                found[2 * number + half] = part
        return vhd.kind, vhd.size, found


def read_full_vhd(content: bytes) -> Tuple[int, int, Dict[int, bytes]]:
    """A VHD as the server exports it: sectors whose bit is not set are zeros."""
    size, = struct.unpack('>Q', content[48:56])
    table_at, _, entries = struct.unpack('>QII', content[512 + 16:512 + 32])
    found = {}
    for number, place in enumerate(struct.unpack('>%dI' % entries, content[table_at:table_at + 4 * entries])):
        if place != NOT_THERE:
            bits = ''.join('{:08b}'.format(byte) for byte in content[place * SECTOR:place * SECTOR + SECTOR])
            body = bytearray(content[(place + 1) * SECTOR:(place + 1) * SECTOR + VHD_BLOCK])
            for sector, bit in enumerate(bits):
                if bit == '0':
                    body[sector * SECTOR:sector * SECTOR + SECTOR] = bytes(SECTOR)
            for half, part in split(bytes(body)).items():
                found[2 * number + half] = part
    return 3, size, found


def split(content: bytes) -> Dict[int, bytes]:
    return {number: content[number * MIB:number * MIB + MIB] for number in range(-(-len(content) // MIB))}


def archive_name(ova: bytes, disk: Dict[str, Any]) -> str:
    """What the disk with that snapshot uuid is called in the archive."""
    for item in value_of(ElementTree.fromstring(ova))['objects']:
        if item['class'] == 'VDI' and item['snapshot']['uuid'] == disk['snapshot_uuid']:
            return item['id']
    raise Wrong('the archive has no disk %s' % disk['key'])


def by_blocks(shelf: Store, folder: str, copy: str, disks: Optional[Disks] = None) -> Dict[str, bytes]:
    """The disks as `blocks` says: every row from the copy that holds it, every digest right, all else zeros."""
    disks, found = disks or Disks(shelf, folder), {}
    named = set()
    for key, listed in rows(shelf, folder, copy).items():
        size = held_disks(shelf, folder, copy)[key]['virtual_size']
        content = bytearray(size)
        for row in listed:
            holder = row.holder or copy
            claim(row.holder != copy, '%s names itself', copy)
            named.add(holder)
            claim(holder in shelf.names(folder), '%s, which holds MiB %d of %s, is not there', holder, row.number, key)
            kind, _, blocks = disks.of(holder, key)
            there = min(MIB, size - row.number * MIB)
            body = blocks.get(row.number, bytes(there) if not kind else b'')[:there]
            claim(len(body) == there, '%s holds no MiB %d of %s', holder, row.number, key)
            if row.digest == 'zero':
                claim(not body.strip(b'\0'), 'MiB %d of %s is not zeros in %s', row.number, key, holder)
            else:
                claim(body.strip(b'\0'), 'MiB %d of %s has a digest and is zeros', row.number, key)
                claim(hashlib.blake2b(body, digest_size=16).hexdigest() == row.digest,
                      'MiB %d of %s has another digest in %s', row.number, key, holder)
            content[row.number * MIB:row.number * MIB + there] = body
        found[key] = bytes(content)
    if is_increment(shelf, folder, copy):
        told = {holder['copy'] for holder in shelf.manifest(folder, copy)['layer']['holders']}
        full = shelf.manifest(folder, copy)['layer']['full']
        claim(named | {full} == told | {copy} or named | {full, copy} == told | {copy},
              'its manifest names %s, its blocks %s', sorted(told), sorted(named))
    return found


def chain(shelf: Store, folder: str, copy: str) -> List[str]:
    """The copies that its manifest names, in order, and itself."""
    layer = shelf.manifest(folder, copy)['layer']
    return [holder['copy'] for holder in sorted(layer['holders'], key=lambda holder: holder['sequence'])] + [copy]


def laid_over(shelf: Store, folder: str, copy: str, disks: Optional[Disks] = None) -> Dict[str, bytes]:
    """The disks as they come when only the copies that it names are laid over each other, whole files at a time; where a disk is
    that of the full still, the full in any case, as a restore by hand begins with it."""
    disks, found = disks or Disks(shelf, folder), {}
    for key, disk in held_disks(shelf, folder, copy).items():
        content = bytearray(disk['virtual_size'])
        full = shelf.manifest(folder, copy)['layer']['full']
        named = {copy} | set(disk['holders']) | ({full} if disk['since'] == full else set())
        for holder in chain(shelf, folder, copy):
            if key not in held_disks(shelf, folder, holder) or holder not in named:
                continue
            kind, size, blocks = disks.of(holder, key)
            claim(holder != copy or not is_increment(shelf, folder, copy) or kind in (3, 4), '%s: type %d', holder, kind)
            for number, body in blocks.items():
                body = body[:max(0, len(content) - number * MIB)]
                content[number * MIB:number * MIB + len(body)] = body
        found[key] = bytes(content)
    return found


def sums_problem(shelf: Store, folder: str, copy: str) -> str:
    """What `sha256sum -c SHA256SUMS` says where it does not say OK."""
    done = subprocess.run(['sha256sum', '-c', '--quiet', 'SHA256SUMS'], cwd=path_of(shelf.at(folder, copy)),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return '' if done.returncode == 0 else text_of(done.stdout)
