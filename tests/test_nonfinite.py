"""Whatever would make a parameter or its state non-finite: one rule for every step and backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from spectral_kernels import _extension, kron_factors_update_
from support.cases import Case, case, later_step, new_step
from support.inputs import gaussian
from support.layouts import same_bits

SHAPES = ((6, 9), (3, 7, 5), (8, 4))

# Variants of every step: with and without a refresh, with and without sides, and its options.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "muon": ("muon_step_", {}),
    "shampoo": ("shampoo_step_", {}),
    "shampoo-between": ("shampoo_step_", {"refresh": [0] * 3}),
    "shampoo-between-none": ("shampoo_step_", {"refresh": [0] * 3, "graft": "none"}),
    "shampoo-left-sgd": (
        "shampoo_step_",
        {"sides": ("left",), "graft": "sgd", "refresh": [0] * 3},
    ),
    "kl": ("shampoo_step_", {"kl": True, "root": 2}),
    "kl-between": ("shampoo_step_", {"kl": True, "root": 2, "refresh": [0] * 3}),
    "soap": ("soap_step_", {}),
    "soap-between": ("soap_step_", {"refresh": [0] * 3}),
    "soap-plain": ("soap_step_", {"sides": (), "refresh": [0] * 3}),
    "soap-permuted": ("soap_step_", {"permute_squares": True, "normalize_grads": True}),
    "deva": ("deva_step_", {}),
    "deva-between": ("deva_step_", {"refresh": [0] * 3}),
    "deva-gradient": ("deva_step_", {"variance": "gradient", "refresh": [0] * 3}),
    "deva-low-memory": ("deva_step_", {"variance": "low_memory", "refresh": [0] * 3}),
    "deva-linf": ("deva_step_", {"norm": "linf", "refresh": [0] * 3}),
    "deva-plain-none": ("deva_step_", {"sides": (), "variance": "none", "refresh": [0] * 3}),
    "deva-public": ("deva_step_", {"reference": True, "eps_mode": "inside"}),
}

NOT_STATE = ("root_failures", "step_counts", "skipped", "lr")


def case_of(variant: str, **changed: Any) -> Case:
    op, options = VARIANTS[variant]
    case = later_step(op, SHAPES, taken=2, per_matrix_counts=True, **options)
    return case.with_(**changed) if changed else case


def written_lists(case: Case) -> list[str]:
    """Lists that hold something that this step writes or builds on."""
    names = [name for name in case.names(write=True) if name not in NOT_STATE]
    return [
        name
        for name in names
        if any(x.numel() for x in case[name])
        and not (name == "exp_avg_sqs" and case.options.get("variance") == "none")
    ]


PLACES = [
    (variant, name) for variant in VARIANTS for name in ("grads", *written_lists(case_of(variant)))
]


def without(case: Case, entry: int, matrix: int) -> Case:
    """The list without one matrix of a batch."""
    kept = [i for i in range(SHAPES[entry][0]) if i != matrix]

    def reduced(value: Any) -> Any:
        if not (isinstance(value, list) and isinstance(value[0], torch.Tensor)):
            return value
        return [
            x[kept].clone() if i == entry and x.numel() and x.ndim else x.clone()
            for i, x in enumerate(value)
        ]

    names = [a.name for a in case.overload()._schema.arguments[: len(case.args)]]
    return case.clone().with_(**{name: reduced(case[name]) for name in names})


def mates(case: Case, kept: list[int]) -> list[torch.Tensor]:
    """Everything that is written, of entry 1 only some matrices."""
    lists = [case[name] for name in case.names(write=True) if name != "skipped"]
    return [
        x[kept] if i == 1 and x.numel() else x for tensors in lists for i, x in enumerate(tensors)
    ]


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("place", PLACES, ids="-".join)
def test_a_nonfinite_element_is_skipped_and_counted(place, value, backend):
    """One element of one matrix: it keeps every bit, is counted, and its mates do not see it."""
    variant, name = place
    case = case_of(variant)
    clean = without(case, 1, 1)
    case[name][1][1].view(-1)[0] = value  # on the diagonal of what is square
    before = case.clone()
    # A new root does not come from the old one, so a refresh can mend that.
    taken = name.endswith("_roots") and int(case.run_reference()["skipped"]) == 0
    case.run()
    assert case["skipped"] == int(not taken)
    if taken:
        assert all(x.isfinite().all() for x in mates(case, [1])[1::3])
    else:
        assert same_bits(mates(case, [1])[1::3], mates(before, [1])[1::3])
    clean.run()
    assert same_bits(mates(case, [0, 2]), mates(clean, [0, 1]))


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("place", PLACES, ids="-".join)
def test_a_nonfinite_element_raises_before_anything_is_written(place, backend):
    """One element of one matrix: it is named, and nothing is written."""
    variant, name = place
    case = case_of(variant, nonfinite="raise")
    case[name][1][1].view(-1)[0] = math.nan
    before = case.clone()
    with pytest.raises(ValueError, match=rf"{name}\[1\].*non-finite"):
        case.run()
    assert same_bits(case.written(), before.written())


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("variant", ["muon", "shampoo-between", "soap-between", "deva-between"])
def test_one_count_of_a_batch_rises_where_any_of_it_moves(variant, backend):
    op, options = VARIANTS[variant]
    case = later_step(op, SHAPES, taken=2, **options)
    case["grads"][1][1, 2, 3] = math.inf
    case["grads"][2][0, 0] = math.nan
    before = [int(count) for count in case["step_counts"]]
    case.run()
    assert case["skipped"] == 2
    assert [int(count) for count in case["step_counts"]] == [
        before[0] + 1,
        before[1] + 1,
        before[2],
    ]


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("name", ["grads", "momentum"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_propagated_elements_reach_the_parameter_at_once(variant, name, backend):
    case = case_of(variant, nonfinite="propagate")
    if name == "momentum":
        name = "momentum_buffers" if "momentum_buffers" in case.names(write=True) else "exp_avgs"
    case[name][1][1].view(-1)[0] = math.nan
    expected = case.run_reference()
    case.run()
    assert case["skipped"] == 0
    for written in ("params", name if name != "grads" else "params"):
        assert torch.equal(case[written][1][1].isnan(), expected[written][1][1].isnan())
    assert case["params"][1][1].isnan().any()
    assert all(x.isfinite().all() for x in (case["params"][0], case["params"][2]))


@pytest.mark.parametrize("variant", ["deva-linf", "deva-plain-none"])
def test_signs_of_nan_are_nan(variant, backend):
    """torch.sign makes 0 of it, and the element would stand still."""
    options = {"norm": "linf", "variance": "none", "sides": (), "refresh": [0]}
    if variant != "deva-linf":
        options = {**options, "norm": "schatten", "sign": True}
    case = later_step("deva_step_", ((5, 7),), **options, nonfinite="propagate")
    case["grads"][0][1, 2] = math.nan
    case.run()
    assert case["params"][0][1, 2].isnan()
    assert case["params"][0].isnan().all() == (variant != "deva-linf")


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("skip_first", [True, False])
def test_first_call_with_nonfinite_state(skip_first, backend):
    for name in ("lefts", "rights", "exp_avgs", "exp_avg_sqs"):
        case = new_step(
            "soap_step_", ((3, 4), (4, 3)), skip_first=skip_first, per_matrix_counts=True
        )
        case[name][0].view(-1)[0] = math.nan
        before = case.clone()
        case.run()
        assert case["skipped"] == 1
        for written in case.names(write=True):
            if written != "skipped":
                assert same_bits(case[written][0], before[written][0]), (name, written)
        assert case["left_bases"][1].any()


STEPPING = ("muon", "shampoo-between", "soap-between", "deva-between", "deva-linf")


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("variant", STEPPING)
def test_a_parameter_that_would_overflow_is_skipped(variant, nonfinite, backend):
    """The largest fp16 number is 65504; a step of 0.1 on 6e4 with decay away from 0 passes it."""
    op, options = VARIANTS[variant]
    case = later_step(
        op,
        ((6, 9), (4, 5)),
        torch.float16,
        taken=2,
        **{**options, "refresh": [0, 0]} if "refresh" in options else {},
    )
    case["params"][0].fill_(6e4)
    case["lr"].fill_(1e6)
    case = case.with_(weight_decay=1.0, nonfinite=nonfinite)
    before = case.clone()
    case.run()
    assert case["skipped"] == 2
    for name in case.names(write=True):
        if name != "skipped":
            assert same_bits(case[name], before[name]), name


def _third_step(variant, dtype):
    op, options = VARIANTS[variant]
    return later_step(op, SHAPES, dtype, taken=2, per_matrix_counts=True, **options)


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", STEPPING)
def test_a_parameter_that_would_overflow_spares_its_mates(variant, dtype, backend):
    case = _third_step(variant, dtype)
    case["params"][0].fill_(torch.finfo(dtype).max)
    case["params"][1][1, 2, 3] = torch.finfo(dtype).max  # one element of one matrix
    case["lr"].fill_(30.0)
    case = case.with_(weight_decay=1.0)  # the old parameter times -29
    before = case.clone()
    clean = case.clone()
    clean["params"][1][1, 2, 3] = 0.0
    case.run()
    clean.run()
    assert case["skipped"] == 2
    for name in case.names(write=True):
        if name == "skipped":
            continue
        assert same_bits(case[name][0], before[name][0]), name
        if case[name][1].numel():
            assert same_bits(case[name][1][1], before[name][1][1]), name
            assert same_bits(case[name][1][[0, 2]], clean[name][1][[0, 2]]), name
        assert same_bits(case[name][2], clean[name][2]), name
    assert not same_bits(case["params"][2], before["params"][2])


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", STEPPING)
def test_a_parameter_at_the_end_of_its_range_moves(variant, dtype, backend):
    """It is looked at before it is written, and then is, with its state."""
    case = _third_step(variant, dtype)
    case = case.with_(weight_decay=0.1)
    usual = case.clone()
    case["params"][0].fill_(torch.finfo(dtype).max)
    case["params"][1][1, 2, 3] = -torch.finfo(dtype).max
    expected = case.run_reference()
    case.run()
    usual.run()
    assert case["skipped"] == 0
    tolerance = {"rtol": 2.0 * torch.finfo(dtype).eps, "atol": 0.0}
    assert torch.allclose(case["params"][0], expected["params"][0], **tolerance)
    assert torch.allclose(case["params"][1][1, 2, 3], expected["params"][1][1, 2, 3], **tolerance)
    for name in case.names(write=True):
        if name not in ("params", "skipped"):
            assert same_bits(case[name], usual[name]), name


SPHERE = {"hyperball": True, "weight_decay": 0.0}
# Options of Muon's step that change what becomes of a parameter, or what is kept with it.
MUON: dict[str, dict[str, Any]] = {
    "standard": {"method": "standard"},
    "gram": {"method": "gram"},
    "16-bit": {"compute_dtype": torch.bfloat16},
    "cautious": {"cautious": True},
    "neurons": {"beta2": 0.9},
    "sphere": SPHERE,
    "sphere-neurons": {"beta2": 0.9, **SPHERE},
    "narrow": {},
}


def _muon(option: str, value: float, lr: float, decay: float) -> tuple[Case, Case]:
    """Parameters of one value in two of five matrices, in the middle of a run; and usual ones."""
    options = MUON[option]
    usual = later_step(
        "muon_step_", SHAPES, torch.float16, taken=2, per_matrix_counts=True, **options
    )
    if option == "narrow":
        usual = usual.with_(momentum_buffers=[x.bfloat16() for x in usual["momentum_buffers"]])
    usual["lr"].fill_(lr)
    usual = usual.with_(weight_decay=0.0 if "hyperball" in options else decay)
    case = usual.clone()
    case["params"][0].fill_(value)
    case["params"][1][1].fill_(value)
    return case, usual


@pytest.mark.parametrize("option", MUON)
def test_muon_writes_nothing_of_what_would_overflow(option, backend):
    case, usual = _muon(option, 6e4, lr=30.0, decay=1.0)
    before = case.clone()
    case.run()
    usual.run()
    assert case["skipped"] == 2
    for name in case.names(write=True):
        if name == "skipped" or not case[name][0].numel():
            continue
        assert same_bits(case[name][0], before[name][0]), name
        assert same_bits(case[name][1][1], before[name][1][1]), name
        assert same_bits(case[name][1][[0, 2]], usual[name][1][[0, 2]]), name
        assert same_bits(case[name][2], usual[name][2]), name
    assert not same_bits(case["params"][2], before["params"][2])


@pytest.mark.parametrize("option", MUON)
def test_muon_writes_all_of_what_nearly_overflows(option, backend):
    case, usual = _muon(option, 4.5e4, lr=0.1, decay=0.1)
    expected = case.run_reference()
    case.run()
    usual.run()
    assert case["skipped"] == 0
    for i in range(len(SHAPES)):
        assert torch.allclose(case["params"][i], expected["params"][i], rtol=2e-3, atol=2e-2)
    for name in case.names(write=True):
        if name not in ("params", "skipped"):
            assert same_bits(case[name], usual[name]), name


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_spheres_of_every_size(scale, backend):
    """Squares of their parameters have no place in float32."""
    case = later_step("muon_step_", ((6, 9), (9, 5)), taken=1, lr=0.1, **SPHERE)
    lengths = []
    for w in case["params"]:
        w.mul_(scale)
        lengths.append(torch.linalg.matrix_norm(w.double()))
    expected = case.run_reference()
    case.run()
    assert case["skipped"] == 0
    for w, other, length in zip(case["params"], expected["params"], lengths, strict=True):
        assert abs(torch.linalg.matrix_norm(w.double()) / length - 1.0) < 1e-6
        assert torch.allclose(w / scale, other / scale, rtol=1e-3, atol=1e-4)


@pytest.mark.in_full("cuda")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["left", "right", "left_root", "right_root"])
def test_factors_with_a_nonfinite_element_keep_every_bit(side, value, backend):
    def factor(n):
        x = gaussian(3, n, 2 * n)
        return x @ x.mT

    tensors = {"left": factor(4), "right": factor(5)}
    tensors |= {"left_root": factor(4), "right_root": factor(5)}
    tensors[side][1, 3, 2] = value
    before = {name: x.clone() for name, x in tensors.items()}
    skipped = torch.zeros((), dtype=torch.int64)
    kron_factors_update_(
        tensors["left"],
        tensors["right"],
        gaussian(3, 4, 5),
        0.9,
        left_root=tensors["left_root"],
        right_root=tensors["right_root"],
        skipped=skipped,
    )
    assert skipped == 1
    for name in ("left", "right"):
        assert same_bits(tensors[name][1], before[name][1])
        assert not torch.equal(tensors[name][0], before[name][0])
        assert tensors[name][[0, 2]].isfinite().all()


# What the CPU kernels do when memory runs out.


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("variant", [*VARIANTS, "soap-first", "deva-first"])
def test_memory_that_runs_out_leaves_a_list_as_it_was(variant, threads):
    if variant.endswith("-first"):
        case = new_step(variant.replace("-first", "_step_"), SHAPES)
    else:
        case = case_of(variant)
    check_every_failure(case, threads)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("roots", [False, True])
def test_memory_that_runs_out_leaves_factors_as_they_were(roots):
    label = "kron_factors_update_" + ("-batch-kl" if roots else "")
    check_every_failure(case(label), 2)


def check_every_failure(case: Case, threads: int) -> None:
    """Fails the first, second, ... request for memory, until the call needs no more."""
    module = _extension.MODULE
    torch.set_num_threads(threads)
    expected = case.clone()
    expected.run("cpu")
    for granted in range(100):
        tried = case.clone()
        module.release_workspace()
        module.fail_workspace(granted)
        try:
            tried.run("cpu")
            failed = False
        except (MemoryError, RuntimeError) as error:
            failed = True
            assert "alloc" in str(error) or isinstance(error, MemoryError)
        finally:
            left = module.fail_workspace(-1)
        if not failed:  # a product without a buffer of its own takes the stack
            assert same_bits(tried.written(), expected.written())
            if left >= 0:
                break
            continue
        assert same_bits(tried.written(), case.written()), f"request {granted}"
        tried.run("cpu")
        assert same_bits(tried.written(), expected.written())
    assert 1 <= granted < 99
