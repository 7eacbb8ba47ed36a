"""From a model to text: what happens at each step and between steps. Each file imports from those above it alone.

    sampling.py      logits to a token: temperature, top_k, top_p, min_p, repetition penalty
    steps.py         prefill, decode and verification, as functions from token ids to the next token ids
    speculate.py     draft models, prompt lookup, verification
    scheduler.py     many sequences at once, each at its own position
    completion.py    tokens to text: end tokens, stop strings, several callers at once
"""
