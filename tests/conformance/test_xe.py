"""`xe` commands and HTTP requests as a real server answered them, done again in the simulated pool.

The recordings are of one server but not numbered: ORDER puts them where the state that they show is reached.
"""

import os
import re
import signal
import subprocess
from typing import Any, Iterator, List

import pytest

import recordings
from replay import Replay, demand_no_stale_rows, replayed
from support.language import MEBIBYTE, at, disk, vm
from support.process import CRON_PATH, TIME_LIMIT_S, Run, run, text_of
from support.wire import eventually

# One worker does the whole replay.
pytestmark = pytest.mark.xdist_group('xe')

# The VM that was backed up, a running one; the second snapshot of it was made in recording snapshot-running.
WEB1 = 'c42b97c1-4356-c29d-9f94-edb20e106682'

# What is done, in this order: recordings by their names, and after `*` what the recorded commands took for granted.
ORDER = '''
    * files
    noargs dashhelp version bad-port pwf-missing pwf-short conn-refused-ssl
    vm-snapshot-badvm vm-snapshot-baduuid export-noparam export-badvm export-running
    * nodefault
    snapshot-running
    * ids
    snapshot-list vif-list pbd-list network-list host-list pif-list
    sm-list console-list subject-list task-list message-list vm-disk-list vm-param-list vmlist-params-all
    vm-param-get-ok vm-param-get-badname vm-param-get-baduuid vm-param-get-mapkey
    snapshot-template-param snapshot-list-all
    vmlist vmlist-multi vmlist-minimal vmlist-params vmlist-params-minimal vmlist-none vmlist-none-minimal
    vmlist-badfilter vmlist-badparam vmlist-tagsfilter vmlist-otherconfigfilter
    export-snapshot export-exists export-nodir export-gzip export-zstd export-compress-bad export-compress-false
    export-metadata export-metadata-nosnap export-snapparam
    vdi-export-raw-snap vdi-export-exists vdi-export-vhd-snap vdi-export-badformat vdi-export-baduuid vdi-export-nouuid
    vdi-list sr-list
    pool-dump pool-dump-exists pool-dump-noparam host-backup
    * truncated
    import-nofile import-nosr import-metadata-force import-ok import-truncated
    * disk 7ebfd6b3-9e07-4dff-ad6c-64183eb78822
    vdi-copy
    * disk 39b7ef17-2d7f-40a8-9e36-0533432edf4e
    vdi-import-raw vdi-import-vhd
    vm-uninstall-noforce-noinput
    * snapshot s-c fdc1c8e0-cd33-bf1d-de39-261e4122e193
    vm-uninstall-snap-istemplate template-param-set vm-uninstall-snap-force
    * snapshot s-a 38420c36-12a8-2726-767c-4accc4eacbf8
    snapshot-uninstall-force
    * snapshot s-b 56850297-d5f8-ee4c-3cd3-5f22a8526d07
    snapshot-destroy
    * snapshot s-d b7ac2b24-1b99-355e-3fec-25013106c5e1
    vm-destroy-snap vm-uninstall-gone vm-uninstall-nomatch
    vm-start-running vm-suspend vm-checkpoint
    vm-param-set-bad vm-param-set-ro vm-param-set-tags vm-param-set-oc vm-param-add-tags pool-param-set-defaultsr
    import-metadata-dry
    * refs
    http/*
    * halted
    vm-shutdown-halted
    * stopped
    no-xapi-localhost xapi-dead xapi-dead-remote xapi-dead-remote-nossl dashdashversion
'''

# These were made with a server at another address, or disturbed while they ran: tests of their own below.
ELSEWHERE = ['auth-none', 'pwf-ok', 'export-multiple', 'export-sigint', 'export-sigterm', 'vdi-export-raw-snap-ioerror',
             'vdi-export-vhd-snap-ioerror', 'export-vdimissing', 'vdiexport-vdimissing']


class Session(Replay):
    """The recorded server's day, from its start to its end."""

    def play_day(self) -> 'Session':
        self.pool.start()
        for line in ORDER.strip().splitlines():
            words = line.split()
            if words[0] == '*':
                getattr(self, 'prepare_' + words[1])(*words[2:])
                continue
            for word in words:
                for name in recordings.names('http') if word == 'http/*' else ['xe/' + word]:
                    self.step(name)
        for name in recordings.names('xe') + recordings.names('http'):
            if name not in self.outcomes:
                self.exemptions.not_replayed(name)
        return self

    def prepare_files(self) -> None:
        for name, text in (('pwf1', 'root\npassword\n'), ('pwf2', 'root\n')):
            with open(os.path.join(self.work_dir, 'mnt', name), 'w') as file:
                file.write(text)

    def prepare_snapshot(self, name: str, recorded_uuid: str) -> None:
        made = self.pool.xe('vm-snapshot', 'uuid=' + self.names.translate(WEB1), 'new-name-label=' + name)
        assert self.names.same(recorded_uuid, made.stdout.strip()), made

    def prepare_nodefault(self) -> None:
        """The recorded pool had no default SR."""
        session = self.pool.session()
        pool = session.xenapi.pool.get_all()[0]
        session.xenapi.pool.set_default_SR(pool, 'OpaqueRef:NULL')
        session.xenapi.pool.set_suspend_image_SR(pool, 'OpaqueRef:NULL')
        session.xenapi.pool.set_crash_dump_SR(pool, 'OpaqueRef:NULL')

    def prepare_ids(self) -> None:
        """Who is who, where lists alone would not tell."""
        api = self.pool.session().xenapi
        found = {'66666666-7777-4888-9999-aaaaaaaaaaaa': [record['uuid'] for record in api.VM.get_all_records().values()
                                                          if record['is_control_domain']],
                 '876eb439-74eb-1b23-f37f-23e70f10701b': [api.pool.get_uuid(ref) for ref in api.pool.get_all()]}
        for recorded, name, disk_of in (('8f84f7b4-50a9-0500-63e1-af9ca85527f7', 'snap1', '96abd448-f9d9-4800-9e46-8fab50858951'),
                                        ('4ff3508b-1694-fe69-1ddc-2d1ca1b47456', 'run-snap', 'ca8a685f-607e-4566-bb22-b83873de9a73'),
                                        (WEB1, 'web1', '0b627f5e-f472-4d95-b97e-f30035e679e1')):
            ref = api.VM.get_by_name_label(name)[0]
            found[recorded] = [api.VM.get_uuid(ref)]
            found[disk_of] = [api.VDI.get_uuid(api.VBD.get_VDI(vbd)) for vbd in api.VM.get_VBDs(ref)]
        for recorded, uuids in found.items():
            assert len(uuids) == 1 and self.names.same(recorded, uuids[0]), (recorded, uuids)

    def prepare_truncated(self) -> None:
        with open(os.path.join(self.work_dir, 'backups', 'web1-snap.xva'), 'rb') as whole:
            with open(os.path.join(self.work_dir, 'mnt', 'trunc.xva'), 'wb') as file:
                file.write(whole.read(2 * MEBIBYTE))

    def prepare_disk(self, recorded_uuid: str) -> None:
        """A new disk of the size of web1's."""
        api = self.pool.session().xenapi
        ref = api.VDI.create({'SR': api.SR.get_by_name_label('Local storage')[0], 'virtual_size': '20971520',
                              'type': 'user', 'sharable': False, 'read_only': False, 'other_config': {},
                              'name_label': 'restored', 'name_description': ''})
        assert self.names.same(recorded_uuid, api.VDI.get_uuid(ref))

    def prepare_refs(self) -> None:
        """The HTTP recordings name objects by refs, sessions and tasks, which no `xe` output shows."""
        session = self.pool.session()
        task = session.xenapi.task.create
        web1 = session.xenapi.VM.get_by_uuid(self.names.translate(WEB1))
        # By its uuid: an import has made another VM of that name.
        run_snap = session.xenapi.VM.get_by_uuid(self.names.translate('4ff3508b-1694-fe69-1ddc-2d1ca1b47456'))
        disk = [session.xenapi.VBD.get_VDI(vbd) for vbd in session.xenapi.VM.get_VBDs(run_snap)][0]
        for recorded, simulated in (
                ('50206e70-411f-1e3b-b1cf-50c3a243ba41', session.handle),
                ('970791bb-f91b-b5e1-b0bf-1b8c33c16808', task('export', 'of run-snap')),
                ('a766ddf6-cb02-0357-2536-2f529fc61345', task('export', 'of web1')),
                ('21c604ba-e25b-1e0c-aa70-4b49a07c20e8', run_snap),
                ('82d15728-9999-3dec-1ddb-0d30caa61767', web1),
                ('9f6d2db7-1ba4-668f-8816-cae0a93dfb03', disk)):
            assert self.names.same('OpaqueRef:' + recorded, simulated), recorded

    def prepare_halted(self) -> None:
        session = self.pool.session()
        session.xenapi.VM.hard_shutdown(session.xenapi.VM.get_by_uuid(self.names.translate(WEB1)))

    def prepare_stopped(self) -> None:
        self.pool.stop()


@pytest.fixture(scope='module')
def day(tmp_path_factory: Any) -> Iterator[Session]:
    session = Session('xe', 'pool-xe.json', str(tmp_path_factory.mktemp('xe')))
    session.exemptions.add('http')
    try:
        yield session.play_day()
    finally:
        session.remove()


@pytest.mark.needs_zstd
@pytest.mark.parametrize('name', [name for name in replayed('xe') + replayed('http')
                                  if name.partition('/')[2] not in ELSEWHERE])
def test_the_simulated_pool_answers_as_recorded(day: Session, name: str) -> None:
    assert name in day.outcomes, 'the recording is in neither ORDER nor differences.txt'
    day.demand(name)


@pytest.mark.needs_zstd
def test_every_listed_difference_is_still_there(day: Session) -> None:
    demand_no_stale_rows(day)


# --- Recordings that were made elsewhere, or disturbed --------------------------------------------------------------

def recorded_run(name: str) -> Run:
    recording = recordings.read('xe/' + name)
    return Run(recording.exit_status, recording.stdout, recording.stderr)


@pytest.mark.parametrize('name', ['auth-none', 'pwf-ok'])
def test_another_host_wants_a_password(a_pool: Any, tmp_path: Any, name: str) -> None:
    # 127.0.0.1 means the unix socket to xe, so the master is the second host here.
    pool = a_pool(vm('web1'), hosts=[{'name_label': 'other'}, {'name_label': 'vm', 'master': True}])
    (tmp_path / 'pwf1').write_text('root\npassword\n')
    words = [word.replace('192.168.77.10', '127.0.0.2').replace('/mnt', str(tmp_path))
             for word in recordings.read('xe/' + name).words[1:]]
    result = run([os.path.join(pool.dir, 'bin', 'xe')] + words, pool.environment(1))
    expected = recorded_run(name)
    assert (result.exit_status, result.stderr) == (expected.exit_status, expected.stderr)
    assert result.stdout.count(',') == expected.stdout.count(','), 'three VMs (here two control domains), or nothing'


def test_a_second_file_is_refused_as_recorded(a_pool: Any, tmp_path: Any) -> None:
    # Recorded was one running VM and one that could be exported; which comes first is the server's secret.
    pool = a_pool(vm('one'), vm('two'))
    result = pool.xe('vm-export', 'filename=%s' % (tmp_path / 'all.xva'), '--multiple')
    expected = recorded_run('export-multiple')
    assert result.exit_status == expected.exit_status
    assert result.stderr == expected.stderr.replace('/backups', str(tmp_path))
    assert os.listdir(str(tmp_path)) == ['all.xva']


@pytest.mark.parametrize('name, number, status', [('export-sigint', signal.SIGINT, 1),
                                                  ('export-sigterm', signal.SIGTERM, -signal.SIGTERM)])
def test_an_export_that_gets_a_signal(a_pool: Any, tmp_path: Any, name: str, number: int, status: int) -> None:
    pool = a_pool(vm('web', disks=[disk(size=64 * MEBIBYTE, used=64)]), faults=[at('http:/export', runs_at=4 * MEBIBYTE)])
    path = tmp_path / 'web.xva'
    export = subprocess.Popen([os.path.join(pool.dir, 'bin', 'xe'), 'vm-export', 'vm=web', 'filename=%s' % path],
                              env={'PATH': CRON_PATH}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert eventually(lambda: path.exists() and path.stat().st_size > MEBIBYTE)
    export.send_signal(number)
    stdout, stderr = export.communicate(timeout=TIME_LIMIT_S)
    # The shell that the recording was made in says 128 + N.
    assert recorded_run(name) == Run(status if status > 0 else 128 + number, text_of(stdout), text_of(stderr))
    assert export.returncode == status and path.stat().st_size > MEBIBYTE, 'the partial file stays'


@pytest.mark.parametrize('name, occasion, failure', [
    ('vdi-export-raw-snap-ioerror', 'http:/export_raw_vdi', ['VDI_IO_ERROR', 'Device I/O errors']),
    ('vdi-export-vhd-snap-ioerror', 'http:/export_raw_vdi', ['VDI_IO_ERROR', 'Device I/O errors']),
    ('export-vdimissing', 'http:/export', ['VDI_MISSING']),
    ('vdiexport-vdimissing', 'http:/export_raw_vdi', ['VDI_MISSING'])])
def test_a_store_that_fails(a_pool: Any, tmp_path: Any, name: str, occasion: str, failure: List[str]) -> None:
    pool = a_pool(vm('big1', disks=[disk(name_label='big1-disk')]), srs=[
        {'name_label': 'Local storage', 'type': 'ext', 'shared': True, 'size': 1 << 40}])
    session = pool.session()
    disks = session.xenapi.VDI.get_by_name_label('big1-disk')
    if failure == ['VDI_MISSING']:
        failure = failure + [session.xenapi.VDI.get_SR(disks[0]), disks[0]]
    pool.stop()
    pool.set_faults([at(occasion, fails=failure)])
    pool.start()
    session = pool.session()
    uuid = (session.xenapi.VM.get_by_name_label('big1') if occasion == 'http:/export' else disks)[0]
    uuid = (session.xenapi.VM if occasion == 'http:/export' else session.xenapi.VDI).get_uuid(uuid)
    recording = recordings.read('xe/' + name)
    words = ['uuid=' + uuid if word.startswith('uuid=') else word.replace('/backups', str(tmp_path))
             for word in recording.words[1:]]
    result = pool.xe(*words)
    expected = recorded_run(name)
    assert (result.exit_status, result.stdout) == (expected.exit_status, expected.stdout)
    uuids = re.compile('[0-9a-f-]{36}')
    assert uuids.sub('UUID', result.stderr) == uuids.sub('UUID', expected.stderr)
