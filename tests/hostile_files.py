"""Cases of test_hostile.py: files."""

CASES = []
