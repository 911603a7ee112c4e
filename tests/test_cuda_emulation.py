"""The emulation of CUDA itself, and what every CUDA kernel promises: barriers, orders, tables."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys

import emulated_cuda
import pytest
import torch
from emulated_cuda import arrange, arranged, barriers, emulated, fences
from spectral_kernels import _cuda
from support.cases import later_step, new_step
from support.inputs import MUON, gaussian, semidefinite, with_eigenvalues
from support.layouts import same_bits
from support.rule import error

pytestmark = pytest.mark.usefixtures("native", "loaded")


@pytest.fixture
def loaded():
    """The operators, and one thread: a forked process has no others."""
    torch.set_num_threads(1)
    emulated_cuda.library()


def build(source, to, *flags):
    emulated_cuda.run([emulated_cuda.compiler(), "-std=c++17", *flags, str(source), "-o", str(to)])


def test_emulation_itself(tmp_path):
    program = tmp_path / "selftest"
    flags = ("-O1", "-fsanitize=undefined", "-fno-sanitize-recover")
    build(emulated_cuda.EMULATION / "selftest.cpp", program, *flags)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^(\d+) of \1 checks passed", done.stdout)


def iterated(x, given_rows=MUON, **options):
    given = {
        "method": "auto",
        "restarts": [],
        "compute_dtype": x.dtype,
        "eps": 0.0,
        "norm": "frobenius",
        "norm_factor": 1.0,
    }
    rows = [value for row in given_rows for value in row]
    op = torch.ops.spectral_kernels_emulated.newton_schulz
    return op(x, rows, **{**given, **options})


def chains():
    """Newton–Schulz on chip: packed, read in place, scaled; every norm and method."""
    x = gaussian(2, 60, 700)
    return [
        iterated(x, restarts=[2, 3]),
        iterated(x.bfloat16(), norm="schatten8"),  # is packed
        iterated(x[..., :600].bfloat16().contiguous() * 2.0**-80),  # is read in place, and scaled
        iterated(x[0, :30, :130].half(), method="standard"),
    ]


def steps():
    """One step of every kind."""
    case = new_step("muon_step_", [(2, 33, 70), (70, 20), (50, 1, 4)])
    case["grads"][2][40:] = torch.nan
    soap = later_step("soap_step_", [(70, 61), (2, 3, 4)], normalize_grads=True, refresh=[0, 0])
    deva = later_step("deva_step_", [(40, 140)], sides=(), refresh=[0])
    signs = later_step("deva_step_", [(5, 6)], norm="linf", sides=(), refresh=[0])
    results = []
    with emulated():
        for step in (case, soap, deva, signs):
            step.run("cuda")
            results += step.written()
    return results


def roots():
    """Inverse roots by iteration and by decomposition, and eigenbases."""
    a = torch.stack([semidefinite(40, 1e2, seed).float() for seed in range(2)])
    root = torch.ops.spectral_kernels_emulated.inverse_root
    results = []
    for p, ridge in ((3, 1e-4), (4, 1e-6)):
        results += root(a, p, ridge=0.0, relative_ridge=ridge, method="auto")
    # Eigenvalues below zero, which the first rows do not reach, and those for more do.
    values = torch.cat([torch.linspace(1, 0.1, 30), torch.full((10,), -0.95e-3)])
    below = with_eigenvalues(values).float()
    results += root(below, 2, ridge=1e-3, relative_ridge=0.0, method="auto")
    results += root(a[:, :20, :20], 3, ridge=0.0, relative_ridge=0.0, method="eigen")
    results += torch.ops.spectral_kernels_emulated.eigenbasis(semidefinite(40, 1e9).float())
    return results


def grams():
    """Symmetric products in parts, of what is not finite, and as an iteration."""
    broken = gaussian(2, 300, 64).bfloat16()
    broken[0, 290, 60] = torch.nan
    gram = torch.ops.spectral_kernels_emulated.gram
    results = [gram(gaussian(20, 1200).bfloat16()), gram(broken)]
    for norm in ("frobenius", "schatten8"):
        results.append(iterated(gaussian(129, 130).bfloat16(), [(2.0, -1.5, 0.5)], norm=norm))
    return results


def factors():
    """Of 9 x 66, updated in place, and a product with them."""
    grad, absent = gaussian(9, 66), torch.empty(0)
    left, right, skipped = gaussian(9, 9), gaussian(66, 66), torch.zeros((), dtype=torch.int64)
    library = torch.ops.spectral_kernels_emulated
    options = {"beta": 0.5, "weight": 0.5, "left_root": absent, "right_root": absent}
    library.kron_factors_update_(left, right, grad, skipped, **options)
    library.kron_factors_update_(left, absent, grad.bfloat16(), skipped, **options)
    return [left, right, skipped, library.kron_precondition(grad, left, right)]


def products():
    """Matrices whose products are a queue of tiles, with sums in parts; in little time."""
    rows = [(2.0, -1.5, 0.5)]
    long, square = gaussian(140, 720).bfloat16(), gaussian(193, 200).bfloat16()
    return [iterated(long, rows), iterated(square, 2 * rows)]


def two_planes():
    """Products whose matrices are two halves each, in both forms."""
    rows = [(2.0, -1.5, 0.5)]
    return [iterated(gaussian(140, 200), rows), iterated(gaussian(130, 400).half(), 2 * rows)]


# Products by wgmma, whose stretches of four steps fit into the ring: a warp may be a tile ahead.
HOPPER = {"wgmma": True, "multiprocessors": 4, "delivery": "early"}


def hopper_products():
    """What only sm_90a runs, under HOPPER."""
    gram = torch.ops.spectral_kernels_emulated.gram
    # The rows of one result are whole words of 16 bytes.
    xs = gaussian(300, 200).bfloat16(), gaussian(304, 72).bfloat16()
    return [iterated(gaussian(200, 300).bfloat16(), [(2.0, -1.5, 0.5)]), *map(gram, xs)]


def misaligned(x):
    """The same numbers an element further on."""
    room = x.new_empty(x.numel() + 1)
    return room[1:].view(x.shape).copy_(x)


def unaligned(misaligned=misaligned):
    """Inputs and state at addresses that are multiples of nothing but an element."""
    gram = torch.ops.spectral_kernels_emulated.gram
    xs = gaussian(60, 700), gaussian(20, 256).bfloat16(), gaussian(130, 129).half()
    results = [iterated(misaligned(x)) for x in xs] + [gram(misaligned(xs[1]))]
    case = new_step("muon_step_", [(33, 64), (70, 24)], torch.bfloat16)
    case = case.with_(
        **{name: [misaligned(x) for x in case[name]] for name in ("params", "grads")},
        momentum_buffers=[misaligned(x) for x in case["momentum_buffers"]],
    )
    soap = later_step("soap_step_", [(40, 24)], refresh=[1])
    soap = soap.with_(
        **{
            name: [misaligned(x) for x in soap[name]]
            for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "lefts", "right_bases")
        }
    )
    with emulated():
        for step in (case, soap):
            step.run("cuda")
            results += step.written()
    return results


# Every kernel and every barrier of csrc/cuda, on more than one warp, step and tile; with the files
# whose barriers a part is about.
PARTS = {
    chains: ("newton_schulz/on_chip",),
    steps: ("base/list_step", "eigenbasis/moments", "deva/passes", "base/reduce"),
    roots: (
        "inverse_root/iteration",
        "inverse_root/eigen_root",
        "eigenbasis/jacobi",
        "symmetric_matmul/on_chip_matrix",
    ),
    grams: (
        "symmetric_matmul/product",
        "symmetric_matmul/epilogue",
        "symmetric_matmul/tile_mma",
        "newton_schulz/schatten_norm",
    ),
    factors: ("kron_factor/overflow",),
}


def workload():
    return {part: part() for part in PARTS}


def test_no_order_changes_a_bit():
    with emulated():
        expected = workload()
        for order in (1, 2, 3):
            with arranged(order):
                for part, results in expected.items():
                    assert same_bits(part(), results), f"order {order}: {part.__name__}"


# Kernels that tell of every access, and of what C++ does not define; whose multiplications and
# additions are fused as the compiler likes, as nvcc does it.
CHECKED = ("-O1", "-fsanitize=undefined", "-fno-sanitize-recover=undefined", *emulated_cuda.RACES)
HAS_FMA = torch.backends.cpu.get_cpu_capability().startswith("AVX")
if HAS_FMA:
    CHECKED += ("-mfma", "-ffp-contract=fast", "-fexpensive-optimizations")


def checked(statement):
    """What a statement prints in a process of its own, whose emulation is built with CHECKED."""
    program = (
        "import torch, emulated_cuda, test_cuda_emulation as t\n"
        "torch.set_num_threads(1)\n"
        f"with emulated_cuda.emulated(), emulated_cuda.races_watched(): {statement}"
    )
    paths = os.pathsep.join([str(emulated_cuda.ROOT / "tests"), *filter(None, sys.path)])
    flags = " ".join(CHECKED)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": paths, "SPECTRAL_KERNELS_EMULATION_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def print_checked():
    """All kernels, and a word of what they compute; one way or another, the same bits."""
    results = workload()
    assert same_bits(unaligned(), unaligned(torch.clone))
    by_wgmma = []
    for order in (0, 3):
        with arranged(**{**HOPPER, "order": order}):
            by_wgmma.append(hopper_products())
    assert same_bits(*by_wgmma)
    for kinds in (products, grams, two_planes):
        with arranged(queue=False):
            expected = kinds()
        for order in (0, 3):
            with arranged(order, residents=4, queue=True):
                assert same_bits(kinds(), expected), kinds.__name__
    print(digest(results))


def digest(results):
    total = hashlib.sha256()
    for result in (one for part in results.values() for one in part):
        total.update(result.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def test_no_undefined_behaviour_no_race_and_no_bits_left_to_the_compiler():
    """Shifts, conversions, alignment and index arithmetic of every kernel; no access whose place
    among those of other threads is left to chance, be they of other blocks; and no result that
    depends on the way it was computed, however the compiler rounds."""
    found = checked("t.print_checked()").strip()
    assert len(found) == 64
    if HAS_FMA:  # this one does round otherwise
        with emulated():
            assert found != digest(workload())


def test_addresses_are_multiples_of_nothing_but_an_element():
    assert same_bits(unaligned(), unaligned(torch.clone))


def noticed(site, expected, **arrangement):
    """Whether some results differ, or the emulation fails, in a process of its own.

    Parts that the site's file is about come first: most are missed at once.
    """
    about = site.split(".")[0]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            arrange(left_out=site, **arrangement)
            parts = sorted(expected, key=lambda part: about not in PARTS.get(part, ()))
            status = 0 if all(same_bits(part(), expected[part]) for part in parts) else 1
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] != 0


def missed(site, workload, few, by_wgmma):
    """Whether a barrier or a fence is, by what is computed without it or by a race."""
    if site.startswith("symmetric_matmul/product_wgmma"):
        return any(
            noticed(site, by_wgmma, **{**HOPPER, "order": order, "delivery": delivery})
            for delivery in ("early", "late")
            for order in (0, 1, 3)
        )
    queued = "symmetric_matmul/queue", "symmetric_matmul/tile", "symmetric_matmul/epilogue"
    if site.startswith(queued) and noticed(site, few, residents=4):
        return True
    return noticed(site, workload)


def print_unmissed(step):
    """Barriers and fences, every `step`th, without which everything goes on as it was."""
    expected, few = workload(), {products: products()}
    with arranged(**HOPPER):
        by_wgmma = {hopper_products: hopper_products()}
    assert not noticed("none", by_wgmma, **HOPPER)
    assert not noticed("none", few, residents=4)
    assert not noticed("none", expected)
    sites = [*barriers(), *fences()]
    assert len(barriers()) > 50 and len(fences()) > 5
    print(*(site for site in sites[::step] if not missed(site, expected, few, by_wgmma)))


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.long)])
def test_barriers_and_fences_are_missed(step):
    assert checked(f"t.print_unmissed({step})").split() == []


def test_products_wait_for_what_they_read():
    with emulated():
        expected = {products: products()}
        assert not noticed("none", expected, residents=7)
        assert noticed("wait_for", expected, residents=7)


def test_a_processor_with_less_shared_memory():
    """sm_86, 89 and 120: what does not fit on chip goes to products, or is refused in words."""
    x, a = gaussian(100, 120).bfloat16(), semidefinite(100, 1e2).float()
    rows = [(2.0, -1.5, 0.5)]
    expected, eighth = iterated(x, rows), iterated(x, rows, norm="schatten8")
    with arranged(shared=99 * 1024):
        found = iterated(x, rows)
        assert error(found, expected) < 1e-2
        assert not same_bits(found, expected)
        assert error(iterated(x, rows, norm="schatten8"), eighth) < 1e-2
        library = torch.ops.spectral_kernels_emulated
        with pytest.raises(NotImplementedError, match="of shared memory, and this device has"):
            library.inverse_root(a, 4, ridge=1e-3, relative_ridge=0.0, method="auto")
        values, vectors = library.eigenbasis(a)
        assert error((vectors * values) @ vectors.mT, a) < 1e-6


def test_shared_memory_of_the_table():
    for rows, size in ((1, 3080), (16, 3080), (17, 12304), (64, 36896), (128, 122944)):
        assert _cuda.shared_memory(rows) == size
    for rows, size in ((1, 14368), (64, 41008), (65, 131152)):
        assert _cuda.root_shared_memory(rows) == size
    for rows, size in ((1, 9088), (33, 34560), (96, 76288), (128, 134400)):
        assert _cuda.jacobi_shared_memory(rows) == size
