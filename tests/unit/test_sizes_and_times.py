"""Sizes, durations and times as people read them."""

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from VmBackup import format_duration, format_size, format_utc, parse_utc

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


@pytest.mark.parametrize('size, text', [
    (0, '0 B'), (640, '640 B'), (1023, '1023 B'), (KIB, '1.0 KiB'), (17 * MIB, '17 MiB'), (MIB * 1.25, '1.2 MiB'),
    (int(1.2 * GIB), '1.2 GiB'), (812 * GIB, '812 GiB'), (TIB, '1.0 TiB'), (5000 * TIB, '5000 TiB')])
def test_a_size_is_said_as_people_say_it(size, text):
    assert format_size(size) == text


@given(st.integers(0, 1 << 60))
def test_a_size_in_words_is_near_the_truth(size):
    number, unit = format_size(size).split(' ')
    said = float(number) * {'B': 1, 'KiB': KIB, 'MiB': MIB, 'GiB': GIB, 'TiB': TIB}[unit]
    assert abs(said - size) <= max(0.06 * size, 0)


@pytest.mark.parametrize('seconds, text', [
    (0, '0 s'), (3.9, '3 s'), (59, '59 s'), (60, '1 min 0 s'), (250, '4 min 10 s'), (3599, '59 min 59 s'),
    (3600, '1 h 0 min'), (5 * 3600 + 12 * 60 + 59, '5 h 12 min'), (86400, '1 d 0 h'), (51 * 3600, '2 d 3 h')])
def test_a_duration_is_said_as_people_say_it(seconds, text):
    assert format_duration(seconds) == text


@given(st.datetimes(datetime(1970, 1, 1), datetime(2999, 1, 1)), st.integers(-14, 14))
def test_a_time_on_record_is_read_back_to_the_second_whatever_the_time_zone(at, hours):
    aware = at.replace(tzinfo=timezone(timedelta(hours=hours)))
    assert parse_utc(format_utc(aware)) == aware.replace(microsecond=0)
    assert format_utc(aware).endswith('Z')


@pytest.mark.parametrize('text', ['', 'yesterday', '2016-04-14', '2016-04-14T00:10:00', '2016-04-14T25:10:00Z',
                                  '2016-04-14T00:10:00+02:00'])
def test_a_time_that_we_did_not_write_is_refused(text):
    with pytest.raises(ValueError):
        parse_utc(text)
