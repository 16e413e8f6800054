"""Which parameter is pulled and with which weight, and every refusal of a plan that would not do what it says."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_l2sp.plan import build_plan
from hf_l2sp.provenance import Provenance, examine

HEAD = ["classifier.weight", "classifier.bias"]


def plan_of(model, exclude=None, weights=None):
    return build_plan(model, examine(model), exclude, weights)


def roles(plan):
    return {name: entry.role for name, entry in plan.entries.items()}


def weights_of(plan):
    return {name: entry.weight for name, entry in plan.entries.items()}


def full_weights(model, value=1.0):
    return {name: torch.full_like(p, value) for name, p in model.named_parameters()}


def test_roles_of_a_classifier(classifier):
    classifier.bert.embeddings.requires_grad_(False)
    found = roles(plan_of(classifier, exclude=["pooler"]))
    assert found.keys() == {name for name, _ in classifier.named_parameters()}
    for name, role in found.items():
        if name.startswith("bert.embeddings"):
            assert role == "frozen"
        elif name in HEAD:
            assert role == "new"
        else:
            assert role == ("excluded" if "pooler" in name else "anchored")


def test_roles_follow_what_is_frozen_now(net):
    plan = plan_of(net, weights={"1.bias": 0})
    net.requires_grad_(False)
    assert set(roles(plan).values()) == {"frozen"}
    net.requires_grad_(True)
    assert roles(plan) == {"0.weight": "anchored", "0.bias": "anchored", "1.weight": "anchored", "1.bias": "excluded"}


def test_what_is_excluded_from_a_model_of_unknown_origin_is_new(net):
    assert roles(plan_of(net, exclude=["^1"])) == {
        "0.weight": "anchored",
        "0.bias": "anchored",
        "1.weight": "new",
        "1.bias": "new",
    }


def test_exclude_that_matches_nothing_is_told(net, warnings_of_library):
    plan_of(net, exclude=["^1", "LayerNom"])
    assert warnings_of_library == ["l2sp_exclude: 'LayerNom' matches no parameter."]


def test_every_exclude_that_matches_is_counted_though_another_matched_first(net, warnings_of_library):
    plan_of(net, exclude=["^1", "1.weight"])
    assert warnings_of_library == []


def test_first_pattern_that_matches_decides(net):
    plan = plan_of(net, weights={r"^1\.bias": 5.0, "^1": 3.0, "bias": 2.0})
    assert weights_of(plan) == {"0.weight": 1.0, "0.bias": 2.0, "1.weight": 3.0, "1.bias": 5.0}


def test_pattern_is_searched_anywhere_in_the_name(net):
    assert weights_of(plan_of(net, weights={"ias": 2.0}))["0.bias"] == 2.0


def test_weight_zero_excludes(net):
    plan = plan_of(net, weights={"bias": 0})
    assert roles(plan) == {"0.weight": "anchored", "0.bias": "excluded", "1.weight": "anchored", "1.bias": "excluded"}


def test_pattern_that_matches_nothing(net):
    with pytest.raises(
        ValueError,
        match=r"l2sp_weights: 'encoder' matches no parameter of the model, whose names are like 0\.weight, 0\.bias",
    ):
        plan_of(net, weights={"bias": 1.0, "encoder": 2.0})
    with pytest.raises(ValueError, match="'x', 'y' match no parameter"):
        plan_of(net, weights={"x": 1.0, "y": 2.0})


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_number_that_is_no_weight(net, value):
    with pytest.raises(ValueError, match="l2sp_weights"):
        plan_of(net, weights={"bias": value})


@pytest.mark.parametrize("options", [{"exclude": ["("]}, {"weights": {"(": 1.0}}], ids=str)
def test_expression_that_is_none(net, options):
    with pytest.raises(ValueError, match="regular expression"):
        plan_of(net, **options)


def test_one_expression_as_a_string(net):
    assert roles(plan_of(net, exclude="^1"))["0.weight"] == "anchored"


def test_tensors_from_a_file(net, tmp_path):
    weights = {name: torch.rand(p.shape) for name, p in net.named_parameters()}
    save_file(weights, tmp_path / "fisher.safetensors")
    found = weights_of(plan_of(net, weights=str(tmp_path / "fisher.safetensors")))
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_file_written_from_a_compiled_model(net, tmp_path):
    save_file({f"_orig_mod.{n}": w for n, w in full_weights(net, 2.0).items()}, tmp_path / "fisher.safetensors")
    found = weights_of(plan_of(net, weights=str(tmp_path / "fisher.safetensors")))
    assert all(bool((value == 2.0).all()) for value in found.values())


def test_low_precision_weights_are_widened_and_strided_ones_made_contiguous(net):
    weights = full_weights(net)
    weights["0.weight"] = torch.rand(3, 4).to(torch.bfloat16).t()
    found = weights_of(plan_of(net, weights=weights))["0.weight"]
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert torch.equal(found, weights["0.weight"].float())


def test_tensor_of_no_dimension_is_a_number(net):
    weights = full_weights(net)
    weights["1.bias"] = torch.tensor(0.25)
    assert weights_of(plan_of(net, weights=weights))["1.bias"] == 0.25


def test_tensors_and_patterns_together(net):
    plan = plan_of(net, weights={"0.weight": torch.full((4, 3), 7.0), "weight": 2.0})
    assert torch.equal(plan.entries["0.weight"].weight, torch.full((4, 3), 7.0))
    assert plan.entries["1.weight"].weight == 2.0 and plan.entries["1.bias"].weight == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({"0.weight": torch.ones(3, 4)}), r"0\.weight has shape \(3, 4\), the parameter \(4, 3\)"),
        (lambda w: w.update({"0.bias": torch.ones(1)}), r"0\.bias has shape \(1,\), the parameter \(4,\)"),
        (lambda w: w["1.bias"].fill_(-1e-9), r"1\.bias holds negative, NaN or infinite"),
        (lambda w: w["1.bias"].fill_(math.nan), r"1\.bias holds negative, NaN or infinite"),
        (lambda w: w["1.weight"].view(-1)[3:4].fill_(math.inf), r"1\.weight holds negative, NaN or infinite"),
        (lambda w: w.update({"2.weight": torch.ones(2)}), r"'2\.weight' matches no parameter"),
        (lambda w: w.pop("1.bias"), r"has no tensor for 1\.bias \(1 in all\).*l2sp_exclude"),
    ],
    ids=["shape", "broadcastable shape", "negative", "NaN", "inf", "extra", "missing"],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_tensors_that_do_not_fit(net, change, message, as_file, tmp_path):
    weights = full_weights(net)
    change(weights)
    if as_file:
        save_file(weights, tmp_path / "fisher.safetensors")
        weights = str(tmp_path / "fisher.safetensors")
    with pytest.raises(ValueError, match=message):
        plan_of(net, weights=weights)


def test_tensors_for_what_is_not_pulled_are_not_needed(classifier):
    classifier.bert.embeddings.requires_grad_(False)
    weights = {n: w for n, w in full_weights(classifier).items() if "embeddings" not in n and n not in HEAD}
    plan = plan_of(classifier, weights={n: w for n, w in weights.items() if "pooler" not in n}, exclude=["pooler"])
    assert torch.is_tensor(plan.entries["bert.encoder.layer.0.output.dense.weight"].weight)


@pytest.mark.parametrize("content", [None, b"", b"{not json", b"\x10\x00\x00\x00\x00\x00\x00\x00garbage"])
def test_file_that_cannot_be_read(net, content, tmp_path):
    file = tmp_path / "fisher.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"fisher\.safetensors' is neither JSON nor a readable safetensors file"):
        plan_of(net, weights=str(file))


def test_weight_of_an_enlarged_embedding_is_that_of_the_old_rows(gpt2):
    gpt2.resize_token_embeddings(95)
    weights = full_weights(gpt2)
    name = "transformer.wte.weight"
    for rows in (95, 90):  # a Fisher information of all of it, or of the rows that are pulled
        weights[name] = torch.arange(rows * 32.0).view(rows, 32)
        assert torch.equal(plan_of(gpt2, weights=weights).entries[name].weight, weights[name][:90])
    weights[name] = torch.ones(94, 32)
    with pytest.raises(ValueError, match=r"wte\.weight has shape \(94, 32\), the parameter \(90, 32\)"):
        plan_of(gpt2, weights=weights)


def test_nothing_to_anchor_lists_what_was_looked_at(classifier):
    classifier.bert.requires_grad_(False)
    with pytest.raises(ValueError) as caught:
        plan_of(classifier).require_anchored()
    message = str(caught.value)
    assert "L2-SP found no trainable parameter with an anchor" in message
    assert "bert.embeddings.word_embeddings.weight: frozen" in message
    assert f"and {len(list(classifier.parameters())) - 10} more" in message
    for cure in ("Unfreeze", "l2sp_exclude", "l2sp_anchor", "l2sp_lambda=0"):
        assert cure in message


def test_nothing_to_anchor_says_why(net):
    with pytest.raises(ValueError, match=r"0\.weight: no pretrained value; 0\.bias: no pretrained value"):
        plan_of(net, exclude=["."]).require_anchored()
    with pytest.raises(ValueError, match=r"0\.weight: excluded; 0\.bias: excluded"):
        plan_of(net, weights={".": 0}).require_anchored()
    with pytest.raises(ValueError, match="the model has no floating-point parameter"):
        plan_of(nn.Flatten()).require_anchored()


def test_summary_counts_elements_and_names_what_is_new(classifier):
    classifier.bert.embeddings.requires_grad_(False)
    sizes = {n: p.numel() for n, p in classifier.named_parameters()}
    frozen = sum(size for name, size in sizes.items() if "embeddings" in name)
    excluded = sum(size for name, size in sizes.items() if "LayerNorm" in name and "embeddings" not in name)
    anchored = sum(sizes.values()) - frozen - excluded - 99
    summary = plan_of(classifier, exclude=["LayerNorm"]).summary()
    assert "\n" not in summary
    assert f"anchored [{anchored:,}], 2 new [99] (classifier.weight, classifier.bias)," in summary
    assert f"5 frozen [{frozen:,}], 8 excluded [{excluded:,}] (" in summary and summary.endswith(", ...)")


def test_summary_tells_of_enlarged_embeddings(gpt2):
    gpt2.resize_token_embeddings(95)
    assert plan_of(gpt2).summary().endswith("; transformer.wte.weight: first 90 of 95 rows")


def test_shared_module_and_integers_and_many_parameters():
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(300)])
    model.append(model[0])
    model.counter = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    plan = plan_of(model, weights={rf"^{i}\.": float(i + 1) for i in range(300)})
    assert len(plan.entries) == 600
    assert all(entry.weight == int(name.split(".")[0]) + 1 for name, entry in plan.entries.items())


def test_compiled_and_parallel_wrappers_do_not_change_the_plan(net):
    expected = roles(plan_of(net, exclude=["^1"]))
    assert roles(plan_of(torch.compile(net), exclude=["^1"])) == expected
    assert roles(plan_of(nn.DataParallel(net), exclude=["^1"])) == expected


def test_known_rows_are_those_that_are_pulled():
    model = nn.Embedding(6, 2)
    plan = build_plan(model, Provenance(True, rows={"weight": 4}))
    assert plan.entries["weight"].pulled_shape == (4, 2)
