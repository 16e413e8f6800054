"""What representations leave unexplained: against refits without each example; what a model makes of a batch."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    FunnelConfig,
    FunnelForSequenceClassification,
)

from hf_l2sp.press import RIDGES, left_out, told
from hf_l2sp.representations import represented


def naive_errors(features, targets, ridge):
    """By refits without each example. Shape: (n,)."""
    x, y = features.double(), targets.double()
    size = (x - x.mean(0)).square().sum(1).mean()
    errors = []
    for number in range(len(x)):
        others = torch.arange(len(x)) != number
        mean_x, mean_y = x[others].mean(0), y[others].mean(0)
        centred = x[others] - mean_x
        inner = centred.T @ centred + ridge * size * torch.eye(x.shape[1], dtype=x.dtype)
        weights = torch.linalg.solve(inner, centred.T @ (y[others] - mean_y))
        errors.append((y[number] - mean_y - (x[number] - mean_x) @ weights).square().sum())
    return torch.stack(errors)


def naive(features, targets):
    """With the best ridge. Shape: (n,)."""
    return min((naive_errors(features, targets, ridge) for ridge in RIDGES), key=lambda errors: float(errors.sum()))


def naive_mean_errors(targets):
    y = targets.double()
    return torch.stack([(y[i] - y[torch.arange(len(y)) != i].mean(0)).square().sum() for i in range(len(y))])


def unexplained(features, targets):
    found = told([features], targets)
    return None if found is None else found.unexplained


def data(count, noise):
    torch.manual_seed(count)
    features = torch.randn(count, 12)
    scores = features[:, :3] + noise * torch.randn(count, 3)
    return features, torch.nn.functional.one_hot(scores.argmax(1), 3)


@pytest.mark.parametrize("count", [8, 40])
@pytest.mark.parametrize("noise", [0.0, 1.0, 10.0])
def test_it_is_that_of_fits_without_each_example(count, noise):
    case = data(count, noise)
    found = left_out(*case)
    torch.testing.assert_close(found.missed, naive(*case), rtol=1e-8, atol=0)
    torch.testing.assert_close(found.mean, naive_mean_errors(case[1]), rtol=1e-8, atol=0)
    assert unexplained(*case) == pytest.approx(float(naive(*case).sum() / found.mean.sum()), rel=1e-8)


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


def test_what_is_told_is_that_of_refits():
    torch.manual_seed(3)
    features, targets = data(40, 0.3)
    layers = [torch.randn(40, 5), features + 0.5 * torch.randn(40, 12), features]
    errors, mean = [naive(layer, targets) for layer in layers], naive_mean_errors(targets)
    gain = min(errors[:2], key=lambda missed: float(missed.sum())) - errors[2]
    added = (gain.mean() - gain.std() / 40**0.5) / mean.mean()
    beside_mean = mean - errors[2]
    significance = beside_mean.mean() / (beside_mean.std() / 40**0.5)
    expected = [float(found) for found in (errors[2].sum() / mean.sum(), significance, added)]
    assert list(told(layers, targets)) == pytest.approx(expected, rel=1e-8) and added > 0.02 and significance > 3.0


def test_a_last_layer_that_knows_less_adds_nothing():
    torch.manual_seed(3)
    features, targets = data(200, 0.3)
    noise = torch.randn(200, 12)
    assert told([noise, features, noise], targets).added < -0.2
    assert told([noise, features, features], targets).added == 0.0
    assert told([noise, noise], torch.randn(200, 2)).added <= 0.0
    # Beside layers that are worse than the mean it is the mean that counts.
    few = torch.randn(200, 1)
    assert 0.0 < told([few, features], targets).added <= 1.0 - unexplained(features, targets)


def test_by_chance_less_than_a_standard_error_is_explained():
    """Most times; the ridge that fits best makes a little more of noise than there is."""
    found = []
    for seed in range(200):
        torch.manual_seed(seed)
        features, classes = torch.randn(24, 50), torch.nn.functional.one_hot(torch.arange(24) % 3, 3)
        found.append(told([features], classes).significance)
    assert sum(value < 1.0 for value in found) > 0.75 * len(found) and sum(value < 3.0 for value in found) > 0.98 * 200
    features, targets = data(200, 0.3)
    assert told([features], targets).significance > 10.0


def test_gains_without_spread():
    targets = torch.tensor([[0.0], [1.0]] * 10)
    assert told([torch.ones(20, 3)], targets).significance == 0.0
    # Told apart without error but for what the least ridge costs, which is the same for all.
    assert told([targets], targets).significance > 1e6


def test_one_layer_adds_nothing_and_of_some_nothing_can_be_told():
    features, targets = data(30, 1.0)
    assert told([features], targets).added == 0.0
    assert told([], targets) is None
    assert told([features[:7], features[:7]], targets[:7]) is None
    assert told([features.where(features > 0, torch.nan), features], targets) is None


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
    layers, targets = represented(model, {**batch, "labels": labels}, labels)
    every = model.base_model(**batch, output_hidden_states=True).hidden_states
    assert len(layers) == len(every) == model.config.num_hidden_layers + 1
    for layer, whole in zip(layers, every, strict=True):
        torch.testing.assert_close(layer, torch.stack([whole[0].mean(0), whole[2, :3].mean(0)]))
    torch.testing.assert_close(every[-1], hidden(model, batch))
    assert targets.tolist() == [[0, 0, 1], [1, 0, 0]]


def test_layers_that_pool_their_tokens_are_among_those_compared():
    sizes = {"d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 16, "block_sizes": [1, 1, 1], "vocab_size": 100}
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(FunnelConfig(**sizes, num_labels=3)).eval()
    lengths = (16, 5, 9)
    mask = torch.stack([torch.arange(16) < length for length in lengths]).long()
    batch = {"input_ids": torch.randint(5, 90, (3, 16)), "attention_mask": mask}
    labels = torch.tensor([2, 1, 0])
    layers, _ = represented(model, {**batch, "labels": labels}, labels)
    every = model.funnel(**batch, output_hidden_states=True).hidden_states
    kept = [state.shape[1] for state in every]
    assert len(layers) == len(every) == 4 and kept[:2] == [16, 16] and 16 > kept[2] > kept[3]
    for layer, state in zip(layers[:2], every[:2], strict=True):
        means = [text[:length].mean(0) for text, length in zip(state, lengths, strict=True)]
        torch.testing.assert_close(layer, torch.stack(means))
    for layer, state in zip(layers[2:], every[2:], strict=True):
        torch.testing.assert_close(layer, state.mean(1))


@pytest.mark.parametrize(
    "labels", [torch.tensor([0.5, 1.0, -2.0]), torch.rand(3, 5), torch.tensor([True, False, True])]
)
def test_numbers_are_their_own_targets(tiny_bert_dir, batch, labels):
    model = BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=1).eval()
    layers, targets = represented(model, {**batch, "labels": labels}, labels)
    assert torch.equal(targets, labels.view(3, -1)) and all(len(layer) == 3 for layer in layers)


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
    assert found is not None and found.layers[-1].shape == (3, model.config.hidden_size)
