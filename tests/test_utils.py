import errno
import json
import os

import numpy as np
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import utils
from support import files


def test_cosine_schedule_is_dinos():
    warmup, total = 7, 50
    i = np.arange(total - warmup)
    expected = np.concatenate([np.linspace(0, 3.0, warmup), 0.5 + 0.5 * (3 - 0.5) * (1 + np.cos(np.pi * i / len(i)))])
    np.testing.assert_allclose([utils.cosine_schedule(s, total, 3.0, 0.5, warmup) for s in range(total)], expected)


def test_a_warmup_longer_than_the_run_is_cut():
    values = [utils.cosine_schedule(s, 5, 3.0, 0.5, 100) for s in range(5)]
    np.testing.assert_allclose(values, np.linspace(0, 3.0, 100)[:5])


def test_user_errors_are_one_line_and_exit_code_2(capsys):
    for text in ("it is wrong", "Caught UserError in DataLoader worker.\nTraceback\nutils.UserError: it is wrong"):
        with pytest.raises(SystemExit) as error, utils.one_line_errors():
            raise utils.UserError(text)
        assert error.value.code == 2
        assert capsys.readouterr().err.endswith("error: it is wrong\n")


def test_a_dead_worker_is_named_also_where_its_signal_interrupts_a_save(capsys):
    def save():
        try:
            raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 4850432 vs 4850320")

    with pytest.raises(SystemExit) as error, utils.one_line_errors():
        save()
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "error: a data-loading worker died, probably because memory ran out: use fewer --num_workers" in message
    assert message.endswith("(DataLoader worker (pid 12) is killed by signal: Killed.)\n")


def ended(capsys, error):
    """Raise an error in a script; return the code it exits with and its line."""
    with pytest.raises(SystemExit) as ends, utils.one_line_errors():
        raise error
    return ends.value.code, capsys.readouterr().err.split(": ", 1)[1]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((10**9, 10**9), np.dtype("f4")),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: not enough memory: you tried to"),
        RuntimeError("unable to mmap 4096 bytes from file </c.pth>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:20]}",
)
def test_a_lack_of_memory_is_explained(capsys, error):
    code, line = ended(capsys, error)
    assert code == 2
    assert line.startswith("error: out of memory: use smaller images, batches or networks")
    assert line.count("\n") == 1


def test_ctrl_c_and_paths_that_the_system_refuses_are_one_line(capsys):
    assert ended(capsys, KeyboardInterrupt()) == (130, "interrupted\n")
    name = "n" * 300
    refused = OSError(errno.ENAMETOOLONG, "File name too long", name)
    assert ended(capsys, refused) == (2, f"error: cannot open {name}: File name too long\n")
    with pytest.raises(ZeroDivisionError), utils.one_line_errors():
        _ = 1 / 0  # a fault of the program keeps its traceback


def test_torchrun_gets_the_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    ended(capsys, utils.UserError("λ is wrong"))
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["extraInfo"]["py_callstack"].endswith("error: λ is wrong")
    ChildFailedError("s", {0: ProcessFailure(0, 1, 2, str(tmp_path / "error.json"))})  # reads the file


def test_a_task_of_srun_takes_the_only_gpu_it_sees(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    groups = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **options: groups.append(options))
    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "1234"}
    for name, value in {**launched, "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert utils.init_distributed() == (1, 2, torch.device("cuda", 0))
    assert groups[0]["device_id"] == torch.device("cuda", 0)
    assert groups[0]["backend"] == "nccl"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # torchrun in a SLURM job
    with pytest.raises(utils.UserError, match="found 1 GPUs on this machine and at least 2 processes"):
        utils.init_distributed()


def test_only_regular_files_of_text_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfa\xff")
    assert files.read_text(tmp_path / "a", errors="replace") == "a\ufffd"
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (
        ("a", "can't decode"),
        ("pipe", "not a regular file"),
        (".", "a folder"),
        ("b\0", "null"),
        ("c", "No such"),
    ):
        with pytest.raises(utils.UserError, match=f"cannot read .*{reason}"):
            files.read_text(tmp_path / name)
    with pytest.raises(utils.UserError, match="5 bytes are more than 4"):
        files.read_text(tmp_path / "a", max_bytes=4)
