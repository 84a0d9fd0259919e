"""What somebody sees who runs it in a terminal: a line for each worker that tells how far it is, and the log above, whole."""

import contextlib
import os
import re
import shutil
import signal
import sys
from typing import Any, Callable, Dict, Iterator, List, Sequence

import pytest

from support.language import MEBIBYTE, at, disk, slowly, vm
from support.process import PROGRAM, Pool
from support.recovery import serving
from support.shelf import Shelf
from support.terminal import Terminal
from support.wire import eventually

XTERM = {'TERM': 'xterm', 'LANG': 'C.UTF-8'}
SLOWLY = at('http:/export', runs_at=3 * MEBIBYTE)
STOPPED = 128 + signal.SIGINT
STAMP = r'\d{4}-\d\d-\d\d-\(\d\d:\d\d:\d\d\) - '
STAMP_BEGINS = re.compile(r'\d{4}-\d\d-\d\d-\(')
EXPORT = r'%s +%s  [ \d]\d %%  +[\d,]+/8,192 KiB  \d[\d.]* MB/s  \d+ s left'


def machines(*names: str, mebibytes: int = 8) -> List[Dict[str, Any]]:
    return [vm(name, disks=[disk(size=mebibytes * MEBIBYTE, used=mebibytes, seed=seed)]) for seed, name in enumerate(names)]


@contextlib.contextmanager
def a_run(pool: Pool, shelf: Shelf, *lines: str, columns: int = 80, rows: int = 24, words: Sequence[str] = (),
          environment: Dict[str, str] = XTERM, **streams: Any) -> Iterator[Terminal]:
    """A run in a terminal of its own."""
    with Terminal(columns, rows) as terminal:
        terminal.start([PROGRAM, '-', shelf.config(*(lines or ('vm-export=*',)))] + list(words),
                       dict(pool.environment(), **environment), **streams)
        yield terminal


def is_progress(row: str) -> bool:
    """Can only a line of progress look so?"""
    return bool(re.search(r'^[^%]* \d+ %|MB/s|^and \d+ more$|^\S.* +\d+/\d+  |^waiting for ', row))


def rows_when(terminal: Terminal, are_so: Callable[[List[str]], Any], time_limit_s: float = 60) -> List[str]:
    """The rows as they once are, now or soon: a moment later they may be painted anew."""
    def look() -> List[str]:
        rows = terminal.rows
        return rows if are_so(rows) else []

    rows = eventually(look, time_limit_s)
    assert rows, terminal.rows
    return rows


def is_tidy(terminal: Terminal, most: int = 1) -> bool:
    """At no time was anything of an older line left: those of progress were the last on the screen, at most so many."""
    for frame in terminal.frames + [terminal.rows]:
        rows = [is_progress(row) for row in '\n'.join(frame).rstrip().split('\n')]
        if sum(rows) > most or any(rows) and not all(rows[rows.index(True):]):
            print('\n'.join(frame))          # what pytest shows of a failure
            return False
    return True


def log_lines(terminal: Terminal) -> List[str]:
    """The lines of the log, as long as they were before the terminal broke them up; in the end all else is an error."""
    lines: List[str] = []
    for row in terminal.scrolled:
        if STAMP_BEGINS.match(row):
            lines.append(row)
        elif row:
            assert lines, row
            lines[-1] += row if len(lines[-1]) % terminal.columns == 0 else ' ' + row
    return lines


def has_all_lines(terminal: Terminal, *names: str) -> bool:
    """The log of these VMs' backups is there, each line whole, and nothing else."""
    patterns = ['.* lies on the root file system; .*', 'VmBackup .*; host xcp1[.]', 'SUCCESS: %d VMs? backed up.*' % len(names)]
    for name in names:
        patterns += [r'%s \(\w{8}\): vm-export into .*/backup-[-\d]+' % re.escape(name),
                     r'%s \(\w{8}\): .*/backup-[-\d]+ is complete: 8[.]0 MiB, proven .*digests\)[.]' % re.escape(name)]
    lines = log_lines(terminal)
    return len(lines) == len(patterns) and all(
        len([line for line in lines if re.fullmatch(STAMP + pattern, line)]) == 1 for pattern in patterns)


def ends_well(terminal: Terminal, status: int = 0) -> bool:
    """It has ended so; nothing of the progress is there, and the cursor stands where a line begins."""
    assert terminal.ending() == status, terminal.rows
    return terminal.cursor == (len(terminal.rows), 0) and not any(map(is_progress, terminal.rows))


# --- one worker -----------------------------------------------------------------------------------------------------------

def test_a_line_tells_the_vm_its_number_percent_amount_speed_and_the_time_left(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(*machines('web', 'db'), faults=[slowly(nth=1, until='one'), slowly(nth=2, until='other')]), a_shelf()
    with a_run(pool, shelf) as terminal:
        for number, name in (('1/2', 'one'), ('2/2', 'other')):
            assert terminal.shows(number, ' left')
            pool.release(name)
        assert ends_well(terminal) and is_tidy(terminal) and has_all_lines(terminal, 'web', 'db')
        told = [frame[-1] for frame in map(lambda frame: '\n'.join(frame).rstrip().split('\n'), terminal.frames)]
        for name, number in (('web', '[12]/2'), ('db', '[12]/2')):
            assert [row for row in told if re.fullmatch(EXPORT % (name, number), row)], told
            percents = [int(re.search(r'(\d+) %', row).group(1)) for row in told if re.match(name + ' .* %', row)]
            assert percents == sorted(percents) and percents[-1] <= 99
        assert any(row.endswith('  the snapshot') for row in told), told


@pytest.mark.parametrize('columns, pattern', [
    (40, r'accounting-of-th\S*\u2026 \d/1  [ \d]\d %  \d+ s left'),
    (20, r'accounting-\S*\u2026  [ \d]\d %'),
    (8, r'\S?\u2026  [ \d]\d %'),
    (3, r'.{1,2}'),
])
def test_in_a_narrow_terminal_the_least_important_parts_go_first(a_pool: Any, a_shelf: Any, columns: int, pattern: str) -> None:
    name = 'accounting-of-the-whole-company'
    pool, shelf = a_pool(*machines(name), faults=[slowly()]), a_shelf()
    with a_run(pool, shelf, columns=columns) as terminal:
        assert eventually(lambda: [frame for frame in terminal.frames if re.fullmatch(pattern, '\n'.join(
            frame).rstrip().split('\n')[-1])]), terminal.rows
        pool.release()
        assert ends_well(terminal)
        if columns >= 20:
            assert is_tidy(terminal) and has_all_lines(terminal, name)


def test_a_terminal_that_is_resized_is_filled_anew_and_nothing_older_is_left(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(*machines('web', 'db', mebibytes=16), faults=[slowly()]), a_shelf()
    with a_run(pool, shelf, 'vm-export=*', 'workers=2', columns=100) as terminal:
        for columns, lines in ((100, 24), (40, 24), (120, 24), (60, 5), (60, 2), (80, 30)):
            terminal.resize(columns, lines)
            del terminal.frames[:]
            if lines == 2:
                rows = rows_when(terminal, lambda rows: rows[-1:] == ['and 2 more'])
            else:
                rows = rows_when(terminal, lambda rows: sum(' left' in row for row in rows) == 2 and len(terminal.frames) > 2)
                assert ('/16 MiB  ' in rows[-1]) == (columns >= 60), rows
            assert all(is_progress(row) for row in rows[-2:][lines == 2:])
            assert sum(map(is_progress, rows)) == (1 if lines == 2 else 2), rows
        terminal.interrupts()
        assert ends_well(terminal, STOPPED)


@pytest.mark.parametrize('environment', [{}, {'TERM': ''}, {'TERM': 'dumb', 'LANG': 'C.UTF-8'}], ids=['unset', 'empty', 'dumb'])
def test_a_terminal_that_can_take_nothing_away_gets_the_log_alone(a_pool: Any, a_shelf: Any, environment: Any) -> None:
    pool, shelf = a_pool(*machines('web'), faults=[SLOWLY]), a_shelf()
    with a_run(pool, shelf, environment=environment) as terminal:
        assert ends_well(terminal) and has_all_lines(terminal, 'web')
        assert '\x1b' not in terminal.received and terminal.received.count('\r') == terminal.received.count('\r\n')


@pytest.mark.parametrize('environment', [
    {'LANG': 'C'}, {}, {'LANG': 'en_US.UTF-8', 'LC_ALL': 'POSIX'}, {'LANG': 'C.UTF-8', 'PYTHONIOENCODING': 'ascii'}],
    ids=['LANG', 'none', 'LC_ALL', 'PYTHONIOENCODING'])
def test_a_terminal_without_utf8_is_shown_ascii(a_pool: Any, a_shelf: Any, environment: Any) -> None:
    pool, shelf = a_pool(*machines('b\u00fccher-und-\u65e5\u672c\u8a9e-dazu'), faults=[slowly()]), a_shelf()
    with a_run(pool, shelf, columns=40, environment=dict(environment, TERM='vt100')) as terminal:
        row = rows_when(terminal, lambda rows: ' left' in '\n'.join(rows))[-1]
        assert row.startswith('b\\xfccher') and '... 1/1  ' in row and all(ord(char) < 128 for char in row), row
        pool.release()
        assert ends_well(terminal) and is_tidy(terminal)


@pytest.mark.parametrize('name, shown', [
    ('\u65e5\u672c\u8a9e\u306e\u4eee\u60f3\u30de\u30b7\u30f3', '\u65e5\u672c\u8a9e\u306e\u4eee\u60f3\u30de\u30b7\u30f3'),
    ('mail \U0001f4e7\U0001f4e7', '"mail \U0001f4e7\U0001f4e7"'),
    ('cafe\u0301', '"caf\u00e9"'),                      # the terminal puts the accent on the letter
    ('\u05e9\u05e8\u05ea', '\u05e9\u05e8\u05ea'),
    ('a\u202eb', '"a\\u202eb"'),
    ('two\nlines\ttab', '"two\\nlines\\ttab"'),
    ('x\x7f\x9b31m', '"x\\x7f\\x9b31m"'),
    ('e\u0301' * 150, '\u2026'),
    ('\U0001f4e7' * 100, '\u2026'),
], ids=['Japanese', 'emoji', 'an accent', 'Hebrew', 'bidi', 'control', 'csi', 'accents', 'long'])
def test_no_name_breaks_the_layout(a_pool: Any, a_shelf: Any, name: str, shown: str) -> None:
    pool, shelf = a_pool(*machines(name, 'db'), faults=[slowly()]), a_shelf()
    with a_run(pool, shelf, 'vm-export=*', 'workers=2', rows=40) as terminal:
        rows_when(terminal, lambda rows: [row for row in rows[-2:] if shown in row] and all('MB/s' in row for row in rows[-2:]))

        def places() -> List[List[int]]:
            with terminal.lock:
                found = terminal.places('/2  ')[-2:]
            return found if len(found) == 2 else []         # else it is just painting

        assert len({column for row in eventually(places) for column in row}) == 1, terminal.rows    # whatever names are made of
        terminal.interrupts()
        assert ends_well(terminal, STOPPED) and is_tidy(terminal, 2)
        assert re.sub('\x1b\\[(\\?7[lh]|J|1A)', '', terminal.received).replace('\r', '').replace('\n', '').isprintable() \
            or name == '\u05e9\u05e8\u05ea'


# --- several workers -----------------------------------------------------------------------------------------------------------

def test_each_worker_has_a_line_and_the_log_scrolls_above_them(a_pool: Any, a_shelf: Any) -> None:
    names = ['web', 'db', 'mail', 'files', 'wiki']
    pool, shelf = a_pool(*machines(*names), faults=[slowly()]), a_shelf()
    with a_run(pool, shelf, 'vm-export=*', 'workers=3', rows=12) as terminal:
        assert eventually(lambda: sum(map(is_progress, terminal.rows)) == 3
                          and terminal.cursor == (len(terminal.rows) - 3, 0)), terminal.rows
        pool.release()
        assert ends_well(terminal) and is_tidy(terminal, 3) and has_all_lines(terminal, *names)


def test_of_more_workers_than_the_screen_has_lines_the_last_says_how_many(a_pool: Any, a_shelf: Any) -> None:
    names = ['vm%02d' % number for number in range(16)]
    pool, shelf = a_pool(*machines(*names, mebibytes=16), faults=[slowly()]), a_shelf()
    with a_run(pool, shelf, 'vm-export=*', 'workers=16', 'at_once=16', rows=10) as terminal:
        rows = rows_when(terminal, lambda rows: 'and 8 more' in rows[-1:], 150)
        assert sum(row.startswith('vm') for row in rows) == 8, rows
        terminal.interrupts()
        assert ends_well(terminal, STOPPED) and is_tidy(terminal, 9)
        assert all(re.match(STAMP, line) for line in log_lines(terminal))


# --- its end -------------------------------------------------------------------------------------------------------------------

def test_ctrl_c_leaves_the_terminal_clean(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(*machines('web', 'db', 'mail', mebibytes=64), faults=[slowly()]), a_shelf()
    with a_run(pool, shelf, 'vm-export=*', 'workers=3') as terminal:
        assert eventually(lambda: sum(map(is_progress, terminal.rows)) == 3), terminal.rows
        terminal.interrupts()
        assert ends_well(terminal, STOPPED) and is_tidy(terminal, 3)
        assert '^C' not in '\n'.join(terminal.rows) and all(re.match(STAMP, line) for line in log_lines(terminal))
    assert pool.has_no_snapshots_of_ours() and shelf.unfinished() == []


def test_ctrl_c_is_answered_on_the_screen_before_the_clean_up_ends(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(*machines('web', 'db', mebibytes=64), faults=[slowly()]), a_shelf()
    with a_run(pool, shelf, 'vm-export=*', 'workers=2') as terminal:
        assert eventually(lambda: sum(map(is_progress, terminal.rows)) == 2), terminal.rows
        pool.process.send_signal(signal.SIGSTOP)       # so that nothing can be cleaned up
        terminal.interrupts()
        assert terminal.shows('SIGINT came: what is under way is ended'), terminal.rows
        assert not terminal.is_over()
        pool.process.send_signal(signal.SIGCONT)
        assert ends_well(terminal, STOPPED) and is_tidy(terminal, 2)
        assert sum('SIGINT came' in line for line in log_lines(terminal)) == 1, log_lines(terminal)
        assert terminal.received.index('SIGINT came') < terminal.received.index('the run was stopped by SIGINT')
    assert pool.has_no_snapshots_of_ours() and shelf.unfinished() == []


def test_an_error_is_told_whole_in_the_place_of_the_progress(a_pool: Any, a_shelf: Any) -> None:
    faults = [SLOWLY, at('http:/export', object='web', breaks_off_after=3 * MEBIBYTE)]
    pool, shelf = a_pool(*machines('web'), faults=faults), a_shelf()
    with a_run(pool, shelf, columns=60) as terminal:
        assert ends_well(terminal, 1) and is_tidy(terminal)
        assert [line for line in log_lines(terminal) if re.match(STAMP + 'error: web ', line)]


@pytest.mark.skipif(shutil.which('bash') is None, reason='bash was not found: no shell to suspend a run')
def test_a_run_that_is_suspended_is_out_of_the_shells_way_and_paints_again_afterwards(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(*machines('web', 'db', mebibytes=12), faults=[slowly()]), a_shelf()
    with a_shell(pool) as terminal:
        terminal.types(command(shelf, 'vm-export=*', 'workers=2') + '\n')
        assert eventually(lambda: sum(map(is_progress, terminal.rows)) == 2), terminal.rows
        terminal.types('\x1a')
        assert terminal.shows('Stopped') and not any(map(is_progress, terminal.rows)), terminal.rows
        terminal.types('fg\n')
        assert eventually(lambda: sum(map(is_progress, terminal.rows)) == 2), terminal.rows
        terminal.types('\x1a')
        assert eventually(lambda: '\n'.join(terminal.rows).count('Stopped') == 2)
        pool.release()
        terminal.types('bg\n')
        assert terminal.shows('SUCCESS: 2 VMs') and not any(map(is_progress, terminal.rows)), terminal.rows


@pytest.mark.skipif(shutil.which('bash') is None, reason='bash was not found: no shell to start a run in the background')
def test_a_run_in_the_background_shows_no_progress_and_is_not_stopped_for_its_log(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(*machines('web', mebibytes=3), faults=[SLOWLY]), a_shelf()
    with a_shell(pool) as terminal:
        terminal.types('stty tostop\n')
        terminal.types(command(shelf, 'vm-export=*') + ' &\n')
        assert terminal.shows('SUCCESS: 1 VM '), terminal.rows
        assert 'MB/s' not in terminal.received and 'Stopped' not in terminal.received


@contextlib.contextmanager
def a_shell(pool: Pool) -> Iterator[Terminal]:
    with Terminal(100, 40) as terminal:
        terminal.start(['--norc', '--noprofile', '-i'], dict(pool.environment(), PS1='$ ', HISTFILE='', **XTERM),
                       python=[shutil.which('bash')])
        assert terminal.shows('$')
        yield terminal
        terminal.types('exit\n')
        eventually(terminal.is_over)


def command(shelf: Shelf, *lines: str) -> str:
    return ' '.join([sys.executable, '-W', 'error', PROGRAM, '-', shelf.config(*lines)])


# --- what leads elsewhere ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('elsewhere', ['stdout', 'stderr'])
def test_progress_never_lands_in_a_file(a_pool: Any, a_shelf: Any, elsewhere: str) -> None:
    pool, shelf = a_pool(*machines('web', 'broken'), faults=[        # which is told while web's line is there
        at('http:/export', object='broken', breaks_off_after=4 * MEBIBYTE), at('http:/export', runs_at=MEBIBYTE)]), a_shelf()
    path = os.path.join(shelf.home, 'log')
    with open(path, 'wb') as file:
        with a_run(pool, shelf, 'vm-export=*', 'workers=2', rows=40, **{elsewhere: file}) as terminal:
            assert terminal.shows('web ', 'MB/s'), terminal.frames
            assert ends_well(terminal, 1) and is_tidy(terminal, 2)
            told = log_lines(terminal)
    with open(path, encoding='utf-8') as file:
        lines = file.read().split('\n')
    assert lines.pop() == '' and all(re.match(STAMP, line) for line in lines)
    errors, rest = (told, lines) if elsewhere == 'stdout' else (lines, told)
    assert errors and all(re.match(STAMP + '(error|warning): ', line) for line in errors)
    assert [line for line in rest if re.match(STAMP + r'web .* is complete: .*digests\)[.]', line)]


def test_where_a_pipe_takes_the_log_who_reads_it_has_the_terminal_for_himself(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(*machines('web', mebibytes=3), faults=[SLOWLY]), a_shelf()
    reading, writing = os.pipe()
    with a_run(pool, shelf, stdout=writing) as terminal:
        os.close(writing)
        with open(reading, encoding='utf-8') as log:
            assert 'SUCCESS: 1 VM' in log.read()
        assert ends_well(terminal) and terminal.received == ''


# --- other deeds ---------------------------------------------------------------------------------------------------------------

def test_verify_tells_which_copy_it_reads_and_its_number(a_backup: Any) -> None:
    pool, shelf = a_backup(*machines('web', 'db', mebibytes=32))
    with a_run(pool, shelf, words=['verify']) as terminal:
        assert ends_well(terminal) and is_tidy(terminal)
        told = [row for frame in terminal.frames for row in frame if is_progress(row)]
    for name, number in (('web', 1), ('db', 2)):
        assert [row for row in told if re.match(r'verifying %s/backup-[-\d]+ [12]/2  +\d+ %%  +\d+/32 MiB' % name, row)], told
    assert sum(' is whole' in row or row.startswith('good') for row in terminal.rows) == 2, terminal.rows


def test_restore_tells_how_far_it_is(a_backup: Any) -> None:
    pool, shelf = a_backup(*machines('web'))
    serving(pool, slowly('http:/import'))
    with a_run(pool, shelf, words=['restore', 'web'], columns=100) as terminal:
        assert terminal.shows('the import of web', ' left')
        pool.release()
        assert ends_well(terminal) and is_tidy(terminal)
        assert 'is proven' in ''.join(terminal.rows), terminal.rows
