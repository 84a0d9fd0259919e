"""journal.jsonl: one line for each API call, `xe` command and request to a data handler.

What is secret does not get in: passwords are written as ***, sessions as session-1, session-2, ... in the order in which
they were made or first named.
"""

import json
import re
import threading
import time
from typing import Any, Dict, List, Optional

from schema import Failure

_REF = re.compile(r"OpaqueRef:[0-9A-Za-z-]+")
_PASSWORD_KEYS = ("password", "pw", "pwd")


class Entry:
    """One line, written when it is closed. As a context manager it takes a Failure that passes through for its result."""

    def __init__(self, journal: "Journal", via: str, call: str, args: Any, host: str, user: str) -> None:
        self._journal = journal
        self._started = time.time()
        self._closed = False
        self.via = via
        self.call = call
        self.args = args
        self.host = host
        self.user = user
        self.result = "ok"  # type: Any
        self.bytes = 0
        self.faults = []  # type: List[Dict[str, Any]]

    def close(self) -> None:
        """Write the line, once."""
        if self._closed:
            return
        self._closed = True
        result = self.result
        if isinstance(result, Failure):
            result = result.description()
        line = {"t": round(self._started, 3), "via": self.via, "call": self.call,
                "args": self._journal.redacted(self.args), "host": self.host, "user": self.user,
                "result": self._journal.redacted(result), "bytes": self.bytes}
        if self.faults:
            line["fault"] = self.faults
        self._journal.write(line)

    def __enter__(self) -> "Entry":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, Failure):
            self.result = error
        self.close()


class Journal:
    def __init__(self, path: str) -> None:
        self._lock = threading.Lock()
        self._sessions = {}  # type: Dict[str, str]
        self._file = open(path, "a", encoding="utf-8", errors="surrogateescape")

    def entry(self, via: str, call: str, args: Any, host: str, user: str) -> Entry:
        return Entry(self, via, call, args, host, user)

    def name_session(self, ref: str) -> str:
        """The name that stands for a session in the journal."""
        with self._lock:
            return self._sessions.setdefault(ref, "session-%d" % (len(self._sessions) + 1))

    def write(self, line: Dict[str, Any]) -> None:
        text = json.dumps(line, default=_wire_text)
        with self._lock:
            if not self._file.closed:
                self._file.write(text + "\n")
                self._file.flush()

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def redacted(self, value: Any, key: Optional[str] = None) -> Any:
        """The same value without passwords and session references."""
        if key in _PASSWORD_KEYS and isinstance(value, str):
            return "***"
        if isinstance(value, str):
            if "OpaqueRef:" in value:
                return _REF.sub(lambda match: self._sessions.get(match.group(), match.group()), value)
            return value
        if isinstance(value, dict):
            return {name: self.redacted(item, name) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._redacted_argument(value, number) for number in range(len(value))]
        return value

    def _redacted_argument(self, arguments: Any, number: int) -> Any:
        argument = arguments[number]
        if isinstance(argument, str):
            if number and arguments[number - 1] == "-pw":
                return "***"
            name, equals, _ = argument.partition("=")
            if equals and name in _PASSWORD_KEYS:
                return name + "=***"
        return self.redacted(argument)


def _wire_text(value: Any) -> Any:
    """Dates and such, as they were sent."""
    return getattr(value, "value", str(value))
