"""Whatever is in a data file, a recipe takes it or refuses it in one line of its own; nothing is lost on the way.

The files are those of `odd_files`: hundreds of accidents in all formats, and good files with random bytes changed.
Each goes through every reader, in this process and without a model.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from .end_to_end.recipe_harness import RECIPES, save_tiny_model
from .odd_files import TEXTS, write_all

# The harness makes the recipes importable.
import clinical_ner  # isort: skip
import distill  # isort: skip
import domain_adapt_mlm  # isort: skip
import sentiment  # isort: skip
from _mlm_files import stream_texts  # isort: skip
from _ner_align import prepare_tokenizer, tokenize_ner  # isort: skip
from _ner_data import NerDataArguments, check_ner_arguments, load_ner_splits  # isort: skip
from _ner_predict import read_unlabelled  # isort: skip
from _ner_tags import entity_types, label_names  # isort: skip
from _recipe_args import DataArguments, RecipeError  # isort: skip
from _recipe_data import check_data_arguments, label_order, load_splits, tokenize  # isort: skip
from _recipe_predict import read_texts, write_predictions  # isort: skip

SEED, FLIPS = 20180206, 30
KINDS = ("accepted", "refused")
Reader = Callable[[Path], Any]


@pytest.fixture(scope="module", autouse=True)
def _no_bars() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_all(tmp_path_factory.mktemp("files"), SEED, FLIPS)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A good file in each format of texts."""
    folder = tmp_path_factory.mktemp("good")
    for ending, text in TEXTS.items():
        (folder / f"good.{ending}").write_text(text, encoding="utf-8")
    return {ending: str(folder / f"good.{ending}") for ending in TEXTS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model: str) -> Any:
    return AutoTokenizer.from_pretrained(model)


def names_can_be_saved(names: list[str], folder: Path) -> None:
    assert json.loads(json.dumps(names)) == names
    (folder / "names.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")


@pytest.fixture(scope="module")
def readers(good: dict[str, str], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    """Each way of the recipes from a path to what goes into the model, or to what is asked of it."""
    folder = tmp_path_factory.mktemp("out")

    def classes(data: DataArguments) -> None:
        check_data_arguments(data)
        splits, _ = load_splits(data, RECIPES / "data" / "shop_reviews", 0)
        assert min(map(len, splits.values())) > 0
        names = label_order(splits["train"].labels)
        names_can_be_saved(names, folder)
        if data.test_file is None and sum(len(text) for part in splits.values() for text in part.texts) < 1e5:
            # Once for every file that is taken, but for those on which the tokenizer would spend seconds.
            tokenized, _ = tokenize(splits, names, tokenizer, 16)
            assert {split: len(part) for split, part in tokenized.items()} == {s: len(p) for s, p in splits.items()}

    def entities(data: NerDataArguments) -> None:
        check_ner_arguments(data)
        splits, _ = load_ner_splits(data, RECIPES / "data" / "clinical_ner", 0)
        types = {kind for tags in splits["train"].tags for kind in entity_types(tags)}
        names_can_be_saved(label_names(types), folder)
        prepare_tokenizer(tokenizer)
        tokenized, *_ = tokenize_ner(splits, label_names(types), tokenizer, data)
        assert min(map(len, tokenized.values())) > 0

    def streamed(path: Path, **options: Any) -> None:
        for text in stream_texts(str(path), "--train_file", "text", **options):
            assert not text.isspace()
            text.encode()

    def asked(path: Path) -> None:
        texts = read_texts(str(path), "text")
        write_predictions(str(folder / "texts.jsonl"), ({"text": text} for text in texts))

    def asked_for_entities(path: Path) -> None:
        found = read_unlabelled(str(path), NerDataArguments())
        assert len(found) > 0
        rows = ({"found": row} for row in (found.tokens if found.texts is None else found.texts))
        write_predictions(str(folder / "entities.jsonl"), rows)

    return {
        "text classification": lambda path: classes(DataArguments(train_file=str(path))),
        "its test file": lambda path: classes(DataArguments(train_file=good["csv"], test_file=str(path))),
        "named entities": lambda path: entities(NerDataArguments(train_file=str(path), max_seq_length=16)),
        "integer tags": lambda path: entities(
            NerDataArguments(train_file=str(path), tag_names=["O", "B-A", "I-A", "B-B", "I-B"])
        ),
        "masked words": streamed,
        "paragraphs": lambda path: streamed(path, paragraphs=True),
        "texts to predict": asked,
        "entities to predict": asked_for_entities,
    }


def outcome(reader: Reader, path: Path) -> str:
    """`accepted`, `refused`, or what else was raised, with its place; a refusal must be one that helps."""
    try:
        reader(path)
    except RecipeError as error:
        message = str(error)
        if path.name not in message:
            return f"a refusal that does not name the file: {message}"
        told = message.replace(str(path), "")
        if "\n" in told or not 20 < len(told) < 700 or not told.isprintable():
            return f"a refusal that is no line for people: {message[:1500]!r}"
        return "refused"
    except Exception as error:  # what this test is about
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}, line {place.lineno})"
    return "accepted"


def test_every_file_is_taken_or_refused_by_every_reader(
    files: list[Path], readers: dict[str, Reader], record_testsuite_property: Callable[[str, object], None]
) -> None:
    outcomes = {(name, path): outcome(reader, path) for name, reader in readers.items() for path in files}
    counts = Counter(outcomes.values())
    record_testsuite_property("fuzzed files", len(files))
    record_testsuite_property("fuzzed inputs", len(outcomes))
    for kind in KINDS:
        record_testsuite_property(f"fuzzed inputs {kind}", counts[kind])
    foreign = [f"{reader}, {path.name}: {what}" for (reader, path), what in outcomes.items() if what not in KINDS]
    assert not foreign, f"{len(foreign)} of {len(outcomes)}:\n" + "\n".join(foreign)
    assert len(files) >= 900 and len(outcomes) == len(files) * len(readers) > 7000
    for name in readers:
        accepted = sum(what == "accepted" for (reader, _), what in outcomes.items() if reader == name)
        assert accepted >= (1 if name == "integer tags" else 100), name


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("json-nested-text.jsonl", "line 1: lists or objects are nested too deeply; write flat rows"),
        ("json-nested-lists.json", "json': lists or objects are nested too deeply"),
        ("json-many-digits.jsonl", "line 1: an integer has thousands of digits; write it as a string"),
        ("json-empty-objects.jsonl", "all of its 3 rows are empty objects; give them columns"),
        ("label-surrogate-once.json", r"row 12: the label 'a\\ud800b' holds half a character"),
        ("twice.parquet", "names a column twice .*; keep one of them"),
        ("strange-classes.parquet", "row 2: the class 7 is none of the 2 that the file names"),
        ("text-late.parquet", "is not a parquet file, or a damaged one .*; write it anew"),
        ("note-1.parquet", "is not a parquet file, or a damaged one .*; write it anew"),
        ("two-boms.csv", r"has no column 'text' \(--text_column\); it has '\\ufefftext', 'label'\.$"),
        ("csv-name-blank.csv", r"no column 'label' .* Did you mean --label_column ' label'\?"),
        ("n" * 300 + ".csv", "cannot be looked up .*; check the path"),
        ("pipe.csv", r"is no regular file \(a device or a pipe\); give a file"),
        ("unreadable.csv", "cannot be read: .*Input/output error"),
    ],
)
def test_the_cause_is_told_with_its_place_and_cure(
    file: str, message: str, files: list[Path], readers: dict[str, Reader]
) -> None:
    found = [path for path in files if path.name == file]
    if not found:
        pytest.skip(f"this system has no {file}")
    with pytest.raises(RecipeError, match=message):
        readers["text classification"](found[0])


def test_a_hundred_thousand_labels_are_taken(files: list[Path], readers: dict[str, Reader]) -> None:
    (path,) = (path for path in files if path.name == "csv-many-labels.csv")
    assert outcome(readers["text classification"], path) == "accepted"


CONFIGS = {
    "deep list": "l2sp_exclude: " + "[" * 2000,
    "deep mapping": "l2sp_weights: " + "{a: " * 2000,
    "endless": "l2sp_weights: &a {b: *a}",
    "no date": "l2sp_weights: {a: 2001-99-99}",
    "date": "l2sp_weights: {a: 2001-01-01}",
    "set": "l2sp_weights: !!set {a, b}",
    "many digits": f"l2sp_weights: {{a: {'9' * 5000}}}",
    "list of mappings": "l2sp_exclude: [{a: 1}]",
    "list of lists": "l2sp_exclude: [[a]]",
    "list as key": "? [a]\n: 1",
    "nul": "seed: \0",
    "two": "seed: 1\n---\nseed: 2",
    "code": "l2sp_weights: {a: !!python/object/apply:os.getcwd []}",
    "list": "- seed",
    "empty": "",
    "open quote": 'seed: "1',
    "tabs": "seed:\n\t- 1",
    "alias of nothing": "seed: *a",
}


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_a_broken_config_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)

    def parse(path: Path) -> None:
        sentiment.make_parser().parse(["--config", str(path)])

    assert outcome(parse, tmp_path / "config.yaml") == "refused"


# --------------------------------------------------------------------------- earlier outputs


def content_of(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# One file or more of every way of reading, and of every way of failing in it.
UNFIT = (
    *("utf-16.csv", "latin-1.csv", "csv-long-row.csv", "csv-open-quote.csv", "empty.csv", "csv-columns-twice.csv"),
    *("json-nested-objects.json", "json-many-digits.jsonl", "json-empty-objects.jsonl", "junk.json", "nul.jsonl"),
    *("label-surrogate-once.jsonl", "text-null-once.json", "one-row.json", "tokens-none.jsonl"),
    *("cut-60.parquet", "no-columns.parquet", "text-late.parquet", "note-3.parquet", "strange-classes.parquet"),
    *("conll-ragged.conll", "conll-one-column.conll", "nuls.conll", "unreadable.csv", "folder.jsonl", "absent.txt"),
    *("lost.parquet", "n" * 300 + ".csv"),
)


@pytest.mark.parametrize("program", [sentiment, clinical_ner, distill, domain_adapt_mlm], ids=lambda p: p.__name__)
def test_a_refusal_leaves_the_output_of_an_earlier_run_alone(
    program: Any,
    files: list[Path],
    readers: dict[str, Reader],
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also with --overwrite_output_dir, which clears the folder only when everything is read and checked."""
    reader = readers[
        {"clinical_ner": "named entities", "domain_adapt_mlm": "masked words"}.get(
            program.__name__, "text classification"
        )
    ]
    output = tmp_path / "output"
    (output / "checkpoint-7").mkdir(parents=True)
    for name in ("all_results.json", "model.safetensors", "README.md", "checkpoint-7/trainer_state.json", "mine.txt"):
        (output / name).write_text(f"{name} of an earlier run", encoding="utf-8")
    before = content_of(output)
    refused = 0
    for path in files:
        if path.name not in UNFIT or outcome(reader, path) == "accepted":
            continue
        argv = ["--model_name_or_path", model, "--train_file", str(path), "--output_dir", str(output)]
        for overwrite in ([], ["--overwrite_output_dir"]):
            with pytest.raises(SystemExit) as left:
                program.main([*argv, *overwrite])
            assert left.value.code == 1
            message = capsys.readouterr().err
            assert message.startswith("error: ") and message.count("\n") == 1, message
            assert content_of(output) == before
        refused += 1
    assert refused >= 15


@pytest.mark.parametrize("program", [sentiment, clinical_ner], ids=lambda p: p.__name__)
def test_a_refusal_leaves_earlier_predictions_alone(
    program: Any, files: list[Path], readers: dict[str, Reader], model: str, tmp_path: Path
) -> None:
    reader = readers["entities to predict" if program is clinical_ner else "texts to predict"]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("of an earlier run")
    refused = 0
    for path in files:
        if path.name not in UNFIT or outcome(reader, path) == "accepted":
            continue
        argv = ["--predict_only", "--model_name_or_path", model, "--predict_file", str(path)]
        with pytest.raises(SystemExit):
            program.main([*argv, "--predict_output", str(answers), "--overwrite_output_dir"])
        refused += 1
        assert answers.read_text() == "of an earlier run" and len(list(tmp_path.iterdir())) == 1
    assert refused >= 15
