"""Reads run logs of the GPT-2 speedrun; never imports torch. `python records/compare.py --help` shows the commands.

    logs          what a log tells of its runs, in our format and in all public ones
    tokens        how many a run has read at a step
    groups        which runs are comparable, and what a group is called
    statistics    means, deviations, and Student's and Welch's tests
    table         a row for each group
    verdict       does a claim hold against a baseline, and does it learn better?
    difference    what two logs do not have in common: code, settings, results
    plots         curves as a picture
    page          all about a comparison as one HTML file, with page.css and page.js
    listing       two scripts side by side, for the page
    markup        HTML in which every text is escaped
    ab            runs two scripts in turn, then judges
    text          figures and words as people read them
    command_line  the commands and their flags
"""
from .command_line import main
from .groups import Group, labels_of
from .logs import HARMLESS, Environment, Run, UserError, read_log
from .plots import curves_of
from .statistics import runs_needed, t_test_below, welch_test_below
from .verdict import comparison

__all__ = ["HARMLESS", "Environment", "Group", "Run", "UserError", "comparison", "curves_of", "labels_of", "main",
           "read_log", "runs_needed", "t_test_below", "welch_test_below"]
