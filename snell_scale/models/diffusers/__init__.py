"""Denoising models from diffusers, and the frozen encoders before them."""
