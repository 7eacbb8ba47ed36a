"""From a model to text: what happens in a step and between steps. Each file imports only from the files above it.

    sampling_params.py    SamplingParams: temperature, top_k, top_p, min_p, repetition penalty
    sampling.py           logits to a token, by SamplingParams
    sequence.py           Sequence: a prompt, its new tokens and their text, and where it ends
    runner.py             ModelRunner: a model with a KV cache; prefill, decode and verification
    generation.py         the loop: a prompt to new tokens, with one decode step per token
    speculate.py          draft models, prompt lookup, verification
    scheduler.py          many sequences at once, each at its own position
    async_engine.py       many callers at once, in asyncio
    chat.py               Conversation: a chat's messages and answers in one KV cache

One prompt: DecodeLoop (generation.py), or SpeculativeLoop (speculate.py), which is faster for some texts. Many prompts:
the Scheduler (scheduler.py), which also has more options:

                                            DecodeLoop,       Scheduler
                                            SpeculativeLoop

    used by  LLM.chat                       yes               -
             LLM.generate                   yes               with logits_processor
             LLM.generate_many              -                 yes
             generate.py                    yes               with --parallel or --logprobs
             scripts/serve.py               -                 yes
             eval.py                        -                 for tasks that generate text

    a batch of samples of one prompt        yes               as several sequences
    speculation                             yes               -
    on a GPU the next step is queued        DecodeLoop        -
      before the host has the token
    sampling within a GPU's captured step   yes               -
    SamplingParams                          one for all       of each sequence
    log-probabilities, logits_processor     -                 yes
    prefix caching                          in a chat         between all prompts
    logits that are not finite              end all           end one sequence

A sequence of a Scheduler may end at any step, and then another sequence takes the slot. So the host waits for the
tokens of each step.
"""
