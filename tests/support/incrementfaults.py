"""The generated fault suite of increments: every trouble at every place of a backup whose copies rest on others.

What stands there when the troubled run begins is a chain, or two of which the older goes in that run; guests wrote data and
zeros between the nights. Beside the troubles that faultsuite.py knows, the storage fails when a file is read, stores a bit
otherwise than it was given, and somebody removes a copy that the new one is to rest on.
"""

from typing import Iterator, List, Sequence, Tuple

from support.contents import DATA, ZEROS
from support.faultsuite import LEFT_OUT, Base, Case, step_shown
from support.language import MEBIBYTE, described, disk, vm

WEB = [disk(userdevice='0', seed=31, size=7 * MEBIBYTE, used=[[0, 5]]),
       disk(userdevice='1', seed=32, size=2 * MEBIBYTE + 512, used=[[1, 1]])]
DB = [disk(userdevice='0', seed=33, size=5 * MEBIBYTE, used=[[0, 3]]), disk(userdevice='1', seed=34, size=MEBIBYTE, used=1)]
#: Of these uuids the first chain is as long as all others: it does not end early to spread the fulls.
UUIDS = {'web': '11111111-0000-4000-8000-000000000000', 'db': '22222222-0000-4000-8000-000000000000'}
DESCRIPTION = described(
    [vm('web', WEB + [LEFT_OUT], uuid=UUIDS['web'], power_state='Running', vifs=[{'device': '0'}]),
     vm('db', DB, uuid=UUIDS['db'], power_state='Running'),
     vm('bystander', 1, snapshots=[{'name_label': 'web (backup 2016-04-14 00:10:00)'}])],
    {'hosts': [{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'}], 'xapi_version': '21.3.0'})


class IncrementsBase(Base):
    """A full and an increment of each VM, compressed, and the next increment, which rests on both (web) or on the full alone
    (db): there all that the one before holds is written over, so that it goes."""

    title = 'increments-'
    description = DESCRIPTION
    disks = {'web': {one['userdevice']: one for one in WEB}, 'db': {'0': DB[0]}}
    lines = ('incremental=yes', 'compress=gzip')  # type: Sequence[str]
    full_every = 14
    proven = ('.vhd',)          # type: Tuple[str, ...]     # the ends of the names of what is read again before it counts
    nights = (
        {},
        {'web': {'0': {1: DATA, 4: ZEROS}, '1': {0: DATA}}, 'db': {'0': {2: DATA, 0: ZEROS}}},
        {'web': {'0': {1: DATA, 2: ZEROS}, '1': {2: DATA}}, 'db': {'0': {0: DATA, 2: ZEROS, 3: DATA}}},
        {'web': {'0': {6: DATA, 1: ZEROS}}, 'db': {'0': {2: DATA}}})

    def all_cases(self) -> List[Case]:
        return super().all_cases() + list(self.misread()) + list(self.miswritten()) + list(self.removed())

    def misread(self) -> Iterator[Case]:
        """A file of the store can't be opened to be read; or from then on none."""
        openings = self.recorded(reads=True).steps
        for step, line in enumerate(openings, 1):
            for word, stays in (('EIO', False), ('EIO', True), ('ESTALE', False)):
                yield Case('reading-%s at opening %d of %d (%s)%s' % (
                    word, step, len(openings), step_shown(line).split(' ', 1)[1], ' and from then on' if stays else ''),
                    trouble={'step': step, 'do': word, 'stays': stays, 'reads': True}, copies=1 + step % 2)

    def miswritten(self) -> Iterator[Case]:
        """The storage holds other data than were written to a file that is read again before it counts."""
        for name in sorted(self.disks):
            for step, line in enumerate(self.steps_of(name), 1):
                if line.startswith('write') and line.endswith(self.proven):
                    yield Case('storage-flip at step %d of %s (%s)' % (step, name, step_shown(line)),
                               trouble={'step': step, 'do': 'flip', 'below': name}, copies=1 + step % 2)

    def steps_of(self, name: str) -> List[str]:
        """Those in that VM's directory: what is removed for other VMs does not move them."""
        return [line for line in self.recording.steps if (line.split(' ', 1)[1] + '/').startswith(name + '/')]

    def removed(self) -> Iterator[Case]:
        """Somebody removes one of the copies that the new one is to rest on, at any moment until that is made visible."""
        for name in sorted(self.disks):
            steps = self.steps_of(name)
            needed = self.stand.of(name, self.stand.with_holders(set(self.stand.of(name, self.stand.good)[-1:])))
            begun_at = next(step for step, line in enumerate(steps, 1) if '.partial' in line)
            sealed_at = next(step for step, line in enumerate(steps, 1) if line.startswith('rename'))
            for step in range(begun_at, sealed_at):
                yield Case('holder-gone at step %d of %s (%s)' % (step, name, step_shown(steps[step - 1])), trouble={
                    'step': step, 'do': 'vanish', 'below': name, 'what': '/'.join(needed[step % len(needed)])},
                    copies=1 + step // 2 % 2)


class ChainsBase(IncrementsBase):
    """A whole chain and the full of the next one, of which the first increment is made: then the older chain goes. With the full
    that comes behind that, which nobody has read back yet, the chain stays that is then the older one."""

    title = 'chains-'
    lines = ('incremental=yes', 'full_every=2', 'vdi_export_format=vhd')
    full_every = 2
    nights = (IncrementsBase.nights[:2] + ({'web': {'0': {3: ZEROS, 5: DATA}}, 'db': {'0': {3: DATA}}},)
              + IncrementsBase.nights[2:])
