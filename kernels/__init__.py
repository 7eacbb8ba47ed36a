"""The kernels of the operations in layers/, C++ for CPUs and Triton for GPUs, and the capture of steps of kernels.

    schema.py      all arguments of the kernels, one list for C++ and Triton
    build.py       compiles and loads the C++ kernels (csrc/)
    triton/        the Triton kernels; triton/__init__.py lists the files
    capture.py     captures a decode step once as a graph, and replays the graph
"""
