"""A small stand-in for dion's module of the same name."""

import torch
from torch.optim import Optimizer

from .newton_schulz_triton import zeropower_via_newtonschulz5
from .polar_express import polar_express


class Muon(Optimizer):
    def __init__(self, params, lr=0.01, mu=0.95, epsilon=1e-8, use_polar_express=True):
        super().__init__(params, {"lr": lr, "mu": mu, "epsilon": epsilon})
        self._newton_schulz_func = (
            polar_express if use_polar_express else zeropower_via_newtonschulz5
        )

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].mul_(group["mu"]).add_(p.grad)
                epsilon = torch.tensor(group["epsilon"])
                update = self._newton_schulz_func(momentum.bfloat16(), epsilon=epsilon)
                p.add_(update, alpha=-group["lr"])
