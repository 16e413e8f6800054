"""The head for masked words: computed at masked positions alone, and warmed up without moving anything else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import numpy
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    set_seed,
)

from hf_l2sp import Anchor

from .test_mlm_masking import long_row, masking

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

from _mlm_head import check_warm_up, load_masked_lm, untrained_head, warm_up  # noqa: E402
from _mlm_masking import IGNORED, MaskedRows  # noqa: E402
from _mlm_sparse import masked_logits, predict_masked_only  # noqa: E402
from _recipe_args import RecipeError  # noqa: E402
from _recipe_model import ModelSource  # noqa: E402

SMALL = {"vocab_size": 1000, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 64, "max_position_embeddings": 128}
DISTILBERT = {"vocab_size": 1000, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS: dict[str, Any] = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SMALL, **NO_DROPOUT)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SMALL, **NO_DROPOUT)),
    "electra": lambda: ElectraForMaskedLM(ElectraConfig(**SMALL, **NO_DROPOUT, embedding_size=24)),
    "distilbert": lambda: DistilBertForMaskedLM(DistilBertConfig(**DISTILBERT, dropout=0.0, attention_dropout=0.0)),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**SMALL, pad_token_id=0, attn_implementation="eager")
    ),
}
NEW = {
    "cls.predictions.bias",
    "cls.predictions.transform.LayerNorm.bias",
    "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.transform.dense.bias",
    "cls.predictions.transform.dense.weight",
}


def batch() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1000, (3, 10), generator=random)
    labels = torch.where(torch.rand(ids.shape, generator=random) < 0.3, ids, IGNORED)
    attention = torch.ones_like(ids)
    attention[2, 7:], labels[2, 7:], labels[0, 1] = 0, IGNORED, 9
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


# --------------------------------------------------------------------------- masked positions alone


@pytest.mark.parametrize("name", MODELS)
def test_loss_logits_and_gradients_are_those_of_the_whole_head(name: str) -> None:
    set_seed(0)
    model, inputs = MODELS[name](), batch()
    masked = inputs["labels"].ne(IGNORED)
    found = []
    for sparse in (False, True):
        if sparse:
            assert predict_masked_only(model)
        model.train()
        output = model(**inputs)
        output.loss.backward()
        chosen, labels = masked_logits(output.logits, inputs["labels"])
        assert chosen.shape == (int(masked.sum()), 1000) and torch.equal(labels, inputs["labels"][masked])
        assert output.logits.shape[:2] == ((1, len(labels)) if sparse else masked.shape)
        found.append((output.loss.detach(), chosen.detach(), {n: p.grad for n, p in model.named_parameters()}))
        model.zero_grad()
    (loss, logits, gradients), (loss_there, logits_there, gradients_there) = found
    torch.testing.assert_close(loss_there, loss)
    torch.testing.assert_close(logits_there, logits)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradients_there[parameter], gradient, rtol=1e-4, atol=1e-6, msg=parameter)


def test_without_labels_nothing_changes() -> None:
    model, inputs = MODELS["bert"]().eval(), batch()
    del inputs["labels"]
    before = model(**inputs).logits
    assert predict_masked_only(model)
    model(**batch())
    assert torch.equal(model(**inputs).logits, before)


def test_a_head_that_mixes_positions_is_left_as_it_is() -> None:
    class Mixing(BertForMaskedLM):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Any:
            hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
            logits = self.cls(hidden + hidden.mean(1, keepdim=True))
            return type("Output", (), {"logits": logits, "loss": None})

    model = Mixing(BertConfig(**SMALL))
    assert not predict_masked_only(model) and model.training
    assert not model._forward_pre_hooks and not model._forward_hooks and not model.bert._forward_hooks


def test_logits_that_were_filled_up_for_other_processes_are_cut() -> None:
    labels = batch()["labels"]
    count = int(labels.ne(IGNORED).sum())
    logits = torch.randn(1, count + 4, 7)
    chosen, _ = masked_logits(logits, labels)
    assert torch.equal(chosen, logits[0, :count])


# --------------------------------------------------------------------------- warm-up


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A general model without head, with a pooler."""
    folder = tmp_path_factory.mktemp("general")
    set_seed(1)
    BertModel(BertConfig(**SMALL)).save_pretrained(folder)
    return ModelSource(str(folder), "general", None)


def rows(seed: int = 0) -> MaskedRows:
    ids, kinds, _ = long_row(30)
    random = numpy.random.default_rng(seed)
    several = [random.permutation(ids[1:-1]).tolist() for _ in range(24)]
    columns = {"input_ids": [[2, *row, 3] for row in several], "kinds": [kinds.tolist()] * 24}
    return MaskedRows(datasets.Dataset.from_dict(columns), masking(), seed)


def collate(parts: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {name: torch.tensor([part[name] for part in parts]) for name in parts[0]}


def config_of(source: ModelSource) -> Any:
    return AutoConfig.from_pretrained(source.path)


def warmed(source: ModelSource, seed: int = 3, steps: int = 12) -> tuple[Any, dict[str, Tensor]]:
    set_seed(5)
    model = load_masked_lm(source, config_of(source))
    options: dict[str, Any] = {"steps": steps, "seed": seed, "device": torch.device("cpu")}
    return model, warm_up(model, sorted(NEW), [rows(0), rows(1)], collate, **options)


def test_the_warm_up_trains_what_is_missing_and_nothing_else(general: ModelSource) -> None:
    config = config_of(general)
    set_seed(5)
    fresh = load_masked_lm(general, config)
    assert set(untrained_head(fresh, general)) == NEW
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    model, head = warmed(general)
    after = model.state_dict()
    tied = {"cls.predictions.decoder.bias"}
    assert set(head) == NEW and all(not torch.equal(head[name], before[name]) for name in NEW)
    assert all(torch.equal(after[name], before[name]) for name in set(after) - NEW - tied)
    assert (
        after["cls.predictions.decoder.weight"].data_ptr() == model.bert.embeddings.word_embeddings.weight.data_ptr()
    )

    again = load_masked_lm(general, config, head)
    losses = []
    for candidate in (fresh, again):
        candidate.eval()
        with torch.no_grad():
            losses.append(float(candidate(**collate([rows(0)[index] for index in range(24)])).loss))
    assert losses[1] < losses[0] - 1.0
    assert all(torch.equal(dict(again.named_parameters())[name], value) for name, value in head.items())


def test_the_warm_up_is_a_function_of_the_seed(general: ModelSource) -> None:
    heads = [warmed(general, seed, 3)[1] for seed in (3, 3, 4)]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in NEW)
    assert not torch.equal(heads[0]["cls.predictions.bias"], heads[2]["cls.predictions.bias"])


def test_a_warmed_up_head_is_new_and_the_body_is_anchored(general: ModelSource) -> None:
    _, head = warmed(general, steps=1)
    plan = Anchor.from_model(load_masked_lm(general, config_of(general), head)).plan
    assert {entry.name for entry in plan.having("new")} == NEW
    assert not plan.having("frozen"), "a pooler that is kept is no parameter"
    anchored = {entry.name for entry in plan.having("anchored")}
    assert "bert.embeddings.word_embeddings.weight" in anchored and all(name.startswith("bert.") for name in anchored)


def test_a_trained_head_needs_no_warm_up_and_is_anchored(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path), "trained", None)
    model = load_masked_lm(source, config_of(source))
    assert untrained_head(model, source) == []
    check_warm_up([], 0, source)
    assert not Anchor.from_model(model).plan.having("new")
    assert getattr(model.bert, "pooler", None) is None, "there was none to keep"


def test_the_pooler_is_kept_for_classifiers(general: ModelSource, tmp_path: Path) -> None:
    load_masked_lm(general, config_of(general)).save_pretrained(tmp_path)
    _, loading = BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in loading["missing_keys"]} == {"classifier"}
    pooler = [BertModel.from_pretrained(folder).pooler.dense.weight for folder in (general.path, str(tmp_path))]
    assert torch.equal(*pooler)
    assert BertForMaskedLM.from_pretrained(tmp_path).bert.pooler is None


def test_a_random_head_and_a_random_body_are_refused(general: ModelSource) -> None:
    with pytest.raises(RecipeError, match=r"'general' has no trained head .*cls\.predictions.*--head_warmup_steps 0"):
        check_warm_up(sorted(NEW), 0, general)
    config = config_of(general)
    config.num_hidden_layers = 2
    with pytest.raises(RecipeError, match=r"'general' lacks weights of its body: 'bert\.encoder\.layer\.1"):
        untrained_head(load_masked_lm(general, config), general)
