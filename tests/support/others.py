"""Images as other programs write them: XVAs of Xen Orchestra and others, exports that tar packed anew, VHDs of every layout.

Own code: only the layout is theirs. The VM of every archive is 'from elsewhere', with two disks of 5 and 3 MiB.
"""

import hashlib
import io
import struct
import tarfile
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

MIB = 1 << 20
NULL = 'OpaqueRef:NULL'
SIZES = (5 * MIB, 3 * MIB)
NAME = 'from elsewhere'


def mebibyte(disk: int, number: int) -> bytes:
    """The content of that MiB of the disk: some are zeros."""
    if (disk, number) in ((0, 1), (0, 2), (0, 3), (1, 1)):
        return bytes(MIB)
    return hashlib.sha256(b'%d %d' % (disk, number)).digest() * (MIB // 32)


def contents(disk: int) -> bytes:
    """All of the disk."""
    return b''.join(mebibyte(disk, number) for number in range(SIZES[disk] // MIB))


# --- XVA -------------------------------------------------------------------------------------------------------------

class Ids:
    """What the objects are called in the file."""

    def __init__(self, form: str = 'Ref:%d', disks: Sequence[str] = ()) -> None:
        self.vm, self.sr, self.network, self.vif = (form % number for number in (0, 1, 6, 7))
        self.vdis = list(disks) or [form % 2, form % 4]
        self.vbds = [form % 3, form % 5]


def objects(ids: Ids) -> List[Dict[str, Any]]:
    """The objects of ova.xml, with all that the server's importer looks at."""
    machine = dict(
        uuid='0f0f0f0f-1111-4222-8333-444444444444', power_state='Halted', name_label=NAME, name_description='made elsewhere',
        user_version='1', is_a_template=False, suspend_VDI=NULL, resident_on=NULL, affinity=NULL, memory_target='0',
        memory_static_max='1073741824', memory_dynamic_max='1073741824', memory_dynamic_min='1073741824',
        memory_static_min='1073741824', VCPUs_params={}, VCPUs_max='2', VCPUs_at_startup='2', actions_after_shutdown='destroy',
        actions_after_reboot='restart', actions_after_crash='restart', VIFs=[ids.vif], VBDs=ids.vbds, PV_bootloader='',
        PV_kernel='', PV_ramdisk='', PV_args='', PV_bootloader_args='', PV_legacy_args='', HVM_boot_policy='BIOS order',
        HVM_boot_params={'order': 'cd'}, HVM_shadow_multiplier=1.0, platform={'acpi': '1'}, PCI_bus='', recommendations='',
        other_config={'mac_seed': '7a7a7a7a-1111-4222-8333-555555555555'}, is_control_domain=False, guest_metrics=NULL,
        is_a_snapshot=False, snapshot_of=NULL, snapshots=[], snapshot_time=Date('19700101T00:00:00Z'), tags=[], version='0',
        blocked_operations={}, parent=NULL, children=[], ha_always_run=False, ha_restart_priority='')
    found = [{'class': 'VM', 'id': ids.vm, 'snapshot': machine},
             {'class': 'SR', 'id': ids.sr, 'snapshot': dict(uuid='5e5e5e5e-1111-4222-8333-666666666666', name_label='Local storage',
                                                            content_type='user', type='ext', VDIs=ids.vdis)}]
    for number, size in enumerate(SIZES):
        found.append({'class': 'VDI', 'id': ids.vdis[number], 'snapshot': dict(
            uuid='d15c000%d-1111-4222-8333-777777777777' % number, name_label='disk %d' % number, name_description='', SR=ids.sr,
            VBDs=[ids.vbds[number]], virtual_size=str(size), type='user', sharable=False, read_only=False, other_config={},
            location='x', xenstore_data={}, sm_config={}, is_a_snapshot=False, snapshot_of=NULL, tags=[])})
        found.append({'class': 'VBD', 'id': ids.vbds[number], 'snapshot': dict(
            uuid='b0b0000%d-1111-4222-8333-888888888888' % number, VM=ids.vm, VDI=ids.vdis[number], device='xvd' + 'ab'[number],
            userdevice=str(number), bootable=not number, mode='RW', type='Disk', unpluggable=False, empty=False, other_config={},
            currently_attached=False, qos_algorithm_type='', qos_algorithm_params={})})
    found.append({'class': 'network', 'id': ids.network, 'snapshot': dict(
        uuid='4e700000-1111-4222-8333-999999999999', name_label='LAN', bridge='xenbr0', VIFs=[ids.vif])})
    found.append({'class': 'VIF', 'id': ids.vif, 'snapshot': dict(
        uuid='71f00000-1111-4222-8333-aaaaaaaaaaaa', VM=ids.vm, network=ids.network, device='0', MAC='aa:00:04:00:0a:01',
        MTU='1500', other_config={}, qos_algorithm_type='', qos_algorithm_params={}, locking_mode='network_default',
        ipv4_allowed=[], ipv6_allowed=[], ipv4_configuration_mode='None', ipv4_addresses=[], ipv4_gateway='')})
    return found


class Date(str):
    """A time in ova.xml."""


def xml(value: Any) -> str:
    """The value as XML-RPC."""
    if isinstance(value, dict):
        return '<value><struct>%s</struct></value>' % ''.join(
            '<member><name>%s</name>%s</member>' % (key, xml(item)) for key, item in value.items())
    if isinstance(value, list):
        return '<value><array><data>%s</data></array></value>' % ''.join(map(xml, value))
    if isinstance(value, bool):
        return '<value><boolean>%d</boolean></value>' % value
    if isinstance(value, float):
        return '<value><double>%g</double></value>' % value
    if isinstance(value, Date):
        return '<value><dateTime.iso8601>%s</dateTime.iso8601></value>' % value
    return '<value>%s</value>' % value


def ova(found: List[Dict[str, Any]]) -> bytes:
    """The text of ova.xml."""
    version = dict(hostname='localhost', date='2016-05-11', product_version='7.0.0', product_brand='XenServer',
                   build_number='125380c', xapi_major='1', xapi_minor='9', export_vsn='2')
    return xml({'version': version, 'objects': found}).encode()


def header(name: str, size: int, style: str) -> bytes:
    """A tar header: as the server writes it (V7), or as tar-stream of Node does (ustar)."""
    block = bytearray(512)
    block[:len(name)] = name.encode()
    block[100:148] = b'0000000\0' * 3 + b'%011o\0%011o\0' % (size, 0)
    if style == 'ustar':
        block[100:148] = b'000644 \0' + b'000000 \0' * 2 + b'%011o %011o ' % (size, 1700000000)
        block[156:157], block[257:265] = b'0', b'ustar\x0000'
    block[148:156] = b' ' * 8
    block[148:156] = b'%06o\0 ' % sum(block)
    return bytes(block)


def member(name: str, content: bytes, style: str = 'v7') -> bytes:
    return header(name, len(content), style) + content + bytes(-len(content) % 512)


def blocks(disk: int, ident: str, digits: int = 8) -> Iterator[Tuple[str, bytes]]:
    """Names and contents of the members of a disk: MiBs of zeros in its middle are left out."""
    for number in range(SIZES[disk] // MIB):
        content = mebibyte(disk, number)
        if content.strip(b'\0') or number in (0, SIZES[disk] // MIB - 1):
            name = '%s/%0*d' % (ident, digits, number)
            yield name, content
            yield name + '.checksum', hashlib.sha1(content).hexdigest().encode()


def xva(style: str = 'v7', tail: int = 1024, digits: int = 8, ids: Optional[Ids] = None, order: Sequence[int] = (0, 1),
        found: Optional[List[Dict[str, Any]]] = None) -> bytes:
    """An archive; `tail`: zeros at its end."""
    ids = ids or Ids()
    parts = [member('ova.xml', ova(objects(ids) if found is None else found), style)]
    for disk in order:
        parts += [member(name, content, style) for name, content in blocks(disk, ids.vdis[disk], digits)]
    return b''.join(parts) + bytes(tail)


def packed_again(form: int, prefix: str = '', before: Sequence[str] = (), files: Sequence[str] = ()) -> bytes:
    """An export that was unpacked and packed again with a tar program, with directories and files of its own."""
    made = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(xva())) as source, tarfile.open(fileobj=made, mode='w', format=form) as target:
        for name in before:
            folder = tarfile.TarInfo(name)
            folder.type = tarfile.DIRTYPE
            target.addfile(folder)
        for item in source:
            plain = tarfile.TarInfo(prefix + item.name)
            plain.size, plain.mtime = item.size, 1700000000.25 if form == tarfile.PAX_FORMAT else 1700000000
            target.addfile(plain, source.extractfile(item))
        for name in files:
            stranger = tarfile.TarInfo(name)
            stranger.size = 700
            target.addfile(stranger, io.BytesIO(b'x' * 700))
    return made.getvalue()


def orchestra() -> bytes:
    """As Xen Orchestra writes one for a VM of another hypervisor: few fields, references to nothing."""
    ids = Ids('Ref:%03d')
    found = objects(ids)
    for one in found:
        record = one['snapshot']
        if one['class'] == 'VDI':
            record['vbds'] = record.pop('VBDs')
            for field in ('name_description', 'location', 'sm_config'):
                del record[field]
        elif one['class'] == 'VM':
            record.update(power_state='halted', affinity='Ref:53', guest_metrics='Ref:53', resident_on='Ref:53')
    return xva('ustar', ids=ids, found=found)


def geneva() -> bytes:
    """An XVA of version 1."""
    text = b'<?xml version="1.0" ?>\n<appliance version="0.1">\n<vm name="vm"><label>old one</label></vm>\n</appliance>\n'
    return member('ova.xml', text, 'ustar') + member('xvda/chunk-000000000.gz', b'x' * 900, 'ustar') + bytes(1024)


def metadata_only() -> bytes:
    return member('ova.xml', ova(objects(Ids()))) + bytes(1024)


# --- VHD -------------------------------------------------------------------------------------------------------------

def summed(structure: bytes, at: int) -> bytes:
    """The structure with its checksum at that place."""
    plain = structure[:at] + bytes(4) + structure[at + 4:]
    return plain[:at] + struct.pack('>I', ~sum(plain) & 0xFFFFFFFF) + plain[at + 4:]


def vhd_footer(size: int, kind: int = 3, creator: bytes = b'qemu', header_at: int = 512, original: int = 0) -> bytes:
    return summed(struct.pack('>8sIIQI4sIIQQHBBI4x16s', b'conectix', 2, 0x10000, header_at, 0x20000000, creator, 0x50003,
                              0x5769326b, original or size, size, 12, 16, 63, kind, bytes(range(1, 17))).ljust(512, b'\0'), 64)


class Vhd:
    """A dynamic VHD: `content` of its blocks by number, its parts one behind the other in the order of `layout`
    (header, table, batmap, gap, numbers of blocks); `sectors` of a block: those whose bit is set, all if it is not named."""

    def __init__(self, size: int, content: Dict[int, bytes], layout: Sequence[Union[str, int]], block_bytes: int = 2 * MIB,
                 spare: int = 0, sectors: Optional[Dict[int, Sequence[int]]] = None, whole: Sequence[int] = (),
                 creator: bytes = b'qemu', short: bool = False, kind: int = 3) -> None:
        self.size, self.block_bytes, self.content, self.sectors = size, block_bytes, content, sectors or {}
        entries = -(-size // block_bytes) + spare
        bitmap_bytes = -(-block_bytes // 512 // 8 // 512) * 512
        lengths = {'header': 1024, 'table': -(-entries * 4 // 512) * 512, 'batmap': 1024, 'gap': 4096}
        at, places = 512, {}                                # type: int, Dict[Any, int]
        for part in layout:
            places[part] = at
            at += lengths[part] if isinstance(part, str) else bitmap_bytes + block_bytes
        footer = vhd_footer(size, kind, creator, places['header'], original=size + 512)
        made = bytearray(footer + bytes(at - 512))
        made[places['header']:places['header'] + 1024] = summed(struct.pack(
            '>8sQQIII', b'cxsparse', 2 ** 64 - 1, places['table'], 0x10000, entries, block_bytes).ljust(1024, b'\0'), 36)
        table = [places[number] // 512 if number in places else 0xFFFFFFFF for number in range(entries)]
        made[places['table']:places['table'] + lengths['table']] = struct.pack('>%dI' % entries, *table).ljust(
            lengths['table'], b'\xff')
        if 'batmap' in places:
            bits = bytearray(512)
            for number in whole:
                bits[number // 8] |= 0x80 >> number % 8
            made[places['batmap']:places['batmap'] + 1024] = struct.pack(
                '>8sQIII', b'tdbatmap', places['batmap'] + 512, 1, 0x10002, ~sum(bits) & 0xFFFFFFFF).ljust(512, b'\0') + bits
        for number, body in content.items():
            bits = bytearray(b'\xff' * bitmap_bytes if number not in self.sectors else bitmap_bytes)
            for sector in self.sectors.get(number, ()):
                bits[sector // 8] |= 0x80 >> sector % 8
            made[places[number]:places[number] + bitmap_bytes + block_bytes] = bits + body
        self.whole = whole if creator == b'tap\0' and 'batmap' in places else ()
        self.file = bytes(made) + footer[:511 if short else 512]

    def disk(self) -> bytes:
        """What the disk holds."""
        raw = bytearray(-(-self.size // self.block_bytes) * self.block_bytes)
        for number, body in self.content.items():
            for sector in range(self.block_bytes // 512):
                if number in self.whole or number not in self.sectors or sector in self.sectors[number]:
                    at = number * self.block_bytes + sector * 512
                    raw[at:at + 512] = body[sector * 512:sector * 512 + 512]
        return bytes(raw[:self.size])


def fixed_vhd(raw: bytes) -> bytes:
    return raw + vhd_footer(len(raw), 2, header_at=2 ** 64 - 1)
