"""Runs commands of the project one after the other, in a process that test_fuzz.py starts.

Each line on stdin is a command with its arguments, in JSON. For each, a line on stdout has its exit status, or null
after a traceback. What the commands themselves write to stdout is dropped.
"""

import contextlib
import io
import json
import resource
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

import generate  # noqa: E402
from cli.script import run_script  # noqa: E402
from scripts import convert_gguf, convert_hf_checkpoint  # noqa: E402

MAINS = {"convert": convert_hf_checkpoint.main, "gguf": convert_gguf.main, "generate": generate.main}
MEMORY = 2 * 2**30  # the most bytes that the commands may allocate


def main():
    torch.set_num_threads(1)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, in_use + MEMORY))
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        status = status_of(command, arguments)
        sys.stderr.flush()
        print(json.dumps(status), flush=True)


def status_of(command: str, arguments: list[str]) -> int | None:
    sys.argv = [f"{command}.py", *arguments]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            run_script(MAINS[command])
            return 0
        except SystemExit as e:
            return e.code
        except BaseException:  # a panic of tokenizers is not an Exception
            traceback.print_exc()
            return None


if __name__ == "__main__":
    main()
