"""Tags of named entities: tag schemes read into IOB2, gaps filled, invalid predictions repaired."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

# What a tag of each scheme may begin with.
SCHEMES = {"iob2": "BI", "iob1": "BI", "bioes": "BIES", "bilou": "BILU"}
# BILOU is BIOES in other letters.
_BIOES = {"L": "E", "U": "S"}


class TagError(ValueError):
    """A tag that the scheme does not allow where it stands.

    Attributes:
        index: Place of the tag in its sentence, from 0.
    """

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


@functools.lru_cache(maxsize=4096)
def split_tag(tag: str, scheme: str = "iob2") -> tuple[str, str] | None:
    """Prefix and entity type of a tag (`("O", "")` of `O`), or `None` if it is no tag of the scheme."""
    if tag == "O":
        return "O", ""
    prefix, dash, kind = tag.partition("-")
    valid = len(prefix) == 1 and prefix in SCHEMES[scheme] and dash and kind.strip()
    return (prefix, kind) if valid else None


def to_iob2(tags: Sequence[str], scheme: str) -> list[str]:
    """The tags of one sentence in IOB2.

    - `iob2`: as they are, if every `I-X` follows `B-X` or `I-X`.
    - `iob1`: `I-X` opens an entity unless it follows one of its type, `B-X` always does.
    - `bioes`, `bilou`: `S-X` (`U-X`) is an entity of one word; a longer one is `B-X`, any number of `I-X`, `E-X`
      (`L-X`), and nothing else.

    Raises:
        TagError: an unknown tag, or one that may not stand where it does; the message names the cure if there is one.
    """
    result: list[str] = []
    previous, kind = "O", ""
    for index, tag in enumerate(tags):
        parts = split_tag(tag, scheme)
        if parts is None:
            raise TagError(index, _unknown(tag, scheme))
        before, before_kind = previous, kind
        previous, kind = _BIOES.get(parts[0], parts[0]), parts[1]
        continues = before != "O" and before_kind == kind
        if scheme in ("bioes", "bilou"):
            _check_bioes(index, tag, tags, before in ("B", "I"), before_kind, previous, kind)
        elif scheme == "iob2" and previous == "I" and not continues:
            after = repr(tags[index - 1]) if index else "the start of the sentence"
            raise TagError(
                index,
                f"the tag {tag!r} follows {after}, but in IOB2 an entity begins with 'B-{kind}'. Give --tag_scheme "
                "iob1 if the data are IOB1, where it may begin with I-.",
            )
        opens = previous in ("B", "S") or (previous == "I" and not continues)
        result.append("O" if previous == "O" else f"{'B' if opens else 'I'}-{kind}")
    if scheme in ("bioes", "bilou") and previous in ("B", "I"):
        raise TagError(len(tags) - 1, f"the sentence ends within the entity of the tag {tags[-1]!r}.")
    return result


def _check_bioes(
    index: int, tag: str, tags: Sequence[str], inside: bool, open_kind: str, prefix: str, kind: str
) -> None:
    goes_on = prefix in ("I", "E")
    if inside and not (goes_on and kind == open_kind):
        raise TagError(index, f"the tag {tag!r} breaks off the entity that {tags[index - 1]!r} is within.")
    if goes_on and not inside:
        raise TagError(index, f"the tag {tag!r} continues an entity, but none was begun with 'B-{kind}'.")


def _unknown(tag: str, scheme: str) -> str:
    known = ", ".join(["O", *(f"{prefix}-TYPE" for prefix in SCHEMES[scheme])])
    message = f"{tag!r} is no tag of the scheme {scheme} ({known})"
    fitting = [name for name in ("iob2", "bioes", "bilou") if split_tag(tag, name)]
    return f"{message}; is it --tag_scheme {fitting[0]}?" if fitting else f"{message}."


# --------------------------------------------------------------------------- names


def label_names(types: Iterable[str]) -> list[str]:
    """The labels of a model: `O`, then `B-X` and `I-X` of each type in alphabetical order.

    Of every type both, also where all its entities in the training data are of one word: those elsewhere are not.
    """
    return ["O", *(f"{prefix}-{kind}" for kind in sorted(types) for prefix in "BI")]


def entity_types(tags: Iterable[str]) -> set[str]:
    """The entity types among IOB2 tags."""
    return {tag[2:] for tag in tags if tag != "O"}


# --------------------------------------------------------------------------- predictions


def fill_gaps(tags: Sequence[str | None]) -> list[str]:
    """The tags with those of words that no model sees (`None`: no sub-word) put in.

    Before an `I-X` they are part of its entity: `I-X` if the word before them is of that entity, otherwise they are
    where it begins, `B-X I-X ...`. Anywhere else they are `O`.
    """
    following, nexts = "O", []
    for tag in reversed(tags):
        nexts.append(following)
        following = following if tag is None else tag
    filled: list[str] = []
    for tag, following in zip(tags, reversed(nexts), strict=True):
        if tag is None:
            kind = following[2:] if following.startswith("I-") else None
            within = bool(filled) and filled[-1] != "O" and filled[-1][2:] == kind
            tag = "O" if kind is None else f"{'I' if within else 'B'}-{kind}"
        filled.append(tag)
    return filled


def repair(tags: Iterable[str]) -> list[str]:
    """Valid IOB2 of predicted tags: an `I-X` that continues nothing opens an entity, as in transformers' pipelines."""
    return to_iob2(list(tags), "iob1")
