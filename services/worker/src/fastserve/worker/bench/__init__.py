"""Measurements of the engine: `fastserve bench engine` and the perplexity of a number format."""
