"""The Fisher information against gradients that the test takes example by example, and what must not matter."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from hf_l2sp import Anchor, estimate_fisher
from hf_l2sp import fisher as fisher_module
from hf_l2sp.fisher import save_fisher
from hf_l2sp.fisher_rows import with_drawn_labels

LENGTHS = (9, 4, 7, 9, 3, 9, 5, 9)


def examples(kind: str, vocabulary: int = 90) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(11)
    rows = []
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(3, vocabulary, (length,), generator=generator)
        if kind == "sequence":
            labels = torch.tensor(index % 3)
        elif kind == "regression":
            labels = torch.tensor(float(index))
        elif kind == "token":
            labels = torch.randint(0, 3, (length,), generator=generator)
            labels[0] = -100
        elif kind == "masked":
            labels = torch.full((length,), -100)
            labels[1::2] = ids[1::2]
        else:
            labels = ids.clone()
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def batches(rows, size, side="right", length=None, mask=True):
    """Padded batches, as a collator makes them; with `length`, longer than need be."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        longest = length or max(len(row["input_ids"]) for row in part)

        def padded(tensor, value, longest=longest):
            fill = torch.full((longest - len(tensor),), value)
            return torch.cat([tensor, fill] if side == "right" else [fill, tensor])

        batch = {"input_ids": torch.stack([padded(row["input_ids"], 0) for row in part])}
        if mask:
            batch["attention_mask"] = torch.stack([padded(torch.ones_like(row["input_ids"]), 0) for row in part])
        labels = [row["labels"] for row in part]
        batch["labels"] = torch.stack([x if x.dim() == 0 else padded(x, -100) for x in labels])
        yield batch


def reference(model, rows) -> dict[str, torch.Tensor]:
    """Mean squared gradient, in float64 and one bare example after the other."""
    twin = type(model)(model.config).double().eval()
    twin.load_state_dict({n: v.double() if v.is_floating_point() else v for n, v in model.state_dict().items()})
    found = {n: torch.zeros_like(p) for n, p in twin.named_parameters()}
    for row in rows:
        twin.zero_grad()
        twin(input_ids=row["input_ids"][None], labels=row["labels"][None].to(_like(row["labels"]))).loss.backward()
        for name, parameter in twin.named_parameters():
            if parameter.grad is not None:
                found[name] += parameter.grad.square() / len(rows)
    return found


def _like(labels):
    return torch.float64 if labels.is_floating_point() else labels.dtype


def error(got, expected) -> float:
    assert got.keys() == expected.keys()
    away = sum(float((got[n].double() - expected[n].double()).square().sum()) for n in got)
    return (away / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5


@pytest.fixture
def models(tiny_bert_dir, tiny_gpt2_dir, gpt2, llama, bert_config):
    def bert(cls, **options):
        set_seed(3)
        return cls.from_pretrained(tiny_bert_dir, **options)

    def t5():
        set_seed(3)
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        return T5ForConditionalGeneration(T5Config(vocab_size=90, decoder_start_token_id=0, **sizes))

    return {
        "sequence": lambda: bert(BertForSequenceClassification, num_labels=3),
        "regression": lambda: bert(BertForSequenceClassification, num_labels=1),
        "token": lambda: bert(BertForTokenClassification, num_labels=3),
        "masked": lambda: bert(BertForMaskedLM),
        "causal": lambda: gpt2,
        "llama": lambda: llama,
        "gpt2-sequence": lambda: GPT2ForSequenceClassification.from_pretrained(
            tiny_gpt2_dir, num_labels=3, pad_token_id=0
        ),
        "t5": t5,
    }


KINDS = ("sequence", "regression", "token", "masked", "causal", "llama", "gpt2-sequence", "t5")


@pytest.mark.parametrize("kind", KINDS)
def test_against_explicit_backward_passes(models, kind):
    model, rows = models[kind](), examples(kind.removeprefix("gpt2-"))
    found = estimate_fisher(model, batches(rows, 3), progress=False)
    assert error(found, reference(model, rows)) < 1e-5
    for value, (_, parameter) in zip(found.values(), trainable(model), strict=True):
        assert value.dtype == torch.float32 and value.shape == parameter.shape
    assert all(float(value.min()) >= 0 for value in found.values()) and sum(float(v.sum()) for v in found.values()) > 0


def trainable(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", KINDS)
def test_batch_size_and_padding_do_not_matter(models, kind):
    model, rows = models[kind](), examples(kind.removeprefix("gpt2-"))
    alone = estimate_fisher(model, batches(rows, 1), progress=False)
    for size, options in ((2, {}), (8, {}), (8, {"length": 20}), (3, {"side": "left", "length": 15})):
        if kind == "t5" and "side" in options:
            continue  # an encoder-decoder sees where the padding is
        assert error(estimate_fisher(model, batches(rows, size, **options), progress=False), alone) < 1e-5, options


@pytest.mark.parametrize("at_a_time", [1, 1 << 17, 1 << 28])
def test_number_of_examples_that_go_through_together_does_not_matter(models, monkeypatch, at_a_time):
    monkeypatch.setattr(fisher_module, "_AT_A_TIME", at_a_time)
    calls = []
    of_several = fisher_module._Total._of_several

    def watched(self, rows):
        found = of_several(self, rows)
        calls.append((len(rows), found is not None))
        return found

    monkeypatch.setattr(fisher_module._Total, "_of_several", watched)
    model, rows = models["llama"](), examples("causal")
    assert error(estimate_fisher(model, batches(rows, 8), progress=False), reference(model, rows)) < 1e-5
    # Four rows have the length 9; gradients of one example take 112 kB.
    assert {1: [], 1 << 17: [], 1 << 28: [(4, True)]}[at_a_time] == calls


def test_model_that_cannot_be_mapped_is_taken_one_by_one(models):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x, labels):
            scale = float(x.abs().sum())  # vmap refuses it
            return {"loss": nn.functional.cross_entropy(scale * self.linear(x), labels)}

    model = Odd()
    x, labels = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    found = estimate_fisher(model, [{"x": x, "labels": labels}], progress=False)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for index in range(4):
        loss = model(x[index : index + 1], labels[index : index + 1])["loss"]
        for name, gradient in zip(expected, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            expected[name] += gradient.square() / 4
    assert error(found, expected) < 1e-6


def test_model_that_mixes_rows_is_taken_one_by_one():
    class Mixing(nn.Module):
        """Another loss for a row of a batch than for a batch of one."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x, labels):
            mapped = torch._C._functorch.is_batchedtensor(x)
            return ((self.weight * x).sum().square() * (2.0 if mapped else 1.0),)

    model, x = Mixing(), torch.randn(5, 3)
    found = estimate_fisher(model, [{"x": x, "labels": torch.zeros(5, dtype=torch.long)}], progress=False)
    expected = ((2 * x.sum(1, keepdim=True) * x).square()).mean(0)
    torch.testing.assert_close(found["weight"], expected)


def test_is_not_the_square_of_a_batch_s_gradient(models):
    model, rows = models["sequence"](), examples("sequence")
    found = estimate_fisher(model, batches(rows, 8), progress=False)
    (batch,) = batches(rows, 8)
    loss = model.eval()(**batch).loss
    squares = [g.square() for g in torch.autograd.grad(loss, [p for _, p in trainable(model)])]
    assert sum(float(v.sum()) for v in found.values()) > 2 * sum(float(s.sum()) for s in squares)


def test_frozen_parameters_are_left_out_and_tied_ones_come_once(models):
    model = models["causal"]()
    model.transformer.h[0].requires_grad_(False)
    found = estimate_fisher(model, batches(examples("causal"), 4), progress=False)
    assert set(found) == {n for n, _ in trainable(model)} and "lm_head.weight" not in found
    expected = reference(model, examples("causal"))
    assert error(found, {n: expected[n] for n in found}) < 1e-5
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="the model has no trainable parameter; unfreeze some"):
        estimate_fisher(model, batches(examples("causal"), 4))


def test_max_batches(models):
    model, rows = models["sequence"](), examples("sequence")
    taken = []

    def watched():
        for batch in batches(rows, 2):
            taken.append(batch)
            yield batch

    found = estimate_fisher(model, watched(), 2, progress=False)
    assert error(found, reference(model, rows[:4])) < 1e-5 and len(taken) <= 3


def test_rows_without_a_label_do_not_count(models):
    model, rows = models["token"](), examples("token")
    silent = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows[:2]]
    found = estimate_fisher(model, batches([*silent, *rows], 5), progress=False)
    assert error(found, reference(model, rows)) < 1e-5
    with pytest.raises(ValueError, match="there is no example with a label"):
        estimate_fisher(model, batches(silent, 2), progress=False)
    with pytest.raises(ValueError, match="there is no example with a label"):
        estimate_fisher(model, [], progress=False)


def test_modes_gradients_and_random_states_are_as_before(models):
    model = models["sequence"]().train()
    model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()

    def noisy():
        for batch in batches(examples("sequence"), 4):
            torch.rand(3), random.random(), numpy.random.rand(2)
            yield batch

    first = estimate_fisher(model, noisy(), progress=False)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert (states[2] == numpy.random.get_state()[1]).all()
    assert [module.training for module in model.modules()] == modes
    named = dict(model.named_parameters())
    assert bool((next(iter(named.values())).grad == 1).all()) and sum(p.grad is not None for p in named.values()) == 1
    assert all(torch.equal(v, first[n]) for n, v in estimate_fisher(model, noisy(), progress=False).items())


def test_modes_are_as_before_after_an_error(models):
    model = models["sequence"]().train()
    with pytest.raises(ValueError, match="returns no loss of its own"):
        estimate_fisher(model, [{"input_ids": torch.ones(2, 3, dtype=torch.long)}], progress=False)
    assert all(module.training for module in model.modules())


def test_shuffling_loader_is_drawn_by_the_seed(models):
    model, rows = models["sequence"](), examples("sequence")
    loader = DataLoader(
        range(8), batch_size=2, shuffle=True, collate_fn=lambda i: next(batches([rows[j] for j in i], 2))
    )
    first, again, other = (
        estimate_fisher(model, loader, 2, seed=seed, progress=False)["classifier.weight"] for seed in (0, 0, 5)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_progress_bar(models, capsys):
    from transformers.utils import logging

    model = models["sequence"]()
    logging.enable_progress_bar()
    try:
        estimate_fisher(model, list(batches(examples("sequence"), 4)))
        assert "Fisher: 100%" in capsys.readouterr().err
        estimate_fisher(model, list(batches(examples("sequence"), 4)), progress=False)
        assert capsys.readouterr().err == ""
    finally:
        logging.disable_progress_bar()


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_model_has_canonical_names(models, wrap):
    model, rows = models["sequence"](), examples("sequence")
    found = estimate_fisher(wrap(model), batches(rows, 4), progress=False)
    assert set(found) == {n for n, _ in model.named_parameters()}


# --- labels from the model ------------------------------------------------------------------------------------------


def test_sampled_labels_of_sequences_have_the_expectation_of_the_model(models):
    model, rows = models["sequence"]().eval(), examples("sequence")[:2]
    with torch.no_grad():
        model.classifier.weight.mul_(30)  # far from uniform
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows:
        probabilities = model(input_ids=row["input_ids"][None]).logits.softmax(-1)[0].detach()
        for label, p in enumerate(probabilities.tolist()):
            loss = model(input_ids=row["input_ids"][None], labels=torch.tensor([label])).loss
            for name, g in zip(expected, torch.autograd.grad(loss, list(model.parameters())), strict=True):
                expected[name] += p * g.square() / len(rows)
    found = estimate_fisher(model, batches(rows * 300, 100), labels="sampled", progress=False)
    assert error({"w": found["classifier.bias"]}, {"w": expected["classifier.bias"]}) < 0.1
    data = estimate_fisher(model, batches(rows, 2), progress=False)
    assert error({"w": data["classifier.bias"]}, {"w": expected["classifier.bias"]}) > 0.2


@pytest.mark.parametrize("kind", ["token", "masked", "causal"])
def test_sampled_labels_of_tokens_are_where_the_labels_were(models, kind, monkeypatch):
    model, rows = models[kind](), examples(kind)
    seen = []
    add = fisher_module._Total.add
    monkeypatch.setattr(fisher_module._Total, "add", lambda self, got: (seen.extend(got), add(self, got)))
    first = estimate_fisher(model, batches(rows, 3), labels="sampled", progress=False)
    again = estimate_fisher(model, batches(rows, 1), labels="sampled", progress=False)
    assert error(again, first) < 1e-5  # independent of the batch size, too
    for row, drawn in zip(rows, seen[: len(rows)], strict=True):
        assert torch.equal(drawn["labels"][0] == -100, row["labels"] == -100)
    assert any(not torch.equal(d["labels"][0], r["labels"]) for d, r in zip(seen, rows, strict=False))


def test_sampled_next_tokens_are_labels_of_the_next_place(models):
    model = models["causal"]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)  # so sure that drawing is taking the likeliest
    (row,) = examples("causal")[:1]
    (batch,) = batches([row], 1)
    likeliest = model(**batch).logits.argmax(-1)
    drawn = with_drawn_labels(batch, model, torch.Generator())["labels"]
    assert float((drawn[:, 1:] == likeliest[:, :-1]).float().mean()) > 0.8


@pytest.mark.parametrize("kind", ["regression", "t5"])
def test_labels_that_cannot_be_drawn_are_refused(models, kind):
    model = models[kind]()
    with pytest.raises(ValueError, match=f"{type(model).__name__} or its labels are not. Use labels='data'"):
        estimate_fisher(model, batches(examples(kind), 2), labels="sampled", progress=False)


# --- refusals, files ------------------------------------------------------------------------------------------------


def test_refusals(models):
    model = models["sequence"]()
    good = list(batches(examples("sequence"), 4))
    for given, message in (
        ([[1, 2]], "a batch is a list; give mappings"),
        ([{k: v for k, v in good[0].items() if k != "labels"}], "returns no loss of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate_fisher(model, given, progress=False)
    with pytest.raises(ValueError, match="Linear does not take a batch with input_ids, attention_mask, labels"):
        estimate_fisher(nn.Linear(2, 2), good, progress=False)
    with pytest.raises(ValueError, match="labels='model' is unknown; choose 'data' or 'sampled'"):
        estimate_fisher(model, good, labels="model")
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(ValueError, match="the loss of an example near number 1 is not finite"):
        estimate_fisher(model, good, progress=False)


def test_file_is_taken_as_weights(models, tmp_path):
    model, rows = models["sequence"](), examples("sequence")
    found = estimate_fisher(model, batches(rows, 4), progress=False)
    save_fisher(tmp_path / "fisher.safetensors", found)
    anchor = Anchor.from_model(model, weights=str(tmp_path / "fisher.safetensors"))
    for entry in anchor.active():
        assert torch.equal(entry.weight, found[entry.name])
    assert "classifier.weight" not in anchor


def test_file_is_taken_where_the_embedding_was_enlarged(models, tmp_path):
    model, rows = models["sequence"](), examples("sequence")
    model.resize_token_embeddings(107, mean_resizing=False)
    found = estimate_fisher(model, batches(rows, 4), progress=False)
    save_fisher(tmp_path / "fisher.safetensors", found)
    anchor = Anchor.from_model(model, weights=str(tmp_path / "fisher.safetensors"))
    entry = anchor.plan.entries["bert.embeddings.word_embeddings.weight"]
    assert entry.rows == 100 and torch.equal(entry.weight, found[entry.name][:100])
