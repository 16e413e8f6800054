"""The λ search on a tiny model: path, table and picture, the chosen model, going on after a kill, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import pipeline

from hf_l2sp.run_folder import RunFolder

from .recipe_harness import RECIPES, RESULTS, notes, results_of, write_jsonl

import _lambda_search  # noqa: E402  # isort: skip
import lambda_search  # noqa: E402  # isort: skip
import medical_textcls  # noqa: E402  # isort: skip
from _lambda_path import Point, RegularisationPath  # noqa: E402  # isort: skip
from _recipe_args import RecipeError  # noqa: E402  # isort: skip

SEARCH = ["--lambdas", "0", "0.03", "3", "--schedules", "constant", "--num_train_epochs", "4"]


def path_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "lambda_search.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and printed text of a search with --compare. Read only."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("search") / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        lambda_search.main([*arguments, *SEARCH, "--compare", "--output_dir", str(folder)])
    return folder, printed.getvalue()


# --------------------------------------------------------------------------- results


def test_path_has_scores_and_drift_of_every_strength(finished: tuple[Path, str]) -> None:
    folder, text = finished
    content = path_of(folder)
    runs = content["runs"]
    assert [(run["lambda"], run["schedule"]) for run in runs] == [
        (0.0, "constant"),
        (0.03, "constant"),
        (3.0, "constant"),
    ]
    assert runs[0]["drift"] > runs[1]["drift"] > runs[2]["drift"] > 0
    for run in runs:
        assert {"eval_f1_macro", "eval_loss", "eval_ece", "test_f1_macro", "test_loss"} <= set(run["scores"])
    best = min(runs, key=lambda run: run["scores"]["eval_loss"])
    assert content["best"] == {"lambda": best["lambda"], "schedule": "constant", "metric": "eval_loss"}
    assert content["about"]["rows"] == {"train": 24, "validation": 12, "test": 18}
    assert (folder / "lambda_search.png").read_bytes().startswith(b"\x89PNG")
    row = next(line for line in text.splitlines() if line.strip().startswith(f"{best['lambda']:g} *"))
    assert f"{best['scores']['test_f1_macro']:.4f}" in row and f"{best['drift']:.2%}" in row
    assert "4 of 4: the model, with lambda" in text and "the best by eval_loss" in text


def test_chosen_model_is_that_of_its_training(
    finished: tuple[Path, str], arguments: list[str], tmp_path: Path
) -> None:
    folder, _ = finished
    content = path_of(folder)
    assert RESULTS | {"comparison.json", "lambda_search.json", "lambda_search.png"} <= {
        p.name for p in folder.iterdir()
    }
    (best,) = (run for run in content["runs"] if run["lambda"] == content["best"]["lambda"])
    results = results_of(folder)
    for name in ("eval_loss", "test_f1_macro", "test_loss"):
        assert results[name] == pytest.approx(best["scores"][name], abs=1e-6)
    state = json.loads((folder / "l2sp_state.json").read_text())
    assert (state["strength"]["base"], state["strength"]["schedule"]) == (best["lambda"], "constant")
    medical_textcls.main(
        [*arguments, *SEARCH[-2:], "--l2sp_lambda", str(best["lambda"]), "--output_dir", str(tmp_path / "alone")]
    )
    alone, chosen = (load_file(at / "model.safetensors") for at in (tmp_path / "alone", folder))
    assert all((alone[name] == value).all() for name, value in chosen.items())
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    assert classify("rash itch today")[0]["label"] in ("heart", "lung", "skin")


def test_comparison_is_with_strength_0(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    compared = json.loads((folder / "comparison.json").read_text())
    assert compared["plain"] == path_of(folder)["runs"][0]["scores"]
    assert (
        compared["l2sp"] == results_of(folder)
        and compared["config"]["l2sp_lambda"] == path_of(folder)["best"]["lambda"]
    )
    assert RunFolder(folder).strength == path_of(folder)["best"]["lambda"]


def test_nothing_private_or_left_over_is_in_the_folder(finished: tuple[Path, str], tiny_model: str) -> None:
    folder, _ = finished
    assert not [path for path in folder.iterdir() if path.name == "search" or path.name.startswith(".")]
    text = (folder / "lambda_search.json").read_text()
    assert tiny_model not in text and str(folder.parent) not in text


# --------------------------------------------------------------------------- going on


def test_killed_search_repeats_no_finished_training(
    arguments: list[str], finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    measured: list[str] = []
    measure = _lambda_search.SearchRun._measure

    def watched(self: Any, point: Point, *rest: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(point.name)
        return measure(self, point, *rest)

    monkeypatch.setattr(_lambda_search.SearchRun, "_measure", watched)
    command = [*arguments, *SEARCH, "--output_dir", str(folder)]
    with pytest.raises(KeyboardInterrupt):
        lambda_search.main(command)
    assert measured == ["0", "0.03"] and len(path_of(folder)["runs"]) == 2
    measured.clear()
    lambda_search.main([*command, "--resume_from_checkpoint"])
    assert measured == ["3"]
    whole, resumed = path_of(finished[0]), path_of(folder)
    for first, second in zip(whole["runs"], resumed["runs"], strict=True):
        assert first["drift"] == second["drift"]
        assert first["scores"]["eval_loss"] == second["scores"]["eval_loss"]
    assert whole["best"] == resumed["best"]
    assert results_of(folder)["test_loss"] == results_of(finished[0])["test_loss"]
    # More values, afterwards.
    measured.clear()
    more = [word if word != "3" else "0.3" for word in command]
    lambda_search.main([*more, "--resume_from_checkpoint"])
    assert measured == ["0.3"] and [run["lambda"] for run in path_of(folder)["runs"]] == [0.0, 0.03, 0.3, 3.0]


def test_courses_and_another_score(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--lambdas", "0", "0.1", "--schedules", "constant", "linear", "--metric_for_best_model", "ece"]
    lambda_search.main([*arguments, *words, "--max_steps", "4", "--output_dir", str(tmp_path / "out")])
    content = path_of(tmp_path / "out")
    assert [(run["lambda"], run["schedule"]) for run in content["runs"]] == [
        (0.0, "constant"),
        (0.1, "constant"),
        (0.1, "linear"),
    ]
    best = min(content["runs"], key=lambda run: run["scores"]["eval_ece"])
    assert content["best"] == {"lambda": best["lambda"], "schedule": best["schedule"], "metric": "eval_ece"}
    assert "0.1 linear" in capsys.readouterr().out


def test_decoupled_pull_with_a_fisher_is_searched_too(arguments: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    words = ["--lambdas", "0", "10", "--l2sp_mode", "decoupled", "--l2sp_fisher_samples", "6", "--l2sp_beta", "1"]
    lambda_search.main([*arguments, *words, "--max_steps", "4", "--output_dir", str(folder)])
    assert len(path_of(folder)["runs"]) == 2 and not (folder / "search").exists()


def test_second_search_replaces_the_first_when_told_so(arguments: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").touch()
    (folder / "lambda_search.json").write_text("{}")  # all that a killed search has left
    command = [*arguments, "--lambdas", "0.1", "--max_steps", "2", "--output_dir", str(folder)]
    lambda_search.main([*command, "--overwrite_output_dir"])
    assert (folder / "mine.txt").is_file() and len(path_of(folder)["runs"]) == 2


def test_auto_is_marked_with_the_strength_that_it_found(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    marked: list[float] = []
    mark = RegularisationPath._mark_found
    monkeypatch.setattr(
        RegularisationPath,
        "_mark_found",
        lambda path, axis, value, *rest: (marked.append(value), mark(path, axis, value, *rest)),
    )
    words = ["--lambdas", "0", "0.1", "--num_train_epochs", "6", "--output_dir", str(folder)]
    lambda_search.main([*arguments, *words])
    runs = path_of(folder)["runs"]
    assert [run["schedule"] for run in runs] == ["constant", "constant", "auto"]
    assert ["found_lambda" in run for run in runs] == [False, False, True]
    found = runs[-1]["found_lambda"]
    assert 1e-6 <= found <= 1.0 and f"auto ({found:.2g})" in capsys.readouterr().out
    scores = runs[-1]["scores"]
    assert marked == [
        scores["eval_f1_macro"],
        scores["test_f1_macro"],
        scores["eval_loss"],
        scores["test_loss"],
        100.0 * runs[-1]["drift"],
    ]
    kept = RegularisationPath.resumed(folder / "lambda_search.json", path_of(folder)["about"])
    assert kept.found == {Point("auto", 0.01): found}


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lambdas", "-1"], "--lambdas=-1.0 must be a finite number >= 0"),
        (["--lambdas", "nan"], "--lambdas=nan must be a finite number"),
        (["--schedules", "step"], "--schedules step is unknown; give one or more of constant, linear, cosine, auto"),
        (["--l2sp_lambda", "0.1"], "--l2sp_lambda"),
        (["--l2sp_schedule", "linear"], "--l2sp_schedule"),
        (["--l2sp_mode", "decoupled", "--schedules", "auto"], "l2sp_schedule='auto' finds λ in units of the loss"),
        (["--resume_from_checkpoint"], "has no lambda_search.json to go on from; leave the flag out"),
        (["--resume_from_checkpoint", "some/checkpoint-3"], "a search goes on from the lambda_search.json"),
        (
            ["--metric_for_best_model", "bleu", "--max_steps", "1", "--lambdas", "0"],
            "there is no 'eval_bleu'; it is one",
        ),
    ],
)
def test_refusals(
    words: list[str], message: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        lambda_search.main([*arguments, "--output_dir", str(tmp_path / "out"), *words])
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--learning_rate", "1e-3"], "learning_rate 0.005 there, 0.001 now"),
        (["--seed", "1"], "seed 42 there, 1 now"),
        (["--shots", "2"], "are not comparable"),
        (None, "texts "),
    ],
)
def test_trainings_that_do_not_compare_are_refused(
    finished: tuple[Path, str],
    change: list[str] | None,
    message: str,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "out")
    words = change or ["--train_file", write_jsonl(tmp_path / "other.jsonl", notes(8, 99))]
    with pytest.raises(SystemExit, match="1"):
        lambda_search.main([*arguments, *SEARCH, "--resume_from_checkpoint", "--output_dir", str(folder), *words])
    error = capsys.readouterr().err
    assert "are not comparable" in error and message in error
    assert path_of(folder) == path_of(finished[0])


def test_damaged_path_is_refused(
    finished: tuple[Path, str], arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "out")
    (folder / "lambda_search.json").write_text(json.dumps(path_of(folder))[:-40])
    with pytest.raises(SystemExit, match="1"):
        lambda_search.main([*arguments, *SEARCH, "--resume_from_checkpoint", "--output_dir", str(folder)])
    assert "cannot be read" in capsys.readouterr().err


def test_results_are_not_overwritten_unasked(
    finished: tuple[Path, str], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        lambda_search.main([*arguments, *SEARCH, "--output_dir", str(finished[0])])
    assert "is not empty" in capsys.readouterr().err


# --------------------------------------------------------------------------- the path by itself


def test_best_prefers_the_stronger_pull_and_knows_no_nan(tmp_path: Path) -> None:
    path = RegularisationPath(tmp_path / "x.json", {})
    for strength, loss in ((0.0, 0.5), (0.1, 0.4), (1.0, 0.4), (10.0, float("nan"))):
        path.add(Point("constant", strength), {"eval_loss": loss, "eval_f1": -loss}, None)
    assert path.best("eval_loss").strength == 1.0 and path.best("eval_f1").strength == 1.0
    assert path.best("eval_loss", greater=True).strength == 0.0
    diverged = RegularisationPath(tmp_path / "x.json", {})
    diverged.add(Point("constant", 0.1), {"eval_loss": float("nan")}, None)
    with pytest.raises(RecipeError, match="eval_loss is NaN for every λ"):
        diverged.best("eval_loss")


def test_scores_that_are_no_numbers_survive_the_file(tmp_path: Path) -> None:
    about = {"model": "m", "data": "d", "seed": 1, "config": {"betas": (0.9, 0.99), "versions": {"torch": "1"}}}
    path = RegularisationPath(tmp_path / "x.json", about)
    path.add(Point("auto", 0.01), {"eval_loss": float("nan"), "eval_f1": 0.5}, None)
    path.save()
    again = RegularisationPath.resumed(tmp_path / "x.json", {**about, "config": {**about["config"], "versions": {}}})
    (point,) = again.scores
    assert point == Point("auto", 0.01) and again.scores[point]["eval_loss"] != again.scores[point]["eval_loss"]
    assert again.drifts == {point: None} and "NaN" not in (tmp_path / "x.json").read_text()
    again.draw(point, "eval_f1")


def test_config_names_arguments_of_the_recipe() -> None:
    words = ["--config", str(RECIPES / "configs" / "lambda_search.yaml")]
    _, _, search, *_, settings = lambda_search.make_parser().parse(words)
    assert (
        search.lambdas == [0, 0.01, 0.1, 1]
        and search.schedules == ["constant", "auto"]
        and settings["metric_for_best_model"] == "loss"
    )
