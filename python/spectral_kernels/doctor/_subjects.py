"""The optimizers that the list of faults is run on: ours and other people's."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from .. import optim

# By name, as nothing in the package imports its benchmarks.
peers: Any = importlib.import_module("spectral_kernels.benchmarks.peers")

# The clones in the folder that SPECTRAL_KERNELS_PEERS names, by their repositories.
_CLONES = {
    "soap": "SOAP",
    "deva": "Decoupled-Variance-Adaptation",
    "distributed-shampoo": "optimizers",
}
IMPLEMENTATIONS = (
    "ours",
    "torch",
    "soap",
    "deva",
    "distributed-shampoo",
    "heavyball",
    "pytorch-optimizer",
)


@dataclass(frozen=True)
class Subject:
    """An optimizer and what it calls its settings.

    Attributes:
        name: as shown.
        build: makes it from parameters and settings.
        by_design: faults that it is documented to have, and why.
    """

    name: str
    build: Callable[..., Optimizer]
    by_design: Mapping[str, str] = field(default_factory=dict)

    def make(self, params: Any, **settings: Any) -> Optimizer:
        """The optimizer; settings that it does not know are left out."""
        known = inspect.signature(self.build).parameters
        return self.build(params, **{k: v for k, v in settings.items() if k in known})

    def knows(self, setting: str) -> bool:
        """Whether it has a setting of that name."""
        return setting in inspect.signature(self.build).parameters


def subjects(implementation: str) -> list[Subject]:
    """The optimizers of one implementation.

    Raises:
        ValueError: an unknown implementation, or one that is not installed or pointed at.
    """
    if implementation == "ours":
        return _ours()
    if implementation == "torch":
        return [Subject("torch.optim.Muon", torch.optim.Muon)]
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"--impl must be of {known}, not {implementation!r}")
    module = peers.find(implementation)
    if module is None:
        raise ValueError(
            f"--impl {implementation}: it cannot be imported; install it, or name its clone by "
            f"--peers {implementation}=FOLDER"
        )
    return list(_PEERS[implementation](module))


def point_at_clones(assignments: list[str]) -> None:
    """Takes `--peers`, and SPECTRAL_KERNELS_PEERS for what that does not name.

    Raises:
        ValueError: an unknown peer or a folder that does not exist.
    """
    folder = os.environ.get("SPECTRAL_KERNELS_PEERS")
    found = []
    for name, clone in _CLONES.items() if folder else ():
        path = Path(folder or "") / clone
        if path.is_dir():
            found.append(f"{name}={path}")
    peers.point([*found, *assignments])


def _ours() -> list[Subject]:
    idle = "a matrix's first call sets its factors and bases only, as in the public class"
    absolute = "its eps is absolute, as the public class's"
    squares = "its state holds squares: outside 2^-50 to 2^50 a matrix is skipped and counted"
    skipped = {"tiny gradients": squares, "large gradients": squares}
    return [
        Subject("Muon", optim.Muon),
        Subject("Shampoo", optim.Shampoo, skipped),
        Subject(
            "SOAP",
            optim.SOAP,
            {"idle first step": idle, "small gradients": absolute, **skipped},
        ),
        Subject("DeVA", optim.DeVA, skipped),
    ]


def _soap(module: ModuleType) -> Iterator[Subject]:
    yield Subject("SOAP", module.SOAP)


def _deva(module: ModuleType) -> Iterator[Subject]:
    yield Subject("DeVASchattenNorm", module.DeVASchattenNorm)


def _distributed_shampoo(module: ModuleType) -> Iterator[Subject]:
    def build(params: Any, lr: Any = 1e-3, weight_decay: float = 0.0) -> Optimizer:
        made: Optimizer = module.DistributedShampoo(
            params,
            lr=lr,
            betas=(0.9, 0.95),
            weight_decay=weight_decay,
            precondition_frequency=2,
            start_preconditioning_step=2,
            grafting_config=module.AdamPreconditionerConfig(beta2=0.95),
        )
        return made

    yield Subject("DistributedShampoo", build)


def _heavyball(module: ModuleType) -> Iterator[Subject]:
    yield Subject("Muon", _keeping_gradients(module.Muon))
    yield Subject("SOAP", _keeping_gradients(module.SOAP))


def _keeping_gradients(cls: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """heavyball clears gradients while it steps unless told otherwise, and says so."""

    def build(params: Any, lr: Any = 1e-3, weight_decay: float = 0.0) -> Optimizer:
        return cls(params, lr=lr, weight_decay=weight_decay, consume_grad=False)

    return build


def _pytorch_optimizer(module: ModuleType) -> Iterator[Subject]:
    def muon(params: Any, lr: Any = 1e-3, weight_decay: float = 0.0) -> Optimizer:
        members = list(params)
        if members and isinstance(members[0], dict):
            raise ValueError("a group holds either matrices or others, and says which by use_muon")
        groups = [
            {"params": part, "use_muon": use_muon}
            for use_muon in (True, False)
            if (part := [p for p in members if (p.ndim >= 2) == use_muon])
        ]
        made: Optimizer = module.Muon(groups, lr=lr, weight_decay=weight_decay)
        return made

    yield Subject("Muon", muon)
    yield Subject("SOAP", module.SOAP)


_PEERS: dict[str, Callable[[ModuleType], Iterator[Subject]]] = {
    "soap": _soap,
    "deva": _deva,
    "distributed-shampoo": _distributed_shampoo,
    "heavyball": _heavyball,
    "pytorch-optimizer": _pytorch_optimizer,
}
