"""Files, locks, devices, trust: help that knows nothing of training."""
