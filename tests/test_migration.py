"""The constants of the README's table "Coming from other code": other people's lines train as ours do with them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from hf_l2sp import L2SPTrainer, L2SPTrainingArguments

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
RATE, STEPS = 0.5, 3
STRENGTH = 0.08  # of every foreign constant, so that the pull is seen after three steps


def told(what: str) -> float:
    """The value of `l2sp_lambda` in the row that begins with some words, for a constant of STRENGTH."""
    (section,) = re.findall(r"^## Coming from other code\n(.*?)^## ", README, flags=re.DOTALL | re.MULTILINE)
    (cell,) = re.findall(rf"^\| {re.escape(what)}[^|]*\| ([^|]*) \|", section, flags=re.MULTILINE)
    return {"c": STRENGTH, "α/2": STRENGTH / 2, "λ_E/2": STRENGTH / 2, "δ/2": STRENGTH / 2, "γ/2": STRENGTH / 2}[cell]


@pytest.fixture
def build(tiny_bert_dir) -> Callable[[], BertForSequenceClassification]:
    def load() -> BertForSequenceClassification:
        torch.manual_seed(1)  # of the head
        exact = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3, **exact)
        # Or a mean per micro-batch is not divided by their number (transformers issue 47688).
        model.accepts_loss_kwargs = False
        return model

    return load


@pytest.fixture
def example() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(3, 13), "labels": torch.tensor(1)}


@pytest.fixture
def trained(build, example, tmp_path) -> Callable[..., nn.Module]:
    """Function that takes three SGD steps with a trainer, on one example so that no order matters."""

    def run(trainer_class: Any = L2SPTrainer, accumulation: int = 1, **settings: Any) -> nn.Module:
        config = L2SPTrainingArguments if trainer_class is L2SPTrainer else TrainingArguments
        args = config(
            output_dir=str(tmp_path / "out"),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **settings,
        )
        model = build()
        trainer_class(model=model, args=args, train_dataset=[example] * 24).train()
        return model

    return run


@pytest.fixture
def by_hand(build, example) -> Callable[..., nn.Module]:
    """Function that takes the same steps in a loop; `penalty` and `after` get the model and its first weights."""

    def run(
        penalty: Callable[..., Tensor] | None = None, accumulation: int = 1, divided: bool = True, after: Any = None
    ) -> nn.Module:
        model = build()
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        batch = {name: torch.stack([value, value]) for name, value in example.items()}
        for _ in range(STEPS):
            for _ in range(accumulation):
                loss = model(**batch).loss / accumulation
                if penalty is not None:
                    loss = loss + penalty(model, start) / (accumulation if divided else 1)
                loss.backward()
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
            if after is not None:
                after(model, before, start)
        return model

    return run


def require_same(one: nn.Module, other: nn.Module, start: nn.Module) -> None:
    """Equal weights: to far less than the pull has moved them."""
    for (name, a), (_, b), (_, c) in zip(*(m.named_parameters() for m in (one, other, start)), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name
        # The bias of the keys changes no attention.
        assert "key.bias" in name or not torch.equal(a, c), name


def is_pretrained(name: str) -> bool:
    return not name.startswith("classifier")


# --------------------------------------------------------------------------- what people have


def summed(model: nn.Module, start: dict[str, Tensor]) -> Tensor:
    return sum(((p - start[n]) ** 2).sum() for n, p in model.named_parameters() if is_pretrained(n))


def halved(model: nn.Module, start: dict[str, Tensor]) -> Tensor:
    """As in the paper, and in thuml's `SPRegularization` and `L2Regularization`."""
    pull = sum(0.5 * torch.norm(p - start[n]) ** 2 for n, p in model.named_parameters() if is_pretrained(n))
    new = sum(0.5 * torch.norm(p) ** 2 for n, p in model.named_parameters() if not is_pretrained(n))
    return STRENGTH * pull + 0.03 * new


class AddsInComputeLoss(Trainer):
    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "start"):
            self.start = {name: p.detach().clone() for name, p in model.named_parameters()}
        return super().compute_loss(model, *args, **kwargs) + STRENGTH * summed(model, self.start)


# --------------------------------------------------------------------------- and what it is here


def test_paper_and_thuml(trained, by_hand, build):
    # ‖θ − θ0‖ has no gradient at 0, where PyTorch's is 0 as well.
    theirs = by_hand(halved)
    require_same(trained(l2sp_lambda=told("L2-SP's paper"), l2sp_beta=0.03 / 2), theirs, build())
    with pytest.raises(AssertionError):
        require_same(trained(l2sp_lambda=STRENGTH, l2sp_beta=0.03 / 2), theirs, build())


@pytest.mark.parametrize(("divided", "factor"), [(True, 1), (False, 4)])
def test_loop_over_parameters(trained, by_hand, build, divided, factor):
    theirs = by_hand(lambda *given: STRENGTH * summed(*given), accumulation=4, divided=divided)
    require_same(trained(l2sp_lambda=factor * told("a loop over"), accumulation=4), theirs, build())


@pytest.mark.parametrize("accumulation", [1, 4])
def test_compute_loss_of_a_subclass(trained, build, accumulation):
    theirs = trained(AddsInComputeLoss, accumulation)
    require_same(trained(accumulation=accumulation, l2sp_lambda=told("`compute_loss` of")), theirs, build())


def test_elastic_weight_consolidation(trained, by_hand, build, tmp_path):
    torch.manual_seed(2)
    fisher = {n: 5 * torch.rand_like(p) for n, p in build().named_parameters() if is_pretrained(n)}
    save_file(fisher, tmp_path / "fisher.safetensors")

    def penalty(model: nn.Module, start: dict[str, Tensor]) -> Tensor:
        named = dict(model.named_parameters())
        return STRENGTH / 2 * sum((f * (named[name] - start[name]) ** 2).sum() for name, f in fisher.items())

    ours = trained(l2sp_lambda=told("EWC"), l2sp_weights=str(tmp_path / "fisher.safetensors"))
    require_same(ours, by_hand(penalty), build())


@pytest.mark.parametrize("row", ["weight decay towards θ0", "RecAdam"])
def test_decoupled(trained, by_hand, build, row):
    """RecAdam where s(t) is 0, at the beginning of its course."""
    try:
        ours = trained(l2sp_lambda=told(row), l2sp_mode="decoupled")
    except ValueError as error:
        if "is not available" in str(error):
            pytest.skip(str(error))
        raise

    def decay(model: nn.Module, before: dict[str, Tensor], start: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if is_pretrained(name):
                    p.sub_(RATE * STRENGTH * (before[name] - start[name]))

    require_same(ours, by_hand(after=decay), build())
