"""Words replaced by a masked language model: which, by which, and that the model is left as it was."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

import datasets
import pytest
import torch
from datasets.fingerprint import Hasher
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    set_seed,
)

from hf_l2sp.augment import Augmenter, augment_dataset
from hf_l2sp.word_edits import words_of_text
from hf_l2sp.word_prediction import _longest, substitute
from hf_l2sp.word_synonyms import forked

from .augmentation import PIECES, SPECIAL, TEXTS, VOCAB, copies_of, favour, make_bert_tokenizer, make_masked_lm, words


@pytest.fixture(scope="module")
def bert_tokenizer(tmp_path_factory):
    return make_bert_tokenizer(tmp_path_factory.mktemp("vocab"))


@pytest.fixture
def bert_mlm():
    return make_masked_lm()


def masked(text, model, tokenizer, **options):
    return copies_of(text, ["mask"], model=model, tokenizer=tokenizer, **options)


def test_draws_follow_the_models_probabilities(bert_mlm, bert_tokenizer):
    """Only "good" can be masked: the others are no words of letters. 2000 draws against the softmax of the top 6."""
    favour(bert_mlm, good=9.0, cat=1.0, dog=2.0, mat=1.5, bad=1.0, fine=0.5)
    row = words_of_text("12 good , 12 .")
    rngs = [random.Random(n) for n in range(2000)]
    options = dict(strength=1.0, model=bert_mlm, tokenizer=bert_tokenizer, top_k=6, batch_size=500)
    drawn = Counter(result[1].core for result in substitute([row] * 2000, rngs, **options))
    ids = [VOCAB.index(token) for token in ("[CLS]", "12", "[MASK]", ",", "12", ".", "[SEP]")]
    logits = bert_mlm.eval()(torch.tensor([ids])).logits[0, 2].double()
    logits[: len(SPECIAL)] = -torch.inf
    logits[len(VOCAB) :] = -torch.inf
    top = [VOCAB[i] for i in logits.topk(6).indices if VOCAB[i].isalpha() and VOCAB[i] != "good"]
    expected = torch.softmax(logits[[VOCAB.index(word) for word in top]], 0)
    assert set(drawn) == set(top) and len(top) == 5
    for word, probability in zip(top, expected.tolist(), strict=True):
        assert abs(drawn[word] / 2000 - probability) < 0.04, word


def test_only_other_whole_words_are_put_in(bert_mlm, bert_tokenizer):
    favour(
        bert_mlm, **dict.fromkeys(("[CLS]", "[UNK]", "[MASK]", "##ing", "##ed", "12", "."), 20.0), cat=3.0, cafe=3.0
    )
    with torch.no_grad():
        bert_mlm.cls.predictions.bias[len(VOCAB) :] = 30.0
    for text in ("Cat 12 12", "Café 12 12", "CAT 12 12"):
        made = masked(text, bert_mlm, bert_tokenizer, copies=20, top_k=len(VOCAB))
        assert len(made) > 2
        for copy in made:
            assert copy.endswith(" 12 12")
            new = words(copy)[0]
            assert new.isalpha() and new.lower() in PIECES
            assert new.lower() != ("cafe" if "é" in text else "cat")  # which the tokenizer makes of "Café"
            assert new == (new.upper() if text.startswith("CAT") else new.capitalize())


def test_words_of_several_tokens_are_replaced_as_one(bert_mlm, bert_tokenizer):
    favour(bert_mlm, mouse=50.0)
    assert masked('12 ("playing") 12', bert_mlm, bert_tokenizer) == ['12 ("mouse") 12']


def test_what_lies_beyond_the_models_reach_stays(bert_mlm, bert_tokenizer):
    favour(bert_mlm, mouse=50.0)
    text = " ".join(["playing"] + ["cat", "dog"] * 20)
    (copy,) = masked(text, bert_mlm, bert_tokenizer, strength=1.0)
    # 16 positions: [CLS], two tokens of the first word, 12 words, [SEP].
    assert words(copy) == ["mouse"] * 13 + words(text)[13:]


def test_strength_and_the_last_word(bert_mlm, bert_tokenizer):
    favour(bert_mlm, mouse=50.0)
    made = masked("the cat sat on a mat under a house good", bert_mlm, bert_tokenizer, copies=3, strength=0.3)
    assert [words(copy).count("mouse") for copy in made] == [3, 3, 3]
    assert masked("cat", bert_mlm, bert_tokenizer) == []
    made = masked("cat dog", bert_mlm, bert_tokenizer, copies=5, strength=1.0)
    assert sorted(made) == ["cat mouse", "mouse dog"]


def test_masked_model_is_left_as_it_was(bert_mlm, bert_tokenizer):
    """Evaluation mode inside (dropout would show), the user's modes and random numbers afterwards."""
    bert_mlm.bert.pooler = None
    bert_mlm.bert.embeddings.eval()
    modes = [module.training for module in bert_mlm.modules()]
    state = torch.get_rng_state()
    augmenter = Augmenter(["mask"], copies=2, strength=0.5, model=bert_mlm, tokenizer=bert_tokenizer)
    before = Hasher.hash(augmenter)
    first = augmenter({"text": TEXTS})
    assert first == augmenter({"text": TEXTS})
    assert [module.training for module in bert_mlm.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in bert_mlm.parameters())
    assert Hasher.hash(augmenter) == before


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 2, "num_proc": 2}])
def test_batches_and_processes_change_nothing_with_a_model(bert_mlm, bert_tokenizer, options):
    rng = random.Random(8)
    plain = [word for word in PIECES if word.isalpha()]
    rows = [" ".join(rng.choices(plain, k=rng.randrange(1, 12))) for _ in range(30)]
    data = datasets.Dataset.from_dict({"text": rows})
    one = Augmenter(["mask", "swap"], copies=2, strength=0.3, model=bert_mlm, tokenizer=bert_tokenizer)
    other = Augmenter(["mask", "swap"], copies=2, strength=0.3, model=bert_mlm, tokenizer=bert_tokenizer, batch_size=3)
    expected = augment_dataset(data, one)[:]
    assert len(expected["text"]) > 80
    assert augment_dataset(data, other, **options)[:] == expected


def test_the_tokenizers_settings_are_left_as_they_were(bert_mlm, tmp_path):
    tokenizer = make_bert_tokenizer(tmp_path)
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(3, stride=1, direction="left")
    backend.enable_padding(length=9, pad_id=2, pad_token="[CLS]")
    before = backend.truncation, backend.padding
    made = masked(TEXTS[0], bert_mlm, tokenizer, strength=1.0)
    assert (backend.truncation, backend.padding) == before
    assert made == masked(TEXTS[0], bert_mlm, make_bert_tokenizer(tmp_path), strength=1.0)


def test_forks_take_one_thread(bert_mlm, bert_tokenizer):
    """Those of the parent do not exist in a fork, and waiting for them would never end."""

    def check(module, inputs):
        assert torch.get_num_threads() == (1 if forked() else 2)

    bert_mlm.bert.register_forward_pre_hook(check)
    augmenter = Augmenter(["mask"], model=bert_mlm, tokenizer=bert_tokenizer)
    data = datasets.Dataset.from_dict({"text": ["the cat sat", "a dog ran on"], "n": [1, 2]})
    torch.set_num_threads(2)
    try:
        here = augment_dataset(data, augmenter)["text"]
        assert len(here) == 4 and augment_dataset(data.remove_columns("n"), augmenter, num_proc=2)["text"] == here
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(("said", "positions", "limit"), [(16, 16, 16), (16, 18, 16), (10**30, 18, 16), (512, 18, 16)])
def test_limit_of_the_model(said, positions, limit):
    """RoBERTa has two positions more than its tokenizer lets through; some tokenizers know nothing, or err."""
    tokenizer = SimpleNamespace(model_max_length=said)
    assert _longest(SimpleNamespace(config=SimpleNamespace(max_position_embeddings=positions)), tokenizer) == limit
    assert _longest(SimpleNamespace(config=None), tokenizer) in (said, 10**9 - 2)  # relative positions


def test_entities_are_not_masked(bert_mlm, bert_tokenizer):
    favour(bert_mlm, mouse=50.0)
    batch = {"tokens": [["Cat", "Good", "12", "sat", "."]], "ner_tags": [["B-PER", "I-PER", "O", "O", "O"]]}
    made = Augmenter(["mask"], strength=1.0, model=bert_mlm, tokenizer=bert_tokenizer).copies_only(batch)
    assert made == {"tokens": [["Cat", "Good", "12", "mouse", "."]], "ner_tags": batch["ner_tags"]}


@pytest.mark.parametrize("trim", [True, False])
def test_byte_level_tokens(trim):
    """Only words that begin with a space are whole there; "ing" without one is the rest of a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    texts = ["the cat sat on the mat", "a dog sang playing on the mat", "playing cat, dog: sat playing (on) mat"] * 20
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=420, special_tokens=special))
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=trim, add_prefix_space=False
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
    config = RobertaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=20,
        pad_token_id=1,
    )
    set_seed(12)
    model = RobertaForMaskedLM(config)
    vocab = fast.get_vocab()
    whole = {token[1:] for token in vocab if token.startswith("Ġ") and token[1:].isalpha()}
    parts = {token for token in vocab if token.isalpha() and not token.startswith("Ġ")} - whole
    assert {"cat", "playing"} <= whole and len(parts) > 5
    with torch.no_grad():
        for part in parts:
            model.lm_head.bias[vocab[part]] = 3.0
    text = "Cat sat, on the mat " * 8  # longer than 18 tokens
    made = copies_of(text, ["mask"], copies=5, strength=0.5, top_k=len(fast), model=model, tokenizer=fast)
    assert len(made) == 5
    for copy in made:
        changed = [new for new, old in zip(words(copy), words(text), strict=True) if new != old]
        assert changed and all(new.lower() in whole for new in changed)
        assert words(copy)[18:] == words(text)[18:]


def test_masked_model_is_checked(bert_mlm, bert_tokenizer):
    def refused(message, model=bert_mlm, tokenizer=bert_tokenizer):
        with pytest.raises(ValueError, match=message):
            Augmenter(["mask"], model=model, tokenizer=tokenizer)

    refused("'mask' needs a masked language model and its tokenizer", tokenizer=None)
    refused("SimpleNamespace is not one. Load it with AutoTokenizer", tokenizer=SimpleNamespace(is_fast=False))
    unmasked = PreTrainedTokenizerFast(tokenizer_object=bert_tokenizer.backend_tokenizer, pad_token="[PAD]")
    refused("has no mask or padding token", tokenizer=unmasked)
    refused(
        "BertModel has no language modeling head. Load the model with AutoModelForMaskedLM", BertModel(bert_mlm.config)
    )
    small = BertForMaskedLM(BertConfig(**{**bert_mlm.config.to_diff_dict(), "vocab_size": 9}))
    refused(f"predicts 9 tokens and the tokenizer has {len(VOCAB)}: they do not belong together", small)
