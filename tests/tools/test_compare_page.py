"""The page that `compare.py report` writes, opened and clicked through in a headless Chromium."""
import fcntl
import json
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import REPOSITORY
from test_compare import FORMS, GOOD, LAYOUTS, NEW_TIMES, OLD_TIMES, entries, log, metrics, run, running, write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
opened = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the path; on Debian and Ubuntu: apt install chromium")


class Browser:
    """Chromium, spoken to in its DevTools protocol over two pipes: no port, and no library for one."""

    def __init__(self, profile):
        (to_read, self.write_end), (self.read_end, to_write) = os.pipe(), os.pipe()
        inherited = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (to_read, to_write)]  # not 3 or 4 yet
        os.close(to_read), os.close(to_write)
        words = [CHROMIUM, "--headless", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}",
                 *(["--no-sandbox"] if os.geteuid() == 0 else []), "about:blank"]
        self.process = subprocess.Popen(["bash", "-c", 'exec "$@" 3<&{} 4>&{}'.format(*inherited), "bash", *words],
                                        pass_fds=inherited, stderr=subprocess.DEVNULL)
        for end in inherited:
            os.close(end)
        self.buffer, self.number, self.errors, self.session = b"", 0, [], None
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """The protocol's answer; what the page complains of meanwhile is kept in errors."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                part = os.read(self.read_end, 2**16)
                assert part, "Chromium has ended"
                self.buffer += part
            text, _, self.buffer = self.buffer.partition(b"\0")
            found = json.loads(text)
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]
            entry = found.get("params", {})
            if (found.get("method") == "Runtime.exceptionThrown" or entry.get("entry", {}).get("level") == "error"
                    or found.get("method") == "Runtime.consoleAPICalled"):
                self.errors.append(entry)

    def js(self, code):
        """The value of an expression on the page."""
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, path, width=1300, dark=False):
        """Shows a file; waits until it is there."""
        self.errors.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=Path(path).as_uri())
        deadline = time.monotonic() + 30
        while self.js("location.protocol + document.readyState") != "file:complete":
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def click(self, selector):
        """A click with the mouse on the middle of an element."""
        x, y = self.js(f"""(() => {{ const it = document.querySelector({json.dumps(selector)});
            it.scrollIntoView({{block: "center"}}); const box = it.getBoundingClientRect();
            return [box.left + box.width / 2, box.top + box.height / 2]; }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector, right, down):
        """The mouse over an element, at shares of its width and height."""
        x, y = self.js(f"""(() => {{ const it = document.querySelector({json.dumps(selector)});
            it.scrollIntoView({{block: "center"}}); const box = it.getBoundingClientRect();
            return [box.left + box.width * {right}, box.top + box.height * {down}]; }})()""")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def text(self, selector):
        """The texts of all elements that a selector finds."""
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map(it => it.textContent)")

    def rows(self, selector):
        """The texts of the cells of all rows that a selector finds."""
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map("
                       "row => [...row.cells].map(it => it.textContent))")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One for all tests: starting it takes longer than they do."""
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.call("Browser.close")
    browser.process.wait(20)


def report(*paths, out):
    done = run("report", *paths, "-o", out)
    assert done.returncode == 0 and done.stdout == f"{out}\n", done.stderr
    return out


def told(facts, **more):
    """A log of ours."""
    return log(middle=f"{running(1)}{json.dumps(facts, indent=1)}\n", **more)


def two_sides(root, sample="once upon"):
    """A baseline of five runs, and a faster and better candidate of another script."""
    same = "same = 0\n" * 30 + "y = 2\n"
    for name, code, worse, times in (("old", f"import torch\nx = 1\n{same}", 0.01, OLD_TIMES),
                                     ("new", f"import torch\nx = 3\n{same}z = 1\n", 0, NEW_TIMES)):
        settings = {"batch_size": 8, "sequence_length": 1024, "lr": worse, "num_steps": 20}
        write(root / name, [
            told({"hyperparameters": {"seed": seed, **settings}, "target": 3.28, "script": f"{name}/train_gpt.py",
                  "data_fingerprint": "abc"}, code=code,
                 body=metrics(final + worse, time_ms=ms) + f"sample:\n| {sample} {seed}\n|   a line\nend\n")
            for seed, (final, ms) in enumerate(zip(GOOD, times, strict=True))])
    return root / "old", root / "new"


@opened
def test_one_run(tmp_path, browser):
    folder = Path(write(tmp_path / "mine", [told({"hyperparameters": {"seed": 7, "lr": 0.5}})]))
    browser.open(report(folder / "0.txt", out=tmp_path / "one.html"))
    assert browser.text("h1") == ["mine"] and "Verdict" not in browser.text("h2")
    assert browser.js("document.querySelectorAll('.plot svg').length") == 3  # it tells no batch size, so no tokens
    assert browser.text(".plot[data-x=tokens]") == ["The logs tell no tokens a step."]
    assert "--lr" in browser.text("th") and "0.txt" in browser.text("td a") and not browser.errors
    browser.open(report(two_sides(tmp_path)[0], folder / "0.txt", out=tmp_path / "beside.html"))  # as ./run.sh ends
    assert browser.text("h1") == ["mine against old"] and "No claim yet" in browser.text(".conclusion")[0]
    assert browser.text(".rule.unknown").count("not tested") == 2
    assert browser.text(".answer") == ["Not tested"] * 2 and "0.999 of A's" in browser.text(".card")[0]
    sides = [Path(write(tmp_path / name, [told({"compiled": name == "on"})])) for name in ("off", "on")]
    browser.open(report(*sides, out=tmp_path / "compiled.html"))
    assert "Only B is compiled." in browser.text(".card")[0]


@opened
def test_two_sides_are_judged_in_words_with_each_rule(tmp_path, browser):
    browser.open(report(*two_sides(tmp_path), out=tmp_path / "two.html"))
    assert browser.text(".conclusion") == ["The claim holds, as far as the logs tell (unknown: run in turn)."]
    assert browser.text(".answer") == ["Yes, faster", "Yes, better"]
    faster, better = browser.text(".card")
    assert "0.950 of A's training time" in faster and "p = " in faster and "paired by seed, 5 pairs" in better
    verify = run("verify", tmp_path / "new", "--baseline", tmp_path / "old").stdout.splitlines()[:10]
    rules = browser.rows(".rules tr")
    assert [f"{word:8}{name}: {figures}" for word, name, figures in rules] == verify  # as the terminal says it
    rows = browser.rows("tbody tr")
    assert ["--lr", "0.01", "0"] in rows and not any(row[0] == "--seed" for row in rows)
    assert sum(text.startswith("once upon") for text in browser.text("pre")) == 10
    worse = report(tmp_path / "new", tmp_path / "old", out=tmp_path / "back.html")
    browser.open(worse)
    assert browser.text(".answer") == ["No, slower", "No, worse"] and "does not hold" in browser.text(".conclusion")[0]
    assert not browser.errors


@opened
def test_clicks_sort_switch_unfold_and_the_mouse_shows_values(tmp_path, browser):
    browser.open(report(*two_sides(tmp_path), out=tmp_path / "two.html"))

    def column():  # of the table of runs
        return [float(text) for text in browser.text("section:has(td a) td:nth-child(3)")]
    head = "section:has(td a) th:nth-child(3) button"
    for turn in (False, True):
        browser.click(head)
        assert column() == sorted(column(), reverse=turn) and len(column()) == 10
    browser.hover(".plot[data-x=steps] svg", 0.99, 0.8)
    shown = "\n".join(browser.text("#tip > div"))
    assert "step 20, 0.16 M tokens" in shown and re.search(r"loss 3\.2\d\d\d \(3\.2\d+ to 3\.2\d+\)", shown)
    browser.hover(".plot[data-x=pace] svg", 0.5, 0.5)
    assert re.search(r"seed \d, \d\.txt up to step \d+ \d+ ms a step", " ".join(browser.text("#tip > div")))
    lines = "document.querySelectorAll('.plot[data-x=time] .line').length"
    assert browser.js(lines) == 2
    browser.click("#legend button:nth-child(1)")
    assert browser.js(lines) == 1 and browser.js("document.querySelector('#legend button').ariaPressed") == "false"
    browser.click("#none")
    assert browser.text(".plot[data-x=time]") == ["No curve is switched on."]
    browser.click("#all")
    before = browser.text(".plot[data-x=time] text")
    browser.click("#end")
    assert browser.js(lines) == 2 and browser.text(".plot[data-x=time] text") != before
    open_folds = "document.querySelectorAll('.fold[open]').length"
    assert browser.js(open_folds) == 0 and browser.text(".code .del") == ["x = 1"]
    assert browser.text(".code .ins") == ["x = 3", "z = 1"] and browser.text(".code mark") == ["1", "3"]
    browser.click("#unfold")
    assert browser.js(open_folds) == browser.js("document.querySelectorAll('.fold').length") > 0
    browser.click("#unfold")
    assert browser.js(open_folds) == 0
    browser.click(".fold summary")
    assert browser.js(open_folds) == 1
    assert not browser.errors


@opened
def test_it_fits_narrow_and_wide_light_and_dark_and_paper(tmp_path, browser):
    page = report(*two_sides(tmp_path), out=tmp_path / "two.html")
    colours = set()
    for width in (360, 800, 2000):
        for dark in (False, True):
            browser.open(page, width, dark)
            assert browser.js("document.documentElement.scrollWidth") <= width
            colours.add(browser.js("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2 and not browser.errors
    assert len(browser.call("Page.printToPDF")["data"]) > 10_000


@opened
def test_a_thousand_logs(tmp_path, browser):
    for number in range(1000):
        text = log(code=f"x = {number // 10}\n", middle=running(8), body=metrics(3.2 + number / 1e4))
        write(tmp_path / "many", [text], name=f"{number:03}.txt")
    page = report(tmp_path / "many", out=tmp_path / "many.html")
    assert page.stat().st_size < 8e6
    browser.open(page)
    assert browser.js("document.querySelectorAll('td a').length") == 1000
    assert browser.js("document.querySelectorAll('#legend button').length") == 100
    browser.click("#all")
    assert browser.js("document.querySelectorAll('.plot[data-x=time] .line').length") == 100
    browser.click("section:has(td a) th:nth-child(3) button")
    losses = [text for text in browser.text("section:has(td a) tr td:nth-child(3)")]
    assert losses == sorted(losses) and len(losses) == 1000 and not browser.errors


@opened
def test_the_tokens_of_a_run_in_stages_stand_beside_those_of_another(tmp_path, browser):
    settings = {"track": "fineweb", "num_steps": 20, "batch_size": 8, "sequence_length": 250_000}
    source = (REPOSITORY / "train_gpt.py").read_text()
    later = metrics().replace("step:0/20 val_loss", "step:0/20 other")  # not validated before the first step
    for name, facts, code in (("even", {}, "x = 1\n"), ("stages", {"extension_steps": 2}, source)):
        write(tmp_path / name, [told({"hyperparameters": {**settings, **facts}}, code=code, body=later)])
    browser.open(report(tmp_path / "even", tmp_path / "stages", out=tmp_path / "both.html"))
    plot = ".plot[data-x=tokens]"
    assert browser.js(f"document.querySelectorAll('{plot} .line').length") == 2
    browser.hover(f"{plot} svg", 0.99, 0.8)  # 6 steps of one batch, 6 of two, 8 of three
    assert "step 20, 84 M tokens, 2 s" in browser.text("#tip > div")
    heights = browser.js(f"[...document.querySelectorAll('{plot} circle:not(.mark)')].map(it => it.cy.baseVal.value)")
    assert len(heights) == 8 and min(heights) > 0  # all points are seen
    browser.click("#legend button:nth-child(2)")
    browser.hover(f"{plot} svg", 0.99, 0.8)
    assert "step 20, 40 M tokens, 2 s" in browser.text("#tip > div") and not browser.errors


EVIL = """</script><script>hacked = 1</script><img src=x onerror="hacked = 2">'"><b id=hacked>&lt;${hacked = 3}]]>-->"""
UNSEEN = "\u202egpj.exe\u2066\u200b\ufeff\u2028\x1b[31m"


@opened
def test_hostile_text_stays_text(tmp_path, browser):
    """In the names of folders, logs and settings, in values, code, samples and tables."""
    name = (EVIL + UNSEEN).replace("/", "\u2215")
    facts = {"hyperparameters": {"seed": EVIL, "batch_size": 8, EVIL: EVIL + UNSEEN, "__proto__": 1}, "target": 3.28,
             "script": f"records/{name}/train_gpt.py", "data_fingerprint": EVIL, "torch": UNSEEN}
    code = f"# {EVIL}\n# {UNSEEN}\n{'x' * 10_000}\0\nhuge = '{'<' * 1_000_000}'\n"
    for side, more in (("a", "# a\n"), ("b", "# b\0\n")):
        for seed in range(2):
            body = metrics(3.27 + seed / 100) + f"sample:\n| {EVIL}\n| {UNSEEN}\0\n"
            write(tmp_path / name / side, [told(facts, code=code + more, body=body)], name=f"{name[:60]}{seed}.txt")
    entry = tmp_path / f"2030-01-01_{name[:80]}"
    shutil.copytree(tmp_path / name / "a", entry)
    (entry / EVIL[:20].replace("/", "")).mkdir()
    (entry / EVIL[:20].replace("/", "") / "runs.tsv").write_text(f"name\t{EVIL}\n{EVIL}\t{UNSEEN}\n<b>\t1e999\n")
    for number, paths in enumerate(((tmp_path / name / "a", tmp_path / name / "b"), (entry,), (tmp_path,))):
        page = report(*paths, out=tmp_path / f"{number}.html")
        text = page.read_text()
        assert not re.search("[\0\u202e\u2066\u200b\ufeff\u2028\x1b]", text) and len(text) < 1e6
        browser.open(page)
        assert browser.js("typeof hacked") == "undefined" and browser.js("document.scripts.length") == 2
        assert browser.js("document.querySelectorAll('img, b:not(.sides b), iframe, object, [onerror]').length") == 0
        assert EVIL in "\n".join(browser.text("td, li, pre")) and "\\u202egpj" in "\n".join(browser.text("td, pre"))
        browser.hover(".plot[data-x=steps] svg", 0.9, 0.8)
        assert "hacked = 1" in " ".join(browser.text("#tip > div") + browser.text("#legend")) and not browser.errors


@opened
def test_public_layouts(tmp_path, browser):
    """All that the table reads, the page shows."""
    texts = [text for text, *_ in LAYOUTS.values()] + [log(body=body) for body in FORMS.values()]
    llm_c = "\n".join(f"s:{s} {'trl' if s % 250 else 'tel'}:{4 - s / 5000:.4f}" for s in range(990))
    texts += [llm_c, "nothing", log(body=metrics(died_at=12)), log(body=metrics(restart=True)),
              metrics().replace("3.2775", "nan"), log(body="")]
    write(tmp_path / "public", texts)
    browser.open(report(tmp_path / "public", out=tmp_path / "public.html"))
    assert browser.js("document.querySelectorAll('.plot svg').length") == 3 and not browser.errors
    assert any("no step in " in note for note in browser.text("li"))


@opened
def test_an_entry_has_its_ablations_and_screening_as_sections(tmp_path, browser):
    entry = Path(entries(tmp_path)) / "2030-02-02_New"
    (entry / "screening").mkdir()
    (entry / "screening/runs.tsv").write_text("name\tval_loss\tlog\nb\t3.4\t0.txt\na\t3.5\tgone.txt\n")
    shutil.make_archive(str(entry / "screening/logs"), "gztar", entry, "ablation")
    browser.open(report(entry, out=tmp_path / "entry.html"))
    headings = browser.text("h2")
    assert headings[0] == "Verdict" and headings.index("Ablations") < headings.index("Screening")
    number = headings.index("Ablations")
    (row,) = browser.rows(f"#part{number} tbody tr")
    assert row[0] == "ngrams 1" and "+0.1225" in row  # 3.4 less the mean of GOOD
    screening = f"#part{headings.index('Screening')}"
    assert browser.text(f"{screening} td:first-child") == ["b", "a"] and "logs.tar.gz" in browser.text(f"{screening} a")
    assert not browser.errors


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("href", "src")]


def test_the_page_needs_no_network_and_its_links_lead_to_the_logs(tmp_path):
    two_sides(tmp_path / "a folder # ?")
    page = report(*((tmp_path / "a folder # ?" / name) for name in ("old", "new")), out=tmp_path / "two.html")
    links = Links(page.read_text()).found
    logs = [link for link in links if not link.startswith("#")]
    assert len(logs) == 10 and all((tmp_path / unquote(link)).is_file() for link in logs)
    text = page.read_text()
    assert "default-src 'none'" in text and not re.search(r"(src|href|url)[=(]\W*(https?:)?//", text)


def test_what_a_page_cannot_judge_it_says(tmp_path):
    old, new = two_sides(tmp_path)
    (new / "other.txt").write_text(log(code="import other\n"))
    assert "2 sorts of runs" in report(old, new, out=tmp_path / "mixed.html").read_text()
    (new / "other.txt").unlink()
    logs = [*sorted(old.glob("*.txt")), *sorted(new.glob("*.txt"))]
    assert "The claim holds" in report(*logs, out=tmp_path / "globs.html").read_text()  # as a shell expands them
    same = report(old, old, out=tmp_path / "same.html").read_text()
    assert "A and B are the same script" in same and "does not hold" in same
    assert run("report", old, "-o", tmp_path / "page.doc").stderr.startswith("error: -o is")
