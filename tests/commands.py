"""Commands called inside this process: what they print, and how they refuse."""

import pytest


def call(main, capsys, *arguments):
    """(exit code, standard output, error lines) of the command ``main``."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, [line for line in captured.err.splitlines() if line.startswith("error:")]


def refused(main, capsys, *arguments):
    """The one line, without "error: ", that the command ``main`` gives for wrong ``arguments``."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("error: ") == 1
    return error.split("error: ")[1].rstrip("\n")
