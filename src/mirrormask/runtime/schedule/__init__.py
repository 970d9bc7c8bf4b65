"""Where every value lies and which kernel runs when."""
