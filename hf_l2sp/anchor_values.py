"""The values of θ0: taken from a model, kept, told apart."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .adapted import LowRankEntry, base_sums, warn_if_moved
from .backends import Backend
from .identity import EntrySums, tensor_sums
from .plan import Plan, PlanEntry
from .storage import Storage, narrowed

logger = logging.get_logger(__name__)


class AnchorValues(Mapping[str, Tensor]):
    """The part of `Anchor` that takes θ0 and keeps it."""

    def __init__(
        self,
        plan: Plan,
        storage: Storage | None = None,
        *,
        source: str | None = None,
        revision: str | None = None,
        backend: Backend | None = None,
    ) -> None:
        self.plan = plan
        self.source = source
        self.revision = revision
        self.backend = Backend() if backend is None else backend
        self._storage = Storage() if storage is None else storage
        self._values: dict[str, Tensor] = {}
        self._sums: dict[str, EntrySums] = {}
        # Whole values of another source, until the model is sharded; and what is to be checked then.
        self._given: dict[str, Tensor] | None = None
        self._checks: list[Callable[[], None]] = []
        self.attached = False

    def attach(self, model: nn.Module) -> None:
        """Takes the values; by now the model is as it will be trained, sharded or not, and still pretrained.

        Args:
            model: The model, wrapped or not.

        Raises:
            ValueError: Sharding has hidden parameters.
        """
        self.backend.attach(model)
        if self.backend.late:
            self.plan.rebind(model)
        given, self._given = self._given or {}, None
        values: dict[str, Tensor] = {}
        moved: dict[str, bool] = {}
        for name, entry in self.plan.entries.items():
            local = self._local(entry)
            self._place_weight(entry)
            if name in given:
                whole = given[name].to(entry.parameter.dtype)
                values[name] = self.backend.region(entry.parameter).cut(whole).to(local)
                moved[name] = not torch.equal(values[name], local)
            elif entry.role == "anchored":
                values[name] = self._original(entry, local)
        # A frozen parameter that already is θ0 costs nothing; another one needs its θ0 once it is unfrozen. A rank
        # may hold nothing of it, so all of them decide together.
        anywhere = (
            self.backend.add_up(torch.tensor(list(moved.values()), dtype=torch.float32)).tolist() if moved else []
        )
        for name, count in zip(moved, anywhere, strict=True):
            if not count and self.plan.entries[name].role != "anchored":
                del values[name]
        self._store(values)
        self._store_low_rank()
        self.attached = True
        for check in self._checks:
            check()
        self._checks = []

    def weigh(self, weights: Mapping[str, float | Tensor]) -> None:
        """Sets w anew, once the values are there.

        Args:
            weights: Regular expression → weight, or parameter name → whole tensor.

        Raises:
            ValueError: As for `Anchor.from_model`.
        """
        self.plan.weigh(weights)
        for entry in self.plan.entries.values():
            self._place_weight(entry)

    def _place_weight(self, entry: PlanEntry) -> None:
        # Asked only where something must be cut: not every layout has contiguous parts.
        if isinstance(entry.weight, Tensor):
            device = self.backend.local(entry.parameter).device
            entry.weight = self.backend.region(entry.parameter).cut(entry.weight).to(device, copy=True)

    def when_attached(self, check: Callable[[], None]) -> None:
        """Calls `check` as soon as the values are there, which may be now."""
        if self.attached:
            check()
        else:
            self._checks.append(check)

    def _original(self, entry: PlanEntry, local: Tensor) -> Tensor:
        """This rank's part of θ0: of a copy that PEFT trains, the original's."""
        if entry.original is None:
            return local
        (whole,) = self.backend.gather([entry.original])
        whole = whole if entry.rows is None else whole[: entry.rows]
        return self.backend.region(entry.parameter).cut(whole).to(local)

    def _lends(self, entry: PlanEntry) -> bool:
        return entry.original is not None and not self.backend.sharded

    def _store_low_rank(self) -> None:
        """Identities of the weights that LoRA changes; their values stay in the model, where nothing moves them."""
        entries = [entry for entry in self.plan.low_rank.values() if entry.pretrained and not entry.excluded]
        for entry in entries:
            entry.take_starts(self.backend)
        self._store_sums([(e, e.shape) for e in entries], [base_sums(e.adapted, self.backend) for e in entries])
        warn_if_moved(self.active_low_rank(), self.backend)

    def _local(self, entry: PlanEntry) -> Tensor:
        """What this rank holds of the pulled part of θ."""
        local, rows = self.backend.local(entry.parameter), self._rows(entry)
        return local if rows is None else local[:rows]

    def _rows(self, entry: PlanEntry) -> int | None:
        if entry.rows is None:
            return None
        return self.backend.region(entry.parameter).leading(entry.rows, entry.shape)

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    # A mapping of tensors has no truth value to compare; two anchors are equal when they are one.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def join_trainable(self, also: Sequence[str] = ()) -> list[str]:
        """Stores θ0 of every parameter that has become trainable, from its present value; returns their names.

        Args:
            also: Names to store although they are frozen now.
        """
        joining = {
            name: self._original(entry, self._local(entry))
            for name, entry in self.plan.entries.items()
            if name not in self._values and (entry.role == "anchored" or (name in also and entry.can_be_anchored))
        }
        if joining:
            self._store(joining)
        return list(joining)

    def _store(self, values: Mapping[str, Tensor]) -> None:
        """Keeps copies of values, each of them this rank's part, and the identities of the whole tensors."""
        entries = [self.plan.entries[name] for name in values]
        shares = [
            tensor_sums(v) / self.backend.copies(e.parameter) for v, e in zip(values.values(), entries, strict=True)
        ]
        self._store_sums([(entry, entry.pulled_shape) for entry in entries], shares)
        entries = [entry for entry in entries if not entry.excluded]
        values = {entry.name: values[entry.name] for entry in entries}
        # A frozen original beside its trained copy need not be copied once more.
        lent = {e.name: v for v, e in zip(values.values(), entries, strict=True) if self._lends(e)}
        # DeepSpeed trains an fp32 copy of bf16 weights, which begins as exactly these.
        narrow = {
            e.name: narrowed(v, e.parameter.dtype)
            for v, e in zip(values.values(), entries, strict=True)
            if e.name not in lent
        }
        self._values.update(self._storage.keep(narrow))
        self._values.update(lent)

    def _store_sums(
        self, tensors: Sequence[tuple[PlanEntry | LowRankEntry, tuple[int, ...]]], shares: Sequence[Tensor]
    ) -> None:
        """Identities of whole tensors from the sums over their parts; what has no distance is excluded."""
        totals = self.backend.add_up(torch.stack([share.cpu() for share in shares])).tolist() if shares else []
        broken = []
        for (entry, shape), (total, squared) in zip(tensors, totals, strict=True):
            if math.isfinite(squared):
                self._sums[entry.name] = EntrySums(shape, total, squared)
            else:
                entry.excluded = True
                broken.append(entry.name)
        if broken and self.backend.is_main_process:
            logger.warning(
                f"θ0 of {', '.join(broken[:3])} ({len(broken)} in all) holds NaN or inf, or values whose squares "
                "overflow, so no distance to it is defined: it is not pulled. Load an intact pretrained model, or "
                "take it out with l2sp_exclude."
            )

    @property
    def sums(self) -> Mapping[str, EntrySums]:
        """Shape and float64 sums of every stored tensor, over all ranks and before rounding to the storage dtype."""
        return self._sums

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and float64 sums of θ0; the same however the model is sharded."""
        lines = [f"{name}|{sums.identity}" for name, sums in sorted(self._sums.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """Memory that θ0 takes on this rank, in bytes; 0 where it is mapped from disk."""
        own = {n: v for n, v in self._values.items() if not self._lends(self.plan.entries[n])}
        return self._storage.nbytes(own)

    def whereabouts(self) -> str:
        """Where θ0 is and how much memory it takes, in a few words; empty where it is beside the model's weights."""
        words = []
        if self.backend.processes > 1:
            how = "sharded" if self.backend.sharded else "whole"
            words.append(f"on each of {self.backend.processes} processes, {how} ({self.backend.kind})")
        if self._storage.offload != "none":
            words.append({"cpu": "in the CPU's memory", "disk": "mapped from disk"}[self._storage.offload])
        return f"θ0 {' and '.join(words)}: {self.nbytes / 2**20:.1f} MiB" if words else ""

    def norm(self, name: str) -> float:
        """‖θ0‖ of one parameter, all of it."""
        return math.sqrt(self._sums[name].squared)

    def active(self) -> list[PlanEntry]:
        """The entries that are pulled now: trainable, with a stored θ0."""
        return [entry for entry in self.plan.having("anchored") if entry.name in self._values]

    def active_low_rank(self) -> list[LowRankEntry]:
        """The weights whose adapters are pulled now."""
        return self.plan.low_rank_having("anchored")

    def require_own_memory(self) -> None:
        """Checks that no value of θ0 shares memory with its parameter: the penalty would be 0 for ever.

        Raises:
            RuntimeError: One does.
        """
        for entry in self.active():
            value, local = self._values[entry.name], self.backend.local(entry.parameter)
            if value.numel() and value.untyped_storage().data_ptr() == local.untyped_storage().data_ptr():
                raise RuntimeError(
                    f"θ0 of {entry.name} shares memory with the parameter itself, so the distance would be 0 for "
                    "ever. Build the anchor with Anchor.from_model or Anchor.from_pretrained, which copy."
                )

    def require_unchanged(self) -> None:
        """Checks that the files from which θ0 is mapped were not written in place since.

        Raises:
            RuntimeError: One was.
        """
        self._storage.require_unchanged()
