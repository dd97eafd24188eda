"""`fastserve bench memory`: KV caches when the device is full, strategy by strategy."""
