"""The bits of one thread in processes that have run nothing yet, however they were started.

Threads, OpenMP and MKL are set up once in a process, or once in a thread, by whoever comes first.
What depends on that order is right in every test that runs after another one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fresh_process
import pytest
import torch
from fresh_process import LAPACK, OPERATORS

pytestmark = pytest.mark.usefixtures("native")

Request = tuple[str, int | None, str]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fresh") / "inputs.pt"
    torch.save(fresh_process.inputs(), path)
    return path


def answers(given: Path, requests: Sequence[Request], **environment: str) -> list[str]:
    """What fresh_process says of each, run one after another from one process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_"))}
    done = subprocess.run(
        [sys.executable, fresh_process.__file__, given],
        input=json.dumps(requests),
        # More threads than cores would wait for one another at full speed.
        env={**kept, "OMP_WAIT_POLICY": "passive", **environment},
        capture_output=True,
        text=True,
        timeout=20 + fresh_process.LIMIT * len(requests),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def expected(given: Path) -> dict[str, str]:
    """Of one thread."""
    requests: list[Request] = [(name, 1, "plain") for name in OPERATORS]
    return dict(zip(OPERATORS, answers(given, requests, **ONE_THREAD), strict=True))


def wrong(
    given: Path, expected: dict[str, str], requests: Sequence[Request], **environment: str
) -> list[Any]:
    found = answers(given, requests, **environment)
    return [
        (request, said)
        for request, said in zip(requests, found, strict=True)
        if said != expected[request[0]]
    ]


def test_the_first_call_gives_the_bits_of_one_thread(given, expected):
    requests: list[Request] = [(name, 2, "plain") for name in OPERATORS]
    requests += [(name, 4, "plain") for name in LAPACK]
    requests += [(name, 3, "plain") for name in list(OPERATORS)[::3]]
    requests += [(name, 8, "plain") for name in list(OPERATORS)[1::3]]
    assert not wrong(given, expected, requests)


@pytest.mark.parametrize("how", ["pool", "after torch", "changing threads"])
def test_however_it_is_called(how, given, expected):
    names = ("eigenbasis", "inverse_root", "refresh_eigenbasis", "polar")
    assert not wrong(given, expected, [(name, 4, how) for name in names])


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "4"},
        {"MKL_NUM_THREADS": "4"},
        {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "3", "MKL_DYNAMIC": "FALSE"},
        {"OMP_NUM_THREADS": "4", "OMP_MAX_ACTIVE_LEVELS": "3", "OMP_DYNAMIC": "TRUE"},
    ],
    ids=lambda environment: " ".join(f"{k}={v}" for k, v in environment.items()),
)
def test_whatever_the_environment_says(environment, given, expected):
    names = ("eigenbasis", "inverse_root fp32", "refresh_eigenbasis", "polar fp32")
    requests: list[Request] = [(name, None, "plain") for name in names]
    requests += [(name, 4, "plain") for name in names[:2]]
    assert not wrong(given, expected, requests, **environment)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing(method, given, expected):
    """A fork finds this process's threads used: it computes on one."""
    torch.set_num_threads(2)
    fresh_process.run("gram", 2, "plain", torch.load(given))
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["fresh_process"])
    for name in ("eigenbasis", "refresh_eigenbasis") if method != "spawn" else ("eigenbasis",):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=fresh_process.answer, args=(name, 4, str(given), theirs))
        process.start()
        theirs.close()
        try:
            assert mine.poll(fresh_process.LIMIT), "the child hangs"
            assert mine.recv() == expected[name]
        finally:
            process.kill()
            process.join(10)


@pytest.mark.long
@pytest.mark.parametrize("threads", [2, 3, 4, 8])
@pytest.mark.parametrize("how", list(fresh_process.HOW))
@pytest.mark.parametrize("name", list(LAPACK))
def test_thirty_processes(name, how, threads, given, expected):
    assert not wrong(given, expected, [(name, threads, how)] * 30)
