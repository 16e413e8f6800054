"""`l2sp_schedule="auto"` in a trainer: what θ0 knows of its labels, the loss of every optimizer step, λ from both."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers.utils import logging

from .auto import AutoStrength
from .fisher_rows import NO_LABEL
from .naming import unwrap
from .press import Told, told
from .representations import Represented, represented
from .state import read_state
from .traceless import evaluated, own_randomness

if TYPE_CHECKING:
    from .anchor import Anchor

logger = logging.get_logger(__name__)

# Training examples of whose labels the entropy is taken.
LABELLED_ROWS = 256
# Those among them that θ0 is run on, as part of all that the training runs on.
LOOKED_AT = 0.06


class L2SPAutoMixin:
    """The part of `L2SPMixin` that finds λ. See `AutoStrength` for the rule."""

    l2sp_anchor: Anchor | None
    args: Any
    state: Any
    callback_handler: Any
    _l2sp_auto: AutoStrength | None = None
    # Whether the labels are still to be looked at.
    _l2sp_unseen: bool = False
    # Loss of the micro-batches so far of the step that is under way; of the last whole one, before it is taken up.
    _l2sp_partial: Tensor | None = None
    _l2sp_loss: Tensor | None = None

    @property
    def _l2sp_is_auto(self) -> bool:
        return bool(self._l2sp_on) and self._l2sp_arg("l2sp_schedule") == "auto"  # type: ignore[attr-defined]

    def _l2sp_begin_auto(self, checkpoint: str | None) -> None:
        """At the start of training: λ next to 0, or as the checkpoint left it."""
        self._l2sp_auto = self._l2sp_partial = self._l2sp_loss = None
        self._l2sp_unseen = False
        if not self._l2sp_is_auto:
            return
        state = None if checkpoint is None else read_state(checkpoint)
        kept = None if state is None else state.get("strength", {}).get("auto")
        if kept is None:
            self._l2sp_auto, self._l2sp_unseen = AutoStrength(), True
        else:
            self._l2sp_auto = AutoStrength.from_state(kept)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        # Called before every optimizer step; before the first one the model is prepared and still at θ0.
        if self._l2sp_auto is not None and self._l2sp_unseen:
            self._l2sp_unseen = False
            self._l2sp_look_at_labels(self._l2sp_auto, self.callback_handler.train_dataloader)
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def _l2sp_look_at_labels(self, auto: AutoStrength, loader: DataLoader[Any]) -> None:
        """Of some training rows, as the loader would give them: entropy, and what θ0's representations leave open."""
        if not isinstance(loader.dataset, Sized) or isinstance(loader.dataset, IterableDataset):
            return
        data: Any = loader.dataset
        rows = random.Random(self.args.seed).sample(range(len(data)), min(len(data), LABELLED_ROWS))
        with own_randomness(self.args.seed):  # a collator may draw masks
            labels = self._l2sp_labels(loader.collate_fn([data[row] for row in rows]))
            if labels is None:
                return
            auto.entropy = label_entropy(labels)
            if labels.dim() > 1 and math.isfinite(auto.entropy):
                # Most words are of one class, and their mean loss is small long before the other classes are learned.
                auto.entropy = 0.0
                assert self.l2sp_anchor is not None
                if self.l2sp_anchor.backend.is_main_process:
                    logger.warning(
                        "l2sp_schedule='auto' leaves λ next to 0 where every word has a label: no rule was found that "
                        "pulls and keeps all entities. For the likelihood, set l2sp_lambda by hand; 0.01 is a start."
                    )
                return
            seen = self._l2sp_represented(loader, rows)
        found = None if seen is None else told(seen.layers, seen.targets)
        if found is not None:
            # Over processes that saw the same, but may have rounded in other ways.
            same = self.accelerator.reduce(torch.tensor(found, device=self.args.device), "mean")  # type: ignore[attr-defined]
            auto.begin(Told(*same.tolist()), self._l2sp_trained_on() / len(data) if in_nats(labels) else 0.0)
        logger.info(
            f"l2sp_schedule='auto': labels of {auto.entropy:.3g} nats, of whose variance the pretrained model's "
            f"representations leave {auto.unexplained:.0%} unexplained{'' if found is not None else ' (assumed)'}; "
            f"λ begins at {auto.value:.3g}."
        )

    def _l2sp_labels(self, batch: Any) -> Tensor | None:
        named = batch if isinstance(batch, Mapping) else {}
        labels = next((named[name] for name in self.label_names if name in named), None)  # type: ignore[attr-defined]
        return labels if isinstance(labels, Tensor) else None

    def _l2sp_trained_on(self) -> int:
        """Examples in all steps of all epochs together."""
        return self.state.max_steps * self.get_total_train_batch_size(self.args)  # type: ignore[attr-defined,no-any-return]

    def _l2sp_represented(self, loader: DataLoader[Any], rows: Sequence[int]) -> Represented | None:
        """What θ0 makes of the first of some rows; None where it is not known. All processes look at the same ones."""
        assert self.l2sp_anchor is not None
        # 1 where this version of transformers does not know it.
        if any(getattr(self, f"get_{kind}_size", lambda: 1)() > 1 for kind in ("cp", "sp")):
            return None  # a process may have no room for whole texts
        rows = rows[: int(LOOKED_AT * self._l2sp_trained_on())]
        size = self._train_batch_size  # type: ignore[attr-defined]
        bare = unwrap(self.model)  # type: ignore[attr-defined]
        model = self.model_wrapped if self.l2sp_anchor.backend.sharded else bare  # type: ignore[attr-defined]
        found: list[Represented] = []
        with torch.no_grad(), evaluated(bare):
            for start in range(0, len(rows), size):
                # Fetched anew: a collator may have taken its rows apart.
                batch = loader.collate_fn([loader.dataset[row] for row in rows[start : start + size]])
                batch = self._prepare_inputs(batch)  # type: ignore[attr-defined]
                labels = self._l2sp_labels(batch)
                with self.compute_loss_context_manager():  # type: ignore[attr-defined]
                    part = None if labels is None else represented(model, batch, labels)
                if part is None:
                    return None
                found.append(part)
        if not found:
            return None
        layers = zip(*(part.layers for part in found), strict=True)
        targets = torch.cat([part.targets for part in found]).cpu()
        return Represented([torch.cat(parts).cpu() for parts in layers], targets)

    def _l2sp_note_loss(self, loss: Tensor) -> None:
        """Adds the loss of a micro-batch, which is its share of that of the step."""
        if self._l2sp_auto is None:
            return
        loss = loss.detach().to(torch.float32)
        self._l2sp_partial = loss if self._l2sp_partial is None else self._l2sp_partial + loss
        if self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            # The mean over the processes now, but read later, when a GPU has long come to know it.
            self._l2sp_loss = self.accelerator.reduce(self._l2sp_partial, "mean")  # type: ignore[attr-defined]
            self._l2sp_partial = None

    def _l2sp_update_auto(self) -> None:
        """Takes up the loss of the last step, if that was not done already."""
        if self._l2sp_auto is not None and self._l2sp_loss is not None:
            loss, self._l2sp_loss = float(self._l2sp_loss), None
            self._l2sp_auto.update(loss, self.state.global_step, self.state.max_steps)


def in_nats(labels: Tensor) -> bool:
    """Whether a loss is one of classes. That of numbers is in their units, in which no λ to begin with is known."""
    return not labels.is_floating_point() or bool(((labels == 0) | (labels == 1)).all())


def label_entropy(labels: Tensor) -> float:
    """Entropy of classes, in nats.

    Args:
        labels: One class per example or per token, -100 where there is none. Shape: any.

    Returns:
        Infinity for anything but classes.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return math.inf
    counts = labels[labels != NO_LABEL].unique(return_counts=True)[1].to(torch.float64)
    shares = counts / counts.sum()
    return float(-(shares * shares.log()).sum()) if len(counts) else math.inf
