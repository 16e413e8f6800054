"""What representations leave unexplained: against refits without each example; what a model makes of a batch."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)

from hf_l2sp.press import RIDGES, unexplained
from hf_l2sp.representations import represented


def naive(features, targets):
    """Fits every ridge anew without each example."""
    x, y = features.double(), targets.double()
    size = (x - x.mean(0)).square().sum(1).mean()
    base, errors = 0.0, dict.fromkeys(RIDGES, 0.0)
    for number in range(len(x)):
        others = torch.arange(len(x)) != number
        mean_x, mean_y = x[others].mean(0), y[others].mean(0)
        base += float((y[number] - mean_y).square().sum())
        centred = x[others] - mean_x
        for ridge in RIDGES:
            inner = centred.T @ centred + ridge * size * torch.eye(x.shape[1], dtype=x.dtype)
            weights = torch.linalg.solve(inner, centred.T @ (y[others] - mean_y))
            errors[ridge] += float((y[number] - mean_y - (x[number] - mean_x) @ weights).square().sum())
    return min(errors.values()) / base


def data(count, noise):
    torch.manual_seed(count)
    features = torch.randn(count, 12)
    scores = features[:, :3] + noise * torch.randn(count, 3)
    return features, torch.nn.functional.one_hot(scores.argmax(1), 3)


@pytest.mark.parametrize("count", [8, 40])
@pytest.mark.parametrize("noise", [0.0, 1.0, 10.0])
def test_it_is_that_of_fits_without_each_example(count, noise):
    case = data(count, noise)
    assert unexplained(*case) == pytest.approx(naive(*case), rel=1e-8)


def test_noise_is_what_cannot_be_explained():
    shares = [unexplained(*data(120, noise)) for noise in (0.0, 1.0, 100.0)]
    assert shares == sorted(shares) and shares[0] < 0.6 and shares[2] > 0.95


def test_numbers_in_line_with_a_feature_are_explained():
    torch.manual_seed(0)
    features = torch.randn(60, 3)
    assert unexplained(features, features @ torch.ones(3, 1)) < 1e-3


@pytest.mark.parametrize("noise", [0.5, 1.0, 3.0])
def test_of_a_linear_gaussian_model_it_is_the_share_of_the_noise(noise):
    torch.manual_seed(1)
    features = torch.randn(1500, 4)
    weights = torch.tensor([[1.0], [-0.5], [0.5], [0.0]])
    targets = features @ weights + noise * torch.randn(1500, 1)
    expected = noise**2 / (noise**2 + float(weights.square().sum()))
    assert unexplained(features, targets) == pytest.approx(expected, rel=0.05)


def test_scale_and_place_of_the_features_do_not_matter():
    features, targets = data(30, 1.0)
    again = unexplained(1000.0 * features + 7.0, targets)
    assert again == pytest.approx(unexplained(features, targets), rel=1e-4)


def test_without_enough_to_go_by_it_is_not_known():
    features, targets = data(30, 1.0)
    assert unexplained(features[:7], targets[:7]) is None
    assert unexplained(features, torch.zeros(30, 2)) is None
    assert unexplained(features.where(features > 0, torch.nan), targets) is None
    assert unexplained(torch.ones(30, 4), targets) == 1.0


# --- what a model makes of a batch ----------------------------------------------------------------------------------


@pytest.fixture
def batch():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    return {"input_ids": torch.randint(5, 90, (3, 4)), "attention_mask": mask}


def hidden(model, batch):
    return model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state


def test_a_text_is_the_mean_of_its_tokens(tiny_bert_dir, batch):
    model = BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3).eval()
    labels = torch.tensor([2, -100, 0])
    features, targets = represented(model, {**batch, "labels": labels}, labels)
    whole = hidden(model, batch)
    torch.testing.assert_close(features, torch.stack([whole[0].mean(0), whole[2, :3].mean(0)]))
    assert targets.tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    "labels", [torch.tensor([0.5, 1.0, -2.0]), torch.rand(3, 5), torch.tensor([True, False, True])]
)
def test_numbers_are_their_own_targets(tiny_bert_dir, batch, labels):
    model = BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=1).eval()
    features, targets = represented(model, {**batch, "labels": labels}, labels)
    assert torch.equal(targets, labels.view(3, -1)) and len(features) == 3


def test_what_no_head_predicts_is_not_represented(tiny_bert_dir, batch):
    classifier = BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3)
    language = BertForMaskedLM.from_pretrained(tiny_bert_dir)
    for model, labels in (
        (language, batch["input_ids"][:, 0]),  # words of a vocabulary
        (classifier, torch.tensor([0, 17, 3])),  # positions
        (classifier, torch.tensor([0, -1, 2])),
        (classifier, torch.zeros(3, 4, dtype=torch.long)),  # a class per word
        (classifier, torch.zeros(3, 4, 4)),
        (torch.nn.Linear(4, 2), torch.tensor([0, 1, 0])),
    ):
        assert represented(model, {**batch, "labels": labels}, labels) is None
    labels = torch.tensor([0, 1, 2])
    assert represented(classifier, {"chosen_input_ids": batch["input_ids"], "labels": labels}, labels) is None
    assert represented(classifier, [batch["input_ids"]], labels) is None


def test_columns_that_the_model_does_not_take_are_left_out(tiny_bert_dir, batch):
    model = BertModel.from_pretrained(tiny_bert_dir)
    labels = torch.tensor([0, 1, 1])
    found = represented(model, {**batch, "labels": labels, "teacher_logits": torch.rand(3, 2)}, labels)
    assert found is not None and found.features.shape == (3, model.config.hidden_size)
