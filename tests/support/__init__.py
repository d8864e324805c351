"""Shared code of the tests, the benchmarks and the demo; README.md lists the modules."""
