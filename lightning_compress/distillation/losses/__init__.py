"""What a student is asked to imitate: for each loss its formula as a function, and a small frozen class.

All arithmetic is in float32 (float64 stays) with autocast off; logits are compared in log space. Values *and*
gradients are finite for extreme and for masked (-inf) logits, for zero features and for a batch of one.

A new loss is a file here, and its name in ``lightning_compress/__init__.pyi``.
"""
