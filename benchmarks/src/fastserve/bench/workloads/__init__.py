"""Which jobs come, and when."""

from fastserve.bench.workloads.generate import WORKLOADS, check_workload, generate
from fastserve.bench.workloads.trace import Trace, TraceError, read_trace

__all__ = [
    "WORKLOADS",
    "Trace",
    "TraceError",
    "check_workload",
    "generate",
    "read_trace",
]
