"""A new family, `scaled_sign`, put into a copy of the repository by the files that CONTRIBUTING.md
names: every list, table and test that is about all operators has to find it by itself."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import emulated_cuda
import pytest

ROOT = Path(__file__).resolve().parent.parent
TOY = Path(__file__).with_name("toy_family")
FAMILY = "scaled_sign"
EDITS: list[dict[str, str]] = tomllib.loads((TOY / "edits.toml").read_text())["edit"]
ADDED = {
    str(path.relative_to(TOY))
    for path in TOY.rglob("*")
    if path.is_file() and path.parent != TOY and "__pycache__" not in path.parts
}

spec = importlib.util.spec_from_file_location("mutations_run", ROOT / "tests/mutations/run.py")
assert spec is not None and spec.loader is not None
mutations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutations)


def named_files() -> list[str]:
    """The files of the table in CONTRIBUTING.md, in their order."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding a kernel")[2]
    rows = re.findall(r"^\| (\d+) \| `([^`]+)` \|", section.partition("\n## ")[0], re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    return [name.replace("<family>", FAMILY) for _, name in rows]


def test_contributing_names_every_file():
    edited = {edit["file"] for edit in EDITS}
    named = named_files()
    assert len(set(named)) == len(named) <= 10
    assert set(named) == ADDED | edited
    for name in named:
        assert (ROOT / name).is_file() == (name in edited), name


# An editable install would lend the copy its compiled part.
WITHOUT_THE_CHECKOUT = """
import sys

sys.meta_path[:] = [x for x in sys.meta_path if "Editable" not in getattr(x, "__name__", "")]
"""


@pytest.fixture(scope="module")
def copy() -> Iterator[Path]:
    """The repository with the family, without a compiled part."""
    with mutations.copy_of_the_sources() as folder:
        for library in folder.rglob("_C*.so"):
            library.unlink()
        for edit in EDITS:
            mutations.apply({"name": FAMILY, **edit}, folder)
        for name in ADDED:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TOY / name, folder / name)
        (folder / "site" / "sitecustomize.py").write_text(WITHOUT_THE_CHECKOUT)
        run(folder, "tools/public_names.py")
        run(folder, "tools/readme_tables.py", "README.md")
        yield folder


def run(folder: Path, *command: str, **variables: str) -> str:
    """The output of Python in the copy, where `spectral_kernels` is the copy's."""
    own = {"PYTHONPATH": str(folder / "site"), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")} | own
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


IN_PYTHON = """
import sys
from pathlib import Path

sys.path.insert(0, "tests")
import torch
import spectral_kernels as sk
from spectral_kernels import _cuda, _dispatch, _fake, benchmarks, reference
from spectral_kernels.benchmarks import run
from support.cases import case, schemas

name = "scaled_sign"
assert Path(sk.__file__).is_relative_to(Path.cwd()), sk.__file__
x = torch.randn(3, 4, 50)
assert torch.equal(sk.scaled_sign(x, scale=0.5), 0.5 * x.sign())
assert name in sk.__all__ and sk.explain(name, x).backend == "reference"
assert name in _cuda.OPERATORS and name in reference.__all__

# Its schema is read from csrc/ops.cpp, its fake from the table, its case from the schema.
assert [a.name for a in schemas()[name].arguments] == ["x", "scale"]
made = case(name)
assert _fake.FAKES[name](x.to("meta"), scale=0.5).shape == x.shape
assert torch.equal(made.run("reference")[0], 0.5 * made["x"].sign())

rows = [run.run_case(c, 1, 0.0) for c in run.FAMILIES[-1].cases() if c.quick]
assert {row["op"] for row in rows} == {name} and not any(row["failure"] for row in rows), rows
"""

# The site's page, without one written by hand.
IN_PAGES = """
import sys

sys.path.insert(0, "docs")
import navigation

(families,) = navigation.on_config({"nav": [{"Families": "families/"}]})["nav"][0].values()
assert families[-1] == "families/scaled_sign.md"
page = navigation.page_of("scaled_sign")
assert page.startswith("# scaled_sign\\n") and "scale sign(X), element by element" in page
"""

IN_TRITON = """
import torch
import spectral_kernels as sk

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x = torch.randn(3, 40, 50).to(dtype)
    x[1, 39, 49] = torch.inf
    ours = sk.scaled_sign(x, scale=0.3, backend="triton")
    assert sk.call_counts() == {"scaled_sign/triton": 1}
    theirs = sk.scaled_sign(x, scale=0.3, backend="reference")
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
    assert ours.isnan().sum() == 2000
    sk.call_counts(reset=True)
"""

# What is said about all operators, families and pages.
TESTS = (
    f"tests/test_{FAMILY}.py",
    "tests/test_docs.py::test_every_page_of_a_family_and_target_is_one",
    "tests/test_docs.py::test_every_page_is_in_the_navigation",
    "tests/test_public.py::test_public_names",
    "tests/test_public.py::test_every_operator_has_a_public_function",
    f"tests/test_public.py::test_docstrings_say_what_callers_need[{FAMILY}]",
    "tests/test_benchmarks.py::test_every_operator_is_measured_by_one_family",
)


def test_python_finds_it(copy):
    run(copy, "-c", IN_PYTHON)
    run(copy, "tools/readme_tables.py", "--check", "README.md")
    assert f"[{FAMILY}](python/spectral_kernels/{FAMILY}.py)" in (copy / "README.md").read_text()
    run(copy, "-c", IN_PAGES)


def test_triton_finds_it(copy):
    pytest.importorskip("triton")
    run(copy, "-c", IN_TRITON, TRITON_INTERPRET="1")


def test_its_tests_are_found_on_every_backend(copy):
    collected = run(
        copy, "-m", "pytest", "--collect-only", "-q", "-m", "", f"tests/test_{FAMILY}.py"
    )
    found = set(re.findall(r"::test_every_element\[([\w-]+?)-(?:float|bfloat|\()", collected))
    assert {"reference", "cuda"} <= found, collected[-2000:]


def test_cuda_kernels_compile_for_the_emulation(copy, tmp_path):
    (source,) = (copy / "csrc/cuda" / FAMILY).glob("*.cu")
    emulated_cuda.compile_kernel(source, tmp_path / "kernel.o")


def build(copy: Path) -> None:
    """The extension, and a folder with what the emulation of CUDA has been compiled to already."""
    run(copy, "setup.py", "build_ext", "--inplace", SPECTRAL_KERNELS_CUDA="0")
    kept = ROOT / "build" / "emulation"
    if kept.exists():
        shutil.copytree(kept, copy / "build" / "emulation", dirs_exist_ok=True)


@pytest.mark.long
def test_every_test_of_all_operators_passes_with_it(copy):
    """Minutes: the copy is built, and all backends are tried."""
    build(copy)
    tried = functools.partial(run, copy, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    tried("-m", "not emulated", *TESTS)
    of_all = ("tests/test_ops.py", "tests/test_bad_arguments.py")
    tried("-k", f"{FAMILY} or everywhere or schemas", "-m", "long or not long", *of_all)
    tried("-m", "emulated", TESTS[0], "tests/test_cuda_layout.py")
    tried("-m", "triton", TESTS[0], TRITON_INTERPRET="1")
