import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time

import pytest
from conftest import ROOT
from digits_run import RUN

from support.output import Output


def test_output_is_dropped_when_its_reader_is_gone():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        output = Output(stream)
        for _ in range(3):
            print("x" * 10000, file=output, flush=True)


def test_a_full_disk_is_an_error_of_the_output():
    with open("/dev/full", "w") as stream:
        output = Output(stream)
        with pytest.raises(OSError, match="No space left on device: 'the output'"):
            print("x", file=output, flush=True)


@pytest.mark.slow
def test_a_run_goes_on_when_the_reader_of_its_output_has_ended(tmp_path):
    command = f"set -o pipefail; {sys.executable} {' '.join(RUN)} --output_dir {tmp_path} 2>&1 | head -1"
    process = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    assert len(process.stdout.splitlines()) == 1
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_terminal_that_closes_saves_the_run(tmp_path):
    """The kernel sends SIGHUP, and writing to the terminal fails from then on. Before, the bar shows the loss."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, *RUN, "--epochs", "99", "--output_dir", str(tmp_path)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 130, 0, 0))  # lines and columns
    text, deadline = b"", time.monotonic() + 120
    while b"waiting for data=" not in text and time.monotonic() < deadline:
        text += os.read(terminal, 1000)
    assert b" 1/8613 [" in text.split(b"loss=")[0]
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    assert (tmp_path / "checkpoint.pth").exists()
