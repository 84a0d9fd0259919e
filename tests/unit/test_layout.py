"""VmBackup.py can be read from top to bottom: each section uses only itself and those above, and has its own doors."""

import ast
import builtins
import functools
import glob
import os
import re
import subprocess
from typing import Dict, Iterator, List, NamedTuple, Set, Tuple

import pytest

import VmBackup

PATH = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), 'VmBackup.py')
with open(PATH, 'rb') as file:
    RAW = file.read()
LINES = RAW.decode('utf-8').splitlines()
RULE = '# ' + '=' * 77


class Section(NamedTuple):
    """A section: its number, its title and the line of its title, counted from 1."""
    number: int
    title: str
    line: int


def sections() -> List[Section]:
    found = []
    for index, line in enumerate(LINES):
        match = re.match(r'# ([0-9]+)\. (.+)\Z', line)
        if match and LINES[index - 1] == RULE:
            found.append(Section(int(match.group(1)), match.group(2), index + 1))
    return found


SECTIONS = sections()


def section_of(line: int) -> int:
    """The number of the section that the line lies in, 0 above the first."""
    return max([section.number for section in SECTIONS if section.line <= line], default=0)


def number_of(title: str) -> int:
    (number,) = [section.number for section in SECTIONS if section.title == title]
    return number


def targets(node: ast.AST) -> Iterator[str]:
    """The names that a statement of the module binds."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        for alias in node.names:
            yield (alias.asname or alias.name).split('.')[0]
    else:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                yield inner.id


# Every worker imports this file, and few read the program by it: a tree of it is large, and slow to make.
@functools.lru_cache(maxsize=None)
def tree() -> ast.Module:
    return ast.parse(RAW, PATH)


@functools.lru_cache(maxsize=None)
def nodes() -> List[ast.AST]:
    return list(ast.walk(tree()))


@functools.lru_cache(maxsize=None)
def defined() -> Dict[str, int]:
    """The line of the statement that defines each name of the module first."""
    found = {}                                               # type: Dict[str, int]
    for statement in tree().body:
        for name in targets(statement):
            found.setdefault(name, statement.lineno)
    return found


@pytest.fixture(scope='module', autouse=True)
def forgotten_at_the_end() -> Iterator[None]:
    yield
    for one in (tree, nodes, defined, uses):
        one.cache_clear()


class Uses(ast.NodeVisitor):
    """The uses of names of the module: (name, line, is it inside a function's body), shadowed ones left out."""

    def __init__(self) -> None:
        self.found = []                                      # type: List[Tuple[str, int, bool]]
        self._local = [set()]                                # type: List[Set[str]]
        self._depth = 0

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and node.id in defined() and not any(node.id in names for names in self._local):
            self.found.append((node.id, node.lineno, self._depth > 0))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for outside in node.decorator_list + node.args.defaults + [one for one in node.args.kw_defaults if one] + annotations(node):
            self.visit(outside)
        self._inside(node.args, node.body)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for outside in node.args.defaults:
            self.visit(outside)
        self._inside(node.args, [node.body])

    def _inside(self, arguments: ast.arguments, body: List[ast.AST]) -> None:
        names = {one.arg for one in arguments.args + arguments.kwonlyargs + [arguments.vararg, arguments.kwarg] if one}
        for statement in body:
            for inner in ast.walk(statement):
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                    names.add(inner.id)
                elif isinstance(inner, ast.ExceptHandler) and inner.name:
                    names.add(inner.name)
                elif isinstance(inner, ast.Import):
                    names.update(targets(inner))
        self._local.append(names)
        self._depth += 1
        for statement in body:
            self.visit(statement)
        self._depth -= 1
        self._local.pop()


def annotations(node: ast.FunctionDef) -> List[ast.AST]:
    arguments = node.args.args + node.args.kwonlyargs + [node.args.vararg, node.args.kwarg]
    return [one for one in [argument.annotation for argument in arguments if argument] + [node.returns] if one]


@functools.lru_cache(maxsize=None)
def uses() -> List[Tuple[str, int, bool]]:
    visitor = Uses()
    visitor.visit(tree())
    return visitor.found


def attribute_uses(module: str) -> Iterator[Tuple[str, int]]:
    """Each `module.name` of the file with its line."""
    for node in nodes():
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module:
            yield node.attr, node.lineno


def places(rows: List[Tuple[str, int]]) -> List[str]:
    return ['%s in line %d, section %d' % (name, line, section_of(line)) for name, line in rows]


# --- sections --------------------------------------------------------------------------------------------------------

def test_the_sections_are_numbered_in_order_between_full_rules():
    assert [section.number for section in SECTIONS] == list(range(1, len(SECTIONS) + 1))
    for section in SECTIONS:
        assert LINES[section.line] == RULE, section


def test_every_section_begins_with_what_it_is_for():
    for section in SECTIONS:
        assert LINES[section.line + 1].startswith('# '), section


def test_the_map_in_the_docstring_names_the_sections_as_they_stand():
    text = ast.get_docstring(tree())
    for section in SECTIONS:
        assert re.search(r'(?<![0-9])%d\.? +%s' % (section.number, re.escape(section.title)), text), section


#: Which sections may name what stands behind a door, by the door's title: not whoever happens to stand below it.
MAY_NAME = {
    'Pool': ('Ownership', 'Run', 'Backup', 'Restore', 'Extract and drill', 'Post', 'Reports', 'main'),
    'Post': ('Reports', 'Commands'),
    'Ownership': ('Run', 'Backup', 'Restore', 'Extract and drill', 'Commands'),
    'Reports': ('Commands', 'main'),
    'Commands': ('main',),
}


def test_the_parts_of_the_map_hold_all_sections_in_order():
    text = ast.get_docstring(tree())
    parts = [(match.group(1), text.index(match.group())) for match in re.finditer(r'(?m)^    ([IV]+)\. +\S', text)]
    assert [name for name, _ in parts] == ['I', 'II', 'III', 'IV', 'V', 'VI']
    assert [int(number) for number in re.findall(r'(?m)^ {9,10}([0-9]+)\. ', text)] == list(range(1, len(SECTIONS) + 1))


def test_where_to_change_what_names_what_stands_there():
    text = ast.get_docstring(tree())
    table = text[text.index('Where do I change what?'):text.index('Exit statuses:')]
    named = [(name, int(number)) for names, number in re.findall(r'([A-Za-z_]+(?:(?:, | and | or )[A-Za-z_]+)*) \((\d+)\)', table)
             for name in re.split(r', | and | or ', names) if name in defined()]
    assert len(named) >= 12
    assert [(name, number, section_of(defined()[name])) for name, number in named if section_of(defined()[name]) != number] == []


def test_only_those_who_may_name_what_stands_behind_a_door():
    titles = {section.number: section.title for section in SECTIONS}
    wrong = ['%s (%s) is used in line %d (%s)' % (name, titles[section_of(defined()[name])], line, titles[section_of(line)])
             for name, line, _ in uses() if section_of(defined()[name]) != section_of(line)
             and titles.get(section_of(line)) not in MAY_NAME.get(titles.get(section_of(defined()[name]), ''),
                                                                  (titles.get(section_of(line)),))]
    assert not wrong, '\n'.join(wrong)


def test_no_section_uses_a_name_from_one_below():
    wrong = ['%s (section %d) is used in line %d, section %d' % (name, section_of(defined()[name]), line, section_of(line))
             for name, line, _ in uses() if section_of(defined()[name]) > section_of(line)]
    assert not wrong, '\n'.join(wrong)


def test_outside_of_function_bodies_a_name_stands_before_its_use():
    wrong = ['%s (line %d) is used in line %d' % (name, defined()[name], line) for name, line, is_inside in uses()
             if not is_inside and defined()[name] > line]
    assert not wrong, '\n'.join(wrong)


def test_every_name_of_the_module_is_defined_once():
    names = [name for statement in tree().body if not isinstance(statement, (ast.If, ast.Import, ast.ImportFrom))
             for name in targets(statement)]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_every_name_that_is_used_is_defined_somewhere():
    known = set(defined()) | set(dir(builtins)) | {'__name__', '__file__', '__doc__'}
    bound = {node.id for node in nodes() if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes() if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes()
              if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)) and node.name}
    bound |= {name for node in nodes() if isinstance(node, (ast.Import, ast.ImportFrom)) for name in targets(node)}
    assert sorted({node.id for node in nodes() if isinstance(node, ast.Name)} - known - bound) == []


def test_nothing_is_imported_or_defined_in_vain():
    used = {node.id for node in nodes() if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    used.update(re.findall(r'\w+', ' '.join(re.findall(r'# type: (.*)', '\n'.join(LINES)))))
    used.update(re.findall(r'"(\w+)"', '\n'.join(LINES)))                  # annotations that name what stands below
    assert sorted(set(defined()) - used - {'NEEDS'}) == []


# --- doors -----------------------------------------------------------------------------------------------------------

def test_programs_are_started_in_their_section_only_and_never_through_a_shell():
    doors = [(name, line) for name, line in attribute_uses('subprocess') if name not in ('PIPE', 'DEVNULL', 'STDOUT')]
    doors += [(name, line) for name, line in attribute_uses('os')
              if re.match(r'system\Z|popen\Z|fork|exec|spawn|posix_spawn', name)]
    assert not places([row for row in doors if section_of(row[1]) != number_of('Programs')])
    shells = [keyword for node in nodes() if isinstance(node, ast.Call) for keyword in node.keywords
              if keyword.arg == 'shell']
    assert not shells


def test_the_pool_is_spoken_to_in_its_section_only():
    lines = [node.lineno for node in nodes()
             if isinstance(node, ast.Import) and any(alias.name == 'XenAPI' for alias in node.names)
             or isinstance(node, ast.ImportFrom) and node.module == 'XenAPI'
             or isinstance(node, ast.Name) and node.id == 'XenAPI']
    assert lines and {section_of(line) for line in lines} == {number_of('Pool')}
    assert not [node for node in tree().body if isinstance(node, (ast.Import, ast.ImportFrom)) and 'XenAPI' in targets(node)]


def test_nothing_is_printed_but_by_the_log():
    assert not [node.lineno for node in nodes() if isinstance(node, ast.Name) and node.id == 'print']
    written = [row for row in attribute_uses('sys') if row[0] in ('stdout', 'stderr')]
    assert not places([row for row in written if section_of(row[1]) not in (number_of('Process'), number_of('main'))])


def test_names_in_the_file_system_are_changed_in_storage_only():
    doors = [row for row in attribute_uses('os')
             if row[0] in ('rename', 'renames', 'replace', 'unlink', 'remove', 'rmdir', 'removedirs', 'mkdir', 'makedirs', 'link',
                           'symlink', 'truncate')]
    doors += [row for row in attribute_uses('shutil') if row[0] not in ('which', 'disk_usage')]
    assert doors
    assert not places([row for row in doors if section_of(row[1]) != number_of('Storage')])


def test_behind_the_storage_door_no_error_of_the_system_is_caught_where_copies_are_read_or_made():
    """What the system says of the store is a CatalogError there. Config and password files, mail and the pool's
    connections have doors of their own."""
    behind = [number_of(title) for title in ('Copies', 'Ownership', 'Backup', 'Verify and prune', 'Restore', 'Extract and drill')]
    caught = [('OSError', node.lineno) for node in nodes() if isinstance(node, ast.Name) and section_of(node.lineno) in behind
              and node.id in ('OSError', 'IOError', 'EnvironmentError', 'FileNotFoundError', 'FileExistsError', 'PermissionError')]
    assert not places(caught)


def test_what_time_it_is_is_asked_in_one_place():
    doors = [row for row in attribute_uses('time') if row[0] not in ('sleep', 'monotonic')]
    doors += [row for row in attribute_uses('datetime') if row[0] in ('now', 'utcnow', 'today')]
    assert not places([row for row in doors if section_of(row[1]) != number_of('Process')])


def test_mail_is_sent_in_its_section_only():
    assert not places([row for row in attribute_uses('smtplib') if section_of(row[1]) != number_of('Post')])


def test_who_lists_copies_does_not_pay_for_what_speaks_to_pools_and_mail_servers():
    at_the_top = {name for node in tree().body if isinstance(node, (ast.Import, ast.ImportFrom)) for name in targets(node)}
    assert at_the_top & {'email', 'smtplib', 'ssl', 'http', 'xmlrpc', 'xml', 'difflib', 'traceback'} == set()
    assert not places([row for module in ('ssl', 'http', 'xmlrpc') for row in attribute_uses(module) if section_of(row[1])
                       not in [number_of(title) for title in ('Pool', 'Post', 'Image formats')]])


def test_pure_sections_touch_nothing():
    pure = [number_of(title) for title in ('Values', 'Sizes, times and names', 'Settings', 'Selection and plan', 'Retention')]
    outside = ('os', 'sys', 'time', 'socket', 'shutil', 'subprocess', 'signal', 'fcntl', 'select', 'threading')
    touched = [(module + '.' + name, line) for module in outside for name, line in attribute_uses(module)
               if section_of(line) in pure and name not in ('fsdecode', 'fsencode')]
    touched += [(node.id, node.lineno) for node in nodes() if isinstance(node, ast.Name) and node.id == 'open'
                and section_of(node.lineno) in pure]
    assert not places(touched)


def test_exits_are_taken_on_the_last_lines_only():
    doors = [row for module in ('sys', 'os') for row in attribute_uses(module) if row[0] in ('exit', '_exit', 'abort')]
    assert not places([row for row in doors if section_of(row[1]) != number_of('main')])


# --- what an old Python makes of it --------------------------------------------------------------------------------------

def test_the_file_is_pure_ascii():
    # Python 2 would refuse the first other byte before it came to the line that tells what is needed.
    RAW.decode('ascii')


def test_the_first_statement_is_the_one_that_python_2_cannot_read():
    first = [node for node in tree().body if not (isinstance(node, ast.Expr) and node is tree().body[0])][0]
    assert isinstance(first, ast.AnnAssign) and first.target.id == 'NEEDS'
    assert first.lineno < SECTIONS[0].line
    assert VmBackup.NEEDS == 'VmBackup needs Python 3.6 or newer: write /usr/bin/python3 in the crontab'
    assert len([line for line in LINES if line.startswith('NEEDS')]) == 1


def python_2() -> str:
    root = os.environ.get('PYENV_ROOT') or os.path.expanduser('~/.pyenv')
    found = sorted(glob.glob(os.path.join(glob.escape(root), 'versions', '2.7.*', 'bin', 'python')))
    return found[-1] if found else ''


@pytest.mark.skipif(not python_2(), reason='no Python 2.7 was found under $PYENV_ROOT or ~/.pyenv')
def test_python_2_shows_the_sentence_that_says_what_is_needed():
    answer = subprocess.run([python_2(), PATH, 'password', 'weekend.cfg'], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert answer.returncode != 0 and answer.stdout == b''
    text = answer.stderr.decode('ascii')
    assert VmBackup.NEEDS in text and 'SyntaxError' in text


# --- prose -----------------------------------------------------------------------------------------------------------------

def test_every_class_and_function_for_others_says_what_is_true_afterwards():
    silent = [node.name for node in tree().body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
              and not node.name.startswith('_') and not ast.get_docstring(node)]
    assert silent == []


def test_no_line_is_too_long_to_be_read_beside_another():
    assert [number for number, line in enumerate(LINES, 1) if len(line) > 110] == []


def test_no_work_is_left_to_do_in_comments():
    assert [number for number, line in enumerate(LINES, 1) if re.search(r'\b(TODO|FIXME|XXX)\b', line)] == []
