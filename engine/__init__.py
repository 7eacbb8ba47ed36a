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

There are two loops over decode steps, and speculation changes the first:

                                            TokenGenerator    Scheduler
                                            one prompt        many prompts

    used by  LLM.generate, LLM.chat         without seed      with seed or logits_processor
             LLM.generate_many              -                 yes
             generate.py                    yes               with --parallel or --logprobs
             scripts/serve.py, eval.py      -                 yes

    a batch of samples of one prompt        yes               as several sequences
    speculation (speculate.py)              yes               -
    on a GPU the next step is queued        yes               -
      before the host has the token
    sampling within a GPU's captured step   yes               -
    random numbers                          PyTorch's         PyTorch's, or of each sequence's seed
    SamplingParams                          one for all       of each sequence
    log-probabilities, logits_processor     -                 yes
    prefix caching                          in a chat         between all prompts
    logits that are not finite              end all           end one sequence

In a Scheduler each sequence ends at any step, when another one begins. So the host waits for the tokens of a step and
then decides.
"""
