"""A small stand-in for the module of the same name: rounds at random, as the original does."""

import torch

zeroth_power_mode = "newtonschulz"
ROWS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
SIMPLE = ((3.4445, -4.7750, 2.0315),) * 5


def set_(dst, src):
    dst.copy_(src)


def inplace_orthogonal_(x, mode=None, out=None, scale_mode="none"):
    mode = mode or zeroth_power_mode
    square = x.shape[-1] == x.shape[-2]
    if square and mode == "qr":
        y = torch.linalg.qr(x).Q
    else:
        rows = SIMPLE if square and mode == "legacy_newtonschulz" else ROWS
        y = x / x.norm().clamp(min=1e-7)
        noise = 1 + 2.0**-9 * (torch.rand_like(y) - 0.5)
        y = (y * noise).bfloat16() if x.dtype != torch.float64 else y
        tall = y.shape[-2] > y.shape[-1]
        y = y.mT if tall else y
        for a, b, c in rows:
            gram = y @ y.mT
            y = a * y + (b * gram + c * gram @ gram) @ y
        y = (y.mT if tall else y).to(x.dtype)
    if scale_mode == "scale":
        y *= max(1, x.shape[-2] / x.shape[-1]) ** 0.5
    elif scale_mode == "graft":
        y *= x.norm() / y.norm().clamp(min=1e-6)
    if out is None:
        return y
    set_(out, y)
