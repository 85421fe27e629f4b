"""Options, configuration files, and the spellings of mlx-lm."""
