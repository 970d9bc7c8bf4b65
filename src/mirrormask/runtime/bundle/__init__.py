"""A compiled model as a file, and what reads and runs it without torch."""
