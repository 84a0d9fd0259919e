"""README's recipes: its code blocks, and a person who follows them in a pool, command by command.

What the README leaves to be filled in stands there in capitals: NEW-UUID, MEMORY, a stamp. A uuid that a command prints,
as the comment behind it says, is noted; everything else the person is told. Nothing is run with a gap left in it.
"""

import os
import re
import shlex
import sys
from collections import OrderedDict
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from support.process import ROOT, Pool, Run, run

SECTIONS = ('Restoring', 'Restoring with xe alone', 'One host died, the pool lives', 'The pool is gone')
GAP = re.compile(r'\b(?:[A-Z]+-)*UUID\b|\b(?:MEMORY|BYTES|MAC|N|KEY|VALUE|OLD-KEY|BOOTLOADER|ARGUMENTS|STAMP|NETWORK NAME)\b'
                 r'|pool_db_\.+dump|\b2016-04-14-001000\b')
UUID = re.compile(r'[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}')

# What the machine of the tests must not do in earnest, or may not have: each notes how it was called.
STAND_INS = {
    'losetup': 'case "$1" in -P) echo /dev/loop7;; esac',
    'mount': '', 'umount': '', 'less': 'cat',
    'python3': 'exec %s "$@"' % shlex.quote(sys.executable),
}


class Command(NamedTuple):
    """A line of a recipe, and the comment behind it."""
    text: str
    comment: str


def recipes() -> 'OrderedDict[str, List[Command]]':
    """The code blocks of README's recovery pages, each under its heading and the word that it begins with."""
    found: 'OrderedDict[str, List[Command]]' = OrderedDict()
    heading, section, block = '', '', ''
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as file:
        for line in file.read().splitlines():
            if line.startswith('#'):
                section = line[3:] if line.startswith('## ') else section
                heading, block = line.lstrip('# '), ''
            elif section in SECTIONS and re.match(r' {4}', line):
                command = command_of(line.strip())
                if not block:
                    block = '%s: %s' % (heading, command.text)
                    block += ' (2)' if block in found else ''
                found.setdefault(block, []).append(command)
            else:
                block = ''
    return found


def command_of(line: str) -> Command:
    text, _, comment = line.partition(' # ')
    return Command(text.rstrip(), comment.strip())


class Person:
    """Somebody on a host of the pool who has README before them."""

    def __init__(self, pool: Pool, folder: str, **told: str) -> None:
        """`folder` stands for / of the paths in README; `told`: what is known before (gaps by their names, - as _)."""
        self.pool = pool
        self.folder = folder
        self.place = folder
        self.known: Dict[str, str] = {}
        self.files: Dict[str, str] = {}
        self.shelf: Any = None                  # the store, for the test to look into
        self.variables: Dict[str, str] = {}     # of the shell
        self.told(**told)
        os.makedirs(os.path.join(folder, 'bin'), exist_ok=True)
        for name, script in STAND_INS.items():
            path = os.path.join(folder, 'bin', name)
            with open(path, 'w') as file:
                file.write('#!/bin/sh\necho "%s $*" >> %s\n%s\n' % (name, shlex.quote(os.path.join(folder, 'called')), script))
            os.chmod(path, 0o755)

    def told(self, **facts: str) -> 'Person':
        self.known.update({name.replace('_', '-'): value for name, value in facts.items()})
        return self

    def goes_to(self, path: str) -> 'Person':
        """That directory is the present one."""
        self.place = path
        return self

    def reads(self, **names: str) -> 'Person':
        """Where README has a file of that name, the person has one of another."""
        self.files.update(names)
        return self

    def called(self) -> List[str]:
        """How the stand-ins were called so far."""
        with open(os.path.join(self.folder, 'called')) as file:
            return file.read().replace(self.folder, '').splitlines()

    def follows(self, title: str, without: Sequence[str] = (), chooses: Optional[Dict[str, str]] = None, host: int = 1,
                stdin: Optional[bytes] = None) -> List[Run]:
        """The recipe was followed to its end, but for the lines that hold one of the words of `without`; what each said.

        Where a command lists several, `chooses` says by which word the person knows the one that a gap stands for."""
        results = []
        for command in recipes()[title]:
            if any(word in command.text + ' ' + command.comment for word in without):
                continue
            text = self.filled(command.text)
            variable = re.match(r'([A-Z]+)=', text)
            result = self.runs(text + ('\nprintf %%s "$%s"' % variable.group(1) if variable else ''), host, stdin)
            assert result.exit_status == 0, (text, result)
            if variable:
                self.variables[variable.group(1)] = result.stdout
            results.append(result)
            self.note(command, result.stdout, chooses or {})
        return results

    def filled(self, text: str) -> str:
        """The command with all gaps filled in, and README's paths inside the folder."""
        text = GAP.sub(lambda match: self.known.get(match.group(), match.group()), text)
        left = GAP.search(text)
        assert left is None, 'nobody told what %s is: %s' % (left.group() if left else '', text)
        for name, other in self.files.items():
            text = text.replace('filename=' + name, 'filename=' + other)
        return re.sub(r'(?<![\w.])/(snapshots|root/restore|mnt/usb)\b', lambda match: self.folder + match.group(), text)

    def runs(self, text: str, host: int = 1, stdin: Optional[bytes] = None) -> Run:
        environment = dict(self.pool.environment(host), **self.variables)
        environment['PATH'] = '%s:%s:%s' % (os.path.join(self.folder, 'bin'), environment['PATH'], '/usr/sbin:/sbin')
        return run(['bash', '-e', '-o', 'pipefail', '-c', text], environment, stdin=stdin, cwd=self.place)

    def note(self, command: Command, said: str, chooses: Dict[str, str]) -> None:
        """The uuids that the comment says the command prints are known from now on."""
        for gap in re.findall(r'\b(?:[A-Z]+-)+UUID\b', command.comment):
            records = [record for record in said.split('\n\n') if chooses.get(gap, '') in record and UUID.search(record)]
            if len(records) == 1 or records and gap in chooses:
                self.known[gap] = UUID.findall(records[0])[0]
