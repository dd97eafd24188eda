"""Settings of the scheduler."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import CliExplicitFlag, NoDecode

from fastserve.common.rpc import RpcSettings


class SchedulerSettings(RpcSettings):
    """The scheduler of one shard: decides which jobs run in the next iteration."""

    flag_aliases: ClassVar[dict[str, str]] = {"workers": "worker"}

    listen: str = Field(
        default="127.0.0.1:7070", description="gRPC address: host:port (0: any) or unix:/path"
    )
    discovery: Literal["static", "dns", "kubernetes"] = Field(
        default="static",
        description="how worker groups are found: static (the addresses of --worker), dns (all "
        "addresses of the names of --worker), or kubernetes (the pods of a Service)",
    )
    workers: Annotated[list[str], NoDecode] = Field(
        default=[],
        description="gRPC address of a worker group, or with dns a name and a port; repeat for "
        "more, or separate them by commas",
    )
    discovery_interval: float = Field(
        default=2.0, gt=0, description="seconds between two looks at DNS"
    )
    kubernetes_service: str = Field(
        default="", description="Service whose ready pods are worker groups (kubernetes only)"
    )
    kubernetes_namespace: str = Field(
        default="", description="its namespace (default: that of this pod)"
    )
    kubernetes_port: str = Field(
        default="grpc", description="name or number of the port of the workers in that Service"
    )
    worker_timeout: float = Field(
        default=5.0,
        gt=0,
        description="seconds a worker with work may be silent, beyond ten times what the "
        "iteration should take, before its jobs go elsewhere",
    )
    redis_url: str = Field(description="redis://host:port/db or unix:///path")
    redis_timeout: float = Field(
        default=1.0,
        gt=0,
        description="seconds a write may take; then answers go out without being durable",
    )
    shard: str = Field(
        default="0", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="name of the shard in Redis"
    )
    leader_ttl: float = Field(
        default=2.0, gt=0.1, description="seconds after which a standby replaces a silent leader"
    )
    grace: float = Field(
        default=30.0, ge=0, description="seconds a job stays after its gateway stream is gone"
    )

    policy: str = Field(
        default="fastserve",
        description="skip-join-mlfq, fastserve, mlfq, fixed-priority, hrrn, fcfs or srpt",
    )
    max_num_seqs: int | None = Field(
        default=None, ge=1, description="rows in an iteration (default: the worker's limit)"
    )
    max_num_batched_tokens: int | None = Field(
        default=None, ge=1, description="tokens in an iteration (default: the worker's limit)"
    )
    max_num_queued_reqs: int = Field(
        default=1000, ge=1, description="waiting jobs beyond which new ones are refused"
    )
    lease: int = Field(
        default=4, ge=1, description="iterations a worker may run before it hears again"
    )
    max_num_partial_prefills: int = Field(
        default=2, ge=1, description="prompts of more than one iteration that are under way at once"
    )
    look_ahead: int = Field(
        default=64, ge=1, description="jobs that may be passed over in a plan for want of room"
    )
    fair_sharing: CliExplicitFlag[bool] = Field(
        default=True,
        description="on: tenants of one class share service by weight (not with fcfs, hrrn, srpt)",
    )

    quantum: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="seconds of service in the first level, or measured: a decode iteration "
        "(default: measured)",
    )
    quantum_ratio: float = Field(
        default=2.0, gt=1, allow_inf_nan=False, description="quantum of a level over the one above"
    )
    levels: int = Field(default=10, ge=1, le=64, description="levels of the feedback queue")
    demotion: Literal["as-used", "one-level"] = Field(
        default="as-used",
        description="what a used-up quantum costs: as-used (as many levels as the use calls for) "
        "or one-level",
    )
    starvation_threshold: float = Field(
        default=3.0, gt=0, description="seconds a job waits before it is promoted; inf: never"
    )
    promotion_share: float = Field(
        default=0.25, gt=0, le=1, description="share of the rows that promoted jobs may take"
    )

    prefix_cache: Literal["off", "tenant", "all"] = Field(
        default="tenant",
        description="whose requests share the KV cache of equal beginnings: nobody's (off), those "
        "of one tenant, or all",
    )
    kv_strategy: Literal["proactive", "reactive", "recompute", "defer"] = Field(
        default="proactive",
        description="when the device is full, KV caches leave ahead of need (proactive), at need "
        "(reactive), are dropped (recompute) or stay (defer)",
    )
    kv_reserve_blocks: int | None = Field(
        default=None,
        ge=0,
        description="device blocks kept idle for newcomers and growing rows, or auto: what recent "
        "ones take while others leave (default: auto)",
    )
    kv_write_through: CliExplicitFlag[bool] = Field(
        default=True,
        description="on: while memory is short, full KV blocks are copied to the host ahead of "
        "need (proactive only)",
    )

    @field_validator("quantum", "kv_reserve_blocks", mode="before")
    @classmethod
    def _by_itself(cls, value: Any) -> Any:
        return None if value in ("auto", "measured") else value

    @field_validator("workers", mode="before")
    @classmethod
    def _separated(cls, value: Any) -> Any:
        words = [value] if isinstance(value, str) else value
        return [name.strip() for word in words for name in str(word).split(",") if name.strip()]

    @field_validator("workers")
    @classmethod
    def _each_worker_once(cls, addresses: list[str]) -> list[str]:
        """Two streams to one worker would end each other for ever."""
        for address in addresses:
            if addresses.count(address) > 1:
                raise ValueError(f"{address} is given twice")
        return addresses

    @model_validator(mode="after")
    def _findable(self) -> SchedulerSettings:
        if self.discovery == "kubernetes":
            if not self.kubernetes_service:
                raise ValueError("--discovery kubernetes needs --kubernetes-service")
            if self.workers:
                raise ValueError("--worker does not go with --discovery kubernetes")
        elif not self.workers:
            raise ValueError("no worker group is given: name one with --worker")
        if self.discovery == "dns":
            for name in self.workers:
                host, _, port = name.rpartition(":")
                if not host or not port.isdigit():
                    raise ValueError(f"{name!r} is not a name and a port, such as workers:7071")
        return self
