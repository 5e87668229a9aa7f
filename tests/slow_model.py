"""The model of the public record of 2026-05-07, written out token by token in float64 from its specification.

Layers, heads and windows are named here by number, as the specification does; train_gpt.py has them in tables. `p` is a
dict of the model's parameters.
"""
import math

import torch

PAIRED, LONG, WITHOUT = (0, 2, 5, 9), (3, 10), 6       # by the layer's number; all others: a short window
TABLE_OF_LAYER = {1: 0, 2: 1, 8: 2, 9: 3, 10: 4}        # of value embeddings


def parameters(model) -> dict[str, torch.Tensor]:
    """A model's, in float64."""
    return {name: value.detach().double() for name, value in model.named_parameters()}


def sigma(x):
    return 1 / (1 + (-x).exp())


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 2**-23).sqrt()  # the eps of float32


def documents(tokens: list[int], eot: int) -> list[int]:
    """Where each token's document begins."""
    starts = []
    for t, token in enumerate(tokens):
        starts.append(t if t == 0 or token == eot else starts[-1])
    return starts


def turn(x, position: int, theta):
    """x (d,): its first two quarters as complex numbers, turned by -position theta. The other half stays."""
    quarter = len(x) // 4
    turned = torch.complex(x[:quarter], x[quarter:2 * quarter]) * torch.polar(torch.ones_like(theta), -position * theta)
    return torch.cat([turned.real, turned.imag, x[2 * quarter:]])


def softmax_of(query, keys, values, scale):
    """One query's mean of the values, (d,)."""
    scores = torch.stack([scale * query @ key for key in keys])
    weights = (scores - scores.max()).exp()
    return (weights[:, None] * torch.stack(values)).sum(0) / weights.sum()


def single_heads(q, k, v, starts, window, theta, scale, offset):
    """q, k, v, result: (T, H, d). offset: keys take the dimensions that do not turn from the token before."""
    (T, H, d), y = q.shape, torch.zeros_like(q)
    for h in range(H):
        keys = [turn(k[t, h], t, theta) for t in range(T)]
        if offset:
            still = [key[d // 2:] for key in keys]
            keys = [torch.cat([keys[t][:d // 2], still[t if t == starts[t] else t - 1]]) for t in range(T)]
        for t in range(T):
            seen = range(max(starts[t], t - window + 1), t + 1)
            query = turn(q[t, h], t, theta)
            y[t, h] = softmax_of(query, [keys[s] for s in seen], [v[s, h] for s in seen], scale)
    return y


def paired_heads(q, k, v, starts, window, theta, scale):
    """Heads 2 i and 2 i + 1 of each token become two positions of one head over 2 T positions, 2 t + member."""
    (T, H, _), y = q.shape, torch.zeros_like(q)
    for first in range(H // 2):
        at = [(position // 2, 2 * first + position % 2) for position in range(2 * T)]
        for position, (t, h) in enumerate(at):
            seen = [s for s in range(2 * T) if s <= position and position - s < window and at[s][0] >= starts[t]]
            y[t, h] = softmax_of(turn(q[t, h], position, theta), [turn(k[at[s]], s, theta) for s in seen],
                                 [v[at[s]] for s in seen], scale)
    return y


def query_or_key(p, name: str, which: int, x, H: int):
    """(T, H, d) of Q (which = 0) or K (1). A matrix is that of the heads 2 i and 2 i + 1; a narrow one lies on its side."""
    matrices = p[name + "qk.weight"]
    D, pairs = x.size(-1), len(matrices) // 2
    heads = []
    for h in range(H):
        matrix = matrices[which * pairs + h // 2]
        matrix = matrix if matrix.shape == (D // pairs, D) else matrix.T
        heads.append(torch.stack([matrix[h % 2 * (D // H):][:D // H] @ row for row in x]))
    return torch.stack(heads, dim=1)


def coefficients(p, name: str, row):
    """MUDD's, of one token's stream (D,)."""
    hidden = p[name + "fc"] @ row
    hidden = hidden * (1 + torch.erf(hidden / 2 ** 0.5)) / 2
    return 0.1 * (p[name + "proj"] @ hidden + p[name + "bias"])


def attention(p, layer: int, x, value, H: int, starts, windows, theta, scale, value_gates=None, more=None):
    """x, the input after the norm, and result: (T, D); value: this layer's value embeddings (T, D), or None; value_gates
    (T, 2) and more (T, D), added to the values: those of MUDD, in the last layer."""
    name, T = f"blocks.{layer}.attention.", len(x)
    q, k = (query_or_key(p, name, which, x, H) for which in (0, 1))
    v = p[name + "value_scale"] * torch.stack([p[name + "v.weight"][0] @ row for row in x]).view(T, H, -1)
    for t in range(T):
        if more is not None:
            v[t] += more[t].view(H, -1)
        if value is not None:
            for h in range(H):
                if value_gates is None:
                    gate = 2 * sigma(p[name + "value_gate"][h] @ torch.cat([x[t, :6], value[t, :6]]))
                else:
                    gate = value_gates[t, 0 if h < H // 2 else 1]
                v[t, h] += gate * value[t].view(H, -1)[h]
    q, k = norm(q), norm(k)
    if layer in PAIRED:
        record = [i + member * H // 2 for i in range(H // 2) for member in range(2)]  # its heads, by our numbers
        y = torch.zeros_like(v)
        y[:, record] = paired_heads(q, k, v[:, record], starts, windows["short"], theta, scale)
    else:
        window = windows["long" if layer in LONG else "short"]
        y = single_heads(q, k, v, starts, window, theta, scale, offset=layer in LONG)
        for t in range(T):
            for h in range(H):
                along = v[t, h] / v[t, h].norm()
                y[t, h] -= p[name + "xsa_scale"][h].tanh() * (y[t, h] @ along) * along
    for t in range(T):
        y[t] *= sigma(p[name + "gate"] @ x[t, :12])[:, None]
    return torch.stack([p[name + "proj.weight"][0] @ row for row in y.reshape(T, -1)])


def mlp(p, layer: int, x):
    hidden = (x @ p[f"blocks.{layer}.mlp.fc.weight"][0].T).clamp(min=0) ** 2
    return hidden @ p[f"blocks.{layer}.mlp.proj.weight"][0]  # this one is stored (in, out)


def bigram_row(tokens: list[int], t: int, starts: list[int], rows: int) -> int:
    """The first token of a document has the last row."""
    if t == starts[t]:
        return rows - 1
    return ((36313 * tokens[t]) ^ (27191 * tokens[t - 1])) % (rows - 1)


def stream_at_the_start(p, tokens, starts, tied):
    """x0, the bigrams' embeddings and what the first layer gets, (T, D)."""
    table = p["head.linear.weight"][0] if tied else p["embed.weight"]
    e, bigrams = table[tokens], p["ngram.tables.0.weight"]
    x0 = []
    for t in range(len(tokens)):
        smear = p["stem.smear_scale"] * sigma(p["stem.smear_gate"][0] @ e[t, :12])
        x0.append(norm(e[t] if t == starts[t] else e[t] + smear * e[t - 1]))
    x0 = torch.stack(x0)
    ngram = torch.stack([bigrams[bigram_row(tokens, t, starts, len(bigrams))] for t in range(len(tokens))])
    return x0, ngram, x0 + p["stem.ngram_scale"] * ngram


def logits(model, tokens: list[int], eot: int, windows: dict[str, int], theta, scale: float, tied: bool):
    """(T, V) of one sequence."""
    p, H, starts, theta = parameters(model), model.hp.num_heads, documents(tokens, eot), theta.double()
    x0, ngram, x = stream_at_the_start(p, tokens, starts, tied)
    values, outputs, h0 = p["value_embed.weight"][tokens].chunk(5, dim=-1), [], x
    for layer in range(11):
        gates = more = None
        if layer == 10:
            c, before = torch.stack([coefficients(p, "blocks.10.mudd.", row) for row in x]), x
            m = [c[:, i:i + 1] for i in range(14)]
            more, gates = m[0] * h0 + m[1] * outputs[7] + m[2] * before, c[:, 6:8]
            x = (1 + m[5]) * before + m[3] * h0 + m[4] * outputs[7]
            residual, branch = m[8:10], m[10:]
        else:
            residual, branch = p[f"blocks.{layer}.residual_scale"], p[f"blocks.{layer}.branch_scale"]
        if layer == 6:
            gate = 2 * sigma(x0[:, :12] @ p["blocks.6.skip_gate"].T)
            x = x + sigma(p["blocks.6.skip_scale"]) * gate * outputs[3]
        if layer != WITHOUT:
            value = values[TABLE_OF_LAYER[layer]] if layer in TABLE_OF_LAYER else None
            read = norm(outputs[7] if layer in (8, 9, 10) else x)
            y = attention(p, layer, read, value, H, starts, windows, theta, scale, gates, more)
            x = residual[0] * x + branch[0] * y + branch[2] * x0 + branch[3] * ngram
        x = residual[1] * x + branch[1] * mlp(p, layer, norm(x))
        outputs.append(x)
    c = torch.stack([coefficients(p, "head.mudd.", row) for row in x])
    for i, source in enumerate([outputs[3], outputs[7], outputs[9], h0, values[0]]):
        x = x + c[:, i:i + 1] * source
    return 23 * sigma((norm(x) @ p["head.linear.weight"][0].T + 5) / 7.5)


def yarn(windows: list[int], frequencies: int, scale: float = 0.1):
    """Angles a token and the scores' factor after a run's windows so far."""
    theta = [1024 ** (-j / (frequencies - 1)) for j in range(frequencies)]
    for old, new in zip(windows, windows[1:], strict=False):
        for j, angle in enumerate(theta):
            turns = old * angle / (2 * math.pi)
            a = min(max((turns - 1) / 31, 0), 1)
            theta[j] = angle * (old / new + a * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
    return torch.tensor(theta), scale
