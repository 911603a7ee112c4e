"""Developers' tools: their pages are those of their records, and each starts as a program."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import cuda_kernels
import hub_layout
import import_circles
import public_names
import pytest
import roofline
import wheel_check
from spectral_kernels import _records
from spectral_kernels._operators import FAMILIES

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


def test_no_module_of_the_package_imports_itself_by_way_of_others():
    paths = import_circles.modules()
    assert {"spectral_kernels", "spectral_kernels.benchmarks.run"} < paths.keys()
    edges = {name: import_circles.imports(name, paths, inside=True) for name in paths}
    assert "spectral_kernels.benchmarks.run" in edges["spectral_kernels.benchmarks.bench"]
    assert import_circles.circles(edges) == []


def test_a_circle_is_found(tmp_path):
    texts = {"a": "from . import b", "b": "if True:\n    from .c import x", "c": "import p.a"}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "d.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import e\nfrom . import a"
    )
    (tmp_path / "e.py").write_text("def f():\n    from . import d, f")
    (tmp_path / "f.py").write_text("from . import e")
    paths = import_circles.modules({"p": tmp_path})
    for inside, expected in ((False, []), (True, [["p.e", "p.f"]])):
        edges = {name: import_circles.imports(name, paths, inside=inside) for name in paths}
        assert import_circles.circles(edges) == [["p.a", "p.b", "p.c"], *expected]


def test_pre_commit_runs_what_make_lint_runs():
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"- id: (\S+)", config) == [
        "ruff-check",
        "ruff-format",
        "clang-format",
        "mypy",
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = dict(pin.split("==") for pin in project["optional-dependencies"]["lint"])
    found = re.findall(r"/(\S+)\n    rev: v(\S+)", config)
    names = {"ruff-pre-commit": "ruff", "mirrors-clang-format": "clang-format"}
    assert {name: versions[name] for name in names.values()} == {
        names[repository.rpartition("/")[2]]: version for repository, version in found
    }
    # The files of CXX_FILES in the Makefile.
    pattern = re.compile(re.search(r"files: (\S+)", config)[1])
    formatted = {
        path.relative_to(ROOT).as_posix()
        for folder, suffixes in (
            ("csrc", {".cpp", ".h", ".inl", ".cu"}),
            ("tests/tiles", {".cpp", ".h"}),
            ("tests/cuda_emulation", {".cpp", ".h"}),
            ("tests/toy_family/csrc", {".cpp", ".cu"}),
        )
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in suffixes
    }
    assert len(formatted) > 80
    everything = [path for folder in ("csrc", "tests") for path in (ROOT / folder).rglob("*.*")]
    matched = {p.relative_to(ROOT).as_posix() for p in everything}
    assert {name for name in matched if pattern.search(name)} == formatted


def test_public_names_are_those_of_the_families():
    assert public_names.main(["--check"]) == 0
    names = {
        family: public_names.names_of(public_names.ROOT / f"{family}.py") for family in FAMILIES
    }
    assert public_names.families() == list(FAMILIES)
    text = public_names.PACKAGE.read_text()
    more = public_names.rewritten(text, {**names, "zeta": ["zeta_", "Omega"]})
    assert "\nfrom .symmetric_matmul import gram\nfrom .zeta import zeta_, Omega\n" in more
    assert '    "use_backend",\n    "zeta_",\n]\n' in more and '    "Omega",\n' in more


def test_the_layout_for_a_hub_is_written_and_loads_under_another_name(tmp_path):
    pytest.importorskip("triton")
    package = hub_layout.write(tmp_path / "hub")
    assert hub_layout.check(package) == []
    record = tomllib.loads((tmp_path / "hub" / "build.toml").read_text())
    assert record["general"]["name"] == "spectral-kernels" and "torch-noarch" in record
    # What stands in for the compiled part has all that the package asks of it.
    real = _public(ROOT / "python" / "spectral_kernels" / "_extension.py")
    assert _public(package / "_extension.py") == real
    with pytest.raises(ValueError, match="not empty"):
        hub_layout.write(tmp_path / "hub")


def _public(path):
    """The names that a module defines for others."""
    body = ast.parse(path.read_text()).body
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
    targets += [node.target for node in body if isinstance(node, ast.AnnAssign)]
    assigned = {
        each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)
    }
    return {name for name in functions | assigned if not name.startswith("_")}


def test_a_layout_for_a_hub_names_what_it_may_not_have(tmp_path):
    package = hub_layout.write(tmp_path / "hub")
    (package / "other.py").write_text(
        "def f():\n    import numpy\n    from spectral_kernels import x\n"
    )
    (package / "table.json").write_text("{}")
    (package / "__init__.py").write_text("raise RuntimeError('broken')")
    first, second, third, fourth = hub_layout.check(package)
    assert (first, second) == ("other.py:2: numpy", "other.py:3: spectral_kernels")
    assert third == "table.json" and "broken" in fourth


@pytest.mark.parametrize(
    "name, lines, wrong",
    [
        ("spectral_kernels/_C.so", "", set()),
        ("spectral_kernels/results.json", "", {"members"}),
        ("tests/test_it.py", "", {"members"}),
        ("spectral_kernels/wheel_check.py", "", {"members"}),
        ("spectral_kernels/_C.so", "Requires-Dist: numpy", {"needs"}),
        ("spectral_kernels/_C.so", "Requires-Dist: rich; extra == 'cli'", set()),
        ("spectral_kernels/_D.so", "", {"compiled parts"}),
    ],
)
def test_a_wheel_that_has_something_else_is_noticed(name, lines, wrong):
    names = {"spectral_kernels/__init__.py", "spectral_kernels/_C.so", "x.dist-info/METADATA", name}
    metadata = f"""Metadata-Version: 2.4
Requires-Python: >=3.11
License-Expression: Apache-2.0
Description-Content-Type: text/markdown
Requires-Dist: torch>=2.11
{lines}"""
    found = [*wheel_check.members(sorted(names)), *wheel_check.dependencies(metadata.strip())]
    assert {each.what for each in found if each.wrong} == wrong


def test_symbols_that_a_platform_lacks_are_noticed():
    symbols = """
0000000000000000      DF *UND*	0000000000000000 (GLIBC_2.9) one
0000000000000000      DF *UND*	0000000000000000 (GLIBC_2.29) pow
0000000000000000      DF *UND*	0000000000000000 (GLIBCXX_3.4.21) two
0000000000000000      DF *UND*	0000000000000000 (0x08922974) (CXXABI_1.3.13) three
"""
    found = {each.what: each.wrong for each in wheel_check.versions(symbols, "2_28")}
    assert found == {"GLIBC": True, "GLIBCXX": False, "CXXABI": True}
    found = {each.what: each.wrong for each in wheel_check.versions(symbols, "2_34")}
    assert found == dict.fromkeys(found, False)
