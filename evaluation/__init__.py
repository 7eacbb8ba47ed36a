"""How good a model is: the perplexity of a text, and lm_eval's tasks. eval.py is the command. Each file imports only
from the files above it.

    scoring.py       how likely the model finds given tokens, and the perplexity of a text
    lm_harness.py    the model as lm_eval (the lm-evaluation-harness) sees it
"""
