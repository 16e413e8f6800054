"""`l2sp_state.json`: written whole, read with suspicion, and never mistaken about which θ0 it means."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertForSequenceClassification, BertModel

import hf_l2sp
from hf_l2sp import Anchor
from hf_l2sp import state as state_module
from hf_l2sp.state import (
    FORMAT_VERSION,
    STATE_NAME,
    anchor_state,
    check_fingerprint,
    entry_names,
    read_state,
    recorded_anchor,
    write_state,
)


@pytest.fixture
def anchor(net):
    return Anchor.from_model(net)


def written(folder, anchor, **changes):
    write_state(folder, {"anchor": {**anchor_state(anchor), **changes}})
    return read_state(folder)


@pytest.fixture
def fine_tuned(tiny_bert_dir, classifier, move, tmp_path):
    """Folder with a fine-tuned classifier and the record of its θ0."""
    folder = tmp_path / "fine_tuned"
    write_state(folder, {"anchor": anchor_state(Anchor.from_model(classifier))})
    move(classifier).save_pretrained(folder)
    return folder


# --- writing and reading --------------------------------------------------------------------------------------------


def test_round_trip(tmp_path, net, anchor):
    folder = tmp_path / "new" / "folder"
    path = write_state(str(folder), {"anchor": anchor_state(anchor), "mode": "loss"})
    assert path == folder / STATE_NAME and os.listdir(folder) == [STATE_NAME]
    state = read_state(folder)
    assert state["format_version"] == FORMAT_VERSION == 1
    assert state["hf_l2sp_version"] == hf_l2sp.__version__
    assert state["mode"] == "loss"
    assert state["anchor"]["fingerprint"] == anchor.fingerprint
    assert entry_names(state) == list(anchor)
    for name, entry in state["anchor"]["entries"].items():
        value = net.get_parameter(name).detach().double()
        assert entry["shape"] == list(value.shape)
        assert entry["sum"] == pytest.approx(float(value.sum()), rel=1e-12, abs=1e-12)
        assert entry["sum_of_squares"] == pytest.approx(float((value**2).sum()), rel=1e-12)
    # Through JSON and back nothing is lost: the comparison is exact.
    check_fingerprint(anchor, state, folder)


def test_writing_again_replaces_it(tmp_path, anchor):
    write_state(tmp_path, {"anchor": anchor_state(anchor), "mode": "a"})
    write_state(tmp_path, {"anchor": anchor_state(anchor), "mode": "b"})
    assert read_state(tmp_path)["mode"] == "b" and os.listdir(tmp_path) == [STATE_NAME]


@pytest.mark.parametrize("where", ["serialising", "replacing"])
def test_failed_write_leaves_the_old_file(tmp_path, anchor, monkeypatch, where):
    before = written(tmp_path, anchor)
    if where == "serialising":
        with pytest.raises(TypeError):
            write_state(tmp_path, {"anchor": object()})
        assert os.listdir(tmp_path) == [STATE_NAME]
    else:

        def crash(*args):
            raise OSError("disk full")

        monkeypatch.setattr(state_module.os, "replace", crash)
        with pytest.raises(OSError, match="disk full"):
            write_state(tmp_path, {"anchor": {}})
    assert read_state(tmp_path) == before


def test_no_file_is_no_state(tmp_path):
    assert read_state(tmp_path) is None
    assert read_state(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: "{}",
        lambda text: text.replace('"fingerprint"', '"finger"'),
        lambda text: text.replace('"entries"', '"entry"'),
        lambda text: text.replace('"source"', '"sauce"'),
        lambda text: re.sub(r'"sum": [-\d.e]+', '"sum": "many"', text),
        lambda text: re.sub(r'"sum_of_squares": [-\d.e]+', '"sum_of_squares": null', text),
        lambda text: re.sub(r'"entries": \{', '"entries": 3, "old": {', text),
        lambda text: re.sub(r"\"shape\": \[[^]]*\]", '"shape": 5', text),
        lambda text: text.replace('"format_version": 1,', ""),
    ],
)
def test_damaged_file(tmp_path, anchor, damage):
    written(tmp_path, anchor)
    path = tmp_path / STATE_NAME
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=rf"{path} is damaged \(.*Resume from another checkpoint, or delete the file"):
        read_state(tmp_path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / STATE_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is damaged"):
        read_state(tmp_path)


LATER = r"has format version 2; this hf_l2sp reads 1\. Install the version that wrote it \(hf_l2sp 9\.9\)"


def test_other_format(tmp_path, anchor):
    written(tmp_path, anchor)
    path = tmp_path / STATE_NAME
    state = {**json.loads(path.read_text()), "format_version": 2, "hf_l2sp_version": "9.9"}
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=LATER):
        read_state(tmp_path)


def test_other_format_with_another_layout(tmp_path):
    (tmp_path / STATE_NAME).write_text(json.dumps({"format_version": 2, "hf_l2sp_version": "9.9", "anchors": []}))
    with pytest.raises(ValueError, match=LATER):
        read_state(tmp_path)


# --- telling one θ0 from another ------------------------------------------------------------------------------------


def test_mismatch_names_tensor_source_and_cure(tmp_path, net, anchor):
    state = written(tmp_path, anchor, source="some/model")
    net[1].weight.data[0, 0] += 0.25
    other = Anchor.from_model(net)
    with pytest.raises(ValueError) as caught:
        check_fingerprint(other, state, tmp_path)
    message = str(caught.value)
    assert f"The anchor differs from the one that {tmp_path / STATE_NAME} was trained against" in message
    assert "1 of 4 tensors differ, first 1.weight: shape [2, 4], sum" in message
    for anchor_, where in ((anchor, "on record"), (other, "here")):
        sums = anchor_.sums["1.weight"]
        assert f"sum {sums.total:.9g}, sum of squares {sums.squared:.9g} {where}" in message
    assert anchor.fingerprint[:12] in message and other.fingerprint[:12] in message
    assert "l2sp_anchor='some/model'" in message


def test_mismatch_of_shapes_without_a_source(tmp_path, net, anchor):
    state = written(tmp_path, anchor)
    other = Anchor.from_model(nn.Sequential(net[0], nn.Linear(4, 5)))
    with pytest.raises(
        ValueError,
        match=r"2 of 4 tensors differ, first 1\.weight: shape \[2, 4\], .*\[5, 4\], .*set l2sp_anchor to its folder",
    ):
        check_fingerprint(other, state, tmp_path)


def test_nothing_in_common(tmp_path, anchor):
    state = written(tmp_path, anchor)
    other = Anchor.from_model(nn.ModuleDict({"a": nn.Linear(2, 2)}))
    with pytest.raises(ValueError, match=r"no parameter is in common \(on record: 0\.weight, 0\.bias, 1\.weight\)"):
        check_fingerprint(other, state, tmp_path)


def test_what_only_one_of_them_knows_is_no_mismatch(tmp_path, net, anchor):
    state = written(tmp_path, anchor)
    net[0].weight.data += 1.0
    net[0].requires_grad_(False)
    check_fingerprint(Anchor.from_model(net), state, tmp_path)


def test_storage_dtype_is_no_mismatch(tmp_path, net, anchor):
    check_fingerprint(Anchor.from_model(net, dtype="bfloat16", offload="cpu"), written(tmp_path, anchor), tmp_path)


def test_change_that_keeps_the_sum_is_a_mismatch(tmp_path, net):
    net[1].weight.data = torch.arange(8.0).reshape(2, 4) + 9
    state = written(tmp_path, Anchor.from_model(net))
    net[1].weight.data += torch.tensor([[-1.0], [1.0]])
    with pytest.raises(ValueError, match="differs"):
        check_fingerprint(Anchor.from_model(net), state, tmp_path)


# --- a model from a folder with a record ----------------------------------------------------------------------------


def test_recorded_source_is_the_anchor_not_the_weights_beside_it(fine_tuned, tiny_bert_dir):
    model = BertForSequenceClassification.from_pretrained(fine_tuned)
    found = recorded_anchor(model, exclude=["pooler"], dtype="bfloat16")
    pretrained = BertModel.from_pretrained(tiny_bert_dir)
    assert found.source == tiny_bert_dir
    assert not any("pooler" in name or "classifier" in name for name in found)
    for name, value in found.items():
        assert torch.equal(value, pretrained.get_parameter(name.removeprefix("bert.")).to(torch.bfloat16))


def test_second_generation_keeps_the_first_anchor(fine_tuned, move, tmp_path, tiny_bert_dir):
    model = BertForSequenceClassification.from_pretrained(fine_tuned)
    folder = tmp_path / "again"
    write_state(folder, {"anchor": anchor_state(recorded_anchor(model))})
    move(model).save_pretrained(folder)
    again = recorded_anchor(BertForSequenceClassification.from_pretrained(folder))
    assert again.source == tiny_bert_dir
    assert torch.equal(again["bert.pooler.dense.weight"], BertModel.from_pretrained(tiny_bert_dir).pooler.dense.weight)


def test_models_without_a_record(classifier, net, bert_config):
    assert recorded_anchor(classifier) is None
    assert recorded_anchor(net) is None
    assert recorded_anchor(BertModel(bert_config)) is None
    classifier.name_or_path = "some/model"
    assert recorded_anchor(classifier) is None


def rewrite(folder, **changes):
    path = folder / STATE_NAME
    state = json.loads(path.read_text())
    state["anchor"].update(changes)
    path.write_text(json.dumps(state))


def test_record_without_a_source(fine_tuned):
    rewrite(fine_tuned, source=None)
    model = BertForSequenceClassification.from_pretrained(fine_tuned)
    with pytest.raises(
        ValueError, match=rf"does not say where its θ0 can be had\. .* set l2sp_anchor='{fine_tuned}'\."
    ):
        recorded_anchor(model)


def test_record_whose_source_is_gone(fine_tuned, tmp_path):
    rewrite(fine_tuned, source=str(tmp_path / "gone"), revision="abc")
    model = BertForSequenceClassification.from_pretrained(fine_tuned)
    with pytest.raises(ValueError) as caught:
        recorded_anchor(model)
    message = str(caught.value)
    assert (
        f"its θ0 is on record in {fine_tuned / STATE_NAME} as '{tmp_path / 'gone'}' at abc, but: θ0 cannot" in message
    )
    assert f"To take the fine-tuned weights as a new θ0 on purpose, set l2sp_anchor='{fine_tuned}'." in message


def test_record_whose_source_was_replaced(fine_tuned, bert_config, tmp_path):
    BertModel(bert_config).save_pretrained(tmp_path / "other")
    rewrite(fine_tuned, source=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="The anchor differs from the one that .*tensors differ, first bert"):
        recorded_anchor(BertForSequenceClassification.from_pretrained(fine_tuned))


def test_damaged_record_stops_everything(fine_tuned):
    (fine_tuned / STATE_NAME).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        recorded_anchor(BertForSequenceClassification.from_pretrained(fine_tuned))


def test_fine_tuned_weights_as_a_new_anchor_on_purpose(fine_tuned):
    model = BertForSequenceClassification.from_pretrained(fine_tuned)
    anchor = Anchor.from_pretrained(str(fine_tuned), model)
    assert torch.equal(anchor["classifier.weight"], model.classifier.weight)


def test_source_of_a_module_of_ones_own_has_no_record(net, tmp_path):
    save_file(dict(net.state_dict()), tmp_path / "model.safetensors")
    write_state(tmp_path, {"anchor": anchor_state(Anchor.from_model(net))})
    assert recorded_anchor(net) is None
