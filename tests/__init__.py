"""The tests. Which files hold which part of the project:

    model.py, layers.py, rope.py    test_model (every family), test_grok_and_baichuan, test_mixtral, test_mxfp4
    config.py                       test_hf_config
    checkpoint.py                   test_checkpoint
    loading.py                      test_loading
    quantize.py, gptq.py            test_quantize, test_gptq
    tp.py, collectives.py           test_tp
    kernels/                        test_record, test_kernels_builds
    kernels/formats/                test_quantize
    kernels/csrc/                   test_kernels, test_kernels_attention, test_kernels_experts, test_threads
    kernels/triton/                 test_triton, test_triton_launch
    converters/                     test_convert, test_hf_config, test_hf_quantized, test_hf_quantized_broken,
                                    test_lora, test_meta; of GGUF test_convert_gguf, test_gguf_quantized,
                                    test_gguf_tokenizer; of a folder in place of a file test_checkpoint_path
    text/                           test_tokenizer, test_tokenizer_files
    engine/                         test_generate, test_sampling, test_scheduler, test_speculative, test_chat
    cli/, generate.py               test_cli, test_mistakes, test_terminal, test_parallel_cli, test_speculative_cli
    llm.py                          test_library
    eval.py, evaluation/            test_eval
    utils/                          test_machine, test_fuzz
    scripts/                        test_benchmark, test_benchmark_busy, test_compare, test_demo, test_download; of the
                                    server test_serve, test_serve_clients, test_serve_errors
    the pages                       test_readme, test_add_a_model
    everything at once              test_robust (no memory, kill -9, Ctrl-C), test_fuzz (broken files)

A fixture of several files is in fixtures.py, or in the file that a test file names in pytest_plugins. tiny.py makes the
checkpoints.
"""
