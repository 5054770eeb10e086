"""How results of attention kernels lie in memory."""


def empty_output(q):
    """An empty tensor like q (B, H, T, D) that is contiguous as (B, T, H, D): merging the heads copies nothing."""
    batch, heads, tokens, width = q.shape
    return q.new_empty(batch, tokens, heads, width).transpose(1, 2)


def empty_gradients(q):
    """Room for the gradients of q, k and v, (3, B, H, T, D), each like ``empty_output``.

    One allocation: glibc returns three to the system with every call and faults them in again with the next one.
    """
    batch, heads, tokens, width = q.shape
    return q.new_empty(3, batch, tokens, heads, width).transpose(2, 3)
