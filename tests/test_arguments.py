import json
import shlex

import pytest

import main_lgssl
from support.arguments import ArgumentParser


def parser():
    p = ArgumentParser(prog="p")
    p.add_argument("--lr", type=float)
    p.add_argument("--name")
    return p


def test_argument_files_include_others_beside_them(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base.args").write_text("--lr 1  # a comment\n--name 'two words'\n")
    (tmp_path / "run.args").write_text("@sub/base.args\n--lr 2")
    args = parser().parse_args([f"@{tmp_path / 'run.args'}"])
    assert (args.lr, args.name) == (2, "two words")
    assert parser().parse_args([f"@{tmp_path / 'run.args'}", "--lr", "3"]).lr == 3


@pytest.mark.parametrize(
    "words",
    [
        "--data_path=a\\ b --loss lambda --lambda_cls 0.2 --intensity_range -5 10 --compile --norm_last_layer false",
        "--output_dir=-x --compile false --tuning --dataset digits --knn_every 0",
        "--init_weights FILE --loss cls --use_fp16 true",
    ],
)
def test_recorded_settings_are_given_back(tmp_path, words, capsys):
    path, args = tmp_path / "args.json", main_lgssl.parse_arguments(shlex.split(words))
    path.write_text(json.dumps({**vars(args), "init_hash": "ab"}))
    assert main_lgssl.parse_arguments([f"@{path}"]) == args
    assert main_lgssl.parse_arguments([f"@{path}", "--lr", "3"]).lr == 3
    for text, message in (('{"lrr": 1}', "unknown option lrr"), ("3", "expected a JSON object")):
        path.write_text(text)
        with pytest.raises(SystemExit):
            main_lgssl.parse_arguments([f"@{path}"])
        assert message in capsys.readouterr().err


def test_recipes_are_found_from_any_folder(tmp_path, monkeypatch):
    """As `@recipes/NAME.args`, unless the current folder has such a file."""
    monkeypatch.chdir(tmp_path)
    assert main_lgssl.parse_arguments(["@recipes/digits.args"]).dataset == "digits"
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "digits.args").write_text("--lr 3")
    assert parser().parse_args(["@recipes/digits.args"]).lr == 3
    (tmp_path / "run.args").write_text("@recipes/laptop.args")  # inside a file, paths are relative to that file
    with pytest.raises(SystemExit):
        main_lgssl.parse_arguments(["@run.args"])


def test_bad_argument_files_are_one_line(tmp_path, capsys):
    files = {"typo.args": "--lrr 1", "loop.args": "@loop.args", "quote.args": "--name 'open"}
    messages = [
        "unknown option --lrr; did you mean --lr?",
        "more than 10 files deep",
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
        assert message in text
        assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--batch_size", "--batch_size_per_gpu"),
        ("--batch-size=64", "--batch_size_per_gpu"),
        ("--warmup_teacher_temp_e", "--warmup_teacher_temp_epochs"),
        ("--norm", "--norm_last_layer"),
        ("--global_crops", "--global_crops_size or --global_crops_scale"),
        ("--patchsize", "--patch_size"),
        ("--lrr", "--lr"),
    ],
)
def test_the_hint_completes_what_argparse_would_abbreviate(capsys, word, meant):
    """DINO's scripts accept such abbreviations."""
    with pytest.raises(SystemExit):
        main_lgssl.parse_arguments([word, "64"])
    assert capsys.readouterr().err.endswith(f"unknown option {word.split('=')[0]}; did you mean {meant}?\n")


def test_sub_commands_take_argument_files(tmp_path, capsys):
    p = ArgumentParser(prog="p")
    commands = p.add_subparsers(dest="command", required=True)
    commands.add_parser("train").add_argument("--lr", type=float)
    commands.add_parser("test").add_argument("--lrr")
    (tmp_path / "run.args").write_text("--lr 2")
    assert p.parse_args(["train", f"@{tmp_path / 'run.args'}"]).lr == 2
    (tmp_path / "typo.args").write_text("--lrs 1")
    for words, message in (
        (["train", "--lrr", "1"], "p: error: unknown option --lrr; --help lists the options"),
        (["test", f"@{tmp_path}/typo.args"], "p: error: unknown option --lrs; --help lists the options"),
    ):
        with pytest.raises(SystemExit) as error:
            p.parse_args(words)
        assert error.value.code == 2
        assert capsys.readouterr().err == message + "\n"


def test_many_includes_end_at_once(tmp_path, capsys):
    (tmp_path / "wide.args").write_text("@wide.args " * 1000)
    with pytest.raises(SystemExit):
        parser().parse_args([f"@{tmp_path / 'wide.args'}"])
    assert "more than 10 files deep or 1048576 characters in all" in capsys.readouterr().err
