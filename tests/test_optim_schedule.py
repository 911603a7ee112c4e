"""Refreshes over the steps, and roots that fail."""

from __future__ import annotations

import contextlib
import pickle
import warnings

import pytest
import spectral_kernels as sk
import torch
from support.optimizers import batches, model, parameter, train, with_grads
from support.states import assert_same, snapshot, tensors

pytestmark = pytest.mark.usefixtures("one_thread")


# Schedules and failures.


def test_F17_steps_are_counted_once(make):
    net = model()
    optimizer = make(net.parameters())
    for count in range(1, 4):
        train(net, optimizer, batches(1))
        idle = optimizer.param_groups[0].get("skip_first") or optimizer.param_groups[0].get(
            "reference"
        )
        for group in optimizer.param_groups:
            for param in group["params"]:
                matrix = optimizer.algorithm_of(param) == "matrix"
                expected = count - (1 if idle and matrix else 0)
                assert set(optimizer.state[param]["step"].flatten().tolist()) == {float(expected)}


def test_F54_roots_are_spread_over_the_steps():
    """Ten matrices at frequency 5: all at the first step, then two a step."""
    params = [parameter(3, 4, seed=i) for i in range(10)]
    optimizer = sk.optim.Shampoo(params, precondition_frequency=5)
    optimizer.init_state()
    before = [optimizer.state[p]["left_root"]["0"].clone() for p in params]
    refreshed = []
    for seed in range(11):
        with_grads(params, seed)
        optimizer.step()
        roots = [optimizer.state[p]["left_root"]["0"].clone() for p in params]
        refreshed.append(
            {i for i, (a, b) in enumerate(zip(before, roots, strict=True)) if not torch.equal(a, b)}
        )
        before = roots
    assert refreshed[0] == set(range(10))
    assert all(len(each) == 2 for each in refreshed[1:])
    assert set().union(*refreshed[1:6]) == set(range(10))


def test_refresh_together_without_stagger():
    params = [parameter(3, 4, seed=i) for i in range(3)]
    optimizer = sk.optim.SOAP(params, precondition_frequency=2, skip_first=False)
    changed = []
    for seed in range(6):
        with_grads(params, seed)
        before = [optimizer.state[p].get("left_basis", torch.zeros(3, 3)).clone() for p in params]
        optimizer.step()
        after = [optimizer.state[p]["left_basis"] for p in params]
        changed.append({not torch.equal(a, b) for a, b in zip(before, after, strict=True)})
    assert changed == [{True}, {True}, {False}, {True}, {False}, {True}]


def test_F08_roots_that_keep_failing_stop_the_run_at_the_next_step():
    params = [("good", parameter(4, 5)), ("bad", parameter(4, 5, seed=1))]
    optimizer = sk.optim.Shampoo(
        params, precondition_frequency=1, root_method="eigen", max_root_failures=2, betas=(0.9, 0.5)
    )
    bad = params[1][1]
    with_grads([param for _, param in params])
    optimizer.step()
    state = optimizer.state[bad]
    root = state["left_root"]["0"].clone()
    for seed in range(1, 4):
        # A factor that is far from semidefinite has no root.
        state["left"]["0"].copy_(-1e6 * torch.eye(4))
        with_grads([param for _, param in params], seed)
        optimizer.step()
        assert state["root_failures"]["0"].tolist() == [seed, 0]
        assert torch.equal(state["left_root"]["0"], root)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="3 inverse roots of bad in a row .*max_root_failures=2"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_F08_a_root_that_succeeds_ends_the_row_of_failures():
    param = parameter(4, 5)
    optimizer = sk.optim.Shampoo(
        [param], precondition_frequency=1, root_method="eigen", max_root_failures=1
    )
    for seed in range(8):
        with_grads([param], seed)
        if seed % 2:
            optimizer.state[param]["left"]["0"].copy_(-1e6 * torch.eye(4))
        elif seed:
            optimizer.state[param]["left"]["0"].copy_(torch.eye(4))
        optimizer.step()
        assert optimizer.state[param]["root_failures"]["0"].tolist() == [seed % 2, 0]


@contextlib.contextmanager
def without_eigensolver():
    """On the specification, whose solver can be made to fail."""

    def fails(*args, **options):
        raise torch.linalg.LinAlgError("no convergence")

    with sk.use_backend("reference"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", fails)
        yield


# No ridge, so that there is no other way to take the root.
HARD = {"root_method": "eigen", "relative_ridge": 0.0, "precondition_frequency": 10}


@pytest.mark.parametrize("options", [{}, {"kl": True}, {"kl": True, "kl_order": "simultaneous"}])
@pytest.mark.parametrize("device_memo", [False, True])
def test_F08_a_failed_first_root_is_tried_again_at_the_next_step(options, device_memo, monkeypatch):
    param = parameter(5, 4)
    optimizer = sk.optim.Shampoo([("bad", param)], **HARD, **options)
    optimizer.init_state()
    state = optimizer.state[param]
    if device_memo:  # what the next step is told without waiting for a device
        known = optimizer._known_failures
        monkeypatch.setattr(optimizer, "_has_failed", lambda x: known.get(id(x), (x, False))[1])
    with_grads([param])
    with without_eigensolver(), pytest.warns(RuntimeWarning, match="of bad failed at step 1") as w:
        optimizer.step()
    assert all("residual of" in str(warning.message) for warning in w)
    assert state["root_failures"]["0"].tolist() == [1, 1] and optimizer.failed_roots == 2
    if not options:
        assert torch.equal(state["left_root"]["0"], torch.eye(5))
    roots = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in (1, 2, 3):
            with_grads([param], seed)
            with sk.use_backend("reference"):
                optimizer.step()
            roots.append(state["left_root"]["0"].clone())
            assert state["root_failures"]["0"].tolist() == [0, 0]
    assert not torch.equal(roots[0], torch.eye(5)) and torch.equal(roots[1], roots[2])
    assert options or torch.equal(roots[0], roots[1])  # taken at the second step, and not again
    assert optimizer.failed_roots == 2
    assert pickle.loads(pickle.dumps(optimizer)).failed_roots == 2


def test_F08_failed_roots_are_warned_of_once_and_counted():
    params = [parameter(4, 5, seed=seed) for seed in range(3)]
    optimizer = sk.optim.Shampoo(params, **HARD, max_root_failures=5)
    optimizer.watch()
    caught = []
    for seed in range(3):
        with_grads(params, seed)
        with without_eigensolver(), warnings.catch_warnings(record=True) as new:
            warnings.simplefilter("always")
            optimizer.step()
        caught += new
    assert len(caught) == 2  # both sides of the first
    report = optimizer.diagnostics()
    assert report.failed_roots == optimizer.failed_roots == 18
    assert dict(report.scalars())["failed_roots"] == 18.0
    assert {figures.root_failures for figures in report.parameters.values()} == {3}


def test_F08_a_resumed_run_tries_a_failed_root_again():
    param = parameter(4, 5)
    optimizer = sk.optim.Shampoo([param], **HARD)
    with_grads([param])
    with without_eigensolver(), pytest.warns(RuntimeWarning, match="failed at step 1"):
        optimizer.step()
    resumed = sk.optim.Shampoo([param], **HARD)
    resumed.load_state_dict(optimizer.state_dict())
    with_grads([param], 1)
    resumed.step()
    assert resumed.state[param]["root_failures"]["0"].tolist() == [0, 0]
    assert not torch.equal(resumed.state[param]["left_root"]["0"], torch.eye(4))


def test_F08_with_a_ridge_the_iteration_takes_what_the_eigensolver_cannot():
    params = [parameter(6, 5), parameter(6, 5)]
    with torch.no_grad():
        params[1].copy_(params[0])
    failing, right = (
        sk.optim.Shampoo([param], **{**HARD, "relative_ridge": 1e-4}) for param in params
    )
    with_grads(params[:1])
    params[1].grad = params[0].grad.clone()
    with without_eigensolver():
        failing.step()
    with sk.use_backend("reference"):
        right.step()
    assert failing.failed_roots == 0
    for side in ("left_root", "right_root"):
        ours, exact = (o.state[p][side]["0"] for o, p in zip((failing, right), params, strict=True))
        assert float((ours - exact).norm() / exact.norm()) < 1e-3


def test_every_matrix_goes_through_the_kernel(make_few):
    """F49: a counter, not a changed parameter, proves what ran."""
    net = model()
    optimizer = make_few(net.parameters())
    sk.call_counts(reset=True)
    with sk.use_backend("reference"):
        train(net, optimizer, batches(3))
    assert sk.call_counts() == {f"{optimizer._operator}/reference": 3}


def test_state_is_finite_on_rank_deficient_gradients(make):
    param = parameter(8, 6)
    optimizer = make([param])
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        param.grad = torch.outer(
            torch.randn(8, generator=generator), torch.randn(6, generator=generator)
        )
        optimizer.step()
    assert param.isfinite().all()
    assert all(x.isfinite().all() for x in tensors(optimizer.state_dict()["state"]))


def test_compiled_training_step(make_few):
    """A compiled forward and backward, and a step called from a compiled function."""
    net, plain = model(), model()
    optimizers = make_few(net.parameters()), make_few(plain.parameters())

    @torch.compile(backend="eager")
    def step():
        optimizers[0].step()

    for seed in range(3):
        with_grads(net.parameters(), seed)
        with_grads(plain.parameters(), seed)
        step()
        optimizers[1].step()
    assert_same(list(net.parameters()), list(plain.parameters()))
