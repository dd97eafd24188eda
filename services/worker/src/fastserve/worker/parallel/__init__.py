"""A worker group of tensor x pipeline parallel ranks (docs/parallel.md)."""
