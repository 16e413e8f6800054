"""From texts to rows: which are trained on, which are evaluated on, and which warm the head up."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from _mlm_data import TextArguments, Texts
from _mlm_packing import PackedFile
from _recipe_args import RecipeError
from _recipe_launch import agreed
from transformers import TrainingArguments

# One training text in so many is validated on where no validation data are given, and one general text in so many
# shows what is forgotten; the other general texts warm the head up.
HELD_OUT, MEASURED = 20, 5
_SUMMARY = "summary.json"


@dataclass
class Packed:
    """The rows of each kind of text, and what is to be told of them.

    Attributes:
        rows: `train`, `validation`, `general`, perhaps `test` and `warm_up`; mapped from disk.
        tokens: Number of tokens of each.
        notes: What was decided on the way.
    """

    rows: dict[str, datasets.Dataset]
    tokens: dict[str, int]
    notes: list[str]


@contextmanager
def rows_folder(args: TrainingArguments) -> Iterator[Path]:
    """A temporary folder, the same in all processes; TMPDIR says where."""
    folder = Path(agreed(lambda: tempfile.mkdtemp(prefix="mlm-rows-")))
    folder.mkdir(exist_ok=True)  # on another machine
    try:
        yield folder
    finally:
        if args.local_process_index == 0:
            shutil.rmtree(folder, ignore_errors=True)


def pack_texts(
    folder: Path, texts: dict[str, Texts], tokenizer: Any, data: TextArguments, seed: int, warm_up_rows: int
) -> Packed:
    """Tokenizes and packs all texts into files of a folder, or takes what another process has put there.

    Args:
        folder: Where the files go.
        texts: From `find_texts`.
        tokenizer: The model's tokenizer.
        data: The data arguments, checked.
        seed: Of the draws of what is held out.
        warm_up_rows: Rows of general text to warm the head up on; 0 where it is trained.

    Raises:
        RecipeError: a text cannot be read, there are too few, or the disk is full.
    """
    if not (folder / _SUMMARY).is_file():
        packing = _Packing(folder, tokenizer, data, seed)
        try:
            packing.all_of(texts, warm_up_rows)
            packing.finish()
        except OSError as error:
            raise RecipeError(
                f"the tokenized text cannot be written to {str(folder)!r}: {error}. Free some space, or set the "
                "environment variable TMPDIR to a folder elsewhere."
            ) from error
    summary = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
    rows = {kind: datasets.Dataset.from_file(str(folder / f"{kind}.arrow")) for kind in summary["tokens"]}
    return Packed(rows, summary["tokens"], summary["notes"])


class _Packing:
    """Shares texts out to files of packed rows, and keeps account of it."""

    def __init__(self, folder: Path, tokenizer: Any, data: TextArguments, seed: int) -> None:
        self.folder, self.tokenizer, self.data, self.seed = folder, tokenizer, data, seed
        self.tokens: dict[str, int] = {}
        self.notes: list[str] = []

    def all_of(self, texts: dict[str, Texts], warm_up_rows: int) -> None:
        evaluated = {"validation": self.data.max_eval_rows, "test": self.data.max_eval_rows}
        general = {"general": self.data.max_eval_rows}
        if "validation" in texts:
            self._share_out(texts["train"], {"train": None})
        else:
            self._share_out(texts["train"], {"train": None, "validation": evaluated["validation"]}, HELD_OUT)
        for kind, limit in evaluated.items():
            if kind in texts:
                self._share_out(texts[kind], {kind: limit})
        if "warm_up" not in texts and warm_up_rows:
            self._share_out(texts["general"], {"warm_up": warm_up_rows, **general}, MEASURED)
        else:
            self._share_out(texts["general"], general)
            if warm_up_rows:
                self._share_out(texts["warm_up"], {"warm_up": warm_up_rows})

    def _share_out(self, texts: Texts, limits: dict[str, int | None], one_in: int = 0) -> None:
        """Packs texts into rows of the first kind, and one text in so many, drawn by seed, into those of the second.

        Args:
            texts: The texts.
            limits: Names of one or two kinds of rows, and how many of them are enough.
            one_in: How many texts there are to one of the second kind.
        """
        length = self.data.max_seq_length
        files = {
            kind: PackedFile(self.folder / f"{kind}.arrow", self.tokenizer, length, limit)
            for kind, limit in limits.items()
        }
        first, *second = files
        draw = random.Random(f"{self.seed} {first}")
        blank = place = chosen = 0
        for text in texts.read():
            if not text:
                blank += 1
                continue
            if all(file.full for file in files.values()):
                told = " and ".join(f"{limit} {kind.replace('_', '-')}" for kind, limit in limits.items())
                self.notes.append(f"Of {texts.name} the first texts are enough for {told} rows.")
                break
            if one_in and place % one_in == 0:
                chosen = place + draw.randrange(one_in)
            aside = one_in and place == chosen and not files[second[0]].full
            files[second[0] if aside else first].add(text)
            place += 1
        if blank and not place:
            raise RecipeError(f"{texts.name} holds blank texts alone; give it some text.")
        if blank:
            self.notes.append(f"{blank} blank texts of {texts.name} are passed over.")
        for kind, file in files.items():
            rows = file.close()
            self._check(kind, rows, file, texts, place)
            if len(rows):
                self.tokens[kind] = file.tokens

    def _check(self, kind: str, rows: datasets.Dataset, file: PackedFile, texts: Texts, count: int) -> None:
        length = self.data.max_seq_length
        if kind == "train" and (not len(rows) or len(rows[0]["input_ids"]) < length):
            raise RecipeError(
                f"{texts.name} has {file.tokens} tokens to train on, fewer than one row of --max_seq_length {length}; "
                "give more text or shorter rows."
            )
        if kind in ("validation", "general") and not len(rows):
            raise RecipeError(
                f"{texts.name} has {count} texts, of which none could be set aside to evaluate on; give more of them"
                + (", or --validation_file." if kind == "validation" else ".")
            )

    def finish(self) -> None:
        """Tells other processes that everything is there."""
        summary = {"tokens": self.tokens, "notes": self.notes}
        temporary = self.folder / f"{_SUMMARY}.{os.getpid()}"
        temporary.write_text(json.dumps(summary), encoding="utf-8")
        os.replace(temporary, self.folder / _SUMMARY)
