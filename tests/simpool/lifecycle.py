"""Which operation a VM, a disk, a VBD or a VIF allows in which state, and what the refusal says.

Follows xapi_vm_lifecycle.ml, xapi_vdi.ml, xapi_vbd_helpers.ml and xapi_vif_helpers.ml of v26.17.0; the texts and the order of
the lists are those recorded from xapi 24.19.2.
"""

from typing import Any, Dict, List, Optional, Tuple

from schema import Failure

HALTED, PAUSED, SUSPENDED, RUNNING = "Halted", "Paused", "Suspended", "Running"
ALL_STATES = (HALTED, PAUSED, SUSPENDED, RUNNING)

#: operation -> power states that allow it, in the order in which a refusal lists them
POWER_STATES = {
    "changing_shadow_memory": (HALTED,), "changing_static_range": (HALTED,), "changing_VCPUs": (HALTED,),
    "changing_memory_limits": (HALTED,), "changing_NVRAM": (HALTED,), "create_vtpm": (HALTED,),
    "make_into_template": (HALTED,), "provision": (HALTED,), "start": (HALTED,), "start_on": (HALTED,),
    "unpause": (PAUSED,),
    "resume": (SUSPENDED,), "resume_on": (SUSPENDED,),
    "clean_reboot": (RUNNING,), "clean_shutdown": (RUNNING,), "changing_VCPUs_live": (RUNNING,), "pause": (RUNNING,),
    "pool_migrate": (RUNNING,), "snapshot_with_quiesce": (RUNNING,), "suspend": (RUNNING,),
    "migrate_send": (HALTED, SUSPENDED, RUNNING),
    "changing_dynamic_range": (HALTED, RUNNING),
    "clone": (HALTED,), "copy": (HALTED,),
    "destroy": (HALTED, SUSPENDED), "export": (HALTED, SUSPENDED),
    "hard_reboot": (PAUSED, RUNNING),
    "checkpoint": (PAUSED, SUSPENDED, RUNNING), "hard_shutdown": (PAUSED, SUSPENDED, RUNNING),
    "metadata_export": ALL_STATES, "power_state_reset": ALL_STATES, "revert": ALL_STATES, "reverting": ALL_STATES,
    "snapshot": ALL_STATES,
}  # type: Dict[str, Tuple[str, ...]]

#: The order in which the server tries them; allowed_operations shows the reverse.
VM_OPERATIONS = ("snapshot clone copy revert checkpoint snapshot_with_quiesce start start_on pause unpause clean_shutdown "
                 "clean_reboot hard_shutdown hard_reboot suspend resume resume_on provision pool_migrate migrate_send "
                 "changing_dynamic_range changing_static_range changing_shadow_memory changing_NVRAM changing_VCPUs_live "
                 "make_into_template export metadata_export destroy create_vtpm").split()

LONG_COPIES = frozenset(("clone", "copy", "export"))
SNAPSHOTS = frozenset(("snapshot", "checkpoint"))
AFTER_MIGRATE_SEND = frozenset(("metadata_export", "hard_shutdown", "clean_shutdown", "hard_reboot", "clean_reboot",
                                "start", "start_on"))

ON_TEMPLATES = frozenset(("changing_dynamic_range changing_static_range changing_memory_limits changing_shadow_memory "
                          "changing_VCPUs changing_NVRAM clone copy export metadata_export provision create_vtpm").split())
ON_SNAPSHOTS = frozenset("revert clone copy export destroy hard_shutdown metadata_export".split())
ON_CONTROL_DOMAINS = frozenset("metadata_export changing_dynamic_range changing_static_range".split())

VDI_OPERATIONS = "clone copy resize snapshot destroy forget update generate_config".split()
VDI_LIVE_OPERATIONS = frozenset("snapshot clone resize_online blocked enable_cbt disable_cbt mirror data_destroy".split())
#: A type as the server says it in failures (record_util.ml vdi_type_to_string, v24.19.2).
CBT_METADATA = "CBT metadata"


def busy(cls: str, ref: str, current: Dict[str, str], four_parameters: bool) -> Failure:
    """OTHER_OPERATION_IN_PROGRESS, with two parameters up to v25.8.0 and four from v25.33.2 on."""
    operations = list(current.values())
    text = operations[0] if len(operations) == 1 else "{%s}" % ",".join(operations)
    if four_parameters:
        tasks = list(current)
        return Failure("OTHER_OPERATION_IN_PROGRESS", cls, ref, text,
                       tasks[0] if len(tasks) == 1 else "{%s}" % ",".join(tasks))
    return Failure("OTHER_OPERATION_IN_PROGRESS", "VM." + text if cls == "VM" else cls, ref)


def allowed_together(operation: str, current: List[str]) -> bool:
    for group in (LONG_COPIES, SNAPSHOTS):
        if operation in group and all(other in group for other in current):
            return True
    if operation in ("hard_shutdown", "hard_reboot") and current and set(current) <= {"snapshot"}:
        return True  # recorded: a VM that is being snapshotted allows these
    return current == ["migrate_send"] and operation in AFTER_MIGRATE_SEND


def power_states(record: Dict[str, Any], operation: str) -> Tuple[str, ...]:
    if operation in ("clone", "copy") and record["is_a_snapshot"]:
        return (HALTED, SUSPENDED)
    if operation == "changing_static_range" and record["is_control_domain"]:
        return ALL_STATES
    return POWER_STATES[operation]


def vm_refusal(record: Dict[str, Any], ref: str, operation: str, four_parameters: bool,
               resets_on_boot: bool = False, has_drivers: bool = True) -> Optional[Failure]:
    """Why this VM does not allow the operation now, or None. The checks stand in the server's order."""
    if operation in record["blocked_operations"]:
        return Failure("OPERATION_BLOCKED", ref, record["blocked_operations"][operation])
    states = power_states(record, operation)
    if record["power_state"] not in states:
        return Failure("VM_BAD_POWER_STATE", ref, ", ".join(states).lower(), record["power_state"].lower())
    current = record["current_operations"]
    if current and not allowed_together(operation, list(current.values())):
        return busy("VM", ref, current, four_parameters)
    if record["is_a_template"] and not record["is_a_snapshot"]:
        if operation == "destroy" and record["is_default_template"]:
            return Failure("VM_CANNOT_DELETE_DEFAULT_TEMPLATE", ref)
        if operation not in ON_TEMPLATES and operation != "destroy":
            return Failure("VM_IS_TEMPLATE", ref, operation)
    if record["is_a_snapshot"] and operation not in ON_SNAPSHOTS:
        return Failure("VM_IS_SNAPSHOT", ref, operation)
    if operation == "provision" and not record["is_a_template"]:
        return Failure("PROVISION_ONLY_ALLOWED_ON_TEMPLATE")
    if operation == "revert" and not record["is_a_snapshot"]:
        return Failure("REVERT_ONLY_ALLOWED_ON_SNAPSHOT")
    if record["is_control_domain"] and operation not in ON_CONTROL_DOMAINS:
        return Failure("OPERATION_NOT_ALLOWED", "Operations on domain 0 are not allowed")
    if not has_drivers and record["power_state"] == RUNNING and operation in (
            "clean_shutdown", "clean_reboot", "changing_VCPUs_live", "suspend", "checkpoint", "pool_migrate", "migrate_send"):
        return Failure("VM_MISSING_PV_DRIVERS", ref)
    if resets_on_boot and operation in ("checkpoint", "snapshot", "suspend", "snapshot_with_quiesce"):
        return Failure("VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION")
    if record["attached_PCIs"] and operation in ("suspend", "checkpoint", "pool_migrate", "migrate_send"):
        return Failure("VM_HAS_PCI_ATTACHED", ref)
    if record["VGPUs"] and operation in ("suspend", "checkpoint", "pool_migrate", "migrate_send"):
        # of the kinds that can't be suspended (check_vgpu): what has no state to save may pass
        if (operation, record["power_state"]) not in (("checkpoint", SUSPENDED), ("migrate_send", HALTED)):
            return Failure("VM_HAS_VGPU", ref)
    if record["VUSBs"] and operation in ("suspend", "snapshot", "checkpoint", "migrate_send", "pool_migrate"):
        return Failure("VM_HAS_VUSBS", ref)
    if record["VTPMs"] and operation == "create_vtpm":
        return Failure("VTPM_MAX_AMOUNT_REACHED", str(len(record["VTPMs"])))
    return None


_ALLOWED = {}  # type: Dict[Tuple[Any, ...], List[str]]


def vm_allowed_operations(record: Dict[str, Any], quiesce: bool, resets_on_boot: bool, has_drivers: bool) -> List[str]:
    """The VM's allowed_operations; remembered per state, since thousands of VMs share a few."""
    key = (record["power_state"], record["is_a_template"], record["is_default_template"], record["is_a_snapshot"],
           record["is_control_domain"], tuple(sorted(record["blocked_operations"])),
           tuple(sorted(record["current_operations"].values())), quiesce, resets_on_boot, has_drivers,
           bool(record["VUSBs"]), bool(record["VGPUs"]), bool(record["VTPMs"]), bool(record["attached_PCIs"]))
    if key not in _ALLOWED:
        allowed = []  # type: List[str]
        for operation in VM_OPERATIONS:
            if operation == "snapshot_with_quiesce" and not quiesce:
                continue
            if vm_refusal(record, "", operation, False, resets_on_boot, has_drivers) is None:
                allowed.insert(0, operation)
        _ALLOWED[key] = allowed
    return list(_ALLOWED[key])


def vdi_refusal(record: Dict[str, Any], ref: str, operation: str, sr: Dict[str, Any], attached: List[str],
                has_pbd: bool, four_parameters: bool) -> Optional[Failure]:
    """Why this disk does not allow the operation now, or None. `attached`: the modes of the VBDs that hold it."""
    if record["current_operations"]:
        return busy("VDI", ref, record["current_operations"], four_parameters)
    if not has_pbd and operation == "resize":
        return Failure("SR_HAS_NO_PBDS", record["SR"])
    readable_live = operation == "copy" and "RW" not in attached
    if attached and operation not in VDI_LIVE_OPERATIONS and not readable_live:
        return Failure("VDI_IN_USE", ref, operation)
    if operation in ("destroy", "forget") and sr["type"] == "udev":
        return Failure("VDI_IS_A_PHYSICAL_DEVICE", ref)
    if operation == "destroy" and sr["is_tools_sr"]:
        return Failure("SR_OPERATION_NOT_SUPPORTED", record["SR"])
    if operation in ("snapshot", "clone", "resize") and sr["content_type"] == "iso":
        return Failure("SR_OPERATION_NOT_SUPPORTED", record["SR"])
    if operation == "snapshot" and record["sharable"]:
        return Failure("VDI_IS_SHARABLE", ref)
    if operation == "snapshot" and record["on_boot"] == "reset":
        return Failure("VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION")
    if operation in ("snapshot", "destroy", "clone", "copy") and not record["managed"]:
        return Failure("VDI_NOT_MANAGED", ref)
    if operation in ("snapshot", "clone", "copy", "resize", "mirror") and record["type"] == "cbt_metadata":
        return Failure("VDI_INCOMPATIBLE_TYPE", ref, CBT_METADATA)
    if operation == "mirror" and record["cbt_enabled"]:
        return Failure("VDI_CBT_ENABLED", ref)
    if operation == "data_destroy" and not record["is_a_snapshot"]:
        return Failure("OPERATION_NOT_ALLOWED", "VDI is not a snapshot: " + ref)
    if operation == "data_destroy" and not record["cbt_enabled"]:
        return Failure("VDI_NO_CBT_METADATA", ref)
    return None


def vdi_allowed_operations(record: Dict[str, Any], sr: Dict[str, Any], attached: List[str], has_pbd: bool) -> List[str]:
    allowed = []  # type: List[str]
    for operation in VDI_OPERATIONS:
        if vdi_refusal(record, "", operation, sr, attached, has_pbd, False) is None:
            allowed.insert(0, operation)
    return allowed


def hotplug_refusal(cls: str, record: Dict[str, Any], ref: str, vm: Dict[str, Any], operation: str, has_drivers: bool,
                    four_parameters: bool) -> Optional[Failure]:
    """Why a VBD or VIF can't be plugged or unplugged now, or None (xapi_vbd_helpers.ml and xapi_vif_helpers.ml
    valid_operations, v24.19.2; the checks stand in that order)."""
    if record["current_operations"]:
        return busy(cls, ref, record["current_operations"], four_parameters)
    if cls == "VBD" and operation != "plug" and not record["unpluggable"]:
        return Failure("VBD_NOT_UNPLUGGABLE", ref)
    if cls == "VIF" and operation == "plug" and vm["is_control_domain"]:
        return Failure("OPERATION_NOT_ALLOWED", "Control domain does not support hotplug")
    if vm["power_state"] != RUNNING:
        return Failure("VM_BAD_POWER_STATE", record["VM"], "running", vm["power_state"].lower())
    if record["currently_attached"] == (operation == "plug"):
        return Failure("DEVICE_ALREADY_ATTACHED" if operation == "plug" else "DEVICE_ALREADY_DETACHED", ref)
    for current in vm["current_operations"].values():
        if current in ("clean_shutdown", "hard_shutdown", "suspend", "pause"):
            return Failure("OPERATION_NOT_ALLOWED", "Current operation on VM:%s is %s" % (record["VM"], current))
    if vm["domain_type"] == "hvm":
        if not has_drivers:
            return Failure("VM_MISSING_PV_DRIVERS", record["VM"])
        if cls == "VBD" and record["type"] == "CD":
            return Failure("OPERATION_NOT_ALLOWED", "HVM CDROMs cannot be hotplugged/unplugged, only inserted or ejected")
    return None


def vbd_allowed_operations(record: Dict[str, Any], vm: Dict[str, Any]) -> List[str]:
    if vm["is_a_snapshot"]:
        return []
    if record["currently_attached"]:
        if record["type"] == "CD":
            return ["attach", "insert" if record["empty"] else "eject"]
        return ["attach", "unpause", "unplug", "unplug_force", "pause"]
    return ["attach"] if record["type"] != "CD" else ["attach", "insert" if record["empty"] else "eject"]


def vif_allowed_operations(record: Dict[str, Any], vm: Dict[str, Any]) -> List[str]:
    if vm["is_a_snapshot"]:
        return []
    return ["attach", "unplug"] if record["currently_attached"] else ["attach"]
