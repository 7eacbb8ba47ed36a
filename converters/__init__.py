"""Converts other projects' files to model.pth: folder.py a checkpoint's folder, gguf_tensors.py a GGUF. These two files
are called by scripts/convert_hf_checkpoint.py, scripts/convert_gguf.py and resolve.py.

Every format is converted in two steps. First, a reader makes a SourceModel (model_tensors.py): a config, and tensors
with canonical names and canonical layout, whose data is not read yet. Then convert reads, stacks and writes the tensors
one by one.

    format              opened by       its config by     its tensors by           its tokenizer by
    Hugging Face        hf_files.py     hf_config.py      hf_tensors.py            (needs no change)
    Meta, tinyllamas    meta.py         meta.py           meta.py                  tiktoken_file.py
    GGUF                gguf_file.py    gguf_config.py    gguf_tensors.py          gguf_tokenizer.py

    hf_quantized.py        finds the quantized weights of a Hugging Face checkpoint; these files unpack them:
      hf_integers.py         GPTQ, AWQ, compressed-tensors
      hf_floats.py           FP8, MXFP4
    gguf_quantized.py      --keep: a GGUF's quantized weights stay quantized
      gguf_blocks.py         decodes a GGUF's blocks
    lora.py                --lora: merges an adapter into Hugging Face's weights
    quantized_weight.py    a weight that stays quantized: renamed, split and reordered like a tensor
    model_tensors.py       canonical names, which tensors are stacked, and convert, the last step of every format

    families.py            the table of families, for all formats; family.py explains the columns
    family_fields.py       reads fields that only one family's config.json has
    family_tensors.py      renames and splits tensors that only one family has

    resolve.py             finds or makes the model.pth of --checkpoint_path, which may name a folder or a .gguf
    sources.py             records from which files a model.pth was made

Where to add something new:

    a family                            a row of families.py: FAMILIES (docs/add_a_model.md)
    a known family, as GGUF             a row of gguf_config.py: ARCHITECTURES
    a quantized type of GGUF            a row of gguf_blocks.py: BLOCK_TYPES, for --keep only
    a value of tokenizer.ggml.pre       a row of gguf_tokenizer.py: SPLITS
    a quantized format of the hub       a row of hf_quantized.py: LAYER_READERS, with a function in hf_integers.py or
                                        hf_floats.py; hf_quantized.py: check_supported; for tensors with new names,
                                        OF_WEIGHT and is_quantized; a line of docs/quantized_checkpoints.md
    another kind of folder              a branch of folder.py: read_model
"""
