"""Which parameter is pulled to θ0, and with which weight."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import logging

from .adapted import AdaptedModel, LowRankEntry, base_shape, look_at, new_in_base
from .adapters import base_name
from .backends import full_shape
from .naming import canonical_name
from .provenance import Provenance
from .selection import checked_number, checked_patterns

logger = logging.get_logger(__name__)

Role = Literal["anchored", "new", "frozen", "excluded"]
ROLES: tuple[Role, ...] = ("anchored", "new", "frozen", "excluded")
_WHY_NOT = {"new": "no pretrained value"}


@dataclass
class PlanEntry:
    """One parameter and what L2-SP does with it.

    Attributes:
        name: Canonical name.
        parameter: The live parameter θ; under sharding, this rank's part of it.
        shape: Shape of the whole parameter.
        pretrained: Whether it has a pretrained value.
        excluded: Whether the user took it out.
        weight: w, a number or a tensor of θ0's shape (under sharding, this rank's part of it).
        rows: Leading rows that have a pretrained value, where an embedding was enlarged; `None`: all.
        original: For a copy that PEFT trains (`modules_to_save`): the frozen pretrained value beside it.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    pretrained: bool = True
    excluded: bool = False
    weight: float | Tensor = 1.0
    rows: int | None = None
    original: Tensor | None = None

    @property
    def role(self) -> Role:
        """What happens now; a frozen parameter gets its role when it is unfrozen."""
        if not self.parameter.requires_grad:
            return "frozen"
        if not self.pretrained:
            return "new"
        return "excluded" if self.excluded else "anchored"

    @property
    def can_be_anchored(self) -> bool:
        """Whether it is pulled as soon as it is trainable."""
        return self.pretrained and not self.excluded

    @property
    def pulled_shape(self) -> tuple[int, ...]:
        """Shape of the part of θ that has an anchor."""
        return self.shape if self.rows is None else (self.rows, *self.shape[1:])

    @property
    def elements(self) -> int:
        """Numbers in it; for an anchored parameter, those that have an anchor."""
        return math.prod(self.pulled_shape if self.role == "anchored" else self.shape)


@dataclass
class Plan:
    """The role of every floating-point parameter of a model, by canonical name.

    Attributes:
        entries: Parameters; of a model with adapters, those of the base model and trained copies of them.
        low_rank: Weights of the base model that LoRA changes.
    """

    entries: dict[str, PlanEntry] = field(default_factory=dict)
    low_rank: dict[str, LowRankEntry] = field(default_factory=dict)

    def having(self, role: Role) -> list[PlanEntry]:
        """The entries that have this role now, in the model's order."""
        return [entry for entry in self.entries.values() if entry.role == role]

    def low_rank_having(self, role: Role) -> list[LowRankEntry]:
        """The weights that LoRA changes whose factors have this role now."""
        return [entry for entry in self.low_rank.values() if entry.role == role]

    def elements(self, role: Role) -> int:
        """Numbers that have this role now; of what LoRA changes, those of the weight."""
        return sum(e.elements for e in self.having(role)) + sum(e.elements for e in self.low_rank_having(role))

    def rebind(self, model: nn.Module) -> None:
        """Finds the parameters again after the model was sharded, which may put new ones in their places.

        Raises:
            ValueError: A parameter has lost its name.
        """
        now = look_at(model)
        parameters = now.parameters
        lost = [name for name in self.entries if name not in parameters]
        if lost:
            raise ValueError(
                f"After sharding the model has no parameter {', '.join(lost[:5])} ({len(lost)} in all), so L2-SP "
                "cannot pull it. With FSDP1 set use_orig_params to true (fsdp_use_orig_params in accelerate's config)."
            )
        for name, entry in self.entries.items():
            entry.parameter = parameters[name]
            if entry.original is not None:
                entry.original = now.copies[name].original

    def weigh(self, weights: Mapping[str, float | Tensor]) -> None:
        """Sets w; as in `build_plan`.

        Raises:
            ValueError: A pattern or tensor matches no parameter, or a tensor has the wrong shape or values.
        """
        _apply_weights(self, weights)

    def summary(self) -> str:
        """One line: how many parameters are anchored, new, frozen and excluded."""
        parts = []
        for role in ROLES:
            entries = self.having(role)
            low_rank = self.low_rank_having(role)
            names = ""
            if role in ("new", "excluded") and entries:
                shown = ", ".join(entry.name for entry in entries[:4])
                names = f" ({shown}{', ...' if len(entries) > 4 else ''})"
            if low_rank:
                names += f" + {len(low_rank)} by LoRA"
            parts.append(f"{len(entries)} {role} [{self.elements(role):,}]{names}")
        pulled: list[PlanEntry | LowRankEntry] = [*self.having("anchored"), *self.low_rank_having("anchored")]
        enlarged = [e for e in pulled if e.rows is not None]
        tail = "".join(f"; {e.name}: first {e.rows} of {e.shape[0]} rows" for e in enlarged)
        return "L2-SP parameters [elements]: " + ", ".join(parts) + tail

    def require_anchored(self) -> None:
        """Raises:
        ValueError: No trainable parameter has an anchor; lists what was looked at.
        """
        if self.having("anchored") or self.low_rank_having("anchored"):
            return
        entries: list[PlanEntry | LowRankEntry] = [*self.entries.values(), *self.low_rank.values()]
        entries.sort(key=lambda entry: entry.role == "frozen")  # what is trained says more
        lines = [f"{entry.name}: {_WHY_NOT.get(entry.role, entry.role)}" for entry in entries[:10]]
        more = f" and {len(entries) - 10} more" if len(entries) > 10 else ""
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
    seen = look_at(model)
    plan = Plan()
    matched: set[str] = set()
    new = new_in_base(seen, provenance.new)
    rows = {base_name(name): count for name, count in provenance.rows.items()}

    def origin(name: str) -> tuple[bool, bool]:
        """Whether it has a pretrained value, and whether the user takes it out."""
        hits = [pattern for pattern in exclude if re.search(pattern, name)]
        matched.update(hits)
        if hits and not provenance.loaded:
            # Nobody can tell which part of this model is pretrained; what the user excludes has no pretrained value.
            return False, False
        return name not in new, bool(hits)

    for name, parameter in seen.parameters.items():
        entry = PlanEntry(name, parameter, full_shape(parameter), *origin(name), rows=rows.get(name))
        if name in seen.copies:
            _anchor_copy(entry, seen)
        plan.entries[name] = entry
    for weight in seen.weights:
        plan.low_rank[weight.name] = LowRankEntry(
            weight.name, weight, base_shape(weight), *origin(weight.name), rows=rows.get(weight.name)
        )
    for pattern in exclude:
        if pattern not in matched:
            logger.warning(f"l2sp_exclude: {pattern!r} matches no parameter.")
    if weights is not None:
        _apply_weights(plan, _read_weights(weights) if isinstance(weights, str) else weights)
    return plan


def _anchor_copy(entry: PlanEntry, model: AdaptedModel) -> None:
    """The θ0 of a copy that PEFT trains is the original beside it, of which it may hold some rows only."""
    copy = model.copies[entry.name]
    entry.original = copy.original
    if copy.rows is None or entry.rows is None:
        return
    if all(row >= entry.rows for row in copy.rows):  # added tokens alone
        entry.pretrained, entry.rows = False, None
        return
    old = [row < entry.rows for row in copy.rows]
    if sorted(old, reverse=True) != old:
        raise ValueError(
            f"trainable_token_indices of {entry.name} has added tokens before pretrained ones; name those below "
            f"{entry.rows} first, so that L2-SP can tell which rows have a pretrained value."
        )
    entry.rows = sum(old)


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
    names = [*plan.entries, *plan.low_rank]
    unknown = [name for name in tensors if name not in names]
    unknown += [p for p in patterns if not any(re.search(p, name) for name in names)]
    if unknown:
        raise ValueError(
            f"l2sp_weights: {', '.join(map(repr, unknown[:5]))} match{'es' if len(unknown) == 1 else ''} no parameter "
            f"of the model, whose names are like {', '.join(names[:3])}. Correct or remove them."
        )
    if tensors and not patterns:
        missing = [n for n, e in plan.entries.items() if e.role == "anchored" and n not in tensors]
        if missing:
            raise ValueError(
                f"l2sp_weights has no tensor for {', '.join(missing[:5])} ({len(missing)} in all). Add them, or take "
                "these parameters out with l2sp_exclude."
            )
    for name, entry in plan.entries.items():
        if entry.can_be_anchored and name in tensors:
            entry.weight = _checked_tensor(entry, tensors[name])
        elif entry.can_be_anchored:
            entry.weight = _by_pattern(name, patterns)
            entry.excluded = entry.weight == 0.0
    for name, low_rank in plan.low_rank.items():
        weight = tensors.get(name)
        if weight is not None and weight.dim() > 0:
            raise ValueError(
                f"l2sp_weights has a tensor for {name}, which LoRA changes: its distance is known as a whole only. "
                'Give one number for it ({"regular expression": weight}), or train the full model.'
            )
        low_rank.weight = _by_pattern(name, patterns) if weight is None else checked_number(name, float(weight))
        low_rank.excluded = low_rank.excluded or low_rank.weight == 0.0


def _by_pattern(name: str, patterns: Mapping[str, float]) -> float:
    return next((w for pattern, w in patterns.items() if re.search(pattern, name)), 1.0)


def _checked_tensor(entry: PlanEntry, weight: Tensor) -> float | Tensor:
    if entry.rows is not None and tuple(weight.shape) == entry.shape:
        weight = weight[: entry.rows]  # a Fisher information knows nothing of pretrained rows
    if weight.dim() > 0 and tuple(weight.shape) != entry.pulled_shape:
        raise ValueError(
            f"l2sp_weights: the tensor for {entry.name} has shape {tuple(weight.shape)}, the parameter "
            f"{entry.pulled_shape}. It was made for another model."
        )
    if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
        raise ValueError(f"l2sp_weights: the tensor for {entry.name} holds negative, NaN or infinite values.")
    if weight.dim() == 0:
        return float(weight)
    # At least float32: a bfloat16 weight would round the gradient that the pass computes in float32.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype=dtype).contiguous()
