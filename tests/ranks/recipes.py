"""What ranks do under other people's layers; each function runs in every worker."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from spectral_kernels import call_counts, swap_in
from support.packages import DOUBLES, modules_of
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import Shard

from ranks.layouts import LAYOUTS, full, mesh_of_all, place
from ranks.nets import Net, give, gradients, weights
from ranks.runs import HALF, OPTIMIZERS, STEPS, alone, different, stepped
from ranks.trainings import classifier, loss_of


def _swapped(target: str, *, spread: bool) -> tuple[dict[str, torch.Tensor], int]:
    """The weights after some steps of a swapped optimizer, and its calls of our kernels."""
    shapes = {f"w{i}": (8, 12) for i in range(2 * dist.get_world_size())}
    net = Net(weights(torch.float32, shapes))
    more: dict[str, Any] = {}
    if target != "dion":
        types = importlib.import_module(f"{target}.preconditioner.matrix_functions_types")
        more["config"] = types.CoupledNewtonConfig()
    if spread and target == "dion":
        mesh = mesh_of_all()
        place(net, lambda x: (mesh, [Shard(0)]))
        more["distributed_mesh"] = mesh
    elif spread:
        more["process_group"] = dist.group.WORLD
    package = importlib.import_module(target)
    make = package.Muon if target == "dion" else package.DistributedShampoo
    optimizer = make(list(net.parameters()), **more)
    call_counts(reset=True)
    for step in range(3):
        give(net, gradients(step, torch.float32, shapes))
        optimizer.step()
    ours = "newton_schulz/" if target == "dion" else "inverse_root/"
    calls = sum(count for name, count in call_counts().items() if name.startswith(ours))
    return {name: full(param) for name, param in net.named_parameters()}, calls


def swapped(target: str) -> tuple[list[str], int, int]:
    """Distributors that hand whole, plain matrices to what is swapped: the bits of one process."""
    with modules_of([DOUBLES]):
        importlib.import_module(target)
        with swap_in(target):
            alone, of_one = _swapped(target, spread=False)
            found, calls = _swapped(target, spread=True)
    return [name for name, x in found.items() if not torch.equal(x, alone[name])], calls, of_one


def _as_launched() -> Any:
    """The environment that torch.distributed.run gives to a rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return mock.patch.dict(
        os.environ,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29511",
        TORCHELASTIC_RUN_ID="ranks",
    )


def trained_by(package: str) -> list[str]:
    """DDP as a trainer sets it up: as in one process."""
    net, one = classifier(), classifier()
    reference = OPTIMIZERS["muon"](one.named_parameters())
    with _as_launched():
        module = importlib.import_module(package)
        if package == "lightning.pytorch":
            optimizer, model = _under_a_trainer(module, net)
        else:
            optimizer, model = _in_a_loop(module, package, net)
    for step in range(4):
        loss_of(one, step, slice(0, 8)).backward()
        reference.step()
        reference.zero_grad()
    parallel = torch.nn.parallel.DistributedDataParallel
    assert any(isinstance(x, parallel) for x in model.modules())
    assert any(row.owner == 1 for row in optimizer.plan().rows)
    return different(net, dict(one.named_parameters()))


def _in_a_loop(module: Any, package: str, net: torch.nn.Module) -> tuple[Any, torch.nn.Module]:
    """accelerate's way, and Fabric's."""
    optimizer = OPTIMIZERS["muon"](net.named_parameters(), distributed=dist.group.WORLD)
    if package == "accelerate":
        trainer = module.Accelerator(cpu=True)
        model, stepping = trainer.prepare(net, optimizer)
    else:
        trainer = module.Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy="ddp")
        trainer.launch()
        model, stepping = trainer.setup(net, optimizer)
    for step in range(4):
        trainer.backward(loss_of(model, step, slice(0, 8)))
        stepping.step()
        stepping.zero_grad()
    return optimizer, model


def _under_a_trainer(module: Any, net: torch.nn.Module) -> tuple[Any, torch.nn.Module]:
    """Lightning's way: the Trainer has the loop, and asks for the optimizer."""
    wrapped: list[torch.nn.Module] = []

    class Task(module.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            # Afterwards it is taken off.
            wrapped[:] = [self.trainer.strategy.model]
            return loss_of(self.net, int(batch), slice(0, 8))

        def configure_optimizers(self) -> Any:
            return OPTIMIZERS["muon"](net.named_parameters(), distributed=dist.group.WORLD)

    trainer = module.Trainer(
        max_steps=4,
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy="ddp",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    task = Task()
    trainer.fit(task, torch.utils.data.DataLoader(range(4), batch_size=1))
    assert trainer.global_step == 4
    return task.optimizers(use_pl_optimizer=False), wrapped[0]


# torchtitan's container keeps the state of optimizers in one flat dict: "state.NAME.KEY" and
# "param_groups.NAME.KEY". Into an optimizer it loads what the optimizer's own state has names for.


def _flattened(found: dict[str, Any], prefix: str, tree: Mapping[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _flattened(found, f"{prefix}.{key}", value)
        else:
            found[f"{prefix}.{key}"] = value


def _flat_state(optimizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    given = optimizer.state_dict()
    for group in given["param_groups"]:
        values = {key: x for key, x in group.items() if key not in ("params", "param_names")}
        for number, name in zip(group["params"], group["param_names"], strict=True):
            _flattened(found, f"state.{name}", given["state"][number])
            _flattened(found, f"param_groups.{name}", values)
    return found


def _taken(flat: Mapping[str, Any], prefix: str) -> Any:
    if prefix in flat:
        return flat[prefix]
    inner = {key[len(prefix) + 1 :].split(".")[0] for key in flat if key.startswith(f"{prefix}.")}
    return {key: _taken(flat, f"{prefix}.{key}") for key in inner}


def _load_flat_state(optimizer: Any, flat: Mapping[str, Any]) -> None:
    state: dict[int, Any] = {}
    groups = []
    for group in optimizer.param_groups:
        numbers = range(len(state), len(state) + len(group["params"]))
        for number, name, param in zip(numbers, group["param_names"], group["params"], strict=True):
            state[number] = {
                key: _taken(flat, f"state.{name}.{key}") for key in optimizer.state[param]
            }
        first = f"param_groups.{group['param_names'][0]}"
        values = {key: flat[f"{first}.{key}"] for key in group if f"{first}.{key}" in flat}
        groups.append({**values, "params": list(numbers)})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


class _Like:
    """What torchtitan's container does to an optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.step = optimizer.step
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return _flat_state(self._optimizer)

    def load_state_dict(self, flat: Mapping[str, Any]) -> None:
        _load_flat_state(self._optimizer, flat)


def _contained(layout: str, name: str, *, real: bool) -> tuple[Net, Any]:
    net = Net(weights(torch.float32))
    LAYOUTS[layout](net)
    if not real:
        names = [key for key, _ in net.named_parameters()]
        group = {"params": list(net.parameters()), "param_names": names, "fused": False}
        return net, _Like(OPTIMIZERS[name]([group]))
    module = importlib.import_module("torchtitan.components.optimizer")

    class Container(module.OptimizersContainer):
        @staticmethod
        def _resolve_optimizer_factory(name: str) -> Any:
            return OPTIMIZERS[name]

    groups = [module.ParamGroupConfig(pattern=".*", optimizer_name=name)]
    config = Container.Config(param_groups=groups, implementation="for-loop")
    return net, Container(config, model_parts=[net])


def save_from_a_container(layout: str, folder: str, real: bool) -> None:
    for name in OPTIMIZERS:
        net, container = _contained(layout, name, real=real)
        stepped(net, container, range(HALF), torch.float32)
        saved = {**get_model_state_dict(net), **container.state_dict()}
        dcp.save(saved, checkpoint_id=f"{folder}/{name}")


def resume_in_a_container(layout: str, folder: str, real: bool) -> dict[str, list[str]]:
    """Goes on with what another number of ranks has saved."""
    found = {}
    for name in OPTIMIZERS:
        net, container = _contained(layout, name, real=real)
        of_net, flat = get_model_state_dict(net), container.state_dict()
        target = {**of_net, **flat}
        dcp.load(target, checkpoint_id=f"{folder}/{name}")
        set_model_state_dict(net, {key: target[key] for key in of_net})
        container.load_state_dict({key: target[key] for key in flat})
        stepped(net, container, range(HALF, STEPS), torch.float32)
        found[name] = different(net, alone(name))
    return found
