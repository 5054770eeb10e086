"""Strip a run to what inference needs: EMA weights and configuration, in one safetensors file to share.

python -m policy.export RUN_OR_CHECKPOINT OUTPUT.safetensors [--half]
"""

import argparse
from pathlib import Path

import torch

from policy.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint

HALF_SIZE = 4096  # entries from which a tensor is stored in half precision; ranges of the normaliser stay exact


def export(run_or_checkpoint, output, *, half=False):
    """Write the EMA weights of a run folder or checkpoint to the file ``output``; returns its size in bytes.

    half: large tensors as float16; they are float32 again once loaded.
    """
    tensors, config, state = load_checkpoint(find_checkpoint(run_or_checkpoint), prefix="ema.")
    if half:
        tensors = {k: v.to(torch.float16) if v.numel() >= HALF_SIZE else v for k, v in tensors.items()}
    save_checkpoint(output, {f"ema.{k}": v for k, v in tensors.items()}, config=config, state={"step": state["step"]})
    return output.stat().st_size


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m policy.export", description=__doc__.split("\n")[0])
    parser.add_argument("source", help="run folder or checkpoint")
    parser.add_argument("output", type=Path, help="file to write, .safetensors")
    parser.add_argument("--half", action="store_true", help="large tensors as float16, half the size")
    args = parser.parse_args(argv)
    try:
        size = export(args.source, args.output, half=args.half)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"wrote {args.output}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
