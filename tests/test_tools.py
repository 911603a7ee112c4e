"""Developers' tools: their pages are those of their records, and each starts as a program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cuda_kernels
import pytest
import roofline

TOOLS = Path(__file__).parent.parent / "tools"
RESULTS = TOOLS / "results"


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
