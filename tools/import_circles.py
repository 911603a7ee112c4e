"""Names the import circles of the package: modules that cannot be imported without one another.

    python tools/import_circles.py [--inside-functions]

Imports at the top of modules count; those for type checkers never do, and those inside functions,
which wait for a call, only with `--inside-functions`. Returns 1 where there is a circle.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "spectral_kernels"
FOLDERS = {
    PACKAGE: ROOT / "python" / PACKAGE,
    f"{PACKAGE}.triton_kernels": ROOT / "triton_kernels",
    f"{PACKAGE}.benchmarks": ROOT / "benchmarks",
}


def modules(folders: Mapping[str, Path] = FOLDERS) -> dict[str, Path]:
    """Every module by its name."""
    found = {}
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def imports(name: str, paths: Mapping[str, Path], *, inside: bool = False) -> set[str]:
    """The modules of `paths` that a module imports; with `inside`, those of its functions too."""
    path = paths[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in _statements(ast.parse(path.read_text()), inside):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # `from . import a` means the module a if there is one, and the package if there is not.
            within = {f"{base}.{alias.name}" for alias in node.names}
            found |= {one if one in paths else base for one in within}
    return (found & paths.keys()) - {name}


def _statements(tree: ast.AST, inside: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if inside or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _statements(node, inside)


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which leads to all others of its group (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in sorted(edges):
        if node not in order:
            visit(node)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line a circle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--inside-functions", action="store_true")
    options = parser.parse_args(argv)
    paths = modules()
    edges = {name: imports(name, paths, inside=options.inside_functions) for name in paths}
    found = circles(edges)
    for circle in found:
        print(" <-> ".join(circle))
    print(f"{len(paths)} modules, {len(found)} import circles")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
