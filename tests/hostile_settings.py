"""Cases of test_hostile.py: settings."""

from hostile_case import Case

TRAIN = "main_lgssl.py --data_path {data} --output_dir {here}/out {tiny}"
CASES = [
    Case("unknown option", f"{TRAIN} --lrr 1", r"unknown option --lrr; did you mean --lr\?"),
]
