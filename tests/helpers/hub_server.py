"""A local HTTP server that speaks the part of the Hugging Face Hub's API with which models are downloaded."""

import hashlib
import http.server
import json
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LARGE = (".safetensors", ".gguf", ".bin", ".onnx")  # kept in Git LFS, and served from another address


class HubServer:
    """The server. Requests are answered from folders, and recorded.

    repositories: folders by org/name and revision. gated: repositories that need one of `tokens` for their files.
    status: an HTTP status with which every request is answered; None answers as the Hub does.
    requests: (method, path) of each request for the list of files or for a file.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, Path]] = {}
        self.gated: set[str] = set()
        self.tokens: set[str] = set()
        self.status: int | None = None
        self.requests: list[tuple[str, str]] = []
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.storage = self.endpoint.replace("127.0.0.1", "localhost")  # another host, as for the real Hub
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloaded(self) -> set[str]:
        """Returns the names of the files whose content was sent."""
        return {
            path.split("?")[0].rsplit("/", 1)[1]
            for method, path in self.requests
            if method == "GET" and "/api/" not in path
        }

    def commit(self, repository: str, revision: str) -> str | None:
        """Returns the commit of a branch or of itself: a digest of the files. None when there is no such revision."""
        commits = {name: _digest(folder) for name, folder in self.repositories[repository].items()}
        return revision if revision in commits.values() else commits.get(revision)

    def folder(self, repository: str, commit: str) -> Path:
        return next(folder for folder in self.repositories[repository].values() if _digest(folder) == commit)


def _digest(folder: Path) -> str:
    digest = hashlib.sha1()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: HubServer

    def log_message(self, *_) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        raw = urlsplit(self.path).path
        path, parts = unquote(raw), [unquote(part) for part in raw.strip("/").split("/")]
        if "/agent-harnesses" in path:
            return self._fail(404)
        self.hub.requests.append((self.command, path))
        if self.hub.status:
            return self._fail(self.hub.status)
        if parts[:2] == ["api", "models"]:
            revision = parts[5] if parts[4:5] == ["revision"] else "main"
            return self._answer_info("/".join(parts[2:4]), revision)
        if parts[0] == "cdn":
            return self._answer_file(Path("/" + "/".join(parts[1:])), {})
        return self._answer_resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _answer_info(self, repository: str, revision: str) -> None:
        commit = self._commit(repository, revision)
        if commit:
            folder = self.hub.folder(repository, commit)
            files = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
            tree = {"id": repository, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
            self._send(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())

    def _answer_resolve(self, repository: str, revision: str, file: str) -> None:
        commit = self._commit(repository, revision)
        if not commit:
            return None
        if repository in self.hub.gated and self._token() not in self.hub.tokens:
            return self._fail(403 if self._token() else 401, "GatedRepo")
        path = self.hub.folder(repository, commit) / file
        headers = {"X-Repo-Commit": commit}
        if not path.is_file():
            return self._fail(404, "EntryNotFound", headers)
        if not file.endswith(_LARGE):
            return self._answer_file(path, headers)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(path.stat().st_size)}
        return self._send(302, headers | linked | {"Location": f"{self.hub.storage}/cdn{path}"}, b"")

    def _answer_file(self, path: Path, headers: dict[str, str]) -> None:
        data = path.read_bytes()
        headers = headers | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        start = self.headers.get("Range")
        if start:
            first = int(start.removeprefix("bytes=").split("-")[0])
            headers |= {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
            return self._send(206, headers, data[first:])
        return self._send(200, headers, data)

    def _commit(self, repository: str, revision: str) -> str | None:
        """Returns the commit; answers the request itself when there is none."""
        token = self._token()
        if token and token not in self.hub.tokens and token != "no-access":
            return self._fail(401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
        if repository not in self.hub.repositories:  # the Hub tells strangers nothing about private repositories
            return self._fail(404, "RepoNotFound") if token else self._fail(401)
        commit = self.hub.commit(repository, revision)
        return commit or self._fail(404, "RevisionNotFound")

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _fail(self, status: int, code: str = "", headers: dict[str, str] | None = None) -> None:
        self._send(status, (headers or {}) | ({"X-Error-Code": code} if code else {}), b'{"error": "no"}')

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
