"""The recordings as values, and the table of what is not reproduced."""

import fnmatch
import gzip
import os
import re
import shlex
from typing import Dict, List, NamedTuple, Sequence, Set, Tuple, Union

RECORDED = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'recorded')


class ApiCall(NamedTuple):
    """One XML-RPC request and its answer, byte for byte but for the line ends of the headers."""
    name: str
    request: str
    headers: Tuple[str, ...]
    body: str


class Command(NamedTuple):
    """One `xe` command. `note` is what the recording says about how it was run."""
    name: str
    words: Tuple[str, ...]
    note: str
    exit_status: int
    stdout: str
    stderr: str


class Exchange(NamedTuple):
    """One HTTP request to a data handler and the beginning of its answer, of which there were `total` bytes."""
    name: str
    request: bytes
    total: int
    response: bytes


class Exemption(NamedTuple):
    """A row of differences.txt: what of which recordings is not compared, and why."""
    recordings: str
    path: str
    reason: str


def names(folder: str) -> List[str]:
    """The recordings of a folder in the order in which they were made, as far as their names tell."""
    return ['%s/%s' % (folder, file[:-len('.txt')]) for file in sorted(os.listdir(os.path.join(RECORDED, folder)))
            if file.endswith('.txt')]


def read(name: str) -> Union[ApiCall, Command, Exchange]:
    with open(os.path.join(RECORDED, name + '.txt'), 'rb') as file:
        content = file.read()
    if content.startswith(b'$ '):
        return parse_command(name, content.decode('utf-8'))
    if content.startswith(b'>>> <?xml'):
        return parse_call(name, content.decode('utf-8'))
    return parse_exchange(name, content)


def parse_call(name: str, text: str) -> ApiCall:
    request, answer = text[len('>>> '):].split('\n<<< ', 1)
    head, body = re.split(r'\r?\n\r?\n', answer, maxsplit=1)
    return ApiCall(name, request.rstrip('\n'), tuple(head.splitlines()), body.rstrip('\n'))


def parse_command(name: str, text: str) -> Command:
    parts = re.split(r'^--- (?:rc=(\d+)|(stdout|stderr|file|action output))\n', text, flags=re.MULTILINE)
    sections: Dict[str, str] = {}
    exit_status = -1
    for number, title, content in zip(parts[1::3], parts[2::3], parts[3::3]):
        if number is not None:
            exit_status = int(number)
        else:
            sections[title] = content
    line = parts[0][len('$ '):].rstrip('\n')
    command, parenthesis, note = line.partition('(')
    if 'background' in note or 'stdin' in note:
        return Command(name, tuple(shlex.split(command)), note, exit_status, sections['stdout'], sections['stderr'])
    return Command(name, tuple(shlex.split(line)), '', exit_status, sections['stdout'], sections['stderr'])


def parse_exchange(name: str, content: bytes) -> Exchange:
    request, rest = content[len(b'>>> '):].split(b'\n<<< total ', 1)
    total, response = rest.split(b' bytes\n', 1)
    return Exchange(name, request, int(total), response)


def file_content(name: str) -> bytes:
    """A file that the recorded exports wrote; `.vhd.gz` was gzipped only for keeping."""
    with open(os.path.join(RECORDED, 'files', name), 'rb') as file:
        return file.read()


def unpacked(name: str) -> bytes:
    return gzip.decompress(file_content(name))


class Exemptions:
    """differences.txt. Rows that excused something are noted, so that the others can be found."""

    def __init__(self, folder: str) -> None:
        with open(os.path.join(RECORDED, 'differences.txt'), encoding='utf-8') as file:
            lines = [line.rstrip('\n') for line in file if line.strip() and not line.startswith('#')]
        self.table = [Exemption(*(cell.strip() for cell in line.split(' | ', 2))) for line in lines]
        self.rows: List[Exemption] = []
        self.used: Set[Exemption] = set()
        self.add(folder)

    def add(self, folder: str) -> None:
        """The rows of one more folder of recordings."""
        self.rows += [row for row in self.table if row.recordings.startswith(folder + '/')]

    def excuse(self, name: str, path: str) -> str:
        """The reason why this place is not compared; empty if it is."""
        reason = ''
        for row in self.rows:
            if fnmatch.fnmatchcase(name, row.recordings) and fnmatch.fnmatchcase(path, row.path):
                self.used.add(row)
                reason = reason or row.reason
        return reason

    def not_replayed(self, name: str) -> str:
        return self.excuse(name, 'NOT REPLAYED')

    def stale(self) -> Sequence[Exemption]:
        return [row for row in self.rows if row not in self.used]
