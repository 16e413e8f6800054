"""Words of a text replaced by others that a masked language model finds likely there."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import nn

from .traceless import evaluated
from .word_edits import Word, is_word, keep_case, share_of, text_of
from .word_synonyms import forked

_NO_LIMIT = 10**9  # tokenizers that know no maximal length give one that is too large for their backend


@dataclass
class _Masked:
    """A text with some words masked, ready for the model."""

    row: int
    ids: list[int]
    positions: list[int]  # of the masks
    words: list[int]  # masked there
    pieces: list[list[int]]  # their tokens


def check_masked_lm(model: Any, tokenizer: Any) -> None:
    """Raises `ValueError` for what cannot predict masked words."""
    if model is None or tokenizer is None:
        raise ValueError(
            "'mask' needs a masked language model and its tokenizer: "
            "model=AutoModelForMaskedLM.from_pretrained(NAME), tokenizer=AutoTokenizer.from_pretrained(NAME)."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"'mask' needs a fast tokenizer, which tells where in the text a token comes from; "
            f"{type(tokenizer).__name__} is not one. Load it with AutoTokenizer.from_pretrained(NAME, use_fast=True)."
        )
    if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no mask or padding token, so its model was not trained to predict "
            "masked words. Take a masked language model (BERT, RoBERTa, ...) and its tokenizer."
        )
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no language modeling head. Load the model with AutoModelForMaskedLM."
        )
    if head.weight.shape[0] < len(tokenizer):
        raise ValueError(
            f"The model predicts {head.weight.shape[0]} tokens and the tokenizer has {len(tokenizer)}: they do not "
            "belong together. Load both from the same name."
        )


def substitute(
    rows: Sequence[Sequence[Word]],
    rngs: Sequence[Random],
    *,
    strength: float,
    model: nn.Module,
    tokenizer: Any,
    top_k: int,
    batch_size: int,
) -> list[list[Word] | None]:
    """Replaces some free words of every row; `None` for a row where none could be.

    All drawn words of a row are masked at once, each by a single mask, and predicted in one forward pass.

    Args:
        rows: Texts as words.
        rngs: One for every row.
        strength: Share of the words that can be masked to mask, at least one.
        model: Masked language model; runs in evaluation mode on its own device.
        tokenizer: Its fast tokenizer.
        top_k: How many of the likeliest tokens the replacement is drawn from.
        batch_size: Rows in a forward pass.
    """
    # With the space the first word is encoded as any other one.
    texts = [" " + text_of(words) for words in rows]
    limit = _longest(model, tokenizer)
    encoded = _call(tokenizer, texts, truncation=True, max_length=limit, return_offsets_mapping=True)
    masked = []
    for row, words in enumerate(rows):
        pieces = _pieces(words, texts[row], encoded["offset_mapping"][row])
        drawn = _drawn(words, pieces, strength, rngs[row])
        if drawn:
            masked.append(_mask(row, encoded["input_ids"][row], drawn, pieces, tokenizer.mask_token_id))
    results: list[list[Word] | None] = [None] * len(rows)
    masked.sort(key=lambda one: len(one.ids))  # little padding
    for start in range(0, len(masked), batch_size):
        chunk = masked[start : start + batch_size]
        predicted = _predict(chunk, model, tokenizer, top_k)
        whole = _whole_words({token for one in predicted for likely in one for token in likely}, tokenizer)
        for one, likely_tokens in zip(chunk, predicted, strict=True):
            results[one.row] = _replaced(rows[one.row], one, likely_tokens, whole, rngs[one.row])
    return results


def _call(tokenizer: Any, texts: list[str], **options: Any) -> Any:
    """What the tokenizer makes of the texts; its own settings of truncation and padding are afterwards as before."""
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    encoded = tokenizer(texts, **options)
    # `datasets` would take the tokenizer for another one and miss its cache.
    backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
    backend.enable_padding(**padding) if padding else backend.no_padding()
    return encoded


def _longest(model: Any, tokenizer: Any) -> int:
    """The most tokens that the model takes, as far as its configuration and tokenizer tell."""
    said, positions = tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", _NO_LIMIT)
    # Positions of RoBERTa start at 2, which its tokenizer knows.
    return min(said if said <= positions else positions - 2, _NO_LIMIT)


def _pieces(words: Sequence[Word], text: str, offsets: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    """The tokens of every free word of letters that consists of whole tokens, within the part that fits the model."""
    spans, at = [], 1
    for word in words:
        start = at + len(word.gap) + len(word.left)
        spans.append((start, start + len(word.core)))
        at = spans[-1][1] + len(word.right)
    starts = [start for start, _ in spans]
    pieces: dict[int, list[int]] = {}
    reached: dict[int, list[int]] = {}
    broken = set()
    for token, (start, end) in enumerate(offsets):
        start = end - len(text[start:end].lstrip())  # some tokenizers count the space before
        index = bisect_right(starts, end - 1) - 1 if end > start else -1
        if index < 0 or start >= spans[index][1]:  # special tokens, punctuation
            continue
        if start < spans[index][0] or end > spans[index][1]:
            broken.add(index)
        pieces.setdefault(index, []).append(token)
        reached.setdefault(index, []).extend((start, end))
    return {
        index: tokens
        for index, tokens in pieces.items()
        if words[index].free
        and words[index].core.isalpha()
        and index not in broken
        and (min(reached[index]), max(reached[index])) == spans[index]
    }


def _drawn(words: Sequence[Word], pieces: dict[int, list[int]], strength: float, rng: Random) -> list[int]:
    # A word stays, which the others can be predicted from.
    most = min(len(pieces), sum(is_word(word.core) for word in words) - 1)
    if most < 1:
        return []
    return sorted(rng.sample(sorted(pieces), min(most, share_of(strength, len(pieces)))))


def _mask(row: int, ids: Sequence[int], drawn: list[int], pieces: dict[int, list[int]], mask: int) -> _Masked:
    first = {pieces[index][0]: index for index in drawn}
    gone = {token for index in drawn for token in pieces[index][1:]}
    masked = _Masked(row, [], [], drawn, [[ids[token] for token in pieces[index]] for index in drawn])
    for token, value in enumerate(ids):
        if token in gone:
            continue
        if token in first:
            masked.positions.append(len(masked.ids))
        masked.ids.append(mask if token in first else value)
    return masked


def _predict(chunk: Sequence[_Masked], model: nn.Module, tokenizer: Any, top_k: int) -> list[list[dict[int, float]]]:
    """The likeliest ordinary tokens at every mask, with their logits."""
    device = next(model.parameters()).device
    shape = len(chunk), max(len(one.ids) for one in chunk)
    ids = torch.full(shape, tokenizer.pad_token_id)
    attended = torch.zeros(shape, dtype=torch.long)
    for i, one in enumerate(chunk):
        ids[i, : len(one.ids)] = torch.tensor(one.ids)
        attended[i, : len(one.ids)] = 1
    where = [(i, at) for i, one in enumerate(chunk) for at in one.positions]
    threads = torch.get_num_threads()
    try:
        if forked():
            torch.set_num_threads(1)  # those of the parent are not there, and OpenMP would wait for them for ever
        # Not inference mode: what a model keeps for later could not be trained with.
        with torch.no_grad(), evaluated(model):
            logits = model(input_ids=ids.to(device), attention_mask=attended.to(device)).logits
            rows, columns = (torch.tensor(numbers, device=device) for numbers in zip(*where, strict=True))
            logits = logits[rows, columns, : len(tokenizer)].float()
            logits[:, torch.tensor(tokenizer.all_special_ids, device=device)] = -math.inf
            values, tokens = logits.topk(min(top_k, logits.shape[-1]))
    finally:
        if forked():
            torch.set_num_threads(threads)
    likely = [dict(zip(t, v, strict=True)) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]
    grouped: list[list[dict[int, float]]] = [[] for _ in chunk]
    for (index, _), candidates in zip(where, likely, strict=True):
        grouped[index].append(candidates)
    return grouped


def _whole_words(tokens: set[int], tokenizer: Any) -> dict[int, str]:
    """Those of the tokens that are a word of letters by themselves, as the tokenizer would encode it after a space."""
    ordered = sorted(tokens)
    words = [tokenizer.decode([token]).strip() for token in ordered]
    alone = _call(tokenizer, [" " + word for word in words], add_special_tokens=False)["input_ids"] if words else []
    return {t: word for t, word, ids in zip(ordered, words, alone, strict=True) if word.isalpha() and ids == [t]}


def _replaced(
    words: Sequence[Word], masked: _Masked, predicted: list[dict[int, float]], whole: dict[int, str], rng: Random
) -> list[Word] | None:
    edited, changed = list(words), False
    for index, pieces, likely in zip(masked.words, masked.pieces, predicted, strict=True):
        key, old = rng.getrandbits(64), words[index].core
        best = -math.inf
        for token, logit in likely.items():
            # Without accents or capitals it may be the same word: then its only token is.
            if token not in whole or [token] == pieces or whole[token].casefold() == old.casefold():
                continue
            # The largest of logit + Gumbel noise is a draw from the softmax. With noise that belongs to the token,
            # rounding that differs with the batch changes the draw only where two tokens are as good as equal.
            score = logit - math.log(-math.log(Random(f"{key} {token}").random() or 0.5))
            if score > best:
                best, new = score, keep_case(whole[token], old)
        if best > -math.inf:
            edited[index] = edited[index]._replace(core=new)
            changed = True
    return edited if changed else None
