"""From the files of other projects to model.pth, and the table of families. scripts/convert_*.py are the commands."""
