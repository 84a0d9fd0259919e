"""What can be done to VMs, their VBDs and their VIFs: part of model.Pool."""

import hashlib
import re
from typing import Any, Dict, Iterable, List, Optional

import lifecycle
from database import new_ref, new_uuid
from disks import device_name
from schema import CLASSES, CONSTRUCTORS, EPOCH, NULL, Failure, database_text, record_of_text

#: A guest's drivers and features, as the recorded guests had them.
GUEST_METRICS = {
    "PV_drivers_version": {"major": "8", "minor": "2", "micro": "0", "build": "1"},
    "other": {"feature-shutdown": "1", "feature-reboot": "1", "feature-suspend": "1"},
    "PV_drivers_up_to_date": True, "PV_drivers_detected": True, "live": True,
}

#: What a VM's copies start with, whatever the original has (xapi_vm_clone.ml copy_vm_record, v26.17.0).
RESET_IN_COPIES = {
    "blocked_operations": {}, "current_operations": {}, "is_default_template": False, "ha_always_run": False,
    "protection_policy": NULL, "snapshot_schedule": NULL, "appliance": NULL, "groups": [], "start_delay": "0",
    "shutdown_delay": "0", "order": "0", "suspend_SR": NULL, "suspend_VDI": NULL, "version": "0", "requires_reboot": False,
    "resident_on": NULL, "scheduled_to_be_resident_on": NULL, "domid": "-1", "domarch": "", "blobs": {}, "consoles": [],
    "crash_dumps": [], "VBDs": [], "VIFs": [], "VUSBs": [], "snapshots": [], "children": [], "attached_PCIs": [],
    "transportable_snapshot_id": "", "is_snapshot_from_vmpp": False, "is_vmss_snapshot": False, "pending_guidances": [],
    "pending_guidances_recommended": [], "pending_guidances_full": [], "reference_label": "",
}

#: What VM.revert leaves as it is (xapi_vm_snapshot.ml do_not_copy, v24.19.2); the last line: its own lists, and what is set
#: from other sources.
NOT_REVERTED = frozenset((
    "uuid suspend_VDI power_state parent current_operations allowed_operations metrics guest_metrics resident_on domid "
    "protection_policy snapshot_schedule scheduled_to_be_resident_on snapshots tags affinity groups consoles VBDs VIFs VGPUs "
    "VUSBs VTPMs attached_PCIs is_snapshot_from_vmpp "
    "children crash_dumps").split())


class Machines:
    """VM, VBD and VIF calls. `self` is the pool."""

    # --- lookups

    def vm_disks(self, vm: str) -> List[str]:
        """The VBDs of a VM that are disks with something in them."""
        return [vbd for vbd in self.record("VM", vm)["VBDs"]
                if self.tables["VBD"][vbd]["type"] != "CD" and not self.tables["VBD"][vbd]["empty"]]

    def srs_of_vm(self, vm: str) -> List[str]:
        """Every SR that a host must see to work on the VM's disks, that of an inserted ISO too.

        A drive whose disk is not there, or a disk whose SR is not, makes it one that no host sees: the null reference
        (xapi_vm_helpers.ml assert_can_see_SRs, v26.17.0).
        """
        record = self.record("VM", vm)
        disks = [self.tables["VBD"][vbd]["VDI"] for vbd in record["VBDs"] if not self.tables["VBD"][vbd]["empty"]]
        if record["suspend_VDI"] in self.tables["VDI"]:
            disks.append(record["suspend_VDI"])
        return sorted({self.tables["VDI"].get(disk, {}).get("SR", NULL) for disk in disks})

    def find_vms(self, name_or_uuid: str) -> List[str]:
        """All VMs of this name, or the one with this uuid."""
        return [ref for ref, record in self.tables["VM"].items() if name_or_uuid in (record["uuid"], record["name_label"])]

    # --- VM: from nothing, and to nothing

    def vm_create(self, fields: Dict[str, Any]) -> str:
        """VM.create; `fields` as schema.CONSTRUCTORS has them."""
        with self.lock:
            if fields.get("power_state", "Halted") == "Suspended":
                for needed in ("suspend_VDI", "last_booted_record", "last_boot_CPU_flags"):
                    if fields.get(needed, "") in ("", NULL, {}):
                        raise Failure("VM_BAD_POWER_STATE", NULL, "halted", "suspended")
            elif fields.get("power_state", "Halted") != "Halted":
                raise Failure("VALUE_NOT_SUPPORTED", "power_state", fields["power_state"], "Only Halted and Suspended")
            fields = dict(fields)
            fields.pop("domid", None)
            fields["other_config"] = dict(fields["other_config"])
            fields["other_config"].setdefault("mac_seed", new_uuid())
            fields["metrics"] = self.create("VM_metrics", {"VCPUs_utilisation": {
                str(number): 0.0 for number in range(int(fields["VCPUs_max"]))}})
            fields.setdefault("memory_overhead", "5242880")
            vm = self.create("VM", fields)
            self.update_allowed_operations("VM", vm)
            return vm

    def vm_destroy(self, vm: str, task: Optional[str] = None) -> None:
        """VM.destroy: the VM, its VBDs and VIFs; never a VDI, nor the suspend image (xapi_vm_helpers.ml destroy, v26.17.0)."""
        with self.own_task("VM.destroy", task) as mine:
            with self.operation("VM", vm, "destroy", mine):
                with self.lock:
                    self.drop_vm_row(vm)

    def drop_vm_row(self, vm: str) -> None:
        record = self.record("VM", vm)
        # the chain of snapshots closes over the gap
        for child in list(record["children"]):
            self.set_field("VM", child, "parent", record["parent"])
        disks = []
        for vbd in list(record["VBDs"]):
            disks.append(self.tables["VBD"][vbd]["VDI"])
            self.destroy_row("VBD", vbd)
        for vif in list(record["VIFs"]):
            self.destroy_row("VIF", vif)
        for console in list(record["consoles"]):
            self.destroy_row("console", console)
        for cls, ref in (("VM_metrics", record["metrics"]), ("VM_guest_metrics", record["guest_metrics"])):
            if ref in self.tables[cls]:
                self.destroy_row(cls, ref)
        self.destroy_row("VM", vm)
        for disk in disks:
            self.update_allowed_operations("VDI", disk)

    # --- VM: copies

    def vm_snapshot(self, vm: str, new_name: str, ignore_vdis: Iterable[str] = (), task: Optional[str] = None) -> str:
        """VM.snapshot: allowed in every power state; disks one after another, not at one moment."""
        return self._copy_machine("snapshot", vm, new_name, set(ignore_vdis), task)

    def vm_snapshot_with_quiesce(self, vm: str, new_name: str, task: Optional[str] = None) -> str:
        """VM.snapshot_with_quiesce, for servers and guests that have it."""
        return self._copy_machine("snapshot_with_quiesce", vm, new_name, set(), task)

    def vm_checkpoint(self, vm: str, new_name: str, task: Optional[str] = None) -> str:
        """VM.checkpoint: a snapshot with the memory; a running VM is suspended and resumed for it."""
        return self._copy_machine("checkpoint", vm, new_name, set(), task)

    def vm_clone(self, vm: str, new_name: str, task: Optional[str] = None) -> str:
        """VM.clone: a VM of its own, with other MAC addresses, on writable copies of the disks."""
        return self._copy_machine("clone", vm, new_name, set(), task)

    def vm_copy(self, vm: str, new_name: str, sr: str, task: Optional[str] = None) -> str:
        """VM.copy: as a clone, but on full copies of the disks, in this SR, or each where its original is if it is null."""
        if sr != NULL:
            with self.lock:
                self.record("SR", sr)
        return self._copy_machine("copy", vm, new_name, set(), task, sr)

    def _copy_machine(self, operation: str, vm: str, new_name: str, ignored: set, task: Optional[str], sr: str = NULL) -> str:
        with self.own_task("VM." + operation, task) as mine:
            with self.operation("VM", vm, operation, mine):
                with self.lock:
                    if sr != NULL:
                        self.record("SR", sr)
                    self.choose_host(self.srs_of_vm(vm))
                    if operation == "checkpoint":
                        self.assert_vm_answers(vm)
                        self._assert_can_suspend(vm)
                    vbds = [vbd for vbd in self.record("VM", vm)["VBDs"] if self.tables["VBD"][vbd]["VDI"] not in ignored]
                made = []  # type: List[str]
                disk_of = {}  # type: Dict[str, str]
                try:
                    for vbd in vbds:
                        disk_of[vbd] = self._copy_disk_of(vbd, operation, made, sr)
                    with self.lock:
                        return self._copy_rows(operation, vm, new_name, mine, disk_of)
                except Failure:
                    # a snapshot that fails half-way leaves nothing behind (xapi_vm_clone.ml safe_clone_disks, v26.17.0)
                    for disk in made:
                        self.vdi_destroy(disk)
                    raise

    def _copy_disk_of(self, vbd: str, operation: str, made: List[str], sr: str = NULL) -> str:
        with self.lock:
            record = self.record("VBD", vbd)
            if record["empty"]:
                return NULL
            if record["type"] == "CD":
                return record["VDI"]  # an ISO is not copied, both use the one
            disk = record["VDI"]
        if operation == "copy":
            new = self.vdi_copy(disk, sr)
        else:
            new = self.vdi_clone(disk, {}) if operation == "clone" else self.vdi_snapshot(disk, {})
        made.append(new)
        return new

    def _copy_rows(self, operation: str, vm: str, new_name: str, task: str, disk_of: Dict[str, str]) -> str:
        """The new VM's row, its VBDs and VIFs. The row is copied now, at the end of the call: what changed meanwhile is in it."""
        original = self.record("VM", vm)
        is_snapshot = operation not in ("clone", "copy")
        fields = {name: _copied(value) for name, value in original.items()}
        fields.update({name: _copied(value) for name, value in RESET_IN_COPIES.items()})
        other_config = {key: value for key, value in original["other_config"].items()
                        if key not in ("default_template", "xensource_internal")}
        if not is_snapshot:
            other_config["mac_seed"] = new_uuid()
            if original["is_a_template"]:
                other_config.setdefault("base_template_name", original["name_label"])
        state = original["power_state"]
        suspended = (operation == "checkpoint" and state in ("Running", "Suspended")) or \
                    (not is_snapshot and state == "Suspended")
        fields.update(
            uuid=new_uuid(), name_label=new_name, allowed_operations=[], other_config=other_config,
            power_state="Suspended" if suspended else "Halted", is_a_snapshot=is_snapshot,
            is_a_template=is_snapshot or original["is_a_template"], snapshot_of=vm if is_snapshot else NULL,
            snapshot_time=self.now() if is_snapshot else EPOCH, parent=original["parent"] if is_snapshot else NULL,
            generation_id=_fresh_generation(original["generation_id"]),
            snapshot_metadata=self._metadata_text(vm) if is_snapshot else "",
            snapshot_info={"power-state-at-snapshot": state, "disk-snapshot-type": (
                "quiesced" if operation == "snapshot_with_quiesce" else "crash_consistent")} if is_snapshot else {},
            metrics=self._copy_of("VM_metrics", original["metrics"]),
            guest_metrics=self._copy_of("VM_guest_metrics", original["guest_metrics"]))
        if suspended:
            fields["suspend_VDI"] = self._memory_image(vm)
        new = self.create("VM", fields)
        if is_snapshot:
            self.set_field("VM", vm, "parent", new)
        for vbd, disk in disk_of.items():
            self._copy_vbd(vbd, new, disk, suspended)
        for vif in original["VIFs"]:
            self._copy_vif(vif, new, is_snapshot, suspended)
        self.update_allowed_operations("VM", new)
        if is_snapshot:
            name = {"snapshot": "VM_SNAPSHOTTED", "checkpoint": "VM_CHECKPOINTED"}.get(operation, "VM_SNAPSHOTTED")
            verb = "checkpointed, checkpoint name" if operation == "checkpoint" else "snapshotted, snapshot name"
            self.create_message(name, "VM", original["uuid"], "VM '%s' (uuid: %s) %s: %s" % (
                original["name_label"], original["uuid"], verb, new_name))
        return new

    def _copy_of(self, cls: str, ref: str) -> str:
        record = self.tables[cls].get(ref)
        if record is None:
            return NULL
        return self.create(cls, {name: _copied(value) for name, value in record.items() if name != "uuid"})

    def _copy_vbd(self, vbd: str, vm: str, disk: str, suspended: bool = False) -> None:
        fields = {name: _copied(value) for name, value in self.record("VBD", vbd).items()}
        fields.update(uuid=new_uuid(), VM=vm, VDI=disk, currently_attached=suspended and fields["currently_attached"],
                      current_operations={}, allowed_operations=[], metrics=_dangling())
        if fields["type"] == "Disk":
            # so that uninstalling the copy removes its disks, whoever owned the originals (CA-58405)
            fields["other_config"].setdefault("owner", "")
        new = self.create("VBD", fields)
        self.update_allowed_operations("VBD", new)
        self.update_allowed_operations("VDI", disk)

    def _copy_vif(self, vif: str, vm: str, keep_mac: bool, suspended: bool = False) -> None:
        fields = {name: _copied(value) for name, value in self.record("VIF", vif).items()}
        fields.update(uuid=new_uuid(), VM=vm, currently_attached=suspended and fields["currently_attached"],
                      current_operations={}, allowed_operations=[], metrics=_dangling())
        if not keep_mac:
            fields.update(MAC=mac_of(self.record("VM", vm)["other_config"]["mac_seed"], fields["device"]),
                          MAC_autogenerated=True)
        self.update_allowed_operations("VIF", self.create("VIF", fields))

    def _metadata_text(self, vm: str) -> str:
        """snapshot_metadata: the original's row, as database text (helpers.ml vm_to_string, v26.17.0)."""
        columns = CLASSES["VM"].column_of
        cells = {columns[name]: database_text(value) for name, value in self.record("VM", vm).items()}
        cells.update({"_ref": vm, "recommended_guidances": "()"})
        return database_text(dict(sorted(cells.items(), reverse=True)))

    def _memory_image(self, vm: str) -> str:
        """The suspend image of a new checkpoint: a copy of the VM's, or one made now."""
        record = self.record("VM", vm)
        if record["suspend_VDI"] in self.tables["VDI"]:
            return self._duplicate(record["suspend_VDI"], self._fields_to_copy(record["suspend_VDI"]), snapshot=True)
        return self._new_memory_image(vm)

    def _new_memory_image(self, vm: str) -> str:
        record = self.record("VM", vm)
        image = self.vdi_create({"SR": self._suspend_sr(vm), "virtual_size": record["memory_static_max"], "type": "suspend",
                                 "sharable": False, "read_only": False, "other_config": {"last_known_as_VM": record["uuid"]},
                                 "name_label": "Suspend image", "name_description": "Suspend image"})
        uuid = self.record("VDI", image)["uuid"]
        self._reserve_block(uuid, 0)
        self.storage.guest_write(uuid, 0)              # of the guest's memory, its first MiB is in use
        self.update_utilisation(image)
        return image

    def _suspend_sr(self, vm: str) -> str:
        for sr in (self.record("VM", vm)["suspend_SR"], self.pool_record()["suspend_image_SR"]):
            if sr in self.tables["SR"]:
                return sr
        raise Failure("VM_NO_SUSPEND_SR", vm)

    def _assert_can_suspend(self, vm: str) -> None:
        if self.record("VM", vm)["power_state"] != "Suspended":
            self._suspend_sr(vm)

    def vm_revert(self, snapshot: str, task: Optional[str] = None) -> None:
        """VM.revert: the VM is as it was at the snapshot, but for tags and affinity, on writable copies of its disks.

        Its disks go, those that the snapshot has a copy of; one that came later stays, with no VM. A VM that is gone is
        made anew, with its old uuid. Snapshots of a disk that goes become snapshots of the disk that takes its place.
        (message_forwarding.ml VM.revert, xapi_vm_snapshot.ml, v24.19.2)
        """
        with self.own_task("VM.revert", task) as mine:
            with self.lock:
                vm = self.record("VM", snapshot)["snapshot_of"]
                if vm == snapshot:
                    # stricter than there, where the operation waits for itself
                    self.assert_allowed("VM", snapshot, "revert")
                    raise Failure("VM_REVERT_FAILED", snapshot, vm)
                if vm not in self.tables["VM"]:
                    vm = self._vm_from_snapshot(snapshot)
            with self.operation("VM", snapshot, "revert", mine), self.operation("VM", vm, "reverting", mine):
                with self.lock:
                    self.choose_host(self.srs_of_vm(snapshot))
                    if self.record("VM", vm)["power_state"] != "Halted":
                        self.assert_vm_answers(vm)
                        self._stop(vm, "Halted")
                    self._take_settings(snapshot, vm)
                try:
                    self._take_devices(snapshot, vm)
                except Failure as error:
                    if error.code in ("SR_BACKEND_FAILURE_44", "SR_BACKEND_FAILURE_109", "VDI_INCOMPATIBLE_TYPE"):
                        raise
                    raise Failure("VM_REVERT_FAILED", snapshot, vm)
            with self.lock:
                self.update_allowed_operations("VM", vm)
                record = self.record("VM", snapshot)
                self._tell(vm, "VM_SNAPSHOT_REVERTED", "reverted to snapshot: %s (uuid %s)" % (
                    record["name_label"], record["uuid"]))

    def _vm_from_snapshot(self, snapshot: str) -> str:
        """The VM of a snapshot that outlived it, without devices; the other snapshots are its own again."""
        record = self.record("VM", snapshot)
        old = record["snapshot_of"]
        cells = record_of_text("VM", record["snapshot_metadata"])
        if "uuid" not in cells or self.has_uuid("VM", cells["uuid"]):
            raise Failure("VM_REVERT_FAILED", snapshot, old)
        fields = {name: _copied(record[name]) for names in CONSTRUCTORS["VM"] for name in names}
        vm = self.vm_create(dict(fields, power_state="Halted", suspend_VDI=NULL))
        self.set_field("VM", vm, "uuid", cells["uuid"])
        self._take_settings(snapshot, vm)
        for other, row in list(self.tables["VM"].items()):
            if row["snapshot_of"] == old:
                self.set_field("VM", other, "snapshot_of", vm)
        return vm

    def _take_settings(self, snapshot: str, vm: str) -> None:
        """The VM's fields as snapshot_metadata has them (revert_vm_fields)."""
        for name, value in record_of_text("VM", self.record("VM", snapshot)["snapshot_metadata"]).items():
            if name not in NOT_REVERTED:
                self.set_field("VM", vm, name, value)
        self.set_field("VM", vm, "ha_always_run", False)

    def _take_devices(self, snapshot: str, vm: str) -> None:
        """Drives, disks, interfaces and memory image of the snapshot instead of the VM's (update_vifs_vbds_vgpus_and_vusbs)."""
        with self.lock:
            source_vbds = list(self.record("VM", snapshot)["VBDs"])
            of = {self.tables["VDI"].get(self.tables["VBD"][vbd]["VDI"], {}).get("snapshot_of")
                  for vbd in self.vm_disks(snapshot)}
            going = [self.tables["VBD"][vbd]["VDI"] for vbd in self.vm_disks(vm) if self.tables["VBD"][vbd]["VDI"] in of]
            going.insert(0, self.record("VM", vm)["suspend_VDI"])
            for vbd in list(self.record("VM", vm)["VBDs"]):
                self.vbd_destroy(vbd)
        for disk in going:
            if self.tables["SR"].get(self.tables["VDI"].get(disk, {}).get("SR"), {}).get("content_type", "iso") != "iso":
                self.vdi_destroy(disk)
        made = {}  # type: Dict[str, str]
        for vbd in reversed(source_vbds):
            made[vbd] = self._copy_disk_of(vbd, "clone", [])
        with self.lock:
            record = self.record("VM", snapshot)
            for vbd, disk in made.items():
                source = self.tables["VDI"].get(self.tables["VBD"][vbd]["VDI"])
                if source is not None and source["is_a_snapshot"]:
                    # not by the list of the disk that was it: that one is gone
                    original = source["snapshot_of"]
                    for other, row in list(self.tables["VDI"].items()):
                        if row["snapshot_of"] == original:
                            self.set_field("VDI", other, "snapshot_of", disk)
            suspended = record["power_state"] == "Suspended"
            image = record["suspend_VDI"]
            if image in self.tables["VDI"]:
                image = self._duplicate(image, self._fields_to_copy(image), snapshot=False)
            self.set_field("VM", vm, "suspend_VDI", image)
            for vbd, disk in made.items():
                self._copy_vbd(vbd, vm, disk, suspended)
            for vif in list(self.record("VM", vm)["VIFs"]):
                self.destroy_row("VIF", vif)
            for vif in reversed(record["VIFs"]):
                self._copy_vif(vif, vm, keep_mac=True, suspended=suspended)
            for field, cls in (("guest_metrics", "VM_guest_metrics"), ("metrics", "VM_metrics")):
                old = self.record("VM", vm)[field]
                if old in self.tables[cls]:
                    self.destroy_row(cls, old)
                self.set_field("VM", vm, field, self._copy_of(cls, record[field]))
            self.set_fields("VM", vm, {"parent": snapshot, "power_state": record["power_state"],
                                       "generation_id": _fresh_generation(self.record("VM", vm)["generation_id"])})

    def assert_vm_answers(self, vm: str) -> None:
        """HOST_OFFLINE if the host that the VM runs on has died: what is done to a running VM is done there
        (message_forwarding.ml forward_vm_op, v24.19.2)."""
        host = self.record("VM", vm)["resident_on"]
        if self.exists("host", host):
            self.assert_can_be_asked(host)

    def vm_power_state_reset(self, vm: str) -> None:
        """VM.power_state_reset: a VM whose host died is halted from now on (xapi_vm.ml, v24.19.2).

        No operation is asked for: neither blocked_operations nor other operations stand in its way. Its devices are
        detached; the memory image of a suspended VM stays.
        """
        with self.lock:
            record = self.record("VM", vm)
            if record["is_control_domain"]:
                raise Failure("CANNOT_RESET_CONTROL_DOMAIN", vm)
            host = record["resident_on"]
            if record["power_state"] in ("Running", "Paused") and host in self.tables["host"]:
                if self.is_master(host):
                    if record["power_state"] == "Running":
                        raise Failure("DOMAIN_EXISTS", vm)
                elif self.is_live(host):
                    raise Failure("HOST_IS_LIVE", host)
            self.set_field("VM", vm, "current_operations", {})
            self._stop(vm, "Halted")
            self.update_allowed_operations("VM", vm)

    # --- VM: power

    def vm_start(self, vm: str, start_paused: bool = False, host: Optional[str] = None, task: Optional[str] = None) -> None:
        """VM.start, and VM.start_on if a host is given."""
        with self.own_task("VM.start", task) as mine:
            with self.operation("VM", vm, "start_on" if host else "start", mine):
                with self.lock:
                    self._boot(vm, host or self.choose_host(self.srs_of_vm(vm)), start_paused, "VM_STARTED", "started on host")

    def vm_resume(self, vm: str, start_paused: bool = False, task: Optional[str] = None) -> None:
        with self.own_task("VM.resume", task) as mine:
            with self.operation("VM", vm, "resume", mine):
                with self.lock:
                    image = self.record("VM", vm)["suspend_VDI"]
                    host = self.choose_host(self.srs_of_vm(vm))
                    self._boot(vm, host, start_paused, "VM_RESUMED", "resumed on host")
                    self.set_field("VM", vm, "suspend_VDI", NULL)
            if image in self.tables["VDI"]:
                self.vdi_destroy(image)

    def vm_suspend(self, vm: str, task: Optional[str] = None) -> None:
        with self.own_task("VM.suspend", task) as mine:
            with self.operation("VM", vm, "suspend", mine):
                with self.lock:
                    self.assert_vm_answers(vm)
                    image = self._new_memory_image(vm)
                    self._stop(vm, "Suspended")
                    self.set_field("VM", vm, "suspend_VDI", image)
                    self._tell(vm, "VM_SUSPENDED", "suspended")

    def vm_shutdown(self, vm: str, operation: str, task: Optional[str] = None) -> None:
        """VM.hard_shutdown and VM.clean_shutdown."""
        with self.own_task("VM." + operation, task) as mine:
            with self.operation("VM", vm, operation, mine):
                with self.lock:
                    self.assert_vm_answers(vm)
                    image = self.record("VM", vm)["suspend_VDI"]
                    self._stop(vm, "Halted")
                    self.set_field("VM", vm, "suspend_VDI", NULL)
                    self._tell(vm, "VM_SHUTDOWN", "shutdown forcibly" if operation == "hard_shutdown" else "shutdown")
            if image in self.tables["VDI"]:
                self.vdi_destroy(image)

    def vm_pause(self, vm: str, paused: bool, task: Optional[str] = None) -> None:
        """VM.pause and VM.unpause."""
        operation = "pause" if paused else "unpause"
        with self.own_task("VM." + operation, task) as mine:
            with self.operation("VM", vm, operation, mine):
                with self.lock:
                    self.assert_vm_answers(vm)
                    self.set_field("VM", vm, "power_state", "Paused" if paused else "Running")

    def vm_reboot(self, vm: str, operation: str, task: Optional[str] = None) -> None:
        """VM.hard_reboot and VM.clean_reboot."""
        with self.own_task("VM." + operation, task) as mine:
            with self.operation("VM", vm, operation, mine):
                with self.lock:
                    self.assert_vm_answers(vm)
                    host = self.record("VM", vm)["resident_on"]
                    self._stop(vm, "Halted")
                    self._boot(vm, host, False, "VM_REBOOTED", "rebooted on host")

    def _boot(self, vm: str, host: str, paused: bool, message: str, text: str) -> None:
        record = self.record("VM", vm)
        for vbd in self.vm_disks(vm):
            self.assert_attachable(self.tables["VBD"][vbd]["VDI"], self.tables["VBD"][vbd]["mode"], vm, besides=vbd)
        self.run_vm(vm, host, paused)
        metrics = record["metrics"]
        if metrics in self.tables["VM_metrics"]:
            self.set_fields("VM_metrics", metrics, {"start_time": self.now(), "VCPUs_number": record["VCPUs_at_startup"],
                                                    "current_domain_type": record["domain_type"]})
        host_record = self.record("host", host)
        self._tell(vm, message, "%s: %s (uuid: %s)" % (text, host_record["name_label"], host_record["uuid"]))

    def run_vm(self, vm: str, host: str, paused: bool = False) -> None:
        """Put the rows into the state of a running VM."""
        self.last_domid[host] = 1 + self.last_domid.get(host, 0)
        domid = str(self.last_domid[host])
        self.set_fields("VM", vm, {"power_state": "Paused" if paused else "Running", "resident_on": host, "domid": domid})
        record = self.record("VM", vm)
        if record["other_config"].get("pci"):
            # devices are passed through by this key, and stand in the record while the VM has them
            self.set_field("VM", vm, "attached_PCIs", [new_ref() for _ in record["other_config"]["pci"].split(",")])
        if record["guest_metrics"] not in self.tables["VM_guest_metrics"]:
            metrics = {name: _copied(value) for name, value in GUEST_METRICS.items()}
            self.set_field("VM", vm, "guest_metrics", self.create("VM_guest_metrics", dict(metrics, last_updated=self.now())))
        self.plug_devices(vm, True)

    def plug_devices(self, vm: str, attached: bool) -> None:
        """All drives and interfaces of the VM are attached, or none."""
        record = self.record("VM", vm)
        for vbd in record["VBDs"]:
            fields = {"currently_attached": attached}  # type: Dict[str, Any]
            if attached:
                fields["device"] = self.tables["VBD"][vbd]["device"] or device_name(self.tables["VBD"][vbd]["userdevice"])
            self.set_fields("VBD", vbd, fields)
            self.update_allowed_operations("VBD", vbd)
            self.update_allowed_operations("VDI", self.tables["VBD"][vbd]["VDI"])
        for vif in record["VIFs"]:
            self.set_field("VIF", vif, "currently_attached", attached)
            self.update_allowed_operations("VIF", vif)

    def _stop(self, vm: str, state: str) -> None:
        """The VM runs no more. Only a halted one's drives and interfaces are marked as detached
        (xapi_vm_lifecycle.ml force_state_reset_keep_current_operations)."""
        self.set_fields("VM", vm, {"power_state": state, "resident_on": NULL, "domid": "-1", "attached_PCIs": []})
        if state == "Halted":
            self.plug_devices(vm, False)

    def _tell(self, vm: str, name: str, text: str) -> None:
        record = self.record("VM", vm)
        self.create_message(name, "VM", record["uuid"], "VM '%s' (uuid: %s) %s" % (record["name_label"], record["uuid"], text))

    # --- VM: templates

    def vm_set_is_a_template(self, vm: str, value: bool) -> None:
        """VM.set_is_a_template. Making a template needs a halted VM; unmaking one is not checked at all, snapshots included."""
        with self.lock:
            record = self.record("VM", vm)
            if value:
                self.assert_allowed("VM", vm, "make_into_template")
            elif record["metrics"] in self.tables["VM_metrics"]:
                self.set_field("VM_metrics", record["metrics"], "install_time", self.now())
            self.set_field("VM", vm, "is_a_template", value)
            self.update_allowed_operations("VM", vm)

    def vm_provision(self, vm: str, task: Optional[str] = None) -> None:
        """VM.provision: turn a clone of a template into a VM. The simulated templates bring no disks of their own."""
        with self.own_task("VM.provision", task) as mine:
            with self.operation("VM", vm, "provision", mine):
                with self.lock:
                    self.drop_key("VM", vm, "other_config", "disks")
                    self.set_field("VM", vm, "is_a_template", False)
                    self.update_allowed_operations("VM", vm)

    # --- VBD

    def vbd_create(self, fields: Dict[str, Any]) -> str:
        """VBD.create; the checks stand in the server's order (xapi_vbd.ml create, v26.17.0)."""
        with self.lock:
            self.record("VM", fields["VM"])
            if not fields["empty"]:
                disk = self.record("VDI", fields["VDI"])
                if disk["type"] not in ("system", "user", "ephemeral", "suspend", "crashdump", "metadata", "rrd", "pvs_cache"):
                    raise Failure("VDI_INCOMPATIBLE_TYPE", fields["VDI"],
                                  lifecycle.CBT_METADATA if disk["type"] == "cbt_metadata" else disk["type"])
            if fields["type"] == "CD" and fields["mode"] != "RO":
                raise Failure("VBD_CDS_MUST_BE_READONLY")
            if fields["type"] != "CD" and fields["empty"]:
                raise Failure("VBD_NOT_REMOVABLE_MEDIA", "in constructor")
            if not fields["empty"]:
                if fields["type"] == "CD" and self.record("SR", disk["SR"])["content_type"] != "iso":
                    raise Failure("VDI_IS_NOT_ISO", fields["VDI"], disk["type"])
                if fields["mode"] == "RW" and disk["read_only"]:
                    raise Failure("VDI_READONLY", fields["VDI"])
            free = self.free_devices(fields["VM"])
            userdevice = fields["userdevice"]
            if not _valid_device(userdevice) or (userdevice == "autodetect" and not free):
                raise Failure("INVALID_DEVICE", userdevice)
            if userdevice == "autodetect":
                userdevice = free[0]
            names = _possible_devices(userdevice)
            for vbd in self.record("VM", fields["VM"])["VBDs"]:
                if names & _possible_devices(self.tables["VBD"][vbd]["userdevice"]):
                    raise Failure("DEVICE_ALREADY_EXISTS", userdevice)
            fields = dict(fields, userdevice=userdevice, device="", metrics=_dangling())
            fields.pop("currently_attached", None)
            if fields["empty"]:
                fields["VDI"] = NULL
            vbd = self.create("VBD", fields)
            self.update_allowed_operations("VBD", vbd)
            self.update_allowed_operations("VDI", fields["VDI"])
            return vbd

    def free_devices(self, vm: str) -> List[str]:
        """VM.get_allowed_VBD_devices: the numbers that no VBD of the VM has."""
        taken = set()
        for vbd in self.record("VM", vm)["VBDs"]:
            taken |= _possible_devices(self.tables["VBD"][vbd]["userdevice"])
        return [str(number) for number in range(255) if not {str(number), device_name(str(number))} & taken]

    def vbd_destroy(self, vbd: str) -> None:
        with self.lock:
            record = self.record("VBD", vbd)
            if record["currently_attached"]:
                raise Failure("OPERATION_NOT_ALLOWED", "VBD '%s' still attached to '%s'" % (
                    record["uuid"], self.record("VM", record["VM"])["uuid"]))
            self.destroy_row("VBD", vbd)
            self.update_allowed_operations("VDI", record["VDI"])

    def _assert_hotplug(self, cls: str, ref: str, operation: str) -> Dict[str, Any]:
        """The record of a VBD or VIF that can be plugged or unplugged now."""
        record = self.record(cls, ref)
        vm = self.record("VM", record["VM"])
        failure = lifecycle.hotplug_refusal(cls, record, ref, vm, operation, self._has_drivers(vm),
                                            self.busy_has_four_parameters())
        if failure is not None:
            raise failure
        self.assert_vm_answers(record["VM"])
        return record

    def vbd_plug(self, vbd: str) -> None:
        with self.lock:
            record = self._assert_hotplug("VBD", vbd, "plug")
            if record["empty"]:
                raise Failure("VBD_IS_EMPTY", vbd)
            if record["mode"] == "RO" and record["type"] != "CD" and self.record("VM", record["VM"])["domain_type"] == "hvm":
                raise Failure("DISK_VBD_MUST_BE_READWRITE_FOR_HVM", vbd)
            self.assert_attachable(record["VDI"], record["mode"], record["VM"], besides=vbd)
            self._set_attached("VBD", vbd, True)

    def vbd_unplug(self, vbd: str) -> None:
        """VBD.unplug, of a control domain's too; while an export or an import has the device open, it is rejected."""
        with self.lock:
            self._assert_hotplug("VBD", vbd, "unplug")
            if vbd in self.open_devices:
                raise Failure("DEVICE_DETACH_REJECTED", "VBD", vbd, "")
            self._set_attached("VBD", vbd, False)

    def _set_attached(self, cls: str, ref: str, attached: bool) -> None:
        record = self.record(cls, ref)
        if cls == "VBD" and attached:
            self.set_field(cls, ref, "device", record["device"] or device_name(record["userdevice"]))
        self.set_field(cls, ref, "currently_attached", attached)
        self.update_allowed_operations(cls, ref)
        if cls == "VBD":
            self.update_allowed_operations("VDI", record["VDI"])

    def vif_plug(self, vif: str, attached: bool) -> None:
        """VIF.plug and VIF.unplug."""
        with self.lock:
            self._assert_hotplug("VIF", vif, "plug" if attached else "unplug")
            self._set_attached("VIF", vif, attached)

    def vif_move(self, vif: str, network: str) -> None:
        """VIF.move: to another network, in every power state (xapi_vif.ml move, v24.19.2)."""
        with self.lock:
            self.assert_vm_answers(self.record("VIF", vif)["VM"])
            self.record("network", network)
            self.set_field("VIF", vif, "network", network)

    def vbd_eject(self, vbd: str) -> None:
        with self.lock:
            record = self.record("VBD", vbd)
            if record["type"] != "CD":
                raise Failure("VBD_NOT_REMOVABLE_MEDIA", vbd)
            if record["empty"]:
                raise Failure("VBD_IS_EMPTY", vbd)
            disk = record["VDI"]
            self.set_fields("VBD", vbd, {"empty": True, "VDI": NULL})
            self.update_allowed_operations("VBD", vbd)
            self.update_allowed_operations("VDI", disk)

    def vbd_insert(self, vbd: str, vdi: str) -> None:
        with self.lock:
            record = self.record("VBD", vbd)
            if record["type"] != "CD":
                raise Failure("VBD_NOT_REMOVABLE_MEDIA", vbd)
            if not record["empty"]:
                raise Failure("VBD_NOT_EMPTY", vbd)
            if self.record("SR", self.record("VDI", vdi)["SR"])["content_type"] != "iso":
                raise Failure("VDI_IS_NOT_ISO", vdi, self.record("VDI", vdi)["type"])
            self.set_fields("VBD", vbd, {"empty": False, "VDI": vdi})
            self.update_allowed_operations("VBD", vbd)
            self.update_allowed_operations("VDI", vdi)

    # --- VIF

    def vif_create(self, fields: Dict[str, Any]) -> str:
        """VIF.create; an empty MAC is derived from the VM's mac_seed. MACs are not checked for being unique."""
        with self.lock:
            vm = self.record("VM", fields["VM"])
            self.record("network", fields["network"])
            if not re.match(r"[0-9]+\Z", fields["device"]):
                raise Failure("INVALID_DEVICE", fields["device"])
            if any(self.tables["VIF"][vif]["device"] == fields["device"] for vif in vm["VIFs"]):
                raise Failure("DEVICE_ALREADY_EXISTS", fields["device"])
            given = fields["MAC"]
            if given and not re.match(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}\Z", given):
                raise Failure("MAC_INVALID", given)
            if int(fields["MTU"]) <= 0:
                fields = dict(fields, MTU="1500")
            mac = given.lower() or mac_of(vm["other_config"].get("mac_seed", new_uuid()), fields["device"])
            fields = dict(fields, MAC=mac, MAC_autogenerated=not given, metrics=_dangling())
            fields.pop("currently_attached", None)
            vif = self.create("VIF", fields)
            self.update_allowed_operations("VIF", vif)
            return vif

    def vif_destroy(self, vif: str) -> None:
        with self.lock:
            if self.record("VIF", vif)["currently_attached"]:
                raise Failure("OPERATION_NOT_ALLOWED", "VIF currently attached to a running VM")
            self.destroy_row("VIF", vif)


def mac_of(seed: str, device: str) -> str:
    """The MAC that belongs to a mac_seed and a device number: local, not multicast (xapi_vif_helpers.ml gen_mac)."""
    first = seed.encode("ascii", "replace")
    for _ in range(2 * int(device if device.isdigit() else 0) + 1):
        first = hashlib.md5(first).digest()
    octets = bytearray(first[:4] + hashlib.md5(first).digest()[1:3])
    octets[0] = octets[0] & 0xfe | 0x02
    return ":".join("%02x" % octet for octet in octets)


def _fresh_generation(current: str) -> str:
    """A new generation id, where there is one; "0:0" asks for one at the first boot and stays."""
    if current in ("", "0:0"):
        return current
    digits = new_uuid().replace("-", "")
    return "%d:%d" % (int(digits[:15], 16), int(digits[16:31], 16))


def _valid_device(name: str) -> bool:
    return name == "autodetect" or bool(re.match(r"(?:[0-9]{1,3}|(?:xvd|hd|sd)[a-z]{1,2}(?:[0-9]{1,2})?|fd[ab])\Z", name))


def _possible_devices(userdevice: str) -> set:
    """The names that clash with this one: `xvda` excludes `0`, `hda` does not (recorded from xapi 24.19.2)."""
    if userdevice.isdigit():
        return {userdevice, device_name(userdevice)}
    if userdevice.startswith("xvd"):
        for number in range(256):
            if device_name(str(number)) == userdevice:
                return {userdevice, str(number)}
    return {userdevice}


def _dangling() -> str:
    """VBDs and VIFs point at metrics that no longer exist as objects (recorded from xapi 24.19.2)."""
    return "OpaqueRef:" + new_uuid()


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else value
