"""csrc/cuda is one folder for what is shared and one a family; includes point down only."""

from __future__ import annotations

import re
from pathlib import Path

from spectral_kernels import _operators

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"

# What files of a folder may include beside their own; a folder stands below those that name it.
STANDS_ON: dict[str, tuple[str, ...]] = {
    "base": (),
    "symmetric_matmul": ("base",),
    "newton_schulz": ("base", "symmetric_matmul"),
    "kron_factor": ("base", "symmetric_matmul"),
    "eigenbasis": ("base", "kron_factor"),
    "inverse_root": ("base", "symmetric_matmul", "eigenbasis"),
    "deva": ("base", "newton_schulz", "eigenbasis"),
}
# A family that is not named stands on the base alone.
for _family in _operators.FAMILIES:
    STANDS_ON.setdefault(_family, ("base",))


def sources() -> list[Path]:
    return sorted(path for path in CUDA.rglob("*") if path.suffix in (".h", ".cu", ".cpp"))


def included(path: Path) -> list[Path]:
    named = re.findall(r'^ *#include "([^"]+)"', path.read_text(), re.MULTILINE)
    return [(path.parent / name).resolve() for name in named]


def folder(path: Path) -> str:
    return path.relative_to(CUDA).parts[0]


def test_every_file_has_a_folder():
    assert {folder(path) for path in sources()} == set(STANDS_ON)
    for path in sources():
        assert path.parent.parent == CUDA, path
    for family in set(STANDS_ON) - {"base"}:
        assert (CUDA / family / "operators.cpp").exists(), family


def test_folders_stand_on_those_before_them():
    names = list(STANDS_ON)
    for name, below in STANDS_ON.items():
        assert all(names.index(other) < names.index(name) for other in below), name


def test_includes_point_down():
    arrows = set()
    for path in sources():
        for other in included(path):
            assert other.exists(), f"{path} includes {other}"
            if other.is_relative_to(CUDA):
                arrows.add((folder(path), folder(other)))
    arrows = {(one, other) for one, other in arrows if one != other}
    declared = {(name, other) for name, below in STANDS_ON.items() for other in below}
    assert arrows == declared


def test_no_include_leads_back():
    """No file includes itself by way of others, within a folder either."""
    graph = {path: [p for p in included(path) if p.is_relative_to(CUDA)] for path in sources()}
    done: set[Path] = set()

    def visit(path: Path, above: tuple[Path, ...]) -> None:
        assert path not in above, " -> ".join(str(p) for p in (*above, path))
        if path not in done:
            for other in graph[path]:
                visit(other, (*above, path))
            done.add(path)

    for path in graph:
        visit(path, ())


def test_objects_have_names_of_their_own():
    """A .cpp and a .cu of one stem would be compiled to one object."""
    stems = [path.with_suffix("") for path in sources() if path.suffix != ".h"]
    assert len(stems) == len(set(stems))
