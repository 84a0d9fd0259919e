"""The tables of the pool: rows, the lists of references that the server keeps up by itself, and the log that outlives it.

Every change is appended to a log before the lock is released, so before anyone is answered: a server that is killed leaves
what it had answered, and the next one goes on from there. The log is folded into one file when a server starts and finds
it long.
"""

import hashlib
import json
import os
import threading
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from schema import CLASSES, RELATIONS, Failure

#: A log longer than this is folded when the next server starts.
FOLD_BYTES = 16 * 1024 * 1024

#: Tables that the real server keeps in memory only, so they are empty after a restart.
VOLATILE = ("session", "task")


class DatabaseLock:
    """A re-entrant lock that calls `flush` when its last holder lets go of it. threading.Condition can be built on it."""

    def __init__(self, flush: Callable[[], None]) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._flush = flush

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        taken = self._lock.acquire(blocking, timeout)
        if taken:
            self._depth += 1
        return taken

    def release(self) -> None:
        if self._depth == 1:
            self._flush()
        self._depth -= 1
        self._lock.release()

    def __enter__(self) -> "DatabaseLock":
        self.acquire()
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    # the three methods that threading.Condition asks a lock for
    def _is_owned(self) -> bool:
        return self._lock._is_owned()  # type: ignore

    def _release_save(self) -> int:
        depth, self._depth = self._depth, 0
        self._flush()
        for _ in range(depth):
            self._lock.release()
        return depth

    def _acquire_restore(self, depth: int) -> None:
        for _ in range(depth):
            self._lock.acquire()
        self._depth = depth


class _Identities(threading.local):
    """Where new uuids come from: chance, or, in the thread that builds a pool from its description, a seed. What another thread
    makes meanwhile must not shift those that are the same every time."""

    def __init__(self) -> None:
        self.seed = None  # type: Optional[str]
        self._count = 0

    def digits(self) -> str:
        if self.seed is None:
            return os.urandom(16).hex()
        self._count += 1
        return hashlib.md5(("%s/%d" % (self.seed, self._count)).encode("utf-8")).hexdigest()

    @contextmanager
    def derived_from(self, seed: str) -> Iterator[None]:
        """The uuids made in this block are the same every time that they are derived from this seed."""
        before = self.seed, self._count
        self.seed, self._count = seed, 0
        try:
            yield
        finally:
            self.seed, self._count = before


identities = _Identities()


def uuid_text(digits: str) -> str:
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:32]))


def new_uuid() -> str:
    return uuid_text(identities.digits())


def new_uuid4() -> str:
    """A uuid of version 4: the storage manager makes such, xapi itself does not."""
    digits = identities.digits()
    return uuid_text(digits[:12] + "4" + digits[13:16] + "89ab"[int(digits[16], 16) % 4] + digits[17:])


def new_ref() -> str:
    return "OpaqueRef:" + new_uuid()


class Database:
    """Tables of records. Everything here is done with `lock` held."""

    def __init__(self) -> None:
        self.lock = DatabaseLock(self._flush)
        self.changed = threading.Condition(self.lock)  # type: ignore
        self.tables = {name: {} for name in CLASSES}  # type: Dict[str, Dict[str, Dict[str, Any]]]
        self._by_uuid = {name: {} for name in CLASSES}  # type: Dict[str, Dict[str, str]]
        self._pending = []  # type: List[List[Any]]
        self._log_file = None  # type: Optional[int]
        self._recording = True
        self._replaying = False
        #: (number, class, ref, operation) of the latest changes, for event.from
        self.events = []  # type: List[Tuple[int, str, str, str]]
        self.generation = 0
        #: called with (class, ref) whenever a record changed or went away
        self.on_touch = []  # type: List[Callable[[str, str], None]]

    # --- reading

    def record(self, cls: str, ref: str) -> Dict[str, Any]:
        """The live record; HANDLE_INVALID if there is none."""
        try:
            return self.tables[cls][ref]
        except (KeyError, TypeError):
            raise Failure("HANDLE_INVALID", cls, str(ref))

    def exists(self, cls: str, ref: str) -> bool:
        return ref in self.tables[cls]

    def ref_of(self, cls: str, uuid: str) -> str:
        """The reference of the object with this uuid; UUID_INVALID if there is none."""
        try:
            return self._by_uuid[cls][uuid]
        except KeyError:
            raise Failure("UUID_INVALID", cls, uuid)

    def has_uuid(self, cls: str, uuid: str) -> bool:
        return uuid in self._by_uuid[cls]

    def find(self, cls: str, ref_or_uuid: str) -> str:
        """The reference of an object that a client names by either; UUID_INVALID if there is none."""
        if ref_or_uuid in self.tables[cls]:
            return ref_or_uuid
        return self.ref_of(cls, ref_or_uuid)

    def by_name(self, cls: str, name_label: str) -> List[str]:
        return [ref for ref, record in self.tables[cls].items() if record["name_label"] == name_label]

    # --- changing

    def create(self, cls: str, fields: Dict[str, Any], ref: Optional[str] = None) -> str:
        """A new row; the reference and the uuid are made up unless they are given."""
        if ref is None:
            ref = new_ref()
        record = CLASSES[cls].new_record(fields)
        if not record["uuid"]:
            record["uuid"] = new_uuid()
        self._insert(cls, ref, record)
        if self._recording:
            self._pending.append(["+", cls, ref, record])
        return ref

    def _insert(self, cls: str, ref: str, record: Dict[str, Any]) -> None:
        self.tables[cls][ref] = record
        self._by_uuid[cls][record["uuid"]] = ref
        for (child, field), _ in RELATIONS.items():
            if child == cls:
                self._link(cls, ref, field, record[field], fresh=not self._replaying)
        self._touch(cls, ref, "add")

    def destroy_row(self, cls: str, ref: str) -> None:
        record = self.record(cls, ref)
        for (child, field), _ in RELATIONS.items():
            if child == cls:
                self._unlink(cls, ref, field, record[field])
        del self.tables[cls][ref]
        if self._by_uuid[cls].get(record["uuid"]) == ref:
            del self._by_uuid[cls][record["uuid"]]
        self._touch(cls, ref, "del")
        if self._recording:
            self._pending.append(["-", cls, ref])

    def set_field(self, cls: str, ref: str, field: str, value: Any) -> None:
        """Change one field; lists of references on the other side follow."""
        record = self.record(cls, ref)
        old = record[field]
        if (cls, field) in RELATIONS and old != value:
            self._unlink(cls, ref, field, old)
            record[field] = value
            self._link(cls, ref, field, value)
        elif field == "uuid":
            self._by_uuid[cls].pop(old, None)
            self._by_uuid[cls][value] = ref
            record[field] = value
        else:
            record[field] = value
        self._touch(cls, ref, "mod")
        if self._recording:
            # a copy: the caller may go on changing its list or dict before the log is written
            copy = list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else value
            self._pending.append(["=", cls, ref, field, copy])

    def set_fields(self, cls: str, ref: str, fields: Dict[str, Any]) -> None:
        for field, value in fields.items():
            self.set_field(cls, ref, field, value)

    def set_key(self, cls: str, ref: str, field: str, key: str, value: Any) -> None:
        """Put one key into a map field, replacing it."""
        self.set_field(cls, ref, field, dict(self.record(cls, ref)[field], **{key: value}))

    def drop_key(self, cls: str, ref: str, field: str, key: str) -> None:
        """Take one key out of a map field, if it is there."""
        changed = dict(self.record(cls, ref)[field])
        if key in changed:
            del changed[key]
            self.set_field(cls, ref, field, changed)

    def _link(self, cls: str, ref: str, field: str, target: str, fresh: bool = False) -> None:
        parent, members = RELATIONS[cls, field]
        record = self.tables[parent].get(target)
        if record is None:
            return
        if not fresh and ref in record[members]:
            record[members].remove(ref)
        # the real database shows the newest first
        record[members].insert(0, ref)
        self._touch(parent, target, "mod")

    def _unlink(self, cls: str, ref: str, field: str, target: str) -> None:
        parent, members = RELATIONS[cls, field]
        record = self.tables[parent].get(target)
        if record is not None and ref in record[members]:
            record[members].remove(ref)
            self._touch(parent, target, "mod")

    def _touch(self, cls: str, ref: str, operation: str) -> None:
        self.generation += 1
        if self._recording:
            self.events.append((self.generation, cls, ref, operation))
            if len(self.events) > 20000:
                del self.events[:10000]
        for hook in self.on_touch:
            hook(cls, ref)

    # --- the log

    def open_log(self, path: str) -> None:
        self._log_file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def close_log(self) -> None:
        """What changed so far is written, and nothing from now on."""
        with self.lock:
            self._flush()
            if self._log_file is not None:
                os.close(self._log_file)
                self._log_file = None

    def log(self, entry: List[Any]) -> None:
        """Have another kind of change written with those of the tables (the storage's)."""
        if self._recording:
            self._pending.append(entry)

    def _flush(self) -> None:
        if not self._pending:
            return
        entries, self._pending = self._pending, []
        if self._log_file is not None:
            line = json.dumps([round(time.time(), 3), entries], separators=(",", ":")) + "\n"
            data = line.encode("ascii")
            while data:
                data = data[os.write(self._log_file, data):]
        self.changed.notify_all()

    def replay(self, entry: List[Any]) -> None:
        """Do again one change of the tables that an earlier server logged."""
        kind, cls, ref = entry[0], entry[1], entry[2]
        if kind == "+":
            # the row was written with the lists it had when the lock was released
            self._replaying = True
            self._insert(cls, ref, entry[3])
            self._replaying = False
        elif kind == "-":
            if ref in self.tables[cls]:
                self.destroy_row(cls, ref)
        elif ref in self.tables[cls]:
            self.set_field(cls, ref, entry[3], entry[4])

    def restore_tables(self, tables: Dict[str, Dict[str, Dict[str, Any]]]) -> None:
        """Take over whole tables, lists of references included."""
        for cls, rows in tables.items():
            self.tables[cls].update(rows)
            self._by_uuid[cls].update({record["uuid"]: ref for ref, record in rows.items()})
        for hook in self.on_touch:
            for cls, rows in tables.items():
                for ref in rows:
                    hook(cls, ref)

    def without_recording(self) -> "_Silence":
        """While this holds, changes are not logged: the start of a pool, and replaying a log."""
        return _Silence(self)

    def clear(self) -> None:
        for table in self.tables.values():
            table.clear()
        for index in self._by_uuid.values():
            index.clear()
        self._pending = []


class _Silence:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._before = True

    def __enter__(self) -> None:
        self._before = self._database._recording
        self._database._recording = False

    def __exit__(self, *_: Any) -> None:
        self._database._recording = self._before


def read_log(path: str) -> Iterator[Tuple[float, List[List[Any]]]]:
    """(time, changes) for every line of a log; a last line that was cut short by a kill is left out."""
    try:
        with open(path, "rb") as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                when, entries = json.loads(line.decode("ascii"))
                yield when, entries
    except FileNotFoundError:
        return
