#!/usr/bin/env python3
"""VmBackup: backs up the VMs of a XenServer, Citrix Hypervisor or XCP-ng pool.

    VmBackup.py PASSWORD TARGET [ACTION] [NAME=VALUE ...]

The program reads the pool once, plans, and then for each VM: snapshots it,
streams `xe vm-export` (or `xe vdi-export` of Disk 0) of the snapshot to the
backup directory while proving that what passes is whole, removes the
snapshot, seals the copy by one rename, and only then prunes older copies.

Data flows one way:

    arguments -> Configuration -> Inventory -> Plan -> Run -> Outcome -> Report -> exit status

The sections below stand in reading order; each uses only those above it.

    I.   Pure: words and decisions. Nothing is touched, no clock is asked.
          1. Program
          2. Errors
          3. Values
          4. Sizes, times and names
          5. Settings
          6. Selection and plan
          7. Retention
    II.  Doors: one for each outside world, whose errors become ours there.
          8. Process
          9. Programs
         10. Storage
         11. Pool
         12. Post
    III. Streams: what flows from the pool to the store and back, and its proof.
         13. The pump
         14. Blocks and digests
         15. Image formats
         16. Files, pipes, compressors
    IV.  What stands: copies in the store, things of ours in the pool.
         17. Copies
         18. Ownership
    V.   Deeds
         19. Run
         20. Backup
         21. Verify and prune
         22. Restore
         23. Extract and drill
    VI.  People
         24. Reports
         25. Commands
         26. main

Where do I change what?

    a config key, a parameter       a row of OPTION_GROUPS or ACTIONS (5); help, example.cfg, parser follow
    which copies stay               judge (7); whose a copy is: as_seen_by (7); is it good: Copy (7)
    which disks are in a copy       disks_to_export (6)
    what the server answers         Pool (11); what to do about it: FAILURE_ADVICE (2)
    a format of images              a check beside check_xva and check_vhd (15)
    what a copy has on disk         NewCopy and read_copy (17)
    a kind of thing made in a pool  a class beside those of Snapshots (18)
    what every deed has around it   Run (19)
    a sentence of log or mail       Report (19), its renderers (24), or the error's class (2)
    what setup proposes             proposed_retention (7), proposed_settings (24)
    an action                       a row of ACTIONS (5) and a function in COMMANDS (25)

Exit statuses: see ExitStatus in section 1, or `VmBackup.py help`.
"""
NEEDS: str = "VmBackup needs Python 3.6 or newer: write /usr/bin/python3 in the crontab"

# =============================================================================
# 1. Program
# =============================================================================
# What the program is made of: imports, constants with their units, and the
# exit statuses that cron and people see.

import os
import sys

if __name__ == "__main__":
    # Nothing is imported from the directory that this file lies in: the older program had people put a
    # XenAPI.py there.
    sys.path[:] = [place for place in sys.path
                   if os.path.realpath(place or ".") != os.path.dirname(os.path.realpath(__file__))]

# What only one door or a few commands need is imported there: who only lists copies does not pay for it.

import base64
import binascii
import collections
import contextlib
import enum
import errno
import fcntl
import fnmatch
import functools
import hashlib
import heapq
import io
import itertools
import json
import marshal
import math
import queue
import re
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import threading
import time
import unicodedata
import warnings
import zlib
from array import array
from datetime import date, datetime, timedelta, timezone
from typing import (Any, Callable, Container, ContextManager, Dict, Generator, Iterable, Iterator, List,
                    Mapping, NamedTuple, Optional, Sequence, Set, Tuple, Union)

VERSION = "4.0.0"

KIBIBYTE = 1024
MEBIBYTE = 1024 * 1024
GIBIBYTE = 1024 * 1024 * 1024

MINUTE_S = 60
HOUR_S = 60 * MINUTE_S
DAY_S = 24 * HOUR_S

XE_FALLBACK = "/opt/xensource/bin/xe"          # cron's PATH does not hold it
INVENTORY_FILE = "/etc/xensource-inventory"    # only a host of a pool has it
LOCAL_SOCKET = "/var/lib/xcp/xapi"
LOCAL_URL = "http://127.0.0.1"
TEST_DOOR = "VMBACKUP_POOL"                    # "URL SOCKET": where this host is, in tests


class ExitStatus(enum.IntEnum):
    """What cron is told, and what it means; 128+N means: stopped by signal N, after clean-up."""
    OK = 0, "everything asked for was done (a good preview included)"
    FAILED = 1, "at least one VM, or the pool metadata, was not backed up, verified or restored"
    USAGE = 2, "the command line or the config is wrong: nothing was started"
    WARNING = 3, "all done, with warnings worth a look"
    POOL = 4, "the pool can't be reached, or the login was refused"
    LOCKED = 5, "another run of this config is still going"
    BUG = 70, "a bug in VmBackup: traceback and versions are in the log"

    def __new__(cls, number: int, meaning: str) -> "ExitStatus":
        status = int.__new__(cls, number)
        status._value_ = number
        status.meaning = meaning
        return status


# =============================================================================
# 2. Errors
# =============================================================================
# Everything that can go wrong, each with the exit status that it means for the
# whole run if nothing above it can go on. The text of an error is a sentence
# for a person: what happened, to which object, what is left, what to do.


class BackupError(Exception):
    """Something went wrong that a person has to be told, in one or more sentences."""
    exit_status = ExitStatus.FAILED
    passing = False                     # worth a second try at the end of the queue
    status_word = ""                    # for the status log: SNAPSHOT-FAIL and the like

    def __init__(self, sentence: str, passing: Optional[bool] = None) -> None:
        super().__init__(sentence)
        if passing is not None:
            self.passing = passing


class UsageError(BackupError):
    """The command line is wrong; nothing was started."""
    exit_status = ExitStatus.USAGE


class ConfigurationError(BackupError):
    """The config has problems: one sentence each, with file and line."""
    exit_status = ExitStatus.USAGE

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class PoolError(BackupError):
    """The pool can't be reached, or refused the login."""
    exit_status = ExitStatus.POOL


class AnswerLost(PoolError):
    """A call went out and no answer came back: it may have done its work."""
    passing = True


class ApiFailure(BackupError):
    """The pool answered a call with a failure: code and parameters as XenAPI gives them."""

    def __init__(self, code: str, parameters: Sequence[str], doing: str) -> None:
        self.code = code
        self.parameters = tuple(str(item) for item in parameters)
        sentence = f"{doing} was refused by the pool: {failure_text(code, self.parameters)}"
        where = "SMlog of the VM's host" if code.startswith("SR_BACKEND_") else "xensource.log of the master"
        advice = FAILURE_ADVICE.get(code) or f"/var/log/{where} tells more."
        super().__init__(f"{sentence} {advice}", passing=code in PASSING_FAILURES)


class ProgramError(BackupError):
    """A program that we started ended badly."""


class CatalogError(BackupError):
    """The backup directory can't be used as it should be."""


class NotThere(CatalogError):
    """No file or directory bears that name."""


class NameTaken(CatalogError):
    """Something bears that name already."""


class WrongKind(CatalogError):
    """What bears that name is not what it should be: a directory, a link, a device, or far too large."""


class StorageFull(CatalogError):
    """No space is left there, or none that we may use."""


class StorageMisbehaved(CatalogError):
    """The storage under backup_dir gave an error that no full disk explains: nothing is pruned."""


class StorageStalled(StorageMisbehaved):
    """The storage hangs in the kernel: nothing that needs it can be waited for."""


class TakenOver(StorageMisbehaved):
    """Another run took this one for dead: nothing more may be sealed, deleted or swept."""


class VerificationError(BackupError):
    """The data are not what a whole backup looks like."""
    verdict = "is damaged"


class UnknownFormat(VerificationError):
    """The data may be sound, but are of a kind that is not read here, or lack what the server needs of
    them."""
    verdict = "can't be used"


class CompressionDamaged(VerificationError):
    """Compressed data can't be decompressed to their end."""


class StreamStalled(BackupError):
    """No sign of life for longer than stall_timeout."""
    passing = True


class LockHeld(BackupError):
    """Somebody else holds the lock; the sentence says who and since when."""
    exit_status = ExitStatus.LOCKED


class Interrupted(BaseException):
    """A signal asked us to stop. Not an Exception, so that no job can swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


# Reasons that pass by themselves: the VM is tried once more at the end of the queue.
PASSING_FAILURES = frozenset((
    "OTHER_OPERATION_IN_PROGRESS", "SR_BACKEND_FAILURE_37", "SR_BACKEND_FAILURE_46", "SR_BACKEND_FAILURE_47",
    "SR_BACKEND_FAILURE_82", "SR_BACKEND_FAILURE_1200",
    "SESSION_INVALID", "HOST_STILL_BOOTING", "CANNOT_CONTACT_HOST"))

# What an administrator can do about the failures that backups meet (codes: ocaml/idl/datamodel_errors.ml).
FAILURE_ADVICE = {
    "SR_BACKEND_FAILURE_44": "The SR is full: free space on it (old snapshots, and space that its coalesce "
                             "has not given back yet), then run again.",
    "SR_BACKEND_FAILURE_37": "The SR could not lock the disk, as its own clean-up (coalesce) was busy with "
    "it: that passes in minutes. If it does not, look in /var/log/SMlog of the VM's host.",
    "SR_BACKEND_FAILURE_82": "Most often the disk could not be paused for its snapshot, as the SR's own "
    "clean-up (coalesce) was busy with it: that passes in minutes. If it does not, look in /var/log/SMlog of "
    "the VM's host.",
    "SR_BACKEND_FAILURE_1200": "The process that serves the disk (tapdisk) was just starting or ending: that "
    "passes in minutes. If it does not, look in /var/log/SMlog of the VM's host.",
    "SR_BACKEND_FAILURE_109": "The snapshot chain is too long: delete snapshots of this VM and let the SR "
                              "coalesce, or copy the disk.",
    "SR_OPERATION_NOT_SUPPORTED": "One of its disks lies on an SR that can't make snapshots (raw, ISO or "
    "udev): use vdi-export if only that data disk is in the way, move the disk, or exclude the VM and back "
    "it up from inside.",
    "VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION": "One of its disks has on_boot=reset, which can't be "
    "snapshotted: set it to persist while the VM is halted (`xe vdi-list on-boot=reset` names it, `xe "
    "vdi-param-set uuid=VDI-UUID on-boot=persist` does it) or exclude the VM.",
    "VM_HAS_VUSBS": "A USB device is passed through to it: detach the device or exclude the VM.",
    "NO_HOSTS_AVAILABLE": "No live host sees all SRs that this VM uses, an inserted ISO's included: plug the "
    "SR on one host, or eject the CD.",
    "OTHER_OPERATION_IN_PROGRESS": "Something else is working on it; the next run will try again.",
    "VDI_IN_USE": "The disk is in use: by a VM (`xe vbd-list vdi-uuid=VDI-UUID` shows them), or by a task "
    "(`xe task-list`). Run again when it is free.",
    "HANDLE_INVALID": "It is no longer in the pool: if the VM was deleted for good, correct the config.",
    "OPERATION_NOT_ALLOWED": "The pool does not allow it now: a task (`xe task-list`) or the VM's state is "
    "in its way. Run again when that is over.",
    "OPERATION_BLOCKED": "Somebody has blocked this operation on the VM: `xe vm-param-get uuid=VM-UUID "
    "param-name=blocked-operations` shows it; unblock it, or exclude the VM.",
    "NOT_SUPPORTED_DURING_UPGRADE": "A rolling pool upgrade is going on: run again when it is over.",
}


def failure_text(code: str, parameters: Sequence[str]) -> str:
    """The failure as one line: the code, then its parameters as the server gave them."""
    shown = [one_line(item) for item in parameters if item.strip()]
    return code + (f" ({'; '.join(shown)})" if shown else "") + "."


def one_line(text: str) -> str:
    """The text with every control character shown as an escape, so that it can't break a line."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
                   for char in text)


def quote_name(name: str) -> str:
    """The name as it is if it is plain; else in double quotes with control characters shown."""
    if re.fullmatch(r"[\w.+@()-]+( [\w.+@()-]+)*", name):
        return name
    escaped = one_line(name).replace('"', '\\"')
    return f'"{escaped}"'


def shell_word(text: str) -> str:
    """The text as one word of a shell."""
    import shlex
    return shlex.quote(text)


# =============================================================================
# 3. Values
# =============================================================================
# The nouns of the field, as plain values. A `ref` is only handed back to the
# pool; everything that is written down or compared uses uuids.

NULL_REF = "OpaqueRef:NULL"
VHD_LARGEST_BYTES = 2040 * GIBIBYTE    # of a disk: vhd_format/f.ml@v26.17.0 Constants.max_vhd_size


class Method(enum.Enum):
    """How a VM is backed up; the value is the word in configs and logs."""
    VM = "vm-export"
    VDI = "vdi-export"


class Severity(enum.Enum):
    """How much a finding matters: INFO never changes the exit status."""
    INFO = 0
    WARNING = 1
    ERROR = 2


class Finding(NamedTuple):
    """Something that a person should know, and what it is about."""
    severity: Severity
    subject: str
    sentence: str


class Rules(NamedTuple):
    """How many good copies of a VM and kind are to stay: the newest so many, and one of each of the last so
    many days, weeks, months and years that have one. `config` is the path of the config that says so, "" if
    it is not known."""
    newest: int
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    config: str = ""


class Host(NamedTuple):
    """A host of the pool. `short_name` is its hostname up to the first dot; `build` the version of its xapi.
    """
    ref: str
    uuid: str
    short_name: str
    address: str
    product_version: Tuple[int, ...]
    api_version: Tuple[int, int]
    build: Tuple[int, ...] = ()


class StorageRepository(NamedTuple):
    """An SR; sizes in bytes."""
    ref: str
    uuid: str
    name: str
    physical_size: int
    physical_utilisation: int


class Disk(NamedTuple):
    """A VBD of type Disk together with its VDI; sizes in bytes."""
    vbd_uuid: str
    userdevice: str
    device: str
    bootable: bool
    mode: str
    type: str
    unpluggable: bool
    vdi_ref: str
    vdi_uuid: str
    name: str
    description: str
    virtual_size: int
    vdi_type: str
    sharable: bool
    read_only: bool
    sr_ref: str
    sr_uuid: str
    snapshot_of: str


class Interface(NamedTuple):
    """A VIF and the name of its network."""
    uuid: str
    device: str
    network_name: str
    mtu: str
    mac: str
    other_config: Tuple[Tuple[str, str], ...]
    problem: str = ""


class VirtualMachine(NamedTuple):
    """A VM as the inventory shows it; `disks` in order of their device. `problems`: what its records lack.
    `resident_on` is the ref of the host that it runs on."""
    ref: str
    uuid: str
    name: str
    description: str
    power_state: str
    tags: Tuple[str, ...]
    memory_dynamic_max: str
    vcpus_max: str
    vcpus_at_startup: str
    guest_metrics_ref: str
    disks: Tuple[Disk, ...]
    problems: Tuple[str, ...] = ()
    resident_on: str = ""

    @property
    def title(self) -> str:
        """The VM for a log line: its name, quoted where it is odd, and the start of its uuid."""
        return f"{quote_name(self.name)} ({self.uuid[:8]})"


class NamedSnapshot(NamedTuple):
    """A snapshot of a VM (`class_name` VM) or of a disk (VDI) that is named as a reference: the uuids of the
    snapshots of disks that it is made of, the stamp of the copy that it equals, and the beginning of the
    store's id."""
    class_name: str
    uuid: str
    name: str
    disks: Tuple[str, ...]
    stamp: str
    store: str


class Inventory(NamedTuple):
    """The pool, read once. `machines` are real VMs only: no templates, snapshots, control domains.
    `problems`: records that can't be read, of which nothing is known. `references`: the snapshots that bear
    the name of a reference, this store's or not. `others`: name, uuid and kind of what is never backed up,
    such as templates. `host_uuids` by ref; `local_srs`: of each SR, by uuid, that one host alone sees, that
    host's uuid. `used`: of each disk, by ref, how many bytes of it are in use at most. `vdis`: the uuids of
    all disks, snapshots too."""
    pool_uuid: str
    pool_name: str
    host: Host
    master: Host
    machines: Tuple[VirtualMachine, ...]
    problems: Tuple[str, ...] = ()
    references: Tuple[NamedSnapshot, ...] = ()
    host_uuids: Mapping[str, str] = {}
    local_srs: Mapping[str, str] = {}
    others: Tuple[Tuple[str, str, str], ...] = ()
    used: Mapping[str, int] = {}
    vdis: Set[str] = set()

    @property
    def pool_title(self) -> str:
        """The pool for people: its name, or its master's, as most pools are never named."""
        return quote_name(self.pool_name or self.master.short_name)


# =============================================================================
# 4. Sizes, times and names
# =============================================================================
# Turning values into words and safe names, and back. Pure: the time is passed in.


def format_size(size_bytes: Union[int, float]) -> str:
    """A size as people say it: `812 GiB`, `1.2 GiB`, `17 MiB`, `640 B`."""
    amount = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            break
        amount /= 1024
    else:
        unit = "TiB"
    if unit == "B" or amount >= 10:
        return f"{amount:.0f} {unit}"
    return f"{amount:.1f} {unit}"


def format_duration(seconds: float) -> str:
    """A duration as people say it: `3 s`, `4 min 10 s`, `5 h 12 min`, `2 d 3 h`."""
    whole = int(seconds)
    for unit_s, unit, smaller_s, smaller in ((DAY_S, "d", HOUR_S, "h"), (HOUR_S, "h", MINUTE_S, "min"),
                                             (MINUTE_S, "min", 1, "s")):
        if whole >= unit_s:
            return f"{whole // unit_s} {unit} {whole % unit_s // smaller_s} {smaller}"
    return f"{whole} s"


TEXT_COLUMNS = 79


def paragraph(text: str, first: str = "", rest: Optional[str] = None) -> List[str]:
    """The text in lines that fit on a terminal, as far as its words do: the first behind `first`, the others
    behind `rest`, or behind the same."""
    import textwrap
    return textwrap.wrap(text, TEXT_COLUMNS, initial_indent=first, subsequent_indent=first if rest is None
                         else rest, break_long_words=False, break_on_hyphens=False)


def two_columns(rows: Sequence[Tuple[str, str]]) -> List[str]:
    """Words, each with what is to be said of it beside it, in two columns."""
    wide = max(len(word) for word, _ in rows) + 4
    return [line for word, text in rows for line in paragraph(text, f"  {word}".ljust(wide), " " * wide)]


def format_utc(at: datetime) -> str:
    """An aware time as the manifest and the journal keep it: `2016-04-14T00:10:00Z`."""
    return at.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_utc(text: str) -> datetime:
    """The time that format_utc wrote; ValueError if it is not one."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)


PLURAL_VERBS = {"is": " are", "was": " were", "has": " have", "": ""}


def counted(number: int, noun: str = "", verb: str = "") -> str:
    """`1 copy`, `2 copies`, `3 VMs are`: the number with its noun and verb, both given for one."""
    if number != 1:
        noun = re.sub("(?<=[^aeiou])y$", "ie", noun) + "s" * bool(noun)
    return f"{number}{noun and ' ' + noun}{verb and ' ' + verb if number == 1 else PLURAL_VERBS[verb]}"


# --- lines of progress on a terminal ------------------------------------------

RATE_WINDOW_S = 30                 # a speed is that of so long: as it is now, and steady all the same
LEAST_NAME = 12                    # columns: before a name is cut shorter, something else is left out
LEFT_OUT_FIRST = (3, 4, 1, 5)      # of a row that is too long: the amount, the speed, the number, the time


def figures(samples: Sequence[Tuple[float, int]], size_bytes: int) -> Tuple[str, str, str, str]:
    """Percent, amount, speed and the time that is left, each "" where it is not known. `samples`: when so
    many bytes had come, over the last RATE_WINDOW_S. `size_bytes`: of the whole, 0 if that is not known; it
    is that of disks, whose zeros are not sent, so that percent is a floor."""
    (then_s, then_bytes), (now_s, done) = samples[0], samples[-1]
    rate = (done - then_bytes) / (now_s - then_s) if now_s - then_s >= 1 else -1
    speed = "" if rate < 0 else f"{rate / 1e6:,.{0 if rate >= 1e7 else 1}f} MB/s"
    if not size_bytes:
        return "", format_size(done), speed, ""
    unit, of = next((unit, of) for unit, of in (
        ("TiB", 1024 * GIBIBYTE), ("GiB", GIBIBYTE), ("MiB", MEBIBYTE), ("KiB", KIBIBYTE), ("B", 1))
        if size_bytes >= 10 * of or of == 1)
    amount = f"{min(done, size_bytes) // of:,}/{size_bytes // of:,} {unit}"
    left = f"{format_duration((size_bytes - done) / rate)} left" if rate > 0 and done < size_bytes else ""
    return f"{min(99, done * 100 // size_bytes)} %", amount, speed, left


def progress_row(name: str, number: str, doing: str, known: Sequence[str]) -> Tuple[str, ...]:
    """What a line of progress tells: a name, its number of all (`3/14`), and the figures that are known, or
    what is done in one text. That is named for the VM at hand only where the figures are not its export's."""
    if not name or known and known[0]:
        return (name or doing, number, *known)
    return name, number, ", ".join(part for part in (doing.partition(f" of {name}")[0], *known) if part)


def columns(text: str) -> int:
    """How many columns of a terminal the text takes."""
    return sum(0 if unicodedata.category(char) in ("Mn", "Me", "Cf") else
               2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def fitted(text: str, width: int, mark: str) -> str:
    """The text in at most so many columns, with the mark at its end where something is left out."""
    short = text[:4 * max(0, width)]       # what takes no columns must not make it endless
    while short and columns(short if short == text else short + mark) > width:
        short = short[:-1]
    return text if short == text else short + mark[:max(0, width)]


def progress_lines(rows: Sequence[Sequence[str]], width: int, most: int, is_utf8: bool) -> List[str]:
    """At most so many lines, each in so many columns, for the rows, their parts below each other; of more
    rows, the last line tells how many. `is_utf8`: the terminal shows more than ASCII."""
    mark = "\u2026" if is_utf8 else "..."

    def safe(part: str) -> str:
        return one_line(part) if is_utf8 else one_line(part).encode("ascii", "backslashreplace").decode()

    def in_columns(part: str, wide: int, is_number: bool) -> str:
        blank = " " * (wide - columns(part))
        if any(unicodedata.bidirectional(char) in ("R", "AL") for char in part):
            part += "\u200e"               # so that what follows stays behind it
        return blank + part if is_number else part + blank

    more = len(rows) - most + 1 if len(rows) > most else 0
    rows = [[safe(part) for part in row] for row in (rows[:most - 1] if more else rows)]
    longest = max((columns(row[0]) for row in rows), default=0)
    text = max((min(columns(row[2]), width // 2) + 2 for row in rows if len(row) == 3), default=0)
    for gone in range(len(LEFT_OUT_FIRST) + 1):
        wide = {part: max((columns(row[part]) for row in rows if len(row) == 6 or part == 1), default=0)
                for part in range(1, 6) if part not in LEFT_OUT_FIRST[:gone]}
        number = wide.get(1, 0) and wide[1] + 1
        room = width - number - max(text, sum(wide[part] + 2 for part in wide if part > 1 and wide[part]))
        if room >= min(longest, LEAST_NAME):
            break
    lines = []
    for row in rows:
        line = in_columns(fitted(row[0], room, mark), min(longest, room), False)
        if number:
            line += " " + in_columns(row[1], wide[1], True)
        for part in range(2, len(row)):
            if len(row) != 6 or wide.get(part):
                line += "  " + in_columns(row[part], wide[part] if len(row) == 6 else 0, part < 5)
        lines.append(fitted(line.strip(), width, mark))
    return lines + [fitted(f"and {more} more", width, mark)] * bool(more)


# --- names of directories -----------------------------------------------------

SAFE_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ._-()+@,")
WINDOWS_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9]) *(\.|$)")
NEWCOMER_SUFFIX = re.compile(r"(?i)--[0-9a-f]{8}$")
SAFE_NAME_BYTES = 220          # leaves room in 255 bytes for `--uuid`, `.xva.zst` and `.partial`
EMPTY_NAME = "%00"             # no VM's name can hold a NUL


def safe_name(name: str) -> str:
    """The VM's name as a directory name that every file system takes.

    Injective: what is not safe stands as %XX (its UTF-8 bytes), a `%` too, so no two names give one result. A
    plain name stays as the older program wrote it. Never begins with `.` or METADATA_, never ends with `.` or
    a space, is no reserved Windows name, and never ends as newcomer_name() does.
    """
    def escape(char: str) -> str:
        return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogatepass"))

    if not name:
        return EMPTY_NAME
    pieces = [char if char in SAFE_CHARACTERS else escape(char) for char in name]
    if name[0] in ". " or name[:9].upper() == "METADATA_" or WINDOWS_RESERVED.match(name):
        pieces[0] = escape(name[0])
    if name[-1] in ". ":
        pieces[-1] = escape(name[-1])
    if NEWCOMER_SUFFIX.search(name):
        pieces[-10] = escape("-")
    whole = "".join(pieces)
    if len(whole) <= SAFE_NAME_BYTES:
        return whole
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:24]
    kept = ""
    for piece in pieces:
        if len(kept) + len(piece) > SAFE_NAME_BYTES - 2 - len(digest):
            break
        kept += piece
    return kept + "%%" + digest        # two `%` in a row: no uncut name has that


def newcomer_name(name: str, uuid: str) -> str:
    """The directory of a VM whose plain directory belongs to another VM."""
    return f"{safe_name(name)}--{uuid[:8]}"


def own_folder_names(name: str, uuid: str, pool: str) -> Tuple[str, ...]:
    """The directories that are a VM's by name: its plain one, as a newcomer, and as the older program wrote
    it."""
    names = (safe_name(name),) + tuple(newcomer_name(name, one) for one in (uuid, pool) if one)
    length = len(name.encode("utf-8", "replace"))
    if name and name[0] != "." and not re.search("[/\0]", name) and length <= 255:
        names += (name,)
    return names


def folded(folder: str) -> str:
    """Two directory names with one folded form are one directory on a CIFS share."""
    return unicodedata.normalize("NFC", folder).casefold()


# --- names of copies ----------------------------------------------------------

STAMP = re.compile(r"backup-(\d{4})-(\d\d)-(\d\d)-(\d\d)(\d\d)(\d\d)", re.ASCII)
OLD_STAMP = re.compile(r"backup-(\d{4})-(\d\d)-(\d\d)-\((\d\d):(\d\d):(\d\d)\)", re.ASCII)
PARTIAL = ".partial"
DELETING = ".deleting"
POOL_DUMP = re.compile(r"pool_db_[0-9]{8}-[0-9]{6}\.dump")
POOL_DUMP_STAMP = "pool_db_%Y%m%d-%H%M%S.dump"


def copy_name(local: datetime) -> str:
    """The directory of a copy begun at that local time."""
    return local.strftime("backup-%Y-%m-%d-%H%M%S")


def parse_copy_name(name: str) -> Optional[Tuple[datetime, bool]]:
    """The local time in a copy's name and whether the older program wrote it; None for any other name."""
    for pattern, is_old in ((STAMP, False), (OLD_STAMP, True)):
        match = pattern.fullmatch(name)
        if match:
            try:
                return datetime(*(int(part) for part in match.groups())), is_old
            except ValueError:
                return None
    return None


def is_unfinished_name(name: str) -> bool:
    """Is it a copy of ours that was begun, or any copy on its way out?"""
    if name.endswith(PARTIAL):
        return STAMP.fullmatch(name[:-len(PARTIAL)]) is not None
    return name.endswith(DELETING) and parse_copy_name(name[:-len(DELETING)]) is not None


def device_name(userdevice: str) -> str:
    """The device that a userdevice number becomes in a guest: 0 is xvda, 26 is xvdaa; a word stays."""
    if not re.fullmatch(r"[0-9]+", userdevice):
        return userdevice
    letters = ""
    number = int(userdevice) + 1
    while number:
        number, letter = divmod(number - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return "xvd" + letters


def userdevice_number(userdevice: str) -> int:
    """The position of a userdevice for sorting: xvda, hda and 0 are all 0; unknown words come last."""
    if re.fullmatch(r"[0-9]+", userdevice):
        return int(userdevice)
    match = re.fullmatch(r"(?:xvd|hd|sd)([a-z]+)", userdevice)
    if not match:
        return 1 << 30
    number = 0
    for letter in match.group(1):
        number = number * 26 + ord(letter) - ord("a") + 1
    return number - 1


def readable_place(path: str, whose: str) -> str:
    """The name for what is a config's or directory's alone: its last part, and what tells it from others."""
    digest = hashlib.sha256(whose.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return re.sub(r"[^A-Za-z0-9._-]", "_", path.rsplit("/", 1)[-1])[:80] + "-" + digest


# --- names of what is being made in a pool ----------------------------------------

TOKEN_MARK = "vmbackup-"       # a random token follows
KEY_PREFIX = "vmbackup:"       # of our keys in other_config, before such a token
REFERENCE_NAME = re.compile(
    r" \(VmBackup reference (?P<stamp>[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}), "
    r"store (?P<store>[0-9a-f]{1,8})\)$")
NEW_VM_NAME = "%s (being restored) " + TOKEN_MARK + "%s"
DRILL_VM_NAME = "VmBackup drill of %s " + TOKEN_MARK + "%s"
PART_NAME = "%s part %d"       # a VM that only carries disks for one of these
PROVISIONAL_NAME = re.compile(
    r"(?s)(.* \(being restored\)|VmBackup drill of .*) vmbackup-[0-9a-f]{16}( part [0-9]+)?")


def is_provisional(name: str) -> bool:
    """Does a VM bear such a name while a restore or drill makes it?"""
    return PROVISIONAL_NAME.fullmatch(name) is not None


# --- JSON, as manifests, journals and verdicts have it ---------------------------


def parse_object(content: bytes) -> Dict[str, Any]:
    """The JSON object; ValueError with a sentence for anything else, or what none of ours can hold: a number
    that is no number of bytes, seconds or the like, or a text that no file can be written with."""
    def number(text: str) -> Any:
        if len(text) > 18:
            raise ValueError(f"it holds the number {text[:18]}..., which nothing can have")
        return float(text) if "." in text or "e" in text.lower() else int(text)

    try:
        found = json.loads(content.decode("utf-8"), parse_int=number, parse_float=number,
                           parse_constant=number)
        if b"\\u" in content:
            json.dumps(found, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except RecursionError:
        raise ValueError("it is nested too deeply")
    if not isinstance(found, dict):
        raise ValueError("it is not an object")
    return found


# --- cfg files ----------------------------------------------------------------


def cfg_text(pairs: Iterable[Tuple[str, Any]]) -> str:
    """The text of a cfg file: `key=value` lines, booleans as True/False, newlines escaped."""
    lines = []
    for key, value in pairs:
        text = str(value).replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        lines.append(f"{key}={text}\n")
    return "".join(lines)


def parse_cfg(text: str, escaped: bool = True) -> Dict[str, str]:
    """What cfg_text wrote; `escaped` false: what the older program wrote, which escaped nothing, so that the
    second line of a value is passed over."""
    values = {}
    for line in text.split("\n"):
        key, equals, value = line.partition("=")
        if equals and key not in values:
            values[key] = value if not escaped else re.sub(r"\\([nr\\])",
                                 lambda m: {"n": "\n", "r": "\r", "\\": "\\"}[m.group(1)], value)
    return values


# --- text and the file system ---------------------------------------------------
# Cron gives an ASCII world: on Python 3.6 a path with `u-umlaut` can't even be
# opened as str. Names are UTF-8 whatever the locale says.


def fs_path(text: str) -> str:
    """The str that the os module turns into the UTF-8 bytes of the text, in any locale."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def fs_text(path: str) -> str:
    """The text of a path or argument that the os module gave us."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


# =============================================================================
# 5. Settings
# =============================================================================
# From text to one checked value, all problems at once, each with its place.
# OPTION_GROUPS declares every key once: the parser, `help config`, example.cfg and
# README's table come from it. Pure: files are read by the commands.


MOST = 1000000                    # of what has no other limit


class Option(NamedTuple):
    """A config key, or a parameter of an action. `kind` is one of: bool, int, percent, choice, text, path,
    time, pool, fingerprint, address, addresses, selector, disk; of parameters minutes, too, and word, of
    which the bare name will do. `decides`: which copies arise and stay depends on it, so that it is part of
    what a config is."""
    name: str
    kind: str
    default: Any
    help: str
    choices: Tuple[str, ...] = ()
    minimum: int = 0
    maximum: int = MOST
    example: str = ""
    decides: bool = False

    @property
    def field(self) -> str:
        """The option's name as a field of Configuration."""
        return self.name.replace("-", "_")


NOBAK = "[NOBAK]"                 # in a disk's name, as Xen Orchestra has it
OPTION_GROUPS = (
    ("What to back up", (
        Option("vm-export", "selector", (), "Selects VMs for a full backup (repeatable).", example="PROD*",
               decides=True),
        Option("vdi-export", "selector", (), "Selects VMs of which only Disk 0, the OS disk, is backed up "
               "(repeatable).", example='"File server 1":2', decides=True),
        Option("exclude", "selector", (), "Leaves VMs out, whatever selects them (repeatable, anywhere in "
               "the file).", example="*-test", decides=True),
        Option("exclude-disk", "disk", (), "Leaves disks of VMs out: SELECTOR/DEVICE, both with wildcards; "
               f"or {NOBAK}, for those that bear this mark in their name (repeatable).",
               example="db*/xvd[c-z]", decides=True),
        Option("pool_db_backup", "bool", False, "Dumps the pool database into METADATA_<host> at the start "
               "of the run.", decides=True),
        Option("wildcards", "choice", "shell", "Reads selectors that are not in quotes as shell wildcards, "
               "or as regexes, as NAUbackup 3.1 to 3.25 did.", choices=("shell", "regex")))),
    ("Where to", (
        Option("backup_dir", "path", "/snapshots/BACKUPS", "Names the directory that holds all backups: it "
               "must exist and be writable.", decides=True),
        Option("require_mount", "choice", "auto", "Refuses a backup_dir on the root file system or in "
               "memory: always (yes), never (no), or on a host of a pool only (auto).",
               choices=("auto", "yes", "no")),
        Option("status_log", "path", "/snapshots/NAUbackup/status.log", "Names the file that gets the status "
               "lines; a backup never fails for it."))),
    ("How many to keep", (
        Option("max_backups", "int", 4, "Keeps this many good copies of each VM and kind, where a selector "
               "gives no :N.", minimum=1, decides=True),
        Option("keep_daily", "int", 0, "Keeps one good copy a day beside them, for this many of the last "
               "days that have one.", maximum=9999, decides=True),
        Option("keep_weekly", "int", 0, "The same for weeks, which begin on Monday.", maximum=9999,
               decides=True),
        Option("keep_monthly", "int", 0, "The same for months.", maximum=9999, decides=True),
        Option("keep_yearly", "int", 0, "The same for years.", maximum=9999, decides=True),
        Option("pre_clean", "bool", False, "Removes old copies before the export, not after it, down to one "
               "fewer than are to stay; never the last good one.", decides=True))),
    ("How", (
        Option("incremental", "bool", False, "Stores after a full only what changed, in copies that need the "
               "ones before them.", decides=True),
        Option("full_every", "int", 14, "Makes a full again after this many copies, the full counted, with "
               "incremental=yes.", minimum=1, maximum=100, decides=True),
        Option("keep_reference", "bool", False, "Keeps each VM's newest snapshot in the pool, so that with "
               "incremental=yes only what changed is read, too.", decides=True),
        Option("vdi_export_format", "choice", "raw", "Chooses the format of vdi-export images.",
               choices=("raw", "vhd"), decides=True),
        Option("compress", "choice", "none", "Compresses the images on this host: gzip (or True), zstd, none "
               "(or False).", choices=("none", "gzip", "zstd"), decides=True),
        Option("verify_after", "bool", False, "Reads each image back from storage and compares it before the "
               "copy counts."),
        Option("min_sr_free", "percent", 5, "Makes no snapshot, and stops a running export, while less "
               "than this of an SR is free.", maximum=90),
        Option("lock_wait", "int", 10, "Waits this many minutes for a run of another config that is busy "
               "with the same VM.", maximum=1440),
        Option("stall_timeout", "int", 15, "Stops an export after this many minutes without progress.",
               minimum=1, maximum=1440),
        Option("ignore_extra_keys", "bool", False, "Makes an unknown key in this file a warning instead of "
               "an error."))),
    ("How much at a time", (
        Option("workers", "int", 1, "Exports this many VMs at the same time on each host.", minimum=1,
               maximum=16),
        Option("hosts", "choice", "first", "first: the host that starts first does it all; all: every "
               "host that starts this config while a run of it goes on takes part in that run.",
               choices=("first", "all")),
        Option("at_once", "int", 8, "Exports at most this many VMs at the same time on all hosts "
               "together.", minimum=1, maximum=1000),
        Option("until", "time", "", "Begins no export from that time of day on; what was not reached is "
               "reported, and comes first next time.", example="06:30"))),
    ("Hooks", (
        Option("before_run", "command", (), "Runs this program, with its arguments, on each host that "
               "starts, before backup_dir is opened: it may mount it. If it fails, nothing is started.",
               example="/root/mount-nas --wait 60"),
        Option("before_vm", "command", (), "Runs this program just before each VM's snapshot. If it fails, "
               "that VM is not backed up.", example="/root/freeze"),
        Option("after_vm", "command", (), "Runs this program when a VM is done, whatever became of it.",
               example="/root/copy-away"),
        Option("after_run", "command", (), "Runs this program on each host when all is done and backup_dir "
               "is closed: it may unmount it.", example="/root/unmount-nas"),
        Option("hook_timeout", "int", 10, "Ends such a program after this many minutes; it has failed then.",
               minimum=1, maximum=1440))),
    ("Monitoring", (
        Option("report_html", "path", "", "Writes a page that shows all nights, VMs and copies into this "
               "file after each round.", example="/snapshots/backups.html"),
        Option("metrics_file", "path", "", "Writes numbers for Prometheus into this file after each round: "
               "one that ends in .prom in the directory that node_exporter's textfile collector reads.",
               example="/var/lib/node_exporter/vmbackup.prom"),
        Option("ping_url", "url", "", "Asks for this URL as a run ends well, with /start behind it as it "
               "starts and /fail if it failed: healthchecks.io and the like miss a run that never comes.",
               example="https://hc.example.org/ping/0f3c"))),
    ("Mail", (
        Option("mail_to", "addresses", (), "Mails a report of each run to these addresses, separated by "
               "commas.", example="admins@example.org"),
        Option("mail_when", "choice", "always", "Sends the mail always, or only when there are problems, or "
               "never.", choices=("always", "problems", "never")),
        Option("mail_from", "address", "", "Names the sender; without it, root@ and this host's full name.",
               example="backup@example.org"),
        Option("smtp_server", "text", "localhost", "Names the mail server."),
        Option("smtp_port", "int", 0, "Names its port; 0 stands for 25, or 587 with starttls, or 465 with "
               "tls.", maximum=65535),
        Option("smtp_security", "choice", "none", "Encrypts the way to the mail server, whose certificate is "
               "then checked.", choices=("none", "starttls", "tls")),
        Option("smtp_ca_file", "path", "", "Checks the mail server's certificate against this file of CA "
               "certificates.", example="/etc/ssl/mail.pem"),
        Option("smtp_user", "text", "", "Logs in to the mail server as this user.", example="backup"),
        Option("smtp_password_file", "path", "", "Names the file with that user's password; only its owner "
               "may be able to read it.", example="/root/smtp.password"))),
    ("Which pool", (
        Option("pool", "pool", None, "Names another pool's master, HOST[:PORT] or http(s)://HOST[:PORT]; "
               "without it, this host's pool.", example="xcp1.example.org"),
        Option("ca_file", "path", "", "Checks the pool's TLS certificate against this file of CA "
               "certificates.", example="/etc/ssl/pool.pem"),
        Option("ca_fingerprint", "fingerprint", "", "Accepts only the pool's TLS certificate with this "
               "SHA-256 fingerprint.", example=":".join(["AB"] * 32)),
        Option("xe_path", "path", "",
               f"Names the xe program; without it, xe on the PATH, else {XE_FALLBACK}.",
               example="/usr/bin/xe")))
)
OPTIONS = tuple(row for group in OPTION_GROUPS for row in group[1])
OPTION_NAMES = tuple(option.name for option in OPTIONS)
BOOT_MINUTES = 5                  # what boot=yes means: a guest's tools are up by then, or something is wrong
TRUE_WORDS = ("true", "yes", "1")
FALSE_WORDS = ("false", "no", "0")
MAIL_ADDRESS = re.compile(r"[^\s@,<>()\"\x00-\x20\x7f]+@[^\s@,<>()\"\x00-\x20\x7f]+")


class PoolAddress(NamedTuple):
    """Where another pool's master listens."""
    scheme: str
    host: str
    port: int

    @property
    def url(self) -> str:
        """The address as a URL, an IPv6 address in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


class Setting(NamedTuple):
    """One `name = value` with its place: `weekend.cfg:12`, or `command line`."""
    name: str
    value: str
    place: str


class Selector(NamedTuple):
    """One selecting line. `form` is uuid, name, wildcard, regex, prefix-regex or tag; `keep` its :N."""
    method: Optional[Method]      # None: an exclude
    form: str
    pattern: str
    keep: Optional[int]
    bare: bool                    # written without quotes
    text: str
    place: str

    @property
    def precision(self) -> int:
        """uuid before name before all that stands for many."""
        return {"uuid": 3, "name": 2}.get(self.form, 1)

    @property
    def is_literal(self) -> bool:
        """Does it name one VM that somebody counts on?"""
        return self.form in ("uuid", "name")

    @property
    def line(self) -> str:
        """The selector as its config line, and where that stands."""
        return f"{self.method.value if self.method else 'exclude'}={one_line(self.text)} ({self.place})"

    def matches(self, machine: VirtualMachine) -> bool:
        """Does it select that VM?"""
        if self.form == "uuid":
            return machine.uuid.lower() == self.pattern
        if self.form == "tag":
            return self.pattern in machine.tags
        if self.form == "name":
            return machine.name == self.pattern
        if self.form == "wildcard":
            return machine.name == self.pattern or fnmatch.fnmatchcase(machine.name, self.pattern)
        if self.form == "regex":
            return re.fullmatch(self.pattern, machine.name) is not None
        return re.match(self.pattern, machine.name) is not None


class DiskExclude(NamedTuple):
    """One exclude-disk line: disks of the VMs that the selector selects; without one those that bear the
    mark in their name."""
    selector: Optional[Selector]
    device: str
    text: str
    place: str

    @property
    def line(self) -> str:
        """It as its config line, and where that stands."""
        return f"exclude-disk={one_line(self.text)} ({self.place})"

    def matches(self, machine: VirtualMachine, disk: Disk) -> bool:
        """Does it leave that disk of that VM out?"""
        if self.selector is None:
            return NOBAK in disk.name
        return self.selector.matches(machine) and any(
            fnmatch.fnmatchcase(word, self.device) for word in (disk.device, disk.userdevice))


class Configuration:
    """The checked settings: one attribute per row of OPTIONS, selectors in the order of their lines.

    `places` tells where each setting was made; one that is not in it has its default. `warnings` are problems
    that do not stop anything. `source` is the config as it was named, `path` what tells it from others:
    its real path, or the selector in its place. `of_file`: what the file alone says, where the command line
    says something else; None where it says nothing that stands.
    """

    def __init__(self, values: Dict[str, Any], places: Dict[str, str], warnings: Sequence[str],
                 source: str, path: str) -> None:
        for option in OPTIONS:
            setattr(self, option.field, values.get(option.name, option.default))
        self.places = places
        self.warnings = tuple(warnings)
        self.source = source
        self.path = path
        self.of_file = None if self.is_by_hand else self           # type: Optional[Configuration]

    @property
    def is_by_hand(self) -> bool:
        """Does a selector stand in the place of a config file?"""
        return not self.path.startswith("/")

    def rules(self, keep: Optional[int] = None) -> Rules:
        """How many copies are to stay of a VM whose selector has that :N."""
        return Rules(keep or self.max_backups, self.keep_daily, self.keep_weekly, self.keep_monthly,
                     self.keep_yearly, self.path)

    @property
    def decisions(self) -> str:
        """A digest of what decides which copies arise and stay, as parsed: however it was written, and
        wherever."""
        decided = []
        for option in OPTIONS:
            value = getattr(self, option.field)
            if option.kind == "selector":
                value = [(selector.form, selector.pattern, selector.keep) for selector in value]
            elif option.kind == "disk":
                value = [(one.selector and one.selector[1:3], one.device) for one in value]
            if option.decides:
                decided.append((option.name, value))
        return hashlib.sha256(json.dumps(decided).encode("ascii")).hexdigest()[:16]


def read_settings(raw: bytes, source: str) -> Tuple[List[Setting], List[str]]:
    """The settings of a config file's bytes, and the problems of lines that are none. Never raises."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return [], [f"{source}:{line}: this is not UTF-8 text: is it the right file?"]
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        return [], [f"{source}:{line}: this is not a text file: is it the right one?"]
    settings, problems = [], []
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        place = f"{source}:{number}"
        if line.startswith("#") or not line.strip():
            continue
        name, equals, value = line.partition("=")
        if not equals:
            problems.append(f'{place}: "{one_line(line.strip())}" has no "=": a line is key=value, or begins '
                            'with # in the first column.')
            continue
        settings.append(Setting(name.strip(), value.strip(), place))
    return settings, problems


def parse_configuration(file_settings: Sequence[Setting], arguments: Sequence[Setting],
                        source: str, problems: Sequence[str] = (), needs_work: bool = False,
                        path: str = "") -> Configuration:
    """The configuration that the file's settings make, command-line arguments winning.

    Raises ConfigurationError with every problem, the given ones too, in the
    order of their lines. A repeatable key on the command line replaces all of
    the file's. `needs_work`: selecting nothing is a problem.
    """
    found, extra = list(problems), []
    overridden = {setting.name for setting in arguments}
    chosen = [setting for setting in file_settings if setting.name not in overridden] + list(arguments)
    values, places = {}, {}          # type: Dict[str, Any], Dict[str, str]
    wildcards = next((s.value.lower() for s in chosen if s.name == "wildcards"), "shell")
    for setting in chosen:
        if setting.name not in OPTION_NAMES:
            hint = did_you_mean(setting.name.lower(), OPTION_NAMES) \
                or "`VmBackup.py help config` lists the keys."
            extra.append(f'{setting.place}: "{one_line(setting.name)}" is not a key; {hint}')
            continue
        option = OPTIONS[OPTION_NAMES.index(setting.name)]
        if option.kind not in ("selector", "disk") and setting.name in places:
            found.append(f"{setting.place}: {setting.name} was set before, in {places[setting.name]}: keep "
                         "one of the two lines.")
            continue
        places.setdefault(setting.name, setting.place)
        try:
            if option.kind in ("selector", "disk"):
                parse = parse_selector if option.kind == "selector" else parse_disk_exclude
                values[option.name] = values.get(option.name, ()) + (parse(setting, wildcards),)
            else:
                values[option.name] = parse_value(option, setting.value)
        except ValueError as problem:
            found.append(f"{setting.place}: {setting.name}: {problem}")
    if not values.get("ignore_extra_keys"):
        found, extra = found + extra, []
    if needs_work and not any(
            setting.name in ("vm-export", "vdi-export")
            or setting.name == "pool_db_backup" and values.get(setting.name, True) for setting in chosen):
        found.append(f"{source}: there is nothing to do: no vm-export, no vdi-export and no pool_db_backup.")
    if places.get("incremental") == "command line" != places.get("keep_reference"):
        values["keep_reference"] = values.get("keep_reference") and values.get("incremental")
    if values.get("keep_reference") and not values.get("incremental"):
        found.append(f"{places['keep_reference']}: keep_reference: it needs incremental=yes, as only an "
                     "increment can be read as a difference.")
    if found:
        raise ConfigurationError(sorted(found, key=line_number))
    return Configuration(values, places, extra, source, path or source)


def line_number(problem: str) -> int:
    """The line that a problem is about, for sorting; those about none come last."""
    match = re.match(r".*?:([0-9]+): ", problem)
    return int(match.group(1)) if match else 1 << 30


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The question that names the nearest of the known words, "" if none is near."""
    import difflib
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]}?" if near else ""


def parse_value(option: Option, text: str) -> Any:
    """The value that the text means for that option; ValueError with a sentence if it means none."""
    word = text.lower()
    if option.name == "compress" and word in TRUE_WORDS + FALSE_WORDS:
        return "gzip" if word in TRUE_WORDS else "none"
    if option.kind in ("bool", "word"):
        if word in TRUE_WORDS + FALSE_WORDS:
            return word in TRUE_WORDS
        allowed = "True, False, yes, no, 1, 0"
    elif option.kind in ("int", "percent"):
        digits = text[:-1].strip() if option.kind == "percent" and text.endswith("%") else text
        if re.fullmatch(r"[0-9]{1,9}", digits) and option.minimum <= int(digits) <= option.maximum:
            return int(digits)
        allowed = f"a whole number from {option.minimum} to {option.maximum}"
    elif option.kind == "choice":
        if word in option.choices:
            return word
        allowed = ", ".join(option.choices)
    elif option.kind == "minutes":
        if word in FALSE_WORDS:
            return 0.0
        if word in TRUE_WORDS and word != "1":
            return float(BOOT_MINUTES)
        if re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,2})?", word):
            return float(word)
        allowed = "yes, no or a number of minutes"
    elif option.kind == "time":
        if re.fullmatch(r"([01]?[0-9]|2[0-3]):[0-5][0-9]", word):
            return word.rjust(5, "0")
        allowed = "a time of day, HH:MM"
    elif option.kind == "command":
        import shlex
        try:
            words = tuple(shlex.split(text))
        except ValueError as error:
            raise ValueError(f'"{one_line(text)}" is no command: {error}.')
        if words:
            return words
        allowed = "a program and its arguments, quoted as in a shell"
    elif option.kind == "url":
        if re.fullmatch(r"https?://[A-Za-z0-9._:\[\]-]+(/[A-Za-z0-9._~!$&'()*+,;=:%/-]*)?", text):
            return text.rstrip("/")
        raise ValueError("it can't be asked for, and is not shown here, as it may hold a secret; allowed: "
                         "http(s)://HOST/PATH, with neither ? nor # behind it, as /fail comes there.")
    elif option.kind == "pool":
        return parse_pool_address(text)
    elif option.kind == "fingerprint":
        digits = text.replace(":", "").lower()
        if re.fullmatch(r"[0-9a-f]{64}", digits):
            return digits
        allowed = "SHA-256 as 64 hexadecimal digits, with or without colons"
    elif option.kind == "address":
        if MAIL_ADDRESS.fullmatch(text):
            return text
        allowed = "USER@HOST"
    elif option.kind == "addresses":
        addresses = tuple(part.strip() for part in text.split(","))
        if all(MAIL_ADDRESS.fullmatch(address) for address in addresses):
            return addresses
        allowed = "USER@HOST, and more of them behind commas"
    elif text:
        return text
    else:
        raise ValueError(f"the value is empty; leave it out for the default, {option.default or 'none'}.")
    raise ValueError(f'"{one_line(text)}" is not allowed; allowed: {allowed}.')


def parse_pool_address(text: str) -> PoolAddress:
    """The address in `HOST[:PORT]` or `http(s)://HOST[:PORT]`; ValueError if it is none."""
    match = re.fullmatch(r"(?:(https?)://)?(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?/?", text)
    if not match or (match.group(3) and not 0 < int(match.group(3)) < 65536):
        raise ValueError(f'"{one_line(text)}" is not an address; allowed: HOST[:PORT] or '
                         'http(s)://HOST[:PORT].')
    scheme = match.group(1) or "https"
    port = int(match.group(3) or (443 if scheme == "https" else 80))
    return PoolAddress(scheme, match.group(2).strip("[]"), port)


# --- selectors ------------------------------------------------------------------


PLAIN_OLD_NAME = re.compile("[A-Za-z0-9_ -]+")      # what versions 3.1 to 3.25 took for no regex


def parse_selector(setting: Setting, wildcards: str) -> Selector:
    """The selector that the setting's value writes; ValueError with a sentence if it writes none."""
    text, is_bare = setting.value, False
    if text.startswith('"'):
        match = re.match(r'"((?:[^"\\]|\\.)*)"', text, re.DOTALL)
        if not match:
            raise ValueError("the quote is not closed.")
        form, pattern, rest = "name", re.sub(r'\\(["\\])', r"\1", match.group(1)), text[match.end():]
    elif text.startswith("/"):
        form, (pattern, slash, rest) = "regex", text[1:].rpartition("/")
        if not slash:
            raise ValueError("a regex stands between two slashes: /REGEX/.")
    elif text.startswith(("uuid:", "tag:")):
        form, _, pattern = text.partition(":")
        pattern, rest = re.fullmatch("(.*?)(:[0-9]+)?", pattern, re.DOTALL).groups("")
        if form == "uuid":
            pattern = pattern.lower()
    else:
        is_bare = True
        name, colon, _ = text.rpartition(":")
        pattern, rest = (name.rstrip(), text[len(name):]) if colon else (text, "")
        if wildcards == "regex":
            form = "name" if PLAIN_OLD_NAME.fullmatch(pattern) else "prefix-regex"
        else:
            form = "wildcard" if re.search("[*?[]", pattern) else "name"
    if not pattern:
        raise ValueError("the name is empty: write * if every VM is meant.")
    match = re.fullmatch("(:0*([1-9][0-9]{0,8}))?" if is_bare else r"(\s*:\s*0*([1-9][0-9]{0,8}))?", rest)
    if not match and is_bare:
        quoted = one_line(text.replace('"', '\\"'))
        raise ValueError('what follows the last ":" must be a whole number from 1, the copies to keep; if '
                         'the colon belongs to the name, write it in quotes, and a regex between slashes: '
                         f'"{quoted}" or /{one_line(text)}/.')
    if not match:
        raise ValueError(f'"{one_line(rest)}" behind the selector is not :N with N a whole number from 1.')
    if form in ("regex", "prefix-regex", "wildcard"):
        try:
            re.compile(fnmatch.translate(pattern) if form == "wildcard" else pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f'"{one_line(pattern)}" is no proper pattern: {error}.')
    return Selector(None if setting.name == "exclude" else Method(setting.name), form, pattern,
                    int(match.group(2)) if match.group(2) else None, is_bare, text, setting.place)


def parse_disk_exclude(setting: Setting, wildcards: str) -> DiskExclude:
    """The exclude-disk line that the setting's value writes; ValueError with a sentence if it writes none."""
    text = setting.value
    if text == NOBAK:
        return DiskExclude(None, "", text, setting.place)
    is_quoted = re.fullmatch(r'"(?:[^"\\]|\\.)*"', text, re.DOTALL) is not None
    name, slash, device = text[1:-1].rpartition("/") if is_quoted else text.rpartition("/")
    if not slash or not name.strip() or not device.strip():
        raise ValueError(f'"{one_line(text)}" is no SELECTOR/DEVICE, such as db*/xvdc or "File server '
                         f'1/xvdc"; {NOBAK} alone stands for disks that bear this mark.')
    if re.search('[:"]', device):
        raise ValueError(f'"{one_line(device.strip())}" is no device, such as xvdc: no number of copies '
                         "belongs here, and quotes stand around the whole.")
    selector = parse_selector(Setting("exclude", f'"{name}"' if is_quoted else name.strip(), setting.place),
                              wildcards)
    if selector.keep is not None:
        raise ValueError(f'":{selector.keep}" has no place here: no number of copies belongs to it. If it is '
                         "part of the name, put the whole in quotes.")
    try:
        re.compile(fnmatch.translate(device.strip()))
    except re.error as error:
        raise ValueError(f'"{one_line(device)}" is no proper pattern: {error}.')
    return DiskExclude(selector, device.strip(), text, setting.place)


# --- the command line --------------------------------------------------------------


class Action(NamedTuple):
    """An action of the command line."""
    name: str
    help: str
    takes_vm: bool
    needs_work: bool              # a config that selects nothing is an error
    has_preview: bool             # takes the word preview behind it
    parameters: Tuple[Option, ...]
    words: Tuple[str, ...] = ()   # the parameters that plain words are, behind the VM


SETUP = "setup"
ACTIONS = (
    Action(SETUP, "Looks at pool, mounts and host, writes a config that fits them, and shows what it does "
           "and the crontab line. It stands in the place of TARGET; the config keys it is given are heeded.",
           False, True, False, (
        Option("config", "path", "", "The file to write, which must not exist; without it, vmbackup.cfg "
               "beside VmBackup.py."),)),
    Action("backup", "Backs up what the config selects (the default).", False, True, True, (
        Option("force", "bool", False, "yes: run even if another host of the pool has just run this "
               "config."),)),
    Action("preview", "Checks config and login, and shows what a backup would do, changing nothing.", False,
           True, False, ()),
    Action("explain", "Tells why a VM is, or is not, backed up by this config, what holds its copies, and "
           "what the next run does with it and why, changing nothing.", True, False, False, ()),
    Action("verify", "Proves copies again: digests, structure, metadata. Needs no pool, no password, no xe.",
           True, False, False, (
        Option("from", "text", "", "latest: the newest copy of each VM; or the stamp of one copy."),
        Option("max_time", "int", 0, "Stops after this many minutes; the next run goes on with what was "
               "longest not verified.", minimum=1))),
    Action("list", "Shows the copies of each VM, what was verified, and what retention will do with them.",
           True, False, False, (
        Option("format", "choice", "text", "text or json.", choices=("text", "json")),)),
    Action("restore", "Brings a VM back from a copy, as a new VM; with the word preview it only shows what "
           "would be made.", True, False, True, (
        Option("from", "text", "latest", "latest: the newest good copy (the default); a stamp; or the path "
               "of an image or of a copy's directory, for which no store is needed."),
        Option("to", "text", "", "The name of the new VM; without it, the VM's own, or NAME (restored DATE) "
               "if that is taken."),
        Option("sr", "text", "", "Puts all disks on this SR (name or uuid); without it, each goes where it "
               "came from."),
        Option("network", "text", "", "Puts all interfaces on this network (name or uuid); without it, each "
               "on the one of its network's name."),
        Option("preserve", "bool", False, "yes: keeps the VM's uuid and MAC addresses; refused while they "
               "are in use."),
        Option("attach_existing_disks", "bool", False, "yes: attaches those disks that the copy lacks, where "
               "they are in the pool and on no VM."),
        Option("start", "bool", False, "yes: starts the VM when all is proven."),
        Option("verify_first", "bool", False, "yes: reads the whole copy once before anything is made."),
        Option("force", "bool", False, "yes: takes a copy that is not good, and keeps what a damaged one "
               "gave."))),
    Action("extract", "Writes a disk of a copy into a sparse raw image; needs no pool, no password, no xe.",
           True, False, False, (
        Option("disk", "text", "", "Which disk: device (xvda), userdevice (0), uuid or name; needed if there "
               "are several."),
        Option("to", "text", "", "The file to write, which must not exist."),
        Option("from", "text", "latest", "latest (the default), a stamp, or a path, as with restore."),
        Option("metadata", "word", False, "Writes the VM's metadata (ova.xml) instead of a disk, to stdout "
               "unless to= is given."))),
    Action("drill", "Tests that copies can be restored: imports them, compares their disks, and removes "
           "everything again. VM: a VM, or newest-of-each.", True, False, True, (
        Option("sample", "int", 0, "Takes this many VMs, those that were longest not drilled.", minimum=1),
        Option("sr", "text", "", "Puts all disks on this SR; without it, each goes where it came from."),
        Option("boot", "minutes", 0.0, "yes: boots the VM, without network, and waits up to 5 minutes for "
               "its tools; or that many minutes."))),
    Action("status", "Shows the run that is going on, on any host, or how the last one ended. Needs no "
           "pool, no password, no xe.", False, False, False, ()),
    Action("history", "Shows the past runs of this config, or what became of one VM in them. "
           "Needs no pool, no password, no xe.", True, False, False, ()),
    Action("check", "Tells Nagios, Icinga or check_mk in one line whether each VM has a good copy that is "
           "new enough (exit status 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN). Needs no pool, no xe.",
           False, False, False, (
        Option("warn_age", "int", 30, "WARNING if the newest good copy of a VM is older than this many "
               "hours.", minimum=1),
        Option("crit_age", "int", 54, "CRITICAL if it is older than this many hours.", minimum=1))),
    Action("report", "Writes the page of report_html anew, as all stands now. Needs no pool, no password, no "
           "xe.", False, False, False, ()),
    Action("test-mail", "Sends a mail, to see that the mail settings work.", False, False, False, ()),
    Action("prune", "Applies retention without a backup and without a pool; with the word preview it only "
           "shows.", True, False, True, ()),
    Action("pin", "Keeps a copy whatever the retention rules say, and does not count it, until it is "
           "unpinned.", True, False, False, (
        Option("stamp", "text", "", "Which copy: its stamp, as `list` shows it."),
        Option("why", "text", "", "The reason, for people.")), ("stamp", "why")),
    Action("unpin", "Lets the retention rules decide again about a pinned copy.", True, False, False, (
        Option("stamp", "text", "", "Which copy: its stamp, as `list` shows it."),), ("stamp",)),
    Action("forget-references", "Removes the snapshots that keep_reference has left in the pool, of one VM "
           "or all; the next run reads everything.", True, False, False, ()),
)
ACTION_NAMES = tuple(action.name for action in ACTIONS)
IS_NAMED = re.compile(r"[^\s=]*=")       # NAME=VALUE, rather than a sentence


class Arguments(NamedTuple):
    """The command line, cut up. `vm` is the action's VM; `parameters` has a value for each that the action
    takes; `words` are those behind the password, as they were given."""
    password: str
    target: str
    action: Action
    vm: str
    preview: bool
    settings: Tuple[Setting, ...]
    parameters: Dict[str, Any]
    words: Tuple[str, ...] = ()


def parse_arguments(words: Sequence[str]) -> Arguments:
    """The command line; UsageError with a sentence if it is wrong."""
    if len(words) < 2:
        raise UsageError(f"TARGET is missing: a config file or a selector.\n\n{USAGE}")
    password, target = words[0], words[1]
    name, equals, _ = target.partition("=")
    if equals and name not in ("vm-export", "vdi-export") and (name in OPTION_NAMES or name == "vm"):
        raise UsageError(f"TARGET is missing before {one_line(target)}: a config file or a "
                         f"selector.\n\n{USAGE}")
    plain = [SETUP] * (target == SETUP) + [word for word in words[2:] if not IS_NAMED.match(word)]
    action_word = plain.pop(0) if plain else "backup"
    if action_word not in ACTION_NAMES:
        raise UsageError(f'"{one_line(action_word)}" is not an action; the actions are '
                         f'{", ".join(name for name in ACTION_NAMES if name != SETUP)}.')
    action = ACTIONS[ACTION_NAMES.index(action_word)]
    if action.name == SETUP != target:
        raise UsageError("setup writes a config and takes none: it stands in the place of "
                         f"TARGET.\n\n{USAGE}")
    preview = "preview" in plain and action.has_preview
    if preview:
        plain.remove("preview")
        if action.name == "backup":
            action = ACTIONS[ACTION_NAMES.index("preview")]
    settings, given = _settings_and_parameters([word for word in words[2:] if IS_NAMED.match(word)], action)
    vm = given.pop("vm", "")
    if plain and action.takes_vm and not vm:
        vm = plain.pop(0)
    for name in action.words:
        if plain and name not in given:
            given[name] = plain.pop(0)
    parameters = {own.name: own.default for own in action.parameters}
    for own in action.parameters:
        if own.kind == "word" and own.name in plain:
            plain.remove(own.name)
            given[own.name] = "yes"
        if own.name in given:
            try:
                parameters[own.name] = parse_value(own, given[own.name])
            except ValueError as problem:
                raise UsageError(f"{own.name}: {problem}")
    if plain:
        takes = ", ".join(["one VM"] * action.takes_vm + [word.upper() for word in action.words])
        raise UsageError(f'"{one_line(plain[0])}" is one word too many: {action.name} takes '
                         f'{takes or "only NAME=VALUE words"}.')
    return Arguments(password, target, action, vm, preview, tuple(settings), parameters, tuple(words[1:]))


def _settings_and_parameters(words: Sequence[str], action: Action) -> Tuple[List[Setting], Dict[str, str]]:
    """The config keys of the command line, and what the action itself is given, its VM too, as it was
    written."""
    own = [parameter.name for parameter in action.parameters] + (["vm"] if action.takes_vm else [])
    settings, given = [], {}               # type: List[Setting], Dict[str, str]
    for word in words:
        name, _, value = word.partition("=")
        if name in OPTION_NAMES:
            settings.append(Setting(name, value.strip(), "command line"))
        elif name in own and name not in given:
            given[name] = value
        elif name in own:
            raise UsageError(f"{name}= is given twice: keep one of them.")
        else:
            hint = did_you_mean(name, list(OPTION_NAMES) + own)
            raise UsageError(f'"{one_line(name)}" is neither a config key nor a parameter of '
                             f'{action.name}{hint and "; " + hint or "."}')
    return settings, given


USAGE = """\
usage: VmBackup.py PASSWORD TARGET [ACTION] [NAME=VALUE ...]
       VmBackup.py PASSWORD setup [NAME=VALUE ...]
       VmBackup.py PASSWORD create-password-file=FILE
       VmBackup.py help [config | example | ACTION]
       VmBackup.py --version"""


# --- what the table says to people ------------------------------------------------


def option_values_text(option: Option) -> str:
    """The values that an option takes, in a few words."""
    return {"bool": "yes or no", "time": "HH:MM", "choice": ", ".join(option.choices),
            "int": f"{option.minimum} or more" if option.maximum == MOST else
            f"{option.minimum} to {option.maximum}",
            "percent": f"percent, {option.minimum} to {option.maximum}",
            "selector": "SELECTOR", "disk": f"SELECTOR/DEVICE or {NOBAK}", "path": "PATH",
            "pool": "ADDRESS", "fingerprint": "HEX",
            "address": "USER@HOST", "addresses": "USER@HOST, ...", "text": "TEXT",
            "command": "PROGRAM ARGUMENT ...", "url": "URL", "minutes": "yes, or minutes"}[option.kind]


def option_default_text(option: Option) -> str:
    """The default as a config file would write it."""
    if option.kind == "bool":
        return "yes" if option.default else "no"
    return "" if option.default in (None, (), "") or option.kind == "minutes" or \
        option.kind == "int" and option.default < option.minimum else str(option.default)


def option_lines(option: Option) -> List[str]:
    """Its name, values, default and meaning."""
    default = option_default_text(option)
    return [f"  {option.name}={option_values_text(option)}{f' [{default}]' if default else ''}"
            if option.kind != "word" else f"  {option.name}"] + paragraph(option.help, "      ")


def option_help() -> str:
    """`help config`: every key with values, default and meaning, by section."""
    lines = ["Config file: key=value lines, UTF-8; # in the first column begins a comment.", ""]
    for section, options in OPTION_GROUPS:
        lines += [section, "-" * len(section)]
        for option in options:
            lines += option_lines(option)
        lines.append("")
    return "\n".join(lines + [SELECTOR_HELP])


SELECTOR_HELP = """\
Selectors: NAME, "NAME WITH ODD CHARACTERS", WILDCARD*, /REGEX/, uuid:UUID or
tag:TAG, each with an optional :N, the number of good copies to keep.
  *, ? and [...] are shell wildcards and stand for any VM that fits; a regex
  between slashes must fit the whole name. Case counts.
  The most precise selector decides a VM's kind and :N: uuid, then name, then
  the rest; at equal precision vdi-export beats vm-export, and within one kind
  the later line wins. exclude always wins."""


def example_text() -> str:
    """example.cfg: every key with its meaning, default or example, commented out where not needed."""
    lines = ["# VmBackup: example config. A line that begins with # is a comment.",
             "# Every key can stand on the command line too, as NAME=VALUE, and wins there."]
    for section, options in OPTION_GROUPS:
        lines += ["", f"# ---- {section} ----"]
        for option in options:
            default = option_default_text(option)
            lines += ["", f"# {option.help}",
                      f"# {option_values_text(option)}{f'; default: {default}' if default else ''}",
                      f"{'' if option.name == 'vm-export' else '#'}{option.name}={option.example or default}"]
    return "\n".join(lines) + "\n"


def help_text() -> str:
    """`VmBackup.py help`."""
    lines = [USAGE, ""]
    lines += two_columns((
        ("PASSWORD", "the pool's root password (visible to ps), the path of a password file, or - on a host "
         "as root"),
        ("TARGET", "a config file, or a selector such as web, PROD* or vdi-export=db1"),
        ("NAME=VALUE", "any config key (it wins over the file), or a parameter of the action"))) + [""]
    lines += ["Actions:"] + two_columns([(action.name, action.help) for action in ACTIONS])
    lines += ["", "A crontab line for every host of the pool:",
              "  10 0 * * 6 /usr/bin/python3 /snapshots/NAUbackup/VmBackup.py - "
              "/snapshots/NAUbackup/weekend.cfg >> /snapshots/NAUbackup/VmBackup-$(hostname -s).log 2>&1", "",
              "Exit statuses:"]
    lines += two_columns([(f"{status.value:3}", status.meaning) for status in ExitStatus] + [
        ("128+N", "stopped by signal N, after clean-up")])
    lines += [""] + paragraph("`help config` lists the config keys, `help example` prints an example config, "
                              "`help ACTION` tells the parameters of an action.")
    return "\n".join(lines)


def action_help_text(action: Action) -> str:
    """`VmBackup.py help ACTION`."""
    words = " [VM]" * action.takes_vm + "".join(f" [{word.upper()}]" for word in action.words)
    target = "TARGET " * (action.name != SETUP)
    lines = [f"VmBackup.py PASSWORD {target}{action.name}{words} [NAME=VALUE ...]", ""]
    lines += paragraph(action.help)
    if action.parameters:
        lines += [""] + [line for parameter in action.parameters for line in option_lines(parameter)]
    return "\n".join(lines)


def asked_help(words: Sequence[str]) -> Optional[str]:
    """The text that was asked for, None if none was; UsageError for a topic that does not exist."""
    if words[0] in ("config", "example") and len(words) == 1:
        words = ("help",) + tuple(words)
    if words[0] in ("--version", "-V") and len(words) == 1:
        return "VmBackup " + VERSION
    if words[0] not in ("help", "-h", "--help") or len(words) > 2:
        return None
    if len(words) == 1:
        return help_text()
    topic = words[1]
    if topic == "config":
        return option_help()
    if topic == "example":
        return example_text().rstrip("\n")
    if topic in ACTION_NAMES:
        return action_help_text(ACTIONS[ACTION_NAMES.index(topic)])
    raise UsageError(f"there is no help on \"{one_line(topic)}\"; there is on config, example, "
                     f"{', '.join(ACTION_NAMES)}.")


# =============================================================================
# 6. Selection and plan
# =============================================================================
# Which VM, by which method, keep how many, and why not the others. Pure: the
# plan that preview prints is the plan that a run executes.


class Job(NamedTuple):
    """One VM to back up, the rules for its copies, and the config line that chose it."""
    machine: VirtualMachine
    method: Method
    rules: Rules
    chosen_by: str


class Plan(NamedTuple):
    """What will be done, what not and why. `problems` are (sentence, is_error) of single entries."""
    jobs: Tuple[Job, ...]
    excluded: Tuple[Tuple[VirtualMachine, str], ...]
    unselected: Tuple[VirtualMachine, ...]
    findings: Tuple[Finding, ...]
    missing: Tuple[Tuple[Method, str], ...]      # literal entries without a VM: (method, text)
    provisional: Tuple[VirtualMachine, ...]      # those that a restore or drill is still making


OLDEST_VDI_EXPORT = (6, 5)        # xe vdi-export: XenServer 6.5


def make_plan(configuration: Configuration, inventory: Inventory) -> Plan:
    """The plan for that pool; every VM is in exactly one of jobs, excluded, provisional and unselected."""
    selectors = configuration.vm_export + configuration.vdi_export
    findings, missing = [], []                  # type: List[Finding], List[Tuple[Method, str]]
    usable, excludes = [], []                   # type: List[Selector], List[Selector]
    for selector in selectors + configuration.exclude:
        problem = _selector_problem(selector, inventory)
        if problem is None:
            (usable if selector.method else excludes).append(selector)
            continue
        findings.append(problem)
        if problem.severity is Severity.ERROR and selector.method:
            missing.append((selector.method, selector.pattern))
    jobs, excluded, provisional, unselected = [], [], [], []
    for machine in inventory.machines:
        exclude = next((selector for selector in excludes if selector.matches(machine)), None)
        chosen = choose_selector(machine, usable)
        if exclude:
            excluded.append((machine, exclude.line))
        elif chosen:
            jobs.append(Job(machine, chosen.method, configuration.rules(chosen.keep), chosen.line))
        elif is_provisional(machine.name) and any(selector.matches(machine) for selector in selectors):
            provisional.append(machine)
        else:
            unselected.append(machine)
    if usable and not jobs:
        findings.append(Finding(Severity.WARNING, configuration.source, "backs up no VM: whatever its "
                                "entries select is left out by exclude. Correct one or the other."))
    findings += [Finding(Severity.WARNING, exclude.line, "leaves out no disk of any VM that is backed up: "
                         "correct the line, or remove it.")
                 for exclude in configuration.exclude_disk if exclude.selector is not None and not any(
                     exclude.matches(job.machine, disk) for job in jobs
                     for disk in left_out_disks(job.machine, configuration.exclude_disk))]
    findings.extend(_odd_machines(jobs, unselected, inventory))
    return Plan(tuple(jobs), tuple(excluded), tuple(unselected), tuple(findings), tuple(missing),
                tuple(provisional))


def _odd_machines(jobs: Sequence[Job], unselected: Sequence[VirtualMachine],
                  inventory: Inventory) -> List[Finding]:
    """What is odd about names and records of the pool: a warning where it may cost a VM of this config
    something."""
    findings = []
    for name, number in sorted(collections.Counter(job.machine.name for job in jobs).items()):
        if number > 1:
            bearers = ", ".join(job.machine.uuid for job in jobs if job.machine.name == name)
            findings.append(Finding(Severity.WARNING, quote_name(name), f"{number} VMs bear this name, and "
                                    f"each is backed up in a directory of its own: {bearers}. "
                                    "To tell them apart, rename one; to leave one out, exclude=uuid:UUID."))
    findings += [Finding(Severity.WARNING, "pool " + inventory.pool_title, problem)
                 for problem in inventory.problems]
    for machines, severity in (([job.machine for job in jobs], Severity.WARNING),
                               (unselected, Severity.INFO)):
        findings += [Finding(severity, machine.title, problem) for machine in machines
                     for problem in machine.problems]
    for job in jobs:
        for folder, disk in zip(disk_folders(job.machine.disks), job.machine.disks):
            if folder != disk_folder(disk):
                findings.append(Finding(Severity.INFO, job.machine.title, "two of its disks are "
                                        f"{disk.device}; the cfg files of the one with userdevice "
                                        f"{quote_name(disk.userdevice)} go into {folder}."))
    return findings


def first_disk(machine: VirtualMachine) -> Disk:
    """Disk 0: the disk whose userdevice is 0, xvda or hda, in that order; BackupError if there is none, or
    more than one."""
    for userdevice in ("0", "xvda", "hda"):
        found = [disk for disk in machine.disks if disk.userdevice == userdevice]
        if len(found) > 1:
            listed = ", ".join(f"{disk_list((disk,))}, VDI {disk.vdi_uuid}" for disk in found)
            raise BackupError(
                f"{machine.title} has {len(found)} disks with userdevice {userdevice}, and which one "
                f"vdi-export should take is not guessed: {listed}. Use vm-export, or detach the wrong one.")
        if found:
            return found[0]
    raise BackupError(f"{machine.title} has no Disk 0 (userdevice 0, xvda or hda), so vdi-export has nothing "
                      f"to do; it has {disk_list(machine.disks) or 'no disk at all'}. Use vm-export, or give "
                      "the OS disk userdevice 0.")


def left_out_disks(machine: VirtualMachine, excludes: Sequence[DiskExclude]) -> Dict[Disk, str]:
    """The VM's disks that are left out, each with the line that says so. One that hangs on two of its drives
    is so only if both are named."""
    found = {}                             # type: Dict[Disk, str]
    for exclude in excludes:
        for disk in machine.disks:
            if exclude.matches(machine, disk):
                found.setdefault(disk, exclude.line)
    wanted = {disk.vdi_ref for disk in machine.disks if disk not in found}
    return {disk: found[disk] for disk in machine.disks if disk in found and disk.vdi_ref not in wanted}


def disks_to_export(machine: VirtualMachine, method: Method,
                    excludes: Sequence[DiskExclude]) -> Tuple[Disk, ...]:
    """The disks that the copy is to hold; BackupError, which begins with the VM's title, if none may be."""
    left_out = left_out_disks(machine, excludes)
    if method is Method.VDI:
        disk = first_disk(machine)
        if disk in left_out:
            raise BackupError(f"{machine.title} has its Disk 0, {disk_list((disk,))}, left out by "
                              f"{left_out[disk]}, and vdi-export backs up nothing else: correct that line, "
                              "or exclude the VM.")
        return (disk,)
    if machine.disks and len(left_out) == len(machine.disks):
        raise BackupError(f"{machine.title} has all its disks left out, by "
                          f"{' and '.join(sorted(set(left_out.values())))}: such a copy would be of no use. "
                          "Correct that, or exclude the VM.")
    return tuple(disk for disk in machine.disks if disk not in left_out)


def disk_list(disks: Iterable[Disk]) -> str:
    """The disks in a few words: device, name, size."""
    return ", ".join(f"{disk.device} {quote_name(disk.name)} ({format_size(disk.virtual_size)})"
                     for disk in disks)


def disk_folder(disk: Disk) -> str:
    """The directory of a disk's cfg files, which bears its device, as long as no other disk has that."""
    return "DISK-" + safe_name(disk.device)


def disk_folders(disks: Sequence[Disk]) -> List[str]:
    """The directories of these disks' cfg files: after disks were put in another order, two can have one
    device."""
    return _told_apart([(disk_folder(disk), disk.userdevice, disk.vbd_uuid) for disk in disks])


def _told_apart(names: Sequence[Tuple[str, str, str]]) -> List[str]:
    """A name for each (name, addition, last resort), no two of them one on any file system; the name alone
    where it is free."""
    taken, chosen = set(), []              # type: Set[str], List[str]
    for name, addition, last in names:
        tries = (name, f"{name}-{safe_name(addition)}", f"{name}-{safe_name(last)}")
        chosen.append(next((one for one in tries if folded(one) not in taken), f"{name}-{len(taken)}"))
        taken.add(folded(chosen[-1]))
    return chosen


def choose_selector(machine: VirtualMachine, selectors: Sequence[Selector]) -> Optional[Selector]:
    """The selector that decides about the VM: the most precise; then vdi-export; then the later line."""
    matching = [(selector.precision, selector.method is Method.VDI, index, selector)
                for index, selector in enumerate(selectors) if selects(selector, machine)]
    return max(matching)[3] if matching else None


def selects(selector: Selector, machine: VirtualMachine) -> bool:
    """Does it choose that VM for a backup? One that is still being made, perhaps without some of its disks,
    perhaps under the uuid that it is to keep, is chosen by its full name only."""
    return selector.matches(machine) and (selector.form == "name" or not is_provisional(machine.name))


def _selector_problem(selector: Selector, inventory: Inventory) -> Optional[Finding]:
    """Why the entry, as it stands, chooses or excludes nothing; None if it does."""
    if selector.method is Method.VDI and () < inventory.master.product_version < OLDEST_VDI_EXPORT:
        return Finding(Severity.ERROR, selector.line, "vdi-export needs XenServer 6.5 or newer; this pool "
                       f"runs {'.'.join(map(str, inventory.master.product_version))}. Use vm-export.")
    if selector.bare and selector.keep and any(machine.name == selector.text
                                               for machine in inventory.machines):
        return Finding(Severity.ERROR, selector.line, "there is a VM named exactly "
                       f"{quote_name(selector.text)}: write the name in quotes if it is meant.")
    found = [machine for machine in inventory.machines if selector.matches(machine)]
    if selector.method is None and found or any(selects(selector, machine) for machine in found):
        return None
    if found:
        return Finding(Severity.ERROR if selector.is_literal else Severity.WARNING, selector.line, "is not "
                       f"backed up: {provisional_text(found[0])}")
    hint = _regex_hint(selector, {machine.name for machine in inventory.machines})
    if selector.method is None:
        return Finding(Severity.WARNING, selector.line, f"excludes no VM of the pool.{hint} Correct "
                       "the line, or remove it.")
    if selector.is_literal:
        return Finding(Severity.ERROR, selector.line, f"no VM of the pool {inventory.pool_title} bears this "
                       f"{'name' if selector.form == 'name' else 'uuid'}, so it is not being backed "
                       f"up.{hint} Correct the line, or remove it if the VM is gone for good.")
    return Finding(Severity.WARNING, selector.line, f"matches no VM of the pool.{hint} Correct the "
                   "line, or remove it.")


def provisional_text(machine: VirtualMachine) -> str:
    """Why a VM that is still being made is not backed up."""
    return (f"{machine.title} bears the name of a VM that a restore or drill is still making. If none is, "
            "give it another name.")


def _regex_hint(selector: Selector, names: Set[str]) -> str:
    """`did you mean` for a selector that matches nothing but would as a regex."""
    if not selector.bare or selector.form == "prefix-regex" or PLAIN_OLD_NAME.fullmatch(selector.pattern):
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")             # no regex if Python has its doubts about it
            matching = counted(sum(1 for name in names if re.match(selector.pattern, name)), "VM")
    except (re.error, OverflowError, RecursionError, Warning):
        return ""
    return "" if matching == "0 VMs" else (f" As a regex it would match {matching}: did you mean "
                                           f"{_as_written_now(selector)}, or wildcards=regex?")


def _as_written_now(selector: Selector) -> str:
    """The value that selects what this one did that versions 3.1 to 3.25 read as a regex."""
    regex, keep = selector.pattern, f":{selector.keep}" if selector.keep else ""
    if re.fullmatch(r"[A-Za-z0-9_ -]*\.\*", regex):
        return regex.replace(".*", "*") + keep
    regex = regex[:-2] if regex.endswith(".*") and not regex.endswith("\\.*") else regex
    if "|" in regex:                       # flags stand first; a group more would shift what \1 stands for
        flags = re.match(r"(\(\?[aiLmsux]+\))*", regex).group()
        regex = regex[len(flags):]
        regex = f"{flags}({'?:' if '(' in regex else ''}{regex})"
    return f"/{regex}.*/{keep}"


# --- configs of the older program ---------------------------------------------------


OLD_KEYS = frozenset(("vm-export", "vdi-export", "exclude", "pool_db_backup", "max_backups", "backup_dir",
                      "status_log", "vdi_export_format", "compress", "pre_clean", "ignore_extra_keys"))
MOST_NAMED = 5                    # of the VMs that one line of the config is about


def older_reading(configuration: Configuration) -> Optional[Configuration]:
    """The configuration as versions 3.1 to 3.25 read its file; None if it says something that they did not
    know, wildcards=shell too, or if they could not read it."""
    values = {option.name: getattr(configuration, option.field) for option in OPTIONS}
    if not OLD_KEYS.issuperset(configuration.places) or configuration.compress == "zstd":
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for key in ("vm-export", "vdi-export", "exclude"):
                if any(one.form in ("uuid", "tag", "regex") or one.place == "command line"
                       for one in values[key]):
                    return None
                values[key] = tuple(parse_selector(Setting(key, one.text, one.place), "regex")
                                    for one in values[key])
    except (ValueError, Warning):
        return None
    return Configuration(values, configuration.places, (), configuration.source, configuration.path)


def older_differences(configuration: Configuration, inventory: Inventory, plan: Plan) -> List[Finding]:
    """What a config that may be one of the older program's would do otherwise than there, and how to keep it
    as it was: a finding for each line that is not what it was to some VM of the pool, in place of what the
    plan says of it. They are warnings if it is surely written in regexes: then somebody's backups are at
    stake. `PROD*` is as well a shell wildcard.
    """
    older = older_reading(configuration)
    if older is None:
        return []
    selectors = configuration.vm_export + configuration.vdi_export + configuration.exclude
    olders = older.vm_export + older.vdi_export + older.exclude
    pairs = [(one, was) for one, was in zip(selectors, olders) if one.form != was.form]
    changed = {one.line: one for one, _ in pairs}
    names = {machine.name for machine in inventory.machines}
    is_theirs = any(".*" in one.pattern or not any(map(one.matches, inventory.machines))
                    and _regex_hint(one, names) for one in changed.values())
    severity = Severity.WARNING if is_theirs else Severity.INFO
    before, now = _decided(make_plan(older, inventory)), _decided(plan)
    found = {line: {} for line in changed}       # type: Dict[str, Dict[Tuple[str, str], List[str]]]
    for machine in inventory.machines:
        (was, by), (becomes, line) = before.get(machine.uuid, NO_BACKUP), now.get(machine.uuid, NO_BACKUP)
        if was != becomes:
            found[by if by in changed else line].setdefault((was, becomes), []).append(machine.title)
    for one, older_one in pairs if any(found.values()) else ():
        if not found[one.line]:            # what the other lines come to rewritten can hang on this one
            then, here = _reached(older_one, inventory), _reached(one, inventory)
            for machine in inventory.machines:
                was, becomes = ("matched" if machine.uuid in part else "not matched" for part in (then, here))
                if was == becomes == "matched" and one.precision != older_one.precision and \
                        before.get(machine.uuid, NO_BACKUP)[1] != one.line:
                    becomes = "matched by its name, which is more precise"
                if was != becomes:
                    found[one.line].setdefault((was, becomes), []).append(machine.title)
    findings = []
    problems = {finding.subject: finding.severity for finding in plan.findings}
    others = sum(map(bool, found.values())) - 1
    together = f", together with the other {'line' if others == 1 else f'{others} lines'} named here, as " \
        "one alone may select too much" if others > 0 else ""
    for line, groups in found.items():
        words = "; ".join(
            f"{counted(len(titles), 'VM')} (then {was}, now {becomes}): {', '.join(titles[:MOST_NAMED])}"
            + (f" and {len(titles) - MOST_NAMED} more" if len(titles) > MOST_NAMED else "")
            for (was, becomes), titles in groups.items())
        if words:
            form = "name" if changed[line].is_literal else "shell wildcard"
            form += " that selects no VM" if line in problems else ""
            findings.append(Finding(
                problems.get(line, severity), line, "NAUbackup 3.1 to 3.25 read it as a regex; here it is a "
                f"{form}. {words}. To keep it as it was, add wildcards=regex to the config, or write "
                f"{_as_written_now(changed[line])} in this line{together}; if it is meant as it stands, add "
                "wildcards=shell."))
    return findings + list(_older_notes(configuration, plan))


def _reached(selector: Selector, inventory: Inventory) -> Set[str]:
    """The uuids of the VMs that the entry chooses or excludes as it stands."""
    return set() if _selector_problem(selector, inventory) else {
        machine.uuid for machine in inventory.machines if (
            selects(selector, machine) if selector.method else selector.matches(machine))}


def _older_notes(configuration: Configuration, plan: Plan) -> Iterator[Finding]:
    """What other lines of the older program's config do otherwise here, of no harm to any copy."""
    images = sum(job.method is Method.VDI for job in plan.jobs)
    if configuration.compress != "none" and images:
        yield Finding(Severity.INFO, configuration.places["compress"], "compress: NAUbackup compressed only "
                      f"what vm-export made; here the images of vdi-export ({counted(images, 'VM')}) are "
                      "compressed, too: unpack one before it is imported by hand.")
    single = sum(job.rules.newest == 1 for job in plan.jobs)
    if configuration.pre_clean and single:
        yield Finding(Severity.INFO, configuration.places["pre_clean"], "pre_clean: NAUbackup removed even a "
                      "VM's last copy before it made the new one; here the last good one stays until the new "
                      "one is good: the store needs room for two copies of each VM of which one is kept "
                      f"({counted(single, 'VM')}).")


NO_BACKUP = ("not backed up", "")


def _decided(plan: Plan) -> Dict[str, Tuple[str, str]]:
    """What the plan does with VMs, by uuid, in words, and the line that says so."""
    decided = {job.machine.uuid: (f"{job.method.value} with {counted(job.rules.newest, 'copy')}",
                                  job.chosen_by) for job in plan.jobs}
    decided.update((machine.uuid, (NO_BACKUP[0], line)) for machine, line in plan.excluded)
    return decided


# --- why a VM is selected, or is not ------------------------------------------------------


FORM_WORDS = {"uuid": "a uuid", "name": "a name", "wildcard": "a wildcard", "regex": "a regex",
              "prefix-regex": "a regex", "tag": "a tag"}
LOOSER = (                             # how two texts may differ that look alike to people, nearest first
    ("upper and lower case", str.casefold),
    ("blanks", lambda text: re.sub(r"\s", "", text)),
    ("case and blanks", lambda text: re.sub(r"\s", "", text.casefold())),
    ("characters that look alike, or marks such as - and _",
     lambda text: re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", text).casefold())))
NEAR_MOST = 5                          # lines and names that are told


def lines_about(machine: VirtualMachine, configuration: Configuration, inventory: Inventory) -> List[str]:
    """What each line comes to that selects or excludes the VM, in sentences, the one that decides first."""
    found, idle, excluded = [], [], False          # type: List[Selector], List[str], bool
    for selector in configuration.exclude + configuration.vm_export + configuration.vdi_export:
        problem = _selector_problem(selector, inventory)
        if not selector.matches(machine):
            continue
        if problem is not None:
            idle.append(f"{selector.line} selects nothing as it stands: {problem.sentence}")
        elif selector.method is None:
            idle.insert(0, f"{selector.line} leaves it out: an exclude wins over all that selects it.")
            excluded = True
        elif selects(selector, machine):
            found.append(selector)
        else:
            idle.append(f"{selector.line} selects no VM that is still being made.")
    chosen = choose_selector(machine, found)
    if chosen is None:
        return idle
    others = [one for one in found if one is not chosen]
    decides = f"{chosen.line} " + ("would decide, were it not left out" if excluded else "decides")
    own = [f"{decides}{'' if others or excluded else ': no other line selects it'}."]
    own += [f"{one.line} selects it, too, but {why_beaten(one, chosen)}." for one in others]
    return idle + own if excluded else own + idle


def why_beaten(selector: Selector, chosen: Selector) -> str:
    """Why the other selector decides about a VM that both select."""
    if selector.precision != chosen.precision:
        return f"{FORM_WORDS[chosen.form]} is more precise than {FORM_WORDS[selector.form]}"
    if selector.method is not chosen.method:
        return "of two that are equally precise vdi-export beats vm-export"
    return "of two that are equally precise the later one decides"


def nearest_lines(machine: VirtualMachine, configuration: Configuration,
                  is_selected: bool = False) -> List[str]:
    """Those lines that come nearest to selecting the VM, and do not, each with why; of a VM that another line
    selects excludes, too, and only what people would take for the VM's own name."""
    near = []                              # type: List[Tuple[int, str]]
    excludes = configuration.exclude if is_selected else ()
    for selector in excludes + configuration.vm_export + configuration.vdi_export:
        rank, why = near_miss(selector, machine)
        if why and not selector.matches(machine) and (rank < len(LOOSER) or not is_selected):
            near.append((rank, f"{selector.line} does not select it: {why}."))
    return [sentence for _, sentence in sorted(near, key=lambda one: one[0])[:NEAR_MOST]]


def near_miss(selector: Selector, machine: VirtualMachine) -> Tuple[int, str]:
    """How near a selector that does not select the VM comes to that, 0 the nearest, and why it does not; ""
    if it is far from it."""
    pattern, form, name = selector.pattern, selector.form, machine.name
    is_regex = form in ("regex", "prefix-regex")

    def would(change: Callable[[str], str]) -> bool:
        ignoring = "(?i)" if is_regex and change("A") == "a" else ""
        with contextlib.suppress(re.error, OverflowError, RecursionError):
            return selector._replace(pattern=ignoring + (pattern if ignoring else change(pattern))).matches(
                machine._replace(name=change(name), tags=tuple(map(change, machine.tags))))
        return False

    what = f"its tag {', '.join(map(quote_name, machine.tags))}" if form == "tag" else "the VM's name"
    if selector.bare and selector.keep and selector.text == name:
        return 0, "the number behind the colon is read as the copies to keep: write the name in quotes"
    for rank, (words, change) in enumerate(LOOSER):
        loose = change(pattern)            # of `*` or `-` nothing may be left
        if form != "uuid" and (rank < 3 or not is_regex and form != "wildcard" and loose) and would(change):
            return rank, f"{what} differs in {words}"
    if form == "tag":
        others = ", ".join(map(quote_name, machine.tags))
        return 9, f"it has only the tag {others}" if len(machine.tags) == 1 else \
            f"it has only the tags {others}" if others else "it has no tag"
    hint = _regex_hint(selector, {name})
    with contextlib.suppress(re.error, OverflowError, RecursionError):
        if hint and re.fullmatch(pattern, name):
            return 4, f"it is no regex.{hint.rstrip('?')}"
        if form == "regex" and re.match(pattern, name):
            return 4, "it matches only the beginning, and a regex must match the whole name: " \
                f"/{one_line(pattern)}.*/"
        if is_regex and fnmatch.fnmatchcase(name, pattern):
            return 4, "a regex is no wildcard; as that it would match"
        if form == "name" and not selector.bare and fnmatch.fnmatchcase(name, pattern):
            return 4, "what stands in quotes is a name, letter by letter, and no wildcard"
        if form == "wildcard" and fnmatch.fnmatchcase(name, f"*{pattern}*"):
            return 6, "a wildcard must match the whole name, beginning and end"
        if form == "name" and len(pattern) > 2 and pattern in name:
            return 7, "it stands for a VM of exactly this name, and is only a part of this one's"
    wanted = {"name": name, "uuid": machine.uuid}.get(form, "")
    differing = characters_between(wanted, pattern)
    if len(wanted) > 3 * differing - 1:
        return 5, f"{what if form == 'name' else 'its uuid'} differs in {counted(differing, 'character')}"
    return 9, ""


def characters_between(one: str, other: str) -> int:
    """How many characters one text has that the other has not, in their order; about as people would count
    what was mistyped."""
    import difflib
    blocks = difflib.SequenceMatcher(None, one, other, False).get_matching_blocks()
    return max(len(one), len(other)) - sum(block.size for block in blocks)


def near_names(name: str, names: Iterable[str]) -> List[str]:
    """Those of the names that come nearest to that one, the nearest first."""
    import difflib
    loosest = LOOSER[-1][1]
    forms = {}                             # type: Dict[str, List[str]]
    for one in sorted(set(names)):
        forms.setdefault(loosest(one) or one, []).append(one)
    near = difflib.get_close_matches(loosest(name) or name, forms, NEAR_MOST)
    return [one for form in near for one in forms[form]][:NEAR_MOST]


def line_for(machine: VirtualMachine, configuration: Configuration) -> str:
    """The config line that selects the VM by its name, quoted where it must be; "" where no line can bear the
    name."""
    quoted = machine.name.replace("\\", "\\\\").replace('"', '\\"')
    for text in (machine.name, f'"{quoted}"'):
        line = f"{Method.VM.value}={text}"
        settings, problems = read_settings(line.encode("utf-8", "replace"), "")
        with contextlib.suppress(ValueError):
            if line.isprintable() and len(settings) == 1 and not problems:
                found = parse_selector(settings[0], configuration.wildcards)
                if (found.form, found.pattern, found.keep) == ("name", machine.name, None):
                    return line
    return ""


# =============================================================================
# 7. Retention
# =============================================================================
# Which copies stay and which go, each with its reason. Pure: nothing is listed
# or deleted here, and no clock is asked.


class Layer(NamedTuple):
    """A copy's place in its chain, where its manifest tells the state of every block. `full`: the copy that
    the chain begins with, its own name for a full (`depth` 1). `base`: the copy that it was compared with, ""
    for a full. `holders`: the copies that hold blocks of it, each with the SHA-256 of its manifest. `why` it
    is a full, or how it came about. `is_first`: the chain is the VM's first."""
    depth: int
    full: str
    base: str
    why: str
    holders: Tuple[Tuple[str, str], ...] = ()
    is_first: bool = False

    @property
    def held_by(self) -> Set[str]:
        return {name for name, _ in self.holders}


class Copy(NamedTuple):
    """A directory in a VM's directory that is named as a copy is; "" and None: not known, or not so.

    `taken_at`: the local time in its name, naive; `written_at`: the manifest's UTC time. `uuid` is the VM's,
    `pool` that of its pool, `home` the directory that it was made in. `problem`: why it does not count as
    good; `is_unreadable`: the storage did not say what it is; `is_newer`: its manifest is of a later version
    than this. `aside`: why it is neither counted nor removed, good as it may be; `pin` the same of one that
    somebody pinned. `mark`: what a verdict on it belongs to, the SHA-256 of its manifest; `checks`: what is
    on record of later checks. `rules` are its manifest's; `other_rules` those of other configs that counted
    when it was made, each with the UTC time of that config's last copy. `disks` in the image and those
    `left_out`, in words. `round`: the id of the round that made it. `layer` is None where the manifest does
    not tell the state of every block; `broken`: which of the copies that hold blocks of it fails it;
    `read_back`: its image was read back from storage when it was made; `is_changed`: files of it were written
    since it was verified. `images`: the names of all, `image` the first; `snapshots`: the uuids of the
    snapshots of disks that they were made of. `reading`: how each disk was read (full, all, difference), by
    its name in `blocks`, and why. `audit`: what its own audit has found, and the copies that this is about;
    `accused`: what that of another has found of it.
    """
    folder: str
    name: str
    taken_at: datetime
    is_old: bool
    method: Optional[Method]
    uuid: str
    vm_name: str
    sequence: int
    written_at: Optional[datetime]
    rules: Optional[Rules]
    image: str
    size_bytes: int
    problem: str
    disks: Tuple[str, ...] = ()
    pool: str = ""
    home: str = ""
    is_newer: bool = False
    aside: str = ""
    is_unreadable: bool = False
    mark: str = ""
    checks: Mapping[str, Any] = {}
    pin: str = ""
    left_out: Tuple[str, ...] = ()
    other_rules: Tuple[Tuple[Rules, str], ...] = ()
    layer: Optional[Layer] = None
    broken: str = ""
    read_back: bool = False
    is_changed: bool = False
    images: Tuple[str, ...] = ()
    snapshots: Tuple[str, ...] = ()
    reading: Tuple[Tuple[str, str, str], ...] = ()
    audit: Tuple[str, Tuple[str, ...]] = ("", ())
    accused: str = ""
    round: str = ""

    @property
    def stamp(self) -> str:
        """What tells it from others of its directory, as from= takes it."""
        return self.name[len("backup-"):]

    @property
    def is_good(self) -> bool:
        """Marker and image are there, the image has its size, and no check has found it bad since."""
        return not self.trouble

    @property
    def trouble(self) -> str:
        return self.problem or self.verdict or self.suspicion or self.broken

    @property
    def is_increment(self) -> bool:
        return self.layer is not None and self.layer.depth > 1

    @property
    def layer_words(self) -> str:
        """What it is in its chain, in words; "" if its manifest tells of none."""
        if self.layer is None:
            return ""
        return f"increment on {self.layer.base}, {self.layer.why}" if self.is_increment \
            else f"full, as {self.layer.why}"

    @property
    def is_garbled(self) -> bool:
        """Is it one of ours of which the manifest does not tell what it is?"""
        return not self.is_old and self.method is None and not self.is_newer

    @property
    def was_read_back(self) -> bool:
        """Has all that it holds itself been read from storage since it was written there, and was it good?"""
        return self.is_good and (self.read_back or not self.is_changed and (
            self.checked("verdict") == GOOD or self.checked("drilled_at") is not None))

    @property
    def verdict(self) -> str:
        """What the last check on record (verify or drill) has against it, in a sentence; "" if nothing."""
        drill = (self.checked("drilled_at"), self.checked("drill") == NOT_RESTORABLE,
                 "a drill", NOT_RESTORABLE, self.checks.get("drill_reason"))
        verify = (self.checked("verified_at"), self.checked("verdict") == DAMAGED,
                  "verify", DAMAGED, self.checks.get("reason"))
        at, is_bad, who, word, why = max((drill, verify), key=lambda check: (check[0] or "", check[1]))
        if at is None or not is_bad:
            return ""
        return f"{who} of {at[:10]} found it {word} ({one_line(str(why)).rstrip('.')})"

    @property
    def suspicion(self) -> str:
        """What an audit has against it, in a sentence; "" if nothing. It rests on the pool: no later check of
        the files lifts it. The manifest of the audited copy has it, too, should the records be lost."""
        why = self.accused
        if self.checked("audit") == SUSPECT:
            why = str(self.checks.get("audit_reason"))
        at = (self.checked("audited_at") or "")[:10] or "a later copy"
        return why and f"{SUSPECT}, by the audit of {at}: {one_line(why).rstrip('.')}"

    @property
    def is_by_difference(self) -> bool:
        return any(how == DIFFERENCE for _, how, _ in self.reading)

    @property
    def is_doubtful(self) -> bool:
        """Did the last check on record find it bad, and not only in what it does not hold itself?"""
        is_by_drill = (self.checked("drilled_at") or "") > (self.checked("verified_at") or "")
        return bool(self.verdict) and (is_by_drill or self.checked("layer") != GOOD)

    def vouches_against(self, other: "Copy") -> bool:
        """Was it found good later than the other was found bad?"""
        at, others = ([copy.checks.get(key) for key in ("verified_s", "drilled_s")] for copy in (self, other))
        return self.checked("verdict") == GOOD and isinstance(at[0], float) \
            and all(at[0] > one for one in others if isinstance(one, float))

    def checked(self, key: str) -> Optional[str]:
        """A text on record of its checks, None if it is not there or is none that this program writes."""
        return self.checks[key] if isinstance(self.checks.get(key), str) else None

    def counts_for(self, uuid: str, method: Method) -> bool:
        """Is it one of the good copies of that VM and kind that retention counts?"""
        return self.is_of(uuid, method) and self.is_good and not self.pin

    def is_of(self, uuid: str, method: Method) -> bool:
        """Is it a copy of that VM and kind, and at home where it lies?"""
        return self.uuid == uuid and self.method is method and not self.aside


GOOD = "good"
DAMAGED = "DAMAGED"
NOT_RESTORABLE = "NOT RESTORABLE"
SUSPECT = "SUSPECT"
AGREED = "agreed"
DIFFERENCE = "difference"


class Verdict(NamedTuple):
    """What retention says about a copy: whether it stays, the rules that hold it or why it goes, and until
    when it is held, "" where that can't be known; and for how many copies that stay it holds blocks."""
    copy: Copy
    keep: bool
    reason: str
    until: str = ""
    needed: int = 0

    @property
    def text(self) -> str:
        return self.reason + (f" ({self.until})" if self.until else "")


class Hold(NamedTuple):
    """A rule that holds a copy, in words; and when it lets go: not before so many more good copies of the VM
    and kind are there, nor before that day (None: any day)."""
    words: str
    more: int
    day: Optional[date] = None


def in_order(copies: Iterable[Copy]) -> List[Copy]:
    """Oldest first: ours by sequence number; one of the older program before our first with a later stamp."""
    copies = list(copies)
    ours = sorted((copy for copy in copies if not copy.is_old), key=lambda copy: (copy.sequence, copy.name))
    ordered = []                                # type: List[Copy]
    older = sorted((copy for copy in copies if copy.is_old), key=lambda copy: (copy.taken_at, copy.name))
    for copy in ours:              # one without a number, as its manifest can't be read, moves no other
        while older and copy.sequence and older[0].taken_at < copy.taken_at:
            ordered.append(older.pop(0))
        ordered.append(copy)
    return ordered + older


PERIODS = ("day", "week", "month", "year")     # as Rules has them behind `newest`


def period_of(unit: str, at: datetime) -> str:
    """`2026-11-26`, `2026-W48` (ISO), `2026-11`, `2026`: of one unit, later ones sort behind earlier ones."""
    if unit == "week":
        return "%04d-W%02d" % at.isocalendar()[:2]
    return at.isoformat()[:{"day": 10, "month": 7, "year": 4}[unit]]


def later_period(unit: str, at: datetime, steps: int) -> Optional[date]:
    """The first day of the period that is so many behind that of the time; None beyond the calendar's end."""
    day = at.date()
    try:
        if unit == "day":
            return day + timedelta(days=steps)
        if unit == "week":
            return day + timedelta(days=7 * steps - day.weekday())
        months = day.month - 1 + steps if unit == "month" else 12 * steps
        return date(day.year + months // 12, months % 12 + 1, 1)
    except (OverflowError, ValueError):
        return None


def held_by(copies: Sequence[Copy], rules: Rules, now: datetime) -> Iterator[Tuple[str, Hold]]:
    """The rules' holds on all copies that count, oldest first, each with its copy's name; `now` is local
    time. Of a week, month or year the newest full is held, if there is one, as it needs no other copy."""
    newest = max(rules.newest, 1)
    for position, copy in enumerate(reversed(copies[-newest:])):
        yield copy.name, Hold(f"newest {newest}", newest - position)
    for unit, number in zip(PERIODS, rules[1:]):
        last = {period_of(unit, copy.taken_at): copy.name for copy in sorted(
            copies, key=lambda copy: unit != "day" and not copy.is_increment)}
        current = period_of(unit, now)
        for position, period in enumerate(sorted(last, reverse=True)[:number]):
            if period >= current:              # the next copy of the same period takes its place
                hold = Hold(f"{unit} {period}", 1)
            else:                              # it goes when so many later periods have a copy
                day = later_period(unit, now, number - position - (current not in last))
                hold = Hold(f"{unit} {period}", number - position,
                            day if day is not None and day >= now.date() else None)
            yield last[period], hold


def until_text(holds: Sequence[Hold]) -> str:
    """When the last of these holds lets go."""
    day = max((hold.day for hold in holds if hold.day is not None), default=None)
    more = counted(max(hold.more for hold in holds), "more good copy", "is")
    return f"at least until {more} there" + (f", not before {day}" if day else "")


def kept_text(rules: Sequence[Rules], noun: str = "", verb: str = "") -> str:
    """How many copies the rules keep, in words, those of other configs than the first behind it."""
    texts = []
    for one in rules:
        number = max(one.newest, 1)
        texts.append(f"{counted(number, noun, verb)} kept" if not texts else f"newest {number}")
        periods = [counted(number, unit) for unit, number in zip(PERIODS, one[1:]) if number]
        if periods:
            texts[-1] += f", and one of each of the last {', '.join(periods)}"
        texts[-1] += of_config(one, rules[0].config)
    return "; ".join(texts)


def of_config(rules: Rules, own: str) -> str:
    """Whose rules they are, "" if they are this config's."""
    return "" if rules.config == own else f" of {one_line(rules.config)}"


def rules_told(copies: Iterable[Copy], uuid: str, method: Method) -> Dict[str, Tuple[Rules, str]]:
    """By config the rules in the newest manifest of each that made copies of a VM and kind, and its UTC time.
    The newest of all tells them too, as that copy may be gone. Those of earlier versions tell no config."""
    told, last = {}, None                  # type: Dict[str, Tuple[Rules, str]], Optional[Copy]
    for copy in in_order(copies):
        if copy.rules is not None and copy.rules.config and copy.written_at and copy.is_of(uuid, method):
            told[copy.rules.config], last = (copy.rules, format_utc(copy.written_at)), copy
    for rules, at in last.other_rules if last is not None else ():
        if rules.config and at > told.get(rules.config, (rules, ""))[1]:
            told[rules.config] = rules, at
    return told


def rules_for(own: Rules, copies: Iterable[Copy], uuid: str, method: Method) -> Tuple[Rules, ...]:
    """The rules that count for a VM and kind: this config's own first, then those of each other config that
    made copies of it, so that no config removes what another wants."""
    told = rules_told(copies, uuid, method)
    return (own,) + tuple(told[config][0] for config in sorted(told) if config != own.config)


def judge(copies: Sequence[Copy], uuid: str, method: Method, rules: Sequence[Rules], now: datetime,
          sealed: str = "", has_unfinished: bool = False) -> List[Verdict]:
    """A verdict on each copy of a VM's directory, oldest first, by the rules for that VM and kind, this
    config's first; `now` is local time.

    Only good copies of this uuid and this method are counted or let go, and of those only what no rule holds
    and no copy needs that stays. The newest good one always stays; and so do `sealed`, which this run has
    just made, and the last that we made, which copies of the older program with later stamps do not make old.
    A copy that can't be read, or of a later version, keeps all: what it is, or needs of the others, is not
    known here; nor is it of an unfinished one, which may need any that increments can build on.
    """
    ordered = in_order(copies)
    counted_ones = [copy for copy in ordered if copy.counts_for(uuid, method)]
    last_made = {sealed}.union(copy.name for copy in [copy for copy in counted_ones if not copy.is_old][-1:])
    unknown, before = not_known(ordered), last_before_chain(ordered, uuid, method)
    holds = {copy.name: [] for copy in counted_ones}       # type: Dict[str, List[Hold]]
    for one in rules:
        for name, hold in held_by(counted_ones, one, now):
            holds[name].append(hold._replace(words=hold.words + of_config(one, rules[0].config)))
    verdicts = []
    for copy in ordered:
        goes, until = False, ""
        if not copy.is_good:
            reason = f"not a good copy, so neither counted nor removed: {copy.trouble}"
            reason += f"; {copy.pin}" * bool(copy.pin)
        elif copy.aside:
            reason = copy.aside
        elif copy.uuid != uuid:
            reason = f"belongs to another VM ({copy.uuid or 'uuid unknown'})"
        elif copy.method is not method:
            reason = "of the other kind (vm-export and vdi-export are counted apart)"
        elif copy.pin:
            reason, until = copy.pin, "until it is unpinned"
        elif holds[copy.name]:
            reason = "; ".join(hold.words for hold in holds[copy.name])
            until = until_text(holds[copy.name])
        elif unknown:
            why = "was made by a newer VmBackup" if unknown.is_newer else "can't be read now"
            reason = f"{unknown.name} {why}, so nothing here is removed"
        elif copy.name in last_made:
            reason = "the last one made, whatever stamps copies of the older program bear"
        elif before is not None and copy.name == before[0].name:
            reason = (f"the last of the chain before, until {before[1]}, with which the present one begins, "
                      "has been read back from the store: `verify` does that")
        elif copy.layer is not None and has_unfinished:
            reason = "a copy that is not finished may need it"
        elif unrecorded(copy, ordered):
            reason = f"it alone tells that {unrecorded(copy, ordered)[0].name} is {SUSPECT}, until a run " \
                "has put that on record"
        else:
            goes = True
            newer = counted(len(counted_ones) - counted_ones.index(copy) - 1, "good copy", "is")
            reason = f"{newer} newer, and {kept_text(rules, verb='is')}"
        verdicts.append(Verdict(copy, not goes, reason, until))
    needed = collections.Counter()         # type: Dict[str, int]
    for position, verdict in reversed(list(enumerate(verdicts))):      # what holds a copy's blocks is older
        copy, number = verdict.copy, needed[verdict.copy.name]
        if number and not verdict.keep:
            verdict = verdict._replace(keep=True, reason=f"held for {counted(number, 'later copy')}")
        verdicts[position] = verdict._replace(needed=number)
        if verdict.keep and copy.layer is not None and (
                copy.is_good or copy.pin or would_be_held(copy, counted_ones, rules, now)):
            needed.update(copy.layer.held_by)
    return verdicts


def would_be_held(copy: Copy, good: Sequence[Copy], rules: Sequence[Rules], now: datetime) -> bool:
    """Would a rule hold that copy, which is not good, if it were?"""
    among = in_order(list(good) + [copy])
    return any(name == copy.name for one in rules for name, _ in held_by(among, one, now))


def last_before_chain(ordered: Sequence[Copy], uuid: str, method: Method) -> Optional[Tuple[Copy, str]]:
    """The last good copy of the chain before the present one, and the name of the full that the present one
    begins with; None once that has been read back from the store, so that no rotten full takes all."""
    good = [copy for copy in ordered if copy.is_of(uuid, method) and copy.is_good]
    layer = good[-1].layer if good else None
    if layer is None or any(copy.name == layer.full and copy.was_read_back for copy in ordered):
        return None
    before = [copy for copy in good if copy.layer is None or copy.layer.full != layer.full]
    return (before[-1], layer.full) if before else None


def in_removal_order(verdicts: Sequence[Verdict]) -> List[Verdict]:
    """The verdicts on those that go, each copy before those that hold blocks of it."""
    return sorted((verdict for verdict in verdicts if not verdict.keep),
                  key=lambda verdict: -verdict.copy.sequence if verdict.copy.layer else 0)


def not_known(copies: Sequence[Copy]) -> Optional[Copy]:
    """A copy of which it is not known here what it is, or needs of those beside it; None if there is none.
    One that lost its manifest needs nothing where no increment can have been built on another."""
    has_layers = any(copy.layer is not None for copy in copies)
    return min((copy for copy in copies if copy.is_unreadable or copy.is_newer
                or copy.is_garbled and has_layers), key=lambda copy: copy.is_newer, default=None)


def holder_problem(base: Copy, copies: Sequence[Copy], holders: Sequence[Tuple[str, str]]) -> str:
    """Why an increment can't rest on that copy and those that hold its blocks, "" if it can. Whoever of them
    was found bad is rested on no more, also where its bad blocks are not needed."""
    by_name = {copy.name: copy for copy in copies}
    for name, mark in [(base.name, base.mark), *holders]:
        copy = by_name.get(name)
        if copy is not None and copy.is_unreadable:
            return f"{name} can't be read now: {copy.trouble}"
        if copy is None or copy.mark != mark:
            return f"{name} is no longer there" if copy is None else f"{name} is not the copy that it was"
        if copy.problem or copy.verdict or copy.suspicion or name == base.name and copy.trouble:
            return f"{name} is not good any more: {copy.trouble}"
    return ""


class NextLayer(NamedTuple):
    """The VM's next copy: an increment on `base`, or a full where that is None; why; and a warning. `left`:
    how many copies later the next full is due. `reading`: how disks will be read, "" without references."""
    base: Optional[Copy]
    why: str
    is_first: bool = False
    warning: str = ""
    left: int = 0
    reading: str = ""


def next_layer(copies: Sequence[Copy], machine: VirtualMachine, method: Method, disks: Sequence[Disk],
               full_every: int, free_bytes: Optional[int]) -> NextLayer:
    """What a copy of these disks will be beside the VM's copies. A VM's first chain ends early, by up to half
    of full_every, so that not all fulls of a store fall on one night."""
    own = [copy for copy in in_order(copies) if copy.is_of(machine.uuid, method)]
    base = next((copy for copy in reversed(own) if copy.is_good), None)
    is_first = not any(copy.layer for copy in own)
    spread = zlib.crc32(machine.uuid.encode("utf-8", "surrogateescape")) % (full_every // 2 + 1)
    large = [disk for disk in disks if disk.virtual_size > VHD_LARGEST_BYTES]
    due_at = max(1, full_every - spread if is_first else full_every)
    why = ""
    lost = [copy.name for copy in copies if copy.is_unreadable]
    if base is None and lost:
        why = f"{lost[-1]} can't be read now"
    elif not own:
        why = "it is the first copy"
    elif base is None:
        why = "there is no good copy to build on"
    elif large:
        why = f"{disk_list(large[:1])} is larger than a VHD can be"
    elif not disks:
        why = "it has no disk"
    elif base.layer is None:
        why = f"its newest good copy, {base.name}, does not tell the state of every block"
    else:
        why = holder_problem(base, own, base.layer.holders)
    if why:
        return NextLayer(None, why, is_first, left=due_at if disks and not large else 1)
    depth, full = base.layer.depth + 1, next((copy for copy in own if copy.name == base.layer.full), None)
    due_at = max(1, full_every - spread if base.layer.is_first else full_every)
    if depth <= due_at:
        return NextLayer(base, f"copy {depth} of {due_at} of its chain", base.layer.is_first,
                         left=due_at - depth + 1)
    needed = full.size_bytes if full is not None else 0
    if free_bytes is None or needed <= free_bytes or depth > 2 * full_every:
        early = " (a VM's first chain ends early)" if due_at < full_every else ""
        return NextLayer(None, f"its chain has reached {counted(base.layer.depth, 'copy')}, and "
                         f"full_every={full_every}{early}", left=full_every)
    return NextLayer(base, f"copy {depth} of its chain", base.layer.is_first,
                     f"a full is due, and one of {format_size(needed)} does not fit into the "
                     f"{format_size(free_bytes)} that are free in the store: this copy is an increment "
                     "again. Free space there, or lower max_backups.", 1)


# --- how disks were read, and whether anybody has looked behind it -----------------


def with_accusations(copies: Sequence[Copy]) -> List[Copy]:
    """The copies of a directory, each with what the audits of others there have found of it."""
    accused = {name: copy.audit[0] for copy in copies if copy.audit[0] not in ("", AGREED)
               for name in copy.audit[1]}
    return [copy._replace(accused=accused.get(copy.name, "")) for copy in copies]


def unrecorded(accuser: Copy, copies: Iterable[Copy]) -> List[Copy]:
    """Those of the copies that the accuser's audit found not to be trusted, where it alone tells so."""
    return [copy for copy in copies if accuser.audit[0] not in ("", AGREED)
            and copy.name in accuser.audit[1] and copy.checked("audit") != SUSPECT]


def since_whole_reading(copies: Sequence[Copy], uuid: str, method: Method) -> List[Copy]:
    """The VM's copies that were read as differences since one was last read whole, oldest first: what a
    tracker that lies has spoiled is among them, or was found by that reading."""
    found = []                             # type: List[Copy]
    for copy in reversed(in_order(copy for copy in copies if copy.is_of(uuid, method))):
        if copy.is_unreadable or copy.is_garbled or copy.is_newer:
            continue
        if not copy.is_by_difference:
            break
        found.insert(0, copy)
    return found


def audit_words(copy: Copy, copies: Sequence[Copy]) -> str:
    """Whether a copy, among its VM's, that was read as a difference has been audited; "" if all was read."""
    if not copy.is_by_difference:
        return ""
    if copy.suspicion:
        return SUSPECT
    word, day = copy.checked("audit"), (copy.checked("audited_at") or "")[:10]
    if word == AGREED:
        return f"audited on {day}"
    ordered = in_order(one for one in copies if one.uuid == copy.uuid and one.method is copy.method)
    later = ordered[[one.name for one in ordered].index(copy.name) + 1:]
    is_over = any(not one.is_by_difference for one in later if not one.is_unreadable)
    return "not audited" if is_over else "not audited yet"


# why a disk of an increment is read whole where no reference is wanted
COMPARED, NOT_IN_BASE = "compared with the base", "the base has no such disk, or a larger one"


def is_reading_told(reading: Sequence[Tuple[str, str, str]]) -> bool:
    """Is it to be told how disks were read? Without references nobody needs to know why."""
    return any(how == DIFFERENCE or why not in ("", COMPARED, NOT_IN_BASE) for _, how, why in reading)


def reading_words(reading: Sequence[Tuple[str, str, str]]) -> str:
    """How disks were read, in words: `read by difference`, `read whole, as there is no reference yet`."""
    whole = {}                             # type: Dict[str, List[str]]
    for key, how, why in reading:
        if how != DIFFERENCE:
            whole.setdefault(why, []).append(key)
    named = len(whole) > 1 or any(len(keys) < len(reading) for keys in whole.values())
    words = [f"{', '.join(keys) + ' ' if named else ''}read whole" + (f", as {why}" if why else "")
             for why, keys in whole.items()]
    return "; ".join((["read by difference"] if any(how == DIFFERENCE for _, how, _ in reading) else [])
                     + words)


NIGHTS_OF_ONE_REASON = 3


def repeated_reasons(readings: Sequence[Sequence[Tuple[str, str, str]]]) -> List[str]:
    """Warnings about disks read whole for one reason in the last copies of a VM and kind that tell how they
    were read, oldest first."""
    newest = readings[-NIGHTS_OF_ONE_REASON:]
    if len(newest) < NIGHTS_OF_ONE_REASON:
        return []
    whole = [{(key, why) for key, how, why in reading if how != DIFFERENCE} for reading in newest]
    same = whole[0].intersection(*whole)
    return [f"disk {key} was read whole {NIGHTS_OF_ONE_REASON} nights in a row, as {why}."
            for key, why in sorted(same) if why]


class Owner(NamedTuple):
    """A VM whose copies are looked for: it is its uuid in its pool. `name` is what it is called there, None
    where no pool is asked; `is_only_one`: no other VM of the pool bears that name."""
    uuid: str
    pool: str
    name: Optional[str] = None
    is_only_one: bool = False


def as_seen_by(owner: Owner, folder: str, copies: Iterable[Copy]) -> List[Copy]:
    """The copies of that directory, in order, as that VM sees them: the one answer to whose a copy is.

    Those of the older program without a readable uuid are its own where they can be nobody else's: the
    directory is the VM's plain one, no other VM of the pool bears the name, and no copy there bears another
    uuid. Where no pool is asked, what tells no uuid or pool goes with the only one that is told there;
    without a uuid it is put aside.

    Put aside is, too, what somebody moved there to keep it: it was made in another directory, or does not
    tell in which (as earlier versions and the older program made them) where the directory bears no name of
    its VM; and what is, or may be, of the VM that has this uuid in another pool.
    """
    copies, here = in_order(copies), folded(folder)
    uuids = {copy.uuid for copy in copies if copy.uuid}
    at_home = {copy.uuid for copy in copies if folded(copy.home) == here}
    is_named, is_heir = False, uuids == {owner.uuid}
    if owner.name is not None:
        is_named = here in map(folded, own_folder_names(owner.name, owner.uuid, owner.pool))
        is_heir = uuids <= {owner.uuid} and owner.is_only_one \
            and folder in (safe_name(owner.name), owner.name)
    seen = []
    for copy in copies:
        if folded(copy.home) != here and (copy.home or not is_named and copy.uuid not in at_home):
            why = f"moved here by hand from {quote_name(copy.home)}/" if copy.home \
                else "it lies where no name of its VM is, as if moved here by hand"
            copy = copy._replace(aside=f"{why}, so it is kept and not counted")
        if not copy.uuid and is_heir and owner.name is None:
            copy = copy._replace(
                uuid=owner.uuid, aside="it tells no uuid (uuid unknown), so it is kept and not counted")
        elif not copy.uuid and is_heir and copy.is_old:
            copy = copy._replace(uuid=owner.uuid, vm_name=owner.name)
        seen.append(copy)
    pools = {copy.pool for copy in seen if copy.uuid == owner.uuid and copy.pool}
    for position, copy in enumerate(seen):
        if copy.uuid == owner.uuid and not copy.pool and pools == {owner.pool}:
            seen[position] = copy._replace(pool=owner.pool)
        elif copy.uuid == owner.uuid and (copy.pool and copy.pool != owner.pool or not copy.pool and pools):
            seen[position] = copy._replace(
                aside=f"of another pool ({copy.pool or 'unknown which'}), so it is kept and not counted")
    return seen


def clock_went_back(copies: Sequence[Copy], now: datetime) -> Optional[str]:
    """The sentence to say when the newest of our copies is not older than now, else None."""
    newest = max((copy for copy in copies if not copy.is_old and copy.written_at and not copy.aside),
                 key=lambda copy: copy.sequence, default=None)
    if newest is None or now > newest.written_at:
        return None
    return (f"the clock shows {format_utc(now)}, but the newest copy, {newest.name}, was made at "
            f"{format_utc(newest.written_at)}: the clock went back. Nothing is pruned until it is right "
            "again.")


def clock_is_behind(copies: Sequence[Copy], local: datetime) -> Optional[str]:
    """The sentence to say when a copy of the older program is from later than now, else None."""
    newest = max((copy for copy in copies if copy.is_old and copy.is_good and not copy.aside),
                 key=lambda copy: copy.taken_at, default=None)
    if newest is None or newest.taken_at <= local:
        return None
    return (f"the clock shows {local.strftime('%Y-%m-%d %H:%M:%S')}, and {newest.name}, a copy of the older "
            "program, bears a later time: are clock and time zone right? Until then that one counts as newer "
            "than tonight's, which stays all the same until the next one is made.")


def retention_warnings(copies: Sequence[Copy], utc: datetime, local: datetime) -> List[str]:
    """What is to be said before a VM's copies are pruned, now being that time."""
    found = [clock_went_back(copies, utc), clock_is_behind(copies, local)]
    unknown = not_known(copies)
    if unknown is not None:
        place = f"{unknown.folder}/{unknown.name}"
        if not unknown.is_newer:
            needed = any(unknown.name in copy.layer.held_by for copy in copies if copy.layer)
            advice = ("" if unknown.is_unreadable or not unknown.is_garbled else
                      " Others beside it need its blocks, so leave it where it is." if needed else
                      f" If it never can, remove it: `rm -r {shell_word(place)}` in the store.")
            found.append(f"{place}: {unknown.trouble}: nothing is pruned in {unknown.folder}/ until it can "
                         f"be read again.{advice}")
        else:
            found.append(f"{place}/backup.json is of a format that only a newer VmBackup knows: nothing is "
                         f"pruned in {unknown.folder}/ until that version is used here again.")
    return [sentence for sentence in found + [moved_text(copy) for copy in copies] if sentence]


def moved_text(copy: Copy) -> str:
    """What is to be said of an increment that was moved away from its holders; "" of any other copy."""
    if not copy.broken or folded(copy.home) in ("", folded(copy.folder)):
        return ""
    return (f"{copy.folder}/{copy.name} is an increment, and was moved here from {quote_name(copy.home)}/: "
            "what holds its blocks there is not kept for it, and it can't be restored here. Move it back, "
            "and pin it there.")


def idle_warnings(verdicts: Sequence[Verdict], uuid: str, method: Method, rules: Sequence[Rules],
                  now: datetime) -> List[str]:
    """Warnings of increments that are not good and too old for the rules: nothing keeps their holders."""
    good = [verdict.copy for verdict in verdicts if verdict.copy.counts_for(uuid, method)]
    return [f"{copy.folder}/{copy.name} is not good ({copy.trouble}), and too old for any rule: the copies "
            "that hold its blocks are no longer kept for it. In the store "
            f"`rm -r {shell_word(f'{copy.folder}/{copy.name}')}` removes it."
            for copy, needed in ((verdict.copy, verdict.needed) for verdict in verdicts)
            if copy.is_increment and copy.is_of(uuid, method) and not copy.is_good and not copy.pin
            and not needed and not would_be_held(copy, good, rules, now)]


def next_sequence(copies: Sequence[Copy], utc: Optional[datetime] = None) -> int:
    """The sequence number of the next copy in this directory. Where the numbers of some can't be read it is
    one that no count of copies reaches, the minutes till now, so that the new one does not pass for older."""
    highest = max((copy.sequence for copy in copies), default=0)
    if utc is not None and any(copy.is_unreadable for copy in copies):
        highest = max(highest, int(utc.timestamp()) // MINUTE_S)
    return highest + 1


def free_copy_name(local: datetime, taken: Iterable[str]) -> str:
    """The name of a new copy: that second, or the next one that no copy has, old or new, begun or going."""
    used = {found[0] for found in (parse_copy_name(name.partition(".")[0]) for name in taken) if found}
    local = local.replace(microsecond=0, tzinfo=None)
    while local in used:
        local += timedelta(seconds=1)
    return copy_name(local)


# --- how many copies there is room for ------------------------------------------------


ROOM_PERCENT = 90                 # of what is free: the rest is for growth, and for others
CHANGE_PERCENT = 5                # of a VM's data that a night is taken to change
MOST_FULLS, LEAST_FULLS, MOST_NIGHTS = 7, 3, 14


class Proposal(NamedTuple):
    """How many copies are to stay; after how many a full is due, 0 where each is one; and the bytes that are
    taken at the worst moment, when the new copy is there and an old one not yet gone."""
    copies: int
    full_every: int
    needed_bytes: int


def proposed_retention(full_bytes: int, free_bytes: int, present: int = 0) -> Optional[Proposal]:
    """What to keep in so much space, if one full of everything takes so much: fulls, else increments, else
    one copy, which fits only if it says so. None if not even one full does. `present`: so many copies of a VM
    are there, whose space is among the free: never fewer stay, whether they fit or not.

    As many nights make a chain as copies stay, so that never more than two chains are there: the older goes
    as the later is full, if its full has been read back (verify_after).
    """
    room, least = free_bytes * ROOM_PERCENT // 100, max(1, present)
    change = -(-full_bytes * CHANGE_PERCENT // 100)
    proposals = [Proposal(copies, 0, (copies + 1) * full_bytes)
                 for copies in range(max(MOST_FULLS, least), max(LEAST_FULLS, least) - 1, -1)]
    proposals += [Proposal(nights, nights, 2 * full_bytes + 2 * (nights - 1) * change)
                  for nights in range(max(MOST_NIGHTS, least), max(2, least) - 1, -1)]
    last = Proposal(least, 0, (least + 1) * full_bytes)
    return next((one for one in proposals if one.needed_bytes <= room),
                last if present or full_bytes <= free_bytes else None)


# =============================================================================
# 8. Process
# =============================================================================
# What the process owns: the clock, its signals, its log lines, its secret.


class Clock:
    """The one place that asks what time it is."""

    @staticmethod
    def utc() -> datetime:
        """Now, aware, UTC."""
        return datetime.now(timezone.utc)

    @staticmethod
    def local() -> datetime:
        """Now, naive, in local time, as directory names and log lines have it."""
        return datetime.now()

    @staticmethod
    def monotonic() -> float:
        """Seconds that only ever go forward, for durations."""
        return time.monotonic()


class Log:
    """Log lines for people: stdout for what happens, stderr for warnings and errors, each flushed at once.

    A log that can't be written (a full disk under cron's redirection) must
    cost no backup, so the line is dropped and the next one is tried. Each line
    goes out whole, whichever thread or process it comes from. A worker's goes
    through a pipe to the run that started it, which shows it in its place.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._secret = ""
        # cron gives an ASCII stdout; file systems and names here are UTF-8
        self._out = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
        self._err = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
        self._lock = threading.RLock()
        self._progress = {}                # type: Dict[str, Sequence[str]]    # the row of each worker
        self._is_shown = False             # lines of them are on the terminal
        self._terminal = self._find_terminal()
        self.subject = "", ""              # the VM at hand, and its number of all (`3/14`)
        self.doing = ""                    # how far the export of this process is, in words
        self.is_relayed = False            # it is read by the run that started us
        self.is_for_program = False        # what is shown is for a program: stdout is kept for it

    def keep_secret(self, password: str) -> None:
        """From now on the password is struck out of what a bug's traceback or a hook says; our own sentences
        never hold it."""
        self._secret = password

    def struck(self, text: str) -> str:
        """The text without the password."""
        return text.replace(self._secret, "***") if self._secret else text

    def bug(self, bug: BaseException, subject: str = "") -> None:
        """The unexpected exception that is being handled, with all that is known of it but the password."""
        import traceback
        text = (f"{subject}a bug in VmBackup: {bug}\n{traceback.format_exc()}VmBackup {VERSION}, "
                f"Python {sys.version.split()[0]}. If it comes again, report all of this to whoever "
                "maintains VmBackup.")
        self.error(self.struck(text))

    def info(self, sentence: str) -> None:
        """Something happened as it should."""
        self._line(self._err if self.is_for_program else self._out, sentence)

    def warning(self, sentence: str) -> None:
        """The administrator should look some day."""
        self._line(self._err, "warning: " + sentence)

    def error(self, sentence: str) -> None:
        """A backup is missing, or the run can't go on."""
        self._line(self._err, "error: " + sentence)

    def finding(self, finding: Finding) -> None:
        """The finding, where its severity belongs."""
        write = {Severity.INFO: self.info, Severity.WARNING: self.warning,
                 Severity.ERROR: self.error}[finding.severity]
        write(f"{finding.subject}: " * bool(finding.subject) + finding.sentence)

    def show(self, text: str) -> None:
        """What was asked to be shown: plain, on stdout, without a time stamp."""
        self._write(self._out, text + "\n")

    def complain(self, text: str) -> None:
        """What is wrong with the command line or config: plain, on stderr."""
        self._write(self._err, text + "\n")

    def _find_terminal(self) -> Any:
        """Where lines of progress are shown; None without a terminal that can take them away again, or where
        a pipe leads to somebody who may write there at any time, too."""
        streams = self._out, self._err
        if os.environ.get("TERM", "dumb") in ("", "dumb") or any(
                stat.S_ISFIFO(os.fstat(one.fileno()).st_mode) for one in streams):
            return None
        return next((one for one in streams if one.isatty()), None)

    def progress(self, doing: str, known: Sequence[str] = ()) -> None:
        """What this process is at, and the figures that are known of it: on a terminal a line that stands
        until the next one, or any other line of this process. "": nothing."""
        self.doing = doing + ": " * bool(doing and known) + ", ".join(part for part in known if part)
        row = progress_row(*self.subject, doing, known) if doing else ()
        if self.is_relayed:
            self._write(self._out, "\t".join(map(one_line, row)) + "\n", "P")
        else:
            self._show_progress("", row)

    def _show_progress(self, worker: str, row: Sequence[str]) -> None:
        if self._terminal is not None and (row or worker in self._progress):
            with self._lock:
                self._progress[worker] = row
                if not row:
                    del self._progress[worker]
                self._put(self._terminal, self._erased() + self._lines())

    def relay(self, worker: str, line: str) -> None:
        """What a worker of this run has said, in its place; "": it has ended."""
        if line[:1] in ("P", ""):
            row = line[1:].rstrip("\n")
            self._show_progress(worker, row.split("\t") if row else ())
        else:
            self._write(self._err if line[:1] == "E" else self._out, line[1:], worker=worker)

    def _line(self, stream: Any, sentence: str) -> None:
        stamp = self._clock.local().strftime("%Y-%m-%d-(%H:%M:%S)")
        for line in sentence.split("\n"):
            self._write(stream, f"{stamp} - {line}\n")

    def _write(self, stream: Any, text: str, mark: str = "", worker: str = "") -> None:
        if self.is_relayed:
            mark = mark or ("E" if stream is self._err else "O")
            stream, text = self._out, "".join(mark + line + "\n" for line in text[:-1].split("\n"))
        with self._lock:
            if self._terminal is not None and stream.isatty():
                self._progress.pop(worker, None)
                text = self._erased() + text + self._lines()
            self._put(stream, text)

    def _erased(self) -> str:
        """What takes the lines of progress from the terminal."""
        was_shown, self._is_shown = self._is_shown, False
        return "\r\x1b[J" * was_shown

    def _lines(self) -> str:
        """The lines of progress, none where another program has the terminal. The cursor is left where the
        first of them begins: what erases from there on finds them all, whatever a terminal that was resized
        has made of them. No line goes on in the next one, however wide it is for that terminal."""
        fd = self._terminal.fileno()
        with contextlib.suppress(OSError):             # a terminal that is nobody's but ours
            if os.tcgetpgrp(fd) != os.getpgrp():
                return ""
        try:
            width, height = os.get_terminal_size(fd)
        except OSError:
            width = height = 0
        # C.UTF-8 as LC_CTYPE is what Python itself, since 3.7, makes of a C locale
        said = next((os.environ[name] for name in ("PYTHONIOENCODING", "LC_ALL", "LC_CTYPE", "LANG")
                     if os.environ.get(name) and (name, os.environ[name]) != ("LC_CTYPE", "C.UTF-8")), "")
        lines = progress_lines([self._progress[key] for key in sorted(
            self._progress, key=lambda key: (len(key), key))], (width or 80) - 1, max(1, (height or 24) - 1),
                               "utf8" in said.lower().replace("-", ""))
        self._is_shown = bool(lines)
        back = f"\x1b[{len(lines) - 1}A" * (len(lines) > 1)
        return "\x1b[?7l" + "\r\n".join(lines) + "\x1b[?7h" + back + "\r" if lines else ""

    def leave_terminal(self) -> None:
        """No line of progress is on the terminal, until the next one. A signal's handler may do it."""
        if self._is_shown:
            with contextlib.suppress(OSError):
                os.write(self._terminal.fileno(), self._erased().encode("ascii"))

    @property
    def shows_progress(self) -> bool:
        """Is there a terminal that shows lines of progress?"""
        return self._terminal is not None

    @staticmethod
    def _put(stream: Any, text: str) -> None:
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError):
            # ENOSPC or EPIPE of our own log; whatever stays in the buffer is tried with the next line
            return


SIGNAL_PATIENCE_S = MINUTE_S       # how long a pool that does not answer is waited for once a signal came


class Signals:
    """SIGTERM, SIGINT and SIGHUP are noted, and acted on between calls.

    Raising out of a handler could lose the answer of a call that made a
    snapshot. While shielded (during clean-up) they only say that they wait.
    That one came is told at once, where there is something to clean up.
    """
    HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self, log: Log) -> None:
        self.noted = None           # type: Optional[Interrupted]
        self._log = log
        self._noted_at = 0.0
        self._asked_at = None       # type: Optional[float]
        self._may_break = False
        self._untold = None         # type: Optional[int]
        self._shields = 0
        self._is_over = False
        self.has_open = False              # there is something to clean up, and it is ours to tell
        self.beats = 0                     # how often the main thread came by: its sign of life

    def install(self) -> None:
        """From now on the three signals are ours; one that is ignored (nohup) stays so."""
        for number in self.HANDLED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)
        signal.signal(signal.SIGALRM, self._wake)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)      # a line of the log stops no run in the background
        if self._log.shows_progress and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            signal.signal(signal.SIGTSTP, self._suspend)

    def _suspend(self, number: int, _frame: Any) -> None:
        """Ctrl-Z stops us, once the lines of progress are out of the shell's way."""
        self._log.leave_terminal()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.signal(number, self._suspend)

    def _note(self, number: int, _frame: Any) -> None:
        # nothing is written from here, but while an answer is waited for: the main thread may be in the
        # middle of a line of the same log
        if self._is_over:
            return
        is_first = self.noted is None
        if self._shields or is_first and self.has_open:
            self._untold = self._untold or number
        if is_first:
            self.noted, self._noted_at = Interrupted(number), time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, SIGNAL_PATIENCE_S)
            if self._asked_at is not None:
                self._tell()
        if self._may_break and not self._shields:
            raise Interrupted(self.noted.number)

    def _wake(self, _number: int, _frame: Any) -> None:
        if self._asked_at is not None and self._asked_at <= self._noted_at:
            raise socket.timeout

    @contextlib.contextmanager
    def awaited(self, may_break: bool) -> Iterator[None]:
        """Inside, an answer is waited for. A signal ends that: at once where nothing can be lost by it, else
        by socket.timeout after SIGNAL_PATIENCE_S."""
        self._asked_at, self._may_break = time.monotonic(), may_break
        try:
            if may_break:
                self.check()
            yield
        finally:
            self._asked_at, self._may_break = None, False

    def patience_ends(self, answered_at: float) -> float:
        """Until when a pool that answered then last is waited for, by the monotonic clock: for ever until a
        signal came."""
        return max(self._noted_at, answered_at) + SIGNAL_PATIENCE_S if self.noted else float("inf")

    def come_too_late(self) -> None:
        """From now on: all is done and about to be told, so a signal changes nothing and is no news."""
        self._is_over = True
        self.noted = self._untold = None
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _tell(self) -> None:
        """That a signal came, and what becomes of it, is said, once."""
        if self._untold:                   # one may come just now
            number, self._untold = self._untold, None
            self._log.info(f"{signal.Signals(number).name} came" + (
                " during clean-up, which is finished first." if self._shields else
                ": what is under way is ended, and cleaned up in the pool and on the store. That can take "
                "some minutes."))

    def check(self) -> None:
        """Raises Interrupted if one came and we are not cleaning up."""
        self.beats += 1
        self._tell()
        if self.noted and not self._shields:
            raise Interrupted(self.noted.number)

    def is_hurried(self) -> bool:
        """Has somebody who waits here to come to an end?"""
        self.beats += 1
        self._tell()
        return self.noted is not None

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Inside, signals wait."""
        self._tell()
        self._shields += 1
        try:
            yield
        finally:
            self._tell()
            self._shields -= 1

    def sleep(self, seconds: float) -> None:
        """Waits so long; an unshielded signal ends the wait by raising Interrupted."""
        until = time.monotonic() + seconds
        while True:
            self.check()
            left = until - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, 0.5))

    def until(self, limit_s: float, pause_s: float = 1.0) -> Iterator[bool]:
        """For each try, with a pause between two: is there time for another? Who is told that there is none
        ends it."""
        ends_at = time.monotonic() + limit_s
        while True:
            yield time.monotonic() < ends_at
            self.sleep(pause_s)


def within(limit_s: float, doing: str, work: Callable[[], Any],
           is_hurried: Callable[[], Any] = lambda: False) -> Any:
    """What the work gives, done in a thread of its own; StorageStalled if it takes longer than that, or, once
    somebody is in a hurry, than WAY_OUT_S from then on.

    For what touches the store: a share that hangs in the kernel must neither keep the clean-up in the pool
    waiting nor a run that was told to stop.
    """
    answers = queue.Queue()                # type: Any

    def run() -> None:
        try:
            answers.put((work(), None))
        except BaseException as error:     # whatever it is, it is raised where the work was asked for
            answers.put((None, error))

    threading.Thread(target=run, name=doing, daemon=True).start()
    began_at = time.monotonic()
    while True:
        waited_s = time.monotonic() - began_at
        limit_s = min(limit_s, waited_s + WAY_OUT_S) if is_hurried() else limit_s
        if waited_s >= limit_s:
            raise StorageStalled(f"{doing} hangs: the backup storage gave no answer for "
                                 f"{format_duration(waited_s)}. Is the share still reachable?")
        with contextlib.suppress(queue.Empty):
            answer, error = answers.get(timeout=min(0.5, limit_s - waited_s))
            break
    if error is not None:
        raise error
    return answer


# how long a run that was told to stop waits for each thing that it leaves in order
WAY_OUT_S = 30


def random_hex(size_bytes: int) -> str:
    """So many bytes that nobody can guess, as digits: what nobody else has."""
    return os.urandom(size_bytes).hex()


def read_text_file(path: str) -> str:
    """The text of a system file, "" if it is not there."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


class Services(NamedTuple):
    """What every deed needs, handed on whole. A door that is not open is None: verify has no pool, preview no
    journal."""
    settings: Configuration
    clock: Clock
    log: Log
    signals: Signals
    arguments: Any = None       # Arguments
    pool: Any = None            # Pool
    catalog: Any = None         # Catalog
    journal: Any = None         # RunJournal
    references: Any = None      # References
    turn: Any = None            # Turn

    @property
    def patience_s(self) -> float:
        """How long a sign of life of pool or store is waited for."""
        return float(self.settings.stall_timeout * MINUTE_S)


# =============================================================================
# 9. Programs
# =============================================================================
# The only place that starts programs. Argument lists only, never a shell; no
# password in an argv; what they say on stderr is kept, its end at least.

STDERR_KEPT_BYTES = 16 * KIBIBYTE


def become(argv: Sequence[str], given: bytes) -> None:
    """This process begins anew as the Python that it is, with these words; `given` is there to read on stdin.
    Returns where it can't."""
    import tempfile
    with contextlib.suppress(OSError), tempfile.TemporaryFile() as file:
        if not os.path.samefile(argv[0], "/proc/self/exe"):      # Python only guesses it, from argv[0]
            return
        file.write(given)
        file.seek(0)
        os.dup2(file.fileno(), 0)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)       # one that Python had only noted would be lost
        os.execv(argv[0], argv)


class Program:
    """A running program; its stdout is a pipe to read, its stdin nothing unless given.

    As a context manager it is never left running: what has not ended is killed.
    """

    def __init__(self, argv: Sequence[str], stdin: Any = subprocess.DEVNULL, stdout: Any = subprocess.PIPE,
                 pass_fds: Sequence[int] = (), variables: Optional[Mapping[str, str]] = None,
                 hear: Optional[Callable[[bytes], None]] = None) -> None:
        """`variables` are added to its environment; all that it says, on stdout too, goes to `hear`, piece by
        piece, in another thread."""
        variables = {"LC_ALL": "C"} if variables is None else variables
        self._hear, self._is_heard = hear or self._keep, hear is not None
        self.name = os.path.basename(argv[0])
        try:
            environment = dict(os.environ, **{name: fs_path(value) for name, value in variables.items()})
            # a session of its own: ^C at a terminal must reach us, not the export
            self._process = subprocess.Popen([fs_path(item) for item in argv], stdin=stdin, stdout=stdout,
                                             stderr=subprocess.STDOUT if hear else subprocess.PIPE,
                                             env=environment, pass_fds=pass_fds, start_new_session=True)
        except (OSError, ValueError) as error:
            is_that = getattr(error, "errno", 0) not in (errno.ENOMEM, errno.EAGAIN, errno.E2BIG)
            raise ProgramError(f"{fs_text(argv[0])} could not be started: {os_reason(error)}."
                               + " Is it there, and may it be executed?" * is_that)
        self._said = bytearray()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        with self._process.stderr or self._process.stdout as pipe:
            for piece in iter(lambda: pipe.read1(KIBIBYTE), b""):
                self._hear(piece)

    def _keep(self, piece: bytes) -> None:
        self._said += piece
        del self._said[:-STDERR_KEPT_BYTES]

    def tell(self, content: bytes) -> None:
        """It is given this to read, at its own pace: nobody waits for one that freezes before it has."""
        fd = os.dup(self.stdin_fd)

        def give() -> None:
            with contextlib.suppress(BrokenPipeError), open(fd, "wb") as pipe:     # its exit status tells
                pipe.write(content)
        threading.Thread(target=give, daemon=True).start()

    @property
    def stdin_fd(self) -> int:
        """The descriptor to write to, where stdin is a pipe."""
        return self._process.stdin.fileno()

    def close_stdin(self) -> None:
        """No more input is coming."""
        with contextlib.suppress(BrokenPipeError):      # it ended before reading all: its exit status tells
            self._process.stdin.close()

    @property
    def stdout_fd(self) -> int:
        """The descriptor to read from."""
        return self._process.stdout.fileno()

    def wait(self, timeout_s: float) -> Optional[int]:
        """The exit status (negative: killed by that signal), None if it still runs after so long."""
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(0.5 if self._is_heard else 5)        # who went on in the background may never end
        return status

    @property
    def said(self) -> str:
        """What it has said on stderr, without the last newline."""
        return bytes(self._said).decode("utf-8", "replace").strip()

    def end(self) -> None:
        """It and what else is in its session was asked to end, and had some seconds for that."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):      # it has just ended by itself
                os.killpg(self._process.pid, signal.SIGTERM)
            self.wait(HOOK_ENDING_S)

    def kill(self) -> None:
        """It is dead, and reaped if the kernel lets it be; what else is in its session goes with it."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self.wait(10)

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not (self._is_heard and pipe is self._process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Hook(NamedTuple):
    """A program of the administrator's that runs at a point of a run: the name of its config key, its words,
    for how long at most, and where what it says goes, line by line."""
    name: str
    words: Tuple[str, ...]
    limit_s: float
    log: Log

    def run(self, signals: Signals, subject: str, facts: Mapping[str, Any]) -> None:
        """It has done its work; ProgramError if not. It has the facts in its environment, as VMBACKUP_NAME,
        and as JSON on stdin; what it leaves in the background is left alone. A signal ends it; where signals
        wait, it gets half a minute more."""
        variables = {"VMBACKUP_" + name.upper(): str(value) for name, value in facts.items()
                     if isinstance(value, (str, int, float))}
        lines = _Lines(self.log, f"{subject}: {self.name}: " if subject else self.name + ": ")
        began_s, limit_s = time.monotonic(), self.limit_s
        with Program(self.words, stdin=subprocess.PIPE, variables=dict(variables, VMBACKUP_HOOK=self.name),
                     hear=lines.hear) as program:
            program.tell((json.dumps(dict(facts, hook=self.name), indent=1, sort_keys=True) + "\n").encode())
            program.close_stdin()
            status, hurry_s = None, math.inf       # type: Optional[int], float
            try:
                while status is None and time.monotonic() - began_s < min(limit_s, hurry_s):
                    status = program.wait(0.2)
                    signals.check()
                    if signals.is_hurried():
                        hurry_s = min(hurry_s, time.monotonic() - began_s + WAY_OUT_S)
            finally:
                program.end()
        lines.end()
        if status is None:
            raise ProgramError(f"{program.name} did not end within " + (
                f"{format_duration(limit_s)} (hook_timeout), and was killed. Correct it, or give it longer."
                if hurry_s >= limit_s else
                f"{format_duration(WAY_OUT_S)} of a signal, and was killed. Look at what it had begun."))
        if status != 0:
            raise ProgramError(f"{ending_text(program.name, status)}; the log has what it said. Correct it, "
                               f"or {self.name}= in the config.")


HOOK_ENDING_S = 5                      # for a hook that was told to end
# What stands as it was where it failed; what before_vm cost its VM is told there.
HOOK_LEFT = {"before_run": " This host backed up nothing.", "before_vm": "",
             "after_vm": " No copy is touched by that.", "after_run": " No copy is touched by that."}


class _Lines:
    """Output of a hook as lines of the log: struck, not too long and not too many."""
    MOST, LONGEST = 200, 1000

    def __init__(self, log: Log, prefix: str) -> None:
        self._log, self._prefix, self._rest, self._count = log, prefix, b"", 0

    def hear(self, piece: bytes) -> None:
        """More of it."""
        *lines, rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self._tell(line)
        self._rest = rest[:self.LONGEST]

    def end(self) -> None:
        """That was all."""
        if self._rest:
            self._tell(self._rest)
        if self._count > self.MOST:
            self._log.info(f"{self._prefix}{self._count - self.MOST} lines more are not shown.")

    def _tell(self, line: bytes) -> None:
        self._count += 1
        if self._count <= self.MOST:
            self._log.info(self._prefix + one_line(self._log.struck(
                line[:self.LONGEST].decode("utf-8", "replace"))))


class XeProgram(NamedTuple):
    """How xe is called: its path, and for another pool the address and password."""
    path: str
    address: Optional[PoolAddress]
    password: str

    def start(self, *arguments: str, stdin: Any = subprocess.DEVNULL) -> Program:
        """xe running that command, its output on a pipe.

        For another pool the password goes through a pipe of its own (`-pwf /dev/fd/N`: line 1 user, line 2
        password; ocaml/xe-cli/newcli.ml v26.17.0), so that no argv, file or environment holds it.
        """
        if self.address is None:
            return Program((self.path,) + arguments, stdin=stdin)
        read_end, write_end = os.pipe()
        try:
            os.write(write_end, (f"root\n{self.password}\n").encode("utf-8", "surrogateescape"))
            os.close(write_end)
            options = ("-s", self.address.host, "-u", "root", "-pwf", f"/dev/fd/{read_end}")
            # A port that is given counts for TLS and plain alike, also where the server sends xe on to
            # another host (newcli.ml get_xapiport), and to 127.0.0.1 xe never speaks TLS: so only one that is
            # unusual is given.
            is_usual = self.address.port == (80 if self.address.scheme == "http" else 443)
            if not is_usual and (self.address.host != "127.0.0.1" or self.address.scheme == "http"):
                options += ("-p", str(self.address.port))
            if self.address.scheme == "http":
                options += ("--nossl",)
            return Program((self.path,) + arguments[:1] + options + arguments[1:], stdin=stdin,
                           pass_fds=(read_end,))
        finally:
            os.close(read_end)


def find_program(names: Sequence[str], fallback: str = "") -> Optional[str]:
    """The path of the first of these programs on our PATH, else the fallback if it is there."""
    import shutil
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    return fallback if fallback and os.access(fallback, os.X_OK) else None


def os_reason(error: Exception) -> str:
    """What the system says went wrong, without errno and file name."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def ending_text(name: str, status: int) -> str:
    """How a program ended, in words."""
    if status < 0:
        try:
            return f"{name} was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"{name} was killed by signal {-status}"
    return f"{name} ended with exit status {status}"


MASTER_LOG = "/var/log/xensource.log of the pool's master tells more."

# `xe` can exit 0 after a failed export and say so only here (ocaml/xapi-cli-server/cli_operations.ml
# download_file, v26.17.0: a missing raise). These are how its sentences begin (ocaml/xe-cli/newcli.ml,
# xapi_cli.ml exception_handler, datamodel_errors.ml): a bare word could as well be part of a VM's name that
# it quotes.
XE_FAILURES = re.compile(
    r"(?im)^\W*(error( code)?:|operation failed|(export|import) (failed|cancelled)|lost connection|"
    r"unhandled exception|server internal error|unable to contact|failed to contact|"
    r"(please )?install the stunnel|file not permitted|authentication failed|username/password|no addrinfo|"
    r"host '.*' not found|required parameter|syntax error|unknown command|the server failed|"
    r"you (attempted|gave|cannot)|the uuid you|this (operation|session|call|request)|"
    r"another operation|the (operation|sr|vdi|vm|host|specified|given|snapshot|disk)\b.*(?<![-\w'\"])"
    r"(failed|cannot|not|invalid|full|exceeds)(?![-\w'\"]))")


def xe_problem(status: int, said: str) -> Optional[str]:
    """Why the xe command that ended so can't have done its work, or None."""
    quoted = f': "{one_line(said[-800:])}"' if said else ""
    if status != 0:
        return ending_text("xe", status) + quoted
    if said and XE_FAILURES.search(said):
        return "xe ended with exit status 0 but reported a failure" + quoted
    return None


# =============================================================================
# 10. Storage
# =============================================================================
# The door to files: backup_dir, above all. It is opened once and all is done relative
# to that descriptor, never through a symbolic link, so that neither a share that went
# away nor a planted link leads us elsewhere. Each deed is done whole or raises: what the
# system says (OSError) becomes a CatalogError here, once, with the place in it.

SMALL_FILE_BYTES = 64 * MEBIBYTE          # metadata and manifests; an image is never read whole
MISBEHAVIOUR = frozenset((
    errno.EIO, errno.ESTALE, errno.EROFS, errno.ENXIO, errno.ENODEV, errno.ENOTCONN, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ETIMEDOUT, errno.ECONNRESET,
    errno.ECONNREFUSED, errno.EREMOTEIO, errno.EBADMSG, errno.EUCLEAN, errno.ENOLINK, errno.ECOMM,
    errno.EPROTO))
ERROR_KINDS = {
    errno.ENOENT: NotThere, errno.EEXIST: NameTaken, errno.ENOTEMPTY: NameTaken,
    errno.ENOTDIR: WrongKind, errno.EISDIR: WrongKind, errno.ELOOP: WrongKind, errno.EFBIG: WrongKind}
TEMPORARY = ".new"
CANT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
FORGET_BYTES = 16 * MEBIBYTE              # how much of a file passes before the kernel may forget its pages


@contextlib.contextmanager
def storage_errors(doing: str, is_elsewhere: bool = False) -> Iterator[None]:
    """Inside, an OSError becomes a CatalogError that says what was being done, and of a file that lies
    elsewhere nothing about the store."""
    try:
        yield
    except BrokenPipeError:
        raise                       # the program at the other end has ended: it tells why
    except OSError as error:
        reason = os_reason(error)
        if is_elsewhere:
            raise ERROR_KINDS.get(error.errno, CatalogError)(f"{doing}: {reason}.")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(f"{doing}: no space left on the backup storage ({reason}). Free space there, "
                              "lower max_backups, or set pre_clean=yes.")
        if error.errno in MISBEHAVIOUR:
            raise StorageMisbehaved(f"{doing}: the backup storage misbehaved ({reason}). Nothing is pruned "
                                    "in this run; check the share or disk.")
        if error.errno in (errno.EACCES, errno.EPERM):
            reason += " (is root mapped to another user there?)"
        raise ERROR_KINDS.get(error.errno, CatalogError)(f"{doing}: {reason}.")


def write_all(target_fd: int, content: Any) -> None:
    """All of it is written; one system call may take only a part. OSError as it comes."""
    view = memoryview(content)
    while len(view):
        view = view[os.write(target_fd, view):]


def status_of(fd: int) -> os.stat_result:
    """What an open file or directory is now: on a share that went away even that can fail."""
    with storage_errors("looking at an open file of the store"):
        return os.fstat(fd)


def forget_cached(file_fd: int, end: int = 0) -> None:
    """The kernel need not keep what it holds of the file up to there (0: of all of it): what is read comes
    from storage, and the small memory of a host is not filled with pages that nobody reads again. It drops
    what is on disk, and begins to write the rest, to be dropped another time."""
    with contextlib.suppress(OSError):          # it is advice: a pipe or file system may have no use for it
        os.posix_fadvise(file_fd, 0, end, os.POSIX_FADV_DONTNEED)


def forget_passed(file_fd: int, begin: int, end: int) -> None:
    """The same of a file that is read or written in order, once in a while: these bytes of it are the last
    that passed. So the sync at the end has not to wait for gigabytes."""
    if end // FORGET_BYTES > begin // FORGET_BYTES:
        forget_cached(file_fd, end)


class Directory:
    """An open directory; every operation is relative to it and follows no symbolic link."""

    def __init__(self, fd: int, shown: str) -> None:
        self.fd = fd
        self.shown = shown              # its path, for people

    @classmethod
    def open_path(cls, path: str) -> "Directory":
        """The directory at that path, the last component of which may be a link."""
        with storage_errors(f"opening {path}"):
            return cls(os.open(fs_path(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), path)

    def close(self) -> None:
        """The descriptor is given back."""
        os.close(self.fd)

    def __enter__(self) -> "Directory":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @contextlib.contextmanager
    def _deed(self, doing: str, name: str) -> Iterator[str]:
        """The name as the system takes it; what goes wrong with it inside is told with its whole path."""
        title = f"{doing} {one_line(self.shown + '/' + name)}"
        if "\0" in name or re.search("[\ud800-\udb7f\udc00-\udc7f]", name):
            raise NotThere(f"{title}: no file can bear that name.")
        with storage_errors(title):
            yield fs_path(name)

    def child(self, name: str) -> "Directory":
        """The directory of that name in this one."""
        with self._deed("opening", name) as path:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            return Directory(os.open(path, flags, dir_fd=self.fd), self.shown + "/" + name)

    def make_child(self, name: str) -> "Directory":
        """A new directory of that name, synced; NameTaken if there is one."""
        with self._deed("making", name) as path:
            os.mkdir(path, 0o700, dir_fd=self.fd)
        self.sync()
        return self.child(name)

    def child_made_if_missing(self, name: str) -> "Directory":
        """The directory of that name, made if it is not there."""
        with contextlib.suppress(NameTaken):
            return self.make_child(name)
        return self.child(name)

    def names(self) -> List[str]:
        """All names in it, sorted."""
        with storage_errors(f"listing {self.shown}"):
            # two threads that list one descriptor take names from each other: each has its own
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
            try:
                return sorted(fs_text(name) for name in os.listdir(fd))
            finally:
                os.close(fd)

    def status(self, name: str) -> Optional[os.stat_result]:
        """What stands under that name, links not followed; None if nothing."""
        with contextlib.suppress(NotThere), self._deed("looking at", name) as path:
            return os.stat(path, dir_fd=self.fd, follow_symlinks=False)
        return None

    def leads_to(self, name: str, fd: int) -> bool:
        """Is what stands under that name what is open there?"""
        status = self.status(name)
        return status is not None and os.path.samestat(status, status_of(fd))

    def is_directory(self, name: str) -> bool:
        """Is there a real directory of that name?"""
        status = self.status(name)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def create(self, name: str) -> int:
        """A descriptor of a new file of that name, for us alone; NameTaken if there is one."""
        with self._deed("making", name) as path:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(path, flags, 0o600, dir_fd=self.fd)

    def open_file(self, name: str, flags: int = os.O_RDONLY) -> int:
        """A descriptor of the regular file of that name; NotThere, or WrongKind for anything else."""
        refusal = WrongKind(f"{self.shown}/{one_line(name)} is not a regular file.")
        with self._deed("opening", name) as path:
            try:
                flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                fd = os.open(path, flags, 0o600, dir_fd=self.fd)
            except OSError as error:
                raise refusal if error.errno == errno.ENXIO else error         # a socket
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise refusal
            return fd

    def read(self, name: str, limit: int = SMALL_FILE_BYTES) -> bytes:
        """The bytes of a small file; WrongKind if it is larger than the limit."""
        found = self.read_part(name, limit + 1)
        if len(found) > limit:
            raise WrongKind(f"{self.shown}/{one_line(name)} is larger than {format_size(limit)}.")
        return found

    def read_part(self, name: str, most: int, at_end: bool = False) -> bytes:
        """The first, or the last, bytes of a file."""
        with open(self.open_file(name), "rb") as file, self._deed("reading", name):
            file.seek(max(0, os.fstat(file.fileno()).st_size - most) if at_end else 0)
            return file.read(most)

    def write(self, name: str, content: bytes, is_for_all: bool = False) -> None:
        """A new file with that content, on disk when this returns; everybody may read it if it is for all."""
        fd = self.create(name)
        try:
            with self._deed("writing", name):
                if is_for_all:
                    os.fchmod(fd, 0o644)
                write_all(fd, content)
                os.fsync(fd)
        finally:
            os.close(fd)

    def put(self, name: str, content: bytes, is_for_all: bool = False) -> None:
        """The file has that content, on disk; who reads meanwhile sees the old one or the new one, whole."""
        temporary = f"{name}.{os.getpid()}-{threading.get_ident()}{TEMPORARY}"
        self.remove_file(temporary)
        try:
            self.write(temporary, content, is_for_all)
            with self._deed("writing", name) as path:
                os.replace(fs_path(temporary), path, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except CatalogError:
            with contextlib.suppress(CatalogError):
                self.remove_file(temporary)
            raise
        self.sync()

    def rename(self, old: str, new: str) -> None:
        """Renamed and on disk; NameTaken if the new name is (rename would replace an empty directory)."""
        if self.status(new) is not None:
            raise NameTaken(f"{self.shown}/{new} is there already.")
        with self._deed("renaming", old) as path:
            os.rename(path, fs_path(new), src_dir_fd=self.fd, dst_dir_fd=self.fd)
        self.sync()

    def remove_file(self, name: str) -> None:
        """The file or link of that name is gone."""
        with contextlib.suppress(NotThere), self._deed("removing", name) as path:
            os.unlink(path, dir_fd=self.fd)

    def remove_tree(self, name: str) -> None:
        """The directory of that name and all in it are gone; links in it are removed, not followed."""
        with self.child(name) as inner:
            for item in inner.names():
                if inner.is_directory(item):
                    inner.remove_tree(item)
                else:
                    inner.remove_file(item)
        with self._deed("removing", name) as path:
            os.rmdir(path, dir_fd=self.fd)

    def remove_if_empty(self, name: str) -> None:
        """An empty directory of that name is gone; anything else stays."""
        with contextlib.suppress(NotThere, NameTaken, WrongKind), \
                self._deed("removing the empty directory", name) as path:
            os.rmdir(path, dir_fd=self.fd)

    def sync(self) -> None:
        """Names made and removed here are on disk, where the file system can sync a directory."""
        with storage_errors(f"writing {self.shown}"):
            try:
                os.fsync(self.fd)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF):   # CIFS and FUSE can't
                    raise


class DirectoryToBe(Directory):
    """A directory that is yet to be made in the one that is open: nothing is in it, and nothing can be."""

    def names(self) -> List[str]:
        return []

    @contextlib.contextmanager
    def _deed(self, doing: str, name: str) -> Iterator[str]:
        raise NotThere(f"{doing} {one_line(self.shown + '/' + name)}: its directory is not made yet.")
        yield


# --- locks ----------------------------------------------------------------------

WHOLE_FILE = 0


class LockFile:
    """A lock in the state folder, held by fcntl.lockf, which reaches across NFS clients: the whole file, or
    one byte of it for each thing that is locked by itself."""

    # Closing any descriptor of a locked file drops this process's lock: so a lock file is opened once per
    # process, never closed, and known by device and inode, whatever path leads to it.
    opened = {}                            # type: Dict[Tuple[int, int], "LockFile"]

    def __init__(self, fd: int, shown: str) -> None:
        self.fd = fd
        self.shown = shown
        self._held = set()                 # type: Set[int]

    @classmethod
    def of(cls, folder: Directory, name: str) -> "LockFile":
        """The lock file of that name, made if it is missing; it must never be removed."""
        status = folder.status(name)
        if status is None or (status.st_dev, status.st_ino) not in cls.opened:
            lock = cls(folder.open_file(name, os.O_RDWR | os.O_CREAT), folder.shown + "/" + name)
            status = status_of(lock.fd)
            cls.opened[status.st_dev, status.st_ino] = lock
        return cls.opened[status.st_dev, status.st_ino]

    def take(self, byte: int = WHOLE_FILE, shared: bool = False) -> bool:
        """True if the lock is ours now; CatalogError where the file system can't lock."""
        with storage_errors(f"locking {self.shown}"):
            try:
                kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.lockf(self.fd, kind | fcntl.LOCK_NB, 1 if byte else 0, byte)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return False
                if error.errno in CANT_LOCK:
                    raise CatalogError(
                        f"{self.shown}: this file system can't lock files ({os_reason(error)}), so two runs "
                        "could destroy each other's work. Mount it with locking (NFS: without nolock, and "
                        "with rpc.statd running; CIFS: without nobrl).")
                raise
        self._held.add(byte)
        return True

    @contextlib.contextmanager
    def held(self, byte: int = WHOLE_FILE, shared: bool = False, tries: Iterable[bool] = (False,),
             on_wait: Callable[[], Any] = lambda: None,
             is_kept: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Inside, and if true, the lock is ours. `tries`: those of Signals.until; `on_wait` is called once if
        the first is in vain. If `is_kept` in the end, it is ours until this process ends: a thread that hangs
        may go on with what the lock is for. No store that hangs keeps us when the lock is given back."""
        is_ours = False
        for number, has_time in enumerate(tries):
            is_ours = self.take(byte, shared)
            if is_ours or not has_time:
                break
            if not number:
                on_wait()
        try:
            yield is_ours
        finally:
            if is_ours and not is_kept():
                with contextlib.suppress(StorageStalled):      # then it ends with this process
                    within(WAY_OUT_S, f"unlocking {self.shown}", lambda: self.release(byte))

    @property
    def is_held(self) -> bool:
        """Is the whole of it ours? To take it again would succeed, and to give that back would end it."""
        return WHOLE_FILE in self._held

    def text(self) -> Dict[str, Any]:
        """What its last holder wrote, {} if nothing readable; read through the held descriptor."""
        with storage_errors(f"reading {self.shown}"):
            content = os.pread(self.fd, 64 * KIBIBYTE, 0)
        with contextlib.suppress(ValueError):
            return parse_object(content)
        return {}

    def write_text(self, text: Dict[str, Any]) -> None:
        """The text is there for others to read, on disk."""
        content = (json.dumps(text, sort_keys=True) + "\n").encode("utf-8")
        with storage_errors(f"writing {self.shown}"):
            os.lseek(self.fd, 0, os.SEEK_SET)
            write_all(self.fd, content)
            os.ftruncate(self.fd, len(content))
            os.fsync(self.fd)

    def release(self, byte: int = WHOLE_FILE) -> None:
        """Free for others, at the latest when this process ends: that fails nothing. The file stays."""
        if byte in self._held:
            with contextlib.suppress(OSError):
                fcntl.lockf(self.fd, fcntl.LOCK_UN, 1 if byte else 0, byte)
            self._held.discard(byte)


def holder_text(text: Dict[str, Any]) -> str:
    """Who holds a lock and since when, from its text."""
    pid, host, since = (one_line(str(text.get(key, "?"))) for key in ("pid", "host", "since"))
    return f"process {pid} on {host}, since {since}"


class Mount(NamedTuple):
    """A mount. `locks_are_local`: its locks do not reach other hosts. `is_in_memory`: what it holds is gone
    when the host restarts. `source` is the device or export, `device` its st_dev as MAJOR:MINOR."""
    point: str
    kind: str
    locks_are_local: bool
    is_in_memory: bool
    source: str
    device: str
    is_read_only: bool

    @property
    def title(self) -> str:
        """It in a few words."""
        return f"{one_line(self.point)} ({self.kind}, {one_line(self.source)})"

    @property
    def is_network(self) -> bool:
        """Can every host that mounts it see the same files?"""
        return self.kind in NETWORK_KINDS

    @property
    def locks_reach_hosts(self) -> bool:
        """Is it known that its locks do, unless it is mounted otherwise?"""
        return self.kind in LOCKING_KINDS

    @property
    def disk(self) -> str:
        """The disk that it is a part of, as far as the name of the device tells; "" if it does not."""
        match = re.fullmatch(r"/dev/((?:sd|hd|vd|xvd)[a-z]+|(?:nvme[0-9]+n|mmcblk|md|cciss/c[0-9]+d)[0-9]+)"
                             r"(?:p?[0-9]+)?", self.source)
        return match.group(1) if match else ""


MOUNTS_FILE = "/proc/self/mountinfo"
MEMORY_KINDS = ("tmpfs", "ramfs", "devtmpfs")
LOCKING_KINDS = ("nfs", "nfs4", "cifs", "smb3", "ceph", "fuse.ceph", "glusterfs", "fuse.glusterfs")
# the others lock within one host, or only where somebody has seen to it
NETWORK_KINDS = LOCKING_KINDS + ("lustre", "fuse.sshfs", "9p", "afs", "beegfs")


def read_mounts(mountinfo: str) -> List[Mount]:
    """The mounts that the text of /proc/self/mountinfo tells of, in its order."""
    rows, kinds, found = [], {}, []        # type: List[Any], Dict[str, str], List[Mount]
    for line in mountinfo.split("\n"):
        left, _, right = line.partition(" - ")
        fields, behind = left.split(" "), right.split(" ")
        if len(fields) > 5 and len(behind) > 2:
            kinds[fields[4].rstrip("/") + "/"] = behind[0]          # the last at a place hides others there
            rows.append((fields, behind))
    for fields, behind in rows:
        kind, options = behind[0], (fields[5] + "," + behind[2]).split(",")
        values = dict(option.partition("=")[::2] for option in options)
        local = "nolock" in values or "nobrl" in values or values.get("local_lock", "none") != "none" \
            or kind == "fuse.sshfs"
        if kind == "overlay" and "upperdir" in values:     # it is kept where its upper layer lies
            places = [place for place in kinds if (values["upperdir"] + "/").startswith(place)]
            kind = kinds[max(places, key=len)] if places else ""
        point, source = (re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)
                         for text in (fields[4], behind[1]))
        found.append(Mount(point, kind, local, kind in MEMORY_KINDS, source, fields[2], "ro" in values))
    return found


def find_mount(mountinfo: str, device: int) -> Optional[Mount]:
    """The mount of that st_dev in the text of /proc/self/mountinfo, None if it is not there."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    return next((mount for mount in read_mounts(mountinfo) if mount.device == wanted), None)


# --- files elsewhere -------------------------------------------------------------


def free_space(fd: int, shown: str) -> Optional[int]:
    """Space that we may still use there, in bytes; None where the file system tells no size."""
    with storage_errors(f"asking for the free space of {shown}"):
        status = os.fstatvfs(fd)
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def close_on(device: int) -> None:
    """No descriptor of this process leads to a file on that device, but for stdin, stdout and stderr."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):             # that of the listing itself is closed already
            if int(name) > 2 and os.fstat(int(name)).st_dev == device:
                os.close(int(name))


class NewFile:
    """A file outside the store that stands at its place only once it is complete. Until then it has no name,
    so that whatever ends us leaves nothing; where each file has one (NFS, CIFS, FUSE), it lies beside its
    place."""

    def __init__(self, path: str, mark: str = "") -> None:
        """Raises NameTaken, or another CatalogError, if it can't be begun. `mark`: tells what is written from
        what another process writes, or a dead one has left."""
        self.shown, self._path, self._partial = path, fs_path(path), ""
        with contextlib.suppress(NotThere), storage_errors(f"making {path}", is_elsewhere=True):
            os.lstat(self._path)           # a name that can't be is refused now, not once all is written
            raise NameTaken(f"{path} exists already and was left as it is.")
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            os.stat("/proc/self/fd")       # where a file without a name gets its name from
            self.fd = os.open(os.path.dirname(self._path) or ".", flags | os.O_TMPFILE, 0o600)
        except OSError:
            partial = path + mark + PARTIAL
            with storage_errors(f"making {partial}", is_elsewhere=True):
                self.fd = os.open(fs_path(partial), flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            self._partial = fs_path(partial)

    def __enter__(self) -> "NewFile":
        return self

    def complete(self, size: Optional[int] = None) -> None:
        """All is on disk, under its own name, of that size; a file that came there meanwhile stays."""
        with storage_errors(f"writing {self.shown}", is_elsewhere=True):
            if size is not None:
                os.ftruncate(self.fd, size)
            os.fsync(self.fd)
            if os.path.lexists(self._path):
                raise NameTaken(f"{self.shown} came there meanwhile and was left as it is.")
            if not self._partial:          # only with a src_dir_fd is the link followed
                os.link(f"/proc/self/fd/{self.fd}", self._path, src_dir_fd=self.fd)
                return os.fsync(self.fd)   # the name, too: without one all is gone when the power fails
            try:
                os.link(self._partial, self._path)
            except OSError as error:
                if error.errno == errno.EEXIST or os.path.lexists(self._path):
                    raise
                os.rename(self._partial, self._path)     # a file system without hard links: FAT, some shares
                self._partial = ""

    def __exit__(self, *_: Any) -> None:
        os.close(self.fd)
        if self._partial:
            with storage_errors(f"removing {self.shown + PARTIAL}", is_elsewhere=True):
                os.unlink(self._partial)


# =============================================================================
# 11. Pool
# =============================================================================
# The only place that speaks XenAPI. It knows refs and gives values. A call that only asks, or can be repeated
# without harm, goes through ask(), which waits for a pool that restarts; one that makes or destroys something
# goes through call(), once: whoever gets AnswerLost asks the pool what became of it.

READ_TIMEOUT_S = 120
LOGIN_TRIES = 3
LOGIN_PAUSE_S = 2
IDLE_CONNECTION_S = 5
POLL_TIMEOUT_S = 10            # for a question that can as well be asked a little later
SAME_SESSION_PAUSE_S = 2
ORIGINATOR = "VmBackup"


class Transport:
    """XML-RPC with time limits and without silent repetition: the standard transport repeats a request whose
    connection broke; a VM.snapshot repeated so would make two snapshots."""

    def __init__(self, address: PoolAddress, settings: Configuration) -> None:
        """Raises UsageError if the CA file can't be read."""
        self._address = address
        self._fingerprint = settings.ca_fingerprint
        self._context = None if address.scheme != "https" \
            else checking_context("ca_file", settings.ca_file) if settings.ca_file else unchecking_context()
        self._connection = None            # type: Any
        self._used_at = 0.0
        self.timeout_s = 0.0

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _connect(self) -> None:
        """The connection is open; raises PoolError if the certificate is not the one demanded."""
        import http.client
        address = self._address
        if address.scheme == "unix":
            self._connection = http.client.HTTPConnection("localhost")
            self._connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._connection.sock.settimeout(self.timeout_s)
            self._connection.sock.connect(fs_path(address.host))
            return
        kind = http.client.HTTPConnection if address.scheme == "http" else functools.partial(
            http.client.HTTPSConnection, context=self._context)
        self._connection = kind(address.host, address.port, timeout=self.timeout_s)
        self._connection.connect()
        if address.scheme == "https" and self._fingerprint:
            found = hashlib.sha256(self._connection.sock.getpeercert(True)).hexdigest()
            if found != self._fingerprint:
                raise PoolError(f"{address.host} shows a TLS certificate with the SHA-256 fingerprint "
                                f"{found}, not the one of ca_fingerprint. Nothing was sent. If the "
                                "certificate was renewed, put the new fingerprint in the config.")

    def request(self, host: str, handler: str, request_body: bytes, verbose: bool = False) -> Any:
        """The answer to one request, sent once; over a new connection if the old one has been idle so long
        that the server may have closed it."""
        import xmlrpc.client
        if time.monotonic() - self._used_at > IDLE_CONNECTION_S:
            self.close()
        try:
            if self._connection is None or self._connection.sock is None:
                self._connect()
            self._connection.sock.settimeout(self.timeout_s)
            self._connection.request("POST", handler, request_body, {"Content-Type": "text/xml"})
            answer = self._connection.getresponse()
            if answer.status != 200:
                raise xmlrpc.client.ProtocolError(host + handler, answer.status, answer.reason, {})
            of_class = re.search(rb"<methodName>(\w+)\.get_all_records</methodName>", request_body)
            reader = xmlrpc.client.Unmarshaller()
            parser = RecordParser(of_class.group(1).decode(), reader) if of_class \
                else xmlrpc.client.ExpatParser(reader)
            for piece in iter(lambda: answer.read(16 * KIBIBYTE), b""):
                parser.feed(piece)
            parser.close()
            return reader.close()
        except BaseException:       # whatever ended it: half an answer may still come, and not for the next
            self.close()
            raise
        finally:
            self._used_at = time.monotonic()


# Of each class what is read of all its records at once, which in a large pool are tens of thousands with a
# hundred fields each: what is not named here is not kept.
RECORD_FIELDS = {key: tuple(words.split()) for key, words in {
    "pool": "uuid name_label master default_SR",
    "host": "uuid hostname address API_version_major API_version_minor software_version metrics PBDs",
    "host_metrics": "live",
    "VM": "uuid name_label name_description power_state tags memory_dynamic_max VCPUs_max VCPUs_at_startup "
          "guest_metrics VBDs VIFs is_a_template is_a_snapshot is_control_domain other_config resident_on",
    "VBD": "uuid VM VDI type userdevice device bootable mode unpluggable",
    "VDI": "uuid SR name_label name_description virtual_size physical_utilisation type sharable read_only "
           "snapshot_of is_a_snapshot snapshot_time VBDs other_config sm_config",
    "SR": "uuid name_label type content_type shared physical_size physical_utilisation PBDs",
    "PBD": "uuid host SR currently_attached",
    "VIF": "uuid VM network device MAC",
    "network": "uuid name_label",
}.items()}


class Record:
    """A record of get_all_records, field by field like a dict: the server may leave one out, but one that
    RECORD_FIELDS does not name is a bug, and a KeyError."""
    __slots__ = ()

    def update(self, found: Dict[str, Any]) -> None:
        for field, value in found.items():
            setattr(self, field, value)

    __init__ = update

    def get(self, field: str, missing: Any = None) -> Any:
        """The field's value, as the wire has it."""
        if field not in self.__slots__:
            raise KeyError(field)
        return getattr(self, field, missing)

    def __getitem__(self, field: str) -> Any:
        try:
            return getattr(self, field)
        except AttributeError:
            raise KeyError(field)


RECORD_TYPES = {one: type(one + "Record", (Record,), {"__slots__": kept})
                for one, kept in RECORD_FIELDS.items()}


class RecordParser:
    """Parses an answer of get_all_records as it comes: a field that is not kept is passed over, each record
    shrinks as soon as it ends, and equal strings (refs, above all) are one. All else, errors and failures
    among it, is made by the unmarshaller of xmlrpc.client, as for every other call."""

    RECORD_DEPTH = 3                   # the answer's struct of Status and Value, that of refs, a record's

    def __init__(self, class_name: str, target: Any) -> None:
        import xml.parsers.expat
        self._type, self._target = RECORD_TYPES[class_name], target
        self._stack, self._marks = target._stack, target._marks        # the same in Python 3.0 to 3.14
        target.append = self._append
        target.xml(None, None)
        self._texts = []               # type: List[str]
        self._other = 0                # how many members are open of a field that is passed over
        self._parser = xml.parsers.expat.ParserCreate()
        self._parser.buffer_text = True
        self._handle(self._start, target.end, target.data)

    def _handle(self, start: Any, end: Any, text: Any) -> None:
        self._parser.StartElementHandler = start
        self._parser.EndElementHandler = end
        self._parser.CharacterDataHandler = text

    def _append(self, value: Any) -> None:
        self._stack.append(sys.intern(value) if type(value) is str else value)

    def _start(self, tag: str, attributes: Dict[str, str]) -> None:
        self._target.start(tag, attributes)
        if tag == "struct" and len(self._marks) == self.RECORD_DEPTH:
            self._handle(None, self._end_in_record, self._texts.append)

    def _end_in_record(self, tag: str) -> None:
        """Between kept fields, where most of an answer is and so most time goes: only ends are looked at."""
        if tag == "name":
            if self._other:
                self._other += 1
                return
            name = "".join(self._texts).strip()
            if name in self._type.__slots__:
                self._target.append(name)
                self._handle(self._target.start, self._end_in_field, self._target.data)
            else:
                self._other = 1
        elif tag == "member":
            self._other -= 1
            if not self._other:
                self._texts.clear()
        elif tag == "struct" and not self._other:
            self._target.end(tag)
            self._stack[-1] = self._type(self._stack[-1])
            self._handle(self._start, self._target.end, self._target.data)

    def _end_in_field(self, tag: str) -> None:
        self._target.end(tag)
        if tag == "member" and len(self._marks) == self.RECORD_DEPTH:
            self._texts.clear()
            self._handle(None, self._end_in_record, self._texts.append)

    def feed(self, piece: bytes) -> None:
        """Raises ExpatError, or what the unmarshaller raises."""
        self._parser.Parse(piece, False)

    def close(self) -> None:
        """The answer has ended; raises ExpatError if it may not end there."""
        parser, self._parser = self._parser, None      # which know each other
        parser.Parse(b"", True)


def checking_context(key: str, ca_file: str) -> Any:
    """The TLS settings that take only certificates of these CAs, or the system's; UsageError about `key`."""
    import ssl
    try:
        return ssl.create_default_context(cafile=fs_path(ca_file) if ca_file else None)
    except OSError as error:
        raise UsageError(f"{key} {ca_file} can't be used: {os_reason(error)}. Nothing was sent. It must hold "
                         "CA certificates in PEM format.")


def unchecking_context() -> Any:
    """The TLS settings that take any certificate, as xe does."""
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with contextlib.suppress(ssl.SSLError):
        # older hosts have 1024-bit keys, which newer OpenSSL refuses even unverified;
        # OpenSSL before 1.1 has no levels and does not know the word
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
    return context


def own_doors() -> Tuple[PoolAddress, PoolAddress]:
    """Where this host listens, its unix socket and plain HTTP: the real places, or those of the test door."""
    url, space, path = fs_text(os.environ.get(TEST_DOOR, "")).partition(" ")
    return (PoolAddress("unix", path if space else LOCAL_SOCKET, 0),
            parse_pool_address(url if space else LOCAL_URL))


def is_gone(failure: ApiFailure, class_name: str) -> bool:
    """Does the failure say that an object of that class does not exist? (Both codes name the class first.)"""
    return failure.code in ("HANDLE_INVALID", "UUID_INVALID") and failure.parameters[:1] == (class_name,)


class Pool:
    """A session with the pool's master. Close it, or it stays open there for a day."""

    def __init__(self, services: Services, password: Optional[str], patience_s: float = 0) -> None:
        """The pool that the config names; this host's if it names none, by unix socket if `password` is None.
        It is waited for so long, or as long as stall_timeout."""
        self._services = services
        self._password = password
        self._patience_s = patience_s or services.patience_s
        self._xenapi = None                # type: Any
        self._session = None               # type: Any
        self._transport = None             # type: Optional[Transport]
        self._handle = ""
        self._master = None                # type: Optional[PoolAddress]
        self._sr_uuids = {}                # type: Dict[str, str]
        self._drives = {}                  # type: Dict[str, str]      # whose uuid of host each PBD is
        self._answered_at = 0.0            # by the monotonic clock
        self.changes_allowed = True        # a preview switches it off
        self.times_shaken = 0              # a connection or session was lost: the server may have restarted

    # --- connecting -----------------------------------------------------------

    def connect(self) -> None:
        """A session is open. Raises PoolError if the pool can't be reached or refuses the login."""
        try:
            import XenAPI
        except ImportError:
            raise PoolError("the Python module XenAPI is not installed. On a host of the pool it is there "
                            "for /usr/bin/python3; elsewhere: pip install XenAPI.")
        self._xenapi = XenAPI
        give_up_at = time.monotonic() + self._patience_s
        for attempt in range(1, LOGIN_TRIES + 1):
            try:
                self._login()
                return
            except AnswerLost as error:
                if attempt == LOGIN_TRIES or time.monotonic() + LOGIN_PAUSE_S > give_up_at:
                    raise PoolError(f"{error} No VM was touched. Is the pool up, and the address right?")
                self._services.signals.sleep(LOGIN_PAUSE_S)

    def _login(self) -> None:
        """Logged in at the address, or at the master that it names; without a session nothing stays open."""
        by_socket, by_http = own_doors()
        address = self._services.settings.pool or (by_socket if self._password is None else by_http)
        try:
            try:
                self._login_at(self._master or address)
            except ApiFailure as failure:
                if failure.code != "HOST_IS_SLAVE" or not failure.parameters:
                    raise
                host, port = failure.parameters[0], (self._services.settings.pool or by_http).port
                # beside port 80 of a host there is 443; beside the one of a test's pool, the next
                self._master = address._replace(host=host) if address.scheme == "https" \
                    else PoolAddress("https", host, 443 if port == 80 else port + 1)
                self._login_at(self._master)
        except ApiFailure as failure:
            self._forget_session()
            if failure.code == "SESSION_AUTHENTICATION_FAILED":
                raise PoolError("the pool refused the login of root: the password is wrong. No VM was "
                                "touched. Check the password, or the password file.")
            raise PoolError(f"the pool refused the login: {failure_text(failure.code, failure.parameters)} "
                            "No VM was touched. Look at the master's log, /var/log/xensource.log.")
        except PoolError:
            self._forget_session()
            raise

    def _login_at(self, address: PoolAddress) -> None:
        """Logged in there; raises ApiFailure or AnswerLost."""
        self._forget_session()
        self._transport = Transport(address, self._services.settings)
        url = "http://localhost/" if address.scheme == "unix" else address.url
        self._session = self._xenapi.Session(url, transport=self._transport)
        self._guarded("the login", lambda: self._session.login_with_password(
            "root", self._password or "", "1.0", ORIGINATOR), may_break=True)
        self._handle = self._session.handle

    @property
    def xe_address(self) -> Optional[PoolAddress]:
        """The address that xe has to be given; None for this host's own pool."""
        return self._services.settings.pool and (self._master or self._services.settings.pool)

    def _forget_session(self) -> None:
        """The connection, if any, is closed; the session itself is the server's to forget."""
        if self._transport is not None:
            self._transport.close()
        self._session = self._transport = None

    def close(self) -> None:
        """Logged out, if the pool still answers."""
        # else a signal has ended the login itself
        if self._session is not None and self._session.handle:
            # A session that can't be closed is no news for anyone: the pool drops it after a day without a
            # call.
            with contextlib.suppress(BackupError):
                self._guarded("the logout", self._session.xenapi.session.logout, may_break=True,
                              timeout_s=LOGOUT_TIMEOUT_S)
        self._forget_session()

    # --- calling ----------------------------------------------------------------

    def call(self, doing: str, method: str, *arguments: Any, **options: Any) -> Any:
        """The answer to one call, sent once. Raises ApiFailure or AnswerLost; `doing` begins their sentence.
        HOST_IS_SLAVE means that nothing was done: the master is looked for, and the call sent there."""
        if not self.changes_allowed and not method.split(".")[1].startswith("get"):
            raise AssertionError("a preview must not call " + method)
        for is_last_try in (False, True):
            if self._session is None:
                self._master = None                    # it may be another one now
                self._login()
            function = functools.reduce(getattr, method.split("."), self._session.xenapi)
            try:
                answer = self._guarded(doing, lambda: function(*arguments), **options)
                break
            except ApiFailure as failure:
                if failure.code != "HOST_IS_SLAVE" or is_last_try:
                    raise
                self._services.log.info("the pool's master has changed; logging in again.")
                self._forget_session()
        if self._session.handle != self._handle:       # made anew by the XenAPI module, as it had died
            self._handle = self._session.handle
            self.times_shaken += 1
            self._services.log.info("the session with the pool was lost; logged in again.")
        return answer

    def ask(self, doing: str, method: str, *arguments: Any, **options: Any) -> Any:
        """The answer to a call that can be repeated: a pool that does not answer is waited for."""
        give_up_at = time.monotonic() + self._patience_s
        pause_s = 1.0
        while True:
            self._services.signals.check()
            try:
                return self.call(doing, method, *arguments, may_break=True, **options)
            except AnswerLost as error:
                if time.monotonic() + pause_s > min(give_up_at,
                                                    self._services.signals.patience_ends(self._answered_at)):
                    waited_s = SIGNAL_PATIENCE_S if self._services.signals.noted else self._patience_s
                    raise PoolError(f"{error} The pool has not answered for {format_duration(waited_s)}: "
                                    "is its master up, and xapi running there?")
                self._services.log.info(f"{error} Trying again.")
                if pause_s > SAME_SESSION_PAUSE_S:         # the master may be another one now
                    self._forget_session()
            except ApiFailure as failure:
                if failure.code not in STARTING_UP or time.monotonic() + pause_s > give_up_at:
                    raise
                self._services.log.info(f"the pool is starting ({failure.code}); trying again.")
            self._services.signals.sleep(pause_s)
            pause_s = min(pause_s * 2, 15)

    def ask_if_there(self, doing: str, method: str, ref: str, *arguments: Any, missing: Any = None) -> Any:
        """The answer about the object of that ref or uuid, `missing` if it does not exist (any more)."""
        try:
            return self.ask(doing, method, ref, *arguments)
        except ApiFailure as failure:
            if is_gone(failure, method.partition(".")[0]):
                return missing
            raise

    def _guarded(self, doing: str, function: Callable[[], Any], may_break: bool = False,
                 timeout_s: float = 0) -> Any:
        """What the function gives, its failures translated to ApiFailure and AnswerLost."""
        import http.client
        import ssl
        import xml.parsers.expat
        import xmlrpc.client
        self._transport.timeout_s = min(timeout_s or min(READ_TIMEOUT_S, self._patience_s),
                                        SIGNAL_PATIENCE_S if self._services.signals.noted else float("inf"))
        try:
            with self._services.signals.awaited(may_break):
                answer = function()
            self._answered_at = time.monotonic()
            return answer
        except self._xenapi.Failure as failure:
            self._answered_at = time.monotonic()
            details = [str(item) for item in failure.details]
            raise ApiFailure(details[0], details[1:], doing)
        except (OSError, ssl.CertificateError, http.client.HTTPException, xmlrpc.client.Error,
                xml.parsers.expat.ExpatError) as error:
            if is_certificate_refusal(error):
                raise PoolError("the pool's TLS certificate is not vouched for by "
                                f"ca_file={self._services.settings.ca_file}: "
                                f"{getattr(error, 'verify_message', '') or error}. Nothing was sent. Put the "
                                "host's own certificate into that file, or use ca_fingerprint.")
            self.times_shaken += 1
            self._transport.close()            # the session itself may be alive: the next call tries it again
            raise AnswerLost(f"{doing} got no answer from the pool: {connection_reason(error)}.")

    # --- reading ----------------------------------------------------------------

    def identity(self) -> Inventory:
        """Which pool it is, and which host of it we are, without what is in it."""
        doing = "reading the pool"
        session_host = self._session_host(doing)
        problems = []                      # type: List[str]
        pools, hosts = self.records(doing, "pool"), self.records(doing, "host")
        pool = Fields("the pool", next(iter(pools.values()), {}), problems)
        values = {ref: _host(ref, record, problems) for ref, record in hosts.items()}
        if not pool.text("uuid") or not values:
            raise PoolError("the pool does not say its uuid, or has no host: its database is damaged. No VM "
                            "was touched. Look at the master's log, /var/log/xensource.log.")
        master = values.get(pool.text("master")) or values.get(session_host) or list(values.values())[0]
        host = values.get(session_host, master)
        # sent on: the session is the master's, we are not
        if self._services.settings.pool is None and self._master is not None:
            host = own_host(list(values.values()), read_text_file(INVENTORY_FILE), own_doors()[1].host,
                            socket.gethostname()) or host
        self._drives = {drive: value.uuid for ref, value in values.items()
                        for drive in Fields("the host", hosts[ref], []).texts("PBDs")}
        return Inventory(pool.text("uuid"), pool.text("name_label"), host, master, (), tuple(problems),
                         host_uuids={ref: value.uuid for ref, value in values.items()})

    def inventory(self, identity: Optional[Inventory] = None) -> Inventory:
        """The whole pool in nine calls, whatever the number of VMs. No single bad record ends it."""
        doing, identity = "reading the pool", identity or self.identity()
        problems, real, others = list(identity.problems), [], []
        machines, vbds, vdis, srs, vifs, networks = (
            self.records(doing, name) for name in "VM VBD VDI SR VIF network".split())
        self._sr_uuids = {ref: Fields("an SR", record, []).text("uuid") for ref, record in srs.items()}
        seen_by = {self._sr_uuids[ref]: {
            self._drives.get(drive, "") for drive in Fields("an SR", record, []).texts("PBDs")} - {""}
                   for ref, record in srs.items()}
        for ref, record in machines.items():
            if not can_be_told_apart(record):
                problems.append("the record of a VM, "
                                f"{quote_name(str(record.get('name_label') or record.get('uuid') or ref))}, "
                                "lacks what tells VMs from templates, or its name or uuid: it was left out. "
                                "`xe vm-list params=all` shows all records.")
            elif is_real_machine(record):
                machine = self._machine(ref, record, vbds, vdis)
                lost = [problem for _, _, problem in _networks_of(record, vifs, networks) if problem]
                real.append(machine._replace(problems=machine.problems + tuple(lost)))
            else:
                kind = next(words for flag, words in MACHINE_FLAGS.items() if record[flag])
                others.append((record["name_label"], record["uuid"], kind))
        real.sort(key=lambda machine: (machine.name, machine.uuid))
        references = tuple(named_references("VM", machines, lambda record: [
            Fields("", vdis.get(Fields("", vbds.get(vbd), []).text("VDI")), []).text("uuid")
            for vbd in Fields("", record, []).texts("VBDs")])) \
            + tuple(named_references("VDI", vdis, lambda record: [record["uuid"]]))
        by_uuid = {Fields("", record, []).text("uuid"): record for record in vdis.values()}
        return identity._replace(
            machines=tuple(real), problems=tuple(problems), references=references, others=tuple(others),
            vdis=set(by_uuid),
            used={disk.vdi_ref: used_bytes(vdis[disk.vdi_ref], by_uuid)
                  for machine in real for disk in machine.disks},
            local_srs={uuid: min(hosts) for uuid, hosts in seen_by.items() if len(hosts) == 1})

    def records(self, doing: str, class_name: str) -> Dict[str, Any]:
        """All records of that class by ref, with the fields of RECORD_FIELDS."""
        return {ref: record for ref, record in self.ask(doing, class_name + ".get_all_records").items()
                if isinstance(record, (dict, Record))}

    def _session_host(self, doing: str) -> str:
        """The ref of the host that took the login. The session is an argument here: one that was made anew by
        the XenAPI module meanwhile is asked about again."""
        try:
            return self.ask(doing, "session.get_this_host", self._session.handle)
        except ApiFailure as failure:
            if failure.code not in ("HANDLE_INVALID", "SESSION_INVALID"):
                raise
        return self.ask(doing, "session.get_this_host", self._session.handle)

    def _machine(self, ref: str, record: Dict[str, Any], vbds: Dict[str, Any],
                 vdis: Dict[str, Any]) -> VirtualMachine:
        """The VM's value; a VBD that vanished between two calls is left out."""
        problems = []                      # type: List[str]
        machine = Fields("the VM", record, problems)
        disks = []
        for vbd in machine.texts("VBDs"):
            drive = Fields("its drive", vbds.get(vbd), problems)
            if vbd not in vbds or drive.text("type") != "Disk":
                continue
            if drive.text("VDI") in vdis:
                disks.append(self._disk(drive, vdis[drive.text("VDI")], problems))
            else:
                problems.append(f"its drive with userdevice {quote_name(drive.text('userdevice'))} names a "
                                f"disk that is not in the pool ({quote_name(drive.text('VDI'))}): no copy of "
                                "that is made. Remove that drive from the VM, if the disk is gone for good.")
        disks.sort(key=lambda disk: (userdevice_number(disk.userdevice), disk.userdevice))
        return VirtualMachine(
            ref, machine.text("uuid"), machine.text("name_label"), machine.text("name_description"),
            machine.text("power_state"), tuple(machine.texts("tags")), machine.text("memory_dynamic_max"),
            machine.text("VCPUs_max"), machine.text("VCPUs_at_startup"),
            machine.text("guest_metrics") or NULL_REF, tuple(disks), tuple(problems),
            str(record.get("resident_on", "")))

    def _disk(self, vbd: "Fields", record: Dict[str, Any], problems: List[str]) -> Disk:
        vdi = Fields("its disk", record, problems)
        sr_ref = vdi.text("SR")
        if sr_ref not in self._sr_uuids:
            self._sr_uuids[sr_ref] = "" if sr_ref in ("", NULL_REF) else self.ask_if_there(
                "reading an SR", "SR.get_uuid", sr_ref, missing="")
        disk = Disk(vbd.text("uuid"), vbd.text("userdevice"),
                    vbd.text("device") or device_name(vbd.text("userdevice")),
                    vbd.flag("bootable"), vbd.text("mode"), vbd.text("type"), vbd.flag("unpluggable"),
                    vbd.text("VDI"), vdi.text("uuid"), vdi.text("name_label"), vdi.text("name_description"),
                    vdi.number("virtual_size"),
                    vdi.text("type"), vdi.flag("sharable"), vdi.flag("read_only"), sr_ref,
                    self._sr_uuids[sr_ref], vdi.text("snapshot_of"))
        if not disk.sr_uuid:
            problems.append(f"its disk {disk.device} {quote_name(disk.name)} lies on an SR that is not in "
                            f"the pool ({quote_name(sr_ref)}): no snapshot can be made of it. Detach it, or "
                            "exclude the VM.")
        return disk

    def machine(self, ref: str, doing: str, record: Optional[Dict[str, Any]] = None) -> VirtualMachine:
        """The VM, or snapshot, as it is now; ApiFailure HANDLE_INVALID if it is gone."""
        record = record or self.ask(doing, "VM.get_record", ref)
        vbds = self.ask(doing, "VBD.get_all_records_where", f'field "VM" = "{ref}"')
        vdis = {vbd["VDI"]: self.ask_if_there(doing, "VDI.get_record", vbd["VDI"]) for vbd in vbds.values()
                if vbd.get("type") == "Disk" and isinstance(vbd.get("VDI"), str) and vbd["VDI"] != NULL_REF}
        return self._machine(ref, record, vbds, {ref: vdi for ref, vdi in vdis.items() if vdi is not None})

    def real_machine(self, planned: VirtualMachine) -> VirtualMachine:
        """The VM as it is now; BackupError if that ref is no longer the VM that was planned."""
        doing = f"reading {planned.title} again"
        record = self.ask(doing, "VM.get_record", planned.ref)
        if record.get("uuid") != planned.uuid or not is_real_machine(record):
            raise BackupError(f"{planned.title} is no longer a VM (it became a template, or its record was "
                              "replaced), so it was not backed up. If that is meant, correct the config.")
        return self.machine(planned.ref, doing, record)

    def interfaces(self, machine: VirtualMachine) -> List[Interface]:
        """The VM's VIFs, by device; one whose network is gone has no name of it, and a `problem`."""
        doing = f"reading the network interfaces of {machine.title}"
        vifs = self.ask(doing, "VIF.get_all_records_where", f'field "VM" = "{machine.ref}"')
        names = {ref: self.ask_if_there(doing, "network.get_name_label", ref)
                 for ref in {str(vif.get("network")) for vif in vifs.values()} - {NULL_REF}}
        networks = {ref: {"name_label": name} for ref, name in names.items() if name is not None}
        found = [Interface(vif.text("uuid"), vif.text("device"), name, vif.text("MTU"), vif.text("MAC"),
                           tuple(sorted(vif.texts_by_key("other_config").items())), problem)
                 for vif, name, problem in _networks_of({"VIFs": list(vifs)}, vifs, networks)]
        return sorted(found, key=lambda vif: (userdevice_number(vif.device), vif.device))

    def os_version(self, machine: VirtualMachine) -> str:
        """The name of the guest's system as its tools report it; "" if they never did."""
        if machine.guest_metrics_ref == NULL_REF:
            return ""
        version = self.ask_if_there(f"reading the guest metrics of {machine.title}",
                                    "VM_guest_metrics.get_os_version", machine.guest_metrics_ref, missing={})
        return str(version.get("name", ""))

    def server_time(self, doing: str) -> datetime:
        """What the clock of the host that we are logged in at says, to the second."""
        return parse_server_time(self.ask(doing, "host.get_servertime", self._session_host(doing)))

    def storage_repositories(self, refs: Iterable[str], patient: bool = True) -> List[StorageRepository]:
        """Those SRs as they are now. Without patience a pool that does not answer is not waited for."""
        read = self.ask if patient else functools.partial(self.call, timeout_s=POLL_TIMEOUT_S)
        found = []
        for ref in sorted(set(refs)):
            record = Fields("an SR", read("reading an SR", "SR.get_record", ref), [])
            found.append(StorageRepository(ref, record.text("uuid"), record.text("name_label"),
                                           record.number("physical_size"),
                                           record.number("physical_utilisation")))
        return found


STARTING_UP = frozenset(("HOST_STILL_BOOTING", "HOST_IN_EMERGENCY_MODE", "HOST_HAS_NO_MANAGEMENT_IP"))
LOGOUT_TIMEOUT_S = 20


class Fields:
    """A record of the pool: a field that is missing, or of another type, reads as empty and is a problem."""

    def __init__(self, what: str, record: Any, problems: List[str]) -> None:
        self._what = what
        self._record = record if isinstance(record, (dict, Record)) else {}
        self._problems = problems

    def _read(self, field: str, kind: type) -> Any:
        value = self._record.get(field)
        if isinstance(value, kind):
            return value
        problem = (f"the pool's record of {self._what} "
                   f"({one_line(str(self._record.get('uuid', 'no uuid')))[:8]}) has no usable {field}.")
        if problem not in self._problems:
            self._problems.append(problem)
        return kind()

    def text(self, field: str) -> str:
        """A string, also of digits, an enum or a ref."""
        return self._read(field, str)

    def flag(self, field: str) -> bool:
        return self._read(field, bool)

    def number(self, field: str) -> int:
        """A whole number, which the server writes as a string; 0 for anything else."""
        text = self._read(field, str)
        return int(text) if re.fullmatch(r"-?[0-9]{1,19}", text) else 0

    def texts(self, field: str) -> List[str]:
        return [item for item in self._read(field, list) if isinstance(item, str)]

    def texts_by_key(self, field: str) -> Dict[str, str]:
        return {key: value for key, value in self._read(field, dict).items() if isinstance(value, str)}


def _host(ref: str, record: Dict[str, Any], problems: List[str]) -> Host:
    host = Fields("the host", record, problems)
    software = host.texts_by_key("software_version")
    version, build = (tuple(int(part) for part in re.findall(r"[0-9]+", software.get(key, "")))
                      for key in ("product_version", "xapi_build"))
    return Host(ref, host.text("uuid"), host.text("hostname").split(".")[0] or "host", host.text("address"),
                version, (host.number("API_version_major"), host.number("API_version_minor")), build)


def _networks_of(machine: Dict[str, Any], vifs: Dict[str, Any],
                 networks: Dict[str, Any]) -> Iterator[Tuple["Fields", str, str]]:
    """Each interface of the VM that is there yet, the name of its network, and what is wrong with that."""
    for ref in Fields("the VM", machine, []).texts("VIFs"):
        if ref in vifs:
            vif = Fields("its interface", vifs[ref], [])
            network = networks.get(vif.text("network"))
            yield vif, Fields("its network", network, []).text("name_label"), "" if network is not None else (
                f"its interface {quote_name(vif.text('device'))} is on a network that is not in the pool "
                f"({quote_name(vif.text('network'))}): which one, the copy does not tell.")


def own_host(hosts: Sequence[Host], inventory_text: str, address: str, hostname: str) -> Optional[Host]:
    """The host that this program runs on: by INSTALLATION_UUID of its inventory file, which is its uuid
    (ocaml/libs/xapi-inventory/lib/inventory.ml), else by address, else by hostname; or None."""
    match = re.search(r"^INSTALLATION_UUID='([^']*)'", inventory_text, re.MULTILINE)
    ways = (lambda host: match is not None and host.uuid == match.group(1),
            lambda host: host.address == address,
            lambda host: host.short_name == hostname.split(".")[0])
    return next((host for is_own in ways for host in hosts if is_own(host)), None)


MACHINE_FLAGS = {"is_a_snapshot": "a snapshot", "is_control_domain": "a control domain",
                 "is_a_template": "a template"}            # a snapshot is a template, too


def named_references(class_name: str, records: Dict[str, Dict[str, Any]],
                     disks: Callable[[Dict[str, Any]], Iterable[str]]) -> Iterator[NamedSnapshot]:
    """Those of the records that are snapshots with the name of a reference. `disks`: the uuids of its."""
    for record in records.values():
        match = REFERENCE_NAME.search(str(record.get("name_label")))
        if match and record.get("is_a_snapshot") is True and isinstance(record.get("uuid"), str):
            yield NamedSnapshot(class_name, record["uuid"], record["name_label"],
                                tuple(filter(None, disks(record))),
                                match.group("stamp").replace(":", "").replace(" ", "-"),
                                match.group("store"))


def used_bytes(record: Any, by_uuid: Mapping[Any, Any]) -> int:
    """How much of a disk is in use at most: what it takes on its SR, with the base copies that it rests on
    (sm_config:vhd-parent), of all disks by their uuid; its size where that is not known."""
    disk, used, passed = Fields("", record, []), 0, set()
    size, one = disk.number("virtual_size"), disk
    while True:
        taken, parent = one.number("physical_utilisation"), one.texts_by_key("sm_config").get("vhd-parent")
        used += taken
        if taken <= 0 or used >= size or parent in passed:
            return size
        if not parent:
            return used
        passed.add(parent)
        one = Fields("", by_uuid.get(parent), [])


def is_real_machine(record: Dict[str, Any]) -> bool:
    """Neither template, snapshot nor control domain. A snapshot whose is_a_template was cleared looks like a
    VM but for is_a_snapshot (ocaml/xapi/xapi_vm_clone.ml, v26.17.0)."""
    return all(record.get(flag) is False for flag in MACHINE_FLAGS)


def can_be_told_apart(record: Dict[str, Any]) -> bool:
    """Does the record say whether it is a real VM, and which?"""
    return bool(record.get("uuid")) and all(isinstance(record.get(flag), bool) for flag in MACHINE_FLAGS) \
        and all(isinstance(record.get(field), str) for field in ("uuid", "name_label"))


def server_time_argument(at: datetime) -> Any:
    """A UTC time as calls take it."""
    import xmlrpc.client
    return xmlrpc.client.DateTime(at.strftime("%Y%m%dT%H:%M:%SZ"))


def parse_server_time(value: Any) -> datetime:
    """A time of the server, which writes it with dashes or without; the epoch if it is none."""
    try:
        return datetime.strptime(re.sub(r"[-:Z]", "", str(value)),
                                 "%Y%m%dT%H%M%S").replace(tzinfo=timezone.utc)
    except ValueError:
        return datetime.fromtimestamp(0, timezone.utc)


def is_certificate_refusal(error: Exception) -> bool:
    """Was it our own check that refused the certificate? (Python 3.6 has no class of its own for that.)"""
    import ssl
    return isinstance(error, ssl.CertificateError) or (
        isinstance(error, ssl.SSLError) and "CERTIFICATE_VERIFY_FAILED" in (error.reason or ""))


def connection_reason(error: Exception) -> str:
    """Why a connection gave no answer, in words."""
    import ssl
    import xml.parsers.expat
    import xmlrpc.client
    if isinstance(error, socket.timeout):
        return "it said nothing for too long"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    if isinstance(error, xmlrpc.client.ProtocolError):
        return f"HTTP {error.errcode} {error.errmsg}"
    if isinstance(error, xmlrpc.client.Fault):
        return one_line(str(error.faultString))
    if isinstance(error, xml.parsers.expat.ExpatError):
        return f"its answer is not XML (a control character in a name?): {error}"
    return os_reason(error)


# =============================================================================
# 12. Post
# =============================================================================
# The only place that speaks SMTP: a mail is with the server for each recipient, or there
# is a reason for people. What could not be sent is kept by the outbox that is handed in.

MAIL_TRY_LIMIT_S = 30
MAIL_PAUSES_S = (5, 20)            # before the second and third try: restarts and short greylisting pass
MAIL_GOODBYE_S = 2
SMTP_PORTS = {"none": 25, "starttls": 587, "tls": 465}


class Refusal(NamedTuple):
    """Why a mail is not with the server; `is_final` if another try now would be useless, `is_for_good` if the
    server will never take this mail, whatever becomes of our settings."""
    reason: str
    is_final: bool
    is_for_good: bool = False


def cut(text: str, most: int) -> str:
    """The text, its end left out if it is longer than that."""
    return text if len(text) <= most else text[:most - 3] + "..."


def compose_mail(subject: str, body: str, sender: str, recipients: Sequence[str], now: datetime) -> bytes:
    """The message as it is sent, with the headers that keep it out of spam folders and loops."""
    import email.charset
    import email.header
    import email.message
    import email.policy
    import email.utils
    charset = email.charset.Charset("utf-8")
    charset.body_encoding = email.charset.QP
    subject = one_line(subject)
    # one that looks encoded already (=?...?=) would be decoded, so it is encoded too
    is_plain = all(" " <= char <= "~" for char in subject) and "=?" not in subject \
        and max(map(len, subject.split(" "))) <= 60
    message = email.message.Message()
    message["From"] = sender
    message["To"] = ", ".join(recipients)
    message["Subject"] = subject if is_plain else email.header.Header(subject, "utf-8", header_name="Subject")
    message["Date"] = email.utils.format_datetime(now)
    message["Message-ID"] = email.utils.make_msgid(domain=sender.rpartition("@")[2])
    message["Auto-Submitted"] = "auto-generated"
    message.set_payload("\n".join(one_line(line) for line in body.split("\n")), charset)
    return message.as_bytes(policy=email.policy.compat32.clone(linesep="\r\n"))


class Mailer:
    """Sends mail; what can't be sent goes into the outbox, and out with the next run's."""

    def __init__(self, services: Services, outbox: Any) -> None:
        settings = services.settings
        self._services = services
        self._outbox = outbox
        self._recipients = tuple(collections.OrderedDict.fromkeys(settings.mail_to))
        name = socket.getfqdn()
        # a resolver may only say localhost
        self._host = socket.gethostname() if name.split(".")[0] == "localhost" else name
        self._sender = settings.mail_from or "root@" + self._host
        self._port = settings.smtp_port or SMTP_PORTS[settings.smtp_security]
        self._server_title = f"{settings.smtp_server}:{self._port}"

    def send(self, subject: str, body: str) -> bool:
        """True if the mail is with the server for every recipient; those kept from earlier runs have followed
        it."""
        now = self._services.clock.utc()
        message = compose_mail(subject, body, self._sender, self._recipients, now)
        refused = self._deliver(message, MAIL_PAUSES_S)
        if not refused:
            return self.send_kept()
        advice = "The other recipients have it."
        if len(refused) == len(self._recipients):
            try:
                if self._outbox is None:
                    raise BackupError("the backup directory is out of reach. The log has all that it says.")
                self._outbox.keep(message, now)
                advice = "It is kept and goes out with the next run's."
            except BackupError as error:
                advice = f"It could not be kept either: {error}"
        self._services.log.warning(f"{self._failure_text(refused)} {advice}")
        return False

    def send_test(self, subject: str, body: str) -> None:
        """The mail is with the server; BackupError if it is not, and nothing is kept."""
        message = compose_mail(subject, body, self._sender, self._recipients, self._services.clock.utc())
        refused = self._deliver(message, MAIL_PAUSES_S)
        if refused:
            raise BackupError(self._failure_text(refused))
        self._services.log.show(f"{self._server_title} has taken the mail for {', '.join(self._recipients)}.")

    def send_kept(self) -> bool:
        """The mails that earlier runs could not send are with the server, unless it takes none now. False if
        one had to be given up."""
        all_well = True
        try:
            for name in self._outbox.names() if self._outbox else []:
                refused = self._deliver(self._outbox.read(name), ())
                if refused and not all(refusal.is_for_good for refusal in refused.values()):
                    self._services.log.info(f"{self._failure_text(refused)} Mails of earlier runs are still "
                                            "kept.")
                    break
                self._outbox.remove(name)
                if refused:
                    all_well = False
                    self._services.log.warning(
                        f"{self._failure_text(refused)} It is one of an earlier run, and is given up: that "
                        "run's log has what it said.")
                else:
                    self._services.log.info("a mail that an earlier run could not send was sent.")
        except BackupError as error:
            self._services.log.info(f"mails that earlier runs could not send are not in reach: {error}")
        return all_well

    def _failure_text(self, refused: Dict[str, Refusal]) -> str:
        reasons = "; ".join(sorted({refusal.reason for refusal in refused.values()}))
        return f"the mail to {', '.join(refused)} was not sent: {self._server_title}: {reasons}."

    def _deliver(self, message: bytes, pauses_s: Tuple[int, ...]) -> Dict[str, Refusal]:
        """The recipients whose mail is not with the server after all tries, and why; none if all is well."""
        refused = {}                       # type: Dict[str, Refusal]
        waiting = list(self._recipients)
        for pause_s in (0,) + pauses_s:
            if pause_s:
                failure = self._failure_text({address: refused[address] for address in waiting})
                self._services.log.info(f"{failure} Trying again in {format_duration(pause_s)}.")
                self._services.signals.sleep(pause_s)
            refused = {address: refused[address] for address in refused if address not in waiting}
            refused.update(self._try_once(waiting, message))
            waiting = [address for address in refused if not refused[address].is_final]
            if not waiting:
                break
        return refused

    def _try_once(self, recipients: Sequence[str], message: bytes) -> Dict[str, Refusal]:
        """The recipients whose mail is not with the server after one try, and why."""
        try:
            talk = SmtpTalk(self._services.settings, self._port, self._host)
        except BackupError as error:
            return dict.fromkeys(recipients, Refusal(str(error).rstrip("."), True))
        try:
            refused = within(MAIL_TRY_LIMIT_S, "the mail", lambda: talk.hand_over(
                self._sender, list(recipients), message), self._services.signals.check)
        except StorageStalled:             # it is the mail server that hangs
            talk.break_off()
            return dict.fromkeys(recipients, Refusal(
                f"it had not taken the mail after {format_duration(MAIL_TRY_LIMIT_S)}", False))
        with contextlib.suppress(StorageStalled):      # the mail is taken, or is not, already
            within(MAIL_GOODBYE_S, "the good-bye", talk.leave)
        return refused


class SmtpTalk:
    """One conversation with the mail server. Threads of their own hold it, so that neither a resolver that
    hangs nor a server that sends a byte a minute can make it longer."""

    def __init__(self, settings: Configuration, port: int, host: str) -> None:
        """What the settings name is read; BackupError if it can't be used."""
        self._settings = settings
        self._port = port
        self._host = host
        self._context = None               # type: Any
        self._password = ""
        self._server = None                # type: Any
        self._is_over = False
        if settings.smtp_security != "none":
            self._context = checking_context("smtp_ca_file", settings.smtp_ca_file)
        if settings.smtp_user:
            self._password = read_smtp_password(settings.smtp_password_file)

    def hand_over(self, sender: str, recipients: List[str], message: bytes) -> Dict[str, Refusal]:
        """The server has the mail, but for these recipients, and why."""
        import smtplib
        settings = self._settings
        limit_s = 2 * MAIL_TRY_LIMIT_S     # the one who waits has the shorter limit
        try:
            if settings.smtp_security == "tls":
                self._server = smtplib.SMTP_SSL(settings.smtp_server, self._port, self._host, timeout=limit_s,
                                                context=self._context)
            else:
                self._server = smtplib.SMTP(settings.smtp_server, self._port, self._host, timeout=limit_s)
            if self._is_over:
                raise smtplib.SMTPServerDisconnected("it came too late")
            if settings.smtp_security == "starttls":
                self._server.starttls(context=self._context)
            if self._password:
                self._server.login(settings.smtp_user, self._password)
            answers = self._server.sendmail(sender, recipients, message)
        except smtplib.SMTPRecipientsRefused as error:
            answers = error.recipients
        except (OSError, ValueError) as error:
            if self._server is not None:
                self._server.close()
            refusal = refusal_of(error)
            return dict.fromkeys(recipients, refusal._replace(reason=self._struck_out(refusal.reason)))
        return {address: Refusal(self._struck_out(answer_text(code, text)), code >= 500, code >= 500)
                for address, (code, text) in answers.items()}

    def _struck_out(self, text: str) -> str:
        """The text without the password, which a server may repeat as it was sent."""
        raw = self._password.encode("utf-8", "surrogateescape")
        for secret in (base64.b64encode(f"\0{self._settings.smtp_user}\0".encode("utf-8") + raw),
                       base64.b64encode(raw), raw) if raw else ():
            text = text.replace(secret.decode("utf-8", "surrogateescape"), "***")
        return text

    def leave(self) -> None:
        """The conversation is over, with a good-bye if the server listens."""
        if self._server is not None:
            with contextlib.suppress(OSError):
                self._server.quit()
            self._server.close()

    def break_off(self) -> None:
        """The conversation ends where it is, from another thread."""
        self._is_over = True
        with contextlib.suppress(OSError, AttributeError):
            self._server.sock.shutdown(socket.SHUT_RDWR)


def refusal_of(error: Exception) -> Refusal:
    """Why a mail was not sent, in words; never what we sent. Another try is useless after a no for good
    (5xx), a certificate, something the server can't do, a wrong setting."""
    import smtplib
    import ssl
    if isinstance(error, smtplib.SMTPResponseException):
        reason, is_final = answer_text(error.smtp_code, error.smtp_error), error.smtp_code >= 500
        if isinstance(error, smtplib.SMTPAuthenticationError):
            reason = f"the login was refused: {reason}; look at smtp_user and smtp_password_file"
        return Refusal(reason, is_final, is_final and isinstance(error, smtplib.SMTPDataError))
    if isinstance(error, smtplib.SMTPServerDisconnected):
        return Refusal("it closed the connection before it had taken the mail", False)
    if is_certificate_refusal(error):
        reason = getattr(error, "verify_message", "") or one_line(str(error))
        return Refusal(f"its certificate was not accepted ({reason}): smtp_ca_file must hold the CA that "
                       "signed it, and smtp_server the name that it is made out to", True)
    if isinstance(error, ssl.SSLError):
        return Refusal(f"no TLS: {one_line(error.reason or str(error))}; is smtp_security right for this "
                       "port?", False)
    if isinstance(error, UnicodeError):
        return Refusal("an address, a name or the password holds characters other than ASCII, which mail "
                       "servers do not all take", True)
    return Refusal(one_line(os_reason(error)).rstrip("."),
                   isinstance(error, (smtplib.SMTPNotSupportedError, ValueError)))


def answer_text(code: int, text: Union[bytes, str]) -> str:
    """What a mail server answered, in one line."""
    said = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
    return cut(f"{code} {one_line(' '.join(said.split()))}", 300).rstrip(".")


def read_smtp_password(path: str) -> str:
    """The password in that file: what create-password-file hid in it, or else the text itself.

    BackupError unless only its owner can read the file.
    """
    if not path:
        raise BackupError("smtp_user is set, but smtp_password_file is not: name a file with its password "
                          "there, which only its owner can read.")
    try:
        with open(fs_path(path), "rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise BackupError(f"smtp_password_file {path} can be read by others: chmod 600 it, and "
                                  "change the password.")
            raw = file.read(64 * KIBIBYTE)
    except OSError as error:
        raise BackupError(f"smtp_password_file {path} can't be read: {os_reason(error)}. Correct "
                          "the path, or its mode.")
    plain = raw.decode("utf-8", "surrogateescape").rstrip("\r\n")
    if not plain:
        raise BackupError(f"smtp_password_file {path} is empty: write the password of smtp_user into it.")
    with contextlib.suppress(ValueError):
        hidden = base64.b64decode(b"".join(raw.split()), validate=True).decode("utf-8")
        if hidden.isprintable() and hidden:
            return hidden
    return plain


# --- pings -----------------------------------------------------------------------------

PING_TRIES = 2
PING_LIMIT_S = 10


def ping(url: str) -> None:
    """The URL was asked for; BackupError with the reason if that brought no good answer in two tries, 20
    seconds in all at most. Proxies are those of the environment."""
    import http.client
    import urllib.error
    import urllib.request
    problem = ""
    for _ in range(PING_TRIES):
        try:
            within(PING_LIMIT_S, "", lambda: urllib.request.urlopen(url, timeout=PING_LIMIT_S).close())
            return
        except StorageStalled:
            problem = f"no answer within {PING_LIMIT_S} s"
        except urllib.error.HTTPError as error:        # all that it says may repeat what it was asked
            error.close()
            problem = f"HTTP status {error.code}"
        except urllib.error.URLError as error:
            problem = one_line(str(error.reason))
        except OSError as error:
            problem = os_reason(error)
        except (ValueError, http.client.HTTPException) as error:
            problem = type(error).__name__
    place = url.partition("://")[2].partition("/")[0].rpartition("@")[2]       # the rest may be a secret
    raise BackupError(f"{one_line(place)} could not be reached: {problem}. Nothing else depends on it. Is "
                      "the address right, and does a firewall let this host through?")


# =============================================================================
# 13. The pump
# =============================================================================
# Data is read once. `pump` reads each source in a thread of its own and hands every buffer to all consumers
# of that source, each in a thread of its own: digests, the check of the format, the file, a compressor. A
# consumer reads on as from a file, from top to bottom. The caller's thread only watches: it is never inside a
# read or a write, so a server that stalls or a share that hangs can always be left. What a check has seen
# wrong is a VerificationError; what storage says (ENOSPC, EIO) is translated in `pump`.
# May touch: the descriptors that it is given. May not: names on disk, programs, the pool.

SECTOR_BYTES = 512
BUFFER_BYTES = MEBIBYTE         # one system call and a few Python steps each: more gains nothing, caches lose
BUFFERS_PER_FLOW = 16           # bounds memory: with a compressor there are three flows
TICK_S = 1.0
GRACE_S = 2.0                   # how long an aborted pump waits for its threads before it leaves them
F_SETPIPE_SZ = 1031             # linux/fcntl.h; Python names it only since 3.10
TAIL_BYTES = 1024


class Progress(NamedTuple):
    """`bytes_read` from the first source; `quiet_s` since anything moved at all; `waiting_for` the source's
    name, or that of the consumer that holds everything up."""
    bytes_read: int
    quiet_s: float
    waiting_for: str


class Flow(NamedTuple):
    """One source and the consumers that each see all of it; one of them may be a further flow.

    `source`: a descriptor, which is taken over, or a function that gives pieces of any length. It is called
    with no argument (a check that reads a file is such a source), or, where the flow is itself a consumer,
    with the reader of what passes there (what decompresses, for one). `at_end` is called at the end of the
    source, before the consumers learn of it: what it raises (a program's exit status) is then the reason, not
    the truncated stream that follows from it.
    """
    source: Any
    consumers: Sequence[Any]
    name: str = "source"
    at_end: Optional[Callable[[], None]] = None


def pump(flows: Sequence[Flow], on_tick: Callable[[Progress], Any], doing: str = "a stream",
         problems: Optional[List[VerificationError]] = None) -> int:
    """Every source was read to its end and every consumer has done its work; the number of bytes of the first
    source.

    `on_tick` is called about once a second and may raise, which aborts. So does the first exception of a
    consumer, which is raised here as it is; what storage said, as the CatalogError that `doing` begins. A
    thread that is stuck in the kernel is left to itself. With `problems`, for what is wanted although it is
    damaged: what a source or a consumer finds wrong is noted there and ends its work, not the others'; that a
    source is not supported is raised all the same.
    """
    run = _PumpRun(flows, problems)
    try:
        for thread in run.threads:
            thread.start()
        while not run.is_done():
            run.news.wait(TICK_S)
            run.news.clear()
            run.raise_failure(doing)
            on_tick(run.progress())
        run.raise_failure(doing)
    finally:
        run.stop()
    return run.flows[0].bytes_read


class Reader:
    """The bytes of a stream for one consumer: what it asks for, or a VerificationError where the stream ends.
    A piece is a view into a buffer and gone when the next one is asked for: it is used at once or copied.
    `image`: what the stream is called in sentences; `position`: of the next byte; `tail`: the last KiB."""

    def __init__(self, views: Iterator[memoryview], image: str = "the image") -> None:
        self.image = image
        self.position = 0
        self.tail = b""
        self._views = views
        self._view = memoryview(b"")

    def some(self, most: int) -> memoryview:
        """The next piece, not longer than that; an empty one at the end of the stream."""
        if not len(self._view):
            self._view = next(self._views, self._view)
            self.tail = (self.tail + bytes(self._view[-TAIL_BYTES:]))[-TAIL_BYTES:]
        piece, self._view = self._view[:most], self._view[most:]
        self.position += len(piece)
        return piece

    def __iter__(self) -> Iterator[memoryview]:
        """All that is left, piece by piece."""
        piece = self.some(BUFFER_BYTES)
        while len(piece):
            yield piece
            piece = self.some(BUFFER_BYTES)

    def pieces(self, count: int, where: str) -> Iterator[memoryview]:
        while count:
            piece = self.some(count)
            if not len(piece):
                raise VerificationError(f"{self.image} ends at byte {self.position}, in "
                                        f"{where}{self._servers_words()}")
            count -= len(piece)
            yield piece

    def take(self, count: int, where: str) -> bytes:
        return joined(self.pieces(count, where))

    def zeros(self, count: int, where: str) -> None:
        """The next `count` bytes have passed, and were zeros."""
        at = self.position
        if self.take(count, where).count(0) != count:
            raise VerificationError(f"{self.image} has something else than zeros at byte {at}, in {where}")

    def end(self) -> None:
        at, piece = self.position, self.some(TAIL_BYTES)
        if len(piece):
            raise VerificationError(f"{self.image} should end at byte {at}, but goes on with "
                                    f"{excerpt(piece)}")

    def _servers_words(self) -> str:
        """What the server says where it broke off: xapi puts its HTTP error behind the data."""
        _, found, answer = self.tail.partition(b"HTTP/1.")
        body = re.sub("<[^>]*>", " ", answer.partition(b"\r\n\r\n")[2].decode("ascii", "replace"))
        return f"; the server says: {ascii(' '.join(body.split())[:200])}" if found else ""


def joined(pieces: Iterable[Any]) -> bytes:
    """The pieces in one, each copied before the next is asked for: `b"".join` would collect them all first,
    while the buffers that they are views of are filled anew."""
    whole = bytearray()
    for piece in pieces:
        whole += piece
    return bytes(whole)


def excerpt(piece: bytes) -> str:
    """The beginning of what stands there, fit for a sentence: often it is the server's own error text."""
    return ascii(bytes(piece[:60]).decode("latin-1"))


class Consumer:
    """What reads a stream, in a thread of its own. `name` is for people.

    `work` is given the reader, what is `held`, and `how`; `result` is then what it returned, and what it
    leaves of the stream unread passes by. What is held has a `close`, or is a descriptor, which is taken
    over: whoever wants to keep one gives a copy (os.dup). So no thread that is left behind on a hung share
    can ever write into a file that was opened later under the same number.
    """

    def __init__(self, name: str = "", work: Optional[Callable[..., Any]] = None, *held: Any,
                 **how: Any) -> None:
        self.name = name
        self.result: Any = None
        self._work, self._held, self._how = work, held, how

    def read(self, reader: Reader) -> None:
        """All work on the stream is done."""
        self.result = self._work(reader, *self._held, **self._how)

    def salvage(self) -> None:
        """The best is made of what came before the damage that `read` has raised, if that is put up with."""

    def close(self) -> None:
        """Nothing is held open. Called last in every case."""
        held, self._held = self._held, ()
        for one in held:
            os.close(one) if isinstance(one, int) else one.close()


@contextlib.contextmanager
def closed_aside(consumers: Sequence[Any]) -> Iterator[None]:
    """What ends the block leaves no descriptor of the consumers open; nobody waits: the store may hang."""
    try:
        yield
    except BaseException:               # whatever ended it, the pump, which closes them, will never have them
        for consumer in consumers:
            threading.Thread(target=consumer.close, daemon=True).start()
        raise


def widen_pipe(pipe_fd: int) -> None:
    """A MiB of room instead of 64 KiB: fewer switches between the programs at its ends. Best effort."""
    try:
        fcntl.fcntl(pipe_fd, F_SETPIPE_SZ, MEBIBYTE)
    except OSError:
        pass        # not a pipe, or the user's share of pipe memory is used up


class _Stopped(BaseException):
    """The pump was stopped: raised in its threads, and seen by none but them."""


class _PumpRun:
    """The state that all threads of one pump share."""

    def __init__(self, flows: Sequence[Flow], problems: Optional[List[VerificationError]]) -> None:
        self.news = threading.Event()       # a thread has ended or failed
        self.stopping = False
        self.failure: Optional[BaseException] = None
        self.problems = problems
        self.flows: List[_FlowRun] = []     # each before those that are its consumers
        self._lock = threading.Lock()
        self._moved: Tuple[int, ...] = ()
        self._moved_at = time.monotonic()
        roots = [_FlowRun(flow, self) for flow in flows]
        self.threads = [threading.Thread(target=root.read, name="read " + root.name, daemon=True)
                         for root in roots]
        self.threads += [lane.thread for flow in self.flows for lane in flow.lanes]

    def is_done(self) -> bool:
        return all(flow.has_ended and all(lane.is_done for lane in flow.lanes) for flow in self.flows)

    def do(self, step: Callable[[], Any], salvage: Optional[Callable[[], Any]] = None) -> None:
        """The step is done, or what it raised is noted: the first failure is the reason, those that follow
        from it are not told. What a source, which has no `salvage`, does not support is no damage."""
        try:
            try:
                step()
            except VerificationError as problem:
                if self.problems is None or not salvage and isinstance(problem, UnknownFormat):
                    raise
                self.problems.append(problem)
                if salvage:
                    salvage()
        except _Stopped:
            pass
        except BaseException as problem:        # whatever it is, the caller's thread must hear of it
            with self._lock:
                if self.failure is None and not self.stopping:
                    self.failure = problem
                self.stopping = True
            self.news.set()

    def raise_failure(self, doing: str) -> None:
        if self.failure is not None:
            with storage_errors(doing):
                raise self.failure

    def progress(self) -> Progress:
        now = time.monotonic()
        moved = tuple(flow.bytes_read for flow in self.flows) + tuple(
            lane.buffers_read for flow in self.flows for lane in flow.lanes)
        if moved != self._moved:
            self._moved, self._moved_at = moved, now
        return Progress(self.flows[0].bytes_read, now - self._moved_at, self._waiting_for())

    def _waiting_for(self) -> str:
        """Seen from the far end: a full store also holds up the compressor and the source before it."""
        for flow in reversed(self.flows):
            busy = [lane for lane in flow.lanes if not lane.is_done]
            if busy and (flow.is_starved or flow.has_ended):
                return min(busy, key=lambda lane: lane.buffers_read).name
        return next((flow.name for flow in self.flows if not flow.has_ended), self.flows[-1].name)

    def stop(self) -> None:
        """The threads end; those that can't within GRACE_S are daemons, and end when the kernel lets them."""
        self.stopping = True
        deadline = time.monotonic() + GRACE_S
        for flow in self.flows:
            flow.wake()
        for thread in self.threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        if not any(thread.is_alive() for thread in self.threads):
            for flow in self.flows:        # a ring of references would keep the buffers for long
                flow.drop_buffers()


class _Buffer:
    """Its memory is taken when it is first filled: most files need one of the buffers only."""
    __slots__ = ("view", "length", "readers")

    def __init__(self) -> None:
        self.view: Optional[memoryview] = None
        self.length = self.readers = 0


class _FlowRun(Consumer):
    """One flow at work: its source is read, in a thread of its own or in its lane of the flow above."""

    def __init__(self, flow: Flow, run: _PumpRun) -> None:
        super().__init__(flow.name)
        run.flows.append(self)
        self.bytes_read = 0
        self.has_ended = self.is_starved = False
        self._flow, self._run = flow, run
        self._lock = threading.Lock()
        self._free: Any = queue.Queue()
        for _ in range(BUFFERS_PER_FLOW):
            self._free.put(_Buffer())
        self.lanes = [_Lane(_FlowRun(consumer, run) if isinstance(consumer, Flow) else consumer, self, run)
                      for consumer in flow.consumers]

    def wake(self) -> None:
        self._free.put(None)
        for lane in self.lanes:
            lane.inbox.put(None)

    def drop_buffers(self) -> None:
        self._free = queue.Queue()
        self.lanes.clear()

    def release(self, buffer: _Buffer) -> None:
        with self._lock:
            buffer.readers -= 1
            is_free = not buffer.readers
        if is_free:
            self._free.put(buffer)

    def read(self, reader: Optional[Reader] = None) -> None:
        """The source was read to its end, and the lanes know it; what went wrong is the run's."""
        self._run.do(lambda: self._read_source(reader))
        for lane in self.lanes:
            lane.inbox.put(None)
        self.has_ended = True
        self._run.news.set()

    def _read_source(self, reader: Optional[Reader]) -> None:
        source = self._flow.source
        if isinstance(source, int):
            self._read_descriptor(source)
        else:
            self._read_pieces(source() if reader is None else source(reader))
        if self._flow.at_end is not None:
            self._flow.at_end()

    def _read_descriptor(self, source_fd: int) -> None:
        """A buffer is handed over when it is full, when the source pauses, and at its end."""
        try:
            widen_pipe(source_fd)
            poll = select.poll()
            poll.register(source_fd, select.POLLIN)
            count = 1
            while count:
                buffer = self._free_buffer()
                while count and buffer.length < BUFFER_BYTES:
                    if poll.poll(TICK_S * 1000):
                        count = os.readv(source_fd, [buffer.view[buffer.length:]])
                        buffer.length += count
                        self.bytes_read += count
                        forget_passed(source_fd, self.bytes_read - count, self.bytes_read)
                    elif self._run.stopping:
                        raise _Stopped
                    elif buffer.length:
                        break
                self._hand_over(buffer)
        finally:
            forget_cached(source_fd)
            with contextlib.suppress(OSError):      # what was read was read: some report old errors here
                os.close(source_fd)

    def _read_pieces(self, pieces: Iterator[Any]) -> None:
        """Copied, as pieces may be small and their memory used again. What came before damage counts."""
        buffer: Optional[_Buffer] = None
        with contextlib.closing(pieces):
            try:
                for piece in map(memoryview, pieces):
                    while len(piece):
                        buffer = buffer or self._free_buffer()
                        count = min(len(piece), BUFFER_BYTES - buffer.length)
                        buffer.view[buffer.length:buffer.length + count] = piece[:count]
                        buffer.length += count
                        self.bytes_read += count
                        piece = piece[count:]
                        if buffer.length == BUFFER_BYTES:
                            full, buffer = buffer, None
                            self._hand_over(full)
            finally:
                if buffer is not None:
                    self._hand_over(buffer)

    def _free_buffer(self) -> _Buffer:
        self.is_starved = True
        buffer = self._free.get()
        self.is_starved = False
        if self._run.stopping:
            raise _Stopped
        buffer.length = 0
        if buffer.view is None:
            buffer.view = memoryview(bytearray(BUFFER_BYTES))
        return buffer

    def _hand_over(self, buffer: _Buffer) -> None:
        if not (self.lanes and buffer.length):
            self._free.put(buffer)
            return
        buffer.readers = len(self.lanes)
        for lane in self.lanes:
            lane.inbox.put(buffer)


class _Lane:
    def __init__(self, consumer: Any, flow: _FlowRun, run: _PumpRun) -> None:
        self.name = consumer.name
        self.buffers_read = 0
        self.is_done = False
        self.inbox: Any = queue.Queue()
        self._consumer, self._flow, self._run = consumer, flow, run
        self.thread = threading.Thread(target=self._work, name=self.name, daemon=True)

    def _work(self) -> None:
        reader, consumer, run = Reader(self._views()), self._consumer, self._run
        run.do(lambda: consumer.read(reader), consumer.salvage)
        run.do(consumer.close)
        run.do(lambda: collections.deque(reader, 0))        # what the consumer left passes by
        self.is_done = True
        run.news.set()

    def _views(self) -> Iterator[memoryview]:
        """The buffers as they come, each given back when the next one is asked for."""
        while True:
            buffer = self.inbox.get()
            if self._run.stopping:
                raise _Stopped
            if buffer is None:
                return
            yield buffer.view[:buffer.length]
            self.buffers_read += 1
            self._flow.release(buffer)


# =============================================================================
# 14. Blocks and digests
# =============================================================================
# What proves that bytes are the same: the SHA-256 of a stream, the digests that an archive brings for its
# blocks, the list of blocks that is kept beside an image, and the digests of what a disk holds, MiB by MiB.
# May touch: the descriptors that it is given. May not: names on disk, programs, the pool.

# ---- XXH64: the block digest of newer archives -------------------------------------------------------------
#
# hashlib has no XXH64. A hasher here has `update(view)` and `hexdigest()`, as those of hashlib.

XXH64_VECTORS = ((b"", "ef46db3751d8e999"), (bytes(range(101)), "e99038495f85381e"))


class CtypesXxh64:
    """XXH64 by the host's libxxhash. Unlike the xxhash module, ctypes lets other threads run meanwhile."""

    functions: Any = None       # (create, reset, update, digest, free), by `load`

    @classmethod
    def load(cls) -> Callable[[], Any]:
        """The class, ready; ImportError, OSError or AttributeError where there is no such library."""
        import ctypes           # some minimal builds of Python lack it
        library = ctypes.CDLL("libxxhash.so.0")     # find_library would start a compiler and ldconfig
        state, size = ctypes.c_void_p, ctypes.c_size_t
        signatures = (("createState", state, ()), ("reset", ctypes.c_int, (state, ctypes.c_uint64)),
                      ("update", ctypes.c_int, (state, state, size)), ("digest", ctypes.c_uint64, (state,)),
                      ("freeState", ctypes.c_int, (state,)))
        functions = []
        for name, result, arguments in signatures:
            function = getattr(library, "XXH64_" + name)
            function.restype, function.argtypes = result, arguments
            functions.append(function)
        cls.functions, cls.byref, cls.byte = functions, ctypes.byref, ctypes.c_char
        return cls

    def __init__(self) -> None:
        create, reset = self.functions[:2]
        self._state = create()
        if not self._state:
            raise MemoryError("libxxhash has no memory for its state")
        reset(self._state, 0)

    def update(self, view: memoryview) -> None:
        if not len(view):
            return
        if isinstance(view, memoryview) and not view.readonly:
            self.functions[2](self._state, self.byref(self.byte.from_buffer(view)), len(view))
        else:
            self.functions[2](self._state, bytes(view), len(view))

    def hexdigest(self) -> str:
        return f"{self.functions[3](self._state):016x}"

    def __del__(self) -> None:
        if getattr(self, "_state", None):
            self.functions[4](self._state)


def module_xxh64() -> Callable[[], Any]:
    """XXH64 by the xxhash module from the package index; ImportError where there is none."""
    import xxhash
    return xxhash.xxh64


@functools.lru_cache(maxsize=None)
def block_hasher() -> Optional[Callable[[], Any]]:
    """The fastest XXH64 that works here, tried once against known digests; None if there is none."""
    for load in (CtypesXxh64.load, module_xxh64):
        try:
            hasher = load()
            if all(_digest_in_two(hasher, message) == digest for message, digest in XXH64_VECTORS):
                return hasher
        except (ImportError, OSError, AttributeError, TypeError):
            continue
    return None


def _digest_in_two(new_hasher: Callable[[], Any], message: bytes) -> str:
    hasher = new_hasher()
    view = memoryview(bytearray(message))
    hasher.update(view[:37])
    hasher.update(view[37:])
    return hasher.hexdigest()


class Digest(Consumer):
    """The SHA-256 and the length of all that passes."""

    def __init__(self, name: str = "SHA-256") -> None:
        super().__init__(name)
        self.total_bytes = 0
        self._sha256 = hashlib.sha256()
        self.hexdigest = self._sha256.hexdigest

    def read(self, reader: Reader) -> None:
        for view in reader:
            self._sha256.update(view)
        self.total_bytes = reader.position


# ---- The file `blocks`: what an image alone can't show -----------------------------------------------------
#
# Blocks of zeros are left out of an XVA, so one that was lost in the middle of a disk leaves no trace in the
# archive. The blocks are therefore listed at the export, a line each: disk, number, digest. Lines that begin
# with # tell people what the numbers mean. Of an XVA they are the archive's own; of other images a number is
# the MiB of the stream, and the digest its CRC-32: every Python has that one, and it costs next to nothing (4
# GB/s).

XVA_BLOCKS_HEADING = b"# disk as named in the archive, block number, the archive's own digest of it\n"
STREAM_BLOCKS_HEADING = b"# image, MiB of the uncompressed image counted from 0, CRC-32 of that MiB\n"
BLOCK_LINE = re.compile(rb"(?P<disk>[!-~]{1,100}) (?P<number>[0-9]{1,15}) (?P<digest>[0-9a-fA-F]{8,40})\n")
LONGEST_LINE_BYTES = 512


class BlocksFile:
    """Writes the lines into a file whose descriptor is taken over; digested, its length known.

    The buffer is ours: a file object of Python's would write it when it is thrown away, on whatever thread
    that happens.
    """

    def __init__(self, fd: int) -> None:
        self._fd: Optional[int] = fd
        self._closing = threading.Lock()        # who gave the file up may close it beside who wrote it
        self._buffer = bytearray()
        self._sha256 = hashlib.sha256()
        self.hexdigest = self._sha256.hexdigest
        self.size = 0

    def line(self, line: bytes) -> None:
        self._buffer += line
        if len(self._buffer) >= 256 * KIBIBYTE:
            self._write()

    def end(self) -> None:
        """All is on disk. Called in the thread of the check, as a store can hang here."""
        self._write()
        os.fsync(self._fd)

    @property
    def position(self) -> int:
        """Where the next line will stand."""
        return self.size + len(self._buffer)

    def _write(self) -> None:
        write_all(self._fd, self._buffer)
        self._sha256.update(self._buffer)
        self.size += len(self._buffer)
        self._buffer.clear()

    def close(self) -> None:
        with self._closing:
            fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


class BlockComparer:
    """Holds an image's lines against those recorded at its export, in step; the file is taken over."""

    def __init__(self, recorded: io.BufferedIOBase) -> None:
        self._recorded = recorded
        self.close = recorded.close

    def line(self, found: bytes) -> None:
        recorded = self._recorded.readline(LONGEST_LINE_BYTES)
        if recorded != found:
            raise VerificationError(_difference(recorded, found))

    def end(self) -> None:
        self.line(b"")


def _difference(recorded: bytes, found: bytes) -> str:
    there, here = BLOCK_LINE.fullmatch(recorded), BLOCK_LINE.fullmatch(found)
    if recorded and not there:
        return f"the list of recorded blocks has a line that is none: {excerpt(recorded)}"
    before, now = [f"block {int(match.group('number'))} of disk {match.group('disk').decode()}" if match else
                   f"the line {excerpt(line)}" if line else "no further block"
                   for match, line in ((there, recorded), (here, found))]
    if not there:
        return f"{now} is in the image, but not among the blocks recorded at its export"
    if before == now:
        return (f"{now} has the digest {here.group('digest').decode()}, {there.group('digest').decode()} was "
                "recorded at the export")
    return f"{before} was recorded at the export, the image has {now} in its place"


def listed(reader: Reader, blocks: Any) -> Reader:
    """All that the reader gives, each MiB of it with a line in the list of blocks, if there is one."""
    def views() -> Iterator[memoryview]:
        blocks.line(STREAM_BLOCKS_HEADING)
        number = filled = crc = 0
        for view in reader:
            at = 0
            while at < len(view):
                piece = view[at:at + MEBIBYTE - filled]
                crc, filled, at = zlib.crc32(piece, crc), filled + len(piece), at + len(piece)
                if filled == MEBIBYTE:
                    blocks.line(b"image %d %08x\n" % (number, crc))
                    number, filled, crc = number + 1, 0, 0
            yield view
        if filled:
            blocks.line(b"image %d %08x\n" % (number, crc))
    return Reader(views()) if blocks else reader


# ---- Rows: the same file where increments can build on the copy --------------------------------------------
#
# Then `blocks` has a row for each MiB of each disk that is not all zeros, whatever the image's format, and
# for each that is, but has data in an earlier copy of the chain. So it is the whole state of every disk, and
# the copies that it names are those that have to be laid over each other. The rows of a disk stand together,
# in order; the manifest tells where they begin and end.

ROWS_HEADING = (b"# disk, MiB of the disk counted from 0, BLAKE2b-128 of it or `zero`, the copy that holds "
                b"it if not this one\n")
ROW = re.compile(rb"(?P<disk>[!-~]{1,400}) (?P<number>0|[1-9][0-9]{0,14}) (?P<digest>[0-9a-f]{32}|zero)"
                 rb"(?: (?P<holder>backup-[0-9-]{17}))?")
ROWS_PIECE_BYTES = 256 * KIBIBYTE
ZERO = "zero"


class Row(NamedTuple):
    """The state of a MiB of a disk: its digest, or ZERO; and the copy that holds it, "" for the one whose
    row it is."""
    number: int
    digest: str
    holder: str

    def line(self, disk: str) -> bytes:
        """It as a line of `blocks`."""
        return f"{disk} {self.number} {self.digest}{self.holder and ' ' + self.holder}\n".encode("ascii")


def block_digest(content: Any) -> str:
    """The BLAKE2b-128 of a MiB of a disk, which is shorter at the disk's end."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def rows_of(file: io.BufferedIOBase, disk: str, begin: int, end: int) -> Iterator[Row]:
    """The rows of that disk, which stand between these bytes of the file, which is taken over;
    VerificationError for anything else."""
    def problem(line: bytes) -> VerificationError:
        return VerificationError(f"its list of blocks has {excerpt(line)} among those of disk {disk}")

    with file:
        left, last, rest, name = end - begin, -1, b"", disk.encode("ascii", "replace")
        with storage_errors("reading a list of blocks"):
            file.seek(max(0, begin))
        while left > 0:
            with storage_errors("reading a list of blocks"):
                piece = file.read(min(left, ROWS_PIECE_BYTES))
            left -= len(piece)
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                match = ROW.fullmatch(line)
                if match is None or match.group(1) != name or int(match.group(2)) <= last:
                    raise problem(line)
                last = int(match.group(2))
                yield Row(last, match.group(3).decode(), (match.group(4) or b"").decode())
            if not piece or len(rest) > LONGEST_LINE_BYTES or rest and not left:
                raise problem(rest)


def first_that_differs(one: Iterable[Row], other: Iterable[Row]) -> Optional[int]:
    """The first MiB that two lists of rows tell otherwise, None if there is none. What a list lacks is
    zeros."""
    merged = heapq.merge(*(((row.number, row.digest) for row in rows) for rows in (one, other)))
    for number, pairs in itertools.groupby(merged, key=lambda pair: pair[0]):
        digest, *others = [digest for _, digest in pairs]
        if digest != (others or [ZERO])[0]:
            return number
    return None


# ---- Sinks: what is done with the contents of disks --------------------------------------------------------

ZERO_MEBIBYTE = bytes(MEBIBYTE)


class MebibyteSink:
    """Is shown the contents of disks by a check, puts them together to MiBs, and gives each that is not all
    zeros to `take`, in order: disk, number, content, which is gone with the call.

    What was left out of an image is zeros and is not shown. With `wanted` it takes of that disk only;
    `taken_bytes` were given.
    """

    def __init__(self, take: Callable[[str, int, memoryview], Any], wanted: str = "") -> None:
        self.taken_bytes = 0
        self._take, self._wanted = take, wanted
        self._chunk = bytearray(MEBIBYTE)
        self._disk, self._number = "", 0

    def put(self, disk: str, offset: int, view: memoryview) -> None:
        """That part of the disk is taken; the view is gone with the call."""
        if self._wanted and disk != self._wanted:
            return
        while len(view):
            number, begin = divmod(offset, MEBIBYTE)
            if (disk, number) != (self._disk, self._number):
                self._flush()
                self._disk, self._number = disk, number
            piece = view[:MEBIBYTE - begin]
            self._chunk[begin:begin + len(piece)] = piece
            offset += len(piece)
            view = view[len(piece):]

    def _flush(self) -> None:
        if self._chunk != ZERO_MEBIBYTE:
            self._take(self._disk, self._number, memoryview(self._chunk))
            self.taken_bytes += MEBIBYTE
            self._chunk[:] = ZERO_MEBIBYTE

    def end(self, is_whole: bool) -> None:
        """All that was shown is taken: all there is, or what came before damage that is put up with."""
        self._flush()

    def close(self) -> None:
        """Nothing is held open. Called last in every case."""


def note_digest(disks: Dict[str, array], disk: str, number: int, content: memoryview) -> None:
    """64 bits of the SHA-1 of that MiB are among the disk's: enough to see damage, and 8 MiB for a disk of a
    TiB."""
    digests = disks.setdefault(disk, array("Q"))
    if number >= len(digests):
        digests.extend(array("Q", bytes(8 * (number + 1 - len(digests)))))
    digests[number] = int.from_bytes(hashlib.sha1(content).digest()[:8], "big")


def write_in_place(file: NewFile, _: str, number: int, content: memoryview) -> None:
    """That MiB of a disk is in the file; those of zeros, which never come here, take no room in it."""
    with storage_errors(f"writing {file.shown}", is_elsewhere=True):
        os.lseek(file.fd, number * MEBIBYTE, os.SEEK_SET)
        write_all(file.fd, content)


# =============================================================================
# 15. Image formats
# =============================================================================
# XVA, VHD, raw and ova.xml, read and written beside each other. A check reads a format from top to bottom as
# it passes, and refuses what is not as it should be in one sentence.
# May touch: the descriptors that it is given. May not: names on disk, programs, the pool.

# ---- ova.xml -----------------------------------------------------------------------------------------------

OVA_LIMIT_BYTES = 64 * MEBIBYTE     # real ones: 30 KB for a plain VM, some MB with hundreds of snapshots
DISK_ID = re.compile(r"[A-Za-z0-9:_.-]{1,80}")
DEEPEST_OVA = 50


class DiskReport(NamedTuple):
    """A disk as ova.xml tells of it, and what was found of it in its image: `id` is its name inside the
    archive, `blocks` counts those present, `stored_bytes` their length."""
    id: str
    uuid: str
    virtual_size: int
    blocks: int = 0
    stored_bytes: int = 0


class OvaDate(str):
    """A time as it stands in ova.xml: text, but with a tag of its own."""


def parse_ova(text: bytes) -> Dict[str, Any]:
    """ova.xml as dicts, lists, str, bool and float, with `version` and `objects`, or VerificationError. Times
    and whole numbers stay text, since xapi writes numbers untagged (importexport.ml). A DOCTYPE is refused:
    it is the only way to entities, and thereby to a small file that fills the memory."""
    import xml.parsers.expat
    import xmlrpc.client

    def start(tag: str, attributes: Any) -> None:
        reader.start(tag, attributes)
        if len(reader._marks) > DEEPEST_OVA:
            raise ValueError("it is nested too deeply")

    def refuse_doctype(*_: Any) -> None:
        raise VerificationError("ova.xml has a DOCTYPE, which xapi never writes")

    reader = xmlrpc.client.Unmarshaller()
    numbers = dict.fromkeys("int i1 i2 i4 i8 biginteger bigdecimal base64 nil".split(),
                            lambda reader, text: reader.end_string(text.strip()))
    reader.dispatch = dict(reader.dispatch, **numbers, **{
        "dateTime.iso8601": lambda reader, text: reader.end_string(OvaDate(text))})
    reader.xml(None, None)              # text comes decoded
    parser = xml.parsers.expat.ParserCreate("UTF-8")
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = refuse_doctype
    parser.StartElementHandler, parser.EndElementHandler = start, reader.end
    parser.CharacterDataHandler = reader.data
    try:
        parser.Parse(text, True)
        reader.end("params")            # what xmlrpc.client takes for the end of an answer
        ova, = reader.close()
    except (xml.parsers.expat.ExpatError, xmlrpc.client.Error, ValueError, TypeError, LookupError,
            AttributeError) as problem:
        if re.match(br"\s*(<\?xml[^>]*>\s*)?<appliance\b", text):
            raise UnknownFormat("it is an XVA of version 1, as XenServer before 4.1 and its P2V tool wrote "
                                "it, which is not supported") from None
        raise VerificationError(f"ova.xml can't be parsed: {ascii(str(problem))}") from None
    if not (isinstance(ova, dict) and isinstance(ova.get("version"), dict)
            and isinstance(ova.get("objects"), list)):
        raise VerificationError("ova.xml has no version and objects")
    return ova


def ova_text(ova: Dict[str, Any]) -> bytes:
    """What parse_ova read, as xapi writes it: numbers and strings without a tag (ocaml-rpc xmlrpc.ml)."""
    return _value_text(ova).encode("utf-8")


def _value_text(value: Any) -> str:
    if isinstance(value, dict):
        members = (f"<member><name>{_escaped(key)}</name>{_value_text(item)}</member>"
                   for key, item in value.items())
        text = f"<struct>{''.join(members)}</struct>"
    elif isinstance(value, (list, tuple)):
        text = f"<array><data>{''.join(map(_value_text, value))}</data></array>"
    elif isinstance(value, bool):
        text = f"<boolean>{value:d}</boolean>"
    elif isinstance(value, float):
        text = f"<double>{value:.16g}</double>"
    elif isinstance(value, OvaDate):
        text = f"<dateTime.iso8601>{_escaped(value)}</dateTime.iso8601>"
    else:
        text = _escaped(str(value))
    return f"<value>{text}</value>"


def _escaped(text: str) -> str:
    """Text between tags; a carriage return by its number, as a parser would make it a newline."""
    for letter, name in ("&", "amp"), ("<", "lt"), (">", "gt"), ('"', "quot"), ("\r", "#13"):
        text = text.replace(letter, f"&{name};")
    return text


# The fields that are used here, if they are there, by what they hold: text, a flag, a map or a list of texts.
OVA_FIELDS = {
    "VM": {str: "uuid name_label power_state suspend_VDI snapshot_metadata " +
           "memory_static_max memory_dynamic_max VCPUs_max VCPUs_at_startup", bool: "is_a_snapshot",
           dict: "other_config blocked_operations"},
    "VBD": {str: "VM VDI type userdevice device mode qos_algorithm_type", bool: "bootable empty unpluggable",
            dict: "other_config qos_algorithm_params"},
    "VDI": {str: "SR uuid virtual_size name_label", dict: "other_config"},
    "SR": {str: "uuid name_label content_type"},
    "VIF": {str: "VM network device MAC MTU qos_algorithm_type locking_mode ipv4_configuration_mode " +
            "ipv6_configuration_mode ipv4_gateway ipv6_gateway",
            list: "ipv4_allowed ipv6_allowed ipv4_addresses ipv6_addresses",
            dict: "other_config qos_algorithm_params"},
    "network": {str: "uuid name_label"}}      # type: Dict[str, Dict[type, str]]


def ova_objects(ova: Dict[str, Any], class_name: str) -> Dict[str, Dict[str, Any]]:
    """The records of one class by their id, in the file's order; what is used of them is of its kind."""
    records = {}
    fields = [(field, kind) for kind, names in OVA_FIELDS.get(class_name, {}).items()
              for field in names.split()]
    for entry in ova["objects"]:
        try:
            name, key, record = entry["class"], entry["id"], entry["snapshot"]
        except (TypeError, LookupError):
            raise VerificationError("ova.xml has an object without class, id or snapshot") from None
        if not (isinstance(name, str) and isinstance(key, str) and isinstance(record, dict)):
            raise VerificationError("ova.xml has an object whose class, id or snapshot is of the wrong type")
        if name != class_name:
            continue
        for field, kind in fields:
            found = record.get(field, kind())
            inside = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
            if type(found) is not kind or any(type(item) is not str for item in inside):
                raise UnknownFormat(f"ova.xml has a {field} of {name} {ascii(key)} that is not of the kind "
                                    "that it should be")
        records[key] = record
    return records


def needed(class_name: str, key: str, record: Dict[str, Any], field: str) -> Any:
    """That field of a record in ova.xml; UnknownFormat if it is not there."""
    if field not in record:
        raise UnknownFormat(f"ova.xml lacks {field} of {class_name} {ascii(key)}")
    return record[field]


def exported_disks(ova: Dict[str, Any]) -> Dict[str, DiskReport]:
    """The disks whose blocks the archive holds, by id: those of VBDs that are no CD drives, unless on an SR
    of ISO images, and the memory of a suspended VM (export.ml@v26.17.0). A VBD may point to a VDI that is not
    in the file: then there is nothing to hold."""
    vdis, srs = ova_objects(ova, "VDI"), ova_objects(ova, "SR")
    wanted = [needed("VBD", key, vbd, "VDI") for key, vbd in ova_objects(ova, "VBD").items()
              if vbd.get("type") != "CD"]
    wanted += [vm.get("suspend_VDI", "") for vm in ova_objects(ova, "VM").values()
               if vm.get("power_state") == "Suspended"]
    found = {}
    for disk_id in wanted:
        vdi = vdis.get(disk_id)
        if vdi is None or srs.get(vdi.get("SR", ""), {}).get("content_type") == "iso":
            continue
        size = needed("VDI", disk_id, vdi, "virtual_size")
        if not DISK_ID.fullmatch(disk_id):
            raise VerificationError(f"ova.xml names a disk {excerpt(disk_id.encode('utf-8', 'replace'))}")
        if not re.fullmatch("[0-9]{1,18}", size):
            raise UnknownFormat(f"ova.xml gives disk {disk_id} the virtual_size {ascii(size[:40])}")
        found[disk_id] = DiskReport(disk_id, vdi.get("uuid", ""), int(size))
    return found


# What the server's importer looks for (ocaml/xapi/import.ml@v26.17.0) and other programs leave out.
IMPORT_DEFAULTS = {
    "VM": {"uuid": "", "name_description": "", "user_version": "1", "affinity": NULL_REF,
           "guest_metrics": NULL_REF, "version": "0", "actions_after_shutdown": "destroy",
           "actions_after_reboot": "restart", "actions_after_crash": "restart"},
    "VBD": {"VDI": NULL_REF, "type": "Disk", "bootable": False, "mode": "RW", "unpluggable": True,
            "empty": False, "device": "", "qos_algorithm_type": "", "qos_algorithm_params": {}},
    "VDI": {"uuid": "", "SR": NULL_REF, "name_label": "", "name_description": "", "type": "user",
            "sharable": False, "read_only": False, "xenstore_data": {}, "sm_config": {}, "tags": [],
            "location": ""},
    "SR": {"uuid": "", "name_label": "", "content_type": "user"}}     # type: Dict[str, Dict[str, Any]]


def own_other_config(record: Dict[str, Any]) -> Dict[str, str]:
    """The record's other_config without what backups and imports put there."""
    return {key: value for key, value in record.get("other_config", {}).items()
            if not key.startswith(KEY_PREFIX) and key != "import_task"}


def new_uuid() -> str:
    """A random uuid (RFC 4122, version 4)."""
    token = random_hex(16)
    return "-".join((token[:8], token[8:12], "4" + token[13:16], "a" + token[17:20], token[20:]))


def snapshot_ova(ova_xml: bytes, machine: VirtualMachine, snapshot: VirtualMachine) -> bytes:
    """The ova.xml of the archive of that snapshot, from the VM's own of just before: of a snapshot alone the
    server exports none (tried on a real server). VerificationError if it does not tell of all disks."""
    ova = parse_ova(ova_xml)
    by_drive = {(disk.vdi_uuid, new.userdevice): new for disk in machine.disks for new in snapshot.disks
                if new.snapshot_of == disk.vdi_ref}
    vdis, ids = ova_objects(ova, "VDI"), {entry["id"] for entry in ova["objects"]}
    disks, dropped = {}, set()             # type: Dict[str, Disk], Set[str]
    for key, vbd in ova_objects(ova, "VBD").items():
        disk_id = vbd.get("VDI")
        if vbd.get("type") == "CD" or disk_id not in vdis:
            continue
        new = by_drive.get((vdis[disk_id].get("uuid"), vbd.get("userdevice")))
        if new is None:                    # left out, or detached meanwhile
            dropped |= {key, disk_id}
            continue
        if disk_id in disks:               # of a disk with two drives the snapshot has two
            vbd["VDI"] = next(name for name in map("Ref:{}".format, itertools.count()) if name not in ids)
            ids.add(vbd["VDI"])
            ova["objects"].append({"class": "VDI", "id": vbd["VDI"], "snapshot": dict(vdis[disk_id])})
        disks[vbd["VDI"]] = new
    dropped -= set(disks)
    if len(disks) != len(snapshot.disks):
        raise VerificationError(f"the metadata of {machine.title} do not tell of all disks of its snapshot")
    for entry in ova["objects"]:
        record = entry["snapshot"]
        if entry["class"] == "VM" and record.get("uuid") == machine.uuid:
            dropped.add(record.get("suspend_VDI", ""))         # no copy holds memory
            record.update(uuid=snapshot.uuid, name_label=snapshot.name, power_state="Halted",
                          is_a_template=False, suspend_VDI=NULL_REF,
                          VBDs=[key for key in record.get("VBDs", ()) if key not in dropped])
        elif entry["id"] in disks:
            new = disks[entry["id"]]
            record.update(uuid=new.vdi_uuid, virtual_size=str(new.virtual_size), is_a_snapshot=True,
                          snapshot_of=NULL_REF)
        elif "currently_attached" in record:       # a drive or an interface, perhaps of a running VM
            record["currently_attached"] = False
    return ova_text({"version": ova["version"],
                     "objects": [entry for entry in ova["objects"] if entry["id"] not in dropped]})


def rewritten_ova(ova: Dict[str, Any], vm_id: str, machine: Dict[str, Any], sizes: Dict[str, int],
                  is_main: bool) -> bytes:
    """The ova.xml of an import of one VM of it, whose record is `machine`, with the disks that have a size in
    `sizes`, and with neither VIF nor network: then an import creates none (tried on a real server). Without
    `is_main` it only carries those disks: nothing else of the VM, nor its CD drives, is in it."""
    vdis = ova_objects(ova, "VDI")
    # With preserve=true an import re-uses an object that has the uuid: so none is to have it. The key `owner`
    # lets `xe vm-uninstall` remove a disk with its VM; a snapshot's drives have it, the original's may not.
    vbds = {key: dict(dict(IMPORT_DEFAULTS["VBD"], **vbd), uuid=new_uuid(), currently_attached=False,
                      other_config=dict({} if vbd.get("type") == "CD" else {"owner": ""},
                                        **own_other_config(vbd)))
            for key, vbd in ova_objects(ova, "VBD").items() if vbd.get("VM") == vm_id
            and (vbd.get("VDI") in sizes if vbd.get("type") != "CD" else is_main)}
    kept = set(sizes) | {vbd["VDI"] for vbd in vbds.values()}
    records = {
        "VM": {vm_id: dict(machine, VBDs=list(vbds))}, "VBD": vbds, "VIF": {}, "network": {},
        "VDI": {key: dict(dict(IMPORT_DEFAULTS["VDI"], **vdi), other_config=own_other_config(vdi),
                          is_a_snapshot=False, snapshot_of=NULL_REF, snapshots=[],
                          VBDs=[ref for ref, vbd in vbds.items() if vbd["VDI"] == key],
                          virtual_size=str(sizes.get(key, vdi["virtual_size"])))
                for key, vdi in vdis.items() if key in kept}}
    objects = []
    for entry in ova["objects"]:
        kind, key = entry["class"], entry["id"]
        if kind in records:
            if key in records[kind]:
                objects.append(dict(entry, snapshot=records[kind][key]))
        elif is_main or kind in ("SR", "host"):
            objects.append(dict(entry, snapshot=dict(IMPORT_DEFAULTS.get(kind, {}), **entry["snapshot"])))
    text = ova_text({"version": ova["version"], "objects": objects})
    if parse_ova(text)["objects"] != objects or set(exported_disks(parse_ova(text))) != set(sizes):
        raise VerificationError(f"the rewritten ova.xml of {machine['name_label']} does not say what it "
                                "should; nothing was created")
    return text


# ---- Checks: a format read as it passes --------------------------------------------------------------------


class StreamReport(NamedTuple):
    """What a check has found, once the stream has ended well. `digest_kind`: "sha1", "xxh64" or "" where the
    format has no block digests. `digests_checked`: false if one was not held against its block. `ova_xml` is
    empty but for an XVA."""
    disks: Tuple[DiskReport, ...]
    digest_kind: str = ""
    digests_checked: bool = True
    ova_xml: bytes = b""


# What a check gives: the disk, where in it, and a view of what is there; and what it returns.
Contents = Generator[Tuple[str, int, Any], None, StreamReport]


class Check(Consumer):
    """A consumer that reads a format; `report` stands when all of it was as it should be.

    `check` is the function for the format, from top to bottom: it is given this Check, the reader and `how`,
    gives the contents of the disks piece by piece, which the sinks are shown, and returns the report. It puts
    its lines into `blocks` (BlocksFile, BlockComparer), and notes here what passes before: `ova` and
    `first_disk`, whose block is the first, or the `size` of a disk and the block `table` of a difference.
    """

    def __init__(self, check: Callable[..., Contents], blocks: Any = None, sinks: Sequence[Any] = (),
                 **how: Any) -> None:
        super().__init__("check", check, *([blocks] if blocks else []), *sinks, **how)
        self.report: Optional[StreamReport] = None
        self.blocks = blocks
        self.ova: Dict[str, Any] = {}
        self.size = 0
        self.table: Optional[array] = None
        self.first_disk = ""
        self._sinks = sinks

    def read(self, reader: Reader) -> None:
        collections.deque(self._pieces(reader), 0)

    def read_file(self, fd: int) -> Iterator[Any]:
        """The source of a flow that is this check of a file, whose parts may lie anywhere. It owns `fd`."""
        try:
            yield from self._pieces(fd)
        except VerificationError:
            if not self._how["is_whole"]:
                self.salvage()
            raise
        finally:
            forget_cached(fd)
            with contextlib.suppress(OSError):      # as of every source
                os.close(fd)
            self.close()

    def _pieces(self, image: Any) -> Iterator[Any]:
        """All that the disks hold, once the sinks have seen it."""
        def contents() -> Iterator[Tuple[str, int, Any]]:
            report = yield from self._work(self, image, **self._how)
            if self.blocks:
                self.blocks.end()
            self.report = report

        for disk, offset, piece in contents():
            for sink in self._sinks:
                sink.put(disk, offset, piece)
            yield piece
        for sink in self._sinks:
            sink.end(True)

    def salvage(self) -> None:
        for sink in self._sinks:
            sink.end(False)


# ---- XVA: a tar archive ------------------------------------------------------------------------------------


class Member(NamedTuple):
    """A file of a tar archive; `at` is the offset of its header, `kind` its type flag."""
    name: str
    size: int
    at: int
    kind: bytes = b"0"


XVA_END = bytes(2 * SECTOR_BYTES)
TAR_NUMBER = re.compile(rb"[ ]*([0-7]+)[ \0]*")
REGULAR_FILE = (b"\0", b"0")
PASSED_OVER = (b"5", b"g", b"K", b"V")      # directories; what is said of all files, of links, of the archive
SAID_BEFORE = (b"x", b"L")                      # what is said of the next file: POSIX, GNU
LONGEST_SAID_BYTES = 64 * 1024
BLOCK_NAME = re.compile(r"(?P<disk>[^/]+)/(?P<number>[0-9]{8,18})", re.ASCII)
BLOCK_FILE = re.compile(r"(?P<disk>[^/]+)/(?P<number>[0-9]{1,20})(?P<suffix>\.checksum|\.xxhash)?", re.ASCII)
DIGEST_KINDS = {".checksum": ("sha1", re.compile(rb"[0-9a-f]{40}"), 40),
                ".xxhash": ("xxh64", re.compile(rb"[0-9A-F]{16}"), 16)}


def parse_tar_header(header: bytes, at: int, strict: bool = True) -> Member:
    """The member that a 512-byte header announces; `strict`: it must be a plain file with a short name. xapi
    writes V7 headers (ocaml-tar's default level); for such files the ustar ones of others read the same."""
    checksum = TAR_NUMBER.fullmatch(header[148:156])
    if not checksum:
        raise VerificationError(f"the archive has {excerpt(header)} at byte {at}, which is no tar header")
    stored = int(checksum.group(1), 8)
    computed = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if stored != computed:
        raise VerificationError(f"the archive has no sound tar header at byte {at}: its checksum is "
                                f"{computed:o}, not {stored:o}")
    name, kind = header[:100].rstrip(b"\0").decode("ascii", "backslashreplace"), header[156:157]
    has_prefix = header.startswith(b"ustar" if strict else b"ustar\0", 257)
    prefix = header[345:500].rstrip(b"\0") if has_prefix else b""
    if strict and (kind not in REGULAR_FILE or prefix):
        raise VerificationError(f"the archive has {ascii(name)} at byte {at}, which is not a plain file")
    if prefix:
        name = f"{prefix.decode('ascii', 'backslashreplace')}/{name}"
    size = TAR_NUMBER.fullmatch(header[124:136])
    if size:
        return Member(name, int(size.group(1), 8), at, kind)
    if not strict and header[124] == 0x80:          # a number in binary, as GNU tar writes large ones
        return Member(name, int.from_bytes(header[125:136], "big"), at, kind)
    raise VerificationError(f"the archive has a file {ascii(name)} of no readable size at byte {at}")


def tar_header(name: str, size: int) -> bytes:
    """A header as xapi writes it: V7, no magic, type NUL, mode 0400 (ocaml-tar's default level)."""
    header = bytearray(SECTOR_BYTES)
    encoded = name.encode("ascii")
    header[:len(encoded)] = encoded
    header[100:148] = b"0000400\0" b"0000000\0" b"0000000\0" + b"%011o\0%011o\0" % (size, 0)
    header[148:156] = b" " * 8
    header[148:156] = b"%07o\0" % sum(header)
    return bytes(header)


def tar_member(name: str, content: Any) -> bytes:
    """A whole member: header, content, padding."""
    return tar_header(name, len(content)) + bytes(content) + bytes(-len(content) % SECTOR_BYTES)


def pax_records(text: bytes) -> Dict[str, str]:
    """What a pax header says: `LENGTH KEY=VALUE` lines (POSIX.1-2001, pax)."""
    said = {}
    try:
        while text:
            digits = text.partition(b" ")[0]
            record, text = text[len(digits) + 1:int(digits)], text[int(digits):]
            key, _, value = record.decode("utf-8", "backslashreplace").rstrip("\n").partition("=")
            said[key] = value
            if not record:
                raise ValueError
    except ValueError:
        raise VerificationError("the archive has a pax header that is none")
    return said


class Archive:
    """Reads the members of an XVA one after the other.

    `strict`: as an export of ours passes, to the exact end. Otherwise also as other programs wrote it, or tar
    packed it anew: with other headers, directories, files that no import has a use for, numbers of 20 digits,
    and padding behind the end or no end at all (the server's importer looks at none of it:
    ocaml/xapi/stream_vdi.ml@v26.17.0). Names are then given as the server writes them. `has_no_end`: the
    stream ended without the two zero blocks.
    """

    def __init__(self, reader: Reader, strict: bool) -> None:
        reader.image = "the archive"
        self.reader = reader
        self.has_no_end = False
        self._strict = strict

    def ova(self) -> bytes:
        member = self.next_member("the header of ova.xml")
        if member is None or member.name != "ova.xml":
            found = "its end" if member is None else ascii(member.name)
            if member is None or self._strict:
                raise VerificationError(f"the archive begins with {found}, not with ova.xml")
            raise UnknownFormat(f"the archive begins with {found}, not with ova.xml: pack it again with that "
                                "one first (tar -cf NEW.xva ova.xml Ref*)")
        if member.size > OVA_LIMIT_BYTES:
            raise VerificationError(f"the archive's ova.xml has {member.size} bytes, more than any real one")
        return joined(self.body(member))

    def next_member(self, where: str) -> Optional[Member]:
        """The next member, or None at the end of the archive: two zero blocks."""
        said: Dict[str, str] = {}
        while True:
            at, header = self.reader.position, b""
            if not self._strict:
                header = bytes(self.reader.some(SECTOR_BYTES))
                if not header:
                    self.has_no_end = True
                    return None
            header += self.reader.take(SECTOR_BYTES - len(header), where)
            if not any(header):
                if self._strict:
                    self.reader.zeros(SECTOR_BYTES, "the two zero blocks at its end")
                return None
            member = parse_tar_header(header, at, self._strict)
            if self._strict:
                return member
            if member.kind in SAID_BEFORE and member.size <= LONGEST_SAID_BYTES:
                text = self.reader.take(member.size, "what stands before a file")
                self.reader.zeros(-member.size % SECTOR_BYTES, "the padding of that")
                said.update(pax_records(text) if member.kind == b"x" else
                            {"path": text.rstrip(b"\0").decode("ascii", "replace")})
                continue
            is_sparse = any(key.startswith("GNU.sparse") for key in said)
            if is_sparse or member.kind not in REGULAR_FILE + PASSED_OVER:
                raise UnknownFormat(f"the archive has {ascii(member.name)} at byte {at}, which is not stored "
                                    "as a plain file")
            member = self._plain(member, said)
            is_wanted = member.name == "ova.xml" or BLOCK_FILE.fullmatch(member.name)
            if is_wanted and member.kind in REGULAR_FILE:
                return member
            collections.deque(self.body(member), 0)
            said = {}

    @staticmethod
    def _plain(member: Member, said: Dict[str, str]) -> Member:
        """The member with what was said of it before, and its name as the server would write it."""
        name = re.sub(r"\A(\./+)+", "", said.get("path", member.name))
        size = said.get("size", "")
        block = BLOCK_FILE.fullmatch(name)
        if block:
            name = f"{block.group('disk')}/{int(block.group('number')):08d}{block.group('suffix') or ''}"
        has_size = re.fullmatch("[0-9]{1,18}", size)
        return member._replace(name=name, size=int(size) if has_size else member.size)

    def body(self, member: Member) -> Iterator[memoryview]:
        """What the member holds, piece by piece; behind it is its padding."""
        yield from self.reader.pieces(member.size, member.name)
        self.reader.zeros(-member.size % SECTOR_BYTES, "the padding of " + member.name)

    def end(self) -> None:
        """Nothing but zeros may follow, and if `strict` nothing at all."""
        if self._strict:
            self.reader.end()
        at = self.reader.position
        for piece in self.reader:
            if bytes(piece).count(0) != len(piece):
                raise VerificationError(f"the archive should end at byte {at}, but goes on with "
                                        f"{excerpt(bytes(piece).lstrip(bytes(1)))}")
            at = self.reader.position


def check_xva(check: Check, reader: Reader, expected: Optional[Dict[str, int]] = None,
              holds_disks: bool = True, strict: bool = True, bad: Optional[List[str]] = None,
              has_digests: bool = True) -> Contents:
    """An XVA archive: ova.xml, each disk that it names block by block with the block's digest, and the end.

    `expected`: virtual size by VDI uuid of the disks that must be in it by the pool's own records; ova.xml's
    list holds in any case. With `holds_disks` false it is a metadata export: ova.xml alone. `strict`: see
    Archive. `bad`: there a block with another digest than its own is noted, and the rest is read all the
    same; with `has_digests` false they are not computed, as others tell more.
    """
    archive = Archive(reader, strict)
    if check.blocks:
        check.blocks.line(XVA_BLOCKS_HEADING)
    ova_xml = archive.ova()
    check.ova = parse_ova(ova_xml)
    disks = exported_disks(check.ova)
    sizes = {disk.uuid: disk.virtual_size for disk in disks.values()}
    for uuid, size in (expected or {}).items():
        if uuid not in sizes:
            raise VerificationError(f"the archive's ova.xml lacks the disk with uuid {uuid}, which the "
                                    "VM has")
        if sizes[uuid] != size:
            raise VerificationError(f"the archive's ova.xml gives the disk with uuid {uuid} {sizes[uuid]} "
                                    f"bytes, the pool {size}")
    reports = dict(disks) if holds_disks else {}
    reached = dict.fromkeys(reports, 0)         # so far the blocks of each disk have come
    current, next_number, suffix, unchecked = "", 0, "", 0

    def check_complete(disk_id: str, at: int) -> None:
        report = reports[disk_id]
        if reached[disk_id] != report.virtual_size:
            raise VerificationError(f"disk {disk_id} (uuid {report.uuid}) is incomplete: its blocks end at "
                                    f"byte {at} of the archive, {reached[disk_id]} of {report.virtual_size} "
                                    "bytes of the disk are there")

    member = archive.next_member("the header of the first block")
    while member is not None:
        match = BLOCK_NAME.fullmatch(member.name)
        if match is None or match.group("disk") not in reports:
            raise VerificationError(f"the archive has a file {ascii(member.name)} at byte {member.at}, which "
                                    "is no block of a disk in its ova.xml")
        disk_id, number = match.group("disk"), int(match.group("number"))
        check.first_disk = check.first_disk or disk_id
        report, block = reports[disk_id], f"block {member.name} at byte {member.at}"
        if disk_id != current:                  # only once that before it is complete, in the order of ids
            if current:
                check_complete(current, member.at)
                if disk_id < current if strict else report.blocks:
                    raise VerificationError(f"{block} is out of order: disk {disk_id} comes before {current}")
            current, next_number = disk_id, 0
        if number and not report.blocks:
            raise VerificationError(f"{block} comes first: block 0 of the disk is missing")
        if number < next_number:
            raise VerificationError(f"{block} is out of order: number {next_number} or a later one should "
                                    "come")
        # A number is not always the MiB it stands at: after 5 s without a write xapi sends an empty block,
        # which takes a number and no room (stream_vdi.ml@v26.17.0 send_one, recv_all_vdi). Numbers left out
        # are a MiB of zeros each; the first and last block are always there.
        offset = reached[disk_id] + (number - next_number) * MEBIBYTE
        room = min(MEBIBYTE, report.virtual_size - offset)
        is_keep_alive = member.size == 0 and report.blocks
        if room <= 0 or (member.size != room and not is_keep_alive):
            raise VerificationError(f"{block} has {member.size} bytes, where the disk's size of "
                                    f"{report.virtual_size} has room for {max(room, 0)}")
        # The digest and its kind come after the block: of the first block both kinds are computed.
        hashers = {kind: new() for kind, new in ((".checksum", hashlib.sha1), (".xxhash", block_hasher()))
                   if new and suffix in ("", kind) and has_digests}
        for piece in archive.body(member):
            for hasher in hashers.values():
                hasher.update(piece)
            yield disk_id, offset, piece
            offset += len(piece)
        suffix, digest = _read_digest(archive, member, suffix)
        if suffix not in hashers:
            unchecked += 1
        else:
            found = hashers[suffix].hexdigest()
            if found != digest.lower():
                problem = f"{block} is damaged: its digest is {found}, not {digest}"
                if bad is None:
                    raise VerificationError(problem)
                bad.append(problem)
        if check.blocks:
            check.blocks.line(b"%b %d %b\n" % (disk_id.encode(), number, digest.encode()))
        reports[disk_id] = report._replace(blocks=report.blocks + 1,
                                           stored_bytes=report.stored_bytes + member.size)
        reached[disk_id], next_number = offset, number + 1
        member = archive.next_member("the header of a block")
    holds_nothing = not current and any(report.virtual_size for report in reports.values())
    if holds_nothing and not (strict or archive.has_no_end):
        raise UnknownFormat("it is a metadata export, which names the VM's disks and holds nothing of "
                            "them: it is not supported")
    for disk_id in reports:
        check_complete(disk_id, reader.position)
    archive.end()
    return StreamReport(tuple(reports.values()), DIGEST_KINDS[suffix][0] if suffix else "", not unchecked,
                        ova_xml)


def _read_digest(archive: Archive, block: Member, before: str) -> Tuple[str, str]:
    """The suffix and the text of the digest file that follows each block, with the suffix of that before."""
    member = archive.next_member("the header of the digest of " + block.name)
    name = "" if member is None else member.name
    suffix = name[len(block.name):]
    if not name.startswith(block.name) or suffix not in DIGEST_KINDS or before not in ("", suffix):
        raise VerificationError(f"block {block.name} at byte {block.at} is followed by "
                                f"{ascii(name) if name else 'the end of the archive'}, not by its digest")
    _, pattern, length = DIGEST_KINDS[suffix]
    digest = joined(archive.body(member)) if member.size == length else b""
    if not pattern.fullmatch(digest):
        raise VerificationError(f"{name} at byte {member.at} is not a digest")
    return suffix, digest.decode()


def archive_block(disk: str, number: int, content: Any, suffix: str = ".checksum") -> Tuple[Any, ...]:
    """A block of an archive with its digest, in pieces. All versions of the importer know SHA-1."""
    name, hasher = f"{disk}/{number:08d}", hashlib.sha1() if suffix == ".checksum" else block_hasher()()
    hasher.update(content)
    text = hasher.hexdigest() if suffix == ".checksum" else hasher.hexdigest().upper()
    return (tar_header(name, len(content)), content,
            bytes(-len(content) % SECTOR_BYTES) + tar_member(name + suffix, text.encode("ascii")))


def image_pieces(disk: str, size: int, contents: Iterable[Tuple[int, Any]],
                 suffix: str = ".checksum") -> Iterator[Any]:
    """The pieces of an image of a disk of which these MiB are not zeros: raw, or where the disk has a name,
    the blocks of an archive, without MiBs of zeros but for the first and the last."""
    def pieces(number: int, content: Any) -> Tuple[Any, ...]:
        content = content or memoryview(ZERO_MEBIBYTE)[:size - number * MEBIBYTE]
        return archive_block(disk, number, content, suffix) if disk else (content,)

    following, last = 0, max(0, -(-size // MEBIBYTE) - 1)
    for number, content in itertools.chain(contents, [(last, b"")]):
        for empty in range(following, min(number, 1) if disk else number):
            yield from pieces(empty, b"")
        if number >= following:
            yield from pieces(number, content)
        following = max(following, number + 1)


# ---- Raw ---------------------------------------------------------------------------------------------------


def check_raw(check: Check, reader: Reader, virtual_size: Optional[int] = None) -> Contents:
    """A raw image: as many bytes as the disk has, no more and no less. Its blocks are MiB."""
    reader, size = listed(reader, check.blocks), virtual_size
    for piece in reader if size is None else reader.pieces(size, f"a disk of {size} bytes"):
        yield "image", reader.position - len(piece), piece
    reader.end()
    size = reader.position
    return StreamReport((DiskReport("image", "", size, -(-size // MEBIBYTE), size),))


# ---- VHD ---------------------------------------------------------------------------------------------------

VHD_MAGIC = b"conectix"
VHD_BLOCK_BYTES = 2 * MEBIBYTE
VHD_OWN_BAT_OFFSET = 3 * SECTOR_BYTES
VHD_BAT_OFFSET = 2048
VHD_NOT_PRESENT = 0xFFFFFFFF
VHD_BLOCK_SIZES = [1 << shift for shift in range(12, 29)]
VHD_FIXED, VHD_DYNAMIC, VHD_DIFFERENCING = 2, 3, 4


class VhdFile:
    """Writes a VHD of the blocks that it is given, in order, into a file whose descriptor is taken over.

    Of type 4, which holds what differs from what is there, or 3; without parent or locators, which nobody
    looks at (tried on a real server). The table, which stands before the blocks, is written last: a file
    without it is none. It bears the sign of Windows: else some readers go by the geometry, which is less.
    """

    def __init__(self, fd: int, size: int, kind: int) -> None:
        self.close = functools.partial(os.close, fd)
        self._fd = fd
        self._size, self._kind = -(-size // SECTOR_BYTES) * SECTOR_BYTES, kind
        self._table = array("I", [VHD_NOT_PRESENT]) * -(-self._size // VHD_BLOCK_BYTES)
        self._sector = VHD_OWN_BAT_OFFSET // SECTOR_BYTES + -(-4 * len(self._table) // SECTOR_BYTES)

    def add(self, number: int, mebibytes: Sequence[Any]) -> None:
        """The block of that number holds these two MiB, None for one of zeros."""
        at, there = self._sector * SECTOR_BYTES, min(VHD_BLOCK_BYTES, self._size - number * VHD_BLOCK_BYTES)
        sectors = there // SECTOR_BYTES
        bitmap = (((1 << sectors) - 1) << SECTOR_BYTES * 8 - sectors).to_bytes(SECTOR_BYTES, "big")
        os.lseek(self._fd, at, os.SEEK_SET)
        write_all(self._fd, bitmap)
        for content in mebibytes:
            write_all(self._fd, content or ZERO_MEBIBYTE)
            write_all(self._fd, bytes(MEBIBYTE - len(content or ZERO_MEBIBYTE)))
        self._table[number] = self._sector
        self._sector += 1 + VHD_BLOCK_BYTES // SECTOR_BYTES
        forget_passed(self._fd, at, self._sector * SECTOR_BYTES)

    def complete(self) -> None:
        size = self._size
        footer = bytearray(SECTOR_BYTES)
        footer[:64] = struct.pack(">8sIIQI4sI4sQQHBBI", VHD_MAGIC, 2, 0x10000, SECTOR_BYTES, 0, b"win ",
                                  0x10000, b"Wi2k", size, size, *vhd_geometry(size), self._kind)
        footer[68:84] = os.urandom(16)
        footer[64:68] = _vhd_sum(footer, 64).to_bytes(4, "big")
        header = bytearray(2 * SECTOR_BYTES)
        header[:36] = struct.pack(">8sQQIII", b"cxsparse", (1 << 64) - 1, VHD_OWN_BAT_OFFSET, 0x10000,
                                  len(self._table), VHD_BLOCK_BYTES)
        header[36:40] = _vhd_sum(header, 36).to_bytes(4, "big")
        os.lseek(self._fd, self._sector * SECTOR_BYTES, os.SEEK_SET)
        write_all(self._fd, footer)
        if sys.byteorder == "little":
            self._table.byteswap()
        os.lseek(self._fd, 0, os.SEEK_SET)
        write_all(self._fd, bytes(footer + header) + self._table.tobytes()
                  + b"\xff" * (-4 * len(self._table) % SECTOR_BYTES))
        os.fsync(self._fd)
        forget_cached(self._fd)


def vhd_geometry(size: int) -> Tuple[int, int, int]:
    """Cylinders, heads and sectors per track of a disk, as the specification's appendix has them."""
    sectors = min(size // SECTOR_BYTES, 65535 * 16 * 255)
    heads, per_track = max(4, -(-(sectors // 17) // 1024)), 17
    if sectors >= 65535 * 16 * 63:
        heads, per_track = 16, 255
    elif heads > 16 or sectors // 17 >= heads * 1024:
        heads, per_track = 16, 31 if sectors // 31 < 16 * 1024 else 63
    return sectors // per_track // heads, heads, per_track


class DiskState:
    """One disk in a copy that tells the state of every block: its rows in `blocks`, from `begin` to `end`;
    and in an increment the file of what changed, in units of 2 MiB, the block of a VHD. `old`: the rows of
    the copy named `base`, in an increment, for the same disk. `table`: the block table of the difference that
    it is read from, None where all of it is read; what is not in it is as it was."""

    def __init__(self, key: str, size: int, blocks: BlocksFile, old: Iterator[Row] = iter(()),
                 base: str = "", file: Optional[VhdFile] = None, table: Optional[array] = None) -> None:
        self.key, self.size, self.file, self.table = key, size, file, table
        self.begin = self.end = blocks.position
        self.holders = set()               # type: Set[str]
        self.stored = self.present = 0     # units of 2 MiB in the file; MiB that are not zeros
        self.blocks, self._old, self._base = blocks, old, base
        self._next_old = next(old, None)
        self._unit = -1
        self._new = {}                     # type: Dict[int, bytes]

    def take(self, number: int, content: memoryview) -> None:
        """That MiB, which is not all zeros, is noted; in order."""
        content = content[:max(0, self.size - number * MEBIBYTE)]
        if not len(content):
            raise VerificationError(f"disk {self.key} has data behind its end, in its MiB {number}")
        self._begin_unit(number // 2)
        self._new[number] = bytes(content)

    def finish(self) -> None:
        """All of the disk was given: what was not is zeros."""
        self._begin_unit(1 << 60)
        if self.file is not None:
            self.file.complete()
        self.end = self.blocks.position

    def _begin_unit(self, unit: int) -> None:
        """All before that unit is noted, also those of which nothing was given."""
        while self._unit != unit:
            if self._new or self._next_old is not None and self._next_old.number // 2 == self._unit:
                self._note_unit()
            self._unit = unit if self._next_old is None else min(unit, self._next_old.number // 2)

    def _note_unit(self) -> None:
        rows, changed = [], False
        is_told = self.table is None or self.table[self._unit] != VHD_NOT_PRESENT
        for number in (2 * self._unit, 2 * self._unit + 1):
            old, content = None, self._new.get(number)
            if self._next_old is not None and self._next_old.number == number:
                old, self._next_old = self._next_old, next(self._old, None)
            new = Row(number, ZERO if content is None else block_digest(content), "")
            changed |= is_told and new.digest != (old.digest if old else ZERO)
            rows.append((new, old, content))
        if changed and self.file is not None:
            self.file.add(self._unit, [content for _, _, content in rows])
            self.stored += 1
        for new, old, content in rows:
            row = new if changed else old and old._replace(holder=old.holder or self._base)
            if row is not None and (old or content is not None):
                self.blocks.line(row.line(self.key))
                self.holders.add(row.holder)
                self.present += row.digest != ZERO
        self._new = {}


class StateSink(MebibyteSink):
    """The sink of an export whose copy is to tell the state of every block. `begin` gives the DiskState of a
    disk by its name in the image, once; `disks` are those begun, in order. The one that is last ends the
    list."""

    def __init__(self, blocks: BlocksFile, begin: Callable[[str], DiskState],
                 names: Callable[[], Iterable[str]], is_last: bool = True) -> None:
        super().__init__(self._note)
        self.disks = {}                    # type: Dict[str, DiskState]
        self._blocks, self._begin, self._names, self._is_last = blocks, begin, names, is_last
        self._current = None               # type: Optional[DiskState]
        if not blocks.position:
            blocks.line(ROWS_HEADING)

    def _note(self, name: str, number: int, content: memoryview) -> None:
        if name not in self.disks:
            self._start(name)
        self._current.take(number, content)

    def _start(self, name: str) -> None:
        if self._current is not None:
            self._current.finish()
        self._current = self.disks[name] = self._begin(name)

    def end(self, is_whole: bool) -> None:
        """All disks are noted, those of zeros too."""
        super().end(is_whole)
        for name in self._names():
            if name not in self.disks:
                self._start(name)
        if self._current is not None:
            self._current.finish()
        if self._is_last:
            self._blocks.end()

    def close(self) -> None:
        if self._is_last:
            self._blocks.close()
        for disk in self.disks.values():
            if disk.file is not None:
                disk.file.close()


def check_vhd(check: Check, image: Any, virtual_size: Optional[int] = None, strict: bool = True,
              is_whole: bool = True, is_layer: bool = False) -> Contents:
    """A VHD (Microsoft's Virtual Hard Disk Image Format Specification 1.0; batmap: blktap's vhd.h).

    `strict`: as xapi streams it (vhd_format/f.ml@v26.17.0 Vhd_input): dynamic, the blocks in the BAT's order
    and nothing else. Otherwise of any writer: a descriptor gives its parts wherever they lie, a Reader in
    order only, as it can't go back: UnknownFormat. `is_whole` false: of a damaged file as much as can be
    read. `is_layer`: it may be a difference, as VhdFile writes it in an increment, or, strictly, as xapi
    streams it. VHD has no digests: a flipped bit shows in the SHA-256 and the recorded CRCs only.
    """
    vhd, blocks = _Vhd(listed(image, check.blocks), strict, is_whole, is_layer), 0
    footer = vhd.read_footer()
    sectors = vhd.read_table(footer, virtual_size)
    check.size = vhd.size
    check.table = sectors if vhd.kind == VHD_DIFFERENCING else None
    for number, sector in enumerate(sectors):
        if sector != VHD_NOT_PRESENT:
            yield from vhd.read_block(number, sector * SECTOR_BYTES)
            blocks += 1
    vhd.read_end(footer)
    return StreamReport((DiskReport("image", "", vhd.size, blocks, blocks * vhd.block_bytes),))


class _Vhd:
    """A VHD while it is read; `size`, `kind` and `block_bytes` stand when its table was read."""

    def __init__(self, image: Any, strict: bool, is_whole: bool = True, is_layer: bool = False) -> None:
        self.size = self.block_bytes = self.kind = 0
        self._is_layer = is_layer
        self._image, self._strict, self._is_whole = image, strict, is_whole
        self._is_file = isinstance(image, int)
        self._end = os.fstat(image).st_size if self._is_file else 0     # of the blocks
        self._bitmap_bytes = 0              # before each block; a fixed VHD has none
        self._step = 0                      # the sectors that a block takes with its bitmap
        self._batmap = b""                  # bits for the blocks whose bitmaps need not be asked

    def _pieces(self, at: int, count: int, where: str) -> Iterator[memoryview]:
        """Those bytes, piece by piece; in a stream, what lies before is passed over."""
        if not self._is_file:
            if at < self._image.position:
                raise UnknownFormat(f"{where} lies before what was read already, so it can't be read as a "
                                    "compressed stream: decompress it first")
            collections.deque(self._image.pieces(at - self._image.position, where), 0)
            yield from self._image.pieces(count, where)
            return
        while count:
            wanted = min(count, BUFFER_BYTES)       # a wild place is behind the end: pread takes no 64 bits
            piece = os.pread(self._image, wanted, at) if at + wanted <= self._end else b""
            if not piece:
                raise VerificationError(f"the image ends in {where}, which should be at byte {at}")
            yield memoryview(piece)
            forget_passed(self._image, at, at + len(piece))
            at, count = at + len(piece), count - len(piece)

    def _read(self, at: int, count: int, where: str) -> bytes:
        return joined(self._pieces(at, count, where))

    def read_footer(self) -> bytes:
        """At a file's end, where that of old Virtual PCs lacks its last byte; a stream's copy comes first."""
        footer, at = b"", 0
        for length in (SECTOR_BYTES, SECTOR_BYTES - 1) if self._is_file else ():
            if self._end >= length and not footer.startswith(VHD_MAGIC):
                at = self._end - length
                footer = self._read(at, length, "its footer") + bytes(SECTOR_BYTES - length)
        if footer.startswith(VHD_MAGIC):
            self._end = at
        elif self._is_file and self._is_whole:
            raise VerificationError("the image does not end with a VHD's footer: it was cut off, or is none")
        else:
            at, footer = 0, self._read(0, SECTOR_BYTES, "the copy of its footer")
        if not footer.startswith(VHD_MAGIC):
            if self._strict or self._is_file:
                raise VerificationError(f"the image begins with {excerpt(footer)}, not with a VHD's footer")
            raise UnknownFormat(f"it begins with {excerpt(footer)}, not with a VHD's footer, as a "
                                "dynamic one does; others can't be read as a compressed stream: decompress "
                                "it first")
        _check_vhd_sum(footer, 64, f"footer at byte {at}")
        return footer

    def read_table(self, footer: bytes, virtual_size: Optional[int]) -> array:
        """The sector at which each block lies, VHD_NOT_PRESENT for one of zeros."""
        self.size, kind, header_at = _vhd_numbers(footer, (48, 56), (60, 64), (16, 24))
        self.kind, is_difference = kind, kind == VHD_DIFFERENCING
        if self._strict and (kind != VHD_DYNAMIC and not (is_difference and self._is_layer)
                             or header_at != SECTOR_BYTES):
            raise VerificationError(f"the image is no full dynamic VHD: its footer at byte 0 says type "
                                    f"{kind}")
        if kind == VHD_DIFFERENCING and not self._is_layer:
            raise UnknownFormat("it is a differencing VHD, which holds only what differs from its parent, "
                                "and is not supported: bring both together first")
        if kind not in (VHD_FIXED, VHD_DYNAMIC, VHD_DIFFERENCING):
            raise VerificationError(f"the image's footer says that it is of type {kind}")
        if self.size > VHD_LARGEST_BYTES or self.size % SECTOR_BYTES:
            raise VerificationError(f"the image's footer gives an impossible disk size of {self.size} bytes")
        if kind == VHD_FIXED:
            if self._is_whole and self._end < self.size:
                raise VerificationError(f"the image has {self._end} bytes of a disk of {self.size}")
            self.block_bytes = 2 * MEBIBYTE
            return array("L", range(0, -(-self.size // SECTOR_BYTES), self.block_bytes // SECTOR_BYTES))
        header = self._read(header_at, 2 * SECTOR_BYTES, "its header")
        if not header.startswith(b"cxsparse"):
            raise VerificationError(f"the image has {excerpt(header)} at byte {header_at}, not a VHD's "
                                    "header")
        _check_vhd_sum(header, 36, f"header at byte {header_at}")
        table_at, entries, self.block_bytes = _vhd_numbers(header, (16, 24), (28, 32), (32, 36))
        blocks = -(-self.size // self.block_bytes) if self.block_bytes in VHD_BLOCK_SIZES else entries + 1
        if blocks > entries or self._strict and (table_at, entries) != (VHD_BAT_OFFSET, blocks) \
                or self._strict and is_difference and self.block_bytes != VHD_BLOCK_BYTES:
            raise VerificationError(f"the image's header at byte {header_at} doesn't fit a disk of "
                                    f"{self.size} bytes: block table of {entries} entries at byte "
                                    f"{table_at}, blocks of {self.block_bytes} bytes")
        # A raw source is rounded up to whole blocks, a VHD source not; a file of ours to sectors.
        if virtual_size is not None and self.size not in [
                -(-virtual_size // unit) * unit for unit in (1, SECTOR_BYTES, self.block_bytes)]:
            raise VerificationError(f"the image is of a disk of {self.size} bytes, the pool says "
                                    f"{virtual_size}")
        self._bitmap_bytes = -(-self.block_bytes // (SECTOR_BYTES * 8 * SECTOR_BYTES)) * SECTOR_BYTES
        self._step = (self._bitmap_bytes + self.block_bytes) // SECTOR_BYTES
        if self._strict:
            self._image.zeros(SECTOR_BYTES, "the empty sector after its header")
        sectors = array("I", self._read(table_at, 4 * blocks, "its block table"))
        if sys.byteorder == "little":
            sectors.byteswap()
        if self._strict:
            padding = self._image.take(-4 * blocks % SECTOR_BYTES, "the padding of its block table")
            if padding.strip(b"\xff") and padding.strip(b"\0"):
                raise VerificationError("the image has no padding after its block table at byte 2048")
            self._check_order(sectors)
            return sectors
        taken = [(0, SECTOR_BYTES), (header_at, 2 * SECTOR_BYTES), (table_at, 4 * blocks)]
        if footer.startswith(b"tap\0", 28):
            map_at = table_at + -(-4 * entries // SECTOR_BYTES) * SECTOR_BYTES
            self._batmap = self._read_batmap(map_at, blocks)
            taken += [(map_at, SECTOR_BYTES + len(self._batmap))] if self._batmap else []
        self._check_places(sectors, taken)
        if self._is_file and self._is_whole and not _is_same_footer(self._read(0, SECTOR_BYTES, ""), footer):
            raise VerificationError("the image's footer differs from its copy at byte 0")
        return sectors

    def _check_order(self, sectors: array) -> None:
        """Each block lies right behind the one before, the first behind the table."""
        behind = self._image.position // SECTOR_BYTES
        for number, sector in enumerate(memoryview(sectors)):
            if sector != VHD_NOT_PRESENT:
                if sector != behind:
                    raise VerificationError(f"the image's block table puts block {number} at sector "
                                            f"{sector}, not {behind}")
                behind += self._step
        self._end = behind * SECTOR_BYTES

    def _check_places(self, sectors: array, taken: Sequence[Tuple[int, int]]) -> None:
        """No block lies in another, in what is taken or behind the end; in a stream they lie in order."""
        present = [sector for sector in sectors if sector != VHD_NOT_PRESENT]
        if not self._is_file:
            if any(after <= before for before, after in zip(present, present[1:])):
                raise UnknownFormat("its blocks do not lie in order, so it can't be read as a compressed "
                                    "stream: decompress it first")
            return
        present.sort()
        step = self._step
        clash = any(after - before < step for before, after in zip(present, present[1:]))
        for at, count in taken:
            clash = clash or any(at < (sector + step) * SECTOR_BYTES and sector * SECTOR_BYTES < at + count
                                 for sector in present)
        if clash:
            raise VerificationError("the image's block table puts one block over another, or over the table "
                                    "itself")
        if self._is_whole and present and (present[-1] + step) * SECTOR_BYTES > self._end:
            raise VerificationError(f"the image's block table puts a block at sector {present[-1]}, behind "
                                    f"the end at byte {self._end}: it was cut off")

    def _read_batmap(self, at: int, blocks: int) -> bytes:
        """Bits for the blocks that were written whole, if the map is there, right behind its header, and
        sound. No sum covers that header: whatever it says, the bitmaps do without the map."""
        with contextlib.suppress(VerificationError):
            header = self._read(at, SECTOR_BYTES, "batmap")
            map_at, sectors, stored = _vhd_numbers(header, (8, 16), (16, 20), (24, 28))
            if header.startswith(b"tdbatmap") and map_at == at + SECTOR_BYTES:
                found = self._read(map_at, min(sectors, 4096) * SECTOR_BYTES, "batmap")
                if ~sum(found) & 0xFFFFFFFF == stored and 8 * len(found) >= blocks:
                    return found
        return b""

    def read_block(self, number: int, at: int) -> Iterator[Tuple[str, int, memoryview]]:
        """What a block, which begins there, has inside the disk: of the sectors that its bitmap names."""
        offset = number * self.block_bytes
        there = min(self.block_bytes, self.size - offset)
        runs = [(0, there)]
        if self._bitmap_bytes:
            bitmap = self._read(at, self._bitmap_bytes, f"the bitmap of block {number}")
            bitmap = bitmap[:self.block_bytes // SECTOR_BYTES // 8]
            is_full = bitmap.count(0xFF) == len(bitmap)
            if self._strict and not is_full:
                raise VerificationError(f"the image's bitmap at byte {at} leaves sectors out, which xapi "
                                        "never does")
            if not is_full and not (self._batmap and self._batmap[number // 8] << number % 8 & 0x80):
                bits = f"{int.from_bytes(bitmap, 'big'):0{8 * len(bitmap)}b}"[:there // SECTOR_BYTES]
                runs = [(run.start() * SECTOR_BYTES, run.end() * SECTOR_BYTES)
                        for run in re.finditer("1+", bits)]
            at += self._bitmap_bytes
        for begin, end in runs:
            for piece in self._pieces(at + begin, end - begin, f"block {number}"):
                yield "image", offset + begin, piece
                begin += len(piece)

    def read_mebibyte(self, sectors: array, number: int) -> bytes:
        """That MiB of the disk, as it stands in its block; in a stream behind all that was read before."""
        offset = number * MEBIBYTE
        block, begin = divmod(offset, self.block_bytes)
        if offset >= self.size or sectors[block] == VHD_NOT_PRESENT:
            raise VerificationError(f"the image does not hold MiB {number} of its disk")
        return self._read(sectors[block] * SECTOR_BYTES + self._bitmap_bytes + begin,
                          min(MEBIBYTE, self.size - offset), f"block {block}")

    def read_end(self, footer: bytes) -> None:
        """A stream ends with the same footer; that of another program perhaps without its last byte."""
        if self._strict:
            if self._read(self._end, SECTOR_BYTES, "its footer") != footer:
                raise VerificationError(f"the image's footer at byte {self._end} differs from its copy at "
                                        "byte 0")
            self._image.end()
        elif not self._is_file:
            begin = self._image.position
            collections.deque(self._image, 0)
            tail = self._image.tail[-(self._image.position - begin):] if self._image.position > begin else b""
            ends = (tail[-SECTOR_BYTES:], tail[1 - SECTOR_BYTES:] + b"\0")
            if not any(_is_same_footer(end, footer) for end in ends):
                raise VerificationError("the image does not end with the footer that it begins with")


def _vhd_numbers(structure: bytes, *places: Tuple[int, int]) -> List[int]:
    """The big-endian numbers that stand there, each from a byte up to another."""
    return [int.from_bytes(structure[begin:end], "big") for begin, end in places]


def _vhd_sum(structure: bytes, field: int) -> int:
    return ~(sum(structure) - sum(structure[field:field + 4])) & 0xFFFFFFFF


def _check_vhd_sum(structure: bytes, field: int, what: str) -> None:
    stored, computed = int.from_bytes(structure[field:field + 4], "big"), _vhd_sum(structure, field)
    if stored != computed:
        raise VerificationError(f"the image's {what} is damaged: its checksum is {computed:08x}, not "
                                f"{stored:08x}")


def _is_same_footer(one: bytes, other: bytes) -> bool:
    """Are they footers of the same disk? Times and what a program keeps for itself may differ."""
    return len(one) == SECTOR_BYTES and _vhd_sum(one, 64) == int.from_bytes(one[64:68], "big") \
        and all(one[begin:end] == other[begin:end] for begin, end in ((0, 8), (16, 24), (48, 64)))


# =============================================================================
# 16. Files, pipes, compressors
# =============================================================================
# Where streams go to and come from: files on the store, programs, and what decompresses.
# May touch: the descriptors that it is given, the program zstd. May not: names on disk, the pool.

GZIP_INPUT_BYTES = 64 * 1024
NO_ZSTD = "the program zstd is not here, which this image needs: install it"
PROGRAM_ENDING_S = 120      # how long a program may take to end after its last byte: xe's task is final later


def write_file(reader: Reader, fd: int) -> bytes:
    """The stream is in that file and on disk: NFS and CIFS may tell of a full disk only when it is synced or
    closed. Its last KiB."""
    for view in reader:
        write_all(fd, view)
        forget_passed(fd, reader.position - len(view), reader.position)
    os.fsync(fd)
    forget_cached(fd)
    return reader.tail


def write_pipe(reader: Reader, fd: int) -> bool:
    """The stream went into that pipe, a program's stdin for one; false if its reader ended before it had read
    all: the program's exit status, or what it made, tells why."""
    widen_pipe(fd)
    try:
        for view in reader:
            write_all(fd, view)
    except BrokenPipeError:
        return False
    return True


def gunzip(reader: Reader) -> Iterator[bytes]:
    """The source of a flow: gzip decompressed; CompressionDamaged if it is damaged, cut short or followed by
    anything but zeros. Several gzip members in a row are one gzip file (RFC 1952, 2.2), and gzip passes over
    zeros behind it (a tape's blocks)."""
    member, is_padded = zlib.decompressobj(zlib.MAX_WBITS + 16), False

    def inflated(piece: Any) -> bytes:
        """A MiB at most: a few bytes of gzip can be a thousand times as many of zeros."""
        try:
            return member.decompress(piece, MEBIBYTE)
        except zlib.error as problem:
            raise CompressionDamaged(f"the gzip file is damaged, or followed by something else, before byte "
                                     f"{reader.position}: {problem}") from None

    while True:
        # Small pieces: what zlib leaves over is copied each time that the output is full.
        piece: Any = reader.some(GZIP_INPUT_BYTES)
        if not len(piece):
            break
        while len(piece):
            if member.eof:
                is_padded = is_padded or not piece[0]
                if is_padded and bytes(piece).count(0) == len(piece):
                    break
                member = zlib.decompressobj(zlib.MAX_WBITS + 16)
            yield inflated(b"?" if is_padded else piece)        # what stands behind zeros is no gzip
            piece = member.unused_data if member.eof else member.unconsumed_tail
    while not member.eof:
        plain = inflated(b"")
        if not plain:
            raise CompressionDamaged(f"the gzip file is cut short: it ends at byte {reader.position}")
        yield plain


@functools.lru_cache(maxsize=None)
def libzstd() -> Any:
    """The host's libzstd, None where there is none; `ctypes` and the type of its buffers are attributes of
    it."""
    try:
        import ctypes           # some minimal builds of Python lack it
        library: Any = ctypes.CDLL("libzstd.so.1")
    except (ImportError, OSError):
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    # ZSTD_inBuffer and ZSTD_outBuffer (facebook/zstd, lib/zstd.h)
    fields = [("at", pointer), ("size", size), ("position", size)]
    buffer: Any = type("Buffer", (ctypes.Structure,), {"_fields_": fields})
    for name, result, arguments in (
            ("createDStream", pointer, ()), ("freeDStream", size, (pointer,)),
            ("isError", ctypes.c_uint, (size,)), ("getErrorName", ctypes.c_char_p, (size,)),
            ("decompressStream", size, (pointer, ctypes.POINTER(buffer), ctypes.POINTER(buffer)))):
        function = getattr(library, "ZSTD_" + name)
        function.restype, function.argtypes = result, arguments
    library.ctypes, library.buffer = ctypes, buffer
    return library


def unzstd(reader: Reader) -> Iterator[memoryview]:
    """The source of a flow: zstd decompressed by the host's libzstd; raises as gunzip does."""
    library = libzstd()
    buffer, byref, byte = library.buffer, library.ctypes.byref, library.ctypes.c_char
    plain = bytearray(MEBIBYTE)
    address = library.ctypes.addressof(byte.from_buffer(plain))
    missing = 1                 # what the frame still wants; 0 at its end
    stream = library.ZSTD_createDStream()
    try:
        for view in reader:
            piece, is_full = bytearray(view) if view.readonly else view, False
            begin = reader.position - len(view)
            source = buffer(library.ctypes.addressof(byte.from_buffer(piece)), len(view), 0)
            while source.position < source.size or is_full and missing:
                target = buffer(address, MEBIBYTE, 0)
                missing = library.ZSTD_decompressStream(stream, byref(target), byref(source))
                if library.ZSTD_isError(missing):
                    reason = library.ZSTD_getErrorName(missing).decode("ascii", "replace")
                    if "memory" in reason:      # of a frame made with --long, or here
                        raise ProgramError("the host's libzstd has not the memory that this image needs "
                                           "(was it compressed with --long?): decompress it with zstd")
                    raise CompressionDamaged("the zstd file is damaged, or followed by something else, "
                                             f"before byte {begin + source.position}: {reason}")
                is_full = target.position == MEBIBYTE
                yield memoryview(plain)[:target.position]
    finally:
        library.ZSTD_freeDStream(stream)
    if missing:
        raise CompressionDamaged(f"the zstd file is cut short: it ends at byte {reader.position}")


def reading_flows(stack: contextlib.ExitStack, fd: int, compression: str, stored: Sequence[Any],
                  plain: Sequence[Any], is_foreign_vhd: bool = False) -> List[Flow]:
    """Flows that bring the stored bytes of an image to `stored` and their plain content to `plain`.

    The VHD of another program that is not compressed is read by its check, all that there is for it, wherever
    its parts lie. A program that is needed lives as long as the stack. ProgramError if it is not here.
    """
    stored, plain, path = list(stored), list(plain), None
    if compression == "zstd" and not libzstd():
        path = find_program(("zstd",))
        if path is None:
            os.close(fd)
            raise ProgramError(NO_ZSTD)
    if is_foreign_vhd and compression == "none":
        check, = plain
        return [Flow(lambda: check.read_file(fd), [], check.name)]
    if compression == "none":
        return [Flow(fd, stored + plain)]
    if compression == "gzip":
        return [Flow(fd, stored + [Flow(gunzip, plain, "gunzip")])]
    if path is None:
        return [Flow(fd, stored + [Flow(unzstd, plain, "unzstd")])]
    program = stack.enter_context(Program((path, "-q", "-d", "-c"), stdin=subprocess.PIPE))
    feeder = Consumer("zstd", write_pipe, os.dup(program.stdin_fd))

    def check_ending() -> None:
        status = program.wait(PROGRAM_ENDING_S)
        if status is None or status < 0:           # killed, for the memory that it wanted perhaps
            raise ProgramError("zstd did not end" if status is None else ending_text("zstd", status))
        if status != 0 or not feeder.result:
            raise CompressionDamaged("the zstd file is damaged or cut short: "
                                     f"{one_line(program.said or 'no reason given')}")

    plain_fd = os.dup(program.stdout_fd)
    program.close_stdin()
    return [Flow(fd, stored + [feeder]), Flow(plain_fd, plain, "zstd", check_ending)]


# ---- Layers: the files that together hold a copy -----------------------------------------------------------


def file_views(fd: int) -> Iterator[memoryview]:
    """What is left of a file or pipe, in one buffer again and again; small, as many may be read at a time."""
    buffer = memoryview(bytearray(BUFFER_BYTES // 4))
    position, count = 0, os.readv(fd, [buffer])
    while count:
        yield buffer[:count]
        position += count
        forget_passed(fd, position - count, position)
        count = os.readv(fd, [buffer])


def plain_reader(stack: contextlib.ExitStack, fd: int, compression: str, is_vhd: bool) -> Any:
    """What the file holds, decompressed, as a Reader for one thread to pull; of a VHD that is not compressed
    the descriptor, as its parts may lie anywhere. All is closed with the stack. ProgramError if a program
    that is needed is not here."""
    stack.callback(os.close, fd)
    stack.callback(forget_cached, fd)
    if compression == "none":
        return fd if is_vhd else Reader(file_views(fd))
    if compression == "gzip":
        return Reader(map(memoryview, gunzip(Reader(file_views(fd)))))
    if libzstd():
        return Reader(unzstd(Reader(file_views(fd))))
    path = find_program(("zstd",))
    if path is None:
        raise ProgramError(NO_ZSTD)
    program = stack.enter_context(Program((path, "-q", "-d", "-c"), stdin=fd))

    def views() -> Iterator[memoryview]:
        yield from file_views(program.stdout_fd)
        status = program.wait(PROGRAM_ENDING_S)
        if status != 0:
            raise CompressionDamaged(f"the zstd file is damaged or cut short: {one_line(program.said)}")
    return Reader(views())


def mebibytes(contents: Contents) -> Iterator[Tuple[str, int, bytes]]:
    """What a check gives, put together to MiBs: disk, number and content of each that is not all zeros."""
    found = []                             # type: List[Tuple[str, int, bytes]]
    sink = MebibyteSink(lambda disk, number, content: found.append((disk, number, bytes(content))))
    for piece in contents:
        sink.put(*piece)
        yield from found
        found.clear()
    sink.end(True)
    yield from found


class LayerReader:
    """Gives the MiBs that one image of a copy holds, in order, each once. `names`: what the disks are called
    in it, by key. All is closed with the stack."""

    def __init__(self, stack: contextlib.ExitStack, fd: int, compression: str, file_format: str,
                 names: Mapping[str, str]) -> None:
        self._names = names
        self._vhd = None                   # type: Optional[_Vhd]
        self._at = "-", 0, b""             # type: Tuple[str, int, bytes]
        self._begun = set()                # type: Set[str]
        image, check = plain_reader(stack, fd, compression, file_format == "vhd"), Check(check_xva)
        if file_format == "vhd":
            self._vhd = _Vhd(image, False, is_layer=True)
            self._sectors = self._vhd.read_table(self._vhd.read_footer(), None)
            return
        self._mebibytes = mebibytes(check_xva(check, image, has_digests=False)
                                    if file_format == "xva" else check_raw(check, image))

    def read(self, key: str, number: int) -> bytes:
        """That MiB of that disk, at the disk's end with zeros behind it perhaps; VerificationError if it is
        not there."""
        if self._vhd is not None:
            return self._vhd.read_mebibyte(self._sectors, number)
        name = self._names.get(key)
        while self._at[0] != name and name not in self._begun or self._at[0] == name and self._at[1] < number:
            self._at = next(self._mebibytes, ("", 0, b""))
            self._begun.add(self._at[0])
            if not self._at[0]:
                break
        if self._at[:2] != (name, number):
            raise VerificationError(f"the image does not hold MiB {number} of disk {key}")
        return self._at[2]


# =============================================================================
# 17. Copies
# =============================================================================
# What stands in the backup directory: its copies, whose they are, and what is on
# record about them; and how a copy is made and removed. No deciding here.

STATE_FOLDER = ".vmbackup"
VERDICT_FOLDER = "verdicts"
PLAN_FOLDER = "plans"
PLAN_SHAPE = {"pool": str, "config": str, "host": str, "at": str, "vms": {"*": str}, "excluded": [str]}
REFERENCE_FOLDER = "references"
REFERENCE_SHAPE = {"uuid": str, "name": str, "copy": str, "blocks": str, "at": str,
                   "disks": {"*": {"uuid": str, "size": int, "sr": str}}}
LEDGER_FORMAT = 1
LEDGER_SHAPE = {
    "format": int, "inode": int, "leaving": [REFERENCE_SHAPE],
    **dict.fromkeys(("store", "pool", "config", "host", "kind", "vm", "vm_name", "folder", "distrust"), str)}
MANIFEST = "backup.json"
CHECKSUMS = "SHA256SUMS"
SUCCESS = "success"
BLOCKS = "blocks"
OVA_XML = "ova.xml"
RESTORE_TEXT = "RESTORE.txt"
VM_METADATA = "vm-metadata.xml"
PIN = ".pin"
OLD_MARKERS = ("success", "success_restore", "success_compress", "success_compressing")
IMAGE_NAME = re.compile(r"((.+)\.(xva|raw|vhd))(\.gz|\.zst)?", re.DOTALL)
COMPRESSED_SUFFIX = {"none": "", "gzip": ".gz", "zstd": ".zst"}
COMPRESSED_MAGIC = ((".gz", b"\x1f\x8b"), (".zst", b"\x28\xb5\x2f\xfd"))
OTHER_MAGIC = (("xz", b"\xfd7zXZ\0"), ("bzip2", b"BZh"), ("lz4", b"\x04\x22\x4d\x18"),
               ("7z", b"7z\xbc\xaf"), ("zip", b"PK\3\4"), ("lzip", b"LZIP"),
               ("VMDK", b"KDMV"), ("qcow2", b"QFI\xfb"), ("VHDX", b"vhdxfile"))
WEAK_LOCK_PATIENCE_S = DAY_S


def json_line(facts: Dict[str, Any]) -> bytes:
    """The facts as a file of the program's own state has them."""
    return (json.dumps(facts, sort_keys=True) + "\n").encode("ascii")


def free_text(free_bytes: Optional[int]) -> str:
    """The free space of the store in words."""
    return "free space not known" if free_bytes is None else format_size(free_bytes) + " free"


class Folder(NamedTuple):
    """A VM's directory, listed. `strangers`: names of no copies; `unfinished`: .partial and .deleting."""
    name: str
    copies: Tuple[Copy, ...]
    unfinished: Tuple[str, ...]
    strangers: Tuple[str, ...]


class Catalog:
    """The backup directory, opened once."""

    def __init__(self, path: str, above: str = "") -> None:
        """Raises CatalogError if the directory can't be opened; or the one above it, for one yet to be
        made."""
        self.path = path
        self.root = DirectoryToBe.open_path(above) if above else Directory.open_path(path)
        self.root.shown = path
        self._device = status_of(self.root.fd).st_dev
        self._state = None                     # type: Optional[Directory]
        self._verdicts = None                  # type: Optional[Directory]
        self.mount = find_mount(read_text_file(MOUNTS_FILE), self._device)

    # --- guards -----------------------------------------------------------------

    def check_in_place(self) -> None:
        """Raises StorageMisbehaved if the path no longer leads to what was opened: the share went away."""
        try:
            with storage_errors(f"looking at {self.path}"):
                if os.path.samestat(os.stat(fs_path(self.path)), os.fstat(self.root.fd)):
                    return
            problem = ("is no longer the directory it was at the start of the run: the share went away, or "
                       "was mounted again.")
        except CatalogError as error:
            problem = f"can't be reached any more ({str(error).rstrip('.')}): is the share still mounted?"
        raise StorageMisbehaved(f"{self.path} {problem} Nothing is written or pruned.")

    @property
    def is_on_root(self) -> bool:
        return self._device == os.stat("/").st_dev

    @property
    def locks_are_local(self) -> bool:
        return self.mount is not None and self.mount.locks_are_local

    def is_writable(self) -> bool:
        with storage_errors(f"looking at {self.path}"):
            return os.access(fs_path(self.path), os.W_OK | os.X_OK) and \
                not os.fstatvfs(self.root.fd).f_flag & os.ST_RDONLY

    def close_all(self) -> None:
        """Nothing of this process is open there any more, so that it can be unmounted; all locks are given
        back by that. Only for a process that does nothing more in it."""
        close_on(self._device)

    def free_bytes(self) -> Optional[int]:
        """Space that we may still use, in bytes; None where the file system tells no size."""
        return free_space(self.root.fd, self.path)

    def whole_bytes(self) -> Optional[int]:
        """How large the file system is, in bytes; None where it tells no size."""
        with storage_errors(f"asking for the size of {self.path}"):
            status = os.fstatvfs(self.root.fd)
        return status.f_blocks * status.f_frsize or None

    # --- state: locks and journals -------------------------------------------------

    def state(self, name: str) -> Directory:
        """A folder of the program's own state, made if missing."""
        if self._state is None:
            self._state = self.root.child_made_if_missing(STATE_FOLDER)
        return self._state.child_made_if_missing(name)

    def state_if_there(self, name: str) -> Optional[Directory]:
        """A folder of the program's own state, None if there is none: for those who change nothing."""
        with contextlib.suppress(NotThere), self.root.child(STATE_FOLDER) as state:
            return state.child(name)
        return None

    def in_state(self, name: str) -> Iterator[Tuple[Directory, str]]:
        """The names in such a folder, each with the folder, open; none if there is none."""
        folder = self.state_if_there(name)
        if folder is not None:
            with folder:
                yield from ((folder, one) for one in folder.names())

    def identity(self) -> Dict[str, Any]:
        """What this store is told from others by, as it stands; nothing is written."""
        with contextlib.suppress(NotThere), self.root.child(STATE_FOLDER) as state:
            file = LockFile.of(state, "store") if state.status("store") else None
            if file is not None:
                return {"store": told(file.text(), "id"), "inode": status_of(file.fd).st_ino}
        return {"store": "", "inode": 0}

    def lock_file(self, kind: str, subject: str) -> LockFile:
        """The lock of that kind for that subject (a config, a VM's directory); opened once per process."""
        with self.state("locks") as folder:
            return LockFile.of(folder, f"{kind}-{readable_place(subject, subject)}.lock")

    def folder_lock(self, name: str) -> LockFile:
        """The lock of a directory; two names that are one directory on a CIFS share have one lock."""
        return self.lock_file("dir", folded(name))

    def copy_lock(self, folder: str, name: str, shared: bool) -> ContextManager[bool]:
        """Inside, and if true, nobody removes that copy (shared: many can read it), or nobody reads it."""
        byte = 1 + zlib.crc32(name.encode("utf-8", "surrogateescape")) % (1 << 30)
        return self.lock_file("read", folded(folder)).held(byte, shared)

    def copy_again(self, copy: Copy) -> Copy:
        """The copy as it is now, what was learned of its VM from elsewhere kept; NotThere if it is gone."""
        with self.root.child(copy.folder) as folder:
            now = read_copy(folder, copy.folder, copy.name, copy.taken_at, copy.is_old)
            now = now._replace(uuid=now.uuid or copy.uuid, pin=copy.pin, accused=copy.accused)
            return resting(self.with_checks(now), lambda name: self.with_checks(
                copy_beside(folder, copy.folder, name)), self._fails)

    def images_of(self, folder_name: str, name: str) -> Tuple[str, ...]:
        with contextlib.suppress(NotThere), self.root.child(folder_name) as folder:
            return read_copy(folder, folder_name, name, *parse_copy_name(name)).images
        return ()

    def _looked_at(self, copy: Copy) -> Copy:
        """The copy; of the full of a chain is also looked at whether it is what was verified."""
        if copy.layer is None or copy.is_increment or copy.checked("verdict") != GOOD:
            return copy
        with contextlib.suppress(CatalogError):
            return copy._replace(is_changed=self.look_of(copy) != copy.checks.get("look"))
        return copy._replace(is_changed=True)

    def _fails(self, copy: Copy, holder: Copy) -> bool:
        """Is any block that the copy needs of the other among those that a check has found damaged there? All
        may be, where these are not known, unless the copy itself was proven since."""
        bad = holder.checks.get("bad")
        with contextlib.suppress(CatalogError, VerificationError, ValueError):
            if copy.vouches_against(holder) and self.look_of(copy) == copy.checks.get("look"):
                return False
            check_shape(bad, {"*": [[int]]})
            with self.open_copy(copy) as inside:
                for disk in parse_manifest(inside.read(MANIFEST))["disks"]:
                    spans = sorted(bad.get(disk.get("key"), ()))
                    for row in disk_rows(inside, disk) if spans else ():
                        if row.holder == holder.name and is_in_spans(row.number, spans):
                            return True
                        if not spans:
                            break
            return False
        return True

    def is_sealed(self, folder_name: str, name: str) -> bool:
        with contextlib.suppress(NotThere, WrongKind), self.root.child(folder_name) as folder, \
                folder.child(name) as inside:
            return inside.status(SUCCESS) is not None
        return False

    def condemned(self, since_s: float) -> Set[str]:
        """The directories with a copy that a check has found bad since then, in seconds since 1970."""
        found = set()                      # type: Set[str]
        for folder, name in self.in_state(VERDICT_FOLDER):
            status = folder.status(name)
            if status is not None and status.st_mtime >= since_s:
                with contextlib.suppress(NotThere, WrongKind, ValueError):
                    facts = parse_object(folder.read(name, MEBIBYTE))
                    if {told(facts, key) for key in ("verdict", "drill", "audit")}.intersection(
                            (DAMAGED, NOT_RESTORABLE, SUSPECT)):
                        found.add(told(facts, "folder"))
        return found

    def open_copy(self, copy: Copy) -> Directory:
        """The copy's directory; NotThere if it is gone."""
        with self.root.child(copy.folder) as folder:
            return folder.child(copy.name)

    def clear_temporaries(self, now_s: float) -> None:
        """What a run that died within `put` left in the program's own state is gone a day later."""
        def clear(folder: Directory) -> None:
            for name in folder.names():
                status = folder.status(name) if name.endswith(TEMPORARY) else None
                if status is not None and now_s - status.st_mtime > DAY_S:
                    folder.remove_file(name)
                if "." not in name and folder.is_directory(name):      # of no other file is anything asked
                    with folder.child(name) as inner:
                        clear(inner)

        with contextlib.suppress(NotThere), self.root.child(STATE_FOLDER) as state:
            clear(state)

    # --- listing ----------------------------------------------------------------------

    def folder_names(self, problems: Optional[List[CatalogError]] = None,
                     strangers: Optional[List[str]] = None) -> List[str]:
        """The directories that can be a VM's, by name. What can't be looked at is only among the problems,
        what is neither one nor ours among the strangers."""
        found = []
        for name in self.root.names():
            try:
                if name == STATE_FOLDER or name.upper().startswith("METADATA_"):
                    continue
                if not name.startswith(".") and self.root.is_directory(name):
                    found.append(name)
                elif strangers is not None:
                    strangers.append(name)
            except CatalogError as error:
                if problems is not None:
                    problems.append(error)
        return found

    def folder(self, name: str) -> Folder:
        """What is in a VM's directory; an absent one is empty. CatalogError if it can't be listed. What in it
        can't be looked at is what its name says, and a copy that is unreadable."""
        copies, unfinished, strangers = [], [], []
        try:
            with contextlib.suppress(NotThere), self.root.child(name) as folder:
                names = folder.names()
                for item in names:
                    parsed, is_directory = parse_copy_name(item), True
                    with contextlib.suppress(CatalogError):
                        is_directory = folder.is_directory(item)
                    if is_directory and parsed is not None:
                        with contextlib.suppress(NotThere):    # gone meanwhile: another run is at work here
                            copy = self.with_checks(read_copy(folder, name, item, *parsed))
                            copies.append(copy._replace(
                                pin=pin_text(folder, item) if item + PIN in names else ""))
                    elif is_directory and is_unfinished_name(item):
                        unfinished.append(item)
                    elif not (item.endswith(PIN) and item[:-len(PIN)] in names
                              and parse_copy_name(item[:-len(PIN)])):
                        strangers.append(item)
        except WrongKind:
            raise WrongKind(f"{self.path}/{name} is not a directory, and is in the way of backups: move it.")
        copies = with_accusations(copies)
        by_name = {copy.name: copy for copy in copies}
        rested = [resting(self._looked_at(copy), by_name.get, self._fails) for copy in copies]
        return Folder(name, tuple(rested), tuple(unfinished), tuple(strangers))

    def increments_in(self, name: str) -> Iterator[Copy]:
        """The increments in that directory, as their manifests tell."""
        with self.root.child(name) as folder:
            for item in folder.names():
                parsed = parse_copy_name(item)
                if parsed and folder.is_directory(item):
                    with folder.child(item) as inside:
                        is_one = inside.status(RESTORE_TEXT) is not None
                    if is_one:
                        yield resting(read_copy(folder, name, item, *parsed),
                                      functools.partial(copy_beside, folder, name), lambda *_: False)

    def has_unfinished(self, name: str) -> bool:
        """Is there a .partial or .deleting in that VM's directory? CatalogError if it can't be listed."""
        with contextlib.suppress(NotThere), self.root.child(name) as folder:
            return any(is_unfinished_name(item) for item in folder.names())
        return False

    # --- what later checks found: a small file a copy, as sealed copies are never written again ---

    def with_checks(self, copy: Optional[Copy]) -> Optional[Copy]:
        """The copy with what is on record of later checks; unreadable if that can't be known now."""
        try:
            return copy and copy._replace(checks=self._checks(copy))
        except CatalogError as error:
            return copy._replace(problem=copy.problem or "whether a check has condemned it can't be read "
                                                         "now: " + str(error).rstrip("."), is_unreadable=True)

    def _checks(self, copy: Copy) -> Dict[str, Any]:
        """What is on record about the copy, {} if nothing. It belongs to its manifest, not to its name."""
        self._verdicts = self._verdicts or self.state_if_there(VERDICT_FOLDER)       # opened once for all
        with contextlib.suppress(NotThere, WrongKind, ValueError):
            if self._verdicts is not None and copy.mark:
                return parse_object(self._verdicts.read(copy.mark[:32] + ".json", MEBIBYTE))
        return {}

    def record(self, copy: Copy, **facts: Any) -> None:
        """The facts are on record beside earlier ones; CatalogError if the store can't be written."""
        for key in [key for key in facts if key.endswith("_at")]:      # which of two in a second came first
            facts[key[:-2] + "s"] = round(Clock.utc().timestamp(), 3) + 0.0
        before = self._checks(copy)
        text = dict(before, folder=copy.folder, copy=copy.name, **facts)
        if before.get("audit") == SUSPECT:                 # no later audit can lift that
            text.update((key, before[key]) for key in before if key.startswith("audit"))
        with self.state(VERDICT_FOLDER) as folder:
            folder.put(copy.mark[:32] + ".json", json_line(text))

    def last_drills(self) -> Dict[str, str]:
        """When a copy of each directory was last drilled; a copy that is gone since counts too."""
        found = {}                         # type: Dict[str, str]
        for folder, name in self.in_state(VERDICT_FOLDER):
            with contextlib.suppress(CatalogError, ValueError):
                facts = parse_object(folder.read(name, MEBIBYTE))
                place = told(facts, "folder")
                found[place] = max(told(facts, "drilled_at"), found.get(place, ""))
        return found

    def look_of(self, copy: Copy, seen: Optional[Dict[str, List[Any]]] = None) -> str:
        """A digest of names, sizes and times of all files of the copy, and of the images that hold its
        blocks: it changes when any is written. `seen`: what was seen of others of its directory."""
        seen = {} if seen is None else seen

        def look(folder: Directory, place: str) -> Iterator[Tuple[Any, ...]]:
            for name in folder.names():
                status = folder.status(name)
                if status is not None and stat.S_ISDIR(status.st_mode):
                    with folder.child(name) as inner:
                        yield from look(inner, name + "/")
                elif status is not None:
                    yield place + name, status.st_size, status.st_mtime_ns

        with self.open_copy(copy) as inside:
            rows = list(look(inside, ""))
            for name in sorted(copy.layer.held_by) if copy.layer else ():
                if name not in seen:
                    with inside.child("..") as folder, folder.child(name) as holder:
                        found = ((image, holder.status(image)) for image in holder.names()
                                 if IMAGE_NAME.fullmatch(image))
                        seen[name] = [(f"{name}/{image}", status.st_size, status.st_mtime_ns)
                                      for image, status in found if status is not None]
                rows += seen[name]
        return hashlib.sha256(json.dumps(rows).encode("ascii")).hexdigest()

    # --- making ------------------------------------------------------------------------

    def new_copy(self, folder_name: str, local: datetime) -> "NewCopy":
        parent = self.root.child_made_if_missing(folder_name)
        return NewCopy(parent, free_copy_name(local, parent.names()))

    def new_pool_dump(self, folder_name: str, local: datetime, dump: Callable[[int], None]) -> str:
        """The name of a new, complete dump that `dump` wrote into the descriptor it was given."""
        with self.folder_lock(folder_name).held() as is_ours:
            if not is_ours:
                raise BackupError(f"{folder_name} is in use by another run; no dump was made. The next run "
                                  "makes one.")
            with self.root.child_made_if_missing(folder_name) as folder:
                for name in folder.names():
                    if POOL_DUMP.fullmatch(name[:-len(PARTIAL)]) and name.endswith(PARTIAL):
                        folder.remove_file(name)               # of a run that died: the lock is ours
                while folder.status(local.strftime(POOL_DUMP_STAMP)) is not None:
                    local += timedelta(seconds=1)
                name = local.strftime(POOL_DUMP_STAMP)
                try:
                    dump(folder.create(name + PARTIAL))
                    folder.rename(name + PARTIAL, name)
                except BaseException:      # whatever ended it, half a dump must not stay
                    folder.remove_file(name + PARTIAL)
                    raise
                return name

    def pool_dumps(self, folder_name: str,
                   problems: Optional[List[CatalogError]] = None) -> List[Tuple[str, str]]:
        """The complete dumps, oldest first, each with the uuid of its pool, "" if it tells none, or can't be
        read (why is among the problems); none if there is no such directory."""
        found = []
        with contextlib.suppress(NotThere), self.root.child(folder_name) as folder:
            for name in filter(POOL_DUMP.fullmatch, folder.names()):
                try:
                    if folder.read_part(name, KIBIBYTE, at_end=True).rstrip().endswith(b"</database>"):
                        found.append((name, pool_of_dump(folder, name)))
                except (NotThere, WrongKind):
                    continue
                except CatalogError as error:      # one that can't be read costs no other
                    found.append((name, ""))
                    if problems is not None:
                        problems.append(error)
        return found

    # --- the last plan of each config: which VMs it had ------------------------------------

    def plans(self) -> List[Dict[str, Any]]:
        """Those on record; what can't be read, or is none of this version's, is as if it were not there,
        unless the storage is to blame."""
        found = []
        for folder, name in self.in_state(PLAN_FOLDER):
            try:
                plan = parse_object(folder.read(name, 16 * MEBIBYTE))
                check_shape(plan, PLAN_SHAPE)
                for at in [plan["at"], *filter(None, plan["vms"].values())]:
                    parse_utc(at)
                found.append(plan)
            except StorageMisbehaved:
                raise
            except (CatalogError, ValueError):
                continue
        return found

    def put_plan(self, plan: Dict[str, Any]) -> None:
        place = f"{plan['pool']}/{plan['host']}/{plan['config']}"
        digest = hashlib.sha256(place.encode("utf-8", "surrogateescape"))
        with self.state(PLAN_FOLDER) as folder:
            folder.put(digest.hexdigest()[:32] + ".json", json_line(plan))

    # --- ledgers: what stays in a pool between runs -------------------------------------

    def _ledger_folder(self, pool: str) -> Directory:
        """Where the ledgers of that pool lie; NotThere if there are none."""
        with self.root.child(STATE_FOLDER) as state, state.child(REFERENCE_FOLDER) as references:
            return references.child(safe_name(pool))

    def ledger(self, pool: str, vm: str, kind: str) -> Optional["Ledger"]:
        """The ledger of that VM and kind, None if there is none; BadLedger if it can't be read or used."""
        return self._read_ledger(pool, f"{safe_name(vm)}-{kind}.json")

    def ledgers(self, pool: str) -> Tuple[List["Ledger"], List["BadLedger"]]:
        """All ledgers of that pool, and why others can't be used."""
        found, problems = [], []
        with contextlib.suppress(NotThere), self._ledger_folder(pool) as folder:
            for name in folder.names():
                try:
                    ledger = self._read_ledger(pool, name) if name.endswith(".json") else None
                    found += [ledger] if ledger else []
                except BadLedger as problem:
                    problems.append(problem)
        return found, problems

    def _read_ledger(self, pool: str, name: str) -> Optional["Ledger"]:
        place = f"{self.path}/{STATE_FOLDER}/{REFERENCE_FOLDER}/{safe_name(pool)}/{name}"
        try:
            with self._ledger_folder(pool) as folder:
                ledger = parse_ledger(folder.read(name, MEBIBYTE))
            if name != ledger.file_name or ledger.pool != pool:
                raise ValueError("it is that of another VM or pool")
            return ledger
        except NotThere:
            return None
        except (CatalogError, ValueError) as error:
            raise BadLedger(f"{place}, the record of a snapshot that stays in the pool for keep_reference, "
                            f"can't be used: {str(error).rstrip('.')}. Nothing of that VM's references "
                            "is used or removed. If the file can't be put right, remove it; the next run "
                            "then lists the snapshots with the commands that remove them.")

    def put_ledger(self, ledger: "Ledger") -> None:
        facts = dict(ledger._asdict(), format=LEDGER_FORMAT,
                     current=ledger.current and ledger.current._asdict(),
                     leaving=[one._asdict() for one in ledger.leaving])
        content = json.dumps(facts, indent=1, sort_keys=True)
        with self.state(REFERENCE_FOLDER) as references, \
                references.child_made_if_missing(safe_name(ledger.pool)) as folder:
            if ledger.current or ledger.leaving or ledger.distrust:
                folder.put(ledger.file_name, (content + "\n").encode("ascii"))
            else:
                folder.remove_file(ledger.file_name)
                folder.sync()

    # --- pins: files beside the copies, whose names alone pin -----------------------------

    def pin(self, copy: Copy, text: str) -> bool:
        """The copy is pinned, in a file with that text; false if it was already. NotThere if it is gone."""
        with self.root.child(copy.folder) as folder, \
                self.copy_lock(copy.folder, copy.name, shared=True) as is_free:
            if not is_free or not folder.is_directory(copy.name):
                raise NotThere(f"{copy.folder}/{copy.name} is being removed just now: pin another; `list` "
                               "shows them.")
            try:
                with contextlib.suppress(StorageFull):         # then its name pins, if that could be made
                    folder.write(copy.name + PIN, text.encode("utf-8", "surrogateescape"))
            except NameTaken:
                return False
            folder.sync()
            if folder.status(copy.name + PIN) is None:
                raise StorageFull(f"{copy.folder}/{copy.name} is not pinned: no file can be made on the full "
                                  "store. Free space there, then pin it again.")
            return True

    def unpin(self, copy: Copy) -> None:
        with self.root.child(copy.folder) as folder:
            folder.remove_file(copy.name + PIN)
            folder.sync()

    # --- removing ----------------------------------------------------------------------

    def remove_copy(self, copy: Copy) -> str:
        """The copy is gone: from its name in one step, then from the disk. Else why it is left, in words."""
        self.check_in_place()
        with self.root.child(copy.folder) as folder:
            if parse_copy_name(copy.name) is None or not folder.is_directory(copy.name):
                raise CatalogError(f"{copy.folder}/{copy.name} is not a copy's directory; it is left.")
            with self.copy_lock(copy.folder, copy.name, shared=False) as is_free:
                if not is_free:
                    return "is being read by a restore or drill"
                if folder.status(copy.name + PIN) is not None:
                    return "was pinned just now"
                folder.rename(copy.name, copy.name + DELETING)
                folder.remove_tree(copy.name + DELETING)
                folder.sync()
                return ""

    def remove_unfinished(self, folder_name: str, name: str) -> None:
        with self.root.child(folder_name) as folder:
            if not is_unfinished_name(name):
                raise CatalogError(f"{folder_name}/{name} is not an unfinished copy; it is left.")
            folder.remove_tree(name)
            folder.sync()

    def newest_change_s(self, folder_name: str, name: str) -> float:
        """When anything in that directory was last written, in seconds of the storage's clock."""
        with self.root.child(folder_name) as folder, folder.child(name) as inner:
            statuses = [status_of(inner.fd)] + [inner.status(item) for item in inner.names()]
        return max(status.st_mtime for status in statuses if status)


# --- ledgers ------------------------------------------------------------------------------


class BadLedger(CatalogError):
    """A ledger can't be read, or is none that this version writes: of its VM nothing is known."""


class Reference(NamedTuple):
    """A snapshot of ours, of a VM or of a disk, that stays in the pool, as the state of a copy there: `copy`
    is its name, `blocks` the SHA-256 of its list of blocks, `at` the UTC time of it. `disks`: of each disk,
    by its name in `blocks`, uuid, size in bytes and uuid of the SR of its snapshot."""
    uuid: str
    name: str
    copy: str
    blocks: str
    at: str
    disks: Mapping[str, Mapping[str, Any]]


class Ledger(NamedTuple):
    """What of a VM and kind stays in a pool between runs: the reference, and those that are on their way out.
    `store` and `inode` tell which store's it is, `config` and `host` who keeps it; `folder` is the VM's
    directory. `distrust`: why no difference of this VM is believed any more, "" if they are."""
    store: str
    inode: int
    pool: str
    config: str
    host: str
    kind: str
    vm: str
    vm_name: str
    folder: str
    current: Optional[Reference] = None
    leaving: Tuple[Reference, ...] = ()
    distrust: str = ""

    @property
    def file_name(self) -> str:
        return f"{safe_name(self.vm)}-{self.kind}.json"

    @property
    def title(self) -> str:
        return f"{quote_name(self.vm_name)} ({self.vm[:8]})"

    @property
    def references(self) -> Tuple[Reference, ...]:
        return self.leaving + ((self.current,) if self.current else ())


def parse_ledger(content: bytes) -> Ledger:
    """The ledger; ValueError with a sentence if this version did not write it."""
    facts = parse_object(content)
    check_shape(facts.get("format"), int, "format")
    if facts["format"] > LEDGER_FORMAT:
        raise ValueError("it is of a format that only a newer VmBackup knows: use that one")
    check_shape(facts, LEDGER_SHAPE)
    if facts.get("current") is not None:
        check_shape(facts["current"], REFERENCE_SHAPE, "current")
    Method(facts["kind"])

    def reference(row: Dict[str, Any]) -> Reference:
        parse_utc(row["at"])
        return Reference(*(row[field] for field in Reference._fields))

    return Ledger(*(facts[field] for field in Ledger._fields[:9]),
                  current=facts.get("current") and reference(facts["current"]),
                  leaving=tuple(map(reference, facts["leaving"])), distrust=facts["distrust"])


def reference_problem(ledger: Optional[Ledger], identity: Mapping[str, Any], newest: Optional[Copy]) -> str:
    """Why the ledger's reference can't be read against, "" if by what the store tells it can. The sentences
    hold nothing that changes from night to night, as they are compared."""
    if ledger is None or ledger.current is None and not ledger.distrust:
        return "there is no reference in the pool"
    if not is_of_store(ledger, identity):
        return "the reference is another store's"
    if ledger.distrust:
        return ledger.distrust
    if newest is None or newest.layer is None or newest.name != ledger.current.copy \
            or newest.folder != ledger.folder:
        return "the reference is not the state of the newest good copy"
    return ""


DISTRUST = "its audit found that a difference left out what had changed; forget-references lets " \
    "differences be used again"


def distrust_of(ledger: Ledger, copies: Iterable[Copy]) -> str:
    """Why no difference of the VM with that ledger and these copies is believed, "" if they are. A ledger
    that could not be written when an audit failed names one of the copies that this made SUSPECT."""
    current = ledger.current.copy if ledger.current else ""
    return ledger.distrust or DISTRUST * any(copy.name == current and copy.suspicion for copy in copies)


def is_of_store(ledger: Ledger, identity: Mapping[str, Any]) -> bool:
    """Is it a ledger of the store with that identity, and no copy that came from another?"""
    return (ledger.store, ledger.inode) == (identity["store"], identity["inode"])


# --- whose the copies are ---------------------------------------------------------------


class Placement:
    """Which directory belongs to which VM: that whose copies bear its uuid and pool. Each is read once, and
    again under its lock."""

    def __init__(self, catalog: Catalog, pool: str, names: Iterable[str],
                 planned: Mapping[str, str] = {}) -> None:
        """`names` are those of all VMs of the pool, whose uuid is `pool`; `planned`: the directories of a
        round's plan, by uuid."""
        self._catalog = catalog
        self._pool = pool
        self._names = collections.Counter(names)
        self._planned = planned
        self._claims = {folded(name): uuid for uuid, name in planned.items()}
        self._folders = {}                 # type: Dict[str, Folder]
        self._spellings = None             # type: Optional[Dict[str, List[str]]]
        self._bearers = None               # type: Optional[Dict[str, List[str]]]

    def claim_all(self, machines: Iterable[VirtualMachine]) -> None:
        """Every VM of the run has its directory; of those of one name the lowest uuid has the plain one."""
        for machine in sorted(machines, key=lambda one: one.uuid):
            with contextlib.suppress(CatalogError):            # that VM's job meets it again, and tells it
                self.folder_name(machine)

    def folder_name(self, machine: VirtualMachine) -> str:
        """The directory of that VM, as the store was when read; CatalogError if one of its name can't be."""
        planned = self._planned.get(machine.uuid)
        if planned is not None and self._is_free(planned, machine):
            return planned
        new = (safe_name(machine.name), newcomer_name(machine.name, machine.uuid))
        name = self._owned(machine) or next((name for name in new if self._is_free(name, machine)),
                                            newcomer_name(machine.name, self._pool))   # another pool's has it
        self._claims[folded(name)] = machine.uuid
        return name

    @property
    def known(self) -> Set[str]:
        return set(self._folders)

    def folder(self, name: str) -> Folder:
        return self._folders[name] if name in self._folders else self.look_again(name)

    def snapshots_of(self, machines: Iterable[VirtualMachine]) -> Set[str]:
        """The uuids of the snapshots of disks that copies in the directories of these VMs were made of."""
        found = set()                      # type: Set[str]
        for machine in machines:
            with contextlib.suppress(CatalogError):            # that VM's job meets it again, and tells it
                found.update(uuid for copy in self.folder(self.folder_name(machine)).copies
                             for uuid in copy.snapshots)
        return found

    def look_again(self, name: str) -> Folder:
        """The directory as it is now, for its owner to be told anew: call it with its lock held."""
        self._folders.pop(name, None)
        self._folders[name] = self._catalog.folder(name)
        return self._folders[name]

    def _owned(self, machine: VirtualMachine) -> Optional[str]:
        names = own_folder_names(machine.name, machine.uuid, self._pool)
        for name in itertools.chain(names, self._bearing(machine.uuid)):
            copies = self.own_view(self.folder(name), machine)
            if any(copy.uuid == machine.uuid and not copy.aside for copy in copies):
                return name
        return None

    def _bearing(self, uuid: str) -> Iterator[str]:
        if self._bearers is None:          # only a VM that is new here, or was renamed, costs this
            bearers = {}                   # type: Dict[str, List[str]]
            for name in itertools.chain(*self._spelled().values()):
                try:
                    uuids = {copy.uuid for copy in self.folder(name).copies}
                except StorageMisbehaved:          # it will tell another night: nobody begins anew for that
                    raise
                except CatalogError:               # a directory that we may not list is nobody's
                    continue
                for one in uuids:
                    bearers.setdefault(one, []).append(name)
            self._bearers = bearers
        yield from self._bearers.get(uuid, ())

    def _spelled(self) -> Dict[str, List[str]]:
        """The store's directories by their folded names."""
        if self._spellings is None:
            self._spellings = {}
            for name in self._catalog.folder_names():
                self._spellings.setdefault(folded(name), []).append(name)
        return self._spellings

    def _is_free(self, name: str, machine: VirtualMachine) -> bool:
        """Has no other VM that directory? CatalogError where a copy in it can't be read."""
        if self._claims.get(folded(name), machine.uuid) != machine.uuid:
            return False
        copies = [copy for spelling in {name}.union(self._spelled().get(folded(name), ()))
                  for copy in self.own_view(self.folder(spelling), machine)]
        for copy in copies:
            if copy.is_unreadable:
                raise CatalogError(f"which VM the directory {name} belongs to can't be told: {copy.name}: "
                                   f"{copy.problem}. Nothing was written there: put that copy right, or move "
                                   "it elsewhere.")
        return not any(copy.uuid != machine.uuid or copy.pool not in ("", self._pool) for copy in copies)

    def own_view(self, folder: Folder, machine: VirtualMachine) -> List[Copy]:
        return as_seen_by(Owner(machine.uuid, self._pool, machine.name, self._names[machine.name] == 1),
                          folder.name, folder.copies)


class StoredVm(NamedTuple):
    """The copies of one VM (uuid and pool) and kind in one directory. `around`: all that lie there, oldest
    first, as retention for this VM sees them; `has_unfinished`: and ones that are not finished."""
    folder: str
    uuid: str
    pool: str
    method: Optional[Method]
    around: Tuple[Copy, ...]
    has_unfinished: bool = False

    @property
    def copies(self) -> Tuple[Copy, ...]:
        return tuple(copy for copy in self.around
                     if (copy.uuid, copy.pool, copy.method) == (self.uuid, self.pool, self.method))

    @property
    def name(self) -> str:
        return next((copy.vm_name for copy in reversed(self.copies) if copy.vm_name), self.folder)

    @property
    def title(self) -> str:
        return (f"{quote_name(self.name)} ({self.uuid[:8] or 'uuid unknown'}), "
                f"{self.method.value if self.method else 'kind unknown'}")

    def bears(self, vm: str) -> bool:
        if vm.startswith("uuid:"):
            return self.uuid == vm[len("uuid:"):].lower()
        return vm in (self.name, self.folder) or any(copy.vm_name == vm for copy in self.copies)


def stored_in(folder: Folder) -> List[StoredVm]:
    """The VMs of that directory. Whose the copies are that tell no uuid only the pool knows."""
    def only(told: Set[str]) -> Set[str]:
        """What is told; where that is one, what tells nothing goes with it."""
        return told - {""} if len(told - {""}) == 1 else told

    found = []
    for uuid in sorted(only({copy.uuid for copy in folder.copies})):
        seen = as_seen_by(Owner(uuid, ""), folder.name, folder.copies)
        for pool in sorted(only({copy.pool for copy in seen if copy.uuid == uuid})):
            around = tuple(as_seen_by(Owner(uuid, pool), folder.name, folder.copies))
            methods = {copy.method for copy in around if (copy.uuid, copy.pool) == (uuid, pool)}
            found += [StoredVm(folder.name, uuid, pool, method, around, bool(folder.unfinished))
                      for method in sorted(methods, key=lambda method: method.value if method else "")]
    return found


class Listing(NamedTuple):
    """What stands in the store. `strangers`: what is no copy; `problems`: why something can't be listed."""
    vms: List[StoredVm]
    strangers: List[str]
    problems: List[CatalogError]

    @property
    def misbehaved(self) -> List[CatalogError]:
        """The problems for which the storage is to blame, and not somebody else's directory."""
        return [problem for problem in self.problems if isinstance(problem, StorageMisbehaved)]


def list_store(catalog: Catalog) -> Listing:
    """All of the store, read once. What can't be listed costs only itself."""
    found = Listing([], [], [])
    for name in catalog.folder_names(found.problems, found.strangers):
        try:
            folder = catalog.folder(name)
        except CatalogError as error:
            found.problems.append(error)
            continue
        found.vms.extend(stored_in(folder))
        found.strangers.extend(f"{name}/{item}" for item in folder.strangers)
        found.strangers.extend(f"{name}/{item} (unfinished)" for item in folder.unfinished)
    return found


# --- dumps of the pool database ----------------------------------------------------------


def pool_of_dump(folder: Directory, name: str) -> str:
    """The uuid of the pool whose database the dump holds, "" if it does not tell. The tables stand in the
    order of their names (ocaml/database/db_xml.ml@v24.19.2), the large ones before `pool`: so it is looked
    for from the end. In a value each blank is written as `%.`, so ` uuid=` begins the row's own."""
    table = b'<table name="pool">'
    with open(folder.open_file(name), "rb") as file, storage_errors(f"reading {folder.shown}/{name}"):
        end = os.fstat(file.fileno()).st_size
        for begin in range(end - end % MEBIBYTE, -1, -MEBIBYTE):
            file.seek(begin)
            at = file.read(MEBIBYTE + len(table) - 1).rfind(table)
            if at >= 0:
                file.seek(begin + at)
                rows = file.read(16 * MEBIBYTE).partition(b"</table>")[0]
                match = re.search(rb' uuid="([0-9a-f-]{36})"', rows)
                return match.group(1).decode("ascii") if match else ""
    return ""


# --- one copy ------------------------------------------------------------------------


def pin_text(folder: Directory, name: str) -> str:
    """That a copy is pinned, and why, as the pin's first line tells where it can be read."""
    why = ""
    with contextlib.suppress(CatalogError):
        why = folder.read_part(name + PIN, KIBIBYTE).decode("utf-8", "replace").partition("\n")[0].strip()
    return f"pinned: {one_line(why)}" if why else "pinned"


def read_copy(parent: Directory, folder_name: str, name: str, taken_at: datetime, is_old: bool) -> Copy:
    """The copy in that directory; what can't be read of it is its `problem`. NotThere if it is gone."""
    blank = Copy(folder_name, name, taken_at, is_old, None, "", "", 0, None, None, "", 0, "")
    try:
        with parent.child(name) as inside:
            if inside.status(MANIFEST) is not None:
                copy = _read_own_copy(inside, blank)
            elif is_old:
                copy = _read_old_copy(inside, blank)
            else:
                copy = blank._replace(uuid=_old_uuid(inside), problem="it has no " + MANIFEST)
    except (NotThere, WrongKind) as error:
        if parent.status(name) is None:
            raise
        return blank._replace(problem=str(error).rstrip("."))
    except CatalogError as error:                  # the storage is what is wrong, not the copy
        return blank._replace(problem=f"it can't be read now: {str(error).rstrip('.')}", is_unreadable=True)
    # one that does not tell was made here, if this is a directory of its VM's name
    names = () if copy.home else own_folder_names(copy.vm_name, copy.uuid, copy.pool)
    return copy._replace(home=folder_name) if folded(folder_name) in map(folded, names) else copy


def resting(copy: Copy, find: Callable[[str], Optional[Copy]], fails: Callable[[Copy, Copy], bool]) -> Copy:
    """The copy, and which holder of its blocks fails it; `find` gives a copy by its name, and `fails` tells
    whether one that was found damaged is so where the copy needs it."""
    for name, mark in copy.layer.holders if copy.layer else ():
        holder, title = find(name), f"{name}, which holds blocks of it,"
        if holder is None:
            return copy._replace(broken=f"{title} is not there")
        if holder.is_unreadable:
            return copy._replace(broken=f"{title} {holder.problem}", is_unreadable=True)
        if holder.mark != mark:
            return copy._replace(broken=f"{title} is not the copy that it was")
        if holder.problem:
            return copy._replace(broken=f"{title} is not whole: {holder.problem}")
        if holder.is_doubtful and fails(copy, holder):
            return copy._replace(broken=f"{title} fails it: {holder.verdict}")
    return copy


def copy_beside(parent: Directory, folder_name: str, name: str) -> Optional[Copy]:
    """The copy of that name in the directory, None if it is gone."""
    with contextlib.suppress(NotThere):
        return read_copy(parent, folder_name, name, *parse_copy_name(name))
    return None


def is_in_spans(number: int, spans: List[List[int]]) -> bool:
    """Is the number in one of these spans (first, number)? Those before it are gone then: numbers are asked
    for in order, in which the spans are, too."""
    while spans and sum(spans[0]) <= number:
        spans.pop(0)
    return bool(spans) and spans[0][0] <= number


def disk_rows(inside: Directory, disk: Mapping[str, Any], name: str = BLOCKS) -> Iterator[Row]:
    """The rows of a disk of a manifest, in the copy that is open; opened once the first is asked for."""
    yield from rows_of(open(inside.open_file(name), "rb"), disk["key"], disk["begin"], disk["end"])


def _read_own_copy(inside: Directory, blank: Copy) -> Copy:
    """A copy with a manifest; of a later version's, which is left as it is, what it says as ours does."""
    raw = inside.read(MANIFEST)
    copy = blank._replace(is_old=False, mark=hashlib.sha256(raw).hexdigest())
    try:
        manifest = parse_manifest(raw)
    except NewerManifest as error:
        manifest, copy = error.manifest, copy._replace(is_newer=True, problem=str(error))
    except ValueError as error:
        return copy._replace(uuid=_old_uuid(inside), problem=f"{MANIFEST} is damaged: {error}")
    sequence, written_at = manifest.get("sequence"), None
    with contextlib.suppress(ValueError):
        written_at = parse_utc(told(manifest, "taken_at"))
    copy = copy._replace(
        uuid=told(manifest, "vm", "uuid") or _old_uuid(inside), vm_name=told(manifest, "vm", "name"),
        sequence=sequence if isinstance(sequence, int) and 0 <= sequence < MOST_COPIES else 0,
        written_at=written_at,
        pool=told(manifest, "pool", "uuid"), home=told(manifest, "folder"))
    if copy.is_newer:
        return copy
    images, problem = [], ""
    for image in manifest["images"]:
        stored, wrong = find_stored_image(inside, image["name"], image["size"])
        images.append(stored or image["name"])
        problem = problem or wrong
    if inside.status(SUCCESS) is None:
        problem = f"the marker `{SUCCESS}` is not there"
    return copy._replace(
        method=Method(manifest["kind"]), image=images[0], images=tuple(images), round=told(manifest, "round"),
        size_bytes=sum(image["size"] for image in manifest["images"]), problem=problem,
        layer=layer_of(manifest), read_back=manifest.get("verified", {}).get("read_back") is True,
        disks=disk_words(manifest["disks"]),
        snapshots=tuple(disk["snapshot_uuid"] for disk in manifest["disks"]),
        reading=tuple((disk["key"], told(disk, "how"), told(disk, "why"))
                      for disk in (manifest["disks"] if "layer" in manifest else ())),
        audit=(told(manifest, "layer", "audit", "found"), audited_copies(manifest)),
        left_out=disk_words(manifest.get("left-out", ())),
        # those of earlier versions tell a number only
        rules=rules_of(manifest.get("rules", {"newest": manifest["copies_to_keep"]}),
                       told(manifest, "config")),
        other_rules=tuple((rules_of(row["rules"], row["config"]), row["at"])
                          for row in manifest.get("other-rules", ())))


def audited_copies(manifest: Dict[str, Any]) -> Tuple[str, ...]:
    """The names of the copies that the audit of the copy with that manifest is about."""
    audit = (manifest.get("layer") or {}).get("audit")
    names = audit.get("copies") if isinstance(audit, dict) else None
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


def layer_of(manifest: Dict[str, Any]) -> Optional[Layer]:
    """The place in its chain of the copy with that manifest."""
    layer = manifest.get("layer")
    return layer and Layer(layer["depth"], layer["full"], layer["base"], layer["why"],
                           tuple((holder["copy"], holder["manifest"]) for holder in layer["holders"]),
                           layer["is_first"])


def disk_words(rows: Sequence[Dict[str, Any]]) -> Tuple[str, ...]:
    """Those disks of a manifest in words: device and size."""
    return tuple(f"{one_line(disk['device'])} {format_size(disk['virtual_size'])}" for disk in rows)


def rules_of(numbers: Dict[str, int], config: str) -> Rules:
    """Those rules of a manifest."""
    return Rules(*(max(0, int(numbers.get(name, 0))) for name in RULE_NAMES), config=config)


def find_stored_image(inside: Directory, name: str, size_bytes: int) -> Tuple[str, str]:
    """The image's name now (a storage host may have made NAME.gz or .zst of it), and what is wrong."""
    status = inside.status(name)
    if status is not None:
        if not stat.S_ISREG(status.st_mode):
            return "", f"{name} is not a regular file"
        if status.st_size != size_bytes:
            return "", f"{name} has {status.st_size} bytes instead of {size_bytes}"
        return name, ""
    for suffix, magic in COMPRESSED_MAGIC:
        if inside.status(name + suffix) is None:
            continue
        if inside.read_part(name + suffix, len(magic)) == magic:
            return name + suffix, ""
        return "", f"{name}{suffix} is not a {suffix[1:]} file"
    return "", f"the image {name} is not there"


def image_format(name: str) -> str:
    """xva, raw or vhd, as an image's name says."""
    return re.search(r"\.(xva|raw|vhd)(\.gz|\.zst)*$", name).group(1)      # also of one compressed again


def _read_old_copy(inside: Directory, blank: Copy) -> Copy:
    """A copy that the older program wrote: known by its marker and its image."""
    names = inside.names()
    statuses = ((name, inside.status(name)) for name in names if IMAGE_NAME.fullmatch(name))
    sizes = {name: status.st_size for name, status in statuses if status and stat.S_ISREG(status.st_mode)}
    image = max(sorted(sizes), key=lambda name: sizes[name], default="")
    copy = with_old_image(inside, blank, image, sizes[image]) if image \
        else blank._replace(uuid=_old_uuid(inside))
    problem = ""
    if not any(marker in names for marker in OLD_MARKERS):
        problem = "the older program did not mark it as a success"
    elif not image:
        problem = "it holds no image"
    elif not sizes[image]:
        problem = f"its image {image} is empty"
    # It has no manifest: this is what tells it from others, also after its image was compressed later.
    own = f"{copy.name} {copy.uuid} {IMAGE_NAME.fullmatch(image).group(1) if image else ''}"
    return copy._replace(problem=problem,
                         mark=hashlib.sha256(own.encode("utf-8", "surrogateescape")).hexdigest())


def with_old_image(inside: Directory, copy: Copy, image: str, size_bytes: int) -> Copy:
    """The copy with that image, and what its name and the files beside it tell."""
    method = Method.VM if image_format(image) == "xva" else Method.VDI
    return copy._replace(uuid=_old_uuid(inside), vm_name=IMAGE_NAME.fullmatch(image).group(2), method=method,
                         image=image, size_bytes=size_bytes)


def _old_uuid(inside: Directory) -> str:
    """The VM's uuid from vm.cfg or vm-metadata.xml, "" if neither tells."""
    uuid = parse_cfg(read_if_file(inside, "vm.cfg").decode("utf-8", "replace")).get("orig_uuid", "")
    with contextlib.suppress(NotThere, WrongKind, VerificationError):
        return uuid or own_vm(parse_ova(inside.read(VM_METADATA)))[1].get("uuid", "")
    return ""


def own_vm(ova: Dict[str, Any], uuid: str = "") -> Tuple[str, Dict[str, Any]]:
    """Id and record of the VM itself in an ova.xml that may hold its snapshots too."""
    machines = ova_objects(ova, "VM")
    if not machines:
        raise UnknownFormat("ova.xml holds no VM")
    return min(machines.items(), key=lambda item: (not uuid or item[1].get("uuid") != uuid,
                                                   bool(item[1].get("is_a_snapshot"))))


MANIFEST_FORMAT = 2                    # the newest that is known here
PLAIN_FORMAT = 1                       # that of a copy which does not tell the state of every block
MOST_COPIES = 10 ** 9                  # of one VM: a later number is none that was counted
MAYBE_TEXT = (str, type(None))
RULE_NAMES = Rules._fields[:-1]        # those of numbers
MANIFEST_LATER_SHAPE = {               # what not all manifests have
    "layer": {"depth": int, "full": str, "base": str, "why": str, "is_first": bool, "holders": [
        {"copy": str, "sequence": int, "manifest": str, "blocks": str, "files": {"*": str}}]},
    "rules": {"*": int}, "other-rules": [{"config": str, "at": str, "rules": {"*": int}}], "config": str,
    "left-out": [{"device": str, "userdevice": str, "virtual_size": int, "by": str}], "verified": dict}
MANIFEST_SHAPE = {                     # as check_shape() takes it; it may hold more
    "kind": str, "taken_at": str, "sequence": int, "copies_to_keep": int,
    "vm": {"uuid": str, "name": str}, "files": {"*": {"sha256": str}},
    "images": [{"name": str, "size": int, "sha256": str, "compression": MAYBE_TEXT, "format": MAYBE_TEXT}],
    "disks": [{"device": str, "virtual_size": int, "snapshot_uuid": str, "archive_id": MAYBE_TEXT,
               "sr_uuid": MAYBE_TEXT, "userdevice": MAYBE_TEXT}]}
DISK_STATE_SHAPE = {"key": str, "begin": int, "end": int, "since": str, "holders": [str], "archive_id": str,
                    "blocks": int}


def check_shape(value: Any, shape: Any, title: str = "") -> None:
    """ValueError with a sentence unless the JSON value is of that shape: a type, or several; [shape]: a list
    of such; {key: shape}: an object with such fields, `*` standing for every field that it has."""
    if not isinstance(value, type(shape) if isinstance(shape, (list, dict)) else shape):
        raise ValueError(f"{title} is missing or of the wrong kind")
    if isinstance(shape, list):
        for item in value:
            check_shape(item, shape[0], title)
    elif isinstance(shape, dict):
        for key in shape:
            for name in value if key == "*" else [key]:
                check_shape(value.get(name), shape[key], f"{title}{title and '.'}{one_line(name)}")


class NewerManifest(ValueError):
    """The manifest is of a format that only a later version knows."""

    def __init__(self, manifest: Dict[str, Any]) -> None:
        super().__init__("its manifest is of a format that only a newer VmBackup knows: use that one")
        self.manifest = manifest


def told(manifest: Dict[str, Any], *keys: str) -> str:
    """The text under those keys, one in another, "" if there is none."""
    found = manifest                       # type: Any
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else ""


def parse_manifest(content: bytes) -> Dict[str, Any]:
    """The manifest; ValueError with a sentence if we did not write it, NewerManifest of a later version."""
    manifest = parse_object(content)
    if isinstance(manifest.get("format"), (int, float)) and manifest["format"] > MANIFEST_FORMAT:
        raise NewerManifest(manifest)
    if "image" in manifest:
        manifest["images"] = [manifest["image"]]
    check_shape(manifest, MANIFEST_SHAPE)
    check_shape(manifest, {key: shape for key, shape in MANIFEST_LATER_SHAPE.items() if key in manifest})
    for image in manifest["images"]:
        name = image["name"]
        if not IMAGE_NAME.fullmatch(name) or "/" in name or "\0" in name \
                or re.search("[\ud800-\udfff]", name):
            raise ValueError("image.name is not the name of an image")
    layer = manifest.get("layer")
    if layer is None and "image" not in manifest or not manifest["images"]:
        raise ValueError("image is missing")
    if layer is not None:
        check_shape(manifest["disks"], [DISK_STATE_SHAPE], "disks")
        if not all(parse_copy_name(holder["copy"]) for holder in layer["holders"]):
            raise ValueError("layer.holders names what is no copy")
        if ("image" in manifest) != (layer["depth"] == 1) or "image" not in manifest and not all(
                isinstance(image.get("disk"), str) for image in manifest["images"]):
            raise ValueError("layer.depth does not fit its images")
    if not 0 <= manifest["sequence"] < MOST_COPIES:
        raise ValueError("sequence is no number of a copy")
    Method(manifest["kind"])
    for at in [manifest["taken_at"]] + [row["at"] for row in manifest.get("other-rules", ())]:
        parse_utc(at)
    return manifest


class NewCopy:
    """A copy that is being written, in its .partial directory. Not there for anyone else until sealed."""

    def __init__(self, parent: Directory, name: str) -> None:
        self._parent = parent
        self.name = name
        self.inside = parent.make_child(name + PARTIAL)
        self.sums = {}                         # type: Dict[str, Tuple[int, str]]    # size, SHA-256

    def write(self, name: str, content: bytes) -> None:
        """A small file of the copy, on disk, size and digest remembered; it may lie in a sub-directory."""
        folder, _, base = name.rpartition("/")
        if folder:
            with self.inside.child_made_if_missing(folder) as inner:
                inner.write(base, content)
                inner.sync()
        else:
            self.inside.write(base, content)
        self.sums[name] = (len(content), hashlib.sha256(content).hexdigest())

    def write_texts(self, files: Iterable[Tuple[str, str]]) -> None:
        for name, text in files:
            self.write(name, text.encode("utf-8", "surrogateescape"))

    def finish(self, manifest: Dict[str, Any]) -> None:
        """Manifest, checksums and, last of all, the success marker are on disk."""
        manifest["files"] = {name: {"size": size, "sha256": digest}
                             for name, (size, digest) in sorted(self.sums.items())}
        self.write(MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode("ascii"))
        sums = {name: digest for name, (_, digest) in self.sums.items()}
        self.inside.write(CHECKSUMS, checksums(sums, manifest))
        self.inside.sync()
        self.inside.write(SUCCESS, b"")
        self.inside.sync()

    def seal(self) -> None:
        """Visible under its own name, in one step. If only the sync behind it fails, the copy stands."""
        try:
            self._parent.rename(self.name + PARTIAL, self.name)
        except CatalogError as error:
            if not self._parent.leads_to(self.name, self.inside.fd):
                raise
            raise StorageMisbehaved(f"{self.name} is in its place and complete, but the storage did not "
                                    f"confirm that it will stay ({str(error).rstrip('.')}): verify it. "
                                    "Nothing is pruned in this run.")

    def discard(self) -> None:
        """Nothing of it is left, unless it is sealed already."""
        with contextlib.suppress(NotThere):
            self._parent.remove_tree(self.name + PARTIAL)
            self._parent.sync()

    def close(self) -> None:
        self.inside.close()
        self._parent.close()


def checksums(sums: Dict[str, str], manifest: Dict[str, Any]) -> bytes:
    """What SHA256SUMS says of these files of a copy, and of the images that hold its blocks."""
    sums = dict(sums)
    for holder in manifest.get("layer", {}).get("holders", ()):
        sums.update((f"../{holder['copy']}/{name}", digest) for name, digest in holder["files"].items())
    lines = []
    for name, digest in sorted(sums.items()):
        if "\\" in name or "\n" in name:            # as `sha256sum -c` wants odd names
            name, digest = name.replace("\\", "\\\\").replace("\n", "\\n"), "\\" + digest
        lines.append(f"{digest}  {name}\n")
    return "".join(lines).encode("utf-8", "surrogateescape")


# --- what a copy holds, read -----------------------------------------------------------


def read_image(inside: Directory, copy: Copy, manifest: Dict[str, Any], consumers: Sequence[Consumer],
               on_tick: Callable[[Progress], Any], doing: str,
               problems: Optional[List[VerificationError]] = None) -> None:
    """The whole image passed through the consumers, decompressed, with the digests of the manifest, if there
    is one; of an increment what a full would be, every block with its digest. VerificationError if anything
    is wrong; with `problems` that is noted there, and as much passes as can be read."""
    if copy.is_increment:
        pump([Flow(lambda: laid_together(inside, copy, manifest, problems), consumers, "layers")], on_tick,
             doing, problems)
    else:
        read_file(inside, copy.image, manifest.get("image", {}), consumers, on_tick, doing, problems,
                  is_foreign_vhd(copy))


def read_file(inside: Directory, image: str, facts: Dict[str, Any], consumers: Sequence[Consumer],
              on_tick: Callable[[Progress], Any], doing: str,
              problems: Optional[List[VerificationError]] = None, is_foreign: bool = False) -> None:
    """The same of one file, which is what these facts of a manifest tell; {} if there is none."""
    plain = stored = Digest()
    with contextlib.ExitStack() as stack:
        with closed_aside(consumers):
            compression = image_compression(inside, image, facts)
            if compression != "none":
                stored = Digest("SHA-256 of the stored bytes")
            digests = [stored, plain] if facts else []
            flows = reading_flows(stack, inside.open_file(image), compression,
                                  digests[:1] if compression != "none" else [], [*digests[1:], *consumers],
                                  is_foreign)
        pump(flows, on_tick, doing, problems)
    problem = digest_problem(image, facts, stored, plain) if facts else ""
    if problem:
        if problems is None:
            raise VerificationError(problem)
        problems.append(VerificationError(problem))


# --- a copy laid together from those that hold its blocks -------------------------------------------


class Holder(NamedTuple):
    """A copy that is open: one that holds blocks."""
    inside: Directory
    copy: Copy
    manifest: Dict[str, Any]


def opened_holders(stack: contextlib.ExitStack, inside: Directory, copy: Copy, manifest: Dict[str, Any],
                   problems: Optional[List[VerificationError]] = None) -> Dict[str, Holder]:
    """The copy itself, under "", and those that hold blocks of it, by name. VerificationError if one is not
    the copy that it was; with `problems` that is noted there, and the others will do."""
    holders = {"": Holder(inside, copy, manifest)}
    for name, mark in copy.layer.holders:
        try:
            holders[name] = opened_holder(stack, inside, copy.folder, name, mark, problems)
        except VerificationError as problem:
            if problems is None:
                raise
            problems.append(problem)
    return holders


def opened_holder(stack: contextlib.ExitStack, inside: Directory, folder: str, name: str, mark: str,
                  problems: Optional[List[VerificationError]]) -> Holder:
    """The copy of that name beside the one that is open; VerificationError if it is not that with the mark,
    which with `problems` is noted as long as its blocks can be looked for."""
    title = f"{name}, which holds blocks of it,"
    try:
        with inside.child("..") as parent:
            found = read_copy(parent, folder, name, *parse_copy_name(name))
            if found.is_unreadable:
                raise CatalogError(f"{title} {found.problem}.")
            if found.mark != mark or found.problem:
                problem = VerificationError(f"{title} {found.problem or 'is not the copy that it was'}")
                if problems is None or found.layer is None:
                    raise problem
                problems.append(problem)
            place = stack.enter_context(parent.child(name))
            return Holder(place, found, parse_manifest(place.read(MANIFEST)))
    except NotThere:
        raise VerificationError(f"{title} is not there")
    except (WrongKind, ValueError) as error:
        raise VerificationError(f"{title} can't be read: {error}")


def held_disks(manifest: Dict[str, Any]) -> List[Dict[str, Any]]:
    """The disks of a manifest that tells the state of every block, in the order of the image, each once."""
    found = {}                             # type: Dict[str, Dict[str, Any]]
    for disk in manifest["disks"]:
        found.setdefault(disk["key"], disk)
    return sorted(found.values(), key=lambda disk: disk["begin"])


def disk_name(copy: Copy, disk: Mapping[str, Any]) -> str:
    """What a disk of its manifest is called in its image."""
    return disk["key"] if copy.is_increment else disk["archive_id"] if is_archive(copy) else "image"


def is_archive(copy: Copy) -> bool:
    """Is what it gives an XVA, which holds the VM with its disks, or the image of one disk?"""
    return copy.method is Method.VM if copy.is_increment else image_format(copy.image) == "xva"


def laid_order(copy: Copy, manifest: Dict[str, Any], holders: Mapping[str, Holder]) -> List[Dict[str, Any]]:
    """The disks of an increment in the order of the full, whose image is read once."""
    full = holders.get(copy.layer.full)
    before = [disk["key"] for disk in held_disks(full.manifest)] if full else []
    return sorted(held_disks(manifest), key=lambda disk: (
        before.index(disk["key"]) if disk["key"] in before else len(before), disk["archive_id"]))


def laid_together(inside: Directory, copy: Copy, manifest: Dict[str, Any],
                  problems: Optional[List[VerificationError]] = None) -> Iterator[Any]:
    """The source of a flow: of an increment what a full would be: the archive with its own ova.xml, or the
    raw image of its disk. The files that hold it are read side by side, each once, and every block is held
    against its digest: VerificationError, or with `problems` noted there, and what is there passes."""
    with contextlib.ExitStack() as stack:
        holders = opened_holders(stack, inside, copy, manifest, problems)
        readers: Dict[Tuple[str, str], Union[LayerReader, VerificationError]] = {}

        def reader_of(holder: Holder, key: str, own: contextlib.ExitStack) -> LayerReader:
            """A full's image is read from disk to disk, the files of increments each with its disk."""
            place = holder.copy.name, key if holder.copy.is_increment else ""
            if place not in readers:
                if holder.copy.is_increment:
                    own.callback(readers.pop, place, None)
                try:
                    readers[place] = layer_reader(own if holder.copy.is_increment else stack, holder, key)
                except VerificationError as problem:
                    readers[place] = problem
            if isinstance(readers[place], VerificationError):
                raise readers[place]
            return readers[place]

        def contents(disk: Dict[str, Any]) -> Iterator[Tuple[int, Any]]:
            key = disk["key"]
            with contextlib.ExitStack() as own:
                for row in disk_rows(inside, disk):
                    content = None         # type: Optional[memoryview]
                    try:
                        if row.digest == ZERO:
                            continue
                        if row.holder not in holders:
                            raise VerificationError(f"{row.holder}, which holds blocks of it, can't be had")
                        content = memoryview(reader_of(holders[row.holder], key, own).read(key, row.number))
                        content = content[:disk["virtual_size"] - row.number * MEBIBYTE]
                        if block_digest(content) != row.digest:
                            raise VerificationError(f"MiB {row.number} of disk {key} is damaged in "
                                                    f"{row.holder or copy.name}: its digest differs")
                    except VerificationError as problem:
                        if problems is None:
                            raise
                        problems[MOST_PROBLEMS:] = [problem]
                        if content is None:
                            continue
                    yield row.number, content

        # The digests of an archive's blocks are made anew: of the kind that the pool of the full knows.
        full = holders.get(copy.layer.full)
        is_xxh64 = full and full.manifest.get("verified", {}).get("block_digests") == "xxh64"
        suffix = ".xxhash" if is_xxh64 and block_hasher() else ".checksum"
        if is_archive(copy):
            yield tar_member(OVA_XML, inside.read(OVA_XML))
        for disk in laid_order(copy, manifest, holders):
            yield from image_pieces(disk["archive_id"] if is_archive(copy) else "", disk["virtual_size"],
                                    contents(disk), suffix)
        if is_archive(copy):
            yield XVA_END


def layer_reader(stack: contextlib.ExitStack, holder: Holder, key: str) -> LayerReader:
    """The reader of the image in which that copy holds blocks of that disk."""
    inside, copy, manifest = holder
    rows = zip(copy.images, manifest["images"])
    image, facts = next((row for row in rows if not copy.is_increment or row[1]["disk"] == key), ("", {}))
    if not image:
        raise VerificationError(f"{copy.name} has no image of disk {key}")
    if is_compressed_twice(image, facts):
        raise UnknownFormat(f"{copy.name}/{image} was compressed a second time: decompress it once")
    names = {disk["key"]: disk_name(copy, disk) for disk in manifest["disks"]}
    return LayerReader(stack, inside.open_file(image), image_compression(inside, image, facts),
                       facts["format"], names)


def image_compression(inside: Directory, image: str, facts: Dict[str, Any]) -> str:
    """How the image is compressed: of ours as the manifest's facts say, of others as its first bytes say,
    whatever its name. UnknownFormat if that is not read here."""
    suffixes = {suffix: word for word, suffix in COMPRESSED_SUFFIX.items()}
    by_name = suffixes[re.search(r"(\.gz|\.zst)?$", image).group()]
    if facts:
        word = facts.get("compression") if image == facts["name"] else ""
        return word if word in COMPRESSED_SUFFIX else by_name
    head, tail = inside.read_part(image, 16), inside.read_part(image, SECTOR_BYTES, at_end=True)
    status = inside.status(image)
    found = next((suffixes[suffix] for suffix, magic in COMPRESSED_MAGIC if head.startswith(magic)), "")
    if re.match(br"[\x50-\x5f]\x2a\x4d\x18", head):       # a skippable frame (RFC 8878, 3.1.2): pzstd's first
        found = "zstd"
    # A disk may begin with any bytes: that of a fixed VHD, and a raw image, which is of whole MiBs (as what
    # dd padded is, but that is called compressed too).
    is_raw = image_format(image) == "raw" and not (found and by_name != "none")
    if is_raw and not (status and status.st_size % MEBIBYTE) or \
            image_format(image) == "vhd" and b"conectix" in (tail[:8], tail[1:9]):
        return "none"
    if found:
        return found
    for name, magic in OTHER_MAGIC:
        if head.startswith(magic):
            raise UnknownFormat(f"{image} is a file of {name}, which is not supported: make a plain one of "
                                "it, or one of gzip or zstd")
    return by_name if image_format(image) == "raw" else "none"


def is_foreign_vhd(copy: Copy) -> bool:
    """Is it a VHD that need not lie as the server streams one?"""
    return copy.is_old and image_format(copy.image) == "vhd"


def is_compressed_twice(image: str, facts: Dict[str, Any]) -> bool:
    """Did the storage host compress an image that was compressed already?"""
    return bool(facts) and image != facts["name"] and facts.get("compression") != "none"


def image_check(inside: Directory, copy: Copy, manifest: Dict[str, Any], sinks: Sequence[MebibyteSink] = (),
                compare: bool = True, is_whole: bool = True,
                bad: Optional[List[str]] = None) -> Optional[Check]:
    """The check of what that copy gives, whose sinks are shown the disks' contents; where the export noted a
    digest of every block of the image, they are compared too. None for an image that was compressed a second
    time: what is inside stays as it is. `is_whole` false: damage is put up with. `bad`: see check_xva."""
    expected, blocks, size, facts = None, None, None, manifest.get("image", {})
    if manifest:
        if is_compressed_twice(copy.image, facts):
            return None
        expected = {disk["snapshot_uuid"]: disk["virtual_size"] for disk in manifest["disks"]}
        size = list(expected.values())[0] if len(expected) == 1 else None
        if compare and copy.layer is None and inside.status(BLOCKS) is not None:
            blocks = BlockComparer(open(inside.open_file(BLOCKS), "rb"))
    file_format = facts.get("format") if facts else image_format(copy.image)
    if is_archive(copy) or file_format == "xva":
        return Check(check_xva, blocks, sinks, expected=expected,
                     strict=bool(manifest) and not copy.is_increment, bad=bad)
    if file_format == "raw" and not manifest:            # of the size that cfg files beside it give
        ova = ova_of_cfg_files(inside, False)
        sizes = {vbd["userdevice"]: int(ova_objects(ova, "VDI")[vbd["VDI"]]["virtual_size"])
                 for vbd in (ova_objects(ova, "VBD") if ova else {}).values()}
        size = next((sizes[name] for name in ("0", "xvda", "hda") if sizes.get(name)), None)
    if file_format == "raw" or copy.is_increment:
        return Check(check_raw, blocks, sinks, virtual_size=size)
    return Check(check_vhd, blocks, sinks, virtual_size=size, strict=bool(manifest), is_whole=is_whole)


def digest_problem(image: str, facts: Dict[str, Any], stored: Digest, plain: Digest) -> str:
    """Why an image that was read whole is not the one of the manifest's facts, "" if it is."""
    if image != facts["name"]:
        if plain.hexdigest() != facts["sha256"]:
            return f"the image {image} is not what was written: its decompressed bytes differ"
        if facts.get("compression") != "none":
            return ""
    elif stored.hexdigest() != facts["sha256"]:
        return f"the image {image} is not what was written: its SHA-256 differs"
    if facts.get("plain_sha256") != plain.hexdigest():
        return f"the image {image}, decompressed, is not what was exported: its SHA-256 differs"
    return ""


def read_if_file(folder: Directory, name: str) -> bytes:
    """The content of that small file; nothing if there is none, or something else in its place."""
    with contextlib.suppress(NotThere, WrongKind):
        return folder.read(name)
    return b""


def ova_of_cfg_files(inside: Directory, escaped: bool) -> Dict[str, Any]:
    """What the cfg files tell of the VM, in the form of an ova.xml without a version; {} if they tell
    nothing. What is missing in them, or no number where one should be, is as if it had not been written."""
    objects = []                           # type: List[Dict[str, Any]]

    def add(class_name: str, key: str, **fields: Any) -> None:
        objects.append({"class": class_name, "id": key, "snapshot": fields})

    def read(folder: Directory, name: str) -> Dict[str, str]:
        return parse_cfg(read_if_file(folder, name).decode("utf-8", "replace"), escaped)

    machine = read(inside, "vm.cfg")
    add("VM", "vm", uuid=machine.get("orig_uuid", ""), other_config={}, tags=[], power_state="Halted",
        **{field: machine[field] for field in CFG_VM_FIELDS if machine.get(field)})
    for name in inside.names():
        if not inside.is_directory(name) or not (name.startswith("DISK-") or name == "VIFs"):
            continue
        with inside.child(name) as folder:
            if name == "VIFs":
                for file in folder.names():
                    vif = read(folder, file)
                    if vif:
                        add("VIF", file, VM="vm", network="network " + file, other_config={},
                            qos_algorithm_type="", qos_algorithm_params={}, device=vif.get("device", "0"),
                            MAC=vif.get("MAC", ""), MTU=vif.get("MTU", "1500"))
                        add("network", "network " + file, name_label=vif.get("network_name_label", ""))
                continue
            vbd, vdi, device = read(folder, "vbd.cfg"), read(folder, "vdi.cfg"), name[len("DISK-"):]
            number, size, key = userdevice_number(device), vdi.get("virtual_size", ""), f"DISK-{len(objects)}"
            add("VBD", "vbd " + key, VM="vm", VDI=key, device=device,
                userdevice=vbd.get("userdevice") or (str(number) if number < 1 << 30 else device),
                bootable=vbd.get("bootable") == "True", mode=vbd.get("mode", "RW"),
                type=vbd.get("type", "Disk"), unpluggable=vbd.get("unpluggable") == "True", empty=False,
                other_config={"owner": ""}, qos_algorithm_type="", qos_algorithm_params={})
            add("VDI", key, uuid=vdi.get("orig_uuid", ""), SR="sr " + key, other_config={},
                virtual_size=size if re.fullmatch("[0-9]{1,18}", size) else "0", type=vdi.get("type", "user"),
                name_label=vdi.get("name_label", ""), name_description=vdi.get("name_description", ""))
            add("SR", "sr " + key, uuid=vdi.get("orig_sr_uuid", ""), name_label="", content_type="user")
    return {"version": None, "objects": objects} if machine or len(objects) > 1 else {}


CFG_VM_FIELDS = ("name_label", "name_description", "memory_dynamic_max", "VCPUs_max", "VCPUs_at_startup")


# --- what was found of the blocks of a copy ------------------------------------------------


class LayerState(NamedTuple):
    """What was found of the blocks that a copy holds itself, in the images of these names: what is wrong, ""
    if nothing; and the MiB that are, by disk as spans of first and number, None if these are not known."""
    problem: str
    bad: Optional[Dict[str, List[List[int]]]]
    images: Tuple[str, ...]


# What is known by now of the blocks that copies hold themselves, by directory and name: each is read once.
LayerStates = Dict[Tuple[str, str], LayerState]


def layer_state(holder: Holder, on_tick: Callable[[Progress], Any], doing: str) -> LayerState:
    """What that copy itself holds, read from storage, held against its rows."""
    inside, copy, manifest = holder
    sizes = {disk["key"]: disk["virtual_size"] for disk in held_disks(manifest)}
    proof = Proof({disk_name(copy, disk): (disk["key"], disk["virtual_size"], (
        row for row in disk_rows(inside, disk) if not row.holder)) for disk in held_disks(manifest)})
    problems: List[str] = []
    is_known = True
    for image, facts in zip(copy.images, manifest["images"]):      # a bad one says nothing of the others
        proof.has_seen_all = False
        try:
            with open(inside.open_file(image), "rb") as file:
                forget_cached(file.fileno())           # what is proven is the storage, not a cache
            if is_compressed_twice(image, facts):      # inside is the image that was proven at the export
                read_file(inside, image, facts, [], on_tick, doing)
                proof.leave_out(facts.get("disk"))
                continue
            check = Check(check_vhd, None, [proof.of(facts["disk"])], strict=False, is_layer=True,
                          virtual_size=sizes.get(facts["disk"])) if copy.is_increment else \
                image_check(inside, copy, manifest, [proof], bad=problems)
            read_file(inside, image, facts, [check], on_tick, doing)
        except (VerificationError, NotThere, WrongKind) as error:
            problems.append(str(error))
            is_known = is_known and proof.has_seen_all
    proof.finish()
    if proof.spans and not problems:
        key, spans = next(iter(proof.spans.items()))
        problems.append(f"MiB {spans[0][0]} of disk {key} is not what was exported: its digest differs")
    is_known = is_known and sum(map(len, proof.spans.values())) <= MOST_SPANS
    return LayerState(problems[0] if problems else "", proof.spans if is_known else None, copy.images)


MOST_PROBLEMS = 100                    # that are noted of a copy that is wanted though it is damaged
MOST_SPANS = 10000                     # of damage: more is not worth to be kept


def check_rows(inside: Directory, manifest: Dict[str, Any], holders: Mapping[str, Holder],
               bad: Mapping[str, Optional[Dict[str, List[List[int]]]]]) -> int:
    """The number of a copy's blocks that are not zeros. VerificationError unless what it says of those that
    others hold is what these say themselves, and none is among the bad ones."""
    number = 0
    for disk in held_disks(manifest):
        theirs: Dict[str, Iterator[Row]] = {}
        spans = {name: sorted((found or {}).get(disk["key"], ())) for name, found in bad.items()}
        for row in disk_rows(inside, disk):
            number += row.digest != ZERO
            if not row.holder:
                continue
            what = f"MiB {row.number} of disk {disk['key']}, which {row.holder} holds,"
            if row.holder not in holders:
                raise VerificationError(f"{what} can't be had: {MANIFEST} does not name that copy")
            if row.holder not in theirs:
                holder = holders[row.holder]
                theirs[row.holder] = (one for other in held_disks(holder.manifest)
                                      if other["key"] == disk["key"]
                                      for one in disk_rows(holder.inside, other) if not one.holder)
            there = next((one for one in theirs[row.holder] if one.number >= row.number), None)
            if there is None or there[:2] != row[:2]:
                raise VerificationError(f"{what} is not what is recorded there")
            if is_in_spans(row.number, spans[row.holder]):
                raise VerificationError(f"{what} is damaged there")
    return number


class Proof(MebibyteSink):
    """The sink that holds what images give of disks against the rows that were noted at the export. `disks`:
    by name in the image the key, the size and the rows. `spans`: the MiB that differ, or are lost, by key."""

    def __init__(self, disks: Mapping[str, Tuple[str, int, Iterator[Row]]]) -> None:
        super().__init__(self._compare)
        self.spans = {}                    # type: Dict[str, List[List[int]]]
        self.has_seen_all = False
        self._disks = {name: [key, size, rows, next(rows, None)] for name, (key, size, rows) in disks.items()}
        self._name = ""

    def of(self, name: str) -> "Proof":
        """The sink for an image of that one disk."""
        self.end(True)
        self._name = name
        self.has_seen_all = False
        return self

    def leave_out(self, name: Optional[str]) -> None:
        """That disk, or every one, is proven by other means."""
        for one in [name] if name else list(self._disks):
            self._disks.pop(one, None)
        self.has_seen_all = True

    def _compare(self, name: str, number: int, content: memoryview) -> None:
        name = self._name or name
        if name not in self._disks:
            raise VerificationError(f"the image has a disk {name} that is not on record")
        key, size = self._disks[name][:2]
        self._pass(name, number)
        row = self._disks[name][3]
        if row is None or row.number != number:
            self._note(key, number)        # it was zeros
            return
        self._disks[name][3] = next(self._disks[name][2], None)
        if block_digest(content[:max(0, size - number * MEBIBYTE)]) != row.digest:
            self._note(key, number)

    def _pass(self, name: str, number: int) -> None:
        """What was recorded before that MiB and did not come is lost, unless it is zeros."""
        key, _, rows, row = self._disks[name]
        while row is not None and row.number < number:
            if row.digest != ZERO:
                self._note(key, row.number)
            row = next(rows, None)
        self._disks[name][3] = row

    def _note(self, key: str, number: int) -> None:
        spans = self.spans.setdefault(key, [])
        if spans and sum(spans[-1]) == number:
            spans[-1][1] += 1
        else:
            spans.append([number, 1])

    def end(self, is_whole: bool) -> None:
        super().end(is_whole)
        self.has_seen_all = is_whole

    def finish(self) -> None:
        """What did not come to the end of all images is lost."""
        for name in self._disks:
            self._pass(name, 1 << 60)


# =============================================================================
# 18. Ownership
# =============================================================================
# What is ours in a pool: snapshots of VMs and of disks, and what restore and drill make, journal first. Ours
# is only what an open entry of a journal proves: by the uuid noted when the answer came, or by the token that
# the thing was born with. A name without the token proves nothing.

BUSY_PATIENCE_S = 180          # how long a disk that is still attached to a control domain is waited for
BUSY_PAUSE_S = 2
LOST_ANSWER_PATIENCE_S = 10    # a snapshot whose maker's connection died can appear some seconds later
LOST_ENTRY_LIFE_S = DAY_S
STILL_BUSY = ("VDI_IN_USE", "OTHER_OPERATION_IN_PROGRESS")
# Answers to VDI.snapshot behind which a snapshot may stand: the server writes other_config after the storage
# has made it (ocaml/xapi/xapi_vdi.ml, snapshot, v26.17.0), so any other failure leaves none with our key.
UNSURE_ANSWERS = ("lost", "INTERNAL_ERROR", "CANNOT_CONTACT_HOST", "HOST_OFFLINE", "TASK_CANCELLED")
HOST_CLOCKS_DIFFER_S = 60      # snapshot_time is by the clock of the host that made it, ours by the master's
MOST_LEFT_SNAPSHOTS = 2
SR_IS_FULL = "SR_BACKEND_FAILURE_44"
KEPT = "kept as the reference"         # why an entry was closed whose snapshot stays in the pool
IMPORT_END_PATIENCE_S = 180    # how long a broken import is waited for: the server takes back what it made


# --- the journal of what is open in pools -------------------------------------------


class OpenEntry:
    """Something that we have, or may have, in a pool: what it is and how to prove that it is ours. `facts` is
    what was written so far. kind `vm-snapshot`: token, vm_uuid, vm_name, name, called_at, then uuid and disks
    (uuids). kind `vdi-snapshot`: token, vm_uuid, vm_name, disk (uuid), called_at; then, just before the call,
    known (uuids of what bears the key by then) and calling_at (by the server's clock); then uuid. Both:
    answer, if it was none or a failure."""

    def __init__(self, journal: "RunJournal", number: int) -> None:
        self.journal = journal
        self.number = number
        self.facts = {}                # type: Dict[str, Any]

    def note(self, **facts: Any) -> None:
        """The facts are remembered and on disk; CatalogError if they are only remembered."""
        self.facts.update(facts)
        self.journal.append(dict(facts, entry=self.number))

    def remember(self, **facts: Any) -> None:
        """The facts are on disk if they can be written: remembered is enough for who acts on them now."""
        with contextlib.suppress(CatalogError):
            self.note(**facts)

    def close(self, reason: str) -> None:
        """Nothing of it is left in the pool. If that can't be written, the next run finds that out."""
        self.remember(closed=reason)

    @property
    def is_open(self) -> bool:
        return not self.facts.get("closed")

    @property
    def title(self) -> str:
        return f"{quote_name(self.facts.get('vm_name', '?'))} ({self.facts.get('vm_uuid', '?')[:8]})"


class RunJournal:
    """The file of one run, locked while it lives: what it has open in the pool, a line of JSON a fact, synced
    before the deed."""

    def __init__(self, folder: Directory, name: str, flags: int = 0) -> None:
        """Opened, but not locked yet."""
        self._folder = folder
        self.name = name
        self.fd = folder.open_file(name, os.O_RDWR | os.O_APPEND | flags)
        self.is_mute = False
        self.limit_s = float(JOURNAL_LIMIT_S)
        self.entries = []             # type: List[OpenEntry]
        self.header = {}              # type: Dict[str, Any]
        self._is_torn = False         # its last line may lack its end

    @classmethod
    def begin(cls, folder: Directory, name: str, header: Dict[str, Any]) -> "RunJournal":
        """A new, locked journal that says whose it is. NameTaken if another run took it for a dead one's."""
        journal = cls(folder, name, os.O_CREAT | os.O_EXCL)
        try:
            if not journal._take():
                raise NameTaken(f"another run clears the new journal {name} away as that of a dead run: "
                                "start again.")
            journal.append(header)
        except BaseException as error:     # whatever ended it, a journal without its first line must not stay
            if not isinstance(error, NameTaken):
                folder.remove_file(name)
            journal.leave()
            raise
        journal.header = header
        folder.sync()
        return journal

    @classmethod
    def of_dead_run(cls, folder: Directory, name: str) -> Optional["RunJournal"]:
        """Another run's journal, locked by us now; None if that run lives or the file has gone."""
        with contextlib.suppress(NotThere), contextlib.ExitStack() as undo:
            journal = cls(folder, name)
            undo.callback(journal.leave)
            if journal._take():
                undo.pop_all()
                return journal
        return None

    def _take(self) -> bool:
        """True if it is locked by us and read; a line that was cut off by a crash does not count. False if
        another run has it, or renamed or removed it between our open and lock."""
        if not LockFile(self.fd, self.name).take() or not self.is_still_ours():
            return False
        with storage_errors(f"reading the journal .vmbackup/runs/{self.name}"):
            content = b"".join(iter(lambda: os.read(self.fd, MEBIBYTE), b""))
        numbered = {}                 # type: Dict[int, OpenEntry]
        for line in content.split(b"\n"):
            try:
                facts = parse_object(line)
                number = facts.pop("entry", None)
            except ValueError:
                continue
            if number is None:
                self.header.update(facts)
            elif isinstance(number, int):
                numbered.setdefault(number, OpenEntry(self, number)).facts.update(facts)
        self.entries = [numbered[number] for number in sorted(numbered)]
        self._is_torn = bool(content) and not content.endswith(b"\n")
        return True

    def append(self, facts: Dict[str, Any]) -> None:
        """A line more, on disk; nothing once the store hangs: clean-up in the pool must not wait for it."""
        if self.is_mute:
            return
        line = json_line(facts)

        def write() -> None:
            with storage_errors(f"writing the journal .vmbackup/runs/{self.name}"):
                write_all(self.fd, (b"\n" if was_torn else b"") + line)
                os.fsync(self.fd)

        # what a full store left of a line must not swallow the next
        was_torn, self._is_torn = self._is_torn, True
        try:
            within(self.limit_s, "writing the journal", write)
            self._is_torn = False
        except StorageStalled:
            self.is_mute = True
            raise

    def open_entry(self, **facts: Any) -> OpenEntry:
        """A new entry, on disk: call this before the deed."""
        if self.is_mute:
            raise StorageStalled("what is made in the pool can't be noted, as the backup storage hangs: "
                                 "nothing is begun there. Is the share still reachable?")
        entry = OpenEntry(self, len(self.entries) + 1)
        entry.note(**facts)
        self.entries.append(entry)
        return entry

    def open_entries(self) -> List[OpenEntry]:
        return [entry for entry in self.entries if entry.is_open]

    def is_still_ours(self) -> bool:
        """Does its path still lead to our descriptor? If not, another run took us for dead."""
        return self._folder.leads_to(self.name, self.fd)

    def leave(self) -> None:
        """Left as it is; the lock is given up."""
        with storage_errors(f"closing the journal .vmbackup/runs/{self.name}"):
            os.close(self.fd)

    def finish(self) -> None:
        if not self.open_entries() and self.is_still_ours():
            self._folder.remove_file(self.name)
        self.leave()


JOURNAL_LIMIT_S = 15 * MINUTE_S        # until the run sets it to its stall_timeout
CLEAN_UP_LIMIT_S = 20
TAKEN = ".taken"
RESERVE = "reserve"
RESERVE_BYTES = MEBIBYTE
RUN_SUFFIX = ".run"
IDENTITY_TRIES = 50


def store_identity(catalog: Catalog, now_s: float) -> Dict[str, Any]:
    """What tells this store from a mirror of it: an id in a file, and that file's inode number. Where they do
    not fit (`is_own` is false) this is a mirror, or was moved: it gets an id of its own once nobody who may
    be of the other has written a journal here for a day. "" where the file can't be used."""
    runs = catalog.state("runs")

    def is_known() -> bool:
        return bool(told(facts, "id")) and facts.get("inode") == inode

    try:
        with catalog.root.child(STATE_FOLDER) as state:
            file = LockFile.of(state, "store")
        inode, facts = status_of(file.fd).st_ino, file.text()
        for _ in range(IDENTITY_TRIES):
            if is_known():
                break
            with file.held() as is_ours:
                facts = file.text()
                if is_ours and not is_known() and now_s - _last_journal_s(runs, now_s) > WEAK_LOCK_PATIENCE_S:
                    facts = {"id": random_hex(8), "inode": inode}
                    file.write_text(facts)
            if is_ours:
                break
            time.sleep(0.1)                    # another first run is about to write it
    except StorageFull:
        raise
    except CatalogError:
        return {"store": "", "inode": 0, "is_own": False}
    return {"store": told(facts, "id"), "inode": inode, "is_own": is_known()}


def _last_journal_s(runs: Directory, now_s: float) -> float:
    """When a journal was last written, by the storage's clock; one that can't be looked at may be of now."""
    times = [0.0]
    for name in runs.names():
        try:
            status = runs.status(name)
            times.append(status.st_mtime if status else 0)
        except CatalogError:
            times.append(now_s)
    return max(times)


def begin_run(catalog: Catalog, name: str, header: Dict[str, Any], now_s: float) -> RunJournal:
    """The journal of this run, locked; it says of which store it is."""
    folder = catalog.state("runs")

    def begun(name: str) -> RunJournal:
        return RunJournal.begin(folder, name + RUN_SUFFIX, dict(header, **store_identity(catalog, now_s)))

    try:
        return begun(name)
    except NameTaken:
        return begun(name + "-2")
    except StorageFull:
        folder.remove_file(RESERVE)        # so that a run can begin on a full store, and pre_clean make room
        return begun(name)


def keep_reserve(catalog: Catalog) -> None:
    """A little space is set aside for the journal of a run that begins on a full store."""
    with contextlib.suppress(CatalogError), catalog.state("runs") as folder:
        status = folder.status(RESERVE)
        if status is None or status.st_size != RESERVE_BYTES:       # a full store cut it short
            folder.remove_file(RESERVE)
            folder.write(RESERVE, bytes(RESERVE_BYTES))


def dead_runs(catalog: Catalog, own: RunJournal, pool_uuid: str, now_s: float,
              taken: Container[str] = ()) -> Tuple[List[RunJournal], List[CatalogError]]:
    """The journals of dead runs of that pool, locked by us and marked as taken; and why others were left.
    Those that were taken before are not looked at again: their locks are ours, and would go with a look.
    Another host's where locks do not reach other hosts, and one that came here with a mirror of another
    store, where its run may live on, counts as dead only when it was not written for a day."""
    found, left = [], []               # type: List[RunJournal], List[CatalogError]
    folder = catalog.state("runs")
    for name in folder.names():
        if name == own.name or name in taken or not name.endswith((RUN_SUFFIX, RUN_SUFFIX + TAKEN)):
            continue
        try:
            with contextlib.ExitStack() as undo:
                journal = RunJournal.of_dead_run(folder, name)
                if journal is None:
                    continue
                undo.callback(journal.leave)
                header = journal.header
                out_of_reach = catalog.locks_are_local and header.get("host") != own.header.get("host")
                of_other_store = "store" in header and (not header["store"] or any(
                    header.get(key) != own.header[key] for key in ("store", "inode")))
                too_fresh = ((out_of_reach or of_other_store)
                             and now_s - status_of(journal.fd).st_mtime < WEAK_LOCK_PATIENCE_S)
                if too_fresh or header and header.get("pool", "") != pool_uuid:
                    continue
                if not name.endswith(TAKEN):           # a run that was only slow sees it by its name
                    folder.rename(name, name + TAKEN)
                    journal.name += TAKEN
                undo.pop_all()
                found.append(journal)
        except CatalogError as error:
            left.append(type(error)("what an earlier run left in the pool can't be looked up in its "
                                    f"journal: {error}"))
    return found, left


# --- a thing of ours, by its entry in a journal -----------------------------------------------


def destroy(services: Services, class_name: str, ref: str, doing: str) -> None:
    """The object is gone. A call without an answer is repeated only if the object still exists."""
    for has_time in services.signals.until(services.patience_s):
        try:
            with contextlib.ExitStack() as stack:
                if services.turn is not None:
                    stack.enter_context(services.turn.held(doing, is_needed=False))
                services.pool.call(doing, class_name + ".destroy", ref, timeout_s=services.patience_s)
            return
        except (ApiFailure, AnswerLost) as error:
            is_lost = isinstance(error, AnswerLost)
            if (is_lost or is_gone(error, class_name)) and \
                    services.pool.ask_if_there(doing, class_name + ".get_uuid", ref) is None:
                return
            if not (is_lost and has_time):
                raise


def strangers_on(pool: Pool, record: Dict[str, Any], own: Iterable[str], doing: str) -> List[str]:
    """The refs of VMs that the disk hangs on, other than ours and control domains."""
    machines = [pool.ask_if_there(doing, "VBD.get_VM", vbd) for vbd in record["VBDs"]]
    return [machine for machine in machines if machine is not None and machine not in own
            and pool.ask_if_there(doing, "VM.get_is_control_domain", machine) is False]


class Owned:
    """Something that we have, or may have, in the pool; its entry tells how to find it and prove it ours.
    Each kind has `_find` (what the entry proves to be ours), `_thing` (what it is, for a sentence about what
    is left), `_commands` (what removes it by hand; or what is left to do of that without its disks), and
    `remove`: nothing of it is left in the pool and its entry is closed; or a later run is to try again, and
    what stands and can't be removed is told."""
    FIRST = ("token", "vm_uuid", "vm_name", "called_at")       # what its entry has from the first
    WHAT = "what was made for"
    DISKS_ARE_SNAPSHOTS = True
    left = "left a snapshot, or may have; removing it"     # what a run that died with the entry open did

    def __init__(self, services: Services, entry: OpenEntry, tell: Callable[[OpenEntry, str], None]) -> None:
        """`tell` makes a finding of a sentence about an entry."""
        self._services = services
        self._entry = entry
        self._facts = entry.facts
        self._tell = tell
        self._is_of_this_run = entry.journal is services.journal
        self._told_drives = set()          # type: Set[str]

    def tell_left(self, what: str, by_hand: Sequence[str] = ()) -> None:
        """A finding about something of ours that stays in the pool, with the commands that remove it."""
        commands = "; then ".join(by_hand or self._commands(False))
        self._tell(self._entry, f"{self._thing} {what} The next run tries "
                                f"again{commands and '; by hand: ' + commands}.")

    @property
    def _doing(self) -> str:
        return f"removing {self.WHAT} {self._entry.title}"

    @property
    def _key(self) -> str:
        return KEY_PREFIX + self._facts["token"]

    def _ask(self, method: str, *arguments: Any) -> Any:
        return self._services.pool.ask(self._doing, method, *arguments)

    def _ask_if_there(self, method: str, ref: str, *arguments: Any) -> Any:
        return self._services.pool.ask_if_there(self._doing, method, ref, *arguments)

    def _call(self, method: str, ref: str) -> None:
        """Done once, and waited for as long as the pool may take for a large object."""
        self._services.pool.call(self._doing, method, ref, timeout_s=self._services.patience_s)

    def _ref(self, class_name: str, uuid: str) -> Optional[str]:
        """The ref of that object, None if it is gone or was never known."""
        return self._ask_if_there(class_name + ".get_by_uuid", uuid) if uuid else None

    def _is_old(self) -> bool:
        """Is the call so long ago that nothing of it can appear any more?"""
        age = self._services.clock.utc() - parse_utc(self._facts["called_at"])
        return age.total_seconds() > LOST_ENTRY_LIFE_S

    def _take_key(self, ref: str, record: Dict[str, Any], is_plausible: bool) -> None:
        """Our key is gone from that disk; what copied it is told of, with its removal if it may be ours."""
        self._ask_if_there("VDI.remove_from_other_config", ref, self._key)
        what = f"disk {quote_name(record['name_label'])} ({record['uuid']}) had copied our mark from it"
        if is_plausible:
            self._tell(self._entry, f"the {what} and is not proven to be ours, so only the mark was removed. "
                                    "If nobody else made it, it can go: xe vdi-destroy "
                                    f"uuid={record['uuid']}")
        elif record["uuid"] != self._facts.get("disk"):
            self._services.log.info(f"{self._entry.title}: the {what} and is not ours: only the mark was "
                                    "removed.")

    # --- its disks ------------------------------------------------------------------

    def _destroy_disk(self, uuid: str, own: Iterable[str] = ()) -> bool:
        """True if that disk is gone; False, with a finding, if it must stay. `own`: refs of VMs of ours."""
        stays = self._try_disk(uuid, own)
        if stays:
            self.tell_left(*stays)
        return not stays

    def _try_disk(self, uuid: str, own: Iterable[str]) -> Tuple[Any, ...]:
        """Nothing if that disk is gone; if it must stay what tell_left is to say."""
        for has_time in self._services.signals.until(BUSY_PATIENCE_S, BUSY_PAUSE_S):
            ref = self._ref("VDI", uuid)
            record = self._ask_if_there("VDI.get_record", ref) if ref else None
            if record is None:
                return ()
            if self.DISKS_ARE_SNAPSHOTS and not record["is_a_snapshot"]:
                return (f"has a disk, {uuid}, that is no snapshot any more, so it was left.",)
            strangers = strangers_on(self._services.pool, record, own, self._doing)
            if strangers:
                return (f"has a disk, {uuid}, that hangs on another VM, "
                        f"{self._ask('VM.get_name_label', strangers[0])}, so it was left.",)
            try:
                destroy(self._services, "VDI", ref, self._doing)
                return ()
            except ApiFailure as failure:
                if failure.code not in STILL_BUSY:
                    raise
                reason = failure_text(failure.code, failure.parameters)
            drives = {ref: self._ask_if_there("VBD.get_record", ref) for ref in record["VBDs"]}
            drives = {ref: drive for ref, drive in drives.items()
                      if drive is not None and self._ask_if_there("VM.get_is_control_domain", drive["VM"])}
            if not self._let_go(record, drives, not has_time) and not has_time:
                return (f"has a disk, {uuid}, that is still in use ({reason}).",
                        self._commands_for_busy(uuid, drives.values()))

    def _let_go(self, disk: Dict[str, Any], drives: Dict[str, Dict[str, Any]], has_waited: bool) -> bool:
        """True if one of those VBDs, by which our disk hangs on control domains, is gone: a server that died
        in an export or import leaves it, and nothing clears it up. One that won't let go is believed."""
        gone = False
        for ref, drive in drives.items():
            if not self._is_abandoned(disk, drive, has_waited):
                continue
            is_new = ref not in self._told_drives
            if is_new:
                self._services.log.info(f"{self._entry.title}: the server left {disk['uuid']} attached to a "
                                        "control domain; detaching it.")
                self._told_drives.add(ref)
            try:
                if drive["currently_attached"]:
                    self._call("VBD.unplug", ref)
                destroy(self._services, "VBD", ref, self._doing)
                gone = True
            except ApiFailure as failure:      # it may do so a little later; what stays is told at the end
                if is_new:
                    self._services.log.info(f"{self._entry.title}: {failure}")
        return gone

    def _is_abandoned(self, disk: Dict[str, Any], drive: Dict[str, Any], has_waited: bool) -> bool:
        """Does nothing in the pool work with that drive of a control domain any more? The server's own test:
        its task is gone, or has ended (has_vbd_leaked in ocaml/xapi/attach_helpers.ml@v24.19.2). Without a
        task, waiting has to tell."""
        if drive["current_operations"] or "related_to" in drive["other_config"]:
            return False
        task = drive["other_config"].get("task_id")
        if task:
            return self._ask_if_there("task.get_status", task) not in ("pending", "cancelling")
        return has_waited and not disk["current_operations"]

    def _commands_for_busy(self, uuid: str, drives: Iterable[Dict[str, Any]]) -> List[str]:
        """What removes such a disk: `xe snapshot-uninstall` would fail after destroying the VM's record."""
        disks = list(self._facts.get("disks", ()))
        disks = disks[disks.index(uuid):] if uuid in disks else [uuid]
        return [f"xe {word} uuid={drive['uuid']}" for drive in drives
                for word in ("vbd-unplug", "vbd-destroy")] \
            + [f"xe vdi-destroy uuid={disk}" for disk in disks] + self._commands(True)


class Snapshot(Owned):
    """A snapshot, of a VM or of a disk."""
    WHAT = "the snapshot of"
    COMMANDS = ("snapshot-uninstall", "snapshot-destroy")      # what removes it, and when its disks are gone
    ORIGINAL_CLASS, ORIGINAL = "VM", "vm_uuid"         # what it is made of, and the fact that tells its uuid

    @property
    def _thing(self) -> str:
        return f"its snapshot {self._facts.get('uuid') or '(uuid unknown)'}"

    def _commands(self, without_disks: bool) -> List[str]:
        word, uuid = self.COMMANDS[without_disks], self._facts.get("uuid")
        return [f"xe {word} uuid={uuid}"] if word and uuid else []

    def _make(self, prepare: Callable[[], Any], doing: str, method: str, *arguments: Any) -> str:
        """The ref of the new snapshot, also when the answer was lost but the call did its work."""
        turn = contextlib.ExitStack()
        try:
            turn.enter_context(self._services.turn.held(doing, is_needed=True))
            with contextlib.ExitStack() as undo:
                undo.callback(turn.close)
                prepare()
                self._services.signals.check()
                undo.pop_all()
        except (BackupError, Interrupted):         # it was never made: nothing has to be looked for
            self._entry.remember(answer="not called")
            raise
        try:
            with turn:
                return self._services.pool.call(doing, method, *arguments,
                                                timeout_s=self._services.patience_s)
        except ApiFailure as failure:
            self._entry.note(answer=failure.code)
            raise
        except AnswerLost as lost:
            self._entry.note(answer="lost")
            self._services.log.info(f"{lost} Asking the pool what became of it.")
            ref = self._await_lost()
            if ref is None:
                raise
            return ref

    def _await_lost(self) -> Optional[str]:
        """The one snapshot that a call without an answer made, None if none appears."""
        quiet_until = time.monotonic() + LOST_ANSWER_PATIENCE_S
        for has_time in self._services.signals.until(self._services.patience_s):
            at_work = self._is_being_made()
            found = self._find()
            if len(found) == 1:
                return found[0]
            if not at_work and not self._facts.get("seen_idle"):
                self._entry.note(seen_idle=True)
            if not has_time or not at_work and time.monotonic() > quiet_until:
                return None

    def _is_being_made(self) -> bool:
        ref = self._ref(self.ORIGINAL_CLASS, self._facts[self.ORIGINAL])
        operations = ref and self._ask_if_there(self.ORIGINAL_CLASS + ".get_current_operations", ref)
        return bool(operations) and "snapshot" in operations.values()

    def _may_forget(self, was_called: bool) -> bool:
        """May an entry of which nothing is found be closed? Yes if the call was refused or never made, and
        none is going on; what a lost answer tells of is looked for until a day has passed."""
        if self._facts.get("answer", "lost") != "lost" or not was_called:
            return not self._is_being_made()
        return self._is_old()


class VmSnapshot(Snapshot):
    """A snapshot of a VM: born with the token in its name."""
    FIRST = Owned.FIRST + ("name",)

    def make(self, machine: VirtualMachine, label: str, left_out: Iterable[Disk], knows_ignored: bool,
             before: Callable[[], Any]) -> VirtualMachine:
        """It is there, without the disks that are left out: a server that can't leave them out makes
        snapshots of them, too, which are destroyed before the export."""
        doing, pool = f"the snapshot of {machine.title}", self._services.pool
        ignored = [disk.vdi_ref for disk in left_out]
        ref = self._make(before, doing, "VM.snapshot", machine.ref, self._facts["name"],
                         *([ignored] if ignored and knows_ignored else []))
        snapshot = pool.machine(ref, "reading " + doing)
        too_many = [disk.vdi_uuid for disk in snapshot.disks if disk.snapshot_of in ignored]
        self._entry.note(uuid=snapshot.uuid, disks=[disk.vdi_uuid for disk in snapshot.disks],
                         left_out=too_many)
        for uuid in too_many:
            problem = f"{doing}: what it holds of a disk that is left out could not be removed, so nothing " \
                "was exported"
            try:
                stays = self._try_disk(uuid, [ref])
            except ApiFailure as failure:
                raise BackupError(f"{problem}: {failure}", passing=failure.passing)
            if stays:                      # what is left in the end is told by the clean-up
                raise BackupError(f"{problem}: it {stays[0]}", passing=True)
        pool.ask("naming " + doing, "VM.set_name_label", ref, label)
        return snapshot._replace(name=label, disks=tuple(
            disk for disk in snapshot.disks if disk.vdi_uuid not in too_many))

    def settle(self, name: str) -> None:
        """It stays in the pool, under that name."""
        ref = self._ref("VM", self._facts["uuid"])
        if ref:
            self._ask_if_there("VM.set_name_label", ref, name)
            self._remove_message()

    def _find(self) -> List[str]:
        known = self._ref("VM", self._facts.get("uuid", ""))
        refs = [known, *self._ask("VM.get_by_name_label", self._facts["name"])]
        return [ref for ref in dict.fromkeys(refs) if ref and self._ask_if_there("VM.get_is_a_snapshot", ref)]

    def remove(self) -> None:
        """Disks first, the VM snapshot last: VM.destroy leaves disks behind that tell not whose they are."""
        found = self._find()
        if len(found) > 1:
            self.tell_left(f"bears a token that {len(found)} snapshots bear, so none was removed.")
            return
        if found and "disks" not in self._facts:
            snapshot = self._services.pool.machine(found[0], self._doing)
            self._entry.remember(uuid=snapshot.uuid, disks=[disk.vdi_uuid for disk in snapshot.disks])
        if not all(self._destroy_disk(uuid, found) for uuid in self._facts.get("disks", ())):
            return
        if found:
            destroy(self._services, "VM", found[0], self._doing)
        elif "uuid" not in self._facts and not self._may_forget(True):
            return
        if self._remove_message() or self._is_old():
            self._entry.close("removed" if found else "not there")

    def _remove_message(self) -> bool:
        """True if the event message of our own snapshot is gone: nights don't pile up in the event list."""
        doing = "removing the event message of the snapshot of " + self._entry.title
        since = parse_utc(self._facts["called_at"]) - timedelta(days=1)       # clocks differ
        try:
            messages = self._services.pool.ask(doing, "message.get", "VM", self._facts["vm_uuid"],
                                               server_time_argument(since))
            for ref, record in messages.items():
                if record["name"] == "VM_SNAPSHOTTED" and TOKEN_MARK + self._facts["token"] in record["body"]:
                    self._services.pool.call(doing, "message.destroy", ref)
            return True
        except BackupError as error:
            self._services.log.info(f"{error} It is only a line in the event list; the next run tries again.")
            return False


class DiskSnapshot(Snapshot):
    """A snapshot of a disk: born with our key in its other_config, which the server copies from the disk."""
    FIRST = Owned.FIRST + ("disk",)
    WHAT, COMMANDS = "the disk snapshot of", ("vdi-destroy", "")
    ORIGINAL_CLASS, ORIGINAL = "VDI", "disk"

    def make(self, machine: VirtualMachine, disk: Disk, before: Callable[[], Any]) -> Disk:
        """It is there, ready for export; raises ApiFailure or AnswerLost if not."""
        doing, pool = f"the snapshot of disk {disk.device} of {machine.title}", self._services.pool

        def mark() -> None:
            try:
                pool.ask("marking " + doing, "VDI.add_to_other_config", disk.vdi_ref, self._key,
                         format_utc(self._services.clock.utc()))
            except ApiFailure as failure:
                if failure.code != "MAP_DUPLICATE_KEY":        # a repeated call whose first answer was lost
                    raise
            self._entry.note(known=[record["uuid"] for record in self._bearers().values()],
                             calling_at=format_utc(pool.server_time(doing)))

        ref = self._make(lambda: (before(), mark()), doing, "VDI.snapshot", disk.vdi_ref, {})
        record = pool.ask("reading " + doing, "VDI.get_record", ref)
        self._entry.note(uuid=record["uuid"])
        pool.ask("marking " + doing, "VDI.remove_from_other_config", ref, self._key)
        pool.ask("marking " + doing, "VDI.remove_from_other_config", disk.vdi_ref, self._key)
        return disk._replace(vdi_ref=ref, vdi_uuid=record["uuid"], virtual_size=int(record["virtual_size"]))

    def settle(self, name: str) -> None:
        """It stays in the pool, under that name."""
        ref = self._ref("VDI", self._facts["uuid"])
        if ref:
            self._ask_if_there("VDI.set_name_label", ref, name)

    def _bearers(self) -> Dict[str, Dict[str, Any]]:
        """The records, by ref, of all disks that bear the entry's key: the disk, and what was made of it. Our
        own run's key stands for moments: before the call, and once its snapshot is known, only the disk and
        its snapshots are looked at, as an SR may have thousands of disks. Else only what lies on the same SR
        can have copied it; a dead run's may have stood for days, for any copy of the disk."""
        disk = self._ref("VDI", self._facts["disk"])
        record = self._ask_if_there("VDI.get_record", disk) if disk and self._is_of_this_run else None
        if record is None:
            records = self._ask("VDI.get_all_records")
        else:
            is_clean = "calling_at" not in self._facts or "uuid" in self._facts
            field, value = ("snapshot_of", disk) if is_clean else ("SR", record["SR"])
            records = dict(self._ask("VDI.get_all_records_where", f'field "{field}" = "{value}"'))
            records[disk] = record
        return {ref: record for ref, record in records.items()
                if self._key in (record.get("other_config") or ())}

    def _find(self) -> List[str]:
        return self._proven(self._plausible(self._bearers()))

    def _plausible(self, bearers: Dict[str, Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
        """Those bearers of the key that our call may have made: none if it was not made or was refused.
        Another tool's snapshot copies the key too. What bore it before the call is not ours."""
        facts = self._facts
        if "calling_at" not in facts or facts.get("answer", "lost") not in UNSURE_ANSWERS:
            return {}
        disk = self._ref("VDI", facts["disk"])
        return {ref: record for ref, record in bearers.items()
                if record["is_a_snapshot"] and record["uuid"] not in facts["known"]
                and (disk is None or record["snapshot_of"] == disk)
                and not strangers_on(self._services.pool, record, (), self._doing)}

    def _proven(self, plausible: Dict[str, Dict[str, Any]]) -> List[str]:
        """The one of them that was made while our call can have been under way; [] unless it is just one."""
        if self._facts.get("seen_idle") or not plausible:
            return []
        called_at = parse_utc(self._facts["calling_at"])
        found = [ref for ref, record in plausible.items() if -HOST_CLOCKS_DIFFER_S <= (parse_server_time(
            record["snapshot_time"]) - called_at).total_seconds() <= self._services.patience_s]
        return found if len(found) == 1 else []

    def remove(self) -> None:
        """The disk's snapshot is gone, and the key from all that bear it; or the key only, if unsure."""
        is_known, is_at_work = "uuid" in self._facts, self._is_being_made()
        if is_at_work and not is_known:
            return
        bearers = self._bearers()
        plausible = {} if is_known else self._plausible(bearers)
        known = self._ref("VDI", self._facts.get("uuid", ""))
        ours = [known] if known else self._proven(plausible)
        if ours and not is_known:
            self._entry.remember(uuid=bearers[ours[0]]["uuid"])
        for ref in [] if is_at_work else set(bearers) - set(ours):
            self._take_key(ref, bearers[ref], ref in plausible)
        if ours and not self._destroy_disk(self._facts["uuid"]):
            return
        if not is_at_work and (ours or is_known or self._may_forget("calling_at" in self._facts)):
            self._entry.close("removed" if ours else "not there")


class OldReference(Snapshot):
    """A reference on its way out, of a VM or of a disk alone: what its ledger has told, by uuid only."""
    FIRST = ("vm_uuid", "vm_name", "called_at", "of", "uuid", "disks")
    WHAT = "the reference of"
    left = "was removing its old reference; going on"

    @property
    def _thing(self) -> str:
        return f"its old reference {self._facts['uuid']}"

    def _commands(self, without_disks: bool) -> List[str]:
        words = Snapshot.COMMANDS if self._facts["of"] == Method.VM.value else DiskSnapshot.COMMANDS
        return [f"xe {words[without_disks]} uuid={self._facts['uuid']}"] if words[without_disks] else []

    def _find(self) -> List[str]:
        ref = self._ref("VM", self._facts["uuid"]) if self._facts["of"] == Method.VM.value else None
        return [ref] if ref else []

    def remove(self) -> None:
        """Disks first, the VM's snapshot last; those, too, that it has got since: where its VM was moved to
        another SR, the disks of its snapshots are other ones now."""
        found, disks = self._find(), list(self._facts["disks"])
        if found:
            if self._ask_if_there("VM.get_is_a_snapshot", found[0]) is False:
                self.tell_left("is no snapshot any more, so it was left.")
                return
            disks += [disk.vdi_uuid for disk in self._services.pool.machine(found[0], self._doing).disks]
        if all(self._destroy_disk(uuid, found) for uuid in dict.fromkeys(disks)):
            for ref in found:
                destroy(self._services, "VM", ref, self._doing)
            self._entry.close("removed")


class ImportedVms(Owned):
    """What a restore or drill makes: the VMs of its imports, their disks and tasks. Its entry: token,
    vm_uuid, vm_name, names (the provisional names of the VMs that imports make), tasks (their refs, noted
    before an import starts), called_at, then uuids (of the VMs) and disks (uuids), and `restored` once it is
    whole and the person's. Ours is a VM whose uuid was noted, or, when an answer was lost, one with a
    provisional name whose import_task is a noted task; and a disk that was noted, or whose sm_config bears
    such a task: the importer writes the task there before it writes the first block
    (ocaml/xapi/import.ml@v26.17.0; recorded on 24.19.2). What is made by API calls has the key
    `vmbackup:TOKEN` in its other_config instead."""
    FIRST = Owned.FIRST + ("names",)
    DISKS_ARE_SNAPSHOTS = False

    @property
    def left(self) -> str:
        return "restored it and ended before its last steps; doing them" if self._facts.get("restored") \
            else f"left a VM of a {self._facts['kind']}, or may have; removing it"

    @property
    def _thing(self) -> str:
        if self._facts.get("restored"):
            return "the restored VM is whole; only the record of its import in the pool's list of tasks"
        named = ", ".join(self._facts.get("uuids", ())) or "named " + self._facts["names"][0]
        return f"the VM that a {self._facts['kind']} made of it, {named},"

    def _commands(self, without_disks: bool) -> List[str]:
        uuids = () if self._facts.get("restored") else self._facts.get("uuids", ())
        return [f"xe vm-uninstall uuid={uuid}" for uuid in uuids]

    def remove(self) -> None:
        """Disks first, VMs last, tasks behind them; only what the entry proves, never a VM that is in use."""
        if self._facts.get("restored"):
            self._finish_restored()
            return
        if not self._imports_have_ended(self._tasks()):
            self.tell_left("is still being imported; it was left.")
            return
        machines = self._find()
        refusal = self._refusal(machines)
        if refusal:
            self.tell_left(refusal)
            return
        disks = set(self._facts.get("disks", ())) | self._disks_made()
        if machines or disks:
            self._entry.remember(uuids=[record["uuid"] for record in machines.values()], disks=sorted(disks))
        if not all(self._destroy_disk(uuid, machines) for uuid in sorted(disks)):
            return
        for ref in machines:
            destroy(self._services, "VM", ref, self._doing)
        self._forget_tasks()
        self._entry.close("removed" if machines or disks else "not there")

    def _finish_restored(self) -> None:
        """A VM that came back whole stays, its tasks go; an earlier run's that has no name yet is told."""
        ref = None if self._is_of_this_run else self._ref("VM", self._facts["uuids"][0])
        if ref and self._ask_if_there("VM.get_name_label", ref) in self._facts["names"]:
            self._tell(self._entry, unnamed_text(self._entry))
        self._forget_tasks()
        self._entry.close("restored")

    def _tasks(self) -> List[str]:
        """The refs of the entry's tasks that still exist; one that was not noted bears a provisional name."""
        tasks = list(self._facts.get("tasks", ()))
        for name in self._facts["names"]:
            tasks += [ref for ref in self._ask("task.get_by_name_label", name) if ref not in tasks]
        return [ref for ref in tasks if self._ask_if_there("task.get_status", ref) is not None]

    def _imports_have_ended(self, tasks: Sequence[str]) -> bool:
        """True when no import of the tasks goes on any more; those that do are asked to stop and waited for.
        A task that none has taken for a while would be pending for ever: it is ended, so that none does."""
        quiet_until = time.monotonic() + LOST_ANSWER_PATIENCE_S
        for has_time in self._services.signals.until(IMPORT_END_PATIENCE_S, 0.5):
            states = {ref: self._state_of_import(ref) for ref in tasks}
            for ref, state in states.items():
                if state == "at work":
                    with contextlib.suppress(ApiFailure):      # OPERATION_NOT_ALLOWED: not at this point
                        self._ask("task.cancel", ref)
                elif state == "not taken" and time.monotonic() > quiet_until:
                    self._ask_if_there("task.set_status", ref, "cancelled")
                    states[ref] = ""
            if not any(states.values()):
                return True
            if not has_time:
                return False

    def _state_of_import(self, task: str) -> str:
        """What is seen of the import of that task: `at work`, `not taken` (yet), "" when it has ended."""
        for name in self._facts["names"]:
            for ref in self._ask("VM.get_by_name_label", name):
                if task in (self._ask_if_there("VM.get_current_operations", ref) or ()):
                    return "at work"
        progress = None
        if self._ask_if_there("task.get_status", task) == "pending":
            progress = self._ask_if_there("task.get_progress", task)
        return "" if progress is None else "at work" if float(progress) > 0 else "not taken"

    def _forget_tasks(self) -> None:
        """The entry's tasks are gone from the pool's list, where they would stay for hours. A pending one
        would only be marked by task.destroy (ocaml/xapi/xapi_task.ml@v26.17.0), so it is ended before."""
        for ref in self._tasks():
            if self._ask_if_there("task.get_status", ref) == "pending":
                self._ask_if_there("task.set_status", ref, "cancelled")
            self._ask_if_there("task.destroy", ref)

    def _find(self) -> Dict[str, Dict[str, Any]]:
        """The records, by ref, of the VMs that the entry proves to be ours."""
        found = {}
        for uuid in self._facts.get("uuids", ()):
            ref = self._ref("VM", uuid)
            record = ref and self._ask_if_there("VM.get_record", ref)
            if record:
                found[ref] = record
        for name in self._facts["names"]:
            for ref in self._ask("VM.get_by_name_label", name):
                record = self._ask_if_there("VM.get_record", ref)
                if record and not record["is_a_snapshot"] and not record["is_a_template"]:
                    marks = record["other_config"]
                    if marks.get("import_task") in self._facts.get("tasks", ()) or self._key in marks:
                        found[ref] = record
        return found

    def _refusal(self, machines: Dict[str, Dict[str, Any]]) -> str:
        """Why those VMs must stay, "" if they may go; a drill's own VM that runs is switched off."""
        if len(machines) > len(self._facts["names"]):
            return f"can't be told from others: {len(machines)} VMs bear its marks, so none was removed."
        for ref, record in machines.items():
            name = record["name_label"]
            if name not in self._facts["names"] or record["is_a_snapshot"] or record["is_a_template"]:
                return f"was taken over by somebody (its name is now {quote_name(name)}), so it was left."
            if record["power_state"] == "Halted":
                continue
            if self._facts["kind"] != "drill":
                return f"is {record['power_state'].lower()}, so it was left."
            self._call("VM.hard_shutdown", ref)
        return ""

    def _disks_made(self) -> Set[str]:
        """The uuids of the disks that the entry's imports, or its one VDI.create, made, on a VM or not. What
        else bears our key has copied it: that is not ours, and loses the key."""
        tasks, noted = self._facts.get("tasks", ()), self._facts.get("disks", ())
        records = self._services.pool.records(self._doing, "VDI")
        bearers = [ref for ref, record in records.items() if self._key in (record.get("other_config") or ())]
        plausible = [ref for ref in bearers if not noted and not records[ref]["is_a_snapshot"]]
        made = {records[plausible[0]]["uuid"]} if len(plausible) == 1 else set()
        for ref in bearers:
            if records[ref]["uuid"] not in made and records[ref]["uuid"] not in noted:
                self._take_key(ref, records[ref], ref in plausible)
        return made | {record["uuid"] for record in records.values() if record.get("is_a_snapshot") is False
                       and (record.get("sm_config") or {}).get("import_task") in tasks}


def unnamed_text(entry: OpenEntry) -> str:
    """What to tell of a restored VM that has not got its name."""
    uuid = entry.facts["uuids"][0]
    return (f"the restored VM {uuid} is whole, but is still named {quote_name(entry.facts['names'][0])}. "
            f"Name it: xe vm-param-set uuid={uuid} name-label=...")


OWNED_KINDS = {"vm-snapshot": VmSnapshot, "vdi-snapshot": DiskSnapshot, "reference": OldReference,
               "restore": ImportedVms, "drill": ImportedVms}
ENTRY_SHAPE = {                        # of what kind its facts are, where it has them
    **dict.fromkeys(("token", "vm_uuid", "vm_name", "called_at", "name", "disk", "calling_at", "uuid",
                     "answer", "closed", "of", "kept_as"), str),
    **dict.fromkeys(("names", "tasks", "uuids", "disks", "known", "left_out"), [str])}


def is_understood(facts: Dict[str, Any]) -> bool:
    """Is it an entry that this version writes? Then all that its removal reads is there, and of its kind."""
    try:
        needed = set(OWNED_KINDS[facts["kind"]].FIRST).union(["uuids"] if facts.get("restored") else [])
        if "calling_at" in facts or "known" in facts:
            needed.update(("calling_at", "known"))
        check_shape(facts, {key: ENTRY_SHAPE[key] for key in ENTRY_SHAPE if key in facts or key in needed})
        Method(facts.get("of", Method.VM.value))
        return all(facts[key] for key in needed & {"names", "uuids"}) and all(
            2000 < parse_utc(facts[key]).year < 9000 for key in needed & {"called_at", "calling_at"})
    except (LookupError, TypeError, ValueError):
        return False


# --- all of them ------------------------------------------------------------------------


class Snapshots:
    """What this run makes in the pool, and what dead runs left there."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.findings = []                 # type: List[Finding]
        self.inherited = []                # type: List[RunJournal]

    def tell(self, entry: OpenEntry, sentence: str) -> None:
        self.findings.append(Finding(Severity.WARNING, entry.title, sentence))
        self._services.log.finding(self.findings[-1])

    def owned(self, entry: OpenEntry) -> Owned:
        return OWNED_KINDS[entry.facts["kind"]](self._services, entry, self.tell)

    @contextlib.contextmanager
    def of_vm(self, machine: VirtualMachine, label: str, left_out: Iterable[Disk], knows_ignored: bool,
              before: Callable[[], Any]) -> Iterator[VirtualMachine]:
        """A snapshot of the VM, ready for export, removed on every way out; `before` is done just before it.
        Raises ApiFailure or AnswerLost if there is none. One that can't be removed is a finding, and hides no
        other error."""
        token = random_hex(8)
        with self.begun(machine.uuid, machine.name, kind="vm-snapshot", token=token,
                        name=f"{label} {TOKEN_MARK}{token}") as entry:
            yield self.owned(entry).make(machine, label, left_out, knows_ignored, before)

    @contextlib.contextmanager
    def of_disk(self, machine: VirtualMachine, disk: Disk, before: Callable[[], Any]) -> Iterator[Disk]:
        """A snapshot of the VM's disk, removed on every way out; `before` and what it raises as of_vm."""
        with self.begun(machine.uuid, machine.name, kind="vdi-snapshot", token=random_hex(8),
                        disk=disk.vdi_uuid) as entry:
            yield self.owned(entry).make(machine, disk, before)

    @contextlib.contextmanager
    def begun(self, vm_uuid: str, vm_name: str, **facts: Any) -> Iterator[OpenEntry]:
        """The entry, on disk, of what is then made for that VM; removed on every way out."""
        entry = self._services.journal.open_entry(vm_uuid=vm_uuid, vm_name=vm_name,
                                                  called_at=format_utc(self._services.clock.utc()), **facts)
        try:
            yield entry
        except StorageStalled:
            self._services.journal.is_mute = True
            raise
        finally:
            if entry.facts.get("closed") != KEPT:
                self.remove(entry)

    def remove(self, entry: OpenEntry) -> None:
        """Nothing of the entry is left in the pool, or a finding says what and how to remove it. Signals
        wait. What pool and storage do raises nothing, so that the error before it is the one that is told."""
        owned, patience_s = self.owned(entry), entry.journal.limit_s
        with self._services.signals.shielded():
            try:
                # the journal is not waited for as long as else: clean-up in the pool comes first
                entry.journal.limit_s = min(patience_s, CLEAN_UP_LIMIT_S)
                owned.remove()
            except BackupError as error:
                owned.tell_left(f"could not be removed now: {error}")
            finally:
                entry.journal.limit_s = patience_s

    def sweep(self, journals: Sequence[RunJournal]) -> None:
        self.inherited.extend(journals)
        for journal in journals:
            for entry in journal.open_entries():
                if not is_understood(entry.facts):
                    self._services.log.info(f"the journal {journal.name}: entry {entry.number} is not one "
                                            "that this version writes; it is left to a newer VmBackup.")
                    continue
                began = (f"{entry.title}: a run on {journal.header.get('host', 'another host')} that began "
                         f"{journal.header.get('since', 'earlier')}")
                try:
                    is_kept = self._is_named(entry)
                except (CatalogError, ApiFailure, PoolError) as error:
                    self.tell(entry, f"{error} What an earlier run may have left of it stays; the next run "
                                     "looks again.")
                    continue
                if is_kept:
                    self._services.log.info(f"{began} made the snapshot that is its reference now; it stays.")
                    entry.close(KEPT)
                    continue
                self._services.log.info(f"{began} {self.owned(entry).left}.")
                self.remove(entry)

    def _is_named(self, entry: OpenEntry) -> bool:
        """Is it the reference by its VM's ledger (CatalogError if unreadable), or another store's?"""
        kinds = {"vm-snapshot": Method.VM.value, "vdi-snapshot": Method.VDI.value}
        kind = kinds.get(entry.facts["kind"], entry.facts.get("of"))
        if kind is None:
            return False
        own, header, uuid = self._services.journal.header, entry.journal.header, entry.facts.get("uuid", "")
        ledger = self._services.catalog.ledger(own.get("pool", ""), entry.facts["vm_uuid"], kind)
        if ledger is not None and ledger.current is not None and ledger.current.uuid == uuid:
            return True
        if not uuid or all(header.get(key) == own.get(key) for key in ("store", "inode")):
            return False
        # a journal that came here with a copy of another store, where the run may have gone on
        class_name = "VM" if kind == Method.VM.value else "VDI"
        ref = self._services.pool.ask_if_there("looking at a reference", class_name + ".get_by_uuid", uuid)
        name = ref and self._services.pool.ask_if_there("looking at a reference",
                                                        class_name + ".get_name_label", ref)
        return bool(name and REFERENCE_NAME.search(name))

    def look_again(self) -> None:
        """What was removed is gone, and what was kept is named, also where a restarted server forgot that."""
        for entry in self._services.journal.entries:
            if entry.facts.get("closed") == KEPT:
                with contextlib.suppress(BackupError):     # it is known by its uuid, whatever its name
                    self.owned(entry).settle(entry.facts["kept_as"])
            elif not entry.is_open:
                entry.remember(closed="")
                self.remove(entry)

    def keep(self, uuid: str, name: str, note: Callable[[], None]) -> None:
        """The snapshot with that uuid, made by this run, stays in the pool under that name. `note`: its
        ledger is on disk. Signals wait, as between that and the end of its entry it would be removed."""
        entry = next(entry for entry in self._services.journal.entries if entry.facts.get("uuid") == uuid)
        with self._services.signals.shielded():
            self.owned(entry).settle(name)
            note()
            entry.remember(kept_as=name, closed=KEPT)

    def has_removed(self, reference: "Reference", ledger: "Ledger") -> bool:
        """The reference, leaving by its ledger, is gone; False, with a finding, if it is not."""
        if any(entry.facts.get("uuid") == reference.uuid for entry in self._open_entries()):
            return False                   # an earlier run's entry tells of it, too, and was tried by now
        with self.begun(ledger.vm, ledger.vm_name, kind="reference", of=ledger.kind, uuid=reference.uuid,
                        disks=[disk["uuid"] for disk in reference.disks.values()]) as entry:
            pass                           # it is removed on the way out
        return not entry.is_open

    def _open_entries(self) -> List[OpenEntry]:
        return [entry for journal in self.inherited + [self._services.journal]
                for entry in journal.open_entries()]

    def check_none_left(self, machine: VirtualMachine) -> None:
        left = sorted({entry.facts["uuid"] for entry in self._open_entries()
                       if is_understood(entry.facts) and entry.facts["vm_uuid"] == machine.uuid
                       and entry.facts.get("uuid")})
        if len(left) >= MOST_LEFT_SNAPSHOTS:
            raise BackupError(f"{machine.title} still has {len(left)} snapshots of earlier backups that "
                              f"could not be removed: {', '.join(left)}. No further one is made. Remove them "
                              "by hand (xe snapshot-uninstall uuid=UUID, or xe vdi-destroy uuid=UUID), then "
                              "run again.")


# --- references: what stays in the pool from one run to the next -------------------------

OLDEST_REFERENCE = timedelta(days=35)


def why_reference_goes(ledger: Ledger, config: str, jobs: Optional[Container[Tuple[str, str]]],
                       is_there: bool, now: datetime) -> str:
    """Why the ledger's reference is to be removed from the pool, "" if it stays. `config` is the path of this
    run's config, `jobs` the (uuid, kind) of what its file selects for backup with references, None if that is
    not known; `is_there`: is the file of the ledger's config where it was?"""
    if ledger.current is None:
        return ""
    if now - parse_utc(ledger.current.at) > OLDEST_REFERENCE:
        return f"it is older than {OLDEST_REFERENCE.days} days"
    if jobs is not None and (ledger.vm, ledger.kind) in jobs:
        return ""                          # its own or another config's: this run's takes its place
    if not is_there:
        return f"the config {one_line(ledger.config)}, which kept it, is gone"
    if jobs is not None and ledger.config == config:
        return f"{one_line(config)} keeps no reference of this VM any more"
    return ""


class References:
    """The snapshots that stay in the pool, by the ledgers of this store: at most one for each VM and kind.
    What is done about one is done under the lock of its VM's directory. A ledger of another store, which came
    here with a copy of it, is neither used nor acted on."""

    def __init__(self, services: Services, snapshots: Snapshots) -> None:
        self._services, self._snapshots = services, snapshots
        self._catalog = services.catalog
        header = services.journal.header
        self.identity = {"store": header.get("store", ""), "inode": header.get("inode", 0)}
        self.pool = header.get("pool", "")
        # whose store this is can't be told as long as id and inode do not fit each other
        self.can_keep = bool(self.identity["store"]) and header.get("is_own") is True

    def ledger(self, vm: str, kind: str) -> Optional[Ledger]:
        """The ledger of that VM and kind, None if it has none; BadLedger, or CatalogError."""
        return within(self._services.patience_s, "reading the record of a reference",
                      lambda: self._catalog.ledger(self.pool, vm, kind))

    def ledgers(self) -> Tuple[List[Ledger], List[BadLedger]]:
        return within(self._services.patience_s, "reading the records of references",
                      lambda: self._catalog.ledgers(self.pool))

    def standing(self, ledger: Ledger) -> List[str]:
        """The uuids of what the ledger names and the pool still has."""
        class_name = "VM" if ledger.kind == Method.VM.value else "VDI"
        return [one.uuid for one in ledger.references if self._stands(class_name, one.uuid)]

    def _stands(self, class_name: str, uuid: str) -> bool:
        """Is it in the pool? What the server can't tell anything of may be, and costs no other."""
        try:
            return self._services.pool.ask_if_there("looking at references", class_name + ".get_by_uuid",
                                                    uuid) is not None
        except ApiFailure as failure:
            self._services.log.info(str(failure))
            return True

    def put(self, ledger: Ledger) -> None:
        within(self._services.patience_s, "writing the record of a reference",
               lambda: self._catalog.put_ledger(ledger))

    def label(self, what: str, copy: str) -> str:
        return (f"{what} (VmBackup reference {parse_copy_name(copy)[0]:%Y-%m-%d %H:%M:%S}, "
                f"store {self.identity['store'][:8]})")

    def keep(self, ledger: Ledger, reference: Reference) -> None:
        """The snapshot of this run that the reference tells of is the VM's reference now, and what was is
        gone. `ledger`: the last one, or a new one, with the facts of now."""
        if ledger.distrust:
            self.give_up(ledger, ledger.distrust)
            return
        ledger = ledger._replace(current=reference, leaving=ledger.references)
        self._snapshots.keep(reference.uuid, reference.name, lambda: self.put(ledger))
        self.let_go(ledger)

    def let_go(self, ledger: Ledger) -> bool:
        """What is leaving is gone; False, with a finding for each, if some of it could not be removed."""
        if ledger.leaving:
            left = tuple(one for one in ledger.leaving if not self._snapshots.has_removed(one, ledger))
            self.put(ledger._replace(leaving=left))
            return not left
        return True

    def give_up(self, ledger: Ledger, why: str) -> bool:
        """Nothing that the ledger names is in the pool any more; as let_go."""
        if ledger.current is not None:
            self._services.log.info(f"{ledger.title}: its reference {ledger.current.uuid} is removed, as "
                                    f"{why}.")
        ledger = ledger._replace(current=None, leaving=ledger.references)
        self.put(ledger)
        return self.let_go(ledger)

    def give_up_on(self, srs: Container[str], in_use: str = "") -> bool:
        """Were references on these SRs given up, to make room, but for that `in_use` (its uuid)?"""
        found = False
        for ledger in self.ledgers()[0] if self._services.journal.is_still_ours() else ():
            if is_of_store(ledger, self.identity) and ledger.current is not None \
                    and ledger.current.uuid != in_use \
                    and any(disk["sr"] in srs for disk in ledger.current.disks.values()):
                try:
                    with self.held(ledger) as now:
                        if now is not None and now.current == ledger.current:
                            found |= self.give_up(now, "its SR is short of space, which comes back as the SR "
                                                  "coalesces, perhaps only by the next night")
                except CatalogError as error:          # it is another VM's: this one goes on
                    self._services.log.info(f"{ledger.title}: its reference stays: {error}")
        return found

    @contextlib.contextmanager
    def held(self, ledger: Ledger, tries: Iterable[bool] = (False,)) -> Iterator[Optional[Ledger]]:
        """The ledger as it is now, its VM's directory locked; None if another run has that, or it is gone."""
        lock = self._catalog.folder_lock(ledger.folder)
        with contextlib.ExitStack() as stack:
            is_ours = lock.is_held or stack.enter_context(lock.held(tries=tries))
            yield self.ledger(ledger.vm, ledger.kind) if is_ours else None

    def strays(self, inventory: Inventory, made_of: Callable[[], Set[str]]) -> Iterator[Tuple[str, str]]:
        """What is named as a reference in the pool and is none of this store's ledgers', each with a sentence
        about it. `made_of` gives the uuids of the snapshots of disks that copies here were made of. Of
        another store it may be the reference that is used there. It is told of if a copy that lies here was
        made of it, as then the ledger was lost, or if it is older than any in use."""
        ledgers, unreadable = self.ledgers()
        known = {one.uuid for ledger in ledgers for one in ledger.references}     # another store's are told
        oldest = f"{self._services.clock.local() - OLDEST_REFERENCE:%Y-%m-%d-%H%M%S}"
        for one in inventory.references:
            is_own = self.identity["store"].startswith(one.store)
            if one.uuid in known or is_own and unreadable:     # one of these may name it
                continue
            if not (is_own or one.stamp < oldest or made_of().intersection(one.disks)):
                continue
            if not self._stands(one.class_name, one.uuid):
                continue                   # removed since the inventory was read, by this run or another
            whose = f" of the store {one.store}" if not is_own else "" if self.can_keep else \
                " of this store, or of the one that it may be a copy of"
            yield one.name, (f"this snapshot, {one.uuid}, bears the name of a reference{whose}, and no "
                             "record of this store names it, so it is left. If nobody needs it, it can go: "
                             + removal_command(one.class_name, one.uuid))


def removal_command(class_name: str, uuid: str) -> str:
    """What removes a snapshot of a VM, with its disks, or of a disk, by hand."""
    return f"xe {'snapshot-uninstall' if class_name == 'VM' else 'vdi-destroy'} uuid={uuid}"


# --- one snapshot, or removal of one, at a time in a pool --------------------------------------

TURN_PATIENCE_S = 10 * MINUTE_S
TURN_PAUSE_S = 0.2


class Turn:
    """Calls that make or destroy snapshots go one at a time in a pool, whichever worker, host or config of
    this store they come from: its master does one after the other in each SR anyway."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._lock = services.catalog.lock_file("turn", services.journal.header["pool"])
        self._uses = 0

    @contextlib.contextmanager
    def held(self, doing: str, is_needed: bool) -> Iterator[None]:
        """Inside, no other such call is made. Where that is needed, BackupError, a passing one, if it is not
        to be had; else it is done without. A store that hangs is not asked."""
        is_ours, tries = False, self._services.signals.until(TURN_PATIENCE_S, TURN_PAUSE_S)
        self._services.log.progress(f"waiting for the turn of {doing}")
        is_left = threading.Event()
        self._uses += 1
        use = self._uses

        def take() -> bool:
            is_taken = self._lock.take()
            if is_taken and is_left.is_set() and self._uses == use:    # nobody waits for it any more
                self._lock.release()
            return is_taken

        for has_time in () if self._services.journal.is_mute else tries:
            try:
                is_ours = within(CLEAN_UP_LIMIT_S, "asking for the turn", take)
            except CatalogError:
                is_left.set()
                if is_needed:
                    raise
                break
            if is_ours or not has_time:
                break
        if is_needed and not is_ours:
            raise BackupError(f"{doing} was not made: others made or removed snapshots in this pool all the "
                              f"time, and it did not get its turn in {format_duration(TURN_PATIENCE_S)}. The "
                              "next run tries again.",
                              passing=True)
        self._services.log.progress(doing)
        try:
            yield
        finally:
            if is_ours:
                with contextlib.suppress(StorageStalled):      # then it ends with this process
                    within(WAY_OUT_S, "giving the turn back", self._lock.release)


# --- a round: what all runs of a config do together ------------------------------------------------

ROUND_FOLDER = "rounds"
ROUND_PLAN = "plan.json"
ROUND_END = "end.json"
ROUND_DUMP = "dump.json"
TROUBLE = "trouble"
SIGN = ".sign"
LEADER_SIGN = "leader" + SIGN
SILENT = ".silent"
CLAIM, AGAIN, DONE, GIVEN_UP = "claim", "again", "done", "failed"
RANK = {CLAIM: 0, AGAIN: 1, GIVEN_UP: 2, DONE: 3}      # of two in one try, which counts
CLAIM_NAME = re.compile(r"(.+)\.([12])\.(claim|again|done|failed)", re.DOTALL)
MOST_TRIES = 2


class RoundJob(NamedTuple):
    """One VM of a round's plan. `job` has its disks only as `disks`, in words, and `is_only` tells whether no
    other VM of the pool bears its name. `local_to` is the uuid of the host that alone sees an SR of its,
    `runs_on` that of the host that it runs on; `newest` the time of its newest good copy, `is_overdue` that
    the last round did not come to it, `has_failed` that its last try failed."""
    job: Job
    folder: str
    disks: str = ""
    is_only: bool = True
    local_to: str = ""
    runs_on: str = ""
    newest: str = ""
    is_overdue: bool = False
    has_failed: bool = False

    @property
    def key(self) -> str:
        """What its files in the round begin with."""
        return safe_name(self.job.machine.uuid)


class RoundPlan(NamedTuple):
    """What a round is to do. `host` and `host_uuid` are its first leader's; times are UTC texts, `until` ""
    if there is no end; `missing` what the config names and the pool lacks."""
    id: str
    version: str
    began_at: str
    host: str
    host_uuid: str
    pool: str
    pool_name: str
    source: str
    path: str
    decisions: str
    hosts: str
    at_once: int
    until: str
    dumps: bool
    clock_went_back: bool
    missing: Tuple[str, ...]
    jobs: Tuple[RoundJob, ...]

    def is_time_up(self, now: datetime) -> bool:
        return bool(self.until) and now >= parse_utc(self.until)


def encode_plan(plan: RoundPlan) -> bytes:
    """The plan as it is in its file; parse_plan reads it."""
    rows = []
    for one in plan.jobs:
        machine, job = one.job.machine, one.job
        rows.append([[machine.ref, machine.uuid, machine.name, machine.power_state, list(machine.problems)],
                     [job.method.value, list(job.rules), job.chosen_by], list(one[1:])])
    return json_line(dict(plan._asdict(), jobs=rows))


def parse_plan(content: bytes) -> RoundPlan:
    """The plan that this version wrote; ValueError for anything else."""
    facts = parse_object(content)
    try:
        jobs = []
        for (ref, uuid, name, power_state, problems), (kind, rules, chosen_by), rest in facts["jobs"]:
            machine = VirtualMachine(ref, uuid, name, "", power_state, (), "", "", "", NULL_REF, (),
                                     tuple(problems))
            jobs.append(RoundJob(Job(machine, Method(kind), Rules(*rules), chosen_by), *rest))
        return RoundPlan(**dict(facts, jobs=tuple(jobs), missing=tuple(facts["missing"])))
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is no plan of this version ({error})")


def standing(names: Iterable[str]) -> Dict[str, Tuple[int, str]]:
    """How it stands with each VM of a round: the number of its last try, and its claim or outcome."""
    found = {}                             # type: Dict[str, Tuple[int, str]]
    for match in filter(None, map(CLAIM_NAME.fullmatch, names)):
        key, state = match.group(1), (int(match.group(2)), match.group(3))
        before = found.get(key)
        if before is None or (state[0], RANK[state[1]]) > (before[0], RANK[before[1]]):
            found[key] = state
    return found


def in_turn(jobs: Iterable[RoundJob], states: Mapping[str, Tuple[int, str]], host: str,
            others: Container[str], is_time_up: bool) -> List[RoundJob]:
    """Those VMs that a worker of that host may try to claim now, in its order: what the last round did not
    come to; what lies on an SR that only this host sees; what runs here; the rest; in each the one whose
    newest good copy is oldest first, those whose last try failed behind the others. Then second tries, and
    what others have claimed, as they may have died. What only one of the `others` sees is left to that."""
    found = []                             # type: List[Tuple[Tuple[Any, ...], int, RoundJob]]
    for index, one in enumerate(jobs):
        number, word = states.get(one.key, (0, ""))
        if word in (DONE, GIVEN_UP) or is_time_up or number == MOST_TRIES and word == AGAIN:
            continue
        if one.local_to and one.local_to != host and one.local_to in others:
            continue
        place = 0 if one.is_overdue else 1 if one.local_to == host else 2 if one.runs_on == host else \
            4 if one.local_to else 3
        found.append((("", AGAIN, CLAIM).index(word), place, one.has_failed, one.newest, index, one))
    return [row[-1] for row in sorted(found, key=lambda row: row[:-1])]


class Round:
    """The folder of a round: its plan, the claims and outcomes of its VMs, the signs of life of its workers.
    A claim is the lock of the VM's directory, and then a file made new: whoever holds the lock and finds a
    claim without an outcome knows that its worker died."""

    def __init__(self, folder: Directory, plan: RoundPlan) -> None:
        self._folder = folder
        self.plan = plan

    @staticmethod
    def place(catalog: Catalog, settings: Configuration, pool: str) -> Directory:
        with catalog.state(ROUND_FOLDER) as rounds:
            return rounds.child_made_if_missing(readable_place(
                settings.path, "/".join((pool, settings.decisions, settings.path))))

    @classmethod
    def begin(cls, place: Directory, plan: RoundPlan) -> "Round":
        """A new round; of those before, only the last stays."""
        for name in [name for name in place.names() if place.is_directory(name)][:-1]:
            with contextlib.suppress(CatalogError):            # a worker of it that was frozen may be at it
                place.remove_tree(name)
        with place.make_child(plan.id) as folder:
            folder.put(ROUND_PLAN, encode_plan(plan))
        return cls(place.child(plan.id), plan)

    @classmethod
    def opened(cls, place: Directory, name: str) -> "Round":
        """The round of that id; NotThere if it has no plan yet, WrongKind if it is none of this version's."""
        with contextlib.ExitStack() as undo:
            folder = undo.enter_context(place.child(name))
            try:
                plan = parse_plan(folder.read(ROUND_PLAN))
            except ValueError as error:
                raise WrongKind(f"{folder.shown}/{ROUND_PLAN} can't be used: {error}.")
            undo.pop_all()
        return cls(folder, plan)

    def names(self) -> List[str]:
        """All that is in it; what is just being written tells nothing."""
        return [name for name in self._folder.names() if not name.endswith(TEMPORARY)]

    def is_over(self) -> bool:
        return self._folder.status(ROUND_END) is not None or self._folder.status(ROUND_PLAN) is None

    def has(self, name: str) -> bool:
        return self._folder.status(name) is not None

    def claim(self, key: str, number: int, facts: Dict[str, Any]) -> bool:
        try:
            self._folder.write(f"{key}.{number}.{CLAIM}", json_line(facts))
            return True
        except NameTaken:
            return False

    def put(self, name: str, facts: Dict[str, Any]) -> None:
        self._folder.put(name, json_line(facts))

    def read(self, name: str) -> Dict[str, Any]:
        """The facts of that file, {} if it has none that can be read."""
        with contextlib.suppress(NotThere, WrongKind, ValueError):
            return parse_object(self._folder.read(name, MEBIBYTE))
        return {}

    def changed(self, name: str) -> Optional[int]:
        """When that file was last written, None if it is not there: good for comparison only."""
        status = self._folder.status(name)
        return None if status is None else status.st_mtime_ns

    def lock(self, name: str) -> LockFile:
        """A lock that is the round's own; the file goes with the round."""
        return LockFile.of(self._folder, name + ".lock")

    def note_told(self, line: str) -> None:
        """The line is among those told, for a leader that takes over. Nothing hangs on it."""
        with contextlib.suppress(CatalogError):
            fd = self._folder.open_file("told", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            with storage_errors("noting what was told"), open(fd, "wb", buffering=0) as file:
                write_all(file.fileno(), (line + "\n").encode("utf-8", "surrogateescape"))

    def told_lines(self) -> Set[str]:
        with contextlib.suppress(CatalogError):
            return set(self._folder.read("told").decode("utf-8", "replace").split("\n"))
        return set()


def last_round(place: Directory) -> Optional[Round]:
    """The newest round there with a plan that can be read, None if there is none."""
    for name in reversed(place.names()):
        with contextlib.suppress(CatalogError):        # it costs no other round anything
            return Round.opened(place, name)
    return None


# =============================================================================
# 19. Run
# =============================================================================
# What every deed has around it: the values that tell how it went, store and pool as config and password name
# them, and the frame: how the store does, the journal of what is made in the pool, and what ended the deed.


class Outcome(NamedTuple):
    """What became of one thing that a run was to do: of a VM to back up, of a copy to verify or drill.
    `error` is None for success, `cause` what it ended with, or a bug met once the copy was sealed; `what` is
    the status log's word for the deed; sizes in bytes."""
    what: str
    uuid: str
    name: str
    title: str
    error: Optional[str] = None
    status_word: str = "SUCCESS"
    said: str = ""
    size_bytes: int = 0
    seconds: float = 0.0
    kept: int = 0
    cause: Optional[BaseException] = None
    findings: Tuple[Finding, ...] = ()


UNTRIED = "NOT-TRIED"                  # the status word of what a run did not come to
BUG_TEXT = "a bug in VmBackup; the log of this run has the traceback."      # what it says may hold anything
CAUSES = {"bug": RuntimeError, "storage": StorageMisbehaved, "": BackupError}


def outcome_facts(outcome: Outcome) -> Dict[str, Any]:
    """The outcome as a round's file has it; of what caused it only what others have to act upon."""
    kind = "bug" if is_bug(outcome.cause) else \
        "storage" if isinstance(outcome.cause, StorageMisbehaved) else ""
    return dict(outcome._asdict(), cause=kind, seconds=round(outcome.seconds, 3) + 0.0,
                findings=[[finding.severity.name, finding.subject, finding.sentence]
                          for finding in outcome.findings])


def outcome_of(facts: Dict[str, Any]) -> Outcome:
    """The outcome in that file; ValueError if it holds none."""
    try:
        is_caused = facts["error"] is not None or facts["cause"]
        return Outcome(**dict(
            {field: facts[field] for field in Outcome._fields},
            cause=CAUSES[facts["cause"]](facts["error"]) if is_caused else None,
            findings=tuple(Finding(Severity[severity], subject, sentence)
                           for severity, subject, sentence in facts["findings"])))
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is no outcome ({error})")


class Wording(NamedTuple):
    """How the runs of an action are told that has status lines, a last line and mail."""
    prefix: str
    noun: str
    done: str
    undone: str
    deed: str


BACKUP_WORDING = Wording("", "VM", "backed up", "not backed up", "backed up")
DRILL_WORDING = Wording("drill: ", "copy", "came back", "did not come back", "drilled")


class Report(NamedTuple):
    """What a run has to tell, whatever it did and however it ended: log, status log and mail show this value.
    All that it was to do has an outcome. `missing` is what the config names and the pool lacks; `dump_error`
    is None where no pool database was to be dumped, "" where it was. `ended_by` ended the run early, and
    `pool` is "" if it did so before the first VM, or has no `wording`. `before`: what became of the last
    round, if that did not end as it should. Whether a run was a success is decided here, not by the log."""
    wording: Optional[Wording]
    source: str
    host: str
    began_at: datetime
    ended_at: datetime
    pool: str = ""
    outcomes: Tuple[Outcome, ...] = ()
    missing: Tuple[str, ...] = ()
    findings: Tuple[Finding, ...] = ()
    dump_error: Optional[str] = None
    ended_by: Optional[BaseException] = None
    signal: int = 0
    before: str = ""

    @property
    def failed(self) -> List[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.error is not None]

    @property
    def failed_names(self) -> List[str]:
        return [quote_name(name) for name in [outcome.name for outcome in self.failed] + list(self.missing)]

    @property
    def successes(self) -> int:
        return len(self.outcomes) - len(self.failed)

    @property
    def warnings(self) -> int:
        return sum(finding.severity is Severity.WARNING for finding in self.findings)

    @property
    def errors(self) -> int:
        """How much was not done: each VM or copy, each literal entry, the dump, and else at least the run."""
        errors = len(self.failed) + sum(finding.severity is Severity.ERROR for finding in self.findings)
        return errors + bool(self.dump_error) + (self.ended_by is not None and not self.failed)

    @property
    def word(self) -> str:
        return "ERROR" if self.errors else "WARNING" if self.warnings else "SUCCESS"

    @property
    def exit_status(self) -> int:
        if self.signal:
            return 128 + self.signal
        if any(map(is_bug, [self.ended_by] + [outcome.cause for outcome in self.outcomes])):
            return int(ExitStatus.BUG)
        if isinstance(self.ended_by, BackupError) and not self.pool:
            return int(self.ended_by.exit_status)
        statuses = {"ERROR": ExitStatus.FAILED, "WARNING": ExitStatus.WARNING, "SUCCESS": ExitStatus.OK}
        return int(statuses[self.word])

    @property
    def size_bytes(self) -> int:
        return sum(outcome.size_bytes for outcome in self.outcomes if outcome.error is None)

    @property
    def duration(self) -> str:
        return format_duration((self.ended_at - self.began_at).total_seconds())


# --- what the words on the command line name ----------------------------------------


SELECTOR_KEYS = ("vm-export=", "vdi-export=")


def is_config_path(target: str) -> bool:
    """Is TARGET a config file, rather than a selector?"""
    if target.startswith(SELECTOR_KEYS):
        return False
    return "/" in target or target.endswith((".cfg", ".conf")) or os.path.isfile(fs_path(target))


def selector_of(target: str) -> Tuple[str, str]:
    """The key and the value that a TARGET means which is no config file."""
    name, _, value = target.partition("=") if target.startswith(SELECTOR_KEYS) else ("vm-export", "", target)
    return name, value


def is_by_config(arguments: Arguments) -> bool:
    """Does a config file alone say which VMs are meant?"""
    return is_config_path(arguments.target) and not any(
        OPTIONS[OPTION_NAMES.index(setting.name)].kind == "selector" for setting in arguments.settings)


def config_path(arguments: Arguments) -> str:
    """The config's real path, or the selector in its place: what tells it from other configs."""
    if is_config_path(arguments.target):
        return fs_text(os.path.realpath(fs_path(arguments.target)))
    return "=".join(selector_of(arguments.target))


@functools.lru_cache(maxsize=None)
def read_password(word: str) -> Optional[str]:
    """The password that the first argument means; None for `-`. UsageError for a file that holds none. It is
    read once: were the file gone at a second look, its path would pass for the password."""
    if word == "-":
        return None
    path = fs_path(word)
    if not (os.path.isfile(path) and os.access(path, os.R_OK)):
        return word
    try:
        with open(path, "rb") as file:
            raw = b"".join(file.read(64 * KIBIBYTE).split())
        if not raw:
            raise ValueError("it is empty")
        return base64.b64decode(raw, validate=True).decode("utf-8", "surrogateescape")
    except (OSError, ValueError, binascii.Error):
        raise UsageError(f"{word} is not a password file: make one with VmBackup.py PASSWORD "
                         "create-password-file=FILE.")


def open_store(settings: Configuration) -> Catalog:
    """The backup directory, to be read; UsageError if it can't be."""
    try:
        return Catalog(settings.backup_dir)
    except CatalogError as error:
        raise UsageError(f"{settings.places.get('backup_dir', 'default')}: backup_dir: {settings.backup_dir} "
                         f"can't be opened: {error} Is the share mounted?")


def open_catalog(settings: Configuration, log: Log) -> Catalog:
    """The backup directory, opened; UsageError if it is not one to write backups to."""
    place = f"{settings.places.get('backup_dir', 'default')}: backup_dir: {settings.backup_dir}"
    catalog = open_store(settings)
    if not catalog.is_writable():
        raise UsageError(f"{place} is not writable: is the share exported and mounted read-write, and root "
                         "not mapped to another user?")
    if catalog.is_on_root:
        where, harm = "on the root file system", "would fill the host's own disk"
    elif catalog.mount is not None and catalog.mount.is_in_memory:
        where, harm = f"in memory ({catalog.mount.kind})", "would be gone when the host restarts"
    else:
        return catalog
    if settings.require_mount != "no":
        if settings.require_mount == "yes" or os.path.exists(INVENTORY_FILE):
            raise UsageError(f"{place} lies {where}: is the share mounted? Backups there {harm}. "
                             "require_mount=no allows it.")
        log.info(f"{settings.backup_dir} lies {where}; this is no host of a pool, so it is used.")
    return catalog


def find_xe(settings: Configuration) -> str:
    """The path of xe; UsageError if there is none."""
    if settings.xe_path:
        if os.access(fs_path(settings.xe_path), os.X_OK) and not os.path.isdir(fs_path(settings.xe_path)):
            return settings.xe_path
        raise UsageError(f"{settings.places['xe_path']}: xe_path: {settings.xe_path} is not a program. "
                         "Correct the path, or leave xe_path out.")
    found = find_program(("xe",), XE_FALLBACK)
    if found is None:
        raise UsageError(f"the program xe was not found, neither on the PATH nor as {XE_FALLBACK}: run this "
                         "on a host of the pool, or install xe and name it with xe_path=.")
    return fs_text(found)


def this_host_name() -> str:
    """This host's name as reports have it before the pool has said it: up to the first dot."""
    return socket.gethostname().split(".")[0]


def this_user() -> str:
    """Who runs the program, for people."""
    import pwd
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:                   # no such user on this host
        return f"user {os.getuid()}"


def is_bug(error: Optional[BaseException]) -> bool:
    """Is it neither an error that we know nor a signal?"""
    return error is not None and not isinstance(error, (BackupError, Interrupted))


@contextlib.contextmanager
def connected(services: Services, changes_allowed: bool = True, patience_s: float = 0,
              is_read: bool = True) -> Iterator[Tuple[Services, Inventory]]:
    """The services with the pool that config and password mean, and what is in it, or only which pool and
    host they are; it is logged out of in the end. UsageError if they contradict."""
    password = read_password(services.arguments.password)
    if password is None and services.settings.pool is not None:
        raise UsageError("pool= needs a password: - means root on this host, which another pool does not "
                         "know.")
    services.log.keep_secret(password or "")
    pool = Pool(services, password, patience_s)
    try:
        pool.connect()
        pool.changes_allowed = changes_allowed
        yield services._replace(pool=pool), pool.inventory() if is_read else pool.identity()
    finally:
        with services.signals.shielded():
            pool.close()


def make_xe(services: Services) -> XeProgram:
    """How xe is called for the pool."""
    password = read_password(services.arguments.password)
    return XeProgram(find_xe(services.settings), services.pool.xe_address, password or "")


# --- the frame ----------------------------------------------------------------------

REMOVAL_LIMIT_S = HOUR_S           # some file systems take minutes to free terabytes
FOR_EVER_S = float("inf")          # what only reads the store may take all its time, until a signal comes


class Run:
    """The frame of every deed: its services, what became of each thing, what was found, what ended it."""

    def __init__(self, services: Services, status_log: "StatusLog") -> None:
        self.services = services
        self.status_log = status_log
        self.wording = None                # type: Optional[Wording]
        self.began_at = services.clock.utc()
        self.inventory = None              # type: Optional[Inventory]
        self.snapshots = None              # type: Optional[Snapshots]
        self.lock = None                   # type: Optional[LockFile]
        self.outcomes = []                 # type: List[Outcome]
        self.findings = []                 # type: List[Finding]
        self.missing = ()                  # type: Tuple[str, ...]
        self.dump_error = None             # type: Optional[str]
        self.ended_by = None               # type: Optional[BaseException]
        self.before = ""                   # what became of the last round, if that has to be told
        self.status = None                 # type: Optional[int]       # what a monitor is told
        self.is_hooked = False             # before_run was begun, so that after_run is due
        self.catalog = None                # type: Optional[Catalog]   # the store that it has opened
        self.part = ""                     # of a backup in its round: LEAD, JOIN or LEAVE; "" if it has none
        self.round = ""                    # the id of the round that it leads
        self.unselected = None             # type: Optional[Tuple[str, ...]]   # VMs of the pool, by title
        self.store_problem = ""            # once the store misbehaved, nothing is pruned
        self.storage_hangs = False         # then nothing of it is waited for any more

    def carry_out(self, deed: Callable[["Run"], None]) -> None:
        """The deed is done, or what ended it is told; whatever that was, the journals are put away."""
        log = self.services.log
        try:
            deed(self)
            self.services.signals.has_open = False
        except UsageError as error:
            self.ended_by = error
            log.complain(str(error))
        except BackupError as error:
            self.ended_by = error
            log.error(f"the run ends here: {error}" if self.is_told else str(error))
        except Exception as bug:
            self.ended_by = bug
            log.bug(bug)
        except Interrupted as interrupted:
            self.ended_by = interrupted
            journal = self.services.journal
            if journal is None:
                log.error(f"{interrupted}.")
            else:
                is_left = bool(journal.open_entries())
                log.warning(f"the run was {interrupted}; " + (
                    "what it has left in the pool is listed above, and left to the next run." if is_left else
                    "what it had open was cleaned up."))
        if self.services.journal is not None:
            with self.services.signals.shielded():
                self.storage_hangs |= self.services.journal.is_mute
                for one in self.snapshots.inherited + [self.services.journal]:
                    self.tidy(f"putting the journal .vmbackup/runs/{one.name} away", one.finish)

    def begin(self, services: Services, inventory: Inventory) -> None:
        """From now on things can be made in the pool: the journal is begun and locked, and kept by the run's
        own services. Status lines are written where the action has some."""
        now, host = services.clock.utc(), inventory.host.short_name
        header = dict(signature(services, inventory), config=services.settings.source)
        journal = self.in_store("beginning the journal", lambda: begin_run(
            services.catalog, run_id(now, host), header, now.timestamp()))
        journal.limit_s = services.patience_s
        self.services = services._replace(journal=journal)
        self.services = self.services._replace(turn=self.in_store(
            "opening the lock of snapshots", lambda: Turn(self.services)))
        self.inventory = inventory
        self.services.signals.has_open = not self.services.log.is_relayed
        self.snapshots = Snapshots(self.services)
        self.services = self.services._replace(references=References(self.services, self.snapshots))
        if self.wording is not None:
            self.status_log.host = host
            self.status_log.begin("vmbackup.py")

    @property
    def is_told(self) -> bool:
        """Does a report tell what it did, and not only what ended it?"""
        return self.wording is not None and self.inventory is not None

    def sweep(self) -> List[CatalogError]:
        """What dead runs left in this pool is gone; why journals of others can't be used and were left."""
        journals, problems = dead_runs(
            self.services.catalog, self.services.journal, self.inventory.pool_uuid,
            self.services.clock.utc().timestamp(), [one.name for one in self.snapshots.inherited])
        self.snapshots.sweep(journals)
        return problems

    def look_again(self) -> None:
        """What the run removed in the pool is really gone, also where a shaken server forgot that."""
        if self.services.pool.times_shaken:
            self.snapshots.look_again()

    def hook(self, name: str, facts: Mapping[str, Any], subject: str = "") -> None:
        """The administrator's program of that config key, if any, has done its work; ProgramError if not."""
        services, settings = self.services, self.services.settings
        words = getattr(settings, name)
        if not words:
            return
        host = self.inventory.host.short_name if self.inventory is not None else this_host_name()
        try:
            Hook(name, words, settings.hook_timeout * MINUTE_S, services.log).run(
                services.signals, subject, dict(facts, config=settings.source, backup_dir=settings.backup_dir,
                                                host=host))
        except ProgramError as error:
            raise ProgramError(f"{name}: {error}{HOOK_LEFT[name]}")

    def check_alive(self) -> None:
        """TakenOver if another run took us for dead: then nothing more may be sealed, deleted or swept."""
        journal = self.services.journal
        if not journal.is_still_ours():
            raise TakenOver(f"another run took this one for dead (its journal {journal.name} was taken "
                            "over): nothing more is sealed or deleted. Do the clocks and locks of the share "
                            "work?")

    def tell(self, findings: Iterable[Finding]) -> None:
        """Each is told as soon as it is found, once, and noted for the report."""
        for finding in findings:
            if finding not in self.findings:
                self.services.log.finding(finding)
                self.findings.append(finding)

    def settle(self, number: int, outcome: Outcome, host: str = "", is_new: bool = True) -> None:
        """That became of the thing of that number, on that host if it was elsewhere; told, in the status log
        if it is new there."""
        self.outcomes[number] = outcome
        self.tell(outcome.findings)
        if is_new:
            self.status_log.end(outcome, host)
        if outcome.error is not None and not is_bug(outcome.cause) and not ends_run(outcome):
            self.services.log.error(f"{outcome.title}: {outcome.error}")

    def report(self) -> Report:
        host, pool, findings, signals = this_host_name(), "", list(self.findings), self.services.signals
        if self.inventory is not None:
            host = self.inventory.host.short_name
            findings += self.snapshots.findings
        if self.is_told:
            pool = self.inventory.pool_title
        noted = signals.noted if self.ended_by is not None and not is_bug(self.ended_by) else None
        return Report(self.wording, self.services.settings.source, host, self.began_at,
                      self.services.clock.utc(), pool, tuple(self.outcomes), self.missing, tuple(findings),
                      self.dump_error, self.ended_by, noted.number if noted else 0, self.before)

    # --- how the store does ---------------------------------------------------------

    def note(self, error: BaseException) -> None:
        """After storage that misbehaved nothing is pruned; one that hangs is not waited for any more."""
        if isinstance(error, StorageMisbehaved):
            self.store_problem = str(error)
        if isinstance(error, StorageStalled):
            self.storage_hangs = True

    def in_store(self, doing: str, work: Callable[[], Any], limit_s: float = 0) -> Any:
        """What the work gives; a hanging store is left after limit_s (stall_timeout), after a signal soon."""
        signals = self.services.signals
        try:
            return within(limit_s or self.services.patience_s, doing, work, signals.is_hurried)
        except StorageStalled as error:
            self.note(error)
            signals.check()
            raise

    def tidy(self, doing: str, work: Callable[[], Any]) -> None:
        """It is done in the store; what can't be done now is left to the next run, so that no store keeps a
        run that has cleaned up in the pool, and nothing hides what went wrong before. Signals wait."""
        if self.storage_hangs:
            return
        try:
            with self.services.signals.shielded():
                self.in_store(doing, work)
        except CatalogError as error:
            self.services.log.info(f"{doing}: left to the next run: {error}")


def ends_run(outcome: Outcome) -> bool:
    """Does the run end with it: a pool that is gone, as what is behind would fail too, or a signal?"""
    return isinstance(outcome.cause, (PoolError, Interrupted)) and not isinstance(outcome.cause, AnswerLost)


def run_id(began_at: datetime, host: str) -> str:
    """What no other run, or round, is called; in the order of time."""
    return f"{began_at:%Y%m%dT%H%M%SZ}-{safe_name(host)}-{os.getpid()}-{random_hex(3)}"


def signature(services: Services, inventory: Inventory) -> Dict[str, Any]:
    """Who we are, for locks and journals."""
    return {"host": inventory.host.short_name, "pid": os.getpid(), "pool": inventory.pool_uuid,
            "since": format_utc(services.clock.utc())}


# --- one run of a config at a time -----------------------------------------------------


def take_config_lock(services: Services, inventory: Inventory,
                     new_round: str) -> Tuple[LockFile, str, Dict[str, Any]]:
    """The lock of this config; what is to be done: LEAD if it is ours now, its text telling that this round
    goes on, JOIN the round that goes on, or LEAVE it to another host of the pool, which is told; and what its
    text told before. LockHeld if another run of this config goes on. What a config is: the pool, what decides
    about copies, and the config's place. Two pools with one path, hosts with different files there, and other
    selectors by hand are different configs."""
    settings, force = services.settings, services.arguments.parameters["force"]
    lock = config_lock(services.catalog, settings, inventory.pool_uuid)
    ours = lock.take()
    text = lock.text()
    # its holder may have taken it this very second, and not have written yet what it is, or only have looked
    # whether anybody has it
    tries = () if ours else enumerate(services.signals.until(LOCK_TEXT_PATIENCE_S, 0.2))
    for number, has_time in tries:
        ours, text = lock.take(), lock.text()
        if ours or number and text.get("state") == "running" or not has_time:
            break
    if not ours and settings.hosts == "all" and not force and text.get("state") == "running" \
            and text.get("pool") == inventory.pool_uuid and text.get("host") != inventory.host.short_name \
            and told(text, "round"):
        return lock, JOIN, text
    if not force and settings.pool is None:
        neighbour = neighbour_text(text, inventory, services.clock.utc(),
                                   not ours or services.catalog.locks_are_local)
        if neighbour:
            lock.release()
            services.log.info(neighbour)
            return lock, LEAVE, text
    if not ours:
        raise LockHeld(f"another run of {settings.source} is still going: {holder_text(text)}. Nothing was "
                       "started; `status` shows how far it is.")
    tell_running(services, inventory, lock, new_round)
    return lock, LEAD, text


LEAD, JOIN, LEAVE = "lead", "join", "leave"


def tell_running(services: Services, inventory: Inventory, lock: LockFile, name: str) -> None:
    """The text of the config's lock, which is ours, tells that this host leads the round of that id."""
    with contextlib.suppress(StorageFull):     # the text is for others, and this run may be to make room
        lock.write_text(dict(signature(services, inventory), state="running", round=name, version=VERSION))


def config_lock(catalog: Catalog, config: Union[Configuration, RoundPlan], pool: str) -> LockFile:
    """The lock of that config, which the leader of its round holds."""
    return catalog.lock_file("config", "/".join((pool, config.decisions, config.path)))


LOCK_TEXT_PATIENCE_S = 5
NEWEST_NEIGHBOUR_S = HOUR_S         # another host's run of this config this recent stands for ours


def neighbour_text(text: Dict[str, Any], inventory: Inventory, now: datetime, may_be_running: bool) -> str:
    """The sentence that leaves this run to another host of the pool that began it less than an hour ago; ""
    if none did. `may_be_running`: false when the lock was free, so that a run that says `running` is dead."""
    host = text.get("host")
    if not host or host == inventory.host.short_name or text.get("pool") != inventory.pool_uuid:
        return ""
    try:
        age_s = (now - parse_utc(text.get("since", ""))).total_seconds()
    except (ValueError, TypeError):
        return ""
    has_ended = has_ended_well(text)
    is_at_it = has_ended or text.get("state") == "running" and may_be_running
    if not is_at_it or not -NEWEST_NEIGHBOUR_S < age_s < NEWEST_NEIGHBOUR_S:
        return ""
    how = f"ended with exit status {text['exit']:d}" if has_ended else "is running"
    return (f"{host} of the same pool began this config's backup at {text['since']} and {how}: left to it. "
            "force=yes runs all the same.")


def has_ended_well(text: Mapping[str, Any]) -> bool:
    """Does the text of a config's lock tell of a run that has come to its end, whatever it met?"""
    return text.get("state") == "finished" and text.get("exit") in (
        ExitStatus.OK, ExitStatus.FAILED, ExitStatus.WARNING)


def end_config_lock(lock: LockFile, status: int) -> None:
    """The lock is free, and its text says how the run ended, if that can be written."""
    try:
        lock.write_text(dict(lock.text(), state="finished", exit=int(status)))
    finally:
        lock.release()


# =============================================================================
# 20. Backup
# =============================================================================
# From a snapshot to an image on disk, proven on the way. A method knows its
# xe command, its format and its check; the flow of the data is the same.

XE_REASON_S = 5
TASK_CANCEL_S = 30
TASK_POLL_S = 20
SR_POLL_S = 10
SILENCE_BEFORE_POLL_S = 5
COMPRESSORS = {"gzip": ("pigz", "gzip"), "zstd": ("zstd",)}
COMPRESSOR_OPTIONS = {"pigz": ("-c", "-n"), "gzip": ("-c", "-n"), "zstd": ("-q", "-c", "-T0")}
XE_PASSING = re.compile(
    r"Lost connection|Connection refused|Connection reset|Broken pipe|EPIPE|ECONNRESET|SESSION_INVALID|"
    r"Another operation involving|OTHER_OPERATION_IN_PROGRESS|SR_BACKEND_FAILURE_(?:37|46|47|82|1200)\b|"
    r"Unable to contact|End_of_file|still booting|"
    # a server that starts may listen on TCP before it does on its socket, where no password is needed
    r"Authentication failed")


class ImageReport(NamedTuple):
    """What was written of the disks, and proven: `images`, `verified` and `disks` as the manifest keeps them,
    the list of blocks, and the archive's ova.xml. `audit`: AGREED, or what the difference kept back, in a
    sentence; "" where no difference was held against the whole."""
    images: List[Dict[str, Any]]
    verified: Dict[str, Any]
    disks: List[Dict[str, Any]]
    blocks: BlocksFile
    ova_xml: bytes
    audit: str = ""


class Chain(NamedTuple):
    """What a copy that tells the state of every block is compared with: `base`, None for a full. `name`: that
    of the copy; `keys`: what its disks are called, by userdevice, in file names and `blocks`. `reference` is
    the snapshot in the pool against which the disks are read, which is the state of the copy `last`: the
    base, or that which a full is audited against; None where all is read, and `why`. `uuids`: those of its
    disks, by key."""
    name: str
    keys: Mapping[str, str]
    base: Optional[Holder]
    reference: Optional[Reference] = None
    last: Optional[Holder] = None
    why: str = ""
    uuids: Mapping[str, str] = {}

    def key(self, disk: Disk) -> str:
        """What that disk is called: as its folder of cfg files is."""
        return self.keys.get(disk.userdevice) or block_key(f"{disk_folder(disk)}-{disk.userdevice}")


def disk_row(holder: Optional[Holder], key: str, size: int) -> Optional[Dict[str, Any]]:
    """The disk of that key in the copy's manifest, if it was not larger there: what became smaller is told
    whole. Were it to grow again, the end of what lies below would come back."""
    rows = [] if holder is None else held_disks(holder.manifest)
    return next((row for row in rows if row["key"] == key and row["virtual_size"] <= size), None)


def block_key(folder: str) -> str:
    """What the disk with that folder of cfg files is called in `blocks`."""
    return folder[len("DISK-"):].replace(" ", "%20")


class Exporter:
    """Runs xe and takes what it says to disk."""

    def __init__(self, services: Services, xe: XeProgram) -> None:
        self._services = services
        self._xe = xe

    def metadata(self, machine: VirtualMachine) -> bytes:
        doing = f"the metadata export of {machine.title}"
        check = Check(check_xva, holds_disks=False)
        self._run_xe(doing, [check], Watch(self._services, doing), "vm-export", "metadata=true",
                     "include-snapshots=false", "uuid=" + machine.uuid, "filename=")
        return check.report.ova_xml

    def pool_database(self, file_fd: int) -> None:
        """The pool's database is in that file, whole; the descriptor is taken over."""
        doing, writer = "the dump of the pool database", Consumer("storage", write_file, file_fd)
        self._run_xe(doing, [writer], Watch(self._services, doing), "pool-dump-database", "file-name=")
        if not writer.result.rstrip().endswith(b"</database>"):
            raise VerificationError(f"{doing} does not end with </database>: it was cut off. Nothing of it "
                                    "was kept.")

    def vm_image(self, snapshot: VirtualMachine, machine: VirtualMachine, inside: Directory, base: str,
                 chain: Optional[Chain], ova_xml: bytes) -> ImageReport:
        """The archive of the snapshot, or what changed, is there, proven whole. `ova_xml`: the VM's own."""
        expected = {disk.vdi_uuid: disk.virtual_size for disk in snapshot.disks}
        doing = f"the export of {machine.title}"

        def export_tasks() -> List[str]:
            operations = self._services.pool.call(
                f"asking for the task of {doing}", "VM.get_current_operations", snapshot.ref)
            return [ref for ref, operation in operations.items() if operation == "export"]

        def prepare() -> None:
            """A snapshot is a template too, and would be imported as one (ocaml/xapi/export.ml, v26.17.0). It
            is done for an archive only, as a snapshot is made no template again (check_snapshot in
            ocaml/xapi/xapi_vm_lifecycle.ml, v1.9.83 to v26.17.0), and then stands among the VMs of `xe
            vm-list`."""
            self._services.pool.ask(f"preparing {doing}", "VM.set_is_a_template", snapshot.ref, False)

        return self._image(doing, snapshot.disks, inside, base + ".xva", chain,
                           lambda blocks, sinks: Check(check_xva, blocks, sinks, expected=expected),
                           ("vm-export", "uuid=" + snapshot.uuid, "filename="), export_tasks,
                           lambda: snapshot_ova(ova_xml, machine, snapshot), prepare)

    def disk_image(self, snapshot: Disk, machine: VirtualMachine, inside: Directory, base: str,
                   chain: Optional[Chain]) -> ImageReport:
        """The image of the disk snapshot, or what changed of it, is in that directory, proven whole."""
        file_format = self._services.settings.vdi_export_format
        check, size = check_raw if file_format == "raw" else check_vhd, snapshot.virtual_size
        return self._image(f"the export of disk {snapshot.device} of {machine.title}", (snapshot,), inside,
                           f"{base}.{file_format}", chain,
                           lambda blocks, sinks: Check(check, blocks, sinks, virtual_size=size),
                           ("vdi-export", "uuid=" + snapshot.vdi_uuid, "filename=", "format=" + file_format))

    def _image(self, doing: str, disks: Sequence[Disk], inside: Directory, plain_name: str,
               chain: Optional[Chain], new_check: Callable[[Optional[BlocksFile], Sequence[Any]], Check],
               command: Sequence[str], find_tasks: Callable[[], Sequence[str]] = tuple,
               ova_xml: Callable[[], bytes] = bytes,
               prepare: Callable[[], None] = lambda: None) -> ImageReport:
        """xe's output through digest, check and compressor to a file; what the compressor wrote is
        decompressed again on the way, so that what is proven is what is stored. In an increment the check's
        sink writes what changed. Where there is a reference, an increment is read as the difference to it, if
        the server gives one; before all is read for a full, it is noted: both have to tell the same.
        `ova_xml` gives the archive's, for who has not read it; `prepare` is done before all is read."""
        settings, limit_s = self._services.settings, self._services.patience_s
        foretold = []                      # type: List[DiskState]
        if chain is not None and chain.reference is not None and disks:
            try:
                if chain.base is not None:
                    return self._by_difference(disks, inside, chain, ova_xml)
                foretold = self._differences(disks, inside, FORETOLD, chain)
                chain = chain._replace(why="a full is made")
            except DifferenceRefused as refusal:
                self._services.log.info(f"{doing}: {refusal} All of it is read.")
                chain = chain._replace(reference=None, why=refusal.why)
        prepare()
        watch = Watch(self._services, doing, sum(disk.virtual_size for disk in disks), disks, find_tasks)
        blocks = BlocksFile(within(limit_s, doing, lambda: inside.create(BLOCKS)))
        by_uuid = {disk.vdi_uuid: disk for disk in disks}

        def exported() -> Dict[str, Disk]:
            """The disks by their names in the image, once the check knows these."""
            if not check.ova:
                return {"image": disks[0]}
            found = exported_disks(check.ova).values()
            if any(one.uuid not in by_uuid for one in found):
                raise VerificationError("the archive holds a disk that the records of the VM do not tell")
            return {one.id: by_uuid[one.uuid] for one in found}

        def begun(name: str) -> DiskState:
            return begin_state(inside, blocks, chain, exported()[name])

        sinks = [StateSink(blocks, begun, exported)] if chain else []
        check = new_check(None if chain else blocks, sinks)
        if chain is not None and chain.base is not None:
            self._run_xe(doing, [check], watch, *command)
            images = [proven_layer(self._services, inside, state, doing) for state in sinks[0].disks.values()]
        else:
            images = [self._full_image(doing, inside, plain_name, check, watch, command)]
        report, rows = check.report, disk_reports(disks, check.report)
        for row in rows if chain else ():
            row.update(state_facts(chain, sinks[0].disks[row["archive_id"]]))
        audit = self._audit(doing, inside, foretold, blocks, rows) if foretold else ""
        verified = {"structure": True, "block_digests": report.digest_kind,
                    "block_digests_checked": report.digests_checked,
                    "blocks": sum(disk.blocks for disk in report.disks), "read_back": settings.verify_after}
        return ImageReport(images, verified, rows, blocks, report.ova_xml, audit)

    def _by_difference(self, disks: Sequence[Disk], inside: Directory, chain: Chain,
                       new_ova: Callable[[], bytes]) -> ImageReport:
        """What differs from the reference is there, proven; DifferenceRefused, with nothing left, if not."""
        try:
            ova_xml = new_ova()
        except VerificationError as error:
            raise DifferenceRefused("the metadata of the VM do not fit its snapshot", str(error))
        states = self._differences(disks, inside, BLOCKS, chain)
        images = [proven_layer(self._services, inside, state, f"the export of disk {state.key}")
                  for state in states]
        ids = {"": "image"} if not ova_xml else {
            one.uuid: one.id for one in exported_disks(parse_ova(ova_xml)).values()}
        rows = disk_reports(disks, StreamReport(tuple(
            DiskReport(ids.get(disk.vdi_uuid, ids.get("")), disk.vdi_uuid, disk.virtual_size, state.present,
                       0) for disk, state in zip(disks, states))))
        if any(row["archive_id"] is None for row in rows) or len(ids) != len(disks):
            raise VerificationError("the metadata of the snapshot do not tell of its disks")
        for row, state in zip(rows, states):
            row.update(state_facts(chain, state))
        verified = {"structure": True, "block_digests": "", "block_digests_checked": True,
                    "blocks": sum(state.stored for state in states),
                    "read_back": self._services.settings.verify_after}
        return ImageReport(images, verified, rows, states[0].blocks, ova_xml)

    def _differences(self, disks: Sequence[Disk], inside: Directory, name: str,
                     chain: Chain) -> List[DiskState]:
        """The state of every disk, by what it was in the reference's copy and the difference to that: in the
        list of blocks of that name, and, if that is the copy's own, with a file of what changed for each. As
        _by_difference."""
        services, begun = self._services, []           # type: Services, List[DiskState]
        blocks = BlocksFile(within(services.patience_s, name, lambda: inside.create(name)))
        try:
            with closed_aside([blocks]):
                for disk in disks:
                    begun.append(self._difference(disk, disk is disks[-1], inside, blocks, chain,
                                                  name == BLOCKS))
        except (ProgramError, VerificationError) as error:
            if error.passing:
                raise
            files = [name] + [chain.key(disk) + ".vhd" for disk in disks]
            within(services.patience_s, name, lambda: [inside.remove_file(file) for file in files])
            raise DifferenceRefused(f"the server gave no difference of disk {chain.key(disk)}",
                                    f"no difference can be used: {error}")
        return begun

    def _difference(self, disk: Disk, is_last: bool, inside: Directory, blocks: BlocksFile, chain: Chain,
                    is_kept: bool) -> DiskState:
        """The state of one disk. The first byte may take its time, as the server makes the table first: the
        task that it notes where the disk hangs on its control domain tells of its progress, if it notes it
        (attach_helpers.ml@v24.19.2)."""
        key, doing, pool = chain.key(disk), f"the difference of disk {disk.device}", self._services.pool

        def export_tasks() -> List[str]:
            drives = pool.call(f"asking for the task of {doing}", "VBD.get_all_records_where",
                               f'field "VDI" = "{disk.vdi_ref}"')
            return [drive["other_config"]["task_id"] for drive in drives.values()
                    if "task_id" in drive["other_config"]]

        sink = StateSink(blocks, lambda _: begin_state(inside, blocks, chain, disk, check.table, is_kept),
                         lambda: ["image"], is_last)
        check = Check(check_vhd, None, [sink], is_layer=True, virtual_size=disk.virtual_size)
        watch = Watch(self._services, doing, 0, (disk,), export_tasks)
        watch.in_use = chain.reference.uuid
        self._run_xe(doing, [check], watch, "vdi-export", "uuid=" + disk.vdi_uuid,
                     "base=" + chain.uuids[key], "format=vhd", "filename=")
        return sink.disks["image"]

    def _audit(self, doing: str, inside: Directory, foretold: Sequence[DiskState], blocks: BlocksFile,
               rows: Sequence[Dict[str, Any]]) -> str:
        """What the disks hold against what the difference told of them: as ImageReport has it."""
        by_key, audit = {row["key"]: row for row in rows}, AGREED
        # a lie of the storage must not be laid at the server's door, and good copies be suspected for it
        for name, written in ((FORETOLD, foretold[0].blocks), (BLOCKS, blocks)):
            check_stored(self._services, inside, name, written.hexdigest(), doing)
        for state in foretold:
            if state.table is None:
                self._services.log.info(f"{doing}: the server sent all of disk {state.key} in the place of a "
                                        "difference, so there is nothing to hold against it.")
                audit = ""
                continue
            number = within(self._services.patience_s, doing, lambda: first_that_differs(
                *(disk_rows(inside, row, name) for row, name in (
                    ({"key": state.key, "begin": state.begin, "end": state.end}, FORETOLD),
                    (by_key[state.key], BLOCKS)))))
            if number is not None:
                audit = (f"MiB {number} of disk {state.key} holds something else than the difference to the "
                         "reference says")
                break
        within(self._services.patience_s, doing, lambda: inside.remove_file(FORETOLD))
        return audit

    def _full_image(self, doing: str, inside: Directory, plain_name: str, check: Check, watch: "Watch",
                    command: Sequence[str]) -> Dict[str, Any]:
        settings, plain = self._services.settings, Digest()
        name = plain_name + COMPRESSED_SUFFIX[settings.compress]
        with closed_aside([check]):
            writer = Consumer("storage", write_file, within(self._services.patience_s, doing,
                                                            lambda: inside.create(name)))
        stored, again = plain, plain
        if settings.compress == "none":
            self._run_xe(doing, [plain, check, writer], watch, *command)
        else:
            stored = Digest("SHA-256 of the stored bytes")
            again = Digest("SHA-256 of what it decompresses to")
            self._run_xe(doing, [plain, check], watch, *command, compression=settings.compress,
                         stored=[stored, writer], again=[again])
        return image_facts(doing, settings, name, plain_name.rpartition(".")[2], plain, stored, again)

    def disk_contents(self, doing: str, vdi_uuid: str, virtual_size: int, file_format: str,
                      sink: Any) -> None:
        """The sink was shown what the disk holds now: raw, or as VHD, without what was never written."""
        check = Check(check_raw if file_format == "raw" else check_vhd, None, [sink],
                      virtual_size=virtual_size)
        self._run_xe(doing, [check], Watch(self._services, doing, virtual_size), "vdi-export",
                     "uuid=" + vdi_uuid, "filename=", "format=" + file_format)

    def _run_xe(self, doing: str, consumers: List[Any], watch: "Watch", *command: str,
                compression: str = "none", stored: Sequence[Any] = (), again: Sequence[Any] = ()) -> None:
        """The command's output went to the consumers, and it ended well; compressed, it went to `stored`, and
        what that decompresses to to `again`. Raises what went wrong first."""
        with contextlib.ExitStack() as stack:
            with closed_aside(list(consumers) + list(stored)):
                xe = stack.enter_context(self._xe.start(*command))
                compressed = []            # type: List[Flow]
                if compression != "none":
                    feeder, compressed = compressing(stack, self._services.settings, stored, again)
                    consumers.append(feeder)
            watch.program = xe
            flows = [Flow(os.dup(xe.stdout_fd), consumers, "xe", lambda: self._check_ending(doing, xe))]
            flows += compressed
            try:
                pump(flows, watch, doing)
            except CompressionDamaged as error:
                raise ProgramError(bad_compressor(doing, compression, f"nothing whole ({error})"))
            except VerificationError as error:
                # an export that failed midway ends in an HTTP error text, which the check meets before xe
                # has told the reason (ocaml/libs/http-lib/http_svr.ml handle_one, v26.17.0)
                if xe.wait(XE_REASON_S) is not None:
                    self._check_ending(doing, xe)
                raise VerificationError(f"{doing} is not whole: {str(error).rstrip('.')}. It was not kept. "
                                        + MASTER_LOG)

    def _check_ending(self, doing: str, xe: Program) -> None:
        """Raises ProgramError unless xe ended well after its last byte."""
        status = xe.wait(PROGRAM_ENDING_S)
        if status is None:
            raise ProgramError(f"{doing}: xe sent its last byte but did not end within "
                               f"{format_duration(PROGRAM_ENDING_S)}; it was killed, and what it sent does "
                               f"not count.", passing=True)
        problem = xe_problem(status, xe.said)
        if problem:
            # of what killed xe on this host the master knows nothing
            raise ProgramError(f"{doing} failed: {problem.rstrip('.')}." + f" {MASTER_LOG}" * (status >= 0),
                               passing=bool(XE_PASSING.search(xe.said)))
        if xe.said:
            self._services.log.info(f"{doing}: xe said: {one_line(xe.said[-400:])}")


def find_compressor(settings: Configuration) -> str:
    """The path of the program that compress= asks for; UsageError if there is none."""
    path = find_program(COMPRESSORS[settings.compress])
    if path is None:
        raise UsageError(f"{settings.places['compress']}: compress={settings.compress} needs the program "
                         f"{' or '.join(COMPRESSORS[settings.compress])}, which is not on the PATH. Install "
                         "it, or set compress=none.")
    return path


def compressing(stack: contextlib.ExitStack, settings: Configuration, stored: Sequence[Any],
                again: Sequence[Any]) -> Tuple[Consumer, List[Flow]]:
    """What feeds the compressor, and the flows that bring what it gives to `stored`, and what that
    decompresses to to `again`. It lives as long as the stack."""
    path = find_compressor(settings)
    program = stack.enter_context(Program((path,) + COMPRESSOR_OPTIONS[os.path.basename(path)],
                                          stdin=subprocess.PIPE))
    feeder = Consumer("compressor", write_pipe, os.dup(program.stdin_fd))
    program.close_stdin()
    proving = reading_flows(stack, os.dup(program.stdout_fd), settings.compress, stored, again)
    return feeder, [proving[0]._replace(name=program.name, at_end=lambda: check_compressor(program)),
                    *proving[1:]]


def image_facts(doing: str, settings: Configuration, name: str, file_format: str, plain: Digest,
                stored: Digest, again: Digest) -> Dict[str, Any]:
    """What the manifest tells of a file; ProgramError if what it decompresses to is not what went in."""
    if again.hexdigest() != plain.hexdigest():
        raise ProgramError(bad_compressor(doing, settings.compress, "other data than it was given"))
    return {"name": name, "format": file_format, "compression": settings.compress,
            "size": stored.total_bytes, "sha256": stored.hexdigest(),
            "plain_size": plain.total_bytes, "plain_sha256": plain.hexdigest()}


# ---- the state of every block, and what changed ------------------------------


class BaseLost(BackupError):
    """What an increment was to rest on is no longer what it was."""


class DifferenceRefused(BackupError):
    """The server gives no difference that can be used; `why` is the same from night to night."""

    def __init__(self, why: str, sentence: str) -> None:
        super().__init__(sentence)
        self.why = why


FORETOLD = "foretold"          # in an unfinished copy: what a difference tells, until it is held against all


def begin_state(inside: Directory, blocks: BlocksFile, chain: Chain, disk: Disk,
                table: Optional[array] = None, is_kept: bool = True) -> DiskState:
    """The state of a disk whose blocks come now; in an increment its file is begun. `table`: that of the
    difference that they come in; not `is_kept`: only what it tells is wanted, of a full too."""
    key, size, base = chain.key(disk), disk.virtual_size, chain.base if is_kept else chain.last
    if base is None:
        return DiskState(key, size, blocks)
    row, old = disk_row(base, key, size), iter(())     # type: Optional[Dict[str, Any]], Iterator[Row]
    try:
        if row is not None:
            old = disk_rows(base.inside, row)
            old = itertools.chain([next(old)], old) if row["begin"] < row["end"] else old
    except (NotThere, WrongKind) as error:
        raise (BaseLost if is_kept else VerificationError)(f"the increment was given up: {error}")
    file = None                            # type: Optional[VhdFile]
    if is_kept:
        file = VhdFile(inside.create(key + ".vhd"), size, VHD_DIFFERENCING if row else VHD_DYNAMIC)
    return DiskState(key, size, blocks, old, base.copy.name, file, table)


def state_facts(chain: Chain, state: DiskState) -> Dict[str, Any]:
    """What the manifest tells of the state of a disk: where its rows stand, in which copies its blocks lie,
    since which copy these are to be laid over each other, and how it was read."""
    row = disk_row(chain.base, state.key, state.size)
    how, why = "full" if chain.base is None else "all", chain.why
    if state.table is not None:
        how, why = DIFFERENCE, ""
    elif chain.base is not None and chain.reference is not None:
        why = "the server sent all of it in the place of a difference"
    elif chain.base is not None and not why:
        why = COMPARED if row else NOT_IN_BASE
    return {"key": state.key, "begin": state.begin, "end": state.end, "blocks": state.present,
            "changed": state.stored, "holders": sorted(state.holders - {""}), "how": how, "why": why,
            "since": row["since"] if row else chain.name}


def proven_layer(services: Services, inside: Directory, state: DiskState, doing: str) -> Dict[str, Any]:
    """What the manifest tells of an increment's file of a disk, which is read from storage and holds what its
    rows say; then it is compressed, if wanted, the plain one gone. StorageMisbehaved if other data come."""
    settings, key, is_plain = services.settings, state.key, services.settings.compress == "none"
    name, plain = f"{key}.vhd{COMPRESSED_SUFFIX[settings.compress]}", Digest()
    stored, again = plain, plain

    def opened() -> Tuple[Proof, int, Optional[int]]:
        rows = disk_rows(inside, {"key": key, "begin": state.begin, "end": state.end})
        proof = Proof({key: (key, state.size, (row for row in rows if not row.holder))})
        with contextlib.ExitStack() as opening:
            fd = inside.open_file(key + ".vhd")
            opening.callback(os.close, fd)
            forget_cached(fd)
            target = None if is_plain else inside.create(name)
            opening.pop_all()
        return proof, fd, target

    try:
        proof, fd, target = within(services.patience_s, doing, opened)
        check = Check(check_vhd, None, [proof.of(key)], strict=False, is_layer=True, virtual_size=state.size)
        flows = [Flow(fd, [plain, check])]
        with contextlib.ExitStack() as stack:
            if not is_plain:
                stored = Digest("SHA-256 of the stored bytes")
                again = Digest("SHA-256 of what it decompresses to")
                writer = Consumer("storage", write_file, target)
                with closed_aside([writer, Consumer("source", None, fd)]):
                    feeder, compressed = compressing(stack, settings, [stored, writer], [again])
                flows = [Flow(fd, [plain, check, feeder]), *compressed]
            pump(flows, Watch(services, f"reading {name} back"), doing)
        proof.finish()
        if proof.spans:
            raise VerificationError("other blocks")
    except CompressionDamaged as error:
        raise ProgramError(bad_compressor(doing, settings.compress, f"nothing whole ({error})"))
    except VerificationError as error:
        raise StorageMisbehaved(f"{doing}: the storage gives back something else than was written to "
                                f"{key}.vhd ({error}): the copy was not kept, and nothing is pruned. Check "
                                "the share or disk.")
    if not is_plain:
        check_stored(services, inside, name, stored.hexdigest(), doing)
        within(services.patience_s, doing, lambda: inside.remove_file(key + ".vhd"))
    return dict(image_facts(doing, settings, name, "vhd", plain, stored, again), disk=key)


def stored_digest(fd: int, on_tick: Callable[[Progress], Any], doing: str) -> str:
    """The SHA-256 of what the storage itself, and no cache, gives of a file; its descriptor is closed."""
    digest = Digest()
    forget_cached(fd)
    pump([Flow(fd, [digest])], on_tick, doing)
    return digest.hexdigest()


def check_stored(services: Services, inside: Directory, name: str, sha256: str, doing: str) -> None:
    """Raises StorageMisbehaved unless the storage gives back what was written to that file; also if it gives
    nothing any more, as a snapshot is there meanwhile."""
    fd = within(services.patience_s, doing, lambda: inside.open_file(name))
    if stored_digest(fd, Watch(services, f"reading {name} back"), doing) != sha256:
        raise StorageMisbehaved(f"{doing}: the storage gives back other bytes than were written to {name}: "
                                "the copy was not kept, and nothing is pruned. Check the share or disk.")


def check_compressor(program: Program) -> None:
    """Raises ProgramError unless the compressor ended well."""
    status = program.wait(PROGRAM_ENDING_S)
    if status is None:
        raise ProgramError(f"the compressor {program.name} did not end, and was killed: nothing of the image "
                           "was kept.")
    if status != 0:
        said = ": " + one_line(program.said).rstrip(".") if program.said else ""
        raise ProgramError(f"the compressor failed, and nothing of the image was kept: "
                           f"{ending_text(program.name, status)}{said}.")


def bad_compressor(doing: str, compression: str, found: str) -> str:
    """The sentence about a compressor whose output does not give back what went in."""
    return (f"{doing}: what compress={compression} stored decompresses to {found}: nothing of it was kept. "
            "Is the compressor on the PATH the real one?")


def disk_reports(disks: Sequence[Disk], report: Any) -> List[Dict[str, Any]]:
    """The disks of an image as the manifest keeps them."""
    seen = {found.uuid: found for found in report.disks if found.uuid}
    rows = []
    for disk in disks:
        found = seen.get(disk.vdi_uuid) or (report.disks[0] if len(report.disks) == 1 else None)
        rows.append({"device": disk.device, "userdevice": disk.userdevice, "name": disk.name,
                     "snapshot_uuid": disk.vdi_uuid, "sr_uuid": disk.sr_uuid,
                     "virtual_size": disk.virtual_size, "archive_id": found.id if found else "",
                     "blocks": found.blocks if found else 0})
    return rows


class Watch:
    """Called about once a second while data flow: signals, progress, stalls and the space on the SR. Time
    limits are about progress, never about total time. A byte is a sign of life; for a vm-export also the
    progress of the task that the server keeps in the snapshot's current_operations, as a sparse disk may be
    silent for long, and for an import that of the tasks that were made for it."""

    def __init__(self, services: Services, doing: str, size_bytes: int = 0, disks: Sequence[Disk] = (),
                 find_tasks: Callable[[], Sequence[str]] = tuple) -> None:
        self._services = services
        self._doing = doing
        self._show = shown_progress(services, doing, size_bytes)
        self._disks = disks                # whose SRs must not become full
        self._find_tasks = find_tasks
        self._stall_s = services.patience_s
        self._alive_at = self._task_asked_at = self._sr_asked_at = time.monotonic()
        self._task_progress = []           # type: List[float]
        self.program = None                # type: Optional[Program]
        self.in_use = ""                   # the uuid of the reference that is read against

    def __call__(self, progress: Progress) -> None:
        """Interrupted, StreamStalled or BackupError abort the flow. A pool that is silent proves nothing."""
        services, now = self._services, time.monotonic()
        self._show(progress)
        if progress.quiet_s < 2:
            self._alive_at = now
        elif progress.quiet_s > SILENCE_BEFORE_POLL_S and now - self._task_asked_at > TASK_POLL_S:
            self._task_asked_at = now
            with contextlib.suppress(ApiFailure, PoolError):
                doing = f"asking for the progress of {self._doing}"
                found = [services.pool.call(doing, "task.get_progress", task) for task in self._find_tasks()]
                if found and found != self._task_progress:         # the server's own progress counts as life
                    self._task_progress, self._alive_at = found, now
        if now - self._alive_at > self._stall_s:
            self._give_up(progress.waiting_for)
        if now - self._sr_asked_at > SR_POLL_S:
            self._sr_asked_at = now
            with contextlib.suppress(ApiFailure, PoolError):
                check_sr_space(services, self._disks, f"{self._doing} was given up", patient=False,
                               in_use=self.in_use)

    def _give_up(self, waiting_for: str) -> None:
        """The tasks are cancelled and xe killed; StreamStalled, or StorageMisbehaved if it is our storage."""
        stalled = f"{self._doing} stalled: no sign of life for {format_duration(self._stall_s)}"
        # the image's writer, the list of blocks, or a compressor before them
        if waiting_for != "xe":
            raise StorageStalled(f"{stalled} while waiting for the {waiting_for}. It was given up. Is the "
                                 "share still reachable?")
        with self._services.signals.shielded(), contextlib.suppress(ApiFailure, PoolError):
            for task in self._find_tasks():
                self._services.pool.call(f"cancelling {self._doing}", "task.cancel", task)
                self.program.wait(TASK_CANCEL_S)
        raise StreamStalled(f"{stalled} from the server. It was cancelled, and what had come was dropped. A "
                            "larger stall_timeout waits longer.")


def check_sr_space(services: Services, disks: Sequence[Disk], consequence: str, patient: bool = True,
                   in_use: str = "") -> None:
    """Raises BackupError if an SR that one of the disks is on has less free than min_sr_free, also when the
    references there, but for that `in_use`, were given up."""
    least = services.settings.min_sr_free
    refs = [disk.sr_ref for disk in disks if disk.sr_uuid] if least else []

    def short() -> List[StorageRepository]:
        found = services.pool.storage_repositories(refs, patient=patient) if refs else ()
        return [sr for sr in found if sr.physical_size > 0 and 100 * max(
            0, sr.physical_size - sr.physical_utilisation) < sr.physical_size * least]

    low, made_room = short(), ""
    if low and services.references is not None and services.references.give_up_on(
            {sr.uuid for sr in low}, in_use):
        low = short()
        made_room = " References there were given up; their space comes back as the SR coalesces."
    for sr in low[:1]:
        free = max(0, sr.physical_size - sr.physical_utilisation)
        raise BackupError(
            f"{consequence}: SR {quote_name(sr.name)} has only {format_size(free)} of "
            f"{format_size(sr.physical_size)} free, less than min_sr_free={least} %, and a snapshot on a "
            f"full SR stops VMs. Free space on it.{made_room}")


def shown_progress(services: Services, doing: str, size_bytes: int) -> Callable[[Progress], None]:
    """Called once a second: signals, and a line of progress. Streams behind each other count as one."""
    samples, done = collections.deque([(services.clock.monotonic(), 0)]), [0, 0]

    def on_tick(progress: Progress) -> None:
        services.signals.check()
        if progress.bytes_read < done[1]:              # that of another stream
            done[0] += done[1]
        done[1] = progress.bytes_read
        samples.append((services.clock.monotonic(), sum(done)))
        while samples[1][0] < samples[-1][0] - RATE_WINDOW_S:
            samples.popleft()
        services.log.progress(doing, figures(samples, size_bytes))
    return on_tick


# ---- a round of backups ------------------------------------------------------
# Workers claim the VMs of a plan, each in a process of its own, on one host or many; one of them leads: it
# makes the plan, clears up before, tells what all do, and reports. One VM's failure stays that VM's; what is
# learned becomes an Outcome.

SIGN_PAUSE_S = 15              # between two signs of life of a worker
TEND_PAUSE_S = 2               # between two looks of a leader at what others have done
IDLE_PAUSE_S = 0.5             # between two looks of a worker that has nothing to do, at first
MOST_IDLE_PAUSE_S = 5.0
SILENCE_S = 10 * MINUTE_S      # beyond stall_timeout: a worker without a sign of life for so long is given up
JOIN_PATIENCE_S = MINUTE_S     # so long a host that alone sees an SR is waited for with what lies there
CLOCKS_DIFFER_S = 60           # from the store's: a host whose clock is further off takes no part
CREW_PAUSE_S = 0.1
CREW_ENDS_S = 5 * MINUTE_S     # how long workers that were told to stop may clean up
WORKER = "--worker"
COMPILED = sys._getframe().f_code      # this file, as it was compiled
WORKER_START = ("import marshal, os, sys; given = sys.stdin.buffer; __name__ = 'VmBackup'; "
                "del sys.argv[0]; __file__ = sys.argv[0]; "
                "places, code = marshal.loads(given.read(int(given.readline()))); "
                "sys.path[:] = map(os.fsdecode, places); exec(code); os._exit(int(main(sys.argv[1:])))")


def untried(job: Job) -> Outcome:
    """The outcome of a job that the run did not come to."""
    machine = job.machine
    return Outcome(job.method.value, machine.uuid, machine.name, machine.title,
                   "not backed up, as the run ended before it was done.", UNTRIED)


def sign_of(claim: Mapping[str, Any]) -> str:
    """The name of the file with the signs of life of the worker that a claim tells."""
    return f"{told(claim, 'host_uuid')}.{told(claim, 'worker')}{SIGN}"


class Worker:
    """Claims VMs of a round and backs them up, one after the other, until there is nothing more to claim."""

    def __init__(self, run: Run, work: Round, exporter: Exporter) -> None:
        self.run, self.round, self.exporter = run, work, exporter
        self._services, self.plan = run.services, work.plan
        self.placement = Placement(
            run.services.catalog, self.plan.pool,
            [one.job.machine.name for one in self.plan.jobs for _ in range(1 if one.is_only else 2)],
            {one.job.machine.uuid: one.folder for one in self.plan.jobs})
        self.read_against = set()          # type: Set[str]     # VMs that were, or are, read by difference
        self.name = run.services.journal.name.partition(".")[0]
        self.mine = set()                  # type: Set[str]     # keys of what this worker has claimed
        self.own = {}                      # type: Dict[str, Tuple[int, str, Outcome]]
        self._host = run.inventory.host
        self._began_s = self._services.clock.monotonic()
        self._ended = threading.Event()
        self._attendant = threading.Thread(target=self._attend, daemon=True)
        self._now = ""                     # the title of the VM at hand
        self._silent = set()               # type: Set[str]     # signs of slots that silent workers hold
        self._unnoted = ""                 # the name of a claim that could not be written
        self._has_slot = True              # at the last look for something to claim
        self._seen = [], {}, {}            # type: Tuple[List[str], Dict[str, Any], Dict[str, Any]]
        self._reckoned = {}, (), []        # type: Tuple[Any, Any, List[RoundJob]]

    # --- signs of life ------------------------------------------------------------------

    def _attend(self) -> None:
        """Gives a sign of life now and then, as long as the main thread gives any, and tends the round."""
        beats, signed_s = -1, self._services.clock.monotonic()
        while not self._ended.wait(TEND_PAUSE_S):
            now_s = self._services.clock.monotonic()
            try:
                if now_s - signed_s > SIGN_PAUSE_S and beats != self._services.signals.beats:
                    beats, signed_s = self._services.signals.beats, now_s
                    for name in self._signs_given():
                        self.round.put(name, dict(
                            self._facts(), vm=self._now, doing=self._services.log.doing))
                if self._unnoted:
                    self._note_claim(self._unnoted)
                self.tend()
            except CatalogError as error:              # the main thread meets it, too, and tells
                self.run.note(error)

    def _signs_given(self) -> List[str]:
        return [sign_of(self._facts())]

    def _note_claim(self, name: str) -> None:
        """The claim that found the store full is tried again: without it this passes for another run."""
        with contextlib.suppress(StorageFull):
            if not self.round.read(name):          # nor has another, who took this one for dead
                self.round.put(name, self._facts())
            if self._unnoted == name:              # and not that of the next VM by now
                self._unnoted = ""

    def tend(self) -> None:
        """What others have done is looked at; only who leads does."""

    def _facts(self) -> Dict[str, Any]:
        return {"worker": self.name, "host": self._host.short_name, "host_uuid": self._host.uuid,
                "pid": os.getpid(), "at": format_utc(self._services.clock.utc())}

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        self._attendant.start()
        try:
            yield
        finally:
            self._ended.set()
            self._attendant.join(1)
            self._services.log.progress("")

    # --- claiming -----------------------------------------------------------------------

    def _check_store(self) -> None:
        """Raises StorageStalled if the storage hangs: nothing more can be done here, or waited for."""
        if self.run.storage_hangs:
            raise StorageStalled(self.run.store_problem or "the backup storage hangs. Is the share still "
                                 "reachable?")

    def states(self) -> Dict[str, Tuple[int, str]]:
        """How it stands with each VM; what this worker has done it knows, whatever could be written."""
        return self.run.in_store("looking at the round", self._states)

    def _states(self) -> Dict[str, Tuple[int, str]]:
        names, known = self.round.names(), dict(self.own)
        if (names, known) == self._seen[:2]:
            return self._seen[2]
        self._silent.update(name for name in names if name.endswith(SILENT))
        found = standing(names)
        for key, (number, word, _) in known.items():
            if found.get(key, (0, ""))[0] < number or found[key] == (number, CLAIM):
                found[key] = number, word
        self._seen = names, known, found
        return found

    def is_stopped(self) -> bool:
        return self.run.in_store("looking at the round", self.round.is_over)

    def work(self) -> None:
        """All was done that could be claimed, and nothing more can be; or nobody else gives a sign of life,
        the leader neither, for whom a worker without work waits."""
        mark, marked_s = (), self._services.clock.monotonic()      # type: Tuple[Any, ...], float
        pause_s = IDLE_PAUSE_S
        while not self.is_stopped():
            self._services.signals.check()
            self._check_store()
            if self.claim_next():
                pause_s = IDLE_PAUSE_S
                continue
            now, now_s = self.run.in_store("looking for signs of life", self._signs_of_others), \
                self._services.clock.monotonic()
            if now != mark:
                mark, marked_s = now, now_s
            if now_s - marked_s > self._services.patience_s + SILENCE_S:
                self._services.log.warning("no worker of this round has given a sign of life for "
                                           f"{format_duration(now_s - marked_s)}: this host leaves it. "
                                           "`status` shows who had what in hand.")
                return
            if not self._services.log.is_relayed:
                self._services.log.progress("waiting for what others have in hand")
            self._services.signals.sleep(pause_s)
            pause_s = min(pause_s * 1.5, MOST_IDLE_PAUSE_S)

    def _signs_of_others(self) -> Tuple[Any, ...]:
        """What changes as long as the leader lives, or a worker that has a VM in its hands."""
        claims = [f"{key}.{number}.{word}" for key, (number, word) in sorted(self._states().items())
                  if word == CLAIM]
        signs = [sign_of(self.round.read(name)) for name in claims]
        return (len(self.round.names()),) + tuple(map(self.round.changed, [LEADER_SIGN] + signs))

    def _others(self, states: Mapping[str, Tuple[int, str]]) -> Set[str]:
        """The uuids of the hosts that do, or soon may, take part, and see SRs that this one does not."""
        if self.plan.hosts != "all":
            return set()
        found = {one.local_to for one in self.plan.jobs if one.key not in states} - {"", self._host.uuid}
        if self._services.clock.monotonic() - self._began_s < JOIN_PATIENCE_S:
            return found
        return {uuid for uuid in found if self._takes_part(uuid)}

    def _takes_part(self, host_uuid: str) -> bool:
        with self.round.lock("host-" + host_uuid).held() as is_free:
            if is_free:
                return False
        signed = [self.round.changed(name) or 0 for name in self.round.names()
                  if name.startswith((host_uuid, f"host-{host_uuid}"))]
        age_s = self._services.clock.utc().timestamp() - max(signed, default=0) / 1e9
        return age_s < self._services.patience_s + SILENCE_S

    def claim_next(self) -> bool:
        """True if a VM was claimed, and came to an outcome; False if there is none to be had just now."""
        states = self.states()
        with contextlib.ExitStack() as stack:
            # who was given up for his silence may hold his slot for ever
            most, slots = self.plan.at_once + len(self._silent), self.round.lock("slots")
            self._has_slot = any(stack.enter_context(slots.held(byte)) for byte in range(1, most + 1))
            return self._has_slot and any(self._try(one) for one in self._candidates(states))

    def _candidates(self, states: Mapping[str, Tuple[int, str]]) -> List[RoundJob]:
        """What may be claimed, in order. It is not reckoned anew where nothing has changed."""
        given = self._others(states), self.plan.is_time_up(self._services.clock.utc())
        if self._reckoned[0] is not states or self._reckoned[1] != given:
            self._reckoned = states, given, in_turn(self.plan.jobs, states, self._host.uuid, *given)
        return self._reckoned[2]

    def _try(self, one: RoundJob) -> bool:
        services, key = self._services, one.key
        lock = services.catalog.folder_lock(one.folder)
        with lock.held(is_kept=lambda: self.run.storage_hangs) as is_ours:
            if not is_ours:
                return False
            states = self.states()
            number, before = states.get(key, (0, ""))
            if before in (DONE, GIVEN_UP):
                return False
            if number == MOST_TRIES:       # the last who tried has died, perhaps with all done
                outcome = untried(one.job)._replace(
                    error=f"not backed up: it was tried {MOST_TRIES} times, and the worker died: was its "
                    "host short of memory (`dmesg`)? What was left is removed.", status_word="WORKER-FAIL")
                try:
                    outcome = BackupJob(self, one).made() or outcome
                except TakenOver:
                    raise
                except BackupError as error:
                    self.run.note(error)
                    outcome = outcome._replace(cause=error, error=(
                        f"it was tried {MOST_TRIES} times, the worker died, and whether its copy is whole "
                        f"can't be told: {error} `verify` tells."))
                word = DONE if outcome.error is None else GIVEN_UP
                self._put(one, number, word, outcome, [])
                self.done(outcome)
                return True
            number += 1
            try:
                if not self.run.in_store("claiming a VM", lambda: self.round.claim(
                        key, number, self._facts())):
                    return False
            except StorageFull:            # its directory is ours all the same, and it may make room
                services.log.info(f"{one.job.machine.title}: the round could not note that it is begun.")
                self._unnoted = f"{key}.{number}.{CLAIM}"
            self.mine.add(key)
            services.log.subject = (quote_name(one.job.machine.name),
                                    f"{len({key, *states})}/{len(self.plan.jobs)}")
            self.run.in_store("telling what is begun", self.tend)
            self._do(one, number, before)
        return True

    def _do(self, one: RoundJob, number: int, before: str) -> None:
        """The VM came to an outcome, which is noted before its directory is free."""
        services, title, told = self._services, one.job.machine.title, len(self.run.snapshots.findings)
        self._now = title
        if before == CLAIM:
            services.log.info(f"{title}: the worker that had claimed it died; clearing up after it, and "
                              "trying once more.")
            for problem in self.run.sweep():
                services.log.info(f"{problem} It is left.")
        elif before == AGAIN:
            services.log.info(f"{title}: trying once more.")
        try:
            outcome = BackupJob(self, one).outcome()
        except Interrupted:
            self.interrupted(one, number, self.run.snapshots.findings[told:])
            raise
        error, noted = outcome.cause, self.run.snapshots.findings[told:]
        if outcome.error is None and before:
            outcome = outcome._replace(findings=outcome.findings + (Finding(
                Severity.WARNING, title, "it needed a second try."),))
        is_passing = isinstance(error, BackupError) and error.passing
        word = DONE if outcome.error is None else \
            AGAIN if number < MOST_TRIES and (is_passing or self.may_leave(error)) else GIVEN_UP
        self._put(one, number, word, outcome, noted)
        self._now = self._unnoted = ""
        services.log.subject = "", ""
        services.log.progress("")
        self.done(outcome)

    def may_leave(self, error: Optional[BaseException]) -> bool:
        """Is it this host that failed, and may another do better?"""
        return isinstance(error, (PoolError, StorageMisbehaved))

    def interrupted(self, one: RoundJob, number: int, noted: Sequence[Finding]) -> None:
        """A signal came while it was done: another worker can do it."""
        self._put(one, number, AGAIN if number < MOST_TRIES else GIVEN_UP, untried(one.job)._replace(
            error=f"the run on {self._host.short_name} was stopped by a signal.", status_word="STOPPED"),
                  noted)

    def done(self, outcome: Outcome) -> None:
        """That is a VM's outcome, which is written. Raises what ends this worker with it."""
        if ends_run(outcome) or isinstance(outcome.cause, StorageMisbehaved):
            raise outcome.cause            # what this host can't do, others may

    def _put(self, one: RoundJob, number: int, word: str, outcome: Outcome, noted: Sequence[Finding]) -> None:
        """The outcome is written, if the store lets us. `noted`: what the log has told by now."""
        self.own[one.key] = number, word, outcome
        facts = dict(self._facts(), outcome=outcome_facts(outcome), noted=[
            [finding.severity.name, finding.subject, finding.sentence] for finding in noted])
        self.run.tidy(f"noting what became of {outcome.title}", lambda: self.round.put(
            f"{one.key}.{number}.{word}", facts))
        if isinstance(outcome.cause, StorageMisbehaved):
            self.run.tidy("noting that the storage misbehaved", lambda: self.round.put(
                TROUBLE, {"why": str(outcome.cause)}))

    # --- what stands in the way, or is left -------------------------------------------------

    @property
    def why_not_pruned(self) -> str:
        if self.plan.clock_went_back:
            return "the clock went back"
        try:
            is_trouble = bool(self.run.store_problem) or self.run.in_store(
                "looking at the round", lambda: self.round.has(TROUBLE))
        except CatalogError as error:
            self.run.note(error)
            is_trouble = True
        return "the storage misbehaved in this run" if is_trouble else ""

    def left(self, error: CatalogError) -> Finding:
        """What can't be read or removed in the store is left, and a warning if that stops the pruning."""
        if isinstance(error, TakenOver):
            raise error
        self.run.note(error)
        return Finding(Severity.WARNING if isinstance(error, StorageMisbehaved) else Severity.INFO,
                       self._services.settings.backup_dir, f"{error} It is left.")

    def clear_unfinished(self, folder: Folder) -> Iterator[Finding]:
        """Unfinished copies of a directory whose lock is ours are gone; where locks do not reach other hosts,
        only what was not written for a day."""
        catalog = self._services.catalog
        for name in folder.unfinished:
            try:
                now_s = self._services.clock.utc().timestamp()
                if catalog.locks_are_local \
                        and now_s - catalog.newest_change_s(folder.name, name) < WEAK_LOCK_PATIENCE_S:
                    continue
                self.run.check_alive()
                self._services.log.info(f"{folder.name}/{name}: left by a run that died; removing it.")
                catalog.remove_unfinished(folder.name, name)
            except CatalogError as error:
                yield self.left(error)


def worker_start() -> Tuple[Sequence[str], bytes]:
    """The command line of a worker, to which its words are added, and what it reads first: what this program
    was compiled to, as to compile it again would cost each worker half a second and 50 MB."""
    content = marshal.dumps(([os.fsencode(place) for place in sys.path], COMPILED))
    warned = ["-W" + option for option in sys.warnoptions]
    return (sys.executable, *warned, "-c", WORKER_START, __file__), b"%d\n" % len(content) + content


class Crew:
    """The other workers of this host, processes of the same program: what they say comes through a pipe, and
    so does what they are to do; one whose pipe ends stops, cleaned up."""

    def __init__(self, services: Services, work: Round) -> None:
        self._log, self._programs = services.log, []       # type: Log, List[Tuple[Program, threading.Thread]]
        arguments, (command, beginning) = services.arguments, worker_start()
        words = {"password": arguments.password, "words": list(arguments.words), "round": work.plan.id}
        for number in range(2, services.settings.workers + 1):
            try:
                program = Program([*command, WORKER], stdin=subprocess.PIPE)
            except ProgramError as error:
                services.log.warning(f"worker {number} of this host could not be started: {error} The "
                                     "others do its share.")
                continue
            program.tell(beginning + json_line(words))
            # its own descriptor: a terminal that takes nothing may hold it up after the worker has ended
            reader = threading.Thread(target=self._relay, daemon=True,
                                      args=(f"worker {number}", os.dup(program.stdout_fd)))
            reader.start()
            self._programs.append((program, reader))

    def _relay(self, name: str, fd: int) -> None:
        with open(fd, encoding="utf-8", errors="backslashreplace") as lines:
            for line in lines:
                self._log.relay(name, line)
        self._log.relay(name, "")

    def wait(self, signals: Signals) -> None:
        """They have ended by themselves, as the round is over: each has finished the VM in its hands."""
        while any(program.wait(0) is None for program, _ in self._programs):
            signals.sleep(CREW_PAUSE_S)

    def end(self) -> None:
        for program, _ in self._programs:
            program.close_stdin()
        ends_at = time.monotonic() + CREW_ENDS_S
        for program, reader in self._programs:
            with program:
                status = program.wait(max(0.0, ends_at - time.monotonic()))
                reader.join(5)
            if program.said:
                self._log.info(f"a worker of this host ended with status {status}: {program.said}")
        self._programs = []


class Helper(Worker):
    """A worker of another host than the leader's, which leads on if that dies."""

    def __init__(self, run: Run, work: Round, exporter: Exporter, lock: LockFile) -> None:
        super().__init__(run, work, exporter)
        self._lock = lock
        self.leads_on = False

    def tend(self) -> None:
        """A leader that died is followed at once, so that nobody begins the round anew: the lock of the
        config is ours then. What follows is for when the VM in hand is done."""
        if not self._lock.is_held and self._lock.take() and not self._is_to_lead():
            self._lock.release()

    def done(self, outcome: Outcome) -> None:
        if outcome.error is not None:
            self._services.log.error(f"{outcome.title}: {outcome.error}")
        super().done(outcome)

    def _is_to_lead(self) -> bool:
        """Does the round still wait for a leader? A text that is torn says nothing else."""
        text = self._lock.text()
        is_current = not text or told(text, "round") == self.plan.id and text.get("state") == "running"
        return is_current and not self.round.is_over()

    def is_stopped(self) -> bool:
        """Was the round ended, or is it this one's to lead on? Then the lock of its config is ours."""
        self.run.in_store("looking for the leader", self.tend)
        if not self._lock.is_held:
            return not self.run.in_store("looking at the round", self._is_to_lead)
        self.leads_on = self.run.in_store("looking at the round", self._is_to_lead)
        if not self.leads_on:
            self._lock.release()
        return True

    def taken(self) -> int:
        claims = [self.round.read(name) for name in self.round.names() if name.endswith("." + CLAIM)]
        return sum(told(facts, "host_uuid") == self._host.uuid for facts in claims)


def clock_off_s(services: Services, work: Round, name: str) -> float:
    """By how many seconds this host's clock is ahead of the store's."""
    work.put(name + ".clock", {})
    return services.clock.utc().timestamp() - (work.changed(name + ".clock") or 0) / 1e9


class Leader(Worker):
    """The worker that leads: what a round needs done once, and what is told of it."""

    def __init__(self, run: Run, work: Round, exporter: Exporter) -> None:
        super().__init__(run, work, exporter)
        self._tending = threading.Lock()
        self._told = set()                 # type: Set[str]     # claims and outcomes
        self._settled = set()              # type: Set[str]     # keys of VMs whose outcome is final
        self._numbers = {one.key: number for number, one in enumerate(self.plan.jobs)}
        self._signs = {}                   # type: Dict[str, Tuple[Optional[int], float]]
        self._waiting = {}                 # type: Dict[Tuple[str, int], float]    # since when, in vain
        self._at_rest = None               # type: Optional[Mapping[str, Tuple[int, str]]]  # at the last look
        self._vain_looks = 0               # since it had one, or somebody had a VM in hand
        self._before = set()               # type: Set[str]     # what a leader before has told
        self._is_unfit = False             # its own storage has misbehaved
        run.outcomes = [untried(one.job) for one in self.plan.jobs]
        run.missing, run.round = self.plan.missing, self.plan.id
        if self.plan.dumps:
            run.dump_error = "not dumped, as the run ended before it was done."

    # --- what all do, told ----------------------------------------------------------------

    def _signs_given(self) -> List[str]:
        """Its own as a worker, and the leader's, by which who has nothing to do knows what it waits for."""
        return super()._signs_given() + [LEADER_SIGN]

    def tend(self) -> None:
        """Claims and outcomes are told, each once; to all workers, at once, that a signal ends the round."""
        noted = self._services.signals.noted
        if noted and not self.round.has(ROUND_END):
            self.round.put(ROUND_END, dict(self._facts(), how=str(noted)))
        with self._tending:
            for key, (number, word) in sorted(self._states().items()):
                if key not in self._numbers or key in self._settled:
                    continue
                one = self.plan.jobs[self._numbers[key]]
                for earlier in range(1, number):       # a first try of another that ended in between
                    self._tell_claim(one, earlier)
                    again = f"{key}.{earlier}.{AGAIN}"
                    if again not in self._told and self.round.has(again):
                        self._tell_outcome(one, earlier, AGAIN)
                self._tell_claim(one, number)
                if word != CLAIM:
                    self._tell_outcome(one, number, word)

    def _is_news(self, name: str) -> bool:
        """Is that file told for the first time, by this leader or one before?"""
        if name in self._told:
            return False
        self._told.add(name)
        is_new = name not in self._before
        if is_new:
            self.round.note_told(name)
        return is_new

    def _tell_claim(self, one: RoundJob, number: int) -> None:
        name = f"{one.key}.{number}.{CLAIM}"
        if not self._is_news(name):
            return
        host = "" if one.key in self.mine else told(self.round.read(name), "host")
        if host not in ("", self._host.short_name):
            self._services.log.info(f"{one.job.machine.title}: begun on {host}.")
        self.run.status_log.begin(one.job.method.value, one.job.machine.name, host)

    def _tell_outcome(self, one: RoundJob, number: int, word: str) -> None:
        """The VM came to that outcome, also one that a leader before has told."""
        name, log, title = f"{one.key}.{number}.{word}", self._services.log, one.job.machine.title
        if name in self._told:
            return
        noted = []                         # type: List[Finding]
        if one.key in self.own and self.own[one.key][:2] == (number, word):
            outcome, host = self.own[one.key][2], self._host.short_name
        else:
            facts = self.round.read(name)
            try:
                outcome, host = outcome_of(facts.get("outcome", {})), told(facts, "host")
                noted = [Finding(Severity[severity], subject, sentence)
                         for severity, subject, sentence in facts.get("noted", ())]
            except ValueError as error:
                host, outcome = "", untried(one.job)._replace(
                    error=f"what became of it can't be read: {error}. `list` shows if it has a new copy.")
        is_new = self._is_news(name)
        if host not in ("", self._host.short_name):
            self.run.tell(noted)
            if outcome.error is None:
                log.info(f"{title}: backed up by {host}: {format_size(outcome.size_bytes)} in "
                         f"{format_duration(outcome.seconds)}.")
        else:
            self.run.findings += [finding for finding in noted if finding not in self.run.findings]
        is_last = self._states().get(one.key) == (number, word)
        if word == AGAIN and not (is_last and self.round.has(ROUND_END)):
            self.run.tell(outcome.findings)
            log.warning(f"{title}: {outcome.error} It is tried once more at the end of the run.")
            if is_new:
                self.run.status_log.end(outcome._replace(status_word="RETRY"), host)
            return
        if isinstance(outcome.cause, StorageMisbehaved):
            self.run.note(outcome.cause)
        self._settled.add(one.key)
        self.run.settle(self._numbers[one.key], outcome, host, is_new)

    def may_leave(self, error: Optional[BaseException]) -> bool:
        """One that lost its pool ends the round, as all would fail; the storage may fail this host only."""
        return isinstance(error, StorageMisbehaved) and self._has_others()

    def _has_others(self) -> bool:
        if self.plan.hosts != "all" or self.run.storage_hangs:
            return False
        own = f"host-{self._host.uuid}.lock"
        try:
            return self.run.in_store("looking who takes part", lambda: any(
                self._takes_part(name[len("host-"):-len(".lock")]) for name in self.round.names()
                if name.startswith("host-") and name.endswith(".lock") and name != own))
        except CatalogError as error:
            self.run.note(error)
            return False

    def _candidates(self, states: Mapping[str, Tuple[int, str]]) -> List[RoundJob]:
        """As every worker's; one whose storage misbehaved leaves to others all that they can do."""
        found = super()._candidates(states)
        if self._is_unfit and self._has_others():
            found = [one for one in found if one.local_to == self._host.uuid]
        return found

    def interrupted(self, one: RoundJob, number: int, noted: Sequence[Finding]) -> None:
        """It counts as not tried: the round ends here."""

    def done(self, outcome: Outcome) -> None:
        """It is told. Raises what ends the round with it: a pool that is gone, or a signal."""
        self._is_unfit |= isinstance(outcome.cause, StorageMisbehaved)
        self._check_store()
        self.run.in_store("telling what was done", self.tend)
        if ends_run(outcome):
            raise outcome.cause

    # --- until all is done ----------------------------------------------------------------------

    def is_stopped(self) -> bool:
        """Has every VM its outcome, or is nothing new to be started and nothing under way?"""
        self.run.in_store("looking at the round", self.tend)
        if len(self._settled) == len(self.plan.jobs):
            return True
        return self.plan.is_time_up(self._services.clock.utc()) and not any(
            word == CLAIM for key, (_, word) in self.states().items() if key not in self._settled)

    def work(self) -> None:
        """Every VM came to an outcome, whoever did it, or was given up."""
        while not self.is_stopped():
            self._services.signals.check()
            if self.claim_next():
                self._waiting = {}         # nobody looked meanwhile who is busy
            else:
                self._wait()
        if any(word == AGAIN for _, word in self.states().values()):
            self._services.signals.check()         # what a signal left untried a second time ends the run so
        for one in self.plan.jobs:
            if one.key not in self._settled:       # its time was up
                self._settled.add(one.key)
                self.run.settle(self._numbers[one.key], untried(one.job)._replace(
                    error=f"not backed up: until={self._services.settings.until} came before its turn. It "
                    "comes first next time."))

    def _wait(self) -> None:
        """Nothing can be claimed just now: what is waited for in vain is given up."""
        now_s, states = self._services.clock.monotonic(), self.states()
        is_at_rest, self._at_rest = states == self._at_rest, states
        for one in self.plan.jobs:
            number, word = states.get(one.key, (0, ""))
            if word == CLAIM and self.run.in_store("looking for signs of life", functools.partial(
                    self._check_sign, one, number, now_s)):
                is_at_rest, self._waiting = False, {}
        # looks are counted, and not seconds: how long a store kept this one says nothing of others
        self._vain_looks = self._vain_looks + 1 if is_at_rest and not self._has_slot else 0
        if self._vain_looks * IDLE_PAUSE_S > self._services.patience_s + SILENCE_S:
            # a worker that froze while it looked for a VM may hold its slot for ever
            self._vain_looks = 0
            self._services.log.warning(
                f"nothing was begun for {format_duration(self._services.patience_s + SILENCE_S)}, and all of "
                f"at_once={self.plan.at_once} are taken, by workers that give no sign of life: one more is "
                "used.")
            self._note_silent(f"slot-{len(self._silent)}")
        if is_at_rest:                     # nobody has a VM in hand, or has begun one since the last look
            self.run.in_store("looking who is busy", functools.partial(self._check_busy, states, now_s))
        self._services.signals.sleep(IDLE_PAUSE_S)

    def _note_silent(self, what: str) -> None:
        """All workers may use one slot more."""
        self._silent.add(what + SILENT)    # also where it can't be written
        self.run.tidy("noting that it is silent", lambda: self.round.put(what + SILENT, {}))

    def _check_sign(self, one: RoundJob, number: int, now_s: float) -> bool:
        """Has the worker that claimed the VM given a sign of life lately? If not, and it is not known to be
        dead, the VM is given up; one whose worker died waits for whoever can try it again."""
        facts = self.round.read(f"{one.key}.{number}.{CLAIM}")
        sign, host = self.round.changed(sign_of(facts)), told(facts, "host")
        place = f"{one.key}.{number}"
        if self._signs.get(place, (0, 0.0))[0] != sign or place not in self._signs:
            self._signs[place] = sign, now_s
        lives = now_s - self._signs[place][1] <= self._services.patience_s + SILENCE_S
        is_late = self.plan.is_time_up(self._services.clock.utc())
        if lives and not is_late:
            return True
        with self._services.catalog.folder_lock(one.folder).held() as is_free:
            if self._states().get(one.key) != (number, CLAIM):
                return True
            if is_free and is_late:
                self._put(one, number, GIVEN_UP, untried(one.job)._replace(
                    error=f"not backed up: the worker on {host} that had claimed it died, and "
                    f"until={self._services.settings.until} came before another could try.",
                    status_word="WORKER-FAIL"), [])
            elif not is_free and not lives:
                at = told(self.round.read(sign_of(facts)), "at") or told(facts, "at")
                self._note_silent(one.key)
                self._put(one, number, GIVEN_UP, untried(one.job)._replace(
                    error=f"no sign of life from {host} since {at}: it was left alone. Is that host alive? "
                    "Its copy may still come.", status_word="NO-SIGN-OF-LIFE"), [])
        return lives

    def _check_busy(self, states: Mapping[str, Tuple[int, str]], now_s: float) -> None:
        """What is left is given up if another run holds its directory for longer than lock_wait."""
        services, lock_wait, waiting = self._services, self._services.settings.lock_wait, {}
        for one in self.plan.jobs:
            number, word = states.get(one.key, (0, ""))
            lock = services.catalog.folder_lock(one.folder)
            if word not in ("", AGAIN) or number == MOST_TRIES:
                continue
            with lock.held() as is_free:
                if is_free:
                    continue
            text, place = lock.text(), (one.key, number)
            waiting[place] = self._waiting.get(place, now_s)
            if place not in self._waiting:
                services.log.info(f"{one.job.machine.title}: {one.folder} is in use by another run "
                                  f"({holder_text(text)}); waiting.")
            # claimed, too: a worker of this round that has just taken the lock then does nothing more
            if place in self._waiting and now_s - waiting[place] >= lock_wait * MINUTE_S \
                    and self._states().get(one.key, (0, "")) == (number, word) \
                    and self._may_claim(one.key, number + 1):
                self._put(one, number + 1, GIVEN_UP, untried(one.job)._replace(
                    error=f"the directory {one.folder} is in use by another run ({holder_text(text)}) since "
                    f"before lock_wait={lock_wait} minutes. Nothing was done for this VM. The next run tries "
                    "again; a larger lock_wait waits longer.",
                    status_word="LOCK-FAIL"), [])
        self._waiting = waiting

    def _may_claim(self, key: str, number: int) -> bool:
        """That try of the VM is claimed, by this worker, and was by none; a full store may note nothing."""
        try:
            return self.round.claim(key, number, self._facts())
        except StorageFull:
            return True

    # --- the story --------------------------------------------------------------------------

    def _begin(self, plan: Plan, findings: Sequence[Finding]) -> None:
        """What has to be cleared up and told before the first VM; `findings`: those of the round's plan."""
        tell, settings, services = self.run.tell, self._services.settings, self._services
        if is_by_config(services.arguments):
            self.run.unselected = tuple(machine.title for machine in plan.unselected)
        services.log.info(f"VmBackup {VERSION}: {counted(len(self.plan.jobs), 'VM')} of {settings.source} in "
                          f"pool {self.run.inventory.pool_title}; host {self._host.short_name}.")
        if self.run.before:
            services.log.info(self.run.before)
        for machine in plan.provisional:
            services.log.info("left out: " + provisional_text(machine))
        tell(plan.findings)
        tell(Finding(Severity.WARNING, *warning.split(": ", 1)) for warning in settings.warnings)
        if settings.hosts == "all":
            tell(self.run.in_store("looking for other rounds", lambda: list(other_rounds(
                services, self.run.inventory)), FOR_EVER_S))
        tell(self._clear_leftovers())
        tell(self._dropped(plan))
        tell(self._clear_references())
        tell(findings)
        tell(self.run.in_store("looking for increments that were moved", lambda: list(self._moved()),
                               FOR_EVER_S))

    def take_over(self, helper: Worker) -> None:
        """The leader of the round is dead, and this one, a helper till now, leads on."""
        self.own, self.mine, self.read_against = helper.own, helper.mine, helper.read_against
        self._before = self.run.in_store("reading what was told", self.round.told_lines)
        self.run.before = (f"{self.plan.host}, which began this round of {self.plan.source} at "
                           f"{self.plan.began_at}, is gone: {self._host.short_name} took over and led on.")
        self._services.log.warning(self.run.before)

    def lead(self, plan: Optional[Plan] = None, findings: Sequence[Finding] = (),
             crew: Optional[Crew] = None) -> None:
        """The round is done, and ended for all. A pool that stays away, or a signal, ends it early. `plan`:
        that of a new round, None where one is led on, with its `crew`."""
        how, services = "ended early", self._services
        try:
            self.run.in_store("taking part", self.round.lock("host-" + self._host.uuid).take)
            if plan is not None:
                self._begin(plan, findings)
            if self.plan.dumps and self.run.in_store("looking at the round",
                                                     lambda: self.round.has(ROUND_DUMP)):
                self.run.dump_error = told(self.round.read(ROUND_DUMP), "error")
            elif self.plan.dumps:
                self.run.tell(self._dump_pool_database())
                self.run.tidy("noting the dump", lambda: self.round.put(
                    ROUND_DUMP, {"error": self.run.dump_error}))
            crew = crew or Crew(services, self.round)
            with self.at_work():
                self.work()
            how = "ended"
        except Interrupted as interrupted:
            how = str(interrupted)
            raise
        finally:
            with services.signals.shielded():
                self.run.tidy("ending the round", lambda: self.round.put(ROUND_END, dict(
                    self._facts(), how=how)))
                if crew is not None:
                    crew.end()
                self.run.tidy("telling what was done", self.tend)
                self.run.tidy("looking what others do", self._tell_under_way)
                self._tell_own()
        if services.settings.workers > 1 or self.plan.hosts == "all":
            for problem in self.run.sweep():
                services.log.info(f"{problem} It is left.")
        self._clear_after_the_dead()
        self.run.look_again()
        self.run.tell(self._low_space())

    def _tell_own(self) -> None:
        """What this worker itself has done is told, also where the store lets nobody read it any more."""
        for key, (number, word, outcome) in self.own.items():
            if word == AGAIN:
                self.run.tell(outcome.findings)
            elif key not in self._settled:
                self._settled.add(key)
                is_new = f"{key}.{number}.{word}" not in self._before
                self.run.settle(self._numbers[key], outcome, is_new=is_new)

    def _tell_under_way(self) -> None:
        """What other hosts have in hand as the round ends early is no failure yet."""
        for one in self.plan.jobs:
            number, word = self._states().get(one.key, (0, ""))
            if word == CLAIM and one.key not in self._settled:
                host = told(self.round.read(f"{one.key}.{number}.{CLAIM}"), "host")
                if host not in ("", self._host.short_name):
                    self.run.outcomes[self._numbers[one.key]] = untried(one.job)._replace(
                        error=f"under way on {host} as the round was ended; its copy may still come: `list` "
                              "shows it.")

    def _clear_after_the_dead(self) -> None:
        states = self.states()
        for one in self.plan.jobs:
            if states.get(one.key, (0, ""))[0] > 1:
                with contextlib.suppress(CatalogError), \
                        self._services.catalog.folder_lock(one.folder).held() as is_ours:
                    if is_ours:
                        self.run.tell(self.clear_unfinished(self._services.catalog.folder(one.folder)))
                        self._services.catalog.root.remove_if_empty(one.folder)

    # --- what dead runs left ----------------------------------------------------------

    def _clear_leftovers(self) -> Iterator[Finding]:
        catalog = self._services.catalog
        problems = self.run.sweep()
        try:
            catalog.clear_temporaries(self._services.clock.utc().timestamp())
        except CatalogError as error:
            yield self.left(error)
        for name in catalog.folder_names(problems):
            try:
                if catalog.has_unfinished(name):
                    with catalog.folder_lock(name).held() as is_ours:
                        if is_ours:                    # else another run is busy there
                            yield from self.clear_unfinished(catalog.folder(name))
                            catalog.root.remove_if_empty(name)
            except CatalogError as error:              # lost+found on a share, and the like
                yield self.left(error)
        yield from map(self.left, problems)

    def _clear_references(self) -> Iterator[Finding]:
        """What ledgers tell to be leaving is gone, and the references that nobody keeps any more; what can't
        be used of ledgers, and is named as a reference without one, is told."""
        run, services, references = self.run, self._services, self._services.references
        try:
            ledgers, problems = references.ledgers()
        except CatalogError as error:
            self.run.note(error)
            yield Finding(Severity.WARNING, services.settings.backup_dir, f"{error} No reference is used, or "
                          "removed.")
            return
        yield from (Finding(Severity.WARNING, services.settings.backup_dir, str(one)) for one in problems)
        path, now = services.settings.path, services.clock.utc()
        jobs = jobs_with_references(services.settings.of_file, run.inventory)
        for ledger in ledgers:
            if not is_of_store(ledger, references.identity):
                for uuid in references.standing(ledger):
                    command = removal_command("VM" if ledger.kind == Method.VM.value else "VDI", uuid)
                    yield Finding(Severity.WARNING, ledger.title, f"the record of its reference {uuid} came "
                                  "here from another store, or this one was moved, so it is left alone. If "
                                  f"no other store uses it, it can go: {command}")
                continue
            why = why_reference_leaves(ledger, path, jobs, run.inventory.host.short_name, now)
            if not why and not ledger.leaving:
                continue
            try:
                with references.held(ledger) as current:
                    if current is not None:            # else another run is busy there
                        run.check_alive()
                        references.give_up(current, why) if why else references.let_go(current)
            except CatalogError as error:
                yield self.left(error)
        made_of = functools.lru_cache(maxsize=None)(
            lambda: self.placement.snapshots_of(one.job.machine for one in self.plan.jobs))
        try:
            for name, sentence in references.strays(run.inventory, made_of):
                yield Finding(Severity.WARNING, quote_name(name), sentence)
        except CatalogError as error:                  # of that VM its own job tells more
            yield self.left(error)

    def _dropped(self, plan: Plan) -> List[Finding]:
        """Warnings about VMs that dropped out of all configs; what is planned now is on record."""
        findings = []                      # type: List[Finding]
        try:
            record, findings = self.run.in_store("reading the earlier plans", lambda: dropped_vms(
                self._services, self.run.inventory, plan))
            if record is not None:
                self.run.in_store("putting the plan on record",
                                  lambda: self._services.catalog.put_plan(record))
        except CatalogError as error:              # it costs no VM its backup
            return findings + [self.left(error)]
        return findings

    def _moved(self) -> Iterator[Finding]:
        """Warnings of increments that somebody has put into directories that are no VM's of this run."""
        catalog, settings = self._services.catalog, self._services.settings
        for name in catalog.folder_names() if settings.incremental else ():
            with contextlib.suppress(CatalogError):        # of what can't be read others tell
                if name not in self.placement.known:
                    for copy in catalog.increments_in(name):
                        if moved_text(copy):
                            yield Finding(Severity.WARNING, settings.backup_dir, moved_text(copy))

    def _low_space(self) -> Iterator[Finding]:
        place = self._services.settings.backup_dir
        largest = max((outcome.size_bytes for outcome in self.run.outcomes), default=0)
        try:
            free = None if self.run.store_problem else self._services.catalog.free_bytes()
        except CatalogError as error:              # every VM is done by now
            self.run.note(error)
            yield Finding(Severity.WARNING, place, str(error))
            return
        if free is not None and free < largest:
            yield Finding(Severity.WARNING, place, f"only {format_size(free)} are free, and the largest copy "
                          f"of this run has {format_size(largest)}: the next run may not fit. Free space "
                          "there, or lower max_backups.")

    # --- the pool database --------------------------------------------------------------

    def _dump_pool_database(self) -> Iterator[Finding]:
        catalog = self._services.catalog
        try:
            catalog.check_in_place()
            folder = dump_folder(catalog, self.run.inventory)
            name = catalog.new_pool_dump(folder, self._services.clock.local(), self.exporter.pool_database)
            self._services.log.info(f"pool database: {folder}/{name} is complete.")
            self.run.dump_error = ""
        except BackupError as error:
            self.run.note(error)
            self.run.dump_error = str(error)
            self._services.log.error(f"pool database: {error}")
            return
        try:
            yield from self._prune_pool_dumps(folder, name)
        except TakenOver:
            raise
        except CatalogError as error:              # the new dump is there all the same
            self.run.note(error)
            yield Finding(Severity.WARNING, "pool database", f"older dumps were not pruned: {error}")

    def _prune_pool_dumps(self, folder: str, newest: str) -> Iterator[Finding]:
        problems = []                      # type: List[CatalogError]
        catalog, most = self._services.catalog, self._services.settings.max_backups
        dumps = [name for name, pool in catalog.pool_dumps(folder, problems)
                 if pool == self.run.inventory.pool_uuid]
        yield from map(self.left, problems)
        reason = self.why_not_pruned
        if not reason and dumps[-1:] != [newest]:
            reason = "the clock went back" if newest in dumps else \
                f"{folder}/{newest}, just made, can't be read back"
        if reason:
            self._services.log.info(f"pool database: nothing is pruned, as {reason}.")
            return
        for old in dumps[:-most]:
            self.run.check_alive()
            with catalog.root.child(folder) as place:
                place.remove_file(old)
                place.sync()
            self._services.log.info(f"pool database: removed {folder}/{old}: {counted(most, 'dump', 'is')} "
                                    "kept.")


class BackupJob:
    """One copy more of one VM, from its directory's lock to retention. It knows of no other job."""

    def __init__(self, worker: Worker, planned: RoundJob) -> None:
        self._backup = worker
        self._run = worker.run
        self._services = worker.run.services
        self._job = planned.job
        self._planned_disks = planned.disks
        self._findings = []                # type: List[Finding]
        self._said = ""                    # what the copy is in its chain
        self._lie = ""                     # what its audit has found of those before, in sentences
        self._sealed = ""                  # the path of the copy that was made
        self._is_hooked = False            # before_vm has begun

    def outcome(self) -> Outcome:
        """What became of it, once after_vm has run, too; if it failed, nothing of it is left."""
        try:
            outcome = self._outcome()
        except Interrupted:
            if self._is_hooked:            # what before_vm has stopped has to go on
                with self._services.signals.shielded(), contextlib.suppress(ProgramError):
                    self._hook("after_vm", outcome="STOPPED", error="stopped by a signal", copy="",
                               size_bytes=0, seconds=0)
            raise
        return self._after_vm(outcome)

    def _after_vm(self, outcome: Outcome) -> Outcome:
        try:
            with self._services.signals.shielded():        # a copy is sealed, whatever comes now
                self._hook("after_vm", outcome=outcome.status_word, error=(outcome.error or "")[:1000],
                           copy="" if outcome.error else self._sealed, size_bytes=outcome.size_bytes,
                           seconds=round(outcome.seconds, 3))
        except ProgramError as error:
            outcome = outcome._replace(findings=outcome.findings + (Finding(
                Severity.WARNING, self._job.machine.title, str(error)),))
        return outcome

    def _before_snapshot(self) -> None:
        """before_vm has run, in the turn of the snapshot, so that nothing has to be waited for after it."""
        with stage("HOOK-FAIL"):
            try:
                self._hook("before_vm")
            except ProgramError as error:
                raise ProgramError(f"no snapshot of {self._job.machine.title} was made: {error}")

    def _hook(self, name: str, **facts: Any) -> None:
        machine = self._job.machine
        self._is_hooked |= name == "before_vm"
        self._run.hook(name, dict(facts, vm_name=machine.name, vm_uuid=machine.uuid,
                                  kind=self._job.method.value), machine.title)

    def _outcome(self) -> Outcome:
        began_s, outcome = self._services.clock.monotonic(), untried(self._job)
        try:
            outcome = self._done()
        except BackupError as error:
            self._run.note(error)
            word = error.status_word or ("POOL-FAIL" if isinstance(error, PoolError) else "EXPORT-FAIL")
            outcome = outcome._replace(error=str(error), status_word=word, cause=error)
        except Exception as bug:
            self._services.log.bug(bug, self._job.machine.title + ": ")
            outcome = outcome._replace(error=BUG_TEXT, status_word="BUG", cause=bug)
        except Interrupted:
            self._tell_lie()
            self._run.tell(self._findings)             # nobody comes to the outcome any more
            raise
        self._tell_lie()
        return outcome._replace(seconds=self._services.clock.monotonic() - began_s,
                                findings=tuple(self._findings))

    def _tell_lie(self) -> None:
        """What an audit has found is told, whatever became of the copy: that of copies before is lost."""
        if self._lie:
            self._findings.append(Finding(Severity.ERROR, self._job.machine.title, self._lie))

    def _done(self) -> Outcome:
        job, run = self._job, self._run
        if run.storage_hangs:
            raise StorageStalled(f"it was not tried, as the backup storage hangs: {run.store_problem}")
        with stage("STORAGE-FAIL"):
            self._services.catalog.check_in_place()
        with self._own_folder() as folder:
            self._findings += self._backup.clear_unfinished(folder)
            made = self._of_this_round(folder)
            if made is not None:
                return made
            if self._services.settings.pre_clean:
                self._prune(folder, job.rules._replace(newest=job.rules.newest - 1), "to make room")
            try:
                sealed, size_bytes = self._make_copy(folder)
            except BaseLost as error:
                self._services.log.info(f"{job.machine.title}: {error} It is made again, as a full.")
                self._backup.read_against.discard(job.machine.uuid)
                sealed, size_bytes = self._make_copy(folder, str(error).rstrip("."))
            self._sealed = f"{self._services.catalog.path}/{folder.name}/{sealed}"
            outcome = untried(job)._replace(error=None, status_word="SUCCESS", size_bytes=size_bytes,
                                            said=self._said)
            lie = self._lie
            if lie:
                self._lie += f" {sealed}, which was read whole, is kept and good."
            try:                                   # whatever comes now, the new copy is sealed
                return outcome._replace(kept=self._retain(folder.name, sealed))
            except VerificationError as error:
                self._lie = lie
                outcome = outcome._replace(error=str(error), status_word="SEAL-FAIL", cause=error)
            except (BackupError, Interrupted) as error:
                run.note(error)
                self._warn("older copies were not pruned: " + re.sub(r"(?<![.?])$", ".", str(error))
                           + " The next run does it.")
                outcome = outcome._replace(cause=error if isinstance(error, Interrupted) else None)
            except Exception as bug:
                self._services.log.bug(bug, job.machine.title + ": ")
                outcome = outcome._replace(cause=bug)
            return outcome

    def _warn(self, sentence: str) -> None:
        self._findings.append(Finding(Severity.WARNING, self._job.machine.title, sentence))

    @contextlib.contextmanager
    def _own_folder(self) -> Iterator[Folder]:
        """The VM's directory, listed, its lock ours; an empty one is removed at the end. Its claim holds the
        lock of the one that was planned: its copies may lie in another by now."""
        placement, catalog, services = self._backup.placement, self._services.catalog, self._services
        with contextlib.ExitStack() as stack:
            while True:
                name = placement.folder_name(self._job.machine)
                lock = catalog.folder_lock(name)
                with stage("LOCK-FAIL"):
                    if not lock.is_held and not stack.enter_context(lock.held(
                            is_kept=lambda: self._run.storage_hangs)):
                        raise BackupError(f"the directory {name} is in use by another run "
                                          f"({holder_text(lock.text())}). Nothing was done for this VM.",
                                          passing=True)
                    # the text is for people; a full store must not cost the lock
                    with contextlib.suppress(CatalogError):
                        lock.write_text(signature(services, self._run.inventory))
                stack.callback(self._run.tidy, f"leaving {name}", functools.partial(
                    catalog.root.remove_if_empty, name))
                folder = self._run.in_store(f"listing {name}", lambda: placement.look_again(name))
                if placement.folder_name(self._job.machine) == name:
                    yield folder
                    return

    def made(self) -> Optional[Outcome]:
        """The outcome of the copy that a worker of this round has sealed before it died, None if none has."""
        with self._own_folder() as folder:
            found = self._of_this_round(folder)
        return found and self._after_vm(found)

    def _of_this_round(self, folder: Folder) -> Optional[Outcome]:
        job, machine = self._job, self._job.machine
        for copy in self._backup.placement.own_view(folder, machine):
            if copy.round == self._backup.plan.id and copy.is_good and copy.is_of(machine.uuid, job.method):
                self._services.log.info(f"{machine.title}: {folder.name}/{copy.name} was made in this round, "
                                        "by a worker that died since; it counts.")
                self._sealed = f"{self._services.catalog.path}/{folder.name}/{copy.name}"
                return untried(job)._replace(error=None, status_word="SUCCESS", size_bytes=copy.size_bytes)
        return None

    # --- the copy -----------------------------------------------------------------------

    def _make_copy(self, folder: Folder, lost: str = "") -> Tuple[str, int]:
        """The name and size of a new sealed copy in that directory. BaseLost if what an increment was to rest
        on is no longer what it was; `lost`: why that was so, for the full that is made in its place."""
        run, services, exporter = self._run, self._services, self._backup.exporter
        taken_at = services.clock.utc()
        machine = self._read_again()
        excludes, method = services.settings.exclude_disk, self._job.method
        with stage(method.name + "-EXPORT-FAIL"):
            disks = disks_to_export(machine, method, excludes)     # where there are none, nothing is begun
        left_out = left_out_disks(machine, excludes)
        for disk, line in left_out.items():
            services.log.info(f"{machine.title}: disk {disk_list((disk,))} is left out by {line}.")
        copies = self._backup.placement.own_view(folder, machine)
        self._findings += newly_left_out(machine, method, left_out, copies)
        keys = {disk.userdevice: block_key(name)
                for name, disk in zip(disk_folders(machine.disks), machine.disks)}
        chain = None                       # type: Optional[Chain]
        with stage("DIR-FAIL"):
            copy = run.in_store("beginning the copy", lambda: services.catalog.new_copy(
                folder.name, services.clock.local()))
        try:
            with contextlib.ExitStack() as held:      # the snapshot, and what is open of the copy before
                layer, base = self._next_layer(copies, machine, disks, lost)
                if base is not None:
                    held.callback(base.inside.close)
                if layer is not None:
                    chain = self._with_reference(Chain(copy.name, keys, base), copies, machine, held)
                self._said = layer_words(layer)[2:]
                services.log.info(f"{machine.title}: {self._job.method.value} into {folder.name}/{copy.name}"
                                  f"{layer_words(layer)}")
                with stage("METADATA-FAIL"):
                    metadata = exporter.metadata(machine)
                    run.in_store("writing the metadata", lambda: copy.write(VM_METADATA, metadata))
                    interfaces = services.pool.interfaces(machine)
                    os_version = services.pool.os_version(machine)
                    # what the pool's records lack; the plan has told of what was so by then
                    for problem in machine.problems + tuple(vif.problem for vif in interfaces if vif.problem):
                        if problem not in self._job.machine.problems:
                            self._warn(problem)
                    files = metadata_files(machine, machine.disks, interfaces, os_version, left_out)
                    # the sizes are those of the snapshot
                    run.in_store("writing the metadata", lambda: copy.write_texts(
                        (name, text) for name, text in files if not name.endswith(VDI_CFG)))
                with contextlib.ExitStack() as snapshot:
                    report, measured, reference = self._export(machine, disks, left_out, copy, chain,
                                                               metadata, snapshot)
                    if reference is not None:
                        held.push(snapshot.pop_all())      # it goes when the copy does not come about
                images, blocks = report.images, report.blocks
                size_bytes = sum(image["size"] for image in images)
                with stage("SEAL-FAIL"):
                    files = metadata_files(machine, measured, interfaces, os_version)
                    copy.sums.update({image["name"]: (image["size"], image["sha256"]) for image in images})
                    copy.sums[BLOCKS] = blocks.size, blocks.hexdigest()
                    manifest = self._manifest(machine, left_out, report, taken_at, folder, copies)
                    if layer is not None:
                        manifest.update(format=MANIFEST_FORMAT,
                                        layer=layer_facts(layer, copy.name, base, report))
                    if report.audit:
                        self._audited(folder, copies, report.audit, manifest)
                    if base is not None:
                        del manifest["image"]
                        manifest["images"] = images
                        run.in_store("writing the metadata", lambda: self._write_texts_of_layer(
                            copy, base, report, manifest, machine, interfaces))
                    run.in_store("writing the metadata", lambda: copy.write_texts(
                        (name, text) for name, text in files if name.endswith(VDI_CFG)))
                    run.in_store("finishing the copy", lambda: copy.finish(manifest))
                    for image in images if services.settings.verify_after else ():
                        services.log.info(f"{machine.title}: reading {image['name']} back from storage.")
                        check_stored(services, copy.inside, image["name"], image["sha256"],
                                     f"the copy of {machine.title}")
                    if base is not None:
                        now = run.in_store(f"listing {folder.name}",
                                           lambda: services.catalog.folder(folder.name))
                        problem = holder_problem(base.copy, now.copies, layer_of(manifest).holders)
                        if problem:
                            raise BaseLost(f"the increment was not sealed, as {problem}.")
                    run.in_store("sealing the copy", lambda: (
                        run.check_alive(), services.catalog.check_in_place(), copy.seal()))
                self._tell_reading(report, copies, machine)
                references = services.references
                if reference is not None and not self._lie:
                    self._with_ledger("its snapshot could not be kept as the reference, so that the next run "
                                      "reads all of its disks", folder,
                                      lambda ledger: references.keep(ledger, reference))
                elif layer is not None and services.settings.keep_reference and references.can_keep:
                    why = "it is not trusted" if self._lie else "no copy is read against it now"
                    self._with_ledger("its reference could not be removed; the next run tries again", folder,
                                      lambda ledger: references.give_up(ledger, why))
        except BaseException as error:
            # whatever ended it: what was written goes, unless the storage is what failed
            run.note(error)
            if not isinstance(error, TakenOver):
                run.tidy(f"removing {copy.name}{PARTIAL}", copy.discard)
            raise
        finally:
            copy.close()
        services.log.info(f"{machine.title}: {folder.name}/{copy.name} is complete: "
                          f"{format_size(size_bytes)}, proven {proof_text(report.verified)}.")
        return copy.name, size_bytes

    def _next_layer(self, copies: Sequence[Copy], machine: VirtualMachine, disks: Sequence[Disk],
                    lost: str) -> Tuple[Optional[NextLayer], Optional[Holder]]:
        """What the copy will be where the config wants increments, which is told; and what an increment will
        rest on, its list of blocks proven. Nothing where it does not."""
        services, settings = self._services, self._services.settings
        if not settings.incremental:
            return None, None
        free = self._run.in_store("asking for the free space", services.catalog.free_bytes)
        layer = next_layer(copies, machine, self._job.method, disks, settings.full_every, free)
        if lost:
            layer = layer._replace(base=None, why=lost)
        if layer.base is None:
            return layer, None
        try:
            holder = self._run.in_store("reading the copy before", lambda: proven_base(services, layer.base))
        except StorageMisbehaved:
            raise
        except (CatalogError, VerificationError) as error:
            self._warn(f"it can't be an increment on {layer.base.name}: {error} A full is made.")
            return layer._replace(base=None, why=f"{layer.base.name} can't be built on"), None
        if layer.warning:
            self._warn(layer.warning)
        return layer, holder

    def _write_texts_of_layer(self, copy: NewCopy, base: Holder, report: ImageReport,
                              manifest: Dict[str, Any], machine: VirtualMachine,
                              interfaces: Sequence[Interface]) -> None:
        """What only an increment has: the archive's ova.xml, and how to restore it by hand."""
        if report.ova_xml:
            copy.write(OVA_XML, report.ova_xml)
        with contextlib.ExitStack() as stack:
            new = base.copy._replace(layer=layer_of(manifest))
            try:
                holders = opened_holders(stack, copy.inside, new, manifest)
            except VerificationError as error:
                raise BaseLost(f"the increment was not sealed: {error}")
            text = restore_text(machine, interfaces, manifest, {
                name: holder for name, holder in holders.items() if name})
        copy.write_texts([(RESTORE_TEXT, text)])

    def _read_again(self) -> VirtualMachine:
        """The VM as it is just before its snapshot; differences from the plan are told."""
        planned, log = self._job.machine, self._services.log
        with stage("VM-GONE"):
            try:
                machine = self._services.pool.real_machine(planned)
            except ApiFailure as failure:
                if is_gone(failure, "VM"):
                    raise BackupError(f"{planned.title} is no longer in the pool, so it was not backed up. "
                                      "Its earlier copies are left as they are. If it was deleted for good, "
                                      "a line of the config that names it can go.")
                raise
        for what, before, now in (("name", planned.name, machine.name),
                                  ("power state", planned.power_state, machine.power_state),
                                  ("disks", self._planned_disks, disk_list(machine.disks))):
            if before != now:
                log.info(f"{planned.title}: its {what} changed since the run was planned: "
                         f"{one_line(now) or 'none'}, before {one_line(before) or 'none'}.")
        # a snapshot of it is halted (tried on a real server)
        if machine.power_state == "Suspended":
            log.info(f"{machine.title} is suspended: the copy holds its disks, but not its memory.")
        return machine

    def _export(self, machine: VirtualMachine, disks: Sequence[Disk], left_out: Iterable[Disk],
                copy: NewCopy, chain: Optional[Chain], metadata: bytes,
                held: contextlib.ExitStack) -> Tuple[ImageReport, List[Disk], Optional[Reference]]:
        """The image of these disks, and all of the VM's with the sizes that their snapshots have; and the
        snapshot, which goes with the stack, as the reference that it is to become, None if it is not."""
        exporter, snapshots, base = self._backup.exporter, self._run.snapshots, safe_name(machine.name)
        snapshots.check_none_left(machine)
        method, knows_ignored = self._job.method, self._run.inventory.master.build >= OLDEST_IGNORED_DISKS
        with stage("SNAPSHOT-FAIL"):
            touched = machine.disks if method is Method.VM and not knows_ignored else disks
            check_sr_space(self._services, touched, f"no snapshot of {machine.title} was made")
            if method is Method.VM:
                label = f"{machine.name} (backup {parse_copy_name(copy.name)[0]:%Y-%m-%d %H:%M:%S})"
                snapshot = self._with_room(touched, lambda: held.enter_context(
                    snapshots.of_vm(machine, label, left_out, knows_ignored, self._before_snapshot)))
                uuid, name, exported = snapshot.uuid, machine.name, snapshot.disks
                with stage("VM-EXPORT-FAIL"):
                    there, wanted = ({disk.userdevice for disk in some} for some in (snapshot.disks, disks))
                    odd = [disk for disk in disks if disk.userdevice not in there] + [
                        disk for disk in left_out if disk.userdevice in there - wanted]
                    if odd:
                        raise BackupError(
                            f"{machine.title}: {disk_list(odd)} was detached or exchanged while the snapshot "
                            "was made, so nothing was exported. The next run exports it as it is then.",
                            passing=True)
                    image = exporter.vm_image(snapshot, machine, copy.inside, base,
                                              self._against_pool(chain, exported), metadata)
                    sizes = {disk.snapshot_of: disk.virtual_size for disk in snapshot.disks}
            else:
                exported = (self._with_room(disks[:1], lambda: held.enter_context(
                    snapshots.of_disk(machine, disks[0], self._before_snapshot))),)
                uuid, name = exported[0].vdi_uuid, f"{machine.name} {disks[0].device}"
                with stage("VDI-EXPORT-FAIL"):
                    image = exporter.disk_image(exported[0], machine, copy.inside, base,
                                                self._against_pool(chain, exported))
                    sizes = {disks[0].vdi_ref: exported[0].virtual_size}
        reference, references = None, self._services.references
        if chain is not None and self._services.settings.keep_reference and references.can_keep \
                and exported and all(disk.virtual_size <= VHD_LARGEST_BYTES for disk in exported):
            reference = Reference(
                uuid, references.label(name, copy.name), copy.name, image.blocks.hexdigest(),
                format_utc(self._services.clock.utc()), {
                    chain.key(disk): {"uuid": disk.vdi_uuid, "size": disk.virtual_size, "sr": disk.sr_uuid}
                    for disk in exported})
        return image, [disk._replace(virtual_size=sizes.get(disk.vdi_ref, disk.virtual_size))
                       for disk in machine.disks], reference

    # --- the reference ------------------------------------------------------------------

    def _with_room(self, disks: Sequence[Disk], snapshot: Callable[[], Any]) -> Any:
        """The snapshot; where its SR is full the references there are given up, and the VM is tried again."""
        try:
            return snapshot()
        except ApiFailure as failure:
            if failure.code == SR_IS_FULL and self._services.references.give_up_on(
                    {disk.sr_uuid for disk in disks}):
                raise BackupError(f"{failure} The references on it were given up.", passing=True)
            raise

    def _with_reference(self, chain: Chain, copies: Sequence[Copy], machine: VirtualMachine,
                        held: contextlib.ExitStack) -> Chain:
        """The chain with the VM's reference, if by what the store tells the disks can be read against it."""
        services, references, method = self._services, self._services.references, self._job.method
        if not services.settings.keep_reference:
            return chain
        if not references.can_keep:
            return chain._replace(why="this store can't be told from one that it may be a copy of")
        if any(disk.virtual_size > VHD_LARGEST_BYTES for disk in machine.disks):
            return chain._replace(why="it has a disk that is larger than a VHD can be")
        try:
            ledger = references.ledger(machine.uuid, method.value)
        except BadLedger:                              # told when the run began
            return chain._replace(why="the record of its reference can't be used")
        ledger = ledger and ledger._replace(distrust=distrust_of(ledger, copies))
        good = [copy for copy in copies if copy.is_of(machine.uuid, method) and copy.is_good]
        why, last = reference_problem(ledger, references.identity, good[-1] if good else None), chain.base
        try:
            if not why and last is None:
                last = self._run.in_store("reading the copy before", lambda: proven_base(services, good[-1]))
                held.callback(last.inside.close)
            if not why and last.manifest["files"][BLOCKS]["sha256"] != ledger.current.blocks:
                why = "the reference is not the state of the newest good copy"
        except StorageMisbehaved:
            raise
        except (CatalogError, VerificationError):
            why = "the list of blocks of the newest good copy can't be used"
        if why and ledger is not None and why == ledger.distrust:
            self._note([copy for copy in since_whole_reading(copies, machine.uuid, method)
                        if not copy.suspicion], "an earlier audit failed, and could not record what it found")
            self._warn(f"all of it is read, as {why}. Copies of before may be {SUSPECT}: `list` tells.")
        return chain._replace(why=why) if why else chain._replace(reference=ledger.current, last=last)

    def _against_pool(self, chain: Optional[Chain], disks: Sequence[Disk]) -> Optional[Chain]:
        """The chain with the disks of the reference against which these of the snapshot can be read; without
        it, if one of them can't: then all is read, and why. The pool's records have to fit the ledger."""
        uuids, doing = {}, "looking at the reference"      # type: Dict[str, str], str
        tried, uuid = self._backup.read_against, self._job.machine.uuid
        if chain is not None and chain.reference is not None and uuid in tried:
            return chain._replace(reference=None, why="the first try to read against it failed")
        for disk in disks if chain is not None and chain.reference is not None else ():
            key, ask = chain.key(disk), self._services.pool.ask_if_there
            kept, row = chain.reference.disks.get(key), disk_row(chain.last, key, disk.virtual_size)
            try:
                ref = kept and ask(doing, "VDI.get_by_uuid", kept["uuid"])
                record = ref and ask(doing, "VDI.get_record", ref)
            except ApiFailure as failure:          # a record that is damaged costs no backup
                self._services.log.info(str(failure))
                return chain._replace(reference=None, why=f"of the reference's disk {key} nothing is told")
            old = Fields("the reference's disk", record, [])
            why = f"disk {key} is not in the reference" if not kept or row is None else \
                f"the reference's disk {key} is gone" if not record else \
                f"the reference's disk {key} is no snapshot any more" if not old.flag("is_a_snapshot") else \
                f"the reference's disk {key} is of another type" if old.text("type") != disk.vdi_type else \
                f"the reference's disk {key} lies on another SR" if old.text("SR") != disk.sr_ref else \
                f"the reference's disk {key} has another size" if not \
                disk.virtual_size == row["virtual_size"] == old.number("virtual_size") else ""
            if why:
                return chain._replace(reference=None, why=why)
            uuids[key] = kept["uuid"]
        tried.update([uuid] if uuids else [])
        return chain and chain._replace(uuids=uuids)

    def _audited(self, folder: Folder, copies: Sequence[Copy], audit: str, manifest: Dict[str, Any]) -> None:
        """What the audit says of the copies that were read as differences is on record, before the new copy
        is there. If one of them is not to be trusted, no difference is, until a person says otherwise."""
        copies = since_whole_reading(copies, self._job.machine.uuid, self._job.method)
        manifest["layer"]["audit"] = {"found": audit, "copies": [copy.name for copy in copies]}
        if audit != AGREED:
            named = ", ".join(copy.name for copy in copies) or "none"
            self._lie = (f"the audit of its differences failed: {audit}. The server left out what had "
                         f"changed. Read as differences, and {SUSPECT} from now on: {named}. Restore from "
                         "other copies. All is read whole from now on, until forget-references lets "
                         "differences be used again; keep_reference=no is safest until the server's storage "
                         "is known to be right.")
            self._with_ledger("that its differences are not to be believed is not on record", folder,
                              self._services.references.put)
        self._note(copies, audit)

    def _note(self, copies: Sequence[Copy], audit: str) -> None:
        """What an audit found of these copies is on record, of the newest first. Where it can't be put there
        it is told: the manifest of the copy that was read whole tells it, too."""
        now = format_utc(self._services.clock.utc())
        word, why = (AGREED, "") if audit == AGREED else (SUSPECT, audit)
        for copy in reversed(copies):
            try:
                self._run.in_store("recording the audit", functools.partial(
                    self._services.catalog.record, copy, audited_at=now, audit=word, audit_reason=why))
            except (StorageStalled, TakenOver):
                raise
            except CatalogError as error:
                self._run.note(error)
                self._warn(f"what the audit found of {copy.name} is not on record: {error} The manifest of "
                           "the new copy tells it, too, once that is complete.")

    def _tell_reading(self, report: ImageReport, copies: Sequence[Copy], machine: VirtualMachine) -> None:
        reading = tuple((row["key"], row["how"], row["why"]) for row in report.disks if "how" in row)
        if not reading or not self._services.settings.keep_reference:
            return
        words, is_whole = reading_words(reading), all(how != DIFFERENCE for _, how, _ in reading)
        trusted = since_whole_reading(copies, machine.uuid, self._job.method)
        if report.audit == AGREED and trusted:
            words += f"; audited: {counted(len(trusted), 'copy')} read by difference"
        elif is_whole and trusted and not report.audit and not self._lie:
            words += f"; not audited: {counted(len(trusted), 'copy')} read by difference"
        self._said = f"{self._said}; {words}" if self._said else words
        self._services.log.info(f"{machine.title}: {words}.")
        before = [copy.reading for copy in copies if copy.is_of(machine.uuid, self._job.method)]
        for sentence in repeated_reasons(before + [reading]):
            self._warn(sentence)

    def _ledger(self, folder: Folder) -> Ledger:
        """The VM's ledger, with the facts of this run; a new one where it has none of this store.
        CatalogError if another store's names what stands in the pool: that is not forgotten for it. That a
        server's differences are not believed holds whatever the store."""
        machine, method, references = self._job.machine, self._job.method, self._services.references
        old = references.ledger(machine.uuid, method.value)
        copies = self._backup.placement.own_view(folder, machine)
        distrust = DISTRUST if self._lie else distrust_of(old, copies) if old else ""
        new = Ledger(references.identity["store"], references.identity["inode"], references.pool,
                     self._services.settings.path, self._run.inventory.host.short_name, method.value,
                     machine.uuid, machine.name, folder.name, distrust=distrust)
        if old is not None and is_of_store(old, references.identity):
            return new._replace(current=old.current, leaving=old.leaving)
        if old is not None and references.standing(old):
            raise CatalogError("another store, or this one before it was moved, has a reference of it in the "
                               "pool: no other is kept beside it. A warning of each run names it.")
        return new

    def _with_ledger(self, problem: str, folder: Folder, work: Callable[[Ledger], Any]) -> None:
        """The work is done on the VM's ledger, or why not is told: it costs the next run its reference, no
        copy."""
        try:
            with self._services.signals.shielded():
                self._run.check_alive()
                work(self._ledger(folder))
        except TakenOver:
            raise
        except BackupError as error:
            self._run.note(error)
            self._warn(f"{problem}: {error}")

    def _manifest(self, machine: VirtualMachine, left_out: Mapping[Disk, str], report: ImageReport,
                  taken_at: datetime, folder: Folder, copies: Sequence[Copy]) -> Dict[str, Any]:
        """backup.json: what, when, from where, what was verified. `files` is added when all are written."""
        inventory, job = self._run.inventory, self._job
        told = rules_told(copies, machine.uuid, job.method)
        # a file's count long beyond its copies: it may be one for each year; what was chosen by hand is not
        # asked for again
        others = [{"config": rules.config, "at": at, "rules": dict(zip(RULE_NAMES, rules))}
                  for rules, at in told.values() if rules.config != job.rules.config
                  and rules.config.startswith("/") and taken_at - parse_utc(at) < OTHER_RULES_LIFE]
        return {
            "format": PLAIN_FORMAT, "program": "VmBackup " + VERSION, "kind": job.method.value,
            "folder": folder.name,
            "taken_at": format_utc(taken_at), "finished_at": format_utc(self._services.clock.utc()),
            "sequence": next_sequence(folder.copies, taken_at), "copies_to_keep": job.rules.newest,
            "rules": dict(zip(RULE_NAMES, job.rules)), "config": job.rules.config,
            "other-rules": others, "chosen_by": job.chosen_by,
            "vm": {"uuid": machine.uuid, "name": machine.name, "power_state": machine.power_state},
            "pool": {"uuid": inventory.pool_uuid, "name": inventory.pool_name},
            "host": inventory.host.short_name, "round": self._backup.plan.id,
            "server": {"product_version": ".".join(map(str, inventory.master.product_version)),
                       "api_version": "%d.%d" % inventory.master.api_version},
            "image": report.images[0], "disks": report.disks, "verified": report.verified,
            "left-out": [{"device": disk.device, "userdevice": disk.userdevice, "name": disk.name,
                          "uuid": disk.vdi_uuid, "virtual_size": disk.virtual_size, "by": line}
                         for disk, line in left_out.items()],
        }

    # --- retention ------------------------------------------------------------------------

    def _retain(self, folder_name: str, sealed: str) -> int:
        """Older copies that no rule holds are gone, never the one just sealed; the number of good ones
        there. VerificationError if that one does not read back as good."""
        job, log, place = self._job, self._services.log, f"{folder_name}/{sealed}"
        folder = self._run.in_store(f"listing {folder_name}",
                                    lambda: self._services.catalog.folder(folder_name))
        copies = self._backup.placement.own_view(folder, job.machine)
        made = next((copy for copy in copies if copy.name == sealed), None)
        if made is not None and made.is_unreadable:
            raise CatalogError(f"{place}, just made, can't be read: {made.problem}. Check the share or disk.")
        if made is None or not made.is_good:
            raise VerificationError(f"{place}, just made, does not read back as a good copy"
                                    f"{f' ({made.trouble})' if made else ''}: nothing was pruned. Check the "
                                    "share or disk.")
        for accuser in copies if not self._lie else ():        # else it was tried just now
            self._note(unrecorded(accuser, copies), accuser.audit[0])
        for copy in copies:
            if not copy.is_good:
                log.info(f"{folder_name}/{copy.name} is not a good copy and is left: {copy.trouble}.")
            elif copy.aside and copy.uuid == job.machine.uuid:
                log.info(f"{folder_name}/{copy.name} is left: {copy.aside}.")
        for name in folder.strangers:
            log.info(f"{folder_name}/{one_line(name)} is not ours and is left.")
        removed = self._prune(folder, job.rules, "retention", sealed)
        return sum(1 for copy in copies if copy.counts_for(job.machine.uuid, job.method)) - removed

    def _prune(self, folder: Folder, own: Rules, why: str, sealed: str = "") -> int:
        """What neither these rules of this config nor others hold is gone; how many copies that were."""
        job, log, catalog = self._job, self._services.log, self._services.catalog
        title = job.machine.title
        removed, uuid = 0, job.machine.uuid
        copies = self._backup.placement.own_view(folder, job.machine)
        rules, now = rules_for(own, copies, uuid, job.method), self._services.clock.local()
        has_unfinished = self._run.in_store(f"listing {folder.name}",
                                            lambda: catalog.has_unfinished(folder.name))
        left = set()                       # type: Set[str]
        verdicts = judge(copies, uuid, job.method, rules, now, sealed, has_unfinished)
        for verdict in in_removal_order(verdicts):
            if self._backup.why_not_pruned:
                log.info(f"{title}: nothing is pruned, as {self._backup.why_not_pruned}.")
                break
            place = f"{verdict.copy.folder}/{verdict.copy.name}"
            try:
                self._run.check_alive()
                is_left = "holds blocks of one that is left" if verdict.copy.name in left else \
                    self._run.in_store(f"removing {place}", functools.partial(
                        catalog.remove_copy, verdict.copy), REMOVAL_LIMIT_S)
                if is_left:
                    left |= verdict.copy.layer.held_by if verdict.copy.layer else set()
                    log.info(f"{title}: {place} is left, as it {is_left}; a later run looks at it again.")
                    continue
            except TakenOver:
                raise
            except CatalogError as error:
                self._run.note(error)
                self._warn(str(error))
                break
            removed += 1
            log.info(f"{title}: removed {place} ({why}): {verdict.reason}.")
        if sealed:
            for warning in idle_warnings(verdicts, uuid, job.method, rules, now):
                self._warn(warning)
        return removed


def restore_text(machine: VirtualMachine, interfaces: Sequence[Interface], manifest: Dict[str, Any],
                 holders: Mapping[str, Holder]) -> str:
    """RESTORE.txt: how to restore this increment with `xe` alone. It is a script for sh as it stands."""
    layer, disks, full = manifest["layer"], held_disks(manifest), holders[manifest["layer"]["full"]]
    is_vm = manifest["kind"] == Method.VM.value
    # the disks that are those of the full still
    before = {disk["key"]: disk for disk in held_disks(full.manifest) if any(
        one["key"] == disk["key"] and one["since"] == layer["full"] for one in disks)}
    # path, compression, format and unpacked size of each copy's images, by disk in an increment
    files = {name: {facts.get("disk", ""): (f"../{name}/{image}", facts if image == facts["name"] else dict(
        facts, compression="gzip" if image.endswith(".gz") else "zstd"))
                    for image, facts in zip(holder.copy.images, holder.manifest["images"])}
             for name, holder in holders.items()}
    files[""] = {facts["disk"]: (facts["name"], facts) for facts in manifest["images"]}
    unpacked = [facts["plain_size"] for images in files.values() for _, facts in images.values()
                if facts["compression"] != "none" and facts["format"] == "vhd"]
    size = sum(disk["virtual_size"] for disk in disks)
    lines = [
        f"# How to bring back {quote_name(machine.name)} as it was when this copy was made, with xe alone.",
        "#",
        "# This copy is an increment: it holds what changed since those that are named below, which lie",
        "# beside it. `sha256sum -c SHA256SUMS` proves all of them. VmBackup's own `restore` does all this",
        "# by itself.",
        f"# Needed: an SR with {format_size(size)} free. It must be plugged: an import into one that is not",
        "# hangs without a word. SRs whose disks must be zeroed (LVM of raw disks, EqualLogic) refuse VHD.",
        "# The commands go in this order, in this directory, on a host of the pool: `sh RESTORE.txt`. A file",
        "# that was compressed since, by somebody else, has to be unpacked first.",
        "", "set -e", f"SR={disks[0]['sr_uuid']}      # where the disks go: they came from there"]
    if unpacked:
        lines += ["ROOM=$(mktemp /var/tmp/layer.XXXXXX)      # what is compressed is unpacked there, up to "
                  f"{format_size(max(unpacked))}", "trap 'rm -f \"$ROOM\"' EXIT"]
    gone = [disk for disk in held_disks(full.manifest) if is_vm and disk["key"] not in before]
    if is_vm:
        lines += ["", "# The full; it bears the name of its snapshot.",
                  f"VM=$(xe vm-import filename={shell_word(files[layer['full']][''][0])} sr-uuid=$SR)",
                  f"xe vm-param-set uuid=$VM name-label={shell_word(machine.name)}"]
    for disk in gone:
        lines += ["", f"# Disk {disk['key']} of the full is not one of this copy's.",
                  f"DISK={by_hand_drive(disk, 'vdi-uuid')}",
                  f"xe vbd-destroy uuid={by_hand_drive(disk, 'uuid')}", "xe vdi-destroy uuid=$DISK"]
    for disk in disks:
        lines += ["", f"# Disk {disk['key']}, {format_size(disk['virtual_size'])}."]
        was, key = before.get(disk["key"]), disk["key"]
        drive = next((one for one in machine.disks if one.userdevice == disk["userdevice"]), None)
        attach = ("xe vbd-param-set other-config:owner=true uuid=$(xe vbd-create vm-uuid=$VM vdi-uuid=$DISK "
                  f"device={shell_word(disk['userdevice'])} mode={drive.mode if drive else 'RW'} "
                  f"bootable={'true' if drive and drive.bootable else 'false'} type=Disk)")
        if is_vm and was is not None:
            lines.append(f"DISK={by_hand_drive(was, 'vdi-uuid')}")
            if was["virtual_size"] != disk["virtual_size"]:
                lines.append(f"xe vdi-resize uuid=$DISK disk-size={disk['virtual_size']}")
            if was["userdevice"] != disk["userdevice"]:
                lines += [f"xe vbd-destroy uuid={by_hand_drive(was, 'uuid')}", attach]
        else:
            lines.append(f"DISK=$(xe vdi-create sr-uuid=$SR name-label={shell_word(disk['name'])} type=user "
                         f"virtual-size={disk['virtual_size']})")
            lines += [attach] if is_vm else []
        if not is_vm and was is not None:
            lines += by_hand_import(*files[layer["full"]][""])
        names = [holder["copy"] for holder in layer["holders"] if holder["copy"] in disk["holders"]]
        for name in names + [""] * bool(disk["changed"]):
            if name != layer["full"]:
                lines += by_hand_import(*files[name][key])
    lines += ["", "# Then by hand, as the VM was when this copy was made:",
              f"#   memory {machine.memory_dynamic_max}, VCPUs-max {machine.vcpus_max}, VCPUs-at-startup "
              f"{machine.vcpus_at_startup}; what else has changed since the full is in vm-metadata.xml"]
    lines += [f"#   interface {vif.device} on network {one_line(vif.network_name)}, MAC {vif.mac}"
              for vif in interfaces]
    if not is_vm:
        lines.append("#   this is the OS disk, $DISK: the VM is made anew, as the section on OS disks in "
                     "README says")
    return "\n".join(lines + ["echo done", ""])


def by_hand_drive(disk: Mapping[str, Any], field: str) -> str:
    """What xe tells of the drive of that disk, in a shell."""
    return (f"$(xe vbd-list vm-uuid=$VM userdevice={shell_word(disk['userdevice'])} params={field} "
            "--minimal)")


def by_hand_import(path: str, facts: Mapping[str, Any]) -> Iterator[str]:
    """The commands that lay an image over the disk. xe takes no VHD from a pipe, and of a raw image there as
    much as the disk has."""
    word, unpack = shell_word(path), {"gzip": "gzip -dc", "zstd": "zstd -dc"}.get(facts["compression"])
    if unpack is None:
        yield f"xe vdi-import uuid=$DISK format={facts['format']} filename={word}"
    elif facts["format"] == "raw":
        yield "BYTES=$(xe vdi-param-get uuid=$DISK param-name=virtual-size)"
        yield (f"{{ {unpack} {word}; cat /dev/zero; }} | head -c $BYTES | "
               "xe vdi-import uuid=$DISK format=raw filename=/dev/stdin")
    else:
        yield f"{unpack} {word} > $ROOM"
        yield "xe vdi-import uuid=$DISK format=vhd filename=$ROOM"


def layer_words(layer: Optional[NextLayer]) -> str:
    """What a copy will be, in words behind its name."""
    if layer is None:
        return ""
    return f", an increment on {layer.base.name}: {layer.why}" if layer.base else f", a full, as {layer.why}"


def proven_base(services: Services, copy: Copy) -> Holder:
    """The copy that an increment rests on, open; VerificationError if its list of blocks is damaged."""
    with contextlib.ExitStack() as stack:
        inside = stack.enter_context(services.catalog.open_copy(copy))
        try:
            manifest = parse_manifest(inside.read(MANIFEST))
        except ValueError as error:
            raise VerificationError(f"its {MANIFEST} is damaged: {error}.")
        if stored_digest(inside.open_file(BLOCKS), lambda _: services.signals.check(),
                         f"reading {BLOCKS}") != manifest["files"][BLOCKS]["sha256"]:
            raise VerificationError("its list of blocks is not what was written.")
        stack.pop_all()                    # it is whoever's that asked
        return Holder(inside, copy, manifest)


def layer_facts(layer: NextLayer, name: str, base: Optional[Holder], report: ImageReport) -> Dict[str, Any]:
    """What the manifest tells of a copy's place in its chain. The full is among those that hold blocks in any
    case: with it a restore by hand begins."""
    if base is None:
        return {"depth": 1, "full": name, "base": "", "why": layer.why, "is_first": layer.is_first,
                "holders": []}
    told_before = base.manifest["layer"]
    known = {holder["copy"]: holder for holder in told_before["holders"]}
    known[base.copy.name] = {
        "copy": base.copy.name, "stamp": base.copy.stamp, "sequence": base.copy.sequence,
        "manifest": base.copy.mark, "blocks": base.manifest["files"][BLOCKS]["sha256"],
        "files": {image["name"]: image["sha256"] for image in base.manifest["images"]}}
    named = {holder for disk in report.disks for holder in disk["holders"]} | {told_before["full"]}
    return {"depth": told_before["depth"] + 1, "full": told_before["full"], "base": base.copy.name,
            "why": layer.why, "is_first": layer.is_first,
            "holders": sorted((known[one] for one in named), key=lambda holder: holder["sequence"])}


def dump_folder(catalog: Catalog, inventory: Inventory) -> str:
    """METADATA_<host>, with the pool behind it where another pool's host of that name came first."""
    plain = "METADATA_" + inventory.host.short_name
    pools = {pool for _, pool in catalog.pool_dumps(plain)} - {""}
    return plain if not pools or inventory.pool_uuid in pools else f"{plain}--{inventory.pool_uuid[:8]}"


DROPPED_TOLD_S = 7 * DAY_S - 12 * HOUR_S   # 7 nights, also where one begins a little earlier
PLAN_LIFE_S = 35 * DAY_S
HOST_PLAN_LIFE_S = 8 * DAY_S       # a weekly run's plan is not old before the next


def jobs_with_references(settings: Optional[Configuration],
                         inventory: Inventory) -> Optional[Set[Tuple[str, str]]]:
    """The (uuid, kind) of all VMs of which a config file keeps references; None if it can't be told."""
    if settings is None:
        return None
    plan = make_plan(settings, inventory)
    return {(job.machine.uuid, job.method.value) for job in plan.jobs} if settings.keep_reference else set()


def why_reference_leaves(ledger: Ledger, config: str, jobs: Optional[Container[Tuple[str, str]]], host: str,
                         now: datetime) -> str:
    """Why a run of that config on that host removes the reference, "" if it stays; the rest as
    why_reference_goes has it."""
    path = ledger.config
    # a file whose directory is away, or that was none, tells nothing; what another host has lately kept may
    # be in a file that only that host has
    is_there = not path.startswith("/") or os.path.exists(fs_path(path)) \
        or not os.path.isdir(fs_path(os.path.dirname(path))) \
        or ledger.current is not None and ledger.host != host \
        and (now - parse_utc(ledger.current.at)).total_seconds() < HOST_PLAN_LIFE_S
    return why_reference_goes(ledger, config, jobs, is_there, now)


def dropped_vms(services: Services, inventory: Inventory,
                plan: Plan) -> Tuple[Optional[Dict[str, Any]], List[Finding]]:
    """This config's plan as it is put on record, and warnings about VMs of the pool that it had in an earlier
    one and that no config selects or excludes any more. None and none where the VMs were chosen by hand. Of
    other configs what counts is their last plan on record; one that did not run for long counts no more.
    `missed` is when a VM was first missed, "" for one that is selected."""
    path, now = services.settings.path, services.clock.utc()
    if not is_by_config(services.arguments):
        return None, []
    host, earlier, named = inventory.host.short_name, {}, set()      # type: str, Dict[str, str], Set[str]
    for one in sorted(services.catalog.plans(), key=lambda one: one["at"]):
        age_s = (now - parse_utc(one["at"])).total_seconds()
        if one["pool"] != inventory.pool_uuid:
            continue
        # Another host that ran this path lately may have another file there. What it misses we miss, too.
        is_ours = one["config"] == path and (one["host"] == host or age_s > HOST_PLAN_LIFE_S)
        if one["config"] == path:
            earlier.update((uuid, missed) for uuid, missed in one["vms"].items() if missed or is_ours)
        if not is_ours and age_s < PLAN_LIFE_S:
            named.update(one["excluded"], (uuid for uuid, missed in one["vms"].items() if not missed))
    vms, findings = {job.machine.uuid: "" for job in plan.jobs}, []
    for machine in plan.unselected:
        if machine.uuid not in earlier or machine.uuid in named:
            continue
        missed = vms[machine.uuid] = earlier[machine.uuid] or format_utc(now)
        if (now - parse_utc(missed)).total_seconds() < DROPPED_TOLD_S:
            findings.append(Finding(Severity.WARNING, machine.title, "was backed up by this config, and now "
                                    "no config selects or excludes it: select it again, or exclude it if "
                                    f"that is meant. (Missed since {missed}; reported for 7 nights.)"))
    record = {"pool": inventory.pool_uuid, "config": path, "host": host, "at": format_utc(now), "vms": vms,
              "excluded": [machine.uuid for machine, _ in plan.excluded]}
    return record, findings


@contextlib.contextmanager
def stage(word: str) -> Iterator[None]:
    """Inside, a BackupError gets the word for the status log, unless it has one."""
    try:
        yield
    except BackupError as error:
        error.status_word = error.status_word or word
        raise


def proof_text(verified: Dict[str, Any]) -> str:
    """What was proven of an image, in words."""
    if not verified["block_digests"]:
        return "in structure and size"
    if verified["block_digests_checked"]:
        return f"block by block ({counted(verified['blocks'], 'digest')})"
    return "in structure; block digests need libxxhash, which is not here"


OTHER_RULES_LIFE = timedelta(days=400)


def newly_left_out(machine: VirtualMachine, method: Method, left_out: Mapping[Disk, str],
                   copies: Sequence[Copy]) -> Iterator[Finding]:
    """Warnings about disks that are left out now and that the newest good one of the copies holds."""
    newest = [copy for copy in copies if copy.is_good and copy.is_of(machine.uuid, method)][-1:]
    held = {words.partition(" ")[0]: copy.name for copy in newest for words in copy.disks}
    for disk, line in left_out.items():
        if disk.device in held:
            yield Finding(Severity.WARNING, machine.title, f"disk {disk_list((disk,))}, which its newest "
                          f"good copy, {held[disk.device]}, holds, is left out from now on by {line}: "
                          "correct that if it is not meant.")


VDI_CFG = "/vdi.cfg"
OLDEST_IGNORED_DISKS = (21, 4)     # VM.snapshot's ignore_vdis: xapi 21.4.0, ocaml/idl/datamodel_vm.ml


def metadata_files(machine: VirtualMachine, disks: Sequence[Disk], interfaces: Sequence[Interface],
                   os_version: str, left_out: Mapping[Disk, str] = {}) -> List[Tuple[str, str]]:
    """The cfg files of a copy: (name, text), in the fields and order of the older program, and `left-out`."""
    files = [("vm.cfg", cfg_text((
        ("name_label", machine.name), ("name_description", machine.description),
        ("memory_dynamic_max", machine.memory_dynamic_max), ("VCPUs_max", machine.vcpus_max),
        ("VCPUs_at_startup", machine.vcpus_at_startup), ("os_version", os_version),
        ("orig_uuid", machine.uuid))))]
    for folder, disk in zip(disk_folders(disks), disks):
        files.append((folder + "/vbd.cfg", cfg_text((
            ("userdevice", disk.userdevice), ("bootable", disk.bootable), ("mode", disk.mode),
            ("type", disk.type), ("unpluggable", disk.unpluggable), ("empty", False),
            ("orig_uuid", disk.vbd_uuid)))))
        files.append((folder + VDI_CFG, cfg_text((
            ("name_label", disk.name), ("name_description", disk.description),
            ("virtual_size", disk.virtual_size), ("type", disk.vdi_type), ("sharable", disk.sharable),
            ("read_only", disk.read_only), ("orig_uuid", disk.vdi_uuid), ("orig_sr_uuid", disk.sr_uuid)))))
        if disk in left_out:
            files.append((folder + "/left-out", f"left out by {left_out[disk]}\n"))
    vifs = _told_apart([("vif-" + safe_name(vif.device), vif.uuid[:8], vif.uuid) for vif in interfaces])
    for name, interface in zip(vifs, interfaces):
        files.append((f"VIFs/{name}.cfg", cfg_text((
            ("device", interface.device), ("network_name_label", interface.network_name),
            ("MTU", interface.mtu), ("MAC", interface.mac), ("other_config", dict(interface.other_config)),
            ("orig_uuid", interface.uuid)))))
    return files


OLDEST_ZSTD_API = (2, 14)          # XenServer 8.1; ocaml/idl/datamodel_types.ml release list


def prepared(run: Run, limit_s: float = 0) -> Services:
    """The services with the store, once the programs that the config asks for are found; UsageError if one of
    them can't be had. The store is waited for so long, or as long as stall_timeout."""
    settings, log = run.services.settings, run.services.log
    if run.catalog is None:                # setup's may be one that is still to be made
        run.catalog = run.in_store("opening the store", lambda: open_catalog(settings, log), limit_s)
    services = run.services._replace(catalog=run.catalog)
    if settings.compress != "none":
        find_compressor(settings)
    find_xe(settings)
    return services


def read_and_plan(services: Services, identity: Inventory) -> Tuple[Inventory, Plan]:
    """The pool, and the plan of a backup or preview. UsageError if the pool can't do what is asked."""
    inventory = services.pool.inventory(identity)
    return inventory, plan_for(services.settings, inventory)


def plan_for(settings: Configuration, inventory: Inventory) -> Plan:
    """The plan; UsageError if that pool can't do what the config asks for."""
    plan, api = make_plan(settings, inventory), inventory.master.api_version
    if settings.compress == "zstd" and (0, 0) < api < OLDEST_ZSTD_API \
            and any(job.method is Method.VM for job in plan.jobs):
        raise UsageError(f"{settings.places['compress']}: compress=zstd: this pool (API {api[0]}."
                         f"{api[1]}) could not import a zstd archive: use gzip. Nothing was started.")
    return plan


def next_time(text: str, now: datetime) -> str:
    """The UTC time, as text, at which a local clock that says `now` shows that time of day next."""
    if not text:
        return ""
    hour, minute = map(int, text.split(":"))
    at = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    at += timedelta(days=at <= now)
    return format_utc(datetime.fromtimestamp(at.timestamp(), timezone.utc))


def round_plan(services: Services, inventory: Inventory, plan: Plan, name: str,
               last: Optional[Round]) -> Tuple[RoundPlan, List[Finding]]:
    """The plan of the round of that id, each VM's directory in it; and what stands in the way of pruning."""
    settings, clock = services.settings, services.clock
    placement = Placement(services.catalog, inventory.pool_uuid, [one.name for one in inventory.machines])
    placement.claim_all(job.machine for job in plan.jobs)
    names = collections.Counter(machine.name for machine in inventory.machines)
    utc, local, findings, jobs, went_back = clock.utc(), clock.local(), [], [], False
    before = {} if last is None else standing(last.names())
    planned = set() if last is None else {one.key for one in last.plan.jobs}
    for job in plan.jobs:
        machine, folder, newest = job.machine, safe_name(job.machine.name), ""
        with contextlib.suppress(CatalogError):            # that VM's job meets it again, and tells it
            folder = placement.folder_name(machine)
            copies = placement.own_view(placement.folder(folder), machine)
            went_back |= clock_went_back(copies, utc) is not None
            findings += [Finding(Severity.WARNING, machine.title, warning)
                         for warning in retention_warnings(copies, utc, local)]
            good = [copy for copy in copies if copy.is_good and copy.is_of(machine.uuid, job.method)]
            newest = str(good[-1].taken_at) if good else ""
        seen_by = sorted(filter(None, (inventory.local_srs.get(disk.sr_uuid, "") for disk in machine.disks)))
        one = RoundJob(
            job._replace(machine=machine._replace(disks=())), folder, disk_list(machine.disks),
            names[machine.name] == 1,
            seen_by[0] if seen_by and len(inventory.host_uuids) > 1 else "",
            inventory.host_uuids.get(machine.resident_on, ""), newest)
        word = before.get(one.key, (0, ""))[1]
        jobs.append(one._replace(is_overdue=one.key in planned and word not in (DONE, GIVEN_UP),
                                 has_failed=word == GIVEN_UP))
    return RoundPlan(
        name, VERSION, format_utc(utc), inventory.host.short_name, inventory.host.uuid, inventory.pool_uuid,
        inventory.pool_name, settings.source, settings.path, settings.decisions, settings.hosts,
        settings.at_once, next_time(settings.until, local), settings.pool_db_backup, went_back,
        tuple(text for _, text in plan.missing), tuple(jobs)), findings


def unfinished_text(last: Optional[Round], lock_text: Mapping[str, Any]) -> str:
    """What became of the last round, if it did not come to an end, or was not reported; else ""."""
    if last is None:
        return ""
    if last.has(ROUND_END):
        is_told = lock_text.get("state") != "running" or told(lock_text, "round") != last.plan.id
        return "" if is_told else (
            f"The last round of {last.plan.source}, begun at {last.plan.began_at}, was ended, but "
            f"{told(lock_text, 'host')}, which led it, died before it could report.")
    states = standing(last.names())
    left = [quote_name(one.job.machine.name) for one in last.plan.jobs
            if states.get(one.key, (0, ""))[1] not in (DONE, GIVEN_UP)]
    return (f"The last round of {last.plan.source}, which {last.plan.host} began at {last.plan.began_at}, "
            f"did not come to its end: {len(last.plan.jobs) - len(left)} of "
            f"{counted(len(last.plan.jobs), 'VM')} came to an outcome"
            f"{'; not: ' + ', '.join(left) if left else ''}.")


def is_led(catalog: Catalog, plan: RoundPlan) -> bool:
    """Does somebody lead a round of that config now?"""
    lock = config_lock(catalog, plan, plan.pool)
    if lock.is_held:
        return True
    with lock.held(shared=True) as is_free:
        return not is_free


def last_rounds(catalog: Catalog, path: str) -> List[Round]:
    """The last round of each config of that path, those of other pools and settings too."""
    found = []
    for rounds, name in catalog.in_state(ROUND_FOLDER):
        with rounds.child(name) as place:
            last = last_round(place)
        if last is not None and last.plan.path == path:
            found.append(last)
    return sorted(found, key=lambda one: one.plan.began_at)


def rounds_under_way(services: Services, inventory: Inventory) -> Iterator[Round]:
    """The rounds of the config in this pool that somebody leads now, those of other settings too."""
    for one in last_rounds(services.catalog, services.settings.path):
        if one.plan.pool == inventory.pool_uuid and not one.is_over() and is_led(services.catalog, one.plan):
            yield one


IN_ROUND = {CLAIM: "it is at this VM, and does what follows",
            DONE: "it has backed this VM up, and what follows is for the next run",
            GIVEN_UP: "it could not back this VM up, and what follows is for the next run"}


def how_it_stands(one: Round, uuid: str, now: datetime) -> str:
    """With that VM in a round that is going on."""
    states, keys = standing(one.names()), [job.key for job in one.plan.jobs if job.job.machine.uuid == uuid]
    if not keys:
        return "it does not have this VM"
    return IN_ROUND.get(states.get(keys[0], (0, ""))[1], "it does not come to this VM, as until= has passed"
                        if one.plan.is_time_up(now) else
                        "it has this VM still to come, and then does what follows")


def other_rounds(services: Services, inventory: Inventory) -> Iterator[Finding]:
    """Warnings about rounds under way in this store, of the same path, that have other settings."""
    settings = services.settings
    for plan in [one.plan for one in rounds_under_way(services, inventory)]:
        if plan.decisions != settings.decisions:
            yield Finding(Severity.WARNING, settings.source, f"{plan.host} is running it with other "
                          f"settings, so {inventory.host.short_name} takes no part there and runs a round of "
                          "its own: is the file the same on both hosts?")


def status_text(catalog: Catalog, path: str, source: str) -> str:
    """The rounds of that config, going on or ended: who does what, how far it is, and what was not done."""
    blocks = []
    for one in last_rounds(catalog, path):
        plan, names = one.plan, one.names()
        states, end = standing(names), one.read(ROUND_END)
        words = collections.Counter(states.get(job.key, (0, ""))[1] for job in plan.jobs)
        how = f"{told(end, 'how')} at {told(end, 'at')}" if end else \
            "is going on" if is_led(catalog, plan) else "is led by nobody any more"
        lines = [f"The round of {plan.source} in pool {quote_name(plan.pool_name or plan.pool[:8])}, begun "
                 f"by {plan.host} at {plan.began_at}, {how}.",
                 f"  {counted(len(plan.jobs), 'VM')}: {words[DONE]} backed up, {words[GIVEN_UP]} not, "
                 f"{words[CLAIM]} {'left unfinished' if end else 'under way'}, {words[''] + words[AGAIN]} "
                 f"{'not begun' if end else 'to come'}."]
        signs = {name: one.read(name) for name in names if name.endswith(SIGN)}
        for job in plan.jobs:
            number, word = states.get(job.key, (0, ""))
            title = job.job.machine.title
            if word == CLAIM:
                claim = one.read(f"{job.key}.{number}.{CLAIM}")
                sign = signs.get(sign_of(claim), {})
                doing = told(sign, "doing") if told(sign, "vm") == title else ""
                lines.append(f"  {title}: on {told(claim, 'host')} since {told(claim, 'at')}"
                             + (f"; {doing} (at {told(sign, 'at')})" if doing else ""))
            elif word == GIVEN_UP:
                error = told(one.read(f"{job.key}.{number}.{word}"), "outcome", "error")
                lines.append(f"  {title}: NOT BACKED UP: {one_line(error)}")
        if plan.until and not end:
            lines.append(f"  Nothing new is started from {plan.until} on.")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) or \
        f"No round of {source} is on record in {catalog.path}: has a backup begun there yet?"


# =============================================================================
# 21. Verify and prune
# =============================================================================
# Is what lies on disk what was exported, and what of it may go? Works on any machine
# that sees the store, without pool, password, xe or XenAPI.


class CopyState(enum.Enum):
    """The verdict on a copy; the value is the word that people see."""
    GOOD = GOOD
    UNPROVEN = "structure good"       # the older program recorded no digests
    DAMAGED = DAMAGED
    UNCHECKED = "NOT CHECKED"         # something that the check needs is not here
    UNREADABLE = "COULD NOT BE READ"  # the store is what is wrong, or out of reach: no verdict on the copy
    GONE = "gone meanwhile"


# What is done about copies of which verify says that word: told once, behind all of them.
COPY_ADVICE = {
    DAMAGED: "A DAMAGED copy stays as it is. Restore another (`list` shows them all); the next backup of "
    "its VM, if it still is backed up, makes a new one. If the store was at fault, put it right and verify "
    "again.",
    SUSPECT: "The files of a SUSPECT copy are whole, but what the pool gave for them was not: restore "
    "another.",
    CopyState.UNCHECKED.value: "What was NOT CHECKED is not judged: where its line names a step, take it, "
    "and verify again.",
    CopyState.UNREADABLE.value: "What COULD NOT BE READ is not judged: put the share or disk right, and "
    "verify again."}
NOT_GOOD = "No run removes what is not good. `verify` tells more; restore another copy, if there is one."


class CopyVerdict(NamedTuple):
    """What a check of a copy found, how its files looked as it began, and its blocks' state, if known."""
    copy: Copy
    state: CopyState
    reason: str
    look: str
    layer: Optional[LayerState] = None


def verify_copy(services: Services, copy: Copy, layers: LayerStates) -> CopyVerdict:
    """The verdict on that copy; what is learned of layers is noted. Raises Interrupted only."""
    look = ""
    try:
        look = services.catalog.look_of(copy)
        state, reason = _judge(services, copy, layers)
    except UnknownFormat as error:
        state, reason = CopyState.UNCHECKED if copy.is_old else CopyState.DAMAGED, str(error)
    except (VerificationError, NotThere, WrongKind) as error:
        state, reason = CopyState.DAMAGED, str(error)
    except CatalogError as error:
        state, reason = CopyState.UNREADABLE, str(error)
    except ProgramError as error:
        state, reason = CopyState.UNCHECKED, str(error)
    if state is CopyState.DAMAGED:
        try:
            services.catalog.check_in_place()
            now = services.catalog.copy_again(copy)
            names = (copy.name, *(copy.layer.held_by if copy.layer else ()))
            stale = [place for place in layers if place[0] == copy.folder and place[1] in names
                     and layers[place].images != services.catalog.images_of(*place)]
            if now.images != copy.images or stale:     # the storage host has compressed some meanwhile
                for place in stale:
                    del layers[place]
                return verify_copy(services, now, layers)
        except NotThere:
            state, reason = CopyState.GONE, "another run removed it while it was read"
        except CatalogError as error:
            state, reason = CopyState.UNREADABLE, str(error)
    return CopyVerdict(copy, state, reason.rstrip("."), look, layers.get((copy.folder, copy.name)))


def _judge(services: Services, copy: Copy, layers: LayerStates) -> Tuple[CopyState, str]:
    """State and reason; raises VerificationError for damage."""
    if copy.is_newer:
        raise ProgramError(copy.problem)
    if copy.is_unreadable:
        raise CatalogError(copy.problem)
    if copy.problem:
        raise VerificationError(copy.problem)
    with services.catalog.root.child(copy.folder) as folder, folder.child(copy.name) as inside:
        manifest = {} if copy.is_old else _check_files(services, inside)
        title = f"verifying {copy.folder}/{copy.name}"
        if copy.layer is not None:
            return CopyState.GOOD, _judge_layers(services, inside, copy, manifest, layers, title)
        with open(inside.open_file(copy.image), "rb") as image:
            forget_cached(image.fileno())              # what is proven is the storage, not a cache
        check = image_check(inside, copy, manifest)
        read_image(inside, copy, manifest, [check] if check else [],
                   shown_progress(services, title, copy.size_bytes), title)
    if copy.is_old:
        return CopyState.UNPROVEN, "the older program recorded no digests; the structure is whole"
    if check is None:
        return CopyState.GOOD, "digest, structure and the compressed image of the manifest inside it"
    blocks = counted(sum(disk.blocks for disk in check.report.disks), "block")
    if check.report.digest_kind and not check.report.digests_checked:
        blocks += " by number (their digests need libxxhash)"
    return CopyState.GOOD, "digest, structure and " + blocks


def _judge_layers(services: Services, inside: Directory, copy: Copy, manifest: Dict[str, Any],
                  layers: LayerStates, title: str) -> str:
    """Why a copy that tells the state of every block is good; VerificationError if it is not: its own blocks
    and those that others hold for it are all there, each with its digest."""
    with contextlib.ExitStack() as stack:
        holders = opened_holders(stack, inside, copy, manifest)
        on_tick = shown_progress(services, title, sum(
            holder.copy.size_bytes for name, holder in holders.items()
            if (copy.folder, name or copy.name) not in layers))
        for name, holder in holders.items():
            place = copy.folder, name or copy.name
            if place not in layers:
                layers[place] = layer_state(holder, on_tick, title)
        if layers[copy.folder, copy.name].problem:
            raise VerificationError(layers[copy.folder, copy.name].problem)
        bad = {name: layers[copy.folder, name or copy.name].bad for name in holders}
        number = check_rows(inside, manifest, holders, bad)
        if None in bad.values():           # how much is whole of one that can't be read to its end
            pump([Flow(lambda: laid_together(inside, copy, manifest), [])], on_tick, title)
    held = f" in {counted(len(holders), 'copy')}" if len(holders) > 1 else ""
    return f"digest, structure and {counted(number, 'block')}{held}"


def _check_files(services: Services, inside: Directory) -> Dict[str, Any]:
    """The manifest, when every small file is as it and SHA256SUMS say; VerificationError otherwise."""
    raw = inside.read(MANIFEST)
    try:
        manifest = parse_manifest(raw)
    except ValueError as error:
        raise VerificationError(f"{MANIFEST} is damaged: {error}")
    sums = {MANIFEST: hashlib.sha256(raw).hexdigest()}
    for name, facts in manifest["files"].items():
        sums[name] = facts["sha256"]
    images = {image["name"] for image in manifest["images"]}
    if not images < set(sums) or BLOCKS not in sums:
        raise VerificationError(f"{MANIFEST} does not list the image and its blocks")
    if inside.read(CHECKSUMS) != checksums(sums, manifest):
        raise VerificationError(f"{CHECKSUMS} is not what {MANIFEST} says")
    for name in sorted(set(sums) - images - {MANIFEST}):
        folder, _, base = name.rpartition("/")
        if folder.startswith("/") or ".." in folder.split("/"):
            raise VerificationError(f"{MANIFEST} names a file outside the copy: {one_line(name)}")
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(inside.child(folder)) if folder else inside
            digest = stored_digest(place.open_file(base), lambda _: services.signals.check(),
                                   f"reading {base}")
        if digest != sums[name]:
            raise VerificationError(f"{name} is not what was written: its SHA-256 differs")
    return manifest


# ---- what a person verifies and prunes -------------------------------------
# What is in the store is chosen by a person's words, proven again, and let go
# without a backup and without a pool.


def chosen_vms(catalog: Catalog, vm: str, log: Log) -> Listing:
    """The VMs of the store that the word means, or all; UsageError if none. What can't be listed is told."""
    listing = list_store(catalog)
    for problem in listing.problems:
        log.info(f"{problem} It is left out.")
    found = [stored for stored in listing.vms if not vm or stored.bears(vm)]
    if vm and not found:
        raise UsageError(f"{catalog.path} holds no backup of {quote_name(vm)}."
                         + (" Not all of it could be read: see above." if listing.problems else
                            " `list` shows the VMs that it holds."))
    return listing._replace(vms=found)


def verify_chosen(run: Run) -> None:
    """Each copy that the words mean was read and judged; its verdict is shown, and on record, as soon as it
    is known. With max_time what was longest not looked at comes first, and the rest is for the next run."""
    services, log, arguments = run.services, run.services.log, run.services.arguments
    catalog, clock = open_store(services.settings), services.clock
    services, vm, wanted = services._replace(catalog=catalog), arguments.vm, arguments.parameters["from"]
    listing = chosen_vms(catalog, vm, log)
    run.findings += [Finding(Severity.ERROR, catalog.path, str(error)) for error in listing.misbehaved]
    copies = [copy for stored in listing.vms for copy in (stored.copies[-1:] if wanted == "latest"
                                                          else stored.copies)
              if wanted in ("", "latest", copy.name, copy.stamp)]
    if not copies and wanted:
        raise UsageError(f"there is no copy {one_line(wanted)} of {quote_name(vm) if vm else 'any VM'}: "
                         "`list` shows the stamps.")
    if not copies:
        raise BackupError(f"{catalog.path} holds no copy. Is it the right directory, and is the share "
                          "mounted?")
    most_s = arguments.parameters["max_time"] * MINUTE_S or FOR_EVER_S
    if most_s != FOR_EVER_S:
        copies.sort(key=lambda copy: copy.checked("verified_at") or "")
    began_s, untold = clock.monotonic(), True
    words, layers = [], {}                 # type: List[str], LayerStates
    for copy in copies:
        services.signals.check()
        if words and clock.monotonic() - began_s >= most_s:
            break
        log.subject = "", f"{len(words) + 1}/{len(copies)}"
        verdict = verify_copy(services, copy, layers)
        state, title, reason = verdict.state, f"{copy.folder}/{copy.name}", verdict.reason
        is_fine, word = state in (CopyState.GOOD, CopyState.UNPROVEN, CopyState.GONE), state.value
        if is_fine and copy.suspicion:     # that its files are whole does not lift it
            is_fine, word, reason = False, SUSPECT, f"{reason}; but {copy.suspicion}"
        words.append(word)
        log.show(f"{word:14} {title}: {reason}")
        run.outcomes.append(Outcome("verify", copy.uuid, copy.vm_name, title, None if is_fine else reason))
        try:
            if copy.mark and state not in (CopyState.GONE, CopyState.UNREADABLE, CopyState.UNCHECKED):
                facts = {"layer": None, "bad": None} if copy.layer else {}         # not read, so not known
                if verdict.layer:
                    facts = {"layer": DAMAGED if verdict.layer.problem else GOOD, "bad": verdict.layer.bad}
                catalog.record(copy, verified_at=format_utc(clock.utc()), verdict=state.value,
                               reason=verdict.reason, look=verdict.look, **facts)
        except CatalogError as error:      # a store that can only be read, for one: said once
            if untold:
                log.info(f"verdicts are not recorded: {error}")
            untold = False
    known = [state.value for state in CopyState] + [SUSPECT]
    counts = ", ".join(f"{words.count(word)} {word}" for word in known if word in words)
    left = len(copies) - len(words)
    for word in COPY_ADVICE:
        if word in words:
            log.show(COPY_ADVICE[word])
    log.show(f"{counted(len(words), 'copy')} verified: {counts}"
             f"{'; ' + counted(left, 'copy') + ' left for the next run' if left else ''}.")


def is_pruned_by_hand(arguments: Arguments) -> bool:
    """Does somebody say by hand how many copies of one VM are to stay?"""
    return arguments.action.name == "prune" and bool(arguments.vm) \
        and any(setting.name == "max_backups" for setting in arguments.settings)


def stored_rules(services: Services, stored: StoredVm,
                 machine: Optional[VirtualMachine] = None) -> Tuple[Tuple[Rules, ...], str]:
    """The rules for a VM and kind when retention is applied without a pool, this config's first, and what
    makes them so; none if nothing is removed. `machine`: the VM, where the pool was asked.

    Where max_backups is said by hand, only this config's rules count. A VM that the config does not select by
    name, and copies that tell no rules, are left. The rules of this config's newest manifest, or of one that
    tells no config, count too: which line decides, for tags or after a change of the kind, only a run with
    the pool knows, and one by hand can have other rules. Lowered ones count once a run has told them.
    """
    settings = services.settings
    if is_pruned_by_hand(services.arguments) and stored.method is not None:
        return (settings.rules(),), "max_backups on the command line"
    doubt = "" if machine else ", as far as its copies tell"
    machine = machine or lost_machine(stored)
    if any(selector.matches(machine) for selector in settings.exclude):
        return (), "the config excludes this VM"
    selector = choose_selector(machine, settings.vm_export + settings.vdi_export)
    if stored.method is None or not stored.uuid:
        return (), "the kind or the VM's uuid can't be read"
    known = [copy.rules for copy in stored.copies if copy.rules is not None]
    if not known:
        return (), "no manifest says how many copies to keep"
    if selector is None:
        return (), "no selector of this config names this VM" + doubt
    own, told_last = settings.rules(selector.keep), rules_told(stored.around, stored.uuid, stored.method)
    for last in [rules for rules in known if rules.config in ("", own.config)][-1:] + [
            rules for rules, _ in told_last.values() if rules.config == own.config]:
        own = Rules(*map(max, own[:-1], last[:-1]), config=own.config)
    return rules_for(own, stored.around, stored.uuid, stored.method), selector.line


def stored_verdicts(services: Services, stored: StoredVm, now: datetime,
                    machine: Optional[VirtualMachine] = None) -> Tuple[Tuple[Rules, ...], str, List[Verdict]]:
    """What stored_rules gives, and what retention then says of each of the copies."""
    rules, why = stored_rules(services, stored, machine)
    found = {verdict.copy.name: verdict for verdict in judge(
        stored.around, stored.uuid, stored.method, rules, now,
        has_unfinished=stored.has_unfinished)} if rules else {}
    return rules, why, [found.get(copy.name, Verdict(copy, True, copy.pin or why)) for copy in stored.copies]


def lost_machine(stored: StoredVm) -> VirtualMachine:
    """What selectors can know of a VM by its copies alone."""
    return VirtualMachine("", stored.uuid, stored.name, "", "", (), "", "", "", NULL_REF, ())


def prune_chosen(run: Run) -> None:
    """The copies that no rule holds of the VMs that the words mean are gone, or shown in a preview; nothing
    of any VM while the storage misbehaves, or once the clock went back since the copies of one."""
    services, log, arguments = run.services, run.services.log, run.services.arguments
    settings, preview = services.settings, arguments.preview
    services = services._replace(catalog=open_store(settings) if preview else open_catalog(settings, log))
    listing = chosen_vms(services.catalog, arguments.vm, log)
    if listing.misbehaved:
        raise StorageMisbehaved(f"nothing is removed while the storage misbehaves: {listing.misbehaved[0]}")
    for stored in listing.vms:
        problem = clock_went_back(stored.around, services.clock.utc())
        if problem:
            raise BackupError(f"{stored.title}: {problem}")
    vms = {(stored.uuid, stored.pool) for stored in listing.vms}
    if is_pruned_by_hand(arguments) and (len({uuid for uuid, _ in vms}) > 1
                                         or len({pool for _, pool in vms if pool}) > 1):
        uuids = ", ".join(sorted({uuid or "?" for uuid, _ in vms}))
        raise UsageError(f"{quote_name(arguments.vm)} stands for {len(listing.vms)} VMs in the store "
                         f"({uuids}): name one as vm=uuid:UUID, or by its directory.")
    removed = 0
    for stored in listing.vms:
        rules, why = stored_rules(services, stored)
        if not rules:
            log.show(f"left: {stored.title}: {counted(len(stored.copies), 'copy')} in {stored.folder}/: "
                     f"{why}; `prune vm=... max_backups=N` removes by hand.")
            continue
        try:
            removed += prune_one(run, services, stored)
        except BackupError as error:
            run.tell([Finding(Severity.ERROR, stored.title, str(error))])
            if isinstance(error, StorageMisbehaved):
                break                      # nothing more is removed in this run
    if any(not copy.is_good for stored in listing.vms for copy in stored.copies):
        log.show(NOT_GOOD)
    log.show(f"{counted(removed, 'copy')} {'would be removed' if preview else 'removed'}.")


def prune_one(run: Run, services: Services, chosen: StoredVm) -> int:
    """How many of the VM's copies no rule holds: they are gone, or shown in a preview. That is decided on
    what is there under the lock, whatever was there when the VM was chosen."""
    preview, folder, catalog, log = services.arguments.preview, chosen.folder, services.catalog, services.log
    with contextlib.ExitStack() as stack:
        lock = None if preview else catalog.folder_lock(folder)
        if lock is not None and not stack.enter_context(lock.held()):
            raise BackupError(f"its directory {folder} is in use by another run "
                              f"({holder_text(lock.text())}); nothing was removed. Try again once that has "
                              "ended.")
        now = {(stored.uuid, stored.pool, stored.method): stored
               for stored in stored_in(catalog.folder(folder))}
        stored = now.get((chosen.uuid, chosen.pool, chosen.method), chosen._replace(around=()))
        utc, local = services.clock.utc(), services.clock.local()
        for warning in retention_warnings(stored.around, utc, local):
            if warning not in {finding.sentence for finding in run.findings}:
                run.tell([Finding(Severity.WARNING, stored.title, warning)])
        rules, _ = stored_rules(services, stored)
        if not rules or clock_went_back(stored.around, utc):
            return 0
        verdicts = judge(stored.around, stored.uuid, stored.method, rules, local,
                         has_unfinished=stored.has_unfinished)
        removed, left = 0, set()           # type: int, Set[str]
        for verdict in in_removal_order(verdicts):
            services.signals.check()
            copy, place = verdict.copy, f"{folder}/{verdict.copy.name}"
            is_left = "holds blocks of one that is left" if copy.name in left else \
                "" if preview else catalog.remove_copy(copy)
            left |= copy.layer.held_by if is_left and copy.layer else set()
            removed += not is_left
            log.show(f"left: {place} {is_left}" if is_left else
                     f"{'would remove' if preview else 'removed'}: {place}: {verdict.text}")
        for verdict in verdicts:
            copy, place = verdict.copy, f"{folder}/{verdict.copy.name}"
            if not verdict.keep:
                continue
            if not copy.is_good or copy.aside or copy.pin and copy.is_of(stored.uuid, stored.method):
                log.show(f"left: {place}: {verdict.text}")
            elif copy.counts_for(stored.uuid, stored.method) and (
                    preview or is_pruned_by_hand(services.arguments)):
                log.show(f"{'would keep' if preview else 'kept'}: {place}: {verdict.text}")
        run.tell(Finding(Severity.WARNING, stored.title, warning) for warning in idle_warnings(
            verdicts, stored.uuid, stored.method, rules, local))
        return removed


# =============================================================================
# 22. Restore
# =============================================================================
# The way back. What an image holds (Source) and what the pool has (PoolView) are
# read; plan_restore, which is pure, says what will be made and why, or why not;
# Importer makes it, journal first, and takes everything back unless all matched.
#
# Everything comes in through `xe vm-import`: it keeps all fields of a VM, it leaves empty space empty, and it
# refuses a damaged block. An archive's ova.xml is rewritten as it streams in. A raw or VHD image becomes an
# archive on the way, with the VM's own ova.xml from vm-metadata.xml: so VHD needs no file (`xe vdi-import
# format=vhd` can't read a pipe), and a disk of which little is used costs little. As one import has one SR,
# an archive whose disks belong on several is cut into parts, each imported on its own; the disks are then
# hung on the VM of the first.

THICK_SR_TYPES = ("lvm", "lvmoiscsi", "lvmohba", "lvmofcoe")      # a disk takes its whole size there
ISO_SR_TYPES = ("iso", "udev")
ORIGINAL_FIELDS = ("name_description", "tags", "other_config", "user_version", "start_delay",
                   "shutdown_delay", "order", "ha_restart_priority")      # a snapshot resets some of them
OLD_EXPORT_NAME = re.compile(r"(?s)RESTORE_(.*)|(.*) \(backup [0-9]{4}-[0-9]{2}-[0-9]{2} [0-9:]{8}\)"
                             r"(?: vmbackup-[0-9a-f]+)?")
SNAPSHOT_OF_UUID = re.compile(r"\('uuid' '([0-9a-f-]{36})'\)")    # a quote inside a value stands there as \'
MEMORY_DEVICE = "memory"


# --- what an image holds ---------------------------------------------------------------


class SourceDisk(NamedTuple):
    """A disk of the VM as the copy knows it. `id`: its name in ova.xml; `stored_bytes` -1 if unknown;
    `left_out`: the line that left it out of the copy."""
    id: str
    device: str
    userdevice: str
    name: str
    virtual_size: int
    vdi_uuid: str
    sr_uuid: str
    sr_name: str
    stored_bytes: int = -1
    left_out: str = ""

    @property
    def title(self) -> str:
        size = f" ({format_size(self.virtual_size)})" if self.virtual_size else ""
        return f"{self.device} {quote_name(self.name)}{size}"

    def absence(self, where: str = "it") -> str:
        why = f", as it was left out by {one_line(self.left_out)}" if self.left_out else ""
        return f"disk {self.title} is not in {where}{why}"

    @property
    def is_memory(self) -> bool:
        """Is it the memory of a suspended VM, which hangs on no drive?"""
        return self.device == MEMORY_DEVICE


class Source(NamedTuple):
    """An image to bring back, and what is known of it. `inside`: its directory, open. `ova`: the archive's
    own, or vm-metadata.xml for an image of one disk; {} if there is none. `original`: the VM's own record, {}
    if unknown. `disks` are in the image, `lacking` are the VM's others. `order`: the disks of an archive
    whose blocks come first, as far as that is known."""
    inside: Directory
    copy: Copy
    manifest: Dict[str, Any]
    ova: Dict[str, Any]
    vm_id: str
    original: Dict[str, Any]
    disks: Tuple[SourceDisk, ...]
    lacking: Tuple[SourceDisk, ...] = ()
    order: Tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return self.inside.shown if self.copy.is_increment else f"{self.inside.shown}/{self.copy.image}"

    @property
    def size_bytes(self) -> int:
        return sum(disk["blocks"] for disk in held_disks(self.manifest)) * MEBIBYTE \
            if self.copy.is_increment else self.inside.status(self.copy.image).st_size

    @property
    def record(self) -> Dict[str, Any]:
        return ova_objects(self.ova, "VM").get(self.vm_id, {}) if self.ova else {}

    @property
    def vm_name(self) -> str:
        if self.original.get("name_label"):
            return self.original["name_label"]
        if self.manifest:
            return self.manifest["vm"]["name"]
        name = self.record.get("name_label", "")
        match = OLD_EXPORT_NAME.fullmatch(name)
        return (match.group(1) or match.group(2)) if match else name or self.copy.vm_name

    @property
    def vm_uuid(self) -> str:
        """The VM's own uuid, "" if unknown. A snapshot's archive bears the snapshot's, and the VM's only in
        its snapshot_metadata (a text: ocaml/xapi/helpers.ml vm_to_string@v24.19.2)."""
        if self.original.get("uuid") or self.copy.uuid:
            return self.original.get("uuid") or self.copy.uuid
        about_vm = self.record.get("snapshot_metadata", "")
        told = SNAPSHOT_OF_UUID.search(about_vm)
        if told:
            return told.group(1)
        is_of_snapshot = about_vm or OLD_EXPORT_NAME.fullmatch(self.record.get("name_label", ""))
        return "" if is_of_snapshot else self.record.get("uuid", "")

    @property
    def has_only_cfg_files(self) -> bool:
        """Is the VM known by its cfg files alone, which hold a part of its fields?"""
        return self.ova.get("version", {}) is None

    @property
    def digests_text(self) -> str:
        stamp = parse_copy_name(self.copy.name)
        return "the older program recorded no digests" if stamp and stamp[1] else \
            "no digests of it are on record"


def first_look(inside: Directory, copy: Copy, manifest: Dict[str, Any], force: bool) -> Check:
    """The check that has read the image up to its first block. VerificationError, in which what does not fit
    an image of ours is damage, if it does not begin as it should, or an uncompressed archive does not end as
    one: that is seen at once. With `force` an archive whose ova.xml is there will do."""
    if copy.is_increment:
        look = Check(check_xva)
        text, facts = inside.read(OVA_XML), manifest["files"].get(OVA_XML, {})
        if not force and hashlib.sha256(text).hexdigest() != facts.get("sha256"):
            raise VerificationError(f"{OVA_XML} is not what was written: its SHA-256 differs")
        look.ova = parse_ova(text)
        return look
    is_archive = image_format(copy.image) == "xva"
    look = Check(check_xva if is_archive else check_vhd)
    try:
        compression = image_compression(inside, copy.image, manifest.get("image", {}))
        if is_archive and compression == "none" and not force:
            end = inside.read_part(copy.image, 2 * SECTOR_BYTES, at_end=True)
            # An archive of others may lack the zero blocks: then it ends with a digest.
            has_digest = not manifest and re.fullmatch(br"([0-9A-Fa-f]{16,40})?\0+", end[SECTOR_BYTES:])
            if inside.status(copy.image).st_size % SECTOR_BYTES or end != XVA_END and not has_digest:
                raise VerificationError("the archive does not end with two zero blocks: it was cut off or "
                                        "overwritten")
        with contextlib.ExitStack() as stack, storage_errors(f"reading {copy.image}"):
            image = plain_reader(stack, inside.open_file(copy.image), compression, is_foreign_vhd(copy))
            next(check_xva(look, image, strict=bool(manifest)) if is_archive else
                 check_vhd(look, image, strict=False, is_whole=not force), None)
    except VerificationError as error:
        if not (force and is_archive and look.ova):
            kind = type(error) if copy.is_old else VerificationError
            raise kind(f"the image {copy.image} {kind.verdict}: {error}")
    return look


def disks_of_ova(ova: Dict[str, Any], vm_id: str) -> List[SourceDisk]:
    """The disks of that VM in ova.xml, in order of their device; the memory of a suspended VM is one."""
    exported, vdis, srs, drives = exported_disks(ova), ova_objects(ova, "VDI"), ova_objects(ova, "SR"), []
    for key, vbd in ova_objects(ova, "VBD").items():
        is_own = needed("VBD", key, vbd, "VM") == vm_id and vbd.get("type") != "CD"
        if is_own and vbd["VDI"] in exported:
            userdevice = needed("VBD", key, vbd, "userdevice")
            drives.append((vbd["VDI"], vbd.get("device") or device_name(userdevice), userdevice))
    machine = ova_objects(ova, "VM")[vm_id]
    if machine.get("power_state") == "Suspended" and machine.get("suspend_VDI") in exported:
        drives.append((machine["suspend_VDI"], MEMORY_DEVICE, ""))
    found = []
    for disk_id, device, userdevice in drives:
        name, sr = vdis[disk_id].get("name_label", ""), srs.get(vdis[disk_id].get("SR", ""), {})
        found.append(SourceDisk(disk_id, device, userdevice, name, exported[disk_id].virtual_size,
                                exported[disk_id].uuid, sr.get("uuid", ""), sr.get("name_label", "")))
    return sorted(found, key=lambda disk: (userdevice_number(disk.userdevice), disk.userdevice))


def read_source(inside: Directory, copy: Copy, force: bool = False, without_vm: bool = False) -> Source:
    """What that copy's directory holds. VerificationError or CatalogError if its image can't be what it
    should be; `force`: it may lack its end; `without_vm`: a disk's may stand alone (size 0: unknown)."""
    manifest = {} if copy.is_old else parse_manifest(inside.read(MANIFEST))
    if is_compressed_twice(copy.image, manifest.get("image", {})):
        raise UnknownFormat(f"{copy.image} was compressed a second time: decompress it once")
    metadata = read_metadata(inside, copy, manifest, force)
    vm_id, original = own_vm(metadata, copy.uuid) if metadata else ("", {})
    every = disks_of_ova(metadata, vm_id) if metadata else []
    if is_archive(copy):
        look = first_look(inside, copy, manifest, force)
        vm_id, record = own_vm(look.ova)
        if not manifest and _seed(original) != _seed(record) and _seed(original) and _seed(record):
            every, original, copy = [], {}, copy._replace(uuid="")     # it only lies beside another VM's
        rows = {row["archive_id"]: row for row in manifest.get("disks", ()) if row.get("archive_id")}
        disks = []
        for disk in disks_of_ova(look.ova, vm_id):
            row = rows.get(disk.id, {})    # it knows better where the disk lay, and how much of it was stored
            stored = row["blocks"] * MEBIBYTE if isinstance(row.get("blocks"), int) else -1
            disks.append(disk._replace(device=row.get("device") or disk.device, stored_bytes=stored,
                                       sr_uuid=row.get("sr_uuid") or disk.sr_uuid))
        there = {disk.userdevice for disk in disks}
        lacking = [disk for disk in every if disk.userdevice not in there]
        order = (look.first_disk,) if look.first_disk else ()
        if copy.is_increment:
            with contextlib.ExitStack() as stack:
                holders = opened_holders(stack, inside, copy, manifest, [] if force else None)
                order = tuple(disk["archive_id"] for disk in laid_order(copy, manifest, holders))
        return Source(inside, copy, manifest, look.ova, vm_id, original, tuple(disks),
                      _lacking(lacking, manifest), order)
    size = 0                               # then the manifest tells, or what stands beside the image
    if is_foreign_vhd(copy):
        size = first_look(inside, copy, manifest, force).size
    elif not manifest and image_compression(inside, copy.image, {}) == "none":
        size = inside.status(copy.image).st_size
    if not metadata and without_vm:
        alone = SourceDisk("", "xvda", "0", copy.image, size, "", "", "")
        return Source(inside, copy, manifest, {}, "", {}, (alone,))
    if not metadata:
        raise UnknownFormat(f"it is the image of a disk without its VM: neither {VM_METADATA} nor a vm.cfg "
                            "that tells of it stands beside it. `extract` makes a raw image of it, and `xe "
                            "vdi-import uuid=VDI-UUID format=raw filename=FILE` puts that into a new disk")
    disk = _imaged_disk(every, manifest, size)
    others = [other for other in every if other.id != disk.id]
    return Source(inside, copy, manifest, metadata, vm_id, original, (disk,), _lacking(others, manifest))


def _lacking(disks: Iterable[SourceDisk], manifest: Dict[str, Any]) -> Tuple[SourceDisk, ...]:
    """The disks that a copy lacks, those that were left out with the line that the manifest tells."""
    lines = {row["userdevice"]: row["by"] for row in manifest.get("left-out", ())}
    return tuple(disk._replace(left_out=lines.get(disk.userdevice, "")) for disk in disks
                 if not disk.is_memory)


def read_metadata(inside: Directory, copy: Copy, manifest: Dict[str, Any], force: bool) -> Dict[str, Any]:
    """What stands beside the image of the VM: vm-metadata.xml, or where that is not there what the cfg files
    tell; {} if neither is. Without a manifest nothing of it must be whole: an archive does without."""
    if manifest and inside.status(VM_METADATA) is not None:
        text, facts = inside.read(VM_METADATA), manifest["files"].get(VM_METADATA)
        if facts and not force and hashlib.sha256(text).hexdigest() != facts.get("sha256"):
            raise VerificationError(f"{VM_METADATA} is not what was written: its SHA-256 differs")
        return parse_ova(text)
    with contextlib.suppress(VerificationError):
        metadata = parse_ova(read_if_file(inside, VM_METADATA))
        disks_of_ova(metadata, own_vm(metadata, copy.uuid)[0])
        return metadata
    metadata = ova_of_cfg_files(inside, not copy.is_old)
    return metadata if metadata and set(own_vm(metadata)[1]) & set(CFG_VM_FIELDS) else {}


def _seed(record: Dict[str, Any]) -> str:
    """What MAC addresses are made of: a VM and its snapshots share it, two VMs do not."""
    return record.get("other_config", {}).get("mac_seed", "")


def _imaged_disk(disks: Sequence[SourceDisk], manifest: Dict[str, Any], size: int) -> SourceDisk:
    """The one of the VM's disks that an image of one disk holds: Disk 0, with the size that the image has."""
    rows = [row for row in manifest.get("disks", ()) if row.get("archive_id")] or manifest.get("disks", ())
    wanted = [str(row.get("userdevice")) for row in rows] if len(rows) == 1 else ["0", "xvda", "hda"]
    disk = next((disk for userdevice in wanted for disk in disks if disk.userdevice == userdevice), None)
    if disk is None:
        raise UnknownFormat(f"its metadata name no disk {' or '.join(wanted)}, which the image should be of")
    size = rows[0]["virtual_size"] if len(rows) == 1 else size or disk.virtual_size
    if not size:
        raise UnknownFormat("neither the image nor what stands beside it tells the size of its disk: "
                            "decompress it")
    return disk._replace(virtual_size=size)


# --- which copy is meant ----------------------------------------------------------------


@contextlib.contextmanager
def chosen_source(services: Services) -> Iterator[Tuple[Source, Optional[Catalog]]]:
    """What the copy holds that VM and from= mean, and its store (None: it was named by its path). UsageError
    if they mean none or several, or a path another VM's, BackupError if it is not good."""
    given, vm, catalog = services.arguments.parameters, services.arguments.vm, None
    wanted = given["from"]
    with contextlib.ExitStack() as stack:
        if "/" in wanted:
            place, copy = copy_at_path(wanted)
            inside = stack.enter_context(Directory.open_path(place))
        elif not vm:
            raise UsageError(f"{services.arguments.action.name} of what? Name a VM, or a copy with "
                             "from=PATH.")
        else:
            catalog = open_store(services.settings)
            copy, inside = stack.enter_context(held_copy(
                services, catalog, lambda: choose_copy(catalog, vm, wanted, services.log)))
        is_only_suspect = copy.suspicion == copy.trouble and given.get("from", "latest") != "latest"
        if copy.suspicion and is_only_suspect:         # its files are whole: who names it may have it
            services.log.warning(f"{inside.shown} is {copy.suspicion}.")
        elif copy.trouble and not (given.get("force") and copy.image):
            advice = "`restore` with force=yes takes it all the same; `list` shows the others." \
                if copy.image else "`list` shows the others: choose one with from=."
            raise BackupError(f"{inside.shown} is not a good copy: {copy.trouble}. {advice}")
        source = opened_source(services, copy, inside)
        names = (source.vm_name, copy.vm_name, source.vm_uuid, f"uuid:{source.vm_uuid}")
        if catalog is None and vm and vm not in names:
            raise UsageError(f"{source.title} is a copy of {quote_name(source.vm_name)}, not of "
                             f"{quote_name(vm)}: name that VM, or none.")
        yield source, catalog


@contextlib.contextmanager
def held_copy(services: Services, catalog: Catalog, choose: Callable[[], Copy],
              copy: Optional[Copy] = None) -> Iterator[Tuple[Copy, Directory]]:
    """That copy, or one that `choose` gives, open; nobody removes it, or what holds its blocks, meanwhile,
    where this store can be locked from here: who reads goes on without. For one that went away before it was
    held another is chosen."""
    while True:
        copy = copy or choose()
        with contextlib.ExitStack() as stack:
            try:
                names = sorted({copy.name} | (copy.layer.held_by if copy.layer else set()))
                is_free = services.arguments.preview or not catalog.is_writable() or all(
                    stack.enter_context(catalog.copy_lock(copy.folder, name, shared=True)) for name in names)
            except CatalogError as error:              # a full store, or one that can't lock
                is_free = True
                services.log.info(f"{copy.folder}/{copy.name} is read all the same, and a run that prunes "
                                  f"could remove it meanwhile: {error}")
            if not is_free:
                services.signals.sleep(0.5)             # a run is removing it just now
                continue
            try:
                inside = stack.enter_context(catalog.open_copy(copy))
            except NotThere:
                services.log.info(f"{copy.folder}/{copy.name} was removed meanwhile.")
                copy = None
                continue
            yield copy, inside
            return


def choose_copy(catalog: Catalog, vm: str, wanted: str, log: Log) -> Copy:
    """The copy of that VM that `wanted` (latest, or a stamp) means, of whichever kind."""
    found = chosen_vms(catalog, vm, log).vms
    if len({stored.uuid for stored in found}) > 1:
        rows = sorted({f"vm=uuid:{stored.uuid or '?'} is {quote_name(stored.name)} in {stored.folder}/"
                       for stored in found})
        raise UsageError(f"{quote_name(vm)} stands for {len({stored.uuid for stored in found})} VMs in the "
                         "store: name one. " + "; ".join(rows))
    copies = in_order(copy for stored in found for copy in stored.copies)
    if len({stored.folder for stored in found}) > 1:
        copies.sort(key=lambda copy: copy.taken_at)
    if wanted != "latest":
        chosen = [copy for copy in copies if wanted in (copy.name, copy.stamp)]
        if len(chosen) != 1:
            raise UsageError(f"there is no copy {one_line(wanted)} of {quote_name(vm)}; there are: "
                             + ", ".join(copy.name for copy in copies) + ".")
        return chosen[0]
    pools = sorted({copy.pool for copy in copies if copy.pool})
    if len(pools) > 1:
        log.warning(f"{found[0].uuid} is the uuid of a VM in several pools ({', '.join(pools)}); the newest "
                    "copy of any of them is taken. from=STAMP takes another.")
    for copy in reversed(copies):
        if not copy.is_good:
            log.warning(f"{copy.folder}/{copy.name} is passed over: {copy.trouble}.")
            continue
        full = [other.stamp for other in copies if other.is_good and other.method is Method.VM]
        if copy.method is Method.VDI and full:
            log.warning(f"{copy.folder}/{copy.name}, the newest good copy, holds only the OS disk. The "
                        f"newest copy of the whole VM is taken with from={full[-1]}; `list` shows all.")
        return copy
    raise BackupError(f"there is no good copy of {quote_name(vm)}; `list` shows what there is, and `restore` "
                      "with from=STAMP force=yes takes one all the same.")


def copy_at_path(path: str) -> Tuple[str, Copy]:
    """The directory and the copy of that path: a copy's directory, an image in it or alone; or UsageError."""
    is_directory = os.path.isdir(fs_path(path))
    place, image = (path, "") if is_directory else os.path.split(path.rstrip("/"))
    place = place or "/"
    absolute = fs_text(os.path.realpath(fs_path(place)))
    folder, name = os.path.basename(os.path.dirname(absolute)), os.path.basename(absolute)
    try:
        with Directory.open_path(place) as inside, Directory.open_path(place + "/..") as parent:
            written_at = datetime.fromtimestamp(int(status_of(inside.fd).st_mtime))
            copy = read_copy(parent, folder, name, *(parse_copy_name(name) or (written_at, True)))
            copy = resting(copy, functools.partial(copy_beside, parent, folder), lambda *_: True)
            if copy.is_by_difference:      # the audit that found something of it is a later copy's
                beside = [copy_beside(parent, folder, other) for other in parent.names()
                          if parse_copy_name(other)]
                copy = with_accusations([copy, *filter(None, beside)])[0]
            if is_directory or copy.is_newer or copy.image == image and (
                    not copy.is_old or parse_copy_name(name)):
                return place, copy
            status = inside.status(image)
            if status is None or not IMAGE_NAME.fullmatch(image):
                raise UsageError(f"{path} is no image that VmBackup knows: NAME.xva, .raw or .vhd, as it is "
                                 "or with .gz or .zst." if status else
                                 f"{path} is not there. Is the share mounted?")
            taken_at = datetime.fromtimestamp(int(status.st_mtime))
            alone = Copy(folder, name, taken_at, True, None, "", "", 0, None, None, "", 0, "")
            return place, with_old_image(inside, alone, image, status.st_size)
    except CatalogError as error:
        raise UsageError(f"{path} can't be read: {str(error).rstrip('.')}.")


NEXT_COPY = "`list` shows the other copies."
OTHER_COPY = "Nothing was started; " + NEXT_COPY


def opened_source(services: Services, copy: Copy, inside: Directory) -> Source:
    """What that copy holds; BackupError with what is wrong with it. A disk is extracted without its VM. A
    store that hangs is left when a signal comes."""
    given = services.arguments.parameters
    try:
        return within(FOR_EVER_S, f"reading {inside.shown}", lambda: read_source(
            inside, copy, given.get("force", False), not given.get("metadata", True)), services.signals.check)
    except (VerificationError, ValueError) as error:
        kind = type(error) if isinstance(error, VerificationError) else VerificationError
        raise kind(f"{inside.shown}: {str(error).rstrip('.')}. {OTHER_COPY}")
    except CatalogError as error:
        raise BackupError(f"{inside.shown} can't be read: {error} {OTHER_COPY}")


# --- what the pool has -------------------------------------------------------------------


class TargetSr(NamedTuple):
    """An SR that disks could go to; `free_bytes` -1 if it does not tell; `unplugged`: the uuids of its PBDs
    that are not plugged. With one of them it is not usable: an import into it would hang without a word
    (tried)."""
    ref: str
    uuid: str
    name: str
    type: str
    is_usable: bool
    free_bytes: int
    unplugged: Tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{quote_name(self.name)} ({self.uuid[:8]})"

    @property
    def way_in(self) -> str:
        """What to do before disks can go there."""
        plug = " and ".join(f"`xe pbd-plug uuid={uuid}`" for uuid in self.unplugged)
        return f"plug it with {plug}" if plug else "bring a host back that has it"


class PoolView(NamedTuple):
    """The pool as a restore sees it: records by ref, as the API gives them; `master` is a ref."""
    master: str
    srs: Tuple[TargetSr, ...]
    default_sr: str
    networks: Dict[str, Dict[str, Any]]
    machines: Dict[str, Dict[str, Any]]
    interfaces: Dict[str, Dict[str, Any]]
    vdis: Dict[str, Dict[str, Any]]
    vbds: Dict[str, Dict[str, Any]]


def read_pool_view(pool: Pool, inventory: Inventory) -> PoolView:
    """The pool as it is now, in ten calls."""

    def records(class_name: str, **needed: Any) -> Dict[str, Dict[str, Any]]:
        """All of that class; what is needed of one, and is missing or of another type, reads as given."""
        found = pool.records("reading the pool", class_name)
        for record in found.values():
            record.update({field: empty for field, empty in needed.items()
                           if not isinstance(record.get(field), type(empty))})
        return found

    (own,) = records("pool", default_SR=NULL_REF).values()
    return PoolView(inventory.master.ref, target_srs(pool, inventory.master.ref), own["default_SR"],
                    networks=records("network", uuid="", name_label=""),
                    machines=records("VM", uuid="", name_label="", other_config={}, is_control_domain=False),
                    interfaces=records("VIF", VM="", MAC=""),
                    vdis=records("VDI", uuid="", is_a_snapshot=True), vbds=records("VBD", VM="", VDI=""))


def target_srs(pool: Pool, master: str) -> Tuple[TargetSr, ...]:
    """The SRs as they are now, in four calls; one whose record can't be read is not usable. Storage work on a
    shared one is the master's (ocaml/xapi/message_forwarding.ml choose_pbds_for_sr@v24.19.2)."""
    doing = "reading the SRs"
    metrics = pool.records(doing, "host_metrics")
    live = {ref for ref, record in pool.records(doing, "host").items()
            if metrics.get(str(record.get("metrics")), {}).get("live") is True}
    pbds = [pbd for pbd in pool.records(doing, "PBD").values() if pbd.get("host") in live]
    found = []
    for ref, record in pool.records(doing, "SR").items():
        problems = []                      # type: List[str]
        sr = Fields("an SR", record, problems)
        size, used, kind = sr.number("physical_size"), sr.number("physical_utilisation"), sr.text("type")
        is_iso = sr.text("content_type") == "iso" or kind in ISO_SR_TYPES
        uuid, name = sr.text("uuid"), sr.text("name_label")
        own = [pbd for pbd in pbds if pbd.get("SR") == ref]
        plugged = {pbd.get("host") for pbd in own if pbd.get("currently_attached") is True}
        is_reached = master in plugged or plugged and record.get("shared") is not True
        unplugged = sorted(str(pbd.get("uuid")) for pbd in own if pbd.get("currently_attached") is not True)
        found.append(TargetSr(ref, uuid, name, kind, bool(is_reached and not is_iso and not problems),
                              max(0, size - used) if size > 0 else -1, tuple(unplugged)))
    return tuple(found)


# --- the plan ------------------------------------------------------------------------------

LIKE_FIELDS = {         # what a new drive or interface has of an old one's record
    "VBD": ("VDI", "userdevice", "bootable", "mode", "type", "empty", "unpluggable", "qos_algorithm_type",
            "qos_algorithm_params"),
    "VIF": ("MTU", "qos_algorithm_type", "qos_algorithm_params", "locking_mode", "ipv4_allowed",
            "ipv6_allowed")}


def fields_like(class_name: str, record: Dict[str, Any], **fields: Any) -> Dict[str, Any]:
    """The argument of VBD.create or VIF.create for one like that record but for the fields that are given."""
    like = {field: record[field] for field in LIKE_FIELDS[class_name] if field in record}
    return dict(like, other_config=own_other_config(record), **fields)


NEW_UUID, VIF_UUID = "NEW-UUID", "VIF-UUID-"     # in a note: what the VM's uuid, or its VIF's, will be
NEEDED_OF_VM = ("memory_static_max", "memory_dynamic_max", "VCPUs_max", "VCPUs_at_startup")


class PlannedDisk(NamedTuple):
    """A disk that will be made, where, and why there."""
    disk: SourceDisk
    sr: TargetSr
    reason: str


class PlannedInterface(NamedTuple):
    """A VIF that will be made: the arguments of VIF.create but for the VM; MAC is "" for a new one."""
    fields: Dict[str, Any]
    network_name: str


class ExistingDisk(NamedTuple):
    """A disk of the VM that the copy lacks. `vdi_ref`: what will be attached, "" if nothing; `reason`."""
    disk: SourceDisk
    vdi_ref: str
    reason: str


class RestorePlan(NamedTuple):
    """What a restore will make, with reasons; nothing is made if there are `problems`. `given`: the
    parameters of the action. `uuid`: the one that the VM is to keep, or "". `parts`: for each import its SR
    and the ids of its disks, in the order of the archive. `new_mac_seed`: a kept one would clash."""
    source: Source
    given: Dict[str, Any]
    is_drill: bool
    name: str
    uuid: str
    new_mac_seed: bool
    disks: Tuple[PlannedDisk, ...]
    parts: Tuple[Tuple[Optional[TargetSr], Tuple[str, ...]], ...]
    interfaces: Tuple[PlannedInterface, ...]
    existing: Tuple[ExistingDisk, ...]
    notes: Tuple[str, ...]
    problems: Tuple[str, ...]


def plan_restore(source: Source, view: PoolView, given: Dict[str, Any],
                 is_drill: bool = False) -> RestorePlan:
    """What will be made of that copy in that pool. UsageError for an SR or network that is not there."""
    problems, notes = [], []               # type: List[str], List[str]
    named = find_sr(view, given["sr"]) if given["sr"] else None
    disks = _plan_disks(source, view, named, problems)
    _check_space(source, disks, notes, problems)
    interfaces, existing, name = [], [], ""      # type: List[PlannedInterface], List[ExistingDisk], str
    uuid, new_mac_seed = "", True
    if not is_drill:
        interfaces = _plan_interfaces(source, view, given, notes, problems)
        existing = [_plan_existing(disk, view, given["attach_existing_disks"]) for disk in source.lacking]
        name = _plan_name(source, view, given["to"], notes, problems)
        if given["preserve"]:
            uuid, new_mac_seed = _plan_identity(source, view, interfaces, notes, problems)
    _check_needs(source, problems)
    usable = sorted((sr for sr in view.srs if sr.is_usable), key=lambda sr: sr.ref != view.default_sr)
    home = ([named] if named else [planned.sr for planned in disks] + usable + [None])[0]
    if home is None:
        problems.append("no SR of the pool can take its records: name one with sr=.")
    lost = lost_memory(source)
    if lost:
        notes.append(lost)
    if source.has_only_cfg_files:
        notes.append("this copy has no vm-metadata.xml, so how the VM boots is not on record: it is made as "
                     "an HVM guest that boots from its disk. Look at its settings before it is started.")
    other_config = (source.original or source.record).get("other_config", {})
    if not is_drill and other_config.get("auto_poweron") == "true" and name != source.vm_name:
        notes.append("its other_config has auto_poweron=true, as the VM's had: it starts with its host "
                     f"beside the VM that bears its name; `xe vm-param-remove uuid={NEW_UUID} "
                     "param-name=other-config param-key=auto_poweron` stops that.")
    return RestorePlan(source, given, is_drill, name, uuid, new_mac_seed, tuple(disks),
                       _cut_into_parts(source, disks, home), tuple(interfaces), tuple(existing), tuple(notes),
                       tuple(problems))


def _check_needs(source: Source, problems: List[str]) -> None:
    """Problems for what the server must be told of a VM and its disks and the copy does not tell."""
    where, fields = "ova.xml" if is_archive(source.copy) else VM_METADATA, NEEDED_OF_VM
    if source.has_only_cfg_files:
        where, fields = "vm.cfg", NEEDED_OF_VM[1:]
    lacking = [f"{field} of the VM" for field in fields
               if not re.fullmatch("[0-9]{1,18}", source.record.get(field, ""))]
    vdis, srs = ova_objects(source.ova, "VDI"), ova_objects(source.ova, "SR")
    lacking += [f"the SR of disk {disk.title}" for disk in source.disks if vdis[disk.id].get("SR") not in srs]
    if lacking:
        problems.append(f"its {where} lacks what the server needs: {', '.join(lacking)}. `list` shows the "
                        "other copies.")


def _plan_disks(source: Source, view: PoolView, named: Optional[TargetSr],
                problems: List[str]) -> List[PlannedDisk]:
    """Each disk on the SR that was named, else on the one that it came from."""
    planned = []
    for disk in (one for one in source.disks if not one.is_memory):
        own = next((sr for sr in view.srs if sr.uuid == disk.sr_uuid), None)
        alike = [sr for sr in view.srs if sr.name and sr.name == disk.sr_name and sr.is_usable]
        if named is not None:
            planned.append(PlannedDisk(disk, named, "named by sr="))
        elif own is not None and own.is_usable:
            planned.append(PlannedDisk(disk, own, "where it came from"))
        elif own is None and len(alike) == 1:
            planned.append(PlannedDisk(disk, alike[0], "it came from an SR of this name"))
        else:
            name = quote_name((own.name if own else disk.sr_name) or "of unknown name")
            why = f"not plugged: {own.way_in}, or" if own else "not in this pool:"
            problems.append(f"disk {disk.title} came from SR {name} ({disk.sr_uuid or 'uuid unknown'}), "
                            f"which is {why} name one with sr=. {_sr_choice(view)}")
    return planned


def lost_memory(source: Source) -> str:
    """What becomes of the memory of a VM that was suspended, in a sentence; "" if it was not. A backup never
    has it, as a snapshot has none (ocaml/xapi/xapi_vm_clone.ml@v26.17.0). What a hand-made export has is left
    out: it fits only the interfaces, drives and hosts that the VM had."""
    image = next((disk for disk in source.disks if disk.is_memory), None)
    if image is not None:
        return (f"it was suspended, and its memory ({format_size(image.virtual_size)}) is left out: it comes "
                f"back halted, and starts as after a power cut. `xe vm-import filename={source.title}` "
                "brings it back suspended.")
    if (source.original or source.record).get("power_state") == "Suspended":
        return ("it was suspended when it was backed up, and a backup holds no memory: it comes back halted, "
                "and starts as after a power cut.")
    return ""


def meant_by(key: str, word: str, named: Sequence[Tuple[str, str]], choice: str) -> int:
    """Which of those, each a uuid and a name, `sr=` or `network=` means; UsageError if none or several."""
    found = [number for number, (uuid, _) in enumerate(named) if word in (uuid, "uuid:" + uuid)] or \
        [number for number, (_, name) in enumerate(named) if name == word]
    if len(found) == 1:
        return found[0]
    problem = f"has {len(found)} of that name: give a uuid" if found else "has none such"
    raise UsageError(f"{key}={one_line(word)}: the pool {problem}. {choice} Nothing was started.")


def find_sr(view: PoolView, word: str) -> TargetSr:
    """The SR that `sr=` means; UsageError if it is not one that disks can go to."""
    sr = view.srs[meant_by("sr", word, [(sr.uuid, sr.name) for sr in view.srs], _sr_choice(view))]
    if not sr.is_usable:
        raise UsageError(f"sr={one_line(word)}: disks can't be put there: it is for ISOs, or not plugged "
                         f"(then {sr.way_in}). {_sr_choice(view)} Nothing was started.")
    return sr


def _sr_choice(view: PoolView) -> str:
    usable = [f"{quote_name(sr.name)} ({sr.uuid}), "
              f"{format_size(sr.free_bytes) if sr.free_bytes >= 0 else '? bytes'} free"
              for sr in view.srs if sr.is_usable]
    return f"There are: {'; '.join(usable)}." if usable else "There is none that could take it."


def _check_space(source: Source, disks: Sequence[PlannedDisk], notes: List[str], problems: List[str]) -> None:
    """Problems for SRs that can't hold what comes, notes for those that may not."""
    for sr in sorted({planned.sr for planned in disks}):
        here = [planned.disk for planned in disks if planned.sr == sr]
        most = sum(disk.virtual_size for disk in here)
        least = most if sr.type in THICK_SR_TYPES else least_bytes(source, here)
        if 0 <= sr.free_bytes < least:
            problems.append(f"SR {sr.title} has {format_size(sr.free_bytes)} free, and what goes there needs "
                            f"at least {format_size(least)}: free space on it, or name another with sr=.")
        elif 0 <= sr.free_bytes < most:
            notes.append(f"SR {sr.title} has {format_size(sr.free_bytes)} free, less than the full size of "
                         f"what goes there ({format_size(most)}).")


def least_bytes(source: Source, disks: Sequence[SourceDisk]) -> int:
    """What those disks of the image hold at the least, as far as that is known before it is read."""
    if image_format(source.copy.image) == "raw":         # all of it is stored; how much is zeros is not known
        return 0
    if any(disk.stored_bytes < 0 for disk in disks) and len(disks) == len(source.disks) \
            and source.copy.image.endswith(".xva"):
        return source.copy.size_bytes // 100 * 99       # the rest are headers and digests
    return sum(max(0, disk.stored_bytes) for disk in disks)


def _plan_interfaces(source: Source, view: PoolView, given: Dict[str, Any], notes: List[str],
                     problems: List[str]) -> List[PlannedInterface]:
    """Each VIF on the network that was named, else on the one of its own name; none is ever created."""
    known = [(record["uuid"], record["name_label"]) for record in view.networks.values()]
    choice = f"There are: {', '.join(sorted(f'{quote_name(name)} ({uuid})' for uuid, name in known))}."
    named = given["network"] and list(view.networks)[meant_by("network", given["network"], known, choice)]
    networks, vifs = ova_objects(source.ova, "network"), ova_objects(source.ova, "VIF")
    planned = []
    for key, vif in vifs.items():
        if vif.get("VM") != source.vm_id:
            continue
        own = networks.get(vif.get("network", ""), {})
        name = own.get("name_label", "of unknown name")
        alike = [ref for ref, record in view.networks.items() if record["name_label"] == name]
        same = [ref for ref in alike if view.networks[ref]["uuid"] == own.get("uuid")]
        ref = named or next(iter(same or alike), "")
        if not named and not same and len(alike) != 1:
            problems.append(f"its interface {vif.get('device')} was on network {quote_name(name)}, which is "
                            f"not in this pool, or more than once: name one with network=. {choice}")
            continue
        fields = fields_like("VIF", vif, device=needed("VIF", key, vif, "device"), network=ref,
                             MAC=vif.get("MAC", "") if given["preserve"] else "")
        planned.append(PlannedInterface(fields, view.networks[ref]["name_label"]))
        _note_fixed_addresses(vif, notes)
    return sorted(planned, key=lambda item: (userdevice_number(item.fields["device"]), item.fields["device"]))


def _note_fixed_addresses(vif: Dict[str, Any], notes: List[str]) -> None:
    """The addresses that VIF.configure_ipv4 and configure_ipv6 gave it are told, with the commands that give
    them again. An import loses them, as VIF.create sets none (ocaml/xapi/xapi_vif.ml@v26.17.0), and what
    comes back beside the VM must not take its address."""
    found, commands = [], []
    for family in ("ipv4", "ipv6"):
        if vif.get(family + "_configuration_mode") == "Static":
            gateway = vif.get(family + "_gateway")
            for address in vif.get(family + "_addresses", ()):
                found.append(address + (f", gateway {gateway}" if gateway else ""))
                commands.append(f"`xe vif-configure-{family} uuid={VIF_UUID}{vif['device']} mode=static "
                                f"address={address}{f' gateway={gateway}' if gateway else ''}`")
    if found:
        notes.append(f"its interface {vif['device']} had been given {' and '.join(found)} through the pool, "
                     f"which no import brings back: {', '.join(commands)}, once its guest tools run.")


def _plan_name(source: Source, view: PoolView, wanted: str, notes: List[str], problems: List[str]) -> str:
    """The name that the VM will have: no real VM of the pool has it."""
    taken = {record["name_label"] for record in view.machines.values() if is_real_machine(record)}
    if wanted:
        if wanted in taken:
            problems.append(f"a VM named {quote_name(wanted)} is there already: give another to=.")
        return wanted
    marked = f"{source.vm_name} (restored {source.copy.taken_at:%Y-%m-%d})"
    numbered = (f"{marked} {number}" for number in itertools.count(2))
    name = next(one for one in itertools.chain((source.vm_name, marked), numbered) if one not in taken)
    if name != source.vm_name:
        notes.append(f"a VM named {quote_name(source.vm_name)} is there: it is left as it is, and the new "
                     f"one is named {quote_name(name)}.")
    return name


def _plan_identity(source: Source, view: PoolView, interfaces: Sequence[PlannedInterface], notes: List[str],
                   problems: List[str]) -> Tuple[str, bool]:
    """The uuid to keep ("" for a new one), and whether its mac_seed has to be a new one all the same."""
    if not source.vm_uuid:
        notes.append("which uuid the VM had is not on record, so it gets a new one, and its backups begin a "
                     "new line; its MAC addresses are kept.")
    for record in view.machines.values():
        if record["uuid"] == source.vm_uuid:
            problems.append("preserve=yes can't be done: the VM with this uuid, "
                            f"{quote_name(record['name_label'])} ({source.vm_uuid}), is still in the pool, "
                            "and it is never touched. Restore without preserve=yes, or remove that VM first.")
    macs = {item.fields["MAC"].lower() for item in interfaces if item.fields["MAC"]}
    for vif in view.interfaces.values():
        holder = view.machines.get(vif["VM"])
        is_other = holder and is_real_machine(holder) and holder["uuid"] != source.vm_uuid
        if is_other and vif["MAC"].lower() in macs:
            problems.append(f"preserve=yes can't be done: {quote_name(holder['name_label'])} has the MAC "
                            f"address {vif['MAC']}. Restore without preserve=yes, or remove that interface "
                            "first.")
    seed = _seed(source.original or source.record)
    clash = sorted(quote_name(record["name_label"]) for record in view.machines.values()
                   if seed and _seed(record) == seed)
    if clash and not problems:
        notes.append(f"its mac_seed is also that of {', '.join(clash)}, so it gets a new one; the MAC "
                     "addresses are kept.")
    return source.vm_uuid, bool(clash) or not seed


def _plan_existing(disk: SourceDisk, view: PoolView, attach: bool) -> ExistingDisk:
    """What becomes of a disk that the copy lacks: attached if it is there, free, and asked for."""
    ref = next((ref for ref, record in view.vdis.items() if record["uuid"] == disk.vdi_uuid), "")
    holders = [view.machines.get(vbd["VM"]) for vbd in view.vbds.values() if vbd["VDI"] == ref]
    names = sorted({quote_name(one["name_label"]) if one else "a VM that is gone" for one in holders
                    if not (one and one["is_control_domain"])})
    if not ref:
        reason = "it is no longer in the pool"
    elif view.vdis[ref]["is_a_snapshot"]:
        reason = "what has its uuid now is a snapshot"
    elif names:
        reason = f"it hangs on {', '.join(names)}"
    elif not attach:
        reason = f"it is in the pool (uuid {disk.vdi_uuid}) and on no VM: " \
            "attach_existing_disks=yes attaches it"
    else:
        return ExistingDisk(disk, ref, "it is in the pool and on no VM")
    return ExistingDisk(disk, "", reason)


def _cut_into_parts(source: Source, disks: Sequence[PlannedDisk],
                    home: Optional[TargetSr]) -> Tuple[Tuple[Optional[TargetSr], Tuple[str, ...]], ...]:
    """The disks in the order of the archive (string order of ids: ocaml/xapi/stream_vdi.ml@v26.17.0), cut
    where the SR changes. An archive of another program that begins with another disk, or an increment that is
    laid together in another order, is cut at every disk: then any order will do. A VM without disks is a part
    without any, at home on that SR."""
    parts = []                             # type: List[Tuple[TargetSr, Tuple[str, ...]]]
    by_id = sorted(disks, key=lambda item: item.disk.id)
    order = sorted(by_id, key=lambda item: (*source.order, item.disk.id).index(item.disk.id))
    for planned in order:
        if parts and order == by_id and parts[-1][0] == planned.sr:
            parts[-1] = planned.sr, parts[-1][1] + (planned.disk.id,)
        else:
            parts.append((planned.sr, (planned.disk.id,)))
    return tuple(parts) or ((home, ()),)


def plan_text(plan: RestorePlan) -> str:
    """The plan in lines for people: what a preview shows, and what a restore says first."""
    source = plan.source
    method = "vm-export" if is_archive(source.copy) else \
        f"vdi-export (one disk, {image_format(source.copy.image)})"
    if source.copy.is_increment:
        method = f"{source.copy.method.value} ({source.copy.layer_words})"
    lines = [f"{quote_name(source.vm_name)} ({source.vm_uuid or 'uuid unknown'}) from {source.title}",
             f"  a {method} copy{'' if source.manifest else f' ({source.digests_text})'}, taken "
             f"{source.copy.taken_at:%Y-%m-%d %H:%M:%S}",
             f"  becomes VM {quote_name(plan.name)}, "
             f"{f'uuid {plan.uuid} kept' if plan.uuid else 'with a new uuid'}"]
    lines += [f"  disk {item.disk.title} on SR {item.sr.title}: {item.reason}" for item in plan.disks]
    lines += [f"  interface {item.fields['device']} on network {quote_name(item.network_name)}, MAC "
              f"{item.fields['MAC'] or 'new'}" for item in plan.interfaces]
    lines += [f"  {item.disk.absence('this copy')}: {item.reason}"
              f"{'; it will be attached' if item.vdi_ref else ''}" for item in plan.existing]
    lines += ["  note: " + note for note in plan.notes]
    lines += ["  PROBLEM: " + problem for problem in plan.problems]
    lines.append(f"  it will {'' if plan.given['start'] else 'not '}be started")
    return "\n".join(lines)


# --- doing it ----------------------------------------------------------------------------------------


def ova_of_part(plan: RestorePlan, part: int, name: str) -> bytes:
    """The ova.xml of that part's import: one VM of that name, halted, no template, nothing that acts by
    itself, with its disks. Part 0 is the VM itself; a further part is a VM that only carries disks."""
    record = dict(IMPORT_DEFAULTS["VM"], **plan.source.record)
    is_to_stay = not part and not plan.is_drill
    original = plan.source.original or record
    record.update({field: original[field] for field in ORIGINAL_FIELDS if field in original})
    record["other_config"] = own_other_config(record)
    record.update(name_label=name, power_state="Halted", suspend_VDI=NULL_REF, is_a_template=False,
                  is_a_snapshot=False, snapshot_of=NULL_REF, snapshots=[], snapshot_info={}, parent=NULL_REF,
                  VIFs=[], ha_always_run=False, blocked_operations={}, current_operations={},
                  allowed_operations=[], resident_on=NULL_REF, uuid=plan.uuid or record["uuid"] or new_uuid(),
                  children=[])
    if plan.new_mac_seed or not is_to_stay:
        record["other_config"].pop("mac_seed", None)
        if plan.uuid:
            record["other_config"]["mac_seed"] = new_uuid()
    if not is_to_stay:
        record.update(tags=[], ha_restart_priority="")
        record["other_config"].pop("auto_poweron", None)
    if part:
        record["guest_metrics"] = NULL_REF
    sizes = {planned.disk.id: planned.disk.virtual_size for planned in plan.disks
             if planned.disk.id in plan.parts[part][1]}
    return rewritten_ova(plan.source.ova, plan.source.vm_id, record, sizes, not part)


NEW_HVM_FIELDS = {        # what VM.create must be told, and cfg files do not tell
    "user_version": "1", "is_a_template": False, "affinity": NULL_REF, "memory_static_min": "16777216",
    "VCPUs_params": {}, "actions_after_shutdown": "destroy", "actions_after_reboot": "restart",
    "actions_after_crash": "restart", "PV_bootloader": "", "PV_kernel": "", "PV_ramdisk": "", "PV_args": "",
    "PV_bootloader_args": "", "PV_legacy_args": "", "HVM_boot_policy": "BIOS order",
    "HVM_boot_params": {"order": "cdn"}, "PCI_bus": "", "recommendations": "",
    "platform": {"acpi": "1", "apic": "true", "pae": "true", "nx": "true", "viridian": "true",
                 "device-model": "qemu-upstream-compat", "videoram": "8"}}


class ImportedVm(NamedTuple):
    """A VM that was imported and proven, or, with force=yes, what is there of it, and what the `problem` with
    the copy is. `vdis`: the ref of each disk by its id in ova.xml."""
    entry: OpenEntry
    ref: str
    vdis: Dict[str, str]
    problem: str


class ImportWatch(Watch):
    """The watch over an import; whoever opened its entry cancels its tasks and removes what was made."""

    def _give_up(self, waiting_for: str) -> None:
        raise StreamStalled(f"{self._doing} stalled: no sign of life for {format_duration(self._stall_s)} "
                            f"while waiting for the {waiting_for}. It was given up. Are pool and share still "
                            "reachable? A larger stall_timeout waits longer.")


class Importer:
    """Makes VMs of copies, journal first; everything is taken back unless the entry is closed."""

    def __init__(self, services: Services, xe: XeProgram, snapshots: Snapshots) -> None:
        self._services = services
        self._xe = xe
        self._snapshots = snapshots

    @contextlib.contextmanager
    def imported(self, plan: RestorePlan, sink: Any = None) -> Iterator[ImportedVm]:
        """The VM of the plan with its own disks only, proven, under a provisional name; removed on every way
        out unless its entry was closed. `sink` is shown the disks' contents as they go in."""
        token, source = random_hex(8), plan.source
        name = DRILL_VM_NAME % (source.vm_name, token) if plan.is_drill else NEW_VM_NAME % (plan.name, token)
        names = [name] + [PART_NAME % (name, part + 1) for part in range(1, len(plan.parts))]
        make = self._create if source.has_only_cfg_files else self._import
        with self._snapshots.begun(source.vm_uuid or "?", source.vm_name, token=token, names=names, tasks=[],
                                   kind="drill" if plan.is_drill else "restore") as entry:
            yield self._take_stock(entry, plan, make(entry, plan, sink))

    def _import(self, entry: OpenEntry, plan: RestorePlan, sink: Any) -> str:
        """The data are in the pool; "" or, with force=yes, what is wrong. Raises what went wrong first."""
        doing, source, pool = f"the import of {entry.title}", plan.source, self._services.pool
        ovas = [ova_of_part(plan, part, name) for part, name in enumerate(entry.facts["names"])]
        tasks, commands, ids = [], [], [part_ids for _, part_ids in plan.parts]
        for name, (sr, _) in zip(entry.facts["names"], plan.parts):
            tasks.append(pool.call(f"making the task of {doing}", "task.create", name, f"VmBackup {VERSION}"))
            entry.note(tasks=list(tasks))
            commands.append(["vm-import", "filename=/dev/stdin", f"sr-uuid={sr.uuid}",
                             f"task-uuid={pool.ask(doing, 'task.get_uuid', tasks[-1])}"]
                            + (["force=true"] if plan.given.get("force") else []))
        commands[0] += ["preserve=true"] if plan.uuid else []

        def new_feed(imports: Imports) -> Any:
            if not is_archive(source.copy):
                return DiskFeed(imports, source.disks[0].virtual_size, ovas[0], source.disks[0].id)
            is_whole = source.manifest and len(ovas) == 1 and set(exported_disks(source.ova)) == set(ids[0])
            return Consumer("import", feed_archive, imports, ovas=ovas, parts=ids,
                            strict=bool(source.manifest), is_whole=bool(is_whole))
        return self._stream(doing, plan, commands, tasks, new_feed, sink)

    def _create(self, entry: OpenEntry, plan: RestorePlan, sink: Any) -> str:
        """As _import, for a copy with cfg files only: made by API, marks in the calls, its disk filled."""
        doing, source, pool = f"the rebuilding of {entry.title}", plan.source, self._services.pool
        disk, key, record = source.disks[0], KEY_PREFIX + entry.facts["token"], source.record
        vdi = ova_objects(source.ova, "VDI")[disk.id]
        vbd = next(one for one in ova_objects(source.ova, "VBD").values() if one["VDI"] == disk.id)
        memory = record["memory_dynamic_max"]
        machine = pool.call(doing, "VM.create", dict(
            NEW_HVM_FIELDS, name_label=entry.facts["names"][0],
            name_description=record.get("name_description", ""), memory_static_max=memory,
            memory_dynamic_max=memory, memory_dynamic_min=memory, VCPUs_max=record["VCPUs_max"],
            VCPUs_at_startup=record["VCPUs_at_startup"], other_config={key: ""}))
        entry.note(uuids=[pool.ask(doing, "VM.get_uuid", machine)])
        new_disk = pool.call(doing, "VDI.create", {
            "SR": plan.disks[0].sr.ref, "virtual_size": str(disk.virtual_size), "type": vdi["type"],
            "sharable": False, "read_only": False, "other_config": {key: ""}, "name_label": vdi["name_label"],
            "name_description": vdi["name_description"]})
        uuid = pool.ask(doing, "VDI.get_uuid", new_disk)
        entry.note(disks=[uuid])
        pool.call(doing, "VBD.create", fields_like("VBD", dict(vbd, VDI=new_disk), VM=machine))
        size = int(pool.ask(doing, "VDI.get_virtual_size", new_disk))
        command = ["vdi-import", f"uuid={uuid}", "filename=/dev/stdin", "format=raw"]
        problem = self._stream(doing, plan, [command], (), lambda imports: DiskFeed(imports, size), sink)
        pool.ask(doing, "VDI.remove_from_other_config", new_disk, key)
        return problem

    def _stream(self, doing: str, plan: RestorePlan, commands: Sequence[Sequence[str]], tasks: Sequence[str],
                new_feed: Callable[["Imports"], Any], sink: Any) -> str:
        """The image went into those xe commands, was what it should be, and they ended well. One pass:
        digests, structure, blocks, import. Returns and raises as _import does: what is wrong with the copy
        goes before what xe said of it, and what xe said before what followed from that."""
        source, force, problem = plan.source, plan.given.get("force"), ""
        advice = VERIFY_ADVICE if force is False else ""     # a drill takes no such words
        size_bytes = source.size_bytes
        watch = ImportWatch(self._services, doing, size_bytes, find_tasks=lambda: tasks)
        try:
            with Imports(self._xe, commands) as imports:
                feed = new_feed(imports)
                sinks, more = ([], [feed]) if is_archive(source.copy) else ([feed], [])
                problems: Optional[List[VerificationError]] = [] if force else None
                try:
                    stream_image(source, watch, sinks + ([sink] if sink else []), more, problems, advice)
                except VerificationError:
                    imports.problems()                   # they end by themselves, as their input is over
                    raise
                except BrokenPipeError:
                    reasons = imports.problems() or ["xe closed its input and said nothing"]
                    raise import_failure(doing, reasons[0], advice)
                if problems:
                    problem = f"{doing}: the copy is damaged: {str(problems[0]).rstrip('.')}."
                if not imports.programs:
                    raise BackupError(f"{doing}: nothing of it can be brought back. {problem} {NEXT_COPY}")
                began_s = self._services.clock.monotonic()
                for part, program in imports.programs.items():
                    while program.wait(TICK_S) is None:
                        watch(Progress(size_bytes, self._services.clock.monotonic() - began_s, "server"))
                    said = xe_problem(program.wait(0), program.said)
                    ask = self._services.pool.ask_if_there     # an xe that lost its connection proves nothing
                    if said and not (tasks and ask(doing, "task.get_status", tasks[part]) == "success"):
                        raise import_failure(doing, said, advice, was_proven=bool(source.manifest))
        except (VerificationError, ProgramError) as error:
            if not force:
                raise
            problem = problem or str(error)
        return problem

    def _take_stock(self, entry: OpenEntry, plan: RestorePlan, problem: str) -> ImportedVm:
        """What was imported is journalled, whole, and the disks of further parts hang on the VM itself."""
        doing, ask = f"reading what was imported of {entry.title}", self._services.pool.ask
        found, missing = [], []                # type: List[Tuple[str, str, List[Any]]], List[str]
        vdis = {}                              # type: Dict[str, str]
        for name, (_, ids) in zip(entry.facts["names"], plan.parts):
            refs = ask(doing, "VM.get_by_name_label", name)
            if len(refs) != 1:                 # of a damaged copy the last may be lost
                missing.append(name)
                continue
            drives = ask(doing, "VBD.get_all_records_where", f'field "VM" = "{refs[0]}"')
            vbds = [vbd for vbd in drives.values() if vbd["type"] != "CD"]
            found.append((refs[0], ask(doing, "VM.get_uuid", refs[0]), vbds))
            places = {vbd["userdevice"]: vbd["VDI"] for vbd in vbds}
            vdis.update({disk.id: places[disk.userdevice] for disk in plan.source.disks
                         if disk.id in ids and disk.userdevice in places})
        if problem and not found:
            raise BackupError(f"{entry.title}: nothing of it can be brought back. {problem} {NEXT_COPY}")
        if missing and not problem:
            raise BackupError(f"{entry.title}: xe reported no failure, but there is no VM named "
                              f"{missing[0]}. {MASTER_LOG}")
        records = {vbd["VDI"]: ask(doing, "VDI.get_record", vbd["VDI"])
                   for _, _, vbds in found for vbd in vbds if vbd["VDI"] != NULL_REF}
        entry.note(uuids=[uuid for _, uuid, _ in found],
                   disks=sorted(record["uuid"] for record in records.values()))
        lost = []
        for planned in plan.disks:
            record = records.get(vdis.get(planned.disk.id, ""))
            if record is None and missing:
                lost.append(planned.disk.title)
            elif record is None:
                raise ProgramError(f"{entry.title}: the pool made no disk {planned.disk.title}. {MASTER_LOG}")
            elif int(record["virtual_size"]) < planned.disk.virtual_size or record["SR"] != planned.sr.ref:
                raise ProgramError(f"{entry.title}: the pool made disk {planned.disk.title} with "
                                   f"{record['virtual_size']} bytes, or not on SR {planned.sr.title}. "
                                   + MASTER_LOG)
        if lost:
            problem += f" Of its disks nothing is there of: {', '.join(lost)}."
        if problem:
            self._services.log.warning(f"{entry.title}: {problem} It is kept, as force=yes asks for.")
        main = found[0][0]
        doing = f"putting together the disks of {entry.title}"
        for helper, _, vbds in found[1:]:
            for vbd in vbds:
                self._create_once(doing, "VBD", fields_like("VBD", vbd, VM=main))
            destroy(self._services, "VM", helper, doing)       # which leaves its disks
        return ImportedVm(entry, main, vdis, problem)

    # --- from an imported VM to the person's own -------------------------------------------------------

    def finish(self, plan: RestorePlan, imported: ImportedVm) -> None:
        """VIFs and existing disks; then it is on record that the VM is the person's, and only then it gets
        its name: dying in between leaves a whole VM with a provisional name, never a deleted one."""
        entry, ref, doing = imported.entry, imported.ref, f"finishing {imported.entry.title}"
        for interface in plan.interfaces:
            self._make_interface(interface, imported, doing)
        for existing in plan.existing:
            if existing.vdi_ref:
                self._attach(existing, plan.source, imported, doing)
        self._services.signals.check()
        with self._services.signals.shielded():
            entry.remember(restored=True)      # in a full store the new name alone says that it is theirs
            ask, blocked = self._services.pool.ask, plan.source.original.get("blocked_operations")
            try:
                ask(doing, "VM.remove_from_other_config", ref, "import_task")
                ask(doing, "VM.remove_from_other_config", ref, KEY_PREFIX + entry.facts["token"])
                if blocked:
                    ask(doing, "VM.set_blocked_operations", ref, blocked)
                ask(doing, "VM.set_name_label", ref, plan.name + (" (DAMAGED)" if imported.problem else ""))
            except BackupError as error:
                raise BackupError(f"{entry.title}: {unnamed_text(entry)} ({error})")

    def _attach(self, existing: ExistingDisk, source: Source, imported: ImportedVm, doing: str) -> None:
        """That disk hangs on the VM too, unless somebody else has it by now: an import takes hours."""
        record = self._services.pool.ask(doing, "VDI.get_record", existing.vdi_ref)
        strangers = strangers_on(self._services.pool, record, (imported.ref,), doing)
        if strangers:
            holder = self._services.pool.ask(doing, "VM.get_name_label", strangers[0])
            self._snapshots.tell(imported.entry, f"its disk {existing.disk.title} hangs on another VM by "
                                 f"now, {quote_name(holder)}, so it was not attached. Detach it there, "
                                 "then attach it here by hand.")
            return
        # An archive's own drives are those of its disks; one that it lacks is attached as a plain data disk.
        vbds = [] if is_archive(source.copy) else ova_objects(source.ova, "VBD").values()
        vbd = next((vbd for vbd in vbds if vbd.get("VDI") == existing.disk.id),
                   dict(IMPORT_DEFAULTS["VBD"], userdevice=existing.disk.userdevice))
        fields = fields_like("VBD", dict(vbd, VDI=existing.vdi_ref), VM=imported.ref)
        fields["other_config"].pop("owner", None)
        self._create_once(doing, "VBD", fields)

    def _create_once(self, doing: str, class_name: str, fields: Dict[str, Any]) -> None:
        """The VM has that VIF or VBD. A call without an answer is repeated only if nothing stands in its
        place: an import of hours must not be given up for it."""
        pool, place = self._services.pool, "device" if class_name == "VIF" else "userdevice"
        try:
            pool.call(doing, f"{class_name}.create", fields)
        except AnswerLost:
            there = pool.ask(doing, f"{class_name}.get_all_records_where", f'field "VM" = "{fields["VM"]}"')
            if not any(record[place] == fields[place] for record in there.values()):
                pool.call(doing, f"{class_name}.create", fields)

    def _make_interface(self, interface: PlannedInterface, imported: ImportedVm, doing: str) -> None:
        """The VM has that VIF. Where the pool has no licence for VIF locking it is made without, as the
        server's own import does (ocaml/xapi/import.ml@v26.17.0), and that is told."""
        fields = dict(interface.fields, VM=imported.ref)
        try:
            self._create_once(doing, "VIF", fields)
        except ApiFailure as failure:
            if failure.code != "LICENCE_RESTRICTION" or "locking_mode" not in fields:
                raise
            allowed = fields.get("ipv4_allowed", []) + fields.get("ipv6_allowed", [])
            mode = fields["locking_mode"]
            fields.update(ipv4_allowed=[], ipv6_allowed=[],
                          locking_mode="network_default" if mode == "locked" else mode)
            self._create_once(doing, "VIF", fields)
            self._snapshots.tell(
                imported.entry, f"its interface {fields['device']} was restricted (locking_mode {mode}, "
                f"addresses allowed: {', '.join(allowed) or 'none'}), for which this pool has no licence: it "
                "was made WITHOUT that restriction. Think of that before the VM is started.")


class Imports:
    """The xe programs of a restore, one for each part: each is started when its first byte is there, and has
    had its last when the next one is. None outlives the block."""

    def __init__(self, xe: XeProgram, commands: Sequence[Sequence[str]]) -> None:
        self._xe, self._commands = xe, commands
        self._lock, self._is_over = threading.Lock(), False
        self._stack = contextlib.ExitStack()
        self._part, self._fd = -1, None    # type: int, Optional[int]    # what is fed
        self.programs = {}                 # type: Dict[int, Program]

    def write(self, part: int, view: Any) -> None:
        """The bytes are with that import; BrokenPipeError if it has ended. Called in the thread of the
        consumer that feeds. What comes for a part behind its end is of none."""
        if part not in self.programs:
            self.close()
            with self._lock:
                if self._is_over:
                    raise BrokenPipeError(errno.EPIPE, "the restore was given up")
                program = self.programs[part] = self._stack.enter_context(
                    self._xe.start(*self._commands[part], stdin=subprocess.PIPE))
            self._part, self._fd = part, os.dup(program.stdin_fd)
            program.close_stdin()
            widen_pipe(self._fd)
        if part != self._part or self._fd is None:
            raise UnknownFormat("the archive's disks are mingled, and the server reads one after the other: "
                                "`extract` each disk")
        write_all(self._fd, memoryview(view))

    def close(self) -> None:
        """No more is coming for the one that is fed."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def problems(self) -> List[str]:
        """Why those that ended can't have done their work; each has had time for it, as its input is over."""
        ended = [(program.wait(XE_REASON_S), program.said) for program in list(self.programs.values())]
        return list(filter(None, (xe_problem(status, said) for status, said in ended if status is not None)))

    def __enter__(self) -> "Imports":
        return self

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._is_over = True
        self._stack.close()


def feed_archive(reader: Reader, imports: Imports, ovas: Sequence[bytes], parts: Sequence[Sequence[str]],
                 strict: bool, is_whole: bool = False) -> None:
    """An archive is with its parts' imports: each got an ova.xml of its own and the members of its disks, as
    the server writes them. `is_whole`: of one part, and all its disks are wanted: behind ova.xml, all passes
    as it comes. What may stand behind the end is the check's to judge."""
    part_of = {disk: number for number, part in enumerate(parts) for disk in part}
    archive = Archive(reader, strict)
    archive.ova()
    imports.write(0, tar_member("ova.xml", ovas[0]))
    if is_whole:
        for piece in reader:
            imports.write(0, piece)
        return
    part, last_disk = 0, ""
    member = archive.next_member("the header of a block")
    while member is not None:
        disk = member.name.partition("/")[0]
        wanted = part_of.get(disk)              # a disk of no part (a snapshot's) goes nowhere
        if wanted is not None and wanted != part:
            imports.write(part, XVA_END)
            part = wanted
            imports.write(part, tar_member("ova.xml", ovas[part]))
        elif wanted is not None and disk < last_disk:
            raise UnknownFormat(f"the archive holds disk {last_disk} before {disk}, and the server reads "
                                "them in the order of these names: `extract` each disk")
        if wanted is not None:
            last_disk = disk
            imports.write(part, tar_header(member.name, member.size))
        for piece in reader.pieces(-(-member.size // SECTOR_BYTES) * SECTOR_BYTES, member.name):
            if wanted is not None:
                imports.write(part, piece)
        member = archive.next_member("the header of a block")
    imports.write(part, XVA_END)


class DiskFeed(MebibyteSink):
    """The sink of an image's check that gives its one disk to an import. With `ova` as an archive: a block
    for each MiB, without MiBs of zeros but for the first and the last (stream_vdi.ml@v26.17.0). Without it
    raw and whole, for `xe vdi-import format=raw`."""

    def __init__(self, imports: Imports, virtual_size: int, ova: bytes = b"", disk_id: str = "") -> None:
        super().__init__(self._give)
        self._imports, self._size, self._ova, self._id = imports, virtual_size, ova, disk_id
        self._last = max(0, -(-virtual_size // MEBIBYTE) - 1)
        self._next = 0
        self.close = imports.close

    def _give(self, _: str, number: int, content: memoryview) -> None:
        """All up to that MiB is with the import."""
        if number > self._last:
            raise VerificationError(f"the image has data behind the end of the disk, in its MiB {number}")
        if self._ova and not self._next:
            self._imports.write(0, tar_member("ova.xml", self._ova))
        for empty in range(self._next, min(number, 1) if self._ova else number):
            self._write(empty, memoryview(ZERO_MEBIBYTE))
        self._write(number, content)

    def _write(self, number: int, content: memoryview) -> None:
        content = content[:self._size - number * MEBIBYTE]
        for piece in archive_block(self._id, number, content) if self._ova else (content,):
            self._imports.write(0, piece)
        self._next = number + 1

    def end(self, is_whole: bool) -> None:
        """The disk is complete, a damaged one with zeros behind what came, if anything did."""
        self._flush()
        if not (is_whole or self._next):
            return
        if self._next <= self._last:
            self._give(self._id, self._last, memoryview(ZERO_MEBIBYTE))
        if self._ova:
            self._imports.write(0, XVA_END)
        self._imports.close()


def stream_image(source: Source, on_tick: Callable[[Progress], Any], sinks: Sequence[MebibyteSink] = (),
                 more: Sequence[Consumer] = (), problems: Optional[List[VerificationError]] = None,
                 advice: str = "") -> Check:
    """The whole image passed through its check (whose sinks are shown the disks' contents) and through
    `more`, and its digests are those on record; the check. VerificationError, which ends in `advice`, if not;
    where `problems` is given that is noted there, and as much passes as can be read."""
    # Of what only passes on, the digest of bytes that were proven once says all that their structure could
    # say again, at half the cost.
    check_it = sinks or not (more and source.manifest)
    check = image_check(source.inside, source.copy, source.manifest, sinks, check_it and problems is None,
                        problems is None)
    try:
        read_image(source.inside, source.copy, source.manifest, ([check] if check_it else []) + list(more),
                   on_tick, f"reading {source.title}", problems)
    except VerificationError as error:
        raise type(error)(f"{source.title}: the copy {error.verdict}: {str(error).rstrip('.')}."
                          + (f" {advice}" if advice else ""))
    return check


VERIFY_ADVICE = ("Nothing of it stays in the pool. `verify` judges all copies; from=STAMP takes an older "
                 "one, force=yes keeps what this one gives.")
CHECKSUM_WORDS = "checksum failed"     # of a block of the archive (ocaml/xapi/stream_vdi.ml@v26.17.0)


def import_failure(doing: str, problem: str, advice: str, was_proven: bool = False) -> BackupError:
    """What an xe that ended badly means: the copy is damaged, with that advice, or something else went wrong.
    `was_proven`: what went in matched its digests, so that what is wrong now is not the copy."""
    problem = problem.rstrip(".")
    if CHECKSUM_WORDS in problem and not was_proven:
        return VerificationError(f"{doing}: the copy is damaged: {problem}. {advice}".rstrip())
    return ProgramError(f"{doing} failed: {problem}. {MASTER_LOG}")


# --- a restore from end to end ---------------------------------------------------------------------


def journal_catalog(services: Services, shown: str, catalog: Optional[Catalog]) -> Catalog:
    """The directory whose .vmbackup holds the journal: that of the store, or, for a copy that was named by
    its path, backup_dir, or where that copy lies (it is shown as `shown`)."""
    if catalog is not None:
        candidates = [catalog.path]
    else:
        candidates = [services.settings.backup_dir, shown]
        if parse_copy_name(os.path.basename(shown.rstrip("/"))):
            candidates.insert(1, fs_text(os.path.dirname(os.path.dirname(os.path.abspath(fs_path(shown))))))
    for path in candidates:
        with contextlib.suppress(CatalogError):
            found = Catalog(path)
            if found.is_writable():
                return found
    raise UsageError(f"none of {', '.join(candidates)} can be written to, and what is made in the pool has "
                     "to be noted there: name a directory for it with backup_dir=. Nothing was started.")


def restore(run: Run, services: Services, inventory: Inventory, plan: RestorePlan,
            catalog: Optional[Catalog]) -> None:
    """The plan was carried out. Raises what went wrong, when nothing of it is left."""
    log, name, size = services.log, quote_name(plan.source.vm_name), format_size(plan.source.size_bytes)
    began_s = services.clock.monotonic()
    if plan.given["verify_first"]:
        title = f"verifying {plan.source.title}"
        log.info(title)
        stream_image(plan.source, shown_progress(services, title, plan.source.copy.size_bytes),
                     advice=OTHER_COPY)
    catalog = journal_catalog(services, plan.source.inside.shown, catalog)
    run.begin(services._replace(catalog=catalog), inventory)
    for problem in run.sweep():
        log.info(f"{problem} It is left.")
    importer = Importer(run.services, make_xe(services), run.snapshots)
    log.info(f"{name}: importing {size}.")
    with importer.imported(plan) as imported:
        importer.finish(plan, imported)
    services.signals.come_too_late()                    # the VM is there
    took = format_duration(services.clock.monotonic() - began_s)
    log.info(f"{name}: the import {'is over' if imported.problem else 'is proven'}: {size} in {took}.")
    if imported.problem:                                # told by then
        run.findings.append(Finding(Severity.WARNING, name, imported.problem))
    if plan.given["start"] and not imported.problem:
        try:
            services.pool.call(f"starting {quote_name(plan.name)}", "VM.start", imported.ref, False, False)
        except BackupError as error:
            log.error(f"{error} The VM itself is whole; start it when that is settled.")
            run.findings.append(Finding(Severity.ERROR, name, str(error)))
    run.look_again()
    log.show(restored_text(plan, imported, *read_restored(services.pool, plan, imported)))


def read_restored(pool: Pool, plan: RestorePlan,
                  imported: ImportedVm) -> Tuple[VirtualMachine, List[Interface]]:
    """The VM and its interfaces as they are now, all read since the server was last lost. BackupError if the
    VM has no more what was made of it: a server that restarts can have lost its last seconds."""
    times_shaken = -1
    while pool.times_shaken != times_shaken:
        times_shaken = pool.times_shaken
        machine = pool.machine(imported.ref, f"reading {quote_name(plan.name)}")
        interfaces = pool.interfaces(machine)
    disks, devices = {disk.vdi_ref for disk in machine.disks}, {vif.device for vif in interfaces}
    lost = [f"disk {planned.disk.title}" for planned in plan.disks
            if planned.disk.id in imported.vdis and imported.vdis[planned.disk.id] not in disks]
    lost += [f"interface {planned.fields['device']}" for planned in plan.interfaces
             if planned.fields["device"] not in devices]
    if lost and pool.times_shaken:
        raise BackupError(f"{imported.entry.title}: its server restarted, and with its last seconds the pool "
                          f"has lost {', '.join(lost)} of the restored VM {quote_name(machine.name)}. Remove "
                          f"it with `xe vm-uninstall uuid={machine.uuid}`, and restore again.")
    if machine.name in imported.entry.facts["names"]:
        raise BackupError(f"{imported.entry.title}: {unnamed_text(imported.entry)}")
    return machine, interfaces


def restored_text(plan: RestorePlan, imported: ImportedVm, machine: VirtualMachine,
                  interfaces: Sequence[Interface]) -> str:
    """What is there now, in lines for people."""
    lines = [f"{quote_name(plan.source.vm_name)} is back as VM {quote_name(machine.name)}, uuid "
             f"{machine.uuid}, {machine.power_state.lower()}."]
    if imported.problem:
        lines.append(f"  IT IS DAMAGED: {imported.problem}")
    srs = {planned.sr.uuid: planned.sr.name for planned in plan.disks}
    lines += [f"  disk {disk.device} {quote_name(disk.name)}, {format_size(disk.virtual_size)}, uuid "
              f"{disk.vdi_uuid}, on SR "
              f"{quote_name(srs.get(disk.sr_uuid, disk.sr_uuid))}" for disk in machine.disks]
    uuids = {NEW_UUID: machine.uuid}
    for vif in interfaces:
        uuids[VIF_UUID + vif.device] = vif.uuid
        lines.append(f"  interface {vif.device} on network {quote_name(vif.network_name)}, MAC {vif.mac}")
    lines += [f"  not in this copy, and not attached: disk {item.disk.title}: {item.reason}"
              for item in plan.existing if not item.vdi_ref]
    gaps = f"{NEW_UUID}|{VIF_UUID}[0-9]+"
    lines += ["  note: " + re.sub(gaps, lambda gap: uuids.get(gap.group(), gap.group()), note)
              for note in plan.notes]
    if machine.power_state == "Halted" and not imported.problem:
        start = f"xe vm-start uuid={machine.uuid}"
        blocked = plan.source.original.get("blocked_operations", {})
        if "start" in blocked:
            lines.append("  Its start is blocked, as that of the VM was when it was backed up "
                         f"({one_line(blocked['start']) or 'no reason given'}). To start it: xe "
                         f"vm-param-remove uuid={machine.uuid} param-name=blocked-operations "
                         f"param-key=start; then: {start}")
        elif not plan.given["start"]:
            lines.append(f"  To start it: {start}")
    return "\n".join(lines)


# =============================================================================
# 23. Extract and drill
# =============================================================================
# One disk of a copy as a sparse raw image, on any machine: no pool, no xe, no
# XenAPI. The whole image is proven while it is read; the file gets its name last.
#
# A drill proves that a copy comes back: it is imported under a name of its own with
# no network, its disks are read back and compared with what the image held when its
# digests matched, it is booted if asked, and everything is removed again.


def wanted_disk(source: Source, word: str) -> SourceDisk:
    """The disk that `disk=` means: a device, a userdevice, a uuid or a name; the only one if it is empty."""
    def meant(disks: Sequence[SourceDisk]) -> List[SourceDisk]:
        return [disk for disk in disks if word in (disk.device, disk.userdevice, disk.vdi_uuid)] or \
            [disk for disk in disks if word == disk.name]

    found = meant(source.disks) if word else [disk for disk in source.disks if not disk.is_memory]
    if len(found) == 1:
        return found[0]
    lacking = [disk.absence() for disk in meant(source.lacking)]
    problem = lacking[0] if lacking else f"it holds no disk {one_line(word)}" \
        if word and not found else "say which disk with disk="
    held = ", ".join(disk.title for disk in source.disks) or "no disk"
    also = "; the VM had also " + ", ".join(disk.title for disk in source.lacking) if source.lacking else ""
    raise UsageError(f"{source.title}: {problem}. This copy holds {held}{also}.")


def extract_disk(services: Services, source: Source, disk: SourceDisk, path: str) -> str:
    """The disk is a sparse raw image at that path; what to tell of it. Nothing stands there otherwise.
    CatalogError if the disk surely has no room there; a warning if it may have none."""
    title = f"extracting disk {disk.device} of {source.title}"
    services.log.info(title)
    with NewFile(path) as file:
        free = free_space(file.fd, file.shown)
        # The first and the last MiB are stored though they be zeros.
        least = least_bytes(source, [disk]) - 2 * MEBIBYTE
        if free is not None and free < least:
            raise CatalogError(f"{file.shown}: the data of disk {disk.title} take at least "
                               f"{format_size(least)}, and only {format_size(free)} are free there. Name a "
                               "path with more room, on the share perhaps.")
        if free is not None and free < disk.virtual_size:
            services.log.warning(f"{file.shown}: {format_size(free)} are free there, less than the disk's "
                                 f"full size of {format_size(disk.virtual_size)}; its zeros take no room.")
        sink = MebibyteSink(functools.partial(write_in_place, file),
                            disk.id if is_archive(source.copy) else "image")
        check = stream_image(source, shown_progress(services, title, source.size_bytes), [sink],
                             advice="No file was left; " + NEXT_COPY)
        size = disk.virtual_size or check.report.disks[0].virtual_size
        file.complete(size)
    proven = "its digests match" if source.manifest else source.digests_text + (
        "; every block matches the archive's own" if check.report.digest_kind and check.report.digests_checked
        else "; the structure is whole")
    return (f"{path}: disk {disk.title} of {quote_name(source.vm_name)} ({source.copy.name}), "
            f"{format_size(size)}, of which {format_size(sink.taken_bytes)} are not zeros; {proven}.")


def extract_metadata(source: Source, path: str) -> str:
    """The VM's ova.xml is in the file, or what is told is it, where there is no path; what to tell of it."""
    inside = source.inside
    text = inside.read(VM_METADATA) if inside.status(VM_METADATA) is not None else ova_text(source.ova)
    if not path:
        return text.decode("utf-8", "replace")
    with NewFile(path) as file, storage_errors(f"writing {path}", is_elsewhere=True):
        write_all(file.fd, text)
        file.complete()
    return f"{path}: the metadata of {quote_name(source.vm_name)} ({source.copy.name})."


# --- drill ---------------------------------------------------------------------------------

# A VHD from there leaves out what is empty.
VHD_SR_TYPES = ("ext", "nfs", "smb", "lvm", "lvmoiscsi", "lvmohba", "lvmofcoe")
BOOT_POLL_S = 2
NEWEST_OF_EACH = "newest-of-each"
NOT_TRIED = "COULD NOT BE TRIED"


def compare_disk(services: Services, exporter: Exporter, imported: ImportedVm, planned: PlannedDisk,
                 held: Sequence[int]) -> None:
    """ProgramError unless the disk in the pool holds what the proven image held, by digests of its MiBs."""
    doing = f"reading back disk {planned.disk.device} of {imported.entry.title}"
    record = services.pool.ask(doing, "VDI.get_record", imported.vdis[planned.disk.id])
    size = int(record["virtual_size"])
    is_sparse = planned.sr.type in VHD_SR_TYPES and size <= VHD_LARGEST_BYTES
    found: Dict[str, array] = {}
    sink = MebibyteSink(functools.partial(note_digest, found))
    services.log.info(f"{doing}, {format_size(size)}.")
    try:
        exporter.disk_contents(doing, record["uuid"], size, "vhd" if is_sparse else "raw", sink)
    except VerificationError as error:
        raise ProgramError(str(error))
    # What one of them does not reach to is zeros.
    pairs = itertools.zip_longest(held, found.get("image", ()), fillvalue=0)
    difference = next((number for number, (one, other) in enumerate(pairs) if one != other), None)
    if difference is not None:
        raise ProgramError(f"{imported.entry.title}: disk {planned.disk.title} came back different: its MiB "
                           f"{difference} on SR {planned.sr.title} is not what the copy holds. The copy "
                           "itself matched its digests: look at the SR.")


def boot(services: Services, imported: ImportedVm, patience_s: float) -> str:
    """How the VM did; raises BackupError if it did not start or did not stay up."""
    doing, pool, clock = f"starting {imported.entry.title}", services.pool, services.clock
    metrics = guest_metrics(pool, imported.ref, doing)
    # the copy may bear what blocked the start of its VM: of this one nobody but us knows
    pool.ask(doing, "VM.remove_from_blocked_operations", imported.ref, "start")
    pool.call(doing, "VM.start", imported.ref, False, False)
    began_s = clock.monotonic()
    while True:
        state = pool.ask(doing, "VM.get_record", imported.ref)["power_state"]
        after_s = clock.monotonic() - began_s
        if state != "Running":
            raise BackupError(f"{imported.entry.title}: it started, and was {state.lower()} after "
                              f"{format_duration(after_s)}. Restore it (to=NAME) and look at its console.")
        if guest_metrics(pool, imported.ref, doing) not in ("", metrics):
            return f"the guest's tools answered after {format_duration(after_s)}"
        if after_s >= patience_s:
            return f"running after {format_duration(after_s)}, no guest tools seen"
        services.signals.sleep(BOOT_POLL_S)


def guest_metrics(pool: Pool, ref: str, doing: str) -> str:
    """What changes when the guest's tools report; "" if they never did."""
    metrics = pool.ask(doing, "VM.get_guest_metrics", ref)
    record = metrics != NULL_REF and pool.ask_if_there(doing, "VM_guest_metrics.get_record", metrics)
    return f"{metrics} {record['last_updated']}" if record else ""


def drill_copies(services: Services, vm: str) -> Tuple[List[Copy], List[Finding]]:
    """The newest good copy of each VM that the drill is to try, and what was passed over for it. A VM that
    has none gives the newest of its others, whose drill fails. UsageError if the store has no such VM."""
    catalog, sample = services.catalog, services.arguments.parameters["sample"]
    if vm and vm != NEWEST_OF_EACH:
        return [choose_copy(catalog, vm, "latest", services.log)], []
    newest, findings = {}, []              # type: Dict[str, Copy], List[Finding]
    listing = chosen_vms(catalog, "", services.log)
    for stored in listing.vms:
        known = [copy for copy in stored.copies if not copy.is_newer]       # of a newer one nothing is known
        best = ([copy for copy in known if copy.is_good] or known or [None])[-1]
        passed = known[known.index(best) + 1 if best else 0:]
        findings += [Finding(Severity.WARNING, f"{copy.folder}/{copy.name}", f"passed over: {copy.trouble}.")
                     for copy in stored.copies if copy.is_newer or copy in passed]
        if best is None:
            continue
        rival = newest.get(stored.uuid or stored.folder)
        if rival is None or (rival.is_good, rival.taken_at) < (best.is_good, best.taken_at):
            newest[stored.uuid or stored.folder] = best
    findings += [Finding(Severity.ERROR, catalog.path, str(error)) for error in listing.misbehaved]
    copies = sorted(newest.values(), key=lambda copy: (copy.folder, copy.name))
    if sample:                             # those first that were never drilled, or longest ago
        drilled_at = catalog.last_drills()
        copies = sorted(copies, key=lambda copy: drilled_at.get(copy.folder, ""))[:sample]
    return copies, findings


def drill_plan(services: Services, view: PoolView, copy: Copy, inside: Directory) -> RestorePlan:
    """What a drill of that copy makes, or BackupError. Of the pool only its SRs are read anew."""
    if not copy.is_good:
        raise BackupError(f"it is no good copy ({copy.trouble}), and there is no good one of this VM: only "
                          "a new backup helps, or `restore` with force=yes gives what this one holds.")
    view = view._replace(srs=target_srs(services.pool, view.master))
    given = services.arguments.parameters
    plan = plan_restore(opened_source(services, copy, inside), view, given, is_drill=True)
    if plan.problems:
        raise BackupError(" ".join(plan.problems))
    return plan


def preview_drill(services: Services, inventory: Inventory, copies: Sequence[Copy]) -> List[Finding]:
    """Shown: what a drill would try. What can't be drilled is an error."""
    view, findings = read_pool_view(services.pool, inventory), []
    for copy in copies:
        try:
            with services.catalog.open_copy(copy) as inside:
                plan = drill_plan(services, view, copy, inside)
            places = [f"disk {item.disk.title} on SR {item.sr.title}" for item in plan.disks] or ["no disk"]
            text = "; ".join([", ".join(places)] + [
                disk.absence() for disk in plan.source.lacking if disk.left_out])
        except BackupError as error:
            text = f"can't be drilled: {error}"
            findings.append(Finding(Severity.ERROR, copy.folder, text))
        services.log.show(f"{copy.folder}/{copy.name}: {text}")
    return findings


def undrilled(copy: Copy) -> Outcome:
    """The outcome of a copy that the drill did not come to."""
    return Outcome("drill", copy.uuid, copy.vm_name, f"{copy.folder}/{copy.name}",
                   "not drilled, as the run ended before it was done.", UNTRIED, size_bytes=copy.size_bytes)


def drill_one(services: Services, view: PoolView, importer: Importer, exporter: Exporter,
              copy: Copy) -> Outcome:
    """What the drill of that copy found, also on record; a finding tells what of it is left in the pool."""
    began_s, title = services.clock.monotonic(), f"{copy.folder}/{copy.name}"
    cause = None                           # type: Optional[Exception]
    choose = functools.partial(choose_copy, services.catalog, f"uuid:{copy.uuid}", "latest", services.log)
    try:
        with held_copy(services, services.catalog, choose, copy) as (copy, inside):
            title = f"{copy.folder}/{copy.name}"
            services.log.info(f"{title}: drill of {format_size(copy.size_bytes)}.")
            plan = drill_plan(services, view, copy, inside)
            for disk in plan.source.lacking:
                if disk.left_out:
                    services.log.info(f"{title}: {disk.absence()}.")
            expected: Dict[str, array] = {}
            sink = MebibyteSink(functools.partial(note_digest, expected))
            said, boot_s = "restored and compared", services.arguments.parameters["boot"] * MINUTE_S
            with importer.imported(plan, sink) as imported:
                for planned in plan.disks:
                    held = expected.get(planned.disk.id if is_archive(plan.source.copy) else "image", ())
                    compare_disk(services, exporter, imported, planned, held)
                if boot_s:
                    said = f"restored, compared and booted: {boot(services, imported, boot_s)}"
            error = None
            services.log.info(f"{title}: {said}.")
    except BackupError as problem:
        # what the pool, an SR, the store or another run is to blame for says nothing about the copy
        is_the_copys = isinstance(problem, VerificationError) and not isinstance(problem, UnknownFormat)
        said, error = NOT_RESTORABLE if is_the_copys else NOT_TRIED, str(problem)
    except Exception as bug:               # one copy's, not the others'
        services.log.bug(bug, title + ": ")
        said, error, cause = NOT_TRIED, BUG_TEXT, bug
    try:
        if copy.mark and said != NOT_TRIED:
            # which blocks are bad, if any are, a drill does not tell
            facts = {"layer": None, "bad": None} if error and copy.layer else {}
            services.catalog.record(copy, drilled_at=format_utc(services.clock.utc()), drill=said,
                                    drill_reason=error or "", **facts)
    except BackupError as problem:
        services.log.info(f"the verdict is not recorded: {problem}")
    if said == NOT_RESTORABLE and NEXT_COPY not in error:
        error += f" {NEXT_COPY} The next backup of its VM, if it still is backed up, makes a new one."
    return undrilled(copy)._replace(error=error, status_word="DRILL-FAIL" if error else "SUCCESS", said=said,
                                    cause=cause, seconds=services.clock.monotonic() - began_s)


def drill_all(run: Run, copies: Sequence[Copy]) -> None:
    """Each of the copies was drilled, and has its outcome."""
    services = run.services
    run.outcomes = [undrilled(copy) for copy in copies]
    for problem in run.sweep():
        services.log.info(f"{problem} It is left.")
    xe = make_xe(services)
    importer, exporter = Importer(services, xe, run.snapshots), Exporter(services, xe)
    view = read_pool_view(services.pool, run.inventory)
    for number, copy in enumerate(copies):
        services.signals.check()
        run.status_log.begin("drill", copy.vm_name)
        if services.journal.is_mute:
            outcome = run.outcomes[number]._replace(status_word="DRILL-FAIL", error=(
                "it was not tried, as the backup storage hangs. Is the share still reachable?"))
        else:
            outcome = drill_one(services, view, importer, exporter, copy)
        run.settle(number, outcome)
        if ends_run(outcome):
            raise outcome.cause
    run.look_again()


# =============================================================================
# 24. Reports
# =============================================================================
# A Report becomes words: status log, last line, mail. And the way out of the mails, and what a preview shows.

STATUS_LOG_LIMIT_S = 20           # it often lies on the very share that hangs


class StatusLog:
    """The older program's status lines, appended; people parse them. No backup fails for it."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._path = services.settings.status_log
        self._fd = None                    # type: Optional[int]
        self._is_over = False              # it could not be opened or written, which was said once
        self.host = ""                     # whose lines they are

    def begin(self, what: str, name: str = "", host: str = "") -> None:
        """`what` has begun, for that VM or for the run, on that host if it is another."""
        self._line(what, "begin" + ("," + one_line(name) if name else ""), host)

    def end(self, outcome: Outcome, host: str = "") -> None:
        numbers = f",elapse:{outcome.seconds // MINUTE_S:.0f} size:{outcome.size_bytes // GIBIBYTE}G"
        self._line(outcome.what, f"end,{outcome.status_word} {one_line(outcome.name)}"
                                 f"{'' if outcome.error else numbers}", host)

    def end_run(self, report: Report) -> None:
        self._line("vmbackup.py", f"end,{report.word},S:{report.successes} W:{report.warnings} "
                                  f"E:{report.errors}")

    def _line(self, what: str, rest: str, host: str = "") -> None:
        stamp = self._services.clock.local().strftime("%Y/%m/%d %H:%M:%S")
        line = f"{stamp},{what},{host or self.host},{rest}\n".encode("utf-8", "surrogateescape")

        def write() -> None:
            with storage_errors(self._path):
                if self._fd is None:
                    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
                    self._fd = os.open(fs_path(self._path), flags, 0o644)
                write_all(self._fd, line)

        try:
            if not self._is_over:
                within(STATUS_LOG_LIMIT_S, "writing the status log", write)
        except CatalogError as error:
            self._services.log.info(f"no status log is written: {error}")
            self._is_over = True


def summary_text(report: Report) -> str:
    """The last line of a run: what was done, what not, and the exit status."""
    if report.wording is DRILL_WORDING:
        return (f"drill {report.word}: {report.successes} of {counted(len(report.outcomes), 'copy')} came "
                f"back{', stopped by a signal' if report.signal else ''}.")
    parts = [f"{counted(report.successes, 'VM')} backed up ({format_size(report.size_bytes)} in "
             f"{report.duration})"]
    if report.failed_names:
        parts.append(f"{len(report.failed_names)} not: {', '.join(report.failed_names)}")
    if report.dump_error:
        parts.append("the pool database was not dumped")
    if report.warnings:
        parts.append(counted(report.warnings, "warning"))
    return f"{report.word}: {'; '.join(parts)}; exit status {report.exit_status}."


# --- mail ---------------------------------------------------------------------------------

MAIL_FOLDER = "mail"
OUTBOX_LIMIT_S = 20
STORE_FACTS_LIMIT_S = 5 * MINUTE_S
MAIL_KEPT_MOST = 50                # of one config
MAIL_NAME_MOST = 40                # characters of a VM's name in a subject


class StoreFacts(NamedTuple):
    """What is told about the store as a run has ended. `problem`: why the copies are not known, or ""."""
    path: str
    now: datetime
    vms: Tuple[StoredVm, ...] = ()
    free_bytes: Optional[int] = None
    size_bytes: Optional[int] = None
    problem: str = ""


def mail_subject(report: Report) -> str:
    """What matters of the run, in one line."""
    wording, failed, error = report.wording, report.failed_names, report.ended_by
    if not report.pool and is_bug(error):
        return f"ERROR: a bug in VmBackup ended the run ({report.host})"
    if not report.pool:
        why = f"the run was {error}" if isinstance(error, Interrupted) else str(error)
        why = why.replace(report.source, os.path.basename(report.source)).split("\n")[0].partition(". ")[0]
        text = cut(f"nothing was {wording.deed}: {why.rstrip('.')}", 120)
        return f"ERROR: {text} ({report.host})"
    done = f"{counted(report.successes, wording.noun)} {wording.done}"
    whole = len(report.outcomes) + len(report.missing)
    if failed:
        text = f"{len(failed)} of {counted(whole, wording.noun)} {wording.undone}: {shortened(failed, 5)}"
    elif report.dump_error:
        text = "the pool database was not dumped"
    elif error is not None:
        text = f"the run ended early: {cut(one_line(reason_text(error)), 100)}"
    elif report.errors:
        text = f"{done}, but {counted(report.errors, 'error')}"
    elif report.warnings:
        text = f"{done}, {counted(report.warnings, 'warning')}"
    elif wording is DRILL_WORDING:
        text = done
    elif whole:
        text = f"{counted(report.successes, 'VM')}, {format_size(report.size_bytes)} in {report.duration}"
    else:
        text = f"pool database dumped in {report.duration}"
    word = "OK" if report.word == "SUCCESS" else report.word
    return f"{word}: {wording.prefix}{text} (pool {report.pool}, {report.host})"


def reason_text(error: BaseException) -> str:
    """What ended a run early, in a sentence."""
    return BUG_TEXT if is_bug(error) else str(error)


def shortened(names: Sequence[str], most: int) -> str:
    """The names, each cut if it is long, and only the first of them if there are many."""
    more = len(names) - most
    shown = ", ".join(cut(name, MAIL_NAME_MOST) for name in names[:most])
    return shown + (f" and {more} more" if more > 0 else "")


def mail_body(report: Report, store: StoreFacts) -> str:
    """The mail's text: what failed first, then warnings, the VMs, the newest copies and the free space."""
    if not report.pool:
        return early_end_body(report)
    warnings = [f"{finding.subject}: {finding.sentence}" for finding in report.findings
                if finding.severity is Severity.WARNING]
    errors = mail_errors(report, store)
    done = [mail_line(outcome) for outcome in report.outcomes if outcome.error is None]
    if report.wording is DRILL_WORDING:
        return mail_items(errors + done + warnings) + "\n"
    blocks = [f"VmBackup ran on host {report.host} of pool {report.pool} with {report.source}, from "
              f"{format_local(report.began_at)} to {format_local(report.ended_at)}."]
    if report.before:
        blocks.append(report.before)
    if errors:
        blocks.append(f"{'NOT BACKED UP' if report.failed_names else 'ERRORS'}\n{mail_items(errors)}"
                      "\nThe next run tries again. To run sooner, repeat the crontab line by hand. The log "
                        "of this run tells each step.")
    if warnings:
        blocks.append("WARNINGS\n" + mail_items(warnings))
    if report.dump_error == "":
        done.append("The pool database.")
    if done:
        blocks.append("BACKED UP (vm-export: the whole VM; vdi-export: its OS disk only)\n"
                      + mail_items(done))
    if store.vms:
        newest = [(stored, [copy for copy in stored.copies if copy.is_good][-1:]) for stored in store.vms]
        blocks.append(f"AGE OF THE NEWEST GOOD COPY OF EACH VM IN {store.path}\n" + mail_items([
            f"{stored.title}: {age_text(good[0].taken_at, store.now) if good else 'NO good copy'}"
            for stored, good in newest]))
    if store.problem:
        blocks.append(f"The copies in {store.path} are not listed here: {store.problem}")
    if store.free_bytes is not None:
        blocks.append(f"FREE SPACE\n{format_size(store.free_bytes)} in {store.path}.")
    return "\n\n".join(blocks) + "\n"


def mail_items(items: Sequence[str]) -> str:
    """A list. Each item keeps to its lines, whatever a name in it holds."""
    return "\n".join("* " + "\n  ".join(one_line(line) for line in item.split("\n")) for item in items)


def mail_errors(report: Report, store: StoreFacts) -> List[str]:
    """What was not done, why, and what is left of each VM, an item each."""
    def item(outcome: Outcome) -> str:
        return f"{outcome.title}: {' '.join(outcome.error.splitlines())}{left_text(outcome, report, store)}"

    errors = [item(outcome) for outcome in report.failed if outcome.status_word != UNTRIED]
    errors += [f"{finding.subject}: {finding.sentence}" for finding in report.findings
               if finding.severity is Severity.ERROR]
    if report.dump_error:
        errors.append(f"The pool database: {report.dump_error}")
    if report.ended_by is not None:
        errors.append(f"The run ended early: {reason_text(report.ended_by).rstrip('.')}.")
    return errors + [item(outcome) for outcome in report.failed if outcome.status_word == UNTRIED]


def left_text(outcome: Outcome, report: Report, store: StoreFacts) -> str:
    """What the store holds of a VM that was not backed up, in a line; a drill changes nothing there."""
    if report.wording is DRILL_WORDING:
        return ""
    if store.problem:
        return "\nWhat the store holds of it is not known from here."
    own = [copy for stored in store.vms
           if stored.uuid == outcome.uuid or not stored.uuid and stored.name == outcome.name
           for copy in stored.copies if copy.is_good]
    if not own:
        return "\nThe store holds NO good copy of it."
    return (f"\nThe store still holds {counted(len(own), 'good copy')} of it, the newest "
            f"{age_text(max(copy.taken_at for copy in own), store.now)} old.")


def mail_line(outcome: Outcome) -> str:
    """One VM that was backed up, or one copy that came back."""
    if outcome.what == "drill":
        return f"{outcome.title}: {outcome.said}"
    rate = f" ({outcome.size_bytes / 1e6 / outcome.seconds:.0f} MB/s)" if outcome.seconds >= 1 else ""
    kept = counted(outcome.kept, "good copy") if outcome.kept else "all earlier copies"
    return (f"{outcome.title}: {outcome.what}, {format_size(outcome.size_bytes)} in "
            f"{format_duration(outcome.seconds)}{rate}, {kept} kept"
            + (f"; {outcome.said}" if outcome.said else ""))


def age_text(at: datetime, now: datetime) -> str:
    """How long ago that was; a time yet to come counts as now."""
    return format_duration(max(0, (now - at).total_seconds()))


def format_local(at: datetime) -> str:
    """An aware time in local words for people."""
    return at.astimezone().strftime("%Y-%m-%d %H:%M")


def early_end_body(report: Report) -> str:
    """The mail's text about a run that ended before its first VM."""
    error, wording, ended_at = report.ended_by, report.wording, format_local(report.ended_at)
    started = f"VmBackup was started on host {report.host} with {report.source}, and"
    if is_bug(error):
        return (f"{started} a bug in it ({type(error).__name__}) ended the run at {ended_at}.\n\nThe log of "
                f"this run has the traceback, and tells which VMs were {wording.deed} before. What the run "
                "may have left in the pool or in the backup directory, the next run removes. If that one "
                f"ends in the same way, report the traceback to whoever maintains VmBackup.\n")
    item = f"The run was {error} before it began." if isinstance(error, Interrupted) else str(error)
    return (f"{started} ended at {ended_at} before the first VM.\n\n"
            f"NOTHING WAS {wording.deed.upper()}\n{mail_items([item])}\nNo VM and no earlier copy was "
            f"touched. The next run tries again. To run sooner, repeat the crontab line by hand.\n")


class Outbox:
    """The mails of one config that could not be sent, in the state folder, until a run of it sends them."""

    def __init__(self, catalog: Catalog, owner: str) -> None:
        self._catalog = catalog
        self._prefix = hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()[:12] + "-"

    def keep(self, message: bytes, now: datetime) -> None:
        """The message is there, on disk; of too many the oldest are gone."""
        def put(folder: Directory) -> None:
            for name in self._names(folder)[:1 - MAIL_KEPT_MOST]:
                folder.remove_file(name)
            folder.put(f"{self._prefix}{now:%Y%m%dT%H%M%S.%fZ}-{random_hex(3)}.eml", message)

        self._in_folder(self._catalog.state, put)

    def names(self) -> List[str]:
        """What is kept, oldest first."""
        return self._in_folder(self._catalog.state_if_there, self._names) or []

    def read(self, name: str) -> bytes:
        return self._in_folder(self._catalog.state, lambda folder: folder.read(name))

    def remove(self, name: str) -> None:
        self._in_folder(self._catalog.state, lambda folder: folder.remove_file(name))

    @staticmethod
    def _in_folder(open_folder: Callable[[str], Optional[Directory]],
                   work: Callable[[Directory], Any]) -> Any:
        """What the work in the folder gives, None if there is none; no mail waits for a dead share."""
        def do() -> Any:
            folder = open_folder(MAIL_FOLDER)
            if folder is not None:
                with folder:
                    return work(folder)

        return within(OUTBOX_LIMIT_S, "looking after the kept mails", do)

    def _names(self, folder: Directory) -> List[str]:
        return [name for name in folder.names() if name.startswith(self._prefix) and name.endswith(".eml")]


# --- the mail of a run -------------------------------------------------------------------


def mailed(run: Run, services: Services, report: Report, store: StoreFacts) -> Report:
    """The report, mailed if so wanted; with a warning more if that, or an earlier mail, was not sent."""
    settings = services.settings
    if not settings.mail_to or settings.mail_when == "never":
        return report
    is_away = run.storage_hangs or services.catalog is None
    mailer = Mailer(services, None if is_away else Outbox(services.catalog, settings.path))
    if settings.mail_when == "problems" and report.word == "SUCCESS" and not report.before:
        is_sent = mailer.send_kept()
    else:
        is_sent = mailer.send(mail_subject(report), mail_body(report, store))
    return report if is_sent else report._replace(findings=report.findings + (
        Finding(Severity.WARNING, "mail", "it was not sent: the log tells why; `test-mail` shows "
                "whether mail works by now."),))


def store_facts(run: Run, services: Services, report: Report) -> StoreFacts:
    """What is told about the store after a backup; a store in trouble costs no mail."""
    facts = StoreFacts(services.settings.backup_dir, services.clock.local())
    if report.wording is not BACKUP_WORDING or not report.pool:
        return facts
    if run.storage_hangs:
        return facts._replace(problem="the backup storage hangs.")
    try:
        return within(STORE_FACTS_LIMIT_S, "listing the store", lambda: store_of(services),
                      services.signals.is_hurried)
    except BackupError as error:
        run.note(error)
        return facts._replace(problem=str(error))


def store_of(services: Services) -> StoreFacts:
    """What is told about the store, as it stands."""
    catalog = services.catalog
    return StoreFacts(services.settings.backup_dir, services.clock.local(), tuple(list_store(catalog).vms),
                      catalog.free_bytes(), catalog.whole_bytes())


# --- history: the reports of rounds that are over, and what the store then held ----------------

HISTORY_FOLDER = "history"
HISTORY_DAYS = 400
HISTORY_NAME = re.compile(r"[0-9]{8}T[0-9]{6}Z-.*\.json")
UUIDS = re.compile(rb'"(?:pool_)?uuid": "[^"]*"')      # in such a file: of the pool and its VMs
MOST_HISTORY_BYTES = 16 * MEBIBYTE     # of one round: 500 VMs take half a MiB
WATCHED_DAYS = 7                       # a VM that no round had for so long is not watched any more


class Held(NamedTuple):
    """What the store held of a VM as a round ended. Of the newest good copy: when it was taken (UTC, or ""),
    the `mark` that a verdict on it belongs to, the copies that hold its blocks. `bad`: FOLDER/NAME."""
    uuid: str
    good: int = 0
    folder: str = ""
    newest: str = ""
    newest_at: str = ""
    size_bytes: int = 0
    mark: str = ""
    rests_on: Tuple[str, ...] = ()
    bad: Tuple[str, ...] = ()
    verified_at: str = ""
    drilled_at: str = ""


def utc_of(copy: Copy) -> datetime:
    """When the copy was taken, as well as that is known: its name tells local time."""
    if copy.written_at is None and copy.taken_at.year < 2000:          # too early for some time zones
        return copy.taken_at.replace(tzinfo=timezone.utc)
    return copy.written_at or copy.taken_at.astimezone(timezone.utc)


def of_kind(copies: Iterable[Copy], what: str) -> List[Copy]:
    """Those of that kind (vm-export, vdi-export), and those that don't tell theirs."""
    return [copy for copy in copies if copy.method is None or copy.method.value == what]


def held_of(uuid: str, copies: Iterable[Copy]) -> Held:
    """What these copies of the VM with that uuid come to."""
    own = [copy for copy in copies if not copy.aside]
    good = sorted((copy for copy in own if copy.is_good), key=utc_of)
    found = Held(uuid, bad=tuple(f"{copy.folder}/{copy.name}" for copy in own if not copy.is_good),
                 verified_at=max((copy.checked("verified_at") or "" for copy in own), default=""),
                 drilled_at=max((copy.checked("drilled_at") or "" for copy in own), default=""))
    if not good:
        return found
    last = good[-1]
    return found._replace(
        good=len(good), folder=last.folder, newest=last.name, newest_at=format_utc(utc_of(last)),
        size_bytes=last.size_bytes, mark=last.mark,
        rests_on=tuple(sorted(last.layer.held_by)) if last.layer else ())


class Past(NamedTuple):
    """A round that is over, as history tells it: its report; the pool's uuid; the VMs of the pool that no
    config line selects or excludes, None where the VMs were chosen by hand; and, as it ended, what the store
    held of its VMs, its free space and its size in bytes, None where that could not be told."""
    report: Report
    pool_uuid: str
    unselected: Optional[Tuple[str, ...]] = None
    held: Tuple[Held, ...] = ()
    free_bytes: Optional[int] = None
    size_bytes: Optional[int] = None


def past_facts(past: Past) -> Dict[str, Any]:
    """What the file of that round holds."""
    report = past.report
    facts = dict(report._asdict(), began_at=format_utc(report.began_at), ended_at=format_utc(report.ended_at),
                 outcomes=[outcome_facts(outcome) for outcome in report.outcomes],
                 findings=[[finding.severity.name, finding.subject, finding.sentence]
                           for finding in report.findings],
                 ended_by=None if report.ended_by is None else reason_text(report.ended_by))
    del facts["wording"]
    return dict(facts, word=report.word, exit=report.exit_status, pool_uuid=past.pool_uuid,
                unselected=past.unselected, held=[one._asdict() for one in past.held],
                free_bytes=past.free_bytes, size_bytes=past.size_bytes)


TEXT, NUMBER = (str, type(None)), (int, type(None))
PAST_SHAPE = {
    "began_at": str, "ended_at": str, "ended_by": TEXT, "host": str, "source": str, "pool": str,
    "pool_uuid": str, "before": str, "signal": int, "missing": [str], "dump_error": TEXT,
    "findings": [[str]], "free_bytes": NUMBER, "size_bytes": NUMBER,
    "outcomes": [{"what": str, "uuid": str, "name": str, "title": str, "error": TEXT, "status_word": str,
                  "said": str, "size_bytes": int, "seconds": (int, float), "kept": int, "cause": str,
                  "findings": [[str]]}],
    "held": [{"uuid": str, "good": int, "folder": str, "newest": str, "newest_at": str, "size_bytes": int,
              "mark": str, "rests_on": [str], "bad": [str], "verified_at": str, "drilled_at": str}]}
MOST_SECONDS = 1e9


def past_of(facts: Dict[str, Any]) -> Past:
    """The round that such a file tells of; ValueError if it holds none."""
    check_shape(facts, PAST_SHAPE)
    unselected = facts.get("unselected")
    check_shape([] if unselected is None else unselected, [str], "unselected")
    try:
        ended_by = None if facts["ended_by"] is None else BackupError(facts["ended_by"])
        report = Report(**dict(
            {field: facts[field] for field in Report._fields if field != "wording"}, wording=BACKUP_WORDING,
            began_at=parse_utc(facts["began_at"]), ended_at=parse_utc(facts["ended_at"]),
            outcomes=tuple(map(outcome_of, facts["outcomes"])), missing=tuple(facts["missing"]),
            findings=tuple(Finding(Severity[severity], subject, sentence)
                           for severity, subject, sentence in facts["findings"]), ended_by=ended_by))
    except KeyError as error:
        raise ValueError(f"it tells of no round ({error})")
    held = tuple(Held(**{field: tuple(one[field]) if isinstance(one[field], list) else one[field]
                         for field in Held._fields}) for one in facts["held"])
    times = [report.began_at, report.ended_at] + [
        parse_utc(at) for one in held for at in (one.newest_at, one.verified_at, one.drilled_at) if at]
    if not all(2000 <= at.year < 9000 for at in times) or not all(
            0 <= outcome.seconds < MOST_SECONDS for outcome in report.outcomes):
        raise ValueError("it tells of times that can't be")
    return Past(report, facts["pool_uuid"], None if unselected is None else tuple(unselected), held,
                facts["free_bytes"], facts["size_bytes"])


class History:
    """What became of the rounds of a config, whatever its settings and pool were: a small file for each."""

    def __init__(self, catalog: Catalog, path: str) -> None:
        self._catalog = catalog
        self._place = readable_place(path, path)

    def add(self, name: str, past: Past) -> None:
        """The round of that id is told; files of rounds that began over 400 days before are gone. A clock
        that is ahead for a night costs none: the round before it must be as late, too."""
        text = json.dumps(past_facts(past), indent=1, sort_keys=True) + "\n"
        with self._catalog.state(HISTORY_FOLDER) as every, every.child_made_if_missing(self._place) as folder:
            earlier = self._names(folder)
            folder.put(name + ".json", text.encode("ascii"))
            oldest = min([past.report.began_at] + [_stamp_of(one) for one in earlier[-1:]]) - timedelta(
                days=HISTORY_DAYS)
            for one in earlier:
                if _stamp_of(one) < oldest:
                    with contextlib.suppress(WrongKind):       # a directory of that name
                        folder.remove_file(one)

    def rounds(self, now: datetime, days: int = HISTORY_DAYS,
               is_brief: bool = False) -> Tuple[List[Past], List[str]]:
        """The last round and those that began in so many days before it, oldest first; and what can't be used
        of them, in sentences. If brief, those are left out of which a later one had all VMs."""
        found, problems, seen = [], [], set()      # type: List[Past], List[str], Set[bytes]
        with contextlib.suppress(NotThere), contextlib.ExitStack() as stack:
            every = self._catalog.state_if_there(HISTORY_FOLDER)
            folder = every and stack.enter_context(stack.enter_context(every).child(self._place))
            for name in reversed(self._names(folder) if folder else []):
                if found and found[0].report.began_at - _stamp_of(name) > timedelta(days=days):
                    break
                try:
                    content = folder.read(name, MOST_HISTORY_BYTES)
                    if is_brief and found and seen.issuperset(UUIDS.findall(content)):
                        continue
                    past = past_of(parse_object(content))
                    if past.report.began_at > now + timedelta(days=1):
                        raise ValueError("it is of a time that is yet to come: is this host's clock right?")
                except (ValueError, CatalogError) as error:
                    problems.append(f"{folder.shown}/{name} can't be used, and is left out: "
                                    + re.sub(r"(?<![.?])$", ".", str(error))
                                    + " Remove it if that stays so.")
                    continue
                found.append(past)
                seen.update(UUIDS.findall(content))
        return found[::-1], problems[::-1]

    @staticmethod
    def _names(folder: Directory) -> List[str]:
        """Those of a time that can be, oldest first."""
        found = []                         # type: List[str]
        for name in filter(HISTORY_NAME.fullmatch, folder.names()):
            with contextlib.suppress(ValueError):
                _stamp_of(name)
                found.append(name)
        return found


def _stamp_of(name: str) -> datetime:
    """When the round of that file began; ValueError if its name tells no time."""
    return datetime.strptime(name[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)


def of_pool(rounds: Sequence[Past], pool: str) -> List[Past]:
    """Those of that pool: two pools may have one config path."""
    return [past for past in rounds if past.pool_uuid == pool]


def past_of_run(run: Run, report: Report, store: StoreFacts) -> Past:
    """The round that the run has led, for the history."""
    pool, kinds = run.inventory.pool_uuid, {outcome.uuid: outcome.what for outcome in report.outcomes}
    copies = {uuid: [] for uuid in kinds}  # type: Dict[str, List[Copy]]
    for stored in store.vms:
        if stored.uuid in copies and stored.pool in ("", pool):
            copies[stored.uuid] += of_kind(stored.copies, kinds[stored.uuid])
    held = tuple(held_of(uuid, found) for uuid, found in copies.items()) if not store.problem else ()
    return Past(report, pool, run.unselected, held, store.free_bytes, store.size_bytes)


def history_text(rounds: Sequence[Past], vm: str) -> str:
    """A line for each round, oldest first, and one for each thing that was not done; or those of that VM."""
    lines = []                             # type: List[str]
    for report in (past.report for past in rounds):
        at = format_local(report.began_at)
        if not vm:
            lines.append(f"{at}  {report.word:7}  {report.successes} of "
                         f"{counted(len(report.outcomes) + len(report.missing), 'VM')}, "
                         f"{format_size(report.size_bytes)} in {report.duration}, by {report.host}")
            lines += [f"    {outcome.title}: {one_line(outcome.error)}" for outcome in report.failed]
            lines += [f"    {quote_name(name)} is not in the pool" for name in report.missing]
            if report.dump_error:
                lines.append(f"    the pool database was not dumped: {one_line(report.dump_error)}")
            if report.ended_by is not None:
                lines.append(f"    it ended early: {one_line(reason_text(report.ended_by))}")
            continue
        for outcome in report.outcomes:
            if vm in (outcome.name, outcome.uuid, "uuid:" + outcome.uuid):
                lines.append(f"{at}  {outcome.title}  " + (
                    f"NOT BACKED UP: {one_line(outcome.error)}" if outcome.error is not None else
                    f"{outcome.what}, {format_size(outcome.size_bytes)} in {format_duration(outcome.seconds)}"
                    + (f"; {one_line(outcome.said)}" if outcome.said else "")))
    return "\n".join(lines)


# --- numbers, for monitors ---------------------------------------------------------------

METRICS_DAYS = 35                      # a VM that fails keeps the figures of its last backup for so long
MONITOR_LIMIT_S = 20                   # for a file or directory of a monitor's


class Watched(NamedTuple):
    """A VM that the last round had, or one of the 7 nights before: what became of it last, what of its last
    backup that was good, None if there was none lately, and what the store held of it, and when."""
    last: Outcome
    last_good: Optional[Outcome]
    held: Held
    pool: str
    told_at: datetime


def watched(rounds: Sequence[Past]) -> List[Watched]:
    """The VMs of these rounds, which are oldest first, by name."""
    found = {}                             # type: Dict[str, Watched]
    lasting = set()                        # type: Set[str]
    for past in rounds:
        is_near = rounds[-1].report.began_at - past.report.began_at <= timedelta(days=WATCHED_DAYS)
        for outcome in past.report.outcomes:
            before = found.get(outcome.uuid, Watched(
                outcome, None, Held(outcome.uuid), past.pool_uuid, past.report.ended_at))
            found[outcome.uuid] = before._replace(
                last=outcome, last_good=outcome if outcome.error is None else before.last_good)
            if is_near:
                lasting.add(outcome.uuid)
        for held in past.held:
            if held.uuid in found:
                found[held.uuid] = found[held.uuid]._replace(held=held, told_at=past.report.ended_at)
    return sorted((found[uuid] for uuid in lasting), key=lambda one: (one.last.name, one.last.uuid))


def seconds_of(at: str) -> float:
    """That UTC time in seconds since 1970, 0 for none."""
    return parse_utc(at).timestamp() if at else 0


VM_METRICS = (
    ("newest_good_copy_timestamp_seconds", "When the newest good copy was taken; 0: there is none.",
     lambda one: seconds_of(one.held.newest_at)),
    ("newest_good_copy_size_bytes", "What the newest good copy takes; 0: there is none.",
     lambda one: one.held.size_bytes),
    ("good_copies", "Good copies in the store.", lambda one: one.held.good),
    ("bad_copies", "Copies in the store that are not good.", lambda one: len(one.held.bad)),
    ("last_backup_success", "Did the last round that had the VM back it up (1) or not (0)?",
     lambda one: int(one.last.error is None)),
    ("last_good_backup_duration_seconds", "How long its last good backup took; NaN: there was none lately.",
     lambda one: one.last_good.seconds if one.last_good else math.nan),
    ("verified_timestamp_seconds", "When a copy was last verified; 0: never.",
     lambda one: seconds_of(one.held.verified_at)),
    ("drilled_timestamp_seconds", "When a copy was last drilled; 0: never.",
     lambda one: seconds_of(one.held.drilled_at)))
ROUND_METRICS = (
    ("round_start_timestamp_seconds", "When the last round began.",
     lambda past: past.report.began_at.timestamp()),
    ("round_end_timestamp_seconds", "When the last round ended.",
     lambda past: past.report.ended_at.timestamp()),
    ("round_success", "Was all done in the last round (1), with or without warnings, or not (0)?",
     lambda past: int(past.report.word != "ERROR")),
    ("round_errors", "What was not done in the last round: VMs, the dump, the run.",
     lambda past: past.report.errors),
    ("round_warnings", "What was worth a look in the last round.", lambda past: past.report.warnings),
    ("round_vms", "VMs that the last round was to back up.",
     lambda past: len(past.report.outcomes) + len(past.report.missing)),
    ("round_failed_vms", "VMs that the last round did not back up.",
     lambda past: len(past.report.failed_names)),
    ("round_size_bytes", "What the copies of the last round take.", lambda past: past.report.size_bytes),
    ("store_free_bytes", "Free space of backup_dir as the last round ended; NaN: unknown.",
     lambda past: math.nan if past.free_bytes is None else past.free_bytes),
    ("store_size_bytes", "Size of the file system of backup_dir; NaN: unknown.",
     lambda past: math.nan if past.size_bytes is None else past.size_bytes))


def metrics_text(config: str, rounds: Sequence[Past]) -> str:
    """What node_exporter's textfile collector reads: times, never ages, so that nothing looks fresh when no
    run comes any more. Format: Prometheus, text exposition format 0.0.4."""
    def label(name: str, value: str) -> str:
        value = value.encode("utf-8", "replace").decode("utf-8")
        for raw, escaped in (("\\", "\\\\"), ("\"", "\\\""), ("\n", "\\n")):
            value = value.replace(raw, escaped)
        return f'{name}="{value}"'

    lines, config = [], label("config", config)
    for name, words, value in ROUND_METRICS:
        lines += [f"# HELP vmbackup_{name} {words}", f"# TYPE vmbackup_{name} gauge",
                  f"vmbackup_{name}{{{config}}} {value(rounds[-1])!r}"]
    vms = [(one, ",".join((config, label("vm", one.last.name), label("uuid", one.last.uuid))))
           for one in watched(rounds)]
    for name, words, value in VM_METRICS:
        lines += [f"# HELP vmbackup_vm_{name} {words}", f"# TYPE vmbackup_vm_{name} gauge"]
        lines += [f"vmbackup_vm_{name}{{{labels}}} {value(one)!r}" for one, labels in vms]
    return "\n".join(lines).replace(" nan\n", " NaN\n") + "\n"


def put_for_all(path: str, text: str) -> None:
    """The file has that text, whole, and everybody may read it; CatalogError if that can't be had."""
    def put() -> None:
        folder, name = os.path.split(path)
        with Directory.open_path(folder or ".") as place:
            place.put(name, text.encode("utf-8", "replace"), is_for_all=True)

    within(MONITOR_LIMIT_S, f"writing {path}", put)


# --- check, for Nagios and its heirs -----------------------------------------------------

CHECK_LIMIT_S = 8                      # monitors give a plugin up after 10


class Alarm(enum.IntEnum):
    """What a monitor is told; the numbers are those of the Nagios plugin API."""
    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


def held_now(catalog: Catalog, one: Watched, condemned: Container[str], oldest: datetime) -> Held:
    """What the store holds of the VM now: what is on record, if all of that was good, is there yet, was not
    condemned since, and is not older than that; what the VM's directories hold, if not."""
    held, vm = one.held, one.last
    if held.newest and not held.bad and held.folder not in condemned and parse_utc(held.newest_at) >= oldest \
            and all(catalog.is_sealed(held.folder, name) for name in (held.newest,) + held.rests_on):
        return held
    names = {held.folder or safe_name(vm.name)}.union(own_folder_names(vm.name, vm.uuid, one.pool))
    copies = [copy for name in sorted(names) for copy in catalog.folder(name).copies
              if copy.uuid == vm.uuid and copy.pool in ("", one.pool)]
    return held_of(vm.uuid, of_kind(copies, vm.what))


def check_line(ages: Sequence[Tuple[str, Optional[float]]], bad: Sequence[str], warn_s: float, crit_s: float,
               free_bytes: Optional[int], notes: Sequence[str] = ()) -> Tuple[Alarm, str]:
    """The state, and the line that tells it. `ages`: of each VM its title and its newest good copy's age in
    seconds, None without one, negative if of a time yet to come; `bad`: copies that are not good."""
    told = []                              # type: List[str]
    alarm, oldest = Alarm.OK, max((age for _, age in ages if age is not None), default=0.0)
    for words, level, rows in (
            ("without a good copy", Alarm.CRITICAL, [title for title, age in ages if age is None]),
            (f"older than {format_duration(crit_s)}", Alarm.CRITICAL,
             [title for title, age in ages if age is not None and age > crit_s]),
            (f"older than {format_duration(warn_s)}", Alarm.WARNING,
             [title for title, age in ages if age is not None and warn_s < age <= crit_s]),
            ("of a time that is yet to come", Alarm.WARNING,
             [title for title, age in ages if age is not None and age < -HOUR_S]),
            ("of the copies not good (list tells why)", Alarm.WARNING, bad)):
        if rows:
            alarm = max(alarm, level)
            told.append(f"{len(rows)} {words}: {shortened(rows, 5)}")
    if not ages:
        alarm, told = Alarm.UNKNOWN, ["no VM was in the last rounds: does the config select any?"]
    text = "; ".join(told + list(notes)) or f"{counted(len(ages), 'VM')}, the newest good copy of each at " \
        f"most {format_duration(max(0.0, oldest))} old"
    figures = [f"vms={len(ages)}", f"oldest={max(0.0, oldest):.0f}s;{warn_s:.0f};{crit_s:.0f};0",
               f"without={sum(age is None for _, age in ages)}", f"bad={len(bad)}"]
    figures += [f"free={free_bytes}B"] if free_bytes is not None else []
    return alarm, alarm_line(alarm, text, figures)


def alarm_line(alarm: Alarm, text: str, figures: Sequence[str] = ()) -> str:
    """One line as the plugin API has it: text, a bar, figures."""
    text = one_line(text).replace("|", "/")
    return f"VMBACKUP {alarm.name}: {text}" + (" | " + " ".join(figures) if figures else "")


# --- the page ---------------------------------------------------------------------------

PAGE_DAYS = 30
NIGHTS_NARROW = 12                     # columns of the calendar on a narrow screen
BARS = 14                              # rounds in the small bars
PAGE_PATIENCE_HOURS = 54               # without a round
GROWTH_DAYS = 3                        # from so long a time on a growth says something
PAGE_STYLE = """
:root{--bg:#fff;--fg:#1b1f24;--dim:#57606a;--line:#d0d7de;--good:#0f5132;--goodbg:#d1f0dd;
--warn:#5c4400;--warnbg:#fff0c2;--bad:#86181d;--badbg:#ffdcd9;--bar:#0b5cad}
@media(prefers-color-scheme:dark){:root{--bg:#0f1318;--fg:#e6edf3;--dim:#9aa7b4;--line:#3a434d;
--good:#a6f0c0;--goodbg:#123d27;--warn:#ffe08a;--warnbg:#4a3a08;--bad:#ffc4be;--badbg:#5a1c1c;--bar:#79b8ff}}
*{box-sizing:border-box}
body{margin:0;padding:1rem;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}
main,header,footer{max-width:75rem;margin:0 auto}
h1{font-size:1.5rem;margin:0}h2{font-size:1.2rem;margin:2rem 0 .5rem}p{margin:.3rem 0}
.dim,footer{color:var(--dim)}.dim{font-size:.9rem}
.state{margin:1rem 0;padding:.7rem 1rem;border-left:.4rem solid;font-size:1.15rem;font-weight:600}
.ok{background:var(--goodbg);color:var(--good)}.warn{background:var(--warnbg);color:var(--warn)}
.bad{background:var(--badbg);color:var(--bad)}
ul{margin:.3rem 0;padding-left:1.3rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%}
th,td{padding:.3rem .5rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{font-size:.85rem;color:var(--dim)}tbody th{font-weight:600;min-width:7rem}
.cal td,.cal thead th{padding:.1rem;text-align:center;vertical-align:middle;min-width:1.3rem;font-size:.85rem;
white-space:nowrap}
.cal thead th:first-child{text-align:left}
td.g{background:var(--goodbg);color:var(--good)}td.w{background:var(--warnbg);color:var(--warn)}
td.f,td.n{background:var(--badbg);color:var(--bad)}
svg{width:70px;height:20px;display:block}
path{stroke:var(--bar);stroke-width:3}
summary{cursor:pointer}.first{display:none}
@media(min-width:701px){.vms tbody th{min-width:9rem}.vms td{min-width:7rem}.vms td:nth-of-type(2),
.vms td:nth-of-type(3){min-width:6rem}}
:focus-visible{outline:3px solid var(--bar);outline-offset:2px}
@media(max-width:700px){body{padding:.6rem}.old{display:none}.first{display:inline}
.cal tbody th{min-width:5rem;font-size:.85rem}
.vms thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.vms tr,.vms th,.vms td{display:block;border:0;padding:.1rem 0}
.vms svg{display:inline-block;vertical-align:middle;margin-right:.4rem}
.vms tr{border-bottom:1px solid var(--line);padding:.5rem 0}.vms td::before{content:attr(data-t) ": ";
color:var(--dim)}}
"""


class PageVm(NamedTuple):
    """A VM on the page: what the last rounds tell of it, what became of it in each with its beginning, and
    its copies in the store, each with what retention says of it."""
    watched: Watched
    outcomes: Tuple[Tuple[datetime, Outcome], ...]
    copies: Tuple[Tuple[Copy, str], ...]


class Page(NamedTuple):
    """What the page shows. `at`: when it is made; `store`: the store as it is then."""
    source: str
    host: str
    at: datetime
    rounds: Sequence[Past]
    vms: Sequence[PageVm]
    store: StoreFacts
    references: Sequence[str]
    problems: Sequence[str]


def shown(text: str) -> str:
    """The text as HTML, and nothing but text, whatever it holds."""
    import html
    return html.escape(one_line(text).encode("utf-8", "replace").decode("utf-8"))


def named(text: str) -> str:
    """A name as HTML, which turns the direction of nothing around it."""
    return f"<bdi>{shown(text)}</bdi>"


def day_of_full_store(rounds: Sequence[Past]) -> Optional[datetime]:
    """When the store is full if it goes on growing as in these rounds, None if it does not grow, or not for
    long enough. Growth is the line that lies nearest to the used space of all of them."""
    known = [past for past in rounds if past.free_bytes is not None and past.size_bytes is not None]
    points = [(past.report.ended_at.timestamp() / DAY_S, past.size_bytes - past.free_bytes) for past in known]
    if len(points) < 3 or points[-1][0] - points[0][0] < GROWTH_DAYS:
        return None
    middle, mean = (sum(column) / len(points) for column in zip(*points))
    growth = sum((day - middle) * (used - mean) for day, used in points) / sum(
        (day - middle) ** 2 for day, _ in points)
    days = known[-1].free_bytes / growth if growth > 0 else math.inf
    return known[-1].report.ended_at + timedelta(days=days) if days < HISTORY_DAYS else None


def page_needs(page: Page) -> Tuple[List[str], List[str]]:
    """What needs attention, in sentences as HTML: what is lacking, and what is worth a look."""
    report = page.rounds[-1].report
    bad = [f"{named(one.watched.last.title)} was not backed up: {shown(one.watched.last.error)}"
           for one in page.vms if one.watched.last.error is not None]
    bad += [f"{named(name)} is named in the config and not in the pool." for name in report.missing]
    if report.dump_error:
        bad.append(f"The pool database was not dumped: {shown(report.dump_error)}")
    if report.ended_by is not None:
        bad.append(f"The last round ended early: {shown(reason_text(report.ended_by))}")
    if page.at - report.ended_at > timedelta(hours=PAGE_PATIENCE_HOURS):
        bad.append(f"No round has come since {format_local(report.ended_at)}: does cron still start it?")
    bad += [f"{named(one.watched.last.title)} has no good copy." for one in page.vms
            if not one.watched.held.newest]
    not_good = [f"{shown(f'{copy.folder}/{copy.name}')} is not good: {shown(copy.trouble)}."
                for one in page.vms for copy, _ in one.copies if not copy.is_good]
    bad += not_good[:-1] + [f"{sentence} {NOT_GOOD}" for sentence in not_good[-1:]]
    bad += [f"{named(finding.subject)}: {shown(finding.sentence)}" for finding in report.findings
            if finding.severity is Severity.ERROR]
    warn = [f"{named(finding.subject)}: {shown(finding.sentence)}" for finding in report.findings
            if finding.severity is Severity.WARNING]
    if page.store.problem:
        bad.append(f"The copies could not be listed: {shown(page.store.problem)}")
    full = day_of_full_store(page.rounds)
    if full is not None:
        warn.append(f"If it goes on growing as it does, the store is full on {full.astimezone():%Y-%m-%d}:"
                    " give it more room, or keep fewer copies.")
    return bad, warn + [shown(problem) for problem in page.problems]


def night_cell(outcomes: Sequence[Outcome]) -> Tuple[str, str]:
    """Class and letter of what became of a VM in the rounds of a day: the last of it counts."""
    if not outcomes:
        return "", ""
    last = outcomes[-1]
    if last.error is not None:
        return ("n", "N") if last.status_word == UNTRIED else ("f", "F")
    is_odd = any(finding.severity is not Severity.INFO for finding in last.findings)
    return ("w", "W") if is_odd else ("g", "G")


def page_calendar(page: Page) -> List[str]:
    """The table of nights and VMs."""
    days = [page.at.astimezone().date() - timedelta(days=days) for days in range(PAGE_DAYS)][::-1]
    rounds = {past.report.began_at.astimezone().date() for past in page.rounds}
    old = [' class="old"' if index < PAGE_DAYS - NIGHTS_NARROW else "" for index in range(PAGE_DAYS)]
    months = {index: f"<br>{day:%b}" for index, day in enumerate(days) if not index or day.day == 1}
    months.setdefault(PAGE_DAYS - NIGHTS_NARROW,
                      f'<span class="first"><br>{days[PAGE_DAYS - NIGHTS_NARROW]:%b}</span>')
    lines = ['<h2 id="nights">Nights</h2>',
             '<p class="dim">G good, W good with a warning, F failed, N not reached, empty: not in a round '
             "of that day. R in the row of rounds: there was one.</p>",
             '<div class="wide" role="region" aria-labelledby="nights" tabindex="0"><table class="cal">'
             '<thead><tr><th scope="col">VM</th>' + "".join(
                 f'<th scope="col"{old_one}>{day.day}{months.get(index, "")}</th>'
                 for index, (day, old_one) in enumerate(zip(days, old))) + "</tr></thead><tbody>",
             '<tr><th scope="row">rounds</th>' + "".join(
                 f"<td{old_one}>{'R' if day in rounds else '-'}</td>" for day, old_one in zip(days, old))
             + "</tr>"]
    for one in page.vms:
        by_day = collections.defaultdict(list)     # type: Dict[date, List[Outcome]]
        for began_at, outcome in one.outcomes:
            by_day[began_at.astimezone().date()].append(outcome)
        cells = []
        for index, day in enumerate(days):
            kind, letter = night_cell(by_day.get(day, ()))
            words = " ".join(filter(None, (kind, "old" if old[index] else "")))
            cells.append(f'<td class="{words}">{letter}</td>' if words else f"<td>{letter}</td>")
        lines.append(f'<tr><th scope="row">{named(one.watched.last.name)}</th>{"".join(cells)}</tr>')
    return lines + ["</tbody></table></div>"]


def page_bars(what: str, values: Sequence[float], words: Callable[[float], str]) -> str:
    """Small bars of these values, oldest first, with what they are in words."""
    if not values:
        return "none yet"
    values = values[-BARS:]
    most = max(values) or 1
    path = "".join(f"M{5 * index + 2} 20V{20 - max(1, round(18 * value / most))}"
                   for index, value in enumerate(values))
    return (f'<svg viewBox="0 0 70 20" role="img" aria-label="{what} of the last rounds: '
            f'{shown(words(min(values)))} to {shown(words(max(values)))}"><path d="{path}"/></svg>'
            f"{shown(words(values[-1]))}")


def page_row(one: PageVm) -> str:
    """The row of a VM."""
    held, newest = one.watched.held, [copy for copy, _ in one.copies if copy.name == one.watched.held.newest]
    done = [outcome for _, outcome in one.outcomes if outcome.error is None]
    how = ""
    if newest:
        copy = newest[0]
        how = ", ".join(filter(None, (
            copy.method.value if copy.method else "",
            "" if copy.layer is None else "increment" if copy.is_increment else "full",
            reading_words(copy.reading) if is_reading_told(copy.reading) else "")))
    at = f"{parse_utc(held.newest_at).astimezone():%Y-%m-%d %H:%M}" if held.newest_at \
        else '<strong class="bad">NONE</strong>'
    copies = "".join(f"<li>{shown(copy.stamp)}, {format_size(copy.size_bytes)}, "
                     f"{'good' if copy.is_good else 'NOT GOOD'}: {shown(fate)}</li>"
                     for copy, fate in reversed(one.copies))
    number = counted(held.good, "good copy") + (f", {len(held.bad)} not good" if held.bad else "")
    cells = (("Newest good copy", f"{at}{f'<br>{shown(how)}' if how else ''}"),
             ("Size", page_bars("Sizes", [outcome.size_bytes for outcome in done], format_size)),
             ("Duration", page_bars("Durations", [outcome.seconds for outcome in done], format_duration)),
             ("Verified", shown(held.verified_at[:10] or "never")),
             ("Drilled", shown(held.drilled_at[:10] or "never")),
             ("Copies", f"<details><summary>{number}</summary><ul>{copies}</ul></details>" if copies
              else number))
    return (f'<tr><th scope="row">{named(one.watched.last.name)} <span class="dim">'
            f"{shown(one.watched.last.uuid[:8])}</span></th>" + "".join(
                f'<td data-t="{title}">{cell}</td>' for title, cell in cells) + "</tr>")


def page_text(page: Page) -> str:
    """The page: what matters comes first, times and never ages, nothing from elsewhere, no script."""
    def listed(title: str, rows: Sequence[str]) -> List[str]:
        return [f"<h2>{title}</h2><ul>", *(f"<li>{row}</li>" for row in rows), "</ul>"] if rows else []

    last = page.rounds[-1].report if page.rounds else None
    pool = next((past.report.pool for past in reversed(page.rounds) if past.report.pool), "")
    bad, warn = page_needs(page) if last else ([], ["No round of this config is on record yet."])
    good = sum(one.watched.last.error is None for one in page.vms)
    state = "bad" if bad else "warn" if warn else "ok"
    words = f"{good} of {counted(len(page.vms), 'VM')} backed up in their last round" + (
        f", {counted(len(bad), 'thing')} to look after" if bad else
        f", {counted(len(warn), 'warning')}" if warn else ", nothing to look after")
    what = f"Backups of pool {pool}" if pool else "Backups"
    lines = ['<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
             '<meta name="viewport" content="width=device-width,initial-scale=1">',
             "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; "
             "style-src 'unsafe-inline'\">",
             f"<title>{shown(words)}: {shown(what)}</title><style>{PAGE_STYLE}</style></head><body>",
             f"<header><h1>{shown(what)}</h1><p>This page was made on <strong>"
             f"{page.at.astimezone():%Y-%m-%d at %H:%M}</strong> by {named(page.host)}"
             + (f"; the last round ran from {format_local(last.began_at)} to {format_local(last.ended_at)}."
                if last else ".") + "</p></header><main>",
             f'<p class="state {state}">{shown(words)}.</p>']
    lines += listed("Needs attention", bad) + listed("Worth a look", warn)
    if page.vms:
        lines += page_calendar(page)
        lines += ['<h2 id="vms">VMs</h2><div class="wide" role="region" aria-labelledby="vms" tabindex="0">'
                  '<table class="vms"><thead><tr>' + "".join(
                      f'<th scope="col">{title}</th>' for title in (
                          "VM", "Newest good copy", "Size", "Duration", "Verified", "Drilled", "Copies"))
                  + "</tr></thead><tbody>", *map(page_row, page.vms), "</tbody></table></div>"]
    unselected = next((past.unselected for past in reversed(page.rounds) if past.unselected is not None), ())
    size, free = page.store.size_bytes, page.store.free_bytes
    lines.append(f"<h2>Store</h2><p>{shown(page.store.path)}: " + (
        "its free space is not known" if free is None or size is None else
        f"{format_size(size - free)} used, {format_size(free)} free of {format_size(size)}") + ".</p>")
    lines += listed("VMs in no backup", [named(row) for row in unselected])
    lines += listed("References in the pool", [named(row) for row in page.references])
    return "\n".join(lines + [f"</main><footer><p>VmBackup {VERSION}, {shown(page.source)}</p></footer>"
                              "</body></html>\n"])


def page_of(services: Services, rounds: Sequence[Past], store: StoreFacts, host: str,
            problems: Sequence[str]) -> Page:
    """What the page shows of these rounds, and of the store as it stands."""
    pool = next((past.pool_uuid for past in reversed(rounds) if past.pool_uuid), "")
    stored = collections.defaultdict(list)         # type: Dict[str, List[StoredVm]]
    for one in store.vms:
        if one.pool in ("", pool):
            stored[one.uuid].append(one)
    vms, references = [], []               # type: List[PageVm], List[str]
    outcomes = collections.defaultdict(list)       # type: Dict[str, List[Tuple[datetime, Outcome]]]
    for past in rounds:
        for outcome in past.report.outcomes:
            outcomes[outcome.uuid].append((past.report.began_at, outcome))
    for one in watched(rounds):
        uuid, fates = one.last.uuid, []    # type: str, List[Tuple[Copy, str]]
        for own in (every for every in stored[uuid] if of_kind(every.copies, one.last.what)):
            fates += zip(own.copies, (fate.text for fate in stored_verdicts(services, own, store.now)[2]))
            references += [f"{own.title}:{reference_line(row).partition(':')[2]}" for row in reference_rows(
                services.catalog, own.pool, own.uuid, own.method)] if own.method else []
        held = held_of(uuid, (copy for copy, _ in fates)) if not store.problem else one.held
        vms.append(PageVm(one._replace(held=held), tuple(outcomes[uuid]),
                          tuple(sorted(fates, key=lambda row: row[0].taken_at))))
    return Page(services.settings.source, host, services.clock.utc(), rounds, vms, store, references,
                problems)


# --- the way out -------------------------------------------------------------------------


def end_told(run: Run) -> int:
    """The exit status of a run that has ended: it is told where people look, and the lock of its config given
    back. Status log and log have its last lines, unless it ended before it could begin."""
    services, report, status = run.services, run.report(), int(ExitStatus.BUG)
    with services.signals.shielded():
        try:
            if run.is_told or run.wording is not None and run.ended_by is not None:
                status = report.exit_status if run.is_told else status
                try:
                    report = told_abroad(run, report)
                except Exception as bug:   # it costs nobody what was done before
                    services.log.bug(bug)
                    report = report._replace(ended_by=report.ended_by or bug)
                else:
                    status = report.exit_status if run.is_told else status
        finally:
            if run.lock is not None:       # another host leaves the config to a run that ended well
                run.tidy("giving back the lock of this config", lambda: end_config_lock(run.lock, status))
        if run.is_told:
            run.status_log.end_run(report)
        if run.is_hooked:
            report = after_run(run, report)
        if run.is_told:
            services.signals.come_too_late()
            if report.wording is BACKUP_WORDING and (report.failed_names or report.dump_error) \
                    and not services.settings.is_by_hand:
                services.log.info("what was not backed up is tried again by the next run; to run sooner, "
                                  "repeat the crontab line by hand.")
            services.log.info(summary_text(report))
    return report.exit_status if run.status is None else run.status


def after_run(run: Run, report: Report) -> Report:
    """The report, once the administrator's program has run, with the store closed; or with a warning more."""
    if not run.services.settings.after_run:
        return report
    facts = past_facts(Past(report, ""))
    facts = dict({name: facts[name] for name in HOOK_FACTS}, exit_status=report.exit_status,
                 ended_by=facts["ended_by"] or "", vms=len(report.outcomes), failed=len(report.failed_names),
                 size_bytes=report.size_bytes, part=run.part)
    def close() -> None:
        if run.catalog is not None and not run.storage_hangs:
            within(WAY_OUT_S, "closing the store", run.catalog.close_all)

    for subject, deed in (("after_run", close), ("", lambda: run.hook("after_run", facts))):
        try:
            deed()
        except BackupError as error:
            report = warned(run, report, subject, str(error))
    return report


HOOK_FACTS = ("word", "began_at", "ended_at", "outcomes", "missing", "findings", "dump_error")


def warned(run: Run, report: Report, subject: str, sentence: str) -> Report:
    """The report with that warning more, which is told."""
    finding = Finding(Severity.WARNING, subject, sentence)
    run.services.log.finding(finding)
    return report._replace(findings=report.findings + (finding,))


def told_abroad(run: Run, report: Report) -> Report:
    """The report, which went out by ping and mail, and, of a round, into history, page and file of numbers,
    as far as wanted; with a warning more for each that could not be had. None changes an outcome."""
    settings = run.services.settings
    if run.catalog is None and not run.storage_hangs:  # no store is what such a run has often to tell of
        with contextlib.suppress(CatalogError):
            run.catalog = within(OUTBOX_LIMIT_S, "opening the store", lambda: Catalog(settings.backup_dir))
    services = run.services._replace(catalog=run.catalog)
    store = store_facts(run, services, report)
    rounds, problems = [], []              # type: List[Past], List[str]

    def keep() -> None:
        history, past = History(services.catalog, settings.path), past_of_run(run, report, store)
        history.add(run.round, past)
        if settings.metrics_file or settings.report_html:
            found = history.rounds(services.clock.utc(), METRICS_DAYS)
            rounds.extend(of_pool(found[0], past.pool_uuid))
            problems.extend(found[1])

    def tell(key: str, is_due: bool, work: Callable[[], None]) -> None:
        """What the key of that name asks for was done, or a warning tells why not."""
        nonlocal report
        try:
            if getattr(settings, key) and is_due:
                work()
        except BackupError as error:
            report = warned(run, report, key, str(error))

    def write(path: str, text: Callable[[], str]) -> None:
        if not rounds:
            raise CatalogError(f"{path} is left as it is, as the history of runs can't be written or read: "
                               "the log tells why.")
        put_for_all(path, within(STORE_FACTS_LIMIT_S, f"making {path}", text, services.signals.is_hurried))

    is_round = bool(run.round)
    tell("ping_url", run.wording is BACKUP_WORDING and not isinstance(run.ended_by, LockHeld),
         lambda: ping(settings.ping_url + ("/fail" if report.word == "ERROR" else "")))
    report = mailed(run, services, report, store)
    if is_round:
        run.tidy("keeping the history", keep)
    tell("metrics_file", is_round, lambda: write(
        settings.metrics_file, lambda: metrics_text(settings.path, rounds)))
    tell("report_html", is_round, lambda: write(settings.report_html, lambda: page_text(page_of(
        services, rounds, store, report.host, problems))))
    return report


# --- preview --------------------------------------------------------------------------

# of a VM: its directory, what is said of the copies there, and what the new one will be
Foreseen = Tuple[str, List[Verdict], Optional[NextLayer]]


def preview_text(configuration: Configuration, inventory: Inventory, plan: Plan,
                 futures: Dict[str, Foreseen], catalog: Catalog) -> str:
    """What a run would do: per VM its kind, directory, copies, and what retention would then remove."""
    lines = [f"Preview of {configuration.source} for pool {inventory.pool_title} (master "
             f"{inventory.master.short_name}). Nothing is changed.",
             f"Backup directory {configuration.backup_dir}: {free_text(catalog.free_bytes())}.", ""]
    if configuration.pool_db_backup:
        lines += [f"The pool database is dumped into {dump_folder(catalog, inventory)}.", ""]
    lines.append(f"{counted(len(plan.jobs), 'VM')} to back up:")
    for job in plan.jobs:
        lines += preview_job(job, configuration.exclude_disk, *futures[job.machine.uuid])
    total = sum(disk.virtual_size for job in plan.jobs
                for disk in planned_disks(job, configuration.exclude_disk)[0])
    lines += [f"  In all: disks of {format_size(total)} (an upper limit: empty space is not exported by "
              f"vm-export).", ""]
    for title, rows in (("left out by exclude",
                         [(machine, " by " + line) for machine, line in plan.excluded]),
                        ("in no backup of this config", [(machine, "") for machine in plan.unselected])):
        lines.append(f"{counted(len(rows), 'VM')} {title}{':' if rows else '.'}")
        lines += [f"  {machine.title}{tail}" for machine, tail in rows]
    if plan.provisional:
        lines.append(f"{counted(len(plan.provisional), 'VM')} left out as still being made:")
        lines += ["  " + provisional_text(machine) for machine in plan.provisional]
    words = {Severity.ERROR: "Error", Severity.WARNING: "Warning", Severity.INFO: "Note"}
    lines += [f"{words[finding.severity]}: {finding.subject}: {finding.sentence}"
              for finding in plan.findings]
    return "\n".join(lines)


def planned_disks(job: Job, excludes: Sequence[DiskExclude]) -> Tuple[Tuple[Disk, ...], str]:
    """The disks that the job's export reads; and why it will fail, "" if it won't."""
    try:
        return disks_to_export(job.machine, job.method, excludes), ""
    except BackupError as error:
        return (), f"{job.method.value} will fail: it{str(error)[len(job.machine.title):]}"


def preview_job(job: Job, excludes: Sequence[DiskExclude], folder: str, verdicts: Sequence[Verdict],
                layer: Optional[NextLayer] = None) -> List[str]:
    """The lines of one VM in a preview."""
    machine, (disks, _) = job.machine, planned_disks(job, excludes)
    size = format_size(sum(disk.virtual_size for disk in disks))
    lines = [f"  {machine.title}: {job.method.value}, {kept_text([job.rules], 'copy')}, "
             f"{machine.power_state.lower()}, {counted(len(disks), 'disk')} of {size}; chosen by "
             f"{job.chosen_by}"]
    lines += ["      " + words
              for words in foreseen_disks(job, excludes) + foreseen_copy(job, folder, verdicts, layer)]
    own = own_verdicts(job, verdicts)
    for verdict in verdicts:
        words = "leaves" if verdict not in own else "keeps" if verdict.keep else "then removes"
        lines.append(f"      {words} {verdict.copy.name}: {verdict.text}")
    return lines


def own_verdicts(job: Job, verdicts: Sequence[Verdict]) -> List[Verdict]:
    """Those on the VM's good copies."""
    return [verdict for verdict in verdicts if verdict.copy.is_good and verdict.copy.uuid == job.machine.uuid
            and not verdict.copy.aside]


def foreseen_disks(job: Job, excludes: Sequence[DiskExclude]) -> List[str]:
    """What is to be said of what the job's copy will hold of the VM, and what not."""
    machine, (disks, problem), lines = job.machine, planned_disks(job, excludes), []
    left_out = left_out_disks(machine, excludes)
    if machine.power_state == "Suspended":
        lines.append("it is suspended: the copy will hold its disks, but not its memory")
    if problem:
        lines.append(problem)
    lines += [f"disk {disk_list((disk,))} is left out by {line}" for disk, line in left_out.items()]
    lines += [f"disk {disk_list((disk,))} is not left out: its mark is heeded with exclude-disk={NOBAK}"
              for disk in disks if NOBAK in disk.name]
    return lines


def foreseen_copy(job: Job, folder: str, verdicts: Sequence[Verdict],
                  layer: Optional[NextLayer] = None) -> List[str]:
    """What the job's copy will be, in sentences."""
    own = own_verdicts(job, verdicts)
    older = counted(sum(verdict.copy.is_old for verdict in own))
    lines = [f"into {folder}/, which holds {counted(len(own), 'good copy')} of it"
             + (f" ({older} made by the older program: they count as any other)" if older != "0" else "")]
    if layer is not None:
        due = f"; the next full after it is due in {counted(layer.left, 'copy')}" * bool(job.machine.disks)
        lines.append(f"it will be{layer_words(layer)[1:]}{due}")
        lines += [words for words in (layer.reading, layer.warning) if words]
    return lines


def foreseen(services: Services, inventory: Inventory,
             plan: Plan) -> Tuple[Plan, Dict[str, Foreseen], str]:
    """What futures_of gives, and the preview."""
    plan, futures = futures_of(services, inventory, plan)
    return plan, futures, preview_text(services.settings, inventory, plan, futures, services.catalog)


UNREADABLE = "all of it will be read, as the list of blocks of the newest good copy can't be used"


def futures_of(services: Services, inventory: Inventory, plan: Plan,
               proven: Container[str] = ()) -> Tuple[Plan, Dict[str, Foreseen]]:
    """The plan with what the store adds to its findings; and what is foreseen of each VM, by uuid. Of those
    in `proven` the copy that an increment would rest on is looked into, as a run does."""
    placement = Placement(services.catalog, inventory.pool_uuid, [one.name for one in inventory.machines])
    otherwise, views = older_differences(services.settings, inventory, plan), []
    told = {finding.subject for finding in otherwise}              # more than "matches nothing"
    findings = [finding for finding in plan.findings if finding.subject not in told] + otherwise
    utc, local, settings = services.clock.utc(), services.clock.local(), services.settings
    placement.claim_all(job.machine for job in plan.jobs)
    try:
        findings += dropped_vms(services, inventory, plan)[1]
    except CatalogError as error:
        findings.append(Finding(Severity.ERROR, services.settings.backup_dir, str(error)))
    for job in plan.jobs:
        try:
            folder = placement.folder(placement.folder_name(job.machine))
        except CatalogError as error:
            findings.append(Finding(Severity.ERROR, job.machine.title, str(error)))
            folder = Folder(safe_name(job.machine.name), (), (), ())
        copies = placement.own_view(folder, job.machine)
        findings += [Finding(Severity.WARNING, job.machine.title, warning)
                     for warning in retention_warnings(copies, utc, local)]
        findings += newly_left_out(job.machine, job.method, left_out_disks(
            job.machine, services.settings.exclude_disk), copies)
        layer = None                       # type: Optional[NextLayer]
        if settings.incremental:
            layer = next_layer(copies, job.machine, job.method, planned_disks(job, settings.exclude_disk)[0],
                               settings.full_every, services.catalog.free_bytes())
            if settings.keep_reference and job.machine.disks:
                layer = layer._replace(reading=foreseen_reading(services, inventory, job, copies, layer))
            if layer.base is not None and job.machine.uuid in proven:
                try:
                    proven_base(services, layer.base).inside.close()
                except (CatalogError, VerificationError) as error:
                    left = min(settings.full_every, layer.left + layer.base.layer.depth)
                    layer = layer._replace(
                        base=None, why=f"{layer.base.name} can't be built on", warning=str(error), left=left,
                        reading=layer.reading and UNREADABLE)
        views.append((job, folder.name, copies, layer))
    clock_is_wrong = any(clock_went_back(copies, utc) for _, _, copies, _ in views)
    futures = {job.machine.uuid: (folder, future_verdicts(
        job, copies, local, clock_is_wrong, settings.pre_clean, layer, settings.verify_after), layer)
               for job, folder, copies, layer in views}
    return plan._replace(findings=tuple(findings)), futures


def foreseen_reading(services: Services, inventory: Inventory, job: Job, copies: Sequence[Copy],
                     layer: NextLayer) -> str:
    """How a run will read the disks, in words, as far as store and inventory tell."""
    good = [copy for copy in copies if copy.is_of(job.machine.uuid, job.method) and copy.is_good]
    try:
        ledger = services.catalog.ledger(inventory.pool_uuid, job.machine.uuid, job.method.value)
        why = reference_problem(ledger, services.catalog.identity(), good[-1] if good else None)
    except CatalogError as error:
        why = str(error).rstrip(".")
    disks = () if why else planned_disks(job, services.settings.exclude_disk)[0]
    for name, disk in zip(disk_folders(job.machine.disks), job.machine.disks):
        key = block_key(name)
        kept = ledger.current.disks.get(key) if disk in disks else None
        if disk in disks and not why and (kept is None or kept["uuid"] not in inventory.vdis):
            why = f"the reference's disk {key} is gone" if kept else f"disk {key} is not in the reference"
    if why:
        return f"all of it will be read, as {why}"
    return (f"what differs from the reference of {ledger.current.copy} will be read"
            + ("" if layer.base else ", and then all of it, to audit that"))


def future_verdicts(job: Job, copies: Sequence[Copy], now: datetime, clock_is_wrong: bool,
                    pre_clean: bool = False, layer: Optional[NextLayer] = None,
                    read_back: bool = False) -> List[Verdict]:
    """What a run of this job will say about these copies, first to make room, then when its own is made."""
    if clock_is_wrong:
        return [Verdict(copy, True, "the clock went back, so nothing is pruned") for copy in in_order(copies)]

    def judged(copies: Sequence[Copy], own: Rules) -> List[Verdict]:
        uuid = job.machine.uuid
        return judge(copies, uuid, job.method, rules_for(own, copies, uuid, job.method), now)

    first = judged(copies, job.rules._replace(newest=job.rules.newest - 1)) if pre_clean else []
    going = in_removal_order(first)
    left = [copy for copy in copies if copy.name not in {verdict.copy.name for verdict in going}]
    new = Copy("", "the new copy", now, False, job.method, job.machine.uuid, job.machine.name,
               next_sequence(copies), None, job.rules, "", 0, "", read_back=read_back)
    if layer is not None and layer.base is None:
        new = new._replace(layer=Layer(1, new.name, "", layer.why))
    elif layer is not None:
        before, place = layer.base.layer, (layer.base.name, layer.base.mark)
        new = new._replace(layer=before._replace(depth=before.depth + 1, base=layer.base.name,
                                                 holders=before.holders + (place,)))
    return going + [verdict for verdict in judged(left + [new], job.rules) if verdict.copy is not new]


# --- list -------------------------------------------------------------------------------

LIST_PATIENCE_S = 5            # what is shown is in the store: the pool only adds which VMs it still has


def note_in_pool(services: Services, rows: Sequence[Dict[str, Any]]) -> None:
    """Each row tells whether the pool still has its VM: None where no pool can be asked from here, or it is
    another pool's, or it does not tell its uuid."""
    inventory, uuids = None, set()         # type: Optional[Inventory], Set[str]
    try:
        if services.arguments.password != "-" or os.path.exists(fs_path(own_doors()[0].host)):
            with connected(services, changes_allowed=False, patience_s=LIST_PATIENCE_S) as (_, inventory):
                uuids = {machine.uuid for machine in inventory.machines}
    except (PoolError, ApiFailure) as error:
        services.log.info(f"the pool was not asked which VMs it knows: {error}")
    for row in rows:
        is_known = inventory is not None and row["uuid"] and row["pool"] in ("", inventory.pool_uuid)
        row["in_pool"] = row["uuid"] in uuids if is_known else None


def list_row(services: Services, catalog: Catalog, stored: StoredVm, now: datetime,
             machine: Optional[VirtualMachine] = None) -> Dict[str, Any]:
    """One VM and kind of the store as JSON shows it; ages in seconds. `machine`: where the pool was asked."""
    rules, why, verdicts = stored_verdicts(services, stored, now, machine)
    copies, seen = [], {}                  # type: List[Dict[str, Any]], Dict[str, List[Any]]
    for copy, verdict in zip(stored.copies, verdicts):
        verdict_word = copy.checked("verdict")
        if verdict_word and verdict_word != DAMAGED:
            with contextlib.suppress(CatalogError):
                if catalog.look_of(copy, seen) != copy.checks.get("look"):
                    verdict_word = "CHANGED SINCE IT WAS " + verdict_word
        copies.append({
            "name": copy.name, "taken_at": copy.taken_at.strftime("%Y-%m-%d %H:%M:%S"),
            "age_s": max(0, int((now - copy.taken_at).total_seconds())), "size": copy.size_bytes,
            "disks": list(copy.disks), "good": copy.is_good, "problem": copy.trouble,
            "of_older_program": copy.is_old, "image": copy.image,
            "verified_at": copy.checked("verified_at"), "verdict": verdict_word,
            "drilled_at": copy.checked("drilled_at"), "drill": copy.checked("drill"),
            "layer": copy.layer_words, "increment": copy.is_increment,
            "reading": [dict(zip(("disk", "how", "why"), row)) for row in copy.reading],
            "audit": audit_words(copy, stored.copies),
            "base": copy.layer.base if copy.layer else "", "depth": copy.layer.depth if copy.layer else None,
            "holders": sorted(copy.layer.held_by) if copy.layer else [],
            "left_out": list(copy.left_out), "pinned": copy.pin, "kept": verdict.keep,
            "reason": verdict.reason, "until": verdict.until,
            "fate": ("kept: " if verdict.keep else "goes with the next pruning: ") + verdict.text})
    return {"name": stored.name, "names": sorted({copy.vm_name for copy in stored.copies if copy.vm_name}),
            "folder": stored.folder, "uuid": stored.uuid, "pool": stored.pool, "copies": copies,
            "keep": rules[0].newest if rules else None, "rule": why,
            "rules": [dict(one._asdict()) for one in rules],
            "kind": stored.method.value if stored.method else None,
            "references": [] if stored.method is None else reference_rows(
                catalog, stored.pool, stored.uuid, stored.method)}


def reference_rows(catalog: Catalog, pool: str, uuid: str, method: Method) -> List[Dict[str, Any]]:
    """What the ledger of that VM and kind says to be in the pool, as JSON shows it."""
    try:
        ledger = catalog.ledger(pool, uuid, method.value)
    except BadLedger as error:
        return [{"problem": str(error)}]
    if ledger is None:
        return []
    if not is_of_store(ledger, catalog.identity()):
        return [{"problem": "its record is another store's, or of this one before it was moved; it is left"}]
    return [dict(one._asdict(), config=ledger.config, leaving=one in ledger.leaving)
            for one in ledger.references] + ([{"problem": ledger.distrust}] if ledger.distrust else [])


def reference_line(row: Mapping[str, Any]) -> str:
    """A row of reference_rows for people."""
    if "problem" in row:
        return f"  reference: {row['problem']}"
    return (f"  reference in the pool: snapshot {row['uuid']}, the state of {row['copy']}, kept by "
            f"{one_line(row['config'])}" + (", on its way out" if row["leaving"] else ""))


def list_text(rows: Sequence[Dict[str, Any]], strangers: Sequence[str]) -> str:
    """The VMs and kinds of the store, and what is not ours there, in lines for people."""
    lines, tell_pools = [], len({row["pool"] for row in rows} - {""}) > 1
    for row in rows:
        names = [quote_name(name) for name in row["names"] if name != row["name"]]
        before = f" (before: {', '.join(names)})" if names else ""
        pool = f"  of pool {row['pool'] or 'unknown'}" if tell_pools else ""
        lines.append(f"{quote_name(row['name'])}{before}  {row['uuid'] or 'uuid unknown'}  "
                     f"{row['kind'] or 'kind unknown'}  in {row['folder']}/{pool}")
        for copy in row["copies"]:
            state = "good" if copy["good"] else f"NOT GOOD ({copy['problem']})"
            checked = "never verified"
            if copy["verified_at"]:
                checked = f"{copy['verdict']}, verified {copy['verified_at'][:10]}"
            if copy["drilled_at"]:
                checked += f", {copy['drill']} on {copy['drilled_at'][:10]}"
            disks = f" ({', '.join(copy['disks'])})" if copy["disks"] else ""
            if copy["left_out"] and row["kind"] == Method.VM.value:
                disks += f" without {', '.join(copy['left_out'])}"
            kind = f"  {copy['layer']}" if copy["layer"] else ""
            reading = [(one["disk"], one["how"], one["why"]) for one in copy["reading"]]
            if is_reading_told(reading):
                kind += ", " + reading_words(reading) + (f", {copy['audit']}" if copy["audit"] else "")
            lines.append(f"  {copy['name']}  {format_duration(copy['age_s'])} old  "
                         f"{format_size(copy['size'])}{disks}{kind}  {state}  {checked}  {copy['fate']}")
        lines += map(reference_line, row["references"])
    if any(not copy["good"] for row in rows for copy in row["copies"]):
        lines.append(NOT_GOOD)
    return "\n".join(lines + [f"not ours, left alone: {one_line(stranger)}" for stranger in strangers])


# --- explain ----------------------------------------------------------------------------

LAST_ROUNDS = 3                # that are told of a VM


def explained(services: Services, inventory: Inventory, plan: Plan, hindrance: str) -> str:
    """Why each VM that is meant is, or is not, backed up, and how; UsageError if none is known. Without a
    catalog what the pool alone tells, or "". `hindrance`: why a run would end before its first VM."""
    vm, catalog, here = services.arguments.vm, services.catalog, ("", inventory.pool_uuid)
    if catalog is None:
        return "\n\n".join("\n".join(map(wrapped, explained_machine(
            services, inventory, plan, None, machine, []))) for machine in inventory.machines
            if vm == machine.name or vm.lower() == f"uuid:{machine.uuid}")
    listing = list_store(catalog)
    rounds, problems = History(catalog, services.settings.path).rounds(services.clock.utc())
    for one in [f"{one} It is left out." for one in listing.problems] + problems:
        services.log.info(one)
    bearers = [stored for stored in listing.vms if stored.bears(vm)]
    uuids = {stored.uuid for stored in bearers if stored.pool in here} - {""}
    machines = [machine for machine in inventory.machines
                if vm == machine.name or vm.lower() == f"uuid:{machine.uuid}" or machine.uuid in uuids]
    plan, futures = futures_of(services, inventory, plan, {machine.uuid for machine in machines})
    texts = []                             # type: List[List[str]]
    under_way = []                         # type: List[Tuple[str, Dict[str, str]]]
    with contextlib.suppress(CatalogError):    # where nothing can be locked, or only be read, nobody knows
        under_way += [(f"  a run that {one.plan.host} began at {format_local(parse_utc(one.plan.began_at))} "
                       "is going on: ", {machine.uuid: how_it_stands(one, machine.uuid, services.clock.utc())
                                         for machine in machines})
                      for one in rounds_under_way(services, inventory)]
    for machine in machines:
        stored = [one for one in listing.vms if one.pool in here and (
            one.uuid == machine.uuid or not one.uuid and one.bears(machine.name))]
        bearers = [one for one in bearers if one not in stored]
        ahead = [f"  if it is started here, it ends before its first VM: {hindrance}"] if hindrance else []
        ahead += [words + how[machine.uuid] for words, how in under_way]
        texts.append(explained_machine(services, inventory, plan, futures.get(machine.uuid), machine, ahead)
                     + explained_past(services, inventory, stored, rounds, machine))
    for _, group in itertools.groupby(bearers, lambda one: (one.uuid, one.pool)):
        stored = list(group)
        texts.append(explained_lost(services, inventory, stored[0])
                     + explained_past(services, inventory, stored, rounds))
    texts += [[f"{quote_name(name)} ({uuid}) is {kind} of the pool: such is never backed up."]
              for name, uuid, kind in inventory.others if vm == name or vm.lower() == f"uuid:{uuid}"]
    if not texts:
        near = near_names(vm, {machine.name for machine in inventory.machines} | {
            stored.name for stored in listing.vms} | {name for name, _, _ in inventory.others})
        raise UsageError(
            f"neither the pool {inventory.pool_title} nor {catalog.path} knows a VM {quote_name(vm)}. "
            + (f"Did you mean {' or '.join(map(quote_name, near))}? Upper and lower case count."
               if near and "uuid:" not in vm else
               "`preview` shows the VMs of the pool, `list` those in the store."))
    return "\n\n".join("\n".join(map(wrapped, lines)) for lines in texts)


def wrapped(text: str) -> str:
    """The text in lines that fit on a terminal, as far as names allow, indented as it is; nothing that stands
    in double quotes is parted, nor a line of a config, which is indented by six."""
    text, indent = one_line(text), " " * (len(text) - len(text.lstrip(" ")))
    if len(indent) >= 6:
        return text
    kept = re.sub(r'"(?:[^"\\]|\\.)*"', lambda match: match.group().replace(" ", "\0"), text)
    return "\n".join(paragraph(kept.lstrip(" "), indent, indent + "    ")).replace("\0", " ")


def explained_machine(services: Services, inventory: Inventory, plan: Plan,
                      future: Optional[Foreseen], machine: VirtualMachine, ahead: List[str]) -> List[str]:
    """Whether and how the VM is backed up, and what the next run does; first of that comes `ahead`."""
    settings, who = services.settings, f"{quote_name(machine.name)} ({machine.uuid})"
    this = "this command" if settings.is_by_hand else "this config"
    job = next((one for one in plan.jobs if one.machine.uuid == machine.uuid), None)
    about = lines_about(machine, settings, inventory)
    notes = [f"  {finding.severity.name.capitalize()}: {finding.sentence}" for finding in plan.findings
             if finding.subject in (machine.title, quote_name(machine.name))]
    if job is not None:
        problem = planned_disks(job, settings.exclude_disk)[1].rstrip(".")
        why = f"is selected by {this}, but will not be backed up: {problem}" if problem else \
            f"is backed up by {this}: {job.method.value}, chosen by {job.chosen_by}, " \
            f"{kept_text([job.rules], 'copy')}"
        about += nearest_lines(machine, settings, is_selected=True)
        return [f"{who} {why}.", "Why:"] + ["  " + one for one in about] + notes + explained_disks(
            job, settings) + ["The next run:"] + ahead + explained_run(job, settings, future)
    exclude = next((line for one, line in plan.excluded if one.uuid == machine.uuid), "")
    is_being_made = is_provisional(machine.name) and not exclude
    nothing = "nothing on the command line" if settings.is_by_hand else f"no line of {settings.source}"
    why = f"{exclude} leaves it out" if exclude else "it is still being made" if is_being_made else \
        "no line that selects it is of use" if about else f"{nothing} selects it"
    if is_being_made:
        about.append(provisional_text(machine))
    lines = [f"{who} is not backed up by {this}: {why}.", "Why:"]
    lines += ["  " + one for one in about or nearest_lines(machine, settings) or ["No line comes near it."]]
    lines += [] if exclude or is_being_made else line_to_add(machine, settings, inventory)
    return lines + notes + ["Disks:", f"  It has {disk_list(machine.disks) or 'no disk'}."]


def explained_disks(job: Job, settings: Configuration) -> List[str]:
    """Which disks of the VM go into the copy, and which do not, and why."""
    disks, problem = planned_disks(job, settings.exclude_disk)
    left_out = left_out_disks(job.machine, settings.exclude_disk)
    lines = ["Disks:"] + [f"  disk {disk_list((disk,))} goes into the copy" for disk in disks]
    if not job.machine.disks:
        lines.append("  It has no disk" + ("." if problem else ": the copy holds its settings alone."))
    lines += ["  " + words for words in foreseen_disks(job, settings.exclude_disk) if words != problem]
    return lines + [f"  disk {disk_list((disk,))} does not: vdi-export holds Disk 0 alone"
                    for disk in job.machine.disks if disks and disk not in disks and disk not in left_out]


def explained_run(job: Job, settings: Configuration, future: Optional[Foreseen]) -> List[str]:
    """What the next run does with the VM and its copies."""
    disks, problem = planned_disks(job, settings.exclude_disk)
    if problem:
        return ["  it fails for that, and leaves the copies as they are"]
    if future is None:
        return ["  what it does depends on the store"]
    folder, verdicts, layer = future
    lines = ["  " + words for words in foreseen_copy(job, folder, verdicts, layer)]
    if layer is None:
        lines.append("  it will be a full, as each copy is with incremental=no")
    if disks and (layer is None or not layer.reading):
        size = format_size(sum(disk.virtual_size for disk in disks))
        lines.append(f"  all of its disks will be read, {size}" + (
            ", and what differs from that copy stored" if layer is not None and layer.base else ""))
    going = [f"  then it removes {verdict.copy.name}: {verdict.text}"
             for verdict in verdicts if not verdict.keep]
    return lines + (going or ["  then it removes no copy of it"])


def line_to_add(machine: VirtualMachine, settings: Configuration, inventory: Inventory) -> List[str]:
    """What is to be added to the config for the VM to be backed up."""
    line, by_uuid = line_for(machine, settings), f"{Method.VM.value}=uuid:{machine.uuid}"
    same = sum(one.name == machine.name for one in inventory.machines)
    where = "give as TARGET" if settings.is_by_hand else f"add to {settings.source}"
    if not line:
        return [f"  To back it up, {where} its uuid, as no line can bear its name:", "      " + by_uuid]
    shared = f" (so it selects {counted(same, 'VM')} of that name)" if same > 1 else ""
    return [f"  To back it up, {where} one of these lines: its name{shared}; or its uuid, "
            "which stays when the VM is renamed:",
            "      " + (shell_word(line) if settings.is_by_hand else line), "      " + by_uuid]


def explained_lost(services: Services, inventory: Inventory, stored: StoredVm) -> List[str]:
    """Why a VM that only the store knows is not backed up."""
    here, uuid = stored.pool in ("", inventory.pool_uuid), stored.uuid or "uuid unknown"
    why = f"is a VM of another pool ({stored.pool})" if not here else \
        "does not tell its uuid, so which VM it is can't be known" if not stored.uuid else \
        f"is not in the pool {inventory.pool_title} any more; only its copies are left"
    lines = [f"{quote_name(stored.name)} ({uuid}) is not backed up from here: it {why}."]
    if here and stored.uuid:
        about = [one for one in services.settings.vm_export + services.settings.vdi_export
                 if one.is_literal and one.matches(lost_machine(stored))]
        lines += [f"  {one.line} still names it: each run reports that as an error, until the line is gone."
                  for one in about
                  if not any(one.matches(machine) for machine in inventory.machines)]
        lines.append(f"  `restore vm=uuid:{stored.uuid}` brings it back, with preserve=yes under this uuid.")
    return lines


def explained_past(services: Services, inventory: Inventory, stored: Sequence[StoredVm],
                   rounds: Sequence[Past], machine: Optional[VirtualMachine] = None) -> List[str]:
    """What rounds have made of the VM, what the store has of it, and what of it stays in the pool."""
    now, settings = services.clock.local(), services.settings
    pool = machine is None and stored[0].pool or inventory.pool_uuid
    uuid = machine.uuid if machine is not None else stored[0].uuid
    rows = [list_row(services, services.catalog, one, now, machine) for one in stored]
    copies = [copy for one in stored for copy in one.copies]
    good = sorted((copy for copy in copies if copy.is_good and not copy.aside), key=utc_of)
    lines = ["Last:"]
    if good:
        lines.append(f"  The newest good copy is {good[-1].folder}/{good[-1].name}, "
                     f"{age_text(good[-1].taken_at, now)} old.")
    else:
        lines.append(f"  There is no good copy of it in {services.catalog.path}.")
    source = settings.path if settings.is_by_hand else settings.source
    lines += ["  " + one for one in last_rounds_of(of_pool(rounds, pool), uuid, source)]
    lines += ["  " + one
              for one in other_configs(services.catalog.plans(), copies, pool, settings.path, uuid)]
    lines += [f"Copies: {len(copies)}, {len(good)} good"] if copies else []
    lines += ["  " + line for line in list_text([dict(row, references=[]) for row in rows], ()).split("\n")
              if line]
    return lines + explained_references(services, inventory, pool, uuid)


def explained_references(services: Services, inventory: Inventory, pool: str, uuid: str) -> List[str]:
    """What keep_reference has left of the VM in its pool, what it costs, and what becomes of it."""
    lines, settings, now = [], services.settings, services.clock.utc()
    there = inventory.vdis.union([one.uuid for one in inventory.references],
                                 [known for _, known, _ in inventory.others])      # under another name, too
    jobs = jobs_with_references(settings.of_file, inventory)
    for method in Method:
        rows = reference_rows(services.catalog, pool, uuid, method)
        for row in [row for row in rows if "problem" not in row]:
            size = format_size(sum(disk["size"] for disk in row["disks"].values()))
            at = format_local(parse_utc(row["at"]))
            lines.append(f"{reference_line(row)}; it was made on {at}, and takes on a thin SR what was "
                         f"written since, on a thick one up to {size}")
            if pool == inventory.pool_uuid and row["uuid"] not in there:
                lines.append("  but it is no longer there")
        lines += [reference_line(row) for row in rows if "problem" in row]
        ledger = None if any("problem" in row for row in rows) else services.catalog.ledger(
            pool, uuid, method.value)
        why = "" if ledger is None or pool != inventory.pool_uuid else why_reference_leaves(
            ledger, settings.path, jobs, inventory.host.short_name, now)
        does = "removes" if any(row.get("uuid") in there for row in rows) else "forgets"
        lines += [f"  the next run {does} it, as {why}"] if why else []
    return ["References:"] + lines if lines else []


def last_rounds_of(rounds: Sequence[Past], uuid: str, source: str) -> List[str]:
    """What became of the VM in the last rounds of the config, and since when it fails."""
    told = [(past.report, outcome) for past in rounds for outcome in past.report.outcomes
            if outcome.uuid == uuid]
    if not told:
        return [f"No round of {source} that is on record had it."]
    failed = list(itertools.takewhile(lambda one: one[1].error is not None, reversed(told)))
    lines = history_text(rounds, "uuid:" + uuid).split("\n")[-1 if failed else -LAST_ROUNDS:]
    if failed:
        lines.append(f"It fails since {format_local(failed[-1][0].began_at)}: "
                     f"{counted(len(failed), 'round')} in a row.")
    else:
        bad = [(report, outcome) for report, outcome in told[:-LAST_ROUNDS] if outcome.error is not None][-1:]
        lines += [f"The last that failed was that of {format_local(report.began_at)}: {outcome.error}"
                  for report, outcome in bad]
    if rounds[-1].report is not told[-1][0]:
        lines.append(f"The last round of {source}, of {format_local(rounds[-1].report.began_at)}, did not "
                     "have it.")
    return lines


def other_configs(plans: Sequence[Dict[str, Any]], copies: Sequence[Copy], pool: str, path: str,
                  uuid: str) -> List[str]:
    """Which other configs have the VM in their last plan on record, or made copies of it that are there."""
    lines = []                             # type: List[str]
    for plan in sorted(plans, key=lambda plan: plan["at"]):
        at, does = format_local(parse_utc(plan["at"])), "excludes it" if uuid in plan["excluded"] else \
            "backs it up" if plan["vms"].get(uuid) == "" else ""
        if does and plan["pool"] == pool and plan["config"] != path:
            lines.append(f"{plan['config']} {does}, by its last plan, of {at} on {plan['host']}.")
    makers = collections.Counter(copy.rules.config if copy.rules else "the older program"
                                 for copy in copies if copy.is_old or copy.rules)
    return lines + [f"{counted(number, 'copy', 'was')} made by {maker}."
                    for maker, number in sorted(makers.items()) if maker not in ("", path)]


# --- setup ------------------------------------------------------------------------------

SLOW_BYTES_S, FAST_BYTES_S = 60 * 10 ** 6, 200 * 10 ** 6     # of one export, on most machines and networks
RETENTION_KEYS = ("max_backups", "keep_daily", "keep_weekly", "keep_monthly", "keep_yearly", "pre_clean",
                  "incremental", "full_every", "keep_reference")


class Share(NamedTuple):
    """A mount that backups could go to, and the directory there, which is still to be made if `is_new`.
    `is_store`: there are backups already. The sizes in bytes, None where the file system tells none."""
    mount: Mount
    place: str
    is_new: bool
    is_store: bool
    free_bytes: Optional[int]
    whole_bytes: Optional[int]
    holds_sr: bool = False

    @property
    def title(self) -> str:
        """It in a few words."""
        return f"{self.mount.title}, {free_text(self.free_bytes)}"


class Seen(NamedTuple):
    """What setup has seen. `words` name Python, program, password and config on a command line; `others` are
    the shares beside the chosen one, in words. Of the VMs to back up: the size of their disks, and how much
    of that is read and stored at most. `hosts`: how many could run this config, one if it names
    another pool. `lonely`: files that are on this host alone. `present`: of how many good copies of a VM the
    store has most; `held_bytes`: the size of all."""
    words: Tuple[str, str, str, str]
    backup_dir: str
    mount: Optional[Mount]
    free_bytes: Optional[int]
    whole_bytes: Optional[int]
    vms: int
    size_bytes: int
    used_bytes: int
    hosts: int = 1
    others: Tuple[str, ...] = ()
    lonely: Tuple[str, ...] = ()
    present: int = 0
    held_bytes: int = 0

    @property
    def space(self) -> str:
        """The space of the store in words."""
        whole = "" if self.whole_bytes is None else f" of {format_size(self.whole_bytes)}"
        return free_text(self.free_bytes) + whole

    @property
    def is_shared(self) -> bool:
        """Can all of these hosts use the store, each knowing what the others do?"""
        return self.hosts > 1 and self.mount is not None and self.mount.locks_reach_hosts


def best_share(shares: Sequence[Share]) -> List[Share]:
    """The shares, the best first: those that all hosts see, then those that hold no SR, then where backups
    are, then where README has them, then where the most is free."""
    return sorted(shares, key=lambda share: (
        not share.mount.is_network, share.holds_sr, not share.is_store,
        not (share.mount.point + "/").startswith("/snapshots/"), -(share.free_bytes or 0)))


def proposed_settings(seen: Seen, given: Container[str],
                      proposal: Optional[Proposal]) -> Dict[str, Tuple[str, str]]:
    """For each key that is not among the given ones, and is to be in the config, its value, and why."""
    full, folder = format_size(seen.used_bytes), os.path.dirname(seen.words[3])
    found = {"backup_dir": (seen.backup_dir, f"On {seen.mount.title if seen.mount else 'its file system'}: "
                            f"{seen.space}." + "".join(" It could be on " + one + ", too."
                                                       for one in seen.others)),
             "pool_db_backup": ("1", "Dumps the pool database, too, for the day on which the whole pool is "
                                "gone."),
             "status_log": (folder + "/status.log", "One line for each VM and night, for other programs; "
                            "beside this config.")}
    if not {"vm-export", "vdi-export"} & set(given):
        found["vm-export"] = ("*", f"All VMs, those that are still to come, too: {counted(seen.vms, 'VM')} "
                              f"with disks of {format_size(seen.size_bytes)}, of which {full} are in use.")
    if seen.is_shared and not seen.mount.locks_are_local:
        found["hosts"] = ("all", f"The {seen.hosts} hosts of the pool share the work, as they can lock each "
                          "other out on this share.")
    if {"vm-export", "vdi-export", "exclude"} & set(given):
        found["wildcards"] = ("shell", "In selectors, * stands for any characters.")
    there = "" if proposal is None or proposal.copies != seen.present else \
        " As many of a VM are there by now: with fewer, the first night would remove some."
    if proposal and proposal.full_every:
        nights, least = str(proposal.copies), format_size((LEAST_FULLS + 1) * seen.used_bytes)
        found["incremental"] = ("yes", f"After a full only what has changed is stored: {LEAST_FULLS + 1} "
                                f"fulls of everything, of which {LEAST_FULLS} could stay, take {least}, and "
                                f"{ROOM_PERCENT} % of what is free are less.")
        found["max_backups"] = (nights, "So many nights stay, as increments: with "
                                f"{CHANGE_PERCENT} % changed in a night, two fulls and what rests on them "
                                f"take {format_size(proposal.needed_bytes)} at the worst moment.{there}")
        found["full_every"] = (nights, "So many nights make a chain; then the one before can go.")
        found["verify_after"] = ("yes", "Reads each image back before it counts: no chain goes before the "
                                 "next one's full has been proven.")
    elif proposal:
        found["max_backups"] = (str(proposal.copies), "So many fulls of each VM stay; with the new one, of "
                                f"everything, they take {format_size(proposal.needed_bytes)} at the worst "
                                f"moment.{there}")
    return {key: row for key, row in found.items() if key not in given}


def reckoned(seen: Seen, settings: Configuration) -> Tuple[Optional[Proposal], List[str]]:
    """How many copies there is room for, None if the settings say how many, or the store does not say how
    large it is; and what is to be warned of. UsageError if there is room for none."""
    proposal, warnings = None, []          # type: Optional[Proposal], List[str]
    free = None if seen.free_bytes is None else seen.free_bytes + seen.held_bytes
    held = f" beside {format_size(seen.held_bytes)} of copies that are there" if seen.held_bytes else ""
    where, needed = f"{seen.backup_dir}: {free_text(seen.free_bytes)}{held}, and", 2 * seen.used_bytes
    if free is not None and not any(key in settings.places for key in RETENTION_KEYS):
        proposal = proposed_retention(seen.used_bytes, free, seen.present)
        if proposal is None:
            raise UsageError(f"{where} one full of {counted(seen.vms, 'VM')} takes up to "
                             f"{format_size(seen.used_bytes)}. Name a larger share with backup_dir=, or "
                             "fewer VMs with vm-export= or exclude=; with max_backups=N nothing is reckoned. "
                             "Nothing was written.")
        needed = proposal.needed_bytes
    if free is not None and needed > free * ROOM_PERCENT // 100:
        fulls = proposal.copies + 1 if proposal else 2
        warnings.append(f"{where} {fulls} fulls of everything take up to {format_size(needed)}: an "
                        "old copy goes only when the new one is there. Give it more room, or back up fewer "
                        "VMs.")
    elif proposal and proposal.copies == 1:
        warnings.append(f"{where} one full of everything takes up to {format_size(seen.used_bytes)}: no more "
                        "than one copy of each VM can stay. Give it more room, or back up fewer VMs.")
    if seen.hosts > 1 and not seen.is_shared:
        on = f" lies on {seen.mount.title}" if seen.mount else ""
        warnings.append(f"{seen.backup_dir}{on}: the other hosts of the pool can't see it, or not each "
                        "other's locks there. So this host alone backs up the whole pool, and while it is "
                        "down, nobody does. A network share that all mount, with locks, mends that.")
    return proposal, warnings


def config_text(header: str, proposed: Mapping[str, Tuple[str, str]], given: Sequence[Setting]) -> str:
    """The config with these settings, each with its reason above it."""
    lines = paragraph(header, "# ")
    for option in OPTIONS:
        values = [one.value for one in given if one.name == option.name]
        reason = "As given."
        if option.name in proposed:
            value, reason = proposed[option.name]
            values = [value]
        if values:
            lines += [""] + paragraph(reason, "# ") + [f"{option.name}={value}" for value in values]
    return "\n".join(lines + ["", "# All keys, with what they mean: VmBackup.py help config"]) + "\n"


def selector_for(machine: VirtualMachine, machines: Iterable[VirtualMachine]) -> str:
    """The selector of that VM among all: its name in quotes, or its uuid, if the name is another's, too, or
    can't be typed."""
    if sum(one.name == machine.name for one in machines) > 1 or not machine.name.strip() \
            or not machine.name.isprintable():
        return "uuid:" + machine.uuid
    return '"' + re.sub(r'(["\\])', r"\\\1", machine.name) + '"'


def next_steps(seen: Seen, settings: Configuration, smallest: str, selector: str) -> str:
    """What the first night will take, the lines for the crontab, and how to try it at once with the smallest
    VM, if there is one."""
    python, program, password, config = seen.words
    is_all, folder = settings.hosts == "all", os.path.dirname(config)
    exports = min(settings.at_once, settings.workers * (seen.hosts if is_all else 1))
    fast_s, slow_s = ((1 + settings.verify_after) * seen.used_bytes / rate / exports
                      for rate in (FAST_BYTES_S, SLOW_BYTES_S))
    how_long = f"{format_duration(fast_s)} to {format_duration(slow_s)}" if slow_s > MINUTE_S else \
        "about a minute, or less"
    log = shell_word(folder + "/VmBackup-") + "$(hostname -s).log" if is_all else \
        shell_word(folder + "/VmBackup.log")

    def command(*words: str) -> str:
        return " ".join(map(shell_word, (python, program, password, config) + words))

    def crontab(when: str, *words: str) -> List[str]:
        line = f"{command(*words)} >> {log} 2>&1".replace("%", "\\%")      # to cron % is a line's end
        return ["", f"{when} {line}", ""]

    lines = paragraph(f"The first night reads about {format_size(seen.used_bytes)} of "
                      f"{counted(seen.vms, 'VM')}, and stores at most as much"
                      + ", which it reads back" * settings.verify_after
                      + f" ({free_text(seen.free_bytes)}). At 60 to 200 MB/s, as is common, with "
                      f"{counted(exports, 'export')} at a time, that takes {how_long}.") + [""]
    if password == PASSWORD_PLACE:
        lines += paragraph("Put the password into a file that only its owner can read, and the path of that "
                           f"file in the place of {PASSWORD_PLACE}:") + [
            "", f"{shell_word(python)} {shell_word(program)} PASSWORD create-password-file=FILE", ""]
    whose = " of every host of the pool" if seen.is_shared else " of this host only" * (seen.hosts > 1)
    lines += paragraph(f"For the crontab (crontab -e){whose}, every night at 0:10" + (
        ": they share the work." if is_all else ": the first to start does the work." if seen.is_shared
        else "."))
    lines += crontab("10 0 * * *")
    lines += paragraph(f"And{' for that of one host,' * (seen.hosts > 1)} a drill on Sundays: the VM that "
                       "was longest not drilled is imported for a while, compared and removed again.")
    lines += crontab("10 4 * * 0", "drill", "sample=1")
    if seen.lonely and seen.is_shared:
        lines += paragraph("These files lie on this host alone. Copy them to every other host, or begin "
                           "again with VmBackup.py in a directory on the share:") + [""]
        lines += [f"scp {shell_word(path)} {shell_word(f'root@HOST:{os.path.dirname(path)}/')}"
                  for path in seen.lonely] + [""]
    if smallest:
        lines += paragraph(f"To try it now, with the smallest VM, {smallest}:") + [
            "", command("vm-export=" + selector), ""]
    return "\n".join(lines[:-1])


PASSWORD_PLACE = "PASSWORD_FILE"


# =============================================================================
# 25. Commands
# =============================================================================
# One function per action, and what reads the config file and writes the password file.


def load_configuration(arguments: Arguments) -> Configuration:
    """The checked configuration of that command line; ConfigurationError or UsageError with all problems."""
    settings = list(arguments.settings)
    file_settings, problems = [], []       # type: List[Setting], List[str]
    source = "the command line"
    if arguments.action.name != SETUP and is_config_path(arguments.target):
        source = arguments.target
        file_settings, problems = read_settings(read_config_file(source), source)
    else:
        name, value = selector_of(arguments.target)
        settings.insert(0, Setting(name, value.strip(), "command line"))
    try:
        if arguments.action.name == SETUP:     # the config is still to be written
            return parse_configuration((), arguments.settings, source)
        path = config_path(arguments)
        found = parse_configuration(file_settings, settings, source, problems, arguments.action.needs_work,
                                    path)
        if settings and found.of_file:
            found.of_file = None
            with contextlib.suppress(ConfigurationError):      # alone it may lack something
                found.of_file = parse_configuration(file_settings, (), source, problems, False, path)
        return found
    except ConfigurationError as error:
        # who opens a backup_dir that is not there tells that; beside other problems it is told with them
        own = [setting for setting in settings + file_settings if setting.name == "backup_dir"]
        if arguments.action.name == SETUP and not own:         # it looks for one
            raise
        path = own[0].value if own else OPTIONS[OPTION_NAMES.index("backup_dir")].default
        problems, place = list(error.problems), own[0].place if own else "default"
        if path and not os.path.isdir(fs_path(path)):
            problems.append(f"{place}: backup_dir: {one_line(path)} is not there, or no directory. Is the "
                            "share mounted?")
        raise ConfigurationError(sorted(problems, key=line_number))


def read_config_file(path: str) -> bytes:
    """The bytes of the config file; UsageError if it can't be read."""
    try:
        if os.path.isdir(fs_path(path)):
            raise UsageError(f"the config {path} is a directory; a file is needed.")
        with open(fs_path(path), "rb") as file:
            content = file.read(MEBIBYTE + 1)
        if len(content) > MEBIBYTE:
            raise UsageError(f"the config {path} is larger than 1 MiB: is it the right file?")
        return content
    except OSError as error:
        raise UsageError(f"the config {path} can't be read: {os_reason(error)}. Is the share mounted?")


def create_password_file(password: str, path: str) -> str:
    """The password is in a new file that only its owner can read; the sentence that says so."""
    try:
        fd = os.open(fs_path(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise UsageError(f"{path} exists already and was left as it is: remove it first.")
    except OSError as error:
        raise UsageError(f"{path} can't be made: {os_reason(error)}. Name a file in a directory that is "
                         "there, and can be written.")
    with open(fd, "wb") as file:
        os.fchmod(fd, 0o600)
        file.write(base64.b64encode(password.encode("utf-8", "surrogateescape")) + b"\n")
    return (f"The password is in {path}, which only its owner can read. base64 hides it from a glance, not "
            "from a reader: keep the file's mode.")


# --- setup ----------------------------------------------------------------------------------


SHARE_LIMIT_S = 20                 # for a look at one mount: a dead server keeps nobody from the others
SR_PLACES = ("/run/sr-mount/", "/var/run/sr-mount/", "/var/opt/xen/", "/var/xapi/")
HOST_PLACES = ("/boot/", "/dev/", "/proc/", "/run/", "/sys/", "/usr/", "/var/")
NO_CONTENT = re.compile(r"lost\+found|\.snapshots?|~snapshot|\.zfs|\.Trash.*|@eaDir|[@#]recycle|#snapshot|"
                        r"\$RECYCLE\.BIN|System Volume Information|\.nfs.*", re.IGNORECASE)
BACKUPS = "BACKUPS"
NOT_IN_CONFIG = re.compile("[\n\r\ud800-\udfff]")


def share_on(mount: Mount) -> Share:
    """What backups would find on that mount; CatalogError if they can't go there."""
    catalog = Catalog(mount.point)
    if catalog.mount is None or catalog.mount.device != mount.device:
        raise CatalogError("another mount hides it.")
    if mount.is_read_only or not catalog.is_writable():
        raise CatalogError("it is not writable.")
    names = [name for name in catalog.root.names() if not NO_CONTENT.fullmatch(name)]

    def holds_copies(name: str) -> bool:
        with contextlib.suppress(CatalogError), catalog.root.child(name) as folder:
            return any(parse_copy_name(one) for one in folder.names())
        return False

    place, is_new = mount.point.rstrip("/"), False
    is_store = STATE_FOLDER in names or any(map(holds_copies, names))
    if catalog.root.is_directory(BACKUPS):
        place, is_store = place + "/" + BACKUPS, True
    elif names and not is_store:
        place, is_new = place + "/" + BACKUPS, True
    return Share(mount, place, is_new, is_store, catalog.free_bytes(), catalog.whole_bytes())


def holds_sr(mount: Mount, mounts: Iterable[Mount]) -> bool:
    """Is what is mounted there, or a directory of it, an SR of this host, too?"""
    export = mount.source.rstrip("/") + "/"
    return any((one.point + "/").startswith(SR_PLACES) and (one.source + "/").startswith(export)
               for one in mounts)


def find_shares(run: Run, hosts: int) -> Tuple[List[Share], List[str]]:
    """The mounts that backups of a pool with so many hosts could go to, the best first; and those that looked
    so, with why they can't."""
    mounts = read_mounts(read_text_file(MOUNTS_FILE))
    taken = {mount.device for mount in mounts if (mount.point + "/").startswith(SR_PLACES)}
    own = {mount.disk for mount in mounts
           if mount.point == "/" or (mount.point + "/").startswith(HOST_PLACES)}
    knows_own = all(mount.disk for mount in mounts if mount.point == "/")
    found, passed = [], []                 # type: List[Share], List[str]
    for mount in mounts:
        is_local = hosts == 1 and knows_own and mount.disk not in own | {""}
        if mount.device in taken or not (mount.is_network or is_local):
            continue
        taken.add(mount.device)
        try:
            if NOT_IN_CONFIG.search(mount.point) or mount.point != mount.point.strip():
                raise CatalogError("no config can name it.")
            found.append(within(SHARE_LIMIT_S, "looking at it", functools.partial(share_on, mount),
                                run.services.signals.is_hurried)._replace(holds_sr=holds_sr(mount, mounts)))
        except CatalogError as error:
            passed.append(f"{mount.title}: {error}")
        run.services.signals.check()
    return best_share(found), passed


def no_share_text(passed: Sequence[str]) -> str:
    """What to do where no mount will do."""
    return "\n".join(paragraph(
        "no share to back up to was found: looked for was a mounted, writable network file system (NFS, "
        "CIFS and the like) that is no SR of the pool.") + [f"* {one}" for one in passed] + paragraph(
            "Mount one, with a line in /etc/fstab so that it is there after a restart, and run setup again; "
            "or name a directory with backup_dir=. One of:") + [
            "    mkdir -p /snapshots && mount -t nfs SERVER:/EXPORT /snapshots",
            "    mkdir -p /snapshots && mount -t cifs -o credentials=FILE //SERVER/SHARE /snapshots",
            "Nothing was written."])


def command_setup(run: Run) -> None:
    """A config that fits pool and host is written, whole or not at all, and shown with what comes next."""
    services, arguments, above = run.services, run.services.arguments, None
    program = os.path.abspath(__file__)
    path = fs_text(os.path.abspath(fs_path(arguments.parameters["config"] or os.path.join(
        os.path.dirname(program), "vmbackup.cfg"))))
    folder = path if os.path.isdir(fs_path(path)) else os.path.dirname(path)
    if folder == path or not os.path.isdir(fs_path(folder)):
        raise UsageError(f"config={path}: {folder} is " + ("a directory" if folder == path else "not there")
                         + f": name a file in a directory, such as config={folder}/vmbackup.cfg. Nothing was "
                         "written.")
    if os.path.lexists(fs_path(path)):
        raise UsageError(f"{path} exists already and was left as it is; config=OTHER writes another, or "
                         f"`VmBackup.py - {shell_word(path)} preview` shows what it does.")
    arguments = arguments._replace(settings=tuple(      # cron starts in another directory
        one._replace(value=fs_text(os.path.abspath(fs_path(one.value))))
        if one.value and OPTIONS[OPTION_NAMES.index(one.name)].kind == "path" else one
        for one in arguments.settings))
    services = run.services = services._replace(arguments=arguments)
    for one in arguments.settings + (Setting("config", path, "command line"),):
        if NOT_IN_CONFIG.search(one.value):
            raise UsageError(f"{one.place}: {one.name}: a line of a config can't hold a line break, nor what "
                             "is not UTF-8. Nothing was written.")
    find_xe(services.settings)
    with connected(services, changes_allowed=False) as (_, inventory):
        pass                               # what it reads is all that is needed
    hosts = 1 if services.settings.pool else len(inventory.host_uuids)
    shares, passed = [], []                # type: List[Share], List[str]
    if "backup_dir" not in services.settings.places:
        shares, passed = find_shares(run, hosts)
        if not shares:
            raise UsageError(no_share_text(passed))
    new = [share for share in shares[:1] if share.is_new]
    try:
        for share in new:
            run.catalog = run.in_store(f"opening {share.mount.point}",
                                       lambda: Catalog(share.place, share.mount.point), SHARE_LIMIT_S)
        content, text = new_config(run, inventory, path, hosts, shares, passed)
        with NewFile(path, f".{os.getpid()}") as file, storage_errors(f"writing {path}", is_elsewhere=True):
            os.fchmod(file.fd, 0o600 if run.services.settings.ping_url else 0o644)
            write_all(file.fd, content)
            for share in new:              # last of all, so that whatever ends us leaves nothing
                above = Directory.open_path(share.mount.point)
                run.in_store(f"making {share.place}", lambda: above.child_made_if_missing(BACKUPS).close(),
                             SHARE_LIMIT_S)
            file.complete()
        above = None
    except CatalogError as error:
        raise UsageError(f"{error} Nothing was written.")
    finally:
        if above is not None:
            run.tidy(f"removing {shares[0].place}", lambda: above.remove_if_empty(BACKUPS))
    services.log.show(text)


def new_config(run: Run, inventory: Inventory, path: str, hosts: int, shares: Sequence[Share],
               passed: Sequence[str]) -> Tuple[bytes, str]:
    """The config that is to be written at that path, for a store on the first share, if there are any; and
    what is to be shown of it. UsageError if it would not pass preview."""
    arguments, given = run.services.arguments, run.services.arguments.settings
    extra = [Setting("backup_dir", share.place, "setup") for share in shares[:1]]
    if not any(one.name in ("vm-export", "vdi-export") for one in given):
        extra.append(Setting("vm-export", "*", "setup"))
    settings = parse_configuration((), list(given) + extra, "setup")
    run.services = run.services._replace(settings=settings)
    services = prepared(run, SHARE_LIMIT_S)
    check_hosts(services)
    check_own_disk(services)
    plan = plan_for(settings, inventory)
    jobs, (_, futures) = plan.jobs, run.in_store("looking at the copies", lambda: futures_of(
        services, inventory, plan), FOR_EVER_S)
    own = [[verdict.copy for verdict in own_verdicts(job, futures[job.machine.uuid][1])
            if verdict.copy.method is job.method] for job in jobs]
    disks = {job.machine: planned_disks(job, settings.exclude_disk)[0] for job in jobs}
    is_raw = settings.vdi_export_format == "raw"       # such an image has empty space, too
    used = {job.machine: sum(disk.virtual_size if job.method is Method.VDI and is_raw else
                             inventory.used[disk.vdi_ref] for disk in disks[job.machine]) for job in jobs}
    seen = Seen(setup_words(arguments.password, path), settings.backup_dir, services.catalog.mount,
                run.in_store("asking for the free space", services.catalog.free_bytes),
                run.in_store("asking for the size", services.catalog.whole_bytes), len(jobs),
                sum(disk.virtual_size for some in disks.values() for disk in some), sum(used.values()), hosts,
                tuple(share.title for share in shares[1:]), present=max(map(len, own), default=0),
                held_bytes=sum(copy.size_bytes for copies in own for copy in copies))
    seen = seen._replace(lonely=tuple(one for one in sorted(seen.words[1:])
                                      if os.path.isabs(one) and not is_on_network(one)))
    proposal, warnings = reckoned(seen, settings)
    if seen.mount is not None and holds_sr(seen.mount, read_mounts(read_text_file(MOUNTS_FILE))):
        warnings.append(f"{seen.backup_dir} lies on {seen.mount.title}, which holds an SR, too: the VMs "
                        "there and their backups could be lost together. backup_dir= names another place.")
    content = config_text(
        f"Written by VmBackup.py setup on {services.clock.local():%Y-%m-%d} for the pool "
        f"{inventory.pool_title} ({counted(len(inventory.host_uuids), 'host')}, master "
        f"{inventory.master.short_name}). A line that begins with # is a comment.",
        proposed_settings(seen, [one.name for one in given], proposal), given).encode("utf-8")
    found, problems = read_settings(content, path)
    settings = parse_configuration(found, (), path, problems, True, fs_text(os.path.realpath(fs_path(path))))
    services = services._replace(settings=settings, arguments=arguments._replace(target=path, settings=()))
    plan, futures, preview = run.in_store("looking at the copies", lambda: foreseen(
        services, inventory, plan_for(settings, inventory)), FOR_EVER_S)
    going = [sum(not verdict.keep for verdict in own_verdicts(job, futures[job.machine.uuid][1]))
             for job in plan.jobs]
    if max(going, default=0) > 1:
        behind = any(one.keep for one in settings.vm_export + settings.vdi_export)
        warnings.append(f"the first night removes {counted(sum(going), 'good copy')} that are there, and "
                        f"makes {len(going)}: the preview names them. max_backups={seen.present}"
                        + f", or :{seen.present} where a selector has another number," * behind
                        + " keeps them.")
    errors = [f"{finding.subject}: {finding.sentence}" for finding in plan.findings
              if finding.severity is Severity.ERROR]
    if errors:
        raise UsageError("\n".join(errors + ["Nothing was written."]))
    run.findings += list(plan.findings) + [Finding(Severity.WARNING, "setup", one) for one in warnings]
    smallest = min((machine for machine in used if disks[machine]), default=None,
                   key=lambda machine: (used[machine], machine.name))
    text = content.decode("utf-8")
    if settings.ping_url:                  # it is a secret: who knows it can answer for us
        text = text.replace(settings.ping_url, "***")
    parts = [f"{path} is written:", re.sub("(?m)^(?=.)", "    ", text.rstrip("\n")), preview]
    parts += ["\n".join(paragraph(f"{word}: {one}")) for word, told in (("Passed over", passed), (
        "Warning", warnings)) for one in told]
    parts.append(next_steps(seen, settings, smallest.title if smallest else "",
                            selector_for(smallest, inventory.machines) if smallest else ""))
    services.signals.check()
    return content, "\n\n".join(parts)


def setup_words(password: str, path: str) -> Tuple[str, str, str, str]:
    """What a crontab has for Python, this program, the password, which itself is not repeated, and that
    config."""
    if password != "-":
        is_file = os.path.isfile(fs_path(password))
        password = fs_text(os.path.abspath(fs_path(password))) if is_file else PASSWORD_PLACE
    return sys.executable or "/usr/bin/python3", fs_text(os.path.abspath(__file__)), password, path


def is_on_network(path: str) -> bool:
    """Does the file, or what is to be one, lie where other hosts can see it?"""
    mount = Catalog(os.path.dirname(path)).mount
    return mount is not None and mount.is_network


def check_own_disk(services: Services) -> None:
    """UsageError if the store lies on another part of the disk that the host itself lies on."""
    settings, mount = services.settings, services.catalog.mount
    own = {one.disk for one in read_mounts(read_text_file(MOUNTS_FILE)) if one.point == "/"} - {""}
    if mount is not None and mount.disk in own and not services.catalog.is_on_root \
            and settings.require_mount != "no":
        raise UsageError(f"{settings.places['backup_dir']}: backup_dir: {settings.backup_dir} lies on the "
                         f"host's own disk ({mount.source}), and would be lost with it. Name a share, or "
                         "another disk; require_mount=no allows it.")


# --- preview and backup ----------------------------------------------------------------------


def command_preview(run: Run) -> None:
    """Shown: the plan, and what retention would then remove."""
    with connected(prepared(run), changes_allowed=False, is_read=False) as (services, identity):
        inventory, bare_plan = read_and_plan(services, identity)
    plan, _, text = run.in_store("looking at the copies", lambda: foreseen(services, inventory, bare_plan),
                                 FOR_EVER_S)
    services.log.show(text)
    run.findings += plan.findings
    run.findings += [Finding(Severity.WARNING, "", warning) for warning in services.settings.warnings]


def command_explain(run: Run) -> None:
    """Shown: why a VM is, or is not, backed up by the config, by which line, and how."""
    settings, hindrance = run.services.settings, ""
    away = None                            # type: Optional[BackupError]
    if not run.services.arguments.vm:
        raise UsageError("explain which VM? Name one: explain web; `preview` shows all of the pool.")
    try:
        services = prepared(run)
    except UsageError as error:            # to explain, a store that can be read is enough
        hindrance, services = str(error), run.services
        try:
            services = services._replace(catalog=run.in_store("opening the store",
                                                              lambda: open_store(settings)))
        except (UsageError, StorageMisbehaved) as error:
            away = error                   # which line selects a VM is told without it
    except StorageMisbehaved as error:
        away, services = error, run.services
    with connected(services, changes_allowed=False, is_read=False) as (services, identity):
        inventory, plan = read_and_plan(services, identity)
    try:
        text = run.in_store("looking at the copies", lambda: explained(services, inventory, plan, hindrance))
    except StorageMisbehaved as error:
        away, text = error, explained(services._replace(catalog=None), inventory, plan, hindrance)
    if text:
        services.log.show(text)
    if away is not None:
        raise away
    run.findings += [Finding(Severity.WARNING, "", warning) for warning in settings.warnings]


def command_backup(run: Run) -> None:
    """All that the config selects was backed up, or this host's part of it, or what was not is told."""
    run.wording = BACKUP_WORDING
    run.is_hooked = True
    run.hook("before_run", {})
    with connected(prepared(run), is_read=False) as (services, identity):
        check_hosts(services)
        name = run_id(services.clock.utc(), identity.host.short_name)
        lock, part, text = run.in_store("locking this config", lambda: take_config_lock(
            services, identity, name))
        run.part = part
        if part == LEAD:
            run.lock = lock
            if services.settings.ping_url:
                try:
                    ping(services.settings.ping_url + "/start")
                except BackupError as error:
                    run.tell([Finding(Severity.WARNING, "ping_url", str(error))])
            lead_new(run, services, identity, name, text)
        elif part == JOIN:
            join(run, services, identity, name, lock)


def check_hosts(services: Services) -> None:
    """UsageError if hosts are to share work in a store where they can't lock each other out."""
    if services.catalog.locks_are_local and services.settings.hosts == "all":
        raise UsageError(f"{services.settings.places['hosts']}: hosts=all: the mount of "
                         f"{services.catalog.path} keeps locks within this host, so hosts can't share "
                         "work there. Mount it without nolock, local_lock or nobrl, or set hosts=first. "
                         "Nothing was started.")


def lead_new(run: Run, services: Services, identity: Inventory, name: str, before: Dict[str, Any]) -> None:
    """A new round of that id was led to its end, under the config's lock, whose text told `before`."""
    inventory, plan = read_and_plan(services, identity)
    if services.catalog.locks_are_local:
        services.log.info(f"the mount of {services.catalog.path} keeps locks within this host: "
                          "what a run of another host left is touched only after a day.")
    run.begin(services, inventory)

    def begun() -> Tuple[Round, List[Finding]]:
        place = Round.place(services.catalog, services.settings, inventory.pool_uuid)
        last = last_round(place)
        run.before = unfinished_text(last, before)
        if last is not None and not last.is_over():        # whoever of it was frozen does nothing more there
            last.put(ROUND_END, {"how": "was left by all", "at": format_utc(services.clock.utc())})
        planned, findings = round_plan(services, inventory, plan, name, last)
        return Round.begin(place, planned), findings

    try:
        work, findings = run.in_store("planning the round", begun, FOR_EVER_S)
        Leader(run, work, Exporter(run.services, make_xe(services))).lead(plan, findings)
    finally:
        run.tidy("keeping a reserve", lambda: keep_reserve(services.catalog))


def join(run: Run, services: Services, identity: Inventory, name: str, lock: LockFile) -> None:
    """This host has taken its part in the round that goes on, or a warning says why it can't; if its leader
    died meanwhile, this host has led on, or, where there was no plan yet, a round of that id."""
    log, signals = services.log, services.signals
    place = run.in_store("looking for the round", lambda: Round.place(
        services.catalog, services.settings, identity.pool_uuid))
    signals.sleep(IDLE_PAUSE_S)            # a text that is a dead run's gives way to the new one's
    work, text = None, lock.text()         # type: Optional[Round], Dict[str, Any]
    for has_time in signals.until(services.patience_s + SILENCE_S):
        if lock.take():
            before = lock.text()
            if has_ended_well(before):
                lock.release()
                run.wording = None
                log.info(f"the round that {told(before, 'host')} led has ended meanwhile: nothing is left to "
                         "do.")
                return
            with contextlib.suppress(CatalogError):    # a helper of the dead leader's round leads that on
                work = run.in_store("reading the plan", lambda: Round.opened(place, told(before, "round")))
            if work is not None and not work.is_over() and before.get("state") == "running":
                text = before
                lock.release()
                break
            run.lock, run.part = lock, LEAD
            tell_running(services, identity, lock, name)
            lead_new(run, services, identity, name, before)
            return
        text = lock.text()
        if told(text, "version") != VERSION:
            run.wording = None
            run.tell([Finding(Severity.WARNING, services.settings.source, f"{told(text, 'host')} leads its "
                              f"round with VmBackup {told(text, 'version')}, and this is {VERSION}: this "
                              "host takes no part. Use one version on all hosts.")])
            return
        with contextlib.suppress(NotThere, WrongKind):
            work = run.in_store("reading the plan", lambda: Round.opened(place, told(text, "round")))
            break
        if not has_time:
            raise LockHeld(f"{told(text, 'host')} leads a round of {services.settings.source}, but has made "
                           "no plan for too long. Is that host alive? Nothing was started.")
    run.wording = None
    run.begin(services, identity)
    off_s = run.in_store("comparing the clocks", lambda: clock_off_s(
        services, work, run.services.journal.name))
    if abs(off_s) > CLOCKS_DIFFER_S:
        run.tell([Finding(Severity.WARNING, services.settings.source, "the clock of this host is "
                          f"{abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} the store's: it takes "
                          "no part in the round. Set it right.")])
        return
    # who only looks whether this host takes part holds it for a moment
    host_lock = run.in_store("taking part", lambda: work.lock("host-" + identity.host.uuid))
    if not any(host_lock.take() for _ in itertools.takewhile(bool, signals.until(LOCK_TEXT_PATIENCE_S, 0.2))):
        raise LockHeld(f"another run on this host takes part in the round that {told(text, 'host')} leads. "
                       "Nothing was started; `status` shows how far it is.")
    log.info(f"VmBackup {VERSION}: {identity.host.short_name} takes part in the round of "
             f"{services.settings.source} that {told(text, 'host')} leads.")
    helper, crew = Helper(run, work, Exporter(run.services, make_xe(services)), lock), Crew(services, work)
    try:
        with helper.at_work():
            helper.work()
        if run.in_store("looking at the round", work.is_over):
            crew.wait(signals)
        run.look_again()
    finally:
        if not helper.leads_on:
            with signals.shielded():
                crew.end()
            run.findings.clear()           # the leader tells them
            run.snapshots.findings.clear()
    if helper.leads_on:
        run.lock, run.wording, run.status_log.host = lock, BACKUP_WORDING, identity.host.short_name
        with contextlib.suppress(CatalogError):
            tell_running(services, identity, lock, work.plan.id)
        run.part = LEAD
        leader = Leader(run, work, helper.exporter)
        leader.take_over(helper)
        leader.lead(crew=crew)
        return
    log.info(f"{counted(helper.taken(), 'VM')} of the round that {told(text, 'host')} leads "
             f"{'was' if helper.taken() == 1 else 'were'} taken by {identity.host.short_name}.")


def work_along(run: Run, name: str) -> None:
    """One more worker of this host has done its share of that round, which the run that started it knows."""
    settings = run.services.settings
    services = run.services._replace(catalog=run.in_store("opening the store", lambda: open_store(settings)))
    with connected(services, is_read=False) as (services, identity):
        place = run.in_store("looking for the round", lambda: Round.place(
            services.catalog, settings, identity.pool_uuid))
        work = run.in_store("reading the plan", lambda: Round.opened(place, name))
        run.begin(services, identity)
        worker = Worker(run, work, Exporter(run.services, make_xe(services)))
        try:
            with worker.at_work():
                worker.work()
            run.look_again()
        except Interrupted:                # who started us ends us so, too, when all is done
            if not run.in_store("looking at the round", work.is_over):
                raise
        finally:
            run.findings.clear()           # the leader tells them
            run.snapshots.findings.clear()


def command_status(run: Run) -> None:
    """Shown: the round that is going on, or how the last one ended."""
    services, settings = run.services, run.services.settings
    catalog = run.in_store("opening the store", lambda: open_store(settings))
    services.log.show(run.in_store("looking at the rounds", lambda: status_text(
        catalog, settings.path, settings.source), FOR_EVER_S))


def command_history(run: Run) -> None:
    """Shown: the rounds of the config that are over, or what became of a VM in each."""
    services, settings, vm = run.services, run.services.settings, run.services.arguments.vm
    catalog = run.in_store("opening the store", lambda: open_store(settings))
    rounds, problems = run.in_store("reading the history", lambda: History(
        catalog, settings.path).rounds(services.clock.utc()), FOR_EVER_S)
    services.log.show(history_text(rounds, vm) or f"No round of {settings.source}"
                      + (f" with {quote_name(vm)} is on record in {catalog.path}: `explain` tells why." if vm
                         else f" is on record in {catalog.path}: has a backup ended there yet?"))
    for problem in problems:
        services.log.warning(problem)


def command_check(run: Run) -> None:
    """Shown: one line for a monitor, whose exit status the run has. What can't be known is UNKNOWN."""
    services, given = run.services, run.services.arguments.parameters
    crit_s, now = given["crit_age"] * HOUR_S, services.clock.utc()
    warn_s = min(given["warn_age"] * HOUR_S, crit_s)

    def look() -> Tuple[Alarm, str]:
        catalog = open_store(services.settings)
        rounds, problems = History(catalog, services.settings.path).rounds(now, METRICS_DAYS, is_brief=True)
        if not rounds:
            raise BackupError(f"no round of {services.settings.source} is on record in {catalog.path}: has a "
                              "backup ended there yet?" + "".join(" " + problem for problem in problems))
        vms = [one for pool in sorted({past.pool_uuid for past in rounds})
               for one in watched(of_pool(rounds, pool))]
        # a day more, as clocks differ
        condemned = catalog.condemned(min(one.told_at.timestamp() for one in vms) - DAY_S) if vms else ()
        ages, bad = [], []                 # type: List[Tuple[str, Optional[float]]], List[str]
        for one in vms:
            held = held_now(catalog, one, condemned, now - timedelta(seconds=warn_s))
            bad += held.bad
            ages.append((one.last.title, (now - parse_utc(held.newest_at)).total_seconds()
                         if held.newest else None))
        return check_line(ages, bad, warn_s, crit_s, catalog.free_bytes(), problems)

    try:
        alarm, line = run.in_store("looking at the copies", look, CHECK_LIMIT_S)
    except BackupError as error:
        alarm, line = Alarm.UNKNOWN, alarm_line(Alarm.UNKNOWN, str(error))
    run.status = int(alarm)
    services.log.show(line)


def command_report(run: Run) -> None:
    """The page is written anew."""
    services, path = run.services, run.services.settings.report_html
    if not path:
        raise UsageError("report_html is not set, so there is no page to write: add report_html=PATH to the "
                         "config, or to this command.")
    services = services._replace(catalog=run.in_store("opening the store",
                                                      lambda: open_store(services.settings)))
    rounds, problems = run.in_store("reading the history", lambda: History(
        services.catalog, services.settings.path).rounds(services.clock.utc(), PAGE_DAYS), FOR_EVER_S)
    rounds = of_pool(rounds, rounds[-1].pool_uuid) if rounds else []
    store = run.in_store("listing the store", lambda: store_of(services), FOR_EVER_S)
    page = page_of(services, rounds, store, this_host_name(), problems)
    put_for_all(path, page_text(page))
    services.log.show(f"{path} is written: {counted(len(page.vms), 'VM')}.")


def command_test_mail(run: Run) -> None:
    """A mail that says that mail works is with the server."""
    services, settings = run.services, run.services.settings
    if not settings.mail_to:
        raise UsageError("mail_to is not set, so there is nobody to write to: add mail_to=USER@HOST to the "
                         "config, or to this command.")
    host = this_host_name()
    consequence = {"always": "Every backup run will send a report to this address.",
                   "problems": "Backup runs will send a report to this address when they had problems.",
                   "never": "But mail_when=never is set, so no backup run will send a report."}[
                       settings.mail_when]
    Mailer(services, None).send_test(
        f"OK: test mail ({host})",
        f"Somebody asked for this mail with `VmBackup.py ... test-mail` on host {host}. As you can read it, "
        f"the mail settings of {settings.source} work. {consequence}\n")


# --- verify, list and prune: what is in the store ------------------------------------------------


def command_list(run: Run) -> None:
    """Shown: what is in the store, as text or JSON, and what of it the pool has no more."""
    services, vm = run.services, run.services.arguments.vm
    show, as_json = services.log.show, services.arguments.parameters["format"] == "json"
    services.log.is_for_program = as_json

    def look() -> Tuple[Catalog, List[Dict[str, Any]], List[str]]:
        catalog = open_store(services.settings)
        listing, now = chosen_vms(catalog, vm, services.log), services.clock.local()
        rows = [list_row(services, catalog, stored, now) for stored in listing.vms]
        return catalog, rows, [] if vm else listing.strangers

    catalog, rows, strangers = run.in_store("listing the store", look, FOR_EVER_S)
    if not as_json and rows + strangers:
        show(list_text(rows, strangers))
    note_in_pool(services, rows)
    for row in rows:
        if not as_json and row["in_pool"] is False:
            show(f"NO LONGER IN THE POOL: {quote_name(row['name'])}  {row['uuid'] or 'uuid unknown'}  in "
                 f"{row['folder']}/")
    if as_json:
        show(json.dumps({"backup_dir": catalog.path, "vms": rows, "strangers": strangers}, indent=1,
                        sort_keys=True))
    else:
        copies, free = [copy for row in rows for copy in row["copies"]], catalog.free_bytes
        show(f"{counted(len(copies), 'copy')} of {counted(len({row['uuid'] for row in rows}), 'VM')}, "
             f"{sum(copy['good'] for copy in copies)} good, "
             f"{free_text(run.in_store('asking for the free space', free))}.")


def command_pin(run: Run) -> None:
    """The copy is pinned, or with unpin no longer; what a person has to know of that is shown."""
    services, given, vm = run.services, run.services.arguments.parameters, run.services.arguments.vm
    action, stamp = services.arguments.action.name, given["stamp"]

    def choose() -> Tuple[Catalog, Copy]:
        if not vm or stamp in ("", "latest"):
            raise UsageError(f"{action} which copy? Name a VM and a stamp: {action} web 2026-11-26-001000; "
                             "`list` shows both.")
        catalog = open_store(services.settings)
        return catalog, choose_copy(catalog, vm, stamp, services.log)

    catalog, copy = run.in_store("looking for the copy", choose, FOR_EVER_S)
    if action == "unpin":
        run.in_store("unpinning the copy", lambda: catalog.unpin(copy))
        told = "is no longer pinned: the next run judges it by the rules" if copy.pin else "was not pinned"
    else:
        text = (f"{given['why']}\npinned {services.clock.local():%Y-%m-%d %H:%M:%S} by {this_user()} on "
                f"{this_host_name()}\n")
        is_new = run.in_store("pinning the copy", lambda: catalog.pin(copy, text))
        told = "is pinned: no rule removes it, and it is not counted" if is_new else \
            f"is {copy.pin or 'pinned'} already, and that was left as it is"
    services.log.show(f"{copy.folder}/{copy.name} {told}.")
    if action == "pin" and not copy.is_good:
        services.log.warning(f"{copy.folder}/{copy.name} is no good copy: {copy.trouble}. `list` shows "
                              "those that are.")


def command_forget_references(run: Run) -> None:
    """What keep_reference left in the pool, of that VM or all, is gone, and what an audit held against it."""
    services, vm = run.services, run.services.arguments.vm
    services = services._replace(catalog=run.in_store("opening the store", lambda: open_catalog(
        services.settings, services.log)))
    with connected(services) as (services, inventory):
        run.begin(services, inventory)
        for problem in run.sweep():
            services.log.info(f"{problem} It is left.")
        references = run.services.references
        ledgers, problems = run.in_store("reading the records of references",
                                         lambda: services.catalog.ledgers(references.pool))
        run.tell(Finding(Severity.ERROR, services.catalog.path, str(one)) for one in problems)
        chosen = [ledger for ledger in ledgers if not vm or vm == ledger.vm_name
                  or ledger.vm == vm[len("uuid:"):].lower() and vm.startswith("uuid:")]
        if vm and not chosen and not problems:         # one that can't be read may be the VM's
            raise UsageError(f"no reference of {quote_name(vm)} is on record in {services.catalog.path}. "
                             "Without a VM, all are removed.")
        for ledger in chosen:
            services.signals.check()
            is_gone = False
            if not is_of_store(ledger, references.identity):
                run.tell([Finding(Severity.WARNING, ledger.title, "the record of its reference came here "
                                  "from another store, or this one was moved, so it is left alone: "
                                  "forget-references there removes it; where there is no other store, the "
                                  "command that each run tells.")])
                continue
            tries = services.signals.until(services.settings.lock_wait * MINUTE_S)
            with references.held(ledger, tries=tries) as now:
                if now is not None:
                    run.check_alive()
                    is_gone = references.give_up(now._replace(distrust=""), "forget-references was asked for")
            told = "no reference of it is in the pool any more" if is_gone else \
                "its reference could not be removed; forget-references tries again" if now else \
                "another run is busy with it; forget-references removes it once that has ended"
            run.outcomes.append(Outcome("forget-references", ledger.vm, ledger.vm_name, ledger.title,
                                        None if is_gone else told + "."))
            services.log.show(f"{ledger.title}: {told}.")
        if not ledgers and not problems:
            services.log.show("No reference is on record.")


# --- restore, extract and drill ---------------------------------------------------------------------


def command_restore(run: Run) -> None:
    """A VM is back as a new VM, proven, or nothing of it is left and the person knows why."""
    services, arguments, log = run.services, run.services.arguments, run.services.log
    given = arguments.parameters
    with chosen_source(services) as (source, catalog):
        find_xe(services.settings)
        with connected(services, changes_allowed=not arguments.preview) as (services, inventory):
            plan = plan_restore(source, read_pool_view(services.pool, inventory), given)
            if arguments.preview:
                log.show(plan_text(plan))
                run.findings += [Finding(Severity.ERROR, source.title, problem) for problem in plan.problems]
                return
            if plan.problems:
                problems = "\n* ".join(("",) + plan.problems)
                raise BackupError(f"{quote_name(source.vm_name)} is not restored:{problems}\n"
                                  "Nothing was started.")
            log.info(plan_text(plan))
            restore(run, services, inventory, plan, catalog)


def command_extract(run: Run) -> None:
    """A disk of a copy, or its metadata, is in a file."""
    services, given = run.services, run.services.arguments.parameters
    path = given["to"]
    if path and os.path.lexists(fs_path(path)):
        raise UsageError(f"to={path} exists already and was left as it is: name another file.")
    with chosen_source(services) as (source, _):
        if given["metadata"]:
            services.log.show(extract_metadata(source, path))
            return
        disk = wanted_disk(source, given["disk"])
        if not path:
            raise UsageError("say with to= which file to write.")
        try:
            told = extract_disk(services, source, disk, path)
        except CatalogError as error:
            raise BackupError(f"{error} No file was left.")
    services.log.show(told)


def command_drill(run: Run) -> None:
    """The chosen copies were imported, compared and removed again; verdicts and report tell how it went."""
    services, arguments = run.services, run.services.arguments
    if bool(arguments.vm) == bool(arguments.parameters["sample"]):
        raise UsageError("sample= takes no VM beside it." if arguments.vm else
                         "drill needs a VM, or newest-of-each, or sample=N.")
    run.wording = None if arguments.preview else DRILL_WORDING
    services = services._replace(catalog=open_store(services.settings))
    copies, findings = drill_copies(services, arguments.vm)
    run.tell(findings)
    if not copies:
        raise BackupError(f"{services.catalog.path} holds no good copy to drill: `list` shows what is "
                          "there.")
    find_xe(services.settings)
    with connected(services, changes_allowed=not arguments.preview) as (services, inventory):
        if arguments.preview:
            run.findings = preview_drill(services, inventory, copies)
        else:
            run.begin(services, inventory)
            drill_all(run, copies)


COMMANDS = {SETUP: command_setup,
            "backup": command_backup, "preview": command_preview, "explain": command_explain,
            "verify": lambda run: run.in_store("verifying", lambda: verify_chosen(run), FOR_EVER_S),
            "prune": lambda run: run.in_store("pruning", lambda: prune_chosen(run), FOR_EVER_S),
            "list": command_list, "pin": command_pin, "unpin": command_pin, "status": command_status,
            "history": command_history, "check": command_check, "report": command_report,
            "test-mail": command_test_mail,
            "restore": command_restore, "extract": command_extract, "drill": command_drill,
            "forget-references": command_forget_references}


# =============================================================================
# 26. main
# =============================================================================
# From argv to an exit status: help, arguments, config, and the action in its run.


MOST_DESCRIPTORS = 65536


def open_standard_descriptors() -> None:
    """0, 1 and 2 lead somewhere: closed ones would be given to the first files that are opened, and to our
    children."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)         # the lowest free number: this one


def raise_descriptor_limit() -> None:
    """As many files can be open as the system lets us: a lock file is never closed, and each VM has two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):     # then as many as there are must do
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def told_by_parent() -> Dict[str, Any]:
    """What a worker is told by the run that started it; once that has ended, or wants it to end, a signal
    ends the worker."""
    given = parse_object(sys.stdin.buffer.readline())

    def watch() -> None:
        while os.read(0, KIBIBYTE):        # nothing more is said: it is awaited that the pipe ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    return given


def begin_as_worker(words: Sequence[str]) -> None:
    """The process of a backup begins anew as its workers do: some Pythons keep what compiling took."""
    with contextlib.suppress(UsageError):                # which is told later
        # with -E, which may be why it starts at all, it would not begin with that again
        if parse_arguments(words).action.name == "backup" and not sys.flags.ignore_environment:
            command, beginning = worker_start()
            become([*command, *map(fs_path, words)], beginning)


def main(argv: Sequence[str]) -> int:
    """The exit status of that command line."""
    open_standard_descriptors()
    raise_descriptor_limit()
    os.umask(0o077)                        # images hold whole disks, dumps hold secrets
    warnings.filterwarnings("ignore", "Possible ", FutureWarning)      # about a regex of the config, as [[a]
    words, name = [fs_text(word) for word in argv], ""
    if __name__ == "__main__":
        begin_as_worker(words)             # with no handler yet, which could take a signal with it
    clock = Clock()
    log = Log(clock)
    signals = Signals(log)
    signals.install()
    is_check = words[2:3] == ["check"]
    try:
        if not words:
            log.complain(USAGE)
            return ExitStatus.USAGE
        text = asked_help(words)
        if text is not None:
            log.show(text)
            return ExitStatus.OK
        if words == [WORKER]:
            log.is_relayed = True
            given = told_by_parent()
            words, name = [given["password"], *given["words"]], given["round"]
        if len(words) == 2 and words[1].startswith("create-password-file="):
            log.show(create_password_file(words[0], words[1].partition("=")[2]))
            return ExitStatus.OK
        arguments = parse_arguments(words)
        configuration = load_configuration(arguments)
        services = Services(configuration, clock, log, signals, arguments)
        run = Run(services, StatusLog(services))
        run.carry_out(functools.partial(work_along, name=name) if name else COMMANDS[arguments.action.name])
        if is_check and run.status is None:            # a bug, or a signal, which the log tells
            log.show(alarm_line(Alarm.UNKNOWN, "it could not look: " + reason_text(run.ended_by)))
            run.status = int(Alarm.UNKNOWN)
        return end_told(run)
    except BackupError as error:
        if is_check:
            log.show(alarm_line(Alarm.UNKNOWN, str(error)))
            return Alarm.UNKNOWN
        log.complain(str(error))
        return error.exit_status
    except Exception as bug:
        log.bug(bug)
        return ExitStatus.BUG
    finally:
        log.leave_terminal()


if __name__ == "__main__":
    status = int(main(sys.argv[1:]))
    os._exit(status)        # a thread that hangs in the kernel on a dead share must not keep the process
