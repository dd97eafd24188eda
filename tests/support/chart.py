"""The Helm chart, rendered by a real Helm engine, and what can be asked of the manifests."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

from fastserve.worker.settings import Settings as WorkerSettings

CHART = Path(__file__).parents[2] / "helm"
RELEASE, NAMESPACE = "fastserve", "llm"
Manifest = dict[str, Any]

FILES: dict[str, dict[str, Any]] = {
    name: yaml.safe_load((CHART / f"values-{name}.yaml").read_text()) for name in ("cpu", "gpu")
}
_TWO_MODELS = [
    {"name": "small", "route": {"hostnames": ["small.example.com"]}},
    {
        "name": "large",
        "model": {"source": "huggingface", "id": "org/Large-8B", "revision": "v1"},
        "scheduler": {"replicaCount": 2, "settings": {"policy": "skip-join-mlfq"}},
        "worker": {"replicaCount": 3, "settings": {"max_num_batched_tokens": 1048576}},
        "kvSidecar": {"enabled": False},
        "route": {"hostnames": ["large.example.com"]},
    },
]
_OFF: dict[str, Any] = {"enabled": False}
# What users ask of the chart: name -> values.
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    **FILES,
    "models": {
        "models": _TWO_MODELS,
        "ingress": {"enabled": True, "className": "nginx"},
        "huggingface": {"existingSecret": "hf", "endpoint": "https://mirror.example.com"},
        "gateway": {"autoscaling": {"enabled": True}},
    },
    "nodes": {
        "worker": {
            "podsPerGroup": 2,
            "replicaCount": 2,
            "shutdownTimeout": 20,
            "settings": {"tensor_parallel_size": 4, "pipeline_parallel_size": 2},
        },
        "kvSidecar": {"peers": {"enabled": True}},
    },
    "redis": {"redis": {"enabled": False, "external": {"existingSecret": "redis"}}},
    "redis-url": {"redis": {"enabled": False, "external": {"url": "redis://r.example.com:6379/1"}}},
    "tls": {"tls": {"enabled": True}, "kvSidecar": {"peers": {"enabled": True}}},
    "tls-secrets": {
        "tls": {
            "enabled": True,
            "certManager": _OFF,
            "existingSecrets": {"gateway": "g", "scheduler": "s", "worker": "w"},
        }
    },
    "keda": {"worker": {"autoscaling": {"enabled": True, "fallbackReplicas": 2}}},
    "prometheus-adapter": {
        "worker": {
            "kind": "Deployment",
            "autoscaling": {"enabled": True, "provider": "prometheus-adapter"},
        },
        "scheduler": {"discovery": "kubernetes"},
    },
    "everything": {
        "auth": {"enabled": True, "existingSecret": "keys"},
        "gateway": {"replicaCount": 2, "autoscaling": {"enabled": True}},
        "scheduler": {"replicaCount": 3, "discovery": "kubernetes"},
        "worker": {"autoscaling": {"enabled": True, "provider": "cpu"}},
        "kvSidecar": {"disk": {"enabled": True, "ephemeral": False}, "peers": {"enabled": True}},
        "redis": {"persistence": {"enabled": True}},
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]},
        "route": {"path": "/smol", "hostnames": ["llm.example.com"]},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True},
        "dashboards": {"enabled": True},
        "jaeger": {"enabled": True},
        "collector": {"enabled": True},
        "commonLabels": {"team": "serving"},
        "networkPolicy": {"clients": [{"namespaceSelector": {"matchLabels": {"a": "b"}}}]},
    },
    "volume": {
        "model": {
            "source": "volume",
            "path": "llama",
            "cache": {"type": "hostPath", "hostPath": "/srv/models"},
        },
        "otel": {"endpoint": "http://otel.observability.svc:4317"},
        "listenAddress": "::",
    },
    "off": {
        "kvSidecar": _OFF,
        "networkPolicy": _OFF,
        "serviceAccount": {"create": False},
        **{
            part: {"podDisruptionBudget": _OFF, "preStopSeconds": 0}
            for part in ("gateway", "scheduler", "worker")
        },
    },
}


def texts(values: Mapping[str, Any], chart: Path = CHART) -> dict[str, str]:
    """Rendered templates by their names in the chart. Raises `helm.HelmError`."""
    with helm.Chart.load(str(chart)) as loaded:
        rendered = loaded.render(dict(values), name=RELEASE, namespace=NAMESPACE)
    return {name.partition("/")[2]: text for name, text in rendered.items()}


def manifests_of(rendered: Mapping[str, str]) -> list[Manifest]:
    return [
        document
        for name, text in rendered.items()
        if name.endswith(".yaml")
        for document in yaml.load_all(text, Loader=yaml.CSafeLoader)
        if document is not None
    ]


# The flags of a partitioned model. Values are checked against the settings of the services, so a
# chart whose worker has none refuses them; the templates are tested all the same.
RANKS = ("tensor_parallel_size", "pipeline_parallel_size")
HAS_RANKS = set(RANKS) <= set(WorkerSettings.model_fields)


@cache
def _rendered(case: str) -> list[Manifest]:
    if case != "nodes" or HAS_RANKS:
        return manifests_of(texts(CASES[case]))
    with tempfile.TemporaryDirectory() as folder:
        chart = Path(folder) / "helm"
        shutil.copytree(CHART, chart)
        schema = json.loads((chart / "values.schema.json").read_text())
        properties = schema["$defs"]["workerSettings"]["properties"]
        properties |= {name: {"type": "integer"} for name in RANKS}
        (chart / "values.schema.json").write_text(json.dumps(schema))
        return manifests_of(texts(CASES[case], chart))


def render(case: str) -> list[Manifest]:
    """Manifests of a case; the caller may break them."""
    return copy.deepcopy(_rendered(case))


def find(manifests: list[Manifest], kind: str, name: str = "") -> Manifest:
    """The one of that kind whose name ends so."""
    found = [
        m for m in manifests if m["kind"] == kind and str(m["metadata"]["name"]).endswith(name)
    ]
    assert len(found) == 1, f"{kind} {name}: {[m['metadata']['name'] for m in found]}"
    return found[0]


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Name of the owner, and metadata and spec of its pods."""
    for manifest in manifests:
        name = f"{manifest['kind']} {manifest['metadata']['name']}"
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            yield name, manifest["spec"]["template"]
        elif manifest["kind"] == "Pod":
            yield name, manifest


def containers(pod: Manifest) -> list[Manifest]:
    """Init containers first."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def service_of(container: Manifest) -> str:
    """`gateway` and so on if one of FastServe's services runs in it, else ""."""
    words = [*container.get("command", []), *container.get("args", [])]
    modules = [word for word in words if str(word).startswith("fastserve.")]
    name = modules[0].removeprefix("fastserve.") if modules else ""
    return name if "." not in name else ""


def environment(container: Manifest) -> dict[str, Any]:
    """Name -> value, or what it comes from."""
    found: dict[str, Any] = {}
    for entry in container.get("env", []):
        assert entry["name"] not in found, f"{entry['name']} is given twice"
        found[entry["name"]] = entry["value"] if "value" in entry else entry["valueFrom"]
    return found
