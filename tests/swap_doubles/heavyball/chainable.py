"""A small stand-in for the module of the same name."""

import torch
from torch.optim import Optimizer

from . import utils


class Muon(Optimizer):
    def __init__(self, params, lr=0.0025, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["buffer"] = torch.zeros_like(p)
                update = state["buffer"].mul_(group["momentum"]).add_(p.grad).clone()
                utils.inplace_orthogonal_(update, out=update, scale_mode="scale")
                p.add_(update, alpha=-group["lr"])
