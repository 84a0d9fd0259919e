"""The first five minutes: `setup` writes a config that fits pool, share and host, and shows what comes next."""

import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from typing import Any, Dict, List, Sequence

import pytest

from support import warm
from support.deeds import in_trouble
from support.language import GIBIBYTE, MEBIBYTE, disk, vm
from support.process import PASSWORD, PROGRAM, ROOT, Run, ended, run_program, text_of
from support.shelf import complete, path_of

TIB = 1024 * GIBIBYTE
TWO = [{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'}]
SECRET = 'Tr0ub4dor'


class Site:
    """A host of a pool with some mounts, and VmBackup.py in a directory of its own there."""

    def __init__(self, pool: Any, shelf: Any, *mounts: Dict[str, Any]) -> None:
        """The point of a mount is named relative to the site."""
        self.pool, self.shelf, self.home = pool, shelf, shelf.home
        self.mounts = []  # type: List[Dict[str, Any]]
        for mount in mounts:
            point = os.path.join(self.home, mount['point'])
            os.makedirs(path_of(point), exist_ok=True)
            self.mounts.append(dict(mount, point=point))
        self.config = os.path.join(self.home, 'vmbackup.cfg')

    def at(self, *names: str) -> str:
        return os.path.join(self.home, *names)

    def start(self, *words: str, password: str = '-', program: str = PROGRAM, **trouble: Any) -> List[str]:
        """The command line of setup there."""
        command = in_trouble(self.shelf, mounts=self.mounts, **trouble)
        return command[:2] + [program, password, 'setup'] + list(words)

    def setup(self, *words: str, environment: Any = None, **how: Any) -> Run:
        """Setup has ended; it was told to write vmbackup.cfg beside the mounts."""
        return ended(warm.start(self.start('config=' + self.config, *words, **how), environment or self.pool.environment()))

    def preview(self) -> Run:
        return run_program('-', self.config, 'preview', environment=self.pool.environment())

    @property
    def lines(self) -> List[str]:
        """The config's lines that set something."""
        with open(self.config, encoding='utf-8') as file:
            return [line for line in file.read().splitlines() if line and not line.startswith('#')]

    def value(self, key: str) -> str:
        """What the config sets it to, "" if it does not."""
        return ''.join(line.partition('=')[2] for line in self.lines if line.startswith(key + '='))

    def files(self) -> List[str]:
        """All that is there but what the tests themselves put there."""
        found = [os.path.relpath(os.path.join(folder, name), self.home)
                 for folder, folders, names in os.walk(self.home) for name in folders + names]
        own = [os.path.relpath(mount['point'], self.home) for mount in self.mounts] + ['BACKUPS']
        return sorted(name for name in found if name not in own and not name.startswith('TROUBLE-'))


@pytest.fixture
def a_site(a_pool: Any, a_shelf: Any) -> Any:
    """a_site(nfs('share'), vms=[vm('web')], hosts=TWO)"""
    def build(*mounts: Dict[str, Any], vms: Sequence[Any] = (), **sections: Any) -> Site:
        return Site(a_pool(*(vms or [vm('web', disks=2), vm('db')]), **sections), a_shelf(), *mounts)
    return build


def nfs(point: str, **facts: Any) -> Dict[str, Any]:
    facts.setdefault('free', 12 * TIB)
    return dict(facts, point=point, kind=facts.get('kind', 'nfs4'), size=facts.get('size', 16 * TIB))


def crontab(run: Run, pattern: str) -> str:
    """The command of the only line for the crontab that begins so."""
    (line,) = [line for line in run.stdout.splitlines() if line.startswith(pattern)]
    return line[len(pattern):].replace('\\%', '%')


def done_by_cron(site: Site, command: str) -> int:
    return subprocess.call(['/bin/sh', '-c', command], env=site.pool.environment(), cwd='/', stdin=subprocess.DEVNULL)


# --- a new administrator ---------------------------------------------------------------------------------------------

def readme() -> str:
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as file:
        return file.read()


def test_readmes_first_lines_lead_to_a_backup_and_a_drill_by_cron(a_site: Any) -> None:
    text = readme()
    block = re.search(r'\n\n((?:    .*\n)+)', text[text.index('**On a host of your pool**'):]).group(1)
    share, copy, setup = [line.split('  #')[0].strip() for line in block.splitlines()]
    site = a_site(nfs('snapshots'), hosts=TWO)
    assert share.startswith('mkdir -p /snapshots && mount ')                  # the site has it mounted
    done = subprocess.call(['/bin/sh', '-e', '-c', copy.replace('/snapshots', site.at('snapshots'))], cwd=ROOT)
    program = site.at('snapshots', 'NAUbackup', 'VmBackup.py')
    assert done == 0 and setup == 'python3 /snapshots/NAUbackup/VmBackup.py - setup'
    run = ended(warm.start(site.start(program=program), site.pool.environment()))
    assert run.exit_status == 0 and run.stderr.count('\n') == 0, run
    site.config = site.at('snapshots', 'NAUbackup', 'vmbackup.cfg')
    assert site.value('backup_dir') == site.at('snapshots', 'BACKUPS') and site.value('hosts') == 'all'
    assert site.preview().exit_status == 0
    told = re.search(r'(?m)^    10 0 \* \* \* (.*)$', text).group(1)
    command = crontab(run, '10 0 * * * ')
    assert command == told.replace('/snapshots', site.at('snapshots')).replace('/usr/bin/python3', sys.executable)
    assert done_by_cron(site, command) == 0
    assert all(len(os.listdir(site.at('snapshots', 'BACKUPS', name))) == 1 for name in ('web', 'db'))
    logs = [name for name in os.listdir(site.at('snapshots', 'NAUbackup')) if name.startswith('VmBackup-')]
    assert len(logs) == 1 and os.path.exists(site.at('snapshots', 'NAUbackup', 'status.log'))
    assert done_by_cron(site, crontab(run, '10 4 * * 0 ')) == 0
    with open(site.at('snapshots', 'NAUbackup', logs[0]), encoding='utf-8') as file:
        assert 'drill' in file.read()
