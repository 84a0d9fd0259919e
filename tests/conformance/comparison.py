"""What the real server said against what the simulated one says.

Refs, uuids, dates and addresses are never equal; they must be *used* equally: wherever the one server repeats an
id, the other one repeats the id that stands for it. `Names` learns these pairs as they are met.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections import OrderedDict
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

UUID = r'[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}'
DATE = r'\d{8}T\d\d:\d\d:\d\dZ'
EPOCH = '19700101T00:00:00Z'
TOKEN = re.compile('OpaqueRef:%s|%s|%s' % (UUID, UUID, DATE))
REF = re.compile('OpaqueRef:%s$' % UUID)
# Recorded on one host with this address; a host of the simulated pool listens on a loopback address.
ADDRESS = re.compile(r'192\.168\.77\.10|127\.0\.0\.1(:\d+)?')

SEXP_FIELD = re.compile(r"\('(\w+)' '((?:[^'\\]|\\.)*)'\)")

# What a server without an object says for it: as constant as a word.
NO_UUID = '00000000-0000-0000-0000-000000000000'


class Date(str):
    """A dateTime.iso8601 of the wire."""


class Difference(NamedTuple):
    path: str
    recorded: str
    simulated: str

    def __str__(self) -> str:
        return '%s\n    recorded:  %s\n    simulated: %s' % (self.path, self.recorded, self.simulated)


class Names:
    """Which id of the simulated pool stands for which recorded one."""

    def __init__(self) -> None:
        self.simulated: Dict[str, str] = {}
        self.recorded: Dict[str, str] = {}

    def same(self, recorded: str, simulated: str) -> bool:
        """The two stand for the same object; learned if neither was known."""
        if recorded not in self.simulated and simulated not in self.recorded:
            self.simulated[recorded] = simulated
            self.recorded[simulated] = recorded
        return self.simulated.get(recorded) == simulated

    def known(self, recorded: str, simulated: str) -> bool:
        return recorded in self.simulated and self.simulated[recorded] == simulated

    def translate(self, text: str) -> str:
        """The recorded text with the simulated pool's ids; one that stands for nothing stays."""
        return TOKEN.sub(lambda match: self.simulated.get(match.group(), match.group()), text)


class Comparison:
    """Collects the differences of one recording. `record_of` finds a simulated object, `recorded` the recorded ones."""

    def __init__(self, names: Names, recorded: Dict[str, Dict[str, Any]],
                 record_of: Callable[[str], Optional[Dict[str, Any]]]) -> None:
        self.names = names
        self.recorded = recorded
        self.record_of = record_of
        self.differences: List[Difference] = []

    def note(self, path: str, recorded: Any, simulated: Any) -> None:
        self.differences.append(Difference(path, shortened(recorded), shortened(simulated)))

    # --- text ---

    def text(self, recorded: str, simulated: str, path: str) -> None:
        """Equal, but for ids that stand for one another, dates and addresses."""
        if path.endswith('snapshot_metadata') and recorded and simulated:
            # A whole record as text: (('name' 'value') ...), compared field by field.
            self.struct(OrderedDict(SEXP_FIELD.findall(recorded)), OrderedDict(SEXP_FIELD.findall(simulated)), path)
            return
        left, right = ADDRESS.sub('ADDRESS', recorded), ADDRESS.sub('ADDRESS', simulated)
        ours, theirs = TOKEN.findall(left), TOKEN.findall(right)
        if TOKEN.split(left) != TOKEN.split(right) or not all(map(self.token, ours, theirs)):
            self.note(path, recorded, simulated)

    def token(self, recorded: str, simulated: str) -> bool:
        kinds = [0 if re.match(DATE, token) else 1 if token.startswith('OpaqueRef:') else 2
                 for token in (recorded, simulated)]
        if kinds[0] != kinds[1]:
            return False
        if kinds[0] == 0:
            return (recorded == EPOCH) == (simulated == EPOCH)
        if NO_UUID in (recorded, simulated):
            return recorded == simulated
        return self.names.same(recorded, simulated)

    def lines(self, recorded: Sequence[str], simulated: Sequence[str], path: str) -> None:
        """Same lines, compared one by one."""
        if len(recorded) != len(simulated):
            self.note(path + ' (number of lines)', '\n'.join(recorded), '\n'.join(simulated))
            return
        for number, (left, right) in enumerate(zip(recorded, simulated)):
            self.text(left, right, '%s line %d' % (path, number + 1))

    # --- values of the wire ---

    def value(self, recorded: Any, simulated: Any, path: str) -> None:
        if type(recorded) is not type(simulated):
            self.note(path, recorded, simulated)
        elif isinstance(recorded, str):
            self.text(recorded, simulated, path)
        elif isinstance(recorded, dict):
            self.struct(recorded, simulated, path)
        elif isinstance(recorded, list):
            self.array(recorded, simulated, path)
        elif recorded != simulated:
            self.note(path, recorded, simulated)

    def struct(self, recorded: Dict[str, Any], simulated: Dict[str, Any], path: str) -> None:
        if any(map(REF.match, recorded)):
            for left, right in self.pairs(list(recorded), list(simulated), path, recorded, simulated):
                self.value(recorded[left], simulated[right], '%s.<%s>' % (path, label(recorded[left], self.recorded.get)))
            return
        for key in recorded:
            if key not in simulated:
                self.note('%s.%s' % (path, key), recorded[key], 'no such member')
        for key in simulated:
            if key not in recorded:
                self.note('%s.%s' % (path, key), 'no such member', simulated[key])
        common = [key for key in recorded if key in simulated]
        if 'uuid' in recorded and common != [key for key in simulated if key in recorded]:
            self.note(path + ' (order of the fields)', ' '.join(recorded), ' '.join(simulated))
        for key in common:
            self.value(recorded[key], simulated[key], '%s.%s' % (path, key))

    def array(self, recorded: List[Any], simulated: List[Any], path: str) -> None:
        """In order, but for sets of refs: these come in the order of the refs, which are random."""
        if 'rror' not in path and recorded and all(isinstance(item, str) and REF.match(item) for item in recorded):
            for left, right in self.pairs(recorded, simulated, path):
                self.text(left, right, path)
            return
        if len(recorded) != len(simulated):
            self.note(path, recorded, simulated)
            return
        for index, (left, right) in enumerate(zip(recorded, simulated)):
            self.value(left, right, '%s[%d]' % (path, index))

    def pairs(self, recorded: List[str], simulated: List[str], path: str,
              recorded_records: Optional[Dict[str, Any]] = None,
              simulated_records: Optional[Dict[str, Any]] = None) -> List[Tuple[str, str]]:
        """Who stands for whom in two sets of refs: those known, then those of one kind and place, then what is left."""
        left = [ref for ref in recorded if ref not in self.names.simulated]
        right = [ref for ref in simulated if ref not in self.names.recorded]
        pairs = [(ref, self.names.simulated[ref]) for ref in recorded
                 if ref in self.names.simulated and self.names.simulated[ref] in simulated]
        paired = {pair[1] for pair in pairs}
        lost = [ref for ref in recorded if ref in self.names.simulated and self.names.simulated[ref] not in simulated]
        right += [ref for ref in simulated if ref in self.names.recorded and ref not in paired]

        def describe(ref: str, given: Optional[Dict[str, Any]], find: Callable[[str], Optional[Dict[str, Any]]]) -> str:
            return label((given or {}).get(ref) or find(ref), find)

        ours = {ref: describe(ref, recorded_records, self.recorded.get) for ref in left}
        theirs = {ref: describe(ref, simulated_records, self.record_of) for ref in right}
        for exactly in (True, False):
            for ref in list(left):
                for other in right:
                    if (ours[ref] == theirs[other]) if exactly else (not ours[ref] or not theirs[other]):
                        pairs.append((ref, other))
                        left.remove(ref)
                        right.remove(other)
                        break
        for ref in left + lost:
            self.note('%s.<%s>' % (path, describe(ref, recorded_records, self.recorded.get)), ref, 'no such object')
        for ref in right:
            self.note('%s.<%s>' % (path, describe(ref, simulated_records, self.record_of)), 'no such object', ref)
        return pairs


def label(record: Optional[Dict[str, Any]], find: Callable[[str], Optional[Dict[str, Any]]]) -> str:
    """What tells an object from the others of its class, in words; empty if nothing is known of it."""
    if record is None:
        return ''
    for place in ('userdevice', 'device'):
        if 'VM' in record and place in record:
            return '%s %s' % (label(find(record['VM']), find), record[place])
    if 'is_a_snapshot' in record:
        return record['name_label'] + (' (snapshot)' if record['is_a_snapshot'] else '')
    if 'body' in record:
        return TOKEN.sub('', record['body'])
    return record.get('name_label') or record.get('hostname') or record.get('device') or ''


# --- Reading what came over the wire --------------------------------------------------------------------------------

def parse_response(body: str) -> Any:
    """The value of a methodResponse, with each type of the wire as a type of its own."""
    root = ElementTree.fromstring(body.encode('utf-8'))
    return parse_value(root.find('params/param/value'))


def parse_value(element: Any) -> Any:
    if len(element) == 0:
        return element.text or ''
    item = element[0]
    if item.tag == 'boolean':
        return item.text == '1'
    if item.tag == 'double':
        return float(item.text)
    if item.tag == 'dateTime.iso8601':
        return Date(item.text)
    if item.tag == 'array':
        return [parse_value(value) for value in item.find('data')]
    if item.tag == 'struct':
        return OrderedDict((member.find('name').text or '', parse_value(member.find('value'))) for member in item)
    raise ValueError('the real server never sends <%s>' % item.tag)


def shortened(value: Any, limit: int = 400) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else '%s... (%d characters)' % (text[:limit], len(text))


# --- Records as `xe` prints them ------------------------------------------------------------------------------------

FIELD = re.compile(r'^ *(\S.*?) \( ?(RO|RW|SRO|SRW|MRO|MRW)\)( \[DEPRECATED\])? *: (.*)$', re.DOTALL)


def blocks_of(text: str) -> Optional[List[List[str]]]:
    """The records in the output of a list command, a list of lines each; None if it is something else."""
    if not text.endswith('\n\n\n'):
        return None
    blocks = [block.split('\n') for block in text[:-3].split('\n\n\n')]
    return blocks if all(FIELD.match(block[0]) for block in blocks) else None


def sort_key(block: Sequence[str]) -> str:
    return TOKEN.sub('', '\n'.join(line for line in block if 'name' in line) + '\n'.join(block))
