"""`python -m fastserve.common.healthcheck ADDRESS`: is the service there well? For containers.

ADDRESS is that of a gRPC service with the standard health protocol (`host:port` or `unix:/path`),
or an http URL. Exit status 0 if it is SERVING, or answers 200; else 1 and one line on stderr.
"""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def check(address: str, timeout_s: float) -> str | None:
    """What is wrong with the service at `address`; None: nothing."""
    if address.startswith(("http://", "https://")):
        return _check_http(address, timeout_s)
    return _check_grpc(address, timeout_s)


def _check_http(url: str, timeout_s: float) -> str | None:
    try:
        # No proxy: the service is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=timeout_s) as answer:
            return None if answer.status == 200 else f"HTTP {answer.status}"
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}: {error.read(500).decode(errors='replace')}"
    except (OSError, ValueError) as error:
        return str(error)


def _check_grpc(address: str, timeout_s: float) -> str | None:
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return None if status == "SERVING" else status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastserve-healthcheck", description=__doc__)
    parser.add_argument("address", help="host:port, unix:/path or an http URL")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds (default: 5)")
    options = parser.parse_args(arguments)
    problem = check(options.address, options.timeout)
    if problem is not None:
        print(f"{options.address} is not healthy: {problem}", file=sys.stderr)
    return 0 if problem is None else 1


if __name__ == "__main__":
    sys.exit(main())
