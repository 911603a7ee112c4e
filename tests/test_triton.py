"""Triton kernels by themselves: schedules, groups, launches, configurations, resources.

The operators are tested with all other backends, by the parameter "triton" of their own tests.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cases import STEPS, later_step, new_step, schemas
from support.inputs import MUON, gaussian, integers, semidefinite
from support.layouts import same_bits

pytestmark = [pytest.mark.triton, pytest.mark.kernel]

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)


@pytest.fixture
def room():
    """The package; imported late, since Triton decides then whether it interprets."""
    from spectral_kernels import triton_kernels
    from spectral_kernels.triton_kernels import _batch, _config, _device, _layout, newton_schulz

    triton_kernels.batch, triton_kernels.config = _batch, _config
    triton_kernels.device, triton_kernels.layout = _device, _layout
    triton_kernels.newton_schulz = newton_schulz
    return triton_kernels


@pytest.mark.parametrize("shape", [(70, 30, 130), (5, 200, 3), (64, 64, 64), (1, 1, 1)], ids=str)
def test_products_of_any_shape_are_exact_on_integers(shape, room):
    p, k, q = shape
    a, b = integers(2, p, k), integers(2, k, q, seed=1)
    assert torch.equal(room.batch.product(a, b), a @ b)
    assert torch.equal(room.batch.product(a.mT.contiguous().mT, b), a @ b)


def test_a_triangle_has_no_program_too_many(room):
    layout = room.layout.layout_of(((200, 70), (64, 300), (10, 10)), (64, 64), torch.device("cpu"))
    short = layout.triangle(room.layout.SHORT, 64)
    # 70 takes two tiles, 64 and 10 take one.
    assert len(short) == 3 + 1 + 1 and (short[:, 1] >= short[:, 2]).all()
    assert len(layout.triangle(room.layout.LONG, 64)) == 10 + 15 + 1
    assert len(layout.tiles(64)) == 2 * 4 + 5 + 1
    assert len({tuple(tile) for tile in short.tolist()}) == len(short)


def test_offsets_are_64_bit(room):
    shapes = ((40000, 60000),) * 2
    layout = room.layout.layout_of(shapes, (64, 64), torch.device("cpu"))
    assert layout.table[1, 5] > 2**31 and layout.table.dtype == torch.int64


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 3, 20), (2**31 + 64, 20, 1)),
        ((3, 20), (2**30 + 64, 1)),
        ((20, 3), (1, 2**30 + 64)),
    ],
)
def test_elements_beyond_2_31_are_found(shape, strides):
    """The memory between them is never touched, so that there need not be so much."""
    import spectral_kernels as sk

    values = integers(*shape)
    apart = torch.empty_strided(shape, strides, dtype=torch.bfloat16).copy_(values)
    assert apart.stride() == strides
    assert torch.equal(sk.gram(apart, backend="triton").float(), values @ values.mT)


def test_a_group_takes_its_launches_whatever_the_shapes(room):
    """One group of the 16-bit small form: two passes, the input, and one launch an orientation.

    One more looks at parameters that may leave their range, one writes the momenta of those, and
    one counts.
    """

    def launched(shapes):
        case = new_step("muon_step_", shapes, torch.bfloat16, compute_dtype=torch.bfloat16)
        case.options["restarts"] = [(2,)] * len(shapes)
        before = room.device.launches()
        case.run("triton")
        return room.device.launches() - before

    assert launched(((20, 48), (24, 80), (2, 30, 64))) == 7
    assert launched(((20, 48), (24, 80), (80, 24))) <= 8


def test_launches_of_the_standard_form(room):
    case = new_step(
        "muon_step_", ((80, 96), (96, 112)), method="standard", compute_dtype=torch.bfloat16
    )
    before = room.device.launches()
    case.run("triton")
    # Three launches read the input, a step takes three, one looks at what may leave its range, one
    # writes the momenta of that, and one counts.
    assert room.device.launches() - before == 3 + 3 * len(MUON) + 3


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_neighbours_and_their_shapes_do_not_change_a_bit(method):
    shapes = ((80, 100), (12, 30), (100, 80), (70, 66))
    together = new_step("muon_step_", shapes, method=method)
    apart = together.clone()
    together.run("triton")
    for i in range(len(shapes)):
        one = apart.with_(
            **{name: [apart[name][i]] for name in (*apart.names(write=True)[:-1], "grads")},
            scales=[apart.options["scales"][i]],
            restarts=list(apart.options["restarts"])[i : i + 1],
        )
        one.run("triton")
        assert same_bits(one["params"][0], together["params"][i])


@pytest.mark.parametrize("op", ["shampoo_step_", "soap_step_", "deva_step_"])
def test_stacks_of_bounded_size_change_no_bit(op, monkeypatch):
    """Entries one by one, and a batch whose matrices count for themselves in parts of two."""
    from spectral_kernels import triton_kernels
    from spectral_kernels.triton_kernels import _list_step

    shapes = ((3, 6, 9), (6, 9), (6, 9))
    # One that has no kernel of its own.
    kl = {"kl": True, "root": 2, "graft": "none"}
    options = kl if op == "shampoo_step_" else {"normalize_grads": True}
    together = later_step(op, shapes, per_matrix_counts=True, refresh=[0, 0, 0], **options)
    together["grads"][0][2] = torch.nan
    apart = together.clone()
    together.run("triton")
    known = sys.modules[triton_kernels.operator(op).__module__]._KNOWN
    known.cache_clear()
    monkeypatch.setattr(_list_step, "STACK_ELEMENTS", 2 * (6 * 9 * 2 + 6 * 6 + 9 * 9))
    made = []
    stack = _list_step.Stack.__init__

    def noted(self, pieces, params):
        made.append([piece.end - piece.begin for piece in pieces])
        stack(self, pieces, params)

    monkeypatch.setattr(_list_step.Stack, "__init__", noted)
    apart.run("triton")
    known.cache_clear()
    assert same_bits(apart.written(), together.written())
    assert made == [[2], [1, 1], [1]]


def test_tiles_that_are_no_squares_change_no_bit(room, monkeypatch, request):
    """They serve matrices whose longer sides are whole ones, and nothing takes them by itself."""
    from spectral_kernels.triton_kernels import _groups, _matmul, _muon_lists

    assert not [x for table in room.config.TABLE.values() for x in table.values() if x.across]
    case = new_step(
        "muon_step_", ((70, 250), (250, 70), (70, 180)), method="gram", compute_dtype=torch.bfloat16
    )
    square = case.clone().run("triton")
    taken = []

    def launch(kernel, programs, *args, **options):
        if kernel.__name__ == "_wide_kernel":
            taken.append((options["ACROSS"], programs))
        room.device.launch(kernel, programs, *args, **options)

    monkeypatch.setattr(_matmul, "launch", launch)
    wide = replace(room.config.TABLE["interpreter"][2, False], across=128)
    monkeypatch.setitem(room.config.TABLE["interpreter"], (2, False), wide)
    for forget in (_groups.plan_of.cache_clear, _muon_lists._KNOWN.cache_clear):
        forget()
        request.addfinalizer(forget)
    assert same_bits(case.run("triton"), square)
    # Every matrix is two tiles high; one of them is three squares wide.
    assert {(128, 4), (64, 6)} <= set(taken)


def test_roots_in_a_batch_have_the_bits_of_roots_alone():
    from spectral_kernels.triton_kernels.inverse_root import roots_of

    # The ridge is absolute, so that the larger matrix has the longer spectrum, and more rows.
    a = torch.stack([10.0**k * semidefinite(9, 10.0**k, k) for k in (0, 3)]).float()
    together = roots_of(a, 2, ridge=1e-3, relative_ridge=0.0)
    for i in range(len(a)):
        alone = roots_of(a[i : i + 1], 2, ridge=1e-3, relative_ridge=0.0)
        assert same_bits(alone.root[0], together.root[i])
    assert len(set(together.steps.tolist())) > 1


def test_energies_are_sums_of_squares():
    from spectral_kernels.triton_kernels.deva import energies

    x = integers(2, 19, 150)
    for rows, axis in ((True, 2), (False, 1)):
        assert torch.equal(energies(x, rows=rows), x.double().square().sum(axis))


class TestTables:
    """What CUDA graphs read stays what and where it was when they were recorded."""

    @pytest.fixture
    def tables(self, room, monkeypatch):
        state = {"capturing": False, "stream": 0}
        monkeypatch.setattr(room.layout, "is_capturing", lambda: state["capturing"])
        monkeypatch.setattr(room.layout, "_stream", lambda: state["stream"])
        monkeypatch.setattr(room.layout, "_held", [])
        made = []

        @room.layout.kept(2)
        def table(number):
            made.append(torch.tensor([number]))
            return made[-1]

        return table, state, made

    def test_tables_are_made_once_a_stream(self, tables):
        table, state, made = tables
        assert table(1) is table(1)
        state["stream"] = 7
        other = table(1)
        assert other is not made[0] and other is table(1)
        state["stream"] = 0
        assert table(1) is made[0]

    def test_tables_of_streams_that_come_and_go_are_dropped(self, tables):
        table, state, made = tables
        for stream in range(50):
            state["stream"] = stream
            last = table(1)
        first = weakref.ref(made[0])
        assert len(made) == 50
        made.clear()
        assert first() is None and table(1) is last

    def test_a_graph_keeps_what_it_reads(self, tables):
        table, state, made = tables
        table(1)
        state["capturing"] = True
        read = weakref.ref(table(1))
        state["capturing"] = False
        for number in (2, 3, 4):
            table(number)  # the least recently used ones go
        made.clear()
        assert read() is not None
        assert table(1) is not read()

    def test_what_a_graph_uploads_is_for_itself(self, tables):
        table, state, made = tables
        state.update(capturing=True, stream=3)
        recorded = weakref.ref(table(1))
        assert table(1) is not recorded()  # it may be another graph that is recorded now
        state["capturing"] = False
        assert table(1) is not recorded()
        made.clear()
        assert recorded() is not None

    def test_the_host_keeps_what_every_replay_copies(self, room, tables, monkeypatch):
        _, state, _ = tables
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x.clone())
        held = room.layout._held
        room.layout.upload(torch.ones(3), torch.device("meta"))
        assert not held
        state["capturing"] = True
        result = room.layout.upload(torch.ones(3), torch.device("meta"))
        ((source, copied),) = held
        assert copied is result and torch.equal(source, torch.ones(3))

    def test_every_function_that_uploads_is_one_of_these(self, room):
        others = []
        for path in Path(room.__file__).parent.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.FunctionDef) or node.name == "upload":
                    continue
                calls = [ast.unparse(x.func) for x in ast.walk(node) if isinstance(x, ast.Call)]
                decorators = [ast.unparse(x) for x in node.decorator_list]
                if "upload" in calls and not any(x.startswith("kept(") for x in decorators):
                    others.append(node.name)
        assert not others


@pytest.mark.parametrize("exponent", [-140, -126, 0, 120])
def test_exponents_of_every_scale(exponent):
    from spectral_kernels.triton_kernels._layout import layout_of
    from spectral_kernels.triton_kernels._pack import Mix, summarize
    from spectral_kernels.triton_kernels._places import matrices_of, places_of

    x = torch.tensor([[1.0, -3.0], [0.5, 0.0]]) * 2.0**exponent
    layout = layout_of(((2, 2),), (64, 64), x.device)
    found = summarize(Mix(places_of(matrices_of(x), x.dtype, x.device)), layout)
    assert int(found.exponent) == exponent + 1
    assert float(found.largest) == 3.0 * 2.0**exponent


def test_a_forced_backend_is_counted(room):
    import spectral_kernels as sk

    sk.call_counts(reset=True)
    sk.gram(gaussian(3, 4), backend="triton")
    assert sk.call_counts(reset=True) == {"gram/triton": 1}


def test_float64_is_refused_with_a_reason():
    import spectral_kernels as sk

    with pytest.raises(RuntimeError, match="float32 at most"):
        sk.gram(gaussian(3, 4, dtype=torch.float64), backend="triton")


def test_bad_lists_raise_before_anything_is_written():
    case = later_step("muon_step_", ((4, 6), (5, 5)), taken=1)
    wrong = case.with_(momentum_buffers=[case["momentum_buffers"][0], torch.zeros(5, 6)])
    before = [x.clone() for x in wrong.written()]
    with pytest.raises(ValueError, match=r"momentum_buffers\[1\]"):
        wrong.run("triton")
    assert same_bits(before, wrong.written())


LISTS = [
    (op, argument.name)
    for op in STEPS
    for argument in schemas()[op].arguments
    if "Tensor" in str(argument.type)
]


@pytest.mark.parametrize(("op", "name"), LISTS, ids="-".join)
def test_a_tensor_on_another_device_is_refused_before_anything_is_written(op, name):
    case = later_step(op, ((4, 6), (5, 5)), taken=1)
    value = case[name]
    moved = [value[0], value[1].to("meta")] if isinstance(value, list) else value.to("meta")
    wrong = case.with_(**{name: moved})
    before = [x.clone() for x in wrong.written() if not x.is_meta]
    place = rf"{name}\[1\]" if isinstance(value, list) else name
    with pytest.raises(ValueError, match=rf"{place} is on meta"):
        step = importlib.import_module("spectral_kernels.triton_kernels").operator(op)
        step(*wrong.args, **wrong.options)
    assert same_bits(before, [x for x in wrong.written() if not x.is_meta])


@pytest.mark.parametrize("name", ["left", "right", "left_root", "right_root", "skipped"])
def test_factors_on_another_device_are_refused(name, room):
    absent = torch.empty(0)
    given = {"left": semidefinite(4, 3.0).float(), "right": semidefinite(6, 3.0).float()}
    given["skipped"] = torch.zeros((), dtype=torch.int64)
    roots = {"left_root": absent, "right_root": absent}
    if name in roots:
        roots[name] = torch.eye(4 if name == "left_root" else 6, device="meta")
    else:
        given[name] = given[name].to("meta")
    before = {key: x.clone() for key, x in given.items()}
    update = room.operator("kron_factors_update_")
    with pytest.raises(ValueError, match=f"{name} is on meta"):
        update(
            given["left"],
            given["right"],
            gaussian(4, 6),
            given["skipped"],
            beta=0.5,
            weight=0.5,
            **roots,
        )
    assert all(x.is_meta or torch.equal(x, before[key]) for key, x in given.items())


class TestTuning:
    def test_candidates_are_checked_before_they_are_timed(self, room, monkeypatch):
        import triton_tune as tune

        good, odd, wrong = (room.config.Config(64, depth, 4, 1) for depth in (64, 48, 32))
        ours = tune._OPERATORS["gram"][0]
        table = room.config.TABLE["interpreter"]

        def gram(x):
            return ours(x) * (1.0 if table[4, False] is not wrong else 1.001)

        monkeypatch.setitem(tune._OPERATORS, "gram", (gram, tune._OPERATORS["gram"][1]))
        kept = dict(table)
        trials = tune.tried(gaussian(10, 20), [odd, wrong, good], rounds=1)
        assert [trial.failure is None for trial in trials] == [False, False, True]
        assert "gram errs by 1.0e-03" in trials[1].failure
        assert tune.best(trials).config is good
        assert table == kept

    def test_what_is_timed_on_a_card_is_a_graph(self, monkeypatch):
        """A call of the function itself would time the launches from Python."""
        import triton_tune as tune

        done = []

        class Graph:
            def replay(self):
                done.append("replay")

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        tune._time(lambda: done.append("call"), 3, on_card=True)
        assert done == ["call", "replay", "replay", "replay"]

    def test_no_step_is_tuned(self):
        import triton_tune as tune

        assert not [name for name in tune._OPERATORS if name.endswith("_")]

    def test_nothing_counts_where_everything_fails(self, room):
        import triton_tune as tune

        failed = tune.Trial(room.config.Config(64, 64, 4, 1), "it spills", None)
        assert tune.best([failed]) is None


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_products_compile_for_every_target(target):
    """The large 16-bit product: matrix instructions, no spills, within the shared memory."""
    code = (
        "import torch\n"
        "import triton_resources as r, triton_workload as w\n"
        "w._SHORT_SIDES, w._DTYPES = (700,), (torch.bfloat16,)\n"
        "call = next(w.calls())\n"
        f"recorder = r.record({target!r}, call)\n"
        f"lines = [r.compile_line({target!r}, *x) for x in recorder.calls.values()]\n"
        "assert any(x.matrix_instructions for x in lines), lines\n"
        "assert not [x for x in lines if x.failure], [x.failure for x in lines]\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent / "tools",
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
