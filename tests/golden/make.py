"""Writes public_trajectories.json: what the public optimizers do with the gradients stored in it.

    python tests/golden/make.py --deva CHECKOUT --soap CHECKOUT --shampoo CHECKOUT

CHECKOUT is the root of a clone of Decoupled-Variance-Adaptation (2e4d26e), SOAP (a1e5535)
and facebookresearch/optimizers (f606606). All of them are made to compute in float64 throughout:
their casts to float32 and bfloat16 become casts to float64, which shows the trajectory rather than
rounding. Matrices are square where a basis is taken, because the first factor of a longer side is
rank-deficient and the basis of its null space is the solver's choice.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import parity
import torch
from parity import LR, WEIGHT_DECAY
from spectral_kernels import _records

OUT = Path(__file__).with_name("public_trajectories.json")
CALLS = 14
FREQUENCY = 4


def trajectory(make_optimizer, start, grads):
    param = torch.nn.Parameter(start.clone())
    optimizer = make_optimizer([param])
    for grad in grads:
        param.grad = grad.clone()
        with torch.no_grad():
            optimizer.step()
    return param.detach().tolist()


def basis_cases(deva, soap):
    """Those of parity.py at another frequency, and two more."""
    rotated = {**parity.ROTATED, "precondition_frequency": FREQUENCY}
    linf = {name: rotated[name] for name in ("lr", "weight_decay", "betas")}
    return {
        **parity.basis_cases(deva, soap, rotated),
        "soap_uncorrected": lambda p: soap.SOAP(p, correct_bias=False, **rotated),
        "deva_linf_nesterov": lambda p: deva.DeVAEuclideanNorm(p, nestrov=True, **linf),
    }


def shampoo_cases(optimizer, types, largest):
    def case(root, graft, beta2, **options):
        config = types.RootInvShampooPreconditionerConfig(
            factor_matrix_dtype=torch.float64,
            inv_factor_matrix_dtype=torch.float64,
            inverse_exponent_override={2: 1.0 / root},
        )
        return lambda p: optimizer(
            p,
            lr=LR,
            betas=(0.9, beta2),
            epsilon=1e-6,
            weight_decay=WEIGHT_DECAY,
            # Anything larger would merge the dimensions into one.
            max_preconditioner_dim=largest,
            precondition_frequency=1,
            start_preconditioning_step=1,
            grafting_config=graft,
            preconditioner_config=config,
            **options,
        )

    second = {"beta2": 0.9, "epsilon": 1e-8}
    return {
        "shampoo_none_4": case(4, None, 0.95),
        "shampoo_none_2": case(2, None, 0.95),
        "shampoo_sgd_4": case(4, types.SGDPreconditionerConfig(), 0.95),
        "shampoo_adagrad_4": case(4, types.AdaGradPreconditionerConfig(epsilon=1e-8), 1.0),
        "shampoo_rmsprop_2": case(2, types.RMSpropPreconditionerConfig(**second), 0.95),
        "shampoo_adam_4": case(4, types.AdamPreconditionerConfig(**second), 0.95),
        "shampoo_undebiased_4": case(4, None, 0.95, use_bias_correction=False),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("deva", "soap", "shampoo"):
        parser.add_argument(f"--{name}", required=True, type=Path, metavar="CHECKOUT")
    args = parser.parse_args()
    sys.path[:0] = [str(args.deva), str(args.soap), str(args.shampoo)]

    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.bfloat16 = torch.Tensor.double
    import soap
    from distributed_shampoo import shampoo_types
    from distributed_shampoo.distributed_shampoo import DistributedShampoo
    from optimizers import deva

    generator = torch.Generator().manual_seed(0)

    def problem(m, n):
        mix = torch.randn(m, m, generator=generator)
        grads = [mix @ torch.randn(m, n, generator=generator) for _ in range(CALLS)]
        # Six digits keep the file small.
        return [(1e6 * x).round() / 1e6 for x in (torch.randn(m, n, generator=generator), *grads)]

    groups = []
    for shape, cases in (
        ((4, 4), basis_cases(deva, soap)),
        ((3, 5), shampoo_cases(DistributedShampoo, shampoo_types, 5)),
    ):
        start, *grads = problem(*shape)
        groups.append(
            {
                "start": start.tolist(),
                "grads": [grad.tolist() for grad in grads],
                "ends": {name: trajectory(make, start, grads) for name, make in cases.items()},
            }
        )
    settings = {"lr": LR, "weight_decay": WEIGHT_DECAY, "frequency": FREQUENCY}
    OUT.write_text(_records.text({**settings, "groups": groups}))


if __name__ == "__main__":
    main()
