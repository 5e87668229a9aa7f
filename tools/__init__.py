"""Tools around the training script; each is started as `python -m tools.NAME` from the repository's root."""
