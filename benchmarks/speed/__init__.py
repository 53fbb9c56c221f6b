"""Speed and memory of caches beside each other; ``python -m benchmarks.speed --help``."""
