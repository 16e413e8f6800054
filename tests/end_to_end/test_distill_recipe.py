"""The distillation recipe on a tiny model: teachers trained and given, its files and table, what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, pipeline

from hf_l2sp.distill import L2SPDistillationArguments, L2SPDistillationTrainer

from .recipe_harness import KNOWN, RECIPES, RESULTS, WORDS, launch, notes, results_of, save_tiny_model

import distill  # noqa: E402  # isort: skip
from _distill_args import DistillArguments, load_texts  # noqa: E402  # isort: skip
from _distill_teachers import Teacher, ask, average, scores_of  # noqa: E402  # isort: skip
from _recipe_args import DataArguments  # noqa: E402  # isort: skip

SHOTS, TWO = ["--shots", "3"], ["--ensemble", "2"]
LABELS = list(WORDS)


def run(*words: str) -> None:
    distill.main(list(words))


@pytest.fixture(scope="module")
def finished(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and printed text of a run with two teachers that are kept, and --compare."""
    folder = tmp_path_factory.mktemp("out") / "notes"
    words = ["--save_strategy", "steps", "--save_steps", "10", "--save_total_limit", "5"]
    said = io.StringIO()
    # transformers 4 leaves settings in the environment, which the tests of other modules must not find.
    with contextlib.redirect_stdout(said), mock.patch.dict(os.environ):
        run(*arguments, *SHOTS, *words, "--output_dir", str(folder), "--compare", *TWO, "--keep_teachers")
    return folder, said.getvalue()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder: Path, other: Path) -> None:
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, different


# --------------------------------------------------------------------------- results


def test_all_files_of_the_contract_are_written(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    present = {path.name for path in folder.iterdir()}
    assert RESULTS | {"comparison.json", "teachers"} <= present
    assert "without_teacher" not in present
    assert {path.name for path in (folder / "teachers").iterdir()} == {"seed-42", "seed-43"}
    heads = [weights(folder / "teachers" / f"seed-{seed}")["classifier.weight"] for seed in (42, 43)]
    assert not torch.equal(*heads)
    results = results_of(folder)
    for prefix in ("eval", "test"):
        assert {f"{prefix}_{name}" for name in ("accuracy", "f1_macro", "mcc", "ece", "loss")} <= set(results)
    # 9 labelled and 15 unlabelled texts.
    assert (results["train_samples"], results["eval_samples"], results["test_samples"]) == (24, 12, 18)
    assert results["test_f1_macro"] > 0.6, "the task is easy; the student has not learned it"
    assert json.loads((folder / "l2sp_report.json").read_text())["total"]["drift"] > 0


def test_the_result_is_a_pipeline_with_label_names(finished: tuple[Path, str]) -> None:
    for folder in (finished[0], finished[0] / "teachers" / "seed-43"):
        classify = pipeline("text-classification", model=str(folder), device="cpu")
        (answer,) = classify("today some weeks rash itch")
        assert answer["label"] in LABELS and 0.34 < answer["score"] < 1


def test_the_saved_arguments_need_no_recipe_to_be_loaded(finished: tuple[Path, str]) -> None:
    args = torch.load(finished[0] / "training_args.bin", weights_only=False)
    assert type(args) is L2SPDistillationArguments and args.distill_teacher is None


def test_what_is_compared(finished: tuple[Path, str]) -> None:
    folder, text = finished
    compared = json.loads((folder / "comparison.json").read_text())
    alone, distilled = compared["labels_alone"], compared["distilled"]
    assert distilled == results_of(folder)
    assert alone["train_samples"] == 9 and compared["difference"]["test_f1_macro"] == pytest.approx(
        distilled["test_f1_macro"] - alone["test_f1_macro"]
    )
    # As many steps, though the labelled texts are fewer: 24 texts in batches of 8, eight times.
    state = json.loads((folder / "trainer_state.json").read_text())
    assert compared["optimizer_steps"] == state["global_step"] == 24
    assert alone["epoch"] == pytest.approx(24 / 2) and distilled["epoch"] == 8
    assert (compared["labelled"], compared["unlabelled"], compared["teachers"], compared["shots"]) == (9, 15, 2, 3)
    assert compared["config"]["distill_alpha"] == 0.9 and "distill_loss" in state["log_history"][0]
    columns = r"^ +labels alone +teachers, mean +ensemble of 2 +distilled +difference$"
    assert re.search(columns, text, flags=re.MULTILINE), text
    row = re.search(r"^test_f1_macro +(\S+) +(\S+) +(\S+) +(\S+) +(\S+)$", text, flags=re.MULTILINE)
    assert row is not None
    shown = (alone, compared["teachers_mean"], compared["ensemble"], distilled)
    assert row.groups()[:4] == tuple(f"{scores['test_f1_macro']:.4f}" for scores in shown)
    assert "students: 24 optimizer steps each" in text
    assert "1 of 4: the student without a teacher, 24 steps on the labelled texts" in text
    assert "3 of 4: teacher, seed 43" in text and "4 of 4: the student" in text
    assert "labels of 9 rows, drawn by seed 42, are used; the other training texts" in text


def test_the_card_names_no_path(finished: tuple[Path, str], tiny_model: str) -> None:
    for name in ("README.md", "config.json", "comparison.json"):
        text = (finished[0] / name).read_text()
        assert tiny_model not in text and str(finished[0]) not in text, name


# --------------------------------------------------------------------------- teachers


def test_kept_teachers_teach_again(finished: tuple[Path, str], arguments: list[str], tmp_path: Path) -> None:
    """The same student comes of them, when they are given by their folders."""
    folder, teachers = finished[0], [str(finished[0] / "teachers" / f"seed-{seed}") for seed in (42, 43)]
    run(*arguments, *SHOTS, "--output_dir", str(tmp_path / "out"), "--teacher", *teachers)
    assert_same_weights(tmp_path / "out", folder)
    # And none of them, nor any of the given ones, is left where the student is.
    assert not (tmp_path / "out" / "teachers").exists()


def test_a_teacher_may_have_another_vocabulary_and_order_of_labels(
    finished: tuple[Path, str], arguments: list[str], tmp_path: Path
) -> None:
    """The same teacher with its tokens and its labels numbered otherwise says the same."""
    folder = finished[0] / "teachers" / "seed-42"
    other = tmp_path / "other"
    save_tiny_model(other, KNOWN[::-1])
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings.copy_(torch.cat([embeddings[:5], embeddings[5:].flip(0)]))
        for parameter in model.classifier.parameters():
            parameter.copy_(parameter[[2, 0, 1]])
    model.config.id2label = {0: "skin", 1: "heart", 2: "lung"}
    model.config.label2id = {name: number for number, name in model.config.id2label.items()}
    model.save_pretrained(other)
    assert AutoTokenizer.from_pretrained(other).get_vocab() != AutoTokenizer.from_pretrained(folder).get_vocab()
    for name, teacher in (("one", folder), ("two", other)):
        run(*arguments, *SHOTS, "--output_dir", str(tmp_path / name), "--teacher", str(teacher), "--max_steps", "4")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


def test_every_text_has_its_own_answer(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Whatever their lengths, by which they are asked about."""
    folder = finished[0] / "teachers" / "seed-42"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    texts = {
        "train": ["rash", "pulse valve today for two", "cough wheeze"],
        "test": ["itch mole blister some", "beat"],
    }
    tokenized = {split: datasets.Dataset.from_dict(dict(tokenizer(part))) for split, part in texts.items()}
    args = L2SPDistillationArguments(
        output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=2
    )
    answers = ask(Teacher("it", model.train(), tokenizer), tokenized, LABELS, args)
    for split, part in texts.items():
        expected = torch.cat([model.eval()(**tokenizer(text, return_tensors="pt")).logits for text in part])
        torch.testing.assert_close(answers[split], expected.detach(), rtol=1e-4, atol=1e-5)


def test_scores_of_answers_are_those_of_the_trainer(finished: tuple[Path, str], tmp_path: Path) -> None:
    compared = json.loads((finished[0] / "comparison.json").read_text())
    rows = notes(6, 2)  # the test texts
    answers = []
    for seed in (42, 43):
        folder = finished[0] / "teachers" / f"seed-{seed}"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        tokens = datasets.Dataset.from_dict(dict(tokenizer([row["text"] for row in rows])))
        args = L2SPDistillationArguments(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True)
        answers.append(ask(Teacher(str(seed), model, tokenizer), {"test": tokens}, LABELS, args))
    labels = {"test": [LABELS.index(row["label"]) for row in rows]}
    each = [scores_of(one, labels) for one in answers]
    for name in ("loss", "f1_macro", "ece"):
        mean = sum(scores[f"test_{name}"] for scores in each) / 2
        assert compared["teachers_mean"][f"test_{name}"] == pytest.approx(mean, abs=1e-6)
        ensemble = scores_of(average(answers), labels)[f"test_{name}"]
        assert compared["ensemble"][f"test_{name}"] == pytest.approx(ensemble, abs=1e-6)
    mean = torch.stack([one["test"].softmax(-1) for one in answers]).mean(0)
    torch.testing.assert_close(average(answers)["test"].softmax(-1).float(), mean)


# --------------------------------------------------------------------------- texts


def test_embedded_texts_lose_their_labels() -> None:
    data = DataArguments()
    splits, unlabelled, notes = load_texts(data, DistillArguments(), distill.EMBEDDED_DATA, 42)
    assert data.shots == 8 and len(splits["train"]) == 64 and len(unlabelled) == 96
    assert not set(splits["train"].texts) & set(unlabelled)
    assert not set(splits["test"].texts) & {*splits["train"].texts, *unlabelled}
    assert any("the other training texts are taken without theirs" in note for note in notes)


def test_unlabelled_file(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts of test and of training are told of, and the latter not used twice; all labels are used."""
    test = [row["text"] for row in notes(6, 2)][:2]
    train = [row["text"] for row in notes(8, 0)][:3]
    file = tmp_path / "many.txt"
    file.write_text("\n".join([*test, *train, "rash itch today", "rash itch today", "cough two"]) + "\n")
    folder = tmp_path / "out"
    words = ["--unlabelled_file", str(file), "--ensemble", "1", "--max_steps", "2", "--predict_file", str(file)]
    run(*arguments, *words, "--predict_output", str(tmp_path / "said.jsonl"), "--output_dir", str(folder))
    text = capsys.readouterr().out
    assert "data    24 labelled, 4 unlabelled, 12 validation, 18 test" in text
    assert "4 of the unlabelled texts are there already; they are left out" in text
    assert "2 test texts are unlabelled texts too; results on them flatter the model" in text
    assert results_of(folder)["train_samples"] == 28
    assert re.search(r"^ +teacher +distilled$", text, flags=re.MULTILINE), text
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"checkpoint-2"}
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 8


# --------------------------------------------------------------------------- a run's life


def test_resumed_is_uninterrupted(finished: tuple[Path, str], arguments: list[str], tmp_path: Path) -> None:
    """The teachers are trained again, and become the same ones."""
    shutil.copytree(finished[0] / "checkpoint-10", tmp_path / "cut" / "checkpoint-10")
    run(*arguments, *SHOTS, *TWO, "--output_dir", str(tmp_path / "cut"), "--resume_from_checkpoint")
    assert json.loads((tmp_path / "cut" / "trainer_state.json").read_text())["global_step"] == 24
    assert_same_weights(tmp_path / "cut", finished[0])


def test_overwriting_takes_kept_teachers_away(
    finished: tuple[Path, str], arguments: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(finished[0], folder)
    (folder / "teachers" / "seed-43" / "mine.txt").write_text("kept")
    words = [*arguments, *SHOTS, "--ensemble", "1", "--max_steps", "1", "--keep_teachers", "--overwrite_output_dir"]
    run(*words, "--output_dir", str(folder))
    assert not (folder / "comparison.json").exists()
    assert {path.name for path in (folder / "teachers" / "seed-43").iterdir()} == {"mine.txt"}
    assert (folder / "teachers" / "seed-42" / "model.safetensors").is_file()


@pytest.mark.distributed
def test_two_processes_are_one(arguments: list[str], tmp_path: Path) -> None:
    """Plain gradient descent on numbers of texts that come out even, so that the weights can be compared."""
    file = tmp_path / "many.txt"
    file.write_text("\n".join(f"patient reports {word} {n}" for n in ("two", "more") for word in KNOWN[-4:]))
    words = [*arguments, "--unlabelled_file", str(file), *TWO, "--max_steps", "4", "--keep_teachers", "--compare"]
    words += ["--optim", "sgd", "--learning_rate", "0.1", "--max_grad_norm", "0"]
    run(*words, "--output_dir", str(tmp_path / "one"))
    words += ["--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "two")]
    code, out, err = launch("cpu_ddp", str(RECIPES / "distill.py"), *words)
    assert code == 0, err
    assert out.count("4 of 4: the student") == 1
    for part in ("", "teachers/seed-42", "teachers/seed-43"):
        one, two = weights(tmp_path / "one" / part), weights(tmp_path / "two" / part)
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------- refusals

REFUSALS = {
    "no alpha": (["--distill_alpha", "0"], r"--distill_alpha 0 leaves the teachers out; give more than 0"),
    "alpha": (["--distill_alpha", "2"], r"distill_alpha=2\.0 is a weight beside 1 − α; give 0 to 1"),
    "temperature": (["--distill_temperature", "0"], r"distill_temperature=0\.0 divides the logits"),
    "no ensemble": (["--ensemble", "0"], r"--ensemble 0 must be at least 1"),
    "no epochs": (["--teacher_epochs", "nan"], r"--teacher_epochs nan must be more than 0"),
    "both": (["--teacher", "x", "--ensemble", "2"], r"--ensemble is for teachers that are fine-tuned here"),
    "pushed": (["--keep_teachers", "--push_to_hub"], r"--push_to_hub uploads all of the output folder"),
    "twice": (["--teacher", "x", "y", "x"], r"--teacher names 'x'; name each teacher once"),
    "wrong path": (["--teacher", "./nowhere"], r"--teacher './nowhere' does not exist"),
    "no texts": (["--shots", "8"], r"there are no unlabelled texts, none beside the 24 labelled ones"),
    "no shots": ([], r"the training texts: there are no unlabelled texts.*--unlabelled_file, or with --shots K"),
    "wrong file": (["--unlabelled_file", "many.txt"], r"--unlabelled_file 'many\.txt' does not exist"),
    "other teacher flag": (["--distill_teacher", "x"], r"unknown argument '--distill_teacher'"),
    "predicting": (
        ["--predict_only", "--predict_file", "x.txt", "--predict_output", "y.jsonl", "--ensemble", "2"],
        r"--predict_only trains nothing, so --\w+ contradicts it",
    ),
}


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (Trainer, L2SPDistillationTrainer):
        monkeypatch.setattr(cls, "train", lambda *args, **kwargs: pytest.fail("it was trained"))


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(
    name: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], no_training: None
) -> None:
    words, message = REFUSALS[name]
    shots = [] if name in ("no texts", "no shots") else SHOTS
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, *shots, *words, "--output_dir", str(tmp_path / "out"))
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and re.search(message, error), error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["labels", "untrained", "no tokenizer", "read"])
def test_unfit_teachers_are_refused(
    kind: str,
    finished: tuple[Path, str],
    tiny_model: str,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    no_training: None,
) -> None:
    teacher, out, more = tmp_path / "teacher", tmp_path / "out", []
    shutil.copytree(finished[0] / "teachers" / "seed-42", teacher)
    message = ""
    if kind == "labels":
        config = json.loads((teacher / "config.json").read_text())
        config["id2label"]["2"] = "eye"
        (teacher / "config.json").write_text(json.dumps(config))
        message = r"--teacher '.*': The teacher .* only the teacher has 'eye', only the student 'skin'\. Set config"
    elif kind == "untrained":
        teacher, message = Path(tiny_model), r"--teacher '.*' has no trained classification head: .*Fine-tune it first"
    elif kind == "no tokenizer":
        for path in teacher.glob("tokenizer*"):
            path.unlink()
        message = r"--teacher '.*'.* tokenizer"
    else:
        out, more = teacher, ["--overwrite_output_dir"]
        message = r"holds '.*teacher', which this run reads"
    with pytest.raises(SystemExit):
        run(*arguments, *SHOTS, "--teacher", str(teacher), "--output_dir", str(out), *more)
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_the_yaml_file_of_the_recipe_is_understood() -> None:
    path = RECIPES / "configs" / "distill.yaml"
    assert "#   accelerate launch recipes/distill.py --config recipes/configs/distill.yaml\n" in path.read_text()
    _, data, teaching, *_, settings = distill.make_parser().parse(["--config", str(path), "--teacher", "a", "b"])
    assert data.train_file == "data/few.csv" and teaching.teacher == ["a", "b"] and teaching.keep_teachers
    args = settings.build(L2SPDistillationArguments)
    assert args.load_best_model_at_end and (args.distill_alpha, args.distill_temperature) == (0.9, 2.0)
