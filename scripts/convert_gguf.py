"""A llama-architecture GGUF file to model.pth and its tokenizer.

    python scripts/convert_gguf.py model.Q4_1.gguf --checkpoint_dir checkpoints/model

Reads F32, F16, BF16 and every quantized type that the gguf package dequantizes. The vocabulary becomes tokenizer.json
(byte-level BPE) or tokenizer.model (sentencepiece); bos, eos and chat template go to tokenizer_config.json.
"""

import json
import math
import os
import re
import struct
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli

if __name__ == "__main__":
    cli.exit_on_interrupt()

import gguf
import numpy as np
import torch
from convert_hf_checkpoint import Reader, Tensors, convert, unpermute
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from config import ModelConfig, MoEConfig, RopeScaling, UsageError
from model import rope_frequencies

HF_NAMES = {  # GGUF's names of modules, and Hugging Face's
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # no module's: what each of RoPE's frequencies is divided by

# tokenizer.ggml.pre: by which patterns, one after the other, a text is cut before byte-level BPE
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
SPLITS = {
    "gpt-2": [GPT2], "smollm": [r"\p{N}", GPT2], "tekken": [TEKKEN],
    "llama-bpe": [LLAMA3], "llama3": [LLAMA3], "smaug-bpe": [LLAMA3],
}  # fmt: skip
LIKE_LLAMA3 = ("llama-bpe", "llama3", "tekken")  # texts begin with bos, and a piece in the vocabulary needs no merges

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # kinds of pieces in tokenizer.ggml.token_type; sentencepiece's, too


def main():
    parser = cli.make_parser(__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="model.pth and the tokenizer go there")
    help = "of the stored weights (default: %(default)s)"
    parser.add_argument("--dtype", choices=cli.PRECISIONS, default="bfloat16", help=help)
    args = parser.parse_args()
    convert_gguf(args.file, args.checkpoint_dir, getattr(torch, args.dtype))
    print(f"wrote {args.checkpoint_dir / 'model.pth'}")


def convert_gguf(file: Path, folder: Path, dtype: torch.dtype):
    """Writes model.pth, its weights in dtype, and the tokenizer's files to folder."""
    if not file.is_file():
        raise UsageError(f"{file} does not exist")
    try:
        meta, stored = read_gguf(file)
    except (MemoryError, OSError):
        raise
    except Exception as e:  # struct, numpy and gguf raise many types on broken input
        raise UsageError(f"{file} is truncated or not GGUF ({type(e).__name__})") from None
    try:
        if meta.get("split.count", 1) > 1:
            raise UsageError(f"{file} is one of {meta['split.count']} parts; join them with llama-gguf-split --merge")
        config = read_config(meta, stored)
        tensors, read = read_tensors(stored, config, dtype)
        tokenizer = tokenizer_files(meta)
    except UsageError:
        raise
    except Exception as e:  # whatever odd metadata runs into; tokenizers raises bare Exception
        why = f"{type(e).__name__} {e}".splitlines()[0]
        raise UsageError(f"{file} lacks metadata or has it wrong: {why}") from None
    write_folder(folder, config, tensors, read, tokenizer)


def write_folder(folder: Path, config: ModelConfig, tensors: Tensors, read: Reader, tokenizer: dict[str, bytes]):
    """model.pth gets its name last: where it is, its tokenizer is too."""
    unnamed = folder / "model.pth.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        convert(unnamed, config, tensors, read)
        for name, data in tokenizer.items():
            (folder / f"{name}.tmp").write_bytes(data)
            os.replace(folder / f"{name}.tmp", folder / name)
        for of_another_model in {"tokenizer.json", "tokenizer.model", "chat_template.jinja"} - tokenizer.keys():
            (folder / of_another_model).unlink(missing_ok=True)
        os.replace(unnamed, folder / "model.pth")
    except OSError as e:
        raise UsageError(f"cannot write to {folder}: {e.strerror}") from None
    finally:
        unnamed.unlink(missing_ok=True)


# ---- The file -------------------------------------------------------------------------------------------------------


@dataclass
class StoredTensor:
    """As the file has it."""

    type: gguf.GGMLQuantizationType
    data: np.ndarray  # uint8 [..., bytes of a row], memory-mapped

    def shape(self) -> tuple[int, ...]:
        return gguf.quant_shape_from_byte_shape(self.data.shape, self.type)


class Header:
    """What a GGUF file begins with, value by value. The gguf package's own reader takes seconds for a vocabulary, and
    loops as often as a broken header tells it to."""

    SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    STRING, ARRAY = 8, 9
    MAX_COUNT = 2**24  # tensors, fields, elements or characters

    def __init__(self, data: np.ndarray):
        self.data, self.offset = data, 0

    def scalar(self, form: str):
        """form: as the module struct spells it."""
        (value,) = struct.unpack_from("<" + form, self.data, self.offset)
        self.offset += struct.calcsize("<" + form)
        return value

    def count(self, form: str = "Q") -> int:
        n = self.scalar(form)
        if n > self.MAX_COUNT:
            raise ValueError("no file has so many")
        return n

    def string(self) -> str:
        return self.scalar(f"{self.count()}s").decode()

    def value(self, kind: int):
        if kind == self.ARRAY:
            kind = self.scalar("I")
            return [self.value(kind) for _ in range(self.count())]
        if kind == self.STRING:
            return self.string()
        return self.scalar(self.SCALARS[kind])


def read_gguf(file: Path) -> tuple[dict, dict[str, StoredTensor]]:
    """The metadata and the tensors. Broken files raise ValueError, struct.error and the like."""
    data = np.memmap(file, mode="r")
    header = Header(data)
    if header.scalar("4s") != b"GGUF" or header.scalar("I") not in (2, 3):
        raise ValueError("not GGUF")
    n_tensors, n_fields = header.count(), header.count()
    meta = {}
    for _ in range(n_fields):
        name = header.string()
        meta[name] = header.value(kind=header.scalar("I"))
    infos = []
    for _ in range(n_tensors):
        name = header.string()
        shape = [header.scalar("Q") for _ in range(header.count("I"))]
        infos.append((name, shape[::-1], header.scalar("I"), header.scalar("Q")))
    alignment = meta.get("general.alignment", 32)
    start = -(-header.offset // alignment) * alignment  # rounded up
    tensors = {}
    for name, shape, kind, offset in infos:
        kind = gguf.GGMLQuantizationType(kind)
        shape = gguf.quant_shape_to_byte_shape(shape, kind)
        tensor = data[start + offset :][: math.prod(shape)]
        tensors[name] = StoredTensor(kind, tensor.reshape(shape))
    return meta, tensors


def read_config(meta: dict, stored: dict[str, StoredTensor]) -> ModelConfig:
    arch = meta["general.architecture"]
    if arch != "llama":
        raise UsageError(f"GGUF architecture {arch!r} is not supported, only llama")
    n_heads, dim = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    head_dim = meta.get("llama.attention.key_length", dim // n_heads)
    if meta.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise UsageError("llama.rope.dimension_count differs from the head's size: partial rotation is not supported")
    n_experts = meta.get("llama.expert_count")
    moe = MoEConfig(n_experts, meta["llama.expert_used_count"]) if n_experts else None
    ends = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    config = ModelConfig(
        dim=dim, n_layers=meta["llama.block_count"], ffn_dim=meta["llama.feed_forward_length"],
        n_heads=n_heads, n_kv_heads=meta.get("llama.attention.head_count_kv", n_heads), head_dim=head_dim,
        vocab_size=stored["token_embd.weight"].data.shape[0], max_seq_len=meta["llama.context_length"],
        norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=meta.get("llama.rope.freq_base", 10000.0), rope_scaling=read_linear_scaling(meta),
        qkv_bias="blk.0.attn_q.bias" in stored, out_bias="blk.0.attn_output.bias" in stored,
        ffn_bias="blk.0.ffn_down.bias" in stored, tie_embeddings="output.weight" not in stored, moe=moe,
        bos_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),  # each once
    )  # fmt: skip
    if ROPE_FACTORS in stored:
        config = replace(config, rope_scaling=read_llama3_scaling(config, stored[ROPE_FACTORS]))
    return config


def read_linear_scaling(meta: dict) -> RopeScaling | None:
    kind = meta.get("llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise UsageError(f"llama.rope.scaling.type = {kind!r} is not supported")
    factor = meta.get("llama.rope.scaling.factor", meta.get("llama.rope.scale_linear", 0.0))  # 0: no scaling
    return RopeScaling("linear", factor) if kind == "linear" and factor else None


def read_llama3_scaling(config: ModelConfig, stored: StoredTensor) -> RopeScaling:
    """Llama 3.1's scaling, of which a GGUF holds nothing but what it divides the frequencies of config by."""
    factors = torch.tensor(stored.data.view(np.float32))
    scaling = RopeScaling("llama3", float(factors.max()))
    scaled = replace(config, rope_scaling=scaling)
    if not torch.allclose(rope_frequencies(config) / rope_frequencies(scaled), factors, rtol=1e-3):
        raise UsageError(f"{ROPE_FACTORS} is not Llama 3.1's scaling, which is the only one supported")
    return scaling


def read_tensors(stored: dict[str, StoredTensor], config: ModelConfig, dtype: torch.dtype) -> tuple[Tensors, Reader]:
    """What convert takes: the GGUF's tensors by Hugging Face's names, on the meta device, and a function that reads one
    of them, its rows in Hugging Face's order."""
    tensors: Tensors = {}
    sources: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if name == ROPE_FACTORS:
            continue
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if match is None or match[2] not in HF_NAMES:
            raise UsageError(f"the GGUF's tensor {name} has no place in this model")
        layer, module, kind = match.groups()
        hf_name = f"{HF_NAMES[module]}.{kind}"
        if layer is not None:
            hf_name = f"model.layers.{layer}.{hf_name}"
        matrices = tensor.data if "{e}" in hf_name else [tensor.data]  # of all experts, or one
        for e, data in enumerate(matrices):
            source = sources[hf_name.format(e=e)] = StoredTensor(tensor.type, data)
            tensors[hf_name.format(e=e)] = torch.empty(source.shape(), dtype=dtype, device="meta")

    def read(name: str) -> Tensor:
        source = sources[name]
        try:
            values = gguf.dequantize(source.data, source.type)
        except NotImplementedError:
            raise UsageError(f"{name} is {source.type.name}, which the gguf package cannot dequantize") from None
        tensor = torch.from_numpy(np.require(values, requirements="W"))  # writable, or PyTorch warns
        return unpermute(tensor, config.head_dim) if re.search(r"[qk]_proj\.\w+$", name) else tensor

    return tensors, read


# ---- The tokenizer --------------------------------------------------------------------------------------------------


def tokenizer_files(meta: dict) -> dict[str, bytes]:
    """tokenizer.json or tokenizer.model, and tokenizer_config.json, from the GGUF's own vocabulary."""
    pieces, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    kind, pre = meta["tokenizer.ggml.model"], meta.get("tokenizer.ggml.pre")
    bos, eos = meta.get("tokenizer.ggml.bos_token_id"), meta.get("tokenizer.ggml.eos_token_id")
    default = kind == "llama" or pre in LIKE_LLAMA3
    adds_bos = bos is not None and bool(meta.get("tokenizer.ggml.add_bos_token", default))
    if kind == "gpt2":
        tokenizer = byte_level_bpe(meta, pieces, types, bos if adds_bos else None)
        files = {"tokenizer.json": tokenizer.to_str().encode()}
    elif kind == "llama":
        files = {"tokenizer.model": sentencepiece_model(meta, pieces, types)}
    else:
        raise UsageError(f"tokenizer.ggml.model = {kind!r} is not supported; gpt2 and llama are")
    settings = {
        "bos_token": None if bos is None else pieces[bos],
        "eos_token": None if eos is None else pieces[eos],
        "add_bos_token": adds_bos,
        "chat_template": meta.get("tokenizer.chat_template"),
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False).encode()
    return files


def byte_level_bpe(meta: dict, pieces: list[str], types: list[int], bos: int | None) -> Tokenizer:
    """A tokenizer whose texts begin with bos, if there is one."""
    pre = meta.get("tokenizer.ggml.pre")
    if pre not in SPLITS:
        raise UsageError(f"tokenizer.ggml.pre = {pre!r} is not supported; these are: {', '.join(SPLITS)}")
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    for merge in merges:  # of which tokenizers would panic
        if len(merge) != 2 or not ids.keys() >= {*merge, "".join(merge)}:
            raise ValueError("tokenizer.ggml.merges makes what is no token")
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=pre in LIKE_LLAMA3))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    added = [(piece, kind) for piece, kind in zip(pieces, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(piece, special=kind == CONTROL, normalized=False) for piece, kind in added])
    if bos is not None:
        begin = pieces[bos]
        tokenizer.post_processor = processors.TemplateProcessing([begin, "$A"], special_tokens=[(begin, bos)])
    return tokenizer


def sentencepiece_model(meta: dict, pieces: list[str], types: list[int]) -> bytes:
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf, which nothing else here does

    model = sentencepiece_model_pb2.ModelProto()
    for piece, score, kind in zip(pieces, meta["tokenizer.ggml.scores"], types, strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.byte_fallback = BYTE in types
    bos, eos = meta.get("tokenizer.ggml.bos_token_id", -1), meta.get("tokenizer.ggml.eos_token_id", -1)
    for name, i in {"bos": bos, "eos": eos, "unk": types.index(UNKNOWN)}.items():
        setattr(trainer, f"{name}_id", i)
        if i >= 0:  # sentencepiece looks it up by its piece
            setattr(trainer, f"{name}_piece", pieces[i])
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    normalizer.add_dummy_prefix = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
    return model.SerializeToString()


if __name__ == "__main__":
    cli.run(main)
