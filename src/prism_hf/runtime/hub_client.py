"""Hub calls: retry temporary failures, and explain all others in one line."""

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import httpx2
from huggingface_hub import constants, errors, get_token, set_client_factory
from huggingface_hub.utils import _http

from ..errors import HubError
from .untrusted import without_password

log = logging.getLogger(__name__)
T = TypeVar("T")
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 60.0, 60.0)
"""Seconds between tries: four minutes in total, enough for the Hub or a router to restart."""
SHORT = (1.0, 2.0, 4.0, 8.0)  # for a check that a user is waiting for
BRIEF = (0.5, 1.0, 2.0)  # for a request that the cache may be able to answer instead
HUB_ERRORS = (errors.HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError, ValueError)
"""All errors that the Hub's clients raise: LFS raises RuntimeError, Xet ConnectionError, and a page that is not JSON
ValueError."""
UNREACHABLE = (httpx2.ConnectError, httpx2.TimeoutException, httpx2.ProxyError, httpx2.UnsupportedProtocol)
_TIMEOUT = httpx2.Timeout(30.0, read=300.0, write=120.0)  # the library sets no limit; a big commit may take minutes
_LONGEST_PAUSE = 300.0
_TEMPORARY = frozenset({408, 409, 412, 425, 429})
_LONGEST_TEXT = 240
_BAD_TOKEN = (httpx2.LocalProtocolError, UnicodeEncodeError)
"""Errors raised for a token that is not valid in an HTTP header. Their text quotes the token."""
_STATED = re.compile(r"\b(?:HTTP status|status(?: code)?)\W{0,3}(?:client error|server error)?\W{0,3}(\d{3})\b", re.I)
_TELLING = (HubError, errors.OfflineModeIsEnabled, httpx2.HTTPError, json.JSONDecodeError, UnicodeEncodeError)
"""Errors that say more than one that wraps them ("Error while uploading") or one that they wrap (a socket error)."""
_SENTENCES: dict[int | type | tuple[type, ...], str] = {
    errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE=1 is set, and it is not in the cache; unset HF_HUB_OFFLINE, or run once "
    "with a network connection",
    errors.GatedRepoError: "{repo} is gated ({status}); request access at {page}, then set HF_TOKEN or run "
    "`hf auth login` with the account that has access",
    errors.RepositoryNotFoundError: "{repo} is not on the Hub, or it is private ({status}); check the spelling, or "
    "set HF_TOKEN or run `hf auth login` with an account that has read access",
    errors.RevisionNotFoundError: "{repo} has no such revision ({status}); expected one of its branches, tags or commits",
    json.JSONDecodeError: "{hub} does not answer like a Hub; check HF_ENDPOINT and the proxy",
    _BAD_TOKEN: "the token contains invalid characters; set HF_TOKEN to a valid one or run `hf auth login`",
    (httpx2.ReadError, httpx2.RemoteProtocolError): "{hub} closed the connection ({error})",
    httpx2.TransportError: "{hub} is not reachable ({error})",
    401: "the Hub does not accept the token ({status}: {text}); set HF_TOKEN to a valid one or run `hf auth login`, or "
    "unset it to read public repos",
    402: "the Hub requires payment ({status}: {text}), perhaps for private storage; see the billing page of the account",
    403: "the token does not have permission to do this ({status}: {text}); use one with read or write access there",
    404: "not found on the Hub, or not visible with this token ({status}: {text})",
    (errors.HfHubHTTPError, httpx2.HTTPStatusError): "{hub} answers {status}: {text}",
    Exception: "{error}: {text}",
}
"""Error or HTTP status -> what it means and what to do; the first match is used."""


def again(
    attempt: Callable[[], T], doing: str, pauses: Sequence[float] = PAUSES, *, at_once: tuple[type[Exception], ...] = ()
) -> T:
    """Call `attempt` until it succeeds, fails permanently, or has been tried once more than there are pauses (in seconds).

    `attempt` must reread everything it depends on, so that it is safe to repeat. A longer Retry-After is respected, up to
    five minutes. Errors in `at_once` are not retried although they may be temporary: the caller can do without the Hub. The
    `HubError` says in one line what failed, why, and what to do. Its `away` is true if the same command may work later.
    """
    for pause in (*pauses, None):
        try:
            # The default has no public name. A factory that somebody else has set (for a proxy) is kept.
            if _http._GLOBAL_CLIENT_FACTORY is _http.default_client_factory:
                set_client_factory(_client)
            return attempt()
        except HubError:
            raise
        except HUB_ERRORS as error:
            reason = explain(error)
            if not passes(error):
                raise HubError(f"{doing} failed: {reason}") from error
            if pause is None or isinstance(error, at_once):
                times = "" if pause is not None else f" {len(pauses) + 1} times"
                raise HubError(f"{doing} failed{times}: {reason}; run the same command again later", away=True) from error
            answer = _answer(error)
            wish = "" if answer is None else answer.headers.get("Retry-After", "")
            wait = max(pause, min(float(wish), _LONGEST_PAUSE) if wish.isdecimal() else 0.0)
            log.info("%s: %s; trying again in %g s", doing, reason, wait)
            time.sleep(wait)
    raise AssertionError("the loop returns or raises")


def _client() -> httpx2.Client:
    """Return the library's client with a time limit. The library also calls this after a broken connection."""
    client = _http.default_client_factory()
    client.timeout = _TIMEOUT
    return client


def passes(error: BaseException) -> bool:
    """Return whether an error of the Hub's clients is temporary, so that the next try may succeed."""
    lasting = errors.OfflineModeIsEnabled | errors.GatedRepoError | httpx2.LocalProtocolError
    if any(isinstance(link, lasting) for link in _chain(error)):
        return False
    status = status_of(error)
    if status is not None:
        return status in _TEMPORARY or status >= 500
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return False
    # An error about a local file has a filename; one about a broken connection does not.
    return not (isinstance(error, OSError) and error.filename is not None)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error or of one that it wraps, or `None`. Xet gives the status in its message only."""
    if (answer := _answer(error)) is not None:
        return int(answer.status_code)
    stated = (_STATED.search(str(link)) for link in _chain(error) if isinstance(link, ConnectionError))
    return next((int(match[1]) for match in stated if match), None)


def explain(error: BaseException) -> str:
    """Explain an error in one line, without the token: what it means and what to do."""
    links = list(_chain(error))
    cause = next((link for link in links if isinstance(link, _TELLING)), links[-1])
    if isinstance(cause, HubError):
        return str(cause)
    status = status_of(error)
    sentence = next(
        text
        for case, text in _SENTENCES.items()
        if case == status or (not isinstance(case, int) and isinstance(cause, case))
    )
    repo, kind = getattr(cause, "repo_id", None), getattr(cause, "repo_type", None)
    page = f"{without_password(constants.ENDPOINT)}/{'datasets/' if kind == 'dataset' else ''}{repo or ''}"
    text = str(cause) or "no reason given"
    if isinstance(cause, errors.HfHubHTTPError):  # its own text is long, and its advice does not apply here
        text = cause.server_message or f"{cause.response.reason_phrase} at {cause.response.url.path}"
    return sentence.format(
        hub=hub_name(),
        repo=f"{kind} {repo}" if repo else "it",
        page=page,
        status=status,
        error=type(cause).__name__,
        text=without_password(" ".join(text.split()).replace(get_token() or "\0", "***"))[:_LONGEST_TEXT],
    )


def hub_name() -> str:
    """Return the name of the Hub for messages."""
    return f"the Hub at {without_password(constants.ENDPOINT)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _answer(error: BaseException) -> httpx2.Response | None:
    links = (link for link in _chain(error) if isinstance(link, errors.HfHubHTTPError | httpx2.HTTPStatusError))
    return next((link.response for link in links), None)
