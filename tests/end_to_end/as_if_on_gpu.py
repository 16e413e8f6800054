"""The main recipe on the CPU under the FSDP and DeepSpeed configurations: accelerate is told that it is a GPU.

Everything else is as in a real launch: `accelerate launch --config_file ... tests/end_to_end/as_if_on_gpu.py ...`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
os.environ["DS_ACCELERATOR"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

from accelerate.state import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)

import medical_textcls  # noqa: E402

if __name__ == "__main__":
    medical_textcls.main()
