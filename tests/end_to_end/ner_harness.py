"""Sentences with entities that a tiny model can learn, and what the named-entity recipes are asked about."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

# The first word of each entity tells its type, and what follows it goes on with it.
KINDS = {"DRUG": ("aspirin", "aspirin forte", "insulin"), "PROBLEM": ("chest pain", "fever", "skin rash")}
FILLERS = "today the patient reports some more for two weeks".split()
MARKS = list("()[]-,.;!")
KNOWN = (*FILLERS, *MARKS, *dict.fromkeys(" ".join(" ".join(kind) for kind in KINDS.values()).split()), "我", "👍")


def tagged(text: str) -> dict[str, list[str]]:
    """Tokens and tags of a text whose tokens are separated by spaces."""
    tokens, tags = text.split(" "), []
    continues = {"forte": "aspirin", "pain": "chest", "rash": "skin"}
    first = {entity.split()[0]: kind for kind, entities in KINDS.items() for entity in entities}
    for index, token in enumerate(tokens):
        if token in first:
            tags.append(f"B-{first[token]}")
        elif index and continues.get(token) == tokens[index - 1]:
            tags.append(f"I-{tags[-1][2:]}")
        else:
            tags.append("O")
    return {"tokens": tokens, "ner_tags": tags}


def sentences(count: int, seed: int, longest: int = 9) -> list[dict[str, Any]]:
    """Rows of up to `longest` parts: entities, fillers and punctuation in any order."""
    draw = random.Random(seed)
    entities = [entity for kind in KINDS.values() for entity in kind]

    def part() -> str:
        return draw.choice(entities if draw.random() < 0.4 else FILLERS + MARKS)

    return [tagged(" ".join(part() for _ in range(draw.randint(1, longest)))) for _ in range(count)]


def entity_words(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Type and text of each entity of a row of tokens and tags."""
    found: list[tuple[str, str]] = []
    for token, tag in zip(row["tokens"], row["ner_tags"], strict=True):
        if tag.startswith("B-"):
            found.append((tag[2:], token))
        elif tag != "O":
            found[-1] = (found[-1][0], f"{found[-1][1]} {token}")
    return found


def write_conll(path: Path, rows: list[dict[str, Any]], with_tags: bool = True) -> str:
    lines = []
    for row in rows:
        pairs = zip(row["tokens"], row["ner_tags"], strict=True)
        lines += [*(f"{token}\t{tag}" if with_tags else token for token, tag in pairs), ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
