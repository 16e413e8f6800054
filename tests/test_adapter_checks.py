"""What is refused, by name and with what to do, and that all the rest of PEFT is refused as well."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from hf_l2sp.adapter_checks import check_adapters, has_adapters
from hf_l2sp.adapters import lora_layers

from .peft_models import adapted, needs, peft

LoraConfig, PeftType, get_peft_model = peft.LoraConfig, peft.PeftType, peft.get_peft_model

CURE = r"\. Use plain LoRA, train the full model, or set l2sp_lambda=0\.$"
Q = ["q_proj"]


def lora(model, **config):
    return adapted(model, **{"target_modules": Q, **config})


def refused(model, pattern):
    assert has_adapters(model)
    for function in (check_adapters, lora_layers):
        with pytest.raises(ValueError, match=pattern):
            function(model)


def adapted_layer(layer):
    return lora(nn.Sequential(layer), target_modules=["0"]).base_model.model[0]


METHODS = {
    "AdaLoRA": (lambda: peft.AdaLoraConfig(target_modules=Q, total_step=10), "prunes the ranks"),
    "IA3": (lambda: peft.IA3Config(target_modules=Q, feedforward_modules=[]), "rescales activations"),
    "VeRA": (lambda: peft.VeraConfig(target_modules=Q, r=4), "random matrices"),
    "VB-LoRA": (lambda: peft.VBLoRAConfig(target_modules=Q, r=4, vector_length=8, num_vectors=16), "vectors"),
    "LoHa": (lambda: peft.LoHaConfig(target_modules=Q, r=4), "elementwise product"),
    "LoKr": (lambda: peft.LoKrConfig(target_modules=Q, r=4), "Kronecker product"),
    "OFT": (lambda: peft.OFTConfig(target_modules=Q, r=4, oft_block_size=0), "no plain product s·BA"),
    "LN tuning": (lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]), "layer norms"),
    "prompt tuning": (lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "virtual tokens"),
    "prefix tuning": (lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "virtual tokens"),
    "P-tuning": (lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "virtual tokens"),
}


@pytest.mark.parametrize("name", METHODS)
def test_other_methods(llama, name):
    make, why = METHODS[name]
    refused(get_peft_model(llama, make()), rf"no exact distance for {name} \(adapter 'default'\): .*{why}.*{CURE}")


def test_xlora(llama, tmp_path):
    lora(llama).save_pretrained(tmp_path)
    base = type(llama)(llama.config)
    base.config.use_cache = False
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters={"0": str(tmp_path)})
    refused(get_peft_model(base, config), rf"X-LoRA .*anew for every token{CURE}")


@pytest.mark.parametrize("method", sorted(set(PeftType) - {PeftType.LORA, PeftType.TRAINABLE_TOKENS}))
def test_every_other_method_of_peft_is_refused(net, method):
    """Also those that nobody has looked at."""
    model = lora(net, target_modules=["0"])
    model.peft_config["default"].peft_type = method
    refused(model, rf"no exact distance for .* \(adapter 'default'\): .*{CURE}")


def test_method_of_a_later_version(net):
    model = lora(net, target_modules=["0"])
    model.peft_config["default"].peft_type = "NEW_METHOD"
    refused(model, rf"NEW_METHOD \(adapter 'default'\): the change that it makes .*{CURE}")


def test_inactive_adapter_is_checked_as_well(llama):
    model = lora(llama)
    model.add_adapter("second", LoraConfig(target_modules=Q, use_dora=True))
    refused(model, r"DoRA \(adapter 'second'")


def test_mixed_adapters(llama):
    model = get_peft_model(llama, LoraConfig(target_modules=Q), mixed=True)
    check_adapters(model)
    model.add_adapter("other", peft.LoHaConfig(target_modules=Q))
    refused(model, rf"LoHa \(adapter 'other'\).*{CURE}")


VARIANTS = {
    "DoRA": ("use_dora", lambda _: True, "norm of every column"),
    "aLoRA": ("alora_invocation_tokens", lambda _: [5], "some of the tokens"),
    "BD-LoRA": ("use_bdlora", lambda c: c.BdLoraConfig(target_modules_bd_a=Q, nblocks=2), "block-diagonal"),
    "KaSA": ("kasa_config", lambda c: c.KasaConfig(), "cuts off part of the base weight"),
    "MonteCLoRA": ("monteclora_config", lambda c: c.MontecloraConfig(), "at random"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_lora(llama, name):
    option, make, why = VARIANTS[name]
    needs(option)
    config = {option: make(peft.tuners.lora.config), "task_type": "CAUSAL_LM"}
    refused(
        lora(llama, **config), rf"for {name} \(adapter 'default', .*layers\.0\.self_attn\.q_proj\): .*{why}.*{CURE}"
    )


def test_variants_that_cannot_be_made_here(llama):
    """Arrow needs trained adapters, QA-LoRA a quantized model."""
    needs("arrow_config", "use_qalora")
    from peft.tuners.lora import variants

    model = lora(llama)
    layer = lora_layers(model)[0].layer
    for kind, name in ((variants.ArrowLinearVariant, "Arrow"), (variants.QALoraLinearVariant, "QA-LoRA")):
        layer.lora_variant["default"] = kind()
        refused(model, rf"for {name} \(adapter 'default', .*{CURE}")
    layer.lora_variant["default"] = type("LaterVariant", (), {})()
    refused(model, rf"LaterVariant \(adapter 'default', .*no plain product.*{CURE}")
    del layer.lora_variant["default"]
    check_adapters(model)
    layer.use_dora["default"] = True  # all that PEFT 0.15 has
    refused(model, r"DoRA")


@pytest.mark.parametrize("init", ["later_init", "PISSA2"])
def test_initialization_of_a_later_version(llama, init):
    model = lora(llama)
    model.peft_config["default"].init_lora_weights = init
    known = init.lower().startswith("pissa")  # as PEFT reads it, by its beginning
    if known:
        check_adapters(model)
    else:
        refused(
            model, rf"init_lora_weights='{init}' \(adapter 'default'\): it is not known .* Use another one, such as"
        )


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x):
        return torch.einsum("bi,eio->beo", x, self.w)


def test_target_parameters():
    needs("target_parameters")
    net = nn.Sequential(nn.Linear(4, 4), Experts())
    model = get_peft_model(net, LoraConfig(target_modules=[], target_parameters=["1.w"], r=2))
    refused(model, r"LoRA with target_parameters \(.*1\): it adds one product per expert\. Use target_modules,")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_multihead_attention():
    model = lora(Attention(), target_modules=["attention"])
    refused(
        model, r"torch\.nn\.MultiheadAttention \(.*attention\): PEFT adds .* twice\. Leave it out of target_modules"
    )


def test_multihead_attention_is_refused_for_a_reason():
    """PEFT merges the adapter of the output projection twice; once it does not, this layer can be supported."""
    model = lora(Attention(), target_modules=["attention"], init_lora_weights=False).eval()
    layer = model.base_model.model.attention
    product = layer.base_layer.out_proj.get_delta_weight("default").detach()
    before = layer.base_layer.out_proj.base_layer.weight.detach().clone()
    layer.merge(adapter_names=["default"])
    after = layer.base_layer.out_proj.base_layer.weight.detach()
    assert torch.allclose(after - before, 2 * product, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"groups": 2}, {"dilation": 2, "padding": "same"}, {"padding": 1, "padding_mode": "circular"}], ids=str
)
def test_convolutions_with_options(options):
    model = lora(nn.Sequential(nn.Conv1d(4, 4, 3, **options)), target_modules=["0"])
    refused(model, r"convolution with groups, dilation or a padding mode \(.*0\): .*Leave it out of target_modules")


@pytest.mark.parametrize("name", ["MyAdapter", "Linear"])
def test_layer_of_ones_own(net, name):
    mine = type(name, (peft.tuners.lora.Linear,), {"__module__": "mine"})
    config = LoraConfig(target_modules=["0"])
    config._register_custom_module({nn.Linear: mine})
    refused(get_peft_model(net, config), rf"the adapter layer mine\.{name} \(.*0\).*{CURE}")


def test_adapter_around_an_adapter(net):
    model = lora(net, target_modules=["0"])
    layer = model.base_model.model[0]
    layer.base_layer = adapted_layer(layer.base_layer)
    refused(model, r"several adapters of different kinds on one layer \(.*0\)")


def test_merged_adapters(llama):
    model = lora(llama)
    model.merge_adapter()
    refused(model, r"adapters of .*q_proj are merged into its base weight.*unmerge_adapter\(\).*merge_and_unload\(\)")
    model.unmerge_adapter()
    check_adapters(model)


def test_merged_tokens(llama):
    model = get_peft_model(llama, peft.TrainableTokensConfig(token_indices=[5], target_modules=["embed_tokens"]))
    check_adapters(model)
    model.merge_adapter()
    refused(model, r"embed_tokens are merged into its base weight")


def test_trainable_base_weight(llama):
    model = lora(llama)
    layer = lora_layers(model)[1].layer
    layer.base_layer.weight.requires_grad_(True)
    refused(
        model, r"LoRA on a weight that is trained itself, too \(.*layers\.1\.self_attn\.q_proj\).*Freeze the weight"
    )


def test_trainable_base_bias(classifier):
    check_adapters(lora(classifier, target_modules=["query"], bias="all"))


def test_trainable_base_bias_below_a_bias_of_the_adapter(classifier):
    model = lora(classifier, target_modules=["query"], bias="all", lora_bias=True)
    refused(model, r"LoRA on a bias that is trained itself, too \(.*query\).*Freeze the bias")


def test_tied_adapters(llama):
    llama.config.tie_word_embeddings = True
    llama.tie_weights()
    model = lora(llama, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    if not hasattr(model.peft_config["default"], "target_modules_to_tie"):
        pytest.skip(f"PEFT {peft.__version__} does not tie adapters")
    refused(model, r"ensure_weight_tying on .*lm_head.* \(adapter 'default'\): .*Target one of the tied layers alone")


def test_adapter_inside_of_modules_to_save(llama):
    model = lora(llama, modules_to_save=["mlp"])
    copy = model.base_model.model.model.layers[0].mlp.modules_to_save["default"]
    copy.up_proj = adapted_layer(copy.up_proj)
    refused(model, r"adapters inside of modules_to_save \(.*layers\.0\.mlp\): .*Leave the module out of one")


def test_unknown_training_wrapper(llama):
    model = lora(llama, modules_to_save=["lm_head"])
    wrapper = model.base_model.model.lm_head
    wrapper.__class__ = type("LaterWrapper", (type(wrapper),), {})
    refused(model, rf"LaterWrapper \(.*lm_head\): it is not known .*{CURE}")


def test_plain_models_pass(llama, net):
    for model in (llama, net):
        assert not has_adapters(model)
        check_adapters(model)


def test_messages_are_sentences():
    """Every refusal ends with what to do, and none has lost a space where strings meet."""
    from hf_l2sp import adapter_checks

    texts = [why for _, why in (*adapter_checks._METHODS.values(), *adapter_checks._VARIANTS.values())]
    for text in texts:
        assert not re.search(r"\s\s|[.,:;][^\s]|\.$", text)
