"""Reads the logs of GPT-2 speedrun runs, compares groups of runs and judges claims. It never imports torch.

    logs          reads a log, in our format or any public one, into Run objects
    groups        puts comparable runs into groups and gives each group a name
    stats         mean, standard deviation and t-tests
    table         prints one row for each group
    verdict       applies the rules to a claim
    difference    shows what differs between two logs: code, settings, results
    plots         draws loss curves
    page          writes one HTML page about a comparison (page.html, page.css, page.js)
    ab            runs two scripts alternately and judges the second against the first
    text          formats numbers and text for people
    command_line  the commands and their flags
"""
from .command_line import main
from .groups import Group, group_runs, labels_of
from .logs import HARMLESS, Environment, Run, UserError, find_runs, read_log
from .plots import curves_of
from .stats import runs_needed, t_test_below, welch_test_below
from .verdict import contrasts_of

__all__ = ["HARMLESS", "Environment", "Group", "Run", "UserError", "contrasts_of", "curves_of", "find_runs",
           "group_runs", "labels_of", "main", "read_log", "runs_needed", "t_test_below", "welch_test_below"]
