"""Write values.schema.json: from values.yaml, and from the settings of the services.

`python helm/schema.py` after a change in either; `--check` only compares. Every key of values.yaml
may be set and no other. `settings` of a component may hold what the flags of its service take, but
for what the chart itself sets.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

import yaml

from fastserve.common.settings import ServiceSettings
from fastserve.gateway.settings import GatewaySettings
from fastserve.kv_offload.settings import Settings as KvSettings
from fastserve.scheduler.settings import SchedulerSettings
from fastserve.worker.settings import Settings as WorkerSettings

HERE: Final = Path(__file__).parent
SERVICES: Final[dict[str, type[ServiceSettings]]] = {
    "gateway": GatewaySettings,
    "scheduler": SchedulerSettings,
    "worker": WorkerSettings,
    "kvSidecar": KvSettings,
}
# What the chart sets by itself, from other values.
_OWNED: Final = {
    "": {"config", "ready_file", "metrics_host", "metrics_port", "shutdown_timeout"}
    | {"tls_cert", "tls_key", "tls_ca", "tls_server_name", "listen", "health_listen"},
    "gateway": {"host", "port", "root_path", "scheduler", "model", "served_model_name"}
    | {"api_key", "api_key_file"},
    "scheduler": {"worker", "workers", "redis_url", "shard", "discovery"}
    | {"kubernetes_service", "kubernetes_namespace", "kubernetes_port"},
    "worker": {"worker_id", "model", "served_model_name", "kv_offload"},
    "kvSidecar": {"host_memory", "host_blocks", "pool_dir", "workers", "disk_path", "disk_size"}
    | {"peer_listen", "peer_address", "peer_token_file"},
}
_PER_MODEL: Final = ("model", "gateway", "scheduler", "worker", "kvSidecar", "route")
_SIZE: Final = {"type": "string", "pattern": "^[1-9][0-9]*(Mi|Gi|Ti)$"}
_COUNT: Final = {"type": "integer", "minimum": 1}
_SECONDS: Final = {"type": "integer", "minimum": 0}
_QUANTITY_OR_SHARE: Final = {"type": ["integer", "string"]}

# By the path in values.yaml, or by its last part.
_SPECIAL: Final[dict[str, dict[str, Any]]] = {
    "gateway.image": {"$ref": "#/$defs/image"},
    "scheduler.image": {"$ref": "#/$defs/image"},
    "worker.image": {"$ref": "#/$defs/image"},
    "kvSidecar.image": {"$ref": "#/$defs/image"},
    "model.source": {"enum": ["image", "huggingface", "volume"]},
    "model.cache.type": {"enum": ["emptyDir", "pvc", "hostPath"]},
    "scheduler.discovery": {"enum": ["static", "kubernetes"]},
    "kvSidecar.peers.enabled": {"type": ["boolean", "null"]},
    "worker.kind": {"enum": ["StatefulSet", "Deployment"]},
    "worker.podsPerGroup": _COUNT,
    "worker.shmExtra": _SIZE,
    "worker.autoscaling.provider": {"enum": ["keda", "prometheus-adapter", "cpu"]},
    "worker.autoscaling.targetQueuedSeconds": {"type": "number", "exclusiveMinimum": 0},
    "worker.autoscaling.fallbackReplicas": _SECONDS,
    "kvSidecar.hostMemory": _SIZE,
    "kvSidecar.disk.size": _SIZE,
    "prometheusRule.ttftSeconds": {"type": "number", "exclusiveMinimum": 0},
    "prometheusRule.queuedSeconds": {"type": "number", "exclusiveMinimum": 0},
    "image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "gateway.service.type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    "route.path": {"type": "string", "pattern": "^/"},
    "listenAddress": {"enum": ["0.0.0.0", "::"]},
    "maxUnavailable": _QUANTITY_OR_SHARE,
    "minReplicas": _COUNT,
    "maxReplicas": _COUNT,
    "replicaCount": _COUNT,
    "preStopSeconds": _SECONDS,
    "shutdownTimeout": _SECONDS,
    "startupSeconds": _COUNT,
    "terminationGracePeriodSeconds": {"type": ["integer", "null"], "minimum": 1},
}
# Objects whose keys are Kubernetes' or the user's, though values.yaml has some.
_OPEN: Final = {"resources", "podSecurityContext", "securityContext", "behavior", "annotations"} | {
    "labels"
}


def settings_schema(component: str) -> dict[str, Any]:
    """Schema of `settings` of a component: its service's flags."""
    service = SERVICES[component]
    full = service.model_json_schema()
    owned = _OWNED[""] | _OWNED[component]
    properties = {}
    for name, schema in full["properties"].items():
        if name not in owned:
            properties[name] = {k: v for k, v in schema.items() if k not in ("title", "default")}
    return {
        "type": "object",
        "description": f"flags of python -m {service.__module__.rpartition('.')[0]}",
        "additionalProperties": False,
        "properties": properties,
    }


def schema_of(value: Any, path: tuple[str, ...]) -> dict[str, Any]:
    """Schema of a part of values.yaml by its default."""
    if path[1:] == ("settings",):
        return {"$ref": f"#/$defs/{path[0]}Settings"}
    for key in (".".join(path), path[-1] if path else ""):
        if key in _SPECIAL:
            return _SPECIAL[key]
    if isinstance(value, dict):
        if not value or (path and path[-1] in _OPEN):
            return {"type": "object"}
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": {key: schema_of(inner, (*path, key)) for key, inner in value.items()},
        }
    if isinstance(value, list):
        return {"type": "array"}
    for kind, name in ((bool, "boolean"), (int, "integer"), (str, "string")):
        if isinstance(value, kind):
            return {"type": name}
    raise TypeError(f"{'.'.join(path)}: no schema for {value!r}")


def build() -> str:
    """Text of values.schema.json."""
    values = yaml.safe_load((HERE / "values.yaml").read_text())
    schema = schema_of(values, ())
    image = {"registry", "repository", "tag", "digest", "pullPolicy"}
    sections = {name: schema["properties"][name] for name in _PER_MODEL}
    schema["properties"] |= {name: {"$ref": f"#/$defs/{name}"} for name in _PER_MODEL}
    schema["properties"]["models"] = {
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "additionalProperties": False,
            "required": ["name"],
            "properties": {
                "name": {
                    "type": "string",
                    "pattern": "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
                    "maxLength": 30,
                },
                **{name: {"$ref": f"#/$defs/{name}"} for name in _PER_MODEL},
            },
        },
    }
    # Helm puts these in when the chart is a part of another.
    schema["properties"]["global"] = {"type": "object"}
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$comment": "Written by schema.py; do not edit.",
        **schema,
        "$defs": {
            "image": {
                "type": "object",
                "additionalProperties": False,
                "properties": {name: {"type": "string"} for name in sorted(image)},
            },
            **sections,
            **{f"{name}Settings": settings_schema(name) for name in SERVICES},
        },
    }
    return json.dumps(schema, indent=1) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the schema of the chart's values.")
    parser.add_argument("--check", action="store_true", help="only compare; status 1 if stale")
    check = parser.parse_args().check
    path, text = HERE / "values.schema.json", build()
    if not check:
        path.write_text(text)
    elif not path.exists() or path.read_text() != text:
        print(f"{path.name} is stale: run python helm/schema.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
