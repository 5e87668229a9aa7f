"""Settings: defaults and presets, flags, which hyperparameters and tables are refused."""
import math
import re
from dataclasses import fields, replace

import pytest

import train_gpt
from train_gpt import (
    LAYERS,
    PRESETS,
    STAGES,
    TRACKS,
    Hyperparameters,
    UserError,
    check_hyperparameters,
    check_tables,
    parse_arguments,
)


def test_defaults_are_the_published_recipe():
    hp = parse_arguments(["--track", "fineweb"])
    published = dict(
        num_steps=1225, batch_size=8, sequence_length=16_384, num_heads=6, model_dim=768, ngrams=2,
        mlp_dim=2816, pointer_window=8192,
        ngram_rows=251_520, head_lr=0.008, value_lr=0.6, ngram_lr=0.6, ngram_rule="adam",
        scalar_lr=0.04, muon_lr=0.023, muon_decay=1.2, muon_beta2=0.9, adam_every=2,
        adam_decay=0.005, logit_cap=23.0, logit_shift=5.0, logit_scale=7.5, attention_scale=0.085,
        narrow_scale=0.12,
        final_window=2560, cooldown=0.6, lr_floor=0.15, val_every=125)
    for name, value in published.items():
        assert getattr(hp, name) == value, name
    assert hp.extension_steps == 10
    assert [stage.max_doc_len for stage in hp.stages] == [896, 2048, 2048, 2048, 2048]
    assert TRACKS["fineweb"].val_tokens == 10_485_760
    assert TRACKS["fineweb"].target == 3.28


def test_every_setting_is_a_flag_with_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks within a help text
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in fields(Hyperparameters):
        assert f"--{field.name} " in text
        assert field.metadata["help"] in text


def test_flags_override_the_preset_and_the_preset_overrides_the_defaults():
    hp = parse_arguments(["--track", "laptop", "--num_steps", "7"])
    assert hp.num_steps == 7
    assert hp.model_dim == PRESETS["laptop"]["model_dim"] != Hyperparameters().model_dim
    assert hp.scalar_lr == Hyperparameters().scalar_lr


@pytest.mark.parametrize("argv, name", [
    (["--frobnicate"], "--frobnicate"), (["--num_steps"], "--num_steps"),
    (["--num_steps", "many"], "--num_steps"), (["--track", "moon"], "--track"),
    (["--dtype", "float8"], "--dtype"), (["--num_step", "3"], "--num_step"),
    (["--batch-size", "3"], "--batch-size")])
def test_wrong_flags_are_refused_by_name(argv, name):
    with pytest.raises(UserError, match=name):
        parse_arguments(argv)


@pytest.mark.parametrize("track", TRACKS)
def test_presets_can_run_on_1_2_4_and_8_ranks(track):
    for world_size in (1, 2, 4, 8):
        check_hyperparameters(parse_arguments(["--track", track]), world_size)


@pytest.mark.parametrize("change, name", [
    (dict(batch_size=8), "--batch_size 8"),    # on 3 ranks
    (dict(sequence_length=200), "--sequence_length 200"),
    (dict(val_length=384), "--val_length 384"),
    (dict(num_heads=5), "--num_heads 5"),
    (dict(num_heads=128), "--num_heads 128"),  # heads of 6 dimensions can't be split into quarters
    (dict(model_dim=8, num_heads=2), "--model_dim 8"),
    (dict(num_steps=0), "--num_steps 0"),
    (dict(extension=1.0), "--extension 1.0"),
    (dict(cooldown=0.0), "--cooldown 0.0"),
    (dict(val_every=-1), "--val_every -1"),
    (dict(save_every=3), "--save_every 3"),
    (dict(adam_every=0), "--adam_every 0"),
    (dict(log_every=0), "--log_every 0"),
    (dict(ngrams=7), "--ngrams 7"),
    (dict(logit_cap=100.0), "--logit_cap 100"),
    (dict(muon_beta2=math.nan), "--muon_beta2 nan"),
    (dict(head_lr=math.inf), "--head_lr inf"),
    (dict(entry="../elsewhere"), "--entry ../elsewhere"),
    (dict(track="moon"), "--track moon")])
def test_impossible_hyperparameters_are_refused_by_name_and_value(change, name):
    hp = Hyperparameters(batch_size=9)
    check_hyperparameters(hp, world_size=3)
    with pytest.raises(UserError) as error:
        check_hyperparameters(replace(hp, **change), world_size=3)
    flag, value = name.split()
    assert flag in str(error.value) and value in str(error.value)


@pytest.mark.parametrize("track", LAYERS)
def test_the_tables_of_each_track_pass(track):
    check_tables(LAYERS[track], STAGES[track])


@pytest.mark.parametrize("table, row, change", [
    ("LAYERS", 1, {"attention": "longg"}),
    ("LAYERS", 6, {"value_table": 0}),        # the layer without attention
    ("LAYERS", 6, {"narrow_qk": True}),       # the same
    ("LAYERS", 3, {"narrow_qk": True}),       # its keys need the half that does not rotate
    ("STAGES", 1, {"prefix_weights": (0.25,)}),
    ("LAYERS", 1, {"value_table": 7}),        # there are 5 tables
    ("LAYERS", 1, {"value_table": -1}),
    ("LAYERS", 0, {"skip_from": 0}),          # the layer itself
    ("LAYERS", 2, {"skip_from": -1}),
    ("LAYERS", 1, {"attn_input_layer": 2}),   # a later layer
    ("STAGES", 1, {"until": 0.2}),            # earlier than the stage before
    ("STAGES", 0, {"mtp_weights_end": (1,)}),  # mtp_weights has three
    ("STAGES", 3, {"tied": True}),            # tied again
    ("STAGES", 1, {"batch_multiplier": 0})])
def test_a_wrong_row_is_refused_by_table_number_and_field(monkeypatch, table, row, change):
    tables = {"LAYERS": LAYERS["fineweb"], "STAGES": STAGES["fineweb"]}
    rows = list(tables[table])
    rows[row] = rows[row]._replace(**change)
    tables[table] = tuple(rows)
    with pytest.raises(UserError) as error:
        check_tables(tables["LAYERS"], tables["STAGES"])
    (field,) = change
    for name in (table, str(row), field):
        assert re.search(rf"\b{name}\b", str(error.value))
    # A run with these tables ends before it starts.
    monkeypatch.setitem(getattr(train_gpt, table), "fineweb", tuple(rows))
    with pytest.raises(UserError, match=table):
        check_hyperparameters(Hyperparameters(), world_size=8)
