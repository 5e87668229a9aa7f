"""A trained model as a folder for transformers and for the evaluation harness. Both packages are
only needed to load such a folder; where they are missing, the tests that load one are skipped."""
import json
import os
import tempfile
from types import SimpleNamespace

import pytest
import small
import torch
import torch.nn.functional as F
from conftest import away_from_zero

import train_gpt
from data import UserError, run_as_program
from tools import export, sample

# What the packages cache, in particular the code of loaded folders, is removed with this object.
CACHE = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
os.environ.update(HF_HOME=CACHE.name, HF_MODULES_CACHE=CACHE.name, HF_HUB_OFFLINE="1")
CPU = torch.device("cpu")
# All 11 layers, on GPT-2 tokens.
FINEWEB = ["--track=fineweb", "--device=cpu", "--model_dim=32", "--num_heads=2",
           "--ngram_rows=1021", "--sequence_length=256"]
RANKS = {bytes([byte]): byte for byte in range(256)}  # then merges: "th", "the", " the"
RANKS |= {b"th": 256, b"the": 257, b" the": 258, b"er": 259}


def write_weights(flags):
    """A file of weights as a finished run leaves it, and its model."""
    hp = train_gpt.parse_arguments(flags)
    dtype = getattr(torch, hp.dtype)
    model = away_from_zero(train_gpt.build_model(hp, CPU, dtype, flex=False))
    info = {"run_id": f"{hp.track}-20300101-000000-abcdef", "script": "train_gpt.py",
            "code_hash": sample.script_hash(train_gpt.__file__), "activations": hp.dtype,
            "device": "a CPU", "world_size": 1, "threads": 1, "torch": "2",
            "data_fingerprint": "0123-4567", "git_commit": "fedcba", "git_dirty": False}
    progress = train_gpt.Progress(step=hp.num_steps, validation_loss=3.2791)
    train_gpt.save_weights(model, progress, hp, train_gpt.Runtime(0, 1, CPU), info)
    return train_gpt.ROOT / "records/scratch" / f"{info['run_id']}.pt", model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    (tmp_path / "records/scratch").mkdir(parents=True)
    (tmp_path / "data").symlink_to(small.REPOSITORY / "data")
    return tmp_path


def command(capfd, *argv):
    capfd.readouterr()
    code = run_as_program(export.main, list(map(str, argv)))
    out, err = capfd.readouterr()
    return SimpleNamespace(code=code, out=out, err=err)


def assert_one_line(done, named):
    assert done.code == 2 and done.err.count("\n") == 1 and "Traceback" not in done.err
    assert str(named) in done.err


def load(path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    settings = dict(trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, **settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **settings)
    return tokenizer, model.eval()


def logits_of(model, tokens):
    """The script's own logits of one sequence (T,) at the end of the run, (T, V)."""
    schedule = train_gpt.Schedule(model.hp.num_steps, model.hp, CPU)
    with torch.no_grad():
        return model(tokens[None], None, schedule)


# --- The file of weights --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_loaded_bit_for_bit(folder, dtype):
    """Also rows of the n-gram tables that are zero, which the file leaves out."""
    path, model = write_weights([*small.TINY, f"--dtype={dtype}"])
    full_size = path.stat().st_size
    info = train_gpt.open_checkpoint(str(path))["info"]
    table = model.ngram.tables[0].weight
    with torch.no_grad():
        table[100:] = 0
    train_gpt.save_weights(
        model, train_gpt.Progress(step=6), model.hp, train_gpt.Runtime(0, 1, CPU), info)
    assert full_size - path.stat().st_size > 0.8 * table.nbytes
    loaded = sample.load_model(str(path)).model.state_dict()
    for name, weight in model.state_dict().items():
        assert loaded[name].dtype == weight.dtype and torch.equal(loaded[name], weight), name


# --- Exported ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    [*small.TINY, "--dtype=float32"], [*small.TINY, "--dtype=bfloat16"],
    [*FINEWEB, "--dtype=float32"], [*FINEWEB, "--dtype=bfloat16"]])
def test_an_exported_model_has_the_scripts_logits(folder, capfd, monkeypatch, flags):
    pytest.importorskip("safetensors", reason="pip install safetensors")
    monkeypatch.setattr(export, "byte_ranks", lambda eot_token: RANKS)
    path, model = write_weights(flags)
    done = command(capfd, path, folder / "exported")
    assert done.code == 0 and "3.2791" in done.out
    card = (folder / "exported/README.md").read_text()
    assert all(word in card for word in ("3.2791", "0123-4567", "fedcba", model.hp.track))
    _, exported = load(folder / "exported")
    eot = model.eot_token
    torch.manual_seed(0)
    tokens = torch.randint(eot, (200,))
    tokens[[0, 70, 71, 150]] = eot
    with torch.no_grad():
        assert torch.equal(exported(tokens[None]).logits[0], logits_of(model, tokens))
    # A batch: no padding, padding on the left, on the right, and in between.
    rows = [tokens[:60], tokens[70:103], tokens[3:40], tokens[100:104]]
    batch = torch.full((4, 60), eot)
    mask = torch.zeros(4, 60, dtype=torch.int64)
    places = [slice(0, 60), slice(27, 60), slice(0, 37), [5, 6, 30, 59]]
    for row, place, sequence in zip(range(4), places, rows, strict=True):
        batch[row, place] = sequence
        mask[row, place] = 1
    with torch.no_grad():
        found = exported(batch, attention_mask=mask).logits
    tolerance = 1e-4 if "float32" in flags[-1] else 0.2
    for row, place, sequence in zip(range(4), places, rows, strict=True):
        torch.testing.assert_close(
            found[row, place], logits_of(model, sequence), rtol=0, atol=tolerance)


def test_an_exported_model_generates_and_learns(folder, capfd):
    pytest.importorskip("safetensors", reason="pip install safetensors")
    path, model = write_weights(small.TINY)
    assert command(capfd, path, folder / "exported").code == 0
    tokenizer, exported = load(folder / "exported")
    texts = ["the text", "naïve"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True) == texts
    settings = dict(max_new_tokens=10, do_sample=False)
    together = exported.generate(**batch, **settings)
    for row, text in enumerate(texts):
        alone = exported.generate(**tokenizer(text, return_tensors="pt"), **settings)[0]
        assert torch.equal(together[row, -alone.numel():], alone)
        assert (alone[1:] <= model.eot_token).all()
    tokens = tokenizer(texts[0], return_tensors="pt").input_ids
    loss = exported(tokens, labels=tokens).loss
    loss.backward()
    expected = F.cross_entropy(logits_of(model, tokens[0])[:-1], tokens[0, 1:])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    exported.save_pretrained(folder / "again")
    tokenizer.save_pretrained(folder / "again")
    assert torch.equal(load(folder / "again")[1](tokens).logits, exported(tokens).logits)


@pytest.mark.slow
def test_the_evaluation_harness_scores_as_the_script(folder, capfd):
    """Loglikelihoods of continuations, in batches of unequal lengths, and of a whole text."""
    pytest.importorskip("safetensors", reason="pip install safetensors")
    lm_eval = pytest.importorskip("lm_eval", reason="pip install 'lm-eval[hf]'")
    from lm_eval.tasks import TaskManager
    path, model = write_weights([*small.TINY, "--val_length=128"])
    assert command(capfd, path, folder / "exported").code == 0
    documents = [
        {"text": "the", "choices": [" end", " beginning of it"], "label": 0},
        {"text": "a longer text than the other one", "choices": ["", "s"], "label": 1},
        {"text": "naïve", "choices": [" x", " y"], "label": 1}]
    documents[1]["choices"][0] = "!"
    lines = "\n".join(map(json.dumps, documents))
    (folder / "documents.jsonl").write_text(lines)
    shared = {"dataset_path": "json", "test_split": "test",
              "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}}}
    choice = {**shared, "task": "choice", "output_type": "multiple_choice",
              "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}", "doc_to_target": "label",
              "target_delimiter": "", "metric_list": [{"metric": "acc"}]}
    text = {**shared, "task": "text", "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]}
    (folder / "tasks").mkdir()
    for task in (choice, text):  # JSON is YAML
        (folder / f"tasks/{task['task']}.yaml").write_text(json.dumps(task))

    def evaluate(task, **settings):
        settings = dict(pretrained=str(folder / "exported"), trust_remote_code=True, **settings)
        return lm_eval.simple_evaluate(
            "hf", model_args=settings, tasks=[task], batch_size=4, device="cpu",
            task_manager=TaskManager(include_path=str(folder / "tasks")), bootstrap_iters=0)

    def log_likelihood(context, continuation):
        tokens = torch.tensor([256, *f"{context}{continuation}".encode()])
        losses = F.cross_entropy(logits_of(model, tokens)[:-1], tokens[1:], reduction="none")
        return -losses[-len(continuation.encode()):].sum().item()

    scored = evaluate("choice")
    samples = scored["samples"]["choice"]
    right = 0
    for document, found in zip(documents, samples, strict=True):
        expected = [log_likelihood(document["text"], choice) for choice in document["choices"]]
        values = [float(response[0][0]) for response in found["resps"]]
        assert values == pytest.approx(expected, abs=1e-3)
        right += expected.index(max(expected)) == document["label"]
    assert scored["results"]["choice"]["acc,none"] == pytest.approx(right / len(documents))
    scored = evaluate("text", add_bos_token=False)
    total = sum(log_likelihood("", document["text"]) for document in documents)
    num_bytes = sum(len(document["text"].encode()) for document in documents)
    assert scored["results"]["text"]["bits_per_byte,none"] == pytest.approx(
        -total / num_bytes / train_gpt.math.log(2), abs=1e-3)


# --- Tokenizer ------------------------------------------------------------------------------------


def test_merges_give_the_ranks_tokens():
    """Byte-pair encoding with the merges gives the ids that the ranks stand for."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install transformers")
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(export.tokenizer_of(RANKS, 300)))
    encoded = tokenizer.encode("the other é\n", add_special_tokens=False)
    assert encoded.ids == [257, 32, 111, 257, 114, 32, *"é".encode(), 10]
    assert tokenizer.encode("there the").ids == [300, 257, 114, 101, 258]
    assert tokenizer.decode(encoded.ids) == "the other é\n"


def test_the_last_merge_of_a_token():
    assert export.merge_of(b" the", RANKS) == (b" ", b"the")
    assert export.merge_of(b"the", RANKS) == (b"th", b"e")
    characters = export.byte_characters()
    assert len(set(characters)) == 256 and all(c.isprintable() for c in characters)


# --- Mistakes -------------------------------------------------------------------------------------


def test_mistakes_are_one_line(folder, capfd, monkeypatch):
    path, _ = write_weights(small.TINY)
    out = folder / "exported"
    (folder / "text.pt").write_text("no weights")
    assert_one_line(command(capfd, folder / "text.pt", out), "text.pt")
    assert_one_line(command(capfd, folder / "none.pt", out), "none.pt")
    assert_one_line(command(capfd, path, folder), folder)  # exists
    monkeypatch.setitem(train_gpt.LAYERS, "laptop", train_gpt.LAYERS["laptop"][:1])
    assert_one_line(command(capfd, path, out), path)
    monkeypatch.undo()
    assert not out.exists()


@pytest.mark.parametrize("missing", ["safetensors", "vocabulary"])
def test_what_is_missing_is_one_line(folder, capfd, monkeypatch, missing):
    flags = small.TINY
    if missing == "safetensors":
        monkeypatch.setitem(export.sys.modules, "safetensors.torch", None)
    else:
        pytest.importorskip("safetensors", reason="pip install safetensors")
        flags = [*FINEWEB, "--dtype=float32"]

        def load_encoding(name):
            raise UserError(f"no vocabulary {name}")
        monkeypatch.setattr(export, "load_encoding", load_encoding)
    path, _ = write_weights(flags)
    done = command(capfd, path, folder / "exported")
    assert_one_line(done, "gpt2" if missing == "vocabulary" else "pip install safetensors")
    assert not (folder / "exported").exists() and not list(folder.glob(".unfinished*"))


def test_push(folder, capfd, monkeypatch):
    pytest.importorskip("safetensors", reason="pip install safetensors")
    huggingface_hub = pytest.importorskip("huggingface_hub")
    path, _ = write_weights(small.TINY)
    calls = []

    class Api:
        def create_repo(self, name, private, exist_ok):
            if name == "bad":
                raise ValueError("no such\nuser")
            calls.append((name, private))
            return f"https://example.invalid/{name}"

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, {path.name for path in folder_path.iterdir()}))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert command(capfd, path, folder / "one", "--push", "me/model").code == 0
    assert calls[0] == ("me/model", True)
    assert calls[1][0] == "me/model" and "model.safetensors" in calls[1][1]
    assert_one_line(command(capfd, path, folder / "two", "--push", "bad"), "bad")
    assert (folder / "two/config.json").exists()
