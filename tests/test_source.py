"""θ0 from a Hub id or a folder: what fits is taken, what does not is refused with its name and shape."""

from __future__ import annotations

import os
import random

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from hf_l2sp import Anchor

from .helpers import changed, saved

WORDS = "bert.embeddings.word_embeddings.weight"


def test_from_a_folder_other_than_the_models(classifier, bert_config, tmp_path):
    other = BertModel(bert_config)
    folder = saved(tmp_path, other)
    anchor = Anchor.from_pretrained(folder, classifier)
    assert anchor.source == folder and anchor.revision is None
    assert set(anchor) == {f"bert.{name}" for name, _ in other.named_parameters()}
    assert all(torch.equal(value, other.get_parameter(name[5:])) for name, value in anchor.items())
    assert [entry.name for entry in anchor.plan.having("new")] == ["classifier.weight", "classifier.bias"]


def test_relative_path_is_kept_as_an_absolute_one(classifier, tiny_bert_dir, monkeypatch):
    folder, name = os.path.split(tiny_bert_dir)
    monkeypatch.chdir(folder)
    assert Anchor.from_pretrained(name, classifier).source == tiny_bert_dir


def test_values_come_in_the_dtype_of_the_model(tiny_bert_dir):
    model = BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3, dtype=torch.bfloat16)
    anchor = Anchor.from_pretrained(tiny_bert_dir, model)
    assert {value.dtype for value in anchor.values()} == {torch.bfloat16}
    assert anchor.fingerprint == Anchor.from_model(model).fingerprint


def test_random_numbers_go_on_as_if_nothing_was_loaded(classifier, tiny_bert_dir):
    states = (torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate())
    Anchor.from_pretrained(tiny_bert_dir, classifier)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == numpy.random.get_state()[1]).all() and states[2] == random.getstate()


def test_head_of_the_source_with_other_labels_is_new(classifier, bert_config, tmp_path):
    folder = saved(tmp_path, BertForSequenceClassification(changed(bert_config, num_labels=7)))
    assert "classifier.weight" not in Anchor.from_pretrained(folder, classifier)


def test_head_of_the_source_with_the_same_labels_is_anchored(classifier, bert_config, tmp_path):
    source = BertForSequenceClassification(changed(bert_config, num_labels=3))
    anchor = Anchor.from_pretrained(saved(tmp_path, source), classifier)
    assert torch.equal(anchor["classifier.weight"], source.classifier.weight)


def test_frozen_values_are_kept_only_where_they_differ(classifier, bert_config, tiny_bert_dir, tmp_path):
    classifier.bert.embeddings.requires_grad_(False)
    assert WORDS not in Anchor.from_pretrained(tiny_bert_dir, classifier)
    assert WORDS in Anchor.from_pretrained(saved(tmp_path, BertModel(bert_config)), classifier)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda c: BertModel(changed(c, hidden_size=48)),
            r"does not fit the model: .*is \(100, 48\), needs \(100, 32\)",
        ),
        (lambda c: BertModel(changed(c, max_position_embeddings=16)), r".*position_embeddings\.weight is \(16, 32\)"),
        (lambda c: BertModel(changed(c, num_hidden_layers=1)), r"has no value for bert\.encoder\.layer\.1\."),
        (lambda c: BertModel(c, add_pooling_layer=False), r"has no value for bert\.pooler\.dense\.weight"),
    ],
    ids=["hidden size", "positions", "layers", "pooler"],
)
def test_source_of_another_shape(classifier, bert_config, tmp_path, build, message):
    folder = saved(tmp_path, build(bert_config))
    with pytest.raises(ValueError, match=f"(?s)l2sp_anchor='{folder}' {message}.*l2sp_exclude"):
        Anchor.from_pretrained(folder, classifier)


def test_what_the_source_lacks_can_be_excluded(classifier, bert_config, tmp_path):
    folder = saved(tmp_path, BertModel(bert_config, add_pooling_layer=False))
    assert len(Anchor.from_pretrained(folder, classifier, exclude=["pooler"])) == 37


def test_source_of_another_architecture(classifier, tiny_gpt2_dir):
    with pytest.raises(ValueError, match="is a 'gpt2' model, the model to train a 'bert'. θ0 needs the same"):
        Anchor.from_pretrained(tiny_gpt2_dir, classifier)


def test_source_that_does_not_exist(classifier, tmp_path):
    with pytest.raises(ValueError, match="θ0 cannot be loaded from '.*nowhere'.*Set l2sp_anchor to a local folder"):
        Anchor.from_pretrained(str(tmp_path / "nowhere"), classifier)
    with pytest.raises(ValueError, match="θ0 cannot be loaded from 'no/such-model' at revision 'v3'"):
        Anchor.from_pretrained("no/such-model", classifier, revision="v3")


def test_source_without_weights(classifier, bert_config, tmp_path):
    bert_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"θ0 cannot be loaded from '{tmp_path}'"):
        Anchor.from_pretrained(str(tmp_path), classifier)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=f"θ0 cannot be loaded from '{tmp_path}'"):
        Anchor.from_pretrained(str(tmp_path), classifier)


def test_source_with_a_smaller_or_larger_vocabulary(gpt2, tiny_gpt2_dir):
    source = GPT2LMHeadModel.from_pretrained(tiny_gpt2_dir).transformer.wte.weight
    gpt2.resize_token_embeddings(96)
    anchor = Anchor.from_pretrained(tiny_gpt2_dir, gpt2)
    assert torch.equal(anchor["transformer.wte.weight"], source)
    assert anchor.plan.entries["transformer.wte.weight"].rows == 90
    assert anchor.fingerprint == Anchor.from_model(gpt2).fingerprint
    gpt2.resize_token_embeddings(70)
    assert torch.equal(Anchor.from_pretrained(tiny_gpt2_dir, gpt2)["transformer.wte.weight"], source[:70])


def test_source_of_a_language_head_with_bias(bert_config, tmp_path):
    folder = saved(tmp_path, BertForMaskedLM(bert_config))
    model = BertForMaskedLM.from_pretrained(folder)
    model.resize_token_embeddings(104)
    anchor = Anchor.from_pretrained(folder, model)
    assert anchor[WORDS].shape == (100, 32) and anchor["cls.predictions.bias"].shape == (100,)
    assert anchor.fingerprint == Anchor.from_model(model).fingerprint


@pytest.mark.parametrize("as_file", [False, True])
def test_source_of_a_module_of_ones_own(net, tmp_path, as_file):
    values = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    save_file({f"_orig_mod.{name}": value for name, value in values.items()}, tmp_path / "model.safetensors")
    anchor = Anchor.from_pretrained(str(tmp_path / "model.safetensors" if as_file else tmp_path), net)
    assert all(torch.equal(anchor[name], value) for name, value in values.items())
    del values["0.bias"]
    save_file(values, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no value for 0\.bias \(1 of 4 parameters\)"):
        Anchor.from_pretrained(str(tmp_path), net)


class OwnConfig(PretrainedConfig):
    model_type = "own"


class OwnModel(PreTrainedModel):
    """An architecture that transformers does not know."""

    config_class = OwnConfig
    base_model_prefix = ""

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(3, 2)
        self.post_init()


def test_source_of_an_architecture_of_ones_own(tmp_path):
    folder = saved(tmp_path, OwnModel(OwnConfig()))
    model = OwnModel.from_pretrained(folder)
    assert Anchor.from_pretrained(folder, model).fingerprint == Anchor.from_model(model).fingerprint


def test_source_of_which_the_model_is_a_part(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 2}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    folder = saved(tmp_path, CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)))
    model = CLIPTextModel.from_pretrained(folder)
    assert Anchor.from_pretrained(folder, model).fingerprint == Anchor.from_model(model).fingerprint


def test_verbosity_is_as_before(classifier, tiny_bert_dir):
    before = logging.get_verbosity()
    try:
        for verbosity in (logging.INFO, logging.ERROR):
            logging.set_verbosity(verbosity)
            Anchor.from_pretrained(tiny_bert_dir, classifier)
            assert logging.get_verbosity() == verbosity
    finally:
        logging.set_verbosity(before)
