"""Every attention backend against the dense reference, on random mixes of documents, images, windows and heads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bridge.errors import UsageError
from bridge.megatron import layer_options
from bridge.megatron.attention_backends import AUTO, BACKENDS, banded, blockwise, flex, flex_triton, select
from bridge.megatron.attention_backends.flex import block_mask
from bridge.megatron.mask import Mask, mask_of
from bridge.megatron.visibility import MaskRule, Visibility
from bridge.megatron.zigzag import Zigzag

FLOAT32, BFLOAT16 = 1e-5, 1e-2
CASES = settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@dataclass(frozen=True)
class Case:
    """One random problem: what is visible, the heads, and the tiles that it is cut into."""

    visibility: Visibility
    rule: MaskRule
    groups: int
    repeat: int
    head_dim: int
    tile: tuple[int, int]
    seed: int

    @cached_property
    def _normal(self) -> list[Tensor]:
        batch, length = self.visibility.document.shape
        generator = torch.Generator().manual_seed(self.seed)
        heads = self.groups * self.repeat
        shapes = ((length, batch, count, self.head_dim) for count in (heads, self.groups, self.groups, heads))
        q, *others = (torch.randn(*shape, generator=generator) for shape in shapes)
        return [q * (2 * self.head_dim**-0.5), *others]

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output. Scores have a deviation of about 2, as normed heads have."""
        q, k, v, upstream = (x.detach().to(dtype) for x in self._normal)
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), upstream


@st.composite
def visibilities(draw: st.DrawFn) -> Visibility:
    """Documents, images (also across their borders and longer than any window), padding at either end and within."""
    length = draw(st.integers(1, 80))
    packed = draw(st.booleans())
    batch = 1 if packed else draw(st.integers(1, 2))
    ids = torch.zeros(batch, length, dtype=torch.int64)
    bounds = None
    if packed:
        cuts = draw(st.lists(st.integers(0, length), max_size=5))
        bounds = torch.tensor([0, *sorted(cuts), *([length] if draw(st.booleans()) else [])], dtype=torch.int32)
    mask = types = None
    if draw(st.booleans()):
        mask = torch.ones_like(ids)
        for row in range(batch):
            start = draw(st.integers(0, length))
            mask[row, start : start + draw(st.integers(0, length))] = 0
    if draw(st.integers(0, 3)):
        types = torch.zeros_like(ids)
        for row in range(batch):
            for _ in range(draw(st.integers(0, 4))):
                start = draw(st.integers(0, length - 1))
                types[row, start : start + draw(st.integers(1, 40))] = draw(st.sampled_from([0, 1, 2, 3]))
    return Visibility.of(ids, mask, bounds, types)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups, repeat = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 4), (1, 8), (1, 16), (3, 5)]))
    return Case(
        draw(visibilities()),
        draw(rules),
        groups,
        repeat,
        draw(st.sampled_from([8, 32, 256, 512])),
        draw(st.sampled_from([(16, 8), (16, 32), (64, 16), (512, 512)])),
        draw(st.integers(0, 2**16)),
    )


rules = st.builds(MaskRule, st.sampled_from([None, 1, 2, 8, 16, 64]), st.sampled_from(["causal", "windowed", "full"]))


@contextmanager
def tiles(tile: tuple[int, int]) -> Iterator[None]:
    """Cut short rows into as many tiles as long ones have."""
    before = blockwise.TILE["cpu"], banded.TILE
    blockwise.TILE["cpu"], banded.TILE = tile, tile[1] // 4
    try:
        yield
    finally:
        blockwise.TILE["cpu"], banded.TILE = before


def run(name: str, case: Case, dtype: torch.dtype, *, gradients: bool = True) -> list[Tensor]:
    """The output, and the gradients of q, k and v, in float32."""
    q, k, v, upstream = case.tensors(dtype)
    if name == "reference":
        # The oracle works in float32 on the same numbers: its own rounding is no part of the comparison.
        q, k, v = (x.detach().float().requires_grad_() for x in (q, k, v))
    mask = mask_of(case.visibility, case.rule)
    with torch.set_grad_enabled(gradients):
        output = BACKENDS[name].attend(q, k, v, mask)
    results = [output, *torch.autograd.grad(output, (q, k, v), upstream.to(output.dtype))] if gradients else [output]
    return [x.detach().float() for x in results]


def worst(ours: list[Tensor], theirs: list[Tensor], scales: list[float] | None = None) -> float:
    """The worst ‖Δ‖/‖x‖ over output and gradients; `scales` are the least norms to divide by."""
    scales = scales or [0.0] * len(theirs)
    return max(
        ((a - b).norm() / max(b.norm().item(), scale)).item() for a, b, scale in zip(ours, theirs, scales, strict=True)
    )


def minuends(case: Case) -> list[float]:
    """The norms of what the gradients of q and k are differences of.

    A query that sees one key has no gradient, and what is left of one is rounding: of numbers of this size.
    """
    q, k, v, upstream = (x.detach().permute(1, 2, 0, 3) for x in case.tensors(torch.float32))
    k, v = (x.repeat_interleave(case.repeat, 1) for x in (k, v))
    scores = (q @ k.mT).masked_fill(~mask_of(case.visibility, case.rule).dense[:, None], -torch.inf)
    weighted = scores.softmax(-1) * (upstream @ v.mT)
    return [0.0, (weighted @ k).norm().item(), (weighted.mT @ q).norm().item(), 0.0]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These tensors are too small to share, and on a busy machine threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention as torch debugs it: the same arithmetic, without a compilation for every number of heads."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_kernel", lambda _: flex.flex_attention)


@pytest.mark.usefixtures("uncompiled")
@CASES
@given(cases())
def test_backends_agree_with_the_reference(case: Case) -> None:
    mask, scales = mask_of(case.visibility, case.rule), minuends(case)
    for dtype, bound in ((torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)):
        truth = run("reference", case, dtype)
        with tiles(case.tile):
            assert worst(run("blockwise", case, dtype), truth, scales) <= bound
            # It refuses rows for which it would not pay, not because it could not.
            whole = replace(case, visibility=replace(case.visibility, cache={}))
            assert worst(run("banded", whole, dtype), truth, scales) <= bound
        if BACKENDS["dense"].refuse(*case.tensors(dtype)[:2], mask) is None:
            assert worst(run("dense", case, dtype), truth, scales) <= bound
        assert worst(run("flex", case, dtype, gradients=False), truth[:1]) <= bound
        q, k, _, _ = case.tensors(dtype)
        if BACKENDS["sdpa"].refuse(q, k, mask) is None:
            assert worst(run("sdpa", case, dtype), truth, scales) <= bound


@settings(CASES, max_examples=100)
@given(visibilities(), rules, st.sampled_from([3, 16]), st.sampled_from([0, 2, 3]))
def test_sparse_structures_leave_out_nothing_that_is_seen(
    visibility: Visibility, rule: MaskRule, size: int, parts: int
) -> None:
    length = visibility.document.shape[1]
    views = [visibility]
    if parts and length % (2 * parts) == 0:
        views = [visibility.on(Zigzag(length, parts, rank)) for rank in range(parts)]
    for view in views:
        mask = mask_of(view, rule)
        dense = mask.dense
        # Not a key that a query sees is left behind on another rank.
        assert (dense.sum(2) == visibility.dense(rule)[:, mask.row_places].sum(2)).all()
        assert torch.equal(mask.between(slice(None), slice(None)), dense)
        covered = torch.zeros_like(dense[0])
        for tile in mask.tiles(size):
            rows = slice(tile.start, tile.stop)
            assert dense[:, rows, tile.full_start : tile.full_stop].all()
            for start, stop, masked in tile.pieces(4):
                covered[rows, start:stop] = True
                assert masked or dense[:, rows, start:stop].all()
        assert covered[dense.any(0)].all()
        check_block_mask(mask, dense, size)
        check_runs(mask, dense, size)


def check_runs(mask: Mask, dense: Tensor, size: int) -> None:
    """Columns of every query, and the same tiles by queries and by columns, which hold all that is seen."""
    runs = flex_triton.runs_of(mask, size)
    _, rows, columns = dense.shape
    place = torch.arange(columns)
    seen = (runs.first[..., None] <= place) & (place < runs.stop[..., None])
    assert torch.equal(seen & (runs.row_document[..., None] == runs.column_document[:, None]), dense)
    row_tile, column_tile = (torch.arange(-(-n // size)) for n in (rows, columns))
    by_rows = (runs.low[..., None] <= column_tile) & (column_tile < runs.high[..., None])
    by_columns = (runs.row_low[..., None] <= row_tile) & (row_tile < runs.row_high[..., None])
    assert torch.equal(by_rows, by_columns.mT)
    assert runs.high.max() <= len(column_tile)
    covered = by_rows.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :rows, :columns]
    assert covered[dense].all()


def test_the_backward_pass_computes_the_tiles_that_are_seen() -> None:
    """And no others, where documents and windows are in order."""
    bounds = torch.arange(0, 4097, 512)
    visibility = Visibility.of(torch.zeros(1, 4096, dtype=torch.int64), cu_seqlens=bounds)
    for rule, tiles_ in ((MaskRule(None, "causal"), 8 * 10), (MaskRule(128, "causal"), 8 * 7)):
        runs = flex_triton.runs_of(mask_of(visibility, rule))
        assert int((runs.high - runs.low).sum()) == tiles_


def check_block_mask(mask: Mask, dense: Tensor, size: int) -> None:
    made = block_mask(mask, size)
    batch, rows, _ = dense.shape
    for b in range(batch):
        seen = torch.zeros_like(dense[b])
        for row in range(-(-rows // size)):
            here = slice(row * size, (row + 1) * size)
            partial = made.kv_indices[b, 0, row, : made.kv_num_blocks[b, 0, row]].tolist()
            full = made.full_kv_indices[b, 0, row, : made.full_kv_num_blocks[b, 0, row]].tolist()
            assert not set(partial) & set(full)
            for column in partial + full:
                seen[here, column * size : (column + 1) * size] = True
            for column in full:
                assert dense[b, here, column * size : (column + 1) * size].all()
        assert seen[dense[b]].all()


def visible(kind: str, mask: Mask) -> list[tuple[int, int]]:
    """The first and last key of every query of the first row."""
    length = mask.dense.shape[1]
    if kind == "dense":
        dense = mask.dense[0]
    elif kind == "interval":
        dense = mask.between(slice(None), slice(None))[0]
    else:
        rows, columns = torch.arange(length)[:, None], torch.arange(length)[None]
        dense = block_mask(mask, 16).mask_mod(torch.tensor(0), torch.tensor(0), rows, columns)
    return [(int(row.nonzero()[0]), int(row.nonzero()[-1])) for row in dense]


@pytest.mark.parametrize("kind", ["dense", "interval", "flex"])
def test_the_families_differ_on_a_block_longer_than_the_window(kind: str) -> None:
    types = torch.zeros(1, 24, dtype=torch.int64)
    types[0, 5:20] = 1
    visibility = Visibility.of(torch.zeros_like(types), mm_token_type_ids=types)
    seen = visible(kind, mask_of(visibility, MaskRule(8, "windowed")))
    assert (seen[5], seen[12], seen[19], seen[22]) == ((0, 19), (5, 19), (12, 19), (15, 22))
    seen = visible(kind, mask_of(visibility, MaskRule(8, "full")))
    assert (seen[5], seen[12], seen[19], seen[22]) == ((0, 19), (5, 19), (5, 19), (15, 22))
    seen = visible(kind, mask_of(visibility, MaskRule(8, "causal")))
    assert (seen[5], seen[12], seen[19], seen[22]) == ((0, 5), (5, 12), (12, 19), (15, 22))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ["blockwise", "banded", "dense", "flex"])
@pytest.mark.parametrize("leak", ["documents", "blocks"])
def test_a_planted_leak_is_caught(name: str, leak: str) -> None:
    """The comparison with the reference fails where a backend is told the wrong documents, or the wrong blocks."""
    types = torch.zeros(1, 40, dtype=torch.int64)
    types[0, 4:9] = 1
    types[0, 10:15] = 1
    bounds = torch.tensor([0, 20, 40])
    right = Visibility.of(torch.zeros_like(types), cu_seqlens=bounds, mm_token_type_ids=types)
    assert right.block is not None
    wrong = {
        "documents": replace(right, document=torch.zeros_like(right.document), cache={}),
        "blocks": replace(right, block=right.block.clamp(max=0), cache={}),
    }[leak]
    case = Case(right, MaskRule(8, "windowed"), 1, 2, 32, (512, 512), 0)
    truth = run("reference", case, torch.float32, gradients=False)
    assert worst(run(name, case, torch.float32, gradients=False), truth) <= FLOAT32
    assert worst(run(name, replace(case, visibility=wrong), torch.float32, gradients=False), truth) > 1e-2


def area(length: int, rule: MaskRule, bounds: Tensor | None = None) -> int:
    """Query-key pairs that blockwise computes."""
    visibility = Visibility.of(torch.zeros(1, length, dtype=torch.int64), cu_seqlens=bounds)
    tiles_ = mask_of(visibility, rule).tiles(64)
    return sum((tile.stop - tile.start) * (tile.key_stop - tile.key_start) for tile in tiles_)


def test_work_grows_with_the_window_and_the_squares_of_documents() -> None:
    sliding = MaskRule(128, "windowed")
    assert area(8192, sliding) <= 8192 * (128 + 64)
    whole = MaskRule(None, "causal")
    assert area(4096, whole) <= 0.52 * 4096**2
    packed = area(4096, whole, torch.arange(0, 4097, 512))
    assert packed <= 8 * 0.6 * 512**2


def test_a_backend_that_cannot_honour_a_mask_is_refused_by_name() -> None:
    q, k = torch.zeros(40, 1, 2, 8), torch.zeros(40, 1, 1, 8)
    packed = Visibility.of(torch.zeros(1, 40, dtype=torch.int64), cu_seqlens=torch.tensor([0, 20, 40]))
    with pytest.raises(UsageError, match=r"sdpa cannot honour the mask \(causal\)"):
        select("sdpa", q, k, mask_of(packed, MaskRule(None, "causal")))
    with pytest.raises(UsageError, match=r"sdpa cannot honour the mask \(window 8\)"):
        select("sdpa", q, k, mask_of(Visibility.of(torch.zeros(1, 40, dtype=torch.int64)), MaskRule(8, "causal")))
    with pytest.raises(UsageError, match=r"flex cannot honour the mask .* no backward pass on a CPU"):
        select("flex", q.requires_grad_(), k, mask_of(packed, MaskRule(None, "causal")))
    long = torch.zeros(300, 1, 1, 8)
    with pytest.raises(UsageError, match=r"dense cannot honour the mask .* at most 128 tokens"):
        select(
            "dense", long, long, mask_of(Visibility.of(torch.zeros(1, 300, dtype=torch.int64)), MaskRule(8, "causal"))
        )
    with pytest.raises(UsageError, match=r"flex_triton cannot honour the mask .* Hopper"):
        select("flex_triton", q, k, mask_of(packed, MaskRule(None, "causal")))
    with pytest.raises(UsageError, match=r"ffpa cannot honour the mask .* Hopper"):
        select("ffpa", q, k, mask_of(packed, MaskRule(None, "causal")))


def test_auto_takes_tiles_for_long_rows_and_one_product_for_short_ones() -> None:
    halves = torch.tensor([0, 150, 300])
    for length, window, bounds, expected in (
        (32, None, None, "dense"),
        (64, 8, None, "dense"),
        (128, None, None, "dense"),
        (128, 8, None, "banded"),
        (300, 8, None, "banded"),
        (300, 8, halves, "banded"),
        (300, 200, None, "blockwise"),
        (300, None, None, "sdpa"),
        (300, None, halves, "blockwise"),
    ):
        q = torch.zeros(length, 1, 2, 8)
        visibility = Visibility.of(torch.zeros(1, length, dtype=torch.int64), cu_seqlens=bounds)
        assert select(AUTO, q, q, mask_of(visibility, MaskRule(window, "causal"))).name == expected


def test_masks_are_made_once_a_step_and_rule() -> None:
    visibility = Visibility.of(torch.zeros(1, 40, dtype=torch.int64))
    mask = mask_of(visibility, MaskRule(8, "causal"))
    assert mask_of(visibility, MaskRule(8, "causal")) is mask
    assert mask.tiles(16) is mask.tiles(16)
    assert block_mask(mask, 16) is block_mask(mask, 16)


@pytest.mark.slow
def test_compiled_flex_skips_blocks_and_agrees() -> None:
    """The kernel that uses the BlockMask's structure, on rows of two lengths: half a minute of compilation."""
    for length in (700, 300):
        types = torch.zeros(1, length, dtype=torch.int64)
        types[0, 40:160] = 1
        bounds = torch.tensor([0, 150, length // 2, length])
        for rule in (MaskRule(64, "windowed"), MaskRule(None, "causal")):
            visibility = Visibility.of(torch.zeros_like(types), cu_seqlens=bounds, mm_token_type_ids=types)
            case = Case(visibility, rule, 2, 2, 32, (512, 512), length)
            truth = run("reference", case, torch.float32, gradients=False)
            assert worst(run("flex", case, torch.float32, gradients=False), truth) <= FLOAT32


def test_a_recipe_knows_their_names() -> None:
    """Where torch is not imported."""
    assert (AUTO, *BACKENDS) == layer_options.ATTENTION
