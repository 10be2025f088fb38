"""A package, for torch-fidelity installs a top-level package of this name too."""
