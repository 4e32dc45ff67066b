"""A stand-in for the Hugging Face Hub on the loopback interface: what pushing and loading a model ask of it.

It keeps commits of real bytes and serves them by revision. It is not the Hub: no permissions, no Xet (set
HF_HUB_DISABLE_XET=1), no upload in several parts, no checks of content other than those of large files.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class HubStandIn:
    """`with HubStandIn() as hub:` serves at `hub.endpoint`; `hub.repos[repo_id]` is a list of (revision, files).

    large: files of more bytes go to the large-file storage, `hub.large_files`, by their sha256, as Git LFS does it, and
    are fetched from there; None lets every file travel inside the commit.
    """

    def __init__(self, large: int | None = None) -> None:
        self.large = large
        self.large_files: dict[str, bytes] = {}
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        # Another host by its name, as the Hub's storage is: clients take redirects to it otherwise.
        self.storage = f"http://localhost:{self.server.server_port}/large"

    def __enter__(self) -> "HubStandIn":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create(self, repo_id: str) -> None:
        self.repos.setdefault(repo_id, [(_revision({}), {})])

    def commit(self, repo_id: str, operations: list[dict[str, Any]]) -> str:
        files = dict(self.repos[repo_id][-1][1])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.large_files[value["oid"]]
            elif operation["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif operation["key"] != "header":
                raise ValueError(f"the stand-in has no operation {operation['key']!r}")
        self.repos[repo_id].append((_revision(files), files))
        return self.repos[repo_id][-1][0]

    def at(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(revision, files); "main" is the newest."""
        commits = self.repos.get(repo_id, [])
        if revision == "main":
            return commits[-1] if commits else None
        return next((commit for commit in reversed(commits) if commit[0] == revision), None)

    def upload_mode(self, size: int) -> str:
        return "regular" if self.large is None or size <= self.large else "lfs"

    def instructions(self, oid: str, size: int) -> dict[str, Any]:
        """What Git LFS's batch answer says about one object: where to put it, unless it is there."""
        if oid in self.large_files:
            return {"oid": oid, "size": size}
        href = f"{self.storage}/{oid}"
        return {"oid": oid, "size": size, "actions": {"upload": {"href": href}, "verify": {"href": href}}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self._path()
        if path == "/api/repos/create":
            given = json.loads(body)
            repo_id = "/".join(part for part in (given.get("organization") or "tester", given["name"]) if part)
            self.hub.create(repo_id)
            self._json({"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {"path": f["path"], "uploadMode": self.hub.upload_mode(f["size"])} for f in json.loads(body)["files"]
            ]
            self._json({"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            revision = self.hub.commit(match[1], [json.loads(line) for line in body.splitlines() if line.strip()])
            url = f"{self.hub.endpoint}/{match[1]}/commit/{revision}"
            self._json({"success": True, "commitUrl": url, "commitOid": revision, "hookOutput": ""})
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = [self.hub.instructions(o["oid"], o["size"]) for o in json.loads(body)["objects"]]
            self._json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/large/([0-9a-f]{64})", path):
            kept = self.hub.large_files.get(match[1])
            if kept is None or json.loads(body) != {"oid": match[1], "size": len(kept)}:
                return self._missing("EntryNotFound")
            self._json({})
        else:
            self._unknown()

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self._path()
        if not (match := re.fullmatch(r"/large/([0-9a-f]{64})", path)):
            return self._unknown()
        if hashlib.sha256(body).hexdigest() != match[1]:
            return self._send(400, b"{}", "application/json")
        self.hub.large_files[match[1]] = body
        self._send(200, b"", "application/json")

    def do_GET(self) -> None:
        path = self._path()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            found = self.hub.at(match[1], match[2] or "main")
            if found is None:
                return self._missing("RepoNotFound")
            names = [{"rfilename": name} for name in sorted(found[1])]
            return self._json({"id": match[1], "modelId": match[1], "sha": found[0], "siblings": names, "tags": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            found = self.hub.at(match[1], match[2])
            if found is None or match[3]:
                return self._missing("EntryNotFound")
            return self._json(
                [{"type": "file", "path": p, "size": len(b), "oid": _etag(b)} for p, b in sorted(found[1].items())]
            )
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            found = self.hub.at(match[1], match[2])
            if found is None:
                return self._missing("RepoNotFound")
            revision, files = found
            if match[3] not in files:
                return self._missing("EntryNotFound", revision)
            content = files[match[3]]
            oid = hashlib.sha256(content).hexdigest()
            if oid in self.hub.large_files:
                linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content)), "X-Repo-Commit": revision}
                return self._send(302, b"", "text/plain", {**linked, "Location": f"{self.hub.storage}/{oid}"})
            headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": revision}
            return self._send(200, content, "application/octet-stream", headers)
        if (match := re.fullmatch(r"/large/([0-9a-f]{64})", path)) and match[1] in self.hub.large_files:
            return self._send(200, self.hub.large_files[match[1]], "application/octet-stream")
        return self._unknown()

    do_HEAD = do_GET

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json")

    def _missing(self, code: str, revision: str | None = None) -> None:
        headers = {"X-Error-Code": code} | ({"X-Repo-Commit": revision} if revision else {})
        self._send(404, b"{}", "application/json", headers)

    def _unknown(self) -> None:
        self.hub.unknown.append(self.hub.requests[-1])
        self._send(501, b'{"error": "not part of the stand-in"}', "application/json")

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _revision(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted((name, _etag(b)) for name, b in files.items())).encode()).hexdigest()
