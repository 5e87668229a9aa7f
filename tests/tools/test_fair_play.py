"""tools/fair_play.py passes honest scripts and finds cheats.

A cheat is a function or setting of a loaded script that the test replaces.
"""
import dataclasses
import functools
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
    """Replace owner.name by a function that gets the original one as its first argument."""
    original = getattr(owner, name)

    @functools.wraps(original)  # the checks look at signatures
    def replacement(*args, **more):
        return wrapper(original, *args, **more)

    monkeypatch.setattr(owner, name, replacement)


def sees_the_next_token(module, monkeypatch):
    monkeypatch.setattr(module, "visible", lambda query, key, first_key:
                        (first_key <= key) & (key <= query + 1))


def sees_other_documents(module, monkeypatch):
    wrap(monkeypatch, module, "document_start", lambda original, tokens, eot: original(tokens, -1))


def smears_the_next_token(module, monkeypatch):
    def forward(original, self, embed, *rest):
        return original(self, embed + 0.1 * embed.roll(-1, 0), *rest)
    wrap(monkeypatch, module.InputEmbedding, "forward", forward)


def smears_other_documents(module, monkeypatch):
    def forward(original, self, embed, is_doc_start, dtype):
        return original(self, embed, torch.zeros_like(is_doc_start), dtype)
    wrap(monkeypatch, module.InputEmbedding, "forward", forward)


def takes_keys_of_other_documents(module, monkeypatch):
    def forward(original, self, x, value_embed, is_doc_start, *rest):
        return original(self, x, value_embed, torch.zeros_like(is_doc_start), *rest)
    wrap(monkeypatch, module.Attention, "forward", forward)


def pairs_see_the_document_before(module, monkeypatch):
    def masks(original, self, start, schedule):
        found = original(self, start, schedule)
        if "paired" in found:
            first = start.repeat_interleave(2)  # honest: twice that, as positions are doubled
            window = schedule.windows["paired"]
            found["paired"] = module.first_visible_key(first, window)
        return found
    wrap(monkeypatch, module.GPT, "masks", masks)


def ngrams_of_other_documents(module, monkeypatch):
    def forward(original, self, tokens, position):
        return original(self, tokens, torch.full_like(position, 99))
    wrap(monkeypatch, module.NGramEmbed, "forward", forward)


def ngrams_of_later_tokens(module, monkeypatch):
    def forward(original, self, tokens, position):
        return original(self, tokens.roll(-1), position)
    wrap(monkeypatch, module.NGramEmbed, "forward", forward)


def reports_less(module, monkeypatch):
    def forward(original, self, x, sources, class_ids=None, targets=None, weights=None):
        result = original(self, x, sources, class_ids, targets, weights)
        return result if targets is None else (result[0], 0.99 * result[1])
    wrap(monkeypatch, module.Head, "forward", forward)


def drops_tokens(module, monkeypatch):
    def next_targets(original, targets, K):
        found = original(targets, K)
        return torch.cat([torch.full_like(found[:9], -1), found[9:]])
    wrap(monkeypatch, module, "next_targets", next_targets)


def looks_at_the_target(module, monkeypatch):
    def forward(original, self, x, sources, class_ids=None, targets=None, weights=None):
        if targets is not None:
            next_token = targets[:, 0].clamp(min=0)
            x = x + self.linear.matrix()[next_token]
        return original(self, x, sources, class_ids, targets, weights)
    wrap(monkeypatch, module.Head, "forward", forward)


def training_looks_at_a_later_target(module, monkeypatch):
    def forward(original, self, x, sources, class_ids=None, targets=None, weights=None):
        if weights is not None and len(weights) > 1:
            second_next = targets[:, 1].clamp(min=0)
            x = x + self.linear.matrix()[second_next]
        return original(self, x, sources, class_ids, targets, weights)
    wrap(monkeypatch, module.Head, "forward", forward)


def weighs_the_next_token(module, monkeypatch):
    def forward(original, self, x, sources, class_ids=None, targets=None, weights=None):
        result = original(self, x, sources, class_ids, targets, weights)
        return result if targets is None else (result[0], result[1] * weights[0])
    wrap(monkeypatch, module.Head, "forward", forward)


def validates_with_a_sampled_softmax(module, monkeypatch):
    def forward(original, self, tokens, targets, schedule):
        with torch.enable_grad():  # honest: no gradient, hence the full softmax
            return original(self, tokens, targets, schedule)
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
    wrap(monkeypatch, module, "validate", lambda original, *args: original(*args) - 0.01)


def keeps_the_warm_up(module, monkeypatch):
    def warm_up(original, model, *rest):
        original(model, *rest)
        weight = next(model.parameters())
        weight.data *= 1.01
    wrap(monkeypatch, module, "warm_up", warm_up)


def keeps_the_momentum_of_the_warm_up(module, monkeypatch):
    def load_state_dict(self, state):
        self.num_updates = 0
    monkeypatch.setattr(module.Optimizer, "load_state_dict", load_state_dict)


def keeps_the_count_of_the_warm_up(module, monkeypatch):
    def load_state_dict(original, self, state):
        original(self, state)
        self.num_updates = 8
    wrap(monkeypatch, module.Optimizer, "load_state_dict", load_state_dict)


CHEATS = {  # the check that finds it; one of each check runs by default
    sees_the_next_token: no_later_token,
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
    wrap(monkeypatch, module.GPT, "forward", lambda original, *args: 0.99 * original(*args))


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


def test_a_check_that_raises_fails(script, monkeypatch):
    def warm_up(*args):
        raise ZeroDivisionError
    monkeypatch.setattr(script, "warm_up", warm_up)
    result = fair_play.run_check(warm_up_leaks_nothing, script)
    assert result.verdict == "FAIL" and result.raised and "ZeroDivisionError" in result.reason


def test_a_track_of_ones_own_is_allowed_but_the_public_ones_must_be_there(script, monkeypatch):
    check = validation_is_the_tracks
    own = dataclasses.replace(script.TRACKS["laptop"], target=0.0)
    wrap(monkeypatch, script, "parse_arguments", lambda original, argv: original(
        ["--track=laptop" if flag == "--track=mine" else flag for flag in argv]))
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
