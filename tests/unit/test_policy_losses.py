"""GRPO and its kin on fixed rollouts: losses, gradients and advantages against TRL's own code."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.losses.grpo import LOSSES, AnswerLogps, PolicyOptions, group_advantages, group_std, leave_one_out
from recipes.losses.policy import PolicyLoss
from recipes.train.rollouts import RewardedAnswer, batch_of

trl = pytest.importorskip("trl", minversion="1.16", reason="the losses are compared with TRL's")

LOSS, GRADIENT = 1e-5, 1e-4
ROWS, LENGTH = 8, 13
# TRL's names of the loss and of the level of its ratios.
THEIRS = {"grpo": ("grpo", "token"), "dapo": ("dapo", "token"), "dr_grpo": ("dr_grpo", "token")}
THEIRS["gspo"] = ("grpo", "sequence")


def rollouts(seed: int = 0, importance: bool = False) -> tuple[AnswerLogps, PolicyOptions]:
    """Answers of 1 to LENGTH tokens whose policy has moved so far that some ratios are clipped on either side."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    lengths = torch.tensor([1, 13, 5, 9, 2, 13, 7, 4])[:, None]
    logps = -some(ROWS, LENGTH).abs() - 0.1
    answers = AnswerLogps(
        logps=logps.requires_grad_(),
        old_logps=(logps + 0.3 * some(ROWS, LENGTH)).detach(),
        advantages=some(ROWS),
        mask=torch.arange(LENGTH) < lengths,
        ref_logps=(logps + 0.5 * some(ROWS, LENGTH)).detach(),
        importance=some(ROWS, LENGTH).exp().clamp(max=2.0) if importance else None,
    )
    return answers, PolicyOptions(epsilon=0.2, epsilon_high=0.28, beta=0.04, max_length=LENGTH)


class _Accelerator:
    num_processes = 1
    device = torch.device("cpu")

    def gather(self, value: Tensor) -> Tensor:
        return value

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        return value


def their_loss(name: str, answers: AnswerLogps, options: PolicyOptions) -> Tensor:
    """What TRL's trainer makes of the same rollouts."""
    kind, level = THEIRS.get(name, ("", ""))
    trainer_class = trl.RLOOTrainer if name == "rloo" else trl.GRPOTrainer
    inputs: dict[str, Any] = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(ROWS, LENGTH, dtype=torch.int64),
        "completion_mask": answers.mask.long(),
        "advantages": answers.advantages,
        "old_per_token_logps": answers.old_logps,
        "old_logps": (answers.old_logps * answers.mask).sum(-1),
        "ref_per_token_logps": answers.ref_logps,
        "num_items_in_batch": answers.mask.sum(),
        "importance_sampling_ratio": answers.importance,
    }
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (answers.logps, torch.zeros(ROWS, LENGTH), None),
        accelerator=_Accelerator(),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        current_gradient_accumulation_steps=1,
        loss_type=kind,
        importance_sampling_level=level,
        max_completion_length=options.max_length,
        epsilon_low=options.epsilon,
        epsilon_high=options.epsilon_high,
        beta=options.beta,
        use_vllm=answers.importance is not None,
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        _entropy_bonus_enabled=False,
    )
    loss: Tensor = trainer_class._compute_loss(trainer, None, inputs)
    return loss


@pytest.mark.parametrize("importance", [False, True], ids=["", "importance"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_trls(name: str, importance: bool, record_property: Any) -> None:
    if importance and name == "rloo":
        pytest.skip("TRL's RLOO corrects nothing")
    worst = [0.0, 0.0]
    for seed in range(5):
        answers, options = rollouts(seed, importance)
        total, count = LOSSES[name](answers, options)
        ours = total / count
        (gradient,) = torch.autograd.grad(ours, answers.logps)
        theirs = their_loss(name, answers, options)
        (their_gradient,) = torch.autograd.grad(theirs, answers.logps)
        worst[0] = max(worst[0], float((ours - theirs).detach().abs() / theirs.detach().abs()))
        worst[1] = max(worst[1], float((gradient - their_gradient).norm() / their_gradient.norm()))
        assert not gradient[~answers.mask].any()
    record_property("worst", worst)
    assert worst[0] <= LOSS and worst[1] <= GRADIENT, worst


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_in_parts_is_the_batch(name: str) -> None:
    answers, options = rollouts()
    total, count = LOSSES[name](answers, options)
    sums, counts = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    for part in (slice(0, 3), slice(3, ROWS)):
        fields = {key: None if value is None else value[part] for key, value in vars(answers).items()}
        more, of = LOSSES[name](AnswerLogps(**fields), options)
        sums, counts = sums + more, counts + of
    torch.testing.assert_close(sums / counts, total / count)


class _Alone:
    """A context-parallel group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize("name", LOSSES)
def test_packed_answers_are_the_answers(name: str) -> None:
    """The sums of a microbatch and the gradient of every token, whether rows hold one answer or are packed."""
    geometry: Any = SimpleNamespace(placeholder_ids=(99,), pad_token_id=0)
    dice = torch.Generator().manual_seed(0)
    rows = []
    for number, length in enumerate([1, 7, 4, 5]):
        tokens, logprobs = torch.randint(1, 90, (length,), generator=dice), -torch.rand(length, generator=dice) - 0.1
        tokens[-1] = 99
        asked, said = tuple(range(2, 4 + number)), (tuple(tokens.tolist()), tuple(logprobs.tolist()))
        rows.append(RewardedAnswer(0, asked, *said, (-1.0) ** number, (0.5, 1.0, 0.0, 0.5)))
    objective = PolicyLoss(name, PolicyOptions(epsilon=0.1, max_length=7), ("length",), on_policy=False)
    found = []
    for packed in (0, 32):
        questions: Any = None
        batch = batch_of(rows, questions, geometry, 0, False, packed=packed)
        assert batch["input_ids"].shape == (4, packed // 4 or 10) and ("cu_seqlens" in batch) == bool(packed)
        labelled = batch["sequence_ids"] >= 0
        said = [token for row in rows for token in row.tokens]
        assert batch["labels"][labelled].tolist() == said and (batch["labels"][~labelled] == -100).all()
        # What was sampled follows its label, but where it is a placeholder.
        read = batch["input_ids"].flatten()[labelled.flatten().nonzero()[:, 0] + 1].tolist()
        assert read == [0 if token == 99 else token for token in said]
        losses = torch.zeros(labelled.shape)
        losses[labelled] = 0.1 + 0.05 * torch.arange(int(labelled.sum()))
        losses.requires_grad_()
        group: Any = _Alone()
        loss, count, sums = objective.sums(losses, batch, group)
        (gradient,) = torch.autograd.grad(loss, losses)
        assert not gradient[~labelled].any() and count == objective.count(batch)
        found.append((loss, count, sums, gradient[labelled]))
    torch.testing.assert_close(*found)


def test_advantages_are_trls() -> None:
    """Groups of four: differing rewards, one that could not be rewarded, all alike, and none but one."""
    nan = torch.nan
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, nan, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, nan, nan, nan, 3.0])
    from trl.trainer.utils import nanstd

    groups = rewards.view(-1, 4)
    centred = rewards - groups.nanmean(1).repeat_interleave(4)
    of_group = nanstd(groups, dim=1).repeat_interleave(4)
    for scale, std in (("group", of_group), ("batch", nanstd(rewards).expand_as(rewards))):
        wanted = (centred / (std + 1e-4)).nan_to_num(nan=0.0)
        found = group_advantages(rewards, 4, scale)
        torch.testing.assert_close(found[:12], wanted[:12])
        assert not found[12:].any()
    torch.testing.assert_close(group_advantages(rewards, 4, "none"), centred.nan_to_num(nan=0.0))
    torch.testing.assert_close(group_std(rewards, 4)[:12], of_group[:12])
    counts = (~groups.isnan()).sum(1, keepdim=True)
    baselines = ((groups.nansum(1, keepdim=True) - groups) / (counts - 1)).view(-1)
    wanted = (rewards - baselines).nan_to_num(nan=0.0)
    torch.testing.assert_close(leave_one_out(rewards, 4)[:12], wanted[:12])
    assert not leave_one_out(rewards, 4)[12:].any()
