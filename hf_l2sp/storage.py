"""Where the values of θ0 are kept: beside the parameter, in the CPU's memory, or in a mapped file."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
OFFLOADS = ("none", "cpu", "disk")
# The underscore keeps it out of uploads to the Hub: Trainer ignores such files.
FILE_STEM = "_l2sp_anchor"


class _Stamp(NamedTuple):
    """What changes when a file is written in place; one that replaces it leaves the mapping as it is."""

    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> _Stamp | None:
        try:
            found = path.stat()
        except OSError:
            return None
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


class Storage:
    """Makes the copies of θ0 that an anchor holds.

    Args:
        dtype: `auto` (that of the parameter), `float32` or `bfloat16`.
        offload: `none`, `cpu` or `disk`.
        folder: For `disk`: where values are written that no file of the model's source holds.
        mapped: For `disk`: `name -> tensor` mapped from the model's source and the path of its file, or None.
        part: For `disk`: this rank's number and the number of ranks that hold different parts.
        rank: For `disk`: this process' number among all, of which several may write one file (one on each machine).
        writes: For `disk`: whether this process writes; the others of its part wait for the file.
        wait: For `disk`: returns when all processes have called it.

    Raises:
        ValueError: An option is unknown, or `disk` has no folder.
    """

    def __init__(
        self,
        dtype: str = "auto",
        offload: str = "none",
        *,
        folder: str | os.PathLike[str] | None = None,
        mapped: Callable[[str], tuple[Tensor, Path] | None] | None = None,
        part: tuple[int, int] = (0, 1),
        rank: int = 0,
        writes: bool = True,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
        if offload not in OFFLOADS:
            raise ValueError(f"offload={offload!r} is not available; choose one of {', '.join(map(repr, OFFLOADS))}.")
        if offload == "disk" and folder is None:
            raise ValueError("offload='disk' needs a folder for what the model's own files do not hold.")
        self.dtype = DTYPES[dtype]
        self.offload = offload
        self._folder = Path(folder).absolute() if folder is not None else None
        self._mapped = mapped
        self._part = part
        self._rank = rank
        self._writes = writes
        self._wait = wait
        self._files_written = 0
        self._stamps: dict[Path, _Stamp | None] = {}

    def keep(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies that never share memory with the given tensors, which may be parts of live parameters."""
        if self.offload == "disk":
            return self._on_disk(values)
        kept = {}
        for name, value in values.items():
            device = torch.device("cpu") if self.offload == "cpu" else value.device
            copy = value.to(device=device, dtype=self.dtype or value.dtype, copy=True).contiguous()
            kept[name] = copy.pin_memory() if self.offload == "cpu" and value.is_cuda else copy
        return kept

    def nbytes(self, kept: Mapping[str, Tensor]) -> int:
        """Resident memory of kept values, in bytes; mapped files have none."""
        return 0 if self.offload == "disk" else sum(value.numel() * value.element_size() for value in kept.values())

    # --- disk -------------------------------------------------------------------------------------------------------

    def _on_disk(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        rest: dict[str, Tensor] = {}
        for name, value in values.items():
            value = value.to(self.dtype or value.dtype)
            found = self._mapped(name) if self._mapped is not None else None
            if found is not None and self._usable(found[1]) and _same_values(found[0], value):
                kept[name], path = found
                self._stamps.setdefault(path, _Stamp.of(path))
            else:
                rest[name] = value
        kept.update(self._written(rest))
        return {name: kept[name] for name in values}

    def _usable(self, path: Path) -> bool:
        # Training writes there: a file that is written in place under a mapping kills the process.
        assert self._folder is not None
        return not path.resolve().is_relative_to(self._folder.resolve())

    def _written(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self._folder is not None
        rank, parts = self._part
        number = f"-{self._files_written}" if self._files_written else ""
        of = f"-{rank + 1:05d}-of-{parts:05d}" if parts > 1 else ""
        path = self._folder / f"{FILE_STEM}{number}{of}.safetensors"
        if self._writes:
            # Rank and not process: what a killed process has left is found again.
            temporary = path.with_name(f"{path.name}.{self._rank}.tmp")
            _remove(temporary)
            if values and not _holds(path, values):
                self._write(path, temporary, values)
        self._wait()
        if not values:
            return {}
        self._files_written += 1
        self._stamps[path] = _Stamp.of(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in values}

    @staticmethod
    def _write(path: Path, temporary: Path, values: Mapping[str, Tensor]) -> None:
        try:
            # A folder: safetensors from 0.8 on writes beside its target, under a name that nobody would find again.
            temporary.mkdir(parents=True)
            whole = temporary / path.name
            save_file({name: value.detach().cpu().contiguous() for name, value in values.items()}, whole)
            os.replace(whole, path)
            temporary.rmdir()
        except Exception as error:  # OSError, or safetensors' own type for a full disk
            _remove(temporary)
            raise OSError(
                f"θ0 cannot be written to {path} ({error}). l2sp_anchor_offload='disk' keeps it in the output folder: "
                "free some space or choose another output_dir, or set l2sp_anchor_offload to 'cpu' or 'none'."
            ) from error
        logger.warning(f"L2-SP: θ0 is not all in the model's own files; the rest was written to {path}.")

    def require_unchanged(self) -> None:
        """Raises:
        RuntimeError: A mapped file was written in place since it was mapped, and θ0 with it.
        """
        for path, stamp in self._stamps.items():
            now = _Stamp.of(path)
            if stamp is not None and now is not None and now.inode == stamp.inode and now != stamp:
                raise RuntimeError(
                    f"{path} was changed during training; θ0 is mapped from it (l2sp_anchor_offload='disk') and has "
                    "changed with it. Leave the pretrained model's files alone, or set l2sp_anchor_offload to 'cpu' "
                    "or 'none', and resume from the last checkpoint."
                )


def _remove(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    with contextlib.suppress(OSError):
        temporary.unlink()


def _same_values(mapped: Tensor, value: Tensor) -> bool:
    """Whether a mapped tensor is θ0 exactly: a wider one that only rounds to it is not."""
    # Nobody trains one-byte numbers: a file of them has scales of its own.
    if mapped.shape != value.shape or mapped.dtype.itemsize == 1:
        return False
    dtype = torch.promote_types(mapped.dtype, value.dtype)
    return torch.equal(mapped.to(dtype), value.to(device="cpu", dtype=dtype))


def _holds(path: Path, values: Mapping[str, Tensor]) -> bool:
    """Whether a file, of an earlier run perhaps, has these values already."""
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(values):
                return False
            for name, value in values.items():
                there = file.get_tensor(name)
                if there.dtype != value.dtype or not _same_values(there, value):
                    return False
            return True
    except Exception:  # missing, or cut off by whatever killed its writer: it is written again
        return False


def narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The value in a narrower dtype, where that loses nothing."""
    if torch.promote_types(value.dtype, dtype) != value.dtype or value.dtype == dtype:
        return value
    narrow = value.to(dtype)
    return narrow if torch.equal(narrow.to(value.dtype), value) else value
