"""λ over time."""

from __future__ import annotations

import math
from typing import Any

from .auto import AutoStrength


def strength_at(schedule: str, base: float, step: int, total_steps: int) -> float:
    """λ of one optimizer step.

    Args:
        schedule: `constant`, or `linear` / `cosine`, which fall from `base` at step 0 to 0 at `total_steps`. `auto`
            is `base` here, as long as nothing was measured; see `AutoStrength`.
        base: λ as the user set it.
        step: Optimizer steps taken so far.
        total_steps: Optimizer steps of the whole training; 0 when it is not known, and λ is then `base`.

    Raises:
        ValueError: The schedule is unknown.
    """
    if schedule not in ("constant", "linear", "cosine", "auto"):
        raise ValueError(f"l2sp_schedule={schedule!r} is unknown; choose 'constant', 'linear', 'cosine' or 'auto'.")
    if schedule in ("constant", "auto") or total_steps <= 0:
        return base
    progress = min(max(step / total_steps, 0.0), 1.0)
    if schedule == "linear":
        return base * (1.0 - progress)
    return base * 0.5 * (1.0 + math.cos(math.pi * progress))


def schedule_state(
    schedule: str, base: float, step: int, total_steps: int, auto: AutoStrength | None = None
) -> dict[str, Any]:
    """The schedule's state, as it is written into `l2sp_state.json`."""
    state: dict[str, Any] = {
        "schedule": schedule,
        "base": base,
        "step": step,
        "total_steps": total_steps,
        "current": strength_at(schedule, base, step, total_steps) if auto is None else auto.value,
    }
    return state if auto is None else {**state, "auto": auto.state_dict()}
