"""Fixtures for the test Hub: `from hub_fixtures import hub, online, transport  # noqa: F401`.

A test file that imports them also needs `# ruff: noqa: F811`.
"""

import time
import types
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import XET_ENV, HubServer
from huggingface_hub.utils import _http, _xet

_running: list[HubServer] = []


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """Yield an empty Hub; the whole session shares one server."""
    if not _running:
        _running.append(HubServer().start())
    server = _running[0]
    server.reset()
    yield server
    assert not server.unknown
    assert not server.crashes
    assert not server.leaks


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the clients in this process connect to the test Hub, with caches that only this test uses."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    # A Xet session remembers its uploads, but the server has been reset since then.
    monkeypatch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())
    _xet.XET_CONNECTION_INFO_CACHE.clear()


# The Hub's default is Xet; tests/hub/test_hub_faults.py tries LFS by default too.
@pytest.fixture(params=[pytest.param("lfs", marks=pytest.mark.slow), "xet"])
def transport(request: pytest.FixtureRequest, online: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Select the transfer protocol for large files: LFS or Xet."""
    for name, value in XET_ENV.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the back-off pauses of huggingface_hub to at most 5 ms."""
    quick = types.SimpleNamespace(**vars(time))
    quick.sleep = lambda seconds: time.sleep(min(seconds, 0.005))
    monkeypatch.setattr(_http, "time", quick)


@pytest.fixture
def connected(hub: HubServer, transport: str, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """Make the test Hub the default endpoint of this process, with the token of user ann, a member of org."""
    fast_retries(monkeypatch)
    huggingface_hub.utils.disable_progress_bars()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ann", token="hf_secret_token", orgs=("org",)))
    return hub
