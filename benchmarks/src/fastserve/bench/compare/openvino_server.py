"""OpenVINO GenAI behind the little of HTTP that a comparison needs.

It is a library without a server. This file runs in its environment, not in ours, and imports
nothing of FastServe: `python openvino_server.py WEIGHTS PORT MAX_SEQS`. One thread: an iteration of
its continuous batching, then whatever there is to read and write, so HTTP costs it next to nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from dataclasses import dataclass
from typing import Any

import openvino_genai as ov  # type: ignore[import-not-found]

_CACHE_GIB = 2
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass(slots=True)
class _Answer:
    """A request under way."""

    handle: Any
    writer: asyncio.StreamWriter
    done: asyncio.Future[None]
    prompt_tokens: int
    tokens: int = 0

    def send(self, event: dict[str, Any] | str) -> None:
        text = event if isinstance(event, str) else json.dumps(event)
        data = f"data: {text}\n\n".encode()
        self.writer.write(b"%x\r\n%b\r\n" % (len(data), data))


class Server:
    """Answers POST with a streamed completion, whatever the path."""

    def __init__(self, weights: str, max_seqs: int) -> None:
        config = ov.SchedulerConfig()
        config.cache_size = _CACHE_GIB
        config.max_num_seqs = max_seqs
        self._pipeline = ov.ContinuousBatchingPipeline(weights, config, "CPU")
        self._tokenizer = self._pipeline.get_tokenizer()
        # To decode a token costs its library a run of a graph: the words as they stand do here.
        self._words = {id: word for word, id in self._tokenizer.get_vocab().items()}
        self._ids = itertools.count()
        self._answers: list[_Answer] = []
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Iterate for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pipeline.has_non_finished_requests():
                self._pipeline.step()
                for answer in list(self._answers):
                    self._pass_on(answer)
                # Twice: a client that got its last token may be back at once.
                await asyncio.sleep(0)
                await asyncio.sleep(0)

    def _pass_on(self, answer: _Answer) -> None:
        while answer.handle.can_read():
            for output in answer.handle.read().values():
                answer.tokens += len(output.generated_ids)
                text = "".join(str(self._words[token]) for token in output.generated_ids)
                answer.send({"choices": [{"index": 0, "text": text}]})
        if answer.handle.get_status() == ov.GenerationStatus.RUNNING:
            return
        answer.send({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.tokens}
        answer.send({"choices": [], "usage": usage})
        answer.send("[DONE]")
        answer.writer.write(b"0\r\n\r\n")
        self._answers.remove(answer)
        answer.done.set_result(None)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request after another."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length:")[2].partition("\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                await self._complete(body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _complete(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        config = ov.GenerationConfig()
        config.max_new_tokens = body["max_tokens"]
        config.ignore_eos = body.get("ignore_eos", False)
        config.do_sample = False
        config.apply_chat_template = False
        prompt = self._tokenizer.encode(body["prompt"]).input_ids
        handle = self._pipeline.add_request(next(self._ids), prompt, config)
        done = asyncio.get_running_loop().create_future()
        writer.write(_HEAD)
        self._answers.append(_Answer(handle, writer, done, prompt.shape[1]))
        self._wake.set()
        await done


async def main(weights: str, port: int, max_seqs: int) -> None:
    server = Server(weights, max_seqs)
    async with await asyncio.start_server(server.serve, "127.0.0.1", port):
        await server.run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
