"""Where θ0 is kept: copies in memory, or tensors mapped from the model's own file or from one that is written once."""

from __future__ import annotations

import errno
import fnmatch
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel, Trainer

from hf_l2sp import Anchor, storage
from hf_l2sp.provenance import SourceFiles
from hf_l2sp.storage import FILE_STEM, Storage

from .helpers import saved

NAME = f"{FILE_STEM}.safetensors"
needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc of Linux")


def values_of(seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b.weight": (7, 5), "a.bias": (3,), "c.scale": ()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def equal(kept: dict[str, Tensor], values: dict[str, Tensor]) -> bool:
    return list(kept) == list(values) and all(torch.equal(kept[n], v.to(kept[n].dtype)) for n, v in values.items())


def file_under(tensor: Tensor) -> str:
    """The file of whose mapping a tensor's memory is part; empty for memory of the process."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, *rest = line.split(maxsplit=5)
        start, stop = (int(bound, 16) for bound in bounds.split("-"))
        if start <= address < stop:
            return rest[4] if len(rest) == 5 and rest[4].startswith("/") else ""
    raise AssertionError("no such address")


def from_file(path: Path, change: Callable[[str], str] = lambda name: name):
    """As `SourceFiles.mapped` of a model does it, for any names."""
    files = SourceFiles([path])

    def mapped(name: str) -> tuple[Tensor, Path] | None:
        found = files.mapped(SimpleNamespace(base_model_prefix="none"), change(name))
        return found

    return mapped


def disk(folder: Path, **options) -> Storage:
    return Storage(options.pop("dtype", "auto"), "disk", folder=folder, **options)


# --- in memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("offload", ["none", "cpu", "disk"])
def test_every_kind_keeps_copies_in_its_dtype(offload, dtype, own, tmp_path):
    values = values_of(dtype=own)
    values["d.transposed"] = torch.randn(5, 4).to(own).t()
    before = {name: value.clone() for name, value in values.items()}
    store = Storage(dtype, offload, folder=tmp_path)
    kept = store.keep(values)
    for value in values.values():
        value.fill_(7.0)
    stored = {"auto": own, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    assert list(kept) == list(values)
    for name, value in kept.items():
        assert value.dtype == stored and value.is_contiguous() and not value.requires_grad
        assert torch.equal(value, before[name].to(stored))
    size = sum(value.numel() for value in kept.values()) * stored.itemsize
    assert store.nbytes(kept) == (0 if offload == "disk" else size)


def test_a_view_is_kept_without_the_memory_around_it():
    big = torch.zeros(1000, 4)
    (kept,) = Storage().keep({"rows": big[:3]}).values()
    assert kept.untyped_storage().nbytes() == 3 * 4 * 4


# --- mapped from the model's own file -------------------------------------------------------------------------------


MEASURE = """
import gc, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from hf_l2sp.provenance import SourceFiles
from hf_l2sp.storage import Storage

class Bare:
    base_model_prefix = "none"

def anonymous():
    gc.collect()
    (line,) = [l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon")]
    return int(line.split()[1]) / 1024

folder = Path(sys.argv[1])
theta = torch.randn(25_000_000)
save_file({"weight": theta}, folder / "model.safetensors")
files = SourceFiles([folder / "model.safetensors"])
mapped = lambda name: files.mapped(Bare(), name)
for label, store in {
    "none": Storage(),
    "source": Storage("auto", "disk", folder=folder / "out", mapped=mapped),
    "written": Storage("bfloat16", "disk", folder=folder / "out", mapped=mapped),
}.items():
    before = anonymous()
    kept = store.keep({"weight": theta})["weight"]
    assert torch.equal(kept, theta.to(kept.dtype))  # every page of it was read
    print(label, anonymous() - before, kept.data_ptr())
    del kept
start = theta.data_ptr()
print("theta", start, start + theta.numel() * 4)
"""


@needs_proc
def test_a_mapped_anchor_takes_no_memory_of_the_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {label: (float(a), int(b)) for label, a, b in (line.split() for line in done.stdout.splitlines())}
    start, stop = found.pop("theta")
    assert found["none"][0] > 90  # 95 MiB: the measurement can see it
    assert abs(found["source"][0]) < 3 and abs(found["written"][0]) < 3
    assert not any(start <= address < stop for _, address in found.values())
    assert [path.name for path in (tmp_path / "out").iterdir()] == [NAME]  # of bfloat16 alone


@pytest.fixture
def source(tmp_path, tiny_bert_dir, move) -> Path:
    """A folder with a pretrained model, no number of which is round, that a test may change."""
    return Path(saved(tmp_path / "pretrained", move(BertModel.from_pretrained(tiny_bert_dir))))


def classifier_from(folder) -> BertForSequenceClassification:
    return BertForSequenceClassification.from_pretrained(folder, num_labels=3)


def rename(source: Path, change: Callable[[str], str]) -> None:
    tensors = {change(name): value for name, value in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def old_names(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def split(source: Path) -> None:
    """The same weights in several files with an index."""
    BertModel.from_pretrained(source).save_pretrained(source, max_shard_size="20KB")
    (source / "model.safetensors").unlink(missing_ok=True)
    assert len(list(source.glob("model-*.safetensors"))) > 1 and (source / "model.safetensors.index.json").exists()


FILES = {
    "without prefix": lambda source: None,
    "with prefix": lambda source: rename(source, "bert.{}".format),
    "old names": lambda source: rename(source, old_names),
    "old names with prefix": lambda source: rename(source, lambda name: old_names(f"bert.{name}")),
    "several files": split,
}


@needs_proc
@pytest.mark.parametrize("kind", FILES)
def test_the_models_own_file_is_the_anchor(kind, source, tmp_path):
    FILES[kind](source)
    model = classifier_from(source)
    anchor = Anchor.from_model(model, offload="disk", offload_folder=tmp_path / "out")
    plain = Anchor.from_model(model)
    assert list(anchor) == list(plain) and len(anchor) == 39
    assert anchor.fingerprint == plain.fingerprint and anchor.nbytes == 0
    for name, value in anchor.items():
        assert torch.equal(value, plain[name]) and value.dtype == torch.float32
        assert Path(file_under(value)).parent == source
        assert not file_under(plain[name])
    assert not (tmp_path / "out").exists()
    anchor.require_own_memory()
    anchor.require_unchanged()


def test_a_file_of_more_digits_is_not_the_anchor_of_a_rounded_model(tmp_path):
    """What bfloat16 weights were rounded from would pull them to where they never were."""
    values = values_of()
    save_file(values, tmp_path / "model.safetensors")
    store = disk(tmp_path / "out", mapped=from_file(tmp_path / "model.safetensors"))
    kept = store.keep({name: value.bfloat16() for name, value in values.items()})
    assert all(torch.equal(kept[name], value.bfloat16()) for name, value in values.items())
    assert {value.dtype for value in kept.values()} == {torch.bfloat16}
    assert (tmp_path / "out" / NAME).exists()


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_file_of_fewer_digits_is_the_anchor_of_the_model_that_was_loaded_from_it(tmp_path, narrow):
    values = values_of(dtype=narrow)
    save_file(values, tmp_path / "model.safetensors")
    store = disk(tmp_path / "out", mapped=from_file(tmp_path / "model.safetensors"))
    kept = store.keep({name: value.float() for name, value in values.items()})
    assert {value.dtype for value in kept.values()} == {narrow} and equal(kept, values)
    assert not (tmp_path / "out").exists()


def test_only_what_the_file_does_not_hold_is_written(tmp_path):
    values = values_of()
    other = {**values, "a.bias": values["a.bias"] + 1e-6, "c.scale": values["c.scale"].view(1)}
    save_file(other, tmp_path / "model.safetensors")
    store = disk(tmp_path / "out", mapped=from_file(tmp_path / "model.safetensors"))
    assert equal(store.keep(values), values)
    assert set(load_file(tmp_path / "out" / NAME)) == {"a.bias", "c.scale"}


def test_one_byte_numbers_are_not_weights(tmp_path):
    """Their scales are elsewhere; float8 cannot even be compared with float32."""
    save_file({"w": torch.ones(4).to(torch.float8_e4m3fn), "v": torch.ones(4, dtype=torch.int8)}, tmp_path / "m")
    store = disk(tmp_path / "out", mapped=from_file(tmp_path / "m"))
    values = {"w": torch.ones(4), "v": torch.ones(4)}
    assert equal(store.keep(values), values)
    assert set(load_file(tmp_path / "out" / NAME)) == {"w", "v"}


@pytest.mark.parametrize("linked", [False, True])
def test_a_source_in_the_output_folder_is_copied(tmp_path, linked):
    """Trainer writes there; under a mapping that would end the process."""
    values = values_of()
    inside = tmp_path / "out" / "checkpoint-3" / "model.safetensors"
    inside.parent.mkdir(parents=True)
    save_file(values, inside)
    path = inside
    if linked:
        path = tmp_path / "link.safetensors"
        path.symlink_to(inside)
    kept = disk(tmp_path / "out", mapped=from_file(path)).keep(values)
    inside.write_bytes(b"")
    assert equal(kept, values)
    assert (tmp_path / "out" / NAME).exists()


def test_an_output_folder_inside_of_the_source_is_no_objection(tmp_path):
    values = values_of()
    save_file(values, tmp_path / "model.safetensors")
    disk(tmp_path / "out", mapped=from_file(tmp_path / "model.safetensors")).keep(values)
    assert not (tmp_path / "out").exists()


# --- written once ---------------------------------------------------------------------------------------------------


def mark(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


@needs_proc
def test_what_no_file_holds_is_written_once_and_used_again(tmp_path):
    values = values_of()
    first = disk(tmp_path / "out").keep(values)
    path = tmp_path / "out" / NAME
    assert equal(first, values) and file_under(first["b.weight"]) == str(path)
    assert [p.name for p in path.parent.iterdir()] == [NAME]
    before = mark(path)
    again = disk(tmp_path / "out").keep({name: value.clone() for name, value in values.items()})
    assert mark(path) == before and equal(again, values)


def other_values(path, values):
    save_file({name: value + 1 for name, value in values.items()}, path)


def other_names(path, values):
    save_file({**values, "more": torch.ones(2)}, path)


def other_dtype(path, values):
    save_file({name: value.double() for name, value in values.items()}, path)


def other_shape(path, values):
    save_file({name: value.reshape(1, *value.shape) for name, value in values.items()}, path)


def cut_off(path, values):
    save_file(values, path)
    path.write_bytes(path.read_bytes()[:-9])


def corrupt(path, values):
    save_file(values, path)
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")


@pytest.mark.parametrize("spoil", [other_values, other_names, other_dtype, other_shape, cut_off, corrupt])
def test_a_file_that_is_not_this_anchor_is_replaced(tmp_path, spoil):
    values = values_of()
    path = tmp_path / NAME
    spoil(path, values)
    before = mark(path)
    kept = disk(tmp_path).keep(values)
    assert mark(path)[0] != before[0]
    assert equal(kept, values) and equal(dict(sorted(load_file(path).items())), dict(sorted(values.items())))


def test_an_anchor_that_is_replaced_stays_what_it_was(tmp_path):
    """Two trainers in one folder: the second must not change θ0 of the first."""
    first, second = disk(tmp_path), disk(tmp_path)
    kept = first.keep(values_of(1))
    other = second.keep(values_of(2))
    assert equal(kept, values_of(1)) and equal(other, values_of(2))
    first.require_unchanged()


def test_what_a_killed_process_left_is_removed(tmp_path):
    disk(tmp_path).keep(values_of())
    stale = tmp_path / f"{NAME}.0.tmp"
    stale.mkdir()
    (stale / ".tmpAbCdEf").write_bytes(b"half")
    disk(tmp_path).keep(values_of())
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


def test_a_writer_on_another_machine_is_left_alone(tmp_path):
    """Two machines without sharding write one file in a common folder."""
    stale = tmp_path / f"{NAME}.8.tmp"
    stale.write_bytes(b"half")
    disk(tmp_path).keep(values_of())
    assert stale.read_bytes() == b"half"


def test_relative_folder_survives_a_change_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = disk(Path("out"))
    store.keep({"a": torch.ones(3)})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.keep({"b": torch.ones(3)})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{FILE_STEM}-1.safetensors", NAME]
    with (tmp_path / "out" / NAME).open("ab") as file:
        file.write(b"x")
    with pytest.raises(RuntimeError, match="was changed during training"):
        store.require_unchanged()


def test_full_disk(tmp_path, monkeypatch):
    def fails(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "save_file", fails)
    with pytest.raises(OSError, match=r"(?s)θ0 cannot be written to .*No space left.*another output_dir.*'none'") as e:
        disk(tmp_path).keep(values_of())
    assert isinstance(e.value.__cause__, OSError) and list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_file_of_before(tmp_path, monkeypatch):
    disk(tmp_path).keep(values_of(1))

    def fails(*paths):
        raise PermissionError("not yours")

    monkeypatch.setattr(storage.os, "replace", fails)
    with pytest.raises(OSError, match="not yours"):
        disk(tmp_path).keep(values_of(2))
    assert [p.name for p in tmp_path.iterdir()] == [NAME]
    assert set(load_file(tmp_path / NAME)) == set(values_of(1))


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"θ0 cannot be written to .*choose another output_dir"):
        disk(tmp_path / "file" / "out").keep(values_of())


def test_later_values_go_to_further_files(tmp_path):
    store = disk(tmp_path)
    first, none, second = store.keep({"a": torch.ones(3)}), store.keep({}), store.keep({"b": torch.zeros(2)})
    assert none == {} and equal(first, {"a": torch.ones(3)}) and equal(second, {"b": torch.zeros(2)})
    paths = [tmp_path / NAME, tmp_path / f"{FILE_STEM}-1.safetensors"]
    before = [mark(path) for path in paths]
    again = disk(tmp_path)
    again.keep({"a": torch.ones(3)})
    again.keep({"b": torch.zeros(2)})
    assert [mark(path) for path in paths] == before and sorted(tmp_path.iterdir()) == sorted(paths)


def test_ranks_that_hold_different_parts_write_files_of_their_own(tmp_path):
    for rank in range(3):
        store = disk(tmp_path, part=(rank, 3), rank=rank)
        assert equal(store.keep({"w": torch.full((2,), float(rank))}), {"w": torch.full((2,), float(rank))})
        store.keep({"v": torch.full((1,), float(rank))})
    names = [f"{FILE_STEM}{number}-0000{k}-of-00003.safetensors" for number in ("", "-1") for k in (1, 2, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    assert torch.equal(load_file(tmp_path / names[2])["w"], torch.full((2,), 2.0))


def test_a_rank_that_does_not_write_waits_for_the_one_that_does(tmp_path):
    values = values_of()
    order = []

    def wait():  # meanwhile the other one writes
        order.append("wait")
        disk(tmp_path).keep(values)

    kept = disk(tmp_path, writes=False, rank=1, wait=wait).keep(values)
    assert order == ["wait"] and equal(kept, values)
    # A rank that holds nothing of these must wait as well, or the others would for ever.
    disk(tmp_path, part=(1, 2), wait=lambda: order.append("empty")).keep({})
    assert order == ["wait", "empty"]


def test_the_file_is_not_uploaded():
    """Trainer leaves files out of its uploads whose names begin with an underscore."""
    for method in (Trainer.push_to_hub, Trainer._push_from_checkpoint):
        (ignored,) = re.findall(
            r"folder_path=(?:self\.args\.)?output_dir,.*?ignore_patterns=\[(\"[^\]]*)\]",
            inspect.getsource(method),
            re.S,
        )
        patterns = re.findall(r'f?"([^"]+)"', ignored)
        assert "_*" in patterns
        for name in (NAME, f"{FILE_STEM}-1-00001-of-00002.safetensors", f"{NAME}.0.tmp"):
            assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        assert not any(fnmatch.fnmatch("model.safetensors", pattern) for pattern in patterns)


# --- files that change under the mapping ----------------------------------------------------------------------------


def mapped_storage(folder: Path, written: bool) -> tuple[Storage, Path]:
    """A storage and the file that it mapped: the source, or its own."""
    values, path = values_of(), folder / "model.safetensors"
    save_file(values, path)
    store = disk(folder / "out", mapped=None if written else from_file(path))
    store.keep(values)
    return store, folder / "out" / NAME if written else path


def write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # clocks of some file systems are coarse


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("change", [write_in_place, shorten])
def test_a_file_that_is_written_in_place_is_told(tmp_path, written, change):
    store, path = mapped_storage(tmp_path, written)
    store.require_unchanged()
    change(path)
    with pytest.raises(RuntimeError, match=rf"{path.name} was changed during training.*'cpu' or 'none'"):
        store.require_unchanged()


def replace(path: Path) -> None:
    other = path.with_name("other")
    save_file({"other": torch.ones(2)}, other)
    os.replace(other, path)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("change", [replace, Path.unlink])
def test_a_file_that_is_replaced_or_deleted_stays_mapped(tmp_path, written, change):
    store, path = mapped_storage(tmp_path, written)
    change(path)
    store.require_unchanged()


def test_kept_tensors_stay_when_their_file_goes(tmp_path):
    kept = disk(tmp_path).keep(values_of())
    (tmp_path / NAME).unlink()
    assert equal(kept, values_of())


# --- of whole models ------------------------------------------------------------------------------------------------


def test_model_in_lower_precision_than_its_file(source, tmp_path):
    model = BertForSequenceClassification.from_pretrained(source, num_labels=3, dtype=torch.bfloat16)
    anchor = Anchor.from_model(model, offload="disk", offload_folder=tmp_path / "out")
    assert all(torch.equal(anchor[name], model.get_parameter(name)) for name in anchor)
    assert set(load_file(tmp_path / "out" / NAME)) == set(anchor)


def test_model_in_higher_precision_than_its_file(source, tmp_path):
    BertModel.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    model = BertForSequenceClassification.from_pretrained(source, num_labels=3, dtype=torch.float32)
    anchor = Anchor.from_model(model, offload="disk", offload_folder=tmp_path / "out")
    assert all(torch.equal(anchor[name].float(), model.get_parameter(name)) for name in anchor)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows", [80, 107])
def test_resized_embeddings_are_mapped_as_far_as_they_were(source, tmp_path, rows):
    model = classifier_from(source)
    model.resize_token_embeddings(rows)
    anchor = Anchor.from_model(model, offload="disk", offload_folder=tmp_path / "out")
    words = anchor["bert.embeddings.word_embeddings.weight"]
    assert words.shape == (min(rows, 100), 32)
    assert torch.equal(words, model.bert.embeddings.word_embeddings.weight[:100])
    assert not (tmp_path / "out").exists()


def test_another_source_is_mapped_from_its_own_file(source, tmp_path, tiny_bert_dir, move):
    move(encoder := BertModel.from_pretrained(source))
    other = saved(tmp_path / "other", encoder)
    anchor = Anchor.from_pretrained(
        other, classifier_from(tiny_bert_dir), offload="disk", offload_folder=tmp_path / "out"
    )
    assert all(torch.equal(anchor[f"bert.{name}"], p) for name, p in encoder.named_parameters())
    assert not (tmp_path / "out").exists()


def test_model_that_transformers_does_not_know(net, tmp_path):
    anchor = Anchor.from_model(net, offload="disk", offload_folder=tmp_path)
    with safe_open(tmp_path / NAME, framework="pt") as file:
        assert set(file.keys()) == set(anchor)
    assert all(torch.equal(anchor[name], p) for name, p in net.named_parameters())
    nn.init.ones_(net[0].weight)
    assert not torch.equal(anchor["0.weight"], net[0].weight)


def test_size_on_disk_is_that_of_the_dtype(net, tmp_path):
    Anchor.from_model(net, dtype="bfloat16", offload="disk", offload_folder=tmp_path)
    with (tmp_path / NAME).open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        assert {entry["dtype"] for entry in json.loads(file.read(header)).values()} == {"BF16"}
    assert (tmp_path / NAME).stat().st_size == 8 + header + 2 * sum(p.numel() for p in net.parameters())
