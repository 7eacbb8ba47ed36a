"""A llama-architecture GGUF file to model.pth and its tokenizer.

    python scripts/convert_gguf.py model.Q4_1.gguf --checkpoint_dir checkpoints/model

Reads F32, F16, BF16 and every quantized type that the gguf package dequantizes. The vocabulary becomes tokenizer.json
(byte-level BPE) or tokenizer.model (sentencepiece); bos, eos and chat template go to tokenizer_config.json.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

sys.path.insert(0, str(Path(__file__).resolve().parent))
from convert_hf_checkpoint import Source, convert, unpermute

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
SPLITS = {  # tokenizer.ggml.pre: how text is cut before byte-level BPE
    "gpt-2": GPT2, "default": GPT2, "smollm": GPT2, "llama-bpe": LLAMA3, "llama3": LLAMA3, "smaug-bpe": LLAMA3,
    "qwen2": LLAMA3.replace("{1,3}", ""),
}  # fmt: skip
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="model.pth and the tokenizer go there")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16",
                        help="of the stored weights (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    if not args.file.is_file():
        raise UsageError(f"{args.file} does not exist")
    try:
        reader = gguf.GGUFReader(args.file)
        meta = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {t.name: t for t in reader.tensors}
    except Exception as e:  # gguf and numpy raise many types on broken input
        raise UsageError(f"{args.file} is truncated or not GGUF ({type(e).__name__})") from None
    try:
        config = read_config(meta, tensors)
        sources = read_sources(tensors, config, getattr(torch, args.dtype))
        args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        write_tokenizer(meta, args.checkpoint_dir)
    except KeyError as e:
        raise UsageError(f"{args.file} lacks {e}") from None
    except OSError as e:
        raise UsageError(f"cannot write to {args.checkpoint_dir}: {e.strerror}") from None
    convert(args.checkpoint_dir / "model.pth", config, sources)
    print(f"wrote {args.checkpoint_dir / 'model.pth'}")


def read_config(meta: dict, tensors: dict) -> ModelConfig:
    arch = meta["general.architecture"]
    if arch != "llama":
        raise UsageError(f"GGUF architecture {arch!r} is not supported, only llama")
    get = lambda key, default=None: meta.get(f"llama.{key}", default)  # noqa: E731
    n_heads, dim = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    head_dim = get("attention.key_length", dim // n_heads)
    kind, scaling, theta = get("rope.scaling.type", "none"), None, get("rope.freq_base", 10000.0)
    if kind not in ("none", "linear"):
        raise UsageError(f"llama.rope.scaling.type = {kind!r} is not supported")
    if get("rope.dimension_count", head_dim) != head_dim:
        raise UsageError("llama.rope.dimension_count differs from the head's size: partial rotation is not supported")
    if kind == "linear":
        scaling = RopeScaling("linear", get("rope.scaling.factor", 1.0))
    ends = [meta.get(f"tokenizer.ggml.{x}_token_id") for x in ("eos", "eot", "eom")]
    config = ModelConfig(
        dim=dim,
        n_layers=meta["llama.block_count"],
        n_heads=n_heads,
        n_kv_heads=get("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        ffn_dim=meta["llama.feed_forward_length"],
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        max_seq_len=meta["llama.context_length"],
        norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        ffn_bias="blk.0.ffn_down.bias" in tensors,
        tie_embeddings="output.weight" not in tensors,
        moe=MoE(get("expert_count"), meta["llama.expert_used_count"]) if get("expert_count") else None,
        bos_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
    )
    if "rope_freqs.weight" in tensors:  # llama3 scaling, stored as what each frequency is divided by
        factors = torch.tensor(tensors.pop("rope_freqs.weight").data.copy())
        llama3 = replace(config, rope_scaling=RopeScaling("llama3", float(factors.max())))
        if not torch.allclose(rope_frequencies(config) / rope_frequencies(llama3), factors, rtol=1e-3):
            raise UsageError("rope_freqs.weight is not Llama 3.1's scaling, which is the only one supported")
        config = llama3
    return config


def read_sources(tensors: dict, config: ModelConfig, dtype: torch.dtype) -> dict[str, Source]:
    """The GGUF's tensors under Hugging Face's names and in its row order, none of them dequantized yet."""
    sources = {}
    for name, t in tensors.items():
        *layer, stem, kind = name.split(".")
        if stem not in NAMES:
            raise UsageError(f"the GGUF's tensor {name} has no place in this model")
        new = ".".join((["model.layers", layer[1]] if len(layer) > 1 else []) + [NAMES[stem], kind])
        shape = torch.Size(int(n) for n in reversed(t.shape))

        def read(t=t, shape=shape, e=None, rows=stem in ("attn_q", "attn_k")):
            data = gguf.dequantize(t.data if e is None else t.data[e], t.tensor_type)
            out = torch.from_numpy(data.copy()).view(shape).to(dtype)
            return unpermute(out, config.head_dim) if rows else out

        if "{e}" in new:
            for e in range(shape[0]):
                sources[new.format(e=e)] = (shape[1:], dtype, lambda r=read, s=shape[1:], e=e: r(shape=s, e=e))
        else:
            sources[new] = (shape, dtype, read)
    return sources


def write_tokenizer(meta: dict, folder: Path):
    """tokenizer.json or tokenizer.model, and tokenizer_config.json, from the GGUF's own vocabulary."""
    pieces, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    bos, eos = (meta.get(f"tokenizer.ggml.{x}_token_id") for x in ("bos", "eos"))
    kind = meta["tokenizer.ggml.model"]
    add_bos = bos is not None and bool(meta.get("tokenizer.ggml.add_bos_token", kind == "llama"))
    for old in ("tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        (folder / old).unlink(missing_ok=True)
    if kind == "gpt2":
        write_bpe(meta, pieces, types, bos if add_bos else None).save(str(folder / "tokenizer.json"))
    elif kind == "llama":
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(meta, pieces, types))
    else:
        raise UsageError(f"tokenizer.ggml.model = {kind!r} is not supported; gpt2 and llama are")
    settings = {
        "bos_token": pieces[bos] if bos is not None else None,
        "eos_token": pieces[eos] if eos is not None else None,
        "add_bos_token": add_bos,
        "chat_template": meta.get("tokenizer.chat_template"),
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def write_bpe(meta: dict, pieces: list[str], types: list[int], bos: int | None) -> Tokenizer:
    pre = meta.get("tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise UsageError(f"tokenizer.ggml.pre = {pre!r} is not supported; these are: {', '.join(SPLITS)}")
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    tok = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, ignore_merges=pre.startswith("llama")))
    split = pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated")
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    tok.pre_tokenizer = pre_tokenizers.Sequence([*digits, split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tok.normalizer = normalizers.NFC()
    tok.add_tokens(
        [AddedToken(p, special=t == CONTROL, normalized=False)
         for p, t in zip(pieces, types, strict=True) if t in (CONTROL, USER_DEFINED)]
    )  # fmt: skip
    if bos is not None:
        b = pieces[bos]
        tok.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(f"{b} $A", f"{b} $A {b} $B", [(b, bos)]),
        ])  # fmt: skip
    return tok


def sentencepiece_model(meta: dict, pieces: list[str], types: list[int]) -> bytes:
    from sentencepiece import sentencepiece_model_pb2 as pb

    proto = pb.ModelProto()
    for piece, score, kind in zip(pieces, meta["tokenizer.ggml.scores"], types, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer, ids = proto.trainer_spec, {x: meta.get(f"tokenizer.ggml.{x}_token_id") for x in ("bos", "eos", "unknown")}
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, 6 in types, len(pieces)
    trainer.bos_id = ids["bos"] if ids["bos"] is not None else -1
    trainer.eos_id = ids["eos"] if ids["eos"] is not None else -1
    trainer.unk_id, trainer.pad_id = ids["unknown"] or 0, -1
    for name, i in (("bos_piece", trainer.bos_id), ("eos_piece", trainer.eos_id), ("unk_piece", trainer.unk_id)):
        if i >= 0:
            setattr(trainer, name, pieces[i])
    normal = proto.normalizer_spec
    normal.name, normal.remove_extra_whitespaces, normal.escape_whitespaces = "identity", False, True
    normal.add_dummy_prefix = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
    return proto.SerializeToString()


if __name__ == "__main__":
    run(main)
