"""`make bench-gateway`: what one gateway process carries, in front of a stub scheduler."""
