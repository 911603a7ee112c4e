"""What one process finds, computed once, before the workers are forked: all of them have it."""

from __future__ import annotations

import torch

from ranks.runs import OPTIMIZERS, alone

torch.set_num_threads(1)
for name in OPTIMIZERS:
    for dtype in (torch.float32, torch.bfloat16):
        alone(name, dtype)
