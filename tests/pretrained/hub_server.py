"""A hub of models on this machine: what `huggingface_hub` asks by HTTP, answered from memory, with faults to order."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

TOKEN = "hf_good"
CUT = "cut"


@dataclass
class Fault:
    """The next `count` requests of `method` whose path fits `pattern` get `status`, or are CUT in the middle."""

    method: str
    pattern: str
    status: int | str
    count: int = 1


@dataclass
class Hub:
    """`files`: repository and branch -> name -> content. `lfs`: hash -> content. `asked`: method and path of all.

    `received`: name and bytes of each upload that was taken; `ranges`: of downloads that did not begin at the start.
    """

    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    received: list[tuple[str, int]] = field(default_factory=list)
    ranges: list[tuple[str, str]] = field(default_factory=list)
    needs_token: bool = False
    url: str = ""

    def commit(self, repo: str, branch: str) -> str:
        names = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in self.files[repo, branch].items())
        return hashlib.sha1(json.dumps([repo, names]).encode()).hexdigest()

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a branch or a commit."""
        for (name, branch), files in self.files.items():
            if name == repo and revision in (branch, self.commit(repo, branch)):
                return self.commit(repo, branch), files
        return None

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.count and fault.method == method and re.search(fault.pattern, path):
                fault.count -= 1
                return fault
        return None


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def entry_of(name: str, data: bytes) -> dict[str, Any]:
    git = lambda content: hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()  # noqa: E731
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git(data)}
    if is_large(name):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


class Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = hub.fault(self.command, path)
        if fault is not None and fault.status != CUT:
            return self._send(int(fault.status), b"{}")
        token = self.headers.get("Authorization")
        if not path.startswith("/lfs/") and (token or hub.needs_token) and token != f"Bearer {TOKEN}":
            message = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self._send(401, b"{}", **message)
        if self.command == "PUT" and (found := re.fullmatch(r"/lfs/(\w+)", path)):
            if fault is not None:
                self.close_connection = True
                return self.connection.close()
            assert hashlib.sha256(body).hexdigest() == found[1]
            hub.lfs[found[1]] = body
            hub.received.append((found[1], len(body)))
            return self._send(200, b"")
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w./-]+?)/([^/]+)", path):
            return self._file(*found.groups(), fault=fault)
        return self._api(path, body)

    def _api(self, path: str, body: bytes) -> None:
        hub, method = self.hub, self.command
        if path == "/api/whoami-v2":
            return self._json({"name": "me", "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said.get('organization') or 'me'}/{said['name']}"
            if (name, "main") in hub.files:
                return self._json({"url": f"{hub.url}/{name}"}, 409)
            hub.files[name, "main"], hub.private[name] = (
                {},
                bool(said.get("private")) or said.get("visibility") == "private",
            )
            return self._json({"url": f"{hub.url}/{name}"})
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {"oid": one["oid"], "size": one["size"]}
                | ({} if one["oid"] in hub.lfs else {"actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}})
                for one in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)/([\w./-]+?))?", path)
        if not found:
            return self._json({"error": "no such thing"}, 404)
        repo, what, revision = found[1], found[2], found[3] or "main"
        if (repo, "main") not in hub.files:
            return self._send(404, b"{}", **{"X-Error-Code": "RepoNotFound"})
        if what == "branch":
            if (repo, revision) in hub.files:
                return self._json({}, 409)
            hub.files[repo, revision] = dict(hub.files[repo, "main"])
            return self._json({})
        state = hub.at(repo, revision)
        if state is None:
            return self._send(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
        commit, files = state
        if what in (None, "revision") and method == "GET":
            names = [{"rfilename": name} for name in files]
            return self._json({"id": repo, "sha": commit, "siblings": names, "private": hub.private.get(repo, False)})
        if what == "tree":
            return self._json([entry_of(name, data) for name, data in files.items()])
        if what == "preupload":
            said = json.loads(body)["files"]
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if is_large(one["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": entry_of(one["path"], files[one["path"]])["oid"] if one["path"] in files else None,
                }
                for one in said
            ]
            return self._json({"files": modes})
        assert what == "commit", path
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                hub.received.append((value["path"], len(files[value["path"]])))
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.lfs[value["oid"]]
        commit = hub.commit(repo, revision)
        return self._json({"commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit})

    def _file(self, repo: str, revision: str, name: str, fault: Fault | None) -> None:
        state = self.hub.at(repo, revision)
        if state is None:
            return self._send(404, b"{}", **{"X-Error-Code": "RepoNotFound"})
        commit, files = state
        if name not in files:
            return self._send(404, b"{}", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[name]
        entry = entry_of(name, data)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry.get("lfs", entry)["oid"]}"', "Accept-Ranges": "bytes"}
        start = 0
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.hub.ranges.append((name, wanted[0]))
        if fault is not None:  # half of it, then the connection breaks
            self._head(206 if start else 200, len(data) - start, headers)
            self.wfile.write(data[start : start + (len(data) - start) // 2])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(2)
        return self._send(206 if start else 200, data[start:], **headers)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self._head(status, len(body), headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


class Server:
    """`with Server() as hub`: a hub at `hub.url`."""

    def __enter__(self) -> Hub:
        hub = Hub()
        handler = type("Handler", (Handler,), {"hub": hub})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        hub.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return hub

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
