"""Helpers for every part of the project. Each file imports only from files above it in this list.

    errors.py     errors for mistakes of the user
    machine.py    the machine's devices, memory and bandwidth
    files.py      reads text, JSON, safetensors and files of torch.save
    signals.py    defers the signals that end a process
"""
