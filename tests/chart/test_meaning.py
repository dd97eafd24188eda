"""What the chart says is so: each check holds for every case, and notices a broken chart."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastserve.common import download
from fastserve.common.errors import StartupError
from fastserve.common.settings import load_settings
from support import chart_checks as checks
from support.chart import (
    CASES,
    HAS_RANKS,
    Manifest,
    containers,
    environment,
    find,
    manifests_of,
    pods,
    render,
    service_of,
    texts,
)
from support.services import SETTINGS

Check = Callable[[list[Manifest]], list[str]]
CHECKS: list[Check] = [
    checks.unknown_variables,
    checks.wrong_ports,
    checks.wrong_probes,
    checks.wrong_addresses,
    checks.wrong_selectors,
    checks.wrong_paths,
    checks.unsafe,
    checks.short_graces,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_case_passes(check: Check) -> None:
    for case in CASES:
        if case == "nodes" and check is checks.unknown_variables and not HAS_RANKS:
            continue  # the worker has no flags for it yet
        assert check(render(case)) == [], case


def test_all_services_are_looked_at() -> None:
    seen = {service_of(container) for _, _, container in checks.ours(render("default"))}
    assert seen == set(SETTINGS)


# --- each check notices what it is for --------------------------------------------------------


def container(manifests: list[Manifest], name: str) -> Manifest:
    return next(c for _, pod in pods(manifests) for c in containers(pod) if c["name"] == name)


def env(manifests: list[Manifest], name: str, variable: str) -> Manifest:
    found: Manifest = next(e for e in container(manifests, name)["env"] if e["name"] == variable)
    return found


def rename(variable: str, to: str, where: str) -> Callable[[list[Manifest]], None]:
    return lambda manifests: env(manifests, where, variable).update(name=to)


def value(variable: str, to: str, where: str) -> Callable[[list[Manifest]], None]:
    return lambda manifests: env(manifests, where, variable).update(value=to)


def in_container(name: str, **fields: Any) -> Callable[[list[Manifest]], None]:
    return lambda manifests: container(manifests, name).update(fields)


def in_pod(kind: str, name: str, **fields: Any) -> Callable[[list[Manifest]], None]:
    return lambda m: find(m, kind, name)["spec"]["template"]["spec"].update(fields)


def in_spec(kind: str, name: str, **fields: Any) -> Callable[[list[Manifest]], None]:
    return lambda manifests: find(manifests, kind, name)["spec"].update(fields)


def without(kind: str, name: str) -> Callable[[list[Manifest]], None]:
    return lambda manifests: manifests.remove(find(manifests, kind, name))


def volumes(name: str, **volume: Any) -> Callable[[list[Manifest]], None]:
    def change(manifests: list[Manifest]) -> None:
        for _, pod in pods(manifests):
            for found in pod["spec"].get("volumes", []):
                if found["name"] == name:
                    found.clear()
                    found.update(name=name, **volume)

    return change


def probe(kind: str, name: str, **fields: Any) -> Callable[[list[Manifest]], None]:
    return lambda manifests: container(manifests, name)[f"{kind}Probe"].update(fields)


BROKEN: list[tuple[Check, str, Callable[[list[Manifest]], None]]] = [
    (checks.unknown_variables, "default", rename("FASTSERVE_PORT", "FASTSERVE_PROT", "gateway")),
    (
        checks.unknown_variables,
        "default",
        rename("FASTSERVE_POOL_DIR", "FASTSERVE_POOL", "kv-offload"),
    ),
    # A setting of the scheduler, but not of the worker.
    (
        checks.unknown_variables,
        "default",
        rename("FASTSERVE_MODEL", "FASTSERVE_REDIS_URL", "worker"),
    ),
    (
        checks.unknown_variables,
        "everything",
        rename("OTEL_TRACES_SAMPLER", "OTEL_SAMPLER", "worker"),
    ),
    (checks.unknown_variables, "models", rename("HF_TOKEN", "HF_TOKENS", "download")),
    (checks.wrong_ports, "default", value("FASTSERVE_LISTEN", "0.0.0.0:7079", "scheduler")),
    (checks.wrong_ports, "default", value("FASTSERVE_METRICS_PORT", "9109", "kv-offload")),
    (checks.wrong_ports, "default", probe("readiness", "worker", grpc={"port": 9, "service": ""})),
    (
        checks.wrong_ports,
        "default",
        probe("liveness", "gateway", httpGet={"port": "web", "path": "/livez"}),
    ),
    (
        checks.wrong_ports,
        "default",
        in_spec("Service", "gateway", ports=[{"name": "http", "port": 80, "targetPort": "web"}]),
    ),
    (
        checks.wrong_probes,
        "default",
        probe("readiness", "gateway", httpGet={"port": "http", "path": "/ready"}),
    ),
    (checks.wrong_probes, "default", probe("startup", "worker", failureThreshold=3)),
    (
        checks.wrong_probes,
        "default",
        probe("readiness", "scheduler", grpc={"port": 7080, "service": "leader"}),
    ),
    (
        checks.wrong_probes,
        "default",
        probe("liveness", "scheduler", grpc={"port": 7080, "service": ""}),
    ),
    (checks.wrong_probes, "default", lambda m: container(m, "kv-offload").pop("livenessProbe")),
    (checks.wrong_addresses, "default", without("Service", "redis")),
    (checks.wrong_addresses, "default", in_spec("StatefulSet", "worker", replicas=0)),
    (checks.wrong_addresses, "gpu", in_spec("StatefulSet", "scheduler", replicas=1)),
    (checks.wrong_addresses, "default", in_spec("StatefulSet", "scheduler", serviceName="other")),
    (
        checks.wrong_addresses,
        "keda",
        lambda m: find(m, "ScaledObject")["spec"].update(maxReplicaCount=2),
    ),
    (checks.wrong_selectors, "default", in_spec("Service", "worker", selector={"app": "w"})),
    (
        checks.wrong_selectors,
        "models",
        in_spec(
            "StatefulSet",
            "small-worker",
            selector={"matchLabels": {"app.kubernetes.io/component": "worker"}},
        ),
    ),
    (
        checks.wrong_selectors,
        "default",
        in_spec("PodDisruptionBudget", "worker", selector={"matchLabels": {"a": "b"}}),
    ),
    (
        checks.wrong_selectors,
        "default",
        in_spec("NetworkPolicy", "redis", podSelector={"matchLabels": {"a": "b"}}),
    ),
    (
        checks.wrong_selectors,
        "everything",
        in_spec("ServiceMonitor", "scheduler", selector={"matchLabels": {"a": "b"}}),
    ),
    (checks.wrong_selectors, "keda", in_spec("StatefulSet", "worker", replicas=1)),
    (
        checks.wrong_selectors,
        "keda",
        lambda m: find(m, "ScaledObject")["spec"]["scaleTargetRef"].update(name="x"),
    ),
    (checks.wrong_paths, "default", value("FASTSERVE_KV_OFFLOAD", "unix:/run/kv.sock", "worker")),
    (checks.wrong_paths, "default", value("FASTSERVE_POOL_DIR", "/var/pool", "kv-offload")),
    (checks.wrong_paths, "tls", value("FASTSERVE_TLS_CA", "/etc/fastserve/tls/root.crt", "worker")),
    (checks.wrong_paths, "everything", volumes("auth", secret={"secretName": "k", "items": []})),
    (checks.wrong_paths, "default", in_pod("StatefulSet", "worker", volumes=[])),
    (checks.unsafe, "default", in_pod("Deployment", "gateway", automountServiceAccountToken=True)),
    (checks.unsafe, "default", in_pod("Deployment", "gateway", enableServiceLinks=True)),
    (checks.unsafe, "default", in_pod("StatefulSet", "redis", securityContext={})),
    (
        checks.unsafe,
        "default",
        in_container("worker", securityContext={"readOnlyRootFilesystem": True}),
    ),
    (
        checks.unsafe,
        "everything",
        in_pod("StatefulSet", "scheduler", automountServiceAccountToken=False),
    ),
    (
        checks.short_graces,
        "default",
        in_pod("StatefulSet", "worker", terminationGracePeriodSeconds=65),
    ),
    (checks.short_graces, "default", value("FASTSERVE_SHUTDOWN_TIMEOUT", "70", "gateway")),
    (
        checks.short_graces,
        "default",
        in_container("gateway", lifecycle={"preStop": {"sleep": {"seconds": 60}}}),
    ),
]


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_a_broken_chart_is_noticed(number: int) -> None:
    check, case, break_it = BROKEN[number]
    manifests = render(case)
    break_it(manifests)
    assert check(manifests) != []


def test_every_check_was_seen_to_fail() -> None:
    assert {check for check, *_ in BROKEN} == set(CHECKS)


# --- settings and commands --------------------------------------------------------------------


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[list[Manifest]], list[str]]:
    """What services say to the environment that is rendered for them."""
    for name in list(os.environ):
        if name.startswith("FASTSERVE_"):
            monkeypatch.delenv(name)

    def ask(manifests: list[Manifest]) -> list[str]:
        said = []
        for where, _, found in checks.ours(manifests):
            with monkeypatch.context() as patch:
                for name, given in environment(found).items():
                    text = given if isinstance(given, str) else "redis://from-a-secret/0"
                    # A folder that is there in the container alone.
                    patch.setenv(name, text.replace("/var/lib/fastserve/disk", str(tmp_path)))
                flags = [] if "torch.distributed.run" in found["command"] else found.get("args", [])
                try:
                    load_settings(SETTINGS[service_of(found)], where, flags)
                except StartupError as error:
                    said.append(f"{where}: {error}")
        return said

    return ask


def test_services_accept_what_the_chart_renders(refused: Check) -> None:
    for case in CASES:
        assert refused(render(case)) == [], case


@pytest.mark.parametrize(
    ("where", "variable", "wrong"),
    [
        ("gateway", "FASTSERVE_SCHEDULER", "scheduler:7070"),  # a list is JSON
        ("scheduler", "FASTSERVE_DISCOVERY", "gossip"),
        ("scheduler", "FASTSERVE_SHARD", "a/b"),
        ("kv-offload", "FASTSERVE_HOST_MEMORY", "1Gi"),  # Kubernetes' way to write it
        ("worker", "FASTSERVE_METRICS_PORT", "91000"),
        ("worker", "FASTSERVE_SHUTDOWN_TIMEOUT", "60s"),
    ],
)
def test_what_a_service_would_refuse_is_noticed(
    refused: Check, where: str, variable: str, wrong: str
) -> None:
    manifests = render("default")
    value(variable, wrong, where)(manifests)
    assert len(refused(manifests)) == 1


def test_settings_of_the_values_reach_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are: large numbers, booleans and lists too."""
    manifests = render("models")
    large = find(manifests, "StatefulSet", "large-worker")["spec"]["template"]
    assert environment(containers(large)[-1])["FASTSERVE_MAX_NUM_BATCHED_TOKENS"] == "1048576"
    scheduler = find(manifests, "StatefulSet", "large-scheduler")["spec"]["template"]
    assert environment(containers(scheduler)[0])["FASTSERVE_POLICY"] == "skip-join-mlfq"
    small = find(manifests, "StatefulSet", "small-scheduler")["spec"]["template"]
    assert "FASTSERVE_POLICY" not in environment(containers(small)[0])


def test_models_are_loaded_with_flags_that_the_command_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        download, "download", lambda *a, weights: asked.append((*map(str, a), weights))
    )
    for _, pod in pods(render("models")):
        for found in containers(pod):
            if found["name"] == "download":
                assert found["command"][-1] == "fastserve.common.download"
                assert download.main([str(a) for a in found["args"]]) == 0
    folder = "/cache/org--Large-8B"
    assert sorted(asked, key=str) == [
        ("org/Large-8B", "v1", folder, False),
        ("org/Large-8B", "v1", folder, True),
    ]
    worker = find(render("models"), "StatefulSet", "large-worker")["spec"]["template"]
    assert environment(containers(worker)[-1])["FASTSERVE_MODEL"] == folder


def test_ranks_start_with_flags_that_torchrun_has() -> None:
    from torch.distributed.run import get_args_parser

    workers = [
        (owner, containers(pod)[-1])
        for owner, pod in pods(render("nodes"))
        if containers(pod)[-1]["name"] == "worker"
    ]
    assert [owner.rpartition("-")[2] for owner, _ in workers] == ["0", "1"], "two groups"
    for owner, found in workers:
        assert found["command"] == ["python", "-m", "torch.distributed.run"]
        words = [str(word).replace("$(NODE_RANK)", "1") for word in found["args"]]
        options = get_args_parser().parse_args(words)
        assert (options.nnodes, options.nproc_per_node, options.node_rank) == ("2", "4", 1)
        assert options.module and options.training_script == "fastserve.worker"
        host = options.master_addr.replace("$(GROUP)", owner.split()[1])
        assert (host, options.master_port) in checks.addresses(render("nodes"))


# --- what else must be so -----------------------------------------------------------------------


def test_the_sidecar_starts_before_the_worker_and_stops_after_it() -> None:
    pod = find(render("default"), "StatefulSet", "worker")["spec"]["template"]["spec"]
    assert [c["name"] for c in pod["initContainers"]] == ["kv-offload"]
    assert pod["initContainers"][0]["restartPolicy"] == "Always"
    gpu = find(render("gpu"), "StatefulSet", "worker")["spec"]["template"]["spec"]
    assert [c["name"] for c in gpu["initContainers"]] == ["download", "kv-offload"]


def test_shared_memory_holds_the_pool() -> None:
    pod = find(render("gpu"), "StatefulSet", "worker")["spec"]["template"]["spec"]
    shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": f"{(32 + 1) * 1024}Mi"}
    for name in ("kv-offload", "worker"):
        mounts = {m["name"]: m["mountPath"] for m in container(render("gpu"), name)["volumeMounts"]}
        assert mounts["shm"] == "/dev/shm"
    assert environment(container(render("gpu"), "kv-offload"))["FASTSERVE_HOST_MEMORY"] == "32GiB"


def test_certificates_have_the_names_that_callers_ask_for() -> None:
    manifests = render("tls")
    certificates = {
        m["spec"]["secretName"]: m["spec"] for m in manifests if m["kind"] == "Certificate"
    }
    called = {"gateway": "scheduler", "scheduler": "worker", "worker": "worker"}
    for where, pod, found in checks.ours(manifests):
        component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        secrets = {
            v["name"]: v["secret"]["secretName"] for v in pod["spec"]["volumes"] if "secret" in v
        }
        assert {"server auth", "client auth"} <= set(certificates[secrets["tls"]]["usages"]), where
        name = environment(found)["FASTSERVE_TLS_SERVER_NAME"]
        assert [name] == certificates[f"fastserve-smollm2-{called[component]}-tls"]["dnsNames"]


def test_traces_reach_jaeger_by_way_of_the_collector() -> None:
    def endpoints(manifests: list[Manifest]) -> set[str]:
        return {
            environment(found)["OTEL_EXPORTER_OTLP_ENDPOINT"]
            for _, _, found in checks.ours(manifests)
        }

    manifests = render("everything")
    there = checks.addresses(manifests)
    jaeger, collector = (f"fastserve-{name}.{checks.DOMAIN}" for name in ("jaeger", "collector"))
    assert {(jaeger, 4317), (collector, 4317)} <= there
    assert endpoints(manifests) == {f"http://{collector}:4317"}
    config = yaml.safe_load(find(manifests, "ConfigMap", "collector")["data"]["config.yaml"])
    for kind, names in config["service"]["pipelines"]["traces"].items():
        assert set(names) <= set(config[kind])
    listens = config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"]
    ports = container(manifests, "collector")["ports"]
    assert [listens.rpartition(":")[2]] == [str(port["containerPort"]) for port in ports]
    assert config["exporters"]["otlp"]["endpoint"] == f"{jaeger}:4317"

    alone = manifests_of(texts({"jaeger": {"enabled": True}}))
    assert endpoints(alone) == {f"http://{jaeger}:4317"}


def test_only_a_scheduler_that_watches_has_rights_and_no_more_than_it_needs() -> None:
    assert not [m for m in render("default") if m["kind"] in ("Role", "RoleBinding")]
    manifests = render("prometheus-adapter")
    rules = {
        (resource, verb)
        for rule in find(manifests, "Role")["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    reads = {("endpointslices", verb) for verb in ("get", "list", "watch")}
    assert rules == reads | {("pods", "get"), ("pods", "patch")}
    subject = find(manifests, "RoleBinding")["subjects"][0]["name"]
    accounts = {
        pod["spec"]["serviceAccountName"] for owner, pod in pods(manifests) if "scheduler" in owner
    }
    assert accounts == {subject}
    assert not [m for m in manifests if m["kind"] == "ClusterRole"]
