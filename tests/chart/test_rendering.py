"""The chart is a chart: a Helm engine lints and renders it, Kubernetes' schemas take the result."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from functools import cache
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils

from fastserve.cli.main import top
from support.chart import CASES, CHART, FILES, Manifest, find, render, texts

VERSIONS = ("1.30", "1.33", "1.37")  # the oldest that the chart takes to the newest
# Their schemas belong to others.
_CUSTOM = ("monitoring.coreos.com", "keda.sh", "cert-manager.io", "gateway.networking.k8s.io")


def test_lint() -> None:
    for values in ({}, *FILES.values()):
        report = helm.lint(str(CHART), values, strict=True)
        assert not report["errors"], report
        assert [m for m in report["messages"] if m["severity"] > 1] == []


def invalid(manifests: list[Manifest], version: str) -> list[str]:
    wrong = []
    for manifest in manifests:
        if manifest["apiVersion"].startswith(_CUSTOM):
            continue
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except (
            kubernetes_validate.ValidationError,
            kubernetes_validate.SchemaNotFoundError,
        ) as error:
            wrong.append(f"{manifest['kind']} {manifest['metadata']['name']}: {error.message}")
    return wrong


@pytest.fixture
def schemas_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "schema_contents", _schema)


_schema = cache(utils.schema_contents)


@pytest.mark.usefixtures("schemas_read_once")
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_manifest(version: str) -> None:
    seen = {}
    for case in CASES:
        for manifest in render(case):
            seen[json.dumps(manifest, sort_keys=True)] = manifest
    assert len(seen) > 100
    assert invalid(list(seen.values()), version) == []


@pytest.mark.usefixtures("schemas_read_once")
def test_a_wrong_manifest_would_be_noticed() -> None:
    manifests = render("default")
    find(manifests, "Deployment")["spec"]["replicas"] = "2"
    find(manifests, "StatefulSet", "worker")["spec"]["podManagmentPolicy"] = "Parallel"
    find(manifests, "PodDisruptionBudget", "gateway")["apiVersion"] = "policy/v1beta1"
    assert len(invalid(manifests, VERSIONS[-1])) == 3


def test_names_are_unique() -> None:
    for case in CASES:
        names = [(m["kind"], m["metadata"]["name"]) for m in render(case)]
        assert len(names) == len(set(names)), case


def test_the_schema_follows_the_settings_of_the_services() -> None:
    check = [sys.executable, str(CHART / "schema.py"), "--check"]
    result = subprocess.run(check, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_images_are_those_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert FILES["gpu"]["worker"]["image"]["tag"] == f"{chart['appVersion']}-cuda"
    gateway = find(render("default"), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert gateway["image"] == f"fastserve/gateway:{chart['appVersion']}"


def test_images_of_ones_own() -> None:
    image: dict[str, Any] = {"registry": "r.example.com", "repository": "ml", "tag": "7"}
    own = {"image": {"digest": "sha256:abc", "pullPolicy": "Always"}}
    rendered = texts({"image": image, "gateway": own})
    assert "image: r.example.com/ml/scheduler:7" in rendered["templates/scheduler.yaml"]
    assert "image: r.example.com/ml/gateway@sha256:abc" in rendered["templates/gateway.yaml"]
    assert "imagePullPolicy: Always" in rendered["templates/gateway.yaml"]


def test_notes_show_how_to_ask_every_model() -> None:
    notes = texts(CASES["models"])["templates/NOTES.txt"]
    services = {m["metadata"]["name"] for m in render("models") if m["kind"] == "Service"}
    for name in ("fastserve-small-gateway", "fastserve-large-gateway"):
        assert name in services and f"port-forward svc/{name} 8000:80" in notes
    assert '"model": "Large-8B"' in notes and "Authorization" not in notes
    assert "Authorization" in texts(CASES["everything"])["templates/NOTES.txt"]


def test_notes_show_how_to_watch_the_scheduler() -> None:
    notes = texts(CASES["tls"])["templates/NOTES.txt"]
    assert "svc/fastserve-smollm2-scheduler 7070 &" in notes
    words = notes.partition("fastserve top ")[2].splitlines()[0].split()
    name = words[words.index("--tls-server-name") + 1]
    certificate = find(render("tls"), "Certificate", "smollm2-scheduler")
    assert certificate["spec"]["dnsNames"] == [name]
    files = "tls.crt", "tls.key", "ca.crt"
    assert [word for word in words if word.endswith((".crt", ".key"))] == [*files]
    flags = {f"--{name.replace('_', '-')}" for name in inspect.signature(top).parameters}
    assert {word for word in words if word.startswith("--")} <= flags


def test_notes_say_what_autoscaling_needs() -> None:
    assert "serviceMonitor.enabled" in texts(CASES["keda"])["templates/NOTES.txt"]
    scraped = {**CASES["keda"], "serviceMonitor": {"enabled": True}}
    assert "Autoscaling:" not in texts(scraped)["templates/NOTES.txt"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a typing mistake": ({"gateway": {"replicas": 2}}, "replicas"),
    "a flag nobody has": ({"worker": {"settings": {"max_num_seq": 2}}}, "max_num_seq"),
    "a flag of the chart's": ({"worker": {"settings": {"listen": "a:1"}}}, "listen"),
    "a flag of a wrong type": ({"scheduler": {"settings": {"levels": "many"}}}, "levels"),
    "a flag out of bounds": ({"scheduler": {"settings": {"levels": 0}}}, "levels"),
    "no model": ({"models": []}, "models"),
    "two of a name": ({"models": [{"name": "a"}, {"name": "a"}]}, "two are named a"),
    "a long name": ({"fullnameOverride": "f" * 30, "models": [{"name": "m" * 20}]}, "52 char"),
    "no repository": ({"model": {"source": "huggingface"}}, "model.id"),
    "no volume": ({"model": {"source": "volume"}}, "model.cache.existingClaim"),
    "no folder": ({"model": {"cache": {"type": "hostPath"}}}, "model.cache.hostPath"),
    "no keys": ({"auth": {"enabled": True}}, "auth.existingSecret"),
    "no redis": ({"redis": {"enabled": False}}, "redis.external.existingSecret"),
    "two redises": ({"redis": {"external": {"url": "redis://a"}}}, "redis.enabled=false"),
    "a readable password": (
        {"redis": {"enabled": False, "external": {"url": "redis://:pw@a:6379/0"}}},
        "redis.external.existingSecret",
    ),
    "no certificates": (
        {"tls": {"enabled": True, "certManager": {"enabled": False}}},
        "tls.existingSecrets",
    ),
    "a small sidecar": ({"kvSidecar": {"hostMemory": "8Gi"}}, "128Mi more than 8Gi"),
    "a size without a unit": ({"kvSidecar": {"hostMemory": "8000000"}}, "hostMemory"),
    "pods without names": ({"worker": {"kind": "Deployment"}}, "scheduler.discovery=kubernetes"),
    "a short grace": ({"worker": {"terminationGracePeriodSeconds": 60}}, "65"),
    "ranks that cannot be shared": ({"worker": {"podsPerGroup": 2}}, "cannot be shared"),
    "fewer GPUs than ranks": (
        {
            "worker": {
                "settings": {"tensor_parallel_size": 2},
                "shutdownTimeout": 20,
                "resources": {"limits": {"nvidia.com/gpu": 1}},
            }
        },
        "each worker pod runs 2 rank.* to 2 instead of 1",
    ),
    "scaled the wrong way": (
        {"worker": {"autoscaling": {"enabled": True, "minReplicas": 9}}},
        "less than minReplicas",
    ),
    "a prefix of an ingress": (
        {"ingress": {"enabled": True}, "route": {"path": "/m"}},
        "route.hostnames",
    ),
    "models of one host": (
        {"ingress": {"enabled": True}, "models": [{"name": "a"}, {"name": "b"}]},
        "a host each",
    ),
    "a route to nowhere": ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs"),
    "a collector to nowhere": ({"collector": {"enabled": True}}, "collector.exporter.endpoint"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_cannot_work_are_refused_with_a_sentence(case: str) -> None:
    values, says = REFUSED[case]
    with pytest.raises(helm.HelmError, match=says):
        texts(values)
