"""Developers' tools: their pages are those of their records, and each starts as a program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cuda_kernels
import pytest
import roofline
from spectral_kernels import _records

ROOT = Path(__file__).parent.parent
TOOLS = ROOT / "tools"
RESULTS = TOOLS / "results"


RECORDS = [
    path
    for folder in ("benchmarks/results", "docs/papers", "tests/golden", "tests/mutations", "tools")
    for path in sorted((ROOT / folder).rglob("*.json"))
]


def test_records_have_a_line_for_every_entry():
    record = {
        "format": 1,
        "machine": {"cpu": "one", "peaks": {"fp32": 1.5}},
        "rows": [{"key": "a", "times": [1, 2]}, {"key": "b", "times": []}],
        "tasks": {"c": {"d": {"e": {}}, "f": {"g": [1.0]}}},
        "none": [],
        3: float("inf"),
    }
    written = _records.text(record)
    assert (
        written
        == """{
 "format": 1,
 "machine": {"cpu": "one", "peaks": {"fp32": 1.5}},
 "rows": [
  {"key": "a", "times": [1, 2]},
  {"key": "b", "times": []}
 ],
 "tasks": {
  "c": {
   "d": {"e": {}},
   "f": {"g": [1.0]}
  }
 },
 "none": [],
 "3": Infinity
}
"""
    )
    assert json.loads(written) == json.loads(json.dumps(record))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_committed_records_have_that_form(path):
    text = path.read_text()
    assert _records.text(json.loads(text)) == text


def test_pages_are_those_of_their_records():
    report = json.loads((RESULTS / "cuda_kernels.json").read_text())
    assert cuda_kernels.markdown(report) == (RESULTS / "cuda_kernels.md").read_text()
    assert roofline.markdown(report["kernels"]) == (RESULTS / "roofline.md").read_text()


def test_the_page_of_triton_resources_is_that_of_its_record():
    import triton_resources

    report = json.loads((RESULTS / "triton_resources.json").read_text())
    lines = [triton_resources.Line(**line) for line in report["lines"]]
    page = triton_resources.markdown(lines, report["triton"])
    assert page == (RESULTS / "triton_resources.md").read_text()


@pytest.mark.parametrize("name", ["cuda_kernels", "readme_tables"])
def test_a_tool_starts_from_any_folder(name, tmp_path):
    command = [sys.executable, str(TOOLS / f"{name}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr
