"""Cases of test_hostile.py: images."""

from hostile_case import Case

CASES = []
