"""docker-compose.yml, the Dockerfiles and prometheus.yml against the services' settings.

The services' containers are not started here: `make test-compose` does that.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastserve.common.settings import ServiceSettings, load_settings
from fastserve.gateway.settings import GatewaySettings
from fastserve.kv_offload.settings import Settings as KvOffloadSettings
from fastserve.scheduler.settings import SchedulerSettings
from fastserve.worker.settings import Settings as WorkerSettings

ROOT = Path(__file__).parents[3]
SETTINGS: dict[str, type[ServiceSettings]] = {
    "gateway": GatewaySettings,
    "scheduler": SchedulerSettings,
    "worker": WorkerSettings,
    "kv-offload": KvOffloadSettings,
}
_VARIABLE = re.compile(r"\$\{(\w+)(?:(-)([^}]*))?\}")
# Read without being a setting.
_OTHERS = {"FASTSERVE_CACHE_DIR"}


def dotenv() -> dict[str, str]:
    lines = (ROOT / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def compose(name: str = "docker-compose.yml") -> dict[str, Any]:
    """The file with the variables of .env filled in; a variable that is nowhere is an error."""
    known = dotenv()

    def fill(match: re.Match[str]) -> str:
        return known[match[1]] if match[2] is None else known.get(match[1], match[3])

    loaded: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(fill, (ROOT / name).read_text()))
    return loaded


def dockerfile(service: str) -> str:
    return (ROOT / "docker" / f"{service}.Dockerfile").read_text()


def image_env(service: str) -> dict[str, str]:
    """ENV of the last stage."""
    text = dockerfile(service).replace("\\\n", " ")
    lines = [line[4:] for line in text.splitlines() if line.startswith("ENV ")]
    return dict(pair.split("=", 1) for line in lines for pair in line.split())


def environment(service: str) -> dict[str, str]:
    """What the container's process finds."""
    given: dict[str, str] = compose()["services"][service]["environment"]
    return image_env(service) | given


def settings(service: str, **more: str) -> ServiceSettings:
    """As the service reads them in its container."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in (environment(service) | more).items():
            monkeypatch.setenv(name, value)
        return load_settings(SETTINGS[service], f"fastserve-{service}", [])


@pytest.mark.parametrize("service", SETTINGS)
def test_every_variable_is_a_setting(service: str) -> None:
    fields = {f"FASTSERVE_{name.upper()}" for name in SETTINGS[service].model_fields}
    names = {name for name in environment(service) if name.startswith("FASTSERVE_")}
    assert names - fields <= _OTHERS


def test_the_services_find_each_other(tmp_path: Path) -> None:
    gateway = settings("gateway")
    assert isinstance(gateway, GatewaySettings)
    scheduler = settings("scheduler")
    assert isinstance(scheduler, SchedulerSettings)
    assert gateway.scheduler == [f"scheduler:{scheduler.listen.rpartition(':')[2]}"]
    worker = settings("worker")
    assert isinstance(worker, WorkerSettings)
    assert scheduler.workers == [f"worker:{worker.listen.rpartition(':')[2]}"]
    assert scheduler.redis_url == "redis://valkey:6379/0"
    pool = str(tmp_path)  # that of the container does not exist here
    kv_offload = settings("kv-offload", FASTSERVE_POOL_DIR=pool)
    assert isinstance(kv_offload, KvOffloadSettings)
    assert worker.kv_offload == kv_offload.listen
    # Everybody listens for the other containers, and serves the model that the image holds.
    assert gateway.host == "0.0.0.0"
    assert scheduler.metrics_host == worker.metrics_host == kv_offload.metrics_host == "0.0.0.0"
    assert str(gateway.model) == worker.model
    assert f"{worker.model} " in dockerfile("worker")


def test_socket_and_pool_are_in_the_volume_that_both_have() -> None:
    file = compose()
    for service in ("worker", "kv-offload"):
        assert file["services"][service]["volumes"] == ["kv:/run/fastserve"]
        assert "10001:10001" in dockerfile(service)
    options = file["volumes"]["kv"]["driver_opts"]
    assert options["type"] == "tmpfs" and "uid=10001" in options["o"]
    env = environment("kv-offload")
    assert env["FASTSERVE_POOL_DIR"] == "/run/fastserve"
    assert env["FASTSERVE_LISTEN"].startswith("unix:/run/fastserve/")


def test_prometheus_scrapes_every_service_where_it_serves_metrics() -> None:
    config = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())
    targets = {
        target
        for job in config["scrape_configs"]
        for part in job["static_configs"]
        for target in part["targets"]
    }
    ports = {service: environment(service).get("FASTSERVE_METRICS_PORT") for service in SETTINGS}
    ports["gateway"] = environment("gateway")["FASTSERVE_PORT"]  # with the API
    assert targets == {f"{service}:{port}" for service, port in ports.items()}
    for service, port in ports.items():
        assert re.search(rf"^EXPOSE .*\b{port}\b", dockerfile(service), re.MULTILINE), service


def test_who_is_waited_for_has_a_health_check() -> None:
    services = compose()["services"]
    for service in services.values():
        needs = service.get("depends_on", {})
        assert set(needs) <= services.keys()
        for name in needs if isinstance(needs, dict) else ():
            assert "healthcheck" in services[name] or "HEALTHCHECK" in dockerfile(name)


@pytest.mark.parametrize("service", SETTINGS)
def test_the_services_have_no_rights_to_spare(service: str) -> None:
    container = compose()["services"][service]
    assert container["read_only"] and container["cap_drop"] == ["ALL"]
    assert container["security_opt"] == ["no-new-privileges:true"]
    last_stage = dockerfile(service).rpartition("\nFROM ")[2]
    assert "\nUSER 10001:10001\n" in last_stage
    assert last_stage.index("USER 10001") > last_stage.index("RUN ")
    grace = float(container["stop_grace_period"].removesuffix("s"))
    assert grace > SETTINGS[service].model_fields["shutdown_timeout"].default


def test_versions_are_pinned_and_ports_are_private() -> None:
    for name, service in compose()["services"].items():
        image, _, tag = service["image"].rpartition(":")
        assert image and re.match(r"v?\d+\.\d+\.\d+", tag), f"{name}: {service['image']}"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    assert dotenv().keys() <= used, "a version that nothing uses"


def test_mounted_files_exist() -> None:
    for service in compose()["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).exists(), source


def test_the_overlay_for_gpus_changes_the_worker_only() -> None:
    overlay = compose("compose.gpu.yaml")["services"]
    assert set(overlay) == {"worker"}
    names = {f"FASTSERVE_{name.upper()}" for name in WorkerSettings.model_fields}
    assert overlay["worker"]["environment"].keys() <= names
    assert overlay["worker"]["image"].endswith("-cuda")


def test_only_what_is_built_is_sent_to_docker() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*", "everything is left out but"
    kept = [line[1:] for line in lines if line.startswith("!")]
    copied = {
        source
        for service in SETTINGS
        for line in dockerfile(service).splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert all(any(source.startswith(keep) for keep in kept) for source in copied)
    assert all(any(source.startswith(keep) for source in copied) for keep in kept)
