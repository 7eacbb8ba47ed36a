"""The tests, by the parts of the project that they test:

    model.py                        test_model (every family), test_grok_and_baichuan, test_mixtral, test_mxfp4
    config.py                       test_hf_config
    checkpoint.py                   test_checkpoint
    loading.py                      test_loading
    quantize.py, gptq.py            test_quantize, test_gptq
    tp.py, layers/collectives.py    test_tp
    kernels/                        test_capture, test_kernels_builds
    formats/                        test_quantize
    layers/                         test_kernels, test_triton, test_kernels_builds, test_sampling
    kernels/csrc/                   test_kernels, test_kernels_attention, test_kernels_experts,
                                    test_kernels_sampling, test_threads
    kernels/triton/                 test_triton, test_triton_launch
    converters/                     test_convert, test_hf_config, test_hf_quantized, test_hf_quantized_broken,
                                    test_lora, test_meta; GGUF in test_convert_gguf, test_gguf_quantized,
                                    test_gguf_tokenizer; a folder in place of a file in test_checkpoint_path
    text/                           test_tokenizer, test_tokenizer_files
    engine/                         test_generate, test_sampling, test_scheduler, test_speculative, test_chat
    cli/, generate.py               test_cli, test_mistakes, test_terminal, test_parallel_cli, test_speculative_cli
    llm.py                          test_library
    eval.py, evaluation/            test_eval
    utils/                          test_machine, test_fuzz; signals in test_kernels_builds, test_capture
    scripts/                        test_benchmark, test_benchmark_busy, test_compare, test_demo, test_download; the
                                    server in test_serve, test_serve_clients, test_serve_errors
    the pages, examples             test_readme, test_add_a_model, test_examples
    everything at once              test_robust (no memory, kill -9, Ctrl-C), test_fuzz (broken files)

Helpers and fixtures that several test files use:

    tests/tiny.py                 tiny random checkpoints of every family, made with transformers
    tests/tiny_gguf.py            tiny GGUF files
    tests/tiny_tokenizers.py      tokenizers of all styles
    tests/quantized_folders.py    tiny quantized checkpoints, as other projects write them
    tests/byte_models.py          small models whose tokens are bytes, and generate.py called on them
    tests/hub.py                  a server with the API of the Hugging Face hub
    tests/serving.py              two tiny models behind scripts/serve.py, and clients
    tests/fixtures.py             both models of each family; conftest.py loads it
    tests/conftest.py             which test files come first
    tests/cpu_kernels.py          helpers and fixtures for tests of the C++ kernels
    tests/compile_triton.py       compiles the Triton kernels for GPUs that are not here
    tests/compiler.py             a C++ compiler that takes no time
    tests/forks.py                runs commands in forks of the test process, stopped or with little memory
    tests/kernel_loader.py        loads the C++ kernels in processes of their own, for test_kernels_builds
    tests/worker.py               runs commands in one process, for test_fuzz
    tests/tp_ranks.py             the program that torchrun starts for each rank, for test_tp
    tests/threads_test.cpp        the C++ program of test_threads

Fixtures that several test files share are in fixtures.py, or in a file that they name in pytest_plugins.
"""
