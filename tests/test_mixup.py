"""Mix-up: against a naive reference in float64, beside L2-SP, on resume, switched off, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2ForSequenceClassification,
    HfArgumentParser,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments
from hf_l2sp.mixup import MixupArguments, MixupMixin

from .distillation import (
    RESUMED_FROM,
    Gradients,
    gradient_of,
    gradients_of,
    make_data,
    make_model,
    make_tokenizer,
    relative_error,
)


class Recorder:
    """Keeps what every micro-batch was blended from, and how."""

    def _mixup_inputs(self, model, inputs):
        mixed = super()._mixup_inputs(model, inputs)
        self.__dict__.setdefault("seen", []).append((inputs, *self._mixup_drawn))
        return mixed


class MixupTrainer(Recorder, MixupMixin, Trainer): ...


class MixupL2SPTrainer(Recorder, MixupMixin, L2SPTrainer): ...


class Arguments(MixupArguments, TrainingArguments): ...


class L2SPMixupArguments(MixupArguments, L2SPTrainingArguments): ...


CONFIGS = {
    MixupTrainer: Arguments,
    MixupL2SPTrainer: L2SPMixupArguments,
    Trainer: TrainingArguments,
    L2SPTrainer: L2SPTrainingArguments,
}


@pytest.fixture(scope="module")
def collator(tmp_path_factory):
    return DataCollatorWithPadding(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def build(tmp_path, collator):
    def make(model, data, cls=MixupTrainer, trainer=None, **arguments):
        settings = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "optim": "sgd",
            "learning_rate": 0.0,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "num_train_epochs": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 7,
            **({"mixup_alpha": 0.5} if issubclass(cls, MixupMixin) else {}),
            **arguments,
        }
        return cls(
            model=model,
            args=CONFIGS[cls](**settings),
            train_dataset=data,
            eval_dataset=data,
            data_collator=collator,
            callbacks=[Gradients([])],
            **(trainer or {}),
        )

    return make


def reference(model, seen, smoothing=0.0):
    """Mean over the labelled rows of the step, row by row, with one-hot labels blended by hand."""
    losses, labelled = [], 0
    for inputs, share, pairs in seen:
        embed = model.get_input_embeddings()  # by itself: its row of the padding is not trained
        for row, other in enumerate(pairs.tolist()):
            ids, mask, labels = (inputs[name] for name in ("input_ids", "attention_mask", "labels"))
            blended = share * embed(ids[row]) + (1 - share) * embed(ids[other])
            attended = (mask[row] + mask[other]).clamp(max=1)
            out = model(inputs_embeds=blended[None], attention_mask=attended[None]).logits[0]
            for label, weight in ((labels[row], share), (labels[other], 1 - share)):
                if label != -100:
                    target = torch.full_like(out, smoothing / len(out))
                    target[label] += 1 - smoothing
                    losses.append(-weight * (target * out.log_softmax(-1)).sum())
            labelled += int(labels[row] != -100)
    return sum(losses) / labelled


@pytest.mark.parametrize("accepts", [None, False])
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4), (1, 8), (3, 3)])
@pytest.mark.parametrize(("unlabelled", "smoothing"), [((), 0.0), ((0, 3, 4), 0.2)])
def test_gradients(build, accepts, batch, accumulation, unlabelled, smoothing):
    """One step over all rows, however it is cut, also into micro-batches of unequal size or without a label."""
    model = make_model("sequence", seed=1).double()
    if accepts is not None:
        model.accepts_loss_kwargs = accepts
    trainer = build(
        model,
        make_data("sequence", 8, unlabelled),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        label_smoothing_factor=smoothing,
    )
    trainer.train()
    shares = [share for _, share, _ in trainer.seen]
    assert len(set(shares)) == len(shares) == -(-8 // batch) and all(0 < share < 1 for share in shares)
    if batch == 8:
        inputs, _, pairs = trainer.seen[0]
        assert sorted(pairs.tolist()) == list(range(8)) != pairs.tolist()
        assert not inputs["attention_mask"].all()
    expected = reference(model, trainer.seen, smoothing)
    (got,) = gradients_of(trainer)
    assert relative_error(got, gradient_of(expected, model)) < 1e-10
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.distributed
def test_two_processes(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        + ["-m", "tests.mixup_worker", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        check=True,
        timeout=300,
    )


def test_penalty_is_counted_once(build):
    """In the second step, when the weights have left θ0, and outside of a step."""
    model = make_model("sequence", seed=1).double()
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.1}
    trainer = build(model, make_data("sequence", 8), MixupL2SPTrainer, l2sp_lambda=0.3, **options)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    first, second = gradients_of(trainer)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name] - 0.1 * first[name])
    expected = gradient_of(reference(model, trainer.seen[2:]), model)
    new = set(trainer.l2sp_plan.entries) - set(trainer.l2sp_anchor)
    for name, p in model.named_parameters():
        expected[name] += 0.0 if name in new else 2 * 0.3 * (p.detach() - start[name])
    assert relative_error(second, expected) < 1e-9

    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    loss = trainer.compute_loss(model.train(), batch)
    squared = sum((p - start[n]).square().sum() for n, p in model.named_parameters() if n not in new)
    expected = reference(model, trainer.seen[-1:]) + 0.3 * squared
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_resume(build, tmp_path):
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.1,
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 1,
    }

    def run(**arguments):
        model = make_model("sequence", seed=1, dropout=0.1)
        trainer = build(model, make_data("sequence", 10), MixupL2SPTrainer, **options, **arguments)
        return trainer

    whole = run(output_dir=str(tmp_path / "whole"))
    whole.train()
    again = run(output_dir=str(tmp_path / "again"), seed=8)
    again.train()
    assert not same(weights(whole), weights(again))
    resumed = run(output_dir=str(tmp_path / "whole"))
    resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{RESUMED_FROM}"))
    assert [s for _, s, _ in resumed.seen] == [s for _, s, _ in whole.seen][-len(resumed.seen) :]
    assert len(resumed.seen) < len(whole.seen) and same(weights(whole), weights(resumed))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("base", "cls"), [(Trainer, MixupTrainer), (L2SPTrainer, MixupL2SPTrainer)])
def test_switched_off_it_is_the_trainer_that_follows(build, base, cls, accumulation):
    runs = []
    for kind, extra in ((base, {}), (cls, {"mixup_alpha": 0.0}), (cls, {})):
        model = make_model("sequence", seed=1, dropout=0.1)
        trainer = build(
            model,
            make_data("sequence", 8),
            kind,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.1,
            label_smoothing_factor=0.1,
            eval_strategy="epoch",
            **extra,
        )
        trainer.train()
        logs = [
            {k: v for k, v in log.items() if "runtime" not in k and "per_second" not in k}
            for log in trainer.state.log_history
        ]
        runs.append((weights(trainer), logs, torch.get_rng_state()))
    plain, off, on = runs
    assert same(plain[0], off[0]) and plain[1] == off[1] and torch.equal(plain[2], off[2])
    assert not same(plain[0], on[0])


def test_evaluation_knows_nothing_of_it(build):
    data = make_data("sequence", 8)
    results = []
    for cls in (Trainer, MixupTrainer):
        trainer = build(make_model("sequence", seed=1), data, cls, label_smoothing_factor=0.1)
        set_seed(6)
        loss, said = trainer.evaluate()["eval_loss"], trainer.predict(data)
        results.append((loss, said.predictions.tolist(), said.metrics["test_loss"], torch.get_rng_state().tolist()))
    assert results[0] == results[1]


def test_token_types_and_other_models(build):
    """Those of RoBERTa count positions from its tokens, where it has them."""
    set_seed(5)
    size = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    model = RobertaForSequenceClassification(RobertaConfig(intermediate_size=16, pad_token_id=0, **size))
    trainer = build(model, make_data("sequence", 8))
    trainer.train()
    assert len(trainer.seen) == 1 and not trainer.seen[0][0]["attention_mask"].all()
    data = make_data("sequence", 8)
    data = data.add_column("token_type_ids", [[0] * (len(row) - 1) + [1] for row in data["input_ids"]])
    trainer = build(make_model("sequence", seed=1), data)
    trainer.train()
    assert "token_type_ids" in trainer.seen[0][0]


# --- refusals -----------------------------------------------------------------------------------------------------


def gpt2():
    size = {"vocab_size": 60, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return GPT2ForSequenceClassification(GPT2Config(num_labels=3, pad_token_id=0, **size))


def bart():
    size = {"vocab_size": 60, "d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ends = {"pad_token_id": 0, "eos_token_id": 3, "max_position_embeddings": 16}
    return BartForSequenceClassification(BartConfig(num_labels=3, **size, **layers, **ends))


class TokensOnly(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(60, 3)

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask=None, labels=None):
        raise AssertionError


@pytest.mark.parametrize(
    ("model", "changes", "trainer", "message"),
    [
        (
            TokensOnly,
            {},
            {},
            "TokensOnly.forward takes no inputs_embeds, which are what mix-up blends. Set mixup_alpha=0",
        ),
        (gpt2, {}, {}, "GPT2ForSequenceClassification gives other logits for embeddings than for the tokens"),
        (bart, {}, {}, "BartForSequenceClassification refuses inputs_embeds"),
        (
            None,
            {"position_ids": lambda row: list(range(len(row["input_ids"])))},
            {},
            "inputs are .*position_ids.*only",
        ),
        (None, {"labels": lambda row: [0.0, 1.0, 0.5]}, {}, "one class per sequence, and the labels are not that"),
        (None, {"labels": None}, {}, "one class per sequence, and the labels are not that"),
        (None, {}, {"compute_loss_func": lambda *_, **__: 0}, "compute_loss_func is another loss"),
    ],
    ids=["no embeddings", "gpt2", "bart", "inputs", "labels", "no labels", "loss"],
)
def test_what_cannot_be_mixed_is_refused(build, collator, model, changes, trainer, message):
    data = make_data("sequence", 8)
    for name, make in changes.items():
        rows = data.to_list()
        data = data.remove_columns([name] if name in data.column_names else [])
        if make is not None:
            data = data.add_column(name, [make(row) for row in rows])
    if "position_ids" in changes:
        data = data.filter(lambda row: len(row["input_ids"]) == len(data[0]["input_ids"]))
    built = build(model() if model else make_model("sequence", seed=1), data, trainer=trainer)
    with pytest.raises(ValueError, match=f"mixup_alpha=0.5: .*{message}"):
        built.train()


def test_padding_is_waited_for(build):
    """The head of GPT-2 finds the last token without tokens only where no row is padded."""
    data = make_data("sequence", 8)
    equal = data.filter(lambda row: len(row["input_ids"]) == len(data[0]["input_ids"]))
    trainer = build(gpt2(), equal)
    trainer.train()
    assert trainer.seen
    padded = trainer.data_collator([data[row] for row in range(8)])
    with pytest.raises(ValueError, match="GPT2ForSequenceClassification gives other logits for embeddings"):
        trainer.compute_loss(trainer.model.train(), padded)


def test_arguments(tmp_path):
    (args,) = HfArgumentParser(L2SPMixupArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--mixup_alpha", "0.4", "--l2sp_lambda", "0.1", "--use_cpu"]
    )
    assert (args.mixup_alpha, args.l2sp_lambda) == (0.4, 0.1)
    assert type(Arguments(str(tmp_path), mixup_alpha=1).mixup_alpha) is float
    assert Arguments(str(tmp_path)).mixup_alpha == 0.0
    for value in (-1.0, 1e-4, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"mixup_alpha=.* give 0 \(off\), or 0.01 or above"):
            Arguments(str(tmp_path), mixup_alpha=value)
    for value in ("1", True, None):
        with pytest.raises(ValueError, match="mixup_alpha=.* not a number"):
            Arguments(str(tmp_path), mixup_alpha=value)
    with pytest.raises(ValueError, match="l2sp_lambda"):
        L2SPMixupArguments(str(tmp_path), l2sp_lambda=-1.0)  # the checks that follow still run
