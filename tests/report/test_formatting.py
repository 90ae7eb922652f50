import math

import pytest

from qatlora.report.formatting import (
    format_bytes,
    format_figure,
    format_large_count,
    format_seconds,
    format_share,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0.0, "0"), (2.0, "2"), (8234.0, "8,234"), (0.15, "0.15"), (9.8123, "9.812"),
        (4.1e-5, "4.1e-05"), (1234567.5, "1.23e+06"), (-0.014, "-0.014"), (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)  # fmt: skip
def test_figures_have_four_digits_and_no_noise(value, text):
    assert format_figure(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(10.0, "10.00"), (14.9, "14.90"), (0.0, "0"), (4096, "4,096"), (8234.4, "8234")],
)
def test_measured_figures_keep_their_decimals(value, text):
    assert format_figure(value, decimals=True) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"), (1.0, "100 %"), (0.9999999, "> 99.99 %"), (1e-7, "< 0.01 %"),
        (0.0223, "2.23 %"), (0.99994, "99.99 %"), (None, "–"),
    ],
)  # fmt: skip
def test_only_exact_shares_are_shown_as_none_or_all(share, text):
    assert format_share(share) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(17, "17 B"), (4_200, "4.20 kB"), (241_388_544, "241 MB"), (5_900_000_000, "5.90 GB")],
)
def test_bytes_have_decimal_units(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(64, "64"), (1_500, "1.5 k"), (268_098_176, "268 M"), (31e9, "31 B")]
)
def test_large_counts_are_rounded(count, text):
    assert format_large_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.24, "8.2 s"), (59.97, "1 min 00 s"), (312.4, "5 min 12 s"), (7380.0, "2 h 03 min")],
)
def test_times_are_read_at_a_glance(seconds, text):
    assert format_seconds(seconds) == text
