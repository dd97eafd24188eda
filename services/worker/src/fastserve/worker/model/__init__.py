"""The model: files, weights, layers over a paged KV cache, and sampling."""
