"""Prometheus series of the worker: FastServe's own, and vLLM's names for existing dashboards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fastserve.worker.engine import Iteration

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

_CONTROL_SECONDS = (
    *(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025),
    *(0.1, 1.0),
)


class Metrics:
    """All series, in a registry of their own."""

    def __init__(self, model: str, block_size: int, device_blocks: int) -> None:
        self.registry = registry = CollectorRegistry()
        self._device_blocks = device_blocks
        self.iteration = Histogram(
            "fastserve_iteration_seconds",
            "Duration of an iteration, sampling included",
            ["phase"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._prefills = self.iteration.labels("prefill")
        self._decodes = self.iteration.labels("decode")
        self.control = Histogram(
            "fastserve_control_seconds",
            "Time between two iterations while rows were there to run: waiting for a plan, putting "
            "it in force, the head start of a first token (sum over that of "
            "fastserve_iteration_seconds: control overhead)",
            buckets=_CONTROL_SECONDS,
            registry=registry,
        )
        self.comm = Histogram(
            "fastserve_comm_seconds",
            "Time of an iteration that rank 0 spent in communication with other ranks, waiting for "
            "slower ones included",
            ["kind"],
            buckets=_CONTROL_SECONDS,
            registry=registry,
        )
        self.swap_bytes = Counter(
            "fastserve_swap_bytes_total",
            "KV bytes copied to the host (out) and back (in)",
            ["direction"],
            registry=registry,
        )
        self.swap_seconds = Histogram(
            "fastserve_swap_seconds",
            "Duration of a KV copy operation",
            ["direction"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.cache_queries = Counter(
            "fastserve_prefix_cache_queries",
            "Tokens of jobs that began with nothing on the device and may share KV",
            registry=registry,
        )
        hits = Counter(
            "fastserve_prefix_cache_hits",
            "Of them, those whose KV was there already, on the device or on the host",
            ["tier"],
            registry=registry,
        )
        self._device_hits, self._host_hits = hits.labels("device"), hits.labels("host")

        def labelled(kind: type[Gauge] | type[Counter], name: str, text: str) -> Any:
            return kind(name, text, ["model_name"], registry=registry).labels(model)

        self._running = labelled(Gauge, "vllm:num_requests_running", "Rows in the last iteration")
        self._usage = labelled(Gauge, "vllm:kv_cache_usage_perc", "Share of KV blocks used (0-1)")
        self._prompt = labelled(Counter, "vllm:prompt_tokens", "Tokens prefilled")
        self._cache_queries = labelled(
            Counter, "vllm:prefix_cache_queries", "As fastserve_prefix_cache_queries_total"
        )
        self._cache_hits = labelled(
            Counter, "vllm:prefix_cache_hits", "As fastserve_prefix_cache_hits_total"
        )
        self._generated = labelled(Counter, "vllm:generation_tokens", "Tokens sampled")
        self._iteration_tokens = Histogram(
            "vllm:iteration_tokens_total",
            "Tokens processed in an iteration",
            ["model_name"],
            buckets=(1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
            registry=registry,
        ).labels(model)
        self.sidecar_losses = Gauge(
            "fastserve_kv_offload_losses",
            "Times that the sidecar was lost, with all that it held",
            registry=registry,
        )
        Gauge(
            "vllm:cache_config_info",
            "Size of the KV cache",
            ["model_name", "block_size", "num_gpu_blocks"],
            registry=registry,
        ).labels(model, str(block_size), str(device_blocks)).set(1)

    def observe(self, iteration: Iteration, free_blocks: int) -> None:
        """Count one iteration (or report without one)."""
        self._usage.set(1 - free_blocks / self._device_blocks)
        if not iteration.iteration:
            return
        prefilled = sum(new for _, new, _ in iteration.rows if new > 1)
        (self._prefills if prefilled else self._decodes).observe(iteration.seconds)
        if iteration.control_seconds is not None:
            self.control.observe(iteration.control_seconds)
        self._running.set(len(iteration.rows))
        if prefilled:
            self._prompt.inc(prefilled)
        for _, known, device, host in iteration.lookups:
            for counter, tokens in (
                (self.cache_queries, known),
                (self._cache_queries, known),
                (self._device_hits, device),
                (self._host_hits, host),
                (self._cache_hits, device + host),
            ):
                counter.inc(tokens)
        self._generated.inc(len(iteration.sampled))
        self._iteration_tokens.observe(sum(new for _, new, _ in iteration.rows))

    def communicated(self, seconds: Mapping[str, float]) -> None:
        """Count the communication of one iteration, by kind."""
        for kind, value in seconds.items():
            self.comm.labels(kind).observe(value)

    def copied(self, direction: str, size: int, seconds: float) -> None:
        """Count a KV copy; direction is "out" or "in"."""
        self.swap_bytes.labels(direction).inc(size)
        self.swap_seconds.labels(direction).observe(seconds)
