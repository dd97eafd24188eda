"""What a rendered chart must fulfil. Each check returns what is wrong, in words; [] is well."""

from __future__ import annotations

import re
from collections.abc import Iterator

from support import services
from support.chart import NAMESPACE, Manifest, containers, environment, pods, service_of

DOMAIN = f"{NAMESPACE}.svc.cluster.local"
# Set for Python's and the container's own sake, or substituted into arguments.
_PLAIN = {"NODE_RANK", "GROUP"}
_FOREIGN = {"valkey", "jaeger", "collector", "test"}


def ours(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest, Manifest]]:
    """Where, pod and container of each of FastServe's services."""
    for owner, pod in pods(manifests):
        for container in containers(pod):
            if service_of(container):
                yield f"{owner}, {container['name']}", pod, container


def unknown_variables(manifests: list[Manifest]) -> list[str]:
    """Every environment variable is read by what runs in its container."""
    wrong = []
    for owner, pod in pods(manifests):
        for container in containers(pod):
            if container["name"] in _FOREIGN:
                continue
            service = service_of(container)
            known = _PLAIN | services.library_variables()
            # What a service reads besides its settings is no setting of another one.
            own = services.settings_variables(service) if service else set()
            others = set().union(*map(services.settings_variables, services.SETTINGS)) - own
            env = environment(container)
            substituted = set(re.findall(r"\$\((\w+)\)", " ".join(map(str, env.values()))))
            known = (known - others) | own | substituted
            wrong += [
                f"{owner}, {container['name']}: nobody reads {name}"
                for name in env
                if name not in known
            ]
    return wrong


def wrong_ports(manifests: list[Manifest]) -> list[str]:
    """Container ports are those that the services listen on; probes and Services use them."""
    wrong = []
    for where, _, container in ours(manifests):
        env = environment(container)
        keys = ("PORT", "LISTEN", "HEALTH_LISTEN", "PEER_LISTEN", "METRICS_PORT")
        listens = {
            int(str(env[f"FASTSERVE_{key}"]).rpartition(":")[2])
            for key in keys
            if str(env.get(f"FASTSERVE_{key}", "unix:")).rpartition(":")[2].isdigit()
        }
        declared = {port["containerPort"] for port in container.get("ports", [])}
        if declared != listens:
            wrong.append(f"{where}: listens on {sorted(listens)}, declares {sorted(declared)}")
    for owner, pod in pods(manifests):
        for container in containers(pod):
            named = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
            for probe in (f"{kind}Probe" for kind in ("startup", "readiness", "liveness")):
                for kind in ("grpc", "httpGet", "tcpSocket"):
                    port = container.get(probe, {}).get(kind, {}).get("port")
                    if port is not None and port not in named and port not in named.values():
                        wrong.append(f"{owner}, {container['name']}: {probe} of port {port}")
    for service in of_kind(manifests, "Service"):
        for pod in _selected(manifests, service["spec"]["selector"]):
            open_ports = {port["name"] for c in containers(pod) for port in c.get("ports", [])}
            wrong += [
                f"Service {service['metadata']['name']}: no port {port['targetPort']}"
                for port in service["spec"]["ports"]
                if "targetPort" in port and port["targetPort"] not in open_ports
            ]
    return wrong


def wrong_probes(manifests: list[Manifest]) -> list[str]:
    """All services have all probes, of paths and health names that exist; loading may take long."""
    wrong = []
    for where, _, container in ours(manifests):
        for kind in ("startup", "readiness", "liveness"):
            probe = container.get(f"{kind}Probe")
            if probe is None:
                wrong.append(f"{where}: no {kind} probe")
            elif "grpc" in probe and probe["grpc"]["service"] not in services.HEALTH_NAMES:
                wrong.append(f"{where}: health of {probe['grpc']['service']!r}")
            elif "httpGet" in probe and probe["httpGet"]["path"] not in services.http_paths():
                wrong.append(f"{where}: path {probe['httpGet']['path']}")
        live = container.get("livenessProbe", {})
        if live.get("grpc", {}).get("service", "live") != "live":
            wrong.append(f"{where}: liveness asks for more than life")
        startup = container.get("startupProbe", {})
        patience = startup.get("periodSeconds", 10) * startup.get("failureThreshold", 3)
        if service_of(container) == "worker" and patience < 600:
            wrong.append(f"{where}: a model has {patience} s to load")
    return wrong


def wrong_addresses(manifests: list[Manifest]) -> list[str]:
    """Whoever is called by name exists under that name and on that port."""
    there = addresses(manifests)
    wrong = []
    for owner, pod in pods(manifests):
        for container in containers(pod):
            for name, value in environment(container).items():
                found = re.findall(rf"([\w.-]+\.{re.escape(DOMAIN)})(?::(\d+))?", str(value))
                for host, port in found:
                    if (host, int(port or 80)) not in there:
                        wrong.append(f"{owner}: {name} is {host}:{port}, where nobody is")
    return wrong


def addresses(manifests: list[Manifest]) -> set[tuple[str, int]]:
    """Names and ports that Services and StatefulSets make, at most."""
    found = set()
    for service in of_kind(manifests, "Service"):
        host = f"{service['metadata']['name']}.{DOMAIN}"
        ports = {port["port"] for port in service["spec"]["ports"]}
        found |= {(host, port) for port in ports}
        for sts in of_kind(manifests, "StatefulSet"):
            if sts["spec"]["serviceName"] in (
                service["metadata"]["name"],
                f"{service['metadata']['name']}-ranks",
            ):
                most = sts["spec"].get("replicas") or _most(manifests, sts)
                found |= {
                    (f"{sts['metadata']['name']}-{at}.{host}", port)
                    for at in range(most)
                    for port in ports
                }
    return found


def _most(manifests: list[Manifest], target: Manifest) -> int:
    for scaler in manifests:
        if scaler["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"):
            spec = scaler["spec"]
            if spec["scaleTargetRef"]["name"] == target["metadata"]["name"]:
                return int(spec.get("maxReplicas") or spec["maxReplicaCount"])
    return 0


def wrong_selectors(manifests: list[Manifest]) -> list[str]:
    """What selects pods or Services selects some, and owners select no one else's."""
    wrong = []
    for manifest in manifests:
        kind, name, spec = manifest["kind"], manifest["metadata"]["name"], manifest.get("spec", {})
        if kind in ("Deployment", "StatefulSet"):
            selector, labels = (
                spec["selector"]["matchLabels"],
                spec["template"]["metadata"]["labels"],
            )
            if not selector.items() <= labels.items():
                wrong.append(f"{kind} {name} does not select its own pods")
            if (
                sum(
                    selector.items() <= pod["metadata"]["labels"].items()
                    for _, pod in pods(manifests)
                )
                != 1
            ):
                wrong.append(f"{kind} {name} selects pods of others")
        elif kind in ("Service", "PodDisruptionBudget"):
            selector = spec["selector"] if kind == "Service" else spec["selector"]["matchLabels"]
            if not _selected(manifests, selector):
                wrong.append(f"{kind} {name} selects nothing")
        elif kind == "NetworkPolicy":
            if not _selected(manifests, spec["podSelector"]["matchLabels"]):
                wrong.append(f"{kind} {name} selects nothing")
        elif kind == "ServiceMonitor":
            chosen = [
                service
                for service in of_kind(manifests, "Service")
                if spec["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
            ]
            ports = {port["name"] for service in chosen for port in service["spec"]["ports"]}
            wrong += [
                f"ServiceMonitor {name}: no port {endpoint['port']}"
                for endpoint in spec["endpoints"]
                if endpoint["port"] not in ports or endpoint["path"] not in services.http_paths()
            ]
        elif kind in ("HorizontalPodAutoscaler", "ScaledObject"):
            target = spec["scaleTargetRef"]
            scaled = [
                m
                for m in of_kind(manifests, target["kind"])
                if m["metadata"]["name"] == target["name"]
            ]
            if len(scaled) != 1 or "replicas" in scaled[0]["spec"]:
                wrong.append(f"{kind} {name}: {target['name']} is not there, or has replicas")
    return wrong


def wrong_paths(manifests: list[Manifest]) -> list[str]:
    """Volumes that are mounted exist; files that settings name lie in volumes that hold them."""
    claims = {
        (m["metadata"]["name"], claim["metadata"]["name"])
        for m in of_kind(manifests, "StatefulSet")
        for claim in m["spec"].get("volumeClaimTemplates", [])
    }
    wrong = []
    for owner, pod in pods(manifests):
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        for container in containers(pod):
            where = f"{owner}, {container['name']}"
            mounts = {m["mountPath"]: m["name"] for m in container.get("volumeMounts", [])}
            wrong += [
                f"{where}: no volume {name}"
                for name in mounts.values()
                if name not in volumes and (owner.split()[1], name) not in claims
            ]
            for variable, value in environment(container).items():
                path = str(value).removeprefix("unix:")
                in_image = path.startswith("/models/")
                if not path.startswith("/") or in_image or variable == "FASTSERVE_ROOT_PATH":
                    continue
                folder = next((m for m in mounts if path == m or path.startswith(f"{m}/")), None)
                if folder is None:
                    wrong.append(f"{where}: {variable} is {path}, which is read-only or absent")
                elif not _holds(
                    volumes.get(mounts[folder], {}), path.removeprefix(f"{folder}/"), manifests
                ):
                    wrong.append(f"{where}: {variable} is {path}, which the secret does not hold")
    return wrong


_TLS_KEYS = {"tls.crt", "tls.key", "ca.crt"}


def _holds(volume: Manifest, file: str, manifests: list[Manifest]) -> bool:
    if "secret" not in volume:
        return True
    secret = volume["secret"]
    if "items" in secret:
        return file in {item["path"] for item in secret["items"]}
    made = [
        s for s in of_kind(manifests, "Secret") if s["metadata"]["name"] == secret["secretName"]
    ]
    return file in made[0]["data"] if made else file in _TLS_KEYS | {"token"}


def unsafe(manifests: list[Manifest]) -> list[str]:
    """Nobody is root, writes to images, has capabilities, or a token without need."""
    wrong = []
    for owner, pod in pods(manifests):
        spec = pod["spec"]
        if not spec["securityContext"].get("runAsNonRoot"):
            wrong.append(f"{owner} may be root")
        if spec["securityContext"].get("seccompProfile", {}).get("type") != "RuntimeDefault":
            wrong.append(f"{owner} has no seccomp profile")
        if spec.get("enableServiceLinks") is not False:
            wrong.append(f"{owner}: Services become environment variables")
        watches = any(
            environment(c).get("FASTSERVE_DISCOVERY") == "kubernetes" for c in containers(pod)
        )
        if spec.get("automountServiceAccountToken") is not watches:
            wrong.append(f"{owner} has a token without need, or needs one")
        for container in containers(pod):
            own = container.get("securityContext", {})
            if own.get("allowPrivilegeEscalation") is not False or not own.get(
                "readOnlyRootFilesystem"
            ):
                wrong.append(f"{owner}, {container['name']} may gain rights or write to its image")
            if own.get("capabilities", {}).get("drop") != ["ALL"]:
                wrong.append(f"{owner}, {container['name']} has capabilities")
            if "memory" not in container.get("resources", {}).get("limits", {}):
                wrong.append(f"{owner}, {container['name']} has no memory limit")
    return wrong


def short_graces(manifests: list[Manifest]) -> list[str]:
    """A pod is killed only after preStop and the shutdown of all its containers, one by one.

    kserve PR #5496, gateway-api-inference-extension #549: grace periods that were too short.
    """
    wrong = []
    for owner, pod in pods(manifests):
        needed = 0.0
        for container in containers(pod):
            if service_of(container):
                stop = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {})
                needed += stop.get("seconds", 0)
                needed += float(environment(container)["FASTSERVE_SHUTDOWN_TIMEOUT"])
        if needed and pod["spec"].get("terminationGracePeriodSeconds", 30) <= needed:
            wrong.append(f"{owner}: {needed} s are needed")
    return wrong


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def _selected(manifests: list[Manifest], selector: dict[str, str]) -> list[Manifest]:
    """Pods; the ordinal is a label that the StatefulSet adds."""
    wanted = {k: v for k, v in selector.items() if k != "apps.kubernetes.io/pod-index"}
    return [
        pod for _, pod in pods(manifests) if wanted.items() <= pod["metadata"]["labels"].items()
    ]
