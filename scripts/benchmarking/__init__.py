"""Measurements for the commands scripts/benchmark.py and scripts/compare_llama_cpp.py.

    speed.py            speed and memory of a shape, with random weights
    busy.py             --busy: decoding beside other programs
    tune_triton.py      --tune: the fastest tile sizes of a GPU's products
    gpu_jobs.py         gpu: a table of models, formats and engines
    real_models.py      quantization and speculation: what they gain and cost

    compare_files.py    one model in this project's formats and in llama.cpp's
    compare_speed.py    how fast this project and llama.cpp decode and read a prompt
"""
