"""Does `AleatoricEnsemble` tell noise of labels from ignorance? Both are planted; people vote by the heads' own law.

    python benchmarks/label_noise.py

Eight standard normal features; μ and the logarithm of τ² are linear in them. Pairs are judged by some people each,
and the share that prefers a response is the label. Reported over 500 other responses: rank correlation with the true
μ and τ², and the mean of both variances, in units of the reward's spread squared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_vapo.functional import noise_variance, noisy_log_odds, spearman
from lit_vapo.rewards.members import AleatoricEnsemble
from lit_vapo.types import FeaturePairs, PairLabels

WIDTH, STEPS, RATE = 8, 300, 0.02


def rows(count: int, seed: int) -> Tensor:
    """Standard normal rows (count, WIDTH)."""
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


# A standard deviation of 1 for log τ², and of 2.5 for μ.
REWARD = 2.5 * torch.nn.functional.normalize(rows(1, 1)[0], dim=0)
NOISE = torch.nn.functional.normalize(rows(1, 2)[0], dim=0)


def judged(count: int, votes: int, seed: int) -> FeaturePairs:
    """Pairs of responses, each judged by so many people."""
    a, b = rows(count, seed), rows(count, seed + 1)
    probability = noisy_log_odds(a @ REWARD, b @ REWARD, a @ NOISE, b @ NOISE).sigmoid()
    draws = torch.rand(count, votes, generator=torch.Generator().manual_seed(seed + 2))
    share = (draws < probability[:, None]).float().mean(1)
    swap = (share < 0.5)[:, None]
    labels = PairLabels(torch.zeros(count), share.maximum(1 - share), torch.ones(count), torch.arange(count))
    return FeaturePairs(torch.where(swap, b, a), torch.where(swap, a, b), labels)


def learned(pairs: FeaturePairs, anchor: float) -> AleatoricEnsemble:
    """Ten members that have learned from the pairs, calibrated."""
    head = AleatoricEnsemble(10, anchor=anchor)
    head.build(WIDTH)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        head.loss(*pairs).backward()
        optimizer.step()
    head.requires_grad_(False).calibrate(rows(500, 7))
    return head


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    x = rows(500, 7)
    true = noise_variance(x @ NOISE) / (x @ REWARD).var()
    print("| pairs, votes | anchor | ρ of μ | ρ of τ² | epistemic | aleatoric | true |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for count, votes in ((400, 20), (2000, 1), (400, 1)):
        for anchor in (0.0003, 0.003, 0.03):
            found = learned(judged(count, votes, 100), anchor)(x)
            assert found.aleatoric is not None
            figures = [
                spearman(found.mean, x @ REWARD),
                spearman(found.aleatoric, true),
                *(variance.mean() for variance in (found.variance, found.aleatoric, true)),
            ]
            print(f"| {count}, {votes} | {anchor} | " + " | ".join(f"{float(value):.3f}" for value in figures) + " |")


if __name__ == "__main__":
    main()
