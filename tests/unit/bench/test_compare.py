"""`fastserve bench compare` with peers that are small servers, started as real processes."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

import support
from fastserve.bench.compare import contenders
from fastserve.bench.compare.contenders import (
    Contender,
    Missing,
    Needs,
    llama_cpp,
    openvino,
    vllm,
)
from fastserve.bench.compare.show import ratios
from fastserve.cli.main import app

TESTS = Path(support.__path__[0]).parent

# Notes how it was started, then serves on its --port.
SERVER = f"""#!{sys.executable}
import asyncio, json, os, sys
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
from support.api_server import main
note = {{"pid": os.getpid(), "argv": sys.argv[1:], "env": dict(os.environ)}}
Path(__file__).with_suffix(".json").write_text(json.dumps(note))
asyncio.run(main(int(sys.argv[sys.argv.index("--port") + 1])))
"""
BROKEN = f"""#!{sys.executable}
import sys
sys.exit("it needs a library that is not there")
"""
QUANTIZE = f"""#!{sys.executable}
import pathlib, sys
pathlib.Path(sys.argv[3]).write_text(sys.argv[4])
"""
# As much of OpenVINO GenAI as our server of it uses: a token per request and step.
OPENVINO = """
import numpy

class GenerationStatus:
    RUNNING, FINISHED = range(2)

class SchedulerConfig:
    pass

class GenerationConfig:
    pass

class Output:
    generated_ids = [7]

class Encoded:
    def __init__(self, text):
        self.input_ids = numpy.zeros((1, len(text.split())))

class Tokenizer:
    def get_vocab(self):
        return {"word": 7}

    def encode(self, text):
        return Encoded(text)

class Handle:
    def __init__(self, left):
        self.left, self.unread = left, 0

    def can_read(self):
        return self.unread > 0

    def read(self):
        self.unread -= 1
        return {0: Output()}

    def get_status(self):
        return GenerationStatus.RUNNING if self.left else GenerationStatus.FINISHED

class ContinuousBatchingPipeline:
    def __init__(self, weights, config, device):
        assert open(weights).read() and device == "CPU"
        self.most, self.handles = config.max_num_seqs, []

    def get_tokenizer(self):
        return Tokenizer()

    def add_request(self, request_id, prompt, config):
        assert config.ignore_eos in (True, False) and not config.do_sample
        self.handles.append(Handle(config.max_new_tokens))
        return self.handles[-1]

    def has_non_finished_requests(self):
        return any(handle.left for handle in self.handles)

    def step(self):
        for handle in [handle for handle in self.handles if handle.left][: self.most]:
            handle.left -= 1
            handle.unread += 1
"""
SILENT = f"""#!{sys.executable}
import time
time.sleep(600)
"""


def program(path: Path, text: str = SERVER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def note(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return found


def invoke(*arguments: str) -> Any:
    environment = {"COLUMNS": "130", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, ["bench", "compare", *arguments], env=environment)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    file = tmp_path / "weights.Q4_1.gguf"
    file.write_text("weights")
    return file


def test_peers_are_started_measured_and_stopped(
    tmp_path: Path, gguf: Path, default_model_folder: Path
) -> None:
    env = program(tmp_path / "env/bin/vllm")
    llama = program(tmp_path / "llama/llama-server")
    program(llama.with_name("llama-quantize"), QUANTIZE)
    broken = program(tmp_path / "tf/bin/transformers", BROKEN)
    result = invoke(
        *("--only", "vllm,llama.cpp,transformers", "--model", str(default_model_folder)),
        *("--vllm", str(tmp_path / "env"), "--llama-server", str(llama), "--gguf", str(gguf)),
        *("--transformers", str(broken)),
        *("-c", "1,3", "--rate", "50", "-n", "6", "--output-tokens", "5", "--json"),
        *("--out", str(tmp_path / "out")),
    )
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    names = ["vLLM", "llama.cpp Q4_1", "llama.cpp Q8_0"]
    levels = [(1, None), (3, None), (None, 50.0)]
    assert [(one["contender"], (one["concurrency"], one["rate"])) for one in found] == [
        (name, level) for name in names for level in levels
    ]
    assert all(one["failed"] == 0 and one["requests"] == 6 for one in found)
    assert all(one["output_tokens"] == 30 for one in found)
    # The one that cannot run is skipped with its own words.
    assert "skipped transformers serve" in result.stderr
    assert "it needs a library that is not there" in result.stderr
    for path in (env, llama):
        assert not psutil.pid_exists(note(path)["pid"])
    with (tmp_path / "out/compare.csv").open() as file:
        assert [row["contender"] for row in csv.DictReader(file)] == [
            n for n in names for _ in "123"
        ]
    for plot in ("compare-concurrency.png", "compare-concurrency.svg", "compare-rate.svg"):
        assert (tmp_path / "out" / plot).stat().st_size > 1000


def test_each_gets_the_settings_that_it_is_fastest_with(
    tmp_path: Path, gguf: Path, default_model_folder: Path
) -> None:
    env = program(tmp_path / "env/bin/vllm")
    openmp = tmp_path / "env/lib/libiomp5.so"
    openmp.parent.mkdir()
    openmp.touch()
    needs = Needs(default_model_folder, gguf, streams=32, length=172, cores=2)
    peer = vllm(needs, tmp_path / "env")
    assert isinstance(peer, Contender)
    assert peer.env["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert str(openmp) in peer.env["LD_PRELOAD"]
    assert peer.command(99)[:2] == [str(env), "serve"] and "99" in peer.command(99)
    llama = program(tmp_path / "llama-server")
    (server,) = llama_cpp(needs, llama, [], tmp_path)
    assert isinstance(server, Contender)
    words = server.command(99)
    assert words[words.index("-np") + 1] == "32" and words[words.index("-t") + 1] == "2"
    assert int(words[words.index("-c") + 1]) >= 32 * 172


def test_a_library_is_measured_behind_a_server_of_ours(
    tmp_path: Path, gguf: Path, default_model_folder: Path
) -> None:
    packages = tmp_path / "env/lib/python3.11/site-packages"
    (packages / "openvino_genai").mkdir(parents=True)
    (packages / "openvino_genai/__init__.py").write_text(OPENVINO)
    script = f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n'
    program(tmp_path / "env/bin/python", script)
    llama = program(tmp_path / "llama-server")
    program(llama.with_name("llama-quantize"), QUANTIZE)
    result = invoke(
        *("--only", "openvino", "--openvino", str(tmp_path / "env"), "--gguf", str(gguf)),
        *("--llama-server", str(llama), "--model", str(default_model_folder)),
        *("-c", "1,3", "-n", "6", "--output-tokens", "5", "--json"),
    )
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(one["contender"], one["concurrency"]) for one in found] == [
        (f"OpenVINO {kind}", level) for kind in ("Q4_1", "Q8_0") for level in (1, 3)
    ]
    assert all(one["failed"] == 0 and one["output_tokens"] == 30 for one in found)
    assert all(one["without_usage"] == 0 for one in found)


def test_what_is_not_installed_is_told_with_the_way_to_point_at_it(
    tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    needs = Needs(tmp_path, gguf, 8, 172, 2)
    for found in (vllm(needs, None), *llama_cpp(needs, tmp_path / "nothing", ["Q8_0"], tmp_path)):
        assert isinstance(found, Missing) and "--" in found.why
    for place in (None, tmp_path):
        (missing,) = openvino(needs, place, [], None, tmp_path)
        assert isinstance(missing, Missing) and "--openvino" in missing.why
    llama = program(tmp_path / "llama-server")
    (missing,) = llama_cpp(Needs(tmp_path, None, 8, 172, 2), llama, [], tmp_path)
    assert isinstance(missing, Missing) and "--gguf" in missing.why
    _, missing = llama_cpp(needs, llama, ["Q8_0"], tmp_path)
    assert isinstance(missing, Missing) and "llama-quantize" in missing.why


def test_a_table_that_goes_to_no_terminal_is_whole(
    tmp_path: Path, default_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some names are long: `fastserve` and its flags."""
    program(tmp_path / "env/bin/vllm")
    name = " ".join(["vLLM", *(f"--flag-number-{number} {number}" for number in range(20))])

    def named(needs: Needs, place: Path | None) -> Contender:
        peer = vllm(needs, place)
        assert isinstance(peer, Contender)
        return replace(peer, name=name)

    monkeypatch.setattr(contenders, "vllm", named)
    result = invoke(
        *("--only", "vllm", "--vllm", str(tmp_path / "env"), "--model", str(default_model_folder)),
        *("-c", "1,3", "-n", "6", "--output-tokens", "5"),
    )
    assert result.exit_code == 0, result.output
    columns, *_ = [line for line in result.stdout.splitlines() if "tokens/s" in line]
    assert columns.split()[-3:] == ["P50", "P99", "failed"]
    for level in (1, 3):
        (line,) = [one for one in result.stdout.splitlines() if f"{level} at a time" in one]
        assert line.split(name)[1].split()[-1] == "0"


def test_a_peer_that_never_comes_up_is_given_up(tmp_path: Path, default_model_folder: Path) -> None:
    silent = program(tmp_path / "vllm", SILENT)
    result = invoke(
        *("--only", "vllm", "--vllm", str(silent), "--model", str(default_model_folder)),
        *("-c", "1", "--start-timeout", "1"),
    )
    assert result.exit_code == 1
    assert "not ready after 1 s" in result.stderr


def test_bad_values_are_one_sentence_and_status_2(tmp_path: Path) -> None:
    for words, said in (
        (("-c", "0"), "--concurrency"),
        (("-r", "0"), "rate"),
        (("--repeat", "0"), "repeat"),
    ):
        result = invoke(*words)
        assert result.exit_code == 2 and said in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_ratios_are_of_the_first_contender_at_the_same_level() -> None:
    def row(name: str, concurrency: int, tokens: float) -> dict[str, Any]:
        values = {"concurrency": concurrency, "rate": None, "output_tokens_per_s": tokens}
        return {"contender": name, **values}

    rows = [row("a", 1, 10.0), row("a", 8, 40.0), row("b", 1, 5.0), row("b", 8, 0.0)]
    assert ratios([*rows, row("b", 32, 9.0)]) == [1.0, 1.0, 2.0, None, None]
