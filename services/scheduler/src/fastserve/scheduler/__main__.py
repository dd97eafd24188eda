"""`python -m fastserve.scheduler`."""

from __future__ import annotations

import sys

from fastserve.common.lifecycle import run_service
from fastserve.scheduler.service import serve
from fastserve.scheduler.settings import SchedulerSettings

if __name__ == "__main__":
    sys.exit(run_service("scheduler", SchedulerSettings, serve))
