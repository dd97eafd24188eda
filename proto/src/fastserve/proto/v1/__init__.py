"""Version 1 of the contracts; do not edit, run `make proto`."""
