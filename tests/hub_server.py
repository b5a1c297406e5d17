"""A small server on this machine that speaks the Hub's file endpoints: what the real client downloads and uploads."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file in a folder by its path there, as a repository has them."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@dataclass
class Hub:
    """What the server serves, how it misbehaves, and what it was asked for."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)  # repository, revision, file
    drop_once: set[str] = field(default_factory=set)  # files whose first download breaks off halfway
    cut: set[str] = field(default_factory=set)  # files of which only the first half is sent
    errors: dict[str, tuple[int, str]] = field(default_factory=dict)  # repositories that answer with an error
    listing_breaks: bool = False  # answer with a page that is no listing, as a login portal does
    push_after: dict[str, Callable[[], object]] = field(default_factory=dict)  # what happens after a file is sent
    asked: list[str] = field(default_factory=list)  # "GET owner/name revision file"
    url: str = ""
    large: dict[str, bytes] = field(default_factory=dict)  # what was uploaded beside a commit, by its sha256
    commits: list[dict[str, list[str]]] = field(default_factory=list)  # what each commit added and deleted

    def commit(self, repo: str, files: dict[str, bytes], *revisions: str) -> str:
        """Add a state of a repository under a new commit hash, which is returned, and as the named revisions."""
        sha = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        for revision in (sha, *(revisions or ("main",))):
            self.repos.setdefault(repo, {})[revision] = files
        return sha

    def serve(self, repos: dict[str, dict[str, bytes]]) -> None:
        """Add one state of each repository, by name."""
        for repo, files in repos.items():
            self.commit(repo, files)

    def sha(self, repo: str, revision: str) -> str:
        """Return the commit hash of a revision."""
        states = self.repos[repo]
        return next(sha for sha in states if len(sha) == 40 and states[sha] is states[revision])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urlparse(self.path)
        if url.path == "/api/models":
            return self.answer_listing(parse_qs(url.query)["author"][0])
        tree = re.fullmatch(r"/api/((?:model|dataset)s)/([^/]+/[^/]+)/tree/([^/]+)", url.path)
        if tree:
            kind, repo, revision = tree.groups()
            return self.answer_tree(f"{kind}/{repo}" if kind == "datasets" else repo, revision)
        pattern = r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)"
        named = re.fullmatch(pattern, url.path)
        if named is None:  # what else the client wants to know
            return self.answer_error(404, "EntryNotFound")
        repo, revision, file = named.groups()
        hub = self.server.hub
        if self.refuses(repo, revision, file):
            return None
        self.commit = hub.sha(repo, revision)
        if file not in hub.repos[repo][revision]:
            return self.answer_error(404, "EntryNotFound", {"X-Repo-Commit": self.commit})
        return self.answer_file(file, hub.repos[repo][revision][file])

    def refuses(self, repo, revision, what):
        """Note what is asked for; answer with an error where there is no such repository or revision."""
        hub = self.server.hub
        hub.asked.append(f"{self.command} {repo} {revision} {what}")
        if missing := repo in hub.errors or repo not in hub.repos:
            self.answer_error(*hub.errors.get(repo, (404, "RepoNotFound")))
        elif missing := revision not in hub.repos[repo]:
            self.answer_error(404, "RevisionNotFound")
        return missing

    # -- uploads: a repository is made, each file is asked about, large ones come first, one commit names them all

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url, hub = urlparse(self.path), self.server.hub
        if url.path == "/api/repos/create":
            wanted = json.loads(body)
            repo = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            if repo in hub.repos:
                return self.answer_json({"url": f"{hub.url}/{repo}"}, 409)
            hub.commit(repo, {})
            return self.answer_json({"url": f"{hub.url}/{repo}", "name": repo})
        if url.path == "/api/validate-yaml":
            return self.answer_json({"errors": [], "warnings": []})
        if url.path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}
            return self.answer_json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")
        repo, what = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", url.path).groups()
        if what == "preupload":
            modes = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                for one in json.loads(body)["files"]
            ]
            return self.answer_json({"files": [one | {"shouldIgnore": False} for one in modes]})
        return self.answer_commit(repo, [json.loads(line) for line in body.splitlines()])

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == f"/lfs/{hashlib.sha256(data).hexdigest()}"
        self.server.hub.large[self.path.removeprefix("/lfs/")] = data
        self.answer(200, {}, b"")

    def answer_commit(self, repo, lines):
        hub, done = self.server.hub, {"file": [], "lfsFile": [], "deletedFile": []}
        files = dict(hub.repos[repo]["main"])
        for line in lines[1:]:
            value, kind = line["value"], line["key"]
            done[kind].append(value["path"])
            if kind == "deletedFile":
                del files[value["path"]]
            else:
                files[value["path"]] = (
                    hub.large[value["oid"]] if kind == "lfsFile" else base64.b64decode(value["content"])
                )
        hub.commits.append(done)
        sha = hub.commit(repo, files)
        self.answer_json({"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{repo}/commit/{sha}"})

    def answer_json(self, value, status=200, kind="application/json"):
        self.answer(status, {"Content-Type": kind}, json.dumps(value).encode())

    # -- downloads

    def answer_file(self, file, data):
        hub = self.server.hub
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": self.commit}
        if self.command == "GET" and file in hub.cut:
            return self.answer(200, headers, data[: len(data) // 2])
        drop = self.command == "GET" and file in hub.drop_once
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and not drop:
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.answer(206, headers, data[start:])
        if drop:
            hub.drop_once.remove(file)
            self.answer(200, headers, data, sent=len(data) // 2)
            self.close_connection = True
            return None
        return self.answer(200, headers, data)

    def answer_listing(self, author):
        if self.server.hub.listing_breaks:
            return self.answer(200, {"Content-Type": "text/html"}, b"<html>")
        names = [{"id": repo} for repo in self.server.hub.repos if repo.startswith(f"{author}/")]
        return self.answer(200, {"Content-Type": "application/json"}, json.dumps(names).encode())

    def answer_tree(self, repo, revision):
        if self.refuses(repo, revision, "tree"):
            return None
        listed = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in self.server.hub.repos[repo][revision].items()
        ]
        return self.answer(200, {"Content-Type": "application/json"}, json.dumps(listed).encode())

    def answer_error(self, status, code, headers=None):
        self.answer(status, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})}, b"")

    def answer(self, status, headers, data, sent=None):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:sent])
        if self.command == "GET":
            self.server.hub.push_after.pop(self.path.split("/")[-1], lambda: None)()


@contextmanager
def serving() -> Iterator[Hub]:
    """Run the server as long as the block lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub(url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def as_the_hub(patch, cache) -> Iterator[Hub]:
    """Run a server that the real client takes for the Hub, with a folder for the client's cache."""
    from huggingface_hub import constants, hf_api

    with serving() as hub:
        # The client reads its environment variables at import: these are what HF_ENDPOINT, HF_HOME, ... set.
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(hf_api.api, "endpoint", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub
