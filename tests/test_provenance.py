"""Which parameters of a model are pretrained: after every way in which a model may have come about."""

from __future__ import annotations

import copy
import pickle
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2ForSequenceClassification,
)

from hf_l2sp.provenance import Provenance, SourceFiles, examine, source_of

HEAD = {"classifier.weight", "classifier.bias"}
# transformers 4 sets the mark on the meta-device parameters, which loading then replaces: none is left.
MARKS_ARE_LOST = transformers.__version__.startswith("4.")
WORDS = "bert.embeddings.word_embeddings.weight"


class Wrapper(nn.Module):
    """A pretrained encoder in a module of the user's own."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(32, 3)


@pytest.fixture
def two_label_dir(bert_config, tmp_path):
    """Folder with a saved classifier with 2 labels."""
    folder = tmp_path / "two_labels"
    BertForSequenceClassification(BertConfig(**bert_config.to_diff_dict(), num_labels=2)).save_pretrained(folder)
    return str(folder)


def rewritten(source, folder, rename=lambda name: name, binary=False):
    """A copy of a saved model with other names of tensors, or in PyTorch's own format."""
    folder.mkdir()
    shutil.copy(f"{source}/config.json", folder)
    tensors = {rename(name): value for name, value in load_file(f"{source}/model.safetensors").items()}
    if binary:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def load(folder, **options):
    return BertForSequenceClassification.from_pretrained(folder, num_labels=3, **options)


@pytest.mark.skipif(MARKS_ARE_LOST, reason="transformers 4 leaves no marks")
def test_mark_of_transformers_on_which_all_rests(tiny_bert_dir):
    """If this fails, transformers changed its private mark, and `examine` must find another way."""
    model = load(tiny_bert_dir)
    marked = {n for n, p in model.named_parameters() if getattr(p, "_is_hf_initialized", False)}
    assert marked == {n for n, _ in model.named_parameters()} - HEAD
    # A deepcopy loses it, which is why there is a second way.
    assert not any(hasattr(p, "_is_hf_initialized") for p in copy.deepcopy(model).parameters())


def test_missing_head_is_new(tiny_bert_dir):
    found = examine(load(tiny_bert_dir))
    assert found == Provenance(True, frozenset(HEAD), {}, tiny_bert_dir, None)


def test_complete_model_has_nothing_new(tiny_bert_dir, two_label_dir):
    assert examine(BertModel.from_pretrained(tiny_bert_dir)).new == frozenset()
    found = examine(BertForSequenceClassification.from_pretrained(two_label_dir))
    assert found.loaded and found.new == frozenset()


def test_mismatched_head_is_new(two_label_dir):
    assert examine(load(two_label_dir, ignore_mismatched_sizes=True)).new == HEAD


def test_mismatched_head_is_new_in_a_copy(two_label_dir):
    assert examine(copy.deepcopy(load(two_label_dir, ignore_mismatched_sizes=True))).new == HEAD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deepcopy_of_a_loaded_model(tiny_bert_dir, dtype):
    model = load(tiny_bert_dir, dtype=dtype)
    assert model.dtype == dtype
    assert examine(copy.deepcopy(model)) == examine(model)
    assert examine(model).new == HEAD


@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.half()])
def test_cast_after_loading(tiny_bert_dir, change):
    found = examine(change(load(tiny_bert_dir)))
    assert found.loaded and found.new == HEAD


def test_pickled_model(tiny_bert_dir):
    assert examine(pickle.loads(pickle.dumps(load(tiny_bert_dir)))).new == HEAD


def test_wrapped_model(tiny_bert_dir):
    model = load(tiny_bert_dir)
    assert examine(torch.compile(model)) == examine(nn.DataParallel(model)) == examine(model)


def test_copy_that_was_trained_is_its_own_origin(tiny_bert_dir, move):
    assert examine(move(copy.deepcopy(load(tiny_bert_dir)))) == Provenance()


@pytest.mark.parametrize("from_folder", [False, True])
def test_model_from_a_config_has_nothing_new(bert_config, tiny_bert_dir, from_folder):
    config = AutoConfig.from_pretrained(tiny_bert_dir) if from_folder else bert_config
    assert examine(BertForSequenceClassification(config)) == Provenance()


def test_head_replaced_by_the_user_is_new(tiny_bert_dir):
    model = load(tiny_bert_dir)
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 3))
    assert examine(model).new == {f"classifier.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}


def test_pretrained_head_replaced_by_one_of_the_same_shape_is_new(two_label_dir):
    model = BertForSequenceClassification.from_pretrained(two_label_dir)
    model.classifier = nn.Linear(32, 2)
    assert examine(model).new == HEAD


def test_pretrained_head_replaced_in_a_copy_is_new(two_label_dir):
    model = copy.deepcopy(BertForSequenceClassification.from_pretrained(two_label_dir))
    model.classifier = nn.Linear(32, 2)
    assert examine(model).new == HEAD


def test_encoder_in_a_module_of_ones_own(tiny_bert_dir):
    found = examine(Wrapper(BertModel.from_pretrained(tiny_bert_dir)))
    assert found.loaded and found.new == {"head.weight", "head.bias"}
    assert (found.source, found.revision) == (None, None)


def test_copy_of_an_encoder_in_a_module_of_ones_own(tiny_bert_dir):
    assert examine(copy.deepcopy(Wrapper(BertModel.from_pretrained(tiny_bert_dir)))).new == {
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize("copied", [False, True])
def test_sharded_checkpoint(tiny_bert_dir, tmp_path, copied):
    BertModel.from_pretrained(tiny_bert_dir).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = load(tmp_path)
    model.resize_token_embeddings(108)
    found = examine(copy.deepcopy(model) if copied else model)
    assert found.new == HEAD and found.rows == {WORDS: 100}


@pytest.mark.parametrize("copied", [False, True])
def test_checkpoint_with_the_prefix_of_the_base_model(tiny_bert_dir, tmp_path, copied):
    folder = rewritten(tiny_bert_dir, tmp_path / "model", lambda name: f"bert.{name}")
    model = load(folder)
    assert examine(copy.deepcopy(model) if copied else model).new == HEAD
    base = BertModel.from_pretrained(folder)
    assert examine(copy.deepcopy(base) if copied else base) == Provenance(True, source=folder)


def legacy(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def test_legacy_names(tiny_bert_dir, tmp_path):
    assert examine(load(rewritten(tiny_bert_dir, tmp_path / "model", legacy))).new == HEAD


def test_legacy_names_in_a_copy(tiny_bert_dir, tmp_path):
    assert examine(copy.deepcopy(load(rewritten(tiny_bert_dir, tmp_path / "model", legacy)))).new == HEAD


def test_checkpoint_in_the_format_of_pytorch(tiny_bert_dir, tmp_path):
    assert examine(load(rewritten(tiny_bert_dir, tmp_path / "model", binary=True))).new == HEAD


def test_checkpoint_in_the_format_of_pytorch_in_a_copy(tiny_bert_dir, tmp_path):
    assert examine(copy.deepcopy(load(rewritten(tiny_bert_dir, tmp_path / "model", binary=True)))).new == HEAD


def test_checkpoint_in_the_format_of_pytorch_enlarged(tiny_bert_dir, tmp_path):
    model = load(rewritten(tiny_bert_dir, tmp_path / "model", binary=True))
    model.resize_token_embeddings(108)
    assert examine(model).rows == {WORDS: 100}


def test_new_language_head_on_a_base_model(tiny_bert_dir):
    found = examine(BertForMaskedLM.from_pretrained(tiny_bert_dir))
    # The decoder's weight is tied to the embeddings and pretrained; its bias is not.
    assert "cls.predictions.bias" in found.new and "cls.predictions.transform.dense.weight" in found.new
    assert all(name.startswith("cls.predictions.") for name in found.new)


def test_new_head_on_tied_weights(tiny_gpt2_dir):
    found = examine(GPT2ForSequenceClassification.from_pretrained(tiny_gpt2_dir, num_labels=3))
    assert found.new == {"score.weight"}


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    ("sizes", "rows"), [([108], {WORDS: 100}), ([104, 112], {WORDS: 100}), ([90], {}), ([112, 100], {})], ids=str
)
def test_resized_embeddings(tiny_bert_dir, sizes, rows, copied):
    model = load(tiny_bert_dir)
    for size in sizes:
        model.resize_token_embeddings(size)
    found = examine(copy.deepcopy(model) if copied else model)
    assert found.new == HEAD and found.rows == rows


def test_embeddings_shrunk_and_then_enlarged(tiny_bert_dir):
    model = load(tiny_bert_dir)
    model.resize_token_embeddings(90)
    model.resize_token_embeddings(108)
    assert examine(model).rows == {WORDS: 90}


def test_resized_tied_embeddings(gpt2):
    gpt2.resize_token_embeddings(97)
    found = examine(gpt2)
    assert found.new == frozenset() and found.rows == {"transformer.wte.weight": 90}


def test_resized_untied_embeddings(llama):
    llama.resize_token_embeddings(97)
    found = examine(llama)
    assert found.new == frozenset() and found.rows == {"model.embed_tokens.weight": 90, "lm_head.weight": 90}


def test_output_layer_replaced_by_the_user_is_new(llama):
    llama.lm_head = nn.Linear(32, 90, bias=False)
    assert examine(llama).new == {"lm_head.weight"}


def test_enlarged_embeddings_of_which_some_rows_were_trained(tiny_bert_dir):
    model = load(tiny_bert_dir)
    model.resize_token_embeddings(108)
    model.get_parameter(WORDS).data[40:50] += 0.1
    assert examine(model).rows == {WORDS: 100}


def test_resized_language_head_with_bias(bert_config, tmp_path):
    BertForMaskedLM(bert_config).save_pretrained(tmp_path)
    model = BertForMaskedLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(108)
    assert examine(model).rows == {WORDS: 100, "cls.predictions.bias": 100}


def test_resized_embeddings_of_an_encoder_in_a_module_of_ones_own(tiny_bert_dir):
    encoder = BertModel.from_pretrained(tiny_bert_dir)
    encoder.resize_token_embeddings(108)
    assert examine(Wrapper(encoder)).rows == {"encoder.embeddings.word_embeddings.weight": 100}


def test_source(tiny_bert_dir, bert_config, monkeypatch):
    assert source_of(load(tiny_bert_dir)) == (tiny_bert_dir, None)
    assert source_of(nn.Linear(2, 2)) == (None, None)
    assert source_of(BertModel(bert_config)) == (None, None)
    model = load(tiny_bert_dir)
    model.name_or_path, model.config._commit_hash = "some/model", "0123abc"
    assert source_of(model) == ("some/model", "0123abc")
    folder, name = tiny_bert_dir.rsplit("/", 1)
    monkeypatch.chdir(folder)
    assert source_of(load(name)) == (tiny_bert_dir, None)


def test_unreadable_files_are_no_source(tmp_path):
    assert SourceFiles.find(str(tmp_path), None) is None
    assert SourceFiles.find("no/such-model", None) is None
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    assert SourceFiles.find(str(tmp_path), None) is None


def test_examining_leaves_the_model_alone(tiny_bert_dir):
    model = load(tiny_bert_dir)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    examine(model)
    examine(copy.deepcopy(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
