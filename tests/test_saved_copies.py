"""Parameters that PEFT trains in place of the model's own, and the names that all parameters had before PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hf_l2sp.adapters import base_name, has_adapters, lora_layers, saved_copies

from .peft_models import ATTENTION, adapted, by_transformers, peft, pristine, train


def test_modules_to_save_of_add_adapter_of_transformers(classifier):
    by_transformers(classifier, peft.LoraConfig(target_modules=ATTENTION, modules_to_save=["classifier"]))
    assert [c.name for c in saved_copies(classifier)] == ["classifier.weight", "classifier.bias"]


def test_names_do_not_depend_on_wrappers(classifier):
    model = train(adapted(classifier, modules_to_save=["classifier"]))
    names = [weight.name for weight in lora_layers(model)]
    assert names == [
        f"bert.encoder.layer.{layer}.attention.self.{part}.weight" for layer in (0, 1) for part in ATTENTION
    ]
    compiled = torch.compile(model)
    assert has_adapters(compiled) and [weight.name for weight in lora_layers(compiled)] == names
    assert [c.name for c in saved_copies(compiled)] == ["classifier.weight", "classifier.bias"]


def test_every_base_name_is_a_name_of_the_base_model(classifier):
    names = set(pristine(classifier))
    config = {"target_modules": ["query", "word_embeddings"], "modules_to_save": ["classifier"], "bias": "all"}
    model = adapted(classifier, trainable_token_indices={"position_embeddings": [1, 2]}, **config)
    found = [base_name(name) for name, _ in model.named_parameters() if "lora_" not in name and "_delta" not in name]
    assert set(found) == names
    assert sorted(set(found)) == sorted(n for n in found if not n.startswith("classifier.")) + [
        "classifier.bias",
        "classifier.weight",
    ]


@pytest.mark.parametrize(
    "name",
    ["base_layer.0.weight", "backbone.base_layer.conv.weight", "base_model.embeddings.weight", "model.base_model.x"],
)
def test_names_of_the_models_own_are_left_alone(name):
    assert base_name(name) == name


def test_modules_to_save(classifier):
    values = pristine(classifier)
    model = train(adapted(classifier, modules_to_save=["classifier", "pooler"]))
    copies = {c.name: c for c in saved_copies(model)}
    names = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]
    assert list(copies) == names
    for name, (_, parameter, original, rows) in copies.items():
        assert parameter.requires_grad and not original.requires_grad and rows is None
        assert torch.equal(original.double(), values[name])
        assert not torch.equal(parameter, original)


def test_integer_parameters_are_no_copies(net):
    net[1].table = nn.Parameter(torch.arange(3), requires_grad=False)
    model = adapted(net, target_modules=["0"])
    wrapper = peft.utils.ModulesToSaveWrapper(model.base_model.model[1], "default")
    wrapper.modules_to_save["default"].table.requires_grad_(False)
    model.base_model.model[1] = wrapper
    assert [c.name for c in saved_copies(model)] == ["1.weight", "1.bias"]


def test_modules_to_save_of_the_active_adapter(classifier):
    model = adapted(classifier, modules_to_save=["classifier"])
    model.add_adapter("second", peft.LoraConfig(target_modules=["query"], r=3, modules_to_save=["classifier"]))
    wrapper = model.base_model.model.classifier
    assert saved_copies(model)[0].parameter is wrapper.modules_to_save["default"].weight
    model.set_adapter("second")
    assert saved_copies(model)[0].parameter is wrapper.modules_to_save["second"].weight
    model.add_adapter("third", peft.LoraConfig(target_modules=["query"], r=3))
    model.set_adapter("third")
    assert saved_copies(model) == []
    wrapper._active_adapter = "third"  # an adapter without a copy leaves the original in use
    assert saved_copies(model) == []


def test_tied_copies_come_once(llama):
    llama.config.tie_word_embeddings = True
    llama.tie_weights()
    model = adapted(llama, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    assert model.base_model.model.lm_head.modules_to_save["default"].weight.requires_grad
    assert [c.name for c in saved_copies(model)] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("tied", [False, True])
def test_trainable_tokens(gpt2, llama, tied):
    base, name, targets = (
        (gpt2, "transformer.wte.weight", ["c_attn"]) if tied else (llama, "model.embed_tokens.weight", ["q_proj"])
    )
    values = pristine(base)
    model = train(adapted(base, target_modules=targets, fan_in_fan_out=tied, trainable_token_indices=[7, 3]))
    (saved,) = saved_copies(model)
    assert saved.name == name and saved.rows == (7, 3)
    assert torch.equal(saved.original.double(), values[name][[7, 3]])
    merged = copy.deepcopy(model).merge_and_unload().get_parameter(name).detach().double()
    expected = float((merged - values[name]).square().sum())
    assert float((saved.parameter - saved.original).double().square().sum()) == pytest.approx(expected, rel=1e-6)
    with model.disable_adapter():
        assert saved_copies(model) == []


def test_trainable_tokens_alone(llama):
    config = peft.TrainableTokensConfig(token_indices=[5], target_modules=["embed_tokens"])
    model = peft.get_peft_model(llama, config)
    (saved,) = saved_copies(model)
    assert saved.name == "model.embed_tokens.weight" and saved.rows == (5,)
    assert has_adapters(model) and lora_layers(model) == []
