"""Mix-up of input embeddings: a trainer that learns from blends of two texts and of their labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .mixup_args import MixupArguments
from .naming import in_training_mode, unwrap, without_adapters
from .traceless import evaluated

__all__ = ["MixupArguments", "MixupMixin"]


class MixupMixin:
    """Blends the texts of a batch in pairs while a sequence classifier is trained; put it before the trainer.

    `class MyTrainer(MixupMixin, L2SPTrainer)`, with arguments from
    `class MyArguments(MixupArguments, L2SPTrainingArguments)`.

    In every micro-batch E(x) becomes s·E(x) + (1 − s)·E(x'), with x' from a random permutation of the rows and s from
    Beta(`mixup_alpha`, `mixup_alpha`); what either row attends to is attended to, and token types stay those of x. The
    loss is s·CE(y) + (1 − s)·CE(y'), label smoothing included, a mean over the rows of the whole optimizer step.

    s and the pairs come from torch's random numbers on the CPU, which `Trainer` saves in its checkpoints. Evaluation
    and prediction, and everything with `mixup_alpha` 0, are those of the trainer that follows.

    Source: Guo, Mao and Zhang, 2019 (arXiv 1905.08941), after Zhang et al., 2018 (arXiv 1710.09412).

    Raises:
        ValueError: In the first training step: the model takes no embeddings or says something else to them than to
            their tokens, labels are not one class per row, or the loss or the launch do not allow it.
    """

    # Set by the trainer that follows in the bases.
    args: Any
    _mixup_given: Any = None
    _mixup_paused = False
    _mixup_drawn: tuple[float, Tensor] = (1.0, torch.empty(0, dtype=torch.long))
    _mixup_checked = 0

    @property
    def _mixup_on(self) -> bool:
        return getattr(self.args, "mixup_alpha", 0.0) > 0

    # With one, Trainer counts the labels of the whole step and leaves the division by them to it.
    @property
    def compute_loss_func(self) -> Any:
        return self._mixup_loss if self._mixup_on and not self._mixup_paused else self._mixup_given

    @compute_loss_func.setter
    def compute_loss_func(self, function: Any) -> None:
        self._mixup_given = function

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of the blended rows for a model in training mode; what the trainer that follows computes else."""
        if self._mixup_on and in_training_mode(model):
            inputs = self._mixup_inputs(unwrap(model), inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self._mixup_paused = True
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._mixup_paused = False

    def _mixup_inputs(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        self._mixup_check(model, inputs, rest)
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        alpha = torch.tensor(self.args.mixup_alpha, dtype=torch.float64, device="cpu")
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        pairs = torch.randperm(len(embeddings), device="cpu").to(embeddings.device)
        self._mixup_drawn = share, pairs
        if "attention_mask" in rest:
            rest["attention_mask"] = torch.maximum(rest["attention_mask"], rest["attention_mask"][pairs])
        return {**rest, "inputs_embeds": share * embeddings + (1 - share) * embeddings[pairs]}

    def _mixup_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        share, pairs = self._mixup_drawn
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        options: dict[str, Any] = {"reduction": "sum", "label_smoothing": self.args.label_smoothing_factor}
        own, other = (functional.cross_entropy(logits, y, **options) for y in (labels, labels[pairs]))
        items = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        return (share * own + (1 - share) * other) / torch.as_tensor(items, device=logits.device).clamp(min=1)

    def _mixup_check(self, model: Any, inputs: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
        """Refuses what mix-up would make wrong: in the first step, and again at the first batch with padding."""
        mask = inputs.get("attention_mask")
        if self._mixup_checked == 2 or self._mixup_checked == 1 and (mask is None or bool(mask.all())):
            return
        reason = _refusal(self, model, inputs) or _difference(model, inputs["input_ids"], rest)
        if reason is not None:
            raise ValueError(f"mixup_alpha={self.args.mixup_alpha}: {reason}. Set mixup_alpha=0.")
        self._mixup_checked = 1 if mask is None or bool(mask.all()) else 2


def _refusal(trainer: Any, model: Any, inputs: Mapping[str, Any]) -> str | None:
    base = without_adapters(model)  # PEFT's forward takes anything
    if "inputs_embeds" not in inspect.signature(base.forward).parameters:
        return f"{type(base).__name__}.forward takes no inputs_embeds, which are what mix-up blends"
    known = {"input_ids", "attention_mask", "token_type_ids", "labels"}
    if "input_ids" not in inputs or not known.issuperset(inputs):
        return f"the inputs are {list(inputs)}; mix-up blends input_ids and can deal with {sorted(known)} only"
    labels = inputs.get("labels")
    if labels is None or labels.dim() != 1 or labels.is_floating_point():
        return "mix-up is for one class per sequence, and the labels are not that"
    if trainer._mixup_given is not None:
        return "mix-up is for the cross-entropy, and compute_loss_func is another loss"
    if getattr(trainer, "_distill_on", False):
        return "a teacher's answers to the texts are no answers to their blends; leave one of both out"
    if trainer.args.n_gpu > 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "mix-up looks embeddings up outside of the model, which DataParallel, FSDP and DeepSpeed do not allow"
    return None


def _difference(model: Any, tokens: Tensor, rest: Mapping[str, Any]) -> str | None:
    """Whether the model tells tokens from their embeddings: without tokens some look for the last one elsewhere."""
    inputs = {name: value for name, value in rest.items() if name != "labels"}
    try:
        with torch.no_grad(), evaluated(model):
            expected = model(input_ids=tokens, **inputs)["logits"]
            logits = model(inputs_embeds=model.get_input_embeddings()(tokens), **inputs)["logits"]
    except NotImplementedError as error:
        return f"{type(model).__name__} refuses inputs_embeds ({error})"
    if torch.allclose(logits, expected, rtol=1e-3, atol=1e-3):
        return None
    return f"{type(model).__name__} gives other logits for embeddings than for the tokens that they are of"
