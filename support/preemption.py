"""Ending a run early and in order: signals, and the agreement of all processes on the last step."""

import os
import signal
import threading
import time

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: stopped early, the same command goes on


class StopRequest:
    """Turns SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 into the wish to stop after the current step.

    A context manager; it restores the handlers. A second SIGINT ends the process at once; under torchrun if it comes a
    second after the first, since what the terminal sends to all processes, torchrun sends to them once more.

    Attributes:
        signal: the first one that this process received, or None.
        agreed: the signal for which all processes stop now, or None. Of several it is SIGTERM.
    """

    def __init__(self):
        self.signal = self.agreed = None
        self._interrupted = None  # when the first SIGINT came
        self._group = self._pending = self._flag = None

    def __enter__(self):
        self._earlier = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            self._earlier = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if number == signal.SIGINT:
            if "TORCHELASTIC_RUN_ID" not in os.environ:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            elif self._interrupted is None:
                self._interrupted = time.monotonic()
            elif time.monotonic() - self._interrupted > 1:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
        if self.signal is None and os.environ.get("RANK", "0") == "0":
            # Not print, which may be what the signal interrupts
            os.write(2, f"{signal.Signals(number).name}: stopping after this step; Ctrl-C ends at once\n".encode())
        self.signal = self.signal or signal.Signals(number)

    def join(self, timeout):
        """Make the side channel between the processes of the default group; for all of them to call."""
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def check(self):
        """Set `agreed`, the same on all processes, each of which calls this after every step.

        With several processes that is one step late: what they send to each other in one step, beside the work, they
        read in the next.
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


def ignore_signals(_=None):
    """Leave the signals to the main process; for data-loading workers, which terminals and SLURM signal too."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
