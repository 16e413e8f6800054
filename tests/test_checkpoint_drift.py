"""Drift between two checkpoints: against float64 arithmetic over whole tensors, and the library's own report."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, BertModel

from hf_l2sp import Anchor, drift_report
from hf_l2sp.checkpoint_drift import Checkpoint, checkpoint_drift, tensor_drift
from hf_l2sp.penalty import CHUNK


def compare(model, anchor):
    return checkpoint_drift(Checkpoint(str(model)), Checkpoint(str(anchor)))


@pytest.fixture
def tuned(classifier, move, tmp_path):
    """Folder of a classifier that has moved away from the encoder that it was loaded from."""
    anchor = Anchor.from_model(classifier)
    move(classifier)
    classifier.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned", drift_report(classifier, anchor)


def test_against_float64(tuned, tiny_bert_dir):
    found = compare(tuned[0], tiny_bert_dir)
    theta, origin = (load_file(f"{folder}/model.safetensors") for folder in (tuned[0], tiny_bert_dir))
    names = [name for name in theta if name.startswith("bert.")]
    for layer, drift in found.report.layers.items():
        inside = [name for name in names if name.startswith(layer)]
        change = torch.cat([(theta[n].double() - origin[n[5:]].double()).flatten() for n in inside])
        start = torch.cat([origin[n[5:]].double().flatten() for n in inside])
        assert drift.parameters == change.numel()
        assert drift.distance == pytest.approx(float(change.norm()), rel=1e-12)
        assert drift.norm == pytest.approx(float(start.norm()), rel=1e-12)
        assert drift.drift == pytest.approx(float(change.norm() / start.norm()), rel=1e-12)
    total = torch.cat([(theta[n].double() - origin[n[5:]].double()).flatten() for n in names])
    assert found.report.total.distance == pytest.approx(float(total.norm()), rel=1e-12)
    assert found.report.total.parameters == total.numel()


def test_it_is_the_drift_that_the_trainer_reports(tuned, tiny_bert_dir):
    folder, report = tuned
    found = compare(folder, tiny_bert_dir).report
    assert set(found.layers) == set(report.layers)
    for layer, drift in report.layers.items():
        assert found.layers[layer].drift == pytest.approx(drift.drift, rel=1e-5)
        assert found.parts[layer] == pytest.approx(report.parts[layer], rel=1e-5)
    assert found.total.drift == pytest.approx(report.total.drift, rel=1e-5)
    assert found.counts == {"anchored": report.counts["anchored"], "new": report.counts["new"]}


def test_a_new_head_is_named_and_left_out(tuned, tiny_bert_dir):
    found = compare(tuned[0], tiny_bert_dir)
    assert sorted(found.only_in_model) == ["classifier.bias", "classifier.weight"]
    assert found.only_in_anchor == found.other_shape == [] and found.rows == {}


def test_the_prefix_may_be_on_either_side(tuned, tiny_bert_dir):
    there, back = compare(tuned[0], tiny_bert_dir), compare(tiny_bert_dir, tuned[0])
    assert back.report.total.distance == pytest.approx(there.report.total.distance, rel=1e-12)
    assert sorted(back.only_in_anchor) == ["classifier.bias", "classifier.weight"]
    assert "encoder.layer.0" in back.report.layers


def test_a_checkpoint_has_not_moved_from_itself(tiny_bert_dir):
    assert compare(tiny_bert_dir, tiny_bert_dir).report.total.drift == 0.0


def test_old_names_and_those_of_wrappers(tiny_bert_dir, tmp_path):
    values = load_file(f"{tiny_bert_dir}/model.safetensors")
    old = {
        "_orig_mod."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for name, v in values.items()
    }
    save_file(old, tmp_path / "old.safetensors")
    found = compare(tiny_bert_dir, tmp_path / "old.safetensors")
    assert found.report.total.parameters == sum(v.numel() for v in values.values())
    assert found.only_in_model == found.only_in_anchor == []


def test_shards(tuned, tiny_bert_dir, tmp_path):
    model = BertForSequenceClassification.from_pretrained(tuned[0])
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    whole, parts = compare(tuned[0], tiny_bert_dir).report, compare(tmp_path / "shards", tiny_bert_dir).report
    assert parts.total.distance == pytest.approx(whole.total.distance, rel=1e-12)
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match="lacks model-00002-of-.*which its index names"):
        compare(tmp_path / "shards", tiny_bert_dir)


def test_added_rows_do_not_count_and_other_shapes_are_told(tmp_path):
    shared = {"embed.weight": torch.ones(5, 2), "a.weight": torch.ones(3), "n": torch.ones(2)}
    save_file(shared, tmp_path / "anchor.safetensors")
    tuned = {"embed.weight": torch.full((7, 2), 2.0), "a.weight": torch.ones(4), "n": torch.ones(2)}
    save_file(tuned, tmp_path / "model.safetensors")
    found = compare(tmp_path, tmp_path / "anchor.safetensors")
    assert found.rows == {"embed.weight": 5} and found.other_shape == ["a.weight"]
    assert found.report.total.distance == pytest.approx(math.sqrt(10)) and found.report.total.parameters == 12


def test_integers_and_statistics_are_no_weights(tmp_path):
    values = {"w": torch.ones(2), "ids": torch.arange(3), "bn.running_mean": torch.ones(4)}
    save_file(values, tmp_path / "a.safetensors")
    save_file({**values, "bn.running_mean": torch.zeros(4)}, tmp_path / "b.safetensors")
    found = compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (found.report.total.parameters, found.report.total.distance) == (2, 0.0)
    save_file({"ids": torch.arange(3)}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="has no floating-point tensor"):
        Checkpoint(str(tmp_path / "none.safetensors"))


def test_precisions_may_differ(tmp_path):
    theta = torch.linspace(-1, 1, 101)
    save_file({"w": theta.bfloat16()}, tmp_path / "a.safetensors")
    save_file({"w": theta}, tmp_path / "b.safetensors")
    found = compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors").report.total
    assert found.distance == pytest.approx(float((theta.bfloat16().double() - theta.double()).norm()), rel=1e-12)


def test_a_tensor_of_several_chunks():
    generator = torch.Generator().manual_seed(0)
    theta, origin = torch.randn(2, CHUNK + 17, generator=generator)
    found = tensor_drift(theta.view(1, -1), origin.view(1, -1))
    assert found.squared == pytest.approx(float((theta.double() - origin.double()).square().sum()), rel=1e-12)
    assert found.norm_squared == pytest.approx(float(origin.double().square().sum()), rel=1e-12)
    assert found.numel == CHUNK + 17


def test_nan_is_told_as_what_it_is(tmp_path):
    save_file({"w": torch.tensor([1.0, math.nan])}, tmp_path / "a.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "b.safetensors")
    found = compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert math.isnan(found.report.total.drift)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["total"]["drift"] is None


class _Trap:
    """A pickle of it makes a folder when it is opened."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_are_refused_unopened(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save(_Trap(tmp_path / "sprung"), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin alone, a pickle, which is never opened. Load the model"):
        Checkpoint(str(folder))
    with pytest.raises(ValueError, match="is no safetensors file, and pickles are never opened"):
        Checkpoint(str(folder / "pytorch_model.bin"))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "pytorch_model.bin"}}')
    with pytest.raises(ValueError, match="names 'pytorch_model.bin', a pickle"):
        Checkpoint(str(folder))
    assert not (tmp_path / "sprung").exists()


def test_what_cannot_be_compared(tmp_path, tiny_bert_dir, tiny_gpt2_dir):
    with pytest.raises(ValueError, match="have no tensor of one name and shape in common"):
        compare(tiny_bert_dir, tiny_gpt2_dir)
    with pytest.raises(ValueError, match="has no model.safetensors: name the folder"):
        Checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match="there is no folder or file './nowhere': check the path"):
        Checkpoint("./nowhere")
    with pytest.raises(ValueError, match="'nobody/nothing' is no folder or file here, and the Hub"):
        Checkpoint("nobody/nothing")
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match="holds adapters.*merge_and_unload"):
        Checkpoint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="is no whole safetensors file: .*Fetch it anew"):
        Checkpoint(str(tmp_path))


def test_the_class_need_not_be_known(tiny_bert_dir, tmp_path):
    BertModel.from_pretrained(tiny_bert_dir).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert compare(tmp_path, tiny_bert_dir).report.total.drift == 0.0
