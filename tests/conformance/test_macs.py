"""MAC addresses of imported and rebuilt VMs: random, but derived from the VM's seed in a way that can be compared."""

import os

import pytest

import recordings
from comparison import parse_response
from support.process import SIMPOOL


@pytest.mark.parametrize('of_vm, of_vif', [('restore/08-VM.get_record', 'restore/13-VIF.get_record'),
                                           ('restore/65-VM.get_record', 'restore/63-VIF.get_record')])
def test_the_mac_follows_from_the_seed(monkeypatch: pytest.MonkeyPatch, of_vm: str, of_vif: str) -> None:
    monkeypatch.syspath_prepend(os.path.abspath(SIMPOOL))
    from machines import mac_of
    seed = parse_response(recordings.read(of_vm).body)['Value']['other_config']['mac_seed']
    vif = parse_response(recordings.read(of_vif).body)['Value']
    assert mac_of(seed, vif['device']) == vif['MAC']
