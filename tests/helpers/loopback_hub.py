"""A model hub on the loopback interface: the part of the Hub's HTTP API that pushing and loading models needs.

Files whose pattern is in ``.gitattributes`` travel by Git LFS (batch request, PUT to a storage, reference in the
commit), the rest inside the commit. A commit is taken as a whole or not at all. Reading needs no token; writing needs
that of a user.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

USER, TOKEN = "me", "hf_loopback"
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"
MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Refusal(Exception):
    """An answer other than success, with the headers from which clients tell errors apart."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class File:
    """Content of a file at a commit; ``lfs`` is its sha256 if it is stored by Git LFS."""

    data: bytes
    lfs: str | None = None

    @property
    def blob(self):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.lfs}\nsize {len(self.data)}\n".encode()
        raw = pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


@dataclass
class Commit:
    oid: str
    summary: str
    files: dict[str, File]


@dataclass
class Hub:
    """State of the hub: what was committed, what was stored, what was asked, and what it shall refuse."""

    repos: dict[str, list[Commit]] = field(default_factory=dict)
    storage: dict[tuple[str, str], bytes] = field(default_factory=dict)  # by repository and sha256
    requests: list[tuple[str, str, int]] = field(default_factory=list)  # method, path, status
    # (name of the route, repository): statuses, used up
    refusals: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    @property
    def storage_url(self):
        """Another origin than ``url``, as in life, so that clients drop the token on the way there."""
        return self.url.replace("127.0.0.1", "localhost") + "/storage"

    def files(self, repo):
        """Content of every file at the head of ``repo``."""
        return {name: file.data for name, file in self.repos[repo][-1].files.items()}

    def add_commit(self, repo, summary, files):
        history = self.repos.setdefault(repo, [])
        listing = "".join(f"{name} {file.blob}\n" for name, file in sorted(files.items()))
        oid = hashlib.sha1(f"{repo} {len(history)} {summary}\n{listing}".encode()).hexdigest()
        history.append(Commit(oid, summary, files))
        return history[-1]

    def find(self, repo, revision="main"):
        """The commit of a branch or hash. Raises Refusal as the Hub words it."""
        if repo not in self.repos:
            raise Refusal(401, "Repository not found", "RepoNotFound")
        for commit in reversed(self.repos[repo]):
            if revision in ("main", commit.oid):
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_): ...  # requests are noted in `Hub.requests`

    def read_body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status, body=b"", **headers):
        if not isinstance(body, bytes):
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        self.hub.requests.append((self.command, urlsplit(self.path).path, status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def serve(self):
        body, path = self.read_body(), unquote(urlsplit(self.path).path)
        try:
            for method, pattern, handle in ROUTES:
                result = re.fullmatch(pattern, path)
                if result and self.command in method.split():
                    repo = result.groupdict().get("repo", "")
                    if method in ("POST", "PUT"):
                        self.check_token(handle.__name__, repo)
                    with self.hub.lock:
                        if statuses := self.hub.refusals.get((handle.__name__, repo)):
                            raise Refusal(statuses.pop(0), f"{handle.__name__} is refused")
                        return handle(self, body, **result.groupdict())
            raise Refusal(404, f"{self.command} {path} is not part of this hub")
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal), **({"X-Error-Code": refusal.code} if refusal.code else {})}
            self.answer(
                refusal.status, str(refusal).encode() if refusal.status == 400 else {"error": str(refusal)}, **headers
            )

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def check_token(self, route, repo):
        if route in ("store", "validate"):  # the storage is reached by signed addresses
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "Invalid credentials in Authorization header")
        if repo and not repo.startswith(f"{USER}/"):
            raise Refusal(403, f"{USER} may not write to {repo}")


def whoami(handler, _body):
    handler.check_token("whoami", "")
    handler.answer(200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})


def create(handler, body):
    wanted = json.loads(body)
    repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
    handler.check_token("create", repo)
    known = repo in handler.hub.repos
    if not known:
        handler.hub.add_commit(repo, "initial commit", {".gitattributes": File(GITATTRIBUTES)})
    handler.answer(409 if known else 200, {"url": f"{handler.hub.url}/{repo}", "name": repo})


def validate(handler, body):
    """The rules of the Hub that a model card is most likely to break."""
    results = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
    data = yaml.safe_load(results[1]) if results else {}
    if not MODEL_ID.fullmatch(data.get("base_model", USER)):
        raise Refusal(
            400,
            f'"base_model" with value {data["base_model"]!r} is not valid. Use a model id from https://hf.co/models.',
        )
    for key, kind in {"license": str, "library_name": str, "tags": list}.items():
        if not isinstance(data.get(key, kind()), kind):
            raise Refusal(400, f'"{key}" must be a {kind.__name__}')
    for entry in data.get("model-index", []):
        for result in entry["results"]:
            wanted = [entry["name"], result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]]
            wanted += [m["type"] for m in result["metrics"]]
            if not all(isinstance(v, str) and v for v in wanted) or any("value" not in m for m in result["metrics"]):
                raise Refusal(400, '"model-index" is incomplete')
    handler.answer(200, {"errors": [], "warnings": []})


def info(handler, _body, repo, revision="main"):
    commit = handler.hub.find(repo, revision or "main")
    siblings = [{"rfilename": name} for name in sorted(commit.files)]
    handler.answer(200, {"id": repo, "sha": commit.oid, "private": False, "tags": [], "siblings": siblings})


def tree(handler, _body, repo, revision, folder=None):
    commit = handler.hub.find(repo, revision)
    inside = {n: f for n, f in commit.files.items() if folder is None or n.startswith(f"{folder}/")}
    if folder is not None and not inside:
        raise Refusal(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
    entries = []
    for name, file in sorted(inside.items()):
        lfs = {"lfs": {"oid": file.lfs, "size": len(file.data), "pointerSize": 134}} if file.lfs else {}
        entries.append({"type": "file", "path": name, "size": len(file.data), "oid": file.blob, **lfs})
    handler.answer(200, entries)


def resolve(handler, _body, repo, revision, file):
    commit = handler.hub.find(repo, revision)
    headers = {"X-Repo-Commit": commit.oid}
    if file not in commit.files:
        return handler.answer(404, b"", X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", **headers)
    content = commit.files[file]
    if content.lfs is None:
        return handler.answer(200, content.data, ETag=f'"{content.blob}"', **headers)
    headers |= {"X-Linked-Etag": f'"{content.lfs}"', "X-Linked-Size": str(len(content.data))}
    return handler.answer(302, b"", Location=f"{handler.hub.storage_url}/{repo}/{content.lfs}", **headers)


def preupload(handler, body, repo, revision):
    commit = handler.hub.find(repo, revision)
    patterns = [
        line.split()[0] for line in commit.files[".gitattributes"].data.decode().splitlines() if "filter=lfs" in line
    ]
    files = []
    for file in json.loads(body)["files"]:
        mode = "lfs" if any(fnmatch.fnmatch(file["path"], pattern) for pattern in patterns) else "regular"
        known = commit.files.get(file["path"])
        files.append(
            {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known.blob if known else None}
        )
    handler.answer(200, {"files": files})


def batch(handler, body, repo):
    handler.hub.find(repo)
    objects = []
    for wanted in json.loads(body)["objects"]:
        link = {"href": f"{handler.hub.storage_url}/{repo}/{wanted['oid']}", "header": {}}
        verify = {"href": f"{handler.hub.url}/api/models/{repo}/lfs/verify", "header": {}}
        known = (repo, wanted["oid"]) in handler.hub.storage
        objects.append({**wanted, **({} if known else {"actions": {"upload": link, "verify": verify}})})
    handler.answer(200, {"transfer": "basic", "objects": objects})


def store(handler, body, repo, oid):
    if hashlib.sha256(body).hexdigest() != oid:
        raise Refusal(400, "the content does not have this sha256")
    handler.hub.storage[repo, oid] = body
    handler.answer(200)


def stored(handler, _body, repo, oid):
    handler.answer(200, handler.hub.storage[repo, oid], ETag=f'"{oid}"')


def verify(handler, body, repo):
    wanted = json.loads(body)
    if len(handler.hub.storage.get((repo, wanted["oid"]), b"")) != wanted["size"]:
        raise Refusal(404, f"{repo} has no object {wanted['oid']} of {wanted['size']} bytes")
    handler.answer(200, {})


def commit(handler, body, repo, revision):
    parent = handler.hub.find(repo, revision)
    lines = [json.loads(line) for line in body.splitlines()]
    files, header = dict(parent.files), lines[0]["value"]
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]))
        elif line["key"] == "lfsFile":
            if (repo, value["oid"]) not in handler.hub.storage:
                raise Refusal(400, f"LFS pointer of {value['path']} pointed to a file that does not exist")
            files[value["path"]] = File(handler.hub.storage[repo, value["oid"]], lfs=value["oid"])
        else:
            raise Refusal(400, f"operation {line['key']} is not part of this hub")
    added = handler.hub.add_commit(repo, header["summary"], files)
    handler.answer(
        200, {"success": True, "commitOid": added.oid, "commitUrl": f"{handler.hub.url}/{repo}/commit/{added.oid}"}
    )


REPO, REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[\w.-]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate),
    ("GET", f"/api/models/{REPO}(?:/revision/{REVISION})?", info),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}(?:/(?P<folder>.+))?", tree),
    ("GET HEAD", f"/{REPO}/resolve/{REVISION}/(?P<file>.+)", resolve),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", batch),
    ("PUT", f"/storage/{REPO}/(?P<oid>[0-9a-f]{{64}})", store),
    ("GET HEAD", f"/storage/{REPO}/(?P<oid>[0-9a-f]{{64}})", stored),
    ("POST", f"/api/models/{REPO}/lfs/verify", verify),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", commit),
)


@contextmanager
def serving():
    """A `Hub` that answers on a free port of the loopback interface while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
