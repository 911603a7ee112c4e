"""What the CUDA C++ kernels cannot be faster than on an H100: bytes, tensor-core clocks, occupancy.

    python tools/roofline.py [--to FOLDER]

Needs no GPU: a model, not a measurement. Reads registers from cuda_kernels.json there, writes
roofline.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spectral_kernels import _cuda

# H100 SXM. The clock of an mma.sync m16n8k16 a scheduler is that of 62 % of the dense rate.
MULTIPROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.755e9
BYTES_PER_SECOND, MMA_CLOCKS = 3.35e12, 6.5
WGMMA_PER_CLOCK = 2048  # multiply-adds of one multiprocessor
SHARED_BYTES_PER_CLOCK, REGISTERS, SHARED_MEMORY = 128, 65536, 227 * 1024


@dataclass(frozen=True)
class Floor:
    """One kernel of a workload.

    Attributes:
        kernel: its name.
        moved: bytes to and from device memory.
        clocks: of the busiest multiprocessor, with its tensor cores or its shared memory alone.
    """

    kernel: str
    moved: float
    clocks: float = 0.0

    @property
    def microseconds(self) -> float:
        """The larger of both floors."""
        return 1e6 * max(self.moved / BYTES_PER_SECOND, self.clocks / CLOCK)


def onchip_clocks(products: int, tiles: int, matrices: int) -> float:
    """Products of symmetric matrices of 16 x 16 tiles in two halves: three mma pairs a tile."""
    unique = tiles * (tiles + 1) // 2
    waves = -(-matrices // MULTIPROCESSORS)
    return waves * products * unique * tiles * 3 * 2 * MMA_CLOCKS / SCHEDULERS


def dense_clocks(multiplications: float) -> float:
    """16-bit products, evenly spread."""
    return multiplications / (16 * 8 * 16) * MMA_CLOCKS / SCHEDULERS / MULTIPROCESSORS


def newton_schulz_onchip(count: int, rows: int, columns: int, steps: int) -> list[Floor]:
    """The function on a 16-bit batch, read in place, whose Gram matrix fits on chip."""
    x = 2.0 * count * rows * columns
    tiles = -(-rows // 16)
    products = 4 * steps - 3
    gram = dense_clocks(count * rows * (rows + 16) / 2 * columns)
    return [
        Floor("gram_kernel", x, gram),
        Floor("steps_kernel", 4.0 * count * rows * rows, onchip_clocks(products, tiles, count)),
        Floor("apply_kernel", 2 * x, dense_clocks(2.0 * count * rows * rows * columns)),
    ]


def muon_step(shapes: Sequence[tuple[int, int, int]], steps: int) -> list[Floor]:
    """fp32 parameters, gradients and momentum, bf16 products in the standard form."""
    elements = float(sum(count * m * n for count, m, n in shapes))
    gram = square = wide = 0.0
    for count, m, n in shapes:
        rows, columns = min(m, n), max(m, n)
        gram += count * rows * rows * columns / 2
        square += count * rows**3 / 2
        wide += count * rows * rows * columns
    return [
        Floor("largest_kernel", 8 * elements),
        Floor("prologue_kernel", 14 * elements),
        Floor("product_kernel, X Xᵀ", steps * 2 * elements, steps * dense_clocks(gram)),
        Floor("product_kernel, R²", 0.0, steps * dense_clocks(square)),
        Floor("product_kernel, Q X", (4 * (steps - 1) + 10) * elements, steps * dense_clocks(wide)),
    ]


def from_both_sides(count: int, m: int, n: int) -> list[Floor]:
    """L G R in fp32: three products of fp16 halves each."""
    x, left, right = (4.0 * count * elements for elements in (m * n, m * m, n * n))
    return [
        Floor("largest_kernel", x + left + right),
        Floor("prologue_kernel, G and L", 2 * (x + left)),
        Floor("product_kernel, L G", 2 * x + left, 3 * dense_clocks(count * m * m * n)),
        Floor("largest_kernel, L G", x),
        Floor("prologue_kernel, L G and R", 2 * (x + right)),
        Floor("product_kernel, (L G) R", 2 * x + right, 3 * dense_clocks(count * m * n * n)),
    ]


def kron_factors(count: int, m: int, n: int) -> list[Floor]:
    """Both factors of fp32 gradients."""
    x, left, right = (4.0 * count * elements for elements in (m * n, m * m, n * n))
    multiplications = count * m * n * (m + n) / 2
    return [
        Floor("largest_kernel", 2 * x),
        Floor("prologue_kernel", 4 * x),
        Floor("product_kernel", 2 * (x + left + right), 3 * dense_clocks(multiplications)),
    ]


def soap_step(count: int, m: int, n: int) -> list[Floor]:
    """fp32, both sides, no refresh: passes over G', M, V, N, U and W around four products."""
    x, factors = 4.0 * count * m * n, 4.0 * count * (m * m + n * n)
    return [
        Floor("largest_kernel", 2 * x + factors),
        *from_both_sides(count, m, n),
        Floor("adam_kernel", 4 * x),
        *from_both_sides(count, m, n),
        *kron_factors(count, m, n),
        Floor("commit_kernel", 8 * x),
        Floor("copy_kernel", 2 * factors),
    ]


def deva_step(count: int, m: int, n: int, steps: int) -> list[Floor]:
    """As soap_step, with energies, a bf16 Newton-Schulz and V' in a workspace."""
    x = 4.0 * count * m * n
    sums = 16.0 * count * m * n * (1 / 32 + 1 / 128)
    rotated = [floor for floor in soap_step(count, m, n) if floor.kernel != "adam_kernel"]
    return [
        *rotated,
        Floor("moments_kernel", 4 * x + sums),
        Floor("energies_kernel", sums),
        *muon_step([(count, m, n)], steps)[2:],
        Floor("adaptation_kernel", 4 * x),
        Floor("copy_kernel, V", 2 * x),
    ]


def inverse_roots(count: int, n: int, products: int) -> list[Floor]:
    """All steps of the fourth root at a relative ridge of 1e-6."""
    moved = 8.0 * count * n * n
    return [
        Floor("largest_kernel", moved / 2),
        Floor("root_kernel", moved, onchip_clocks(products, -(-n // 16), count)),
    ]


def eigenbases(count: int, n: int, sweeps: int) -> list[Floor]:
    """Every round reads and writes all columns once, in fp64 and shared memory."""
    rounds = -(-count // MULTIPROCESSORS) * sweeps * (n - 1)
    return [
        Floor(
            "eigenbasis_kernel", 12.0 * count * n * n, rounds * 16 * n * n / SHARED_BYTES_PER_CLOCK
        )
    ]


def symmetric_product(rows: int, columns: int) -> list[Floor]:
    """X Xᵀ of one bf16 matrix by wgmma, against all of it in tiles of 128 x 256.

    A triangle of 128-wide tiles by csrc/cuda/symmetric_matmul/stream_k.h: where a stretch of steps
    ends inside of a tile, a part goes to L2 and back at 24 bytes a clock.
    """
    down, steps = math.ceil(rows / 128), math.ceil(columns / 64)
    total, step = down * (down + 1) // 2 * steps, 128 * 128 * 64 / WGMMA_PER_CLOCK
    rounds = (math.ceil(total / (i * MULTIPROCESSORS)) for i in (1, 2, 3, 4))
    lengths = {steps, *(max(length, math.ceil(steps / 3)) for length in rounds)}
    times = [
        math.ceil(math.ceil(total / length) / MULTIPROCESSORS)
        * (length * step + (length % steps != 0) * 2 * 128 * 128 * 4 / 24)
        for length in lengths
    ]
    full = math.ceil(down * math.ceil(down / 2) / MULTIPROCESSORS) * 2 * steps * step
    x = 2.0 * rows * columns
    return [
        Floor("product_wgmma_kernel", x + 2.0 * rows * rows, min(times)),
        Floor("spread_nonfinite_kernel", 2.0 * rows),
        Floor("(cuBLAS, the whole product)", x + 2.0 * rows * rows, full),
    ]


# From one product of a chain to the next: to drain and fill the device, or a fence and a counter.
LAUNCH_SECONDS, QUEUE_SECONDS = 3e-6, 1e-6


def products_in_turn(count: int, rows: int, columns: int, gram: bool) -> list[float]:
    """Clocks of the products of five steps on a bf16 batch, in the Gram or the standard form."""
    x, square = count * rows * rows * columns, count * rows**3 / 2
    first, last = dense_clocks(x / 2), dense_clocks(x)
    if gram:  # square matrices in two fp16 planes
        return [first, *[3 * dense_clocks(square)] * 17, last]
    return [first, dense_clocks(square), last] * 5


CHAINS = {
    "24 x (256 x 1536) bf16, Gram form": products_in_turn(24, 256, 1536, True),
    "12 x (768 x 768) bf16": products_in_turn(12, 768, 768, False),
    "768 x 768 bf16": products_in_turn(1, 768, 768, False),
}

GPT_124M = ((12, 768, 2304), (12, 768, 768), (24, 768, 3072))
WORKLOADS = {
    "newton_schulz, 64 x (128 x 7168) bf16, 5 steps": newton_schulz_onchip(64, 128, 7168, 5),
    "newton_schulz, 224 x (16 x 4096) bf16, 5 steps": newton_schulz_onchip(224, 16, 4096, 5),
    "newton_schulz, 126 x (64 x 576) bf16, 5 steps": newton_schulz_onchip(126, 64, 576, 5),
    "muon_step_, matrices of GPT-2 124M, 5 steps": muon_step(GPT_124M, 5),
    "gram, 2048 x 2048 bf16": symmetric_product(2048, 2048),
    "gram, 4096 x 4096 bf16": symmetric_product(4096, 4096),
    "kron_precondition, 24 x (768 x 3072) fp32": from_both_sides(24, 768, 3072),
    "kron_factors_update_, 24 x (768 x 3072) fp32": kron_factors(24, 768, 3072),
    "soap_step_, 24 x (768 x 3072) fp32": soap_step(24, 768, 3072),
    "deva_step_, 24 x (768 x 3072) fp32, 5 steps": deva_step(24, 768, 3072, 5),
    "inverse_root, 64 x 128², p = 4, 37 products": inverse_roots(64, 128, 37),
    "eigenbasis, 64 x 128², 9 sweeps": eigenbases(64, 128, 9),
}

# Warps and bytes of shared memory of one block.
BLOCKS = {
    "steps_kernel<8>": (8, _cuda.shared_memory(128)),
    "steps_kernel<4>": (4, _cuda.shared_memory(64)),
    "steps_kernel<1>": (1, _cuda.shared_memory(16)),
    "root_kernel<8>": (8, _cuda.root_shared_memory(128)),
    "eigenbasis_kernel<128>": (16, _cuda.jacobi_shared_memory(128)),
    "queue_kernel<64, 1, 0, 1>": (4, 32856),
    "queue_kernel<64, 1, 0, 2>": (4, 65624),
    "queue_kernel<128, 1, 0, 1>": (8, 65624),
    "queue_kernel<128, 1, 0, 2>": (8, 98392),
    "product_kernel<64, 1, 0, 0>": (4, 32856),
    "product_kernel<64, 2, 1, 0>": (4, 65624),
    "product_kernel<128, 1, 0, 0>": (8, 65624),
    "product_kernel<128, 2, 1, 0>": (8, 98392),
    "exact_kernel<64>": (4, 32856),
    "exact_kernel<128>": (8, 65624),
    "product_kernel<64, 2, 1, 1>": (4, 65624),
    "product_kernel<128, 2, 1, 1>": (8, 98392),
}


def blocks_at_a_time(registers: int, warps: int, shared: int) -> int:
    """Of one multiprocessor; registers are given out in units of 256 a warp."""
    of_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    return min(of_registers, SHARED_MEMORY // (shared + 1024), 64 // warps, 32)


def markdown(kernels: Sequence[dict[str, object]]) -> str:
    """Floors of the workloads, and how many blocks a multiprocessor holds."""
    lines = [
        "A model of an H100 SXM, not a measurement: each kernel takes at least the larger of its",
        "bytes at 3.35 TB/s and its mma.sync (6.5 clocks a scheduler) or shared-memory clocks at",
        "1.755 GHz. Launches are not in it. Generated by tools/roofline.py.",
        "",
        "| workload | kernel | MB | clocks | floor, µs |",
        "|---|---|---|---|---|",
    ]
    for name, floors in WORKLOADS.items():
        for floor in floors:
            cells = f"{floor.moved / 1e6:.0f} | {floor.clocks:.0f} | {floor.microseconds:.0f}"
            lines.append(f"| {name} | {floor.kernel} | {cells} |")
        total = sum(floor.microseconds for floor in floors if not floor.kernel.startswith("("))
        lines.append(f"| {name} | **all** | | | **{total:.0f}** |")
    lines += [
        "",
        "Products that follow one another: mma.sync clocks alone, with 3 µs for every launch",
        "after another, and with 1 µs for every product in the launch of queue_kernel.",
        "",
        "| newton_schulz, 5 steps | products | clocks, µs | launches, µs | one launch, µs |",
        "|---|---|---|---|---|",
    ]
    for name, clocks in CHAINS.items():
        work, count = sum(clocks) / CLOCK, len(clocks)
        times = (work, work + count * LAUNCH_SECONDS, work + count * QUEUE_SECONDS)
        cells = " | ".join(f"{1e6 * seconds:.0f}" for seconds in times)
        lines.append(f"| {name} | {count} | {cells} |")
    lines += ["", "| kernel | registers | bytes shared | blocks at a time |", "|---|---|---|---|"]
    of_sm90 = {row["kernel"]: row for row in kernels if row["architecture"] == "sm_90a"}
    for name, (warps, shared) in BLOCKS.items():
        registers = int(str(of_sm90[name]["registers"]))
        count = blocks_at_a_time(registers, warps, shared)
        lines.append(f"| {name} | {registers} | {shared} | {count} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(argv)
    kernels = json.loads((options.to / "cuda_kernels.json").read_text())["kernels"]
    (options.to / "roofline.md").write_text(markdown(kernels))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
