"""Tokenizers of all styles, trained on a few lines, and those of Mistral, which come with mistral_common."""

import json
import shutil
from pathlib import Path

import mistral_common
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

MISTRAL = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>", "[INST]", "[/INST]", "<|assistant|>", "|x|", "†", "††"]
TEXTS = [
    "", " ", "a", "   a  b ", "trailing ", "\t", "\n\n\n", "a\n b\r\n\r\nc", "Hello, my name is", "don't I'LL We'Ve",
    "def f(x):\n    return x**2  # ok\n\n\tif a<b: pass\n", "1234567890 12 3.14", "x" * 40, "<|unknown|> <x> [a]",
    "😀", "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪", "你好，世界！", "日本語 のテキスト", "مرحبا بالعالم", "हिन्दी ภาษาไทย", "e\u0301 ﬁ ①",
    "a\u00a0b\u3000c\u200b", "\ufffd \x00\x7f \U0010fffd", "▁x ▁ Ġ Ċ", "<0x0A>", "<think>a</think>｜▁",
]
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
    "qwen3": "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{% set c = '<think>\n\n</think>\n\n' + c %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
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
    """Trains a tokenizer of about 500 pieces, in the style of the tokenizer.json of Llama-2 (two forms), Llama-3 or
    Qwen2."""
    tok = train_byte_level(kind) if kind in ("llama3", "qwen2") else train_with_byte_fallback(kind)
    flags = {s: {"rstrip": s == "<|assistant|>", "normalized": False, "special": True} for s in SPECIAL}
    tok.add_special_tokens([AddedToken(s, **flags[s]) for s in SPECIAL])
    tok.add_tokens(["<think>", "</think>", "｜▁"])  # ordinary vocabulary that is never cut
    return tok


def train_byte_level(kind: str) -> tokenizers.Tokenizer:
    tok = tokenizers.Tokenizer(models.BPE())
    split = LLAMA3_SPLIT.replace("{1,3}", "") if kind == "qwen2" else LLAMA3_SPLIT
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator([text for text in TEXTS if "think" not in text] * 2, trainer)
    if kind == "qwen2":
        tok.normalizer = normalizers.NFC()
    return tok


def train_with_byte_fallback(kind: str) -> tokenizers.Tokenizer:
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tok.train_from_iterator(["Hello, my name is", "def f(x): [a]"] * 2, trainers.BpeTrainer(show_progress=False))
    trained = json.loads(tok.to_str())["model"]
    pieces = [*SPECIAL[:3], *(f"<0x{b:02X}>" for b in range(256)), *trained["vocab"]]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in trained["merges"]]
    tok = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "llama2":
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tok


def conversations(text: str):
    """Returns two conversations that contain text."""
    user = [{"role": "user", "content": text}]
    yield user
    yield [{"role": "system", "content": text}, *user, {"role": "assistant", "content": text}, *user]
