"""The engine: a partitioned PyTorch model with a paged KV cache that can be preempted."""
