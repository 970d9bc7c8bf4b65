"""What a model is: a frozen graph over named values, and how it is read."""
