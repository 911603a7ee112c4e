"""Lists of Triton's steps that come again: what is kept of them, and what is looked at anew."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import weakref

import pytest
import torch
from support.cases import later_step, new_step, next_step
from support.inputs import MUON, gaussian
from support.layouts import same_bits

pytestmark = [pytest.mark.triton, pytest.mark.kernel]

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

SHAPES = ((6, 9), (2, 5, 3))
FEW = {"rows": MUON[:2], "restarts": [(1,), ()]}


@pytest.fixture
def known():
    """What is kept of Muon's lists, empty at first."""
    from spectral_kernels.triton_kernels import _muon_lists

    _muon_lists._KNOWN.cache_clear()
    yield _muon_lists._KNOWN
    _muon_lists._KNOWN.cache_clear()


def assert_like_new(case, known):
    """The step has the bits that it has where nothing is kept."""
    other = case.clone()
    case.run("triton")
    known.cache_clear()
    other.run("triton")
    assert same_bits(case.written(), other.written())


def test_a_list_is_known_by_what_it_holds(known):
    """The lists stay the same objects, and other tensors come into them."""
    case = later_step("muon_step_", SHAPES, taken=1, **FEW)
    case.run("triton")
    assert len(known._known) == 1
    for name in ("params", "grads", "momentum_buffers"):
        case[name][0] = case[name][0].mT.contiguous().mT
        case[name][1] = gaussian(4, 5, 3, seed=6)[1:3]
    assert_like_new(case, known)
    for name in ("params", "grads"):
        case[name][0] = case[name][0].bfloat16()
    case["step_counts"][1] = torch.zeros(2)
    assert_like_new(case, known)
    for name in ("params", "grads", "momentum_buffers"):
        case[name][0] = gaussian(4, 7, seed=6)
    assert_like_new(case, known)


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": [(2.0, -1.5, 0.5)] * 2},
        {"scales": [2.0, 0.5]},
        {"restarts": [(), (1,)]},
        {"method": "gram"},
        {"momentum": 0.3, "weight_decay": 0.7, "cautious": True},
        {"nonfinite": "propagate"},
        {"maximize": True, "nesterov": False},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_other_options_are_seen(changed, known):
    case = later_step("muon_step_", SHAPES, taken=1, **FEW)
    case.run("triton")
    assert_like_new(next_step(case.with_(**changed), seed=7), known)


def test_other_learning_rates_are_seen(known):
    case = later_step("muon_step_", SHAPES, taken=1, **FEW)
    case.run("triton")
    assert_like_new(case.with_(lr=torch.tensor(0.01, dtype=torch.float64)), known)
    for wrong in (torch.tensor(-1.0), torch.tensor(torch.nan), torch.zeros(2)):
        with pytest.raises(ValueError, match="lr must be"):
            case.with_(lr=wrong).run("triton")


def test_what_is_bad_is_refused_after_a_good_step(known):
    case = later_step("muon_step_", SHAPES, taken=1, **FEW)
    case.run("triton")
    before = [x.clone() for x in case.written()]
    params, grads = case["params"], case["grads"]
    one, first = params[1], grads[0]
    for name, i, wrong, message in (
        ("params", 1, first, "params"),
        ("grads", 0, torch.zeros(6, 8), r"grads\[0\]"),
        ("grads", 1, one, "overlap in memory"),
        ("momentum_buffers", 0, first, "overlap in memory"),
        ("momentum_buffers", 1, torch.zeros(1).expand(2, 5, 3), "momentum_buffers"),
        ("step_counts", 0, torch.zeros((), dtype=torch.int32), r"step_counts\[0\]"),
        ("step_counts", 1, torch.zeros(1).expand(2), r"step_counts\[1\]"),
    ):
        right = case[name][i]
        case[name][i] = wrong
        with pytest.raises((TypeError, ValueError), match=message):
            case.run("triton")
        case[name][i] = right
    with pytest.raises(ValueError, match="momentum must be"):
        case.with_(momentum=1.0).run("triton")
    with pytest.raises(ValueError, match="norm_factor must be"):
        case.with_(norm_factor=-1.0).run("triton")
    assert same_bits(case.written(), before)


def test_gradients_that_interleave_are_taken(known):
    """Slices of one tensor do not overlap, although one begins before the other ends."""
    both = gaussian(6, 18)
    case = new_step("muon_step_", ((6, 9), (6, 9)))
    case.run("triton")
    case["grads"][:] = [both[:, :9], both[:, 9:]]
    assert_like_new(case, known)
    assert_like_new(case, known)


def test_numbers_that_are_not_finite_are_seen(known):
    case = later_step("muon_step_", SHAPES, taken=1, nonfinite="raise", **FEW)
    case.run("triton")
    case["grads"][1][0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"grads\[1\]"):
        case.run("triton")


def test_no_tensor_is_kept_and_nothing_grows(known, monkeypatch):
    from spectral_kernels.triton_kernels import _known
    from spectral_kernels.triton_kernels._addresses import Addresses

    monkeypatch.setattr(_known, "_MOST_LISTS", 3)
    monkeypatch.setattr(_known, "_MOST_ADDRESSES", 5)
    case = new_step("muon_step_", ((3, 5), (5, 3)))
    for seed in range(3):
        # One is held, so that others have its place no more.
        case, held = next_step(case, seed), case
        case.run("triton")
    assert len(known._known) == 1
    gone = [weakref.ref(x) for x in (*case.tensors(), *held.tensors())]
    del case, held
    assert not [x for x in gone if x() is not None]
    for i in range(4):
        new_step("muon_step_", ((2, 2),), scales=[1.0 + i]).run("triton")
    assert len(known._known) == 3
    entry = next(reversed(known._known.values()))
    for i in range(10):
        begins = [2**20 * i, 2**20 * i + 2**10, 2**20 * i + 2**12, 0, 0, 0]
        assert entry.are_apart(Addresses(begins))
    assert len(entry._apart) == 5


class TestCounters:
    def run(self, case):
        expected = case.run_reference()
        case.run("triton")
        for name in ("step_counts", "skipped"):
            assert same_bits([*_listed(case[name])], [*_listed(expected[name])])

    @pytest.mark.parametrize("most", [None, 40])
    def test_counts_of_every_kind(self, most, known, monkeypatch):
        """In several groups, which cut a batch, of several dtypes, and one for several entries."""
        from spectral_kernels.triton_kernels import _groups

        case = new_step("muon_step_", ((5, 3, 5), (4, 6), (5, 3, 5), (6, 4), (3, 5)))
        shared = torch.tensor(7, dtype=torch.int64)
        counts = case["step_counts"]
        counts[0] = torch.tensor([1.0, 0.0, 3.0, 0.0, 5.0, 0.0, 7.0, 0.0, 9.0])[::2]
        counts[1], counts[4] = shared, shared
        counts[2] = torch.tensor(2.0, dtype=torch.float64)
        if most is not None:
            monkeypatch.setattr(_groups, "GROUP_ELEMENTS", most)
        case["grads"][0][3, 0, 0] = torch.nan
        case["grads"][2][1, 1, 1] = torch.inf
        case["grads"][3][0, 0] = torch.nan
        case.run("triton")
        assert counts[0].tolist() == [2.0, 4.0, 6.0, 7.0, 10.0]
        assert [float(x) for x in counts[1:]] == [9.0, 3.0, 0.0, 9.0]
        assert case["skipped"] == 3

    def test_everything_counts_where_all_goes_through(self, known):
        case = new_step("muon_step_", ((3, 4), (2, 2, 3)), nonfinite="propagate")
        case["grads"][0][0, 0] = torch.nan
        self.run(case)

    def test_entries_without_elements_count_no_step(self, known):
        self.run(new_step("muon_step_", ((0, 4), (3, 4), (2, 0))))
        self.run(new_step("muon_step_", ((0, 4),)))

    def test_more_matrices_than_a_program_sees_at_once(self, known, monkeypatch):
        from spectral_kernels.triton_kernels import _counters

        monkeypatch.setattr(_counters, "_BLOCK", 2)
        case = new_step("muon_step_", ((5, 2, 2), (1, 3)))
        case["grads"][0][:4] = torch.nan
        self.run(case)
        assert case["skipped"] == 4 and case["step_counts"][0] == 1

    def test_steps_of_narrow_momentum_are_those_of_their_matrices(self, known, monkeypatch):
        from spectral_kernels.triton_kernels import _groups

        monkeypatch.setattr(_groups, "GROUP_ELEMENTS", 40)
        case = later_step("muon_step_", ((3, 4, 5), (4, 5), (5, 4)), taken=1)
        for i, x in enumerate(case["momentum_buffers"]):
            case["momentum_buffers"][i] = x.bfloat16()
        case["step_counts"][0] = torch.tensor([4.0, 0.0, 7.0])
        case["step_counts"][1] = torch.tensor(2, dtype=torch.int64)
        expected = case.run_reference()
        case.run("triton")
        assert same_bits(case["momentum_buffers"], expected["momentum_buffers"])


def _listed(x):
    return [x] if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("op", ["shampoo_step_", "soap_step_", "deva_step_"])
def test_lists_with_factors_are_looked_up_and_checked(op):
    module = importlib.import_module("spectral_kernels.triton_kernels").operator(op).__module__
    known = importlib.import_module(module)._KNOWN
    known.cache_clear()
    case = later_step(op, ((6, 9), (4, 5)), taken=1, refresh=[0, 0])
    case.run("triton")
    (stacks,) = [entry.found for entry in known._known.values()]
    next_step(case, seed=3).run("triton")
    ((again,),) = [[entry.found] for entry in known._known.values()]
    assert again is stacks and len(known._known) == 1
    assert_like_new(next_step(case.with_(refresh=[0, 1]), seed=7), known)
    assert_like_new(next_step(case.with_(nonfinite="propagate", weight_decay=0.3), seed=7), known)
    case.run("triton")
    before = case.clone()
    wrong = case.with_(lefts=[case["lefts"][0], torch.zeros(5, 5)])
    with pytest.raises(ValueError, match=r"lefts\[1\]"):
        wrong.run("triton")
    wrong = case.with_(rights=[case["rights"][0], case["grads"][1].new_zeros(5, 5)[:, :4]])
    with pytest.raises(ValueError, match=r"rights\[1\]"):
        wrong.run("triton")
    with pytest.raises(ValueError, match="refresh has 1"):
        case.with_(refresh=[0]).run("triton")
    beside = torch.empty(2, 6, 9)
    beside.copy_(case["params"][0])
    overlapping = case.with_(
        params=[beside[0], case["params"][1]],
        grads=[beside.view(-1)[27:81].view(6, 9), case["grads"][1]],
    )
    kept = beside.clone()
    with pytest.raises(ValueError, match="overlap in memory"):
        overlapping.run("triton")
    assert same_bits(beside, kept) and same_bits(case.written(), before.written())
    known.cache_clear()


class TestMatricesWithFactors:
    """Which of them share launches is no matter of what stands beside them."""

    SHAPES = ((3, 6, 9), (9, 6), (20, 30), (6, 9))

    @pytest.fixture(params=["shampoo_step_", "soap_step_", "deva_step_"])
    def op(self, request):
        return request.param

    @pytest.fixture
    def known(self, op):
        """What is kept of the lists of a step, empty at first."""
        from spectral_kernels import triton_kernels

        known = sys.modules[triton_kernels.operator(op).__module__]._KNOWN
        known.cache_clear()
        yield known
        known.cache_clear()

    @pytest.fixture
    def groups(self, known, monkeypatch):
        """How many matrices each group has that was worked on."""
        from spectral_kernels.triton_kernels import _fused

        found = []
        made = _fused.Fused.__init__

        def noted(self, group, *args):
            found.append(len(group.numbers))
            made(self, group, *args)

        monkeypatch.setattr(_fused.Fused, "__init__", noted)
        return found

    def test_groups_of_bounded_size_change_no_bit(self, op, known, groups, monkeypatch):
        from spectral_kernels.triton_kernels import _factor_lists

        count = len(self.SHAPES)
        together = later_step(op, self.SHAPES, refresh=[0] * count)
        together["grads"][0][2] = torch.nan
        apart = together.clone()
        together.run("triton")
        assert groups == [6]
        known.cache_clear()
        monkeypatch.setattr(_factor_lists, "FUSED_ELEMENTS", 2 * 4 * 64 * 64)
        apart.run("triton")
        assert groups == [6, 2, 2, 2]
        assert same_bits(apart.written(), together.written())

    def test_what_is_refreshed_beside_it_changes_no_bit_of_a_matrix(self, op, groups):
        count = len(self.SHAPES)
        case = later_step(op, self.SHAPES, refresh=[0] * count)
        other = case.clone().with_(refresh=[0, 1, 0, 1])
        case.run("triton")
        other.run("triton")
        assert groups == [6, 4]
        for name in case.names(write=True)[:-1]:
            for i in (0, 2):
                assert same_bits(case[name][i], other[name][i])

    @pytest.mark.parametrize("op", ["soap_step_", "deva_step_"])
    def test_what_begins_beside_it_changes_no_bit_of_a_matrix(self, op, groups):
        case = later_step(op, ((3, 6, 9),), refresh=[0])
        other = case.clone()
        for name in ("left_bases", "right_bases"):
            other[name][0][1] = 0.0
        case.run("triton")
        other.run("triton")
        assert groups == [3, 2]
        for name in ("params", "exp_avgs", "exp_avg_sqs", "lefts", "rights", "left_bases"):
            for i in (0, 2):
                assert same_bits(case[name][0][i], other[name][0][i])
        assert other["left_bases"][0][1].any()
        assert same_bits(case["step_counts"], other["step_counts"])

    @pytest.mark.parametrize("op", ["soap_step_", "deva_step_"])
    def test_bases_are_looked_at_until_none_begins(self, op, groups):
        """And again when other tensors take their places."""
        from spectral_kernels.triton_kernels import _device

        case = later_step(op, ((6, 9), (5, 5), (0, 4)), refresh=[0, 0, 0])
        waits = []
        for seed in range(4):
            if seed == 2:
                case["left_bases"][1] = torch.zeros_like(case["left_bases"][1])
                case["right_bases"][1] = torch.zeros_like(case["right_bases"][1])
            before = _device.reads()
            case = next_step(case, seed)
            case.run("triton")
            waits.append(_device.reads() - before)
        assert waits == [1, 0, 1, 1]
        assert case["left_bases"][1].any() and groups == [2, 2, 1, 2]

    def test_other_tensors_and_options_are_seen(self, op, known, groups):
        """Nothing that was found for a list serves another."""
        case = later_step(op, self.SHAPES, refresh=[0] * len(self.SHAPES))

        def assert_like_new(case):
            other = case.clone()
            case.run("triton")
            known.cache_clear()
            other.run("triton")
            assert same_bits(case.written(), other.written())

        case.run("triton")
        # Another gradient at another address, layout and dtype; then a parameter of another shape.
        case["grads"][1] = case["grads"][1].mT.contiguous().mT
        case["grads"][3] = gaussian(7, 9, seed=3)[1:]
        assert_like_new(case)
        case["grads"][0] = case["grads"][0].bfloat16()
        case["step_counts"][0] = torch.full((3,), 2.0)
        assert_like_new(case)
        assert_like_new(case.with_(maximize=True, weight_decay=0.3, beta1=0.5))
        for name in (*case.names(write=True)[:-1], "grads"):
            del case[name][0]
        shorter = {
            name: list(case.options[name])[1:]
            for name in ("refresh", "scales")
            if name in case.options
        }
        assert_like_new(case.with_(**shorter))
        assert groups[:3] == [6, 6, 6] and groups[-1] == 3
