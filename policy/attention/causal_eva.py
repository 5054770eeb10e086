"""Causal EVA for sequences: exact within the window, one token for each earlier chunk (arXiv 2302.04542)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from policy.attention.base import MultiHeadAttention
from policy.attention.eva import GroupTokens, attend_sets
from policy.attention.t5_bias import T5RelativePositionBias
from policy.attention.windows import Windows
from policy.registry import at_least, choose

PROJECTIONS = ("qk", "no_ln")


@dataclass(frozen=True)
class CausalEVAState:
    """What decoding keeps: the tokens of the exact set (B, H, n, D) and the tokens of finished chunks (B, H, S, D)."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    chunk_keys: torch.Tensor
    chunk_values: torch.Tensor


class CausalEVAAttention(MultiHeadAttention):
    """Causal EVA, with the options of github.com/HKUNLP/efficient-attention. x (B, T, C) -> (B, T, C).

    A query attends exactly to the tokens of its window up to itself, with ``overlap`` to the window before, too, and
    in the same softmax to one token for each chunk before these (``GroupTokens``): every token of the past counts
    exactly once (the repository also keeps the tokens of finished chunks inside the window). It is always causal:
    is_causal=True and False give the same.

    window_size; chunk_size: a divisor of it (default: the window), or num_chunks: chunks of ceil((P+N) / num_chunks);
    memory grows as T (window_size + T / chunk_size). adaptive_proj: projections of a chunk's mean query and key, "qk"
    linear and layer norm, "no_ln" linear. use_t5_rpe adds a learned bias of the distance (T5) within the window.

    Prefix tokens are the first tokens of the sequence; any T may come, what fills up the last window gets no weight.
    In training proposals are drawn from torch's global generator, at every call, in evaluation they are at their
    mean, so nothing random is stored. attn_drop acts on all weights. ``step`` decodes token by token.
    Raises ValueError for unknown or contradictory options.
    """

    causal = always_causal = True

    def __init__(
        self,
        *,
        num_patches,
        prefix_tokens,
        window_size=4,
        overlap=False,
        chunk_size=None,
        num_chunks=None,
        adaptive_proj="qk",
        use_t5_rpe=False,
        **common,
    ):
        super().__init__(**common)
        choose("adaptive_proj", adaptive_proj, PROJECTIONS)
        at_least(1, window_size=window_size)
        self.window_size = window_size
        self.chunk_size = _chunk_size(window_size, chunk_size, num_chunks, prefix_tokens + num_patches)
        self.reach = window_size if overlap else 0  # of the exact set, before the window
        self.summary = GroupTokens(self.proj.in_features // self.num_heads, adaptive_proj=adaptive_proj, share=1.0)
        with torch.device("cpu"):  # whatever the default is, as where a model is built without memory
            offsets = torch.arange(-self.reach, window_size) - torch.arange(window_size)[:, None]
        self.bias = T5RelativePositionBias(self.num_heads, offsets[..., None], causal=True) if use_t5_rpe else None

    def attend(self, q, k, v, *, key_padding_mask=None, is_causal=True):
        """q, k (B, H, T, D), v (B, H, T, E) -> (B, H, T, E)."""
        tokens = q.shape[2]
        if key_padding_mask is None:
            key_padding_mask = torch.zeros(1, tokens, dtype=torch.bool, device=q.device)
        windows, chunks = (Windows((1, tokens), (1, size)) for size in (self.window_size, self.chunk_size))
        chunk_real = chunks.real(key_padding_mask)  # (B, 1, S, 1, n)
        chunk_keys, chunk_values = self.summary(*(chunks.queries(x) for x in (q, k, v)), chunk_real)
        real = self._with_previous(windows.queries(~key_padding_mask[:, None, :, None])).transpose(-2, -1)
        real = real & torch.ones(self.window_size, real.shape[-1], dtype=torch.bool, device=q.device).tril(self.reach)
        starts = torch.arange(real.shape[2], device=q.device) * self.window_size - self.reach
        ends = torch.arange(1, chunk_real.shape[2] + 1, device=q.device) * self.chunk_size
        before = (ends <= starts[:, None])[:, None] & chunk_real.any(dim=-1).transpose(2, 3)[:, :, None]
        out = attend_sets(
            windows.queries(q),
            *(self._with_previous(windows.queries(x)) for x in (k, v)),
            chunk_keys,
            chunk_values,
            torch.cat([real, before.expand(-1, -1, -1, self.window_size, -1)], dim=-1),
            bias=None if self.bias is None else self.bias(),
            dropout_p=self.dropout_p,
        )
        return windows.merge(out)

    def step(self, x, state=None):
        """The next token x (B, C), after those of ``state`` (None: none) -> (its output (B, C), the new state).

        Equals the full evaluation, in which no token may be padding. In training the proposals differ: each is drawn
        when its chunk leaves the exact set.
        """
        q, k, v = self.split(x[:, None])
        with self.precision(x.device):
            if self.fp32:
                q, k, v = q.float(), k.float(), v.float()
            out, state = self._step(q, k, v, state)
        return self.proj(out.flatten(1).to(x.dtype)), state

    def _step(self, q, k, v, state):
        """q, k, v (B, H, 1, D) -> (B, H, 1, D) and the new state."""
        exact, finished = [q, k, v], [k[:, :, :0], v[:, :, :0]]
        if state is not None:
            old = (state.queries, state.keys, state.values)
            exact = [torch.cat(pair, dim=2) for pair in zip(old, exact, strict=True)]
            finished = [state.chunk_keys, state.chunk_values]
        size = exact[0].shape[2]
        sets = (x[:, :, None] for x in (q, *exact[1:]))
        out = attend_sets(*sets, *finished, None, bias=self._bias_of_step(size), dropout_p=self.dropout_p)
        if size == self.window_size + self.reach:
            leaving = (x[:, :, : self.window_size].unflatten(2, (-1, self.chunk_size)) for x in exact)
            exact = [x[:, :, self.window_size :] for x in exact]
            finished = [torch.cat(pair, dim=2) for pair in zip(finished, self.summary(*leaving), strict=True)]
        return out[:, :, 0], CausalEVAState(*exact, *finished)

    def _bias_of_step(self, size):
        """Bias (H, 1, 1, size) of the last of ``size`` tokens of the exact set."""
        if self.bias is None:
            return None
        place = (size - 1) % self.window_size
        last = self.reach + place + 1
        return self.bias()[:, :, place : place + 1, last - size : last]

    def _with_previous(self, x):
        """Windows (B, H, W, w, D) -> (B, H, W, reach + w, D), each behind its predecessor; 0 or False where none is."""
        if not self.reach:
            return x
        return torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], dim=3)


def _chunk_size(window_size, chunk_size, num_chunks, tokens):
    if chunk_size is not None and num_chunks is not None:
        raise ValueError(f"chunk_size, num_chunks: got {chunk_size} and {num_chunks}, allowed: one of them")
    if num_chunks is not None:
        at_least(1, num_chunks=num_chunks)
    size = -(-tokens // num_chunks) if num_chunks is not None else window_size if chunk_size is None else chunk_size
    if size < 1 or window_size % size:
        chosen = f"num_chunks: got {num_chunks}, chunks of {size}" if chunk_size is None else f"chunk_size: got {size}"
        raise ValueError(f"{chosen}, allowed: chunks that divide window_size {window_size}")
    return size
