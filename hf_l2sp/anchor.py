"""θ0: the pretrained values, by canonical name."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .naming import named_float_parameters
from .penalty import CHUNK, Term
from .plan import Plan, PlanEntry, build_plan
from .provenance import Provenance, examine
from .source import SourceWeights, load_source

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
# Sums are compared on grids: far coarser than the float64 rounding that depends on the order of summation (threads,
# shards), and fine enough to see one changed weight among millions. Σ x is measured against ‖x‖, about as large as
# the sum of a matrix with mean 0.
_SUM_BITS, _SQUARES_BITS = 27, 32


class EntrySums(NamedTuple):
    """Identity of one tensor of θ0: shape, Σ x and Σ x², summed in float64."""

    shape: tuple[int, ...]
    total: float
    squared: float

    @property
    def identity(self) -> tuple[tuple[int, ...], int, int]:
        """Shape and both sums in units of their grids: equal for equal tensors, however they were summed up."""
        norm = math.sqrt(self.squared)
        return self.shape, _on_grid(self.total, norm, _SUM_BITS), _on_grid(self.squared, self.squared, _SQUARES_BITS)

    def agrees_with(self, other: EntrySums) -> bool:
        """Whether both are sums of one tensor; unlike on the grid, no rounding can fall between two steps."""
        return (
            self.shape == other.shape
            and abs(self.total - other.total) <= math.sqrt(self.squared) * 2.0**-_SUM_BITS
            and abs(self.squared - other.squared) <= self.squared * 2.0**-_SQUARES_BITS
        )


def _on_grid(value: float, size: float, bits: int) -> int:
    if size == 0.0 or not math.isfinite(size):
        return 0
    # The odd factor keeps round sizes (a norm's weights that are all 1) off the steps of the exponent.
    return round(math.ldexp(value, bits - math.frexp(1.2345 * size)[1]))


class Anchor(Mapping[str, Tensor]):
    """θ0, a read-only mapping from canonical parameter name to tensor, and the plan of who is pulled to it.

    Only trainable parameters with a pretrained value are stored; one that is unfrozen later joins with the value
    that it had while frozen. Values are copies: they never share memory with the model.

    Attributes:
        plan: Which parameter is anchored, new, frozen or excluded, and with which weight.
        source: Hub id or local path where θ0 can be had again; None if unknown.
        revision: Commit of a Hub source.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        dtype: str = "auto",
        offload: str = "none",
        source: str | None = None,
        revision: str | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(_DTYPES)}.")
        if offload not in ("none", "cpu"):
            raise ValueError(f"offload={offload!r} is not available; choose 'none' or 'cpu'.")
        self.plan = plan
        self.source = source
        self.revision = revision
        self._dtype = _DTYPES[dtype]
        self._offload = offload
        self._values: dict[str, Tensor] = {}
        self._sums: dict[str, EntrySums] = {}

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        exclude: Sequence[str] | None = None,
        weights: Mapping[str, float | Tensor] | str | None = None,
        dtype: str = "auto",
        offload: str = "none",
        provenance: Provenance | None = None,
    ) -> Anchor:
        """Takes the model's present values as θ0.

        Args:
            model: The pretrained model, wrapped or not, before any training.
            exclude: Regular expressions of parameters that are not pulled.
            weights: w; see `L2SPArguments.l2sp_weights`.
            dtype: Storage: `auto`, `float32` or `bfloat16`.
            offload: `none` or `cpu`.
            provenance: What is known of the weights' origin; None: found out from the model.

        Raises:
            ValueError: Nothing trainable has a pretrained value, θ0 holds NaN or inf, or weights do not match.
        """
        provenance = examine(model) if provenance is None else provenance
        plan = build_plan(model, provenance, exclude, weights)
        anchor = cls(plan, dtype=dtype, offload=offload, source=provenance.source, revision=provenance.revision)
        plan.require_anchored()
        anchor.join_trainable()
        return anchor

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
            offload: `none` or `cpu`.

        Raises:
            ValueError: The source cannot be loaded, has other shapes, lacks part of the base model, or matches
                nothing.
        """
        loaded: SourceWeights = load_source(id_or_path, model, revision, exclude)
        plan = build_plan(model, loaded.provenance, exclude, weights)
        anchor = cls(
            plan,
            dtype=dtype,
            offload=offload,
            source=loaded.provenance.source,
            revision=loaded.provenance.revision,
        )
        plan.require_anchored()
        for entry in plan.entries.values():
            if not entry.can_be_anchored:
                continue
            value = loaded.values[entry.name].to(entry.parameter.dtype)
            # A frozen parameter that already is θ0 costs nothing; another one needs its θ0 once it is unfrozen.
            if entry.role == "anchored" or not torch.equal(value.to(entry.pulled.device), entry.pulled):
                anchor._store(entry, value)
        return anchor

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
        joined = []
        for name, entry in self.plan.entries.items():
            wanted = entry.role == "anchored" or (name in also and entry.can_be_anchored)
            if wanted and name not in self._values:
                self._store(entry, entry.pulled)
                joined.append(name)
        return joined

    def _store(self, entry: PlanEntry, value: Tensor) -> None:
        sums = _sums(value)
        if not math.isfinite(sums.squared):
            raise ValueError(
                f"θ0 of {entry.name} holds NaN or inf (or values whose squares overflow), so no distance to it is "
                "defined. Load an intact pretrained model, or take the parameter out with l2sp_exclude."
            )
        device = torch.device("cpu") if self._offload == "cpu" else entry.parameter.device
        copy = value.detach().to(device=device, dtype=self._dtype or value.dtype, copy=True)
        if self._offload == "cpu" and entry.parameter.is_cuda:
            copy = copy.pin_memory()
        self._values[entry.name] = copy
        self._sums[entry.name] = sums

    @property
    def sums(self) -> Mapping[str, EntrySums]:
        """Shape and float64 sums of every stored tensor, taken before any rounding to the storage dtype."""
        return self._sums

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and float64 sums of θ0; the same however the model is sharded."""
        lines = [f"{name}|{sums.identity}" for name, sums in sorted(self._sums.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """Memory that θ0 takes, in bytes."""
        return sum(value.numel() * value.element_size() for value in self._values.values())

    def norm(self, name: str) -> float:
        """‖θ0‖ of one parameter."""
        return math.sqrt(self._sums[name].squared)

    def active(self) -> list[PlanEntry]:
        """The entries that are pulled now: trainable, with a stored θ0."""
        return [entry for entry in self.plan.having("anchored") if entry.name in self._values]

    def terms(self) -> list[Term]:
        """The summands w‖θ − θ0‖² that act now."""
        return [Term(e.parameter, self._values[e.name], e.weight, e.rows) for e in self.active()]

    def new_terms(self) -> list[Term]:
        """The summands ‖θ_new‖² that act now."""
        return [Term(e.parameter, None) for e in self.plan.having("new")]

    def terms_for(
        self, model: nn.Module, weights: Mapping[str, float | Tensor] | None = None
    ) -> tuple[list[Term], list[Term]]:
        """The summands for the parameters of a model, and those of its new parameters.

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
            term._replace(weight=plan.entries[name].weight)
            for name, term in zip(names, stored, strict=True)
            if term.parameter.requires_grad and not plan.entries[name].excluded
        ]
        parameters = dict(named_float_parameters(model))
        new_terms = [
            Term(parameters[name], None)
            for name, entry in self.plan.entries.items()
            if not entry.pretrained and name in parameters and parameters[name].requires_grad
        ]
        return terms, new_terms

    def stored_terms(self, model: nn.Module) -> tuple[list[str], list[Term]]:
        """Name and unweighted summand ‖θ − θ0‖² for every stored value, frozen or not.

        Raises:
            ValueError: An anchored parameter is missing from the model or has another shape.
        """
        parameters = dict(named_float_parameters(model))
        terms = []
        for name, value in self._values.items():
            parameter = parameters.get(name)
            if parameter is None:
                raise ValueError(f"The anchor holds {name}, which the model lacks; they belong to different models.")
            rows = self.plan.entries[name].rows
            expected = tuple(value.shape) if rows is None else (parameter.shape[0], *value.shape[1:])
            if tuple(parameter.shape) != expected:
                raise ValueError(
                    f"{name} has shape {tuple(parameter.shape)}, its θ0 {tuple(value.shape)}; the anchor belongs to "
                    "another model, or the model was resized after the anchor was taken."
                )
            terms.append(Term(parameter, value, rows=rows))
        return list(self._values), terms

    def require_own_memory(self) -> None:
        """Raises:
        RuntimeError: A value of θ0 shares memory with its parameter, so that the penalty would be 0 for ever.
        """
        for entry in self.active():
            if self._values[entry.name].untyped_storage().data_ptr() == entry.parameter.untyped_storage().data_ptr():
                raise RuntimeError(
                    f"θ0 of {entry.name} shares memory with the parameter itself, so the distance would be 0 for "
                    "ever. Build the anchor with Anchor.from_model or Anchor.from_pretrained, which copy."
                )


def _sums(tensor: Tensor) -> EntrySums:
    flat = tensor.detach().reshape(-1)
    dtype = torch.float32 if flat.device.type == "mps" else torch.float64
    total = torch.zeros((), dtype=dtype, device=flat.device)
    squared = torch.zeros((), dtype=dtype, device=flat.device)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK].to(dtype)
        total += part.sum()
        squared += torch.dot(part, part)
    return EntrySums(tuple(tensor.shape), float(total), float(squared))
