"""The language-modelling head computed at the masked positions alone.

The loss looks at about 15 % of the positions. The head of a small model costs as much as its body, all of it spent on
a row of vocabulary size for every position; the other 85 % are left out here, by hooks, with the same loss.
"""

from __future__ import annotations

from typing import Any

import torch
from _mlm_masking import IGNORED
from torch import Tensor, nn


def predict_masked_only(model: Any) -> bool:
    """Makes `model(**batch with labels)` return logits of the masked positions alone. Shape: [1, masked, vocabulary].

    Without labels nothing changes. Returns whether it was done: not for a model whose head does not treat each
    position on its own, which is tried out.
    """
    body = model.base_model
    if body is model:
        return False
    hooks = _Hooks()
    handles = (
        model.register_forward_pre_hook(hooks.before, with_kwargs=True),
        body.register_forward_hook(hooks.between),
        model.register_forward_hook(hooks.after, always_call=True),
    )
    if _agrees(model):
        return True
    for handle in handles:
        handle.remove()
    return False


def masked_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits at the masked positions, in the order of the rows, and their labels; from either form of logits.

    Shape:
        labels: [rows, tokens]; results: [masked, vocabulary], [masked]
    """
    masked = labels.ne(IGNORED)
    chosen = labels[masked]
    if logits.shape[:2] == labels.shape:
        return logits[masked], chosen
    return logits[0, : len(chosen)], chosen  # Trainer fills them up where another process has more


class _Hooks:
    """Knows which positions are masked in the batch that is computed."""

    masked: Tensor | None = None

    def before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        labels = kwargs.get("labels")
        self.masked = None if labels is None else labels.ne(IGNORED)
        if self.masked is None:
            return None
        return args, {**kwargs, "labels": labels[self.masked][None]}

    def between(self, body: nn.Module, args: Any, output: Any) -> Any:
        if self.masked is None:
            return None
        chosen = output[0][self.masked][None]
        if isinstance(output, tuple):
            return (chosen, *output[1:])
        output["last_hidden_state"] = chosen
        return output

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        self.masked = None


def _agrees(model: Any) -> bool:
    """Whether the logits are those that the model gives at these positions without the hooks."""
    training, device = model.training, next(model.parameters()).device
    ids = torch.arange(12, device=device).view(2, 6) % model.config.vocab_size
    labels = torch.full_like(ids, IGNORED)
    labels[0, 1], labels[1, 3:5] = 1, 2
    model.eval()
    try:
        with torch.no_grad():
            everywhere = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            sparse = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).logits
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        model.train(training)
    expected = everywhere[labels.ne(IGNORED)][None]
    return sparse.shape == expected.shape and torch.allclose(sparse, expected, rtol=1e-3, atol=1e-3)
