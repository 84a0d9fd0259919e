"""Increments in trouble: what lies below them changes, is lost or lies, and what is around them does. No copy is called good that
does not come back, and none is let go that another needs."""

import gzip
import json
import os
import re
import shutil
from typing import Any

import pytest

from support import warm
from support.deeds import backup, beginning, in_trouble, preview
from support.language import MEBIBYTE, at, slowly, uuid_of, vm
from support.layers import DATA, ROOT, Nights, increments, is_increment, rows
from support.process import ended, run_program
from support.recovery import destroy, restore, serving
from support.wire import eventually

ONE = [dict(ROOT, size=8 * MEBIBYTE)]


def a_chain(nights: Nights, number: int = 3, *lines: str) -> Any:
    """The names of so many copies: night n writes to MiB 2 n, so that each holds a block that all later ones need."""
    for night in range(number):
        if night:
            nights.write(2 * (night - 1))
        nights.night('max_backups=20', *lines)
    return nights.copies()


def listed(nights: Nights, *lines: str) -> Any:
    """What `list` tells of each copy."""
    run = run_program('-', nights.shelf.config(*(nights.lines + lines)), 'list', 'format=json')
    return {copy['name']: copy for row in json.loads(run.stdout)['vms'] for copy in row['copies']}


def good(nights: Nights) -> Any:
    return [copy for copy, told in listed(nights).items() if told['good']]


def flip(nights: Nights, copy: str, content: bytes) -> None:
    """One bit of that content, which an image of the copy holds, is another; its time stays as it was."""
    for name in nights.shelf.names('web', copy):
        if name.endswith(('.vhd', '.xva', '.raw')):
            path = nights.shelf.at('web', copy, name)
            stored = nights.shelf.read('web', copy, name)
            place = stored.find(content)
            if place >= 0:
                status = os.stat(path)
                with open(path, 'r+b') as file:
                    file.seek(place + 1000)
                    file.write(bytes([stored[place + 1000] ^ 1]))
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
                return
    raise AssertionError('no image of %s has that' % copy)


def block(nights: Nights, copy: str, number: int, device: str = 'xvda') -> bytes:
    """What the disk held there in the night of that copy."""
    return nights.held[copy][device][number * MEBIBYTE:(number + 1) * MEBIBYTE]


# --- What is in between, and what is set otherwise -----------------------------------------------------------------------

def test_a_vm_that_was_restored_with_preserve_goes_on_with_its_chain(some_nights: Any) -> None:
    nights = some_nights()
    a_chain(nights, 2)
    destroy(nights.pool, 'web')
    assert restore(nights.pool, nights.shelf, 'web', 'preserve=yes').exit_status == 0
    nights.write(3)
    nights.night()
    nights.write(3, zero=True)
    nights.night()
    assert increments(nights.shelf, 'web') == [False, True, True, True]
    assert nights.all_are_good() and nights.all_come_back()


def test_a_copy_of_the_other_kind_is_no_base_and_breaks_no_chain(some_nights: Any) -> None:
    nights = some_nights()
    first, _ = a_chain(nights, 2)
    other = Nights(nights.pool, nights.shelf, 'vdi-export=web')
    of_disk = other.night()
    nights.write(4)
    third = nights.night()
    nights.write(5)
    last = other.night()
    manifests = {copy: nights.shelf.manifest('web', copy)['layer'] for copy in (of_disk, third, last)}
    assert manifests[of_disk]['depth'] == 1 and manifests[third]['depth'] == 3 and manifests[third]['full'] == first
    assert manifests[last]['base'] == of_disk
    for kind in (nights, other):
        for copy in kind.held:
            assert kind.problem(copy) == '' and kind.restored_problem(copy) == '', copy
    assert nights.verify().exit_status == 0


@pytest.mark.parametrize('first, then', [('raw', 'vhd'), ('vhd', 'raw')])
def test_the_format_may_change_in_between(some_nights: Any, first: str, then: str) -> None:
    nights = some_nights('vdi-export=web')
    for form in (first, then, then, first):
        nights.write(2)
        nights.night('vdi_export_format=' + form)
    assert nights.all_are_good()
    for copy in nights.copies():
        assert nights.restored_problem(copy) == '' and nights.extracted_problem(copy) == ''


@pytest.mark.needs_zstd
def test_the_compression_may_change_every_night(some_nights: Any) -> None:
    nights = some_nights()
    for number, compress in enumerate(['gzip', 'none', 'zstd', 'gzip']):
        nights.write(2 * number)
        nights.night('compress=' + compress)
    assert increments(nights.shelf, 'web') == [False, True, True, True]
    assert nights.all_are_good() and nights.all_come_back()


def test_a_config_that_turns_increments_off_and_on_makes_a_full_of_each_kind_in_between(some_nights: Any) -> None:
    nights = some_nights()
    a_chain(nights, 2)
    plain = backup(nights.pool, nights.shelf, 'vm-export=web', 'max_backups=20')
    assert plain.exit_status == 0
    nights.held[nights.copies()[-1]] = nights.disks()
    nights.write(1)
    nights.night('max_backups=20')
    assert 'does not tell the state of every block' in nights.run.stdout, nights.run
    nights.write(2)
    nights.night('max_backups=20')
    assert increments(nights.shelf, 'web') == [False, True, False, False, True]
    for copy in nights.copies():
        assert nights.restored_problem(copy) == '', copy


def test_full_every_counts_the_full_and_may_be_lowered_and_raised(some_nights: Any) -> None:
    nights = some_nights()
    for full_every in (9, 9, 9, 2, 2, 2, 9, 9, 1, 1):
        nights.write(1)
        nights.night('full_every=%d' % full_every, 'max_backups=20')
    depths = [nights.shelf.manifest('web', copy)['layer']['depth'] for copy in nights.copies()]
    # three of a chain; a full, as it may have two only; another; a full; raised: two more; and 1 makes fulls alone
    assert depths == [1, 2, 3, 1, 2, 1, 2, 3, 1, 1], depths
    assert nights.all_are_good()


def test_two_configs_share_a_chain_and_neither_lets_go_what_the_other_needs(some_nights: Any) -> None:
    nights = some_nights()
    other = os.path.join(os.path.realpath(nights.shelf.home), 'other.cfg')
    with open(other, 'w') as file:
        file.write('\n'.join(['backup_dir=' + nights.shelf.path, 'status_log=' + nights.shelf.status_log, 'vm-export=web:1',
                              'incremental=yes', '']))
    for number in range(6):
        nights.write(number)
        if number % 2:
            before, held = nights.copies(), nights.disks()
            run = run_program('-', other, environment=nights.pool.environment())
            assert run.exit_status == 0, run
            (new,) = set(nights.copies()) - set(before)
            nights.held[new] = held
        else:
            nights.night('max_backups=2')
    assert increments(nights.shelf, 'web').count(False) == 1 and len(nights.copies()) >= 2
    assert nights.all_are_good() and nights.all_come_back()


@pytest.mark.parametrize('days', [-3, -400, 3])
def test_a_clock_that_went_back_or_ahead_changes_no_chain(some_nights: Any, days: int) -> None:
    nights = some_nights()
    a_chain(nights, 2)
    for shift in (days, days, 0):
        nights.write(3)
        before, held = nights.copies(), nights.disks()
        run = ended(warm.start(in_trouble(nights.pool, clock=days * 86400 if shift else 0) + [
            '-', nights.shelf.config(*(nights.lines + ('max_backups=20',)))], nights.pool.environment()))
        assert run.exit_status == 0 or 'the clock went back' in run.stderr, run
        copy, = set(nights.copies()) - set(before)
        nights.held[copy] = held
    by_sequence = sorted(nights.copies(), key=lambda copy: nights.shelf.manifest('web', copy)['sequence'])
    layers = [nights.shelf.manifest('web', copy)['layer'] for copy in by_sequence]
    assert [layer['depth'] for layer in layers] == [1, 2, 3, 4, 5]
    assert [layer['base'] for layer in layers] == [''] + by_sequence[:-1]
    assert nights.all_are_good()
    for copy in nights.copies():
        assert nights.restored_problem(copy) == ''
        assert not is_increment(nights.shelf, 'web', copy) or nights.by_hand_problem(copy) == ''


# --- What lies below an increment is changed ------------------------------------------------------------------------------

@pytest.mark.parametrize('ending', ['.gz', pytest.param('.zst', marks=pytest.mark.needs_zstd)])
def test_images_that_the_storage_host_compressed_later_are_read_and_built_on(some_nights: Any, ending: str) -> None:
    nights = some_nights()
    full, second, _ = a_chain(nights)
    for copy, name in ((full, 'web.xva'), (second, 'xvda.vhd')):
        path = nights.shelf.at('web', copy, name)
        if ending == '.gz':
            with open(path, 'rb') as plain, gzip.open(path + ending, 'wb') as packed:
                shutil.copyfileobj(plain, packed)
            os.unlink(path)
        else:
            os.spawnlp(os.P_WAIT, 'zstd', 'zstd', '-q', '--rm', path)
    nights.write(6)
    last = nights.night('max_backups=20')
    assert increments(nights.shelf, 'web') == [False, True, True, True]
    assert len(good(nights)) == 4 and nights.verify().exit_status == 0
    for copy in nights.copies():
        assert nights.problem(copy) == '' and nights.restored_problem(copy) == '', copy
    assert nights.by_hand_problem(last) == '', nights.shelf.text('web', last, 'RESTORE.txt')


def test_a_full_that_was_removed_takes_what_rests_on_it_and_the_next_copy_is_a_full(some_nights: Any) -> None:
    nights = some_nights()
    full, second, third = a_chain(nights)
    shutil.rmtree(nights.shelf.at('web', full))
    told = listed(nights)
    for copy in (second, third):
        assert not told[copy]['good'] and full in told[copy]['problem'], told[copy]
    run = restore(nights.pool, nights.shelf, 'web', 'to=back')
    assert run.exit_status != 0 and run.says(full), run
    assert nights.verify().exit_status == 1
    nights.write(1)
    last = nights.night('max_backups=1', exit_status=3)
    assert not is_increment(nights.shelf, 'web', last) and nights.restored_problem(last) == ''
    for copy in (second, third):
        assert 'rm -r web/' + copy in nights.run.stderr, nights.run


def test_a_copy_that_was_swapped_with_another_vms_is_not_taken_for_what_it_was(some_nights: Any) -> None:
    nights = some_nights(beside=[vm('db', disks=[dict(ROOT, seed=77), dict(DATA, seed=78)])])
    full, second, third = a_chain(nights)
    assert backup(nights.pool, nights.shelf, 'vm-export=db', 'incremental=yes', 'exclude=web').exit_status == 0
    strange = nights.shelf.names('db')[0]
    os.rename(nights.shelf.at('web', full), nights.shelf.at('db', 'aside'))
    shutil.copytree(nights.shelf.at('db', strange), nights.shelf.at('web', full))
    told = listed(nights)
    assert not told[second]['good'] and not told[third]['good']
    assert nights.verify('web').exit_status == 1
    nights.called = 'vm=uuid:' + uuid_of('web')             # two VMs have copies in web/ now
    run = restore(nights.pool, nights.shelf, nights.called, 'from=' + third[len('backup-'):], 'to=back')
    assert run.exit_status != 0 and run.says(full) and 'back' not in [one['name_label'] for one in nights.pool.dump()['VM'].values()], run
    nights.write(1)
    last = nights.night('max_backups=20', 'exclude=db')
    assert not is_increment(nights.shelf, 'web', last) and nights.restored_problem(last) == ''


@pytest.mark.parametrize('lines', [('vm-export=web',), ('vdi-export=web',), ('vdi-export=web', 'vdi_export_format=vhd')],
                         ids=['vm', 'raw', 'vhd'])
def test_damage_costs_the_copies_that_need_the_damaged_block_and_no_other(some_nights: Any, lines: Any) -> None:
    nights = some_nights(*lines, disks=ONE)
    full, second, third, fourth = a_chain(nights, 4)        # which write MiB 0, 2 and 4: units 0, 1 and 2
    flip(nights, full, block(nights, full, 2))              # needed by the full and the second only
    assert nights.verify().exit_status == 1
    assert good(nights) == [third, fourth], listed(nights)
    assert nights.restored_problem(third) == '' and nights.restored_problem(fourth) == ''
    for copy in (full, second):
        run = restore(nights.pool, nights.shelf, 'web', 'from=' + copy[len('backup-'):], 'to=back')
        assert run.exit_status == 1 and not [one for one in nights.pool.dump()['VM'].values() if one['name_label'] == 'back'], run

    nights.write(6)
    last = nights.night('max_backups=20')
    assert not is_increment(nights.shelf, 'web', last), 'nothing new rests on a copy that was found bad'


def test_damage_that_no_check_has_seen_is_found_by_the_restore_that_needs_the_block(some_nights: Any) -> None:
    nights = some_nights()
    full, second, third = a_chain(nights)
    flip(nights, full, block(nights, full, 0))              # MiB 0 was written anew in the second night
    flip(nights, second, block(nights, second, 0))
    run = restore(nights.pool, nights.shelf, 'web', 'to=back')
    assert run.exit_status == 1 and second in run.stdout + run.stderr, run
    assert 'back' not in [one['name_label'] for one in nights.pool.dump()['VM'].values()]
    assert nights.verify('web').exit_status == 1 and good(nights) == []


def test_damage_in_blocks_of_which_nothing_is_needed_is_no_damage_to_the_copy(some_nights: Any) -> None:
    nights = some_nights()
    full, second, third = a_chain(nights)
    flip(nights, full, block(nights, full, 0))              # MiB 0 and 1 are held by the second since
    run = nights.verify('web')
    assert run.exit_status == 1 and good(nights) == [second, third], run
    for copy in (second, third):
        assert nights.restored_problem(copy) == ''


def test_a_full_that_lost_its_end_is_no_base(some_nights: Any) -> None:
    nights = some_nights()
    full, second = a_chain(nights, 2)
    with open(nights.shelf.at('web', full, 'web.xva'), 'r+b') as file:
        file.truncate(5 * MEBIBYTE)
    assert good(nights) == []
    nights.write(1)
    last = nights.night('max_backups=20')
    assert not is_increment(nights.shelf, 'web', last) and good(nights) == [last]


def test_a_list_of_blocks_that_is_not_what_was_written_is_no_base_and_why_is_said(some_nights: Any) -> None:
    nights = some_nights()
    full, second = a_chain(nights, 2)
    path = nights.shelf.at('web', second, 'blocks')
    content = nights.shelf.text('web', second, 'blocks')
    with open(path, 'w') as file:
        file.write(re.sub(r'(?m)^(xvda 4 .)(.)', lambda match: match.group(1) + ('1' if match.group(2) == '0' else '0'), content))
    nights.write(6)
    last = nights.night('max_backups=20', exit_status=3)
    assert not is_increment(nights.shelf, 'web', last) and second in nights.run.stderr, nights.run
    assert nights.verify('web').exit_status == 1 and nights.restored_problem(last) == ''


@pytest.mark.parametrize('which', ['full', 'base'])
@pytest.mark.parametrize('what', ['verdict', 'removed', 'cut'])
def test_what_happens_to_a_holder_while_an_increment_is_made_makes_it_a_full(some_nights: Any, which: str, what: str) -> None:
    nights = some_nights(disks=[dict(ROOT, size=16 * MEBIBYTE, used=[[0, 16]])])
    full, base = a_chain(nights, 2)
    copy = full if which == 'full' else base
    nights.write(5)
    held = nights.disks()
    seen = len(nights.pool.calls('http:/export'))
    serving(nights.pool, slowly(first=7 * MEBIBYTE, nth=1))
    with beginning(nights.pool, nights.shelf, *(nights.lines + ('max_backups=20',))) as process:
        assert eventually(lambda: any('.partial/xvda.vhd' in path for path in nights.shelf.tree())), process.output
        if what == 'verdict':
            flip(nights, copy, block(nights, copy, 0 if which == 'base' else 6))
            assert nights.verify('web').exit_status == 1
        elif what == 'removed':
            os.rename(nights.shelf.at('web', copy), nights.shelf.at('aside'))
        else:
            name = 'web.xva' if which == 'full' else 'xvda.vhd'
            os.truncate(nights.shelf.at('web', copy, name), 1000)
        nights.pool.release()
        run = process.ending()
    assert len(nights.pool.calls('http:/export')) == seen + 2 and nights.pool.has_no_snapshots_of_ours(), run
    last = nights.copies()[-1]
    assert last not in (full, base) and not is_increment(nights.shelf, 'web', last), run
    assert copy in nights.shelf.manifest('web', last)['layer']['why'] and 'made again' in run.stdout, run
    assert nights.shelf.unfinished() == [] and run.exit_status in (0, 3), run
    nights.held[last] = held
    assert nights.problem(last) == '' and nights.restored_problem(last) == ''


# --- What may go and what may not ---------------------------------------------------------------------------------------

def test_holders_stay_as_long_as_a_copy_needs_them_and_do_not_count(some_nights: Any) -> None:
    nights = some_nights()
    copies = a_chain(nights, 5)
    nights.write(8)
    last = nights.night('max_backups=1')
    assert nights.copies() == copies + [last]
    told = listed(nights, 'max_backups=1')
    assert [re.search(r'held for (\d+) later cop', told[copy]['fate'] if 'fate' in told[copy] else str(told[copy])) is not None
            for copy in copies] == [True] * 5, told
    assert nights.all_are_good()


def test_a_chain_goes_when_the_next_one_is_proven_and_nothing_needs_it(some_nights: Any) -> None:
    nights = some_nights()
    first = a_chain(nights, 3)
    nights.write(1)
    full = nights.night('full_every=1', 'max_backups=1')
    # the last good copy of the chain before stays until the full has been read back, and what holds it
    assert nights.copies() == first + [full], nights.run
    nights.write(2)
    nights.night('max_backups=1')
    assert set(first) <= set(nights.copies())
    assert any('read back' in str(told) for told in listed(nights, 'max_backups=1').values())
    assert nights.verify('web').exit_status == 0
    nights.write(3)
    nights.night('max_backups=1')
    assert set(first).isdisjoint(nights.copies()), nights.run
    assert nights.all_are_good() and nights.all_come_back()


def test_a_rotten_full_of_the_present_chain_does_not_take_the_last_good_copy_before_it(some_nights: Any) -> None:
    nights = some_nights()
    first = a_chain(nights, 3)
    nights.write(1)
    full = nights.night('full_every=1', 'max_backups=1')
    flip(nights, full, block(nights, full, 0))            # which all of its chain need
    for number in (2, 4, 6):
        nights.write(number)
        nights.night('max_backups=1')
    assert set(first) <= set(nights.copies()), nights.run
    assert nights.verify('web').exit_status == 1
    assert set(first) <= set(good(nights)) and full not in good(nights)
    nights.write(7)
    last = nights.night('max_backups=1', exit_status=3)
    assert nights.shelf.manifest('web', last)['layer']['base'] == first[-1], 'the newest good copy'
    assert nights.restored_problem(last) == '' and nights.by_hand_problem(last) == ''


def test_verify_after_lets_the_chain_before_go_at_once(some_nights: Any) -> None:
    nights = some_nights()
    first = a_chain(nights, 3)
    nights.write(1)
    full = nights.night('full_every=1', 'max_backups=1', 'verify_after=yes')
    assert nights.copies() == [full], (first, nights.run)


def test_a_pin_keeps_an_increment_and_all_that_holds_its_blocks(some_nights: Any) -> None:
    nights = some_nights()
    full, second, third = a_chain(nights)
    run = run_program('-', nights.shelf.config(*nights.lines), 'pin', 'web', second[len('backup-'):])
    assert run.exit_status == 0, run
    for number in range(3):
        nights.write(number)
        last = nights.night('full_every=1', 'max_backups=1', 'verify_after=yes')
    assert nights.copies() == [full, second, last], nights.run
    assert nights.restored_problem(second) == '' and nights.by_hand_problem(second) == ''
    assert third not in nights.copies()


def test_keep_daily_holds_the_holders_of_what_it_keeps(some_nights: Any) -> None:
    nights = some_nights()
    for day in range(6):
        nights.write(day)
        held = nights.disks()
        before = nights.copies()
        run = ended(warm.start(in_trouble(nights.pool, clock=86400 * (day - 6)) + ['-', nights.shelf.config(
            *(nights.lines + ('max_backups=1', 'keep_daily=3', 'full_every=4')))], nights.pool.environment()))
        assert run.exit_status == 0, run
        copy, = set(nights.copies()) - set(before)
        nights.held[copy] = held
    assert set(list(nights.held)[-3:]) <= set(nights.copies())
    assert nights.all_are_good() and nights.all_come_back()


def test_preview_and_prune_by_hand_leave_the_holders(some_nights: Any) -> None:
    nights = some_nights()
    copies = a_chain(nights, 4)
    shown = preview(nights.pool, nights.shelf, *(nights.lines + ('max_backups=1',)))
    assert not [line for line in shown.stdout.splitlines() if 'removes' in line and 'backup-' in line], shown
    run = run_program('-', nights.shelf.config(*nights.lines), 'prune', 'web', 'max_backups=1')
    assert run.exit_status == 0 and nights.copies() == copies, run


def test_a_manifest_of_a_newer_format_stops_the_pruning_beside_it(some_nights: Any) -> None:
    nights = some_nights()
    copies = a_chain(nights, 3)
    path = nights.shelf.at('web', copies[1], 'backup.json')
    manifest = dict(nights.shelf.manifest('web', copies[1]), format=3, layer={'of': ['another shape']})
    with open(path, 'w') as file:
        json.dump(manifest, file)
    for _ in range(2):
        nights.write(1)
        nights.night('max_backups=1', 'full_every=1', exit_status=3)
        assert 'newer VmBackup' in nights.run.stderr, nights.run
    assert len(nights.copies()) == 5
    run = run_program('-', nights.shelf.config(*nights.lines), 'prune', 'web', 'max_backups=1')
    assert len(nights.copies()) == 5, run


def test_a_manifest_that_cant_be_read_stops_the_pruning_and_is_named_each_night(some_nights: Any) -> None:
    nights = some_nights()
    copies = a_chain(nights, 3)
    with open(nights.shelf.at('web', copies[1], 'backup.json'), 'w') as file:
        file.write('{"format": 2, "kin')
    for _ in range(2):
        nights.write(1)
        nights.night('max_backups=1', 'full_every=1', 'verify_after=yes', exit_status=3)
        assert copies[1] in nights.run.stderr, nights.run
    assert len(nights.copies()) == 5


def test_an_increment_that_was_moved_aside_is_warned_of(some_nights: Any) -> None:
    nights = some_nights()
    copies = a_chain(nights, 3)
    os.makedirs(nights.shelf.at('keep'))
    os.rename(nights.shelf.at('web', copies[1]), nights.shelf.at('keep', copies[1]))
    nights.write(1)
    nights.night('max_backups=20', exit_status=3)
    assert 'keep/' + copies[1] in nights.run.stderr and 'pin' in nights.run.stderr, nights.run


# --- Trouble in the middle ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('occasion', ['http:/export', 'api:VDI.destroy', 'api:VM.destroy', 'api:message.get'])
def test_a_run_that_was_killed_in_an_increment_leaves_all_as_it_was_and_the_next_goes_on(some_nights: Any, occasion: str) -> None:
    nights = some_nights()
    copies = a_chain(nights, 3)
    nights.write(6)
    serving(nights.pool, at(occasion, nth=1, hangs=True))
    seen = len(nights.pool.calls(occasion))
    with beginning(nights.pool, nights.shelf, *(nights.lines + ('max_backups=1',))) as process:
        assert eventually(lambda: len(nights.pool.calls(occasion)) > seen or process.is_over()), process.output
        process.kill()
    serving(nights.pool)
    assert set(copies) <= set(nights.copies()) and len(good(nights)) >= 3
    before = nights.copies()
    run = run_program('-', nights.shelf.config(*nights.lines), 'prune', 'web', 'max_backups=1')
    assert set(before) == set(nights.copies()), run
    for copy in set(before) - set(copies):
        nights.held[copy] = nights.disks()
    nights.write(7)
    nights.night('max_backups=1')
    assert increments(nights.shelf, 'web')[-1] and nights.shelf.unfinished() == [] and nights.pool.has_no_snapshots_of_ours()
    assert nights.all_are_good() and nights.all_come_back()


def test_an_export_that_breaks_off_leaves_no_increment(some_nights: Any) -> None:
    nights = some_nights()
    copies = a_chain(nights, 2)
    for deed in ({'breaks_off_after': 2 * MEBIBYTE}, {'truncate': 2 * MEBIBYTE, 'silent': True}, {'flips': 2500000}):
        serving(nights.pool, at('http:/export', **deed))
        run = backup(nights.pool, nights.shelf, *(nights.lines + ('max_backups=1',)))
        assert run.exit_status == 1 and nights.copies() == copies and nights.shelf.unfinished() == [], run
    serving(nights.pool)
    nights.night('max_backups=1')
    assert nights.all_are_good()


def test_a_store_that_was_copied_in_the_middle_of_a_run_is_whole_but_for_what_was_not_sealed(some_nights: Any,
                                                                                             a_shelf: Any) -> None:
    nights = some_nights(disks=[dict(ROOT, size=16 * MEBIBYTE, used=[[0, 16]])])
    copies = a_chain(nights, 3)
    nights.write(5)
    serving(nights.pool, slowly(first=7 * MEBIBYTE, nth=1))
    other = a_shelf()
    with beginning(nights.pool, nights.shelf, *(nights.lines + ('max_backups=20',))) as process:
        assert eventually(lambda: any('.partial/xvda.vhd' in path for path in nights.shelf.tree())), process.output
        shutil.rmtree(other.path)
        # what is just being written in another's stead may be gone before it is copied
        shutil.copytree(nights.shelf.path, other.path, symlinks=True, ignore=shutil.ignore_patterns('*.new'))
        nights.pool.release()
        assert process.ending().exit_status == 0
    elsewhere = Nights(nights.pool, other, *nights.lines[:-1])
    elsewhere.held = dict(nights.held)
    assert elsewhere.copies() == copies
    assert elsewhere.all_are_good()
    last = elsewhere.night('max_backups=20')
    assert is_increment(other, 'web', last) and elsewhere.all_are_good() and elsewhere.all_come_back()


def test_a_reader_of_an_increment_keeps_its_holders_from_being_removed(some_nights: Any) -> None:
    nights = some_nights()
    first = a_chain(nights, 3)
    nights.write(1)
    nights.night('full_every=1', 'max_backups=20')
    serving(nights.pool, at('http:/import', nth=1, hangs=True))
    with beginning(nights.pool, nights.shelf, *nights.lines,
                   words=['restore', 'web', 'from=' + first[-1][len('backup-'):], 'to=back']) as process:
        assert eventually(lambda: nights.pool.calls('http:/import')), process.output
        nights.write(2)
        nights.night('full_every=1', 'max_backups=1', 'verify_after=yes')
        assert set(first) <= set(nights.copies()), nights.run
        process.kill()
    serving(nights.pool)
    assert nights.restored_problem(first[-1]) == ''


def test_a_drill_of_an_increment_is_as_one_of_a_full(some_nights: Any) -> None:
    nights = some_nights()
    copies = a_chain(nights, 3)
    run = run_program('-', nights.shelf.config(*nights.lines), 'drill', 'web', environment=nights.pool.environment())
    assert run.exit_status == 0, run
    assert listed(nights)[copies[-1]]['drill'] == 'restored and compared', listed(nights)[copies[-1]]
