"""What speculation brings on a chat model: tokens/s with it over tokens/s without, in runs that alternate.

    python scripts/measure_speculation.py --checkpoint_path checkpoints/M/model.pth
    python scripts/measure_speculation.py --checkpoint_path checkpoints/M/model.pth \
        --draft_checkpoint_path checkpoints/M/model_int4.g32.pth

Without a draft it is prompt lookup. The prompts: an edit, whose answer repeats what it was given; a story, greedily;
the same drawn at temperature 1, where little repeats.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import run
from generate import (
    build_speculation,
    build_steps,
    load,
    load_draft,
    one_by_one,
    pick_device,
    read_bandwidth,
    speculate,
)

ROUNDS, NEW = 7, 160
TEXT = (
    "The harbour of the old town was built by fishermen who came from the northern islands. They carried stones from "
    "the hills on flat boats, and laid them in two long curved walls that still keep out the winter storms. On the "
    "eastern wall stands a lamp that was once lit with oil; today it runs on electricity, but the keeper still climbs "
    "the ninety steps each evening to look at the sea. Ships that pass at night count its flashes: two short ones, a "
    "pause, and a long one."
)
PROMPTS = {
    "edit": (f"Repeat this text word for word, but write 'sailors' instead of 'fishermen':\n\n{TEXT}", 0.0),
    "story": ("Tell me a story about a clockmaker who finds a letter.", 0.0),
    "story, drawn": ("Tell me a story about a clockmaker who finds a letter.", 1.0),
}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint_path", type=Path, required=True, help="a chat model")
    p.add_argument("--draft_checkpoint_path", type=Path, help="a smaller one with the same vocabulary")
    p.add_argument("--speculate_k", type=int, help="default: generate.py's")
    p.add_argument("--precision", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--device", help="cpu, cuda, mps, xpu ... (default: the machine's accelerator, else cpu)")
    p.add_argument("--json_file", type=Path, help="where the result goes too")
    args = p.parse_args()
    args.speculate_k = args.speculate_k or (5 if args.draft_checkpoint_path else 7)
    how = device, _ = pick_device(args.device), getattr(torch, args.precision)
    model, tokenizer = load(args.checkpoint_path, *how)
    draft = load_draft(args.draft_checkpoint_path, tokenizer, *how) if args.draft_checkpoint_path else None
    prompts = {name: (tokenizer.encode_chat([{"role": "user", "content": x}]), t) for name, (x, t) in PROMPTS.items()}
    for m in (model, draft) if draft else (model,):
        m.setup_caches(1, max(len(ids) for ids, _ in prompts.values()) + NEW)
    result = {"checkpoint": str(args.checkpoint_path), "draft": str(args.draft_checkpoint_path or "prompt lookup"),
              "k": args.speculate_k, "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"),
              "torch": torch.__version__, "read_gb_per_sec": read_bandwidth(device) / 1e9, "prompts": {}}  # fmt: skip
    print(f"{'':16}{'plain':>9}{'speculative':>13}{'ratio':>7}{'tokens a step':>15}")
    for name, (ids, temperature) in prompts.items():
        sampling = {"temperature": temperature}
        prefill, decode = build_steps(model, sampling, args.compile, False)
        verify, propose, cost = build_speculation(model, draft, 3, sampling, args.compile)
        ways = {
            "plain": partial(one_by_one, prefill, decode, 1, device),
            "speculative": partial(speculate, (prefill, decode, verify), propose, cost, args.speculate_k, device),
        }
        rates, per_step = {way: [] for way in ways}, []
        for i in range(ROUNDS + 1):  # the first one warms up
            for way, tokens in ways.items():
                torch.manual_seed(i)
                times, made = [], -1  # the first token is prefill's
                for step in tokens(ids, 0, NEW):
                    times.append(time.perf_counter())
                    made += len(step)
                    if {t for (t,) in step} & set(model.config.eos_ids):
                        break
                if i:
                    rates[way].append(made / (times[-1] - times[0]))
                    per_step += [made / (len(times) - 1)] if way == "speculative" else []
        ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
        row = {way: statistics.median(values) for way, values in rates.items()}
        row |= {"ratio": statistics.median(ratios), "tokens_per_step": statistics.median(per_step)}
        result["prompts"][name] = row
        print(f"{name:16}{row['plain']:9.1f}{row['speculative']:13.1f}{row['ratio']:7.2f}{row['tokens_per_step']:15.2f}")
    if args.json_file:
        args.json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
