"""100 steps beside the public optimizers: distances relative to the distance moved."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import spectral_kernels as sk
import torch
from spectral_kernels.swap.dion import _ROWS as DION_ROWS
from support.packages import CLONES, public_code
from support.states import golden
from torch import Tensor

parity = golden("parity")
GOLDEN = json.loads(parity.FILE.read_text())
LR, WEIGHT_DECAY = parity.LR, parity.WEIGHT_DECAY
REFERENCE = {**parity.ROTATED, "reference": True}

Make = Callable[..., torch.optim.Optimizer]


def muon(**options: Any) -> Make:
    return lambda p: sk.optim.Muon(p, lr=LR, weight_decay=WEIGHT_DECAY, eps=1e-7, **options)


def soap(**options: Any) -> Make:
    return lambda p: sk.optim.SOAP(p, **parity.ROTATED, **options)


def deva(**options: Any) -> Make:
    return lambda p: sk.optim.DeVA(p, **{**REFERENCE, **options})


def shampoo(root: int, *, beta2: float = 0.95, **options: Any) -> Make:
    values = {"betas": (0.9, beta2), "epsilon": 1e-6, "lr": LR, "weight_decay": WEIGHT_DECAY}
    return lambda p: sk.optim.Shampoo.like_distributed(
        p, exponent=1 / root, **{**values, **options}
    )


def dion(**options: Any) -> Make:
    values = {"momentum": 0.9, "coefficients": DION_ROWS, "beta2": 0.95, "nesterov": False}
    return lambda p: sk.optim.Muon(p, LR, WEIGHT_DECAY, **{**values, **options})


def nanogpt(**group: Any) -> Make:
    def make(params: Any) -> torch.optim.Optimizer:
        options = {"momentum": 0.9, "coefficients": DION_ROWS, "beta2": 0.95}
        # Its decay is the group's times both the learning rate and that with the scale.
        scale = math.sqrt(8 / 5) if not group else 1.0
        decay = 16.0 * LR * scale
        how = {"cautious_weight_decay": True, "weight_decay": decay, **options}
        return sk.optim.Muon([{"params": params, **group}], LR, **how)

    return make


KL = {
    "kl": True,
    "kl_order": "simultaneous",
    "betas": (0.0, 0.8),
    "weight_decay": 0.0,
    "epsilon": 1e-14,
}
CASES: dict[str, Make] = {
    "muon": muon(),
    "muon_plain": muon(nesterov=False),
    "muon_rms": muon(adjust_lr_fn="match_rms_adamw", momentum=0.8, ns_steps=4),
    "normuon": dion(adjust_lr_fn="spectral_unclamped"),
    "normuon_cautious": dion(
        nesterov=True, cautious_weight_decay=True, adjust_lr_fn="match_rms_adamw"
    ),
    "nanogpt": nanogpt(),
    # Columns are its neurons where a matrix is wide.
    "nanogpt_wide": nanogpt(matrix_dims=(1, 0), adjust_lr_fn="none"),
    "soap": soap(),
    "soap_normalized": soap(normalize_grads=True),
    "deva": deva(),
    "deva_plain": deva(nesterov=False),
    "deva_instant": deva(variant="instant"),
    "deva_sign": deva(variant="sign"),
    "deva_linf": deva(variant="linf", eps=1e-5),
    "shampoo_4": shampoo(4),
    "shampoo_2": shampoo(2),
    "shampoo_sgd": shampoo(4, graft="sgd"),
    "shampoo_adam": shampoo(4, graft="adam", graft_beta2=0.9),
    "shampoo_adagrad": shampoo(4, beta2=1.0, graft="adagrad"),
    "shampoo_blocks": shampoo(
        4,
        graft="adam",
        graft_beta2=0.9,
        max_preconditioner_dim=parity.LARGEST["shampoo_blocks"],
    ),
    "kl": shampoo(2, **KL),
}


# What has a polynomial in bfloat16 unless it is told otherwise.
WITH_POLYNOMIAL = ("muon", "normuon", "nanogpt", "deva")
POLYNOMIAL = [case for case in CASES if case.startswith(WITH_POLYNOMIAL) and case != "deva_linf"]
# Both NorMuons have the scaled learning rate in float32, whatever the parameters are, and
# modded-nanogpt takes max(v, 1e-10)^(-1/2) for 1 / (sqrt(v) + 1e-8).
LIMITS = dict.fromkeys(("normuon", "normuon_cautious", "nanogpt", "nanogpt_wide"), 1e-7)


def errors(case: str, mine: list[Tensor], theirs: list[Any]) -> list[float]:
    """Differences at the checkpoints, relative to the distance moved until there."""
    start, _ = parity.problem(case)
    found = []
    for x, values in zip(mine, theirs, strict=True):
        y = torch.tensor(values, dtype=torch.float64)
        origin = start
        if case.startswith(parity.LAST_STEP):
            x, y, origin = x / x.norm(), y / y.norm(), torch.zeros_like(y)
        found.append(float((x.double() - y).norm() / (y - origin).norm()))
    return found


def trajectory(case: str, dtype: torch.dtype, **values: Any) -> list[Tensor]:
    def make(params: Any) -> torch.optim.Optimizer:
        optimizer = CASES[case](params)
        for group in optimizer.param_groups:
            group.update(values)
        return optimizer

    found: list[Tensor] = parity.trajectory(case, make, dtype)
    return found


def as_tensors(values: list[Any]) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_case_is_compared() -> None:
    assert GOLDEN["float64"].keys() == GOLDEN["float32"].keys() == CASES.keys()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_float64(case: str, backend: str) -> None:
    with sk.use_backend(backend):
        mine = trajectory(case, torch.float64)
    assert max(errors(case, mine, GOLDEN["float64"][case])) <= LIMITS.get(case, 1e-10)


@pytest.mark.parametrize("case", CASES)
def test_float32(case: str) -> None:
    """Against what the public code does in float64."""
    values = {"compute_dtype": torch.float32} if case in POLYNOMIAL else {}
    mine = trajectory(case, torch.float32, **values)
    assert max(errors(case, mine, GOLDEN["float64"][case])) <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_float32_is_as_accurate_as_the_public_code(case: str) -> None:
    """Polynomials in bfloat16 on both sides, everything as it comes."""
    exact = GOLDEN["float64"][case]
    mine = errors(case, trajectory(case, torch.float32), exact)
    theirs = errors(case, as_tensors(GOLDEN["float32"][case]), exact)
    assert all(x <= 2 * y + 1e-6 for x, y in zip(mine, theirs, strict=True))


def test_public_code_still_does_what_the_golden_file_holds(tmp_path: Path) -> None:
    public_code((*CLONES, "dion", "modded-nanogpt"))
    out = tmp_path / "parity.json"
    peers = os.environ["SPECTRAL_KERNELS_PEERS"]
    subprocess.run([sys.executable, parity.__file__, "--peers", peers, "--out", out], check=True)
    found = json.loads(out.read_text())
    assert found["float64"].keys() == CASES.keys()
    for case in CASES:
        again = as_tensors(found["float64"][case])
        assert max(errors(case, again, GOLDEN["float64"][case])) <= 1e-12
        theirs = errors(case, as_tensors(found["float32"][case]), GOLDEN["float64"][case])
        mine = errors(case, trajectory(case, torch.float32), GOLDEN["float64"][case])
        assert all(x <= 2 * y + 1e-6 for x, y in zip(mine, theirs, strict=True))
