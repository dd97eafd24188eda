"""Workloads, the simulator of `fastserve simulate`, sweeps and plots."""
