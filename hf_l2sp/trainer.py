"""The trainers: where in a `Trainer`'s life the anchor is taken and the penalty added."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.utils import logging

from .alpha_mixin import L2SPInterpolationMixin
from .anchor import Anchor
from .auto_mixin import L2SPAutoMixin
from .backends import Backend, make_backend
from .checkpoints import output_folder_made
from .decoupled_mixin import L2SPDecoupledMixin
from .fisher_mixin import L2SPFisherMixin
from .heads import warn_if_head_ignores_item_count
from .launch import check_launch
from .naming import canonical_name, in_training_mode, unwrap
from .outputs import L2SPOutputs
from .penalty import l2sp_penalty
from .plan import Plan
from .provenance import examine
from .state import STATE_NAME, check_fingerprint, entry_names, read_state, recorded_anchor

logger = logging.get_logger(__name__)

# Models whose weights an L2SPTrainer has changed in this process: a second trainer cannot see it otherwise.
_trained_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class L2SPMixin(L2SPAutoMixin, L2SPDecoupledMixin, L2SPFisherMixin, L2SPInterpolationMixin, L2SPOutputs):
    """Adds λ·Σ w‖θ − θ0‖² + β‖θ_new‖² to the objective of any `transformers.Trainer`; put it first.

    `class MySFT(L2SPMixin, SFTTrainer)`, with arguments from `class MyConfig(L2SPArguments, SFTConfig)`; plain
    `TrainingArguments` work too, with the defaults of `L2SPArguments`.

    θ0 is taken once per model, before any checkpoint is loaded into it. The gradient of the penalty is added once
    per optimizer step, when the gradients of all micro-batches are there and before they are clipped, whatever the
    gradient accumulation, precision or loss scale; the step returns task loss plus penalty. With
    `l2sp_mode="decoupled"` the optimizer pulls instead, and loss and gradients are those of the task. Evaluation and
    prediction know nothing of either. With `l2sp_lambda` 0 every method is the one of `Trainer`.

    Source: Li, Grandvalet and Davoine, 2018 (arXiv 1802.01483).

    Attributes:
        l2sp_anchor (`Anchor` or `None`): θ0; None before training starts and with `l2sp_lambda` 0.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.l2sp_anchor: Anchor | None = None
        self._l2sp_model: weakref.ref[nn.Module] | None = None
        self._l2sp_in_step = False
        self._l2sp_checkpoint: str | None = None
        # The penalty of a step that the engine takes within backward.
        self._l2sp_stepped: Tensor | None = None
        # Of the window since the last log; on the device, so that no step waits for the host.
        self._l2sp_window: list[Tensor] = []
        self._l2sp_last: tuple[float, list[str], Tensor] | None = None
        # The checkpoint that is being written: `_save_checkpoint` marks it, not `save_model`.
        self._l2sp_saving: str | None = None
        with output_folder_made(self):
            super().__init__(*args, **kwargs)

    @property
    def l2sp_plan(self) -> Plan | None:
        """Which parameter is anchored, new, frozen or excluded; None before training starts."""
        return None if self.l2sp_anchor is None else self.l2sp_anchor.plan

    # --- the anchor -------------------------------------------------------------------------------------------------

    def _l2sp_prepare_anchor(self, checkpoint: str | None = None) -> None:
        """Takes θ0 of the present model, unless that is done; with a checkpoint, checks it against its record."""
        bare = unwrap(self.model)
        if self.l2sp_anchor is None or self._l2sp_model is None or self._l2sp_model() is not bare:
            check_launch(self)
            self.l2sp_anchor = None  # that of an earlier model need not stay beside the new one
            self.l2sp_anchor = self._l2sp_take_anchor(bare, make_backend(self.accelerator, bare))
            self._l2sp_model = weakref.ref(bare)
            self._l2sp_check_fisher()
            if self._l2sp_decoupled:
                self._l2sp_check_decoupled()
            self.l2sp_anchor.when_attached(self._l2sp_anchor_attached)
        if checkpoint is not None:
            self._l2sp_check_against(checkpoint)

    def _l2sp_anchor_attached(self) -> None:
        assert self.l2sp_anchor is not None
        self.l2sp_anchor.require_own_memory()
        if self.is_world_process_zero():  # type: ignore[attr-defined]
            parts = [self.l2sp_anchor.plan.summary(), self.l2sp_anchor.whereabouts()]
            logger.warning("; ".join(part for part in parts if part))

    def _l2sp_check_against(self, checkpoint: str) -> None:
        assert self.l2sp_anchor is not None
        state = read_state(checkpoint)
        if state is None:
            logger.warning(
                f"{checkpoint} has no {STATE_NAME}: it was not saved by an L2SPTrainer with l2sp_lambda > 0. θ0 is "
                "the model handed to the trainer (or l2sp_anchor), which cannot be checked."
            )
            return
        # What was unfrozen before the checkpoint still has its pretrained value here, and not once it is loaded.
        self.l2sp_anchor.join_trainable(also=entry_names(state))
        check_fingerprint(self.l2sp_anchor, state, checkpoint)
        self._l2sp_restore_fisher(checkpoint, state)

    def _l2sp_take_anchor(self, bare: nn.Module, backend: Backend) -> Anchor:
        options = {
            "exclude": self._l2sp_arg("l2sp_exclude"),
            "weights": self._l2sp_arg("l2sp_weights"),
            "dtype": self._l2sp_arg("l2sp_anchor_dtype"),
            "offload": self._l2sp_arg("l2sp_anchor_offload"),
            "offload_folder": self.args.output_dir,
            "provenance": backend.agree(lambda: examine(bare)),
            "backend": backend,
        }
        source = self._l2sp_arg("l2sp_anchor")
        if source is not None:
            return Anchor.from_pretrained(source, bare, revision=self._l2sp_arg("l2sp_anchor_revision"), **options)
        recorded = recorded_anchor(bare, **options)
        if recorded is not None:
            return recorded
        if bare in _trained_models:
            logger.warning(
                "The model handed to this trainer was already trained by another L2SPTrainer in this process; its "
                "present weights are the new θ0. To keep the pretrained ones, set l2sp_anchor to their Hub id or "
                "folder, or load the model anew."
            )
        return Anchor.from_model(bare, **options)

    # Where the model is whole, a checkpoint is loaded into it before `create_optimizer`; whichever comes first takes
    # θ0. FSDP and DeepSpeed shard the model after `_wrap_model` and load the checkpoint after `create_scheduler`,
    # which takes the values.
    def _inner_training_loop(
        self, batch_size: Any = None, args: Any = None, resume_from_checkpoint: Any = None, *rest: Any, **kwargs: Any
    ) -> Any:
        self._l2sp_checkpoint = resume_from_checkpoint
        result = super()._inner_training_loop(batch_size, args, resume_from_checkpoint, *rest, **kwargs)
        if self._l2sp_on and self.l2sp_anchor is not None and self.l2sp_anchor.backend.sharded:
            self._l2sp_last = self._l2sp_measure()  # later no other rank may be there to join in
        return result

    # Sentence-transformers' trainer takes the folder only.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        if self._l2sp_on and (self.l2sp_anchor is None or not self.l2sp_anchor.backend.late):
            self._l2sp_prepare_anchor(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self._l2sp_on:
            self._l2sp_prepare_anchor()
        return super().create_optimizer(*args, **kwargs)

    def _wrap_model(self, *args: Any, **kwargs: Any) -> Any:
        if self._l2sp_on and self.is_in_train:
            self._l2sp_prepare_anchor()
        return super()._wrap_model(*args, **kwargs)  # type: ignore[misc]

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        # Reached once per training loop, also when auto_find_batch_size starts it again.
        if self._l2sp_on:
            self._l2sp_prepare_anchor()
            self._l2sp_window = []
            assert self.l2sp_anchor is not None
            bare, backend = unwrap(self.model), self.l2sp_anchor.backend
            if backend.late and backend.prepared(bare):
                if not self.l2sp_anchor.attached:
                    self.l2sp_anchor.attach(bare)
                    if self._l2sp_checkpoint is not None:
                        self._l2sp_check_against(self._l2sp_checkpoint)
                backend.before_step(self._l2sp_before_engine_step)
            self._l2sp_begin_auto(self._l2sp_checkpoint)
        return super().create_scheduler(*args, **kwargs)  # type: ignore[misc]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)  # type: ignore[misc]
        # Without decay the groups stay as Trainer makes them, so that either loads the other's optimizer state.
        if not self._l2sp_on or self.l2sp_anchor is None or self.args.weight_decay == 0:
            return names
        # A pull to zero would contradict the pull to θ0. An entry that is frozen now may be unfrozen later. Parameters
        # are known by name, or by identity where the model is in another one: sentence-transformers' trainer asks
        # about its loss, with the model in it.
        pulled = {name: e.parameter for name, e in self.l2sp_anchor.plan.entries.items() if e.can_be_anchored}
        ids = {id(parameter) for parameter in pulled.values()}
        ids |= {id(factor) for entry in self.l2sp_anchor.plan.low_rank.values() for factor in entry.pulled_factors()}
        inside = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in ids}
        return [name for name in names if name not in inside and canonical_name(name) not in pulled]

    # --- the objective ----------------------------------------------------------------------------------------------

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Task loss; plus the penalty, differentiable, for a model in training mode outside a training step.

        Inside a training step the term stays out of the graph: `training_step` adds its gradient and its value once
        per optimizer step, instead of once per micro-batch. `l2sp_mode="decoupled"` has no such term.
        """
        if not self._l2sp_on:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if self._l2sp_in_step:
            warn_if_head_ignores_item_count(self, super().compute_loss, model, inputs, args, kwargs)  # type: ignore[misc]
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        result = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if not in_training_mode(model) or self._l2sp_decoupled:
            return result
        self._l2sp_prepare_anchor()
        assert self.l2sp_anchor is not None
        loss, *rest = result if isinstance(result, tuple) else (result,)
        penalty = self._l2sp_strength() * l2sp_penalty(unwrap(self.model), self.l2sp_anchor)
        beta = float(self._l2sp_arg("l2sp_beta"))
        for term in self.l2sp_anchor.new_terms() if beta else ():
            penalty = penalty + beta * term.parameter.to(penalty.dtype).square().sum()
        loss = loss + penalty.to(device=loss.device)
        return (loss, *rest) if isinstance(result, tuple) else loss

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if not self._l2sp_on:
            return super().training_step(model, *args, **kwargs)  # type: ignore[misc]
        if self.l2sp_anchor is None and self.state.global_step > 0:
            raise ValueError(
                f"l2sp_lambda was raised from 0 to {self._l2sp_arg('l2sp_lambda')} at step {self.state.global_step}, "
                "when the pretrained weights were gone already. Begin with l2sp_lambda > 0, however small."
            )
        self._l2sp_prepare_anchor()
        assert self.l2sp_anchor is not None
        backend = self.l2sp_anchor.backend
        # What was unfrozen since the last step still has its pretrained value.
        self.l2sp_anchor.join_trainable()
        self._l2sp_weigh()
        if self._l2sp_decoupled:
            self._l2sp_let_optimizer_pull()
        self._l2sp_in_step = True
        try:
            loss = super().training_step(model, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._l2sp_in_step = False
        # Set by the training loop before each micro-batch: true for the last one of a window, be it a short one.
        if not self.accelerator.sync_gradients:
            self._l2sp_note_loss(loss)
            return loss
        _trained_models.add(unwrap(self.model))
        if self._l2sp_decoupled:
            return loss
        if backend.steps_in_backward:
            penalty, self._l2sp_stepped = self._l2sp_stepped, None
        else:
            penalty = self._l2sp_add_penalty()
        self._l2sp_note_loss(loss)
        if penalty is None:
            raise RuntimeError(
                "DeepSpeed took a step without L2-SP's penalty. Was the engine replaced during training? Let the "
                "trainer make it."
            )
        # At least float32: a bfloat16 loss would swallow the penalty, which is counted once in the logged sum.
        dtype = torch.promote_types(loss.dtype, torch.float32)
        return loss.to(dtype) + penalty.to(device=loss.device, dtype=dtype)

    def _l2sp_add_penalty(self) -> Tensor:
        """Adds the gradient of λ·Σ w‖θ − θ0‖² + β‖θ_new‖² to the gradients; returns the value."""
        anchor = self.l2sp_anchor
        assert anchor is not None
        self._l2sp_update_auto()
        strength, beta = self._l2sp_strength(), float(self._l2sp_arg("l2sp_beta"))
        sums = anchor.apply(strength)
        penalty = strength * sums.total
        if beta:
            penalty = penalty + beta * anchor.backend.apply(anchor.new_terms(), beta).total.to(penalty.device)
        self._l2sp_window.append(penalty)
        self._l2sp_last = (strength, anchor.active_names(), sums.squared)
        return penalty

    def _l2sp_before_engine_step(self) -> None:
        self._l2sp_stepped = self._l2sp_add_penalty() if self._l2sp_on else None

    def _l2sp_measure(self) -> tuple[float, list[str], Tensor]:
        """λ, and the squared distance of every parameter that is pulled; all ranks must take part."""
        assert self.l2sp_anchor is not None
        squared = self.l2sp_anchor.apply(0.0, gradient=False).squared
        return self._l2sp_strength(), self.l2sp_anchor.active_names(), squared


class L2SPTrainer(L2SPMixin, Trainer):
    """`transformers.Trainer` with L2-SP: same constructor, same methods, arguments from `L2SPTrainingArguments`.

    See `L2SPMixin` for what it does.
    """


class L2SPSeq2SeqTrainer(L2SPMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with L2-SP; arguments from `L2SPSeq2SeqTrainingArguments`.

    See `L2SPMixin` for what it does.
    """
