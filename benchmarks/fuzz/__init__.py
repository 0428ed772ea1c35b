"""A fuzzer of the whole pipeline: random networks and masks, exported and compared. ``python -m benchmarks.fuzz``."""
