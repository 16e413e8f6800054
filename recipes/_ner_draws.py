"""Sentences of named-entity data, and draws from them by seed: the part held out, the few shots."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from _ner_tags import entity_types
from _recipe_args import RecipeError
from _recipe_files import shown


@dataclass
class NerSplit:
    """Sentences as lists of tokens and of IOB2 tags, in the order of the file."""

    source: str  # as messages name it
    tokens: list[list[str]]
    tags: list[list[str]]

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: Sequence[int]) -> NerSplit:
        return NerSplit(self.source, [self.tokens[i] for i in rows], [self.tags[i] for i in rows])

    def types(self) -> list[set[str]]:
        """The entity types in each sentence."""
        return [entity_types(tags) for tags in self.tags]


def _shuffled(split: NerSplit, seed: int) -> list[int]:
    """All rows, shuffled by seed; the same sentences in the same order whatever the order of the file."""
    rows = sorted(range(len(split)), key=lambda row: (split.tokens[row], split.tags[row]))
    random.Random(seed).shuffle(rows)
    return rows


def hold_out(split: NerSplit, share: float, seed: int) -> tuple[NerSplit, NerSplit]:
    """Splits off `share` of the sentences of every type, and of those without entity, where there are two or more.

    A sentence counts for the rarest of its types. The last sentence of a type is never taken.
    """
    types = split.types()
    left = Counter(kind for kinds in types for kind in kinds)
    groups: dict[str, list[int]] = {}
    for row in _shuffled(split, seed):
        groups.setdefault(min(types[row], key=lambda kind: (left[kind], kind), default=""), []).append(row)
    taken: set[int] = set()
    for _, rows in sorted(groups.items()):
        wanted = max(1, round(share * len(rows))) if len(rows) > 1 else 0
        for row in rows:
            if wanted and all(left[kind] > 1 for kind in types[row]):
                taken.add(row)
                left.subtract(types[row])
                wanted -= 1
    if not taken:
        raise RecipeError(
            f"{split.source} has one sentence per entity type: none can be held out to validate on; give "
            "--validation_file."
        )
    return split.take([i for i in range(len(split)) if i not in taken]), split.take(sorted(taken))


def draw_shots(split: NerSplit, shots: int, seed: int) -> NerSplit:
    """Sentences drawn by seed until every entity type is in `shots` of them, in the order of the file.

    Greedy: the rarest type first, each draws sentences at random until it has enough, and a sentence counts for all
    the types in it. A type that keeps company with others may so be in more than `shots`; what has no entity is never
    drawn.
    """
    types = split.types()
    holding: dict[str, list[int]] = {}
    for row in _shuffled(split, seed):
        for kind in types[row]:
            holding.setdefault(kind, []).append(row)
    by_rarity = sorted(holding, key=lambda kind: (len(holding[kind]), kind))
    smallest = by_rarity[0]
    if len(holding[smallest]) < shots:
        raise RecipeError(
            f"--shots {shots} is more than the training data have of type {shown(smallest)}: "
            f"{len(holding[smallest])} sentences; give --shots {len(holding[smallest])} or less."
        )
    counts: Counter[str] = Counter()
    taken: set[int] = set()
    for kind in by_rarity:
        for row in holding[kind]:
            if counts[kind] < shots and row not in taken:
                taken.add(row)
                counts.update(types[row])
    return split.take(sorted(taken))
