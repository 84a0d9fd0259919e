"""The stand-in for the `xe` program: a thin client, as the real one is.

It takes the connection options out of its arguments, sends all the rest to the server, and does
what the server orders: print, fetch a URL into a file, send a file, ask, exit. Everything a
command means is decided by the server (cli.py); everything about files and connections is here.

Source of the facts: xapi v24.19.2, ocaml/xe-cli/newcli.ml, and what the real program printed.
It is started thousands of times, so it imports only what a Python has in it anyway: `_socket` and `_signal` are what the
modules socket and signal are made of, marshal is how it and its server (the same Python) write values, and annotations
name built-in types.
"""

import _signal
import _socket
import marshal
import os
import stat
import sys

USAGE = '''\
Usage: xe <cmd> [-s server] [-p port] ([-u username] [-pw password] or [-pwf <password file>]) \
[--traceparent traceparent] <other arguments>

A full list of commands can be obtained by running 
	xe help -s <server> -p <port>
'''
LOST = 'Lost connection to the server.'
UNREACHABLE = 'Unable to contact server. Please check server and port settings.'
LOCAL = '127.0.0.1'
BUFFER = 1024 * 1024

# Option -> name of its equal form and of the setting (newcli.ml parse_args).
VALUED = {'-s': 'server', '-h': 'server', '-p': 'port', '-u': 'username', '-pw': 'password',
          '-pwf': 'passwordfile', '--traceparent': 'traceparent'}
FLAGS = {'--nossl': 'nossl', '--debug': 'debug', '--debug-on-fail': 'debugonfail'}
EQUALS = {'server', 'port', 'username', 'password', 'passwordfile', 'nossl', 'debug',
          'debugonfail'}


class Exit(Exception):
    """The program is over with this exit status."""


class ClientFailure(Exception):
    """A file on this side cannot be used; ends the program."""


class UnknownHost(OSError):
    """There is no address for this host. Only without TLS is it told: else stunnel looks it up."""


class Usage(Exception):
    """The arguments make no sense: the usage text, exit status 0."""


class Place:
    """Where the server is: its host, and the ports that stand for 80 and 443."""

    def __init__(self, host: str, plain_port: int, tls_port: int) -> None:
        self.host, self.plain_port, self.tls_port = host, plain_port, tls_port


def complain(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(text + '\n')
    sys.stderr.flush()


# --- Arguments ----------------------------------------------------------------------------------

def take_options(arguments: list, settings: dict) -> list:
    """The arguments without the connection options, which go into `settings`."""
    rest = []
    words = iter(arguments)
    for word in words:
        name, equal, value = word.partition('=')
        if word in ('-help', '--help'):
            raise Usage()
        if word in VALUED:
            following = next(words, None)
            if following is None:
                rest.append(word)
            else:
                settings[VALUED[word]] = following
        elif word in FLAGS:
            settings[FLAGS[word]] = 'true'
        elif equal and name in EQUALS:
            settings[name] = value
        else:
            rest.append(word)
    return rest


def split_extra(text: str) -> list:
    """XE_EXTRA_ARGS: pieces between commas; a backslash takes the next character as it is."""
    pieces = ['']
    characters = iter(text)
    for character in characters:
        if character == '\\':
            pieces[-1] += next(characters, '')
        elif character == ',':
            pieces.append('')
        else:
            pieces[-1] += character
    return [piece for piece in pieces if piece]


def read_settings(arguments: list) -> tuple:
    """Settings by priority (command line, XE_EXTRA_ARGS, ~/.xe) and all other arguments."""
    settings = {}
    left_over = []
    home = os.environ.get('HOME')
    if home:
        try:
            with open(os.path.join(home, '.xe'), encoding='utf-8',
                      errors='surrogateescape') as file:
                left_over += take_options([line.strip() for line in file if line.strip()],
                                          settings)
        except OSError:
            pass
    left_over += take_options(split_extra(os.environ.get('XE_EXTRA_ARGS', '')), settings)
    return settings, take_options(arguments, settings) + left_over


def credentials(settings: dict) -> tuple:
    user, password = settings.get('username', 'root'), settings.get('password', 'null')
    name = settings.get('passwordfile')
    if name:
        try:
            with open(name, encoding='utf-8', errors='surrogateescape') as file:
                lines = file.read().split('\n')
        except OSError:
            complain("Error opening password file '%s'" % name)
            raise Exit(1)
        if len(lines) < 2 or (len(lines) == 2 and not lines[1]):
            complain('Error: password file format: expecting username on the first line, '
                     'password on the second line')
            raise Exit(1)
        user, password = lines[0], lines[1]
    return user, password


# --- Connections --------------------------------------------------------------------------------

def connect_tcp(host: str, port: int) -> _socket.socket:
    try:
        address = _socket.getaddrinfo(host, port, 0, _socket.SOCK_STREAM)[0]
    except (_socket.gaierror, UnicodeError):
        raise UnknownHost(host)
    connection = _socket.socket(*address[:3])
    try:
        connection.connect(address[4])
    except OSError:
        connection.close()
        raise
    return connection


def connect_tls(host: str, port: int) -> _socket.socket:
    """TLS as stunnel makes it for xe: the server's certificate is not looked at."""
    import socket
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    plain = socket.socket(fileno=connect_tcp(host, port).detach())
    try:
        return context.wrap_socket(plain)
    except OSError:
        plain.close()
        raise


class Program:
    """One run: where the server is, the command connection, what the arguments allow."""

    def __init__(self, arguments: list, socket_path: str, port: int) -> None:
        self.settings, self.arguments = read_settings(arguments)
        self.socket_path = socket_path
        self.server = self.settings.get('server', LOCAL)
        self.is_local = self.server == LOCAL
        self.is_plain = self.settings.get('nossl', 'false') == 'true'
        given = self.settings.get('port')
        if given is not None and not (given.isdigit() and int(given) <= 65535):
            complain('Port number must be an integer (0-65535)')
            raise Usage()
        # 80 and 443 mean the simulated pool's ports; any other port is taken as it is.
        is_default = given in (None, '80', '443') or (self.is_plain and given == str(port))
        chosen = None if is_default else int(given or 0)
        self.place = Place(self.server, chosen or port, chosen or port + 1)
        # The host whose unix socket this is tells its own address (the real one is 127.0.0.1).
        self.local_host = LOCAL

    def connect(self) -> _socket.socket:
        """The command connection: unix socket or TCP for this host, TLS for any other."""
        if self.is_local:
            connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
            try:
                connect_unix(connection, self.socket_path)
                return connection
            except OSError:
                connection.close()
            return connect_tcp(self.place.host, self.place.plain_port)
        if self.is_plain:
            try:
                return connect_tcp(self.place.host, self.place.plain_port)
            except UnknownHost as unknown:
                complain("No addrinfo found for host: %s, port: %sHost '%s' not found." % (
                    unknown, self.settings.get('port', '80'), unknown))
                raise Exit(1)
        try:
            return connect_tls(self.place.host, self.place.tls_port)
        except OSError:
            complain(UNREACHABLE)
            raise Exit(1)

    def connect_for(self, url: str) -> tuple:
        """A connection for bulk data, and the path: never the unix socket (newcli.ml)."""
        if url.startswith('https://'):
            host, _, path = url[len('https://'):].partition('/')
            return connect_tls(host, self.place.tls_port), '/' + path
        if self.is_local:
            return connect_tcp(self.local_host, self.place.plain_port), url
        if self.is_plain:
            return connect_tcp(self.place.host, self.place.plain_port), url
        return connect_tls(self.place.host, self.place.tls_port), url

    def assert_permitted(self, name: str) -> None:
        """A server may name only files that stand on the command line (newcli.ml, 6de8b68df4)."""
        values = [word.partition('=')[2] for word in self.arguments]
        if name and name not in values and name != os.getcwd():
            complain('File not permitted: Blocked upload/download of the file %s, which was '
                     'requested by the server. The file name was not present on the command '
                     'line\n.' % name)
            raise Exit(1)

    # --- Orders ---------------------------------------------------------------------------------

    def run(self) -> int:
        if self.arguments == ['-version']:
            sys.stdout.write('ThinCLI protocol: 0.2\n')
            return 0
        if not self.arguments:
            raise Usage()
        user, password = credentials(self.settings)
        connection = self.connect()
        body = marshal.dumps({'args': self.arguments, 'user': user, 'password': password,
                              'cwd': os.getcwd(), 'pid': os.getpid()})
        connection.sendall(b'POST /cli HTTP/1.0\r\ncontent-length: %d\r\n\r\n' % len(body) + body)
        answers = lines_of(connection)
        status = next(answers, b'')
        if not status.startswith(b'HTTP/1.'):
            complain(UNREACHABLE)
            return 1
        if status.split(b' ')[1:2] != [b'200']:
            complain('Server internal error.')
            return 1
        while next(answers, b'').strip():
            pass
        for line in answers:
            done = self.obey(marshal.loads(bytes.fromhex(line.decode('ascii'))), connection)
            if done is not None:
                return done
        complain(LOST)
        return 1

    def obey(self, order: dict, connection: _socket.socket) -> object:
        """Does one order; the exit status if it was the last."""
        if 'print' in order:
            sys.stdout.write(order['print'])
            sys.stdout.flush()
        elif 'stderr' in order:
            sys.stdout.flush()
            sys.stderr.write(order['stderr'])
            sys.stderr.flush()
        elif 'host' in order:
            self.local_host = order['host']
        elif 'exit' in order:
            return int(order['exit'])
        elif 'prompt' in order:
            line = sys.stdin.readline()
            if not line:
                complain(LOST)
                return 1
            answer(connection, {'ok': True, 'line': line.rstrip('\n')})
        elif 'get' in order or 'put' in order:
            self.assert_permitted(order['file'])
            try:
                if 'get' in order:
                    self.fetch(order['get'], order['file'])
                else:
                    self.send(order['put'], order['file'])
            except ClientFailure as failure:
                try:
                    answer(connection, {'ok': False})
                except OSError:
                    pass
                complain('Operation failed. Error: %s' % failure)
                return 1
            except (OSError, ValueError):
                answer(connection, {'ok': False})
            else:
                answer(connection, {'ok': True})
        return None

    def fetch(self, url: str, name: str) -> None:
        """The body of a GET to a file or, with no name, to stdout.

        The file is made only when the server has said 200: by then it has begun its work. What
        has arrived stays when the rest does not.
        """
        for _ in range(10):
            connection, path = self.connect_for(url)
            try:
                connection.sendall(('GET %s HTTP/1.0\r\n\r\n' % path).encode('utf-8'))
                status, headers, start = read_head(connection)
                if status == 200:
                    target = open_new(name)
                    try:
                        write_all(target, start)
                        copy_from(connection, target)
                    finally:
                        os.close(target)
                    return
                if status != 302:
                    raise ValueError('Unhandled response code %d' % status)
                url = headers['location']
            finally:
                connection.close()
        raise ValueError('too many redirects')

    def send(self, url: str, name: str) -> None:
        """A PUT with a file's content; its length is told only for a regular file."""
        if not os.path.exists(name):
            raise ClientFailure("file '%s' does not exist" % name)
        for _ in range(10):
            try:
                source = os.open(name, os.O_RDONLY)
            except OSError as error:
                raise ClientFailure('Unix.Unix_error(Unix.%s, "open", "%s")'
                                    % (errno_name(error), name))
            connection = None
            try:
                connection, path = self.connect_for(url)
                about = os.fstat(source)
                length = ('Content-length: %d\r\n' % about.st_size
                          if stat.S_ISREG(about.st_mode) else '')
                connection.sendall(('PUT %s HTTP/1.0\r\n%s\r\n' % (path, length)).encode('utf-8'))
                status, headers, _ = read_head(connection)
                if status == 200:
                    copy_to(source, connection)
                    return
                if status != 302:
                    raise ValueError('Unhandled response code %d' % status)
                url = headers['location']
            finally:
                os.close(source)
                if connection is not None:
                    connection.close()
        raise ValueError('too many redirects')


def connect_unix(connection: _socket.socket, path: str) -> None:
    """Connects to a socket whose path may be longer than the 107 bytes that an address holds."""
    encoded = os.fsencode(path)
    if len(encoded) < 108:
        connection.connect(encoded)
        return
    folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY | os.O_DIRECTORY)
    try:
        connection.connect(os.fsencode('/proc/self/fd/%d/%s' % (folder, os.path.basename(path))))
    finally:
        os.close(folder)


def lines_of(connection: _socket.socket) -> object:
    """All whole lines that come, until the other side closes."""
    received = b''
    while True:
        piece = connection.recv(65536)
        if not piece:
            return
        *lines, received = (received + piece).split(b'\n')
        yield from lines


def answer(connection: _socket.socket, message: dict) -> None:
    connection.sendall(marshal.dumps(message).hex().encode('ascii') + b'\n')


def errno_name(error: OSError) -> str:
    import errno
    return errno.errorcode.get(error.errno or 0, 'EUNKNOWNERR')


def open_new(name: str) -> int:
    """A descriptor of a new file, mode 0600, or of stdout; an existing file is never touched."""
    if not name:
        return os.dup(1)
    try:
        return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ClientFailure('Sys_error("%s: %s")' % (name, os.strerror(error.errno or 0)))


def read_head(connection: _socket.socket) -> tuple:
    """Status, headers (names in lower case), and what of the body came along."""
    received = b''
    while b'\r\n\r\n' not in received:
        piece = connection.recv(65536)
        if not piece:
            raise ValueError('no answer')
        received += piece
    head, _, start = received.partition(b'\r\n\r\n')
    lines = head.decode('utf-8', 'replace').split('\r\n')
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(':')
        headers[name.strip().lower()] = value.strip()
    return int(lines[0].split(' ')[1]), headers, start


def write_all(target: int, content: object) -> None:
    view = memoryview(content)
    while len(view):
        view = view[os.write(target, view):]


def copy_from(connection: _socket.socket, target: int) -> None:
    """All that is still to come: moved within the kernel into a pipe where this Python can, else in large pieces through one
    buffer."""
    if hasattr(os, 'splice') and type(connection) is _socket.socket and stat.S_ISFIFO(os.fstat(target).st_mode):
        while os.splice(connection.fileno(), target, BUFFER):
            pass
        return
    view = memoryview(bytearray(BUFFER))
    while True:
        count = connection.recv_into(view)
        if not count:
            return
        write_all(target, view[:count])


def copy_to(source: int, connection: _socket.socket) -> None:
    while True:
        piece = os.read(source, BUFFER)
        if not piece:
            return
        connection.sendall(piece)


def location_in_environment(socket_path: str, port: int) -> tuple:
    """The socket and the port of the host that VMBACKUP_POOL names; else those given.

    The real program finds these at fixed places of the host it runs on.
    """
    url, space, path = os.environ.get('VMBACKUP_POOL', '').partition(' ')
    tail = url.rstrip('/').rpartition(':')[2]
    return (path, int(tail)) if space and tail.isdigit() else (socket_path, port)


def utf8_stream(descriptor: int) -> object:
    """Text output in UTF-8 whatever the locale: the real program writes the bytes it gets."""
    return open(descriptor, 'w', encoding='utf-8', errors='surrogateescape', newline='\n',
                closefd=False)


def utf8_arguments(arguments: list) -> list:
    """Arguments as UTF-8 text also where the locale is ASCII."""
    return [os.fsencode(word).decode('utf-8', 'surrogateescape') for word in arguments]


def main(argv: list, socket_path: str, port: int) -> int:
    """Runs `xe` with these arguments (without the program's name); the exit status."""
    _signal.signal(_signal.SIGINT, lambda *_: os._exit(1))
    sys.stdout, sys.stderr = utf8_stream(1), utf8_stream(2)
    socket_path, port = location_in_environment(socket_path, port)
    try:
        status = Program(utf8_arguments(argv), socket_path, port).run()
    except Exit as end:
        status = end.args[0]
    except Usage:
        sys.stderr.write(USAGE)
        status = 0
    except ConnectionRefusedError:
        complain('Error: Connection refused (calling connect )')
        status = 1
    except BrokenPipeError:
        complain('Error: Broken pipe (calling single_write )')
        status = 1
    except ConnectionResetError:
        complain(LOST)
        status = 1
    except OSError as error:
        complain('Error: %s (calling connect )' % os.strerror(error.errno or 0))
        status = 1
    try:
        sys.stdout.flush()
    except OSError:
        pass
    sys.stderr.flush()
    return status
