"""θ0: the pretrained values, by canonical name."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .adapted import LowRankEntry, apply_low_rank, base_sums, look_at, warn_if_moved
from .adapters import has_adapters
from .backends import Backend
from .identity import EntrySums, tensor_sums
from .penalty import PenaltySums, Term
from .plan import Plan, PlanEntry, build_plan
from .provenance import Provenance, examine
from .slope import Slope, slope
from .source import SourceWeights, load_source, mapped_source
from .storage import Storage, narrowed

logger = logging.get_logger(__name__)


class Anchor(Mapping[str, Tensor]):
    """θ0, a read-only mapping from canonical parameter name to tensor, and the plan of who is pulled to it.

    Only trainable parameters with a pretrained value are stored; one that is unfrozen later joins with the value
    that it had while frozen. Values are copies: they never share memory with the model. Where the model is sharded,
    each rank holds θ0 of its own part of every parameter, and nothing else.

    Attributes:
        plan: Which parameter is anchored, new, frozen or excluded, and with which weight.
        source: Hub id or local path where θ0 can be had again; None if unknown.
        revision: Commit of a Hub source.
        backend: Where parameters and gradients live.
        attached: Whether the values are there: not before `attach` where parameters are sharded later.
    """

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

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        exclude: Sequence[str] | None = None,
        weights: Mapping[str, float | Tensor] | str | None = None,
        dtype: str = "auto",
        offload: str = "none",
        offload_folder: str | os.PathLike[str] | None = None,
        provenance: Provenance | None = None,
        backend: Backend | None = None,
    ) -> Anchor:
        """Takes the model's present values as θ0.

        Args:
            model: The pretrained model, wrapped or not, before any training.
            exclude: Regular expressions of parameters that are not pulled.
            weights: w; see `L2SPArguments.l2sp_weights`.
            dtype: Storage: `auto`, `float32` or `bfloat16`.
            offload: `none`, `cpu` or `disk`.
            offload_folder: For `disk`: where values go that the model's own files do not hold.
            provenance: What is known of the weights' origin; None: found out from the model.
            backend: Where parameters live; with one whose parts come later (FSDP, DeepSpeed) the values are taken
                by `attach`.

        Raises:
            ValueError: Nothing trainable has a pretrained value, or weights do not match.
        """
        provenance = examine(model) if provenance is None else provenance
        return cls._make(model, provenance, exclude, weights, dtype, offload, offload_folder, backend)

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str,
        model: nn.Module,
        *,
        revision: str | None = None,
        exclude: Sequence[str] | None = None,
        weights: Mapping[str, float | Tensor] | str | None = None,
        dtype: str = "auto",
        offload: str = "none",
        offload_folder: str | os.PathLike[str] | None = None,
        provenance: Provenance | None = None,
        backend: Backend | None = None,
    ) -> Anchor:
        """Loads θ0 for a model from another place than the model itself.

        Parameters outside the base model that the source lacks, such as a classification head, are new. Values come
        in the dtype of the model's parameters.

        Args:
            id_or_path: Hub id or local folder of a checkpoint of the same architecture.
            model: The model that will be trained.
            revision: Hub revision.
            exclude: Regular expressions of parameters that are not pulled.
            weights: w; see `L2SPArguments.l2sp_weights`.
            dtype: Storage: `auto`, `float32` or `bfloat16`.
            offload: `none`, `cpu` or `disk`.
            offload_folder: For `disk`: where values go that the source's own files do not hold.
            provenance: What is known of the model's own origin; None: found out from the model.
            backend: As for `from_model`.

        Raises:
            ValueError: The source cannot be loaded, has other shapes, lacks part of the base model, or matches
                nothing.
        """
        if has_adapters(model):
            raise ValueError(
                f"l2sp_anchor={id_or_path!r} cannot be the θ0 of a model with PEFT adapters: their distance is that "
                "from the base model's own weights. Leave l2sp_anchor out."
            )
        loaded: SourceWeights = load_source(id_or_path, model, revision, exclude, provenance)
        return cls._make(
            model, loaded.provenance, exclude, weights, dtype, offload, offload_folder, backend, loaded.values
        )

    @classmethod
    def _make(
        cls,
        model: nn.Module,
        provenance: Provenance,
        exclude: Sequence[str] | None,
        weights: Mapping[str, float | Tensor] | str | None,
        dtype: str,
        offload: str,
        folder: str | os.PathLike[str] | None,
        backend: Backend | None,
        given: Mapping[str, Tensor] | None = None,
    ) -> Anchor:
        backend = Backend() if backend is None else backend
        plan = build_plan(model, provenance, exclude, weights)
        plan.require_anchored()
        mapped = mapped_source(model, provenance, plan, backend) if offload == "disk" else None
        storage = Storage(dtype, offload, folder=folder, mapped=mapped, **backend.writing())
        anchor = cls(plan, storage, source=provenance.source, revision=provenance.revision, backend=backend)
        if given is not None:
            anchor._given = {name: given[name] for name, e in plan.entries.items() if e.can_be_anchored}
        if not backend.late:
            anchor.attach(model)
        return anchor

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

    def terms(self) -> list[Term]:
        """The summands w‖θ − θ0‖² that act now."""
        return [Term(e.parameter, self._values[e.name], e.weight, self._rows(e)) for e in self.active()]

    def active_low_rank(self) -> list[LowRankEntry]:
        """The weights whose adapters are pulled now."""
        return self.plan.low_rank_having("anchored")

    def low_rank_for(self, model: nn.Module) -> list[LowRankEntry]:
        """The weights whose adapters are pulled now, with the adapters of a model of the same kind.

        Raises:
            ValueError: The model lacks adapters that the anchor's own has.
        """
        found = {weight.name: weight for weight in look_at(model).weights}
        entries = self.active_low_rank()
        missing = [entry.name for entry in entries if entry.name not in found]
        if missing:
            raise ValueError(
                f"The anchor knows adapters of {missing[0]} ({len(missing)} in all), which the model lacks; they "
                "belong to different models, or the adapters were merged or unloaded."
            )
        return [replace(entry, adapted=found[entry.name]) for entry in entries]

    def active_names(self) -> list[str]:
        """Names of all that is pulled now, in the order of `apply`'s sums."""
        return [entry.name for entry in self.active()] + [entry.name for entry in self.active_low_rank()]

    def apply(self, coefficient: float, gradient: bool = True) -> PenaltySums:
        """Adds the gradient of coefficient · Σ w‖θ − θ0‖² to the live gradients; the sums are over all ranks.

        Args:
            coefficient: λ.
            gradient: False only measures.
        """
        sums = self.backend.apply(self.terms(), coefficient, gradient)
        low_rank = self.active_low_rank()
        if not low_rank:
            return sums
        more = apply_low_rank(low_rank, self.backend, coefficient, gradient)
        return PenaltySums(*(torch.cat([a.to(b), b]) for a, b in zip(sums, more, strict=True)))

    def slope(self) -> Slope:
        """⟨∇L, θ − θ0⟩ from the live gradients, and Σ w‖θ − θ0‖²; over all that is pulled, and all ranks."""
        return slope(self.terms(), self.active_low_rank(), self.backend)

    def new_terms(self) -> list[Term]:
        """The summands ‖θ_new‖² that act now."""
        return [Term(e.parameter, None) for e in self.plan.having("new")]

    def terms_for(
        self, model: nn.Module, weights: Mapping[str, float | Tensor] | None = None
    ) -> tuple[list[Term], list[Term], list[tuple[LowRankEntry, float]]]:
        """The summands for the parameters of a model, those of its new parameters, and adapted weights with their w.

        Args:
            model: The model from which the anchor was taken, or another one with the same names and shapes.
            weights: Replaces the plan's weights.

        Raises:
            ValueError: An anchored parameter is missing from the model or has another shape.
        """
        self.join_trainable()
        names, stored = self.stored_terms(model)
        plan = self.plan
        if weights is not None:
            new = frozenset(n for n, e in plan.entries.items() if not e.pretrained)
            rows = {n: e.rows for n, e in plan.entries.items() if e.rows is not None}
            plan = build_plan(model, Provenance(True, new, rows), weights=weights)
        terms = [
            term._replace(weight=self._weight(plan.entries[name], self.plan.entries[name]))
            for name, term in zip(names, stored, strict=True)
            if term.parameter.requires_grad and not plan.entries[name].excluded
        ]
        parameters = look_at(model).parameters
        new_terms = [
            Term(parameters[name], None)
            for name, entry in self.plan.entries.items()
            if not entry.pretrained and name in parameters and parameters[name].requires_grad
        ]
        low_rank = [
            (entry, plan.low_rank[entry.name].weight)
            for entry in self.low_rank_for(model)
            if not plan.low_rank[entry.name].excluded
        ]
        return terms, new_terms, low_rank

    def _weight(self, entry: PlanEntry, own: PlanEntry) -> float | Tensor:
        if entry is own or not isinstance(entry.weight, Tensor):
            return entry.weight
        return self.backend.region(own.parameter).cut(entry.weight).to(self.backend.local(own.parameter).device)

    def stored_terms(self, model: nn.Module) -> tuple[list[str], list[Term]]:
        """Name and unweighted summand ‖θ − θ0‖² for every stored value, frozen or not.

        Raises:
            ValueError: An anchored parameter is missing from the model or has another shape.
        """
        parameters = look_at(model).parameters
        terms = []
        for name, value in self._values.items():
            parameter = parameters.get(name)
            if parameter is None:
                raise ValueError(f"The anchor holds {name}, which the model lacks; they belong to different models.")
            rows = self._rows(self.plan.entries[name])
            shape = tuple(self.backend.local(parameter).shape)
            expected = tuple(value.shape) if rows is None else (shape[0], *value.shape[1:])
            if shape != expected:
                raise ValueError(
                    f"{name} has shape {tuple(parameter.shape)}, its θ0 {tuple(value.shape)}; the anchor belongs to "
                    "another model, or the model was resized after the anchor was taken."
                )
            terms.append(Term(parameter, value, rows=rows))
        return list(self._values), terms

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
