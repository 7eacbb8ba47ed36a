"""A llama-architecture GGUF file to model.pth and its tokenizer.

    python scripts/convert_gguf.py model.Q4_1.gguf --checkpoint_dir checkpoints/model

Reads F32, F16, BF16 and every quantized type that the gguf package dequantizes. The vocabulary becomes tokenizer.json
(byte-level BPE) or tokenizer.model (sentencepiece); bos, eos and chat template go to tokenizer_config.json.
"""

import argparse
import json
import math
import os
import re
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while torch is being loaded; run() sees to the rest
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

sys.path.insert(0, str(Path(__file__).resolve().parent))
from convert_hf_checkpoint import Tensors, convert, unpermute

from checkpoint import run
from model import ModelConfig, MoE, RopeScaling, UsageError, rope_frequencies

NAMES = {  # GGUF's names to Hugging Face's
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.{e}.gate_proj", "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
}  # fmt: skip
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {  # tokenizer.ggml.pre: how text is cut, by one pattern after the other, before byte-level BPE
    "gpt-2": [GPT2], "smollm": [r"\p{N}", GPT2], "llama-bpe": [LLAMA3], "llama3": [LLAMA3], "smaug-bpe": [LLAMA3],
    "tekken": [TEKKEN],
}  # fmt: skip
LIKE_LLAMA3 = ("llama-bpe", "llama3", "tekken")  # texts begin with bos, and a piece in the vocabulary needs no merges
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # field types

Stored = tuple[gguf.GGMLQuantizationType, np.ndarray]  # a tensor as the file has it: uint8 [..., bytes of a row]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="model.pth and the tokenizer go there")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16",
                        help="of the stored weights (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    convert_gguf(args.file, args.checkpoint_dir, getattr(torch, args.dtype))
    print(f"wrote {args.checkpoint_dir / 'model.pth'}")


def convert_gguf(file: Path, folder: Path, dtype: torch.dtype):
    if not file.is_file():
        raise UsageError(f"{file} does not exist")
    try:
        meta, found = read_gguf(file)
    except (MemoryError, OSError):
        raise
    except Exception as e:  # struct, numpy and gguf raise many types on broken input
        raise UsageError(f"{file} is truncated or not GGUF ({type(e).__name__})") from None
    try:
        if meta.get("split.count", 1) > 1:
            raise UsageError(f"{file} is one of {meta['split.count']} parts; join them with llama-gguf-split --merge")
        config = read_config(meta, found)
        tensors, read = read_tensors(found, config, dtype)
        files = tokenizer_files(meta)
    except UsageError:
        raise
    except Exception as e:  # whatever odd metadata runs into; tokenizers raises bare Exception
        why = f"{type(e).__name__} {e}".splitlines()[0]
        raise UsageError(f"{file} lacks metadata or has it wrong: {why}") from None
    part = folder / "model.pth.tmp"  # model.pth comes last: where it is, its tokenizer is too
    try:
        folder.mkdir(parents=True, exist_ok=True)
        convert(part, config, tensors, read)
        for name, data in files.items():
            (folder / f"{name}.tmp").write_bytes(data)
            os.replace(folder / f"{name}.tmp", folder / name)
        for old in {"tokenizer.json", "tokenizer.model", "chat_template.jinja"} - files.keys():
            (folder / old).unlink(missing_ok=True)
        os.replace(part, folder / "model.pth")
    except OSError as e:
        raise UsageError(f"cannot write to {folder}: {e.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def read_gguf(file: Path) -> tuple[dict, dict[str, Stored]]:
    """The metadata and the tensors, these memory-mapped. Broken files raise ValueError, struct.error and the like; the
    gguf package's own reader takes seconds for a vocabulary and loops as often as a header tells it to."""
    data, at = np.memmap(file, mode="r"), 0

    def take(form: str):
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return value

    def count(form: str = "Q") -> int:
        n = take(form)
        if n > 2**24:
            raise ValueError("no file has so many")
        return n

    def string() -> str:
        return take(f"{count()}s").decode()

    def field(kind: int):
        if kind == 9:
            kind, n = take("I"), count()
            return [field(kind) for _ in range(n)]
        return string() if kind == 8 else take(SCALARS[kind])

    if take("4s") != b"GGUF" or take("I") not in (2, 3):
        raise ValueError("not GGUF")
    n_tensors, n_fields = count(), count()
    meta = dict((string(), field(take("I"))) for _ in range(n_fields))
    infos = [(string(), [take("Q") for _ in range(count("I"))], take("I"), take("Q")) for _ in range(n_tensors)]
    align = meta.get("general.alignment", 32)
    start, tensors = -(-at // align) * align, {}
    for name, shape, kind, offset in infos:
        kind = gguf.GGMLQuantizationType(kind)
        shape = gguf.quant_shape_to_byte_shape(shape[::-1], kind)
        tensors[name] = kind, data[start + offset :][: math.prod(shape)].reshape(shape)
    return meta, tensors


def read_config(meta: dict, tensors: dict[str, Stored]) -> ModelConfig:
    arch = meta["general.architecture"]
    if arch != "llama":
        raise UsageError(f"GGUF architecture {arch!r} is not supported, only llama")
    get = lambda key, default=None: meta.get(f"llama.{key}", default)  # noqa: E731
    n_heads, dim = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    head_dim = get("attention.key_length", dim // n_heads)
    kind, factor = get("rope.scaling.type", "linear"), get("rope.scaling.factor", get("rope.scale_linear", 0.0))
    if kind not in ("none", "linear"):
        raise UsageError(f"llama.rope.scaling.type = {kind!r} is not supported")
    if get("rope.dimension_count", head_dim) != head_dim:
        raise UsageError("llama.rope.dimension_count differs from the head's size: partial rotation is not supported")
    ends = [meta.get(f"tokenizer.ggml.{x}_token_id") for x in ("eos", "eot", "eom")]
    config = ModelConfig(
        dim=dim,
        n_layers=meta["llama.block_count"],
        n_heads=n_heads,
        n_kv_heads=get("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        ffn_dim=meta["llama.feed_forward_length"],
        vocab_size=tensors["token_embd.weight"][1].shape[0],
        max_seq_len=meta["llama.context_length"],
        norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=get("rope.freq_base", 10000.0),
        rope_scaling=RopeScaling("linear", factor) if kind == "linear" and factor else None,  # 0 is none
        qkv_bias="blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        ffn_bias="blk.0.ffn_down.bias" in tensors,
        tie_embeddings="output.weight" not in tensors,
        moe=MoE(get("expert_count"), meta["llama.expert_used_count"]) if get("expert_count") else None,
        bos_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
    )
    if "rope_freqs.weight" in tensors:  # llama3 scaling, stored as what each frequency is divided by
        factors = torch.tensor(tensors.pop("rope_freqs.weight")[1].view(np.float32))
        llama3 = replace(config, rope_scaling=RopeScaling("llama3", float(factors.max())))
        if not torch.allclose(rope_frequencies(config) / rope_frequencies(llama3), factors, rtol=1e-3):
            raise UsageError("rope_freqs.weight is not Llama 3.1's scaling, which is the only one supported")
        config = llama3
    return config


def read_tensors(stored: dict[str, Stored], config: ModelConfig, dtype: torch.dtype) -> tuple[Tensors, Callable]:
    """The GGUF's tensors by Hugging Face's names, on the meta device, and what reads one in its order of rows."""
    tensors, sources = {}, {}
    for name, (kind, data) in stored.items():
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if not match or match[2] not in NAMES:
            raise UsageError(f"the GGUF's tensor {name} has no place in this model")
        new = (f"model.layers.{match[1]}." if match[1] else "") + f"{NAMES[match[2]]}.{match[3]}"
        for e, part in enumerate(data if "{e}" in new else [data]):
            shape = gguf.quant_shape_from_byte_shape(part.shape, kind)
            tensors[new.format(e=e)] = torch.empty(shape, dtype=dtype, device="meta")
            sources[new.format(e=e)] = kind, part, match[2] in ("attn_q", "attn_k")

    def read(name: str) -> torch.Tensor:
        kind, data, rotated = sources[name]
        try:
            values = gguf.dequantize(data, kind)
        except NotImplementedError:
            raise UsageError(f"{name} is {kind.name}, which the gguf package cannot dequantize") from None
        tensor = torch.from_numpy(np.require(values, requirements="W"))
        return unpermute(tensor, config.head_dim) if rotated else tensor

    return tensors, read


def tokenizer_files(meta: dict) -> dict[str, bytes]:
    """tokenizer.json or tokenizer.model, and tokenizer_config.json, from the GGUF's own vocabulary."""
    pieces, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    bos, eos = (meta.get(f"tokenizer.ggml.{x}_token_id") for x in ("bos", "eos"))
    kind, pre = meta["tokenizer.ggml.model"], meta.get("tokenizer.ggml.pre")
    add_bos = bos is not None and bool(meta.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in LIKE_LLAMA3))
    if kind == "gpt2":
        files = {"tokenizer.json": byte_level_bpe(meta, pieces, types, bos if add_bos else None).to_str().encode()}
    elif kind == "llama":
        files = {"tokenizer.model": sentencepiece_model(meta, pieces, types)}
    else:
        raise UsageError(f"tokenizer.ggml.model = {kind!r} is not supported; gpt2 and llama are")
    settings = {
        "bos_token": pieces[bos] if bos is not None else None,
        "eos_token": pieces[eos] if eos is not None else None,
        "add_bos_token": add_bos,
        "chat_template": meta.get("tokenizer.chat_template"),
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    return files | {"tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode()}


def byte_level_bpe(meta: dict, pieces: list[str], types: list[int], bos: int | None) -> Tokenizer:
    pre = meta.get("tokenizer.ggml.pre")
    if pre not in SPLITS:
        raise UsageError(f"tokenizer.ggml.pre = {pre!r} is not supported; these are: {', '.join(SPLITS)}")
    ids, merges = {p: i for i, p in enumerate(pieces)}, [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    if not all(len(m) == 2 and ids.keys() >= {*m, "".join(m)} for m in merges):  # at which tokenizers would panic
        raise ValueError("tokenizer.ggml.merges makes what is no token")
    tok = Tokenizer(models.BPE(ids, merges, ignore_merges=pre in LIKE_LLAMA3))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    tok.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.add_tokens(
        [AddedToken(p, special=t == CONTROL, normalized=False)
         for p, t in zip(pieces, types, strict=True) if t in (CONTROL, USER_DEFINED)]
    )  # fmt: skip
    if bos is not None:
        tok.post_processor = processors.TemplateProcessing([pieces[bos], "$A"], special_tokens=[(pieces[bos], bos)])
    return tok


def sentencepiece_model(meta: dict, pieces: list[str], types: list[int]) -> bytes:
    from sentencepiece import sentencepiece_model_pb2 as pb

    proto = pb.ModelProto()
    for piece, score, kind in zip(pieces, meta["tokenizer.ggml.scores"], types, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer = proto.trainer_spec
    trainer.model_type, trainer.byte_fallback, trainer.unk_id = trainer.BPE, 6 in types, types.index(2)
    trainer.bos_id, trainer.eos_id = (meta.get(f"tokenizer.ggml.{x}_token_id", -1) for x in ("bos", "eos"))
    for x in ("bos", "eos", "unk"):  # sentencepiece looks them up by piece
        if (i := getattr(trainer, f"{x}_id")) >= 0:
            setattr(trainer, f"{x}_piece", pieces[i])
    normal = proto.normalizer_spec
    normal.name, normal.remove_extra_whitespaces, normal.escape_whitespaces = "identity", False, True
    normal.add_dummy_prefix = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
    return proto.SerializeToString()


if __name__ == "__main__":
    run(main)
