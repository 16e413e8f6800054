"""What L2-SP promises in every trainer it is mixed into; the files beside this one say how each trainer is built.

The plain trainer of the same family is the reference: with learning rate 0 both see the same weights and batches, so
that their gradients, logs and evaluations may differ by the penalty only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import HfArgumentParser, PreTrainedTokenizerFast, Trainer, TrainerCallback

from ..exactness.harness import Recorder, Reference, Run, expected_gradients, relative_error, snapshot

L2SP_KEYS = {"task_loss", "l2sp_penalty", "l2sp_distance", "l2sp_drift", "l2sp_lambda"}
LAM = 0.3
# Micro-batch size and accumulation steps; four examples per optimizer step either way.
LAYOUTS = ((4, 1), (1, 4))


WORDS = tuple(f"w{number}" for number in range(87))


def tiny_tokenizer(words: Sequence[str] = WORDS, **kwargs: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, the first of which stands for all unknown ones; <pad>, <s>, </s> are 0, 1, 2.

    Args:
        words: The vocabulary.
        kwargs: `frame`: whether to put a text between <s> and </s>; others go to the tokenizer.
    """
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kwargs.pop("frame", False):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token=words[0],
        model_input_names=["input_ids", "attention_mask"],
        **kwargs,
    )


def sentences(count: int, length: int, seed: int = 0) -> list[str]:
    """Random texts of the same number of words, so that a mean over tokens is one over texts."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, len(WORDS), (count, length), generator=generator)
    return [" ".join(WORDS[int(number)] for number in row) for row in numbers]


@dataclass(frozen=True)
class Family:
    """How one kind of trainer is built, plain and with L2-SP.

    Attributes:
        plain: The trainer's class, and `config` that of its arguments.
        l2sp: The same with L2-SP mixed in, and `l2sp_config`.
        load: Loads the pretrained model, or a fine-tuned one from a folder, with a dropout probability.
        pretrained: Folder of the pretrained model.
        inputs: What the constructor takes beside model and arguments, for a model.
        arguments: What this family sets in the arguments.
        own_keys: Metrics that the trainer logs by itself.
        new: Names of parameters without a pretrained value.
        card_tags: Tags that the trainer's own model card has.
        tolerance: Of float32 sums whose order differs, relative.
    """

    plain: type[Trainer]
    config: type
    l2sp: type[Trainer]
    l2sp_config: type
    load: Callable[..., nn.Module]
    pretrained: str
    inputs: Callable[[nn.Module], dict[str, Any]]
    arguments: dict[str, Any] = field(default_factory=dict)
    own_keys: frozenset[str] = frozenset()
    new: tuple[str, ...] = ()
    card_tags: frozenset[str] = frozenset()
    tolerance: float = 2e-5

    def build(
        self,
        kind: str,
        folder: Path,
        model: nn.Module | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        dropout: float = 0.0,
        **arguments: Any,
    ) -> Trainer:
        """A trainer; `kind` is `plain` or `l2sp`."""
        settings: dict[str, Any] = {
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "seed": 7,
            **self.arguments,
            **arguments,
        }
        if kind == "plain":
            settings = {k: v for k, v in settings.items() if not k.startswith("l2sp_")}
        cls, config = (self.plain, self.config) if kind == "plain" else (self.l2sp, self.l2sp_config)
        torch.manual_seed(0)
        model = self.load(dropout=dropout) if model is None else model
        return cls(model=model, args=config(**settings), callbacks=list(callbacks), **self.inputs(model))

    def record(
        self, kind: str, folder: Path, prepare: Callable[[Trainer], None] | None = None, **arguments: Any
    ) -> Run:
        """Trains at learning rate 0 on moved weights and keeps what the optimizer sees."""
        recorder = Recorder()
        trainer = self.build(kind, folder, callbacks=[recorder], **{"learning_rate": 0.0, **arguments})
        if prepare is not None:
            prepare(trainer)
        result = trainer.train()
        return Run(trainer, recorder.gradients, recorder.weights, result)

    def check_gradient(
        self,
        folder: Path,
        prepare: Callable[[Trainer], None] | None = None,
        layouts: Sequence[tuple[int, int]] = LAYOUTS,
        **arguments: Any,
    ) -> list[tuple[Run, Run]]:
        """The pull and the logs, against the plain trainer, with and without gradient accumulation."""
        reference = Reference(snapshot(self.load()), LAM, new=self.new)
        pairs = []
        for batch, accumulation in layouts:
            settings = {
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulation,
                "l2sp_lambda": LAM,
                **arguments,
            }
            plain, penalised = (
                self.record(kind, folder / f"{kind}{batch}", prepare, **settings) for kind in ("plain", "l2sp")
            )
            check_pull(plain, penalised, reference)
            check_logs(plain, penalised, reference, self.own_keys)
            pairs.append((plain, penalised))
        return pairs


def timeless(entry: dict[str, Any]) -> dict[str, Any]:
    """A log entry without what depends on the clock."""
    clocks = ("runtime", "per_second", "preparation_time", "step_time")
    return {key: value for key, value in entry.items() if not any(clock in key for clock in clocks)}


def training_logs(trainer: Trainer) -> list[dict[str, Any]]:
    return [timeless(entry) for entry in trainer.state.log_history if "loss" in entry]


def check_pull(plain: Run, penalised: Run, reference: Reference) -> None:
    """The gradients differ by 2λ(θ − θ0), to rounding, at every step."""
    trainable = {n for n, p in penalised.trainer.model.named_parameters() if p.requires_grad}
    expected = expected_gradients(plain, reference, lambda _: trainable)
    assert len(expected) == len(penalised.gradients) > 0
    assert all(float(g.abs().max()) > 0 for step in plain.gradients for g in [next(iter(step.values()))])
    for step, (got, want) in enumerate(zip(penalised.gradients, expected, strict=True)):
        assert relative_error(got, want) < 1e-5, f"step {step}"
        task = {n: plain.gradients[step].get(n, torch.zeros_like(g)).double() for n, g in got.items()}
        pull = {n: got[n].double() - task[n] for n in got}
        wanted = {n: want[n] - task[n] for n in want}
        assert sum(float((w**2).sum()) for w in wanted.values()) > 0
        # The pull itself must be there, and not be lost in a large task gradient.
        assert relative_error(pull, wanted) < 1e-3, f"step {step}"


def check_logs(plain: Run, penalised: Run, reference: Reference, own_keys: frozenset[str]) -> None:
    """Every log carries the plain trainer's metrics, unchanged, and L2-SP's; the loss is the objective."""
    trainable = {n for n, p in penalised.trainer.model.named_parameters() if p.requires_grad}
    logs, plain_logs = training_logs(penalised.trainer), training_logs(plain.trainer)
    assert len(logs) == len(plain_logs) == len(plain.weights)
    for step, (log, plain_log) in enumerate(zip(logs, plain_logs, strict=True)):
        assert own_keys <= log.keys()
        assert log.keys() == plain_log.keys() | L2SP_KEYS
        for key in plain_log.keys() - {"loss", "grad_norm"}:
            assert log[key] == plain_log[key], key
        penalty = reference.penalty(plain.weights[step], trainable, step, len(logs))
        assert log["l2sp_penalty"] == pytest.approx(penalty, rel=1e-5)
        assert log["task_loss"] == pytest.approx(plain_log["loss"], rel=1e-5, abs=1.1e-4)  # transformers 4 rounds both
        assert log["loss"] == pytest.approx(log["task_loss"] + log["l2sp_penalty"], rel=1e-6)
        assert all(type(log[key]) is float for key in L2SP_KEYS)


class TrainerContract:
    """The promises, as tests; a subclass has a fixture `family`."""

    def test_gradient_and_logs(self, family: Family, tmp_path: Path) -> None:
        family.check_gradient(tmp_path)

    def test_one_by_four_is_four_by_one(self, family: Family, tmp_path: Path) -> None:
        def weights(batch: int, accumulation: int, lam: float) -> dict[str, Tensor]:
            trainer = family.build(
                "l2sp",
                tmp_path / f"{batch}-{lam}",
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                l2sp_lambda=lam,
            )
            trainer.train()
            assert trainer.state.global_step == 3
            return snapshot(trainer.model)

        origin = snapshot(family.load())

        def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
            """Relative to how far training has moved the weights."""
            pretrained = [name for name in a if name not in family.new]
            return relative_error(*({n: w[n] - origin[n] for n in pretrained} for w in (a, b)))

        whole, accumulated = weights(4, 1, LAM), weights(1, 4, LAM)
        assert difference(accumulated, whole) < family.tolerance
        # What a penalty multiplied by the accumulation steps would lead to is far off this scale.
        assert difference(weights(1, 4, 4 * LAM), whole) > 100 * family.tolerance

    def test_evaluation_is_that_of_the_plain_trainer(self, family: Family, tmp_path: Path) -> None:
        trainer = family.build(
            "l2sp", tmp_path / "l2sp", l2sp_lambda=5.0, l2sp_beta=5.0, eval_strategy="steps", eval_steps=1
        )
        trainer.train()
        assert max(log["l2sp_penalty"] for log in training_logs(trainer)) > 1e-3
        plain = family.build("plain", tmp_path / "plain", model=trainer.model)
        torch.manual_seed(1)
        ours = timeless(trainer.evaluate())
        torch.manual_seed(1)
        theirs = timeless(plain.evaluate())
        for key in ("epoch", "eval_num_tokens"):  # of the training before
            ours.pop(key, None), theirs.pop(key, None)
        assert "eval_loss" in ours
        assert ours == theirs
        for entry in trainer.state.log_history:
            if "eval_loss" in entry:
                assert not L2SP_KEYS & entry.keys()

    def test_lambda_zero_is_the_plain_trainer_bit_for_bit(self, family: Family, tmp_path: Path) -> None:
        outcomes = []
        for kind in ("plain", "l2sp"):
            trainer = family.build(
                kind,
                tmp_path / kind / "model",
                dropout=0.1,
                optim="adamw_torch",
                weight_decay=0.1,
                max_grad_norm=1.0,
                l2sp_lambda=0.0,
                l2sp_log_layers=True,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                save_strategy="steps",
                save_steps=2,
            )
            callbacks = [type(callback) for callback in trainer.callback_handler.callbacks]
            loss = trainer.train().training_loss
            trainer.save_model()
            logs = [timeless(entry) for entry in trainer.state.log_history]
            files = sorted(str(p.relative_to(tmp_path / kind)) for p in (tmp_path / kind).rglob("*"))
            groups = [{k: v for k, v in g.items() if k != "params"} for g in trainer.optimizer.param_groups]
            outcomes.append((trainer, [callbacks, loss, logs, files, groups], torch.get_rng_state()))
        (plain, told, rng), (zero, zero_told, zero_rng) = outcomes
        assert zero.l2sp_anchor is None
        assert zero_told == told
        assert torch.equal(zero_rng, rng)
        for (name, a), (_, b) in zip(plain.model.named_parameters(), zero.model.named_parameters(), strict=True):
            assert torch.equal(a, b), name

    def test_plan_and_optimizer_groups(self, family: Family, tmp_path: Path) -> None:
        trainer = family.build("l2sp", tmp_path, max_steps=1, l2sp_lambda=LAM, weight_decay=0.1)
        origin = snapshot(trainer.model)
        trainer.train()
        roles = {name: entry.role for name, entry in trainer.l2sp_plan.entries.items()}
        assert roles == {name: "new" if name in family.new else "anchored" for name in origin}
        assert all(torch.equal(trainer.l2sp_anchor[name], origin[name]) for name in trainer.l2sp_anchor)
        assert trainer.l2sp_anchor.source == family.pretrained
        # A pull to zero beside the pull to θ0 would contradict it.
        decayed = {id(p) for g in trainer.optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
        names = {name for name, p in trainer.model.named_parameters() if id(p) in decayed}
        assert names == {name for name in family.new if not name.endswith("bias")}

    def test_saved_folder_and_resume(self, family: Family, tmp_path: Path) -> None:
        settings = {"l2sp_lambda": LAM, "optim": "adamw_torch", "learning_rate": 1e-2}
        trainer = family.build("l2sp", tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=4, **settings)
        origin = snapshot(trainer.model)
        trainer.train()
        trainer.save_model()
        for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
            state = json.loads((folder / "l2sp_state.json").read_text())
            assert state["anchor"]["fingerprint"] == trainer.l2sp_anchor.fingerprint
            assert state["anchor"]["source"] == family.pretrained
            arguments = torch.load(folder / "training_args.bin", weights_only=False)
            assert arguments.l2sp_lambda == LAM and type(arguments) is family.l2sp_config
        again = family.load(str(tmp_path / "run"))
        for (name, a), (_, b) in zip(trainer.model.named_parameters(), again.named_parameters(), strict=True):
            assert torch.equal(a, b), name

        resumed = family.build("l2sp", tmp_path / "run", save_strategy="no", max_steps=4, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        for (name, a), (_, b) in zip(trainer.model.named_parameters(), resumed.model.named_parameters(), strict=True):
            assert torch.equal(a, b), name
        assert [log["l2sp_penalty"] for log in training_logs(resumed)] == [
            log["l2sp_penalty"] for log in training_logs(trainer)
        ]

        # A trainer on the fine-tuned folder is pulled to the pretrained weights, not to the fine-tuned ones.
        second = family.build("l2sp", tmp_path / "second", model=again, max_steps=1, l2sp_lambda=LAM)
        second.train()
        assert all(torch.equal(second.l2sp_anchor[name], origin[name]) for name in second.l2sp_anchor)
        assert math.isclose(
            training_logs(second)[0]["l2sp_distance"], trainer.l2sp_drift_report().total.distance, rel_tol=1e-5
        )

    def test_model_card(self, family: Family, tmp_path: Path) -> None:
        trainer = family.build("l2sp", tmp_path, max_steps=1, l2sp_lambda=LAM)
        trainer.train()
        trainer.create_model_card()
        card = ModelCard.load(tmp_path / "README.md")
        assert {"l2-sp", "hf-l2sp"} | family.card_tags <= set(card.data.tags)
        assert card.text.count("## How it was fine-tuned: L2-SP") == 1
        assert family.pretrained not in card.text.split("<!-- l2-sp -->")[1]  # a folder of this machine

    def test_arguments_from_the_command_line(self, family: Family, tmp_path: Path) -> None:
        line = f"--output_dir {tmp_path} --use_cpu --bf16 False --l2sp_lambda 0.5"
        line += " --l2sp_schedule cosine --l2sp_exclude bias"
        (arguments,) = HfArgumentParser(family.l2sp_config).parse_args_into_dataclasses(line.split())
        assert (arguments.l2sp_lambda, arguments.l2sp_schedule, arguments.l2sp_exclude) == (0.5, "cosine", ["bias"])
        with pytest.raises(ValueError, match="l2sp_lambda"):
            family.l2sp_config(output_dir=str(tmp_path), use_cpu=True, bf16=False, l2sp_lambda=-1.0)

    def test_best_model_is_loaded(self, family: Family, tmp_path: Path) -> None:
        best = []
        # One of the two has its best step before the last one.
        for greater in (False, True):
            trainer = family.build(
                "l2sp",
                tmp_path / str(greater),
                l2sp_lambda=LAM,
                save_strategy="steps",
                save_steps=1,
                eval_strategy="steps",
                eval_steps=1,
                load_best_model_at_end=True,
                metric_for_best_model="eval_loss",
                greater_is_better=greater,
            )
            trainer.train()
            loaded = family.load(trainer.state.best_model_checkpoint)
            for (name, a), (_, b) in zip(trainer.model.named_parameters(), loaded.named_parameters(), strict=True):
                assert torch.equal(a, b), name
            best.append(trainer.state.best_global_step)
        assert min(best) < trainer.state.global_step
