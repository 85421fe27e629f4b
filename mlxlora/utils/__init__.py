"""Files, locks, devices, trust: helpers that know nothing about training."""
