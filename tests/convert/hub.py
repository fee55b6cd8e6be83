"""A Hub on this machine: as much of the HTTP API as create_repo and upload_folder use.

POST /api/repos/create                         409 if there is one
GET  /api/models/{repo}[/revision/main]        its last commit
POST /api/validate-yaml                        README.md
POST /api/models/{repo}/preupload/main         small text, or a large object?
POST /{repo}.git/info/lfs/objects/batch        which objects are missing, and where to put them
PUT  /objects/{sha256}, POST /verify           an object
POST /api/models/{repo}/commit/main            JSON lines: text in base64, objects by sha256
GET  /api/models/{repo}/xet-write-token/main   where hf_xet is to store objects: a folder, if the Hub has one
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Self

CUT = -1  # of a fault: the connection breaks when half of the request has arrived
LARGE = (".safetensors", "tokenizer.json")
Reply = tuple[int, dict[str, Any]]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """Serves while it is entered.

    Attributes:
        token: the only one that is let in.
        fault: asked for each request ("PUT /objects/..."): a status to refuse it with, CUT, or None.
        corrupt: change a byte of every object that arrives, and do not tell.
        asked: all requests so far.
        objects: the large objects that have arrived, by sha256.
        repos: files by path; of an object that hf_xet stored, its sha256.
    """

    def __init__(self, *, token: str = "hf_right", xet: Path | None = None):
        self.token, self.xet, self.corrupt = token, xet, False
        self.fault: Callable[[str], int | None] = lambda request: None
        self.asked: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.repos: dict[str, dict[str, bytes | str]] = {}
        self.commits = 0
        self.lock = Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThisHub", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def puts(self) -> list[str]:
        """The objects that were begun to be sent, in this order; some more than once."""
        return [request.rpartition("/")[2] for request in self.asked if request.startswith("PUT ")]

    def answer(self, request: str, body: bytes) -> Reply:
        if request.startswith("PUT /objects/"):
            return self._store(request.rpartition("/")[2], body)
        if request in ("POST /api/validate-yaml", "POST /verify"):
            return 200, {}
        if request == "POST /api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", request):
            return self._on(match[1], self._batch, body)
        if match := re.fullmatch(r"(?:GET|POST) /api/models/([^/]+/[^/]+)(?:/([\w-]+)/main)?", request):
            parts = {None: self._info, "revision": self._info, "preupload": self._preupload, "commit": self._commit}
            if self.xet is not None:
                parts["xet-write-token"] = self._xet_token
            if match[2] in parts:
                return self._on(match[1], parts[match[2]], body)
        return 404, {"error": f"{request}: not a part of this Hub"}

    def _on(self, repo: str, part: Callable[[str, bytes], Reply], body: bytes) -> Reply:
        return part(repo, body) if repo in self.repos else (404, {"error": "Repository not found"})

    def _create(self, asked: dict[str, Any]) -> Reply:
        repo = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.url}/{repo}"}
        if repo in self.repos:
            return 409, url | {"error": "You already created this model repo"}
        self.repos[repo] = {}
        return 200, url

    def _info(self, repo: str, _: bytes) -> Reply:
        return 200, {"id": repo, "sha": f"{self.commits:040x}", "siblings": [], "tags": []}

    def _preupload(self, repo: str, body: bytes) -> Reply:
        files = []
        for file in json.loads(body)["files"]:
            path, is_large = file["path"], file["path"].endswith(LARGE)
            old = self.repos[repo].get(path)
            of_old = {"oid": old if isinstance(old, str) else (digest if is_large else git_digest)(old)} if old else {}
            mode = "lfs" if is_large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | of_old)
        return 200, {"files": files}

    def _batch(self, repo: str, body: bytes) -> Reply:
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.objects:
                upload = {"href": f"{self.url}/objects/{entry['oid']}"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/verify"}}
        return 200, {"transfer": "basic", "objects": objects}

    def _store(self, oid: str, data: bytes) -> Reply:
        if digest(data) != oid:
            return 400, {"error": "the object is not what its name says"}
        self.objects[oid] = bytes([data[0] ^ 1]) + data[1:] if self.corrupt else data
        return 200, {}

    def _commit(self, repo: str, body: bytes) -> Reply:
        files: dict[str, bytes | str] = {}
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                stored = value["oid"] if self.xet is not None else self.objects.get(value["oid"])
                if stored is None:
                    return 400, {"error": f"{value['path']}: its object has not arrived"}
                files[value["path"]] = stored
        self.repos[repo] |= files
        self.commits += 1
        oid = f"{self.commits:040x}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"}

    def _xet_token(self, repo: str, _: bytes) -> Reply:
        return 200, {"casUrl": f"local://{self.xet}", "accessToken": "of xet", "exp": int(time.time()) + 3600}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        hub, request = self.hub, f"{self.command} {self.path.partition('?')[0]}"
        with hub.lock:
            hub.asked.append(request)
            fault = hub.fault(request)
        length = int(self.headers.get("Content-Length", 0))
        if fault == CUT:
            self.rfile.read(length // 2)
            self._cut()
            return
        body = self.rfile.read(length)
        if fault is not None:
            self._reply(fault, {"error": f"no: {HTTPStatus(fault).phrase}"})
        elif self.command != "PUT" and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._reply(401, {"error": "Invalid username or password."})
        else:
            with hub.lock:
                reply = hub.answer(request, body)
            self._reply(*reply)

    do_GET = do_POST = do_PUT = _serve

    def _cut(self) -> None:
        """Reset the connection; closing it in order could look like an answer."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _reply(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if "error" in value:
            self.send_header("X-Error-Message", value["error"])
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""
