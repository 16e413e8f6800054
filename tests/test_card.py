"""The model card's L2-SP section and metadata."""

from __future__ import annotations

import re

import huggingface_hub
import pytest
import yaml

from hf_l2sp import __version__
from hf_l2sp.card import add_l2sp_section, l2sp_section
from hf_l2sp.report import DriftReport, LayerDrift

CARD = """---
license: mit
tags:
- generated_from_trainer
- hf-l2sp
---

# A model

Some text.
"""
FINGERPRINT = "0123456789abcdef" * 4


def report_of(source="org/model", revision=None, **settings):
    return DriftReport(
        total=LayerDrift(1000, 0.5, 10.0, 0.05),
        layers={},
        counts={"anchored": 12345, "new": 99, "frozen": 0, "excluded": 7},
        anchor={"source": source, "revision": revision, "fingerprint": FINGERPRINT},
        settings={"lambda": 0.01, "schedule": "cosine", "mode": "loss", "beta": 0.002, "exclude": None, **settings},
    )


def card_with(folder, report, text=CARD):
    (folder / "README.md").write_text(text, encoding="utf-8")
    add_l2sp_section(folder, report)
    return (folder / "README.md").read_text(encoding="utf-8")


def metadata(card):
    found = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    return yaml.safe_load(found.group(1))


def test_metadata(tmp_path):
    assert metadata(card_with(tmp_path, report_of())) == {
        "license": "mit",
        "tags": ["generated_from_trainer", "l2-sp", "hf-l2sp"],
        "base_model": "org/model",
    }


def test_base_model_on_the_card_is_kept(tmp_path):
    text = CARD.replace("license: mit", "base_model: org/other")
    assert metadata(card_with(tmp_path, report_of(), text))["base_model"] == "org/other"


@pytest.mark.parametrize("text", ["# A model\n", "---\nlicense: mit\n---\n", ""], ids=["plain", "bare", "empty"])
def test_card_without_tags(tmp_path, text):
    card = card_with(tmp_path, report_of(), text)
    assert metadata(card)["tags"] == ["l2-sp", "hf-l2sp"]
    assert card.count("## How it was fine-tuned: L2-SP") == 1


@pytest.mark.skipif(huggingface_hub.__version__.startswith("0."), reason="takes a string apart when it loads it")
def test_card_with_one_tag_as_a_string(tmp_path):
    card = card_with(
        tmp_path, report_of(), CARD.replace("tags:\n- generated_from_trainer\n- hf-l2sp", "tags: medical")
    )
    assert metadata(card)["tags"] == ["medical", "l2-sp", "hf-l2sp"]


def test_section_says_what_was_done(tmp_path):
    card = card_with(tmp_path, report_of(revision="abc123"))
    assert card.index("Some text.") < card.index("<!-- l2-sp -->") < card.index("<!-- /l2-sp -->")
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", card, flags=re.MULTILINE))
    assert rows == {
        "anchor θ0": "org/model at abc123",
        "λ": "0.01",
        "schedule": "cosine",
        "mode": "loss",
        "β (pull of new parameters to 0)": "0.002",
        "anchored / new / frozen / excluded numbers": "12,345 / 99 / 0 / 7",
        "drift ‖θ − θ0‖ / ‖θ0‖": "0.0500",
        "fingerprint of θ0": f"`{FINGERPRINT}`",
    }
    assert f"Made with hf_l2sp {__version__}." in card
    for word in ("Li, Xuhong", "Grandvalet, Yves", "Davoine, Franck", "2018", "1802.01483"):
        assert word in card
    assert "$" not in l2sp_section(report_of())


def test_second_call_replaces_the_section(tmp_path):
    card_with(tmp_path, report_of())
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\nText that came later.\n")
    add_l2sp_section(tmp_path, report_of(**{"lambda": 0.5}))
    card = path.read_text()
    for text in ("<!-- l2-sp -->", "<!-- /l2-sp -->", "## How it was", "Text that came later.", "Some text."):
        assert card.count(text) == 1, text
    assert "| λ | 0.5 |" in card and "| λ | 0.01 |" not in card
    assert metadata(card)["tags"] == ["generated_from_trainer", "l2-sp", "hf-l2sp"]
    add_l2sp_section(tmp_path, report_of(**{"lambda": 0.5}))
    assert path.read_text() == card


def test_picture_report_and_the_way_to_have_the_anchor_again(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    report = report_of(revision="abc123", exclude=["LayerNorm"])
    add_l2sp_section(tmp_path, report, ("l2sp_report.json", "l2sp_report.png"))
    card = (tmp_path / "README.md").read_text()
    assert "](l2sp_report.png)" in card and "](l2sp_report.json)" in card
    assert "Anchor.from_pretrained('org/model', model, revision='abc123', exclude=['LayerNorm'])" in card
    bare = l2sp_section(report_of("/gone/model"))
    assert "l2sp_report" not in bare and "from_pretrained" not in bare and "\n\n\n" not in bare


def test_local_copy_of_the_base_model(tmp_path):
    card = card_with(tmp_path, report_of("/gone/model"), CARD.replace("license: mit", "base_model: org/base"))
    assert "| anchor θ0 | a local copy of org/base |" in card


def test_data_that_were_made_in_memory(tmp_path):
    text = CARD + "\nThis model was trained from scratch on the None dataset.\n"
    assert "This model was fine-tuned on an unknown dataset." in card_with(tmp_path, report_of(), text)


@pytest.mark.parametrize("kind", ["absolute", "absolute and gone", "relative", "unknown"])
def test_no_path_of_the_machine_gets_into_the_card(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret_folder").mkdir()
    source = {
        "absolute": str(tmp_path / "secret_folder"),
        "absolute and gone": str(tmp_path / "secret_that_is_gone"),
        "relative": "secret_folder",
        "unknown": None,
    }[kind]
    card = card_with(tmp_path, report_of(source))
    assert "secret" not in card and str(tmp_path) not in card
    assert "base_model" not in metadata(card)
    assert "| anchor θ0 | the pretrained weights that the trainer was given |" in card
