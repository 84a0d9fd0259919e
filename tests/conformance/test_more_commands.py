"""Commands of which a real server's transcripts were kept in one file, each done again in the simulated pool."""

import os
import re
import shlex
from typing import Any, Dict, Iterator, List, NamedTuple

import pytest

import recordings
from comparison import NO_UUID, UUID
from support.language import disk, vm
from support.process import Pool, Run

# The state that one command leaves is the next one's.
pytestmark = pytest.mark.xdist_group('xe-more')

#: What `<uuid>` stood for, in the order in which it stands in the command. Where the answer says that it is invalid: nothing.
STOOD_FOR = {
    'vdi-create': ['SR'], 'vbd-unplug': ['nothing'], 'vif-create': ['VM', 'network'], 'vm-reset-powerstate': ['VM'],
    'snapshot-destroy': ['VM'], 'vm-memory-limits-set': ['VM'], 'sr-update': ['SR']}
NOTHING = '12345678-1234-4234-8234-123456789abc'


class Transcript(NamedTuple):
    """One command, `<uuid>` in the place of uuids, and what it said."""
    words: List[str]
    result: Run


def transcripts() -> List[Transcript]:
    with open(os.path.join(recordings.RECORDED, 'xe-more.txt'), encoding='utf-8') as file:
        pieces = re.split(r'^\$ ', file.read(), flags=re.MULTILINE)[1:]
    found = []
    for piece in pieces:
        match = re.match(r'xe (.*)\n--- rc=(\d+)\n--- stdout\n(.*?)--- stderr\n(.*?)\n?\Z', piece, re.DOTALL)
        assert match, piece
        command, status, stdout, stderr = match.groups()
        found.append(Transcript(shlex.split(command), Run(int(status), stdout, stderr)))
    return found


RECORDED = transcripts()


class Server:
    """The pool that the recorded commands find, and what their uuids stand for in it."""

    def __init__(self) -> None:
        self.pool = Pool({'srs': [{'name_label': 'Local storage', 'type': 'ext', 'host': 'vm', 'size': 1 << 40}],
                          'hosts': [{'name_label': 'vm', 'master': True}],
                          'networks': [{'name_label': 'eth0 network', 'bridge': 'xenbr0'}],
                          'vms': [vm('DEV-RH1', disks=[disk(name_label='DEV-RH1 disk 0')],
                                     vifs=[{'device': '0', 'network': 'eth0 network'}])]})
        self.pool.start()
        api = self.pool.session().xenapi
        self.uuids = {'VM': api.VM.get_uuid(api.VM.get_by_name_label('DEV-RH1')[0]), 'nothing': NOTHING,
                      'SR': api.SR.get_uuid(api.SR.get_by_name_label('Local storage')[0]),
                      'network': api.network.get_uuid(api.network.get_by_name_label('eth0 network')[0])}
        self.results: Dict[int, Run] = {}

    def result_of(self, number: int) -> Run:
        """What the command of that number says, all before it having been done."""
        for index in range(len(self.results), number + 1):
            words = RECORDED[index].words
            uuids = iter(STOOD_FOR.get(words[0], []))
            self.results[index] = self.pool.xe(*[re.sub('<uuid>', lambda _: self.uuids[next(uuids)], word)
                                                 for word in words])
        return self.results[number]


@pytest.fixture(scope='module')
def server() -> Iterator[Server]:
    served = Server()
    try:
        yield served
    finally:
        served.pool.remove()


def masked(text: str) -> str:
    return re.sub(UUID, lambda match: match.group() if match.group() == NO_UUID else '<uuid>', text)


@pytest.mark.parametrize('number', range(len(RECORDED)),
                         ids=['-'.join([str(number)] + one.words[:2]) for number, one in enumerate(RECORDED)])
def test_a_command_answers_as_recorded(server: Any, number: int) -> None:
    result = server.result_of(number)
    assert result._replace(stdout=masked(result.stdout), stderr=masked(result.stderr)) == RECORDED[number].result


def test_an_unknown_host_is_looked_up_by_xe_only_without_tls(server: Any) -> None:
    # newcli.ml with_open_tcp: with TLS the look-up is stunnel's, which says nothing.
    elsewhere = ['-s', 'no-such-host.invalid', '-u', 'root', '-pw', 'password']
    assert server.pool.xe('vm-list', *elsewhere) == Run(
        1, '', 'Unable to contact server. Please check server and port settings.\n')
    assert server.pool.xe('vm-list', '--nossl', *elsewhere) == Run(
        1, '', "No addrinfo found for host: no-such-host.invalid, port: 80Host 'no-such-host.invalid' not found.\n")


def test_all_fields_of_the_pool_are_shown_in_their_order(server: Any) -> None:
    # records.ml@v24.19.2 pool_record: the last ten.
    shown = [line.split(' (')[0].strip() for line in server.pool.xe('pool-list', 'params=all').stdout.splitlines() if line]
    assert shown[-11:] == [
        'repository-proxy-username', 'https-only', 'migration-compression', 'coordinator-bias', 'telemetry-frequency',
        'telemetry-next-collection', 'last-update-sync', 'update-sync-frequency', 'update-sync-day', 'update-sync-enabled',
        'recommendations']


@pytest.mark.parametrize('command', ['vm-uninstall vm=DEV-RH1', 'host-forget uuid=HOST'])
def test_what_can_not_be_undone_is_asked_for(server: Any, command: str) -> None:
    # cli_util.ml user_says_yes; `force` asks nothing, anything but yes ends it with 0.
    api = server.pool.session().xenapi
    words = command.replace('HOST', api.host.get_uuid(api.host.get_all()[0])).split()
    result = server.pool.xe(*words, stdin=b'no\n')
    assert result.exit_status == 0 and result.stderr == ''
    assert result.stdout.endswith("Type 'yes' to continue\nAborted (you typed: 'no')\n")
    assert len(api.host.get_all()) == 1 and len(api.VM.get_by_name_label('DEV-RH1')) == 1
