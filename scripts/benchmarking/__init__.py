"""Measurements for two commands. scripts/benchmark.py calls

    speed.py            the command speed: speed and memory of a shape, with random weights
    busy.py             speed --busy: decoding next to other programs
    tune_triton.py      speed --tune: the fastest tile sizes of a GPU's matmuls
    gpu_jobs.py         the commands gpu and hf_transformers: a table of models, formats and engines
    real_models.py      the commands quantization and speculation: gains and costs with a real model

and scripts/compare_llama_cpp.py calls

    compare_files.py    makes the files of one model in this project's formats and in llama.cpp's
    compare_speed.py    measures decoding and prefill on both sides
"""
