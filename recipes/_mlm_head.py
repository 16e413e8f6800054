"""The model for masked language modelling, and the warm-up of a head that was never trained.

Models that were trained further for sentences or classes have often lost their language-modelling head:
all-MiniLM-L6-v2 has the embeddings, to which the head's output matrix is tied, but not the head's transformation and
its bias. A random head makes perplexities meaningless, and its gradients tear at the body. The warm-up trains what the
model's files lack and nothing else: the body is frozen, and with it a tied output matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from _mlm_masking import MaskedRows
from _mlm_sparse import predict_masked_only
from _recipe_args import RecipeError
from _recipe_files import listed
from _recipe_model import ModelSource, load_model, quiet_loading
from torch import Tensor
from tqdm.auto import tqdm
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModel, AutoModelForMaskedLM, PretrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_l2sp.provenance import examine

# Chosen on embedded and on biomedical text.
LEARNING_RATE = 5e-3
RISING = 0.1  # share of the steps in which the learning rate rises
BATCH = 16


def check_masked_lm(source: ModelSource, config: PretrainedConfig, tokenizer: Any = None) -> None:
    """Raises `RecipeError` for a model, or its tokenizer, that cannot predict masked words."""
    name = f"{source.flag} {source.shown!r}"
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise RecipeError(
            f"{name} is a {config.model_type!r} model, which has no head for masked words; give an encoder such as "
            "BERT, RoBERTa or ModernBERT."
        )
    if tokenizer is None:
        return
    if tokenizer.mask_token_id is None:
        raise RecipeError(
            f"{name}: its tokenizer has no mask token, so the model was not made to predict masked words; give an "
            "encoder such as BERT, RoBERTa or ModernBERT."
        )
    if not tokenizer.is_fast:
        raise RecipeError(
            f"{name}: its tokenizer does not tell which tokens make a word; give a model with a fast tokenizer (a "
            "tokenizer.json)."
        )


def load_masked_lm(source: ModelSource, config: PretrainedConfig, head: Mapping[str, Tensor] | None = None) -> Any:
    """The pretrained model with its head, into which `head` is copied, and with the pooler of its files.

    Models for masked words are made without the pooler on which classifiers of BERT's family are built. It is kept
    here as it is, so that the adapted folder has what the general one has: in buffers, which are saved and loaded as
    parameters are, but are none, neither for the optimizer nor for L2-SP.
    """
    model = load_model(AutoModelForMaskedLM, source, config)
    body = model.base_model
    if getattr(body, "pooler", body) is None:
        with quiet_loading():
            whole, loading = AutoModel.from_pretrained(source.path, config=config, output_loading_info=True)
        pooler = getattr(whole, "pooler", None)
        if pooler is not None and not any(name.startswith("pooler.") for name in loading["missing_keys"]):
            for module in pooler.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    delattr(module, name)
                    module.register_buffer(name, parameter.detach())
            body.pooler = pooler
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in (head or {}).items():
            parameters[name].copy_(value)
    return model


def untrained_head(model: Any, source: ModelSource) -> list[str]:
    """Names of the parameters that the model's files lack: those that L2-SP takes for new and never pulls.

    Raises:
        RecipeError: they lack some of its body too.
    """
    new = sorted(examine(model).new)
    body = [name for name in new if name.startswith(f"{model.base_model_prefix}.")]
    if body:
        raise RecipeError(
            f"{source.flag} {source.shown!r} lacks weights of its body: {listed(body, 3)}. Masked words would adapt a "
            "partly random model; give the folder of a whole pretrained one."
        )
    return new


def check_warm_up(untrained: Sequence[str], steps: int, source: ModelSource) -> None:
    """Raises `RecipeError` for a head that needs a warm-up and cannot have it."""
    if not untrained:
        return
    name = (
        f"{source.flag} {source.shown!r} has no trained head for masked words (its files lack {listed(untrained, 3)})"
    )
    if steps == 0:
        raise RecipeError(
            f"{name}, so --head_warmup_steps 0 would start from random guesses; leave the argument out for the "
            "default, or give a model that was pretrained on masked words."
        )
    if is_deepspeed_zero3_enabled():
        raise RecipeError(
            f"{name}, and ZeRO-3 gives no process the whole of it to train it alone; launch with another "
            "configuration (zero2, ddp), or give a model that was pretrained on masked words."
        )


def warm_up(
    model: Any,
    names: Sequence[str],
    parts: Sequence[MaskedRows],
    collate: Callable[[list[Any]], dict[str, Tensor]],
    *,
    steps: int,
    seed: int,
    device: torch.device,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Trains the parameters `names` of a model that is not used afterwards; their values, the same for the same seed.

    Args:
        model: The pretrained model with an untrained head.
        names: Parameters to train; all others are frozen.
        parts: Texts, of which every batch has the same share.
        collate: Makes a batch of rows.
        steps: Optimizer steps.
        seed: Of the order of the rows.
        device: Where to compute.
        progress: Whether to show a bar.
    """
    # Without dropout, as the head sees the body in use, and in float32, whatever the files are in.
    model = model.float().to(device).eval()
    predict_masked_only(model)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    trained = [parameters[name] for name in names]
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if any(bias is parameter for parameter in trained):
        # A head that knows nothing else begins with how frequent words are; to learn that takes hundreds of steps.
        bias.data.copy_(_log_frequencies(parts, len(bias)))
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    rising = max(1, round(RISING * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, (steps - step) / max(1, steps - rising + 1))
    )
    batches = zip(
        *(_batches(part, BATCH // len(parts), seed + index) for index, part in enumerate(parts)), strict=True
    )
    bar = tqdm(range(steps), desc="Warm-up of the head", disable=not progress, leave=False)
    for _, rows in zip(bar, batches, strict=False):
        batch = collate([row for share in rows for row in share])
        loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: parameters[name].detach().cpu().clone() for name in names}


def _log_frequencies(parts: Sequence[MaskedRows], size: int) -> Tensor:
    """Logarithm of how often each token comes in the first rows of each part, less its mean. Shape: [size]."""
    counts = torch.ones(size)
    for part in parts:
        ids = numpy.concatenate(part.rows[:2000]["input_ids"])
        counts += torch.bincount(torch.as_tensor(ids, dtype=torch.long), minlength=size)
    return counts.log() - counts.log().mean()


def _batches(rows: MaskedRows, size: int, seed: int) -> Iterator[list[Any]]:
    """Batches without end, in an order by seed; in each pass all rows once, masked anew."""
    random = numpy.random.default_rng(seed)
    waiting: list[int] = []
    epoch = -1
    while True:
        batch = []
        while len(batch) < size:
            if not waiting:
                epoch += 1
                rows.epoch.fill_(epoch)
                waiting = random.permutation(len(rows)).tolist()
            batch.append(rows[waiting.pop()])
        yield batch
