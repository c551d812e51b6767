"""The page in a real browser: nothing is cut, nothing overlaps, nothing is loaded, in light and dark, wide and narrow.

With REPORT_SCREENSHOTS=FOLDER every section is kept there as a picture, to be looked at.
"""

import json
import os
import struct
from pathlib import Path

import pytest
from browser import CHROMIUM, LAYOUT, chromium

from evals.comparison import compare_runs
from evals.stats import wilson
from reports.build import write_files, write_report
from reports.combine import combine, load_finished
from reports.rows import load

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page was not looked at in a browser")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


def one_run(inputs, folder, run="1794823010"):
    """The report of a run that has every section, with model output that would break a page."""
    lineage = json.loads(inputs["lineage"].read_text()) | {"run": run}
    inputs["lineage"].write_text(json.dumps(lineage))
    folder.mkdir()
    write_report(load(inputs), folder, title="From teacher to hybrid", samples=3, interval=wilson)
    return folder / "report.html"


def four_runs(inputs, folder):
    runs = [one_run(inputs, folder.with_name(f"run{i}"), f"179482301{i}").parent for i in range(4)]
    folder.mkdir()
    made = combine([load_finished(str(run), folder) for run in runs], "teacher", compare_runs, "Four runs compared")
    write_files(made.twin, made.rows, made.flips, folder / "report.html")
    return folder / "report.html"


def nothing_run(inputs, folder):
    return one_run({"lineage": inputs["lineage"]}, folder)


def size(png):
    """(width, height) in pixels, from the header."""
    return struct.unpack(">II", png.read_bytes()[16:24])


def pictures(browser, prefix, folder):
    """Every section as it is seen on opening the page."""
    folder.mkdir(parents=True, exist_ok=True)
    for section in browser.evaluate("[...document.querySelectorAll('section')].map(s => s.id)"):
        browser.screenshot(f"#{section}", folder / f"{prefix}-{section}.png")


@pytest.mark.parametrize("make", [one_run, four_runs, nothing_run])
def test_everything_fits_and_can_be_read(browser, example, tmp_path, make):
    page = make(example, tmp_path / "page")
    for width in (1280, 390):
        for look in ("light", "dark"):
            browser.complaints.clear()
            browser.show(page, width, look == "dark")
            browser.screenshot("#verdict", tmp_path / "verdict.png")
            assert size(tmp_path / "verdict.png")[0] == width
            if "REPORT_SCREENSHOTS" in os.environ:
                pictures(browser, f"{make.__name__}-{look}-{width}", Path(os.environ["REPORT_SCREENSHOTS"]))
            for state in ("tables closed", "tables open"):
                layout = browser.evaluate(LAYOUT)
                assert layout.pop("width") == layout.pop("inner") == width, state
                assert layout == {"wide": [], "clipped": [], "touching": [], "faint": []}, (width, look, state)
                browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (max(map(int, background[4:-1].split(","))) < 64) == (look == "dark")
            assert browser.complaints == []


def test_a_printed_page_is_light_shows_its_tables_and_cuts_nothing_off(browser, example, tmp_path):
    browser.show(one_run(example, tmp_path / "page"), 718, dark=True, media="print")  # A4 within its margins
    assert browser.evaluate("document.documentElement.scrollWidth") == 718
    assert browser.evaluate("[...document.querySelectorAll('details table')].every(t => t.checkVisibility())")
    assert browser.evaluate("getComputedStyle(document.body).color").startswith("rgb(29, 33, 37")


def test_what_does_not_fit_is_found(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><meta http-equiv=Content-Security-Policy content=\"style-src 'unsafe-inline'; img-src 'none'\">"
        '<meta name=viewport content="width=device-width"><main style="background:#fff"><section id=a>'
        '<p style="width:2000px">broad</p><p style="color:#ccc">pale</p><img src=https://example.org/x.png>'
        '<svg class=chart width=100 height=40 viewBox="0 0 100 40"><text x=60 y=20>beyond the frame</text>'
        "<text x=5 y=20>one</text><text x=8 y=22>two</text></svg></section></main>"
    )
    browser.complaints.clear()
    browser.show(page, 390, dark=False)
    layout = browser.evaluate(LAYOUT)
    assert layout["width"] > 390 and "a: broad" in layout["wide"]
    assert layout["clipped"] == ["a: beyond the frame"] and layout["touching"] == ["a: one | a: two"]
    assert layout["faint"] == ["a: pale"]
    assert any("example.org" in complaint for complaint in browser.complaints)
