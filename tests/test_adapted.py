"""What a plan and an anchor make of a model with adapters: names, roles, what θ0 is, and what is refused."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertForSequenceClassification, BertModel

from hf_l2sp import Anchor, drift_report, l2sp_penalty
from hf_l2sp.adapted import base_parameters, base_shape, look_at, new_in_base
from hf_l2sp.backends import Backend
from hf_l2sp.plan import build_plan
from hf_l2sp.provenance import examine

from .peft_models import ATTENTION, adapted, peft, pristine, train

QUERY = "bert.encoder.layer.{}.attention.self.query.weight"
HEAD = ["classifier.weight", "classifier.bias"]


def plan_of(model, **options):
    return build_plan(model, examine(model), **options)


def low_rank_roles(plan):
    return {name: entry.role for name, entry in plan.low_rank.items()}


def squared(model, anchor):
    """‖Δ‖² of everything that is pulled, by name."""
    return dict(zip(anchor.active_names(), anchor.apply(0.0, gradient=False).squared.tolist(), strict=True))


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_of_the_base_model(classifier):
    names = [name for name, _ in classifier.named_parameters()]
    base = dict(classifier.named_parameters())
    model = adapted(classifier, target_modules=["query", "word_embeddings"], modules_to_save=["classifier", "pooler"])
    found = base_parameters(model)
    assert sorted(found) == sorted(names)
    assert all(found[name] is base[name] for name in names)
    seen = look_at(model)
    assert sorted([*seen.parameters, *(w.name for w in seen.weights)]) == sorted(names)
    assert set(seen.copies) == {*HEAD, "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert all(seen.parameters[name] is saved.parameter for name, saved in seen.copies.items())


def test_model_without_adapters_keeps_its_names(net):
    odd = nn.ModuleDict({"lora_A": net[0], "base_layer": net[1]})
    assert base_parameters(odd) == dict(odd.named_parameters()) == look_at(odd).parameters


def test_copies_that_are_not_in_use_are_not_seen(classifier):
    """Of two adapters with copies of one module, the forward pass uses that of the active one."""
    model = adapted(classifier, modules_to_save=["classifier"])
    model.add_adapter("other", peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    model.add_adapter("none", peft.LoraConfig(target_modules=["query"]))
    wrapper = model.base_model.model.classifier
    for active in ("default", "other"):
        model.set_adapter(active)
        assert look_at(model).parameters["classifier.weight"] is wrapper.modules_to_save[active].weight
    model.set_adapter("none")
    assert look_at(model).parameters["classifier.weight"] is wrapper.original_module.weight


def test_new_in_base(classifier):
    inside = "base_model.model."
    seen = look_at(adapted(classifier, modules_to_save=["classifier"]))
    new = {
        f"{inside}classifier.original_module.weight",
        f"{inside}classifier.modules_to_save.default.bias",
        f"{inside}bert.encoder.layer.0.attention.self.query.lora_A.default.weight",
        f"{inside}bert.encoder.layer.0.attention.self.query.base_layer.bias",
        f"{inside}bert.explora_head.weight",
    }
    expected = {"classifier.weight", "bert.encoder.layer.0.attention.self.query.bias", "bert.explora_head.weight"}
    assert new_in_base(seen, frozenset(new)) == expected
    plain = look_at(nn.ModuleDict({"lora_A": nn.Linear(1, 1)}))
    assert new_in_base(plain, frozenset({"lora_A.weight"})) == {"lora_A.weight"}


class WithOwnHead(nn.Module):
    """A module of one's own, with a name that contains one of PEFT's."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.flora_head = nn.Linear(32, 3)


def test_new_module_whose_name_resembles_one_of_an_adapter(tiny_bert_dir):
    model = adapted(WithOwnHead(BertModel.from_pretrained(tiny_bert_dir)))
    model.base_model.model.flora_head.requires_grad_(True)
    plan = plan_of(model)
    assert {name: plan.entries[name].role for name in plan.entries if "flora" in name} == {
        "flora_head.weight": "new",
        "flora_head.bias": "new",
    }


# --- roles ----------------------------------------------------------------------------------------------------------


def test_roles_follow_the_factors(classifier):
    model = adapted(classifier, target_modules=[*ATTENTION, "classifier"])
    plan = plan_of(model, exclude=[r"layer\.1"])
    roles = low_rank_roles(plan)
    assert roles.pop("classifier.weight") == "new"  # its base weight is random
    assert set(roles) == {n for n in base_parameters(model) if n.endswith(("query.weight", "value.weight"))}
    assert all(role == ("excluded" if "layer.1" in name else "anchored") for name, role in roles.items())
    entry = plan.low_rank[QUERY.format(0)]
    assert (entry.trainable, entry.elements, entry.shape) == (True, 32 * 32, (32, 32))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.requires_grad_(False)
    assert entry.role == "anchored"  # one factor is enough
    model.requires_grad_(False)
    assert set(low_rank_roles(plan).values()) == {"frozen"}
    model.set_adapter("default")
    assert entry.role == "anchored"
    with model.disable_adapter():
        assert not entry.trainable and entry.role == "frozen"


def test_summary_counts_weights_that_adapters_change(classifier):
    model = adapted(classifier, target_modules=[*ATTENTION, "classifier"], modules_to_save=["pooler"])
    summary = plan_of(model, exclude=["value"]).summary()
    assert "2 anchored [3,104] + 2 by LoRA" in summary  # pooler 1056, two queries of 1024
    assert "0 new [96] + 1 by LoRA" in summary and "0 excluded [2,048] + 2 by LoRA" in summary


def test_nothing_but_excluded_adapters(classifier):
    with pytest.raises(ValueError, match=rf"no trainable parameter with an anchor.*{QUERY.format(0)}: excluded"):
        Anchor.from_model(adapted(classifier, target_modules=["query"]), exclude=["nothing", "query"])


def test_base_that_is_copied_without_marks(tiny_bert_dir):
    """A deepcopy loses the marks of from_pretrained; then names and values in the file decide, without adapters'."""
    for place in ("base", "adapted"):
        base = BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3)
        model = adapted(copy.deepcopy(base) if place == "base" else base, modules_to_save=["pooler", "classifier"])
        model = model if place == "base" else copy.deepcopy(model)
        assert not any(hasattr(p, "_is_hf_initialized") for p in model.parameters())
        plan = plan_of(model)
        assert set(low_rank_roles(plan).values()) == {"anchored"} and len(plan.low_rank) == 4
        assert {e.name for e in plan.having("new")} == set(HEAD)
        assert {e.name for e in plan.having("anchored")} == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


# --- weights --------------------------------------------------------------------------------------------------------


def test_weights_of_adapters(classifier, tmp_path):
    model = train(adapted(classifier))
    plain = squared(model, Anchor.from_model(model))
    anchor = Anchor.from_model(model, weights={r"layer\.0.*query": 4.0, r"layer\.0": 0.0, "value": 0.5})
    weights = {name: entry.weight for name, entry in anchor.plan.low_rank.items()}
    assert list(weights.values()) == [4.0, 0.0, 1.0, 0.5]
    assert low_rank_roles(anchor.plan)[QUERY.format(0).replace("query", "value")] == "excluded"
    total = sum(weights[name] * value for name, value in plain.items())
    assert float(anchor.apply(0.0, gradient=False).total) == pytest.approx(total)
    assert float(l2sp_penalty(model, anchor)) == pytest.approx(total)
    # One number for each, as of a Fisher's mean; a tensor over the weight has no closed form.
    save_file({name: torch.tensor(2.0) for name in weights}, tmp_path / "w.safetensors")
    halves = Anchor.from_model(model, weights=str(tmp_path / "w.safetensors"))
    assert float(l2sp_penalty(model, halves)) == pytest.approx(2 * sum(plain.values()))
    with pytest.raises(ValueError, match="known as a whole only"):
        Anchor.from_model(model, weights={QUERY.format(0): torch.ones(32, 32)})
    for wrong in ("lora_A", "base_model", "base_layer"):  # names that PEFT inserts
        with pytest.raises(ValueError, match=f"'{wrong}' matches no parameter"):
            Anchor.from_model(model, weights={wrong: 2.0})


def test_gradients_are_those_of_the_weighted_distance_times_the_loss_scale(classifier):
    model = train(adapted(classifier))
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    backend = Backend(
        SimpleNamespace(device=torch.device("cpu"), num_processes=1, scaler=scaler, is_main_process=True)
    )
    anchor = Anchor.from_model(model, weights={"query": 3.0}, backend=backend)
    (0.1 * l2sp_penalty(model, anchor)).backward()
    expected = {n: 512.0 * p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    anchor.apply(0.1)
    assert len(expected) == 8
    assert all(torch.allclose(model.get_parameter(n).grad, g, rtol=1e-5) for n, g in expected.items())
    model.zero_grad()
    anchor.apply(0.0)
    assert all(p.grad is None for p in model.parameters())


# --- starts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_are_taken_once_and_copied(classifier, init):
    model = adapted(classifier, init_lora_weights=init)
    anchor = Anchor.from_model(model)
    entry = anchor.plan.low_rank[QUERY.format(0)]
    (start,) = entry.starts.values()
    live = entry.adapted.products()["default"]
    assert torch.equal(start.up, live.up) and start.up.data_ptr() != live.up.data_ptr()
    assert start.scale == live.scale and not start.up.requires_grad
    assert set(squared(model, anchor).values()) == {0.0}
    train(model)
    assert torch.equal(anchor.plan.low_rank[QUERY.format(0)].starts["default"].up, start.up)
    assert min(squared(model, anchor).values()) > 1e-3


def test_starts_are_none_where_the_base_weight_is_the_anchor(classifier):
    anchor = Anchor.from_model(adapted(classifier))
    assert all(entry.starts == {} for entry in anchor.plan.low_rank.values())
    assert anchor.nbytes == 0


# --- enlarged embeddings --------------------------------------------------------------------------------------------

OLD, NOW = 90, 97


@pytest.fixture(params=[False, True], ids=["loaded", "deepcopied"])
def enlarged(llama, request):
    model = copy.deepcopy(llama) if request.param else llama
    model.resize_token_embeddings(NOW)
    return model


def test_adapters_on_enlarged_embeddings(enlarged):
    values = pristine(enlarged)
    model = train(adapted(enlarged, target_modules=["embed_tokens", "lm_head"]))
    anchor = Anchor.from_model(model)
    assert {n: (e.rows, e.role, e.elements) for n, e in anchor.plan.low_rank.items()} == {
        "model.embed_tokens.weight": (OLD, "anchored", OLD * 32),
        "lm_head.weight": (OLD, "anchored", OLD * 32),
    }
    for name in anchor.plan.low_rank:
        assert f"{name}: first {OLD} of {NOW} rows" in anchor.plan.summary()
    found = squared(model, anchor)
    merged = {n: p.detach().double() for n, p in model.merge_and_unload().named_parameters()}
    for name, value in found.items():
        change = merged[name] - values[name]
        assert value == pytest.approx(float(change[:OLD].square().sum()), rel=1e-4)
        assert value < 0.99 * float(change.square().sum())


def test_trained_copies_of_enlarged_embeddings(enlarged):
    values = pristine(enlarged)
    config = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    model = adapted(enlarged, **config)
    anchor = Anchor.from_model(model)
    train(model)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(anchor[name].double(), values[name][:OLD])
        entry = anchor.plan.entries[name]
        assert (entry.role, entry.rows) == ("anchored", OLD)
        change = entry.parameter.detach().double() - values[name]
        assert squared(model, anchor)[name] == pytest.approx(float(change[:OLD].square().sum()), rel=1e-5)
    anchor.apply(0.5)
    copied = anchor.plan.entries["lm_head.weight"].parameter
    assert torch.allclose(copied.grad[:OLD], (copied - values["lm_head.weight"])[:OLD].float(), atol=1e-6)
    assert not copied.grad[OLD:].any()


# --- trained tokens -------------------------------------------------------------------------------------------------


def test_trained_tokens_are_pulled_to_their_original_rows(llama):
    values = pristine(llama)
    model = adapted(llama, target_modules=["q_proj"], trainable_token_indices=[7, 3])
    anchor = Anchor.from_model(train(model))  # already moved: θ0 are the originals all the same
    name = "model.embed_tokens.weight"
    entry = anchor.plan.entries[name]
    assert (entry.role, entry.shape, entry.rows) == ("anchored", (2, 32), None)
    assert torch.equal(anchor[name].double(), values[name][[7, 3]]) and anchor.nbytes == 0
    anchor.apply(0.5)
    moved = entry.parameter.detach() - values[name][[7, 3]].float()
    assert torch.allclose(entry.parameter.grad, moved, atol=1e-6) and float(moved.norm()) > 0.1


def test_added_tokens_among_the_trained_ones(enlarged):
    values = pristine(enlarged)
    model = adapted(enlarged, target_modules=["q_proj"], trainable_token_indices=[5, 3, 90, 96])
    anchor = Anchor.from_model(model)
    name = "model.embed_tokens.weight"
    entry = anchor.plan.entries[name]
    assert (entry.role, entry.rows, entry.shape) == ("anchored", 2, (4, 32))
    assert torch.equal(anchor[name].double(), values[name][[5, 3]])
    train(model)
    anchor.apply(0.5)
    assert entry.parameter.grad[:2].any() and not entry.parameter.grad[2:].any()


def test_added_tokens_alone_are_new(enlarged):
    """Pulling them to their random start would be wrong, and a weight decay of zero rows meaningless."""
    model = adapted(enlarged, target_modules=["q_proj"], trainable_token_indices=[91, 90])
    anchor = Anchor.from_model(model)
    entry = anchor.plan.entries["model.embed_tokens.weight"]
    assert (entry.role, entry.rows, entry.elements) == ("new", None, 64)
    assert list(anchor) == [] and [t.parameter for t in anchor.new_terms()] == [entry.parameter]
    config = peft.TrainableTokensConfig(token_indices=[91], target_modules=["embed_tokens"])
    alone = peft.get_peft_model(model.unload(), config)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight: no pretrained value"):
        Anchor.from_model(alone)


def test_added_tokens_before_old_ones(enlarged):
    model = adapted(enlarged, target_modules=["q_proj"], trainable_token_indices=[91, 5])
    with pytest.raises(ValueError, match=r"added tokens before pretrained ones; name those below 90 first"):
        Anchor.from_model(model)


# --- trained copies of modules --------------------------------------------------------------------------------------


def test_copies_of_a_trained_adapter_are_pulled_to_the_originals(tiny_bert_dir, tmp_path):
    """Not to what the adapter was trained to, with which training begins."""

    def base():
        torch.manual_seed(3)
        return BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3)

    values = pristine(base())
    train(adapted(base(), modules_to_save=["pooler", "classifier"])).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    anchor = Anchor.from_model(model)
    assert {e.name for e in anchor.plan.having("new")} == set(HEAD)  # made anew in the base model
    for name in ("bert.pooler.dense.weight", "bert.pooler.dense.bias"):
        now = anchor.plan.entries[name].parameter.detach().double()
        assert torch.equal(anchor[name].double(), values[name])
        assert squared(model, anchor)[name] == pytest.approx(float((now - values[name]).square().sum()), rel=1e-5)
        assert float((now - values[name]).norm()) > 0.05


class Scaled(nn.Module):
    """A module with a parameter without dimensions, as CLIP's temperature is."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x * self.scale


def test_copy_of_a_parameter_without_dimensions():
    model = adapted(nn.Sequential(nn.Linear(3, 4), Scaled()), target_modules=["0"], modules_to_save=["1"])
    anchor = Anchor.from_model(model)
    train(model)
    assert float(anchor["1.scale"]) == 2.0 and squared(model, anchor)["1.scale"] > 0


# --- what is refused ------------------------------------------------------------------------------------------------


def test_trainable_base_weight_is_refused(classifier):
    model = adapted(classifier)
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    layer.base_layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"LoRA on a weight that is trained itself, too .*query.*Freeze the weight"):
        Anchor.from_model(model)


# --- quantized base weights -----------------------------------------------------------------------------------------


class Quantized(nn.Linear):
    """A layer whose weight is stored as bytes, in another shape."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.size = float(layer.weight.detach().abs().max()) / 127
        codes = (layer.weight.detach() / self.size).round().add(128).to(torch.uint8)
        self.weight = nn.Parameter(codes.view(-1, 1), requires_grad=False)


def quantized(model):
    for block in model.bert.encoder.layer:
        block.attention.self.query = Quantized(block.attention.self.query)
    return adapted(model, target_modules=["query"])


def test_quantized_base_weights(classifier, tiny_bert_dir):
    def again():
        return quantized(BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3))

    model = quantized(classifier)
    anchor = Anchor.from_model(model)
    assert f"0 anchored [{2 * 32 * 32:,}] + 2 by LoRA" in anchor.plan.summary()
    assert {base_shape(entry.adapted) for entry in anchor.plan.low_rank.values()} == {(32, 32)}
    assert anchor.nbytes == 0 and anchor.sums[QUERY.format(0)].shape == (32, 32)
    # The identity is that of the stored bytes, whatever the adapters have learned since.
    assert Anchor.from_model(train(again())).fingerprint == anchor.fingerprint
    other = again()
    look_at(other).weights[1].base.data[5] ^= 1
    assert Anchor.from_model(other).fingerprint != anchor.fingerprint


def test_shapes_of_weights_and_biases(classifier):
    for target, shapes in {"word_embeddings": [(100, 32)], "0.intermediate.dense": [(64, 32), (64,)]}.items():
        model = adapted(copy.deepcopy(classifier), target_modules=[target], lora_bias=len(shapes) > 1)
        assert [base_shape(weight) for weight in look_at(model).weights] == shapes


def test_bias_that_the_base_layer_lacks():
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2))
    model = adapted(net, target_modules=["0"], lora_bias=True)
    anchor = Anchor.from_model(model)
    assert anchor.plan.low_rank["0.bias"].shape == (4,) and anchor.norm("0.bias") == 0.0
    train(model)
    assert squared(model, anchor)["0.bias"] > 0


# --- adapters that are away from θ0 at the start --------------------------------------------------------------------


def told(messages):
    return [message for message in messages if "away from θ0 before training begins" in message]


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "eva", "mica", "pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapters_are_at_the_anchor(tiny_bert_dir, init, dtype, caplog):
    model = BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3, dtype=dtype)
    model = adapted(model, init_lora_weights=init)
    if dtype == torch.bfloat16:  # PEFT keeps factors in float32
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    Anchor.from_model(model)
    assert not told(caplog.messages)


@pytest.mark.parametrize("kind", ["trained", "random", "residual"])
def test_adapters_that_are_away_from_the_anchor_are_told_once(classifier, tiny_bert_dir, tmp_path, kind, caplog):
    if kind == "residual":  # PiSSA's adapter, which forgot that it is one
        made = adapted(classifier, init_lora_weights="pissa")
        config = made.peft_config["default"]
        config.init_lora_weights = True
        model = made
    elif kind == "random":
        model = adapted(classifier, init_lora_weights=False)
    else:
        train(adapted(classifier), size=1e-4).save_pretrained(tmp_path)
        base = BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3)
        model = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    anchor = Anchor.from_model(model)
    (message,) = told(caplog.messages)
    distance = math.sqrt(sum(squared(model, anchor).values()))
    assert f"The adapters of 4 weights (first {QUERY.format(0)})" in message
    assert f"distance {distance:.4g}." in message and distance > 0
    for word in (
        "trained before",
        "PiSSA",
        "init_lora_weights=True",
        "replace_lora_weights_loftq",
        "merge_and_unload",
    ):
        assert word in message
    l2sp_penalty(model, anchor)
    drift_report(model, anchor)
    assert len(told(caplog.messages)) == 1


def test_only_the_first_process_tells(classifier, caplog):
    model = adapted(classifier, init_lora_weights=False)
    other = SimpleNamespace(is_main_process=False, num_processes=1, device=torch.device("cpu"), scaler=None)
    Anchor.from_model(model, backend=Backend(other))
    assert not told(caplog.messages)


def test_what_is_not_pulled_is_not_told(classifier, caplog):
    model = adapted(classifier, init_lora_weights=False)
    Anchor.from_model(model, exclude=[r"layer\.0", "value"])
    assert f"The adapters of 1 weights (first {QUERY.format(1)})" in told(caplog.messages)[0]


# --- another model of the same kind ---------------------------------------------------------------------------------


def test_penalty_of_another_model_is_that_of_its_own_adapters(classifier, tiny_bert_dir):
    model = adapted(classifier, modules_to_save=["pooler"])
    anchor = Anchor.from_model(model)
    base = BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3)
    other = train(adapted(base, modules_to_save=["pooler"]))
    expected = sum(squared(other, Anchor.from_model(other)).values())
    assert float(l2sp_penalty(other, anchor)) == pytest.approx(expected) and expected > 0.1
    assert float(l2sp_penalty(model, anchor)) == 0.0
    (2 * l2sp_penalty(other, anchor)).backward()
    assert all(p.grad is None for p in model.parameters())


def test_model_whose_adapters_are_gone(classifier):
    model = adapted(classifier)
    anchor = Anchor.from_model(model)
    with pytest.raises(ValueError, match=rf"knows adapters of {QUERY.format(0)} \(4 in all\), which the model lacks"):
        l2sp_penalty(copy.deepcopy(model).merge_and_unload(), anchor)
