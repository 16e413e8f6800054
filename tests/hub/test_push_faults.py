"""Pushes that fail: what is told, what is on disk, and that the second try brings what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import worker
from .conftest import BASE, Remote

PREUPLOAD, COMMIT, LARGE, CREATE = "preupload", "/commit/", "^PUT /large/", "repos/create"


@pytest.fixture(scope="module")
def out(remote: Remote) -> Iterator[str]:
    """Folder of a trained model that was never saved; where it is pushed from has no matplotlib."""
    remote(worker.matplotlib_is_there, False)
    folder = str(remote.home / "faulty")
    remote(worker.train, folder, BASE)
    yield folder
    remote(worker.matplotlib_is_there, True)


@pytest.mark.parametrize(
    ("pattern", "fault", "times", "told"),
    [
        pytest.param(PREUPLOAD, 401, 9, "Log in with 'hf auth login', or set hub_token.", id="401"),
        pytest.param(CREATE, 403, 9, "Take a token that may write to this repository", id="no repository"),
        pytest.param(LARGE, "drop", 99, "Check the connection to the Hub.", id="dropped file"),
        pytest.param(COMMIT, 500, 9, "The Hub has a trouble of its own", id="500"),
        pytest.param(PREUPLOAD, 403, 9, "Take a token that may write", id="403", marks=pytest.mark.slow),
        pytest.param(COMMIT, 409, 9, "Another process has changed", id="409", marks=pytest.mark.slow),
        pytest.param(LARGE, 500, 99, "The Hub has a trouble", id="500 of a file", marks=pytest.mark.slow),
        pytest.param(COMMIT, "drop", 9, "Check the connection", id="dropped commit", marks=pytest.mark.slow),
    ],
)
def test_failed_push(
    remote: Remote, out: str, pattern: str, fault: int | str, times: int, told: str, tmp_path: Path
) -> None:
    repo = f"team/faulty-{fault}-{len(pattern)}"
    remote(worker.rename, out, repo)
    remote.hub.large.clear()
    remote.hub.faults.append((pattern, fault, times))
    failed = remote(worker.push, out)
    assert failed["error"] == "PushError" and failed["is_os_error"], failed
    assert failed["cause"] not in ("NoneType", "PushError")
    message = failed["message"]
    assert message.startswith(f"The push to {repo!r} failed: ")
    assert f"Nothing is lost: the model is complete in {out!r}" in message
    assert told in message and f"push_folder({out!r}, {repo!r})" in message
    assert "\n" not in message
    # It is what it says.
    assert remote(worker.same_weights, out, out, str(tmp_path))
    assert json.loads((Path(out) / "l2sp_state.json").read_text())["complete"] is True

    remote.hub.faults.clear()
    sent = {request for request in remote.new_requests() if request.startswith("PUT") and request.endswith("200")}
    assert "commit" in remote(worker.push, out)
    again = {request for request in remote.new_requests() if request.startswith("PUT")}
    assert not sent & again  # large files that had arrived
    assert remote(worker.same_weights, out, repo, str(tmp_path / "cache"))


def test_short_trouble_is_not_noticed(remote: Remote, out: str) -> None:
    remote(worker.rename, out, "team/short-trouble")
    remote.hub.large.clear()
    remote.hub.faults += [(LARGE, 503, 2), (LARGE, "drop", 1)]
    result = remote(worker.push, out)
    assert "commit" in result, result
    asked = remote.new_requests()
    assert sum(request.endswith(("503", "dropped")) for request in asked) == 3
    files = remote.hub.repositories["team/short-trouble"].files
    assert "l2sp_report.json" in files and "l2sp_report.png" not in files
    assert b"l2sp_report.png" not in files["README.md"]


def test_failed_push_is_made_good_without_the_trainer(remote: Remote, out: str, tmp_path: Path) -> None:
    repo = "team/without-trainer"
    remote(worker.rename, out, repo)
    remote.hub.faults.append((COMMIT, 500, 1))
    assert "error" in remote(worker.push, out)
    commit = remote(worker.push_again_by_folder, out, repo, private=True)
    assert remote.hub.repositories[repo].commits[-1][0] == commit
    assert remote(worker.same_weights, out, repo, str(tmp_path))
    assert "training_args.bin" not in remote.hub.repositories[repo].files


def test_not_blocking(remote: Remote, out: str) -> None:
    remote(worker.rename, out, "team/not-blocking")
    remote.hub.faults.append((COMMIT, 500, 1))
    failed = remote(worker.push, out, blocking=False)
    assert failed["error"] == "PushError"
    assert failed["messages"] == [f"In the background: {failed['message']}"]
    assert "commit" in remote(worker.push, out, blocking=False)


def test_failed_push_in_the_background_ends_nothing_and_is_told(remote: Remote, tmp_path: Path) -> None:
    out = str(remote.home / "background")
    remote.hub.faults.append((COMMIT, 500, 1))
    saving = {"save_strategy": "steps", "save_steps": 2, "hub_always_push": True, "save_total_limit": 1}
    result = remote(worker.train, out, BASE, max_steps=4, push_to_hub=True, hub_model_id="team/background", **saving)
    assert result["steps"] == 4
    (message,) = result["messages"]
    assert message.startswith("In the background: The push to 'team/background' failed: ") and "500" in message
    commits = remote.hub.repositories["team/background"].commits
    assert [text for _, text, _ in commits] == ["initial commit", "Training in progress, step 4"]
    assert {"model.safetensors", "l2sp_state.json"} <= commits[-1][2].keys()
    assert remote(worker.same_weights, out, "team/background", str(tmp_path))


@pytest.mark.parametrize(("fault", "told"), [(401, "hf auth login"), (403, "token that may write")])
def test_constructor_says_why_there_is_no_repository(remote: Remote, fault: int, told: str) -> None:
    remote.hub.faults += [(CREATE, fault, 1)]
    arguments = {"push_to_hub": True, "hub_model_id": "team/never"}
    error, message, cause = remote(worker.construct, str(remote.home / "never"), BASE, **arguments)
    assert error == "PushError" and cause.endswith("Error")
    assert message.startswith("The repository 'team/never' cannot be opened: ") and told in message
    assert message.endswith("or leave out push_to_hub.")


def test_no_folder(remote: Remote) -> None:
    with pytest.raises(ValueError, match="There is no folder 'nowhere' to push"):
        remote(worker.push_again_by_folder, "nowhere", "team/nowhere")
