"""The drift report: its numbers against float64 arithmetic, its JSON and its picture."""

from __future__ import annotations

import builtins
import doctest
import json
import math

import pytest
import torch
from matplotlib.image import imread
from torch import nn

from hf_l2sp import Anchor, DriftReport, drift_report, report
from hf_l2sp.report import LayerDrift, layer_drift, layer_of


@pytest.fixture
def anchor(classifier):
    classifier.bert.embeddings.requires_grad_(False)
    return Anchor.from_model(classifier, exclude=["pooler"])


@pytest.fixture
def drifted(classifier, anchor, move):
    return drift_report(move(classifier), anchor)


@pytest.fixture
def with_course(drifted):
    """As a trainer makes it."""
    drifted.settings = {"lambda": 0.01, "schedule": "linear", "mode": "loss", "beta": 0.0, "exclude": ["pooler"]}
    drifted.history = [
        {
            "step": step,
            "task_loss": 1.0 / step,
            "l2sp_penalty": 0.1 * step,
            "l2sp_distance": 0.5 * step,
            "l2sp_drift": 0.05 * step,
            "l2sp_lambda": 0.01 * (1 - step / 4),
        }
        for step in (1, 2, 3)
    ]
    return drifted


def strictly_read(path):
    """JSON as its standard has it: without NaN and Infinity, which other languages refuse."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("bert.encoder.layer.11.attention.self.query.weight", "bert.encoder.layer.11"),
        ("transformer.h.0.ln_1.bias", "transformer.h.0"),
        ("model.layers.3.mlp.experts.7.down_proj.weight", "model.layers.3"),
        ("bert.embeddings.word_embeddings.weight", "bert.embeddings"),
        ("bert.pooler.dense.weight", "bert.pooler"),
        ("classifier.bias", "classifier"),
        ("lm_head.weight", "lm_head"),
        ("0.weight", "0"),
        ("weight", "weight"),
    ],
)
def test_layer_of_a_parameter(name, layer):
    assert layer_of(name) == layer


def test_examples_in_the_docstrings():
    assert doctest.testmod(report).attempted == 3
    assert doctest.testmod(report).failed == 0


def test_numbers(classifier, anchor, drifted):
    groups = {"bert.encoder.layer.0": [], "bert.encoder.layer.1": []}
    for name in anchor:
        groups[name[:20]].append(name)

    def check(found, names):
        theta = torch.cat([classifier.get_parameter(n).detach().double().flatten() for n in names])
        origin = torch.cat([anchor[n].double().flatten() for n in names])
        distance = float((theta - origin).norm())
        assert found.parameters == theta.numel()
        assert found.distance == pytest.approx(distance, rel=1e-6)
        assert found.norm == pytest.approx(float(origin.norm()), rel=1e-9)
        assert found.drift == pytest.approx(distance / float(origin.norm()), rel=1e-6)

    assert list(drifted.layers) == list(groups)
    for layer, names in groups.items():
        check(drifted.layers[layer], names)
    check(drifted.total, list(anchor))


def test_counts_and_identity(classifier, anchor, drifted, tiny_bert_dir):
    sizes = {name: p.numel() for name, p in classifier.named_parameters()}
    assert drifted.counts == {
        "anchored": drifted.total.parameters,
        "new": 99,
        "frozen": sum(size for name, size in sizes.items() if "embeddings" in name),
        "excluded": 32 * 32 + 32,
    }
    assert sum(drifted.counts.values()) == sum(sizes.values())
    assert drifted.anchor == {"source": tiny_bert_dir, "revision": None, "fingerprint": anchor.fingerprint}


def test_weights_do_not_count(classifier, move):
    plain, weighted = (Anchor.from_model(classifier, weights=w) for w in (None, {"encoder": 100.0}))
    move(classifier)
    assert drift_report(classifier, weighted).total == drift_report(classifier, plain).total


def test_frozen_after_training_still_counts(classifier, anchor, move):
    move(classifier)
    before = drift_report(classifier, anchor).total
    assert drift_report(classifier.requires_grad_(False), anchor).total == before


def test_added_rows_do_not_count(gpt2, move):
    gpt2.resize_token_embeddings(97)
    anchor = Anchor.from_model(gpt2)
    gpt2.transformer.wte.weight.data[90:] += 5.0
    found = drift_report(gpt2, anchor)
    assert found.total.distance == 0.0 and found.total.drift == 0.0
    gpt2.transformer.wte.weight.data[:90] += 1.0
    assert drift_report(gpt2, anchor).layers["transformer.wte"].distance == pytest.approx(math.sqrt(90 * 32))
    assert found.layers["transformer.wte"].parameters == 90 * 32


def test_added_rows_are_not_counted_as_anchored(gpt2):
    gpt2.resize_token_embeddings(97)
    found = drift_report(gpt2, Anchor.from_model(gpt2))
    assert found.counts["anchored"] == found.total.parameters


def test_measuring_touches_no_gradient(classifier, anchor, move):
    drift_report(move(classifier), anchor)
    assert all(p.grad is None for p in classifier.parameters())


def test_wrong_model(anchor):
    with pytest.raises(ValueError, match="which the model lacks"):
        drift_report(nn.Linear(2, 2), anchor)


def test_json_round_trip(with_course, tmp_path):
    path = with_course.save(str(tmp_path / "new" / "folder" / "report.json"))
    content = strictly_read(path)
    assert content == with_course.to_dict()
    content["total"] = LayerDrift(**content["total"])
    content["layers"] = {name: LayerDrift(**layer) for name, layer in content["layers"].items()}
    assert DriftReport(**content) == with_course


def test_picture(with_course, drifted, tmp_path):
    path = with_course.plot(str(tmp_path / "new" / "report.png"))
    image = imread(path)
    assert image.shape[0] > 300 and image.shape[1] > 1000
    assert image[..., :3].std() > 0.01
    drifted.history = []
    assert imread(drifted.plot(tmp_path / "layers.png")).shape[1] < image.shape[1]


def test_picture_of_no_drift_and_of_long_names(tmp_path):
    zero = LayerDrift(4, 0.0, 1.0, 0.0)
    names = [f"a_module_with_a_very_long_name_indeed.layer.{index}" for index in range(40)]
    empty = DriftReport(zero, {name: zero for name in names}, {}, {})
    assert imread(empty.plot(tmp_path / "report.png")).shape[0] > 1500


def test_picture_leaves_matplotlib_as_it_is(with_course, tmp_path):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    with_course.plot(tmp_path / "report.png")
    assert plt.get_fignums() == before


def test_picture_without_matplotlib(drifted, tmp_path, monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"needs matplotlib, which is not installed: pip install 'hf-l2sp\[plots\]'"):
        drifted.plot(tmp_path / "report.png")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def from_zero():
    """A layer whose θ0 is 0 and that has moved: its relative drift is infinite."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.zeros_(net[1].weight)
    nn.init.zeros_(net[1].bias)
    anchor = Anchor.from_model(net)
    net[1].weight.data += 1.0
    return drift_report(net, anchor)


def test_layer_that_started_at_zero(from_zero):
    assert from_zero.layers["0"] == LayerDrift(6, 0.0, from_zero.layers["0"].norm, 0.0)
    assert from_zero.layers["1"].distance == 2.0 and from_zero.layers["1"].norm == 0.0
    assert from_zero.layers["1"].drift == math.inf
    assert math.isfinite(from_zero.total.drift)


def test_nothing_stored_is_no_drift():
    anchor = Anchor.from_model(nn.Linear(2, 2))
    assert layer_drift(anchor, {}) == (LayerDrift(0, 0.0, 0.0, 0.0), {})


def test_json_of_a_layer_that_started_at_zero(from_zero, tmp_path):
    strictly_read(from_zero.save(tmp_path / "report.json"))


def test_picture_of_a_layer_that_started_at_zero(from_zero, tmp_path):
    assert imread(from_zero.plot(tmp_path / "report.png")).shape[0] > 300


@pytest.fixture
def diverged(classifier, anchor):
    classifier.bert.encoder.layer[0].output.dense.weight.data[0, 0] = math.nan
    return drift_report(classifier, anchor)


def test_diverged_model_is_reported_as_what_it_is(diverged):
    assert math.isnan(diverged.total.drift) and math.isnan(diverged.layers["bert.encoder.layer.0"].drift)
    assert diverged.layers["bert.encoder.layer.1"].drift == 0.0


def test_json_of_a_diverged_model(diverged, tmp_path):
    strictly_read(diverged.save(tmp_path / "report.json"))


def test_picture_of_a_diverged_model(diverged, tmp_path):
    assert imread(diverged.plot(tmp_path / "report.png")).shape[0] > 300
