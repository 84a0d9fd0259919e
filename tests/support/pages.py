"""Values of the page that VmBackup.py writes: pools of any size, with what can be on it, the worst included.

The same pages are looked at by the tests in a browser, and pictured for README by tests/pictures.
"""

import datetime
import random
from typing import Any, List, Sequence

import VmBackup as program

AT = datetime.datetime(2026, 3, 14, 5, 2, tzinfo=datetime.timezone.utc)
HOSTILE = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', 'x' * 255, '\u05e9\u05e8\u05ea \u05d2\u05d9\u05d1\u05d5\u05d9 \u202eabc',
           'a\tb\nc', b'\xff\xfe broken'.decode('utf-8', 'surrogateescape'), 'a&amp;b', '  blanks  ', "quo'te", '\U0001f480']
NAMES = ['web', 'db', 'mail', 'files', 'ldap', 'dns', 'proxy', 'wiki', 'git', 'build', 'monitor', 'print', 'voip', 'backup']
GIB = 1 << 30


def names_of(number: int, is_hostile: bool) -> List[str]:
    plain = [NAMES[index] if index < len(NAMES) else '%s-%d' % (NAMES[index % len(NAMES)], index // len(NAMES))
             for index in range(number)]
    return ((HOSTILE if is_hostile else []) + plain)[:number]


def outcome(name: str, number: int, night: int, error: str = '', findings: Sequence[Any] = (), word: str = '') -> Any:
    chosen = random.Random('%r %d' % (name, night))
    uuid = '%08x-0000-4000-8000-000000000000' % (number * 7919 + 3)
    return program.Outcome('vm-export', uuid, name, '%s (%s)' % (program.quote_name(name), uuid[:8]),
                           error=error or None, status_word=word or ('EXPORT-FAIL' if error else 'SUCCESS'),
                           size_bytes=0 if error else int((4 + number % 9 + 0.05 * night + chosen.random()) * GIB),
                           seconds=0.0 if error else 60 + 40 * (number % 9) + 90 * chosen.random(), kept=7,
                           findings=tuple(findings))


def past(names: Sequence[str], night: int, nights: int, error: str = '') -> Any:
    """The round of that night: of the last the third VM fails, the fifth has a warning now and then."""
    began = AT - datetime.timedelta(days=nights - 1 - night, minutes=42)
    outcomes = []
    for number, name in enumerate(names):
        findings, failed, word = [], '', ''
        if number == 2 and night >= nights - 2:
            failed = 'the SR iscsi could not lock the disk: its own clean-up (coalesce) was busy with it.'
        if number == 4 and night % 5 == 4:
            findings = [program.Finding(program.Severity.WARNING, name, 'it needed a second try.')]
        if number == 6 and night % 9 == 3:
            failed, word = 'not backed up: until=06:30 came before its turn. It comes first next time.', program.UNTRIED
        if number == 7 and night < nights - 3:
            continue
        outcomes.append(outcome(name, number, night, failed, findings, word))
    report = program.Report(program.BACKUP_WORDING, '/snapshots/weekend.cfg', 'xcp1', began,
                            began + datetime.timedelta(minutes=37), 'prod' if names else 'empty', tuple(outcomes),
                            findings=tuple(one for each in outcomes for one in each.findings),
                            ended_by=program.BackupError(error) if error else None)
    used = (900 + 14 * night) * GIB
    held = tuple(program.Held(one.uuid, good=5) for one in outcomes)
    return program.Past(report, 'pool-uuid', ('old-test (0a1b2c3d)', 'template-builder (99887766)') if names else (), held,
                        2048 * GIB - used, 2048 * GIB)


def copies(name: str, number: int, rounds: Sequence[Any]) -> List[Any]:
    """Its last copies, of which one of the second VM's is damaged, each with what retention says."""
    found = []
    for index, one in enumerate(rounds[-7:]):
        done = [row for row in one.report.outcomes if row.name == name and row.error is None]
        if not done:
            continue
        at = one.report.began_at.replace(tzinfo=None)
        layer = program.Layer(1 if index % 7 == 0 else 2, 'backup-f', None if index % 7 == 0 else 'backup-e',
                              'there is none yet' if index % 7 == 0 else 'the base is good', (), True)
        checks = {'verified_at': '2026-03-12T06:00:00Z', 'verdict': 'DAMAGED' if number == 1 and index == 3 else 'good',
                  'reason': 'block 17 of xvda is not what it was', 'drilled_at': '2026-03-01T06:00:00Z'}
        copy = program.Copy(program.safe_name(name)[:60], 'backup-%s' % at.strftime('%Y-%m-%d-%H%M%S'), at, False,
                            program.Method.VM, done[0].uuid, name, index, one.report.began_at, None, 'x.xva',
                            done[0].size_bytes, '', pool='pool-uuid', mark='0' * 64, checks=checks if index < 5 else {}, layer=layer)
        found.append((copy, 'newest %d' % (7 - index)))
    return found


def page(number: int, is_hostile: bool = False, nights: int = 30, error: str = '') -> Any:
    names = names_of(number, is_hostile)
    rounds = [past(names, night, nights, error if night == nights - 1 else '') for night in range(nights)]
    vms = []
    for one in program.watched(rounds):
        index = names.index(one.last.name)
        own = [] if index == 3 else copies(one.last.name, index, rounds)
        held = program.held_of(one.last.uuid, (copy for copy, _ in own))
        outcomes = tuple((each.report.began_at, row) for each in rounds for row in each.report.outcomes
                         if row.uuid == one.last.uuid)
        vms.append(program.PageVm(one._replace(held=held), outcomes, tuple(own)))
    store = program.StoreFacts('/mnt/nas/BACKUPS', AT.replace(tzinfo=None), (), rounds[-1].free_bytes if rounds else 100 * GIB,
                               2048 * GIB)
    return program.Page('/snapshots/weekend.cfg', 'xcp1', AT, rounds, vms, store,
                        ['web (00000003): snapshot 1f2e3d4c, the state of backup-2026-03-14-052000'] if number else [], [])
