"""A hub of one's own: repositories that are folders, served as huggingface_hub asks for them, and what was asked for."""

import hashlib
import http.server
import json
import threading
from pathlib import Path


class Hub(http.server.ThreadingHTTPServer):
    """Serves `root`/OWNER/NAME; `fetched` are the files whose content was sent."""

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.fetched = root, list[str]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        words = self.path.partition("?")[0].strip("/").split("/")
        if words[:2] == ["api", "models"]:
            folder = self.server.root.joinpath(*words[2:4])
            if folder.is_dir():
                files = sorted(path for path in folder.rglob("*") if path.is_file())
                siblings = [{"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size} for path in files]
                tree = [
                    {"type": "file", "path": each["rfilename"], "size": each["size"], "oid": "0" * 40}
                    for each in siblings
                ]
                about = {"id": "/".join(words[2:4]), "sha": "1" * 40, "siblings": siblings}
                return self._send(200, json.dumps(tree if "tree" in words else about).encode())
        elif "resolve" in words:
            file = self.server.root.joinpath(*words[:2], *words[4:])
            if file.is_file():
                if self.command == "GET":
                    self.server.fetched.append("/".join(words[4:]))
                return self._send(200, file.read_bytes())
            return self._send(404, b"", "EntryNotFound")
        self._send(404, b"{}", "RepoNotFound")

    def _send(self, status: int, content: bytes, code: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "1" * 40)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass
