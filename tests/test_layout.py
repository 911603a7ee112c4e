"""No file, function or list of parameters is longer than a reader can hold."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("python", "triton_kernels", "benchmarks", "csrc", "tests", "tools", "examples", "docs")
SOURCES = (".py", ".pyi", ".cpp", ".cu", ".h", ".inl")

MOST_LINES = 600
MOST_LINES_OF_A_FUNCTION = 120
MOST_PARAMETERS = 12

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*suffixes: str) -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    found.append(ROOT / "setup.py")
    return sorted(path for path in found if path.suffix in suffixes and path.is_file())


@cache
def functions() -> list[tuple[Path, str, Function]]:
    """Every function of Python, its file, and its name behind the file's."""
    return [
        (path, f"{path.relative_to(ROOT)}: {node.name}", node)
        for path in sources(".py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, Function)
    ]


def lines_of_code(function: Function) -> int:
    """From the end of the signature to the end, without the docstring."""
    first, *rest = function.body
    if ast.get_docstring(function) is not None and rest:
        first = rest[0]
    assert function.end_lineno is not None
    return function.end_lineno - first.lineno + 1


def parameters(function: Function) -> int:
    args = function.args
    return len(args.posonlyargs) + len(args.args) + len(args.kwonlyargs)


def explicit(path: Path, function: Function) -> bool:
    """Whether users, torch or Triton read this signature, where everything is named."""
    if any("jit" in ast.unparse(decorator) for decorator in function.decorator_list):
        return True
    folder, name = path.parent.name, function.name
    return (
        (folder == "spectral_kernels" and name.endswith("_step_"))
        or (folder == "optim" and name == "__init__")
        # In the place of torch.optim's own function.
        or (path.name == "torch_muon.py" and name == "step")
    )


def test_no_file_is_too_long():
    lengths = {str(path.relative_to(ROOT)): path for path in sources(*SOURCES)}
    assert len(lengths) > 300
    long = {
        name for name, path in lengths.items() if len(path.read_text().splitlines()) > MOST_LINES
    }
    assert long == set()


def test_no_python_function_is_too_long():
    assert len(functions()) > 2000
    long = [name for _, name, node in functions() if lines_of_code(node) > MOST_LINES_OF_A_FUNCTION]
    assert long == []


def test_no_list_of_parameters_is_too_long():
    long = {
        name: parameters(node)
        for path, name, node in functions()
        if not explicit(path, node) and parameters(node) > MOST_PARAMETERS
    }
    assert long == {}


def test_every_environment_variable_is_documented():
    name = r"SPECTRAL_KERNELS_[A-Z0-9_]*[A-Z0-9]"
    # In quotes in Python and C++, anywhere in scripts; macros of C++ are something else.
    used, macros = set(), set()
    scripts = [ROOT / "Makefile", *(path for path in (ROOT / ".ci").iterdir() if path.is_file())]
    for path in (*sources(*SOURCES), *scripts):
        text = path.read_text()
        used.update(re.findall(rf"""["']({name})["'=]""", text))
        if path in scripts:
            used.update(re.findall(name, text))
        macros.update(re.findall(rf"^#\s*(?:ifn?def|define) ({name})\b", text, re.MULTILINE))
    assert {"SPECTRAL_KERNELS_BACKEND", "SPECTRAL_KERNELS_BUILD"} <= used - macros
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    words = "\n".join(page.read_text() for page in pages)
    assert {name for name in used - macros if not re.search(rf"`{name}\b", words)} == set()


def test_what_is_too_long_is_seen():
    body = "\n".join(f"    x = {i}" for i in range(130))
    arguments = ", ".join(f"a{i}" for i in range(13))
    tree = ast.parse(f'def f({arguments}):\n    """Words.\n\n    More.\n    """\n{body}\n')
    (function,) = (node for node in tree.body if isinstance(node, Function))
    assert lines_of_code(function) == 130 and parameters(function) == 13
