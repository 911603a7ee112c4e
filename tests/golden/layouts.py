"""Checkpoints of every layout of state that a version of the optimizers has written.

    python tests/golden/layouts.py

writes layout_v<N>.pt for the layout that is installed: for each optimizer a state dict after
three steps with a scheduler, the parameters then, and those after three more steps. Earlier files
cannot be made anew; they load for ever.
"""

from __future__ import annotations

import copy
from pathlib import Path

import spectral_kernels as sk
import torch
from spectral_kernels.optim import _base
from torch import Tensor, nn

HERE = Path(__file__).parent
SHAPES = (((4,), (4, 6), (6, 4), (3,)), ((5, 3), (), (2, 2, 2, 2)))
MAKE = {
    "muon": lambda groups: sk.optim.Muon(groups, lr=0.02, adamw={"lr": 1e-3}),
    "shampoo": lambda groups: sk.optim.Shampoo(groups, lr=0.01, precondition_frequency=3),
    "soap": lambda groups: sk.optim.SOAP(groups, lr=0.01, adamw={"betas": (0.8, 0.99)}),
    "deva": lambda groups: sk.optim.DeVA(groups, lr=0.02, precondition_frequency=2),
}


def parameters() -> list[list[nn.Parameter]]:
    """Two groups of both kinds, in float64."""
    generator = torch.Generator().manual_seed(0)
    return [
        [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in s]
        for s in SHAPES
    ]


def started(
    name: str, params: list[list[nn.Parameter]]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """An optimizer over those groups, and a scheduler, which notes their first learning rates."""
    optimizer = MAKE[name]([{"params": group} for group in params])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    return optimizer, schedule


def advance(
    params: list[list[nn.Parameter]], optimizer: torch.optim.Optimizer, seeds: range
) -> None:
    """Steps with Gaussian gradients and falling learning rates."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for param in (param for group in params for param in group):
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9


def flat(params: list[list[nn.Parameter]]) -> list[Tensor]:
    """Copies of all parameters."""
    return [param.detach().clone() for group in params for param in group]


def main() -> None:
    """Writes the file."""
    found = {}
    for name in MAKE:
        params = parameters()
        optimizer, _ = started(name, params)
        advance(params, optimizer, range(3))
        saved, middle = copy.deepcopy(optimizer.state_dict()), flat(params)
        advance(params, optimizer, range(3, 6))
        found[name] = {"saved": saved, "middle": middle, "end": flat(params)}
    path = HERE / f"layout_v{_base.STATE_VERSION}.pt"
    torch.save(found, path)
    print(path)


if __name__ == "__main__":
    main()
