"""`fastserve chat` against a small HTTP server that plays a script."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fastserve.cli.chat import Chat, print_answer
from fastserve.cli.errors import CliError

_KEY = "sk-right"


def _event(content: str | None, **more: Any) -> str:
    delta = {"role": "assistant"} if content is None else {"content": content}
    return "data: " + json.dumps({"choices": [{"index": 0, "delta": delta}], **more})


def _stream(*pieces: str) -> list[str]:
    return [_event(None), *map(_event, pieces), "data: [DONE]"]


class Server(ThreadingHTTPServer):
    """Answers a chat request with the lines of `script`, others with `models`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: list[str] = _stream("Hello")
        self.cut = False  # break the connection at the script's end
        self.models: list[str] = ["tiny", "other"]
        self.key: str | None = None
        self.refusal: tuple[int, str] | None = None
        self.bodies: list[dict[str, Any]] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves in the middle of an answer is part of the play."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self._allowed():
            models = [{"id": name, "object": "model"} for name in self.server.models]
            self._reply(200, json.dumps({"object": "list", "data": models}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append({"path": self.path, **body})
        if not self._allowed():
            return
        if self.server.refusal is not None:
            self._reply(*self.server.refusal)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in self.server.script:
            data = f"{line}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        if self.server.cut:
            self.close_connection = True
            return
        self.wfile.write(b"0\r\n\r\n")

    def _allowed(self) -> bool:
        key = self.server.key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return True
        self._reply(401, '{"error": {"message": "the API key is wrong", "type": "auth"}}')
        return False

    def _reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join(timeout=10)


@pytest.fixture
def chat(server: Server) -> Iterator[Chat]:
    with Chat(server.url, None, "tiny") as chat:
        yield chat


def test_the_answer_comes_in_pieces(server: Server, chat: Chat) -> None:
    server.script = _stream("Hel", "lo", " wörld ✓\n")
    assert list(chat.ask("Hi")) == ["Hel", "lo", " wörld ✓\n"]


def test_ids_pings_and_what_has_no_text_are_skipped(server: Server, chat: Chat) -> None:
    server.script = [
        ": ping",
        _event(None),
        f"id: 1\n{_event('one')}",
        ": ping",
        "event: ping",
        f"id: 2\n{_event('')}",
        f"id: 3\n{_event(' two')}",
        'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}',
        'data: {"choices": [], "usage": {"total_tokens": 3}}',
        "data: [DONE]",
    ]
    assert list(chat.ask("Hi")) == ["one", " two"]


def test_what_is_asked_for(server: Server, chat: Chat) -> None:
    list(chat.ask("Hi"))
    list(chat.ask("Hi", max_tokens=5, temperature=0.0))
    plain, limited = server.bodies
    assert plain["path"] == "/v1/chat/completions"
    assert plain["stream"] is True and plain["model"] == "tiny"
    assert "max_tokens" not in plain and "temperature" not in plain  # the server's defaults
    assert (limited["max_tokens"], limited["temperature"]) == (5, 0.0)


def test_the_conversation_grows(server: Server) -> None:
    with Chat(server.url, None, "tiny", system="Be brief.") as chat:
        server.script = _stream("An", " answer")
        list(chat.ask("First?"))
        server.script = _stream("Another")
        list(chat.ask("Second?"))
        list(chat.ask("Third?"))
    start = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "First?"}]
    assert server.bodies[0]["messages"] == start
    then = [
        *start,
        {"role": "assistant", "content": "An answer"},
        {"role": "user", "content": "Second?"},
    ]
    assert server.bodies[1]["messages"] == then
    assert [message["content"] for message in server.bodies[2]["messages"][4:]] == [
        "Another",
        "Third?",
    ]


def test_an_error_in_the_stream_ends_the_answer(server: Server, chat: Chat) -> None:
    server.script = [
        _event("half an"),
        'data: {"error": {"message": "the worker is gone", "type": "server_error"}}',
        _event("never seen"),
        "data: [DONE]",
    ]
    answer = chat.ask("Hi")
    assert next(answer) == "half an"
    with pytest.raises(CliError, match=r"^the worker is gone$"):
        next(answer)


def test_what_failed_does_not_join_the_conversation(server: Server, chat: Chat) -> None:
    server.script = ['data: {"error": {"message": "the worker is gone"}}']
    with pytest.raises(CliError):
        list(chat.ask("First?"))
    server.script = _stream("fine")
    assert list(chat.ask("Second?")) == ["fine"]
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "Second?"}]


def test_a_connection_that_breaks_in_the_answer(server: Server, chat: Chat) -> None:
    server.script, server.cut = [_event("half")], True
    answer = chat.ask("Hi")
    assert next(answer) == "half"
    with pytest.raises(CliError, match=r"the connection to http://127\.0\.0\.1:\d+ broke"):
        next(answer)


@pytest.mark.parametrize("key", [None, "sk-wrong"])
def test_a_missing_or_wrong_key(server: Server, key: str | None) -> None:
    server.key = _KEY
    for model in ("tiny", None):  # asked for at once, or after a look at the models
        with (
            Chat(server.url, key, model) as chat,
            pytest.raises(CliError, match=r"the API key is wrong \(HTTP 401\)"),
        ):
            list(chat.ask("Hi"))


def test_the_right_key(server: Server) -> None:
    server.key = _KEY
    with Chat(server.url, _KEY, None) as chat:
        assert list(chat.ask("Hi")) == ["Hello"]


def test_a_refusal_that_is_not_ours_is_quoted(server: Server, chat: Chat) -> None:
    for text in ("<html>bad gateway", '"text"', '{"detail": 1}', '{"error": "plain"}', "[]"):
        server.refusal = (502, text)
        with pytest.raises(CliError) as refused:
            list(chat.ask("Hi"))
        assert str(refused.value) == f"HTTP 502: {text}"


def test_nothing_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    for model in ("tiny", None):
        with Chat(url, None, model) as chat, pytest.raises(CliError) as refused:
            list(chat.ask("Hi"))
        assert url in str(refused.value)
        assert "fastserve up" in str(refused.value) and "--url" in str(refused.value)


def test_an_address_that_is_none() -> None:
    for url in ("http://[::", "http://host:port", "localhost:8000", "host", ""):
        with pytest.raises(CliError, match="not an address"):
            Chat(url, None, "tiny")


def test_without_a_model_the_first_of_the_server_is_taken(server: Server) -> None:
    with Chat(server.url, None, None) as chat:
        list(chat.ask("Hi"))
        server.models = []  # asked for once
        list(chat.ask("Again"))
    assert [body["model"] for body in server.bodies] == ["tiny", "tiny"]


def test_a_server_without_a_model(server: Server) -> None:
    server.models = []
    with (
        Chat(server.url, None, None) as chat,
        pytest.raises(CliError, match=r"no model yet.*fastserve status"),
    ):
        list(chat.ask("Hi"))


def test_a_proxy_is_not_asked_for_this_machine(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        proxy = f"http://127.0.0.1:{free.getsockname()[1]}"
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy)
    with Chat(server.url, None, "tiny") as chat:
        assert list(chat.ask("Hi")) == ["Hello"]


def test_the_answer_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_answer(iter(["Hel", "lo"]))
    assert capsys.readouterr().out == "Hello\n"
