"""What every part of the project uses. Each file imports from those above it alone.

    errors.py     the errors of a user's mistake
    machine.py    the machine's devices, memory and bandwidth
    files.py      reads texts, JSON and PyTorch's files
"""
