"""Convert robomimic's HDF5 into a zarr replay buffer.

python -m policy.dataset.robomimic IN.hdf5 OUT.zarr [--actions recorded] [--filter-key train]
"""

import argparse
import sys
import time
from pathlib import Path

import zarr

from policy.dataset.robomimic.conversion import ACTIONS, convert


def summary(path):
    """Lines about the zarr ``path``: episodes, frames, MB, and the arrays with their shape per frame."""
    root = zarr.open_group(str(path), mode="r")
    ends = root["meta/episode_ends"][:]
    size = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
    arrays = [f"{key} {array.dtype} {array.shape[1:]}" for key, array in sorted(root["data"].arrays())]
    return [f"{len(ends)} episodes, {ends[-1]} frames, {size / 1e6:.1f} MB", *(f"  {line}" for line in arrays)]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m policy.dataset.robomimic", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="robomimic's HDF5, with images")
    parser.add_argument("output", type=Path, help="the zarr folder to make")
    parser.add_argument("--actions", default="absolute", help=f"{', '.join(ACTIONS)}; default: absolute")
    parser.add_argument("--filter-key", help="only the demos of mask/FILTER_KEY of the file; default: all")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    present = args.output.exists()
    try:
        path = convert(args.source, args.output, actions=args.actions, filter_key=args.filter_key)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"already there: {path}" if present else f"wrote {path} in {time.perf_counter() - start:.1f} s")
    print("\n".join(summary(path)))


if __name__ == "__main__":
    main()
