"""The ways to take a step: one file each; the first that is ready takes it."""
