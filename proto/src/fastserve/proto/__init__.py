"""Generated gRPC code of the FastServe contracts (see `proto/fastserve/v1`)."""
