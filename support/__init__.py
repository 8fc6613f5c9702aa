"""The machinery behind the commands and the method."""
