"""Draws the images of any robomimic HDF5 that holds states: `python -m envs.robomimic_images IN.hdf5 OUT.hdf5`.

envs/robomimic/images.py says what OUT holds. Finished demos wait in the folder `<OUT>.partial`; the same command
continues an interrupted run.
"""

import sys
from pathlib import Path

from envs.robomimic.env import CAMERAS
from envs.robomimic.images import render_file
from envs.shared.checks import check_output
from envs.shared.commands import Parser, run_command
from envs.shared.workers import usual_processes


def generate(source, output, cameras, **options):
    """Draws what the options ask for, or the missing part of it."""
    check_output(output, ".hdf5")
    made = render_file(source, output, cameras=cameras.split(","), **options)
    print(f"{output}: {Path(output).stat().st_size / 1e6:.1f} MB" if made else f"{output} is complete")


def main(arguments=None):
    """The command line; returns the exit code."""
    parser = Parser(prog="python -m envs.robomimic_images", description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="IN.hdf5", help="robomimic's, with states")
    parser.add_argument("output", metavar="OUT.hdf5", help="the file to make")
    parser.add_argument("--cameras", default=",".join(CAMERAS), help="names, with commas (default %(default)s)")
    parser.add_argument("--image-size", type=int, default=84, help="px (default %(default)s)")
    help_processes = "processes (default %(default)s)"
    parser.add_argument("--processes", type=int, default=usual_processes(), help=help_processes)
    return run_command(generate, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
