"""What a trainer writes and says: logs, checkpoints, state file, report and card."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .anchor import Anchor
from .args import L2SPArguments
from .auto import AutoStrength
from .card import add_l2sp_section, write_report
from .card_scores import scores_by_split
from .checkpoints import checked_resume, checkpoint_written, model_written
from .naming import unwrap
from .publish import push, push_checkpoint, repository_opened
from .report import HISTORY_KEYS, DriftReport, drift_report, layer_drift, make_report
from .sentence import is_sentence_model
from .state import anchor_state
from .strength import schedule_state, strength_at

_DEFAULTS = {f.name: f.default for f in fields(L2SPArguments)}


class L2SPOutputs:
    """The part of `L2SPMixin` that looks at a training and changes nothing in it."""

    # Set by the trainer that follows in the bases.
    args: Any
    model: Any
    accelerator: Any
    state: Any
    is_in_train: bool

    # Set by `L2SPMixin`: θ0; the penalties since the last log; λ, names and squared distances of the last step; the
    # checkpoint that is being written.
    l2sp_anchor: Anchor | None
    _l2sp_window: list[Tensor]
    _l2sp_last: tuple[float, list[str], Tensor] | None
    _l2sp_saving: str | None
    _l2sp_auto: AutoStrength | None

    def _l2sp_arg(self, name: str) -> Any:
        return getattr(self.args, name, _DEFAULTS[name])

    @property
    def _l2sp_on(self) -> bool:
        return bool(self._l2sp_arg("l2sp_lambda") > 0)

    def _l2sp_strength(self) -> float:
        if self._l2sp_auto is not None:
            return self._l2sp_auto.value
        # Read anew each time: hyperparameter search and callbacks set the argument while the trainer lives.
        return strength_at(
            self._l2sp_arg("l2sp_schedule"),
            float(self._l2sp_arg("l2sp_lambda")),
            self.state.global_step,
            self.state.max_steps or 0,
        )

    # --- logs -------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._l2sp_window:
            logs.update(self._l2sp_logs(float(logs["loss"])))
            self._l2sp_window = []
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _l2sp_logs(self, loss: float) -> dict[str, float]:
        """The penalty averaged over the window, as the loss is; the distances and λ of its last step."""
        assert self.l2sp_anchor is not None and self._l2sp_last is not None
        self.l2sp_anchor.require_unchanged()
        penalty = float(torch.stack(self._l2sp_window).mean())
        strength, names, squared = self._l2sp_last
        total, layers = layer_drift(self.l2sp_anchor, dict(zip(names, squared.tolist(), strict=True)))
        logs = {
            "task_loss": loss - (0.0 if self._l2sp_arg("l2sp_mode") == "decoupled" else penalty),
            "l2sp_penalty": penalty,
            "l2sp_distance": total.distance,
            "l2sp_drift": total.drift,
            "l2sp_lambda": strength,
        }
        if self._l2sp_arg("l2sp_log_layers"):
            logs.update({f"l2sp_drift/{name}": layer.drift for name, layer in layers.items()})
        return logs

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; resumes only from checkpoints that were written to their end.

        Args:
            resume_from_checkpoint: True: the last complete checkpoint in `output_dir`, with a warning that names
                later ones whose writing was cut off. A path: that checkpoint, which must be complete.
            args: As for `Trainer`.
            kwargs: As for `Trainer`.

        Raises:
            OSError: Checkpoints are to be saved and `output_dir` cannot be written to, or a save has failed; training
                can go on from the last complete checkpoint.
            ValueError: There is no complete checkpoint to resume from, or it was trained against another θ0.
        """
        if self._l2sp_on:
            resume_from_checkpoint = checked_resume(self, resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        if not self._l2sp_on or self.l2sp_anchor is None or not self.l2sp_anchor.attached:
            super()._save_checkpoint(model, trial, *args, **kwargs)  # type: ignore[misc]
            return
        run: str = self._get_output_dir(trial=trial)  # type: ignore[attr-defined]
        self._l2sp_saving = os.path.join(run, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            with checkpoint_written(self, self._l2sp_saving, self._l2sp_state()):
                self._l2sp_keep_fisher(self._l2sp_saving)  # type: ignore[attr-defined]
                super()._save_checkpoint(model, trial, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._l2sp_saving = None

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As `Trainer.save_model`; `l2sp_state.json` goes there first, and says at last that everything is there.

        Raises:
            OSError: The folder cannot be written; says why and what to do.
        """
        folder = output_dir if output_dir is not None else self.args.output_dir
        with self._l2sp_marking(folder):
            super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]
            if is_sentence_model(unwrap(self.model)):  # which writes a card into every folder that it is saved in
                self._l2sp_complete_card(folder)

    def _l2sp_marking(self, folder: str) -> AbstractContextManager[None]:
        if not self._l2sp_on or folder == self._l2sp_saving:
            return nullcontext()
        # Before the weights: a folder with trained weights then never lacks the record of their θ0.
        known = self.l2sp_anchor is not None and self.l2sp_anchor.attached and self.args.should_save
        return model_written(self, folder, self._l2sp_state() if known else None)

    def _l2sp_state(self) -> dict[str, Any]:
        assert self.l2sp_anchor is not None
        self._l2sp_update_auto()  # type: ignore[attr-defined]
        strength = schedule_state(
            self._l2sp_arg("l2sp_schedule"),
            float(self._l2sp_arg("l2sp_lambda")),
            self.state.global_step,
            self.state.max_steps or 0,
            self._l2sp_auto,
        )
        return {
            "anchor": anchor_state(self.l2sp_anchor),
            "strength": strength,
            "mode": self._l2sp_arg("l2sp_mode"),
            "beta": float(self._l2sp_arg("l2sp_beta")),
            "exclude": self._l2sp_arg("l2sp_exclude"),
            "weights": self._l2sp_arg("l2sp_weights"),
            **self._l2sp_fisher_state(),  # type: ignore[attr-defined]
            **self._l2sp_interpolation_state(),  # type: ignore[attr-defined]
        }

    # --- report, card -----------------------------------------------------------------------------------------------

    def l2sp_drift_report(self) -> DriftReport:
        """How far the model is from θ0 now, per layer, and how it came there.

        Where the model is sharded, this rank cannot look at all of it: there it is the distance at the end of
        training, or during training that at the beginning of the last step.

        Raises:
            ValueError: There is no anchor: training has not started, or `l2sp_lambda` is 0.
        """
        if self.l2sp_anchor is None:
            raise ValueError(
                "There is no anchor to measure the drift from: call train() first, with l2sp_lambda > 0 (it is "
                f"{self._l2sp_arg('l2sp_lambda')}), or use drift_report(model, anchor)."
            )
        if self.l2sp_anchor.backend.sharded and self._l2sp_last is not None:
            _, names, squared = self._l2sp_last
            report = make_report(self.l2sp_anchor, dict(zip(names, squared.tolist(), strict=True)))
        else:
            report = drift_report(self.model, self.l2sp_anchor)
        report.settings = {
            name: self._l2sp_arg(f"l2sp_{name}") for name in ("lambda", "schedule", "mode", "beta", "exclude")
        }
        if self._l2sp_auto is not None:
            report.settings["lambda"] = self._l2sp_auto.value  # not what it was told to begin with
        if chosen := self._l2sp_interpolation_state():  # type: ignore[attr-defined]
            report.settings["alpha"] = chosen["interpolation"]["alpha"]
        report.history = [
            {key: entry[key] for key in HISTORY_KEYS if key in entry}
            for entry in self.state.log_history
            if "task_loss" in entry
        ]
        return report

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        self._l2sp_complete_card(self.args.output_dir, kwargs)

    def _l2sp_complete_card(self, folder: str, about: dict[str, Any] | None = None) -> None:
        """Adds what L2-SP knows; where it is the final card and not one of a checkpoint, with report and results."""
        if not self._l2sp_on or self.l2sp_anchor is None or not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        if not os.path.isfile(os.path.join(folder, "README.md")):
            return  # sentence-transformers goes on without one that failed
        report, model = self.l2sp_drift_report(), unwrap(self.model)
        if about is None or self.is_in_train:
            add_l2sp_section(folder, report)
            return
        # sentence-transformers has its own evaluators and tells their results.
        scores = None if is_sentence_model(model) else scores_by_split(self.state, folder)
        add_l2sp_section(folder, report, write_report(folder, report), scores, type(model).__name__, about)

    # --- Hub --------------------------------------------------------------------------------------------------------

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        with repository_opened(self):
            super().init_hf_repo(*args, **kwargs)  # type: ignore[misc]

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer.push_to_hub`, with the drift report; what is private stays here (see `hf_l2sp.public`).

        Raises:
            PushError: The Hub refuses or cannot be reached; the model is saved, and the message says where.
        """
        if not self._l2sp_on:
            kwargs |= {} if private is None else {"private": private}  # unknown to transformers 4
            return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)  # type: ignore[misc]
        return push(self, commit_message, blocking, token, revision, private, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._l2sp_on:
            push_checkpoint(self, checkpoint_folder)
        else:
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]
