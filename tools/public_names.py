"""Writes the names of the families into the package: its imports of them, and `__all__`.

    python tools/public_names.py
    python tools/public_names.py --check

A family's public names are the `__all__` of its module. `--check` writes nothing and fails where
the package has others.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent / "python" / "spectral_kernels"
PACKAGE = ROOT / "__init__.py"
_LIST = re.compile(r"^__all__ = \[\n.*?^\]\n", re.DOTALL | re.MULTILINE)
_MOST = 100


def rewritten(text: str, names: dict[str, list[str]]) -> str:
    """The text of `__init__.py` with the public names of every family."""
    imports = re.compile(rf"^from \.(?:{'|'.join(names)}) import (?:\(.*?\)|[^\n]*)\n", re.M | re.S)
    (listed,) = _LIST.findall(text)
    before = {name for line in imports.findall(text) for name in re.findall(r"\w+", line)}
    others = set(ast.literal_eval(listed.partition("= ")[2])) - before
    public = sorted(others.union(*names.values()))
    lines = [_import(family, own) for family, own in sorted(names.items())]
    first = imports.search(text)
    assert first is not None
    text = text[: first.start()] + "".join(lines) + imports.sub("", text[first.start() :])
    return _LIST.sub("__all__ = [\n" + "".join(f'    "{x}",\n' for x in public) + "]\n", text)


def _import(family: str, names: Sequence[str]) -> str:
    line = f"from .{family} import {', '.join(names)}\n"
    if len(line) <= _MOST:
        return line
    return f"from .{family} import (\n" + "".join(f"    {name},\n" for name in names) + ")\n"


def names_of(module: Path) -> list[str]:
    """What a module says that it holds, without importing it."""
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            found: list[str] = ast.literal_eval(node.value)
            return found
    raise ValueError(f"{module} has no __all__")


def families() -> list[str]:
    """Those of the table of operators, from its text: the package may not be importable yet."""
    table = (ROOT / "_operators.py").read_text().partition("\nTABLE = {\n")[2]
    return list(dict.fromkeys(re.findall(r'(?:Operator|_step)\(\s*"(\w+)"', table)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say that something is missing")
    options = parser.parse_args(argv)
    before = PACKAGE.read_text()
    after = rewritten(before, {name: names_of(ROOT / f"{name}.py") for name in families()})
    if options.check and after != before:
        print(f"{PACKAGE}: make lists writes the names of all families", file=sys.stderr)
        return 1
    if after != before:
        PACKAGE.write_text(after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
