"""A small stand-in for the module of the same name."""

from itertools import chain, cycle, islice, repeat

import torch

_COEFFICIENT_SETS = {
    "simple": [(3.4445, -4.7750, 2.0315)],
    "quintic": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    "cans": [(8.4703, -25.1081, 18.6293), (4.1828, -3.1087, 0.5806), (1.875, -1.25, 0.375)],
}


def get_coefficient_iterator(steps, coefficient_sets, mode="cycle"):
    ends = {"cycle": cycle(coefficient_sets), "repeat_last": repeat(coefficient_sets[-1])}
    rows = ends[mode] if mode == "cycle" else chain(coefficient_sets, ends[mode])
    return islice(rows, steps)


def newton_schulz(
    x,
    steps,
    coefficient_type="quintic",
    custom_coefficient_sets=None,
    eps=1e-15,
    transpose=None,
    tp_group=None,
    use_syrk=False,
    normalize_in_double=False,
):
    if x.dtype != torch.float32:
        raise TypeError(f"Input tensor x must be in float32, got {x.dtype}")
    tall = x.shape[-2] > x.shape[-1] if transpose is None else transpose
    y = x.mT if tall else x
    y = y / torch.linalg.matrix_norm(y, keepdim=True).clamp(min=eps)
    rows = _COEFFICIENT_SETS.get(coefficient_type, custom_coefficient_sets)
    mode = "repeat_last" if coefficient_type == "cans" else "cycle"
    if torch.get_float32_matmul_precision() == "medium":
        y = y.bfloat16()
    for a, b, c in get_coefficient_iterator(steps, rows, mode):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    y = y.float()
    return y.mT if tall else y
