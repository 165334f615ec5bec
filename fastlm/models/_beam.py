"""Beam search over any model that gives the logits of the next token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]


def beam_search(
    step: Step,
    batch: int,
    beams: int,
    bos: int,
    eos: int,
    pad: int | None,
    steps: int,
    length_penalty: float,
    device: torch.device,
) -> Tensor:
    """The best hypothesis found of each of B = batch sources: argmax of log p(y) / len(y)^length_penalty, eos counted.

    Each step keeps the K = beams best prefixes of a source. A continuation by eos is a hypothesis where it is among the
    K best of all K * V; after the last step every prefix is one. A source is done when no prefix can come to beat its
    best hypothesis: sums of log-probabilities only fall, and are divided by steps^length_penalty at most. This is
    transformers' search under early_stopping="never". Wu et al. 2016 (arXiv:1609.08144, section 7) divide by
    ((5 + len) / 6)^length_penalty instead, without coverage penalty otherwise the same.

    Args:
        step: (prefixes (B * K, L) with bos first, rows (B * K,)) -> logits (B * K, V) of the token after each; prefix i
            is prefix rows[i] of the call before and one token more.
        pad: a token that no hypothesis has, if there is one; its probability stays its own.
        steps: most tokens of a hypothesis, at least 1.
        length_penalty: 0 takes the most probable; above 0 longer ones gain.

    Returns:
        (B, L) int64 without bos, L the longest's length; shorter ones are filled up with eos.
    """
    seen = torch.full((batch * beams, 1), bos, device=device)
    scores = torch.full((batch, beams), float("-inf"), device=device)
    scores[:, 0] = 0.0  # all prefixes are the same: one is enough
    rows = torch.arange(batch * beams, device=device)
    first = rows[::beams, None]  # (B, 1), each source's first row
    best = torch.full((batch, steps), eos, device=device)
    best_score = torch.full((batch,), float("-inf"), device=device)
    for length in range(1, steps + 1):
        gained = step(seen, rows).float().log_softmax(-1)  # (B*K, V)
        if pad is not None:
            gained[:, pad] = float("-inf")
        V = gained.shape[1]
        total = (scores.view(-1, 1) + gained).view(batch, beams * V)
        # at most K of 2 K candidates are continuations by eos, so that K others are left
        found, index = total.topk(min(2 * beams, beams * V))  # (B, 2K), best first
        source_rows, token = first + index // V, index % V
        ended = (token == eos) | (length == steps)
        final = found[:, :beams].masked_fill(~ended[:, :beams], float("-inf")) / length**length_penalty
        score, at = final.max(1)
        better = score > best_score
        new = torch.cat((seen[source_rows.gather(1, at[:, None])[:, 0], 1:], token.gather(1, at[:, None])), 1)
        best_score = torch.where(better, score, best_score)
        best[:, :length] = torch.where(better[:, None], new, best[:, :length])
        best[:, length:] = best[:, length:].masked_fill(better[:, None], eos)
        scores, at = found.masked_fill(ended, float("-inf")).topk(beams)  # (B, K)
        reachable = scores[:, 0] / (steps if length_penalty > 0 else length + 1) ** length_penalty
        if bool((best_score >= reachable).all()):
            break
        rows = source_rows.gather(1, at).view(-1)
        seen = torch.cat((seen[rows], token.gather(1, at).view(-1, 1)), 1)
    return best[:, : lengths(best, eos).max()]


def lengths(tokens: Tensor, eos: int) -> Tensor:
    """(B,): tokens (B, L) up to and with the first eos, or L where there is none."""
    ended = tokens == eos
    return torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1])
