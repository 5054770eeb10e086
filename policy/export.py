"""Strip a run to what inference needs: EMA weights and configuration, in one safetensors file to share.

    python -m policy.export RUN_OR_CHECKPOINT OUTPUT.safetensors
"""

import sys

from policy.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint


def export(run_or_checkpoint, output):
    """Write the EMA weights of a run folder or checkpoint to the file ``output``; returns its size in bytes."""
    tensors, config, state = load_checkpoint(find_checkpoint(run_or_checkpoint), prefix="ema.")
    save_checkpoint(output, {f"ema.{k}": v for k, v in tensors.items()}, config=config, state={"step": state["step"]})
    return output.stat().st_size


if __name__ == "__main__":
    from pathlib import Path

    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m policy.export RUN_OR_CHECKPOINT OUTPUT.safetensors")
    try:
        size = export(sys.argv[1], Path(sys.argv[2]))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"wrote {sys.argv[2]}, {size / 1e6:.2f} MB")
