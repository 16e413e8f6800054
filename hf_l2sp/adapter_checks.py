"""Which adapters of PEFT have an exact distance here; all others are refused, with their name and what to do.

PEFT is optional. It is imported only where it is loaded already: without it no model has a module of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from torch import nn

from .naming import canonical_name, unwrap

_CURE = "Use plain LoRA, train the full model, or set l2sp_lambda=0."
_NO_PRODUCT = "the change that it makes to a weight is no plain product s·BA of two matrices"
_NO_WEIGHT = "it trains virtual tokens and changes no pretrained weight, so there is no distance to one"

# PEFT's methods by `PeftType`: their usual names, and why they are refused where it is not _NO_PRODUCT.
_METHODS = {
    "ADALORA": ("AdaLoRA", "it rescales and prunes the ranks of its product while it trains"),
    "ADAPTION_PROMPT": ("adaption prompt (LLaMA-Adapter)", _NO_WEIGHT),
    "CARTRIDGE": ("Cartridge", _NO_WEIGHT),
    "CPT": ("context-aware prompt tuning (CPT)", _NO_WEIGHT),
    "IA3": ("IA3", "it rescales activations"),
    "LN_TUNING": ("LN tuning", "it replaces layer norms; training the full model with the rest frozen does the same"),
    "LOHA": ("LoHa", "it adds the elementwise product of two products"),
    "LOKR": ("LoKr", "it adds a Kronecker product"),
    "MULTITASK_PROMPT_TUNING": ("multitask prompt tuning", _NO_WEIGHT),
    "P_TUNING": ("P-tuning", _NO_WEIGHT),
    "PREFIX_TUNING": ("prefix tuning", _NO_WEIGHT),
    "PROMPT_TUNING": ("prompt tuning", _NO_WEIGHT),
    "VBLORA": ("VB-LoRA", "it composes its matrices of vectors that all layers share"),
    "VERA": ("VeRA", "it trains vectors around random matrices that all layers share"),
    "XLORA": ("X-LoRA", "it mixes its adapters anew for every token"),
}
# Layers of peft.tuners.lora whose forward pass is that of the base layer plus Σ s·B(A(x)), however that is stored.
_PLAIN_LAYERS = frozenset(
    "Linear Embedding Conv1d Conv2d Conv3d Linear8bitLt Linear4bit QuantLinear GPTQLoraLinear AqlmLoraLinear "
    "AwqLoraLinear EetqLoraLinear HqqLoraLinear IncLoraLinear TorchaoLoraLinear".split()
)
_OTHER_LAYERS = {
    "MultiheadAttention": (
        "LoRA on torch.nn.MultiheadAttention",
        "PEFT adds the product to its output projection twice",
        "Leave it out of target_modules, train the full model, or set l2sp_lambda=0.",
    ),
    "ParamWrapper": (
        "LoRA with target_parameters",
        "it adds one product per expert",
        "Use target_modules, train the full model, or set l2sp_lambda=0.",
    ),
}
# Variants of LoRA by class name. The plain ones compute s·B(A(x)), too: MiCA only freezes B, and VeLoRA only
# approximates the task's gradient.
_PLAIN_VARIANTS = frozenset({"MiCALinearVariant", "MiCAEmbeddingVariant", "VeloraLinearVariant"})
_VARIANTS = {
    "ALora": ("aLoRA", "it changes the weight for some of the tokens only"),
    "Arrow": ("Arrow", "it mixes its adapters anew for every token"),
    "BdLora": ("BD-LoRA", "it keeps its block-diagonal matrices in another form"),
    "Dora": ("DoRA", "it sets the norm of every column of the adapted weight"),
    "Kasa": ("KaSA", "it cuts off part of the base weight"),
    "Monteclora": ("MonteCLoRA", "it draws its weights at random"),
    "QALora": ("QA-LoRA", "it pools the inputs of its product"),
}
# Values of LoraConfig.init_lora_weights, in lower case. With the first the base weight stays θ0, whatever B and A
# are; with those that begin like the second, linear layers take the start of the adapter out of it.
_KEPT = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"})
_TAKEN_OUT = ("pissa", "corda", "olora", "loftq", "lora_ga")


def peft_class(module: str, name: str) -> Any:
    """A class of PEFT, which must be loaded."""
    return getattr(import_module(f"peft.{module}"), name)


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether it is a layer that PEFT put around one of the model."""
    return isinstance(module, peft_class("tuners.tuners_utils", "BaseTunerLayer"))


def is_training_wrapper(module: nn.Module) -> bool:
    """Whether PEFT put it around a module in order to train that, or rows of it, as a whole."""
    return isinstance(module, peft_class("utils.other", "AuxiliaryTrainingWrapper"))


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT changed the model: by `get_peft_model`, or by `add_adapter` of transformers."""
    return "peft" in sys.modules and any(
        is_tuner_layer(module)
        or is_training_wrapper(module)
        or isinstance(module, peft_class("peft_model", "PeftModel"))
        for module in unwrap(model).modules()
    )


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Mapping[str, Any]]]:
    """Canonical path, module, and the configurations by adapter of the nearest adapted model around it."""
    around: dict[str, Mapping[str, Any]] = {}
    for path, module in unwrap(model).named_modules():
        configs = getattr(module, "peft_config", None)
        if not isinstance(configs, Mapping) or not configs:
            configs = around.get(path.rpartition(".")[0], {})
        around[path] = configs
        yield canonical_name(path), module, configs


def takes_start_out(config: Any) -> bool:
    """Whether linear layers with this configuration take the start of the adapter out of the base weight."""
    return _start(config).startswith(_TAKEN_OUT)


def merged_error(path: str) -> ValueError:
    """For adapters that the forward pass no longer reads, since they are part of the base weight now."""
    return ValueError(
        f"The adapters of {path} are merged into its base weight, so that training would not reach them. Call "
        "unmerge_adapter() to train adapters, or merge_and_unload() to train the full model."
    )


def check_adapters(model: nn.Module) -> None:
    """Refuses every adapter whose change of the weights has no exact distance here.

    What is known to be exact passes: LoRA in its plain form, `modules_to_save` and `trainable_token_indices`.

    Raises:
        ValueError: Names the method, why it is refused, and what to do.
    """
    if not has_adapters(model):
        return
    for path, module, configs in adapted_modules(model):
        for adapter, config in configs.items():
            _check_config(adapter, config)
        if is_training_wrapper(module):
            _check_wrapper(path, module)
        elif is_tuner_layer(module):
            _check_layer(path, module)


def _refusal(what: str, why: str, cure: str = _CURE) -> ValueError:
    return ValueError(f"L2-SP has no exact distance for {what}: {why}. {cure}")


def _start(config: Any) -> str:
    return str(getattr(config, "init_lora_weights", True)).lower()


def _check_config(adapter: str, config: Any) -> None:
    method = str(getattr(config.peft_type, "value", config.peft_type)).upper()
    if method not in ("LORA", "TRAINABLE_TOKENS"):
        name, why = _METHODS.get(method, (method, _NO_PRODUCT))
        raise _refusal(f"{name} (adapter {adapter!r})", why)
    if _start(config) not in _KEPT and not takes_start_out(config):
        raise _refusal(
            f"LoRA with init_lora_weights={config.init_lora_weights!r} (adapter {adapter!r})",
            "it is not known whether this initialization changes the base weights",
            "Use another one, such as True, train the full model, or set l2sp_lambda=0.",
        )
    if getattr(config, "target_modules_to_tie", None):
        raise _refusal(
            f"LoRA with ensure_weight_tying on {', '.join(config.target_modules_to_tie)} (adapter {adapter!r})",
            "PEFT ties the adapters by shared memory, which does not last and which the optimizer changes twice",
            "Target one of the tied layers alone, train the full model, or set l2sp_lambda=0.",
        )


def _check_wrapper(path: str, wrapper: Any) -> None:
    kind = type(wrapper).__name__
    if kind not in ("ModulesToSaveWrapper", "TrainableTokensWrapper"):
        raise _refusal(f"{kind} ({path})", "it is not known what it does to the weights")
    if kind == "ModulesToSaveWrapper" and any(map(is_tuner_layer, wrapper.modules())):
        raise _refusal(
            f"adapters inside of modules_to_save ({path})",
            "both change the same weight",
            "Leave the module out of one of target_modules and modules_to_save.",
        )


def _check_layer(path: str, layer: Any) -> None:
    kind, source = type(layer).__name__, type(layer).__module__
    if source.startswith("peft.tuners.trainable_tokens."):
        if layer.merged:
            raise merged_error(path)
        return
    if is_tuner_layer(layer.base_layer):
        raise _refusal(f"several adapters of different kinds on one layer ({path})", "their changes depend on another")
    if not source.startswith("peft.tuners.lora.") or kind not in _PLAIN_LAYERS:
        unknown = (f"the adapter layer {source}.{kind}", _NO_PRODUCT, _CURE)
        what, why, cure = _OTHER_LAYERS.get(kind, unknown) if source.startswith("peft.tuners.lora.") else unknown
        raise _refusal(f"{what} ({path})", why, cure)
    _check_variants(path, layer)
    base = layer.get_base_layer()
    if isinstance(base, nn.modules.conv._ConvNd) and (
        base.groups > 1 or any(step != 1 for step in base.dilation) or base.padding_mode != "zeros"
    ):
        raise _refusal(
            f"LoRA on a convolution with groups, dilation or a padding mode ({path})",
            "PEFT's adapter then is no change of its weight",
            "Leave it out of target_modules, train the full model, or set l2sp_lambda=0.",
        )
    if layer.merged:
        raise merged_error(path)
    for part, both in (("weight", True), ("bias", any(getattr(layer, "lora_bias", {}).values()))):
        parameter = getattr(base, part, None)
        if both and getattr(parameter, "requires_grad", False):
            raise _refusal(
                f"LoRA on a {part} that is trained itself, too ({path})",
                "their changes add up",
                f"Freeze the {part} of the base layer, or do not adapt it.",
            )


def _check_variants(path: str, layer: Any) -> None:
    for adapter, variant in getattr(layer, "lora_variant", {}).items():
        kind = type(variant).__name__
        if kind not in _PLAIN_VARIANTS:
            named = next((names for prefix, names in _VARIANTS.items() if kind.startswith(prefix)), None)
            name, why = named or (kind, _NO_PRODUCT)
            raise _refusal(f"{name} (adapter {adapter!r}, {path})", why)
    for adapter, dora in getattr(layer, "use_dora", {}).items():  # the only sign of it before PEFT 0.16
        if dora:
            name, why = _VARIANTS["Dora"]
            raise _refusal(f"{name} (adapter {adapter!r}, {path})", why)
