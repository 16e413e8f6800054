"""The model card's L2-SP section, from a template."""

from __future__ import annotations

import os
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from transformers.utils import logging

from .card_scores import add_scores
from .plan import ROLES
from .public import CARD_NAME, clean_card, is_local

if TYPE_CHECKING:
    from .report import DriftReport

logger = logging.get_logger(__name__)

TAGS = ("l2-sp", "hf-l2sp")
REPORT_NAME, PICTURE_NAME = "l2sp_report.json", "l2sp_report.png"
_START, _END = "<!-- l2-sp -->", "<!-- /l2-sp -->"

_SECTION = Template(
    """$start
## How it was fine-tuned: L2-SP

A penalty kept the weights θ near those of the pretrained model, θ0, while they learned the task:

    task loss + λ · Σ w‖θ − θ0‖²        (no ½ in front of λ)

| | |
|---|---|
| anchor θ0 | $source |
| λ | $strength |
| schedule | $schedule |
| mode | $mode |
| β (pull of new parameters to 0) | $beta |$alpha
| anchored / new / frozen / excluded numbers | $counts |
| drift ‖θ − θ0‖ / ‖θ0‖ | $drift |
| fingerprint of θ0 | `$fingerprint` |

$files. Made with hf_l2sp $version.
$again
If you use this model, please cite the method:

```bibtex
@inproceedings{li2018explicit,
  title     = {Explicit Inductive Bias for Transfer Learning with Convolutional Networks},
  author    = {Li, Xuhong and Grandvalet, Yves and Davoine, Franck},
  booktitle = {International Conference on Machine Learning},
  year      = {2018},
  url       = {https://arxiv.org/abs/1802.01483}
}
```
$end
"""
)


_PICTURE = f"![Relative drift of each layer from θ0, and the course of training]({PICTURE_NAME})\n\n"
_AGAIN = Template(
    """
θ0 is to be had again, for a model with the same trainable parameters, by

```python
from hf_l2sp import Anchor

anchor = Anchor.from_pretrained($arguments)  # its fingerprint is the one above
```
"""
)


def l2sp_section(report: DriftReport, base_model: str | None = None, files: tuple[str, ...] = ()) -> str:
    """The section in Markdown; local paths are not shown.

    Args:
        report: Of the model.
        base_model: Hub id that the card names; where θ0 came from a folder, the model that the folder is said to hold.
        files: Which of `l2sp_report.json` and `l2sp_report.png` lie beside the card.
    """
    from . import __version__

    counts, alpha = report.counts, report.settings.get("alpha")
    told = "`l2sp_state.json` identifies θ0"
    if REPORT_NAME in files:
        told += f"; [`{REPORT_NAME}`]({REPORT_NAME}) has the drift of every layer"
    return _SECTION.substitute(
        start=_START,
        end=_END,
        source=_described_source(report, base_model),
        strength=f"{report.settings['lambda']:g}",
        schedule=report.settings["schedule"],
        mode=report.settings["mode"],
        beta=f"{report.settings['beta']:g}",
        alpha="" if alpha is None else f"\n| interpolated: θ0 + α(θ − θ0), α | {alpha:g} |",
        counts=" / ".join(f"{counts[role]:,}" for role in ROLES),
        drift=f"{report.total.drift:.4f}",
        fingerprint=report.anchor["fingerprint"],
        files=(_PICTURE if PICTURE_NAME in files else "") + told,
        again=_how_to_have_it_again(report),
        version=__version__,
    )


def add_l2sp_section(
    folder: str | os.PathLike[str],
    report: DriftReport,
    files: tuple[str, ...] = (),
    scores: dict[str, dict[str, float]] | None = None,
    model: str = "",
    about: dict[str, Any] | None = None,
) -> None:
    """Completes the card `README.md` in a folder: tags, base model, results, L2-SP section; no paths are left in it.

    A second call replaces the section.

    Args:
        folder: Where the card is.
        report: Of the model.
        files: Which of `l2sp_report.json` and `l2sp_report.png` lie beside it.
        scores: Metrics by split for the metadata; None leaves those alone.
        model: Name of the model's class.
        about: What `create_model_card` was told.
    """
    path = Path(folder) / CARD_NAME
    card = ModelCard.load(path)
    clean_card(card)
    tags = card.data.tags or []
    tags = [tags] if isinstance(tags, str) else tags
    card.data.tags = [*(tag for tag in tags if tag not in TAGS), *TAGS]
    base_model = card.data.get("base_model") or _public_source(report)
    if base_model:
        card.data.base_model = base_model
    if scores is not None:
        add_scores(card, scores, model, about or {})
    text = card.text
    if _START in text and _END in text:
        text = text[: text.index(_START)] + text[text.index(_END) + len(_END) :]
    # transformers' wording where the base model is a folder; nothing here is trained from scratch.
    text = text.replace("This model was trained from scratch on", "This model was fine-tuned on")
    text = text.replace("on the None dataset.", "on an unknown dataset.")  # data that were made in memory
    named = base_model if isinstance(base_model, str) else None
    card.text = text.rstrip() + "\n\n" + l2sp_section(report, named, files)
    card.save(path)


def write_report(folder: str | os.PathLike[str], report: DriftReport) -> tuple[str, ...]:
    """Writes the drift report, as a picture too where matplotlib is installed; returns the names of the files."""
    report.save(Path(folder) / REPORT_NAME)
    try:
        report.plot(Path(folder) / PICTURE_NAME)
    except ImportError as error:
        logger.info(str(error))
        return (REPORT_NAME,)
    return (REPORT_NAME, PICTURE_NAME)


def _described_source(report: DriftReport, base_model: str | None) -> str:
    source, revision = _public_source(report), report.anchor["revision"]
    if source is not None:
        return f"{source} at {revision}" if revision else source
    if report.anchor["source"] and base_model:
        return f"a local copy of {base_model}"
    return "the pretrained weights that the trainer was given"


def _how_to_have_it_again(report: DriftReport) -> str:
    source, revision = _public_source(report), report.anchor["revision"]
    if source is None:
        return ""
    options = {"revision": revision, "exclude": report.settings.get("exclude")}
    arguments = [repr(source), "model", *(f"{name}={value!r}" for name, value in options.items() if value)]
    return _AGAIN.substitute(arguments=", ".join(arguments))


def _public_source(report: DriftReport) -> str | None:
    """The anchor's Hub id; a path of this machine is nobody else's business."""
    source = report.anchor["source"]
    return None if not source or is_local(source) else str(source)
