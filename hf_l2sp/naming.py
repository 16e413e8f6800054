"""Names and modes of a model that do not depend on how it is wrapped."""

from __future__ import annotations

from collections.abc import Iterator

from accelerate.utils import extract_model_from_parallel
from torch import nn

# Wrappers that put their own attribute between a module and its parent.
_WRAPPER_PARTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def unwrap(model: nn.Module) -> nn.Module:
    """The bare model inside DistributedDataParallel, DataParallel or torch.compile wrappers."""
    while True:
        inner = extract_model_from_parallel(model, keep_torch_compile=False)
        inner = getattr(inner, "_orig_mod", inner)
        if inner is model:
            return inner
        model = inner


def without_adapters(model: nn.Module) -> nn.Module:
    """The model of transformers inside a bare model of PEFT; any other as it is."""
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inner


def in_training_mode(model: nn.Module) -> bool:
    """Whether the bare model trains: DeepSpeed's engine hands `eval()` on to it, but says itself that it trains."""
    return unwrap(model).training


def canonical_name(name: str) -> str:
    """The parameter's name in the bare model: without the parts that compile and checkpoint wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def named_float_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Floating-point parameters of the bare model by canonical name; tied ones once, under their first name."""
    for name, parameter in unwrap(model).named_parameters():
        if parameter.is_floating_point():
            yield canonical_name(name), parameter
