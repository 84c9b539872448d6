"""The decoder, its weights, and the forward pass in which a prompt's responses share it."""
