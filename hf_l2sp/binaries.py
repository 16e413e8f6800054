"""Weights in PyTorch's old format, a pickle: tensors by name are read from it, and no code in it is ever run."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor
from transformers.utils.import_utils import check_torch_load_is_safe


def load_binary(path: Path, mapped: bool = False) -> dict[str, Tensor]:
    """The tensors in a `.bin` file.

    Args:
        path: The file.
        mapped: Map the file instead of reading all of it.

    Raises:
        ValueError: PyTorch is older than 2.6, whose restricted unpickler can be broken out of (CVE-2025-32434), or
            the file holds something else than tensors by name.
        UnpicklingError: The file holds what may be code.
    """
    check_torch_load_is_safe()
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{str(path)!r} holds something else than tensors by name, so it is no file of weights.")
    return found


def is_refused_pickle(error: BaseException | None) -> bool:
    """Whether an error goes back to a pickle that PyTorch did not open, since it holds what may be code."""
    while error is not None:
        if isinstance(error, UnpicklingError):
            return True
        error = error.__cause__ or error.__context__
    return False
