"""The diagonal Fisher information, from the gradients of single examples: weights w for the penalty."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from transformers.utils import logging

from .backends import full_shape
from .fisher_rows import Row, has_label, rows_of, trimmed, with_drawn_labels
from .naming import canonical_name, unwrap
from .traceless import evaluated, own_randomness

logger = logging.get_logger(__name__)

# Gradients of so many bytes are held at a time where several examples go through the model together.
_AT_A_TIME = 1 << 28


def estimate_fisher(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    max_batches: int | None = None,
    *,
    labels: str = "data",
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Tensor]:
    """The diagonal Fisher information of a task: the mean over its examples of the squared gradient of their losses.

    An example is a row of a batch, its loss the model's own on that row alone, without padding and dropout. The
    square is taken of each example's gradient: that of a batch's mean would depend on the batch size. Rows whose
    labels are all -100 have no loss and do not count. Training mode, gradients and random states are left as they
    were.

    To use it as w: `save_fisher("fisher.safetensors", fisher)`, then `l2sp_weights="fisher.safetensors"`; or let the
    trainer do all of it with `l2sp_fisher_samples`.

    Args:
        model: A model of transformers that returns a loss for its inputs, whole on this process.
        dataloader: Batches of its inputs with labels, as a trainer's data loader gives them.
        max_batches: Batches to look at; None: all.
        labels: `data`: the empirical Fisher, with the labels that the batches have. `sampled`: the Fisher
            information proper, with labels drawn from the model's own probabilities; for models that classify
            sequences or tokens, and for language models.
        seed: Of what is drawn.
        progress: Whether to show a bar.

    Returns:
        A float32 tensor of its shape, on its device, for every trainable parameter, by canonical name; tied ones
        once. It takes as much memory as these parameters in float32, and while it is computed about twice that.

    Raises:
        ValueError: There are no examples, the model gives no loss or one that is not finite, is sharded, or has
            labels that cannot be drawn.

    Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", 2017 (arXiv 1612.00796);
    Kunstner et al., "Limitations of the empirical Fisher approximation", 2019 (arXiv 1905.12558).
    """
    found = squared_gradients(model, dataloader, max_batches, labels=labels, seed=seed, progress=progress)
    if not found.examples:
        raise ValueError("estimate_fisher: there is no example with a label in the batches; give it some.")
    return {name: total.div_(found.examples) for name, total in found.totals.items()}


def save_fisher(path: str | os.PathLike[str], fisher: Mapping[str, Tensor]) -> None:
    """Writes a Fisher information as a safetensors file that `l2sp_weights` takes.

    Args:
        path: Of the file.
        fisher: What `estimate_fisher` returned, perhaps scaled: λ·F is what counts.
    """
    save_file({name: value.detach().cpu().contiguous() for name, value in fisher.items()}, path)


class SquaredGradients(NamedTuple):
    """Sums over examples, by parameter name, and how many there were."""

    totals: dict[str, Tensor]
    examples: int


def squared_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    max_batches: int | None = None,
    *,
    labels: str = "data",
    seed: int = 0,
    progress: bool = True,
) -> SquaredGradients:
    """The sums that `estimate_fisher` divides; arguments and errors are the same."""
    if labels not in ("data", "sampled"):
        raise ValueError(f"labels={labels!r} is unknown; choose 'data' or 'sampled'.")
    bare = unwrap(model)
    length = len(batches) if isinstance(batches, Sized) else None
    length = max_batches if length is None else min(length, length if max_batches is None else max_batches)
    total = _Total(bare)
    draw = torch.Generator().manual_seed(seed)
    with evaluated(bare), own_randomness(seed), torch.enable_grad():
        shown = logging.tqdm(islice(batches, max_batches), total=length, desc="Fisher", disable=not progress)
        for batch in shown:
            rows = [trimmed(row, bare) for row in rows_of(batch, total.device)]
            rows = [row for row in rows if has_label(row)]
            if labels == "sampled":
                rows = [with_drawn_labels(row, bare, draw) for row in rows]
            total.add(rows)
    return SquaredGradients(dict(zip(total.names, total.sums, strict=True)), total.examples)


class _Total:
    """Adds up squared gradients, of several examples at a time where the model allows it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # Tied parameters come once.
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()]
        if not named:
            raise ValueError("estimate_fisher: the model has no trainable parameter; unfreeze some.")
        wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
        if wrapped or any(tuple(p.shape) != full_shape(p) or hasattr(p, "device_mesh") for _, p in named):
            raise ValueError(
                "estimate_fisher: the model is sharded, so no process can compute the gradient of one example. Load "
                "it whole in one process, and give the result to l2sp_weights."
            )
        self._keys = [name for name, _ in named]
        self.names = [canonical_name(name) for name in self._keys]
        self.parameters = [parameter for _, parameter in named]
        self.device = self.parameters[0].device
        self.sums = [torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in self.parameters]
        self.examples = 0
        size = sum(p.numel() * p.element_size() for p in self.parameters)
        self._together = max(1, _AT_A_TIME // size)
        self._tried = False

    def add(self, rows: Sequence[Row]) -> None:
        """Adds examples, each of them a batch of one."""
        groups: dict[Any, list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(tuple(v.shape) for v in row.values() if isinstance(v, Tensor)), []).append(row)
        for group in groups.values():
            for start in range(0, len(group), self._together):
                chunk = group[start : start + self._together]
                gradients = self._of_several(chunk) if len(chunk) > 1 and self._together > 1 else None
                if gradients is None:
                    for row in chunk:
                        self._add(self._of_one(row))
                else:
                    self._add(gradients)
                self.examples += len(chunk)

    def _add(self, gradients: Sequence[Tensor | None]) -> None:
        for total, gradient in zip(self.sums, gradients, strict=True):
            if gradient is None:
                continue
            gradient = (gradient.to_dense() if gradient.is_sparse else gradient).to(torch.float32)
            if gradient.dim() == total.dim():
                total.addcmul_(gradient, gradient)
            else:  # one for each of several examples
                total.add_(gradient.square_().sum(0))

    def _of_one(self, row: Row) -> Sequence[Tensor | None]:
        loss = _loss_of(self._call(row))
        self._check(loss)
        return torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def _of_several(self, rows: Sequence[Row]) -> list[Tensor] | None:
        """Gradients by vmap, the examples first; None where the model does not take it."""
        # None of the rows is padded, and a mask of ones is what keeps vmap from most models of transformers.
        if any(not bool(row["attention_mask"].all()) for row in rows if "attention_mask" in row):
            return None
        first = {name: value for name, value in rows[0].items() if name != "attention_mask"}
        tensors = {n: torch.cat([row[n] for row in rows]) for n, v in first.items() if isinstance(v, Tensor)}
        rest = {name: value for name, value in first.items() if name not in tensors}
        if any(len(value) != len(rows) for value in tensors.values()):
            return None

        def loss_of(parameters: dict[str, Tensor], row: Row) -> Tensor:
            inputs = {**{name: value.unsqueeze(0) for name, value in row.items()}, **rest}
            return _loss_of(functional_call(self.model, parameters, (), inputs))

        parameters = {n: p.detach() for n, p in zip(self._keys, self.parameters, strict=True)}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                found, losses = vmap(grad_and_value(loss_of), in_dims=(None, 0))(parameters, tensors)
        except Exception as error:  # whatever a model does that cannot be mapped
            logger.info(f"Fisher: one example at a time, since {type(self.model).__name__} cannot be mapped: {error}")
            self._together = 1
            return None
        self._check(losses)
        gradients = [found[name] for name in self._keys]
        if not self._tried and not self._agrees(gradients, rows[0]):
            logger.info("Fisher: one example at a time, since the model gives others when it is mapped.")
            self._together = 1
            return None
        self._tried = True
        return gradients

    def _agrees(self, gradients: Sequence[Tensor], row: Row) -> bool:
        away, size = 0.0, 0.0
        for several, one in zip(gradients, self._of_one(row), strict=True):
            expected = torch.zeros_like(several[0]) if one is None else one
            away += float((several[0] - expected).double().square().sum())
            size += float(expected.double().square().sum())
        return away <= 1e-10 * size

    def _call(self, row: Row) -> Any:
        try:
            return self.model(**row)
        except TypeError as error:
            raise ValueError(
                f"estimate_fisher: {type(self.model).__name__} does not take a batch with {', '.join(row)} ({error}). "
                "Give it batches of the model's own inputs, with labels."
            ) from error

    def _check(self, losses: Tensor) -> None:
        if not bool(torch.isfinite(losses).all()):
            raise ValueError(
                f"estimate_fisher: the loss of an example near number {self.examples + 1} is not finite. Are the "
                "model's weights intact, and its labels in range?"
            )


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
    if not isinstance(loss, Tensor) or loss.dim() > 0:
        raise ValueError(
            "estimate_fisher: the model returns no loss of its own for a batch. Give it batches with labels (as "
            "'labels', for most models), or a model with a head for the task."
        )
    return loss
