"""The recipe's optimizers in float64, computed parameter by parameter.

They are written from the specification of modded-nanogpt's script of 2026-05-24 and use nothing of
train_gpt.py. MUDD's matrices do not decay, which is a declared difference. Learning rates, decays
and betas stand here by the names of the parameters.
"""
import re

import torch

POLYNOMIALS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]
MUON_LR = 0.023
MUON_DECAY = 1.2
MUON_LR_FACTORS = {r"attention\.(qk|v|proj)": 1, r"mlp\.fc": 2, r"mlp\.proj": 4}
ADAM_DECAY = 0.005
ADAM_SETTINGS = {  # learning rate, beta1, beta2, factor of the decay
    r"head\.linear\.weight|embed\.weight": (0.008, 0.5, 0.95, 150),
    r"value_embed\.weight": (0.6, 0.75, 0.95, 5),
    r"ngram\.tables\..*": (0.6, 0.75, 0.95, 5),
    r".*resid_lambdas": (0.04, 0.9, 0.95, 0),
    r".*(branch|xsa)_lambdas|input_embedding\.ngram_lambda": (0.008, 0.9, 0.95, 0),
    r".*(v|proj|skip|smear)_lambda": (0.04, 0.9, 0.99, 0),
    r".*attention\.(value_)?gate|pointer\.qk": (0.008, 0.9, 0.99, 1),
    r"pointer\.(sink|gain)": (0.008, 0.9, 0.99, 0),
    r".*skip_gate": (0.008 * 0.05, 0.9, 0.99, 0),
    r".*smear_gate": (0.008 * 0.01, 0.9, 0.99, 0),
    r".*mudd\..*": (0.008 * 0.25, 0.9, 0.99, 0)}


# Tensors that are averaged, and that keep their norm as a whole.
AVERAGE_KINDS = (r"head\.linear\.weight", r"embed\.weight", r".*attention\.qk\.weight",
                 r".*attention\.(v|proj)\.weight", r".*mlp\.(fc|proj)\.weight")


def average_kind(name):
    """The one of AVERAGE_KINDS that matches a parameter's name, or None."""
    for kind in AVERAGE_KINDS:
        if re.fullmatch(kind, name):
            return kind
    return None


def polar_express(matrix):
    """The matrix with its singular values mapped by the five polynomials, one after the other."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / (1.02 * s.square().sum().sqrt() + 1e-6)
    for a, b, c in POLYNOMIALS:
        s = a * s + b * s ** 3 + c * s ** 5
    return u @ s.diag() @ vh


def normalize_rows(direction, second_moment, beta2=0.9):
    """NorMuon: divide each row by its running root mean square, then scale the matrix back to its
    Frobenius norm. Returns the matrix and the running mean squares. A mean square counts as at
    least 1e-10, so its root as at least 1e-5."""
    rows = []
    for i, row in enumerate(direction):
        second_moment[i] = beta2 * second_moment[i] + (1 - beta2) * (row ** 2).mean()
        rows.append(row / max(second_moment[i].item(), 1e-10) ** 0.5)
    normalized = torch.stack(rows)
    scale = (direction ** 2).sum().sqrt() / (normalized ** 2).sum().sqrt()
    return normalized * scale, second_moment


def adam_step(grad, m, v, t, beta1, beta2):
    """Adam's t-th step, counted from 1, before the learning rate. m and v change in place. The
    epsilon is added before the bias correction."""
    m[...] = beta1 * m + (1 - beta1) * grad
    v[...] = beta2 * v + (1 - beta2) * grad ** 2
    correction = (1 - beta2 ** t) ** 0.5 / (1 - beta1 ** t)
    return correction * m / (v.sqrt() + 1e-10)


def muon_lr_factor(name):
    """The factor of MUON_LR for a parameter, with MLPs of four times the model's width; None if it
    is not one of Muon's."""
    for pattern, factor in MUON_LR_FACTORS.items():
        if re.search(pattern + r"\.weight$", name):
            return factor
    return None


def adam_settings(name):
    """(learning rate, beta1, beta2, factor of the decay) of the one pattern that matches."""
    (settings,) = [s for pattern, s in ADAM_SETTINGS.items() if re.fullmatch(pattern, name)]
    return settings


class ReferenceOptimizer:
    """Muon and Adam. values and moments are dicts by the parameters' names; Muon's matrices have
    the shape (parts, rows, columns)."""

    def __init__(self, model):
        self.values = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        self.moments = {}
        self.averages = {}
        self.grad_sums = {}
        self.steps = 0

    def untie(self):
        """The embedding becomes a copy of the head, with its moments."""
        self.values["embed.weight"] = self.values["head.linear.weight"][0].clone()
        head_moments = self.moments["head.linear.weight"]
        self.moments["embed.weight"] = [moment[0].clone() for moment in head_moments]
        if self.averages:
            self.averages["embed.weight"] = self.averages["head.linear.weight"][0].clone()

    def step(self, grads, lr_scale, momentum, fast_decay, fast_weight):
        """grads: by name, of the loss summed over the tokens of a step and divided by 8. lr_scale:
        the schedule's factor of all learning rates. momentum, fast_decay and fast_weight: Muon's.
        Adam updates in every second step with the summed gradients."""
        self.steps += 1
        for name, grad in grads.items():
            if muon_lr_factor(name):
                self.muon(name, grad.double(), lr_scale, momentum, fast_decay, fast_weight)
            else:
                self.grad_sums[name] = self.grad_sums.get(name, 0) + grad.double()
        if self.steps % 2 == 0:
            for name, grad in self.grad_sums.items():
                self.adam(name, grad, self.steps // 2, lr_scale)
            self.grad_sums = {}

    def update_averages(self, weight):
        """Every fourth step of the tail; weight: 4 / tau. The first time the averages are
        copies."""
        for name in self.values:
            if average_kind(name):
                old = self.averages.get(name, self.values[name])
                self.averages[name] = (1 - weight) * old + weight * self.values[name]

    def use_averages(self):
        """Half average, half last value, with the norm that all values of a kind had together."""
        blends = {name: (self.values[name] + average) / 2
                  for name, average in self.averages.items()}
        for kind in AVERAGE_KINDS:
            names = [name for name in blends if average_kind(name) == kind]
            before = sum(self.values[name].square().sum() for name in names) ** 0.5
            after = sum(blends[name].square().sum() for name in names) ** 0.5
            for name in names:
                self.values[name] = blends[name] * before / after
        self.averages = {}

    def muon(self, name, grad, lr_scale, momentum, fast_decay, fast_weight):
        lr = MUON_LR * muon_lr_factor(name) * lr_scale
        decay = MUON_LR * lr_scale * MUON_DECAY
        if name not in self.moments:
            second_moments = torch.zeros(grad.shape[:2], dtype=torch.double)
            self.moments[name] = [torch.zeros_like(grad), torch.zeros_like(grad), second_moments]
        fast, slow, second_moments = self.moments[name]
        parts = self.values[name]
        for i in range(len(parts)):
            fast[i] = fast_decay * fast[i] + (1 - fast_decay) * grad[i]
            slow[i] = 0.98 * slow[i] + 0.02 * grad[i]
            mean = fast_weight * fast[i] + (1 - fast_weight) * slow[i]
            update = polar_express((1 - momentum) * grad[i] + momentum * mean)
            update, second_moments[i] = normalize_rows(update, second_moments[i])
            shrinks = update * parts[i] >= 0
            parts[i] = parts[i] - lr * (update + decay * shrinks * parts[i])

    def adam(self, name, grad, t, lr_scale):
        lr, beta1, beta2, decay_factor = adam_settings(name)
        lr = lr * lr_scale
        if name not in self.moments:
            self.moments[name] = [torch.zeros_like(grad), torch.zeros_like(grad)]
        m, v = self.moments[name]
        update = lr * adam_step(grad, m, v, t, beta1, beta2)
        value = self.values[name]
        shrinks = update * value > 0
        self.values[name] = value - update - lr ** 2 * ADAM_DECAY * decay_factor * shrinks * value
