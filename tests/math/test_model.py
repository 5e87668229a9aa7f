"""The model: its logits against the float64 reference, what they may depend on, initialization,
size."""
import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from conftest import at_window, away_from_zero
from reference import model as reference_model

import train_gpt
from train_gpt import (
    GPT,
    LAYERS,
    TRACKS,
    Hyperparameters,
    Linear,
    NGramEmbed,
    Schedule,
    build_model,
    check_hyperparameters,
    document_start,
    parse_arguments,
    prefix_table,
    read_vocabulary,
    token_classes,
)

CPU = torch.device("cpu")


def random_tokens(seed: int = 0, T: int = 256) -> torch.Tensor:
    """(T,) bytes; a document begins at position 100."""
    tokens = torch.randint(256, (T,), generator=torch.Generator().manual_seed(seed))
    tokens[100] = 256
    return tokens


def amplified(model):
    """The model with logits and value embeddings of about 1, so that every part of it shows."""
    with torch.no_grad():
        model.head.linear.weight.mul_(40)
        model.value_embed.weight.mul_(40)
    return model


def predict(model, tokens, schedule):
    """The logits (N, V) and the logarithms of the probabilities (N, V), of sequences (S, T) or of
    one sequence (T,), without gradients."""
    states = []
    hook = model.readout.register_forward_hook(lambda module, args, y: states.append(y))
    with torch.no_grad():
        log_p = model(tokens.view(-1, tokens.size(-1)), None, schedule)
        hook.remove()
        return model.head.logits(states[0]), log_p


def log_p_of(model, tokens, schedule):
    """The logarithms of the probabilities, (N, V), without the gate, whose probability is 0."""
    log_p = predict(model, tokens, schedule)[1]
    return torch.cat([log_p[:, :257], log_p[:, 258:]], dim=1)


# --- Against the reference ------------------------------------------------------------------------


@pytest.mark.parametrize("step, stage, num_heads", [
    (0, 0, 2), (4, 1, 2), (8, 2, 2), (14, 4, 2), (8, 2, 4), (0, 0, 6)])
def test_logits_and_probabilities_agree_with_the_reference(recipe, step, stage, num_heads):
    """All 11 layers, tied and untied, up to the last validation. 4 heads make two pairs, 6 heads
    three."""
    hp = replace(recipe, num_heads=num_heads, model_dim=16 * num_heads)
    model = amplified(away_from_zero(build_model(hp, CPU, torch.float32, flex=False)))
    schedule = Schedule(step, hp, CPU)
    schedule.windows = {"long": torch.tensor(20), "short": torch.tensor(9),
                        "paired": torch.tensor(9), "pointer": torch.tensor(25)}
    tokens = torch.randint(256, (44,), generator=torch.Generator().manual_seed(step))
    tokens[[12, 13]] = 256  # documents of 12, 1 and 31 tokens: shorter and longer than the windows
    windows_so_far = [48, 112, 176, 176, 208][:stage + 1]
    frequencies, scale = reference_model.yarn(windows_so_far, num_frequencies=4)
    expected_logits, expected = reference_model.predict(
        model, tokens.tolist(), 256,
        windows=dict(long=20, short=9, pointer=25),
        frequencies=frequencies,
        scale=scale,
        tied=stage < 2)
    logits, log_p = predict(model, tokens, schedule)
    torch.testing.assert_close(logits.double(), expected_logits, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(log_p.double(), expected.log(), atol=4e-4, rtol=1e-4)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(44))


def test_probabilities_depend_on_each_kind_of_parameter(recipe, recipe_model):
    """So the comparison with the reference leaves out none of them."""
    model = amplified(recipe_model)
    tokens = random_tokens(T=128)
    schedule = Schedule(0, recipe, CPU)
    before = log_p_of(model, tokens, schedule)
    for name in ("input_embedding.smear_lambda", "input_embedding.smear_gate",
                 "input_embedding.ngram_lambda", "value_embed.weight", "ngram.tables.0.weight",
                 "blocks.1.attention.value_gate", "blocks.4.attention.v_lambda",
                 "blocks.4.attention.proj_lambda",
                 "blocks.3.attention.gate", "blocks.7.attention.xsa_lambdas",
                 "blocks.6.skip_lambda", "blocks.6.skip_gate", "blocks.0.mlp.proj.weight",
                 "blocks.8.branch_lambdas", "blocks.9.resid_lambdas", "blocks.10.mudd.fc",
                 "blocks.10.mudd.proj", "blocks.10.mudd.bias", "readout.mudd.fc",
                 "readout.mudd.proj", "readout.mudd.bias", "pointer.qk", "pointer.sink",
                 "pointer.gain"):
        p = model.get_parameter(name)
        original = p.detach().clone()
        with torch.no_grad():
            p.add_(0.2)
            after = log_p_of(model, tokens, schedule)
            p.copy_(original)
        assert (after - before).abs().max() > 1e-3, name


# --- What a logit may depend on -------------------------------------------------------------------


@pytest.mark.parametrize("changed", [0, 99, 100, 101, 255])
@pytest.mark.parametrize("model, step",
                         [("tiny_model", 0), ("recipe_model", 0), ("recipe_model", 8)])
def test_no_probability_depends_on_a_later_token_or_another_document(request, changed, model, step):
    model = request.getfixturevalue(model)
    schedule = Schedule(step, model.hp, CPU)
    tokens = random_tokens()
    other = tokens.clone()
    other[changed] = (tokens[changed] + 1) % 256
    differs = (log_p_of(model, tokens, schedule) != log_p_of(model, other, schedule)).any(dim=-1)
    assert not differs[:changed].any()
    assert differs[changed]
    if changed < 100:
        assert not differs[100:].any()


def test_logits_depend_on_the_window(tiny_model):
    """A query sees the keys of its own position and of `window` positions before. So a window of
    128 instead of 64 changes the logits from the 66th token of each document on."""
    narrow, wide = at_window(64), at_window(128)
    wide.windows["paired"] = torch.tensor(64)  # positions of half a token
    tokens = random_tokens()
    differs = (log_p_of(tiny_model, tokens, narrow) != log_p_of(tiny_model, tokens, wide)).any(-1)
    for begin, end in ((0, 100), (100, 256)):  # the two documents
        assert not differs[begin:begin + 65].any()
        assert differs[begin + 65:end].all()


@pytest.mark.parametrize("model", ["tiny_model", "recipe_model"])
def test_a_document_has_the_same_logits_behind_another_as_alone(request, model):
    model = request.getfixturevalue(model)
    schedule = Schedule(0, model.hp, CPU)
    tokens = random_tokens()
    together = log_p_of(model, tokens, schedule)[100:228]
    alone = log_p_of(model, tokens[100:228], schedule)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", ["tiny_model", "recipe_model"])
def test_a_sequence_has_the_same_logits_in_a_batch_as_alone(request, model):
    model = request.getfixturevalue(model)
    schedule = Schedule(0, model.hp, CPU)
    tokens = torch.stack([random_tokens(seed, T=128) for seed in range(2)])
    together = log_p_of(model, tokens, schedule)
    alone = torch.cat([log_p_of(model, sequence, schedule) for sequence in tokens])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", ["tiny_model", "recipe_model"])
def test_logits_stay_between_zero_and_the_cap(request, model):
    model = request.getfixturevalue(model)
    with torch.no_grad():
        model.head.linear.weight.mul_(1e5)
    schedule = Schedule(0, model.hp, CPU)
    schedule.tied = False  # the embedding keeps its scale
    logits, _ = predict(model, random_tokens(T=128), schedule)
    assert logits.min() == 0
    assert logits.max() == model.hp.logit_cap


# --- Layers ---------------------------------------------------------------------------------------


def test_the_layers_of_the_fineweb_track_are_the_published_ones():
    layers = LAYERS["fineweb"]
    assert len(layers) == 11

    def layers_with(field):
        """{layer's number: its value of the field}, for layers whose value is not None or False."""
        values = {i: getattr(layer, field) for i, layer in enumerate(layers)}
        return {i: v for i, v in values.items() if v is not None and v is not False}

    kinds = layers_with("attention")
    assert set(range(11)) - set(kinds) == {6}
    assert [i for i, kind in kinds.items() if kind == "paired"] == [0, 2, 5, 9]
    assert [i for i, kind in kinds.items() if kind == "long"] == [3, 10]
    assert layers_with("value_table") == {1: 0, 2: 1, 8: 2, 9: 3, 10: 4}
    assert layers_with("skip_from") == {6: 3}
    assert layers_with("attn_input_layer") == {8: 7, 9: 7, 10: 7}
    assert list(layers_with("xsa")) == [1, 3, 4, 7, 8, 10]
    assert list(layers_with("mudd")) == [10]
    assert layers_with("head_skip_init") == {3: 0.0, 7: -0.5, 9: 0.0}


def test_the_output_map_of_each_attention_has_a_learned_factor(recipe_model):
    """Scaling the factor by 2 gives the same logits, bit for bit, as scaling the map. There is no
    factor in the layer without attention."""
    model = amplified(recipe_model)
    tokens = random_tokens(T=128)
    schedule = Schedule(0, model.hp, CPU)
    before = log_p_of(model, tokens, schedule)
    for layer, block in enumerate(model.blocks):
        if block.attention is None:
            assert layer == 6
            continue
        logits = []
        for p in (block.attention.proj_lambda, block.attention.proj.weight):
            with torch.no_grad():
                p.mul_(2)
                logits.append(log_p_of(model, tokens, schedule))
                p.div_(2)
        assert torch.equal(*logits), layer
        assert not torch.equal(logits[0], before), layer


def test_n_grams_reach_layer_0_only_in_its_input(recipe_model):
    """All other layers with attention add them, too, after the attention."""
    model = amplified(recipe_model)
    with torch.no_grad():
        model.ngram.tables[0].weight.normal_()
    tokens = random_tokens(T=128)
    schedule = Schedule(0, model.hp, CPU)
    before = log_p_of(model, tokens, schedule)
    for layer in range(10):  # layer 10 predicts its coefficients
        coefficients = model.blocks[layer].branch_lambdas
        with torch.no_grad():
            coefficients[3] += 1
            changed = (log_p_of(model, tokens, schedule) - before).abs().max() > 0.01
            coefficients[3] -= 1
        assert changed == (layer not in (0, 6)), layer
    with torch.no_grad():
        model.input_embedding.ngram_lambda += 1
    assert (log_p_of(model, tokens, schedule) - before).abs().max() > 0.01


def six_heads(recipe):
    """The recipe's model with 6 heads of 16 dimensions, in 3 pairs."""
    hp = replace(recipe, num_heads=6, model_dim=96)
    return away_from_zero(build_model(hp, CPU, torch.float32, flex=False))


def heads_of_layer_0(model, tokens):
    """What attention in layer 0, a paired layer, gives to its output map: (T, 6, 16)."""
    outputs = []
    proj = model.blocks[0].attention.proj
    hook = proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    log_p_of(model, tokens, at_window(500, model.hp))
    hook.remove()
    return outputs[0].view(len(tokens), 6, 16)


@pytest.mark.parametrize("matrix, heads", [
    (0, [0, 1]), (1, [2, 3]), (2, [4, 5]),             # queries
    (3, [0, 1, 3, 4]), (4, [2, 5, 0, 3]), (5, [4, 5, 1, 2])])  # keys, which the partner sees, too
def test_head_h_attends_with_h_plus_3_and_shares_a_matrix_with_its_neighbor(recipe, matrix, heads):
    """In a paired layer the softmax pairs heads (0, 3), (1, 4), (2, 5), but Muon's matrices of Q
    and K are those of heads (0, 1), (2, 3), (4, 5)."""
    model = six_heads(recipe)
    tokens = random_tokens(T=128)
    before = heads_of_layer_0(model, tokens)
    with torch.no_grad():
        weight = model.blocks[0].attention.qk.weight[matrix]
        weight.copy_(weight.flip(-1))
    differs = (heads_of_layer_0(model, tokens) - before).abs().amax((0, 2)) > 1e-3
    assert differs.nonzero().flatten().tolist() == sorted(heads)


def test_head_h_of_a_pair_rotates_by_twice_its_token_plus_the_parity_of_h(recipe, monkeypatch):
    """The queries and keys that attention receives in layer 0 are those of the reference."""
    received = []
    attention = train_gpt.attention

    def record(q, k, v, *args):
        received.append((q, k))
        return attention(q, k, v, *args)

    monkeypatch.setattr(train_gpt, "attention", record)
    model = six_heads(recipe)
    weights = model.blocks[0].attention.qk.weight
    with torch.no_grad():  # all heads have the same Q and K
        same = weights[0, :, :8].clone()  # of a narrow head
        weights.copy_(same.repeat(1, 2).expand_as(weights))
    inputs = []
    model.blocks[0].attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    schedule = Schedule(0, model.hp, CPU)
    log_p_of(model, random_tokens(T=128), schedule)
    unrotated = F.rms_norm(inputs[0] @ same, (8,))
    scaled_q, k = (t.reshape(128, 6, 8) for t in received[0])
    q = scaled_q / schedule.attention_scale / reference_model.NARROW_SCALE
    for t in (0, 1, 50, 127):
        for h in range(6):
            expected = reference_model.rotate(unrotated[t], 2 * t + h % 2, schedule.frequencies)
            torch.testing.assert_close(q[t, h], expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(k[t, h], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_heads, layers", [
    # MUDD in the first layer
    (2, [dict(attention="short", value_table=0, xsa=True, mudd=True)]),
    # MUDD without value embeddings, and without attention
    (2, [dict(attention="short", mudd=True, head_skip_init=0.0), dict(skip_from=0, mudd=True)]),
    (4, [dict(attention="long", value_table=0, xsa=True, head_skip_init=0.3),
         dict(attention="paired", value_table=0, attn_input_layer=0, xsa=True, mudd=True,
              head_skip_init=-0.5)]),
    # an odd number of heads
    (3, [dict(attention="short", xsa=True),
         dict(attention="long", value_table=0, attn_input_layer=0, xsa=True, head_skip_init=1.0)]),
    (1, [dict(attention="long", value_table=0, xsa=True)])])
def test_other_tables_of_layers_have_finite_gradients_of_all_parameters(
        monkeypatch, num_heads, layers):
    only_mlp = LAYERS["fineweb"][6]._replace(skip_from=None)
    table = tuple(only_mlp._replace(**changes) for changes in layers)
    monkeypatch.setitem(LAYERS, "laptop", table)
    hp = replace(parse_arguments(small.TINY), num_heads=num_heads, model_dim=16 * num_heads)
    check_hyperparameters(hp, 1)
    model = away_from_zero(build_model(hp, CPU, torch.float32, flex=False))
    tokens = random_tokens(T=128)[None]
    schedule = Schedule(0, hp, CPU)
    objective, loss = model(tokens, tokens.roll(-1), schedule)
    objective.backward()
    assert loss.isfinite() and loss < 12
    for name, p in model.named_parameters():
        if name == "embed.weight" and schedule.tied:
            continue
        assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize("in_features, out_features", [(8, 8), (8, 24), (24, 8)])
@pytest.mark.parametrize("parts", [1, 2])
def test_linear_stores_tall_matrices_and_computes_matrix_products(in_features, out_features, parts):
    linear = Linear(in_features, out_features, parts)
    x = torch.randn(5, in_features)
    assert linear.weight.size(-2) >= linear.weight.size(-1)
    maps = list(linear.weight)
    if in_features > out_features:
        maps = [matrix.T for matrix in maps]
    expected = torch.cat([torch.stack([matrix @ row for row in x]) for matrix in maps], dim=-1)
    torch.testing.assert_close(linear(x), expected)


# --- N-grams --------------------------------------------------------------------------------------


def rows_looked_up(embed, tokens, eot_token):
    """The rows that NGramEmbed looks up in each of its tables, for sequences (S, T)."""
    rows = []
    for table in embed.tables:
        table.register_forward_pre_hook(lambda module, args: rows.append(args[0].tolist()))
    position = torch.arange(tokens.numel()) - document_start(tokens, eot_token)
    embed(tokens.flatten(), position)
    return rows


def test_bigrams_use_the_published_rows(recipe):
    tokens = torch.randint(50_257, (2, 60), generator=torch.Generator().manual_seed(0))
    tokens[0, 20] = 50_256
    hp = replace(recipe, track="fineweb", ngram_rows=251_520, model_dim=8)
    embed = NGramEmbed(hp, sparse=False)
    (rows,) = rows_looked_up(embed, tokens, 50_256)
    starts = [0] * 20 + [20] * 40 + [60] * 60
    classes = embed.classes[tokens.flatten()].tolist()
    expected = [reference_model.bigram(classes, t, starts, 251_520)[0] for t in range(120)]
    assert rows == expected
    assert rows.count(251_519) == 3


def test_equal_n_grams_within_a_document_share_a_row(hp):
    """Two positions look up the same row if and only if the same n tokens end there, in a table
    without collisions. Where the document is shorter than n tokens, it is the last row."""
    tokens = torch.randint(3, (2, 60), generator=torch.Generator().manual_seed(0))
    tokens[0, 20] = 9  # a document begins here, and at positions 0 and 60, where sequences begin
    starts = [0] * 20 + [20] * 40 + [60] * 60
    flat = tokens.flatten().tolist()
    embed = NGramEmbed(replace(hp, ngrams=4, ngram_rows=999_983, model_dim=8), sparse=False)
    for n, rows in zip((2, 3, 4), rows_looked_up(embed, tokens, 9), strict=True):
        grams = []
        for i, start in enumerate(starts):
            grams.append(tuple(flat[i + 1 - n:i + 1]) if i + 1 - n >= start else ())
        pairs = set(zip(grams, rows, strict=True))
        assert len(set(grams)) == len(set(rows)) == len(pairs) > 9
        assert ((), 999_982) in pairs


def test_n_gram_embeddings_are_summed_and_start_at_zero(hp):
    embed = NGramEmbed(hp, sparse=False)
    tokens = torch.randint(256, (40,))
    assert not embed(tokens, torch.arange(40)).any()
    outputs = []
    for table in embed.tables:
        torch.nn.init.normal_(table.weight)
        table.register_forward_hook(lambda module, args, y: outputs.append(y))
    embed.signs.fill_(1)
    total = embed(tokens, torch.arange(40))
    assert len(outputs) == hp.ngrams - 1 == 2
    torch.testing.assert_close(total, outputs[0] + outputs[1])


def test_bigrams_that_share_a_row_have_different_signs(hp):
    """With one row for all bigrams, their embeddings differ in half of the signs, whatever the
    seed, and those without a bigram have one and the same."""
    embeds = [NGramEmbed(replace(hp, ngrams=2, ngram_rows=2, model_dim=512, seed=seed), False)
              for seed in (0, 1)]
    tokens = torch.randint(48, 91, (200,), generator=torch.Generator().manual_seed(0))
    outputs = []
    for embed in embeds:
        torch.nn.init.ones_(embed.tables[0].weight)
        outputs.append(embed(tokens, torch.arange(200) % 50))
    assert torch.equal(*outputs)
    assert outputs[0].abs().min() == outputs[0].abs().max() == 1
    assert torch.equal(outputs[0][0], outputs[0][50])
    agreement = (outputs[0] @ outputs[0].T / 512 - torch.eye(200)).abs()
    bigrams = list(zip(tokens.tolist(), tokens.roll(1).tolist(), strict=True))
    for i in (1, 7, 120):
        others = [j for j in range(200) if j % 50 and bigrams[j] != bigrams[i]]
        assert agreement[i, others].max() < 0.25


def test_tokens_that_differ_in_case_accents_or_white_space_are_one_class():
    vocabulary = (b"a", b"A", "é".encode(), b"e", b" E", b"\xc3", b" ", b"\n\n", b"\t", b"e!", b"")
    assert token_classes(vocabulary) == [0, 0, 2, 2, 2, 5, 6, 6, 6, 9, 10]


def test_the_classes_and_prefixes_of_gpt2_are_the_published_ones():
    """The hash of the classes was published with the idea, as 50,257 little-endian int32."""
    vocabulary = read_vocabulary(TRACKS["fineweb"])
    classes = np.array(token_classes(vocabulary), "<i4")
    assert hashlib.sha256(classes.tobytes()).hexdigest().startswith("79fb57ac259495ba")
    assert len(set(classes.tolist())) == 32_980
    prefixes = prefix_table(vocabulary)
    assert prefixes[50_256] == -1
    for token, prefix in enumerate(prefixes[:2000]):
        longer = [text for text in vocabulary[:50_256]
                  if vocabulary[token].startswith(text) and text != vocabulary[token]]
        assert (max(longer, key=len) if longer else None) == (
            vocabulary[prefix] if prefix >= 0 else None)


# --- Initialization, precision, size --------------------------------------------------------------


@pytest.mark.parametrize("track, padded_vocab_size", [("laptop", 384), ("fineweb", 50_304)])
def test_the_first_loss_is_the_logarithm_of_the_vocabulary_size(hp, track, padded_vocab_size):
    hp = replace(hp, track=track)
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        _, loss = GPT(hp)(tokens, tokens.roll(-1), at_window(64, hp))
    assert loss.item() == pytest.approx(math.log(padded_vocab_size), abs=0.02)


def test_initial_weights_are_the_published_ones(recipe):
    """Matrices are uniform with standard deviation 0.5 / sqrt(in), but 1 / sqrt(in) for the
    pointer's, and the MLP's output matrices zero;
    the head and the embedding are normal with 0.005, value embeddings with 0.01; gates and bigrams
    are zero."""
    model = build_model(replace(recipe, model_dim=128), CPU, torch.float32, flex=False)
    resid = [1.1 ** 0.5] * 2
    branch = [1.0, 1.0, 0.0, 0.05]
    lambdas = {"v_lambda": 0.5, "proj_lambda": 1.0, "skip_lambda": -1.5, "smear_lambda": 0.0,
               "ngram_lambda": 0.05}
    for name, p in model.named_parameters():
        p = p.detach()
        if name.endswith(("qk.weight", "v.weight", "attention.proj.weight", "fc.weight")):
            assert p.std().item() == pytest.approx(0.5 / 128 ** 0.5, rel=0.02), name
            assert p.abs().max().item() == pytest.approx(0.5 * (3 / 128) ** 0.5, rel=0.01), name
        elif name in ("head.linear.weight", "embed.weight"):
            assert p.std().item() == pytest.approx(0.005, rel=0.02), name
            assert p.abs().max() > 0.015, name  # a uniform distribution would not reach that far
        elif name == "value_embed.weight":
            assert p.std().item() == pytest.approx(0.01, rel=0.02)
            assert p.abs().max() > 0.03
        elif name.endswith("resid_lambdas"):
            torch.testing.assert_close(p, torch.tensor(resid))
        elif name.endswith("branch_lambdas"):
            torch.testing.assert_close(p, torch.tensor(branch))
        elif name.endswith("mudd.fc"):
            assert p.shape == (64, 128), name
            assert p.std().item() == pytest.approx((3 * 128) ** -0.5, rel=0.02), name
        elif name == "pointer.qk":
            assert p.shape == (2, 128, 128)
            assert p.std().item() == pytest.approx(128 ** -0.5, rel=0.02)
            assert p.abs().max().item() == pytest.approx((3 / 128) ** 0.5, rel=0.01)
        elif name == "pointer.sink":
            assert p.shape == (128,)
            assert p.std().item() == pytest.approx(128 ** -0.5, rel=0.2)
        elif name == "pointer.gain":
            assert p == 1
        elif name == "readout.mudd.bias":
            torch.testing.assert_close(p / 10, torch.tensor([0, -0.5, 0, 0, 0]))
        elif name.endswith("mudd.bias"):
            expected = torch.tensor([0.0] * 6 + [2.0] * 2 + resid + branch)
            torch.testing.assert_close(p / 10, expected)
        else:
            value = lambdas.get(name.split(".")[-1], 0.0)
            assert (p == value).all(), name
    assert torch.equal(model.embed.weight, model.head.linear.weight[0])


def test_only_the_seed_determines_the_initial_weights(hp):
    def weights(seed):
        torch.rand(3)  # moves the global random state
        model = build_model(replace(hp, seed=seed), CPU, torch.float32, flex=False)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_activations_are_bfloat16_and_weights_float32(recipe):
    """Value and n-gram embeddings have the dtype of the activations. Gradients have the dtype of
    their parameters."""
    model = build_model(recipe, CPU, torch.bfloat16, flex=False)
    seen = []
    for module in model.modules():
        if isinstance(module, Linear):
            module.register_forward_hook(
                lambda module, args, y: seen.append((module.weight.dtype, y.dtype)))
    model.head.register_forward_hook(
        lambda head, args, y: seen.append((head.linear.weight.dtype, args[2].dtype)))
    tokens = random_tokens()[None]
    objective, _ = model(tokens, tokens, Schedule(8, recipe, CPU))
    objective.backward()
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    assert len(seen) == 10 + 11 * 2 + 1  # output of attention, two matrices of each MLP, head
    assert model.value_embed.weight.dtype == torch.bfloat16
    assert model.ngram.tables[0].weight.dtype == torch.bfloat16
    assert model.embed.weight.dtype == torch.float32
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.dtype == p.dtype, name


def test_the_size_of_the_fineweb_model():
    model = build_model(Hyperparameters(), torch.device("meta"), torch.bfloat16, flex=True)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sizes["value_embed.weight"] == 50_304 * 5 * 768
    assert sizes["ngram.tables.0.weight"] == 5 * 50_304 * 768
    assert "ngram.tables.1.weight" not in sizes
    tables = ("embed.weight", "value_embed.weight", "ngram.tables.0.weight")
    without_tables = sum(size for name, size in sizes.items() if name not in tables)
    # V and the output of ten layers, Q and K of 8 narrow and 2 wide ones, 11 MLPs, the head
    matrices = (10 * 2 + 8 * 1 + 2 * 2) * 768 ** 2 + 11 * 2 * 2816 * 768 + 50_304 * 768
    mudd = 2 * 64 * 768 + (14 + 5) * (64 + 1)
    pointer = 2 * 128 * 768 + 128 + 1
    gates_and_scalars = without_tables - matrices - mudd - pointer
    assert 0 < gates_and_scalars < 2000
    assert TRACKS["fineweb"].vocab_size == 50_257
