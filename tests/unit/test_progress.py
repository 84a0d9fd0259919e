"""The lines of progress: what they tell, and how they fit into a terminal of any size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from VmBackup import columns, figures, fitted, progress_lines, progress_row

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
FULL = ('web', '3/14', '43 %', '812/1,890 GiB', '212 MB/s', '1 h 24 min left')


@pytest.mark.parametrize('samples, size, told', [
    ([(0, 0), (0.5, 5)], 0, ('', '5 B', '', '')),
    ([(0, 0), (10, 200e6)], 0, ('', '191 MiB', '20 MB/s', '')),
    ([(100, 700 * GIB), (130, 706 * GIB)], 1890 * GIB, ('37 %', '706/1,890 GiB', '215 MB/s', '1 h 38 min left')),
    ([(0, 0), (10, 25e6)], 100 * MIB, ('23 %', '23/100 MiB', '2.5 MB/s', '31 s left')),
    ([(0, 0), (10, 0)], 100 * MIB, ('0 %', '0/100 MiB', '0.0 MB/s', '')),           # nobody knows how long
    ([(0, 0), (0.2, 0)], 100 * MIB, ('0 %', '0/100 MiB', '', '')),                  # too early to tell
    ([(0, 0), (1, 100 * MIB)], 100 * MIB, ('99 %', '100/100 MiB', '105 MB/s', '')),
    ([(0, 0), (1, 101 * MIB)], 100 * MIB, ('99 %', '100/100 MiB', '106 MB/s', '')),  # an archive is more than its disks
    ([(0, 0), (1, 3)], 9, ('33 %', '3/9 B', '0.0 MB/s', '2 s left')),
    ([(0, 0), (1, 0)], 64 * TIB, ('0 %', '0/64 TiB', '0.0 MB/s', '')),
])
def test_figures_are_told_where_they_are_known(samples, size, told):
    samples = [(at_s, int(count)) for at_s, count in samples]
    assert figures(samples, size) == told


@given(st.lists(st.integers(0, 1 << 42), min_size=2, max_size=20), st.integers(1, 1 << 42))
def test_percent_never_falls_and_is_never_all(counts, size):
    counts.sort()
    told = [int(figures([(0, 0), (number + 1, count)], size)[0][:-2]) for number, count in enumerate(counts)]
    assert told == sorted(told) and 0 <= told[0] and told[-1] <= 99


@pytest.mark.parametrize('subject, doing, known, row', [
    (('web', '3/14'), 'the export of web (1a2b3c4d)', FULL[2:], FULL),
    (('web', '3/14'), 'the snapshot of web (1a2b3c4d)', (), ('web', '3/14', 'the snapshot')),
    (('web', '3/14'), 'reading web.xva back', ('', '12 GiB', '300 MB/s', ''),
     ('web', '3/14', 'reading web.xva back, 12 GiB, 300 MB/s')),
    (('', '2/5'), 'verifying web/backup-1', FULL[2:], ('verifying web/backup-1', '2/5') + FULL[2:]),
    (('', ''), 'waiting', (), ('waiting', ''))])
def test_a_row_says_what_is_done_where_that_is_not_the_export_itself(subject, doing, known, row):
    assert progress_row(subject[0], subject[1], doing, known) == row


@pytest.mark.parametrize('width, line', [
    (80, 'web 3/14  43 %  812/1,890 GiB  212 MB/s  1 h 24 min left'),
    (57, 'web 3/14  43 %  812/1,890 GiB  212 MB/s  1 h 24 min left'),
    (55, 'web 3/14  43 %  212 MB/s  1 h 24 min left'),
    (40, 'web 3/14  43 %  1 h 24 min left'),
    (30, 'web  43 %  1 h 24 min left'),
    (20, 'web  43 %'), (8, 'w\u2026  43 %'), (6, '43 %'), (3, '43\u2026'), (1, '\u2026'), (0, '')])
def test_what_is_least_important_goes_first(width, line):
    assert progress_lines([FULL], width, 9, True) == [line]


def test_a_long_name_is_cut_and_the_amount_goes_before_it_is_cut_too_short():
    row = ('accounting-of-the-whole-company',) + FULL[1:]
    assert [progress_lines([row], width, 9, True)[0] for width in (90, 70, 60, 40, 36, 30)] == [
        'accounting-of-the-whole-company 3/14  43 %  812/1,890 GiB  212 MB/s  1 h 24 min left',
        'accounting-of-th\u2026 3/14  43 %  812/1,890 GiB  212 MB/s  1 h 24 min left',
        'accounting-of-the-who\u2026 3/14  43 %  212 MB/s  1 h 24 min left',
        'accounting-\u2026 3/14  43 %  1 h 24 min left',
        'accounting-o\u2026  43 %  1 h 24 min left',
        'accounting-of-the-whole\u2026  43 %']


def test_the_parts_of_several_lines_stand_below_each_other():
    rows = [FULL, ('accounting', '10/14', '7 %', '1/40 GiB', '98 MB/s', '9 min 0 s left'), ('db', '4/14', 'the snapshot'),
            ('\u65e5\u672c\u8a9e', '5/14', '', '12 GiB', '5.0 MB/s', '')]
    assert progress_lines(rows, 80, 9, True) == [
        'web         3/14  43 %  812/1,890 GiB  212 MB/s  1 h 24 min left',
        'accounting 10/14   7 %       1/40 GiB   98 MB/s  9 min 0 s left',
        'db          4/14  the snapshot',
        '\u65e5\u672c\u8a9e      5/14               12 GiB  5.0 MB/s']


@pytest.mark.parametrize('most, lines', [
    (4, ['a', 'b', 'c', 'd']), (3, ['a', 'b', 'and 2 more']), (2, ['a', 'and 3 more']), (1, ['and 4 more'])])
def test_of_more_rows_than_lines_the_last_line_says_how_many(most, lines):
    assert progress_lines([(name, '') for name in 'abcd'], 40, most, True) == lines


def test_a_terminal_that_knows_ascii_only_gets_nothing_else():
    row = ('b\u00fccher \u65e5\u672c',) + FULL[1:]
    assert progress_lines([row], 80, 9, False)[0].startswith('b\\xfccher \\u65e5\\u672c 3/14  ')
    assert progress_lines([row], 24, 9, False) == ['b\\xfccher \\u65e...  43 %']


def test_what_stands_behind_a_name_from_right_to_left_stays_there():
    assert progress_lines([('\u05e9\u05e8\u05ea',) + FULL[1:3]], 40, 9, True) == ['\u05e9\u05e8\u05ea\u200e 3/14  43 %']


@pytest.mark.parametrize('text, wide', [('web', 3), ('\u65e5\u672c', 4), ('e\u0301', 1), ('\U0001f4e7', 2), ('\uff76', 1),
                                        ('\uff21', 2), ('a\u200eb', 2), ('', 0)])
def test_columns_are_counted_as_terminals_do(text, wide):
    assert columns(text) == wide


@given(st.lists(st.one_of(
    st.tuples(st.text(max_size=50), st.just('3/14')),
    st.tuples(st.text(max_size=50), st.just('3/14'), st.text(max_size=50)),
    st.tuples(st.text(max_size=50), st.just('3/14'), st.just('43 %'), st.text('0123456789', max_size=9),
              st.just('1 MB/s'), st.just('1 s left')),
), max_size=12), st.integers(0, 130), st.integers(1, 20), st.booleans())
def test_lines_fit_whatever_the_names_are_and_hold_nothing_that_moves_a_cursor(rows, width, most, is_utf8):
    lines = progress_lines(rows, width, most, is_utf8)
    assert len(lines) == min(len(rows), most)
    for line in lines:
        assert columns(line) <= width and line.replace('\u200e', '').isprintable(), line
        assert is_utf8 or all(ord(char) < 128 for char in line)


@given(st.text(), st.integers(0, 40), st.sampled_from(['\u2026', '...']))
def test_a_text_that_is_cut_ends_with_the_mark(text, width, mark):
    cut = fitted(text, width, mark)
    assert columns(cut) <= width and (cut == text or cut.endswith(mark[:width])) and len(cut) <= 4 * width + 3
