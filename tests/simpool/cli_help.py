"""What `xe help COMMAND` says of the commands that are not made for every class alike, and what each must be given.

command -> (required parameters in the order in which they are missed, optional ones, sentence). `<vm-selectors>` among
the optional ones: the command chooses VMs by the fields of vm-list.

Source: xapi v24.19.2, ocaml/xapi-cli-server/cli_frontend.ml.
"""

from typing import Dict, List, Tuple

SELECTORS = '<vm-selectors>'
SELECTORS_INFO = (
    "VMs can be specified by filtering the full list of VMs on the values of zero or more fields. For example, specifying "
    "'uuid=<some_uuid>' will select only the VM with that uuid, and 'power-state=halted' will select only VMs whose "
    "'power-state' field is equal to 'halted'. The special pseudo-field 'vm' matches either of name-label or uuid. Where "
    "multiple VMs are matching, the option '--multiple' must be specified to perform the operation. The full list of fields "
    "that can be matched can be obtained by the command 'xe vm-list params=all'. If no parameters to select VMs are given, "
    "the operation will be performed on all VMs.")

HELP = {
    'host-forget': ('uuid', '',
        'Forget about the host without contacting it explicitly. WARNING: this call is useful if the host to '
        "'forget' is dead; however, if the host is live and part of the pool, you should consider using pool-eject"
        ' instead.'),
    'message-destroy': ('', 'uuid uuids', 'Destroy one existing message or many'),
    'pbd-plug': ('uuid', '',
        'Attempt to plug in the PBD to the host. If this succeeds then the referenced SR (and the VDIs contained '
        'within) should be visible to the host.'),
    'pbd-unplug': ('uuid', '',
        'Attempt to unplug the PBD from the host. If this succeeds then the referenced SR (and the VDIs contained '
        'within) should not be visible to the host.'),
    'pool-dump-database': ('file-name', '', 'Download a dump of the pool database.'),
    'pool-restore-database': ('file-name', 'dry-run', 'Restore a dump of the pool database to the server.'),
    'snapshot-clone': ('new-name-label', 'uuid new-name-description',
        'Create a new template by cloning an existing snapshot, using storage-level fast disk clone operation '
        'where available.'),
    'snapshot-destroy': ('', 'uuid snapshot-uuid',
        'Destroy a snapshot. This leaves the storage associated with the snapshot intact. To delete storage too, '
        'use snapshot-uninstall.'),
    'snapshot-export-to-template': ('filename snapshot-uuid', 'preserve-power-state compress metadata excluded-device-types',
        'Export a snapshot to <filename>.'),
    'snapshot-revert': ('', 'uuid snapshot-uuid',
        'Revert an existing VM to a previous checkpointed or snapshotted state.'),
    'snapshot-uninstall': ('', 'uuid snapshot-uuid force',
        'Uninstall a snapshot. This operation will destroy those VDIs that are marked RW and connected to this '
        'snapshot only. To simply destroy the VM record, use snapshot-destroy.'),
    'sr-scan': ('uuid', '', 'Force an SR scan, syncing database with VDIs present in underlying storage substrate.'),
    'sr-update': ('uuid', '', 'Refresh the fields of the SR object in the database.'),
    'task-cancel': ('uuid', '', 'Set a task to cancelling and return.'),
    'template-export': ('filename template-uuid', 'compress metadata excluded-device-types',
        'Export a template to <filename>.'),
    'template-uninstall': ('template-uuid', 'force',
        "Uninstall a custom template. This operation will destroy those VDIs that are marked as 'owned' by this "
        'template'),
    'vbd-create': ('vm-uuid device', 'vdi-uuid bootable type mode unpluggable',
        "Create a VBD. Appropriate values for the device field are listed in the parameter 'allowed-VBD-devices' "
        "on the VM. If no VDI is specified, an empty VBD will be created. The type parameter can be 'Disk' or "
        "'CD', and the mode is 'RO' or 'RW'."),
    'vbd-destroy': ('uuid', '', 'Destroy a VBD.'),
    'vbd-plug': ('uuid', '', 'Attempt to attach the VBD while the VM is in the running state.'),
    'vbd-unplug': ('uuid', 'timeout force',
        "Attempt to detach the VBD while the VM is in the running state. If the optional argument 'timeout=N' is "
        "given then the command will wait for up to 'N' seconds for the unplug to complete. If the optional "
        "argument 'force' is given then it will be immediately unplugged."),
    'vdi-clone': ('uuid', 'driver-params- new-name-label new-name-description', 'Clone a specified VDI.'),
    'vdi-copy': ('uuid', 'sr-uuid base-vdi-uuid into-vdi-uuid',
        'Copy either a full VDI or the block differences between two VDIs either into a fresh VDI in a specified '
        'SR or into an existing VDI.'),
    'vdi-create': ('sr-uuid name-label virtual-size', 'sm-config: sharable tags: type',
        "Create a VDI. Type is 'system' 'user' 'suspend' or 'crashdump'."),
    'vdi-data-destroy': ('uuid', '', 'Delete the data of the VDI, but keep its changed block tracking metadata.'),
    'vdi-destroy': ('uuid', '', 'Destroy a VDI.'),
    'vdi-export': ('uuid filename', 'format base progress', 'Export a VDI.'),
    'vdi-import': ('uuid filename', 'format progress', 'Import a raw VDI.'),
    'vdi-pool-migrate': ('uuid sr-uuid', '',
        'Migrate a VDI to a specified SR, while the VDI is attached to a running guest.'),
    'vdi-resize': ('uuid disk-size', 'online', 'Resize a VDI.'),
    'vdi-snapshot': ('uuid', 'driver-params-', 'Snapshot a specified VDI.'),
    'vif-configure-ipv4': ('uuid mode', 'address gateway', 'Configure IPv4 settings on a VIF.'),
    'vif-configure-ipv6': ('uuid mode', 'address gateway', 'Configure IPv6 settings on a VIF.'),
    'vif-create': ('device network-uuid vm-uuid', 'mac',
        "Create a VIF. Appropriate values for the device are listed in the parameter 'allowed-VIF-devices' on the "
        'VM. If specified, the MAC parameter is of the form aa:bb:cc:dd:ee:ff. If MAC is not specified the server '
        'will choose an appropriate MAC automatically.'),
    'vif-destroy': ('uuid', '', 'Destroy a VIF.'),
    'vif-move': ('uuid network-uuid', '', 'Move the VIF to another network.'),
    'vif-plug': ('uuid', '', 'Attempt to attach the VIF while the VM is in the running state.'),
    'vif-unplug': ('uuid', 'force', 'Attempt to detach the VIF while the VM is in the running state.'),
    'vm-checkpoint': ('new-name-label', 'new-name-description <vm-selectors>',
        'Checkpoint an existing VM, using storage-level fast disk snapshot operation where available.'),
    'vm-clone': ('new-name-label', 'new-name-description <vm-selectors>',
        'Clone an existing VM, using storage-level fast disk clone operation where available.'),
    'vm-copy': ('new-name-label', 'new-name-description sr-uuid <vm-selectors>',
        'Copy an existing VM, but without using storage-level fast disk clone operation (even if this is '
        "available). The disk images of the copied VM are guaranteed to be 'full images' - i.e. not part of a CoW "
        'chain.'),
    'vm-destroy': ('uuid', '',
        'Destroy a VM. This leaves the storage associated with the VM intact. To delete storage too, use vm-'
        'uninstall.'),
    'vm-disk-list': ('', 'vbd-params vdi-params <vm-selectors>', 'List the disks on the selected VM(s).'),
    'vm-export': ('filename', 'preserve-power-state compress metadata excluded-device-types <vm-selectors>',
        'Export a VM to <filename>.'),
    'vm-import': ('', 'filename preserve sr-uuid force host-username host-password type remote-config url vdi:',
        "Import a VM. If type=ESXServer is given, it will import from a VMWare server and 'host-username', 'host-"
        "password' and 'remote-config' are required. Otherwise, it will import from a file, and 'filename' is "
        'required. If the option preserve=true is given then as many settings as possible are restored, including '
        'VIF MAC addresses. The default is to regenerate VIF MAC addresses. The VDIs will be imported into the '
        "Pool's default SR unless an override is provided. If the force option is given then any disk data "
        "checksum failures will be ignored. If the parameter 'url' is specified, xapi will attempt to import from "
        'that URL.'),
    'vm-install': ('new-name-label', 'sr-name-label sr-uuid template copy-bios-strings-from',
        'Install a new VM from a template. The template parameter can match either the template name or the uuid.'),
    'vm-memory-limits-set': ('static-min static-max dynamic-min dynamic-max', '<vm-selectors>',
        'Configure the memory limits of a VM.'),
    'vm-pause': ('', '<vm-selectors>',
        "Pause a running VM. Note this operation does not free the associated memory (see 'vm-suspend')."),
    'vm-reboot': ('', 'force <vm-selectors>', 'Reboot the selected VM(s).'),
    'vm-reset-powerstate': ('', 'force <vm-selectors>',
        'Force the VM powerstate to halted in the management toolstack database only. This command is used to '
        "recover a VM that is marked as 'running', but is known to be on a dead slave host that will not recover. "
        "This is a potentially dangerous operation: you must ensure that the VM you are forcing to 'halted' is "
        'definitely not running anywhere.'),
    'vm-resume': ('', 'force on <vm-selectors>', 'Resume the selected VM(s).'),
    'vm-shutdown': ('', 'force <vm-selectors>',
        'Shutdown the selected VM(s). The optional argument --force will forcibly shut down the VM.'),
    'vm-snapshot': ('new-name-label', 'new-name-description ignore-vdi-uuids <vm-selectors>',
        'Snapshot an existing VM, using storage-level fast disk snapshot operation where available.'),
    'vm-snapshot-with-quiesce': ('new-name-label', 'new-name-description <vm-selectors>',
        'Support for VSS has been removed - calling this will throw an error. Snapshot an existing VM with '
        'quiesce, using storage-level fast disk snapshot operation where available.'),
    'vm-start': ('', 'force on paused <vm-selectors>',
        'Start the selected VM(s). Where pooling is enabled, the host on which to start can be specified with the '
        "'on' parameter that takes a uuid. The optional parameter '--force' will bypass any hardware-compatibility"
        ' warnings.'),
    'vm-suspend': ('', '<vm-selectors>', 'Suspend the selected VM(s).'),
    'vm-uninstall': ('', 'force <vm-selectors>',
        'Uninstall a VM. This operation will destroy those VDIs that are marked RW and connected to this VM only. '
        'To simply destroy the VM record, use vm-destroy.'),
    'vm-unpause': ('', '<vm-selectors>', 'Unpause a paused VM.'),
    'vm-vif-list': ('', '<vm-selectors>', 'List the VIFs present on selected VM.'),
}   # type: Dict[str, Tuple[str, str, str]]


def table(command: str, needed: List[str], optional: List[str], sentence: str) -> List[Tuple[str, str]]:
    """What `xe help` prints of a command (rio_help)."""
    return [('command name        ', command), ('reqd params     ', ', '.join(needed)),
            ('optional params ', ', '.join(optional)),
            ('description     ', sentence + (SELECTORS_INFO if SELECTORS in optional else ''))]
