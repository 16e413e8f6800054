"""`l2sp_mode="decoupled"` in a trainer: the pull to θ0 within the optimizer step, beside the gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.utils import logging

from .decoupled import course_of, pull_pass, remarks
from .strength import strength_at

if TYPE_CHECKING:
    from .anchor import Anchor

logger = logging.get_logger(__name__)

_INSTEAD = "Set l2sp_mode='loss', which adds the pull to the gradient."


class L2SPDecoupledMixin:
    """The part of `L2SPMixin` that pulls within the optimizer step, before the step is taken, as AdamW decays."""

    l2sp_anchor: Anchor | None
    args: Any
    state: Any
    optimizer: Any
    is_in_train: bool
    lr_scheduler: Any
    _l2sp_window: list[Tensor]
    _l2sp_last: tuple[float, list[str], Tensor] | None
    # The optimizer that pulls, and what takes the pull out of it again.
    _l2sp_pulling: tuple[torch.optim.Optimizer, RemovableHandle] | None = None

    @property
    def _l2sp_decoupled(self) -> bool:
        return bool(self._l2sp_on) and self._l2sp_arg("l2sp_mode") == "decoupled"  # type: ignore[attr-defined]

    # --- before training --------------------------------------------------------------------------------------------

    def _l2sp_check_decoupled(self) -> None:
        """Raises:
        ValueError: The pull would not reach what the optimizer updates.
        """
        anchor = self.l2sp_anchor
        assert anchor is not None
        if anchor.backend.steps_in_backward:
            raise ValueError(
                "l2sp_mode='decoupled' does not work with DeepSpeed, whose engine takes the steps on copies of its "
                f"own. {_INSTEAD} Or launch with DDP or FSDP."
            )
        if anchor.active_low_rank():
            raise ValueError(
                "l2sp_mode='decoupled' does not work with LoRA: what is pulled is the product s·BA, and there is no "
                f"step of B and A alone that shrinks it by a given part. {_INSTEAD}"
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if self._l2sp_decoupled and optimizer is not None:
            _check_optimizer(_inner(optimizer))
        return optimizer

    # --- training ---------------------------------------------------------------------------------------------------

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._inner_training_loop(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._l2sp_stop_pulling()

    def _l2sp_stop_pulling(self) -> None:
        if self._l2sp_pulling is not None:
            self._l2sp_pulling[1].remove()
            self._l2sp_pulling = None

    def _l2sp_let_optimizer_pull(self) -> None:
        """Hooks the pull into the present optimizer, unless that is done; `Trainer` may have made another one."""
        optimizer = _inner(self.optimizer)
        if self._l2sp_pulling is not None and self._l2sp_pulling[0] is optimizer:
            return
        self._l2sp_stop_pulling()
        self._l2sp_check_decoupled()
        _check_optimizer(optimizer)
        self._l2sp_pulling = optimizer, optimizer.register_step_pre_hook(self._l2sp_pull)
        self._l2sp_look_ahead(optimizer)

    def _l2sp_look_ahead(self, optimizer: torch.optim.Optimizer) -> None:
        anchor = self.l2sp_anchor
        assert anchor is not None
        pulled = {id(entry.parameter) for entry in anchor.active()}
        groups = [n for n, g in enumerate(optimizer.param_groups) if any(id(p) in pulled for p in g["params"])]
        if not groups:
            raise ValueError(
                "l2sp_mode='decoupled': the optimizer has none of the parameters that are pulled, so the pull would "
                "be silently absent. Let the trainer make the optimizer, or give it one over model.parameters()."
            )
        schedule, strength = self._l2sp_arg("l2sp_schedule"), float(self._l2sp_arg("l2sp_lambda"))  # type: ignore[attr-defined]
        steps = self.state.max_steps or 0
        course = course_of(self.lr_scheduler, groups, lambda step: strength_at(schedule, strength, step, steps), steps)
        short = [e for e in anchor.active() if anchor.backend.local(e.parameter).element_size() <= 2]
        weights = [entry.weight for entry in anchor.active()]
        if anchor.backend.is_main_process:
            for remark in remarks(course, strength, weights, len(short)):
                logger.warning(remark)

    def _l2sp_pull(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        """θ ← θ − lr·2λw(θ − θ0), and θ_new ← θ_new − lr·2β·θ_new; called before each step that is taken."""
        if not self._l2sp_decoupled:  # λ was set to 0 meanwhile
            return
        anchor = self.l2sp_anchor
        assert anchor is not None
        strength, beta = self._l2sp_strength(), float(self._l2sp_arg("l2sp_beta"))  # type: ignore[attr-defined]
        pulled = anchor.terms()
        terms = [*pulled, *(anchor.new_terms() if beta else ())]
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        kept = _kept(optimizer, kwargs)
        factors: list[float | Tensor] = []
        for index, term in enumerate(terms):
            # What the optimizer does not have, it does not move either.
            factor = 2.0 * (strength if index < len(pulled) else beta) * rates.get(id(term.parameter), 0.0)
            factors.append(factor if kept is None else kept * factor)
        backend = anchor.backend
        parts = [term._replace(parameter=backend.local(term.parameter)) for term in terms]
        sums = backend.total(pull_pass(parts, factors), [backend.copies(term.parameter) for term in terms])
        self._l2sp_note_penalty(sums.weighted, sums.squared, strength, beta)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._l2sp_decoupled and self.is_in_train and not self._l2sp_window:
            self._l2sp_measure_penalty()  # all steps since the last log were skipped
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _l2sp_measure_penalty(self) -> None:
        anchor = self.l2sp_anchor
        assert anchor is not None
        beta = float(self._l2sp_arg("l2sp_beta"))  # type: ignore[attr-defined]
        terms = [*anchor.terms(), *(anchor.new_terms() if beta else ())]
        sums = anchor.backend.apply(terms, 0.0, gradient=False)
        self._l2sp_note_penalty(sums.weighted, sums.squared, self._l2sp_strength(), beta)  # type: ignore[attr-defined]

    def _l2sp_note_penalty(self, weighted: Tensor, squared: Tensor, strength: float, beta: float) -> None:
        anchor = self.l2sp_anchor
        assert anchor is not None
        names = anchor.active_names()
        count = len(names)
        self._l2sp_window.append(strength * weighted[:count].sum() + beta * weighted[count:].sum())
        self._l2sp_last = (strength, names, squared[:count])


def _inner(optimizer: Any) -> Any:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _check_optimizer(optimizer: Any) -> None:
    name = type(optimizer).__name__
    cause = None
    if "schedulefree" in name.lower():
        cause = f"{name}, which steps from averages that it computes from the weights"
    elif not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        cause = f"{name}, which is no torch.optim.Optimizer with hooks before its step"
    elif any(group.get("lr") is None for group in optimizer.param_groups):
        cause = f"{name} without a learning rate of its own (lr=None), by which the pull would be scaled"
    if cause is not None:
        raise ValueError(f"l2sp_mode='decoupled' does not work with {cause}. {_INSTEAD}")


def _kept(optimizer: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Whether a loss scaler lets the step be taken (1) or found infinite gradients (0); None where none asks so late.

    Other optimizers are not called at all for a step that is skipped. Fused ones are, and skip it on the device.
    """
    found = getattr(optimizer, "found_inf", None)
    if found is None and kwargs.get("grad_scaler") is not None:
        found = sum(kwargs["grad_scaler"]._check_inf_per_device(optimizer).values())
    return None if found is None else (found == 0).to(torch.float32)
