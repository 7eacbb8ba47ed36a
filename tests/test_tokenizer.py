"""text/tokenizer.py against transformers, sentencepiece and mistral_common: ids, special tokens in prompts and
messages, end tokens, streaming. The tokenizers are trained here, or come with mistral_common."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import sentencepiece
import tokenizers
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizers import AddedToken, models, normalizers, processors

from tests.tiny_tokenizers import FORGED, MISTRAL, TEMPLATES, TEXTS, conversations, train, write
from text.prompt import SAMPLE_LENGTH, encode_prompt, is_certainly_longer
from text.tokenizer import detokenize, load_tokenizer
from utils.errors import UsageError


def replace(tokenizer, **fields):
    """Returns a copy of tokenizer with other fields or methods."""
    changed = copy.copy(tokenizer)
    vars(changed).update(fields)
    return changed


def ids_with_one_bos(theirs, text: str) -> list[int]:
    """Returns the ids in transformers. A text that begins with a bos gets a second one there, which is removed."""
    ids = theirs(text).input_ids
    return ids[1:] if text.startswith("<s>") and ids[:2] == 2 * [theirs.bos_token_id] else ids


def bos_processor(tok: tokenizers.Tokenizer, form: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(form, special_tokens=[(s, tok.token_to_id(s)) for s in ("<s>", "</s>")])


KINDS = ["llama2", "llama2-prepend", "llama3", "qwen2"]


@pytest.fixture(scope="module", params=KINDS)
def both_tokenizers(request, tmp_path_factory):
    """Two tokenizers with the same tokenizer.json: (ours, that of transformers)."""
    tok, folder = train(request.param), tmp_path_factory.mktemp("json")
    if request.param != "qwen2":
        tok.post_processor = bos_processor(tok, "<s> $A")
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=tok, chat_template=TEMPLATES["chatml"], **names).save_pretrained(folder)
    return load_tokenizer(folder), hf.AutoTokenizer.from_pretrained(folder)


def test_tokenizer_json_like_transformers(both_tokenizers):
    ours, theirs = both_tokenizers
    for text in TEXTS + FORGED:
        ids = ours.encode(text)
        assert ids == ids_with_one_bos(theirs, text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        ids = ours.encode_parts([text])
        assert ids == theirs(text, split_special_tokens=True, add_special_tokens=False).input_ids
        assert not set(ids) & set(ours.special_token_ids.values())
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_like_transformers(both_tokenizers, name):
    ours, theirs = replace(both_tokenizers[0], chat_template=TEMPLATES[name]), both_tokenizers[1]
    for text in TEXTS:
        for messages in conversations(text):
            expected = theirs.apply_chat_template(
                messages, chat_template=TEMPLATES[name], add_generation_prompt=True, return_dict=False
            )
            assert ours.encode_chat(messages) == expected
            assert ours.encode(ours.render_chat(messages, add_generation_prompt=True), bos=False) == expected
            assert expected[:2].count(ours.special_token_ids["<s>"]) <= 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_make_no_special_tokens(both_tokenizers, name):
    ours = replace(both_tokenizers[0], chat_template=TEMPLATES[name])
    special = set(ours.special_token_ids.values())
    for forged in FORGED:
        for messages, harmless in zip(conversations(forged), conversations("b"), strict=True):
            ids = ours.encode_chat(messages)
            assert [i for i in ids if i in special] == [i for i in ours.encode_chat(harmless) if i in special]
            if name == "chatml":
                assert ours.decode(ids).count(forged) == len(messages)


@given(st.lists(st.sampled_from(["<|im_", "end|>", "<|im_end|>", "<", "</s>", " ", "\n", "a", "😀"])).map("".join))
@settings(database=None, deadline=None)
def test_a_message_is_encoded_as_text(byte_level, text):
    """Between the special tokens of the template, a message is encoded as text, whatever it contains."""
    user, special = byte_level.encode_parts(["user\n" + text]), byte_level.special_token_ids
    newline, header = byte_level.encode("\n", bos=False), byte_level.encode("assistant\n", bos=False)
    start, end = special["<|im_start|>"], special["<|im_end|>"]
    ids = byte_level.encode_chat([{"role": "user", "content": text}])
    assert ids == [start, *user, end, *newline, start, *header]
    trimmed = replace(byte_level, chat_template="<|im_start|>{{ messages[0].content | trim }}")
    assert trimmed.encode_chat([{"role": "user", "content": text}])[1:] == byte_level.encode_parts([text.strip()])


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("qwen2"), {"chat_template": TEMPLATES["chatml"]})
    train("qwen2").save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture(scope="module", params=MISTRAL)
def mistral(request, tmp_path_factory):
    """Two tokenizers with the same tokenizer.model, and the template of its checkpoints: (ours, that of sentencepiece,
    version)."""
    end = " [/INST]" if request.param == "v1" else "[/INST]"
    template = TEMPLATES["mistral"].replace(" [/INST]", end)
    folder = write(tmp_path_factory.mktemp("model"), {"chat_template": template}, request.param)
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return load_tokenizer(folder), library, request.param


def test_tokenizer_model_like_sentencepiece(mistral):
    ours, library, _ = mistral
    bos, eos = library.bos_id(), library.eos_id()
    for text in TEXTS + FORGED:
        ids = library.encode(text)
        assert ours.encode_parts([text]) == ids and not set(ids) & set(ours.special_token_ids.values())
        assert ours.decode(ids) == library.decode(ids)
        if text in TEXTS:
            assert ours.encode(text) == [bos, *ids] and ours.encode(text, bos=False) == ids
            assert ours.encode(f"{text}</s><s>") == [bos, *ids, eos, bos]
            assert text.startswith(" ") or ours.encode(f"<s>{text}") == [bos, *ids]
    assert ours.vocab_size == library.vocab_size()


def test_chat_like_mistrals_reference(mistral):
    ours, _, version = mistral
    reference = getattr(MistralTokenizer, version)()
    for text in filter(str.strip, TEXTS + FORGED):
        messages = [UserMessage(content=text), AssistantMessage(content="Sure!"), UserMessage(content=text)]
        expected = reference.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        assert ours.encode_chat([{"role": m.role, "content": m.content} for m in messages]) == expected


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("form", ["decoder", "added_tokens.json"])
def test_tokenizer_model_like_transformers(tmp_path, legacy, form):
    """Tokens that tokenizer.model lacks, and the space that older tokenizers put after a special token, are as in
    transformers."""
    added = {"<|im_start|>": 32000, "<|im_end|>": 32001, "<think>": 32002}
    config = {"legacy": legacy, "add_bos_token": True, "tokenizer_class": "LlamaTokenizer"}
    config["chat_template"] = TEMPLATES["chatml"] + "{{ eos_token }}"
    if form == "decoder":
        decoder = {i: {"content": s, "special": s != "<think>", "normalized": False} for s, i in added.items()}
        decoder[32001]["rstrip"] = decoder[32002]["lstrip"] = True
        write(tmp_path, config | {"eos_token": "<|im_end|>", "added_tokens_decoder": decoder}, "v1")
    else:
        write(tmp_path, config, "v1")
        names = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    ours, theirs = load_tokenizer(tmp_path), hf.AutoTokenizer.from_pretrained(tmp_path)
    for text in (t for t in TEXTS if "  " not in t and "▁" not in t):  # there transformers 5.24 merges otherwise
        if not text.startswith(" "):
            for prompt in (text, f"<|im_start|>{text}<|im_end|>\n", f"<s>{text}</s> a", f"<think>{text} <think> "):
                assert ours.encode(prompt) == ids_with_one_bos(theirs, prompt)
        for messages in conversations(text):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert ours.encode_chat(messages) == expected
    assert set(ours.eos_ids()) == {32001}
    assert ours.encode("a<think>") == [1, 264, 32002]
    assert ours.vocab_size == 32003 and ours.decode([32000, 22557, 32001, 40000, 32002]) == "Hello<think>"
    ours.drop_special_tokens(32000)  # the model has no embedding for these tokens
    assert ours.vocab_size == 32000 and max(ours.encode("a<think><|im_end|>")) < 32000


@pytest.mark.parametrize("form", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_json_bos(tmp_path, form, add_bos):
    """As in transformers, tokenizer.json decides whether a prompt begins with bos, not the settings. A prompt does not
    end in eos. That of a conversation begins as the chat template says. A token that the settings name is special,
    whatever tokenizer.json says."""
    tok = train("llama3")
    tok.add_tokens([AddedToken("<end>", special=False, normalized=False)])
    tok.post_processor = bos_processor(tok, form)
    tok.enable_truncation(3)
    tok.enable_padding(length=64)
    config = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "<end>"}, "add_bos_token": add_bos}
    tok.save(str(write(tmp_path, config | {"tokenizer_class": "PreTrainedTokenizerFast"}) / "tokenizer.json"))
    ours, theirs = load_tokenizer(tmp_path), hf.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_ids() == [tok.token_to_id("<end>")]
    assert ours.encode("<s>a") == [tok.token_to_id("<s>"), *ours.encode("a", bos=False)]
    for text in ("", "a", "<end>", "a b c d e"):
        expected = theirs(text).input_ids
        assert ours.encode(text) == expected[: -1 if "</s>" in form else None]
        assert ours.encode(text) == ours.bos_ids + ours.encode(text, bos=False)
    for template in ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "{{ messages[0].content }}"):
        ours.chat_template, messages = template, [{"role": "user", "content": "a"}]
        assert ours.encode_chat(messages) == theirs.apply_chat_template(
            messages, chat_template=template, return_dict=False
        )


@pytest.mark.parametrize("add_bos", [None, True, False])
def test_model_bos(tmp_path, add_bos):
    ours = load_tokenizer(write(tmp_path, {"add_bos_token": add_bos}, "v1"))
    assert ours.encode("a") == [1] * (add_bos is not False) + ours.encode("a", bos=False)
    assert ours.encode("<s>a") == [1] + ours.encode("a", bos=False)


def check_stream(tokenizer, ids):
    calls = []

    def token_bytes(i):
        calls.append(i)
        return tokenizer.token_bytes(i)

    pieces = list(detokenize(replace(tokenizer, token_bytes=token_bytes), iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids) and all(pieces) and calls == ids  # one look at each token
    return pieces


def check_text(tokenizer, text, expected):
    """Streams a text as a whole, and in two parts for every cut between two characters."""
    ids = tokenizer.encode_parts([text])
    assert "".join(check_stream(tokenizer, ids)) == expected
    for k in range(len(ids)):
        first, second = tokenizer.decode(ids[:k]), tokenizer.decode(ids[k:], prefix_ids=ids[:k])
        assert first + second == expected or "\ufffd" in first


@given(st.text())
@settings(database=None, deadline=None)
def test_stream_of_text(byte_level, mistral, text):
    check_text(byte_level, text, normalizers.NFC().normalize_str(text))
    check_text(mistral[0], text, text.replace("▁", " "))


def check_ids(tokenizer, ids, silent, reference):
    """Streams ids that no text has, and some that no token has. Broken bytes are replaced differently by different
    tokenizers, except at byte level."""
    text = "".join(check_stream(tokenizer, ids))
    silent = {*silent, *tokenizer.special_token_ids.values(), *range(tokenizer.vocab_size, 601)}
    expected = reference([i for i in ids if i not in silent])
    assert text == expected or tokenizer.drops_space and "\ufffd" in expected


@given(st.lists(st.integers(0, 600), max_size=20))
@settings(database=None, deadline=None)
def test_stream_of_random_ids(both_tokenizers, ids):
    check_ids(both_tokenizers[0], ids, [], both_tokenizers[1].decode)


@given(st.lists(st.integers(0, 600) | st.integers(700, 2000), max_size=20))
@settings(database=None, deadline=None)
def test_stream_of_random_sentencepiece_ids(mistral, ids):
    ids = [i for i in ids if mistral[1].id_to_piece(i) != "<0x20>"]  # a space that sentencepiece, alone, never drops
    check_ids(mistral[0], ids, [mistral[1].unk_id()], mistral[1].decode)


def test_stream_holds_back_only_a_torn_character(byte_level, mistral):
    arrived = []

    def arrive(ids):
        for i in ids:
            arrived.append(i)
            yield i

    for tokenizer in (byte_level, mistral[0]):
        arrived.clear()
        text = ""
        for piece in detokenize(tokenizer, arrive(tokenizer.encode("Hello, my 😀 name"))):
            text += piece
            assert text == tokenizer.decode(arrived).rstrip("\ufffd")


def test_continuation_keeps_its_space(byte_level, mistral):
    for tokenizer in (byte_level, mistral[0]):
        prompt, whole = tokenizer.encode("Hello, my name is"), tokenizer.encode("Hello, my name is John")
        assert "".join(detokenize(tokenizer, whole[len(prompt) :], prompt)) == " John"
        assert tokenizer.decode(tokenizer.encode("John"), prefix_ids=tokenizer.encode("")) == "John"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "no chat template, neither in tokenizer_config.json nor"),
        ("{% if %}", "failed"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "failed"),  # the sandbox
        ("{{ messages.__class__.__mro__ }}", "failed"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "failed"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed"),
        ("{{ messages[0].content.missing.missing }}", "failed"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 1 s"),
        ("{{ 'a' * 9 * 10000000000 }}", "millions"),
        ("{{ 10000000000 * [1] }}", "millions"),
        ("{{ 'a' * 'a' }}", "failed"),
        (5, "failed"),
    ],
)
def test_template_refuses(byte_level, template, says, monkeypatch):
    monkeypatch.setattr("text.chat_template.MAX_SECONDS", 1)
    with pytest.raises(UsageError, match=says) as error:
        replace(byte_level, chat_template=template).encode_chat([{"role": "user", "content": "a"}])
    assert "\n" not in str(error.value)


def test_template_multiplies_anywhere(byte_level):
    template = "{{ 'ab' * 2 + 2 * 'c' }}{{ 3 * 1000 * 1000 * 1.5 }}"
    ours = replace(byte_level, chat_template=template)
    with ThreadPoolExecutor() as threads:  # and outside the main thread, too
        for ids in (ours.encode_chat([]), threads.submit(ours.encode_chat, []).result()):
            assert ours.decode(ids) == "ababcc4500000.0"


LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}{% for message in loop_messages %}\
{% if loop.index0 == 0 and system_message %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}\
{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content + ' [/INST]' }}{% else %}{{ ' '  + content + ' ' + eos_token }}\
{% endif %}{% endfor %}"""


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be\nbrief."}]])
def test_without_a_template_llama2s_form(system, tmp_path):
    write(tmp_path, {}, "v1")
    ours = load_tokenizer(tmp_path)
    assert ours.chat_template is None
    turns = [("user", "Hi [INST]"), ("assistant", "Yes?"), ("user", "</s>Bye\n")]
    messages = [*system, *({"role": role, "content": text} for role, text in turns)]
    for n in (len(system) + 1, len(messages)):
        assert ours.encode_chat(messages[:n]) == replace(ours, chat_template=LLAMA2).encode_chat(messages[:n])
    with pytest.raises(UsageError, match="no chat template"):
        replace(ours, special_tokens_map={"bos_token": "<|begin_of_text|>"}).encode_chat(messages)


# The last answer ends with <|return|>, and earlier answers end with <|end|>.
GPT_OSS = """{% for m in messages -%}
{%- if m.role == 'user' -%}<|start|>user<|message|>{{ m.content }}<|end|>
{%- elif loop.last and not add_generation_prompt -%}
<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>
{%- else -%}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"""
PHI3 = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{% for m in messages %}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}"""


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATES["chatml"], "<|im_end|>"),
        (TEMPLATES["qwen3"], "<|im_end|>"),
        (TEMPLATES["llama3"], "<|eot_id|>"),
        (TEMPLATES["mistral"], "</s>"),
        (GEMMA, "<end_of_turn>"),
        (PHI3, "<|end|>"),
        (GPT_OSS, "<|return|>"),
        (LLAMA2, "</s>"),  # after a space
        ("{% for m in messages %}{{ m.role + ': ' + m.content }}\n{% endfor %}{{ eos_token }}", "</s>"),
        ("{% for m in messages %}{{ '<s>' + m.role + ': ' + m.content + '\n' }}{% endfor %}", None),
        ("{% for m in messages %}{{ '<s>' + m.content }}{% endfor %}", None),
        ("{% for m in messages %}{{ m.content + ' END</s>' }}{% endfor %}", None),
        ("{{ messages[0].content }}</s>", None),  # a template without a place for an answer
        ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", None),
        ("{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}</s>", None),
        ("{% if %}", None),
        (5, None),
        (None, None),
    ],
)
def test_end_of_turn(byte_level, template, expected):
    special = {"<|im_end|>": 0, "<|eot_id|>": 1, "<end_of_turn>": 2, "<|end|>": 3, "<|return|>": 4, "</s>": 5, "<s>": 6}
    names = {"bos_token": "<|begin|>", "eos_token": "</s>"}
    ours = replace(byte_level, chat_template=template, special_tokens_map=names, special_token_ids=special)
    assert ours.end_of_turn() == ours.special_token_ids.get(expected)
    assert set(ours.eos_ids()) == {ours.special_token_ids["</s>"], ours.special_token_ids.get(expected)} - {None}
    added = replace(ours, chat_template="{% for m in messages %}{{ m.content + ' </think>' }}{% endfor %}")
    assert added.end_of_turn() == added.library.token_to_id("</think>")  # which is not special
    without_special_tokens = replace(ours, special_token_ids={})
    assert without_special_tokens.end_of_turn() is None and without_special_tokens.eos_ids() == []


def test_a_text_that_may_fit_is_not_too_long(byte_level, tmp_path):
    """White space that a special token absorbs, and unknown characters, which are one token, may have any length."""
    assert is_certainly_longer(byte_level, "ab " * 500, 40) and not is_certainly_longer(byte_level, "ab " * 20, 40)
    tok = tokenizers.Tokenizer(models.BPE({"<unk>": 0, "a": 1, " ": 2}, [], unk_token="<unk>", fuse_unk=True))
    tok.add_special_tokens([AddedToken("<mask>", lstrip=True), "<s>"])
    tok.decoder = tokenizers.decoders.Fuse()
    tok.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    for text, n_tokens in [("x" * 10_000, 1), (" " * 10_000 + "<mask>", 1), ("a" + " " * 10_000 + "<mask>" + "x", 3)]:
        parts = ours.split_at_special_tokens(text)
        assert len(ours.encode(text)) == n_tokens
        assert not is_certainly_longer(ours, text, n_tokens) and not is_certainly_longer(ours, parts, n_tokens)
    for text in ("a " * 5000, "a" * 10_000, "<s>" * 10_000, "x" * 2000 + "a" * 9000):
        assert all(is_certainly_longer(ours, prompt, 100) for prompt in (text, ours.split_at_special_tokens(text)))


def test_only_the_beginning_of_a_long_prompt_is_encoded(byte_level):
    """A prompt that is too long is refused after its beginning, whether it has words, special tokens, long tokens, or
    many messages."""
    ours, n_tokens, lengths = replace(byte_level, chat_template=TEMPLATES["chatml"]), 40, []

    def encode_parts(parts):
        lengths.append(sum(len(part) if isinstance(part, str) else 1 for part in parts))
        return byte_level.encode_parts(parts)

    ours.encode_parts = encode_parts
    long = "ab " * 10**6
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}] * 10**4
    for prompt in (long, "<|im_end|>" * 10**5, chat, [{"role": "user", "content": long}]):
        with pytest.raises(UsageError, match=f"exceeds the model's context of {n_tokens} tokens"):
            encode_prompt(prompt, ours, n_tokens)
    assert max(lengths) <= SAMPLE_LENGTH * n_tokens
