"""Text to tokens and back. Each file imports from those above it alone.

    chat_template.py      a chat's messages to one text
    tokenizer_files.py    the files that a tokenizer consists of
    tokenizer.py          Tokenizer: encode, decode, chats; text from tokens as they arrive
"""
