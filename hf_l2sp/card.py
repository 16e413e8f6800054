"""The model card's L2-SP section, from a template."""

from __future__ import annotations

import os
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard

from .plan import ROLES

if TYPE_CHECKING:
    from .report import DriftReport

TAGS = ("l2-sp", "hf-l2sp")
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
| β (pull of new parameters to 0) | $beta |
| anchored / new / frozen / excluded numbers | $counts |
| drift ‖θ − θ0‖ / ‖θ0‖ | $drift |
| fingerprint of θ0 | `$fingerprint` |

`l2sp_state.json` identifies θ0. Made with hf_l2sp $version. If you use this model, please cite the method:

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


def l2sp_section(report: DriftReport) -> str:
    """The section in Markdown; local paths are not shown."""
    from . import __version__

    counts = report.counts
    return _SECTION.substitute(
        start=_START,
        end=_END,
        source=_described_source(report),
        strength=f"{report.settings['lambda']:g}",
        schedule=report.settings["schedule"],
        mode=report.settings["mode"],
        beta=f"{report.settings['beta']:g}",
        counts=" / ".join(f"{counts[role]:,}" for role in ROLES),
        drift=f"{report.total.drift:.4f}",
        fingerprint=report.anchor["fingerprint"],
        version=__version__,
    )


def add_l2sp_section(folder: str | os.PathLike[str], report: DriftReport) -> None:
    """Adds tags, base model and the L2-SP section to the card `README.md` in a folder; a second call replaces it."""
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    tags = card.data.tags or []
    tags = [tags] if isinstance(tags, str) else tags
    card.data.tags = [*(tag for tag in tags if tag not in TAGS), *TAGS]
    source = _public_source(report)
    if source and not card.data.get("base_model"):
        card.data.base_model = source
    text = card.text
    if _START in text and _END in text:
        text = text[: text.index(_START)] + text[text.index(_END) + len(_END) :]
    # transformers' wording where the base model is a folder; nothing here is trained from scratch.
    text = text.replace("This model was trained from scratch on", "This model was fine-tuned on")
    card.text = text.rstrip() + "\n\n" + l2sp_section(report)
    card.save(path)


def _described_source(report: DriftReport) -> str:
    source, revision = _public_source(report), report.anchor["revision"]
    if source is None:
        return "the pretrained weights that the trainer was given"
    return f"{source} at {revision}" if revision else source


def _public_source(report: DriftReport) -> str | None:
    """The anchor's Hub id; a path of this machine is nobody else's business."""
    source = report.anchor["source"]
    if not source or os.path.isabs(source) or os.path.exists(source):
        return None
    return str(source)
