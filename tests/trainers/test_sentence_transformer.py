"""sentence-transformers' trainer with L2-SP: a model of several modules, in a loss that may have its own weights."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import BertModel

from hf_l2sp import Anchor, L2SPArguments, L2SPMixin

from ..exactness.harness import relative_error, snapshot
from .contract import LAM, Family, TrainerContract, sentences, tiny_tokenizer, training_logs

pytest.importorskip("sentence_transformers", reason="sentence-transformers is an extra")

from sentence_transformers import (  # noqa: E402
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

try:
    from sentence_transformers.sentence_transformer import losses, modules
except ImportError:  # before 5.4
    from sentence_transformers import losses
    from sentence_transformers import models as modules


class L2SPSentenceArguments(L2SPArguments, SentenceTransformerTrainingArguments): ...


class L2SPSentenceTrainer(L2SPMixin, SentenceTransformerTrainer): ...


@pytest.fixture(scope="module")
def tiny_sentence_dir(tiny_bert_dir, tmp_path_factory) -> str:
    """Folder with a transformers model and its tokenizer, of which SentenceTransformer makes modules."""
    folder = str(tmp_path_factory.mktemp("tiny_sentence"))
    BertModel.from_pretrained(tiny_bert_dir).save_pretrained(folder)
    tiny_tokenizer(frame=True, model_max_length=32).save_pretrained(folder)
    return folder


def load(folder: str, dropout: float = 0.0) -> SentenceTransformer:
    config = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return SentenceTransformer(folder, device="cpu", config_kwargs=config)


def pairs(**columns: list[Any]) -> dict[str, Any]:
    data = Dataset.from_dict({"sentence1": sentences(16, 6, 1), "sentence2": sentences(16, 6, 2), **columns})
    return {"train_dataset": data.select(range(12)), "eval_dataset": data.select(range(12, 16))}


SCORES = [(i % 5) / 4 for i in range(16)]


@pytest.fixture
def family(tiny_sentence_dir) -> Family:
    return Family(
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        L2SPSentenceTrainer,
        L2SPSentenceArguments,
        lambda folder=tiny_sentence_dir, dropout=0.0: load(folder, dropout),
        tiny_sentence_dir,
        # A mean over pairs: the same in one batch of four and in four of one.
        lambda model: {**pairs(score=SCORES), "loss": losses.CosineSimilarityLoss(model)},
        card_tags=frozenset({"sentence-transformers"}),
    )


@pytest.fixture
def with_dense(family, tiny_sentence_dir, tmp_path) -> Family:
    """A pretrained model with a dense layer after the pooling, saved by sentence-transformers."""
    torch.manual_seed(8)
    parts = list(load(tiny_sentence_dir))
    folder = str(tmp_path / "dense")
    SentenceTransformer(modules=[*parts, modules.Dense(32, 8)], device="cpu").save_pretrained(folder)
    return replace(family, load=lambda at=folder, dropout=0.0: load(at, dropout), pretrained=folder)


class TestSentenceTransformer(TrainerContract):
    pass


class TestWithDenseLayer(TrainerContract):
    """Its weights are pretrained, too: `2.linear.weight`, in the folder `2_Dense`."""

    @pytest.fixture
    def family(self, with_dense) -> Family:
        return with_dense


CONTRASTIVE = ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"]


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_pull_beside_a_contrastive_loss(family, tmp_path, name):
    """The other pairs of a micro-batch are the negatives: the task loss depends on its size, the pull does not."""
    contrastive = replace(family, inputs=lambda model: {**pairs(), "loss": getattr(losses, name)(model)})
    (whole, whole_pulled), (parts, parts_pulled) = contrastive.check_gradient(tmp_path, layouts=((4, 1), (2, 2)))
    for step in range(3):
        task, other_task = whole.gradients[step], parts.gradients[step]
        assert relative_error(task, other_task) > 0.05  # the plain trainer's own discrepancy
        pull = {n: whole_pulled.gradients[step][n].double() - task[n].double() for n in task}
        other = {n: parts_pulled.gradients[step][n].double() - other_task[n].double() for n in task}
        assert relative_error(pull, other) < 1e-3


def test_loss_of_several_terms_is_logged_beside_the_penalty(family, tmp_path):
    class TwoTerms(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
            self.cosine = losses.CosineSimilarityLoss(model)

        def forward(self, features, labels):
            loss = self.cosine(features, labels)
            return {"near": 0.75 * loss, "far": 0.25 * loss}

    inputs = lambda model: {**pairs(score=SCORES), "loss": TwoTerms(model)}  # noqa: E731
    replace(family, inputs=inputs, own_keys=frozenset({"near", "far"})).check_gradient(tmp_path)


def test_a_loss_per_data_set(family, tmp_path):
    def inputs(model):
        scored, plain = pairs(score=SCORES)["train_dataset"], pairs()["train_dataset"]
        return {
            "train_dataset": DatasetDict(scored=scored, plain=plain),
            "loss": {
                "scored": losses.CosineSimilarityLoss(model),
                "plain": losses.MultipleNegativesRankingLoss(model),
            },
        }

    replace(family, inputs=inputs).check_gradient(tmp_path, layouts=((4, 1), (2, 2)), max_steps=5)


def test_weights_of_the_loss_are_trained_and_not_pulled(family, tmp_path):
    def inputs(model):
        # Its classifier is a part of the loss, not of the model.
        return {**pairs(label=[i % 3 for i in range(16)]), "loss": losses.SoftmaxLoss(model, 32, 3)}

    classified = replace(family, inputs=inputs)
    outcomes = []
    for kind in ("plain", "l2sp"):
        trainer = classified.build(kind, tmp_path / kind, l2sp_lambda=LAM, max_steps=1, learning_rate=0.5)
        before = trainer.loss.classifier.weight.detach().clone()
        trainer.train()
        assert not torch.equal(trainer.loss.classifier.weight, before)
        outcomes.append(trainer.loss.classifier.weight.detach())
    # The first step begins at θ0, where nothing is pulled.
    assert torch.equal(*outcomes)
    assert not any("classifier" in name for name in trainer.l2sp_plan.entries)


def test_added_dense_layer_is_new_and_then_pretrained(family, tiny_sentence_dir, tmp_path):
    def made() -> SentenceTransformer:
        torch.manual_seed(9)
        return SentenceTransformer(modules=[*load(tiny_sentence_dir), modules.Dense(32, 8)], device="cpu")

    head = {"2.linear.weight", "2.linear.bias"}
    settings = {"l2sp_lambda": LAM, "optim": "adamw_torch", "learning_rate": 1e-2}
    first = family.build("l2sp", tmp_path / "first", model=made(), **settings)
    first.train()
    first.save_model()
    assert {n for n, e in first.l2sp_plan.entries.items() if e.role == "new"} == head
    assert not any(name in first.l2sp_anchor for name in head)
    # From the folder it is a pretrained layer, but θ0 on record does not know it.
    second = family.build("l2sp", tmp_path / "second", model=load(str(tmp_path / "first")), **settings)
    second.train()
    assert second.l2sp_anchor.source == tiny_sentence_dir
    assert second.l2sp_anchor.fingerprint == first.l2sp_anchor.fingerprint
    assert {n for n, e in second.l2sp_plan.entries.items() if e.role == "new"} == head
    # Taken for θ0 on purpose, all of the folder is.
    third = family.build(
        "l2sp",
        tmp_path / "third",
        model=load(str(tmp_path / "first")),
        l2sp_anchor=str(tmp_path / "first"),
        **settings,
    )
    third.train()
    assert all(torch.equal(third.l2sp_anchor[n], p) for n, p in first.model.named_parameters())
    assert head < third.l2sp_anchor.keys()


def test_replaced_dense_layer_is_new(with_dense):
    """Its name and shape are in the folder, its values are not."""
    model = with_dense.load()
    model[2] = modules.Dense(32, 8)
    plan = Anchor.from_model(model).plan
    assert {n for n, e in plan.entries.items() if e.role == "new"} == {"2.linear.weight", "2.linear.bias"}


def test_anchor_from_a_folder(with_dense, tiny_sentence_dir, tmp_path):
    origin = snapshot(with_dense.load())
    moved = with_dense.load()
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1.1)
    anchor = Anchor.from_pretrained(with_dense.pretrained, moved)
    assert anchor.keys() == origin.keys() and all(torch.equal(anchor[name], origin[name]) for name in origin)
    # A folder with the transformers model alone knows nothing of the dense layer.
    anchor = Anchor.from_pretrained(tiny_sentence_dir, moved)
    assert anchor.keys() == {name for name in origin if not name.startswith("2.")}
    with pytest.raises(ValueError, match="cannot be loaded"):
        Anchor.from_pretrained(str(tmp_path / "nowhere"), moved)


def test_dense_layer_in_the_old_format_is_pretrained(with_dense, tmp_path):
    folder = tmp_path / "dense" / "2_Dense"
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    plan = Anchor.from_model(with_dense.load()).plan
    assert {entry.role for entry in plan.entries.values()} == {"anchored"}


def test_damaged_list_of_modules_makes_the_rest_new(with_dense, caplog, tmp_path):
    model = with_dense.load()
    (tmp_path / "dense" / "modules.json").write_text("[{")
    with caplog.at_level("WARNING"):
        anchor = Anchor.from_model(model)
    assert "cannot read the modules of" in caplog.text
    assert {n for n, e in anchor.plan.entries.items() if e.role == "new"} == {"2.linear.weight", "2.linear.bias"}


def test_saved_folder_has_the_card_and_encodes(family, tmp_path):
    trainer = family.build("l2sp", tmp_path, l2sp_lambda=LAM, save_strategy="steps", save_steps=2, learning_rate=0.5)
    trainer.train()
    trainer.save_model()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        card = ModelCard.load(folder / "README.md")
        assert {"sentence-transformers", "l2-sp", "hf-l2sp"} <= set(card.data.tags)
        assert card.text.count("## How it was fine-tuned: L2-SP") == 1
    texts = sentences(3, 5, 4)
    again = load(str(tmp_path))
    assert (again.encode(texts) == trainer.model.encode(texts)).all()
    state = json.loads((tmp_path / "l2sp_state.json").read_text())
    assert state["anchor"]["entries"].keys() == snapshot(again).keys()


def test_card_that_could_not_be_made_stops_nothing(family, tmp_path, monkeypatch):
    monkeypatch.setattr(SentenceTransformer, "_create_model_card", lambda *args, **kwargs: None)
    trainer = family.build("l2sp", tmp_path, l2sp_lambda=LAM, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.create_model_card()
    assert (tmp_path / "checkpoint-2" / "l2sp_state.json").is_file()
    assert not list(tmp_path.rglob("README.md"))


def test_model_init_renews_the_anchor(family, tmp_path):
    made = []

    def fresh() -> SentenceTransformer:
        made.append(family.load())
        return made[-1]

    config = L2SPSentenceArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=2, report_to="none", logging_steps=1, l2sp_lambda=LAM
    )
    trainer = L2SPSentenceTrainer(
        model_init=fresh, args=config, loss=losses.CosineSimilarityLoss, **pairs(score=SCORES)
    )
    for _ in range(2):
        trainer.train()
        entry = next(iter(trainer.l2sp_plan.entries.values()))
        assert entry.parameter is next(made[-1].parameters())
        assert training_logs(trainer)[-1]["l2sp_distance"] > 0
    assert len(made) > 2
