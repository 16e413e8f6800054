"""θ0: the pretrained values, by canonical name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .adapted import LowRankEntry, apply_low_rank, look_at
from .adapters import has_adapters
from .anchor_values import AnchorValues
from .backends import Backend
from .penalty import PenaltySums, Term
from .plan import PlanEntry, build_plan
from .provenance import Provenance, examine
from .source import SourceWeights, load_source, mapped_source
from .storage import Storage


class Anchor(AnchorValues):
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

    def terms(self) -> list[Term]:
        """The summands w‖θ − θ0‖² that act now."""
        return [Term(e.parameter, self._values[e.name], e.weight, self._rows(e)) for e in self.active()]

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
