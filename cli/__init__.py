"""The command line. Every script uses these files:

    interrupts.py          Ctrl-C ends the script without a traceback, also during the script's imports
    script.py              run_script calls the script's main, and turns an error into one line on stderr
    common_args.py         options that several scripts have, such as --device
    ranks.py               the processes that torchrun started

generate.py also uses these, in this order:

    generate_args.py       the options of generate.py, and the checks of their values
    prompts.py             --prompt and --prompt_file as token ids
    startup.py             before the first token: the draft model, the KV cache's size, compilation
    complete.py            completes the prompts and prints the texts
    report.py              --json, and the summary on stderr
    terminal.py            --chat: a conversation, in place of complete.py and report.py
"""
