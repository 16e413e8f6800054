"""`l2sp_fisher_samples` in a trainer: w from its training examples, found before the first step and kept."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers.trainer_utils import has_length
from transformers.utils import logging

from .fisher import save_fisher, squared_gradients
from .naming import unwrap

if TYPE_CHECKING:
    from .anchor import Anchor

logger = logging.get_logger(__name__)

FISHER_NAME = "l2sp_fisher.safetensors"


@dataclass(frozen=True)
class FisherRecord:
    """What `l2sp_state.json` knows of w.

    Attributes:
        samples: Examples that were asked for.
        examples: Those that had a label.
        sha256: Of the file; None on a process that writes none.
    """

    samples: int
    examples: int
    sha256: str | None


class L2SPFisherMixin:
    """The part of `L2SPMixin` that finds w. See `estimate_fisher` for what it is."""

    l2sp_anchor: Anchor | None
    args: Any
    model: Any
    state: Any
    accelerator: Any
    callback_handler: Any
    # The anchor whose weights w are, and where they are from.
    _l2sp_fisher: tuple[weakref.ref[Anchor], FisherRecord] | None = None

    @property
    def _l2sp_fisher_samples(self) -> int:
        return int(self._l2sp_arg("l2sp_fisher_samples"))  # type: ignore[attr-defined]

    def _l2sp_fisher_record(self) -> FisherRecord | None:
        known = self._l2sp_fisher
        return known[1] if known is not None and known[0]() is self.l2sp_anchor else None

    def _l2sp_check_fisher(self) -> None:
        """Raises:
        ValueError: Here the Fisher information cannot be had.
        """
        anchor = self.l2sp_anchor
        assert anchor is not None
        samples, cause = self._l2sp_fisher_samples, None
        if not samples:
            return
        if anchor.backend.sharded:
            cause = f"{anchor.backend.kind}, where no process has the gradient of an example"
        elif anchor.active_low_rank():
            cause = "LoRA, of whose weights the distance is known as a whole only"
        elif self.train_dataset is not None and not has_length(self.train_dataset):  # type: ignore[attr-defined]
            cause = "a training set without a length, of which no examples can be drawn"
        if cause is not None:
            raise ValueError(
                f"l2sp_fisher_samples={samples} does not work with {cause}. Set l2sp_fisher_samples=0, or for a full "
                "model estimate it in one process (hf_l2sp.estimate_fisher, hf_l2sp.fisher.save_fisher) and name the "
                "file with l2sp_weights."
            )

    # --- before the first step --------------------------------------------------------------------------------------

    def _l2sp_weigh(self) -> None:
        """Estimates w, unless that is done."""
        samples = self._l2sp_fisher_samples
        if not samples or self._l2sp_fisher_record() is not None:
            return
        anchor = self.l2sp_anchor
        assert anchor is not None
        self._l2sp_check_fisher()
        if self.state.global_step > 0:
            raise ValueError(
                f"l2sp_fisher_samples={samples}: at step {self.state.global_step} the weights have moved, and no "
                "Fisher information is on record for this run. Go on with l2sp_fisher_samples=0 as it began, or "
                "begin anew."
            )
        found = squared_gradients(
            unwrap(self.model),
            self._l2sp_fisher_batches(samples),
            seed=self.args.seed,
            progress=anchor.backend.is_main_process and not self.args.disable_tqdm,
        )
        # Each process has looked at its share.
        totals = {entry.name: found.totals[entry.name] for entry in anchor.active()}
        examples = found.examples
        if anchor.backend.processes > 1:
            count = torch.tensor(float(examples), device=self.args.device)
            examples = int(self.accelerator.reduce(count, "sum"))
            totals = {name: self.accelerator.reduce(total, "sum") for name, total in totals.items()}
        record = FisherRecord(samples, examples, None)
        anchor.weigh(_with_mean_1(totals, anchor))
        if self.args.should_save:
            path = Path(self.args.output_dir, FISHER_NAME)
            self._l2sp_write_fisher(path)
            record = FisherRecord(samples, examples, _sha256(path))
        self._l2sp_fisher = weakref.ref(anchor), record
        if anchor.backend.is_main_process:
            largest = max(float(weight.max()) for weight in self._l2sp_fisher_weights().values())
            logger.warning(
                f"L2-SP: w is the diagonal Fisher information on {examples} training examples, mean 1, largest "
                f"{largest:.3g}; written to {os.path.join(self.args.output_dir, FISHER_NAME)}."
            )

    def _l2sp_fisher_batches(self, samples: int) -> Iterable[Any]:
        """This process' share of training examples that the seed draws, as the trainer gives them to the model."""
        loader = self.callback_handler.train_dataloader
        drawn = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(self.args.seed))
        share = drawn[:samples][self.args.process_index :: max(1, self.args.world_size)].tolist()
        try:
            collate = copy.deepcopy(loader.collate_fn)  # may draw from a generator of its own
        except Exception:  # whatever a collator holds that cannot be copied
            collate = loader.collate_fn
        return DataLoader(
            Subset(loader.dataset, share), batch_size=self.args.per_device_train_batch_size, collate_fn=collate
        )

    # --- record -----------------------------------------------------------------------------------------------------

    def _l2sp_fisher_weights(self) -> dict[str, Tensor]:
        assert self.l2sp_anchor is not None
        found = {}
        for name in self.l2sp_anchor:
            entry = self.l2sp_anchor.plan.entries[name]
            if isinstance(entry.weight, Tensor) or not entry.shape:  # a single number's weight is kept as a number
                found[name] = torch.as_tensor(entry.weight, dtype=torch.float32)
        return found

    def _l2sp_write_fisher(self, path: Path) -> None:
        # A folder: safetensors from 0.8 on writes beside its target, under a name that nobody would find again.
        temporary = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            save_fisher(temporary / path.name, self._l2sp_fisher_weights())
            os.replace(temporary / path.name, path)
            temporary.rmdir()
        except Exception as error:  # OSError, or safetensors' own type for a full disk
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(
                f"{path} cannot be written ({error}); l2sp_fisher_samples keeps w there. Free some space, choose "
                "another output_dir, or set l2sp_fisher_samples=0."
            ) from error

    def _l2sp_keep_fisher(self, folder: str) -> None:
        """Puts w into a checkpoint, without taking its space once more where the file system allows that."""
        if self._l2sp_fisher_record() is None or not self.args.should_save:
            return
        path = Path(folder, FISHER_NAME)
        path.unlink(missing_ok=True)
        try:
            os.link(Path(self.args.output_dir, FISHER_NAME), path)
        except OSError:
            self._l2sp_write_fisher(path)

    def _l2sp_fisher_state(self) -> dict[str, Any]:
        """For `l2sp_state.json`."""
        record = self._l2sp_fisher_record()
        return {} if record is None else {"fisher": asdict(record)}

    def _l2sp_restore_fisher(self, checkpoint: str, state: dict[str, Any]) -> None:
        """Takes w from a checkpoint that is resumed from.

        Raises:
            ValueError: The checkpoint has none, or another one than its record says.
        """
        samples, kept = self._l2sp_fisher_samples, state.get("fisher")
        if not samples:
            if kept is not None:
                logger.warning(
                    f"{checkpoint} was trained with l2sp_fisher_samples={kept.get('samples')}; without it w is now "
                    "another one."
                )
            return
        anchor = self.l2sp_anchor
        assert anchor is not None
        if kept is None:
            raise ValueError(
                f"{checkpoint} was trained without l2sp_fisher_samples, and its weights are no longer those that the "
                f"Fisher information is taken at. Set l2sp_fisher_samples=0 instead of {samples}, or begin anew."
            )
        path = Path(checkpoint, FISHER_NAME)
        if not path.is_file() or _sha256(path) != kept["sha256"]:
            raise ValueError(
                f"{path} is {'not the one that the checkpoint was trained with' if path.is_file() else 'missing'}, so "
                "w is lost. Put it back, or resume from another checkpoint."
            )
        if kept["samples"] != samples:
            logger.warning(f"l2sp_fisher_samples={samples}: w stays the one on {kept['samples']} in {checkpoint}.")
        # What was unfrozen since then is not in it, and weighs 1.
        anchor.weigh({**load_file(path), "": 1.0})
        self._l2sp_fisher = weakref.ref(anchor), FisherRecord(**kept)


def _with_mean_1(totals: dict[str, Tensor], anchor: Anchor) -> dict[str, Tensor]:
    """Scaled so that the mean over all anchored numbers is 1: λ then keeps its size."""
    rows = {name: anchor.plan.entries[name].rows for name in totals}
    pulled = {name: total if rows[name] is None else total[: rows[name]] for name, total in totals.items()}
    count = sum(total.numel() for total in pulled.values())
    mean = sum(float(total.double().sum()) for total in pulled.values()) / count
    if not 0.0 < mean < float("inf"):
        raise ValueError(
            f"l2sp_fisher_samples: the Fisher information is {mean:g} all over, so it can weigh nothing. Do the "
            "training examples have labels, and does the task reach the pretrained parameters?"
        )
    return {name: total.div_(mean) for name, total in pulled.items()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
