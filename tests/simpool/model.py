"""The pool: hosts, sessions, tasks and the operations that objects are busy with. What the API and `xe` both call.

`Pool` is the database plus the rules of the server. What can be done to disks stands in disks.py, to machines in
machines.py; this module puts them together.
"""

import calendar
import random
import re
import time
from contextlib import contextmanager
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import lifecycle
from database import Database, new_ref
from disks import Disks
from machines import Machines
from schema import CLASSES, NULL, Failure

DEFAULT_VERSION = "24.19.2"

#: (first xapi version, product, brand, API version minor), newest last (datamodel_types.ml, release list, v26.17.0)
RELEASES = [
    ((1, 9), "7.0.0", "XenServer", 5), ((1, 14), "7.1.0", "XenServer", 6), ((1, 20), "7.2.0", "XenServer", 7),
    ((1, 39), "7.3.0", "XenServer", 8), ((1, 60), "7.4.0", "XenServer", 9), ((1, 90), "7.5.0", "XenServer", 10),
    ((1, 110), "7.6.0", "XenServer", 11), ((1, 160), "8.0.0", "XCP-ng", 12), ((1, 214), "8.1.0", "XCP-ng", 14),
    ((1, 249), "8.2.1", "XCP-ng", 15), ((21, 0), "8.3.0", "XCP-ng", 21), ((26, 0), "9.0.0", "XCP-ng", 23),
]  # type: List[Tuple[Tuple[int, int], str, str, int]]

#: How long a call waits for an object that another operation holds (helpers.ml Policy.standard, v26.17.0).
PATIENCE_S = 2 * 3600.0
#: The same for /export since v25.33.2 (Policy.fail_quickly); before, it fails at once.
EXPORT_PATIENCE_S = 120.0

COMPLETED_TASK_TIMEOUT_S = 65 * 60
PENDING_TASK_TIMEOUT_S = 24 * 3600
#: xapi_globs.ml, v26.17.0: sessions of one originator
MAX_SESSIONS = 500


def timestamp(seconds: Optional[float] = None) -> str:
    """A date as the server writes it."""
    return time.strftime("%Y%m%dT%H:%M:%SZ", time.gmtime(seconds))


def seconds_of(date: str) -> float:
    """The Unix time of a date on the wire; dashes and a missing Z are accepted, as the server does."""
    digits = re.sub(r"[-:Z]", "", date)[:15]
    return calendar.timegm(time.strptime(digits, "%Y%m%dT%H%M%S"))


def parse_version(text: str) -> Tuple[int, ...]:
    if not re.match(r"\d+\.\d+(\.\d+)*\Z", text):
        raise ValueError("xapi_version must be numbers with dots between, not %r" % text)
    return tuple(int(part) for part in text.split("."))


class Pool(Machines, Disks, Database):
    """The whole pool. Every read and write of its tables happens with `lock` held; long work does not."""

    def __init__(self, version: str = DEFAULT_VERSION) -> None:
        Database.__init__(self)
        self.version_text = version
        self.version = parse_version(version)
        self.local_sessions = set()  # type: set
        self.password = "password"
        self.stopping = False
        #: the time at which everything happens, while a pool is built from its description
        self.fixed_time = None  # type: Optional[float]
        self.last_domid = {}  # type: Dict[str, int]
        #: which life of the server this is: what was begun in an earlier one is never cleaned up
        self.lives = 0
        #: VBDs whose device an export or an import has open
        self.open_devices = set()  # type: set
        #: disks that the SRs hold and the database forgot: {VDI uuid: SR uuid}; SR.scan finds them again
        self.strays = {}  # type: Dict[str, str]

    # --- what differs by version (git describe of the commits)

    def has_zstd(self) -> bool:
        return self.version >= (1, 166)

    def block_digest(self) -> str:
        """Which digest follows each block of an XVA: the suffix of its member."""
        return "xxhash" if self.version >= (1, 170) else "checksum"

    def has_tar_export(self) -> bool:
        return self.version >= (1, 126)

    def has_qcow2(self) -> bool:
        return self.version >= (25, 27)

    def has_cbt(self) -> bool:
        return self.version >= (1, 39)

    def refuses_differences_of_no_vhd(self) -> bool:
        """Whether a difference of a disk that is no VHD fails (CA-384483, v24.13.0); before, it is a full without a word."""
        return self.version >= (24, 13)

    def leaves_zeros_out(self) -> bool:
        """Whether a VHD that is made of a disk that is none leaves out the blocks of zeros (8e511dc701, v25.35.0)."""
        return self.version >= (25, 35)

    def has_ignore_vdis(self) -> bool:
        return self.version >= (21, 4)

    def has_quiesce(self) -> bool:
        return self.version < (1, 214)

    def has_online_resize(self) -> bool:
        return self.version < (1, 60)

    def has_task_set_status(self) -> bool:
        return self.version >= (1, 20)

    def has_task_set_progress(self) -> bool:
        return self.version >= (1, 249)

    def has_task_set_result(self) -> bool:
        return self.version >= (21, 3)

    def busy_has_four_parameters(self) -> bool:
        return self.version >= (25, 33, 2)

    def names_task_in_vbds(self) -> bool:
        """Whether the VBD of an export or import bears the key task_id (attach_helpers.ml; gone since v26.16.0)."""
        return self.version < (26, 16)

    def checks_mac_seed(self) -> bool:
        """Whether an import that keeps uuids refuses a mac_seed of the pool as DUPLICATE_MAC_SEED (before: DUPLICATE_VM)."""
        return self.version >= (24, 25) or self.version[:2] == (24, 19)

    def release(self) -> Tuple[str, str, int]:
        """(product version, brand, minor API version) of a product with this xapi."""
        chosen = RELEASES[0]
        for row in RELEASES:
            if self.version >= row[0]:
                chosen = row
        return chosen[1], chosen[2], chosen[3]

    # --- the pool and its hosts

    def now(self) -> str:
        return timestamp(self.fixed_time)

    def pool_ref(self) -> str:
        return next(iter(self.tables["pool"]))

    def pool_record(self) -> Dict[str, Any]:
        return self.tables["pool"][self.pool_ref()]

    def master(self) -> str:
        return self.pool_record()["master"]

    def is_master(self, host_ref: str) -> bool:
        return host_ref == self.master()

    def master_address(self) -> str:
        return self.record("host", self.master())["address"]

    def host_of(self, name: str) -> Optional[str]:
        """The host with this name, address or uuid, or None."""
        for ref, record in self.tables["host"].items():
            if name in (record["name_label"], record["address"], record["uuid"], record["hostname"]):
                return ref
        return None

    def is_live(self, host_ref: str) -> bool:
        metrics = self.tables["host_metrics"].get(self.record("host", host_ref)["metrics"])
        return bool(metrics and metrics["live"])

    def sees_all(self, host_ref: str, sr_refs: Iterable[str]) -> bool:
        """Whether this host has a plugged PBD for each of these SRs (xapi_vm_helpers.ml assert_can_see_SRs)."""
        seen = {self.tables["PBD"][pbd]["SR"] for pbd in self.record("host", host_ref)["PBDs"]
                if self.tables["PBD"][pbd]["currently_attached"]}
        return set(sr_refs) <= seen

    def hosts_that_see(self, sr_refs: Iterable[str]) -> List[str]:
        """The live hosts that see all these SRs."""
        wanted = set(sr_refs)
        return [ref for ref, record in self.tables["host"].items()
                if record["enabled"] and self.is_live(ref) and self.sees_all(ref, wanted)]

    def assert_can_be_asked(self, host_ref: str) -> None:
        """HOST_OFFLINE for a host that a call would have to be forwarded to (message_forwarding.ml do_op_on)."""
        if not self.is_live(host_ref):
            raise Failure("HOST_OFFLINE", host_ref)

    def host_destroy(self, host_ref: str) -> None:
        """host.destroy: a dead host is forgotten, with its control domain; what hung on it goes in the next sweep.

        See xapi_host.ml destroy and db_gc.ml, v24.19.2. VMs that it was running have to be reset before.
        """
        with self.lock:
            record = self.record("host", host_ref)
            if self.is_live(host_ref) or self.is_master(host_ref):
                raise Failure("HOST_IS_LIVE", host_ref)
            domains = [vm for vm in record["resident_VMs"] if self.record("VM", vm)["is_control_domain"]]
            if len(domains) < len(record["resident_VMs"]):
                raise Failure("HOST_HAS_RESIDENT_VMS", host_ref)
            for vm in domains:
                self.drop_vm_row(vm)
            for cls in ("PBD", "PIF", "host_cpu"):
                for ref in [ref for ref, row in self.tables[cls].items() if row["host"] == host_ref]:
                    self.destroy_row(cls, ref)
            if record["metrics"] in self.tables["host_metrics"]:
                self.destroy_row("host_metrics", record["metrics"])
            self.destroy_row("host", host_ref)

    def move_master(self, host_ref: str) -> None:
        """The master role goes to another host. All hosts restart their xapi, so sessions die."""
        self.set_field("pool", self.pool_ref(), "master", host_ref)
        self.forget_sessions()

    # --- sessions

    def login(self, host_ref: str, user: str, originator: str = "") -> str:
        """A new session. Passwords were checked before."""
        root = next(iter(self.tables["user"]), NULL)
        mine = sorted((record["last_active"], ref) for ref, record in self.tables["session"].items()
                      if record["originator"] == originator)
        if len(mine) >= MAX_SESSIONS:
            self.destroy_row("session", mine[0][1])
        now = self.now()
        return self.create("session", {"this_host": host_ref, "this_user": root, "last_active": now, "validation_time": now,
                                       "is_local_superuser": True, "auth_user_name": user, "originator": originator})

    def login_with_password(self, host_ref: str, user: str, password: str, originator: str = "", is_unix: bool = False) -> str:
        """session.login_with_password as the host sees it: any password is good on the unix socket, members refuse TCP."""
        if not is_unix:
            if not self.is_master(host_ref):
                raise Failure("HOST_IS_SLAVE", self.master_address())
            if user != "root" or password != self.password:
                raise Failure("SESSION_AUTHENTICATION_FAILED", user, "Authentication failure")
        return self.login(host_ref, user, originator)

    def resolve_session(self, session_ref: Any) -> Dict[str, Any]:
        """The record of a session that is valid in the pool; SESSION_INVALID if there is none."""
        record = self.tables["session"].get(session_ref) if isinstance(session_ref, str) else None
        if record is None:
            raise Failure("SESSION_INVALID", session_ref if isinstance(session_ref, str) else "")
        now = self.now()
        if record["last_active"] != now:
            self.set_field("session", session_ref, "last_active", now)
        return record

    def local_login(self) -> str:
        """A session of this host alone, good only for what must work without the master."""
        ref = new_ref()
        self.local_sessions.add(ref)
        return ref

    def logout(self, session_ref: str) -> None:
        if session_ref in self.tables["session"]:
            self.destroy_row("session", session_ref)

    def forget_sessions(self) -> None:
        for ref in list(self.tables["session"]):
            self.destroy_row("session", ref)
        self.local_sessions.clear()

    # --- tasks

    def create_task(self, label: str, description: str = "", session: Optional[str] = None,
                    subtask_of: str = NULL, host: Optional[str] = None) -> str:
        with self.lock:
            self._collect_tasks()
            return self.create("task", {"name_label": label, "name_description": description, "created": self.now(),
                                        "resident_on": host or self.master(), "subtask_of": subtask_of})

    def _collect_tasks(self) -> None:
        """Remove what db_gc_util.ml removes: completed tasks after 65 minutes, pending ones after a day."""
        now = time.time()
        for ref, record in list(self.tables["task"].items()):
            if record["status"] in ("pending", "cancelling"):
                if now - seconds_of(record["created"]) > PENDING_TASK_TIMEOUT_S:
                    self.destroy_row("task", ref)
            elif now - seconds_of(record["finished"]) > COMPLETED_TASK_TIMEOUT_S:
                self.destroy_row("task", ref)

    def _close_task(self, ref: str, status: str, fields: Dict[str, Any]) -> None:
        with self.lock:
            record = self.tables["task"].get(ref)
            if record is None or record["status"] != "pending":
                return  # the first finisher wins (taskHelper.ml complete, v26.17.0)
            if "destroy" in record["current_operations"].values():
                self.destroy_row("task", ref)
                return
            closing = dict(fields, allowed_operations=[], finished=self.now(), progress=1.0, status=status)
            self.set_fields("task", ref, closing)

    def finish_task(self, ref: str, result: str = "") -> None:
        """The work is done; `result` is XML-RPC text or empty."""
        self._close_task(ref, "success", {"result": result})

    def fail_task(self, ref: str, failure: Failure, backtrace: str = "()") -> None:
        status = "cancelled" if failure.code == "TASK_CANCELLED" else "failure"
        self._close_task(ref, status, {"error_info": failure.description(), "backtrace": backtrace})

    def cancel_task(self, ref: str) -> None:
        """Ask for an end. The worker looks at task_is_cancelled; a task that nobody works on just carries the mark."""
        with self.lock:
            record = self.record("task", ref)
            if record["status"] == "pending" and "cancel" in record["allowed_operations"]:
                self.set_key("task", ref, "current_operations", ref, "cancel")

    def task_is_cancelled(self, ref: str) -> bool:
        with self.lock:
            record = self.tables["task"].get(ref)
            return bool(record) and "cancel" in record["current_operations"].values()  # type: ignore

    def set_cancellable(self, ref: str, cancellable: bool = True) -> None:
        with self.lock:
            if ref in self.tables["task"]:
                self.set_field("task", ref, "allowed_operations", ["cancel"] if cancellable else [])

    def set_progress(self, ref: str, progress: float) -> None:
        with self.lock:
            if ref in self.tables["task"]:
                self.set_field("task", ref, "progress", float(progress))

    def destroy_task(self, ref: str) -> None:
        """task.destroy: a pending one is only marked, and goes when it is finished (xapi_task.ml, v26.17.0)."""
        with self.lock:
            record = self.record("task", ref)
            if record["status"] in ("pending", "cancelling"):
                self.set_key("task", ref, "current_operations", "task", "destroy")
            else:
                self.destroy_row("task", ref)

    @contextmanager
    def own_task(self, label: str, task: Optional[str] = None) -> Iterator[str]:
        """The task under which a call does its work: the caller's, or one that is gone when the call is over."""
        if task is not None:
            yield task
            return
        made = self.create_task(label)
        try:
            yield made
        finally:
            with self.lock:
                if made in self.tables["task"]:
                    self.destroy_row("task", made)

    # --- operations

    def refusal(self, cls: str, ref: str, operation: str) -> Optional[Failure]:
        """Why the object does not allow the operation now, or None."""
        record = self.record(cls, ref)
        if cls == "VM":
            if operation == "snapshot_with_quiesce" and record["power_state"] == "Running" and not self._can_quiesce(record):
                return Failure("VM_SNAPSHOT_WITH_QUIESCE_NOT_SUPPORTED", ref)
            return lifecycle.vm_refusal(record, ref, operation, self.busy_has_four_parameters(),
                                        self._resets_on_boot(record), self._has_drivers(record))
        if cls == "VDI":
            return lifecycle.vdi_refusal(record, ref, operation, self.record("SR", record["SR"]),
                                         self.attached_modes(ref), bool(self.hosts_that_see([record["SR"]])),
                                         self.busy_has_four_parameters())
        if record["current_operations"]:
            return lifecycle.busy(cls, ref, record["current_operations"], self.busy_has_four_parameters())
        return None

    def assert_allowed(self, cls: str, ref: str, operation: str) -> None:
        failure = self.refusal(cls, ref, operation)
        if failure is not None:
            raise failure

    def _patience(self, operation: str) -> float:
        if operation in ("export", "metadata_export"):
            return EXPORT_PATIENCE_S if self.version >= (25, 33, 2) else 0.0
        return PATIENCE_S

    def wait_until_allowed(self, cls: str, ref: str, operation: str, patience: Optional[float] = None) -> None:
        """Return when the operation may begin. Only a clash with another operation is waited for."""
        deadline = time.time() + (self._patience(operation) if patience is None else patience)
        while True:
            failure = self.refusal(cls, ref, operation)
            if failure is None:
                return
            left = deadline - time.time()
            if failure.code != "OTHER_OPERATION_IN_PROGRESS" or left <= 0 or self.stopping:
                raise failure
            self.changed.wait(min(left, 1.0))

    @contextmanager
    def operation(self, cls: str, ref: str, operation: str, task: str, patience: Optional[float] = None) -> Iterator[None]:
        """The object is busy with this operation while the block runs: it stands in current_operations."""
        with self.lock:
            self.wait_until_allowed(cls, ref, operation, patience)
            self.set_key(cls, ref, "current_operations", task, operation)
            self.update_allowed_operations(cls, ref)
        try:
            yield
        finally:
            with self.lock:
                if ref in self.tables[cls]:
                    self.drop_key(cls, ref, "current_operations", task)
                    self.update_allowed_operations(cls, ref)

    def _can_quiesce(self, vm: Dict[str, Any]) -> bool:
        metrics = self.tables["VM_guest_metrics"].get(vm["guest_metrics"])
        return bool(self.has_quiesce() and metrics and
                    ("feature-quiesce" in metrics["other"] or "feature-snapshot" in metrics["other"]))

    def _has_drivers(self, vm: Dict[str, Any]) -> bool:
        metrics = self.tables["VM_guest_metrics"].get(vm["guest_metrics"])
        return bool(metrics and metrics["PV_drivers_detected"])

    def _resets_on_boot(self, vm: Dict[str, Any]) -> bool:
        for vbd in vm["VBDs"]:
            disk = self.tables["VDI"].get(self.tables["VBD"][vbd]["VDI"])
            if disk is not None and (disk["on_boot"] == "reset" or disk["sm_config"].get("on_boot") == "reset"):
                return True
        return False

    def update_allowed_operations(self, cls: str, ref: str) -> None:
        """Write down what the object allows now. Advice for clients: every call checks again."""
        record = self.tables[cls].get(ref)
        if record is None:
            return
        if cls == "VM":
            allowed = lifecycle.vm_allowed_operations(record, self._can_quiesce(record), self._resets_on_boot(record),
                                                      self._has_drivers(record))
        elif cls == "VDI" and record["SR"] not in self.tables["SR"]:
            allowed = []
        elif cls == "VDI":
            allowed = lifecycle.vdi_allowed_operations(record, self.record("SR", record["SR"]), self.attached_modes(ref),
                                                       bool(self.hosts_that_see([record["SR"]])))
        elif cls == "VBD":
            allowed = lifecycle.vbd_allowed_operations(record, self.record("VM", record["VM"]))
        elif cls == "VIF":
            allowed = lifecycle.vif_allowed_operations(record, self.record("VM", record["VM"]))
        else:
            return
        if allowed != record["allowed_operations"]:
            self.set_field(cls, ref, "allowed_operations", allowed)

    # --- messages

    def create_message(self, name: str, cls: str, obj_uuid: str, body: str, priority: int = 5) -> str:
        return self.create("message", {"name": name, "priority": str(priority), "cls": cls, "obj_uuid": obj_uuid,
                                       "timestamp": self.now(), "body": body})

    # --- for the handlers

    def names_of(self, ref: str) -> List[str]:
        """The names and uuids under which a VM, a disk or a device is known to faults: a snapshot's include its VM's."""
        with self.lock:
            for cls in ("VBD", "VIF"):
                if ref in self.tables[cls]:
                    record = self.tables[cls][ref]
                    return self.names_of(record["VM"]) + self.names_of(record.get("VDI", NULL))
            names = []
            for cls in ("VM", "VDI"):
                seen = []  # type: List[str]
                while ref in self.tables[cls] and ref not in seen:  # there are snapshots of themselves, and of each other
                    seen.append(ref)
                    record = self.tables[cls][ref]
                    names += [record["name_label"], record["uuid"]]
                    ref = record["snapshot_of"]
            return names

    def choose_host(self, sr_refs: Iterable[str]) -> str:
        """One of the live hosts that see all these SRs; NO_HOSTS_AVAILABLE if there is none."""
        hosts = self.hosts_that_see(sr_refs)
        if not hosts:
            raise Failure("NO_HOSTS_AVAILABLE")
        return random.choice(sorted(hosts))

    def die(self) -> None:
        """The server ends, now: nothing that its threads still do is written down."""
        self.lives += 1
        self.open_devices.clear()
        self.close_log()

    def forget_current_operations(self) -> None:
        """What a restarted server does: nobody works on anything any more."""
        for cls in CLASSES:
            if "current_operations" not in CLASSES[cls].fields:
                continue
            for ref, record in list(self.tables[cls].items()):
                if record["current_operations"]:
                    self.set_field(cls, ref, "current_operations", {})
                    self.update_allowed_operations(cls, ref)
