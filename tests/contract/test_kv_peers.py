"""Two real sidecars: a job's blocks go from one to the other, whole or not at all, and only to who
may bring them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import xxhash

from fastserve.common.rpc import GrpcServer, channel
from fastserve.proto.v1 import kv_offload_pb2 as pb
from fastserve.proto.v1 import kv_offload_pb2_grpc as pb_grpc
from support.kv_client import BLOCK_BYTES, TOKENS, Caller, attached, content, refused
from support.processes import Running, service
from support.proxy import Proxy

TLS = Path(__file__).parents[1] / "support" / "tls"
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
TOKEN = (("authorization", "Bearer secret"),)


def start(
    folder: Path, name: str, *flags: str, token: str = "secret", blocks: int = 8
) -> contextlib.AbstractContextManager[Running]:
    home = folder / name
    home.mkdir()
    (home / "token").write_text(f"{token}\n")
    base = ["--listen", f"unix:{home}/s", "--host-blocks", str(blocks), "--pool-dir", str(home)]
    peer = [
        "--peer-listen",
        "127.0.0.1:0",
        *(["--peer-token-file", f"{home}/token"] if token else []),
    ]
    return service("fastserve.kv_offload", home, *base, *peer, *flags)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Running, Running]]:
    with start(tmp_path, "source") as source, start(tmp_path, "target") as target:
        yield source, target


async def export(
    caller: Caller, target: Running, *jobs: str, by: str | None = None
) -> pb.ExportResponse:
    """by: the address to use, if it is not that of the target."""
    address = by or target.info["peer_address"]
    request = pb.ExportRequest(job_ids=jobs, peer=address, to_worker_id="w", **caller.who)
    return await asyncio.wait_for(caller.stub.Export(request), 60)


@contextlib.asynccontextmanager
async def peer(
    target: Running, credentials: grpc.ChannelCredentials | None = None
) -> AsyncIterator[pb_grpc.KvPeerServiceAsyncStub]:
    address = target.info["peer_address"]
    name = (("grpc.ssl_target_name_override", "sidecar.test"),)
    async with (
        grpc.aio.secure_channel(address, credentials, name) if credentials else channel(address)
    ) as connection:
        yield pb_grpc.KvPeerServiceStub(connection)


def header(job: str, count: int, layout: str = "l") -> pb.ImportRequest:
    return pb.ImportRequest(
        header=pb.ImportHeader(
            to_worker_id="w",
            job_id=job,
            block_bytes=BLOCK_BYTES,
            block_size=TOKENS,
            layout=layout,
            block_indexes=range(count),
            valid_tokens=[TOKENS] * count,
            checksums=[xxhash.xxh3_64_intdigest(content(job, i)) for i in range(count)],
        )
    )


def piece(index: int, data: bytes, offset: int = 0) -> pb.ImportRequest:
    return pb.ImportRequest(piece=pb.BlockPiece(block_index=index, offset=offset, data=data))


async def test_a_job_goes_to_a_peer_and_stays_here(pair: tuple[Running, Running]) -> None:
    source, target = pair
    async with attached(source) as here, attached(target) as there:
        await here.store("a", 3)
        await here.store("b", 2)
        sent = await export(here, target, "a", "b")
        assert (sent.blocks, sent.bytes) == (5, 5 * BLOCK_BYTES)
        for caller in (here, there):
            await caller.load("a", 3)
            await caller.load("b", 2)
        assert list((await there.lookup("b")).valid_tokens) == [TOKENS] * 2
    for sidecar, direction in ((source, "out"), (target, "in")):
        metrics = sidecar.metrics()
        labels = f'{{direction="{direction}",tier="peer"}}'
        assert metrics[f"fastserve_kv_tier_bytes_total{labels}"] == 5 * BLOCK_BYTES
        assert metrics[f"fastserve_kv_tier_seconds_total{labels}"] > 0


async def test_what_is_on_the_disk_goes_too(tmp_path: Path) -> None:
    disk = ["--disk-path", str(tmp_path), "--disk-size", str(8192 * 20)]
    with start(tmp_path, "source", *disk) as source, start(tmp_path, "target") as target:
        async with attached(source) as here, attached(target) as there:
            await here.store("a", 6)
            await here.store("b", 6)
            assert sum((await here.lookup("a")).on_disk) > 0
            await export(here, target, "a")
            await there.load("a", 6)


async def test_a_peer_says_why_it_takes_nothing(pair: tuple[Running, Running]) -> None:
    source, target = pair
    async with attached(source) as here:
        await here.store("a", 3)
        await refused(export(here, target, "a"), grpc.StatusCode.NOT_FOUND, "no worker 'w'")
        async with attached(target) as there:
            await there.store("full", 6)
            full = grpc.StatusCode.RESOURCE_EXHAUSTED
            await refused(export(here, target, "a"), full, "3 blocks wanted, room for 2")
            await there.release("full")
            await export(here, target, "a")
            again = grpc.StatusCode.ALREADY_EXISTS
            await refused(export(here, target, "a"), again, "job a is here already")
            missing = grpc.StatusCode.NOT_FOUND
            await refused(export(here, target, "none"), missing, "has no blocks here")
            assert (await there.stats()).reserved_slots == 0
        async with attached(target, epoch=2, size=BLOCK_BYTES + 1):
            await refused(export(here, target, "a"), UNAVAILABLE, "another layout")
        assert source.metrics()['fastserve_kv_failures_total{kind="peer"}'] == 4


async def test_a_half_finished_import_is_never_seen(pair: tuple[Running, Running]) -> None:
    _, target = pair
    async with attached(target) as there, peer(target) as stub:
        call = stub.Import(metadata=TOKEN)
        await call.write(header("a", 2))
        await call.write(piece(0, content("a", 0)))
        await call.write(piece(1, content("a", 1)[:100]))
        await there.until(lambda s: s.reserved_slots == 2, "the reservation")
        assert not (await there.lookup("a")).job_ids
        await there.release("a")  # of a job that the worker does not have: nothing of ours goes
        assert (await there.stats()).reserved_slots == 2
        call.cancel()
        await there.until(lambda s: s.reserved_slots == 0, "the end of the reservation")
        assert not (await there.lookup()).job_ids


async def test_a_job_that_is_released_while_it_comes_does_not_stay(
    pair: tuple[Running, Running],
) -> None:
    """It moved here in another way, or has ended: nobody would ever release it again."""
    _, target = pair
    async with attached(target) as there, peer(target) as stub:
        call = stub.Import(metadata=TOKEN)
        await call.write(header("a", 1))
        await there.until(lambda s: s.reserved_slots == 1, "the reservation")
        await there.release("a")
        await call.write(piece(0, content("a", 0)))
        await call.done_writing()
        await refused(call, grpc.StatusCode.INVALID_ARGUMENT, "not reserved for job a")
        stats = await there.stats()
        assert (stats.free_slots, stats.jobs) == (8, 0)


async def test_a_worker_learns_where_others_reach_its_sidecar(tmp_path: Path) -> None:
    with start(tmp_path, "bound") as bound:
        async with attached(bound) as caller:
            assert caller.attached.peer_address == bound.info["peer_address"]
    with start(tmp_path, "told", "--peer-address", "pod.example:7072") as told:
        async with attached(told) as caller:
            assert caller.attached.peer_address == "pod.example:7072"


@pytest.mark.parametrize(
    ("messages", "code", "why"),
    [
        ([piece(0, content("a", 1))], grpc.StatusCode.DATA_LOSS, "block 0: the checksum differs"),
        ([piece(1, content("a", 1))], grpc.StatusCode.INVALID_ARGUMENT, "block 0, byte 0 was to"),
        ([piece(0, b"x" * 5001)], grpc.StatusCode.INVALID_ARGUMENT, "block 0, byte 0 was to"),
        ([piece(0, content("a", 0))], grpc.StatusCode.INVALID_ARGUMENT, "the stream ended early"),
        (
            [piece(0, content("a", 0)), piece(1, content("a", 1)), piece(2, b"x")],
            grpc.StatusCode.INVALID_ARGUMENT,
            "more came than the header names",
        ),
    ],
)
async def test_an_import_that_is_not_right_leaves_nothing(
    pair: tuple[Running, Running],
    messages: list[pb.ImportRequest],
    code: grpc.StatusCode,
    why: str,
) -> None:
    _, target = pair

    async def send() -> None:
        async with peer(target) as stub:
            await stub.Import(iter([header("a", 2), *messages]), metadata=TOKEN)

    async with attached(target) as there:
        await refused(send(), code, why)
        stats = await there.stats()
        assert (stats.free_slots, stats.jobs) == (8, 0)


@pytest.mark.parametrize("victim", ["source", "target"])
async def test_a_sidecar_killed_in_the_middle_of_a_transfer(tmp_path: Path, victim: str) -> None:
    """All bytes go through the test, so the transfer cannot end while it does not look."""
    size, count = 2 << 20, 100
    with (
        start(tmp_path, "source", blocks=count) as source,
        start(tmp_path, "target", blocks=count) as target,
    ):
        async with (
            attached(source, size=size) as here,
            attached(target, size=size) as there,
            Proxy(target.info["peer_address"]).running() as proxy,
        ):
            await here.store("a", count, size)
            transfer = asyncio.create_task(export(here, target, "a", by=proxy.address))
            await there.until(lambda s: s.reserved_slots == count, "the transfer")
            (source if victim == "source" else target).kill()
            await refused(transfer, UNAVAILABLE)
            if victim == "source":
                await there.until(lambda s: s.free_slots == count, "the end of the reservation")
                assert not (await there.lookup()).job_ids
            else:
                await here.load("a", count, size)
                await here.release("a")
                await here.until(lambda s: s.free_slots == count, "the end of the pins")


class _Slow(pb_grpc.KvPeerServiceServicer):
    """A peer that reads one message and then waits."""

    def __init__(self) -> None:
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()
        self.pieces = 0

    async def Import(
        self, request_iterator: AsyncIterator[pb.ImportRequest], context: Any
    ) -> pb.ImportResponse:
        await context.send_initial_metadata((("fastserve-import", "accepted"),))
        async for request in request_iterator:
            self.pieces += request.HasField("piece")
            self.begun.set()
            await self.go_on.wait()
        return pb.ImportResponse(blocks=self.pieces)


async def test_a_slow_peer_holds_the_sender_back(tmp_path: Path) -> None:
    size, count = 1 << 20, 160
    slow, server = _Slow(), GrpcServer()
    pb_grpc.add_KvPeerServiceServicer_to_server(slow, server.server)
    address = await server.start("127.0.0.1:0")
    with start(tmp_path, "source", blocks=count) as source:
        async with attached(source, size=size) as here:
            await here.store("a", count, size)
            process = psutil.Process(source.process.pid)
            before = process.memory_full_info().uss
            request = pb.ExportRequest(job_ids=["a"], peer=address, to_worker_id="w", **here.who)
            transfer = asyncio.create_task(_one(here, request))
            await asyncio.wait_for(slow.begun.wait(), 20)
            done, _ = await asyncio.wait([transfer], timeout=1.0)
            assert not done
            # Not even a quarter of the job waits in the sender's memory.
            assert process.memory_full_info().uss - before < size * count / 4
            slow.go_on.set()
            assert (await asyncio.wait_for(transfer, 60)).blocks == slow.pieces == count
    await server.stop(0)


async def _one(caller: Caller, request: pb.ExportRequest) -> pb.ExportResponse:
    return await caller.stub.Export(request)


# --- who may -------------------------------------------------------------------------------------


async def test_without_the_token_nothing_is_answered(tmp_path: Path) -> None:
    with start(tmp_path, "source", token="guess") as source, start(tmp_path, "target") as target:
        async with attached(source) as here, attached(target) as there, peer(target) as stub:
            await here.store("a", 1)
            await refused(export(here, target, "a"), UNAVAILABLE, "token is missing or wrong")
            for metadata in ((), (("authorization", "Bearer secre"),), (("authorization", ""),)):
                call = stub.Import(iter([header("a", 1)]), metadata=metadata)
                await refused(call, grpc.StatusCode.UNAUTHENTICATED, "missing or wrong")
            assert (await there.stats()).free_slots == 8
            assert target.metrics()['fastserve_kv_failures_total{kind="peer_auth"}'] == 4


async def test_peers_cannot_make_the_workers_calls(pair: tuple[Running, Running]) -> None:
    _, target = pair
    async with attached(target) as there, channel(target.info["peer_address"]) as connection:
        stub = pb_grpc.KvOffloadServiceStub(connection)
        for call in (
            stub.Stats(pb.StatsRequest(), metadata=TOKEN),
            stub.Release(pb.ReleaseRequest(job_ids=["a"], **there.who), metadata=TOKEN),
        ):
            await refused(call, grpc.StatusCode.UNIMPLEMENTED)


async def test_mutual_tls(tmp_path: Path) -> None:
    def flags(cert: str) -> list[str]:
        files = {"cert": f"{cert}.crt", "key": f"{cert}.key", "ca": "ca.crt"}
        pairs = [
            word for name, file in files.items() for word in (f"--tls-{name}", f"{TLS}/{file}")
        ]
        return [*pairs, "--tls-server-name", "sidecar.test"]

    with (
        start(tmp_path, "source", *flags("peer"), token="") as source,
        start(tmp_path, "target", *flags("peer"), token="") as target,
        start(tmp_path, "stranger", *flags("stranger"), token="") as stranger,
    ):
        async with (
            attached(source) as here,
            attached(target) as there,
            attached(stranger) as outside,
        ):
            await here.store("a", 3)
            assert (await export(here, target, "a")).blocks == 3
            await there.load("a", 3)
            await outside.store("b", 1)
            await refused(export(outside, target, "b"), UNAVAILABLE)  # signed by nobody known
            await refused(export(here, stranger, "a"), UNAVAILABLE)
            ca = (TLS / "ca.crt").read_bytes()
            async with peer(target, grpc.ssl_channel_credentials(ca)) as stub:  # no certificate
                await refused(stub.Import(iter([header("c", 1)])), UNAVAILABLE)
            async with peer(target) as stub:  # plain text
                await refused(stub.Import(iter([header("c", 1)])), UNAVAILABLE)
            assert (await there.stats()).jobs == 1
