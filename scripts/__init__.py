"""The commands beside generate.py, quantize.py and eval.py.

    prepare.sh                  makes a model of the Hugging Face hub ready to run, by the next two and quantize.py
    download.py                 a repository of the hub
    convert_hf_checkpoint.py    Hugging Face's or Meta's folder to model.pth
    convert_gguf.py             GGUF to model.pth

    serve.py                    OpenAI's API over HTTP; openai_api.py is its JSON
    speculate*.sh               speculation with large models, as in gpt-fast

    benchmark.py                speed, memory, quality, and checks of the kernels
    compare_llama_cpp.py        speed beside llama.cpp's
    benchmarking/               what both of them measure, and how
    kernel_checks/              the kernels against exact results: "check" of benchmark.py, and the tests
    tables.py                   docs' tables from the results in benchmarks/

    demo.sh  test.sh  venv.sh   a first run; the test suite; the environment of both
"""
