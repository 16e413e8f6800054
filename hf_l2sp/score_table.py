"""Which of a run's numbers are scores, which direction is better, and two runs side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_ASIDE = ("_runtime", "_per_second", "_samples", "_model_preparation_time")
_NO_SCORES = ("epoch", "total_flos", "step")
_AVERAGES = ("_macro", "_micro", "_weighted")
_LOWER = frozenset("loss ece nll brier perplexity ppl bpb error mae mse rmse wer cer".split())
_HIGHER = frozenset("accuracy acc f1 precision recall mcc auc auroc kappa bleu rouge1 rouge2 rougel chrf".split())


class ScorePair(NamedTuple):
    """One score of two runs; None where a run lacks it."""

    name: str
    first: float | None
    second: float | None

    @property
    def difference(self) -> float | None:
        """Second minus first."""
        return None if self.first is None or self.second is None else self.second - self.first

    @property
    def verdict(self) -> str:
        """The second run: `better`, `worse` or `same`; empty where nobody knows."""
        difference, sign = self.difference, direction(self.name)
        if difference is None or difference != difference or not sign:
            return ""
        if difference == 0:
            return "same"
        return "better" if difference * sign > 0 else "worse"


def score_names(metrics: Mapping[str, Any]) -> list[str]:
    """The scores among `metrics`, validation first: nothing of the training, no runtimes, throughputs and counts."""
    names = [n for n in metrics if n not in _NO_SCORES and not n.startswith("train_") and not n.endswith(_ASIDE)]
    first = [name for prefix in ("eval_", "test_") for name in names if name.startswith(prefix)]
    return list(dict.fromkeys([*first, *names]))


def direction(name: str) -> int:
    """1 where more is better, -1 where less is, 0 where it is not known.

    >>> direction("test_f1_macro"), direction("eval_ece"), direction("eval_BLOOD_LOSS_f1"), direction("eval_length")
    (1, -1, 1, 0)
    """
    for average in _AVERAGES:
        name = name.removesuffix(average)
    last = name.rpartition("_")[2].lower()
    return -1 if last in _LOWER else int(last in _HIGHER)


def splits(metrics: Mapping[str, Any]) -> list[str]:
    """The splits that were scored, as their scores begin: `eval`, `test` and others."""
    found = [name.removesuffix(end) for name in metrics for end in ("_loss", "_samples") if name.endswith(end)]
    return [s for s in dict.fromkeys([*(s for s in ("eval", "test") if s in found), *found]) if s and s != "train"]


def entity_types(metrics: Mapping[str, Any], split: str) -> list[str]:
    """The types of entities that have scores of their own."""
    found = [n[len(split) + 1 : -len("_f1")] for n in metrics if n.startswith(f"{split}_") and n.endswith("_f1")]
    others = splits(metrics)
    return [k for k in found if k and f"{split}_{k}_precision" in metrics and f"{split}_{k}" not in others]


def without_entity_types(metrics: Mapping[str, Any]) -> list[str]:
    """`score_names`, but for the scores of single types of entities."""
    single = {
        f"{split}_{kind}_{score}"
        for split in splits(metrics)
        for kind in entity_types(metrics, split)
        for score in ("precision", "recall", "f1")
    }
    return [name for name in score_names(metrics) if name not in single]


def pairs(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[ScorePair]:
    """The scores of both runs; of one that only one of them has, too."""
    names = dict.fromkeys([*score_names(second), *score_names(first)])
    return [ScorePair(name, _number(first.get(name)), _number(second.get(name))) for name in names]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
