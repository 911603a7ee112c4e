"""A small stand-in for the module of the same name."""

import torch
from stand_in import parameters
from torch.optim import Optimizer

from . import utils


class Muon(Optimizer):
    def __init__(self, params, lr=0.0025, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group, p, state in parameters(self, buffer=lambda p: p):
            update = state["buffer"].mul_(group["momentum"]).add_(p.grad).clone()
            utils.inplace_orthogonal_(update, out=update, scale_mode="scale")
            p.add_(update, alpha=-group["lr"])
