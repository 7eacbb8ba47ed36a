"""Text to tokens and back. Each file imports only from the files above it in this list.

    chat_template.py      a chat's messages to one text
    tokenizer_files.py    reads the files of a checkpoint's tokenizer
    tokenizer.py          Tokenizer: encode, decode, encode_chat; text from tokens as they arrive
    prompt.py             a prompt to tokens, unless it is too long
"""
