"""The named-entity recipes as a user runs them, on a tiny model: their files, their table, what they predict."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

from hf_l2sp.entity_scores import entity_scores

from .ner_harness import KNOWN, entity_words, read_jsonl, sentences, tagged, write_conll
from .recipe_harness import RECIPES, RESULTS, launch, results_of, save_tiny_model, write_jsonl

import clinical_ner  # noqa: E402  # isort: skip
import finance_ner  # noqa: E402  # isort: skip
from _ner_extract import extract  # noqa: E402  # isort: skip

SPLITS = ("train", "validation", "test")
TEXTS = [
    "The patient reports ((fever)) - more [chest   pain], some aspirin!",
    "👍 我 aspirin\u00a0forte,insulin;skin rash.",
    "today 👍🏽👩‍⚕️",
    "Fever... (Insulin)",
]
FOUND = [
    [("PROBLEM", "fever"), ("PROBLEM", "chest   pain"), ("DRUG", "aspirin")],
    [("DRUG", "aspirin\u00a0forte"), ("DRUG", "insulin"), ("PROBLEM", "skin rash")],
    [],
    [("PROBLEM", "Fever"), ("DRUG", "Insulin")],
]


@pytest.fixture(scope="module")
def ner_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("ner_model"), KNOWN)


@pytest.fixture(scope="module")
def command(ner_model: str) -> list[str]:
    """Model and training arguments with which the task is learned in seconds."""
    words = ["--model_name_or_path", ner_model, "--max_seq_length", "20", "--stride", "6", "--disable_tqdm", "true"]
    return [*words, "--learning_rate", "5e-3", "--num_train_epochs", "8", "--per_device_train_batch_size", "8"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("ner_data")
    counts = zip(SPLITS, (150, 20, 30), strict=True)
    paths = [
        (split, write_jsonl(folder / f"{split}.jsonl", sentences(count, seed)))
        for seed, (split, count) in enumerate(counts)
    ]
    return [word for split, path in paths for word in (f"--{split}_file", path)]


@pytest.fixture(scope="module")
def finished(command: list[str], files: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and printed text of a run with everything."""
    folder = tmp_path_factory.mktemp("ner_out")
    texts = write_jsonl(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    words = ["--compare", "--shots", "70", "--augment", "swap", "--l2sp_lambda", "1e-3"]
    words += ["--predict_file", texts, "--predict_output", str(folder / "entities.jsonl")]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        clinical_ner.main([*command, *files, *words, "--output_dir", str(folder / "out")])
    return folder / "out", text.getvalue()


# --------------------------------------------------------------------------- results


def test_all_files_of_the_contract_are_written(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert RESULTS | {"comparison.json"} <= {path.name for path in folder.iterdir()}
    results = results_of(folder)
    for prefix in ("eval", "test"):
        kinds = ("", "DRUG_", "PROBLEM_")
        scores = {f"{prefix}_{kind}{name}" for kind in kinds for name in ("precision", "recall", "f1")}
        assert scores | {f"{prefix}_f1_macro", f"{prefix}_loss"} <= set(results)
    assert {"train_loss", "train_runtime"} <= set(results)
    assert results["test_f1"] > 0.9, "the task is easy; the model has not learned it"
    assert json.loads((folder / "l2sp_report.json").read_text())["total"]["drift"] > 0
    compared = json.loads((folder / "comparison.json").read_text())
    assert compared["l2sp"] == results and set(compared["plain"]) == set(results)
    assert (compared["shots"], compared["stride"], compared["augment"]) == (70, 6, ["swap"])


def test_the_run_says_what_it_does_and_how_to_use_the_result(finished: tuple[Path, str]) -> None:
    folder, text = finished
    assert text.startswith("Clinical entities\n")
    assert "labels  5: O, B-DRUG, I-DRUG, B-PROBLEM, I-PROBLEM" in text
    drawn = re.search(r"--shots 70: training on (\d+) sentences", text)
    copies = re.search(r"--augment swap: (\d+) edited copies of the (\d+) training rows are added", text)
    assert drawn is not None and copies is not None, text
    assert drawn.group(1) == copies.group(2) and 70 <= int(drawn.group(1)) < 150
    # A sentence whose tokens outside of entities are fewer than two has no other order.
    assert 20 < int(copies.group(1)) <= int(drawn.group(1))
    assert f"data    {drawn.group(1)} train, 20 validation, 30 test\n" in text
    assert re.search(r"^test_DRUG_f1 +[01]\.\d{4} +[01]\.\d{4} +[+-]\d\.\d{4}$", text, flags=re.MULTILINE), text
    assert f'pipeline("token-classification", model="{folder}", aggregation_strategy="simple")' in text
    assert f"recipes/clinical_ner.py --predict_only --model_name_or_path '{folder}'" in text
    assert "--max_seq_length 20\n" in text


def test_the_result_is_a_pipeline_that_agrees_with_the_recipe(finished: tuple[Path, str]) -> None:
    folder = str(finished[0])
    find = pipeline("token-classification", model=folder, aggregation_strategy="simple", device="cpu")
    found = [
        [(entity["entity_group"], text[entity["start"] : entity["end"]]) for entity in find(text)] for text in TEXTS
    ]
    assert found == FOUND
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.eval()
    own = extract(TEXTS, model, tokenizer, max_length=20, stride=6)
    assert [[(entity["entity_group"], entity["word"]) for entity in entities] for entities in own] == FOUND


def test_the_card_names_the_task_and_no_path(finished: tuple[Path, str], ner_model: str) -> None:
    card = (finished[0] / "README.md").read_text()
    data = yaml.safe_load(card.split("---\n")[1])
    assert {"l2-sp", "hf-l2sp"} <= set(data["tags"]) and "1802.01483" in card
    for name in ("README.md", "config.json", "comparison.json"):
        text = (finished[0] / name).read_text()
        assert ner_model not in text and str(finished[0].parent) not in text, name


def test_accumulation_does_not_inflate_the_task_gradient(command: list[str], files: list[str], tmp_path: Path) -> None:
    # Plain gradient descent shows the size of the gradient; sentences of equal length make equal means.
    rows = [row for row in sentences(300, 7) if len(row["tokens"]) == 7]
    train = ["--train_file", write_jsonl(tmp_path / "equal.jsonl", rows[:32]), *files[2:]]
    common = [*command, *train, "--optim", "sgd", "--learning_rate", "0.1", "--max_steps", "3", "--max_grad_norm", "0"]
    weights = []
    for name, batch, steps in (("whole", "8", "1"), ("parts", "2", "4")):
        folder = str(tmp_path / name)
        batches = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", steps]
        clinical_ner.main([*common, *batches, "--output_dir", folder])
        weights.append(load_file(f"{folder}/model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(
            weights[1][name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_every_form_of_the_data_gives_the_same_run(command: list[str], tmp_path: Path) -> None:
    names = ["O", "B-DRUG", "I-DRUG", "B-PROBLEM", "I-PROBLEM"]
    short = [*command, "--max_steps", "2"]
    results = []
    for form in ("strings", "integers", "conll"):
        folder = tmp_path / form
        folder.mkdir()
        words = [*short, *(["--tag_names", *names] if form == "integers" else [])]
        for seed, split in enumerate(SPLITS):
            rows = sentences(12, seed)
            if form == "integers":
                rows = [{**row, "ner_tags": [names.index(tag) for tag in row["ner_tags"]]} for row in rows]
            path = folder / f"{split}.{'conll' if form == 'conll' else 'jsonl'}"
            words += [f"--{split}_file", write_conll(path, rows) if form == "conll" else write_jsonl(path, rows)]
        clinical_ner.main([*words, "--output_dir", str(folder / "out")])
        results.append(
            {name: value for name, value in results_of(folder / "out").items() if name.startswith("test_l")}
        )
    assert results[0] == results[1] == results[2] and "test_loss" in results[0]


# --------------------------------------------------------------------------- predictions


def places_are_exact(rows: list[dict[str, Any]]) -> bool:
    return all(
        row["text"][entity["start"] : entity["end"]] == entity["word"] and 0 < entity["score"] <= 1
        for row in rows
        for entity in row["entities"]
    )


def predict(finished: tuple[Path, str], file: str, output: Path, *words: str) -> list[dict[str, Any]]:
    command = ["--predict_only", "--model_name_or_path", str(finished[0]), "--max_seq_length", "20", "--stride", "6"]
    command += ["--predict_file", file, "--predict_output", str(output), "--disable_tqdm", "true"]
    clinical_ner.main([*command, *words])
    return read_jsonl(output)


def test_entities_in_raw_text_have_exact_places(finished: tuple[Path, str]) -> None:
    rows = read_jsonl(finished[0].parent / "entities.jsonl")
    assert [row["text"] for row in rows] == TEXTS and places_are_exact(rows)
    assert [[(entity["entity_group"], entity["word"]) for entity in row["entities"]] for row in rows] == FOUND
    assert {tuple(row) for row in rows} == {("text", "entities")}
    assert list(rows[0]["entities"][0]) == ["entity_group", "score", "word", "start", "end"]


def test_prediction_alone_gives_what_training_gave(finished: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    rows = predict(finished, str(tmp_path / "texts.txt"), tmp_path / "new" / "entities.jsonl")
    assert rows == read_jsonl(finished[0].parent / "entities.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "texts.txt"], "nothing else is written"


def test_lists_of_tokens_get_a_tag_each(finished: tuple[Path, str], tmp_path: Path) -> None:
    rows = [tagged(text) for text in ("the chest pain ; aspirin forte", "fever", "more  some\u00a0 insulin (")]
    rows.append({"tokens": ["aspirin", "", " ", "forte", "\u200b"], "ner_tags": ["B-DRUG", *["I-DRUG"] * 3, "O"]})
    rows += [{"tokens": ["", " "], "ner_tags": ["O", "O"]}, {"tokens": [], "ner_tags": []}]
    file = write_jsonl(tmp_path / "tokens.jsonl", [{"words": row["tokens"]} for row in rows])
    found = predict(finished, file, tmp_path / "a.jsonl", "--tokens_column", "words")
    assert [{name: row[name] for name in ("tokens", "ner_tags")} for row in found] == rows
    assert [row["text"] for row in found] == [" ".join(row["tokens"]) for row in rows] and places_are_exact(found)
    assert [[entity["word"] for entity in row["entities"]] for row in found] == [
        ["chest pain", "aspirin forte"],
        ["fever"],
        ["insulin"],
        ["aspirin    forte"],
        [],
        [],
    ]
    # A CoNLL file may hold the tokens alone, or tags that are not looked at.
    kept = rows[:2]
    wrong = [{**row, "ner_tags": ["I-what"] * len(row["tokens"])} for row in kept]
    for name, file in (
        ("b", write_conll(tmp_path / "b.conll", kept, with_tags=False)),
        ("c", write_conll(tmp_path / "c.bio", wrong)),
    ):
        assert predict(finished, file, tmp_path / f"{name}.jsonl") == found[:2]


def test_long_documents_are_read_in_windows_and_nothing_is_lost(finished: tuple[Path, str], tmp_path: Path) -> None:
    rows = [row for row in sentences(12, 11, longest=120) if len(row["tokens"]) > 30]
    assert len(rows) > 5
    file = write_jsonl(tmp_path / "long.jsonl", rows)
    by_tokens = predict(finished, file, tmp_path / "a.jsonl")
    right = sum(
        true == found
        for row, answer in zip(rows, by_tokens, strict=True)
        for true, found in zip(row["ner_tags"], answer["ner_tags"], strict=True)
    )
    assert right / sum(len(row["tokens"]) for row in rows) > 0.97
    # The text of the same words, raw: the same entities at the same places, from other windows or none.
    (tmp_path / "long.txt").write_text("\n".join(row["text"] for row in by_tokens), encoding="utf-8")
    by_text = predict(finished, str(tmp_path / "long.txt"), tmp_path / "b.jsonl")
    assert [row["entities"] for row in by_text] == [row["entities"] for row in by_tokens]
    assert sum(len(row["entities"]) for row in by_text) > 100 and places_are_exact(by_text)


def test_scores_of_long_documents_are_those_of_the_predictions(
    finished: tuple[Path, str], command: list[str], files: list[str], tmp_path: Path
) -> None:
    """What the recipe reports for a test split equals what its predictions for the same file give."""
    rows = sentences(12, 13, longest=60)
    test = write_jsonl(tmp_path / "test.jsonl", rows)
    words = [
        *command,
        *files[:4],
        "--test_file",
        test,
        "--num_train_epochs",
        "3",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    clinical_ner.main([*words, "--predict_file", test, "--predict_output", str(tmp_path / "p.jsonl")])
    found = read_jsonl(tmp_path / "p.jsonl")
    scores = entity_scores([row["ner_tags"] for row in rows], [row["ner_tags"] for row in found])
    reported = results_of(tmp_path / "out")
    assert scores["recall"] > 0.5
    # Predicted tags are repaired in the file and read strictly in the scores.
    assert reported["test_recall"] == pytest.approx(scores["recall"], abs=0.02)
    assert [entity_words(row) for row in found] == [
        [(entity["entity_group"], entity["word"]) for entity in row["entities"]] for row in found
    ]


@pytest.mark.slow
def test_two_processes_score_and_predict_whole_sentences(command: list[str], files: list[str], tmp_path: Path) -> None:
    """Windows of a sentence that go through different processes come back together, and odd rows count once."""
    rows = sentences(21, 17, longest=40)
    test = write_jsonl(tmp_path / "test.jsonl", rows)
    output, predictions = tmp_path / "out", tmp_path / "p.jsonl"
    words = [*command, *files[:4], "--test_file", test, "--output_dir", str(output), "--num_train_epochs", "3"]
    words += ["--per_device_eval_batch_size", "4", "--predict_file", test, "--predict_output", str(predictions)]
    code, out, err = launch("cpu_ddp", str(RECIPES / "clinical_ner.py"), *words, timeout=600)
    assert code == 0, err
    assert out.count("Looking for entities") == 1
    found = read_jsonl(predictions)
    scores = entity_scores([row["ner_tags"] for row in rows], [row["ner_tags"] for row in found])
    assert results_of(output)["test_recall"] == pytest.approx(scores["recall"], abs=0.02) and scores["recall"] > 0.8


# --------------------------------------------------------------------------- the embedded data


@pytest.mark.parametrize("recipe", [clinical_ner, finance_ner])
def test_the_embedded_sentences_are_the_default(
    recipe: Any, ner_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model_name_or_path", ner_model, "--max_seq_length", "32", "--max_steps", "1", "--disable_tqdm", "true"]
    recipe.main([*words, "--output_dir", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "data    90 train, 30 validation, 90 test" in text and "flatter" not in text
    kinds = {"clinical_ner": 4, "finance_ner": 5}[recipe.__name__]
    assert f"labels  {2 * kinds + 1}: O, B-" in text and f"recipes/{recipe.__name__}.py --predict_only" in text
