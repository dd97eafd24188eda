"""A model comes from a hub over HTTP: a server of the test answers as Hugging Face does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "c" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights" * 1000,
    "pytorch_model.bin": b"a pickle, which could run code",
    "modeling_custom.py": b"raise SystemExit",
}


class Hub(BaseHTTPRequestHandler):
    """One repository, org/tiny, with a tag v1; org/gated asks for the token `secret`."""

    loaded: list[str]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        gated = "org/gated" in path
        if gated and self.headers.get("Authorization") != "Bearer secret":
            self._send(403, b"gated", body, {"X-Error-Code": "GatedRepo"})
        elif path in (f"/api/models/org/{n}/revision/v1" for n in ("tiny", "gated")):
            about = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": n} for n in FILES]}
            self._send(200, json.dumps(about).encode(), body)
        elif path.endswith(f"/tree/{COMMIT}"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}
                for name, content in FILES.items()
            ]
            self._send(200, json.dumps(tree).encode(), body)
        elif f"/resolve/{COMMIT}/" in path and path.rpartition("/")[2] in FILES:
            name = path.rpartition("/")[2]
            if body:
                self.loaded.append(name)
            etag = {"ETag": f'"{_digest(FILES[name])}"', "X-Repo-Commit": COMMIT}
            self._send(200, FILES[name], body, etag)
        else:
            self._send(404, b"none", body, {"X-Error-Code": "RevisionNotFound"})

    def _send(
        self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.loaded = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join(timeout=10)
    server.server_close()


def run(hub: str, folder: Path, *arguments: str, token: str = "") -> tuple[int, str]:
    """Exit status and stderr of the command, in the environment that the chart gives it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub, "HF_HOME": f"{folder}/home", "HF_HUB_OFFLINE": "0"}
    env |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "fastserve.common.download", *arguments]
    command += ["--revision=v1"] if "--revision=v2" not in arguments else []
    result = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    return result.returncode, result.stderr


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_a_worker_gets_texts_and_weights_and_no_code(hub: str, tmp_path: Path) -> None:
    folder = tmp_path / "org--tiny"
    status, error = run(hub, tmp_path, "org/tiny", f"--into={folder}")
    assert status == 0, error
    wanted = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
    assert names(folder) == wanted
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    before = len(Hub.loaded)
    assert run(hub, tmp_path, "org/tiny", f"--into={folder}")[0] == 0
    assert len(Hub.loaded) == before, "what is there is not loaded again"


def test_a_gateway_gets_no_weights(hub: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    status, error = run(hub, tmp_path, "org/tiny", f"--into={folder}", "--tokenizer-only")
    assert status == 0, error
    assert names(folder) == {"config.json", "tokenizer.json", "chat_template.jinja"}


def test_a_gated_model_needs_the_token(hub: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    status, error = run(hub, tmp_path, "org/gated", f"--into={folder}")
    assert status == 1 and error.startswith("org/gated@v1: ") and error.count("\n") == 1
    assert run(hub, tmp_path, "org/gated", f"--into={folder}", token="secret")[0] == 0


def test_what_does_not_exist_is_one_sentence(hub: str, tmp_path: Path) -> None:
    status, error = run(hub, tmp_path, "org/tiny", f"--into={tmp_path}/m", "--revision=v2")
    assert status == 1 and error.startswith("org/tiny@v2: ") and error.count("\n") == 1
    status, error = run("http://127.0.0.1:1", tmp_path, "org/tiny", f"--into={tmp_path}/m")
    assert status == 1 and error.count("\n") == 1
