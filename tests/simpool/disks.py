"""What can be done to disks (VDIs) and their SRs: part of model.Pool.

A VDI's contents live in storage.py under its uuid; its row lives in the database. Space is counted there, refused here.
"""

import time
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Tuple

import lifecycle
import storage
from database import new_uuid, new_uuid4
from schema import NULL, Failure

#: SM drivers write sizes in whole VHD blocks (VDI.create rounds up, recorded from a file-backed SR of xapi 24.19.2).
SIZE_UNIT = 2 * storage.MIB
#: The largest VHD (sm, vhdutil.py MAX_VHD_SIZE).
LARGEST = 2040 * 1024 * storage.MIB
#: How long VDI.data_destroy waits for the disk's VBDs to be destroyed (xapi_vdi.ml data_destroy, v24.19.2).
DATA_DESTROY_PATIENCE_S = 4.0


class Disks:
    """VDI and SR calls. `self` is the pool."""

    def disk(self, vdi: str) -> storage.Disk:
        """The contents of a VDI, to read or to write."""
        with self.lock:
            uuid = self.record("VDI", vdi)["uuid"]
            if uuid not in self.storage.contents:
                raise Failure("SR_BACKEND_FAILURE_46", "", "The VDI is not available", "")
            return storage.Disk(self.storage, uuid, self.lock, self._reserve_block)

    def is_vhd(self, vdi: str) -> bool:
        """Whether the storage keeps the disk as a VHD."""
        with self.lock:
            return self.record("SR", self.record("VDI", vdi)["SR"])["uuid"] in self.storage.vhd

    def difference_of(self, name: str, base: str) -> Tuple[storage.Disk, str]:
        """The contents and the base of the newest difference of that disk, for the fault `other` (faults.py)."""
        with self.lock:
            vdis = self.tables["VDI"]
            machine, _, device = name.rpartition(":")
            found = [ref for ref, record in vdis.items() if record["uuid"] == name]
            found += [self.tables["VBD"][vbd]["VDI"] for vm, record in self.tables["VM"].items()
                      if record["name_label"] == machine and not record["is_a_snapshot"] for vbd in self.vm_disks(vm)
                      if device in self.names_of_drive(vbd)]
            if len(found) != 1:
                raise Failure("INTERNAL_ERROR", "FAULTS.json: other: %s means %d disks" % (name, len(found)))
            snapshots = [ref for ref, record in vdis.items() if record["snapshot_of"] == found[0] and ref != found[0]]
            if len(snapshots) > 1:
                base, found = snapshots[-2], snapshots[-1:]
            return self.disk(found[0]), base

    def names_of_drive(self, vbd: str) -> Tuple[str, ...]:
        """The names under which a guest's drive is known: its device, its number, the device of that number."""
        record = self.tables["VBD"][vbd]
        return record["device"], record["userdevice"], device_name(record["userdevice"])

    # --- space

    def _reserve(self, sr: str, amount: int) -> None:
        """The failure of a full SR, if that much more does not fit."""
        if self.storage.free(self.record("SR", sr)["uuid"]) < amount:
            # the SM's own error 44 with an empty first parameter, not SR_FULL (nothing in ocaml/xapi v26.17.0 raises that)
            raise Failure("SR_BACKEND_FAILURE_44", "", "There is insufficient space", "")

    def _reserve_block(self, uuid: str, block: int) -> None:
        content = self.storage.contents[uuid]
        if self.storage.free(content.sr) < self.storage.cost_of_write(uuid, block):
            raise Failure("SR_BACKEND_FAILURE_44", "", "There is insufficient space", "")

    def update_space(self, sr: str) -> None:
        """Bring the SR's and its disks' sizes up to what the storage holds."""
        record = self.record("SR", sr)
        used = str(self.storage.used[record["uuid"]])
        if record["physical_utilisation"] != used:
            self.set_field("SR", sr, "physical_utilisation", used)
        allocated = str(sum(int(self.tables["VDI"][vdi]["virtual_size"]) for vdi in record["VDIs"]))
        if record["virtual_allocation"] != allocated:
            self.set_field("SR", sr, "virtual_allocation", allocated)

    def update_utilisation(self, vdi: str) -> None:
        """Bring one disk's physical_utilisation and its SR's up to date, after a guest or an import wrote."""
        record = self.record("VDI", vdi)
        self.set_field("VDI", vdi, "physical_utilisation", str(self.storage.utilisation(record["uuid"])))
        self.update_space(record["SR"])

    def assert_sr_answers(self, sr: str) -> None:
        """Refuse where nobody is there to do storage work on this SR: of a shared one the master is asked, of a local one
        its host (message_forwarding.ml choose_pbds_for_sr and do_op_on, v24.19.2). A dead host's PBDs go on being plugged."""
        record = self.record("SR", sr)
        hosts = [self.tables["PBD"][pbd]["host"] for pbd in record["PBDs"] if self.tables["PBD"][pbd]["currently_attached"]]
        if record["shared"]:
            hosts = [host for host in hosts if self.is_master(host)]
        if not hosts:
            raise Failure("SR_HAS_NO_PBDS", sr)
        self.assert_can_be_asked(hosts[0])

    # --- who holds a disk

    def holders(self, vdi: str) -> List[str]:
        """The VBDs that hold the disk: those that are attached, which a suspended VM's stay (xapi_vm_lifecycle.ml
        force_state_reset_keep_current_operations)."""
        return [ref for ref in self.record("VDI", vdi)["VBDs"] if self.tables["VBD"][ref]["currently_attached"]]

    def is_of_a_suspended_vm(self, vbd: str) -> bool:
        vm = self.tables["VM"].get(self.tables["VBD"][vbd]["VM"])
        return vm is not None and vm["power_state"] == "Suspended"

    def attached_modes(self, vdi: str) -> List[str]:
        return [self.tables["VBD"][ref]["mode"] for ref in self.holders(vdi)]

    def assert_attachable(self, vdi: str, mode: str, vm: str, besides: str = "") -> None:
        """Refuse an attachment in this mode, to this VM, that would clash with one that is there.

        Of guests, one writes or many read: VDI_IN_USE. A suspended VM does not count, its disk is really offline. System
        domains are left out on both sides, so an export reads a running VM's own disk (xapi_vbd_helpers.ml
        valid_operations, v24.19.2). Then the storage layer has its say: what is open for reading can't be opened for
        writing beside it (storage/vdi_automaton.ml, v24.19.2: Illegal_transition). Stricter than there: a control domain
        that wants to write, an import, is refused whoever holds the disk, and so is a guest beside an import.
        """
        record = self.record("VDI", vdi)
        if record["missing"]:
            raise Failure("VDI_MISSING", record["SR"], vdi)
        if record["type"] == "cbt_metadata":
            raise Failure("VDI_INCOMPATIBLE_TYPE", vdi, lifecycle.CBT_METADATA)
        if not record["managed"]:
            raise Failure("VDI_NOT_MANAGED", vdi)
        if mode == "RW" and record["read_only"]:
            raise Failure("VDI_READONLY", vdi)
        if record["sharable"]:
            return
        others = [self.tables["VBD"][ref] for ref in self.holders(vdi)
                  if ref != besides and not self.is_of_a_suspended_vm(ref)]
        guests = [other for other in others if not _is_system_domain(self.record("VM", other["VM"]))]
        if _is_system_domain(self.record("VM", vm)):
            in_use = mode == "RW" and bool(others)
        else:
            in_use = any(other["mode"] == "RW" for other in others) or (mode == "RW" and bool(guests))
        if in_use:
            # one parameter only, unlike VDI.destroy's
            raise Failure("VDI_IN_USE", vdi)
        if mode == "RW" and others:
            raise Failure("INTERNAL_ERROR", "xenopsd internal error: Storage_error ([S(Illegal_transition);"
                                            "[[S(Activated);S(RO)];[S(Activated);S(RW)]]])")

    @contextmanager
    def attach_to_dom0(self, vdi: str, host: str, mode: str = "RO", task: str = "") -> Iterator[str]:
        """The disk is attached to the host's control domain by a VBD while the block runs (attach_helpers.ml, sm_fs_ops.ml).

        The VBD names the task that it was made for. If the server ends meanwhile it stays attached, for good: nothing looks
        for such at the start (tried on a real server, 24.19.2).
        """
        with self.lock:
            domain = self.record("host", host)["control_domain"]
            self.assert_attachable(vdi, mode, domain)
            self.assert_sr_answers(self.record("VDI", vdi)["SR"])
            if not self.sees_all(host, [self.record("VDI", vdi)["SR"]]):
                # the host was chosen for another disk: that of an export, not its base's (storage_access.ml, v24.19.2)
                raise Failure("SR_NOT_ATTACHED", self.record("VDI", vdi)["SR"])
            taken = {self.tables["VBD"][ref]["userdevice"] for ref in self.record("VM", domain)["VBDs"]}
            number = next(number for number in range(len(taken) + 1) if str(number) not in taken)
            vbd = self.create("VBD", {
                "VM": domain, "VDI": vdi, "userdevice": str(number), "device": "sm/backend/%s/%s" % (
                    self.record("SR", self.record("VDI", vdi)["SR"])["uuid"], self.record("VDI", vdi)["uuid"]),
                "mode": mode, "type": "Disk", "bootable": False, "empty": False, "currently_attached": True,
                "other_config": {"task_id": task} if task and self.names_task_in_vbds() else {}, "unpluggable": True})
            self.update_allowed_operations("VBD", vbd)
            self.update_allowed_operations("VDI", vdi)
            self.open_devices.add(vbd)
            life = self.lives
        try:
            yield vbd
        finally:
            with self.lock:
                if life != self.lives:
                    return  # the server that would clean up is gone: the VBD stays attached
                self.open_devices.discard(vbd)
                if vbd in self.tables["VBD"]:
                    self.destroy_row("VBD", vbd)
                if vdi in self.tables["VDI"]:
                    # the storage layer notes an id of the contents when it lets go of a disk (recorded)
                    if "content_id" not in self.record("VDI", vdi)["other_config"]:
                        self.set_key("VDI", vdi, "other_config", "content_id", new_uuid())
                    self.update_allowed_operations("VDI", vdi)
                    if mode == "RW":
                        self.update_utilisation(vdi)

    # --- VDI calls

    def vdi_create(self, fields: Dict[str, Any]) -> str:
        """VDI.create; `fields` as schema.CONSTRUCTORS has them."""
        with self.lock:
            sr = fields["SR"]
            record = self.record("SR", sr)
            self.assert_sr_answers(sr)
            if record["type"] == "udev" or record["is_tools_sr"]:
                raise Failure("SR_OPERATION_NOT_SUPPORTED", sr)
            size = int(fields["virtual_size"])
            if size <= 0:
                raise Failure("SR_BACKEND_FAILURE_78", "", "VDI Creation failed [opterr=invalid size]", "")
            size = _in_whole_units(size)
            self._reserve(sr, self.storage.cost_of_new(record["uuid"], size))
            uuid = new_uuid4()
            self.storage.create(uuid, record["uuid"], size)
            vdi = self.create("VDI", dict(fields, uuid=uuid, location=uuid, virtual_size=str(size)))
            self.update_space(sr)
            self.update_allowed_operations("VDI", vdi)
            return vdi

    def vdi_resize(self, vdi: str, size: int, task: Optional[str] = None) -> None:
        """VDI.resize: the disk grows, and what is new of it is zeros. Refused while a VBD holds the disk, whatever its VM does
        (xapi_vdi.ml check_operation_error and resize, v24.19.2; sm, FileSR.py resize: a VHD is never made smaller)."""
        with self.own_task("VDI.resize", task) as mine:
            with self.operation("VDI", vdi, "resize", mine):
                with self.lock:
                    record = self.record("VDI", vdi)
                    self.assert_sr_answers(record["SR"])
                    if not record["managed"]:
                        raise Failure("VDI_NOT_MANAGED", vdi)
                    content = self.storage.contents.get(record["uuid"])
                    if record["missing"] or content is None:
                        raise Failure("SR_BACKEND_FAILURE_46", "", "The VDI is not available", "")
                    if size < content.size:
                        raise Failure("SR_BACKEND_FAILURE_79", "", "VDI Invalid size [opterr=shrinking not allowed]", "")
                    if size > LARGEST:
                        raise Failure("SR_BACKEND_FAILURE_79", "", "VDI Invalid size [opterr=VDI size must be between 1 MB "
                                                                   "and %d MB]" % (LARGEST // storage.MIB), "")
                    if size == content.size:
                        return
                    size = _in_whole_units(size)
                    self._reserve(record["SR"], self.storage.cost_of_growth(record["uuid"], size))
                    self.storage.grow(record["uuid"], size)
                    self.set_field("VDI", vdi, "virtual_size", str(size))
                    self.update_utilisation(vdi)

    def vdi_snapshot(self, vdi: str, driver_params: Dict[str, str], task: Optional[str] = None) -> str:
        """VDI.snapshot. What is copied from the row is read when the call begins, other_config included."""
        with self.own_task("VDI.snapshot", task) as mine:
            with self.operation("VDI", vdi, "snapshot", mine):
                with self.lock:
                    copied = self._fields_to_copy(vdi)
                with self.lock:
                    return self._duplicate(vdi, copied, snapshot=True)

    def vdi_clone(self, vdi: str, driver_params: Dict[str, str], task: Optional[str] = None) -> str:
        """VDI.clone: a writable copy that shares what it can."""
        with self.own_task("VDI.clone", task) as mine:
            with self.operation("VDI", vdi, "clone", mine):
                with self.lock:
                    return self._duplicate(vdi, self._fields_to_copy(vdi), snapshot=False)

    def vdi_copy(self, vdi: str, sr: str, task: Optional[str] = None) -> str:
        """VDI.copy: a full copy, in this SR or, if it is null, in the disk's own; it is nobody's snapshot."""
        with self.own_task("VDI.copy", task) as mine:
            with self.operation("VDI", vdi, "copy", mine):
                with self.lock:
                    record = self.record("VDI", vdi)
                    names = ("name_label", "name_description", "type", "sharable", "virtual_size", "tags")
                    new = self.vdi_create(dict({name: _copied(record[name]) for name in names}, read_only=False,
                                               SR=record["SR"] if sr == NULL else sr,
                                               other_config=dict(record["other_config"])))
                    source, target = self.disk(vdi), self.disk(new)
                try:
                    for block in source.used_blocks():
                        target.write(block * storage.MIB, source.block(block))
                except Failure:
                    self.vdi_destroy(new)
                    raise
                with self.lock:
                    self.update_utilisation(new)
                return new

    def _fields_to_copy(self, vdi: str) -> Dict[str, Any]:
        record = self.record("VDI", vdi)
        names = ("name_label", "name_description", "tags", "other_config", "type", "sharable", "read_only", "on_boot",
                 "virtual_size", "SR", "cbt_enabled", "allow_caching", "xenstore_data")
        return {name: _copied(record[name]) for name in names}

    def _duplicate(self, vdi: str, fields: Dict[str, Any], snapshot: bool) -> str:
        original = self.record("VDI", vdi)
        sr = original["SR"]
        self.assert_sr_answers(sr)
        if original["uuid"] not in self.storage.contents:
            raise Failure("SR_BACKEND_FAILURE_46", "", "The VDI is not available", "")
        self._reserve(sr, self.storage.cost_of_snapshot(original["uuid"]))
        uuid = new_uuid4()
        self.storage.snapshot(original["uuid"], uuid, frozen=snapshot)
        fields.update(uuid=uuid, location=uuid, physical_utilisation=str(self.storage.utilisation(uuid)))
        if snapshot:
            fields.update(is_a_snapshot=True, snapshot_of=vdi, snapshot_time=self.now())
        new = self.create("VDI", fields)
        self.update_space(sr)
        self.update_allowed_operations("VDI", new)
        return new

    def vdi_destroy(self, vdi: str, task: Optional[str] = None) -> None:
        """VDI.destroy: the contents, the row, and every VBD that points at it, whose VM ever it is."""
        with self.own_task("VDI.destroy", task) as mine:
            with self.operation("VDI", vdi, "destroy", mine):
                with self.lock:
                    record = self.record("VDI", vdi)
                    self.assert_sr_answers(record["SR"])
                    has_data = record["type"] != "cbt_metadata"
                    if record["missing"] or (has_data and record["uuid"] not in self.storage.contents):
                        raise Failure("SR_BACKEND_FAILURE_46", "", "The VDI is not available", "")
                    if has_data:
                        self.storage.destroy(record["uuid"])
                    self._drop_vdi_row(vdi)

    def vdi_data_destroy(self, vdi: str, task: Optional[str] = None) -> None:
        """VDI.data_destroy: of a snapshot whose changed blocks are tracked only the row and the tracking stay; it waits a little
        for its VBDs to be destroyed, a VM snapshot's too (xapi_vdi.ml _data_destroy, v24.19.2)."""
        with self.own_task("VDI.data_destroy", task) as mine:
            with self.operation("VDI", vdi, "data_destroy", mine):
                with self.lock:
                    record = self.record("VDI", vdi)
                    if record["type"] == "cbt_metadata":
                        return
                    self.assert_sr_answers(record["SR"])
                    deadline = time.time() + DATA_DESTROY_PATIENCE_S
                    while record["VBDs"]:
                        left = deadline - time.time()
                        if left <= 0 or self.stopping:
                            raise Failure("VDI_IN_USE", vdi, "data_destroy")
                        self.changed.wait(min(left, 1.0))
                    if record["missing"] or record["uuid"] not in self.storage.contents:
                        raise Failure("SR_BACKEND_FAILURE_46", "", "The VDI is not available", "")
                    self.storage.destroy(record["uuid"])
                    self.set_fields("VDI", vdi, {"type": "cbt_metadata", "physical_utilisation": "0"})
                    self.update_space(record["SR"])

    def vdi_pool_migrate(self, vdi: str, sr: str, task: Optional[str] = None) -> str:
        """VDI.pool_migrate: the disk of a VM goes to another SR, under a new uuid, and the disks of the VM's snapshots with it.

        What the API keeps of a disk does not go with it: other_config, tags. Snapshots of the disk that belong to no VM
        snapshot stay, as snapshots of what is gone. A disk of a VM snapshot that is of none of the VM's present disks goes
        to the pool's default SR, and is nobody's snapshot there. (message_forwarding.ml, xapi_vm_migrate.ml
        vdi_pool_migrate, migrate_send', vdi_copy_fun and intra_pool_vdi_remap, v24.19.2.) Stricter than there: a running VM
        does not go to another host for it; a VM that is Suspended keeps its memory image where it is.
        """
        with self.lock:
            vbds = self.record("VDI", vdi)["VBDs"]
            self.record("SR", sr)
            if not vbds:
                raise Failure("VDI_NEEDS_VM_FOR_MIGRATE", vdi)
            drive = vbds[0]
            vm = self.record("VBD", drive)["VM"]
        with self.own_task("VDI.pool_migrate", task) as mine:
            with self.operation("VM", vm, "migrate_send", mine):
                with self.operation("VDI", vdi, "mirror", mine):
                    moved = self._moved_disks(vm, vdi, sr)
                for old in moved:
                    self.vdi_destroy(old)
            with self.lock:
                return self.record("VBD", drive)["VDI"]

    def _moved_disks(self, vm: str, vdi: str, sr: str) -> List[str]:
        """Copies of this disk of the VM and of its snapshots are in their places; the disks that were."""
        with self.lock:
            machines = [vm] + self.record("VM", vm)["snapshots"]
            places = {}  # type: Dict[str, str]
            for drive in self.vm_disks(vm):
                disk = self.record("VBD", drive)["VDI"]
                record = self.record("VDI", disk)
                if record["on_boot"] == "reset":
                    raise Failure("VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION", disk)
                places[disk] = sr if disk == vdi else record["SR"]
            for drive in [drive for machine in machines[1:] for drive in self.vm_disks(machine)]:
                disk = self.record("VBD", drive)["VDI"]
                of = self.record("VDI", disk)["snapshot_of"]
                places[disk] = places[of] if of in places else self.pool_record()["default_SR"]
            needed = [place for place in places.values()] + self.srs_of_vm(vm)
            host = self.record("VM", vm)["resident_on"]
            if not (self.exists("host", host) and self.sees_all(host, needed)):
                self.choose_host(needed)
                if self.exists("host", host):
                    raise Failure("NO_HOSTS_AVAILABLE")
            going = [disk for disk, place in places.items() if place != self.record("VDI", disk)["SR"]]
            for disk in going:
                record = self.record("VDI", disk)
                for one in (record["SR"], places[disk]):
                    if self.record("SR", one)["content_type"] == "iso" or self.record("SR", one)["type"] == "udev":
                        raise Failure("SR_DOES_NOT_SUPPORT_MIGRATION", one)
                if record["cbt_enabled"]:
                    raise Failure("VDI_CBT_ENABLED", disk)
                self.assert_sr_answers(places[disk])
            new = {}  # type: Dict[str, str]
            try:
                for disk in sorted(going, key=lambda disk: (int(self.record("VDI", disk)["virtual_size"]),
                                                           self.record("VDI", disk)["snapshot_time"])):
                    new[disk] = self._copied_to(disk, places[disk])
            except Failure:
                for copy in new.values():
                    self.vdi_destroy(copy)
                raise
            for disk, copy in new.items():
                of = self.record("VDI", disk)["snapshot_of"]
                if of in places:
                    self.set_fields("VDI", copy, {"is_a_snapshot": True, "snapshot_of": new.get(of, of),
                                                  "snapshot_time": self.record("VDI", disk)["snapshot_time"]})
                for drive in list(self.record("VDI", disk)["VBDs"]):
                    if self.record("VBD", drive)["VM"] in machines:
                        self.set_field("VBD", drive, "VDI", copy)
                self.update_allowed_operations("VDI", disk)
                self.update_allowed_operations("VDI", copy)
            return list(new)

    def _copied_to(self, vdi: str, sr: str) -> str:
        """A new disk there, with the contents of this one and what the storage manager keeps of it."""
        record = self.record("VDI", vdi)
        if record["uuid"] not in self.storage.contents:
            raise Failure("SR_BACKEND_FAILURE_46", "", "The VDI is not available", "")
        place = self.record("SR", sr)["uuid"]
        self._reserve(sr, self.storage.cost_of_copy(record["uuid"], place))
        uuid = new_uuid4()
        self.storage.copy(record["uuid"], uuid, place)
        names = ("name_label", "name_description", "type", "sharable", "read_only", "virtual_size")
        copy = self.create("VDI", dict({name: record[name] for name in names}, uuid=uuid, location=uuid, SR=sr,
                                       physical_utilisation=str(self.storage.utilisation(uuid))))
        self.update_space(sr)
        return copy

    def note_on_boot(self, vdi: str) -> None:
        """The storage manager's own note of on_boot, which VM operations go by (xapi_vm_lifecycle.ml, v24.19.2)."""
        if self.record("VDI", vdi)["on_boot"] == "reset":
            self.set_key("VDI", vdi, "sm_config", "on_boot", "reset")
        else:
            self.drop_key("VDI", vdi, "sm_config", "on_boot")

    def vdi_forget(self, vdi: str, task: Optional[str] = None) -> None:
        """VDI.forget: only the row goes; the next SR.scan finds the disk again."""
        with self.own_task("VDI.forget", task) as mine:
            with self.operation("VDI", vdi, "forget", mine):
                with self.lock:
                    record = self.record("VDI", vdi)
                    if record["uuid"] in self.storage.contents:
                        self.set_stray(record["uuid"], self.record("SR", record["SR"])["uuid"])
                    self._drop_vdi_row(vdi)

    def _drop_vdi_row(self, vdi: str) -> None:
        record = self.record("VDI", vdi)
        for vbd in list(record["VBDs"]):
            self.destroy_row("VBD", vbd)
        sr = record["SR"]
        self.destroy_row("VDI", vdi)
        self.update_space(sr)

    def set_stray(self, uuid: str, sr_uuid: Optional[str]) -> None:
        """Note that an SR holds a disk which the database does not know, or (None) that it knows it again."""
        if sr_uuid is None:
            self.strays.pop(uuid, None)
        else:
            self.strays[uuid] = sr_uuid
        self.log(["stray", uuid, sr_uuid])

    # --- SR calls

    def sr_scan(self, sr: str) -> None:
        """SR.scan: disks that the SR holds and the database forgot get rows again. Their names are lost."""
        with self.lock:
            record = self.record("SR", sr)
            self.assert_sr_answers(sr)
            for uuid in [uuid for uuid, of in self.strays.items() if of == record["uuid"]]:
                self.set_stray(uuid, None)
                content = self.storage.contents.get(uuid)
                if content is None:
                    continue
                vdi = self.create("VDI", {"uuid": uuid, "location": uuid, "SR": sr, "virtual_size": str(content.size),
                                          "physical_utilisation": str(self.storage.utilisation(uuid)),
                                          "is_a_snapshot": content.frozen, "read_only": False})
                self.update_allowed_operations("VDI", vdi)
            for vdi in list(record["VDIs"]):
                uuid = self.record("VDI", vdi)["uuid"]
                if uuid in self.storage.contents:
                    for field, value in (("physical_utilisation", str(self.storage.utilisation(uuid))),
                                         ("virtual_size", str(self.storage.contents[uuid].size))):
                        if self.record("VDI", vdi)[field] != value:
                            self.set_field("VDI", vdi, field, value)
            self.update_space(sr)

    def pbd_plug(self, pbd: str) -> None:
        """PBD.plug: the host attaches the SR; one that is attached is left as it is (xapi_pbd.ml plug, v24.19.2)."""
        with self.lock:
            record = self.record("PBD", pbd)
            self.assert_can_be_asked(record["host"])
            if record["currently_attached"]:
                return
            sr = self.record("SR", record["SR"])
            for other in sr["PBDs"]:
                if not sr["shared"] and self.tables["PBD"][other]["currently_attached"]:
                    raise Failure("SR_NOT_SHARABLE", record["SR"], self.tables["PBD"][other]["host"])
            self._set_plugged(pbd, True)
            if self.is_master(record["host"]):
                self.sr_scan(record["SR"])

    def pbd_unplug(self, pbd: str) -> None:
        """PBD.unplug: refused while a VM on that host has one of the SR's disks attached (xapi_pbd.ml unplug, v24.19.2)."""
        with self.lock:
            record = self.record("PBD", pbd)
            self.assert_can_be_asked(record["host"])
            if not record["currently_attached"]:
                return
            active = [vdi for vdi in self.record("SR", record["SR"])["VDIs"] for vbd in self.holders(vdi)
                      if self.record("VM", self.tables["VBD"][vbd]["VM"])["resident_on"] == record["host"]]
            if active:
                raise Failure("VDI_IN_USE", *active)
            self._set_plugged(pbd, False)

    def _set_plugged(self, pbd: str, attached: bool) -> None:
        self.set_field("PBD", pbd, "currently_attached", attached)
        for vdi in self.record("SR", self.record("PBD", pbd)["SR"])["VDIs"]:
            self.update_allowed_operations("VDI", vdi)

    # --- what a guest does

    def guest_write(self, vm: str, device: str, block: int, count: int = 1, zeros: bool = False) -> None:
        """A guest writes to so many MiB blocks of the disk that it has under this device name, up to the one that does not fit
        on the SR: data that were never there before, or zeros."""
        with self.lock:
            for vbd in self.record("VM", vm)["VBDs"]:
                record = self.tables["VBD"][vbd]
                if record["type"] == "Disk" and not record["empty"] and device in self.names_of_drive(vbd):
                    vdi = record["VDI"]
                    break
            else:
                raise KeyError("the VM has no disk %s" % device)
            uuid = self.record("VDI", vdi)["uuid"]
            if count < 1:
                raise KeyError("the number of blocks must be 1 or more, not %d" % count)
            for number in (block, block + count - 1):
                if not 0 <= number < self.storage.contents[uuid].block_count():
                    raise KeyError("the disk has no block %d" % number)
            try:
                for number in range(block, block + count):
                    self._reserve_block(uuid, number)
                    self.storage.guest_write(uuid, number, zeros)
            finally:
                self.update_utilisation(vdi)


def _in_whole_units(size: int) -> int:
    return (size + SIZE_UNIT - 1) // SIZE_UNIT * SIZE_UNIT


def device_name(userdevice: str) -> str:
    """The name under which a guest sees userdevice 0, 1, ...: xvda, xvdb, ... xvdz, xvdaa."""
    if not userdevice.isdigit():
        return userdevice
    number = int(userdevice)
    letters = chr(ord("a") + number % 26)
    while number >= 26:
        number = number // 26 - 1
        letters = chr(ord("a") + number % 26) + letters
    return "xvd" + letters


def _is_system_domain(vm: Dict[str, Any]) -> bool:
    """A domain that serves others: a control domain, or one so marked (system_domains.ml is_system_domain, v24.19.2)."""
    return vm["is_control_domain"] or vm["other_config"].get("is_system_domain") == "true"


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else value
