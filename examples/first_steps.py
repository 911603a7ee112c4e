"""Ten lines: a model, one optimizer for all of it, a loss that falls.

python examples/first_steps.py
"""

import spectral_kernels as sk
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
x = torch.randn(256, 32)
target = torch.tanh(x @ torch.randn(32, 8))
optimizer = sk.optim.Muon(sk.optim.param_groups(model), lr=0.02, adamw={"lr": 1e-3})
for step in range(101):
    loss = (model(x) - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step:3}: loss {loss.item():.4f}")
