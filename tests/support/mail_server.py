#!/usr/bin/env python3
"""A mail server for tests, in a process of its own: aiosmtpd, in a mood that can be changed while it runs.

    mail_server.py DIR

It prints "ready PORT PORT", its plain port and its port for TLS from the first byte, and writes each mail that it takes
to DIR/NNN.json: the envelope and the message's bytes as Latin-1 text. DIR/mood.json, read again for each connection,
may hold

    "greeting"     "silent": it says nothing; "drip": a byte now and then, for ever; "drop": it hangs up
    "rcpt", "data" the answers to RCPT and DATA, one for each time; after the last one the mail is taken. "drop" hangs up.
                   `rcpt` may be an object, with such a list for each address
    "stays"        the last answer of "rcpt" and "data" is given for ever
    "quit"         the answer to QUIT
    "starttls"     "offered" or "demanded"
    "login"        [user, password]: demanded, and compared
    "echo"         a refused login is answered with what was sent
    "name"         answers are counted anew for each mood of another name
"""

import asyncio
import base64
import json
import os
import signal
import ssl
import sys
from typing import Any, Dict, List

from aiosmtpd.smtp import SMTP, AuthResult

CERTIFICATE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'simpool', 'test-certificate.pem')
TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if hasattr(ssl, 'PROTOCOL_TLS_SERVER') else ssl.PROTOCOL_TLS)
TLS.load_cert_chain(CERTIFICATE)


class Rude(asyncio.Protocol):
    """A server that never says what it should."""

    def __init__(self, manner: str) -> None:
        self.manner = manner

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        if self.manner == 'drop':
            transport.close()
        elif self.manner == 'drip':
            self.drip()

    def drip(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(b'2')
            asyncio.get_event_loop().call_later(0.1, self.drip)


class Handler:
    """Answers by the mood, and writes down what it takes."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.used = {}  # type: Dict[str, int]
        self.taken = 0

    @property
    def mood(self) -> Dict[str, Any]:
        with open(os.path.join(self.directory, 'mood.json'), encoding='utf-8') as file:
            return json.load(file)

    def answer(self, server: SMTP, key: str, answers: List[str]) -> str:
        """The next of these answers, 250 after the last."""
        number = self.used.get(key, 0)
        self.used[key] = number + 1
        if answers and self.mood.get('stays'):
            number = min(number, len(answers) - 1)
        text = answers[number] if number < len(answers) else '250 OK'
        if text == 'drop':
            server.transport.close()
        return text

    async def handle_RCPT(self, server: SMTP, session: Any, envelope: Any, address: str, _options: Any) -> str:
        answers = self.mood.get('rcpt', [])
        if isinstance(answers, dict):
            answers = answers.get(address, [])
        text = self.answer(server, json.dumps(['rcpt', address, self.mood.get('name')]), answers)
        if text.startswith('250'):
            envelope.rcpt_tos.append(address)
        return text

    async def handle_DATA(self, server: SMTP, session: Any, envelope: Any) -> str:
        text = self.answer(server, json.dumps(['data', self.mood.get('name')]), self.mood.get('data', []))
        if text.startswith('250'):
            self.taken += 1
            path = os.path.join(self.directory, '%03d.json' % self.taken)
            with open(path + '.new', 'w', encoding='utf-8') as file:
                json.dump({'sender': envelope.mail_from, 'recipients': envelope.rcpt_tos, 'tls': server.transport.get_extra_info('ssl_object') is not None,
                           'login': session.auth_data.login.decode() if session.auth_data else '',
                           'content': envelope.original_content.decode('latin-1')}, file)
            os.rename(path + '.new', path)
        return text

    async def handle_QUIT(self, _server: SMTP, _session: Any, _envelope: Any) -> str:
        return self.mood.get('quit', '221 Bye')


def login(mood: Dict[str, Any]) -> Any:
    """Judges a login."""
    def judge(_server: SMTP, _session: Any, _envelope: Any, mechanism: str, data: Any) -> AuthResult:
        sent = [data.login.decode(), data.password.decode()]
        if sent == mood['login']:
            return AuthResult(success=True, auth_data=data)
        if mood.get('echo'):
            plain = '\0%s\0%s' % tuple(sent)
            return AuthResult(success=False, handled=False, message='535 5.7.8 I do not like %s nor %s' % (
                sent[1], base64.b64encode(plain.encode()).decode()))
        return AuthResult(success=False, handled=False)
    return judge


def protocol(handler: Handler, is_tls: bool) -> asyncio.Protocol:
    """What speaks on a new connection."""
    mood = handler.mood
    if 'greeting' in mood:
        return Rude(mood['greeting'])
    options = {}  # type: Dict[str, Any]
    if 'starttls' in mood:
        options.update(tls_context=TLS, require_starttls=mood['starttls'] == 'demanded')
    if 'login' in mood:
        options.update(authenticator=login(mood), auth_required=True, auth_require_tls='starttls' in mood)
    return SMTP(handler, hostname='mail.example.org', loop=asyncio.get_event_loop(), **options)


async def serve(handler: Handler) -> List[Any]:
    loop = asyncio.get_event_loop()
    servers = [await loop.create_server(lambda is_tls=is_tls: protocol(handler, is_tls), '127.0.0.1', 0,
                                        ssl=TLS if is_tls else None) for is_tls in (False, True)]
    print('ready %d %d' % tuple(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    return servers


def main() -> None:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.add_signal_handler(signal.SIGTERM, loop.stop)
    servers = loop.run_until_complete(serve(Handler(sys.argv[1])))
    loop.run_forever()
    del servers
    os._exit(0)


if __name__ == '__main__':
    main()
