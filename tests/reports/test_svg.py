from xml.etree import ElementTree

import pytest

from reports.svg import Axis, ForestRow, Point, Series, forest, layer_strip, line_chart, linear_ticks, log_ticks, tag


def parse(chart):
    return ElementTree.fromstring(str(chart))


def chart(points, y=None, **more):
    return parse(line_chart("A title", [Series("half", 1, points)], Axis("step"), y or Axis("loss"), **more))


def numbers(root, tag_name, attribute):
    return [float(e.get(attribute)) for e in root.iter(tag_name)]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-6.3, 2.2), (0.61, 0.62), (3, 3), (0, 0), (1e-7, 2e-7), (12, 98_000)]
)
def test_linear_ticks_cover_the_range_evenly(low, high):
    ticks = linear_ticks(low, high)
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 8
    steps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps))


@pytest.mark.parametrize(("low", "high"), [(0.6, 11), (1, 1), (0.002, 900), (5, 5.1), (1, 1000)])
def test_log_ticks_cover_the_range(low, high):
    ticks = log_ticks(low, high)
    assert ticks[0] <= low * 1.0001 and ticks[-1] >= high * 0.9999
    assert 2 <= len(ticks) <= 12


def test_text_and_attributes_are_escaped():
    assert tag("text", '<b> & "', data_note='"><script>') == (
        '<text data-note="&#34;&gt;&lt;script&gt;">&lt;b&gt; &amp; &#34;</text>'
    )


def test_a_chart_is_an_image_with_a_title():
    root = chart([Point(0, 2.0), Point(10, 1.0)])
    assert root.get("role") == "img"
    assert root[0].tag == "title" and root[0].text == "A title"


def test_larger_values_are_drawn_higher_and_further_right():
    root = chart([Point(0, 1.0), Point(5, 2.0), Point(10, 4.0)])
    marks = [e for e in root.iter("circle")][1:]  # the first is the legend's
    xs, ys = [float(m.get("cx")) for m in marks], [float(m.get("cy")) for m in marks]
    assert xs == sorted(xs) and ys == sorted(ys, reverse=True)
    assert len(set(xs)) == 3


def test_a_logarithmic_axis_gives_equal_ratios_equal_distances_and_drops_zero():
    root = chart([Point(0, 1.0), Point(1, 10.0), Point(2, 100.0), Point(3, 0.0)], Axis("loss", log=True))
    ys = [float(m.get("cy")) for m in root.iter("circle")][1:]
    assert len(ys) == 3
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)


def test_everything_stays_inside_the_frame():
    root = chart([Point(0, -5.0, -9.0, -1.0), Point(3, 70.0, 60.0, 90.0)], rule=100.0)
    width, height = float(root.get("width")), float(root.get("height"))
    for attribute, limit in (("x1", width), ("x2", width), ("y1", height), ("y2", height)):
        assert all(0 <= v <= limit for v in numbers(root, "line", attribute))


def test_long_numbers_leave_room_for_the_name_of_their_axis():
    def first_number(largest):
        ticks = [e for e in chart([Point(0, 0.0), Point(1, largest)]).iter("text") if e.get("text-anchor") == "end"]
        return min(float(e.get("x")) - 6 * len(e.text) for e in ticks)

    assert first_number(80_000.0) >= 18 and first_number(1.0) >= 18  # the axis's name is written about x = 13


def test_points_that_belong_to_no_line_and_a_series_without_a_name():
    points = [Point(0, 1.0), Point(1, 2.0)]
    root = parse(line_chart("A title", [Series("", 0, points, joined=False)], Axis("layer"), Axis("score")))
    assert not list(root.iter("polyline")) and len(list(root.iter("circle"))) == 2


def test_names_in_a_forest_do_not_meet():
    label, name, note = "truthfulqa_mc1_100, n=100", "three-quarters", "+0.0750 [+0.0718, +0.0784]"
    root = parse(forest("Differences", [ForestRow(label, name, 1, 0.0, -1.0, 1.0, note, True)], Axis("points")))
    behind = [e for e in root.iter("text") if e.text == note]
    assert float(behind[0].get("x")) + 6 * len(note) <= float(root.get("width"))
    left, right = (next(e for e in root.iter("text") if e.text == text) for text in (label, name))
    assert float(left.get("x")) + 6.8 * len(label) < float(right.get("x")) - 6.6 * len(name)


def test_a_constant_series_and_an_empty_one_can_be_drawn():
    assert chart([Point(1, 3.0)]).get("role") == "img"
    assert chart([]).get("role") == "img"


def test_forest_rows_stand_where_their_numbers_say():
    rows = [
        ForestRow("mmlu", "half", 1, -2.0, -6.0, 2.0, "−2.0 [−6.0, +2.0]", True),
        ForestRow("mmlu", "quarter", 2, -8.0, -12.0, -4.0, "−8.0 [−12.0, −4.0]", False),
    ]
    root = parse(forest("Differences", rows, Axis("points"), delta=-2.0))
    lines = {e.get("class"): e for e in root.iter("line")}
    whiskers = [e for e in root.iter("line") if e.get("class") == "whisker"]
    zero, margin = float(lines["zero"].get("x1")), float(lines["rule"].get("x1"))
    assert float(whiskers[0].get("x1")) < margin < zero < float(whiskers[0].get("x2"))
    assert float(whiskers[1].get("x2")) < margin
    assert float(whiskers[0].get("y1")) < float(whiskers[1].get("y1"))


def test_layer_strip_fills_what_was_replaced():
    cells = [e.get("class") for e in parse(layer_strip("layers", 4, [1, 3], 2)).iter("rect")]
    assert cells == ["cell filled s2", "cell", "cell filled s2", "cell"]
