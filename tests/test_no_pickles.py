"""Nothing in the package or the recipes opens a pickle that may hold code, by reading the source and by trying."""

from __future__ import annotations

import ast
import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, BertModel
from transformers.utils.import_utils import check_torch_load_is_safe

import hf_l2sp.binaries
from hf_l2sp import Anchor, L2SPTrainer, L2SPTrainingArguments
from hf_l2sp.checkpoint_drift import Checkpoint
from hf_l2sp.provenance import Provenance, examine

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("hf_l2sp", "recipes") for path in (ROOT / folder).rglob("*.py"))

# What unpickles, or runs code from a file, whatever it is given.
FORBIDDEN_MODULES = {"cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "pandas.read_pickle", "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load"),
    *(f"yaml.{name}" for name in ("load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all")),
    *(f"yaml.{name}" for name in ("Loader", "FullLoader", "UnsafeLoader", "CLoader")),
}
# What may stand, and where: the class of the error that PyTorch raises over a pickle which it does not open.
ALLOWED = {("hf_l2sp/binaries.py", "pickle.UnpicklingError")}


def found_in(text: str, name: str = "x.py") -> list[str]:
    """Everything in a program by which a pickle, or code in a file, could come to be run."""
    tree = ast.parse(text)
    full: dict[str, str] = {}  # local name → what it stands for
    wrong: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                local = item.asname or item.name.partition(".")[0]
                full[local] = item.name if item.asname else local
                if item.name.partition(".")[0] in FORBIDDEN_MODULES:
                    wrong.append(item.name)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for item in node.names:
                target = f"{node.module}.{item.name}"
                full[item.asname or item.name] = target
                if node.module.partition(".")[0] in FORBIDDEN_MODULES and (name, target) not in ALLOWED:
                    wrong.append(target)

    def dotted(node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return full.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            options = {item.arg: getattr(item.value, "value", None) for item in node.keywords}
            safely = options.get("weights_only") is True
            forbidden = called in FORBIDDEN_CALLS or (called == "torch.load" and not safely)
            if forbidden or options.get("allow_pickle", False) is not False:
                wrong.append(f"line {node.lineno}: {called}")
            if options.get("trust_remote_code", False) is not False or options.get("weights_only", True) is not True:
                wrong.append(f"line {node.lineno}: {called}")
        elif isinstance(node, ast.ClassDef):
            wrong += [f"line {node.lineno}: {dotted(b)}" for b in node.bases if dotted(b) in FORBIDDEN_CALLS]
    return wrong


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import joblib as j",
        "from pickle import loads",
        "from dill import load as read",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=safe)",
        "from torch import load\nload(path)",
        "import torch\ntorch.jit.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy\nnumpy.load(path, allow_pickle=maybe)",
        "import pandas as pd\npd.read_pickle(path)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import yaml\nyaml.unsafe_load(text)",
        "import yaml\nclass Own(yaml.UnsafeLoader):\n    pass",
        "from yaml import full_load\nfull_load(text)",
        "model = auto.from_pretrained(name, trust_remote_code=True)",
        "model = auto.from_pretrained(name, weights_only=False)",
        "def f():\n    import marshal\n    return marshal.loads(x)",
        "eval(text)",
    ],
)
def test_the_search_finds_every_way(text: str) -> None:
    assert found_in(text)


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)\nclass Own(yaml.SafeLoader):\n    pass",
        "import json\njson.load(file)",
        "from safetensors.torch import load_file\nload_file(path)",
        "model.eval()",
    ],
)
def test_the_search_passes_what_is_safe(text: str) -> None:
    assert not found_in(text)


def test_no_source_opens_pickles() -> None:
    assert len(SOURCES) > 90
    found = {}
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        found[name] = found_in(path.read_text(encoding="utf-8"), name)
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_pytorchs_old_format_is_read_in_one_place() -> None:
    readers = [path for path in SOURCES if "torch.load(" in path.read_text(encoding="utf-8")]
    assert [path.relative_to(ROOT).as_posix() for path in readers] == ["hf_l2sp/binaries.py"]


# --------------------------------------------------------------------------- traps


class Trap:
    """Makes a file as soon as it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.mark, "w")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "code was run"


def set_trap(path: Path, mark: Path, zipped: bool) -> Path:
    """A pickle that would make `mark`, as torch.save writes it or bare."""
    content = {"weight": torch.zeros(2, 3), "bias": Trap(mark)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    return path


@pytest.fixture(params=[True, False], ids=["zipped", "bare"])
def zipped(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def trapped_folder(tiny_bert_dir: str, tmp_path: Path, mark: Path, zipped: bool) -> str:
    """A model repository that has its weights in pytorch_model.bin alone."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(f"{tiny_bert_dir}/config.json", folder)
    set_trap(folder / "pytorch_model.bin", mark, zipped)
    return str(folder)


def test_the_trap_works(tmp_path: Path, mark: Path, zipped: bool) -> None:
    path = set_trap(tmp_path / "a.bin", mark, zipped)
    if zipped:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert mark.exists()


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.pth", "a.pkl", "a"])
def test_a_pickle_is_no_anchor(
    name: str, net: nn.Module, classifier: nn.Module, tmp_path: Path, mark: Path, zipped: bool
) -> None:
    path = set_trap(tmp_path / name, mark, zipped)
    for model in (net, classifier):
        with pytest.raises(ValueError, match=f"l2sp_anchor='{path}' is a file, but no safetensors file, and pickles"):
            Anchor.from_pretrained(str(path), model)
    assert not mark.exists()


def test_a_pickle_under_the_name_of_another_format_is_no_anchor(
    net: nn.Module, tmp_path: Path, mark: Path, zipped: bool
) -> None:
    path = set_trap(tmp_path / "model.safetensors", mark, zipped)
    for source in (path, tmp_path):
        with pytest.raises(ValueError, match=f"θ0 cannot be loaded from '{source}'"):
            Anchor.from_pretrained(str(source), net)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["w.bin", "w.pt", "w.safetensors"])
def test_a_pickle_is_no_weights(name: str, net: nn.Module, tmp_path: Path, mark: Path, zipped: bool) -> None:
    path = set_trap(tmp_path / name, mark, zipped)
    with pytest.raises(ValueError, match=f"l2sp_weights='{path}' is neither JSON nor a readable safetensors file"):
        Anchor.from_model(net, weights=str(path))
    assert not mark.exists()


def test_code_in_a_repository_of_the_old_format_is_not_run(
    classifier: nn.Module, trapped_folder: str, mark: Path
) -> None:
    with pytest.raises(ValueError, match=f"'{trapped_folder}': its weights are a pickle .*may be code.*safetensors"):
        Anchor.from_pretrained(trapped_folder, classifier)
    assert not mark.exists()


def test_code_in_the_files_that_a_model_names_as_its_origin_is_not_run(
    classifier: nn.Module, trapped_folder: str, mark: Path, warnings_of_library: list[str]
) -> None:
    model = copy.deepcopy(classifier)  # without the marks of `from_pretrained`, so that the files are asked
    model.name_or_path = model.config._name_or_path = trapped_folder
    assert examine(model) == Provenance()
    assert any(f"cannot read the weights of '{trapped_folder}'" in message for message in warnings_of_library)
    Anchor.from_model(model, offload="disk", offload_folder=Path(trapped_folder).parent)
    assert not mark.exists()


def test_the_trainer_refuses_it_before_any_step(
    classifier: nn.Module, classification_data: Any, trapped_folder: str, mark: Path, output_dir: str
) -> None:
    for source in (trapped_folder, f"{trapped_folder}/pytorch_model.bin"):
        args = L2SPTrainingArguments(output_dir=output_dir, l2sp_anchor=source, report_to="none", use_cpu=True)
        with pytest.raises(ValueError, match="safetensors"):
            L2SPTrainer(model=classifier, args=args, train_dataset=classification_data).train()
    assert not mark.exists()


def test_the_drift_of_checkpoints_opens_none(trapped_folder: str, mark: Path) -> None:
    for source in (trapped_folder, f"{trapped_folder}/pytorch_model.bin"):
        with pytest.raises(ValueError, match="a pickle, which is never opened|pickles are never opened"):
            Checkpoint(source, None)
    assert not mark.exists()


# --------------------------------------------------------------------------- weights in the old format


@pytest.fixture
def old_format(tiny_bert_dir: str, tmp_path: Path) -> str:
    """A repository with nothing but weights in pytorch_model.bin, as many on the Hub are."""
    folder = tmp_path / "old"
    folder.mkdir()
    shutil.copy(f"{tiny_bert_dir}/config.json", folder)
    torch.save(BertModel.from_pretrained(tiny_bert_dir).state_dict(), folder / "pytorch_model.bin")
    return str(folder)


def _is_safe() -> bool:
    try:
        check_torch_load_is_safe()
    except ValueError:
        return False
    return True


@pytest.mark.skipif(not _is_safe(), reason="PyTorch before 2.6 can be made to run code by weights_only, too")
def test_weights_alone_in_the_old_format_are_an_anchor(
    classifier: nn.Module, tiny_bert_dir: str, old_format: str
) -> None:
    anchor = Anchor.from_pretrained(old_format, classifier)
    assert anchor.fingerprint == Anchor.from_pretrained(tiny_bert_dir, classifier).fingerprint
    model = copy.deepcopy(BertForSequenceClassification.from_pretrained(old_format, num_labels=3))
    assert examine(model).new == {"classifier.weight", "classifier.bias"}


def test_an_old_pytorch_opens_no_file_of_the_old_format(
    classifier: nn.Module, old_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its restricted unpickler can be broken out of (CVE-2025-32434): transformers refuses, and so must the rest."""

    def refuse() -> None:
        raise ValueError("upgrade torch to at least v2.6")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(hf_l2sp.binaries, "check_torch_load_is_safe", refuse)
    monkeypatch.setattr("transformers.modeling_utils.check_torch_load_is_safe", refuse)
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(ValueError, match=r"θ0 cannot be loaded from '.*old': upgrade torch to at least v2\.6"):
        Anchor.from_pretrained(old_format, classifier)
    model = copy.deepcopy(classifier)
    model.name_or_path = model.config._name_or_path = old_format
    assert examine(model) == Provenance()


@pytest.mark.skipif(not _is_safe(), reason="PyTorch before 2.6 opens none")
def test_a_file_of_something_else_than_tensors_is_no_source(
    classifier: nn.Module, tiny_bert_dir: str, old_format: str
) -> None:
    model = copy.deepcopy(classifier)
    model.name_or_path = model.config._name_or_path = old_format
    for content in ([torch.zeros(2)], {"a": 1}, torch.zeros(3), {"model": {"a": torch.zeros(1)}}):
        torch.save(content, f"{old_format}/pytorch_model.bin")
        assert examine(model) == Provenance()


def test_what_a_trainer_writes_beside_optimizer_and_arguments_is_no_pickle(
    classifier: nn.Module, classification_data: Any, tmp_path: Path
) -> None:
    args = L2SPTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = L2SPTrainer(model=classifier, args=args, train_dataset=classification_data)
    trainer.train()
    trainer.save_model()
    # Those of Trainer, as it writes them without L2-SP, too; the rest is safetensors, JSON and text.
    of_trainer = {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    others = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in of_trainer]
    assert {path.suffix for path in others} <= {".json", ".safetensors", ".md"}
    assert not any(path.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05") for path in others)
