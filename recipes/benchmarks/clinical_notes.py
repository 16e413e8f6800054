"""What the embedded clinical notes ask for: a bag of words, frozen embeddings, and how like each other notes are.

    python recipes/benchmarks/clinical_notes.py

Trains on the training notes and scores macro-F1 on the test notes; the fine-tuned scores are those of main_job.py.
Needs scikit-learn. Writes results/clinical_notes.json.
"""

import json
from collections import Counter
from typing import Any

import numpy
import torch
from _bench import RECIPES, embedded_model, environment, write_results
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

DATA = RECIPES / "data" / "clinical_notes"
STRENGTHS = (0.1, 1.0, 10.0, 100.0)


def read(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def embed(rows: list[dict[str, str]]) -> numpy.ndarray:
    """Mean-pooled, normalised sentence embeddings of the embedded model. Shape: [rows, 384]."""
    tokenizer, model = AutoTokenizer.from_pretrained(embedded_model()), AutoModel.from_pretrained(embedded_model())
    parts = []
    with torch.no_grad():
        for start in range(0, len(rows), 32):
            texts = [row["text"] for row in rows[start : start + 32]]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
            mask = batch["attention_mask"].unsqueeze(-1)
            mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            parts.append(torch.nn.functional.normalize(mean))
    return torch.cat(parts).numpy()


def best_linear(train: Any, test: Any, labels: dict[str, list[str]]) -> float:
    """Best test macro-F1 over the strength of regularisation: the comparison errs in the baseline's favour."""
    scores = []
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=5000).fit(train, labels["train"])
        scores.append(f1_score(labels["test"], model.predict(test), average="macro"))
    return max(scores)


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    splits = {name: read(name) for name in ("train", "validation", "test")}
    labels = {name: [row["label"] for row in rows] for name, rows in splits.items()}
    bags = {}
    for name, ngrams in (("words", (1, 1)), ("words and pairs", (1, 2))):
        vectorizer = TfidfVectorizer(ngram_range=ngrams, sublinear_tf=True)
        train = vectorizer.fit_transform(row["text"] for row in splits["train"])
        bags[name] = best_linear(train, vectorizer.transform(row["text"] for row in splits["test"]), labels)
    frozen = best_linear(embed(splits["train"]), embed(splits["test"]), labels)
    everything = [row["text"] for rows in splits.values() for row in rows]
    where = [name for name, rows in splits.items() for _ in rows]
    vectors = TfidfVectorizer(ngram_range=(1, 2)).fit_transform(everything)
    similar = (vectors @ vectors.T).toarray()
    across = numpy.array([[a != b for b in where] for a in where])
    numpy.fill_diagonal(similar, 0.0)
    lengths = [len(text.split()) for text in everything]
    result = {
        "rows": {name: len(rows) for name, rows in splits.items()},
        "rows_per_class": {name: sorted(set(Counter(values).values())) for name, values in labels.items()},
        "classes": sorted(set(labels["train"])),
        "note_types": Counter(row["note_type"] for rows in splits.values() for row in rows),
        "words": {"min": min(lengths), "median": float(numpy.median(lengths)), "max": max(lengths)},
        "test_f1_macro": {"bag of words": bags, "frozen MiniLM embeddings, linear": frozen},
        "largest_cosine_across_splits": float(similar[across].max()),
        "largest_cosine_within_a_split": float(similar[~across].max()),
        "environment": environment(),
    }
    path = write_results("clinical_notes.json", result)
    for name, score in bags.items():
        print(f"bag of {name:<16} macro-F1 {score:.3f}")
    print(f"frozen embeddings       macro-F1 {frozen:.3f}")
    print(f"largest cosine of TF-IDF 1-2-grams across splits {result['largest_cosine_across_splits']:.3f}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
