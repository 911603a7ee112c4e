"""The optimizers obey torch.optim's conventions.

The categories of torch's TestOptimRenewed, written anew for these classes:
errors; lr and weight decay of groups; lr as a tensor of one element, of 0 and 1 dimensions, changed
in place; steps go downhill, alone, with maximize, with schedulers, with groups; complex and sparse
input; state that is not empty; steps without gradients, with zero gradients, with gradients on some
parameters only; pre, post and global hooks of step; closures; grad scaling; default dtype; mixed
dtypes; state dicts that are deterministic, older, of other names, saved and loaded with
weights_only, with steps as numbers; hooks of state_dict and load_state_dict; load on another
device's tensors (map_location); deepcopy, pickle, repr, copied public attributes; duplicate
parameters in and across groups; empty lists; tensors and sets in place of lists; zero_grad.
foreach, fused and differentiable are no arguments of these classes. What state dicts and copies are
asked for is in test_optim_state_dict.py.
"""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import spectral_kernels as sk
import torch
from support.optimizers import batches, model, parameter, train, with_grads
from support.states import assert_same, snapshot, tensors
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

CLASSES = (sk.optim.Muon, sk.optim.Shampoo, sk.optim.SOAP, sk.optim.DeVA)


pytestmark = pytest.mark.usefixtures("one_thread")


# Training.


def test_steps_go_downhill(make):
    net = model()
    (batch,) = batches(1)
    losses = train(net, make(net.parameters()), [batch] * 25)
    assert losses[-1] < 0.8 * losses[0]


def test_maximize_goes_uphill(make_few):
    net, mirror = model(), model()
    up, down = make_few(net.parameters(), maximize=True), make_few(mirror.parameters())
    assert {group["maximize"] for group in up.param_groups} == {True}
    for seed in range(5):
        with_grads(net.parameters(), seed)
        with_grads(mirror.parameters(), seed)
        for param in mirror.parameters():
            param.grad.neg_()
        up.step()
        down.step()
    assert_same(list(net.parameters()), list(mirror.parameters()))


@pytest.mark.parametrize(
    "schedule",
    [
        lambda opt: lr_scheduler.StepLR(opt, 3),
        lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 0.9**t),
        lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.02, total_steps=20),
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, 20),
        lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1),
    ],
    ids=["step", "lambda", "one_cycle", "cosine", "plateau"],
)
def test_F41_schedulers_drive_every_group(make_few, schedule):
    net = model()
    optimizer = make_few(net.parameters())
    scheduler = schedule(optimizer)
    first = [group["lr"] for group in optimizer.param_groups]
    for batch in batches(8):
        train(net, optimizer, [batch])
        plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        scheduler.step(1.0) if plateau else scheduler.step()
    assert all(group["lr"] != lr for group, lr in zip(optimizer.param_groups, first, strict=True))
    assert all(param.isfinite().all() for param in net.parameters())


def test_lr_zero_moves_nothing(make):
    net = model()
    optimizer = make(net.parameters())
    before = [param.detach().clone() for param in net.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(net, optimizer, batches(3))
    assert_same([p.detach() for p in net.parameters()], before)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr_equals_number(make_few, shape):
    net, other = model(), model()
    lr = torch.full(shape, 0.0078125)
    optimizer = make_few(net.parameters(), lr=lr, adamw={"lr": lr})
    plain = make_few(other.parameters(), lr=0.0078125, adamw={"lr": 0.0078125})
    for seed in range(5):
        if seed == 2:
            lr.mul_(0.5)
            for group in plain.param_groups:
                group["lr"] *= 0.5
        for each, stepped in ((net, optimizer), (other, plain)):
            with_grads(each.parameters(), seed)
            stepped.step()
    assert all(group["lr"] is lr for group in optimizer.param_groups)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        if mine.ndim > 1:
            assert torch.equal(mine, theirs)
        else:
            # torch's AdamW divides a tensor lr in its own dtype.
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_groups_have_their_own_lr_and_weight_decay(make_few):
    params = [parameter(6, 8, seed=i) for i in range(3)]
    optimizer = make_few(
        [
            {"params": params[0]},
            {"params": [params[1]], "lr": 0.0},
            {"params": params[2:], "weight_decay": 0.5},
        ]
    )
    alone = make_few([copied := nn.Parameter(params[2].detach().clone())], weight_decay=0.5)
    frozen = params[1].detach().clone()
    for seed in range(3):
        with_grads(params, seed)
        copied.grad = params[2].grad.clone()
        optimizer.step()
        alone.step()
    assert torch.equal(params[1], frozen)
    # Staggered refreshes depend on the place among all parameters.
    torch.testing.assert_close(params[2], copied, rtol=0.0, atol=0.05)
    assert [group["weight_decay"] for group in optimizer.param_groups][2] == 0.5


# Gradients.


def test_step_without_gradients_changes_nothing(make):
    net = model()
    optimizer = make(net.parameters())
    before = snapshot(optimizer)
    optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_F03_zero_gradients_move_nothing_but_by_decay(make):
    params = [parameter(5, 7), parameter(3, 2, 3, 3), parameter(4)]
    optimizer = make(params)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = [param.detach().clone() for param in params]
    for _ in range(4):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert_same([param.detach() for param in params], before)
    assert all(x.isfinite().all() for x in tensors(optimizer.state_dict()["state"]))


def test_F29_no_gradient_no_change(make):
    params = [parameter(6, 8, seed=i) for i in range(3)] + [parameter(8)]
    optimizer = make(params)
    with_grads(params)
    optimizer.step()
    for seed in (1, 2, 3):
        before = copy.deepcopy(optimizer.state[params[1]]), params[1].detach().clone()
        with_grads(params, seed)
        params[1].grad = None
        params[1].requires_grad_(False)
        optimizer.step()
        assert_same((optimizer.state[params[1]], params[1].detach()), before)
        assert params[1].grad is None
    params[1].requires_grad_(True)
    with_grads(params, 4)
    optimizer.step()
    assert not torch.equal(params[1], before[1])


def test_F32_gradients_are_not_modified(make):
    net = model()
    optimizer = make(net.parameters())
    for seed in range(4):
        with_grads(net.parameters(), seed)
        grads = [param.grad.clone() for param in net.parameters()]
        optimizer.step()
        assert_same([param.grad for param in net.parameters()], grads)


def test_F30_sparse_gradient_is_refused_with_its_name(make_few):
    table, weight = parameter(6, 4), parameter(5, 5)
    optimizer = make_few([("table", table), ("weight", weight)])
    weight.grad = torch.ones(5, 5)
    table.grad = torch.eye(6)[:, :4].to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match="gradient of table must be a dense tensor"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_F30_parameters_that_are_no_floats_are_refused(make_few, dtype):
    param = torch.zeros(3, 3, dtype=dtype)
    with pytest.raises(TypeError, match=f"float32, bfloat16, float16, not {dtype}"):
        make_few([param])


def test_meta_parameter_is_refused_at_its_step(make_few):
    param = nn.Parameter(torch.zeros(3, 3, device="meta"))
    optimizer = make_few([param])
    param.grad = torch.zeros(3, 3, device="meta")
    with pytest.raises(TypeError, match="meta device"):
        optimizer.step()


def test_F43_closure_runs_with_gradients_and_its_value_returns(make):
    net = model()
    optimizer = make(net.parameters())
    ((x, y),) = batches(1)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [optimizer.step(closure) for _ in range(10)]
    assert isinstance(losses[0], torch.Tensor)
    assert losses[-1] < losses[0]
    assert optimizer.step(lambda: 3.0) == 3.0
    assert optimizer.step(lambda: None) is None


def test_zero_grad(make_few):
    net = model()
    optimizer = make_few(net.parameters())
    with_grads(net.parameters())
    optimizer.zero_grad(set_to_none=False)
    assert all(not param.grad.any() for param in net.parameters())
    optimizer.zero_grad()
    assert all(param.grad is None for param in net.parameters())


def test_reused_gradient_buffers_give_the_same_steps(make_few):
    """zero_grad(set_to_none=False), which keeps gradient tensors, against new ones every step."""
    kept, fresh = model(), model()
    optimizers = make_few(kept.parameters()), make_few(fresh.parameters())
    for x, y in batches(4):
        optimizers[0].zero_grad(set_to_none=False)
        optimizers[1].zero_grad()
        for net, optimizer in zip((kept, fresh), optimizers, strict=True):
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    assert_same(list(kept.parameters()), list(fresh.parameters()))


# Grad scaling and autocast.


def test_F05_grad_scaler_skips_overflowed_steps(make):
    """Steps 1, 3 and 4 overflow: what remains is the run without them."""
    net, clean = model(), model()
    optimizer, other = make(net.parameters()), make(clean.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        optimizer.zero_grad()
        with_grads(net.parameters(), step)
        scaler.scale(torch.ones(()))
        for param in net.parameters():
            param.grad.mul_(scaler.get_scale())
        if step in (1, 3, 4):
            next(net.parameters()).grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if step not in (1, 3, 4):
            with_grads(clean.parameters(), step)
            other.step()
    assert_same(list(net.parameters()), list(clean.parameters()))
    assert_same(optimizer.state_dict()["state"], other.state_dict()["state"])


def test_F70_autocast_does_not_change_a_step(make_few):
    inside, outside = model(), model()
    optimizers = make_few(inside.parameters()), make_few(outside.parameters())
    for seed in range(3):
        with_grads(inside.parameters(), seed)
        with_grads(outside.parameters(), seed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            optimizers[0].step()
        optimizers[1].step()
    assert_same(list(inside.parameters()), list(outside.parameters()))


def test_step_in_inference_mode_leaves_usable_state(make_few):
    nets = model(), model()
    inside, outside = (make_few(net.parameters()) for net in nets)
    for net in nets:
        with_grads(net.parameters())
    with torch.inference_mode():
        inside.step()
    outside.step()
    for optimizer in (inside, outside):
        optimizer.step()
    assert_same(*(list(net.parameters()) for net in nets))


def test_default_dtype_does_not_matter(make_few):
    params, others = [[parameter(6, 8), parameter(8)] for _ in range(2)]
    optimizer = make_few(params)
    for seed in range(3):
        with_grads(params, seed)
        optimizer.step()
    torch.set_default_dtype(torch.float64)
    try:
        changed = make_few(others)
        for seed in range(3):
            with_grads(others, seed)
            changed.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(params[0], others[0])
    # torch keeps AdamW's step in the default dtype.
    torch.testing.assert_close(params[1], others[1], rtol=1e-6, atol=1e-7)


def test_mixed_dtypes_in_one_list(make):
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    mixed = [parameter(6, 7, seed=i, dtype=dtype) for i, dtype in enumerate(dtypes)]
    alone = [copy.deepcopy(param) for param in mixed]
    frequency = {} if "muon" in str(make) else {"precondition_frequency": 1}
    optimizers = [
        CONFIG([param], **frequency) for CONFIG, param in zip([make] * 4, alone, strict=True)
    ]
    together = make(mixed, **frequency) if frequency else make(mixed)
    for seed in range(3):
        for i, (param, other) in enumerate(zip(mixed, alone, strict=True)):
            with_grads([param], 10 * seed + i)
            with_grads([other], 10 * seed + i)
        together.step()
        for optimizer in optimizers:
            optimizer.step()
    assert_same(mixed, alone)


# Hooks.


def test_step_hooks(make_few):
    param = parameter(3, 3)
    optimizer = make_few([param])
    calls = []
    hooks = (
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("all pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("all post")),
    )
    param.grad = torch.ones(3, 3)
    optimizer.step()
    assert calls == ["all pre", "pre", "post", "all post"]
    for hook in hooks:
        hook.remove()
    optimizer.step()
    assert len(calls) == 4


def test_optimizer_in_backward(make_few):
    """One optimizer a parameter, stepped as soon as its gradient is there."""
    net, whole = model(), model()
    each = {param: make_few([param]) for param in net.parameters()}

    def hook(param):
        each[param].step()
        each[param].zero_grad()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for param in net.parameters():
            param.register_post_accumulate_grad_hook(hook)
        ((x, y),) = batches(1)
        nn.functional.cross_entropy(net(x), y).backward()
    # Places in a schedule differ, which the first step does not show.
    optimizer = make_few(whole.parameters())
    train(whole, optimizer, [(x, y)])
    assert_same(list(net.parameters()), list(whole.parameters()))


# Signatures.


@pytest.mark.parametrize("name", ["step", "state_dict", "load_state_dict", "add_param_group"])
def test_F40_signatures_are_those_of_torch(name):
    for cls in CLASSES:
        ours = inspect.signature(getattr(cls, name)).parameters
        theirs = inspect.signature(getattr(torch.optim.Optimizer, name)).parameters
        assert [(p.name, p.kind) for p in ours.values()] == [
            (p.name, p.kind) for p in theirs.values()
        ]


def test_muon_takes_the_arguments_of_torch():
    ours = inspect.signature(sk.optim.Muon.__init__).parameters
    theirs = inspect.signature(torch.optim.Muon.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter_ in theirs.items():
        if name != "eps":
            assert ours[name].default == parameter_.default


# Lists of parameters.


def test_empty_parameter_lists(make_few):
    with pytest.raises(ValueError, match="empty parameter list"):
        make_few([])
    optimizer = make_few([{"params": []}])
    optimizer.step()
    param = parameter(3, 3)
    optimizer.add_param_group({"params": param})
    param.grad = torch.ones(3, 3)
    optimizer.step()


def test_tensor_and_set_in_place_of_a_list(make_few):
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        make_few(parameter(3, 3))
    with pytest.raises(TypeError, match="not a set"):
        make_few([{"params": {parameter(3, 3)}}])
    with pytest.raises(TypeError, match="must be a tensor, not int"):
        make_few([3])


def test_duplicate_parameters_are_refused(make_few):
    param = parameter(3, 3)
    with pytest.raises(ValueError, match="holds a parameter twice"):
        make_few([param, param])
    with pytest.raises(ValueError, match="more than one parameter group"):
        make_few([{"params": param}, {"params": param}])


def test_leaves_only(make_few):
    with pytest.raises(ValueError, match="non-leaf"):
        make_few([parameter(3, 3) * 2.0])


def test_named_and_unnamed_groups_do_not_mix(make_few):
    optimizer = make_few([("a", parameter(3, 3))])
    before = list(optimizer.param_groups)
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": [parameter(3, 3), parameter(3)]})
    assert optimizer.param_groups == before


def test_generator_of_parameters_in_a_group(make_few):
    net = model()
    optimizer = make_few([{"params": net.parameters(), "lr": 0.25}])
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
