"""Prometheus series of the sidecar.

Tiers are host, disk and peer; "out" is away from the device, "in" is towards it. What the worker
copies counts as host: its seconds run from handing out the slots until the worker says it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge

from fastserve.kv_offload.slots import SlotTable

Tables = Callable[[], Iterable[SlotTable]]


class Metrics:
    """All series, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._bytes = Counter(
            "fastserve_kv_tier_bytes_total",
            "KV bytes moved to (out) and from (in) a tier",
            ["tier", "direction"],
            registry=registry,
        )
        self._seconds = Counter(
            "fastserve_kv_tier_seconds_total",
            "Seconds spent in moving them, summed over moves that run side by side",
            ["tier", "direction"],
            registry=registry,
        )
        self._lookups = Counter(
            "fastserve_kv_lookups_total",
            "Blocks that were asked for, by where they were: host, disk or miss",
            ["result"],
            registry=registry,
        )
        self._verify = Counter(
            "fastserve_kv_verify_failures_total",
            "Blocks whose checksum differed when they were read",
            ["tier"],
            registry=registry,
        )
        self._failures = Counter(
            "fastserve_kv_failures_total",
            "What went wrong: disk_full, disk_write, disk_read, no_host_slot (blocks could not be "
            "brought from the disk in time), peer, peer_auth, lease_expired",
            ["kind"],
            registry=registry,
        )
        self._rejected = Counter(
            "fastserve_host_kv_rejected_reservations_total",
            "Reservations refused for want of room",
            registry=registry,
        )

    def watch(self, tables: Tables) -> None:
        """Gauges over the slot tables of all workers, read when they are scraped."""

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(name, text, registry=self.registry).set_function(value)

        def slots(tier: str, state: str, count: Callable[[SlotTable], int]) -> None:
            by_state[tier].labels(state).set_function(lambda: sum(map(count, tables())))

        by_state = {
            tier: Gauge(
                f"fastserve_{tier}_kv_slots",
                f"Slots on the {tier} by state; committed ones may be on their way to another "
                "tier, cached ones are room for others",
                ["state"],
                registry=self.registry,
            )
            for tier in ("host", "disk")
        }
        slots("host", "free", lambda table: table.free + table.cache.busy - table.cache.cached)
        slots("host", "cached", lambda table: table.cache.cached)
        slots("host", "reserved", lambda table: table.reserved)
        slots("host", "committed", lambda table: table.in_use - table.reserved)
        slots("disk", "free", lambda table: table.free_disk)
        slots("disk", "committed", lambda table: table.disk_slots - table.free_disk)
        gauge(
            "fastserve_host_kv_usage_ratio",
            "Share of host slots that are not free (0 to 1)",
            lambda: _used(sum(t.free for t in tables()), sum(t.slots for t in tables())),
        )
        gauge(
            "fastserve_disk_kv_usage_ratio",
            "Share of disk slots that are not free (0 to 1)",
            lambda: _used(sum(t.free_disk for t in tables()), sum(t.disk_slots for t in tables())),
        )
        gauge(
            "fastserve_host_kv_jobs",
            "Jobs with blocks on the host or the disk",
            lambda: sum(len(t.jobs) for t in tables()),
        )
        gauge("fastserve_kv_owners", "Workers that own blocks here", lambda: len(list(tables())))

    def moved(self, tier: str, direction: str, size: int, seconds: float) -> None:
        """Count bytes that went to a tier (out) or came from it (in)."""
        self._bytes.labels(tier, direction).inc(size)
        self._seconds.labels(tier, direction).inc(seconds)

    def found(self, *, host: int = 0, disk: int = 0, miss: int = 0) -> None:
        """Count blocks that were asked for."""
        for result, count in (("host", host), ("disk", disk), ("miss", miss)):
            self._lookups.labels(result).inc(count)

    def verify_failed(self, tier: str) -> None:
        self._verify.labels(tier).inc()

    def failed(self, kind: str) -> None:
        self._failures.labels(kind).inc()

    def rejected(self) -> None:
        self._rejected.inc()


def _used(free: int, total: int) -> float:
    return 1 - free / total if total else 0.0
