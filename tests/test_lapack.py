"""LAPACK on worker threads: what keeps MKL to one thread there, and what sees that it was kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import spectral_kernels as sk
import torch
from spectral_kernels import _extension
from support.inputs import gaussian, semidefinite, with_eigenvalues

pytestmark = pytest.mark.usefixtures("native")

FP64 = torch.float64


def script(code: str, *arguments: object) -> list:
    """What a script printed as JSON, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


NEW_THREADS = """
    import json, sys, threading, torch
    import fresh_process as fresh

    names, runs = list(fresh.LAPACK)[:8], int(sys.argv[1])
    torch.set_num_threads(1)
    given = fresh.inputs()
    expected = {name: fresh.run(name, 1, "plain", given) for name in names}
    found = []

    def work(i, count):
        torch.set_num_threads(count)
        for k in range(runs):
            name = names[(i + k) % len(names)]
            found.append((name, fresh.run(name, None, "plain", given) == expected[name]))

    torch.set_num_threads(4)
    for i in range(20):
        count = (4, 2, 4)[i % 3]
        torch.set_num_threads(count)
        worker = threading.Thread(target=work, args=(i, count))
        worker.start()
        worker.join()
    print(json.dumps(found))
"""


@pytest.mark.parametrize("runs", [1, pytest.param(8, marks=pytest.mark.long)])
def test_new_python_threads_bring_new_workers(runs):
    """A worker's setup comes with its first call: torch then tells MKL the number of threads."""
    found = script(NEW_THREADS, runs)
    assert len(found) == 20 * runs
    assert not [name for name, same in found if not same]


@pytest.mark.parametrize("threads", [2, 4])
def test_mkl_is_kept_to_one_thread_on_every_worker(threads):
    found = script(
        """
        import json, sys, threading, torch
        from spectral_kernels import _C

        def work():
            torch.set_num_threads(int(sys.argv[1]))
            found.append(_C.mkl_threads_of_workers())

        found = []
        torch.set_num_threads(int(sys.argv[1]))
        work()
        for _ in range(3):
            worker = threading.Thread(target=work)
            worker.start()
            worker.join()
        work()
        print(json.dumps(found))
        """,
        threads,
    )
    if found[0] and found[0][0] == -1:
        pytest.skip("this torch has no MKL that tells its number of threads")
    assert found == [[1] * threads] * 5


CORRUPTED = """
    import json, sys, warnings, torch
    import fresh_process as fresh
    from spectral_kernels import _C, _extension, info

    fresh.SIZE = 24
    torch.set_num_threads(2)
    _C.set_eigen_route("lapack")
    given, results = {}, {}
    given = {name: x[:24, :24].clone() for name, x in fresh.inputs().items()}
    for name, routine in json.loads(sys.argv[1]).items():
        call = fresh.LAPACK[name]
        right = fresh.digest(call(given))
        before = _C.fault_counts()
        _C.corrupt_lapack(int(sys.argv[2]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again = fresh.digest(call(given))
        after = _C.fault_counts()
        results[name] = [
            again == right,
            after.get(routine, 0) - before.get(routine, 0),
            after.get(f"{routine}/again", 0) - before.get(f"{routine}/again", 0),
            len(caught),
        ]
    said = info.collect()["cpu"]["lapack_results_computed_again"]
    print(json.dumps([results, said]))
"""
ROUTINES = {
    "eigenbasis": "eigh",
    "inverse_root": "eigh",
    "polar": "svd",
    "soap_step_": "eigh",
}


def test_a_wrong_result_is_seen_and_computed_again():
    """The columns in another order: orthogonal, and wrong."""
    results, said = script(CORRUPTED, json.dumps(ROUTINES), 1)
    for place, (name, (same, repeated, failed, warned)) in enumerate(results.items()):
        assert (same, repeated, failed) == (True, 1, 0), name
        assert warned == (place == 0), name  # once in a process
    assert said == "eigh 3, svd 1"


def test_a_result_that_is_wrong_twice_is_a_failure():
    results, said = script(CORRUPTED, json.dumps(ROUTINES), 2)
    for name, (_, repeated, failed, _) in results.items():
        assert (repeated, failed) == (1, 1), name
    assert said == "eigh 3, eigh/again 3, svd 1, svd/again 1"
    statuses = script(
        """
        import json, torch
        import spectral_kernels as sk

        sk._C.set_eigen_route("lapack")

        def outcome(f):
            sk._C.corrupt_lapack(2)
            return f()

        a = torch.eye(9, dtype=torch.float64).cumsum(0)
        a = a @ a.mT
        root, info = outcome(lambda: sk.inverse_root(a, 4, method="eigen", return_info=True))
        ridged = outcome(
            lambda: sk.inverse_root(a, 4, relative_ridge=1e-4, method="eigen", return_info=True)
        )
        right = sk.inverse_root(a, 4, relative_ridge=1e-4, method="eigen")
        print(json.dumps([
            int(info.status), float(root.abs().max()), int(ridged[1].status),
            float((ridged[0] - right).norm() / right.norm()),
            bool(outcome(lambda: sk.eigenbasis(a))[1].isnan().all()),
            bool(outcome(lambda: sk.polar(a)).isnan().all()),
        ]))
        """
    )
    # Without a ridge nothing else can take the root; with one the iteration does.
    assert statuses[:3] == [1, 0.0, 2] and statuses[3] < 1e-9 and statuses[4:] == [True, True]


def test_where_mkl_hides_its_switch_the_calling_thread_does_it():
    found = script(
        """
        import json, torch
        import fresh_process as fresh
        from spectral_kernels import _C

        torch.set_num_threads(1)
        _C.set_eigen_route("lapack")
        given = fresh.inputs()
        names = ("eigenbasis", "inverse_root", "polar", "soap_step_")
        expected = [fresh.run(name, 1, "plain", given) for name in names]
        _C.hide_mkl_switch(True)
        found = [fresh.run(name, 4, how, given) for name, how in zip(names, fresh.HOW)]
        print(json.dumps([found == expected, _C.mkl_thread_limit(), torch.get_num_threads()]))
        """
    )
    assert found[0] and found[1] in ("calling thread", "none") and found[2] in (2, 4)


def structures() -> dict[str, torch.Tensor]:
    n = 40
    half = torch.zeros(n, n, dtype=FP64)
    half[:17, :17] = semidefinite(17, 1e3)
    graded = 2.0 ** -torch.arange(0, 25 * n, 25, dtype=FP64)
    return {
        "one": torch.full((1, 1), 3.0, dtype=FP64),
        "identity": torch.eye(n, dtype=FP64),
        "zero": torch.zeros(n, n, dtype=FP64),
        "ones": torch.ones(n, n, dtype=FP64),
        "live block": half,
        "graded": graded.sqrt()[:, None] * semidefinite(n, 10.0) * graded.sqrt(),
        "clustered": with_eigenvalues(1 + 1e-15 * torch.arange(n)),
        "ends at 1e-16": semidefinite(n, 1e16),
        "indefinite": with_eigenvalues(torch.linspace(-1, 1, n)),
        "large": semidefinite(300, 1e8),
    }


@pytest.mark.parametrize("scale", [-1070, -1000, -500, 0, 500, 1000])
@pytest.mark.parametrize("name", structures())
def test_right_results_pass_the_checks(name, scale):
    """Whatever the spectrum, the scale and the size; at -1070 everything is subnormal."""
    a = structures()[name]
    if scale == 1000:
        a = a / 64  # sums of squares of the largest stay finite in the operators
    a = torch.ldexp(a, torch.tensor(scale // 2)).ldexp(torch.tensor(scale - scale // 2))
    before = _extension.faults()
    sk.eigenbasis(a)
    sk.polar(a)
    sk.polar(a[:, : (len(a) + 1) // 2])
    sk.inverse_root(a, 2, method="eigen")
    assert _extension.faults() == before


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (33, 5), (5, 33), (3, 20, 30), (200, 90)])
def test_right_singular_vectors_pass_the_checks(shape):
    before = _extension.faults()
    for x in (gaussian(*shape), gaussian(*shape).bfloat16(), torch.zeros(shape)):
        sk.polar(x)
    assert _extension.faults() == before
