"""The README's examples of other trainers run, on tiny models under the names that they use."""

from __future__ import annotations

import importlib
import re
import sys
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from .contract import L2SP_KEYS, tiny_tokenizer, training_logs

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## Other trainers$(.*?)(?=^## |\Z)", README, flags=re.MULTILINE | re.DOTALL)
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION[1], flags=re.DOTALL) if SECTION else []
# By the class that a block mixes L2-SP into.
NAMES = [re.search(r"L2SP\w*Trainer", block)[0] for block in BLOCKS]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory) -> dict[str, str]:
    """Folders with model and tokenizer, by the Hub ids that the README names."""
    words = sorted({word for block in BLOCKS for word in block.replace('"', " ").split()})
    sizes = {**SIZES, "vocab_size": len(words) + 3}
    t5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    models = {
        "Qwen/Qwen3-0.6B": LlamaForCausalLM(LlamaConfig(**sizes, **TOKENS, num_key_value_heads=2)),
        "sentence-transformers/all-MiniLM-L6-v2": BertModel(BertConfig(**sizes, max_position_embeddings=64)),
        "google-t5/t5-small": T5ForConditionalGeneration(
            T5Config(**t5, vocab_size=len(words) + 3, pad_token_id=0, eos_token_id=2)
        ),
    }
    folders = {}
    for name, model in models.items():
        folder = tmp_path_factory.mktemp(name.rpartition("/")[2])
        model.save_pretrained(folder)
        tiny_tokenizer(words, frame=name != "Qwen/Qwen3-0.6B", model_max_length=64).save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture
def run_as_module(monkeypatch) -> Callable[[str], types.ModuleType]:
    """Runs a program in a module of its own: saved arguments name the module of their class."""

    def run(program: str) -> types.ModuleType:
        module = types.ModuleType("readme_example")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(program, "README.md", "exec"), module.__dict__)
        return module

    return run


@pytest.mark.skipif(not BLOCKS, reason="the README has no section 'Other trainers'")
def test_every_kind_of_trainer_is_shown():
    assert NAMES == [
        "L2SPSFTTrainer",
        "L2SPDPOTrainer",
        "L2SPRewardTrainer",
        "L2SPSentenceTrainer",
        "L2SPSeq2SeqTrainer",
    ]
    assert all(len(block.strip().splitlines()) <= 20 for block in BLOCKS)


@pytest.mark.skipif(not BLOCKS, reason="the README has no section 'Other trainers'")
@pytest.mark.parametrize("name", NAMES)
def test_example_runs(tiny_models, run_as_module, monkeypatch, tmp_path, name):
    (block,) = (block for block, shown in zip(BLOCKS, NAMES, strict=True) if shown == name)
    for module in set(re.findall(r"^from (trl|sentence_transformers\S*) import", block, flags=re.MULTILINE)):
        try:
            importlib.import_module(module)
        except ImportError:
            pytest.skip(f"{module} is not installed, or older than the README's example")
    if name == "L2SPRewardTrainer" and Version(version("trl")) < Version("1.0"):
        pytest.skip("trl before 1.0 takes a model only")
    for hub_id, folder in tiny_models.items():
        block = block.replace(f'"{hub_id}"', repr(folder))
    assert not re.search(r'"[\w-]+/[\w.-]+"', block), "a Hub id without a tiny model"
    small = '"out", use_cpu=True, bf16=False, max_steps=2, logging_steps=1, report_to="none", disable_tqdm=True'
    assert block.count('"out"') == 1
    monkeypatch.chdir(tmp_path)
    trainer = run_as_module(block.replace('"out"', small)).trainer
    logs = training_logs(trainer)
    assert len(logs) == 2 and all(L2SP_KEYS <= log.keys() for log in logs)
    assert logs[1]["l2sp_penalty"] > 0
    trainer.save_model()
    assert (tmp_path / "out" / "l2sp_state.json").is_file()
