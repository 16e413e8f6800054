"""`select_interpolation` of a trainer: how far to go from θ0 to the fine-tuned weights, by the evaluation set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers.utils import logging

from .interpolate import interpolate
from .report import for_json
from .score_table import direction
from .traceless import own_metrics

if TYPE_CHECKING:
    from .anchor import Anchor

logger = logging.get_logger(__name__)

ALPHAS = tuple(index / 10 for index in range(11))


@dataclass(frozen=True)
class Interpolation:
    """What `select_interpolation` has found.

    Attributes:
        alpha: The best α; the model has these weights now.
        metric: Which score decided.
        greater_is_better: Its direction.
        scores: The score of every α, in ascending order of α.
    """

    alpha: float
    metric: str
    greater_is_better: bool
    scores: dict[float, float]


class L2SPInterpolationMixin:
    """The part of `L2SPMixin` that goes back towards θ0 after training."""

    l2sp_anchor: Anchor | None
    args: Any
    model: Any
    accelerator: Any
    is_in_train: bool
    # What was chosen, and α as a part of the way that training went: a second choice goes on from the first.
    _l2sp_chosen: tuple[Interpolation, float] | None = None

    def select_interpolation(
        self, alphas: Sequence[float] | None = None, metric_for_best: str | None = None
    ) -> Interpolation:
        """Evaluates θ0 + α(θ − θ0) for several α and leaves the best in the model. Call it after `train`.

        New and excluded parameters, such as the head, stay as they are. Every α starts from the fine-tuned weights,
        which wait in the CPU's memory; α = 1 gives them back bit for bit. Of equally good ones the largest α is
        taken. The choice is logged (`l2sp_alpha`, and `l2sp_alpha/<α>` with the score of each), and told in
        `l2sp_state.json` and the model card, which are written by `save_model` and `create_model_card`.

        The scores are those of an evaluation set that has chosen: report others, of data that it has not seen.

        Args:
            alphas: Values of α; by default 0, 0.1, ..., 1.
            metric_for_best: Which score of `evaluate` decides, with or without `eval_`; by default
                `args.metric_for_best_model`, else the loss. Whether less is better is taken from its name (loss, nll,
                ece, perplexity and the like) and, where that is the metric of the arguments, from
                `args.greater_is_better`.

        Raises:
            ValueError: There is no θ0 or no evaluation set, the model cannot be interpolated here (sharded, or
                evaluated in half precision), α is not finite, or the score is not among those of the evaluation.

        Source: Wortsman et al., "Robust fine-tuning of zero-shot models", 2022 (arXiv 2109.01903).
        """
        values = _checked_alphas(ALPHAS if alphas is None else alphas)
        self._l2sp_check_interpolation()
        anchor, model = self.l2sp_anchor, self.model
        assert anchor is not None
        metric, greater = self._l2sp_metric(metric_for_best)
        interpolate(model, anchor, 1.0)  # refuses what cannot be interpolated, and changes nothing
        fine_tuned = _weights(anchor, model)
        scores: dict[float, float] = {}
        best = 1.0
        try:
            with _unheard(self):
                shown = anchor.backend.is_main_process and not self.args.disable_tqdm
                for alpha in logging.tqdm(values, desc="Interpolation", disable=not shown):
                    _give_back(fine_tuned)
                    interpolate(model, anchor, alpha)
                    scores[alpha] = _score(self.evaluate(), metric)  # type: ignore[attr-defined]
            best = self._l2sp_best(scores, metric, greater)
        finally:
            _give_back(fine_tuned)
        interpolate(model, anchor, best)
        chosen = Interpolation(best, metric, greater, scores)
        self._l2sp_chosen = chosen, best * (1.0 if self._l2sp_chosen is None else self._l2sp_chosen[1])
        logs = {"l2sp_alpha": best, **{f"l2sp_alpha/{alpha:g}": score for alpha, score in scores.items()}}
        self.log(logs)  # type: ignore[attr-defined]
        return chosen

    def _l2sp_check_interpolation(self) -> None:
        anchor = self.l2sp_anchor
        if anchor is None or not anchor.attached or self.is_in_train:
            raise ValueError(
                "select_interpolation goes back towards θ0 after training: call train() first, with l2sp_lambda > 0 "
                f"(it is {self._l2sp_arg('l2sp_lambda')})."  # type: ignore[attr-defined]
            )
        if self.eval_dataset is None:  # type: ignore[attr-defined]
            raise ValueError(
                "select_interpolation chooses on the evaluation set, and there is none: give the trainer an "
                "eval_dataset, or use hf_l2sp.interpolate(model, trainer.l2sp_anchor, alpha)."
            )
        cause = None
        if anchor.backend.sharded:
            cause = f"{anchor.backend.kind}, which shards the model"
        elif self.args.fp16_full_eval or self.args.bf16_full_eval:
            cause = "fp16_full_eval and bf16_full_eval, which round the model's weights for good"
        if cause is not None:
            raise ValueError(
                f"select_interpolation does not work with {cause}. Save the model, load it in one process and use "
                "hf_l2sp.interpolate with Anchor.from_pretrained."
            )

    def _l2sp_metric(self, name: str | None) -> tuple[str, bool]:
        """The score's key in the metrics, and whether more of it is better."""
        own = self.args.metric_for_best_model
        metric = _with_prefix(name or own or "loss")
        sign = direction(metric)
        if own is not None and _with_prefix(own) == metric and self.args.greater_is_better is not None:
            # Where nobody has set it, it says that everything but a loss is better when it is greater.
            by_default = not own.endswith("loss")
            if sign == 0 or self.args.greater_is_better != by_default:
                return metric, bool(self.args.greater_is_better)
        return metric, sign >= 0

    def _l2sp_best(self, scores: dict[float, float], metric: str, greater: bool) -> float:
        known = [(score if greater else -score, alpha) for alpha, score in scores.items() if not math.isnan(score)]
        if not known:
            raise ValueError(f"select_interpolation: {metric} is NaN for every α, so none of them is the best.")
        best = [max(known)[1]]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(best)
        return best[0]

    def _l2sp_interpolation_state(self) -> dict[str, Any]:
        """For `l2sp_state.json`."""
        if self._l2sp_chosen is None:
            return {}
        chosen, alpha = self._l2sp_chosen
        scores = {f"{value:g}": score for value, score in chosen.scores.items()}
        return {"interpolation": {"alpha": alpha, "metric": chosen.metric, "scores": for_json(scores)}}

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._l2sp_chosen = None
        return super()._inner_training_loop(*args, **kwargs)  # type: ignore[misc]


def _checked_alphas(alphas: Sequence[float]) -> list[float]:
    values = sorted({float(alpha) for alpha in alphas})
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"alphas={list(alphas)!r}: give one or more finite numbers, usually between 0 and 1.")
    return values


def _with_prefix(metric: str) -> str:
    return metric if metric.startswith("eval_") else f"eval_{metric}"


def _score(metrics: dict[str, Any], metric: str) -> float:
    if metric not in metrics:
        raise ValueError(f"The evaluation has no {metric}; it has {', '.join(sorted(metrics))}. Name one of them.")
    return float(metrics[metric])


def _weights(anchor: Anchor, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """All that `interpolate` changes, each with a copy on the CPU."""
    _, terms = anchor.stored_terms(model)
    products = [p for entry in anchor.low_rank_for(model) for p in entry.adapted.active().values()]
    live = [*(term.parameter for term in terms), *(product.up for product in products)]
    return [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in live]


@torch.no_grad()
def _give_back(weights: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in weights:
        tensor.copy_(value)


@contextmanager
def _unheard(trainer: Any) -> Iterator[None]:
    """Within, evaluations reach no log and no callback: they would stop training early, or count as the model's."""
    handler = trainer.callback_handler
    callbacks = handler.callbacks
    handler.callbacks = []
    trainer.log = lambda *args, **kwargs: None
    try:
        with own_metrics(trainer):
            yield
    finally:
        handler.callbacks = callbacks
        del trainer.log
