"""Scripts that measure speed, each run as a module: python -m benchmarks.step, python -m benchmarks.data."""
