"""docs/add_a_model.md: its diff, applied to a copy of the tree, makes Gemma run as transformers does."""

import re
import shutil
import subprocess
import sys

import torch
import transformers as hf

from tests.tiny import ROOT, SIZES

CHECK = """
import sys
from pathlib import Path
sys.path.insert(0, "scripts")
import torch
from convert_hf_checkpoint import convert_folder
from generate import build_steps, generate, load_model
folder = Path(sys.argv[1])
convert_folder(folder)
tokens, result = torch.load(folder / "tokens"), []
for fast in (False, True):
    model = load_model(folder / "model.pth", torch.device("cpu"), torch.float32, fast)
    model.setup_caches(2, 60)
    with torch.inference_mode():
        result.append(model(tokens, torch.arange(40)))
    steps = build_steps(model, {"temperature": 0}, False, False)
    result.append(torch.tensor(list(generate(*steps, tokens, 0, 20))).T)
torch.save(result, folder / "result")
"""


def test_gemma(tmp_path):
    tree, folder = tmp_path / "tree", tmp_path / "gemma"
    shutil.copytree(ROOT / "scripts", tree / "scripts")
    for file in (f for f in ROOT.iterdir() if f.suffix in (".py", ".cpp")):
        shutil.copy(file, tree)
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/add_a_model.md").read_text(), re.S)
    assert diff.count("\n") < 60
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tree, check=True)

    torch.manual_seed(0)
    config = hf.GemmaConfig(**SIZES | dict(head_dim=256, num_key_value_heads=1))
    theirs = hf.GemmaForCausalLM(config).float().eval()
    for name, p in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 0.0, 0.3)
    theirs.save_pretrained(folder)
    tokens = torch.randint(0, 97, (2, 40))
    torch.save(tokens, folder / "tokens")
    subprocess.run([sys.executable, "-c", CHECK, folder], cwd=tree, check=True)

    theirs.generation_config.eos_token_id = None
    mask = torch.ones_like(tokens)
    new = theirs.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=0)[:, 40:]
    with torch.inference_mode():
        logits = theirs(tokens).logits
    plain, plain_new, fast, fast_new = torch.load(folder / "result")
    for ours in (plain, fast):
        torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(plain_new, new) and torch.equal(fast_new, new)
