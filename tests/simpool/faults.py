"""FAULTS.json: what goes wrong, and when. Every fault of the simulated pool is decided here.

The server asks `at` once for each occasion (an API call, an `xe` command, a request to a data handler), with the names of
what the occasion concerns, and lets the Occasion act before and after the effect and on the stream of data.

Three kinds make a difference (an export with base=) a wrong one, whose table and length are right in themselves:

    {"omit": n}             its n-th block (from 1) is missing, as if it had never changed: the tracker that lies
    {"full": true}          it is a full
    {"other": "DISK"}       it is another disk's: DISK is the uuid of a VDI, or VM:device. If there are two snapshots of it or
                            more, it is the difference between the last two, else that from the base that was asked for

They are for xe:vdi-export and http:/export_raw_vdi. Exports without base=, and those as tar, which has no differences, do not
count as their occasions, whatever else matches: `nth` is the n-th difference. Of an export_raw_vdi a sleep comes when the
disks are attached, before the first byte.

A sleep or a rate may end early, so that whoever waits for something in it need not guess how long that takes:

    {"sleep": 60, "until": NAME}, {"rate": bytes_per_second, "until": NAME}     until a file of that name lies beside FAULTS.json
    {"rate": bytes_per_second, "from": bytes}               what comes before that byte comes at once

Of several rates the lowest counts.
"""

import fnmatch
import json
import os
import threading
import time
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Set, Tuple

from schema import Failure

KEYS = {"on", "object", "nth", "when", "do"}

#: kind -> (companions it may have, type of its value)
KINDS = {
    "fail": ((), list), "sleep": (("until",), (int, float)), "hang": ((), bool), "drop": ((), bool),
    "truncate": (("silent",), int), "flip": ((), int), "rate": (("until", "from"), (int, float)),
    "exit": (("stderr",), int), "omit": ((), int), "full": ((), bool), "other": ((), str), "kill": ((), str),
    "keepalive": ((), bool), "logout": ((), bool), "master": ((), str), "lose": ((), (int, float)),
}  # type: Dict[str, Tuple[Tuple[str, ...], Any]]

#: Those that act at the beginning or the end of a call; the others act on a stream or on the `xe` process.
CALL_KINDS = ("fail", "sleep", "hang", "drop", "logout", "master", "lose")
#: After so many bytes, or seconds, it is looked whether a rate counts by then.
STEP, MOST_SLEEP_S = 1 << 20, 0.2
#: Those that act on differences alone, and where these are made.
DIFFERENCE_KINDS = ("omit", "full", "other")
DIFFERENCES = ("xe:vdi-export", "http:/export_raw_vdi")


class FaultsFileError(Exception):
    """FAULTS.json can't be used; the text says where and why."""


class Drop(Exception):
    """Close the connection without an answer."""


class SilentEnd(Exception):
    """The stream ends here, and every status shall say that all went well."""


class Fault:
    """One entry of the file."""

    def __init__(self, entry: Any, where: str, folder: str = "") -> None:
        if not isinstance(entry, dict):
            raise FaultsFileError("%s: must be an object" % where)
        unknown = set(entry) - KEYS
        if unknown or "on" not in entry or "do" not in entry:
            raise FaultsFileError("%s: needs 'on' and 'do'; unknown: %s" % (where, ", ".join(sorted(unknown)) or "-"))
        self.on = entry["on"]
        self.object = entry.get("object", "*")
        self.nth = entry.get("nth")
        self.when = entry.get("when", "before")
        self.do = entry["do"]
        if not isinstance(self.on, str) or self.on.split(":")[0] not in ("api", "xe", "http", "*"):
            raise FaultsFileError("%s: on must be like api:VM.snapshot, xe:vm-export, http:/export" % where)
        if not isinstance(self.object, str):
            raise FaultsFileError("%s: object must be a string" % where)
        if self.nth is not None and (not isinstance(self.nth, int) or isinstance(self.nth, bool) or self.nth < 1):
            raise FaultsFileError("%s: nth must be 1 or more" % where)
        if self.when not in ("before", "after"):
            raise FaultsFileError("%s: when must be before or after" % where)
        self.kind = self._kind_of(where)
        self.free = self.do.get("from", 0)
        self._end = os.path.join(folder, self.do["until"]) if "until" in self.do else ""
        self._seen = 0

    def is_over(self) -> bool:
        """Does what it was to last until lie there?"""
        return self._end != "" and os.path.exists(self._end)

    def sleep(self) -> None:
        ends_at = time.monotonic() + self.do["sleep"]
        while not self.is_over() and time.monotonic() < ends_at:
            time.sleep(max(0, min(0.05, ends_at - time.monotonic())) if self._end else self.do["sleep"])

    def _kind_of(self, where: str) -> str:
        if not isinstance(self.do, dict):
            raise FaultsFileError("%s: do must be an object" % where)
        kinds = [key for key in self.do if key in KINDS]
        if len(kinds) != 1:
            raise FaultsFileError("%s: do must be one of %s" % (where, ", ".join(KINDS)))
        companions, kind_type = KINDS[kinds[0]]
        unknown = set(self.do) - {kinds[0]} - set(companions)
        if unknown:
            raise FaultsFileError("%s: do: unknown key %s" % (where, ", ".join(sorted(unknown))))
        value = self.do[kinds[0]]
        if not isinstance(value, kind_type) or (isinstance(value, bool) and kind_type is not bool):
            raise FaultsFileError("%s: do: %s has a wrong value" % (where, kinds[0]))
        if kinds[0] == "fail" and (not value or not all(isinstance(item, str) for item in value)):
            raise FaultsFileError("%s: do: fail must be a code and its parameters, all strings" % where)
        if not isinstance(self.do.get("until", ""), str) or not isinstance(self.do.get("from", 0), int):
            raise FaultsFileError("%s: do: until must be the name of a file, and from a number of bytes" % where)
        if kinds[0] == "omit" and value < 1:
            raise FaultsFileError("%s: do: omit must be 1 or more" % where)
        if kinds[0] in DIFFERENCE_KINDS and not any(fnmatch.fnmatchcase(name, self.on) for name in DIFFERENCES):
            raise FaultsFileError("%s: do: %s is for %s" % (where, kinds[0], " and ".join(DIFFERENCES)))
        return kinds[0]

    def applies(self, names: Iterable[str], objects: Iterable[str], is_difference: bool) -> bool:
        """Whether this is the occasion; counts the occasions that match."""
        if self.kind in DIFFERENCE_KINDS and not is_difference:
            return False
        if not any(fnmatch.fnmatchcase(name, self.on) for name in names):
            return False
        if self.object != "*" and not any(fnmatch.fnmatchcase(name, self.object) for name in objects):
            return False
        self._seen += 1
        return self.nth is None or self._seen == self.nth


class Occasion:
    """One call, command or request, and the faults that fall on it."""

    def __init__(self, faults: "Faults", matched: List[Fault], entry: Any) -> None:
        self._faults = faults
        self._matched = matched
        self._entry = entry
        if entry is not None:
            entry.faults.extend(fault.do for fault in matched)
        #: for `xe`: the status that it ends with after its work, and what it writes to stderr
        self.exit = None  # type: Optional[Tuple[int, str]]
        #: for `xe`: it dies by SIGKILL halfway
        self.kill = False
        #: for an export: zero-length blocks, as a slow disk causes them
        self.keepalive = False
        #: for a difference: which of its blocks are missing, from 1
        self.omitted = set()  # type: Set[int]
        #: for a difference: it is a full
        self.full = False
        #: for a difference: the disk whose it is
        self.other = None  # type: Optional[str]
        for fault in matched:
            if fault.kind == "exit":
                self.exit = (fault.do["exit"], fault.do.get("stderr", ""))
            elif fault.kind == "kill":
                self.kill = True
            elif fault.kind == "keepalive":
                self.keepalive = True
            elif fault.kind == "omit":
                self.omitted.add(fault.do["omit"])
            elif fault.kind == "full":
                self.full = True
            elif fault.kind == "other":
                self.other = fault.do["other"]

    def before(self, sleeps: bool = True) -> None:
        """Before the effect. Raises Failure or Drop, or takes its time, unless that is left to `pause`."""
        self._act("before", [kind for kind in CALL_KINDS if sleeps or kind != "sleep"])

    def pause(self) -> None:
        """Takes the time that it does not take before the effect."""
        self._act("before", ["sleep"])

    def after(self) -> None:
        """After the effect, before the answer."""
        self._act("after", CALL_KINDS)

    def _act(self, when: str, kinds: Sequence[str]) -> None:
        for fault in self._matched:
            if fault.kind not in kinds or fault.when != when:
                continue
            if fault.kind == "sleep":
                fault.sleep()
            elif fault.kind == "fail":
                raise Failure(*fault.do["fail"])
            elif fault.kind == "hang":
                self._close_entry("no answer")
                self._faults.hang()
                raise Drop()
            elif fault.kind == "drop":
                self._close_entry("no answer")
                raise Drop()
            elif fault.kind == "logout":
                self._faults.control.logout_everyone()
            elif fault.kind == "master":
                self._faults.control.move_master(fault.do["master"])
            elif fault.kind == "lose":
                self._close_entry("no answer")
                self._faults.control.lose(fault.do["lose"])
                raise Drop()

    def _close_entry(self, result: str) -> None:
        if self._entry is not None:
            self._entry.result = result
            self._entry.close()

    @property
    def bends_streams(self) -> bool:
        """Is there a fault that acts on the data, not on the call?"""
        return any(fault.kind in ("truncate", "flip", "rate") for fault in self._matched)

    def stream(self, send: Callable[[bytes], Any]) -> "Stream":
        """`send`, with this occasion's faults on the way. Call `end` on it when all is sent."""
        return Stream(send, self._matched)

    def stream_inside(self, send: Callable[[bytes], Any]) -> "Stream":
        """The same for what goes into a compressor: only the faults that break the work off, as a failing disk does."""
        return Stream(send, [fault for fault in self._matched if fault.kind == "truncate" and not fault.do.get("silent")])

    def stream_outside(self, send: Callable[[bytes], Any]) -> "Stream":
        """The same for what comes out of a compressor: all the other faults."""
        return Stream(send, [fault for fault in self._matched if fault.kind != "truncate" or fault.do.get("silent")])


class Stream:
    """A send function that truncates, flips a bit or slows down. A flip counted from the end holds back that many bytes."""

    def __init__(self, send: Callable[[bytes], Any], faults: List[Fault]) -> None:
        self._send = send
        self._sent = 0
        self._limit = None  # type: Optional[int]
        self._silent = False
        self._flip = None  # type: Optional[int]
        self._hold = 0
        self._held = b""
        self._paces = []  # type: List[Fault]
        self._started = time.time()
        for fault in faults:
            if fault.kind == "truncate":
                self._limit, self._silent = fault.do["truncate"], fault.do.get("silent", False)
            elif fault.kind == "flip" and fault.do["flip"] >= 0:
                self._flip = fault.do["flip"]
            elif fault.kind == "flip":
                self._hold = -fault.do["flip"]
            elif fault.kind == "rate":
                self._paces.append(fault)

    def __call__(self, data: bytes) -> None:
        if not self._hold:
            self._pass_on(data)
            return
        self._held += bytes(data)
        ready = len(self._held) - self._hold
        if ready > 0:
            data, self._held = self._held[:ready], self._held[ready:]
            self._pass_on(data)

    def end(self) -> None:
        """All is sent: what was held back goes out, with its bit flipped."""
        held, self._held = bytearray(self._held), b""
        if held and len(held) == self._hold:
            held[0] ^= 1
        if held:
            self._pass_on(bytes(held))

    def _pass_on(self, data: bytes) -> None:
        if self._flip is not None and self._sent <= self._flip < self._sent + len(data):
            changed = bytearray(data)
            changed[self._flip - self._sent] ^= 1
            data = bytes(changed)
        if self._limit is not None and self._sent + len(data) > self._limit:
            self._slowly(data[:self._limit - self._sent])
            if self._silent:
                raise SilentEnd()
            # what a disk that gives out in the middle of an export ends as
            raise Failure("VDI_IO_ERROR", "Device I/O errors")
        self._slowly(data)

    def _slowly(self, data: bytes) -> None:
        if not self._paces:
            self._send(data)
            self._sent += len(data)
            return
        at = 0
        while at < len(data):
            paces = [pace for pace in self._paces if self._sent >= pace.free and not pace.is_over()]
            step = max(1, int(min(pace.do["rate"] for pace in paces) / 20)) if paces else STEP
            step = min([step] + [pace.free - self._sent for pace in self._paces if pace.free > self._sent])
            self._send(data[at:at + step])
            self._sent += len(data[at:at + step])
            at += step
            while True:
                due = max(((self._sent - pace.free) / pace.do["rate"] for pace in paces if not pace.is_over()), default=0)
                left = self._started + due - time.time()
                if left <= 0:
                    break
                time.sleep(min(left, MOST_SLEEP_S))


class Faults:
    """All entries of the file."""

    def __init__(self, entries: Any = (), folder: str = "") -> None:
        if not isinstance(entries, (list, tuple)):
            raise FaultsFileError("must be a list")
        self._entries = [Fault(entry, "[%d]" % number, folder) for number, entry in enumerate(entries)]
        self._lock = threading.Lock()
        self._over = threading.Event()
        #: who carries out logout, master and lose: the server
        self.control = None  # type: Any

    @staticmethod
    def read(path: Optional[str]) -> "Faults":
        if path is None:
            return Faults()
        with open(path, encoding="utf-8") as stream:
            try:
                return Faults(json.load(stream), os.path.dirname(os.path.abspath(path)))
            except ValueError as error:
                raise FaultsFileError("not JSON: %s" % error)

    def at(self, via: str, call: str, objects: Iterable[str] = (), entry: Any = None, also: str = "",
           is_difference: bool = False) -> Occasion:
        """The occasion of this call. `objects`: names and uuids that it concerns; `also`: a second name of the call."""
        if not self._entries:
            return Occasion(self, [], entry)
        names = ["%s:%s" % (via, name) for name in (call, also) if name]
        objects = list(objects)
        with self._lock:
            matched = [fault for fault in self._entries if fault.applies(names, objects, is_difference)]
        return Occasion(self, matched, entry)

    def hang(self) -> None:
        """Never answer: come back only when the server ends."""
        self._over.wait()

    def stop(self) -> None:
        self._over.set()
