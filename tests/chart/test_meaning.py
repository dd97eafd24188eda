"""What the chart says is so: each check holds for every case, and notices a broken chart."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from fastserve.common import download
from fastserve.common.settings import load_settings
from support import chart_checks as checks
from support.chart import (
    CASES,
    HAS_RANKS,
    Manifest,
    containers,
    environment,
    find,
    pods,
    render,
    service_of,
)
from support.services import SETTINGS, metrics

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


def test_services_accept_what_the_chart_renders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for name in list(os.environ):
        if name.startswith("FASTSERVE_"):
            monkeypatch.delenv(name)
    for case in CASES:
        if case == "nodes" and not HAS_RANKS:
            continue
        for where, _, found in checks.ours(render(case)):
            with monkeypatch.context() as patch:
                for name, given in environment(found).items():
                    text = str(given) if isinstance(given, str) else "redis://from-a-secret/0"
                    # Folders that are there in the container alone.
                    text = text.replace("/var/lib/fastserve/disk", str(tmp_path))
                    patch.setenv(name, text)
                service = service_of(found)
                settings = load_settings(SETTINGS[service], where, found.get("args", []))
            given_names = {
                name.removeprefix("FASTSERVE_").lower()
                for name in environment(found)
                if name.startswith("FASTSERVE_")
            }
            assert given_names <= settings.model_fields_set | set(type(settings).model_fields)


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


# --- metrics ------------------------------------------------------------------------------------


def test_alerts_dashboards_and_autoscalers_use_metrics_that_exist() -> None:
    count = 0
    for case in CASES:
        for expression in checks.expressions(render(case)):
            count += 1
            assert checks.wrong_series(expression) == [], expression
    assert count > 60


@pytest.mark.parametrize(
    "expression",
    [
        "rate(fastserve_preemption_total[5m])",
        "fastserve_preemptions",  # which Prometheus calls fastserve_preemptions_total
        'sum(fastserve_queue_depth{stage="1"})',
        "sum by (lever) (fastserve_queue_depth)",
        "vllm:time_to_first_token_seconds",  # a histogram has no series of its own name
        'fastserve_queued_work_seconds{worker="a", sard="b"}',
    ],
)
def test_a_metric_that_does_not_exist_is_noticed(expression: str) -> None:
    assert checks.wrong_series(expression) != []


def test_autoscalers_ask_for_the_queued_work_of_their_model() -> None:
    for case in ("keda", "prometheus-adapter"):
        found = [e for e in checks.expressions(render(case)) if "queued" in e and "smollm2" in e]
        assert len(found) == 1 and 'shard="smollm2"' in found[0]
    assert {"worker", "shard"} <= metrics()["fastserve_queued_work_seconds"]


# --- who may talk to whom -----------------------------------------------------------------------

# DESIGN.md 1: client, gateway, scheduler, Redis and worker; sidecars among themselves.
EDGES = {
    ("stranger", "gateway", 8000),
    ("test", "gateway", 8000),
    ("gateway", "scheduler", 7070),
    ("scheduler", "redis", 6379),
    ("scheduler", "worker", 7071),
}
PEERS = {("worker", "worker", 7072)}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("default", EDGES),
        ("gpu", EDGES),
        ("models", EDGES),
        ("tls", EDGES | PEERS),
        ("redis", EDGES - {("scheduler", "redis", 6379)}),
    ],
)
def test_network_policies_let_through_what_the_architecture_has(
    case: str, expected: set[tuple[str, str, int]]
) -> None:
    assert checks.edges(render(case)) == expected


def test_ranks_of_groups_reach_each_other_on_any_port() -> None:
    among = {edge for edge in checks.edges(render("nodes")) if edge[:2] == ("worker", "worker")}
    assert among > PEERS
    assert checks.edges(render("nodes")) - among == EDGES


def test_restricted_clients() -> None:
    edges = checks.edges(render("everything"))
    assert ("stranger", "gateway", 8000) not in edges and ("test", "gateway", 8000) in edges
    assert {edge for edge in edges if edge[1] == "collector"} == {
        (source, "collector", 4317) for source in ("gateway", "scheduler", "worker")
    }


def test_models_are_kept_apart() -> None:
    crossing = checks.crossing(render("models"))
    assert crossing == set()
    assert checks.crossing(render("off")) == set(), "one model has nobody to cross to"


def test_a_policy_that_lets_more_or_less_through_is_noticed() -> None:
    for break_it in (
        without("NetworkPolicy", "redis"),
        without("NetworkPolicy", "worker"),
        in_spec("NetworkPolicy", "scheduler", ingress=[{}]),
        in_spec("NetworkPolicy", "scheduler", egress=[]),
        in_spec("NetworkPolicy", "gateway", ingress=[]),
        in_spec("NetworkPolicy", "worker", policyTypes=["Egress"]),
    ):
        manifests = render("default")
        break_it(manifests)
        assert checks.edges(manifests) != EDGES


def test_policies_without_the_label_of_the_model_would_be_noticed() -> None:
    manifests = render("models")
    for manifest in manifests:
        if manifest["kind"] == "NetworkPolicy":
            for rule in [*manifest["spec"]["ingress"], *manifest["spec"].get("egress", [])]:
                for peer in [*rule.get("from", []), *rule.get("to", [])]:
                    peer.get("podSelector", {}).get("matchLabels", {}).pop("fastserve/model", None)
    assert checks.crossing(manifests) != set()


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
