"""Standard output and errors that nobody reads end no work: what they would say is dropped."""

import contextlib
import os
import sys


class Stream:
    """A text ``stream`` that forgets its words once it cannot be written: its reader is gone, or its disk is full."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        """The number of characters, written or not."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self):
        """Write what waits."""
        self._try(self._stream.flush)

    def _try(self, function, *args):
        try:
            function(*args)
        except OSError:
            # What Python still holds of it would be an error again when the program ends.
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), self._stream.fileno())

    def __getattr__(self, name):
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_streams():
    """Make sys.stdout and sys.stderr ``Stream``s, also where they are closed (2>&-), until the block ends."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # else files that are opened next would get what is printed
        pass
    os.close(number)
    with contextlib.ExitStack() as stack:
        for redirect, stream in ((contextlib.redirect_stdout, sys.stdout), (contextlib.redirect_stderr, sys.stderr)):
            lasting = Stream(stream or stack.enter_context(open(os.devnull, "w")))
            stack.callback(lasting.flush)
            stack.enter_context(redirect(lasting))
        yield
