"""NetworkPolicies let through what the architecture has, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.chart import Manifest, containers, environment, find, pods, render, service_of
from support.chart_network import crossing, edges


def in_spec(kind: str, name: str, **fields: Any) -> Callable[[list[Manifest]], None]:
    return lambda manifests: find(manifests, kind, name)["spec"].update(fields)


def without(kind: str, name: str) -> Callable[[list[Manifest]], None]:
    return lambda manifests: manifests.remove(find(manifests, kind, name))


# The architecture: client, gateway, scheduler, Redis and worker; sidecars among themselves.
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
    assert edges(render(case)) == expected


def test_sidecars_reach_each_other_where_there_may_be_several_workers() -> None:
    manifests = render("keda")
    assert edges(manifests) >= PEERS
    (pod,) = (pod for name, pod in pods(manifests) if name.endswith("-worker"))
    (sidecar,) = (one for one in containers(pod) if service_of(one) == "kv_offload")
    shown = environment(sidecar)
    assert shown["FASTSERVE_PEER_ADDRESS"] == "$(POD_IP):7072"
    assert shown["POD_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert not PEERS & edges(render("default"))


def test_ranks_of_groups_reach_each_other_on_any_port() -> None:
    among = {edge for edge in edges(render("nodes")) if edge[:2] == ("worker", "worker")}
    assert among > PEERS
    assert edges(render("nodes")) - among == EDGES


def test_restricted_clients() -> None:
    found = edges(render("everything"))
    assert ("stranger", "gateway", 8000) not in found and ("test", "gateway", 8000) in found
    assert {edge for edge in found if edge[1] == "collector"} == {
        (source, "collector", 4317) for source in ("gateway", "scheduler", "worker")
    }


def test_models_are_kept_apart() -> None:
    assert crossing(render("models")) == set()
    assert crossing(render("off")) == set(), "one model has nobody to cross to"


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
        assert edges(manifests) != EDGES


def test_policies_without_the_label_of_the_model_would_be_noticed() -> None:
    manifests = render("models")
    for manifest in manifests:
        if manifest["kind"] == "NetworkPolicy":
            for rule in [*manifest["spec"]["ingress"], *manifest["spec"].get("egress", [])]:
                for peer in [*rule.get("from", []), *rule.get("to", [])]:
                    peer.get("podSelector", {}).get("matchLabels", {}).pop("fastserve/model", None)
    assert crossing(manifests) != set()
