"""Converts the files of other projects to model.pth. families.py is the table of families. scripts/convert_*.py are the
commands."""
