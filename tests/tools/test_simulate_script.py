"""What the simulator asks of train_gpt.py, and of the frozen scripts, still has its meaning."""
import dataclasses
import json
from types import SimpleNamespace

import numpy as np

import train_gpt
from tools import names
from tools.simulate import host, stages, trace
from tools.simulate.model import DOCUMENT
from tools.simulate.script import place
from tools.simulate.stages import Step


def test_a_script_is_asked_for_its_tokens_and_windows():
    script = SimpleNamespace(tokens_before=lambda step, hp: step**2,
                             window_size=lambda step, hp: [0, 64, None, 128])
    two = SimpleNamespace(num_steps=2)
    assert stages.schedule(script, two) == [Step(1, (64, 128)), Step(3, (64, 128))]
    script.window_size = lambda step, hp: 64 * step
    windows = [step.windows for step in stages.schedule(script, SimpleNamespace(num_steps=3))]
    assert windows == [(), (64,), (128,)]
    entry = SimpleNamespace(num_steps=2, batch_size=8, sequence_length=100)  # has neither function
    assert stages.schedule(SimpleNamespace(), entry) == [Step(800, ())] * 2


def test_the_schedules_of_train_gpt_are_understood():
    hp = dataclasses.replace(train_gpt.Hyperparameters(), num_steps=300)
    steps = stages.schedule(train_gpt, hp)
    assert sum(step.tokens for step in steps) == train_gpt.tokens_before(300, hp)
    assert all(step.windows for step in steps)
    sizes = [stage.softmax_size for stage in hp.stages]
    assert {step.softmax_size for step in steps} == set(sizes) and any(sizes)
    packed = stages.packed(steps)
    assert stages.unpacked(json.loads(json.dumps(packed))) == steps
    assert len(packed) < len(steps)


def test_a_short_run_of_train_gpt_has_every_kind_of_step():
    hp = train_gpt.Hyperparameters()
    real = stages.schedule(train_gpt, hp)

    def short(num_steps):
        return stages.schedule(train_gpt, dataclasses.replace(hp, num_steps=num_steps,
                                                              extension=2 / num_steps))

    count = stages.steps_of_a_short_run(real, short)
    meant = stages.stand_for(real, short(count))
    assert sum(len(steps) for steps in meant) == len(real)


def test_older_names_are_found():
    old, new = SimpleNamespace(words=1), SimpleNamespace(softmax_size=2)
    assert names.name_in(old, "softmax_size") == "words"
    assert names.name_in(new, "softmax_size") == "softmax_size"
    assert names.name_in(SimpleNamespace(), "softmax_size") is None


def test_the_phases_of_a_run_are_functions_of_train_gpt():
    for name in ("warm_up", "training_step", "validate", "save_checkpoint", "main"):
        assert callable(getattr(train_gpt, name))


def test_the_parts_of_the_host_time_are_functions_of_train_gpt():
    for owner, name in host.PARTS:
        assert callable(getattr(getattr(train_gpt, owner), name))


def test_documents_of_the_simulated_text_have_the_lengths_that_are_assumed(tmp_path, monkeypatch):
    """A number that a script takes from its batch changes from sequence to sequence."""
    track = train_gpt.TRACKS["fineweb"]
    hp = dataclasses.replace(train_gpt.Hyperparameters(), num_steps=30)
    tokens = train_gpt.tokens_before(hp.num_steps, hp)
    place(train_gpt.ROOT / "train_gpt.py", track, tokens, tmp_path)
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    stream = train_gpt.TokenStream(track.train_files, track, tokens)
    lengths = np.diff(stream.documents)
    assert 0.95 < lengths.mean() / DOCUMENT < 1.05 and 0.95 < lengths.std() / DOCUMENT < 1.05

    max_doc_len = hp.stages[0].max_doc_len
    assert (lengths > max_doc_len).any()  # so that the script cuts some
    first_docs = train_gpt.first_doc_of_sequences(stream, hp)
    assert first_docs[-1] < len(lengths)  # the text suffices for the run
    numbers = set()
    for first_doc in first_docs[:20].tolist():
        sequence, _ = stream.packed(first_doc, hp.sequence_length, max_doc_len)
        starts = np.flatnonzero(sequence == track.eot_token)
        assert np.diff([*starts, len(sequence)]).max() <= max_doc_len
        numbers.add(len(starts))
    assert len(numbers) > 5


def test_three_steps_of_each_long_stage_are_traced(tmp_path, monkeypatch):
    """trace.py runs main with a profiler around the steps after the warm-up."""
    hp = dataclasses.replace(train_gpt.Hyperparameters(), num_steps=40, extension=0.1)
    model = SimpleNamespace(hp=hp)
    steps = []

    def main(argv):
        train_gpt.warm_up(model)
        for step in range(hp.num_steps):
            assert train_gpt.training_step(step) == step
        return 5

    monkeypatch.setattr(train_gpt, "main", main)
    monkeypatch.setattr(train_gpt, "warm_up", lambda model: train_gpt.training_step(-1))
    monkeypatch.setattr(train_gpt, "training_step", lambda step: steps.append(step) or step)
    assert trace.run_traced(tmp_path, []) == 5
    assert steps == [-1, *range(hp.num_steps)]
    begins = [0, *train_gpt.stage_ends(hp)]
    long_stages = [begin for begin, end in zip(begins, begins[1:], strict=False)
                   if end - begin >= trace.SETTLED + trace.TRACED]
    traces = sorted(tmp_path.glob("stage*.trace.json"))
    assert len(traces) == len(long_stages) > 0
    assert all("traceEvents" in json.loads(path.read_text()) for path in traces)


def test_a_trace_needs_a_folder(tmp_path, capsys):
    for argv in ([], [str(tmp_path / "missing")]):
        assert trace.main(argv) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert all(word in err for word in argv)


