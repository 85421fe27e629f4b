"""An mlx-lm model as log-probabilities: loading, scoring, attention, memory in training."""
