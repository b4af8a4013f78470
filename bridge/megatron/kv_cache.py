"""Keys and values of the tokens that rows have so far, and what attention is given while a model generates.

A `CachedStep` takes the place of a `Visibility`: it describes new tokens of several rows, packed into one sequence, and
where the keys and values of their earlier tokens lie. Sliding layers keep a ring of the window's length (and of a few
tokens more, where some that are written may be taken back: what a drafter proposed), global layers grow, layers that
share K/V keep nothing: they read the cache of the layer that makes them. A pipeline stage that holds readers of an
earlier stage's layer mirrors its cache out of what crosses the boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from bridge.geometry import Geometry, LayerKind
from bridge.megatron.attention_backends import select
from bridge.megatron.mask import Mask
from bridge.megatron.rope import Rotary
from bridge.megatron.visibility import MaskRule, Visibility

# A cache that is too small grows by this factor at the least, so that a long answer is copied a few times only.
_GROWTH = 1.5


@dataclass
class LayerCache:
    """Keys and values of one layer, [slots, groups, capacity, head_dim] each; a row has one slot.

    The token at position p lies in column p, or p mod `ring` where there is one: older ones are overwritten.
    """

    ring: int | None
    key: Tensor
    value: Tensor

    def reserve(self, slots: int, positions: int) -> None:
        """Room for `slots` rows of `positions` tokens."""
        columns = positions if self.ring is None else min(self.ring, positions)
        have = self.key.shape
        if slots <= have[0] and columns <= have[2]:
            return
        if columns > have[2]:
            columns = max(columns, int(have[2] * _GROWTH))
            columns = columns if self.ring is None else min(self.ring, columns)
        shape = (max(slots, have[0]), have[1], max(columns, have[2]), have[3])
        for name in ("key", "value"):
            old = getattr(self, name)
            new = old.new_zeros(shape)
            new[: have[0], :, : have[2]] = old
            setattr(self, name, new)

    def columns(self, positions: Tensor) -> Tensor:
        """Where tokens at `positions` lie."""
        return positions if self.ring is None else positions % self.ring

    def write(self, slot: int, start: int, key: Tensor, value: Tensor) -> None:
        """Tokens from position `start` on of one row, [n, groups, head_dim] each; of more than a ring the last."""
        stop = start + len(key)
        if self.ring is not None and len(key) > self.ring:
            start, key, value = stop - self.ring, key[-self.ring :], value[-self.ring :]
        columns = self.columns(torch.arange(start, stop, device=key.device))
        self.key[slot][:, columns] = key.transpose(0, 1)
        self.value[slot][:, columns] = value.transpose(0, 1)

    def read(self, slot: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Tokens [start, stop) of one row in order, [stop - start, groups, head_dim] each."""
        columns = self.columns(torch.arange(start, stop, device=self.key.device))
        return self.key[slot][:, columns].transpose(0, 1), self.value[slot][:, columns].transpose(0, 1)


class KeyValueCaches:
    """The caches of a stage, by the layer that makes the keys and values; made when the first come in.

    `spare`: how many tokens that were written last a row may lose again, and be gone on with from before them.
    """

    def __init__(self, geometry: Geometry, spare: int = 0) -> None:
        self.geometry, self.spare = geometry, spare
        self.layers: dict[int, LayerCache] = {}

    def of(self, source: int, key: Tensor) -> LayerCache:
        """The cache of layer `source`, for keys like `key` [n, b, groups, head_dim]."""
        if source not in self.layers:
            groups, head_dim = key.shape[2:]
            empty = key.new_zeros(0, groups, 0, head_dim)
            window = self.geometry.layers[source].window
            ring = None if window is None else window + self.spare
            self.layers[source] = LayerCache(ring, empty, empty.clone())
        return self.layers[source]

    def move(self, source: int, target: int) -> None:
        """Give the row in slot `source` the slot `target`."""
        for cache in self.layers.values():
            cache.key[target], cache.value[target] = cache.key[source], cache.value[source]

    def copy(self, source: int, targets: Sequence[int], slots: int) -> None:
        """Give the rows in slots `targets` what the one in `source` has. `slots`: how many there will be."""
        for cache in self.layers.values():
            cache.reserve(slots, cache.key.shape[2])
            cache.key[targets], cache.value[targets] = cache.key[source].clone(), cache.value[source].clone()

    @property
    def nbytes(self) -> int:
        """What the caches of this stage hold."""
        return sum(cache.key.nbytes + cache.value.nbytes for cache in self.layers.values())


@dataclass(frozen=True)
class NewTokens:
    """Tokens at positions `start` to `stop` of the row in `slot`. `prompt` [1, prompt] says which of its tokens are of
    one image; it is needed where there are several tokens."""

    slot: int
    start: int
    stop: int
    prompt: Visibility | None = None

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class CachedStep:
    """New tokens of several rows in one sequence [n, 1, ...], row after row, `padding` tokens behind them.

    Keys and values of the new tokens are written to `caches`. Either one token a row, or parts of prompts that cut no
    image; or, with `every`, tokens of text, of each of which the model's output is wanted. Under sequence parallelism n
    is a multiple of the ranks of `tp_group` (`padded`).
    """

    caches: KeyValueCaches
    rows: tuple[NewTokens, ...]
    padding: int
    device: torch.device
    tp_group: ProcessGroup
    sequence_parallel: bool
    # Layers whose new keys and values are in the caches already.
    written: set[int] = field(default_factory=set)
    masks: dict[object, Mask] = field(default_factory=dict)
    unseen: dict[object, Tensor | None] = field(default_factory=dict)
    narrowed: bool = False
    every: bool = False

    @classmethod
    def of(
        cls,
        caches: KeyValueCaches,
        rows: Sequence[NewTokens],
        device: torch.device,
        tp_group: ProcessGroup,
        sequence_parallel: bool,
        *,
        every: bool = False,
    ) -> CachedStep:
        """Without a row there is one token of padding at the least: experts' ranks wait for each other."""
        multiple = tp_group.size() if sequence_parallel else 1
        padding = padded(sum(map(len, rows)), multiple) - sum(map(len, rows))
        return cls(caches, tuple(rows), padding, device, tp_group, sequence_parallel, every=every)

    @cached_property
    def one_each(self) -> bool:
        """Whether every row has one token here, the last that it has so far."""
        return self.narrowed or all(len(row) == 1 for row in self.rows)

    @cached_property
    def all_wanted(self) -> bool:
        """Whether the model's output is wanted of every token here."""
        return self.every or self.one_each

    @property
    def outputs(self) -> int:
        """Of how many tokens the model's output is wanted: the first ones of `last`, its padding behind them."""
        return sum(map(len, self.rows)) if self.every else len(self.rows)

    @cached_property
    def position_ids(self) -> Tensor:
        """[1, n], 0 for padding."""
        numbers = [p for row in self.rows for p in range(row.start, row.stop)] + [0] * self.padding
        return torch.tensor([numbers], device=self.device)

    @cached_property
    def last(self) -> CachedStep:
        """The same step for the last token of each row: those before it have no reader behind layers that share K/V."""
        if self.all_wanted:
            return self
        multiple = self.tp_group.size() if self.sequence_parallel else 1
        padding = padded(len(self.rows), multiple) - len(self.rows)
        return replace(self, padding=padding, narrowed=True)

    @cached_property
    def last_index(self) -> Tensor:
        """Where in the sequence the tokens of `last` stand; its padding is the first token."""
        ends = torch.tensor([len(row) for row in self.rows], dtype=torch.int64).cumsum(0) - 1
        return torch.nn.functional.pad(ends, (0, self.last.padding)).to(self.device)

    def take_last(self, x: Tensor) -> Tensor:
        """Of [n (/tp), 1, ...] the last tokens: [rows and padding (/tp), 1, ...]."""
        if self.all_wanted:
            return x
        if not self.sequence_parallel:
            return x[self.last_index]
        whole = gather_from_sequence_parallel_region(x.contiguous(), group=self.tp_group)
        return whole[self.last_index].chunk(self.tp_group.size())[self.tp_group.rank()]

    def put_back(self, x: Tensor) -> Tensor:
        """The inverse of `take_last`, zeros for other tokens: pipeline stages send sequences of one length."""
        if self.all_wanted:
            return x
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x.contiguous(), group=self.tp_group)
        whole = x.new_zeros(self.position_ids.shape[1], *x.shape[1:])
        rows = len(self.rows)
        whole[self.last_index[:rows]] = x[:rows]
        return whole.chunk(self.tp_group.size())[self.tp_group.rank()] if self.sequence_parallel else whole

    def rotary(self, tables: dict[LayerKind, Rotary]) -> dict[LayerKind, Rotary]:
        """Tables [n, 1, 1, d] -> those of the last tokens."""
        if self.all_wanted:
            return tables
        return {kind: Rotary(x.cos[self.last_index], x.sin[self.last_index]) for kind, x in tables.items()}

    def attend(self, source: int, rule: MaskRule, backend: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`query` [n, 1, heads, d] over the caches of layer `source` and its new `key` and `value` [n', 1, groups, d].

        They are written once a step; n' is n, or that of the step that this is the `last` of. Padding gives zeros.
        """
        if not self.rows:
            return torch.zeros_like(query)
        cache = self.caches.of(source, key)
        cache.reserve(*self._size)
        if self.all_wanted:
            self._write(source, cache, key, value)
            return self._attend_written(cache, rule.window, query)
        output = torch.zeros_like(query)
        start = 0
        for row in self.rows:
            tokens = slice(start, start := start + len(row))
            mask = self._mask(row, rule)
            keys, values = cache.read(row.slot, mask.columns[0][0], row.start)
            keys, values = (torch.cat([old[:, None], new[tokens]]) for old, new in ((keys, key), (values, value)))
            chosen = select(backend, query[tokens], keys, mask)
            output[tokens] = chosen.attend(query[tokens], keys, values, mask)
        self._write(source, cache, key, value)
        return output

    def _write(self, source: int, cache: LayerCache, key: Tensor, value: Tensor) -> None:
        if source in self.written:
            return
        self.written.add(source)
        if self.every or all(len(row) == 1 for row in self.rows):
            slots, positions = self._tokens
            places = slots, slice(None), cache.columns(positions)
            cache.key[places], cache.value[places] = key[: len(slots), 0], value[: len(slots), 0]
            return
        start = 0
        for row in self.rows:
            tokens = slice(start, start := start + len(row))
            cache.write(row.slot, row.start, key[tokens, 0], value[tokens, 0])

    def _attend_written(self, cache: LayerCache, window: int | None, query: Tensor) -> Tensor:
        """`query` [n, 1, heads, d] over all that the rows' slots hold, the new tokens too -> the same."""
        longest = self._size[1]
        columns = longest if cache.ring is None else min(cache.ring, longest)
        key, value = (x[self._chosen, :, :columns] for x in (cache.key, cache.value))
        places = self._places
        rows = query[places, 0] if places is not None else query[: len(self.rows), 0][:, None]  # [rows, q, heads, d]
        length, groups = rows.shape[1], key.shape[1]
        grouped = rows.transpose(1, 2).unflatten(1, (groups, -1)).flatten(2, 3)
        scores = (grouped @ key.transpose(2, 3)).float()
        unseen = self._unseen(cache, columns, window)
        if unseen is not None:
            scores = scores.unflatten(2, (-1, length)).masked_fill_(unseen, -torch.inf).flatten(2, 3)
        attended = scores.softmax(-1).to(value.dtype) @ value
        attended = attended.unflatten(2, (-1, length)).flatten(1, 2).transpose(1, 2)
        attended = attended[:, 0] if places is None else attended[self._filled]
        return torch.nn.functional.pad(attended[:, None], (0, 0) * 3 + (0, len(query) - len(attended)))

    def _unseen(self, cache: LayerCache, columns: int, window: int | None) -> Tensor | None:
        """[rows, 1, 1, q, columns] bool: columns that a token does not see; None where all see all."""
        asked = columns, cache.ring, window
        if asked not in self.unseen:
            # One token a row sees all that its slot holds, if the slot is full and no longer than its window.
            whole = self.one_each and cache.ring == window
            found = None
            if not whole or min(row.stop for row in self.rows) < columns:
                found = ~self._seen(cache.ring, columns, window)[:, None, None]
            self.unseen[asked] = found
        return self.unseen[asked]

    def _seen(self, ring: int | None, columns: int, window: int | None) -> Tensor:
        """[rows, q, columns] bool. A column of a ring holds the last position of the row that it may hold."""
        held = torch.arange(columns, device=self.device)[None]
        if ring is not None:
            last = self._positions[:, None]
            held = last - (last - held) % ring
        distance = self._query_positions[:, :, None] - held[:, None]
        seen = (distance >= 0) & (held >= 0)[:, None]
        return seen if window is None else seen & (distance < window)

    @cached_property
    def _places(self) -> Tensor | None:
        """[rows, q]: where in the sequence the tokens of each row stand, the last one repeated; None: one a row."""
        if self.one_each:
            return None
        lengths = torch.tensor([len(row) for row in self.rows])
        offsets = torch.arange(int(lengths.max())).minimum(lengths[:, None] - 1)
        return ((lengths.cumsum(0) - lengths)[:, None] + offsets).to(self.device)

    @cached_property
    def _filled(self) -> Tensor:
        """[rows, q] bool: which of `_places` are tokens, and no repetition."""
        lengths = torch.tensor([len(row) for row in self.rows])
        return (torch.arange(int(lengths.max())) < lengths[:, None]).to(self.device)

    @cached_property
    def _query_positions(self) -> Tensor:
        """[rows, q]"""
        if self.one_each:
            return self._positions[:, None]
        assert self._places is not None
        return self.position_ids[0][self._places]

    @cached_property
    def _tokens(self) -> tuple[Tensor, Tensor]:
        """The slot and the position of every token, [n] each."""
        numbers = [(row.slot, position) for row in self.rows for position in range(row.start, row.stop)]
        slots, positions = torch.tensor(numbers, device=self.device).unbind(1)
        return slots, positions

    @cached_property
    def _size(self) -> tuple[int, int]:
        """Slots, and positions of the longest row, that the caches need."""
        return 1 + max(row.slot for row in self.rows), max(row.stop for row in self.rows)

    @cached_property
    def _chosen(self) -> slice | Tensor:
        """The slots of the rows: where they are in order, without a copy of their caches."""
        slots = [row.slot for row in self.rows]
        run = range(slots[0], slots[0] + len(slots))
        return slice(run.start, run.stop) if slots == list(run) else self._slots

    @cached_property
    def _slots(self) -> Tensor:
        return torch.tensor([row.slot for row in self.rows], device=self.device)

    @cached_property
    def _positions(self) -> Tensor:
        """[rows]: of the last token of each."""
        return torch.tensor([row.stop - 1 for row in self.rows], device=self.device)

    def _mask(self, row: NewTokens, rule: MaskRule) -> Mask:
        """The mask of a row's new tokens; layers of one kind share it."""
        assert row.prompt is not None
        if (row.slot, rule) not in self.masks:
            first = 0 if rule.window is None else max(0, row.start - rule.window + 1)
            spans = ((row.start, row.stop),), ((first, row.stop),)
            self.masks[row.slot, rule] = Mask(row.prompt, rule, *spans)
        return self.masks[row.slot, rule]


def padded(tokens: int, multiple: int) -> int:
    """The least multiple of `multiple`, above 0, that holds `tokens`."""
    return max(multiple, tokens + -tokens % multiple)
