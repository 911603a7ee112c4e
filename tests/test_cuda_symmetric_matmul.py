"""gram of the CUDA C++ kernels and its tiles: what their emulation alone shows."""

from __future__ import annotations

import ctypes
import math
from collections import Counter

import pytest
import torch
from emulated_cuda import Guarded, arranged, library
from spectral_kernels import _cuda, gram
from support.inputs import gaussian, integers
from support.layouts import same_bits
from support.rule import assert_rule, draws, exact

pytestmark = pytest.mark.usefixtures("native", "backend_emulated")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around tiles of 64, steps of 32 and sums in parts; tall as well as wide.
SHAPES = ((1, 1), (3, 2), (17, 64), (64, 33), (65, 200), (129, 20), (20, 1000), (40, 4500))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(shape, dtype):
    x = gaussian(draws(shape[0], shape[0]), *shape, dtype=dtype)
    if _cuda.rejection("gram", [x], {}) is not None:
        pytest.skip("left to others")
    found = gram(x)
    assert same_bits(found, found.mT)
    expected = exact(x) @ exact(x).swapaxes(-1, -2)
    assert_rule(found, x @ x.mT, expected, terms=shape[1])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_parts_are_added_in_their_order(dtype):
    x = gaussian(2, 66 if dtype == torch.bfloat16 else 40, 2100, dtype=dtype)
    expected = gram(x)
    for order in (1, 2, 3):
        with arranged(order):
            assert same_bits(gram(x), expected)
    assert same_bits(gram(x[1]), expected[1])


def stream_k_pieces(tiles, steps, multiprocessors, most_parts):
    """(stretch, tile, begin, end, part, parts) of all pieces of one matrix."""
    room = torch.empty(4 * tiles, 6, dtype=torch.int64)
    pointer = ctypes.cast(room.data_ptr(), ctypes.POINTER(ctypes.c_int64))
    sizes = (ctypes.c_int64(tiles), ctypes.c_int64(steps), multiprocessors, most_parts)
    count = library().stream_k_pieces(*sizes, pointer, ctypes.c_int64(len(room)))
    assert count <= len(room)
    return room[:count].tolist()


@pytest.mark.parametrize("multiprocessors", [4, 108, 132])
@pytest.mark.parametrize("most_parts", [2, 3, 4])
def test_stream_k_deals_out_every_step_once(multiprocessors, most_parts):
    """The schedule of the wgmma products."""
    longest = 0
    for tiles, steps in ((1, 1), (1, 100), (3, 7), (10, 64), (136, 32), (300, 48), (528, 64)):
        pieces = stream_k_pieces(tiles, steps, multiprocessors, most_parts)
        place = 0  # in the line of all steps
        for _, tile, begin, end, _, parts in pieces:
            assert tile * steps + begin == place
            assert begin < end <= steps
            assert parts <= most_parts
            place += end - begin
        assert place == tiles * steps
        for tile in range(tiles):
            own = [(part, parts) for _, t, _, _, part, parts in pieces if t == tile]
            assert own == [(i, len(own)) for i in range(len(own))]
        work = Counter()
        for stretch, _, begin, end, _, _ in pieces:
            work[stretch] += end - begin
        assert len({work[stretch] for stretch in list(work)[:-1]}) <= 1
        longest = max(longest, max(work.values()))
    assert longest >= 64


def test_stream_k_fills_a_processor():
    """136 tiles on 132 multiprocessors are not two rounds."""
    pieces = stream_k_pieces(136, 32, 132, 4)
    assert len({stretch for stretch, *_ in pieces}) == 132
    assert len(pieces) > 136


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(3, 70, 128), (2, 5, 64), (1, 66, 2112)], ids=str)
def test_what_is_read_in_place_has_the_bits_of_what_is_packed(shape, dtype):
    x = gaussian(*shape, dtype=dtype)
    expected = gram(torch.cat([x, x[..., :1]], -1)[..., :-1])
    found = gram(Guarded(x).tensor)
    assert same_bits(found, expected)
    x[0, 2, 3] = math.inf
    x[-1, 4, 5] = math.nan
    broken = gram(x)
    assert broken[0].isnan().all()
    assert broken[-1].isnan().all()
    assert same_bits(broken[1:-1], expected[1:-1])
    x = gaussian(*shape, dtype=dtype) * (1e30 if dtype == torch.bfloat16 else 1e3)
    assert gram(x)[0].diagonal().isinf().all()  # out of range is not broken


@pytest.mark.parametrize("at_end", [True, False])
def test_no_access_outside_the_tensors(at_end):
    x = gaussian(2, 35, 13, dtype=torch.bfloat16)
    assert same_bits(gram(Guarded(x, at_end=at_end).tensor), gram(x))


def with_c(a, c, tile, chunks, *, lower_c=False, lower_d=False):
    """A A - C / 2 + I of padded symmetric bf16 workspaces, of C and D one triangle or both."""
    rows, line = a.shape
    out = torch.full_like(a, math.nan)
    parts = torch.full((16, 4, tile * tile), math.nan)
    arrived = torch.zeros(16, dtype=torch.int32)
    sizes = (ctypes.c_int64(rows), ctypes.c_int64(line), tile, ctypes.c_int64(chunks))
    tensors = (a, c, out, parts, arrived)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
    flags = (int(lower_c), int(lower_d), ctypes.c_float(-0.5))
    assert library().product_with_c(*sizes, *flags, *pointers) == 0
    assert not arrived.any()
    return out


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("chunks", [1, 2])
def test_c_and_d_may_hold_one_triangle(tile, chunks):
    """What nobody wrote of the other one is NaN here, and anything at all on a card."""
    rows = 141
    a, c = (torch.zeros(rows, 192, dtype=torch.bfloat16) for _ in range(2))
    symmetric = [integers(rows, rows, seed=seed) for seed in range(2)]
    for workspace, x in zip((a, c), symmetric, strict=True):
        workspace[:, :rows] = x.tril() + x.tril(-1).mT
    expected = with_c(a, c, tile, chunks)
    wide, added = (x[:, :rows].double() for x in (a, c))
    exact = wide @ wide - added / 2 + torch.eye(rows, dtype=torch.float64)
    assert torch.equal(expected[:, :rows], exact.bfloat16())
    for start in range(0, rows, tile):
        c[start : start + tile, start + tile :] = math.nan
    assert same_bits(with_c(a, c, tile, chunks, lower_c=True), expected)
    lower = with_c(a, c, tile, chunks, lower_c=True, lower_d=True)
    assert same_bits(lower[:, :rows].tril(), expected[:, :rows].tril())
    assert lower[:tile, tile:rows].isnan().all()


def test_wgmma_needs_the_architecture_that_has_it():
    for listed, has in (
        ("80,90a,120", 1),
        ("90a", 1),
        ("90", 0),
        ("80,90", 0),
        ("190a", 0),
        ("", 0),
    ):
        assert library().names_wgmma(listed.encode()) == has


def test_what_is_not_served_is_refused():
    with pytest.raises(NotImplementedError, match="not in fp64"):
        gram(gaussian(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("capability", [8, 9, 10, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thresholds(dtype, capability, monkeypatch):
    monkeypatch.setattr(_cuda, "_capability", lambda tensor: capability)
    small, large = (torch.empty(n, n, dtype=dtype, device="meta") for n in (128, 4096))
    full = dtype == torch.float32
    for op, leaving in {
        "newton_schulz": (9, 10),
        "muon_step_": (9, 10),
        "gram": (10,) if full else (9, 10),
        "kron_factors_update_": (10,) if full else (9, 10),
        "kron_precondition": (10,),
        "inverse_root": (),
    }.items():
        assert _cuda.elsewhere(op, [small]) is None
        alone = op not in ("newton_schulz", "muon_step_")
        reason = _cuda.elsewhere(op, [large] if alone else [small, large])
        assert (reason is not None) == (capability in leaving)
        assert reason is None or reason.startswith("4096 rows, more than ")


def test_rejections():
    for op in ("gram", "kron_factors_update_", "kron_precondition"):
        assert _cuda.rejection(op, [gaussian(8, 9), torch.empty(0)], {}) is None
        assert _cuda.rejection(op, [gaussian(7, 7), gaussian(7, 9).bfloat16()], {}) is None
        for given in ([gaussian(7, 9)], [gaussian(9, 7)]):
            assert "fewer than 8 rows" in _cuda.rejection(op, given, {})
        assert "fp64" in _cuda.rejection(op, [gaussian(8, 9), gaussian(8, 8).double()], {})
