"""Fixtures of the recipe tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .recipe_harness import notes, save_tiny_model, write_jsonl


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """A model this small is slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a pretrained encoder and its tokenizer. Read only."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def arguments(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Command line of a run of seconds that learns the task."""
    folder = tmp_path_factory.mktemp("data")
    words = ["--model_name_or_path", tiny_model, "--max_seq_length", "16", "--disable_tqdm", "true"]
    words += ["--learning_rate", "5e-3", "--num_train_epochs", "8", "--per_device_train_batch_size", "8"]
    for index, (split, count) in enumerate({"train": 8, "validation": 4, "test": 6}.items()):
        words += [f"--{split}_file", write_jsonl(folder / f"{split}.jsonl", notes(count, index))]
    return words
