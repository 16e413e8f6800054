"""Texts of any number packed into rows of equal length, on disk.

The tokens of all texts form one stream, in their order, with a separator after each text. It is cut every
`max_seq_length` tokens, less the special tokens that the model expects around a row. Nothing is lost: what is left at
the end makes a last, shorter row. A word that a cut divides counts as two.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from _mlm_masking import FIRST, LATER, OUTSIDE

_SCHEMA = pyarrow.schema([("input_ids", pyarrow.list_(pyarrow.int32())), ("kinds", pyarrow.list_(pyarrow.int8()))])
_TEXTS, _CHARACTERS = 256, 1 << 20  # that are tokenized at once
_ROWS = 256  # that are written at once


@dataclass(frozen=True)
class Frame:
    """The special tokens around a row and between texts."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    between: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Frame:
        """What the tokenizer puts around a text; the separator is `[SEP]`, `</s>` or what else it ends a text with."""
        encoded = tokenizer("a", return_special_tokens_mask=True)
        ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
        ordinary = [place for place, flag in enumerate(special) if not flag]
        before, after = tuple(ids[: ordinary[0]]), tuple(ids[ordinary[-1] + 1 :])
        ends = (tokenizer.sep_token_id, tokenizer.eos_token_id)
        between = after[-1:] or tuple(token for token in ends if token is not None)[:1]
        return cls(before, after, between)

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


def kinds_of(text: str, ids: list[int], offsets: list[tuple[int, int]], words: list[Any], special: set[int]) -> list:
    """What each token of a text is: the first of a word, a later one, or none of a word.

    A word is what the tokenizer splits texts into before it looks for known pieces. Some do not split at all; there
    white space begins a word too.
    """
    kinds, word, end, blank = [], None, 0, False
    for token, (start, stop), index in zip(ids, offsets, words, strict=True):
        if token in special or index is None:
            kinds.append(OUTSIDE)
            word = None
        else:
            # The space before a word is part of its first token in some tokenizers, or a token of its own.
            spaced = text[start : start + 1].isspace() and not blank
            kinds.append(FIRST if index != word or spaced or text[end:start].isspace() else LATER)
            word = index
        end, blank = stop, text[start:stop].isspace()
    return kinds


class PackedFile:
    """Packs texts into rows of a file, of which no more than a few hundred texts and rows are in memory.

    Args:
        path: The Arrow file to write.
        tokenizer: A fast tokenizer.
        length: Tokens of a row.
        limit: Rows at which the file is full and takes no more.

    Attributes:
        texts, tokens: How many texts came, and how many tokens were made of them, separators included.
    """

    def __init__(self, path: Path, tokenizer: Any, length: int, limit: int | None = None) -> None:
        self.path, self.tokenizer, self.limit = path, tokenizer, limit
        self.frame = Frame.of(tokenizer)
        self.room = length - len(self.frame)
        self.special = set(tokenizer.all_special_ids)
        self.texts = self.tokens = self.written = 0
        self._waiting: list[str] = []
        self._characters = 0
        self._ids: list[int] = []
        self._kinds: list[int] = []
        self._rows: list[tuple[list[int], list[int]]] = []
        self._sink = pyarrow.OSFile(str(path), "wb")
        self._writer = pyarrow.ipc.new_stream(self._sink, _SCHEMA)

    @property
    def full(self) -> bool:
        """Whether nothing more is taken."""
        return self.limit is not None and self.written + len(self._rows) >= self.limit

    def add(self, text: str) -> None:
        """Takes a text that is not blank."""
        if self.full:
            return
        self.texts += 1
        self._waiting.append(text)
        self._characters += len(text)
        if len(self._waiting) == _TEXTS or self._characters >= _CHARACTERS:
            self._tokenize()

    def close(self) -> datasets.Dataset:
        """Ends the file; its rows, mapped from disk."""
        self._tokenize()
        if self._ids and not self.full:
            self._cut(0)
        self._write()
        self._writer.close()
        self._sink.close()
        return datasets.Dataset.from_file(str(self.path))

    def _tokenize(self) -> None:
        texts, self._waiting, self._characters = self._waiting, [], 0
        if not texts:
            return
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        for index, text in enumerate(texts):
            ids = encoded["input_ids"][index]
            kinds = kinds_of(text, ids, encoded["offset_mapping"][index], encoded.word_ids(index), self.special)
            self._ids += [*ids, *self.frame.between]
            self._kinds += [*kinds, *[OUTSIDE] * len(self.frame.between)]
            self.tokens += len(ids) + len(self.frame.between)
        start = 0
        while len(self._ids) - start >= self.room and not self.full:
            self._cut(start)
            start += self.room
        del self._ids[:start], self._kinds[:start]

    def _cut(self, start: int) -> None:
        """Makes a row of the tokens from `start` on."""
        ids, kinds = self._ids[start : start + self.room], self._kinds[start : start + self.room]
        if kinds[0] == LATER:
            kinds[0] = FIRST
        frame = self.frame
        outside = ([OUTSIDE] * len(frame.before), [OUTSIDE] * len(frame.after))
        self._rows.append(([*frame.before, *ids, *frame.after], [*outside[0], *kinds, *outside[1]]))
        if len(self._rows) == _ROWS:
            self._write()

    def _write(self) -> None:
        if self._rows:
            columns = dict(zip(_SCHEMA.names, zip(*self._rows, strict=True), strict=True))
            self._writer.write_batch(pyarrow.RecordBatch.from_pydict(columns, schema=_SCHEMA))
            self.written += len(self._rows)
            self._rows = []
