"""Operators in processes that have run nothing yet, for test_fresh_processes.py and test_lapack.py.

As a program it reads [name, threads, how] from stdin, a JSON list of them, and prints what became
of each in a child of its own. It has imported everything and run nothing, so that a child costs no
import and still finds threads, OpenMP and MKL as a new process does.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import spectral_kernels as sk
import torch
from torch import Tensor

# MKL's threaded eigendecomposition goes wrong from here on, not at 480.
SIZE = 512
LIMIT = 60  # seconds for a child


def inputs() -> dict[str, Tensor]:
    """Made once, by one process: torch's own products depend on the threads."""
    generator = torch.Generator().manual_seed(3)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, thin = gaussian(SIZE, SIZE), gaussian(SIZE, SIZE // 4)
    return {
        "full": x @ x.mT / SIZE,
        "deficient": thin @ thin.mT / SIZE,
        "basis": torch.linalg.qr(gaussian(SIZE, SIZE))[0],
        "ones": torch.ones(SIZE, SIZE, dtype=torch.float64),
        "wide": gaussian(300, SIZE),
        "gradient": gaussian(SIZE, 24).float(),
        "left_root": (x @ x.mT)[:300, :300].contiguous(),
    }


def stepped(make: Callable[..., torch.optim.Optimizer], given: dict[str, Tensor]) -> list[Tensor]:
    param = torch.nn.Parameter(torch.ones_like(given["gradient"]))
    optimizer = make([param], lr=0.1)
    for _ in range(2):
        param.grad = given["gradient"].clone()
        optimizer.step()
    return [param.detach(), *tensors(optimizer.state[param])]


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from tensors(value[key])
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors(each)


def _shampoo(given: dict[str, Tensor]) -> list[Tensor]:
    return stepped(partial(sk.optim.Shampoo, root_method="eigen"), given)


LAPACK: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "eigenbasis": lambda x: sk.eigenbasis(x["full"]),
    "eigenbasis fp32": lambda x: sk.eigenbasis(x["full"].float()),
    "inverse_root": lambda x: sk.inverse_root(
        x["deficient"], 4, relative_ridge=1e-4, method="eigen", return_info=True
    ),
    "inverse_root fp32": lambda x: sk.inverse_root(x["deficient"].float(), 4, return_info=True),
    "polar": lambda x: sk.polar(x["wide"]),
    "polar fp32": lambda x: sk.polar(x["wide"].float()),
    "shampoo_step_": _shampoo,
    "soap_step_": partial(stepped, sk.optim.SOAP),
    "deva_step_": partial(stepped, sk.optim.DeVA),
}
PRODUCTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "gram": lambda x: sk.gram(x["wide"]),
    "newton_schulz": lambda x: sk.newton_schulz(x["wide"].float()),
    "kron_precondition": lambda x: sk.kron_precondition(x["wide"], x["left_root"], x["full"]),
    "inverse_root iteration": lambda x: sk.inverse_root(x["full"], 4, relative_ridge=1e-4),
    "muon_step_": partial(stepped, sk.optim.Muon),
    "refresh_eigenbasis": lambda x: sk.refresh_eigenbasis(x["basis"], x["ones"]),
    "refresh_eigenbasis fp32": lambda x: sk.refresh_eigenbasis(
        x["basis"].float(), x["ones"].float()
    ),
}
OPERATORS = {**LAPACK, **PRODUCTS}


def digest(value: Any) -> str:
    found = hashlib.sha256()
    for tensor in tensors(value):
        found.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _plain(name: str, given: dict[str, Tensor]) -> str:
    return digest(OPERATORS[name](given))


def _in_a_pool(name: str, given: dict[str, Tensor]) -> str:
    """Three threads at once."""
    start = threading.Barrier(3)

    def work(_: int) -> str:
        start.wait()
        return _plain(name, given)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        return one_of(list(pool.map(work, range(3))))


def _after_torch(name: str, given: dict[str, Tensor]) -> str:
    """Torch's own LAPACK and products have had the threads first."""
    torch.linalg.eigh(given["full"])
    torch.linalg.qr(given["wide"])
    given["full"] @ given["full"]
    return _plain(name, given)


def _with_changing_threads(name: str, given: dict[str, Tensor]) -> str:
    """Every new Python thread brings new workers; 4, 2 and 4 threads in turn."""
    found = []
    for count in (4, 2, 4):
        torch.set_num_threads(count)
        worker = threading.Thread(target=lambda: found.append(_plain(name, given)))
        worker.start()
        worker.join()
    return one_of(found)


def one_of(digests: Sequence[str]) -> str:
    return digests[0] if len(set(digests)) == 1 else f"differ: {digests}"


HOW: dict[str, Callable[[str, dict[str, Tensor]], str]] = {
    "plain": _plain,
    "pool": _in_a_pool,
    "after torch": _after_torch,
    "changing threads": _with_changing_threads,
}


def run(name: str, threads: int | None, how: str, given: dict[str, Tensor]) -> str:
    """The digest of an operator's results; a result of LAPACK that had to be mended is no success.

    Args:
        name: of `OPERATORS`.
        threads: for torch.set_num_threads, which is not called for None.
        how: of `HOW`.
        given: `inputs`.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    found = HOW[how](name, given)
    faults = sk._extension.faults()
    return found if faults == "none" else f"computed again: {faults}"


def in_a_child(name: str, threads: int | None, how: str, given: dict[str, Tensor]) -> str:
    """`run` in a fork of this process, killed after LIMIT seconds."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        signal.alarm(LIMIT)
        try:
            said = run(name, threads, how, given)
        except BaseException:
            said = traceback.format_exc()
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(process, 0)
    return (
        said if status == 0 else f"hung or crashed: exit code {os.waitstatus_to_exitcode(status)}"
    )


def answer(name: str, threads: int, given: str, connection: Any) -> None:
    """`run` in a process that multiprocessing started."""
    connection.send(run(name, threads, "plain", torch.load(given)))
    connection.close()


def main() -> None:
    given = torch.load(sys.argv[1])
    requests = json.loads(sys.stdin.read())
    print(json.dumps([in_a_child(*request, given) for request in requests]))


if __name__ == "__main__":
    main()
