"""One run: step, loop, checkpoint, resume."""
