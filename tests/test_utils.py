import numpy as np
import pytest

import utils


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
