"""What real users hit: small runs with one fault each, through the public ways in. ``python -m benchmarks.field``."""
