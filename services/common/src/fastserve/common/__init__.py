"""What every FastServe service shares: settings, logging, metrics, tracing, gRPC and lifecycle."""

import os

# A message passes five threads with gRPC's event engine, and two when the thread that waits for the
# completion polls the socket itself. gRPC reads this once, when it is first imported.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
