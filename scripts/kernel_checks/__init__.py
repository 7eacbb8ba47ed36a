"""The kernels against exact results, with bounds from the arithmetic. benchmark.py has the command "check"; the tests
share all of it.

    error_bounds.py     how far a result may be from the exact one
    exact_results.py    random layers, data whose sums are exact, exact results
    attention.py        the check of attention
    checks.py           all checks of the Triton kernels, and their sizes
    command.py          the command, for a GPU
"""
