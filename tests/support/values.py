"""The program's own values for unit tests: a VM, a pool, a copy, a config, with only what a test is about to be named."""

from datetime import datetime, timedelta, timezone
from typing import Any, Dict, List, Optional, Sequence

import VmBackup

GIBIBYTE = 1 << 30
NIGHT = datetime(2016, 4, 14, 0, 10, 0)                      # local, as directory names have it
POOL_UUID = '11111111-0000-0000-0000-000000000000'


def uuid_of(number: int) -> str:
    """A uuid whose first eight digits are the number."""
    return '%08x-0000-4000-8000-000000000000' % number


US_UUID = uuid_of(1)                                         # whose copies a_copy() gives


def a_disk(userdevice: str = '0', **facts: Any) -> VmBackup.Disk:
    values = dict(vbd_uuid=uuid_of(0xb0), userdevice=userdevice, device=VmBackup.device_name(userdevice), bootable=True,
                  mode='RW', type='Disk', unpluggable=True, vdi_ref='OpaqueRef:vdi', vdi_uuid=uuid_of(0xd0),
                  name='root', description='', virtual_size=8 * GIBIBYTE, vdi_type='user', sharable=False,
                  read_only=False, sr_ref='OpaqueRef:sr', sr_uuid=uuid_of(0x50), snapshot_of='')
    return VmBackup.Disk(**dict(values, **facts))


def a_vm(name: str, number: int = 1, **facts: Any) -> VmBackup.VirtualMachine:
    values = dict(ref='OpaqueRef:%d' % number, uuid=uuid_of(number), name=name, description='', power_state='Running',
                  tags=(), memory_dynamic_max='1073741824', vcpus_max='1', vcpus_at_startup='1',
                  guest_metrics_ref='OpaqueRef:NULL', disks=(a_disk(),))
    return VmBackup.VirtualMachine(**dict(values, **facts))


def a_host(name: str = 'xcp1', **facts: Any) -> VmBackup.Host:
    values = dict(ref='OpaqueRef:' + name, uuid=uuid_of(0xa0), short_name=name, address='192.0.2.1',
                  product_version=(8, 3, 0), api_version=(2, 21))
    return VmBackup.Host(**dict(values, **facts))


def an_inventory(*machines: VmBackup.VirtualMachine, **facts: Any) -> VmBackup.Inventory:
    host = facts.pop('host', a_host())
    values = dict(pool_uuid=POOL_UUID, pool_name='production', host=host, master=host, machines=tuple(machines))
    return VmBackup.Inventory(**dict(values, **facts))


def vms(*names: str) -> List[VmBackup.VirtualMachine]:
    """A VM of each name, numbered from 1."""
    return [a_vm(name, number) for number, name in enumerate(names, 1)]


def a_copy(night: int, **facts: Any) -> VmBackup.Copy:
    """A good copy of VM 1, made so many nights after the first, with that sequence number."""
    is_old = facts.get('is_old', False)
    taken_at = facts.pop('taken_at', NIGHT + timedelta(days=night))
    name = taken_at.strftime('backup-%Y-%m-%d-(%H:%M:%S)') if is_old else VmBackup.copy_name(taken_at)
    values = dict(folder='web', name=name, taken_at=taken_at, is_old=is_old, method=VmBackup.Method.VM,
                  uuid=uuid_of(1), vm_name='web', sequence=0 if is_old else night,
                  written_at=None if is_old else taken_at.replace(tzinfo=timezone.utc), rules=None, image='web.xva',
                  size_bytes=GIBIBYTE, problem='')
    return VmBackup.Copy(**dict(values, **facts))


def settings(*lines: str) -> List[VmBackup.Setting]:
    """What the command line gives for these NAME=VALUE words."""
    return [VmBackup.Setting(*(line.split('=', 1) + ['command line'])) for line in lines]


def configured(text: str, *words: str) -> VmBackup.Configuration:
    """The configuration of that config file and those NAME=VALUE words."""
    found, problems = VmBackup.read_settings(text.encode('utf-8', 'surrogateescape'), 'weekend.cfg')
    return VmBackup.parse_configuration(found, settings(*words), 'weekend.cfg', problems)


def problems_of(text: str, *words: str) -> Sequence[str]:
    """The problems of that config, none if it is good."""
    try:
        configured(text, *words)
    except VmBackup.ConfigurationError as error:
        return error.problems
    return ()


def planned(text: str, *machines: VmBackup.VirtualMachine, **facts: Any) -> VmBackup.Plan:
    """The plan of that config for a pool with these VMs."""
    return VmBackup.make_plan(configured(text), an_inventory(*machines, **facts))


def jobs_of(plan: VmBackup.Plan) -> Dict[str, Any]:
    """What the plan does: kind and copies to keep by the VM's name."""
    return {job.machine.name: (job.method.value, job.rules.newest) for job in plan.jobs}


def a_round_plan(*jobs: VmBackup.RoundJob, **facts: Any) -> VmBackup.RoundPlan:
    """The plan of a round with these VMs, led by xcp1."""
    values = dict(id='20261126T001000Z-xcp1-7-aaaaaa', version=VmBackup.VERSION, began_at='2026-11-26T00:10:00Z', host='xcp1',
                  host_uuid=uuid_of(0xa0), pool=POOL_UUID, pool_name='production', source='weekend.cfg', path='/weekend.cfg',
                  decisions='d', hosts='first', at_once=8, until='', dumps=False, clock_went_back=False, missing=(), jobs=jobs)
    return VmBackup.RoundPlan(**dict(values, **facts))


def an_outcome(job: VmBackup.Job, error: Optional[str] = None, **facts: Any) -> VmBackup.Outcome:
    values = dict(error=error, status_word='SUCCESS' if error is None else 'VM-EXPORT-FAIL', size_bytes=GIBIBYTE if error is None else 0,
                  seconds=60.0, kept=1)
    return VmBackup.untried(job)._replace(**dict(values, **facts))


def a_report(plan: VmBackup.Plan, *outcomes: VmBackup.Outcome, **facts: Any) -> VmBackup.Report:
    """What a run of the plan has to tell that lasted an hour and gave these outcomes; it did not come to the other jobs."""
    began_at = NIGHT.replace(tzinfo=timezone.utc)
    tried = {outcome.uuid for outcome in outcomes}
    untried = tuple(VmBackup.untried(job) for job in plan.jobs if job.machine.uuid not in tried)
    values = dict(outcomes=outcomes + untried, missing=tuple(text for _, text in plan.missing), findings=plan.findings)
    return VmBackup.Report(VmBackup.BACKUP_WORDING, 'weekend.cfg', 'xcp1', began_at, began_at + timedelta(hours=1), 'production',
                           **dict(values, **facts))


def services(text: str = '', log: Any = None, **doors: Any) -> VmBackup.Services:
    """What a deed is handed under that config: the clock and the log of the program, and these doors."""
    log = log or VmBackup.Log(VmBackup.Clock())
    return VmBackup.Services(configured(text), VmBackup.Clock(), log, VmBackup.Signals(log), **doors)


def verified(catalog: VmBackup.Catalog, copy: VmBackup.Copy) -> VmBackup.CopyVerdict:
    """The verdict on that copy of the store."""
    return VmBackup.verify_copy(services(catalog=catalog), copy, {})
