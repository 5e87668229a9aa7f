"""tools/fair_play.py passes honest scripts and finds cheats.

A cheat is a function or setting of a loaded script that the test replaces.
"""
import dataclasses
import functools
import inspect
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tools import fair_play
from tools.fair_play import (
    later_targets_leak_nothing,
    loss_is_the_mean_surprise,
    no_later_token,
    no_other_document,
    validation_is_the_tracks,
    warm_up_leaks_nothing,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = str(REPOSITORY / "train_gpt.py")


def older_script(name: str) -> str:
    """The path of a frozen script, wherever it lies below records/."""
    return str(next((REPOSITORY / "records").rglob(f"{name}/train_gpt.py")))


@pytest.fixture(scope="module")
def script():
    """train_gpt.py, loaded as a candidate."""
    return fair_play.load(SCRIPT)


# --- Honest scripts -------------------------------------------------------------------------------

def test_the_script_is_fair(script):
    verdicts = [result.verdict for result in fair_play.run_checks(script)]
    assert verdicts == ["pass"] * 6


# The number of checks that have something to look at.
CHECKED = {"2024-06-06_AdamW": 3, "2024-10-14_ModernArch": 3, "2024-11-03_UntieEmbed": 3,
           "2024-12-04_ValueEmbed": 4, "2026-11-22_NGramEmbed": 5, "2026-11-25_Stages": 6}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKED)
def test_the_scripts_in_records_are_fair(name):
    results = list(fair_play.run_checks(fair_play.load(older_script(name))))
    verdicts = [result.verdict for result in results]
    assert verdicts.count("pass") == CHECKED[name], results
    assert verdicts.count("none") == 6 - CHECKED[name], results


# --- Cheats in train_gpt.py -----------------------------------------------------------------------

def wrap(monkeypatch, owner, name: str, wrapper):
    """Replace owner.name by a function that returns wrapper(original, arguments).

    arguments is inspect.BoundArguments: arguments.arguments holds them by name.
    """
    original = getattr(owner, name)
    signature = inspect.signature(original)

    @functools.wraps(original)  # the checks look at signatures
    def replacement(*args, **more):
        return wrapper(original, signature.bind(*args, **more))

    monkeypatch.setattr(owner, name, replacement)


def change_arguments(monkeypatch, owner, name: str, change):
    """Call owner.name with arguments that change, a function of their dictionary, has changed."""
    def wrapper(original, bound):
        change(bound.arguments)
        return original(*bound.args, **bound.kwargs)
    wrap(monkeypatch, owner, name, wrapper)


def change_result(monkeypatch, owner, name: str, change):
    """Return change(result, arguments by name) instead of the result of owner.name."""
    def wrapper(original, bound):
        return change(original(*bound.args, **bound.kwargs), bound.arguments)
    wrap(monkeypatch, owner, name, wrapper)


def sees_the_next_token(module, monkeypatch):
    monkeypatch.setattr(module, "visible", lambda query, key, first_key, strict=False:
                        (first_key <= key) & (key <= query + 1))


def points_to_the_next_token(module, monkeypatch):
    monkeypatch.setattr(module, "visible", lambda query, key, first_key, strict=False:
                        (first_key <= key) & (key <= query + strict))


def points_to_other_documents(module, monkeypatch):
    def change(masks, arguments):
        if "pointer" in masks:
            masks["pointer"] = torch.zeros_like(masks["pointer"])
        return masks
    change_result(monkeypatch, module.GPT, "masks", change)


def sees_other_documents(module, monkeypatch):
    def change(arguments):
        arguments["eot_token"] = -1
    change_arguments(monkeypatch, module, "document_start", change)


def smears_the_next_token(module, monkeypatch):
    def change(arguments):
        arguments["embed"] = arguments["embed"] + 0.1 * arguments["embed"].roll(-1, 0)
    change_arguments(monkeypatch, module.InputEmbedding, "forward", change)


def without_document_starts(arguments):
    arguments["is_doc_start"] = torch.zeros_like(arguments["is_doc_start"])


def smears_other_documents(module, monkeypatch):
    change_arguments(monkeypatch, module.InputEmbedding, "forward", without_document_starts)


def takes_keys_of_other_documents(module, monkeypatch):
    change_arguments(monkeypatch, module.Attention, "forward", without_document_starts)


def pairs_see_the_document_before(module, monkeypatch):
    def change(masks, arguments):
        if "paired" in masks:
            first = arguments["start"].repeat_interleave(2)  # honest: 2 * start, repeated
            window = arguments["schedule"].windows["paired"]
            masks["paired"] = module.first_visible_key(first, window)
        return masks
    change_result(monkeypatch, module.GPT, "masks", change)


def ngrams_of_other_documents(module, monkeypatch):
    def change(arguments):
        position = arguments["position_in_document"]
        arguments["position_in_document"] = torch.full_like(position, 99)
    change_arguments(monkeypatch, module.NGramEmbed, "forward", change)


def ngrams_of_later_tokens(module, monkeypatch):
    def change(arguments):
        arguments["tokens"] = arguments["tokens"].roll(-1)
    change_arguments(monkeypatch, module.NGramEmbed, "forward", change)


def reports_less(module, monkeypatch):
    def change(result, arguments):
        return (result[0], 0.99 * result[1]) if isinstance(result, tuple) else result
    change_result(monkeypatch, module.Head, "forward", change)


def drops_tokens(module, monkeypatch):
    def change(targets, arguments):
        return torch.cat([torch.full_like(targets[:9], -1), targets[9:]])
    change_result(monkeypatch, module, "next_targets", change)


def looks_at_the_target(module, monkeypatch):
    def change(arguments):
        next_token = arguments["piece"].targets[:, 0].clamp(min=0)
        hint = arguments["self"].linear.matrix()[next_token]
        arguments["state"] = arguments["state"] + hint
    change_arguments(monkeypatch, module.Head, "forward", change)


def training_looks_at_a_later_target(module, monkeypatch):
    def change(arguments):
        targets = arguments["piece"].targets
        if targets.size(1) > 1:
            second_next = targets[:, 1].clamp(min=0)
            hint = 10 * arguments["self"].linear.matrix()[second_next]
            arguments["state"] = arguments["state"] + hint
    change_arguments(monkeypatch, module.Head, "forward", change)


def weighs_the_next_token(module, monkeypatch):
    def change(result, arguments):
        if not isinstance(result, tuple):
            return result
        return result[0], result[1] * arguments["target_weights"][0]
    change_result(monkeypatch, module.Head, "forward", change)


def validates_with_a_sampled_softmax(module, monkeypatch):
    def forward(original, bound):
        with torch.enable_grad():  # honest: no gradient, hence the full softmax
            return original(*bound.args, **bound.kwargs)
    wrap(monkeypatch, module.GPT, "forward", forward)


def has_an_easier_target(module, monkeypatch):
    easier = dataclasses.replace(module.TRACKS["laptop"], target=1.30)
    monkeypatch.setitem(module.TRACKS, "laptop", easier)


def skips_half_of_the_validation(module, monkeypatch):
    @torch.no_grad()
    def validate(model, stream, schedule, hp, runtime):
        count = module.TRACKS[hp.track].val_tokens // hp.val_length // 2
        total = 0.0
        for index in range(count):
            tokens, targets = stream.sequence(index, hp.val_length)
            total += model(tokens[None], targets[None], schedule)[1].item()
        return total / count
    monkeypatch.setattr(module, "validate", validate)


def validation_reports_less(module, monkeypatch):
    change_result(monkeypatch, module, "validate", lambda loss, arguments: loss - 0.01)


def keeps_the_warm_up(module, monkeypatch):
    def change(result, arguments):
        weight = next(arguments["model"].parameters())
        weight.data *= 1.01
    change_result(monkeypatch, module, "warm_up", change)


def keeps_the_momentum_of_the_warm_up(module, monkeypatch):
    def load_state_dict(self, state):
        self.num_updates = 0
    monkeypatch.setattr(module.Optimizer, "load_state_dict", load_state_dict)


def keeps_the_count_of_the_warm_up(module, monkeypatch):
    def change(result, arguments):
        arguments["self"].num_updates = 8
    change_result(monkeypatch, module.Optimizer, "load_state_dict", change)


CHEATS = {  # the check that finds it; one of each check runs by default
    sees_the_next_token: no_later_token,
    points_to_the_next_token: no_later_token,
    points_to_other_documents: no_other_document,
    sees_other_documents: no_other_document,
    reports_less: loss_is_the_mean_surprise,
    weighs_the_next_token: later_targets_leak_nothing,
    skips_half_of_the_validation: validation_is_the_tracks,
    keeps_the_warm_up: warm_up_leaks_nothing}
SLOW_CHEATS = {
    smears_the_next_token: no_later_token,
    ngrams_of_later_tokens: no_later_token,
    smears_other_documents: no_other_document,
    takes_keys_of_other_documents: no_other_document,
    pairs_see_the_document_before: no_other_document,
    ngrams_of_other_documents: no_other_document,
    drops_tokens: loss_is_the_mean_surprise,
    looks_at_the_target: loss_is_the_mean_surprise,
    validates_with_a_sampled_softmax: loss_is_the_mean_surprise,
    training_looks_at_a_later_target: later_targets_leak_nothing,
    has_an_easier_target: validation_is_the_tracks,
    validation_reports_less: validation_is_the_tracks,
    keeps_the_momentum_of_the_warm_up: warm_up_leaks_nothing,
    keeps_the_count_of_the_warm_up: warm_up_leaks_nothing}


def assert_found(check, module):
    """The check fails because of what it saw, and not because it raised."""
    result = fair_play.run_check(check, module)
    assert result.verdict == "FAIL" and not result.raised, result


@pytest.mark.parametrize("cheat", [
    *CHEATS, *(pytest.param(cheat, marks=pytest.mark.slow) for cheat in SLOW_CHEATS)],
    ids=lambda cheat: cheat.__name__)
def test_a_cheat_is_found(script, monkeypatch, cheat):
    check = {**CHEATS, **SLOW_CHEATS}[cheat]
    cheat(script, monkeypatch)
    assert_found(check, script)


# --- Cheats in older scripts, whose models return a loss and no logits ----------------------------

def attends_to_later_tokens(module, monkeypatch):
    def attention(q, k, v, is_causal):
        return F.scaled_dot_product_attention(q, k, v)
    replace_functional(module, monkeypatch, scaled_dot_product_attention=attention)


def replace_functional(module, monkeypatch, **functions):
    """Replace functions of torch.nn.functional for this module alone."""
    namespace = types.SimpleNamespace(**{**vars(F), **functions})
    monkeypatch.setattr(module, "F", namespace)


def reports_a_smaller_loss(module, monkeypatch):
    change_result(monkeypatch, module.GPT, "forward", lambda loss, arguments: 0.99 * loss)


def drops_half_of_the_tokens(module, monkeypatch):
    def cross_entropy(logits, targets):
        return F.cross_entropy(logits[::2], targets[::2])
    replace_functional(module, monkeypatch, cross_entropy=cross_entropy)


@pytest.mark.slow
@pytest.mark.parametrize("cheat, name, check", [
    (attends_to_later_tokens, "2024-06-06_AdamW", no_later_token),
    (sees_the_next_token, "2024-12-04_ValueEmbed", no_later_token),
    (reports_a_smaller_loss, "2024-12-04_ValueEmbed", loss_is_the_mean_surprise),
    (drops_half_of_the_tokens, "2024-12-04_ValueEmbed", loss_is_the_mean_surprise),
    (validation_reports_less, "2024-12-04_ValueEmbed", validation_is_the_tracks),
    (keeps_the_warm_up, "2026-11-22_NGramEmbed", warm_up_leaks_nothing)])
def test_a_cheat_in_an_older_script_is_found(monkeypatch, cheat, name, check):
    module = fair_play.load(older_script(name))
    cheat(module, monkeypatch)
    assert_found(check, module)


# --- Scripts that can't be checked ----------------------------------------------------------------

IMPORTS = "from train_gpt import *\n"


@pytest.mark.parametrize("source, line, error", [
    ("def norm(x)\n", 1, SyntaxError),
    ("\nepsilon = 1 / 0\n", 2, ZeroDivisionError),
    (f"{IMPORTS}sys.exit(3)\n", 2, SystemExit),
    (f"{IMPORTS}def build_model(*args, **more):\n    return missing(*args)\n", 3, NameError),
    (f"{IMPORTS}def Schedule(step, hp, device):\n    return hp.missing\n", 3, AttributeError),
])
def test_a_script_that_does_not_start_is_one_line(tmp_path, capsys, source, line, error):
    path = tmp_path / "idea.py"
    path.write_text(source)
    assert fair_play.main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"{path}:{line}" in err and error.__name__ in err


def test_what_is_no_script_is_one_line(tmp_path, capsys):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "notes.txt").write_text("")
    for name in ("empty.py", "notes.txt", "missing.py"):
        assert fair_play.main([str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and name in err


@pytest.mark.parametrize("name", ["x[1].py", "a b\n.py", "caf\udce9.py", "\x1b[31m%s'.py"])
@pytest.mark.parametrize("source, code", [
    ("raise ValueError('\\x1b[31m \\u202e \\udce9 \\r more')\n", 2),
    (f"{IMPORTS}TRACKS = {{}}\n", 1)])
def test_a_name_is_no_pattern_and_a_terminal_gets_no_commands(tmp_path, capfd, name, source, code):
    path = tmp_path / name
    path.write_text(source)
    assert fair_play.main(["--", str(path)]) == code
    out, err = capfd.readouterr()
    assert (out + err).count("\n") == 1
    assert all(c.isprintable() for c in (out + err).replace("\n", ""))


@pytest.mark.slow
@pytest.mark.parametrize("setting, redirect, code, lines", [
    ("PYTHONIOENCODING=ascii", "", 1, 0), ("", ">&-", 1, 0), ("", ">/dev/full", 2, 1)])
def test_a_console_that_is_not_utf8_or_is_gone(tmp_path, setting, redirect, code, lines):
    path = tmp_path / "naïve.py"
    path.write_text(f"{IMPORTS}print('naïve')\nTRACKS = {{}}\n")
    command = shlex.join([sys.executable, "-m", "tools.fair_play", str(path)])
    done = subprocess.run(["bash", "-c", f"{setting} {command} {redirect}"], cwd=REPOSITORY,
                          capture_output=True)
    assert (done.returncode, done.stderr.count(b"\n")) == (code, lines), done.stderr


def test_a_check_that_raises_fails(script, monkeypatch):
    def warm_up(*args):
        raise ZeroDivisionError
    monkeypatch.setattr(script, "warm_up", warm_up)
    result = fair_play.run_check(warm_up_leaks_nothing, script)
    assert result.verdict == "FAIL" and result.raised and "ZeroDivisionError" in result.reason


def test_a_track_of_ones_own_is_allowed_but_the_public_ones_must_be_there(script, monkeypatch):
    check = validation_is_the_tracks
    own = dataclasses.replace(script.TRACKS["laptop"], target=0.0)

    def as_laptop(arguments):
        argv = arguments["argv"]
        arguments["argv"] = ["--track=laptop" if flag == "--track=mine" else flag for flag in argv]

    change_arguments(monkeypatch, script, "parse_arguments", as_laptop)
    monkeypatch.setitem(script.TRACKS, "mine", own)
    monkeypatch.setitem(fair_play.reference.TRACKS, "another", own)
    assert fair_play.run_check(check, script).verdict == "pass"
    monkeypatch.delitem(script.TRACKS, "fineweb")
    (result,) = fair_play.run_checks(script)
    assert result.verdict == "FAIL" and "fineweb" in result.reason


def test_the_exit_code_and_the_lines_follow_the_results(monkeypatch, capsys, script):
    monkeypatch.setattr(fair_play, "load", lambda path: script)
    for verdicts, code in ((("pass", "none"), 0), (("pass", "FAIL"), 1)):
        results = [fair_play.Result(no_later_token, verdict, "why") for verdict in verdicts]
        monkeypatch.setattr(fair_play, "run_checks", lambda module, found=results: found)
        assert fair_play.main([SCRIPT]) == code
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == list(verdicts)
