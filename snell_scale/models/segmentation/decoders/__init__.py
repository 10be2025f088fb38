"""Decoders of segmentation models: feature maps in, logits per class and place out."""
