"""θ0: what is stored, that it stays what it was, and that it is told from another one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy
import pytest
import torch
from torch import nn
from transformers import (
    BertForSequenceClassification,
)

from hf_l2sp import Anchor, identity
from hf_l2sp.identity import EntrySums
from hf_l2sp.penalty import penalty_pass

WORDS = "bert.embeddings.word_embeddings.weight"


# --- what is stored -------------------------------------------------------------------------------------------------


def test_is_a_mapping_of_what_is_trainable_and_pretrained(classifier):
    classifier.bert.embeddings.requires_grad_(False)
    anchor = Anchor.from_model(classifier, exclude=["pooler"])
    expected = [
        name
        for name, _ in classifier.named_parameters()
        if not any(word in name for word in ("embeddings", "pooler", "classifier"))
    ]
    assert isinstance(anchor, Mapping)
    assert list(anchor) == list(anchor.keys()) == expected and len(anchor) == len(expected)
    assert "classifier.weight" not in anchor and anchor.get("classifier.weight") is None
    with pytest.raises(KeyError, match="embeddings"):
        anchor[WORDS]
    assert all(torch.equal(anchor[name], classifier.get_parameter(name)) for name in expected)
    with pytest.raises(TypeError):
        anchor["x"] = torch.ones(1)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_are_copies_in_the_dtype_asked_for(net, dtype, offload, own):
    net.to(own)
    anchor = Anchor.from_model(net, dtype=dtype, offload=offload)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    stored = {"auto": own, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(7.0)
    for name, value in anchor.items():
        assert value.dtype == stored and value.device.type == "cpu" and not value.requires_grad
        assert torch.equal(value, before[name].to(stored))
        assert value.untyped_storage().data_ptr() != net.get_parameter(name).untyped_storage().data_ptr()
    assert anchor.nbytes == sum(p.numel() for p in net.parameters()) * stored.itemsize
    anchor.require_own_memory()


def test_alias_is_found_out(net):
    anchor = Anchor.from_model(net)
    anchor._values["1.weight"] = net[1].weight.detach()
    with pytest.raises(RuntimeError, match=r"θ0 of 1\.weight shares memory with the parameter itself"):
        anchor.require_own_memory()


def test_rows_of_an_enlarged_embedding_take_no_more_memory_than_they_need(gpt2):
    old = gpt2.transformer.wte.weight.detach().clone()
    gpt2.resize_token_embeddings(500)
    value = Anchor.from_model(gpt2)["transformer.wte.weight"]
    assert torch.equal(value, old)
    assert value.untyped_storage().nbytes() == 90 * 32 * 4


def test_shrunk_embedding(gpt2):
    gpt2.resize_token_embeddings(80)
    assert Anchor.from_model(gpt2)["transformer.wte.weight"].shape == (80, 32)


def test_strided_parameters():
    layer = nn.Linear(5, 4)
    layer.weight = nn.Parameter(torch.randn(5, 4).t())
    conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    for module in (layer, conv):
        assert not module.weight.is_contiguous()
        anchor = Anchor.from_model(module)
        assert torch.equal(anchor["weight"], module.weight)
        contiguous = type(module).__new__(type(module))
        nn.Module.__init__(contiguous)
        contiguous.weight = nn.Parameter(module.weight.detach().contiguous())
        contiguous.bias = module.bias
        assert Anchor.from_model(contiguous).fingerprint == anchor.fingerprint


def test_unknown_options(net):
    with pytest.raises(ValueError, match="dtype='float16' is unknown; choose one of auto, float32, bfloat16"):
        Anchor.from_model(net, dtype="float16")
    with pytest.raises(ValueError, match="offload='nvme' is not available; choose one of 'none', 'cpu', 'disk'"):
        Anchor.from_model(net, offload="nvme")
    with pytest.raises(ValueError, match="offload='disk' needs a folder"):
        Anchor.from_model(net, offload="disk")


def test_nothing_trainable(net):
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter with an anchor"):
        Anchor.from_model(net)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_values_are_not_pulled_and_told_of(net, bad, warnings_of_library):
    net[1].weight.data[1, 2] = bad
    anchor = Anchor.from_model(net)
    assert set(anchor) == {"0.weight", "0.bias", "1.bias"} and anchor.plan.entries["1.weight"].role == "excluded"
    (message,) = warnings_of_library
    assert message.startswith("θ0 of 1.weight (1 in all) holds NaN or inf") and "l2sp_exclude" in message
    sums = penalty_pass(anchor.terms(), 1.0)
    assert float(sums.total) == 0.0 and net[1].weight.grad is None

    warnings_of_library.clear()
    assert set(Anchor.from_model(net, exclude=[r"1\.weight"])) == set(anchor)
    net[1].weight.requires_grad_(False)
    Anchor.from_model(net)
    assert not warnings_of_library


def test_values_whose_squares_overflow_are_not_pulled(net, warnings_of_library):
    net.double()[0].bias.data[0] = 1e200
    assert "0.bias" not in Anchor.from_model(net)
    assert "values whose squares overflow" in warnings_of_library[0]


def test_a_model_of_nan_alone_can_be_trained_as_with_the_plain_trainer(net):
    for parameter in net.parameters():
        parameter.data.fill_(math.nan)
    anchor = Anchor.from_model(net)
    assert not anchor.terms() and float(anchor.apply(0.1).total) == 0.0


def test_what_is_unfrozen_later_joins_with_its_value_until_then(net):
    net[0].requires_grad_(False)
    anchor = Anchor.from_model(net)
    assert list(anchor) == ["1.weight", "1.bias"]
    assert anchor.join_trainable() == []
    net[0].weight.requires_grad_(True)
    assert anchor.join_trainable() == ["0.weight"]
    assert anchor.join_trainable(also=["0.bias", "1.bias", "unknown"]) == ["0.bias"]
    assert [entry.name for entry in anchor.active()] == ["0.weight", "1.weight", "1.bias"]
    assert anchor.join_trainable(also=["0.bias"]) == []
    # Who came when is no part of its identity.
    net.requires_grad_(True)
    assert list(anchor) != list(Anchor.from_model(net))
    assert anchor.fingerprint == Anchor.from_model(net).fingerprint


def test_norms_and_sums(net):
    anchor = Anchor.from_model(net, dtype="bfloat16")
    for name, parameter in net.named_parameters():
        value = parameter.detach().double()
        assert anchor.norm(name) == pytest.approx(float(value.norm()), rel=1e-12)
        assert anchor.sums[name].total == pytest.approx(float(value.sum()), rel=1e-9, abs=1e-12)
        assert anchor.sums[name].shape == tuple(value.shape)


# --- the fingerprint ------------------------------------------------------------------------------------------------


def test_fingerprint_is_the_same_from_model_and_from_source(classifier, tiny_bert_dir):
    loaded = Anchor.from_pretrained(tiny_bert_dir, classifier)
    taken = Anchor.from_model(classifier)
    assert loaded.fingerprint == taken.fingerprint and len(taken.fingerprint) == 64
    assert list(loaded) == list(taken)
    assert all(torch.equal(loaded[name], taken[name]) for name in taken)


def test_fingerprint_does_not_depend_on_wrapping_storage_or_training(classifier, move):
    expected = Anchor.from_model(classifier).fingerprint
    assert Anchor.from_model(classifier, dtype="bfloat16", offload="cpu").fingerprint == expected
    assert Anchor.from_model(torch.compile(classifier)).fingerprint == expected
    assert Anchor.from_model(classifier, weights={"LayerNorm": 3.0}).fingerprint == expected
    anchor = Anchor.from_model(classifier)
    move(classifier)
    assert anchor.fingerprint == expected


@pytest.mark.parametrize("chunk", [61, 1000, 1 << 19])
def test_fingerprint_does_not_depend_on_the_order_of_summation(classifier, monkeypatch, chunk):
    expected = Anchor.from_model(classifier).fingerprint
    monkeypatch.setattr(identity, "CHUNK", chunk)
    assert Anchor.from_model(classifier).fingerprint == expected


def test_grid_survives_any_order_of_summation(rng):
    for exponent in range(-6, 5):
        values = rng.normal(0.01, 1.0, 20000) * 10.0**exponent
        orders = [values, values[::-1], numpy.sort(values), rng.permutation(values)]
        sums = [(float(numpy.cumsum(v)[-1]), float(numpy.cumsum(v * v)[-1])) for v in orders]
        exact = (math.fsum(values), math.fsum(values * values))
        assert len(set(sums)) > 1
        assert len({EntrySums((20000,), *pair).identity for pair in [*sums, exact]}) == 1


def test_fingerprint_does_not_depend_on_the_number_of_threads():
    layer = nn.Linear(700, 900)
    threads = torch.get_num_threads()
    prints = set()
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            prints.add(Anchor.from_model(layer).fingerprint)
    finally:
        torch.set_num_threads(threads)
    assert len(prints) == 1


@pytest.mark.parametrize("size", [1e-4, -1e-4, 1e-2])
@pytest.mark.parametrize("name", [WORDS, "bert.encoder.layer.1.output.dense.bias", "bert.pooler.dense.weight"])
def test_fingerprint_sees_one_changed_weight(classifier, name, size):
    expected = Anchor.from_model(classifier).fingerprint
    classifier.get_parameter(name).data.view(-1)[5] += size
    assert Anchor.from_model(classifier).fingerprint != expected


def test_fingerprint_sees_one_changed_weight_in_a_matrix_of_usual_size():
    layer = nn.Linear(768, 3072)
    nn.init.normal_(layer.weight, std=0.04)
    expected = Anchor.from_model(layer).fingerprint
    layer.weight.data[5, 5] += 1e-4
    assert Anchor.from_model(layer).fingerprint != expected


def test_fingerprint_sees_a_trained_softmax_head():
    """Cross entropy's gradients of a linear head sum to zero over the labels, and so does every SGD step."""
    head = nn.Linear(8, 4, dtype=torch.float64)
    expected = Anchor.from_model(head).fingerprint
    before = head.weight.detach().clone()
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    for _ in range(20):
        loss = nn.functional.cross_entropy(head(torch.randn(16, 8, dtype=torch.float64)), torch.randint(4, (16,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float((head.weight.detach() - before).norm()) > 0.5
    assert Anchor.from_model(head).fingerprint != expected


def test_fingerprint_sees_shapes_and_names(net):
    expected = Anchor.from_model(net).fingerprint
    net[0].weight = nn.Parameter(net[0].weight.detach().reshape(3, 4))
    assert Anchor.from_model(net).fingerprint != expected
    net[0].weight = nn.Parameter(net[0].weight.detach().reshape(4, 3))
    assert Anchor.from_model(net).fingerprint == expected
    assert Anchor.from_model(nn.ModuleList([*net][::-1])).fingerprint != expected
    assert Anchor.from_model(nn.ModuleDict({"a": net[0], "1": net[1]})).fingerprint != expected


def test_fingerprint_of_zeros_and_ones():
    layer = nn.LayerNorm(64)
    first = Anchor.from_model(layer).fingerprint
    layer.bias.data[3] = 1e-6
    assert Anchor.from_model(layer).fingerprint != first


# --- another model --------------------------------------------------------------------------------------------------


def test_summands_for_another_model_of_the_same_kind(tiny_bert_dir, classifier, move):
    anchor = Anchor.from_model(classifier)
    other = move(BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3))
    terms, new, low_rank = anchor.terms_for(other)
    assert low_rank == []
    assert [term.parameter for term in terms] == [other.get_parameter(name) for name in anchor]
    assert [term.parameter for term in new] == [other.classifier.weight, other.classifier.bias]


def test_model_that_is_another(net):
    anchor = Anchor.from_model(net)
    with pytest.raises(ValueError, match=r"The anchor holds 1\.weight, which the model lacks"):
        anchor.stored_terms(net[:1])
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    with pytest.raises(ValueError, match=r"1\.weight has shape \(5, 4\), its θ0 \(2, 4\); .*resized"):
        anchor.terms_for(other)


def test_model_that_is_another_with_weights(net):
    with pytest.raises(ValueError, match=r"The anchor holds 1\.weight, which the model lacks"):
        Anchor.from_model(net).terms_for(net[:1], {"weight": 2.0})


def test_anchors_can_be_compared(net):
    assert (Anchor.from_model(net) == Anchor.from_model(net)) in (True, False)
