"""How far a model has drifted from θ0: numbers, JSON and a picture."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .adapted import apply_low_rank
from .anchor import Anchor
from .plan import ROLES

HISTORY_KEYS = ("step", "task_loss", "l2sp_penalty", "l2sp_distance", "l2sp_drift", "l2sp_lambda")

# Parts of a layer by what the names of its parameters contain; the first that fits, else "other".
_PARTS = {
    "embeddings": r"embed|\bwte\b|\bwpe\b|^shared\b",
    "norm": r"norm|\bln_?\d*(_f|_cross_attn)?\b",
    "attention": r"att(n|ention)|[qkv]_?proj|[qkvo]_lin\b",
    "MLP": r"mlp|intermediate|output\.dense|ffn|feed_?forward|\bfc\d|\blin\d|densereludense|expert",
}


@dataclass
class LayerDrift:
    """Distance of one layer (or the whole model) from θ0.

    Attributes:
        parameters: Anchored numbers in it.
        distance: ‖θ − θ0‖, unweighted.
        norm: ‖θ0‖.
        drift: ‖θ − θ0‖ / ‖θ0‖; 0 where both are 0.
    """

    parameters: int
    distance: float
    norm: float
    drift: float


@dataclass
class DriftReport:
    """Distances from θ0 per layer and in total, with the course of training where a trainer made the report.

    Attributes:
        total: Distance over all anchored parameters.
        layers: Distance by layer, in the model's order.
        counts: Numbers of elements that are anchored, new, frozen and excluded.
        anchor: Source, revision and fingerprint of θ0.
        settings: λ, schedule, mode, β and exclusions of the training.
        history: One entry per training log: step, task loss, penalty, distance, drift, λ.
        parts: Relative drift by layer and part of it: attention, MLP, norm, embeddings, other.
    """

    total: LayerDrift
    layers: dict[str, LayerDrift]
    counts: dict[str, int]
    anchor: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DriftReport:
        """The report that `to_dict` made the content of; a None for a number is NaN.

        Raises:
            ValueError: It is not such a content.
        """
        try:
            found = {f.name: content[f.name] for f in fields(cls) if f.name in content}
            found["total"] = _layer(found["total"])
            found["layers"] = {str(name): _layer(layer) for name, layer in found["layers"].items()}
            found["history"] = [{k: _number(v) for k, v in entry.items()} for entry in found.get("history", [])]
            found["parts"] = {
                str(layer): {str(part): _number(v) for part, v in values.items()}
                for layer, values in found.get("parts", {}).items()
            }
            report = cls(**found)
            dict(report.counts), dict(report.anchor), dict(report.settings)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no drift report ({type(error).__name__}: {error})") from error
        return report

    def to_dict(self) -> dict[str, Any]:
        """The report as plain Python values, ready for JSON, which knows no NaN and no infinity: None there."""
        values: dict[str, Any] = for_json(asdict(self))
        return values

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the report as JSON; the folder is made where needed."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draws relative drift per layer and the course of task loss, penalty and λ.

        Raises:
            ImportError: matplotlib is missing; names the extra to install.
        """
        from .plots import draw_report

        return draw_report(self, Path(path))


def _layer(content: Mapping[str, Any]) -> LayerDrift:
    values = {name: _number(content[name]) for name in ("distance", "norm", "drift")}
    return LayerDrift(int(content["parameters"]), **values)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def for_json(value: Any) -> Any:
    """Plain values of which JSON knows every one: None for NaN and infinity."""
    if isinstance(value, dict):
        return {key: for_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def layer_of(name: str) -> str:
    """Layer of a parameter: its path up to the first number, or at most two parts of its module's path.

    >>> layer_of("bert.encoder.layer.3.attention.self.query.weight")
    'bert.encoder.layer.3'
    >>> layer_of("bert.embeddings.word_embeddings.weight")
    'bert.embeddings'
    >>> layer_of("classifier.weight")
    'classifier'
    """
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1][:2]) or name


def part_of(name: str) -> str:
    """Part of a layer that a parameter belongs to, as far as its name tells."""
    lowered = name.lower()
    return next((part for part, pattern in _PARTS.items() if re.search(pattern, lowered)), "other")


class TensorDrift(NamedTuple):
    """One tensor's ‖θ − θ0‖² and ‖θ0‖², and its number of elements."""

    squared: float
    norm_squared: float
    numel: int


def drift_of(tensors: Iterable[TensorDrift]) -> LayerDrift:
    """The distance of several tensors together."""
    tensors = list(tensors)
    distance = math.sqrt(math.fsum(t.squared for t in tensors))
    norm = math.sqrt(math.fsum(t.norm_squared for t in tensors))
    relative = distance / norm if norm > 0 else (math.inf if distance > 0 else 0.0)
    return LayerDrift(sum(t.numel for t in tensors), distance, norm, relative)


def by_layer(tensors: Mapping[str, TensorDrift]) -> dict[str, LayerDrift]:
    """Distances by layer, from those by parameter name."""
    groups: dict[str, list[TensorDrift]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(layer_of(name), []).append(tensor)
    return {layer: drift_of(group) for layer, group in groups.items()}


def by_part(tensors: Mapping[str, TensorDrift]) -> dict[str, dict[str, float]]:
    """Relative drift by layer and part, from distances by parameter name."""
    groups: dict[str, dict[str, list[TensorDrift]]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(layer_of(name), {}).setdefault(part_of(name), []).append(tensor)
    return {layer: {part: drift_of(group).drift for part, group in parts.items()} for layer, parts in groups.items()}


def _tensors(anchor: Anchor, squared: dict[str, float]) -> dict[str, TensorDrift]:
    return {
        name: TensorDrift(value, anchor.norm(name) ** 2, math.prod(anchor.sums[name].shape))
        for name, value in squared.items()
    }


def layer_drift(anchor: Anchor, squared: dict[str, float]) -> tuple[LayerDrift, dict[str, LayerDrift]]:
    """Total and per-layer distances from squared distances by parameter name."""
    tensors = _tensors(anchor, squared)
    return drift_of(tensors.values()), by_layer(tensors)


def drift_report(model: nn.Module, anchor: Anchor) -> DriftReport:
    """Measures how far a model is from an anchor.

    Args:
        model: The model that the anchor was taken from, or another one with the same names and shapes.
        anchor: θ0.

    Raises:
        ValueError: The anchor belongs to another model.
    """
    names, terms = anchor.stored_terms(model)
    low_rank = anchor.low_rank_for(model)
    squared = anchor.backend.apply(terms, 0.0, gradient=False).squared.tolist()
    squared += apply_low_rank(low_rank, anchor.backend, 0.0, gradient=False).squared.tolist()
    return make_report(anchor, dict(zip([*names, *(e.name for e in low_rank)], squared, strict=True)))


def make_report(anchor: Anchor, squared: dict[str, float]) -> DriftReport:
    """The report over squared distances by parameter name."""
    total, layers = layer_drift(anchor, squared)
    counts: dict[str, int] = {role: anchor.plan.elements(role) for role in ROLES}
    identity = {"source": anchor.source, "revision": anchor.revision, "fingerprint": anchor.fingerprint}
    return DriftReport(total, layers, counts, identity, parts=by_part(_tensors(anchor, squared)))
