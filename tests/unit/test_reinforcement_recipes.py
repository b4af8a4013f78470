"""Recipes of rewards: what is refused, and what it says."""

from __future__ import annotations

import pytest

from bridge.errors import UsageError
from recipes.check import check_recipe
from recipes.config import resolve

MINIMAL = {
    "output": "run",
    "model": {"hf": "toy"},
    "grpo": {"rewards": ["number"]},
    "train": {"steps": 10, "global_batch_size": 8, "seq_length": 512},
}


def test_a_recipe_of_rewards_is_taken() -> None:
    assert check_recipe(resolve(MINIMAL, ["grpo.loss=dapo", "grpo.epsilon_high=0.28"]), 1) == 8
    assert check_recipe(resolve(MINIMAL, ["grpo.beta=0.1", "lora.rank=4"]), 1) == 8
    more = ["grpo.num_generations=16", "grpo.steps_per_generation=2", "grpo.rewards=[number,length]"]
    assert check_recipe(resolve(MINIMAL, ["parallel.cp=2", "data.packing=true"]), 2) == 8
    assert check_recipe(resolve(MINIMAL, [*more, "grpo.reward_length=9", "grpo.reward_weights=[1,0.1]"]), 2) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["grpo.rewards=[]", "grpo.beta=0.1"], "grpo.beta needs grpo.rewards"),
        (["grpo.rewards=[numbr]"], "grpo.rewards: 'numbr' is no reward; there are exact_match, number"),
        (["grpo.reward_weights=[1,2]"], "grpo.reward_weights=[1.0, 2.0]: there are 1 rewards"),
        (["grpo.reward_length=3"], "grpo.reward_length=3: is for length"),
        (["grpo.loss=dr-grpo"], "grpo.loss=dr-grpo: there is none; did you mean dr_grpo?"),
        (["grpo.scale_rewards=no"], "grpo.scale_rewards=False: is one of auto, group, batch, none"),
        (["grpo.loss=rloo", "grpo.scale_rewards=group"], "grpo.scale_rewards=group: rloo's advantages are not scaled"),
        (["grpo.engine=sglang"], "grpo.engine=sglang: is one of own, vllm"),
        (["grpo.engine=vllm"], "grpo.engine=vllm and grpo.engine_url, such as http://127.0.0.1:8000, go together"),
        (["grpo.engine_url=http://h:1"], "grpo.engine=vllm and grpo.engine_url"),
        (["grpo.router_replay=true"], "grpo.router_replay: is not there yet"),
        (["grpo.num_generations=1"], "grpo.num_generations=1: must be at least 2"),
        (["grpo.num_generations=3"], "= 8 answers are not divisible by grpo.num_generations=3; 9 would work"),
        (["grpo.epsilon=1"], "grpo.epsilon=1: must be below 1"),
        (["grpo.reward_timeout=0"], "grpo.reward_timeout=0: must be above 0"),
        (["grpo.max_new_tokens=512"], "leaves no room for a prompt in train.seq_length=512"),
        (["grpo.beta=0.1"], "grpo.beta=0.1: the reference is the model without new adapters (lora.rank), no other yet"),
        (["grpo.beta=0.1", "lora.rank=4", "grpo.loss=rloo"], "grpo.beta=0.1: with rloo the KL is part of the reward"),
        (["data.overlong=split"], "data.overlong=split: a question cannot be cut"),
        (["train.epochs=2"], "train.epochs=2.0: count rows of data, and these are sampled; set train.steps"),
        (["train.z_loss=0.1"], "train.z_loss=0.1: is added to token losses"),
        (["data.supervise_thinking=false"], "what is learnt of an answer is the reference"),
        (["drafter.path=x"], "drafter.path=x: trains a drafter on data; leave it out with grpo.rewards"),
        (["preference.loss=sigmoid"], "preference.loss=sigmoid: is of answers that are there"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_recipe(resolve(MINIMAL, overrides), 1)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.num_generation=4", "did you mean grpo.num_generations?"),
        ("grpo.loss_type=dapo", "did you mean grpo.loss?"),
        ("grpo.max_completion_length=4", "did you mean grpo.max_new_tokens?"),
        ("reward_funcs=[number]", "did you mean grpo.rewards?"),
        ("grpo.use_vllm=true", "did you mean grpo.engine?"),
        ("grpo.vllm_server_base_url=http://h:1", "did you mean grpo.engine_url?"),
        ("preference.loss_type=sigmoid", "did you mean preference.loss?"),
        ("grpo.temperature=0.7", "unknown key grpo.temperature; there are rewards"),
    ],
)
def test_the_key_that_was_meant(override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(MINIMAL, [override])
    assert message in str(caught.value)
