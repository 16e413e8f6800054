"""Text augmentation in the recipes: its arguments, and everything that is refused about them before training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from _recipe_args import RecipeError, closest
from _recipe_files import listed
from _recipe_model import find_model, load_config, load_tokenizer, load_trained_model, quiet_loading
from transformers import AutoModelForMaskedLM

from hf_l2sp.augment import NAMES, Augmenter, augment_dataset


@dataclass
class AugmentArguments:
    """Edited copies that are added to the training data, and to no other split."""

    augment: list[str] | None = field(
        default=None, metadata={"help": f"Edits that make copies of the training texts: some of {' '.join(NAMES)}."}
    )
    augment_copies: int = field(default=1, metadata={"help": "How many copies are made of every training text."})
    augment_strength: float = field(default=0.1, metadata={"help": "Share of the words of a copy that are edited."})
    augment_model: str | None = field(
        default=None,
        metadata={
            "help": "For the edit mask: Hub id or folder of a masked language model with its trained head, such as "
            "the output of recipes/domain_adapt_mlm.py."
        },
    )


def make_augmenter(
    arguments: AugmentArguments, seed: int, device: torch.device | str = "cpu", **columns: Any
) -> Augmenter | None:
    """What makes the copies, for `hf_l2sp.augment.augment_dataset`; `None` where none are asked for.

    Args:
        arguments: The augmentation arguments.
        seed: Seed of all draws.
        device: Where the masked language model runs.
        columns: Of `Augmenter`: `text_column`, or `tokens_column` and `tags_column`, `outside_tag`.

    Raises:
        RecipeError: a value is out of range or contradicts another, or what an edit needs is missing.
    """
    names = arguments.augment or []
    if not names:
        defaults = AugmentArguments()
        for name in ("augment_copies", "augment_strength", "augment_model"):
            if getattr(arguments, name) != getattr(defaults, name):
                raise RecipeError(
                    f"--{name} {getattr(arguments, name)!r} needs --augment beside it: some of {listed(NAMES)}."
                )
        return None
    for name in names:
        if name not in NAMES:
            near = closest(name, NAMES)
            hint = f"did you mean {near!r}?" if near else f"give some of {listed(NAMES)}."
            raise RecipeError(f"--augment {name!r} is no edit; {hint}")
    if len(set(names)) < len(names):
        raise RecipeError(f"--augment {' '.join(names)} names an edit twice; give each once.")
    if arguments.augment_copies < 1:
        raise RecipeError(f"--augment_copies {arguments.augment_copies} must be at least 1.")
    if not 0 < arguments.augment_strength <= 1:  # also not NaN
        raise RecipeError(
            f"--augment_strength {arguments.augment_strength} is no share of the words; give more than 0 and at most "
            "1, such as 0.1."
        )
    if (arguments.augment_model is not None) != ("mask" in names):
        raise RecipeError(
            f"--augment_model {arguments.augment_model!r} is for the edit mask, which --augment {' '.join(names)} "
            "lacks; add it, or leave the model out."
            if arguments.augment_model is not None
            else "--augment mask needs --augment_model: the Hub id or folder of a masked language model with its "
            "trained head, such as the output of recipes/domain_adapt_mlm.py."
        )
    try:
        return Augmenter(
            names=names,
            copies=arguments.augment_copies,
            strength=arguments.augment_strength,
            seed=seed,
            **(_masked_lm(arguments.augment_model, device) if arguments.augment_model is not None else {}),
            **columns,
        )
    except RecipeError:
        raise
    except (ValueError, ImportError, LookupError) as error:
        by_model = arguments.augment_model is not None and isinstance(error, ValueError)
        raise RecipeError(f"--augment{f'_model {arguments.augment_model!r}' if by_model else ''}: {error}") from error


def _masked_lm(name: str, device: torch.device | str) -> dict[str, Any]:
    source = find_model(name, "--augment_model")
    config = load_config(source)
    tokenizer = load_tokenizer(source, config)
    advice = (
        "Give a masked language model with its head, or train one: recipes/domain_adapt_mlm.py. The embedded "
        "sentence model has none."
    )
    model = load_trained_model(AutoModelForMaskedLM, source, config, "language modelling head", advice)
    return {"model": model.to(device).eval(), "tokenizer": tokenizer}


def add_copies(columns: dict[str, list[Any]], augmenter: Augmenter) -> tuple[dict[str, list[Any]], str]:
    """The rows of the training data followed by their copies, and a note about how many were made.

    Args:
        columns: Name of each column to its values: the texts, or tokens and tags, and whatever goes with them.
        augmenter: What makes the copies.
    """
    rows = datasets.Dataset.from_dict(columns)
    with quiet_loading():  # the note says how many copies are missing
        more = augment_dataset(rows, augmenter)
    wanted, made = len(rows) * augmenter.copies, len(more) - len(rows)
    note = f"--augment {' '.join(augmenter.names)}: {made} edited copies of the {len(rows)} training rows are added"
    if made < wanted:
        note += f"; {wanted - made} more could not be made, the rows are too short for them"
    return {name: list(more[name]) for name in columns}, f"{note}."
