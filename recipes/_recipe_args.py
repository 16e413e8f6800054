"""Arguments of the recipes: the dataclasses, the command line, and YAML under the command line."""

import copy
import dataclasses
import difflib
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_l2sp import L2SPTrainingArguments


class RecipeError(ValueError):
    """Something the user can put right. A recipe prints it as one message, without a traceback, and exits with 1."""


@dataclass
class ModelArguments:
    """Which pretrained model is fine-tuned."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or local folder of the pretrained model. Default: the embedded model."},
    )


@dataclass
class DataArguments:
    """Which data it is fine-tuned on. Without any of them: the data that come with the recipe."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset id on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_file: str | None = field(
        default=None, metadata={"help": "Training data: csv, json, jsonl or parquet, one row per text."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Validation data. Default: 15%% of the training data, drawn by seed."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Test data. Default: no test results."})
    text_column: str = field(default="text", metadata={"help": "Name of the column that holds the text."})
    label_column: str = field(default="label", metadata={"help": "Name of the column that holds the label."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})
    shots: int | None = field(
        default=None,
        metadata={"help": "Train on this many rows per class, drawn by seed from the training data. Default: all."},
    )


@dataclass
class RecipeTrainingArguments(L2SPTrainingArguments):
    """`L2SPTrainingArguments` with what a recipe adds and the defaults it changes.

    A recipe's own class names the further defaults that it changes. The trainer itself is given a plain
    `L2SPTrainingArguments`, because `training_args.bin` pickles the class by the path of its module.

    Added:
        compare (`bool`, defaults to `False`):
            Train plain `Trainer` on the same data and seed first; both in the table and in `comparison.json`.
        overwrite_output_dir (`bool`, defaults to `False`):
            Replace the results that an earlier run left in the output folder (a field of `TrainingArguments` itself
            in transformers 4).

    Changed defaults:
        report_to (`str`, defaults to `"none"`): no integration is started that was not asked for.
        logging_steps (`float`, defaults to `5`): a training set of a few hundred texts has few steps.
        save_total_limit (`int`, defaults to `1`): one checkpoint beside the final model.
        per_device_eval_batch_size (`int`, defaults to `32`): evaluation keeps no gradients.
    """

    compare: bool = field(
        default=False, metadata={"help": "Train plain Trainer first, on the same data and seed, and compare."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the results of an earlier run in the output folder."}
    )
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Integrations to log to: none, tensorboard, wandb, ..."}
    )
    logging_steps: float = field(default=5, metadata={"help": "Log the training loss every so many steps."})
    save_total_limit: int | None = field(default=1, metadata={"help": "How many checkpoints are kept."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Batch size per device in evaluation."})


class Settings(dict):
    """The values of all training fields as the user gave them."""

    def build(self, arguments_class: type[TrainingArguments], **changes: Any) -> Any:
        """An `arguments_class` of these values: plain and L2-SP runs get the same ones.

        Raises:
            RecipeError: the class refuses a value.
        """
        names = {f.name for f in dataclasses.fields(arguments_class) if f.init}
        # Copied: TrainingArguments.__post_init__ edits dictionaries in place.
        values = {name: copy.deepcopy(value) for name, value in {**self, **changes}.items() if name in names}
        try:
            arguments = arguments_class(**values)
        except ValueError as error:
            raise RecipeError(str(error)) from error
        if arguments.device.type == "cpu":
            arguments.dataloader_pin_memory = False  # of no use there, and PyTorch warns about it
        return arguments


class RecipeParser(HfArgumentParser):
    """`HfArgumentParser` that names the mistake instead of printing 150 flags of usage."""

    def __init__(self, dataclass_types: Any, **kwargs: Any) -> None:
        # No abbreviations: `--l2sp_anchor_o disk` would be a typing error that passes.
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="FILE.yaml", help="YAML file of arguments; the command line wins.")

    def error(self, message: str) -> Any:
        raise RecipeError(f"{message} (--help lists all arguments)")

    def names(self) -> set[str]:
        """All argument names that a YAML file may use."""
        return {f.name for dtype in self.dataclass_types for f in dataclasses.fields(dtype) if f.init}

    def parse(self, argv: list[str] | None = None) -> tuple[Any, ...]:
        """The arguments of the command line (default: `sys.argv`), with the YAML of `--config` under them.

        Returns:
            An instance of each dataclass of the parser, in their order; of the last one, the training arguments, the
            values alone as `Settings`.

        Raises:
            RecipeError: an unknown argument or key, or a value that cannot be read.
        """
        config, rest = _split_config(list(sys.argv[1:] if argv is None else argv))
        if config is not None:
            rest = _yaml_to_argv(Path(config), self.names()) + rest
        namespace, unknown = self.parse_known_args(_complete_resume(rest))
        if unknown:
            raise RecipeError(_unknown_argument(unknown[0], self.names() | {"config", "help"}))
        values = vars(namespace)
        parts = [
            {f.name: values[f.name] for f in dataclasses.fields(dtype) if f.init} for dtype in self.dataclass_types
        ]
        others = zip(self.dataclass_types[:-1], parts[:-1], strict=True)
        return (*(dtype(**part) for dtype, part in others), Settings(parts[-1]))


def _split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    config, rest, words = None, [], iter(argv)
    for word in words:
        if word == "--config":
            config = next(words, None)
            if config is None or config.startswith("--"):
                raise RecipeError("--config needs the path of a YAML file.")
        elif word.startswith("--config="):
            config = word.removeprefix("--config=")
        else:
            rest.append(word)
    return config, rest


def _complete_resume(argv: list[str]) -> list[str]:
    """A bare `--resume_from_checkpoint` means the last checkpoint of the output folder."""
    words = []
    for index, word in enumerate(argv):
        words.append(word)
        bare = index + 1 == len(argv) or argv[index + 1].startswith("--")
        if bare and word in ("--resume_from_checkpoint", "--resume-from-checkpoint"):
            words.append("True")
    return words


def closest(name: str, known: Any) -> str | None:
    """The entry of `known` that `name` most likely meant, or `None`."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1)), None)


def _unknown_argument(word: str, known: set[str]) -> str:
    name = word.split("=")[0].lstrip("-").replace("-", "_")
    if not word.startswith("-"):
        return f"{word!r} on the command line belongs to no argument; an argument with spaces needs quotes."
    near = closest(name, known)
    hint = f"did you mean --{near}?" if near else "--help lists all arguments."
    return f"unknown argument {word.split('=')[0]!r}; {hint}"


# --------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-2 is a number, also inside a nested mapping."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _yaml_to_argv(path: Path, known: set[str]) -> list[str]:
    """The items of a YAML file as command-line words, so that they are read by the very same parser.

    Scalars pass as they are written, not as YAML understands them: `no` stays `no` (a valid `eval_strategy`), and
    `1e-2` is made a number by the field that it is meant for.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--config {str(path)!r} cannot be read: {error}.") from error
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(f"--config {str(path)!r} is not a mapping; write lines of the form 'argument: value'.")
        words: list[str] = []
        seen: set[str] = set()
        for key_node, node in root.value:
            key = str(key_node.value).replace("-", "_")
            where = f"--config {str(path)!r}, line {key_node.start_mark.line + 1}"
            if key not in known:
                near = closest(key, known)
                raise RecipeError(
                    f"{where}: unknown key {key_node.value!r}; "
                    + (f"did you mean {near!r}?" if near else "--help lists all arguments.")
                )
            if key in seen:
                raise RecipeError(f"{where}: key {key!r} is given twice; keep one.")
            seen.add(key)
            words += _node_to_words(loader, key, node, where)
    except RecipeError:
        raise
    except yaml.YAMLError as error:
        raise RecipeError(f"--config {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    except (RecursionError, TypeError, ValueError) as error:  # endless or deep nesting, dates, sets, 2001-99-99
        raise RecipeError(
            f"--config {str(path)!r} has a value that no argument takes ({error}); write numbers, strings, lists and "
            "mappings of them."
        ) from error
    finally:
        if loader is not None:
            loader.dispose()
    return words


def _node_to_words(loader: _Loader, key: str, node: yaml.Node, where: str) -> list[str]:
    if isinstance(node, yaml.MappingNode):
        return [f"--{key}={json.dumps(loader.construct_document(node))}"]
    if isinstance(node, yaml.SequenceNode):
        if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
            raise RecipeError(f"{where}: an item of {key!r} is a list or a mapping; write numbers or strings.")
        return [f"--{key}", *(str(item.value) for item in node.value)] if node.value else []
    if node.tag == "tag:yaml.org,2002:null":
        return []  # the field keeps its default
    return [f"--{key}={node.value}"]
