"""tests/fair_play.py passes the script as it is, and finds each sort of cheating."""
import subprocess
import sys

import fair_play
import pytest
from conftest import REPOSITORY

from train_gpt import run_as_program

CHEATS = {
    "sees the next token": ("& (key <= query)", "& (key <= query + 1)", "No logit depends on later tokens"),
    "sees other documents": ("begins = tokens == eot_token", "begins = tokens == -1", "another document"),
    "reports less": ("return (logsumexp - ", "return 0.99 * (logsumexp - ", "The reported loss"),
    "drops hard tokens": ("targets[:, None])).mean()", "targets[:, None])).flatten().sort().values[:-9].mean()",
                          "The reported loss"),
    "looks at the target": ("logits = self.linear(norm(x))",
                            "logits = self.linear(norm(x)) + (0 if targets is None else F.one_hot(targets, 384))",
                            "The reported loss"),
    "easier target": ("257, 256, True, 1.10,", "257, 256, True, 1.30,", "Every validation"),
    "fewer validation tokens": ("262_144", "131_072", "Every validation"),
    "skips half of the validation": ("for index in range(runtime.rank, num_sequences, runtime.world_size)",
                                     "for index in range(runtime.rank, num_sequences // 2, runtime.world_size)",
                                     "Every validation"),
    "validation reports less": ("runtime.mean(loss_sum) * runtime.world_size / num_sequences",
                                "runtime.mean(loss_sum) * runtime.world_size / num_sequences - 0.01",
                                "Every validation"),
    "n-grams of other documents": ("torch.where(position_in_document >= back, tokens.roll(back) + 1, 0)",
                                   "tokens.roll(back) + 1",
                                   "another document"),
    "n-grams of later tokens": ("tokens.roll(back) + 1", "tokens.roll(-1) + 1", "No logit depends on later tokens"),
    "keeps the warm-up": ("p.copy_(value)", "p.copy_(value + 0.01 * p)", "warm-up"),
    "keeps the warm-up's momentum": ("    optimizer.load_state_dict(None)\n", "", "warm-up"),
}


def test_the_script_is_fair():
    done = subprocess.run([sys.executable, "-m", "tests.fair_play", "train_gpt.py"], cwd=REPOSITORY, text=True,
                          capture_output=True)
    assert done.returncode == 0 and done.stdout.count("pass") == 5, done.stdout + done.stderr


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_are_found(tmp_path, capsys, name):
    honest, cheat, found = CHEATS[name]
    source = (REPOSITORY / "train_gpt.py").read_text()
    assert source.count(honest) == 1
    (tmp_path / "cheat.py").write_text(source.replace(honest, cheat))
    assert fair_play.check(str(tmp_path / "cheat.py")) == 1
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("FAIL") and found in line], out


def test_what_is_no_script_is_one_line(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def (")
    for path in ("bad.py", "none.py"):
        assert run_as_program(fair_play.check, str(tmp_path / path)) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and path in errors
