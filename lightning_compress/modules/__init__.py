"""How is a module run without a trace, and changed in place?"""
