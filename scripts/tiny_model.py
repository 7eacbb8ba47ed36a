"""Makes a tiny model with random weights and a tokenizer of bytes, in the files of a hub repository. prepare.sh runs
this if TINY_FAMILY is set. It needs transformers (requirements-dev.txt).

    python scripts/tiny_model.py mixtral checkpoints/tiny/mixtral
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from cli.interrupts import exit_on_interrupt

    exit_on_interrupt()

import tokenizers
import torch
import transformers as hf

from cli import common_args
from cli.script import run_script

CONFIGS = {"llama2": hf.LlamaConfig, "mixtral": hf.MixtralConfig, "qwen3": hf.Qwen3Config}
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 320, "max_position_embeddings": 256,
    "initializer_range": 0.2, "bos_token_id": 256, "eos_token_id": 257,
}
CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}<s>assistant: "


def main():
    parser = common_args.build_parser(__doc__)
    parser.add_argument("family", choices=CONFIGS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(CONFIGS[args.family](**SIZES)).save_pretrained(args.folder)
    write_tokenizer(args.folder)
    print(f"wrote {args.folder}")


def write_tokenizer(folder: Path):
    """Writes a tokenizer whose tokens are the 256 bytes, <s> and </s>, with a chat template."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tok = tokenizers.Tokenizer(tokenizers.models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.add_special_tokens(["<s>", "</s>"])
    files = hf.PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    files.save_pretrained(folder)


if __name__ == "__main__":
    run_script(main)
