"""The pages' commands: each script, module and flag that they show exists; their links lead somewhere.

Lines and columns are limited: a page that is longer is not read.
"""
import functools
import re
import shlex
import subprocess
import sys

import pytest
from conftest import REPOSITORY

import launch
from tests.simulate import __main__ as simulate
from train_gpt import parse_arguments

FOLDERS = ("tests", "tests/simulate", "data")
PAGES = [REPOSITORY / "README.md", *(REPOSITORY / folder / "README.md" for folder in FOLDERS),
         *sorted((REPOSITORY / "docs").glob("*.md")), *sorted((REPOSITORY / "records/studies").glob("*/README.md"))]
README = PAGES[0].read_text()
STARTS_TRAINING = r"(?:train_gpt\.py|\./run\.sh|my_idea\.py)(?: |$)"
TOOLS = r"python (-m (data|tests)\.|tests/benchmark|records/compare)"
# Their files are checked; they have no flags.
OTHERS = r"cp |diff |#SBATCH |\./run.sh test|bash tests/gpu.sh CORPUS$|source |python records/studies/\S+/study\.py \w+$"


def commands(page):
    """The commands in the page's code, without their comments; `A && B` are two."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text().replace("\\\n", " "), re.S | re.M)
    lines = [re.split(r"\s#", line)[0] for block in blocks for line in block.splitlines()]
    return [command.strip() for line in lines for command in line.split("&&") if command.strip()]


COMMANDS = [command for page in PAGES for command in commands(page)]
SET_ASIDE = [c for c in COMMANDS if re.match(OTHERS, c)]
SIMULATIONS = [c for c in COMMANDS if c.startswith("./run.sh simulate")]
TOOL_CALLS = [c for c in COMMANDS if c not in SET_ASIDE and re.search(TOOLS, c)]
TRAINING = [c for c in COMMANDS if c not in SET_ASIDE + SIMULATIONS + TOOL_CALLS and re.search(STARTS_TRAINING, c)]


def test_readme_opens_with_the_two_commands():
    assert commands(PAGES[0])[:2] == ["./run.sh", "./run.sh test"]


def test_every_command_is_checked_by_one_of_these_tests():
    assert len(TRAINING) >= 10 and len(TOOL_CALLS) >= 10
    assert set(COMMANDS) == {*TRAINING, *SIMULATIONS, *TOOL_CALLS, *SET_ASIDE}


@pytest.mark.parametrize("command", sorted(set(TRAINING)))
def test_training_flags_exist(command):
    words = shlex.split(re.split(STARTS_TRAINING, command)[-1].replace("--track mine", "--track laptop"))
    if "--help" in words:
        return
    script = "train_gpt.py"
    if "--record" in words:
        script = f"records/{words.pop(words.index('--record') + 1)}/train_gpt.py"
        words.remove("--record")
    module = launch.load(script)
    try:
        module.parse_arguments(words)
    except module.UserError as error:
        pytest.fail(f"{command}: {error}")


@pytest.mark.parametrize("command", sorted(set(SIMULATIONS)))
def test_simulations_flags_exist(command):
    words = shlex.split(command.replace("my_idea.py", "train_gpt.py"))[2:]
    parse_arguments(["--track=fineweb", *simulate.parse(words)[1]])


@functools.cache
def help_of(*script):
    done = subprocess.run([sys.executable, *script, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", sorted(set(TOOL_CALLS)))
def test_tools_exist_and_know_their_flags(command):
    words = shlex.split(command)
    words = words[:words.index("--")] if "--" in words else words
    script = words[1:3] if words[1] == "-m" or "compare" in words[1] else words[1:2]
    known = help_of(*script)
    for word in words:
        assert not word.startswith("--") or word in known, word


@pytest.mark.parametrize("command", sorted(set(SET_ASIDE)))
def test_the_files_of_other_commands_exist(command):
    for word in shlex.split(command, comments=True):
        assert "/" not in word or (REPOSITORY / word).exists(), word


def test_the_tests_they_name_exist():
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)(?:\.py)?`", page.read_text())}
    sources = {path.stem: path.read_text() for path in (REPOSITORY / "tests").glob("*.py")}
    assert len(named) >= 10
    for name in named:
        assert name in sources or any(f"def {name}(" in source for source in sources.values()), name


def test_the_places_in_the_script_exist():
    """The last column of the README's table of techniques names definitions of train_gpt.py."""
    table = README[README.index("| in `train_gpt.py` |"):].partition("\n\n")[0]
    places = [place for row in table.splitlines() for place in re.findall(r"`(\w+)`", row.split("|")[-2])]
    source = (REPOSITORY / "train_gpt.py").read_text()
    assert len(places) >= 15
    for place in places:
        assert re.search(rf"^( *(class|def) {place}\b|{place} = )", source, re.M), place


def test_links_lead_somewhere():
    pages = {*PAGES, *(REPOSITORY / "records").glob("*/README.md")}
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+)[)#]", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"


@pytest.mark.parametrize("name, lines", [("README.md", 150), ("run.sh", 90)])
def test_what_is_read_first_stays_short(name, lines):
    assert len((REPOSITORY / name).read_text().splitlines()) <= lines


@pytest.mark.parametrize("name", ["run.sh", "launch.py"])
def test_columns_of_what_starts_a_run(name):
    for line in (REPOSITORY / name).read_text().splitlines():
        assert len(line) <= 100, line


@pytest.mark.parametrize("name", ["README.md", "tests/README.md", "data/README.md", "docs/nodes.md"])
def test_lines_are_not_stuffed(name):
    for line in (REPOSITORY / name).read_text().splitlines():  # a row of a table can't be broken
        assert len(line) <= 120 or line.startswith("|"), line
