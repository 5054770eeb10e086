"""Makes Push-T demonstrations: `python -m envs.pusht_demos --episodes 640 --output X.zarr.zip`.

envs/pusht/demos.py says what a set holds. Finished episodes wait in the folder `<output>.partial`; the same command
continues an interrupted run.
"""

import os
import sys
from pathlib import Path

from envs.pusht.demos import RECOVERY_SETTINGS, make_demos
from envs.shared.commands import demo_parser, run_command


def generate(output, **options):
    """Makes the set that the options ask for, or the missing part of it."""
    if not make_demos(output, **options):
        print(f"{output} is complete")
        return
    size = sum(path.stat().st_size for path in [Path(output), *Path(output).rglob("*")] if path.is_file()) / 1000
    print(f"{output}: {size:.0f} kB")


def main(arguments=None):
    """The command line; returns the exit code."""
    parser = demo_parser(
        "envs.pusht_demos",
        __doc__.splitlines()[0],
        episodes=640,
        output="name of the set: X.zarr (a folder) or X.zarr.zip (one file)",
        processes=os.cpu_count(),
    )
    help_settings = f"{' or '.join(RECOVERY_SETTINGS)} (default %(default)s); fast is 4 times cheaper, less smooth"
    parser.add_argument("--settings", default="smooth", help=help_settings)
    return run_command(generate, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
