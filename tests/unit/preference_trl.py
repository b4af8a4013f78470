"""What TRL's own code makes of the log-probabilities of `preference_cases`: `python -m tests.unit.preference_trl`.

Its loss functions are methods of trainers: they are called on objects that have what they read, and no more. Writes
`preference_trl.json`; needs TRL 1.16.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.unit.preference_cases import CASES, Case, batch_of, desirable, labels, lengths, mask, token_losses

LOGGED = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "nll_loss",
)


def main() -> None:
    recorded = {name: of(case) for name, case in CASES.items()}
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in recorded.items())
    where = Path(__file__).with_name("preference_trl.json")
    where.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def of(case: Case) -> dict[str, Any]:
    """The loss and the figures that TRL logs, and the gradient of the loss to the token losses."""
    losses = token_losses(case).requires_grad_()
    if case.losses[0] in ("kto", "apo_zero_unpaired"):
        loss, logged = _kto(case, losses)
    elif case.losses[0] in ("orpo", "cpo", "simpo"):
        loss, logged = _without_reference(case, losses)
    else:
        loss, logged = _dpo(case, losses)
    loss.backward()
    figures = {"loss": float(loss.detach())} | {name: float(logged[name]) for name in LOGGED if name in logged}
    assert losses.grad is not None
    return {"figures": figures, "gradient": [[float(f"{x:.7g}") for x in row] for row in losses.grad.tolist()]}


def _trainer(**said: Any) -> SimpleNamespace:
    def same(tensor: Tensor) -> Tensor:
        return tensor

    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
    common = {"model": torch.nn.Module(), "accelerator": accelerator, "aux_loss_enabled": False, "_tp_size": 1}
    common |= {"_metrics": defaultdict(lambda: defaultdict(list)), "_total_train_tokens": 0, "beta": 0.1}
    return SimpleNamespace(**(common | {"precompute_ref_logps": True, "label_smoothing": 0.0} | said))


def _outputs(losses: Tensor) -> SimpleNamespace:
    zeros = torch.zeros_like(losses)
    return SimpleNamespace(log_probs=-losses, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def _inputs(case: Case, order: Tensor) -> dict[str, Tensor]:
    """A token before the first label, so that shifted masks are the masks of the losses."""
    completion = torch.nn.functional.pad(mask()[order].long(), (1, 0))
    ids = torch.ones_like(completion)
    return {"input_ids": ids, "attention_mask": ids, "completion_mask": completion}


def _dpo(case: Case, losses: Tensor) -> tuple[Tensor, dict[str, float]]:
    from trl import DPOTrainer

    order = torch.cat([torch.arange(0, len(losses), 2), torch.arange(1, len(losses), 2)])
    said = {name: value for name, value in case.said.items() if name != "loss"}
    trainer = _trainer(
        **said,
        loss_types=list(case.losses),
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    trainer.loss_weights = case.said.get("loss_weights", [1.0] * len(case.losses))
    inputs = _inputs(case, order)
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = case.reference()[order].chunk(2)
    outputs = _outputs((losses * mask())[order])
    loss = DPOTrainer._compute_loss(trainer, lambda **unused: outputs, inputs, False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def _kto(case: Case, losses: Tensor) -> tuple[Tensor, dict[str, float]]:
    from trl import KTOTrainer

    said = {name: value for name, value in case.said.items() if name != "loss"}
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    trainer = _trainer(**(weights | said), loss_type=case.losses[0], calculate_KL=case.kl is not None)
    trainer._compute_kl_logps = lambda model, batch: torch.full((len(losses),), case.kl or 0.0)
    inputs = _inputs(case, torch.arange(len(losses)))
    inputs |= {"label": desirable(), "ref_logps": case.reference(), "ref_KL_logps": torch.zeros(len(losses))}
    outputs = _outputs(losses * mask())
    loss = KTOTrainer._compute_loss(trainer, lambda **unused: outputs, inputs, False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def _without_reference(case: Case, losses: Tensor) -> tuple[Tensor, dict[str, float]]:
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    batch = batch_of(case)
    logps = -(losses * mask()).sum(1)
    name = case.losses[0]
    if name != "cpo":
        logps = logps / lengths()
    chosen = (labels(case) != -100) & (torch.arange(len(losses)) % 2 == 0)[:, None]
    unused = torch.zeros(1)
    forward = (logps[::2], logps[1::2], unused, unused, losses[chosen].mean())
    said = {"cpo_alpha": 1.0, "simpo_gamma": 0.5} | {key: value for key, value in case.said.items() if key != "loss"}
    trainer = _trainer(**said, alpha=0.0, loss_type="simpo" if name == "simpo" else "sigmoid")
    trainer.concatenated_forward = lambda model, batch: forward
    kind: Any = ORPOTrainer if name == "orpo" else CPOTrainer
    for method in ("odds_ratio_loss", "cpo_loss"):
        if hasattr(kind, method):
            setattr(trainer, method, getattr(kind, method).__get__(trainer))
    loss: Tensor
    loss, logged = kind.get_batch_loss_metrics(trainer, None, batch)
    if not said["cpo_alpha"]:
        del logged["nll_loss"]  # TRL does not compute it then
    return loss, logged


if __name__ == "__main__":
    main()
