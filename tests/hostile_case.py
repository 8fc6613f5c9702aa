"""The form of a case of test_hostile.py."""

from collections.abc import Callable
from typing import NamedTuple


class Case(NamedTuple):
    """A command with wrong or hostile input, and the line that it must end with.

    Attributes:
        name: unique name.
        words: script and options, in which {here} is an empty folder, {data} a folder with train and val of two
            classes, {flat} a folder of images without classes, {weights} a checkpoint of a backbone, {run} the folder
            of a finished run, {tiny} options of a run that takes a second, {root} this repository.
        expected: regular expression, found in the line on stderr; with code 0, in the output.
        make: function of {here} and of the places as a dictionary, which makes the input. It copies what it changes.
        code: exit code.
        env: environment variables; None removes one.
        process: run the command in a process of its own, for what changes a process.
    """

    name: str
    words: str
    expected: str
    make: Callable | None = None
    code: int = 2
    env: dict | None = None
    process: bool = False
