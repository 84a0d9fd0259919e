"""A reader of tar archives that believes nothing: exports are judged by it, not by the code that made them."""

from typing import List, NamedTuple, Tuple

SECTOR_BYTES = 512


class Member(NamedTuple):
    """One file of a tar archive, with the header fields as they stand there."""
    name: str
    mode: bytes
    uid: bytes
    gid: bytes
    size: int
    kind: bytes
    magic: bytes
    content: bytes


def read_tar(content: bytes) -> Tuple[List[Member], bytes]:
    """The members, and all that follows the last one. Read by hand: tarfile forgives what a reader of ours may not."""
    members, place = [], 0
    while place + SECTOR_BYTES <= len(content) and content[place] != 0:
        header = content[place:place + SECTOR_BYTES]
        checksum = sum(header) - sum(header[148:156]) + 8 * ord(' ')
        if int(header[148:156].split(b'\0')[0], 8) != checksum:
            raise ValueError('the tar header at %d has a wrong checksum' % place)
        size = int(header[124:136].split(b'\0')[0], 8)
        start = place + SECTOR_BYTES
        members.append(Member(header[:100].rstrip(b'\0').decode('utf-8'), header[100:108], header[108:116],
                              header[116:124], size, header[156:157], header[257:265], content[start:start + size]))
        place = start + -(-size // SECTOR_BYTES) * SECTOR_BYTES
    return members, content[place:]
