"""A Hub on this machine, and a process that knows no other."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import pytest

from ..end_to_end.recipe_harness import save_tiny_model
from . import worker
from .server import TOKEN, Hub, Repository, running_hub

BASE = "org/base"


class Remote:
    """Calls functions of `worker` in the other process.

    Attributes:
        hub: The server.
        home: Home folder of that process; all that the tests write is beside it.
        local_base: Folder of the pretrained model, which is also on the Hub.
        environment: What makes this Hub the one of a process.
    """

    def __init__(
        self, hub: Hub, pool: ProcessPoolExecutor, home: Path, local_base: str, environment: dict[str, str]
    ) -> None:
        self.hub = hub
        self.home = home
        self.local_base = local_base
        self.environment = environment
        self._pool = pool

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._pool.submit(function, *args, **kwargs).result(timeout=300)

    def new_requests(self) -> list[str]:
        """What was asked since the last call."""
        asked = list(self.hub.requests)
        self.hub.requests.clear()
        return asked


@pytest.fixture(scope="session")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    home = tmp_path_factory.mktemp("somebody") / "home"
    home.mkdir()
    local_base = save_tiny_model(home / "private_base")
    with running_hub() as (hub, address):
        hub.repositories[BASE] = Repository(private=False)
        files = {path.name: path.read_bytes() for path in Path(local_base).iterdir()}
        hub.repositories[BASE].add("base", files)
        environment = {
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home / "hf_home"),
            "HOME": str(home),
            "MPLCONFIGDIR": matplotlib.get_cachedir(),  # its list of fonts takes long to make
            "OMP_NUM_THREADS": "1",
            "no_proxy": "*",
        }
        context = multiprocessing.get_context("spawn")
        with mock.patch.dict(os.environ, environment):
            pool = ProcessPoolExecutor(1, mp_context=context, initializer=worker.start)
            pool.submit(len, "").result(timeout=300)  # it is started, with this environment
        with pool:
            yield Remote(hub, pool, home, local_base, environment)


@pytest.fixture(autouse=True)
def _no_faults_are_left(remote: Remote) -> Iterator[None]:
    remote.hub.requests.clear()
    yield
    remote.hub.faults.clear()
