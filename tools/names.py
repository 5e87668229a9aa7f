"""Names of train_gpt.py that were others in older scripts, which the tools still read.

The scripts in records/ are frozen, so a tool that asks a script for a name accepts both.
"""

OLDER = {  # today's name: the name before 2026-11-29
    "max_doc_len": "document",             # field of a stage
    "softmax_size": "words",               # field of a stage; attribute of Schedule
    "mtp_weights": "target_weights",       # attribute of Schedule
    "extension": "extension_steps",        # setting: a share of the run; before, a number of steps
    "momentum_warmup": "momentum_warmup_steps",
    "momentum_cooldown": "momentum_cooldown_steps",
}


def name_in(owner, name: str) -> str | None:
    """The name that owner uses for today's name: the same, the older one, or None for neither."""
    for candidate in (name, OLDER.get(name)):
        if candidate is not None and hasattr(owner, candidate):
            return candidate
    return None
