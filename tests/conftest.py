"""Fixtures shared by all tests: tiny models and data, made on the spot, without network."""

from __future__ import annotations

import gc
import os

# Before transformers is imported, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)
from transformers.utils import logging

LABELS = 3


@pytest.fixture(scope="session", autouse=True)
def _quick_and_quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # On models this small several threads cost more than they bring, by far where the cores are shared.
    torch.set_num_threads(1)
    # Trainer collects garbage at every start; without this it would walk through all imported modules each time.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    set_seed(20180206)


def _settings_of_accelerate() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}


GIVEN_SETTINGS = _settings_of_accelerate()


@pytest.fixture(autouse=True)
def _settings_of_accelerate_end_with_their_test() -> Iterator[None]:
    """transformers 4 leaves bfloat16 and torch.compile in the environment, where later trainers take them up.

    Wider fixtures, which run before this one, leave theirs there, too.
    """

    def restore() -> None:
        for name in _settings_of_accelerate():
            del os.environ[name]
        os.environ.update(GIVEN_SETTINGS)

    restore()
    yield
    restore()


@pytest.fixture(scope="session")
def bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )


@pytest.fixture(scope="session")
def tiny_bert_dir(bert_config: BertConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder with a saved `BertModel`: a classifier loaded from it has a new head. Read only."""
    folder = tmp_path_factory.mktemp("tiny_bert")
    set_seed(1)
    BertModel(bert_config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def classifier(tiny_bert_dir: str) -> BertForSequenceClassification:
    """A pretrained encoder with a new head, as in a fine-tuning script."""
    return BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=LABELS)


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder with a saved `GPT2LMHeadModel`, whose output weights are tied to its embeddings."""
    folder = tmp_path_factory.mktemp("tiny_gpt2")
    set_seed(2)
    config = GPT2Config(
        vocab_size=90, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def gpt2(tiny_gpt2_dir: str) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(tiny_gpt2_dir)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder with a saved `LlamaForCausalLM`, whose output weights are not tied."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    set_seed(3)
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def llama(tiny_llama_dir: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_llama_dir)


@pytest.fixture(scope="session")
def classification_data() -> list[dict[str, torch.Tensor]]:
    """24 examples of 10 tokens with 3 labels, as tensors that the default collator stacks."""
    generator = torch.Generator().manual_seed(4)
    return [
        {
            "input_ids": torch.randint(1, 100, (10,), generator=generator),
            "attention_mask": torch.ones(10, dtype=torch.long),
            "labels": torch.tensor(index % LABELS),
        }
        for index in range(24)
    ]


@pytest.fixture(scope="session")
def language_data() -> list[dict[str, torch.Tensor]]:
    """12 sequences of 8 tokens whose labels are the tokens."""
    generator = torch.Generator().manual_seed(5)
    examples = []
    for _ in range(12):
        tokens = torch.randint(3, 90, (8,), generator=generator)
        examples.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()})
    return examples


@pytest.fixture
def move() -> Any:
    """Function that adds noise of a given size to every floating-point parameter of a model, as training does."""

    def move_model(model: torch.nn.Module, size: float = 0.05, seed: int = 6) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_((size * noise).to(parameter.dtype))
        return model

    return move_model


@pytest.fixture
def warnings_of_library() -> Any:
    """List that collects the library's log messages of level warning and above, whatever the verbosity."""
    import logging as standard_logging

    messages: list[str] = []

    class _Collect(standard_logging.Handler):
        def emit(self, record: standard_logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = _Collect(level=standard_logging.WARNING)
    modules = ("plan", "heads", "state", "trainer", "provenance", "source", "anchor_values")
    names = [f"hf_l2sp.{name}" for name in modules]
    loggers = [standard_logging.getLogger(name) for name in names]
    old = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(standard_logging.WARNING)
    yield messages
    for logger, level in zip(loggers, old, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.fixture
def rng() -> numpy.random.Generator:
    return numpy.random.default_rng(7)


@pytest.fixture
def output_dir(tmp_path: Path) -> str:
    return str(tmp_path / "output")


@pytest.fixture
def net() -> torch.nn.Module:
    """Two linear layers that transformers has never seen."""
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
