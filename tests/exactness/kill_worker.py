"""Trains tiny classifiers in forks of itself and kills them as it is told; one job per line of standard input.

Importing PyTorch and transformers takes longer than these trainings, so it is done once. A job is a dictionary:

    model, out        folder of the pretrained model, output folder
    resume            what `train` is to resume from
    processes         under torchrun's launcher; 1 without it
    arguments         for L2SPTrainingArguments
    moved             whether the model gets values that no file holds
    step              SIGKILL at the end of this step
    save, event       SIGKILL at this event (see `count_events`) of saving the checkpoint of this step
    wait_for          SIGKILL only when another rank has written this file of the checkpoint
    half_state        SIGKILL when half of trainer_state.json of the checkpoint of that step is written
    limit, at, fatal  from this step on no file may grow beyond this size: killed or, if not fatal, an error
    rank              the only rank that is killed; None: all, and their launcher

The answer is a line with the status as of `os.waitpid`, whether processes of the job are still there, what the job
wrote down and its standard error.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import BertForSequenceClassification, TrainerCallback, TrainerState

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments


def chosen(job: dict[str, Any]) -> bool:
    return job.get("rank") in (None, int(os.environ.get("RANK", "0")))


def kill(job: dict[str, Any]) -> None:
    if job.get("processes", 1) > 1 and job.get("rank") is None:
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def limit_files(size: int, fatal: bool) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if fatal else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class Killer(TrainerCallback):
    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.job.get("step"):
            kill(self.job)
        if state.global_step == self.job.get("at"):
            limit_files(self.job["limit"], self.job["fatal"])

    def on_train_end(self, args, state, control, **kwargs):
        if self.job.get("at") == "end":
            limit_files(self.job["limit"], self.job["fatal"])


def count_events(job: dict[str, Any]) -> None:
    """Kills before the given one of everything that touches the checkpoint's folder.

    Those are folders made, files opened for writing, renamed and deleted, and the beginning and end of `torch.save`,
    which opens its file where Python does not see it.
    """
    folder, count = os.path.join(job["out"], f"checkpoint-{job['save']}"), 0

    def event() -> None:
        nonlocal count
        if count == job["event"]:
            while "wait_for" in job and not whole_json(os.path.join(folder, job["wait_for"])):
                time.sleep(0.01)
            kill(job)
        count += 1

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        wanted = name in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")
        if name == "open":
            wanted = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if wanted and isinstance(arguments[0], (str, os.PathLike)) and os.fspath(arguments[0]).startswith(folder):
            event()

    def save(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        inside = str(path).startswith(folder)
        if inside:
            event()
        whole(content, path, *args, **kwargs)
        if inside:
            event()

    whole, torch.save = torch.save, save
    sys.addaudithook(hook)


def whole_json(path: str) -> bool:
    try:
        return bool(json.loads(Path(path).read_text()))
    except (OSError, ValueError):
        return False


def halve_state(job: dict[str, Any]) -> None:
    def save_to_json(state: TrainerState, path: str) -> None:
        whole(state, path)
        if f"checkpoint-{job['save']}{os.sep}" in path:
            os.truncate(path, os.path.getsize(path) // 2)
            kill(job)

    whole = TrainerState.save_to_json
    TrainerState.save_to_json = save_to_json


def train(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    if "event" in job and chosen(job):
        count_events(job)
    if job.get("half_state"):
        halve_state(job)
    if job.get("at") == 0:
        limit_files(job["limit"], job["fatal"])
    generator = torch.Generator().manual_seed(4)
    data = [
        {"input_ids": torch.randint(1, 100, (10,), generator=generator), "labels": torch.tensor(i % 3)}
        for i in range(16)
    ]
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(job["model"], num_labels=3)
    model.accepts_loss_kwargs = False
    if job.get("moved"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    settings = dict(
        output_dir=job["out"],
        per_device_train_batch_size=2 // job.get("processes", 1),
        max_steps=6,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        l2sp_lambda=0.3,
        l2sp_schedule="cosine",
    )
    args = L2SPTrainingArguments(**{**settings, **job.get("arguments", {})})
    trainer = L2SPTrainer(model=model, args=args, train_dataset=data, callbacks=[Killer(job)] if chosen(job) else None)
    outcome: dict[str, Any] = {}
    try:
        trainer.train(resume_from_checkpoint=job.get("resume"))
        try:
            trainer.save_model()
        except OSError as error:  # a full disk at the end: the model is still there
            outcome["save_error"] = str(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            trainer.save_model()
        trainer.save_state()
    except (OSError, ValueError) as error:
        outcome |= {"error": str(error), "kind": type(error).__name__, "step": trainer.state.global_step}
    outcome["resumed_from"] = trainer._l2sp_checkpoint
    if trainer.is_world_process_zero():
        Path(f"{job['out']}.outcome").write_text(json.dumps(outcome))


def launch(job: dict[str, Any]) -> None:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job["processes"],
        max_restarts=0,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        monitor_interval=0.1,
    )
    elastic_launch(config, train)(job)


def in_fork(job: dict[str, Any]) -> dict[str, Any]:
    log, told = Path(f"{job['out']}.log"), Path(f"{job['out']}.outcome")
    told.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = 1
        try:
            (launch if job.get("processes", 1) > 1 else train)(job)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    outcome = json.loads(told.read_text()) if told.exists() else {}
    return {"status": status, "survivors": survivors(child), "log": log.read_text(errors="replace"), **outcome}


def survivors(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    # What the first training would import; and the garbage collections of each need not walk through all modules.
    extract_model_from_parallel(torch.nn.Linear(1, 1))
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(in_fork(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
