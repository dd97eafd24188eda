"""What every FastServe service shares: settings, logging, metrics, tracing, gRPC and lifecycle."""
