"""Metrics of the scheduler. Names follow the conventions; times are in seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fastserve.scheduler.core import CostModel

_FAST: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_ITERATION: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_PAUSES: Final = (0.0, 0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_ITERATIONS: Final = (0, 1, 2, 3, 4, 6, 10, 20, 50)
_COUNTS: Final = (0, 1, 2, 3, 5, 8, 13, 21, 34)


class Metrics:
    """One set of instruments per process; a new leader in the same process goes on counting."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seen: dict[str, int] = {}  # by name of the core's counter
        self._seen_waits = (0.0, 0.0)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, registry=registry, buckets=buckets)

        self.incoming = counter("fastserve_incoming_requests", "Submissions, refused ones included")
        self.requests = counter(
            "fastserve_requests", "Submissions by how they ended or were refused", "outcome"
        )
        self.queue_depth = gauge("fastserve_queue_depth", "Waiting jobs per level", "level")
        self.preemptions = counter(
            "fastserve_preemptions", "Jobs taken out of the batch", "reason", "mode"
        )
        self.request_preemptions = histogram(
            "fastserve_request_preemptions", "Preemptions of a job, at its end", _COUNTS
        )
        self.time_preempted = histogram(
            "fastserve_time_preempted_seconds", "Time a job was preempted, at its end", _PAUSES
        )
        self.promotions = counter(
            "fastserve_starvation_promotions", "Jobs raised because they waited too long"
        )
        self.moved_tokens = counter(
            "fastserve_kv_tokens",
            "Tokens whose KV was offloaded, uploaded, recomputed, sent to another worker or found "
            "in the prefix cache",
            "operation",
        )
        self.kv_wait = counter(
            "fastserve_kv_wait_seconds",
            "Time that jobs among the first of the order, as many as there are rows, waited for KV "
            "on its way, all jobs together",
        )
        self.row_time = counter(
            "fastserve_row_seconds", "Time of iterations in which jobs had a row, all jobs together"
        )
        self.iteration = histogram(
            "fastserve_iteration_seconds",
            "Iterations as workers measured them, by the kind of their rows",
            _ITERATION,
            "phase",
        )
        self.control_rtt = histogram(
            "fastserve_control_rtt_seconds",
            "From sending a plan to the first report made under it, less that iteration",
            _ITERATION,
        )
        self.plan = histogram("fastserve_plan_seconds", "Making and packing a plan", _FAST)
        self.redis_write = histogram(
            "fastserve_redis_write_seconds", "Round trips of the write script", _FAST
        )
        self.cost_error = gauge(
            "fastserve_cost_model_error_ratio",
            "Mean of |predicted - measured| / measured over the newest iterations",
            "worker",
        )
        self.decode_time = gauge(
            "fastserve_predicted_decode_seconds", "Median decode iteration of a worker", "worker"
        )
        self.slowdown = gauge(
            "fastserve_worker_slowdown_ratio",
            "Decode iterations of a worker, by those of the fastest one with at least as many rows",
            "worker",
        )
        self.prefill_rate = gauge(
            "fastserve_predicted_prefill_tokens_per_second",
            "Predicted for a prompt of 512 tokens alone",
            "worker",
        )
        self.queued_work = gauge(
            "fastserve_queued_work_seconds",
            "Predicted seconds until a worker is through with the jobs that wait for it now",
            "worker",
        )
        self.redis_errors = counter(
            "fastserve_redis_errors", "Round trips to Redis that failed or were slow", "kind"
        )
        self.redis_backlog = gauge(
            "fastserve_redis_backlog_jobs", "Jobs whose last changes are not in Redis"
        )
        self.durable = gauge("fastserve_durable", "1 if what gateways have seen is in Redis")
        self.leader = gauge("fastserve_leader", "1 if this process leads the shard")
        self.workers = gauge("fastserve_workers_connected", "Workers with an open stream")
        self.worker_faults = counter(
            "fastserve_worker_faults", "Streams to workers that broke, by what went wrong", "kind"
        )
        self.draining = gauge("fastserve_workers_draining", "Connected workers that are to leave")
        self.group_jobs = gauge("fastserve_group_jobs", "Jobs placed at a worker group", "worker")
        self.migrations = counter(
            "fastserve_migrations", "Jobs that went to another worker group", "cause"
        )
        self.exports = counter(
            "fastserve_kv_exports", "KV caches sent ahead of jobs that move", "outcome"
        )
        self.pauses = histogram(
            "fastserve_migration_pause_iterations",
            "Iterations of the new group without a token of a job that ran at another one before",
            _ITERATIONS,
        )
        self.gateways = gauge("fastserve_gateways_connected", "Gateways with an open stream")
        self.running = gauge(
            "vllm:num_requests_running", "Jobs in the batch", "model_name", "engine"
        )
        self.waiting = gauge("vllm:num_requests_waiting", "Jobs that wait", "model_name", "engine")

    def follow(self, counters: Mapping[str, int]) -> None:
        """Take over what the core counted since the last call."""
        for name, value in counters.items():
            more = value - self._seen.get(name, 0)
            self._seen[name] = value
            kind, _, rest = name.partition(".")
            if kind == "preemptions":
                self.preemptions.labels(*rest.split(".")).inc(more)
            elif kind == "promotions":
                self.promotions.inc(more)
            elif kind == "migrations":
                self.migrations.labels(rest).inc(more)
            elif kind == "exports":
                self.exports.labels(rest).inc(more)
            elif kind == "pauses":
                for _ in range(more):
                    self.pauses.observe(int(rest))
            elif kind == "tokens":
                self.moved_tokens.labels(rest).inc(more)

    def follow_waits(self, waits: tuple[float, float]) -> None:
        """Take over `Scheduler.kv_wait`."""
        for counter, now, seen in zip(
            (self.kv_wait, self.row_time), waits, self._seen_waits, strict=True
        ):
            counter.inc(now - seen)
        self._seen_waits = waits

    def set_costs(
        self, models: Mapping[str, CostModel], queued_work_s: Mapping[str, float]
    ) -> None:
        """What is known of the connected workers, by their ids; others are forgotten."""
        for gauge in (self.cost_error, self.decode_time, self.prefill_rate, self.queued_work):
            gauge.clear()
        for worker, seconds in queued_work_s.items():
            self.queued_work.labels(worker).set(seconds)
        for worker, cost in models.items():
            self.cost_error.labels(worker).set(cost.error)
            self.decode_time.labels(worker).set(cost.decode_s)
            self.prefill_rate.labels(worker).set(cost.prefill_tokens_per_s)

    def set_groups(
        self, jobs: Mapping[str, int], draining: int, slowdown: Mapping[str, float]
    ) -> None:
        """Jobs by connected worker, how many of these are draining, and how slow each is."""
        self.group_jobs.clear()
        self.slowdown.clear()
        for worker, ratio in slowdown.items():
            self.slowdown.labels(worker).set(ratio)
        for worker, count in jobs.items():
            self.group_jobs.labels(worker).set(count)
        self.draining.set(draining)

    def restart(self) -> None:
        """A new leader counts from 0 again."""
        self._seen.clear()
        self._seen_waits = (0.0, 0.0)

    def step_down(self) -> None:
        """This process leads no more: what it last knew would be counted beside the leader's."""
        self.set_costs({}, {})
        self.slowdown.clear()
        for gauge in (self.queue_depth, self.running, self.waiting):
            gauge.clear()
        for gauge in (self.leader, self.workers, self.gateways, self.redis_backlog):
            gauge.set(0)

    def set_depths(self, model: str, depths: Sequence[int], running: int) -> None:
        """Waiting jobs per level and running ones; `model` "" while no worker is known."""
        for level, depth in enumerate(depths):
            self.queue_depth.labels(level).set(depth)
        if model:
            self.running.labels(model, "0").set(running)
            self.waiting.labels(model, "0").set(sum(depths))


class NamesShard(Collector):
    """All metrics of a registry with the label `shard`, for the endpoint of the process."""

    def __init__(self, registry: CollectorRegistry, shard: str) -> None:
        self._registry = registry
        self._shard = {"shard": shard}

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [
                sample._replace(labels=self._shard | sample.labels) for sample in metric.samples
            ]
            yield metric
