"""Makes the files of a tokenizer from the vocabulary in the metadata of a GGUF.

    files = make_tokenizer_files(metadata)    # name -> contents

They are tokenizer.json (byte-level BPE) or tokenizer.model (sentencepiece), and tokenizer_config.json. To add a value
of tokenizer.ggml.pre, add a row to SPLITS.
"""

import json

from tokenizers import AddedToken, Tokenizer, models, normalizers, processors

from text.tokenizer_files import QWEN2_SPLIT, byte_level_bpe
from utils.errors import UsageError

# Regular expressions that split a text into words before byte-level BPE
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {  # tokenizer.ggml.pre -> regular expressions, applied one after the other
    **dict.fromkeys(("gpt-2", "mellum"), [GPT2]),
    **dict.fromkeys(("smollm", "refact", "starcoder", "minerva-7b"), [r"\p{N}", GPT2]),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx"), [LLAMA3_WORDS]),
    **dict.fromkeys(("chatglm-bpe", "glm4"), [LLAMA3_WORDS]),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), [QWEN2_SPLIT]),
    "gpt-4o": [GPT4O],
    "tekken": [TEKKEN],
}
# A text begins with bos, and a word in the vocabulary needs no merges
LIKE_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
LIKE_GLM4 = ("chatglm-bpe", "glm4")  # a text begins with GLM4_PREFIX
GLM4_PREFIX = ("[gMASK]", "<sop>")

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type and sentencepiece: types of pieces


def make_tokenizer_files(metadata: dict) -> dict[str, bytes]:
    """Returns the contents of the files, by name. Raises UsageError if the tokenizer is not supported, and other errors
    if metadata are missing or broken."""
    pieces = metadata["tokenizer.ggml.tokens"]
    model, pre = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre")
    bos, eos = metadata.get("tokenizer.ggml.bos_token_id"), metadata.get("tokenizer.ggml.eos_token_id")
    adds_bos_by_default = model == "llama" or pre in LIKE_LLAMA3
    adds_bos = bos is not None and bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos_by_default))
    if model == "gpt2":
        prefix = [bos] if adds_bos else []
        if pre in LIKE_GLM4 and {*GLM4_PREFIX} <= {*pieces}:
            prefix = [pieces.index(piece) for piece in GLM4_PREFIX]
        files = {"tokenizer.json": bpe_tokenizer(metadata, prefix).to_str().encode()}
    elif model == "llama":
        files = {"tokenizer.model": sentencepiece_model(metadata)}
    else:
        raise UsageError(f"tokenizer.ggml.model = {model!r} is not supported; gpt2 and llama are")
    settings = {
        "bos_token": None if bos is None else pieces[bos],
        "eos_token": None if eos is None else pieces[eos],
        "add_bos_token": adds_bos,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False).encode()
    return files


def bpe_tokenizer(metadata: dict, prefix: list[int]) -> Tokenizer:
    """prefix: the tokens to put before every text"""
    pieces, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in SPLITS:
        raise UsageError(f"tokenizer.ggml.pre = {pre!r} is not supported; these are: {', '.join(SPLITS)}")
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    for merge in merges:  # at such a merge the library panics
        if len(merge) != 2 or not ids.keys() >= {*merge, "".join(merge)}:
            raise ValueError("tokenizer.ggml.merges makes something that is not a token")
    tokenizer = byte_level_bpe(models.BPE(ids, merges, ignore_merges=pre in LIKE_LLAMA3), SPLITS[pre])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    added = []
    for piece, token_type in zip(pieces, types, strict=True):
        if token_type in (CONTROL, USER_DEFINED):
            added.append(AddedToken(piece, special=token_type == CONTROL, normalized=False))
    tokenizer.add_tokens(added)
    if prefix:
        special = [(pieces[i], i) for i in prefix]
        template = [*(piece for piece, _ in special), "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    return tokenizer


def sentencepiece_model(metadata: dict) -> bytes:
    try:
        from sentencepiece import sentencepiece_model_pb2  # here, because only this function needs protobuf
    except ImportError as e:
        raise UsageError(f"this file's tokenizer needs `pip install protobuf` ({e})") from None

    pieces, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    unknown = types.index(UNKNOWN) if UNKNOWN in types else metadata["tokenizer.ggml.unknown_token_id"]
    model = sentencepiece_model_pb2.ModelProto()
    for i, (piece, score, token_type) in enumerate(zip(pieces, metadata["tokenizer.ggml.scores"], types, strict=True)):
        if token_type == USER_DEFINED:
            piece = piece.replace(" ", "▁")  # as sentencepiece writes a space
        model.pieces.add(piece=piece, score=score, type=UNKNOWN if i == unknown else token_type)
    trainer = model.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.byte_fallback = BYTE in types
    bos, eos = metadata.get("tokenizer.ggml.bos_token_id", -1), metadata.get("tokenizer.ggml.eos_token_id", -1)
    for name, i in {"bos": bos, "eos": eos, "unk": unknown}.items():
        setattr(trainer, f"{name}_id", i)
        if i >= 0:  # sentencepiece looks the token up by its piece
            setattr(trainer, f"{name}_piece", pieces[i])
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    normalizer.add_dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    return model.SerializeToString()
