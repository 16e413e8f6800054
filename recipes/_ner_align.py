"""Words of a sentence and sub-words of a tokenizer: labels put on sub-words, predictions taken back to words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
from _ner_data import NerDataArguments, NerSplit
from _ner_windows import assign_words, plan_windows
from _recipe_args import RecipeError
from tokenizers import normalizers, pre_tokenizers

from hf_l2sp.entity_scores import IGNORED

# Two common words in a row: their tokens show whether a tokenizer knows that a word begins.
_PROBES = (["in", "the"], ["the", "patient"], ["a", "b"])


# --------------------------------------------------------------------------- the tokenizer


def prepare_tokenizer(tokenizer: Any) -> None:
    """Makes `tokenizer` treat the words of a list as it treats the words of a text, in place; twice is once.

    WordPiece and SentencePiece do already. Byte-level BPE (RoBERTa, GPT-2, Llama 3, Qwen) and some others see the
    start of a word by the space before it, which a list of words lacks: they are made to put one there, also before
    the first word of a text.

    Raises:
        RecipeError: it is no fast tokenizer, so that nothing tells which word a sub-word is of.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise RecipeError(
            f"{type(tokenizer).__name__} is no fast tokenizer, and only these know which word a sub-word is of; take "
            "a model that has one (a tokenizer.json, or files that transformers can convert)."
        )
    backend = tokenizer.backend_tokenizer
    if not _knows_words(backend):
        state = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer is not None else {}
        if state.get("type") == "ByteLevel":
            state = {**state, "add_prefix_space": True}
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(
                add_prefix_space=True, trim_offsets=state["trim_offsets"], use_regex=state["use_regex"]
            )
        else:
            present = [backend.normalizer] if backend.normalizer is not None else []
            backend.normalizer = normalizers.Sequence([normalizers.Prepend(" "), *present])
        # So that it is saved, and because transformers 4 refuses lists of words without it.
        tokenizer.init_kwargs["add_prefix_space"] = True
        tokenizer.add_prefix_space = True


def _knows_words(backend: Any) -> bool:
    def ids(words: Any, split: bool) -> list[int]:
        return backend.encode(words, is_pretokenized=split, add_special_tokens=False).ids

    # One is enough: a tokenizer may have a token that spans the two words of another.
    return any(ids(words, True) == ids(" ".join(words), False) for words in _PROBES)


# --------------------------------------------------------------------------- words to sub-words


@dataclass
class Placement:
    """The words of a sentence that one row of the dataset answers for.

    Attributes:
        sentence: Index of the sentence.
        words: Indices of the words in the sentence, ascending.
        positions: Where in the row, without padding, the first sub-word of each is.
    """

    sentence: int
    words: list[int]
    positions: list[int]


@dataclass
class Encoded:
    """Sentences as rows of sub-words.

    Attributes:
        columns: Model inputs, and `labels` where there were tags: one list of integers per row.
        placements: Which words each row answers for. Every word that has a sub-word is in exactly one.
        split: How many sentences did not fit into one row.
        cut: How many times an entity did not either.
        unseen: How many words with an entity tag have no sub-word.
    """

    columns: dict[str, list[list[int]]] = field(default_factory=dict)
    placements: list[Placement] = field(default_factory=list)
    split: int = 0
    cut: int = 0
    unseen: int = 0


def encode(
    sentences: Sequence[Sequence[str]],
    tags: Sequence[Sequence[str]] | None,
    tokenizer: Any,
    names: Sequence[str] = (),
    *,
    max_length: int,
    stride: int,
    whole_entities: bool = False,
    label_all_tokens: bool = False,
) -> Encoded:
    """Sub-words, and labels on the first sub-word of each word, of sentences of any length.

    A sentence that is too long is split into overlapping windows. Every word has its label in the window where it has
    the most context and is context alone in the others, so it counts once in the loss and has one prediction. A word
    that the tokenizer makes nothing of has no label, and those after it keep theirs. A single word that is longer than
    a window is cut to one.

    Args:
        sentences: Words of each sentence.
        tags: IOB2 tag of each word; without them there are no labels.
        tokenizer: A fast tokenizer, made ready by `prepare_tokenizer`.
        names: The tags in the order of their label ids.
        max_length: Sub-words per row, special ones included.
        stride: Sub-words that two windows have in common, at most.
        whole_entities: For training: no window begins or ends within an entity, if that is no longer than a window.
            Not for evaluation, where the windows may not depend on the tags.
        label_all_tokens: Label the other sub-words of a word too, with `I-` of its type, instead of -100.

    Raises:
        RecipeError: `max_length` leaves no room for a word beside `stride`.
    """
    capacity = max_length - tokenizer.num_special_tokens_to_add(pair=False)
    if not 0 <= stride < capacity:
        raise RecipeError(
            f"--max_seq_length {max_length} leaves room for {max(0, capacity)} sub-words beside the special ones; it "
            f"must be room for more than --stride {stride}."
        )
    ids = {name: index for index, name in enumerate(names)}
    result = Encoded()
    whole = tokenizer([list(words) for words in sentences], is_split_into_words=True, verbose=False)
    for number, words in enumerate(sentences):
        word_ids = whole.word_ids(number)
        row = {name: values[number] for name, values in whole.items()}
        present = Counter(word_ids)
        counts = [min(present[word], capacity) for word in range(len(words))]
        own = None if tags is None else tags[number]
        breaks = [not tag.startswith("I-") for tag in own] if own is not None and whole_entities else None
        windows = plan_windows(counts, capacity, stride, breaks)
        answering = assign_words(counts, windows, breaks)
        result.split += len(windows) > 1
        if breaks is not None:
            result.cut += sum(not breaks[end] for _, end in windows[:-1])
        if own is not None:
            result.unseen += sum(tag != "O" and not count for tag, count in zip(own, counts, strict=True))
        for index, (first, end) in enumerate(windows):
            if len(word_ids) > max_length:
                window = [list(words[first:end])]
                part = tokenizer(window, is_split_into_words=True, truncation=True, max_length=max_length)
                row = {name: values[0] for name, values in part.items()}
                here = [None if word is None else first + word for word in part.word_ids(0)]
            else:
                here = word_ids
            here = [word if word is not None and answering[word] == index else None for word in here]
            starts = [at for at, word in enumerate(here) if word is not None and (at == 0 or here[at - 1] != word)]
            if not starts:
                continue  # no word in it, or all of them are better off in other windows: a row without any label
            result.placements.append(Placement(number, [here[at] for at in starts], starts))
            if own is not None:
                row = {**row, "labels": _labels(here, set(starts), own, ids, label_all_tokens)}
            for name, values in row.items():
                result.columns.setdefault(name, []).append(values)
    return result


def _labels(
    words: Sequence[int | None], starts: set[int], tags: Sequence[str], ids: dict[str, int], label_all_tokens: bool
) -> list[int]:
    """The label ids of a row, whose sub-words are of `words` (`None`: one without label)."""
    labels = []
    for position, word in enumerate(words):
        if word is None or not (position in starts or label_all_tokens):
            labels.append(IGNORED)
        elif position in starts or tags[word] == "O":
            labels.append(ids[tags[word]])
        else:
            labels.append(ids[f"I-{tags[word][2:]}"])
    return labels


# --------------------------------------------------------------------------- and back


def to_words(
    placements: Sequence[Placement], lengths: Sequence[int], values: Sequence[Sequence[Any]], shifts: Sequence[int]
) -> list[list[Any]]:
    """What rows of sub-words hold for the words of each sentence; `None` for a word without sub-word.

    Args:
        placements: Which words each row answers for.
        lengths: Number of words of each sentence.
        values: One value per sub-word of each row, padding included.
        shifts: How many paddings are before each row.
    """
    found: list[list[Any]] = [[None] * length for length in lengths]
    for placement, row, shift in zip(placements, values, shifts, strict=True):
        for word, position in zip(placement.words, placement.positions, strict=True):
            found[placement.sentence][word] = row[position + shift]
    return found


# --------------------------------------------------------------------------- the splits of a recipe


def tokenize_ner(
    splits: dict[str, NerSplit], names: list[str], tokenizer: Any, data: NerDataArguments
) -> tuple[datasets.DatasetDict, dict[str, Encoded], list[str]]:
    """The splits as datasets of sub-words and labels, how their words are placed, and notes about what was done.

    Raises:
        RecipeError: the tokenizer makes nothing of a split, or its windows have no room.
    """
    tokenized, encoded, notes = {}, {}, []
    for split, part in splits.items():
        training = split == "train"
        result = encode(
            part.tokens,
            part.tags,
            tokenizer,
            names,
            max_length=data.max_seq_length,
            stride=data.stride,
            whole_entities=training,
            label_all_tokens=training and data.label_all_tokens,
        )
        if not result.placements:
            raise RecipeError(f"{part.source}: the tokenizer makes nothing of any word in it; is it of the language?")
        tokenized[split], encoded[split] = datasets.Dataset.from_dict(result.columns), result
        if result.split:
            notes.append(
                f"{result.split} of {len(part)} {split} sentences are longer than --max_seq_length "
                f"{data.max_seq_length} sub-words; they are read in windows."
            )
        if result.cut:
            notes.append(f"{result.cut} times a {split} entity is longer than a window and is cut.")
        if result.unseen:
            notes.append(f"The tokenizer makes nothing of {result.unseen} words in {split} entities.")
    return datasets.DatasetDict(tokenized), encoded, notes
