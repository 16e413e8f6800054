"""What a recipe must see to when it is started in one process or in several: who speaks, who decides, who waits."""

from __future__ import annotations

import functools
import gc
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import datasets
import torch
from _recipe_args import RecipeError, Settings
from _recipe_files import listed
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging

Result = TypeVar("Result")

# How long a refused process leaves it to the main process to say so.
PATIENCE = 10.0


def started_processes() -> int:
    """How many processes the launcher started, whatever became of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str = "") -> None:
    """Prints, in the main process alone."""
    if is_main_process():
        print(text, flush=True)


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Turns a `RecipeError` into its message and exit code 1; any other exception is a bug and keeps its traceback."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> None:
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # those of loading and saving; that of training is another one
        if not is_main_process():
            datasets.disable_progress_bars()
        try:
            main(argv)
            if started_processes() > 1:
                # At the interpreter's exit NCCL would warn of the group, and ZeRO-3 over gloo abort now and then.
                gc.collect()
                PartialState().destroy_process_group()
        except RecipeError as error:
            if not is_main_process():
                # Nearly always the main process refuses the same and the launcher then ends this one. To leave
                # earlier would end the main process before its message; a refusal of this process alone is said late.
                time.sleep(PATIENCE)
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        finally:
            if bars:
                logging.enable_progress_bar()

    return wrapped


def use_all_cores(device: torch.device) -> None:
    """Takes back the single thread that `accelerate launch` allows a run on the CPU when nothing is configured.

    It sets OMP_NUM_THREADS to 1 unless that is set already (accelerate 1.x), which doubles the time on two cores.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if device.type == "cpu" and by_accelerate and started_processes() == 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(cores or 1)


# --------------------------------------------------------------------------- several processes


def sharding() -> str | None:
    """The sharding that the launcher asks for."""
    for name in ("FSDP", "DeepSpeed"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true":
            return name
    return None


def choose_device(settings: Settings) -> None:
    """Sets `use_cpu` where several processes were started on a machine without an accelerator.

    Without it transformers 5 does not connect them: each trains the whole data on its own, into the same folder.
    `accelerate launch` cannot tell it to (the `use_cpu` of its configuration stays with the launcher).
    """
    available = torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()
    if started_processes() > 1 and not available and sharding() is None:
        settings["use_cpu"] = True


def check_connected(args: TrainingArguments) -> None:
    """Raises `RecipeError` unless the processes that were started train one model together, as they were asked to."""
    started = started_processes()
    if started == 1:
        return
    kind, asked = args.distributed_state.distributed_type, sharding()
    apart = kind == DistributedType.NO or args.world_size != started
    if asked is not None and (apart or kind == DistributedType.MULTI_CPU):
        raise RecipeError(
            f"the launch asks for {asked}, but its {started} processes run on the CPU; it takes a GPU for each. "
            "For several processes on the CPU use recipes/configs/accelerate/cpu_ddp.yaml."
        )
    if apart:
        raise RecipeError(
            f"{started} processes were started, but they are not connected: each would train alone. Add --use_cpu to "
            "train on the CPU, or start one process with recipes/configs/accelerate/single.yaml."
        )


def launched_arguments(settings: Settings, arguments_class: type[TrainingArguments], **changes: Any) -> Any:
    """The training arguments of a run, made ready for the device and the processes that it was started on.

    Raises:
        RecipeError: a value is wrong, or the processes are not connected as the launch asks for.
    """
    choose_device(settings)
    args = settings.build(arguments_class, **changes)
    check_connected(args)
    use_all_cores(args.device)
    return args


def check_layers(model: nn.Module) -> None:
    """Raises `RecipeError` if the launch asks FSDP to wrap layers of a class that `model` lacks."""
    wanted = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "") if sharding() == "FSDP" else ""
    present = {type(module).__name__ for module in model.modules()}
    missing = [name.strip() for name in wanted.split(",") if name.strip() not in present | {""}]
    if missing:
        repeated = (module for module in model.modules() if isinstance(module, nn.ModuleList))
        layers = sorted({type(layer).__name__ for layers in repeated for layer in layers})
        raise RecipeError(
            f"the launch's fsdp_transformer_layer_cls_to_wrap names {listed(missing)}, which {type(model).__name__} "
            f"does not have; name the class of its layers: {listed(layers)}."
        )


def loss_note(args: TrainingArguments, rows: dict[str, int]) -> str | None:
    """A note about evaluation splits that do not come out even, if there are any.

    Trainer (transformers 5) fills their last batches up with texts from the beginning. It takes these out of the
    predictions again, but the loss of such a batch is the mean over all of it.
    """
    together = args.world_size * args.eval_batch_size
    uneven = [split for split in ("validation", "test") if rows.get(split, 0) % together]
    if args.world_size == 1 or args.eval_batch_size == 1 or not uneven:
        return None
    return (
        f"The {' and '.join(uneven)} loss counts some texts more than once, the scores do not: the rows are no "
        f"multiple of {args.world_size} processes x {args.eval_batch_size}. --per_device_eval_batch_size 1 makes it "
        "exact."
    )


def agreed(decide: Callable[[], Result]) -> Result:
    """What `decide` returns in the main process, in every process; its `RecipeError` is one of them all.

    For everything that depends on the output folder, which looks different to a process that comes later.
    """
    if PartialState().num_processes == 1:
        return decide()
    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = decide()
        except RecipeError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise RecipeError(outcome[1])
    return outcome[0]
