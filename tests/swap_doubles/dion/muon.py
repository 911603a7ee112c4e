"""A small stand-in for dion's module of the same name."""

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from .newton_schulz_triton import zeropower_via_newtonschulz5
from .polar_express import polar_express


class Muon(Optimizer):
    def __init__(
        self, params, lr=0.01, mu=0.95, epsilon=1e-8, use_polar_express=True, distributed_mesh=None
    ):
        super().__init__(params, {"lr": lr, "mu": mu, "epsilon": epsilon})
        self._newton_schulz_func = (
            polar_express if use_polar_express else zeropower_via_newtonschulz5
        )
        self._mesh = distributed_mesh

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params, momenta = group["params"], []
            for p in params:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momenta.append(state["momentum"].mul_(group["mu"]).add_(p.grad).bfloat16())
            epsilon = torch.tensor(group["epsilon"])
            if self._mesh is None:
                updates = [self._newton_schulz_func(m, epsilon=epsilon) for m in momenta]
            else:
                params = [p.to_local() for p in params]
                updates = self._sharded([m.to_local() for m in momenta], epsilon)
            for p, update in zip(params, updates, strict=True):
                p.add_(update, alpha=-group["lr"])

    def _sharded(self, shards, epsilon):
        """As many matrices of one shape at a time as there are ranks: a rank gets one whole."""
        group = self._mesh.get_group()
        world = dist.get_world_size(group)
        updates = []
        for start in range(0, len(shards), world):
            batch = shards[start : start + world]
            parts = [torch.empty_like(shard) for shard in batch]
            dist.all_to_all(parts, batch, group=group)
            whole = self._newton_schulz_func(torch.cat(parts), epsilon=epsilon)
            back = [torch.empty_like(shard) for shard in batch]
            dist.all_to_all(back, list(whole.chunk(world)), group=group)
            updates += back
        return updates
