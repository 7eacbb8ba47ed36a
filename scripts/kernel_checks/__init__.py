"""Compares the results of the kernels with exact results. The bounds of the errors follow from the arithmetic. The
command "check" of benchmark.py and the tests call these files:

    error_bounds.py     bounds of the error of a result
    exact_results.py    random layers, data whose sums are exact, exact results
    attention.py        the check of attention
    sampling.py         the checks of sampling
    checks.py           all checks of the Triton kernels, and the sizes to check
    command.py          the command, for a GPU
"""
