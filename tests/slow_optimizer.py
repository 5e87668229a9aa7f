"""The optimizers of the public record of 2026-05-07, parameter by parameter in float64 from their specification.

Rates, decays and betas stand here by the names of the parameters, as the specification has them.
"""
import re

import torch

POLYNOMIALS = [(8.156554524902461, -22.48329292557795, 15.878769915207462),
               (4.042929935166739, -2.808917465908714, 0.5000178451051316),
               (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
               (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
               (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]
MUON = {r"attention\.(qk|v|proj)": 1, r"mlp\.fc": 2, r"mlp\.proj": 4}  # times 0.023
ADAM = {  # rate, beta1, beta2, factor of the decay
    r"head\.linear\.weight|embed\.weight": (0.008, 0.5, 0.95, 150), r"value_embed\.weight": (0.6, 0.75, 0.95, 5),
    r"ngram\.tables\..*": (0.6, 0.75, 0.95, 5), r".*residual_scale": (0.04, 0.9, 0.95, 0),
    r".*(branch|xsa)_scale|stem\.ngram_scale": (0.008, 0.9, 0.95, 0),
    r".*(value|skip|smear)_scale": (0.04, 0.9, 0.99, 0),
    r".*attention\.(value_)?gate": (0.008, 0.9, 0.99, 0), r".*skip_gate": (0.008 * 0.05, 0.9, 0.99, 0),
    r".*smear_gate": (0.008 * 0.01, 0.9, 0.99, 0), r".*mudd\..*": (0.008 * 0.25, 0.9, 0.99, 0)}


def polar_express(matrix):
    """By its singular values: each is mapped by the five polynomials in turn."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / (1.02 * s.square().sum().sqrt() + 1e-6)
    for a, b, c in POLYNOMIALS:
        s = a * s + b * s ** 3 + c * s ** 5
    return u @ s.diag() @ vh


def rows_evened(direction, second, beta2=0.9):
    """NorMuon: (the direction with each row divided by its running root mean square, brought back to its Frobenius
    norm; the running mean squares)."""
    rows = []
    for i, row in enumerate(direction):
        second[i] = beta2 * second[i] + (1 - beta2) * (row ** 2).mean()
        rows.append(row / second[i].sqrt())
    even = torch.stack(rows)
    return even * (direction ** 2).sum().sqrt() / (even ** 2).sum().sqrt(), second


def muon_settings(name):
    """The factor of a matrix's rate; None: it is not Muon's."""
    return next((factor for pattern, factor in MUON.items() if re.search(pattern + r"\.weight$", name)), None)


def adam_settings(name):
    """Of the one pattern that matches."""
    (found,) = [settings for pattern, settings in ADAM.items() if re.fullmatch(pattern, name)]
    return found


class SlowOptimizer:
    """values and moments: dicts by the parameters' names. Matrices stand as (parts, rows, columns)."""

    def __init__(self, model):
        self.values = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        self.moments, self.sums, self.steps = {}, {}, 0

    def untie(self):
        """The embedding is a copy of the head from here, moments too."""
        self.values["embed.weight"] = self.values["head.linear.weight"][0].clone()
        self.moments["embed.weight"] = [moment[0].clone() for moment in self.moments["head.linear.weight"]]

    def step(self, grads, factor, momentum):
        """factor: the schedule's, of all rates. Adam steps in every second step, on the sum of the gradients."""
        self.steps += 1
        for name, grad in grads.items():
            if muon_settings(name):
                self.muon(name, grad.double(), factor, momentum)
            else:
                self.sums[name] = self.sums.get(name, 0) + grad.double()
        if self.steps % 2 == 0:
            for name, grad in self.sums.items():
                self.adam(name, grad, self.steps // 2, factor)
            self.sums = {}

    def muon(self, name, grad, factor, momentum):
        rate, group_rate = 0.023 * muon_settings(name) * factor, 0.023 * factor
        parts, (buffers, seconds) = self.values[name], self.moments.setdefault(
            name, [torch.zeros_like(grad), torch.zeros(grad.shape[:2], dtype=torch.double)])
        for i in range(len(parts)):
            buffers[i] = momentum * buffers[i] + (1 - momentum) * grad[i]
            o = polar_express((1 - momentum) * grad[i] + momentum * buffers[i])
            o, seconds[i] = rows_evened(o, seconds[i])
            parts[i] = parts[i] - rate * (o + group_rate * 1.2 * (o * parts[i] > 0) * parts[i])

    def adam(self, name, grad, t, factor):
        rate, beta1, beta2, decay = adam_settings(name)
        rate, (m, v) = rate * factor, self.moments.setdefault(name, [torch.zeros_like(grad), torch.zeros_like(grad)])
        m[...] = beta1 * m + (1 - beta1) * grad
        v[...] = beta2 * v + (1 - beta2) * grad ** 2
        u, p = rate * (m / (1 - beta1 ** t)) / ((v / (1 - beta2 ** t)).sqrt() + 1e-10), self.values[name]
        self.values[name] = p - u - rate ** 2 * 0.005 * decay * (u * p > 0) * p
