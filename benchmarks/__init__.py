"""How fast the kernels are beside their peers: ``python -m benchmarks --help``, ``pytest benchmarks``."""
