"""Stopping a run early: signals, and the agreement of all processes on the last step."""

import datetime
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

from utils import is_first_process

# Windows has only the first two.
NAMES = "SIGTERM SIGINT SIGHUP SIGUSR1 SIGUSR2".split()
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: stopped early, the same command resumes
PATIENCE = 60  # seconds after a signal that a process waits for data


class NoData(BaseException):
    """No batch has arrived within PATIENCE after a signal. No Exception, so that no reader of files takes it for one of
    its errors."""


class StopRequest:
    """Turns SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 into a request to stop after the current step.

    A context manager that restores the signal handlers on exit. A SIGHUP that the process ignores from its start, as
    under nohup, stays ignored. A second SIGINT kills the process. Under torchrun, a SIGINT within one second of
    the first is ignored: torchrun forwards the SIGINT that the terminal has sent to all processes. A step that waits
    for data, which a broken disk or worker may never send, is not waited for longer than PATIENCE.

    Attributes:
        signal: first signal that this process received, or None.
        agreed: signal for which all processes stop now, or None. SIGTERM wins over other signals.
        waited: seconds that this process has waited for data; the caller resets it.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.agreed: signal.Signals | None = None
        self._interrupted: float | None = None  # time of the first SIGINT
        self._group: Any = None  # process group on which all agree
        self._pending: dist.Work | None = None
        self._flag = torch.tensor([0])
        self.waited = 0.0
        self._is_waiting = False

    def __enter__(self) -> "StopRequest":
        is_main = threading.current_thread() is threading.main_thread()  # Python allows handlers only there
        numbers = [
            number for number in SIGNALS if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN
        ]
        self._earlier = {number: signal.signal(number, self._note) for number in numbers if is_main}
        if is_main and hasattr(signal, "SIGALRM"):
            self._earlier[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._end_waiting)
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Measure the time of a block that waits for data.

        Raises:
            NoData: the block has not ended PATIENCE after a signal.
        """
        start, self._is_waiting = time.perf_counter(), True
        try:
            yield
        finally:
            self._is_waiting = False
            self.waited += time.perf_counter() - start

    def _end_waiting(self, number: int, frame: object) -> None:
        signal.alarm(PATIENCE)
        if self._is_waiting:
            raise NoData

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            if "TORCHELASTIC_RUN_ID" not in os.environ:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            elif self._interrupted is None:
                self._interrupted = time.monotonic()
            elif time.monotonic() - self._interrupted > 1:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
        if self.signal is None and is_first_process():
            # The signal may have interrupted print: use os.write.
            line = f"{signal.Signals(number).name}: stopping after this step; Ctrl-C ends at once\n"
            is_echoed = number == signal.SIGINT and sys.stderr.isatty()  # the terminal has written ^C
            with suppress(OSError):  # the terminal is gone
                os.write(2, ("\n" * is_echoed + line).encode())
        if self.signal is None and hasattr(signal, "SIGALRM"):
            signal.alarm(PATIENCE)
        self.signal = self.signal or signal.Signals(number)

    def join(self, timeout: datetime.timedelta) -> None:
        """Create the process group on which all processes agree. A collective call."""
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def check(self) -> None:
        """Update `agreed`, which is the same on all processes. Each process must call this after every step.

        With several processes, a signal takes effect one step later: the exchange overlaps with the next step.
        """
        if self._group is None:
            self.agreed = self.signal
            return
        if self._pending is not None:
            self._pending.wait()
            number = int(self._flag.item())
            self.agreed = signal.Signals(number) if number else None
        if self.agreed is None:
            self._flag = torch.tensor([self.signal or 0])
            self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)


def ignore_signals(_: object = None) -> None:
    """Ignore the signals in a data-loading worker: terminals and SLURM send them to workers too."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
