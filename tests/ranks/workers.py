"""Processes that stay for the whole run and do, each as one rank, what a test asks for."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import inspect
import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
CASES = ("parity", "checkpoints", "refusals", "trainings", "recipes", "work", "ways")
# Of a group; what a dead or stopped rank costs the others.
TIMEOUT = 30.0
# A worker that says nothing for so long is replaced.
PATIENCE = 120.0


@dataclass(frozen=True)
class Failure:
    """An exception of a worker: its type and message, and where it came from."""

    kind: str
    message: str
    trace: str


def _cases() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for module in (importlib.import_module(f"ranks.{name}") for name in CASES):
        own = {
            name: value
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        }
        assert not own.keys() & found.keys(), own.keys() & found.keys()
        found |= own
    return found


def serve(connection: Connection, rank: int, world: int, store: str, timeout: float) -> None:
    """The worker's loop: takes the name of a function in one of CASES, and its arguments."""
    import torch
    import torch.distributed as dist

    cases = _cases()

    torch.set_num_threads(1)
    where, limit = f"file://{store}", datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", where, limit, world_size=world, rank=rank)
    while True:
        try:
            name, args = connection.recv()
        except EOFError:
            return
        try:
            answer = cases[name](*args)
        except Exception as error:
            answer = Failure(type(error).__name__, str(error), traceback.format_exc())
        connection.send(answer)


class Workers:
    """One world for every number of ranks, which is replaced when one of its ranks has failed.

    What they import is imported once, in a process that they are forked from.
    """

    def __init__(self) -> None:
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(["ranks.references"])
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")
        self._worlds: dict[tuple[int, float], list[tuple[BaseProcess, Connection]]] = {}
        self._stores = 0

    def _world(self, ranks: int, timeout: float) -> list[tuple[BaseProcess, Connection]]:
        if (ranks, timeout) not in self._worlds:
            self._stores += 1
            store = f"{self._folder.name}/{self._stores}"
            self._worlds[ranks, timeout] = [
                self._started(rank, ranks, store, timeout) for rank in range(ranks)
            ]
        return self._worlds[ranks, timeout]

    def _started(
        self, rank: int, ranks: int, store: str, timeout: float
    ) -> tuple[BaseProcess, Connection]:
        here, there = self._context.Pipe()
        process = self._context.Process(
            target=serve, args=(there, rank, ranks, store, timeout), daemon=True
        )
        # The first one starts the process that imports; it does not get this one's sys.path.
        path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        with _environment(
            OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", PYTHONPATH=path
        ):
            process.start()
        there.close()
        return process, here

    def attempt(
        self,
        ranks: int,
        name: str,
        *args: Any,
        timeout: float = TIMEOUT,
        of: Sequence[int] | None = None,
    ) -> list[Any]:
        """What the ranks of a world answer, failures included; or only some of the ranks."""
        world = self._world(ranks, timeout)
        for _, connection in world:
            connection.send((name, args))
        asked = range(ranks) if of is None else of
        found = dict.fromkeys(asked, Failure("TimeoutError", f"nothing for {PATIENCE} s", ""))
        waiting = {world[rank][1]: rank for rank in asked}
        while waiting and (ready := wait(list(waiting), PATIENCE)):
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    found[rank] = connection.recv()
                except (EOFError, ConnectionResetError):
                    found[rank] = Failure("EOFError", "the worker has ended", "")
        if of is not None or any(isinstance(answer, Failure) for answer in found.values()):
            self._end(ranks, timeout)
        return list(found.values())

    def run(self, ranks: int, name: str, *args: Any) -> list[Any]:
        """What the ranks of a world answer; raises where one of them failed."""
        found = self.attempt(ranks, name, *args)
        for rank, answer in enumerate(found):
            if isinstance(answer, Failure):
                why = answer.trace or answer.message
                raise AssertionError(f"{name}{args} on rank {rank} of {ranks}: {why}")
        return found

    def _end(self, ranks: int, timeout: float) -> None:
        for process, connection in self._worlds.pop((ranks, timeout)):
            assert process.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            connection.close()

    def close(self) -> None:
        """Ends all of them."""
        for ranks, timeout in list(self._worlds):
            self._end(ranks, timeout)
        self._folder.cleanup()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
