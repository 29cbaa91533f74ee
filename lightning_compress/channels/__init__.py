"""Channel removal: what hangs together, what matters least, and taking it out."""
