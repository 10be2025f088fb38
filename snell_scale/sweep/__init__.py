"""A study as jobs of a batch system (or of this machine), through submitit; every job is an ordinary run."""
