"""A matrix problem whose optimum is known, in float64: min over X of ||A (X - X*) B||_F^2 / 2.

    python examples/matrix_problem.py

A and B have condition 30, so the problem's is 30^4 in curvature. The score is the distance from X*,
relative to where X began. Shampoo's factors see A and B; an elementwise method does not.
"""

from __future__ import annotations

import torch
from shared.workload import Task, digest, main
from torch import Tensor, nn

ROWS, COLUMNS, CONDITION = 24, 16, 30.0


class Matrix(nn.Module):
    """One matrix, from zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(ROWS, COLUMNS, dtype=torch.float64))


class MatrixProblem(Task):
    """Deterministic: every batch is the whole problem."""

    name = "matrix-problem"
    steps = 1000
    score = "||X-X*||/||X*||"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def conditioned(size: int) -> Tensor:
            noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
            u, _, v = torch.linalg.svd(noise)
            spread = torch.logspace(0, 1, size, CONDITION, dtype=torch.float64) / CONDITION
            return u @ torch.diag(spread) @ v

        self.left, self.right = conditioned(ROWS), conditioned(COLUMNS)
        self.optimum = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
        self.sha256 = digest(self.left, self.right, self.optimum)

    def model(self) -> nn.Module:
        return Matrix()

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        off = model.get_parameter("weight") - self.optimum
        return (self.left @ off @ self.right).square().sum() / 2

    def evaluate(self, model: nn.Module) -> float:
        off = model.get_parameter("weight") - self.optimum
        return float(off.norm() / self.optimum.norm())


if __name__ == "__main__":
    main(MatrixProblem())
