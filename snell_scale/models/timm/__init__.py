"""timm: any of its models, every published weight format, and what a tuner must know of them."""
