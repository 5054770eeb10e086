"""BigBird: every token attends to its neighbours, to a few random tokens and to global ones (arXiv 2007.14062)."""

import torch
import torch.nn.functional as F

from policy.attention.prefixed import PrefixedAttention
from policy.attention.windows import Windows, masked_softmax
from policy.registry import at_least

MIN_BLOCK = 8  # queries that share one matrix product; smaller windows would waste it on bookkeeping


class BigBirdAttention(PrefixedAttention):
    """Window, random and global attention token by token (section 2). x (B, P+N, C) -> (B, P+N, C).

    window_radius: a patch attends to the patches at most so many places away in row-major order (the paper's w / 2).
    random_keys: and to so many patches drawn without replacement from those outside its window, fewer where there are
    fewer; drawn once for each head from ``seed`` and ``layer``, kept as a buffer, the same in training and evaluation.
    global_tokens: so many first patches are global as the P prefix tokens are: they attend to all and all to them.
    n <= N patches may be given, random keys beyond them are left out. Linear in N.

    The paper's own code does this in blocks of 64 tokens. The robot code of Fibottention, which never runs it, has
    radius 4 and N random pairs in all for each head, drawn anew for each sample and call; pairs outside keep score 0
    there and no weight here. Raises ValueError for negative numbers.
    """

    def __init__(
        self,
        *,
        num_patches,
        prefix_tokens,
        layer,
        window_radius=4,
        random_keys=1,
        global_tokens=0,
        seed=0,
        **common,
    ):
        at_least(0, window_radius=window_radius, random_keys=random_keys)
        if not 0 <= global_tokens <= num_patches:
            raise ValueError(f"global_tokens: got {global_tokens}, allowed: 0 to {num_patches} patches")
        # Global patches stand in front, so they are further prefix tokens in all but name.
        local = num_patches - global_tokens
        super().__init__(num_patches=local, prefix_tokens=prefix_tokens + global_tokens, **common)
        self.radius = window_radius
        generator = torch.Generator().manual_seed(seed * 1000003 + layer)
        self.register_buffer("random_keys", draw_outside(self.num_heads, local, window_radius, random_keys, generator))

    def attend_patches(self, q, k, v, *, key_padding_mask):
        """q (B, H, n, D), k and v (B, H, P+n, D) -> (B, H, n, D)."""
        patches, prefix = q.shape[2], self.prefix_tokens
        block = min(max(MIN_BLOCK, 2 * self.radius), patches)
        windows = Windows((1, patches), (1, block), (0, self.radius))
        table = self.random_keys[:, :patches]
        # Not len(q), which would fix B in an export.
        index = table.clamp(0, patches - 1)[None].expand(q.shape[0], -1, -1, -1)  # (B, H, n, r)
        q = q * q.shape[-1] ** -0.5
        near = windows.queries(q) @ windows.keys(k, prefix).transpose(-2, -1)  # (B, H, W, w, P+w')
        far = (_take(k[:, :, prefix:], index) @ q[..., None])[..., 0]
        real = self._real(windows, table, index, near.shape[:4], key_padding_mask)
        weights = masked_softmax(torch.cat([near, windows.queries(far)], dim=-1), real)
        weights = F.dropout(weights, self.attn_drop, self.training)
        near, far = weights.split([near.shape[-1], far.shape[-1]], dim=-1)
        out = windows.merge(near @ windows.keys(v, prefix))
        return out + (windows.merge(far)[..., None, :] @ _take(v[:, :, prefix:], index))[..., 0, :]

    def _real(self, windows, table, index, shape, key_padding_mask):
        """Which keys each query attends to, bool (B or 1, H, W, w, P+w'+r); shape: (B, H, W, w)."""
        query = torch.arange(windows.window[1], device=table.device)[:, None]
        key = torch.arange(-self.radius, windows.window[1] + self.radius, device=table.device)
        near = F.pad((query - key).abs() <= self.radius, (self.prefix_tokens, 0), value=True)
        inside = windows.real(key_padding_mask, prefix=self.prefix_tokens, device=table.device)
        near = near if inside is None else near & inside
        far = ((table >= 0) & (table < table.shape[1]))[None]
        if key_padding_mask is not None:
            tokens = ~key_padding_mask[:, None, self.prefix_tokens :, None].expand(-1, shape[1], -1, -1)
            far = far & _take(tokens, index)[..., 0]
        near, far = (x.expand(far.shape[0], *shape[1:], -1) for x in (near, windows.queries(far)))
        return torch.cat([near, far], dim=-1)


def draw_outside(num_heads, num_tokens, radius, count, generator):
    """For each token ``count`` distinct others farther than ``radius``, uniformly: int64 (H, N, count), -1 for none.

    Floyd's sampling (Communications of the ACM 30, 1987, page 754) of the ranks of the others, all tokens at once.
    """
    token = torch.arange(num_tokens)
    first = (token - radius).clamp(min=0)  # of the window
    width = (token + radius).clamp(max=num_tokens - 1) + 1 - first
    chosen = torch.full((num_heads, num_tokens, count), -1)
    for step in range(count):
        last = (num_tokens - width - count + step).expand(num_heads, -1)  # negative: fewer others than ``count``
        uniform = torch.rand(num_heads, num_tokens, generator=generator, dtype=torch.float64)
        rank = torch.where(last < 0, -1, (uniform * (last + 1)).long())
        taken = (chosen[..., :step] == rank[..., None]).any(dim=-1)
        chosen[..., step] = torch.where(taken, last, rank).clamp(min=-1)
    return torch.where(chosen < first[:, None], chosen, chosen + width[:, None])


def _take(x, index):
    """Rows of x (B, H, n, D) at index (B, H, n, r) -> (B, H, n, r, D)."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).unflatten(2, index.shape[2:])
