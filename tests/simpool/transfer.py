"""The HTTP handlers that move data: exports, imports, the database dump.

Each host serves them on all its sockets. A handler authenticates, looks at what it is asked for,
says 200 as soon as nothing known speaks against it, and streams. What goes wrong afterwards can
only be told by the task, and by the text of an error page behind the data already sent.

Source of the facts: xapi v24.19.2, ocaml/xapi/export.ml, import.ml, export_raw_vdi.ml,
import_raw_vdi.ml, pool_db_backup.ml, xapi_http.ml; ocaml/libs/http-lib/http_svr.ml; and the
recorded answers of a real server.
"""

import base64
import html
import random
import re
import subprocess
import threading
import time
import xml.etree.ElementTree as ElementTree
import zlib
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Set, Tuple

import faults
import formats
import ova
import storage
from model import seconds_of
from schema import CLASSES, NULL, Failure, database_text, value_of_text

# Progress and cancellation of a real export are looked at every 10 s at most (stream_vdi.ml
# made_progress); a cancelled one was seen to end within about a second.
PROGRESS_EVERY_S = 10.0
CANCEL_EVERY_S = 0.5

AGENT = 'xapi/0.0'
SORRY = ('An unexpected error occurred; please wait a while and try again. If the problem persists, please contact your '
         'support representative.')
WRITE_ERROR = 'INTERNAL_ERROR: [ Unix.Unix_error(Unix.%s, "write", "") ]'

# (schema_major_vsn, schema_minor_vsn) of the database (recorded from xapi 24.19.2).
SCHEMA = ('5', '779')
# Tables of the real dump for which there is no class here.
OTHER_TABLES = ('Bond Certificate Cluster Cluster_host DR_task Diagnostics Feature GPU_group LVHD Observer PBD PCI PGPU PIF '
                'PIF_metrics PUSB PVS_cache_storage PVS_proxy PVS_server PVS_site Repository SDN_controller SM SR USB_group '
                'VBD VBD_metrics VDI VGPU VGPU_type VIF VIF_metrics VLAN VM VMPP VMSS VM_appliance VM_group '
                'VM_guest_metrics VM_metrics VTPM VUSB auth blob console crashdump data_source event host host_cpu '
                'host_crashdump host_metrics host_patch message network network_sriov pool pool_patch pool_update '
                'probe_result role secret session sr_stat subject task tunnel user vdi_nbd_server_info').split()
# Kept in memory only, or in files of their own: their tables are empty in a dump.
NOT_DUMPED = {'session', 'task', 'message', 'event'}


class Unauthorised(Exception):
    """No login, or a bad one."""


class EmptyReply(Exception):
    """The connection is closed without a status line."""


class ClientGone(Exception):
    """The client closed its end while data was being sent to it, or had not sent all.

    How that shows depends on how it went: EPIPE if it had closed its end before; ECONNRESET if it
    left data unread, as one does that meets a full disk, or was reset.
    """

    def __init__(self, error: Optional[Exception] = None) -> None:
        super().__init__()
        self.name = 'ECONNRESET' if isinstance(error, ConnectionResetError) else 'EPIPE'

    def as_failure(self) -> Failure:
        return Failure('CLIENT_ERROR', WRITE_ERROR % self.name)


class Attachment:
    """What an `xe` command wants of the transfer that it orders: its own faults, and a call when half is done."""

    def __init__(self, occasion: Any, halfway: Optional[Callable[[], None]] = None) -> None:
        self.occasion = occasion
        self.halfway = halfway
        #: bytes of data moved for the command
        self.bytes = 0


class Incoming(formats.Source):
    """What a client sends, as far as streams of faults let it through and as they change it."""

    def __init__(self, stream: Any, limit: Optional[int], makers: Iterable[Callable[[Callable[[Any], None]], Any]]) -> None:
        super().__init__(stream, limit)
        self._passed = []       # type: List[bytes]
        self._streams = []      # type: List[Any]
        for make in makers:
            self._streams.insert(0, make(self._streams[0] if self._streams else self._passed.append))
        self._ready = b''
        self._is_over = False

    def some(self, size: int) -> bytes:
        while size and not self._ready and not self._is_over:
            content = super().some(size)
            self._is_over = not content
            try:
                if content:
                    self._streams[0](content)
                else:
                    for stream in self._streams:
                        stream.end()
            except faults.SilentEnd:
                self._is_over = True
            self._ready = b''.join(self._passed)
            del self._passed[:]
        piece, self._ready = self._ready[:size], self._ready[size:]
        return piece


#: Task -> what the command that made the task attached to it.
ATTACHED = {}   # type: Dict[str, Attachment]


# --- Answers ------------------------------------------------------------------------------------

def page(status: str, body: str, extra: str = '') -> bytes:
    """A whole answer with an HTML page, as http_svr.ml makes them."""
    content = ('<html><body>%s</body></html>' % body).encode('utf-8')
    head = ('HTTP/1.0 %s\r\ncontent-length: %d\r\ncontent-type: text/html\r\nconnection: close\r\n'
            'cache-control: no-cache, no-store\r\n%s\r\n' % (status, len(content), extra))
    return head.encode('utf-8') + content


def internal_error(text: str) -> bytes:
    return page('500 Internal Error', '<h1>HTTP 500 internal server error</h1>%s<h1> Additional information </h1>%s'
                % (SORRY, html.escape(text)))


def unauthorised(action: str) -> bytes:
    return page('401 Unauthorised', '<h1>HTTP 401 unauthorised</h1>Please check your credentials and retry.',
                'WWW-Authenticate: Basic realm="%s"\r\n' % action)


def forbidden() -> bytes:
    return page('403 Forbidden', '<h1>HTTP 403 forbidden</h1>Access to the requested resource is forbidden.')


def bad_request() -> bytes:
    return page('400 Bad Request', '<h1>HTTP 400 bad request</h1>')


def head(status: str, *headers: str) -> bytes:
    lines = ('HTTP/' + status, 'Connection: close', 'Cache-Control: no-cache, no-store') + headers
    return ('\r\n'.join(lines) + '\r\n\r\n').encode('utf-8')


# --- One request --------------------------------------------------------------------------------

class Transfer:
    """One request to a data handler, from its login to the last byte."""

    def __init__(self, server: Any, request: Any, path: str, action: str) -> None:
        self.server = server
        self.pool = server.pool
        self.path = path
        self.request = request
        self.host = request.host_ref
        self.action = action
        self.session = NULL
        self.user = ''
        self._own_session = False
        self.occasion = None    # type: Any
        self._attached = []     # type: List[Attachment]
        self.entry = None       # type: Any
        self.sent = 0
        self.client_is_there = True

    # --- What is asked for ----------------------------------------------------------------------

    def parameter(self, name: str) -> Optional[str]:
        """A parameter that may come as a cookie or in the query, cookie first (xapi_http.ml)."""
        return self.request.cookies.get(name, self.request.query.get(name))

    def flag(self, name: str) -> bool:
        """An import's switch: on only for the word `true`."""
        return self.request.query.get(name) == 'true'

    def boolean(self, name: str, default: bool) -> bool:
        """An export's switch; OCaml's bool_of_string takes nothing but true and false."""
        value = self.parameter(name)
        if value is None:
            return default
        if value not in ('true', 'false'):
            raise Failure('INTERNAL_ERROR', 'Invalid_argument("bool_of_string")')
        return value == 'true'

    def authenticate(self) -> None:
        """Unix socket, session_id, HTTP Basic, in this order (xapi_http.ml assert_credentials_ok)."""
        with self.pool.lock:
            if self.request.is_unix:
                self.user = 'root'
                return
            session = self.parameter('session_id')
            if session is not None:
                try:
                    self.user = self.pool.resolve_session(session)['auth_user_name']
                except Failure:
                    raise Unauthorised()
                self.session = session
                return
            kind, _, coded = self.request.headers.get('authorization', '').partition(' ')
            if kind.lower() != 'basic':
                raise Unauthorised()
            try:
                user, _, password = base64.b64decode(coded).decode('utf-8', 'replace').partition(':')
                self.session = self.pool.login_with_password(self.host, user, password)
                self.server.journal.name_session(self.session)
            except (ValueError, Failure):
                raise Unauthorised()
            self.user = user
            self._own_session = True

    def is_difference(self) -> bool:
        """Whether an export of a difference is asked for. A tar knows none (export_raw_vdi.ml, v24.19.2)."""
        return self.path == '/export_raw_vdi' and self.parameter('base') is not None and self.parameter('format') != 'tar'

    def describe(self, ref: Optional[str] = None) -> None:
        """Says what the request is about: now its faults are known."""
        names = self.pool.names_of(ref) if ref else []
        self.occasion = self.server.faults.at('http', self.entry.call, names, self.entry, is_difference=self.is_difference())
        self._attached = [Attachment(self.occasion)]
        own = ATTACHED.get(self.parameter('task_id') or '')
        if own is not None:
            self._attached.append(own)

    # --- The task -------------------------------------------------------------------------------

    @contextmanager
    def task(self, label: str) -> Iterator[str]:
        """The task that stands for the work: the client's, or one that is gone afterwards.

        It turns final before an error is written to the client, and after the last byte of a
        success (xapi_http.ml with_context).
        """
        given = self.parameter('task_id')
        if given is not None:
            with self.pool.lock:
                self.pool.record('task', given)
            task = given
        else:
            task = self.pool.create_task(label, host=self.host)
        self.result = ''
        try:
            yield task
        except Failure as failure:
            self.pool.fail_task(task, failure)
            raise
        except EmptyReply:
            raise
        except faults.Drop:
            # A lost connection looks to the server like a client that is gone.
            self.pool.fail_task(task, ClientGone().as_failure())
            raise
        except Exception as error:
            failure = Failure('INTERNAL_ERROR', '%s(%s)' % (type(error).__name__, error))
            self.pool.fail_task(task, failure)
            raise failure
        else:
            self.pool.finish_task(task, self.result)
            self.occasion.after()
        finally:
            if given is None:
                with self.pool.lock:
                    if self.pool.exists('task', task):
                        self.pool.destroy_row('task', task)

    def progress(self, task: str, total: int, begin: float = 0.0) -> Callable[[int], None]:
        """A function to be told of bytes done: keeps the task's progress, and raises when it is cancelled."""
        total_mib = max(1, total // formats.MIB)
        state = {'done': 0, 'told': -PROGRESS_EVERY_S - 1, 'looked': time.monotonic(), 'half': False}

        def advance(count: int) -> None:
            now = time.monotonic()
            state['done'] += count
            if not state['half'] and state['done'] * 2 >= total:
                state['half'] = True
                for attachment in self._attached:
                    if attachment.halfway is not None:
                        attachment.halfway()
            if now - state['told'] > PROGRESS_EVERY_S:
                state['told'] = now
                self.pool.set_progress(task, min(1.0, (state['done'] // formats.MIB) / total_mib))
            if now - state['looked'] > CANCEL_EVERY_S:
                state['looked'] = now
                if self.pool.task_is_cancelled(task):
                    raise Failure('TASK_CANCELLED', task)
        return advance

    # --- Bytes ----------------------------------------------------------------------------------

    def send(self, content: Any) -> None:
        """Sends to the client; ClientGone when it is not there any more."""
        if not self.client_is_there:
            raise ClientGone()
        try:
            self.request.sock.sendall(content)
        except (OSError, ValueError) as error:
            self.client_is_there = False
            raise ClientGone(error)

    def _send_counted(self, content: Any) -> None:
        self.send(content)
        self.sent += len(content)

    def stream(self, pieces: Iterable[bytes], algorithm: Optional[str] = None) -> None:
        """Sends the body, compressed or not, through the faults that apply to it.

        A fault that breaks a compressed export off acts before the compressor, as a disk that
        gives out does; all others act on what is sent.
        """
        if algorithm is not None:
            for one in self._attached:
                pieces = broken_off(one.occasion.stream_inside, pieces)
            pieces = compressed(pieces, algorithm)
        streams = []        # type: List[Any]
        send = self._send_counted       # type: Callable[[Any], None]
        for one in self._attached:
            send = (one.occasion.stream_outside if algorithm else one.occasion.stream)(send)
            streams.insert(0, send)
        try:
            for piece in pieces:
                send(piece)
            for stream in streams:
                stream.end()
        except faults.SilentEnd:
            pass

    def lies(self) -> Tuple[Set[int], bool, Optional[str]]:
        """What faults make of a difference: which blocks are missing, whether it is a full, which disk's it is."""
        occasions = [one.occasion for one in self._attached]
        return (set().union(*(occasion.omitted for occasion in occasions)), any(occasion.full for occasion in occasions),
                next((occasion.other for occasion in occasions if occasion.other is not None), None))

    def has_keepalive(self) -> bool:
        return any(one.occasion.keepalive for one in self._attached)

    def body(self) -> formats.Source:
        """What the client sends, through the faults that apply to it. Ask for it once the faults are known."""
        length = self.request.headers.get('content-length')
        limit = int(length) if length and length.isdigit() else None
        bending = [one.occasion.stream for one in self._attached if one.occasion.bends_streams]
        return Incoming(self.request.rfile, limit, bending) if bending else formats.Source(self.request.rfile, limit)

    # --- Running --------------------------------------------------------------------------------

    def run(self, handler: Callable[['Transfer'], None]) -> None:
        """Does the request, and answers whatever comes of it."""
        with self.pool.lock:
            host = self.pool.record('host', self.host)['name_label']
        self.entry = self.server.journal.entry('http', self.path, [self.request.method, dict(self.request.query)], host, '')
        try:
            try:
                self.authenticate()
                self.entry.user = self.user
                handler(self)
                self.entry.result = 'ok'
            except Unauthorised:
                self.entry.result = ['SESSION_INVALID']
                self.send(unauthorised(self.action))
            except Failure as failure:
                self.entry.result = failure.description()
                if self.client_is_there:
                    self.send(internal_error(getattr(failure, 'page_text', str(failure))))
            except EmptyReply as reply:
                self.entry.result = list(reply.args[0]) if reply.args else ['EMPTY_REPLY']
        except ClientGone:
            self.entry.result = ['CLIENT_GONE']
        except faults.Drop:
            self.entry.result = 'no answer'
            raise
        finally:
            self.entry.bytes = self.sent
            for one in self._attached:
                one.bytes += self.sent
            self.entry.close()
            if self._own_session:
                with self.pool.lock:
                    self.pool.logout(self.session)

    def redirect_unless_seen(self, srs: List[str]) -> bool:
        """Answers 302 to a host that sees all these SRs, if this one does not; whether it did.

        The task is not touched, and the Location has no port: clients use that of https. Without
        such a host NO_HOSTS_AVAILABLE is raised, outside of the task: it stays pending for ever
        unless the handler fails it, and `xe` waits for it without a word (import.ml handler,
        export_raw_vdi.ml, v24.19.2; tried with an import into an unplugged SR, for ten minutes).
        """
        with self.pool.lock:
            if self.pool.sees_all(self.host, srs) and self.pool.is_live(self.host):
                return False
            hosts = self.pool.hosts_that_see(srs)
            if not hosts:
                raise Failure('NO_HOSTS_AVAILABLE')
            address = self.pool.record('host', random.choice(hosts))['address']
        query = '&'.join('%s=%s' % pair for pair in self.request.query.items())
        self.send(head('1.1 302 Found', 'Location: https://%s%s?%s' % (address, self.request.path, query)))
        return True

    def fail_given_task(self, failure: Failure) -> None:
        task = self.parameter('task_id')
        if task is not None:
            self.pool.fail_task(task, failure)


def bare(text: str, failure: Optional[Failure] = None) -> Failure:
    """An exception that is no API failure: the page shows its text alone, the task INTERNAL_ERROR, or that failure."""
    failure = failure or Failure('INTERNAL_ERROR', text)
    failure.page_text = text    # type: ignore
    return failure


# --- Compression --------------------------------------------------------------------------------

def compressed(pieces: Iterable[bytes], algorithm: Optional[str]) -> Iterator[bytes]:
    """The stream as gzip or zstd. When the pieces break off, what came of them is ended properly first.

    So a failed compressed export is a whole compressed stream that holds half a tar
    (xapi_compression.ml go: the compressor just sees the end of its input).
    """
    if algorithm == 'gzip':
        return _gzipped(pieces)
    if algorithm == 'zstd':
        return _zstandard(pieces)
    return iter(pieces)


def _gzipped(pieces: Iterable[bytes]) -> Iterator[bytes]:
    zipper = zlib.compressobj(6, zlib.DEFLATED, 31)
    failure = None      # type: Optional[Exception]
    try:
        for piece in pieces:
            content = zipper.compress(piece)
            if content:
                yield content
    except Exception as error:
        failure = error
    yield zipper.flush()
    if failure is not None:
        raise failure


def _zstandard(pieces: Iterable[bytes]) -> Iterator[bytes]:
    program = subprocess.Popen(['zstd', '-cq'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    failures = []       # type: List[Exception]

    def feed() -> None:
        try:
            for piece in pieces:
                program.stdin.write(piece)
        except Exception as error:
            failures.append(error)
        finally:
            try:
                program.stdin.close()
            except OSError:
                pass
    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    try:
        while True:
            content = program.stdout.read1(formats.MIB)
            if not content:
                break
            yield content
    finally:
        # Also when the client is gone: the feeder then meets a broken pipe and ends.
        program.stdout.close()
        program.kill()
        program.wait()
        feeder.join()
    if failures:
        raise failures[0]


def broken_off(make_stream: Callable[[Callable[[Any], None]], Any], pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces as far as a stream of faults lets them through; its failure comes behind the last one."""
    passed = []     # type: List[bytes]
    stream = make_stream(passed.append)
    for piece in pieces:
        try:
            stream(piece)
        except Failure:
            for one in passed:
                yield one
            raise
        for one in passed:
            yield one
        del passed[:]


# --- Exports ------------------------------------------------------------------------------------

def vm_asked_for(transfer: Transfer) -> str:
    """The VM of `ref` (not checked, as there) or `uuid`."""
    query = transfer.request.query
    if 'ref' in query:
        return query['ref']
    if 'uuid' not in query:
        raise bare('Not_found')
    return transfer.pool.ref_of('VM', query['uuid'])


def export(transfer: Transfer) -> None:
    """GET /export: the VM as an XVA."""
    pool = transfer.pool
    with pool.lock:
        vm = vm_asked_for(transfer)
        transfer.describe(vm)
    algorithm = {'true': 'gzip', 'gzip': 'gzip', 'zstd': 'zstd'}.get(transfer.request.query.get('use_compression', ''))
    if algorithm == 'zstd' and not pool.has_zstd():
        algorithm = None
    with pool.lock:
        if not pool.exists('VM', vm):
            transfer.fail_given_task(Failure('NO_HOSTS_AVAILABLE'))
            raise EmptyReply(['NO_HOSTS_AVAILABLE'])
        srs = pool.srs_of_vm(vm)
    try:
        if transfer.redirect_unless_seen(srs):
            return
    except Failure as failure:
        # of all handlers this one takes the task for its own, and the client gets nothing at all (export.ml handler)
        transfer.fail_given_task(failure)
        raise EmptyReply(failure.description())
    with transfer.task('VM.export') as task:
        # Tells the command line's side that the handler has taken over (export.ml handler).
        pool.set_progress(task, 0.0)
        keep_power_state = transfer.boolean('preserve_power_state', False)
        transfer.occasion.before()
        with pool.operation('VM', vm, 'export', task):
            transfer.send(head('1.0 200 OK', 'task-id: ' + task, 'Server: ' + AGENT, 'content-type: application/octet-stream',
                               'Content-Disposition: attachment; filename="export.xva"'))
            with pool.lock:
                content = ova.Export(pool, [vm], False, keep_power_state)
                ova_xml = content.document()
                disks = content.disks(vm)
                total = sum(pool.disk(vdi).size for _, vdi in disks if not pool.record('VDI', vdi)['missing'])
            pool.set_cancellable(task)
            pieces = formats.xva(ova_xml, [(ident, opener(transfer, vdi, task)) for ident, vdi in disks],
                                 pool.block_digest(), int(time.time()), transfer.progress(task, total),
                                 transfer.has_keepalive())
            try:
                transfer.stream(pieces, algorithm)
            except ClientGone as gone:
                raise gone.as_failure()


def opener(transfer: Transfer, vdi: str, task: str) -> Callable[[], Any]:
    """A function that attaches the disk to the control domain and gives its contents, as a context manager."""
    @contextmanager
    def opened() -> Iterator[Any]:
        with transfer.pool.attach_to_dom0(vdi, transfer.host, 'RO', task):
            yield transfer.pool.disk(vdi)
    return opened


def export_metadata(transfer: Transfer) -> None:
    """GET /export_metadata: ova.xml of one VM, or of all, and no disks."""
    pool = transfer.pool
    with pool.lock:
        every = transfer.request.query.get('all') == 'true'
        vm = None if every else vm_asked_for(transfer)
        transfer.describe(vm)
    with transfer.task('VM.export_metadata') as task:
        transfer.boolean('all', False)
        with_snapshots = transfer.boolean('export_snapshots', True)
        with_dom0 = transfer.boolean('include_dom0', True)
        transfer.occasion.before()
        with pool.lock:
            if every:
                vms = [ref for ref, record in pool.tables['VM'].items() if not record['is_default_template']
                       and (with_dom0 or not record['is_control_domain'])]
            else:
                if pool.record('VM', vm)['is_a_snapshot']:
                    raise Failure('OPERATION_NOT_ALLOWED', 'Exporting metadata of a snapshot is not allowed')
                vms = [vm]
            for ref in vms:
                pool.assert_allowed('VM', ref, 'metadata_export')
            ova_xml = ova.Export(pool, vms, with_snapshots, True).document()
        pool.set_progress(task, 0.0)
        content = b''.join(formats.xva(ova_xml, [], pool.block_digest(), int(time.time())))
        transfer.send(head('1.0 200 OK', 'task-id: ' + task, 'Server: ' + AGENT, 'content-type: application/octet-stream',
                           'Content-Length: %d' % len(content), 'Content-Disposition: attachment; filename="export.xva"'))
        half = len(content) // 2
        advance = transfer.progress(task, len(content))
        try:
            transfer.stream(_with_progress([content[:half], content[half:]], advance))
        except ClientGone as gone:
            raise gone.as_failure()


def _with_progress(pieces: Iterable[bytes], advance: Callable[[int], None]) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        advance(len(piece))


RAW_FORMATS = {'raw': 'application/octet-stream', 'vhd': 'application/vhd', 'tar': 'application/x-tar'}


def vdi_asked_for(transfer: Transfer, name: str = 'vdi') -> str:
    """The VDI of a parameter that holds a reference or a uuid."""
    given = transfer.parameter(name)
    if given is None:
        raise Failure('VDI_MISSING')
    try:
        return transfer.pool.find('VDI', given)
    except Failure:
        # exnHelper.ml error_of_exn, v24.19.2; recorded with an export whose base is not there
        raise bare('Db_exn.Read_missing_uuid("VDI", "", "%s")' % given, Failure('UUID_INVALID', 'VDI', given))


def vdi_if_known(transfer: Transfer) -> Optional[str]:
    """The same, or None for one that does not exist: where that matters is decided later."""
    try:
        return vdi_asked_for(transfer)
    except Failure:
        return None


def assert_format(transfer: Transfer, task: str) -> str:
    """The format asked for; an unknown one fails the task, and the client gets 404."""
    chosen = transfer.parameter('format') or 'raw'
    if chosen not in RAW_FORMATS or (chosen == 'tar' and not transfer.pool.has_tar_export()):
        refuse(transfer, task, '404 Not Found', 'Unknown format ' + chosen)
    return chosen


def refuse(transfer: Transfer, task: str, status: str, reason: str) -> None:
    """The task fails, and the client gets a status and no page (import_raw_vdi.ml HandleError)."""
    failure = Failure('INTERNAL_ERROR', reason)
    transfer.pool.fail_task(task, failure)
    transfer.send(head('1.0 ' + status))
    raise EmptyReply(failure.description())


def export_raw_vdi(transfer: Transfer) -> None:
    """GET /export_raw_vdi: one disk as raw, vhd or tar, or what of it differs from another one, `base`."""
    pool = transfer.pool
    with pool.lock:
        vdi = vdi_if_known(transfer)
        transfer.describe(vdi)
        srs = [pool.record('VDI', vdi)['SR']] if vdi else []
    if transfer.redirect_unless_seen(srs):
        return
    with transfer.task('VDI.export_raw') as task:
        pool.set_progress(task, 0.0)
        with pool.lock:
            vdi = vdi_asked_for(transfer)
            uuid = pool.record('VDI', vdi)['uuid']
            chosen = assert_format(transfer, task)
        transfer.occasion.before(sleeps=False)
        answer = head('1.1 200 OK', 'task-id:' + task, 'content-type:' + RAW_FORMATS[chosen],
                      'content-disposition: attachment; filename="%s.%s"' % (uuid, chosen))
        # 1.160 and later answer before they attach the disk: "in use" then comes behind a 200.
        if pool.version >= (1, 160):
            transfer.send(answer)
        with pool.attach_to_dom0(vdi, transfer.host, 'RO', task), base_attached(transfer, task) as base:
            if pool.version < (1, 160):
                transfer.send(answer)
            pool.set_cancellable(task)
            transfer.occasion.pause()
            disk = pool.disk(vdi)
            try:
                transfer.stream(_disk_pieces(transfer, chosen, vdi, base, transfer.progress(task, disk.size)))
            except ClientGone:
                raise Failure('VDI_IO_ERROR', 'Device I/O errors')


@contextmanager
def base_attached(transfer: Transfer, task: str) -> Iterator[Optional[str]]:
    """The disk of `base`, attached to the control domain too; None if no difference is asked for.

    It is looked for when the disk itself is attached (export_raw_vdi.ml localhost_handler, v24.19.2).
    """
    if not transfer.is_difference():
        yield None
        return
    with transfer.pool.lock:
        base = vdi_asked_for(transfer, 'base')
    with transfer.pool.attach_to_dom0(base, transfer.host, 'RO', task):
        yield base


def _disk_pieces(transfer: Transfer, chosen: str, vdi: str, base: Optional[str], advance: Callable[[int], None]
                 ) -> Iterator[bytes]:
    pool = transfer.pool
    disk = pool.disk(vdi)
    if chosen == 'tar':
        return formats.disk_tar(disk, pool.block_digest(), advance, transfer.has_keepalive())
    if chosen == 'vhd' and disk.size > formats.VHD_LARGEST:
        raise Failure('VDI_TOO_LARGE', vdi, str(formats.VHD_LARGEST))
    is_vhd = pool.is_vhd(vdi)
    if base is not None:
        # vhd_tool_wrapper.ml send, v1.249.29 and v24.19.2
        if not is_vhd and pool.refuses_differences_of_no_vhd():
            raise bare('Failure("Cannot compute differences on non-VHD images")')
        if not pool.is_vhd(base):
            raise bare('Failure("base VDI is not a vhd; cannot compute differences")')
    changed = None
    if base is not None and is_vhd:
        omitted, is_full, other = transfer.lies()
        if other is not None:
            disk, base = pool.difference_of(other, base)
        if not is_full:
            changed = [block for number, block in enumerate(disk.changed_blocks(pool.disk(base)), 1) if number not in omitted]
    if chosen == 'raw':
        return formats.raw(disk, advance, changed)
    if changed is not None:
        return formats.vhd(disk, advance, changed, parent_of_difference(pool, base))
    if is_vhd:
        return formats.vhd(disk, advance, formats.vhd_blocks(disk))
    # What is no VHD is read as a device: in whole blocks, and all of them.
    entries = formats.vhd_entries(disk.size)
    blocks = formats.vhd_blocks(disk, with_zeros=False) if pool.leaves_zeros_out() else range(entries)
    return formats.vhd(disk, advance, blocks, size=entries * formats.VHD_BLOCK)


def parent_of_difference(pool: Any, base: Optional[str]) -> formats.Parent:
    """What a difference says of its base: the VHD that the storage manager keeps it in (sm, lvutil.py and SR.py)."""
    with pool.lock:
        record = pool.record('VDI', base)
        sr = pool.record('SR', record['SR'])
        if sr['type'] in storage.THICK_TYPES:
            path = '/dev/VG_XenStorage-%s/VHD-%s' % (sr['uuid'], record['uuid'])
        else:
            path = '/run/sr-mount/%s/%s.vhd' % (sr['uuid'], record['uuid'])
        modified = seconds_of(record['snapshot_time']) if record['is_a_snapshot'] else time.time()
        return formats.Parent(formats.vhd_uuid_of(record['uuid']), int(modified), path)


# --- Imports ------------------------------------------------------------------------------------

def sr_asked_for(transfer: Transfer) -> str:
    """The SR of sr_id or sr_uuid, else the pool's default."""
    pool = transfer.pool
    ref, uuid = transfer.parameter('sr_id'), transfer.parameter('sr_uuid')
    if ref is not None:
        pool.record('SR', ref)
        return ref
    if uuid is not None:
        return pool.ref_of('SR', uuid)
    default = pool.pool_record()['default_SR']
    if default not in pool.tables['SR']:
        raise Failure('DEFAULT_SR_NOT_FOUND', default)
    return default


def refuse_chunked(transfer: Transfer) -> None:
    if 'transfer-encoding' in transfer.request.headers:
        failure = Failure('IMPORT_ERROR_CANNOT_HANDLE_CHUNKED')
        transfer.fail_given_task(failure)
        transfer.send(forbidden())
        raise EmptyReply(failure.description())


def as_import_failure(error: Exception) -> Failure:
    """What the importer's own exceptions are on the wire (import.ml, the end of handler)."""
    if isinstance(error, formats.PrematureEnd):
        return Failure('IMPORT_ERROR_PREMATURE_EOF')
    if isinstance(error, formats.UnexpectedFile):
        return Failure('IMPORT_ERROR_UNEXPECTED_FILE', *error.args)
    if isinstance(error, (formats.BadArchive, formats.BadXml)):
        return Failure('IMPORT_ERROR', 'INTERNAL_ERROR: [ %s ]' % error)
    if isinstance(error, (KeyError, TypeError, AttributeError)):
        # A record that lacks a field, or has one of another type: ocaml-rpc cannot read it.
        return Failure('IMPORT_ERROR', 'INTERNAL_ERROR: [ Rpc.Runtime_error("%s") ]' % error)
    raise error


def refs_as_xml(refs: List[str]) -> str:
    return formats.xml_value(refs)


def import_xva(transfer: Transfer) -> None:
    """PUT /import: an XVA becomes a VM with new disks, all of them in one SR."""
    pool = transfer.pool
    with pool.lock:
        transfer.describe()
    refuse_chunked(transfer)
    with pool.lock:
        sr = sr_asked_for(transfer)
        if pool.record('SR', sr)['content_type'] == 'iso':
            failure = Failure('SR_OPERATION_NOT_SUPPORTED', sr)
            transfer.fail_given_task(failure)
            transfer.send(bad_request())
            raise EmptyReply(failure.description())
    if transfer.redirect_unless_seen([sr]):
        return
    with transfer.task('VM.import') as task:
        pool.set_progress(task, 0.0)
        transfer.occasion.before()
        transfer.send(head('1.1 200 OK'))
        source = transfer.body()
        try:
            ova_xml, tar = formats.open_archive(source)
        except (OSError, formats.PrematureEnd, formats.BadArchive, formats.UnexpectedFile) as error:
            raise as_import_failure(formats.PrematureEnd() if isinstance(error, OSError) else error)
        making = None       # type: Optional[ova.Import]
        try:
            version, objects = formats.read_ova(ova_xml)
            with pool.lock:
                ova.assert_compatible(pool, version)
                making = ova.Import(pool, objects, task, sr, transfer.flag('restore'), transfer.flag('force'))
                making.create()
            receive_disks(transfer, tar, making, task)
        except Exception as error:
            if making is not None:
                drop_operation(pool, making, task)
                making.roll_back()
            if isinstance(error, Failure):
                raise
            raise as_import_failure(formats.PrematureEnd() if isinstance(error, OSError) else error)
        finally:
            transfer.sent += source.count
            tar.source.close()
        drop_operation(pool, making, task)
        transfer.result = refs_as_xml(making.result())


def receive_disks(transfer: Transfer, tar: formats.TarReader, making: 'ova.Import', task: str) -> None:
    """Reads the members of all disks, in the order in which an exporter writes them."""
    pool = transfer.pool
    pool.set_cancellable(task)
    advance = transfer.progress(task, sum(size for _, size, _ in making.disks))
    for ident, size, vdi in sorted(making.disks):
        with pool.attach_to_dom0(vdi, transfer.host, 'RW', task):
            formats.receive_disk(tar, ident, size, pool.disk(vdi), making.force, advance)


def drop_operation(pool: Any, making: 'ova.Import', task: str) -> None:
    with pool.lock:
        for vm in making.vms:
            if pool.exists('VM', vm):
                pool.drop_key('VM', vm, 'current_operations', task)
                pool.update_allowed_operations('VM', vm)


def import_metadata(transfer: Transfer) -> None:
    """PUT /import_metadata: records only, for disks that the pool has."""
    pool = transfer.pool
    with pool.lock:
        transfer.describe()
    refuse_chunked(transfer)
    with transfer.task('VM.metadata_import') as task:
        pool.set_progress(task, 0.0)
        transfer.occasion.before()
        transfer.send(head('1.1 200 OK'))
        source = transfer.body()
        vdi_map = {key[len('vdi:'):]: value for key, value in transfer.request.query.items() if key.startswith('vdi:')}
        making = None       # type: Optional[ova.Import]
        try:
            ova_xml, tar = formats.open_archive(source)
            tar.source.exactly(len(formats.END_OF_TAR))     # unlike /import it wants to see the end
            version, objects = formats.read_ova(ova_xml)
            with pool.lock:
                ova.assert_compatible(pool, version)
                making = ova.Import(pool, objects, task, None, transfer.flag('restore'), transfer.flag('force'), vdi_map)
                if transfer.flag('dry_run'):
                    making.check()
                else:
                    making.create()
        except Exception as error:
            if making is not None:
                with pool.lock:
                    making.roll_back()
            if isinstance(error, Failure):
                raise
            raise as_import_failure(formats.PrematureEnd() if isinstance(error, OSError) else error)
        finally:
            transfer.sent += source.count
        transfer.result = refs_as_xml(making.result())


def import_raw_vdi(transfer: Transfer) -> None:
    """PUT /import_raw_vdi: bytes into an existing VDI, or, raw and with a length, into a new one."""
    pool = transfer.pool
    with pool.lock:
        named = transfer.parameter('vdi')
        transfer.describe(vdi_if_known(transfer))
    length = transfer.request.headers.get('content-length')
    with pool.lock:
        makes_disk = named is None and (transfer.parameter('sr_id') or transfer.parameter('sr_uuid'))
        if makes_disk:
            srs = [sr_asked_for(transfer)]
        elif named is None:
            transfer.fail_given_task(Failure('VDI_MISSING'))
            transfer.send(bad_request())
            raise EmptyReply(['VDI_MISSING'])
        else:
            vdi = vdi_if_known(transfer)
            srs = [pool.record('VDI', vdi)['SR']] if vdi else []
    try:
        if transfer.redirect_unless_seen(srs):
            return
    except Failure as failure:
        # import_raw_vdi.ml fail_task_in_request: the task fails, and two answers come, one behind the other
        transfer.fail_given_task(failure)
        transfer.send(bad_request())
        raise
    with transfer.task('VDI.import') as task:
        pool.set_progress(task, 0.0)
        chosen = assert_format(transfer, task)
        encoding = transfer.request.headers.get('transfer-encoding')
        if encoding is not None:
            # tried on a real server: 404, and the connection is reset
            refuse(transfer, task, '404 Not Found', 'Cannot handle encoding: ' + encoding)
        if makes_disk and (chosen != 'raw' or not length or not length.isdigit()):
            refuse(transfer, task, '400 Bad Request', 'Importing a VHD directly into an SR not yet supported'
                   if chosen == 'vhd' else 'Not enough info supplied to import')
        transfer.occasion.before()
        if makes_disk:
            vdi = pool.vdi_create({'SR': srs[0], 'virtual_size': length, 'type': 'user', 'sharable': False,
                                   'read_only': False, 'other_config': {}, 'name_label': 'Imported VDI',
                                   'name_description': ''})
        else:
            with pool.lock:
                vdi = vdi_asked_for(transfer)
        source = transfer.body()
        try:
            with pool.attach_to_dom0(vdi, transfer.host, 'RW', task):
                transfer.send(head('1.1 200 OK', 'task-id:' + task))
                pool.set_cancellable(task)
                with pool.lock:
                    must_zero = pool.record('SR', pool.record('VDI', vdi)['SR'])['uuid'] in pool.storage.must_zero
                receive_into(transfer, chosen, source, pool.disk(vdi), length, task, must_zero)
        finally:
            transfer.sent += source.count
        transfer.result = '<value>%s</value>' % vdi


def receive_into(transfer: Transfer, chosen: str, source: formats.Source, disk: Any, length: Optional[str], task: str,
                 must_zero: bool) -> None:
    """Writes what comes, in the given format, to the disk; any trouble is VDI_IO_ERROR (vhd-tool serve).

    What comes is never looked at for being something else: a VHD that is announced as raw is
    written as it is, and the disk then holds footer, table and blocks where it should hold a
    file system; exit 0 (tried on a real server).
    """
    advance = transfer.progress(task, disk.size)
    try:
        if chosen == 'raw':
            receive_raw(source, disk, int(length) if length and length.isdigit() else disk.size, advance)
        elif chosen == 'vhd':
            if must_zero:
                raise formats.BadVhd('unimplemented: prezeroed')        # impl.ml serve_vhd_to_raw, v24.19.2
            formats.receive_vhd(source, disk, advance, int(length) if length and length.isdigit() else None)
            if not length:
                # Seen on the real server: from a pipe, so without a length, the blocks are written
                # and the import fails all the same.
                raise formats.BadVhd('no length')
        else:
            formats.receive_disk(formats.TarReader(source), 'vdi', disk.size, disk, False, advance)
    except formats.BadArchive as error:
        raise Failure('INTERNAL_ERROR', str(error))
    except (formats.BadVhd, formats.PrematureEnd, OSError, ValueError):
        raise Failure('VDI_IO_ERROR', 'Device I/O errors')


def receive_raw(source: formats.Source, disk: Any, size: int, advance: Callable[[int], None]) -> None:
    """Exactly `size` bytes; fewer than the disk's size leave the rest as it was, more do not fit."""
    done = 0
    while done < size:
        content = source.exactly(min(formats.MIB, size - done))
        disk.write(done, content)
        done += len(content)
        advance(len(content))


# --- The database -------------------------------------------------------------------------------

def dump_database(transfer: Transfer) -> None:
    """GET /pool/xmldbdump: every table as XML; only the master has the database in memory."""
    pool = transfer.pool
    with pool.lock:
        transfer.describe()
    with transfer.task('Dumping database as XML') as task:
        pool.set_progress(task, 0.0)
        transfer.occasion.before()
        transfer.send(head('1.1 200 OK'))
        if not pool.is_master(transfer.host):
            raise Failure('INTERNAL_ERROR', 'Db_exn.Database_not_in_memory')
        with pool.lock:
            content = database_xml(pool).encode('utf-8')
        half = len(content) // 2
        try:
            transfer.stream(_with_progress([content[:half], content[half:]], transfer.progress(task, len(content))))
        except ClientGone as gone:
            raise gone.as_failure()


def database_xml(pool: Any) -> str:
    """The dump (db_xml.ml): tables and rows in the order of their names, white space as %. %n %t %r."""
    parts = ['<?xml version="1.0" encoding="UTF-8"?>\n<database><manifest>']
    for name, value in (('schema_major_vsn', SCHEMA[0]), ('schema_minor_vsn', SCHEMA[1]),
                        ('generation_count', str(pool.generation))):
        parts.append('<pair key="%s" value="%s"/>' % (name, value))
    parts.append('</manifest>')
    for table in sorted(set(OTHER_TABLES) | set(CLASSES)):
        rows = pool.tables.get(table, {}) if table not in NOT_DUMPED else {}
        if not rows:
            parts.append('<table name="%s"/>' % table)
            continue
        parts.append('<table name="%s">' % table)
        columns = CLASSES[table].column_of
        for ref in sorted(rows):
            cells = {columns[name]: database_text(value) for name, value in rows[ref].items()}
            cells['_ref'] = ref
            parts.append('<row ref="%s" __ctime="0" __mtime="0"%s/>' % (ref, ''.join(
                ' %s="%s"' % (name, _attribute(cells[name])) for name in sorted(cells))))
        parts.append('</table>')
    parts.append('</database>')
    return ''.join(parts)


def _attribute(text: str) -> str:
    for character, escape in (('%', '%%'), (' ', '%.'), ('\t', '%t'), ('\n', '%n'), ('\r', '%r')):
        text = text.replace(character, escape)
    return formats.escaped(text)


def restore_database(transfer: Transfer) -> None:
    """PUT /pool/xmldbdump: with dry_run only the checks; without, the host reboots soon afterwards, with that database.

    The 30 s until then are shortened (pool_db_backup.ml, constants.ml db_restore_fuse_time, v24.19.2).
    """
    pool = transfer.pool
    with pool.lock:
        transfer.describe()
    length = transfer.request.headers.get('content-length', '')
    if not length.isdigit():
        transfer.fail_given_task(Failure('INTERNAL_ERROR', 'Content-Length is required'))
        transfer.send(bad_request())
        raise EmptyReply(['CONTENT_LENGTH_MISSING'])
    with transfer.task('Reading database as XML') as task:
        pool.set_progress(task, 0.0)
        transfer.occasion.before()
        transfer.send(head('1.1 200 OK'))
        source = transfer.body()
        try:
            content = source.exactly(int(length))
            database = ElementTree.fromstring(content)
            pairs = {pair.get('key'): pair.get('value') for pair in database.find('manifest')}
        except (formats.PrematureEnd, ElementTree.ParseError, TypeError, OSError) as error:
            raise Failure('INTERNAL_ERROR', 'Xmlm.Error(%s)' % error)
        if (pairs.get('schema_major_vsn'), pairs.get('schema_minor_vsn')) != SCHEMA:
            raise Failure('RESTORE_INCOMPATIBLE_VERSION')
        tables = tables_of_xml(database)
        if not transfer.flag('dry_run'):
            transfer.server.reboot_soon(tables)


def tables_of_xml(database: Any) -> Dict[str, Dict[str, Dict[str, Any]]]:
    """The tables of a dump that are modelled, as database_xml wrote them."""
    unescaped = {'%.': ' ', '%t': '\t', '%n': '\n', '%r': '\r', '%%': '%'}
    tables = {}     # type: Dict[str, Dict[str, Dict[str, Any]]]
    for table in database.findall('table'):
        cls = CLASSES.get(table.get('name'))
        if cls is None:
            continue
        rows = tables[table.get('name')] = {}
        for row in table:
            cells = {cls.field_of_column[name]: re.sub('%[.tnr%]', lambda match: unescaped[match.group()], text)
                     for name, text in row.attrib.items() if name in cls.field_of_column}
            rows[row.get('ref')] = cls.new_record({name: value_of_text(cls.fields[name].type, text)
                                                   for name, text in cells.items()})
    return tables


# --- Table --------------------------------------------------------------------------------------

def _served(path: str, action: str, handler: Callable[[Transfer], None]) -> Callable[[Any, Any], None]:
    def serve(server: Any, request: Any) -> None:
        Transfer(server, request, path, action).run(handler)
    return serve


#: (method, path prefix) -> handler(server, request); the names are those of 401's realm (datamodel.ml http_actions).
HANDLERS = {
    ('GET', '/export'): _served('/export', 'get_export', export),
    ('GET', '/export_metadata'): _served('/export_metadata', 'get_export_metadata', export_metadata),
    ('GET', '/export_raw_vdi'): _served('/export_raw_vdi', 'get_export_raw_vdi', export_raw_vdi),
    ('PUT', '/import'): _served('/import', 'put_import', import_xva),
    ('PUT', '/import_metadata'): _served('/import_metadata', 'put_import_metadata', import_metadata),
    ('PUT', '/import_raw_vdi'): _served('/import_raw_vdi', 'put_import_raw_vdi', import_raw_vdi),
    ('GET', '/pool/xmldbdump'): _served('/pool/xmldbdump', 'get_pool_xml_db_sync', dump_database),
    ('PUT', '/pool/xmldbdump'): _served('/pool/xmldbdump', 'put_pool_xml_db_sync', restore_database),
}
