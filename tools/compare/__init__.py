"""Reads logs of GPT-2 speedrun runs, compares groups of runs, judges claims. Never imports torch.

`python -m tools.compare --help` shows the commands; README.md explains how a claim is judged.
"""
from .command_line import main
from .groups import Group, group_runs, labels_of
from .logs import HARMLESS, Environment, Run, UserError, find_runs, read_log
from .plots import curves_of
from .stats import runs_needed, t_test_below, welch_test_below
from .verdict import contrasts_of

__all__ = ["HARMLESS", "Environment", "Group", "Run", "UserError", "contrasts_of", "curves_of",
           "find_runs", "group_runs", "labels_of", "main", "read_log", "runs_needed",
           "t_test_below", "welch_test_below"]
