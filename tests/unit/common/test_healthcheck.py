from __future__ import annotations

import asyncio
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastserve.common.healthcheck import check, main
from fastserve.common.rpc import GrpcServer


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_a_grpc_service(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = GrpcServer()
    address = await server.start("127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path}/health.sock")
    try:
        await server.set_serving(True)
        assert await asyncio.to_thread(main, [address]) == 0
        await server.set_serving(False)
        assert await asyncio.to_thread(main, [address]) == 1
        assert capsys.readouterr().err == f"{address} is not healthy: NOT_SERVING\n"
    finally:
        await server.stop(0)
    problem = await asyncio.to_thread(check, address, 0.3)
    assert problem is not None and problem.startswith(("UNAVAILABLE", "DEADLINE_EXCEEDED"))


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/readyz" else 503)
        self.end_headers()
        self.wfile.write(b"no worker")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(5)


def test_http(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # no business of a health check
    assert check(f"{url}/readyz", 5) is None
    assert check(f"{url}/other", 5) == "HTTP 503: no worker"


def test_nobody_there() -> None:
    problem = check("http://127.0.0.1:1/readyz", 5)
    assert problem is not None and "refused" in problem


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["a", "--timeout", "soon"]])
def test_wrong_use(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
