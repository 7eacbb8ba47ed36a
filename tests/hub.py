"""A small server with the API of the Hugging Face hub."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants

SHA = "0123456789abcdef0123456789abcdef01234567"
NOT_FOUND = (401, {"X-Error-Code": "RepoNotFound"})
GATED = (403, {"X-Error-Code": "GatedRepo"})
BAD_TOKEN = (401, {"X-Error-Message": "Invalid credentials in Authorization header"})


class Hub(BaseHTTPRequestHandler):
    """files: repository -> {name: content}. The only valid token is "good". The files of "me/gated" need a token, and
    every request for "me/broken" fails."""

    files: dict[str, dict[str, bytes]]
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        token, path = self.headers.get("Authorization"), self.path.split("?")[0].strip("/").split("/")
        is_api = path[:2] == ["api", "models"]
        repo = "/".join(path[2:4] if is_api else path[:2])
        if token not in (None, "Bearer good"):
            self.answer(*BAD_TOKEN)
        elif repo == "me/broken":
            self.answer(503, {})
        elif repo not in self.files:
            self.answer(*NOT_FOUND)
        elif is_api and path[4:5] == ["tree"]:
            sizes = {name: len(content) for name, content in self.files[repo].items()}
            self.answer_json([{"type": "file", "path": name, "size": n, "oid": "0"} for name, n in sizes.items()])
        elif is_api:
            self.answer_json({"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in self.files[repo]]})
        elif repo == "me/gated" and token is None:
            self.answer(*GATED)
        else:  # OWNER/NAME/resolve/REVISION/FILE
            content = self.files[repo]["/".join(path[4:])]
            self.answer(200, {"ETag": f'"{len(content)}"', "X-Repo-Commit": SHA}, content)

    do_HEAD = do_GET

    def answer_json(self, value):
        self.answer(200, {}, json.dumps(value).encode())

    def answer(self, status: int, headers: dict, content: bytes = b""):
        self.start(status, headers, len(content))
        if self.command == "GET":
            self.wfile.write(content)

    def start(self, status: int, headers: dict, length: int):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *args):
        pass


def serve(handler: type[Hub]) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def url_of(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def use_hub(monkeypatch, url: str):
    """Makes huggingface_hub in this process send its requests to url."""
    monkeypatch.setattr(constants, "ENDPOINT", url)  # what HF_ENDPOINT sets at import
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setenv("no_proxy", "*")
