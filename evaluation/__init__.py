"""How good a model is: the perplexity of a text, and lm_eval's tasks. eval.py is the command."""
