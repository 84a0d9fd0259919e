"""Recorded requests and commands done again in a simulated pool, and compared."""

import json
import os
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from typing import Any, Dict, List, Optional, Sequence, Tuple

import pytest

import archives
import recordings
from comparison import Comparison, Difference, Names, blocks_of, parse_response, sort_key
from recordings import ApiCall, Command, Exchange, Exemptions
from support.process import CRON_PATH, Pool, Run, run
from support.wire import exchange

TIME_LIMIT_S = 60
REF_ARGUMENT = re.compile('<string>(OpaqueRef:[0-9a-f-]+)</string>')


class Outcome:
    """What became of one recording: not replayed for a reason, or replayed with these differences."""

    def __init__(self, reason: str = '', differences: Sequence[Difference] = ()) -> None:
        self.reason = reason
        self.differences = list(differences)


class Replay:
    """A pool that is as the recorded server was, and what has been learned of who stands for whom."""

    def __init__(self, folder: str, pool_file: str, work_dir: str) -> None:
        with open(os.path.join(recordings.RECORDED, pool_file), encoding='utf-8') as file:
            self.pool = Pool(json.load(file))
        self.names = Names()
        self.exemptions = Exemptions(folder)
        self.work_dir = work_dir
        self.recorded_objects = recorded_objects(folder)
        for name in ('backups', 'mnt', 'small'):
            os.mkdir(os.path.join(work_dir, name))
        self.outcomes: Dict[str, Outcome] = {}
        self.objects: Optional[Dict[str, Dict[str, Any]]] = None

    # --- one recording ---

    def step(self, name: str) -> Outcome:
        """The recording has been done again, unless differences.txt says why not."""
        reason = self.exemptions.not_replayed(name)
        if reason:
            self.outcomes[name] = Outcome(reason)
            return self.outcomes[name]
        self.objects = None
        comparison = Comparison(self.names, self.recorded_objects, self.record_of)
        recording = recordings.read(name)
        try:
            if isinstance(recording, ApiCall):
                self.api_call(recording, comparison)
            elif isinstance(recording, Command):
                self.command(recording, comparison)
            else:
                self.exchange(recording, comparison)
        except (OSError, ValueError, EOFError, ElementTree.ParseError, subprocess.SubprocessError, AssertionError) as error:
            comparison.note('replay', 'goes through', '%s: %s' % (type(error).__name__, error))
        differences = [difference for difference in comparison.differences
                       if not self.exemptions.excuse(name, difference.path)]
        self.outcomes[name] = Outcome('', differences)
        return self.outcomes[name]

    def record_of(self, ref: str) -> Optional[Dict[str, Any]]:
        """The simulated object, of whatever class."""
        if self.objects is None:
            self.objects = {one: record for table in self.pool.dump().values() for one, record in table.items()}
        return self.objects.get(ref)

    # --- XML-RPC ---

    def api_call(self, recorded: ApiCall, comparison: Comparison) -> None:
        content = self.names.translate(recorded.request).encode('utf-8')
        request = b'POST / HTTP/1.0\r\nContent-Type: text/xml\r\nContent-Length: %d\r\n\r\n' % len(content) + content
        answer = exchange(self.pool.socket_of(), request).decode('utf-8')
        head, _, body = answer.partition('\r\n\r\n')
        compare_headers(recorded.headers, head.split('\r\n'), comparison)
        if not body.startswith('<?xml version="1.0"?><methodResponse><params><param><value><struct>'):
            comparison.note('beginning of the body', recorded.body, body)
            return
        comparison.value(parse_response(recorded.body), parse_response(body), 'answer')

    # --- xe ---

    def command(self, recorded: Command, comparison: Comparison) -> None:
        result = self.run_xe(recorded)
        if result.exit_status != recorded.exit_status:
            comparison.note('exit status', recorded.exit_status, result.exit_status)
        if '--minimal' in recorded.words:
            result = result._replace(stdout=self.in_order_of(recorded.stdout, result.stdout))
        self.output(recorded.stdout, self.recorded_paths(result.stdout), 'stdout', comparison)
        self.output(recorded.stderr, self.recorded_paths(result.stderr), 'stderr', comparison)

    def in_order_of(self, recorded: str, simulated: str) -> str:
        """The simulated list (`a,b,c`) as far as possible in the order of the recorded one."""
        wanted = self.names.translate(recorded.strip()).split(',')
        if not simulated.strip():
            return simulated
        return ','.join(sorted(simulated.strip().split(','), key=lambda item: (item not in wanted, wanted.index(item)
                                                                               if item in wanted else 0))) + '\n'

    def run_xe(self, recorded: Command) -> Run:
        words = list(recorded.words)
        while words[0] in ('timeout', '60', 'bash', '-c'):
            words.pop(0)
        if words[-1] == '</dev/null':
            words.pop()
        arguments = [self.simulated_paths(self.names.translate(word)) for word in words[1:]]
        return run([os.path.join(self.pool.dir, 'bin', 'xe')] + arguments, self.environment(), TIME_LIMIT_S,
                   stdin_of(recorded), cwd=self.work_dir)

    def environment(self) -> Dict[str, str]:
        return {'PATH': CRON_PATH}

    def simulated_paths(self, word: str) -> str:
        # The recorded host's address is nobody's here: one of this machine where nothing listens, as there when it was dead.
        return re.sub(r'(^|=)/(backups|mnt|small)\b', r'\1%s/\2' % self.work_dir, word.replace('192.168.77.10', '127.0.0.200'))

    def recorded_paths(self, text: str) -> str:
        return text.replace(self.work_dir, '')

    def output(self, recorded: str, simulated: str, path: str, comparison: Comparison) -> None:
        kept = re.match(r'\((\d+) bytes: (\S+)\)\n$', recorded)
        if kept:
            archives.compare(kept.group(2), simulated.encode('utf-8', 'surrogateescape'), comparison)
            return
        ours, theirs = blocks_of(recorded), blocks_of(simulated)
        if ours is None or theirs is None:
            comparison.lines(recorded.split('\n'), simulated.split('\n'), path)
            return
        # Objects come in the order of the server's tables, which means nothing.
        if len(ours) != len(theirs):
            comparison.note(path + ' (number of records)', len(ours), len(theirs))
            return
        rest = sorted(theirs, key=sort_key)
        for left in sorted(ours, key=lambda block: (self.names.translate(block[0]) == block[0], sort_key(block))):
            first = self.names.translate(left[0])
            right = next((block for block in rest if block[0] == first), rest[0])
            rest.remove(right)
            compare_block(left, right, path, comparison)

    # --- HTTP ---

    def exchange(self, recorded: Exchange, comparison: Comparison) -> None:
        request = self.names.translate(recorded.request.decode('utf-8')).encode('utf-8')
        answer = exchange(('127.0.0.1', int(self.pool.url_of().rsplit(':', 1)[1])), request)
        compare_answers(recorded, answer, comparison)

    # --- the replay as a whole ---

    def play(self, steps: Sequence[str]) -> 'Replay':
        """All these recordings have been done again, in this order."""
        self.pool.start()
        for name in steps:
            self.step(name)
        return self

    def demand(self, name: str) -> None:
        """The recording was reproduced; otherwise the test fails and shows the differences."""
        if self.outcomes[name].differences:
            pytest.fail('\n'.join(str(difference) for difference in self.outcomes[name].differences), pytrace=False)

    def remove(self) -> None:
        self.pool.remove()


def replayed(folder: str) -> List[str]:
    """The recordings of a folder that differences.txt does not leave out."""
    exemptions = Exemptions(folder)
    return [name for name in recordings.names(folder) if not exemptions.not_replayed(name)]


def demand_no_stale_rows(replay: Replay) -> None:
    """Every row of differences.txt for these recordings excused something."""
    stale = ['%s | %s' % (row.recordings, row.path) for row in replay.exemptions.stale()]
    if stale:
        pytest.fail('rows of differences.txt that excuse nothing:\n' + '\n'.join(stale), pytrace=False)


def compare_block(recorded: List[str], simulated: List[str], path: str, comparison: Comparison) -> None:
    """One record as `xe` prints it, field by field; a set's members in any order."""
    ours, theirs = fields_of(recorded), fields_of(simulated)
    names = [value for name, value in ours if name.endswith('name-label ( RW)')]
    path = '%s.<%s>' % (path, names[0] if names else '')
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        comparison.lines([name for name, _ in ours], [name for name, _ in theirs], path + ' (fields)')
    values = dict(theirs)
    for name, value in ours:
        if name not in values:
            continue
        left, right = value.split('; '), values[name].split('; ')
        place = '%s.%s' % (path, name.split(' (')[0].strip())
        if len(left) > 1 and len(left) == len(right):
            known = comparison.names.translate
            for one, other in zip(sorted(left, key=known), sorted(right)):
                comparison.text(one, other, place)
        else:
            comparison.text(value, values[name], place)


def fields_of(block: Sequence[str]) -> List[Tuple[str, str]]:
    """(`        name-label ( RW)`, value): the name with its spaces, so that the layout is compared too."""
    fields: List[Tuple[str, str]] = []
    for line in block:
        name, separator, value = line.partition('): ')
        if separator and '(' in name:
            fields.append((name + ')', value))
        elif re.match(r'.*\) \[DEPRECATED\]: ', line):
            name, _, value = line.partition(' [DEPRECATED]: ')
            fields.append((name + ' [DEPRECATED]', value))
        elif fields:
            # The value goes on: it has a newline in it.
            fields[-1] = (fields[-1][0], fields[-1][1] + '\n' + line)
        else:
            fields.append((line, ''))
    return fields


def compare_headers(recorded: Sequence[str], simulated: Sequence[str], comparison: Comparison) -> None:
    """Status line and headers, in order, with their very letters; a length is compared by what it belongs to."""
    def masked(lines: Sequence[str]) -> List[str]:
        return [re.sub(r'(?i)^(content-length:) *\d+', r'\1 N', line) for line in lines]
    comparison.lines(masked(recorded), masked(simulated), 'headers')


def compare_answers(recorded: Exchange, answer: bytes, comparison: Comparison) -> None:
    head, _, body = recorded.response.partition(b'\r\n\r\n')
    answer_head, _, answer_body = answer.partition(b'\r\n\r\n')
    compare_headers(head.decode('utf-8').split('\r\n'), answer_head.decode('utf-8', 'replace').split('\r\n'), comparison)
    if recorded.total > len(recorded.response):
        # A long body, of which the recording has the beginning only.
        if len(answer) != recorded.total:
            comparison.note('length of the answer', recorded.total, len(answer))
        kind = body[:4]
        if answer_body[:4] != kind:
            comparison.note('beginning of the body', body[:16], answer_body[:16])
        return
    comparison.text(body.decode('utf-8', 'replace'), answer_body.decode('utf-8', 'replace'), 'body')


def stdin_of(recorded: Command) -> Optional[bytes]:
    """What was fed to the command."""
    return archives.fed(recorded.name) if 'stdin: a pipe' in recorded.note else None


def recorded_objects(folder: str) -> Dict[str, Dict[str, Any]]:
    """Every record that is in an answer of the folder, by its ref."""
    objects: Dict[str, Dict[str, Any]] = {}
    for name in recordings.names(folder):
        recording = recordings.read(name)
        if not isinstance(recording, ApiCall):
            continue
        value = parse_response(recording.body).get('Value')
        if '.get_record<' in recording.request and isinstance(value, dict):
            objects.setdefault(REF_ARGUMENT.findall(recording.request)[1], value)
        elif isinstance(value, dict):
            objects.update((ref, record) for ref, record in value.items()
                           if isinstance(record, dict) and ref not in objects)
    return objects
