"""The scheduler: which job runs in the next iteration, made durable in Redis."""
