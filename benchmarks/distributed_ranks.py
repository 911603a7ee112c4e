"""What the processes of `spectral-kernels bench --ranks` measure, each as one rank over gloo."""

from __future__ import annotations

import datetime
import math
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from spectral_kernels.optim._distributed.exchange import Channel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from .distributed_costs import ALGORITHMS, Layout, Shape
from .inputs import gaussian
from .steps import FREQUENCY

# Seconds of timing for what is measured in every process, of one thing.
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 40
_TINY = (2, 2)
# Elements that a rank sends, those to itself included.
_SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
_COPIED = 1 << 22
# The clocks of a sample: of the wall, and of the process's CPU time, which other processes on the
# machine disturb less.
WALL, CPU = 0, 1
Sample = tuple[float, float]
_TIMEOUT = datetime.timedelta(seconds=600)


@dataclass(frozen=True)
class Campaign:
    """What to measure.

    Attributes:
        shapes: of every optimizer, by its name, the matrices of the model.
        budget: seconds of timing for each thing.
        most: bytes of the largest exchange that is timed by itself.
        progress: the first rank prints what it has measured.
    """

    shapes: Mapping[str, tuple[Shape, ...]]
    budget: float
    most: int = 4 * _SIZES[-1]
    progress: bool = False

    def say(self, what: str, start: float) -> None:
        """Prints what has ended, and how many seconds after `start`."""
        if self.progress and dist.get_rank() == 0:
            print(f"  {what}: {time.perf_counter() - start:.0f} s", flush=True)


@dataclass
class Found:
    """What a rank has measured, in seconds, by both clocks.

    Attributes:
        steps: (algorithm, layout) -> of every round a mean step.
        begin: the same of as many matrices of no size.
        matrices: (algorithm, shape) -> CPU seconds of one matrix's step in a list of one, less what
            a list of one has whatever its matrix.
        pieces, everyone: bytes that are sent to others, and what the exchange takes.
        copied: of a byte.
        loads: (algorithm, layout) -> by `plan()`, floating-point operations of every owner, and
            bytes that all ranks send.
    """

    steps: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    begin: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    matrices: dict[tuple[str, Shape], float] = field(default_factory=dict)
    pieces: list[tuple[int, Sample]] = field(default_factory=list)
    everyone: list[tuple[int, Sample]] = field(default_factory=list)
    copied: Sample = (math.nan, math.nan)
    loads: dict[tuple[str, str], tuple[list[int], int]] = field(default_factory=dict)


def layouts(ranks: int) -> dict[str, Layout]:
    """Those that go through owners, by name."""
    found = {"ddp": Layout(ranks, 1)}
    if ranks > 1:
        found["fsdp"] = Layout(1, ranks)
    if ranks >= 4 and ranks % 2 == 0:
        found["hsdp"] = Layout(2, ranks // 2)
    return found


def run(ranks: int, campaign: Campaign) -> list[Found]:
    """Starts so many processes of one thread each, and returns what they have measured."""
    with tempfile.TemporaryDirectory(prefix="ranks") as folder:
        before = {name: os.environ.get(name) for name in _ENVIRONMENT}
        os.environ.update(_ENVIRONMENT)
        try:
            torch.multiprocessing.spawn(_begin, (ranks, folder, campaign), nprocs=ranks)
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(ranks)]


_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def _begin(rank: int, ranks: int, folder: str, campaign: Campaign) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=_TIMEOUT,
    )
    try:
        found = measured(campaign)
        Path(folder, str(rank)).write_bytes(pickle.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def measured(campaign: Campaign) -> Found:
    """Everything of one rank. All ranks call it."""
    found = Found()
    start = time.perf_counter()
    _time_exchanges(found, campaign)
    campaign.say("exchanges and copies", start)
    for algorithm, model in campaign.shapes.items():
        start = time.perf_counter()
        trainings = _trainings(algorithm, model)
        period = 1 if algorithm == "muon" else FREQUENCY
        for name, (_, optimizer) in trainings.items():
            rows = optimizer.plan().rows
            sent = sum(row.bytes for row in rows)
            found.loads[algorithm, name] = optimizer.plan().loads, sent
        steps = {name: optimizer.step for name, (_, optimizer) in trainings.items()}
        # Between the steps that they are to foretell, so that what disturbs one disturbs both.
        shapes = list(dict.fromkeys([_TINY, *model]))
        steps |= {str(shape): _alone(algorithm, shape) for shape in shapes}
        rounds = _rounds(steps, period, campaign.budget * len(trainings))
        found.steps |= {(algorithm, name): rounds[name] for name in trainings}
        seconds = {shape: _median(rounds[str(shape)])[CPU] for shape in shapes}
        found.matrices |= {
            (algorithm, shape): max(0.0, seconds[shape] - seconds[_TINY]) for shape in shapes[1:]
        }
        tiny = {
            name: optimizer.step
            for name, (_, optimizer) in _trainings(algorithm, [_TINY] * len(model)).items()
        }
        rounds = _rounds(tiny, period, campaign.budget / 4)
        found.begin |= {(algorithm, name): times for name, times in rounds.items()}
        campaign.say(f"{algorithm}, {len(model)} matrices", start)
    return found


class _Net(nn.Module):
    def __init__(self, shapes: Sequence[Shape]) -> None:
        super().__init__()
        for i, shape in enumerate(shapes):
            weight = 0.02 * gaussian(shape, torch.float32, i)
            self.register_parameter(f"w{i:04}", nn.Parameter(weight))


def _made(algorithm: str, net: nn.Module, **more: Any) -> Any:
    groups = [{"params": list(net.named_parameters()), "algorithm": "matrix"}]
    return ALGORITHMS[algorithm](groups, lr=1e-4, **more)


def _trainings(algorithm: str, shapes: Sequence[Shape]) -> dict[str, tuple[nn.Module, Any]]:
    """By layout a model with gradients and its optimizer; "replicated" steps all on every rank."""
    found: dict[str, tuple[nn.Module, Any]] = {}
    for name, layout in {"replicated": None, **layouts(dist.get_world_size())}.items():
        net = _Net(shapes)
        more = {"distributed": dist.group.WORLD} if name == "ddp" else {}
        if layout is not None and layout.shards > 1:
            names = ("replicas", "shards")
            mesh = init_device_mesh("cpu", (layout.replicas, layout.shards), mesh_dim_names=names)
            fully_shard(net, mesh=mesh if layout.replicas > 1 else mesh["shards"])
        for i, param in enumerate(net.parameters()):
            # The same on all ranks where all hold all.
            param.grad = torch.zeros_like(param)
            grad: Any = param.grad
            local = grad if layout is None or layout.shards == 1 else grad.to_local()
            local.copy_(gaussian(local.shape, torch.float32, 1000 + i))
        found[name] = net, _made(algorithm, net, **more)
    return found


def _alone(algorithm: str, shape: Shape) -> Callable[[], Any]:
    """The step of one matrix, of which no other rank knows."""
    net = _Net([shape])
    for param in net.parameters():
        param.grad = gaussian(shape, torch.float32, 1)
    return _made(algorithm, net).step


def _rounds(
    calls: dict[str, Callable[[], Any]], period: int, budget: float
) -> dict[str, list[Sample]]:
    """Of every call the seconds of some rounds, one after the other, all ranks together.

    A round is a whole period, so that every kind of step is in it. Before the first one a call
    makes what is made once.
    """
    for call in calls.values():
        call()
    samples = {name: [_one_round(call, period)] for name, call in calls.items()}
    # A sample is a mean step.
    first = period * sum(times[0][WALL] for times in samples.values())
    agreed = torch.tensor([first], device="cpu", dtype=torch.float64)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    count = min(_MOST_ROUNDS, max(_LEAST_ROUNDS, int(budget / max(float(agreed), 1e-9))))
    for _ in range(count - 1):
        for name, call in calls.items():
            samples[name].append(_one_round(call, period))
    return samples


def _one_round(call: Callable[[], Any], period: int) -> Sample:
    dist.barrier()
    start = time.perf_counter(), time.process_time()
    for _ in range(period):
        call()
    end = time.perf_counter(), time.process_time()
    return (end[0] - start[0]) / period, (end[1] - start[1]) / period


def _median(samples: Sequence[Sample]) -> Sample:
    wall, cpu = (statistics.median(values) for values in zip(*samples, strict=True))
    return wall, cpu


def _time_exchanges(found: Found, campaign: Campaign) -> None:
    """By the very calls of a step."""
    ranks = dist.get_world_size()
    channel = Channel(dist.group.WORLD, torch.device("cpu"), 60.0)
    for elements in _SIZES:
        if 4 * elements > campaign.most:
            continue
        share = elements // ranks
        source = torch.ones(elements, device="cpu", dtype=torch.float32)
        parts = [[part] for part in source[: share * ranks].split(share)]
        # What stays is not copied, which the model counts by itself.
        places: list[list[Any]] = [[part] for part in torch.zeros_like(source).split(share)]
        places[channel.rank] = [share]

        def pieces(parts: Any = parts, places: Any = places[:ranks]) -> None:
            channel.exchange(parts, places, torch.float32).wait()

        def everyone(parts: Any = parts, share: int = share) -> None:
            channel.everyone(parts[0], [[share]] * ranks, torch.float32).wait()

        times = _rounds({"pieces": pieces, "everyone": everyone}, 1, campaign.budget / 4)
        sent = 4 * share * (ranks - 1)
        found.pieces.append((sent, _median(times["pieces"])))
        found.everyone.append((sent, _median(times["everyone"])))
    source = torch.ones(_COPIED, device="cpu", dtype=torch.float32)
    target = torch.zeros_like(source)
    times = _rounds({"copy": lambda: target.copy_(source)}, 1, campaign.budget / 4)
    wall, cpu = _median(times["copy"])
    found.copied = wall / (4 * _COPIED), cpu / (4 * _COPIED)
