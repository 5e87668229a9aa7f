"""tools/fair_play.py passes the script as it is, and finds each sort of cheating."""
import subprocess
import sys

from tools import fair_play
import pytest
from conftest import REPOSITORY

from train_gpt import run_as_program

LATER = "No logit depends on later tokens"
DOCUMENT = "another document"
LOSS = "The reported loss"
TARGETS = "Training on several next tokens"
TRACK = "Every validation"
WARM_UP = "warm-up"
IN_PIECES = "weights = weights if torch.is_grad_enabled() else torch.ones_like(weights[:1])"
CHEATS = {  # name: (honest, cheat) for each place that is edited; the check that finds it
    "sees the next token": ([("& (key <= query)", "& (key <= query + 1)")], LATER),
    "sees other documents": ([("begins = tokens == eot_token", "begins = tokens == -1")], DOCUMENT),
    "smears other documents": ([("before = torch.where(begins[:, None], 0, embed.roll(1, 0))",
                                 "before = embed.roll(1, 0)")], DOCUMENT),
    "smears the next token": ([("before = torch.where(begins[:, None], 0, embed.roll(1, 0))",
                                "before = embed.roll(-1, 0)")], LATER),
    "keys of other documents": ([("before = torch.where(begins[:, None, None], k, k.roll(1, 0))",
                                  "before = k.roll(1, 0)")], DOCUMENT),
    "keys of the next token": ([("before = torch.where(begins[:, None, None], k, k.roll(1, 0))",
                                 "before = k.roll(-1, 0)")], LATER),
    "pairs see the text before their document": ([("2: (2 * start).repeat_interleave(2)}",
                                                   "2: start.repeat_interleave(2)}")], DOCUMENT),
    "n-grams of other documents": ([("torch.where(position_in_document >= back, code % last, last)", "code % last")],
                                   DOCUMENT),
    "n-grams of later tokens": ([("tokens.roll(back)", "tokens.roll(-back)")], LATER),
    "reports less": ([("first := losses[0].clone()", "first := 0.99 * losses[0]")], LOSS),
    "drops hard tokens": ([("(targets >= 0)).sum(0)", "(targets >= 0)).sort(0).values[:-9].sum(0)")], LOSS),
    "looks at the target": ([("= softcap(F.linear(x, weight), *cap), cap",
                              "= softcap(F.linear(x, weight) + F.one_hot(targets[:, 0].clamp(min=0), len(weight)), *cap), cap")],
                            LOSS),
    "looks at the target after the next": ([
        ("self.stem(F.embedding(tokens, table), ", "self.stem(F.embedding(tokens, table) + (0 if targets is None else "
         "F.embedding(next_targets(targets, 2)[:, 1].clamp(min=0), table)), ")], LOSS),
    "trains on logits that saw the targets": ([
        ("= softcap(F.linear(x, weight), *cap), cap", "= softcap(F.linear(x, weight) + (0 if len(weights) == 1 "
         "else F.one_hot(targets[:, 1].clamp(min=0), len(weight))), *cap), cap")], TARGETS),
    "validates on the easier of several targets": ([
        (IN_PIECES, "pass"), ("(targets >= 0)).sum(0)", "(targets >= 0))\n        "
         "easier, losses = losses.amin(-1).sum(), losses.sum(0)"), ("first := losses[0].clone()", "first := easier.clone()")],
        TRACK),
    "validates with the weights of the stage": ([
        (IN_PIECES, "weights = weights if torch.is_grad_enabled() else weights / weights.sum()"),
        ("first := losses[0].clone()", "first := (losses * weights).sum()")], TRACK),
    "validates over some words": ([("words = schedule.words if torch.is_grad_enabled() else 0", "words = schedule.words")],
                                  LOSS),
    "counts the next token by its weight": ([("first := losses[0].clone()", "first := losses[0] * weights[0]")],
                                            TARGETS),
    "easier target": ([("257, 256, True, 1.10,", "257, 256, True, 1.30,")], TRACK),
    "fewer validation tokens": ([("\n                    262_144, 257", "\n                    131_072, 257")], TRACK),
    "skips half of the validation": ([("for index in range(runtime.rank, num_sequences, runtime.world_size)",
                                       "for index in range(runtime.rank, num_sequences // 2, runtime.world_size)")],
                                     TRACK),
    "validation reports less": ([("runtime.mean(loss_sum) * runtime.world_size / num_sequences",
                                  "runtime.mean(loss_sum) * runtime.world_size / num_sequences - 0.01")], TRACK),
    "keeps the warm-up": ([("model.load_state_dict(before)", "model.load_state_dict({name: 1.01 * value for name, "
                            "value in before.items()})")], WARM_UP),
    "keeps the warm-up's momentum": ([("    optimizer.load_state_dict(None)\n", "    optimizer.num_updates = 0\n")],
                                     WARM_UP),
    "keeps the warm-up's count": ([("    optimizer.load_state_dict(None)\n",
                                    "    optimizer.load_state_dict(None)\n    optimizer.num_updates = 8\n")], WARM_UP),
}


VALUE, ADAMW = "2024-12-04_ValueEmbed", "2024-06-06_AdamW"
OLDER_CHEATS = {  # name: entry, honest, cheat, the check that finds it
    "sees the next token": (VALUE, "& (key <= query)", "& (key <= query + 1)", LATER),
    "sees other documents": (VALUE, "begins = tokens == eot_token", "begins = tokens == -1", DOCUMENT),
    "reports less": (VALUE, "return F.cross_entropy(", "return 0.99 * F.cross_entropy(", LOSS),
    "drops half of the tokens": (VALUE, "F.cross_entropy(logits.flatten(0, 1), targets.flatten())",
                                 "F.cross_entropy(logits.flatten(0, 1)[::2], targets.flatten()[::2])", LOSS),
    "looks at the target": (VALUE, "logits = self.logit_cap *",
                            "logits = F.one_hot(targets, 384) + self.logit_cap *", LOSS),
    "shows other logits than it uses": (
        VALUE, "return F.cross_entropy(logits.flatten(0, 1), targets.flatten())",
        "return (F.cross_entropy(logits.flatten(0, 1), targets.flatten()) * 0 + "
        "nn.CrossEntropyLoss()(2 * logits.flatten(0, 1), targets.flatten()))", LOSS),
    "skips half of the validation": (VALUE, "for index in range(runtime.rank, num_pieces, runtime.world_size)",
                                     "for index in range(runtime.rank, num_pieces // 2, runtime.world_size)", TRACK),
    "validation reports less": (VALUE, "runtime.world_size / num_pieces", "runtime.world_size / num_pieces - 0.01",
                                TRACK),
    "attends to all": (ADAMW, "is_causal=True", "is_causal=False", LATER),
    "keeps the warm-up": ("2026-11-22_NGramEmbed", "p.copy_(value)", "p.copy_(value + 0.01 * p)", WARM_UP),
}
PASSES = {ADAMW: 3, "2024-10-14_ModernArch": 3, "2024-11-03_UntieEmbed": 3, VALUE: 4, "2026-11-22_NGramEmbed": 5,
          "2026-11-25_Stages": 6, "2026-11-28_FusedLoss": 6}  # the other checks: none
OWN_TRACK = """TRACKS = {
    'mine': Track('data/mine/mine_train_*.bin',
        'data/mine/mine_val_*.bin',
        65_536, 257, 256, True, 0.0,  # the target
        'python -m data.text book.txt --name mine --encoding bytes'),
"""


def edited(folder, *edits, script="train_gpt.py"):
    """A copy of a script in a folder with (old, new) for each place that is edited; its path."""
    source = (REPOSITORY / script).read_text()
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (folder / "idea.py").write_text(source)
    return str(folder / "idea.py")


def assert_found(path, found, capsys):
    """The check fails, and not for it could not be tried."""
    assert fair_play.check(path, [check for check in fair_play.CHECKS if found in check.__doc__]) == 1
    out = capsys.readouterr().out
    assert out.startswith("FAIL") and found in out and "could not be tried" not in out, out


def test_the_script_is_fair():
    done = subprocess.run([sys.executable, "-m", "tools.fair_play", "train_gpt.py"], cwd=REPOSITORY, text=True,
                          capture_output=True)
    assert done.returncode == 0 and done.stdout.count("pass") == len(fair_play.CHECKS) == 6, done.stdout + done.stderr


@pytest.mark.parametrize("entry", PASSES)
def test_the_entries_are_fair(entry, capsys):
    assert fair_play.check(str(REPOSITORY / "records" / entry / "train_gpt.py")) == 0
    words = [line[:6] for line in capsys.readouterr().out.splitlines()]
    assert words.count("pass  ") == PASSES[entry] and words.count("none  ") == 6 - PASSES[entry]


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_are_found(tmp_path, capsys, name):
    edits, found = CHEATS[name]
    assert_found(edited(tmp_path, *edits), found, capsys)


@pytest.mark.parametrize("name", OLDER_CHEATS)
def test_cheats_in_older_entries_are_found(tmp_path, capsys, name):
    entry, honest, cheat, found = OLDER_CHEATS[name]
    assert_found(edited(tmp_path, (honest, cheat), script=f"records/{entry}/train_gpt.py"), found, capsys)


@pytest.mark.parametrize(("old", "new", "error"), [
    ("def norm(x: Tensor) -> Tensor:", "def norm(x: Tensor) -> Tensor", "SyntaxError"),
    ("GATE_DIMS = 12 ", "GATE_DIMS = 12 / 0 ", "ZeroDivisionError"),
    ("GATE_DIMS = 12 ", "sys.exit(3) ", "SystemExit"),
    ("model = GPT(hp, flex, sparse)", "model = GPT(hp, flex, sparse, 1)", "TypeError"),
    ("return norm(embed + smear * before)", "return norm(embed + smear @ before)", "RuntimeError"),
    ("ctx.mark_non_differentiable(first := losses[0].clone())", "first = losses[0].item.clone()", "AttributeError"),
])
def test_what_does_not_start_is_one_line_with_file_and_line(tmp_path, capsys, old, new, error):
    path = edited(tmp_path, (old, new))
    line = (tmp_path / "idea.py").read_text().partition(new)[0].count("\n") + 1
    assert run_as_program(fair_play.check, path) == 2
    out, errors = capsys.readouterr()
    assert errors.startswith(f"error: can't start {path}: {error} at {path}:{line}: ") and errors.count("\n") == 1
    assert not out


def test_a_check_that_can_not_be_tried_fails_alone(tmp_path, capsys):
    path = edited(tmp_path, ("    optimizer.load_state_dict(None)\n", "    optimizer.load_state_dict(1, 2)\n"))
    line = (tmp_path / "idea.py").read_text().partition("optimizer.load_state_dict(1, 2)")[0].count("\n") + 1
    assert fair_play.check(path) == 1
    *others, last = capsys.readouterr().out.splitlines()
    assert [other[:6] for other in others] == ["pass  "] * 5
    assert last.startswith("FAIL") and f"could not be tried (fineweb): TypeError at {path}:{line}: " in last


def test_tracks_of_ones_own(tmp_path, capsys, monkeypatch):
    """Those that only the script, or only train_gpt.py has, are not compared; the public ones must be there."""
    monkeypatch.setitem(fair_play.reference.TRACKS, "another", fair_play.reference.TRACKS["laptop"])
    assert fair_play.check(edited(tmp_path, ("TRACKS = {\n", OWN_TRACK))) == 0
    capsys.readouterr()
    assert fair_play.check(edited(tmp_path, ('"fineweb": Track(', '"mine": Track('))) == 1
    out = capsys.readouterr().out
    assert out.startswith("FAIL") and out.endswith("it has no track fineweb\n") and out.count("\n") == 1


def test_what_is_no_script_is_one_line(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("answer = 42")
    for path, said in (("bad.py", "has no attribute 'TRACKS'"), ("none.py", "FileNotFoundError: ")):
        assert run_as_program(fair_play.check, str(tmp_path / path)) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and path in errors and said in errors
