"""The argument fields with any value: taken, or refused by a ValueError that names the field; and there and back."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser

from hf_l2sp import L2SPArguments, L2SPTrainingArguments

steady = settings(deadline=None, derandomize=True, max_examples=400)
slower = settings(deadline=None, derandomize=True, max_examples=120)  # all of TrainingArguments is built each time
FIELDS = {field.name: field for field in dataclasses.fields(L2SPArguments)}
HINTS = typing.get_type_hints(L2SPArguments)
NUMERIC = [name for name, hint in HINTS.items() if hint in (int, float)]
CHOICES = {name: typing.get_args(hint) for name, hint in HINTS.items() if typing.get_origin(hint) is typing.Literal}
PARSER = HfArgumentParser(L2SPTrainingArguments)

ANYTHING = st.one_of(
    st.floats(),
    st.integers(),
    st.integers(min_value=10**400, max_value=10**401),
    st.text(max_size=8),
    st.sampled_from(("0.5", " 1e-3 ", "1e999", "-0", "nan", "inf", "1_0", "٣", "0x10", "1,5", "")),
    st.none(),
    st.booleans(),
    st.binary(max_size=3),
    st.complex_numbers(),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


def test_the_fields_are_seen():
    assert {"l2sp_lambda", "l2sp_beta", "l2sp_fisher_samples"} <= set(NUMERIC)
    assert {"l2sp_schedule", "l2sp_mode", "l2sp_anchor_dtype", "l2sp_anchor_offload"} == set(CHOICES)


@pytest.mark.parametrize("name", NUMERIC)
@steady
@given(ANYTHING)
def test_a_number_is_valid_or_refused_by_name(name, value):
    try:
        arguments = L2SPArguments(**{name: value})
    except ValueError as refusal:
        assert name in str(refusal)
        return
    found = getattr(arguments, name)
    assert type(found) is HINTS[name] and 0 <= found < math.inf
    assert type(value) in (int, float, str) and found == type(found)(value)
    others = {field for field in FIELDS if getattr(arguments, field) != FIELDS[field].default}
    assert others <= {name}


@pytest.mark.parametrize("name", CHOICES)
@steady
@given(ANYTHING)
def test_a_choice_is_one_of_those_offered_or_refused_by_name(name, value):
    assume(value not in CHOICES[name])
    with pytest.raises(ValueError, match=f"^{name}=") as refusal:
        L2SPArguments(**{name: value})
    assert all(repr(choice) in str(refusal.value) for choice in CHOICES[name])


@pytest.mark.parametrize("name", ["l2sp_exclude", "l2sp_weights"])
@steady
@given(st.one_of(ANYTHING, st.lists(st.text(max_size=5), max_size=3), st.dictionaries(st.text(max_size=5), ANYTHING)))
def test_what_selects_parameters_is_valid_or_refused_by_name(name, value):
    try:
        arguments = L2SPArguments(**{name: value})
    except ValueError as refusal:
        assert str(refusal).startswith(name)
        return
    found = getattr(arguments, name)
    if name == "l2sp_exclude":
        assert found is None or all(re.compile(pattern) for pattern in found)
    elif not isinstance(found, str) and found is not None:
        assert all(re.compile(pattern) for pattern in found)
        assert all(type(weight) is float and 0 <= weight < math.inf for weight in found.values())


PATTERN = st.from_regex(r"\A[a-z.^$|]{1,8}\Z").filter(lambda text: not text.startswith("-"))
NUMBER = st.floats(min_value=0, max_value=1e30, allow_nan=False)
GOOD = st.fixed_dictionaries(
    {},
    optional={
        "l2sp_lambda": st.one_of(NUMBER, st.integers(0, 10)),
        "l2sp_beta": NUMBER,
        "l2sp_anchor": st.from_regex(r"\A[a-z]{1,5}(/[a-z]{1,5})?\Z"),
        "l2sp_exclude": st.lists(PATTERN, min_size=1, max_size=3),
        "l2sp_weights": st.dictionaries(PATTERN, st.one_of(NUMBER, st.integers(0, 9)), max_size=3),
        "l2sp_fisher_samples": st.integers(0, 10**6),
        "l2sp_log_layers": st.booleans(),
        **{name: st.sampled_from(choices) for name, choices in CHOICES.items()},
    },
)


def valid(values):
    try:
        return L2SPArguments(**values)
    except ValueError as refusal:  # two that contradict each other; both are named
        assert sum(name in str(refusal) for name in FIELDS) >= 2, str(refusal)
        return assume(False)


def words(values):
    """The same on the command line."""
    line = []
    for name, value in values.items():
        if isinstance(value, list):
            line += [f"--{name}", *value]
        else:
            line += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return line


@slower
@given(GOOD)
def test_there_and_back_by_command_line_dictionary_and_json(tmp_path_factory, values):
    wanted = valid(values)
    folder = tmp_path_factory.getbasetemp() / "output"
    (parsed,) = PARSER.parse_args_into_dataclasses(["--output_dir", str(folder), *words(values)])
    as_dictionary = {name: parsed.to_dict()[name] for name in FIELDS}
    as_json = {name: value for name, value in json.loads(parsed.to_json_string()).items() if name in FIELDS}
    for again in (parsed, L2SPArguments(**as_dictionary), L2SPArguments(**as_json)):
        for name in FIELDS:
            assert getattr(again, name) == getattr(wanted, name), name
            assert type(getattr(again, name)) is type(getattr(wanted, name)), name
    # What was checked once passes as it is.
    assert dataclasses.replace(wanted) == wanted
