"""What is told of increments: what tonight's copy will be and why, when the next full is, and which copies are kept for others."""

import json
import os
import re
import shutil
import subprocess
from datetime import datetime, timedelta
from typing import Any, Iterator, List

import pytest

import VmBackup

from support import warm
from support.deeds import beginning, in_trouble, preview
from support.language import GIBIBYTE, MEBIBYTE, at, disk, uuid_of, vm
from support.layers import DATA, ROOT, Nights, chain, increments, is_increment, rows
from support.mail import MailServer
from support.process import ended, run_program, text_of
from support.recovery import destroy, disks_of, machine, serving
from support.wire import eventually
from test_increment_traps import ONE, a_chain, good, listed
from test_storage import mounted

SMALL = [disk(size=8 * MEBIBYTE, used=[[0, 5]], seed=3)]


@pytest.fixture
def small_store(tmp_path: Any) -> Iterator[str]:
    """A file system that has room for one full of SMALL and some increments, and no second full."""
    yield from mounted(str(tmp_path), 'size=32m')


@pytest.fixture
def mail_server(one_mail_server: MailServer) -> MailServer:
    one_mail_server.forget()
    return one_mail_server


def told(nights: Nights, copy: str, *lines: str) -> str:
    """The line of `list` on that copy."""
    run = run_program('-', nights.shelf.config(*(nights.lines + lines)), 'list')
    line, = [line for line in run.stdout.splitlines() if line.startswith('  %s ' % copy)]
    return line


def shown(nights: Nights, *lines: str) -> str:
    return preview(nights.pool, nights.shelf, *(nights.lines + lines)).stdout


# --- A full that does not fit ---------------------------------------------------------------------------------------------

def test_a_full_that_is_due_and_does_not_fit_is_an_increment_with_a_warning_for_one_chain_more(some_nights: Any, small_store: str,
                                                                                              ) -> None:
    nights = some_nights(disks=SMALL, path=small_store)
    lines = ('require_mount=no', 'max_backups=20', 'full_every=2')
    full = nights.night(*lines, exit_status=0)
    own = nights.shelf.manifest('web', full)['layer']
    assert own['depth'] == 1
    with open(os.path.join(small_store, 'filler'), 'wb') as file:        # what is free is less than a full
        file.write(bytes(shutil.disk_usage(small_store).free - 4 * MEBIBYTE))
    statuses = []
    for _ in range(3):
        before = nights.copies()
        told_before = shown(nights, *lines)
        is_late = 'does not fit' in told_before
        copy = nights.night(*lines, exit_status=3 if is_late else 0)
        statuses.append(is_late)
        assert is_increment(nights.shelf, 'web', copy) and nights.run.says('does not fit into the ') is is_late, nights.run
        assert 'an increment on ' + before[-1] in told_before, told_before
        if is_late:
            assert 'does not fit' in nights.run.stderr and re.search(r'due (in 1 copy|with the next)', told_before), told_before
    assert statuses[-1] and nights.shelf.manifest('web', nights.copies()[-1])['layer']['depth'] == 4
    failed = nights.shelf.copies('web'), nights.copies()
    assert 'a full, as its chain has reached 4 copies' in shown(nights, *lines)
    run = run_program('-', nights.shelf.config(*(nights.lines + lines)), environment=nights.pool.environment())
    assert run.exit_status == 1 and run.says('no space left') and nights.copies() == failed[1], run
    assert nights.all_are_good() and nights.shelf.unfinished() == []

    os.unlink(os.path.join(small_store, 'filler'))
    assert not is_increment(nights.shelf, 'web', nights.night(*lines))


def test_preview_tells_what_tonights_copy_will_be_and_when_the_next_full_is(some_nights: Any) -> None:
    nights = some_nights(disks=ONE)
    fulls, expected = [], []
    for number in range(8):
        text = shown(nights, 'full_every=3', 'max_backups=20')
        match = re.search(r'it will be (an increment on \S+:|a full, as) (.*); the next full after it is due in (\d) cop', text)
        assert match, text
        before = nights.copies()
        copy = nights.night('full_every=3', 'max_backups=20')
        is_one = is_increment(nights.shelf, 'web', copy)
        assert match.group(1) == ('an increment on %s:' % before[-1] if is_one else 'a full, as'), (text, nights.run)
        assert nights.shelf.manifest('web', copy)['layer']['why'] == match.group(2) and match.group(2) in nights.run.stdout
        fulls += [] if is_one else [number]
        expected.append(number + int(match.group(3)))
    assert fulls[0] == 0 and fulls[2] - fulls[1] == 3 and len(fulls) == 3
    assert expected == [next((full for full in fulls[1:] if full > number), fulls[2] + 3) for number in range(8)], fulls


def test_preview_does_not_promise_increments_to_a_vm_that_gets_none(some_nights: Any) -> None:
    nights = some_nights(disks=[disk(size=2041 * GIBIBYTE, used=[[0, 1]], seed=6)])
    nights.disks = dict
    nights.night()
    assert re.search(r'xvda.* is larger than a VHD can be; the next full after it is due in 1 copy', shown(nights)), shown(nights)


# --- Log, mail, list ---------------------------------------------------------------------------------------------------------

def test_log_mail_and_list_tell_what_each_copy_is_and_why(some_nights: Any, mail_server: MailServer) -> None:
    nights = some_nights(disks=ONE)
    lines = ('max_backups=1', 'full_every=9') + tuple(mail_server.lines('mail_when=always'))
    full = nights.night(*lines)
    nights.write(1)
    second = nights.night(*lines)
    nights.write(3)
    third = nights.night(*lines)
    mails = mail_server.mails()
    words = ['a full, as it is the first copy', 'an increment on %s: copy 2 of ' % full, 'an increment on %s: copy 3 of ' % second]
    for mail, word in zip(mails, words):
        assert word in mail.text, mail.text
    assert len(mails) == 3 and words[2] in nights.run.stdout, nights.run

    about = listed(nights, *lines)
    assert [(about[copy]['increment'], about[copy]['base'], about[copy]['depth'], about[copy]['holders'])
            for copy in (full, second, third)] == [(False, '', 1, []), (True, full, 2, [full]), (True, second, 3, [full, second])]
    assert about[full]['layer'] == 'full, as it is the first copy' and about[third]['layer'].startswith('increment on %s, copy 3 of' % second)
    for copy, number in ((full, '2 later copies'), (second, '1 later copy')):
        assert 'held for ' + number in about[copy]['fate'] and 'held for ' + number in told(nights, copy, *lines)
        assert about[copy]['layer'] in told(nights, copy, *lines)
    assert about[third]['kept'] and about[third]['reason'].startswith('newest 1')


def test_a_full_again_is_told_with_its_reason_wherever_people_look(some_nights: Any, mail_server: MailServer) -> None:
    nights = some_nights(disks=ONE)
    lines = ('max_backups=9',) + tuple(mail_server.lines('mail_when=always'))
    a_chain(nights, 2)
    nights.night(*lines, 'full_every=1')
    reason = 'its chain has reached 2 copies, and full_every=1'
    assert 'a full, as ' + reason in mail_server.mail().text and 'a full, as ' + reason in nights.run.stdout
    last = nights.copies()[-1]
    assert listed(nights)[last]['layer'] == 'full, as ' + reason and reason in told(nights, last)


# --- Which copies stay -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('unit, days', [('weekly', 7), ('monthly', 31), ('yearly', 366)])
def test_of_a_week_month_or_year_the_newest_full_stays(some_nights: Any, unit: str, days: int) -> None:
    nights = some_nights(disks=SMALL)
    made: List[str] = []
    midweek = datetime.now() - timedelta(days=datetime.now().weekday() - 2)      # three nights of one week, month and year
    start = {'weekly': midweek, 'monthly': datetime.now().replace(day=10), 'yearly': datetime.now().replace(month=6, day=10)}[unit]
    for shift, full_every in ((-2 * days, 1), (-2 * days + 1, 1), (-2 * days + 2, 9), (0, 1)):
        nights.write(len(made))
        clock = (start + timedelta(days=shift) - datetime.now()).total_seconds()
        run = ended(warm.start(in_trouble(nights.pool, clock=int(clock)) + ['-', nights.shelf.config(*(nights.lines + (
            'max_backups=1', 'keep_%s=9' % unit, 'full_every=%d' % full_every, 'verify_after=yes')))], nights.pool.environment()))
        assert run.exit_status == 0, run
        made += [copy for copy in nights.copies() if copy not in made]
    first, second, third, last = made
    assert nights.copies() == [second, last], (made, run)


def test_what_another_host_is_making_keeps_what_it_may_need(some_nights: Any) -> None:
    nights = some_nights(disks=ONE)
    first = a_chain(nights, 3)
    nights.write(1)
    full = nights.night('full_every=1', 'max_backups=20', 'verify_after=yes')
    partial = nights.shelf.at('web', 'backup-2026-11-01-001000.partial')
    os.mkdir(partial)                           # as one of a host whose locks this one can't see
    now = datetime.now().timestamp()
    os.utime(partial, (now, now))
    run = run_program('-', nights.shelf.config(*nights.lines), 'prune', 'web', 'max_backups=1')
    assert run.exit_status == 0 and nights.copies() == first + [full], run
    assert run.says('not finished may need it'), run
    os.rmdir(partial)
    run = run_program('-', nights.shelf.config(*nights.lines), 'prune', 'web', 'max_backups=1')
    assert run.exit_status == 0 and nights.copies() == [full], run


def test_prune_by_hand_removes_a_chain_from_its_end(some_nights: Any) -> None:
    nights = some_nights(disks=ONE)
    first = a_chain(nights, 4)
    nights.write(1)
    full = nights.night('full_every=1', 'max_backups=20', 'verify_after=yes')
    run = run_program('-', nights.shelf.config(*nights.lines), 'prune', 'web', 'max_backups=1', 'preview')
    assert re.findall(r'would remove: web/(\S+?):', run.stdout) == first[::-1], run
    run = run_program('-', nights.shelf.config(*nights.lines), 'prune', 'web', 'max_backups=1')
    assert re.findall(r'removed: web/(\S+?):', run.stdout) == first[::-1] and nights.copies() == [full], run


@pytest.mark.parametrize('by_hand', [True, False])
def test_what_is_left_as_it_is_read_keeps_its_holders_and_no_others(some_nights: Any, by_hand: bool) -> None:
    """Its reader has locked it, and not yet what holds its blocks."""
    nights = some_nights(disks=ONE)
    first = a_chain(nights, 4)
    nights.write(1)
    last = nights.night('full_every=1', 'max_backups=20', 'verify_after=yes')
    with VmBackup.Catalog(nights.shelf.path).copy_lock('web', first[2], shared=True) as is_held:
        assert is_held
        if by_hand:
            run = run_program('-', nights.shelf.config(*nights.lines), 'prune', 'web', 'max_backups=1')
        else:
            nights.write(2)
            last, run = nights.night('full_every=1', 'max_backups=1', 'verify_after=yes'), nights.run
    assert run.exit_status == 0 and nights.copies() == first[:3] + [last], run
    assert run.says('is being read') and len(re.findall('holds blocks of one that is left', run.stdout)) == 2, run
