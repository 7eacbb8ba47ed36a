"""Writes the README's tables anew from benchmarks/*.json, which the measuring scripts made.

    python scripts/tables.py            # a test fails while the README is not what this makes of it

A table stands between <!-- NAME --> and <!-- /NAME -->; it has a row or more for every benchmarks/*_NAME.json.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main():
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(text: str) -> str:
    for name, (head, rows) in TABLES.items():
        files = sorted((ROOT / "benchmarks").glob(f"*_{name}.json"))
        cells = [row for path in files for row in rows(json.loads(path.read_text()))]
        lines = [head, [":--" if i == 0 else "--:" for i in range(len(head))], *cells]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = text.split(begin)
        text = before + begin + table + "\n" + end + rest.split(end)[1]
    return text


def speed(r: dict) -> list[list[str]]:
    kind = {"int8": "int8", "int4": f"int4 g{r['groupsize']}"}.get(r["mode"], r["precision"])
    return [[
        f"{r['config']}, {kind}", f"{r['decode_tokens_per_sec']:.1f}",
        f"{r['decode_gb_per_sec']:.1f}", f"{r['read_gb_per_sec_before']:.1f}, {r['read_gb_per_sec_after']:.1f}",
        f"{r['verify_5_over_1']:.2f}", f"{r['prefill_512_tokens_per_sec']:.0f}",
        "" if r["mode"] else f"{r['peak_over_weights_and_kv_bytes'] / 1e6:.0f}",  # quantizing takes some too
    ]]  # fmt: skip


def quantization(r: dict) -> list[list[str]]:
    return [
        [mode, f"{row['file_bytes'] / 1e6:.0f}", f"{row['bits_per_weight']:.2f}", f"{row['perplexity']:.2f}",
         f"{100 * row['perplexity_change']:+.1f} %", f"{row['decode_tokens_per_sec']:.0f}"]
        for mode, row in r["modes"].items()
    ]  # fmt: skip


def speculation(r: dict) -> list[list[str]]:
    draft = Path(r["draft"]).stem
    return [
        [f"{draft}: {name}", f"{row['plain']:.0f}", f"{row['speculative']:.0f}", f"**{row['ratio']:.2f}**",
         f"{row['tokens_per_step']:.2f}"]
        for name, row in r["prompts"].items()
    ]  # fmt: skip


def llama_cpp(r: dict) -> list[list[str]]:
    both = lambda row, key, form: " / ".join(format(row[side][key], form) for side in ("ours", "theirs"))  # noqa: E731
    model = r["model"].removesuffix(".Q4_1.gguf")  # the demo's
    return [
        [f"{model}, {both(row, 'file', '')}", both(row, "decode", ".1f"), f"**{row['decode_ratio']:.2f}**",
         both(row, "share_of_read", ".0%"), both(row, "prefill", ".0f"), f"**{row['prefill_ratio']:.2f}**"]
        for row in r["pairs"]
    ]  # fmt: skip


SPEED = ["shape", "decode, tokens/s", "GB/s", "memory reads GB/s, before and after", "5-token / 1-token step"]
SPEED += ["prefill 512, tokens/s", "MB over weights and cache"]
LLAMA_CPP = ["ours / theirs", "decode, tokens/s", "ratio", "share of memory's read bandwidth"]
LLAMA_CPP += ["prefill 512, tokens/s", "ratio"]
TABLES = {
    "speed": (SPEED, speed),
    "llama_cpp": (LLAMA_CPP, llama_cpp),
    "quantization": (["", "file, MB", "bits/weight", "perplexity", "change", "decode, tokens/s"], quantization),
    "speculation": (["proposed by", "plain, tokens/s", "speculative", "ratio", "tokens a step"], speculation),
}

if __name__ == "__main__":
    main()
