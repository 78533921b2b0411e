"""Benchmarks: kernels with pytest-benchmark (`pytest bench -k kernels`), jobs end to end with one script each."""
