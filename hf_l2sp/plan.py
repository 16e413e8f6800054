"""Which parameter is pulled to θ0, and with which weight."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import logging

from .naming import canonical_name, named_float_parameters
from .provenance import Provenance
from .selection import checked_number, checked_patterns

logger = logging.get_logger(__name__)

Role = Literal["anchored", "new", "frozen", "excluded"]
ROLES: tuple[Role, ...] = ("anchored", "new", "frozen", "excluded")


@dataclass
class PlanEntry:
    """One parameter and what L2-SP does with it.

    Attributes:
        name: Canonical name.
        parameter: The live parameter θ.
        pretrained: Whether it has a pretrained value.
        excluded: Whether the user took it out.
        weight: w, a number or a tensor of the parameter's shape.
        rows: Leading rows that have a pretrained value, where an embedding was enlarged; `None`: all.
    """

    name: str
    parameter: nn.Parameter
    pretrained: bool = True
    excluded: bool = False
    weight: float | Tensor = 1.0
    rows: int | None = None

    @property
    def role(self) -> Role:
        """What happens now; a frozen parameter gets its role when it is unfrozen."""
        if not self.parameter.requires_grad:
            return "frozen"
        if not self.pretrained:
            return "new"
        return "excluded" if self.excluded else "anchored"

    @property
    def why_not_anchored(self) -> str:
        """The role in words, for the error about a model without anchored parameters."""
        return {"new": "no pretrained value"}.get(self.role, self.role)

    @property
    def can_be_anchored(self) -> bool:
        """Whether it is pulled as soon as it is trainable."""
        return self.pretrained and not self.excluded

    @property
    def elements(self) -> int:
        """Numbers in it; for an anchored parameter, those that have an anchor."""
        return self.pulled.numel() if self.role == "anchored" else self.parameter.numel()

    @property
    def pulled(self) -> Tensor:
        """The part of θ that has an anchor (detached, sharing memory with the parameter)."""
        data = self.parameter.detach()
        return data if self.rows is None else data[: self.rows]


@dataclass
class Plan:
    """The role of every floating-point parameter of a model, by canonical name."""

    entries: dict[str, PlanEntry] = field(default_factory=dict)

    def having(self, role: Role) -> list[PlanEntry]:
        """The entries that have this role now, in the model's order."""
        return [entry for entry in self.entries.values() if entry.role == role]

    def summary(self) -> str:
        """One line: how many parameters are anchored, new, frozen and excluded."""
        parts = []
        for role in ROLES:
            entries = self.having(role)
            count = sum(entry.elements for entry in entries)
            names = ""
            if role in ("new", "excluded") and entries:
                shown = ", ".join(entry.name for entry in entries[:4])
                names = f" ({shown}{', ...' if len(entries) > 4 else ''})"
            parts.append(f"{len(entries)} {role} [{count:,}]{names}")
        enlarged = [e for e in self.having("anchored") if e.rows is not None]
        tail = "".join(f"; {e.name}: first {e.rows} of {e.parameter.shape[0]} rows" for e in enlarged)
        return "L2-SP parameters [elements]: " + ", ".join(parts) + tail

    def require_anchored(self) -> None:
        """Raises:
        ValueError: No trainable parameter has an anchor; lists what was looked at.
        """
        if self.having("anchored"):
            return
        lines = [f"{name}: {entry.why_not_anchored}" for name, entry in list(self.entries.items())[:10]]
        more = f" and {len(self.entries) - 10} more" if len(self.entries) > 10 else ""
        looked = "; ".join(lines) + more if lines else "the model has no floating-point parameter"
        raise ValueError(
            "L2-SP found no trainable parameter with an anchor, so the penalty would be silently absent. Looked at: "
            f"{looked}. Unfreeze pretrained parameters, widen l2sp_exclude/l2sp_weights, name the pretrained model "
            "with l2sp_anchor, or set l2sp_lambda=0."
        )


def build_plan(
    model: nn.Module,
    provenance: Provenance,
    exclude: str | Sequence[str] | None = None,
    weights: Mapping[str, float | Tensor] | str | None = None,
) -> Plan:
    """Gives every floating-point parameter of the model its role and weight.

    Args:
        model: The model, wrapped or not.
        provenance: Which parameters have a pretrained value, from `provenance.examine`.
        exclude: Regular expressions of parameters that are not pulled.
        weights: Regular expression → weight, parameter name → tensor, or the path of a safetensors file with a
            tensor per parameter. Weight 0 excludes.

    Raises:
        ValueError: A weight's pattern or tensor matches no parameter, or a tensor has the wrong shape or values.
    """
    exclude = checked_patterns("l2sp_exclude", exclude)
    plan = Plan()
    matched: set[str] = set()
    for name, parameter in named_float_parameters(model):
        hits = [pattern for pattern in exclude if re.search(pattern, name)]
        matched.update(hits)
        pretrained = name not in provenance.new
        excluded = bool(hits)
        if excluded and not provenance.loaded:
            # Nobody can tell which part of this model is pretrained; what the user excludes has no pretrained value.
            pretrained, excluded = False, False
        plan.entries[name] = PlanEntry(name, parameter, pretrained, excluded, rows=provenance.rows.get(name))
    for pattern in exclude:
        if pattern not in matched:
            logger.warning(f"l2sp_exclude: {pattern!r} matches no parameter.")
    if weights is not None:
        _apply_weights(plan, _read_weights(weights) if isinstance(weights, str) else weights)
    return plan


def _read_weights(path: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {canonical_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own error type for broken files
        raise ValueError(
            f"l2sp_weights={path!r} is neither JSON nor a readable safetensors file ({error}). Give "
            '{"regular expression": weight} or a file with one tensor per parameter.'
        ) from error


def _apply_weights(plan: Plan, weights: Mapping[str, float | Tensor]) -> None:
    tensors = {name: w for name, w in weights.items() if isinstance(w, Tensor)}
    patterns = {p: checked_number(f"l2sp_weights[{p!r}]", w) for p, w in weights.items() if not isinstance(w, Tensor)}
    checked_patterns("l2sp_weights", list(patterns))
    unknown = [name for name in tensors if name not in plan.entries]
    unknown += [p for p in patterns if not any(re.search(p, name) for name in plan.entries)]
    if unknown:
        raise ValueError(
            f"l2sp_weights: {', '.join(map(repr, unknown[:5]))} match{'es' if len(unknown) == 1 else ''} no parameter "
            f"of the model, whose names are like {', '.join(list(plan.entries)[:3])}. Correct or remove them."
        )
    if tensors and not patterns:
        missing = [n for n, e in plan.entries.items() if e.role == "anchored" and n not in tensors]
        if missing:
            raise ValueError(
                f"l2sp_weights has no tensor for {', '.join(missing[:5])} ({len(missing)} in all). Add them, or take "
                "these parameters out with l2sp_exclude."
            )
    for name, entry in plan.entries.items():
        if not entry.can_be_anchored:
            continue
        if name in tensors:
            entry.weight = _checked_tensor(entry, tensors[name])
            continue
        weight = next((w for pattern, w in patterns.items() if re.search(pattern, name)), 1.0)
        entry.weight = weight
        if weight == 0.0:
            entry.excluded = True


def _checked_tensor(entry: PlanEntry, weight: Tensor) -> float | Tensor:
    if weight.dim() > 0 and weight.shape != entry.pulled.shape:
        raise ValueError(
            f"l2sp_weights: the tensor for {entry.name} has shape {tuple(weight.shape)}, the parameter "
            f"{tuple(entry.pulled.shape)}. It was made for another model."
        )
    if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
        raise ValueError(f"l2sp_weights: the tensor for {entry.name} holds negative, NaN or infinite values.")
    if weight.dim() == 0:
        return float(weight)
    # At least float32: a bfloat16 weight would round the gradient that the pass computes in float32.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(device=entry.parameter.device, dtype=dtype).contiguous()
