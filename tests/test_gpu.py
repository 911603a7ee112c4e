"""Every operator on a card: all backends against the specification, graphs, determinism."""

from __future__ import annotations

import pytest
import spectral_kernels as sk
import torch
from spectral_kernels import _cuda, _extension
from support.cases import STEPS, Case, case, every_case, labels, new_step
from support.formats import FLOATS, named
from support.inputs import MUON, gaussian
from support.layouts import same_bits
from support.optimizers import CONFIGS, FEW
from support.oracles import exact_newton_schulz, plain_newton_schulz
from support.rule import error
from torch import Tensor
from torch.utils._pytree import tree_map

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no card")

CARDS = ("triton", "cuda")


def on_card(one: Case) -> Case:
    """Copies on the card, in their own layouts; the learning rate stays where it is."""

    def moved(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
        return y.copy_(x)

    return Case(one.op, tree_map(moved, one.args), tree_map(moved, one.options))


def run_on(one: Case, backend: str) -> list[Tensor]:
    if sk.explain(one.op, *one.tensors(), backend=backend).backend is None:
        pytest.skip(str(sk.explain(one.op, *one.tensors(), backend=backend)))
    return on_card(one).run(backend)


@pytest.mark.parametrize("backend", CARDS)
@pytest.mark.parametrize(("label", "dtype"), every_case(), ids=named)
def test_agrees_with_the_specification(label, dtype, backend):
    one = case(label, dtype)
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("the Triton kernels compute in float32 at most")
    ours = [x.cpu() for x in run_on(one, backend)]
    expected = case(label, dtype).to(torch.float64).run("reference")
    plain = one.run("reference")
    for x, y, z in zip(ours, expected, plain, strict=True):
        if x.is_floating_point() and x.ndim >= 2 and x.numel():
            allowed = 4.0 * error(z, y) + 50.0 * torch.finfo(x.dtype).eps
            assert error(x, y) <= allowed, (error(x, y), error(z, y))


def needs(backend: str, op: str, x: Tensor) -> None:
    explanation = sk.explain(op, x, backend=backend)
    if explanation.backend is None:
        pytest.skip(str(explanation))


@pytest.fixture(params=["mma.sync", "wgmma"])
def products(request):
    """What the large products of the CUDA C++ kernels run on."""
    module = _extension.MODULE
    if request.param == "wgmma":
        if _cuda.unavailable() is not None or torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("the CUDA C++ kernels were not built, or the card is no sm_90")
        module.cuda_prefer_wgmma(True)
    yield request.param
    if request.param == "wgmma":
        module.cuda_prefer_wgmma(False)


@pytest.mark.parametrize("dtype", FLOATS[2:], ids=named)
@pytest.mark.parametrize("shape", [(200, 300), (700, 900), (3, 257, 1000), (2048, 2048)])
def test_large_products_of_cuda_obey_the_error_rule(shape, dtype, products):
    x = gaussian(*shape, dtype=dtype)
    needs("cuda", "newton_schulz", x.cuda())
    ours = sk.newton_schulz(x.cuda(), method="standard", backend="cuda")
    assert same_bits(sk.newton_schulz(x.cuda(), method="standard", backend="cuda"), ours)
    expected = sk.newton_schulz(x.cuda().double(), method="standard", backend="reference").cpu()
    theirs = error(plain_newton_schulz(x.cuda(), MUON).cpu(), expected)
    assert error(ours.cpu(), expected) <= 2.0 * theirs + 4.0 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=named)
@pytest.mark.parametrize("shape", [(200, 300), (150, 900), (24, 256, 1536), (12, 768, 768)])
def test_one_launch_for_all_products_has_the_bits_of_many(shape, dtype):
    x = gaussian(*shape, dtype=dtype).cuda()
    needs("cuda", "newton_schulz", x)
    prefer = _extension.MODULE.cuda_prefer_queue
    try:
        prefer(False)
        expected = sk.newton_schulz(x, backend="cuda")
        prefer(True)
        for _ in range(20):
            assert same_bits(sk.newton_schulz(x, backend="cuda"), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = sk.newton_schulz(x, backend="cuda")
        for _ in range(3):
            result.zero_()
            graph.replay()
            assert same_bits(result, expected)
    finally:
        prefer(None)


@pytest.mark.parametrize("dtype", FLOATS[2:], ids=named)
@pytest.mark.parametrize("shape", [(200, 320), (2048, 2048), (3, 257, 1000), (768, 4096)])
def test_large_gram_of_cuda_obeys_the_error_rule(shape, dtype, products):
    x = gaussian(*shape, dtype=dtype).cuda()
    needs("cuda", "gram", x)
    ours = sk.gram(x, backend="cuda")
    assert same_bits(ours, ours.mT.contiguous())
    assert same_bits(sk.gram(x, backend="cuda"), ours)
    expected = x.double() @ x.double().mT
    theirs = error((x @ x.mT).cpu(), expected.cpu())
    assert error(ours.cpu(), expected.cpu()) <= 2.0 * theirs + torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", CARDS)
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=named)
@pytest.mark.parametrize("shape", [(33, 20), (16, 512), (200, 300), (700, 900), (2, 128, 512)])
def test_newton_schulz_obeys_the_error_rule(shape, dtype, backend):
    x = gaussian(*shape, dtype=dtype)
    needs(backend, "newton_schulz", x.cuda())
    ours = sk.newton_schulz(x.cuda(), backend=backend).cpu()
    exact = exact_newton_schulz(x, MUON)
    theirs = error(plain_newton_schulz(x.cuda(), MUON).cpu(), exact)
    assert error(ours, exact) <= 2.0 * theirs + 4.0 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", CARDS)
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=named)
@pytest.mark.parametrize("shape", [(33, 20), (200, 300), (3, 257, 100), (1030, 4100)])
def test_factors_and_two_sided_products_obey_the_error_rule(shape, dtype, backend):
    g = gaussian(*shape, dtype=dtype).cuda()
    needs(backend, "kron_precondition", g)
    *batch, m, n = shape
    left, right = (gaussian(*batch, k, k, seed=k).cuda() for k in (m, n))
    ours = sk.kron_precondition(g, left, right, backend=backend)
    exact = left.double() @ g.double() @ right.double()
    theirs = error((left @ g.float() @ right).to(dtype).cpu(), exact.cpu())
    assert error(ours.cpu(), exact.cpu()) <= 2.0 * theirs + 2.0 * torch.finfo(dtype).eps
    for factor, x, sides in ((left, g, (left, None)), (right, g.mT, (None, right))):
        wide, old = x.double(), factor.tril() + factor.tril(-1).mT
        exact = 0.9 * old.double() + 0.1 * wide @ wide.mT
        theirs = error((0.9 * old + 0.1 * x.float() @ x.float().mT).cpu(), exact.cpu())
        sk.kron_factors_update_(*sides, g, 0.9, weight=0.1, backend=backend)
        assert error(factor.cpu(), exact.cpu()) <= 2.0 * theirs + 1e-6
        assert same_bits(factor, factor.mT.contiguous())


@pytest.mark.parametrize("backend", CARDS)
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=named)
def test_same_bits_alone_in_a_batch_and_again(dtype, backend):
    for shape in ((16, 300), (60, 60), (90, 200), (600, 640), (100, 6000)):
        x = gaussian(5, *shape, dtype=dtype).cuda()
        needs(backend, "newton_schulz", x)
        together = sk.newton_schulz(x, backend=backend)
        assert same_bits(sk.newton_schulz(x, backend=backend), together)
        assert same_bits(sk.newton_schulz(x[3], backend=backend), together[3])


@pytest.mark.parametrize("backend", CARDS)
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=named)
def test_gram_is_exactly_symmetric_and_exact_on_integers(dtype, backend):
    for shape in ((5, 7), (130, 70), (3, 257, 1000), (700, 64)):
        x = torch.randint(-2, 3, shape).to("cuda", dtype)
        needs(backend, "gram", x)
        product = sk.gram(x, backend=backend)
        assert same_bits(product, product.mT.contiguous())
        assert torch.equal(product.double(), (x.double() @ x.double().mT).to(dtype).double())


@pytest.mark.parametrize("op", STEPS)
def test_a_replayed_graph_is_the_eager_step(op):
    options = {} if op == "muon_step_" else {"refresh": [0, 0]}
    shapes = ((40, 60), (2, 90, 70))
    start = on_card(new_step(op, shapes, **options))
    start.with_(**({} if op == "muon_step_" else {"refresh": [1, 1]})).run("triton")
    eager, captured = start.clone(), start.clone()
    for _ in range(3):
        eager.run("triton")
    for _ in range(1):
        captured.run("triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.run("triton")
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert same_bits(eager.written(), captured.written())


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("name", FEW)
def test_a_recorded_step_of_an_optimizer_is_the_eager_one(name, nonfinite):
    """Biases, which go to AdamW, the learning rate and the step counts among it."""
    options = {} if name == "muon" else {"precondition_frequency": 100, "stagger": False}
    results = []
    for recording in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, device="cuda")) for s in ((40, 60), (90,))]
        for param in params:
            param.grad = torch.randn_like(param)
        lr = torch.tensor(0.1, device="cuda")
        make = CONFIGS[name].func
        optimizer = make(params, lr=lr, capturable=True, nonfinite=nonfinite, **options)
        for _ in range(3):
            optimizer.step()
        torch.cuda.synchronize()
        step = optimizer.step
        if recording:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step = graph.replay
        for rate in (0.1, 0.01, 0.03):
            lr.fill_(rate)
            step()
        torch.cuda.synchronize()
        results.append([*params, *(optimizer.state[p]["step"] for p in params)])
    assert same_bits(*results)


def test_a_learning_rate_on_the_card():
    host = on_card(new_step("muon_step_", ((40, 60), (70, 90))))
    device = host.clone()
    device = device.with_(lr=device["lr"].cuda())
    host = host.with_(lr=host["lr"].cpu())
    host.run("triton")
    device.run("triton")
    for x, y in zip(host["params"], device["params"], strict=True):
        assert error(x.cpu(), y.double().cpu()) < 1e-6


def test_offsets_beyond_2_31_elements():
    rows = 2**31 // 4096 + 8
    if torch.cuda.mem_get_info()[0] < 3 * rows * 4096 * 2:
        pytest.skip("too little memory on the card")
    x = torch.zeros(rows, 16, 256, dtype=torch.bfloat16, device="cuda")
    x[-1, 0, 0] = 3.0
    product = sk.gram(x[-4:], backend="triton")
    assert float(product[-1, 0, 0]) == 9.0
    assert float(sk.gram(x, backend="triton")[-1, 0, 0]) == 9.0


@pytest.mark.parametrize("label", [label for label in labels() if "-" not in label])
def test_the_automatic_choice_on_a_card_is_no_specification(label):
    one = on_card(case(label))
    explanation = sk.explain(one.op, *one.tensors())
    assert explanation.backend in ("triton", "cuda")


@pytest.mark.parametrize("layout", ["fully_shard", "ddp"])
@pytest.mark.parametrize("name", ["Muon", "Shampoo", "SOAP", "DeVA"])
def test_one_rank_over_nccl_has_the_bits_of_none(name, layout, tmp_path):
    """The very calls that several cards would get; there is one here."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.Linear(96, 40)).cuda()

    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        alone, shared = model(), model()
        more = {}
        if layout == "ddp":
            more["distributed"] = dist.group.WORLD
        else:
            fully_shard(shared, mesh=init_device_mesh("cuda", (1,)))
        make = getattr(sk.optim, name)
        one, other = make(alone.parameters()), make(shared.parameters(), **more)
        for step in range(3):
            torch.manual_seed(step)
            for x, y in zip(alone.parameters(), shared.parameters(), strict=True):
                x.grad = torch.randn_like(x)
                y.grad = x.grad.clone()
                if isinstance(y, DTensor):
                    y.grad = distribute_tensor(x.grad, y.device_mesh, y.placements)
            one.step()
            other.step()
            other.load_state_dict(other.state_dict())
        for x, y in zip(alone.parameters(), shared.parameters(), strict=True):
            y = y.full_tensor() if isinstance(y, DTensor) else y
            assert torch.equal(x.detach(), y.detach())
    finally:
        dist.destroy_process_group()
