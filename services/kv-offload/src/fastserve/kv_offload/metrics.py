"""Prometheus series of the sidecar."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class Metrics:
    """All series, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.usage = Gauge(
            "fastserve_host_kv_usage_ratio",
            "Share of host slots that are reserved or committed (0 to 1)",
            registry=self.registry,
        )
        self.slots = Gauge(
            "fastserve_host_kv_slots", "Host slots by state", ["state"], registry=self.registry
        )
        self.bytes = Counter(
            "fastserve_swap_bytes_total",
            "KV bytes committed (direction=out) and handed out for reading (direction=in)",
            ["direction"],
            registry=self.registry,
        )
        self.rejected = Counter(
            "fastserve_host_kv_rejected_reservations_total",
            "Reservations refused because the pool was full",
            registry=self.registry,
        )
        self.jobs = Gauge(
            "fastserve_host_kv_jobs", "Jobs with slots on the host", registry=self.registry
        )

    def update(self, slots: int, free: int, reserved: int, committed: int, jobs: int) -> None:
        """Set the gauges from the slot table."""
        self.usage.set((slots - free) / slots if slots else 0.0)
        for state, count in (("free", free), ("reserved", reserved), ("committed", committed)):
            self.slots.labels(state).set(count)
        self.jobs.set(jobs)
