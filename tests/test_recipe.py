"""What the recipes share, without a model: arguments, YAML, the output folder, the result table."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_l2sp import L2SPTrainingArguments

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

import legal_textcls  # noqa: E402
import medical_textcls  # noqa: E402
import sentiment  # noqa: E402
from _recipe_args import (  # noqa: E402
    DataArguments,
    ModelArguments,
    RecipeError,
    RecipeParser,
    RecipeTrainingArguments,
    Settings,
)
from _recipe_launch import one_line_errors, use_all_cores  # noqa: E402
from _recipe_output import (  # noqa: E402
    check_output_dir,
    clear_output_dir,
    comparison,
    find_checkpoint,
    result_table,
    score_names,
    write_json,
)

TEXTCLS = {
    "medical_textcls": (medical_textcls, medical_textcls.MedicalTrainingArguments),
    "sentiment": (sentiment, sentiment.SentimentTrainingArguments),
    "legal_textcls": (legal_textcls, legal_textcls.LegalTrainingArguments),
}


def parse(*argv: str) -> tuple[Any, DataArguments, Settings]:
    model, data, *_, settings = medical_textcls.make_parser().parse(list(argv))
    return model, data, settings


# --------------------------------------------------------------------------- arguments and YAML


def test_without_arguments_the_documented_defaults_hold() -> None:
    model, data, settings = parse()
    assert model.model_name_or_path is None and data.train_file is None
    assert settings["output_dir"] == "outputs/medical_textcls"
    assert settings["report_to"] == "none"


@pytest.mark.parametrize(
    ("arguments_class", "parent"),
    [
        (RecipeTrainingArguments, L2SPTrainingArguments),
        *((arguments_class, RecipeTrainingArguments) for _, arguments_class in TEXTCLS.values()),
    ],
)
def test_the_docstring_names_every_default_that_differs_with_its_value(arguments_class: Any, parent: Any) -> None:
    inherited = {f.name: f.default for f in dataclasses.fields(parent)}
    own = {f.name: f.default for f in dataclasses.fields(arguments_class)}
    differing = {n: d for n, d in own.items() if n not in inherited or inherited[n] != d}
    told = dict(re.findall(r"^ {8}(\w+) \(`\w+`, defaults to `(.+?)`\)", arguments_class.__doc__, flags=re.MULTILINE))
    told = {name: eval(value) for name, value in told.items()}  # our own docstring
    assert differing.items() <= told.items() <= own.items()
    # These two are the defaults of one version of transformers, but not of the other.
    assert told.keys() - differing.keys() <= {"report_to", "overwrite_output_dir"}


def test_yaml_lies_under_the_command_line(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "learning_rate: 1e-2\nl2sp_lambda: 1\nbf16: no\ncompare: yes\neval_strategy: no\nseed: 7\nshots: null\n"
        "label_column: 'yes'\nl2sp_exclude: [classifier, 'pooler\\.']\n"
        "lr_scheduler_kwargs: {power: 1e-1, deep: {a: [1]}}\nl2sp-weights:\n  embeddings: 0.5\n"
    )
    for argv in (["--config", str(config), "--seed", "9"], ["--seed=9", f"--config={config}"]):
        _, data, settings = parse(*argv)
        assert settings["learning_rate"] == 0.01 and settings["l2sp_lambda"] == 1.0
        assert settings["bf16"] is False and settings["compare"] is True
        assert settings["eval_strategy"] == "no"
        assert settings["seed"] == 9, "the command line wins"
        assert data.shots is None and data.label_column == "yes"
        assert settings["l2sp_exclude"] == ["classifier", "pooler\\."]
        assert json.loads(settings["lr_scheduler_kwargs"]) == {"power": 0.1, "deep": {"a": [1]}}
        assert settings.build(L2SPTrainingArguments, output_dir=str(tmp_path)).l2sp_weights == {"embeddings": 0.5}


@pytest.mark.parametrize("name", TEXTCLS)
def test_the_yaml_file_of_the_recipe_is_understood(name: str) -> None:
    path = RECIPES / "configs" / f"{name}.yaml"
    assert f"#   accelerate launch recipes/{name}.py --config recipes/configs/{name}.yaml\n" in path.read_text()
    _, data, *_, settings = TEXTCLS[name][0].make_parser().parse(["--config", str(path), "--compare"])
    assert data.train_file == "data/train.csv" and settings["learning_rate"] == 5e-5 and settings["compare"]
    assert settings.build(L2SPTrainingArguments).load_best_model_at_end


@dataclasses.dataclass
class Extra:
    """What a recipe may add."""

    colour: str = "red"
    sizes: list[int] | None = None
    fixed: int = dataclasses.field(default=3, init=False)


def test_every_dataclass_of_a_parser_gets_its_values_and_the_last_one_its_settings(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("colour: green\nsizes: [1, 2]\nshots: 4\n")
    parser = RecipeParser((Extra, ModelArguments, DataArguments, RecipeTrainingArguments))
    extra, model, data, settings = parser.parse(
        ["--config", str(config), "--sizes", "7", "8", "9", "--model_name_or_path", "m", "--seed", "5"]
    )
    assert (type(extra), type(model), type(data), type(settings)) == (Extra, ModelArguments, DataArguments, Settings)
    assert (extra.colour, extra.sizes, extra.fixed) == ("green", [7, 8, 9], 3)
    assert model.model_name_or_path == "m" and data.shots == 4 and settings["seed"] == 5
    assert not {"colour", "sizes", "shots", "model_name_or_path"} & set(settings)
    assert set(settings) == {f.name for f in dataclasses.fields(RecipeTrainingArguments) if f.init}
    assert parser.parse([])[0] == Extra(), "what is not given has its default"
    assert len(RecipeParser((RecipeTrainingArguments,)).parse([])) == 1
    for argv, message in ((["--fixed", "4"], r"unknown argument '--fixed'"), (["--colr=red"], r"mean --colour\?")):
        with pytest.raises(RecipeError, match=message):
            parser.parse(argv)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", r"line 1: unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ("seed: 1\n\nzzzz: 1", r"line 3: unknown key 'zzzz'; --help"),
        ("seed: 1\nseed: 2", r"line 2: key 'seed' is given twice"),
        ("config: other.yaml", r"unknown key 'config'"),
        ("- seed", r"is not a mapping"),
        ("", r"is not a mapping"),
        ("seed: [1", r"not valid YAML.*line 1"),
        ("seed: one", r"invalid int value: 'one'"),
        ("bf16: maybe", r"Truthy value expected: got maybe"),
        ("l2sp_schedule: step", r"invalid choice: 'step'"),
    ],
)
def test_yaml_mistakes_are_named(tmp_path: Path, content: str, message: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(content)
    with pytest.raises(RecipeError, match=message):
        parse("--config", str(config))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "nowhere.yaml"], r"--config 'nowhere.yaml' cannot be read"),
        (["--config"], r"--config needs the path"),
        (["--shot", "3"], r"unknown argument '--shot'; did you mean --shots"),
        (["--shots=3", "stray"], r"'stray' on the command line belongs to no argument"),
        (["--shots", "many"], r"argument --shots: invalid int value: 'many'"),
    ],
)
def test_command_line_mistakes_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(*argv)


def test_a_bare_resume_means_the_last_checkpoint() -> None:
    for argv in (["--resume_from_checkpoint"], ["--resume_from_checkpoint", "--seed", "1"]):
        assert parse(*argv)[2]["resume_from_checkpoint"] == "True"
    assert parse("--resume_from_checkpoint", "out/checkpoint-3")[2]["resume_from_checkpoint"] == "out/checkpoint-3"


def test_help_lists_the_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        medical_textcls.main(["--help"])
    text = capsys.readouterr().out
    flags = ("--config", "--shots", "--compare", "--l2sp_lambda", "--augment", "--predict_file", "15%")
    assert all(flag in text for flag in flags)


def test_only_a_recipe_error_loses_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(argv: list[str] | None) -> None:
        raise RecipeError("too short")

    def break_down(argv: list[str] | None) -> None:
        raise ValueError("a bug")

    with pytest.raises(SystemExit) as caught:
        one_line_errors(refuse)([])
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: too short\n"
    with pytest.raises(ValueError, match="a bug"):
        one_line_errors(break_down)([])


@pytest.mark.parametrize(
    ("environment", "device", "expected"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, "cpu", [3]),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "2"}, "cpu", []),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}, "cpu", []),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, "cuda", []),
        ({"OMP_NUM_THREADS": "1"}, "cpu", []),
    ],
)
def test_the_single_thread_of_accelerate_launch_is_taken_back(
    environment: dict[str, str], device: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5}, raising=False)
    use_all_cores(torch.device(device))
    assert threads == expected


# --------------------------------------------------------------------------- output folder and results


def earlier_run(folder: Path) -> Path:
    for name in ("training_args.bin", "all_results.json", "comparison.json", "model.safetensors", "my_notes.md"):
        (folder / name).write_text("old")
    for name in ("checkpoint-5", "plain/checkpoint-7", "checkpoint-mine", "checkpoint-9"):
        (folder / name).mkdir(parents=True)
        (folder / name / "weights").write_text("old")
    for name in ("checkpoint-5", "plain/checkpoint-7", "checkpoint-mine"):
        (folder / name / "trainer_state.json").write_text("{}")
    return folder


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    folder = earlier_run(tmp_path)
    with pytest.raises(RecipeError, match=r"is not empty.*--overwrite_output_dir.*--resume_from_checkpoint"):
        check_output_dir(str(folder), False, None)
    check_output_dir(str(folder), True, None)
    check_output_dir(str(folder), False, "checkpoint-5")
    clear_output_dir(str(folder))
    # checkpoint-9 holds no trainer state: no Trainer has written it.
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-9", "checkpoint-mine", "my_notes.md"]


@pytest.mark.parametrize("name", ["model.safetensors", "thesis.docx"])
def test_a_folder_of_other_things_is_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(RecipeError, match=rf"does not look like the output of an earlier run.*It holds '{name}'"):
        check_output_dir(str(tmp_path), True, None)


def test_what_the_run_reads_is_not_overwritten(tmp_path: Path) -> None:
    earlier_run(tmp_path)
    with pytest.raises(RecipeError, match=r"holds '.*checkpoint-5', which this run reads"):
        check_output_dir(str(tmp_path), True, None, (None, str(tmp_path / "checkpoint-5")))
    with pytest.raises(RecipeError, match=r"contradict each other"):
        check_output_dir(str(tmp_path), True, "checkpoint-5")
    with pytest.raises(RecipeError, match=r"is a file; name a folder"):
        check_output_dir(str(tmp_path / "my_notes.md"), False, None)


def checkpoint(folder: Path, complete: bool | None = True, trainer_state: str | None = "{}") -> str:
    """A checkpoint that has or lacks the mark of L2-SP (`None`: none) and what Trainer writes last."""
    folder.mkdir(parents=True)
    if complete is not None:
        anchor = {"source": None, "revision": None, "fingerprint": "f", "entries": {}}
        write_json(folder / "l2sp_state.json", {"format_version": 1, "complete": complete, "anchor": anchor})
    if trainer_state is not None:
        (folder / "trainer_state.json").write_text(trainer_state)
    return str(folder)


def test_the_checkpoint_to_resume_from_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, last = checkpoint(tmp_path / "checkpoint-5", None), checkpoint(tmp_path / "checkpoint-12")
    checkpoint(tmp_path / "checkpoint-mine")
    for switched_off in (None, "false", "None"):
        assert find_checkpoint(switched_off, str(tmp_path)) is None
    assert find_checkpoint("True", str(tmp_path)) == last, "12 is after 5"
    assert find_checkpoint(plain, "elsewhere") == plain
    assert capsys.readouterr().out == ""
    with pytest.raises(RecipeError, match=r"'checkpoint-77' is not the folder of a complete .*: there is no such"):
        find_checkpoint("checkpoint-77", str(tmp_path))
    with pytest.raises(RecipeError, match=r"has no checkpoint to go on from; leave the flag out to start anew"):
        find_checkpoint("True", str(tmp_path / "new"))


@pytest.mark.parametrize(
    ("killed", "cause"),
    [
        ({"complete": False, "trainer_state": None}, r"the process that wrote it ended before it was done"),
        ({"complete": False}, r"the process that wrote it ended before it was done"),
        ({"complete": None, "trainer_state": None}, r"it has no trainer_state\.json"),
        ({"complete": None, "trainer_state": '{"epo'}, r"its trainer_state\.json cannot be read"),
    ],
    ids=str,
)
def test_a_checkpoint_whose_writer_was_killed_is_passed_over(
    killed: dict[str, Any], cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = checkpoint(tmp_path / "checkpoint-5")
    half = checkpoint(tmp_path / "checkpoint-10", **killed)
    assert find_checkpoint("True", str(tmp_path)) == whole
    told = capsys.readouterr().out
    assert re.search(rf"'.*checkpoint-10' is not complete \({cause}.*\): training goes on from '.*checkpoint-5'", told)
    with pytest.raises(RecipeError, match=rf"(?s)checkpoint-10' is not .*{cause}.*last complete one there is .*-5'"):
        find_checkpoint(half, str(tmp_path))
    (tmp_path / "checkpoint-5" / "trainer_state.json").unlink()
    with pytest.raises(
        RecipeError, match=rf"no checkpoint to go on from: .*-10'.*{cause}.*-5' .*Delete what is there"
    ):
        find_checkpoint("True", str(tmp_path))


def test_the_table_and_the_comparison_show_scores_alone(tmp_path: Path) -> None:
    plain = {"test_f1_macro": 0.5, "eval_loss": 1.25, "test_runtime": 3.0, "train_runtime": 60.04, "test_samples": 4}
    l2sp = {"test_f1_macro": 0.625, "eval_loss": 1.0, "test_runtime": 3.0, "train_runtime": 61.0, "test_samples": 4}
    assert result_table({"plain": plain, "L2-SP": l2sp}).split("\n") == [
        "                plain   L2-SP  difference",
        "-----------------------------------------",
        "eval_loss      1.2500  1.0000     -0.2500",
        "test_f1_macro  0.5000  0.6250     +0.1250",
        "train_runtime  60.0 s  61.0 s",
    ]
    assert result_table({"L2-SP": l2sp}).split("\n")[3] == "test_f1_macro  0.6250"
    compared = comparison(plain, l2sp, seed=3)
    assert compared == {
        "plain": plain,
        "l2sp": l2sp,
        "difference": {"eval_loss": -0.25, "test_f1_macro": 0.125},
        "seed": 3,
    }
    write_json(tmp_path / "c.json", {"a": [float("nan")], "b": {"c": float("inf"), "d": 1.5}})
    assert json.loads((tmp_path / "c.json").read_text()) == {"a": [None], "b": {"c": None, "d": 1.5}}


def test_scores_are_named_validation_first_and_without_the_rest() -> None:
    metrics = {
        "hard_f1": 0.1,
        "train_runtime": 9.0,
        "train_loss": 0.3,
        "total_flos": 1e9,
        "epoch": 2.0,
        "test_f1": 0.2,
        "test_samples_per_second": 4.0,
        "test_steps_per_second": 4.0,
        "eval_f1": 0.3,
        "eval_runtime": 1.0,
        "eval_model_preparation_time": 0.1,
        "eval_samples": 12,
        "hard_samples": 12,
        "training_f1": 0.5,
    }
    assert score_names(metrics) == ["eval_f1", "test_f1", "hard_f1", "training_f1"]
    assert score_names({}) == []
