"""The compiled part knows torch by C functions alone, so that one build serves many torches.

SPECTRAL_KERNELS_OTHER_PYTHON names an interpreter with another torch; without it that test is
skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wheel_check
from spectral_kernels import _extension

ROOT = Path(__file__).parent.parent
OTHER = os.environ.get("SPECTRAL_KERNELS_OTHER_PYTHON")
MODULE = _extension.MODULE

needs_module = pytest.mark.skipif(MODULE is None, reason=_extension.REASON or "")


def undefined(library: str) -> set[str]:
    said = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    return {line.split()[-1] for line in said.splitlines()}


@needs_module
@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_no_symbol_of_torchs_cxx_is_needed():
    names = undefined(MODULE.__file__)
    assert "torch_call_dispatcher" in names and "aoti_torch_get_sizes" in names
    assert {name for name in names if wheel_check.CXX_OF_TORCH.match(name)} == set()


@needs_module
@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_a_symbol_of_torchs_cxx_would_be_noticed():
    python_part = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    if not python_part.exists():
        pytest.skip("this torch's libraries have other names")
    found = {name for name in undefined(str(python_part)) if wheel_check.CXX_OF_TORCH.match(name)}
    assert len(found) > 1000


def test_torch_is_named_in_few_files():
    """So that what has to follow a new torch is known."""
    named = {
        str(path.relative_to(ROOT / "csrc"))
        for pattern in ("*.h", "*.cpp", "*.cu", "*.inl")
        for path in (ROOT / "csrc").rglob(pattern)
        if re.search(r"#include <(ATen|c10|torch/csrc)/", path.read_text())
    }
    assert named == {"boxing.cpp", "cuda/base/tensors.cpp", "registration.h", "tensor.cpp"}


@needs_module
def test_an_older_torch_is_refused_by_its_version(monkeypatch):
    assert re.fullmatch(r"2\.\d+", MODULE.least_torch)
    major, minor = map(int, MODULE.least_torch.split("."))
    monkeypatch.setattr(torch, "__version__", f"{major}.{minor - 1}.1+cu128")
    with pytest.raises(ImportError, match=rf"for torch {major}\.{minor} and later, but torch 2\."):
        _extension._load()
    for newer in (f"{major}.{minor}.0", f"{major}.{minor + 1}.0a0+git12", f"{major + 1}.0.0"):
        monkeypatch.setattr(torch, "__version__", newer)
        assert _extension._load() == (MODULE, "")


@needs_module
def test_direct_calls_raise_what_their_checks_name():
    operator = torch.ops.spectral_kernels.gram
    with pytest.raises(ValueError, match=r"^x must have at least two dim.*, got shape \[3\]$"):
        operator(torch.zeros(3))
    with pytest.raises(TypeError, match=r"^x must be float32, .*, got Int$"):
        operator(torch.zeros(3, 3, dtype=torch.int32))


# Of every kind of call: batches, lists in place, several results, LAPACK, options of all types.
CALLS = """
import hashlib, sys, torch, spectral_kernels as sk
from spectral_kernels import _extension

source = torch.Generator().manual_seed(5)


def matrices(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype)


def show(name, x):
    bits = x.detach().contiguous().view(torch.uint8).numpy().tobytes()
    print(name, hashlib.sha256(bits).hexdigest()[:16])


for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    x = matrices(2, 40, 56, dtype=dtype)
    show(f"gram {dtype}", sk.gram(x))
    show(f"newton_schulz {dtype}", sk.newton_schulz(x))
    show(f"polar {dtype}", sk.polar(x[0, :12, :20]))
a = matrices(3, 24, 24)
a = a @ a.mT
show("inverse_root", sk.inverse_root(a, 4, ridge=1e-3))
show("inverse_root eigen", sk.inverse_root(a, 2, method="eigen"))
values, vectors = sk.eigenbasis(a)
show("eigenbasis", vectors)
show("refresh_eigenbasis", sk.refresh_eigenbasis(vectors, a + 0.1 * torch.eye(24))[1])
show("kron_precondition", sk.kron_precondition(matrices(24, 30), a[0], None))
for name in ("Muon", "SOAP", "Shampoo", "DeVA"):
    params = [matrices(30, 20).requires_grad_(), matrices(16, 48).requires_grad_()]
    optimizer = getattr(sk.optim, name)(params, lr=0.01)
    for _ in range(4):
        for p in params:
            p.grad = matrices(*p.shape)
        optimizer.step()
    for p in params:
        show(f"{name} {tuple(p.shape)}", p)
for bad in (torch.zeros(3), torch.zeros(3, 3, dtype=torch.int32), torch.eye(3).requires_grad_()):
    try:
        torch.ops.spectral_kernels.gram(bad)
    except Exception as error:
        print(type(error).__name__, error)
print(torch.__version__, _extension.MODULE.__file__, file=sys.stderr)
"""


def said_by(python: str, tmp_path: Path) -> tuple[list[str], str]:
    """What the calls print with an interpreter's torch, which it says too."""
    folder = Path(MODULE.__file__).parents[1]
    # The layers in Triton lie beside the package in a checkout, and are not asked for.
    done = subprocess.run(
        [python, "-c", CALLS],
        env=os.environ | {"PYTHONPATH": str(folder), "SPECTRAL_KERNELS_BACKEND": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    version, file = done.stderr.split()[-2:]
    assert Path(file).resolve() == Path(MODULE.__file__).resolve()
    return done.stdout.splitlines(), version


@needs_module
@pytest.mark.skipif(OTHER is None, reason="SPECTRAL_KERNELS_OTHER_PYTHON names no interpreter")
def test_two_torches_get_the_same_bits_from_one_library(tmp_path):
    mine, version = said_by(sys.executable, tmp_path)
    others, other = said_by(OTHER, tmp_path)
    assert len(mine) > 25 and version == torch.__version__ != other
    assert others == mine


@needs_module
def test_one_torch_gets_the_same_bits_twice(tmp_path):
    """So that the comparison of two torches can be made at all."""
    first, _ = said_by(sys.executable, tmp_path)
    assert len(first) > 25 and [line.split()[0] for line in first[-3:]] == [
        "ValueError",
        "TypeError",
        "RuntimeError",
    ]
    assert said_by(sys.executable, tmp_path)[0] == first
