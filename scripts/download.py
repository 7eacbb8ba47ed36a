"""Downloads a model from the Hugging Face hub to checkpoints/OWNER/NAME, but only the files that conversion needs.

    python scripts/download.py --repo_id meta-llama/Llama-3.2-1B --hf_token hf_...
    python scripts/download.py --repo_id karpathy/tinyllamas/stories15M    # one .pt, in a folder of its own

Files that exist already are not downloaded again. HF_ENDPOINT names a hub other than the public one.
"""

import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from cli.interrupts import exit_on_interrupt

    exit_on_interrupt()

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, logging

from cli import common_args
from cli.interrupts import exit_on_interrupt
from cli.script import run_script
from converters.source_files import HF_SETTINGS
from text.tokenizer_files import TOKENIZER_FILES, TOKENIZERS
from utils.errors import UsageError

# The weights are the files that match the pattern on the right, if the repository has the file on the left or its
# index.json. The first row that applies counts. Leave out consolidated*.safetensors: it holds the same weights under
# other names.
WEIGHTS = {
    "model.safetensors": r"(?!consolidated)[^/]+\.safetensors",
    "pytorch_model.bin": r"pytorch_model[^/]*\.bin",
}


def main():
    parser = common_args.build_parser(__doc__)
    parser.add_argument("--repo_id", required=True, help="OWNER/NAME, or OWNER/NAME/STEM for its STEM.pt")
    parser.add_argument("--hf_token", help="for private and gated repositories (default: HF_TOKEN, or `hf auth login`)")
    args = parser.parse_args()
    logging.set_verbosity_error()  # where huggingface_hub only warns, download raises an error
    if not sys.stderr.isatty():
        disable_progress_bars()
    exit_on_interrupt()  # otherwise Ctrl-C would wait for the files that are being downloaded
    download(args.repo_id, args.hf_token or None)
    print(f"wrote checkpoints/{args.repo_id}")


def download(repo_id: str, token: str | None):
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+){1,2}", repo_id) or ".." in repo_id:
        raise UsageError(f"--repo_id must be OWNER/NAME, as in meta-llama/Llama-3.2-1B, not {repo_id!r}")
    owner, name, *stem = repo_id.split("/")
    repo, folder = f"{owner}/{name}", Path("checkpoints", repo_id)
    try:
        info = HfApi(token=token).model_info(repo)
        files = choose_files(repo, {file.rfilename for file in info.siblings}, *stem)
        snapshot_download(repo, revision=info.sha, allow_patterns=files, local_dir=folder, token=token)
    except UsageError:
        raise
    except Exception as e:  # errors of the disk or the network; the types of network errors change with huggingface_hub
        raise UsageError(explain_error(repo, e)) from None
    for file in files:
        if not (folder / file).is_file():  # snapshot_download may only warn
            raise UsageError(f"the download of {repo} stopped before {file}; run it again to continue")
    if not set(TOKENIZERS) & set(files):
        print(f"{repo} has no tokenizer; put its tokenizer.model or tokenizer.json into {folder}", file=sys.stderr)


def choose_files(repo: str, names: set[str], stem: str | None = None) -> list[str]:
    """Chooses which files of a repository to download: those for stem.pt or, without a stem, for its model."""
    if stem is None and "config.json" in names:
        for file, pattern in WEIGHTS.items():
            index = f"{file}.index.json"
            if file in names or index in names:
                weights = {name for name in names if re.fullmatch(pattern, name)}
                return sorted({*HF_SETTINGS, *TOKENIZER_FILES, index, *weights} & names)
    wanted = r"[^/]+\.pt" if stem is None else re.escape(f"{stem}.pt")
    models = sorted(name for name in names if re.fullmatch(wanted, name))
    if len(models) == 1:
        return models + sorted(names & set(TOKENIZERS))
    if models:
        example = models[0].removesuffix(".pt")
        raise UsageError(f"{repo} holds {', '.join(models)}: choose one, as in --repo_id {repo}/{example}")
    if stem is not None:
        raise UsageError(f"{repo} holds no {stem}.pt")
    raise UsageError(f"{repo} holds no config.json with model.safetensors or pytorch_model.bin, nor a .pt")


def explain_error(repo: str, e: Exception) -> str:
    hub = constants.ENDPOINT
    if isinstance(e, GatedRepoError):
        return f"{repo} is gated: accept its terms at {hub}/{repo} and give your --hf_token"
    if isinstance(e, RepositoryNotFoundError):
        return f"{hub} has no {repo}, or it is private: check the spelling, or give --hf_token"
    if isinstance(e, HfHubHTTPError):
        status = e.response.status_code
        remedy = "check the token (--hf_token or HF_TOKEN)" if status in (401, 403) else "try again later"
        return f"{hub} answers {status} for {repo}: {remedy}"
    why = (str(e) or type(e).__name__).splitlines()[0]
    return f"cannot download {repo} from {hub}: {why}"


if __name__ == "__main__":
    run_script(main)
