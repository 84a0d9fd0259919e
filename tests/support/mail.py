"""Mail: a server that receives it (mail_server.py, a process of its own), and what there is to see in it afterwards.

    server = MailServer(rcpt=['450 4.2.0 greylisted'])      its mood; `server.mood(...)` is another one
    run = backup(pool, shelf, 'vm-export=web', *server.lines())
    server.mail().subject, server.mail().text

Texts that are compared with golden ones have what changes from night to night replaced by words.
"""

import email
import email.message
import email.policy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from typing import Any, Dict, List

from support import warm
from support.process import (CRON_PATH, PROGRAM, START_LIMIT_S, TESTS, TROUBLED, Run, end, ended, first_line,
                             write_json)
from support.shelf import Shelf

PROGRAM_OF_SERVER = os.path.join(TESTS, 'support', 'mail_server.py')
GOLDEN = os.path.join(TESTS, 'golden')
REWRITE = 'VMBACKUP_REWRITE_GOLDEN'         # set in the environment: golden texts are written anew, to be read as prose
CERTIFICATE = os.path.join(TESTS, 'simpool', 'test-certificate.pem')
SENDER = 'backup@example.org'
ADMINS = 'admins@example.org'


class Mail:
    """A mail as the server got it, read with the standard library."""

    def __init__(self, taken: Dict[str, Any]) -> None:
        self.sender = taken['sender']       # type: str
        self.recipients = taken['recipients']       # type: List[str]
        self.tls = taken['tls']             # type: bool
        self.login = taken['login']         # type: str
        self.raw = taken['content'].encode('latin-1')       # type: bytes
        self.message = email.message_from_bytes(self.raw, policy=email.policy.default)  # type: Any

    @property
    def subject(self) -> str:
        return str(self.message['Subject'])

    @property
    def text(self) -> str:
        return self.message.get_content().replace('\r\n', '\n')


class MailServer:
    """The server, from `start` to `stop`."""

    def __init__(self, **mood: Any) -> None:
        self.home = tempfile.mkdtemp(prefix='mail-')
        self.names = 0
        self.mood(**mood)
        self.log = open(os.path.join(self.home, 'stderr'), 'ab')
        self.process = subprocess.Popen([sys.executable, PROGRAM_OF_SERVER, self.home], env={'PATH': CRON_PATH},
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.log)
        line = first_line(self.process, START_LIMIT_S)
        assert line.startswith('ready '), line + self.complaints()
        self.port, self.tls_port = (int(word) for word in line.split()[1:])

    def mood(self, **mood: Any) -> None:
        """From now on it answers so (mail_server.py tells the words)."""
        self.names += 1
        path = os.path.join(self.home, 'mood.json')
        with open(path + '.new', 'w') as file:
            json.dump(dict(mood, name=self.names), file)
        os.rename(path + '.new', path)

    def forget(self) -> None:
        """It has taken no mail so far."""
        for name in os.listdir(self.home):
            if re.fullmatch(r'\d+\.json', name):
                os.remove(os.path.join(self.home, name))

    def stop(self) -> None:
        end(self.process)
        self.log.close()
        shutil.rmtree(self.home, ignore_errors=True)

    def complaints(self) -> str:
        with open(os.path.join(self.home, 'stderr'), encoding='utf-8', errors='replace') as file:
            return file.read()

    def lines(self, *more: str) -> List[str]:
        """The lines of a config that mails to it; `more` replaces and adds."""
        standard = ['mail_to=' + ADMINS, 'mail_from=' + SENDER, 'smtp_server=localhost', 'smtp_port=%d' % self.port]
        return [line for line in standard
                if not any(own.startswith(line.split('=')[0] + '=') for own in more)] + list(more)

    def mails(self) -> List[Mail]:
        """All that it has taken so far, oldest first."""
        found = []
        for name in sorted(os.listdir(self.home)):
            if re.fullmatch(r'\d+\.json', name):
                with open(os.path.join(self.home, name), encoding='utf-8') as file:
                    found.append(Mail(json.load(file)))
        return found

    def mail(self) -> Mail:
        """The only one."""
        mails = self.mails()
        assert len(mails) == 1, [mail.subject for mail in mails]
        return mails[0]

    def subjects(self) -> List[str]:
        return [mail.subject for mail in self.mails()]


def kept(shelf: Shelf) -> List[str]:
    """The mails that wait on the shelf for the next run."""
    return sorted(path for path in shelf.tree() if path.startswith('.vmbackup/mail/'))


def hasty_run(shelf: Shelf, *words: str, environment: Any = None, broken: str = '') -> Run:
    """A run with these words whose patience with mail servers is three seconds. `broken`: a function of it that has a bug."""
    trouble = os.path.join(shelf.home, 'TROUBLE.json')
    write_json(trouble, dict({'hasty': True}, **{'broken': broken} if broken else {}))
    return ended(warm.start([TROUBLED, trouble, PROGRAM] + list(words), environment or {'PATH': CRON_PATH}))


def plain_text(text: str, shelf: Shelf) -> str:
    """The text with dates, durations, speeds, free space and this machine's names replaced by words."""
    for pattern, word in (
            (re.escape(shelf.config_path), '/snapshots/NAUbackup/weekend.cfg'), (re.escape(shelf.path), '/snapshots/BACKUPS'),
            (r'\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ', 'YYYY-MM-DDTHH:MM:SSZ'), (r'\b\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)?', 'YYYY-MM-DD HH:MM'),
            (r'\b\d+ min \d+ s\b|\b\d+ s\b', 'N s'), (r' \(\d+ MB/s\)', ''), (r'\bprocess \d+\b', 'process PID'),
            (r'[\d.]+ \w+ in /snapshots/BACKUPS', 'N GiB in /snapshots/BACKUPS'),
            (r'\bhost %s\b' % re.escape(socket.gethostname().split('.')[0]), 'host HOST'),
            (r'\(%s\)' % re.escape(socket.gethostname().split('.')[0]), '(HOST)'), (r'127\.0\.0\.1:\d+', '127.0.0.1:PORT'),
            (r'/tmp/simpool-\w+', '/simpool')):
        text = re.sub(pattern, word, text)
    return text


def golden(name: str, text: str) -> str:
    """The golden text of that name, which is this one when texts are to be rewritten."""
    path = os.path.join(GOLDEN, name)
    if os.environ.get(REWRITE):
        os.makedirs(GOLDEN, exist_ok=True)
        with open(path, 'w', encoding='utf-8') as file:
            file.write(text)
    with open(path, encoding='utf-8') as file:
        return file.read()
