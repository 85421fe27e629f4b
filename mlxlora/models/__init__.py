"""From an mlx-lm model to log-probabilities: loading, scoring, attention, memory in training."""
