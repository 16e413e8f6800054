"""Parquet files whose types, schemas and metadata are not what they should be."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet


def parquet(table: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(table if isinstance(table, pyarrow.Table) else pyarrow.table(table), file)
    return file.getvalue()


def by_datasets(rows: list[dict[str, Any]], **features: Any) -> pyarrow.Table:
    """A table as `datasets` writes it, with the names of classes in its schema."""
    table = datasets.Dataset.from_list(rows)
    return datasets.Dataset.from_list(rows, features=datasets.Features({**table.features, **features})).data.table


def odd_parquets(rows: list[dict[str, Any]], content: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content: types, schemas and metadata that are not what they should be.

    Args:
        rows: Good rows.
        content: A good file of them.
    """
    texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
    good: dict[str, Any] = {"text": texts, "label": labels}
    columns: dict[str, Any] = {
        "binary": pyarrow.array([text.encode() for text in texts]),
        "large": pyarrow.array(texts, pyarrow.large_string()),
        "dictionary": pyarrow.array(texts).dictionary_encode(),
        "struct": pyarrow.array([{"a": text} for text in texts]),
        "map": pyarrow.array([[("a", 1)]] * 12, pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "null": pyarrow.nulls(12),
        "date": pyarrow.array([2**30] * 12, pyarrow.int32()).cast(pyarrow.date32()),
        "late": pyarrow.array([2**62] * 12).cast(pyarrow.timestamp("us")),
        "nanoseconds": pyarrow.array([2**62 + 1] * 12).cast(pyarrow.timestamp("ns")),
        "duration": pyarrow.array([2**62] * 12).cast(pyarrow.duration("s")),
        "decimal": pyarrow.array(range(12)).cast(pyarrow.decimal128(38)),
        "integer": pyarrow.array(range(12)),
        "unsigned": pyarrow.array([2**64 - 1] * 12, pyarrow.uint64()),
        "float": pyarrow.array(range(12)).cast(pyarrow.float32()),
        "no-utf-8": pyarrow.Array.from_buffers(
            pyarrow.string(), 12, pyarrow.array([b"\xff\xfe" + bytes([n]) for n in range(12)]).buffers()
        ),
    }
    for column in good:
        for name, values in columns.items():
            yield f"{column}-{name}", parquet({**good, column: values})
    yield "no-rows", parquet(pyarrow.table({"text": [], "label": []}))
    yield "no-columns", parquet(pyarrow.table({}))
    yield "twice", parquet(pyarrow.Table.from_arrays([pyarrow.array(texts)] * 3, ["text", "label", "text"]))
    yield "dots", parquet({"text.a": texts, "label": labels})
    classes = datasets.ClassLabel(names=["heart", "skin"])
    for name, numbers in (("classes", (0, 1)), ("hidden", (-1,)), ("strange-classes", (0, 7)), ("nulls", (0, None))):
        plain = pyarrow.table({"text": texts, "label": [numbers[i % len(numbers)] for i in range(len(texts))]})
        schema = by_datasets([{"text": "a", "label": 0}], label=classes).schema
        yield name, parquet(plain.replace_schema_metadata(schema.metadata))
    yield "names-for-texts", parquet(pyarrow.table(good).replace_schema_metadata(schema.metadata))
    for number, note in enumerate(("", "{", "[]", "null", '{"info": 3}', '{"info": {"features": {"label": 3}}}')):
        yield f"note-{number}", parquet(pyarrow.table(good).replace_schema_metadata({"huggingface": note}))
    unknown = '{"info": {"features": {"text": {"_type": "Nonsense"}, "label": {"_type": "ClassLabel", "names": 3}}}}'
    yield "note-of-no-type", parquet(pyarrow.table(good).replace_schema_metadata({"huggingface": unknown}))
    tags = pyarrow.Table.from_pylist([{**row, "ner_tags": [0, 1, 9, -1, None]} for row in rows])
    features = by_datasets([{"tokens": ["a"], "ner_tags": [0]}], ner_tags=datasets.Sequence(classes)).schema.metadata
    yield "tags-of-no-class", parquet(tags.replace_schema_metadata(features))
    for place in (0, 1, 4, 8, 60, len(content) // 2, len(content) - 9, len(content) - 1):
        yield f"cut-{place}", content[:place]
    yield "marks-alone", b"PAR1PAR1"
    yield "long-footer", b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1"
    yield "text", b"text,label\na,b\n"
