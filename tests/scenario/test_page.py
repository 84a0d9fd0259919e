"""The page: looked at in a browser, with pools of any size and names of any kind."""

import os
from typing import Any

import pytest

import VmBackup as program
from support import browser, pages
from support.deeds import backup, without_pool
from support.language import MEBIBYTE, at, vm

WIDTHS = (360, 1280)


@pytest.fixture(scope='module')
def a_browser() -> None:
    problem = browser.problem()
    if problem:
        pytest.skip(problem)


@pytest.mark.xdist_group('browser')
@pytest.mark.usefixtures('a_browser')
@pytest.mark.parametrize('is_dark', [False, True])
@pytest.mark.parametrize('number, is_hostile', [(0, False), (1, False), (14, False), (14, True), (500, False)])
def test_the_page_can_be_read_by_everybody(number: int, is_hostile: bool, is_dark: bool) -> None:
    text = program.page_text(pages.page(number, is_hostile, nights=30 if number else 0))
    assert len(text.encode('utf-8')) < 2 * MEBIBYTE and '<script' not in text and browser.POLICY.search(text)
    for width, seen in zip(WIDTHS, browser.look(text, WIDTHS, is_dark, with_axe=number < 500)):
        assert seen['dark'] == is_dark and seen['inner'] == width
        assert seen['scroll'] <= width, 'the page itself never scrolls sideways'
        assert seen['met'] == [] and seen['images'] == 0
        assert seen['contrast']['ratio'] >= 4.5, seen['contrast']
        assert not seen['axe'], seen['axe']
        assert 'This page was made on 2026-03-14 at' in seen['shown']
        assert not is_hostile or '<script>alert(1)</script>' in seen['shown'] and 'x' * 255 in seen['shown']


# --- the page that the program writes --------------------------------------------------------------------------------

def page_of(shelf: Any) -> str:
    with open(os.path.join(shelf.home, 'page.html'), encoding='utf-8') as file:
        return file.read()


def test_a_round_writes_a_page_that_says_what_failed_and_what_lies_there(a_pool: Any, a_shelf: Any) -> None:
    pool = a_pool(vm('web'), vm('<b>db</b>'), vm('left alone'), faults=[at('http:/export', object='<b>db</b>', breaks_off_after=MEBIBYTE)])
    shelf = a_shelf()
    lines = ('vm-export=web', 'vm-export="<b>db</b>"', 'report_html=%s' % os.path.join(shelf.home, 'page.html'))
    assert backup(pool, shelf, *lines).exit_status == 1
    page = page_of(shelf)
    assert '1 of 2 VMs backed up in their last round, 2 things to look after' in page
    assert '&lt;b&gt;db&lt;/b&gt;' in page and '<b>db' not in page and 'left alone' in page and 'has no good copy' in page
    assert '%s, ' % shelf.copies('web')[0][len('backup-'):] in page and 'kept' not in page.split('VMs in no backup')[1]
    assert os.stat(os.path.join(shelf.home, 'page.html')).st_mode & 0o777 == 0o644


def test_report_writes_the_page_anew_as_all_stands_now(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db')), a_shelf()
    lines = ('vm-export=*', 'report_html=%s' % os.path.join(shelf.home, 'page.html'))
    assert without_pool(shelf, 'report', lines=lines).exit_status == 0
    assert 'No round of this config is on record yet' in page_of(shelf)
    assert backup(pool, shelf, *lines).exit_status == 0
    assert '2 of 2 VMs backed up in their last round, nothing to look after' in page_of(shelf)
    with open(shelf.at('web', shelf.copies('web')[0], 'web.xva'), 'r+b') as image:
        image.seek(4096)
        image.write(b'rot')
    assert without_pool(shelf, 'verify', lines=lines).exit_status == 1
    calls = len(pool.journal())
    assert without_pool(shelf, 'report', lines=lines).exit_status == 0 and len(pool.journal()) == calls
    page = page_of(shelf)
    assert 'web (' in page and 'found it DAMAGED' in page and 'has no good copy' in page
    assert without_pool(shelf, 'report', lines=['vm-export=*']).exit_status == 2


def test_a_page_that_can_not_be_written_is_a_warning_and_nothing_more(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web')), a_shelf()
    run = backup(pool, shelf, 'vm-export=*', 'report_html=%s' % os.path.join(shelf.home, 'not there', 'page.html'))
    assert run.exit_status == 3 and run.says('report_html') and shelf.has('web', complete=1), run.output


def test_a_round_of_vms_chosen_by_hand_says_nothing_of_the_others(a_pool: Any, a_shelf: Any) -> None:
    pool, shelf = a_pool(vm('web'), vm('db'), vm('left alone')), a_shelf()
    lines = ('vm-export=web', 'vm-export=db', 'report_html=%s' % os.path.join(shelf.home, 'page.html'))
    assert backup(pool, shelf, *lines).exit_status == 0
    assert backup(pool, shelf, *lines, words=['vm-export=web', 'force=yes']).exit_status == 0
    listed = page_of(shelf).split('VMs in no backup')[1]
    assert 'left alone' in listed and 'db (' not in listed
