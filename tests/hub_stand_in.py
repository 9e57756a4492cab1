"""A stand-in for the hub's HTTP interface on this machine: what huggingface_hub calls to create, push and download.

Usage as a script: python hub_stand_in.py OWNER/REPO FOLDER serves a folder and prints the address for HF_ENDPOINT.
"""

import base64
import hashlib
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"
LFS_FROM = 4096
"""Bytes from which a file is sent by LFS and not inside of the commit."""


class Hub:
    """Repositories in memory, and every request that was made."""

    def __init__(self, *, needs_token=True):
        self.needs_token = needs_token
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def sha(self, repo):
        digest = hashlib.sha1()
        for name, data in sorted(self.repos[repo].items()):
            digest.update(name.encode() + hashlib.sha1(data).digest())
        return digest.hexdigest()

    def env(self, home: Path, token=TOKEN):
        known = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return known | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | ({"HF_TOKEN": token} if token else {})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, data, status=200, headers=()):
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in (("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status, code, message):
        self.answer({"error": message}, status, [("X-Error-Code", code), ("X-Error-Message", message)])

    def dispatch(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self.chunked()
        method = {"GET": self.read, "HEAD": self.read, "POST": self.write, "PUT": self.put}[self.command]
        method(path.strip("/").split("/"), body)

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def chunked(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def has_rights(self):
        return not self.hub.needs_token or self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def put(self, parts, body):
        self.hub.blobs[parts[1]] = body
        self.answer({})

    def write(self, parts, body):
        hub = self.hub
        if not self.has_rights:
            return self.fail(401, "", "Invalid username or password.")
        if parts[:2] == ["api", "validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] == "not-mine":
                return self.fail(403, "", "You don't have the rights to create a model under this namespace")
            if repo in hub.repos:
                return self.fail(409, "", "You already created this model repo")
            hub.repos[repo] = {}
            hub.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
            return self.answer({"url": f"{hub.endpoint}/{repo}", "name": repo})
        if parts[-3:] == ["lfs", "objects", "batch"]:
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        repo, action = "/".join(parts[2:4]), parts[4]
        if repo not in hub.repos:
            return self.fail(404, "RepoNotFound", "Repository not found")
        if action == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LFS_FROM else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                data = hub.blobs[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"] and len(data) == value["size"]
                hub.repos[repo][value["path"]] = data
        return self.answer({"commitUrl": f"{hub.endpoint}/{repo}/commit/{hub.sha(repo)}", "commitOid": hub.sha(repo)})

    def read(self, parts, _body):
        hub = self.hub
        is_api = parts[0] == "api"
        repo = "/".join(parts[2:4] if is_api else parts[:2])
        rest = parts[4:] if is_api else parts[2:]
        if repo not in hub.repos or (hub.private.get(repo) and not self.has_rights):
            return self.fail(401 if not self.has_rights else 404, "RepoNotFound", "Repository not found")
        files, sha = hub.repos[repo], hub.sha(repo)
        if len(rest) > 1 and rest[1] not in ("main", sha):
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {rest[1]}")
        if is_api and rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in sorted(files.items())
            ]
            return self.answer(entries)
        if is_api:
            siblings = [{"rfilename": name} for name in sorted(files)]
            return self.answer({"id": repo, "modelId": repo, "sha": sha, "siblings": siblings, "private": False})
        name = "/".join(rest[2:])
        headers = [("X-Repo-Commit", sha)]
        if name not in files:
            message = "Entry not found"
            return self.answer(
                {"error": message}, 404, [*headers, ("X-Error-Code", "EntryNotFound"), ("X-Error-Message", message)]
            )
        etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
        return self.answer(files[name], 200, [*headers, ("ETag", etag), ("Accept-Ranges", "none")])


def main():
    hub, (repo, folder) = Hub(needs_token=False), sys.argv[1:3]
    files = (file for file in Path(folder).rglob("*") if file.is_file())
    hub.repos[repo] = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
    print(hub.endpoint, flush=True)
    time.sleep(3600)


if __name__ == "__main__":
    main()
