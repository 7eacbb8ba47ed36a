"""Converts other projects' files to model.pth. Start with convert_folder.py or convert_gguf.py.

Every format is converted in two steps. First a reader makes a CanonicalCheckpoint: a config, and tensors with canonical
names and layout, whose data is still on disk. Then write_model reads, stacks and writes them one by one.

    format              opened by             its config by     its tensors by      its tokenizer by
    Hugging Face        convert_folder.py     hf_config.py      hf_tensors.py       (needs no change)
    Meta, tinyllamas    meta.py               meta.py           meta.py             meta_tokenizer.py
    GGUF                gguf_file.py          gguf_config.py    convert_gguf.py     gguf_tokenizer.py

The files, in reading order. The first group is enough for an unquantized folder in Hugging Face's format:

    checkpoint_path.py            finds or makes the model.pth for --checkpoint_path, a folder or a .gguf
    convert_folder.py             converts a folder from Hugging Face or Meta, or with one of the tinyllamas
    canonical_checkpoint.py       CanonicalCheckpoint, which every reader makes, and the canonical names
    families.py                   the table of families, for all formats
      family.py                     its columns, some of which are functions in the next two files
      family_config.py              fields of config.json that only one family has
      family_tensors.py             names and layouts of tensors that only one family has
    hf_config.py, hf_tensors.py   the reader for Hugging Face
    write_model.py                the last step for every format: stacks tensors, and writes model.pth
    source_files.py               finds and records the files from which a model.pth is made

    quantized_weight.py           a weight that stays quantized: renamed, split and reordered like a tensor
    hf_quantized.py               finds the quantized weights of a Hugging Face checkpoint; two files unpack them:
      hf_quantized_integers.py      GPTQ, AWQ, compressed-tensors
      hf_quantized_floats.py        FP8, MXFP4
    lora.py                       --lora: merges an adapter into the weights

    meta.py, meta_tokenizer.py    the reader for Meta and tinyllamas

    convert_gguf.py               converts a GGUF, and reads its tensors
    gguf_file.py                  opens the file
    gguf_config.py                reads the config
    gguf_tokenizer.py             reads the tokenizer
    gguf_quantized.py             --keep: quantized weights stay quantized
      gguf_blocks.py                decodes their blocks

Where to add something new:

    a family                            a row of families.py: FAMILIES (docs/add_a_model.md)
    a known family, as GGUF             a row of gguf_config.py: ARCHITECTURES
    a quantized type of GGUF            a row of gguf_blocks.py: BLOCK_TYPES; only --keep needs it
    a value of tokenizer.ggml.pre       a row of gguf_tokenizer.py: SPLITS
    a quantized format of the hub       a row of hf_quantized.py: LAYER_READERS, with a function in
                                        hf_quantized_integers.py or hf_quantized_floats.py; check_supported; for tensors
                                        with new names, OF_WEIGHT and is_quantized; a line of
                                        docs/quantized_checkpoints.md
    another kind of folder              a branch of convert_folder.py: read_folder
"""
