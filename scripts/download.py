"""What the converter needs of a repository on the Hugging Face hub, to checkpoints/OWNER/NAME.

    python scripts/download.py --repo_id meta-llama/Llama-3.2-1B --hf_token hf_...
    python scripts/download.py --repo_id karpathy/tinyllamas/stories15M    # one of its .pt, in a folder of its own

What is there already is not fetched again. HF_ENDPOINT names another hub than the public one.
"""

import argparse
import os
import re
import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while torch is being loaded; run() sees to the rest
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import run
from model import UsageError

TOKENIZERS = {"tokenizer.json", "tokenizer.model"}
SETTINGS = {"config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
            "chat_template.jinja"}  # fmt: skip
WEIGHTS = {  # by preference; consolidated*.safetensors holds the same again under other names
    "model.safetensors": r"(?!consolidated)[^/]+\.safetensors",
    "pytorch_model.bin": r"pytorch_model[^/]*\.bin",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo_id", required=True, help="OWNER/NAME, or OWNER/NAME/STEM for its STEM.pt")
    parser.add_argument("--hf_token", help="for private and gated repositories (default: HF_TOKEN, or `hf auth login`)")
    args = parser.parse_args()
    logging.set_verbosity_error()  # what it warns of is an error here
    if not sys.stderr.isatty():
        disable_progress_bars()
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # or Ctrl-C waits for the files under way
    download(args.repo_id, args.hf_token or None)
    print(f"wrote checkpoints/{args.repo_id}")


def download(repo_id: str, token: str | None):
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+){1,2}", repo_id) or ".." in repo_id:
        raise UsageError(f"--repo_id must be OWNER/NAME, as in meta-llama/Llama-3.2-1B, not {repo_id!r}")
    repo, stem = "/".join(repo_id.split("/")[:2]), "".join(repo_id.split("/")[2:])
    hub, folder = constants.ENDPOINT, Path("checkpoints", repo_id)
    try:
        info = HfApi(token=token).model_info(repo)
        files = choose(repo, {file.rfilename for file in info.siblings}, stem)
        snapshot_download(repo, revision=info.sha, allow_patterns=files, local_dir=folder, token=token)
    except UsageError:
        raise
    except GatedRepoError:
        raise UsageError(f"{repo} is gated: accept its terms at {hub}/{repo} and give your --hf_token") from None
    except RepositoryNotFoundError:
        raise UsageError(f"{hub} has no {repo}, or it is private: check the spelling, or give --hf_token") from None
    except HfHubHTTPError as e:
        status = e.response.status_code
        what = "check the token (--hf_token or HF_TOKEN)" if status in (401, 403) else "try again later"
        raise UsageError(f"{hub} answers {status} for {repo}: {what}") from None
    except Exception as e:  # the network's errors, whose types change with huggingface_hub, and the disk's
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise UsageError(f"cannot download {repo} from {hub}: {why}") from None
    if missing := [name for name in files if not (folder / name).is_file()]:  # snapshot_download may only warn
        raise UsageError(f"the download of {repo} stopped before {missing[0]}; run it again to go on")
    if not TOKENIZERS & set(files):
        print(f"{repo} has no tokenizer; put its tokenizer.model or tokenizer.json into {folder}", file=sys.stderr)


def choose(repo: str, names: set[str], stem: str) -> list[str]:
    """The files to get. Raises UsageError where they make no model that the converter reads."""
    for file, pattern in WEIGHTS.items():
        if not stem and "config.json" in names and {file, f"{file}.index.json"} & names:
            weights = {name for name in names if re.fullmatch(pattern, name)}
            return sorted((SETTINGS | TOKENIZERS | weights | {f"{file}.index.json"}) & names)
    models = sorted(name for name in names if re.fullmatch(r"[^/]+\.pt", name) and stem in ("", name[:-3]))
    if len(models) == 1:
        return models + sorted(TOKENIZERS & names)
    if models:
        raise UsageError(f"{repo} holds {', '.join(models)}: choose one, as in --repo_id {repo}/{models[0][:-3]}")
    wanted = f"{stem}.pt" if stem else "config.json with model.safetensors or pytorch_model.bin, nor a .pt"
    raise UsageError(f"{repo} holds no {wanted}")


if __name__ == "__main__":
    run(main)
