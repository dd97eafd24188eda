"""Host memory for offloaded KV cache blocks: slots, commits, checksums."""
