"""`l2sp_schedule="auto"` in a trainer: holds rows out, measures on them between optimizer steps, sets λ."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import datasets
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers.utils import logging

from .auto import SMALLEST, START, AutoStrength
from .held_out import (
    BUDGET,
    EVALUATION_BUDGET,
    EVALUATION_ROWS,
    FEWEST_ROWS,
    HeldOut,
    HeldOutSampler,
    Portions,
    by_heart,
    hold_out,
)
from .state import read_state
from .traceless import own_metrics, own_randomness

if TYPE_CHECKING:
    from .anchor import Anchor
    from .slope import Slope

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class _Rows:
    """What to measure on: rows of a data set, as its loader would give them."""

    dataset: Any
    indices: Sequence[int]
    collate: Any
    held: HeldOut | None = None  # None: rows of an evaluation set

    def batch(self, positions: Sequence[int], seed: int) -> Any:
        with own_randomness(seed):  # a collator may draw masks
            return self.collate([self.dataset[self.indices[position]] for position in positions])


class L2SPAutoMixin:
    """The part of `L2SPMixin` that measures. See `AutoStrength` for the rule."""

    l2sp_anchor: Anchor | None
    args: Any
    state: Any
    _l2sp_auto: AutoStrength | None = None
    _l2sp_rows: _Rows | None = None
    _l2sp_portions: Portions | None = None
    # ⟨∇L_held-out, θ − θ0⟩ and Σ w‖θ − θ0‖², measured before the optimizer step that is under way.
    _l2sp_held: tuple[float, float] | None = None

    @property
    def _l2sp_is_auto(self) -> bool:
        return bool(self._l2sp_on) and self._l2sp_arg("l2sp_schedule") == "auto"  # type: ignore[attr-defined]

    # --- rows -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader: DataLoader[Any] = super().get_train_dataloader()  # type: ignore[misc]
        if self._l2sp_is_auto:
            self._l2sp_rows = self._l2sp_evaluation_rows() or self._l2sp_training_rows(loader)
        return loader

    def _l2sp_evaluation_rows(self) -> _Rows | None:
        given = self.eval_dataset  # type: ignore[attr-defined]
        if isinstance(given, dict):
            given = next(iter(given.values()), None)
        if not _has_length(given) or len(given) == 0:
            return None
        loader = self.get_eval_dataloader(given)  # type: ignore[attr-defined]
        rows = random.Random(self.args.seed).sample(range(len(given)), min(len(given), EVALUATION_ROWS))
        return _Rows(loader.dataset, rows, loader.collate_fn)

    def _l2sp_training_rows(self, loader: DataLoader[Any]) -> _Rows | None:
        data: Any = loader.dataset
        if not _has_length(data):
            raise ValueError(
                "l2sp_schedule='auto' measures on held-out examples and cannot hold any out of a training set without "
                "a length. Give the trainer an eval_dataset that has one, or use a constant l2sp_lambda."
            )
        rows = len(data)
        held = hold_out(rows, self._l2sp_draws(rows), self.args.seed, _labels(data))
        if not held.stand_ins:
            logger.warning(
                f"l2sp_schedule='auto' finds nothing to hold out of {rows} training examples (it takes {FEWEST_ROWS}, "
                "and two of a class) and keeps l2sp_lambda as it is. Give the trainer an eval_dataset."
            )
            return None
        loader.set_sampler(HeldOutSampler(loader.get_sampler(), held))  # type: ignore[attr-defined]
        return _Rows(data, list(held.stand_ins), loader.collate_fn, held)

    def _l2sp_draws(self, rows: int) -> int:
        """Rows that are drawn over the whole training."""
        steps = self.args.max_steps
        return int(steps * self._l2sp_batch()) if steps > 0 else round(self.args.num_train_epochs * rows)

    def _l2sp_batch(self) -> int:
        """Rows per optimizer step, over all processes."""
        per_step = self._train_batch_size or self.args.train_batch_size  # type: ignore[attr-defined]
        return int(per_step * self.args.gradient_accumulation_steps * self._l2sp_row_share()[1])

    def _l2sp_row_share(self) -> tuple[int, int]:
        """Which of how many groups of processes this one is in; those of a group are given the same rows."""
        alike = self._l2sp_shared("tp")
        return self.args.process_index // alike, max(1, self.args.world_size // alike)

    def _l2sp_shared(self, kind: str) -> int:
        """Size of a dimension of parallelism; 1 where this version of transformers does not know it."""
        return int(getattr(self, f"get_{kind}_size", lambda: 1)())

    # --- a training's course ----------------------------------------------------------------------------------------

    def _l2sp_begin_auto(self, checkpoint: str | None) -> None:
        """At the start of training: λ out of the way, or as the checkpoint left it."""
        self._l2sp_auto = self._l2sp_portions = self._l2sp_held = None
        if not self._l2sp_is_auto:
            return
        assert self.l2sp_anchor is not None
        self._l2sp_check_auto()
        state = None if checkpoint is None else read_state(checkpoint)
        kept = None if state is None else state.get("strength", {}).get("auto")
        if self._l2sp_rows is None:
            return  # nothing to measure on: λ stays as the user set it
        if kept is None:
            self._l2sp_auto = AutoStrength(self._l2sp_first_strength(self._l2sp_rows))
        else:
            self._l2sp_auto = AutoStrength.from_state(kept)

    def _l2sp_first_strength(self, rows: _Rows) -> float:
        """λ before there is a measurement: worth mentioning where rows with a class each are learned by heart.

        Of texts with a label per word the mean over the words, most of them of one class, is learned by heart long
        before the other classes are.
        """
        data = self.train_dataset  # type: ignore[attr-defined]
        if not _has_length(data):
            return SMALLEST
        batch = rows.batch([0], self.args.seed)
        named = batch if isinstance(batch, Mapping) else {}
        labels = next((named[name] for name in self.label_names if name in named), None)  # type: ignore[attr-defined]
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
            return SMALLEST
        return max(SMALLEST, START * by_heart(len(data), self._l2sp_draws(len(data))))

    def _l2sp_check_auto(self) -> None:
        assert self.l2sp_anchor is not None
        cause = None
        if self._l2sp_shared("cp") * self._l2sp_shared("sp") > 1:
            cause = "processes that share the tokens of a text (context and sequence parallelism)"
        elif any(entry.starts for entry in self.l2sp_anchor.active_low_rank()):
            cause = "adapters that begin with part of the base weight (PiSSA and its like)"
        if cause is not None:
            raise ValueError(
                f"l2sp_schedule='auto' does not work with {cause}. Set l2sp_schedule to 'constant', and l2sp_lambda "
                "to a value of your choice."
            )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        # Called once per optimizer step, when the gradients of the last one are gone and none is there yet.
        if self._l2sp_auto is not None and self._l2sp_rows is not None:
            self._l2sp_measure_auto(self._l2sp_rows)
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def _l2sp_measure_auto(self, rows: _Rows) -> None:
        step, steps, (process, processes) = self.state.global_step, self.state.max_steps, self._l2sp_row_share()
        count = len(rows.indices)
        if self._l2sp_portions is None:
            share, budget = (1.0, EVALUATION_BUDGET) if rows.held is None else (rows.held.release, BUDGET)
            self._l2sp_portions = Portions.plan(count, self._l2sp_batch(), steps, share, budget, processes)
        portions = self._l2sp_portions
        if not portions.due(step):
            return
        positions = portions.positions(step, count, process, processes)
        self._l2sp_held = self._l2sp_slope(rows.batch(positions, self.args.seed + step))

    def _l2sp_update_auto(self) -> None:
        """Before the penalty's gradient is added: λ by what was measured at these weights, and their gradient."""
        if self._l2sp_auto is None or self._l2sp_held is None:
            return
        (held, squared), self._l2sp_held = self._l2sp_held, None
        assert self.l2sp_anchor is not None
        self._l2sp_auto.update(held, float(_slope_unscaled(self.l2sp_anchor).along), squared)

    def _l2sp_slope(self, batch: Any) -> tuple[float, float]:
        """⟨∇L, θ − θ0⟩ of a batch, and Σ w‖θ − θ0‖²; the same on all processes. Leaves no gradient behind."""
        anchor = self.l2sp_anchor
        assert anchor is not None
        model = self.model_wrapped  # type: ignore[attr-defined]
        anchor.join_trainable()
        model.eval()  # without dropout; the training step switches back
        with own_randomness(self.args.seed), own_metrics(self):
            inputs = self._prepare_inputs(batch)  # type: ignore[attr-defined]
            with self.compute_loss_context_manager():  # type: ignore[attr-defined]
                loss: Tensor = self.compute_loss(model, inputs)  # type: ignore[attr-defined]
            # DataParallel gives one per device.
            slope, squared = anchor.backend.measured(loss.mean(), lambda: _slope_unscaled(anchor))
        model.zero_grad()
        if anchor.backend.processes > 1 and not anchor.backend.sharded:
            # Whether the gradients were averaged already depends on the wrapper; the mean is right either way.
            slope = self.accelerator.reduce(slope.to(self.args.device), "mean")  # type: ignore[attr-defined]
        return float(slope), float(squared)


def _slope_unscaled(anchor: Anchor) -> Slope:
    """Of the gradients that are there, without the loss scale that they carry under fp16."""
    slope, scale = anchor.slope(), anchor.backend.grad_scale()
    return slope if scale is None else slope._replace(along=slope.along / scale.to(slope.along.device))


def _has_length(data: Any) -> TypeGuard[Sized]:
    return isinstance(data, Sized) and not isinstance(data, IterableDataset)


def _labels(data: Any) -> list[Any] | None:
    """A class per row, where that is written down plainly."""
    if not isinstance(data, datasets.Dataset):
        return None
    for name in ("labels", "label", "label_ids"):
        if name in data.column_names:
            values = list(data.with_format(None)[name])
            return values if all(isinstance(value, int | str) for value in values) else None
    return None
