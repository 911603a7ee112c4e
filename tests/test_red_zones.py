"""No CPU operator writes beside its tensors or touches memory beyond them, in any layout."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cases import case, labels
from support.layouts import LAYOUTS, Placed
from torch import Tensor
from torch.utils._pytree import tree_map

TESTS = str(Path(__file__).parent)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_margins_of_every_tensor_stay(dtype, layout, backend):
    """Every matrix of every operator lies among NaN, which keep their bits."""
    if backend.name == "reference":
        pytest.skip("torch's own operations")
    for label in labels(dtype):
        placed: list[Placed] = []

        def place(x: object, placed: list[Placed] = placed) -> object:
            # Size 0 stands for what is absent; counters have no layout.
            if not (isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 and x.numel()):
                return x
            placed.append(Placed(x, layout))
            return placed[-1].tensor

        one = case(label, dtype)
        replace(one, args=tree_map(place, one.args)).run(backend.name)
        assert placed, label
        for each in placed:
            each.assert_untouched_around()


_GUARDED = """
import sys; sys.path.insert(0, {tests!r})
from dataclasses import replace
import torch
from torch.utils._pytree import tree_map
from emulated_cuda import Guarded
from support.cases import case, labels
from support.fuzzing import instruction_set

count = 0
with instruction_set({isa!r}):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for label in labels(dtype):
            for at_end in (True, False):
                kept = []

                def guard(x):
                    if not isinstance(x, torch.Tensor) or not x.numel():
                        return x
                    kept.append(Guarded(x, at_end=at_end))
                    return kept[-1].tensor

                print(label, dtype, at_end, flush=True)
                one = case(label, dtype)
                replace(one, args=tree_map(guard, one.args)).run("cpu")
                count += len(kept)
print(count)
"""


def test_memory_beyond_every_tensor_is_not_touched(backend):
    """Each tensor ends, or begins, at a page that nobody may touch: one access ends the process."""
    if backend.name == "reference":
        pytest.skip("torch's own operations")
    code = _GUARDED.format(tests=TESTS, isa=backend.isa)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (done.returncode, lines[-1:], done.stderr[-1000:])
    assert int(lines[-1]) > 200


def test_a_write_beside_a_tensor_is_noticed():
    placed = Placed(torch.zeros(3, 4), "sliced")
    placed.assert_untouched_around()
    placed.tensor.fill_(1.0)
    placed.assert_untouched_around()
    placed.buffer[Placed.margin + 1] = 0.0
    with pytest.raises(AssertionError, match="outside the tensor"):
        placed.assert_untouched_around()
