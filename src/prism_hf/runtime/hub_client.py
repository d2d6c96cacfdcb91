"""Which failures of the Hub pass by themselves, how long to wait for them, and what the others mean, in one line."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import httpx2
from huggingface_hub import get_token, set_client_factory
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import _http

from ..errors import HubError

log = logging.getLogger(__name__)
T = TypeVar("T")

PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 60.0, 60.0)
"""Seconds between tries: four minutes in all, time enough for a restart of the Hub or of a router."""

SHORT = (1.0, 2.0, 4.0, 8.0)
"""For a check that somebody is waiting for."""

HUB_ERRORS = (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError, ValueError)
"""All that the Hub's clients raise: LFS wraps into RuntimeError, Xet into ConnectionError, and an HTML page where JSON was
expected makes a JSONDecodeError, which is a ValueError."""

_TIMEOUT = httpx2.Timeout(30.0, read=300.0, write=120.0)  # the library's own is none at all; a big commit may take minutes
_LONGEST_PAUSE = 300.0
_TEMPORARY = frozenset({408, 409, 412, 425, 429})
_MEANINGS = {
    401: "the Hub does not accept the token; set HF_TOKEN to a valid one, or run `hf auth login`",
    402: "the Hub wants payment for this (private storage?); see the billing page of the account",
    403: "the token has no right to do this; use one that may write there",
    404: "not found on the Hub, or not visible with this token",
}


def again(attempt: Callable[[], T], doing: str, pauses: Sequence[float] = PAUSES) -> T:
    """Run `attempt` until it succeeds, fails for good, or has been tried once more than there are pauses.

    Args:
        attempt: Reads afresh what it builds upon, so that running it again is safe.
        doing: Says in errors and logs what failed.
        pauses: Seconds between tries; a longer Retry-After is obeyed, up to five minutes.

    Raises:
        HubError: One line: what failed, why, and what to do.
    """
    for pause in (*pauses, None):
        try:
            _limit_time()
            return attempt()
        except HubError:
            raise
        except HUB_ERRORS as error:
            reason = explain(error)
            if not passes(error):
                raise HubError(f"{doing} failed: {reason}") from error
            if pause is None:
                raise HubError(
                    f"{doing} failed {len(pauses) + 1} times: {reason}; run the same command again later"
                ) from error
            wait = max(pause, _asked_to_wait(error))
            log.info("%s: %s; trying again in %g s", doing, reason, wait)
            time.sleep(wait)
    raise AssertionError("the loop returns or raises")


def _limit_time() -> None:
    """Give the library's requests a time limit, also those of a session that replaces one whose connection broke."""
    # There is no public name for the default; a factory that somebody has set (a proxy's) stays.
    if _http._GLOBAL_CLIENT_FACTORY is _http.default_client_factory:
        set_client_factory(_client)


def _client() -> httpx2.Client:
    client = _http.default_client_factory()
    client.timeout = _TIMEOUT
    return client


def passes(error: BaseException) -> bool:
    """Whether an error of the Hub's clients may be gone at the next try."""
    if isinstance(error, OfflineModeIsEnabled | GatedRepoError):
        return False
    status = status_of(error)
    if status is not None:
        return status in _TEMPORARY or status >= 500
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return False
    # A file of ours that cannot be read has a name; a broken connection has none.
    return not (isinstance(error, OSError) and error.filename is not None)


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, through what wrapped it; Xet tells it in words alone."""
    for link in _chain(error):
        if isinstance(link, HfHubHTTPError | httpx2.HTTPStatusError):
            return int(link.response.status_code)
        if isinstance(link, ConnectionError):
            found = re.search(
                r"\b(?:HTTP status|status(?: code)?)\W{0,3}(?:client error|server error)?\W{0,3}(\d{3})\b", str(link), re.I
            )
            if found:
                return int(found[1])
    return None


def explain(error: BaseException) -> str:
    """One line on an error, without the token."""
    status, cause = status_of(error), list(_chain(error))[-1]
    # What wrapped it says little: "Error while uploading".
    told = next((link for link in _chain(error) if isinstance(link, HfHubHTTPError)), cause)
    text = " ".join((getattr(told, "server_message", None) or str(told) or type(told).__name__).split())[:240]
    token = get_token()
    if token:
        text = text.replace(token, "***")
    if isinstance(told, json.JSONDecodeError):
        return "it does not answer as a Hub does; check HF_ENDPOINT and the proxy (JSONDecodeError)"
    meaning = f"{_MEANINGS[status]} ({status})" if status in _MEANINGS else type(told).__name__
    return f"{meaning}: {text}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _asked_to_wait(error: BaseException) -> float:
    for link in _chain(error):
        if isinstance(link, HfHubHTTPError | httpx2.HTTPStatusError):
            asked = link.response.headers.get("Retry-After", "")
            return min(float(asked), _LONGEST_PAUSE) if asked.isdecimal() else 0.0
    return 0.0
