"""Makes robomimic demonstrations: `python -m envs.robomimic_demos --task lift --episodes 100 --output X.hdf5`.

envs/robomimic/demos.py says what a set holds. Finished episodes wait in the folder `<output>.partial`; the same command
continues an interrupted run.
"""

import sys
from pathlib import Path

from envs.robomimic.demos import make_demos
from envs.robomimic.env import CAMERAS
from envs.robomimic.expert import TASKS
from envs.shared.checks import check_output
from envs.shared.commands import demo_parser, run_command
from envs.shared.workers import usual_processes


def generate(output, no_images, **options):
    """Makes the set that the options ask for, or the missing part of it."""
    check_output(output, ".hdf5")
    made = make_demos(output, cameras=() if no_images else CAMERAS, **options)
    print(f"{output}: {Path(output).stat().st_size / 1e6:.1f} MB" if made else f"{output} is complete")


def main(arguments=None):
    """The command line; returns the exit code."""
    parser = demo_parser(
        "envs.robomimic_demos",
        __doc__.splitlines()[0],
        episodes=200,
        output="name of the set: X.hdf5",
        processes=usual_processes(),
    )
    parser.add_argument("--task", required=True, help=" or ".join(TASKS))
    parser.add_argument("--no-images", action="store_true", help="states, actions and low-dimensional obs only")
    parser.add_argument("--image-size", type=int, default=84, help="px (default %(default)s)")
    parser.add_argument("--reflections", action="store_true", help="mirror image in the floor; doubles the time")
    return run_command(generate, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
