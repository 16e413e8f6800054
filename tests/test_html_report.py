"""The HTML report: its numbers are those of the files, whatever is in them, and it needs nothing but itself."""

from __future__ import annotations

import doctest
import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from hf_l2sp import charts, markup
from hf_l2sp.charts import Series, line_chart, thinned
from hf_l2sp.html_report import HTML_NAME, PAPER, write_html_report
from hf_l2sp.report import DriftReport, LayerDrift, part_of
from hf_l2sp.run_folder import FILES
from hf_l2sp.run_record import describe_predictions, describe_run

from .html_page import Page

LABELS = ["heart", "lung", "skin"]
# Label names that break a page that does not escape, a layout, or a direction of writing.
NASTY = [
    "<script>alert('x')</script>",
    'a "quoted" & name',
    "x" * 300,
    "الرعاية",
    "好奇心",
    "עברית",
    "a_b.c/d",
    "\ud800",
]


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def scores(**changes):
    found = {"eval_loss": 0.5, "eval_f1_macro": 0.75, "eval_runtime": 1.0, "epoch": 2.0, "train_runtime": 12.0}
    return found | {"test_loss": 0.4, "test_f1_macro": 0.8125, "test_ece": 0.1, "test_samples": 60} | changes


def logs(steps):
    entries = [
        {
            "step": step,
            "loss": 1.1 / step,
            "task_loss": 1.0 / step,
            "l2sp_penalty": 0.1 / step,
            "l2sp_drift": 0.01 * step,
            "l2sp_lambda": 0.01,
        }
        for step in steps
    ]
    return [*entries, {"step": steps[-1], "eval_loss": 0.5, "eval_f1_macro": 0.75}]


def drift(layers=("bert.embeddings", "bert.encoder.layer.0")):
    parts = {name: {"attention": 0.02, "MLP": 0.03} for name in layers}
    return DriftReport(
        LayerDrift(1234567, 1.25, 50.0, 0.025),
        {name: LayerDrift(1000 + i, 0.5 + i, 20.0, 0.0123 * (i + 1)) for i, name in enumerate(layers)},
        {"anchored": 1234567, "new": 99, "frozen": 0, "excluded": 0},
        {"source": "/home/somebody/models/tiny", "revision": None, "fingerprint": "f" * 64},
        {"lambda": 0.01, "schedule": "constant", "mode": "loss", "beta": 0.0, "exclude": None},
        parts=parts,
    )


def predictions(rng, names=LABELS, examples=60):
    labels = rng.integers(0, len(names), examples)
    logits = rng.normal(size=(examples, len(names)))
    logits[np.arange(examples), labels] += 1.5
    return describe_predictions(logits, labels, names)


@pytest.fixture
def run(tmp_path, rng):
    """Output folder of a run with everything."""
    folder = tmp_path / "notes"
    folder.mkdir()
    plain = scores(test_loss=0.3, test_f1_macro=0.8125, test_ece=0.2)
    write(folder, "all_results.json", scores())
    config = {"l2sp_lambda": 0.01, "learning_rate": 3e-4, "versions": {"torch": "2.0"}}
    write(folder, "comparison.json", {"plain": plain, "l2sp": scores(), "model": "tiny", "seed": 7, "config": config})
    write(folder, "trainer_state.json", {"log_history": logs([5, 10, 15]), "global_step": 15})
    write(folder, "l2sp_state.json", {"strength": {"base": 0.01}})
    write(folder, "eval_predictions.json", {"eval": predictions(rng), "test": predictions(rng)})
    write(folder, "run.json", describe_run(["recipes/medical_textcls.py", "--train_file", "my notes.csv"]))
    drift().save(folder / "l2sp_report.json")
    return folder


def page(folder):
    return Page(write_html_report(folder))


# --------------------------------------------------------------------------- numbers


def test_the_comparison_shows_the_numbers_of_the_file(run):
    rows = {row[0]: row[1:] for row in page(run).tables["Plain fine-tuning and L2-SP"]}
    assert rows["test_loss"] == ["0.3000", "0.4000", "+0.1000 ▼ worse"]
    assert rows["test_ece"] == ["0.2000", "0.1000", "-0.1000 ▲ better"]
    assert rows["test_f1_macro"] == ["0.8125", "0.8125", "+0.0000 = same"]
    assert not {"epoch", "eval_runtime", "test_samples", "train_runtime"} & set(rows)
    assert "Of 3 test scores L2-SP is better in 1, the same in 1, worse in 1." in page(run).text
    assert "seed 7" in page(run).text


def test_headline_numbers(run):
    text = page(run).text
    for words in ("test f1_macro 0.812 same as plain", "test loss 0.400 +0.100 against plain, worse", "2.50 %"):
        assert words in text, words
    assert "λ = 0.01" in text and "15 steps" in text and "training time 12.0 s" in text


def test_drift_by_layer_and_part(run):
    tables = page(run).tables
    assert tables["Drift by layer"][1:] == [
        ["bert.embeddings", "1.23 %", "0.5", "1,000"],
        ["bert.encoder.layer.0", "2.46 %", "1.5", "1,001"],
        ["all", "2.50 %", "1.25", "1,234,567"],
    ]
    assert tables["Drift by part of each layer"] == [
        ["layer", "attention", "MLP"],
        ["bert.embeddings", "2.00 %", "3.00 %"],
        ["bert.encoder.layer.0", "2.00 %", "3.00 %"],
    ]


def test_confusion_matrix_and_reliability_are_those_of_the_file(run):
    content = json.loads((run / "eval_predictions.json").read_text())["test"]
    tables = page(run).tables
    matrix = tables["Confusion matrix, test data"]
    assert [[int(cell) for cell in row[1:]] for row in matrix[1:]] == content["confusion"]
    assert [row[0] for row in matrix[1:]] == ["1 heart", "2 lung", "3 skin"]
    bins = [b for b in content["bins"] if b["count"]]
    shown = tables["Reliability, test data"][1:]
    assert [row[1:] for row in shown] == [
        [str(b["count"]), f"{b['confidence']:.3f}", f"{b['accuracy']:.3f}"] for b in bins
    ]
    row = tables["Scores of each label, test data"][1]
    counts = np.array(content["confusion"])
    right, true, predicted = counts[0, 0], counts[0].sum(), counts[:, 0].sum()
    assert row[1:3] == [str(true), str(predicted)]
    assert [float(cell) for cell in row[3:]] == pytest.approx(
        [right / predicted, right / true, 2 * right / (true + predicted)], abs=6e-4
    )


def test_the_curves_have_the_points_of_the_log(run):
    labels = [a["aria-label"] for a in page(run).attributes("svg") if a.get("role") == "img"]
    assert any("task loss: 0.2 at step 5, 0.0667 at step 15." in label for label in labels)
    assert any("validation loss: 0.5 at step 15" in label for label in labels)
    assert any("Drift" in label and "5% at step 5, 15% at step 15." in label for label in labels)
    log = page(run).tables["Training log"]
    assert log[0] == ["step", "task loss", "loss", "penalty", "drift", "λ"]
    assert log[1] == ["5", "0.2", "0.22", "0.02", "0.05", "0.01"]


def test_command_and_versions(run):
    found = page(run)
    assert "recipes/medical_textcls.py --train_file 'my notes.csv'" in found.text
    rows = dict(found.tables["Versions and machine"][1:])
    assert rows["torch"] == json.loads((run / "run.json").read_text())["versions"]["torch"]
    (run / "run.json").unlink()
    assert dict(page(run).tables["Versions and machine"][1:]) == {"torch": "2.0"}


def test_settings_hide_where_a_folder_lies(run):
    rows = dict(page(run).tables["Settings of the run"][1:])
    assert rows["anchor θ0"] == "local folder models/tiny"
    assert rows["anchored numbers"] == "1,234,567" and rows["learning_rate"] == "0.0003"
    assert "somebody" not in (run / HTML_NAME).read_text(encoding="utf-8")


def test_entities_by_type(tmp_path):
    def entity(f1):
        return {f"test_{t}{s}": f1 for t in ("", "DRUG_", "BLOOD_LOSS_") for s in ("precision", "recall", "f1")}

    found = {"test_loss": 0.2, **entity(0.75)}
    write(tmp_path, "all_results.json", found)
    table = page(tmp_path).tables["Types of entities: On the test data"]
    assert table[0] == ["type", "precision", "recall", "F1"]
    assert [row[0] for row in table[1:]] == ["DRUG", "BLOOD_LOSS", "all"]
    assert "test_DRUG_f1" not in [row[0] for row in page(tmp_path).tables["Scores"]]
    write(tmp_path, "comparison.json", {"plain": {"test_loss": 0.2, **entity(0.5)}, "l2sp": found})
    table = page(tmp_path).tables["Types of entities: On the test data"]
    assert table[2] == ["BLOOD_LOSS", "0.750", "0.750", "0.750", "0.500", "+0.2500 ▲ better"]


# --------------------------------------------------------------------------- one file, for everybody


def test_nothing_is_fetched_and_nothing_runs(run):
    found = page(run)
    assert {tag for tag, _ in found.elements} & {"script", "link", "img", "iframe", "object"} == set()
    for tag, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        targets = [attributes[name] for name in ("href", "src", "xlink:href", "action") if name in attributes]
        assert targets in ([], [PAPER]) and (not targets or tag == "a")
    style = (run / HTML_NAME).read_text(encoding="utf-8").partition("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style and "@media print" in style


def test_charts_have_words_and_scrolling_boxes_a_name(run):
    found = page(run)
    for attributes in found.attributes("svg"):
        assert attributes.get("aria-hidden") == "true" or (
            attributes["role"] == "img" and len(attributes["aria-label"]) > 20
        )
    boxes = [a for a in found.attributes("div") if a.get("class") == "scroll"]
    assert len(boxes) == len(found.tables) > 5
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in boxes)
    assert found.attributes("html") == [{"lang": "en"}]
    assert any(a.get("name") == "viewport" for a in found.attributes("meta"))


def test_charts_are_well_formed(run):
    for chart in re.findall(r"<svg.*?</svg>", write_html_report(run).read_text(encoding="utf-8"), flags=re.DOTALL):
        for shape in ElementTree.fromstring(chart).iter():
            for name, value in shape.attrib.items():
                assert "nan" not in value.lower() or name == "aria-label", (name, value)


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_in_light_and_dark(run):
    style = write_html_report(run).read_text(encoding="utf-8").partition("</style>")[0]
    themes = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    assert len(themes) == 3  # light, dark, print
    for theme in themes:
        colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", theme))
        for ground in ("page", "card"):
            for name in ("text", "muted", "blue", "green", "red"):
                light, dark = sorted((luminance(colors[name]), luminance(colors[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground, colors)


# --------------------------------------------------------------------------- whatever the files hold


@pytest.mark.parametrize("missing", list(FILES))
def test_a_missing_file_is_named_and_costs_its_section_alone(run, missing):
    complete = set(page(run).tables)
    (run / missing).unlink()
    found = page(run)
    lost = {
        "all_results.json": set(),
        "trainer_state.json": {"Training log"},
        "l2sp_report.json": {"Drift by layer", "Drift by part of each layer"},
        "l2sp_state.json": set(),
        "comparison.json": {"Plain fine-tuning and L2-SP"},
        "eval_predictions.json": {name for name in complete if name.endswith(" data")},
        "run.json": set(),
    }
    assert complete - set(found.tables) == lost[missing]
    assert f"Not there: {missing}." in found.text
    if lost[missing]:
        assert f"There is no {missing}. " in found.text
    for other in set(FILES) - {missing}:
        assert f"There is no {other}" not in found.text


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize(
    "content", ["{", "[1, 2]", "\xff\xfe", '{"log_history": [3, {"step": "x"}], "plain": 1}', "[" * 99999]
)
def test_a_damaged_file_is_told(run, name, content):
    (run / name).write_bytes(content.encode("latin-1"))
    found = page(run)
    if not content.startswith('{"log'):
        assert f"{name} cannot be read" in found.text


@pytest.mark.parametrize(
    "broken",
    [
        {"labels": LABELS, "confusion": [[1]], "bins": [], "examples": 1, "ece": 0},
        {"labels": LABELS},
        3,
        {"labels": [], "confusion": [], "bins": [], "examples": 0, "ece": None},
        {"labels": LABELS, "confusion": [["a"] * 3] * 3, "bins": [], "examples": 1, "ece": 0},
    ],
)
def test_predictions_that_do_not_fit_are_told(run, broken):
    write(run, "eval_predictions.json", {"test": broken})
    assert "eval_predictions.json cannot be read for 'test'" in page(run).text


def test_a_folder_without_any_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has none of all_results.json, .*: name the output_dir"):
        write_html_report(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        write_html_report(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_plain_trainer(tmp_path):
    checkpoint = tmp_path / "checkpoint-20"
    checkpoint.mkdir()
    history = [{"step": 10, "loss": 0.5, "epoch": 1.0}, {"step": 20, "eval_loss": 0.25, "eval_accuracy": 0.5}]
    write(checkpoint, "trainer_state.json", {"log_history": history, "global_step": 20})
    found = page(tmp_path)
    assert "plain fine-tuning, or λ = 0" in found.text
    assert "From checkpoint-20" in found.text
    assert ["eval_accuracy", "0.5000", "higher"] in found.tables["Scores"]


def test_nasty_labels_stay_text(run, rng):
    write(run, "eval_predictions.json", {"test": predictions(rng, NASTY)})
    found = page(run)
    assert found.attributes("script") == []
    shown = [row[0] for row in found.tables["Confusion matrix, test data"][1:]]
    assert shown == [f"{i} {name}" for i, name in enumerate([*NASTY[:-1], "?"], 1)]


def test_many_labels(run, rng):
    names = [f"class_{i}" for i in range(61)]
    write(run, "eval_predictions.json", {"test": predictions(rng, names, 400)})
    found = page(run)
    assert "Confusion matrix, test data" not in found.tables
    assert "61 labels are too many for a matrix" in found.text
    assert len(found.tables["Scores of each label, test data"]) == 62


def test_nan_and_a_thousand_points(run):
    entries = logs(range(1, 1001))
    for entry in entries[399:402]:
        entry["loss"] = entry["task_loss"] = math.nan
    entries[500]["task_loss"] = None
    write(run, "trainer_state.json", {"log_history": entries})
    write(run, "all_results.json", scores(test_loss=None, test_f1_macro=math.nan))
    found = page(run)
    assert "The task loss is NaN or infinite in 4 of 1000 logs (step 400, 401, 402, 501)" in found.text
    assert len(found.tables["Training log, 60 of 1000"]) - 1 <= 61
    assert (run / HTML_NAME).stat().st_size < 120_000


def test_a_run_that_diverged_from_the_first_step(run):
    write(run, "trainer_state.json", {"log_history": [{"step": 5, "task_loss": math.inf, "l2sp_drift": math.nan}]})
    broken = drift()
    broken.total.drift = broken.layers["bert.embeddings"].drift = math.inf
    broken.save(run / "l2sp_report.json")
    assert page(run).tables["Drift by layer"][1][1] == "not finite"


# --------------------------------------------------------------------------- parts


def test_examples_in_the_docstrings():
    for module in (charts, markup):
        assert doctest.testmod(module).failed == 0


def test_a_curve_has_gaps_where_values_are_not_finite():
    values = [1.0, 2.0, math.nan, 3.0, math.inf, 4.0, 5.0]
    chart = line_chart("loss", [Series("loss", list(enumerate(values)))])
    assert chart is not None
    assert len(re.findall(r'class="line s0"', chart)) == 2  # 1-2 and 4-5
    assert len(re.findall(r'class="dot s0"', chart)) == 1  # 3 stands alone
    assert len(re.findall(r'class="cross"', chart)) == 2
    assert line_chart("loss", [Series("loss", [(1.0, math.nan)])]) is None


@pytest.mark.parametrize("values", [[0.0], [1e-12, 2e-12], [-5.0, -1.0], [1e299, -1e299], [3.0, 3.0]])
def test_curves_of_any_size_stay_inside(values):
    chart = line_chart("x", [Series("x", [(float(i), v) for i, v in enumerate(values, 1)])])
    assert chart is not None
    numbers = re.findall(r'(?:d="M|L|cx=")([-\d.]+)(?:" cy="| )([-\d.]+)', chart)
    assert numbers
    for x, y in numbers:
        assert 0 <= float(x) <= charts.WIDTH and 0 <= float(y) <= charts.HEIGHT


def test_thinning_keeps_the_peaks():
    points = [(float(i), math.sin(i)) for i in range(5000)]
    points[1234] = (1234.0, 99.0)
    points[4321] = (4321.0, math.nan)
    kept = thinned(points)
    assert len(kept) <= 402
    assert (1234.0, 99.0) in kept and any(math.isnan(y) for _, y in kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("bert.encoder.layer.3.attention.self.query.weight", "attention"),
        ("bert.encoder.layer.3.attention.output.dense.weight", "attention"),
        ("bert.encoder.layer.3.attention.output.LayerNorm.weight", "norm"),
        ("bert.encoder.layer.3.output.dense.weight", "MLP"),
        ("bert.embeddings.LayerNorm.bias", "embeddings"),
        ("bert.pooler.dense.weight", "other"),
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.mlp.gate_proj.weight", "MLP"),
        ("model.layers.0.input_layernorm.weight", "norm"),
        ("transformer.h.0.attn.c_proj.weight", "attention"),
        ("transformer.h.0.ln_1.weight", "norm"),
        ("transformer.wte.weight", "embeddings"),
        ("distilbert.transformer.layer.0.ffn.lin1.weight", "MLP"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "attention"),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "MLP"),
        ("shared.weight", "embeddings"),
    ],
)
def test_part_of_a_parameter(name, part):
    assert part_of(name) == part


def test_the_report_comes_back_from_its_json(run):
    assert DriftReport.from_dict(json.loads((run / "l2sp_report.json").read_text())) == drift()
    with pytest.raises(ValueError, match="no drift report"):
        DriftReport.from_dict({"total": 3})


def test_a_run_in_a_folder_with_a_strange_name(run, tmp_path):
    target = tmp_path / "<b>&'\"é"
    shutil.copytree(run, target)
    assert "<b>&'\"é" in page(target).text
