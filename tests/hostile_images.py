"""Cases of test_hostile.py: images."""

CASES = []
