"""Search for the likeliest sequences of a model that scores the next token: with several beams, or one (greedy)."""

import torch

from policy.sequence.stepping import rows_of


def check_beams(beams):
    """Raise ValueError for a number of beams below 1."""
    if beams < 1:
        raise ValueError(f"beams: got {beams}, allowed: 1 and more")


@torch.no_grad()
def beam_search(step, state, count, *, start, end, most, beams=4, length_penalty=1.0, device="cpu"):
    """Likely sequences, best first: a list of ``count`` lists of up to ``beams`` (score, tokens).

    step(tokens (n,), state) -> (scores (n, V), state) continues n = count x beams rows; ``state`` has count of them.
    Tokens come without ``start`` and ``end``, fewer than ``most`` of them. A score is the sum of log probabilities,
    the end's too, over the number of tokens with the end ** length_penalty. As in fairseq, a sequence is done when
    ``beams`` of its candidates have ended, each among the best ``beams`` of its length; one beam is greedy search.
    Raises ValueError for less than one beam.
    """
    check_beams(beams)
    state = rows_of(state, torch.arange(count, device=device).repeat_interleave(beams))
    tokens = torch.full((count, beams, 1), start, device=device)
    scores = torch.full((count, beams), -torch.inf, device=device)
    scores[:, 0] = 0  # all beams are the same yet
    ended = [[] for _ in range(count)]
    for length in range(1, most + 1):
        logits, state = step(tokens[:, :, -1].flatten(), state)
        totals = scores[..., None] + logits.float().log_softmax(dim=-1).unflatten(0, (count, beams))
        if length == most:
            totals[..., torch.arange(totals.shape[-1], device=device) != end] = -torch.inf
        best, place = totals.flatten(1).topk(2 * beams, dim=1)
        parent, token = place // totals.shape[-1], place % totals.shape[-1]
        ends = token == end
        for row, rank in (ends & best.isfinite())[:, :beams].nonzero().tolist():
            if len(ended[row]) < beams:
                score = best[row, rank].item() / length**length_penalty
                ended[row].append((score, tokens[row, parent[row, rank], 1:].tolist()))
        if all(len(found) == beams for found in ended):
            break
        # Of 2 K candidates K have not ended, as each of the K beams has one end.
        going = ends.long().argsort(dim=1, stable=True)[:, :beams]
        scores, parent, token = (x.gather(1, going) for x in (best, parent, token))
        state = rows_of(state, (parent + torch.arange(count, device=device)[:, None] * beams).flatten())
        tokens = torch.cat([tokens.gather(1, parent[..., None].expand_as(tokens)), token[..., None]], dim=2)
    return [sorted(found, key=lambda pair: -pair[0]) for found in ended]
