"""A small stand-in for the package of the same name."""

import torch
from torch.optim import Optimizer

from pytorch_optimizer.optimizer.utils.matrix import (
    zero_power_via_gram_newton_schulz,
    zero_power_via_newton_schulz_5,
)


class Muon(Optimizer):
    def __init__(self, params, lr=2e-2, momentum=0.95, ns_method="newton_schulz"):
        super().__init__(params, {"lr": lr, "momentum": momentum, "ns_method": ns_method})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            gram = group["ns_method"] == "gram_newton_schulz"
            function = zero_power_via_gram_newton_schulz if gram else zero_power_via_newton_schulz_5
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                p.add_(function(buffer, num_steps=5), alpha=-group["lr"])
