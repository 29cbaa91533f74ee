"""What was done to a module's structure, and how it comes back."""
