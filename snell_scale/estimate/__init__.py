"""Peak memory of a run before it runs: the true training step on tensors that have a shape and no memory."""
