import os
import signal
import time

import pytest
from digits_run import RUN

import main_lgssl
from support import preemption
from support.preemption import NoData, StopRequest


def test_a_process_that_waits_for_data_ends_after_a_signal(monkeypatch):
    """But not while it computes, and not without a signal."""
    monkeypatch.setattr(preemption, "PATIENCE", 1)
    with StopRequest() as stop:
        with stop.waiting_for_data():
            time.sleep(1.2)
        assert stop.waited == pytest.approx(1.2, abs=0.5)
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(1.2)
        with pytest.raises(NoData), stop.waiting_for_data():
            time.sleep(60)
    assert stop.signal == signal.SIGHUP
    time.sleep(1.2)  # no alarm is left


def test_nohup_works():
    """But a SIGINT that a shell ignores for processes in the background stops them."""
    earlier = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGINT) == stop._note
        assert stop.signal is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def test_a_run_whose_data_never_come_ends_after_a_signal(monkeypatch, tmp_path, capsys):
    """The last checkpoint stays."""

    def batches_on_device(loader, *arguments):
        def broken():
            for i, batch in enumerate(loader):
                if i == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(60)
                yield batch

        return original(broken(), *arguments)

    original = main_lgssl.batches_on_device
    monkeypatch.setattr(preemption, "PATIENCE", 1)
    monkeypatch.setattr(main_lgssl, "batches_on_device", batches_on_device)
    words = f"--epochs 1 --accum_steps 1 --save_every_steps 1 --output_dir {tmp_path}".split()
    assert main_lgssl.main([*RUN[1:], *words]) == signal.SIGTERM
    output = capsys.readouterr()
    assert "still waiting for data" in output.err
    assert "stopped by SIGTERM" in output.out
    assert main_lgssl.checkpoints.load_file(tmp_path / "checkpoint.pth")["step"] == 2
