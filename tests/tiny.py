"""Tiny random checkpoints of every family, made with transformers.

    python -m tests.tiny mixtral checkpoints/tiny    # a whole Hugging Face folder, tokenizer included
"""

import sys
import tempfile
from pathlib import Path

import tokenizers
import torch
import transformers as hf

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from convert_hf_checkpoint import convert_folder  # noqa: E402

SIZES = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=97, max_position_embeddings=256, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # fmt: skip
FAMILIES = {
    "llama2": (hf.LlamaConfig, dict(num_key_value_heads=4)),
    "llama3": (hf.LlamaConfig, dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama-linear": (hf.LlamaConfig, dict(rope_parameters=dict(rope_type="linear", rope_theta=1e6, factor=4.0))),
    "llama-bias": (hf.LlamaConfig, dict(attention_bias=True, mlp_bias=True)),
    "mistral-window": (hf.MistralConfig, dict(sliding_window=16)),
    "mistral-nemo": (hf.MistralConfig, dict(head_dim=32, sliding_window=None)),
    "mixtral": (hf.MixtralConfig, dict(num_local_experts=8, num_experts_per_tok=2)),
    "qwen2": (hf.Qwen2Config, {}),
    "qwen3": (hf.Qwen3Config, dict(head_dim=16)),
    "qwen3-moe": (hf.Qwen3MoeConfig, dict(head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32,
                                          norm_topk_prob=True)),
}  # fmt: skip


def make_hf(family: str, **sizes):
    torch.manual_seed(0)
    kind, extra = FAMILIES[family]
    model = hf.AutoModelForCausalLM.from_config(kind(**SIZES | extra | sizes), attn_implementation="eager")
    for name, p in model.named_parameters():  # biases and norms that matter
        if "bias" in name or "norm" in name:
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3)
    return model.float().eval()


def convert(folder: Path) -> Path:
    convert_folder(folder)
    return folder / "model.pth"


def to_ours(theirs, fast: bool = True):
    from generate import load_model

    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return load_model(convert(Path(folder)), torch.device("cpu"), torch.float32, fast)


def write_folder(family: str, folder: Path):
    """A checkpoint as the hub holds them, with a tokenizer of bytes, <s> and </s>, and a chat template."""
    make_hf(family, vocab_size=320, hidden_size=64, intermediate_size=96, bos_token_id=256,
            eos_token_id=257).save_pretrained(folder)  # fmt: skip
    byte = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(byte, []))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.add_special_tokens(["<s>", "</s>"])
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}<s>assistant: "
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", chat_template=template
    ).save_pretrained(folder)


if __name__ == "__main__":
    write_folder(sys.argv[1], Path(sys.argv[2]))
