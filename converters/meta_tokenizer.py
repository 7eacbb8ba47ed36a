"""Converts the tokenizer in Meta's folders, for meta.py. Llama 3's tokenizer.model is a tiktoken file, and becomes a
tokenizer.json. Llama 1's and 2's tokenizer.model is a sentencepiece file, and stays as it is.

    config, files = read_meta_tokenizer(folder, config)    # with bos and end tokens of the tokenizer; name -> content

Every line of a tiktoken file is a token in base64 and its rank. The rank is also the token's id. tiktoken splits a text
into words with a regular expression. A word that is a token stays whole. Any other word is split into bytes, and then
neighbours are merged: always the pair whose token has the lowest rank. tokenizer.json has merges instead of ranks.
"""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken, models, processors

from config import ModelConfig
from converters.gguf_tokenizer import LLAMA3_WORDS
from text.tokenizer import byte_level_alphabet
from text.tokenizer_files import TIKTOKEN_LINE, byte_level_bpe, read_tokenizer_model
from utils.errors import UsageError

# Names of special tokens; "" stands for a reserved one
LLAMA3_NAMES = ["begin_of_text", "end_of_text", "", "", "", "", "start_header_id", "end_header_id", "", "eot_id"]
LLAMA31_NAMES = [
    "begin_of_text", "end_of_text", "", "", "finetune_right_pad_id", "", "start_header_id", "end_header_id", "eom_id",
    "eot_id", "python_tag",
]
# For the chat models. Base models were not trained on a template.
LLAMA3_TEMPLATE = """
{{- bos_token }}
{%- for m in messages -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"""


def read_meta_tokenizer(folder: Path, config: ModelConfig) -> tuple[ModelConfig, dict[str, bytes]]:
    """Returns (the config with bos and end tokens of the tokenizer, the files to write). tokenizer.model is in the
    folder or, as in Meta's downloads, in its parent."""
    here, above = folder / "tokenizer.model", folder.absolute().parent / "tokenizer.model"
    path = here if here.is_file() else above
    if not path.is_file():
        return config, {}
    if not is_tiktoken(path):
        library = read_tokenizer_model(path)
        files = {} if path == here else {path.name: path.read_bytes()}
        bos_id, eos_id = library.bos_id(), library.eos_id()  # -1 means none
        return replace(config, bos_id=bos_id if bos_id >= 0 else None, eos_ids=(eos_id,) if eos_id >= 0 else ()), files
    ranks = read_tiktoken(path)
    n = len(ranks)
    special = special_tokens(config.vocab_size - n, is_llama30=config.rope_scaling is None)
    ends = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    eos_ids = tuple(n + i for i, token in enumerate(special) if token in ends)
    has_files = (folder / "tokenizer.json").is_file()
    return replace(config, bos_id=n, eos_ids=eos_ids), {} if has_files else make_tokenizer_files(ranks, special)


def is_tiktoken(path: Path) -> bool:
    with open(path, "rb") as file:
        return re.match(TIKTOKEN_LINE, file.read(200)) is not None


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """Returns the rank of each token, after checks that the ranks are 0, 1, 2 ... and that every byte is a token."""
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        raise UsageError(f"{path}: line {len(ranks) + 1} is not a token in base64 and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UsageError(f"{path}: the {len(ranks)} tokens do not have the ranks from 0 on")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise UsageError(f"{path} lacks tokens of single bytes")
    return ranks


def special_tokens(n: int, is_llama30: bool) -> list[str]:
    """Returns the n special tokens. Their ids follow the ids of all other tokens."""
    names = LLAMA3_NAMES if is_llama30 else LLAMA31_NAMES
    if n < len(names):
        raise UsageError(f"Llama 3 has at least {len(names)} special tokens; this vocabulary leaves room for {n}")
    tokens, n_reserved = [], 0
    for name in names + [""] * (n - len(names)):
        tokens.append(f"<|{name or f'reserved_special_token_{n_reserved}'}|>")
        n_reserved += not name
    return tokens


def make_tokenizer_files(ranks: dict[bytes, int], special: list[str]) -> dict[str, bytes]:
    character_of = {byte: character for character, byte in byte_level_alphabet().items()}

    def spell(token: bytes) -> str:
        return "".join(character_of[byte] for byte in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [(spell(left), spell(right)) for left, right in find_merges(ranks)]
    bpe = models.BPE(vocab, merges, ignore_merges=True)  # a word that is a token stays whole
    library = byte_level_bpe(bpe, [LLAMA3_WORDS])
    library.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    bos = special[0]
    library.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, library.token_to_id(bos))])
    config = {"bos_token": bos, "eos_token": special[1], "chat_template": LLAMA3_TEMPLATE}
    return {
        "tokenizer.json": library.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }


def find_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Returns the pair of tokens that merges into each token, in the order of ranks. A token that only a whole word
    makes has no pair."""
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = merge_pairs(token, ranks, ranks[token])
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def merge_pairs(word: bytes, ranks: dict[bytes, int], end: int) -> list[bytes]:
    """Returns the tokens of a word, using only those with ranks below end."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 1:
        pair_ranks = [ranks.get(left + right, end) for left, right in zip(parts, parts[1:], strict=False)]
        lowest = min(pair_ranks)
        if lowest >= end:
            break
        i = pair_ranks.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
