"""Which slices of a model's tensors hang together: a trace of its operators."""
