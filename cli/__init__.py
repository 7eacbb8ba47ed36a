"""The command line. In every script:

    interrupts.py          Ctrl-C ends the script without a traceback, also during its imports
    script.py              run_script calls the script's main, and makes of an error one line on stderr
    options.py             options that several scripts have, such as --device
    ranks.py               several processes, which torchrun started

In generate.py, in the order of their use:

    arguments.py           the options of generate.py, and the checks of their values
    prompts.py             --prompt and --prompt_file as token ids
    startup.py             what comes before the first token: a draft model, the KV cache's size, compilation
    complete.py            completes the prompts and prints the texts
    report.py              --json, and the summary on stderr
    terminal.py            --chat, a conversation: instead of complete.py and report.py
"""
