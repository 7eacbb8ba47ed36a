"""The command line. In every script:

    handle_interrupts.py   the first import: Ctrl-C ends the script without a traceback, also during the other imports
    script.py              run_script calls the script's main, and makes a line on stderr of an error
    options.py             options that several scripts have, such as --device
    checkpoints.py         --checkpoint_path, which may name a folder or a .gguf
    ranks.py               several processes, which torchrun started
    interrupts.py          what Ctrl-C does; for the first two

In generate.py, in the order in which they are used:

    arguments.py           its options, and the checks of their values
    prompts.py             --prompt and --prompt_file as token ids
    startup.py             what comes before the first token: a draft model, the KV cache's size, compilation
    complete.py            completes the prompts and prints the texts
    report.py              --json, and the summary on stderr
    terminal.py            instead of the last two: --chat, a conversation
"""
