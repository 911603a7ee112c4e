"""Groups: they stay as they were given, and what is written in one reaches all of its tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import spectral_kernels as sk
import torch
from support.optimizers import CONFIGS, FEW, batches, model, parameter, train, with_grads
from support.states import GOLDEN, assert_same, golden, snapshot
from torch import Tensor, nn
from torch.optim import lr_scheduler

CLASSES = {
    "muon": sk.optim.Muon,
    "shampoo": sk.optim.Shampoo,
    "soap": sk.optim.SOAP,
    "deva": sk.optim.DeVA,
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=CLASSES)
def cls(request: pytest.FixtureRequest) -> Any:
    return CLASSES[request.param]


def both(seed: int = 0) -> tuple[nn.Parameter, nn.Parameter]:
    """A vector and a matrix."""
    return parameter(7, seed=seed), parameter(4, 6, seed=seed)


def assert_vector_is_torchs(
    optimizer: torch.optim.Optimizer,
    vector: nn.Parameter,
    matrix: nn.Parameter,
    public: torch.optim.Optimizer,
    other: nn.Parameter,
    seeds: range = range(5),
) -> None:
    """The vector beside the matrix ends where torch.optim.AdamW takes its copy."""
    for seed in seeds:
        with_grads([vector, matrix], seed)
        other.grad = vector.grad.clone()
        optimizer.step()
        public.step()
        assert torch.equal(vector, other)


def twin(param: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(param.detach().clone())


# One group stays one group.


def test_groups_stay_as_they_are_given(make_few):
    (a, b), (c, d) = both(), both(1)
    optimizer = make_few([{"params": [a, b], "note": "first"}, {"params": [d, c]}])
    groups = [[id(param) for param in group["params"]] for group in optimizer.param_groups]
    assert groups == [[id(a), id(b)], [id(d), id(c)]]
    assert optimizer.param_groups[0]["note"] == "first"
    optimizer.add_param_group({"params": list(both(2))})
    assert len(optimizer.param_groups) == 3
    assert [len(group["params"]) for group in optimizer.state_dict()["param_groups"]] == [2] * 3


def test_a_list_of_schedules_has_one_entry_a_group(make_few):
    (a, b), (c, d) = both(), both(1)
    optimizer = make_few([{"params": [a, b], "lr": 0.5}, {"params": [c, d], "lr": 0.25}])
    schedule = lr_scheduler.LambdaLR(optimizer, [lambda t: 0.5**t, lambda t: 1.0])
    others = twin(a), twin(c)
    public = torch.optim.AdamW([{"params": others[0], "lr": 0.5}, {"params": others[1]}], lr=0.25)
    theirs = lr_scheduler.LambdaLR(public, [lambda t: 0.5**t, lambda t: 1.0])
    for seed in range(4):
        with_grads([a, b, c, d], seed)
        for param, other in zip((a, c), others, strict=True):
            other.grad = param.grad.clone()
        for each in (optimizer, public, schedule, theirs):
            each.step()
    assert_same([a, c], list(others))
    one_cycle = lr_scheduler.OneCycleLR(optimizer, max_lr=[0.5, 0.25], total_steps=10)
    optimizer.step()
    one_cycle.step()


@pytest.mark.parametrize("field", ["constructor", "group"])
def test_own_lr_of_adamw_follows_the_schedule_in_proportion(cls, field):
    vector, matrix = both()
    other = twin(vector)
    if field == "constructor":
        optimizer = cls([vector, matrix], lr=0.5, adamw={"lr": 0.0625})
    else:
        optimizer = cls([{"params": [vector, matrix], "adamw_lr": 0.0625}], lr=0.5)
    public = torch.optim.AdamW([other], lr=0.0625)
    schedules = [lr_scheduler.LambdaLR(each, lambda t: 0.5**t) for each in (optimizer, public)]
    for seed in range(4):
        assert_vector_is_torchs(optimizer, vector, matrix, public, other, range(seed, seed + 1))
        for schedule in schedules:
            schedule.step()
    # A rate of 0 is one for all.
    optimizer.param_groups[0]["lr"] = 0.0
    before = [param.detach().clone() for param in (vector, matrix)]
    with_grads([vector, matrix])
    optimizer.step()
    assert_same([param.detach() for param in (vector, matrix)], before)


def test_one_tensor_of_lr_is_halved_once(cls):
    """Schedulers change a tensor in place, which two groups would have shared."""
    vector, matrix = both()
    other = twin(vector)
    lr, theirs = torch.tensor(0.5), torch.tensor(0.5)
    optimizer, public = cls([vector, matrix], lr=lr), torch.optim.AdamW([other], lr=theirs)
    schedules = [lr_scheduler.StepLR(each, 1, 0.5) for each in (optimizer, public)]
    for seed in range(3):
        assert_vector_is_torchs(optimizer, vector, matrix, public, other, range(seed, seed + 1))
        for schedule in schedules:
            schedule.step()
    assert lr.item() == 0.0625


def test_zero_redundancy_optimizer(make_few, tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net, plain = model(), model()
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        # The wrapper hands parameters over by their size, on which staggering would depend.
        values = dict(make_few.keywords)
        if make_few is not CONFIGS["muon"]:
            values["stagger"] = False
        sharded = ZeroRedundancyOptimizer(net.parameters(), make_few.func, **values)
        train(net, sharded, batches(3))
        sharded.consolidate_state_dict()
        saved = copy.deepcopy(sharded.state_dict())
        train(net, sharded, batches(2))
        again = copy.deepcopy(plain)
        optimizer = make_few.func(plain.parameters(), **values)
        train(plain, optimizer, batches(3))
        other = ZeroRedundancyOptimizer(again.parameters(), make_few.func, **values)
        other.load_state_dict(saved)
        again.load_state_dict(plain.state_dict())
        train(plain, optimizer, batches(2))
        train(again, other, batches(2))
    finally:
        distributed.destroy_process_group()
    assert_same(list(net.parameters()), list(plain.parameters()))
    assert_same(list(again.parameters()), list(plain.parameters()))


# What is written reaches every tensor.


def test_defaults_that_nobody_wrote_are_torchs(cls):
    vector, matrix = both()
    other = twin(vector)
    optimizer = cls([vector, matrix])
    public = torch.optim.AdamW([other], lr=optimizer.defaults["lr"])
    assert_vector_is_torchs(optimizer, vector, matrix, public, other)


WRITTEN = [
    {"lr": 0.0},
    {"lr": 0.25},
    {"weight_decay": 0.0},
    {"weight_decay": 0.5},
    {"betas": (0.5, 0.75)},
    {"betas": (0.95, 0.95), "weight_decay": 0.1},
    {"maximize": True},
]


@pytest.mark.parametrize("where", ["constructor", "group", "later"])
@pytest.mark.parametrize("values", WRITTEN, ids=str)
def test_written_values_reach_adamw(cls, values, where):
    if cls is sk.optim.Muon and where == "constructor":
        values = {name: value for name, value in values.items() if name != "betas"}
    vector, matrix = both()
    other = twin(vector)
    if where == "constructor":
        optimizer = cls([vector, matrix], **values)
    else:
        given = values if where == "group" else {}
        optimizer = cls([{"params": [vector, matrix], **given}])
    if where == "later":
        # A default counts as written once it is another value.
        values = {name: value for name, value in values.items() if value != (0.95, 0.95)}
        values = {k: v for k, v in values.items() if v != optimizer.defaults.get(k)}
        optimizer.param_groups[0].update(values)
    public = torch.optim.AdamW([other], **{"lr": optimizer.defaults["lr"], **values})
    before = matrix.detach().clone()
    assert_vector_is_torchs(optimizer, vector, matrix, public, other)
    assert torch.equal(matrix, before) == (values.get("lr") == 0.0)


def test_eps_reaches_adamw_where_it_means_the_same():
    for cls, reached in ((sk.optim.SOAP, True), (sk.optim.Muon, False), (sk.optim.DeVA, False)):
        vector, matrix = both()
        other = twin(vector)
        optimizer = cls([vector, matrix], eps=0.25)
        public = torch.optim.AdamW(
            [other], lr=optimizer.defaults["lr"], eps=0.25 if reached else 1e-8
        )
        assert_vector_is_torchs(optimizer, vector, matrix, public, other)
        # A group without a matrix can mean no other.
        alone, other = parameter(5), parameter(5)
        optimizer = cls([{"params": [alone], "eps": 0.25}])
        public = torch.optim.AdamW([other], lr=optimizer.defaults["lr"], eps=0.25)
        assert_vector_is_torchs(optimizer, alone, matrix, public, other)


@pytest.mark.parametrize("cls", [sk.optim.Shampoo, sk.optim.SOAP, sk.optim.DeVA])
def test_each_of_a_pair_of_betas_counts_as_written_for_itself(cls):
    """A cyclic schedule writes the first one."""
    vector, matrix = both()
    other = twin(vector)
    optimizer = cls([vector, matrix])
    group = optimizer.param_groups[0]
    group["betas"] = (0.75, group["betas"][1])
    public = torch.optim.AdamW([other], lr=group["lr"], betas=(0.75, 0.999))
    assert_vector_is_torchs(optimizer, vector, matrix, public, other)


def test_betas_of_distributed_shampoo_are_not_adamws():
    vector, matrix = both()
    other = twin(vector)
    optimizer = sk.optim.Shampoo.like_distributed([vector, matrix], lr=0.25)
    public = torch.optim.AdamW([other], lr=0.25, weight_decay=0.0)
    assert_vector_is_torchs(optimizer, vector, matrix, public, other)


def test_sum_of_adagrad_is_not_adamws():
    vector, matrix = both()
    other = twin(vector)
    optimizer = sk.optim.Shampoo([vector, matrix], betas=(0.5, 1.0))
    public = torch.optim.AdamW([other], lr=1e-3, betas=(0.5, 0.999))
    assert_vector_is_torchs(optimizer, vector, matrix, public, other)


FIELDS = {
    "lr": 0.25,
    "betas": (0.5, 0.75),
    "eps": 0.125,
    "weight_decay": 0.5,
    "amsgrad": True,
    "maximize": True,
}


@pytest.mark.parametrize("algorithm", ["auto", "adamw"])
@pytest.mark.parametrize("where", ["constructor", "group", "later"])
def test_own_fields_of_adamw_win(cls, where, algorithm):
    """Over values of the same group, the group's fields over those of the constructor."""
    vector, matrix = both()
    other = twin(vector)
    plain = {"lr": 0.03125, "weight_decay": 0.0625}
    fields = {f"adamw_{name}": value for name, value in FIELDS.items()}
    groups = [{"params": [vector], "algorithm": algorithm}, {"params": [matrix]}]
    if algorithm == "auto":
        groups = [{"params": [vector, matrix]}]
    if where == "constructor":
        optimizer = cls(groups, **plain, adamw=FIELDS)
    elif where == "group":
        groups[0].update(fields)
        optimizer = cls(groups, **plain, adamw={"lr": 3.0, "betas": (0.1, 0.2)})
    else:
        optimizer = cls(groups, **plain)
        optimizer.param_groups[0].update(fields if algorithm == "auto" else FIELDS)
    public = torch.optim.AdamW([other], **FIELDS)
    assert_vector_is_torchs(optimizer, vector, matrix, public, other)


def test_values_of_a_group_of_vectors_are_its_own(cls):
    """The constructor's `adamw` is for groups that say nothing themselves."""
    vector, matrix = both()
    other = twin(vector)
    optimizer = cls(
        [{"params": [matrix]}, {"params": [vector], "lr": 0.25, "weight_decay": 0.0}],
        adamw={"lr": 0.5, "weight_decay": 0.5, "eps": 0.125},
    )
    public = torch.optim.AdamW([other], lr=0.25, weight_decay=0.0, eps=0.125)
    assert_vector_is_torchs(optimizer, vector, matrix, public, other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adamw_lr": -1.0}, r"param_groups\[0\]: adamw_lr must be in"),
        ({"adamw_betas": (0.9, 1.0)}, r"param_groups\[0\]: adamw_betas\[1\] must be in \[0, 1\)"),
        ({"adamw_eps": "small"}, r"param_groups\[0\]: adamw_eps must be a number"),
        ({"adamw_amsgrad": 1}, r"param_groups\[0\]: adamw_amsgrad must be True or False"),
        ({"lr": "fast", "adamw_lr": 0.5}, r"param_groups\[0\]: lr must be a number"),
    ],
)
@pytest.mark.parametrize("when", ["added", "stepped"])
def test_bad_fields_are_refused(cls, values, message, when):
    vector, matrix = both()
    with_grads([vector, matrix])
    if when == "added":
        with pytest.raises((TypeError, ValueError), match=message):
            cls([{"params": [vector, matrix], **values}])
        return
    optimizer = cls([vector, matrix])
    optimizer.step()
    optimizer.param_groups[0].update(values)
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


# Groups in the manner of other code.


def test_use_muon_says_the_algorithm():
    vector, matrix, table = parameter(7), parameter(4, 6), parameter(5, 3)
    groups = [
        {"params": [matrix], "use_muon": True, "lr": 0.02, "momentum": 0.9},
        {"params": [vector, table], "use_muon": False, "lr": 0.25, "betas": (0.5, 0.75)},
    ]
    optimizer = sk.optim.Muon(groups)
    others = [twin(vector), twin(table)]
    public = torch.optim.AdamW(others, lr=0.25, betas=(0.5, 0.75))
    for seed in range(3):
        with_grads([vector, table, matrix], seed)
        for param, other in zip((vector, table), others, strict=True):
            other.grad = param.grad.clone()
        optimizer.step()
        public.step()
    assert_same([vector, table], others)
    assert "momentum_buffer" in optimizer.state[matrix]
    with pytest.raises(ValueError, match="use_muon=True and algorithm='adamw' contradict"):
        sk.optim.Muon([{"params": [matrix], "use_muon": True, "algorithm": "adamw"}])
    with pytest.raises(TypeError, match="use_muon must be True or False, not 1"):
        sk.optim.Muon([{"params": [matrix], "use_muon": 1}])
    with pytest.raises(ValueError, match="at least two dimensions"):
        sk.optim.Muon([{"params": [vector], "use_muon": True}])
    for cls in (sk.optim.SOAP, sk.optim.Shampoo, sk.optim.DeVA):
        with pytest.raises(ValueError, match="use_muon is a key of Muon's groups"):
            cls([{"params": [matrix], "use_muon": True}])


def test_names_beside_the_parameters(make_few):
    names = ["wte.weight", "w", "b"]
    params = [parameter(5, 4), parameter(4, 6), parameter(6)]
    optimizer = make_few([{"params": params, "param_names": names}])
    assert [optimizer.algorithm_of(param) for param in params] == ["adamw", "matrix", "adamw"]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    with_grads(params)
    params[2].grad = torch.ones(6).to_sparse()
    with pytest.raises(TypeError, match="the gradient of b must be a dense tensor"):
        optimizer.step()
    for wrong in (["a"], ["a", "b", 3], "abc"):
        with pytest.raises(ValueError, match="param_names must be one str for each of 3"):
            make_few([{"params": params, "param_names": wrong}])
    with pytest.raises(ValueError, match="names its parameters twice"):
        make_few([{"params": [("a", params[0])], "param_names": ["a"]}])


def test_names_beside_the_parameters_in_messages_and_checkpoints(make_few):
    names = ["b0", "w", "b1"]
    params = [parameter(6), parameter(4, 6), parameter(4)]
    group = {"params": params, "param_names": names, "nonfinite": "raise", "foreach": None}
    optimizer = make_few([group])
    with_grads(params)
    optimizer.step()
    for name, param in zip(names, params, strict=True):
        with_grads(params)
        param.grad.view(-1)[0] = torch.nan
        with pytest.raises(ValueError, match=f"^{name} has a non-finite gradient"):
            optimizer.step()
    saved = optimizer.state_dict()
    other = make_few([twin(param) for param in params])
    other.load_state_dict(copy.deepcopy(saved))
    assert other.param_groups[0]["param_names"] == names
    saved["param_groups"][0]["param_names"] = names[:2]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="as saved: param_names must be one str for each of 3"):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before)


def test_names_that_an_early_version_left_whole_in_both_halves(cls):
    names = ["b", "w"]
    vector, matrix = both()
    optimizer = cls([{"params": [vector, matrix], "param_names": names}])
    with_grads([vector, matrix])
    optimizer.step()
    adamw = {"lr": 0.1, "betas": (0.5, 0.75), "eps": 0.25, "weight_decay": 0.25}
    saved = halves(optimizer.state_dict(), [False, True], {**adamw, "param_names": names})
    assert saved["param_groups"][0]["param_names"] == names
    other = cls([{"params": list(both()), "param_names": names}])
    other.load_state_dict(saved)
    assert other.param_groups[0]["param_names"] == names


def test_parameters_added_to_and_taken_from_a_group(make_few):
    """Other code changes the list of a group in place."""
    params = [parameter(6), parameter(4, 6)]
    optimizer = make_few(params)
    more = [parameter(5, 3), parameter(3)]
    optimizer.param_groups[0]["params"] += more
    with_grads([*params, *more])
    optimizer.step()
    assert [optimizer.algorithm_of(param) for param in more] == ["matrix", "adamw"]
    assert all(optimizer.state[param] for param in more)


def test_parameters_that_a_wrapper_flattened_are_refused(make_few):
    optimizer = make_few([parameter(6), parameter(4, 6)])
    optimizer.param_groups[0]["params"] = [flat := parameter(30)]
    with_grads([flat])
    before = flat.detach().clone()
    with pytest.raises(TypeError, match="held matrices and has none any more"):
        optimizer.step()
    assert torch.equal(flat, before)


# Checkpoints of every layout.


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("name", FEW)
def test_checkpoints_of_every_layout_load_and_go_on(name, version):
    """Version 1 had a group for each algorithm; up to version 2 blocks were in lists."""
    layouts = golden("layouts")
    found = torch.load(GOLDEN / f"layout_v{version}.pt", weights_only=True)[name]
    params = layouts.parameters()
    optimizer = layouts.MAKE[name]([{"params": group} for group in params])
    with torch.no_grad():
        for group, values in zip(params, split(found["middle"], params), strict=True):
            for param, value in zip(group, values, strict=True):
                param.copy_(value)
    optimizer.load_state_dict(found["saved"])
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 3]
    layouts.advance(params, optimizer, range(3, 6))
    torch.testing.assert_close(layouts.flat(params), found["end"], rtol=0.0, atol=1e-9)


def split(values: list[Tensor], params: list[list[nn.Parameter]]) -> Iterator[list[Tensor]]:
    rest = iter(values)
    for group in params:
        yield [next(rest) for _ in group]


def halves(saved: dict[str, Any], routes: list[bool], values: dict[str, Any]) -> dict[str, Any]:
    """A state dict of one mixed group as version 1 wrote it."""
    (group,) = saved["param_groups"]
    plain = {name: value for name, value in group.items() if not name.startswith("adamw_")}
    del plain["unwritten"]
    members = list(zip(group["params"], routes, strict=True))
    first = {**plain, "algorithm": "matrix", "params": [i for i, matrix in members if matrix]}
    last = {**values, "algorithm": "adamw", "params": [i for i, matrix in members if not matrix]}
    return {"state": saved["state"], "param_groups": [first, last], "state_version": 1}


@pytest.mark.parametrize("initial", [False, True])
def test_rates_of_an_earlier_checkpoint_keep_their_proportion(cls, initial):
    """Saved at a rate of 0, where a warm-up starts, only the first rates tell the proportion."""
    vector, matrix = both()
    optimizer = cls([vector, matrix], lr=0.5)
    with_grads([vector, matrix])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    adamw = {**FIELDS, "lr": 0.125, "eps": 0.25, "weight_decay": 0.25}
    adamw.update(amsgrad=False, maximize=False)
    if initial:
        saved["param_groups"][0].update(lr=0.0, initial_lr=0.5)
        adamw.update(lr=0.0, initial_lr=0.125)
    other = cls([vector, matrix])
    other.load_state_dict(halves(saved, [False, True], adamw))
    other.param_groups[0]["lr"] = 0.25
    current = other._current(0, other.param_groups[0]).adamw
    assert current == {**{k: adamw[k] for k in current if k in adamw}, "lr": 0.0625} | {
        "nonfinite": "skip",
        "capturable": False,
    }
    saved["param_groups"].append({**saved["param_groups"][0], "params": []})
    with pytest.raises(ValueError, match=r"groups of \[2, 0\] parameters, this optimizer of \[2\]"):
        other.load_state_dict(saved)


@pytest.mark.parametrize("kind", ["matrix", "adamw"])
def test_groups_of_one_kind_load_whichever_way_it_was_said(cls, kind):
    params = [parameter(4, 6), parameter(6, 4)] if kind == "matrix" else [parameter(4)]
    values = {"lr": 0.25, "weight_decay": 0.5}
    said = cls([{"params": params, "algorithm": kind, **values}])
    found = cls([{"params": params, **values}])
    for one, other in ((said, found), (found, said)):
        with_grads(params)
        one.step()
        start = [param.detach().clone() for param in params]
        ends = []
        other.load_state_dict(copy.deepcopy(one.state_dict()))
        for each in (one, other):
            for param, value in zip(params, start, strict=True):
                param.data.copy_(value)
            with_grads(params, 1)
            each.step()
            ends.append([param.detach().clone() for param in params])
        assert_same(*ends)


# What groups of torch.optim say beside the values.


@pytest.mark.parametrize(
    "how", [{"foreach": True}, {"fused": True}, {"foreach": False}, {}], ids=str
)
def test_ways_to_compute_adamw_are_honoured(cls, how):
    vector, matrix = both()
    other = twin(vector)
    optimizer = cls([{"params": [vector, matrix], **how}], lr=0.25)
    public = torch.optim.AdamW([other], lr=0.25, **how)
    assert_vector_is_torchs(optimizer, vector, matrix, public, other)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {name: optimizer.param_groups[0][name] for name in how} == how


@pytest.mark.parametrize("when", ["added", "stepped"])
@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"differentiable": True}, ValueError, "differentiable=True is not supported"),
        ({"foreach": True, "fused": True}, ValueError, "foreach and fused cannot be True together"),
        ({"fused": 1}, TypeError, "fused must be True, False or None, not 1"),
    ],
)
def test_ways_to_compute_that_are_not_there_are_refused(cls, values, error, message, when):
    vector, matrix = both()
    with_grads([vector, matrix])
    if when == "added":
        with pytest.raises(error, match=rf"param_groups\[0\]: {message}"):
            cls([{"params": [vector, matrix], **values}])
        return
    optimizer = cls([{"params": [vector, matrix], "capturable": False, "differentiable": None}])
    optimizer.param_groups[0].update(values)
    before = snapshot(optimizer)
    with pytest.raises(error, match=rf"param_groups\[0\]: {message}"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_fused_takes_no_complex_numbers():
    param = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match="is complex, which fused=True cannot take"):
        sk.optim.Muon([{"params": [param], "algorithm": "adamw", "fused": True}])
