"""The main recipe under `accelerate launch` in two processes: one training, one voice, one set of files, no hang."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from .recipe_harness import RECIPES, RESULTS, launch, results_of

import medical_textcls  # noqa: E402  # isort: skip

RECIPE = str(RECIPES / "medical_textcls.py")
ON_GPU = str(Path(__file__).with_name("as_if_on_gpu.py"))
Launched = tuple[Path, str, str]


@pytest.fixture(scope="module")
def command(arguments: list[str]) -> list[str]:
    """Three steps of plain gradient descent, so that the weights show the size of the gradient, on 8 texts each."""
    common = [*arguments, "--max_steps", "3", "--logging_steps", "1", "--optim", "sgd", "--learning_rate", "0.1"]
    # The 12 and 18 texts of the evaluation come out even, so that Trainer counts none of them twice in the loss.
    common += ["--per_device_eval_batch_size", "3"]
    return [*common, "--max_grad_norm", "0", "--l2sp_lambda", "0.5", "--compare"]


@pytest.fixture(scope="module")
def alone(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Output folder of the same run in one process, with the λ given."""
    done: dict[str, Path] = {}

    def run(strength: str) -> Path:
        if strength not in done:
            done[strength] = tmp_path_factory.mktemp("alone") / "out"
            changes = ["--per_device_train_batch_size", "8", "--l2sp_lambda", strength]
            medical_textcls.main([*command, *changes, "--output_dir", str(done[strength])])
        return done[strength]

    return run


def in_two(command: list[str], folder: Path, config: str = "cpu_ddp", recipe: str = RECIPE) -> Launched:
    """A finished run in two processes, each with half the batch."""
    halves = ["--per_device_train_batch_size", "4"]
    code, out, err = launch(config, recipe, *command, *halves, "--output_dir", str(folder))
    assert code == 0, err
    return folder, out, err


@pytest.fixture(scope="module")
def finished(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return in_two(command, tmp_path_factory.mktemp("two") / "out")


def check_same(folder: Path, expected: Path) -> None:
    """The weights and scores of one process, up to the order of sums."""
    # Not the files: after ZeRO-3 transformers 5 writes LayerNorm's weights under BERT's old names, and reads them so.
    models = (AutoModelForSequenceClassification.from_pretrained(path) for path in (folder, expected))
    weights, reference = (model.state_dict() for model in models)
    for name, value in reference.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")
    results, wanted = (json.loads((path / "comparison.json").read_text()) for path in (folder, expected))
    for run in ("plain", "l2sp"):
        scores = {name for name in wanted[run] if re.match("(eval|test)_(?!.*(runtime|_per_second))|train_loss", name)}
        assert len(scores) > 10
        for name in scores:
            assert results[run][name] == pytest.approx(wanted[run][name], rel=1e-4, abs=1e-6), f"{run} {name}"


# --------------------------------------------------------------------------- what a launch leaves


def test_two_processes_train_one_model(finished: Launched) -> None:
    folder, out, _ = finished
    compared = json.loads((folder / "comparison.json").read_text())
    assert compared["config"]["world_size"] == 2
    assert "launch  2 processes on cpu, 8 texts per step" in out
    state = json.loads((folder / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (3, 1.0), "24 texts are one pass of three steps"


def test_the_weights_and_scores_are_those_of_one_process(finished: Launched, alone: Callable[[str], Path]) -> None:
    check_same(finished[0], alone("0.5"))
    # A penalty that each process counts anew would be seen.
    twice, once = (load_file(alone(strength) / "model.safetensors") for strength in ("1.0", "0.5"))
    assert max((twice[name] - once[name]).abs().max() for name in once) > 1e-3


def test_the_main_process_alone_speaks(finished: Launched) -> None:
    folder, out, err = finished
    for once in ("Text classification\n", "1 of 2: plain", "2 of 2: L2-SP", "plain   L2-SP  diff", "\nWritten to"):
        assert out.count(once) == 1, once
    assert (out + err).count("L2-SP parameters [elements]:") == 1
    assert len(re.findall(r"^\{'loss': ", out, flags=re.MULTILINE)) == 2 * 3, "three logs of either run"
    assert len(re.findall(r"Tokenizing train: +100%", err)) == 1


def test_one_set_of_files_is_written(finished: Launched) -> None:
    present = {path.name for path in finished[0].iterdir()}
    assert RESULTS | {"comparison.json"} <= present and "plain" not in present
    assert results_of(finished[0])["train_samples"] == 24


# --------------------------------------------------------------------------- refusals


def check_refused(result: tuple[int, str, str], pattern: str) -> None:
    code, out, err = result
    assert code == 1
    messages = [line for line in (out + err).splitlines() if line.startswith("error: ")]
    assert len(messages) == 1 and re.search(pattern, messages[0]), messages
    # The launcher reports with a traceback of its own; those of processes are marked with their rank.
    assert not re.search(r"^\[rank\d+\]: Traceback", err, flags=re.MULTILINE), err
    assert "Text classification" not in out, "came as far as the header"


def test_a_full_output_folder_is_refused_by_all_with_one_message(
    finished: Launched, command: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").touch()
    check_refused(launch("cpu_ddp", RECIPE, *command, "--output_dir", str(tmp_path), timeout=120), r"is not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (["--shot", "3"], r"unknown argument '--shot'"),
        (["--train_file", "nowhere.csv"], r"--train_file 'nowhere\.csv' does not exist"),
        (["--l2sp_weights", '{"nothing": 1}'], r"l2sp_weights: 'nothing' matches no parameter"),
        (["--push_to_hub"], r"--push_to_hub: the repository 'out' cannot be created"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_refusal_ends_both_processes_with_one_message(
    change: list[str], pattern: str, command: list[str], tmp_path: Path
) -> None:
    check_refused(
        launch("cpu_ddp", RECIPE, *command, *change, "--output_dir", str(tmp_path / "out"), timeout=120), pattern
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_refusal_of_one_process_ends_the_other(rank: int, command: list[str], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, sys\nsys.path.insert(0, {str(RECIPES)!r})\nimport medical_textcls, _textcls\n"
        "from _recipe_args import RecipeError\n\n\ndef refuse(*_):\n    raise RecipeError('met by one process')\n\n\n"
        f"if os.environ['RANK'] == '{rank}':\n    _textcls.tokenize = refuse\nmedical_textcls.main()\n"
    )
    code, out, err = launch("cpu_ddp", str(program), *command, "--output_dir", str(tmp_path / "out"), timeout=120)
    assert code == 1 and err.count("error: met by one process") == 1
    assert "difference" not in out


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2", "zero2"])
def test_sharding_without_gpus_is_refused(config: str, command: list[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here to shard over")
    if config == "zero2":
        pytest.importorskip("deepspeed", reason="ZeRO needs pip install 'hf-l2sp[deepspeed]'")
    check_refused(
        launch(config, RECIPE, *command, "--output_dir", str(tmp_path / "out"), timeout=120),
        r"asks for (FSDP|DeepSpeed), but its 2 processes run on the CPU.*cpu_ddp\.yaml",
    )


# --------------------------------------------------------------------------- other launches


@pytest.mark.slow
def test_torchrun_needs_no_use_cpu(command: list[str], alone: Callable[[str], Path], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("torchrun would take the GPU")
    folder, out, _ = in_two(command, tmp_path / "out", "torchrun")
    check_same(folder, alone("0.5"))
    assert out.count("difference") == 1


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2", "zero2", "zero3"])
def test_sharded_launches_end_where_one_process_does(
    config: str, command: list[str], alone: Callable[[str], Path], tmp_path: Path
) -> None:
    if config != "fsdp2":
        pytest.importorskip("deepspeed", reason="ZeRO needs pip install 'hf-l2sp[deepspeed]'")
    folder, out, _ = in_two(command, tmp_path / "out", config, ON_GPU)
    check_same(folder, alone("0.5"))
    assert out.count("difference") == 1 and RESULTS <= {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_a_resumed_launch_ends_where_an_uninterrupted_one_does(command: list[str], tmp_path: Path) -> None:
    common = [word for word in command if word != "--compare"] + ["--save_strategy", "steps", "--save_steps", "1"]
    common += ["--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "1", "--save_total_limit", "3"]
    whole, _, _ = in_two(common, tmp_path / "whole")
    shutil.copytree(whole / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    resumed, _, _ = in_two([*common, "--resume_from_checkpoint"], tmp_path / "resumed")
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_a_second_launch_replaces_the_first_when_told_so(
    finished: Launched, command: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(finished[0], folder)
    (folder / "mine.txt").touch()
    common = [word for word in command if word != "--compare"]
    in_two([*common, "--overwrite_output_dir", "--max_steps", "1"], folder)
    present = {path.name for path in folder.iterdir()}
    assert RESULTS | {"mine.txt", "checkpoint-1"} <= present
    assert not {"comparison.json", "checkpoint-3"} & present


@pytest.mark.slow
def test_predictions_of_two_processes_are_those_of_one(command: list[str], tmp_path: Path) -> None:
    texts = [
        "today the heart pulse",
        "rash itch",
        "two weeks of cough",
        "some mole",
        "the patient reports a valve beat",
    ]
    (tmp_path / "in.txt").write_text("\n".join(texts))
    asked = ["--predict_file", str(tmp_path / "in.txt"), "--predict_output", str(tmp_path / "out.jsonl")]
    common = [word for word in command if word != "--compare"]
    folder, out, _ = in_two([*common, *asked], tmp_path / "out")
    assert out.count("Predictions of 5 texts are written") == 1
    own = ["--model_name_or_path", str(folder), "--max_seq_length", "16", "--predict_only", *asked[:-1]]
    batches = ["--per_device_eval_batch_size", "2"]
    code, _, err = launch("cpu_ddp", RECIPE, *own, str(tmp_path / "again.jsonl"), *batches)
    assert code == 0, err
    medical_textcls.main([*own, str(tmp_path / "alone.jsonl")])
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("out", "again", "alone")
    }
    for name in rows:
        assert [row["text"] for row in rows[name]] == texts
        for row, wanted in zip(rows[name], rows["alone"], strict=True):
            assert row["scores"] == pytest.approx(wanted["scores"], abs=1e-5), name
