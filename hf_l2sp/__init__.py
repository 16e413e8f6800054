"""L2-SP for the Hugging Face Trainer: fine-tune on little data while the weights stay near the pretrained ones."""

from importlib.metadata import version

# Before the submodules, which name it in their messages.
__version__ = version("hf-l2sp")

from .anchor import Anchor
from .args import L2SPArguments, L2SPSeq2SeqTrainingArguments, L2SPTrainingArguments
from .fisher import estimate_fisher
from .interpolate import interpolate
from .penalty import l2sp_penalty
from .report import DriftReport, drift_report
from .search import l2sp_hp_space
from .trainer import L2SPMixin, L2SPSeq2SeqTrainer, L2SPTrainer

__all__ = [
    "Anchor",
    "DriftReport",
    "L2SPArguments",
    "L2SPMixin",
    "L2SPSeq2SeqTrainer",
    "L2SPSeq2SeqTrainingArguments",
    "L2SPTrainer",
    "L2SPTrainingArguments",
    "drift_report",
    "estimate_fisher",
    "interpolate",
    "l2sp_hp_space",
    "l2sp_penalty",
]
