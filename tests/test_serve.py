"""scripts/serve.py gives the client of OpenAI the texts and log-probabilities of generate.py."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from layers.kv_cache import KVCache
from tests.byte_models import VOCAB_SIZE
from tests.serving import SECONDS, USER, client_of, joined

pytest_plugins = ["tests.serving"]


@pytest.mark.parametrize("prompt", ["Hello", "é🙂", "<|user|>Hi</s><|bot|>", "x" * 100])
def test_texts_are_those_of_generate(prompt, complete, chat, chat_model, ask):
    flags = [f"--prompt={prompt}", "--temperature=0", "--max_new_tokens=20", "--precision=float32"]
    options = {"model": "m", "temperature": 0, "max_tokens": 20}
    (expected,) = ask(chat_model, *flags)
    found = complete(prompt=prompt, **options)
    assert found.choices[0].text == expected["text"][0]
    assert found.choices[0].finish_reason == expected["finish_reason"][0]
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected["prompt_tokens"], expected["generated_tokens"])
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert joined(complete(prompt=prompt, stream=True, **options)) == (expected["text"], expected["finish_reason"])

    (expected,) = ask(chat_model, *flags, "--chat", "--system=Be brief")
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": prompt}]
    found = chat(messages=messages, **options)
    assert found.choices[0].message.content == expected["text"][0] and found.choices[0].message.role == "assistant"
    assert found.usage.prompt_tokens == expected["prompt_tokens"]
    assert joined(chat(messages=messages, stream=True, **options)) == (expected["text"], expected["finish_reason"])


def test_objects(chat_server, complete, chat):
    with client_of(chat_server) as client:
        (model,) = client.models.list().data
    assert model.id.startswith("chat_model") and model.object == "model"
    assert complete(model="m", prompt="a").object == "text_completion"
    assert complete(model="m", prompt="a").usage.completion_tokens == 16  # OpenAI's default
    found = chat(model="m", messages=[USER], temperature=0)
    assert found.object == "chat.completion" and found.model == model.id
    chunks = list(chat(model="m", messages=[USER], temperature=0, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage == found.usage and chunks[-1].choices == []
    roles = [chunk.choices[0].delta.role for chunk in chunks[:-1]]
    assert roles == ["assistant"] + [None] * (len(roles) - 1)
    assert found.usage.total_tokens == 160 or found.choices[0].finish_reason == "stop"  # the context, or an end token


def test_messages_as_openai_writes_them(chat):
    ask = partial(chat, model="m", temperature=0, max_completion_tokens=9)
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    plain = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hel\nlo"}]
    other = [{"role": "developer", "content": "S"}, {"role": "user", "content": parts}]
    assert ask(messages=plain).choices == ask(messages=other).choices
    assert ask(messages=[USER]).choices == ask(messages=[USER | {"name": "me"}]).choices


def test_several_prompts_and_texts(complete):
    ask = partial(complete, model="m", max_tokens=8)
    alone = [ask(prompt=p, seed=5 + i).choices[0].text for i, p in enumerate(["ab", "ab", "cd", "cd"])]
    found = ask(prompt=["ab", "cd"], n=2, seed=5)
    assert [(c.index, c.text) for c in found.choices] == list(enumerate(alone)) and len({*alone}) == 4
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (4, 32)
    assert joined(ask(prompt=["ab", "cd"], n=2, seed=5, stream=True))[0] == alone
    ids = [list(b"ab"), list(b"cd")]
    assert ask(prompt=ids, n=2, seed=5).choices == found.choices
    assert ask(prompt=ids[0], seed=5).choices[0].text == alone[0]


def test_sampling(complete):
    ask = partial(complete, model="m", prompt="Hello", max_tokens=30)
    greedy = ask(temperature=0).choices[0].text
    assert ask(temperature=0, seed=1).choices[0].text == greedy
    assert ask(extra_body={"top_k": 1}).choices[0].text == greedy
    assert ask(top_p=1e-9).choices[0].text == greedy
    assert ask(temperature=2, extra_body={"min_p": 1}).choices[0].text == greedy
    assert ask(temperature=0, extra_body={"repetition_penalty": 100}).choices[0].text != greedy
    hot = [ask(temperature=2, seed=seed).choices[0].text for seed in (7, 7, -8)]
    assert hot[0] == hot[1] != hot[2]
    assert ask(temperature=2).choices[0].text != ask(temperature=2).choices[0].text  # another seed each time


def test_sixteen_clients_at_once_get_what_they_get_alone(complete, chat):
    def request(i: int) -> tuple:
        options = {"model": "m", "max_tokens": 5 + 4 * i, "seed": i, "temperature": i % 3 / 2, "stream": i % 2 == 0}
        if i % 4 < 2:
            found = complete(prompt="Hello"[: 1 + i % 5] * (1 + i % 3), n=1 + i % 2, **options)
        else:
            found = chat(messages=[USER | {"content": "Hello" * (i % 7)}], **options)
        if options["stream"]:
            return joined(found)
        texts = [c.text if hasattr(c, "text") else c.message.content for c in found.choices]
        return texts, [c.finish_reason for c in found.choices]

    alone = [request(i) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(request, range(16))) == alone
    assert len({str(answer) for answer in alone}) == 16


def test_a_long_prompt_does_not_hold_up_the_others(complete, chat_server, monkeypatch):
    encode, is_encoding, others_are_done = chat_server.tokenizer.encode, threading.Event(), threading.Event()

    def slow_encode(text: str) -> list[int]:
        if text == "long":
            is_encoding.set()
            assert others_are_done.wait(SECONDS)
        return encode(text)

    monkeypatch.setattr(chat_server.tokenizer, "encode", slow_encode)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, model="m", prompt="long", max_tokens=3)
        assert is_encoding.wait(SECONDS)
        assert complete(model="m", prompt="a", max_tokens=3).usage.completion_tokens <= 3
        others_are_done.set()
    assert answer.result().usage.prompt_tokens == 4


@pytest.mark.parametrize(
    ("prompt", "stop", "text", "reason"),
    [
        ("0", ["456"], "123", "stop"),  # a token is a byte
        ("0", ["9X", "78", "6789"], "123456", "stop"),
        ("0", "4X", "123456789012", "length"),  # text that may begin the stop string is held back
        ("0", ["2X", "12X"], "123456789012", "length"),
        ("S", "E", "🙂", "stop"),
        ("S", "🙂", "", "stop"),
        ("S", None, "🙂E", "stop"),  # by an end token
        ("W", ["X!"], " X", "stop"),  # "!" is an end token, without text
    ],
)
def test_stop(prompt, stop, text, reason, complete_recall):
    ask = partial(complete_recall, prompt=prompt, stop=stop, max_tokens=12)
    found = ask()
    assert (found.choices[0].text, found.choices[0].finish_reason) == (text, reason)
    assert joined(ask(stream=True)) == ([text], [reason])


def test_a_stop_text_ends_one_of_several_texts(complete_recall):
    found = complete_recall(prompt=["0", "5"], stop="3", max_tokens=6)
    assert [c.text for c in found.choices] == ["12", "678901"]
    assert found.usage.completion_tokens == 9  # and nothing after the stop string


def score(server, ids: list[int], n_prompt: int) -> torch.Tensor:
    """Returns the log-probabilities [n, V] after each of ids from the end of the prompt on, but not after the last."""
    with torch.inference_mode():
        kv_cache = KVCache(server.model, 1, len(ids))
        logits = server.model(torch.tensor([ids[:-1]]), torch.tensor([0]), kv_cache)
    return logits[0, n_prompt - 1 :].log_softmax(-1)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(stream, chat, chat_server):
    options = {"model": "m", "messages": [USER], "max_tokens": 12, "seed": 3, "logprobs": True, "top_logprobs": 5}
    found = chat(stream=stream, **options)
    steps = [step for part in (found if stream else [found]) for step in part.choices[0].logprobs.content]
    prompt, new = chat_server.tokenizer.encode_chat([USER]), [byte for step in steps for byte in step.bytes]
    assert len(new) == len(steps) == 12  # a token is a byte
    expected = score(chat_server, prompt + new, len(prompt))
    total = sum(step.logprob for step in steps)
    assert total == pytest.approx(expected[range(12), new].sum().item(), abs=1e-3)
    for step, logprobs in zip(steps, expected, strict=True):
        values, ids = logprobs.topk(5)
        assert [top.logprob for top in step.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
        assert [top.bytes for top in step.top_logprobs] == [[i] if i < 256 else [] for i in ids]
    assert all(step.top_logprobs == [] for step in chat(**options | {"top_logprobs": 0}).choices[0].logprobs.content)
    assert chat(**options | {"logprobs": False, "top_logprobs": None}).choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_completion(stream, complete, chat_server):
    options = {"model": "m", "prompt": "Hello", "max_tokens": 12, "seed": 3, "logprobs": 4}
    found = complete(stream=stream, **options)
    parts = [part.choices[0].logprobs for part in (found if stream else [found])]
    tokens, values = ([x for part in parts for x in getattr(part, name)] for name in ("tokens", "token_logprobs"))
    tops = [top for part in parts for top in part.top_logprobs]
    offsets = [offset for part in parts for offset in part.text_offset]
    new = list("".join(tokens).encode())
    assert offsets == list(range(12))  # a token is a character
    expected = score(chat_server, [*b"Hello", *new], 5)
    assert sum(values) == pytest.approx(expected[range(12), new].sum().item(), abs=1e-3)
    for token, value, top, logprobs in zip(tokens, values, tops, expected, strict=True):
        assert top[token] == value and len(top) in (4, 5)  # the top ones, and the token itself
        assert sorted(top.values())[-4:] == pytest.approx(sorted(logprobs.topk(4).values.tolist()), abs=1e-4)


def test_pieces_of_logprobs(complete_recall, recall_server):
    """Each token has a name of its own, even if it is part of a character or a special token."""
    found = complete_recall(prompt="S", logprobs=20, max_tokens=9).choices[0].logprobs
    assert found.tokens == [*(f"\\x{byte:02x}" for byte in "🙂".encode()), "E", "</s>"]
    assert all(len(top) in (20, 21) for top in found.top_logprobs)
    assert len(recall_server.tokenizer.special_token_ids) == 4 and VOCAB_SIZE == 260
