"""A timm backbone with a decoder that labels pixels."""
