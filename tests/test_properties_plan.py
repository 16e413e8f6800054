"""The plan of random models: every parameter has exactly one role, and patterns decide as `re.search` does."""

from __future__ import annotations

import math
import re
from contextlib import contextmanager

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_l2sp.plan import ROLES, build_plan
from hf_l2sp.provenance import Provenance
from hf_l2sp.selection import checked_number, checked_patterns

from .module_trees import PATTERNS, Leaf, Tree, build, snapshot, trees

steady = settings(deadline=None, derandomize=True, max_examples=150)
SEEDS = st.integers(0, 2**16)
ONE = Tree([Leaf("weight", (2,), torch.float32, False, "contiguous")])
# Of many words, some of which are regular expressions and some are not.
FRAGMENTS = st.text(alphabet="ab.*+?()[]{}|^$\\\\0-,:<>=!Pnλ\n", max_size=9)


@steady
@given(trees(), SEEDS, st.lists(st.sampled_from(PATTERNS), max_size=3), st.data())
def test_every_parameter_has_exactly_one_role(tree, seed, exclude, data):
    model = build(tree, seed)
    before = snapshot(model)
    parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point()}  # tied ones once
    new = frozenset(data.draw(st.lists(st.sampled_from(sorted(parameters)), unique=True))) if parameters else set()
    plan = build_plan(model, Provenance(True, frozenset(new)), exclude)
    assert list(plan.entries) == list(parameters)
    by_role = {role: plan.having(role) for role in ROLES}
    assert sum(map(len, by_role.values())) == len(parameters)
    assert sum(plan.elements(role) for role in ROLES) == sum(p.numel() for p in parameters.values())
    for name, entry in plan.entries.items():
        parameter = parameters[name]
        assert entry.parameter is parameter and entry.shape == tuple(parameter.shape)
        if not parameter.requires_grad:
            expected = "frozen"
        elif name in new:
            expected = "new"
        else:
            expected = "excluded" if any(re.search(pattern, name) for pattern in exclude) else "anchored"
        assert entry.role == expected
        assert [role for role in ROLES if entry in by_role[role]] == [expected]
    # A frozen parameter gets the role that it would have had.
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    assert not plan.having("frozen")
    assert {e.name for e in plan.having("new")} == set(new)
    # To look is all that it does.
    assert all((value == before[name]).all() for name, value in snapshot(model).items())
    summary = plan.summary()
    assert all(f"{len(plan.having(role))} {role} [{plan.elements(role):,}]" in summary for role in ROLES)


@steady
@given(trees(), SEEDS, st.dictionaries(st.sampled_from(PATTERNS), st.sampled_from((0, 0.5, 1, 2.0)), max_size=4))
def test_the_first_pattern_that_matches_weighs_and_one_without_match_is_refused(tree, seed, weights):
    model = build(tree, seed)
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    idle = [pattern for pattern in weights if not any(re.search(pattern, name) for name in names)]
    if idle:
        with pytest.raises(ValueError, match=r"^l2sp_weights: ") as refusal:
            build_plan(model, Provenance(), weights=weights)
        assert all(repr(pattern) in str(refusal.value) for pattern in idle)
        return
    for name, entry in build_plan(model, Provenance(), weights=weights).entries.items():
        matching = [w for pattern, w in weights.items() if re.search(pattern, name)]
        assert entry.weight == (matching[0] if matching else 1.0)
        assert entry.excluded == (bool(matching) and matching[0] == 0)


@contextmanager
def refused(argument, pattern):
    """A ValueError that names the argument and the pattern."""
    with pytest.raises(ValueError) as refusal:
        yield
    assert str(refusal.value).startswith(f"{argument} contains {pattern!r}, which is not a regular expression")


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")  # of Python, about [[ and the like
@steady
@given(st.lists(FRAGMENTS, min_size=1, max_size=3))
def test_patterns_are_taken_as_they_are_or_refused_by_name(patterns):
    def valid(pattern):
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            return False
        return True

    wrong = [pattern for pattern in patterns if not valid(pattern)]
    model = build(ONE, 0)
    for argument, check in (
        ("l2sp_exclude", lambda: checked_patterns("l2sp_exclude", patterns)),
        ("l2sp_exclude", lambda: build_plan(model, Provenance(), patterns) and patterns),
    ):
        if wrong:
            with refused(argument, wrong[0]):
                check()
        else:
            assert check() == patterns
    if wrong:
        with refused("l2sp_weights", wrong[0]):
            build_plan(model, Provenance(), weights=dict.fromkeys(patterns, 1.0))


@pytest.mark.parametrize(
    "pattern", ["a{99999999999999999999}", "(" * 2000 + ")" * 2000, "(?P<a>", "[z-a]", "\\", "(?<=a*)b"]
)
def test_patterns_that_python_gives_up_on_are_refused_by_name(pattern):
    with refused("l2sp_exclude", pattern):
        checked_patterns("l2sp_exclude", [pattern])


NUMBERS = st.one_of(
    st.floats(),
    st.integers(),
    st.integers(min_value=10**400),
    st.text(max_size=6),
    st.from_regex(r"\A\s*[-+]?[0-9_]{0,3}(\.[0-9]{0,3})?(e[-+]?[0-9]{1,4})?\s*\Z"),
    st.none(),
    st.booleans(),
    st.binary(max_size=3),
    st.complex_numbers(),
    st.lists(st.integers(), max_size=2),
    st.just(10**5000),
)


@steady
@given(NUMBERS)
def test_a_number_is_finite_and_not_negative_or_refused_by_name(value):
    try:
        number = checked_number("l2sp_thing", value)
    except ValueError as refusal:
        assert str(refusal).startswith(("l2sp_thing=", "l2sp_thing is too large"))
        return
    assert type(number) is float and math.isfinite(number) and number >= 0
    assert not isinstance(value, (bool, bytes)) and number == pytest.approx(float(value))


@steady
@given(
    trees(), SEEDS, st.one_of(st.floats(max_value=-1e-300), st.just(math.nan), st.just(math.inf), st.text(max_size=3))
)
def test_a_weight_that_is_no_number_is_refused_by_name(tree, seed, weight):
    model = build(tree, seed)
    assume([p for p in model.parameters() if p.is_floating_point()])
    try:
        assume(not (isinstance(weight, str) and math.isfinite(float(weight)) and float(weight) >= 0))
    except ValueError:
        pass
    with pytest.raises(ValueError, match=r"l2sp_weights\['\.'\]="):
        build_plan(model, Provenance(), weights={".": weight})
