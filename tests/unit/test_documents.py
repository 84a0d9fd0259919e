"""What README, example.cfg and the help say is what the program does."""

import os
import re

import pytest

from VmBackup import (ACTIONS, OPTIONS, ExitStatus, asked_help, example_text, option_default_text,
                      option_values_text)

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
GOLDEN = os.path.join(ROOT, 'tests', 'golden')


def text_of(*names):
    with open(os.path.join(ROOT, *names), encoding='utf-8') as file:
        return file.read()


def readme_row(option):
    return '| `%s` | %s | %s | %s |' % (option.name, option_values_text(option), option_default_text(option), option.help)


@pytest.mark.parametrize('option', OPTIONS, ids=lambda option: option.name)
def test_readme_has_the_row_of_each_option(option):
    assert readme_row(option) in text_of('README.md').splitlines()


def test_readme_lists_no_key_that_does_not_exist():
    rows = re.findall(r'^\| `([a-z_-]+)` \| .* \| .* \| .* \|$', text_of('README.md'), re.MULTILINE)
    assert rows == [option.name for option in OPTIONS]


def test_readme_tells_every_exit_status_and_action():
    readme = text_of('README.md')
    assert all('\n| %d |' % status in readme for status in ExitStatus)
    assert all('`%s`' % action.name in readme for action in ACTIONS)


def test_every_link_inside_readme_leads_to_a_section():
    readme = text_of('README.md')
    titles = re.findall(r'^#+ (.+)$', re.sub(r'^ {4}.*$', '', readme, flags=re.MULTILINE), re.MULTILINE)
    anchors = {re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles}
    links = re.findall(r'\]\(#([^)]*)\)', readme)
    assert links and [link for link in links if link not in anchors] == []


def test_readme_leads_those_who_come_from_naubackup_from_its_first_lines_to_their_page():
    first, rest = text_of('README.md').split('\n## ', 1)
    assert '(#coming-from-naubackup)' in first.split('**On a host')[0]
    page = rest.split('\n## Coming from NAUbackup\n')[1].split('\n## ')[0]
    assert [row[:3] for row in page.splitlines() if re.match('[0-9]', row)] == ['1. ', '2. ', '3. ']
    assert page.index('wildcards=regex') < page.index('exit status') < page.index('max_backups')


def test_the_example_config_is_the_one_that_help_prints():
    assert text_of('example.cfg') == example_text()


@pytest.mark.parametrize('words', [['help'], ['help', 'config'], ['help', 'restore'], ['help', 'verify']],
                         ids=lambda words: '-'.join(words))
def test_the_help_reads_as_it_was_reviewed(words):
    path = os.path.join(GOLDEN, '-'.join(words) + '.txt')
    found = asked_help(words) + '\n'
    if os.environ.get('VMBACKUP_REWRITE_GOLDEN'):
        with open(path, 'w', encoding='utf-8') as file:
            file.write(found)
    assert found == text_of('tests', 'golden', '-'.join(words) + '.txt')


def test_the_table_of_the_suite_names_every_file_of_tests():
    there = {name for folder in ('scenario', 'traps', 'conformance')
             for name in os.listdir(os.path.join(ROOT, 'tests', folder)) if name.startswith('test_')}
    told = set(re.findall(r'`(?:\w+/)?(test_\w+\.py)`', text_of('tests', 'README.md')))
    assert told == there | {'test_chains.py', 'test_layers.py', 'test_layout.py', 'test_documents.py'}
