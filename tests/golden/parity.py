"""Writes parity.json: where 100 steps of the public optimizers lead.

    python tests/golden/parity.py --peers FOLDER [--out FILE]

FOLDER holds clones called Decoupled-Variance-Adaptation (2e4d26e), SOAP (a1e5535), optimizers
(facebookresearch/optimizers, f606606), dion (microsoft/dion, 0a059a4) and modded-nanogpt
(KellerJordan/modded-nanogpt, f411b3d); torch.optim.Muon comes with torch. Under "float64" their
casts to float32 and bfloat16 are casts to float64, so that their polynomial, eigh and QR compute in
float64 at every refresh; under "float32" they ran as they are.

modded-nanogpt's NorMuon is a class of a script that needs a card to be imported: it is taken out of
the script as it stands, and given plain torch for two products and one process for its exchanges.

test_parity.py imports the problem from here, so this module imports no public code on its own.
"""

from __future__ import annotations

import argparse
import ast
import collections
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from spectral_kernels import _records
from torch import Tensor

FILE = Path(__file__).with_name("parity.json")
CHECKPOINTS = (10, 100)
# Powers of two: Distributed Shampoo keeps the learning rate in float32.
LR, WEIGHT_DECAY = 2.0**-7, 0.125
FREQUENCY = 7
ROTATED = {
    "lr": LR,
    "weight_decay": WEIGHT_DECAY,
    "betas": (0.9, 0.95),
    "shampoo_beta": 0.8,
    "precondition_frequency": FREQUENCY,
}
# Two blocks a side, of unequal size. A basis needs a square matrix: the first factor of a longer
# side is rank-deficient, and the basis of its null space is the solver's choice.
SHAPES = {
    **{"shampoo": (5, 8), "kl": (6, 6), "muon": (5, 8), "soap": (6, 6), "deva": (6, 6)},
    **{"normuon": (5, 8), "nanogpt_wide": (5, 8), "nanogpt": (8, 5)},
}
# Gradients so large that nothing is left of the 1e-6 that is added to their norms.
LARGE = ("nanogpt",)
LARGEST = {"shampoo_blocks": 4}
# Cases of which only the direction of the last step is kept. Public KL-Shampoo starts from other
# factors and leaves out their 1/n and 1/m, which decay and cancel: 200 steps forget the start.
LAST_STEP = ("kl",)


def steps(case: str) -> int:
    return 200 if case.startswith(LAST_STEP) else CHECKPOINTS[-1]


def problem(case: str) -> tuple[Tensor, Iterator[Tensor]]:
    """Start and gradients, exact in float32: factors are full-rank with condition below 1e3."""
    m, n = SHAPES.get(case) or SHAPES[case.partition("_")[0]]
    size = 2.0**40 if case.startswith(LARGE) else 1.0
    numbers = random.Random(f"{m} x {n}")

    def noise() -> Tensor:
        values = [round(4096 * (numbers.random() - 0.5)) for _ in range(m * n)]
        return torch.tensor(values, dtype=torch.float64).reshape(m, n) / 4096

    def gradients() -> Iterator[Tensor]:
        spread = torch.linspace(1.0, 2.0, min(m, n), dtype=torch.float64)
        mean = torch.zeros(m, n, dtype=torch.float64)
        if not case.startswith(LAST_STEP):
            mean.diagonal().copy_(torch.floor(64 * spread) / 64)
        for _ in range(steps(case)):
            yield size * (mean + noise())

    return noise(), gradients()


def trajectory(case: str, make: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
    """The parameter at the checkpoints; for the cases of LAST_STEP what the last step moved."""
    start, gradients = problem(case)
    param = torch.nn.Parameter(start.to(dtype))
    optimizer = make([param])
    found = []
    for step, grad in enumerate(gradients, 1):
        before = param.detach().clone()
        param.grad = grad.to(dtype)
        optimizer.step()
        if case.startswith(LAST_STEP):
            if step == steps(case):
                found.append(param.detach() - before)
        elif step in CHECKPOINTS:
            found.append(param.detach().clone())
    return found


def muon_cases() -> dict[str, Callable[..., Any]]:
    def case(**options: Any) -> Callable[..., Any]:
        return lambda p: torch.optim.Muon(p, lr=LR, weight_decay=WEIGHT_DECAY, **options)

    return {
        "muon": case(),
        "muon_plain": case(nesterov=False),
        "muon_rms": case(adjust_lr_fn="match_rms_adamw", momentum=0.8, ns_steps=4),
    }


def normuon_cases(normuon: Any) -> dict[str, Callable[..., Any]]:
    def case(**options: Any) -> Callable[..., Any]:
        values = {"lr": LR, "mu": 0.9, "muon_beta2": 0.95, "weight_decay": WEIGHT_DECAY}
        # What it adds to the norm of the gradient is a floor here.
        return lambda p: normuon.NorMuon(p, epsilon=0.0, **values, **options)

    return {
        "normuon": case(),
        "normuon_cautious": case(nesterov=True, cautious_wd=True, adjust_lr="rms_norm"),
    }


def nanogpt_module(script: Path) -> ModuleType:
    wanted = ("polar_express_coeffs", "polar_express", "NorMuon")
    wanted = (*wanted, "cautious_wd_and_update_inplace", "apply_normuon_variance_reduction")
    tree = ast.parse(script.read_text())
    tree.body = [node for node in tree.body if wanted_name(node) in wanted]
    module = ModuleType("nanogpt")
    vars(module).update(
        torch=torch,
        Tensor=Tensor,
        defaultdict=collections.defaultdict,
        dist=OneProcess,
        XXT=lambda x, out: out.copy_(x @ x.mT),
        ba_plus_cAA=lambda a, alpha, beta, out: out.copy_(beta * a + alpha * a @ a),
    )
    exec(compile(tree, script, "exec"), vars(module))
    return module


def nanogpt_cases(script: Path) -> dict[str, Callable[..., Any]]:
    optimizer = nanogpt_module(script).NorMuon

    def case(params: Any) -> Any:
        for param in params:
            param.label = "mlp"
        values = {"lr": LR, "momentum": 0.9, "beta2": 0.95, "weight_decay": 16.0}
        return optimizer(params, custom_sizing=False, **values)

    return {"nanogpt": case, "nanogpt_wide": case}


def wanted_name(node: ast.stmt) -> str | None:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None


class OneProcess:
    """torch.distributed as one process needs it."""

    ReduceOp = torch.distributed.ReduceOp
    is_initialized = staticmethod(lambda: False)
    get_rank = staticmethod(lambda: 0)
    get_world_size = staticmethod(lambda: 1)

    @staticmethod
    def reduce_scatter_tensor(out: Tensor, x: Tensor, **options: Any) -> Any:
        out.copy_(x)
        return OneProcess()

    all_gather_into_tensor = reduce_scatter_tensor

    def get_future(self) -> Any:
        return self

    def wait(self) -> None:
        pass


def basis_cases(
    deva: Any, soap: Any, rotated: dict[str, Any] = ROTATED
) -> dict[str, Callable[..., Any]]:
    linf = {name: rotated[name] for name in ("lr", "weight_decay", "betas")}
    return {
        "soap": lambda p: soap.SOAP(p, **rotated),
        "soap_normalized": lambda p: soap.SOAP(p, normalize_grads=True, **rotated),
        "deva": lambda p: deva.DeVASchattenNorm(p, **rotated),
        "deva_plain": lambda p: deva.DeVASchattenNorm(p, nesterov=False, **rotated),
        "deva_instant": lambda p: deva.DeVASchattenNormIns(p, **rotated),
        "deva_sign": lambda p: deva.DeVASchattenNormSignStablization(p, **rotated),
        "deva_linf": lambda p: deva.DeVAEuclideanNorm(p, **linf),
    }


def shampoo_cases(optimizer: Any, types: Any, dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    def case(root: int, graft: Any = None, beta2: float = 0.95, **options: Any) -> Any:
        kind = types.RootInvShampooPreconditionerConfig
        if options.pop("kl", False):
            kind = types.RootInvKLShampooPreconditionerConfig
        config = kind(
            factor_matrix_dtype=dtype,
            inv_factor_matrix_dtype=dtype,
            inverse_exponent_override={2: 1.0 / root},
        )
        values = {
            "lr": LR,
            "betas": (0.9, beta2),
            "epsilon": 1e-6,
            "weight_decay": WEIGHT_DECAY,
            # Anything larger would merge the dimensions into one.
            "max_preconditioner_dim": 8,
            # With a longer period it would go on as its grafted method until the end of the first.
            "precondition_frequency": 1,
            "start_preconditioning_step": 1,
            "grafting_config": graft,
            "preconditioner_config": config,
        }
        return lambda p: optimizer(p, **{**values, **options})

    adam = types.AdamPreconditionerConfig(beta2=0.9, epsilon=1e-8)
    kl = {"weight_decay": 0.0, "epsilon": 1e-14, "betas": (0.0, 0.8), "kl": True}
    return {
        "shampoo_4": case(4),
        "shampoo_2": case(2),
        "shampoo_sgd": case(4, types.SGDPreconditionerConfig()),
        "shampoo_adam": case(4, adam),
        "shampoo_adagrad": case(4, types.AdaGradPreconditionerConfig(epsilon=1e-8), beta2=1.0),
        "shampoo_blocks": case(4, adam, max_preconditioner_dim=LARGEST["shampoo_blocks"]),
        "kl": case(2, **kl),
    }


def public_cases(peers: Path, dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    folders = ("Decoupled-Variance-Adaptation", "SOAP", "optimizers", "dion")
    sys.path[:0] = [str(peers / name) for name in folders]
    import dion
    import soap
    from distributed_shampoo import shampoo_types
    from distributed_shampoo.distributed_shampoo import DistributedShampoo
    from optimizers import deva

    return {
        **muon_cases(),
        **normuon_cases(dion),
        **nanogpt_cases(peers / "modded-nanogpt" / "train_gpt_medium.py"),
        **basis_cases(deva, soap),
        **shampoo_cases(DistributedShampoo, shampoo_types, dtype),
    }


def ends(peers: Path, dtype: torch.dtype) -> dict[str, list[Any]]:
    return {
        case: [point.double().tolist() for point in trajectory(case, make, dtype)]
        for case, make in public_cases(peers, dtype).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--out", default=FILE, type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    found = {"float32": ends(options.peers, torch.float32)}
    torch.set_default_dtype(torch.float64)
    # Copies, as a cast to another dtype makes one: torch.optim.Muon writes what it cast.
    torch.Tensor.float = torch.Tensor.bfloat16 = lambda x: x.double().clone()  # type: ignore
    torch.bfloat16 = torch.float64  # for those who write x.to(torch.bfloat16)
    found["float64"] = ends(options.peers, torch.float64)
    options.out.write_text(_records.text(found))


if __name__ == "__main__":
    main()
