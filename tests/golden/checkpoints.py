"""Writes checkpoints/: one file for each optimizer, as the version at hand saves it.

    python tests/golden/checkpoints.py VERSION

VERSION names the new files, `muon-VERSION.pt.gz` and so on. Files of earlier versions stay as they
are: test_checkpoints.py loads them all, for ever. A file holds, for every setting and dtype below,
parameters and `state_dict()` in the middle of an interval between refreshes, what each parameter's
state was, gradients to go on with, and the parameters after them. Reading one needs torch only:
`torch.load(gzip.open(path))`.
"""

from __future__ import annotations

import argparse
import copy
import gzip
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import spectral_kernels as sk
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).with_name("checkpoints")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((6, 5), (7,), (4, 2, 3, 1), (5, 6), ())
# A refresh at the steps 1, 4 and 7 of the settings that have any.
BEFORE, AFTER = 5, 3

Make = Callable[..., torch.optim.Optimizer]
# What the names in the files mean: never changed, only added to.
SETTINGS: dict[str, dict[str, Make]] = {
    "muon": {
        "default": partial(sk.optim.Muon, lr=0.02),
        "plain": partial(sk.optim.Muon, lr=0.02, nesterov=False, weight_decay=0.0),
    },
    "shampoo": {
        "default": partial(sk.optim.Shampoo, lr=0.01, precondition_frequency=3),
        "blocks": partial(sk.optim.Shampoo, lr=0.01, block_size=4, precondition_frequency=3),
        "kl": partial(sk.optim.Shampoo, lr=0.01, kl=True, precondition_frequency=3),
    },
    "soap": {
        "default": partial(sk.optim.SOAP, lr=0.01, precondition_frequency=3),
        "one side": partial(sk.optim.SOAP, lr=0.01, max_precond_dim=5, precondition_frequency=3),
    },
    "deva": {
        "default": partial(sk.optim.DeVA, lr=0.05, precondition_frequency=3),
        "low memory": partial(sk.optim.DeVA, lr=0.05, variant="low_memory"),
        "linf": partial(sk.optim.DeVA, lr=0.05, variant="linf"),
    },
}
GROUPS = ("one list", "two groups")


def build(make: Make, params: list[nn.Parameter], groups: str) -> torch.optim.Optimizer:
    """The optimizer over one list, or over two groups that both mix matrices and vectors."""
    if groups == "one list":
        return make(params)
    return make([{"params": params[:2], "lr": 0.03}, {"params": params[2:], "weight_decay": 0.25}])


def go_on(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], grads: list[list[Tensor]]
) -> None:
    """One step with each row of gradients."""
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad.clone()
        optimizer.step()


def _wave(shape: tuple[int, ...], seed: float, dtype: torch.dtype) -> Tensor:
    """Numbers of full rank, the same on every machine up to the last bit."""
    size = torch.Size(shape).numel()
    i = torch.arange(size, dtype=torch.float64, device="cpu")
    return torch.sin(seed + 1.3 * i + 0.11 * i * i).reshape(shape).to(dtype)


def _record(make: Make, groups: str, dtype: torch.dtype) -> dict[str, Any]:
    params = [nn.Parameter(_wave(s, 0.1 + i, dtype)) for i, s in enumerate(SHAPES)]
    grads = [
        [_wave(s, 10.0 * t + i, dtype) for i, s in enumerate(SHAPES)]
        for t in range(1, BEFORE + AFTER + 1)
    ]
    optimizer = build(make, params, groups)
    go_on(optimizer, params, grads[:BEFORE])
    # Copied together: tensors that both hold are written once.
    record = copy.deepcopy(
        {
            "params": [p.detach() for p in params],
            "state_dict": optimizer.state_dict(),
            "state": [dict(optimizer.state[p]) for p in params],
            "grads": grads[BEFORE:],
        }
    )
    go_on(optimizer, params, grads[BEFORE:])
    return {**record, "after": [p.detach().clone() for p in params]}


def main() -> None:
    """Writes one file for each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version")
    version = parser.parse_args().version
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name, settings in SETTINGS.items():
        path = FOLDER / f"{name}-{version}.pt.gz"
        if path.exists():
            parser.error(f"{path} exists: it is kept as it is")
        records = {
            f"{setting}, {groups}, {str(dtype).removeprefix('torch.')}": _record(
                make, groups, dtype
            )
            for setting, make in settings.items()
            for groups in GROUPS
            for dtype in (DTYPES if setting == "default" else DTYPES[:1])
        }
        with gzip.GzipFile(path, "wb", mtime=0) as file:
            torch.save(records, file)
        print(f"{path.name}: {len(records)} records, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
