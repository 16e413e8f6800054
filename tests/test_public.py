"""What of a folder is uploaded: never a secret, a path of the machine, or a row of data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_l2sp.public import clean_card, is_local, public_files

CARD = "---\nbase_model: {base}\nlibrary_name: {library}\ntags:\n- base_model:adapter:{base}\n- medical\n---\n{text}"


def uploaded(folder: Path, path_in_repo: str = "", secrets: tuple[str, ...] = ()) -> dict[str, bytes]:
    files = {}
    for operation in public_files(folder, path_in_repo, secrets):
        source = operation.path_or_fileobj
        files[operation.path_in_repo] = source if isinstance(source, bytes) else Path(source).read_bytes()
    return files


def write(folder: Path, name: str, content: object = "x") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def test_files_that_stay_here(tmp_path):
    kept = ["config.json", "model.safetensors", "vocab.txt", "1_Pooling/config.json", "code/__init__.py"]
    left_out = ["training_args.bin", "checkpoint-5/model.safetensors", "_l2sp_anchor.safetensors", ".cache/x", ".env"]
    left_out += ["runs/Jan01_host/events.out.tfevents.1.host", "run.log", "run.json", "l2sp_report.html"]
    left_out += ["predictions.jsonl", "data/train.csv", "part.parquet"]
    for name in kept + left_out:
        write(tmp_path, name)
    assert sorted(uploaded(tmp_path)) == sorted(kept)
    assert sorted(uploaded(tmp_path / "checkpoint-5", "last-checkpoint")) == ["last-checkpoint/model.safetensors"]


@pytest.mark.parametrize(("base", "source"), [("org/base", "org/base"), ("/gone/base", None)])
def test_sources_become_the_base_model_of_the_card(tmp_path, base, source):
    write(tmp_path, "README.md", CARD.format(base=base, library="peft", text="text\n"))
    anchor = {"source": "/gone/models/base", "revision": None, "fingerprint": "f"}
    write(tmp_path, "l2sp_state.json", {"anchor": anchor, "weights": "/gone/fisher.safetensors"})
    write(tmp_path, "adapter_config.json", {"base_model_name_or_path": r"C:\models\base", "r": 8})
    write(tmp_path, "config.json", {"_name_or_path": "./base", "id2label": {"0": "/gone/label"}})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    files = {name: json.loads(raw) for name, raw in uploaded(tmp_path).items() if name.endswith(".json")}
    assert files["l2sp_state.json"] == {"anchor": {**anchor, "source": source}, "weights": "fisher.safetensors"}
    assert files["adapter_config.json"] == {"base_model_name_or_path": source, "r": 8}
    assert files["config.json"] == {"_name_or_path": source, "id2label": {"0": "/gone/label"}}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_is_public_is_uploaded_as_it_is(tmp_path):
    text = '{"anchor":   {"source": "org/model", "revision": "abc"}}'
    write(tmp_path, "l2sp_state.json", text)
    write(tmp_path, "tokenizer.json", {"vocab": {str(tmp_path): 1}})  # words look like anything
    write(tmp_path, "broken.json", "{")
    files = uploaded(tmp_path)
    assert files["l2sp_state.json"].decode() == text and files["broken.json"] == b"{"
    assert json.loads(files["tokenizer.json"])["vocab"] == {str(tmp_path): 1}


def test_paths_and_secrets_in_any_text(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/users/somebody"))
    folder = tmp_path / "out"
    best = str(folder / "checkpoint-7")
    write(folder, "checkpoint-7/config.json", {})
    write(folder, "trainer_state.json", {"best_model_checkpoint": best, "log_history": [{"loss": 1.0}]})
    write(
        folder, "settings.yaml", f"out: {folder}\ncache: /users/somebody/data\ntoken: hf_secret\nother: {folder}er\n"
    )
    write(folder, "results.json", {"file": best, "score": "1/2"})
    files = uploaded(folder, secrets=("hf_secret",))
    state = json.loads(files["trainer_state.json"])
    assert state == {"best_model_checkpoint": "checkpoint-7", "log_history": [{"loss": 1.0}]}
    assert json.loads(files["results.json"]) == {"file": "checkpoint-7", "score": "1/2"}
    assert files["settings.yaml"].decode() == f"out: ...\ncache: .../data\ntoken: ...\nother: {folder}er\n"


def test_card_of_an_adapter_on_a_local_model(tmp_path):
    base = str(tmp_path / "models" / "base")
    text = f"A fine-tuned version of [{base}](https://huggingface.co/{base}). Load {base} first.\n"
    card = ModelCard(CARD.format(base=base, library="peft", text=text))
    clean_card(card)
    assert card.data.to_dict() == {"library_name": "peft", "tags": ["medical"]}
    assert card.text == "A fine-tuned version of a pretrained model. Load base first.\n"


def test_card_of_sentence_transformers_loses_its_samples(tmp_path):
    rows = "* Samples:\n  | anchor | positive |\n  |:--|:--|\n  | <code>a patient's text</code> | <code>x</code> |\n"
    sentences = "sentences = [\n    'a patient\\'s text',\n    'another',\n]\nembeddings = model.encode(sentences)\n"
    arguments = "- `l2sp_anchor`: /models/base\n- `seed`: 42\n"
    text = f"{sentences}* Size: 9\n{rows}* Loss: x\n{arguments}"
    card = CARD.format(base="org/base", library="sentence-transformers", text=text)
    write(tmp_path, "README.md", card.replace("tags:", "widget:\n- text: a patient's text\ntags:"))
    content = uploaded(tmp_path)["README.md"].decode()
    _, header, body = content.split("---\n", 2)
    assert "widget" not in header and "base_model: org/base" in header
    assert body == (
        "sentences = [...]\nembeddings = model.encode(sentences)\n* Size: 9\n* Loss: x\n"
        "- `l2sp_anchor`: base\n- `seed`: 42\n"
    )


@pytest.mark.parametrize("place", ["/a/b", "~/b", "./b", "../b", r"C:\b", "C:/b", "folder"])
def test_local(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert is_local(place)
    assert not is_local("org/model") and not is_local("gpt2")
