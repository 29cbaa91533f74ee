"""How a module is run without a trace, and changed in place."""
