"""Timelines of simulated ranks, hardware profiles and pictures: what needs no model."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bridge.errors import UsageError
from bridge.megatron.parallel import Parallel
from recipes.config import resolve
from recipes.simulate.events import (
    Collective,
    Event,
    Group,
    Mark,
    Memory,
    SimulatedRank,
    Wait,
    Work,
    fewest_microbatches,
)
from recipes.simulate.hardware import PROFILES, Efficiency, Hardware, load_hardware
from recipes.simulate.plot import plot
from recipes.simulate.run import Forecast, Simulation, check_simulable, representatives, why
from recipes.simulate.table import HEAD, merged
from recipes.simulate.timeline import step_time

# One FLOP takes a second, as does a byte on any link; nothing else takes any.
UNIT = Hardware(
    "unit",
    1e-9,
    1e-12,
    1e-12,
    1e-9,
    1e-9,
    gpus_per_node=1,
    kernel_us=0,
    link_us=0,
    efficiency=Efficiency(*[1.0] * 7),
)
FORWARD, BACKWARD = 1, 2


def one_f_one_b(pp: int, stage: int, microbatches: int, size: int = 0) -> list[Event]:
    """The events of a stage, as Megatron's schedule without interleaving has them: it waits at once for what it
    receives. Messages have `size` bytes."""
    events: list[Event] = []
    group = Group("PIPELINE_MODEL_PARALLEL_GROUP", tuple(range(pp)))

    def message(kind: str, peer: int) -> None:
        if 0 <= peer < pp:
            events.append(Collective(kind, group, size, peer, len(events)))
            events.append(Wait(len(events) - 1))

    def run(name: str, flops: int) -> None:
        events.extend([Mark(name, True), Work(products=flops), Mark(name, False)])

    ahead = min(pp - stage - 1, microbatches)
    for _ in range(ahead):
        message("recv", stage - 1)
        run("forward", FORWARD)
        message("send", stage + 1)
    if microbatches > ahead:
        message("recv", stage - 1)
    for turn in range(microbatches - ahead):
        run("forward", FORWARD)
        message("send", stage + 1)
        message("recv", stage + 1)
        run("backward", BACKWARD)
        message("send", stage - 1)
        if turn < microbatches - ahead - 1:
            message("recv", stage - 1)
    for _ in range(ahead):
        message("recv", stage + 1)
        run("backward", BACKWARD)
        message("send", stage - 1)
    return events


def stages(pp: int, microbatches: int, size: int = 0) -> list[SimulatedRank]:
    memory = Memory(4, 8, 12, {"attention": 3}, "passes")
    return [SimulatedRank(i, i, microbatches, memory, {}, one_f_one_b(pp, i, microbatches, size)) for i in range(pp)]


@pytest.mark.parametrize(("pp", "microbatches"), [(1, 4), (2, 2), (4, 8), (4, 3), (8, 64)])
def test_the_bubble_is_that_of_the_formula(pp: int, microbatches: int) -> None:
    found = step_time(stages(pp, microbatches), Parallel(pp=pp), microbatches, UNIT)
    assert found.seconds == (FORWARD + BACKWARD) * (microbatches + pp - 1)
    assert found.bubble == pytest.approx((pp - 1) / (microbatches + pp - 1))
    assert sum(found.parts.values()) == pytest.approx(found.seconds)


@pytest.mark.parametrize("pp", [1, 2, 4, 8])
def test_a_few_microbatches_tell_of_many(pp: int) -> None:
    """Rounds of the steady phase are repeated: times and parts are those of the whole step."""
    layout, many = Parallel(pp=pp), 24
    few = fewest_microbatches(layout, many)
    whole = step_time(stages(pp, many, size=1), layout, many, UNIT)
    told = step_time(stages(pp, few, size=1), layout, many, UNIT)
    assert (told.seconds, told.parts) == (whole.seconds, pytest.approx(whole.parts))
    assert [[span.name for span in rank.spans] for rank in told.ranks] == [
        [span.name for span in rank.spans] for rank in whole.ranks
    ]


def test_a_collective_hides_behind_work_until_it_is_waited_for() -> None:
    group = Group("CONTEXT_PARALLEL_GROUP", (0, 1))
    events: list[Event] = [
        Collective("all_to_all", group, 6, None, 0),
        Work(products=2),
        Wait(0),
        Collective("all_reduce", group, 4, None, 3),
        Wait(3),
    ]
    rank = SimulatedRank(0, 0, 1, Memory(0, 0, 0, {}, "passes"), {}, events)
    found = step_time([rank], Parallel(cp=2), 1, UNIT)
    # Half of the six bytes go to the other rank, two seconds of them behind the work; all four of the sum.
    assert found.parts == {"context parallelism": 1 + 4, "products": 2} and found.seconds == 7


def test_stages_that_do_not_fit_together_are_said() -> None:
    first, last = stages(2, 2)
    with pytest.raises(RuntimeError, match="wait for each other"):
        step_time([first, stages(2, 3)[1]], Parallel(pp=2), 2, UNIT)
    assert step_time([first, last], Parallel(pp=2), 2, UNIT).seconds


def test_a_group_over_nodes_goes_by_the_network_that_its_gpus_share() -> None:
    found = load_hardware("h100")
    inside, network = found.link(tuple(range(8))), found.network_gb_s * found.efficiency.network * 1e9
    assert inside == found.nvlink_gb_s * found.efficiency.nvlink * 1e9
    assert found.link((0, 8)) == network and found.link((0, 1, 8, 9)) == 2 * network
    assert found.link(tuple(range(16))) == min(inside, 8 * network)


@pytest.mark.parametrize("name", [path.stem for path in PROFILES.glob("*.yaml")])
def test_shipped_profiles(name: str) -> None:
    found = load_hardware(name)
    assert found.name.lower() == name and 0 < found.uncertainty < 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peek_tflops": 1}, "peek_tflops: there is no such key; did you mean peak_tflops"),
        ({"memory_gb": 0}, "memory_gb=0: must be a number above 0"),
        ({"network_gb_s": "fast"}, "network_gb_s=fast: must be a number"),
        ({"efficiency": {"products": 1.5}}, "efficiency.products=1.5: is a part of the peak"),
        ({"uncertainty": 2}, "uncertainty=2: is at least 0 and below 1"),
        ({"peak_tflops": None}, "peak_tflops"),
    ],
)
def test_a_wrong_profile_is_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = tmp_path / "own.yaml"
    written = OmegaConf.to_container(OmegaConf.load(PROFILES / "h100.yaml"))
    assert isinstance(written, dict)
    OmegaConf.save(OmegaConf.create(written), path)
    assert load_hardware(str(path)) == load_hardware("h100")
    OmegaConf.save(OmegaConf.create(written | change), path)
    with pytest.raises(UsageError, match=r"own\.yaml") as error:
        load_hardware(str(path))
    assert said in str(error.value)
    with pytest.raises(UsageError, match="neither a file nor one of b200, h100, h200"):
        load_hardware("h1000")


def test_one_rank_of_each_stage_speaks_for_the_others() -> None:
    assert representatives(Parallel(tp=8, pp=4), 512) == [0, 128, 256, 384]


@pytest.mark.parametrize(
    "given",
    [
        "preference.loss=sigmoid",
        "grpo.rewards=[length]",
        "drafter.path=x",
        "distill.teacher=x",
        "model.layer_spec=te",
        "model.fp8=block",
        "model.fp8_experts=true",
    ],
)
def test_what_cannot_be_simulated_is_refused_by_name(given: str) -> None:
    base = {"output": "x", "model": {"hf": "e2b"}, "train": {"steps": 1}}
    check_simulable(resolve(base))
    with pytest.raises(UsageError, match=given.partition("=")[0].replace(".", r"\.")):
        check_simulable(resolve(base, [given]))


def told(pp: int, microbatches: int) -> Forecast:
    recipe = resolve({"output": "x", "train": {"steps": 1, "global_batch_size": 8, "seq_length": 100}})
    layout = Parallel(pp=pp)
    simulation = Simulation(recipe, layout, 16, microbatches, tuple(stages(pp, microbatches)))
    return Forecast(simulation, UNIT, simulation.time(UNIT), flops=48.0)


def test_a_forecast_in_figures() -> None:
    found = told(4, 8)
    assert found.seconds == 33 and found.span == (33 * 0.75, 33 * 1.25)
    assert found.tokens_per_s == pytest.approx(800 / 33)
    # One FLOP/s each.
    assert found.mfu == pytest.approx(48 / 33 / 16)
    assert found.gpu_hours(3600) == 33 * 16


def test_what_a_layout_loses_is_named() -> None:
    assert why(told(4, 8), told(8, 8)) == "PP8 takes +12.00 s: 12.00 s more in bubble"


def test_the_picture_has_every_pass_and_every_kind_of_memory(tmp_path: Path) -> None:
    found = told(4, 8)
    root = ElementTree.fromstring(plot(found))
    titles = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]
    for name in ("forward", "backward"):
        assert sum(title.startswith(f"{name}:") for title in titles) == 4 * 8
    assert sum(title.startswith("attention:") for title in titles) == 4
    assert "simulated, not run" in "".join(root.itertext())


def test_a_line_of_the_table_takes_the_place_of_its_own() -> None:
    row = "| {} | {} | TP2: 1 GB, {} s, MFU 9% | this one | 0% | |".format
    lines = [row("sft/31b", "8x80", 2), row("sft/e2b", "8x80", 1)]
    text = merged("head\n<!-- table: begin -->\n\n<!-- table: end -->\ntail\n", lines)
    assert text == merged(text, [])
    text = merged(text, [row("sft/31b", "8x80", 3), row("lora/31b, 131,072 tokens", "64x80", 4)])
    rows = [one for one in text.splitlines() if one.startswith("| ")]
    assert rows == [HEAD[0], lines[1], row("sft/31b", "8x80", 3), row("lora/31b, 131,072 tokens", "64x80", 4)]
    assert text.startswith("head\n<!-- table: begin -->\n") and text.endswith("\n<!-- table: end -->\ntail\n")
