"""Data files as accidents, other programs and bad luck leave them; each in a form of every kind that recipes read."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .odd_parquets import odd_parquets, parquet

ROWS = [
    {
        "text": f"{'fièvre' if number % 2 else 'itch'} “for {number} weeks”, said she",
        "label": ("heart", "skin")[number % 2],
        "tokens": ["the", "patient", "has", "fièvre" if number % 2 else "itch", str(number)],
        "ner_tags": ["O", "O", "O", "B-PROBLEM" if number % 2 else "B-DRUG", "O"],
    }
    for number in range(12)
]
MEGABYTE = 1 << 20
GOOD_PARQUET = parquet({name: [row[name] for row in ROWS] for name in ROWS[0]})


def as_csv(rows: list[dict[str, Any]], columns: tuple[str, ...] = ("text", "label")) -> str:
    def cell(value: Any) -> str:
        return '"' + str(value).replace('"', '""') + '"'

    return "\n".join([",".join(columns), *(",".join(cell(row.get(c, "")) for c in columns) for row in rows), ""])


def as_json(rows: Any) -> str:
    return json.dumps(rows, ensure_ascii=False, indent=1)


def as_jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_conll(rows: list[dict[str, Any]], separator: str = "\t") -> str:
    sentences = (zip(row["tokens"], row["ner_tags"], strict=True) for row in rows)
    return "\n\n".join("\n".join(separator.join(pair) for pair in sentence) for sentence in sentences) + "\n"


def as_txt(rows: list[dict[str, Any]]) -> str:
    return "\n".join(row["text"] for row in rows)


# Extension → the good rows in it.
TEXTS: dict[str, str] = {
    "csv": as_csv(ROWS),
    "json": as_json(ROWS),
    "jsonl": as_jsonl(ROWS),
    "conll": as_conll(ROWS),
    "tsv": as_conll(ROWS),
    "txt": as_txt(ROWS),
}


def damaged_texts(draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """Name and content: accidents that can befall a text in any format."""
    for ending, text in TEXTS.items():
        content = text.encode()
        half = len(text) // 2
        changes: dict[str, bytes] = {
            "good": content,
            "bom": b"\xef\xbb\xbf" + content,
            "two-boms": b"\xef\xbb\xbf" * 2 + content,
            "bom-inside": content[:40] + b"\xef\xbb\xbf" + content[40:],
            "utf-16": text.encode("utf-16"),
            "utf-16-le": text.encode("utf-16-le"),
            "utf-32": text.encode("utf-32"),
            "cp1252": text.encode("cp1252"),
            "latin-1": text.encode("latin-1", errors="replace"),
            "mixed": text[:half].encode() + text[half:].encode("cp1252"),
            "utf-8-twice": text.encode().decode("latin-1").encode(),
            "crlf": text.replace("\n", "\r\n").encode(),
            "cr": text.replace("\n", "\r").encode(),
            "separators": text.replace(" ", "\u2028\x0b\x0c\x85\x1c").encode(),
            "nul": content[:half] + b"\0" + content[half:],
            "nuls": b"\0" * 1000,
            "empty": b"",
            "blank": b" \n\t\r\n  \n",
            "newlines": b"\n" * 5000,
            "one-byte": content[:1],
            "first-line": text.partition("\n")[0].encode(),
            "third": content[: len(content) // 3],
            "no-end": content[:-3],
            "twice": content * 2,
            "backwards": content[::-1],
            "quote": content.replace(b'"', b"", 1) + b'"',
            "no-quotes": content.replace(b'"', b""),
            "apostrophes": content.replace(b'"', b"'"),
            "gzip": gzip.compress(content, mtime=0),
            "junk": draw.randbytes(3000),
            "long-line": content.replace(b"weeks", b"weeks " * (MEGABYTE // 2), 1),
            "long-word": content.replace(b"weeks", b"w" * (2 * MEGABYTE), 1),
            "one-line": b"x" * (3 * MEGABYTE),
        }
        for other in TEXTS:
            if other != ending:
                changes[f"is-{other}"] = TEXTS[other].encode()
        changes["is-parquet"] = GOOD_PARQUET
        for name, changed in changes.items():
            yield f"{name}.{ending}", changed


def odd_rows() -> Iterator[tuple[str, list[Any]]]:
    """Name and rows: accidents in values, for the formats that have types."""
    nested: Any = "x"
    for _ in range(400):
        nested = [nested]
    values = {
        "null": None,
        "integer": 3,
        "float": 2.5,
        "nan": float("nan"),
        "infinity": float("inf"),
        "huge-float": 1e300,
        "huge-integer": 10**60,
        "true": True,
        "empty": "",
        "blank": " \t\u3000",
        "list": ["a", 1],
        "object": {"a": 1},
        "nested": nested,
        "surrogate": "a\ud800b",
        "nul": "a\0b",
        "digits": "7" * 5000,
        "arabic-digits": "٣٤",
        "emoji": "👩‍⚕️" * 50,
    }
    for column in ("text", "label"):
        for name, value in values.items():
            yield f"{column}-{name}-once", [*ROWS[:11], {**ROWS[11], column: value}]
            yield f"{column}-{name}-always", [{**row, column: value} for row in ROWS]
        yield f"{column}-missing-once", [*ROWS[:11], {k: v for k, v in ROWS[11].items() if k != column}]
        yield f"{column}-missing", [{k: v for k, v in row.items() if k != column} for row in ROWS]
        yield f"{column}-other-case", [{k.title() if k == column else k: v for k, v in row.items()} for row in ROWS]
    tokens = {"text": "a b", "none": None, "empty": [], "numbers": [1, 2], "nested": [["a"]], "blank": [" ", ""]}
    tokens |= {"nul": ["a\0"], "surrogate": ["\ud800"], "short": ["a"], "mixed": ["a", None], "long": ["a"] * 20_000}
    tags = {"text": "O O", "none": None, "empty": [], "short": ["O"], "integers": [0, 1, 2, 3, 4], "floats": [0.5] * 5}
    tags |= {"unknown": ["X"] * 5, "inside": ["I-DRUG"] * 5, "surrogate": ["B-\ud800"] * 5, "nul": ["B-\0"] * 5}
    tags |= {"dash": ["B-"] * 5, "null": [None] * 5, "nested": [["O"]] * 5, "true": [True] * 5}
    for column, changes in (("tokens", tokens), ("ner_tags", tags)):
        for name, changed in changes.items():
            yield f"{column}-{name}", [*ROWS[:11], {**ROWS[11], column: changed}]
    ids = [[int(tag != "O") * (1 + 2 * (i % 2)) for tag in row["ner_tags"]] for i, row in enumerate(ROWS)]
    for name, last in (("good", ids[-1]), ("large", [9] * 5), ("negative", [-1] * 5), ("mixed", ["O"] * 5)):
        yield f"ids-{name}", [{**row, "ner_tags": tags} for row, tags in zip(ROWS, [*ids[:-1], last], strict=True)]
    yield "one-label", [{**row, "label": "skin", "ner_tags": ["O"] * 5} for row in ROWS]
    yield "mixed-labels", [{**row, "label": (1, "1", True, 1.0, "b")[i % 5]} for i, row in enumerate(ROWS)]
    yield "a-label-each", [{**row, "label": i} for i, row in enumerate(ROWS)]
    yield "one-row", ROWS[:1]
    yield "same-rows", [ROWS[i % 2] for i in range(8)]


JSON_VALUES = ("1", "null", "true", '"a"', "NaN", "[]", "{}", "[{}]", "[{}, {}]")
JSON_TEXTS: dict[str, str] = {
    **{f"value-{number}": text for number, text in enumerate(JSON_VALUES)},
    "integers": "[1, 2, 3]",
    "lists": "[[1], [2]]",
    "lines-of-lists": "[1]\n[2]\n",
    "empty-objects": "{}\n{}\n{}\n",
    "nested-lists": "[" * 100_000,
    "nested-objects": '{"text":' * 100_000,
    "nested-text": '{"text": ' + "[" * 50_000 + "]" * 50_000 + ', "label": 1}\n',
    "nested-in-a-list": '[{"text": "a", "label": 1}, {"text": ' + "[" * 50_000 + "]" * 50_000 + "}]",
    "many-digits": '{"text": "a", "label": ' + "9" * 10_000 + "}\n",
    "many-digits-in-a-list": '[{"text": ' + "9" * 10_000 + "}]",
    "too-large": '{"text": "a", "label": 1e999}\n{"text": "b", "label": -Infinity}',
    "keys-twice": '{"text": "a", "text": "b", "label": 1, "label": 2}\n' * 3,
    "comma": '[{"text": "a", "label": 1},]',
    "comments": '// rows\n{"text": "a", "label": 1}\n',
    "two-on-a-line": '{"text": "a", "label": 1}{"text": "b", "label": 2}\n',
    "columns": as_json({"text": ["a", "b"], "label": [0, 1]}),
    "nested-rows": as_json({"data": ROWS}),
    "empty-key": '{"": "a"}\n',
    "escapes": '{"text": "\\u0000\\ud83d", "label": "\\udc00"}\n' * 4,
    "long-string": '[{"text": "' + "a" * (3 * MEGABYTE),
    "long-list": "[" + "1," * 200_000,
    "many-keys": json.dumps({f"key {i}": i for i in range(20_000)}),
    "many-labels": as_jsonl([{"text": f"text {i}", "label": f"l{i // 2}"} for i in range(20_000)]),
}

CSV_TEXTS: dict[str, str] = {
    "long-row": "text,label\na,b,c\n",
    "short-row": "text,label\na,b\nc\n",
    "open-quote": 'text,label\n"a,b\nc,d\n',
    "quote-inside": 'text,label\na "b" c,d\n"a"b,c\n',
    "columns-twice": "text,label,text\na,b,c\n",
    "no-names": ",\na,b\n",
    "name-blank": "text, label\na,b\n",
    "semicolons": "text;label\na;b\n",
    "tabs": "text\tlabel\na\tb\n",
    "no-header": "a,1\nb,2\n",
    "header-quoted": '"text","label"\n"a","1"\n"b","2"\n"c","1"\n"d","2"\n',
    "many-columns": ",".join(f"c{i}" for i in range(20_000)) + "\n",
    "digits": "text,label\n" + "".join(f"t{i},{'7' * 5000}{i % 2}\n" for i in range(8)),
    "nul-cell": "text,label\na\0,b\nc,d\ne,b\nf,d\n",
    "blank-first": "\n\ntext,label\na,b\n",
    "labels-blank": "text,label\na,\nb, \nc,x\n",
    "numbers": "text,label\n" + "".join(f"{i},{i % 2}.0\n" for i in range(8)),
    "breaks": 'text,label\n"a\n\n\nb",1\n"c\r\nd",2\n"e\rf",1\n"g",2\n',
    "only-quotes": '"' * 999,
    "only-commas": "," * 5000 + "\n",
    "many-labels": "text,label\n" + "".join(f"text {i},l{max(i, 1)}\n" for i in range(100_001)),
}

CONLL_TEXTS: dict[str, str] = {
    "one-column": "a\nb\n\nc\n",
    "ragged": "a\tO\nb\tX\tO\n",
    "no-tag": "a\tO\nb\t\n",
    "no-token": "\tO\na\tO\n",
    "unknown-tag": "a\tX-Y\nb\tO\n",
    "inside-first": "a\tI-PER\nb\tO\n",
    "bioes": "a\tS-PER\nb\tO\n",
    "comments": "# a\n# b\n\n# c\n",
    "documents": "-DOCSTART- -X- O\n\n-DOCSTART- -X- O\n",
    "tabs-then-spaces": "a\tB-PER\nb O\n",
    "only-o": "a\tO\nb\tO\n",
    "long-sentence": "word\tO\n" * 50_000 + "fever\tB-X\n",
    "hashes": "#\tO\n##\tB-X\n\n# # B-X\n",
    "no-break-space": "a\u00a0b\tB-X\nc\u2028d\tO\n\n" * 4,
    "entities-alone": "a\tB-X\n\n" * 6,
}


def flipped(draw: random.Random, content: bytes) -> bytes:
    """A few random bytes of it changed, dropped or doubled."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        place = draw.randrange(len(changed))
        if draw.random() < 0.7:
            changed[place] ^= 1 << draw.randrange(8)
        else:
            changed[place : place + draw.randint(1, 9)] = changed[place : place + 1] * draw.choice((0, 2))
    return bytes(changed)


def odd_paths(folder: Path) -> Iterator[Path]:
    """Paths at which there is no file that could be read."""
    for number, ending in enumerate((*TEXTS, "parquet", "pdf")):
        yield folder / f"absent.{ending}"
        (folder / f"folder.{ending}").mkdir()
        yield folder / f"folder.{ending}"
        yield folder / f"{'n' * 300}.{ending}"
        yield folder / "no folder" / f"a.{ending}"
        yield folder / f"folder.{ending}" / "a.csv" / "b.csv"
        links = {"lost": folder / "nowhere", "loop": folder / f"loop.{ending}"}
        # A file that is there and cannot be read, also not by root.
        links |= {"unreadable": Path("/proc/self/mem")} if os.path.exists("/proc/self/mem") else {}
        for name, target in links.items():
            (folder / f"{name}.{ending}").symlink_to(target)
            yield folder / f"{name}.{ending}"
        if hasattr(os, "mkfifo") and number < 3:
            os.mkfifo(folder / f"pipe.{ending}")
            yield folder / f"pipe.{ending}"


def write_all(folder: Path, seed: int, flips: int) -> list[Path]:
    """Writes all of them, and `flips` copies with random damage of a good file in every format."""
    draw = random.Random(seed)
    files: list[tuple[str, bytes]] = list(damaged_texts(draw))
    for name, rows in odd_rows():
        files.append((f"{name}.json", json.dumps(rows).encode()))
        files.append((f"{name}.jsonl", "\n".join(map(json.dumps, rows)).encode()))
    kinds: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
        "json": (JSON_TEXTS, ("json", "jsonl")),
        "csv": (CSV_TEXTS, ("csv",)),
        "conll": (CONLL_TEXTS, ("conll", "txt")),
    }
    for kind, (texts, endings) in kinds.items():
        files += [(f"{kind}-{name}.{ending}", text.encode()) for name, text in texts.items() for ending in endings]
    files += [(f"{name}.parquet", content) for name, content in odd_parquets(ROWS, GOOD_PARQUET)]
    good = {**{ending: text.encode() for ending, text in TEXTS.items()}, "parquet": GOOD_PARQUET}
    for ending, content in good.items():
        files += [(f"flipped-{number}.{ending}", flipped(draw, content)) for number in range(flips)]
    contents = dict(files)
    assert len(contents) == len(files), "two of a name"
    for name, content in files:
        (folder / name).write_bytes(content)
    return [*(folder / name for name in contents), *odd_paths(folder)]
