"""A local Hub for tests: real clients publish to it and load from it over HTTP, and it fails on demand.

It has two origins, like the real Hub: the Hub (repositories, permissions) and a CDN (large objects and the Xet store).
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import yaml
from hub_xet import XetError, XetStore

LFS_SUFFIXES = (".parquet", ".safetensors", ".bin", ".png", ".webp", ".jpg")
LFS_ABOVE = 10 * 2**20
UNKNOWN_TOKEN = "Invalid credentials in Authorization header"  # the clients compare this text

# Actions: the effects of a fault on a request.


@dataclass(frozen=True)
class Status:
    """Answer with this status and do not apply the request."""

    code: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    html: bool = False


@dataclass(frozen=True)
class Reset:
    """Reset the connection after the request headers arrive."""


@dataclass(frozen=True)
class ResetMidBody:
    """Reset the connection after this many bytes of the request's body."""

    after: int


@dataclass(frozen=True)
class LostAnswer:
    """Apply the request, then reset instead of answering."""


@dataclass(frozen=True)
class CutBody:
    """Announce the full length, send only this many bytes, and end the connection with FIN or RST."""

    after: int
    rst: bool = False


@dataclass(frozen=True)
class Delay:
    """Wait, then continue normally."""

    seconds: float


@dataclass(frozen=True)
class Rival:
    """Run a competing action first, then continue normally."""

    act: Callable[[], object]


Action = Status | Reset | ResetMidBody | LostAnswer | CutBody | Delay | Rival


@dataclass
class Fault:
    """An action and the requests it hits: after `skip` matching requests, the next `times` of them (None: all)."""

    kind: str
    action: Action
    skip: int
    times: int | None
    match: str | None
    fired: int = 0

    def hits(self, request: "Request") -> bool:
        if self.kind != request.kind or (self.match or "") not in request.line or self.fired == self.times:
            return False
        self.skip -= 1
        self.fired += self.skip < 0
        return self.skip < 0


# Requests and answers.


@dataclass
class Request:
    """A request as the server received it; `status` stays None if no answer was sent."""

    kind: str
    method: str
    path: str
    origin: str
    token: str | None
    headers: Mapping[str, str]
    status: int | None = None

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> "Answer":
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


class Refusal(Exception):
    """An error answer; the clients choose their exception by `code`."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers |= {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer = Answer.json({"error": message}, status, headers)


@dataclass
class Call:
    """A request for the method that answers it, with the groups of the route's pattern."""

    request: Request
    args: dict[str, str]
    query: dict[str, str]
    body: bytes = b""
    account: "Account | None" = None

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    @property
    def rev(self) -> str:
        return self.args.get("rev", "main")


Json = dict[str, Any]
Answering = Callable[["HubServer", Call], Answer | Json | list[Any]]
ROUTES: list[tuple[str, str, str, re.Pattern[str], Answering]] = []
ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
API = rf"/api/(?P<kind>datasets|models)/{ID}"
GIT = rf"/(?:(?P<kind>datasets)/)?{ID}"


def route(methods: str, kind: str, pattern: str, origin: str = "hub") -> Callable[[Answering], Answering]:
    """Register a method to answer paths that match `pattern`; these requests are recorded as `kind`."""

    def register(method: Answering) -> Answering:
        ROUTES.append((origin, methods, kind, re.compile(pattern), method))
        return method

    return register


# State of the Hub.


@dataclass(frozen=True)
class Account:
    """A token and its owner."""

    name: str
    token: str
    role: str
    orgs: Mapping[str, str]
    fine_grained: Mapping[str, Any] | None

    def scopes(self, repo_id: str) -> set[str]:
        scoped = (self.fine_grained or {}).get("scoped", ())
        names = (repo_id, repo_id.partition("/")[0])
        return {permission for each in scoped if each["entity"]["name"] in names for permission in each["permissions"]}

    def belongs(self, repo_id: str) -> bool:
        if self.role == "fineGrained":
            return bool(self.scopes(repo_id) & {"repo.content.read", "repo.write"})
        return repo_id.partition("/")[0] in (self.name, *self.orgs)

    def may_write(self, repo_id: str) -> bool:
        if self.role == "fineGrained":
            return "repo.write" in self.scopes(repo_id)
        namespace = repo_id.partition("/")[0]
        return self.role == "write" and (namespace == self.name or self.orgs.get(namespace, "read") != "read")


@dataclass(frozen=True)
class Blob:
    """A file in a tree, identified by its Git SHA-1, or by its SHA-256 if it is a large object."""

    oid: str
    size: int
    lfs: bool

    @property
    def git_oid(self) -> str:
        return git_sha1(f"oid sha256:{self.oid}\nsize {self.size}\n".encode()) if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    tree: Mapping[str, Blob]
    message: str
    author: str
    date: str


@dataclass
class Discussion:
    num: int
    title: str
    author: str
    base: str | None  # the commit a pull request starts from; None for a discussion
    status: str
    date: str
    merged: str | None = None
    events: list[Json] = field(default_factory=list)


@dataclass
class Repo:
    kind: str
    id: str
    private: bool = False
    gated: bool | str = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)

    @property
    def path(self) -> str:
        return f"datasets/{self.id}" if self.kind == "datasets" else self.id

    def at(self, revision: str) -> Commit:
        oid = self.refs.get(revision.removeprefix("refs/heads/"), revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str) -> Iterator[Commit]:
        commit: Commit | None = self.at(revision)
        while commit:
            yield commit
            commit = self.commits[commit.parent] if commit.parent else None

    def add(self, branch: str, tree: Mapping[str, Blob], message: str, author: str) -> Commit:
        parent = self.refs.get(branch)
        content = repr((len(self.commits), self.kind, self.id, parent, message, sorted(tree.items())))
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, dict(tree), message, author, now())
        self.refs[branch] = oid
        return self.commits[oid]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_ABOVE)


def card_problems(content: str) -> tuple[Json, list[str], list[str]]:
    """Return the metadata at the top of a README, its errors, and its warnings."""
    header = re.match(r"\s*---\r?\n(.*?)^---\s*$", content, re.DOTALL | re.MULTILINE)
    if not header:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(header[1])
    except yaml.YAMLError as error:
        return {}, [f"YAML: {error}"], []
    if not isinstance(metadata, dict):
        return {}, ["YAML: the metadata must be a mapping"], []
    return json.loads(json.dumps(metadata, default=str)), [], []


class HubServer:
    """The test Hub: `with HubServer() as server: HfApi(endpoint=server.url, token=...)`."""

    def __init__(self, *, page_size: int = 1000, multipart_above: int = 8 * 2**20, part_size: int = 4 * 2**20) -> None:
        self._defaults = {"page_size": page_size, "multipart_above": multipart_above, "part_size": part_size}
        self._lock = threading.RLock()
        self._servers = [_Server(self, origin) for origin in ("hub", "cdn")]
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        self.reset()

    def start(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # For tests.

    def reset(self) -> None:
        """Forget everything: repositories, users, objects, requests, faults, settings."""
        with self._lock:
            self.requests: list[Request] = []
            self.unknown: list[Request] = []
            self.crashes: list[str] = []
            self.fired = 0
            self.page_size, self.multipart_above, self.part_size = self._defaults.values()
            self._faults: list[Fault] = []
            self._accounts: dict[str, Account] = {}
            self._repos: dict[tuple[str, str], Repo] = {}
            self._objects: dict[str, bytes] = {}  # by Git SHA-1 or SHA-256
            self._parts: dict[tuple[str, int], bytes] = {}
            self._xet = XetStore()

    def add_user(
        self,
        name: str,
        *,
        token: str | None = None,
        role: str = "write",
        orgs: Iterable[str | tuple[str, str]] = (),
        fine_grained: Mapping[str, Any] | None = None,
    ) -> str:
        """Register and return a token; an organization is a name (role "write") or (name, role)."""
        token = token or f"hf_{name}_{role}"
        roles = dict((org, "write") if isinstance(org, str) else org for org in orgs)
        self._accounts[token] = Account(name, token, role, roles, fine_grained)
        return token

    def fault(self, kind: str, action: Action, *, skip: int = 0, times: int | None = 1, match: str | None = None) -> Fault:
        """Let requests of a kind fail; `match` is a part of "METHOD path". The oldest matching fault hits a request."""
        fault = Fault(kind, action, skip, times, match)
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        with self._lock:
            self._faults.clear()

    @property
    def leaks(self) -> list[Request]:
        """Requests that sent a Hub token to the CDN."""
        return [each for each in self.requests if each.origin == "cdn" and each.token in self._accounts]

    def repo(self, kind: str, id: str) -> Repo:
        return self._repos[kind, id]

    def exists(self, kind: str, id: str) -> bool:
        return (kind, id) in self._repos

    def create(
        self,
        kind: str,
        id: str,
        files: Mapping[str, bytes] | None = None,
        *,
        private: bool = False,
        gated: bool | str = False,
        granted: Iterable[str] = (),
    ) -> Repo:
        """Create a repository with an initial commit, and a second commit if there are files."""
        with self._lock:
            repo = self._repos[kind, id] = Repo(kind, id, private, gated, set(granted))
            repo.add("main", {".gitattributes": self._keep(".gitattributes", b"*.parquet lfs\n")}, "initial commit", "x")
            if files:
                self.commit(kind, id, files)
        return repo

    def commit(
        self,
        kind: str,
        id: str,
        files: Mapping[str, bytes],
        delete: Iterable[str] = (),
        *,
        message: str = "A commit of the test",
        branch: str = "main",
    ) -> str:
        with self._lock:
            repo = self._repos[kind, id]
            tree = {path: blob for path, blob in repo.at(branch).tree.items() if path not in set(delete)}
            tree |= {path: self._keep(path, data) for path, data in files.items()}
            return repo.add(branch, tree, message, "rival").oid

    def files(self, kind: str, id: str, revision: str = "main") -> dict[str, bytes]:
        with self._lock:
            return {path: self._read(blob.oid) for path, blob in self._repos[kind, id].at(revision).tree.items()}

    def history(self, kind: str, id: str, revision: str = "main") -> list[str]:
        """Return the commits, newest first."""
        return [commit.oid for commit in self._repos[kind, id].history(revision)]

    def corrupt(self, kind: str, id: str, path: str) -> None:
        """Flip one bit of a stored file; its size and names do not change."""
        with self._lock:
            oid = self._repos[kind, id].at("main").tree[path].oid
            if oid in self._xet.by_sha256:
                self._xet.corrupt(oid)
            if oid in self._objects:
                data = bytearray(self._objects[oid])
                data[len(data) // 2] ^= 1
                self._objects[oid] = bytes(data)

    def env(self, *, token: str | None, home: Path, xet: bool) -> dict[str, str]:
        """Return the complete environment for a client process that can reach only this server."""
        kept = {name: os.environ[name] for name in ("PATH", "VIRTUAL_ENV", "PYTHONPATH") if name in os.environ}
        off = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS")
        on = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_UPDATE_CHECK")
        own = {"HOME": str(home), "HF_HOME": str(home / "huggingface"), "HF_ENDPOINT": self.url, "OMP_NUM_THREADS": "1"}
        own |= {"LOKY_MAX_CPU_COUNT": "1"}  # our default number of threads
        own |= dict.fromkeys(off, "0") | dict.fromkeys(on, "1") | dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
        own |= XET_ENV if xet else {"HF_HUB_DISABLE_XET": "1"}
        return kept | own | ({"HF_TOKEN": token} if token is not None else {})

    # Dispatch: from the socket to the routes.

    def serve(self, handler: "_Handler") -> None:
        """Answer one request, or apply the fault that hits it."""
        call, method = self._recognize(handler)
        with self._lock:
            if call.request.kind != "agents":  # a client's first request of the day, whatever it is asked to do
                self.requests.append(call.request)
            action = next((fault.action for fault in self._faults if fault.hits(call.request)), None)
            self.fired += action is not None
        match action:
            case Reset():
                return handler.reset()
            case ResetMidBody(after):
                handler.read_body(after)
                return handler.reset()
            case Delay(seconds):
                time.sleep(seconds)
            case Rival(act):
                act()
        call.body = handler.read_body()
        if isinstance(action, Status):
            kind = "text/html" if action.html else "application/json"
            answer = Answer(action.code, action.body, {"Content-Type": kind, **action.headers})
        else:
            answer = self._answer(call, method)
        if isinstance(action, LostAnswer):
            return handler.reset()
        call.request.status = answer.status
        handler.send(answer, action if isinstance(action, CutBody) else None)

    def _recognize(self, handler: "_Handler") -> tuple[Call, Answering | None]:
        url, headers = urlsplit(handler.path), {name.lower(): value for name, value in handler.headers.items()}
        bearer = headers.get("authorization", "").removeprefix("Bearer ") or None
        request = Request("unknown", handler.command, handler.path, handler.server.origin, bearer, headers)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        for origin, methods, kind, pattern, method in ROUTES:
            match = pattern.fullmatch(url.path)
            if match and origin == request.origin and request.method in methods.split():
                request.kind = kind
                args = {name: unquote(value) for name, value in match.groupdict().items() if value}
                return Call(request, args, query), method
        self.unknown.append(request)
        return Call(request, {}, query), None

    def _answer(self, call: Call, method: Answering | None) -> Answer:
        if method is None:
            return Answer.json({"error": f"not part of the tests' Hub: {call.request.line}"}, 501)
        try:
            with self._lock:
                call.account = self._account(call.request)
                answer = method(self, call)
            return answer if isinstance(answer, Answer) else Answer.json(answer)
        except Refusal as refusal:
            return refusal.answer
        except XetError as error:
            return Refusal(400, str(error)).answer
        except Exception:
            self.crashes.append(traceback.format_exc())
            return Answer.json({"error": "the tests' Hub crashed"}, 500)

    # Permissions and objects.

    def _account(self, request: Request) -> Account | None:
        if request.origin == "cdn" or request.token is None:
            return None
        if request.token not in self._accounts:
            raise Refusal(401, UNKNOWN_TOKEN)
        return self._accounts[request.token]

    def _logged_in(self, call: Call) -> Account:
        if call.account is None:
            raise Refusal(401, "Invalid username or password.")
        return call.account

    def _seen(self, call: Call) -> Repo:
        """Return the repository, if the caller may know that it exists."""
        repo = self._repos.get((call.args.get("kind", "models"), call.args["id"]))
        if repo is None or repo.private and not (call.account and call.account.belongs(repo.id)):
            raise Refusal(404 if call.account else 401, "Repository not found", "RepoNotFound")
        return repo

    def _readable(self, call: Call) -> Repo:
        """Return the repository, if the caller may read its files."""
        repo, account = self._seen(call), call.account
        if repo.gated and not (account and (account.belongs(repo.id) or account.name in repo.granted)):
            status = 403 if account else 401
            raise Refusal(status, f"Access to {repo.path} is restricted: ask its authors", "GatedRepo")
        return repo

    def _writable(self, call: Call, *, propose: bool = False) -> Repo:
        """Return the repository, if the caller may write to the revision; any write token may open a pull request."""
        repo, account = self._seen(call), self._logged_in(call)
        own = any(call.rev == f"refs/pr/{each.num}" and each.author == account.name for each in repo.discussions)
        if not (account.may_write(repo.id) or account.role == "write" and (own or propose or "create_pr" in call.query)):
            raise Refusal(403, "You don't have the rights to write to this repository")
        return repo

    def _keep(self, path: str, data: bytes) -> Blob:
        lfs = is_lfs(path, len(data))
        oid = hashlib.sha256(data).hexdigest() if lfs else git_sha1(data)
        self._objects[oid] = data
        return Blob(oid, len(data), lfs)

    def _has(self, oid: str) -> bool:
        return oid in self._objects or oid in self._xet.by_sha256

    def _read(self, oid: str) -> bytes:
        return self._xet.content(oid) if oid in self._xet.by_sha256 else self._objects[oid]

    def _page(self, call: Call, items: list[Any]) -> Answer:
        start, headers = int(call.query.get("cursor", 0)), {}
        if start + self.page_size < len(items):
            query = urlencode({**call.query, "cursor": start + self.page_size})
            headers["Link"] = f'<{self.url}{urlsplit(call.request.path).path}?{query}>; rel="next"'
        return Answer.json(items[start : start + self.page_size], headers=headers)

    # Users and repositories.

    @route("GET", "whoami", "/api/whoami-v2")
    def _whoami(self, call: Call) -> Json:
        user = self._logged_in(call)
        token = {"displayName": "test", "role": user.role}
        token |= {"fineGrained": user.fine_grained} if user.fine_grained else {}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in user.orgs.items()]
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "name": user.name, "orgs": orgs, "auth": auth}

    @route("GET", "agents", "/api/agent-harnesses")
    def _agents(self, call: Call) -> Json:
        return {"standardEnvVars": [], "harnesses": {}}

    @route("POST", "create_repo", "/api/repos/create")
    def _create(self, call: Call) -> Answer:
        user, wanted = self._logged_in(call), call.json
        kind, id = f"{wanted.get('type') or 'model'}s", f"{wanted.get('organization') or user.name}/{wanted['name']}"
        if not user.may_write(id):
            raise Refusal(403, f"You don't have the rights to create {kind} under this namespace")
        status = 409 if self.exists(kind, id) else 200
        if status == 200:
            self.create(kind, id, private=wanted.get("visibility") == "private" or wanted.get("private", False))
        url = f"{self.url}/{self._repos[kind, id].path}"
        return Answer.json({"url": url, "name": id, **({"error": "exists already"} if status == 409 else {})}, status)

    @route("DELETE", "delete_repo", "/api/repos/delete")
    def _delete(self, call: Call) -> Json:
        user, wanted = self._logged_in(call), call.json
        call.args = {"kind": f"{wanted.get('type') or 'model'}s"}
        call.args["id"] = f"{wanted.get('organization') or user.name}/{wanted['name']}"
        del self._repos[self._writable(call).kind, call.args["id"]]
        return {}

    @route("POST", "validate_yaml", "/api/validate-yaml")
    def _validate_yaml(self, call: Call) -> Answer:
        _, errors, warnings = card_problems(call.json["content"])
        listed = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
        return Answer.json(listed, 400 if errors else 200)

    @route("PUT", "settings", f"{API}/settings")
    def _settings(self, call: Call) -> Json:
        repo, wanted = self._writable(call), call.json
        if "visibility" in wanted or "private" in wanted:
            repo.private = wanted.get("visibility") == "private" or wanted.get("private", False)
        repo.gated = wanted.get("gated", repo.gated)
        return {"private": repo.private, "gated": repo.gated}

    @route("GET", "auth_check", f"{API}/auth-check")
    def _auth_check(self, call: Call) -> Json:
        self._readable(call)
        return {}

    @route("GET", "auth_check", f"{API}/auth-check/write")
    def _auth_check_write(self, call: Call) -> Json:
        self._writable(call)
        return {}

    # Content of a revision.

    @route("GET", "repo_info", f"{API}(?:/revision/(?P<rev>[^/]+))?")
    def _info(self, call: Call) -> Json:
        repo = self._seen(call)
        commit = repo.at(call.rev)
        siblings = [{"rfilename": path, **self._sibling(call, blob)} for path, blob in sorted(commit.tree.items())]
        card = commit.tree.get("README.md")
        metadata = card_problems(self._read(card.oid).decode(errors="replace"))[0] if card else None
        info = {"_id": repo.id, "id": repo.id, "author": repo.id.partition("/")[0], "sha": commit.oid, "tags": []}
        info |= {"private": repo.private, "gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0}
        dates = {"lastModified": commit.date, "createdAt": next(iter(repo.commits.values())).date}
        return {**info, **dates, "siblings": siblings, **({"cardData": metadata} if metadata else {})}

    @staticmethod
    def _sibling(call: Call, blob: Blob) -> Json:
        if "blobs" not in call.query:
            return {}
        lfs = {"sha256": blob.oid, "size": blob.size, "pointerSize": 134}
        return {"size": blob.size, "blobId": blob.git_oid, **({"lfs": lfs} if blob.lfs else {})}

    def _entry(self, repo: Repo, commit: Commit, path: str, expand: bool) -> Json:
        """Return one entry of a tree listing; a path that is not a file is a folder."""
        blob = commit.tree.get(path)
        if blob is None:
            oid = hashlib.sha1(repr([item for item in commit.tree.items() if item[0].startswith(path)]).encode())
            entry: Json = {"type": "directory", "oid": oid.hexdigest(), "size": 0, "path": path}
        else:
            entry = {"type": "file", "oid": blob.git_oid, "size": blob.size, "path": path}
            entry |= {"lfs": {"oid": blob.oid, "size": blob.size, "pointerSize": 134}} if blob.lfs else {}
            entry |= {"xetHash": self._xet.by_sha256[blob.oid]} if blob.oid in self._xet.by_sha256 else {}
        if expand:
            last = next(c for c in repo.history(commit.oid) if not c.parent or _changes(repo.commits[c.parent], c, path))
            entry["lastCommit"] = {"id": last.oid, "title": last.message, "date": last.date}
        return entry

    @route("GET", "tree", rf"{API}/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?")
    def _tree(self, call: Call) -> Answer:
        repo = self._seen(call)
        commit, folder = repo.at(call.rev), call.args.get("path", "").strip("/")
        inside = f"{folder}/" if folder else ""
        paths = {path for path in commit.tree if path.startswith(inside)}
        if folder and not paths:
            raise Refusal(404, f"{folder} does not exist on {call.args['rev']}", "EntryNotFound")
        paths |= {parent for path in paths for parent in _parents(path) if parent.startswith(inside)}
        if not _is_true(call.query.get("recursive")):
            paths = {path for path in paths if "/" not in path[len(inside) :]}
        expand = _is_true(call.query.get("expand"))
        return self._page(call, [self._entry(repo, commit, path, expand) for path in sorted(paths)])

    @route("POST", "paths_info", rf"{API}/paths-info/(?P<rev>[^/]+)")
    def _paths_info(self, call: Call) -> list[Json]:
        repo, form = self._seen(call), parse_qs(call.body.decode())
        commit, expand = repo.at(call.rev), _is_true(form.get("expand", [""])[0])
        known = set(commit.tree) | {parent for path in commit.tree for parent in _parents(path)}
        return [self._entry(repo, commit, path, expand) for path in form.get("paths", []) if path in known]

    @route("HEAD GET", "resolve", rf"{GIT}/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
    def _resolve(self, call: Call) -> Answer:
        repo = self._readable(call)
        commit = repo.at(call.rev)
        blob = commit.tree.get(call.args["path"])
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"'}
        if not blob.lfs:
            return _ranged(call, self._read(blob.oid), headers)
        headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(blob.size)}
        if blob.oid in self._xet.by_sha256:
            route = f"{self.url}/api/{repo.kind}/{repo.id}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": self._xet.by_sha256[blob.oid], "Link": f'<{route}>; rel="xet-auth"'}
        location = f"{self.cdn_url}/blob/{blob.oid}/{quote(call.args['path'])}"
        return Answer(302, b"Found", {**headers, "Location": location})

    @route("HEAD GET", "cdn_get", r"/blob/(?P<oid>[0-9a-f]{64})/.+", "cdn")
    def _cdn_get(self, call: Call) -> Answer:
        return _ranged(call, self._read(call.args["oid"]), {"ETag": f'"{call.args["oid"]}"'})

    # Writing.

    @route("POST", "preupload", rf"{API}/preupload/(?P<rev>[^/]+)")
    def _preupload(self, call: Call) -> Json:
        tree = self._writable(call).at(call.rev).tree
        answers = []
        ignored = self._read(tree[".gitignore"].oid).decode().split() if ".gitignore" in tree else []
        for file in call.json["files"]:
            mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            ignore = any(fnmatch(file["path"], pattern) for pattern in ignored)
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": ignore}
            present = tree.get(file["path"])
            answers.append(answer | ({"oid": present.oid} if present else {}))
        return {"files": answers}

    @route("POST", "lfs_batch", rf"{GIT}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, call: Call) -> Json:
        call.args["rev"] = call.json.get("ref", {}).get("name", "main")
        repo, multipart = self._writable(call, propose=True), False
        objects = []
        for wanted in call.json["objects"]:
            target = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self._has(wanted["oid"]):
                parts = wanted["size"] > self.multipart_above and "multipart" in call.json["transfers"]
                multipart = multipart or parts
                upload = self._parts_of(wanted) if parts else {"href": f"{self.cdn_url}/lfs/{wanted['oid']}"}
                verify = {"href": f"{self.url}/{repo.path}.git/info/lfs/objects/verify"}
                target["actions"] = {"upload": upload, "verify": verify}
            objects.append(target)
        return {"transfer": "multipart" if multipart else "basic", "objects": objects}

    def _parts_of(self, wanted: Mapping[str, Any]) -> Json:
        count = -(-wanted["size"] // self.part_size)
        header = {f"{n:05}": f"{self.cdn_url}/lfs/{wanted['oid']}/{n}" for n in range(1, count + 1)}
        header["chunk_size"] = str(self.part_size)
        return {"href": f"{self.url}/lfs-complete/{wanted['oid']}", "header": header}

    @route("PUT", "lfs_put", r"/lfs/(?P<oid>[0-9a-f]{64})(?:/(?P<part>\d+))?", "cdn")
    def _lfs_put(self, call: Call) -> Answer:
        oid = call.args["oid"]
        if "part" in call.args:
            self._parts[oid, int(call.args["part"])] = call.body
        else:
            self._keep_object(oid, call.body)
        return Answer(headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})

    @route("POST", "lfs_complete", r"/lfs-complete/(?P<oid>[0-9a-f]{64})")
    def _lfs_complete(self, call: Call) -> Json:
        oid, listed = call.args["oid"], call.json["parts"]
        data = [self._parts.get((oid, part["partNumber"]), b"") for part in listed]
        if [part["etag"].strip('"') for part in listed] != [hashlib.md5(part).hexdigest() for part in data]:
            raise Refusal(400, "The parts are not those that were uploaded")
        self._keep_object(oid, b"".join(data))
        return {}

    def _keep_object(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, "The object's SHA-256 is not its name")
        self._objects[oid] = data

    @route("POST", "lfs_verify", rf"{GIT}\.git/info/lfs/objects/verify")
    def _lfs_verify(self, call: Call) -> Json:
        self._writable(call, propose=True)
        wanted = call.json
        if not self._has(wanted["oid"]) or len(self._read(wanted["oid"])) != wanted["size"]:
            raise Refusal(404, "The object was not uploaded")
        return {}

    @route("POST", "commit", rf"{API}/commit/(?P<rev>[^/]+)")
    def _commit(self, call: Call) -> Json:
        repo, lines = self._writable(call), [json.loads(line) for line in call.body.splitlines() if line.strip()]
        header, branch = lines[0]["value"], call.rev.removeprefix("refs/heads/")
        head = repo.at(branch)
        if branch not in repo.refs:
            raise Refusal(400, "A commit needs a branch")
        if header.get("parentCommit", head.oid) != head.oid:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(head.tree)
        for line in lines[1:]:
            self._apply(tree, line["key"], line["value"])
        url, proposal = f"{self.url}/{repo.path}", {"success": True}
        if "create_pr" in call.query:
            discussion = self._propose(repo, call, header["summary"], head, "open")
            branch = f"refs/pr/{discussion.num}"
            proposal["pullRequestUrl"] = f"{url}/discussions/{discussion.num}"
        commit = repo.add(branch, tree, header["summary"], self._logged_in(call).name)
        return {**proposal, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}"}

    def _apply(self, tree: dict[str, Blob], key: str, value: Mapping[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            data = base64.b64decode(value["content"])
            if path == "README.md" and (errors := card_problems(data.decode(errors="replace"))[1]):
                raise Refusal(400, errors[0])
            self._objects.setdefault(git_sha1(data), data)
            tree[path] = Blob(git_sha1(data), len(data), lfs=False)
        elif key == "lfsFile":
            if not self._has(value["oid"]):
                raise Refusal(400, f"{path} points to an object that was never uploaded")
            tree[path] = Blob(value["oid"], len(self._read(value["oid"])), lfs=True)
        else:
            inside = path if key == "deletedFile" else f"{path.rstrip('/')}/"
            gone = [each for each in tree if each == inside or key == "deletedFolder" and each.startswith(inside)]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for each in gone:
                del tree[each]

    # Branches, commits and pull requests.

    @route("POST", "branch", rf"{API}/branch/(?P<branch>.+)")
    def _create_branch(self, call: Call) -> Json:
        repo, branch = self._writable(call), call.args["branch"]
        if branch.startswith("refs/"):
            raise Refusal(400, f"Invalid reference for a branch: {branch}")
        if branch in repo.refs:
            raise Refusal(409, "Reference already exists")
        repo.refs[branch] = repo.at(call.json.get("startingPoint", "main")).oid
        return {}

    @route("DELETE", "branch", rf"{API}/branch/(?P<branch>.+)")
    def _delete_branch(self, call: Call) -> Json:
        repo, branch = self._writable(call), call.args["branch"]
        if branch == "main":
            raise Refusal(403, "main cannot be deleted")
        if repo.refs.pop(branch, None) is None:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return {}

    @route("GET", "refs", f"{API}/refs")
    def _refs(self, call: Call) -> Json:
        repo = self._seen(call)
        proposals, branches = [], []
        for name, oid in repo.refs.items():
            if name.startswith("refs/pr/"):
                proposals.append({"name": name, "ref": name, "targetCommit": oid})
            else:
                branches.append({"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid})
        listed = {"branches": branches, "converts": [], "tags": []}
        return listed | ({"pullRequests": proposals} if "include_prs" in call.query else {})

    @route("GET", "commits", rf"{API}/commits/(?P<rev>[^/]+)")
    def _commits(self, call: Call) -> Answer:
        listed = [
            {"id": c.oid, "title": c.message, "message": "", "authors": [{"user": c.author}], "date": c.date}
            for c in self._seen(call).history(call.rev)
        ]
        return self._page(call, listed)

    def _propose(self, repo: Repo, call: Call, title: str, base: Commit | None, status: str) -> Discussion:
        user = self._logged_in(call)
        num = len(repo.discussions) + 1
        repo.discussions.append(Discussion(num, title, user.name, base.oid if base else None, status, now()))
        if base:
            repo.refs[f"refs/pr/{num}"] = base.oid
        return repo.discussions[-1]

    def _told(self, repo: Repo, discussion: Discussion) -> Json:
        told = {"num": discussion.num, "title": discussion.title, "status": discussion.status}
        told |= {"author": {"name": discussion.author}, "createdAt": discussion.date}
        return told | {"repo": {"name": repo.id, "type": repo.kind[:-1]}, "isPullRequest": discussion.base is not None}

    @route("GET", "discussion", f"{API}/discussions")
    def _discussions(self, call: Call) -> Json:
        repo, query = self._seen(call), call.query
        listed = [self._told(repo, discussion) for discussion in repo.discussions]
        listed = [told for told in listed if query.get("author", told["author"]["name"]) == told["author"]["name"]]
        if (status := query.get("status", "all")) != "all":
            listed = [told for told in listed if (told["status"] in ("open", "draft")) == (status == "open")]
        if (kind := query.get("type", "all")) != "all":
            listed = [told for told in listed if told["isPullRequest"] == (kind == "pull_request")]
        start = int(query.get("p", 0)) * self.page_size
        page = listed[start : start + self.page_size]
        return {"discussions": page, "count": len(listed), "start": start}

    @route("POST", "discussion", f"{API}/discussions")
    def _discuss(self, call: Call) -> Json:
        repo, wanted = self._writable(call, propose=True), call.json
        base, status = (repo.at("main"), "draft") if wanted.get("pullRequest") else (None, "open")
        num = self._propose(repo, call, wanted["title"], base, status).num
        return {"num": num, "pullRequest": base is not None}

    def _discussion(self, repo: Repo, call: Call) -> Discussion:
        num = int(call.args["num"])
        if not 0 < num <= len(repo.discussions):
            raise Refusal(404, "Discussion not found")
        return repo.discussions[num - 1]

    @route("GET", "discussion", rf"{API}/discussions/(?P<num>\d+)")
    def _details(self, call: Call) -> Json:
        repo = self._seen(call)
        discussion = self._discussion(repo, call)
        told = self._told(repo, discussion) | {"events": discussion.events}
        if discussion.base:
            changes = {"base": "refs/heads/main", **({"mergeCommitId": discussion.merged} if discussion.merged else {})}
            told |= {"changes": changes, "filesWithConflicts": self._merged(repo, discussion)[1], "diff": ""}
        return told

    @route("POST", "discussion", rf"{API}/discussions/(?P<num>\d+)/status")
    def _change_status(self, call: Call) -> Json:
        num = call.args["num"]
        repo = self._writable(replace(call, args={**call.args, "rev": f"refs/pr/{num}"}))
        discussion = self._discussion(repo, call)
        if discussion.status == "merged":
            raise Refusal(400, "This pull request is merged")
        discussion.status = call.json["status"]
        event = {"id": f"{len(discussion.events):015x}", "type": "status-change", "createdAt": now()}
        event |= {"author": {"name": self._logged_in(call).name}, "data": {"status": discussion.status}}
        discussion.events.append(event)
        return {"newStatus": event}

    @route("POST", "discussion", rf"{API}/discussions/(?P<num>\d+)/merge")
    def _merge(self, call: Call) -> Json:
        repo = self._writable(call)
        discussion = self._discussion(repo, call)
        if discussion.base is None or discussion.status != "open":
            raise Refusal(400, f"Only an open pull request can be merged; this is {discussion.status}")
        tree, conflicts = self._merged(repo, discussion)
        if conflicts:
            raise Refusal(409, f"Conflicting files: {', '.join(conflicts)}")
        title = f"{discussion.title} (#{discussion.num})"
        discussion.merged = repo.add("main", tree, title, self._logged_in(call).name).oid
        discussion.status = "merged"
        return {}

    @staticmethod
    def _merged(repo: Repo, discussion: Discussion) -> tuple[dict[str, Blob], list[str]]:
        """Return main with the pull request's changes, and the conflicting paths."""
        base, ours = repo.at(discussion.base or "main").tree, dict(repo.at("main").tree)
        theirs, conflicts = repo.at(f"refs/pr/{discussion.num}").tree, []
        for path in sorted(base.keys() | theirs.keys()):
            if theirs.get(path) == base.get(path):
                continue
            if ours.get(path) not in (base.get(path), theirs.get(path)):
                conflicts.append(path)
            elif path in theirs:
                ours[path] = theirs[path]
            else:
                ours.pop(path, None)
        return ours, [] if discussion.merged else conflicts

    # Xet: tokens on the Hub, the store on the CDN.

    @route("GET", "xet_token", rf"{API}/xet-(?P<scope>read|write)-token/(?P<rev>[^/]+)")
    def _xet_token(self, call: Call) -> Answer:
        repo, scope = (self._writable if call.args["scope"] == "write" else self._readable)(call), call.args["scope"]
        if "create_pr" not in call.query:  # with create_pr, the client does not know the branch yet and sends "None"
            repo.at(call.rev)
        # Stateless, because clients keep tokens longer than one test.
        told = {"casUrl": self.cdn_url, "accessToken": f"xet-{scope}-{repo.path}", "exp": int(time.time()) + 3600}
        names = ("X-Xet-Cas-Url", "X-Xet-Access-Token", "X-Xet-Token-Expiration")
        return Answer.json(told, headers=dict(zip(names, map(str, told.values()), strict=True)))

    def _check_xet_token(self, call: Call, *scopes: str) -> None:
        if not (call.request.token or "").startswith(tuple(f"xet-{scope}-" for scope in scopes)):
            raise Refusal(401, "Not a token of the Xet store")

    @route("GET", "xet_probe", "/v1/chunks/.+|/v2/reconstructions/.+", "cdn")
    @route("POST", "xet_probe", "/v1/xorb-grants/.+|/v2/shards", "cdn")
    def _xet_probe(self, call: Call) -> Answer:
        """Refuse newer parts of the protocol; the clients work without them."""
        return Answer.json({"error": "not found"}, 404)

    @route("POST", "xet_xorb", "/v1/xorbs/default/(?P<hash>[0-9a-f]{64})", "cdn")
    def _xet_xorb(self, call: Call) -> Json:
        self._check_xet_token(call, "write")
        return {"was_inserted": self._xet.add_xorb(call.args["hash"], call.body)}

    @route("POST", "xet_shard", "/v1/shards", "cdn")
    def _xet_shard(self, call: Call) -> Json:
        self._check_xet_token(call, "write")
        self._xet.add_shard(call.body)
        return {"result": 1}

    @route("GET", "xet_reconstruction", "/v1/reconstructions/(?P<hash>[0-9a-f]{64})", "cdn")
    def _xet_reconstruction(self, call: Call) -> Json:
        self._check_xet_token(call, "read", "write")
        if call.args["hash"] not in self._xet.files:
            raise Refusal(404, "file not found")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", call.request.headers.get("range", "bytes=0-"))
        start, end = (int(text) if text else None for text in wanted.groups()) if wanted else (0, None)
        found = self._xet.reconstruction(call.args["hash"], start or 0, end, self.cdn_url)
        if found is None:
            raise Refusal(416, "behind the end of the file")
        return found

    @route("GET", "xet_get", "/xorb/(?P<hash>[0-9a-f]{64})", "cdn")
    def _xet_get(self, call: Call) -> Answer:
        return _ranged(call, bytes(self._xet.xorbs[call.args["hash"]].data), {})


XET_ENV = {
    "HF_HUB_DISABLE_XET": "0",
    "HF_XET_XORB_COMPRESSION_POLICY": "none",  # otherwise the server would need LZ4 to serve the same file through LFS
    "HF_XET_TELEMETRY_ENABLED": "0",
    "HF_XET_CLIENT_RETRY_BASE_DELAY": "50ms",
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "3",
}


def _is_true(text: str | None) -> bool:
    return text in ("1", "true", "True")


def _parents(path: str) -> list[str]:
    return [path[: slash.start()] for slash in re.finditer("/", path)]


def _changes(before: Commit, after: Commit, path: str) -> bool:
    """Return whether a file, or anything in a folder, differs between two commits."""

    def part(commit: Commit) -> dict[str, Blob]:
        return {each: blob for each, blob in commit.tree.items() if each == path or each.startswith(f"{path}/")}

    return part(before) != part(after)


def _ranged(call: Call, data: bytes, headers: dict[str, str]) -> Answer:
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", call.request.headers.get("range", ""))
    if not wanted or wanted[0] == "bytes=-":
        return Answer(200, data, headers)
    first, last = wanted.groups()
    start = int(first) if first else max(0, len(data) - int(last))
    end = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= len(data):
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[start:end], {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer, origin: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.origin = hub, origin

    def handle_error(self, *_: object) -> None:
        """Ignore a client that hangs up; record any other error, such as a failing Rival."""
        if not isinstance(sys.exception(), ConnectionError):
            self.hub.crashes.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_any(self) -> None:
        self.server.hub.serve(self)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_any  # noqa: N815

    def read_body(self, most: int | None = None) -> bytes:
        """Return the request's body, or its first `most` bytes."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            size = int(self.headers.get("Content-Length", 0))
            return self._read(size if most is None else min(size, most))
        body = b""
        while most is None or len(body) < most:
            size = int(self.rfile.readline().partition(b";")[0] or b"-1", 16)
            body += self._read(size)
            self.rfile.readline()
            if not size:
                break
        return body

    def _read(self, size: int) -> bytes:
        data = self.rfile.read(size) if size >= 0 else b""
        if len(data) != size:  # a partial upload must not be applied
            raise ConnectionAbortedError
        return data

    def reset(self) -> None:
        """End the connection with RST, without an answer or an orderly close."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # it keeps the socket open
        self.connection.close()

    def send(self, answer: Answer, cut: CutBody | None) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        body = b"" if self.command == "HEAD" else answer.body
        with suppress(ConnectionError):
            self.wfile.write(body[: cut.after] if cut else body)
        if cut and cut.rst:
            time.sleep(0.05)  # an RST makes the client drop data that it has not read yet
            self.reset()
        elif cut:
            self.close_connection = True
