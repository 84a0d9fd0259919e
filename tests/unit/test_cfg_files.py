"""The cfg files beside an image, for people and for restore."""

from hypothesis import given
from hypothesis import strategies as st

from support.values import a_disk, a_vm
from VmBackup import Interface, cfg_text, metadata_files, parse_cfg

KEYS = st.text(st.characters(whitelist_categories=('Ll', 'Lu', 'Nd'), whitelist_characters='_'), min_size=1)


@given(st.dictionaries(KEYS, st.text()))
def test_any_value_is_read_back_as_it_was(values):
    text = cfg_text(values.items())
    assert parse_cfg(text) == values
    assert text.count('\n') == len(values) and '\r' not in text


@given(st.text(st.sampled_from('\\nr\n\r=#" ')))
def test_escapes_are_not_mistaken_for_what_they_stand_for(value):
    assert parse_cfg(cfg_text([('name_description', value)])) == {'name_description': value}


def test_a_value_stands_on_one_line():
    assert cfg_text([('a', 'x\ny\r\\z'), ('b', 'k=v')]) == 'a=x\\ny\\r\\\\z\nb=k=v\n'


def test_booleans_are_written_as_the_older_program_wrote_them():
    assert cfg_text([('bootable', True), ('empty', False)]) == 'bootable=True\nempty=False\n'


def test_a_line_without_an_equals_sign_is_passed_over():
    assert parse_cfg('name_label=web\nsecond line of a description\n\norig_uuid=1\n') == {'name_label': 'web', 'orig_uuid': '1'}


def keys_of(text):
    return [line.partition('=')[0] for line in text.splitlines()]


def test_the_files_have_the_names_and_keys_of_the_older_program_in_its_order():
    machine = a_vm('web')
    interface = Interface(uuid='7', device='0', network_name='lan', mtu='1500', mac='aa:bb', other_config=(('k', 'v'),))
    files = dict(metadata_files(machine, [a_disk('0'), a_disk('26')], [interface], 'Debian 12'))
    assert sorted(files) == ['DISK-xvda/vbd.cfg', 'DISK-xvda/vdi.cfg', 'DISK-xvdaa/vbd.cfg', 'DISK-xvdaa/vdi.cfg',
                             'VIFs/vif-0.cfg', 'vm.cfg']
    assert keys_of(files['vm.cfg']) == ['name_label', 'name_description', 'memory_dynamic_max', 'VCPUs_max',
                                        'VCPUs_at_startup', 'os_version', 'orig_uuid']
    assert keys_of(files['DISK-xvda/vbd.cfg']) == ['userdevice', 'bootable', 'mode', 'type', 'unpluggable', 'empty', 'orig_uuid']
    assert keys_of(files['DISK-xvda/vdi.cfg']) == ['name_label', 'name_description', 'virtual_size', 'type', 'sharable',
                                                   'read_only', 'orig_uuid', 'orig_sr_uuid']
    assert keys_of(files['VIFs/vif-0.cfg']) == ['device', 'network_name_label', 'MTU', 'MAC', 'other_config', 'orig_uuid']
    assert parse_cfg(files['vm.cfg'])['orig_uuid'] == machine.uuid
