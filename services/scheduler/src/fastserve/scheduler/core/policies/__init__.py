"""Policies by name."""

from __future__ import annotations

from fastserve.scheduler.core.errors import UnknownPolicyError
from fastserve.scheduler.core.policies.base import Key, Policy
from fastserve.scheduler.core.policies.fastserve import FastServe
from fastserve.scheduler.core.policies.fcfs import Fcfs
from fastserve.scheduler.core.policies.fixed_priority import FixedPriority
from fastserve.scheduler.core.policies.hrrn import Hrrn
from fastserve.scheduler.core.policies.mlfq import Mlfq, SkipJoinMlfq
from fastserve.scheduler.core.policies.srpt import Srpt

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (FastServe, SkipJoinMlfq, Mlfq, Fcfs, FixedPriority, Hrrn, Srpt)
}


def policy_named(name: str) -> type[Policy]:
    """Raises `UnknownPolicyError`, which names those that exist."""
    try:
        return POLICIES[name]
    except KeyError:
        known = ", ".join(POLICIES)
        raise UnknownPolicyError(f"policy {name!r} is unknown: choose one of {known}") from None


__all__ = ["POLICIES", "Key", "Policy", "policy_named"]
