"""From a resolved run to its processes: checks before, the start, the watch over them."""
