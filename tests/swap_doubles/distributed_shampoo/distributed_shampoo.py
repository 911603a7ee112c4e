"""Shampoo or spectral descent over matrices, with the module structure that this stands in for."""

import torch
from torch.optim import Optimizer

from distributed_shampoo.preconditioner import spectral_descent_preconditioner_list as spectral
from distributed_shampoo.preconditioner.matrix_functions_types import (
    EigenConfig,
    NewtonSchulzOrthogonalizationConfig,
)
from distributed_shampoo.preconditioner.shampoo_preconditioner_list import (
    BaseShampooPreconditionerList,
    RootFactors,
)


class DistributedShampoo(Optimizer):
    def __init__(self, params, lr=0.01, epsilon=1e-12, precondition_frequency=2, config=None):
        super().__init__(params, {"lr": lr})
        self.params = self.param_groups[0]["params"]
        self.frequency = precondition_frequency
        self.config = EigenConfig() if config is None else config
        self.preconditioners = BaseShampooPreconditionerList(
            [RootFactors(tuple(p.shape), self.config, epsilon) for p in self.params]
        )
        self.steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        grads = tuple(p.grad for p in self.params)
        if isinstance(self.config, NewtonSchulzOrthogonalizationConfig):
            directions = spectral.precondition(grads, self.config)
        else:
            self.steps += 1
            self.preconditioners.update_preconditioners(
                masked_grad_list=grads,
                step=torch.tensor(float(self.steps)),
                perform_amortized_computation=self.steps % self.frequency == 0 or self.steps == 1,
            )
            directions = self.preconditioners.precondition(grads)
        for p, direction in zip(self.params, directions, strict=True):
            p.add_(direction, alpha=-self.param_groups[0]["lr"])
