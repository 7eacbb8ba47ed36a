"""What scripts/benchmark.py and scripts/compare_llama_cpp.py measure, and how. They are the commands.

    speed.py            a shape's speed and memory, with random weights
    busy.py             --busy: decoding beside other programs
    tune_triton.py      --tune: the fastest tile sizes of a GPU's products
    gpu_jobs.py         gpu: a table of models, formats and engines
    real_models.py      quantization and speculation: what they gain and cost

    compare_files.py    one model in this project's formats and in llama.cpp's
    compare_speed.py    how fast both decode and read a prompt
"""
