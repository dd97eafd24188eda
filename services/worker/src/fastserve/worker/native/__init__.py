"""The CPU kernels: a small C++ library (csrc/), compiled on the machine that runs it."""
