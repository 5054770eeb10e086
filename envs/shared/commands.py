"""Command lines of the makers of demonstrations: options in common, and errors in one line."""

import argparse
import sys


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit with 1."""

    def error(self, message):
        self.exit(1, f"error: {message}\n")


def demo_parser(module, description, *, episodes, output, processes):
    """A Parser with the options of every maker of demonstrations; ``episodes`` and ``processes`` are defaults."""
    parser = Parser(prog=f"python -m {module}", description=description)
    parser.add_argument("--episodes", type=int, default=episodes, help="number of episodes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all randomness (default %(default)s)")
    help_recovery = "share of episodes that start disturbed, 0 to 1 (default %(default)s)"
    parser.add_argument("--recovery", type=float, default=0.5, help=help_recovery)
    parser.add_argument("--output", required=True, help=output)
    parser.add_argument("--processes", type=int, default=processes, help="processes (default %(default)s)")
    return parser


def run_command(generate, parser, arguments):
    """Parse ``arguments`` and call ``generate(**options)``; returns the exit code, with one line for every error."""
    try:
        generate(**vars(parser.parse_args(arguments)))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    return 0
