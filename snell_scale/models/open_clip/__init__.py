"""CLIP models from open_clip: settings, preprocessing, weights, and what a tuner must know of them."""
