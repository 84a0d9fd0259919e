"""Which directory belongs to which VM: a VM is its uuid, and names are for people."""

from typing import Dict, List

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.values import POOL_UUID, a_copy, a_vm, uuid_of
from VmBackup import CatalogError, Copy, Folder, Placement, StorageMisbehaved, folded, safe_name


class Store:
    """What Placement asks of a catalog: directories with copies, in memory. On CIFS names differ in more than case.

    A copy was made in the directory that it lies in, unless it tells another as its home."""

    def __init__(self, folders: Dict[str, List[Copy]]) -> None:
        self.folders = folders
        self.reads = []  # type: List[str]

    def folder_names(self) -> List[str]:
        return sorted(self.folders)

    def folder(self, name: str) -> Folder:
        self.reads.append(name)
        copies = [copy if copy.home else copy._replace(home=name) for copy in self.folders.get(name, ())]
        return Folder(name, tuple(copies), (), ())


def placement_in(store, *machines):
    """The directories of a pool with these VMs."""
    return Placement(store, POOL_UUID, [machine.name for machine in machines])


def places(store, *machines, run=None):
    """The directory of each VM of the run, by its number; all VMs of the pool run unless said otherwise."""
    placement = placement_in(Store(store), *machines)
    chosen = machines if run is None else run
    placement.claim_all(chosen)
    return [placement.folder_name(machine) for machine in chosen]


def of(number, night=1, **facts):
    return a_copy(night, uuid=uuid_of(number) if number else '', **facts)


WEB, WEB2, DB = a_vm('web', 1), a_vm('web', 2), a_vm('db', 3)


def test_a_vm_that_is_new_takes_the_directory_of_its_name():
    assert places({}, WEB, DB) == ['web', 'db']


def test_a_vm_keeps_the_directory_whose_copies_bear_its_uuid():
    assert places({'web': [of(1)]}, WEB) == ['web']
    assert places({'web--00000001': [of(1)], 'web': [of(9)]}, WEB) == ['web--00000001']


def test_after_a_rename_new_copies_go_on_in_the_old_directory():
    assert places({'old name': [of(3)], 'other': [of(9)]}, WEB, DB) == ['web', 'old name']


def test_a_newcomer_of_the_same_name_gets_a_directory_of_its_own():
    assert places({'web': [of(9)]}, WEB) == ['web--00000001']


def test_a_newcomer_never_takes_the_directory_of_a_vm_that_was_renamed_away():
    renamed = a_vm('web-old', 2)
    assert places({'web': [of(2)]}, WEB, renamed) == ['web--00000001', 'web']
    assert places({'web': [of(2)]}, WEB, renamed, run=[WEB]) == ['web--00000001']


@pytest.mark.parametrize('machines', [(WEB, WEB2), (WEB2, WEB)])
def test_among_new_vms_of_one_name_the_lowest_uuid_takes_the_plain_one(machines):
    assert dict(zip((machine.uuid for machine in machines), places({}, *machines))) == {
        uuid_of(1): 'web', uuid_of(2): 'web--00000002'}


def test_a_vm_of_the_same_name_that_has_copies_goes_before_a_lower_uuid():
    assert places({'web': [of(2)]}, WEB, WEB2) == ['web--00000001', 'web']


def test_names_that_differ_in_case_only_do_not_share_a_directory_on_a_windows_share():
    upper, lower = places({}, a_vm('Web', 1), a_vm('web', 2))
    assert (upper, lower) == ('Web', 'web--00000002')
    assert places({'WEB': [of(9)]}, WEB) == ['web--00000001']


@pytest.mark.parametrize('copies, names, folder', [
    ([of(0, is_old=True)], ['web'], 'web'), ([of(0, is_old=True), of(1, 2)], ['web'], 'web'),
    ([of(0, is_old=True), of(9, 2)], ['web'], 'web--00000001'), ([of(0, is_old=True)], ['web', 'web'], 'web--00000001'),
    ([of(0, problem='backup.json is damaged')], ['web'], 'web--00000001')])
def test_old_copies_without_a_uuid_are_the_vms_of_that_name_only_if_they_can_be_nobody_elses(copies, names, folder):
    machines = [a_vm(name, number) for number, name in enumerate(names, 1)]
    assert places({'web': copies}, *machines)[0] == folder


def test_a_directory_without_copies_belongs_to_whoever_comes_first():
    assert places({'web': []}, WEB) == ['web']


def test_asking_again_gives_the_same_answer():
    placement = placement_in(Store({'web': [of(9)]}), WEB, WEB2, DB)
    first = [placement.folder_name(machine) for machine in (WEB, WEB2, DB)]
    assert [placement.folder_name(machine) for machine in (WEB, WEB2, DB)] == first


def test_what_another_run_did_meanwhile_is_seen_when_the_lock_is_ours():
    store = {}
    placement = placement_in(Store(store), WEB)
    assert placement.folder_name(WEB) == 'web'
    store['web'] = [of(9)]
    placement.look_again('web')
    assert placement.folder_name(WEB) == 'web--00000001'


def test_copies_that_were_moved_aside_do_not_draw_the_new_ones_after_them():
    kept = [of(1, home='web'), of(1, 2, home='web')]
    assert places({'KEEP': kept}, WEB) == ['web']
    assert places({'KEEP': kept, 'web': [of(1, 3)]}, WEB) == ['web']
    assert places({'KEEP': kept}, a_vm('KEEP', 5)) == ['KEEP--00000005'], 'nor are they a newcomer\'s'


def test_copies_that_were_moved_into_a_directory_of_their_vms_name_leave_it_that_vms():
    assert places({'shop': [of(1, home='web')]}, a_vm('shop', 1)) == ['shop']


def test_a_vm_is_its_uuid_in_its_pool():
    others, ours = of(1, pool='another'), of(1, pool=POOL_UUID)
    assert places({'web': [others]}, WEB) == ['web--00000001']
    assert places({'web--00000001': [others], 'web': [of(9)]}, WEB) == ['web--' + POOL_UUID[:8]]
    assert places({'web': [others], 'web--00000001': [ours]}, WEB) == ['web--00000001']
    assert places({'web': [others, ours]}, WEB) == ['web'], 'an earlier version did not tell them apart'
    assert places({'old name': [ours]}, WEB) == ['old name'] and places({'old name': [others]}, WEB) == ['web']


def test_a_store_of_many_directories_is_read_once():
    machines = [a_vm('vm%d' % number, number) for number in range(1, 40)]
    store = Store({'old%d' % number: [of(number)] for number in range(60, 100)})
    placement = placement_in(store, *machines)
    placement.claim_all(machines)
    assert [placement.folder_name(machine) for machine in machines] == [machine.name for machine in machines]
    assert len(store.reads) == len(set(store.reads)) <= 40 + 3 * len(machines)


def test_where_each_vm_has_its_directory_no_other_is_read():
    store = Store({'web': [of(1)], 'db': [of(3)], 'other': [of(9)]})
    placement = placement_in(store, WEB, DB)
    placement.claim_all([WEB, DB])
    assert store.reads == ['web', 'db']


NAMES = st.sampled_from(['web', 'Web', 'db', 'd\xfc', 'D\xdc', 'a/b', '.', 'con'])
STORES = st.dictionaries(st.sampled_from(['web', 'Web', 'db', 'other', 'web--00000009', 'con']),
                         st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=4).map(
                             lambda rows: [of(number, night, is_old=is_old and not number) for night, (number, is_old)
                                           in enumerate(rows, 1)]), max_size=4)


@given(STORES, st.lists(NAMES, max_size=5))
def test_no_vm_gets_a_directory_with_copies_of_another_alone(store, names):
    machines = [a_vm(name, number) for number, name in enumerate(names, 1)]
    for machine, place in zip(machines, places(store, *machines)):
        bearers = {copy.uuid for copy in store.get(place, ()) if copy.uuid}
        assert not bearers or machine.uuid in bearers


@given(STORES, st.lists(NAMES, max_size=5))
def test_two_vms_share_a_directory_only_if_it_holds_copies_of_both(store, names):
    machines = [a_vm(name, number) for number, name in enumerate(names, 1)]
    by_place = {}
    for machine, place in zip(machines, places(store, *machines)):
        by_place.setdefault(folded(place), []).append((machine, place))
    for rows in by_place.values():
        if len(rows) > 1:
            for machine, place in rows:
                assert machine.uuid in {copy.uuid for copy in store.get(place, ())}


@given(STORES, st.lists(NAMES, max_size=5))
def test_a_directory_is_named_after_the_vm_or_is_there_already(store, names):
    machines = [a_vm(name, number) for number, name in enumerate(names, 1)]
    for machine, place in zip(machines, places(store, *machines)):
        plain = safe_name(machine.name)
        assert place in store or place in (plain, plain + '--' + machine.uuid[:8])


def test_a_vm_that_is_not_found_begins_no_second_line_while_a_directory_can_not_be_read():
    class Troubled(Store):
        def folder(self, name: str) -> Folder:
            if name == 'old name':
                raise error('reading old name failed')
            return super().folder(name)

    placement = Placement(Troubled({'old name': [of(3)], 'web': [of(1)]}), POOL_UUID, ['web', 'db'])
    error = StorageMisbehaved
    assert placement.folder_name(WEB) == 'web', 'its own is known'
    for _ in range(2):
        with pytest.raises(StorageMisbehaved):
            placement.folder_name(DB)
    error = CatalogError                                     # lost+found on a share, and the like
    assert placement.folder_name(DB) == 'db'
