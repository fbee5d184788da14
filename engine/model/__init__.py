"""What a model is: dimensions, formats, text as tokens, and the network that computes it."""
