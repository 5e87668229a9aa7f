"""The README's commands: each script, module and flag that it shows exists, and its figures have their logs."""
import re
import shlex
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from train_gpt import UserError, parse_arguments

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.S | re.M)
COMMANDS = [re.split(r"\s#", line)[0].strip() for block in BLOCKS for line in block.splitlines()]
TRAINING = [c for c in COMMANDS if re.search(r"(train_gpt\.py|\./run\.sh|my_idea\.py)( |$)", c)
            and not re.match(r"cp |diff |python records/|\./run.sh test", c)]
MODULES = [c for c in COMMANDS if re.search(r"python (-m data\.|tests/benchmark|records/compare)", c)]


def test_readme_opens_with_the_two_commands():
    assert COMMANDS[:2] == ["./run.sh", "./run.sh test"] and len(TRAINING) >= 5 and len(MODULES) >= 4


@pytest.mark.parametrize("command", TRAINING)
def test_training_flags_exist(command):
    flags = re.split(r"(?:train_gpt\.py|\./run\.sh|my_idea\.py)", command)[-1]
    words = [word for word in shlex.split(flags) if word != "..."]
    if "--help" in words:
        return
    if "--record" in words:
        entry = words.pop(words.index("--record") + 1)
        words.remove("--record")
        assert (REPOSITORY / "records" / entry / "train_gpt.py").exists()
    try:
        parse_arguments(words)
    except UserError as error:
        pytest.fail(f"{command}: {error}")


@pytest.mark.parametrize("command", MODULES)
def test_tools_exist_and_know_their_flags(command):
    words = shlex.split(command)
    words = words[:words.index("--")] if "--" in words else words
    script = words[1:3] if words[1] == "-m" or "compare" in words[1] else words[1:2]
    done = subprocess.run([sys.executable, *script, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0
    for word in words:
        assert not word.startswith("--") or word in done.stdout, word


def test_the_tests_it_names_exist():
    named = set(re.findall(r"`(test_\w+)(?:\.py)?`", README))
    sources = {path.stem: path.read_text() for path in (REPOSITORY / "tests").glob("*.py")}
    assert len(named) >= 10
    for name in named:
        assert name in sources or any(f"def {name}(" in source for source in sources.values()), name


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPOSITORY / link).exists(), link
