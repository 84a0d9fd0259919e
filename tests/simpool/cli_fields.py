"""What `xe` shows of each class: its fields in their order, how they print, and which can be set.

One line per field: the name on the command line, the access that is printed behind it (RO, RW;
S for sets, M for maps), and where the value comes from: a field of the record, behind a word that
says how to show it, or `@`, a function of this module. Further words: `expensive` (not shown in
lists), `hidden` (only when asked for by name), `deprecated`.

Source of the facts: xapi v24.19.2, ocaml/xapi-cli-server/records.ml (order and access as the real
`xe *-list params=all` printed them) and record_util.ml (words).
"""

from typing import Any, Callable, Dict, List, Optional, Tuple

from schema import NULL, Failure

NOT_IN_DATABASE = '<not in database>'
EXPENSIVE = '<expensive field>'

VM = '''
uuid                            RO  uuid
name-label                      RW  name_label
name-description                RW  name_description
user-version                    RW  user_version
is-a-template                   RW  is_a_template
is-default-template             RW  is_default_template
is-a-snapshot                   RO  is_a_snapshot
snapshot-of                     RO  uuid:snapshot_of
snapshots                       RO  uuids:snapshots
snapshot-time                   RO  snapshot_time
snapshot-info                   RO  sorted:snapshot_info
parent                          RO  uuid:parent
children                        RO  uuids:children
is-control-domain               RO  is_control_domain
power-state                     RO  lower:power_state
memory-actual                   RO  metrics:memory_actual
memory-target                   RO  @unknown expensive
memory-overhead                 RO  memory_overhead
memory-static-max               RW  memory_static_max
memory-dynamic-max              RW  memory_dynamic_max
memory-dynamic-min              RW  memory_dynamic_min
memory-static-min               RW  memory_static_min
suspend-VDI-uuid                RW  uuid:suspend_VDI
suspend-SR-uuid                 RW  uuid:suspend_SR
VCPUs-params                    MRW VCPUs_params
VCPUs-max                       RW  VCPUs_max
VCPUs-at-startup                RW  VCPUs_at_startup
actions-after-shutdown          RW  words:actions_after_shutdown
actions-after-softreboot        RW  words:actions_after_softreboot
actions-after-reboot            RW  words:actions_after_reboot
actions-after-crash             RW  words:actions_after_crash
console-uuids                   SRO uuids:consoles
hvm                             RO  metrics:hvm
platform                        MRW platform
allowed-operations              SRO allowed_operations
current-operations              SRO operations:current_operations
blocked-operations              MRW blocked_operations
allowed-VBD-devices             SRO @free_vbd_devices expensive
allowed-VIF-devices             SRO @free_vif_devices expensive
possible-hosts                  RO  @possible_hosts expensive
domain-type                     RW  domain_type
current-domain-type             RO  metrics:current_domain_type
HVM-boot-policy                 RW  HVM_boot_policy
HVM-boot-params                 MRW HVM_boot_params
HVM-shadow-multiplier           RW  HVM_shadow_multiplier
PV-kernel                       RW  PV_kernel
PV-ramdisk                      RW  PV_ramdisk
PV-args                         RW  PV_args
PV-legacy-args                  RW  PV_legacy_args
PV-bootloader                   RW  PV_bootloader
PV-bootloader-args              RW  PV_bootloader_args
last-boot-CPU-flags             RO  last_boot_CPU_flags
last-boot-record                RO  @boot_record expensive
resident-on                     RO  uuid:resident_on
affinity                        RW  uuid:affinity
other-config                    MRW other_config
dom-id                          RO  domid
recommendations                 RO  recommendations
xenstore-data                   MRW xenstore_data
ha-always-run                   RW  ha_always_run deprecated
ha-restart-priority             RW  ha_restart_priority
blobs                           RO  blobs
start-time                      RO  metrics:start_time
install-time                    RO  metrics:install_time
VCPUs-number                    RO  metrics:VCPUs_number
VCPUs-utilisation               MRO @nothing_map expensive
os-version                      MRO guest:os_version
PV-drivers-version              MRO guest:PV_drivers_version
PV-drivers-up-to-date           RO  guest:PV_drivers_up_to_date deprecated
memory                          MRO guest:memory
disks                           MRO guest:disks
VBDs                            SRO uuids:VBDs
networks                        MRO guest:networks
PV-drivers-detected             RO  guest:PV_drivers_detected
other                           MRO guest:other
live                            RO  guest:live
guest-metrics-last-updated      RO  guest:last_updated
can-use-hotplug-vbd             RO  guest:can_use_hotplug_vbd
can-use-hotplug-vif             RO  guest:can_use_hotplug_vif
cooperative                     RO  @yes expensive deprecated
tags                            SRW comma:tags
appliance                       RW  uuid:appliance
groups                          RW  uuids:groups
snapshot-schedule               RW  uuid:snapshot_schedule
is-vmss-snapshot                RO  is_vmss_snapshot
start-delay                     RW  start_delay
shutdown-delay                  RW  shutdown_delay
order                           RW  order
version                         RO  version
generation-id                   RO  generation_id
hardware-platform-version       RO  hardware_platform_version
has-vendor-device               RW  has_vendor_device
requires-reboot                 RO  requires_reboot
reference-label                 RO  reference_label
bios-strings                    MRO bios_strings
pending-guidances               RO  pending_guidances
vtpms                           RO  uuids:VTPMs
pending-guidances-recommended   RO  pending_guidances_recommended
pending-guidances-full          RO  pending_guidances_full
'''

VDI = '''
uuid                            RO  uuid
name-label                      RW  name_label
name-description                RW  name_description
is-a-snapshot                   RO  is_a_snapshot
snapshot-of                     RO  uuid:snapshot_of
snapshots                       RO  uuids:snapshots
snapshot-time                   RO  snapshot_time
allowed-operations              SRO allowed_operations
current-operations              SRO operations:current_operations
sr-uuid                         RO  uuid:SR
sr-name-label                   RO  name:SR
vbd-uuids                       SRO uuids:VBDs
crashdump-uuids                 SRO uuids:crash_dumps
virtual-size                    RO  virtual_size
physical-utilisation            RO  physical_utilisation
location                        RO  location
type                            RO  words:type
sharable                        RO  sharable
read-only                       RO  read_only
storage-lock                    RO  storage_lock
managed                         RO  managed
parent                          RO  uuid:parent deprecated
missing                         RO  missing
is-tools-iso                    RO  is_tools_iso
other-config                    MRW other_config
xenstore-data                   MRO xenstore_data
sm-config                       MRO sm_config
on-boot                         RW  on_boot
allow-caching                   RW  allow_caching
metadata-latest                 RO  metadata_latest
metadata-of-pool                RO  uuid:metadata_of_pool
tags                            SRW comma:tags
cbt-enabled                     RO  cbt_enabled
'''

VBD = '''
uuid                            RO  uuid
vm-uuid                         RO  uuid:VM
vm-name-label                   RO  name:VM
vdi-uuid                        RO  uuid:VDI
vdi-name-label                  RO  @vdi_name
allowed-operations              SRO allowed_operations
current-operations              SRO operations:current_operations
empty                           RO  empty
device                          RO  device
userdevice                      RW  userdevice
bootable                        RW  bootable
mode                            RW  mode
type                            RW  type
unpluggable                     RW  unpluggable
currently-attached              RO  currently_attached
attachable                      RO  @yes expensive
storage-lock                    RO  storage_lock
status-code                     RO  status_code
status-detail                   RO  status_detail
qos_algorithm_type              RW  qos_algorithm_type
qos_algorithm_params            MRW qos_algorithm_params
qos_supported_algorithms        SRO qos_supported_algorithms
other-config                    MRW other_config
io_read_kbs                     RO  @unknown expensive
io_write_kbs                    RO  @unknown expensive
'''

VIF = '''
uuid                            RO  uuid
vm-uuid                         RO  uuid:VM
vm-name-label                   RO  name:VM
allowed-operations              SRO allowed_operations
current-operations              SRO operations:current_operations
device                          RO  device
MAC                             RO  MAC
MAC-autogenerated               RO  MAC_autogenerated
MTU                             RO  MTU
currently-attached              RO  currently_attached
qos_algorithm_type              RW  qos_algorithm_type
qos_algorithm_params            MRW qos_algorithm_params
qos_supported_algorithms        SRO qos_supported_algorithms
other-config                    MRW other_config
network-uuid                    RO  uuid:network
network-name-label              RO  name:network
io_read_kbs                     RO  @unknown expensive
io_write_kbs                    RO  @unknown expensive
locking-mode                    RW  locking_mode
ipv4-allowed                    SRW comma:ipv4_allowed
ipv6-allowed                    SRW comma:ipv6_allowed
ipv4-configuration-mode         RO  ipv4_configuration_mode
ipv4-addresses                  RO  ipv4_addresses
ipv4-gateway                    RO  ipv4_gateway
ipv6-configuration-mode         RO  ipv6_configuration_mode
ipv6-addresses                  RO  ipv6_addresses
ipv6-gateway                    RO  ipv6_gateway
'''

SR = '''
uuid                            RO  uuid
name-label                      RW  name_label
name-description                RW  name_description
host                            RO  @host_of_sr
allowed-operations              SRO sr-operations:allowed_operations
current-operations              SRO operations:current_operations
VDIs                            SRO uuids:VDIs
PBDs                            SRO uuids:PBDs
virtual-allocation              RO  virtual_allocation
physical-utilisation            RO  physical_utilisation
physical-size                   RO  physical_size
type                            RO  type
content-type                    RO  content_type
shared                          RW  shared
introduced-by                   RO  uuid:introduced_by
is-tools-sr                     RO  is_tools_sr
other-config                    MRW other_config
sm-config                       MRO sm_config
blobs                           RO  blobs
local-cache-enabled             RO  local_cache_enabled
tags                            SRW comma:tags
clustered                       RO  clustered
'''

PBD = '''
uuid                            RO  uuid
host                            RO  uuid:host deprecated
host-uuid                       RO  uuid:host
host-name-label                 RO  name:host
sr-uuid                         RO  uuid:SR
sr-name-label                   RO  name:SR
device-config                   MRO device_config
currently-attached              RO  currently_attached
other-config                    MRW other_config
'''

NETWORK = '''
uuid                            RO  uuid
name-label                      RW  name_label
name-description                RW  name_description
VIF-uuids                       SRO uuids:VIFs
PIF-uuids                       SRO uuids:PIFs
MTU                             RW  MTU
bridge                          RO  bridge
managed                         RO  managed
other-config                    MRW other_config
blobs                           RO  blobs
tags                            SRW comma:tags
default-locking-mode            RW  default_locking_mode
purpose                         SRW comma:purpose
'''

HOST = '''
uuid                            RO  uuid
name-label                      RW  name_label
name-description                RW  name_description
allowed-operations              SRO host-operations:allowed_operations
current-operations              SRO operations:current_operations
enabled                         RO  enabled
display                         RO  display
API-version-major               RO  API_version_major
API-version-minor               RO  API_version_minor
API-version-vendor              RO  API_version_vendor
API-version-vendor-implementation MRO API_version_vendor_implementation
logging                         MRW logging
suspend-image-sr-uuid           RW  uuid:suspend_image_sr
crash-dump-sr-uuid              RW  uuid:crash_dump_sr
software-version                MRO software_version
capabilities                    SRO capabilities
other-config                    MRW other_config
cpu_info                        MRO cpu_info
chipset-info                    MRO chipset_info
hostname                        RO  hostname
address                         RO  address
https-only                      RW  https_only
supported-bootloaders           SRO supported_bootloaders
blobs                           RO  blobs
memory-overhead                 RO  memory_overhead
memory-total                    RO  host-metrics:memory_total
memory-free                     RO  host-metrics:memory_free
memory-free-computed            RO  @unknown expensive
host-metrics-live               RO  host-metrics:live
patches                         SRO uuids:patches deprecated
updates                         SRO uuids:updates
ha-statefiles                   RO  uuids:ha_statefiles
ha-network-peers                RO  uuids:ha_network_peers
external-auth-type              RO  external_auth_type
external-auth-service-name      RO  external_auth_service_name
external-auth-configuration     MRO external_auth_configuration
edition                         RO  edition
license-server                  MRO license_server
power-on-mode                   RO  power_on_mode
power-on-config                 MRO power_on_config
local-cache-sr                  RO  uuid:local_cache_sr
tags                            SRW comma:tags
ssl-legacy                      RW  ssl_legacy
guest_VCPUs_params              MRW guest_VCPUs_params
virtual-hardware-platform-versions SRO virtual_hardware_platform_versions
control-domain-uuid             RO  uuid:control_domain
resident-vms                    SRO uuids:resident_VMs
updates-requiring-reboot        SRO uuids:updates_requiring_reboot
features                        SRO uuids:features
iscsi_iqn                       RW  iscsi_iqn
multipathing                    RW  multipathing
numa-affinity-policy            RW  numa_affinity_policy
pending-guidances               RO  pending_guidances
tls-verification-enabled        RO  tls_verification_enabled
last-software-update            RO  last_software_update
latest-synced-updates-applied   RO  latest_synced_updates_applied
pending-guidances-recommended   RO  pending_guidances_recommended
pending-guidances-full          RO  pending_guidances_full
last-update-hash                RO  last_update_hash
'''

POOL = '''
uuid                            RO  uuid
name-label                      RW  name_label
name-description                RW  name_description
master                          RO  uuid:master
default-SR                      RW  uuid:default_SR
crash-dump-SR                   RW  uuid:crash_dump_SR
suspend-image-SR                RW  uuid:suspend_image_SR
supported-sr-types              RO  @sr_types expensive
other-config                    MRW other_config
allowed-operations              SRO allowed_operations
current-operations              SRO operations:current_operations
ha-enabled                      RO  ha_enabled
ha-configuration                RO  ha_configuration
ha-statefiles                   RO  uuids:ha_statefiles
ha-host-failures-to-tolerate    RW  ha_host_failures_to_tolerate
ha-plan-exists-for              RO  ha_plan_exists_for
ha-allow-overcommit             RW  ha_allow_overcommit
ha-overcommitted                RO  ha_overcommitted
blobs                           RO  blobs
wlb-url                         RO  wlb_url
wlb-username                    RO  wlb_username
wlb-enabled                     RW  wlb_enabled
wlb-verify-cert                 RW  wlb_verify_cert
igmp-snooping-enabled           RW  igmp_snooping_enabled
gui-config                      MRW gui_config
health-check-config             MRW health_check_config
restrictions                    RO  restrictions
tags                            SRW comma:tags
license-state                   RO  @license_state
ha-cluster-stack                RO  ha_cluster_stack
guest-agent-config              MRW guest_agent_config
cpu_info                        MRO cpu_info
policy-no-vendor-device         RW  policy_no_vendor_device
live-patching-disabled          RW  live_patching_disabled
tls-verification-enabled        RO  tls_verification_enabled
client-certificate-auth-enabled RO  client_certificate_auth_enabled
client-certificate-auth-name    RO  client_certificate_auth_name
repositories                    SRW uuids:repositories
repository-proxy-url            RO  repository_proxy_url
repository-proxy-username       RO  repository_proxy_username
https-only                      RW  @https_only
migration-compression           RW  migration_compression
coordinator-bias                RW  coordinator_bias
telemetry-frequency             RO  telemetry_frequency
telemetry-next-collection       RO  telemetry_next_collection
last-update-sync                RO  last_update_sync
update-sync-frequency           RO  update_sync_frequency
update-sync-day                 RO  update_sync_day
update-sync-enabled             RO  update_sync_enabled
recommendations                 MRO recommendations
'''

TASK = '''
uuid                            RO  uuid
name-label                      RO  name_label
name-description                RO  name_description
subtask_of                      RO  uuid:subtask_of
subtasks                        RO  uuids:subtasks
resident-on                     RO  uuid:resident_on
status                          RO  status
progress                        RO  progress
type                            RO  type
result                          RO  result
created                         RO  created
finished                        RO  finished
error_info                      RO  error_info
allowed_operations              RO  words:allowed_operations
current_operations              RO  operations:current_operations
other-config                    MRW other_config
'''

MESSAGE = '''
uuid                            RO  uuid
name                            RO  name
priority                        RO  priority
class                           RO  cls
obj-uuid                        RO  obj_uuid
timestamp                       RO  timestamp
body                            RO  body
'''

CONSOLE = '''
uuid                            RO  uuid
vm-uuid                         RO  uuid:VM
vm-name-label                   RO  name:VM
protocol                        RO  upper:protocol
location                        RO  location
'''

PIF = '''
uuid                            RO  uuid
device                          RO  device
MAC                             RO  MAC
physical                        RO  physical
managed                         RO  managed
currently-attached              RO  currently_attached
MTU                             RO  MTU
VLAN                            RO  VLAN
vlan-master-of                  RO  uuid:VLAN_master_of
vlan-slave-of                   RO  uuids:VLAN_slave_of
bond-master-of                  RO  uuids:bond_master_of
bond-slave-of                   RO  uuid:bond_slave_of
sriov-physical-PIF-of           RO  uuids:sriov_physical_PIF_of
sriov-logical-PIF-of            RO  uuids:sriov_logical_PIF_of
tunnel-access-PIF-of            RO  uuids:tunnel_access_PIF_of
tunnel-transport-PIF-of         RO  uuids:tunnel_transport_PIF_of
management                      RO  management
network-uuid                    RO  uuid:network
network-name-label              RO  name:network
host-uuid                       RO  uuid:host
host-name-label                 RO  name:host
IP-configuration-mode           RO  ip_configuration_mode
IP                              RO  IP
netmask                         RO  netmask
gateway                         RO  gateway
IPv6-configuration-mode         RO  ipv6_configuration_mode
IPv6                            RO  IPv6
IPv6-gateway                    RO  ipv6_gateway
primary-address-type            RO  primary_address_type
DNS                             RO  DNS
properties                      MRO properties
capabilities                    SRO capabilities
io_read_kbs                     RO  @unknown expensive
io_write_kbs                    RO  @unknown expensive
carrier                         RO  pif-metrics:carrier
vendor-id                       RO  pif-metrics:vendor_id
vendor-name                     RO  pif-metrics:vendor_name
device-id                       RO  pif-metrics:device_id
device-name                     RO  pif-metrics:device_name
speed                           RO  @link_speed
duplex                          RO  @link_duplex
disallow-unplug                 RW  disallow_unplug
pci-bus-path                    RO  pif-metrics:pci_bus_path
other-config                    MRW other_config
igmp-snooping-status            RO  igmp_snooping_status
'''

SM = '''
uuid                            RO  uuid
name-label                      RO  name_label
name-description                RO  name_description
type                            RO  type
vendor                          RO  vendor
copyright                       RO  copyright
required-api-version            RO  required_api_version
capabilities                    RO  capabilities deprecated
features                        MRO features
configuration                   RO  configuration
driver-filename                 RO  driver_filename
required-cluster-stack          RO  required_cluster_stack
'''

SECRET = '''
uuid                            RO  uuid
value                           RW  value
'''

# Command word -> (API class, fields, filters that are always there, fields shown by default; none:
# all of them). cli_operations.ml gen_cmds.
CLASSES = {
    'pool': ('pool', POOL, [], 'uuid name-label name-description master default-SR'),
    'host': ('host', HOST, [], 'uuid name-label name-description'),
    'vm': ('VM', VM, [('is-a-template', 'false')], 'name-label uuid power-state'),
    'template': ('VM', VM, [('is-a-template', 'true'), ('is-a-snapshot', 'false')],
                 'name-label name-description uuid'),
    'snapshot': ('VM', VM, [('is-a-snapshot', 'true')],
                 'name-label name-description uuid snapshot_of snapshot_time is-vmss-snapshot'),
    'vdi': ('VDI', VDI, [],
            'uuid name-label name-description virtual-size read-only sharable sr-uuid'),
    'vbd': ('VBD', VBD, [], 'uuid vm-uuid vm-name-label vdi-uuid device empty'),
    'vif': ('VIF', VIF, [], 'uuid device vm-uuid network-uuid'),
    'network': ('network', NETWORK, [], 'uuid name-label name-description bridge'),
    'sr': ('SR', SR, [], 'uuid name-label name-description host type content-type'),
    'sm': ('SM', SM, [], 'uuid type name-label name-description vendor copyright configuration'),
    'pbd': ('PBD', PBD, [], 'uuid host-uuid sr-uuid device-config currently-attached'),
    'pif': ('PIF', PIF, [], 'uuid device VLAN MAC network-uuid currently-attached host-uuid'),
    'task': ('task', TASK, [], 'uuid name-label name-description status progress'),
    'console': ('console', CONSOLE, [], 'uuid vm-uuid vm-name-label protocol location'),
    'message': ('message', MESSAGE, [], ''),
    'secret': ('secret', SECRET, [], ''),
}   # type: Dict[str, Tuple[str, str, List[Tuple[str, str]], str]]

# Classes of which the simulated pool has no objects: their lists are empty.
EMPTY_CLASSES = {'bond', 'vlan', 'tunnel', 'host-crashdump', 'patch', 'update', 'subject', 'vmss',
                 'appliance', 'vm-group', 'pgpu', 'gpu-group', 'vgpu', 'vgpu-type', 'drtask',
                 'pvs-site', 'pvs-server', 'pvs-proxy', 'pvs-cache-storage', 'sdn-controller',
                 'pusb', 'usb-group', 'vusb', 'network-sriov', 'cluster', 'cluster-host',
                 'repository', 'vtpm', 'observer', 'pci', 'feature'}


class Row:
    """One object as `xe` sees it: its class, reference, record, and the pool around it."""

    def __init__(self, pool: Any, cls: str, ref: str) -> None:
        self.pool = pool
        self.cls = cls
        self.ref = ref

    @property
    def record(self) -> Dict[str, Any]:
        return self.pool.record(self.cls, self.ref)

    def uuid(self) -> str:
        return self.record['uuid']

    def other(self, cls: str, ref: str) -> Optional[Dict[str, Any]]:
        return self.pool.tables[cls].get(ref)


class Field:
    """One field of a class on the command line."""

    def __init__(self, line: str) -> None:
        words = line.split()
        self.name, self.access, source = words[:3]
        self.show, _, self.field = source.rpartition(':')
        self.function = (globals()['_' + source[1:]]
                         if source.startswith('@') else None)   # type: Optional[Callable]
        self.is_expensive = 'expensive' in words
        self.is_deprecated = 'deprecated' in words
        self.is_set = self.access.startswith('S')
        self.is_map = self.access.startswith('M')
        self.is_writable = self.access.endswith('W')

    def label(self) -> str:
        access = '(%3s)' % self.access
        return self.name + ' ' + access + (' [DEPRECATED]' if self.is_deprecated else '')

    def value(self, row: Row) -> Any:
        """The value before it becomes one text: a list of texts for sets, a dict for maps."""
        if self.function is not None:
            return self.function(row)
        record = row.record
        if self.show in ('metrics', 'guest'):
            cls, ref = {'metrics': ('VM_metrics', record.get('metrics')),
                        'guest': ('VM_guest_metrics', record.get('guest_metrics'))}[self.show]
            record = row.other(cls, ref) or {}
            return record.get(self.field, NOT_IN_DATABASE)
        if self.show in ('host-metrics', 'pif-metrics'):
            cls = {'host-metrics': 'host_metrics', 'pif-metrics': 'PIF_metrics'}[self.show]
            metrics = row.pool.tables.get(cls, {}).get(record.get('metrics'), {})
            return metrics.get(self.field, NOT_IN_DATABASE)
        value = record.get(self.field, '')
        if self.show == 'uuid':
            return uuid_of(row.pool, value)
        if self.show == 'uuids':
            return [uuid_of(row.pool, ref) for ref in value]
        if self.show == 'name':
            return name_of(row.pool, value)
        if self.show == 'operations':
            return list(value.values())
        if self.show == 'lower':
            return value.lower()
        if self.show == 'upper':
            return value.upper()
        if self.show == 'words':
            return [in_words(one) for one in value] if isinstance(value, list) else in_words(value)
        if self.show == 'sr-operations':
            return [_with_class(one, ('vdi_', 'pbd_')) for one in value]
        if self.show == 'host-operations':
            return [_with_class(one, ('vm_',)) for one in value]
        if self.show == 'sorted':
            return dict(sorted(value.items()))
        return value

    def text(self, row: Row) -> str:
        """The value as it is printed and compared with filters."""
        try:
            value = self.value(row)
        except Failure as failure:
            if failure.code == 'HANDLE_INVALID':
                return '<invalid reference>'
            raise
        return as_text(value, ', ' if self.show == 'comma' else '; ')


def as_text(value: Any, separator: str = '; ') -> str:
    if isinstance(value, bool):
        return 'true' if value else 'false'
    if isinstance(value, float):
        return '%.3f' % value
    if isinstance(value, dict):
        return '; '.join('%s: %s' % (key, as_text(one)) for key, one in value.items())
    if isinstance(value, list):
        return separator.join(as_text(one) for one in value)
    return value


def uuid_of(pool: Any, ref: str) -> str:
    found = look_up(pool, ref)
    return found['uuid'] if found else NOT_IN_DATABASE


def name_of(pool: Any, ref: str) -> str:
    found = look_up(pool, ref)
    return found.get('name_label', NOT_IN_DATABASE) if found else NOT_IN_DATABASE


def look_up(pool: Any, ref: str) -> Optional[Dict[str, Any]]:
    """The record of a reference of any class, as the server's Ref_index finds it."""
    for table in pool.tables.values():
        if ref in table:
            return table[ref]
    return None


SPECIAL_WORDS = {'coredump_and_destroy': 'Core dump and destroy', 'redo_log': 'Redo log',
                 'coredump_and_restart': 'Core dump and restart', 'rrd': 'RRD',
                 'ha_statefile': 'HA statefile', 'pvs_cache': 'PVS cache',
                 'cbt_metadata': 'CBT metadata'}


def in_words(text: str) -> str:
    """soft_reboot -> Soft reboot."""
    return SPECIAL_WORDS.get(text, text.capitalize().replace('_', ' '))


def _with_class(operation: str, prefixes: Tuple[str, ...]) -> str:
    """vdi_create -> VDI.create, as sr_operation_to_string and host_operation_to_string have it."""
    for prefix in prefixes:
        if operation.startswith(prefix):
            return prefix[:-1].upper() + '.' + operation[len(prefix):]
    return operation


def _unknown(row: Row) -> str:
    return '<unknown>'


def _link_speed(row: Row) -> str:
    metrics = row.other('PIF_metrics', row.record['metrics']) or {}
    return metrics.get('speed', '0') + ' Mbit/s'


def _link_duplex(row: Row) -> str:
    metrics = row.other('PIF_metrics', row.record['metrics']) or {}
    if not metrics.get('carrier'):
        return 'unknown'
    return 'full' if metrics.get('duplex') else 'half'


def _yes(row: Row) -> bool:
    return True


def _nothing_map(row: Row) -> Dict[str, str]:
    return {}


def _boot_record(row: Row) -> str:
    return "'%s'" % row.record['last_booted_record']


def _free_vbd_devices(row: Row) -> List[str]:
    taken = {row.pool.record('VBD', ref)['userdevice'] for ref in row.record['VBDs']}
    return [str(n) for n in range(255) if str(n) not in taken]


def _free_vif_devices(row: Row) -> List[str]:
    taken = {row.pool.record('VIF', ref)['device'] for ref in row.record['VIFs']}
    return [str(n) for n in range(7) if str(n) not in taken]


def _possible_hosts(row: Row) -> List[str]:
    srs = []
    for ref in row.record['VBDs']:
        vbd = row.pool.record('VBD', ref)
        if not vbd['empty'] and vbd['VDI'] != NULL:
            srs.append(row.pool.record('VDI', vbd['VDI'])['SR'])
    return [uuid_of(row.pool, host) for host in row.pool.hosts_that_see(srs)]


def _vdi_name(row: Row) -> str:
    return '<EMPTY>' if row.record['empty'] else name_of(row.pool, row.record['VDI'])


def _host_of_sr(row: Row) -> str:
    pbds = row.record['PBDs']
    if len(pbds) > 1:
        return '<shared>'
    return name_of(row.pool, row.pool.record('PBD', pbds[0])['host']) if pbds else NOT_IN_DATABASE


def _sr_types(row: Row) -> str:
    return '; '.join(sorted({sm['type'] for sm in row.pool.tables.get('SM', {}).values()}))


def _https_only(row: Row) -> bool:
    return all(host['https_only'] for host in row.pool.tables['host'].values())


def _license_state(row: Row) -> str:
    return 'edition: xcp-ng; expiry: never'


def fields_of(word: str) -> List[Field]:
    """The fields of the class that a command word (vm, vdi, ...) stands for."""
    if word not in _FIELDS:
        _FIELDS[word] = [Field(line) for line in CLASSES[word][1].strip().splitlines()]
    return _FIELDS[word]


_FIELDS = {}    # type: Dict[str, List[Field]]
