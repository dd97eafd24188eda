"""`fastserve bench compare`: FastServe and its peers, on the same weights and requests."""
