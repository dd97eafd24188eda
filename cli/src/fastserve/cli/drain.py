"""`fastserve drain`: take the jobs of a worker group away before it is stopped."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import grpc

from fastserve.cli.errors import CliError
from fastserve.cli.schedulers import connect
from fastserve.common.tls import Tls
from fastserve.proto.v1 import scheduler_pb2, scheduler_pb2_grpc

_CALL_S: Final = 5.0
_POLL_S: Final = 0.2


def drain(
    worker: str, schedulers: Sequence[str], tls: Tls | None, *, undo: bool, wait_s: float
) -> str:
    """Tell the leader, wait until nothing is left there, and say what came of it.

    Raises `CliError` if nobody leads, the worker is unknown, or jobs are left after `wait_s`.
    """
    with _Leader(schedulers, tls) as leader:
        request = scheduler_pb2.DrainRequest(worker_id=worker, undo=undo)
        reply = leader.call("Drain", request)
        if undo:
            return f"{worker} takes new jobs again"
        if reply.jobs and not reply.others:
            note = " (no other worker takes them: they end there)"
        else:
            note = ""
        deadline = time.monotonic() + wait_s
        jobs = reply.jobs
        while jobs and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            snapshot = leader.call("Snapshot", scheduler_pb2.SnapshotRequest())
            jobs = next((one.jobs for one in snapshot.workers if one.worker_id == worker), 0)
        if jobs and wait_s:
            raise CliError(f"{worker} still has {jobs} jobs after {wait_s:.0f} s{note}")
        left = f", {jobs} jobs left" if jobs else ", no jobs left"
        return f"{worker} is drained of new jobs{left}{note}"


class _Leader:
    """The one of several schedulers that leads."""

    def __init__(self, schedulers: Sequence[str], tls: Tls | None) -> None:
        self._channels = [connect(address, tls) for address in schedulers]

    def __enter__(self) -> _Leader:
        return self

    def __exit__(self, *_: object) -> None:
        for channel in self._channels:
            channel.close()

    def call(self, method: str, request: Any) -> Any:
        """Ask one after the other: those that stand by refuse. Raises `CliError`."""
        reasons = []
        for channel in self._channels:
            stub: Any = scheduler_pb2_grpc.SchedulerServiceStub(channel)
            try:
                return getattr(stub, method)(request, timeout=_CALL_S)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    raise CliError(error.details()) from error
                reasons.append(str(error.details()))
        raise CliError(f"no scheduler leads: {'; '.join(reasons) or 'none is known'}")
