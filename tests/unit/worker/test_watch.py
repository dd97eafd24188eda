"""The watchdog of a rank, with ranks as threads and short times."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import Store, TCPStore

from fastserve.worker.parallel.groups import Group
from fastserve.worker.parallel.watch import Watchdog

LOST_S = 1.0


class Losses:
    """What the watchdog of a rank reports."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.any = threading.Event()

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self.any.set()


def _store(port: int = 0, *, master: bool) -> TCPStore:
    return TCPStore(
        "127.0.0.1",
        port,
        is_master=master,
        timeout=timedelta(seconds=20),
        wait_for_workers=False,
    )


def _watch(store: Store, rank: int, losses: Losses) -> Watchdog:
    return Watchdog(store, Group(rank, 2, 1, rank, True, "", 0), losses, lost_s=LOST_S)


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_falls_silent_is_lost_once_and_not_before(silent: int) -> None:
    served = _store(master=True)
    losses = [Losses(), Losses()]
    dogs = [_watch(_store(served.port, master=False), rank, losses[rank]) for rank in range(2)]
    try:
        assert not losses[0].any.wait(3 * LOST_S) and not losses[1].any.is_set()
        dogs[silent].stop()  # it counts no more, as one that is killed or frozen
        other = 1 - silent
        assert losses[other].any.wait(20)
        assert losses[other].reasons[0].startswith(f"rank {silent} has been silent for")
        assert not losses[silent].reasons, "one that ends in order reports nothing"
    finally:
        for dog in dogs:
            dog.stop()


class Hanging:
    """A store whose server is frozen: no call returns."""

    def __init__(self) -> None:
        self.thaw = threading.Event()

    def add(self, key: str, count: int) -> int:
        self.thaw.wait(30)
        raise RuntimeError("thawed")


def test_a_store_that_does_not_answer_is_noticed() -> None:
    store, losses = Hanging(), Losses()
    dog = _watch(store, 1, losses)  # type: ignore[arg-type]
    try:
        assert losses.any.wait(20)
        assert "has not answered" in losses.reasons[0]
    finally:
        dog.stop()
        store.thaw.set()


def test_a_store_that_is_gone_is_noticed() -> None:
    class Gone:
        def add(self, key: str, count: int) -> int:
            raise RuntimeError("connection reset")

    losses = Losses()
    _watch(Gone(), 1, losses)  # type: ignore[arg-type]
    assert losses.any.wait(20)
    assert losses.reasons == ["the store of rank 0 is gone: connection reset"]
