"""Writes the results of benchmark.py and compare_llama_cpp.py into the tables of README.md and docs/measurements.md.

    python scripts/tables.py            # a test fails while a page differs from what this script writes

A table stands between <!-- NAME --> and <!-- /NAME -->, with at least one row for every benchmarks/*_NAME.json.
"""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs/measurements.md"]

TABLES = {  # name -> columns: (header, template of a cell)
    "speed": [
        ("shape", "{config}, {weights}"),
        ("decode, tokens/s", "{decode_tokens_per_sec:.1f}"),
        ("GB/s", "{decode_gb_per_sec:.1f}"),
        ("memory reads GB/s, before and after", "{read_gb_per_sec_before:.1f}, {read_gb_per_sec_after:.1f}"),
        ("5-token / 1-token step", "{verify_5_over_1:.2f}"),
        ("prefill 512, tokens/s", "{prefill_512_tokens_per_sec:.0f}"),
        ("MB over weights and cache", "{overhead_mb}"),
    ],
    "llama_cpp": [
        ("ours / theirs", "{name}, {ours[file]} / {theirs[file]}"),
        ("decode, tokens/s", "{ours[decode]:.1f} / {theirs[decode]:.1f}"),
        ("ratio", "**{decode_ratio:.2f}**"),
        ("share of memory's read bandwidth", "{ours[share_of_read]:.0%} / {theirs[share_of_read]:.0%}"),
        ("prefill 512, tokens/s", "{ours[prefill]:.0f} / {theirs[prefill]:.0f}"),
        ("ratio", "**{prefill_ratio:.2f}**"),
    ],
    "parallel": [
        ("sequences at a time", "{n}"),
        ("bf16 / BF16, tokens/s in total", "{bf16}"),
        ("int8 / Q8_0", "{int8}"),
        ("int4.g32 / Q4_0", "{int4}"),
    ],
    "busy": [
        ("shape", "{config}, {weights}"),
        ("alone, tokens/s", "{alone_tokens_per_sec:.1f}"),
        ("next to a busy process", "{beside_busy_tokens_per_sec:.1f}"),
        ("one thread next to it", "{one_thread_beside_busy_tokens_per_sec:.1f}"),
        ("all threads / one", "**{beside_busy_over_one_thread:.2f}**"),
        ("two at once", "{first_of_two_tokens_per_sec:.1f}, {second_of_two_tokens_per_sec:.1f}"),
        ("their sum", "{two_tokens_per_sec:.1f}"),
        ("sum / alone", "**{two_over_alone:.2f}**"),
    ],
    "quantization": [
        ("", "{mode}"),
        ("file, MB", "{file_mb:.0f}"),
        ("bits/weight", "{bits_per_weight:.2f}"),
        ("perplexity", "{perplexity:.2f}"),
        ("change", "{percent:+.1f} %"),
        ("decode, tokens/s", "{decode_tokens_per_sec:.0f}"),
    ],
    "whole_texts": [
        ("", "{model}, {weights}"),
        ("decode, tokens/s", "{tokens_per_sec:.0f}"),
        ("share of the card's copy bandwidth", "{share_of_copy:.0%}"),
        ("prefill 2048, tokens/s", "{prefill_2048_tokens_per_sec:,.0f}"),
        ("5-token / 1-token step", "{verify_5_over_1:.2f}"),
        ("original gpt-fast, tokens/s", "{gpt_fast}"),
    ],
    "captured_steps": [
        ("", "{model}, {weights}"),
        ("one step, tokens/s", "{tokens_per_sec:,.0f}"),
        ("share of the card's copy bandwidth", "{share_of_copy:.0%}"),
    ],
    "speculation": [
        ("proposed by", "{proposer}: {prompt}"),
        ("plain, tokens/s", "{plain:.0f}"),
        ("speculative", "{speculative:.0f}"),
        ("ratio", "**{ratio:.2f}**"),
        ("tokens a step", "{tokens_per_step:.2f}"),
    ],
}


def main():
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(text: str) -> str:
    for name in TABLES:
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin in text:
            paths = sorted((ROOT / "benchmarks").glob(f"*_{name}.json"))
            results = [json.loads(path.read_text()) for path in paths]
            before, rest = text.split(begin)
            _, after = rest.split(end)
            text = f"{before}{begin}{table(name, *results)}\n{end}{after}"
    return text


def table(name: str, *results: dict) -> str:
    """Returns one of TABLES in Markdown. results: the contents of JSON files."""
    headers, templates = zip(*TABLES[name], strict=True)
    lines = [headers, [":--"] + ["--:"] * (len(headers) - 1)]
    for result in results:
        for values in rows(name, result):
            lines.append([template.format(**values) for template in templates])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rows(name: str, result: dict) -> list[dict]:
    """Returns, for each row that a JSON file adds to a table, the values for the cells."""
    match name:
        case "speed":
            # Left empty for quantized weights, because the measured peak includes the memory that quantizing took
            overhead = "" if result["mode"] else f"{result['peak_over_weights_and_kv_bytes'] / 1e6:.0f}"
            return [result | {"weights": weights_name(result), "overhead_mb": overhead}]
        case "busy":
            return [result | {"weights": weights_name(result)}]
        case "llama_cpp":
            model = result["model"].removesuffix(".Q4_1.gguf")  # the file that demo.sh downloads
            same_bits = [pair for pair in result["pairs"] if pair["theirs"]["file"] != "file"]
            return [pair | {"name": model} for pair in same_bits]
        case "parallel":
            pairs = dict(zip(("bf16", "int8", "int4"), result["pairs"], strict=True))
            sizes = [key for key in result["pairs"][0]["ours"] if key not in ("file", "bytes_per_token")]
            return [{"n": n} | {name: both_and_ratio(pair, n) for name, pair in pairs.items()} for n in sizes]
        case "quantization":
            return [
                row | {"mode": mode, "file_mb": row["file_bytes"] / 1e6, "percent": 100 * row["perplexity_change"]}
                for mode, row in result["modes"].items()
            ]
        case "whole_texts" | "captured_steps":
            return [row | {"gpt_fast": number_or_nothing(row["gpt_fast_tokens_per_sec"])} for row in result["rows"]]
        case "speculation":
            proposer = Path(result["draft"]).stem
            return [row | {"proposer": proposer, "prompt": prompt} for prompt, row in result["prompts"].items()]


def weights_name(result: dict) -> str:
    mode = result["mode"] or result["precision"]
    return f"int4 g{result['groupsize']}" if mode == "int4" else mode


def both_and_ratio(pair: dict, key: str | int) -> str:
    return f"{pair['ours'][key]:,.0f} / {pair['theirs'][key]:,.0f}, **{pair[f'{key}_ratio']:.2f}**"


def number_or_nothing(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
