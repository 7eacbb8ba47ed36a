"""From a model to text: what happens in a step and between steps. Each file imports only from the files above it.

    sampling.py           logits to a token: temperature, top_k, top_p, min_p, repetition penalty
    steps.py              prefill, decode and verification, as functions from token ids to the next token ids
    generation.py         the loop: a prompt to new tokens, with one decode step per token
    speculate.py          draft models, prompt lookup, verification
    request.py            Request: a prompt and how to continue it; prompts to token ids
    scheduler.py          many sequences at once, each at its own position
    completion.py         tokens to text: end tokens, stop strings, many prompts
    async_completer.py    many callers at once, in asyncio
    chat.py               Conversation: a chat's messages and answers in one KV cache
"""
