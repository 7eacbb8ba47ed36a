"""Reads the requests of OpenAI's API, and writes the responses, for serve.py.

    request = CompletionRequest(data, is_chat, model_name, tokenizer, scheduler)  # data: the JSON of a request in bytes
    request.sequences           # what to compute
    request.response()          # after the sequences have ended
    request.chunks(updates)     # or while they run, for a stream; updates: from AsyncEngine.generate
"""

import json
import secrets
import time
from collections.abc import AsyncIterator
from itertools import accumulate

from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceUpdate
from text.prompt import encode_prompt
from text.tokenizer import Tokenizer
from utils.errors import UsageError, check_integer

MAX_COMPLETIONS, MAX_LOGPROBS, MAX_STOPS, MAX_STOP_LENGTH = 64, 20, 16, 256  # limits of one request
# Fields that are not supported -> a value that is still accepted, because it changes nothing. null, 0, false and empty
# values are accepted, too.
UNSUPPORTED = {"best_of": 1, "response_format": {"type": "text"}} | dict.fromkeys(
    ["echo", "frequency_penalty", "functions", "logit_bias", "presence_penalty", "suffix", "tools"]
)


def parse_request(data: bytes) -> dict:
    """Returns the fields of a request that are not null."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"the request is not JSON: {e}") from None
    require(isinstance(body, dict), "the request must be a JSON object")
    for name, no_op in UNSUPPORTED.items():
        value = body.get(name)
        is_no_op = value in (None, 0, "", [], {}, no_op) and value is not True  # True equals 1
        require(is_no_op, f"{name} is not supported")
    return {name: value for name, value in body.items() if value is not None}


def read_sequences(body: dict, is_chat: bool, tokenizer: Tokenizer, scheduler: Scheduler) -> list[Sequence]:
    eos_ids, max_seq_len = scheduler.model.config.eos_ids, scheduler.max_seq_len
    prompts = encode_prompts(body.get("messages" if is_chat else "prompt"), is_chat, tokenizer, max_seq_len)
    n = read_integer(body, "n", 1, 1, MAX_COMPLETIONS)
    require(n * len(prompts) <= MAX_COMPLETIONS, f"a request may ask for {MAX_COMPLETIONS} completions")
    room = max_seq_len - max(map(len, prompts))
    require(room > 0 and all(prompts), f"a prompt must have 1 to {max_seq_len - 1} tokens")
    max_tokens = read_integer(body, "max_tokens", room if is_chat else min(16, room), 1, room)  # OpenAI's defaults
    max_tokens = read_integer(body, "max_completion_tokens", max_tokens, 1, room)
    seed = read_integer(body, "seed", secrets.randbits(31), -(2**62), 2**62)
    if is_chat:
        n_logprobs = read_integer(body, "top_logprobs", 0, 0, MAX_LOGPROBS)
        if not read_boolean(body, "logprobs"):
            require(n_logprobs == 0, "top_logprobs needs logprobs, which must be true")
            n_logprobs = None
    else:
        n_logprobs = read_integer(body, "logprobs", None, 0, MAX_LOGPROBS)
    params, stop = read_sampling_params(body), read_stop(body)
    options = {"tokenizer": tokenizer, "eos_ids": eos_ids, "is_chat": is_chat, "n_logprobs": n_logprobs}
    ids = [prompt for prompt in prompts for _ in range(n)]
    return [Sequence(ids[i], max_tokens, params, stop=stop, seed=seed + i, **options) for i in range(len(ids))]


def encode_prompts(prompts, is_chat: bool, tokenizer: Tokenizer, max_seq_len: int) -> list[list[int]]:
    """Encodes prompts: a chat's messages; or a text, a list of token ids, or a list of texts and lists of token ids."""
    if is_chat:
        require(isinstance(prompts, list) and prompts, "messages must be a list that is not empty")
        return [encode_prompt(prompts, tokenizer, max_seq_len, limit="")]
    if not isinstance(prompts, list) or all(type(i) is int for i in prompts):
        prompts = [prompts]
    require(len(prompts) <= MAX_COMPLETIONS, f"a request may ask for {MAX_COMPLETIONS} completions")
    ids = [encode_prompt(p, tokenizer, max_seq_len, limit="") if isinstance(p, str) else p for p in prompts]
    tokens = range(tokenizer.vocab_size)
    is_valid = all(isinstance(prompt, list) and all(type(i) is int and i in tokens for i in prompt) for prompt in ids)
    require(is_valid, "prompt must be a text, a list of token ids, or a list of these")
    return ids


def read_sampling_params(body: dict) -> SamplingParams:
    """Reads the sampling options: temperature and top_p by OpenAI's names, all other fields of SamplingParams by
    vLLM's names."""
    params = SamplingParams.from_options({"temperature": 1.0} | body)  # OpenAI's default
    require(params.temperature <= 2, "temperature must be at most 2")
    return params


def read_stop(body: dict) -> tuple[str, ...]:
    stop = body.get("stop", [])
    if isinstance(stop, str):
        stop = [stop] if stop else []
    is_valid = isinstance(stop, list) and all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in stop)
    require(is_valid and len(stop) <= MAX_STOPS, f"stop must be {MAX_STOPS} texts of {MAX_STOP_LENGTH} letters at most")
    return tuple(stop)


def read_integer(body: dict, name: str, default: int | None, low: int, high: int) -> int | None:
    if name in body:
        check_integer(name, body[name], low, high)
    return body.get(name, default)


def read_boolean(body: dict, name: str) -> bool:
    require(type(body.get(name, False)) is bool, f"{name} must be true or false")
    return body.get(name, False)


def require(condition, message: str):
    if not condition:
        raise UsageError(message)


class CompletionRequest:
    """A request, and the JSON that answers it: one response or, in a stream, a chunk for every update."""

    def __init__(self, data: bytes, is_chat: bool, model_name: str, tokenizer: Tokenizer, scheduler: Scheduler):
        body = parse_request(data)
        self.sequences = read_sequences(body, is_chat, tokenizer, scheduler)
        self.n_sent: dict[Sequence, int] = {}  # how many characters of each completion were sent in a stream
        self.tokenizer, self.is_chat, self.is_stream = tokenizer, is_chat, read_boolean(body, "stream")
        options = body.get("stream_options", {})
        require(isinstance(options, dict), "stream_options must be a JSON object")
        self.streams_usage = bool(options.get("include_usage"))
        self.special_tokens = {i: text for text, i in tokenizer.special_token_ids.items()}
        kind = f"chat.completion{'.chunk' if self.is_stream else ''}" if is_chat else "text_completion"
        self.header = {"id": secrets.token_hex(12), "object": kind, "created": int(time.time()), "model": model_name}

    def response(self) -> dict:
        choices = [self.choice(sequence, sequence) for sequence in self.sequences]
        return self.header | {"choices": choices, "usage": self.usage()}

    async def chunks(self, updates: AsyncIterator[list[SequenceUpdate]]) -> AsyncIterator[dict]:
        """Yields a chunk for each update, and at the end the usage, if the request asks for it."""
        async for step_updates in updates:
            for update in step_updates:
                yield self.header | {"choices": [self.choice(update.sequence, update)]}
        if self.streams_usage:
            yield self.header | {"choices": [], "usage": self.usage()}

    def usage(self) -> dict:
        # The n completions of a prompt share one list of ids. Count it once.
        prompts = {id(sequence.prompt_ids): sequence.prompt_ids for sequence in self.sequences}
        n_prompt = sum(map(len, prompts.values()))
        n_new = sum(len(sequence.new_ids) for sequence in self.sequences)
        return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}

    def choice(self, sequence: Sequence, part: Sequence | SequenceUpdate) -> dict:
        """Returns the entry of "choices" for a sequence. part: the sequence itself, or what a step has added to it."""
        role, n_sent = {} if sequence in self.n_sent else {"role": "assistant"}, self.n_sent.get(sequence, 0)
        self.n_sent[sequence] = n_sent + len(part.text)
        logprobs = self.describe_logprobs(part, n_sent) if part.logprobs else None
        choice = {"index": self.sequences.index(sequence), "logprobs": logprobs, "finish_reason": part.finish_reason}
        if not self.is_chat:
            return choice | {"text": part.text}
        return choice | {"delta" if self.is_stream else "message": role | {"content": part.text}}

    def describe_logprobs(self, part: Sequence | SequenceUpdate, n_sent: int) -> dict:
        entries = []
        for token, logprobs in zip(part.new_ids, part.logprobs, strict=True):
            top = [self.entry(*likely) for likely in logprobs.top]
            entries.append(self.entry(token, logprobs.logprob) | {"top_logprobs": top})
        if self.is_chat:
            return {"content": entries}
        tokens = [entry["token"] for entry in entries]
        return {
            "tokens": tokens,
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{e["token"]: e["logprob"] for e in (*entry["top_logprobs"], entry)} for entry in entries],
            "text_offset": list(accumulate(map(len, tokens[:-1]), initial=n_sent)),
        }

    def entry(self, token: int, logprob: float) -> dict:
        data = self.tokenizer.token_bytes(token)
        text = self.special_tokens.get(token) or data.decode("utf-8", "backslashreplace")  # partial UTF-8: \xf0
        return {"token": text, "logprob": logprob, "bytes": list(data)}
