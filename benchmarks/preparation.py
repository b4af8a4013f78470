"""Preparing chats: records a second of CPU, here and by `datasets.map(batched=True)` with template and tokenizer.

`python benchmarks/preparation.py [--tokens 90 900] [--records 20000] [--workers 1 2] [--runs 3]`. Chats of four turns
on a toy's tokenizer. Here: JSON lines to a finished cache with masks and checks, all the user and system time of the
process and its children but for loading the tokenizer; there: `map` alone, on a data set in memory, which it writes as
Arrow. The best of the runs; two processes are started before the clock runs, and what that takes has a line of its own.
Take so many records that both have more than a few groups, of a second each: the last is worked on by one of them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.data import CorpusOptions
from recipes.data.cache import CacheParts
from recipes.data.chat import ChatModel
from recipes.data.processes import Processes
from recipes.data.record_sources import find_sources
from recipes.data.tokenising import ReadShare, groups_of, tokenise, with_processes

_WORDS = [
    "the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "as", "his", "they", "be",
    "at", "one", "have", "this", "from", "or", "had", "by", "hot", "word", "but", "what", "some", "we", "can", "out",
    "other", "were", "all", "there", "when", "up", "use", "your", "how", "said", "an", "each", "she", "which", "do",
    "their", "time", "if", "will", "way", "about",
]  # fmt: skip
_TURNS = 4


@dataclass(frozen=True)
class Spent:
    """Seconds: of the clock, and of CPUs (user and system, children that have ended included).

    `parent`: of the CPU's, those of this process, where others work for it: what no number of them takes off it.
    `start`: of the clock and of the CPUs, before, until others were ready.
    """

    wall: float
    cpu: float
    parent: float = 0.0
    start: tuple[float, float] = (0.0, 0.0)


def timed(work: Callable[[], None]) -> Spent:
    """What `work` takes."""

    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    wall, before = time.perf_counter(), cpu()
    work()
    return Spent(time.perf_counter() - wall, cpu() - before)


def chats(count: int, tokens: int, chat: ChatModel) -> list[dict[str, Any]]:
    """Conversations of about so many tokens in the mean."""
    dice = random.Random(0)

    def conversation(words: int) -> dict[str, Any]:
        texts = (" ".join(dice.choices(_WORDS, k=max(1, round(words * dice.uniform(0.5, 1.5))))) for _ in range(_TURNS))
        return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}

    # As many words as give as many tokens, by a trial.
    trial = [conversation(100) for _ in range(50)]
    lengths = [len(chat.tokenizer.apply_chat_template(one["messages"], return_dict=True)["input_ids"]) for one in trial]
    frame = len(chat.tokenizer.apply_chat_template(conversation(0)["messages"], return_dict=True)["input_ids"]) - _TURNS
    words = 100 * (tokens - frame) / max(1.0, sum(lengths) / len(lengths) - frame)
    return [conversation(round(words)) for _ in range(count)]


def ours(path: Path, model: Path, workers: int, speed: float) -> Spent:
    """The parts of a cache, and the cache of them. `speed`: of one process, records a second."""
    options = CorpusOptions(str(path), 8192, workers=workers)
    chat, sources = ChatModel(model, options), find_sources(options.paths)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        parts, joined = CacheParts(Path(folder, "parts")), Path(folder, "joined")
        joined.mkdir()
        if workers == 1:

            def alone() -> None:
                tokenise(parts, chat, options, sources, lambda read, share: None, lambda line: None)
                parts.join(joined)

            return timed(alone)
        settings, began = (model, options, [path.parent], parts.folder), time.perf_counter()
        processes = Processes(workers, "recipes.data.worker", settings)
        while not processes.ready:
            time.sleep(0.05)
        start, before = time.perf_counter() - began, _children(processes)

        def together() -> None:
            batches = ((0, batch) for batch in sources[0].record_batches())
            groups, share = groups_of(batches, speed), ReadShare(sources)
            with_processes(parts, processes, workers, groups, lambda read, share: None, lambda line: None, share)
            parts.join(joined)

        spent = timed(together)
        spent = Spent(spent.wall, spent.cpu + _children(processes) - before, spent.cpu, (start, before))
        processes.close()
        return spent


def _children(processes: Processes) -> float:
    """CPU seconds of processes that run."""
    seconds = 0.0
    for pid in processes.pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def theirs(rows: list[dict[str, Any]], chat: ChatModel) -> Spent:
    """`datasets.map`, batched, template and tokenizer."""
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    tokenizer = chat.tokenizer

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        return dict(tokenizer(texts, add_special_tokens=False))

    with tempfile.TemporaryDirectory() as folder:
        data = datasets.Dataset.from_list(rows)
        return timed(lambda: data.map(encode, batched=True, cache_file_name=f"{folder}/map.arrow") and None)


def main() -> None:
    """Print a line for each length and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[90, 900])
    parser.add_argument("--records", type=int, default=20_000, help="of the shortest; of others as many tokens")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    # One thread each: what is compared is CPU time.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from bridge.toy import write_toy

    with tempfile.TemporaryDirectory() as folder:
        model, path = Path(folder, "toy"), Path(folder, "data.jsonl")
        write_toy("e2b", model, text_only=True)
        chat = ChatModel(model, CorpusOptions("x", 8192))
        for tokens in arguments.tokens:
            rows = chats(arguments.records * min(arguments.tokens) // tokens, tokens, chat)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            report(tokens, rows, measured(rows, path, model, chat, arguments.workers, arguments.runs))


def measured(
    rows: list[dict[str, Any]], path: Path, model: Path, chat: ChatModel, workers: Sequence[int], runs: int
) -> dict[str, list[Spent]]:
    """The runs of each way, by its name."""
    found = {"datasets.map": [theirs(rows, chat) for _ in range(runs)]}
    speed = 1e4
    for count in sorted(workers):
        spent = found[f"{count} process(es)"] = [ours(path, model, count, speed) for _ in range(runs)]
        speed = len(rows) / spent[0].wall if count == 1 else speed
    return found


def report(tokens: int, rows: Sequence[Any], found: dict[str, list[Spent]]) -> None:
    """Print a line for each way, and what others take of this process."""
    load, alone = os.getloadavg()[0], found.get("1 process(es)")
    per_cpu = {name: len(rows) / min(one.cpu for one in spent) for name, spent in found.items()}
    for name, spent in found.items():
        wall = min(one.wall for one in spent)
        said = f"{per_cpu[name]:.0f} a CPU second ({per_cpu[name] / per_cpu['datasets.map']:.2f})"
        times = f" ({min(one.wall for one in alone) / wall:.2f} times one process)" if alone else ""
        print(
            f"{tokens} tokens | {name} | {said} | {len(rows) / wall:.0f} a second{times} | load {load:.1f}", flush=True
        )
        least = min(spent, key=lambda one: one.cpu)
        if least.parent:
            of_each = [1e6 * seconds / len(rows) for seconds in (least.cpu - least.parent, least.parent)]
            print(
                f"  a sample: {of_each[0]:.0f} µs of a worker, {of_each[1]:.0f} µs of the parent; to start them "
                f"{least.start[0]:.1f} s by the clock, {least.start[1]:.1f} of CPU",
                flush=True,
            )


if __name__ == "__main__":
    main()
