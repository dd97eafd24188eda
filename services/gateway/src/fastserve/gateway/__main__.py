"""`python -m fastserve.gateway`."""

from __future__ import annotations

import sys

from fastserve.common.lifecycle import run_service
from fastserve.gateway.service import serve
from fastserve.gateway.settings import GatewaySettings

if __name__ == "__main__":
    sys.exit(run_service("gateway", GatewaySettings, serve))
