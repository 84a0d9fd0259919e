"""History: a small file for each round, what `history` shows of them, and what becomes of damaged, old and unwritable ones."""

import glob
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from typing import Any, Callable, Dict, List, Optional

import pytest

from support import warm
from support.deeds import Process, backup, beginning, hurried, in_trouble, is_exporting, preview, without_pool
from support.language import MEBIBYTE, at, disk, slowly, uuid_of, vm
from support.process import Run, ended
from support.shelf import Shelf
from support.wire import eventually

FULL = ['SR_BACKEND_FAILURE_44', '', 'There is insufficient space', '']
HOSTS = [{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'}, {'name_label': 'xcp3'}]
AGAIN = ('force=yes',)                      # where a round of the same hour is wanted once more
HOSTILE = {'newline': 'first\nSUCCESS  9 of 9 VMs', 'escape': '\x9b2Jweb', 'quotes': 'Büro "1" \\', 'arrow': 'a\u202eb',
           'line separator': 'a\u2028b', 'percent': '%s%(name)s{0}', 'nothing': '', 'long': 'x' * 255}


def files(shelf: Shelf) -> List[str]:
    """What is in the history of all configs, by path, oldest first."""
    return sorted(glob.glob(shelf.at('.vmbackup', 'history', '*', '*')), key=os.path.basename)


def read(path: str) -> Dict[str, Any]:
    with open(path, 'rb') as file:
        return json.loads(file.read().decode('utf-8'))


def told(shelf: Shelf) -> List[Dict[str, Any]]:
    return [read(path) for path in files(shelf)]


def history(shelf: Shelf, *words: str, **how: Any) -> Run:
    """`history` on a machine that sees the store and no pool."""
    return without_pool(shelf, 'history', *words, **how)


def stamped(days_ago: float) -> datetime:
    return datetime.now(timezone.utc) - timedelta(days=days_ago)


def next_second() -> None:
    """What begins now bears a later time than all that has begun."""
    begun = int(time.time())
    eventually(lambda: int(time.time()) > begun)


def put(path: str, content: bytes) -> str:
    with open(path, 'wb') as file:
        file.write(content)
    return path


def of_days_ago(shelf: Shelf, days: float) -> str:
    """The path of the same round once more, as of so many days ago."""
    path, then = files(shelf)[-1], stamped(days)
    facts = dict(read(path), began_at=then.strftime('%Y-%m-%dT%H:%M:%SZ'), ended_at=then.strftime('%Y-%m-%dT%H:%M:%SZ'))
    name = then.strftime('%Y%m%dT%H%M%SZ') + os.path.basename(path)[16:]
    return put(os.path.join(os.path.dirname(path), name), json.dumps(facts).encode('ascii'))


def machines(number: int) -> List[Dict[str, Any]]:
    return [vm('vm%d' % index, disks=[disk(size=6 * MEBIBYTE, used=6, seed=index)]) for index in range(number)]


# --- what there is after a round ---------------------------------------------------------------------------------------

def test_a_round_leaves_one_small_file_that_tools_and_eyes_can_read(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('db'), vm('web'), faults=[at('api:VM.snapshot', object='web', fails=FULL)]), a_shelf()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 1
    (path,) = files(shelf)
    assert os.path.getsize(path) < 4096 and os.stat(path).st_mode & 0o777 == 0o600
    tool = subprocess.run([sys.executable, '-m', 'json.tool', path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert tool.returncode == 0 and json.loads(tool.stdout.decode()) == read(path)
    with open(path) as file:
        assert len(file.read().splitlines()) > 40
    facts = read(path)
    assert (facts['word'], facts['exit'], facts['host'], facts['source']) == ('ERROR', 1, 'xcp1', shelf.config_path)
    assert [(one['name'], one['uuid'], one['error'] is None) for one in facts['outcomes']] == [
        ('db', uuid_of('db'), True), ('web', uuid_of('web'), False)]
    assert [(one['uuid'], one['good'], one['newest']) for one in facts['held']] == [
        (uuid_of('db'), 1, shelf.newest('db')), (uuid_of('web'), 0, '')]
    assert [line for line in shelf.tree() if 'history' in line and line.endswith('.new')] == []


def test_a_round_of_several_hosts_and_workers_leaves_one_file(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(*machines(6), hosts=HOSTS, faults=[at('http:/export', runs_at=4 * MEBIBYTE)]), a_shelf()
    config = shelf.config('vm-export=*', 'hosts=all', 'workers=2')
    runs = [process.ending() for process in [Process(['-', config], pool.environment(host)) for host in (1, 2, 3)]]
    assert [run.exit_status for run in runs] == [0, 0, 0], runs
    (facts,) = told(shelf)
    assert [one['name'] for one in facts['outcomes']] == ['vm%d' % index for index in range(6)]
    assert facts['word'] == 'SUCCESS' and all(one['good'] == 1 for one in facts['held'])
    assert '6 of 6 VMs' in history(shelf).stdout


def test_a_round_whose_leader_was_killed_leaves_one_file_that_tells_of_all_vms(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(*machines(4), hosts=HOSTS, faults=[slowly()]), a_shelf()
    lines = ('vm-export=*', 'hosts=all')
    with beginning(pool, shelf, *lines, is_hurried=True) as leader:
        assert leader.says('vm-export into')
        with beginning(pool, shelf, *lines, host=2, is_hurried=True) as helper:
            assert helper.says('vm-export into')
            leader.kill()
            pool.release()
            run = helper.ending()
    assert run.exit_status == 3 and run.says('xcp2 took over'), run.output
    (facts,) = told(shelf)
    assert (facts['host'], facts['word'], len(facts['outcomes'])) == ('xcp2', 'WARNING', 4)
    (planned,) = glob.glob(shelf.at('.vmbackup', 'rounds', '*', '*', 'plan.json'))
    assert os.path.basename(files(shelf)[0]) == os.path.basename(os.path.dirname(planned)) + '.json'


def test_a_run_that_a_signal_ended_is_on_record(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=8 * MEBIBYTE, used=8)]), faults=[slowly()])
    shelf = a_shelf()
    with beginning(pool, shelf, 'vm-export=web') as process:
        assert eventually(is_exporting(shelf))
        process.signal(signal.SIGTERM)
        assert process.ending().exit_status == 128 + signal.SIGTERM
    (facts,) = told(shelf)
    assert (facts['word'], facts['exit']) == ('ERROR', 128 + signal.SIGTERM)
    shown = history(shelf).stdout
    assert '0 of 1 VM,' in shown and 'web' in shown and 'SIGTERM' in shown, shown


@pytest.mark.parametrize('trouble', ['login', 'pool'])
def test_a_run_that_ended_before_it_had_a_plan_was_no_round_and_is_not_on_record(a_pool: Any, a_shelf: Any, trouble: str) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    next_second()
    if trouble == 'login':
        run = backup(pool, shelf, 'vm-export=web', password='a wrong one')
    else:
        pool.process.send_signal(signal.SIGKILL)
        pool.process.wait()
        run = ended(warm.start(hurried(pool) + ['-', shelf.config('vm-export=web')], pool.environment()))
    assert run.exit_status == 4, run
    (good,) = told(shelf)
    assert good['exit'] == 0 and shelf.holds_no_trace_of('a wrong one')
    (line,) = history(shelf).stdout.splitlines()
    assert 'SUCCESS' in line and '1 of 1 VM,' in line, line


def test_a_run_that_met_a_held_lock_is_not_on_record(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web', disks=[disk(size=8 * MEBIBYTE, used=8)]), faults=[slowly()])
    shelf = a_shelf()
    with beginning(pool, shelf, 'vm-export=web') as process:
        assert eventually(is_exporting(shelf))
        assert backup(pool, shelf, 'vm-export=web').exit_status == 5
        assert files(shelf) == []
        pool.release()
        assert process.ending().exit_status == 0
    assert [facts['exit'] for facts in told(shelf)] == [0]


def test_a_run_that_is_left_to_another_host_is_not_on_record(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), hosts=HOSTS), a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    run = backup(pool, shelf, 'vm-export=web', host=2)
    assert run.exit_status == 0 and run.says('left to it') and len(files(shelf)) == 1


def test_preview_list_verify_and_prune_are_not_on_record(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    assert preview(pool, shelf, 'vm-export=web').exit_status == 0 and shelf.is_unchanged()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    for words in (['list'], ['verify'], ['prune'], ['status'], ['history'], ['check']):
        assert without_pool(shelf, *words).exit_status == 0
    assert preview(pool, shelf, 'vm-export=web').exit_status == 0
    assert preview(pool, shelf, 'vm-export=web', password='a wrong one').exit_status == 4
    assert len(files(shelf)) == 1


def test_two_configs_have_histories_of_their_own_and_one_whose_lines_change_has_one(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    assert backup(pool, shelf, 'vm-export=db', 'max_backups=2').exit_status == 3
    assert len(history(shelf, lines=['vm-export=*']).stdout.splitlines()) == 2
    os.rename(shelf.config_path, shelf.config_path + '.other')
    run = history(shelf, lines=['vm-export=*'])
    assert len(run.stdout.splitlines()) == 2, 'it goes by the path'
    shelf.config_path += '.other'
    run = history(shelf, lines=['vm-export=*'])
    assert run.exit_status == 0 and run.says('No round of %s is on record' % shelf.config_path), run


# --- what is shown ---------------------------------------------------------------------------------------------------------

def test_history_shows_each_round_and_what_was_not_done(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('db'), vm('web'), faults=[at('api:VM.snapshot', object='web', nth=2, fails=FULL),
                                              at('xe:pool-dump-database', exit=1, stderr='no')])
    shelf = a_shelf()
    assert history(shelf).says('No round of %s is on record' % shelf.config_path)
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    next_second()
    assert backup(pool, shelf, 'vm-export=*', 'vm-export=nobody', 'pool_db_backup=1', words=AGAIN).exit_status == 1
    run = history(shelf)
    assert run.exit_status == 0 and run.stderr == ''
    lines = run.stdout.splitlines()
    shape = re.compile(r'\d{4}-\d\d-\d\d \d\d:\d\d  (\w+) +(\d of \d VMs), (.+) in (\d+ s), by xcp1')
    assert len(lines) == 5 and [shape.fullmatch(line).group(1, 2, 3) for line in lines[:2]] == [
        ('SUCCESS', '2 of 2 VMs', '6.0 MiB'), ('ERROR', '1 of 3 VMs', '3.0 MiB')]
    assert lines[2].startswith('    web (%s): ' % uuid_of('web')[:8]) and 'SR_BACKEND_FAILURE_44' in lines[2]
    assert lines[3] == '    nobody is not in the pool'
    assert lines[4].startswith('    the pool database was not dumped: ')


def test_history_of_a_vm_shows_what_became_of_it_by_name_and_by_uuid(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('db'), vm('web'), faults=[at('api:VM.snapshot', object='web', nth=2, fails=FULL)])
    shelf = a_shelf()
    for status, lines in ((0, ['vm-export=*']), (1, ['vm-export=*']), (0, ['vdi-export=*'])):
        assert backup(pool, shelf, *lines, words=AGAIN).exit_status == status
        next_second()
    for words in (['web'], ['vm=web'], ['uuid:' + uuid_of('web')]):
        run = history(shelf, *words)
        assert run.exit_status == 0 and run.stderr == ''
        first, second, third = run.stdout.splitlines()
        shape = re.compile(r'\d{4}-\d\d-\d\d \d\d:\d\d  web \(%s\)  .*' % uuid_of('web')[:8])
        assert all(shape.fullmatch(line) for line in (first, second, third))
        assert '  vm-export, 3.0 MiB in ' in first and '  NOT BACKED UP: ' in second and '  vdi-export, ' in third
        assert run.never_says('db')
    run = history(shelf, 'shop')
    assert run.exit_status == 0 and run.says('No round of %s with shop is on record' % shelf.config_path)


def test_names_that_bite_stay_in_their_line(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(*[vm(name, disks=[disk(size=MEBIBYTE, used=1)]) for name in HOSTILE.values()], faults=[
        at('api:VM.snapshot', fails=FULL)])
    shelf = a_shelf()
    assert backup(pool, shelf, 'vm-export=*', 'vm-export="nobody \u202e"').exit_status == 1
    (facts,) = told(shelf)
    assert sorted(one['name'] for one in facts['outcomes']) == sorted(HOSTILE.values())
    lines = history(shelf).stdout.splitlines()
    failed = [one for one in facts['outcomes'] if one['error'] is not None]
    assert len(failed) == len(HOSTILE) and len(lines) == 1 + len(failed) + len(facts['missing'])
    assert all(line.startswith('    ') and line.isprintable() for line in lines[1:])
    for name in HOSTILE.values():
        run = history(shelf, 'uuid:' + uuid_of(name))
        assert run.exit_status == 0 and len(run.stdout.splitlines()) == 1 and run.stdout[:-1].isprintable(), run


# --- old and damaged ones --------------------------------------------------------------------------------------------------

def test_what_is_older_than_400_days_goes_and_nothing_else(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    first = files(shelf)[-1]
    gone, stays = of_days_ago(shelf, 401), of_days_ago(shelf, 399)
    notes = put(os.path.join(os.path.dirname(first), 'notes.txt'), b'mine')
    assert history(shelf).exit_status == 0 and os.path.exists(gone), 'looking removes nothing'
    assert backup(pool, shelf, 'vm-export=web', words=AGAIN).exit_status == 0
    assert not os.path.exists(gone) and os.path.exists(stays) and os.path.exists(first) and os.path.exists(notes)
    assert len(history(shelf).stdout.splitlines()) == 3


def changed(**values: Any) -> Callable[[bytes], bytes]:
    """The file with these values; `outcome_...` and `held_...` are those of the first VM."""
    def change(content: bytes) -> bytes:
        facts = json.loads(content.decode('ascii'))
        for key, value in values.items():
            row, _, field = key.partition('__')
            if field:
                facts[row][0][field] = value
            else:
                facts[key] = value
        return json.dumps(facts).encode('ascii')
    return change


DAMAGE: Dict[str, Callable[[bytes], Optional[bytes]]] = {
    'truncated': lambda content: content[:len(content) // 2], 'empty': lambda content: b'',
    'garbage': lambda content: os.urandom(900), 'zeros': lambda content: bytes(len(content)), 'a list': lambda content: b'[]', 'null': lambda content: b'null',
    'another object': lambda content: b'{"format": 1}', 'nested': lambda content: b'[' * 100000,
    'a directory': lambda content: None,
    'no time': changed(began_at='yesterday'), 'a time that is a number': changed(began_at=17),
    'outcomes that are none': changed(outcomes={'a': 1}), 'outcomes that are text': changed(outcomes='web'),
    'a name that is a number': changed(outcomes__name=5), 'a name that is nothing': changed(outcomes__name=None),
    'an uuid that is a list': changed(outcomes__uuid=['a']), 'seconds that are text': changed(outcomes__seconds='long'),
    'a size that is text': changed(outcomes__size_bytes='big'), 'an error that is a number': changed(outcomes__error=5),
    'a title that is a list': changed(outcomes__title=[]), 'a folder that is a number': changed(held__folder=5),
    'a copy that is a list': changed(held__newest=['x']), 'good that is text': changed(held__good='four'),
    'a mark that is a number': changed(held__mark=3), 'bases that are a number': changed(held__rests_on=2),
    'held of another shape': changed(held=[{'uuid': 'x', 'color': 'red'}]),
    'free space that is text': changed(free_bytes='much'), 'a host that is a list': changed(host=['xcp1']),
    'findings that are text': changed(findings='none'), 'a finding of no kind': changed(findings=[['LOUD', 'a', 'b']]),
    'a finding of numbers': changed(findings=[['WARNING', 1, 2]]), 'a dump that is a number': changed(dump_error=5),
    'a folder that leads out': changed(held__folder='../..', held__newest='..'),
}


@pytest.mark.parametrize('what', sorted(DAMAGE))
def test_a_damaged_file_is_told_and_costs_neither_others_nor_the_next_run_anything(a_backup: Any, what: str) -> None:
    pool, shelf = a_backup(vm('web'))
    page, numbers = os.path.join(shelf.home, 'page.html'), os.path.join(shelf.home, 'weekend.prom')
    lines = ('vm-export=web', 'report_html=' + page, 'metrics_file=' + numbers)
    assert backup(pool, shelf, *lines).exit_status == 0
    of_days_ago(shelf, 2)
    path, content = of_days_ago(shelf, 1), None
    with open(path, 'rb') as file:
        content = DAMAGE[what](file.read())
    os.unlink(path)
    if content is None:
        os.mkdir(path)
    else:
        put(path, content)
    os.unlink(page), os.unlink(numbers)
    for words in (['history'], ['check']):
        run = without_pool(shelf, *words, lines=lines)
        assert run.exit_status == 0 and run.never_says('Traceback'), run
        if words[0] == 'history' and 'leads out' not in what:
            assert len(run.stdout.splitlines()) == 2 and 'is left out' in run.stderr and os.path.basename(path) in run.stderr, run
        assert len(run.stdout.splitlines()) == (1 if words[0] == 'check' else 3 if 'leads out' in what else 2), run
    run = backup(pool, shelf, *lines, words=AGAIN)
    assert run.exit_status == 0 and os.path.exists(page) and os.path.exists(numbers), run
    assert len(history(shelf, lines=lines).stdout.splitlines()) == (4 if 'leads out' in what else 3)


def test_a_directory_that_bears_the_name_of_an_old_round_costs_nothing_else(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    old, older = of_days_ago(shelf, 420), of_days_ago(shelf, 410)
    os.unlink(old)
    os.makedirs(os.path.join(old, 'inner'))
    numbers = os.path.join(shelf.home, 'weekend.prom')
    run = backup(pool, shelf, 'vm-export=web', 'metrics_file=' + numbers, words=AGAIN)
    assert run.exit_status == 0 and os.path.exists(numbers), run
    assert not os.path.exists(older) and len(history(shelf).stdout.splitlines()) == 2


def test_a_newest_round_that_is_damaged_is_told_by_check(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    of_days_ago(shelf, 1)
    put(files(shelf)[-1], b'{')
    run = without_pool(shelf, 'check')
    assert run.exit_status == 0 and len(run.stdout.splitlines()) == 1, run
    assert 'is left out' in run.stdout and ' vms=1 ' in run.stdout, run


# --- a store that can't take it ----------------------------------------------------------------------------------------------

def test_into_a_store_that_is_not_mounted_nothing_is_written(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', 'require_mount=yes')
    assert run.exit_status == 2 and run.says('is the share mounted?'), run
    assert os.listdir(shelf.path) == [] and shelf.is_unchanged()


def test_a_store_that_is_not_there_is_not_made(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    os.rmdir(shelf.path)
    run = backup(pool, shelf, 'vm-export=web')
    assert run.exit_status == 2 and not os.path.exists(shelf.path), run
    run = history(shelf)
    assert run.exit_status == 2 and run.stdout == '' and run.never_says('Traceback'), run


@pytest.mark.parametrize('step', [1, 2, 3, 4])
def test_a_full_store_costs_the_history_only(a_pool: Any, a_shelf: Any, step: int) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    start = in_trouble(pool, store=shelf.path, below='.vmbackup/history', step=step, do='ENOSPC', stays=True)
    run = ended(warm.start(start + ['-', shelf.config('vm-export=web')], pool.environment()))
    assert run.exit_status == 0 and shelf.has('web', complete=1), run
    assert run.says('keeping the history: left to the next run') and run.stdout.splitlines()[-1].endswith('exit status 0.'), run
    assert [path for path in files(shelf) if path.endswith('.json')] == []
    assert history(shelf).exit_status == 0
    assert backup(pool, shelf, 'vm-export=web', words=AGAIN).exit_status == 0
    assert len(history(shelf).stdout.splitlines()) == 1


@pytest.mark.parametrize('deed', ['EIO', 'EROFS', 'ESTALE'])
def test_a_history_that_cant_be_written_costs_numbers_and_page_a_warning(a_pool: Any, a_shelf: Any, deed: str) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    numbers = put(os.path.join(shelf.home, 'weekend.prom'), b'before')
    start = in_trouble(pool, store=shelf.path, below='.vmbackup/history', step=1, do=deed, stays=True)
    run = ended(warm.start(start + ['-', shelf.config('vm-export=web', 'metrics_file=' + numbers)], pool.environment()))
    assert run.exit_status == 3 and shelf.has('web', complete=1), run
    assert 'is left as it is' in run.stderr and read_bytes(numbers) == b'before', run


def read_bytes(path: str) -> bytes:
    with open(path, 'rb') as file:
        return file.read()


def test_a_link_in_place_of_the_history_is_not_followed(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    elsewhere = os.path.join(shelf.home, 'elsewhere')
    os.makedirs(elsewhere), os.makedirs(shelf.at('.vmbackup'))
    os.symlink(elsewhere, shelf.at('.vmbackup', 'history'))
    run = backup(pool, shelf, 'vm-export=web')
    assert run.exit_status == 0 and shelf.has('web', complete=1) and os.listdir(elsewhere) == [], run
