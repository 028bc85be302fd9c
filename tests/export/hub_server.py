"""A stand-in for the Hub over HTTP, as far as huggingface_hub talks to it in `push`. It notes what was sent."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_right"


class HubServer(ThreadingHTTPServer):
    """On a port of its choice; `address` is for HF_ENDPOINT."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.created: list[dict] = []
        self.files: dict[str, str] = {}
        "Path in the repository -> SHA-256 of what arrived."


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/api/whoami"):
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self._answer(200 if known else 401, {"name": "me", "type": "user"} if known else {"error": "who?"})
        else:
            self._answer(404, {})

    def do_POST(self):
        body = self._body()
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer(200, {"url": f"{self.server.address}/me/mine"})
        elif "/preupload/" in self.path:
            self._answer(200, {"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.server.address}/lfs"}}}
                for o in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.splitlines()])
            self._answer(200, {"commitUrl": f"{self.server.address}/me/mine/commit/0", "commitOid": "0"})
        else:  # the card's front matter is sent to be checked
            self._answer(200, {})

    def do_PUT(self):
        self.server.files["arrived"] = hashlib.sha256(self._body()).hexdigest()
        self._answer(200, {})

    def log_message(self, *arguments):
        pass

    @staticmethod
    def _mode(path: str) -> dict:
        return {
            "path": path,
            "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
            "shouldIgnore": False,
        }

    def _commit(self, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                self.server.files[value["path"]] = hashlib.sha256(content).hexdigest()
            elif line["key"] == "lfsFile":
                assert self.server.files.pop("arrived") == value["oid"]
                self.server.files[value["path"]] = value["oid"]

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, code: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
