"""What can the weights that stay make up for? Layers are fitted to what the original computes, call by call."""
