"""Logits of a model of any size, layer by layer: transformers and the Megatron model, one layer's weights in memory.

Both sides run their own classes in float32 on a CPU. Each layer of ours runs twice: on what our layers before it made,
and on what went into the same layer of transformers, so that its own error is seen and no sum of them.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bridge.convert.quantized_folder import open_hf_folder
from bridge.geometry.towers import SOFT_TOKEN_KINDS
from bridge.mapping import table_for
from bridge.megatron.attention import KeyValue
from bridge.megatron.parallel import Parallel, initialize
from bridge.megatron.provider import Gemma4Provider
from bridge.torch_dist.reader import DistReader
from bridge.verify.expert_choices import OVERRIDES, GivenChoices, Ties, forget_routers, record_choices
from bridge.verify.one_layer import OurWeights, TheirWeights, come_and_go, layers_of, tensors_of
from bridge.verify.reference import LOGITS, Reference, with_masks
from bridge.verify.result import Check
from bridge.verify.task import StreamedTask

RELATIVE = 1e-5
EMBEDDINGS = "embeddings"
EMBEDDING = "embedding.word_embeddings.weight"
# Of `mm_token_type_ids`.
_TOKENS = dict(enumerate(("text", *SOFT_TOKEN_KINDS)))


@torch.no_grad()
def run_transformers(task: StreamedTask) -> None:
    """Write what goes into and out of every layer of transformers, and its logits, to `task.theirs`."""
    with open_hf_folder(task.folder) as folder:
        model = _empty_transformers(task)
        weights = TheirWeights(model, folder)
        decoder = next(m for m in model.modules() if type(m).__name__.endswith("TextModel"))
        found: dict[str, Tensor] = {}
        say = _Progress("transformers", task)

        def begins(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                found[f"in.{i}"] = args[0].clone()

            return hook

        def ends(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                found[f"out.{i}"] = output.clone()
                say.layer()

            return hook

        for i, layer in enumerate(decoder.layers):
            layer.register_forward_pre_hook(begins(i))
            if i in task.run:
                layer.register_forward_hook(ends(i))
                record_choices(layer, partial(found.__setitem__, f"experts.{i}"))
            else:
                layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
        tables = [m.weight for m in decoder.modules() if isinstance(m, nn.Embedding)]
        head = "lm_head.weight"
        if head not in folder.tensors:
            head = table_for(task.geometry).entries[EMBEDDING].sources[0].name
        _prepare(model, decoder.layers, tables, [model.lm_head.weight], task, weights)
        model.lm_head = _HeadByWords(lambda: weights.rows_of(head) if task.layers is None else ())
        inputs = with_masks(model, task.sample.inputs())
        logits = model(**inputs, use_cache=False).logits
        if task.layers is None:
            found[LOGITS] = logits.contiguous()
    part = task.theirs.with_suffix(".part")
    save_file(found, part)
    part.replace(task.theirs)


@torch.no_grad()
def compare(task: StreamedTask) -> list[Check]:
    """Run the Megatron model and hold it against `task.theirs`: a row for each layer, in order, and the logits."""
    theirs, real = Reference(task.theirs), task.sample.attention_mask.bool()
    groups = initialize(Parallel())
    overrides = {"perform_initialization": False, **(OVERRIDES if task.geometry.moe is not None else {})}
    [model] = Gemma4Provider(task.geometry, Parallel(), torch.float32, overrides=overrides).build(groups)
    forget_routers()
    model.eval()
    say = _Progress("Megatron", task)
    checks: list[Check] = []
    shared: dict[int, KeyValue] = {}
    choices: dict[int, GivenChoices] = {}

    def row(name: str, value: float, detail: str) -> None:
        checks.append(Check(name, task.variant, Parallel(), "float32", "relative", value, RELATIVE, detail))

    def embedded(module: nn.Module, args: Any) -> None:
        types = task.sample.mm_token_type_ids
        ours, expected = args[0].transpose(0, 1), theirs["in.0"]
        for kind, name in _TOKENS.items():
            wanted = real if types is None else real & (types == kind)
            if wanted.any() and (kind == 0 or types is not None):
                row(EMBEDDINGS, _apart(ours[wanted], expected[wanted]), name)

    def ends(i: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: tuple[Tensor, KeyValue]) -> None:
            expected = theirs[f"out.{i}"]
            ties = choices[i].last() if i in choices else None
            given = shared[module.layer.kv_source] if module.layer.shares_kv else None
            on_theirs, kv = module.forward(theirs[f"in.{i}"].transpose(0, 1).contiguous(), *args[1:4], given)
            shared.setdefault(module.layer.kv_source, kv)
            accumulated_error = _apart(output[0].transpose(0, 1)[real], expected[real])
            value = _apart(on_theirs.transpose(0, 1)[real], expected[real])
            if task.layers is None or i in task.layers:
                # What our router would choose of transformers' input is a matter of this layer alone.
                value = max(value, choices[i].last().widest if i in choices else 0.0)
                row(f"layer {i}", value, _layer_detail(module.layer.kind, accumulated_error, ties))
            say.layer()

        return hook

    source = DistReader(task.megatron) if task.megatron is not None else open_hf_folder(task.folder)
    with source as reader:
        weights = OurWeights(model, table_for(task.geometry), reader, task.megatron is not None)
        first = model.decoder.layers[0]
        first.register_forward_pre_hook(embedded)
        for i, layer in enumerate(model.decoder.layers):
            if i in task.run:
                layer.register_forward_hook(ends(i))
                if layer.moe is not None:
                    choices[i] = GivenChoices(layer.moe.router, theirs[f"experts.{i}"], real)
            else:
                layer.forward = lambda hidden_states, *args, **kwargs: (hidden_states, None)
        ours = _our_logits(model, task, weights)
    if task.layers is None:
        ours = ours[..., : task.geometry.vocab_size]
        expected = theirs[LOGITS]
        largest = expected[real].abs().max().item()
        row(LOGITS, (ours[real] - expected[real]).abs().max().item() / largest, f"of {largest:.3g} at most")
    return [*checks, _peak_memory(task)]


def _peak_memory(task: StreamedTask) -> Check:
    """Of both sides, where one process ran them."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # it is in KiB
    return Check("memory", task.variant, Parallel(), "float32", "peak GB", peak, None, "of the process")


def _layer_detail(kind: str, accumulated_error: float, ties: Ties | None) -> str:
    detail = f"{kind}; {accumulated_error:.1e} on our own layers' output"
    if ties is not None and ties.tokens:
        detail += f", where {ties.tokens} chose experts by {ties.widest:.0e} of a logit"
    return detail


def _our_logits(model: Any, task: StreamedTask, weights: OurWeights) -> Tensor:
    """[b, s, vocab] of the sample; layers come and go, tables and the head are read by rows."""
    tables = [model.embedding.word_embeddings.weight]
    if model.decoder.ple is not None:
        tables.append(model.decoder.ple.embed_tokens.weight)
    head = EMBEDDING if task.geometry.tied else "output_layer.weight"
    unused = [] if model.output_layer.weight is None else [model.output_layer.weight]
    _prepare(model, model.decoder.layers, tables, unused, task, weights)
    by_words = _HeadByWords(lambda: weights.rows_of(head) if task.layers is None else ())

    def logits(*, hidden_states: Tensor, scale_logits: Any, **others: Any) -> Tensor:
        return scale_logits(by_words(hidden_states)).transpose(0, 1)

    sample = task.sample
    output: Tensor = model(sample.input_ids, None, sample.attention_mask, output_processor=logits, **sample.features())
    return output


def _empty_transformers(task: StreamedTask) -> Any:
    """The class that the config names, with memory that is asked for and not touched."""
    import transformers
    from transformers.initialization import no_init_weights

    options: dict[str, Any] = {"experts_implementation": "eager"} if task.geometry.moe is not None else {}
    config = transformers.AutoConfig.from_pretrained(task.folder, local_files_only=True)
    with no_init_weights():
        made = getattr(transformers, task.geometry.architecture)._from_config(
            config, attn_implementation="eager", dtype=torch.float32, **options
        )
    return made.eval()


def _prepare(
    model: nn.Module,
    decoder_layers: Sequence[nn.Module],
    tables: Sequence[Tensor],
    head: Sequence[Tensor],
    task: StreamedTask,
    weights: OurWeights | TheirWeights,
) -> None:
    """Layers come and go, or are not read where they do not run; `tables` have the rows that are looked up; `head` is
    read by words; all else stays."""
    layers = [layer for layer in layers_of(model) if tensors_of(layer)]
    idle = {id(layer) for i, layer in enumerate(decoder_layers) if i not in task.run}
    come_and_go([x for x in layers if id(x) not in idle], lambda layer: weights.load(list(tensors_of(layer).values())))
    apart = {id(x) for layer in layers for x in tensors_of(layer).values()} | {id(x) for x in (*tables, *head)}
    weights.load([tensor for tensor in tensors_of(model).values() if id(tensor) not in apart])
    rows = {0, task.geometry.pad_token_id or 0, *task.sample.input_ids.flatten().tolist()}
    for table in tables:
        table.data = torch.empty(table.shape, dtype=table.dtype)  # memory that nothing has touched yet
        weights.load_rows(table, sorted(row for row in rows if row < len(table)))


class _HeadByWords(nn.Module):
    """A linear to the vocabulary, some words at a time."""

    def __init__(self, rows: Callable[[], Iterable[Tensor]]) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[.., h] -> [.., vocab], or [.., 0] without any rows."""
        return torch.cat([hidden_states[..., :0], *(hidden_states @ rows.t() for rows in self.rows())], dim=-1)


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """The worst token's ‖ours - theirs‖ / ‖theirs‖, of [n, h]."""
    if not torch.isfinite(ours).all():
        return float("inf")
    return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-30)).max().item()


class _Progress:
    """Says in a file where a side is: the process that asked reads it, a rank has no terminal."""

    def __init__(self, side: str, task: StreamedTask) -> None:
        self.side, self.layers, self.file, self.done = side, len(task.run), task.progress, 0

    def layer(self) -> None:
        """Another layer has run."""
        self.done += 1
        if self.done % 5 == 0 or self.done == self.layers:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{self.side}: {self.done} of {self.layers} layers\n")
