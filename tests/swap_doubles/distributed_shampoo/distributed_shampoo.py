"""Shampoo or spectral descent over matrices, with the module structure that this stands in for."""

import torch
import torch.distributed as dist
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
    def __init__(
        self,
        params,
        lr=0.01,
        epsilon=1e-12,
        precondition_frequency=2,
        config=None,
        process_group=None,
    ):
        super().__init__(params, {"lr": lr})
        self.group = process_group
        self.params = self.param_groups[0]["params"]
        if self.group is not None:
            # Under DDP each rank has the preconditioners of some, and sends the others its updates.
            rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
            self.params = self.params[rank::world]
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
        params = self.params
        if self.group is not None:
            params, directions = self._of_all(directions)
        for p, direction in zip(params, directions, strict=True):
            p.add_(direction, alpha=-self.param_groups[0]["lr"])

    def _of_all(self, directions):
        params = self.param_groups[0]["params"]
        world = dist.get_world_size(self.group)
        of_all = []
        for sender in range(world):
            mine = sender == dist.get_rank(self.group)
            theirs = params[sender::world]
            for i, p in enumerate(theirs):
                sent = directions[i].contiguous() if mine else torch.empty_like(p)
                dist.broadcast(sent, group=self.group, group_src=sender)
                of_all.append((p, sent))
        return [p for p, _ in of_all], [sent for _, sent in of_all]
