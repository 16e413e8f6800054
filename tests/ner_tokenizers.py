"""Small tokenizers of every family, trained on the spot, and random sentences that are hard on them."""

from __future__ import annotations

import random
from collections.abc import Callable

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the patient was given aspirin (100 mg) in the morning and a second dose in the evening",
    "New York City (NYC) is in the state of New York; it's a big city, isn't it?",
    "café naïve über in a b the patient e\u0301te\u0301 我住在北京 👩‍⚕️",
] * 10
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _train(tokenizer, trainers.WordPieceTrainer(vocab_size=160, special_tokens=SPECIAL, show_progress=False))
    return _framed(tokenizer, "<s> $A </s>")


def _train(tokenizer: Tokenizer, trainer: trainers.Trainer) -> None:
    tokenizer.train_from_iterator(CORPUS, trainer)


def _framed(tokenizer: Tokenizer, template: str) -> Tokenizer:
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, pair="$A $B", special_tokens=ids)
    return tokenizer


def _bytes(pre_tokenizer: pre_tokenizers.PreTokenizer, template: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"initial_alphabet": alphabet, "special_tokens": SPECIAL, "show_progress": False}
    _train(tokenizer, trainers.BpeTrainer(vocab_size=330, **settings))
    return _framed(tokenizer, template)


def _gpt2() -> Tokenizer:
    return _bytes(pre_tokenizers.ByteLevel(add_prefix_space=False), "$A </s>")


def _llama3() -> Tokenizer:
    """As Llama 3 and Qwen: the splitting is done by an expression before, so that ByteLevel cannot add the space."""
    words = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _bytes(pre_tokenizers.Sequence([words, last]), "<s> $A")


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    settings = {"special_tokens": SPECIAL, "unk_token": "<unk>", "show_progress": False}
    _train(tokenizer, trainers.UnigramTrainer(vocab_size=120, **settings))
    return _framed(tokenizer, "<s> $A </s>")


def _bare() -> Tokenizer:
    """SentencePiece that puts no space before the first word, as Gemma's; no special tokens around a sentence."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    _train(tokenizer, trainers.BpeTrainer(vocab_size=160, special_tokens=SPECIAL, show_progress=False))
    return tokenizer


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "wordpiece": _wordpiece,
    "gpt2": _gpt2,
    "llama3": _llama3,
    "unigram": _unigram,
    "bare": _bare,
}


def make_tokenizer(family: str, **settings: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer of transformers, as it comes: not yet made ready for lists of words."""
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=FAMILIES[family](), **names, **settings)


# --------------------------------------------------------------------------- sentences

WORDS = (
    *(
        "the",
        "patient",
        "New",
        "York",
        "aspirin",
        "100",
        "mg",
        ",",
        ".",
        "(",
        "((a)-[b]).",
        "isn't",
        "e\u0301te\u0301",
    ),
    *(
        "我",
        "北京",
        "👩‍⚕️",
        "👍🏽",
        "हिन्दी",
        "می‌خواهم",
        "<s>",
        "</s>",
        "a b",
        "x" * 60,
        "9" * 35,
        "ß",
        "ﬁ",
        "\u00ad",
        "`",
    ),
    *("", " ", "\u200b", "\u0301", "\u00a0", "\x01"),  # of these, some tokenizers make nothing
)


def random_sentence(rng: random.Random, n_words: int) -> tuple[list[str], list[str]]:
    """Words and valid IOB2 tags; about half of the words are within entities of up to 6 words."""
    words = [rng.choice(WORDS) if rng.random() < 0.8 else rng.choice(WORDS[:12]) for _ in range(n_words)]
    words[rng.randrange(n_words)] = "patient"  # never a sentence without any word
    tags: list[str] = []
    while len(tags) < n_words:
        length, kind = rng.randint(1, 6), rng.choice(["A", "B-c"])
        tags += rng.choice([["O"] * length, [f"B-{kind}", *[f"I-{kind}"] * (length - 1)]])
    return words, tags[:n_words]
