"""The server's side of `xe`: what every command means, prints and ends with.

The client (xe.py) sends its arguments; this side answers orders, one JSON object a line: print,
write to stderr, get or put data over another connection, ask, exit. Texts and exit statuses are
those of the real program.

Source of the facts: xapi v24.19.2, ocaml/xapi-cli-server/cli_frontend.ml, cli_operations.ml,
cli_util.ml, xapi_cli.ml; and what the real `xe` printed.
"""

import marshal
import os
import re
import signal
import threading
import time
import urllib.parse
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import cli_help
import faults
import formats
import transfer
from cli_errors import documented
from cli_fields import CLASSES, EMPTY_CLASSES, Field, Row, fields_of, look_up
from schema import NULL, Failure

Parameters = List[Tuple[str, str]]

HELP_HINT = "For usage run: 'xe help'\n"
NOT_FORCED = 'This operation is dangerous and may cause data loss. This operation must be forced (use --force).'
# Words that are no filters wherever they stand (cli_operations.ml stdparams).
STANDARD = {'server', 'password', 'port', 'username', 'minimal', 'force', 'multiple', 'all', 'message-priority', 'trace'}
TRUE_WORDS = {'true', 't', 'yes', 'y', '1'}
FALSE_WORDS = {'false', 'f', 'no', 'n', '0'}


class CliFailure(Exception):
    """A refusal by the command line itself; printed behind `Error: `."""


class MissingField(Exception):
    """A field name that the class does not have, where one is needed."""


class Refused(Exception):
    """Wrong arguments: printed with a hint at the help."""


class ExitWith(Exception):
    """Everything is said; the program ends with this status."""


class ClientGone(Exception):
    """The client closed the connection."""


class SeveralFailed(Exception):
    """With --multiple: (uuid, text) of those that failed."""


# --- The conversation ---------------------------------------------------------------------------

class Conversation:
    """The connection to one client."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self._is_gone = False

    def order(self, **order: Any) -> None:
        try:
            self._request.sock.sendall(marshal.dumps(order).hex().encode('ascii') + b'\n')
        except (OSError, ValueError):
            raise ClientGone()

    def answer(self) -> Dict[str, Any]:
        try:
            line = self._request.rfile.readline()
        except (OSError, ValueError):
            line = b''
        if not line:
            raise ClientGone()
        return marshal.loads(bytes.fromhex(line.decode('ascii').strip()))

    def print(self, text: str) -> None:
        self.order(print=text)

    def complain(self, text: str) -> None:
        self.order(stderr=text)


def parse(words: List[str]) -> Tuple[str, Parameters]:
    """The command and its parameters (cli_frontend.ml parse_commandline).

    `--name` is name=true; everything else is cut at the first `=`. There is no check for names
    that nobody knows.
    """
    if not words or '=' in words[0]:
        raise Refused('Syntax error: ')
    parameters = []
    for word in words[1:]:
        if word.startswith('--') and len(word) > 2:
            parameters.append((word[2:], 'true'))
        elif word.startswith('-'):
            raise Refused('Syntax error: ')
        else:
            name, _, value = word.partition('=')
            parameters.append((name, value))
    return words[0], parameters


def padded(label: str, width: int, is_first: bool) -> str:
    return label.ljust(width) if is_first else label.rjust(width)


def record_text(pairs: List[Tuple[str, str]]) -> str:
    """One record as `xe` prints it: names in a column, the first to the left, two empty lines behind."""
    width = max([len(label) for label, _ in pairs] or [0]) + 4
    lines = ['%s: %s' % (padded(label, width, number == 0), value) for number, (label, value) in enumerate(pairs)]
    return '\n'.join(lines) + '\n\n\n'


def minimal_text(values: Iterable[str]) -> str:
    return ','.join(value.replace('\\', '\\\\').replace(',', '\\,') for value in values) + '\n'


# --- One command --------------------------------------------------------------------------------

class Command:
    """One run of `xe`: its parameters, its session, and the ways to print and to fail."""

    def __init__(self, server: Any, request: Any, conversation: Conversation, name: str, parameters: Parameters,
                 entry: Any) -> None:
        self.server = server
        self.pool = server.pool
        self.request = request
        self.conversation = conversation
        self.name = name
        self.parameters = parameters
        self.session = NULL
        self.client_pid = 0
        self.entry = entry
        self.occasion = None    # type: Any

    # --- Parameters

    def get(self, name: str, default: Optional[str] = None) -> Optional[str]:
        """The first value given for a name."""
        return next((value for key, value in self.parameters if key == name), default)

    def required(self, name: str) -> str:
        value = self.get(name)
        if value is None:
            raise Refused('Required parameter not found: %s' % name)
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if value.lower() in TRUE_WORDS:
            return True
        if value.lower() in FALSE_WORDS:
            return False
        raise CliFailure("Failed to parse parameter '%s': Expected 'true','t','yes','y','1','false','f','no','n','0' got %s"
                         % (name, value))

    def map_of(self, name: str) -> Dict[str, str]:
        """Parameters `name:key=value`, and in the old form `name-key=value`."""
        return {key[len(name) + 1:]: value for key, value in self.parameters
                if key.startswith(name) and len(key) > len(name) + 1}

    # --- Output

    def print_list(self, values: List[str]) -> None:
        """Single values, one a line; with --minimal in one line, between commas."""
        if self.boolean('minimal'):
            self.conversation.print(minimal_text(values))
        else:
            self.conversation.print(''.join(value + '\n' for value in values))

    def print_table(self, records: List[List[Tuple[str, str]]]) -> None:
        if self.boolean('minimal'):
            self.conversation.print(minimal_text(pairs[0][1] if pairs else '' for pairs in records))
        else:
            self.conversation.print(''.join(record_text(pairs) for pairs in records))

    # --- The API

    def call(self, method: str, *arguments: Any) -> Any:
        """An API call with the command's session."""
        return self.server.call_api(self.request, self.session, method, list(arguments))

    def ref(self, cls: str, uuid: str) -> str:
        with self.pool.lock:
            return self.pool.ref_of(cls, uuid)

    def uuid(self, cls: str, ref: str) -> str:
        with self.pool.lock:
            return self.pool.record(cls, ref)['uuid']

    def says_yes(self) -> bool:
        """The person was asked and typed yes (cli_util.ml user_says_yes)."""
        self.conversation.print("Type 'yes' to continue\n")
        self.conversation.order(prompt='')
        line = self.conversation.answer().get('line', '')
        if line.strip().lower() != 'yes':
            self.conversation.print("Aborted (you typed: '%s')\n" % line)
            return False
        return True

    # --- Choosing objects

    def rows(self, cls: str) -> List[Row]:
        """All objects of a class, in the order in which the server lists them: by reference, backwards; messages by age."""
        if cls == 'message':
            newest = sorted(enumerate(self.pool.tables[cls].items()),
                            key=lambda item: (item[1][1]['timestamp'], item[0]), reverse=True)
            return [Row(self.pool, cls, ref) for _, (ref, _) in newest]
        return [Row(self.pool, cls, ref) for ref in sorted(self.pool.tables[cls], reverse=True)]

    def choose_vms(self, ignored: Iterable[str] = (), with_templates: bool = False,
                   with_control_domains: bool = False) -> List[Row]:
        """The VMs that the selectors on the command line mean (cli_operations.ml select_vms)."""
        filters = []        # type: Parameters
        if not with_templates:
            filters.append(('is-a-template', 'false'))
        if not with_control_domains:
            filters.append(('is-control-domain', 'false'))
        name = self.get('vm')
        taken = False
        for key, value in self.parameters:
            if key == 'vm' and not taken:
                taken = True
            elif key.partition(':')[0] not in STANDARD | set(ignored):
                filters.append((key, value))
        with self.pool.lock:
            rows = [row for row in self.rows('VM')
                    if name is None or name in (row.record['uuid'], row.record['name_label'])]
            for key, value in filters:
                rows = filtered(rows, fields_of('vm'), key, value)
            return rows

    def on_vms(self, act: Callable[[Row], Any], ignored: Iterable[str] = (), several: bool = True, **which: bool
               ) -> List[Any]:
        """Does something to the chosen VM, or with --multiple to all chosen ones (do_vm_op)."""
        try:
            rows = self.choose_vms(ignored, **which)
        except MissingField as missing:
            raise CliFailure("Parameter '%s' is not a field of the VM class. Failed to select VM for operation." % missing)
        if not rows:
            raise CliFailure('No matching VMs found')
        with self.pool.lock:
            self.concerns([row.ref for row in rows])
        if len(rows) == 1:
            return [act(rows[0])]
        if not several:
            raise CliFailure('Multiple matches VMs found. Operation can only be performed on one VM at a time')
        if not self.boolean('multiple'):
            raise CliFailure('Multiple matches VMs found. --multiple required to complete the operation')
        results, failed = [], []
        for row in rows:
            uuid = row.uuid()
            try:
                results.append(act(row))
            except Failure as failure:
                failed.append((uuid, failure_text(self.pool, failure).rstrip('\n')
                               if documented(failure.code) else str(failure)))
        if failed:
            raise SeveralFailed(failed)
        return results

    # --- Faults

    def concerns(self, refs: Iterable[str]) -> None:
        """Says which objects the command is about, so that its faults are known; those that come first strike."""
        if self.occasion is not None:
            return
        names = [name for ref in refs for name in self.pool.names_of(ref)]
        is_difference = self.name == 'vdi-export' and self.get('base') is not None and self.get('format') != 'tar'
        self.occasion = self.server.faults.at('xe', self.name, names, self.entry, is_difference=is_difference)

    def begin(self, *refs: str) -> None:
        with self.pool.lock:
            self.concerns(refs)
        self.occasion.before()
        if self.occasion.kill and self.name not in STREAMING:
            self.kill_client()

    def kill_client(self) -> None:
        """SIGKILL for the client, as the fault `kill` wants it; what it was sent so far it may still write."""
        if self.client_pid:
            time.sleep(0.2)
            try:
                os.kill(self.client_pid, signal.SIGKILL)
            except OSError:
                pass

    # --- Data

    @contextmanager
    def own_task(self, label: str, description: str = '') -> Iterator[str]:
        task = self.pool.create_task(label, description, self.session, host=self.pool.master())
        try:
            with self.attached(task):
                yield task
        finally:
            with self.pool.lock:
                if self.pool.exists('task', task):
                    self.pool.destroy_task(task)

    @contextmanager
    def attached(self, task: str) -> Iterator[None]:
        """What moves data under this task does so with the command's faults, and counts for its journal line."""
        attachment = transfer.Attachment(self.occasion, self.kill_client if self.occasion.kill else None)
        transfer.ATTACHED[task] = attachment
        try:
            yield
        finally:
            del transfer.ATTACHED[task]
            self.entry.bytes += attachment.bytes

    def url(self, path: str, task: str, **query: str) -> str:
        """A data URL with session and task, as it goes to the client: values are escaped but for `:` and `/`."""
        pairs = [('session_id', self.session), ('task_id', task)] + sorted(query.items())
        return path + '?' + '&'.join('%s=%s' % (key, urllib.parse.quote(value, safe=':/')) for key, value in pairs)

    def wait_for(self, task: str) -> Dict[str, Any]:
        """The task's record once it is no longer pending."""
        with self.pool.lock:
            while True:
                record = self.pool.record('task', task)
                if record['status'] not in ('pending', 'cancelling') or self.pool.stopping:
                    return dict(record)
                self.pool.resolve_session(self.session)        # asking for the task takes a valid one
                self.pool.changed.wait(0.5)

    def download(self, task: str, url: str, name: str, label: str) -> None:
        """Has the client fetch the data, and judges by task and client (cli_operations.ml download_file)."""
        self.conversation.order(get=url, file=name)
        client_is_content = self.conversation.answer()['ok']
        if not client_is_content:
            with self.pool.lock:
                if self.pool.record('task', task)['progress'] < 0:
                    # No handler ever took the task: nobody else will end it.
                    self.pool.set_fields('task', task, {'status': 'failure', 'finished': self.pool.now()})
        record = self.wait_for(task)
        if record['status'] == 'success':
            if not client_is_content:
                self.conversation.complain('%s failed, unknown error.\n' % label)
                raise ExitWith(1)
            if name:
                self.conversation.print('%s succeeded\n' % label)
        elif record['status'] == 'cancelled':
            self.conversation.complain('%s cancelled\n' % label)
            raise ExitWith(1)
        elif record['error_info']:
            raise Failure(*record['error_info'])
        else:
            # The real one forgets to fail here: exit status 0.
            self.conversation.complain('%s failed, unknown error\n' % label)

    def track(self, task: str, order: Dict[str, str]) -> str:
        """Has the client move data and waits for the task's end; the result (track_http_operation).

        A task that no handler takes is waited for without end, as there; but a client that goes
        away ends it, and so does the end of the session, with which the task is asked for.
        """
        self.conversation.order(**order)
        answers = []        # type: List[Optional[bool]]

        def listen() -> None:
            try:
                answers.append(bool(self.conversation.answer()['ok']))
            except ClientGone:
                answers.append(None)
            with self.pool.lock:
                self.pool.changed.notify_all()
        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        with self.pool.lock:
            while self.pool.record('task', task)['status'] in ('pending', 'cancelling'):
                if answers == [None] or self.pool.stopping:
                    raise ClientGone()
                self.pool.resolve_session(self.session)
                self.pool.changed.wait(0.5)
        listener.join()
        if answers == [None]:
            raise ClientGone()
        with self.pool.lock:
            record = dict(self.pool.record('task', task))
        if record['status'] == 'success' and answers == [True]:
            return record['result']
        if record['status'] == 'cancelled':
            raise Failure('TASK_CANCELLED', task)
        if record['status'] == 'failure' and record['error_info']:
            raise Failure(*record['error_info'])
        raise Failure('CLIENT_ERROR')


# --- Filters and fields -------------------------------------------------------------------------

def field_named(fields: List[Field], name: str) -> Field:
    for field in fields:
        if field.name == name:
            return field
    raise MissingField(name)


def kind_of(fields: List[Field], name: str) -> Tuple[str, Field]:
    """What a name on the command line means: a field, a key of a map, or a set's contents (get_field_type)."""
    for field in fields:
        if field.name == name:
            return 'normal', field
    if ':' in name:
        for field in fields:
            if field.name == name.partition(':')[0]:
                if not (field.is_set or field.is_map):
                    raise CliFailure("Field '%s' is not a set or map" % field.name)
                return ('set' if field.is_set else 'map'), field
    else:
        by_length = sorted(fields, key=lambda field: -len(field.name))
        for kind, of_kind in (('map', [f for f in by_length if f.is_map]), ('set', [f for f in by_length if f.is_set])):
            for field in of_kind:
                if name.startswith(field.name + '-'):
                    return kind, field
    raise CliFailure("Unknown field '%s'" % name)


def filtered(rows: List[Row], fields: List[Field], name: str, value: str) -> List[Row]:
    """The rows that pass one filter. An unknown field shows only while there are rows to look at."""
    if not rows:
        return []
    kind, field = kind_of(fields, name)
    if kind == 'normal':
        if field.name == 'MAC':
            return [row for row in rows if field.text(row).lower() == value.lower()]
        return [row for row in rows if field.text(row) == value]
    key = name[len(field.name) + 1:]
    if kind == 'map':
        return [row for row in rows if isinstance(field.value(row), dict) and field.value(row).get(key) == value]
    if key != 'contains':
        raise CliFailure('Invalid syntax for set filtering (should be set-param:contains=key)')
    return [row for row in rows if value in field.value(row)]


def shown(row: Row, fields: Iterable[Field], with_expensive: bool) -> List[Tuple[str, str]]:
    return [(field.label(), '<expensive field>' if field.is_expensive and not with_expensive else field.text(row))
            for field in fields]


# --- Commands for every class -------------------------------------------------------------------

def list_objects(command: Command, word: str) -> None:
    """X-list: filters are all parameters but `params` and the standard ones."""
    command.begin()
    if word in EMPTY_CLASSES:
        command.print_table([])
        return
    cls, _, always, defaults = CLASSES[word]
    fields = fields_of(word)
    filters = always + [(key, value) for key, value in command.parameters
                        if key not in STANDARD | {'params'} and not key.startswith('database:')]
    chosen = command.get('params')
    wanted = defaults.split() if chosen is None else chosen.split(',')
    with command.pool.lock:
        rows = command.rows(cls)
        every = rows
        for key, value in filters:
            rows = filtered(rows, fields, key, value)
        if command.boolean('all'):
            rows = every
        visible = fields if chosen == 'all' or not wanted else [field for field in fields if field.name in wanted]
        if command.boolean('minimal'):
            visible = visible[:1]
        table = [shown(row, visible, False) for row in rows]
    command.print_table(table)


def one_object(command: Command, word: str) -> Row:
    """The object of `uuid`."""
    cls = CLASSES[word][0]
    uuid = command.required('uuid')
    with command.pool.lock:
        row = Row(command.pool, cls, command.pool.ref_of(cls, uuid))
    command.begin(row.ref)
    return row


def list_parameters(command: Command, word: str) -> None:
    row = one_object(command, word)
    with command.pool.lock:
        pairs = shown(row, fields_of(word), True)
    command.print_table([pairs])


def get_parameter(command: Command, word: str) -> None:
    row = one_object(command, word)
    with command.pool.lock:
        field = field_named(fields_of(word), command.required('param-name'))
        value = field.value(row)
        key = command.get('param-key')
        if key is not None and field.is_map:
            if not isinstance(value, dict) or key not in value:
                raise CliFailure('Key %s not found in map' % key)
            text = value[key]
        else:
            text = field.text(row)
    command.print_list([text])


# Fields whose setter is not called after the field, or takes something else than text.
REFERENCES = {'default_SR': 'SR', 'crash_dump_SR': 'SR', 'suspend_image_SR': 'SR', 'suspend_image_sr': 'SR',
              'crash_dump_sr': 'SR', 'suspend_VDI': 'VDI', 'suspend_SR': 'SR', 'affinity': 'host'}
TRUE_OR_FALSE = {'true': True, 'false': False}


def set_parameters(command: Command, word: str) -> None:
    """X-param-set: one setter after the other, up to the first that fails."""
    row = one_object(command, word)
    fields = fields_of(word)
    for name, text in command.parameters:
        if name == 'uuid' or name in STANDARD:
            continue
        kind, field = kind_of(fields, name)
        if kind == 'set':
            raise CliFailure('Cannot param-set on set fields')
        if kind == 'map':
            if not field.is_writable:
                raise CliFailure("Map field '%s' is read-only." % field.name)
            key = name[len(field.name) + 1:]
            with command.pool.lock:
                exists = key in row.record[field.field]
            if exists:
                command.call('%s.remove_from_%s' % (row.cls, field.field), row.ref, key)
            command.call('%s.add_to_%s' % (row.cls, field.field), row.ref, key, text)
        else:
            if field.is_map and field.is_writable:
                raise CliFailure("Field '%s' is a map or set. use the 'name:key=value' syntax." % name)
            if not field.is_writable or field.is_set:
                raise CliFailure("Field '%s' is read-only." % name)
            set_field(command, row, field, text)


def set_field(command: Command, row: Row, field: Field, text: str) -> None:
    value = text        # type: Any
    with command.pool.lock:
        current = row.record[field.field]
    if isinstance(current, bool):
        if text not in TRUE_OR_FALSE:
            raise CliFailure("Failed to parse parameter '%s': expecting a boolean (true or false)" % field.name)
        value = TRUE_OR_FALSE[text]
    elif field.field in REFERENCES:
        value = command.ref(REFERENCES[field.field], text) if text else NULL
    elif field.show == 'words':
        value = text.lower().replace(' ', '_')
    elif isinstance(current, float):
        try:
            value = float(text)
        except ValueError:
            raise CliFailure('Parameter %s must be a floating-point number' % field.name)
    command.call('%s.set_%s' % (row.cls, field.field), row.ref, value)


def add_to_parameter(command: Command, word: str) -> None:
    row = one_object(command, word)
    field = field_named(fields_of(word), command.required('param-name'))
    if field.is_set and field.is_writable:
        key = command.get('param-key')
        if key is None:
            raise CliFailure('When adding a key to a set, use the syntax: *-param-add param-name=<name> param-key=<key>')
        command.call('%s.add_%s' % (row.cls, field.field), row.ref, key)
    elif field.is_map and field.is_writable:
        for key, value in command.parameters:
            if key not in STANDARD | {'uuid', 'param-name', 'param-key'}:
                command.call('%s.add_to_%s' % (row.cls, field.field), row.ref, key, value)
    elif field.is_map or field.is_set:
        raise CliFailure('Parameter is read-only')
    else:
        raise CliFailure('Can only add to parameters of type Set or Map')


def remove_from_parameter(command: Command, word: str) -> None:
    row = one_object(command, word)
    field = field_named(fields_of(word), command.required('param-name'))
    key = command.required('param-key')
    if not (field.is_set or field.is_map):
        raise CliFailure('Can only remove from parameters of type Set or Map')
    if not field.is_writable:
        raise CliFailure('Cannot remove parameters from read-only map')
    with command.pool.lock:
        is_there = key in field.value(row)
    if not is_there:
        raise CliFailure('Key %s is not in %s' % (key, 'the set' if field.is_set else 'map'))
    command.call('%s.remove_%s%s' % (row.cls, '' if field.is_set else 'from_', field.field), row.ref, key)


def clear_parameter(command: Command, word: str) -> None:
    row = one_object(command, word)
    field = field_named(fields_of(word), command.required('param-name'))
    if not field.is_writable:
        raise CliFailure('Can only clear RW parameters')
    with command.pool.lock:
        value = field.value(row)
    if field.is_set:
        for key in list(value):
            command.call('%s.remove_%s' % (row.cls, field.field), row.ref, key)
    elif field.is_map:
        for key in list(value):
            command.call('%s.remove_from_%s' % (row.cls, field.field), row.ref, key)
    else:
        set_field(command, row, field, '')


# --- VMs ----------------------------------------------------------------------------------------

def vm_export(command: Command) -> None:
    filename = command.required('filename')
    count = [0]

    def export_one(row: Row) -> None:
        if not count[0]:
            command.begin(row.ref)
        export_vm(command, row, filename + (str(count[0] + 1) if count[0] else ''))
        # One that failed leaves its file name to the next.
        count[0] += 1
    command.on_vms(export_one, ['filename', 'metadata', 'compress', 'preserve-power-state', 'include-snapshots',
                                'excluded-device-types'])


def compression_word(command: Command) -> str:
    """The query's word for `compress=`; servers without zstd know truth values only (compression_algorithms.ml)."""
    if not command.pool.has_zstd():
        return 'true' if command.boolean('compress') else 'false'
    return {'true': 'gzip', 'gzip': 'gzip', 'zstd': 'zstd'}.get(command.get('compress', 'false') or '', 'none')


def export_vm(command: Command, row: Row, filename: str) -> None:
    """One VM to one file (cli_operations.ml export_common)."""
    metadata = command.boolean('metadata')
    default = metadata if command.pool.version < (24, 0) else False
    with command.own_task('Export of VM', row.uuid()) as task:
        # The handler sets it to 0; below that nobody has taken the task.
        command.pool.set_progress(task, -1.0)
        url = command.url('/export_metadata' if metadata else '/export', task, ref=row.ref,
                          use_compression=compression_word(command),
                          preserve_power_state=str(command.boolean('preserve-power-state')).lower(),
                          export_snapshots=str(command.boolean('include-snapshots', default)).lower())
        command.download(task, url, filename, 'Export')


def snapshot_export(command: Command) -> None:
    """snapshot-export-to-template: takes the snapshot as it is, template flag and all."""
    filename = command.required('filename')
    uuid = command.required('snapshot-uuid')
    ref = command.ref('VM', uuid)
    command.begin(ref)
    with command.pool.lock:
        is_snapshot = command.pool.record('VM', ref)['is_a_snapshot']
    if command.pool.version >= (1, 160) and not is_snapshot:
        raise CliFailure('This operation can only be performed on a VM snapshot. %s is not a VM snapshot.' % uuid)
    export_vm(command, Row(command.pool, 'VM', ref), filename)


def template_export(command: Command) -> None:
    filename = command.required('filename')
    uuid = command.required('template-uuid')
    ref = command.ref('VM', uuid)
    command.begin(ref)
    with command.pool.lock:
        is_template = command.pool.record('VM', ref)['is_a_template']
    if command.pool.version >= (1, 160) and not is_template:
        raise CliFailure('This operation can only be performed on a VM template. %s is not a VM template.' % uuid)
    export_vm(command, Row(command.pool, 'VM', ref), filename)


def vm_import(command: Command) -> None:
    sr_uuid = command.get('sr-uuid')
    command.begin()
    metadata, dry_run = command.boolean('metadata'), command.boolean('dry-run')
    if command.get('url') is not None:
        raise CliFailure('The simulated pool imports no URLs')
    filename = command.required('filename')
    if dry_run and not metadata:
        raise CliFailure('Only metadata import function support dry-run')
    sr = command.ref('SR', sr_uuid) if sr_uuid is not None else None
    if sr is None:
        with command.pool.lock:
            sr = command.pool.pool_record()['default_SR']
            if sr not in command.pool.tables['SR']:
                raise CliFailure('No SR specified and Pool default SR is null')
    task_uuid = command.get('task-uuid')
    query = {'restore': str(command.boolean('preserve')).lower(), 'force': str(command.boolean('force')).lower()}
    if metadata:
        query['dry_run'] = str(dry_run).lower()
        query.update({'vdi:' + key: value for key, value in command.map_of('vdi').items()})
    else:
        query['sr_id'] = sr
    with existing_task(command, task_uuid) if task_uuid is not None else command.own_task('VM import') as task:
        url = command.url('/import_metadata' if metadata else '/import', task, **query)
        result = command.track(task, {'put': url, 'file': filename})
    if dry_run:
        command.conversation.print('xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx\n')
        return
    refs = formats.value_of_xml(result.encode('utf-8'))
    command.conversation.print(','.join(command.uuid('VM', ref) for ref in refs) + '\n')


@contextmanager
def existing_task(command: Command, uuid: str) -> Iterator[str]:
    """The task that the caller made: it is used, and stays."""
    task = command.ref('task', uuid)
    with command.attached(task):
        yield task


def snapshot_by(method: str) -> Callable[[Command], None]:
    def snapshot(command: Command) -> None:
        name = command.required('new-name-label')
        ignored = command.get('ignore-vdi-uuids')

        def act(row: Row) -> str:
            command.begin(row.ref)
            arguments = [row.ref, name]     # type: List[Any]
            if ignored is not None:
                arguments.append([command.ref('VDI', uuid) for uuid in ignored.split(',') if uuid])
            return command.call(method, *arguments)
        finish_copies(command, command.on_vms(act, ['new-name-label', 'new-name-description', 'ignore-vdi-uuids']))
    return snapshot


def vm_clone(command: Command) -> None:
    name = command.required('new-name-label')

    def act(row: Row) -> str:
        command.begin(row.ref)
        return command.call('VM.clone', row.ref, name)
    finish_copies(command, command.on_vms(act, ['new-name-label', 'new-name-description', 'ignore-vdi-uuids'],
                                          with_templates=True))


def power_by(choose: Callable[[Command], Tuple[str, List[Any]]], ignored: Iterable[str] = ()) -> Callable[[Command], None]:
    """A command that calls one method on each chosen VM."""
    def act_on(command: Command) -> None:
        method, more = choose(command)

        def act(row: Row) -> None:
            command.begin(row.ref)
            command.call(method, row.ref, *more)
        command.on_vms(act, ignored)
    return act_on


def destroy_by(cls: str, *names: str) -> Callable[[Command], None]:
    """X-destroy with the uuid under one of these names."""
    def destroy(command: Command) -> None:
        given = next((command.get(name) for name in names if command.get(name) is not None), None)
        if given is None:
            raise Refused('Required parameter not found: uuid')
        ref = command.ref(cls, given)
        command.begin(ref)
        command.call('%s.destroy' % cls, ref)
    return destroy


def snapshot_of(command: Command) -> str:
    """The snapshot that `snapshot-uuid` or `uuid` names (get_snapshotVM_by_uuid)."""
    uuid = command.get('snapshot-uuid', command.get('uuid'))
    if uuid is None:
        raise CliFailure('Required parameter not found: snapshot-uuid or uuid.')
    ref = command.ref('VM', uuid)
    command.begin(ref)
    with command.pool.lock:
        if not command.pool.record('VM', ref)['is_a_snapshot']:
            raise CliFailure('This operation can only be performed on a VM snapshot. %s is not a VM snapshot.' % uuid)
    return ref


def snapshot_revert(command: Command) -> None:
    command.call('VM.revert', snapshot_of(command))


def snapshot_clone(command: Command) -> None:
    name = command.required('new-name-label')
    finish_copies(command, [command.call('VM.clone', snapshot_of(command), name)])


def snapshot_destroy(command: Command) -> None:
    halt_and_destroy(command, snapshot_of(command))


def finish_copies(command: Command, copies: List[str]) -> None:
    """The first copy is described as was wished, and all are named."""
    description = command.get('new-name-description')
    if description is not None:
        command.call('VM.set_name_description', copies[0], description)
    command.print_list([command.uuid('VM', ref) for ref in copies])


def halt_and_destroy(command: Command, vm: str) -> None:
    with command.pool.lock:
        is_halted = command.pool.record('VM', vm)['power_state'] == 'Halted'
    if not is_halted:
        command.call('VM.hard_shutdown', vm)
    command.call('VM.destroy', vm)


def vm_uninstall(command: Command) -> None:
    """Removes VMs with their snapshots, and every disk that a VBD marks as owned."""
    def act(row: Row) -> str:
        command.begin(row.ref)
        return row.ref
    vms = command.on_vms(act)
    with command.pool.lock:
        vms += [snapshot for vm in vms for snapshot in command.pool.record('VM', vm)['snapshots']]
    uninstall(command, vms)


def snapshot_uninstall(command: Command) -> None:
    uninstall(command, [snapshot_of(command)])


def template_uninstall(command: Command) -> None:
    ref = command.ref('VM', command.required('template-uuid'))
    command.begin(ref)
    with command.pool.lock:
        if not command.pool.record('VM', ref)['is_a_template']:
            raise CliFailure('This operation can only be performed on a VM template. %s is not a VM template.'
                             % command.get('template-uuid'))
    uninstall(command, [ref])


def uninstall(command: Command, vms: List[str]) -> None:
    """Names what will go, asks unless forced, removes each VM and then its disks (vm_uninstall_common)."""
    tables = command.pool.tables
    disks = {vm: [] for vm in vms}      # type: Dict[str, List[str]]
    images = {}     # type: Dict[str, str]
    lines = ['The following items are about to be destroyed']
    with command.pool.lock:
        for vm in vms:
            record = command.pool.record('VM', vm)
            lines.append('VM : %s (%s)' % (record['uuid'], record['name_label']))
            for vbd in record['VBDs']:
                vdi = tables['VBD'][vbd]['VDI']
                if 'owner' in tables['VBD'][vbd]['other_config'] and vdi in tables['VDI']:
                    disks[vm].append(vdi)
            if record['suspend_VDI'] in tables['VDI']:
                images[vm] = record['suspend_VDI']
            for vdi in disks[vm] + ([images[vm]] if vm in images else []):
                about = tables['VDI'][vdi]
                lines.append('VDI: %s (%s) %s' % (about['uuid'], about['name_label'], '' if len(about['VBDs']) <= 1
                                                  else ' ** WARNING: disk is shared by other VMs'))
    command.conversation.print(''.join(line + '\n' for line in lines))
    if not command.boolean('force') and not command.says_yes():
        return
    for vm in vms:
        halt_and_destroy(command, vm)
        for vdi in disks[vm]:
            command.call('VDI.destroy', vdi)
        if vm in images:
            try:
                command.call('VDI.destroy', images[vm])
            except Failure:
                pass        # it went with the shutdown of a suspended VM; the real one looks no closer
    command.conversation.print('All objects destroyed\n')


def vm_copy(command: Command) -> None:
    """vm-copy: of one VM, with disks that share nothing, on one SR if it is named."""
    name = command.required('new-name-label')
    sr = command.ref('SR', command.required('sr-uuid')) if command.get('sr-uuid') is not None else NULL

    def act(row: Row) -> str:
        command.begin(row.ref)
        return command.call('VM.copy', row.ref, name, sr)
    finish_copies(command, command.on_vms(act, ['new-name-label', 'sr-uuid', 'new-name-description'], several=False,
                                          with_templates=True))


def vm_reset_powerstate(command: Command) -> None:
    if not command.boolean('force'):
        command.begin()
        raise CliFailure(NOT_FORCED)

    def act(row: Row) -> None:
        command.begin(row.ref)
        command.call('VM.power_state_reset', row.ref)
    command.on_vms(act)


def vm_memory_limits_set(command: Command) -> None:
    names = ['static-min', 'static-max', 'dynamic-min', 'dynamic-max']
    limits = [bytes_of(name, command.required(name)) for name in names]

    def act(row: Row) -> None:
        command.begin(row.ref)
        command.call('VM.set_memory_limits', row.ref, *limits)
    command.on_vms(act, names, with_templates=True, with_control_domains=True)


def chosen_template(command: Command) -> str:
    """The template that the command line means: a uuid, or the one template of that name (vm_install)."""
    def by_name(name: str) -> str:
        found = [row.ref for row in command.rows('VM') if row.record['name_label'] == name
                 and row.record['is_a_template'] and not row.record['is_control_domain']]
        if len(found) != 1:
            raise CliFailure('More than one matching template found' if found else 'No templates matched')
        return found[0]
    with command.pool.lock:
        if command.get('template-uuid') is not None:
            try:
                ref = command.pool.ref_of('VM', command.required('template-uuid'))
            except Failure:
                raise CliFailure('Cannot find template')
        else:
            name = command.get('template-name-label', command.get('template-name'))
            word = command.get('template')
            if name is None and word is None:
                raise CliFailure("Template must be specified by parameter 'template-uuid', 'template-name', "
                                 "'template-name-label' or 'template'")
            try:
                ref = by_name(name) if name is not None else command.pool.ref_of('VM', word)
            except Failure:
                ref = by_name(word)
        if not command.pool.record('VM', ref)['is_a_template']:
            raise CliFailure('Can only install from templates')
        return ref


def vm_install(command: Command) -> None:
    """A new VM from a template: copied to the SR that is named, else cloned; provisioned, not started (vm_install_real)."""
    template, name = chosen_template(command), command.required('new-name-label')
    command.begin(template)
    sr_uuid, sr_name = command.get('sr-uuid'), command.get('sr-name-label')
    with command.pool.lock:
        record = dict(command.pool.record('VM', template))
        if record['is_a_snapshot'] and (sr_uuid or sr_name) is not None:
            raise CliFailure('Do not use the sr-name-label or sr-uuid argument when installing from a snapshot. By default, it '
                             'will install each new disk on the same SR as the corresponding snapshot disks.')
        sr = command.pool.ref_of('SR', sr_uuid) if sr_uuid is not None else None
        if sr_name is not None:
            named = [row.ref for row in command.rows('SR') if row.record['name_label'] == sr_name]
            if not named:
                raise CliFailure('No SR with that name-label found')
            if sr is not None and sr not in named:
                raise CliFailure("SR specified via sr-uuid doesn't have the name specified via sr-name-label")
            if sr is None and len(named) > 1:
                raise CliFailure('Multiple SRs with that name-label found')
            sr = sr or named[0]
    vm = command.call('VM.copy', template, name, sr) if sr is not None else command.call('VM.clone', template, name)
    try:
        command.call('VM.set_name_description', vm, 'Installed via xe CLI')
        command.call('VM.set_suspend_SR', vm, record['suspend_SR'] if sr is None else sr)
        command.call('VM.provision', vm)
    except Failure:
        command.call('VM.destroy', vm)
        raise
    command.print_list([command.uuid('VM', vm)])


def vm_vif_list(command: Command) -> None:
    """The interfaces of the chosen VMs, a table for each VM; several VMs need no --multiple."""
    command.parameters.insert(0, ('multiple', 'true'))
    fields = fields_of('vif')
    chosen = command.get('params')
    wanted = ('uuid device MAC network-uuid network-name-label vm-name-label'.split() if chosen is None
              else chosen.split(','))

    def act(row: Row) -> None:
        command.begin(row.ref)
        with command.pool.lock:
            table = [shown(Row(command.pool, 'VIF', vif), [field for field in fields if chosen == 'all'
                                                           or field.name in wanted], False)
                     for vif in row.record['VIFs']]
        command.print_table(table)
    command.on_vms(act, ['params'])


def vm_disk_list(command: Command) -> None:
    """The disks of the chosen VMs, VBD and VDI by turns."""
    chosen = []     # type: List[Row]

    def act(row: Row) -> None:
        command.begin(row.ref)
        chosen.append(row)
    command.on_vms(act, ['vbd-params', 'vdi-params'])
    vbd_fields = [f for f in fields_of('vbd') if f.name in ('uuid', 'vm-name-label', 'userdevice')]
    vdi_fields = [f for f in fields_of('vdi') if f.name in ('uuid', 'name-label', 'sr-name-label', 'virtual-size')]
    text = ''
    minimal = []        # type: List[str]
    with command.pool.lock:
        for row in chosen:
            number = 0
            for vbd in row.record['VBDs']:
                record = command.pool.record('VBD', vbd)
                if record['type'] != 'Disk':
                    continue
                vbd_pairs = shown(Row(command.pool, 'VBD', vbd), vbd_fields, False)
                vdi_pairs = shown(Row(command.pool, 'VDI', record['VDI']), vdi_fields, False)
                minimal += [vbd_pairs[0][1], vdi_pairs[0][1]]
                text += 'Disk %d VBD:\n%sDisk %d VDI:\n%s' % (number, record_text(vbd_pairs), number,
                                                            record_text(vdi_pairs))
                number += 1
    command.conversation.print(minimal_text(minimal) if command.boolean('minimal') else text)


# --- Disks --------------------------------------------------------------------------------------

def vdi_export(command: Command) -> None:
    uuid = command.required('uuid')
    filename = command.required('filename')
    ref = command.ref('VDI', uuid)
    command.begin(ref)
    query = {'vdi': ref, 'format': command.get('format', 'raw') or ''}
    base = command.get('base')
    if base is not None:
        query['base'] = base
    with command.own_task('VDI export') as task:
        command.track(task, {'get': command.url('/export_raw_vdi', task, **query), 'file': filename})


def vdi_import(command: Command) -> None:
    uuid = command.required('uuid')
    filename = command.required('filename')
    ref = command.ref('VDI', uuid)
    command.begin(ref)
    with command.own_task('VDI import') as task:
        url = command.url('/import_raw_vdi', task, vdi=ref, format=command.get('format', 'raw') or '')
        command.track(task, {'put': url, 'file': filename})


def vdi_snapshot(command: Command) -> None:
    ref = command.ref('VDI', command.required('uuid'))
    command.begin(ref)
    command.print_list([command.uuid('VDI', command.call('VDI.snapshot', ref, command.map_of('driver-params')))])


def vdi_clone(command: Command) -> None:
    ref = command.ref('VDI', command.required('uuid'))
    command.begin(ref)
    command.print_list([command.uuid('VDI', command.call('VDI.clone', ref, command.map_of('driver-params')))])


def vdi_copy(command: Command) -> None:
    ref = command.ref('VDI', command.required('uuid'))
    sr = command.ref('SR', command.required('sr-uuid'))
    command.begin(ref)
    command.print_list([command.uuid('VDI', command.pool.vdi_copy(ref, sr))])


def vdi_pool_migrate(command: Command) -> None:
    ref = command.ref('VDI', command.required('uuid'))
    sr = command.ref('SR', command.required('sr-uuid'))
    command.begin(ref)
    command.print_list([command.uuid('VDI', command.call('VDI.pool_migrate', ref, sr, {}))])


def vdi_create(command: Command) -> None:
    sr = command.ref('SR', command.required('sr-uuid'))
    name = command.required('name-label')
    size = bytes_of('virtual-size', command.required('virtual-size'))
    kind = command.get('type', 'user')
    command.begin(sr)
    if kind not in ('system', 'user', 'suspend', 'crashdump'):
        raise CliFailure('Unknown vdi type: %s' % kind)
    ref = command.call('VDI.create', {
        'SR': sr, 'name_label': name, 'name_description': '', 'virtual_size': size, 'type': kind,
        'sharable': command.boolean('sharable'), 'read_only': False, 'other_config': {}, 'xenstore_data': {},
        'sm_config': command.map_of('sm-config'), 'tags': []})
    command.print_list([command.uuid('VDI', ref)])


def vdi_resize(command: Command) -> None:
    ref = command.ref('VDI', command.required('uuid'))
    size = bytes_of('disk-size', command.required('disk-size'))
    command.begin(ref)
    # no other word than `true` is looked at
    command.call('VDI.resize_online' if command.get('online') == 'true' else 'VDI.resize', ref, size)


def bytes_of(name: str, text: str) -> str:
    """A size with an optional unit (record_util.ml bytes_of_string)."""
    number, unit = re.match(r'([0-9]*)(.*)', text, re.DOTALL).groups()
    units = {'': 1, 'bytes': 1, 'KiB': 2 ** 10, 'MiB': 2 ** 20, 'GiB': 2 ** 30, 'TiB': 2 ** 40}
    if not number:
        raise CliFailure("Failed to parse field '%s': expecting an integer (possibly with suffix)" % name)
    if unit not in units:
        raise CliFailure("Failed to parse field '%s': Unknown suffix: '%s' (try KiB, MiB, GiB or TiB)" % (name, unit))
    return str(int(number) * units[unit])


def on_object(cls: str, method: str, other: Tuple[str, str] = ('', '')) -> Callable[[Command], None]:
    """A command that calls one method on the object of `uuid`; `other`: class and parameter of a second one."""
    def act(command: Command) -> None:
        ref = command.ref(cls, command.required('uuid'))
        more = [command.ref(other[0], command.required(other[1]))] if other[0] else []
        command.begin(ref)
        command.call(method, ref, *more)
    return act


# --- Drives and interfaces ----------------------------------------------------------------------

def vbd_create(command: Command) -> None:
    vm = command.ref('VM', command.required('vm-uuid'))
    vdi_uuid = command.get('vdi-uuid')
    vdi = command.ref('VDI', vdi_uuid) if vdi_uuid is not None else NULL
    mode, kind = (command.get('mode', 'RW') or '').upper(), (command.get('type', 'Disk') or '').lower()
    command.begin(vm)
    bootable, unpluggable = command.boolean('bootable'), command.boolean('unpluggable', True)
    if mode not in ('RO', 'RW'):
        raise CliFailure('Unknown mode: %s (should be "ro" or "rw"' % mode.lower())
    kinds = {'cd': 'CD', 'disk': 'Disk', 'floppy': 'Floppy'}
    if kind not in kinds:
        raise CliFailure('"Unknown type: %s (should be "cd", "disk" or "floppy"' % kind)
    if kind == 'disk' and vdi == NULL:
        raise CliFailure('Empty VBDs can only be made for type=CD')
    ref = command.call('VBD.create', {
        'VM': vm, 'VDI': vdi, 'userdevice': command.required('device'), 'bootable': bootable, 'mode': mode,
        'type': kinds[kind], 'unpluggable': unpluggable, 'empty': vdi == NULL, 'qos_algorithm_type': '',
        'qos_algorithm_params': {}, 'other_config': {}})
    command.print_list([command.uuid('VBD', ref)])


def vbd_unplug(command: Command) -> None:
    """With `timeout`, a guest that refuses is waited for."""
    ref = command.ref('VBD', command.required('uuid'))
    command.begin(ref)
    try:
        limit = time.time() + float(command.get('timeout', '0') or '')
    except ValueError:
        raise CliFailure("Failed to parse parameter 'timeout': expecting a float")
    try:
        command.call('VBD.unplug_force' if command.boolean('force') else 'VBD.unplug', ref)
    except Failure as failure:
        if failure.code != 'DEVICE_DETACH_REJECTED':
            raise
        while time.time() < limit:
            time.sleep(min(5.0, max(0.0, limit - time.time())))
            with command.pool.lock:
                if not command.pool.record('VBD', ref)['currently_attached']:
                    return
        raise


def vif_create(command: Command) -> None:
    vm = command.ref('VM', command.required('vm-uuid'))
    network = command.ref('network', command.required('network-uuid'))
    command.begin(vm)
    mac = command.get('mac', '') or ''
    if mac == 'random':
        octet = os.urandom(1)[0]        # one for all six (record_util.ml random_mac_local)
        mac = ':'.join('%02x' % one for one in [octet & 0xfe | 2] + [octet] * 5)
    with command.pool.lock:
        mtu = command.pool.record('network', network)['MTU']
    ref = command.call('VIF.create', {
        'VM': vm, 'network': network, 'device': command.required('device'), 'MAC': mac, 'MTU': mtu, 'other_config': {},
        'qos_algorithm_type': '', 'qos_algorithm_params': {}, 'locking_mode': 'network_default', 'ipv4_allowed': [],
        'ipv6_allowed': []})
    command.print_list([command.uuid('VIF', ref)])


def vif_configure(family: str) -> Callable[[Command], None]:
    def configure(command: Command) -> None:
        ref = command.ref('VIF', command.required('uuid'))
        mode, address = command.required('mode'), command.get('address', '')
        command.begin(ref)
        if mode.lower() not in ('none', 'static'):
            raise CliFailure("Expected 'none' or 'static', got %s" % mode.lower())
        if mode.lower() == 'static' and not address:
            raise CliFailure('Required parameter not found: address')
        command.call('VIF.configure_' + family, ref, mode.capitalize(), address, command.get('gateway', ''))
    return configure


# --- Hosts, SRs, tasks, the pool ----------------------------------------------------------------

def host_forget(command: Command) -> None:
    ref = command.ref('host', command.required('uuid'))
    command.begin(ref)
    if not command.boolean('force'):
        command.conversation.print(
            'WARNING: A host should only be forgotten if it is physically unrecoverable;\n'
            "WARNING: if possible, Hosts should be 'ejected' from the Pool instead.\n"
            'WARNING: Once a host has been forgotten it will have to be re-installed.\n'
            'WARNING: This operation is irreversible.\n')
        if not command.says_yes():
            return
    command.call('host.destroy', ref)


def pool_dump_database(command: Command) -> None:
    filename = command.required('file-name')
    command.begin()
    with command.own_task('Dump database') as task:
        url = command.url('/pool/xmldbdump', task)
        if command.pool.version >= (1, 249):
            # By TLS to the master's own address, also where the command runs on the master.
            with command.pool.lock:
                url = 'https://%s%s' % (command.pool.master_address(), url)
        command.track(task, {'get': url, 'file': filename})


def pool_restore_database(command: Command) -> None:
    filename = command.required('file-name')
    command.begin()
    dry_run = command.get('dry-run') is not None
    if not dry_run and command.get('force') is None:
        raise CliFailure('This operation will restore the database backup to this host, making it the master. All slave '
                         'hosts are assumed dead and they will be forgotten. This operation must be forced (use --force).')
    with command.own_task('Restore database') as task:
        url = command.url('/pool/xmldbdump', task, dry_run=str(dry_run).lower())
        command.track(task, {'put': url, 'file': filename})
    command.print_list(['Dry-run backup restore successful' if dry_run
                        else 'Host will reboot with restored database in 30.000 seconds...'])


def show_help(command: Command) -> None:
    """`help`, and `help COMMAND ...` (rio_help)."""
    command.begin()
    wanted = [name for name, _ in command.parameters
              if name not in ('server', 'username', 'password', 'port', 'minimal', 'all')]
    for name in wanted:
        if name in COMMANDS:
            about = COMMANDS[name]
            command.print_table([cli_help.table(name, list(about.required), about.optional, about.sentence)])
        else:
            command.print_list(["Unknown command '%s'" % name])
    if not wanted:
        command.conversation.print('Usage: xe <command> [param=value ...]\n\nA full list of commands: %s\n'
                                   % ', '.join(sorted(COMMANDS)))


# --- The table of commands ----------------------------------------------------------------------

class Entry(NamedTuple):
    """A command: what must be given (checked before the login), what it does, and what the help says of it."""
    required: Tuple[str, ...]
    run: Callable[[Command], None]
    optional: List[str]
    sentence: str


def _class_commands() -> Dict[str, Entry]:
    """The commands that every class has, each with the help that is made for it (cli_operations.ml gen_frontend)."""
    commands = {}       # type: Dict[str, Entry]

    def add(word: str, verb: str, required: Tuple[str, ...], act: Callable[[Command, str], None], optional: List[str],
            sentence: str) -> None:
        commands['%s-%s' % (word, verb)] = Entry(required, lambda command: act(command, word), optional, sentence)
    for word in list(EMPTY_CLASSES) + list(CLASSES):
        fields = fields_of(word) if word in CLASSES else []
        add(word, 'list', (), list_objects,
            ['params', 'database:'] + [field.name for field in fields]
            + [field.name + ':contains' for field in fields if field.is_set],
            "Lists all the %ss, filtering on the optional arguments. To filter on map parameters, use the syntax "
            "'map-param:key=value'" % word)
    for word in CLASSES:
        fields = fields_of(word)
        writable = [field for field in fields if field.is_writable]
        add(word, 'param-list', ('uuid',), list_parameters, ['database:'],
            'Lists all the parameters of the object specified by the uuid.')
        add(word, 'param-get', ('uuid', 'param-name'), get_parameter, ['param-key', 'database:'],
            "Gets the parameter specified of the object. If the parameter is a map of key=value pairs, use "
            "'param-key=<key>' to get the value associated with a particular key.")
        if writable:
            add(word, 'param-set', ('uuid',), set_parameters,
                [field.name for field in writable if not field.is_set and not field.is_map]
                + [field.name + ':' for field in writable if field.is_map],
                "Sets the parameter specified. If param-value is not given, the parameter is set to a null value. To set a "
                "(key,value) pair in a map parameter, use the syntax 'map-param:key=value'.")
            add(word, 'param-clear', ('uuid', 'param-name'), clear_parameter, [],
                'Clears the specified parameter (param-name can be %s).' % ','.join(
                    field.name for field in fields if field.is_writable or field.is_set or field.is_map))
        if any(field.is_set or field.is_map for field in writable):
            add(word, 'param-add', ('uuid', 'param-name'), add_to_parameter, ['param-key'],
                "Adds to a set or map parameter. If the parameter is a set, use param-key=<key to add>. If the parameter is "
                "a map, pass the values to add as 'key=value' pairs.")
            add(word, 'param-remove', ('uuid', 'param-name', 'param-key'), remove_from_parameter, [],
                'Removes a member or a key,value pair from a set/map respectively.')
    return commands


COMMANDS = _class_commands()
COMMANDS['help'] = Entry((), show_help, [], 'Show help about a command')
COMMANDS.update((name, Entry(tuple(cli_help.HELP[name][0].split()), run, cli_help.HELP[name][1].split(),
                             cli_help.HELP[name][2])) for name, run in {
    'vm-export': vm_export,
    'snapshot-export-to-template': snapshot_export,
    'template-export': template_export,
    'vm-import': vm_import,
    'vm-install': vm_install,
    'vm-snapshot': snapshot_by('VM.snapshot'),
    'vm-snapshot-with-quiesce': snapshot_by('VM.snapshot_with_quiesce'),
    'vm-checkpoint': snapshot_by('VM.checkpoint'),
    'vm-clone': vm_clone,
    'vm-copy': vm_copy,
    'vm-start': power_by(lambda c: ('VM.start', [c.boolean('paused'), c.boolean('force')]), ['on', 'paused', 'progress']),
    'vm-shutdown': power_by(lambda c: ('VM.hard_shutdown' if c.boolean('force') else 'VM.clean_shutdown', []),
                            ['progress', 'compress']),
    'vm-reboot': power_by(lambda c: ('VM.hard_reboot' if c.boolean('force') else 'VM.clean_reboot', []), ['progress']),
    'vm-suspend': power_by(lambda c: ('VM.suspend', []), ['progress']),
    'vm-resume': power_by(lambda c: ('VM.resume', [False, c.boolean('force')]), ['on', 'progress']),
    'vm-pause': power_by(lambda c: ('VM.pause', [])),
    'vm-unpause': power_by(lambda c: ('VM.unpause', [])),
    'vm-reset-powerstate': vm_reset_powerstate,
    'vm-memory-limits-set': vm_memory_limits_set,
    'vm-destroy': destroy_by('VM', 'uuid'),
    'vm-uninstall': vm_uninstall,
    'vm-disk-list': vm_disk_list,
    'vm-vif-list': vm_vif_list,
    'snapshot-revert': snapshot_revert,
    'snapshot-clone': snapshot_clone,
    'snapshot-destroy': snapshot_destroy,
    'snapshot-uninstall': snapshot_uninstall,
    'template-uninstall': template_uninstall,
    'vdi-export': vdi_export,
    'vdi-import': vdi_import,
    'vdi-snapshot': vdi_snapshot,
    'vdi-clone': vdi_clone,
    'vdi-copy': vdi_copy,
    'vdi-create': vdi_create,
    'vdi-pool-migrate': vdi_pool_migrate,
    'vdi-data-destroy': on_object('VDI', 'VDI.data_destroy'),
    'vdi-destroy': destroy_by('VDI', 'uuid'),
    'vdi-resize': vdi_resize,
    'vbd-create': vbd_create,
    'vbd-destroy': destroy_by('VBD', 'uuid'),
    'vbd-plug': on_object('VBD', 'VBD.plug'),
    'vbd-unplug': vbd_unplug,
    'vif-create': vif_create,
    'vif-destroy': destroy_by('VIF', 'uuid'),
    'vif-plug': on_object('VIF', 'VIF.plug'),
    'vif-unplug': on_object('VIF', 'VIF.unplug'),
    'vif-move': on_object('VIF', 'VIF.move', ('network', 'network-uuid')),
    'vif-configure-ipv4': vif_configure('ipv4'),
    'vif-configure-ipv6': vif_configure('ipv6'),
    'message-destroy': destroy_by('message', 'uuid'),
    'sr-scan': on_object('SR', 'SR.scan'),
    'sr-update': on_object('SR', 'SR.update'),
    'pbd-plug': on_object('PBD', 'PBD.plug'),
    'pbd-unplug': on_object('PBD', 'PBD.unplug'),
    'task-cancel': on_object('task', 'task.cancel'),
    'host-forget': host_forget,
    'pool-dump-database': pool_dump_database,
    'pool-restore-database': pool_restore_database,
}.items())

#: Commands that move data: the fault `kill` strikes when half of it has gone by.
STREAMING = {'vm-export', 'snapshot-export-to-template', 'template-export', 'vm-import', 'vdi-export', 'vdi-import',
             'pool-dump-database', 'pool-restore-database'}


# --- Failures -----------------------------------------------------------------------------------

def failure_text(pool: Any, failure: Failure) -> str:
    """What `xe` prints for a failure of the API (cli_util.ml get_server_error)."""
    known = documented(failure.code)
    if known is None:
        return 'Error code: %s\nError parameters: %s\n' % (failure.code, ', '.join(failure.params))
    names, sentence = known
    with pool.lock:
        values = [readable(pool, value) for value in failure.params]
    lines = [sentence]
    for number in range(max(len(names), len(values))):
        lines.append('%s: %s' % (names[number] if number < len(names) else '<extra>',
                                 values[number] if number < len(values) else '<unknown>'))
    return ''.join(line + '\n' for line in lines)


def readable(pool: Any, value: str) -> str:
    """A reference as `uuid (name)`; anything else as it is (cli_util.ml ref_convert)."""
    record = look_up(pool, value) if value.startswith('OpaqueRef:') else None
    if record is None:
        return value
    return '%s (%s)' % (record['uuid'], record['name_label']) if 'name_label' in record else record['uuid']


def text_and_status(pool: Any, error: Exception) -> Tuple[str, str, int]:
    """(stdout, stderr, exit status) for whatever ended a command (xapi_cli.ml exception_handler)."""
    if isinstance(error, Failure):
        if error.code == 'SESSION_AUTHENTICATION_FAILED':
            return '', 'Authentication failed\n' + HELP_HINT, 1
        return '', failure_text(pool, error), 1
    if isinstance(error, Refused):
        return '', '%s\n%s' % (error, HELP_HINT), 1
    if isinstance(error, MissingField):
        return '', 'Error code: Missing parameter\nError parameters: %s\n' % error, 1
    if isinstance(error, SeveralFailed):
        return ''.join('operation failed on %s: %s\n' % pair for pair in error.args[0]), '', 1
    return '', 'Error: %s\n' % error, 1


# --- Serving ------------------------------------------------------------------------------------

def serve(server: Any, request: Any, body: Dict[str, Any]) -> None:
    """POST /cli: one command from its arguments to its exit status."""
    conversation = Conversation(request)
    # The real client joins its arguments with newlines: one that holds a newline becomes two.
    words = '\n'.join(body['args']).split('\n')
    with server.pool.lock:
        host = server.pool.record('host', request.host_ref)
    entry = server.journal.entry('xe', words[0] if words else '', words[1:], host['name_label'], body.get('user', ''))
    try:
        request.sock.sendall(b'HTTP/1.0 200 OK\r\n\r\n')
        conversation.order(host=host['address'])
        status = run(server, request, conversation, words, body, entry)
        conversation.order(exit=status)
    except (ClientGone, OSError):
        entry.result = ['CLIENT_GONE']
    except faults.Drop:
        entry.result = 'no answer'
        raise
    finally:
        entry.close()


def run(server: Any, request: Any, conversation: Conversation, words: List[str], body: Dict[str, Any], entry: Any) -> int:
    """Runs the command; its exit status."""
    command = None      # type: Optional[Command]
    output, errors, status = '', '', 0
    try:
        name, parameters = parse(words)
        chosen = COMMANDS.get(name)
        if chosen is None:
            raise Refused('Unknown command: %s' % name)
        command = Command(server, request, conversation, name, parameters, entry)
        command.client_pid = int(body.get('pid', 0))
        for key in chosen.required:
            command.required(key)
        command.session = login(server, request, body)
        chosen.run(command)
        if command.occasion is not None:
            command.occasion.after()
    except ExitWith as end:
        status = end.args[0]
        entry.result = ['EXIT', str(status)]
    except (Failure, CliFailure, Refused, MissingField, SeveralFailed) as error:
        output, errors, status = text_and_status(server.pool, error)
        entry.result = error.description() if isinstance(error, Failure) else ['ERROR', str(error)]
    finally:
        if command is not None and command.session != NULL:
            with server.pool.lock:
                server.pool.logout(command.session)
    if command is not None and command.occasion is not None and command.occasion.exit is not None:
        status, errors = command.occasion.exit
    if output:
        conversation.print(output)
    if errors:
        conversation.complain(errors)
    return status


def login(server: Any, request: Any, body: Dict[str, Any]) -> str:
    user, password = body.get('user', ''), body.get('password', '')
    if not request.is_unix and not user:
        raise CliFailure('Username/password must be specified')
    with server.pool.lock:
        session = server.pool.login_with_password(request.host_ref, user, password, 'xe', request.is_unix)
    server.journal.name_session(session)
    return session
