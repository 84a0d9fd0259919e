"""A reader of backups that owes nothing to the program: whether a copy holds what POOL.json says its disks hold.

MiB block i of a disk is the 32 bytes SHA-256(ASCII "<seed>:<i>:<generation>") repeated (tests/simpool). The generation of
a block is how often a guest wrote data to it before the snapshot; one that it wrote zeros to last is zeros.
"""

import hashlib
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from typing import Any, Dict, Iterable, Iterator, List, Set, Tuple

from support.archive import read_tar
from support.shelf import unpacked

MEBIBYTE = 1 << 20
COPY = re.compile(r'backup-\d{4}-\d\d-\d\d-\d{6}')
DUMP = re.compile(r'pool_db_\d{8}-\d{6}\.dump')


def block_of(disk: Dict[str, Any], number: int, generation: int) -> bytes:
    """MiB block `number` of a disk of POOL.json."""
    extents = disk['used'] if isinstance(disk['used'], list) else [[0, disk['used']]]
    size = min(MEBIBYTE, disk['size'] - number * MEBIBYTE)
    if not generation and not any(first <= number < first + count for first, count in extents):
        return bytes(size)
    seed = '%d:%d:%d' % (disk.get('seed', 0), number, generation)
    return (hashlib.sha256(seed.encode('ascii')).digest() * (MEBIBYTE // 32))[:size]


#: What a guest writes to a block: data that it never held, or zeros.
DATA, ZEROS = 'd', '0'


def blocks_of(disk: Dict[str, Any], writes: Dict[int, str]) -> Iterator[bytes]:
    """All blocks; `writes`: what a guest wrote to a block, one after the other."""
    for number in range(-(-disk['size'] // MEBIBYTE)):
        block = block_of(disk, number, writes.get(number, '').count(DATA))
        yield bytes(len(block)) if writes.get(number, '').endswith(ZEROS) else block


# --- what stands in a store -------------------------------------------------------------------------------------------

def shown_copies(store: str) -> Set[Tuple[str, str]]:
    """(VM, copy) of everything that a person would take for a good copy: its name, the marker and an image."""
    found = set()
    for name in os.listdir(store):
        folder = os.path.join(store, name)
        if name.startswith(('.', 'METADATA_')) or not os.path.isdir(folder):
            continue
        found |= {(name, copy) for copy in os.listdir(folder)
                  if COPY.fullmatch(copy) and os.path.exists(os.path.join(folder, copy, 'success'))}
    return found


def shown_dumps(store: str) -> Set[Tuple[str, str]]:
    """(directory, name) of every pool dump."""
    return {(name, dump) for name in os.listdir(store) if name.startswith('METADATA_')
            for dump in os.listdir(os.path.join(store, name)) if DUMP.fullmatch(dump)}


def unfinished(store: str) -> List[str]:
    """Everything that a run has not finished, or is removing."""
    return sorted(os.path.relpath(os.path.join(folder, name), store) for folder, folders, files in os.walk(store)
                  for name in folders + files if name.endswith(('.partial', '.deleting')))


def sealed_files(store: str, copies: Iterable[Tuple[str, str]]) -> Dict[Tuple[str, str], Dict[str, str]]:
    """The SHA-256 of every file of these copies, by its path in the copy."""
    return {(name, copy): digests(os.path.join(store, name, copy)) for name, copy in copies}


def digests(top: str) -> Dict[str, str]:
    """The SHA-256 of every file below that directory, by path, but of the program's own state."""
    found = {}
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if name != '.vmbackup']
        for name in files:
            path = os.path.join(folder, name)
            found[os.path.relpath(path, top)] = hashlib.sha256(content_of(path)).hexdigest()
    return found


# --- whether it is true -----------------------------------------------------------------------------------------------

def dump_problem(path: str) -> str:
    """Why that is no whole pool dump; "" if it is one."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        return 'is not XML: %s' % error
    return '' if root.tag == 'database' else 'is a %s' % root.tag


def copy_problem(path: str, disks: Dict[str, Dict[str, Any]], writes: Dict[str, Dict[int, str]]) -> str:
    """Why that copy has not all its files as SHA256SUMS tells them, or its image does not hold these disks (by userdevice),
    with these writes; "" if all is well. The contents of VHDs, and so of increments, are for layers.py."""
    try:
        with open(os.path.join(path, 'SHA256SUMS'), encoding='utf-8') as file:
            for line in file.read().splitlines():
                digest, _, name = line.partition('  ')
                if hashlib.sha256(content_of(os.path.join(path, name))).hexdigest() != digest:
                    return '%s has another SHA-256 than SHA256SUMS says' % name
        manifest = json.loads(content_of(os.path.join(path, 'backup.json')).decode('utf-8'))
        for name in ['vm.cfg', 'vm-metadata.xml', 'blocks'] + ['DISK-xvd%s/vdi.cfg' % 'ab'[int(device)] for device in disks]:
            content_of(os.path.join(path, name))
        if 'image' not in manifest:
            content_of(os.path.join(path, 'RESTORE.txt'))
            devices = set(archive_devices(content_of(os.path.join(path, 'ova.xml')))) \
                if manifest['kind'] == 'vm-export' else set(disks)
            return '' if devices == set(disks) else 'its ova.xml has the disks %s' % sorted(devices)
        image = manifest['image']
        stored = unpacked(content_of(os.path.join(path, image['name'])), image['name'])
        if image['format'] == 'vhd':
            return ''
        if image['format'] == 'raw':
            return raw_problem(stored, disks['0'], writes.get('0', {}))
        return archive_problem(stored, disks, writes)
    except (OSError, ValueError, KeyError, ElementTree.ParseError) as error:
        return '%s: %s' % (type(error).__name__, error)


def content_of(path: str) -> bytes:
    with open(path, 'rb') as file:
        return file.read()


def raw_problem(stored: bytes, disk: Dict[str, Any], writes: Dict[int, str]) -> str:
    if len(stored) != disk['size']:
        return 'the raw image has %d bytes instead of %d' % (len(stored), disk['size'])
    for number, block in enumerate(blocks_of(disk, writes)):
        if stored[number * MEBIBYTE:(number + 1) * MEBIBYTE] != block:
            return 'MiB %d of the raw image is not what the disk held' % number
    return ''


def archive_problem(stored: bytes, disks: Dict[str, Dict[str, Any]], writes: Dict[str, Dict[int, str]]) -> str:
    members, rest = read_tar(stored)
    if rest != bytes(1024):
        return 'the archive ends with %d bytes that are not its end' % len(rest)
    if members[0].name != 'ova.xml':
        return 'the archive begins with %s' % members[0].name
    blocks = blocks_of_archive(members[1:])
    devices = archive_devices(members[0].content)
    if set(devices) != set(disks):
        return 'the archive has the disks %s' % sorted(devices)
    for device, disk in disks.items():
        for number, block in enumerate(blocks_of(disk, writes.get(device, {}))):
            if blocks.pop((devices[device], number), bytes(len(block))) != block:
                return 'block %d of disk %s is not what the disk held' % (number, device)
    return 'the archive has blocks of no disk: %s' % sorted(blocks) if blocks else ''


def blocks_of_archive(members: Any) -> Dict[Tuple[str, int], bytes]:
    """What the archive holds, by disk and MiB. An empty block, which xapi sends when a disk is slow, takes a number and no
    room: those behind it stand a MiB earlier than their numbers say."""
    blocks = {}  # type: Dict[Tuple[str, int], bytes]
    empty = {}   # type: Dict[str, int]
    for member in members:
        name, _, number = member.name.partition('/')
        if number.isdigit() and member.content:
            blocks[name, int(number) - empty.get(name, 0)] = member.content
        elif number.isdigit():
            empty[name] = empty.get(name, 0) + 1
    return blocks


def archive_devices(ova: bytes) -> Dict[str, str]:
    """userdevice -> name of the disk inside the archive."""
    devices = {}
    for item in value_of(ElementTree.fromstring(ova))['objects']:
        if item['class'] == 'VBD' and item['snapshot']['type'] == 'Disk':
            devices[item['snapshot']['userdevice']] = item['snapshot']['VDI']
    return devices


def value_of(element: Any) -> Any:
    """The value of an XML-RPC <value>."""
    kinds = list(element)
    if not kinds:
        return element.text or ''
    kind = kinds[0]
    if kind.tag == 'struct':
        return {member.find('name').text: value_of(member.find('value')) for member in kind}
    if kind.tag == 'array':
        return [value_of(value) for value in kind.find('data')]
    return kind.text or ''
