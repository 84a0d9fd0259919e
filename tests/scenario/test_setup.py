"""The first five minutes: `setup` writes a config that fits pool, share and host, and shows what comes next."""

import contextlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from typing import Any, Dict, List, Sequence

import pytest

from support import warm
from support.deeds import in_trouble
from support.language import GIBIBYTE, MEBIBYTE, disk, vm
from support.process import PASSWORD, PROGRAM, ROOT, Run, ended, run_program, text_of
from support.shelf import complete, old, path_of

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
    assert run.exit_status == 0 and run.stderr == '' and run.never_says('scp '), run
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


def test_on_a_terminal_it_asks_nothing_and_no_line_of_its_own_needs_more_than_80_columns(a_site: Any) -> None:
    site = a_site(nfs('snapshots'))
    terminal, side = os.openpty()
    process = warm.start(site.start('config=' + site.config), site.pool.environment(), stdin=side, stdout=side, stderr=side)
    os.close(side)
    shown = b''
    with contextlib.suppress(OSError):                                   # EIO: nobody has the terminal open any more
        for piece in iter(lambda: os.read(terminal, 4096), b''):
            shown += piece
    os.close(terminal)
    assert process.wait() == 0 and site.preview().exit_status == 0
    text = text_of(shown).replace('\r\n', '\n')
    assert 'vmbackup.cfg is written:' in text and not re.search('[\x00-\x09\x0b-\x1f\x7f]', text)
    preview = text.index('Preview of')
    own = text[:preview] + text[text.index('The first night'):]
    prose = [line for line in own.splitlines() if '/' not in line]
    assert len(prose) > 30 and max(map(len, prose)) <= 83                 # the config is shown four columns to the right


def test_the_config_tells_above_each_line_why_it_is_there(a_site: Any) -> None:
    site = a_site(nfs('snapshots'), hosts=TWO)
    assert site.setup('exclude=db', 'max_backups=5').exit_status == 0
    with open(site.config, encoding='utf-8') as file:
        parts = [part.splitlines() for part in file.read().split('\n\n')]
    assert parts[0][0].startswith('# Written by VmBackup.py setup on 2') and '(2 hosts, master # xcp1)' in ' '.join(parts[0])
    assert parts[-1] == ['# All keys, with what they mean: VmBackup.py help config']
    told = {part[-1].partition('=')[0]: ' '.join(line[2:] for line in part[:-1]) for part in parts[1:-1]}
    assert all(line.startswith('# ') for part in parts[1:-1] for line in part[:-1]) and all(told.values())
    assert list(told) == ['vm-export', 'exclude', 'pool_db_backup', 'wildcards', 'backup_dir', 'status_log', 'max_backups', 'hosts']
    assert '1 VM with disks of 8.0 MiB, of which 4.0 MiB are in use' in told['vm-export']
    assert '(nfs4, nas:/export100): 12 TiB free of 16 TiB' in told['backup_dir']
    assert (told['exclude'], told['max_backups']) == ('As given.', 'As given.') and 'The 2 hosts' in told['hosts']
    assert stat.S_IMODE(os.stat(site.config).st_mode) == 0o644


def test_the_way_to_try_one_vm_takes_its_name_whatever_it_is(a_site: Any) -> None:
    site = a_site(nfs('snapshots'), vms=[vm('it\'s "$(reboot)" \\ 100%*\u2603', disks=[disk(size=MEBIBYTE, used=1)]), vm('web')])
    run = site.setup()
    assert run.exit_status == 0, run
    command = run.stdout.splitlines()[-1]
    done = subprocess.Popen(['/bin/sh', '-c', command], env=site.pool.environment(), cwd='/', stdout=subprocess.PIPE)
    told = text_of(done.communicate()[0])
    assert done.returncode == 0 and '\u2603' in told and '1 VM backed up' in told and 'web' not in told


@pytest.mark.parametrize('names', [['twin', 'twin'], ['a\nb\x1b[31m', 'web'], [' ', 'web']], ids=['of two', 'control', 'blank'])
def test_a_vm_that_cannot_be_typed_is_tried_by_its_uuid(a_site: Any, names: List[str]) -> None:
    uuids = ['00000000-0000-4000-8000-00000000000%d' % number for number in range(2)]
    site = a_site(nfs('snapshots'), vms=[vm(name, uuid=uuids[number], disks=[disk(size=(1 + number) * MEBIBYTE, used=1)])
                                         for number, name in enumerate(names)])
    run = site.setup()
    assert run.stdout.endswith(' vm-export=uuid:%s\n' % uuids[0]) and '\x1b' not in run.output
    assert run.exit_status == (3 if names[0] == names[1] else 0), run


def test_a_pool_without_a_vm_gets_a_config_for_those_to_come(a_pool: Any, a_shelf: Any) -> None:
    site = Site(a_pool(), a_shelf(), nfs('snapshots'))
    run = site.setup()
    assert run.exit_status == 3 and site.value('vm-export') == '*' and site.preview().exit_status == 3, run
    assert run.says('matches no VM') and not run.says('To try it now')


def test_a_pool_of_500_vms_is_reckoned_in_one_login(a_site: Any) -> None:
    site = a_site(nfs('snapshots', free=2000 * MEBIBYTE), vms=[vm('vm%03d', count=500, disks=[disk(size=4 * MEBIBYTE, used=1)])])
    run = site.setup()
    assert run.exit_status == 0 and run.says('500 VMs with disks of 2.0 GiB,'), run.output[:3000]
    assert run.says('reads about 500 MiB of 500 VMs')
    assert site.value('max_backups') == '14' and site.value('incremental') == 'yes'
    assert len(site.pool.calls('api:session.login_with_password')) == 1
    assert len(site.pool.calls('api:*')) == 11, [entry['call'] for entry in site.pool.calls('api:*')]


# --- the share -------------------------------------------------------------------------------------------------------

def test_where_backups_are_already_is_taken_before_where_more_space_is(a_site: Any) -> None:
    site = a_site(nfs('large'), nfs('old', free=2 * TIB))
    shutil.copytree(a_store_of_the_older_program(site), site.at('old', 'web'))
    run = site.setup()
    assert run.exit_status == 0 and site.value('backup_dir') == site.at('old'), run
    with open(site.config, encoding='utf-8') as file:
        assert 'could be on %s (nfs4, nas:/export100), 12 TiB free, too' % site.at('large') in file.read().replace('\n# ', ' ')


def a_store_of_the_older_program(site: Site) -> str:
    complete('web').put(site.shelf, 1)
    return site.shelf.at('web')


def test_an_empty_share_is_the_store_itself_and_one_in_use_gets_a_directory(a_site: Any) -> None:
    site = a_site(nfs('snapshots'))
    os.makedirs(site.at('snapshots', 'lost+found'))
    os.makedirs(site.at('snapshots', '.snapshot'))
    assert site.setup().exit_status == 0 and site.value('backup_dir') == site.at('snapshots')
    os.unlink(site.config)
    os.mkdir(site.at('snapshots', 'music'))
    assert site.setup().exit_status == 0 and site.value('backup_dir') == site.at('snapshots', 'BACKUPS')
    assert os.listdir(site.at('snapshots', 'BACKUPS')) == []


UNFIT = {'an SR of the pool': nfs('sr', shown='/run/sr-mount/5a1c0f3e'),
         'an SR at the older place': nfs('sr', shown='/var/run/sr-mount/5a1c'),
         'read-only': nfs('iso', options='ro,vers=3'), 'in memory': nfs('ram', kind='tmpfs', source='tmpfs'),
         'of the system': nfs('log', kind='ext4', source='/dev/sda5'), 'a CD': nfs('cd', kind='iso9660', source='/dev/sr0'),
         'of a disk that nobody knows': nfs('lv', kind='ext4', source='/dev/mapper/XSLocalEXT-1')}


@pytest.mark.parametrize('what', sorted(UNFIT))
def test_what_is_no_share_is_not_taken_and_a_mount_command_is_told(a_site: Any, what: str) -> None:
    site = a_site(UNFIT[what])
    run = site.setup()
    assert run.exit_status == 2 and run.stdout == '' and site.files() == [], run
    assert 'mount -t nfs SERVER:/EXPORT' in run.stderr and 'mount -t cifs' in run.stderr and 'backup_dir=' in run.stderr
    assert ('it is not writable' in run.stderr) is (what == 'read-only')


def test_an_export_that_is_an_sr_is_no_share_under_another_name_either(a_site: Any) -> None:
    site = a_site(nfs('share'), nfs('sr', shown='/run/sr-mount/5a1c0f3e'))
    site.mounts[0]['same_as'] = 1
    run = site.setup()
    assert run.exit_status == 2 and site.files() == [], run


def test_a_pool_of_one_host_may_use_a_disk_of_its_own_but_a_share_goes_first(a_site: Any) -> None:
    usb = nfs('usb', kind='ext4', source='/dev/sdb1', free=20 * TIB)
    site = a_site(usb, nfs('share'))
    assert site.setup().exit_status == 0 and site.value('backup_dir') == site.at('share')
    site = a_site(usb)
    assert site.setup().exit_status == 0 and site.value('backup_dir') == site.at('usb')
    assert a_site(usb, hosts=TWO).setup().exit_status == 2


def test_on_a_store_that_other_hosts_cannot_see_one_host_does_all_with_a_warning(a_site: Any) -> None:
    site = a_site(nfs('usb', kind='ext4', source='/dev/sdb1'), hosts=TWO)
    run = site.setup('backup_dir=' + site.at('usb'))
    assert run.exit_status == 3 and run.says('of this host only') and run.never_says('every host of the pool,'), run
    assert run.says("other hosts of the pool can't see it") and site.value('hosts') == ''
    assert run.says('%s/VmBackup.log 2>&1' % site.home)


@pytest.mark.parametrize('kind, options, hosts, status', [
    ('nfs4', 'rw', 'all', 0), ('nfs', 'rw,nolock', '', 0), ('cifs', 'rw', 'all', 0), ('fuse.sshfs', 'rw', '', 3)])
def test_hosts_share_the_work_where_their_locks_reach_each_other(a_site: Any, kind: str, options: str, hosts: str,
                                                                 status: int) -> None:
    site = a_site(nfs('snapshots', kind=kind, options=options), hosts=TWO)
    run = site.setup()
    assert (run.exit_status, site.value('hosts')) == (status, hosts), run
    assert run.says('of every host of the pool') is (status == 0)


def test_a_share_that_hangs_is_passed_over(a_site: Any) -> None:
    site = a_site(nfs('dead'), nfs('alive', free=TIB))
    run = site.setup(at=['dead'], do='hang', hurried=True)
    assert run.exit_status == 0 and site.value('backup_dir') == site.at('alive'), run
    told = ' '.join(run.stdout.split())
    assert 'Passed over: %s (nfs4, nas:/export100): looking at it hangs' % site.at('dead') in told


def test_a_given_store_that_hangs_leaves_no_config(a_site: Any) -> None:
    site = a_site(nfs('dead'))
    run = site.setup('backup_dir=' + site.at('dead'), at=['dead'], do='hang', hurried=True)
    assert run.exit_status == 2 and 'gave no answer for 8.0 min' in run.stderr and 'Nothing was written' in run.stderr, run
    assert site.files() == []                                                # such a minute is half a second


def test_a_share_with_a_name_that_no_config_can_hold_is_passed_over(a_site: Any) -> None:
    site = a_site(nfs('my share'), nfs('evil\nexclude=*'))
    run = site.setup()
    assert run.exit_status == 0 and site.value('backup_dir') == site.at('my share'), run
    assert 'no config can name it' in ' '.join(run.stdout.split()) and site.value('exclude') == ''
    assert site.preview().exit_status == 0


# --- what is given ---------------------------------------------------------------------------------------------------

def test_what_is_given_is_what_the_config_says(a_site: Any) -> None:
    site = a_site(nfs('snapshots'), hosts=TWO)
    words = ['vdi-export=web', 'vm-export="db":2', 'exclude=x*', 'exclude=y*', 'workers=2', 'hosts=first', 'compress=gzip',
             'pool_db_backup=no', 'status_log=/tmp/s.log', 'backup_dir=' + site.at('snapshots'), 'keep_weekly=8']
    run = site.setup(*words)
    assert run.exit_status == 3, run                                         # x* and y* exclude no VM
    assert sorted(site.lines) == sorted(words + ['wildcards=shell']) and run.says('with 2 exports at a time')


def test_a_path_that_is_given_relative_is_written_so_that_cron_finds_it(a_site: Any) -> None:
    site = a_site(nfs('snapshots'))
    run = run_program('-', 'setup', 'config=' + site.config, 'backup_dir=' + os.path.relpath(site.at('snapshots'), '/'), 'status_log=tmp/s',
                      environment=site.pool.environment())               # it is started in /
    assert run.exit_status == 0 and (site.value('backup_dir'), site.value('status_log')) == (site.at('snapshots'), '/tmp/s'), run


@pytest.mark.parametrize('given, kept', [([old('web', days_ago=day) for day in range(1, 10)], '9'), ([old('web'), complete('db')], '7')])
def test_never_fewer_copies_are_proposed_than_are_there(a_site: Any, given: Sequence[Any], kept: str) -> None:
    site = a_site(nfs('BACKUPS'))
    for number, one in enumerate(given, 1):
        one.put(site.shelf, number)
    run = site.setup()
    assert run.exit_status == 0 and site.value('max_backups') == kept and not run.says('good copies that are there'), run


def test_a_store_full_of_older_copies_is_room_for_as_many_as_they_are(a_site: Any) -> None:
    site = a_site(nfs('BACKUPS', free=MEBIBYTE), vms=[vm('web', disks=[disk(size=GIBIBYTE, used=9)])])
    for number in range(1, 4):
        old('web', days_ago=number).put(site.shelf, number)
    run = site.setup()
    assert run.exit_status == 3 and site.value('max_backups') == '3' and run.says('4 fulls of everything take up to 36 MiB'), run


def test_a_first_night_that_would_remove_more_than_it_makes_is_told(a_site: Any) -> None:
    site = a_site(nfs('BACKUPS'))
    for number in range(1, 5):
        old('web', days_ago=number).put(site.shelf, number)
    run = site.setup('max_backups=2')
    assert run.exit_status == 3 and site.value('max_backups') == '2', run
    told = run.stdout.replace('\n', ' ')
    assert 'removes 3 good copies that are there, and makes 2' in told and 'max_backups=4 keeps them' in told, run
    os.unlink(site.config)
    run = site.setup('vm-export=web:2')
    assert run.exit_status == 3 and 'or :4 where a selector has another number' in run.stdout.replace('\n', ' '), run


def test_copies_of_the_other_kind_are_not_counted_with_those_of_this(a_site: Any) -> None:
    site = a_site(nfs('BACKUPS'))
    for number, kind in enumerate(['vm-export'] * 5 + ['vdi-export'] * 9, 1):
        complete('web', days_ago=number, kind=kind).put(site.shelf, number)
    run = site.setup()
    assert run.exit_status == 0 and site.value('max_backups') == '7', run


@pytest.mark.parametrize('config, told', [('{home}', 'is a directory'), ('{home}/none/x.cfg', '/none is not there')])
def test_a_config_that_can_be_no_file_is_told_with_one_that_can(a_site: Any, config: str, told: str) -> None:
    site = a_site(nfs('snapshots'))
    site.config = config.format(home=site.home)
    run = site.setup()
    assert run.exit_status == 2 and run.says(told) and run.says('such as config=') and site.files() == [], run


@pytest.mark.parametrize('source, is_told', [('nas:/x/0a1b', True), ('nas:/x', True), ('nas:/xy', False), ('other:/x/0a1b', False)])
def test_a_share_that_holds_an_sr_too_is_taken_last_and_told(a_site: Any, source: str, is_told: bool) -> None:
    site = a_site(nfs('snapshots', source='nas:/x'), nfs('sr', source=source, shown='/run/sr-mount/0a1b'))
    run = site.setup()
    assert site.value('backup_dir') == site.at('snapshots') and run.says('lost together') is is_told, run
    assert run.exit_status == (3 if is_told else 0)
    os.unlink(site.config)
    os.mkdir(site.at('later'))
    site.mounts.append(nfs(site.at('later'), source='nas:/z', free=TIB))
    assert site.setup().exit_status == 0 and site.value('backup_dir') == site.at('later' if is_told else 'snapshots')


def test_a_wrong_value_alone_is_told_and_no_missing_store_that_setup_would_look_for(a_site: Any) -> None:
    run = a_site(nfs('snapshots')).setup('max_backups=x')
    assert run.exit_status == 2 and run.says('max_backups') and not run.says('backup_dir'), run


@pytest.mark.parametrize('where', ['on the root disk', 'missing', 'a file', 'on the disk of the host'])
def test_a_store_that_will_not_do_is_told_and_nothing_is_written(a_site: Any, where: str) -> None:
    site = a_site(nfs('log', kind='ext4', source='/dev/sda5'))
    places = {'on the root disk': site.shelf.path, 'a file': site.at('file'), 'on the disk of the host': site.at('log')}
    open(site.at('file'), 'w').close()
    run = site.setup('backup_dir=' + places.get(where, '/no/such'), 'require_mount=yes')
    told = {'on the root disk': 'lies on the root file system',
            'on the disk of the host': "lies on the host's own disk (/dev/sda5)"}
    assert run.exit_status == 2 and told.get(where, "can't be opened") in run.stderr, run
    assert run.stderr.startswith('command line: backup_dir: ') and run.stdout == '' and site.files() == ['file']


def test_all_wrong_values_are_told_at_once(a_site: Any) -> None:
    site = a_site(nfs('snapshots'))
    run = site.setup('max_backups=none', 'compress=rar', 'mail_to=nobody')
    assert run.exit_status == 2 and all(key in run.stderr for key in ('max_backups', 'compress', 'mail_to')), run
    assert site.files() == [] and site.pool.journal() == []


@pytest.mark.parametrize('word, told', [('max_backup=3', 'did you mean max_backups'), ('vm-export=wbe', 'no VM of the pool'),
                                        ('exclude=a\nvm-export=b', "can't hold a line break"),
                                        ('keep_reference=yes', 'needs incremental'),
                                        ('vdi-export=db', ''), ('preview', 'one word too many')])
def test_a_word_that_means_nothing_here_writes_nothing(a_site: Any, word: str, told: str) -> None:
    site = a_site(nfs('snapshots'), vms=[vm('web'), vm('db', disks=[disk(userdevice='3')])])
    run = site.setup(word)
    assert (run.exit_status == 2 and told in run.stderr and site.files() == []) is bool(told), run


def test_a_secret_address_is_not_shown_and_its_config_not_for_all(a_site: Any) -> None:
    site = a_site(nfs('snapshots'))
    run = site.setup('ping_url=http://127.0.0.1:9/ping/' + SECRET)
    assert run.exit_status == 0 and run.never_says(SECRET) and site.value('ping_url').endswith(SECRET), run
    assert stat.S_IMODE(os.stat(site.config).st_mode) == 0o600


# --- from elsewhere --------------------------------------------------------------------------------------------------

def test_from_another_machine_it_takes_a_pool_and_a_password_file(a_site: Any) -> None:
    site = a_site(nfs('snapshots'), hosts=TWO)
    file = site.at("pass'word")
    assert run_program(PASSWORD, 'create-password-file=' + file).exit_status == 0
    elsewhere = {'PATH': site.pool.environment()['PATH']}
    run = site.setup('pool=' + site.pool.url_of(1), password=file, environment=elsewhere)
    assert run.exit_status == 0 and site.value('hosts') == '' and site.value('pool') == site.pool.url_of(1), run
    command = crontab(run, '10 0 * * * ')
    assert subprocess.call(['/bin/sh', '-c', command], env=elsewhere, stdin=subprocess.DEVNULL) == 0
    assert sorted(os.listdir(site.at('snapshots')))[-2:] == ['db', 'web']


def test_a_password_that_was_typed_is_neither_shown_nor_written(a_site: Any) -> None:
    site = a_site(nfs('snapshots'))
    run = site.setup('pool=' + site.pool.url_of(1), password=PASSWORD, environment={'PATH': site.pool.environment()['PATH']})
    assert run.exit_status == 0 and ' PASSWORD_FILE ' in crontab(run, '10 0 * * * '), run
    assert ' PASSWORD create-password-file=FILE' in run.stdout
    assert PASSWORD not in re.sub('create-password-file|The password|the password', '', run.output)
    with open(site.config, encoding='utf-8') as config:
        assert PASSWORD not in config.read()


@pytest.mark.parametrize('password, status', [('wrong', 4), ('-', 4)], ids=['refused', 'no pool here'])
def test_without_the_pool_nothing_is_written(a_site: Any, password: str, status: int) -> None:
    site = a_site(nfs('snapshots'))
    if password == '-':
        site.pool.stop()
    run = site.setup(password=password, hurried=True)
    assert run.exit_status == status and run.stdout.count('is written') == 0 and site.files() == [], run


def test_what_lies_on_one_host_alone_is_to_be_copied_to_the_others(a_site: Any) -> None:
    site = a_site(nfs('snapshots'), hosts=TWO)
    file = site.at("pass'word")
    assert run_program(PASSWORD, 'create-password-file=' + file).exit_status == 0
    run = site.setup(password=file)
    copies = [shlex.split(line) for line in run.stdout.splitlines() if line.startswith('scp ')]
    assert sorted(words[1] for words in copies) == sorted([PROGRAM, site.config, file]), run
    assert all(words[2] == 'root@HOST:%s/' % os.path.dirname(words[1]) for words in copies)
    assert a_site(nfs('snapshots')).setup().never_says('scp ')


# --- room ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('free_mib, keys', [
    (200, {'max_backups': '7', 'incremental': '', 'verify_after': ''}), (40, {'max_backups': '3', 'incremental': ''}),
    (31, {'max_backups': '11', 'full_every': '11', 'incremental': 'yes', 'verify_after': 'yes'})])
def test_what_is_kept_follows_from_the_space_and_the_data_in_use(a_site: Any, free_mib: int, keys: Dict[str, str]) -> None:
    site = a_site(nfs('snapshots', free=free_mib * MEBIBYTE), vms=[vm('web', disks=[disk(size=GIBIBYTE, used=9)])])
    run = site.setup()
    assert run.exit_status == 0 and {key: site.value(key) for key in keys} == keys, run
    assert run.says('reads about 9.0 MiB of 1 VM') and run.says('reads back') is (free_mib == 31)


@pytest.mark.parametrize('words, size', [(['vdi-export=web'], '40 MiB'), (['vdi-export=web', 'vdi_export_format=vhd'], '9.0 MiB'),
                                         (['vm-export=web'], '11 MiB'), (['vm-export=web', 'exclude-disk=web/xvdb'], '9.0 MiB')])
def test_what_is_reckoned_is_what_the_kind_of_export_reads(a_site: Any, words: List[str], size: str) -> None:
    site = a_site(nfs('snapshots'), vms=[vm('web', disks=[disk(size=40 * MEBIBYTE, used=9), disk()]), vm('db')])
    run = site.setup(*words)
    assert run.exit_status == 0 and run.says('reads about %s of 1 VM' % size), run


def test_room_for_one_full_alone_is_a_warning_and_for_none_the_end(a_site: Any) -> None:
    site = a_site(nfs('snapshots', free=15 * MEBIBYTE), vms=[vm('web', disks=[disk(size=GIBIBYTE, used=9)])])
    run = site.setup()
    assert run.exit_status == 3 and site.value('max_backups') == '1', run
    assert '2 fulls of everything' in run.stdout.replace('\n', ' ')
    os.unlink(site.config)
    site.mounts[0]['free'] = 21 * MEBIBYTE
    run = site.setup()
    assert run.exit_status == 3 and site.value('max_backups') == '1' and run.says('one copy of each VM can stay'), run
    os.unlink(site.config)
    site.mounts[0]['free'] = 8 * MEBIBYTE
    run = site.setup()
    assert run.exit_status == 2 and site.files() == [], run
    assert all(map(run.says, ('8.0 MiB free', 'takes up to 9.0 MiB', 'larger share', 'vm-export=', 'exclude=', 'backup_dir=')))
    assert site.setup('max_backups=4').exit_status == 3 and site.value('max_backups') == '4'        # it does as told


# --- whole or not at all ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('what', ['a config', 'a link to nowhere'])
def test_what_stands_there_is_left_as_it_is(a_site: Any, what: str) -> None:
    site = a_site(nfs('snapshots'))
    if what == 'a config':
        with open(site.config, 'w', encoding='utf-8') as file:
            file.write('mine\n')
    else:
        os.symlink('/no/such/file', site.config)

    def state() -> Any:            # all but the time of the last reading
        status = os.lstat(site.config)
        return status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    before = state()
    run = site.setup()
    assert run.exit_status == 2 and 'exists already and was left as it is; config=OTHER' in run.stderr, run
    assert state() == before and site.files() == ['vmbackup.cfg'] and site.pool.journal() == []


@pytest.mark.parametrize('name', ['no/such/folder.cfg', 'snapshots'])
def test_where_no_config_can_be_no_directory_stays_either(a_site: Any, name: str) -> None:
    site = a_site(nfs('snapshots'))
    os.mkdir(site.at('snapshots', 'music'))
    site.config = site.at(name)
    run = site.setup()
    assert run.exit_status == 2 and os.path.dirname(site.config) in run.stderr and site.files() == ['snapshots/music'], run


def steps_of(site: Site, named: bool) -> List[str]:
    """The steps that setup takes in the site's storage, one that makes BACKUPS and a config."""
    trace = site.at('TROUBLE-trace')
    assert site.setup(store=site.home, trace=trace, named=named).exit_status == 0
    with open(trace, encoding='utf-8') as file:
        return file.read().splitlines()


def cleared(site: Site) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(site.config)
    shutil.rmtree(site.at('snapshots', 'BACKUPS'), ignore_errors=True)


def has_nameless_files(place: str) -> bool:
    with contextlib.suppress(OSError):
        os.close(os.open(place, os.O_WRONLY | os.O_TMPFILE))
        return True
    return False


@pytest.mark.parametrize('named', [False, True])
@pytest.mark.parametrize('do', ['SIGKILL', 'SIGTERM', 'ENOSPC', 'EIO', 'EACCES'])
def test_whatever_ends_it_at_whatever_step_leaves_a_whole_config_or_nothing(a_site: Any, do: str, named: bool) -> None:
    site = a_site(nfs('snapshots'))
    os.mkdir(site.at('snapshots', 'music'))
    named = named or not has_nameless_files(site.home)        # where each file has a name, a kill leaves one that is not whole
    steps = steps_of(site, named)
    with open(site.config, 'rb') as file:
        whole = file.read()
    kinds = [step.split()[0] for step in steps]
    assert [kinds.count(kind) for kind in ('mkdir', 'create', 'write', 'link', 'unlink')] == [1, 1, 1, 1, named], steps
    assert kinds.index('write') < kinds.index('mkdir') < kinds.index('link')
    for number, step in enumerate(steps, 1):
        cleared(site)
        run = site.setup(store=site.home, step=number, do=do, named=named)
        left = set(site.files()) - {'snapshots/music'}
        if 'vmbackup.cfg' in left:
            with open(site.config, 'rb') as file:
                assert file.read() == whole, step
            assert run.exit_status == 0 or kinds[number - 1] == 'unlink' or kinds[number - 2] == 'link', (step, run)
            left -= {'vmbackup.cfg', 'snapshots/BACKUPS'}
        else:
            assert run.exit_status != 0, (step, run)
        if do == 'SIGKILL' and number > kinds.index('mkdir') + 1:
            left.discard('snapshots/BACKUPS')                 # made last of all: it is empty then
        litter = [name for name in left if named and name.endswith('.partial')]
        assert left == set(litter) and (not litter or do == 'SIGKILL' or kinds[number - 1] == 'unlink'), (step, left)
        assert os.path.exists(site.config) or site.setup(store=site.home, named=named).exit_status == 0, step
        for name in litter:
            os.unlink(site.at(name))


def test_a_config_that_comes_there_meanwhile_is_not_replaced(a_site: Any) -> None:
    site = a_site(nfs('snapshots'))
    os.mkdir(site.at('snapshots', 'music'))
    number = next(number for number, step in enumerate(steps_of(site, False), 1) if step.startswith('link'))
    cleared(site)
    run = site.setup(store=site.home, step=number, do='run', command=['/bin/sh', '-c', 'echo mine > ' + site.config])
    assert run.exit_status == 2 and site.files() == ['snapshots/music', 'vmbackup.cfg'], run
    with open(site.config, encoding='utf-8') as file:
        assert file.read() == 'mine\n'
