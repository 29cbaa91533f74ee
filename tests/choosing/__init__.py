"""Which layers, how much: `sensitivity` and `search`."""
