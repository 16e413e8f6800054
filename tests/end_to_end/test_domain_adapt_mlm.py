"""Adaptation by masked words as a user runs it, on a tiny model: results, re-use of the folder, resuming, refusals."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

from hf_l2sp.state import read_state

from .recipe_harness import FILLERS, RECIPES, RESULTS, notes, results_of, write_jsonl

import domain_adapt_mlm  # noqa: E402  # isort: skip
import medical_textcls  # noqa: E402  # isort: skip
from _mlm_masking import IGNORED, MaskedRows, WholeWordMasking  # noqa: E402  # isort: skip
from _mlm_packing import PackedFile  # noqa: E402  # isort: skip

RECIPE = RECIPES / "domain_adapt_mlm.py"
Change = Callable[[Path, list[str]], list[str]]


def general_rows(count: int) -> list[dict[str, Any]]:
    """Texts of the words that notes are filled with, in an order that can be learned."""
    return [{"text": " ".join(FILLERS[start:] + FILLERS[:start])} for start in range(9)] * (count // 9)


@pytest.fixture(scope="module")
def words(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Command line of a run of seconds that learns something."""
    folder = tmp_path_factory.mktemp("text")
    argv = ["--model_name_or_path", tiny_model, "--max_seq_length", "16", "--disable_tqdm", "true"]
    argv += ["--train_file", write_jsonl(folder / "train.jsonl", notes(40, 0))]
    argv += ["--validation_file", write_jsonl(folder / "validation.jsonl", notes(12, 1))]
    argv += ["--general_file", write_jsonl(folder / "general.jsonl", general_rows(90))]
    argv += ["--learning_rate", "1e-2", "--num_train_epochs", "6", "--head_warmup_steps", "20"]
    return [*argv, "--per_device_train_batch_size", "8", "--logging_steps", "2"]


@pytest.fixture(scope="module")
def finished(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and printed text of a run with --compare."""
    folder = tmp_path_factory.mktemp("out") / "adapted"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        domain_adapt_mlm.main([*words, "--output_dir", str(folder), "--compare", "--l2sp_lambda", "0.1"])
    return folder, printed.getvalue()


# --------------------------------------------------------------------------- results


def test_all_files_are_written_and_the_domain_is_learned(finished: tuple[Path, str]) -> None:
    folder, text = finished
    assert RESULTS | {"comparison.json", "perplexity.png"} <= {path.name for path in folder.iterdir()}
    assert (folder / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    results = results_of(folder)
    assert results["eval_perplexity"] < 0.9 * results["start_perplexity"]
    assert results["eval_loss"] == pytest.approx(math.log(results["eval_perplexity"]))
    assert {"general_perplexity", "general_samples", "train_samples"} <= set(results)
    assert "start_loss" not in results
    for score in ("start_perplexity", "start_general_perplexity", "eval_perplexity", "general_perplexity"):
        assert re.search(rf"^{score} +[\d.]+ +[\d.]+ +[-+][\d.]+$", text, flags=re.MULTILINE), text
    assert "lower is better for loss and perplexity" in text
    assert "5 tensors of it are not in the model's files" in text


def test_both_runs_start_from_the_same_head_and_end_apart(finished: tuple[Path, str]) -> None:
    compared = json.loads((finished[0] / "comparison.json").read_text())
    plain, l2sp = compared["plain"], compared["l2sp"]
    for name in ("start_perplexity", "start_general_perplexity"):
        assert plain[name] == l2sp[name] and compared["difference"][name] == 0.0
    assert plain["eval_perplexity"] != l2sp["eval_perplexity"]
    assert compared["max_seq_length"] == 16 and compared["head_warmup_steps"] == 20


def test_perplexities_are_logged_while_training(finished: tuple[Path, str]) -> None:
    log = json.loads((finished[0] / "trainer_state.json").read_text())["log_history"]
    for name in ("eval_perplexity", "general_perplexity"):
        steps = [entry["step"] for entry in log if name in entry]
        assert len(set(steps)) == 4 and steps[-1] == log[-1]["step"]
    assert [entry["step"] for entry in log if "start_perplexity" in entry] == [0]


def test_the_perplexity_is_that_of_all_masked_tokens(
    finished: tuple[Path, str], words: list[str], tmp_path: Path
) -> None:
    folder = finished[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    file = PackedFile(tmp_path / "rows.arrow", tokenizer, 16)
    path = words[words.index("--validation_file") + 1]
    for line in Path(path).read_text().splitlines():
        file.add(json.loads(line)["text"])
    total = count = 0.0
    for row in MaskedRows(file.close(), WholeWordMasking(tokenizer, 0.15)):  # one by one, no padding
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            likely = model(input_ids=ids).logits[0].log_softmax(-1)
        masked = labels != IGNORED
        total -= float(likely[masked, labels[masked]].sum())
        count += int(masked.sum())
    assert results_of(folder)["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_the_result_fills_masks(finished: tuple[Path, str]) -> None:
    fill = pipeline("fill-mask", model=str(finished[0]), device="cpu")
    answers = fill("today the [MASK] reports some more rash", top_k=3)
    assert answers[0]["token_str"] in FILLERS and 0 < answers[0]["score"] <= 1


def test_the_card_tells_the_task_and_both_texts(finished: tuple[Path, str], tiny_model: str) -> None:
    card = (finished[0] / "README.md").read_text()
    assert "fill-mask" in card and "1802.01483" in card and tiny_model not in card
    assert "start" not in re.findall(r"split: (\w+)", card)


# --------------------------------------------------------------------------- re-use


def classify(words: list[str], folder: Path, *more: str) -> dict[str, Any]:
    """Runs the classification recipe on few notes for a few steps; its l2sp_state.json."""
    data = [write_jsonl(folder.parent / f"{name}.jsonl", notes(4, seed)) for seed, name in enumerate(("t", "v"))]
    argv = ["--train_file", data[0], "--validation_file", data[1], "--max_seq_length", "16", "--max_steps", "2"]
    medical_textcls.main([*argv, "--disable_tqdm", "true", "--output_dir", str(folder), *more])
    state = read_state(folder)
    assert state is not None
    return state


def test_a_classifier_on_the_folder_is_anchored_to_the_general_model(
    finished: tuple[Path, str], words: list[str], tiny_model: str, tmp_path: Path
) -> None:
    adapted = str(finished[0])
    state = classify(words, tmp_path / "general", "--model_name_or_path", adapted)
    assert state["anchor"]["source"] == tiny_model
    entries = state["anchor"]["entries"]
    # The pooler of the general model came along, and is pulled to itself; the classifier is new.
    assert "bert.pooler.dense.weight" in entries and not any("classifier" in name or "cls" in name for name in entries)
    pretrained = load_file(f"{tiny_model}/model.safetensors")
    kept = load_file(f"{adapted}/model.safetensors")
    for name in ("embeddings.word_embeddings.weight", "pooler.dense.weight"):
        assert entries[f"bert.{name}"]["sum"] == pytest.approx(float(pretrained[name].double().sum()), rel=1e-6)
    assert torch.equal(kept["bert.pooler.dense.weight"], pretrained["pooler.dense.weight"])


def test_a_classifier_is_anchored_to_the_adapted_model_when_told_so(
    finished: tuple[Path, str], words: list[str], tmp_path: Path
) -> None:
    adapted = str(finished[0])
    more = ("--model_name_or_path", adapted, "--l2sp_anchor", adapted)
    state = classify(words, tmp_path / "adapted", *more)
    name, weights = "bert.embeddings.word_embeddings.weight", load_file(f"{adapted}/model.safetensors")
    assert state["anchor"]["source"] == adapted
    assert state["anchor"]["entries"][name]["sum"] == pytest.approx(float(weights[name].double().sum()), rel=1e-6)


def test_a_second_adaptation_goes_on_with_the_head_and_the_first_anchor(
    finished: tuple[Path, str], words: list[str], tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [*words, "--model_name_or_path", str(finished[0]), "--head_warmup_steps", "0", "--max_steps", "2"]
    domain_adapt_mlm.main([*again, "--output_dir", str(tmp_path / "again")])
    assert "warm-up" not in capsys.readouterr().out
    state = read_state(tmp_path / "again")
    assert state is not None and state["anchor"]["source"] == tiny_model
    assert not any(name.startswith("cls.") for name in state["anchor"]["entries"]), "the general model has no head"
    before, after = results_of(finished[0]), results_of(tmp_path / "again")
    assert after["start_perplexity"] == pytest.approx(before["eval_perplexity"], rel=1e-5)


def test_a_lost_general_model_is_named_with_the_cure(
    finished: tuple[Path, str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(finished[0], tmp_path / "moved")
    state = json.loads((moved / "l2sp_state.json").read_text())
    state["anchor"]["source"] = "/home/somebody/general"
    (moved / "l2sp_state.json").write_text(json.dumps(state))
    for recipe in (medical_textcls, domain_adapt_mlm):
        argv = ["--model_name_or_path", str(moved), "--output_dir", str(tmp_path / "out"), "--max_seq_length", "16"]
        with pytest.raises(SystemExit, match="1"):
            recipe.main(argv)
        message = capsys.readouterr().err
        assert "'/home/somebody/general', but: θ0 cannot be loaded" in message
        assert f"set l2sp_anchor={str(moved)!r}" in message and "Traceback" not in message


# --------------------------------------------------------------------------- resuming, λ 0, few arguments


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(words: list[str], tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    common = [*words, "--num_train_epochs", "3", "--save_steps", "7", "--save_total_limit", "9"]
    domain_adapt_mlm.main([*common, "--output_dir", str(whole)])
    shutil.copytree(whole / "checkpoint-7", resumed / "checkpoint-7")  # within an epoch
    domain_adapt_mlm.main([*common, "--output_dir", str(resumed), "--resume_from_checkpoint"])
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    first, second = results_of(whole), results_of(resumed)
    for name in ("start_perplexity", "start_general_perplexity", "eval_perplexity", "general_perplexity"):
        assert second[name] == first[name]


def test_a_step_is_the_same_in_one_batch_and_in_several(words: list[str], tmp_path: Path) -> None:
    # Plain gradient descent shows the size of the gradient. Rows differ in how many of their words are masked.
    common = [*words, "--optim", "sgd", "--learning_rate", "0.1", "--max_steps", "3", "--max_grad_norm", "0"]
    weights = []
    for batch, steps in (("8", "1"), ("2", "4")):
        folder = str(tmp_path / batch)
        batches = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", steps]
        domain_adapt_mlm.main([*common, *batches, "--eval_strategy", "no", "--output_dir", folder])
        weights.append(load_file(f"{folder}/model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_lambda_0_is_the_plain_run(words: list[str], tmp_path: Path) -> None:
    argv = [*words, "--max_steps", "3", "--l2sp_lambda", "0", "--compare", "--output_dir", str(tmp_path / "out")]
    domain_adapt_mlm.main(argv)
    compared = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert set(compared["difference"].values()) == {0.0}
    assert not list((tmp_path / "out").glob("l2sp_*"))


def test_domain_text_alone_is_enough(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(row["text"] for row in notes(20, 3)))
    argv = [
        "--model_name_or_path",
        tiny_model,
        "--train_file",
        str(path),
        "--max_seq_length",
        "16",
        "--max_steps",
        "1",
    ]
    argv += ["--head_warmup_steps", "1", "--disable_tqdm", "true", "--max_eval_rows", "4"]
    argv += ["--metric_for_best_model", "perplexity", "--load_best_model_at_end", "--save_strategy", "steps"]
    domain_adapt_mlm.main([*argv, "--save_steps", "1", "--eval_steps", "1", "--output_dir", str(tmp_path / "out")])
    results = results_of(tmp_path / "out")
    assert results["general_samples"] == 4 and results["eval_samples"] <= 4
    text = capsys.readouterr().out
    assert "59 blank texts of --train_file" in text and "the embedded general text" in text


# --------------------------------------------------------------------------- refusals


def flag(*more: str) -> Change:
    return lambda folder, argv: [*argv, *more]


def text_file(name: str, content: str, which: str = "--train_file") -> Change:
    def apply(folder: Path, argv: list[str]) -> list[str]:
        (folder / name).write_text(content)
        return [*argv, which, str(folder / name)]

    return apply


def gpt2(folder: Path, argv: list[str]) -> list[str]:
    model = argv[argv.index("--model_name_or_path") + 1]
    shutil.copytree(model, folder / "gpt2", ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder / "gpt2")
    return [*argv, "--model_name_or_path", str(folder / "gpt2")]


def no_mask_token(folder: Path, argv: list[str]) -> list[str]:
    shutil.copytree(argv[argv.index("--model_name_or_path") + 1], folder / "model")
    path = folder / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "mask_token"}))
    return [*argv, "--model_name_or_path", str(folder / "model")]


REFUSALS: dict[str, tuple[Change, str]] = {
    "missing file": (flag("--train_file", "nowhere.txt"), r"--train_file 'nowhere\.txt' does not exist"),
    "missing general file": (flag("--general_file", "no.txt"), r"--general_file 'no\.txt' does not exist"),
    "empty file": (text_file("a.txt", ""), r"--train_file '.*a\.txt' is empty"),
    "no text column": (flag("--text_column", "txt"), r"no column 'txt' \(--text_column\); it has 'text', 'label'"),
    "only blanks": (text_file("a.txt", " \n\n"), r"'.*a\.txt' holds blank texts alone"),
    "a few words": (text_file("a.txt", "the patient reports"), r"has \d tokens to train on, fewer than one row"),
    "too few general texts": (text_file("a.txt", "", "--general_file"), r"--general_file '.*a\.txt' is empty"),
    "too long": (flag("--max_seq_length", "64"), r"--max_seq_length 64 is more than .* takes; give 32 or less"),
    "no warm-up": (
        flag("--head_warmup_steps", "0"),
        r"no trained head .*--head_warmup_steps 0 would start from random",
    ),
    "causal model": (gpt2, r"'.*gpt2' is a 'gpt2' model, which has no head for masked words; give an encoder"),
    "no mask token": (no_mask_token, r"'.*model': its tokenizer has no mask token"),
    "negative lambda": (flag("--l2sp_lambda", "-1"), r"l2sp_lambda=-1\.0 must be a finite number >= 0"),
    "wrong anchor": (flag("--l2sp_anchor", "./nowhere"), r"--l2sp_anchor './nowhere' does not exist"),
    "two sources": (flag("--dataset_name", "some/set"), r"both name training data; give one"),
    "unknown strategy": (flag("--eval_strategy", "sometimes"), r"sometimes'? is not a valid IntervalStrategy"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_before_any_training(
    name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, pattern = REFUSALS[name]
    argv = change(tmp_path, [*words, "--output_dir", str(tmp_path / "out"), "--compare"])
    monkeypatch.chdir(tmp_path)
    for step in ("warm_up", "header"):
        monkeypatch.setattr(domain_adapt_mlm, step, lambda *_, s=step, **__: pytest.fail(f"came as far as {s}"))
    with pytest.raises(SystemExit) as caught:
        domain_adapt_mlm.main(argv)
    printed = capsys.readouterr()
    assert caught.value.code == 1
    assert re.search(pattern, printed.err), printed.err
    assert "Traceback" not in printed.err and not (tmp_path / "out").exists()


# --------------------------------------------------------------------------- the real thing


@pytest.mark.slow
def test_without_arguments_it_adapts_the_embedded_model_to_the_embedded_text(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, str(RECIPE)], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "domain_adapt_mlm"
    assert RESULTS <= {path.name for path in folder.iterdir()}
    results = results_of(folder)
    assert results["eval_perplexity"] < 0.8 * results["start_perplexity"]
