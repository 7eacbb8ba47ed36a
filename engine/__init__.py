"""From a model to text: what happens in a step and between steps. Each file imports only from the files above it.

    sampling_params.py    SamplingParams: temperature, top_k, top_p, min_p, repetition penalty
    sampler.py            Sampler: the end of a step, from logits to tokens
    sequence.py           Sequence: a prompt, its new tokens and their text, and where it ends
    runner.py             ModelRunner: a model with a KV cache; prefill, decode and verification
    memory_traffic.py     how many bytes a decode step reads, for speculation and for reports
    generation.py         DecodeLoop: a prompt to new tokens, with one decode step per token
    speculate.py          SpeculativeLoop: draft models, prompt lookup, verification
    scheduler.py          Scheduler: many sequences at once, each at its own position
    async_engine.py       AsyncEngine: many callers at once, in asyncio
    chat.py               Conversation: a chat's messages and answers in one KV cache

For one prompt a DecodeLoop is fastest. For some prompts a SpeculativeLoop is faster still. The Scheduler runs many
prompts, and can do more.

Who uses which (eval.py scores texts by ModelRunner.prefill_chunks alone):

    DecodeLoop         generate.py, LLM.generate, LLM.chat
    SpeculativeLoop    generate.py with --prompt_lookup or --draft_checkpoint_path
    Scheduler          generate.py with --parallel or --logprobs, LLM.generate with a logits_processor,
                       LLM.generate_many, scripts/serve.py, eval.py for tasks that generate text

What differs:

                                         DecodeLoop          SpeculativeLoop    Scheduler
    sequences                            samples of a prompt one                any, which come and go
    SamplingParams                       one                 one                one for each sequence
    log-probabilities, logits_processor  no                  no                 yes
    prefix caching                       in a chat           in a chat          between all prompts
    a GPU runs ahead of the host         yes                 no                 no
    a GPU's graph contains sampling      yes                 yes                no
    logits that are not finite           end all             end all            end one sequence

The host waits for the tokens of each step of a Scheduler, because any step may end a sequence. Then another sequence
takes its slot.
"""
