"""Exports of the simulated pool against the recorded files: members, blocks, digests, headers."""

import gzip
import hashlib
import re
import shutil
import struct
import subprocess
import xml.etree.ElementTree as ElementTree
from typing import Any, Dict

import recordings
from comparison import Comparison, label, parse_value
from support.archive import Member, read_tar

SECTOR_BYTES = 512
BLOCK_BYTES = 1 << 20

# The disks of PROD-web: what the recorded guest had written, as tests/simpool defines contents.
ROOT_DISK = {'size': 10485760, 'used': [[0, 3], [8, 1]], 'seed': 11}
DATA_DISK = {'size': 6291456, 'used': [[0, 2]], 'seed': 12}


def compare(kind: str, simulated: bytes, comparison: Comparison) -> None:
    """The export that the recording calls `kind` (PROD-web.xva, .xva.gz, .xva.zst, .raw, .vhd, -metadata.xva)."""
    if kind == 'PROD-web.raw':
        compare_bytes(disk_content(ROOT_DISK), simulated, 'raw image', comparison)
    elif kind == 'PROD-web.vhd':
        compare_vhd(recordings.unpacked('PROD-web.vhd.gz'), simulated, comparison)
    elif kind == 'PROD-web-metadata.xva':
        compare_xva(recordings.file_content(kind), simulated, comparison)
    else:
        compare_xva(recordings.unpacked('PROD-web.xva.gz'), unpack(kind, simulated, comparison), comparison)


def unpack(kind: str, content: bytes, comparison: Comparison) -> bytes:
    if kind.endswith('.gz'):
        # The recorded stream has no stored name, the default level and this system's mark: ten bytes that never vary.
        compare_bytes(recordings.file_content(kind)[:10], content[:10], 'gzip header', comparison)
        return gzip.decompress(content)
    if kind.endswith('.zst'):
        compare_bytes(recordings.file_content(kind)[:4], content[:4], 'zstd magic', comparison)
        return zstd('-d', content)
    return content


def zstd(option: str, content: bytes) -> bytes:
    return subprocess.run([shutil.which('zstd') or 'zstd', option, '-c', '-q'], input=content, stdout=subprocess.PIPE,
                          check=True).stdout


def fed(name: str) -> bytes:
    """What a recorded restore was fed with."""
    archive = recordings.unpacked('PROD-web.xva.gz')
    contents = {
        'plain': archive, 'preserve': archive, 'unknown-sr': archive,
        'gzip': recordings.file_content('PROD-web.xva.gz'), 'zstd': recordings.file_content('PROD-web.xva.zst'),
        'truncated': archive[:5000000], 'garbage': b'this is not an XVA' * 1000, 'empty': b'',
        'flipped-bit': archive[:200000] + bytes([archive[200000] ^ 1]) + archive[200001:],
        'metadata': recordings.file_content('PROD-web-metadata.xva'),
        'raw-pipe-short': disk_content(ROOT_DISK)[:5242880], 'raw-pipe': disk_content(ROOT_DISK),
        'vhd': recordings.unpacked('PROD-web.vhd.gz')}
    return next(content for word, content in contents.items() if word in name)


def disk_content(disk: Dict[str, Any]) -> bytes:
    blocks = [bytes(BLOCK_BYTES)] * (disk['size'] // BLOCK_BYTES)
    for first, count in disk['used']:
        for number in range(first, first + count):
            digest = hashlib.sha256(('%d:%d:0' % (disk['seed'], number)).encode('ascii')).digest()
            blocks[number] = digest * (BLOCK_BYTES // len(digest))
    return b''.join(blocks)


def compare_bytes(recorded: bytes, simulated: bytes, path: str, comparison: Comparison) -> None:
    if recorded == simulated:
        return
    if len(recorded) != len(simulated):
        comparison.note(path + ' (length)', len(recorded), len(simulated))
    place = next((index for index, (left, right) in enumerate(zip(recorded, simulated)) if left != right), None)
    if place is not None:
        comparison.note('%s at byte %d' % (path, place), recorded[place:place + 32], simulated[place:place + 32])


# --- VHD ------------------------------------------------------------------------------------------------------------

def compare_vhd(recorded: bytes, simulated: bytes, comparison: Comparison) -> None:
    """Byte for byte, but for the footer's uuid, which is new each time, and so its checksum."""
    for content in (recorded, simulated):
        footer = content[-SECTOR_BYTES:]
        if content[:SECTOR_BYTES] != footer:
            comparison.note('VHD footer and its copy', content[:SECTOR_BYTES], footer)
            return
        expected = ~(sum(footer) - sum(footer[64:68])) & 0xFFFFFFFF
        if struct.unpack('>I', footer[64:68])[0] != expected:
            comparison.note('VHD footer checksum', expected, footer[64:68])
    compare_bytes(without_uuid(recorded), without_uuid(simulated), 'VHD', comparison)


def without_uuid(content: bytes) -> bytes:
    footer = content[:64] + bytes(20) + content[84:SECTOR_BYTES]
    return footer + content[SECTOR_BYTES:-SECTOR_BYTES] + footer


# --- XVA ------------------------------------------------------------------------------------------------------------

def compare_xva(recorded: bytes, simulated: bytes, comparison: Comparison) -> None:
    """Same members with the same headers and contents, but for what ova.xml says differently and the disks' ids."""
    ours, ending = read_tar(recorded)
    theirs, their_ending = read_tar(simulated)
    compare_bytes(ending, their_ending, 'end of the archive', comparison)
    ids = compare_ova(ours[0].content.decode('utf-8'), theirs[0].content.decode('utf-8'), comparison)
    comparison.lines([describe(member, ids) for member in ours[1:]], [describe(member, {}) for member in theirs[1:]],
                     'members')
    left, right = ours[0]._replace(content=b'', size=0), theirs[0]._replace(content=b'', size=0)
    comparison.lines([describe(left, ids)], [describe(right, {})], 'member ova.xml')


def describe(member: Member, ids: Dict[str, str]) -> str:
    content = member.content.decode('ascii') if 0 < member.size <= 40 else hashlib.sha256(member.content).hexdigest()
    folder, slash, name = member.name.partition('/')
    return '%s mode=%r uid=%r gid=%r size=%d kind=%r magic=%r %s' % (
        ids.get(folder, folder) + slash + name, member.mode, member.uid, member.gid, member.size, member.kind,
        member.magic, content)


def compare_ova(recorded: str, simulated: str, comparison: Comparison) -> Dict[str, str]:
    """Returns which `Ref:N` of the simulated archive stands for which of the recorded one."""
    if not simulated.startswith('<value><struct><member><name>version</name>') or simulated[-1] != '>':
        comparison.note('ova.xml', recorded, simulated)
    ours, theirs = (parse_value(ElementTree.fromstring(text)) for text in (recorded, simulated))
    comparison.value(ours['version'], theirs['version'], 'ova.xml.version')
    kinds = [[item['class'] for item in value['objects']] for value in (ours, theirs)]
    comparison.lines(kinds[0], kinds[1], 'ova.xml classes')
    left = {item['id']: item for item in ours['objects']}
    right = {item['id']: item for item in theirs['objects']}
    ids: Dict[str, str] = {}
    for ref, item in left.items():
        same = [other for other, candidate in right.items() if other not in ids.values()
                and title(candidate, right) == title(item, left)]
        if same:
            ids[ref] = same[0]
        else:
            comparison.note('ova.xml.<%s>' % title(item, left), ref, 'no such object')
    for ref in sorted(set(right) - set(ids.values())):
        comparison.note('ova.xml.<%s>' % title(right[ref], right), 'no such object', ref)
    for ref in ids:
        comparison.value(translated(left[ref]['snapshot'], ids),
                         translated(right[ids[ref]]['snapshot'], {other: other for other in right}),
                         'ova.xml.<%s>' % title(left[ref], left))
    return ids


def title(item: Dict[str, Any], items: Dict[str, Dict[str, Any]]) -> str:
    """The class and what tells the object from the others of it; metrics by the VM that they belong to."""
    name = label(item['snapshot'], lambda ref: items[ref]['snapshot'] if ref in items else None)
    if not name:
        owners = [other['snapshot']['name_label'] for other in items.values() if other['class'] == 'VM'
                  and item['id'] in (other['snapshot']['metrics'], other['snapshot']['guest_metrics'])]
        name = ' '.join(owners)
    return '%s %s' % (item['class'], name)


def translated(value: Any, ids: Dict[str, str]) -> Any:
    """The value with the ids that the simulated archive has for the same objects. The real server gives an id also
    to a host that it then leaves out of the archive: one that stands for nothing there."""
    if type(value) is str:
        return re.sub(r'\bRef:\d+', lambda match: ids.get(match.group(), 'Ref:outside'), value)
    if isinstance(value, dict):
        return type(value)((translated(key, ids), translated(item, ids)) for key, item in value.items())
    if isinstance(value, list):
        return [translated(item, ids) for item in value]
    return value
