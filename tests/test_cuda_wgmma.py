"""Products by wgmma and TMA, which only sm_90a has, in the emulation."""

from __future__ import annotations

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from emulated_cuda import (
    CUDA,
    DELIVERIES,
    EMULATION,
    FLAGS,
    arranged,
    barriers,
    compile_kernel,
    compiler,
    run,
)
from spectral_kernels.newton_schulz import newton_schulz
from support.cases import new_step
from support.inputs import MUON, gaussian
from support.layouts import same_bits
from support.oracles import plain_newton_schulz
from support.rule import error

pytestmark = pytest.mark.usefixtures("native", "backend_emulated", "poisoned_tensors")

ROWS = MUON[:2]


def by_wgmma(function, **arrangement):
    with arranged(wgmma=True, **arrangement):
        return function()


# Short and long sides beside tiles of 128 and steps of 64; sums in parts; batches.
SHAPES = ((129, 130), (193, 200), (2, 140, 333), (257, 1000), (300, 129), (256, 384))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_those_of_16_bits(shape, dtype):
    x = gaussian(*shape, dtype=dtype)
    found = by_wgmma(lambda: newton_schulz(x, coefficients=ROWS, method="standard"))
    expected = newton_schulz(x.double(), coefficients=ROWS, backend="reference")
    allowed = 2.0 * error(plain_newton_schulz(x, ROWS), expected)
    assert error(found, expected) <= allowed


def test_it_is_these_kernels_that_run():
    """Without a barrier of theirs the result is another one."""
    x = gaussian(129, 130, dtype=torch.bfloat16)

    def found(**arrangement):
        return by_wgmma(lambda: newton_schulz(x, coefficients=ROWS[:1]), **arrangement)

    (site,) = (
        name
        for name, following in barriers().items()
        if name.startswith("symmetric_matmul/product_wgmma.cu")
        and following.endswith("if (tid != 0) return; tma_store(map, box, x, y, z);")
    )
    # TMA stores what only some of the warps have written.
    assert not same_bits(found(left_out=site, delivery="early"), found())


def test_no_order_and_no_delivery_changes_a_bit():
    x = gaussian(2, 200, 300, dtype=torch.bfloat16)
    # Of 3 multiprocessors each has several stretches, and sums are in parts.
    runs = {
        (delivery, order, residents): by_wgmma(
            lambda: newton_schulz(x, coefficients=ROWS, method="standard"),
            delivery=delivery,
            order=order,
            residents=residents,
            multiprocessors=3,
        )
        for delivery in DELIVERIES
        for order, residents in ((0, 1), (1, 3), (2, 2))
    }
    expected = runs["late", 0, 1]
    assert not expected.isnan().any()
    assert [key for key, found in runs.items() if not same_bits(found, expected)] == []


def test_a_step_skips_and_updates():
    """What is not finite keeps its bits; the others are what they are alone."""
    shapes = [(130, 150), (150, 129), (2, 140, 140)]
    start = new_step(
        "muon_step_", shapes, rows=ROWS, method="standard", compute_dtype=torch.bfloat16
    )
    start["grads"][0][3, 4] = torch.nan
    case, plain = start.clone(), start.clone()
    by_wgmma(lambda: case.run("cuda"))
    plain.run("cuda")
    assert same_bits(case["params"][0], start["params"][0])
    assert int(case["skipped"]) == 1
    for ours, theirs in zip(case["params"][1:], plain["params"][1:], strict=True):
        assert error(ours, theirs) < 1e-3


# A chain of products without torch, by kernels that are changed on purpose.


@dataclass(frozen=True)
class Mutant:
    """A change that must be noticed.

    Attributes:
        old, new: the change of the kernel's file, where `old` stands once.
    """

    old: str
    new: str


MUTANTS = {
    "none": None,
    "one arrival a warpgroup": Mutant("2 * kConsumers / 32);", "2 * kConsumers / 128);"),
    "arrivals at the own block alone": Mutant("if (lane < 2) mbarrier", "if (lane < 1) mbarrier"),
    "one half for one block": Mutant("tma_load_both(to + kOfB", "tma_load(to + kOfB"),
    "C at its mirror": Mutant(
        "column + half * 128 + i % 2 * 64, row + i / 2 * 64, z);",
        "row + i / 2 * 64, column + half * 128 + i % 2 * 64, z);",
    ),
    "parity": Mutant(
        "mbarrier_wait(full + stage, phase);", "mbarrier_wait(full + stage, phase ^ 1);"
    ),
    "a block that begins late": Mutant("CLUSTER_BARRIER();\n  let_next_begin", "let_next_begin"),
    "a block that ends early": Mutant("  CLUSTER_BARRIER();\n#else", "#else"),
    "results before TMA has read": Mutant("tma_store_wait<1>();", "tma_store_wait<2>();"),
    "results that TMA does not see": Mutant("    fence_for_tma();\n", ""),
    "mirror images as they are": Mutant(
        "        store_matrix_transposed(", "        store_matrix("
    ),
}


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """Builds the chain with one change of the kernel's file; what does not change, once."""
    folder = tmp_path_factory.mktemp("chain")
    root = folder / "tree"
    shutil.copytree(CUDA, root / "csrc" / "cuda")
    driver = root / "tests" / "cuda_emulation"
    driver.mkdir(parents=True)
    shutil.copy(EMULATION / "wgmma_chain.cpp", driver)
    products = root / "csrc" / "cuda" / "symmetric_matmul"
    kernel = products / "product_wgmma.cu"
    original = kernel.read_text()
    sources = [products / "product.cu", driver / "wgmma_chain.cpp"]
    objects = [root / f"{path.stem}.o" for path in sources]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_kernel, sources, objects))

    def build(name):
        mutant, text = MUTANTS[name], original
        if mutant is not None:
            assert text.count(mutant.old) == 1, f"{name}: what it changes is not there, or twice"
            text = text.replace(mutant.old, mutant.new)
        kernel.write_text(text)
        label = name.replace(" ", "_")
        compile_kernel(kernel, folder / f"{label}.o")
        library = folder / f"{label}.so"
        changed = [str(path) for path in (folder / f"{label}.o", *objects)]
        run([compiler(), "-shared", *FLAGS, "-o", str(library), *changed])
        return ctypes.CDLL(str(library))

    return build


def failure_of(library, shape, dtype, *, multiprocessors, residents, delivery):
    """What is wrong with the chain, or None."""
    count, rows, columns = shape
    line, square = -(-columns // 64) * 64, -(-rows // 64) * 64
    x = torch.zeros(count, rows, line, dtype=dtype)
    x[..., :columns] = gaussian(*shape) / (rows * columns) ** 0.5 * 2.0
    # A place for the second plane is left behind every square matrix.
    r, w = (torch.empty(count, 2, rows, square, dtype=dtype) for _ in range(2))
    y, said = torch.empty_like(x), ctypes.create_string_buffer(300)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, r, w, y)]
    code = library.wgmma_chain(
        rows,
        ctypes.c_int64(columns),
        ctypes.c_int64(count),
        int(dtype == torch.float16),
        multiprocessors,
        residents,
        DELIVERIES.index(delivery),
        *pointers,
        said,
    )
    if code:
        return said.value.decode() or f"error {code}"
    r, w = r[:, 0, :, :rows].double(), w[:, 0, :, :rows].double()
    wide = x.double()
    eye = torch.eye(rows, dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    for name, found, expected in (
        ("R", r, wide @ wide.mT),
        ("W", w, 2.0 * r @ r - 1.5 * r + 3.0 * eye),
        ("Y", y.double(), w @ wide + 0.5 * wide),
    ):
        if not error(found, expected) <= eps:
            return f"{name} errs by {error(found, expected):.1e}"
    symmetric = torch.equal(r, r.mT) and torch.equal(w, w.mT)
    return None if symmetric else "R or W is not symmetric"


RUNS = (
    ((1, 300, 330), torch.bfloat16, {"multiprocessors": 132, "residents": 1}),
    ((2, 200, 520), torch.float16, {"multiprocessors": 3, "residents": 3}),
)


# One of each kind in every run: a wait, a cluster, a delivery. Each is compiled by itself.
SOON = ("none", "parity", "a block that ends early", "results before TMA has read")


@pytest.mark.parametrize(
    "name", [n if n in SOON else pytest.param(n, marks=pytest.mark.long) for n in MUTANTS]
)
def test_changes_of_the_kernel_are_noticed(name, chain):
    library = chain(name)
    failures = [
        failure_of(library, shape, dtype, delivery=delivery, **options)
        for shape, dtype, options in RUNS
        for delivery in DELIVERIES
    ]
    assert (set(failures) == {None}) == (name == "none"), failures
