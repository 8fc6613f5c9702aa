"""Stopping a run early: signals, and the agreement of all processes on the last step."""

import datetime
import os
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from utils import is_first_process

# Windows has only the first two.
SIGNALS = [getattr(signal, name) for name in "SIGTERM SIGINT SIGUSR1 SIGUSR2".split() if hasattr(signal, name)]
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: stopped early, the same command resumes


class StopRequest:
    """Turns SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 into a request to stop after the current step.

    A context manager that restores the signal handlers on exit. A second SIGINT kills the process. Under torchrun, a
    SIGINT within one second of the first is ignored: torchrun forwards the SIGINT that the terminal has sent to all
    processes.

    Attributes:
        signal: first signal that this process received, or None.
        agreed: signal for which all processes stop now, or None. SIGTERM wins over other signals.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.agreed: signal.Signals | None = None
        self._interrupted: float | None = None  # time of the first SIGINT
        self._group: Any = None  # process group on which all agree
        self._pending: dist.Work | None = None
        self._flag = torch.tensor([0])

    def __enter__(self) -> "StopRequest":
        is_main = threading.current_thread() is threading.main_thread()  # Python allows handlers only there
        self._earlier = {number: signal.signal(number, self._note) for number in SIGNALS if is_main}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

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
            os.write(2, f"{signal.Signals(number).name}: stopping after this step; Ctrl-C ends at once\n".encode())
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
