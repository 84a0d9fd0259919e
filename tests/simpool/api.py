"""The XML-RPC face of the pool: which methods there are, with which parameters, and what each of them does.

Strict as the generated dispatcher of the real server (gen_server.ml, v26.17.0): first the method must exist, then the number
of parameters must fit, then their types, then the session must be good. What is not modelled is an unknown method.
"""

import ipaddress
import json
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import wire
from faults import Drop
from lifecycle import POWER_STATES
from model import Pool, seconds_of
from schema import CLASSES, CONSTRUCTORS, NULL, Failure, Filter, convert

#: Delay after a wrong password: 5 s on the real server (xapi_session.ml), shortened here.
WRONG_PASSWORD_DELAY_S = 0.2

#: Classes whose objects have no get_all.
NOT_LISTED = ("session", "user")

NO_DEFAULT = object()


class Call:
    """One call that is being carried out."""

    def __init__(self, pool: Pool, host: str, session: str = "", is_unix: bool = False, task: Optional[str] = None) -> None:
        self.pool = pool
        self.host = host
        self.session = session
        self.is_unix = is_unix
        #: the task of an Async call, under which the work is done
        self.task = task


class Method:
    """One method of the API."""

    def __init__(self, name: str, parameters: List[Tuple[str, str, Any]], result: str, run: Callable[..., Any],
                 needs_session: bool = True, has_async: bool = False, constructs: str = "", removed: bool = False) -> None:
        self.name = name
        self.parameters = parameters
        self.result = result
        self.run = run
        self.needs_session = needs_session
        self.has_async = has_async
        self.constructs = constructs
        self.removed = removed

    def arguments(self, given: List[Any]) -> List[Any]:
        """The parameters (without the session) checked, converted and filled up."""
        mandatory = [name for name, _, default in self.parameters if default is NO_DEFAULT]
        if not len(mandatory) <= len(given) <= len(self.parameters):
            raise Failure("MESSAGE_PARAMETER_COUNT_MISMATCH", self.name, str(len(mandatory)), str(len(given)))
        if self.constructs:
            return [self._constructor_fields(given[0])]
        arguments = []
        for number, (name, type_text, default) in enumerate(self.parameters):
            value = given[number] if number < len(given) else default
            try:
                arguments.append(convert(type_text, value))
            except ValueError as error:
                raise Failure("INTERNAL_ERROR", "Rpc.Runtime_error(\"%s of %s: %s\")" % (name, self.name, error))
        return arguments

    def _constructor_fields(self, given: Any) -> Dict[str, Any]:
        """The struct of a constructor. A missing field is a failure, and so is one that the class does not have."""
        if not isinstance(given, dict):
            raise Failure("INTERNAL_ERROR", "Failure(\"bad __structure\")")
        needed, optional = CONSTRUCTORS[self.constructs]
        for name in needed:
            if name not in given:
                raise Failure("INTERNAL_ERROR", "Server_helpers.Dispatcher_FieldNotFound(\"%s\")" % name)
        fields = {}
        for name, value in given.items():
            field = CLASSES[self.constructs].fields.get(name)
            if field is None:
                raise Failure("INTERNAL_ERROR", "Server_helpers.Dispatcher_FieldNotFound(\"%s\")" % name)
            if name not in needed and name not in optional:
                continue  # a field that only the server sets: ignored, so whole records can be passed
            try:
                fields[name] = convert(field.type, value)
            except ValueError as error:
                raise Failure("INTERNAL_ERROR", "Rpc.Runtime_error(\"%s: %s\")" % (name, error))
        return fields


class Prepared:
    """A result that is XML text already."""

    def __init__(self, text: str) -> None:
        self.text = text


class Api:
    """All methods for one pool, and the way in: `handle`."""

    def __init__(self, pool: Pool, server: Any) -> None:
        self.pool = pool
        self.server = server
        self.cache = wire.RecordCache()
        pool.on_touch.append(self.cache.touch)
        self.methods = {}  # type: Dict[str, Method]
        for cls in CLASSES:
            if cls != "message":
                _add_class(self, cls)
        for add in (_add_session, _add_task, _add_message, _add_event, _add_vm, _add_devices, _add_disks, _add_rest):
            add(self)

    def add(self, name: str, parameters: str, result: str, run: Callable[..., Any], **options: Any) -> None:
        """Add a method. `parameters`: "name: type, name: type = default" where the default is a JSON value."""
        parsed = []
        for part in parameters.split(",") if parameters else []:
            declared, _, default = part.partition("=")
            parameter, _, type_text = declared.partition(":")
            parsed.append((parameter.strip(), type_text.strip(), json.loads(default) if default else NO_DEFAULT))
        self.methods[name] = Method(name, parsed, result, run, **options)

    # --- the way in

    def handle(self, host: str, is_unix: bool, name: str, given: List[Any]) -> bytes:
        """The response to one XML-RPC call that came to this host. Raises Drop if there shall be none."""
        try:
            result_type, value = self.call(host, is_unix, name, given)
        except Failure as error:
            return wire.failure(error.description())
        return wire.success(value.text if isinstance(value, Prepared) else wire.writer(result_type)(value))

    def handle_json(self, host: str, is_unix: bool, request: Any) -> Dict[str, Any]:
        """The response to one JSON-RPC call, as a JSON value."""
        version2 = request.get("jsonrpc") == "2.0"
        number = request.get("id")
        given = request.get("params", [])
        if not isinstance(request.get("method"), str) or not isinstance(given, list):
            raise ValueError("not a call")
        try:
            _, value = self.call(host, is_unix, request["method"], given, as_xml=False)
        except Failure as error:
            if version2:
                return {"jsonrpc": "2.0", "error": {"code": 1, "message": error.code, "data": list(error.params)},
                        "id": number}
            return {"result": {"Status": "Failure", "ErrorDescription": error.description()}, "error": None, "id": number}
        if version2:
            return {"jsonrpc": "2.0", "result": value, "id": number}
        return {"result": {"Status": "Success", "Value": value}, "error": None, "id": number}

    def call(self, host: str, is_unix: bool, name: str, given: List[Any], as_xml: bool = True) -> Tuple[str, Any]:
        """Carry out one call: (type of the result, result). Journalled, and where faults act."""
        entry = self.server.journal.entry("api", name, self._journal_args(name, given), self._host_name(host), "")
        try:
            entry.user = self._user_of(name, given)
            is_async = name.startswith("Async.")
            plain = name[len("Async."):] if is_async else name
            occasion = self.server.faults.at("api", name, self._objects(given), entry, also=plain if is_async else "")
            if is_async:
                result = self._begin(host, is_unix, plain, given, occasion)
            else:
                occasion.before()
                result = self._carry_out(host, is_unix, plain, given, as_xml)
                occasion.after()
            return result
        except Failure as error:
            entry.result = error
            raise
        except Drop:
            entry.result = "no answer"
            raise
        except Exception as error:
            entry.result = Failure("INTERNAL_ERROR", repr(error))
            self.server.report_bug("api:" + name)
            raise entry.result
        finally:
            entry.close()

    def _prepare(self, host: str, is_unix: bool, name: str, given: List[Any]) -> Tuple[Method, List[Any], Call]:
        """Everything that is checked before a method runs."""
        method = self.methods.get(name)
        if method is None:
            raise Failure("MESSAGE_METHOD_UNKNOWN", name)
        if not method.needs_session:
            return method, method.arguments(given), Call(self.pool, host, is_unix=is_unix)
        if not given:
            raise Failure("MESSAGE_PARAMETER_COUNT_MISMATCH", name, str(len(
                [1 for _, _, default in method.parameters if default is NO_DEFAULT])), "-1")
        arguments = method.arguments(given[1:])
        session = given[0]
        with self.pool.lock:
            if not self.pool.is_master(host) and not is_unix:
                # session_check.ml: a member knows only its local sessions, and those don't do for this
                raise Failure("HOST_IS_SLAVE", self.pool.master_address())
            self.pool.resolve_session(session)
        if method.removed:
            raise Failure("MESSAGE_REMOVED")
        return method, arguments, Call(self.pool, host, session=session, is_unix=is_unix)

    def _carry_out(self, host: str, is_unix: bool, name: str, given: List[Any], as_xml: bool) -> Tuple[str, Any]:
        method, arguments, call = self._prepare(host, is_unix, name, given)
        value = method.run(call, *arguments)
        if isinstance(value, _Records):
            with self.pool.lock:
                return method.result, value.prepared(self.cache) if as_xml else value.plain()
        return method.result, value

    def call_within(self, host: str, session: str, name: str, given: List[Any]) -> Any:
        """A call that the server makes for an `xe` command: neither journalled nor touched by faults; its result as a value."""
        method, arguments, call = self._prepare(host, True, name, [session] + given)
        value = method.run(call, *arguments)
        if isinstance(value, _Records):
            with self.pool.lock:
                return value.plain()
        return value

    def _begin(self, host: str, is_unix: bool, name: str, given: List[Any], occasion: Any) -> Tuple[str, Any]:
        """An Async call: the checks, then a task that a thread works on."""
        method, arguments, call = self._prepare(host, is_unix, name, given)
        if not method.has_async:
            raise Failure("MESSAGE_METHOD_UNKNOWN", "Async." + name)
        task = call.task = self.pool.create_task("Async." + name, host=host)

        def work() -> None:
            try:
                occasion.before()
                value = method.run(call, *arguments)
                occasion.after()
                self.pool.finish_task(task, wire.writer(method.result)(value))
            except Failure as error:
                self.pool.fail_task(task, error)
            except Drop:
                pass  # nobody will ever finish this task
            except Exception as error:
                self.server.report_bug("api:Async." + name)
                self.pool.fail_task(task, Failure("INTERNAL_ERROR", repr(error)))

        thread = threading.Thread(target=work, name="Async." + name)
        thread.daemon = True
        thread.start()
        return "string", task

    # --- for the journal and the faults

    def _host_name(self, host: str) -> str:
        with self.pool.lock:
            return self.pool.record("host", host)["name_label"]

    def _user_of(self, name: str, given: List[Any]) -> str:
        if name.startswith("session.") and name.endswith("login_with_password"):
            return given[0] if given and isinstance(given[0], str) else ""
        with self.pool.lock:
            session = self.pool.tables["session"].get(given[0]) if given and isinstance(given[0], str) else None
            return session["auth_user_name"] if session else ""

    def _journal_args(self, name: str, given: List[Any]) -> List[Any]:
        if name.startswith("session.") and name.endswith("login_with_password"):
            return [given[number] if number != 1 else "***" for number in range(len(given))]
        if given and isinstance(given[0], str) and given[0].startswith("OpaqueRef:"):
            self.server.journal.name_session(given[0])
        return given

    def _objects(self, given: List[Any]) -> List[str]:
        """Names and uuids of the VMs and disks that the arguments point at."""
        names = []  # type: List[str]
        for argument in given[1:]:
            values = list(argument.values()) if isinstance(argument, dict) else [argument]
            for value in values:
                if isinstance(value, str) and value.startswith("OpaqueRef:"):
                    names.extend(self.pool.names_of(value))
        return names


class _Records:
    """A map of records as a result: written from the cache for XML, plain for JSON."""

    def __init__(self, cls: str, records: Dict[str, Dict[str, Any]], single: str = "") -> None:
        self.cls = cls
        self.records = records
        self.single = single

    def prepared(self, cache: wire.RecordCache) -> Prepared:
        if self.single:
            if self.single not in self.records:
                raise Failure("HANDLE_INVALID", self.cls, self.single)
            return Prepared(cache.text(self.cls, self.single, self.records[self.single]))
        return Prepared(cache.map_text(self.cls, self.records))

    def plain(self) -> Any:
        if self.single:
            return dict(self.records[self.single])
        return {ref: dict(record) for ref, record in self.records.items()}


def _reference_is_good(pool: Pool, target: Optional[str], value: Any) -> None:
    if target in CLASSES and isinstance(value, str) and value not in (NULL, ""):
        pool.record(target, value)


# ---------------------------------------------------------------------------------------------------------------------
# What every class has


def _add_class(api: Api, cls: str) -> None:
    pool = api.pool
    definition = CLASSES[cls]
    reference = "ref " + cls

    def get_all(call: Call) -> List[str]:
        with pool.lock:
            return sorted(pool.tables[cls], reverse=True)

    def get_all_records(call: Call) -> _Records:
        with pool.lock:
            return _Records(cls, dict(pool.tables[cls]))

    def get_all_records_where(call: Call, expr: str) -> _Records:
        condition = Filter(cls, expr)
        with pool.lock:
            return _Records(cls, {ref: record for ref, record in pool.tables[cls].items() if condition.matches(record)})

    def get_record(call: Call, self: str) -> _Records:
        with pool.lock:
            pool.record(cls, self)
            return _Records(cls, {self: pool.tables[cls][self]}, single=self)

    def get_by_uuid(call: Call, uuid: str) -> str:
        with pool.lock:
            return pool.ref_of(cls, uuid)

    def get_by_name_label(call: Call, label: str) -> List[str]:
        with pool.lock:
            return sorted(pool.by_name(cls, label), reverse=True)

    if cls not in NOT_LISTED:
        api.add(cls + ".get_all", "", "set " + reference, get_all)
        api.add(cls + ".get_all_records", "", "map %s record %s" % (reference, cls), get_all_records)
        api.add(cls + ".get_all_records_where", "expr: string", "map %s record %s" % (reference, cls), get_all_records_where)
    api.add(cls + ".get_record", "self: " + reference, "record " + cls, get_record)
    api.add(cls + ".get_by_uuid", "uuid: string", reference, get_by_uuid)
    if definition.has_names and cls != "pool":
        api.add(cls + ".get_by_name_label", "label: string", "set " + reference, get_by_name_label)
    for field in definition.fields.values():
        api.add("%s.get_%s" % (cls, field.name), "self: " + reference, field.type, _getter(pool, cls, field.name))
        if field.writable:
            _add_setters(api, cls, field)


def _getter(pool: Pool, cls: str, field: str) -> Callable[..., Any]:
    def get(call: Call, self: str) -> Any:
        with pool.lock:
            value = pool.record(cls, self)[field]
            return list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else value
    return get


def _add_setters(api: Api, cls: str, field: Any) -> None:
    pool = api.pool
    name = field.name
    reference = "ref " + cls

    def assert_settable(self: str) -> Dict[str, Any]:
        record = pool.record(cls, self)
        if cls == "VDI" and name == "on_boot":
            # message_forwarding.ml ensure_vdi_not_on_running_vm, xapi_vdi.ml set_on_boot, v24.19.2
            for vbd in record["VBDs"]:
                vm = pool.record("VBD", vbd)["VM"]
                state = pool.record("VM", vm)["power_state"]
                if state != "Halted":
                    raise Failure("VM_BAD_POWER_STATE", vm, "halted", state.lower())
            if record["cbt_enabled"]:
                raise Failure("VDI_CBT_ENABLED", self)
        if cls == "VDI" and name in ("name_label", "name_description", "on_boot"):
            pool.assert_sr_answers(record["SR"])  # the storage manager keeps these
        return record

    def set_value(call: Call, self: str, value: Any) -> None:
        with pool.lock:
            assert_settable(self)
            _reference_is_good(pool, field.target, value)
            pool.set_field(cls, self, name, value)
            if cls == "VDI" and name == "on_boot":
                pool.note_on_boot(self)
            pool.update_allowed_operations(cls, self)

    def add_to(call: Call, self: str, key: str, value: Any) -> None:
        with pool.lock:
            if key in assert_settable(self)[name]:
                raise Failure("MAP_DUPLICATE_KEY", cls, name, self, key)
            pool.set_key(cls, self, name, key, value)
            pool.update_allowed_operations(cls, self)

    def remove_from(call: Call, self: str, key: str) -> None:
        with pool.lock:
            assert_settable(self)
            pool.drop_key(cls, self, name, key)
            pool.update_allowed_operations(cls, self)

    def add_member(call: Call, self: str, value: str) -> None:
        with pool.lock:
            members = assert_settable(self)[name]
            if value not in members:
                pool.set_field(cls, self, name, members + [value])

    def remove_member(call: Call, self: str, value: str) -> None:
        with pool.lock:
            members = assert_settable(self)[name]
            if value in members:
                pool.set_field(cls, self, name, [member for member in members if member != value])

    api.add("%s.set_%s" % (cls, name), "self: %s, value: %s" % (reference, field.type), "void", set_value)
    if field.kind == "map":
        api.add("%s.add_to_%s" % (cls, name), "self: %s, key: string, value: string" % reference, "void", add_to)
        api.add("%s.remove_from_%s" % (cls, name), "self: %s, key: string" % reference, "void", remove_from)
    elif field.type == "set string":
        api.add("%s.add_%s" % (cls, name), "self: %s, value: string" % reference, "void", add_member)
        api.add("%s.remove_%s" % (cls, name), "self: %s, value: string" % reference, "void", remove_member)


# ---------------------------------------------------------------------------------------------------------------------
# session, task, message, event


def _add_session(api: Api) -> None:
    pool = api.pool

    def login_with_password(call: Call, uname: str, pwd: str, version: str, originator: str) -> str:
        try:
            with pool.lock:
                return pool.login_with_password(call.host, uname, pwd, originator, call.is_unix)
        except Failure as error:
            if error.code == "SESSION_AUTHENTICATION_FAILED":
                time.sleep(WRONG_PASSWORD_DELAY_S)
            raise

    def slave_local_login_with_password(call: Call, uname: str, pwd: str) -> str:
        with pool.lock:
            if not call.is_unix and (uname != "root" or pwd != pool.password):
                raise Failure("SESSION_AUTHENTICATION_FAILED", uname, "Authentication failure")
            return pool.local_login()

    def logout(call: Call) -> None:
        with pool.lock:
            pool.logout(call.session)

    def local_logout(call: Call, session: str) -> None:
        with pool.lock:
            if session not in pool.local_sessions:
                raise Failure("SESSION_INVALID", session)
            pool.local_sessions.discard(session)

    api.add("session.login_with_password", 'uname: string, pwd: string, version: string = "1.1", originator: string = ""',
            "string", login_with_password, needs_session=False)
    api.add("session.slave_local_login_with_password", "uname: string, pwd: string", "string",
            slave_local_login_with_password, needs_session=False)
    api.add("session.logout", "", "void", logout)
    api.add("session.local_logout", "session: string", "void", local_logout, needs_session=False)


def _add_task(api: Api) -> None:
    pool = api.pool

    def create(call: Call, label: str, description: str) -> str:
        return pool.create_task(label, description, call.session, host=call.host)

    def destroy(call: Call, self: str) -> None:
        pool.destroy_task(self)

    def cancel(call: Call, task: str) -> None:
        pool.cancel_task(task)

    def set_status(call: Call, self: str, value: str) -> None:
        with pool.lock:
            pool.set_field("task", self, "status", value)
            if value not in ("pending", "cancelling"):
                pool.set_fields("task", self, {"finished": pool.now(), "progress": 1.0, "allowed_operations": []})

    def set_progress(call: Call, self: str, value: float) -> None:
        with pool.lock:
            pool.record("task", self)
            pool.set_progress(self, value)

    def set_result(call: Call, self: str, value: str) -> None:
        with pool.lock:
            pool.set_field("task", self, "result", value)

    def set_error_info(call: Call, self: str, value: List[str]) -> None:
        with pool.lock:
            pool.set_field("task", self, "error_info", value)

    api.add("task.create", "label: string, description: string", "ref task", create)
    api.add("task.destroy", "self: ref task", "void", destroy)
    api.add("task.cancel", "task: ref task", "void", cancel, has_async=True)
    if pool.has_task_set_status():
        api.add("task.set_status", "self: ref task, value: " + CLASSES["task"].fields["status"].type, "void", set_status)
    if pool.has_task_set_progress():
        api.add("task.set_progress", "self: ref task, value: float", "void", set_progress)
    if pool.has_task_set_result():
        api.add("task.set_result", "self: ref task, value: string", "void", set_result)
        api.add("task.set_error_info", "self: ref task, value: set string", "void", set_error_info)


def _add_message(api: Api) -> None:
    """Messages are files on the real server, not rows: no getters for fields, and calls of their own (xapi_message.ml)."""
    pool = api.pool
    owners = {"VM": "VM", "Host": "host", "SR": "SR", "Pool": "pool", "VDI": "VDI"}

    def chosen(condition: Callable[[Dict[str, Any]], bool]) -> _Records:
        with pool.lock:
            return _Records("message", {ref: record for ref, record in pool.tables["message"].items() if condition(record)})

    def create(call: Call, name: str, priority: str, cls: str, obj_uuid: str, body: str) -> str:
        with pool.lock:
            if cls in owners:
                try:
                    pool.ref_of(owners[cls], obj_uuid)
                except Failure:
                    raise Failure("UUID_INVALID", cls, obj_uuid)
            return pool.create_message(name, cls, obj_uuid, body, int(priority))

    def destroy(call: Call, self: str) -> None:
        with pool.lock:
            pool.destroy_row("message", self)

    def destroy_many(call: Call, messages: List[str]) -> None:
        with pool.lock:
            for message in messages:
                pool.destroy_row("message", message)

    def get(call: Call, cls: str, obj_uuid: str, since: str) -> _Records:
        moment = seconds_of(since)
        return chosen(lambda record: record["cls"] == cls and record["obj_uuid"] == obj_uuid and
                      seconds_of(record["timestamp"]) > moment)

    def get_since(call: Call, since: str) -> _Records:
        moment = seconds_of(since)
        return chosen(lambda record: seconds_of(record["timestamp"]) > moment)

    def get_all(call: Call) -> List[str]:
        with pool.lock:
            return sorted(pool.tables["message"], reverse=True)

    def get_all_records(call: Call) -> _Records:
        return chosen(lambda record: True)

    def get_all_records_where(call: Call, expr: str) -> _Records:
        return chosen(Filter("message", expr).matches)

    def get_record(call: Call, self: str) -> _Records:
        with pool.lock:
            pool.record("message", self)
            return _Records("message", {self: pool.tables["message"][self]}, single=self)

    def get_by_uuid(call: Call, uuid: str) -> str:
        with pool.lock:
            return pool.ref_of("message", uuid)

    records = "map ref message record message"
    cls_type = CLASSES["message"].fields["cls"].type
    api.add("message.create", "name: string, priority: int, cls: %s, obj_uuid: string, body: string" % cls_type,
            "ref message", create)
    api.add("message.destroy", "self: ref message", "void", destroy)
    api.add("message.destroy_many", "messages: set ref message", "void", destroy_many, has_async=True)
    api.add("message.get", "cls: %s, obj_uuid: string, since: datetime" % cls_type, records, get)
    api.add("message.get_since", "since: datetime", records, get_since)
    api.add("message.get_all", "", "set ref message", get_all)
    api.add("message.get_all_records", "", records, get_all_records)
    api.add("message.get_all_records_where", "expr: string", records, get_all_records_where)
    api.add("message.get_record", "self: ref message", "record message", get_record)
    api.add("message.get_by_uuid", "uuid: string", "ref message", get_by_uuid)


def _add_event(api: Api) -> None:
    pool = api.pool

    def wanted(classes: List[str], cls: str, ref: str) -> bool:
        names = ("*", cls.lower(), "%s/%s" % (cls.lower(), ref))
        return any(entry.lower() == names[0] or entry.lower() == names[1] or
                   entry.lower() == names[2].lower() for entry in classes)

    def event(number: int, cls: str, ref: str, operation: str) -> Dict[str, Any]:
        record = pool.tables[cls].get(ref)
        return {"id": str(number), "timestamp": "0.0", "class": cls.lower(), "operation": operation, "ref": ref,
                "table": cls, "snapshot": dict(record) if record and operation != "del" else None}

    def since(classes: List[str], number: int) -> List[Dict[str, Any]]:
        latest = {}  # type: Dict[Tuple[str, str], Tuple[int, str]]
        for at, cls, ref, operation in reversed(pool.events):
            if at <= number:
                break
            if not wanted(classes, cls, ref):
                continue
            known = latest.get((cls, ref))
            if known is None:
                latest[cls, ref] = (at, operation)
            elif operation == "add" and known[1] == "mod":
                latest[cls, ref] = (known[0], "add")
        return [event(at, cls, ref, operation) for (cls, ref), (at, operation) in
                sorted(latest.items(), key=lambda item: item[1][0])]

    def event_from(call: Call, classes: List[str], token: str, timeout: float) -> Dict[str, Any]:
        deadline = time.time() + timeout
        with pool.lock:
            if token:
                try:
                    number = int(token.split(",")[0])
                except ValueError:
                    raise Failure("EVENT_FROM_TOKEN_PARSE_FAILURE", token)
                found = since(classes, number)
                while not found and time.time() < deadline and not pool.stopping:
                    pool.changed.wait(min(1.0, max(0.0, deadline - time.time())))
                    found = since(classes, number)
            else:
                found = [event(pool.generation, cls, ref, "add") for cls in CLASSES for ref in sorted(pool.tables[cls])
                         if wanted(classes, cls, ref)]
            counts = {cls.lower(): len(pool.tables[cls]) for cls in CLASSES}
            return {"events": found, "valid_ref_counts": counts, "token": "%d,0" % pool.generation}

    def get_current_id(call: Call) -> str:
        with pool.lock:
            return str(pool.generation)

    api.add("event.from", "classes: set string, token: string, timeout: float", "event_batch", event_from)
    api.add("event.get_current_id", "", "int", get_current_id)


# ---------------------------------------------------------------------------------------------------------------------
# VM


def _add_vm(api: Api) -> None:
    pool = api.pool
    vm = "vm: ref VM"

    def snapshot(call: Call, vm: str, new_name: str, ignore_vdis: Any = ()) -> str:
        return pool.vm_snapshot(vm, new_name, ignore_vdis, call.task)

    def power_change(begin: Callable[..., Any], *fixed: Any) -> Callable[..., Any]:
        def run(call: Call, vm: str) -> None:
            begin(vm, *fixed, task=call.task)
        return run

    def start(call: Call, vm: str, start_paused: bool, force: bool) -> None:
        pool.vm_start(vm, start_paused, None, call.task)

    def start_on(call: Call, vm: str, host: str, start_paused: bool, force: bool) -> None:
        with pool.lock:
            pool.record("host", host)
            pool.record("VM", vm)
            if not pool.is_live(host):
                raise Failure("HOST_OFFLINE", host)
            if not pool.sees_all(host, pool.srs_of_vm(vm)):
                raise Failure("VM_REQUIRES_SR", vm, pool.srs_of_vm(vm)[0])
        pool.vm_start(vm, start_paused, host, call.task)

    def resume(call: Call, vm: str, start_paused: bool, force: bool) -> None:
        pool.vm_resume(vm, start_paused, call.task)

    def shutdown(call: Call, vm: str) -> None:
        pool.vm_shutdown(vm, "clean_shutdown", call.task)

    def assert_operation_valid(call: Call, self: str, op: str) -> None:
        with pool.lock:
            if op not in POWER_STATES:
                raise Failure("INTERNAL_ERROR", "Record_util.Record_failure(\"%s\")" % op)
            pool.assert_allowed("VM", self, op)

    def update_allowed_operations(call: Call, self: str) -> None:
        with pool.lock:
            pool.record("VM", self)
            pool.update_allowed_operations("VM", self)

    def get_possible_hosts(call: Call, vm: str) -> List[str]:
        with pool.lock:
            return sorted(pool.hosts_that_see(pool.srs_of_vm(vm)))

    def assert_can_boot_here(call: Call, self: str, host: str) -> None:
        with pool.lock:
            pool.record("host", host)
            needed = pool.srs_of_vm(self)
            if not pool.is_live(host):
                raise Failure("HOST_NOT_LIVE")
            for sr in needed:
                if not pool.sees_all(host, [sr]):
                    raise Failure("VM_REQUIRES_SR", self, sr)

    def allowed_vif_devices(call: Call, vm: str) -> List[str]:
        with pool.lock:
            taken = {pool.tables["VIF"][vif]["device"] for vif in pool.record("VM", vm)["VIFs"]}
            return [str(number) for number in range(7) if str(number) not in taken]

    def allowed_vbd_devices(call: Call, vm: str) -> List[str]:
        with pool.lock:
            return pool.free_devices(vm)

    api.add("VM.create", "args: struct", "ref VM", lambda call, fields: pool.vm_create(fields), constructs="VM", has_async=True)
    api.add("VM.destroy", "self: ref VM", "void", lambda call, self: pool.vm_destroy(self, call.task), has_async=True)
    parameters = vm + ", new_name: string"
    api.add("VM.snapshot", parameters + (", ignore_vdis: set ref VDI = []" if pool.has_ignore_vdis() else ""), "ref VM",
            snapshot, has_async=True)
    api.add("VM.snapshot_with_quiesce", parameters, "ref VM", lambda call, vm, new_name: pool.vm_snapshot_with_quiesce(
        vm, new_name, call.task), has_async=True, removed=not pool.has_quiesce())
    api.add("VM.checkpoint", parameters, "ref VM", lambda call, vm, new_name: pool.vm_checkpoint(vm, new_name, call.task),
            has_async=True)
    api.add("VM.clone", parameters, "ref VM", lambda call, vm, new_name: pool.vm_clone(vm, new_name, call.task), has_async=True)
    api.add("VM.copy", parameters + ", sr: ref SR", "ref VM", lambda call, vm, new_name, sr: pool.vm_copy(
        vm, new_name, sr, call.task), has_async=True)
    api.add("VM.revert", "snapshot: ref VM", "void", lambda call, snapshot: pool.vm_revert(snapshot, call.task), has_async=True)
    api.add("VM.power_state_reset", vm, "void", lambda call, vm: pool.vm_power_state_reset(vm), has_async=True)
    api.add("VM.provision", vm, "void", power_change(pool.vm_provision), has_async=True)
    api.add("VM.start", vm + ", start_paused: bool, force: bool", "void", start, has_async=True)
    api.add("VM.start_on", vm + ", host: ref host, start_paused: bool, force: bool", "void", start_on, has_async=True)
    api.add("VM.resume", vm + ", start_paused: bool, force: bool", "void", resume, has_async=True)
    api.add("VM.suspend", vm, "void", power_change(pool.vm_suspend), has_async=True)
    api.add("VM.pause", vm, "void", power_change(pool.vm_pause, True), has_async=True)
    api.add("VM.unpause", vm, "void", power_change(pool.vm_pause, False), has_async=True)
    for operation in ("hard_shutdown", "clean_shutdown"):
        api.add("VM." + operation, vm, "void", power_change(pool.vm_shutdown, operation), has_async=True)
    for operation in ("hard_reboot", "clean_reboot"):
        api.add("VM." + operation, vm, "void", power_change(pool.vm_reboot, operation), has_async=True)
    api.add("VM.shutdown", vm, "void", shutdown, has_async=True)
    api.add("VM.set_is_a_template", "self: ref VM, value: bool", "void",
            lambda call, self, value: pool.vm_set_is_a_template(self, value))
    api.add("VM.assert_operation_valid", "self: ref VM, op: string", "void", assert_operation_valid, has_async=True)
    api.add("VM.update_allowed_operations", "self: ref VM", "void", update_allowed_operations, has_async=True)
    api.add("VM.get_possible_hosts", vm, "set ref host", get_possible_hosts, has_async=True)
    api.add("VM.assert_can_boot_here", "self: ref VM, host: ref host", "void", assert_can_boot_here, has_async=True)
    api.add("VM.get_allowed_VBD_devices", vm, "set string", allowed_vbd_devices)
    api.add("VM.get_allowed_VIF_devices", vm, "set string", allowed_vif_devices)
    _add_vm_sizes(api)


def _add_vm_sizes(api: Api) -> None:
    """Memory and VCPUs can only be changed while the VM is down, and only in order."""
    pool = api.pool
    memory_fields = ("memory_static_min", "memory_dynamic_min", "memory_dynamic_max", "memory_static_max")

    def change(vm: str, operation: str, fields: Dict[str, str]) -> None:
        with pool.lock:
            pool.assert_allowed("VM", vm, operation)
            record = dict(pool.record("VM", vm), **fields)
            static_min, dynamic_min, dynamic_max, static_max = [int(record[name]) for name in memory_fields]
            if operation != "changing_VCPUs" and not static_min <= dynamic_min == dynamic_max == static_max:
                # vm_memory_constraints.ml are_valid_and_pinned_at_static_max, as a server without the feature DMC asks for it
                # (xapi_vm_memory_constraints.ml; recorded from 24.19.2)
                raise Failure("MEMORY_CONSTRAINT_VIOLATION_MAXPIN", "DMC disabled")
            if not 1 <= int(record["VCPUs_at_startup"]) <= int(record["VCPUs_max"]):
                raise Failure("INVALID_VALUE", "VCPU values must satisfy: 0 < VCPUs_at_startup <= VCPUs_max",
                              "%s, %s" % (record["VCPUs_at_startup"], record["VCPUs_max"]))
            pool.set_fields("VM", vm, fields)

    def setter(operation: str, *names: str) -> Callable[..., None]:
        def run(call: Call, self: str, *values: str) -> None:
            change(self, operation, dict(zip(names, values if len(values) == len(names) else values * len(names))))
        return run

    for name in ("memory_static_max", "memory_static_min"):
        api.add("VM.set_" + name, "self: ref VM, value: int", "void", setter("changing_static_range", name), has_async=True)
    for name in ("memory_dynamic_max", "memory_dynamic_min"):
        api.add("VM.set_" + name, "self: ref VM, value: int", "void", setter("changing_dynamic_range", name), has_async=True)
    for name in ("VCPUs_max", "VCPUs_at_startup"):
        api.add("VM.set_" + name, "self: ref VM, value: int", "void", setter("changing_VCPUs", name), has_async=True)
    api.add("VM.set_memory_limits", "self: ref VM, static_min: int, static_max: int, dynamic_min: int, dynamic_max: int", "void",
            setter("changing_memory_limits", "memory_static_min", "memory_static_max", "memory_dynamic_min",
                   "memory_dynamic_max"), has_async=True)
    # all but static_min, which stays (xapi_vm.ml set_memory, v24.19.2)
    api.add("VM.set_memory", "self: ref VM, value: int", "void", setter("changing_memory_limits", *memory_fields[1:]),
            has_async=True)
    api.add("VM.set_memory_dynamic_range", "self: ref VM, min: int, max: int", "void",
            setter("changing_dynamic_range", "memory_dynamic_min", "memory_dynamic_max"), has_async=True)
    api.add("VM.set_memory_static_range", "self: ref VM, min: int, max: int", "void",
            setter("changing_static_range", "memory_static_min", "memory_static_max"), has_async=True)


# ---------------------------------------------------------------------------------------------------------------------
# VBD, VIF, VDI, SR, PBD and the rest


def _add_devices(api: Api) -> None:
    pool = api.pool

    def set_mode(call: Call, self: str, value: str) -> None:
        with pool.lock:
            vm = pool.record("VBD", self)["VM"]
            state = pool.record("VM", vm)["power_state"]
            if state != "Halted":
                raise Failure("VM_BAD_POWER_STATE", vm, "halted", state.lower())
            pool.set_field("VBD", self, "mode", value)

    def assert_attachable(call: Call, self: str) -> None:
        with pool.lock:
            record = pool.record("VBD", self)
            if not record["empty"]:
                pool.assert_attachable(record["VDI"], record["mode"], record["VM"], besides=self)

    def configure(family: str) -> Callable[..., None]:
        def run(call: Call, self: str, mode: str, address: str, gateway: str) -> None:
            with pool.lock:
                record = pool.record("VIF", self)
                if mode == "Static":
                    try:
                        ipaddress.ip_interface(address if "/" in address else "")
                    except ValueError:
                        raise Failure("INVALID_CIDR_ADDRESS_SPECIFIED", "address")
                metrics = pool.tables["VM_guest_metrics"].get(pool.record("VM", record["VM"])["guest_metrics"])
                if metrics is None or metrics["other"].get("feature-static-ip-setting") != "1":
                    raise Failure("VM_LACKS_FEATURE", record["VM"])
                pool.set_fields("VIF", self, {family + "_configuration_mode": mode, family + "_addresses": [address],
                                              family + "_gateway": gateway})
        return run

    api.add("VBD.create", "args: struct", "ref VBD", lambda call, fields: pool.vbd_create(fields), constructs="VBD",
            has_async=True)
    api.add("VBD.destroy", "self: ref VBD", "void", lambda call, self: pool.vbd_destroy(self), has_async=True)
    api.add("VBD.plug", "self: ref VBD", "void", lambda call, self: pool.vbd_plug(self), has_async=True)
    for name in ("unplug", "unplug_force"):
        # a control domain's VBD is unplugged alike by both (xapi_vbd.ml unplug_force, v24.19.2)
        api.add("VBD." + name, "self: ref VBD", "void", lambda call, self: pool.vbd_unplug(self), has_async=True)
    api.add("VBD.eject", "vbd: ref VBD", "void", lambda call, vbd: pool.vbd_eject(vbd), has_async=True)
    api.add("VBD.insert", "vbd: ref VBD, vdi: ref VDI", "void", lambda call, vbd, vdi: pool.vbd_insert(vbd, vdi), has_async=True)
    api.add("VBD.set_mode", "self: ref VBD, value: enum RO RW", "void", set_mode, has_async=True)
    api.add("VBD.assert_attachable", "self: ref VBD", "void", assert_attachable, has_async=True)
    api.add("VIF.create", "args: struct", "ref VIF", lambda call, fields: pool.vif_create(fields), constructs="VIF",
            has_async=True)
    api.add("VIF.destroy", "self: ref VIF", "void", lambda call, self: pool.vif_destroy(self), has_async=True)
    api.add("VIF.plug", "self: ref VIF", "void", lambda call, self: pool.vif_plug(self, True), has_async=True)
    for name in ("unplug", "unplug_force"):
        api.add("VIF." + name, "self: ref VIF", "void", lambda call, self: pool.vif_plug(self, False), has_async=True)
    api.add("VIF.move", "self: ref VIF, network: ref network", "void",
            lambda call, self, network: pool.vif_move(self, network), has_async=True)
    for family in ("ipv4", "ipv6"):
        api.add("VIF.configure_" + family, "self: ref VIF, mode: enum None Static, address: string = \"\", gateway: string = \"\"",
                "void", configure(family), has_async=True)


def _add_disks(api: Api) -> None:
    pool = api.pool
    params = "driver_params: map string string = {}"
    api.add("VDI.create", "args: struct", "ref VDI", lambda call, fields: pool.vdi_create(fields), constructs="VDI",
            has_async=True)
    api.add("VDI.destroy", "self: ref VDI", "void", lambda call, self: pool.vdi_destroy(self, call.task), has_async=True)
    api.add("VDI.resize", "vdi: ref VDI, size: int", "void",
            lambda call, vdi, size: pool.vdi_resize(vdi, int(size), call.task), has_async=True)

    def resize_online(call: Call, vdi: str, size: str) -> None:
        # no storage manager has VDI_RESIZE_ONLINE, which it takes (xapi_vdi.ml check_sm_feature_error)
        with pool.lock:
            raise Failure("SR_OPERATION_NOT_SUPPORTED", pool.record("VDI", vdi)["SR"])

    api.add("VDI.resize_online", "vdi: ref VDI, size: int", "void", resize_online, has_async=True,
            removed=not pool.has_online_resize())
    api.add("VDI.snapshot", "vdi: ref VDI, " + params, "ref VDI",
            lambda call, vdi, driver_params: pool.vdi_snapshot(vdi, driver_params, call.task), has_async=True)
    api.add("VDI.clone", "vdi: ref VDI, " + params, "ref VDI",
            lambda call, vdi, driver_params: pool.vdi_clone(vdi, driver_params, call.task), has_async=True)
    # base_vdi and into_vdi, for differences, are not modelled
    api.add("VDI.copy", "vdi: ref VDI, sr: ref SR", "ref VDI", lambda call, vdi, sr: pool.vdi_copy(vdi, sr, call.task),
            has_async=True)
    # its options know only `force`, which changes nothing here
    api.add("VDI.pool_migrate", "vdi: ref VDI, sr: ref SR, options: map string string", "ref VDI",
            lambda call, vdi, sr, options: pool.vdi_pool_migrate(vdi, sr, call.task), has_async=True)
    if pool.has_cbt():
        api.add("VDI.data_destroy", "self: ref VDI", "void", lambda call, self: pool.vdi_data_destroy(self, call.task),
                has_async=True)
    api.add("VDI.forget", "vdi: ref VDI", "void", lambda call, vdi: pool.vdi_forget(vdi, call.task), has_async=True)
    api.add("SR.scan", "sr: ref SR", "void", lambda call, sr: pool.sr_scan(sr), has_async=True)

    def sr_update(call: Call, sr: str) -> None:
        with pool.lock:
            pool.assert_sr_answers(sr)
            pool.update_space(sr)

    api.add("SR.update", "sr: ref SR", "void", sr_update, has_async=True)
    api.add("PBD.plug", "self: ref PBD", "void", lambda call, self: pool.pbd_plug(self), has_async=True)
    api.add("PBD.unplug", "self: ref PBD", "void", lambda call, self: pool.pbd_unplug(self), has_async=True)


def _add_rest(api: Api) -> None:
    pool = api.pool

    def create_network(call: Call, fields: Dict[str, Any]) -> str:
        with pool.lock:
            bridges = [record["bridge"] for record in pool.tables["network"].values()]
            number = next(number for number in range(len(bridges) + 1) if "xapi%d" % number not in bridges)
            return pool.create("network", dict({"bridge": "xapi%d" % number}, **fields))

    def destroy_network(call: Call, self: str) -> None:
        with pool.lock:
            record = pool.record("network", self)
            if record["PIFs"]:
                raise Failure("NETWORK_CONTAINS_PIF", *record["PIFs"])
            if record["VIFs"]:
                raise Failure("NETWORK_CONTAINS_VIF", *record["VIFs"])
            pool.destroy_row("network", self)

    def create_secret(call: Call, fields: Dict[str, Any]) -> str:
        with pool.lock:
            return pool.create("secret", fields)

    def destroy_secret(call: Call, self: str) -> None:
        with pool.lock:
            pool.destroy_row("secret", self)

    def destroy_host(call: Call, self: str) -> None:
        pool.host_destroy(self)

    def get_servertime(call: Call, host: str) -> str:
        with pool.lock:
            pool.record("host", host)
            return pool.now()

    def list_methods(call: Call) -> List[str]:
        return sorted(api.methods)

    api.add("network.create", "args: struct", "ref network", create_network, constructs="network", has_async=True)
    api.add("network.destroy", "self: ref network", "void", destroy_network, has_async=True)
    api.add("secret.create", "args: struct", "ref secret", create_secret, constructs="secret", has_async=True)
    api.add("secret.destroy", "self: ref secret", "void", destroy_secret, has_async=True)
    api.add("host.destroy", "self: ref host", "void", destroy_host, has_async=True)
    api.add("host.get_servertime", "host: ref host", "datetime", get_servertime)
    api.add("system.listMethods", "", "set string", list_methods, needs_session=False)
