import pytest

from reports import text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "—"),
        (0, "0"),
        (0.61, "0.610"),
        (-12.34, "−12.3"),
        (0.00123, "0.00123"),
        (0.000012, "1.20e−05"),
        (999.6, "1000"),
        (123456, "123\u202f456"),
    ],
)
def test_number(value, expected):
    assert text.number(value) == expected


@pytest.mark.parametrize(
    ("value", "half_width", "expected"),
    [
        (0.00205, 0.026, "0.002 ± 0.026"),
        (-0.0153, 0.038, "−0.015 ± 0.038"),
        (0.22345, 0.0079, "0.2235 ± 0.0079"),
        (12.3, 4.56, "12.3 ± 4.6"),
        (1234.5, 120.0, "1234 ± 120"),
        (0.5, None, "0.500"),
        (None, 0.1, "—"),
    ],
)
def test_a_value_has_no_more_decimals_than_its_interval(value, half_width, expected):
    assert text.uncertain(value, half_width) == expected


def test_points_have_a_sign_unless_they_round_to_nothing():
    assert [text.points(v) for v in (-0.06, 0.0125, 0.0001, -0.0001, None)] == ["−6.0", "+1.2", "0.0", "0.0", "—"]


def test_units():
    assert text.percent(0.6612) == "66.1\u202f%"
    assert text.signed(0.5) == "+0.500"
    assert text.signed(-0.5) == "−0.500"
    assert text.ratio(1.309) == "1.31×"
    assert text.size(0) == "0\u202fB"
    assert text.size(1536) == "1.5\u202fKiB"
    assert text.size(5 * 2**40) == "5120.0\u202fGiB"
    assert text.duration(59.94) == "59.9\u202fs"
    assert text.duration(61) == "1\u202fmin 1\u202fs"
    assert text.duration(7325) == "2\u202fh 2\u202fmin"
    assert text.p_value(0.0004) == "< 0.001"
    assert text.interval(-0.1, None) == "—"
    assert text.interval(-0.1, 0.25) == "[−0.100, 0.250]"
