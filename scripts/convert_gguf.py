"""A GGUF file to model.pth and its tokenizer.

    python scripts/convert_gguf.py model.Q4_1.gguf --checkpoint_dir checkpoints/model
    python scripts/convert_gguf.py model-00001-of-00003.gguf --checkpoint_dir checkpoints/model    # and the other parts

Reads the architectures llama (Mixtral, too), qwen2, qwen3, qwen3moe, gemma, gemma2, gemma3, phi3, olmo2 (Olmo 3, too),
smollm3, granite, glm4 and gpt-oss, in F32, F16, BF16 and every quantized type that the gguf package dequantizes. The
vocabulary becomes tokenizer.json (byte-level BPE) or tokenizer.model (sentencepiece); bos, eos and chat template go to
tokenizer_config.json.
"""

import math
import os
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli

if __name__ == "__main__":
    cli.exit_on_interrupt()

try:
    import gguf
    import numpy as np
except ImportError as e:
    cli.exit_with(f"this script needs `pip install gguf protobuf` ({e})")
import torch
from convert_hf_checkpoint import Reader, Tensors, convert, reorder_heads, rope_order
from gguf_tokenizer import tokenizer_files
from torch import Tensor

from config import ModelConfig, RopeScaling, UsageError
from families import FAMILIES, config_from_hf
from model import rope_frequencies

HF_NAMES = {  # GGUF's names of modules, and those in convert_hf_checkpoint's tables
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_sinks": "self_attn",
    "post_attention_norm": "post_attention_norm",
    "ffn_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_ffn_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # whose rows attn_qkv has
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
# Tensors of no module: what RoPE's frequencies are divided by, Llama 3.1's and LongRoPE's
ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"

# GGUF's metadata, after "llama.", and the fields of config.json that say the same
REQUIRED_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
FIELDS = REQUIRED_FIELDS | {
    "feed_forward_length": "intermediate_size",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
# What changes the maths in a way that model.py does not implement -> the values with which it changes nothing
UNSUPPORTED_FIELDS = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.temperature_scale": (0,),
    "expert_gating_func": (0, 1),  # 1: softmax
    "expert_shared_count": (0,),
    "expert_weights_scale": (0, 1),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "rope.dimension_sections": (),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}


# ---- The architectures ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """How the GGUF files of one architecture are read."""

    family: str  # in families.py
    fields: dict[str, str] = field(default_factory=dict)  # more of FIELDS
    extra_fields: Callable[[dict], dict] = lambda hf: {}  # config.json's fields that the metadata lack
    names: dict[str, str] = field(default_factory=dict)  # what differs from HF_NAMES
    ffn_up_has_gate: bool = False  # ffn_up has the rows of the gate, too, first
    meta_order: bool = False  # Q and K have their rows in Meta's order


def llama(hf: dict) -> dict:
    return {"architectures": ["MixtralForCausalLM"]} if hf.get("num_local_experts") else {}


def gemma2(hf: dict) -> dict:
    window = hf.get("sliding_window", 4096)
    return {"query_pre_attn_scalar": query_dim(hf, n_layers_of_27b=46), "sliding_window": window}


def gemma3(hf: dict) -> dict:
    return {"query_pre_attn_scalar": query_dim(hf, n_layers_of_27b=62)}


def query_dim(hf: dict, n_layers_of_27b: int) -> int:
    """Gemma divides its scores by the square root of this: a head's elements, but in the models of 27B another size."""
    if hf["num_hidden_layers"] == n_layers_of_27b:
        return hf["hidden_size"] // hf["num_attention_heads"]
    return hf["head_dim"]


def olmo2(hf: dict) -> dict:
    """Olmo 3 is Olmo 2 with a window."""
    return {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3"} if hf.get("sliding_window") else {}


def granite(hf: dict) -> dict:
    return {"attention_multiplier": hf.get("attention_multiplier") or hf["head_dim"] ** -0.5}


def qwen3moe(hf: dict) -> dict:
    return {"norm_topk_prob": hf.get("norm_topk_prob", True)}


def gpt_oss(hf: dict) -> dict:
    """YaRN's limits are not rounded. That is OpenAI's code; llama.cpp rounds them."""
    return {"rope_scaling": (hf["rope_scaling"] or {}) | {"truncate": False}}


# Where neither extra_fields nor the metadata have a field, the family's default holds: Gemma 3's local rope_theta,
# which layers of Gemma 2 and 3 and gpt-oss have a window, which layers of SmolLM3 have no RoPE.
ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", extra_fields=llama, meta_order=True),
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen3": Architecture("Qwen3ForCausalLM"),
    "qwen3moe": Architecture(
        "Qwen3MoeForCausalLM",
        {"expert_feed_forward_length": "moe_intermediate_size", "expert_weights_norm": "norm_topk_prob"},
        qwen3moe,
    ),
    "gemma": Architecture("GemmaForCausalLM"),
    "gemma2": Architecture("Gemma2ForCausalLM", extra_fields=gemma2),
    "gemma3": Architecture("Gemma3ForCausalLM", {"rope.freq_base_swa": "rope_local_base_freq"}, gemma3),
    "phi3": Architecture("Phi3ForCausalLM", ffn_up_has_gate=True),
    "olmo2": Architecture("Olmo2ForCausalLM", extra_fields=olmo2),
    "smollm3": Architecture("SmolLM3ForCausalLM", meta_order=True),
    "granite": Architecture("GraniteForCausalLM", extra_fields=granite, meta_order=True),
    "glm4": Architecture("Glm4ForCausalLM", ffn_up_has_gate=True),
    "gpt-oss": Architecture(
        "GptOssForCausalLM",
        {"expert_feed_forward_length": "intermediate_size"},
        gpt_oss,
        names={"post_attention_norm": HF_NAMES["ffn_norm"]},  # it comes after attention and before the feed-forward
    ),
}


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
    if file.is_dir():
        raise UsageError(f"{file} is a folder; give a .gguf file")
    if not file.is_file():
        raise UsageError(f"{file} does not exist")
    meta, stored = read_parts(file)
    try:
        config = read_config(meta, stored)
        tensors, read = read_tensors(stored, config, dtype, find_architecture(meta))
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


def read_parts(file: Path) -> tuple[dict, dict[str, StoredTensor]]:
    """The metadata and the tensors of file and, if it is one of several parts, of all of them. Raises UsageError."""
    meta, stored = read_part(file)
    n_parts = meta.get("split.count", 1)
    if type(n_parts) is not int or n_parts <= 1:
        return meta, stored
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", file.name)
    if match is None or int(match[2]) != n_parts:
        raise UsageError(f"{file} is one of {n_parts} parts, but not named like x-00001-of-{n_parts:05}.gguf")
    parts = [file.with_name(f"{match[1]}-{i + 1:05}-of-{match[2]}.gguf") for i in range(n_parts)]
    for part in parts:
        if not part.is_file():
            raise UsageError(f"{part} does not exist; {file} needs all {n_parts} parts")
    read = [read_part(part) for part in parts]
    for i, (part_meta, _) in enumerate(read):
        if (part_meta.get("split.no"), part_meta.get("split.count")) != (i, n_parts):
            raise UsageError(f"{parts[i]} is not part {i + 1} of {n_parts}")
    stored = {name: tensor for _, tensors in read for name, tensor in tensors.items()}
    meta, _ = read[0]  # the others have none
    n_tensors = meta.get("split.tensors.count", len(stored))
    if n_tensors != len(stored):
        raise UsageError(f"the {n_parts} parts of {file} hold {len(stored)} tensors, not {n_tensors}")
    return meta, stored


def read_part(file: Path) -> tuple[dict, dict[str, StoredTensor]]:
    try:
        return read_gguf(file)
    except (MemoryError, OSError):
        raise
    except Exception as e:  # struct, numpy and gguf raise many types on broken input
        raise UsageError(f"{file} is truncated or not GGUF ({type(e).__name__})") from None


# ---- The config -----------------------------------------------------------------------------------------------------


def find_architecture(meta: dict) -> Architecture:
    name = meta["general.architecture"]
    if name not in ARCHITECTURES:
        raise UsageError(f"GGUF architecture {name!r} is not supported; these are: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def read_config(meta: dict, stored: dict[str, StoredTensor]) -> ModelConfig:
    try:
        config = config_from_hf(hf_config(meta, stored))
    except UsageError as e:
        raise UsageError(str(e).replace("config.json", "the GGUF's metadata")) from None
    config = replace(
        config,
        qkv_bias="blk.0.attn_q.bias" in stored or "blk.0.attn_qkv.bias" in stored,
        out_bias="blk.0.attn_output.bias" in stored,
        ffn_bias="blk.0.ffn_down.bias" in stored,
    )
    if ROPE_FACTORS in stored:
        config = replace(config, rope_scaling=read_llama3_scaling(config, stored[ROPE_FACTORS]))
    return config


def hf_config(meta: dict, stored: dict[str, StoredTensor]) -> dict:
    """What Hugging Face's config.json of the same model says."""
    architecture, arch = meta["general.architecture"], find_architecture(meta)
    arch_metadata = {key.removeprefix(f"{architecture}."): value for key, value in meta.items()}
    for key, allowed in UNSUPPORTED_FIELDS.items():
        if key in arch_metadata and arch_metadata[key] not in allowed:
            raise UsageError(f"{architecture}.{key} = {arch_metadata[key]!r} is not supported")
    for key in REQUIRED_FIELDS:
        if key not in arch_metadata:
            raise KeyError(f"{architecture}.{key}")
    hf = {name: arch_metadata[key] for key, name in (FIELDS | arch.fields).items() if key in arch_metadata}
    hf.setdefault("head_dim", hf["hidden_size"] // hf["num_attention_heads"])
    if arch_metadata.get("attention.value_length", hf["head_dim"]) != hf["head_dim"]:
        raise UsageError(f"{architecture}.attention.value_length differs from key_length, which is not supported")
    ends = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    rotary_dim = arch_metadata.get("rope.dimension_count", hf["head_dim"])
    hf |= window_pattern(arch_metadata.get("attention.sliding_window_pattern")) | {
        "vocab_size": stored["token_embd.weight"].data.shape[0],
        "tie_word_embeddings": "output.weight" not in stored,
        "partial_rotary_factor": Fraction(rotary_dim, hf["head_dim"]),  # exact, where a float may round down
        "rope_scaling": rope_scaling(architecture, arch_metadata, stored),
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [i for i in ends if i is not None],
    }
    defaults = {  # llama.cpp's, and not the family's
        "architectures": [arch.family],
        "num_key_value_heads": hf["num_attention_heads"],
        "rope_theta": 10000.0,
        "sliding_window": None,
    }
    return defaults | hf | arch.extra_fields(hf)


def window_pattern(pattern: int | list | None) -> dict:
    """config.json's fields for which layers have the window: all but every so-many-th, or those with True."""
    if isinstance(pattern, list):
        return {"layer_types": ["sliding_attention" if has_window else "full_attention" for has_window in pattern]}
    return {} if pattern is None else {"sliding_window_pattern": pattern}


def rope_scaling(architecture: str, arch_metadata: dict, stored: dict[str, StoredTensor]) -> dict | None:
    """config.json's rope_scaling."""
    rope_type = arch_metadata.get("rope.scaling.type", "linear")
    if LONG_FACTORS in stored and SHORT_FACTORS in stored:
        return {
            "rope_type": "longrope",
            "long_factor": stored[LONG_FACTORS].data.view(np.float32).tolist(),
            "short_factor": stored[SHORT_FACTORS].data.view(np.float32).tolist(),
            "attention_factor": arch_metadata.get("rope.scaling.attn_factor"),
        }
    if rope_type == "linear":
        factor = arch_metadata.get("rope.scaling.factor", arch_metadata.get("rope.scale_linear", 0.0))
        return {"rope_type": "linear", "factor": factor} if factor else None  # 0: no scaling
    if rope_type == "yarn":
        fields = {
            "rope_type": "yarn",
            "factor": arch_metadata["rope.scaling.factor"],
            "attention_factor": arch_metadata.get("rope.scaling.yarn_attn_factor"),
            "beta_fast": arch_metadata.get("rope.scaling.yarn_beta_fast"),
            "beta_slow": arch_metadata.get("rope.scaling.yarn_beta_slow"),
        }
        return {name: value for name, value in fields.items() if value is not None}
    if rope_type != "none":
        raise UsageError(f"{architecture}.rope.scaling.type = {rope_type!r} is not supported")
    return None


def read_llama3_scaling(config: ModelConfig, stored: StoredTensor) -> RopeScaling:
    """Llama 3.1's scaling, of which a GGUF holds nothing but what it divides the frequencies of config by."""
    factors = torch.tensor(stored.data.view(np.float32))
    scaling = RopeScaling("llama3", float(factors.max()))
    scaled = replace(config, rope_scaling=scaling)
    if not torch.allclose(rope_frequencies(config, length=1) / rope_frequencies(scaled, length=1), factors, rtol=1e-3):
        raise UsageError(f"{ROPE_FACTORS} is not Llama 3.1's scaling, which is the only one supported")
    return scaling


# ---- The tensors ----------------------------------------------------------------------------------------------------


def read_tensors(
    stored: dict[str, StoredTensor], config: ModelConfig, dtype: torch.dtype,
    arch: Architecture = ARCHITECTURES["llama"],
) -> tuple[Tensors, Reader]:  # fmt: skip
    """What convert takes: the GGUF's tensors by Hugging Face's names, on the meta device, and a function that reads one
    of them, its rows in our order. Gemma's norms need nothing: a GGUF has the 1 + w that is multiplied by."""
    sources: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if name not in (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS):
            sources |= split_tensor(name, tensor, config, arch)
    tensors = {name: torch.empty(source.shape(), dtype=dtype, device="meta") for name, source in sources.items()}
    order = rope_order(config, arch.meta_order or FAMILIES[arch.family].interleaved_rope)

    def read(name: str) -> Tensor:
        source = sources[name]
        try:
            values = gguf.dequantize(source.data, source.type)
        except NotImplementedError:
            raise UsageError(f"{name} is {source.type.name}, which the gguf package cannot dequantize") from None
        tensor = torch.from_numpy(np.require(values, requirements="W"))  # writable, or PyTorch warns
        return reorder_heads(name, tensor, order)

    return tensors, read


def split_tensor(name: str, tensor: StoredTensor, config: ModelConfig, arch: Architecture) -> dict[str, StoredTensor]:
    """The tensors in Hugging Face's tables that one of the GGUF holds, by name: itself, those whose rows it has one
    below the other, or those of all experts."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    layer, module, kind = match.groups() if match else (None, None, None)
    hf_names = (arch.names.get(module, HF_NAMES.get(module)),)
    parts = [tensor.data]
    if module == "attn_qkv":
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        hf_names, parts = QKV, np.split(tensor.data, [q, q + kv])
    elif module == "ffn_up" and arch.ffn_up_has_gate:
        hf_names, parts = GATE_UP, np.array_split(tensor.data, 2)
    elif module == "attn_sinks":
        kind = "sinks"
    if hf_names[0] is None:
        raise UsageError(f"the GGUF's tensor {name} has no place in this model")
    sources = {}
    for hf_name, part in zip(hf_names, parts, strict=True):
        hf_name = f"{hf_name}.{kind}" if layer is None else f"model.layers.{layer}.{hf_name}.{kind}"
        for e, data in enumerate(part if "{e}" in hf_name else [part]):  # of all experts, or one
            sources[hf_name.format(e=e)] = StoredTensor(tensor.type, data)
    return sources


if __name__ == "__main__":
    cli.run(main)
