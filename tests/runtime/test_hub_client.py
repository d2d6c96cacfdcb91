import json

import httpx2
import pytest
from huggingface_hub import set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http, get_session
from huggingface_hub.utils._http import close_session

from prism_hf.errors import HubError
from prism_hf.runtime.hub_client import UNREACHABLE, again, explain, passes, status_of


def http(status, kind=HfHubHTTPError, text="it says so", **headers):
    request = httpx2.Request("GET", "https://hub.example/api")
    return kind(text, response=httpx2.Response(status, headers=headers, request=request), server_message=text)


def raised(error, cause=None):
    try:
        raise error from cause
    except type(error) as caught:
        return caught


def wrapped(outer, inner):
    return raised(outer, inner)


def broken_json():
    try:
        json.loads("<html>")
    except json.JSONDecodeError as error:
        return error


def odd_token():
    try:
        "Bearer hf_x\u20ac".encode("ascii")
    except UnicodeEncodeError as error:
        return error


XET = "Network error: Request error: HTTP status {} ({} reason), domain: http://127.0.0.1/v1/shards"
CASES = [
    *[(http(status), status, True) for status in (408, 409, 412, 425, 429, 500, 502, 503, 504)],
    *[(http(status), status, False) for status in (400, 401, 402, 403, 404, 413, 422)],
    (http(403, GatedRepoError), 403, False),
    (OfflineModeIsEnabled("offline"), None, False),
    (httpx2.ReadError("reset"), None, True),
    (httpx2.ConnectError("refused"), None, True),
    (ConnectionError(XET.format("server error", 503)), 503, True),
    (ConnectionError(XET.format("client error", 401)), 401, False),
    (ConnectionError(XET.format("client error", 403)), 403, False),
    (ConnectionError("Network error: reset by peer after 403 bytes"), None, True),
    (wrapped(RuntimeError("Error while uploading 'x'"), http(503)), 503, True),
    (wrapped(RuntimeError("Error while uploading 'x'"), http(403)), 403, False),
    (wrapped(RuntimeError("Error while uploading 'x'"), httpx2.ReadError("reset")), None, True),
    (wrapped(LocalEntryNotFoundError("no head"), http(401)), 401, False),
    (LocalEntryNotFoundError("no head"), None, True),
    (broken_json(), None, True),
    (ValueError("Invalid metadata in README.md"), None, False),
    (FileNotFoundError(2, "No such file", "/data/x.parquet"), None, False),
    (PermissionError(13, "Permission denied", "/data/x.parquet"), None, False),
    (ConnectionResetError(104, "Connection reset by peer"), None, True),
]


@pytest.mark.parametrize(("error", "status", "temporary"), CASES, ids=lambda value: str(value)[:40])
def test_temporary_errors_are_distinguished_from_permanent_ones(error, status, temporary):
    assert status_of(error) == status
    assert passes(error) is temporary


def attempts(*outcomes):
    left = list(outcomes)

    def attempt():
        outcome = left.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return attempt, left


def test_attempts_are_repeated_until_one_succeeds():
    attempt, left = attempts(http(503), httpx2.ReadError("x"), broken_json(), "done", "never")
    assert again(attempt, "doing", (0, 0, 0)) == "done"
    assert left == ["never"]


def test_no_attempt_follows_the_last_pause_and_failure():
    attempt, left = attempts(*[http(503)] * 5)
    with pytest.raises(HubError, match=r"doing failed 3 times: .*run the same command again") as error:
        again(attempt, "doing", (0, 0))
    assert len(left) == 2
    assert isinstance(error.value.__cause__, HfHubHTTPError)


@pytest.mark.parametrize("error", [http(401), http(403), ValueError("bad"), HubError("ours")], ids=str)
def test_permanent_errors_are_not_retried(error):
    attempt, left = attempts(error, "never")
    with pytest.raises(HubError):
        again(attempt, "doing", (0, 0))
    assert left == ["never"]


def test_errors_unrelated_to_the_hub_are_not_hidden():
    attempt, _ = attempts(KeyError("a defect of ours"))
    with pytest.raises(KeyError):
        again(attempt, "doing", (0,))


@pytest.mark.parametrize(("asked", "waited"), [("0", 0), ("7", 7), ("9999", 300), ("soon", 0), ("Wed, 21 Oct 2026", 0)])
def test_retry_after_is_respected_up_to_five_minutes(monkeypatch, asked, waited):
    seen = []
    monkeypatch.setattr("time.sleep", seen.append)
    attempt, _ = attempts(http(429, **{"Retry-After": asked}), "done")
    assert again(attempt, "doing", (0,)) == "done"
    assert seen == [waited]


def test_an_error_message_is_one_line_without_the_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
    line = explain(http(401, text="a\nb hf_secret_token " + "long " * 200))
    assert "\n" not in line
    assert "hf_secret_token" not in line
    assert "hf auth login" in line
    assert len(line) < 400


def test_every_session_has_a_time_limit_even_after_a_failed_connection():
    def attempt():
        before = get_session().timeout.read
        close_session()  # as the library does after a failed connection
        return before, get_session().timeout.read

    assert again(attempt, "doing") == (300, 300)


def test_a_client_configured_by_the_user_is_kept():
    mine = httpx2.Client(timeout=7)
    set_client_factory(lambda: mine)
    try:
        assert again(lambda: get_session().timeout.read, "doing") == 7
    finally:
        set_client_factory(_http.default_client_factory)


SENTENCES = [
    (http(403, GatedRepoError), ["is gated (403)", "request access at", "hf auth login"]),
    (http(404, RepositoryNotFoundError), ["is not on the Hub", "or it is private (404)", "spelling", "HF_TOKEN"]),
    (http(404, RevisionNotFoundError), ["no such revision (404)", "branches, tags or commits"]),
    (http(401), ["does not accept the token (401: it says so)", "HF_TOKEN", "unset it to read public repos"]),
    (http(402), ["requires payment", "402", "billing page"]),
    (http(403), ["not have permission to do this (403: it says so)", "read or write access"]),
    (http(404), ["not found on the Hub, or not visible with this token (404: it says so)"]),
    (http(503), ["the Hub at https://huggingface.co answers 503: it says so"]),
    (wrapped(RuntimeError("Error while uploading 'x'"), http(403)), ["not have permission to do this (403"]),
    (ConnectionError(XET.format("client error", 401)), ["does not accept the token (401"]),
    (broken_json(), ["does not answer like a Hub", "HF_ENDPOINT", "proxy"]),
    (wrapped(httpx2.ConnectError("refused"), OSError(111, "x")), ["is not reachable (ConnectError)"]),
    (httpx2.ReadTimeout("slow"), ["is not reachable (ReadTimeout)"]),
    (httpx2.ReadError("reset"), ["closed the connection (ReadError)"]),
    (httpx2.RemoteProtocolError("cut"), ["closed the connection (RemoteProtocolError)"]),
    (wrapped(LocalEntryNotFoundError("x"), OfflineModeIsEnabled("off")), ["HF_HUB_OFFLINE=1", "cache"]),
    (FileNotFoundError(2, "No such file", "/data/x.parquet"), ["FileNotFoundError", "/data/x.parquet"]),
    (HubError("a line of ours"), ["a line of ours"]),
    (RuntimeError(), ["RuntimeError: no reason given"]),
]


@pytest.mark.parametrize(("error", "words"), SENTENCES, ids=lambda value: str(value)[:40])
def test_each_kind_of_error_has_its_own_message(error, words):
    line = explain(error)
    assert all(word in line for word in words), line
    assert "{" not in line
    assert "\n" not in line


def test_a_message_names_the_repo_its_kind_and_its_page(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://me:password@hub.example")
    error = http(403, GatedRepoError)
    error.repo_id, error.repo_type = "org/set", "dataset"
    line = explain(error)
    assert "dataset org/set is gated" in line
    assert "at https://hub.example/datasets/org/set," in line


@pytest.mark.parametrize("error", [httpx2.LocalProtocolError("Illegal header b'Bearer hf_x\\x0b'"), odd_token()])
def test_a_token_that_is_not_a_valid_header_is_neither_shown_nor_retried(error):
    attempt, rest = attempts(error, "never")
    with pytest.raises(HubError, match="token contains invalid characters") as caught:
        again(attempt, "doing", (0, 0))
    assert rest == ["never"]
    assert "hf_x" not in str(caught.value)


def test_a_caller_that_does_not_need_the_hub_does_not_wait_for_it():
    attempt, rest = attempts(httpx2.ConnectError("refused"), "never")
    with pytest.raises(HubError, match=r"doing failed: .*not reachable") as caught:
        again(attempt, "doing", (9, 9), at_once=UNREACHABLE)
    assert rest == ["never"]
    assert caught.value.away


@pytest.mark.parametrize(("error", "away"), [(http(503), True), (http(403), False), (ValueError("bad"), False)], ids=str)
def test_an_error_tells_whether_the_hub_is_temporarily_unavailable(error, away):
    attempt, _ = attempts(*[error] * 2)
    with pytest.raises(HubError) as caught:
        again(attempt, "doing", (0,))
    assert caught.value.away is away
