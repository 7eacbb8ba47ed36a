"""From a model to text: what happens in a step and between steps. Each file imports only from the files above it.

    sampling.py           logits to a token: temperature, top_k, top_p, min_p, repetition penalty
    sequence.py           Sequence: a prompt, its new tokens and their text, and where it ends
    runner.py             ModelRunner: a model with a KV cache; prefill, decode and verification
    step_bytes.py         how many bytes a decode step reads
    generation.py         the loop: a prompt to new tokens, with one decode step per token
    speculate.py          draft models, prompt lookup, verification
    scheduler.py          many sequences at once, each at its own position
    async_engine.py       many callers at once, in asyncio
    chat.py               Conversation: a chat's messages and answers in one KV cache

There are two loops. One text, TokenGenerator: a GPU's captured step contains the sampler, the next step is queued
before the host has seen the token, and speculation may add several tokens per step. Many texts, Scheduler: each text
has its own sampling options, and ends at any step, when another one begins. So the host waits for the tokens and then
decides.
"""
