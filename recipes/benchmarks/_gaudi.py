"""Names of optimum-habana that stand for those of transformers, so that its copy of the Trainer tests judges Trainer.

Its tests are Hugging Face's, with `GaudiTrainer` for `Trainer` and a `GaudiConfig` more; here the names are led back.
Tests of what only that hardware has fail, with Trainer as with L2SPTrainer.
"""

import json
import types
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import huggingface_hub
import transformers
import transformers.testing_utils
import transformers.utils


class GaudiConfig:
    @classmethod
    def from_pretrained(cls, *_: Any) -> "GaudiConfig":
        return cls()

    def save_pretrained(self, folder: str) -> None:
        Path(folder, "gaudi_config.json").write_text(json.dumps(vars(self)), encoding="utf-8")


@dataclass(repr=False)
class GaudiTrainingArguments(transformers.TrainingArguments):
    use_habana: bool = False
    use_lazy_mode: bool = False


class GaudiTrainer(transformers.Trainer):
    def __init__(
        self, model: Any = None, gaudi_config: Any = None, args: Any = None, *rest: Any, **kwargs: Any
    ) -> None:
        super().__init__(model, args, *rest, **kwargs)
        self.gaudi_config = gaudi_config

    def _save(self, output_dir: str | None = None, *rest: Any, **kwargs: Any) -> None:
        super()._save(output_dir, *rest, **kwargs)
        if self.gaudi_config is not None:
            self.gaudi_config.save_pretrained(output_dir if output_dir is not None else self.args.output_dir)


def _module(name: str, **names: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(names)
    return module


# What transformers 5 dropped, and stand-ins without which the file could not be imported.
DROPPED = {
    huggingface_hub: {"HfFolder": None},
    transformers: {"LineByLineTextDataset": None},
    transformers.utils: {"is_safetensors_available": lambda: True},
    transformers.testing_utils: {"require_safetensors": lambda test: test},
}


def install(modules: MutableMapping[str, types.ModuleType]) -> None:
    for module, names in DROPPED.items():
        for name, instead in names.items():
            if not hasattr(module, name):
                setattr(module, name, instead)
    for module in (
        _module("optimum"),
        _module("optimum.utils", logging=transformers.utils.logging),
        _module(
            "optimum.habana",
            GaudiConfig=GaudiConfig,
            GaudiTrainer=GaudiTrainer,
            GaudiTrainingArguments=GaudiTrainingArguments,
        ),
        _module("optimum.habana.accelerate", GaudiAccelerator=accelerate.Accelerator),
        _module("optimum.habana.utils", set_seed=transformers.set_seed),
        _module("optimum.habana.transformers"),
        _module("optimum.habana.transformers.modeling_utils", adapt_transformers_to_gaudi=lambda: None),
        _module("optimum.habana.transformers.models"),
        _module("optimum.habana.transformers.models.gpt2", GaudiGPT2LMHeadModel=transformers.GPT2LMHeadModel),
    ):
        modules[module.__name__] = module
