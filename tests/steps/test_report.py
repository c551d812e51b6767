"""The stage as the flow calls it; the page itself is tested in tests/reports."""

import json
import subprocess
import sys

from steps.config import ReportConfig
from steps.report import run


def test_stage_writes_page_twin_and_rows(tmp_path):
    lineage = tmp_path / "lineage.json"
    lineage.write_text(json.dumps({"run": "7", "config": {"variants": {"half": {"attention": "1/2"}}}, "stages": []}))
    out = tmp_path / "out"
    out.mkdir()
    summary = run(ReportConfig(title="Mine"), {"lineage": lineage}, out, None)
    assert sorted(p.name for p in out.iterdir()) == ["flips.jsonl", "report.html", "report.json", "rows.csv"]
    assert summary["variants"]["half"]["kl"] is None
    assert summary["bytes"] == (out / "report.html").stat().st_size
    assert json.loads((out / "report.json").read_text())["title"] == "Mine"


def test_report_loads_neither_torch_nor_transformers():
    code = "import sys, steps.report; sys.exit(bool({'torch', 'transformers', 'metaflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
