"""`fastserve bench memory`: what becomes of KV caches when the device is full, strategy by strategy."""
