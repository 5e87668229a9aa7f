"""Tools around the training script; `python -m tools.NAME` starts one."""
