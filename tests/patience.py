PATIENCE_SECONDS = 600
"""How long a test waits for what must happen. No machine is so busy that it takes so long: only a hang does.

How soon something happens is for benchmarks to measure."""
