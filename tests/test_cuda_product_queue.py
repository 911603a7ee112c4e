"""All products of an iteration in one launch: the bits of one launch after the other."""

from __future__ import annotations

import pytest
import torch
from emulated_cuda import Guarded, arranged
from spectral_kernels.newton_schulz import newton_schulz
from support.cases import new_step
from support.inputs import gaussian
from support.layouts import same_bits

pytestmark = pytest.mark.usefixtures("native", "backend_emulated")

# Orders of blocks, and how many are at work at a time.
ARRANGEMENTS = ({}, {"residents": 4}, {"residents": 3, "order": 1}, {"residents": 7, "order": 3})
ROWS = ((2.0, -1.5, 0.5),)


def launched(run, **arrangement):
    """Of one launch a product."""
    with arranged(queue=False, **arrangement):
        return run()


def queued(run, **arrangement):
    with arranged(queue=True, **arrangement):
        return run()


# Planes of X and of square matrices: 1 and 1, 1 and 2 with sums in parts, 2 and 2 with a restart.
CASES = (
    ((130, 129), torch.bfloat16, {"steps": 2}),
    ((150, 129), torch.float16, {"steps": 2}),
    ((140, 580), torch.bfloat16, {"steps": 2}),
    ((580, 130), torch.float16, {"steps": 1}),
    ((129, 140), torch.float32, {"steps": 2, "method": "gram", "restarts": [1]}),
)


@pytest.mark.parametrize(("shape", "dtype", "options"), CASES, ids=str)
def test_bits(shape, dtype, options):
    x = gaussian(*shape, dtype=dtype)

    def run():
        return newton_schulz(x, **options)

    expected = launched(run)
    for arrangement in ARRANGEMENTS[:: 1 if dtype == torch.bfloat16 else 3]:
        assert same_bits(queued(run, **arrangement), expected), arrangement


def test_large_tiles():
    """A cost model that is told of one multiprocessor prefers tiles of 128."""
    x = gaussian(200, 250, dtype=torch.bfloat16)

    def run():
        return newton_schulz(x, coefficients=ROWS * 2)

    expected = launched(run, multiprocessors=1)
    assert same_bits(queued(run, multiprocessors=1, residents=3), expected)


def test_a_list_of_all_kinds():
    """Shapes of the standard and the Gram form, on chip and not, empty, zero and not finite."""
    shapes = [(2, 150, 129), (70, 100), (0, 3), (129, 530), (130, 131)]
    options = {"compute_dtype": torch.bfloat16, "weight_decay": 0.1}
    start = new_step("muon_step_", shapes, **options)
    start["grads"][0][1, 2, 3] = torch.inf
    start["grads"][4].zero_()

    def run():
        case = start.clone()
        case.run("cuda")
        return [case[name] for name in case.names(write=True)]

    expected = launched(run)
    for arrangement in ARRANGEMENTS[::3]:
        assert same_bits(queued(run, **arrangement), expected), arrangement


def test_more_products_than_one_launch_takes():
    """66; rows without a square take no multiplication for W."""
    x = gaussian(129, 130, dtype=torch.bfloat16)

    def run():
        return newton_schulz(x, coefficients=((1.5, -0.5, 0.0),) * 22)

    assert same_bits(queued(run, residents=5), launched(run))


@pytest.mark.long
def test_more_matrices_than_one_launch_takes():
    shapes = [(129, 129 + i % 4) for i in range(50)]
    options = {"rows": ROWS, "restarts": [()] * len(shapes), "compute_dtype": torch.bfloat16}
    start = new_step("muon_step_", shapes, **options)

    def run():
        case = start.clone()
        case.run("cuda")
        return case["params"]

    assert same_bits(queued(run, residents=3), launched(run))


# Poisoned: who does not wait must not find what a run before it has left.
@pytest.mark.usefixtures("poisoned_tensors")
@pytest.mark.parametrize(
    ("rows", "multiprocessors", "one_launch"), [(129, 132, True), (300, 1, False)]
)
def test_the_model_keeps_launches_for_long_products(rows, multiprocessors, one_launch):
    """Which path ran shows where nobody waits."""
    x = gaussian(rows, rows + 1, dtype=torch.bfloat16)

    def run():
        return newton_schulz(x, coefficients=ROWS * 2)

    options = {"residents": 7, "multiprocessors": multiprocessors}
    expected = launched(run, **options)
    with arranged(left_out="wait_for", **options):
        assert same_bits(run(), expected) != one_launch
    if not one_launch:
        assert not same_bits(queued(run, left_out="wait_for", **options), expected)


def test_no_access_outside_the_tensors():
    x = gaussian(133, 129, dtype=torch.bfloat16)

    def run():
        return newton_schulz(Guarded(x).tensor, coefficients=ROWS)

    assert same_bits(queued(run, residents=3), launched(run))
