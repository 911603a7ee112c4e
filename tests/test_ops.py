"""What every operator promises to torch: schemas, fakes, compile, autograd, autocast, modes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest
import spectral_kernels as sk
import torch
from spectral_kernels import _dispatch, _fake
from support.cases import STEPS, case, cases, every_case, labels, new_step, schemas
from support.formats import FLOATS, named
from support.inputs import gaussian, orthogonal, semidefinite
from support.layouts import bits, same_bits
from torch.utils._pytree import tree_leaves, tree_map

FUNCTIONS = [label for label in labels() if not label.split("-")[0].endswith("_")]
WRITERS = [label for label in labels() if label not in FUNCTIONS]


def registered() -> list[str]:
    """Every operator in torch.ops.spectral_kernels."""
    names = torch._C._dispatch_get_all_op_names()
    found = (re.fullmatch(r"spectral_kernels::(\w+)(\.\w+)?", name) for name in names)
    return sorted({match[1] for match in found if match})


@pytest.mark.usefixtures("native")
def test_every_operator_is_known_everywhere():
    operators = set(registered())
    assert operators == set(_dispatch.OPERATORS) == set(_fake.FAKES)
    assert operators == {label.partition("-")[0] for label in labels()}
    assert all(callable(getattr(sk, name)) for name in operators)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", sorted(_dispatch.OPERATORS))
def test_schema_says_what_is_written(name):
    schema = getattr(torch.ops.spectral_kernels, name).default._schema
    writes = [bool(a.alias_info and a.alias_info.is_write) for a in schema.arguments]
    assert any(writes) == name.endswith("_") == schema.is_mutable
    # Only tensors and scalars that are data are positional.
    options = [a for a in schema.arguments if a.kwarg_only]
    assert all("Tensor" not in str(a.type) or a.name.endswith("_root") for a in options)


@pytest.mark.usefixtures("native")
def test_cases_read_the_schemas_without_the_compiled_part():
    """Kernels in Triton are tested on a machine that could not compile the rest."""
    assert set(schemas()) == set(_dispatch.OPERATORS)
    for name, schema in schemas().items():
        assert str(schema) == str(getattr(torch.ops.spectral_kernels, name).default._schema)


# A step takes a second or two to check, and its schema and fake know no dtype.
CHECKED = [
    (label, dtype)
    for label, dtype in every_case()
    if dtype == torch.float32 or not label.startswith(STEPS)
]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("label", "dtype"), CHECKED, ids=named)
def test_opcheck(label, dtype):
    one = case(label, dtype)
    args, options = one.flat()
    torch.library.opcheck(one.overload(), args, options)


@pytest.mark.parametrize(("label", "dtype"), every_case(), ids=named)
def test_F31_inputs_are_not_changed(label, dtype, backend):
    one = case(label, dtype)
    before = [(x, bits(x), x.data_ptr(), x.stride()) for x in one.read()]
    one.run(backend.name)
    for x, old, address, strides in before:
        assert torch.equal(bits(x), old)
        assert (x.data_ptr(), x.stride()) == (address, strides)


@pytest.mark.parametrize(("label", "dtype"), every_case(), ids=named)
def test_results_share_no_memory_with_the_arguments(label, dtype, backend):
    one = case(label, dtype)
    storages = {x.untyped_storage().data_ptr() for x in one.tensors()}
    results = one.run(backend.name)
    returned = results[: len(results) - len(one.written())]
    own = [x.untyped_storage().data_ptr() for x in returned if x.numel()]
    assert not storages & set(own) and len(set(own)) == len(own)


@contextlib.contextmanager
def nan_in_new_tensors() -> Iterator[None]:
    """torch.empty gives NaN, in C++ too."""
    old = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = old


@pytest.mark.parametrize(("label", "dtype"), every_case(), ids=named)
def test_every_element_is_written(label, dtype, backend):
    expected = case(label, dtype).run(backend.name)
    with nan_in_new_tensors():
        assert torch.empty(3).isnan().all()
        assert same_bits(case(label, dtype).run(backend.name), expected)


@pytest.mark.parametrize("label", labels())
def test_F10_autocast_changes_nothing(label, backend):
    expected = case(label).run(backend.name)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(case(label).run(backend.name), expected)


@pytest.mark.parametrize("label", labels())
@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad], ids=["inference", "no_grad"]
)
def test_grad_modes(mode, label, backend):
    expected = case(label).run(backend.name)
    with mode():
        assert same_bits(case(label).clone().run(backend.name), expected)


@pytest.mark.parametrize("label", labels())
def test_inference_tensors(label, backend):
    expected = case(label).run(backend.name)
    with torch.inference_mode():
        one = case(label).clone()
        assert all(x.is_inference() for x in one.tensors())
        assert same_bits(one.run(backend.name), expected)


@contextlib.contextmanager
def flags_unchanged() -> Iterator[None]:
    """No global state of torch's is touched."""

    def flags() -> dict[str, object]:
        return {
            "threads": torch.get_num_threads(),
            "grad": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "dtype": torch.get_default_dtype(),
            "matmul": torch.get_float32_matmul_precision(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "mkldnn": torch.backends.mkldnn.flags,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "random": bits(torch.get_rng_state().float()).tolist(),
            "subnormals": torch.tensor(2.0**-140).mul(1.0).item(),
        }

    before = flags()
    yield
    assert flags() == before


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("label", labels())
def test_F11_global_flags(label, precision, backend):
    expected = case(label).run(backend.name)
    old = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with flags_unchanged():
            ours = case(label).run(backend.name)
    finally:
        torch.set_float32_matmul_precision(old)
    # Nor does one matter (except to torch's own products, of which the specification is made).
    assert backend.name == "reference" or same_bits(ours, expected)


# Autograd.


def call(label: str, *, requires_grad: bool) -> object:
    """The public function of a case without derivative."""
    x, square = gaussian(4, 6), semidefinite(5, 10.0).float()
    inputs = {
        "kron_precondition": (x, gaussian(4, 4), gaussian(6, 6)),
        "inverse_root": (square,),
        "eigenbasis": (square,),
        "refresh_eigenbasis": (orthogonal(5).float(), square),
    }.get(label, (x,))
    inputs = tuple(t.requires_grad_(requires_grad) for t in inputs)
    extra = (4,) if label == "inverse_root" else ()
    return getattr(sk, label)(*inputs, *extra)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", sorted(n for n in _dispatch.OPERATORS if not n.endswith("_")))
def test_functions_refuse_inputs_that_require_grad(name):
    with pytest.raises(RuntimeError, match=r"no derivative.*requires grad.*detach"):
        call(name, requires_grad=True)
    with torch.no_grad():
        result = call(name, requires_grad=True)
    assert same_bits(result, call(name, requires_grad=False))


@pytest.mark.parametrize("op", STEPS)
def test_steps_of_parameters_write_no_graph(op, backend):
    one = new_step(op, ((4, 6), (5, 5)))
    expected = one.clone().run(backend.name)
    params = [torch.nn.Parameter(p) for p in one["params"]]
    with torch.no_grad():
        ours = one.with_(params=params).run(backend.name)
    assert all(p.grad_fn is None and p.is_leaf for p in params)
    assert same_bits([x.detach() for x in ours], expected)


# torch.compile.


def compiled_functions() -> dict[str, object]:
    square = torch.stack([semidefinite(5, 10.0, seed) for seed in (1, 2)]).float()
    q = torch.stack([orthogonal(5, seed) for seed in (1, 2)]).float()
    x = gaussian(2, 5, 7)
    return {
        **{name: (getattr(sk, name), (x,)) for name in FUNCTIONS if "-" not in name},
        "newton_schulz-rows": (
            lambda x: sk.newton_schulz(x, coefficients=[(2.0, -1.5, 0.5)] * 3),
            (x,),
        ),
        "newton_schulz-computed": (
            lambda x: sk.newton_schulz(x, coefficients="polar_express(1e-3, 6)"),
            (x,),
        ),
        "kron_precondition": (sk.kron_precondition, (x, square, None)),
        "kron_factors_update_": (
            lambda a, x: sk.kron_factors_update_(a, None, x, 0.9),
            (square, x),
        ),
        "inverse_root": (
            lambda a: sk.inverse_root(a, 4, relative_ridge=1e-3, return_info=True),
            (square,),
        ),
        "eigenbasis": (sk.eigenbasis, (square,)),
        "refresh_eigenbasis": (sk.refresh_eigenbasis, (q, square)),
        **{op: (step_function(op), step_lists(op)) for op in STEPS},
    }


def step_lists(op: str) -> tuple[list[torch.Tensor], ...]:
    one = new_step(op, ((4, 6), (5, 5)))
    left_out = ("step_counts", "root_failures", "second_moments")
    names = [
        name for name in ("params", "grads", *one.names(write=True)[1:-1]) if name not in left_out
    ]
    return tuple(one[name] for name in names)


def step_function(op: str) -> object:
    function = getattr(sk, op)
    if op == "soap_step_":
        return lambda *lists: function(*lists, lr=0.1, skip_first=False)
    return lambda *lists: function(*lists, lr=0.1)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", compiled_functions())
def test_compiles_without_a_graph_break(name):
    function, args = compiled_functions()[name]

    def copied() -> tuple[object, ...]:
        return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, args)

    torch._dynamo.reset()
    ours, theirs = copied(), copied()
    result = torch.compile(function, fullgraph=True, backend="aot_eager")(*ours)
    assert same_bits((result, ours), (function(*theirs), theirs))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_with_inductor(dynamic):
    def update(grad, factor):
        factor = factor.clone()
        sk.kron_factors_update_(factor, None, 2.0 * grad, 0.9)
        root = sk.inverse_root(factor, 4, relative_ridge=1e-3)
        return sk.newton_schulz(sk.kron_precondition(grad, root, None) + 1.0) * 0.5

    torch._dynamo.reset()
    compiled = torch.compile(update, fullgraph=True, dynamic=dynamic)
    for n in (6, 9):
        grad, factor = gaussian(n, 8), torch.eye(n)
        torch.testing.assert_close(
            compiled(grad, factor), update(grad, factor), rtol=1e-4, atol=1e-4
        )


@pytest.mark.usefixtures("native")
def test_changed_scalars_do_not_recompile():
    """F51: lr is a tensor."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(params, grads, buffers, lr):
        sk.muon_step_(params, grads, buffers, lr=lr)

    lists = step_lists("muon_step_")
    for t in range(4):
        step(*lists, torch.tensor(0.1 / (t + 1)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# What has no business here.


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("label", labels())
def test_meta_tensors_give_shapes(label):
    one = case(label)
    args, options = one.flat()
    expected = one.overload()(*args, **options)
    meta = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, (args, options))
    found = one.overload()(*meta[0], **meta[1])
    for x, y in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if isinstance(y, torch.Tensor):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


BAD = {
    "int64": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "complex64": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "vector": lambda x: x.flatten(),
    "scalar": lambda x: x.sum(),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", sorted(_dispatch.OPERATORS))
def test_F30_other_tensors_are_refused_before_any_write(name, kind, backend):
    label = next(label for label in labels() if label.partition("-")[0] == name)
    one = case(label)
    arguments = one.names(write=False) + one.names(write=True)
    target = "grads" if "grads" in arguments else "grad" if "grad" in arguments else arguments[0]
    bad = BAD[kind](gaussian(6, 6))
    value = one[target]
    one = one.with_(**{target: [*value[:-1], bad] if isinstance(value, list) else bad})
    before = [bits(x) for x in one.written()]
    # torch itself refuses a layout without a kernel by NotImplementedError.
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        one.run(backend.name)
    assert all(torch.equal(bits(x), old) for x, old in zip(one.written(), before, strict=True))


@pytest.mark.parametrize("op", STEPS)
@pytest.mark.parametrize("name", ["params", "state"])
def test_F27_written_tensors_need_their_own_elements(op, name, backend):
    one = new_step(op, ((4, 4), (5, 5)))
    name = one.names(write=True)[0 if name == "params" else 1]
    one[name][1] = torch.zeros(1, 5).expand(5, 5)
    before = [bits(x) for x in one.written()]
    with pytest.raises(ValueError, match="in place"):
        one.run(backend.name)
    assert all(torch.equal(bits(x), old) for x, old in zip(one.written(), before, strict=True))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("op", STEPS)
def test_a_tensor_cannot_be_written_twice(op):
    for change in ("same entry twice", "grad is param", "state is param", "overlapping views"):
        one = new_step(op, ((5, 5), (5, 5)))
        state = one.names(write=True)[1]
        if change == "same entry twice":
            one["params"][1] = one["params"][0]
        elif change == "grad is param":
            one["grads"][0] = one["params"][0]
        elif change == "state is param":
            one[state][0] = one["params"][0]
        else:
            wide = torch.zeros(6, 5)
            one["params"][0], one["params"][1] = wide[:5], wide[1:]
        before = [bits(x) for x in one.written()]
        with pytest.raises((ValueError, RuntimeError), match="twice|same|overlap"):
            one.run("cpu")
        assert all(torch.equal(bits(x), old) for x, old in zip(one.written(), before, strict=True))


@pytest.mark.parametrize("op", STEPS)
def test_F36_the_last_bad_entry_leaves_the_first_untouched(op, backend):
    for position in range(3):
        for change in ("shape", "dtype", "nonfinite", "list"):
            one = new_step(op, ((4, 4), (5, 5), (6, 6)))
            if change == "shape":
                one["grads"][position] = gaussian(3, 4)
            elif change == "dtype":
                # No state is kept in half precision.
                size = 4 + position
                one[one.names(write=True)[1]][position] = gaussian(size, size).half()
            elif change == "nonfinite":
                one["grads"][position][0, 0] = torch.inf
                one.options["nonfinite"] = "raise"
            else:
                one["grads"].pop()
            before = [bits(x) for x in one.written()]
            with pytest.raises((TypeError, ValueError)):
                one.run(backend.name)
            written = one.written()
            assert all(torch.equal(bits(x), old) for x, old in zip(written, before, strict=True))


def test_every_dtype_has_cases():
    assert all(dict(cases(dtype)) for dtype in FLOATS)
    assert set(WRITERS) | set(FUNCTIONS) == set(labels())
