"""What was done to the structure of a module, and how does it come back from a file?"""
