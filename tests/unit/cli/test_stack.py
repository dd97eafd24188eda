"""The commands of a deployment: flags, addresses, secrets."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastserve.cli import stack
from fastserve.cli.errors import CliError
from fastserve.cli.service import Spec
from fastserve.cli.stack import Known, Options

_RUN = Path("/tmp/fastserve-abcdefgh")
_MODEL: Known = {"model": {"output": "/models/tiny"}, "gateway": {}}
_KEY = "sk-very-secret"


def _specs(options: Options | None = None, run: Path = _RUN) -> dict[str, Spec]:
    return {spec.name: spec for spec in stack.specs(options or Options(), run)}


def _argv(name: str, options: Options | None = None, known: Known | None = None) -> list[str]:
    return list(_specs(options)[name].argv({**_MODEL, **(known or {})}))


def _flags(argv: list[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in argv if word.startswith("--"))


def test_flags_leave_out_what_is_not_given() -> None:
    assert stack.flags(max_num_seqs=4, policy=None, model="a b=c", port=0) == [
        "--max-num-seqs=4",
        "--model=a b=c",
        "--port=0",
    ]


def test_without_options_the_services_keep_their_defaults() -> None:
    assert set(_flags(_argv("kv-offload"))) == {"ready-file", "listen"}
    assert set(_flags(_argv("scheduler"))) == {"ready-file", "listen", "worker", "redis-url"}
    assert set(_flags(_argv("worker"))) == {
        *("ready-file", "listen", "kv-offload", "model", "served-model-name"),
    }
    assert set(_flags(_argv("gateway"))) == {
        *("ready-file", "host", "port", "scheduler", "model", "served-model-name"),
    }
    assert _argv("model") == [sys.executable, "-m", "fastserve.worker.model.prepare"]


def test_options_reach_the_services_they_are_for() -> None:
    options = Options(
        model="./models/tiny.gguf",
        served_model_name="tiny",
        host="0.0.0.0",
        port=9000,
        policy="fcfs",
        fair_sharing=False,
        quantum=0.02,
        prefix_cache="all",
        kv_strategy="reactive",
        kv_write_through=False,
        max_num_partial_prefills=3,
        api_key_file=Path("/etc/keys"),
        max_num_seqs=4,
        max_num_batched_tokens=256,
        max_num_queued_reqs=10,
        starvation_threshold=1.5,
        max_model_len=512,
        block_size=8,
        kv_blocks=64,
        host_kv_blocks=32,
        host_memory="1G",
        disk_path=Path("/data"),
        disk_size="20G",
        device="cpu",
        dtype="float32",
        quantization="none",
        threads=2,
        log_level="debug",
    )
    expected = {
        "kv-offload": {
            "host-blocks": "32",
            "host-memory": "1G",
            "disk-path": "/data",
            "disk-size": "20G",
        },
        "worker": {
            "model": "/models/tiny",
            "served-model-name": "tiny",
            "device": "cpu",
            "dtype": "float32",
            "quantization": "none",
            "threads": "2",
            "max-model-len": "512",
            "max-num-seqs": "4",
            "max-num-batched-tokens": "256",
            "block-size": "8",
            "kv-blocks": "64",
        },
        "scheduler": {
            "policy": "fcfs",
            "max-num-seqs": "4",
            "max-num-batched-tokens": "256",
            "max-num-queued-reqs": "10",
            "starvation-threshold": "1.5",
            "fair-sharing": "False",
            "quantum": "0.02",
            "prefix-cache": "all",
            "kv-strategy": "reactive",
            "kv-write-through": "False",
            "max-num-partial-prefills": "3",
        },
        "gateway": {
            "host": "0.0.0.0",
            "port": "9000",
            "model": "/models/tiny",
            "served-model-name": "tiny",
            "api-key-file": "/etc/keys",
        },
    }
    for name, flags in expected.items():
        assert {**flags, "log-level": "debug"}.items() <= _flags(_argv(name, options)).items()
    assert _argv("model", options)[-1] == "./models/tiny.gguf"


@pytest.mark.parametrize("name", ["kv-offload", "worker", "scheduler", "gateway"])
def test_every_service_understands_its_flags(name: str) -> None:
    """A flag that a service does not know would stop it at start."""
    numbers = dict.fromkeys(
        ("max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs", "max_model_len",
         "block_size", "kv_blocks", "host_kv_blocks", "threads"), 1)  # fmt: skip
    options = Options(
        **numbers,  # type: ignore[arg-type]
        starvation_threshold=1.0,
        fair_sharing=True,
        quantum=0.01,
        prefix_cache="tenant",
        kv_strategy="defer",
        kv_write_through=True,
        max_num_partial_prefills=1,
        api_key_file=Path("keys"),
        host_memory="1G",
        disk_path=Path("/data"),
        disk_size="20G",
        device="cpu",
        dtype="float32",
        log_level="info",
        policy="fcfs",
    )
    argv = _argv(name, options, {name: {"metrics_port": 9100}})
    told = subprocess.run(
        [*argv[:3], "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert told.returncode == 0, told.stderr
    known = set(re.findall(r"--([a-z][a-z0-9-]*)", told.stdout))
    assert set(_flags(argv)) <= known


def test_keys_are_in_the_environment_and_in_no_command_line() -> None:
    options = Options(api_keys=(_KEY, "second"), model="tiny")
    assert json.loads(stack.environment(options)["FASTSERVE_API_KEY"]) == [_KEY, "second"]
    for name in _specs(options):
        assert not any(_KEY in word for word in _argv(name, options))


def test_keys_of_the_environment_stay_if_none_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSERVE_API_KEY", f'["{_KEY}"]')
    assert stack.environment(Options())["FASTSERVE_API_KEY"] == f'["{_KEY}"]'
    monkeypatch.delenv("FASTSERVE_API_KEY")
    assert "FASTSERVE_API_KEY" not in stack.environment(Options())


def test_paths_of_sockets_are_short_enough_and_fit_together() -> None:
    scheduler, worker = _flags(_argv("scheduler")), _flags(_argv("worker"))
    valkey = _argv("valkey")[_argv("valkey").index("--unixsocket") + 1]
    assert scheduler["worker"] == worker["listen"]
    assert worker["kv-offload"] == _flags(_argv("kv-offload"))["listen"]
    assert _flags(_argv("gateway"))["scheduler"] == scheduler["listen"]
    assert scheduler["redis-url"] == f"unix://{valkey}"
    listens = [_flags(_argv(name))["listen"] for name in ("kv-offload", "worker", "scheduler")]
    for address in (*listens, valkey):
        assert len(address.removeprefix("unix:").encode()) < 100
    assert len({*listens, valkey}) == 4


def test_the_folder_of_sockets_is_private_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    folder = stack.make_run_folder()
    try:
        assert folder.stat().st_mode & 0o077 == 0
        assert len(str(folder / "kv-offload.sock").encode()) < 100
    finally:
        folder.rmdir()


def test_a_long_temporary_folder_does_not_make_long_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    folder = stack.make_run_folder()
    try:
        assert len(str(folder / "kv-offload.sock").encode()) < 100
        assert list(long.iterdir()) == []
    finally:
        folder.rmdir()


@pytest.mark.parametrize("name", ["kv-offload", "worker", "scheduler"])
def test_metrics_keep_their_port_across_restarts(name: str) -> None:
    assert "metrics-port" not in _flags(_argv(name))  # the first life: the default
    again = _argv(name, known={name: {"pid": 1, "metrics_port": 40123}})
    assert _flags(again)["metrics-port"] == "40123"


def test_the_gateway_keeps_its_port_across_restarts() -> None:
    anyone = Options(port=0)
    assert _flags(_argv("gateway", anyone))["port"] == "0"
    again = _argv("gateway", anyone, {"gateway": {"port": 40124, "metrics_port": 40124}})
    assert _flags(again)["port"] == "40124"
    assert "metrics-port" not in _flags(again)  # its metrics are on its port


def test_services_start_after_what_they_need() -> None:
    specs = _specs()
    assert list(specs) == ["valkey", "kv-offload", "model", "worker", "scheduler", "gateway"]
    for position, spec in enumerate(specs.values()):
        assert set(spec.needs) <= set(list(specs)[:position])
    assert [name for name, spec in specs.items() if spec.once] == ["model"]


def test_standbys_have_sockets_of_their_own_and_the_gateway_knows_them_all() -> None:
    options = Options(scheduler_replicas=3)
    names = ["scheduler", "scheduler-2", "scheduler-3"]
    assert [name for name in _specs(options) if name.startswith("scheduler")] == names
    listens = [_flags(_argv(name, options))["listen"] for name in names]
    assert len(set(listens)) == 3
    told = [word for word in _argv("gateway", options) if word.startswith("--scheduler=")]
    assert told == [f"--scheduler={address}" for address in listens]
    assert set(names) <= set(_specs(options)["gateway"].needs)
    assert all("fastserve.scheduler" in _argv(name, options) for name in names)
    again = _argv("scheduler-2", options, {"scheduler-2": {"metrics_port": 9}})
    assert _flags(again)["metrics-port"] == "9"


def test_a_given_redis_replaces_the_embedded_valkey() -> None:
    options = Options(redis_url="redis://db:6379/1")
    specs = _specs(options)
    assert "valkey" not in specs
    assert not any("valkey" in spec.needs for spec in specs.values())
    assert _flags(_argv("scheduler", options))["redis-url"] == "redis://db:6379/1"


def test_valkey_listens_on_its_socket_alone_and_keeps_nothing() -> None:
    argv = _argv("valkey")
    settings = dict(zip(argv[1::2], argv[2::2], strict=True))
    assert Path(argv[0]).is_file()
    assert settings["--port"] == "0" and settings["--unixsocketperm"] == "700"
    assert settings["--save"] == "" and settings["--appendonly"] == "no"


def test_no_embedded_valkey_for_this_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CliError, match="--redis-url"):
        stack.valkey_binary()


def test_a_ready_file_of_an_earlier_life_is_forgotten(tmp_path: Path) -> None:
    spec = _specs(run=tmp_path)["worker"]
    assert spec.probe() is None
    (tmp_path / "worker.ready").write_text('{"pid": 7}')
    assert spec.probe() == {"pid": 7}
    spec.forget()
    assert spec.probe() is None
    spec.forget()  # nothing there: fine


def test_valkey_is_ready_when_it_answers(tmp_path: Path) -> None:
    spec = _specs(run=tmp_path)["valkey"]
    assert spec.probe() is None
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "valkey.sock"))
        assert spec.probe() is None  # there, but nobody listens
    spec.forget()
    assert not (tmp_path / "valkey.sock").exists()


def test_a_taken_port_is_named_with_the_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(CliError) as refused:
            stack.check_port("127.0.0.1", port)
    assert f"127.0.0.1:{port}" in str(refused.value) and "--port" in str(refused.value)
    stack.check_port("127.0.0.1", port)  # free again


def test_a_taken_port_of_ipv6() -> None:
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    with server, pytest.raises(CliError, match="--port"):
        stack.check_port("::1", server.getsockname()[1])


def test_a_host_that_is_not_ours() -> None:
    with pytest.raises(CliError, match=r"cannot listen on 192\.0\.2\.1:0"):
        stack.check_port("192.0.2.1", 0)  # reserved for documentation


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("fe80::1", "http://[fe80::1]:8000"),
        ("llm.example.org", "http://llm.example.org:8000"),
    ],
)
def test_the_address_for_clients(host: str, url: str) -> None:
    assert Options(host=host).url == url


def test_the_name_of_the_model() -> None:
    options = Options()
    assert options.model_name == stack.DEFAULT_MODEL_NAME
    assert replace(options, model="./Qwen3-0.6B/").model_name == "Qwen3-0.6B"
    named = replace(options, model="./Qwen3-0.6B", served_model_name="qwen")
    assert named.model_name == "qwen"
    assert replace(options, model=".").model_name == Path.cwd().name
