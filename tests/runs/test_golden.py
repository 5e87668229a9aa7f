"""Golden losses: a change that is not meant to change the numbers does not change them.

The runs use all of the laptop track's tables and all of the full recipe's, the latter on one rank
and on two. tests/golden_losses.txt holds their validation losses.
"""
import math
import os
import re
from pathlib import Path

import pytest
from run_helpers import finish

GOLDEN = Path(__file__).resolve().parents[1] / "golden_losses.txt"  # lines: run, step, val_loss
RENEW = "RENEW_GOLDEN=1 ./run.sh test tests/runs/test_golden.py"
TOLERANCE = 3e-3  # kernels of other CPUs round differently


def val_losses(text: str) -> dict[int, float]:
    """The validation loss by step, from a log or a console."""
    found = re.findall(r"^step:(\d+)/\d+ val_loss:(\S+)", text, re.MULTILINE)
    return {int(step): float(loss) for step, loss in found}


def untrained_loss(text: str) -> float:
    """The training loss of the first step, before any update."""
    return float(re.search(r"^step:1/\d+ train_loss:(\S+)", text, re.MULTILINE)[1])


def read_golden() -> dict[str, dict[int, float]]:
    """The golden losses: run -> step -> loss."""
    golden = {}
    for line in GOLDEN.read_text().splitlines():
        run, step, loss = line.split()
        golden.setdefault(run, {})[int(step)] = float(loss)
    return golden


def renew_golden(run: str, losses: dict[int, float]) -> None:
    """Replace the lines of one run."""
    golden = read_golden()
    golden[run] = losses
    lines = []
    for name in sorted(golden):
        for step, loss in golden[name].items():
            lines.append(f"{name} {step} {loss:.4f}\n")
    GOLDEN.write_text("".join(lines))


def assert_golden(run: str, text: str) -> None:
    """The validation losses in the text are the golden ones."""
    losses = val_losses(text)
    golden = read_golden()[run]
    how_to_renew = (f"the losses of {run} are {losses}, the golden ones {golden}; if the change "
                    f"was meant, renew them with `{RENEW}`, and say why in the commit")
    assert losses.keys() == golden.keys(), how_to_renew
    assert losses == pytest.approx(golden, abs=TOLERANCE), how_to_renew


@pytest.mark.parametrize("run, fixture, flags, classes", [
    ("laptop", "home", ["--num_steps=16", "--val_every=4"], 384),
    ("recipe", "recipe_home", [], 106)])  # 106: entries in the sampled softmax of the first stage
def test_losses_are_golden(request, run, fixture, flags, classes):
    done = request.getfixturevalue(fixture).run(*flags)
    assert done.code == 0, done.err
    if os.environ.get("RENEW_GOLDEN"):
        renew_golden(run, val_losses(done.out))
    assert_golden(run, done.out)
    # An untrained pointer can only help: a little, by tokens that the document has already.
    gain = math.log(classes) - untrained_loss(done.out)
    assert -5e-3 < gain < (0.1 if run == "recipe" else 5e-3)


def test_losses_on_two_ranks_are_golden(recipe_home):
    process = recipe_home.start(ranks=2)
    out, err = finish(process)
    assert process.returncode == 0, err
    assert_golden("recipe", out)
