"""The fine-tuning methods that a config can name; each applies itself to a model and returns its tuner."""
