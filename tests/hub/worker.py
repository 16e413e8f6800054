"""What runs in the process whose Hub is the server of the tests: real trainers, real client.

Each function is called by a test, with plain values in and out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import get_session, snapshot_download
from huggingface_hub.utils import _http
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from hf_l2sp import Anchor, L2SPTrainer, L2SPTrainingArguments
from hf_l2sp.publish import push_folder
from hf_l2sp.state import read_state, recorded_anchor
from tests.end_to_end.recipe_harness import notes

HOST = "host-of-somebody"
TEXTS = [row["text"] for row in notes(per_class=4, seed=3)]

# Trainers by folder, for the tests that push one of them several times.
_trainers: dict[str, Trainer] = {}
_messages: list[str] = []


def start() -> None:
    """Once per process: nothing but this machine is called, the client does not wait, warnings are kept."""
    torch.set_num_threads(1)
    connect = socket.socket.connect

    def only_here(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost"):
            raise OSError(f"the test called {address}")
        connect(self, address)

    socket.socket.connect = only_here  # type: ignore[method-assign]
    socket.gethostname = lambda: HOST
    _http.time = SimpleNamespace(sleep=lambda seconds: None, time=time.time, monotonic=time.monotonic)

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _messages.append(record.getMessage())

    logging.getLogger("hf_l2sp.publish").addHandler(Keep(level=logging.WARNING))


def matplotlib_is_there(yes: bool) -> None:
    if yes:
        del sys.modules["matplotlib.figure"]
    else:
        sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]


def build(out: str, base: str, plain: bool = False, **arguments: Any) -> Trainer:
    """A trainer on a few notes; `base` is a Hub id or a folder."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    rows = [{**tokenizer(text), "labels": index % 3} for index, text in enumerate(TEXTS)]
    settings = {"max_steps": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, **arguments}
    config, trainer_class = (TrainingArguments, Trainer) if plain else (L2SPTrainingArguments, L2SPTrainer)
    trainer = trainer_class(
        model=model,
        args=config(output_dir=out, use_cpu=True, learning_rate=1e-3, logging_steps=1, **settings),
        train_dataset=rows,
        eval_dataset=rows[:6],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": 0.5, "f1_macro": 0.25, "ece": float("nan")},
    )
    _trainers[out] = trainer
    return trainer


def train(out: str, base: str, **arguments: Any) -> dict[str, Any]:
    trainer = build(out, base, **arguments)
    _messages.clear()
    trainer.train()
    return {"steps": trainer.state.global_step, "messages": list(_messages)}


def construct(out: str, base: str, **arguments: Any) -> tuple[str, str, str]:
    """Error of the constructor: type, message, type of the cause."""
    try:
        build(out, base, **arguments)
    except Exception as error:
        return type(error).__name__, str(error), type(error.__cause__).__name__
    return "", "", ""


def evaluate(out: str) -> dict[str, float]:
    """Logs an evaluation; writes scores on a test set as a recipe does, and what else lies around in such folders."""
    trainer: Any = _trainers[out]
    metrics = trainer.evaluate()
    train_metrics = next(entry for entry in trainer.state.log_history if "train_runtime" in entry)
    test = {"test_loss": 0.75, "test_accuracy": 0.625, "test_runtime": 0.1, "test_samples": 6}
    trainer.save_metrics("all", {**metrics, **train_metrics, **test})
    trainer.save_state()
    folder = Path(out)
    (folder / "predictions.jsonl").write_text("\n".join(TEXTS), encoding="utf-8")
    (folder / "run.log").write_text(f"reading {folder}", encoding="utf-8")
    (folder / "settings.json").write_text(json.dumps({"train_file": f"{folder}/run.log", "shots": 4}))
    return metrics


def push(out: str, blocking: bool = True, **arguments: Any) -> dict[str, Any]:
    """The outcome of `push_to_hub`: hash of the commit, or error and cause; warnings."""
    _messages.clear()
    try:
        done = _trainers[out].push_to_hub(blocking=blocking, **arguments)
        done = done if blocking else done.result()
        return {"commit": done.oid, "messages": list(_messages)}
    except Exception as error:
        told = {"error": type(error).__name__, "message": str(error), "cause": type(error.__cause__).__name__}
        return {**told, "is_os_error": isinstance(error, OSError), "messages": list(_messages)}
    finally:
        with contextlib.suppress(Exception):
            get_session().close() if not hasattr(_http, "close_session") else _http.close_session()


def push_again_by_folder(out: str, repo: str, **arguments: Any) -> str:
    return push_folder(out, repo, **arguments).oid


def rename(out: str, repo: str) -> None:
    """The repository that a trainer pushes to from now on."""
    trainer: Any = _trainers[out]
    trainer.args.hub_model_id, trainer.hub_model_id = repo, None


def fingerprint(out: str) -> str:
    trainer: Any = _trainers[out]
    return trainer.l2sp_anchor.fingerprint


def same_weights(out: str, place: str, cache: str, subfolder: str = "") -> bool:
    """Whether the model of a trainer is the one in a folder or, downloaded into an empty cache, on the Hub."""
    trainer: Any = _trainers[out]
    loaded = _load(place, cache, subfolder=subfolder)
    pairs = zip(trainer.model.state_dict().items(), loaded.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def _load(place: str, cache: str, **options: Any) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(place, cache_dir=cache, **options)


def classify(out: str, repo: str, cache: str) -> bool:
    """Whether the pipeline from the Hub answers as the one from the folder."""
    answers = []
    for place, options in ((out, {}), (repo, {"cache_dir": cache})):
        model = AutoModelForSequenceClassification.from_pretrained(place, **options)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        answers.append(pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(TEXTS[:3]))
    return answers[0] == answers[1]


def answers(repo: str, texts: list[str]) -> list[str]:
    """Labels from the pipeline that a repository's name alone gives."""
    return [answer["label"] for answer in pipeline("text-classification", model=repo, device="cpu")(texts)]


def weights_equal(folder: str, repo: str, cache: str) -> bool:
    """Whether the model of a folder is that of the Hub, downloaded into an empty cache."""
    pairs = zip(_load(folder, cache).state_dict().items(), _load(repo, cache).state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def anchor_again(repo: str, cache: str) -> dict[str, Any]:
    """θ0 from what the uploaded state says about it, with another head than the first time."""
    folder = snapshot_download(repo, cache_dir=cache)
    state = read_state(folder)
    assert state is not None
    source, revision = state["anchor"]["source"], state["anchor"]["revision"]
    set_seed(9)
    model = AutoModelForSequenceClassification.from_pretrained(source, revision=revision, num_labels=3)
    anchor = Anchor.from_pretrained(source, model, revision=revision)
    of_folder = recorded_anchor(_load(folder, cache))
    assert of_folder is not None
    return {
        "source": source,
        "revision": revision,
        "recorded": state["anchor"]["fingerprint"],
        "fingerprint": anchor.fingerprint,
        "of_folder": of_folder.fingerprint,
    }


def resume(out: str, base: str, repo: str, cache: str) -> int:
    """Trains on from the checkpoint on the Hub; the number of steps in the end."""
    folder = snapshot_download(repo, cache_dir=cache, allow_patterns="last-checkpoint/*")
    trainer = build(out, base, max_steps=6)
    trainer.train(resume_from_checkpoint=os.path.join(folder, "last-checkpoint"))
    return trainer.state.global_step
