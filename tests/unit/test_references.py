"""References: what they can be read against and when they go, what is told of how disks were read, ledgers, and the rows and
metadata of copies that were read as differences."""

import contextlib
import gzip
import itertools
import json
import os
from array import array
from datetime import timedelta, timezone
from typing import Any, Dict, List, Optional, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

import VmBackup
from support.process import TESTS
from support.values import NIGHT, POOL_UUID, US_UUID, a_copy, a_disk, a_vm, uuid_of
from VmBackup import (AGREED, MEBIBYTE, ZERO, BadLedger, Catalog, Copy, DiskState, Layer, Ledger, Method, NamedSnapshot,
                      Reference, Row, Rules, VerificationError, audit_words, distrust_of, first_that_differs, is_reading_told,
                      judge, named_references, ova_text, parse_ledger, parse_ova, reading_words, reference_problem, repeated_reasons,
                      since_whole_reading, snapshot_ova, why_reference_goes, with_accusations)
from unit.test_layers import BASE, HEAVY, File, a_list_of_blocks, digest, disks, is_same, model, read_rows, taken

OWN, OTHER = '/cfg/nightly.cfg', '/cfg/weekend.cfg'
IDENTITY = {'store': '0123456789abcdef', 'inode': 77, 'is_own': True}
NOW = NIGHT.replace(tzinfo=timezone.utc)
DAY = timedelta(days=1)
COPY = a_copy(5)._replace(layer=Layer(1, a_copy(5).name, '', 'it is the first copy'))


def a_reference(age: timedelta = DAY, **facts: Any) -> Reference:
    values = dict(uuid=uuid_of(0x51), name='web (VmBackup reference 2016-04-19 00:10:00, store 01234567)', copy=COPY.name,
                  blocks='0' * 64, at=VmBackup.format_utc(NOW - age),
                  disks={'xvda': {'uuid': uuid_of(0x52), 'size': 8 << 30, 'sr': uuid_of(0x50)}})
    return Reference(**dict(values, **facts))


def a_ledger(**facts: Any) -> Ledger:
    values = dict(store=IDENTITY['store'], inode=IDENTITY['inode'], pool=POOL_UUID, config=OWN, host='xcp1', kind='vm-export',
                  vm=US_UUID, vm_name='web', folder='web', current=a_reference())
    return Ledger(**dict(values, **facts))  # type: ignore


# --- Whether there is something to read against ----------------------------------------------------------------------------

NONE_YET, STRANGE, OTHER_STATE = ('there is no reference in the pool', "the reference is another store's",
                                  'the reference is not the state of the newest good copy')


@pytest.mark.parametrize('ledger, newest, problem', [
    (a_ledger(), COPY, ''),
    (None, COPY, NONE_YET),
    (a_ledger(current=None, leaving=(a_reference(),)), COPY, NONE_YET),
    (a_ledger(store='fedcba9876543210'), COPY, STRANGE),
    (a_ledger(inode=78), COPY, STRANGE),
    (a_ledger(distrust='its audit found a lie'), COPY, 'its audit found a lie'),
    (a_ledger(distrust='its audit found a lie', current=None), COPY, 'its audit found a lie'),
    (a_ledger(distrust='its audit found a lie', store='fedcba9876543210'), COPY, STRANGE),
    (a_ledger(), None, OTHER_STATE),
    (a_ledger(), COPY._replace(name='backup-2016-04-20-001000'), OTHER_STATE),
    (a_ledger(), COPY._replace(layer=None), OTHER_STATE),
    (a_ledger(folder='web-2'), COPY, OTHER_STATE)])
def test_why_a_reference_can_not_be_read_against(ledger: Any, newest: Any, problem: str) -> None:
    assert reference_problem(ledger, IDENTITY, newest) == problem


def test_no_reference_is_used_where_the_store_has_no_identity() -> None:
    assert reference_problem(a_ledger(), {'store': '', 'inode': 0}, COPY) == STRANGE


@pytest.mark.parametrize('ledger, jobs, is_there, why', [
    (a_ledger(), {(US_UUID, 'vm-export')}, True, ''),
    (a_ledger(config=OTHER), {(US_UUID, 'vm-export')}, False, ''),             # this run's takes its place
    (a_ledger(current=a_reference(35 * DAY)), {(US_UUID, 'vm-export')}, True, ''),
    (a_ledger(current=a_reference(35 * DAY + timedelta(seconds=1))), {(US_UUID, 'vm-export')}, True, 'it is older than 35 days'),
    (a_ledger(config=OTHER, current=a_reference(36 * DAY)), None, True, 'it is older than 35 days'),
    (a_ledger(), set(), True, OWN + ' keeps no reference of this VM any more'),
    (a_ledger(), {(US_UUID, 'vdi-export'), (uuid_of(2), 'vm-export')}, True, OWN + ' keeps no reference of this VM any more'),
    (a_ledger(config=OTHER), set(), True, ''),
    (a_ledger(config=OTHER), set(), False, 'the config %s, which kept it, is gone' % OTHER),
    (a_ledger(config=OTHER), None, False, 'the config %s, which kept it, is gone' % OTHER),
    (a_ledger(), None, True, ''),                                              # what the file selects is not known
    (a_ledger(current=None, leaving=(a_reference(99 * DAY),)), set(), False, '')])
def test_why_a_reference_goes(ledger: Any, jobs: Any, is_there: bool, why: str) -> None:
    assert why_reference_goes(ledger, OWN, jobs, is_there, NOW) == why


# --- How disks were read ---------------------------------------------------------------------------------------------------

DIFFERENCE, ALL, FULL = ('xvda', 'difference', ''), ('xvda', 'all', 'it was so'), ('xvda', 'full', 'a full is made')


def history(words: str) -> List[Copy]:
    """Copies of successive nights: d read as a difference, a all, f a full, m both, u unreadable, g garbled, n newer, o of the
    older program, k of another kind, v of another VM, s moved aside."""
    found = []
    for night, word in enumerate(words, 1):
        reading = {'d': (DIFFERENCE,), 'a': (ALL,), 'f': (FULL,), 'k': (ALL,), 'v': (ALL,),
                   'm': (DIFFERENCE, ('xvdb', 'all', 'it was so'))}.get(word, ())
        facts = {'u': dict(is_unreadable=True), 'g': dict(method=None), 'n': dict(is_newer=True, method=None),
                 'o': dict(is_old=True), 'k': dict(method=Method.VDI), 'v': dict(uuid=uuid_of(2)),
                 's': dict(aside='keep')}.get(word, {})
        found.append(a_copy(night, reading=reading, **facts))
    return found


def numbers(copies: Sequence[Copy], among: Sequence[Copy]) -> List[int]:
    return [among.index(copy) for copy in copies]


@pytest.mark.parametrize('words, expected', [
    ('', []), ('f', []), ('fd', [1]), ('fdd', [1, 2]), ('fddf', []), ('fddfd', [4]), ('fdda', []), ('fdad', [3]), ('dd', [0, 1]),
    ('fdm', [1, 2]), ('od', [1]), ('do', []), ('fdkd', [1, 3]), ('fdvd', [1, 3]), ('fdud', [1, 3]), ('fdgd', [1, 3]),
    ('fdnd', [1, 3]), ('fdsd', [1, 3]), ('fdv', [1])])
def test_the_copies_that_were_read_as_differences_since_all_was_read(words: str, expected: List[int]) -> None:
    copies = history(words)
    for order in (copies, copies[::-1]):
        assert numbers(since_whole_reading(order, US_UUID, Method.VM), copies) == expected


@given(st.text('daf', max_size=9), st.randoms(use_true_random=False))
def test_it_is_the_end_of_the_history_in_whatever_order_it_is_listed(words: str, chance: Any) -> None:
    copies = history(words)
    listed = list(copies)
    chance.shuffle(listed)
    whole = max(words.rfind('a'), words.rfind('f'))
    assert numbers(since_whole_reading(listed, US_UUID, Method.VM), copies) == list(range(whole + 1, len(words)))


AUDITED = dict(audit=AGREED, audited_at='2016-05-01T00:00:00Z')
FOUND = dict(audit='SUSPECT', audited_at='2016-05-01T00:00:00Z', audit_reason='MiB 5 of disk xvda is another.')


@pytest.mark.parametrize('words, checks, expected', [
    ('D', {}, 'not audited yet'), ('fDd', {}, 'not audited yet'), ('fDda', {}, 'not audited'), ('fDf', {}, 'not audited'),
    ('Mf', {}, 'not audited'), ('Ddkv', {}, 'not audited yet'), ('Do', {}, 'not audited'), ('F', {}, ''), ('A', {}, ''),
    ('F', AUDITED, ''), ('Df', AUDITED, 'audited on 2016-05-01'), ('D', AUDITED, 'audited on 2016-05-01'),
    ('Df', FOUND, 'SUSPECT'), ('Df', {'audit': 5, 'audited_at': []}, 'not audited')])
def test_what_is_said_of_an_audit(words: str, checks: Any, expected: str) -> None:
    """Of the copy in capitals."""
    copies = history(words.lower())
    place = next(number for number, word in enumerate(words) if word.isupper())
    copies[place] = copies[place]._replace(checks=checks)
    assert audit_words(copies[place], copies) == expected


def test_a_suspect_copy_is_not_good_whatever_else_was_found_of_it() -> None:
    good = dict(verdict='good', verified_at='2016-06-01T00:00:00Z', drill='restored and compared',
                drilled_at='2016-06-01T00:00:00Z')
    copy = a_copy(1, checks=dict(good, **FOUND))
    assert not copy.is_good and copy.trouble == 'SUSPECT, by the audit of 2016-05-01: MiB 5 of disk xvda is another'
    assert a_copy(1, checks=dict(good, **AUDITED)).is_good


def test_no_later_audit_lifts_what_one_has_found(tmp_path: Any) -> None:
    catalog, copy = Catalog(str(tmp_path)), a_copy(1, mark='ab' * 32)
    for facts in (AUDITED, FOUND, dict(AUDITED, audited_at='2016-06-01T00:00:00Z'), dict(FOUND, audit_reason='MiB 9'),
                  dict(verdict='good', verified_at='2016-06-02T00:00:00Z')):
        catalog.record(copy, **facts)
    found = catalog.with_checks(copy)
    assert found is not None and {key: found.checks[key] for key in FOUND} == FOUND and found.checks['verdict'] == 'good'


def test_what_the_manifest_of_a_copy_tells_of_others_holds_without_any_record_and_keeps_that_copy() -> None:
    copies = history('fddffff')
    copies[3] = copies[3]._replace(audit=('MiB 5 of disk xvda is another', tuple(copy.name for copy in copies[1:3])))
    seen = with_accusations(copies)
    assert [number for number, copy in enumerate(seen, 1) if copy.suspicion] == [2, 3]
    assert {audit_words(copy, seen) for copy in seen[1:3]} == {'SUSPECT'}

    def gone(among: Sequence[Copy]) -> List[int]:
        verdicts = judge(among, US_UUID, Method.VM, [Rules(1)], NIGHT)
        return [number for number, verdict in enumerate(verdicts, 1) if not verdict.keep]

    assert gone(seen) == [1, 5, 6]
    seen[1] = seen[1]._replace(checks=FOUND)
    assert gone(seen) == [1, 5, 6]
    seen[2] = seen[2]._replace(checks=FOUND)
    assert gone(seen) == [1, 4, 5, 6]


@pytest.mark.parametrize('ledger, suspects, expected', [
    (a_ledger(), {}, ''), (a_ledger(), {'accused': 'MiB 5'}, VmBackup.DISTRUST),
    (a_ledger(), {'checks': FOUND}, VmBackup.DISTRUST),
    (a_ledger(current=None), {'accused': 'MiB 5'}, ''), (a_ledger(distrust='so it was'), {'accused': 'MiB 5'}, 'so it was'),
    (a_ledger(current=a_reference(copy='backup-2016-05-01-000000')), {'accused': 'MiB 5'}, '')])
def test_a_ledger_whose_copy_is_suspect_was_not_told_that_differences_are_not_believed(ledger: Any, suspects: Any,
                                                                                       expected: str) -> None:
    assert distrust_of(ledger, [a_copy(4), COPY._replace(**suspects)]) == expected


@pytest.mark.parametrize('reading, words', [
    ([], ''),
    ([DIFFERENCE], 'read by difference'),
    ([DIFFERENCE, ('xvdb', 'difference', '')], 'read by difference'),
    ([FULL], 'read whole, as a full is made'),
    ([('xvda', 'full', '')], 'read whole'),
    ([ALL, ('xvdb', 'all', 'it was so')], 'read whole, as it was so'),
    ([ALL, ('xvdb', 'all', 'why not')], 'xvda read whole, as it was so; xvdb read whole, as why not'),
    ([DIFFERENCE, ('xvdb', 'all', 'why not'), ('xvdc', 'all', 'why not')],
     'read by difference; xvdb, xvdc read whole, as why not')])
def test_how_disks_were_read_in_words(reading: Any, words: str) -> None:
    assert reading_words(reading) == words


@pytest.mark.parametrize('reading, is_told', [
    ([], False), ([('xvda', 'full', '')], False),
    ([('xvda', 'all', VmBackup.COMPARED), ('xvdb', 'all', VmBackup.NOT_IN_BASE)], False),
    ([DIFFERENCE], True), ([FULL], True), ([('xvda', 'all', VmBackup.COMPARED), ('xvdb', 'all', 'it was so')], True)])
def test_how_disks_were_read_is_told_where_references_are_kept(reading: Any, is_told: bool) -> None:
    assert is_reading_told(reading) is is_told


SECOND = ('xvdb', 'all', 'it was so')


@pytest.mark.parametrize('nights, warned', [
    ([], []), ([[ALL], [ALL]], []), ([[ALL]] * 3, ['xvda']), ([[ALL]] * 5, ['xvda']), ([[ALL], [ALL], [DIFFERENCE], [ALL]], []),
    ([[DIFFERENCE], [ALL], [ALL], [ALL]], ['xvda']), ([[ALL], [('xvda', 'all', 'why not')], [ALL]], []),
    ([[ALL], [], [ALL], [ALL]], []), ([[('xvda', 'full', 'it was so')], [ALL], [ALL]], ['xvda']),
    ([[('xvda', 'all', '')]] * 3, []),
    ([[ALL, SECOND], [DIFFERENCE, SECOND], [ALL, SECOND]], ['xvdb']), ([[SECOND, ALL]] * 3, ['xvda', 'xvdb']),
    ([[ALL], [SECOND], [ALL]], [])])
def test_three_nights_of_one_reason_are_a_warning_and_two_are_not(nights: Any, warned: List[str]) -> None:
    assert repeated_reasons(nights) == ['disk %s was read whole 3 nights in a row, as it was so.' % key for key in warned]


# --- Rows: what a difference tells, and what there is -------------------------------------------------------------------------

STATES = st.dictionaries(st.integers(0, 9), st.sampled_from([ZERO] + [digest(b'%d' % number) for number in range(3)]), max_size=6)


def rows_of(state: Dict[int, str], holder: str = '') -> List[Row]:
    return [Row(number, state[number], holder) for number in sorted(state)]


@given(STATES, STATES)
def test_the_first_mebibyte_that_two_lists_tell_otherwise_is_found(one: Dict[int, str], other: Dict[int, str]) -> None:
    differing = [number for number in range(10) if one.get(number, ZERO) != other.get(number, ZERO)]
    expected = min(differing, default=None)
    assert first_that_differs(rows_of(one, BASE), rows_of(other)) == expected == first_that_differs(rows_of(other), rows_of(one))


def test_lists_that_never_end_are_compared_as_they_come() -> None:
    same = (Row(number, digest(b'x'), '') for number in itertools.count())
    other = (Row(number, digest(b'y' if number == 10000 else b'x'), BASE) for number in itertools.count())
    assert first_that_differs(same, other) == 10000


@HEAVY
@given(disks(), st.sets(st.integers(0, 4)))
def test_what_a_difference_does_not_name_is_as_it_was_and_what_it_names_as_in_a_whole_reading(disk: Any, named: Any) -> None:
    size, old, new = disk
    before = {row.number: row for row in old}
    units = -(-size // (2 * MEBIBYTE))
    table = array('I', [7 if unit in named else VmBackup.VHD_NOT_PRESENT for unit in range(units)])
    came = {number: content for number, content in new.items() if number // 2 in named}
    rows, changed = model(size, [row for row in old if row.number // 2 in named], came, BASE)
    kept = [row._replace(holder=row.holder or BASE) for row in old if row.number // 2 not in named]
    expected = sorted(rows + kept, key=lambda row: row.number)
    for file in (File(), None):
        with a_list_of_blocks() as (blocks, text):
            state = DiskState('xvda', size, blocks, iter(old), BASE, file, table)  # type: ignore
            taken(state, came)
            blocks.end()
            assert read_rows(text(), state.begin, state.end) == expected
        assert state.present == sum(row.digest != ZERO for row in expected)
        assert state.holders - {''} == {row.holder for row in expected} - {''}
        assert file is None or is_same(file.units, changed) and file.is_complete and state.stored == len(changed)
    # the audit: a difference that names all that changed tells what there is, and one that does not is caught
    there = {number: digest(new[number]) for number in new}
    lies = [number for number in range(-(-size // MEBIBYTE)) if number // 2 not in named and there.get(number, ZERO) != (
        before[number].digest if number in before else ZERO)]
    assert first_that_differs(expected, rows_of(there)) == min(lies, default=None)


# --- A difference as a server streams it ---------------------------------------------------------------------------------------

DELTA = os.path.join(TESTS, 'conformance', 'recorded', 'delta')


def recorded(name: str) -> bytes:
    with gzip.open(os.path.join(DELTA, name + '.vhd.gz')) as file:
        return file.read()


def units_of(content: bytes, **facts: Any) -> Optional[List[int]]:
    """The units of 2 MiB that the check of an export finds in that difference; None for a full."""
    pieces = (memoryview(content)[at:at + 100000] for at in range(0, len(content), 100000))
    check = VmBackup.Check(VmBackup.check_vhd, None, [], **dict(dict(is_layer=True, virtual_size=16 * MEBIBYTE), **facts))
    check.read(VmBackup.Reader(pieces))
    return None if check.table is None else [unit for unit, place in enumerate(check.table) if place != VmBackup.VHD_NOT_PRESENT]


CHANGED = recorded('S2-base-S1')
NOTHING = recorded('S2-base-S2')


def test_a_recorded_difference_is_known_by_its_type_alone_and_a_full_is_none() -> None:
    assert units_of(NOTHING) == [] and units_of(recorded('S2-full')) is None
    changed = units_of(CHANGED)
    assert changed and len(CHANGED) == 3072 + len(changed) * (512 + 2 * MEBIBYTE)
    for content, facts in ((CHANGED, dict(is_layer=False)), (CHANGED, dict(virtual_size=18 * MEBIBYTE)), (CHANGED[:-512], {}),
                           (CHANGED + bytes(512), {}), (CHANGED[:-2 * MEBIBYTE - 1024] + CHANGED[-512:], {}), (b'', {})):
        with pytest.raises(VerificationError):
            units_of(content, **facts)


def test_a_difference_in_other_blocks_than_those_of_2_mib_is_refused() -> None:
    spoiled = bytearray(NOTHING)
    for place, value in ((512 + 28, 16), (512 + 32, MEBIBYTE), (512 + 36, 0)):          # entries, bytes of a block, checksum
        spoiled[place:place + 4] = value.to_bytes(4, 'big')
    spoiled[512 + 36:512 + 40] = (0xFFFFFFFF - sum(spoiled[512:1536])).to_bytes(4, 'big')
    with pytest.raises(VerificationError) as caught:
        units_of(bytes(spoiled))
    assert "doesn't fit a disk" in str(caught.value)


def test_a_bit_that_is_flipped_outside_of_the_data_is_refused() -> None:
    first = 2048 + 512                                  # behind the table
    places = list(range(0, first, 19)) + [first, first + 511, len(CHANGED) - 512, len(CHANGED) - 400, len(CHANGED) - 1]
    for place in places:
        spoiled = bytearray(CHANGED)
        spoiled[place] ^= 1 << place % 8
        with pytest.raises(VerificationError):
            units_of(bytes(spoiled))
            pytest.fail('byte %d' % place)


# --- Ledgers -----------------------------------------------------------------------------------------------------------------

LEDGERS = [a_ledger(), a_ledger(current=None), a_ledger(leaving=(a_reference(9 * DAY), a_reference(8 * DAY, uuid=uuid_of(9)))),
           a_ledger(current=None, distrust='it lied'),
           a_ledger(vm_name='w\u00e9b "one"\n', kind='vdi-export', config='file=\udcff')]


@pytest.mark.parametrize('ledger', LEDGERS)
def test_a_ledger_is_read_as_it_was_written_and_one_that_names_nothing_is_gone(tmp_path: Any, ledger: Ledger) -> None:
    catalog = Catalog(str(tmp_path))
    catalog.put_ledger(ledger)
    names = ledger.current or ledger.leaving or ledger.distrust
    assert catalog.ledger(POOL_UUID, US_UUID, ledger.kind) == (ledger if names else None)
    assert catalog.ledgers(POOL_UUID) == ([ledger] if names else [], [])
    assert catalog.ledgers(uuid_of(7)) == ([], []) and catalog.ledger(POOL_UUID, uuid_of(7), ledger.kind) is None
    catalog.put_ledger(ledger._replace(current=None, leaving=(), distrust=''))
    assert catalog.ledgers(POOL_UUID) == ([], [])


def facts_of(ledger: Ledger) -> Dict[str, Any]:
    """As its file has it."""
    return json.loads(json.dumps(dict(ledger._asdict(), format=1, current=ledger.current and ledger.current._asdict(),
                                      leaving=[one._asdict() for one in ledger.leaving])))


FACTS = facts_of(LEDGERS[2])
MAY_LACK = [('current',), ('leaving', 0), ('current', 'disks', 'xvda')]
PLACES = [(key,) for key in FACTS] + [(key, field) for key in ('current',) for field in FACTS['current']] + [
    ('leaving', 0), ('leaving', 0, 'at'), ('current', 'disks', 'xvda'), ('current', 'disks', 'xvda', 'size'),
    ('leaving', 1, 'disks', 'xvda', 'uuid')]


def changed_at(place: Sequence[Any], value: Any) -> Dict[str, Any]:
    facts = json.loads(json.dumps(FACTS))
    inside = facts
    for key in place[:-1]:
        inside = inside[key]
    if value is KeyError:
        del inside[place[-1]]
    else:
        inside[place[-1]] = value
    return facts


@pytest.mark.parametrize('place', PLACES, ids=lambda place: '.'.join(map(str, place)))
def test_a_ledger_that_lacks_something_or_has_it_otherwise_is_refused(place: Any) -> None:
    assert parse_ledger(json.dumps(FACTS).encode()) == LEDGERS[2]
    for value in (KeyError, [], {}, 5, 5.5, None, 'x', ['x'], {'x': 5}):
        facts = changed_at(place, value)
        if value is KeyError and place not in MAY_LACK or value == 'x' and place[-1] in ('kind', 'at'):
            with pytest.raises(ValueError):
                parse_ledger(json.dumps(facts).encode())
        with contextlib.suppress(ValueError):
            ledger = parse_ledger(json.dumps(facts).encode())
            assert facts_of(ledger) == dict(facts, current=facts.get('current'))


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) |
                    st.dictionaries(st.sampled_from(sorted(FACTS) + ['x']), inner, max_size=9), max_leaves=5)


@given(st.one_of(st.binary(max_size=60), st.integers(0, 600).map(lambda length: json.dumps(FACTS).encode()[:length]),
                 JSON.map(lambda value: json.dumps(value).encode())))
def test_garbage_is_no_ledger(content: bytes) -> None:
    with pytest.raises(ValueError):
        parse_ledger(content)


NOT_ITS_OWN = [json.dumps(dict(FACTS, **{key: value})).encode() for key, value in (
    ('vm', 'x'), ('pool', uuid_of(7)), ('kind', 'vdi-export'), ('kind', 'qcow2-export'))]


@pytest.mark.parametrize('content', [b'', b'{', b'[]', b'\0' * 100, b'{"a": ' + b'[' * 100000, b'x' * (MEBIBYTE + 1), None,
                                     *NOT_ITS_OWN])
def test_a_file_that_is_no_ledger_of_its_vm_is_told_with_its_path_and_hides_no_other(tmp_path: Any, content: Any) -> None:
    catalog = Catalog(str(tmp_path))
    other = a_ledger(vm=uuid_of(2), vm_name='db')
    catalog.put_ledger(other)
    path = tmp_path / '.vmbackup' / 'references' / POOL_UUID / a_ledger().file_name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    (path.parent / 'notes.txt').write_bytes(b'not a ledger')
    ledgers, problems = catalog.ledgers(POOL_UUID)
    assert ledgers == [other]
    for problem in problems:
        assert str(path) in str(problem) and '\n' not in str(problem) and len(str(problem)) < 900
    with pytest.raises(BadLedger) as caught:
        catalog.ledger(POOL_UUID, US_UUID, 'vm-export')
    assert [str(caught.value)] == [str(problem) for problem in problems]


# --- What is named as a reference in the pool ----------------------------------------------------------------------------------

def test_snapshots_are_known_by_the_name_of_a_reference_and_what_only_looks_alike_is_not() -> None:
    name = 'web (1) (VmBackup reference 2016-04-14 00:10:00, store 1f3a9c04)'
    records = {'OpaqueRef:web': {'uuid': US_UUID, 'name_label': 'web', 'is_a_snapshot': False}}  # type: Dict[str, Any]

    def add(label: Any, **facts: Any) -> None:
        records['OpaqueRef:%d' % len(records)] = dict(dict(
            uuid=uuid_of(0x50 + len(records)), name_label=label, is_a_snapshot=True), **facts)

    add(name)
    add(name.replace('web (1)', ''))
    assert list(named_references('VM', records, lambda record: [record['uuid'][::-1]])) == [
        NamedSnapshot('VM', uuid_of(0x51), name, (uuid_of(0x51)[::-1],), '2016-04-14-001000', '1f3a9c04'),
        NamedSnapshot('VM', uuid_of(0x52), name[len('web (1)'):], (uuid_of(0x52)[::-1],), '2016-04-14-001000',
                      '1f3a9c04')]
    for label in (None, 5, '', 'web', name + ' ', name[:-1], name.replace('1f3a9c04', '1F3A9C04'),
                  name.replace('00:10:00', '0:10:00'), name.replace('2016', '216'), name.replace(', store', ' store'),
                  name.replace('1f3a9c04', '1f3a9c045')):
        add(label)
    add(name, is_a_snapshot=False)
    add(name, is_a_snapshot='true')
    add(name, uuid=None)
    assert len(list(named_references('VM', records, lambda record: ()))) == 2


# --- The metadata of a copy that was read as a difference ----------------------------------------------------------------------

def an_object(kind: str, name: str, **record: Any) -> Dict[str, Any]:
    return {'class': kind, 'id': name, 'snapshot': record}


def a_drive(name: str, userdevice: str, disk: str, kind: str = 'Disk') -> Dict[str, Any]:
    return an_object('VBD', name, VM='Ref:1', VDI=disk, userdevice=userdevice, type=kind, currently_attached=True)


def a_vdi(name: str, number: int, **record: Any) -> Dict[str, Any]:
    return an_object('VDI', name, uuid=uuid_of(number), virtual_size=str(8 << 30), snapshot_of='OpaqueRef:NULL', **record)


def snapshot_of(objects: Sequence[Dict[str, Any]], drives: Sequence[Any], kept: Sequence[str]) -> Dict[str, Dict[str, Any]]:
    """The objects of the ova.xml for a snapshot of a VM with these (userdevice, number of the disk), of which it has `kept`."""
    disks = tuple(a_disk(device, vdi_uuid=uuid_of(number), vdi_ref='OpaqueRef:%d' % number) for device, number in drives)
    made = tuple(disk._replace(vdi_uuid=uuid_of(0x900 + int(disk.userdevice)), vdi_ref='OpaqueRef:s' + disk.userdevice,
                               snapshot_of=disk.vdi_ref, virtual_size=5 << 30) for disk in disks if disk.userdevice in kept)
    machine = a_vm('web', disks=disks)
    text = ova_text({'version': {}, 'objects': list(objects)})
    found = parse_ova(snapshot_ova(text, machine, machine._replace(uuid=uuid_of(0x77), name='web (backup)', disks=made)))
    assert len({entry['id'] for entry in found['objects']}) == len(found['objects'])
    return {entry['id']: entry['snapshot'] for entry in found['objects']}


MACHINE = an_object('VM', 'Ref:1', uuid=US_UUID, name_label='web', power_state='Suspended', suspend_VDI='Ref:8',
                    is_a_template=False, VBDs=['Ref:2', 'Ref:4', 'Ref:6'])


def test_the_metadata_are_the_snapshots_own_disks_drives_and_name() -> None:
    drives = [a_drive('Ref:2', '0', 'Ref:3'), a_drive('Ref:4', '1', 'Ref:5'), a_drive('Ref:6', '3', 'Ref:7', 'CD')]
    vdis = [a_vdi('Ref:3', 30), a_vdi('Ref:5', 31), a_vdi('Ref:7', 32), a_vdi('Ref:8', 33)]
    found = snapshot_of([MACHINE] + drives + vdis, [('0', 30), ('1', 31)], '01')
    assert set(found) == {'Ref:%d' % number for number in (1, 2, 3, 4, 5, 6, 7)}, 'no memory'
    assert {field: found['Ref:1'][field] for field in ('uuid', 'name_label', 'power_state', 'suspend_VDI', 'VBDs')} == dict(
        uuid=uuid_of(0x77), name_label='web (backup)', power_state='Halted', suspend_VDI='OpaqueRef:NULL',
        VBDs=['Ref:2', 'Ref:4', 'Ref:6'])
    assert [(found[disk]['uuid'], found[disk]['virtual_size'], found[disk]['is_a_snapshot']) for disk in ('Ref:3', 'Ref:5')] == [
        (uuid_of(0x900), str(5 << 30), True), (uuid_of(0x901), str(5 << 30), True)]
    assert found['Ref:7']['uuid'] == uuid_of(32) and not any(found[drive]['currently_attached'] for drive in ('Ref:2', 'Ref:6'))


def test_a_disk_that_is_left_out_is_not_in_the_metadata() -> None:
    found = snapshot_of([MACHINE, a_drive('Ref:2', '0', 'Ref:3'), a_drive('Ref:4', '1', 'Ref:5'), a_vdi('Ref:3', 30),
                         a_vdi('Ref:5', 31)], [('0', 30), ('1', 31)], '0')
    assert set(found) == {'Ref:1', 'Ref:2', 'Ref:3'} and 'Ref:4' not in found['Ref:1']['VBDs']


@pytest.mark.parametrize('kept', ['014', '01', '04'])
def test_of_a_disk_with_two_drives_the_metadata_have_what_the_snapshot_has(kept: str) -> None:
    found = snapshot_of([MACHINE, a_drive('Ref:2', '0', 'Ref:3'), a_drive('Ref:4', '1', 'Ref:5'), a_drive('Ref:6', '4', 'Ref:5'),
                         a_vdi('Ref:3', 30), a_vdi('Ref:5', 31)], [('0', 30), ('1', 31), ('4', 31)], kept)
    drives = {record['userdevice']: found[record['VDI']]['uuid'] for record in found.values() if 'userdevice' in record}
    assert drives == {device: uuid_of(0x900 + int(device)) for device in kept}
    assert sorted(record['uuid'] for record in found.values() if 'virtual_size' in record) == sorted(drives.values())


def test_metadata_that_do_not_tell_of_a_disk_of_the_snapshot_are_refused() -> None:
    with pytest.raises(VerificationError) as caught:
        snapshot_of([MACHINE, a_drive('Ref:2', '0', 'Ref:3'), a_vdi('Ref:3', 30)], [('0', 30), ('1', 31)], '01')
    assert 'do not tell of all disks' in str(caught.value)
