"""A small stand-in for the module of the same name: rounds at random, as the original does."""

import torch
from stand_in import QUINTIC, iterated

zeroth_power_mode = "newtonschulz"
SIMPLE = ((3.4445, -4.7750, 2.0315),) * 5


def set_(dst, src):
    dst.copy_(src)


def inplace_orthogonal_(x, mode=None, out=None, scale_mode="none"):
    mode = mode or zeroth_power_mode
    square = x.shape[-1] == x.shape[-2]
    if square and mode == "qr":
        y = torch.linalg.qr(x).Q
    else:
        rows = SIMPLE if square and mode == "legacy_newtonschulz" else QUINTIC
        y = x / x.norm().clamp(min=1e-7)
        noise = 1 + 2.0**-9 * (torch.rand_like(y) - 0.5)
        y = (y * noise).bfloat16() if x.dtype != torch.float64 else y
        y = iterated(y, rows).to(x.dtype)
    if scale_mode == "scale":
        y *= max(1, x.shape[-2] / x.shape[-1]) ** 0.5
    elif scale_mode == "graft":
        y *= x.norm() / y.norm().clamp(min=1e-6)
    if out is None:
        return y
    set_(out, y)
