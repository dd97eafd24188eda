"""Who may talk to whom by the NetworkPolicies of a rendered chart."""

from __future__ import annotations

from support.chart import Manifest, containers, pods
from support.chart_checks import of_kind


def edges(manifests: list[Manifest]) -> set[tuple[str, str, int]]:
    """Component to component and port that all policies of both ends let through."""
    everybody = [pod["metadata"]["labels"] for _, pod in pods(manifests)]
    everybody.append({"app.kubernetes.io/component": "stranger"})
    ports = {
        (str(pod["metadata"]["labels"]["app.kubernetes.io/component"]), port["containerPort"])
        for _, pod in pods(manifests)
        for container in containers(pod)
        for port in container.get("ports", [])
    }
    found = set()
    for source in everybody:
        for target in everybody:
            for component, port in ports:
                if target["app.kubernetes.io/component"] != component:
                    continue
                if _lets(manifests, source, target, port, "egress") and _lets(
                    manifests, source, target, port, "ingress"
                ):
                    found.add((source["app.kubernetes.io/component"], component, port))
    return found


def crossing(manifests: list[Manifest]) -> set[tuple[str, str, int]]:
    """Edges from a pod of one model to a pod of another."""
    label = "fastserve/model"
    found = set()
    for _, source in pods(manifests):
        for _, target in pods(manifests):
            here, there = source["metadata"]["labels"], target["metadata"]["labels"]
            if here.get(label, "") == there.get(label, "") or not (
                label in here and label in there
            ):
                continue
            component = there["app.kubernetes.io/component"]
            if component == "gateway":  # open to everybody
                continue
            for port in (
                p["containerPort"] for c in containers(target) for p in c.get("ports", [])
            ):
                if _lets(manifests, here, there, port, "egress") and _lets(
                    manifests, here, there, port, "ingress"
                ):
                    found.add((here["app.kubernetes.io/component"], component, port))
    return found


def _lets(
    manifests: list[Manifest], source: Manifest, target: Manifest, port: int, way: str
) -> bool:
    this, other, key = (source, target, "to") if way == "egress" else (target, source, "from")
    policies = [
        policy["spec"]
        for policy in of_kind(manifests, "NetworkPolicy")
        if _matches(policy["spec"]["podSelector"], this)
        and way.capitalize() in policy["spec"]["policyTypes"]
    ]
    return not policies or any(
        (not rule.get("ports") or port in {p["port"] for p in rule["ports"]})
        and (
            key not in rule
            or any("podSelector" in p and _matches(p["podSelector"], other) for p in rule[key])
        )
        for policy in policies
        for rule in policy.get(way) or []
    )


def _matches(selector: Manifest, labels: Manifest) -> bool:
    for expression in selector.get("matchExpressions", []):
        value = labels.get(expression["key"])
        if value is None or value not in expression.get("values", [value]):
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())
