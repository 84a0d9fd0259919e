"""Shelves: backup directories that tests build, and what there is to see in them afterwards.

    shelf = a_shelf(complete('web', days_ago=2), unfinished('web', days_ago=1), foreign('web/notes.txt'))

`a_shelf` is a fixture (conftest.py). What lies on a shelf is judged here by the promises that users were given (a
marker, an image of the manifest's size, SHA256SUMS), not by the code that wrote it.
"""

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import tarfile
import tempfile
from datetime import datetime, timedelta, timezone
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from support.language import uuid_of
from support.process import TESTS

RECORDED_STORE = os.path.join(TESTS, 'conformance', 'recorded', 'files', 'old-store.tar.gz')
OUR_NAME = re.compile(r'backup-\d{4}-\d\d-\d\d-\d{6}')
OLD_NAME = re.compile(r'backup-\d{4}-\d\d-\d\d-\(\d\d:\d\d:\d\d\)')
DUMP_NAME = re.compile(r'pool_db_\d{8}-\d{6}\.dump')
OLD_MARKERS = ('success', 'success_restore', 'success_compress', 'success_compressing')
IMAGE_SUFFIXES = ('.xva', '.raw', '.vhd')
COMPRESSED_SUFFIXES = ('', '.gz', '.zst')
IMAGE = b'the disk of last week ' * 64
STATE = '.vmbackup'
MIB = 1 << 20
#: What lies on a shelf: by its path, mode and, for a file, time of its last change and digest.
Tree = Dict[str, Tuple[Any, ...]]


# --- What is given ---------------------------------------------------------------------------------------------------

class Given:
    """Something to put on a shelf. `age_s` orders the copies of a directory; `put` gets the sequence number."""

    def __init__(self, folder: str, age_s: float, put: Callable[['Shelf', int], None]) -> None:
        self.folder = folder
        self.age_s = age_s
        self.put = put


def complete(name: str, days_ago: float = 1, kind: str = 'vm-export', folder: str = '', uuid: str = '',
             image: bytes = IMAGE, **told: Any) -> Given:
    """A sealed copy of that VM, good in every respect that retention looks at. `told`: what its manifest says otherwise."""
    def put(shelf: 'Shelf', sequence: int) -> None:
        write_copy(shelf.at(folder or name, 'backup-' + stamp(days_ago, '%Y-%m-%d-%H%M%S')), name, uuid or uuid_of(name),
                   kind, sequence, days_ago, image, told)
    return Given(folder or name, days_ago, put)


def damaged(name: str, days_ago: float = 1, kind: str = 'vm-export') -> Given:
    """A copy that was sealed, and whose image has since lost its end."""
    def put(shelf: 'Shelf', sequence: int) -> None:
        path = shelf.at(name, 'backup-' + stamp(days_ago, '%Y-%m-%d-%H%M%S'))
        write_copy(path, name, uuid_of(name), kind, sequence, days_ago, IMAGE, {})
        with open(os.path.join(path, name + suffix_of(kind)), 'r+b') as file:
            file.truncate(len(IMAGE) // 2)
    return Given(name, days_ago, put)


def unfinished(name: str, days_ago: float = 1, ending: str = '.partial', kind: str = 'vm-export') -> Given:
    """What a run left that died while it wrote a copy, or (`.deleting`) removed one."""
    def put(shelf: 'Shelf', _sequence: int) -> None:
        path = shelf.at(name, 'backup-' + stamp(days_ago, '%Y-%m-%d-%H%M%S') + ending)
        write(os.path.join(path, name + suffix_of(kind)), IMAGE[:100])
    return Given(name, days_ago, put)


def old(name: str, days_ago: float = 1, kind: str = 'vm-export', marker: str = 'success', uuid: str = '',
        image: bytes = IMAGE, suffix: str = '') -> Given:
    """A copy as the older program wrote it: colons in its name, no manifest. `uuid` '-': one that tells of no uuid."""
    def put(shelf: 'Shelf', _sequence: int) -> None:
        path = shelf.at(name, 'backup-' + stamp(days_ago, '%Y-%m-%d-(%H:%M:%S)'))
        write(os.path.join(path, name + suffix_of(kind) + suffix), image)
        if marker:
            write(os.path.join(path, marker), b'')
        if uuid != '-':
            write(os.path.join(path, 'vm.cfg'), ('name_label=%s\norig_uuid=%s\n' % (name, uuid or uuid_of(name))).encode())
    return Given(name, days_ago, put)


def of_old_program() -> Given:
    """The store that the older program wrote on a real server: two vm-exports and two vdi-exports of PROD-web, four
    dumps of the pool database."""
    def put(shelf: 'Shelf', _sequence: int) -> None:
        with tarfile.open(RECORDED_STORE) as archive:
            for member in archive.getmembers():
                _, _, member.name = member.name.partition('/')
                if member.name and member.name != 'status.log':
                    archive.extract(member, shelf.path, **NO_FILTER)
    return Given('PROD-web', 0, put)


# Python 3.12 warns where an archive is unpacked without a word about what is trusted; 3.6 does not know the word.
NO_FILTER = {'filter': 'fully_trusted'} if hasattr(tarfile, 'fully_trusted_filter') else {}  # type: Dict[str, Any]


def copied(store: str) -> Given:
    """What is in that directory, times included, but for the program's own state."""
    def put(shelf: 'Shelf', _sequence: int) -> None:
        for name in os.listdir(path_of(store)):
            if name != STATE:
                shutil.copytree(os.path.join(path_of(store), name), os.path.join(path_of(shelf.path), name), symlinks=True)
    return Given('', 0, put)


def foreign(path: str, content: bytes = b'not a backup') -> Given:
    """A file that is nobody's but the administrator's; a path that ends in `/` is an empty directory."""
    def put(shelf: 'Shelf', _sequence: int) -> None:
        if path.endswith('/'):
            os.makedirs(shelf.at(path))
        else:
            write(shelf.at(path), content)
    return Given('', 0, put)


def suffix_of(kind: str) -> str:
    return '.xva' if kind == 'vm-export' else '.raw'


def stamp(days_ago: float, form: str) -> str:
    return (datetime.now() - timedelta(days=days_ago)).strftime(form)


def write_copy(path: str, name: str, uuid: str, kind: str, sequence: int, days_ago: float, image: bytes,
               told: Dict[str, Any]) -> None:
    image_name = name + suffix_of(kind)
    digest = hashlib.sha256(image).hexdigest()
    taken_at = (datetime.now(timezone.utc) - timedelta(days=days_ago)).strftime('%Y-%m-%dT%H:%M:%SZ')
    manifest = {
        'format': 1, 'program': 'VmBackup 4.0.0', 'kind': kind, 'taken_at': taken_at, 'finished_at': taken_at,
        'sequence': sequence, 'copies_to_keep': 4, 'vm': {'uuid': uuid, 'name': name},
        'image': {'name': image_name, 'format': image_name[-3:], 'compression': 'none', 'size': len(image),
                  'sha256': digest, 'plain_size': len(image), 'plain_sha256': digest},
        'files': {image_name: {'size': len(image), 'sha256': digest}}, 'disks': []}  # type: Dict[str, Any]
    manifest.update(told)
    cfg = ('name_label=%s\norig_uuid=%s\n' % (name, uuid)).encode('utf-8')
    text = (json.dumps(manifest) + '\n').encode('ascii')
    files = {image_name: image, 'vm.cfg': cfg, 'backup.json': text}
    for file_name, content in files.items():
        write(os.path.join(path, file_name), content)
    sums = ''.join('%s  %s\n' % (hashlib.sha256(files[key]).hexdigest(), key) for key in sorted(files))
    write(os.path.join(path, 'SHA256SUMS'), sums.encode('utf-8'))
    write(os.path.join(path, 'success'), b'')


def write(path: str, content: bytes) -> None:
    os.makedirs(path_of(os.path.dirname(path)), exist_ok=True)
    with open(path_of(path), 'wb') as file:
        file.write(content)


def path_of(text: str) -> str:
    """The str that opens the path whose name is this text in UTF-8, whatever the locale of the tests."""
    return os.fsdecode(text.encode('utf-8', 'surrogateescape'))


def text_of(path: str) -> str:
    return os.fsencode(path).decode('utf-8', 'surrogateescape')


# --- The shelf -------------------------------------------------------------------------------------------------------

class Store:
    """A backup directory, to be looked at."""

    def __init__(self, path: str) -> None:
        self.path = path

    def at(self, *names: str) -> str:
        return os.path.join(self.path, *names)

    def names(self, *folder: str) -> List[str]:
        """What lies there, sorted, our own state left out; nothing where there is no such directory."""
        path = path_of(self.at(*folder))
        if not os.path.isdir(path):
            return []
        return sorted(text_of(name) for name in os.listdir(path) if name != STATE)

    def read(self, *path: str) -> bytes:
        with open(path_of(self.at(*path)), 'rb') as file:
            return file.read()

    def size(self, *path: str) -> int:
        return os.path.getsize(path_of(self.at(*path)))

    def text(self, *path: str) -> str:
        return self.read(*path).decode('utf-8', 'surrogateescape')

    def manifest(self, folder: str, copy: str) -> Dict[str, Any]:
        return json.loads(self.text(folder, copy, 'backup.json'))


class Shelf(Store):
    """A backup directory, with a place beside it for the config and the status log."""

    def __init__(self, given: Sequence[Given] = (), path: str = '', tree: Optional[Tree] = None) -> None:
        """`path`: a directory that is there already, such as a file system of its own; else a new one. `tree`: that of what
        is given, where it is known, as it takes a while to find out."""
        self.home = tempfile.mkdtemp(prefix='shelf-')
        super().__init__(path or os.path.join(self.home, 'BACKUPS'))
        os.makedirs(self.path, exist_ok=True)
        self.status_log = os.path.join(self.home, 'status.log')
        self.config_path = os.path.join(self.home, 'weekend.cfg')
        sequences = {}  # type: Dict[str, int]
        for item in sorted(given, key=lambda item: -item.age_s):
            sequences[item.folder] = sequences.get(item.folder, 0) + 1
            item.put(self, sequences[item.folder])
        self.first_tree = self.tree() if tree is None else tree

    def remove(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)

    def config(self, *lines: str) -> str:
        """The path of weekend.cfg, with this shelf as its backup_dir and these lines."""
        standard = [line for line in ('backup_dir=' + self.path, 'status_log=' + self.status_log)
                    if not any(own.startswith(line.split('=')[0] + '=') for own in lines)]
        text = '\n'.join(['# Weekend VMs'] + standard + list(lines)) + '\n'
        with open(self.config_path, 'wb') as file:
            file.write(text.encode('utf-8'))
        return self.config_path

    # --- looking ---

    def tree(self) -> Tree:
        """Everything on the shelf: by its path, mode and, for a file, content and time of its last change. What a run
        removes or renames meanwhile is not there."""
        found = {}  # type: Tree
        for folder, folders, files in os.walk(path_of(self.path)):
            for name in folders + files:
                path = os.path.join(folder, name)
                shown = text_of(os.path.relpath(path, path_of(self.path)))
                with contextlib.suppress(FileNotFoundError):
                    status = os.lstat(path)
                    if stat.S_ISREG(status.st_mode):
                        found[shown] = (status.st_mode, status.st_mtime_ns, digest_of(path))
                    else:
                        found[shown] = (status.st_mode,)
        return found

    def flip(self, folder: str, copy: str) -> None:
        """One bit of the copy's image is another, and its time as it was, as a failing disk does it."""
        path = self.at(folder, copy, self.image(folder, copy))
        status = os.stat(path)
        with open(path, 'r+b') as file:
            file.seek(1200000)
            byte = file.read(1)
            file.seek(1200000)
            file.write(bytes([byte[0] ^ 1]))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def is_unchanged(self) -> bool:
        """Every file and directory is as it was given, and nothing came."""
        return self.tree() == self.first_tree

    def still_holds(self, *paths: str) -> bool:
        """These were there at the beginning and are as they were, with all that is in them."""
        now = self.tree()
        return all(now.get(key) == value for path in paths for key, value in self.given_under(path).items())

    def given_under(self, path: str) -> Tree:
        under = {key: value for key, value in self.first_tree.items() if key == path or key.startswith(path + '/')}
        assert under, '%s was never on the shelf' % path
        return under

    def copies(self, folder: str, kind: str = '') -> List[str]:
        """The complete copies in that directory, ours and the older program's, in the order of their stamps."""
        found = [name for name in self.names(folder) if OUR_NAME.fullmatch(name) or OLD_NAME.fullmatch(name)]
        found = [name for name in found if self.is_complete(folder, name)
                 and (not kind or self.kind(folder, name) == kind)]
        return sorted(found, key=lambda name: re.sub(r'[^0-9]', '', name))

    def newest(self, folder: str) -> str:
        copies = self.copies(folder)
        assert copies, 'no complete copy in %s: %s' % (folder, self.names(folder))
        return copies[-1]

    def image(self, folder: str, copy: str) -> str:
        """The name of the image in that copy; empty if there is none."""
        images = [name for name in self.names(folder, copy)
                  if any(name.endswith(kind + ending) for kind in IMAGE_SUFFIXES for ending in COMPRESSED_SUFFIXES)]
        return max(images, key=lambda name: self.size(folder, copy, name)) if images else ''

    def kind(self, folder: str, copy: str) -> str:
        return 'vm-export' if '.xva' in self.image(folder, copy) else 'vdi-export'

    def is_complete(self, folder: str, copy: str) -> bool:
        """Marker and image are there, the image of the size that the manifest tells."""
        names = self.names(folder, copy)
        image = self.image(folder, copy)
        if not image or not any(marker in names for marker in OLD_MARKERS):
            return False
        if 'backup.json' in names:
            manifest = self.manifest(folder, copy)
            images = manifest['images'] if 'images' in manifest else [manifest['image']]
            return all(self.size(folder, copy, one['name']) == one['size'] for one in images)
        return self.size(folder, copy, image) > 0

    def unfinished(self) -> List[str]:
        """Every .partial and .deleting on the shelf."""
        return sorted(path for path in self.tree() if path.count('/') == 1 and path.endswith(('.partial', '.deleting')))

    def has(self, folder: str, complete: Optional[int] = None, vm_exports: Optional[int] = None,
            vdi_exports: Optional[int] = None) -> bool:
        """That directory holds so many complete copies, of either kind or of one."""
        return all(wanted is None or len(self.copies(folder, kind)) == wanted for wanted, kind in (
            (complete, ''), (vm_exports, 'vm-export'), (vdi_exports, 'vdi-export')))

    def proves_itself(self, folder: str, copy: str) -> bool:
        """SHA256SUMS names every file of the copy but itself and `success`, and every digest is right."""
        listed = {}
        for line in self.text(folder, copy, 'SHA256SUMS').splitlines():
            is_escaped = line.startswith('\\')
            digest, _, name = line[is_escaped:].partition('  ')
            if is_escaped:
                name = re.sub(r'\\([n\\])', lambda match: {'n': '\n', '\\': '\\'}[match.group(1)], name)
            listed[name] = digest
        prefix = folder + '/' + copy + '/'
        found = {path[len(prefix):]: value[2] for path, value in self.tree().items()
                 if path.startswith(prefix) and len(value) == 3}
        return found.pop('success', '') != '' and found.pop('SHA256SUMS', '') != '' and found == listed

    def dumps(self, host: str = 'xcp1') -> List[str]:
        """The complete dumps of the pool database, oldest first."""
        folder = 'METADATA_' + host
        return [name for name in self.names(folder) if DUMP_NAME.fullmatch(name)
                and self.read(folder, name).rstrip().endswith(b'</database>')]

    def status_lines(self) -> List[str]:
        """The status log's lines; none if there is no such file."""
        try:
            with open(self.status_log, 'rb') as file:
                return text_lines(file.read())
        except FileNotFoundError:
            return []

    def journals(self) -> List[str]:
        """The journals of runs that are not closed."""
        return sorted(path for path in self.tree()
                      if path.startswith(STATE + '/runs/') and path.endswith(('.run', '.taken')))

    def holds_no_trace_of(self, secret: str) -> bool:
        """In no file on or beside the shelf, nor in any name."""
        for folder, folders, files in os.walk(path_of(self.home)):
            if any(secret in name for name in folders + files):
                return False
            for name in files:
                with open(os.path.join(folder, name), 'rb') as file:
                    if secret.encode('utf-8') in file.read():
                        return False
        return True


def text_lines(content: bytes) -> List[str]:
    return content.decode('utf-8', 'surrogateescape').splitlines()


def digest_of(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for piece in iter(lambda: file.read(MIB), b''):
            digest.update(piece)
    return digest.hexdigest()


def unpacked(content: bytes, name: str) -> bytes:
    """The plain image of stored bytes, by the ending of their name."""
    if name.endswith('.gz'):
        return gzip.decompress(content)
    if name.endswith('.zst'):
        return subprocess.run([shutil.which('zstd') or 'zstd', '-d', '-c', '-q'], input=content, stdout=subprocess.PIPE,
                              check=True).stdout
    return content


def disk_content(disk: Dict[str, Any]) -> bytes:
    """The bytes of a disk of POOL.json, as the contract of the simulated pool defines them."""
    blocks = [bytes(MIB)] * (-(-disk['size'] // MIB))
    for first, count in disk['used']:
        for number in range(first, first + count):
            blocks[number] = hashlib.sha256(('%s:%d:0' % (disk.get('seed', 0), number)).encode('ascii')).digest() * (MIB // 32)
    return b''.join(blocks)[:disk['size']]
