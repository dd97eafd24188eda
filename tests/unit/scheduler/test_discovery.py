"""Worker groups that come and go: DNS answers, EndpointSlices of an emulated API server, and the
links that follow."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from kmock import KubernetesEmulator, Server
from kubernetes.aio import client

from fastserve.common.errors import StartupError
from fastserve.scheduler import kube
from fastserve.scheduler.discovery import Dns, Endpoint, Static
from fastserve.scheduler.links import Links
from fastserve.scheduler.settings import SchedulerSettings
from fastserve.scheduler.surroundings import surroundings
from support.waiting import eventually

SLICES = "discovery.k8s.io/v1/endpointslices"


class Told:
    """Follows a source of endpoints."""

    def __init__(self, source: Any) -> None:
        self.answers: list[frozenset[Endpoint]] = []
        self._task = asyncio.ensure_future(self._follow(source))

    async def _follow(self, source: Any) -> None:
        async for endpoints in source.watch():
            self.answers.append(endpoints)

    @property
    def addresses(self) -> set[str]:
        return {endpoint.address for endpoint in self.answers[-1]} if self.answers else set()

    async def are(self, *addresses: str) -> None:
        await eventually(lambda: self.addresses == set(addresses), f"{addresses}")

    def close(self) -> None:
        self._task.cancel()


@pytest.fixture
async def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What DNS has; a name that is not there fails."""
    found: dict[str, list[str]] = {}

    async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        if host not in found:
            raise socket.gaierror(-2, "Name or service not known")
        return [(0, 0, 0, "", (address, port)) for address in found[host]]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo, raising=False)
    return found


async def test_a_list_is_told_once() -> None:
    told = Told(Static(["unix:/w0", "w1:1"]))
    await told.are("unix:/w0", "w1:1")
    told.close()


@pytest.fixture
async def emulator() -> AsyncIterator[tuple[KubernetesEmulator, str]]:
    async with KubernetesEmulator() as kmock, Server(kmock):
        for resource, kind in ((SLICES, "EndpointSlice"), ("v1/pods", "Pod")):
            kmock.resources[resource].kind = kind
            kmock.resources[resource].namespaced = True
        yield kmock, str(kmock.url).rstrip("/")


@pytest.fixture
async def api(emulator: tuple[KubernetesEmulator, str]) -> AsyncIterator[client.ApiClient]:
    async with client.ApiClient(client.Configuration(host=emulator[1])) as connected:
        yield connected


def endpoint(address: str, pod: str, **conditions: bool) -> dict[str, Any]:
    return {
        "addresses": [address],
        "conditions": conditions,
        "targetRef": {"kind": "Pod", "name": pod},
    }


def endpoint_slice(name: str, *endpoints: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": "llm",
            "labels": {"kubernetes.io/service-name": "workers"},
        },
        "addressType": "IPv4",
        "endpoints": list(endpoints),
        "ports": [{"name": "grpc", "port": 7071}, {"name": "metrics", "port": 9000}],
    }


class Cluster:
    """Changes what the API server has, as controllers do."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/apis/discovery.k8s.io/v1/namespaces/llm/endpointslices"

    async def create(self, body: dict[str, Any]) -> None:
        async with aiohttp.ClientSession() as http, http.post(self._url, json=body) as reply:
            reply.raise_for_status()

    async def change(self, body: dict[str, Any]) -> None:
        url = f"{self._url}/{body['metadata']['name']}"
        async with aiohttp.ClientSession() as http, http.patch(url, json=body) as reply:
            reply.raise_for_status()

    async def delete(self, name: str) -> None:
        async with aiohttp.ClientSession() as http, http.delete(f"{self._url}/{name}") as reply:
            reply.raise_for_status()


async def test_pods_behind_a_service_are_followed(
    emulator: tuple[KubernetesEmulator, str], api: client.ApiClient
) -> None:
    kmock, url = emulator
    cluster = Cluster(url)
    await cluster.create(endpoint_slice("s-1", endpoint("10.0.0.1", "w-0", ready=True)))
    told = Told(kube.EndpointSlices(api, "workers", "llm", "grpc"))
    await told.are("10.0.0.1:7071")
    assert {one.pod for one in told.answers[-1]} == {"w-0"}
    both = (
        endpoint("10.0.0.1", "w-0", ready=False, serving=False, terminating=True),
        endpoint("10.0.0.2", "w-1", ready=True),
        endpoint("10.0.0.3", "w-2", ready=False),
    )
    await cluster.change(endpoint_slice("s-1", *both))
    # One that ends has jobs still; one that is not ready yet has to wait.
    await told.are("10.0.0.1:7071", "10.0.0.2:7071")
    await cluster.create(endpoint_slice("s-2", endpoint("10.0.1.1", "w-9", ready=True)))
    await told.are("10.0.0.1:7071", "10.0.0.2:7071", "10.0.1.1:7071")
    await cluster.delete("s-1")
    await told.are("10.0.1.1:7071")
    told.close()
    asked = [request for request in kmock if request.method is not None and request.method == "get"]
    assert all(
        request.params["labelSelector"] == "kubernetes.io/service-name=workers"
        for request in asked
        if "endpointslices" in str(request.url)
    )


async def test_an_api_server_that_fails_is_asked_again(
    emulator: tuple[KubernetesEmulator, str],
    api: client.ApiClient,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kmock, url = emulator
    cluster = Cluster(url)
    await cluster.create(endpoint_slice("s-1", endpoint("10.0.0.1", "w-0", ready=True)))
    kmock["get /apis/discovery.k8s.io/v1/namespaces/llm/endpointslices"][:2] << 503
    told = Told(kube.EndpointSlices(api, "workers", "llm", "7071"))
    await told.are("10.0.0.1:7071")
    told.close()
    assert "cannot watch the endpoints of workers" in capsys.readouterr().out


async def cost_of(url: str, pod: str) -> str:
    where = f"{url}/api/v1/namespaces/llm/pods/{pod}"
    async with aiohttp.ClientSession() as http, http.get(where) as reply:
        found = await reply.json()
    return str(found["metadata"].get("annotations", {}).get(kube.DELETION_COST, ""))


async def test_the_cost_of_a_pod_is_kept_up_to_date(
    emulator: tuple[KubernetesEmulator, str],
    api: client.ApiClient,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kmock, url = emulator
    pods = f"{url}/api/v1/namespaces/llm/pods"
    async with aiohttp.ClientSession() as http:
        body = {"metadata": {"name": "w-0", "namespace": "llm", "annotations": {"kept": "yes"}}}
        async with http.post(pods, json=body) as reply:
            reply.raise_for_status()

    def patches() -> int:
        return sum(str(request.method).lower().endswith("patch") for request in kmock)

    costs = kube.DeletionCosts(api, "llm")
    await costs.update({"w-0": 1000}, now=0.0)
    assert (await cost_of(url, "w-0"), patches()) == ("1000", 1)
    await costs.update({"w-0": 1050}, now=100.0)  # hardly another
    assert patches() == 1
    await costs.update({"w-0": 5000}, now=100.0)
    assert (await cost_of(url, "w-0"), patches()) == ("5000", 2)
    await costs.update({"w-0": 9000}, now=105.0)  # too soon
    assert patches() == 2
    await costs.update({"w-0": 9000}, now=111.0)
    assert (await cost_of(url, "w-0"), patches()) == ("9000", 3)
    await costs.update({"w-0": -1, "gone": 5}, now=130.0)  # draining; a pod that is not there
    assert await cost_of(url, "w-0") == "-1"
    assert "pod-deletion-cost not written" in capsys.readouterr().out


async def test_outside_of_a_cluster_one_sentence_says_so() -> None:
    settings = SchedulerSettings(
        discovery="kubernetes",
        kubernetes_service="workers",
        kubernetes_namespace="llm",
        redis_url="redis://r",
    )
    with pytest.raises(StartupError, match="only works in a cluster"):
        async with surroundings(settings):
            pass


async def test_names_are_looked_up_again_and_again(names: dict[str, list[str]]) -> None:
    names["workers"] = ["10.0.0.1", "fd00::1"]
    told = Told(Dns(["workers:7071", "others:7072"], interval_s=0.01))
    await told.are("10.0.0.1:7071", "[fd00::1]:7071")
    names["others"] = ["10.0.0.9"]
    await told.are("10.0.0.1:7071", "[fd00::1]:7071", "10.0.0.9:7072")
    names["workers"] = ["10.0.0.2"]
    await told.are("10.0.0.2:7071", "10.0.0.9:7072")
    del names["workers"]  # DNS that fails is no news of workers
    names["others"] = ["10.0.0.8"]
    await told.are("10.0.0.2:7071", "10.0.0.8:7072")
    told.close()


class _Source:
    """Tells what the test says."""

    def __init__(self) -> None:
        self.news: asyncio.Queue[frozenset[Endpoint]] = asyncio.Queue()

    async def watch(self) -> AsyncIterator[frozenset[Endpoint]]:
        while True:
            yield await self.news.get()

    def say(self, *addresses: str) -> None:
        self.news.put_nowait(frozenset(map(Endpoint, addresses)))


class _Link:
    """Connected from the start; ends when it is told and nobody wants it."""

    def __init__(self, address: str) -> None:
        self.address, self.wanted = address, True
        self.described: object | None = object()
        self.broken = asyncio.Event()

    async def run(self) -> None:
        while self.wanted:
            await self.broken.wait()
            self.broken.clear()


async def test_a_link_that_is_not_wanted_ends_with_its_stream() -> None:
    source, made = _Source(), dict[str, _Link]()

    def make(endpoint: Endpoint) -> Any:
        made[endpoint.address] = _Link(endpoint.address)
        return made[endpoint.address]

    links = Links(source, make)
    running = asyncio.ensure_future(links.run())
    source.say("a:1", "b:1")
    await eventually(lambda: set(made) == {"a:1", "b:1"}, "both links")
    source.say("a:1")
    await eventually(lambda: not made["b:1"].wanted, "news")
    assert {link.address for link in links} == {"a:1", "b:1"}, "it may have jobs still"
    made["b:1"].broken.set()
    await eventually(lambda: {link.address for link in links} == {"a:1"}, "its end")
    made["a:1"].described = None  # never connected: nothing to wait for
    source.say()
    await eventually(lambda: not list(links), "the end of the other one")
    source.say("a:1")
    await eventually(lambda: len(list(links)) == 1, "a new one")
    running.cancel()
