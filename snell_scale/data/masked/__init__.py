"""Images with a class for every pixel: folders, and scenes that are made."""
