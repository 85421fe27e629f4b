"""Several processes that train one model: ranks, slices, watchdog."""
