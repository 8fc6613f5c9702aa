import numpy as np
import pytest

import utils


def parser():
    p = utils.ArgumentParser(prog="p")
    p.add_argument("--lr", type=float)
    p.add_argument("--name")
    return p


def test_cosine_schedule_is_dinos():
    warmup, total = 7, 50
    i = np.arange(total - warmup)
    expected = np.concatenate([np.linspace(0, 3.0, warmup), 0.5 + 0.5 * (3 - 0.5) * (1 + np.cos(np.pi * i / len(i)))])
    np.testing.assert_allclose([utils.cosine_schedule(s, total, 3.0, 0.5, warmup) for s in range(total)], expected)


def test_a_warmup_longer_than_the_run_is_cut():
    values = [utils.cosine_schedule(s, 5, 3.0, 0.5, 100) for s in range(5)]
    np.testing.assert_allclose(values, np.linspace(0, 3.0, 100)[:5])


def test_argument_files_include_others_beside_them(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base.args").write_text("--lr 1  # a comment\n--name 'two words'\n")
    (tmp_path / "run.args").write_text("@sub/base.args\n--lr 2")
    args = parser().parse_args([f"@{tmp_path / 'run.args'}"])
    assert (args.lr, args.name) == (2, "two words")
    assert parser().parse_args([f"@{tmp_path / 'run.args'}", "--lr", "3"]).lr == 3


def test_bad_argument_files_are_one_line(tmp_path, capsys):
    files = {"typo.args": "--lrr 1", "loop.args": "@loop.args", "quote.args": "--name 'open"}
    messages = [
        "unknown option --lrr in .*typo.args; did you mean --lr?",
        "includes itself",
        "No closing quotation",
        "No such file",
    ]
    for (name, text), message in zip([*files.items(), ("absent.args", None)], messages, strict=True):
        if text:
            (tmp_path / name).write_text(text)
        with pytest.raises(SystemExit) as error:
            parser().parse_args([f"@{tmp_path / name}"])
        assert error.value.code == 2
        text = capsys.readouterr().err
        assert all(part in text for part in message.split(".*"))
        assert text.count("\n") == 1


def test_user_errors_are_one_line_and_exit_code_2(capsys):
    for text in ("it is wrong", "Caught UserError in DataLoader worker.\nTraceback\nutils.UserError: it is wrong"):
        with pytest.raises(SystemExit) as error, utils.one_line_errors():
            raise utils.UserError(text)
        assert error.value.code == 2
        assert capsys.readouterr().err.endswith("error: it is wrong\n")
