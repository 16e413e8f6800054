"""How far a model has drifted from θ0: numbers, JSON and a picture."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .adapted import apply_low_rank
from .anchor import Anchor
from .plan import ROLES

HISTORY_KEYS = ("step", "task_loss", "l2sp_penalty", "l2sp_distance", "l2sp_drift", "l2sp_lambda")


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
    """

    total: LayerDrift
    layers: dict[str, LayerDrift]
    counts: dict[str, int]
    anchor: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain Python values, ready for JSON, which knows no NaN and no infinity: None there."""
        return _for_json(asdict(self))

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


def _for_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _for_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(item) for item in value]
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


def layer_drift(anchor: Anchor, squared: dict[str, float]) -> tuple[LayerDrift, dict[str, LayerDrift]]:
    """Total and per-layer distances from squared distances by parameter name."""
    groups: dict[str, list[str]] = {}
    for name in squared:
        groups.setdefault(layer_of(name), []).append(name)

    def drift(names: list[str]) -> LayerDrift:
        distance = math.sqrt(math.fsum(squared[n] for n in names))
        norm = math.sqrt(math.fsum(anchor.norm(n) ** 2 for n in names))
        relative = distance / norm if norm > 0 else (math.inf if distance > 0 else 0.0)
        return LayerDrift(sum(math.prod(anchor.sums[n].shape) for n in names), distance, norm, relative)

    return drift(list(squared)), {layer: drift(names) for layer, names in groups.items()}


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
    return DriftReport(total, layers, counts, identity)
