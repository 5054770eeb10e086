"""A language model: the next token from those before it (decoder-only transformer, pre-norm, as GPT-2)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from policy.sequence.blocks import Blocks, Embedding


class LanguageModel(nn.Module):
    """tokens (B, T), T <= context -> scores (B, T, V) of the tokens that follow; embedding and output share weights.

    attention: {"name": ..., options} of a mechanism with a causal form, ValueError for others. vocabulary: V.
    """

    def __init__(self, *, attention, vocabulary, context, dim, depth, num_heads, mlp_ratio=4.0, dropout=0.0):
        super().__init__()
        sizes = {"dim": dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
        self.blocks = Blocks(attention, length=context, dropout=dropout, causal=True, **sizes)
        self.context = context
        self.embedding = Embedding(vocabulary, context, dim)
        self.dropout = nn.Dropout(dropout)

    def compile_training(self):
        """Compile what a training step spends its time in (torch.compile)."""
        self.blocks.compile()

    def randomness(self, count, generator):
        """A training step draws nothing but dropout and what the attention draws, both from torch's own generator."""
        return {}

    def logits(self, tokens):
        """tokens (B, T) -> scores (B, T, V)."""
        return self._scores(self.blocks(self.dropout(self.embedding(tokens))))

    def step(self, tokens, state=None):
        """The next tokens (B,) after those of ``state`` (None: none) -> (scores (B, V), the new state)."""
        state = self.blocks.start() if state is None else state
        x, state = self.blocks.step(self.embedding.step(tokens, state.place), state)
        return self._scores(x), state

    def _scores(self, x):
        return F.linear(x, self.embedding.tokens.weight)

    def forward(self, batch, randomness):
        """{"tokens": (B, T+1)} -> {"loss": mean cross-entropy of the T last tokens in nats}."""
        tokens = batch["tokens"]
        logits = self.logits(tokens[:, :-1])
        return {"loss": F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())}

    @torch.no_grad()
    def generate(self, prompt, count, *, temperature=1.0, generator=None):
        """``count`` tokens (a list) drawn after those of ``prompt``, in evaluation mode; temperature 0: the likeliest.

        Beyond ``context`` tokens it goes on from the later half of them. Raises ValueError for an empty prompt.
        """
        if count < 0:
            raise ValueError(f"length: got {count}, allowed: 0 and more")
        if len(prompt) == 0 or temperature < 0:
            raise ValueError(
                f"prompt, temperature: got {len(prompt)} tokens and {temperature}, allowed: >= 1 token and >= 0"
            )
        device = self.embedding.tokens.weight.device
        tokens, state, fed = [int(token) for token in prompt], None, max(len(prompt) - self.context, 0)
        for _ in tqdm(range(count), desc="generating", unit="token", leave=False, dynamic_ncols=True):
            if state is not None and state.place == self.context:
                state, fed = None, len(tokens) - max(self.context // 2, 1)
            for token in tokens[fed:]:
                scores, state = self.step(torch.tensor([token], device=device), state)
            fed = len(tokens)
            tokens.append(draw(scores[0], temperature, generator))
        return tokens[len(prompt) :]


def draw(scores, temperature, generator):
    """A token from scores (V,) over ``temperature``; 0: the highest."""
    if temperature == 0:
        return int(scores.argmax())
    weights = (scores.double() / temperature).softmax(dim=-1).cpu()
    return int(torch.multinomial(weights, 1, generator=generator))


def window_starts(count, length, least_context):
    """Where windows of ``length`` tokens begin that score all of ``count`` tokens but the first, (W,) int.

    Each after the first has ``least_context`` tokens before those that it scores. Raises ValueError for what is
    impossible.
    """
    if not 0 <= least_context < length:
        raise ValueError(f"contexts: got {least_context}, allowed: 0 to {length - 1}, less than the model's context")
    if count <= length:
        raise ValueError(f"text: got a test part of {count} tokens, allowed: more than the context of {length}")
    last = count - 1 - length
    return np.append(np.arange(0, last, length - least_context), last)


@torch.no_grad()
def surprise(model, tokens, *, least_context=0, batch_size=16, device="cpu"):
    """Nats of every token but the first, (n-1,) float32, each scored once, in windows of ``model.context`` tokens.

    Windows overlap, so that beyond the first window each token has at least ``least_context`` tokens before the one
    that it follows (as with fairseq's --context-window). Raises ValueError for fewer tokens than a window needs.
    """
    starts = window_starts(len(tokens), model.context, least_context)
    nats, done = torch.empty(len(tokens) - 1), 0
    batches = np.array_split(starts, -(-len(starts) // batch_size))
    for batch in tqdm(batches, desc="testing", leave=False, dynamic_ncols=True):
        windows = tokens[batch[:, None] + np.arange(model.context + 1)].astype(np.int64)
        windows = torch.as_tensor(windows, device=device)
        scores = model.logits(windows[:, :-1]).float().transpose(1, 2)
        losses = F.cross_entropy(scores, windows[:, 1:], reduction="none").cpu()
        for start, loss in zip(batch, losses, strict=True):
            end = start + model.context
            nats[done:end], done = loss[done - start :], end
    return nats
