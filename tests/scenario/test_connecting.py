"""All the ways to the pool: this host's socket and TCP port, members, other pools, certificates, and sessions that get lost."""

import hashlib
import os
import re
import ssl
from typing import Any

import pytest

from support.deeds import backup, beginning, objects, preview
from support.language import MEBIBYTE, at, disk, slowly, vm
from support.process import PASSWORD, TESTS, Pool
from support.shelf import Shelf
from support.wire import eventually

TWO_HOSTS = [{'name_label': 'xcp1', 'master': True}, {'name_label': 'xcp2'}]


def certificate(pool: Pool) -> str:
    """The PEM text of the certificate that the pool shows."""
    host, port = pool.tls_address_of().split(':')
    return ssl.get_server_certificate((host, int(port)))


def fingerprint(pool: Pool) -> str:
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate(pool))).hexdigest().upper()
    return ':'.join(re.findall('..', digest))


def is_backed_up(shelf: Shelf, pool: Pool) -> bool:
    return shelf.has('web', complete=1) and pool.has_no_snapshots_of_ours() and pool.dump()['session'] == {}


# --- This host -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('host', [1, 2], ids=['the master', 'a member'])
def test_a_dash_logs_in_over_this_hosts_own_socket(a_pool: Any, a_shelf: Any, host: int) -> None:
    pool, shelf = a_pool(vm('web'), hosts=TWO_HOSTS), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', host=host)
    assert run.exit_status == 0 and is_backed_up(shelf, pool)
    assert shelf.manifest('web', shelf.newest('web'))['host'] == 'xcp%d' % host


@pytest.mark.parametrize('host', [1, 2], ids=['the master', 'a member that names the master'])
def test_a_password_logs_in_over_tcp_where_the_server_checks_it(a_pool: Any, a_shelf: Any, host: int) -> None:
    pool, shelf = a_pool(vm('web'), hosts=TWO_HOSTS), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', password=PASSWORD, host=host)
    assert run.exit_status == 0 and is_backed_up(shelf, pool), run


@pytest.mark.parametrize('where', ['this host', 'a member', 'https', 'http'])
def test_a_wrong_password_is_exit_4_and_touches_no_vm(a_pool: Any, a_shelf: Any, where: str) -> None:
    pool, shelf = a_pool(vm('web'), hosts=TWO_HOSTS), a_shelf()
    lines = {'https': ['pool=' + pool.tls_address_of()], 'http': ['pool=' + pool.url]}.get(where, [])
    run = backup(pool, shelf, 'vm-export=web', *lines, password='a wrong one', host=2 if where == 'a member' else 1)
    assert run.exit_status == 4 and 'password is wrong' in run.stderr and run.never_says('a wrong one')
    assert shelf.is_unchanged() and pool.never_saw('api:VM.*') and pool.never_saw('xe:*')


# --- A pool that is not there ----------------------------------------------------------------------------------------

def test_a_pool_that_is_down_is_exit_4(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    pool.stop()
    run = backup(pool, shelf, 'vm-export=web')
    assert run.exit_status == 4 and 'error: ' in run.stderr and run.never_says('Traceback')
    assert shelf.is_unchanged()


def test_an_address_where_nobody_listens_is_exit_4_and_named(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', 'pool=127.0.0.99:9', password=PASSWORD)
    assert run.exit_status == 4 and 'Connection refused' in run.stderr
    assert shelf.is_unchanged()


def test_a_host_name_that_does_not_exist_is_exit_4(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    run = backup(pool, shelf, 'vm-export=web', 'pool=no-such-host.invalid', password=PASSWORD)
    assert run.exit_status == 4 and run.never_says('Traceback')
    assert shelf.is_unchanged()


# --- Another pool ----------------------------------------------------------------------------------------------------

def elsewhere(pool: Pool) -> Any:
    """The environment of a machine that is no host of the pool, but has `xe`."""
    return {'PATH': pool.environment()['PATH']}


@pytest.mark.parametrize('scheme, host', [('https by default', 1), ('https', 2), ('http', 1), ('http', 2)])
def test_another_pool_is_backed_up_over_the_network(a_pool: Any, a_shelf: Any, scheme: str, host: int) -> None:
    pool, shelf = a_pool(vm('web'), vm('db'), hosts=TWO_HOSTS), a_shelf()
    address = {'https by default': pool.tls_address_of(host), 'https': 'https://' + pool.tls_address_of(host),
               'http': pool.url_of(host)}[scheme]
    run = backup(pool, shelf, 'vm-export=web', 'vdi-export=db', 'pool_db_backup=1', 'pool=' + address, password=PASSWORD,
                 environment=elsewhere(pool))
    assert run.exit_status == 0, run
    assert is_backed_up(shelf, pool) and shelf.has('db', vdi_exports=1)
    assert [name for name in shelf.names() if name.startswith('METADATA')] == ['METADATA_xcp1']


def test_the_servers_certificate_is_checked_against_ca_file(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    good, other = os.path.join(shelf.home, 'good.pem'), os.path.join(shelf.home, 'missing.pem')
    with open(good, 'w') as file:
        file.write(certificate(pool))
    lines = ['vm-export=web', 'pool=' + pool.tls_address_of()]

    missing = backup(pool, shelf, *(lines + ['ca_file=' + other]), password=PASSWORD)
    assert missing.exit_status == 2 and other in missing.stderr and shelf.is_unchanged()

    run = preview(pool, shelf, *(lines + ['ca_file=' + good]), password=PASSWORD)
    assert run.exit_status == 0 and pool.calls('api:VM.get_all_records'), run


def test_a_certificate_that_ca_file_does_not_vouch_for_is_refused_before_the_password_is_sent(a_pool: Any,
                                                                                             a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    other = os.path.join(TESTS, 'support', 'other-ca.pem')
    run = backup(pool, shelf, 'vm-export=web', 'pool=' + pool.tls_address_of(), 'ca_file=' + other, password=PASSWORD)
    assert run.exit_status == 4 and 'TLS' in run.stderr, run
    assert pool.never_saw('api:*') and shelf.is_unchanged()


def test_only_the_certificate_with_the_given_fingerprint_is_accepted(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    lines = ['vm-export=web', 'pool=' + pool.tls_address_of()]

    wrong = backup(pool, shelf, *(lines + ['ca_fingerprint=' + 'ab' * 32]), password=PASSWORD)
    assert wrong.exit_status == 4 and 'fingerprint' in wrong.stderr
    assert pool.never_saw('api:*') and shelf.is_unchanged()

    right = backup(pool, shelf, *(lines + ['ca_fingerprint=' + fingerprint(pool)]), password=PASSWORD)
    assert right.exit_status == 0 and is_backed_up(shelf, pool), right


# --- Sessions and masters that get lost ------------------------------------------------------------------------------

@pytest.mark.parametrize('moment, password', [
    ('api:VM.snapshot', '-'), ('http:/export', PASSWORD), ('api:VDI.destroy', PASSWORD), ('api:VM.destroy', '-'),
    ('api:session.get_this_host', '-'), ('api:VM.get_all_records', PASSWORD)])
def test_a_session_that_is_lost_on_the_way_is_opened_again(a_pool: Any, a_shelf: Any, moment: str, password: str) -> None:
    pool, shelf = a_pool(vm('web'), vm('db'), faults=[at(moment, nth=1, logout=True)]), a_shelf()
    before = objects(pool)
    run = backup(pool, shelf, 'vm-export=web', 'vm-export=db', password=password)
    assert run.exit_status in (0, 3), run
    assert shelf.has('web', complete=1) and shelf.has('db', complete=1)
    assert objects(pool) == before


@pytest.mark.parametrize('moment', ['api:VM.get_all_records', 'api:VBD.get_all_records', 'api:VIF.get_all_records_where'])
def test_an_answer_that_is_lost_costs_no_session(a_pool: Any, a_shelf: Any, moment: str) -> None:
    pool, shelf = a_pool(vm('web'), faults=[at(moment, nth=1, drops=True)]), a_shelf()
    run = backup(pool, shelf, 'vm-export=web')
    assert run.exit_status == 0 and is_backed_up(shelf, pool), run


@pytest.mark.parametrize('moment', ['api:VM.get_all_records', 'api:VM.snapshot', 'http:/export', 'api:VDI.destroy'])
def test_a_master_that_moves_during_the_run_is_followed(a_pool: Any, a_shelf: Any, moment: str) -> None:
    pool = a_pool(vm('web'), vm('db'), hosts=TWO_HOSTS, faults=[at(moment, nth=1, master='xcp2')])
    shelf = a_shelf()
    run = backup(pool, shelf, 'vm-export=*', password=PASSWORD)
    assert run.exit_status in (0, 3), run
    assert shelf.has('web', complete=1) and shelf.has('db', complete=1)
    assert pool.has_no_snapshots_of_ours()


def test_a_pool_that_restarts_in_the_middle_is_waited_for(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('db'), vm('web', disks=[disk(size=8 * MEBIBYTE, used=8)]),
                  faults=[slowly(object='web')])
    shelf, port = a_shelf(), pool.port
    with beginning(pool, shelf, 'vm-export=*') as process:
        assert eventually(lambda: [name for name in shelf.tree() if name.startswith('web/') and name.endswith('.partial/web.xva')])
        pool.stop()
        pool.set_faults([])
        pool.start(port)
        run = process.ending()
    assert run.exit_status == 3, 'the VM that was cut off had its second try\n%s' % run.output
    assert shelf.has('web', complete=1) and shelf.has('db', complete=1)
    assert pool.has_no_snapshots_of_ours() and shelf.unfinished() == []
