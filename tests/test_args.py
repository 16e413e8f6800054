"""The argument fields: every way in, every refusal with its message, and documentation that agrees with the code."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_l2sp import L2SPArguments, L2SPSeq2SeqTrainingArguments, L2SPTrainingArguments

# Name → default, and the choices where the field has some: what users, scripts and saved runs rely on.
FIELDS = {
    "l2sp_lambda": (0.01, None),
    "l2sp_schedule": ("constant", {"constant", "linear", "cosine", "auto"}),
    "l2sp_mode": ("loss", {"loss", "decoupled"}),
    "l2sp_beta": (0.0, None),
    "l2sp_anchor": (None, None),
    "l2sp_anchor_revision": (None, None),
    "l2sp_anchor_dtype": ("auto", {"float32", "bfloat16", "auto"}),
    "l2sp_anchor_offload": ("none", {"none", "cpu", "disk"}),
    "l2sp_exclude": (None, None),
    "l2sp_weights": (None, None),
    "l2sp_fisher_samples": (0, None),
    "l2sp_log_layers": (False, None),
}

# Command line → field and value.
COMMAND_LINES = [
    ("--l2sp_lambda 0.5", "l2sp_lambda", 0.5),
    ("--l2sp_lambda 1e-3", "l2sp_lambda", 0.001),
    ("--l2sp_lambda 2", "l2sp_lambda", 2.0),
    ("--l2sp_lambda 0", "l2sp_lambda", 0.0),
    ("--l2sp_schedule linear", "l2sp_schedule", "linear"),
    ("--l2sp_schedule cosine", "l2sp_schedule", "cosine"),
    ("--l2sp_mode loss", "l2sp_mode", "loss"),
    ("--l2sp_mode decoupled", "l2sp_mode", "decoupled"),
    ("--l2sp_beta 0.25", "l2sp_beta", 0.25),
    ("--l2sp_anchor bert-base-uncased", "l2sp_anchor", "bert-base-uncased"),
    ("--l2sp_anchor a/b --l2sp_anchor_revision main", "l2sp_anchor_revision", "main"),
    ("--l2sp_anchor_dtype bfloat16", "l2sp_anchor_dtype", "bfloat16"),
    ("--l2sp_anchor_dtype float32", "l2sp_anchor_dtype", "float32"),
    ("--l2sp_anchor_offload cpu", "l2sp_anchor_offload", "cpu"),
    ("--l2sp_exclude LayerNorm bias$", "l2sp_exclude", ["LayerNorm", "bias$"]),
    ("--l2sp_exclude pooler", "l2sp_exclude", ["pooler"]),
    ('--l2sp_weights {"layer\\\\.0":0.5,"layer":2}', "l2sp_weights", {r"layer\.0": 0.5, "layer": 2.0}),
    ("--l2sp_weights fisher.safetensors", "l2sp_weights", "fisher.safetensors"),
    ("--l2sp_fisher_samples 0", "l2sp_fisher_samples", 0),
    ("--l2sp_fisher_samples 64", "l2sp_fisher_samples", 64),
    ("--l2sp_log_layers", "l2sp_log_layers", True),
    ("--l2sp_log_layers True", "l2sp_log_layers", True),
    ("--l2sp_log_layers False", "l2sp_log_layers", False),
]

REFUSALS = [
    ({"l2sp_lambda": -0.1}, r"l2sp_lambda=-0\.1 must be a finite number >= 0; use 0 to switch it off"),
    ({"l2sp_lambda": math.nan}, "l2sp_lambda=nan must be a finite number"),
    ({"l2sp_lambda": math.inf}, "l2sp_lambda=inf must be a finite number"),
    ({"l2sp_lambda": "much"}, "l2sp_lambda='much' is not a number; give a float >= 0"),
    ({"l2sp_lambda": None}, "l2sp_lambda=None is not a number"),
    ({"l2sp_beta": -1}, r"l2sp_beta=-1\.0 must be a finite number"),
    ({"l2sp_beta": math.nan}, "l2sp_beta=nan must be a finite number"),
    ({"l2sp_beta": math.inf}, "l2sp_beta=inf must be a finite number"),
    ({"l2sp_lambda": 0, "l2sp_beta": 0.5}, r"l2sp_beta=0\.5 has no effect with l2sp_lambda=0"),
    ({"l2sp_schedule": "auto", "l2sp_lambda": 0}, "l2sp_schedule='auto' has no effect with l2sp_lambda=0"),
    ({"l2sp_schedule": "step"}, "l2sp_schedule='step' is unknown; choose one of 'constant', 'linear', 'cosine'"),
    ({"l2sp_mode": "decoupled", "l2sp_schedule": "auto"}, "l2sp_schedule='auto' finds λ in units of the loss"),
    ({"l2sp_mode": "both"}, "l2sp_mode='both' is unknown; choose one of 'loss', 'decoupled'"),
    ({"l2sp_fisher_samples": 8, "l2sp_weights": {"a": 1}}, "l2sp_fisher_samples=8 and l2sp_weights both say what w"),
    ({"l2sp_fisher_samples": 8, "l2sp_lambda": 0}, "l2sp_fisher_samples=8 has no effect with l2sp_lambda=0"),
    ({"l2sp_fisher_samples": -1}, "l2sp_fisher_samples=-1 is not a whole number >= 0; use 0"),
    ({"l2sp_fisher_samples": True}, "l2sp_fisher_samples=True is not a whole number"),
    ({"l2sp_anchor": ""}, "l2sp_anchor='' is empty; give a Hub id or a local path"),
    ({"l2sp_anchor": "  "}, "l2sp_anchor=.*is empty"),
    ({"l2sp_anchor_revision": "v2"}, "l2sp_anchor_revision='v2' needs l2sp_anchor"),
    ({"l2sp_anchor_dtype": "float16"}, "l2sp_anchor_dtype='float16' is unknown; choose one of 'float32', 'bfloat16'"),
    ({"l2sp_anchor_offload": "nvme"}, "l2sp_anchor_offload='nvme' is unknown; choose one of 'none', 'cpu', 'disk'"),
    ({"l2sp_exclude": ["(broken"]}, r"l2sp_exclude contains '\(broken', which is not a regular expression"),
    ({"l2sp_exclude": [3]}, "l2sp_exclude contains 3, which is not a string"),
    ({"l2sp_weights": {"*": 1.0}}, r"l2sp_weights contains '\*', which is not a regular expression .*backslash"),
    ({"l2sp_weights": {1: 1.0}}, "l2sp_weights contains 1, which is not a string"),
    ({"l2sp_weights": {"a": -1}}, r"l2sp_weights\['a'\]=-1.0 must be a finite number >= 0"),
    ({"l2sp_weights": {"a": math.nan}}, r"l2sp_weights\['a'\]=nan must be a finite number"),
    ({"l2sp_weights": {"a": math.inf}}, r"l2sp_weights\['a'\]=inf must be a finite number"),
    ({"l2sp_weights": {"a": True}}, r"l2sp_weights\['a'\]=True is not a number"),
    ({"l2sp_weights": '{"a": 1'}, "l2sp_weights=.* is not valid JSON .*write it as"),
    ({"l2sp_weights": ' {"a": NaN}'}, r"l2sp_weights\['a'\]=nan must be a finite number"),
    ({"l2sp_weights": ["a"]}, "l2sp_weights is a list; give a dict of regular expression to weight"),
]


def parse(line: str, output_dir: str, kind: type = L2SPTrainingArguments):
    (args,) = HfArgumentParser(kind).parse_args_into_dataclasses(["--output_dir", output_dir, *line.split()])
    return args


@pytest.mark.parametrize(("line", "name", "value"), COMMAND_LINES)
def test_command_line(line, name, value, output_dir):
    parsed = getattr(parse(line, output_dir), name)
    assert parsed == value
    assert type(parsed) is type(value)


def test_every_field_is_tried_on_the_command_line():
    assert {name for _, name, _ in COMMAND_LINES} == set(FIELDS)


def test_defaults_and_choices_are_the_agreed_ones(output_dir):
    fields = {field.name: field for field in dataclasses.fields(L2SPArguments)}
    assert set(fields) == set(FIELDS)
    parsed = parse("", output_dir)
    for name, (default, choices) in FIELDS.items():
        assert fields[name].default == default
        assert getattr(parsed, name) == default and type(getattr(parsed, name)) is type(default)
        assert set(getattr(fields[name].type, "__args__", ())) == choices or choices is None


@pytest.mark.parametrize("kind", [L2SPArguments, L2SPTrainingArguments, L2SPSeq2SeqTrainingArguments])
def test_every_field_is_documented_with_its_default(kind):
    documented = {}
    for name, default in re.findall(
        r"^ {8}(l2sp_\w+) \(`.+`, (?:\*optional\*|defaults to `(.+?)`)\):$", kind.__doc__, flags=re.MULTILINE
    ):
        documented[name] = json.loads({"False": "false"}.get(default, default)) if default else None
    assert documented == {name: default for name, (default, _) in FIELDS.items()}


def test_every_field_has_help_and_the_help_can_be_printed():
    for field in dataclasses.fields(L2SPArguments):
        assert len(field.metadata["help"]) > 20, field.name
    page = HfArgumentParser(L2SPTrainingArguments).format_help()
    assert all(f"--{name}" in page for name in FIELDS)


def test_what_becomes_of_weight_decay_is_said_in_docstring_and_help():
    help_text = {f.name: f.metadata["help"] for f in dataclasses.fields(L2SPArguments)}["l2sp_lambda"]
    for text in (L2SPTrainingArguments.__doc__, help_text):
        assert re.search(r"weight_decay`? acts only on parameters (that have no|without an) anchor", text)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(L2SPTrainingArguments, TrainingArguments), (L2SPSeq2SeqTrainingArguments, Seq2SeqTrainingArguments)],
)
def test_no_inherited_default_differs(ours, theirs):
    mine = {f.name: (f.default, f.default_factory) for f in dataclasses.fields(ours)}
    inherited = {f.name: (f.default, f.default_factory) for f in dataclasses.fields(theirs)}
    assert set(mine) - set(inherited) == set(FIELDS)
    assert {name: mine[name] for name in inherited} == inherited


@pytest.mark.parametrize(("values", "message"), REFUSALS, ids=[str(values) for values, _ in REFUSALS])
def test_refusal(values, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        L2SPArguments(**values)


def test_refusal_reaches_the_command_line(output_dir):
    with pytest.raises(ValueError, match=r"l2sp_lambda=-1\.0 must be a finite number"):
        parse("--l2sp_lambda -1", output_dir)


def test_unknown_choice_is_refused_by_the_command_line(output_dir, capsys):
    with pytest.raises(SystemExit):
        parse("--l2sp_schedule step", output_dir)
    assert "--l2sp_schedule" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizer_inside_backward_is_refused_unless_switched_off(optimizer, output_dir):
    with pytest.raises(ValueError, match=f"optim='{optimizer}' updates the weights inside the backward pass"):
        L2SPTrainingArguments(output_dir=output_dir, optim=optimizer)
    assert L2SPTrainingArguments(output_dir=output_dir, optim=optimizer, l2sp_lambda=0).optim == optimizer


def test_schedule_free_optimizer_is_refused_where_it_pulls(output_dir):
    options = {"output_dir": output_dir, "optim": "schedule_free_adamw"}
    with pytest.raises(ValueError, match="optim='schedule_free_adamw' computes each step from averages of its own"):
        L2SPTrainingArguments(l2sp_mode="decoupled", **options)
    assert L2SPTrainingArguments(**options).l2sp_mode == "loss"
    assert L2SPTrainingArguments(l2sp_mode="decoupled", l2sp_lambda=0, **options).l2sp_lambda == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"l2sp_lambda": 10**400}, "l2sp_lambda"),
        ({"l2sp_weights": {"a": 10**400}}, "l2sp_weights"),
        ({"l2sp_fisher_samples": None}, "l2sp_fisher_samples"),
        ({"l2sp_fisher_samples": "some"}, "l2sp_fisher_samples='some'"),
        ({"l2sp_fisher_samples": 0.5}, "l2sp_fisher_samples"),
        ({"l2sp_exclude": 5}, "l2sp_exclude"),
    ],
    ids=["huge λ", "huge weight", "no samples", "word", "half a sample", "number"],
)
def test_value_of_a_wrong_kind_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        L2SPArguments(**values)


def test_int_becomes_float_so_that_a_search_can_cast_by_type():
    args = L2SPArguments(l2sp_lambda=1, l2sp_beta=2, l2sp_weights={"a": 3})
    assert type(args.l2sp_lambda)(0.003) == 0.003
    assert type(args.l2sp_beta) is float
    assert type(args.l2sp_weights["a"]) is float


def test_string_numbers_as_yaml_gives_them(tmp_path, output_dir):
    file = tmp_path / "config.yaml"
    file.write_text(f"output_dir: {output_dir}\nl2sp_lambda: 1e-2\nl2sp_exclude: [bias]\nl2sp_weights:\n  a: 2\n")
    (args,) = HfArgumentParser(L2SPTrainingArguments).parse_yaml_file(str(file))
    assert (args.l2sp_lambda, args.l2sp_exclude, args.l2sp_weights) == (0.01, ["bias"], {"a": 2.0})


def test_one_pattern_may_be_a_bare_string_and_is_not_taken_apart():
    assert L2SPArguments(l2sp_exclude="bias").l2sp_exclude == ["bias"]


def test_json_file_round_trip(tmp_path, output_dir):
    args = L2SPTrainingArguments(
        output_dir=output_dir, l2sp_lambda=3, l2sp_exclude=["a"], l2sp_weights={"b": 1}, l2sp_log_layers=True
    )
    content = json.loads(args.to_json_string())
    assert {name: content[name] for name in FIELDS} == {name: getattr(args, name) for name in FIELDS}
    assert {name: args.to_dict()[name] for name in FIELDS} == {name: getattr(args, name) for name in FIELDS}
    file = tmp_path / "args.json"
    file.write_text(json.dumps({name: content[name] for name in ("output_dir", *FIELDS)}))
    (again,) = HfArgumentParser(L2SPTrainingArguments).parse_json_file(str(file))
    assert all(getattr(again, name) == getattr(args, name) for name in FIELDS)


@pytest.mark.parametrize("kind", [L2SPTrainingArguments, L2SPSeq2SeqTrainingArguments])
def test_saved_like_training_args_bin(kind, tmp_path, output_dir):
    args = kind(output_dir=output_dir, l2sp_lambda=0.2, l2sp_weights={"a": 2.0})
    torch.save(args, tmp_path / "training_args.bin")
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert type(loaded) is kind
    assert loaded.to_dict() == args.to_dict()
    assert pickle.loads(pickle.dumps(args)).l2sp_weights == {"a": 2.0}


def test_mixin_in_a_dataclass_of_ones_own(output_dir):
    @dataclasses.dataclass
    class MyConfig(L2SPArguments, TrainingArguments):
        mine: int = dataclasses.field(default=3, metadata={"help": "mine"})

    args = MyConfig(output_dir=output_dir, l2sp_lambda=1, learning_rate=0.5)
    assert (args.l2sp_lambda, args.mine, args.learning_rate) == (1.0, 3, 0.5)
    with pytest.raises(ValueError, match="l2sp_lambda=-1.0"):
        MyConfig(output_dir=output_dir, l2sp_lambda=-1)
    # The inherited checks run, too.
    with pytest.raises(ValueError):
        MyConfig(output_dir=output_dir, eval_strategy="never")
    assert parse("--mine 4 --l2sp_beta 0.5", output_dir, MyConfig).mine == 4


def test_mixin_without_decorator_as_the_docstring_writes_it(output_dir):
    class MyConfig(L2SPArguments, TrainingArguments):
        pass

    args = MyConfig(output_dir=output_dir, l2sp_lambda=1)
    assert args.l2sp_lambda == 1.0
    assert args.output_dir == output_dir


@pytest.mark.parametrize("kind", [L2SPTrainingArguments, L2SPSeq2SeqTrainingArguments])
def test_text_of_the_arguments_hides_tokens(kind, output_dir):
    args = kind(output_dir=output_dir, hub_token="hf_secret")
    assert "hf_secret" not in str(args)
    assert "hf_secret" not in args.to_json_string()


def test_repr_hides_tokens_as_that_of_training_arguments_does(output_dir):
    assert "hf_secret" not in repr(TrainingArguments(output_dir=output_dir, hub_token="hf_secret"))
    assert "hf_secret" not in repr(L2SPTrainingArguments(output_dir=output_dir, hub_token="hf_secret"))
