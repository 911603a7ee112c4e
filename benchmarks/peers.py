"""Other people's code, where it is importable or pointed at; nothing of it is needed.

A public checkout that is no package is pointed at by `--peers name=folder`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

_paths: dict[str, Path] = {}
_wanted = True


@dataclass(frozen=True)
class Peer:
    """A project to compare with.

    Attributes:
        module: what is imported.
        title: what it is.
        distribution: its name on the package index, if it has one.
    """

    module: str
    title: str
    distribution: str | None = None


PEERS = {
    "distributed-shampoo": Peer("distributed_shampoo", "Distributed Shampoo, facebookresearch"),
    "soap": Peer("soap", "SOAP, nikhilvyas"),
    "deva": Peer("optimizers.deva", "DeVA, Tsedao/Decoupled-Variance-Adaptation"),
    "gram-newton-schulz": Peer(
        "gram_newton_schulz", "gram-newton-schulz, on a CPU its torch form", "gram-newton-schulz"
    ),
    "heavyball": Peer("heavyball", "heavyball", "heavyball"),
    "pytorch-optimizer": Peer("pytorch_optimizer", "pytorch-optimizer", "pytorch-optimizer"),
}


def point(assignments: list[str]) -> None:
    """Takes `--peers`: "name=folder" says where a checkout lies, "none" leaves all peers out.

    Raises:
        ValueError: an unknown peer or a folder that does not exist.
    """
    global _wanted
    _wanted = assignments != ["none"]
    for assignment in assignments if _wanted else []:
        name, separator, folder = assignment.partition("=")
        if name not in PEERS or not separator:
            raise ValueError(
                f"--peers takes name=folder with a name of {', '.join(PEERS)}, or none; "
                f"not {assignment!r}"
            )
        if not Path(folder).is_dir():
            raise ValueError(f"--peers {name}: there is no folder {folder!r}")
        _paths[name] = Path(folder).resolve()


def find(name: str) -> ModuleType | None:
    """The peer's module, or None if it is not there or not wanted."""
    if not _wanted:
        return None
    module = PEERS[name].module
    with _search(_paths.get(name)):
        try:
            return _settled(importlib.import_module(module))
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] == module.split(".")[0]:
                return None
            raise


def _settled(module: ModuleType) -> ModuleType:
    """heavyball compiles and autotunes for minutes otherwise."""
    if module.__name__ == "heavyball":
        module.utils.compile_mode = None
    return module


def versions() -> dict[str, str]:
    """Version, or folder, of every peer that is there."""
    found = {}
    for name, peer in PEERS.items():
        if find(name) is None:
            continue
        distribution = peer.distribution
        found[name] = importlib.metadata.version(distribution) if distribution else "a checkout"
    return found


@contextlib.contextmanager
def _search(folder: Path | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
