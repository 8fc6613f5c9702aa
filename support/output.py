"""Standard output whose reader may end: `| head -1`, or a terminal that was closed."""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Output:
    """A text stream that drops what is written once its reader is gone, or after another error, which is raised.

    Characters that the terminal cannot show are replaced.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115  # None: closed by the caller
        with suppress(AttributeError):  # a notebook's stream
            self._stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable, *args: str) -> None:
        try:
            call(*args)
        except OSError as error:
            with open(os.devnull, "w") as null, suppress(OSError):  # a notebook's stream has no number
                os.dup2(null.fileno(), self._stream.fileno())  # also for Python's last flush
            if error.errno not in (errno.EPIPE, errno.EIO):
                error.filename = "the output"
                raise
