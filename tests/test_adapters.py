"""What is read from PEFT's layers, against the effective weights that PEFT itself computes, dense and in float64."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertForSequenceClassification

from hf_l2sp.adapters import has_adapters, lora_layers, saved_copies
from hf_l2sp.lowrank import lowrank_pass, lowrank_squared

from .peft_models import ATTENTION, adapted, by_transformers, needs, peft, pristine, train

LoraConfig, get_peft_model = peft.LoraConfig, peft.get_peft_model

TOLERANCE = 1e-5
BATCH = {"input_ids": torch.arange(1, 21).view(2, 10)}


def in_float64(model):
    """A copy in float64 with the names of its adapted weights' layers."""
    twin = copy.deepcopy(model).double()
    return twin, lora_layers(twin)


def effective(weight):
    """The weight that PEFT's formula gives, as a differentiable function of the factors."""
    layer = weight.layer
    active = [a for a in layer.active_adapters if a in layer.scaling and not layer.disable_adapters]
    value = weight.base if weight.base is not None else 0
    for adapter in active:
        if weight.part == "weight":
            value = value + layer.get_delta_weight(adapter)
        elif layer.lora_B[adapter].bias is not None:
            value = value + layer.scaling[adapter] * layer.lora_B[adapter].bias
    return value


def anchors(model):
    """θ0 as the effective weights of an untrained model, in float64, and what is stored of it."""
    values = {weight.name: effective(weight).detach().clone() for weight in in_float64(model)[1]}
    return values, {weight.name: weight.starts() for weight in lora_layers(model)}


def check(model, values, starts=None, rows=None):
    """The distance of every adapted weight, and its gradient for every factor, against whole weights."""
    twin, dense = in_float64(model)
    weights = lora_layers(model)
    assert [w.name for w in weights] == [w.name for w in dense]
    names = {id(p): name for name, p in model.named_parameters()}
    total = 0.0
    for weight, other in zip(weights, dense, strict=True):
        change = effective(other) - values[weight.name].double()
        expected = (change if rows is None else change[:rows]).square().sum()
        term = weight.term(starts and starts[weight.name], rows)
        result = lowrank_pass(term)
        assert float(result.squared) == pytest.approx(float(expected.detach()), rel=TOLERANCE)
        total += float(result.squared)
        twin.zero_grad()
        if not expected.requires_grad:
            continue
        expected.backward()
        for product, pair in zip(term.products, result.gradients, strict=True):
            for factor, gradient in zip(product[:2], pair, strict=True):
                if factor.requires_grad:
                    wanted = twin.get_parameter(names[id(factor)]).grad
                    assert float((gradient - wanted).norm()) <= TOLERANCE * float(wanted.norm())
    return total


# The base weight is θ0, whatever the start of the adapter.
KEPT = {
    "r=8": {},
    "r=64": {"r": 64},
    "rsLoRA": {"r": 64, "use_rslora": True},
    "patterns": {"rank_pattern": {"0.attention.self.query": 3}, "alpha_pattern": {"value": 5}},
    "patterns with rsLoRA": {"rank_pattern": {"query": 3}, "alpha_pattern": {"query": 5}, "use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
    "random": {"init_lora_weights": False},
    "mica": {"init_lora_weights": "mica"},
    "mica on embeddings": {"target_modules": ["word_embeddings"], "init_lora_weights": "mica"},
    "embedding": {"target_modules": ["word_embeddings", "query"]},
    "embedding with a start that it ignores": {"target_modules": ["word_embeddings"], "init_lora_weights": "pissa"},
    "all linear layers": {"target_modules": "all-linear"},
    "bias of the adapter": {"lora_bias": True},
    "random bias of the adapter": {"lora_bias": True, "init_lora_weights": False},
    "trained base biases": {"bias": "all"},
    "dropout": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("config", KEPT.values(), ids=KEPT)
def test_base_weight_is_the_anchor(classifier, config):
    values = pristine(classifier)
    model = train(adapted(classifier, **config))
    assert all(weight.starts() == {} for weight in lora_layers(model))
    assert check(model, values) > 0


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "eva", "mica"])
def test_fresh_adapter_has_no_distance(classifier, init):
    weights = lora_layers(adapted(classifier, init_lora_weights=init))
    assert len(weights) == 4
    for weight in weights:
        assert lowrank_squared(weight.term()).item() < 1e-12


def test_conv1d_of_gpt2(gpt2):
    values = pristine(gpt2)
    model = train(adapted(gpt2, target_modules=["c_attn", "c_proj", "wte"], fan_in_fan_out=True))
    assert check(model, values) > 0
    assert all(weight.transposed for weight in lora_layers(model))


def test_velora(llama):
    needs("velora_config")
    values = pristine(llama)
    velora = peft.tuners.lora.config.VeloraConfig(num_groups=4)
    model = adapted(llama, target_modules=["q_proj"], velora_config=velora)
    assert check(train(model), values) > 0


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3)
        self.two = nn.Conv2d(3, 6, (3, 2), stride=2, padding=1)
        self.point = nn.Conv2d(6, 6, 1)
        self.three = nn.Conv3d(2, 4, 2)

    def forward(self, x):
        return self.point(self.two(x))


def test_convolutions():
    net = Convolutions()
    values = pristine(net)
    model = train(adapted(net, target_modules=["one", "two", "point", "three"], init_lora_weights=False))
    assert check(model, values) > 0
    assert [weight.name for weight in lora_layers(model)] == [f"{n}.weight" for n in ("one", "two", "point", "three")]


def preprocessed(model, config):
    """What the initializations need that look at data."""
    if config["init_lora_weights"] == "corda":
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        config = {**config, "corda_config": CordaConfig(corda_method="kpm")}
        tokens = torch.randint(0, 90, (8, 1, 32))
        preprocess_corda(model, LoraConfig(**config), run_model=lambda: [model(row) for row in tokens])
    if config["init_lora_weights"] == "lora_ga":
        needs("lora_ga_config")
        from peft.tuners.lora import LoraGAConfig, preprocess_loraga

        config = {**config, "lora_ga_config": LoraGAConfig()}
        tokens = torch.randint(0, 90, (4, 16))
        preprocess_loraga(model, LoraConfig(**config), lambda: model(tokens, labels=tokens).loss.backward())
        model.zero_grad()
    if config["init_lora_weights"] == "loftq":
        config = {**config, "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
    return config


def coarse_split(weight, num_bits, reduced_rank, num_iter):
    """What LoftQ does, with rounding in place of the GPU's quantization."""
    coarse = (weight.detach() * 32).round() / 32
    left, sizes, right = torch.linalg.svd(weight.detach() - coarse, full_matrices=False)
    root = sizes[:reduced_rank].sqrt()
    return coarse, root[:, None] * right[:reduced_rank], left[:, :reduced_rank] * root


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"])
@pytest.mark.parametrize("size", [0.05, 1e-4])
def test_start_that_was_taken_out_of_the_base_weight(llama, init, size, monkeypatch):
    if init == "loftq":
        if not hasattr(peft.tuners.lora.layer, "loftq_init"):
            pytest.skip(f"PEFT {peft.__version__} imports loftq_init elsewhere")
        monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", coarse_split)
    values = pristine(llama)
    config = {"target_modules": ["q_proj", "down_proj"], "r": 8, "lora_alpha": 8, "init_lora_weights": init}
    model = get_peft_model(llama, LoraConfig(**preprocessed(llama, config)))
    weights = lora_layers(model)
    exact, starts = anchors(model)
    for weight in weights:
        if init != "loftq":  # whose start only comes near to the pretrained weight
            assert torch.allclose(exact[weight.name], values[weight.name], atol=1e-6)
        assert not torch.allclose(weight.base.double(), values[weight.name], atol=1e-5)
        assert set(starts[weight.name]) == {"default"}
        assert float(lowrank_squared(weight.term(starts[weight.name]))) == 0.0
    assert check(train(model, size), exact, starts) > 0


def test_pissa_of_conv1d(gpt2):
    model = adapted(gpt2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights="pissa")
    exact, starts = anchors(model)
    assert check(train(model), exact, starts) > 0


def test_start_is_a_copy(llama):
    (weight, *_) = lora_layers(adapted(llama, target_modules=["q_proj"], init_lora_weights="pissa"))
    start = weight.starts()["default"]
    live = weight.products()["default"]
    assert not start.up.requires_grad and start.up.data_ptr() != live.up.data_ptr()
    assert isinstance(live.up, nn.Parameter) and live.up.requires_grad


def test_two_active_adapters(classifier):
    values = pristine(classifier)
    model = adapted(classifier, init_lora_weights=False)
    model.add_adapter("second", LoraConfig(target_modules=["query"], r=3, use_rslora=True, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    train(model)
    both = check(model, values)
    assert [len(weight.active()) for weight in lora_layers(model)] == [2, 1, 2, 1]
    model.base_model.set_adapter(["default"])
    assert check(model, values) != pytest.approx(both)


def test_frozen_adapter_counts(classifier):
    values = pristine(classifier)
    model = adapted(classifier, init_lora_weights=False)
    model.add_adapter("frozen", LoraConfig(target_modules=["query"], r=3, init_lora_weights=False))
    model.base_model.set_adapter(["default", "frozen"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default" in name)
    train(model)
    check(model, values)
    weight = lora_layers(model)[0]
    lowrank_squared(weight.term()).backward()
    products = weight.products()
    assert products["frozen"].up.grad is None and products["default"].up.grad is not None


def test_scale_is_read_anew(classifier):
    values = pristine(classifier)
    model = train(adapted(classifier))
    weight = lora_layers(model)[0]
    before = float(lowrank_squared(weight.term()))
    weight.layer.set_scale("default", 3.0)
    assert float(lowrank_squared(weight.term())) == pytest.approx(9 * before)
    check(model, values)


def test_scale_that_was_another_at_the_start(llama):
    model = adapted(llama, target_modules=["q_proj"], init_lora_weights="olora")
    exact, starts = anchors(model)
    for weight in lora_layers(model):
        weight.layer.set_scale("default", 0.5)
    assert check(model, exact, starts) > 0
    assert check(train(model), exact, starts) > 0


def test_disabled_adapters(classifier):
    model = train(adapted(classifier, modules_to_save=["classifier"]))
    weights = lora_layers(model)
    with model.disable_adapter():
        assert all(float(lowrank_squared(weight.term())) == 0.0 for weight in weights)
        assert saved_copies(model) == []
    assert all(float(lowrank_squared(weight.term())) > 0.0 for weight in weights)
    assert len(saved_copies(model)) == 2


def test_adapter_that_is_off_leaves_its_hole(llama):
    model = adapted(llama, target_modules=["q_proj"], init_lora_weights="pissa")
    exact, starts = anchors(model)
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"], r=3, init_lora_weights=False))
    model.set_adapter("second")
    train(model)
    assert [len(weight.term(starts[weight.name]).gone) for weight in lora_layers(model)] == [1, 1]
    check(model, exact, starts)
    model.delete_adapter("default")
    check(model, exact, starts)


def test_adapter_added_too_late(llama):
    model = adapted(llama, target_modules=["q_proj"])
    starts = {weight.name: weight.starts() for weight in lora_layers(model)}
    model.add_adapter("late", LoraConfig(target_modules=["q_proj"], r=3, init_lora_weights="pissa"))
    weight = lora_layers(model)[0]
    with pytest.raises(
        ValueError, match=r"Adapter 'late' was added after θ0.*'pissa' changed the base weight model\."
    ):
        weight.term(starts[weight.name])


def test_adapter_merged_meanwhile(classifier):
    model = train(adapted(classifier))
    weight = lora_layers(model)[0]
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"query.* merged into its base weight.*unmerge_adapter\(\)"):
        weight.term()
    model.unmerge_adapter()
    assert float(lowrank_squared(weight.term())) > 0


def test_adapter_loaded_from_disk_is_measured_from_the_base_weight(classifier, tmp_path, tiny_bert_dir):
    train(adapted(classifier)).save_pretrained(tmp_path)
    base = BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3)
    values = pristine(base)
    model = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert check(model, values) > 0


def test_add_adapter_of_transformers(classifier):
    values = pristine(classifier)
    assert not has_adapters(classifier) and lora_layers(classifier) == [] and saved_copies(classifier) == []
    by_transformers(classifier, LoraConfig(target_modules=ATTENTION, r=8), "first")
    by_transformers(classifier, LoraConfig(target_modules=["query"], r=3, init_lora_weights=False), "second")
    classifier.set_adapter(["first", "second"])
    assert has_adapters(classifier)
    assert check(train(classifier), values) > 0
    names = [weight.name for weight in lora_layers(classifier)]
    assert names[0] == "bert.encoder.layer.0.attention.self.query.weight" and names[0] in values


def test_adapted_model_inside_of_a_module_of_ones_own(classifier, llama):
    """Two models whose adapters have one name and different starts."""
    net = nn.ModuleDict(
        {
            "a": adapted(classifier),
            "b": adapted(llama, target_modules=["q_proj"], init_lora_weights="pissa"),
        }
    )
    weights = {weight.name: weight for weight in lora_layers(net)}
    assert list(weights["a.bert.encoder.layer.0.attention.self.query.weight"].starts()) == []
    assert list(weights["b.model.layers.0.self_attn.q_proj.weight"].starts()) == ["default"]


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_new_rows_have_no_anchor(llama, target):
    """Of an enlarged embedding or output layer, only the old rows are measured."""
    llama.resize_token_embeddings(97)
    values = pristine(llama)
    model = train(adapted(llama, target_modules=[target], init_lora_weights=False))
    part = check(model, values, rows=90)
    assert part < check(model, values)


def test_shared_layer_counts_once():
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    net.append(net[0])
    model = train(adapted(net, target_modules=["0"]))
    assert [weight.name for weight in lora_layers(model)] == ["0.weight"]


def test_replicated_layers_have_distances_of_their_own(llama):
    model = train(adapted(llama, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]))
    weights = lora_layers(model)
    assert [w.name for w in weights] == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]
    assert weights[1].base is weights[2].base
    distances = [float(lowrank_squared(weight.term())) for weight in weights]
    assert len(set(distances)) == 3


def test_bfloat16_base_and_adapter(tiny_bert_dir):
    base = BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3, dtype=torch.bfloat16)
    values = pristine(base)
    model = get_peft_model(
        base, LoraConfig(target_modules=ATTENTION, init_lora_weights=False), autocast_adapter_dtype=False
    )
    assert lora_layers(model)[0].products()["default"].up.dtype == torch.bfloat16
    assert check(train(model), values) > 0


class _Quantized(nn.Linear):
    """A layer whose weight is stored as bytes."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.size = float(layer.weight.detach().abs().max()) / 127
        bytes_ = (layer.weight.detach() / self.size).round().add(128).to(torch.uint8)
        self.weight = nn.Parameter(bytes_, requires_grad=False)

    def dense(self):
        return (self.weight.double() - 128) * self.size

    def forward(self, x):
        return nn.functional.linear(x, self.dense().to(x.dtype), self.bias)


class _Reads(TorchDispatchMode):
    """Whether an operation got one of some tensors."""

    def __init__(self, tensors):
        super().__init__()
        self.addresses = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.hits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        self.hits += any(x.untyped_storage().data_ptr() in self.addresses for x in tensors)
        return func(*args, **(kwargs or {}))


def test_quantized_weights_are_not_touched(classifier):
    for block in classifier.bert.encoder.layer:
        block.attention.self.query = _Quantized(block.attention.self.query)
    model = train(adapted(classifier, target_modules=["query"]))
    weights = lora_layers(model)
    stored = [weight.base for weight in weights]
    assert all(base.dtype == torch.uint8 for base in stored)
    with _Reads(stored) as watch:
        weights = lora_layers(model)
        results = [lowrank_pass(weight.term(weight.starts())) for weight in weights]
        assert watch.hits == 0
        stored[0] + 1
        assert watch.hits == 1
    for weight, result in zip(weights, results, strict=True):
        change = weight.layer.double().get_delta_weight("default").detach()
        assert float(result.squared) == pytest.approx(float(change.square().sum()), rel=TOLERANCE)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(classifier, bits):
    quantized = pytest.importorskip("bitsandbytes", reason="quantized base weights").nn
    for block in classifier.bert.encoder.layer:
        values = block.attention.self.query.weight.data
        if bits == 4:
            new = quantized.Linear4bit(32, 32, compute_dtype=torch.float32, quant_type="nf4")
            new.weight = quantized.Params4bit(values, requires_grad=False, quant_type="nf4")
        else:
            new = quantized.Linear8bitLt(32, 32, has_fp16_weights=False)
            new.weight = quantized.Int8Params(values, requires_grad=False, has_fp16_weights=False)
        block.attention.self.query = new.to("cpu")
    setattr(classifier, f"is_loaded_in_{bits}bit", True)
    model = train(adapted(classifier, target_modules=["query"]))
    model(**BATCH).logits.sum().backward()
    weights = lora_layers(model)
    assert type(weights[0].layer).__name__ == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    with _Reads([weight.base for weight in weights]) as watch:
        results = [lowrank_pass(weight.term()) for weight in weights]
    assert watch.hits == 0
    for weight, result in zip(weights, results, strict=True):
        change = weight.layer.get_delta_weight("default").detach().double()
        assert float(result.squared) == pytest.approx(float(change.square().sum()), rel=TOLERANCE)


def test_without_peft_nothing_is_adapted(classifier, monkeypatch):
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if not k.startswith("peft")})
    assert not has_adapters(classifier) and lora_layers(classifier) == []
    assert "peft" not in sys.modules


def test_merged_and_unloaded_model_has_no_adapters(classifier):
    model = train(adapted(classifier, modules_to_save=["classifier"]))
    assert not has_adapters(model.merge_and_unload())


# PEFT's own forward pass is the judge of which weight is effective: the oracle above must agree with it.
@pytest.mark.parametrize("config", [KEPT["patterns"], KEPT["random bias of the adapter"], KEPT["embedding"]])
def test_the_effective_weights_are_those_of_the_forward_pass(classifier, config):
    model = train(adapted(classifier, **config)).eval()
    with torch.no_grad():
        expected = model(**BATCH).logits
        for weight in lora_layers(model):
            weight.base.copy_(effective(weight))
        with model.disable_adapter():
            found = model(**BATCH).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not math.isclose(float(expected.sum()), 0.0)
