"""What every part of the project uses. Each file imports only from files above it in this list.

    errors.py     the errors of a user's mistake
    machine.py    the machine's devices, memory and bandwidth
    files.py      reads texts, JSON and PyTorch's files
    signals.py    defers the signals that end a process
"""
