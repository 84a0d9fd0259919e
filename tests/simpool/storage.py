"""What is on the storage repositories: the contents of disks, and how much space they take.

Nothing is stored for a disk that nobody imported: MiB block i of a disk is the SHA-256 of "<seed>:<i>:<generation>",
repeated, if it was ever written, and zeros if not. So a disk of 2 TiB costs nothing, and anyone can compute what a restored
disk must hold. What an import writes is kept in sparse files, one per disk and "layer": a snapshot freezes the layers it
was made at, and the next write goes to a new one.

Beside what a block holds stands which file has it. On an SR of VHDs a disk is a chain of files: a snapshot freezes the file
that the disk was written to, and disk and copy go on in empty ones of their own (sm, FileSR.py and LVHDSR.py _snapshot). An
export of a difference goes by these files alone (`changed_blocks`). That the storage manager coalesces files changes nothing
there: it lays one over its parent only where no other chain has the parent, so both were in the same chains (sm, cleanup.py).

Storage is not the database. When a fault makes the server lose its last seconds, what is on the SR stays.
"""

import bisect
import hashlib
import os
from typing import Any, Callable, Dict, FrozenSet, Iterable, Iterator, List, Optional, Set, Tuple, Union

MIB = 1024 * 1024
_ZEROS = bytes(MIB)
#: A block of a VHD, in blocks of a disk.
VHD_BLOCK_MIB = 2

#: SRs whose disks are allocated whole (LVHD on LVM): the live disk takes its virtual size, a snapshot what was written.
THICK_TYPES = ("lvm", "lvmoiscsi", "lvmohba", "lvmofcoe")
#: SRs whose disks are VHDs (sm, of 2026-04).
VHD_TYPES = THICK_TYPES + ("ext", "nfs", "smb", "xfs", "cephfs", "glusterfs", "largeblock", "file")

#: What a block is, if not what the disk was born with: an int is a generation (a guest wrote it), below 0 one of zeros; a str
#: is the layer file that holds it (an import wrote it), ZERO that an import wrote zeros. Zeros of a guest take space, as
#: tapdisk allocates whatever is written; each time they have a number of their own, so that no two versions look like one.
Mark = Union[int, str]
ZERO = ""


def kinds_of_type(sr_type: str) -> List[str]:
    """What an SR of that type is of `thick` and `vhd`."""
    return [kind for kind, types in (("thick", THICK_TYPES), ("vhd", VHD_TYPES)) if sr_type in types]


def extents_of(used: Any) -> List[Tuple[int, int]]:
    """`used` of POOL.json, [[first MiB, number of MiB], ...] or a number, as sorted and merged (first, end) pairs."""
    if isinstance(used, int):
        used = [[0, used]] if used else []
    merged = []  # type: List[Tuple[int, int]]
    for first, count in sorted((first, count) for first, count in used):
        if count <= 0:
            continue
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], first + count))
        else:
            merged.append((first, first + count))
    return merged


def pattern(seed: Union[int, str], block: int, generation: int) -> bytes:
    """The MiB that a guest has in this block."""
    digest = hashlib.sha256(("%s:%d:%d" % (seed, block, generation)).encode("ascii")).digest()
    return digest * (MIB // len(digest))


def overhead(size: int) -> int:
    """What an empty VHD of this size takes: footers, header, allocation table."""
    table = 4 * ((size + 2 * MIB - 1) // (2 * MIB))
    return (2048 + table + 512 + 4095) // 4096 * 4096


class Content:
    """The contents of one VDI."""

    __slots__ = ("size", "seed", "extents", "marks", "highest", "zeroed", "layer", "family", "sr", "frozen", "files", "written",
                 "_starts", "_marked")

    def __init__(self, size: int, seed: Union[int, str], extents: List[Tuple[int, int]], family: str, sr: str) -> None:
        self.size = size
        self.seed = seed
        self.extents = extents
        self.marks = {}  # type: Dict[int, Mark]
        #: the last generation of blocks that show it no more: zeros or an import came over it
        self.highest = {}  # type: Dict[int, int]
        #: how often guests wrote zeros to a block
        self.zeroed = 0
        self.layer = None  # type: Optional[str]
        self.family = family
        self.sr = sr
        self.frozen = False
        #: the frozen files below the disk's own, oldest first, names of Storage.files; what the disk was born with is in none
        self.files = []  # type: List[str]
        #: the blocks of a VHD that are in the disk's own file
        self.written = set()  # type: Set[int]
        self._starts = [first for first, _ in extents]
        self._marked = None  # type: Optional[List[int]]

    def block_count(self) -> int:
        return (self.size + MIB - 1) // MIB

    def born_with(self, block: int) -> bool:
        at = bisect.bisect_right(self._starts, block) - 1
        return at >= 0 and block < self.extents[at][1]

    def is_zero(self, block: int) -> bool:
        mark = self.marks.get(block)
        return not self.born_with(block) if mark is None else _is_of_zeros(mark)

    def is_allocated(self, block: int) -> bool:
        """Whether it takes space: what a guest wrote does, zeros too."""
        mark = self.marks.get(block)
        return self.born_with(block) if mark is None else mark != ZERO

    def mark(self, block: int, mark: Mark) -> None:
        old = self.marks.get(block)
        if isinstance(old, int) and old > 0:
            self.highest[block] = old
        if isinstance(mark, int):
            self.zeroed = max(self.zeroed, -mark)
        self.marks[block] = mark
        self.written.add(block // VHD_BLOCK_MIB)
        self._marked = None

    def next_generation(self, block: int) -> int:
        """A generation that the block never had, so what is written now differs from all that ever was there."""
        mark = self.marks.get(block)
        return 1 + max(mark if isinstance(mark, int) else 0, self.highest.get(block, 0))

    def born_blocks(self) -> Set[int]:
        """The blocks of a VHD that the disk was born with."""
        return {number for first, end in self.extents
                for number in range(first // VHD_BLOCK_MIB, (end - 1) // VHD_BLOCK_MIB + 1)}

    def zeroed_blocks(self) -> List[int]:
        """The blocks that a guest wrote zeros to: they are there, and zero."""
        return [block for block, mark in self.marks.items() if isinstance(mark, int) and mark < 0]

    def next_used(self, block: int) -> Optional[int]:
        """The first block from `block` on that is not all zeros."""
        if self._marked is None:
            self._marked = sorted(number for number, mark in self.marks.items() if not _is_of_zeros(mark))
        found = None
        at = bisect.bisect_left(self._marked, block)
        if at < len(self._marked):
            found = self._marked[at]
        for first, end in self.extents[max(bisect.bisect_right(self._starts, block) - 1, 0):]:
            if found is not None and first >= found:
                break
            for number in range(max(first, block), end):
                if not self.is_zero(number):
                    return number if found is None else min(found, number)
        return found

    def written_blocks(self) -> int:
        """How many blocks take space."""
        born = sum(end - first for first, end in self.extents)
        for block, mark in self.marks.items():
            if self.born_with(block):
                born -= mark == ZERO
            else:
                born += mark != ZERO
        return born

    def to_json(self) -> Dict[str, Any]:
        return {"size": self.size, "seed": self.seed, "extents": self.extents, "family": self.family, "sr": self.sr,
                "layer": self.layer, "frozen": self.frozen, "zeroed": self.zeroed, "files": self.files,
                "written": sorted(self.written),
                "marks": {str(block): mark for block, mark in self.marks.items()},
                "highest": {str(block): generation for block, generation in self.highest.items()}}

    @staticmethod
    def from_json(fields: Dict[str, Any]) -> "Content":
        content = Content(fields["size"], fields["seed"], [(first, end) for first, end in fields["extents"]],
                          fields["family"], fields["sr"])
        content.layer = fields["layer"]
        content.frozen = fields["frozen"]
        content.zeroed = fields["zeroed"]
        content.files = fields["files"]
        content.written = set(fields["written"])
        content.marks = {int(block): mark for block, mark in fields["marks"].items()}
        content.highest = {int(block): generation for block, generation in fields["highest"].items()}
        return content


def _is_of_zeros(mark: Mark) -> bool:
    return mark < 0 if isinstance(mark, int) else mark == ZERO


class Storage:
    """All contents, by the uuid of the VDI. Callers hold the pool's lock for everything but reading and writing blocks."""

    def __init__(self, folder: str, log: Callable[[List[Any]], None]) -> None:
        """`folder`: where imported blocks go. `log(entry)` is told of every change, so that it outlives the process."""
        self._folder = folder
        self._log = log
        self.contents = {}  # type: Dict[str, Content]
        self.families = {}  # type: Dict[str, Set[str]]
        #: the frozen files of VHDs: which of its blocks each has
        self.files = {}  # type: Dict[str, FrozenSet[int]]
        self.used = {}  # type: Dict[str, int]
        self.sizes = {}  # type: Dict[str, int]
        self.thick = set()  # type: Set[str]
        #: SRs whose new disks hold old data, so that an import has to write the zeros too (sm_fs_ops.ml
        #: must_write_zeroes_into_new_vdi, v24.19.2: raw LVM, thick EqualLogic)
        self.must_zero = set()  # type: Set[str]
        #: SRs whose disks are VHDs
        self.vhd = set()  # type: Set[str]

    # --- SRs and space

    def add_sr(self, sr: str, size: int, kinds: Iterable[str]) -> None:
        """`kinds`: what it is of `thick`, `vhd`, `must_zero`."""
        self.sizes[sr] = size
        self.used.setdefault(sr, 0)
        for kind in kinds:
            getattr(self, kind).add(sr)

    def kinds_of(self, sr: str) -> List[str]:
        return [kind for kind in ("thick", "vhd", "must_zero") if sr in getattr(self, kind)]

    def free(self, sr: str) -> int:
        return self.sizes[sr] - self.used[sr]

    def cost_of_new(self, sr: str, size: int) -> int:
        """What a new, empty disk takes."""
        return overhead(size) + (size if sr in self.thick else 0)

    def cost_of_snapshot(self, uuid: str) -> int:
        """What a snapshot of this disk takes at once; the rest comes when the original is written to."""
        content = self.contents[uuid]
        if content.sr in self.thick:
            return overhead(content.size) + content.written_blocks() * MIB
        return overhead(content.size)

    def cost_of_write(self, uuid: str, block: int) -> int:
        """What writing this block takes: a new block, or a second version of one that a snapshot holds."""
        content = self.contents[uuid]
        if content.sr in self.thick:
            return 0
        if not content.is_allocated(block) or self._is_shared(uuid, content, block):
            return MIB
        return 0

    def utilisation(self, uuid: str) -> int:
        """The VDI's physical_utilisation: the blocks it shows."""
        return self.contents[uuid].written_blocks() * MIB

    def _relatives(self, uuid: str, content: Content) -> List[Content]:
        return [self.contents[other] for other in self.families[content.family] if other != uuid]

    def _is_shared(self, uuid: str, content: Content, block: int) -> bool:
        mark = content.marks.get(block)
        return any(other.marks.get(block) == mark for other in self._relatives(uuid, content))

    def _owned_bytes(self, uuid: str) -> int:
        """The space that goes free when this disk goes: all that no relative shows in the same version."""
        content = self.contents[uuid]
        if content.sr in self.thick:
            return overhead(content.size) + (content.written_blocks() * MIB if content.frozen else content.size)
        relatives = self._relatives(uuid, content)
        if not relatives:
            return overhead(content.size) + content.written_blocks() * MIB
        owned = 0
        changed_by_all = set(relatives[0].marks)
        for other in relatives[1:]:
            changed_by_all &= set(other.marks)
        for block in changed_by_all | set(content.marks):
            if content.is_allocated(block) and not self._is_shared(uuid, content, block):
                owned += 1
        return overhead(content.size) + owned * MIB

    # --- what exists

    def add(self, uuid: str, content: Content) -> None:
        """A disk that is there from the start: part of what POOL.json says, so it is not logged."""
        self.contents[uuid] = content
        self.families.setdefault(content.family, set()).add(uuid)
        self.used[content.sr] += self._owned_bytes(uuid)

    def create(self, uuid: str, sr: str, size: int) -> None:
        self.add(uuid, Content(size, 0, [], uuid, sr))
        self._log(["content", uuid, self.contents[uuid].to_json()])

    def snapshot(self, uuid: str, new_uuid: str, frozen: bool = True) -> None:
        """A second disk with the present contents of the first; `frozen` if nobody may write to it."""
        original = self.contents[uuid]
        # the space is counted before the copy exists: afterwards everything is shared
        self.used[original.sr] += self.cost_of_snapshot(uuid)
        copy = Content(original.size, original.seed, original.extents, original.family, original.sr)
        copy.marks = dict(original.marks)
        copy.highest = dict(original.highest)
        copy.zeroed = original.zeroed
        copy.frozen = frozen
        original.layer = None
        if original.written:
            self.files[new_uuid] = frozenset(original.written)
            original.files = original.files + [new_uuid]
            original.written = set()
        copy.files = list(original.files)
        self.contents[new_uuid] = copy
        self.families[copy.family].add(new_uuid)
        self._log(["snapshot", uuid, new_uuid, frozen])

    def copy(self, uuid: str, new_uuid: str, sr: str) -> None:
        """A disk of its own with the present contents of this one, in that SR. A guest that goes on with it writes what it would
        have written to the first."""
        original = self.contents[uuid]
        copy = Content(original.size, original.seed, original.extents, new_uuid, sr)
        copy.highest = dict(original.highest)
        copy.zeroed, copy.frozen = original.zeroed, original.frozen
        layer = None  # type: Optional[str]
        for block, mark in original.marks.items():
            if isinstance(mark, str) and mark != ZERO:
                # a layer belongs to one family of disks, which removes it
                layer = layer or self._new_layer()
                self.store(layer, block, self.read_block(original, block))
                mark = layer
            copy.mark(block, mark)
        copy.layer = layer
        self.add(new_uuid, copy)
        self._log(["content", new_uuid, copy.to_json()])

    def cost_of_copy(self, uuid: str, sr: str) -> int:
        """What a disk of its own with these contents takes there."""
        content = self.contents[uuid]
        written = content.written_blocks() * MIB
        return overhead(content.size) + (content.size if sr in self.thick and not content.frozen else written)

    def destroy(self, uuid: str) -> None:
        content = self.contents[uuid]
        self.used[content.sr] -= self._owned_bytes(uuid)
        del self.contents[uuid]
        family = self.families[content.family]
        family.discard(uuid)
        if not family:
            del self.families[content.family]
        self._log(["content", uuid, None])
        for file in set(content.files).difference(*(self.contents[other].files for other in family)):
            del self.files[file]
        layers = {mark for mark in content.marks.values() if isinstance(mark, str) and mark}
        for other in family:
            layers -= {mark for mark in self.contents[other].marks.values() if isinstance(mark, str)}
        for layer in layers:
            try:
                os.unlink(self._layer_path(layer))
            except FileNotFoundError:
                pass

    def _mark(self, uuid: str, block: int, mark: Mark) -> None:
        content = self.contents[uuid]
        if mark != ZERO:
            self.used[content.sr] += self.cost_of_write(uuid, block)
        elif content.sr not in self.thick and content.is_allocated(block) and not self._is_shared(uuid, content, block):
            self.used[content.sr] -= MIB
        content.mark(block, mark)
        self._log(["mark", uuid, block, mark])

    def guest_write(self, uuid: str, block: int, zeros: bool = False) -> None:
        """A guest writes the next generation of one block, or zeros."""
        content = self.contents[uuid]
        self._mark(uuid, block, -content.zeroed - 1 if zeros else content.next_generation(block))

    # --- growing

    def cost_of_growth(self, uuid: str, size: int) -> int:
        """What it takes to make the disk this large."""
        content = self.contents[uuid]
        grown = overhead(size) - overhead(content.size)
        if content.sr in self.thick:
            return grown + (0 if content.frozen else size - content.size)
        return grown + (self.cost_of_write(uuid, content.block_count() - 1) if self._is_cut_short(content) else 0)

    def grow(self, uuid: str, size: int) -> None:
        """The disk is larger from now on; it holds what it held, and zeros behind that."""
        content = self.contents[uuid]
        if self._is_cut_short(content):
            # a generated block would grow too: what there is of it is kept as an import's would be
            block, layer = content.block_count() - 1, self.layer_for_import(uuid)
            self.store(layer, block, self.read_block(content, block))
            self.mark_imported(uuid, block, layer)
        self._grow(uuid, size)

    def _grow(self, uuid: str, size: int) -> None:
        content = self.contents[uuid]
        self.used[content.sr] += overhead(size) - overhead(content.size)
        if content.sr in self.thick and not content.frozen:
            self.used[content.sr] += size - content.size
        content.size = size
        self._log(["size", uuid, size])

    def _is_cut_short(self, content: Content) -> bool:
        """The last block is a generated one, and has less than a MiB of it."""
        block = content.block_count() - 1
        return bool(content.size % MIB) and not content.is_zero(block) and not isinstance(content.marks.get(block), str)

    def replay(self, entry: List[Any]) -> None:
        """Do again what an earlier server logged."""
        kind, uuid = entry[0], entry[1]
        log, self._log = self._log, lambda entry: None
        try:
            if kind == "content" and entry[2] is None:
                if uuid in self.contents:
                    self.destroy(uuid)
            elif kind == "content":
                self.add(uuid, Content.from_json(entry[2]))
            elif kind == "snapshot":
                self.snapshot(uuid, entry[2], entry[3])
            elif kind == "mark":
                content = self.contents[uuid]
                if isinstance(entry[3], str) and entry[3]:
                    content.layer = entry[3]
                self._mark(uuid, entry[2], entry[3])
            elif kind == "size":
                self._grow(uuid, entry[2])
        finally:
            self._log = log

    # --- differences

    def changed_blocks(self, uuid: str, base: str) -> List[int]:
        """The blocks of a VHD that an export of this disk as a difference from that one has, ascending.

        They are those of every file that only one of the two chains has: what was changed, and at times more, for instance
        after a revert or where the one was not made of the other; no content is looked at. Up to the end of the disk
        (vhd_format/f.ml include_block, v24.19.2).
        """
        one, other = self.contents[uuid], self.contents[base]
        if one is other:
            return []
        found = one.written | other.written
        for file in set(one.files) ^ set(other.files):
            found |= self.files[file]
        if one.family != other.family:
            found |= one.born_blocks() | other.born_blocks()
        count = (one.block_count() + VHD_BLOCK_MIB - 1) // VHD_BLOCK_MIB
        return sorted(number for number in found if number < count)

    # --- bytes

    def _layer_path(self, layer: str) -> str:
        return os.path.join(self._folder, layer + ".blocks")

    def read_block(self, content: Content, block: int) -> bytes:
        """The bytes of one block, the last one cut to the disk's size."""
        length = min(MIB, content.size - block * MIB)
        if length <= 0 or block < 0:
            raise IndexError("block %d is not on the disk" % block)
        mark = content.marks.get(block)
        if mark is None:
            data = pattern(content.seed, block, 0) if content.born_with(block) else _ZEROS
        elif _is_of_zeros(mark):
            data = _ZEROS
        elif isinstance(mark, int):
            data = pattern(content.seed, block, mark)
        else:
            with open(self._layer_path(mark), "rb") as stream:
                stream.seek(block * MIB)
                data = stream.read(MIB)
            data += _ZEROS[:MIB - len(data)]
        return data if length == MIB else data[:length]

    def layer_for_import(self, uuid: str) -> str:
        """The layer file that this disk's imported blocks go to now."""
        content = self.contents[uuid]
        if content.layer is None:
            content.layer = self._new_layer()
        return content.layer

    def _new_layer(self) -> str:
        os.makedirs(self._folder, exist_ok=True)
        return os.urandom(8).hex()

    def store(self, layer: str, block: int, data: bytes) -> None:
        """Put a block's bytes into a layer file. They count from `mark_imported` on."""
        descriptor = os.open(self._layer_path(layer), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            view = memoryview(data)
            written = 0
            while written < len(data):
                written += os.pwrite(descriptor, view[written:], block * MIB + written)
        finally:
            os.close(descriptor)

    def mark_imported(self, uuid: str, block: int, layer: str) -> None:
        """This block is now what the layer file holds, or zeros if `layer` is ZERO."""
        content = self.contents[uuid]
        if layer == ZERO and content.is_zero(block):
            return
        if content.marks.get(block) != layer:
            self._mark(uuid, block, layer)


class Disk:
    """One VDI's contents, to read and to write, without the pool's lock held by the caller."""

    def __init__(self, storage: Storage, uuid: str, lock: Any, reserve: Callable[[str, int], None]) -> None:
        """`reserve(uuid, block)` raises if the SR has no space for writing that block; it is called with the lock held."""
        self._storage = storage
        self._uuid = uuid
        self._content = storage.contents[uuid]
        self._lock = lock
        self._reserve = reserve
        self.size = self._content.size

    def blocks(self) -> int:
        """The number of MiB blocks; the last one may be short."""
        return self._content.block_count()

    def is_zero(self, block: int) -> bool:
        return self._content.is_zero(block)

    def block(self, block: int) -> bytes:
        return self._storage.read_block(self._content, block)

    def next_used(self, block: int) -> Optional[int]:
        """The first block from `block` on that is not all zeros, or None: what a 2 TiB disk is walked by."""
        with self._lock:
            return self._content.next_used(block)

    def zeroed_blocks(self) -> List[int]:
        """The blocks that a guest wrote zeros to."""
        with self._lock:
            return self._content.zeroed_blocks()

    def changed_blocks(self, base: "Disk") -> List[int]:
        """The blocks of a VHD of 2 MiB that a difference from that disk has, ascending."""
        with self._lock:
            return self._storage.changed_blocks(self._uuid, base._uuid)

    def used_blocks(self) -> Iterator[int]:
        """Every block that is not all zeros, ascending."""
        block = self.next_used(0)
        while block is not None:
            yield block
            block = self.next_used(block + 1)

    def read(self, offset: int, length: int) -> bytes:
        """Any bytes of the disk; fewer than asked for at its end."""
        length = max(0, min(length, self.size - offset))
        parts = []
        while length:
            block, start = divmod(offset, MIB)
            part = self.block(block)[start:start + length]
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """Overwrite any bytes. ValueError past the end; the Failure of a full SR if there is no space."""
        if offset < 0 or offset + len(data) > self.size:
            raise ValueError("write past the end of the disk")
        view = memoryview(data)
        while len(view):
            block, start = divmod(offset, MIB)
            length = min(len(view), MIB - start)
            whole = min(MIB, self.size - block * MIB)
            piece = bytes(view[:length])
            if length < whole:
                old = self.block(block)
                piece = old[:start] + piece + old[start + length:]
            self._write_block(block, piece)
            offset += length
            view = view[length:]

    def _write_block(self, block: int, data: bytes) -> None:
        if not any(data):
            with self._lock:
                self._storage.mark_imported(self._uuid, block, ZERO)
            return
        with self._lock:
            self._reserve(self._uuid, block)
            layer = self._storage.layer_for_import(self._uuid)
        self._storage.store(layer, block, data)
        with self._lock:
            self._storage.mark_imported(self._uuid, block, layer)
