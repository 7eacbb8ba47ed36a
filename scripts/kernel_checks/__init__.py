"""Compares the results of the kernels with exact results. The bounds of the errors follow from the arithmetic. The
command "check" of scripts/benchmark.py and the tests call these files:

    error_bounds.py     bounds of the error of a result
    exact_results.py    random layers, data whose sums are exact, exact results
    check_linear.py     the checks of matmuls and of other operations on weights
    check_experts.py    the checks of a mixture of experts
    check_attention.py  the check of attention
    check_sampling.py   the checks of sampling
    all_checks.py       all checks of the Triton kernels, and the sizes to check
    command.py          the command, for a GPU
"""
