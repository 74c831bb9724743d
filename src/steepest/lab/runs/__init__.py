"""One run: its config, its training, its checkpoints and the numbers it leaves."""
