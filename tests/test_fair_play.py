"""tests/fair_play.py passes the script as it is, and finds each sort of cheating."""
import subprocess
import sys

import fair_play
import pytest
from conftest import REPOSITORY

from train_gpt import run_as_program

LATER = "No logit depends on later tokens"
DOCUMENT = "another document"
LOSS = "The reported loss"
TARGETS = "Training on several next tokens"
TRACK = "Every validation"
WARM_UP = "warm-up"
IN_PIECES = "weights, length = torch.ones_like(weights[:1]), self.hp.sequence_length"
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
    "drops hard tokens": ([("losses = losses.sum(0)", "losses = losses.sort(0).values[:-9].sum(0)")], LOSS),
    "looks at the target": ([("logits = self.linear(norm(x))",
                              "logits = self.linear(norm(x)) + (F.one_hot(rest[0][:, 0], 384) if rest else 0)")], LOSS),
    "looks at the target after the next": ([
        ("self.stem(F.embedding(tokens, table)", "self.stem((F.embedding(tokens, table) + (0 if targets is None else "
         "F.embedding(next_targets(targets, 2)[:, 1].clamp(min=0), table)))")], LOSS),
    "trains on logits that saw the targets": ([
        ("logits = self.linear(norm(x))", "logits = self.linear(norm(x)) + (F.one_hot(rest[0][:, 1].clamp(min=0), 384)"
         " if rest and len(rest[1]) > 1 else 0)")], TARGETS),
    "validates on the easier of several targets": ([
        (IN_PIECES, "length = self.hp.sequence_length"), ("losses = losses.sum(0)", "easier = losses.amin(-1).sum()\n"
         "        losses = losses.sum(0)"), ("first := losses[0].clone()", "first := easier.clone()")], TRACK),
    "validates with the weights of the stage": ([
        (IN_PIECES, "weights, length = weights / weights.sum(), self.hp.sequence_length"),
        ("first := losses[0].clone()", "first := (losses * weights).sum()")], TRACK),
    "counts the next token by its weight": ([("first := losses[0].clone()", "first := losses[0] * weights[0]")],
                                            TARGETS),
    "easier target": ([("257, 256, True, 1.10,", "257, 256, True, 1.30,")], TRACK),
    "fewer validation tokens": ([("\n                    262_144, 257", "\n                    131_072, 257")], TRACK),
    "skips half of the validation": ([("for index in range(runtime.rank, num_sequences, runtime.world_size)",
                                       "for index in range(runtime.rank, num_sequences // 2, runtime.world_size)")],
                                     TRACK),
    "validation reports less": ([("runtime.mean(loss_sum) * runtime.world_size / num_sequences",
                                  "runtime.mean(loss_sum) * runtime.world_size / num_sequences - 0.01")], TRACK),
    "keeps the warm-up": ([("p.copy_(value)", "p.copy_(value + 0.01 * p)")], WARM_UP),
    "keeps the warm-up's momentum": ([("    optimizer.load_state_dict(None)\n", "    optimizer.num_updates = 0\n")],
                                     WARM_UP),
    "keeps the warm-up's count": ([("    optimizer.load_state_dict(None)\n",
                                    "    optimizer.load_state_dict(None)\n    optimizer.num_updates = 8\n")], WARM_UP),
}


def test_the_script_is_fair():
    done = subprocess.run([sys.executable, "-m", "tests.fair_play", "train_gpt.py"], cwd=REPOSITORY, text=True,
                          capture_output=True)
    assert done.returncode == 0 and done.stdout.count("pass") == len(fair_play.CHECKS) == 6, done.stdout + done.stderr


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_are_found(tmp_path, capsys, name):
    edits, found = CHEATS[name]
    source = (REPOSITORY / "train_gpt.py").read_text()
    for honest, cheat in edits:
        assert source.count(honest) == 1, honest
        source = source.replace(honest, cheat)
    (tmp_path / "cheat.py").write_text(source)
    checks = [check for check in fair_play.CHECKS if found in check.__doc__]
    assert fair_play.check(str(tmp_path / "cheat.py"), checks) == 1
    out = capsys.readouterr().out
    assert out.startswith("FAIL") and found in out and "could not be tried" not in out, out


def test_what_is_no_script_is_one_line(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def (")
    for path in ("bad.py", "none.py"):
        assert run_as_program(fair_play.check, str(tmp_path / path)) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and path in errors
