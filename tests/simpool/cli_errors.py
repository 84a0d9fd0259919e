"""The sentences that `xe` prints for failures whose code the data model documents.

code -> (names of the parameters, sentence). Codes that are not here have no documentation there
either, or were left out because the simulated pool cannot raise them.

Source: xapi, ocaml/idl/datamodel_errors.ml; where the real `xe` of 24.19.2 printed a sentence, its
wording was taken.
"""

from typing import Dict, List, Optional, Tuple

DOCUMENTED = {
    'INTERNAL_ERROR': (['message'], 'The server failed to handle your request, due to an internal error. The given '
                       'message may give details useful for debugging the problem.'),
    'MESSAGE_REMOVED': ([], 'This function is no longer available.'),
    'MESSAGE_METHOD_UNKNOWN': (['method'], 'You tried to call a method that does not exist. The method name that you '
                               'used is echoed.'),
    'MESSAGE_PARAMETER_COUNT_MISMATCH': (
        ['method', 'expected', 'received'], 'You tried to call a method with the incorrect number of parameters. The '
        'fully-qualified method name that you used, and the number of received and expected parameters are returned.'),
    'PERMISSION_DENIED': (['message'], 'Caller not allowed to perform this operation.'),
    'RBAC_PERMISSION_DENIED': (['permission', 'message'], 'RBAC permission denied.'),
    'UUID_INVALID': (['type', 'uuid'], 'The uuid you supplied was invalid.'),
    'HANDLE_INVALID': (['class', 'handle'], 'You gave an invalid object reference. The object may have recently been '
                       'deleted. The class parameter gives the type of reference given, and the handle parameter '
                       'echoes the bad value given.'),
    'MAP_DUPLICATE_KEY': (['type', 'param_name', 'uuid', 'key'], 'You tried to add a key-value pair to a map, but that '
                          'key is already there.'),
    'VALUE_NOT_SUPPORTED': (
        ['field', 'value', 'reason'], 'You attempted to set a value that is not supported by this implementation. The '
        'fully-qualified field name and the value that you tried to set are returned. Also returned is a '
        'developer-only diagnostic reason.'),
    'INVALID_VALUE': (['field', 'value'], 'The value given is invalid'),
    'FIELD_TYPE_ERROR': (['field'], 'The value specified is of the wrong type'),
    'OPERATION_NOT_ALLOWED': (['reason'], 'You attempted an operation that was not allowed.'),
    'OPERATION_BLOCKED': (['ref', 'code'], 'You attempted an operation that was explicitly blocked (see the '
                          'blocked_operations field of the given object).'),
    'NOT_IMPLEMENTED': (['function'], 'The function is not implemented'),
    'MEMORY_CONSTRAINT_VIOLATION_ORDER': ([], 'The dynamic memory range violates constraint static_min <= dynamic_min '
                                          '<= dynamic_max <= static_max.'),
    'MEMORY_CONSTRAINT_VIOLATION': (['constraint'], 'The dynamic memory range does not satisfy the following '
                                    'constraint.'),
    'MEMORY_CONSTRAINT_VIOLATION_MAXPIN': (['reason'], 'The dynamic memory range violates constraint static_min = '
                                           'dynamic_min = dynamic_max = static_max.'),
    'SESSION_AUTHENTICATION_FAILED': ([], 'The credentials given by the user are incorrect, so access has been '
                                      'denied, and you have not been issued a session handle.'),
    'SESSION_INVALID': (['handle'], 'You gave an invalid session reference. It may have been invalidated by a server '
                        'restart, or timed out. You should get a new session handle, using one of the session.login_ '
                        'calls. This error does not invalidate the current connection. The handle parameter echoes '
                        'the bad value given.'),
    'HOST_IS_SLAVE': (['Master IP address'], 'You cannot make regular API calls directly on a slave. Please pass API '
                      'calls via the master host.'),
    'HOST_STILL_BOOTING': ([], 'The host toolstack is still initialising. Please wait.'),
    'HOST_IN_EMERGENCY_MODE': ([], 'Cannot perform operation as the host is running in emergency mode.'),
    'HOST_OFFLINE': (['host'], 'You attempted an operation which involves a host which could not be contacted.'),
    'HOST_DISABLED': (['host'], 'The specified server is disabled.'),
    'HOST_NOT_LIVE': ([], 'This operation cannot be completed as the server is not live.'),
    'HOST_IS_LIVE': (['host'], 'This operation cannot be completed because the server is still live.'),
    'HOST_HAS_RESIDENT_VMS': (['host'], 'This server cannot be forgotten because there are user VMs still running.'),
    'HOST_CANNOT_DESTROY_SELF': (['host'], 'The pool coordinator host cannot be removed.'),
    'DOMAIN_EXISTS': (['vm', 'domid'], 'The operation could not be performed because a domain still exists for the '
                      'specified VM.'),
    'CANNOT_RESET_CONTROL_DOMAIN': (['vm'], 'The power-state of a control domain cannot be reset.'),
    'CANNOT_CONTACT_HOST': (['host'], 'Cannot forward messages because the server cannot be contacted. The server may '
                            'be switched off or there may be network connectivity problems.'),
    'NO_HOSTS_AVAILABLE': ([], 'There were no servers available to complete the specified operation.'),
    'HOST_NOT_ENOUGH_FREE_MEMORY': (['needed', 'available'], 'Not enough server memory is available to perform this '
                                    'operation.'),
    'NOT_SUPPORTED_DURING_UPGRADE': ([], 'This operation is not supported during an upgrade.'),
    'TASK_CANCELLED': (['task'], 'The request was asynchronously canceled.'),
    'TOO_MANY_PENDING_TASKS': ([], 'The request was rejected because there are too many pending tasks on the server.'),
    'OTHER_OPERATION_IN_PROGRESS': (['class', 'object'], 'Another operation involving the object is currently in '
                                    'progress'),
    'VM_BAD_POWER_STATE': (
        ['vm', 'expected', 'actual'], 'You attempted an operation on a VM that was not in an appropriate power state '
        'at the time; for example, you attempted to start a VM that was already running. The parameters returned are '
        "the VM's handle, and the expected and actual VM state at the time of the call."),
    'VM_NO_SUSPEND_SR': (['vm'], 'This VM does not have a suspend SR specified.'),
    'VM_IS_TEMPLATE': (['vm'], 'The operation attempted is not valid for a template VM'),
    'VM_CANNOT_DELETE_DEFAULT_TEMPLATE': (['vm'], 'You cannot delete the specified default template.'),
    'VM_MISSING_PV_DRIVERS': (['vm'], 'You attempted an operation on a VM which requires PV drivers to be installed '
                              'but the drivers were not detected.'),
    'VM_LACKS_FEATURE': (['vm'], 'You attempted an operation on a VM which lacks the feature.'),
    'VM_HAS_PCI_ATTACHED': (['vm'], 'This operation could not be performed, because the VM has one or more PCI '
                            'devices passed through.'),
    'VM_HAS_VGPU': (['vm'], 'This operation could not be performed, because the VM has one or more virtual GPUs.'),
    'VM_REQUIRES_SR': (['vm', 'sr'], "You attempted to run a VM on a host which doesn't have access to an SR needed "
                       'by the VM. The VM has at least one VBD attached to a VDI in the SR.'),
    'VM_SNAPSHOT_WITH_QUIESCE_FAILED': (['vm'], 'The quiesced-snapshot operation failed for an unexpected reason'),
    'VM_SNAPSHOT_WITH_QUIESCE_TIMEOUT': (['vm'], 'The VSS plug-in has timed out'),
    'VM_SNAPSHOT_WITH_QUIESCE_PLUGIN_DEOS_NOT_RESPOND': (['vm'], 'The VSS plug-in cannot be contacted'),
    'VM_SNAPSHOT_WITH_QUIESCE_NOT_SUPPORTED': (['vm', 'error'], 'The VSS plug-in is not installed on this virtual '
                                               'machine'),
    'VM_REVERT_FAILED': (['vm', 'snapshot'], 'An error occured while reverting the specified virtual machine to the '
                         'specified snapshot'),
    'VM_CHECKPOINT_SUSPEND_FAILED': (['vm'], 'An error occured while saving the memory image of the specified virtual '
                                     'machine'),
    'VM_HAS_NO_SUSPEND_VDI': (['vm'], 'VM cannot be resumed because it has no suspend VDI'),
    'VM_TO_IMPORT_IS_NOT_NEWER_VERSION': (
        ['vm', 'existing_version', 'version_to_import'], 'The VM cannot be imported unforced because it is either the '
        'same version or an older version of an existing VM.'),
    'DUPLICATE_VM': (['vm'], 'Cannot restore this VM because it would create a duplicate'),
    'DUPLICATE_MAC_SEED': (['seed'], 'This MAC seed is already in use by a VM in the pool'),
    'VBD_NOT_REMOVABLE_MEDIA': (['vbd'], 'Media could not be ejected because it is not removable'),
    'VBD_IS_EMPTY': (['vbd'], 'Operation could not be performed because the drive is empty'),
    'VBD_CDS_MUST_BE_READONLY': ([], 'Read/write CDs are not supported'),
    'VBD_NOT_UNPLUGGABLE': (['vbd'], 'Drive could not be hot-unplugged because it is not marked as unpluggable'),
    'DISK_VBD_MUST_BE_READWRITE_FOR_HVM': (['vbd'], "All VBDs of type 'disk' must be read/write for HVM guests"),
    'VM_HAS_VUSBS': (['VM'], 'The operation is not allowed when the VM has VUSBs.'),
    'VTPM_MAX_AMOUNT_REACHED': (['amount'], 'The VM cannot be associated with more VTPMs.'),
    'PROVISION_ONLY_ALLOWED_ON_TEMPLATE': ([], 'The provision call can only be invoked on templates, not regular VMs.'),
    'SR_NOT_SHARABLE': (['sr', 'host'], 'The PBD could not be plugged because the SR is in use by another host and is not '
                        'marked as sharable.'),
    'VDI_CBT_ENABLED': (['vdi'], 'The requested operation is not allowed for VDIs with CBT enabled or VMs having such VDIs, '
                        'and CBT is enabled for the specified VDI.'),
    'VDI_NO_CBT_METADATA': (['vdi'], 'The requested operation is not allowed because the specified VDI does not have changed '
                            'block tracking metadata.'),
    'VDI_NEEDS_VM_FOR_MIGRATE': (['vdi'], 'Cannot migrate a VDI which is not attached to a running VM.'),
    'SR_DOES_NOT_SUPPORT_MIGRATION': (['sr'], "Cannot migrate a VDI to or from an SR that doesn't support migration."),
    'DEVICE_ALREADY_EXISTS': (['device'], 'A device with the name given already exists on the selected VM'),
    'DEVICE_ALREADY_ATTACHED': (['device'], 'The device is already attached to a VM'),
    'DEVICE_ALREADY_DETACHED': (['device'], 'The device is not currently attached'),
    'DEVICE_NOT_ATTACHED': (['VBD'], 'The operation could not be performed because the VBD was not connected to the VM.'),
    'DEVICE_DETACH_REJECTED': (['type', 'ref', 'msg'], 'The VM rejected the attempt to detach the device.'),
    'DEVICE_DETACH_TIMEOUT': (['type', 'ref'], 'A timeout happened while attempting to detach a device from a VM.'),
    'INVALID_CIDR_ADDRESS_SPECIFIED': (['parameter'], 'A required parameter contained an invalid CIDR address '
                                       '(<addr>/<prefix length>)'),
    'VBD_NOT_EMPTY': (['vbd'], 'Operation could not be performed because the drive is not empty'),
    'VDI_IS_NOT_ISO': (['vdi', 'type'], 'This operation can only be performed on CD VDIs (iso files or CDROM drives)'),
    'INVALID_DEVICE': (['device'], 'The device name is invalid'),
    'MAC_INVALID': (['MAC'], 'The MAC address specified is not valid.'),
    'SR_BACKEND_FAILURE': (['status', 'stdout', 'stderr'], 'There was an SR backend failure.'),
    'SR_FULL': (['requested', 'maximum'], 'The SR is full. Requested new size exceeds the maximum size'),
    'SR_HAS_NO_PBDS': (['sr'], 'The SR has no attached PBDs'),
    'SR_NOT_ATTACHED': (['sr'], 'The SR is not attached.'),
    'SR_OPERATION_NOT_SUPPORTED': (['sr'], "The SR backend does not support the operation (check the SR's allowed "
                                   'operations)'),
    'VDI_IN_USE': (['vdi', 'operation'], 'This operation cannot be performed because this VDI is in use by some other '
                   'operation'),
    'VDI_MISSING': (['sr', 'vdi'], 'This operation cannot be performed because the specified VDI could not be found '
                    'on the storage substrate'),
    'VDI_NOT_AVAILABLE': (['vdi'], 'This operation cannot be performed because this VDI could not be properly '
                          'attached to the VM.'),
    'VDI_LOCATION_MISSING': (['sr', 'location'], 'This operation cannot be performed because the specified VDI could '
                             'not be found in the specified SR'),
    'VDI_NOT_MANAGED': (['vdi'], 'This operation cannot be performed because the system does not manage this VDI'),
    'VDI_READONLY': (['vdi'], 'The operation required write access but this VDI is read-only'),
    'VDI_TOO_LARGE': (['vdi', 'maximum size'], 'The VDI is too large.'),
    'VDI_TOO_SMALL': (['vdi', 'minimum size'], 'The VDI is too small. Please resize it to at least the minimum size.'),
    'VDI_HAS_RRDS': (['vdi'], 'The operation cannot be performed because this VDI has rrd stats'),
    'VDI_IS_A_PHYSICAL_DEVICE': (['vdi'], 'The operation cannot be performed on physical device'),
    'VDI_INCOMPATIBLE_TYPE': (['vdi', 'type'], 'This operation cannot be performed because the specified VDI is of an '
                              'incompatible type (eg: an HA statefile cannot be attached to a guest)'),
    'VDI_COPY_FAILED': ([], 'The VDI copy action has failed'),
    'VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION': ([], "This operation is not permitted on VDIs in the "
                                                     "'on-boot=reset' mode, or on VMs having such VDIs."),
    'DEFAULT_SR_NOT_FOUND': (['sr'], 'The default SR reference does not point to a valid SR'),
    'IMPORT_INCOMPATIBLE_VERSION': ([], 'The import failed because this export has been created by a different '
                                    '(incompatible) product version'),
    'IMPORT_ERROR': (['msg'], 'The VM could not be imported.'),
    'IMPORT_ERROR_PREMATURE_EOF': ([], 'The VM could not be imported; the end of the file was reached prematurely.'),
    'IMPORT_ERROR_CANNOT_HANDLE_CHUNKED': ([], 'Cannot import VM using chunked encoding.'),
    'IMPORT_ERROR_FAILED_TO_FIND_OBJECT': (['id'], 'The VM could not be imported because a required object could not '
                                           'be found.'),
    'IMPORT_ERROR_ATTACHED_DISKS_NOT_FOUND': ([], 'The VM could not be imported because attached disks could not be '
                                              'found.'),
    'IMPORT_ERROR_UNEXPECTED_FILE': (['filename_expected', 'filename_found'], 'The VM could not be imported because '
                                     'the XVA file is invalid: an unexpected file was encountered.'),
    'IMPORT_ERROR_SOME_CHECKSUMS_FAILED': ([], 'Some data checksums were incorrect; the VM may be corrupt.'),
    'RESTORE_INCOMPATIBLE_VERSION': ([], 'The restore could not be performed because this backup has been created by '
                                     'a different (incompatible) product version'),
}   # type: Dict[str, Tuple[List[str], str]]


def documented(code: str) -> Optional[Tuple[List[str], str]]:
    return DOCUMENTED.get(code)
