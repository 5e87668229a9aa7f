"""The pages: links lead somewhere, and the flags and files that commands name exist."""
import re
import shlex
from pathlib import Path

import pytest

import train_gpt

ROOT = Path(__file__).resolve().parents[2]
PAGES = [page for page in sorted(ROOT.rglob("*.md"))
         if not {".venv", ".venv.cuda", ".cache", "scratch"} & set(page.parts)]


def commands_of(page: Path) -> list[list[str]]:
    """The words of each command line in the page's code blocks."""
    commands = []
    for block in re.findall(r"^```(?:bash|sh)?\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # not a command
                continue
            if words:
                commands.append(words)
    return commands


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"https?:|mailto:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_flags_of_train_gpt_exist(page):
    """What follows `./run.sh` or `train_gpt.py` are flags of today's script or run.sh's own words.
    Commands of frozen entries (--record) have the flags of their scripts."""
    flags = {f"--{name}" for name in train_gpt.Hyperparameters.__dataclass_fields__} | {"--help"}
    tools = {"test", "compare", "fair_play", "simulate", "sample", "export"}
    for words in commands_of(page):
        starts = [i for i, word in enumerate(words) if word in ("./run.sh", "train_gpt.py")]
        if not starts or "--record" in words or (ROOT / "records" in page.parents):
            continue
        arguments = words[starts[0] + 1:]
        if words[starts[0]] == "./run.sh" and arguments and arguments[0] in tools:
            continue
        if "tools.compare" in words or "tools.simulate" in words:
            continue
        named = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert named <= flags, words


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_files_and_modules_exist(page):
    if ROOT / "records" in page.parents:  # an entry tells what was run then
        return
    for words in commands_of(page):
        for before, word in zip([""] + words, words, strict=False):
            if before == "-m" and word.split(".")[0] in ("data", "tools", "tests"):
                path = ROOT / word.replace(".", "/")
                assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), word
            if word.endswith(".py") and before in ("python", "python3"):
                mine = {"my_idea.py", "theirs.py"}
                assert word in mine or (ROOT / word).exists(), word


def test_techniques_are_where_the_page_says():
    """Each name in the last column of docs/techniques.md exists in the file."""
    page = (ROOT / "docs/techniques.md").read_text()
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| **")]
    named = {name for row in rows if len(row) == 4 for name in re.findall(r"`([\w.]+)`", row[-1])}
    words = set(re.findall(r"\w+", Path(train_gpt.__file__).read_text()))
    assert len(named) > 30
    assert {word for name in named for word in name.split(".")} <= words
