"""The attention mask by its rule, and random documents to evaluate it on.

The rule: a query sees a key if the key is not later, in the same document, and at most `window`
positions back. With its own position, a query so sees up to window + 1 keys, as FlashAttention
counts.
"""
import torch

EOT = 9  # the end-of-text token of the documents, which begins each of them


def random_tokens(T: int, seed: int, mean_length: int = 40) -> torch.Tensor:
    """(T,) tokens below 10, in documents of mean_length tokens on average."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(EOT, (T,), generator=generator)
    tokens[torch.rand(T, generator=generator) < 1 / mean_length] = EOT
    return tokens


def rule(tokens: torch.Tensor, window: int) -> torch.Tensor:
    """The mask (T, T) of one sequence (T,), evaluated pair by pair."""
    document = []
    count = 0
    for token in tokens.tolist():
        count += token == EOT
        document.append(count)
    T = len(tokens)
    mask = []
    for q in range(T):
        mask.append([k <= q and document[q] == document[k] and q - k <= window for k in range(T)])
    return torch.tensor(mask)
