"""What the user holds: a compiled model, its regions, its report."""
