"""What is cut, and how it comes back from a file."""
