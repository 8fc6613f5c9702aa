"""Cases of test_hostile.py: files."""

from hostile_case import Case

CASES = []
