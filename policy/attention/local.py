"""Attention in windows of a sequence or of a grid, as in Swin (arXiv 2103.14030, section 3.2)."""

from policy.attention.prefixed import PrefixedAttention
from policy.attention.windows import RelativePositionBias, attend_in_windows, make_windows


class LocalAttention(PrefixedAttention):
    """A patch attends to the patches of its window and to the prefix tokens. x (B, P+N, C) -> (B, P+N, C).

    window_size: patches of a window, along each axis with attn_2d, where the windows are squares of the grid; without
    it, the grid is read row by row as a sequence and n <= N patches may be given. overlap: keys reach half a window
    (at least one patch) beyond each side (HKUNLP/efficient-attention). relative_position_bias: a learned score for
    each head and offset inside a window; none for prefix keys. A grid that windows do not divide is padded with
    masked keys. Prefix tokens attend to all. Linear in N for a given window. Raises ValueError for a window below 1.
    """

    def __init__(
        self,
        *,
        grid,
        window_size=4,
        attn_2d=False,
        overlap=False,
        relative_position_bias=False,
        **common,
    ):
        super().__init__(**common)
        self.whole = attn_2d and grid[0] > 1
        self.windows = make_windows(grid, window_size, overlap=overlap, attn_2d=attn_2d)
        self.bias = RelativePositionBias(self.num_heads, self.windows) if relative_position_bias else None

    def attend_patches(self, q, k, v, *, key_padding_mask):
        """q (B, H, n, D), k and v (B, H, P+n, D) -> (B, H, n, D)."""
        return attend_in_windows(
            self.windows.resized(q.shape[2]),
            q,
            k,
            v,
            prefix=self.prefix_tokens,
            key_padding_mask=key_padding_mask,
            bias=self.bias,
            dropout_p=self.dropout_p,
        )
