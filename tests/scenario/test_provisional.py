"""A VM that a restore or drill is still making is nobody's yet: a backup that runs meanwhile leaves it out, and says so."""

from typing import Any

import pytest

from support.deeds import backup, beginning, preview
from support.language import MEBIBYTE, at, disk, uuid_of, vm
from support.recovery import destroy, holds, machine, restore, serving, stopped_at
from support.wire import eventually

ROOT = disk(size=4 * MEBIBYTE, used=[[0, 2]], seed=1, sr='fast')
DATA = disk(size=4 * MEBIBYTE, used=[[1, 2]], seed=2, sr='slow')
SRS = [{'name_label': 'fast'}, {'name_label': 'slow'}]
MAKING = 'bears the name of a VM that a restore or drill is still making'
PROVISIONAL = 'web (being restored) vmbackup-0123456789abcdef'


def a_pool_with_web(a_pool: Any) -> Any:
    return a_pool(vm('web', disks=[ROOT, DATA], tags=['gold'], vifs=[{'device': '0'}]), vm('db', tags=['gold']), srs=SRS)


# The moment, the command, how many VMs there are then, and how many of them bear the tag: a drill's has none.
HELD = {'while its disks are put together': ('api:VBD.create', ['restore', 'web', 'to=back'], 2, 1),
        'before it gets its interface': ('api:VIF.create', ['restore', 'web', 'to=back'], 1, 1),
        'before it gets its name': ('api:VM.set_name_label', ['restore', 'web', 'to=back'], 1, 1),
        'in a drill': ('http:/export_raw_vdi', ['drill', 'web'], 1, 0)}


@pytest.mark.parametrize('moment', sorted(HELD))
def test_a_backup_that_runs_meanwhile_leaves_it_out(a_pool: Any, a_shelf: Any, moment: str) -> None:
    pool, shelf = a_pool_with_web(a_pool), a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    occasion, words, there, with_tag = HELD[moment]
    with stopped_at(pool, shelf, at(occasion, nth=1, hangs=True), *words) as process:
        for line, number in (('vm-export=*', there), ('vm-export=/.*/', there), ('vm-export=tag:gold', with_tag)):
            other = a_shelf()
            shown, run = preview(pool, other, line), backup(pool, other, line)
            assert run.exit_status == 0 and run.stdout.count('left out: ') == run.stdout.count(MAKING) == number, run
            assert other.names() == ['db', 'web'] and other.has('web', complete=1) and other.has('db', complete=1)
            assert shown.exit_status == 0 and shown.stdout.count(MAKING) == number, shown
            assert shown.says('%d VM' % number + ('s' if number > 1 else '') + ' left out as still being made') == bool(number), shown
        process.kill()


def test_one_whose_disks_are_coming_in_is_left_out(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf, other = a_pool_with_web(a_pool), a_shelf(), a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    serving(pool, at('http:/import', rate=MEBIBYTE // 256))
    with beginning(pool, shelf, 'vm-export=web', words=['restore', 'web', 'to=back']) as process:
        assert eventually(lambda: 'being restored' in str(pool.dump()['VM'])), process.output
        run = backup(pool, other, 'vm-export=*')
        assert any('import' in record['current_operations'].values() for record in pool.dump()['VM'].values()), process.output
        process.kill()
    assert run.exit_status == 0 and run.says('left out: ') and run.says(MAKING) and other.names() == ['db', 'web'], run


def test_a_uuid_that_it_is_to_keep_does_not_choose_it_either(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf, other = a_pool_with_web(a_pool), a_shelf(), a_shelf()
    assert backup(pool, shelf, 'vm-export=web').exit_status == 0
    destroy(pool, 'web')
    with stopped_at(pool, shelf, at('api:VBD.create', nth=1, hangs=True), 'restore', 'web', 'preserve=yes') as process:
        run = backup(pool, other, 'vm-export=uuid:' + uuid_of('web'), 'vm-export=db')
        process.kill()
    assert run.exit_status == 1 and run.says('is not backed up: ') and run.says(MAKING) and other.names() == ['db'], run


def test_one_that_is_named_in_full_is_backed_up_and_comes_back(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm(PROVISIONAL, disks=[disk(seed=9)])), a_shelf()
    run = backup(pool, shelf, 'vm-export="%s"' % PROVISIONAL)
    assert run.exit_status == 0 and run.never_says(MAKING), run
    destroy(pool, PROVISIONAL)
    run = restore(pool, shelf, 'uuid:' + uuid_of(PROVISIONAL))
    assert run.exit_status == 0 and holds(pool, PROVISIONAL, disk(seed=9)), run
    assert machine(pool, PROVISIONAL)['power_state'] == 'Halted'
