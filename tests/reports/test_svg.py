from xml.etree import ElementTree

import pytest

from reports.svg import (
    MARKERS,
    SLOTS,
    Absent,
    Axis,
    Bar,
    Cell,
    ForestRow,
    Point,
    Rule,
    Series,
    dots,
    forest,
    heat_map,
    key,
    key_shapes,
    layer_strip,
    line_chart,
    linear_ticks,
    log_ticks,
    marker,
    stacked_bars,
    tag,
)


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
    assert root[1].tag == "desc" and root[1].text == "loss, against step."


def test_larger_values_are_drawn_higher_and_further_right():
    root = chart([Point(0, 1.0), Point(5, 2.0), Point(10, 4.0)])
    marks = [e for e in root.iter("use")][1:]  # the first is the legend's
    xs, ys = [float(m.get("x")) for m in marks], [float(m.get("y")) for m in marks]
    assert xs == sorted(xs) and ys == sorted(ys, reverse=True)
    assert len(set(xs)) == 3


def test_a_logarithmic_axis_gives_equal_ratios_equal_distances_and_drops_zero():
    root = chart([Point(0, 1.0), Point(1, 10.0), Point(2, 100.0), Point(3, 0.0)], Axis("loss", log=True))
    ys = [float(m.get("y")) for m in root.iter("use")][1:]
    assert len(ys) == 3
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)


def test_everything_stays_inside_the_frame():
    root = chart(
        [Point(0, -5.0, -9.0, -1.0), Point(3, 70.0, 60.0, 90.0)], levels=[Rule(100.0)], uprights=[Rule(9.0, "far")]
    )
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
    root = parse(line_chart("A title", [Series("", 1, points, joined=False)], Axis("layer"), Axis("score")))
    assert not list(root.iter("polyline")) and len(list(root.iter("use"))) == 2


def test_long_names_and_notes_make_a_forest_wider_and_leave_room_for_the_intervals():
    name, note = "three-quarters-then-one-eighth-of-the-attention", "+0.0750 [+0.0718, +0.0784]"
    root = parse(forest("D", [ForestRow("mmlu", name, 1, 0.0, -1.0, 1.0, note, True)], Axis("points"), zero="teacher"))
    written = {e.text: float(e.get("x")) for e in root.iter("text")}
    ticks = [float(e.get("x1")) for e in root.iter("line") if e.get("class") == "grid"]
    assert written[name] - 6.6 * len(name) >= 0 and written[name] < min(ticks)
    assert max(ticks) < written[note] and written[note] + 7 * len(note) <= float(root.get("width"))
    assert max(ticks) - min(ticks) >= 200


def test_a_constant_series_and_an_empty_one_can_be_drawn():
    assert chart([Point(1, 3.0)]).get("role") == "img"
    assert chart([]).get("role") == "img"


def test_forest_rows_stand_where_their_numbers_say():
    rows = [
        ForestRow("mmlu", "half", 1, -2.0, -6.0, 2.0, "−2.0 [−6.0, +2.0]", True),
        ForestRow("mmlu", "quarter", 2, -8.0, -12.0, -4.0, "−8.0 [−12.0, −4.0]", False),
    ]
    root = parse(forest("Differences", rows, Axis("points"), zero="teacher", delta=-2.0))
    lines = {e.get("class"): e for e in root.iter("line")}
    whiskers = [e for e in root.iter("line") if e.get("class") == "bar"]
    zero, margin = float(lines["zero"].get("x1")), float(lines["rule"].get("x1"))
    assert float(whiskers[0].get("x1")) < margin < zero < float(whiskers[0].get("x2"))
    assert float(whiskers[1].get("x2")) < margin
    assert float(whiskers[0].get("y1")) < float(whiskers[1].get("y1"))


def test_the_margin_is_named_beside_the_baseline():
    row = ForestRow("mmlu", "half", 1, -2.0, -6.0, 2.0, "−2.0", True)
    for delta, name in ((-2.0, "−δ"), (2.0, "δ")):
        words = {e.text: e for e in parse(forest("D", [row], Axis("points"), zero="A/half", delta=delta)).iter("text")}
        sides = {words["A/half"].get("text-anchor"), words[name].get("text-anchor")}
        assert sides == {"start", "end"}  # away from each other


def test_an_upright_stands_at_its_value_with_its_label_on_the_side_that_has_room():
    points = [Point(1, 1.0), Point(1000, 2.0)]
    series, x = [Series("half", 1, points)], Axis("tokens", log=True)
    root = parse(line_chart("A", series, x, Axis("loss"), uprights=[Rule(900, "late end"), Rule(2, "early")]))
    rules = sorted(float(e.get("x1")) for e in root.iter("line") if e.get("class") == "rule")
    early, late = (next(e for e in root.iter("text") if e.text == text) for text in ("early", "late end"))
    assert rules[0] < float(early.get("x")) and early.get("text-anchor") == "start"
    assert float(late.get("x")) < rules[1] and late.get("text-anchor") == "end"
    assert float(early.get("y")) != float(late.get("y"))


def test_what_ran_out_of_memory_stands_at_its_place_one_below_the_other():
    gone = [Absent(64, 0, "OOM", "teacher: out of memory"), Absent(64, 2, "OOM", "half: out of memory")]
    root = parse(line_chart("A", [Series("q", 1, [Point(1, 3.0)])], Axis("batch"), Axis("tokens/s"), absent=gone))
    words = [e for e in root.iter("text") if e.text == "OOM"]
    assert len({e.get("x") for e in words}) == 1 and len({e.get("y") for e in words}) == 2
    lowest = max(float(e.get("y")) for e in root.iter("use") if e.find("title") is not None)
    assert all(float(e.get("y")) > lowest for e in words)
    assert "half: out of memory" in [e.text for e in root.iter("title")]


def test_models_differ_in_shape_and_not_only_in_colour():
    shapes = {e.get("id"): (e.tag, e.get("points")) for e in parse(key_shapes())[0]}
    assert sorted(shapes) == sorted(f"key{n}" for n in range(SLOTS))
    assert len(set(shapes.values())) == SLOTS
    assert [e.get("href") for e in parse(key(3))] == [parse(marker(3, 0.0, 0.0)).get("href")] == ["#key3"]


def test_a_long_line_has_few_markers_and_a_short_one_has_all():
    for n in (MARKERS, 40 * MARKERS):
        marks = list(chart([Point(i, float(i)) for i in range(n)]).iter("use"))[1:]
        assert len(marks) == n if n == MARKERS else MARKERS // 2 <= len(marks) <= MARKERS


def test_labels_of_an_axis_that_would_touch_are_left_out():
    x = Axis("tokens", ticks=[(value, str(value)) for value in (1000, 1001, 2000)])
    root = parse(line_chart("A", [Series("half", 1, [Point(1000, 1.0), Point(2000, 2.0)])], x, Axis("loss")))
    texts = [e.text for e in root.iter("text")]
    assert "1000" in texts and "1001" not in texts and "2000" in texts


def test_a_heat_map_writes_and_shades_every_field():
    rows = [
        ("0 %", [Cell(1.0, "5/5", "all"), Cell(0.0, "0/5", "none")]),
        ("50 %", [Cell(0.5, "1/2", "half"), Cell(None, "–", "not measured")]),
    ]
    root = parse(heat_map("needles", ["512", "2 048"], rows, "length", "depth", rules=[(1, "trained to 512")]))
    fields = {e.find("text").text: e.get("class") for e in root.iter("g")}
    assert fields == {"5/5": "field h9", "0/5": "field h0", "1/2": "field h5", "–": "field h-none"}
    boundary = next(e for e in root.iter("line") if e.get("class") == "solid")
    second = [e for e in root.iter("rect")][1]
    assert float(boundary.get("x1")) == float(second.get("x"))


def test_bars_are_cut_in_proportion_and_name_what_has_room():
    bar = Bar("half", 1, [("win", "win", 1), ("tie", "tie", 49), ("lose", "lose", 50)])
    root = parse(stacked_bars("verdicts", [bar], "prompts"))
    widths = {
        e.get("class").split()[1]: float(e.find("rect").get("width"))
        for e in root.iter("g")
        if e.find("rect") is not None
    }
    assert widths["lose"] == pytest.approx(50 * widths["win"], rel=0.05)
    assert [e.text for e in root.iter("text")][2:] == ["tie 49", "lose 50"]
    assert "half: win 1 of 100 prompts" in [e.text for e in root.iter("title")]


def test_dots_stand_in_the_row_of_their_category():
    rows = [
        ("math", [(0, Point(2.0, 0, note="a")), (1, Point(4.0, 0, note="b"))]),
        ("writing", [(1, Point(6.0, 0, note="c"))]),
    ]
    root = parse(dots("by category", rows, {0: "teacher", 1: "half"}, Axis("score")))
    placed = {e.find("title").text: e for e in root.iter("use") if e.find("title") is not None}
    assert float(placed["b"].get("x")) < float(placed["c"].get("x"))
    label = next(e for e in root.iter("text") if e.text == "writing")
    assert float(placed["c"].get("y")) == pytest.approx(float(label.get("y")) - 4)


def test_layer_strip_fills_what_was_replaced():
    cells = [e.get("class") for e in parse(layer_strip("layers", 4, [1, 3], "Mamba-1", 2)).iter("rect")]
    assert cells == ["cell filled s2", "cell", "cell filled s2", "cell"]
    titles = [e.text for e in parse(layer_strip("layers", 2, [1], "Mamba-1", 2)).iter("title")]
    assert titles == ["layers", "layer 0: Mamba-1", "layer 1: attention"]
