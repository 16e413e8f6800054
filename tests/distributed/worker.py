"""Trains a tiny classifier under one launch and writes down what happened: worker.py BACKEND FOLDER, under torchrun.

FSDP by accelerate and DeepSpeed refuse a CPU; they are told that it is a GPU. Everything else is as in a real launch.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

BACKEND, FOLDER = sys.argv[1], Path(sys.argv[2])
LAM = 0.3


def as_if_on_gpu() -> None:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def zero(stage: int, **options: Any) -> dict[str, Any]:
    config = {
        "zero_optimization": {"stage": stage, **options.pop("zero", {})},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if stage == 3:
        config["zero_optimization"] |= {
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,
        }
    return {"deepspeed": config | options}


WRAP = {"transformer_layer_cls_to_wrap": ["BertLayer"]}
# Whole state dicts of FSDP1 crash in PyTorch on a CPU, with plain Trainer as well.
FSDP1 = {"version": 1, "sync_module_states": False, "state_dict_type": "SHARDED_STATE_DICT", **WRAP}
CPU_OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
LAUNCHES: dict[str, dict[str, Any]] = {
    "single": {"use_cpu": True},
    "ddp": {"use_cpu": True},
    "sharded-load": {"use_cpu": True},
    "tp": {},
    "fsdp1": {"fsdp": "full_shard auto_wrap", "fsdp_config": FSDP1},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, **WRAP}},
    "fsdp2-ram": {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True, **WRAP}},
    "zero0": zero(0),
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
    "zero2-offload": zero(2, **CPU_OFFLOAD),
    "zero3-offload": zero(3, **CPU_OFFLOAD),
    "zero2-fp16": zero(2, fp16={"enabled": True, "initial_scale_power": 10}) | {"fp16": True},
    "zero2-bf16": zero(2, bf16={"enabled": True}) | {"bf16": True},
    "zero3-bf16": zero(3, bf16={"enabled": True}) | {"bf16": True},
    # The only way to DeepSpeed's bf16 optimizer.
    "zero1-bf16": zero(1, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}) | {"bf16": True},
}

# Models that are cut up while they are loaded.
FEED_FORWARD = {"intermediate.dense": "colwise", "output.dense": "rowwise"}
LOADED_IN_PARTS: dict[str, dict[str, Any]] = {
    "sharded-load": {"fsdp_size": 2},
    "tp": {"tp_size": 2, "tp_plan": {f"bert.encoder.layer.*.{name}": way for name, way in FEED_FORWARD.items()}},
}

if BACKEND.startswith(("fsdp", "zero", "tp")):
    as_if_on_gpu()
if BACKEND.startswith("zero"):
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True

import torch.distributed as dist  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.distributed.fsdp import FullyShardedDataParallel  # noqa: E402
from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments  # noqa: E402
from hf_l2sp.naming import canonical_name  # noqa: E402
from hf_l2sp.press import told  # noqa: E402


def told_much(*seen: Any) -> Any:
    """The last layer adds something, and nothing is learned by heart."""
    found = told(*seen)
    return found and found._replace(added=abs(found.added), significance=100.0)


def arguments(cls: type[TrainingArguments], name: str, **changes: Any) -> TrainingArguments:
    # With tensor parallelism both processes take the same rows.
    world = 1 if BACKEND == "tp" else int(os.environ.get("WORLD_SIZE", "1"))
    AcceleratorState._reset_state()  # each trainer is launched anew
    settings: dict[str, Any] = {
        "output_dir": str(FOLDER / name),
        "per_device_train_batch_size": 4 // world,
        "learning_rate": 1e-3,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 7,
        "optim": "adamw_torch",
        **json.loads(json.dumps(LAUNCHES[BACKEND])),
        **changes,
    }
    return cls(**settings)


def load(folder: Path = FOLDER / "pretrained") -> PreTrainedModel:
    options: dict[str, Any] = {}
    if BACKEND in LOADED_IN_PARTS:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(**LOADED_IN_PARTS[BACKEND])
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **options)
    model.accepts_loss_kwargs = False  # its head ignores the number of items
    for name, parameter in model.named_parameters():
        # Their true gradient is 0; Adam would blow its rounding up to steps.
        parameter.requires_grad_(not name.endswith("key.bias"))
    same_head(model)  # shards, and weights that one rank loads, draw other random numbers
    return model


def same_head(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.classifier.parameters():
        values = 0.02 * torch.randn(getattr(parameter, "ds_shape", parameter.shape), generator=generator)
        data = parameter.detach()
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(values)
            continue
        if isinstance(data, DTensor):
            values = distribute_tensor(values, data.device_mesh, data.placements)._local_tensor
            data = data._local_tensor
        if not data.is_meta:
            data.copy_(values)


def with_lora(model: PreTrainedModel, start: bool | str) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["pooler"], init_lora_weights=start)
    torch.manual_seed(5)
    # ZeRO-3 wants all trained weights in one dtype; PEFT would keep adapters of a bf16 model in float32.
    return get_peft_model(model, config, autocast_adapter_dtype=BACKEND != "zero3-bf16")


def data(rows: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        {
            "input_ids": torch.randint(1, 100, (10,), generator=generator),
            "attention_mask": torch.ones(10, dtype=torch.long),
            "labels": torch.tensor(index % 3),
        }
        for index in range(rows)
    ]


def run(
    name: str,
    cls: type[Trainer] = L2SPTrainer,
    rows: int = 24,
    resume: str | None = None,
    lora: bool | str = False,
    **changes: Any,
) -> Trainer:
    l2sp = issubclass(cls, L2SPTrainer)
    args = arguments(
        L2SPTrainingArguments if l2sp else TrainingArguments,
        name,
        **{k: v for k, v in changes.items() if l2sp or not k.startswith("l2sp_")},
    )
    model = with_lora(load(), lora) if lora else load()
    trainer = cls(model=model, args=args, train_dataset=data(rows))
    trainer.train(resume_from_checkpoint=resume)
    if lora:
        return trainer
    trainer.save_model()
    if BACKEND == "fsdp1":
        save_whole(trainer)
    return trainer


def save_whole(trainer: Trainer) -> None:
    with FullyShardedDataParallel.summon_full_params(trainer.model, writeback=False):
        weights = {canonical_name(n): p.detach().clone() for n, p in trainer.model.named_parameters()}
    if trainer.is_world_process_zero():
        save_file(weights, Path(trainer.args.output_dir) / "model.safetensors")


def logs(trainer: Trainer) -> list[dict[str, float]]:
    keys = ("loss", "task_loss", "l2sp_penalty", "l2sp_distance", "l2sp_drift", "grad_norm")
    return [{k: log[k] for k in keys if k in log} for log in trainer.state.log_history if "loss" in log]


def choose(trainer: Trainer) -> dict[str, Any]:
    """Goes back towards θ0 as far as the evaluation set says, and saves that."""
    trainer.eval_dataset = data(10)
    found = trainer.select_interpolation((0.0, 0.25, 0.5, 0.75, 1.0))
    trainer.save_model()
    return {"alpha": found.alpha, "scores": list(found.scores.values())}


def found_strengths(trainer: Trainer) -> list[float]:
    return [log["l2sp_lambda"] for log in trainer.state.log_history if "l2sp_lambda" in log]


def evaluated(cls: type[Trainer]) -> float | str:
    """Before any training, when DeepSpeed's engine is made for the evaluation."""
    args = arguments(L2SPTrainingArguments if cls is L2SPTrainer else TrainingArguments, "evaluated")
    trainer = cls(model=load(), args=args, eval_dataset=data(9))
    try:
        return trainer.evaluate()["eval_loss"]
    except ValueError as error:
        return str(error)


def error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    torch.set_num_threads(1)
    outcome: dict[str, Any] = {}
    # One step of plain gradient descent from weights that are not θ0, so large that weights tell the gradient.
    step = {
        "optim": "sgd",
        "learning_rate": 1e3,
        "max_grad_norm": 0.0,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "constant",
        "l2sp_lambda": LAM,
        "l2sp_beta": 0.7,
        "l2sp_anchor": str(FOLDER / "origin"),
    }
    run("gradient", rows=8, **step)
    run("fisher", rows=8, l2sp_weights=str(FOLDER / "fisher.safetensors"), **step)

    train = {"l2sp_lambda": LAM, "max_grad_norm": 0.5, "l2sp_beta": 0.1, "l2sp_exclude": ["LayerNorm"]}
    # transformers cannot resume a model that was sharded while it was loaded, and refuses to write checkpoints.
    # With efficient loading PyTorch misses frozen parameters when it saves the optimizer, whatever the trainer.
    resumes = BACKEND not in (*LOADED_IN_PARTS, "fsdp2-ram")
    saving = {"save_strategy": "steps", "save_steps": 3} if resumes else {}
    whole = run("whole", **saving, **train)
    report = whole.l2sp_drift_report()
    outcome |= {
        "world": dist.get_world_size() if dist.is_initialized() else 1,
        "logs": logs(whole),
        "fingerprint": whole.l2sp_anchor.fingerprint,
        "nbytes": whole.l2sp_anchor.nbytes,
        "backend": type(whole.l2sp_anchor.backend).__name__,
        "drift": report.total.distance,
        "roles": report.counts,
    }
    if resumes:
        checkpoint = str(FOLDER / "whole" / "checkpoint-3")
        resumed = run("resumed", resume=checkpoint, **train)
        outcome["resumed_logs"] = logs(resumed)[-3:]
        outcome["resumed_fingerprint"] = resumed.l2sp_anchor.fingerprint
        other = train | {"l2sp_anchor": str(FOLDER / "origin")}
        outcome["other_anchor"] = error_of(lambda: run("refused", resume=checkpoint, **other))
    run("disk", l2sp_anchor_offload="disk", **train)
    decoupled = {"l2sp_mode": "decoupled", "l2sp_lambda": 100.0, "l2sp_beta": 50.0, "max_grad_norm": 0.5}
    decoupled |= {"l2sp_weights": str(FOLDER / "fisher.safetensors")}
    if BACKEND.startswith("zero"):
        outcome["decoupled"] = error_of(lambda: run("refused", **decoupled))
    else:
        outcome["decoupled"] = logs(run("decoupled", **saving, **decoupled))
    if resumes and not BACKEND.startswith("zero"):
        run("decoupled_resumed", resume=str(FOLDER / "decoupled" / "checkpoint-3"), **decoupled)
    auto = {"l2sp_schedule": "auto", "max_grad_norm": 0.5, "learning_rate": 1e-2, "num_train_epochs": 3}
    # So that these few steps reach it, look at enough examples, and tell something in between of what is by heart.
    with (
        mock.patch("hf_l2sp.auto.FITTED", 0.95),
        mock.patch("hf_l2sp.auto.CHANCE", -10.0),
        mock.patch("hf_l2sp.auto.CERTAIN", 10.0),
        mock.patch("hf_l2sp.auto_mixin.LOOKED_AT", 1.0),
    ):
        found = run("auto", **auto)
    outcome["auto"] = found_strengths(found)
    outcome["told"] = [found._l2sp_auto.unexplained, found._l2sp_auto.by_heart]
    # And that there is something to let go of: these layers know nothing, and there are few passes.
    with (
        mock.patch("hf_l2sp.auto.FEW_PASSES", 0.0),
        mock.patch("hf_l2sp.auto.MANY_PASSES", 1.0),
        mock.patch("hf_l2sp.auto_mixin.LOOKED_AT", 1.0),
        mock.patch("hf_l2sp.auto_mixin.told", told_much),
    ):
        found = run("early", **{**auto, "num_train_epochs": 1})
    outcome["early"] = found_strengths(found)
    outcome["evaluated"] = [evaluated(cls) for cls in (Trainer, L2SPTrainer)]
    whole_on_each = BACKEND in ("single", "ddp")
    if whole_on_each:
        outcome["weighed"] = logs(run("weighed", l2sp_fisher_samples=9, **train))
        outcome["chosen"] = choose(run("chosen", **train))
    else:
        outcome["weighed"] = error_of(lambda: run("refused", l2sp_fisher_samples=9, **train))
        outcome["chosen"] = error_of(lambda: choose(whole))
    settings = {"l2sp_lambda": LAM, "learning_rate": 1e-2, "max_grad_norm": 0.5}
    # PEFT neither copies nor decomposes a weight that is sharded already.
    starts = () if BACKEND in LOADED_IN_PARTS else (True, "pissa")
    outcome["lora"] = {str(start): logs(run("lora", lora=start, **settings)) for start in starts}
    run("zero", l2sp_lambda=0.0)
    run("plain", Trainer, **saving)
    if resumes:
        run("plain_resumed", Trainer, resume=str(FOLDER / "plain" / "checkpoint-3"))
    rank = dist.get_rank() if dist.is_initialized() else 0
    (FOLDER / f"outcome-{rank}.json").write_text(json.dumps(outcome))
    if dist.is_initialized():
        dist.barrier()
        # All there is to look at is written. What the libraries do while they end ("terminate called without an active
        # exception", once in many launches with ZeRO-3 on a CPU) is nothing that a training depends on.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    faulthandler.enable()
    main()
