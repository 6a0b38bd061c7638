"""Speed, as ratios within one interleaved run: ``python -m benchmarks``."""
