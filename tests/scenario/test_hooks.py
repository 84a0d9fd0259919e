"""Programs of the administrator's: when and where each runs, what it is told, and what one costs that does not behave.

The programs of these tests note all that they see before they do anything; `noted` reads it.
"""

import contextlib
import glob
import json
import os
import re
import shlex
import signal
import time
from typing import Any, Dict, List, NamedTuple

import pytest

from support.deeds import backup, beginning, hurried_backup, is_exporting, preview, without_pool
from support.language import MEBIBYTE, at, disk, slowly, uuid_of, vm
from support.process import ROOT, Pool
from support.shelf import Shelf, complete
from support.wire import eventually

KINDS = ('before_run', 'before_vm', 'after_vm', 'after_run')
BIG = [disk(size=16 * MEBIBYTE, used=16)]
HOSTS = [{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'}, {'name_label': 'xcp3'}]

# `$here` is where this one notes what it sees; its name is in the order of time. It is `.noted` once all is there.
NOTE = r'''#!/bin/sh
here=$(mktemp -d {notes}/$(date +%s%N).XXXXXX)
cat {pool}/journal.jsonl > $here/journal
find {store} > $here/store 2> /dev/null
ls -l /proc/$PPID/fd > $here/open
ls -l /proc/self/fd > $here/inherited
grep VmHWM /proc/$PPID/status > $here/memory
cat /proc/$$/environ > $here/environment
for word; do printf '%s\0' "$word"; done > $here/words
[ -n "$deaf" ] || cat > $here/stdin
mv $here $here.noted
here=$here.noted
'''


class Noted(NamedTuple):
    """What one of these programs saw."""
    hook: str
    words: List[str]
    variables: Dict[str, str]   # of its environment, without VMBACKUP_
    told: Dict[str, Any]        # on stdin
    place: str

    def text(self, name: str) -> str:
        with open(os.path.join(self.place, name), encoding='utf-8', errors='surrogateescape', newline='\n') as file:
            return file.read()

    def store(self) -> List[str]:
        """All that lay in backup_dir."""
        return self.text('store').splitlines()

    def calls(self, name: str) -> int:
        """So many calls of that name had the pool seen; '' for all."""
        return len([line for line in self.text('journal').splitlines() if name in line])

    def memory_bytes(self) -> int:
        """The most that VmBackup.py had needed till then."""
        return int(self.text('memory').split()[1]) * 1024


def hooked(pool: Pool, shelf: Shelf, *words: str, **bodies: str) -> List[str]:
    """The lines of the config with these programs, by the key that each is for; what it does once it has noted all."""
    notes, lines = os.path.join(shelf.home, 'notes'), []
    os.makedirs(notes, exist_ok=True)
    for kind, body in bodies.items():
        path = os.path.join(shelf.home, kind)
        with open(path, 'w', encoding='utf-8') as file:
            file.write(NOTE.format(notes=notes, pool=pool.dir, store=shlex.quote(shelf.path)) + body + '\n')
        os.chmod(path, 0o755)
        lines.append(' '.join(['%s=%s' % (kind, path)] + list(words)))
    return lines


def noted(shelf: Shelf, kind: str = '') -> List[Noted]:
    """What these programs saw, in the order in which they began."""
    found = []
    for place in sorted(glob.glob(os.path.join(shelf.home, 'notes', '*.noted'))):
        one = Noted('', [], {}, {}, place)
        variables = dict(item.split('=', 1) for item in one.text('environment').split('\0') if item.startswith('VMBACKUP_'))
        variables = {name[len('VMBACKUP_'):]: value for name, value in variables.items() if name != 'VMBACKUP_POOL'}
        told = json.loads(one.text('stdin')) if os.path.exists(os.path.join(place, 'stdin')) else {}
        found.append(one._replace(hook=variables['HOOK'], words=one.text('words').split('\0')[:-1],
                                  variables=variables, told=told))
    return [one for one in found if kind in ('', one.hook)]


def order(shelf: Shelf) -> List[str]:
    return [' '.join([one.hook] + [one.variables[key] for key in ('VM_NAME',) if key in one.variables]) for one in noted(shelf)]


def of(shelf: Shelf, kind: str, name: str = '') -> Noted:
    """What the only program of that kind, for that VM, saw."""
    (one,) = [one for one in noted(shelf, kind) if one.variables.get('VM_NAME', '') == name]
    return one


def open_in_store(shelf: Shelf, one: Noted, whose: str = 'open') -> List[str]:
    """Where the descriptors lead that VmBackup.py had open below backup_dir just then."""
    return [line for line in one.text(whose).splitlines() if (line.partition(' -> ')[2] + '/').startswith(shelf.path + '/')]


def end_of(shelf: Shelf, name: str) -> str:
    """What the status log has for that VM: SUCCESS, or what went wrong."""
    (line,) = [line for line in shelf.status_lines() if re.search(r',end,\S+ %s(,|$)' % name, line)]
    return line.split(',end,')[1].split(' ')[0]


def leaves_nothing(pool: Pool, shelf: Shelf) -> bool:
    return pool.has_no_snapshots_of_ours() and shelf.unfinished() == [] and shelf.journals() == []


# --- when and where --------------------------------------------------------------------------------------------------

def test_each_runs_in_its_place_the_ones_of_a_vm_around_its_snapshot_and_its_copy(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('db'), vm('web')), a_shelf()
    run = backup(pool, shelf, 'vm-export=*', *hooked(pool, shelf, **dict.fromkeys(KINDS, '')))
    assert run.exit_status == 0 and run.stderr == '', run
    first, second = ('db', 'web') if order(shelf)[1].endswith('db') else ('web', 'db')
    assert order(shelf) == ['before_run', 'before_vm ' + first, 'after_vm ' + first, 'before_vm ' + second, 'after_vm ' + second,
                            'after_run']
    assert [one.calls('"VM.snapshot"') for one in noted(shelf)] == [0, 0, 1, 1, 2, 2]
    assert noted(shelf)[0].calls('') == 0, 'the pool has heard nothing before before_run'
    for name in (first, second):
        copy = shelf.at(name, shelf.newest(name))
        assert copy not in of(shelf, 'before_vm', name).store()
        assert copy + '/success' in of(shelf, 'after_vm', name).store()


def test_before_run_may_make_the_backup_directory_that_is_not_there_yet(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    os.rmdir(shelf.path)
    run = backup(pool, shelf, 'vm-export=web', *hooked(pool, shelf, before_run='mkdir -m 700 "$VMBACKUP_BACKUP_DIR"'))
    assert run.exit_status == 0 and shelf.has('web', complete=1), run
    assert open_in_store(shelf, of(shelf, 'before_run')) == []


@pytest.mark.parametrize('body, told', [('exit 7', 'exit status 7'), ('kill -KILL $$', 'SIGKILL')])
def test_a_before_run_that_fails_starts_nothing_and_after_run_runs_all_the_same(a_pool: Any, a_shelf: Any,
                                                                               body: str, told: str) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', *hooked(pool, shelf, before_run=body, before_vm='', after_vm='', after_run=''))
    assert run.exit_status == 1 and 'before_run: ' in run.stderr and told in run.stderr, run
    assert 'This host backed up nothing.' in run.stderr, run
    assert pool.journal() == [] and shelf.names() == []
    assert order(shelf) == ['before_run', 'after_run']
    seen = of(shelf, 'after_run').variables
    assert seen['WORD'] == 'ERROR' and seen['EXIT_STATUS'] == '1' and seen['VMS'] == '0'


def test_when_after_run_runs_nothing_of_the_program_is_open_in_the_backup_directory(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf(complete('old', days_ago=2))
    lines = ['vm-export=*', 'workers=2', 'incremental=yes', 'pool_db_backup=yes', 'report_html=%s/page.html' % shelf.home]
    for _ in range(2):
        assert backup(pool, shelf, *lines, *hooked(pool, shelf, before_vm='', after_run='')).exit_status == 0
        time.sleep(1.1)                     # no two copies bear one name
    assert open_in_store(shelf, noted(shelf, 'before_vm')[0]) != [], 'so the test sees what is open'
    assert [open_in_store(shelf, one) for one in noted(shelf, 'after_run')] == [[], []]


FULL = ['SR_BACKEND_FAILURE_44', '', '', '']
ENDINGS = {
    'a VM failed': (['vm-export=web'], '-', 1), 'a VM is not there': (['vm-export=nobody'], '-', 1),
    'the pool is down': (['vm-export=web', 'pool=127.0.0.1:1'], 'password', 4),
    'a program is not there': (['vm-export=web', 'xe_path=/nowhere/xe'], '-', 2),
    'no share is mounted': (['vm-export=web', 'require_mount=yes'], '-', 2),
    'before_run failed': (['vm-export=web', 'before_run=/bin/false'], '-', 1),
}


@pytest.mark.parametrize('ending', sorted(ENDINGS))
def test_nothing_is_open_there_either_after_a_run_that_failed_or_ended_early(a_pool: Any, a_shelf: Any, ending: str) -> None:
    lines, password, status = ENDINGS[ending]
    pool, shelf = a_pool(vm('web'), faults=[at('api:VM.snapshot', fails=FULL)]), a_shelf()
    run = backup(pool, shelf, *lines, *hooked(pool, shelf, after_run=''), password=password)
    assert run.exit_status == status, run
    assert open_in_store(shelf, of(shelf, 'after_run')) == [], run
    assert of(shelf, 'after_run').variables['EXIT_STATUS'] == str(status)


def test_nothing_is_open_there_either_on_a_host_that_leaves_the_run_to_another(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), hosts=HOSTS), a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    run = backup(pool, shelf, 'vm-export=web', *hooked(pool, shelf, **dict.fromkeys(KINDS, '')), host=2)
    assert run.exit_status == 0 and run.says('left to it') and order(shelf) == ['before_run', 'after_run'], run
    assert open_in_store(shelf, of(shelf, 'after_run')) == []


def test_none_has_anything_open_of_the_program(a_pool: Any, a_shelf: Any) -> None:
    """Else what one leaves in the background would keep backup_dir mounted."""
    pool, shelf = a_pool(vm('web')), a_shelf()
    assert backup(pool, shelf, 'vm-export=web', *hooked(pool, shelf, **dict.fromkeys(KINDS, ''))).exit_status == 0
    for one in noted(shelf):
        assert open_in_store(shelf, one, 'inherited') == []
        assert 'socket:' not in one.text('inherited')


def test_with_all_hosts_the_ones_of_the_run_run_on_each_and_those_of_a_vm_once(a_pool: Any, a_shelf: Any) -> None:
    names = ['vm%d' % number for number in range(6)]
    pool = a_pool(*[vm(name, disks=BIG) for name in names], hosts=HOSTS, faults=[slowly()])
    shelf = a_shelf()
    config = shelf.config('vm-export=*', 'hosts=all', 'workers=2', *hooked(pool, shelf, **dict.fromkeys(KINDS, '')))
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(beginning(pool, shelf, host=host, config=config)) for host in (1, 2, 3)]
        # one that came when all is done would leave it to the others
        assert eventually(lambda: all('vm-export into' in process.output for process in processes)), processes[0].output
        pool.release()
        runs = [process.ending() for process in processes]
    assert [run.exit_status for run in runs] == [0, 0, 0], runs
    assert len(noted(shelf, 'before_run')) == 3
    assert sorted(one.variables['HOST'] for one in noted(shelf, 'after_run')) == ['xcp1', 'xcp2', 'xcp3']
    for kind in ('before_vm', 'after_vm'):
        assert sorted(one.variables['VM_NAME'] for one in noted(shelf, kind)) == names
    hosts = {line.split('SUCCESS ')[1].split(',')[0]: line.split(',')[2] for line in shelf.status_lines() if 'SUCCESS vm' in line}
    assert {one.variables['VM_NAME']: one.variables['HOST'] for one in noted(shelf, 'after_vm')} == hosts
    assert [open_in_store(shelf, one) for one in noted(shelf, 'after_run')] == [[], [], []]
    assert max(one.variables['VMS'] for one in noted(shelf, 'after_run')) == '6'


def test_preview_list_verify_and_prune_run_none(a_backup: Any) -> None:
    pool, shelf = a_backup(vm('web'))
    lines = hooked(pool, shelf, **dict.fromkeys(KINDS, 'exit 1'))
    assert preview(pool, shelf, 'vm-export=*', *lines).exit_status == 0
    for word in ('list', 'verify', 'prune', 'status', 'history'):
        assert without_pool(shelf, word, lines=['vm-export=*'] + lines).exit_status == 0, word
    assert noted(shelf) == []


# --- what they are told ----------------------------------------------------------------------------------------------

def test_each_has_its_words_as_a_shell_would_have_read_them_and_no_shell_reads_them(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    words = ['plain', '"two words"', "'single $HOME'", r'back\ slash', '$(touch', '"%s/x")' % shelf.home, '`id`', ';', '*', '""',
             'Büro', '-rf']
    assert backup(pool, shelf, 'vm-export=web', *hooked(pool, shelf, *words, **dict.fromkeys(KINDS, ''))).exit_status == 0
    for one in noted(shelf):
        assert one.words == ['plain', 'two words', 'single $HOME', 'back slash', '$(touch', shelf.home + '/x)', '`id`', ';', '*',
                             '', 'Büro', '-rf']
    assert len(noted(shelf)) == 4 and not os.path.exists(os.path.join(shelf.home, 'x)'))


def test_each_is_told_what_the_readme_promises_in_its_environment_and_the_same_on_stdin(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('db'), vm('web'), faults=[at('http:/export', object='db', breaks_off_after=MEBIBYTE)]), a_shelf()
    run = backup(pool, shelf, 'vm-export=*', *hooked(pool, shelf, **dict.fromkeys(KINDS, '')))
    assert run.exit_status == 1, run
    for one in noted(shelf):
        told = {key.upper(): str(value) for key, value in one.told.items() if isinstance(value, (str, int, float))}
        assert told == one.variables
        assert told['CONFIG'] == shelf.config_path and told['BACKUP_DIR'] == shelf.path and told['HOST']
    for name in ('db', 'web'):
        for kind in ('before_vm', 'after_vm'):
            told = of(shelf, kind, name).told
            assert (told['vm_uuid'], told['kind'], told['host']) == (uuid_of(name), 'vm-export', 'xcp1')
    good, failed, last = of(shelf, 'after_vm', 'web').told, of(shelf, 'after_vm', 'db').told, of(shelf, 'after_run').told
    copy = shelf.at('web', shelf.newest('web'))
    assert (good['outcome'], good['error'], good['copy']) == ('SUCCESS', '', copy)
    assert good['size_bytes'] == os.path.getsize(copy + '/web.xva') and 0 < good['seconds'] < 60
    assert (failed['outcome'], failed['copy']) == ('VM-EXPORT-FAIL', '') and failed['error'] and failed['error'] in run.stderr
    assert (last['word'], last['exit_status'], last['vms'], last['failed']) == ('ERROR', 1, 2, 1)
    assert last['size_bytes'] == good['size_bytes']
    assert {one['name']: bool(one['error']) for one in last['outcomes']} == {'web': False, 'db': True}


HOSTILE = ['quotes " and \' in it', "'; touch {home}/pwned; '", '$(touch {home}/pwned)', '`touch {home}/pwned`', '-rf', '--help',
           'first\nsecond', 'tab\there', 'C:\\web', 'Büro 🦊', '%s%n\\0', 'a=b', '*', ' ', '../../etc', 'x' * 255, 'e\u0301\u202e']


def test_names_that_bite_come_as_they_are_and_do_nothing(a_pool: Any, a_shelf: Any) -> None:
    shelf = a_shelf()
    names = sorted(name.format(home=shelf.home) for name in HOSTILE)
    pool = a_pool(*[vm(name, disks=[disk(size=MEBIBYTE, used=1, seed=number)]) for number, name in enumerate(names)])
    run = backup(pool, shelf, 'vdi-export=*', *hooked(pool, shelf, before_vm='', after_vm='echo "of $VMBACKUP_VM_NAME"'))
    assert run.exit_status == 0, run
    for kind in ('before_vm', 'after_vm'):
        assert sorted(one.variables['VM_NAME'] for one in noted(shelf, kind)) == names
        assert sorted(one.told['vm_name'] for one in noted(shelf, kind)) == names
    for one in noted(shelf, 'after_vm'):
        assert os.path.isfile(os.path.join(one.variables['COPY'], 'success')), one
    assert not os.path.exists(os.path.join(shelf.home, 'pwned'))
    assert all(re.match(r'\d{4}-\d\d-\d\d-\(', line) for line in run.stdout.splitlines())


def test_a_backup_directory_with_an_odd_name_is_told_as_it_is(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    path = os.path.join(shelf.home, 'Büro "1" $(reboot)')
    os.mkdir(path)
    lines = ['vm-export=web', 'backup_dir=' + path] + hooked(pool, shelf, **dict.fromkeys(KINDS, ''))
    assert backup(pool, shelf, *lines).exit_status == 0
    assert {one.variables['BACKUP_DIR'] for one in noted(shelf)} == {one.told['backup_dir'] for one in noted(shelf)} == {path}
    assert os.path.exists(of(shelf, 'after_vm', 'web').variables['COPY'] + '/success')


def test_no_password_is_in_what_any_of_them_is_told(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf()
    lines = ['vm-export=*', 'workers=2', 'pool=' + pool.url_of()] + hooked(pool, shelf, **dict.fromkeys(KINDS, ''))
    run = backup(pool, shelf, *lines, password='password')
    assert run.exit_status == 0 and len(noted(shelf)) == 6, run
    for one in noted(shelf):
        for name in ('environment', 'words', 'stdin'):
            assert 'password' not in one.text(name)


def test_what_they_print_is_in_the_log_line_by_line_under_their_name(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    body = r'''echo "it is $VMBACKUP_HOOK"; echo complaint >&2; printf 'a\033[31mb\rc\n\nB\374ro\nlast without end' '''
    run = backup(pool, shelf, 'vm-export=web', *hooked(pool, shelf, **dict.fromkeys(KINDS, body)))
    assert run.exit_status == 0, run
    for kind in KINDS:
        told = [line.split(kind + ': ', 1)[1] for line in run.stdout.splitlines() if kind + ': ' in line]
        assert told == ['it is ' + kind, 'complaint', r'a\x1b[31mb\rc', '', 'B\ufffdro', 'last without end'], run
    assert all('web' in line for line in run.stdout.splitlines() if '_vm: ' in line)
    assert '\x1b' not in run.output and '\r' not in run.output


# --- those that fail -------------------------------------------------------------------------------------------------

def test_a_vm_whose_before_vm_fails_is_not_backed_up_and_the_others_are(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('db'), vm('web')), a_shelf(complete('db', days_ago=2))
    lines = hooked(pool, shelf, before_vm='[ "$VMBACKUP_VM_NAME" != db ] || exit 9', after_vm='')
    run = backup(pool, shelf, 'vm-export=*:1', *lines)
    assert run.exit_status == 1 and 'no snapshot of db' in run.stderr, run
    assert 'ended with exit status 9; the log has what it said. Correct it, or before_vm= in the config.' in run.stderr, run
    assert end_of(shelf, 'db') == 'HOOK-FAIL' and end_of(shelf, 'web') == 'SUCCESS'
    assert [call['args'][2].partition(' ')[0] for call in pool.calls('api:VM.snapshot')] == ['web']
    assert shelf.still_holds('db') and shelf.has('db', complete=1) and shelf.has('web', complete=1)
    told = of(shelf, 'after_vm', 'db').variables
    assert told['OUTCOME'] == 'HOOK-FAIL' and told['COPY'] == '' and 'exit status 9' in told['ERROR']
    assert leaves_nothing(pool, shelf)


def test_a_vm_is_tried_no_second_time_because_its_before_vm_failed(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('db')), a_shelf()
    assert backup(pool, shelf, 'vdi-export=*', *hooked(pool, shelf, before_vm='exit 9')).exit_status == 1
    assert order(shelf) == ['before_vm db'] and pool.never_saw('api:VDI.snapshot')


def test_a_program_that_can_not_be_started_has_failed(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', 'before_vm=/nowhere/freeze')
    assert run.exit_status == 1 and 'before_vm: /nowhere/freeze could not be started' in run.stderr, run
    assert end_of(shelf, 'web') == 'HOOK-FAIL'
    run = backup(pool, shelf, 'vm-export=web', 'after_vm=/nowhere/thaw', 'after_run=' + shelf.home)
    assert run.exit_status == 3 and shelf.has('web', complete=1) and run.stderr.count(' - warning: ') == 2, run
    assert '/nowhere/thaw could not be started' in run.stderr and '%s could not be started' % shelf.home in run.stderr


@pytest.mark.parametrize('kind', ['after_vm', 'after_run'])
def test_an_after_program_that_fails_is_a_warning_and_the_copy_stays(a_pool: Any, a_shelf: Any, kind: str) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', *hooked(pool, shelf, **{kind: 'exit 5'}))
    assert run.exit_status == 3 and run.stderr.count(' - warning: ') == 1, run
    assert re.search(' - warning: (web .\\w+.: )?%s: [^:]+ ended' % kind, run.stderr), run
    assert "or %s= in the config. No copy is touched by that." % kind in run.stderr and 'exit status 5' in run.stderr, run
    assert run.stdout.splitlines()[-1].endswith('exit status 3.'), run
    assert shelf.has('web', complete=1) and shelf.proves_itself('web', shelf.newest('web')) and leaves_nothing(pool, shelf)


def test_after_vm_runs_where_there_was_no_before_vm_whatever_became_of_the_vm(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('db'), vm('web'), faults=[at('api:VM.snapshot', object='db', fails=FULL)]), a_shelf()
    assert backup(pool, shelf, 'vm-export=*', *hooked(pool, shelf, after_vm='')).exit_status == 1
    assert of(shelf, 'after_vm', 'db').variables['OUTCOME'] == 'SNAPSHOT-FAIL'
    assert of(shelf, 'after_vm', 'web').variables['OUTCOME'] == 'SUCCESS'


# --- those that do not behave ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('body', ['sleep 1000', 'trap "" TERM INT HUP; while :; do sleep 1000; done', 'exec >&- 2>&-; sleep 999'])
@pytest.mark.parametrize('kind', KINDS)
def test_one_that_hangs_is_killed_after_hook_timeout_and_has_failed(a_pool: Any, a_shelf: Any, kind: str, body: str) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    path = os.path.join(shelf.home, kind)
    Machine.put(path, '#!/bin/sh\necho $$ >> "$0.pids"\n%s\n' % body)       # it notes no more, as its time is short
    run = hurried_backup(pool, shelf, 'vm-export=web', 'hook_timeout=6', '%s=%s' % (kind, path))
    assert run.exit_status == (3 if kind.startswith('after') else 1), run
    assert re.search(r'%s did not end within .* \(hook_timeout\), and was killed' % kind, run.stderr), run
    assert shelf.has('web', complete=1 if kind.startswith('after') else 0) and leaves_nothing(pool, shelf)
    with open(path + '.pids') as file:
        (pid,) = file.read().split()
    assert not os.path.exists('/proc/' + pid)


def test_hook_timeout_counts_for_each_and_not_for_all_together(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(*[vm('vm%d' % number) for number in range(3)]), a_shelf()
    run = hurried_backup(pool, shelf, 'vm-export=*', 'hook_timeout=12', *hooked(pool, shelf, **dict.fromkeys(KINDS, 'sleep 1')))
    assert run.exit_status == 0, run           # eight of them, of a second or more, and each has six


FLOODS = {'lines': 'head -c 50000000 /dev/zero | tr "\\0" "\\n"', 'one line': 'head -c 50000000 /dev/zero | tr "\\0" x',
          'zeros on stderr': 'head -c 50000000 /dev/zero >&2'}


@pytest.mark.parametrize('flood', sorted(FLOODS))
def test_fifty_megabytes_of_output_cost_neither_memory_nor_log(a_pool: Any, a_shelf: Any, flood: str) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', *hooked(pool, shelf, before_vm='', after_vm=FLOODS[flood] + '; echo; echo end',
                                                       after_run=''))
    assert run.exit_status == 0, run.output[:10000]
    assert len(run.output) < MEBIBYTE and shelf.has('web', complete=1)
    grown = of(shelf, 'after_run').memory_bytes() - of(shelf, 'before_vm', 'web').memory_bytes()
    assert grown < 24 * MEBIBYTE, grown
    assert run.says('are not shown') == (flood == 'lines')


@pytest.mark.parametrize('kind', KINDS)
def test_one_that_leaves_a_child_behind_that_holds_its_output_holds_up_nothing(a_pool: Any, a_shelf: Any, kind: str) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    body = '(echo from behind; exec sleep 300) & echo $! > $here/child'
    began = time.monotonic()
    run = backup(pool, shelf, 'vm-export=web', *hooked(pool, shelf, **{kind: body}))
    assert run.exit_status == 0 and time.monotonic() - began < 60, run
    (one,) = noted(shelf)
    child = int(one.text('child'))
    try:
        os.kill(child, 0)                   # what it leaves in the background is left alone
    finally:
        os.kill(child, signal.SIGKILL)
    assert run.says(kind + ': from behind')


@pytest.mark.parametrize('body', ['exec >&- 2>&-; sleep 0.3', 'exec <&-; sleep 0.3', 'exec <&- >&- 2>&-'])
@pytest.mark.parametrize('kind', KINDS)
def test_one_that_closes_its_output_or_its_input_is_waited_for_and_fine(a_pool: Any, a_shelf: Any, kind: str, body: str) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', *hooked(pool, shelf, **{kind: body + '; : > $here/done'}))
    assert run.exit_status == 0 and run.stderr == '', run
    (one,) = noted(shelf)
    assert os.path.exists(os.path.join(one.place, 'done'))


@pytest.mark.parametrize('body', ['', 'sleep 1', 'sleep 99', 'head -c 1 > /dev/null'])
def test_one_that_never_reads_what_it_is_told_has_its_time_and_is_fine_however_much_that_is(a_pool: Any, a_shelf: Any, body: str) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    lines = ['vdi-export=%03d%s' % (number, 'x' * 200) for number in range(400)] + hooked(pool, shelf, after_run='')
    assert backup(pool, shelf, *lines).exit_status == 1         # there are none of these names
    assert len(of(shelf, 'after_run').text('stdin')) > 65536, 'more than a pipe holds'
    with open(os.path.join(shelf.home, 'after_run')) as file:
        text = file.read()
    with open(os.path.join(shelf.home, 'after_run'), 'w') as file:
        file.write(text.replace('#!/bin/sh\n', '#!/bin/sh\ndeaf=yes\n') + body + '\n')
    began = time.monotonic()
    run = hurried_backup(pool, shelf, 'hook_timeout=12', *lines)
    assert time.monotonic() - began < 90
    assert len(noted(shelf)) == 2 and ('after_run' in run.stderr) == (body == 'sleep 99') and 'Traceback' not in run.output, run


# --- signals ---------------------------------------------------------------------------------------------------------

def has_noted(shelf: Shelf, kind: str) -> bool:
    return bool(eventually(lambda: noted(shelf, kind)))


def test_a_signal_while_before_run_runs_ends_it_and_starts_nothing(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    with beginning(pool, shelf, 'vm-export=web', *hooked(pool, shelf, before_run='exec sleep 1000', after_run='')) as process:
        assert has_noted(shelf, 'before_run')
        process.signal(signal.SIGTERM)
        run = process.ending(28)
    assert run.exit_status == 143 and pool.journal() == [] and shelf.names() == [], run
    assert order(shelf) == ['before_run', 'after_run'] and of(shelf, 'after_run').variables['EXIT_STATUS'] == '143'


def test_a_signal_while_before_vm_runs_ends_the_run_soon_and_after_vm_runs(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf()
    lines = hooked(pool, shelf, before_vm='echo $$ > $here/pid; exec sleep 99', after_vm='sleep 1; : > $here/done', after_run='')
    with beginning(pool, shelf, 'vm-export=*', *lines) as process:
        assert has_noted(shelf, 'before_vm')
        process.signal(signal.SIGTERM)
        run = process.ending(28)
    assert run.exit_status == 143, run
    (before, after, last) = noted(shelf)
    assert (before.hook, after.hook, last.hook) == ('before_vm', 'after_vm', 'after_run')
    assert after.variables['OUTCOME'] == 'STOPPED' and after.variables['COPY'] == '' and after.variables['ERROR']
    assert after.variables['VM_NAME'] == before.variables['VM_NAME'] and os.path.exists(after.place + '/done')
    assert last.variables['EXIT_STATUS'] == '143'
    assert not os.path.exists('/proc/' + before.text('pid').strip())
    assert leaves_nothing(pool, shelf) and pool.never_saw('api:VM.snapshot') and shelf.names() == []


@pytest.mark.parametrize('workers', [1, 2])
def test_a_signal_in_mid_export_lets_after_vm_of_each_vm_in_hand_run(a_pool: Any, a_shelf: Any, workers: int) -> None:
    pool, shelf = a_pool(*[vm('vm%d' % number, disks=BIG) for number in range(3)],
                         faults=[slowly()]), a_shelf()
    lines = ['workers=%d' % workers] + hooked(pool, shelf, before_vm='', after_vm='sleep 1; : > $here/done')
    with beginning(pool, shelf, 'vm-export=*', *lines) as process:
        assert eventually(lambda: len(noted(shelf, 'before_vm')) == workers and is_exporting(shelf)())
        process.signal(signal.SIGTERM)
        run = process.ending()
    assert run.exit_status == 143 and leaves_nothing(pool, shelf), run
    begun, ended = ([one.variables['VM_NAME'] for one in noted(shelf, kind)] for kind in ('before_vm', 'after_vm'))
    assert sorted(begun) == sorted(ended) and len(ended) == workers
    for one in noted(shelf, 'after_vm'):
        assert one.variables['OUTCOME'] == 'STOPPED' and one.variables['COPY'] == ''
        assert os.path.exists(one.place + '/done')
        assert not [path for path in one.store() if '.partial' in path and '/%s/' % one.variables['VM_NAME'] in path]


def test_a_signal_while_after_vm_runs_leaves_it_its_time_and_the_copy_is_one(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf()
    signalled = os.path.join(shelf.home, 'signalled')
    lines = ['vm-export=*'] + hooked(pool, shelf, before_vm='', after_vm='until [ -e %s ]; do sleep 0.1; done; sleep 1; : > $here/done'
                                     % signalled)
    with beginning(pool, shelf, *lines) as process:
        assert has_noted(shelf, 'after_vm')
        process.signal(signal.SIGTERM)
        Machine.put(signalled, '')
        run = process.ending()
    (one,) = noted(shelf, 'after_vm')
    assert os.path.exists(one.place + '/done'), 'it was cut off'
    name = one.variables['VM_NAME']
    assert run.exit_status == 143 and shelf.has(name, complete=1) and run.says('1 VM backed up'), run
    assert end_of(shelf, name) == 'SUCCESS'
    assert one.variables['OUTCOME'] == 'SUCCESS' and len(noted(shelf, 'before_vm')) == 1 and leaves_nothing(pool, shelf)


@pytest.mark.parametrize('kind', ['after_vm', 'after_run'])
def test_an_after_program_that_hangs_holds_up_a_run_that_was_told_to_stop_for_no_more_than_its_time(
        a_pool: Any, a_shelf: Any, kind: str) -> None:
    pool, shelf = a_pool(vm('web', disks=BIG), faults=[slowly()]), a_shelf()
    lines = ['vm-export=web', 'hook_timeout=1000'] + hooked(pool, shelf, before_vm='', **{kind: 'sleep 1000'})
    with beginning(pool, shelf, *lines, is_hurried=True) as process:
        assert eventually(is_exporting(shelf))
        process.signal(signal.SIGTERM)
        run = process.ending()
    assert run.exit_status == 143 and len(noted(shelf, kind)) == 1 and leaves_nothing(pool, shelf), run


def test_a_signal_while_after_run_runs_changes_nothing_any_more(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    with beginning(pool, shelf, 'vm-export=web', *hooked(pool, shelf, after_run='sleep 2; : > $here/done')) as process:
        assert has_noted(shelf, 'after_run')
        process.signal(signal.SIGTERM)
        run = process.ending()
    assert run.exit_status == 0 and run.says('SUCCESS: 1 VM backed up') and shelf.has('web', complete=1), run
    assert os.path.exists(of(shelf, 'after_run').place + '/done')


# --- README's examples -----------------------------------------------------------------------------------------------

def scripts() -> Dict[str, str]:
    """README's scripts, by the name that each has in its second line."""
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as file:
        blocks = re.findall(r'^    #!/bin/sh\n(?:(?:    .*)?\n)+', file.read(), re.MULTILINE)
    texts = [re.sub('^    ', '', block, flags=re.MULTILINE) for block in '\n'.join(blocks).split('    #!/bin/sh\n')[1:]]
    return {re.match(r'# /root/([a-z-]+): ', text).group(1): '#!/bin/sh\n' + text for text in texts}


# What the machine of the tests must not do in earnest: each notes its words, and does what the others need of it.
RSYNC = '/usr/bin/rsync'
STAND_INS = {
    'ssh': 'for command; do :; done; case $command in *fsfreeze*) sh -c "$command";; esac',
    'fsfreeze': '', 'wakeonlan': '', 'umount': '', 'sleep': 'exec /bin/sleep 0.1',
    'mountpoint': '[ -e {store} ]',
    'mount': '[ "$(grep -c ^mount, {called})" = 3 ] && mkdir {store}',
    # where there is no rsync, as it does it: what is behind /./ comes to lie below the target, with all that is above it
    'rsync': 'for word; do from=$to to=$word; done; [ ! -x {rsync} ] || exec {rsync} "$1" "$2" "$from" {elsewhere}; '
             'cd "${{from%%/./*}}" && cp -a --parents -- "${{from#*/./}}" {elsewhere}',
}


class Machine:
    """A host with README's scripts and stand-ins for what they call."""

    def __init__(self, pool: Pool, shelf: Shelf) -> None:
        self.pool, self.shelf = pool, shelf
        self.bin, self.called_path = (os.path.join(shelf.home, name) for name in ('bin', 'called'))
        self.elsewhere = os.path.join(shelf.home, 'elsewhere')
        for path in (self.bin, self.elsewhere):
            os.mkdir(path)
        for name, text in scripts().items():
            self.put(os.path.join(shelf.home, name), text)
        places = {'store': shlex.quote(shelf.path), 'elsewhere': shlex.quote(self.elsewhere), 'called': self.called_path,
                  'rsync': RSYNC}
        for name, text in STAND_INS.items():
            self.put(os.path.join(self.bin, name), '#!/bin/sh\n{ printf %%s %s; printf ",%%s" "$@"; echo; } >> %s\n%s\n' % (
                name, self.called_path, text.format(**places)))

    @staticmethod
    def put(path: str, text: str) -> None:
        with open(path, 'w', encoding='utf-8') as file:
            file.write(text)
        os.chmod(path, 0o755)

    def backup(self, *lines: str, **how: Any) -> Any:
        environment = self.pool.environment()
        environment['PATH'] = self.bin + ':' + environment['PATH']
        return backup(self.pool, self.shelf, *lines, environment=environment, **how)

    def called(self) -> List[str]:
        """How the stand-ins were called, in order: the name and the words, with commas between."""
        if not os.path.exists(self.called_path):
            return []
        with open(self.called_path, encoding='utf-8') as file:
            return file.read().splitlines()


def test_readmes_freeze_freezes_the_vms_that_it_is_for_and_thaws_them_by_itself(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('db1'), vm('web')), a_shelf()
    machine = Machine(pool, shelf)
    run = machine.backup('vm-export=*', 'before_vm=%s/freeze' % shelf.home)
    assert run.exit_status == 0 and run.stderr == '' and shelf.has('db1', complete=1) and shelf.has('web', complete=1), run
    assert eventually(lambda: 'fsfreeze,-u,/var/lib/db' in machine.called())
    (ssh,) = [line for line in machine.called() if line.startswith('ssh,')]
    assert ssh.startswith('ssh,-o,BatchMode=yes,-o,ConnectTimeout=10,root@db1,')
    assert [line for line in machine.called() if not line.startswith('ssh,')] == [
        'fsfreeze,-f,/var/lib/db', 'sleep,30', 'fsfreeze,-u,/var/lib/db']


def test_readmes_freeze_that_fails_costs_only_its_vm_its_backup(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('db1'), vm('web')), a_shelf()
    machine = Machine(pool, shelf)
    machine.put(os.path.join(machine.bin, 'ssh'), '#!/bin/sh\necho "ssh: connect to host db1: No route to host" >&2\nexit 255\n')
    run = machine.backup('vm-export=*', 'before_vm=%s/freeze' % shelf.home)
    assert run.exit_status == 1 and run.says('No route to host') and end_of(shelf, 'db1') == 'HOOK-FAIL', run
    assert shelf.has('web', complete=1) and shelf.names('db1') == []


@pytest.mark.parametrize('ending', ['', '/', '//'])
def test_readmes_copy_away_has_each_sealed_copy_at_the_second_place_and_no_failed_one(a_pool: Any, a_shelf: Any,
                                                                                     ending: str) -> None:
    names = ['web', 'Büro "1" $(reboot)', '-rf', 'bad']
    pool, shelf = a_pool(*map(vm, names), faults=[at('http:/export', object='bad', breaks_off_after=MEBIBYTE)]), a_shelf()
    machine = Machine(pool, shelf)
    run = machine.backup('vm-export=*', 'backup_dir=' + shelf.path + ending, 'after_vm=%s/copy-away' % shelf.home)
    assert run.exit_status == 1 and ' - warning: ' not in run.stderr, run
    calls = [line for line in machine.called() if line.startswith('rsync,')]
    assert len(calls) == 3 and all(line.startswith('rsync,-a,--relative,') and line.endswith(',backup@elsewhere:/backups/')
                                   for line in calls)
    second = a_shelf(path=machine.elsewhere)
    assert second.names() == sorted(name for name in shelf.names() if shelf.copies(name)) and len(second.names()) == 3
    for folder in second.names():
        assert second.copies(folder) == shelf.copies(folder) and second.proves_itself(folder, second.newest(folder))


def test_readmes_copy_away_has_the_second_place_hold_whole_chains_of_increments(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    machine = Machine(pool, shelf)
    for _ in range(2):
        assert machine.backup('vm-export=*', 'incremental=yes', 'after_vm=%s/copy-away' % shelf.home).exit_status == 0
        time.sleep(1.1)                     # no two copies bear one name
    assert len(shelf.names('web')) == 2
    second = a_shelf(path=machine.elsewhere)
    run = without_pool(second, 'verify')
    assert run.exit_status == 0 and second.names('web') == shelf.names('web'), run


def test_readmes_nas_is_woken_and_mounted_before_and_unmounted_after(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    machine = Machine(pool, shelf)
    os.rmdir(shelf.path)
    lines = ['vm-export=web', 'before_run=%s/mount-nas' % shelf.home, 'after_run=%s/unmount-nas' % shelf.home]
    run = machine.backup(*lines)
    assert run.exit_status == 0 and shelf.has('web', complete=1), run
    mount = 'mount,-t,nfs,nas:/volume1/backups,/mnt/nas'
    assert machine.called() == ['mountpoint,-q,/mnt/nas', 'wakeonlan,00:11:32:ab:cd:ef'] + [mount, 'sleep,1'] * 2 + [
        mount, 'umount,/mnt/nas']
    seen = len(machine.called())
    time.sleep(1.1)                         # no two copies bear one name
    assert machine.backup(*lines).exit_status == 0
    assert machine.called()[seen:] == ['mountpoint,-q,/mnt/nas', 'umount,/mnt/nas']


def test_readmes_nas_that_does_not_wake_starts_no_backup_and_one_that_is_in_use_stays_up(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    machine = Machine(pool, shelf)
    for name in ('mount', 'umount', 'mountpoint'):
        machine.put(os.path.join(machine.bin, name), '#!/bin/sh\nexit 32\n')
    machine.put(os.path.join(machine.bin, 'sleep'), '#!/bin/sh\n')
    run = machine.backup('vm-export=web', 'before_run=%s/mount-nas' % shelf.home, 'after_run=%s/unmount-nas' % shelf.home)
    assert run.exit_status == 1 and 'mount-nas' in run.stderr and pool.journal() == [] and shelf.names() == [], run
    assert run.says('after_run: unmount-nas ended with exit status 32')
    assert not [line for line in machine.called() if 'ssh' in line]
