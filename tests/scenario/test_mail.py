"""Mail at the end of a run: what is in it, when it is sent, and that no mail server costs a backup."""

import os
import re
import signal
import stat
from email.utils import parsedate_to_datetime
from datetime import datetime, timedelta, timezone
from typing import Any, Callable, List

import pytest

from support.deeds import backup, beginning
from support.language import MEBIBYTE, at, disk, slowly, uuid_of, vm
from support.mail import ADMINS, CERTIFICATE, SENDER, Mail, MailServer, golden, hasty_run, kept, plain_text
from support.process import PASSWORD, Pool, Run, run_program
from support.shelf import Shelf, complete, damaged
from support.wire import eventually

FULL = {'fails': ['SR_BACKEND_FAILURE_44', '', 'There is insufficient space', '']}
BIG = [disk(size=8 * MEBIBYTE, used=8)]
SECRET = 'Swordfish-17'


@pytest.fixture
def a_mail_server(one_mail_server: MailServer) -> Callable[..., MailServer]:
    """a_mail_server(rcpt=['550 no']): a mail server in that mood, which has taken no mail yet."""
    def build(**mood: Any) -> MailServer:
        one_mail_server.mood(**mood)
        one_mail_server.forget()
        return one_mail_server
    return build


def send_test(shelf: Shelf, *lines: str) -> Run:
    """`test-mail` with that config; its pauses and limits are short."""
    return hasty_run(shelf, '-', shelf.config('vm-export=*', *lines), 'test-mail')


def hasty_backup(pool: Pool, shelf: Shelf, *lines: str) -> Run:
    return hasty_run(shelf, '-', shelf.config(*lines), environment=pool.environment())


def as_told(mail: Mail, shelf: Shelf) -> str:
    """Subject and text of the mail, without what changes from night to night."""
    return plain_text('Subject: %s\n\n%s' % (mail.subject, mail.text), shelf)


def password_file(shelf: Shelf, content: bytes = SECRET.encode() + b'\n', mode: int = 0o600) -> str:
    path = os.path.join(shelf.home, 'smtp.password')
    with open(path, 'wb') as file:
        file.write(content)
    os.chmod(path, mode)
    return 'smtp_password_file=' + path


# --- What is in it ---------------------------------------------------------------------------------------------------

def test_a_good_night(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool = a_pool(vm('web'), vm('db'))
    shelf, server = a_shelf(complete('web', 7), complete('gone', 30, 'vdi-export')), a_mail_server()
    run = backup(pool, shelf, 'vm-export=web', 'vdi-export=db', 'pool_db_backup=1', *server.lines())
    assert run.exit_status == 0 and run.stderr == '', run
    assert as_told(server.mail(), shelf) == golden('mail-ok.txt', as_told(server.mail(), shelf))
    assert kept(shelf) == []


def test_a_night_with_failures(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool = a_pool(vm('web'), vm('db1'), vm('db2'),
                  faults=[at('api:VM.snapshot', object='db1', **FULL), at('api:VM.snapshot', object='db2', **FULL)])
    shelf = a_shelf(complete('db1', 14), complete('db1', 7), complete('old', 400), damaged('broken', 3))
    server = a_mail_server()
    run = backup(pool, shelf, 'vm-export=web', 'vm-export=db*', 'vm-export=mail', 'vm-export=test-*',
                 *server.lines())
    assert run.exit_status == 1
    assert as_told(server.mail(), shelf) == golden('mail-error.txt', as_told(server.mail(), shelf))


def test_a_night_with_warnings(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool, shelf, server = a_pool(vm('web')), a_shelf(), a_mail_server()
    run = backup(pool, shelf, 'vm-export=web', 'vm-export=db*', 'colour=blue', 'ignore_extra_keys=True', *server.lines())
    assert run.exit_status == 3
    assert as_told(server.mail(), shelf) == golden('mail-warning.txt', as_told(server.mail(), shelf))


def test_a_pool_database_alone_is_told_too(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool, shelf, server = a_pool(vm('web')), a_shelf(), a_mail_server()
    assert backup(pool, shelf, 'pool_db_backup=1', *server.lines()).exit_status == 0
    assert re.fullmatch(r'OK: pool database dumped in \d+ s \(pool xcp1, xcp1\)', server.mail().subject)
    assert ')\n* The pool database.\n' in server.mail().text


def test_a_pool_database_that_was_not_dumped_is_in_the_subject(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool = a_pool(vm('web'), faults=[at('xe:pool-dump-database', exit=1)])
    shelf, server = a_shelf(), a_mail_server()
    assert backup(pool, shelf, 'vm-export=web', 'pool_db_backup=1', *server.lines()).exit_status == 1
    assert server.mail().subject == 'ERROR: the pool database was not dumped (pool xcp1, xcp1)'
    assert 'ERRORS\n* The pool database: ' in server.mail().text and 'The pool database.\n' not in server.mail().text
    assert '\n* web (' in server.mail().text


def test_the_headers_keep_it_out_of_spam_folders_and_loops(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool, shelf, server = a_pool(vm('b\u00fcro \u65e5\u672c')), a_shelf(), a_mail_server()
    before = datetime.now(timezone.utc) - timedelta(seconds=2)
    run = backup(pool, shelf, 'vm-export=*', *server.lines('mail_to=admins@example.org, boss@example.org,admins@example.org'))
    assert run.exit_status == 0, run
    mail = server.mail()
    message = mail.message
    assert before <= parsedate_to_datetime(str(message['Date'])) <= datetime.now(timezone.utc) + timedelta(seconds=2)
    assert re.fullmatch(r'<[^<>@\s]+@example\.org>', str(message['Message-ID']))
    assert message['Auto-Submitted'] == 'auto-generated' and message['MIME-Version'] == '1.0'
    assert message['From'] == SENDER and message['To'] == 'admins@example.org, boss@example.org'
    assert mail.sender == SENDER and mail.recipients == ['admins@example.org', 'boss@example.org']
    assert message.get_content_type() == 'text/plain' and message.get_content_charset() == 'utf-8'
    assert not message.is_multipart() and message.defects == []
    assert '* b\u00fcro \u65e5\u672c (' in mail.text
    assert all(len(line) <= 78 for line in mail.raw.split(b'\r\n')) and max(mail.raw) < 128
    assert b'\n' not in mail.raw.replace(b'\r\n', b'')


def test_without_mail_from_the_sender_is_root_at_this_host(a_shelf: Any, a_mail_server: Any) -> None:
    shelf, server = a_shelf(), a_mail_server()
    lines = [line for line in server.lines() if not line.startswith('mail_from')]
    assert send_test(shelf, *lines).exit_status == 0
    assert re.fullmatch(r'root@[^@\s]+', server.mail().sender) and server.mail().message['From'] == server.mail().sender
    assert server.mail().sender != 'root@localhost' or os.uname().nodename == 'localhost'


HOSTILE = ['line one\nline two', 'x\r\nBcc: spy@example.net', 'm' * 255, '\u00e4\u00f6\u00fc \u65e5\u672c \U0001f4be',
           '=?utf-8?q?x=0D=0ABcc:_spy@example.net?=', '=?utf-8?b?aGlkZGVu?=', 'a\u2028b', '\u202egpj.exe', '.', 'From me',
           '%s %d %(x)s', '"quoted", <b@c>', '\ttab', 'back\\slash\\n']


def test_no_name_of_a_vm_adds_a_header_or_breaks_the_text(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool = a_pool(*[vm(name, uuid=uuid_of(repr(name)), disks=[disk(size=MEBIBYTE, used=1)]) for name in HOSTILE],
                  faults=[at('api:VM.snapshot', **FULL)])
    shelf, server = a_shelf(), a_mail_server()
    for selectors in (['*'], ['uuid:' + uuid_of(repr(name)) for name in HOSTILE[:5]],
                      ['uuid:' + uuid_of(repr(name)) for name in HOSTILE[5:]]):
        run = hasty_backup(pool, shelf, *(['vm-export=' + selector for selector in selectors] + server.lines()))
        assert run.exit_status == 1 and run.never_says('not sent'), run
    for mail in server.mails():
        assert sorted(mail.message.keys()) == ['Auto-Submitted', 'Content-Transfer-Encoding', 'Content-Type', 'Date', 'From',
                                               'MIME-Version', 'Message-ID', 'Subject', 'To']
        assert mail.recipients == [ADMINS] and mail.message.defects == []
        assert mail.subject.isprintable() and mail.subject.endswith(', xcp1)')
        assert all(line.isprintable() for line in mail.text.split('\n'))
        assert not [line for line in mail.text.split('\n') if line.startswith(('Bcc', 'line two'))]
        assert len(mail.subject) < 400
    text = server.mails()[0].text
    assert text.count('\n* ') == len(HOSTILE), 'an item each, and not one more'
    for name in HOSTILE[2:6]:
        assert name in text, name


# --- When it is sent -------------------------------------------------------------------------------------------------

def test_a_lock_that_is_held_is_told_by_mail(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool = a_pool(vm('web', disks=BIG), faults=[slowly()])
    shelf, server = a_shelf(), a_mail_server()
    with beginning(pool, shelf, 'vm-export=web', *server.lines()) as first:
        assert eventually(shelf.unfinished)
        assert backup(pool, shelf, 'vm-export=web', *server.lines()).exit_status == 5
        mail = server.mail()
        pool.release()
        assert first.ending().exit_status == 0
    assert as_told(mail, shelf) == golden('mail-locked.txt', as_told(mail, shelf))
    assert server.subjects()[1].startswith('OK: ')


def test_a_pool_that_is_down_is_told_by_mail(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool, shelf, server = a_pool(vm('web')), a_shelf(), a_mail_server()
    pool.stop()
    assert backup(pool, shelf, 'vm-export=web', *server.lines(), password=PASSWORD).exit_status == 4
    assert as_told(server.mail(), shelf) == golden('mail-pool-down.txt', as_told(server.mail(), shelf))
    assert shelf.is_unchanged()


def test_a_refused_login_is_told_by_mail_without_the_password(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool, shelf, server = a_pool(vm('web')), a_shelf(), a_mail_server()
    run = backup(pool, shelf, 'vm-export=web', *server.lines(), password='not-' + SECRET)
    assert run.exit_status == 4 and run.never_says(SECRET)
    assert as_told(server.mail(), shelf) == golden('mail-login.txt', as_told(server.mail(), shelf))
    assert SECRET not in server.mail().text + server.mail().subject


def test_a_run_that_a_signal_ends_is_told_by_mail(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool = a_pool(vm('web', disks=BIG), vm('db', disks=BIG), faults=[slowly()])
    shelf, server = a_shelf(complete('web', 7)), a_mail_server()
    with beginning(pool, shelf, 'vm-export=*', *server.lines()) as process:
        assert process.says(': vm-export into db/'), process.output
        process.signal(signal.SIGTERM)
        assert process.ending().exit_status == 128 + signal.SIGTERM
    text = as_told(server.mail(), shelf)
    assert text == golden('mail-signal.txt', text)
    assert pool.has_no_snapshots_of_ours()


def test_a_signal_before_the_run_has_begun_is_told_by_mail(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool = a_pool(vm('web'), faults=[at('api:VM.get_all_records', sleeps=60, until='enough')])
    shelf, server = a_shelf(), a_mail_server()
    with beginning(pool, shelf, 'vm-export=*', *server.lines()) as process:
        assert eventually(lambda: pool.calls('api:session.*'))
        process.signal(signal.SIGTERM)
        assert process.says('stopped by SIGTERM'), process.output
        pool.release()
        assert process.ending().exit_status == 128 + signal.SIGTERM
    assert len(server.mails()) == 1 and 'SIGTERM' in server.mail().text and server.mail().subject.startswith('ERROR: ')


def test_a_run_that_is_interrupted_tells_all_that_was_not_done(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool = a_pool(vm('a', disks=BIG), vm('b'), vm('c'), faults=[slowly()])
    shelf, server = a_shelf(), a_mail_server()
    with beginning(pool, shelf, 'vm-export=*', 'stall_timeout=1', *server.lines()) as process:
        assert process.says(': vm-export into a/'), process.output
        process.signal(signal.SIGINT)
        run = process.ending()
    assert run.exit_status == 128 + signal.SIGINT
    assert server.mail().subject == 'ERROR: 3 of 3 VMs not backed up: a, b, c (pool xcp1, xcp1)'
    assert server.mail().text.count('not backed up, as the run ended before it was done.') == 3
    assert server.mail().text.count('NO good copy of it') == 3


def test_a_share_that_is_not_mounted_is_told_by_mail(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool, shelf, server = a_pool(vm('web')), a_shelf(), a_mail_server()
    run = backup(pool, shelf, 'vm-export=web', 'require_mount=yes', 'backup_dir=' + os.path.dirname(os.path.abspath(__file__)),
                 *server.lines())
    assert run.exit_status == 2 and 'share mounted' in run.stderr
    assert 'share mounted' in server.mail().text and server.mail().subject.startswith('ERROR: nothing was backed up: ')


def test_a_bug_is_told_by_mail_and_what_it_quotes_is_not(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool, shelf, server = a_pool(vm('web')), a_shelf(complete('web', 7)), a_mail_server()
    config = shelf.config('vm-export=web', *server.lines())
    for place, name in (('make_plan', 'mail-bug.txt'), ('_make_copy', 'mail-bug-of-a-vm.txt')):
        run = hasty_run(shelf, PASSWORD, config, environment=pool.environment(), broken=place)
        assert run.exit_status == 70 and 'Traceback' in run.stderr, run
        text = as_told(server.mails()[-1], shelf)
        assert text == golden(name, text)
        assert 'quoted' not in text and PASSWORD not in text


def test_a_run_that_is_left_to_another_host_sends_none(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool = a_pool(vm('web'), hosts=[{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'}])
    shelf, server = a_shelf(), a_mail_server()
    for host in (1, 2):
        assert backup(pool, shelf, 'vm-export=web', *server.lines(), host=host).exit_status == 0
    assert server.subjects() == [server.mail().subject] and 'xcp1' in server.mail().subject


@pytest.mark.parametrize('when, subjects', [('always', ['OK', 'WARNING', 'ERROR', 'ERROR']),
                                            ('problems', ['WARNING', 'ERROR', 'ERROR']), ('never', [])])
def test_mail_when_says_of_which_runs(a_pool: Any, a_shelf: Any, a_mail_server: Any, when: str, subjects: List[str]) -> None:
    pool, shelf, server = a_pool(vm('web')), a_shelf(), a_mail_server()
    lines = server.lines('mail_when=' + when)
    statuses = [hasty_run(shelf, password, shelf.config(*(more + lines)), environment=pool.environment()).exit_status
                for more, password in ((['vm-export=web'], '-'), (['vm-export=web', 'vm-export=x*'], '-'),
                                       (['vm-export=web', 'vm-export=y'], '-'), (['vm-export=web'], 'wrong'))]
    assert statuses == [0, 3, 1, 4]
    assert [subject.split(':')[0] for subject in server.subjects()] == subjects


def test_without_mail_to_no_server_is_asked(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool, shelf, server = a_pool(vm('web')), a_shelf(), a_mail_server()
    lines = [line for line in server.lines() if not line.startswith('mail_to')]
    assert backup(pool, shelf, 'vm-export=web', *lines).exit_status == 0
    assert backup(pool, shelf, 'vm-export=web', *lines, words=['preview']).exit_status == 0
    assert server.mails() == []
    run = send_test(shelf, *lines)
    assert run.exit_status == 2 and 'mail_to' in run.stderr


def test_a_preview_mails_nothing(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool, shelf, server = a_pool(vm('web')), a_shelf(), a_mail_server()
    assert backup(pool, shelf, 'vm-export=web', *server.lines(), words=['preview']).exit_status == 0
    assert backup(pool, shelf, 'vm-export=y', *server.lines(), words=['preview']).exit_status == 1
    assert server.mails() == []


@pytest.mark.parametrize('when', ['always', 'problems', 'never'])
def test_test_mail_sends_one_that_says_what_it_proves(a_shelf: Any, a_mail_server: Any, when: str) -> None:
    shelf, server = a_shelf(), a_mail_server()
    run = run_program('-', shelf.config('vm-export=web', *server.lines('mail_when=' + when)), 'test-mail')
    assert run.exit_status == 0 and run.stderr == '' and ADMINS in run.stdout and 'localhost' in run.stdout
    text = as_told(server.mail(), shelf)
    assert text == golden('mail-test-%s.txt' % when, text)
    assert shelf.is_unchanged()


# --- Servers in all moods --------------------------------------------------------------------------------------------

NO = '550 5.1.1 <admins@example.org>: no such user'
LATER = '450 4.2.0 greylisted, come back later'


@pytest.mark.parametrize('mood, taken, tries, words', [
    (dict(rcpt=[LATER]), True, 2, ''),
    (dict(rcpt=[LATER, LATER]), True, 3, ''),
    (dict(data=['451 4.3.0 try again', '451 4.3.0 try again']), True, 3, ''),
    (dict(data=['drop', 'drop']), True, 3, ''),
    (dict(quit='421 4.3.0 too busy to say good-bye'), True, 1, ''),
    (dict(rcpt=[LATER, LATER, LATER]), False, 3, '450 4.2.0 greylisted'),
    (dict(rcpt=[NO]), False, 1, NO),
    (dict(data=['554 5.7.1 this is spam']), False, 1, '554 5.7.1 this is spam'),
    (dict(rcpt=['drop'] * 3), False, 3, 'closed the connection'),
    (dict(greeting='drop'), False, 3, 'closed the connection'),
    (dict(greeting='silent'), False, 3, 'not taken the mail after 3 s'),
    (dict(greeting='drip'), False, 3, 'not taken the mail after 3 s'),
    (dict(starttls='demanded'), False, 1, '530 '),
    (dict(login=['u', SECRET], starttls='offered'), False, 1, '530 '),
], ids=lambda value: '' if not isinstance(value, dict) else '-'.join(map(str, value))[:20])
def test_three_tries_at_most_and_one_where_the_answer_is_final(a_shelf: Any, a_mail_server: Any, mood: Any, taken: bool,
                                                               tries: int, words: str) -> None:
    shelf, server = a_shelf(), a_mail_server(**mood)
    run = send_test(shelf, *server.lines())
    assert run.exit_status == (0 if taken else 1), run
    assert run.stdout.count('Trying again in') == tries - 1, run
    assert len(server.mails()) == taken
    if not taken:
        assert words in run.stderr and ADMINS in run.stderr and 'localhost:%d' % server.port in run.stderr
    assert run.never_says('Traceback') and shelf.is_unchanged()


def test_a_server_that_is_not_there_is_named(a_shelf: Any) -> None:
    for server, reason in (('127.0.0.1', 'Connection refused'), ('no-such-host.invalid', ''), ('x' * 70 + '.invalid', '')):
        run = send_test(a_shelf(), 'mail_to=' + ADMINS, 'smtp_server=' + server, 'smtp_port=9')
        assert run.exit_status == 1 and server + ':9' in run.stderr and reason in run.stderr, run
        assert run.never_says('Traceback')


def test_of_two_recipients_one_may_be_refused_and_one_may_have_to_wait(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    server = a_mail_server(rcpt={'boss@example.org': [NO], 'night@example.org': [LATER]})
    run = hasty_backup(pool, shelf, 'vm-export=web', *server.lines('mail_to=admins@example.org,boss@example.org,night@example.org'))
    assert run.exit_status == 3
    assert [mail.recipients for mail in server.mails()] == [['admins@example.org'], ['night@example.org']]
    assert 'boss@example.org' in run.stderr and '550' in run.stderr and 'The other recipients have it.' in run.stderr
    assert kept(shelf) == []


@pytest.mark.parametrize('security, mood', [('tls', {}), ('starttls', {'starttls': 'offered'}), ('starttls', {'starttls': 'demanded'})])
@pytest.mark.parametrize('address', ['localhost', '127.0.0.1'])
def test_encrypted_with_a_certificate_that_is_checked(a_shelf: Any, a_mail_server: Any, security: str, mood: Any,
                                                      address: str) -> None:
    shelf, server = a_shelf(), a_mail_server(**mood)
    port = 'smtp_port=%d' % (server.tls_port if security == 'tls' else server.port)
    lines = server.lines('smtp_security=' + security, port, 'smtp_server=' + address)
    assert send_test(shelf, 'smtp_ca_file=' + CERTIFICATE, *lines).exit_status == 0
    assert server.mail().tls
    run = send_test(shelf, *lines)
    assert run.exit_status == 1 and 'certificate' in run.stderr and 'smtp_ca_file' in run.stderr
    assert run.stdout.count('Trying again') == 0
    if address == 'localhost':
        run = send_test(shelf, 'smtp_ca_file=' + CERTIFICATE, *server.lines('smtp_security=' + security, port, 'smtp_server=127.0.0.20'))
        assert run.exit_status == 1
    assert len(server.mails()) == 1


def test_a_server_whose_certificate_bears_another_name_is_refused(a_shelf: Any, a_mail_server: Any) -> None:
    shelf, server = a_shelf(), a_mail_server(starttls='offered')
    run = send_test(shelf, 'smtp_ca_file=' + CERTIFICATE, 'smtp_security=starttls', *server.lines('smtp_server=' + os.uname().nodename))
    assert run.exit_status == 1 and run.never_says('Traceback'), run
    if 'Connection refused' not in run.stderr and 'not known' not in run.stderr:
        assert 'certificate' in run.stderr
    assert server.mails() == []


@pytest.mark.parametrize('security, words', [('tls', 'TLS'), ('starttls', 'STARTTLS')])
def test_encryption_that_the_server_does_not_have_is_told_and_nothing_is_sent_in_clear(a_shelf: Any, a_mail_server: Any,
                                                                                       security: str, words: str) -> None:
    shelf, server = a_shelf(), a_mail_server()
    run = send_test(shelf, 'smtp_ca_file=' + CERTIFICATE, *server.lines('smtp_security=' + security))
    assert run.exit_status == 1 and words in run.stderr and server.mails() == []


def test_a_ca_file_that_is_not_there_or_is_none_is_named(a_shelf: Any, a_mail_server: Any) -> None:
    shelf, server = a_shelf(), a_mail_server(starttls='offered')
    for path in (os.path.join(shelf.home, 'none.pem'), shelf.config_path):
        run = send_test(shelf, 'smtp_ca_file=' + path, *server.lines('smtp_security=starttls'))
        assert run.exit_status == 1 and path in run.stderr and 'smtp_ca_file' in run.stderr and run.never_says('Traceback')


@pytest.mark.parametrize('content', [SECRET.encode(), SECRET.encode() + b'\r\n', b'U3dvcmRmaXNoLTE3\n'],
                         ids=['plain', 'with a line end', 'of create-password-file'])
@pytest.mark.parametrize('mood', [{}, {'starttls': 'demanded'}], ids=['in clear', 'encrypted'])
def test_login_with_a_password_file(a_shelf: Any, a_mail_server: Any, content: bytes, mood: Any) -> None:
    shelf, server = a_shelf(), a_mail_server(login=['backup', SECRET], **mood)
    lines = server.lines('smtp_user=backup', password_file(shelf, content))
    if mood:
        lines += ['smtp_security=starttls', 'smtp_ca_file=' + CERTIFICATE]
    run = send_test(shelf, *lines)
    assert run.exit_status == 0 and run.never_says(SECRET), run
    assert server.mail().login == 'backup'


def test_a_password_that_could_be_base64_is_taken_for_what_create_password_file_wrote(a_shelf: Any, a_mail_server: Any) -> None:
    shelf, server = a_shelf(), a_mail_server(login=['backup', 'test'])
    run = send_test(shelf, *server.lines('smtp_user=backup', password_file(shelf, b'dGVzdA==\n')))
    assert run.exit_status == 0 and server.mail().login == 'backup', run


def test_a_login_that_is_refused_is_told_without_the_password_even_if_the_server_repeats_it(a_pool: Any, a_shelf: Any,
                                                                                            a_mail_server: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    server = a_mail_server(login=['backup', 'another'], echo=True)
    run = hasty_backup(pool, shelf, 'vm-export=web', *server.lines('smtp_user=backup', password_file(shelf)))
    assert run.exit_status == 3 and '535' in run.stderr and 'smtp_password_file' in run.stderr
    assert run.never_says(SECRET) and run.never_says('U3dvcmRmaXNo') and run.never_says('AGJhY2t1cABT')
    os.remove(os.path.join(shelf.home, 'smtp.password'))
    assert shelf.holds_no_trace_of(SECRET)


@pytest.mark.parametrize('mode', [0o644, 0o640, 0o604, 0o660])
def test_a_password_file_that_others_can_read_is_refused(a_shelf: Any, a_mail_server: Any, mode: int) -> None:
    shelf, server = a_shelf(), a_mail_server(login=['backup', SECRET])
    run = send_test(shelf, *server.lines('smtp_user=backup', password_file(shelf, mode=mode)))
    assert run.exit_status == 1 and 'smtp.password' in run.stderr and 'chmod 600' in run.stderr and run.never_says(SECRET)
    assert server.mails() == []


@pytest.mark.parametrize('lines, words', [
    (['smtp_user=backup'], 'smtp_password_file'), (['smtp_user=backup', 'smtp_password_file=/nonexistent/x'], '/nonexistent/x'),
    (['smtp_user=backup', 'smtp_password_file=/dev/null'], 'smtp_password_file /dev/null'),
    (['mail_to=\u00fc@example.org'], 'other than ASCII')])
def test_settings_that_can_not_work_are_told_in_a_sentence(a_shelf: Any, a_mail_server: Any, lines: List[str],
                                                          words: str) -> None:
    shelf, server = a_shelf(), a_mail_server()
    run = send_test(shelf, *server.lines(*lines))
    assert run.exit_status in (1, 2) and words in run.stderr and run.never_says('Traceback') and server.mails() == []


def test_a_password_with_other_than_ascii_is_told_without_it(a_shelf: Any, a_mail_server: Any) -> None:
    shelf, server = a_shelf(), a_mail_server(login=['backup', SECRET])
    run = send_test(shelf, *server.lines('smtp_user=backup', password_file(shelf, 'p\u00e4ss'.encode('utf-8'))))
    assert run.exit_status == 1 and 'other than ASCII' in run.stderr and run.never_says('\u00e4'), run


def test_the_real_pause_is_a_few_seconds(a_shelf: Any, a_mail_server: Any) -> None:
    shelf, server = a_shelf(), a_mail_server(rcpt=[LATER])
    run = run_program('-', shelf.config('vm-export=web', *server.lines()), 'test-mail')
    assert run.exit_status == 0 and 'Trying again in 5 s' in run.stdout and len(server.mails()) == 1


def test_test_mail_can_be_interrupted(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool, shelf, server = a_pool(), a_shelf(), a_mail_server(greeting='silent')
    with beginning(pool, shelf, 'vm-export=web', *server.lines(), words=['test-mail']) as process:
        assert process.has_begun() and not eventually(process.is_over, 1.5)
        process.signal(signal.SIGINT)
        assert process.ending().exit_status == 128 + signal.SIGINT


# --- What can't be sent ----------------------------------------------------------------------------------------------

def test_a_mail_that_can_not_be_sent_is_a_warning_and_goes_out_with_the_next_runs(a_pool: Any, a_shelf: Any,
                                                                                 a_mail_server: Any) -> None:
    pool, shelf, server = a_pool(vm('web'), vm('db')), a_shelf(), a_mail_server(rcpt=[NO], stays=True)
    run = hasty_backup(pool, shelf, 'vm-export=*', *server.lines())
    assert run.exit_status == 3 and '550' in run.stderr and 'kept' in run.stderr, run
    assert shelf.has('web', complete=1) and shelf.has('db', complete=1), 'no VM has another outcome for it'
    assert 'WARNING,S:2 W:1 E:0' in shelf.status_lines()[-1] and 'WARNING: ' in run.stdout
    run = hasty_backup(pool, shelf, 'vm-export=*', 'vm-export=x', *server.lines())
    assert run.exit_status == 1, 'a failed VM stays a failed VM'
    waiting = kept(shelf)
    assert len(waiting) == 2 and server.mails() == []
    assert all(stat.S_IMODE(os.stat(shelf.at(path)).st_mode) == 0o600 for path in waiting)

    server.mood()
    run = hasty_backup(pool, shelf, 'vm-export=web', 'exclude=db', *server.lines())
    assert run.exit_status == 0 and run.stderr == '', run
    assert [subject[:5] for subject in server.subjects()] == ['OK: 1', 'OK: 2', 'ERROR']
    assert kept(shelf) == []
    dates = [parsedate_to_datetime(str(mail.message['Date'])) for mail in server.mails()]
    assert dates[1] <= dates[2] <= dates[0], 'each bears the time of its own run'


def test_kept_mail_goes_out_also_when_the_next_run_mails_nothing_itself(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool, shelf, server = a_pool(vm('web')), a_shelf(), a_mail_server(rcpt=[NO], stays=True)
    lines = server.lines('mail_when=problems')
    assert hasty_backup(pool, shelf, 'vm-export=web', 'vm-export=x', *lines).exit_status == 1
    assert len(kept(shelf)) == 1
    server.mood()
    assert hasty_backup(pool, shelf, 'vm-export=web', *lines).exit_status == 0
    assert server.mail().subject.startswith('ERROR: 1 of 2') and kept(shelf) == []


def test_kept_mail_goes_to_the_address_as_it_was_corrected_and_waits_for_its_own_config(a_pool: Any, a_shelf: Any,
                                                                                       a_mail_server: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    server = a_mail_server(rcpt={'typo@example.org': [NO]}, stays=True)
    assert hasty_backup(pool, shelf, 'vm-export=web', *server.lines('mail_to=typo@example.org')).exit_status == 3
    other = os.path.join(shelf.home, 'other.cfg')
    with open(shelf.config('vm-export=web', *server.lines('mail_to=other@example.org'))) as file, open(other, 'w') as copy:
        copy.write(file.read())
    assert hasty_run(shelf, '-', other, environment=pool.environment()).exit_status == 0
    assert len(kept(shelf)) == 1 and server.mail().recipients == ['other@example.org']
    assert hasty_backup(pool, shelf, 'vm-export=web', *server.lines()).exit_status == 0
    assert [mail.recipients for mail in server.mails()][1:] == [[ADMINS]] * 2 and kept(shelf) == []


def test_a_kept_mail_that_is_refused_for_good_does_not_stand_in_the_way(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool, shelf, server = a_pool(vm('web')), a_shelf(), a_mail_server(rcpt=[NO])
    assert hasty_backup(pool, shelf, 'vm-export=web', *server.lines()).exit_status == 3
    server.mood(data=['250 OK', '554 5.7.1 this is spam'])
    run = hasty_backup(pool, shelf, 'vm-export=web', *server.lines())
    assert run.exit_status == 3 and 'given up' in run.stderr, run
    assert len(server.mails()) == 1 and kept(shelf) == []


def test_a_kept_mail_waits_while_it_is_our_own_settings_that_fail(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    server = a_mail_server(login=['backup', 'another'])
    lines = server.lines('smtp_user=backup', password_file(shelf))
    assert hasty_backup(pool, shelf, 'vm-export=web', 'mail_when=always', *lines).exit_status == 3
    waiting = kept(shelf)
    assert len(waiting) == 1
    for settings in (lines, server.lines('smtp_user=backup', 'smtp_password_file=' + os.path.join(shelf.home, 'gone'))):
        run = hasty_backup(pool, shelf, 'vm-export=web', 'mail_when=problems', *settings)
        assert run.exit_status == 0 and 'still kept' in run.stdout and kept(shelf) == waiting, run


def test_an_early_end_is_kept_too_and_keeps_its_exit_status(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool, shelf, server = a_pool(vm('web')), a_shelf(), a_mail_server(greeting='drop')
    config = shelf.config('vm-export=web', *server.lines())
    assert hasty_run(shelf, 'wrong', config, environment=pool.environment()).exit_status == 4
    assert len(kept(shelf)) == 1
    server.mood()
    assert hasty_run(shelf, '-', config, environment=pool.environment()).exit_status == 0
    assert [subject.split(':')[0] for subject in server.subjects()] == ['OK', 'ERROR']


def test_of_kept_mails_the_newest_fifty_stay(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool, shelf, server = a_pool(vm('web')), a_shelf(), a_mail_server(rcpt=[NO], stays=True)
    assert hasty_backup(pool, shelf, 'vm-export=web', *server.lines()).exit_status == 3
    folder = shelf.at('.vmbackup', 'mail')
    first = os.listdir(folder)[0]
    for number in range(60):
        name = re.sub(r'-\d{8}T\d{6}\.\d{6}Z-', '-20160101T0000%02d.000000Z-' % number, first)
        with open(os.path.join(folder, name), 'w') as file:
            file.write('Subject: x\r\n\r\n')
    assert hasty_backup(pool, shelf, 'vm-export=web', *server.lines()).exit_status == 3
    assert len(kept(shelf)) == 50 and first in os.listdir(folder)


# --- A drill -----------------------------------------------------------------------------------------------------------

def hasty_drill(pool: Pool, shelf: Shelf, *lines: str) -> Run:
    return hasty_run(shelf, '-', shelf.config('vm-export=*', *lines), 'drill', 'newest-of-each', environment=pool.environment())


def test_a_drill_is_mailed_like_a_backup(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool, shelf, server = a_pool(vm('web'), vm('db')), a_shelf(), a_mail_server()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    assert hasty_drill(pool, shelf, *server.lines()).exit_status == 0
    assert server.mail().subject.startswith('OK: drill: 2 copies came back (pool ')
    copy = shelf.newest('web')
    os.truncate(shelf.at('web', copy, 'web.xva'), MEBIBYTE)
    server.forget()
    assert hasty_drill(pool, shelf, *server.lines('mail_when=problems')).exit_status == 1
    mail = server.mail()
    assert mail.subject.startswith('ERROR: drill: 1 of 2 copies did not come back: web (pool '), mail.subject
    assert mail.text.startswith('* web/' + copy) and 'restored and compared' in mail.text, mail.text


def test_a_drill_that_ends_early_is_mailed_too_but_not_its_preview(a_pool: Any, a_shelf: Any, a_mail_server: Any) -> None:
    pool, shelf, server = a_pool(vm('web')), a_shelf(), a_mail_server()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    pool.stop()
    words = ['-', shelf.config('vm-export=*', *server.lines('mail_when=problems')), 'drill', 'web']
    assert hasty_run(shelf, *words + ['preview'], environment=pool.environment()).exit_status == 4
    assert server.mails() == []
    assert hasty_run(shelf, *words, environment=pool.environment()).exit_status == 4
    mail = server.mail()
    assert mail.subject.startswith('ERROR: nothing was drilled: ') and 'NOTHING WAS DRILLED' in mail.text, mail


# --- Keys ------------------------------------------------------------------------------------------------------------

def test_the_keys_have_the_defaults_that_help_tells() -> None:
    text = run_program('help', 'config').stdout
    for key, default in (('mail_to', ''), ('mail_from', ''), ('smtp_server', 'localhost'), ('smtp_port', '0'),
                         ('smtp_security', 'none'), ('smtp_ca_file', ''), ('smtp_user', ''), ('smtp_password_file', ''),
                         ('mail_when', 'always')):
        lines = [line for line in text.splitlines() if re.match(r'\s*%s\b' % key, line)]
        assert lines, key
        assert default in ''.join(lines), (key, lines)


@pytest.mark.parametrize('line', ['mail_to=nobody', 'mail_to=a@b,', 'mail_from=a@b,c@d', 'mail_from=<a@b>',
                                  'smtp_security=ssl', 'smtp_port=70000', 'mail_when=sometimes', 'mail_to=a b@c'])
def test_a_key_that_is_wrong_is_told_with_its_line(a_shelf: Any, line: str) -> None:
    shelf = a_shelf()
    run = run_program('-', shelf.config('vm-export=web', line), 'test-mail')
    assert run.exit_status == 2 and 'weekend.cfg:5: ' in run.stderr and line.split('=')[0] in run.stderr, run
