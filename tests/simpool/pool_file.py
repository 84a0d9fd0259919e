"""POOL.json: the description that a pool starts from. Checked strictly, filled up with defaults, built into tables.

All that is not given is derived from the names, so the same description makes the same pool every time, down to refs,
uuids and MAC addresses.
"""

import hashlib
import re
from typing import Any, Dict, List, Optional, Tuple

import storage
from database import identities, uuid_text
from disks import device_name
from lifecycle import POWER_STATES
from machines import GUEST_METRICS, mac_of
from model import DEFAULT_VERSION, Pool, parse_version
from schema import CLASSES, NULL, Failure, convert

GIB = 1024 ** 3
TIB = 1024 ** 4

#: What each kind of object may say, and its default. REQUIRED has none; DERIVED is worked out from the rest.
#:
#: Rows that are damaged, as people's pools have them: a VM with "snapshot_of_itself", a disk with "snapshot_of": "self",
#: "missing" (the storage has lost it), "sr": null (the null reference) or "sr": "?" (a reference to nothing), a CD with
#: "vdi": "?", a VIF with "network": "?".
REQUIRED = object()
DERIVED = None
#: The first SR for disks; null is something else there, the null reference.
FIRST_SR = ""
#: Where a name is expected: a reference to something that is not there.
DANGLING = "?"

POOL_KEYS = {"xapi_version": DEFAULT_VERSION, "hosts": DERIVED, "srs": DERIVED, "networks": DERIVED, "templates": [],
             "vms": []}  # type: Dict[str, Any]
HOST_KEYS = {"name_label": REQUIRED, "name_description": "Default install", "uuid": DERIVED, "hostname": DERIVED,
             "master": DERIVED, "live": True}
SR_KEYS = {"name_label": REQUIRED, "name_description": "", "uuid": DERIVED, "type": DERIVED, "shared": DERIVED,
           "host": DERIVED, "size": 4 * TIB, "must_zero": False, "vhd": DERIVED, "thick": DERIVED}
NETWORK_KEYS = {"name_label": REQUIRED, "name_description": "", "uuid": DERIVED, "bridge": DERIVED, "MTU": 1500}
TEMPLATE_KEYS = {"name_label": REQUIRED, "name_description": "", "uuid": DERIVED, "default": False}
VM_KEYS = {"name_label": REQUIRED, "name_description": "", "uuid": DERIVED, "power_state": "Halted", "resident_on": DERIVED,
           "memory": GIB, "vcpus": 1, "tags": [], "other_config": {}, "os_version": "", "is_a_template": False, "count": 1,
           "blocked_operations": {}, "snapshot_of_itself": False, "vusbs": 0, "vgpus": 0, "pci": 0, "vtpm": 0,
           "disks": [], "cds": [], "vifs": [], "snapshots": []}
DISK_KEYS = {"device": DERIVED, "userdevice": DERIVED, "size": GIB, "used": 0, "seed": 0, "sr": FIRST_SR, "name_label": "",
             "name_description": "", "uuid": DERIVED, "bootable": False, "mode": "RW", "type": DERIVED, "owner": False,
             "other_config": {}, "on_boot": "persist", "sharable": False, "cbt_enabled": False, "missing": False,
             "snapshot_of": DERIVED}  # type: Dict[str, Any]
CD_KEYS = {"userdevice": DERIVED, "empty": DERIVED, "sr": DERIVED, "name_label": "", "size": 64 * storage.MIB, "vdi": DERIVED}
VIF_KEYS = {"device": DERIVED, "network": DERIVED, "MAC": DERIVED, "MTU": 1500, "settings": {}}  # type: Dict[str, Any]
VIF_SETTINGS = ("other_config qos_algorithm_type qos_algorithm_params locking_mode ipv4_allowed ipv6_allowed "
                "ipv4_configuration_mode ipv4_addresses ipv4_gateway ipv6_configuration_mode ipv6_addresses "
                "ipv6_gateway").split()
SNAPSHOT_KEYS = {"name_label": REQUIRED, "uuid": DERIVED}

EXAMPLE = {
    "xapi_version": DEFAULT_VERSION,
    "hosts": [{"name_label": "xcp1", "name_description": "Default install", "master": True, "live": True,
               "uuid": "11111111-2222-4333-8444-555555555501", "hostname": "xcp1"}, {"name_label": "xcp2"}],
    "srs": [{"name_label": "nfs-store", "name_description": "", "type": "nfs", "shared": True, "size": 4 * TIB,
             "uuid": "11111111-2222-4333-8444-555555555502", "must_zero": False, "vhd": True,
             "thick": False},
            {"name_label": "local xcp2", "type": "ext", "host": "xcp2"},
            {"name_label": "ISO library", "type": "iso", "shared": True}],
    "networks": [{"name_label": "Pool-wide network associated with eth0", "name_description": "", "bridge": "xenbr0",
                  "MTU": 1500, "uuid": "11111111-2222-4333-8444-555555555503"}],
    "templates": [{"name_label": "CentOS 7", "name_description": "", "default": True,
                   "uuid": "11111111-2222-4333-8444-555555555504"}],
    "vms": [{"name_label": "PROD-web", "name_description": "", "uuid": "11111111-2222-4333-8444-555555555505",
             "power_state": "Running", "resident_on": "xcp1", "memory": 4 * GIB, "vcpus": 2, "tags": [], "other_config": {},
             "os_version": "CentOS Linux release 7.9", "is_a_template": False, "count": 1,
             "disks": [{"device": "xvda", "userdevice": "0", "size": 10 * GIB, "used": [[0, 64], [2048, 8]], "seed": 7,
                        "sr": "nfs-store", "name_label": "root", "name_description": "", "bootable": True, "mode": "RW",
                        "type": "system", "owner": True, "other_config": {}, "uuid": "11111111-2222-4333-8444-555555555506",
                        "on_boot": "persist", "sharable": False, "cbt_enabled": False, "missing": False, "snapshot_of": None},
                       {"size": 2 * TIB, "used": 16}],
             "blocked_operations": {"start": "not before the move is over"}, "snapshot_of_itself": False, "vusbs": 0, "vgpus": 0,
             "pci": 0, "vtpm": 0,
             "cds": [{"userdevice": "3", "empty": True, "vdi": None},
                     {"userdevice": "4", "empty": False, "sr": "ISO library", "name_label": "tools.iso",
                      "size": 64 * storage.MIB}],
             "vifs": [{"device": "0", "network": "Pool-wide network associated with eth0", "MAC": "aa:bb:cc:00:11:22",
                       "MTU": 1500, "settings": {"locking_mode": "locked", "ipv4_allowed": ["10.0.0.5"]}}],
             "snapshots": [{"name_label": "before upgrade", "uuid": "11111111-2222-4333-8444-555555555507"}]},
            {"name_label": "web-%02d", "count": 3, "disks": [{}]}],
}  # type: Dict[str, Any]


class PoolFileError(Exception):
    """POOL.json can't be used; the text says where and why."""


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def _filled(given: Any, keys: Dict[str, Any], where: str) -> Dict[str, Any]:
    """`given` with all defaults; an error names what is unknown, missing or of the wrong type."""
    if not isinstance(given, dict):
        raise PoolFileError("%s: must be an object" % where)
    for key in given:
        if key not in keys:
            raise PoolFileError("%s: unknown key %r (known: %s)" % (where, key, ", ".join(sorted(keys))))
    filled = {}
    for key, default in keys.items():
        if key in given:
            filled[key] = given[key]
        elif default is REQUIRED:
            raise PoolFileError("%s: %s is missing" % (where, key))
        else:
            filled[key] = list(default) if isinstance(default, list) else dict(default) if isinstance(default, dict) else default
        _check_type(key, filled[key], default, "%s: %s" % (where, key))
    return filled


def _check_type(key: str, value: Any, default: Any, where: str) -> None:
    kinds = {"size": int, "memory": int, "vcpus": int, "MTU": int, "count": int, "tags": list, "other_config": dict,
             "master": bool, "live": bool, "shared": bool, "default": bool, "is_a_template": bool, "bootable": bool,
             "empty": bool, "owner": bool, "blocked_operations": dict, "snapshot_of_itself": bool, "vusbs": int, "vgpus": int,
             "pci": int, "vtpm": int, "must_zero": bool, "vhd": bool, "thick": bool, "sharable": bool, "cbt_enabled": bool,
             "missing": bool}  # type: Dict[str, type]
    if key in ("used", "seed", "hosts", "srs", "networks", "templates", "vms", "disks", "cds", "vifs", "snapshots", "settings"):
        return
    if value is None and (default is DERIVED or default is FIRST_SR):
        return
    kind = kinds.get(key, str)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise PoolFileError("%s must be of type %s" % (where, kind.__name__))
    if kind is int and value < 0:
        raise PoolFileError("%s must not be negative" % where)
    if key == "uuid" and not re.match(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z", value):
        raise PoolFileError("%s is not a uuid" % where)
    if kind is list and not all(isinstance(item, str) for item in value):
        raise PoolFileError("%s must be a list of strings" % where)
    if kind is dict and not all(isinstance(item, str) for item in value.values()):
        raise PoolFileError("%s must be an object of strings" % where)


def _filled_list(given: Any, keys: Dict[str, Any], where: str) -> List[Dict[str, Any]]:
    if not isinstance(given, list):
        raise PoolFileError("%s: must be a list" % where)
    return [_filled(item, keys, "%s[%d]" % (where, number)) for number, item in enumerate(given)]


def check(given: Any) -> Dict[str, Any]:
    """The whole description with its defaults; PoolFileError if anything is wrong with it."""
    pool = _filled(given, POOL_KEYS, "pool")
    try:
        parse_version(pool["xapi_version"])
    except ValueError as error:
        raise PoolFileError(str(error))
    pool["hosts"] = _filled_list(pool["hosts"] or [{"name_label": "xcp1"}], HOST_KEYS, "hosts")
    pool["srs"] = _filled_list(pool["srs"] or [{"name_label": "Shared storage", "type": "nfs"}], SR_KEYS, "srs")
    pool["networks"] = _filled_list(pool["networks"] or [{"name_label": "Pool-wide network associated with eth0"}],
                                    NETWORK_KEYS, "networks")
    pool["templates"] = _filled_list(pool["templates"], TEMPLATE_KEYS, "templates")
    pool["vms"] = _filled_list(pool["vms"], VM_KEYS, "vms")
    hosts = [host["name_label"] for host in pool["hosts"]]
    for kind in ("hosts", "srs", "networks"):
        names = [item["name_label"] for item in pool[kind]]
        for name in names:
            if names.count(name) > 1:
                raise PoolFileError("%s: the name %r is there twice" % (kind, name))
    masters = [host for host in pool["hosts"] if host["master"]]
    if len(masters) > 1:
        raise PoolFileError("hosts: more than one master")
    for host in pool["hosts"]:
        host["master"] = host is (masters[0] if masters else pool["hosts"][0])
        host["hostname"] = host["hostname"] or host["name_label"]
        if host["master"] and not host["live"]:
            raise PoolFileError("hosts: the master must be live")
    for number, sr in enumerate(pool["srs"]):
        where = "srs[%d]" % number
        if sr["shared"] is None:
            sr["shared"] = sr["host"] is None
        if sr["shared"] and sr["host"] is not None:
            raise PoolFileError("%s: a shared SR has no host" % where)
        if not sr["shared"] and sr["host"] is None:
            sr["host"] = next(host["name_label"] for host in pool["hosts"] if host["master"])
        if sr["host"] is not None and sr["host"] not in hosts:
            raise PoolFileError("%s: there is no host %r" % (where, sr["host"]))
        sr["type"] = sr["type"] or ("nfs" if sr["shared"] else "ext")
        for kind in ("vhd", "thick"):
            if sr[kind] is None:
                sr[kind] = kind in storage.kinds_of_type(sr["type"])
    for number, network in enumerate(pool["networks"]):
        network["bridge"] = network["bridge"] or "xenbr%d" % number
    for number, vm in enumerate(pool["vms"]):
        _check_vm(vm, pool, "vms[%d]" % number)
    parts = [part for vm in pool["vms"] for part in vm["disks"] + vm["snapshots"]]
    described = pool["hosts"] + pool["srs"] + pool["networks"] + pool["templates"] + pool["vms"] + parts
    given_uuids = [item["uuid"] for item in described if item["uuid"] is not None]
    for uuid in given_uuids:
        if given_uuids.count(uuid) > 1:
            raise PoolFileError("the uuid %s is there twice" % uuid)
    return pool


def _check_vm(vm: Dict[str, Any], pool: Dict[str, Any], where: str) -> None:
    srs = [sr["name_label"] for sr in pool["srs"]]
    isos = [sr["name_label"] for sr in pool["srs"] if sr["type"] == "iso"]
    if vm["power_state"] not in ("Halted", "Running", "Paused", "Suspended"):
        raise PoolFileError("%s: power_state %r" % (where, vm["power_state"]))
    if vm["is_a_template"] and vm["power_state"] != "Halted":
        raise PoolFileError("%s: a template is Halted" % where)
    if vm["resident_on"] is not None and vm["resident_on"] not in [host["name_label"] for host in pool["hosts"]]:
        raise PoolFileError("%s: there is no host %r" % (where, vm["resident_on"]))
    for operation in vm["blocked_operations"]:
        if operation not in POWER_STATES:
            raise PoolFileError("%s: blocked_operations: there is no operation %r" % (where, operation))
    if vm["vcpus"] < 1:
        raise PoolFileError("%s: vcpus must be 1 or more" % where)
    if vm["count"] != 1:
        if vm["uuid"] is not None:
            raise PoolFileError("%s: a uuid and a count" % where)
        try:
            vm["name_label"] % 0
        except (TypeError, ValueError):
            raise PoolFileError("%s: a count needs a name with %%d or %%04d in it" % where)
    vm["disks"] = _filled_list(vm["disks"], DISK_KEYS, where + ".disks")
    vm["cds"] = _filled_list(vm["cds"], CD_KEYS, where + ".cds")
    vm["vifs"] = _filled_list(vm["vifs"], VIF_KEYS, where + ".vifs")
    vm["snapshots"] = _filled_list(vm["snapshots"], SNAPSHOT_KEYS, where + ".snapshots")
    for position, disk in enumerate(vm["disks"]):
        here = "%s.disks[%d]" % (where, position)
        disk["userdevice"] = str(position) if disk["userdevice"] is None else disk["userdevice"]
        disk["device"] = device_name(disk["userdevice"]) if disk["device"] is None else disk["device"]
        disk["type"] = disk["type"] or ("system" if disk["userdevice"] == "0" else "user")
        if disk["sr"] == FIRST_SR:
            disk["sr"] = next((sr["name_label"] for sr in pool["srs"] if sr["type"] != "iso"), FIRST_SR)
        if disk["sr"] not in srs + [None, DANGLING]:
            raise PoolFileError("%s: there is no SR %r" % (here, disk["sr"]))
        if disk["on_boot"] not in ("persist", "reset"):
            raise PoolFileError("%s: on_boot %r" % (here, disk["on_boot"]))
        if disk["snapshot_of"] not in (None, "self"):
            raise PoolFileError("%s: snapshot_of can only be \"self\"" % here)
        if disk["mode"] not in ("RW", "RO"):
            raise PoolFileError("%s: mode %r" % (here, disk["mode"]))
        if not isinstance(disk["seed"], (int, str)):
            raise PoolFileError("%s: seed must be a number or a string" % here)
        blocks = (disk["size"] + storage.MIB - 1) // storage.MIB
        try:
            extents = storage.extents_of(disk["used"])
        except (TypeError, ValueError):
            raise PoolFileError("%s: used must be a number or a list of [first MiB, number of MiB]" % here)
        if extents and (extents[0][0] < 0 or extents[-1][1] > blocks):
            raise PoolFileError("%s: used reaches past the end of the disk (%d MiB)" % (here, blocks))
        disk["used"] = [[first, end - first] for first, end in extents]
        if disk["uuid"] is not None and vm["count"] != 1:
            raise PoolFileError("%s: a uuid and a count" % here)
    for position, cd in enumerate(vm["cds"]):
        here = "%s.cds[%d]" % (where, position)
        cd["userdevice"] = str(3 + position) if cd["userdevice"] is None else cd["userdevice"]
        if cd["vdi"] not in (None, DANGLING) or (cd["vdi"] is not None and cd["empty"]):
            raise PoolFileError("%s: vdi can only be \"?\", of a CD drive that is not empty" % here)
        cd["empty"] = cd["vdi"] is None if cd["empty"] is None else cd["empty"]
        if not cd["empty"] and cd["vdi"] is None:
            cd["sr"] = cd["sr"] or (isos[0] if isos else None)
            if cd["sr"] not in isos:
                raise PoolFileError("%s: there is no SR of type iso named %r" % (here, cd["sr"]))
            if not cd["name_label"]:
                raise PoolFileError("%s: a CD that is not empty needs the name_label of its ISO" % here)
    devices = [item["userdevice"] for item in vm["disks"] + vm["cds"]]
    if len(set(devices)) != len(devices):
        raise PoolFileError("%s: a userdevice is there twice" % where)
    for position, vif in enumerate(vm["vifs"]):
        here = "%s.vifs[%d]" % (where, position)
        vif["device"] = str(position) if vif["device"] is None else vif["device"]
        vif["network"] = vif["network"] or pool["networks"][0]["name_label"]
        if vif["network"] not in [network["name_label"] for network in pool["networks"]] + [DANGLING]:
            raise PoolFileError("%s: there is no network %r" % (here, vif["network"]))
        if vif["MAC"] is not None and not re.match(r"([0-9a-f]{2}:){5}[0-9a-f]{2}\Z", vif["MAC"]):
            raise PoolFileError("%s: MAC must be like aa:bb:cc:00:11:22" % here)
        vif["settings"] = _vif_settings(vif["settings"], here + ".settings")


def _vif_settings(given: Any, where: str) -> Dict[str, Any]:
    """Fields of the VIF's record, as the API has them."""
    if not isinstance(given, dict) or set(given) - set(VIF_SETTINGS):
        raise PoolFileError("%s: must be an object of some of: %s" % (where, ", ".join(VIF_SETTINGS)))
    try:
        return {name: convert(CLASSES["VIF"].fields[name].type, value) for name, value in given.items()}
    except ValueError as error:
        raise PoolFileError("%s: %s" % (where, error))


# ---------------------------------------------------------------------------------------------------------------------
# Building


def _uuid(*names: Any) -> str:
    return uuid_text(hashlib.md5("\0".join(str(name) for name in names).encode("utf-8")).hexdigest())


def _nothing(*names: Any) -> str:
    """A reference to an object that does not exist."""
    return "OpaqueRef:" + _uuid("nothing", *names)


class _Builder:
    """Turns a checked description into rows."""

    def __init__(self, description: Dict[str, Any], pool: Pool) -> None:
        self.description = description
        self.pool = pool
        self.hosts = {}  # type: Dict[str, str]
        self.srs = {}  # type: Dict[str, str]
        self.networks = {}  # type: Dict[str, str]
        self.isos = {}  # type: Dict[Tuple[str, str], str]
        self.names = {}  # type: Dict[str, int]
        self.snapshots = []  # type: List[Tuple[str, Dict[str, Any], int]]
        #: (class, reference, fields) to be set when all is made: what would have stood in the way of making it
        self.damage = []  # type: List[Tuple[str, str, Dict[str, Any]]]
        #: uuids of disks that the storage has lost
        self.missing = []  # type: List[str]

    def make(self, cls: str, uuid: str, fields: Dict[str, Any]) -> str:
        """A row with a given uuid and a ref that is derived from it."""
        if self.pool.has_uuid(cls, uuid):
            raise PoolFileError("the uuid %s is there twice (%s %r)" % (uuid, cls, fields.get("name_label", "")))
        return self.pool.create(cls, dict(fields, uuid=uuid), ref="OpaqueRef:" + _uuid("ref", cls, uuid))

    def build(self) -> None:
        self._make_pool()
        self._make_networks()
        for number, host in enumerate(self.description["hosts"]):
            self._make_host(number, host)
        self._make_srs()
        for template in self.description["templates"]:
            self._make_template(template)
        for vm in self.description["vms"]:
            for number in range(vm["count"]):
                name = vm["name_label"] if vm["count"] == 1 else vm["name_label"] % number
                self._make_vm(vm, name)
        for sr in self.srs.values():
            self.pool.update_space(sr)
        for vm_ref, snapshot, number in self.snapshots:
            self._make_snapshot(vm_ref, snapshot, number)
        for uuid in self.missing:
            if uuid in self.pool.storage.contents:
                self.pool.storage.destroy(uuid)
        for cls, ref, fields in self.damage:
            self.pool.set_fields(cls, ref, fields)
            if cls == "VDI":
                self.pool.note_on_boot(ref)
            self.pool.update_allowed_operations(cls, ref)
        for vdi in self.pool.tables["VDI"]:
            self.pool.update_allowed_operations("VDI", vdi)

    def _make_pool(self) -> None:
        secret = self.make("secret", _uuid("secret", "telemetry"), {"value": _uuid("telemetry")})
        names = [host["name_label"] for host in self.description["hosts"]]
        self.make("pool", _uuid("pool", *names), {"telemetry_uuid": secret})
        self.make("user", _uuid("user", "root"), {"short_name": "root", "fullname": "superuser"})

    def _make_networks(self) -> None:
        for network in self.description["networks"]:
            self.networks[network["name_label"]] = self.make(
                "network", network["uuid"] or _uuid("network", network["name_label"]),
                {"name_label": network["name_label"], "name_description": network["name_description"],
                 "bridge": network["bridge"], "MTU": str(network["MTU"])})
        self.make("network", _uuid("network", "internal"), {
            "name_label": "Host internal management network", "bridge": "xenapi",
            "name_description": "Network on which guests will be assigned a private link-local IP address which can be "
                                "used to talk XenAPI",
            "other_config": {"is_guest_installer_network": "true", "is_host_internal_management_network": "true",
                             "ip_begin": "169.254.0.1", "ip_end": "169.254.255.254", "netmask": "255.255.0.0"}})

    def _make_host(self, number: int, host: Dict[str, Any]) -> None:
        pool = self.pool
        uuid = host["uuid"] or _uuid("host", host["name_label"])
        product, brand, minor = pool.release()
        xapi = ".".join(self.description["xapi_version"].split(".")[:2])
        metrics = self.make("host_metrics", _uuid("host_metrics", uuid), {
            "memory_total": str(256 * GIB), "memory_free": str(128 * GIB), "live": host["live"], "last_updated": pool.now()})
        ref = self.make("host", uuid, {
            "name_label": host["name_label"], "name_description": host["name_description"], "hostname": host["hostname"],
            "address": "127.0.0.%d" % (number + 1), "metrics": metrics, "API_version_minor": str(minor), "enabled": host["live"],
            "other_config": {"agent_start_time": "%d." % (pool.fixed_time or 0), "boot_time": "%d." % (pool.fixed_time or 0)},
            "software_version": {
                "product_version": product, "product_version_text": product.rpartition(".")[0],
                "product_version_text_short": product.rpartition(".")[0], "platform_name": "XCP", "platform_version": "3.4.0",
                "product_brand": brand, "build_number": "cloud", "git_id": "0", "hostname": "localhost",
                "date": "20250319T04:16:24Z", "xapi": xapi, "xapi_build": self.description["xapi_version"],
                "xen": "4.17.4", "linux": "4.19.0+1", "xencenter_min": "2.%d" % minor, "xencenter_max": "2.%d" % minor,
                "network_backend": "openvswitch", "db_schema": "5.779"}})
        self.hosts[host["name_label"]] = ref
        if host["master"]:
            pool.set_field("pool", pool.pool_ref(), "master", ref)
        for cpu in range(4):
            self.make("host_cpu", _uuid("host_cpu", uuid, cpu), {"host": ref, "number": str(cpu)})
        domain_metrics = self.make("VM_metrics", _uuid("VM_metrics", "dom0", uuid), {
            "memory_actual": str(GIB), "VCPUs_number": "2", "VCPUs_utilisation": {"1": 0.0, "2": 0.0},
            "current_domain_type": "pv"})
        domain = self.make("VM", _uuid("VM", "dom0", uuid), {
            "name_label": "Control domain on host: %s" % host["name_label"],
            "name_description": "The domain which manages physical devices and manages other domains",
            "power_state": "Running", "is_control_domain": True, "resident_on": ref, "affinity": ref, "domid": "0",
            "domarch": "x64", "domain_type": "pv", "metrics": domain_metrics, "memory_overhead": "11534336",
            "memory_target": str(GIB), "memory_static_max": str(GIB), "memory_static_min": str(GIB),
            "memory_dynamic_max": str(GIB), "memory_dynamic_min": str(GIB), "VCPUs_max": "2", "VCPUs_at_startup": "2",
            "actions_after_reboot": "destroy", "user_version": "1", "generation_id": "", "hardware_platform_version": "0",
            "has_vendor_device": False, "other_config": {"is_system_domain": "true"}})
        pool.set_field("host", ref, "control_domain", domain)
        for protocol in ("vt100", "rfb"):
            console_uuid = _uuid("console", uuid, protocol)
            self.make("console", console_uuid, {
                "VM": domain, "protocol": protocol, "location": "https://%s/console?ref=OpaqueRef:%s" % (
                    pool.record("host", ref)["address"], _uuid("ref", "console", console_uuid))})
        pool.update_allowed_operations("VM", domain)
        pif_metrics = self.make("PIF_metrics", _uuid("PIF_metrics", uuid), {
            "carrier": True, "speed": "10000", "duplex": True, "last_updated": pool.now()})
        self.make("PIF", _uuid("PIF", uuid), {
            "device": "eth0", "network": next(iter(self.networks.values())), "host": ref, "metrics": pif_metrics,
            "MAC": mac_of(uuid, "eth0"), "management": True, "ip_configuration_mode": "DHCP", "netmask": "255.0.0.0",
            "IP": pool.record("host", ref)["address"]})

    def _make_srs(self) -> None:
        pool = self.pool
        for sr in self.description["srs"]:
            uuid = sr["uuid"] or _uuid("SR", sr["name_label"])
            is_iso = sr["type"] == "iso"
            fields = {"name_label": sr["name_label"], "name_description": sr["name_description"], "type": sr["type"],
                      "shared": sr["shared"], "physical_size": str(sr["size"]), "content_type": "iso" if is_iso else "user"}
            if is_iso:
                fields["allowed_operations"] = ["unplug", "plug", "pbd_create", "update", "pbd_destroy", "scan",
                                                "vdi_create", "vdi_destroy"]
            ref = self.srs[sr["name_label"]] = self.make("SR", uuid, fields)
            pool.storage.add_sr(uuid, sr["size"], [kind for kind in ("thick", "vhd", "must_zero") if sr[kind]])
            for name, host in self.hosts.items():
                if sr["shared"] or sr["host"] == name:
                    domain = pool.record("host", host)["control_domain"]
                    pbd = self.make("PBD", _uuid("PBD", uuid, pool.record("host", host)["uuid"]), {
                        "host": host, "SR": ref, "currently_attached": True, "device_config": _device_config(sr),
                        "other_config": {"storage_driver_domain": domain}})
                    pool.set_key("VM", domain, "other_config", "storage_driver_domain", pbd)
            if sr["type"] not in [record["type"] for record in pool.tables["SM"].values()]:
                self.make("SM", _uuid("SM", sr["type"]), _storage_manager(sr["type"]))
        default = next((self.srs[sr["name_label"]] for sr in self.description["srs"] if sr["type"] != "iso"), NULL)
        for field in ("default_SR", "suspend_image_SR", "crash_dump_SR"):
            pool.set_field("pool", pool.pool_ref(), field, default)

    def _make_template(self, template: Dict[str, Any]) -> None:
        uuid = template["uuid"] or self._unique("template", template["name_label"])
        metrics = self.make("VM_metrics", _uuid("VM_metrics", uuid), {"VCPUs_utilisation": {"0": 0.0}})
        ref = self.make("VM", uuid, dict(_hardware(GIB, 1), **{
            "name_label": template["name_label"], "name_description": template["name_description"], "is_a_template": True,
            "is_default_template": template["default"], "metrics": metrics, "reference_label": template["name_label"].lower(),
            "other_config": dict({"install-methods": "cdrom,nfs,http,ftp", "mac_seed": _uuid("mac_seed", uuid)},
                                 **({"default_template": "true"} if template["default"] else {}))}))
        self.pool.update_allowed_operations("VM", ref)

    def _unique(self, kind: str, name: str) -> str:
        """A uuid for a name that may be there several times."""
        key = kind + "\0" + name
        self.names[key] = self.names.get(key, 0) + 1
        return _uuid(kind, name, self.names[key])

    def _make_vm(self, vm: Dict[str, Any], name: str) -> None:
        pool = self.pool
        uuid = vm["uuid"] or self._unique("VM", name)
        other_config = dict(vm["other_config"])
        other_config.setdefault("mac_seed", _uuid("mac_seed", uuid))
        metrics = self.make("VM_metrics", _uuid("VM_metrics", uuid), {
            "VCPUs_utilisation": {str(number): 0.0 for number in range(vm["vcpus"])}})
        fields = dict(_hardware(vm["memory"], vm["vcpus"]), name_label=name, name_description=vm["name_description"],
                      is_a_template=vm["is_a_template"], tags=list(vm["tags"]), other_config=other_config, metrics=metrics)
        if vm["os_version"] or vm["power_state"] != "Halted":
            guest = {key: list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else value
                     for key, value in GUEST_METRICS.items()}
            guest["os_version"] = _os_version(vm["os_version"])
            guest["last_updated"] = pool.now()
            fields["guest_metrics"] = self.make("VM_guest_metrics", _uuid("VM_guest_metrics", uuid), guest)
        ref = self.make("VM", uuid, fields)
        for disk in vm["disks"]:
            self._make_disk(ref, uuid, disk)
        for cd in vm["cds"]:
            iso = NULL if cd["empty"] else _nothing("VDI", uuid, cd["userdevice"]) if cd["vdi"] else self._iso(cd)
            self._make_vbd(ref, uuid, cd["userdevice"], iso, {"type": "CD", "mode": "RO", "empty": cd["empty"]})
        for vif in vm["vifs"]:
            self._make_vif(ref, uuid, vif)
        # passed-through devices and vTPMs are objects of classes that are not modelled: the lists are all that is seen
        for field, key in (("VUSBs", "vusbs"), ("VGPUs", "vgpus"), ("VTPMs", "vtpm")):
            pool.set_field("VM", ref, field, [_nothing(field, uuid, number) for number in range(vm[key])])
        if vm["pci"]:
            pool.set_key("VM", ref, "other_config", "pci", ",".join("0/0000:04:00.%d" % number for number in range(vm["pci"])))
        self.damage.append(("VM", ref, dict({"blocked_operations": dict(vm["blocked_operations"])},
                                            **({"snapshot_of": ref} if vm["snapshot_of_itself"] else {}))))
        if vm["power_state"] in ("Running", "Paused"):
            self._run(ref, vm)
        elif vm["power_state"] == "Suspended":
            with identities.derived_from("suspend image of " + uuid):
                image = pool._new_memory_image(ref)
                pool.set_fields("VM", ref, {"power_state": "Suspended", "suspend_VDI": image})
            pool.plug_devices(ref, True)
        pool.update_allowed_operations("VM", ref)
        for number, snapshot in enumerate(vm["snapshots"]):
            self.snapshots.append((ref, snapshot, number))

    def _run(self, ref: str, vm: Dict[str, Any]) -> None:
        pool = self.pool
        if vm["resident_on"] is not None:
            host = self.hosts[vm["resident_on"]]
        else:
            seeing = pool.hosts_that_see([sr for sr in pool.srs_of_vm(ref) if pool.exists("SR", sr)])
            if not seeing:
                raise PoolFileError("vm %r: no host sees all its disks" % pool.record("VM", ref)["name_label"])
            host = pool.master() if pool.master() in seeing else seeing[0]
        # a VM may have been running on a host that has died, or with a disk whose SR was forgotten: the rows go on saying so
        if not pool.sees_all(host, [sr for sr in pool.srs_of_vm(ref) if pool.exists("SR", sr)]):
            raise PoolFileError("vm %r: host %r does not see all its disks" % (
                pool.record("VM", ref)["name_label"], pool.record("host", host)["name_label"]))
        pool.run_vm(ref, host, paused=vm["power_state"] == "Paused")
        pool.set_fields("VM_metrics", pool.record("VM", ref)["metrics"], {
            "VCPUs_number": str(vm["vcpus"]), "start_time": pool.now(), "current_domain_type": "hvm"})

    def _make_disk(self, vm: str, vm_uuid: str, disk: Dict[str, Any]) -> None:
        pool = self.pool
        uuid = disk["uuid"] or _uuid("VDI", vm_uuid, disk["userdevice"])
        sr = NULL if disk["sr"] is None else self.srs.get(disk["sr"]) or _nothing("SR", uuid)
        content = storage.Content(disk["size"], disk["seed"], storage.extents_of(disk["used"]), uuid,
                                  pool.record("SR", sr)["uuid"] if pool.exists("SR", sr) else "")
        if content.sr:
            pool.storage.add(uuid, content)
        if disk["missing"]:
            self.missing.append(uuid)
        vdi = self.make("VDI", uuid, {
            "SR": sr, "name_label": disk["name_label"], "name_description": disk["name_description"], "type": disk["type"],
            "location": uuid, "virtual_size": str(disk["size"]), "other_config": dict(disk["other_config"]),
            "physical_utilisation": str(content.written_blocks() * storage.MIB), "sharable": disk["sharable"],
            "cbt_enabled": disk["cbt_enabled"]})
        self.damage.append(("VDI", vdi, dict({"missing": disk["missing"], "on_boot": disk["on_boot"]},
                                             **({"snapshot_of": vdi} if disk["snapshot_of"] == "self" else {}))))
        self._make_vbd(vm, vm_uuid, disk["userdevice"], vdi, {
            "bootable": disk["bootable"], "mode": disk["mode"], "type": "Disk", "device": disk["device"],
            "other_config": {"owner": ""} if disk["owner"] else {}})

    def _make_vbd(self, vm: str, vm_uuid: str, userdevice: str, vdi: str, fields: Dict[str, Any]) -> None:
        uuid = _uuid("VBD", vm_uuid, userdevice)
        vbd = self.make("VBD", uuid, dict(fields, VM=vm, VDI=vdi, userdevice=userdevice,
                                          metrics="OpaqueRef:" + _uuid("VBD_metrics", uuid)))
        self.pool.update_allowed_operations("VBD", vbd)

    def _iso(self, cd: Dict[str, Any]) -> str:
        key = (cd["sr"], cd["name_label"])
        if key not in self.isos:
            sr = self.srs[cd["sr"]]
            uuid = _uuid("ISO", *key)
            self.pool.storage.add(uuid, storage.Content(cd["size"], cd["name_label"], [(0, cd["size"] // storage.MIB)], uuid,
                                                        self.pool.record("SR", sr)["uuid"]))
            self.isos[key] = self.make("VDI", uuid, {
                "SR": sr, "name_label": cd["name_label"], "location": cd["name_label"], "type": "user", "read_only": True,
                "virtual_size": str(cd["size"]), "physical_utilisation": str(cd["size"])})
        return self.isos[key]

    def _make_vif(self, vm: str, vm_uuid: str, vif: Dict[str, Any]) -> None:
        uuid = _uuid("VIF", vm_uuid, vif["device"])
        seed = self.pool.record("VM", vm)["other_config"]["mac_seed"]
        ref = self.make("VIF", uuid, dict(
            vif["settings"], VM=vm, network=self.networks.get(vif["network"]) or _nothing("network", uuid),
            device=vif["device"], MTU=str(vif["MTU"]),
            MAC=vif["MAC"] or mac_of(seed, vif["device"]), MAC_autogenerated=vif["MAC"] is None,
            metrics="OpaqueRef:" + _uuid("VIF_metrics", uuid)))
        self.pool.update_allowed_operations("VIF", ref)

    def _make_snapshot(self, vm: str, snapshot: Dict[str, Any], number: int) -> None:
        vm_uuid = self.pool.record("VM", vm)["uuid"]
        with identities.derived_from("snapshot %d of %s" % (number, vm_uuid)):
            try:
                ref = self.pool.vm_snapshot(vm, snapshot["name_label"])
            except Failure as error:
                raise PoolFileError("vm %r can't have snapshots: %s" % (self.pool.record("VM", vm)["name_label"], error))
        self.pool.set_field("VM", ref, "uuid", snapshot["uuid"] or _uuid("VM snapshot", vm_uuid, number))


BIOS_STRINGS = {
    "bios-vendor": "Xen", "bios-version": "", "system-manufacturer": "Xen", "system-product-name": "HVM domU",
    "system-version": "", "system-serial-number": "", "baseboard-manufacturer": "", "baseboard-product-name": "",
    "baseboard-version": "", "baseboard-serial-number": "", "baseboard-asset-tag": "", "baseboard-location-in-chassis": "",
    "enclosure-asset-tag": "", "hp-rombios": "", "oem-1": "Xen",
    "oem-2": "MS_VM_CERT/SHA1/bdbeb6e0a816d43fa6d3fe8aaef04c2bad9d3e3d",
}


def _hardware(memory: int, vcpus: int) -> Dict[str, Any]:
    """What the recorded VMs had."""
    return {"memory_static_max": str(memory), "memory_dynamic_max": str(memory), "memory_dynamic_min": str(memory // 2),
            "memory_static_min": str(memory // 2), "memory_target": "0", "memory_overhead": "5242880",
            "VCPUs_max": str(vcpus), "VCPUs_at_startup": str(vcpus), "HVM_boot_policy": "BIOS order",
            "HVM_boot_params": {"order": "cdn"}, "platform": {"device-model": "qemu-upstream-compat"}, "domain_type": "hvm",
            "generation_id": "", "hardware_platform_version": "0", "has_vendor_device": False,
            "bios_strings": dict(BIOS_STRINGS),
            "last_boot_CPU_flags": {"vendor": "GenuineIntel", "features": ""}}


def _os_version(text: str) -> Dict[str, str]:
    if not text:
        return {}
    return {"name": text, "uname": "6.1.0-13-amd64", "distro": text.split()[0].lower()}


def _device_config(sr: Dict[str, Any]) -> Dict[str, str]:
    if sr["type"] == "nfs":
        return {"server": "127.0.0.250", "serverpath": "/srv/" + sr["name_label"], "options": ""}
    if sr["type"] == "iso":
        return {"location": "127.0.0.250:/srv/iso", "type": "nfs_iso"}
    if sr["type"] in storage.THICK_TYPES:
        return {"device": "/dev/sda3"}
    return {"location": "/srv"}


def _storage_manager(sr_type: str) -> Dict[str, Any]:
    if sr_type == "iso":
        capabilities = "SR_ATTACH SR_DETACH SR_SCAN VDI_ATTACH VDI_CREATE VDI_DELETE VDI_DETACH".split()
    else:
        capabilities = ("SR_PROBE SR_UPDATE THIN_PROVISIONING VDI_ACTIVATE VDI_ATTACH VDI_CLONE VDI_CREATE VDI_DEACTIVATE "
                        "VDI_DELETE VDI_DETACH VDI_GENERATE_CONFIG VDI_INTRODUCE VDI_RESIZE VDI_SNAPSHOT VDI_UPDATE").split()
        if sr_type in storage.THICK_TYPES:
            capabilities.remove("THIN_PROVISIONING")
    return {"name_label": sr_type.upper(), "name_description": "SR plugin for %s" % sr_type, "type": sr_type,
            "driver_filename": "/opt/xensource/sm/%sSR" % sr_type.upper(), "capabilities": capabilities,
            "features": {capability: "1" for capability in capabilities},
            "configuration": {"location": "where it is (required)"}}


def build(description: Dict[str, Any], pool: Pool, when: Optional[float]) -> None:
    """Fill an empty pool from a checked description, as it was at that time. Nothing of it is logged."""
    pool.fixed_time = when
    with pool.lock, pool.without_recording(), identities.derived_from("pool"):
        _Builder(description, pool).build()
    pool.fixed_time = None
