"""The command line. Each file imports only from the files above it. Every script uses these files:

    interrupts.py          Ctrl-C ends the script without a traceback, also during the script's imports
    script.py              run_script calls the script's main, and turns an error into one line on stderr
    common_args.py         options that several scripts have, such as --device
    ranks.py               the processes that torchrun started

generate.py also uses these, in this order:

    generate_args.py       the options of generate.py, the checks of their values, and the prompts
    speculation.py         the draft model, and the loop that verifies proposed tokens
    report.py              --json, the summary on stderr, --profile
    parallel.py            --parallel: many prompts at a time
    terminal.py            --chat: a conversation
"""
