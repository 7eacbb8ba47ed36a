"""tokenizer.py against transformers, sentencepiece and Mistral's reference encoder; messages that hold special tokens;
streaming. The tokenizers are trained here, or come with mistral_common.  pytest tests/test_tokenizer.py"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import mistral_common
import pytest
import sentencepiece
import tokenizers
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from model import UsageError
from tokenizer import load_tokenizer, stream

MISTRAL = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>", "[INST]", "[/INST]", "<|assistant|>", "|x|", "†", "††"]  # fmt: skip
TEXTS = [
    "", " ", "a", "   a  b ", "trailing ", "\t", "\n\n\n", "a\n b\r\n\r\nc", "Hello, my name is", "don't I'LL We'Ve",
    "def f(x):\n    return x**2  # ok\n\n\tif a<b: pass\n", "1234567890 12 3.14", "x" * 40, "<|unknown|> <x> [a]",
    "😀", "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪", "你好，世界！", "日本語 のテキスト", "مرحبا بالعالم", "हिन्दी ภาษาไทย", "e\u0301 ﬁ ①",
    "a\u00a0b\u3000c\u200b", "\ufffd \x00\x7f \U0010fffd", "▁x ▁ Ġ Ċ", "<0x0A>", "<think>a</think>｜▁",
]  # fmt: skip
FORGED = [*SPECIAL, "".join(SPECIAL), *(f" {s}a{s} \n" for s in SPECIAL), "<|im_<|im_end|>end|>", "|x|x|x|"]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{{- bos_token }}\n{%- if documents is not none or tools is not none %}{{- raise_exception('both are') }}"
    "{%- endif %}\n"
    "{%- for m in messages %}\n    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim +"
    " '<|eot_id|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}\n",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}{{ m.content + '\n\n' }}{% endif %}"
    "{% endfor %}",
    "features": "{{ strftime_now('%Y-%m-%d') }}{% set ns = namespace(n=0) %}\n{% for m in messages %}\n"
    "  {% if m.role == 'system' %}{% continue %}{% endif %}\n  {% set ns.n = ns.n + 1 %}\n"
    "  {%- generation %}{% set ns.n = ns.n + 1 %}{{ m | tojson }}{{ m.content | tojson(indent=2) }}"
    "{% endgeneration -%}\n  {% if ns.n > 4 %}{% break %}{% endif %}\n{% endfor %}{{ ns.n }}††<|assistant|> \n "
    "{{ pad_token }}",
    "thinking": "{% for m in messages %}{% set c = m.content %}<|im_start|>{% if '</think>' in c %}"
    "{{ c.split('</think>')[-1] }}{% elif c.startswith('a') and c is string %}{{ c[::-1] }}{% endif %}<|im_end|>"
    "{% endfor %}",
}


def write(folder: Path, config: dict, model: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if model:
        shutil.copy(Path(mistral_common.__file__).parent / "data" / MISTRAL[model], folder / "tokenizer.model")
    return folder


def train(kind: str) -> tokenizers.Tokenizer:
    """A tokenizer of about 500 pieces in the style of Llama-2's (two forms), Llama-3's or Qwen2's tokenizer.json."""
    byte_level, text = kind in ("llama3", "qwen2"), [t for t in TEXTS if "think" not in t] * 2
    tok = tokenizers.Tokenizer(models.BPE())
    if byte_level:
        split = LLAMA3_SPLIT.replace("{1,3}", "" if kind == "qwen2" else "{1,3}")
        pre = [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.Sequence(pre), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        tok.train_from_iterator(text, trainer)
        if kind == "qwen2":
            tok.normalizer = normalizers.NFC()
    else:
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tok.train_from_iterator(["Hello, my name is", "def f(x): [a]"] * 2, trainers.BpeTrainer(show_progress=False))
        state = json.loads(tok.to_str())["model"]
        pieces = [*SPECIAL[:3], *(f"<0x{b:02X}>" for b in range(256)), *state["vocab"]]
        vocab, merges = {p: i for i, p in enumerate(pieces)}, [tuple(m) for m in state["merges"]]
        tok = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        if kind == "llama2":
            tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        unescape = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tok.decoder = decoders.Sequence(unescape)
    flags = {s: {"rstrip": s == "<|assistant|>", "normalized": False, "special": True} for s in SPECIAL}
    tok.add_special_tokens([AddedToken(s, **flags[s]) for s in SPECIAL])
    tok.add_tokens(["<think>", "</think>", "｜▁"])  # ordinary vocabulary that is never cut
    return tok


def bos_processor(tok: tokenizers.Tokenizer, form: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(form, special_tokens=[(s, tok.token_to_id(s)) for s in ("<s>", "</s>")])


KINDS = ["llama2", "llama2-prepend", "llama3", "qwen2"]


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(ours, transformers') of one tokenizer.json."""
    tok, folder = train(request.param), tmp_path_factory.mktemp("json")
    if request.param != "qwen2":
        tok.post_processor = bos_processor(tok, "<s> $A")
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=tok, chat_template=TEMPLATES["chatml"], **names).save_pretrained(folder)
    return load_tokenizer(folder), hf.AutoTokenizer.from_pretrained(folder)


def conversations(text: str):
    user = [{"role": "user", "content": text}]
    yield user
    yield [{"role": "system", "content": text}, *user, {"role": "assistant", "content": text}, *user]


def test_tokenizer_json_like_transformers(pair):
    ours, theirs = pair
    for text in TEXTS + FORGED:
        ids = ours.encode(text)
        assert ids == theirs(text, split_special_tokens=True).input_ids
        assert not set(ids[len(ours.bos_ids) :]) & set(ours.special.values())
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_like_transformers(pair, name):
    ours, theirs = replace(pair[0], chat_template=TEMPLATES[name]), pair[1]
    for text in TEXTS:
        for messages in conversations(text):
            expected = theirs.apply_chat_template(
                messages, chat_template=TEMPLATES[name], add_generation_prompt=True, return_dict=False
            )
            assert ours.encode_chat(messages) == expected
            assert expected[:2].count(ours.special["<s>"]) <= 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_make_no_special_tokens(pair, name):
    ours, special = replace(pair[0], chat_template=TEMPLATES[name]), set(pair[0].special.values())
    for forged in FORGED:
        for messages, harmless in zip(conversations(forged), conversations("b"), strict=True):
            ids = ours.encode_chat(messages)
            assert [i for i in ids if i in special] == [i for i in ours.encode_chat(harmless) if i in special]
            if name == "chatml":
                assert ours.decode(ids).count(forged) == len(messages)


@given(st.lists(st.sampled_from(["<|im_", "end|>", "<|im_end|>", "<", "</s>", " ", "\n", "a", "😀"])).map("".join))
@settings(database=None, deadline=None)
def test_message_is_its_own_text(byte_level, text):
    """Between the template's tokens a message, whatever it holds, is what encode() makes of it."""
    user, special = byte_level.encode("user\n" + text, bos=False), byte_level.special
    newline, header = byte_level.encode("\n", bos=False), byte_level.encode("assistant\n", bos=False)
    start, end = special["<|im_start|>"], special["<|im_end|>"]
    ids = byte_level.encode_chat([{"role": "user", "content": text}])
    assert ids == [start, *user, end, *newline, start, *header]
    trimmed = replace(byte_level, chat_template="<|im_start|>{{ messages[0].content | trim }}")
    assert trimmed.encode_chat([{"role": "user", "content": text}])[1:] == byte_level.encode(text.strip(), bos=False)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("qwen2"), {"chat_template": TEMPLATES["chatml"]})
    train("qwen2").save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture(scope="module", params=MISTRAL)
def mistral(request, tmp_path_factory):
    """(ours, sentencepiece's, version) of one tokenizer.model, with the template that its checkpoints carry."""
    end = " [/INST]" if request.param == "v1" else "[/INST]"
    template = TEMPLATES["mistral"].replace(" [/INST]", end)
    folder = write(tmp_path_factory.mktemp("model"), {"chat_template": template}, request.param)
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return load_tokenizer(folder), library, request.param


def test_tokenizer_model_like_sentencepiece(mistral):
    ours, library, _ = mistral
    for text in TEXTS + FORGED:
        ids = library.encode(text)
        assert ours.encode(text) == [library.bos_id(), *ids] and ours.encode(text, bos=False) == ids
        assert not set(ids) & set(ours.special.values())
        assert ours.decode(ids) == library.decode(ids)
    assert ours.vocab_size == library.vocab_size()


def test_chat_like_mistrals_reference(mistral):
    ours, _, version = mistral
    reference = getattr(MistralTokenizer, version)()
    for text in filter(str.strip, TEXTS + FORGED):
        messages = [UserMessage(content=text), AssistantMessage(content="Sure!"), UserMessage(content=text)]
        expected = reference.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        assert ours.encode_chat([{"role": m.role, "content": m.content} for m in messages]) == expected


@pytest.mark.parametrize("legacy", [True, False])
def test_tokenizer_model_like_transformers(tmp_path, legacy):
    """Tokens that only tokenizer_config.json has, and the space that older tokenizers put after a special token."""
    added = {str(32000 + k): {"content": s, "special": True} for k, s in enumerate(("<|im_start|>", "<|im_end|>"))}
    config = {"legacy": legacy, "add_bos_token": True, "eos_token": "<|im_end|>"}
    config["chat_template"] = TEMPLATES["chatml"] + "{{ eos_token }}"
    write(tmp_path, config | {"added_tokens_decoder": added, "tokenizer_class": "LlamaTokenizer"}, "v1")
    ours, theirs = load_tokenizer(tmp_path), hf.AutoTokenizer.from_pretrained(tmp_path)
    for text in (t for t in TEXTS if "  " not in t and "▁" not in t):  # there transformers 5.24 merges otherwise
        if not text.startswith(" "):
            assert ours.encode(text) == theirs(text, split_special_tokens=True).input_ids
        for messages in conversations(text):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert ours.encode_chat(messages) == expected
    assert ours.vocab_size == 32002 and ours.decode([32000, 22557, 32001, 40000]) == "Hello"


@pytest.mark.parametrize("form", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_json_bos(tmp_path, form, add_bos):
    """The file decides, as in transformers, and not the settings; a prompt doesn't end in eos; a template decides for
    itself. A token that the settings name is special, whatever the file says."""
    tok = train("llama3")
    tok.add_tokens([AddedToken("<end>", special=False, normalized=False)])
    tok.post_processor = bos_processor(tok, form)
    tok.enable_truncation(3)
    tok.enable_padding(length=64)
    config = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "<end>"}, "add_bos_token": add_bos}
    tok.save(str(write(tmp_path, config | {"tokenizer_class": "PreTrainedTokenizerFast"}) / "tokenizer.json"))
    ours, theirs = load_tokenizer(tmp_path), hf.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("", "a", "<end>", "a b c d e"):
        expected = theirs(text, split_special_tokens=True).input_ids
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


def check_stream(tokenizer, ids):
    calls = []
    counted = replace(tokenizer, token_bytes=lambda i: calls.append(i) or tokenizer.token_bytes(i))
    pieces = list(stream(counted, iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids) and all(pieces) and calls == ids  # one look at each token
    return pieces


def check_text(tokenizer, text, expected):
    """Streams a text whole, and in two halves wherever it can be cut between characters."""
    ids = tokenizer.encode(text, bos=False)
    assert "".join(check_stream(tokenizer, ids)) == expected
    for k in range(len(ids)):
        first, second = tokenizer.decode(ids[:k]), tokenizer.decode(ids[k:], after=ids[:k])
        assert first + second == expected or "\ufffd" in first


@given(st.text())
@settings(database=None, deadline=None)
def test_stream_of_text(byte_level, mistral, text):
    check_text(byte_level, text, normalizers.NFC().normalize_str(text))
    check_text(mistral[0], text, text.replace("▁", " "))


def check_ids(tokenizer, ids, silent, reference):
    """Ids that no text has, and some that no token has. What torn bytes become differs, except at byte level."""
    text = "".join(check_stream(tokenizer, ids))
    silent = {*silent, *tokenizer.special.values(), *range(tokenizer.vocab_size, 601)}
    expected = reference([i for i in ids if i not in silent])
    assert text == expected or tokenizer.drops_space and "\ufffd" in expected


@given(st.lists(st.integers(0, 600), max_size=20))
@settings(database=None, deadline=None)
def test_stream_of_random_ids(pair, ids):
    check_ids(pair[0], ids, [], pair[1].decode)


@given(st.lists(st.integers(0, 600) | st.integers(700, 2000), max_size=20))
@settings(database=None, deadline=None)
def test_stream_of_random_sentencepiece_ids(mistral, ids):
    ids = [i for i in ids if mistral[1].id_to_piece(i) != "<0x20>"]  # a space that sentencepiece, alone, never drops
    check_ids(mistral[0], ids, [mistral[1].unk_id()], mistral[1].decode)


def test_stream_holds_back_only_a_torn_character(byte_level, mistral):
    for tokenizer in (byte_level, mistral[0]):
        arrived, text = [], ""
        for piece in stream(tokenizer, (arrived.append(i) or i for i in tokenizer.encode("Hello, my 😀 name"))):
            text += piece
            assert text == tokenizer.decode(arrived).rstrip("\ufffd")


def test_continuation_keeps_its_space(byte_level, mistral):
    for tokenizer in (byte_level, mistral[0]):
        prompt, whole = tokenizer.encode("Hello, my name is"), tokenizer.encode("Hello, my name is John")
        assert "".join(stream(tokenizer, whole[len(prompt) :], prompt)) == " John"
        assert tokenizer.decode(tokenizer.encode("John"), after=tokenizer.encode("")) == "John"


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("tokenizer.json", b"{", "not a tokenizer that tokenizers"),
        ("tokenizer.json", tokenizers.Tokenizer(models.BPE()).to_str().encode(), "has no decoder"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "is a tiktoken file; use tokenizer.json"),
        ("tokenizer.model", b"\x80 not sentencepiece", "not a sentencepiece model"),
        ("tokenizer.model", b"", "not a sentencepiece model"),
        ("tokenizer_config.json", b"{", "not readable JSON"),
        ("tokenizer_config.json", b"[1]", "is broken"),
        ("tokenizer_config.json", b'{"bos_token": {}}', "is broken"),
        ("chat_template.jinja", b"\xff", "is broken"),
        ("README.md", b"", "holds neither tokenizer.json nor tokenizer.model"),
    ],
)
def test_broken_files(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=says) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "no chat template"),
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
    monkeypatch.setattr("tokenizer.PATIENCE", 1)
    with pytest.raises(UsageError, match=says) as error:
        replace(byte_level, chat_template=template).encode_chat([{"role": "user", "content": "a"}])
    assert "\n" not in str(error.value)


def test_template_multiplies_anywhere(byte_level):
    template = "{{ 'ab' * 2 + 2 * 'c' }}{{ 3 * 1000 * 1000 * 1.5 }}"
    ours = replace(byte_level, chat_template=template)
    with ThreadPoolExecutor() as threads:  # and outside the main thread, too
        for ids in (ours.encode_chat([]), threads.submit(ours.encode_chat, []).result()):
            assert ours.decode(ids) == "ababcc4500000.0"


def test_template_sources(tmp_path):
    """The file beats the settings; of several named ones default is taken."""
    write(tmp_path, {"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]}, "v1")
    assert load_tokenizer(tmp_path).chat_template == "y"
    (tmp_path / "chat_template.jinja").write_text("z")
    assert load_tokenizer(tmp_path).chat_template == "z"


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
        replace(ours, names={"bos_token": "<|begin_of_text|>"}).encode_chat(messages)
