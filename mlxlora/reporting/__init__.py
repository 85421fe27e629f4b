"""What a run tells: terminal, page, model card, trackers."""
