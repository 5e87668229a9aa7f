"""The recipe's model in float64, computed token by token with loops.

It is written from the specification of modded-nanogpt's script of 2026-05-24, with the differences
that the README of records/candidates/2026-11-30_Pointer declares, and uses nothing of
train_gpt.py. Layers are named by their number here, whereas train_gpt.py keeps them in a table.
In all functions `p` is the dict of the model's parameters, from parameters().
"""
import math

import torch

PAIRED_LAYERS = (0, 2, 5, 9)
LONG_LAYERS = (3, 10)  # the other layers with attention have a short window and narrow heads
NARROW_SCALE = 0.12 / 0.085  # the factor of narrow heads' scores, relative to wide ones
LAYER_WITHOUT_ATTENTION = 6
VALUE_TABLE_OF_LAYER = {1: 0, 2: 1, 8: 2, 9: 3, 10: 4}


def parameters(model) -> dict[str, torch.Tensor]:
    """The model's parameters in float64, by name."""
    return {name: value.detach().double() for name, value in model.named_parameters()}


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def norm(x):
    """RMSNorm over the last dimension, with float32's machine epsilon."""
    return x / (x.square().mean(-1, keepdim=True) + 2**-23).sqrt()


def document_starts(tokens: list[int], eot_token: int) -> list[int]:
    """The position at which each token's document begins."""
    starts = []
    for t, token in enumerate(tokens):
        starts.append(t if t == 0 or token == eot_token else starts[-1])
    return starts


def rotate(x, position: int, frequencies):
    """Rotate x (d,): its first n dimensions, for n frequencies, and the next n are the real and
    imaginary parts of complex numbers, which are multiplied by exp(-i position frequencies). The
    other dimensions, a half of a wide head and none of a narrow one, stay."""
    n = len(frequencies)
    pairs = torch.complex(x[:n], x[n:2 * n])
    rotated = pairs * torch.polar(torch.ones_like(frequencies), -position * frequencies)
    return torch.cat([rotated.real, rotated.imag, x[2 * n:]])


def attend(query, keys, values, scale):
    """The softmax-weighted mean of the values for one query, (d,)."""
    scores = torch.stack([scale * query @ key for key in keys])
    weights = (scores - scores.max()).exp()
    return (weights[:, None] * torch.stack(values)).sum(0) / weights.sum()


def single_heads(q, k, v, starts, window, frequencies, scale, key_offset):
    """Attention within each head. q, k: (T, H, e); v and the result: (T, H, d). key_offset: a key
    takes its dimensions that are not rotated from the token before, if that is in the same
    document."""
    T, H, d = q.shape
    y = torch.zeros_like(v)
    for h in range(H):
        keys = [rotate(k[t, h], t, frequencies) for t in range(T)]
        if key_offset:
            fixed = [key[d // 2:] for key in keys]
            for t in range(T):
                before = t if t == starts[t] else t - 1
                keys[t] = torch.cat([keys[t][:d // 2], fixed[before]])
        for t in range(T):
            seen = [s for s in range(starts[t], t + 1) if t - s <= window]
            query = rotate(q[t, h], t, frequencies)
            y[t, h] = attend(query, [keys[s] for s in seen], [v[s, h] for s in seen], scale)
    return y


def paired_heads(q, k, v, starts, window, frequencies, scale):
    """H heads of T tokens become H / 2 heads of 2 T positions, by viewing (T, H, d) as
    (2 T, H / 2, d). The rotary position of head h at token t is 2 t + (h mod 2), which is not
    always its position in the view."""
    T, H, d = v.shape
    viewed_q = q.reshape(2 * T, H // 2, -1)
    viewed_k = k.reshape(2 * T, H // 2, -1)
    viewed_v = v.reshape(2 * T, H // 2, d)
    y = torch.zeros_like(viewed_v)
    for pair in range(H // 2):
        tokens = []
        queries = []
        keys = []
        for position in range(2 * T):
            t, h = divmod(position * (H // 2) + pair, H)  # before the view
            tokens.append(t)
            queries.append(rotate(viewed_q[position, pair], 2 * t + h % 2, frequencies))
            keys.append(rotate(viewed_k[position, pair], 2 * t + h % 2, frequencies))
        for position in range(2 * T):
            seen = []
            for s in range(position + 1):
                if position - s <= window and tokens[s] >= starts[tokens[position]]:
                    seen.append(s)
            y[position, pair] = attend(
                queries[position], [keys[s] for s in seen], [viewed_v[s, pair] for s in seen],
                scale)
    return y.reshape(T, H, d)


def query_or_key(p, name: str, which: int, x, H: int):
    """Q (which = 0) or K (which = 1) of x (T, D), as (T, H, e). Each matrix of the weight belongs
    to the neighboring heads 2 i and 2 i + 1; a wide one is stored transposed."""
    matrices = p[name + "qk.weight"]
    D = x.size(-1)
    pairs = len(matrices) // 2
    heads = []
    for h in range(H):
        matrix = matrices[which * pairs + h // 2]
        if matrix.shape[1] != D:
            matrix = matrix.T
        e = len(matrix) // 2
        rows_of_head = matrix[h % 2 * e:][:e]
        heads.append(torch.stack([rows_of_head @ row for row in x]))
    return torch.stack(heads, dim=1)


def mudd_weights(p, name: str, x):
    """The weights that MUDD predicts for one token's activation x (D,)."""
    hidden = p[name + "fc"] @ x
    hidden = hidden * (1 + torch.erf(hidden / 2 ** 0.5)) / 2  # GELU
    return 0.1 * (p[name + "proj"] @ hidden + p[name + "bias"])


def attention(p, layer: int, x, value_embed, H: int, starts, windows, frequencies, scale,
              mudd_gates=None, added_to_v=None):
    """One layer's attention. x, the normed input, and the result: (T, D); value_embed: this layer's
    value embeddings (T, D), or None. The last layer has mudd_gates (T, 2) and added_to_v (T, D)."""
    name = f"blocks.{layer}.attention."
    T = len(x)
    if layer not in LONG_LAYERS:
        scale = NARROW_SCALE * scale
    q = norm(query_or_key(p, name, 0, x, H))
    k = norm(query_or_key(p, name, 1, x, H))
    v = torch.stack([p[name + "v.weight"][0] @ row for row in x]).view(T, H, -1)
    v = p[name + "v_lambda"] * v
    for t in range(T):
        if added_to_v is not None:
            v[t] += added_to_v[t].view(H, -1)
        if value_embed is not None:
            for h in range(H):
                if mudd_gates is None:
                    gate_input = torch.cat([x[t, :6], value_embed[t, :6]])
                    gate = 2 * sigmoid(p[name + "value_gate"][h] @ gate_input)
                else:
                    gate = mudd_gates[t, 0 if h < H // 2 else 1]
                v[t, h] += gate * value_embed[t].view(H, -1)[h]
    if layer in PAIRED_LAYERS:
        y = paired_heads(q, k, v, starts, windows["short"], frequencies, scale)
    else:
        is_long = layer in LONG_LAYERS
        window = windows["long" if is_long else "short"]
        y = single_heads(q, k, v, starts, window, frequencies, scale, key_offset=is_long)
        for t in range(T):
            for h in range(H):
                direction = v[t, h] / v[t, h].norm()
                strength = p[name + "xsa_lambdas"][h].tanh()
                y[t, h] -= strength * (y[t, h] @ direction) * direction
    for t in range(T):
        y[t] *= sigmoid(p[name + "gate"] @ x[t, :12])[:, None]
    output_map = p[name + "proj_lambda"] * p[name + "proj.weight"][0]
    return torch.stack([output_map @ row for row in y.reshape(T, -1)])


def mlp(p, layer: int, x):
    """The MLP with ReLU squared."""
    hidden = (x @ p[f"blocks.{layer}.mlp.fc.weight"][0].T).clamp(min=0) ** 2
    return hidden @ p[f"blocks.{layer}.mlp.proj.weight"][0]  # this one is stored as (in, out)


def bigram(tokens: list[int], t: int, starts: list[int], rows: int) -> tuple[int, int]:
    """The rows of the bigram table and of the table of 8,192 signs for token t. A document's first
    token has the last row and the first signs. tokens: their classes; a byte is its own."""
    if t == starts[t]:
        return rows - 1, 0
    code = (36313 * tokens[t]) ^ (27191 * tokens[t - 1])
    return code % (rows - 1), code % 8192


def input_embedding(p, signs, tokens, starts, tied):
    """x0, the bigram embeddings and the input of layer 0, each (T, D)."""
    table = p["head.linear.weight"][0] if tied else p["embed.weight"]
    embed = table[tokens]
    bigram_table = p["ngram.tables.0.weight"]
    x0 = []
    bigrams = []
    for t in range(len(tokens)):
        gate = sigmoid(p["input_embedding.smear_gate"][0] @ embed[t, :12])
        smear = p["input_embedding.smear_lambda"] * gate
        x0.append(norm(embed[t] if t == starts[t] else embed[t] + smear * embed[t - 1]))
        row, row_of_signs = bigram(tokens, t, starts, len(bigram_table))
        bigrams.append(bigram_table[row] * signs[row_of_signs])
    x0 = torch.stack(x0)
    bigrams = torch.stack(bigrams)
    return x0, bigrams, x0 + p["input_embedding.ngram_lambda"] * bigrams


def pointer(p, states, tokens: list[int], starts: list[int], window: int, vocab_size: int):
    """The pointer's shares of votes for each vocabulary entry, (T, V), and of the sink, (T, 1)."""
    d = p["pointer.qk"].shape[1]
    votes = torch.zeros(len(tokens), vocab_size, dtype=torch.float64)
    sinks = []
    for t in range(len(tokens)):
        query = p["pointer.gain"] * norm(p["pointer.qk"][0] @ states[t]) / d ** 0.5
        earlier = [j for j in range(starts[t], t) if t - j <= window]
        scores = [query @ norm(p["pointer.qk"][1] @ states[j]) for j in earlier]
        shares = torch.stack([*scores, query @ p["pointer.sink"]]).exp()
        shares = shares / shares.sum()
        for j, share in zip(earlier, shares[:-1], strict=True):
            votes[t, tokens[j]] += share
        sinks.append(shares[-1:])
    return votes, torch.stack(sinks)


def probabilities(logits, votes, sinks, gate: int):
    """The mixture of softmax and pointer, (T, V); entry `gate` is no token and has none."""
    softmax = logits.exp() / logits.exp().sum(-1, keepdim=True)
    p = torch.zeros_like(softmax)
    for t, s in enumerate(softmax):
        alpha = s[gate]
        without_gate = s / (s.sum() - alpha)
        without_gate[gate] = 0
        p[t] = (1 - alpha) * without_gate + alpha * (votes[t] + sinks[t] * without_gate)
    return p


def predict(model, tokens: list[int], eot_token: int, windows: dict[str, int], frequencies,
            scale: float, tied: bool):
    """The logits of one sequence and the probabilities of the next token, (T, V) each."""
    p = parameters(model)
    H = model.hp.num_heads
    starts = document_starts(tokens, eot_token)
    frequencies = frequencies.double()
    signs = model.ngram.signs.double()
    x0, bigrams, h0 = input_embedding(p, signs, tokens, starts, tied)
    values = p["value_embed.weight"][tokens].chunk(5, dim=-1)
    x = h0
    outputs = []
    for layer in range(11):
        mudd_gates = added_to_v = None
        if layer == 10:
            weights = torch.stack([mudd_weights(p, "blocks.10.mudd.", row) for row in x])
            m = [weights[:, i:i + 1] for i in range(14)]
            before = x
            added_to_v = m[0] * h0 + m[1] * outputs[7] + m[2] * before
            mudd_gates = weights[:, 6:8]
            x = (1 + m[5]) * before + m[3] * h0 + m[4] * outputs[7]
            resid = m[8:10]
            branch = m[10:]
        else:
            resid = p[f"blocks.{layer}.resid_lambdas"]
            branch = p[f"blocks.{layer}.branch_lambdas"]
        if layer == 6:
            gate = 2 * sigmoid(x0[:, :12] @ p["blocks.6.skip_gate"].T)
            x = x + sigmoid(p["blocks.6.skip_lambda"]) * gate * outputs[3]
        if layer != LAYER_WITHOUT_ATTENTION:
            value_embed = None
            if layer in VALUE_TABLE_OF_LAYER:
                value_embed = values[VALUE_TABLE_OF_LAYER[layer]]
            attn_input = norm(outputs[7] if layer in (8, 9, 10) else x)
            y = attention(p, layer, attn_input, value_embed, H, starts, windows, frequencies, scale,
                          mudd_gates, added_to_v)
            x = resid[0] * x + branch[0] * y + branch[2] * x0
            if layer > 0:  # layer 0 has them in its input
                x = x + branch[3] * bigrams
        x = resid[1] * x + branch[1] * mlp(p, layer, norm(x))
        outputs.append(x)
    weights = torch.stack([mudd_weights(p, "readout.mudd.", row) for row in x])
    sources = [outputs[3], outputs[7], outputs[9], h0, values[0]]
    for i, source in enumerate(sources):
        x = x + weights[:, i:i + 1] * source
    states = norm(x)
    logits = 23 * sigmoid((states @ p["head.linear.weight"][0].T + 5) / 7.5)
    votes, sinks = pointer(p, states, tokens, starts, windows["pointer"], logits.shape[1])
    return logits, probabilities(logits, votes, sinks, gate=eot_token + 1)


def yarn(windows: list[int], num_frequencies: int, scale: float = 0.085):
    """The rotary frequencies in radians per token, and the factor of the attention scores, after
    the windows of all stages so far."""
    frequencies = [1024 ** (-j / (num_frequencies - 1)) for j in range(num_frequencies)]
    for old, new in zip(windows, windows[1:], strict=False):
        for j, frequency in enumerate(frequencies):
            rotations = old * frequency / (2 * math.pi)
            keep = min(max((rotations - 1) / 31, 0), 1)
            frequencies[j] = frequency * (old / new + keep * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
    return torch.tensor(frequencies), scale
