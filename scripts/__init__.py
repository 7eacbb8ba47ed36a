"""All commands except generate.py, quantize.py and eval.py. Running a model takes nothing from this folder.

    prepare.sh                  makes a model of the Hugging Face hub ready to run: download, convert, quantize
    download.py                 downloads a repository of the hub
    convert_hf_checkpoint.py    converts a folder from Hugging Face or Meta to model.pth
    convert_gguf.py             converts a GGUF to model.pth
    tiny_model.py               makes a tiny random model, for prepare.sh with TINY_FAMILY

    serve.py                    serves the OpenAI API over HTTP; openai_api.py reads and writes its JSON
    speculate.sh                speculates with a large model; speculate_*.sh are the setups of gpt-fast

    benchmark.py                measures speed, memory and quality, and checks the kernels
    compare_llama_cpp.py        measures speed, compared with llama.cpp
    benchmarking/               the measurements of benchmark.py and compare_llama_cpp.py
    kernel_checks/              compares the kernels with exact results, for "benchmark.py check" and the tests
    tables.py                   writes the results in benchmarks/ into the tables of the docs

    demo.sh                     a first run: downloads a small chat model and asks it a question
    test.sh                     runs the test suite; venv.sh makes the environment of demo.sh and test.sh
    python.sh                   chooses the Python of the other shell scripts
"""
