"""The rows of a batch as words: which columns hold them, the checks, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .word_edits import Word, text_of, words_of_text, words_of_tokens

# Columns that are computed from the text: those of a copy would still be those of the original.
_COMPUTED = ("input_ids", "attention_mask", "token_type_ids", "offset_mapping", "teacher_logits")


class Row(NamedTuple):
    content: str | list[str]
    words: list[Word]


class Columns(NamedTuple):
    """Where the texts are, or the tagged tokens, and the tag of tokens outside of entities."""

    text: str
    tokens: str
    tags: str
    outside: int | str

    def rows(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int] | None) -> list[Row]:
        """The rows as words.

        Raises:
            ValueError: The columns are missing, ambiguous or computed from the text, or a row is not fit.
            TypeError: A text is not a string, or tokens not a list of strings.
        """
        tagged = self._tagged(list(batch.keys()))
        contents = batch[self.tokens if tagged else self.text]
        rows = []
        for index, content in enumerate(contents):
            where = f"row {index if indices is None else indices[index]}"
            if tagged:
                rows.append(self._tagged_row(batch, index, where))
            elif isinstance(content, str):
                rows.append(Row(content, words_of_text(content)))
            else:
                raise TypeError(
                    f"{where}: {self.text!r} is {content!r:.50}, a {type(content).__name__}, not a string. Filter "
                    "such rows out."
                )
        return rows

    def values(self, words: Sequence[Word], batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """What stands in the columns for the words, in a batch with such columns."""
        if self.text in batch:
            return {self.text: text_of(words)}
        return {self.tokens: [word.core for word in words], self.tags: [word.tag for word in words]}

    def _tagged(self, names: Sequence[str]) -> bool:
        computed = [name for name in _COMPUTED if name in names]
        if computed:
            raise ValueError(
                f"The column {computed[0]!r} is computed from the text and would be wrong for a copy. Augment before "
                f"tokenizing, or remove_columns({computed})."
            )
        text, tagged = self.text in names, self.tokens in names and self.tags in names
        both = text and (self.tokens in names or self.tags in names)
        if both or not (text or tagged):
            raise ValueError(
                f"The data have {'both' if both else 'neither'} of text ({self.text!r}) and tagged tokens "
                f"({self.tokens!r} with {self.tags!r}); the columns are {list(names)}. "
                + ("Remove one of them." if both else "Name yours by text_column, or tokens_column and tags_column.")
            )
        return tagged

    def _tagged_row(self, batch: Mapping[str, Sequence[Any]], index: int, where: str) -> Row:
        tokens, tags = batch[self.tokens][index], batch[self.tags][index]
        for name, value in ((self.tokens, tokens), (self.tags, tags)):
            if not isinstance(value, list):
                cure = "Filter such rows out." if value is None else "Use dataset.with_format(None)."
                raise TypeError(f"{where}: {name!r} is {value!r:.50}, a {type(value).__name__}, not a list. {cure}")
        if len(tokens) != len(tags):
            raise ValueError(f"{where}: {len(tokens)} tokens in {self.tokens!r} have {len(tags)} tags.")
        for token in tokens:
            if not isinstance(token, str):
                raise TypeError(
                    f"{where}: the token {token!r:.50} in {self.tokens!r} is a {type(token).__name__}, not a string."
                )
        odd = next((tag for tag in tags if type(tag) is not type(self.outside)), None)
        if odd is not None:
            raise ValueError(
                f"{where}: the tag {odd!r} is a {type(odd).__name__}, but outside_tag={self.outside!r} is a "
                f"{type(self.outside).__name__}. Set outside_tag to the tag of tokens outside of entities (often 0)."
            )
        for name in batch.keys():
            if name not in (self.tokens, self.tags) and isinstance(batch[name][index], list):
                raise ValueError(
                    f"{where}: the column {name!r} is a list beside the tokens, and would not fit those of a copy. "
                    f"remove_columns([{name!r}]) first."
                )
        return Row(tokens, words_of_tokens(tokens, tags, self.outside))
