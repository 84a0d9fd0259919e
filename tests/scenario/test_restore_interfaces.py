"""What an interface was set to comes back with it: as the server's own import keeps it, and told where it can't."""

from typing import Any, Dict

import pytest

from support.deeds import backup
from support.language import MEBIBYTE, at, disk, vm
from support.recovery import destroy, machine, objects, restore, serving

ROOT = disk(size=4 * MEBIBYTE, used=[[0, 1]], seed=1)
SETTINGS = {'locking_mode': 'locked', 'ipv4_allowed': ['10.0.0.5', '10.0.0.6'], 'ipv6_allowed': ['fe80::5'],
            'qos_algorithm_type': 'ratelimit', 'qos_algorithm_params': {'kbps': '3000'},
            'other_config': {'ethtool-gso': 'off', 'owner of': 'Zo\u00eb'}}
FIXED = {'ipv4_configuration_mode': 'Static', 'ipv4_addresses': ['10.0.0.5/24'], 'ipv4_gateway': '10.0.0.1',
         'ipv6_configuration_mode': 'Static', 'ipv6_addresses': ['fd00::5/64']}
KEPT = tuple(SETTINGS) + ('device', 'MTU', 'network')
LICENCE = ['LICENCE_RESTRICTION', 'VIF_locking']


def a_vm(*settings: Dict[str, Any]) -> Any:
    return vm('web', disks=[ROOT], power_state='Running', vifs=[
        {'device': str(number), 'MAC': 'aa:bb:cc:00:11:%02d' % number, 'MTU': 1400 + number, 'settings': one}
        for number, one in enumerate(settings)])


def interfaces(pool: Any, name: str) -> Dict[str, Dict[str, Any]]:
    """The records of that VM's interfaces, by their device."""
    vifs = pool.dump()['VIF']
    return {vifs[ref]['device']: vifs[ref] for ref in machine(pool, name)['VIFs']}


@pytest.mark.parametrize('kind', ['vm-export', 'vdi-export'])
@pytest.mark.parametrize('words', [(), ('preserve=yes',)], ids=['new', 'preserved'])
def test_every_setting_of_an_interface_comes_back(a_pool: Any, a_shelf: Any, kind: str, words: Any) -> None:
    pool, shelf = a_pool(a_vm(SETTINGS, {}, {'locking_mode': 'disabled'}, {'locking_mode': 'unlocked'})), a_shelf()
    assert backup(pool, shelf, kind + '=*').exit_status == 0
    before = interfaces(pool, 'web')
    destroy(pool, 'web')
    run = restore(pool, shelf, 'web', *words)
    assert run.exit_status == 0, run
    after = interfaces(pool, 'web')
    for device in '0123':
        assert {field: after[device][field] for field in KEPT} == {field: before[device][field] for field in KEPT}, device
        assert (after[device]['MAC'] == before[device]['MAC']) == bool(words), device


def test_xes_own_import_keeps_the_same(a_pool: Any, tmp_path: Any) -> None:
    pool = a_pool(dict(a_vm(dict(SETTINGS, **FIXED)), power_state='Halted'))
    before = interfaces(pool, 'web')['0']
    assert pool.xe('vm-export', 'vm=web', 'filename=%s' % (tmp_path / 'web.xva')).exit_status == 0
    destroy(pool, 'web')
    assert pool.xe('vm-import', 'filename=%s' % (tmp_path / 'web.xva')).exit_status == 0
    after = interfaces(pool, 'web')['0']
    assert {field: after[field] for field in KEPT} == {field: before[field] for field in KEPT}
    assert [after['ipv4_configuration_mode'], after['ipv4_addresses'], after['ipv4_gateway']] == ['None', [], '']


def test_a_fixed_address_is_told_as_no_import_keeps_it(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(a_vm({}, FIXED)), a_shelf()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    run = restore(pool, shelf, 'web', 'to=back')
    assert run.exit_status == 0 and run.says('its interface 1 had been given 10.0.0.5/24, gateway 10.0.0.1 and fd00::5/64'), run
    assert run.says('xe vif-configure-ipv4') and run.never_says('interface 0 had been')
    assert interfaces(pool, 'back')['1']['ipv4_configuration_mode'] == 'None'


def test_without_the_licence_for_locking_the_interface_is_made_without_and_that_is_a_warning(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(a_vm(SETTINGS)), a_shelf()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    serving(pool, at('api:VIF.create', nth=1, fails=LICENCE))
    run = restore(pool, shelf, 'web', 'to=back')
    assert run.exit_status == 3 and run.says('its interface 0 was restricted (locking_mode locked'), run
    assert run.says('10.0.0.5, 10.0.0.6, fe80::5') and run.says('no licence') and shelf.journals() == []
    made = interfaces(pool, 'back')['0']
    assert [made['locking_mode'], made['ipv4_allowed'], made['ipv6_allowed']] == ['network_default', [], []]
    assert made['qos_algorithm_params'] == SETTINGS['qos_algorithm_params'] and made['MTU'] == '1400'


def test_an_interface_that_can_not_be_made_at_all_undoes_the_restore(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(a_vm(SETTINGS)), a_shelf()
    assert backup(pool, shelf, 'vm-export=*').exit_status == 0
    before = {kind: set(rows) for kind, rows in objects(pool).items()}
    serving(pool, at('api:VIF.create', fails=LICENCE))
    run = restore(pool, shelf, 'web', 'to=back')
    after = {kind: set(rows) for kind, rows in objects(pool).items()}
    assert run.exit_status == 1 and after == before and shelf.journals() == [], run
